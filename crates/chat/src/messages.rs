//! OpenAI's message objects made into what a particular template takes.
//!
//! - Content in parts becomes text (or text becomes parts, for templates that take only those); null becomes "".
//! - `developer` becomes `system`; the system messages at the beginning become one. A template that shows no system
//!   messages gets their text at the beginning of the next user message (as llama.cpp's server does): the model then
//!   reads it, though with less authority.
//! - Call arguments, JSON text in OpenAI's API, become objects where the template wants them so.
//! - Where calls and results cannot be shown, they are told in words: calls as the JSON that [`ToolFormat::Generic`]
//!   asks for, results as the user's message.
//!
//! [`ToolFormat::Generic`]: crate::ToolFormat::Generic

use serde_json::{Map, Value, json};

use crate::{Capabilities, PromptError};

/// How calls in the conversation are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CallHistory {
    /// By the template.
    Native,
    /// In words.
    Told,
}

fn wrong(index: usize, reason: impl Into<String>) -> PromptError {
    PromptError::Message { index, reason: reason.into() }
}

/// Checks and converts a conversation. `instructions` go to the end of the system message.
pub(crate) fn convert(
    messages: &[Value],
    capabilities: &Capabilities,
    history: CallHistory,
    instructions: Option<&str>,
) -> Result<Vec<Value>, PromptError> {
    let mut converted = Vec::with_capacity(messages.len() + 1);
    for (index, message) in messages.iter().enumerate() {
        converted.push(convert_one(index, message, capabilities, history)?);
    }
    let mut converted = join_system(converted, instructions);
    if !capabilities.system_role {
        converted = move_system_to_user(converted);
    }
    if capabilities.content_parts_only {
        for message in &mut converted {
            if let Some(Value::String(text)) = message.get("content") {
                let parts = json!([{"type": "text", "text": text}]);
                message.insert("content".into(), parts);
            }
        }
    }
    Ok(converted.into_iter().map(Value::Object).collect())
}

fn convert_one(
    index: usize,
    message: &Value,
    capabilities: &Capabilities,
    history: CallHistory,
) -> Result<Map<String, Value>, PromptError> {
    let Value::Object(message) = message else {
        return Err(wrong(index, "must be an object"));
    };
    let mut message = message.clone();
    let role = match message.get("role") {
        Some(Value::String(role)) if !role.is_empty() => role.clone(),
        _ => {
            return Err(wrong(index, "needs a role: system, user, assistant or tool"));
        }
    };
    let content = text_of(index, message.get("content"))?;
    let calls = match message.get("tool_calls") {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Array(calls)) => calls
            .iter()
            .enumerate()
            .map(|(i, call)| convert_call(call, capabilities).ok_or((i, call)))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|(i, _)| {
                wrong(
                    index,
                    format!(
                        "tool_calls[{i}] needs a function with a name and with arguments that are a JSON object as text"
                    ),
                )
            })?,
        Some(_) => return Err(wrong(index, "tool_calls must be a list")),
    };
    if content.is_none() && calls.is_empty() && role != "assistant" {
        return Err(wrong(index, "needs content"));
    }
    let content = content.unwrap_or_default();
    match (role.as_str(), history) {
        ("developer", _) => {
            message.insert("role".into(), "system".into());
        }
        ("tool" | "function", CallHistory::Told) => {
            let name =
                message.get("name").and_then(Value::as_str).map(|name| format!(" of {name}")).unwrap_or_default();
            let told = json!({"role": "user", "content": format!("Result{name}:\n{content}")});
            return Ok(told.as_object().cloned().unwrap_or_default());
        }
        ("function", CallHistory::Native) => {
            message.insert("role".into(), "tool".into());
        }
        _ => {}
    }
    message.insert("content".into(), content.clone().into());
    message.remove("tool_calls");
    if !calls.is_empty() {
        match history {
            CallHistory::Native => {
                message.insert("tool_calls".into(), calls.into());
            }
            CallHistory::Told => {
                let told: Vec<String> = calls.iter().map(|call| told_call(call).to_string()).collect();
                let told = if told.len() == 1 { told.concat() } else { format!("[{}]", told.join(", ")) };
                let separator = if content.is_empty() { "" } else { "\n" };
                message.insert("content".into(), format!("{content}{separator}{told}").into());
            }
        }
    }
    Ok(message)
}

/// Text, or the text of parts; `None` for null.
fn text_of(index: usize, content: Option<&Value>) -> Result<Option<String>, PromptError> {
    match content {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(Value::Array(parts)) => {
            let mut texts = Vec::with_capacity(parts.len());
            for (i, part) in parts.iter().enumerate() {
                let kind = part.get("type").and_then(Value::as_str).unwrap_or("text");
                let text = match kind {
                    "text" | "input_text" | "output_text" => part.get("text"),
                    "refusal" => part.get("refusal"),
                    _ => {
                        return Err(wrong(
                            index,
                            format!("content[{i}] is of type {kind:?}; this model reads text only, send type \"text\""),
                        ));
                    }
                };
                let text = text.and_then(Value::as_str);
                texts.push(text.ok_or_else(|| wrong(index, format!("content[{i}] needs a text")))?);
            }
            Ok(Some(texts.join("\n")))
        }
        Some(_) => Err(wrong(index, "content must be text, a list of parts or null")),
    }
}

fn convert_call(call: &Value, capabilities: &Capabilities) -> Option<Value> {
    let function = call.get("function")?;
    let name = function.get("name")?.as_str()?;
    let arguments = match function.get("arguments") {
        None | Some(Value::Null) => Map::new(),
        Some(Value::Object(arguments)) => arguments.clone(),
        Some(Value::String(text)) if text.trim().is_empty() => Map::new(),
        Some(Value::String(text)) => serde_json::from_str(text).ok()?,
        Some(_) => return None,
    };
    let arguments = match (capabilities.object_arguments, function.get("arguments")) {
        (true, _) => Value::Object(arguments),
        (false, Some(Value::String(text))) if !text.trim().is_empty() => Value::String(text.clone()),
        (false, _) => Value::String(Value::Object(arguments).to_string()),
    };
    let mut converted = call.as_object()?.clone();
    converted.entry("type").or_insert_with(|| "function".into());
    converted.insert("function".into(), json!({"name": name, "arguments": arguments}));
    Some(Value::Object(converted))
}

/// A call as [`crate::ToolFormat::Generic`] writes it.
fn told_call(call: &Value) -> Value {
    let function = &call["function"];
    let arguments = match &function["arguments"] {
        Value::String(text) => serde_json::from_str(text).unwrap_or_else(|_| json!({})),
        arguments => arguments.clone(),
    };
    json!({"name": function["name"], "arguments": arguments})
}

fn role_of(message: &Map<String, Value>) -> &str {
    message.get("role").and_then(Value::as_str).unwrap_or_default()
}

fn content_of(message: &Map<String, Value>) -> &str {
    message.get("content").and_then(Value::as_str).unwrap_or_default()
}

fn text_message(role: &str, content: String) -> Map<String, Value> {
    Map::from_iter([("role".to_owned(), role.into()), ("content".to_owned(), content.into())])
}

/// Joins the system messages at the beginning into one, with `instructions` at its end.
fn join_system(messages: Vec<Map<String, Value>>, instructions: Option<&str>) -> Vec<Map<String, Value>> {
    let leading = messages.iter().take_while(|message| role_of(message) == "system").count();
    if leading + usize::from(instructions.is_some()) < 2 && instructions.is_none() {
        return messages;
    }
    let texts: Vec<&str> = messages[..leading].iter().map(content_of).chain(instructions).collect();
    let system = text_message("system", texts.join("\n\n"));
    std::iter::once(system).chain(messages.into_iter().skip(leading)).collect()
}

/// Puts each system message's text before that of the next user message; without one, it becomes a user message.
fn move_system_to_user(messages: Vec<Map<String, Value>>) -> Vec<Map<String, Value>> {
    let mut moved = Vec::with_capacity(messages.len());
    let mut waiting: Vec<String> = Vec::new();
    for mut message in messages {
        match role_of(&message) {
            "system" => waiting.push(content_of(&message).to_owned()),
            "user" if !waiting.is_empty() => {
                waiting.push(content_of(&message).to_owned());
                message.insert("content".into(), waiting.join("\n\n").into());
                waiting.clear();
                moved.push(message);
            }
            _ => moved.push(message),
        }
    }
    if !waiting.is_empty() {
        moved.push(text_message("user", waiting.join("\n\n")));
    }
    moved
}
