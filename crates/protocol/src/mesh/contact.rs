//! A node's contact: how it can be reached, signed by the node, for places that belong to nobody.
//!
//! It stands in events on Nostr relays, where strangers write too. The signature keeps them from sending others to wrong
//! addresses of a node; whether the node is one of the mesh shows when it is dialled.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::error::BadSignature;
use super::id::NodeId;
use super::key::{self, NodeKey};
use super::record::Addresses;

/// The kind of statement that a node signs.
pub const DOMAIN: &str = "murmur published contact v1";

/// The body, as JSON behind its signature.
#[derive(Serialize, Deserialize)]
struct Published {
    node: NodeId,
    #[serde(skip_serializing_if = "Option::is_none")]
    relay: Option<String>,
    direct: Vec<SocketAddr>,
}

/// Why a contact is not believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ContactError {
    /// The body cannot be read.
    #[error("contact: {0}")]
    Body(String),
    /// The node that it is about did not sign it.
    #[error("contact: {0}")]
    BadSignature(#[from] BadSignature),
}

impl From<serde_json::Error> for ContactError {
    fn from(error: serde_json::Error) -> Self {
        ContactError::Body(error.to_string())
    }
}

/// What the node of `key` publishes: it can be reached at `addresses`.
///
/// # Errors
/// [`ContactError::Body`] if the addresses cannot be written.
pub fn seal(addresses: &Addresses, key: &NodeKey) -> Result<Vec<u8>, ContactError> {
    let published = Published { node: key.node_id(), relay: addresses.relay.clone(), direct: addresses.direct.clone() };
    let body = serde_json::to_vec(&published)?;
    Ok(key::sealed(key.sign(DOMAIN, &body), &body))
}

/// The node that has published these bytes, and those of its addresses that can be dialled.
///
/// # Errors
/// [`ContactError`] if it is nothing that a node has signed.
pub fn open(sealed: &[u8]) -> Result<(NodeId, Addresses), ContactError> {
    let (signature, body) = key::parts(sealed)?;
    let published: Published = serde_json::from_slice(body)?;
    published.node.verify(DOMAIN, body, signature)?;
    Ok((published.node, Addresses::publishable(published.relay, published.direct)))
}
