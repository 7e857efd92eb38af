//! Conversations in the terminal: what is said so far, how it is asked of the API, how the answer comes back.

pub(crate) mod answer;
pub(crate) mod repl;

use serde_json::{Map, Value, json};

/// How answers are to be made; what is not set is left to the server.
#[derive(Debug, Clone, Default)]
pub(crate) struct Choices {
    pub(crate) max_tokens: Option<u32>,
    pub(crate) temperature: Option<f32>,
    pub(crate) seed: Option<u64>,
}

/// What was said so far.
#[derive(Debug, Clone)]
pub(crate) struct Conversation {
    model: String,
    choices: Choices,
    system: Option<String>,
    /// (role, content), user and assistant by turns.
    turns: Vec<(&'static str, String)>,
}

/// A request for the next answer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Question {
    pub(crate) path: &'static str,
    pub(crate) body: Value,
}

impl Conversation {
    pub(crate) fn new(model: String, choices: Choices, system: Option<String>) -> Self {
        Self { model, choices, system, turns: Vec::new() }
    }

    /// Replaces the instructions, and forgets what was said under the old ones.
    pub(crate) fn set_system(&mut self, system: Option<String>) {
        self.system = system;
        self.turns.clear();
    }

    pub(crate) fn clear(&mut self) {
        self.turns.clear();
    }

    /// The request that continues the conversation with `text`. Nothing is remembered until [`Self::remember`].
    pub(crate) fn ask(&self, text: &str) -> Question {
        let message = |role: &str, content: &str| json!({"role": role, "content": content});
        let mut messages: Vec<Value> = self.system.iter().map(|system| message("system", system)).collect();
        messages.extend(self.turns.iter().map(|(role, content)| message(role, content)));
        messages.push(message("user", text));
        let mut body = self.body();
        body.insert("messages".to_owned(), messages.into());
        Question { path: "/v1/chat/completions", body: body.into() }
    }

    /// The request that continues `text` without a chat template.
    pub(crate) fn continue_text(&self, text: &str) -> Question {
        let mut body = self.body();
        body.insert("prompt".to_owned(), text.into());
        Question { path: "/v1/completions", body: body.into() }
    }

    /// Keeps a turn. An answer that was stopped half way is kept as far as it came: it is what the user saw.
    pub(crate) fn remember(&mut self, question: &str, answer: &str) {
        self.turns.push(("user", question.to_owned()));
        self.turns.push(("assistant", answer.to_owned()));
    }

    /// The conversation as Markdown.
    pub(crate) fn to_markdown(&self) -> String {
        let mut text = format!("# {}\n", self.model);
        let system = self.system.iter().map(|system| ("system", system));
        for (role, content) in system.chain(self.turns.iter().map(|(role, content)| (*role, content))) {
            text.push_str(&format!("\n## {role}\n\n{}\n", content.trim()));
        }
        text
    }

    fn body(&self) -> Map<String, Value> {
        let mut body = Map::new();
        body.insert("model".to_owned(), self.model.as_str().into());
        body.insert("stream".to_owned(), true.into());
        body.insert("stream_options".to_owned(), json!({"include_usage": true}));
        let choices = [
            ("max_tokens", self.choices.max_tokens.map(Value::from)),
            ("temperature", self.choices.temperature.map(Value::from)),
            ("seed", self.choices.seed.map(Value::from)),
        ];
        body.extend(choices.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))));
        body
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conversation() -> Conversation {
        Conversation::new("m".to_owned(), Choices { seed: Some(7), ..Choices::default() }, Some("be brief".to_owned()))
    }

    #[test]
    fn a_question_carries_instructions_earlier_turns_and_what_was_chosen() {
        let mut conversation = conversation();
        conversation.remember("hi", "hello");
        let body = conversation.ask("and now?").body;
        let roles: Vec<&str> =
            body["messages"].as_array().unwrap().iter().map(|m| m["role"].as_str().unwrap()).collect();
        assert_eq!(roles, ["system", "user", "assistant", "user"]);
        assert_eq!(body["seed"], 7);
        assert!(body.get("temperature").is_none(), "a choice that nobody made was sent");
    }

    #[test]
    fn new_instructions_begin_a_new_conversation() {
        let mut conversation = conversation();
        conversation.remember("hi", "hello");
        conversation.set_system(None);
        assert_eq!(conversation.ask("x").body["messages"].as_array().unwrap().len(), 1);
    }

    #[test]
    fn a_saved_conversation_is_readable() {
        let mut conversation = conversation();
        conversation.remember("hi", "hello");
        assert_eq!(
            conversation.to_markdown(),
            "# m\n\n## system\n\nbe brief\n\n## user\n\nhi\n\n## assistant\n\nhello\n"
        );
    }
}
