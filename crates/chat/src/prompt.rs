//! One chat request made into a prompt, a grammar and a parser for the answer.

use murmur_protocol::sampling::{Grammar, Token};
use serde_json::{Map, Value};

use crate::{ChatTemplate, OutputParser, OutputSpec, TemplateError, Timestamp};

/// What OpenAI's `tool_choice` says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum ToolChoice {
    /// The model must not call a tool.
    None,
    /// The model decides.
    #[default]
    Auto,
    /// The model must call at least one tool.
    Required,
    /// The model must call this function.
    Function(String),
}

/// A chat request, validated as JSON but with OpenAI's message objects as they came.
#[derive(Clone, Copy)]
pub struct ChatRequest<'a> {
    /// OpenAI message objects (role, content as text or parts, tool_calls, tool_call_id ...).
    pub messages: &'a [Value],
    /// OpenAI tool objects: `{"type": "function", "function": {...}}`. Empty: none.
    pub tools: &'a [Value],
    /// Whether a tool has to be called.
    pub tool_choice: &'a ToolChoice,
    /// More than one call in an answer is welcome.
    pub parallel_tool_calls: bool,
    /// `chat_template_kwargs`, such as `enable_thinking`.
    pub extra: &'a Map<String, Value>,
    /// Text of the beginning-of-sequence token.
    pub bos_token: &'a str,
    /// Text of the end-of-sequence token.
    pub eos_token: &'a str,
    /// The time, for templates that print the date.
    pub now: Timestamp,
    /// The id of the *control* token with exactly this text, if the vocabulary has one. A grammar has to name control
    /// tokens by id, for their text cannot be produced from ordinary tokens. Without it, markers are spelt as text.
    pub control_token: Option<&'a dyn Fn(&str) -> Option<Token>>,
}

/// What to generate from and how to read the answer.
#[derive(Debug, Clone)]
pub struct ChatPrompt {
    /// The rendered prompt; control tokens are written as their text.
    pub text: String,
    /// Forces the tool call that `tool_choice` demands.
    pub grammar: Option<Grammar>,
    /// How to read the answer.
    pub output: OutputSpec,
    /// Control tokens that must be detokenised to their text, because the parser needs to see them.
    pub visible_tokens: Vec<&'static str>,
    /// Texts at which the answer ends besides the model's end tokens. Usually empty.
    pub extra_stops: Vec<String>,
}

impl ChatPrompt {
    /// A parser for the answer to this prompt.
    pub fn parser(&self) -> OutputParser {
        OutputParser::new(self.output.clone())
    }
}

/// Why a request cannot be made into a prompt. Everything here is the client's or the template's doing: status 400.
#[derive(Debug, thiserror::Error)]
pub enum PromptError {
    /// The template refused or failed.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// A message is not what the OpenAI API says.
    #[error("messages[{index}]: {reason}")]
    Message {
        /// Position in `messages`.
        index: usize,
        /// What is wrong and what to do.
        reason: String,
    },
    /// A tool is not what the OpenAI API says.
    #[error("tools[{index}]: {reason}")]
    Tool {
        /// Position in `tools`.
        index: usize,
        /// What is wrong and what to do.
        reason: String,
    },
    /// `tool_choice` cannot be met.
    #[error("tool_choice: {0}")]
    ToolChoice(String),
}

impl ChatTemplate {
    /// Makes a request into a prompt.
    pub fn prepare(&self, request: &ChatRequest<'_>) -> Result<ChatPrompt, PromptError> {
        let _ = request;
        Err(PromptError::ToolChoice(String::new()))
    }
}
