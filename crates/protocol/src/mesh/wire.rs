//! Messages on a stream, one after the other.
//!
//! ```text
//! offset  size  field
//!      0     4  length of the body in bytes, little-endian
//!      4     2  kind of message, little-endian
//!      6     -  body: protobuf
//! ```
//!
//! The kind stands before the body so that each kind can have a limit of its own, known before any of the body has come: a
//! ping cannot be as long as a prompt. A kind that a newer version added is skipped, up to a limit of its own, and reported
//! as unknown.

use std::marker::PhantomData;

use super::check;
use super::error::MessageError;

/// Length of what stands before each body.
pub const HEADER_BYTES: usize = 6;
/// Longest body of a kind that this version does not know.
pub const UNKNOWN_BODY_BYTES_MAX: usize = 64 << 10;

/// A set of messages that one kind of stream carries.
pub trait Message: Sized {
    /// Which message this is.
    fn kind(&self) -> u16;

    /// Longest body of a kind of message; [`UNKNOWN_BODY_BYTES_MAX`] for kinds that are not known.
    fn body_bytes_max(kind: u16) -> usize;

    /// The body. Refuses what [`Message::decode_body`] would refuse.
    fn encode_body(&self) -> Result<Vec<u8>, MessageError>;

    /// The message of a body.
    fn decode_body(kind: u16, body: &[u8]) -> Result<Self, MessageError>;
}

/// What stands before a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Which message follows.
    pub kind: u16,
    /// How long its body is: never above the kind's limit.
    pub body_bytes: usize,
}

impl Header {
    /// Reads a header of a stream of `M`, and refuses lengths above the limit.
    pub fn parse<M: Message>(bytes: &[u8; HEADER_BYTES]) -> Result<Header, MessageError> {
        let [a, b, c, d, e, f] = *bytes;
        let kind = u16::from_le_bytes([e, f]);
        let body_bytes = usize::try_from(u32::from_le_bytes([a, b, c, d])).unwrap_or(usize::MAX);
        check::size("message", body_bytes, M::body_bytes_max(kind))?;
        Ok(Header { kind, body_bytes })
    }
}

/// Header and body of a message.
pub fn encode<M: Message>(message: &M) -> Result<Vec<u8>, MessageError> {
    let body = message.encode_body()?;
    let limit = M::body_bytes_max(message.kind());
    check::size("message", body.len(), limit)?;
    let too_large = |_| MessageError::TooLarge { what: "message", bytes: body.len(), limit };
    let length = u32::try_from(body.len()).map_err(too_large)?;
    let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len());
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(&message.kind().to_le_bytes());
    bytes.extend_from_slice(&body);
    Ok(bytes)
}

/// Cuts a stream into messages. Holds one incomplete message at most, and never allocates more than what has come of it.
#[derive(Debug)]
pub struct Decoder<M> {
    buffer: Vec<u8>,
    messages: PhantomData<fn() -> M>,
}

impl<M: Message> Default for Decoder<M> {
    fn default() -> Self {
        Decoder { buffer: Vec::new(), messages: PhantomData }
    }
}

impl<M: Message> Decoder<M> {
    /// A decoder at the beginning of a stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes bytes from the front of `input` up to the end of the next message, and gives that; `Ok(None)` once `input` is
    /// used up. Call it until then. After an error the stream is lost: its place in it is no longer known.
    pub fn next(&mut self, input: &mut &[u8]) -> Result<Option<M>, MessageError> {
        self.fill(input, HEADER_BYTES);
        let Some(header) = self.buffer.first_chunk() else { return Ok(None) };
        let header = Header::parse::<M>(header)?;
        let end = HEADER_BYTES + header.body_bytes;
        self.fill(input, end);
        let Some(body) = self.buffer.get(HEADER_BYTES..end) else { return Ok(None) };
        let message = M::decode_body(header.kind, body)?;
        self.buffer = Vec::new();
        Ok(Some(message))
    }

    /// True between messages: where a stream may end.
    pub fn is_at_boundary(&self) -> bool {
        self.buffer.is_empty()
    }

    /// Moves bytes from `input` until the buffer holds `length` or the input ends.
    fn fill(&mut self, input: &mut &[u8], length: usize) {
        let wanted = length.saturating_sub(self.buffer.len());
        let (taken, rest) = input.split_at(wanted.min(input.len()));
        self.buffer.extend_from_slice(taken);
        *input = rest;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::Control;

    #[test]
    fn the_layout_is_pinned() {
        let bytes = encode(&Control::Ping(0x0102_0304_0506_0708)).unwrap();
        assert_eq!(bytes, [9, 0, 0, 0, 10, 0, 0x09, 8, 7, 6, 5, 4, 3, 2, 1]);
    }

    #[test]
    fn memory_follows_what_has_come_and_not_what_was_announced() {
        let kind = Control::Digest(Vec::new()).kind();
        let announced = Control::body_bytes_max(kind);
        let mut decoder = Decoder::<Control>::new();
        let header = [(announced as u32).to_le_bytes().as_slice(), &kind.to_le_bytes()].concat();
        for byte in header.iter().chain(&[0; 100]) {
            assert_eq!(decoder.next(&mut [*byte].as_slice()), Ok(None));
        }
        assert!(decoder.buffer.capacity() < 300, "{}", decoder.buffer.capacity());
    }

    #[test]
    fn no_more_is_taken_than_belongs_to_one_message() {
        let ping = encode(&Control::Ping(1)).unwrap();
        let bytes = [ping.clone(), vec![0xff; 1_000]].concat();
        let mut input = bytes.as_slice();
        let mut decoder = Decoder::<Control>::new();
        assert_eq!(decoder.next(&mut input), Ok(Some(Control::Ping(1))));
        assert_eq!(input.len(), 1_000);
        assert!(decoder.is_at_boundary());
        assert_eq!(decoder.buffer.capacity(), 0);
    }
}
