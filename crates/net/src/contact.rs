//! How a node can be reached, as found by any kind of discovery.
//!
//! A contact is a hint and nothing else: whoever is dialled has to prove its id in QUIC's handshake and its membership
//! in the greeting, so a wrong contact costs one failed attempt.

use iroh::{EndpointAddr, EndpointId, RelayUrl, TransportAddr};
use murmur_protocol::mesh::{Addresses, NodeId};

use crate::NetError;

/// Direct addresses that are kept and tried of one node, at most.
pub const DIRECT_ADDRESSES_MAX: usize = 16;

/// A node and where it may be found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contact {
    /// The node.
    pub node: NodeId,
    /// Its relay and socket addresses, as somebody said.
    pub addresses: Addresses,
}

impl Contact {
    /// What the endpoint dials. Addresses that are not understood are left out.
    ///
    /// # Errors
    /// [`NetError::Unreachable`] if the node's id is no Ed25519 key, so that nobody can answer to it.
    pub(crate) fn to_endpoint_addr(&self) -> Result<EndpointAddr, NetError> {
        let mut addr = EndpointAddr::new(endpoint_id(self.node)?);
        if let Some(relay) = self.addresses.relay.as_ref().and_then(|relay| relay.parse::<RelayUrl>().ok()) {
            addr = addr.with_relay_url(relay);
        }
        for direct in self.addresses.direct.iter().take(DIRECT_ADDRESSES_MAX) {
            addr = addr.with_ip_addr(*direct);
        }
        Ok(addr)
    }

    /// What discovery through iroh found.
    pub(crate) fn from_transport_addrs<'a>(
        id: EndpointId,
        addrs: impl IntoIterator<Item = &'a TransportAddr>,
    ) -> Contact {
        let mut addresses = Addresses { relay: None, direct: Vec::new() };
        for addr in addrs {
            match addr {
                TransportAddr::Relay(url) => addresses.relay = Some(url.to_string()),
                TransportAddr::Ip(ip) if addresses.direct.len() < DIRECT_ADDRESSES_MAX => addresses.direct.push(*ip),
                _ => {}
            }
        }
        Contact { node: node_id(id), addresses }
    }
}

/// The QUIC identity of a node.
pub(crate) fn endpoint_id(node: NodeId) -> Result<EndpointId, NetError> {
    EndpointId::from_bytes(node.as_bytes()).map_err(|_| NetError::unreachable(node, "its id is no public key"))
}

/// The node of a QUIC identity.
pub(crate) fn node_id(id: EndpointId) -> NodeId {
    NodeId::from_bytes(*id.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node() -> NodeId {
        node_id(iroh::SecretKey::from_bytes(&[3; 32]).public())
    }

    #[test]
    fn a_contact_is_the_same_after_going_through_the_endpoint() {
        let contact = Contact {
            node: node(),
            addresses: Addresses {
                relay: Some("https://relay.example/".into()),
                direct: vec!["192.0.2.1:7".parse().unwrap(), "[2001:db8::1]:8".parse().unwrap()],
            },
        };
        let addr = contact.to_endpoint_addr().unwrap();
        assert_eq!(Contact::from_transport_addrs(addr.id, &addr.addrs), contact);
    }

    #[test]
    fn addresses_beyond_the_limit_and_relays_that_are_no_url_are_left_out() {
        let direct = (1..100).map(|port| ([192, 0, 2, 1], port).into()).collect();
        let contact = Contact { node: node(), addresses: Addresses { relay: Some("not a url".into()), direct } };
        let addr = contact.to_endpoint_addr().unwrap();
        assert_eq!(addr.relay_urls().count(), 0);
        assert_eq!(addr.ip_addrs().count(), DIRECT_ADDRESSES_MAX);
    }

    #[test]
    fn an_id_that_is_no_key_cannot_be_dialled() {
        let id = (0..=255).map(|byte| NodeId::from_bytes([byte; 32])).find(|id| endpoint_id(*id).is_err());
        let contact = Contact { node: id.unwrap(), addresses: Addresses { relay: None, direct: Vec::new() } };
        assert!(contact.to_endpoint_addr().is_err());
    }
}
