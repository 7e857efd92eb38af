//! Our own templates, one per style, and a request to vary.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part of it")]

use std::sync::LazyLock;

use murmur_chat::{ChatPrompt, ChatRequest, ChatTemplate, PromptError, Timestamp, ToolChoice};
use serde_json::{Map, Value, json};

pub const CHATML: &str = include_str!("../templates/chatml_tools.jinja");
pub const HEADERS: &str = include_str!("../templates/headers.jinja");
pub const INST: &str = include_str!("../templates/inst.jinja");
pub const TURNS: &str = include_str!("../templates/turns.jinja");

/// 2024-07-26 12:34:56
pub const NOW: Timestamp = Timestamp { unix_seconds: 1_721_997_296, utc_offset_seconds: 0 };

pub static NOTHING: LazyLock<Map<String, Value>> = LazyLock::new(Map::new);

pub fn template(source: &str) -> ChatTemplate {
    ChatTemplate::compile(source).unwrap()
}

pub fn user(text: &str) -> Value {
    json!({"role": "user", "content": text})
}

pub fn system(text: &str) -> Value {
    json!({"role": "system", "content": text})
}

pub fn assistant(text: &str) -> Value {
    json!({"role": "assistant", "content": text})
}

pub fn tool(name: &str, parameters: Value) -> Value {
    json!({"type": "function", "function": {"name": name, "description": "D.", "parameters": parameters}})
}

pub fn ping() -> Value {
    tool("ping", json!({"type": "object", "properties": {"n": {"type": "integer"}}}))
}

/// A call of `ping` and its result.
pub fn called() -> [Value; 2] {
    [
        json!({"role": "assistant", "content": null, "tool_calls": [
            {"id": "abc123xyz", "type": "function", "function": {"name": "ping", "arguments": "{\"n\": 1}"}}
        ]}),
        json!({"role": "tool", "tool_call_id": "abc123xyz", "content": "pong"}),
    ]
}

pub fn request<'a>(messages: &'a [Value], tools: &'a [Value], tool_choice: &'a ToolChoice) -> ChatRequest<'a> {
    ChatRequest {
        messages,
        tools,
        tool_choice,
        parallel_tool_calls: true,
        extra: &NOTHING,
        bos_token: "<s>",
        eos_token: "</s>",
        now: NOW,
        control_token: None,
    }
}

pub fn prepare(source: &str, messages: &[Value], tools: &[Value]) -> Result<ChatPrompt, PromptError> {
    template(source).prepare(&request(messages, tools, &ToolChoice::Auto))
}
