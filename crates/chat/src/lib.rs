//! Between a list of chat messages and the text a model reads and writes.
//!
//! - [`template`]: a model's own Jinja template, rendered as Hugging Face transformers renders it
//!   (`apply_chat_template`), with limits, since templates come out of downloaded files. Start here.
//! - [`prompt`]: one chat request (messages, tools, tool choice) made into a prompt, the grammar that forces a tool
//!   call where one is demanded, and the [`OutputParser`] that reads the answer.
//! - [`tools`]: how the families write tool calls and reasoning.
//! - [`parser`]: splits the generated text, as it streams, into content, reasoning and tool calls.
//!
//! ```
//! use murmur_chat::{ChatRequest, ChatTemplate, Delta, Timestamp, ToolChoice};
//! use serde_json::{Map, json};
//!
//! let template = ChatTemplate::chatml()?;
//! let prompt = template.prepare(&ChatRequest {
//!     messages: &[json!({"role": "user", "content": "Ping, please."})],
//!     tools: &[json!({"type": "function", "function": {"name": "ping", "parameters": {"type": "object"}}})],
//!     tool_choice: &ToolChoice::Auto,
//!     parallel_tool_calls: true,
//!     extra: &Map::new(),
//!     bos_token: "",
//!     eos_token: "<|im_end|>",
//!     now: Timestamp { unix_seconds: 0, utc_offset_seconds: 0 },
//!     control_token: None,
//! })?;
//! let mut parser = prompt.parser();
//! // What the model answers, in pieces:
//! let mut deltas = parser.push(r#"{"name": "ping", "argu"#);
//! deltas.extend(parser.push(r#"ments": {}}"#));
//! deltas.extend(parser.finish());
//! assert_eq!(deltas.first(), Some(&Delta::ToolCallStart { index: 0, id: None, name: "ping".into() }));
//! # Ok::<(), murmur_chat::PromptError>(())
//! ```
//!
//! The crate is pure: no files, no sockets, no clock (the caller says what time it is).

mod call_reader;
mod environment;
mod grammar;
mod harmony;
mod json_scan;
mod messages;
mod methods;
pub mod parser;
mod probe;
pub mod prompt;
mod python;
mod reasoning;
mod sink;
mod strftime;
pub mod template;
mod tool_reader;
pub mod tools;

pub use grammar::ControlToken;
pub use parser::{Delta, OutputParser, OutputSpec};
pub use prompt::{ChatPrompt, ChatRequest, PromptError, ToolChoice};
pub use template::{Capabilities, ChatTemplate, RenderInput, TemplateError, Timestamp};
pub use tools::{ReasoningFormat, ToolFormat};
