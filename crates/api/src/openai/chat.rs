//! `/v1/chat/completions`.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use murmur_chat::{ChatPrompt, Delta, OutputParser};
use serde_json::{Map, Value, json};

use crate::{
    backend::{Finish, TokenInfo},
    body::JsonObject,
    choices::{ChoiceEvent, Choices},
    errors::ApiError,
    fields::Fields,
    openai::{
        chat_request::ChatInput,
        head::{Head, add_timings, random_id},
        logprobs, templates,
    },
    sse::{self, Chunks, Render},
    state::AppState,
    timings::Timings,
};

/// `POST /v1/chat/completions`.
pub(crate) async fn create(
    State(state): State<Arc<AppState>>,
    JsonObject(map): JsonObject,
) -> Result<Response, ApiError> {
    let input = ChatInput::read(Fields::new(map), &*state.backend).await?;
    let (input, prompt) = templates::prepare(&state, input).await?;
    let choices = Choices::start(&*state.backend, state.metrics.clone(), input.generations(&prompt), input.common.n)
        .await
        .map_err(|error| error.rename_param("grammar", input.grammar_param()).rename_param("prompt", "messages"))?;
    if input.common.stream {
        let render = ChatStream::new(&input, &prompt);
        return Ok(sse::respond(choices, render, state.keep_alive));
    }
    let answer = collect(choices, &input, &prompt).await?;
    Ok(Json(answer).into_response())
}

/// The text of a choice, taken apart.
struct Reader {
    parser: OutputParser,
    /// With `parallel_tool_calls` false, the answer ends with the first call.
    single_call: bool,
    calls: usize,
    is_full: bool,
    in_reasoning: bool,
    /// Tokens of the reasoning, for `usage`.
    reasoning_tokens: u64,
}

impl Reader {
    fn all(input: &ChatInput, prompt: &ChatPrompt) -> Vec<Reader> {
        let reader = || Reader {
            parser: prompt.parser(),
            single_call: !input.parallel_tool_calls,
            calls: 0,
            is_full: false,
            in_reasoning: prompt.output.starts_in_reasoning,
            reasoning_tokens: 0,
        };
        (0..input.common.n).map(|_| reader()).collect()
    }

    fn push(&mut self, text: &str, tokens: usize) -> Vec<Delta> {
        let deltas = self.parser.push(text);
        // A token counts for what its text ends in. Marks make no text, and count for what was before them.
        match deltas.last() {
            Some(Delta::Reasoning(_)) => self.in_reasoning = true,
            Some(_) => self.in_reasoning = false,
            None => {}
        }
        if self.in_reasoning {
            self.reasoning_tokens += tokens as u64;
        }
        self.count(deltas)
    }

    fn finish(&mut self) -> Vec<Delta> {
        let deltas = self.parser.finish();
        self.count(deltas)
    }

    fn count(&mut self, mut deltas: Vec<Delta>) -> Vec<Delta> {
        deltas.retain(|delta| {
            if self.is_full {
                return false;
            }
            match delta {
                Delta::ToolCallStart { .. } => self.calls += 1,
                Delta::ToolCallEnd { .. } => self.is_full = self.single_call,
                Delta::Content(_) | Delta::Reasoning(_) | Delta::ToolCallArguments { .. } => {}
            }
            true
        });
        deltas
    }

    fn finish_reason(&self, finish: &Finish) -> &'static str {
        match finish {
            Finish::Length => "length",
            Finish::EndOfText | Finish::StopString(_) if self.calls > 0 => "tool_calls",
            Finish::EndOfText | Finish::StopString(_) => "stop",
        }
    }
}

/// OpenAI's `usage`, with what the reasoning took of it where there was any.
fn with_reasoning(mut usage: Value, readers: &[Reader]) -> Value {
    let reasoning_tokens: u64 = readers.iter().map(|reader| reader.reasoning_tokens).sum();
    if reasoning_tokens > 0 {
        usage["completion_tokens_details"]["reasoning_tokens"] = reasoning_tokens.into();
    }
    usage
}

fn call_id(id: Option<String>) -> String {
    id.unwrap_or_else(|| random_id("call_"))
}

/// A whole answer.
#[derive(Default)]
struct Message {
    content: String,
    reasoning: String,
    /// Id, name, arguments.
    calls: Vec<(String, String, String)>,
    logprobs: Vec<Value>,
    finish_reason: Option<&'static str>,
}

impl Message {
    fn add(&mut self, deltas: Vec<Delta>) {
        for delta in deltas {
            match delta {
                Delta::Content(text) => self.content.push_str(&text),
                Delta::Reasoning(text) => self.reasoning.push_str(&text),
                Delta::ToolCallStart { id, name, .. } => self.calls.push((call_id(id), name, String::new())),
                Delta::ToolCallArguments { index, fragment } => {
                    if let Some((_, _, arguments)) = self.calls.get_mut(index) {
                        arguments.push_str(&fragment);
                    }
                }
                Delta::ToolCallEnd { .. } => {}
            }
        }
    }

    fn render(self, index: usize, wants_logprobs: bool) -> Value {
        let has_content = !self.content.is_empty() || self.calls.is_empty();
        let mut message = Map::new();
        message.insert("role".to_owned(), json!("assistant"));
        message.insert("content".to_owned(), json!(has_content.then_some(self.content)));
        message.insert("refusal".to_owned(), Value::Null);
        if !self.reasoning.is_empty() {
            message.insert("reasoning_content".to_owned(), json!(self.reasoning));
        }
        if !self.calls.is_empty() {
            let call = |(id, name, arguments)| json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}});
            message.insert("tool_calls".to_owned(), self.calls.into_iter().map(call).collect());
        }
        json!({
            "index": index,
            "message": message,
            "logprobs": wants_logprobs.then(|| json!({"content": self.logprobs, "refusal": null})),
            "finish_reason": self.finish_reason,
        })
    }
}

async fn collect(mut choices: Choices, input: &ChatInput, prompt: &ChatPrompt) -> Result<Value, ApiError> {
    let mut readers = Reader::all(input, prompt);
    let mut messages: Vec<Message> = readers.iter().map(|_| Message::default()).collect();
    let wants_logprobs = input.common.sampling.top_logprobs.is_some();
    while let Some((index, event)) = choices.next().await {
        let (Some(reader), Some(message)) = (readers.get_mut(index), messages.get_mut(index)) else {
            continue;
        };
        match event {
            ChoiceEvent::Text { text, tokens } => {
                message.add(reader.push(&text, tokens.len()));
                if wants_logprobs {
                    message.logprobs.extend(logprobs::chat(&tokens));
                }
                if reader.is_full {
                    choices.finish(index);
                    message.finish_reason = Some(reader.finish_reason(&Finish::EndOfText));
                }
            }
            ChoiceEvent::Done(finish, _) => {
                message.add(reader.finish());
                message.finish_reason = Some(reader.finish_reason(&finish));
            }
            ChoiceEvent::Failed(refusal) => return Err(refusal.into()),
        }
    }
    let head = Head::new("chat.completion", "chatcmpl-", &input.common.model, input.common.sampling.seed);
    let rendered = messages.into_iter().enumerate().map(|(index, message)| message.render(index, wants_logprobs));
    let answer = head.with_choices(rendered.collect());
    Ok(Head::account(answer, with_reasoning(choices.usage(), &readers), choices.timings()))
}

/// A streamed answer.
struct ChatStream {
    head: Head,
    readers: Vec<Reader>,
    wants_logprobs: bool,
    include_usage: bool,
}

impl ChatStream {
    fn new(input: &ChatInput, prompt: &ChatPrompt) -> Self {
        ChatStream {
            head: Head::new("chat.completion.chunk", "chatcmpl-", &input.common.model, input.common.sampling.seed),
            readers: Reader::all(input, prompt),
            wants_logprobs: input.common.sampling.top_logprobs.is_some(),
            include_usage: input.common.include_usage,
        }
    }

    fn push(&self, index: usize, delta: Value, logprobs: Option<Value>, out: &mut Chunks) {
        let choice = json!([{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": null}]);
        out.push(&self.head.chunk(choice, self.include_usage));
    }

    /// One chunk per delta; the log-probabilities go with the first.
    fn push_deltas(&self, index: usize, deltas: Vec<Delta>, tokens: &[TokenInfo], out: &mut Chunks) {
        let mut logprobs = (self.wants_logprobs && !tokens.is_empty())
            .then(|| json!({"content": logprobs::chat(tokens), "refusal": null}));
        for delta in deltas.into_iter().filter_map(render_delta) {
            self.push(index, delta, logprobs.take(), out);
        }
        if logprobs.is_some() {
            self.push(index, json!({}), logprobs, out);
        }
    }
}

fn render_delta(delta: Delta) -> Option<Value> {
    match delta {
        Delta::Content(text) => Some(json!({"content": text})),
        Delta::Reasoning(text) => Some(json!({"reasoning_content": text})),
        Delta::ToolCallStart { index, id, name } => Some(json!({"tool_calls": [{
            "index": index,
            "id": call_id(id),
            "type": "function",
            "function": {"name": name, "arguments": ""},
        }]})),
        Delta::ToolCallArguments { index, fragment } => {
            Some(json!({"tool_calls": [{"index": index, "function": {"arguments": fragment}}]}))
        }
        Delta::ToolCallEnd { .. } => None,
    }
}

impl Render for ChatStream {
    fn begin(&mut self, out: &mut Chunks) {
        for index in 0..self.readers.len() {
            self.push(index, json!({"role": "assistant", "content": ""}), None, out);
        }
    }

    fn text(&mut self, choice: usize, text: String, tokens: &[TokenInfo], out: &mut Chunks) -> bool {
        let Some(reader) = self.readers.get_mut(choice) else {
            return false;
        };
        let deltas = reader.push(&text, tokens.len());
        let is_full = reader.is_full;
        self.push_deltas(choice, deltas, tokens, out);
        is_full
    }

    fn done(&mut self, choice: usize, finish: &Finish, timings: Option<Timings>, out: &mut Chunks) {
        let Some(reader) = self.readers.get_mut(choice) else {
            return;
        };
        let deltas = reader.finish();
        let finish_reason = reader.finish_reason(finish);
        self.push_deltas(choice, deltas, &[], out);
        let choice = json!([{"index": choice, "delta": {}, "logprobs": null, "finish_reason": finish_reason}]);
        let mut chunk = self.head.chunk(choice, self.include_usage);
        add_timings(&mut chunk, timings);
        out.push(&chunk);
    }

    fn end(&mut self, usage: Value, timings: Option<Timings>, out: &mut Chunks) {
        if self.include_usage {
            let usage = with_reasoning(usage, &self.readers);
            out.push(&Head::account(self.head.with_choices(json!([])), usage, timings));
        }
    }
}
