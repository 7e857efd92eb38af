//! Between our types and protobuf's. Ours are what the rest of the program sees: once one exists, its ids, addresses and
//! numbers have been checked. Writing runs the same checks as reading.

use prost::Message;

use super::check;
use super::error::MessageError;

/// A type of ours with its protobuf counterpart.
pub(super) trait Body: Sized {
    /// The generated type.
    type Proto: Message + Default;

    /// Name in errors.
    const WHAT: &'static str;

    /// Longest encoding.
    const BYTES_MAX: usize;

    /// Checks and converts.
    fn to_proto(&self) -> Result<Self::Proto, MessageError>;

    /// Converts and checks.
    fn from_proto(proto: Self::Proto) -> Result<Self, MessageError>;

    /// The bytes of the message.
    fn encode(&self) -> Result<Vec<u8>, MessageError> {
        let proto = self.to_proto()?;
        check::size(Self::WHAT, proto.encoded_len(), Self::BYTES_MAX)?;
        Ok(proto.encode_to_vec())
    }

    /// The message of the bytes. Allocates a small multiple of them at most.
    fn decode(bytes: &[u8]) -> Result<Self, MessageError> {
        check::size(Self::WHAT, bytes.len(), Self::BYTES_MAX)?;
        Self::from_proto(Self::Proto::decode(bytes)?)
    }
}
