//! Where the readers put what they found: [`Delta`]s, neighbours of a kind made one.

use crate::Delta;

/// Collects deltas and counts calls.
#[derive(Debug, Default)]
pub(crate) struct Sink {
    deltas: Vec<Delta>,
    calls: usize,
    open: bool,
}

impl Sink {
    pub(crate) fn take(&mut self) -> Vec<Delta> {
        std::mem::take(&mut self.deltas)
    }

    /// Calls that have ended.
    pub(crate) fn calls_ended(&self) -> usize {
        self.calls
    }

    pub(crate) fn content(&mut self, text: &str) {
        match self.deltas.last_mut() {
            _ if text.is_empty() => {}
            Some(Delta::Content(last)) => last.push_str(text),
            _ => self.deltas.push(Delta::Content(text.to_owned())),
        }
    }

    pub(crate) fn reasoning(&mut self, text: &str) {
        match self.deltas.last_mut() {
            _ if text.is_empty() => {}
            Some(Delta::Reasoning(last)) => last.push_str(text),
            _ => self.deltas.push(Delta::Reasoning(text.to_owned())),
        }
    }

    pub(crate) fn start_call(&mut self, id: Option<String>, name: String) {
        self.end_call();
        self.open = true;
        self.deltas.push(Delta::ToolCallStart { index: self.calls, id, name });
    }

    pub(crate) fn arguments(&mut self, text: &str) {
        match self.deltas.last_mut() {
            _ if text.is_empty() => {}
            Some(Delta::ToolCallArguments { fragment, .. }) => fragment.push_str(text),
            _ => self.deltas.push(Delta::ToolCallArguments { index: self.calls, fragment: text.to_owned() }),
        }
    }

    /// Ends the open call, if there is one.
    pub(crate) fn end_call(&mut self) {
        if std::mem::take(&mut self.open) {
            self.deltas.push(Delta::ToolCallEnd { index: self.calls });
            self.calls += 1;
        }
    }
}
