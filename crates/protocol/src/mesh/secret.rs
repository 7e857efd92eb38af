//! What only members know, and what only the holder of a ticket knows. Neither shows itself in logs, and both are
//! overwritten when dropped.

use std::fmt;

use zeroize::{Zeroize, ZeroizeOnDrop};

use super::id::MeshId;

const PUBLISHING_CONTEXT: &str = "murmur 2026-11 key of published contact parts";

macro_rules! secret {
    ($(#[$doc:meta])* $name:ident, $bytes:literal) => {
        $(#[$doc])*
        #[derive(Clone, Zeroize, ZeroizeOnDrop)]
        pub struct $name([u8; $bytes]);

        impl $name {
            /// From its bytes.
            pub const fn from_bytes(bytes: [u8; $bytes]) -> Self {
                $name(bytes)
            }

            /// Its bytes: to be stored and sent, never shown.
            pub const fn as_bytes(&self) -> &[u8; $bytes] {
                &self.0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(concat!(stringify!($name), "(hidden)"))
            }
        }

        /// Takes the same time wherever the first difference is.
        impl PartialEq for $name {
            fn eq(&self, other: &Self) -> bool {
                blake3::hash(&self.0) == blake3::hash(&other.0)
            }
        }

        impl Eq for $name {}
    };
}

secret! {
    /// What every member of a private mesh holds: keys the gossip topic and what is published about the mesh. It proves
    /// nothing: membership is proven by certificate.
    MeshSecret, 32
}

secret! {
    /// What the bearer of a ticket shows its issuer.
    BearerSecret, 16
}

impl MeshSecret {
    /// The key under which members publish how they can be reached, on relays that strangers read.
    pub fn publishing_key(&self, mesh: &MeshId) -> [u8; 32] {
        let material = [mesh.as_bytes().as_slice(), self.0.as_slice()].concat();
        blake3::derive_key(PUBLISHING_CONTEXT, &material)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_do_not_show_themselves_and_compare_by_value() {
        let secret = MeshSecret::from_bytes([0xab; 32]);
        assert_eq!(format!("{secret:?}"), "MeshSecret(hidden)");
        assert_eq!(format!("{:?}", BearerSecret::from_bytes([0xab; 16])), "BearerSecret(hidden)");
        assert_eq!(secret, secret.clone());
        assert_ne!(secret, MeshSecret::from_bytes([0xac; 32]));
        assert_ne!(secret.publishing_key(&MeshId::public("a")), secret.publishing_key(&MeshId::public("b")));
    }
}
