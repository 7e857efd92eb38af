//! Why a message cannot be sent or understood.

/// A message breaks a limit or a rule. Writing and reading apply the same rules, so what can be written can be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// More bytes than the limit of this kind of message or field.
    #[error("{what}: {bytes} bytes, and {limit} are the limit")]
    TooLarge {
        /// The message or field.
        what: &'static str,
        /// How long it is.
        bytes: usize,
        /// How long it may be.
        limit: usize,
    },
    /// More elements than the limit of a list.
    #[error("{what}: {count} entries, and {limit} are the limit")]
    TooMany {
        /// The list.
        what: &'static str,
        /// How many there are.
        count: usize,
        /// How many there may be.
        limit: usize,
    },
    /// The bytes are not protobuf, or a field has another type.
    #[error("not a protobuf message: {0}")]
    Protobuf(#[from] prost::DecodeError),
    /// A field that must be there is not.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// A field's value breaks a rule.
    #[error("{what} is not valid: {why}")]
    Invalid {
        /// The field.
        what: &'static str,
        /// The rule.
        why: &'static str,
    },
    /// A field asks for something that this version does not know and that must not be ignored.
    #[error("{0} is of a kind that this version does not know")]
    Unsupported(&'static str),
}

/// A signature does not fit key and bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the signature is not valid")]
pub struct BadSignature;
