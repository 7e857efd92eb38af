//! Finds tool calls in the content of an answer: markers, lists of JSON calls, and Mistral's named calls.
//!
//! Works character by character, so that the result cannot depend on how the text was cut into pieces. Text that may
//! yet be a marker, and white space that may yet separate calls, is held back until decided; whatever turns out not to
//! be a call comes out as content.

use crate::{
    ToolFormat,
    call_reader::{CallReader, CallStep, NAME_BYTES_MAX, argument_text},
    json_scan::{Scan, ValueScanner},
    sink::Sink,
    tools::{MISTRAL_ARGS, MISTRAL_CALLS, MISTRAL_ID, PYTHON_TAG},
};

/// Opening fences that models put around JSON although told otherwise.
const FENCES: [&str; 2] = ["```json\n", "```\n"];
const FENCE_END: &str = "```";

#[derive(Debug)]
enum State {
    /// Formats without a marker: nothing but white space has been seen.
    Start,
    /// A code fence may be opening (generic format).
    Fence,
    /// Content, in which the marker is looked for.
    Text,
    /// Between and in the JSON calls of a list.
    List { in_array: bool, any: bool, fenced: bool, reader: Option<CallReader> },
    /// After the calls: the closing marker may follow.
    Trailer { close: &'static str },
    /// Mistral, after the marker: a list or a name.
    ListOrName,
    /// Mistral's `name[CALL_ID]id[ARGS]`; which of the two texts is being read.
    Named { reads_id: bool, tag: String, name: String, id: String },
    /// Mistral's arguments, after the name.
    NamedArguments { scanner: ValueScanner, name: String, id: String, begun: bool },
}

/// The reader of an answer's content.
#[derive(Debug)]
pub(crate) struct ToolReader {
    format: ToolFormat,
    names: Vec<String>,
    state: State,
    /// White space that is content only if content follows.
    space: String,
    /// The beginning of a marker, or what was read of a call that is not one yet.
    held: String,
    /// The last thing read was a call: white space after it is not content.
    after_call: bool,
}

impl ToolReader {
    pub(crate) fn new(format: ToolFormat, names: Vec<String>) -> ToolReader {
        let state = match format {
            ToolFormat::Llama3 | ToolFormat::Generic => State::Start,
            _ => State::Text,
        };
        ToolReader { format, names, state, space: String::new(), held: String::new(), after_call: false }
    }

    /// What announces calls in the middle of the text.
    fn marker(&self) -> Option<&'static str> {
        match self.format {
            ToolFormat::Tagged { open, .. } => Some(open),
            ToolFormat::Llama3 => Some(PYTHON_TAG),
            ToolFormat::Mistral { .. } => Some(MISTRAL_CALLS),
            ToolFormat::Harmony | ToolFormat::Generic => None,
        }
    }

    pub(crate) fn feed(&mut self, c: char, sink: &mut Sink) {
        // A character that ends one state may belong to the next; each state gives it on at most once.
        let mut next = Some(c);
        while let Some(c) = next.take() {
            next = self.step(c, sink);
        }
    }

    /// Returns the character if the state it led to has to see it.
    fn step(&mut self, c: char, sink: &mut Sink) -> Option<char> {
        match &mut self.state {
            State::Start => self.start(c),
            State::Fence => self.fence(c, sink),
            State::Text => self.text(c, sink),
            State::List { .. } => self.list(c, sink),
            State::Trailer { close } => {
                let close = *close;
                self.trailer(c, close, sink)
            }
            State::ListOrName => self.list_or_name(c),
            State::Named { .. } => self.named(c, sink),
            State::NamedArguments { .. } => self.named_arguments(c, sink),
        }
    }

    fn list_or_name(&mut self, c: char) -> Option<char> {
        if c.is_whitespace() {
            self.held.push(c);
            return None;
        }
        self.state = match c {
            '[' | '{' => State::List { in_array: false, any: false, fenced: false, reader: None },
            _ => State::Named { reads_id: false, tag: String::new(), name: String::new(), id: String::new() },
        };
        Some(c)
    }

    fn start(&mut self, c: char) -> Option<char> {
        match c {
            _ if c.is_whitespace() => {
                self.space.push(c);
                return None;
            }
            '{' | '[' => self.state = State::List { in_array: false, any: false, fenced: false, reader: None },
            '`' if self.format == ToolFormat::Generic => self.state = State::Fence,
            _ => self.state = State::Text,
        }
        Some(c)
    }

    fn fence(&mut self, c: char, sink: &mut Sink) -> Option<char> {
        self.held.push(c);
        if FENCES.contains(&self.held.as_str()) {
            self.state = State::List { in_array: false, any: false, fenced: true, reader: None };
        } else if !FENCES.iter().any(|fence| fence.starts_with(&self.held)) {
            self.give_up(sink);
        }
        None
    }

    /// What was held back is content after all.
    fn give_up(&mut self, sink: &mut Sink) {
        let (space, held) = (std::mem::take(&mut self.space), std::mem::take(&mut self.held));
        sink.content(&space);
        sink.content(&held);
        self.after_call = false;
        self.state = State::Text;
    }

    /// As [`ToolReader::give_up`], but the last character held is looked at again: a marker may begin with it.
    fn give_up_before_last(&mut self, sink: &mut Sink) -> Option<char> {
        let last = self.held.pop();
        self.give_up(sink);
        last
    }

    fn text(&mut self, c: char, sink: &mut Sink) -> Option<char> {
        let Some(marker) = self.marker() else {
            self.held.push(c);
            self.give_up(sink);
            return None;
        };
        if self.held.is_empty() && c.is_whitespace() {
            self.space.push(c);
            return None;
        }
        self.held.push(c);
        if self.held == marker {
            self.state = match self.format {
                ToolFormat::Mistral { .. } => State::ListOrName,
                _ => State::List { in_array: false, any: false, fenced: false, reader: None },
            };
        } else if !marker.starts_with(self.held.as_str()) {
            // Only a marker's first character can begin it anew: markers are not periodic.
            return match self.held.chars().count() {
                1 => {
                    self.give_up(sink);
                    None
                }
                _ => self.give_up_before_last(sink),
            };
        }
        None
    }

    fn list(&mut self, c: char, sink: &mut Sink) -> Option<char> {
        let State::List { in_array, any, fenced, reader } = &mut self.state else {
            return None;
        };
        if let Some(call) = reader {
            let announced_before = sink.calls_ended();
            match call.feed(c, sink) {
                CallStep::More => {}
                CallStep::Done => {
                    *reader = None;
                    *any = true;
                    self.held.clear();
                    self.space.clear();
                    self.after_call = true;
                }
                CallStep::Failed => {
                    let raw = call.take_raw();
                    if sink.calls_ended() > announced_before {
                        // The call had begun; marker and opening have become part of it.
                        self.held.clear();
                        self.space.clear();
                    }
                    self.held.push_str(&raw);
                    return self.give_up_before_last(sink);
                }
            }
            return None;
        }
        match c {
            '{' => {
                // Without a marker only the names of offered tools tell a call from an answer in JSON.
                let bare = matches!(self.format, ToolFormat::Llama3 | ToolFormat::Generic);
                let mut call = CallReader::new(bare.then(|| self.names.clone()));
                let _ = call.feed(c, sink);
                *reader = Some(call);
            }
            '[' if !*any && !*in_array => {
                *in_array = true;
                self.held.push(c);
            }
            ']' if *in_array && *any => {
                self.held.clear();
                let close = self.close_marker();
                self.state = State::Trailer { close };
            }
            ',' | ';' if *any => self.held.push(c),
            _ if c.is_whitespace() => self.held.push(c),
            _ if *any && !*in_array => {
                // The list is over. Separators were held; they are content only if no closing marker follows.
                let close = if *fenced { FENCE_END } else { self.close_marker() };
                self.space.push_str(&std::mem::take(&mut self.held));
                self.state = State::Trailer { close };
                return Some(c);
            }
            _ => {
                self.held.push(c);
                return self.give_up_before_last(sink);
            }
        }
        None
    }

    fn close_marker(&self) -> &'static str {
        match self.format {
            ToolFormat::Tagged { close, .. } => close,
            ToolFormat::Generic => FENCE_END,
            _ => "",
        }
    }

    fn trailer(&mut self, c: char, close: &'static str, sink: &mut Sink) -> Option<char> {
        if self.held.is_empty() && c.is_whitespace() {
            self.space.push(c);
            return None;
        }
        self.held.push(c);
        if self.held == close {
            self.held.clear();
            self.space.clear();
            self.state = State::Text;
        } else if close.is_empty() || !close.starts_with(self.held.as_str()) {
            // Not the closing marker; it may be the next opening one, which has to be seen from its first character.
            self.state = State::Text;
            for held in std::mem::take(&mut self.held).chars() {
                self.feed(held, sink);
            }
        }
        None
    }

    fn named(&mut self, c: char, sink: &mut Sink) -> Option<char> {
        self.held.push(c);
        let State::Named { reads_id, tag, name, id } = &mut self.state else {
            return None;
        };
        let text = if *reads_id { &mut *id } else { &mut *name };
        if tag.is_empty() && !matches!(c, '[' | '{') {
            text.push(c);
            let allowed = c.is_alphanumeric() || matches!(c, '_' | '-' | '.') || c.is_whitespace();
            if !allowed || text.len() > NAME_BYTES_MAX {
                return self.give_up_before_last(sink);
            }
            return None;
        }
        if tag.is_empty() && text.trim().is_empty() {
            return self.give_up_before_last(sink);
        }
        if tag.is_empty() && c == '{' {
            self.held.pop();
            self.begin_named_arguments();
            return Some(c);
        }
        tag.push(c);
        if tag == MISTRAL_ARGS {
            self.begin_named_arguments();
        } else if tag == MISTRAL_ID && !*reads_id {
            *reads_id = true;
            tag.clear();
        } else if !MISTRAL_ARGS.starts_with(tag.as_str()) && !MISTRAL_ID.starts_with(tag.as_str()) {
            return self.give_up_before_last(sink);
        }
        None
    }

    fn begin_named_arguments(&mut self) {
        if let State::Named { name, id, .. } = &self.state {
            let (name, id) = (name.trim().to_owned(), id.trim().to_owned());
            self.state = State::NamedArguments { scanner: ValueScanner::new(), name, id, begun: false };
        }
    }

    fn named_arguments(&mut self, c: char, sink: &mut Sink) -> Option<char> {
        let State::NamedArguments { scanner, name, id, begun } = &mut self.state else {
            return None;
        };
        if !*begun {
            if c.is_whitespace() {
                self.held.push(c);
                return None;
            }
            if c != '{' {
                self.held.push(c);
                return self.give_up_before_last(sink);
            }
            *begun = true;
            self.held.clear();
            self.space.clear();
            sink.start_call(Some(std::mem::take(id)).filter(|id| !id.is_empty()), std::mem::take(name));
        }
        let in_string = scanner.in_string();
        match scanner.feed(c) {
            Scan::Invalid | Scan::CompleteBefore => {
                sink.end_call();
                self.state = State::Text;
                return Some(c);
            }
            step => {
                sink.arguments(&argument_text(c, in_string));
                if step == Scan::Complete {
                    sink.end_call();
                    self.after_call = true;
                    self.state = State::Text;
                }
            }
        }
        None
    }

    /// The answer has ended.
    pub(crate) fn finish(&mut self, sink: &mut Sink) {
        if let State::List { reader: Some(call), .. } = &mut self.state {
            let raw = call.take_raw();
            if raw.is_empty() {
                // Cut off within a call that the client has seen begin.
                self.held.clear();
                self.space.clear();
            }
            self.held.push_str(&raw);
        }
        sink.end_call();
        if self.after_call && self.held.trim().is_empty() {
            self.held.clear();
            self.space.clear();
        }
        self.give_up(sink);
    }
}
