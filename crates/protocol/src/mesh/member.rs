//! Membership of private meshes: certificates, and lists of those that count no more.
//!
//! The holder of the mesh's key signs one certificate per member. A node shows it in its greeting; QUIC has proven that
//! the node is who the certificate names. What was signed by mistake, or is regretted, is revoked: by node, or by the
//! certificate's serial number, in one list that the owner signs anew with every addition. The list with the highest
//! version counts, and is kept for ever.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use super::body::Body;
use super::check;
use super::error::{BadSignature, MessageError};
use super::id::{MeshId, NodeId};
use super::key::{self, MeshKey, SIGNATURE_BYTES};
use super::proto;
use super::record::Role;

/// Longest signed certificate.
pub const CERTIFICATE_BYTES_MAX: usize = 256;
/// Revoked nodes in a list, and as many revoked serial numbers.
pub const REVOCATIONS_MAX: usize = 4_096;
/// Longest signed list of revocations.
pub const REVOCATION_LIST_BYTES_MAX: usize = 192 << 10;
/// How far a verifier's wall clock may be ahead without a good certificate being refused.
pub const CLOCK_SKEW_MS_MAX: u64 = 15 * 60_000;

const CERTIFICATE_DOMAIN: &str = "murmur member certificate v1";
const REVOCATIONS_DOMAIN: &str = "murmur revocation list v1";

/// The mesh's word that a node belongs to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberCertificate {
    /// The mesh, whose key signs.
    pub mesh: MeshId,
    /// The member.
    pub node: NodeId,
    /// What the member may be: a [`Role::Client`] may not serve.
    pub role: Role,
    /// Random number to revoke it by.
    pub serial: u64,
    /// When it was signed, Unix ms.
    pub issued_ms: u64,
    /// When it ends, Unix ms; after `issued_ms`.
    pub expires_ms: u64,
}

/// Why a certificate or a list of revocations is not believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MemberError {
    /// It cannot be read, or breaks a limit.
    #[error("{0}")]
    Message(#[from] MessageError),
    /// It is of another mesh.
    #[error("it is for mesh {found}, not for {expected}")]
    WrongMesh {
        /// Our mesh.
        expected: MeshId,
        /// The other.
        found: MeshId,
    },
    /// The certificate is another node's.
    #[error("the certificate is that of node {found}, not of {expected}")]
    WrongNode {
        /// Who shows it.
        expected: NodeId,
        /// Whose it is.
        found: NodeId,
    },
    /// The mesh's key did not sign it.
    #[error("it is not signed by the mesh's key: {0}")]
    BadSignature(#[from] BadSignature),
    /// It has ended, by more than [`CLOCK_SKEW_MS_MAX`] of the own clock.
    #[error("the certificate expired {ago_s} s ago by this machine's clock; ask the mesh's owner for a new one")]
    Expired {
        /// How long ago.
        ago_s: u64,
    },
}

impl MemberCertificate {
    /// Signs the certificate. The key must be the mesh's.
    pub fn sign(&self, key: &MeshKey) -> Result<SignedCertificate, MemberError> {
        same_mesh(key.mesh_id(), self.mesh)?;
        let body = self.encode()?;
        Ok(SignedCertificate(key::sealed(key.sign(CERTIFICATE_DOMAIN, &body), &body).into()))
    }

    fn check(&self) -> Result<(), MessageError> {
        if self.expires_ms <= self.issued_ms {
            return Err(MessageError::Invalid { what: "expires_ms", why: "it must be later than issued_ms" });
        }
        Ok(())
    }
}

impl Body for MemberCertificate {
    type Proto = proto::MemberCertificate;
    const WHAT: &'static str = "member certificate";
    const BYTES_MAX: usize = CERTIFICATE_BYTES_MAX - SIGNATURE_BYTES;

    fn to_proto(&self) -> Result<proto::MemberCertificate, MessageError> {
        self.check()?;
        Ok(proto::MemberCertificate {
            mesh: self.mesh.as_bytes().to_vec(),
            node: self.node.as_bytes().to_vec(),
            role: self.role.to_wire(),
            serial: self.serial,
            issued_ms: self.issued_ms,
            expires_ms: self.expires_ms,
        })
    }

    fn from_proto(proto: proto::MemberCertificate) -> Result<MemberCertificate, MessageError> {
        let certificate = MemberCertificate {
            mesh: MeshId::from_bytes(check::array("mesh", &proto.mesh)?),
            node: NodeId::from_bytes(check::array("node", &proto.node)?),
            role: Role::from_wire(proto.role),
            serial: proto.serial,
            issued_ms: proto.issued_ms,
            expires_ms: proto.expires_ms,
        };
        certificate.check()?;
        Ok(certificate)
    }
}

/// A certificate as it travels and is stored: 64 bytes of signature, then the certificate. Cheap to clone.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct SignedCertificate(Arc<[u8]>);

impl SignedCertificate {
    /// Takes received bytes; only their number is checked.
    pub fn from_bytes(bytes: impl AsRef<[u8]>) -> Result<SignedCertificate, MessageError> {
        sealed_bytes("member certificate", bytes.as_ref(), CERTIFICATE_BYTES_MAX).map(SignedCertificate)
    }

    /// The bytes to send and to store.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The certificate, once it is known to be the mesh's word about `node` and not to have ended at `now_unix_ms`.
    /// Whether it was revoked is for [`RevocationList::revokes`] to say.
    pub fn verify(&self, mesh: MeshId, node: NodeId, now_unix_ms: u64) -> Result<MemberCertificate, MemberError> {
        let (signature, body) = key::parts(&self.0)?;
        let certificate = MemberCertificate::decode(body)?;
        same_mesh(mesh, certificate.mesh)?;
        if certificate.node != node {
            return Err(MemberError::WrongNode { expected: node, found: certificate.node });
        }
        mesh.verify(CERTIFICATE_DOMAIN, body, signature)?;
        let late_ms = now_unix_ms.saturating_sub(certificate.expires_ms);
        if late_ms > CLOCK_SKEW_MS_MAX {
            return Err(MemberError::Expired { ago_s: late_ms / 1000 });
        }
        Ok(certificate)
    }
}

impl fmt::Debug for SignedCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SignedCertificate({} bytes)", self.0.len())
    }
}

/// What is revoked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Revocation {
    /// Every certificate of a node, past and future.
    Node(NodeId),
    /// One certificate, by its serial number.
    Serial(u64),
}

/// Everything a private mesh has revoked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RevocationList {
    /// The mesh, whose key signs.
    pub mesh: MeshId,
    /// Grows with every addition; the highest counts.
    pub version: u64,
    /// Revoked nodes, at most [`REVOCATIONS_MAX`].
    pub nodes: BTreeSet<NodeId>,
    /// Revoked serial numbers, at most [`REVOCATIONS_MAX`].
    pub serials: BTreeSet<u64>,
}

impl RevocationList {
    /// The list of a mesh that has revoked nothing yet.
    pub fn new(mesh: MeshId) -> RevocationList {
        RevocationList { mesh, version: 0, nodes: BTreeSet::new(), serials: BTreeSet::new() }
    }

    /// Adds one, and counts up the version if it is new; says whether it is.
    pub fn add(&mut self, revocation: Revocation) -> bool {
        let new = match revocation {
            Revocation::Node(node) => self.nodes.insert(node),
            Revocation::Serial(serial) => self.serials.insert(serial),
        };
        self.version = self.version.saturating_add(u64::from(new));
        new
    }

    /// True when the certificate counts no more.
    pub fn revokes(&self, certificate: &MemberCertificate) -> bool {
        self.nodes.contains(&certificate.node) || self.serials.contains(&certificate.serial)
    }

    /// Signs the list. The key must be the mesh's.
    pub fn sign(&self, key: &MeshKey) -> Result<SignedRevocations, MemberError> {
        same_mesh(key.mesh_id(), self.mesh)?;
        let body = self.encode()?;
        Ok(SignedRevocations(key::sealed(key.sign(REVOCATIONS_DOMAIN, &body), &body).into()))
    }
}

impl Body for RevocationList {
    type Proto = proto::RevocationList;
    const WHAT: &'static str = "revocation list";
    const BYTES_MAX: usize = REVOCATION_LIST_BYTES_MAX - SIGNATURE_BYTES;

    fn to_proto(&self) -> Result<proto::RevocationList, MessageError> {
        check::count("revoked nodes", self.nodes.len(), REVOCATIONS_MAX)?;
        check::count("revoked serial numbers", self.serials.len(), REVOCATIONS_MAX)?;
        Ok(proto::RevocationList {
            mesh: self.mesh.as_bytes().to_vec(),
            version: self.version,
            nodes: self.nodes.iter().flat_map(|node| *node.as_bytes()).collect(),
            serials: self.serials.iter().copied().collect(),
        })
    }

    fn from_proto(proto: proto::RevocationList) -> Result<RevocationList, MessageError> {
        check::count("revoked serial numbers", proto.serials.len(), REVOCATIONS_MAX)?;
        Ok(RevocationList {
            mesh: MeshId::from_bytes(check::array("mesh", &proto.mesh)?),
            version: proto.version,
            nodes: check::ids("revoked nodes", &proto.nodes, REVOCATIONS_MAX)?.collect(),
            serials: proto.serials.into_iter().collect(),
        })
    }
}

/// A list of revocations as it travels and is stored. Cheap to clone.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct SignedRevocations(Arc<[u8]>);

impl SignedRevocations {
    /// Takes received bytes; only their number is checked.
    pub fn from_bytes(bytes: impl AsRef<[u8]>) -> Result<SignedRevocations, MessageError> {
        sealed_bytes("revocation list", bytes.as_ref(), REVOCATION_LIST_BYTES_MAX).map(SignedRevocations)
    }

    /// The bytes to send and to store.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The list, once it is known to be the mesh's.
    pub fn verify(&self, mesh: MeshId) -> Result<RevocationList, MemberError> {
        let (signature, body) = key::parts(&self.0)?;
        let list = RevocationList::decode(body)?;
        same_mesh(mesh, list.mesh)?;
        mesh.verify(REVOCATIONS_DOMAIN, body, signature)?;
        Ok(list)
    }
}

impl fmt::Debug for SignedRevocations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SignedRevocations({} bytes)", self.0.len())
    }
}

fn same_mesh(expected: MeshId, found: MeshId) -> Result<(), MemberError> {
    if expected == found { Ok(()) } else { Err(MemberError::WrongMesh { expected, found }) }
}

fn sealed_bytes(what: &'static str, bytes: &[u8], bytes_max: usize) -> Result<Arc<[u8]>, MessageError> {
    check::size(what, bytes.len(), bytes_max)?;
    if bytes.len() <= SIGNATURE_BYTES {
        return Err(MessageError::Invalid { what, why: "it is shorter than its signature" });
    }
    Ok(bytes.into())
}
