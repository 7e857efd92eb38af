//! Under which names a mesh is looked for in public places.
//!
//! Of a public mesh anybody can work them out: that is how it is found. Those of a private mesh depend on its secret,
//! and so does the key under which its members publish how they can be reached. Strangers see that some mesh exists,
//! how many nodes publish, and from which addresses they talk to a relay; neither which mesh, nor which nodes, nor
//! where they are.

use murmur_protocol::mesh::{MeshId, MeshSecret, NodeId};

const NAME_CONTEXT: &str = "murmur 2026-11 beacon of a mesh";
const NODE_CONTEXT: &str = "murmur 2026-11 beacon of a node";

/// The names, and the key, of one mesh.
#[derive(Debug, Clone)]
pub(crate) struct Beacon {
    name: [u8; 32],
    secret: Option<(MeshId, MeshSecret)>,
}

impl Beacon {
    /// The beacon of a mesh; `secret` of a private one.
    pub(crate) fn new(mesh: MeshId, secret: Option<&MeshSecret>) -> Self {
        let mut material = mesh.as_bytes().to_vec();
        material.extend_from_slice(secret.map_or(&[], |secret| secret.as_bytes().as_slice()));
        let name = blake3::derive_key(NAME_CONTEXT, &material);
        Beacon { name, secret: secret.map(|secret| (mesh, secret.clone())) }
    }

    /// Name of the mesh in tags of Nostr events: 64 hex digits.
    pub(crate) fn tag(&self) -> String {
        data_encoding::HEXLOWER.encode(&self.name)
    }

    /// Name of one node in tags of Nostr events: 64 hex digits. The node's id in a public mesh.
    pub(crate) fn node_tag(&self, node: NodeId) -> String {
        match &self.secret {
            None => node.to_string(),
            Some(_) => {
                let material = [self.name.as_slice(), node.as_bytes()].concat();
                data_encoding::HEXLOWER.encode(&blake3::derive_key(NODE_CONTEXT, &material))
            }
        }
    }

    /// Name of the mesh's service in multicast DNS: 15 characters are allowed.
    pub(crate) fn service_name(&self) -> String {
        let mut digits = self.tag();
        digits.truncate(8);
        format!("murmur-{digits}")
    }

    /// The key of what members publish; `None` in a public mesh.
    pub(crate) fn key(&self) -> Option<[u8; 32]> {
        self.secret.as_ref().map(|(mesh, secret)| secret.publishing_key(mesh))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_a_private_mesh_cannot_be_worked_out_without_its_secret() {
        let mesh = MeshId::public("x");
        let node = NodeId::from_bytes([1; 32]);
        let open = Beacon::new(mesh, None);
        let closed = Beacon::new(mesh, Some(&MeshSecret::from_bytes([2; 32])));
        let other = Beacon::new(mesh, Some(&MeshSecret::from_bytes([3; 32])));
        assert_ne!(open.tag(), closed.tag());
        assert_ne!(closed.tag(), other.tag());
        assert_eq!(open.node_tag(node), node.to_string());
        assert_ne!(closed.node_tag(node), node.to_string());
        assert_ne!(closed.node_tag(node), other.node_tag(node));
        assert!(open.key().is_none() && closed.key().is_some());
    }

    #[test]
    fn a_service_name_keeps_to_the_limit_of_dns_service_discovery() {
        let name = Beacon::new(MeshId::public("x"), None).service_name();
        assert!(name.len() <= 15 && name.is_ascii(), "{name}");
    }
}
