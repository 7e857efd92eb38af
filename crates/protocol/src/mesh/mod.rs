//! The mesh's messages: what nodes say about themselves, how they let each other in, and how they work for each other.
//!
//! Everything here is bytes in, checked values out, and back; sockets, clocks and randomness are the caller's. Bytes come
//! from strangers, therefore:
//!
//! - every message, list and text has a named limit, and a decoder allocates a small multiple of what has come at most;
//! - what is signed is verified over the bytes as received ([`record`], [`member`], [`ticket`], [`attestation`]), with a domain per kind of
//!   statement ([`key`]);
//! - ids, addresses and numbers are checked once, on the way in: a value of these types is a valid one. Encoding applies
//!   the same rules, so that a node cannot send what others must refuse.
//!
//! Bodies are protobuf (`proto/murmur/v1`), so that other versions and languages can join: unknown fields are ignored,
//! unknown enum values become `Unknown`, unknown kinds of messages are skipped. Only what must not be ignored without
//! changing the outcome, such as an unknown kind of grammar, is an error.
//!
//! Start with [`record`], then [`hello`], [`control`] and [`summary`] (neighbours), [`ticket`] and [`member`] (private meshes), [`work`]
//! and [`open`] (requests), [`ring`] (stages on several machines), [`content`] and [`attestation`] (model files), [`wire`] (all of them on a stream).

pub mod attestation;
mod body;
pub mod card;
mod check;
pub mod contact;
pub mod content;
pub mod control;
pub mod error;
pub mod hello;
pub mod id;
pub mod key;
pub mod measured;
pub mod member;
pub mod model;
pub mod open;
pub mod record;
pub mod ring;
pub mod secret;
pub mod summary;
pub mod ticket;
pub mod wire;
pub mod work;

/// The generated types. They never leave this module: what is public has been checked.
mod proto {
    #![allow(missing_docs, unreachable_pub, clippy::all)]
    include!(concat!(env!("OUT_DIR"), "/murmur.v1.rs"));
}

pub use attestation::{Attestation, AttestationError, SignedAttestation};
pub use card::{CardAssembly, CardError, card_digest};
pub use contact::ContactError;
pub use content::{Content, Fetch, HeldContent, WatchContent};
pub use control::{AgedRecord, Control, Redeem, Redeemed};
pub use error::{BadSignature, MessageError};
pub use hello::{Capabilities, Hello, PROTOCOL_VERSIONS, Refusal, RefusalCode, negotiate};
pub use id::{
    IdError, ManifestDigest, MeshId, ModelDigest, NodeId, RequestId, RingId, TicketId, TokenizerDigest, VocabularyId,
};
pub use key::{MeshKey, NodeKey};
pub use measured::{MachineSpeed, MeasuredLink};
pub use member::{MemberCertificate, MemberError, Revocation, RevocationList, SignedCertificate, SignedRevocations};
pub use model::{GuessOffer, ModelState, ServedModel, ServedStage};
pub use open::Open;
pub use record::{Addresses, Claim, NodeRecord, RECORD_BYTES_MAX, RecordError, Role, SignedRecord};
pub use ring::{DraftOpen, StageOpen};
pub use secret::{BearerSecret, MeshSecret};
pub use summary::{Differing, Ranges, Summary};
pub use ticket::{Admission, SignedTicket, Ticket, TicketError};
pub use wire::{Decoder, Message, encode};
pub use work::{Admitted, Card, Failed, FailureCode, FinishReason, Finished, Prefill, Refused, Tokens, Work};
