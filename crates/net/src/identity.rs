//! Who this node is, and of which mesh: what the greeting and the records are made from.

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use murmur_protocol::mesh::member::CLOCK_SKEW_MS_MAX;
use murmur_protocol::mesh::{
    Capabilities, Hello, MemberCertificate, MemberError, MeshId, NodeId, NodeKey, NodeRecord, PROTOCOL_VERSIONS,
    Redeemed, Refusal, RefusalCode, Role, SignedCertificate, negotiate,
};

use crate::credentials::{self, Credentials};
use crate::revocations::Revocations;
use crate::ticket::Tickets;
use crate::{NetError, clock};

/// A node in one mesh.
#[derive(Debug)]
pub(crate) struct Identity {
    pub key: NodeKey,
    pub node: NodeId,
    pub mesh: MeshId,
    pub mesh_name: String,
    pub software: String,
    /// Versions of the protocol that it speaks.
    pub versions: RangeInclusive<u32>,
    pub private: Option<Private>,
}

/// What goes with a private mesh.
#[derive(Debug)]
pub(crate) struct Private {
    /// As they were at the start.
    pub credentials: Credentials,
    pub revocations: Revocations,
    pub tickets: Tickets,
    /// The certificate in force.
    certificate: Mutex<SignedCertificate>,
    data_dir: PathBuf,
}

impl Private {
    fn certificate(&self) -> MutexGuard<'_, SignedCertificate> {
        self.certificate.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a greeting said, once it was accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Greeted {
    /// The protocol's version for this connection.
    pub version: u32,
    pub software: String,
    pub capabilities: Capabilities,
    /// How far the peer's wall clock is ahead of ours, in milliseconds, the way of the message included.
    pub clock_ahead_ms: i64,
    /// Private meshes.
    pub certificate: Option<MemberCertificate>,
}

impl Identity {
    /// In a public mesh.
    pub(crate) fn public(key: NodeKey, name: &str, software: &str) -> Self {
        let (mesh, node) = (MeshId::public(name), key.node_id());
        Identity {
            key,
            node,
            mesh,
            mesh_name: name.to_owned(),
            software: software.to_owned(),
            versions: PROTOCOL_VERSIONS,
            private: None,
        }
    }

    /// In a private mesh, with what the data folder holds about it.
    pub(crate) fn private(
        key: NodeKey,
        credentials: Credentials,
        software: &str,
        data_dir: &Path,
    ) -> Result<Self, NetError> {
        let revocations = Revocations::load(data_dir, credentials.mesh)?;
        let tickets = Tickets::load(data_dir, &credentials.mesh)?;
        Ok(Identity {
            node: key.node_id(),
            key,
            mesh: credentials.mesh,
            mesh_name: credentials.name.clone(),
            software: software.to_owned(),
            versions: PROTOCOL_VERSIONS,
            private: Some(Private {
                certificate: Mutex::new(credentials.certificate.clone()),
                data_dir: data_dir.to_owned(),
                credentials,
                revocations,
                tickets,
            }),
        })
    }

    /// The own certificate; private meshes.
    pub(crate) fn certificate(&self) -> Option<SignedCertificate> {
        self.private.as_ref().map(|private| private.certificate().clone())
    }

    /// The owner's part in prolonging a membership: what to send to a member that was greeted with a certificate in the
    /// last third of its time.
    pub(crate) fn prolonged(&self, greeted: &Greeted) -> Option<Redeemed> {
        let private = self.private.as_ref()?;
        let owner = private.credentials.owner.as_ref()?;
        let due = greeted.certificate.as_ref().filter(|certificate| credentials::is_due(certificate))?;
        if !self.is_member(greeted) {
            return None;
        }
        match credentials::prolong(owner, due) {
            Ok(certificate) => Some(Redeemed {
                certificate,
                mesh_secret: private.credentials.secret.clone(),
                mesh_name: private.credentials.name.clone(),
            }),
            Err(error) => {
                tracing::error!(%error, "a membership cannot be prolonged");
                None
            }
        }
    }

    /// The member's part: takes a certificate, whoever brings it, if it is the mesh's word and lasts longer than the one in
    /// force. On disk before it counts. True if it was taken.
    pub(crate) fn prolong(&self, signed: SignedCertificate) -> Result<bool, NetError> {
        let Some(private) = &self.private else { return Ok(false) };
        let offered = signed.verify(self.mesh, self.node, clock::unix_ms()).map_err(NetError::protocol)?;
        let mut held = private.certificate();
        // At time 0 nothing has expired.
        let until_ms = held.verify(self.mesh, self.node, 0).map_or(0, |certificate| certificate.expires_ms);
        if offered.expires_ms <= until_ms {
            return Ok(false);
        }
        let credentials = Credentials { certificate: signed.clone(), ..private.credentials.clone() };
        credentials.store(&private.data_dir)?;
        *held = signed;
        Ok(true)
    }

    /// The own greeting.
    pub(crate) fn hello(&self, capabilities: Capabilities) -> Hello {
        Hello {
            versions: self.versions.clone(),
            software: self.software.clone(),
            capabilities,
            mesh: self.mesh,
            certificate: self.certificate(),
            wall_clock_ms: clock::unix_ms(),
        }
    }

    /// Decides about a greeting of `peer`, whom QUIC has proven to be that node.
    pub(crate) fn judge(&self, hello: &Hello, peer: NodeId) -> Result<Greeted, Refusal> {
        let version = negotiate(&self.versions, &hello.versions)?;
        if hello.mesh != self.mesh {
            return Err(Refusal::new(RefusalCode::WrongMesh, "this node belongs to another mesh"));
        }
        let certificate = self.member(hello.certificate.as_ref(), peer)?;
        let ahead_ms = i128::from(hello.wall_clock_ms) - i128::from(clock::unix_ms());
        Ok(Greeted {
            version,
            software: hello.software.clone(),
            capabilities: hello.capabilities,
            clock_ahead_ms: i64::try_from(ahead_ms).unwrap_or(i64::MAX),
            certificate,
        })
    }

    /// Decides whether `node` is a member: in a public mesh everybody is.
    pub(crate) fn member(
        &self,
        certificate: Option<&SignedCertificate>,
        node: NodeId,
    ) -> Result<Option<MemberCertificate>, Refusal> {
        let Some(private) = &self.private else { return Ok(None) };
        let Some(signed) = certificate else {
            return Err(Refusal::new(RefusalCode::NoCertificate, "this mesh is private: members only"));
        };
        let certificate = signed.verify(self.mesh, node, clock::unix_ms()).map_err(|error| {
            let code = match error {
                MemberError::Expired { .. } => RefusalCode::CertificateExpired,
                _ => RefusalCode::BadCertificate,
            };
            Refusal::new(code, &error.to_string())
        })?;
        if private.revocations.revokes(&certificate) {
            return Err(Refusal::new(RefusalCode::Revoked, "the membership of this node has been revoked"));
        }
        Ok(Some(certificate))
    }

    /// Whether who was greeted is still a member.
    pub(crate) fn is_member(&self, greeted: &Greeted) -> bool {
        let (Some(private), Some(certificate)) = (&self.private, &greeted.certificate) else { return true };
        let tolerated_ms = certificate.expires_ms.saturating_add(CLOCK_SKEW_MS_MAX);
        clock::unix_ms() <= tolerated_ms && !private.revocations.revokes(certificate)
    }

    /// Whether a record, whose signature was checked, is one of a member that may be what it says.
    pub(crate) fn accepts(&self, record: &NodeRecord) -> bool {
        match self.member(record.certificate.as_ref(), record.node) {
            Ok(None) => true,
            Ok(Some(certificate)) => {
                certificate.role == Role::Worker || record.models.is_empty() && record.stages.is_empty()
            }
            Err(_) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use murmur_protocol::mesh::Revocation;

    use super::*;
    use crate::credentials::certify;

    fn key(number: u8) -> NodeKey {
        NodeKey::from_bytes(&[number; 32])
    }

    fn code(result: Result<Greeted, Refusal>) -> RefusalCode {
        result.unwrap_err().code
    }

    #[test]
    fn another_mesh_or_version_is_refused_with_the_reason() {
        let (ours, peer) = (Identity::public(key(1), "x", "murmur/1"), key(2).node_id());
        let theirs = Identity::public(key(2), "y", "murmur/1").hello(Capabilities::NONE);
        assert_eq!(code(ours.judge(&theirs, peer)), RefusalCode::WrongMesh);
        let mut newer = Identity::public(key(2), "x", "murmur/9").hello(Capabilities::NONE);
        ours.judge(&newer, peer).unwrap();
        newer.versions = 7..=9;
        assert_eq!(code(ours.judge(&newer, peer)), RefusalCode::Version);
    }

    #[test]
    fn a_private_mesh_lets_in_members_only_and_each_with_its_own_certificate() {
        let folder = tempfile::tempdir().unwrap();
        let credentials = Credentials::found(folder.path(), "home", key(1).node_id()).unwrap();
        let owner = credentials.owner.clone().unwrap();
        let ours = Identity::private(key(1), credentials.clone(), "murmur/1", folder.path()).unwrap();
        let (member, other) = (key(2).node_id(), key(3).node_id());
        let mut hello = ours.hello(Capabilities::NONE);

        hello.certificate = None;
        assert_eq!(code(ours.judge(&hello, member)), RefusalCode::NoCertificate);
        hello.certificate = Some(certify(&owner, member, Role::Worker, 1_000).unwrap());
        ours.judge(&hello, member).unwrap();
        assert_eq!(code(ours.judge(&hello, other)), RefusalCode::BadCertificate);

        ours.private.as_ref().unwrap().revocations.add(Revocation::Node(member), &owner).unwrap();
        assert_eq!(code(ours.judge(&hello, member)), RefusalCode::Revoked);
    }

    #[test]
    fn a_wall_clock_that_is_off_by_ten_minutes_is_reported_and_does_no_harm() {
        let (ours, peer) = (Identity::public(key(1), "x", "murmur/1"), key(2).node_id());
        for ahead_ms in [600_000, -600_000] {
            let mut hello = Identity::public(key(2), "x", "murmur/1").hello(Capabilities::NONE);
            hello.wall_clock_ms = hello.wall_clock_ms.saturating_add_signed(ahead_ms);
            let greeted = ours.judge(&hello, peer).unwrap();
            assert!((greeted.clock_ahead_ms - ahead_ms).abs() < 60_000, "{greeted:?}");
        }
    }
}
