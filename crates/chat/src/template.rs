//! A model's own Jinja chat template.
//!
//! [`ChatTemplate::render`] gives byte for byte what `apply_chat_template` of Hugging Face transformers gives, errors
//! included: it changes no message. What requests need beyond that (a system message for a template that refuses one,
//! tools for a template that knows none) is done by [`ChatTemplate::prepare`].
//!
//! A template comes out of a downloaded file and is a program. It has no access to anything, but it can loop, recurse,
//! print without end or nest values until dropping them overflows the stack; each has its limit here, and a rendering
//! has its own thread with a stack that the fuel cannot exhaust. One hole is left: strings doubled with `~` in
//! variables that are never printed grow with no limit but memory, because minijinja offers no hook there.

use std::{fmt, thread};

use minijinja::{Environment, Error, ErrorKind, Value as TemplateValue};
use serde_json::{Map, Value};

pub use crate::probe::Capabilities;
use crate::{
    environment::{self, Raised},
    probe,
};

/// Longest template that is compiled. The longest in use are about 40 KB.
pub const SOURCE_BYTES_MAX: usize = 512 << 10;
/// Longest prompt that a template may print.
pub const OUTPUT_BYTES_MAX: usize = 16 << 20;
/// Instructions that one rendering may execute. A conversation of 1,000 messages needs some 200,000 in a template that
/// looks at each message once, and several million in those that search the conversation for every message.
pub const FUEL_MAX: u64 = 5_000_000;
/// Depth of nested macro calls, includes and loops.
pub const RECURSION_MAX: usize = 100;
/// Stack of a rendering thread. Dropping a value nested once per few instructions of [`FUEL_MAX`] has to fit; the pages
/// that are not touched cost nothing.
const STACK_BYTES: usize = 1 << 30;

pub(crate) const OUTPUT_LIMIT_MESSAGE: &str = "the output limit is exceeded";
const NAME: &str = "chat_template";

/// The ChatML template, in our words: every turn between `<|im_start|>` and `<|im_end|>`.
const CHATML: &str = "{% for message in messages %}\
    {{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}\
    {% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// A moment, with the offset of the local time zone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timestamp {
    /// Seconds since 1970-01-01 00:00 UTC.
    pub unix_seconds: i64,
    /// Local time is UTC plus this.
    pub utc_offset_seconds: i32,
}

/// What a template is rendered with: the variables that `apply_chat_template` of transformers gives.
#[derive(Debug, Clone, Copy)]
pub struct RenderInput<'a> {
    /// Message objects, given to the template as they are.
    pub messages: &'a [Value],
    /// Tool objects; `None` makes `tools` none in the template.
    pub tools: Option<&'a [Value]>,
    /// Ends the prompt with the beginning of the assistant's turn.
    pub add_generation_prompt: bool,
    /// Text of the beginning-of-sequence token.
    pub bos_token: &'a str,
    /// Text of the end-of-sequence token.
    pub eos_token: &'a str,
    /// More variables (`chat_template_kwargs`). They override the others, as in transformers.
    pub extra: &'a Map<String, Value>,
    /// What `strftime_now` tells.
    pub now: Timestamp,
}

/// Why a template could not be used. Messages are meant for the client.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// It is too long to be looked at.
    #[error(
        "the model's chat template has {bytes} bytes, at most {SOURCE_BYTES_MAX} are accepted; give another template"
    )]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// It does not parse.
    #[error("the model's chat template cannot be compiled: {0}; give another template or use /v1/completions")]
    Syntax(String),
    /// It called `raise_exception`: the conversation is not one that the model was trained for.
    #[error("the model's chat template refuses this conversation: {0}")]
    Raised(String),
    /// It ran too long.
    #[error(
        "the model's chat template was stopped after {FUEL_MAX} instructions: it loops, or the conversation is too long for it; \
         shorten the conversation or give another template"
    )]
    OutOfFuel,
    /// It printed too much.
    #[error(
        "the model's chat template printed more than {OUTPUT_BYTES_MAX} bytes; shorten the conversation or give another template"
    )]
    OutputTooLong,
    /// Anything else that went wrong while rendering.
    #[error("the model's chat template failed: {0}; check the messages' fields or give another template")]
    Failed(String),
}

/// A compiled template and what it can do.
pub struct ChatTemplate {
    env: Environment<'static>,
    capabilities: Capabilities,
    extra_stops: Vec<String>,
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatTemplate").field("capabilities", &self.capabilities).finish_non_exhaustive()
    }
}

impl ChatTemplate {
    /// Compiles a template and probes what it can do by rendering small conversations. Takes milliseconds; keep it.
    pub fn compile(source: &str) -> Result<ChatTemplate, TemplateError> {
        if source.len() > SOURCE_BYTES_MAX {
            return Err(TemplateError::TooLong { bytes: source.len() });
        }
        on_own_stack(|| {
            let mut env = environment::environment();
            env.add_template_owned(NAME, environment::adapt(source))
                .map_err(|error| TemplateError::Syntax(describe(&error)))?;
            let capabilities = probe::probe(source, &|input| render(&env, input));
            Ok(ChatTemplate { env, capabilities, extra_stops: Vec::new() })
        })
    }

    /// The ChatML template, for models that come without one.
    pub fn chatml() -> Result<ChatTemplate, TemplateError> {
        let mut template = ChatTemplate::compile(CHATML)?;
        template.extra_stops.push("<|im_end|>".into());
        Ok(template)
    }

    pub(crate) fn extra_stops(&self) -> &[String] {
        &self.extra_stops
    }

    /// What the template can do.
    pub fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    /// Renders exactly as transformers would: no message is changed. Blocks for as long as the template computes, at
    /// worst seconds with a hostile one.
    pub fn render(&self, input: &RenderInput<'_>) -> Result<String, TemplateError> {
        on_own_stack(|| render(&self.env, input))
    }
}

/// Runs `work` on a thread with a large stack. A panic of the template engine (its index arithmetic can overflow) is an
/// error of the template.
fn on_own_stack<T: Send>(work: impl FnOnce() -> Result<T, TemplateError> + Send) -> Result<T, TemplateError> {
    thread::scope(|scope| {
        let thread = thread::Builder::new()
            .name("chat-template".into())
            .stack_size(STACK_BYTES)
            .spawn_scoped(scope, work)
            .map_err(|error| TemplateError::Failed(format!("no thread to render it on ({error})")))?;
        thread.join().unwrap_or_else(|_| Err(TemplateError::Failed("the template engine panicked".into())))
    })
}

fn render(env: &Environment<'static>, input: &RenderInput<'_>) -> Result<String, TemplateError> {
    let env = environment::for_rendering(env, input.now);
    let template = env.get_template(NAME).map_err(|error| translate(&error))?;
    let mut variables = Map::new();
    variables.insert("messages".into(), input.messages.into());
    variables.insert("tools".into(), input.tools.map_or(Value::Null, Value::from));
    variables.insert("documents".into(), Value::Null);
    variables.insert("add_generation_prompt".into(), input.add_generation_prompt.into());
    variables.insert("bos_token".into(), input.bos_token.into());
    variables.insert("eos_token".into(), input.eos_token.into());
    for (name, value) in input.extra {
        variables.insert(name.clone(), value.clone());
    }
    let mut output = BoundedOutput { bytes: Vec::new(), too_long: false };
    let rendered = template.render_captured_to(TemplateValue::from_serialize(&variables), &mut output);
    if output.too_long {
        return Err(TemplateError::OutputTooLong);
    }
    rendered.map_err(|error| translate(&error))?;
    String::from_utf8(output.bytes).map_err(|error| TemplateError::Failed(error.to_string()))
}

/// Collects the output up to [`OUTPUT_BYTES_MAX`].
struct BoundedOutput {
    bytes: Vec<u8>,
    too_long: bool,
}

impl std::io::Write for BoundedOutput {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.bytes.len() + bytes.len() > OUTPUT_BYTES_MAX {
            self.too_long = true;
            return Err(std::io::Error::other(OUTPUT_LIMIT_MESSAGE));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn translate(error: &Error) -> TemplateError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(current) = cause {
        if let Some(raised) = current.downcast_ref::<Raised>() {
            return TemplateError::Raised(raised.0.clone());
        }
        if let Some(inner) = current.downcast_ref::<Error>() {
            if inner.kind() == ErrorKind::OutOfFuel {
                return TemplateError::OutOfFuel;
            }
            if inner.detail() == Some(OUTPUT_LIMIT_MESSAGE) {
                return TemplateError::OutputTooLong;
            }
        }
        cause = current.source();
    }
    TemplateError::Failed(describe(error))
}

fn describe(error: &Error) -> String {
    let mut text = error.kind().to_string();
    if let Some(detail) = error.detail() {
        text = format!("{text}: {detail}");
    }
    if let Some(line) = error.line() {
        text = format!("{text} (line {line})");
    }
    text
}
