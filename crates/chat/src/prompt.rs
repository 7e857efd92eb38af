//! One chat request made into a prompt, a grammar and a parser for the answer.

use murmur_protocol::sampling::Grammar;
use serde_json::{Map, Value};

use crate::{
    ChatTemplate, OutputParser, OutputSpec, ReasoningFormat, RenderInput, TemplateError, Timestamp, ToolFormat,
    call_reader::NAME_BYTES_MAX,
    grammar::{self, ControlToken, Function, Preamble},
    harmony,
    messages::{self, CallHistory},
    tools::{MISTRAL_ARGS, MISTRAL_CALLS, MISTRAL_ID, PYTHON_TAG},
};

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
    pub control_token: Option<ControlToken<'a>>,
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
    /// Texts at which the answer ends besides the model's end tokens: with [`ChatTemplate::chatml`] the end of a turn,
    /// which a model without a template of its own may have as a token or not. Otherwise empty.
    pub extra_stops: Vec<String>,
}

impl ChatPrompt {
    /// A parser for the answer to this prompt.
    pub fn parser(&self) -> OutputParser {
        OutputParser::new(self.output.clone())
    }

    /// A response format (`response_format`) for this prompt: where the model reasons first, the grammar has to leave
    /// room for that. Grammars in Lark stay as they are.
    pub fn response_grammar(&self, grammar: Grammar, control_token: Option<ControlToken<'_>>) -> Grammar {
        grammar::after_reasoning(grammar, self.preamble(), control_token.unwrap_or(&|_| None))
    }

    fn preamble(&self) -> Preamble {
        Preamble { reasoning: self.output.reasoning, starts_in_reasoning: self.output.starts_in_reasoning }
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

/// A tool, checked.
struct Tool<'a> {
    name: &'a str,
    function: &'a Value,
}

fn check_tools(tools: &[Value]) -> Result<Vec<Tool<'_>>, PromptError> {
    let wrong = |index: usize, reason: &str| PromptError::Tool { index, reason: reason.into() };
    let mut checked: Vec<Tool<'_>> = Vec::with_capacity(tools.len());
    for (index, tool) in tools.iter().enumerate() {
        if tool.get("type").and_then(Value::as_str) != Some("function") {
            return Err(wrong(index, "only tools of type \"function\" are supported"));
        }
        let function =
            tool.get("function").filter(|f| f.is_object()).ok_or_else(|| wrong(index, "needs a function"))?;
        let name = function.get("name").and_then(Value::as_str).unwrap_or_default();
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
        if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.chars().all(allowed) {
            return Err(wrong(index, "the function's name must be made of letters, digits, '_', '-' and '.'"));
        }
        if checked.iter().any(|tool| tool.name == name) {
            return Err(wrong(index, "another function has the same name; names must differ"));
        }
        if function.get("parameters").is_some_and(|p| !p.is_object() && !p.is_null()) {
            return Err(wrong(index, "the function's parameters must be a JSON Schema object"));
        }
        checked.push(Tool { name, function });
    }
    Ok(checked)
}

/// Tells a model whose template knows no tools (or whose own way to call is not read here) what it can call and how.
fn generic_instructions(tools: &[Tool<'_>], choice: &ToolChoice, parallel: bool) -> String {
    let mut text = String::from(
        "You can call functions. To call one, answer with nothing but a JSON object of this form, without explanation:\n\
         {\"name\": \"the function's name\", \"arguments\": {\"parameter\": \"value\"}}\n",
    );
    if parallel {
        text.push_str("To call several, answer with a JSON list of such objects.\n");
    }
    match choice {
        ToolChoice::Required => text.push_str("Now you must call a function.\n"),
        ToolChoice::Function(name) => text.push_str(&format!("Now you must call {name}.\n")),
        ToolChoice::Auto | ToolChoice::None => {
            text.push_str("If no function is needed, answer in plain text as usual.\n");
        }
    }
    text.push_str("These are the functions, with JSON Schemas of their parameters:");
    for tool in tools {
        text.push('\n');
        text.push_str(&tool.function.to_string());
    }
    text
}

impl ChatTemplate {
    /// Makes a request into a prompt.
    ///
    /// With `tool_choice` none the tools are not shown at all. Tools for a template that knows none, or whose calls are
    /// in a format that the parser does not read, are described in the system message, in [`ToolFormat::Generic`].
    pub fn prepare(&self, request: &ChatRequest<'_>) -> Result<ChatPrompt, PromptError> {
        let tools = check_tools(request.tools)?;
        let callable: &[Tool<'_>] = if *request.tool_choice == ToolChoice::None { &[] } else { &tools };
        match request.tool_choice {
            ToolChoice::Required if tools.is_empty() => {
                return Err(PromptError::ToolChoice("is \"required\", but no tools are given".into()));
            }
            ToolChoice::Function(name) if !tools.iter().any(|tool| tool.name == name) => {
                return Err(PromptError::ToolChoice(format!("names {name:?}, which is not among the tools")));
            }
            _ => {}
        }
        let capabilities = self.capabilities();
        let native = capabilities.tools && !callable.is_empty();
        let told = !capabilities.tools && !callable.is_empty();
        let history = if told || !capabilities.tool_calls || !capabilities.tool_results {
            CallHistory::Told
        } else {
            CallHistory::Native
        };
        let instructions =
            told.then(|| generic_instructions(callable, request.tool_choice, request.parallel_tool_calls));
        let messages = messages::convert(request.messages, capabilities, history, instructions.as_deref())?;
        let text = self.render(&RenderInput {
            messages: &messages,
            tools: native.then_some(request.tools),
            add_generation_prompt: true,
            bos_token: request.bos_token,
            eos_token: request.eos_token,
            extra: request.extra,
            now: request.now,
        })?;

        let starts_in_reasoning = match capabilities.reasoning {
            ReasoningFormat::Tags { open, .. } => text.trim_end().ends_with(open),
            _ => false,
        };
        let forced = matches!(request.tool_choice, ToolChoice::Required | ToolChoice::Function(_));
        let single = !request.parallel_tool_calls || matches!(request.tool_choice, ToolChoice::Function(_));
        let output = OutputSpec {
            tool_format: (!callable.is_empty()).then_some(capabilities.tool_format),
            tool_names: callable.iter().map(|tool| tool.name.to_owned()).collect(),
            reasoning: capabilities.reasoning,
            starts_in_reasoning,
            calls_max: if single { 1 } else { usize::MAX },
        };
        let mut prompt = ChatPrompt {
            text,
            grammar: None,
            visible_tokens: visible_tokens(&output),
            output,
            extra_stops: self.extra_stops().to_vec(),
        };
        if forced {
            let functions: Vec<Function<'_>> = callable
                .iter()
                .filter(|tool| match request.tool_choice {
                    ToolChoice::Function(name) => tool.name == name,
                    _ => true,
                })
                .map(|tool| Function { name: tool.name, parameters: tool.function.get("parameters") })
                .collect();
            let control_token: ControlToken<'_> = request.control_token.unwrap_or(&|_| None);
            let preamble = prompt.preamble();
            prompt.grammar =
                Some(grammar::forced_call(capabilities.tool_format, &functions, !single, preamble, control_token));
        }
        Ok(prompt)
    }
}

fn visible_tokens(output: &OutputSpec) -> Vec<&'static str> {
    let mut tokens = Vec::new();
    match output.reasoning {
        ReasoningFormat::None => {}
        ReasoningFormat::Tags { open, close } => tokens.extend([open, close]),
        ReasoningFormat::Harmony => tokens.extend(harmony::TOKENS),
    }
    match output.tool_format {
        Some(ToolFormat::Tagged { open, close }) => tokens.extend([open, close]),
        Some(ToolFormat::Llama3) => tokens.push(PYTHON_TAG),
        Some(ToolFormat::Mistral { .. }) => tokens.extend([MISTRAL_CALLS, MISTRAL_ID, MISTRAL_ARGS]),
        Some(ToolFormat::Harmony | ToolFormat::Generic) | None => {}
    }
    tokens
}
