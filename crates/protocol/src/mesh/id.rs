//! Names of nodes, meshes and models: 32 bytes each, written as 64 lower-case hex digits.

use std::fmt;
use std::str::FromStr;

use data_encoding::HEXLOWER_PERMISSIVE;
use serde::{Deserialize, Serialize};

use super::secret::MeshSecret;

/// Hex digits of [`NodeId::short`] and its likes: enough to tell the members of any mesh apart at a glance.
pub const SHORT_DIGITS: usize = 10;

/// Text that is not an id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a valid {what}: {digits} hex digits are expected")]
pub struct IdError {
    what: &'static str,
    digits: usize,
}

/// A `Copy` newtype over bytes that is shown as hex and serialised as that text.
macro_rules! hex_id {
    ($(#[$doc:meta])* $name:ident, $bytes:literal, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name([u8; $bytes]);

        impl $name {
            /// From its bytes.
            pub const fn from_bytes(bytes: [u8; $bytes]) -> Self {
                $name(bytes)
            }

            /// Its bytes.
            pub const fn as_bytes(&self) -> &[u8; $bytes] {
                &self.0
            }

            /// The first [`SHORT_DIGITS`] hex digits, for logs and tables.
            pub fn short(&self) -> String {
                let mut digits = self.to_string();
                digits.truncate(SHORT_DIGITS);
                digits
            }
        }

        impl From<[u8; $bytes]> for $name {
            fn from(bytes: [u8; $bytes]) -> Self {
                $name(bytes)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&HEXLOWER_PERMISSIVE.encode(&self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                let bytes = HEXLOWER_PERMISSIVE.decode(text.as_bytes()).ok();
                let bytes = bytes.and_then(|bytes| <[u8; $bytes]>::try_from(bytes).ok());
                bytes.map($name).ok_or(IdError { what: $what, digits: 2 * $bytes })
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;

            fn try_from(text: String) -> Result<Self, IdError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.to_string()
            }
        }
    };
}

hex_id! {
    /// A node: its Ed25519 public key, which QUIC's handshake proves. Any 32 bytes can stand here; those that are no key
    /// verify no signature.
    NodeId, 32, "node id"
}

hex_id! {
    /// A mesh: of a public one a hash of its name, of a private one the Ed25519 public key whose secret its owner holds.
    MeshId, 32, "mesh id"
}

hex_id! {
    /// A model: the manifest's BLAKE3 root of its file.
    ModelDigest, 32, "model digest"
}

hex_id! {
    /// The manifest of a model's file: what its parts are and where they lie (`murmur_gguf::Manifest::own_digest`).
    ManifestDigest, 32, "manifest digest"
}

hex_id! {
    /// What a driver needs of a model it does not hold: BLAKE3 of a GGUF file with the model's metadata (vocabulary and
    /// chat template) and no tensors. Equal digests: equal tokens for equal text.
    TokenizerDigest, 32, "tokenizer digest"
}

hex_id! {
    /// A vocabulary: the beginning of the BLAKE3 of its tokens in their order. Where it is the same, a token number means the same, so that
    /// one model can guess what another will say. A false one leads to wrong guesses, which cost time and nothing else.
    VocabularyId, 8, "vocabulary id"
}

hex_id! {
    /// A ticket, for its issuer's account of uses and revocations. Random.
    TicketId, 16, "ticket id"
}

hex_id! {
    /// One request of one driver, in both ends' logs. Random; the same when the request moves to another worker.
    RequestId, 16, "request id"
}

hex_id! {
    /// One driver's ring, at the hosts of its stages. Random, so that only those whom the driver told can name it.
    RingId, 16, "ring id"
}

const PUBLIC_MESH_CONTEXT: &str = "murmur 2026-11 public mesh id";
const TOPIC_CONTEXT: &str = "murmur 2026-11 gossip topic";

impl MeshId {
    /// The public mesh of this name. Names are compared byte for byte.
    pub fn public(name: &str) -> MeshId {
        MeshId(blake3::derive_key(PUBLIC_MESH_CONTEXT, name.as_bytes()))
    }

    /// The gossip topic of the mesh. Of a private mesh it depends on the mesh's secret, so that strangers cannot listen.
    pub fn topic(&self, secret: Option<&MeshSecret>) -> [u8; 32] {
        let mut material = self.0.to_vec();
        material.extend_from_slice(secret.map_or(&[], |secret| secret.as_bytes().as_slice()));
        blake3::derive_key(TOPIC_CONTEXT, &material)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_read_back_from_its_text_in_either_case() {
        let id = NodeId::from_bytes(std::array::from_fn(|i| (i * 7 + 0xa0) as u8));
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!(id.to_string().to_uppercase().parse(), Ok(id));
        assert_eq!(id.short().len(), SHORT_DIGITS);
        assert!(id.to_string().starts_with(&id.short()));
        assert_eq!(postcard::to_stdvec(&id), postcard::to_stdvec(&id.to_string()));
        assert_eq!(postcard::from_bytes(&postcard::to_stdvec(&id).unwrap()), Ok(id));
    }

    #[test]
    fn text_of_another_length_or_alphabet_is_refused() {
        for text in ["", "00", &"0".repeat(63), &"0".repeat(65), &"0".repeat(66), &"g".repeat(64), &"é".repeat(32)] {
            assert!(text.parse::<MeshId>().is_err(), "{text}");
        }
        let message = "x".parse::<TicketId>().unwrap_err().to_string();
        assert_eq!(message, "not a valid ticket id: 32 hex digits are expected");
    }

    #[test]
    fn topics_differ_by_mesh_and_by_secret() {
        let (a, b) = (MeshId::public("a"), MeshId::public("b"));
        let secret = MeshSecret::from_bytes([1; 32]);
        let topics = [a.topic(None), b.topic(None), a.topic(Some(&secret)), b.topic(Some(&secret)), *a.as_bytes()];
        for (i, topic) in topics.iter().enumerate() {
            assert!(!topics[..i].contains(topic));
        }
    }
}
