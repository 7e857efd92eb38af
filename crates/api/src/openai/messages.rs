//! Checks of messages and tools.
//!
//! They go to the chat template as they came; what is checked here is that nothing is in them that it would not see.

use murmur_chat::ToolChoice;
use serde_json::Value;

use crate::{
    errors::ApiError,
    fields::{Fields, shorten, too_many, wrong_type},
    limits::{MAX_MESSAGES, MAX_TOOLS},
};

/// OpenAI's limit for names of functions and schemas.
const MAX_NAME_CHARS: usize = 64;

/// `messages`: at least one.
pub(crate) fn messages(fields: &mut Fields) -> Result<Vec<Value>, ApiError> {
    let Some(messages) = fields.array("messages")? else {
        return Err(fields.missing("messages"));
    };
    if messages.is_empty() {
        return Err(ApiError::param("messages", "`messages` must not be an empty array.").code("empty_array"));
    }
    if messages.len() > MAX_MESSAGES {
        return Err(too_many("messages", "messages", messages.len(), MAX_MESSAGES));
    }
    for (index, message) in messages.iter().enumerate() {
        check_message(&format!("messages[{index}]"), message)?;
    }
    Ok(messages)
}

fn check_message(path: &str, message: &Value) -> Result<(), ApiError> {
    let mut fields = Fields::within(path, message.clone())?;
    let role = fields.required_string("role")?;
    let content = fields.take("content");
    let has_content = content.is_some();
    if let Some(content) = content {
        check_content(&fields.path("content"), content)?;
    }
    fields.string("name")?;
    match role.as_str() {
        "system" | "developer" | "user" => {}
        "assistant" => {
            let has_calls = check_calls(&mut fields)?;
            fields.string("reasoning_content")?;
            fields.refuse("audio", "this server handles text only.")?;
            fields.refuse("function_call", "use `tool_calls`, which replaced it.")?;
            fields.refuse("refusal", "send the refusal's text as `content`.")?;
            if fields.array("annotations")?.is_some_and(|annotations| !annotations.is_empty()) {
                let path = fields.path("annotations");
                return Err(ApiError::unsupported(&path, format!("`{path}` is not supported: leave it out.")));
            }
            if has_calls && !has_content {
                return fields.finish();
            }
        }
        "tool" => {
            fields.required_string("tool_call_id")?;
        }
        "function" => {
            let message = "The role \"function\" is not supported: use \"tool\", which replaced it.";
            return Err(ApiError::unsupported(fields.path("role"), message));
        }
        other => {
            let message = format!(
                "The role must be \"system\", \"developer\", \"user\", \"assistant\" or \"tool\", not \"{}\".",
                shorten(other)
            );
            return Err(ApiError::param(fields.path("role"), message).code("invalid_value"));
        }
    }
    if !has_content {
        return Err(fields.missing("content"));
    }
    fields.finish()
}

fn check_content(path: &str, content: Value) -> Result<(), ApiError> {
    let parts = match content {
        Value::String(_) => return Ok(()),
        Value::Array(parts) => parts,
        other => {
            return Err(wrong_type(path, "a string or an array of text parts", &other));
        }
    };
    for (index, part) in parts.into_iter().enumerate() {
        let mut part = Fields::within(&format!("{path}[{index}]"), part)?;
        let kind = part.required_string("type")?;
        if kind != "text" {
            let message = format!("Content of the type \"{}\" is not supported: send text.", shorten(&kind));
            return Err(ApiError::unsupported(part.path("type"), message));
        }
        part.required_string("text")?;
        part.finish()?;
    }
    Ok(())
}

fn check_calls(fields: &mut Fields) -> Result<bool, ApiError> {
    let path = fields.path("tool_calls");
    let Some(calls) = fields.array("tool_calls")? else {
        return Ok(false);
    };
    let has_calls = !calls.is_empty();
    for (index, call) in calls.into_iter().enumerate() {
        let mut call = Fields::within(&format!("{path}[{index}]"), call)?;
        call.string("id")?;
        // Clients that put a streamed answer together keep the chunks' numbering.
        call.integer("index", 0..=i64::MAX)?;
        if call.string("type")?.is_some_and(|kind| kind != "function") {
            return Err(ApiError::unsupported(call.path("type"), "The only type of tool call is \"function\"."));
        }
        let Some(mut function) = call.fields("function")? else {
            return Err(call.missing("function"));
        };
        function.required_string("name")?;
        function.required_string("arguments")?;
        function.finish()?;
        call.finish()?;
    }
    Ok(has_calls)
}

/// `tools`, as they came.
pub(crate) fn tools(fields: &mut Fields) -> Result<Vec<Value>, ApiError> {
    let tools = fields.array("tools")?.unwrap_or_default();
    if tools.len() > MAX_TOOLS {
        return Err(too_many("tools", "tools", tools.len(), MAX_TOOLS));
    }
    for (index, tool) in tools.iter().enumerate() {
        let mut tool = Fields::within(&format!("tools[{index}]"), tool.clone())?;
        let kind = tool.required_string("type")?;
        if kind != "function" {
            let message = format!("Tools of the type \"{}\" are not supported: use \"function\".", shorten(&kind));
            return Err(ApiError::unsupported(tool.path("type"), message));
        }
        let Some(mut function) = tool.fields("function")? else {
            return Err(tool.missing("function"));
        };
        check_name(&function.path("name"), &function.required_string("name")?)?;
        function.string("description")?;
        function.object("parameters")?;
        function.boolean("strict")?;
        function.finish()?;
        tool.finish()?;
    }
    Ok(tools)
}

/// `tool_choice`; without tools there is nothing to choose.
pub(crate) fn tool_choice(fields: &mut Fields, tools: &[Value]) -> Result<ToolChoice, ApiError> {
    let invalid = |message: String| Err(ApiError::param("tool_choice", message).code("invalid_value"));
    let choice = match fields.take("tool_choice") {
        None => return Ok(ToolChoice::Auto),
        Some(Value::String(text)) => match text.as_str() {
            "none" => ToolChoice::None,
            "auto" => ToolChoice::Auto,
            "required" => ToolChoice::Required,
            other => {
                let other = shorten(other);
                return invalid(format!(
                    "`tool_choice` must be \"none\", \"auto\", \"required\" or a function, not \"{other}\"."
                ));
            }
        },
        Some(value @ Value::Object(_)) => {
            let mut choice = Fields::within("tool_choice", value)?;
            let kind = choice.required_string("type")?;
            if kind != "function" {
                let message = format!("`tool_choice` of the type \"{}\" is not supported.", shorten(&kind));
                return Err(ApiError::unsupported("tool_choice.type", message));
            }
            let Some(mut function) = choice.fields("function")? else {
                return Err(choice.missing("function"));
            };
            let name = function.required_string("name")?;
            function.finish()?;
            choice.finish()?;
            if !tools.iter().any(|tool| tool["function"]["name"] == name.as_str()) {
                return invalid(format!("`tool_choice` names `{}`, which is not in `tools`.", shorten(&name)));
            }
            ToolChoice::Function(name)
        }
        Some(other) => return Err(wrong_type("tool_choice", "a string or an object", &other)),
    };
    if tools.is_empty() && choice == ToolChoice::Required {
        return invalid("`tool_choice` is \"required\", but there are no `tools`.".to_owned());
    }
    Ok(choice)
}

/// A name as OpenAI allows it for functions and schemas.
pub(crate) fn check_name(path: &str, name: &str) -> Result<(), ApiError> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
    if !name.is_empty() && name.len() <= MAX_NAME_CHARS && name.bytes().all(is_plain) {
        return Ok(());
    }
    let message = format!("`{path}` must be 1 to {MAX_NAME_CHARS} letters, digits, underscores or dashes.");
    Err(ApiError::param(path, message).code("invalid_value"))
}
