//! Signatures: Ed25519 over a domain and bytes.
//!
//! The domain says what kind of statement is signed, and is part of what is signed: a signature of one kind can never be
//! shown as one of another. Verification is strict (RFC 8032 without the cofactor's slack), so that nobody can make a
//! second valid signature of another's statement, nor use a key of small order.

use std::fmt;

use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};

use super::error::BadSignature;
use super::id::{MeshId, NodeId};

/// Length of a signature.
pub const SIGNATURE_BYTES: usize = 64;

/// A node's secret key. It is the key of the node's QUIC endpoint too. Overwritten when dropped; never shown.
#[derive(Clone)]
pub struct NodeKey(SigningKey);

/// The secret key of a private mesh, which its owner holds: signs certificates and revocations.
#[derive(Clone)]
pub struct MeshKey(SigningKey);

macro_rules! key {
    ($key:ident, $id:ident, $id_of:ident, $what:literal) => {
        impl $key {
            /// From the 32 secret bytes, which must be random.
            pub fn from_bytes(secret: &[u8; 32]) -> Self {
                $key(SigningKey::from_bytes(secret))
            }

            /// The 32 secret bytes: to be stored, never shown or sent.
            pub fn to_bytes(&self) -> [u8; 32] {
                self.0.to_bytes()
            }

            #[doc = concat!("The id of the ", $what, " that holds this key.")]
            pub fn $id_of(&self) -> $id {
                $id::from_bytes(self.0.verifying_key().to_bytes())
            }

            /// Signs `bytes` as a statement of the kind `domain`.
            pub fn sign(&self, domain: &str, bytes: &[u8]) -> [u8; SIGNATURE_BYTES] {
                self.0.sign(&statement(domain, bytes)).to_bytes()
            }
        }

        impl fmt::Debug for $key {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($key), "(of {}, hidden)"), self.$id_of())
            }
        }

        impl $id {
            #[doc = concat!("Checks that the ", $what, " signed `bytes` as a statement of the kind `domain`.")]
            pub fn verify(
                &self,
                domain: &str,
                bytes: &[u8],
                signature: &[u8; SIGNATURE_BYTES],
            ) -> Result<(), BadSignature> {
                verify(self.as_bytes(), domain, bytes, signature)
            }
        }
    };
}

key!(NodeKey, NodeId, node_id, "node");
key!(MeshKey, MeshId, mesh_id, "private mesh");

/// What is really signed. The length in front makes (domain, bytes) unambiguous.
fn statement(domain: &str, bytes: &[u8]) -> Vec<u8> {
    let mut statement = Vec::with_capacity(8 + domain.len() + bytes.len());
    statement.extend_from_slice(&(domain.len() as u64).to_le_bytes());
    statement.extend_from_slice(domain.as_bytes());
    statement.extend_from_slice(bytes);
    statement
}

fn verify(key: &[u8; 32], domain: &str, bytes: &[u8], signature: &[u8; SIGNATURE_BYTES]) -> Result<(), BadSignature> {
    let key = VerifyingKey::from_bytes(key).map_err(|_| BadSignature)?;
    key.verify_strict(&statement(domain, bytes), &Signature::from_bytes(signature)).map_err(|_| BadSignature)
}

/// A signature and the bytes it is over, as they travel: signature first. What was received is what is verified.
pub(super) fn sealed(signature: [u8; SIGNATURE_BYTES], body: &[u8]) -> Vec<u8> {
    [signature.as_slice(), body].concat()
}

/// The parts of [`sealed`] bytes.
pub(super) fn parts(sealed: &[u8]) -> Result<(&[u8; SIGNATURE_BYTES], &[u8]), BadSignature> {
    sealed.split_first_chunk().ok_or(BadSignature)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_signature_holds_for_its_key_domain_and_bytes_only(
            secret: [u8; 32],
            other: [u8; 32],
            bytes in proptest::collection::vec(any::<u8>(), 1..100),
            flip in any::<proptest::sample::Index>(),
            bit in 0u8..8,
        ) {
            prop_assume!(secret != other);
            let key = NodeKey::from_bytes(&secret);
            let signature = key.sign("a", &bytes);
            let id = key.node_id();
            prop_assert_eq!(id.verify("a", &bytes, &signature), Ok(()));
            prop_assert!(id.verify("b", &bytes, &signature).is_err());
            prop_assert!(NodeKey::from_bytes(&other).node_id().verify("a", &bytes, &signature).is_err());
            let mut damaged = bytes.clone();
            damaged[flip.index(bytes.len())] ^= 1 << bit;
            prop_assert!(id.verify("a", &damaged, &signature).is_err());
            let mut damaged = signature;
            damaged[flip.index(SIGNATURE_BYTES)] ^= 1 << bit;
            prop_assert!(id.verify("a", &bytes, &damaged).is_err());
        }

        #[test]
        fn arbitrary_keys_and_signatures_never_panic(id: [u8; 32], low: [u8; 32], high: [u8; 32]) {
            let mut signature = [0; SIGNATURE_BYTES];
            signature[..32].copy_from_slice(&low);
            signature[32..].copy_from_slice(&high);
            prop_assert!(NodeId::from_bytes(id).verify("a", b"x", &signature).is_err());
        }
    }

    #[test]
    fn moving_a_byte_from_domain_to_bytes_gives_another_statement() {
        assert_ne!(statement("ab", b"c"), statement("a", b"bc"));
    }

    #[test]
    fn keys_of_small_order_verify_nothing() {
        // The identity point: with it, R = identity and s = 0 would "sign" anything without strict verification.
        let mut identity = [0; 32];
        identity[0] = 1;
        let mut signature = [0; SIGNATURE_BYTES];
        signature[0] = 1;
        assert_eq!(NodeId::from_bytes(identity).verify("a", b"x", &signature), Err(BadSignature));
    }

    #[test]
    fn a_key_hides_its_secret() {
        let key = MeshKey::from_bytes(&[0xab; 32]);
        assert!(!format!("{key:?}").contains("abab"));
        assert!(format!("{key:?}").contains(&key.mesh_id().to_string()));
        assert_eq!(MeshKey::from_bytes(&key.to_bytes()).mesh_id(), key.mesh_id());
    }
}
