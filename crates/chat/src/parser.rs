//! Splits generated text, as it streams, into content, reasoning and tool calls.
//!
//! The readers behind it take one character at a time, so that the deltas, joined, never depend on how the text was cut
//! into pieces. Nothing is lost: whatever is neither a marker nor part of a call comes out as content, in order.
//!
//! Decisions:
//! - Formats with a marker take any name for a call: the model has said that it means one. Formats without (Llama 3
//!   without its tag, generic JSON) take a JSON object for a call only if it names an offered tool and has no foreign
//!   keys, and only at the beginning of the answer.
//! - A call is announced when its name is known and its arguments begin. If its JSON breaks after that, the call ends
//!   there and the rest is content; if it breaks before, all of it is content.
//! - White space next to markers is layout and dropped.

use crate::{
    ReasoningFormat, ToolFormat,
    harmony::HarmonyReader,
    reasoning::{Piece, ReasoningReader},
    sink::Sink,
    tool_reader::ToolReader,
};

/// A piece of the answer, in the order in which it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Delta {
    /// Text for the user.
    Content(String),
    /// Text the model thought with.
    Reasoning(String),
    /// A call begins. Calls are numbered from 0 in the order of their beginnings; one is open at a time.
    ToolCallStart {
        /// Number of the call.
        index: usize,
        /// The id the model itself gave (some Mistral models do); otherwise the caller makes one up.
        id: Option<String>,
        /// Function name.
        name: String,
    },
    /// More of the open call's arguments, JSON text.
    ToolCallArguments {
        /// Number of the call.
        index: usize,
        /// The next characters of the JSON text.
        fragment: String,
    },
    /// The call is complete, or the generation ended within it.
    ToolCallEnd {
        /// Number of the call.
        index: usize,
    },
}

/// What an answer may contain; made by [`crate::ChatTemplate::prepare`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutputSpec {
    /// How tool calls are written; `None` where no tools were offered: then nothing is read as a call.
    pub tool_format: Option<ToolFormat>,
    /// Names of the offered functions. Formats without a marker take only these for a call.
    pub tool_names: Vec<String>,
    /// How reasoning is marked.
    pub reasoning: ReasoningFormat,
    /// The prompt has already opened the reasoning.
    pub starts_in_reasoning: bool,
    /// After so many calls the answer is over (`parallel_tool_calls: false` makes it 1).
    pub calls_max: usize,
}

#[derive(Debug)]
enum Reader {
    Harmony(HarmonyReader),
    Layers { reasoning: Option<ReasoningReader>, tools: Option<Box<ToolReader>> },
}

/// Reads an answer as it streams.
#[derive(Debug)]
pub struct OutputParser {
    reader: Reader,
    sink: Sink,
    calls_max: usize,
}

impl OutputParser {
    /// A parser at the beginning of an answer.
    pub fn new(spec: OutputSpec) -> OutputParser {
        let harmony = spec.reasoning == ReasoningFormat::Harmony || spec.tool_format == Some(ToolFormat::Harmony);
        let reader = if harmony {
            Reader::Harmony(HarmonyReader::new())
        } else {
            let reasoning = match spec.reasoning {
                ReasoningFormat::Tags { open, close } => {
                    Some(ReasoningReader::new(open, close, spec.starts_in_reasoning))
                }
                ReasoningFormat::None | ReasoningFormat::Harmony => None,
            };
            let tools = spec.tool_format.map(|format| Box::new(ToolReader::new(format, spec.tool_names)));
            Reader::Layers { reasoning, tools }
        };
        OutputParser { reader, sink: Sink::default(), calls_max: spec.calls_max }
    }

    /// All calls that were asked for are complete: generation can stop. What is pushed from here on is ignored.
    pub fn is_complete(&self) -> bool {
        self.sink.calls_ended() >= self.calls_max
    }

    /// The next text of the answer, control tokens written as their text. Neighbouring deltas of a kind are joined.
    pub fn push(&mut self, text: &str) -> Vec<Delta> {
        for c in text.chars() {
            if self.is_complete() {
                break;
            }
            match &mut self.reader {
                Reader::Harmony(reader) => reader.feed(c, &mut self.sink),
                Reader::Layers { reasoning: Some(reasoning), tools } => {
                    if let Some(piece) = reasoning.feed(c) {
                        give(piece, tools, &mut self.sink);
                    }
                }
                Reader::Layers { reasoning: None, tools: Some(tools) } => tools.feed(c, &mut self.sink),
                Reader::Layers { reasoning: None, tools: None } => self.sink.content(c.encode_utf8(&mut [0; 4])),
            }
        }
        self.sink.take()
    }

    /// The answer has ended: what was held back, and the end of a call that was cut off.
    pub fn finish(&mut self) -> Vec<Delta> {
        if !self.is_complete() {
            match &mut self.reader {
                Reader::Harmony(reader) => reader.finish(&mut self.sink),
                Reader::Layers { reasoning, tools } => {
                    if let Some(piece) = reasoning.as_mut().and_then(ReasoningReader::finish) {
                        give(piece, tools, &mut self.sink);
                    }
                    if let Some(tools) = tools {
                        tools.finish(&mut self.sink);
                    }
                }
            }
        }
        self.sink.take()
    }
}

fn give(piece: Piece, tools: &mut Option<Box<ToolReader>>, sink: &mut Sink) {
    match (piece, tools) {
        (Piece::Reasoning(text), _) => sink.reasoning(&text),
        (Piece::Content(text), None) => sink.content(&text),
        (Piece::Content(text), Some(tools)) => text.chars().for_each(|c| tools.feed(c, sink)),
    }
}
