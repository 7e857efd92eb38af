//! What a template can do, found by rendering small conversations and looking for what should appear: templates do not
//! declare it, and reading Jinja is guesswork. The idea is llama.cpp's (minja's capability detection).

use std::cell::Cell;

use serde_json::{Map, Value, json};

use crate::{
    ReasoningFormat, RenderInput, TemplateError, Timestamp, ToolFormat,
    tools::{detect_reasoning, detect_tool_format},
};

/// What a template can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capabilities {
    /// Shows messages of the role `system`.
    pub system_role: bool,
    /// Shows the tools it is given, and the model's own way to call them is one that [`crate::OutputParser`] reads.
    pub tools: bool,
    /// Shows an assistant's earlier tool calls.
    pub tool_calls: bool,
    /// Shows messages of the role `tool`.
    pub tool_results: bool,
    /// Wants a call's arguments as an object; otherwise as the JSON text that OpenAI's API has there.
    pub object_arguments: bool,
    /// Shows content only as a list of parts, not as text.
    pub content_parts_only: bool,
    /// `enable_thinking` changes the prompt.
    pub thinking_switch: bool,
    /// How the model marks its reasoning.
    pub reasoning: ReasoningFormat,
    /// How the model writes tool calls; [`ToolFormat::Generic`] unless `tools`.
    pub tool_format: ToolFormat,
}

const NEEDLE: &str = "xq7needle";
const KEY_NEEDLE: &str = "xq7key";

/// `render` renders the template with given input.
pub(crate) fn probe(source: &str, render: &dyn Fn(&RenderInput<'_>) -> Result<String, TemplateError>) -> Capabilities {
    let extra = Map::new();
    // One probe that runs into a limit is enough: the template will do so again, and time is short.
    let exhausted = Cell::new(false);
    let try_render = |messages: &[Value], tools: Option<&[Value]>, extra: &Map<String, Value>| {
        if exhausted.get() {
            return String::new();
        }
        let rendered = render(&RenderInput {
            messages,
            tools,
            add_generation_prompt: true,
            bos_token: "",
            eos_token: "",
            extra,
            now: Timestamp { unix_seconds: 0, utc_offset_seconds: 0 },
        });
        exhausted.set(matches!(rendered, Err(TemplateError::OutOfFuel | TemplateError::OutputTooLong)));
        rendered.unwrap_or_default()
    };
    let shows = |messages: &[Value], needle: &str| try_render(messages, None, &extra).contains(needle);

    let user = json!({"role": "user", "content": "Hi"});
    let system_role = shows(&[json!({"role": "system", "content": NEEDLE}), user.clone()], NEEDLE);

    let text = json!({"role": "user", "content": NEEDLE});
    let parts = json!({"role": "user", "content": [{"type": "text", "text": NEEDLE}]});
    let content_parts_only = !shows(&[text], NEEDLE) && shows(&[parts], NEEDLE);

    let tools = [json!({"type": "function", "function": {
        "name": NEEDLE,
        "description": "Probe.",
        "parameters": {"type": "object", "properties": {"a": {"type": "string", "description": "A."}}, "required": ["a"]},
    }})];
    let shows_tools = try_render(std::slice::from_ref(&user), Some(&tools), &extra).contains(NEEDLE);
    let native_format = detect_tool_format(source).filter(|_| shows_tools);

    let calling = |arguments: Value, result: &str| {
        [
            user.clone(),
            json!({"role": "assistant", "content": "", "tool_calls": [
                {"id": "call00001", "type": "function", "function": {"name": NEEDLE, "arguments": arguments}}
            ]}),
            json!({"role": "tool", "tool_call_id": "call00001", "name": NEEDLE, "content": result}),
        ]
    };
    let as_object = try_render(&calling(json!({KEY_NEEDLE: 1}), "R"), Some(&tools), &extra);
    let as_text = try_render(&calling(json!(json!({KEY_NEEDLE: 1}).to_string()), "R"), Some(&tools), &extra);
    // As an object, a template that prints it as it is shows Python's quotes; as text, one that applies `tojson` shows
    // escaped quotes.
    let object_shown = as_object.contains(KEY_NEEDLE) && !as_object.contains(&format!("'{KEY_NEEDLE}'"));
    let text_shown = as_text.contains(&format!("\"{KEY_NEEDLE}\""));
    let object_arguments = object_shown || !text_shown;
    let tool_calls = object_shown || text_shown;
    let arguments = if object_arguments { json!({KEY_NEEDLE: 1}) } else { json!("{}") };
    let tool_results = try_render(&calling(arguments, "xq7result"), Some(&tools), &extra).contains("xq7result");

    let switched = |on: bool| {
        let mut extra = Map::new();
        extra.insert("enable_thinking".into(), on.into());
        try_render(std::slice::from_ref(&user), None, &extra)
    };
    Capabilities {
        system_role,
        tools: native_format.is_some(),
        tool_calls,
        tool_results,
        object_arguments,
        content_parts_only,
        thinking_switch: switched(true) != switched(false),
        reasoning: detect_reasoning(source),
        tool_format: native_format.unwrap_or(ToolFormat::Generic),
    }
}
