//! Reads one tool call, `{"name": ..., "arguments": {...}}`, character by character, and gives the arguments on as they
//! come. Keys may stand in any order; until the name is known, arguments wait.

use crate::{
    json_scan::{Scan, ValueScanner},
    sink::Sink,
};

/// Function names longer than this are no function names.
pub(crate) const NAME_BYTES_MAX: usize = 256;
/// What may wait for a decision: a call whose name comes after its arguments, or JSON that may yet turn out a call.
const HELD_BYTES_MAX: usize = 1 << 20;

/// What a character did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CallStep {
    /// The call goes on.
    More,
    /// The call is complete.
    Done,
    /// This is no call. What was read and is not yet part of an announced call is in [`CallReader::take_raw`], its last
    /// character is the one at fault.
    Failed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Field {
    Name,
    Arguments,
    Id,
    Other,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Open,
    KeyOrClose,
    Key,
    Colon,
    Value,
    CommaOrClose,
}

/// The reader of one call.
#[derive(Debug)]
pub(crate) struct CallReader {
    /// Only these names are calls; `None`: all are.
    names: Option<Vec<String>>,
    phase: Phase,
    field: Field,
    scanner: ValueScanner,
    /// Text of the key or of a value that is needed whole.
    text: String,
    name: Option<String>,
    id: Option<String>,
    /// Arguments that came before the name.
    early_arguments: Option<String>,
    has_arguments: bool,
    announced: bool,
    raw: String,
}

impl CallReader {
    pub(crate) fn new(names: Option<Vec<String>>) -> CallReader {
        CallReader {
            names,
            phase: Phase::Open,
            field: Field::Other,
            scanner: ValueScanner::new(),
            text: String::new(),
            name: None,
            id: None,
            early_arguments: None,
            has_arguments: false,
            announced: false,
            raw: String::new(),
        }
    }

    /// What was read and has not become part of a call.
    pub(crate) fn take_raw(&mut self) -> String {
        std::mem::take(&mut self.raw)
    }

    pub(crate) fn feed(&mut self, c: char, sink: &mut Sink) -> CallStep {
        if !self.announced {
            self.raw.push(c);
        }
        let step = if self.raw.len() > HELD_BYTES_MAX { CallStep::Failed } else { self.step(c, sink) };
        match step {
            CallStep::Failed if self.announced => {
                // The client has seen the call begin; it ends here, and what follows is text.
                sink.end_call();
                self.raw = c.to_string();
            }
            CallStep::Done => sink.end_call(),
            _ => {}
        }
        step
    }

    fn step(&mut self, c: char, sink: &mut Sink) -> CallStep {
        let space = c.is_ascii_whitespace();
        match (self.phase, c) {
            (Phase::Open | Phase::KeyOrClose | Phase::Colon | Phase::CommaOrClose, _) if space => {}
            (Phase::Open, '{') => self.phase = Phase::KeyOrClose,
            (Phase::KeyOrClose, '"') => {
                self.phase = Phase::Key;
                self.begin_text(c);
            }
            (Phase::KeyOrClose | Phase::CommaOrClose, '}') => return self.close(sink),
            (Phase::Key, _) => {
                self.text.push(c);
                match self.scanner.feed(c) {
                    Scan::Complete => return self.key_ended(),
                    Scan::More => {}
                    _ => return CallStep::Failed,
                }
            }
            (Phase::Colon, ':') => {
                self.phase = Phase::Value;
                self.scanner = ValueScanner::new();
                self.text.clear();
            }
            (Phase::Value, _) => return self.value(c, sink),
            (Phase::CommaOrClose, ',') => self.phase = Phase::KeyOrClose,
            _ => return CallStep::Failed,
        }
        CallStep::More
    }

    fn begin_text(&mut self, c: char) {
        self.scanner = ValueScanner::new();
        self.scanner.feed(c);
        self.text.clear();
        self.text.push(c);
    }

    fn key_ended(&mut self) -> CallStep {
        let Ok(key) = serde_json::from_str::<String>(&self.text) else {
            return CallStep::Failed;
        };
        self.field = match key.as_str() {
            "name" | "tool_name" if self.name.is_none() => Field::Name,
            "arguments" | "parameters" if !self.has_arguments => Field::Arguments,
            "name" | "tool_name" | "arguments" | "parameters" => return CallStep::Failed,
            "id" | "tool_call_id" => Field::Id,
            // Without a marker around it, JSON with other keys is an answer in JSON: it has to stream.
            "type" => Field::Other,
            _ if self.names.is_some() => return CallStep::Failed,
            _ => Field::Other,
        };
        self.phase = Phase::Colon;
        CallStep::More
    }

    fn value(&mut self, c: char, sink: &mut Sink) -> CallStep {
        if self.text.is_empty() && c.is_ascii_whitespace() {
            return CallStep::More;
        }
        let first = self.text.is_empty();
        let in_string = self.scanner.in_string();
        let scan = self.scanner.feed(c);
        match scan {
            Scan::Invalid => return CallStep::Failed,
            Scan::CompleteBefore => {
                if !self.value_ended(sink) {
                    return CallStep::Failed;
                }
                self.phase = Phase::CommaOrClose;
                return self.step(c, sink);
            }
            Scan::More | Scan::Complete => {}
        }
        if self.field == Field::Arguments {
            if first {
                if !matches!(c, '{' | '"' | 'n') {
                    return CallStep::Failed;
                }
                self.has_arguments = true;
            }
            self.argument_character(c, first, in_string, sink);
        } else {
            self.text.push(c);
        }
        if scan == Scan::Complete {
            if !self.value_ended(sink) {
                return CallStep::Failed;
            }
            self.phase = Phase::CommaOrClose;
        }
        CallStep::More
    }

    /// An object streams once the name is known. Anything else (text that holds JSON, null) is needed whole.
    fn argument_character(&mut self, c: char, first: bool, in_string: bool, sink: &mut Sink) {
        let streams = if first { c == '{' } else { self.text.starts_with('{') };
        if !streams {
            self.text.push(c);
            return;
        }
        if first {
            self.text.push('{');
            if self.name.is_some() {
                self.announce(sink);
            }
        }
        let piece = argument_text(c, in_string);
        if self.announced {
            sink.arguments(&piece);
        } else {
            self.early_arguments.get_or_insert_default().push_str(&piece);
        }
    }

    /// Whether the value is one that a call may have.
    fn value_ended(&mut self, sink: &mut Sink) -> bool {
        match self.field {
            Field::Name => {
                let Ok(name) = serde_json::from_str::<String>(&self.text) else {
                    return false;
                };
                let known = self.names.as_ref().is_none_or(|names| names.contains(&name));
                if name.is_empty() || name.len() > NAME_BYTES_MAX || !known {
                    return false;
                }
                self.name = Some(name);
                if self.early_arguments.is_some() {
                    self.announce(sink);
                }
            }
            Field::Id => {
                self.id = serde_json::from_str::<String>(&self.text).ok().filter(|id| id.len() <= NAME_BYTES_MAX)
            }
            Field::Arguments if self.text.starts_with('"') => {
                let Ok(inner) = serde_json::from_str::<String>(&self.text) else {
                    return false;
                };
                if serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(&inner).is_err() {
                    return false;
                }
                self.whole_arguments(inner, sink);
            }
            Field::Arguments if self.text.starts_with('n') => self.whole_arguments("{}".to_owned(), sink),
            Field::Arguments | Field::Other => {}
        }
        true
    }

    fn whole_arguments(&mut self, arguments: String, sink: &mut Sink) {
        self.early_arguments = Some(arguments);
        if self.name.is_some() {
            self.announce(sink);
        }
    }

    fn announce(&mut self, sink: &mut Sink) {
        let Some(name) = self.name.clone() else {
            return;
        };
        self.announced = true;
        self.raw.clear();
        sink.start_call(self.id.take(), name);
        if let Some(arguments) = self.early_arguments.take() {
            sink.arguments(&arguments);
        }
    }

    fn close(&mut self, sink: &mut Sink) -> CallStep {
        if self.name.is_none() {
            return CallStep::Failed;
        }
        if !self.announced {
            // No arguments at all: a function without parameters.
            self.early_arguments = Some("{}".to_owned());
            self.announce(sink);
        }
        CallStep::Done
    }
}

/// A character of arguments; control characters inside strings get the escape that JSON asks for.
pub(crate) fn argument_text(c: char, in_string: bool) -> String {
    if in_string && c < ' ' {
        return crate::python::json_string(c.encode_utf8(&mut [0; 4]), false).trim_matches('"').to_owned();
    }
    c.to_string()
}
