//! Splits the reasoning off the beginning of an answer: `<think> ... </think> answer`.
//!
//! White space around the reasoning is layout, not text: it is dropped on both sides of both tags.

/// What a character turned out to be.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    Reasoning(String),
    Content(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing but white space so far: the tag may yet open.
    Start,
    /// Within; `fresh`: nothing but white space since the tag.
    Inside { fresh: bool },
    /// After the closing tag, nothing but white space so far.
    After,
    /// The answer proper.
    Content,
}

/// The splitter.
#[derive(Debug)]
pub(crate) struct ReasoningReader {
    open: &'static str,
    close: &'static str,
    state: State,
    space: String,
    held: String,
}

impl ReasoningReader {
    pub(crate) fn new(open: &'static str, close: &'static str, starts_inside: bool) -> ReasoningReader {
        let state = if starts_inside { State::Inside { fresh: true } } else { State::Start };
        ReasoningReader { open, close, state, space: String::new(), held: String::new() }
    }

    pub(crate) fn feed(&mut self, c: char) -> Option<Piece> {
        match self.state {
            State::Content => Some(Piece::Content(c.to_string())),
            State::After if c.is_whitespace() => None,
            State::After => {
                self.state = State::Content;
                Some(Piece::Content(c.to_string()))
            }
            State::Start => self.start(c),
            State::Inside { fresh } => self.inside(c, fresh),
        }
    }

    fn start(&mut self, c: char) -> Option<Piece> {
        if self.held.is_empty() && c.is_whitespace() {
            self.space.push(c);
            return None;
        }
        self.held.push(c);
        if self.held == self.open {
            self.space.clear();
            self.held.clear();
            self.state = State::Inside { fresh: true };
            None
        } else if self.open.starts_with(self.held.as_str()) {
            None
        } else {
            self.state = State::Content;
            Some(Piece::Content(self.take_held()))
        }
    }

    fn inside(&mut self, c: char, fresh: bool) -> Option<Piece> {
        if self.held.is_empty() && c.is_whitespace() {
            if !fresh {
                self.space.push(c);
            }
            return None;
        }
        self.held.push(c);
        if self.held == self.close {
            self.space.clear();
            self.held.clear();
            self.state = State::After;
            return None;
        }
        if self.close.starts_with(self.held.as_str()) {
            return None;
        }
        // A model that was told to think may open the tag although the prompt has done so already.
        if fresh && self.held.len() <= self.open.len() && self.open.starts_with(self.held.as_str()) {
            if self.held == self.open {
                self.held.clear();
            }
            return None;
        }
        self.state = State::Inside { fresh: false };
        // Only the last character can begin the closing tag anew.
        let last = self.held.pop();
        let mut text = self.take_held();
        match last {
            Some(last) if self.close.starts_with(last) && !text.is_empty() => self.held.push(last),
            Some(last) if last.is_whitespace() => self.space.push(last),
            Some(last) => text.push(last),
            None => {}
        }
        (!text.is_empty()).then_some(Piece::Reasoning(text))
    }

    fn take_held(&mut self) -> String {
        let mut text = std::mem::take(&mut self.space);
        text.push_str(&std::mem::take(&mut self.held));
        text
    }

    /// The answer has ended: what was held back.
    pub(crate) fn finish(&mut self) -> Option<Piece> {
        let text = self.take_held();
        match self.state {
            _ if text.is_empty() => None,
            State::Inside { .. } => Some(Piece::Reasoning(text)),
            _ => Some(Piece::Content(text)),
        }
    }
}
