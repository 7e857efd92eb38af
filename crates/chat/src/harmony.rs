//! Reads gpt-oss answers: OpenAI's Harmony format, in which every message names its channel.
//!
//! `<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...`. A message addressed
//! `to=functions.NAME` is a tool call whose body is the arguments. Format: the openai-harmony guide.

use crate::{call_reader::NAME_BYTES_MAX, sink::Sink};

const CHANNEL: &str = "<|channel|>";
const MESSAGE: &str = "<|message|>";
/// What ends a message's body.
const BODY_ENDS: [&str; 4] = ["<|end|>", "<|call|>", "<|return|>", "<|start|>"];
/// Every control token the reader needs to see.
pub(crate) const TOKENS: [&str; 7] =
    [CHANNEL, MESSAGE, "<|constrain|>", "<|end|>", "<|call|>", "<|return|>", "<|start|>"];
/// A header longer than this is none.
const HEADER_BYTES_MAX: usize = 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Body {
    Reasoning,
    Content,
    Arguments { any: bool },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Before `<|message|>`; `first`: at the beginning of the answer, where plain text is possible.
    Header {
        first: bool,
    },
    Body(Body),
}

/// The reader of an answer.
#[derive(Debug)]
pub(crate) struct HarmonyReader {
    state: State,
    /// The header so far, or the beginning of what may end the body.
    held: String,
}

impl HarmonyReader {
    pub(crate) fn new() -> HarmonyReader {
        HarmonyReader { state: State::Header { first: true }, held: String::new() }
    }

    pub(crate) fn feed(&mut self, c: char, sink: &mut Sink) {
        self.held.push(c);
        match self.state {
            State::Header { first } => self.header(first, sink),
            State::Body(body) => self.body(body, c, sink),
        }
    }

    fn header(&mut self, first: bool, sink: &mut Sink) {
        if let Some(header) = self.held.strip_suffix(MESSAGE) {
            let body = open_body(header, sink);
            self.state = State::Body(body);
            self.held.clear();
            return;
        }
        let text = self.held.trim_start();
        let may_begin = |beginning: &str| text.starts_with(beginning) || beginning.starts_with(text);
        let is_plain_text = first && !["<|", "to=", "assistant"].into_iter().any(may_begin);
        if is_plain_text || self.held.len() > HEADER_BYTES_MAX {
            sink.content(&std::mem::take(&mut self.held));
            self.state = State::Body(Body::Content);
        }
    }

    fn body(&mut self, body: Body, c: char, sink: &mut Sink) {
        if BODY_ENDS.contains(&self.held.as_str()) {
            self.held.clear();
            end_body(body, sink);
            self.state = State::Header { first: false };
            return;
        }
        if BODY_ENDS.iter().any(|end| end.starts_with(self.held.as_str())) {
            return;
        }
        // All ends begin with `<`, and none contains another: only the last character can begin one anew.
        let keep = c == '<' && self.held.len() > 1;
        if keep {
            self.held.pop();
        }
        let text = std::mem::take(&mut self.held);
        if keep {
            self.held.push(c);
        }
        match body {
            Body::Reasoning => sink.reasoning(&text),
            Body::Content => sink.content(&text),
            Body::Arguments { any } => {
                sink.arguments(&text);
                self.state = State::Body(Body::Arguments { any: any || !text.trim().is_empty() });
            }
        }
    }

    /// The answer has ended.
    pub(crate) fn finish(&mut self, sink: &mut Sink) {
        let held = std::mem::take(&mut self.held);
        match self.state {
            // `<|start|>assistant` and the like: the end of one message, or the beginning of the next that never came.
            State::Header { first: false } => {}
            State::Header { first: true } | State::Body(Body::Content) => sink.content(&held),
            State::Body(Body::Reasoning) => sink.reasoning(&held),
            State::Body(body @ Body::Arguments { .. }) => {
                sink.arguments(&held);
                end_body(body, sink);
            }
        }
        sink.end_call();
    }
}

fn end_body(body: Body, sink: &mut Sink) {
    if let Body::Arguments { any } = body {
        if !any {
            sink.arguments("{}");
        }
        sink.end_call();
    }
}

/// What the body after this header is. Begins the call if it is one.
fn open_body(header: &str, sink: &mut Sink) -> Body {
    let word_after = |marker: &str| {
        let (_, rest) = header.split_once(marker)?;
        rest.split(|c: char| c.is_whitespace() || c == '<').next()
    };
    if let Some(recipient) = word_after("to=") {
        let name = recipient.strip_prefix("functions.").unwrap_or(recipient);
        if !name.is_empty() && name.len() <= NAME_BYTES_MAX {
            sink.start_call(None, name.to_owned());
            return Body::Arguments { any: false };
        }
    }
    match word_after(CHANNEL) {
        Some("analysis") => Body::Reasoning,
        _ => Body::Content,
    }
}
