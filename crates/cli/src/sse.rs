//! Server-sent events, as far as the API uses them: `data:` lines and comments.
//!
//! The format is WHATWG's (HTML, "Server-sent events"); field names other than `data` are skipped.

/// An event longer than this is not ours.
const EVENT_BYTES_MAX: usize = 8 << 20;

/// Turns bytes, in pieces of any size, into the data of events.
#[derive(Debug, Default)]
pub(crate) struct SseParser {
    line: Vec<u8>,
    data: Vec<u8>,
    has_data: bool,
}

/// The stream is not what it should be.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SseError {
    /// An event too long to be one.
    #[error("an event of more than {EVENT_BYTES_MAX} bytes")]
    TooLong,
    /// Not UTF-8.
    #[error("an event that is not UTF-8")]
    NotText,
}

impl SseParser {
    /// Takes the next piece; returns the events that it completes.
    pub(crate) fn push(&mut self, piece: &[u8]) -> Result<Vec<String>, SseError> {
        let mut events = Vec::new();
        for part in piece.split_inclusive(|byte| *byte == b'\n') {
            if self.line.len() + self.data.len() + part.len() > EVENT_BYTES_MAX {
                return Err(SseError::TooLong);
            }
            self.line.extend_from_slice(part);
            if part.ends_with(b"\n") {
                let line = std::mem::take(&mut self.line);
                let line = line.strip_suffix(b"\n").unwrap_or(&line);
                self.take_line(line.strip_suffix(b"\r").unwrap_or(line), &mut events)?;
            }
        }
        Ok(events)
    }

    fn take_line(&mut self, line: &[u8], events: &mut Vec<String>) -> Result<(), SseError> {
        if line.is_empty() {
            if std::mem::take(&mut self.has_data) {
                events.push(String::from_utf8(std::mem::take(&mut self.data)).map_err(|_| SseError::NotText)?);
            }
        } else if let Some(data) = line.strip_prefix(b"data:") {
            if self.has_data {
                self.data.push(b'\n');
            }
            self.data.extend_from_slice(data.strip_prefix(b" ").unwrap_or(data));
            self.has_data = true;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_the_same_however_the_bytes_are_cut() {
        let stream =
            ": comment\r\n\r\ndata: {\"a\":\"ä\"}\n\nevent: x\ndata:one\ndata: two\n\ndata: [DONE]\n\n".as_bytes();
        for size in 1..=stream.len() {
            let mut parser = SseParser::default();
            let events: Vec<String> = stream.chunks(size).flat_map(|piece| parser.push(piece).unwrap()).collect();
            assert_eq!(events, ["{\"a\":\"ä\"}", "one\ntwo", "[DONE]"], "pieces of {size}");
        }
    }

    #[test]
    fn an_endless_event_and_bytes_that_are_no_text_are_errors() {
        assert_eq!(SseParser::default().push(&vec![b'x'; EVENT_BYTES_MAX + 1]), Err(SseError::TooLong));
        assert_eq!(SseParser::default().push(b"data: \xff\n\n"), Err(SseError::NotText));
    }
}
