//! The list of those that belong to a private mesh no more: kept on disk for ever, and replaced by newer ones of the
//! owner.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use murmur_protocol::mesh::{MemberCertificate, MeshId, MeshKey, Revocation, RevocationList, SignedRevocations};

use crate::{NetError, credentials, data_dir};

const FILE: &str = "revocations";

/// The newest list that is known here.
#[derive(Debug)]
pub(crate) struct Revocations {
    mesh: MeshId,
    path: PathBuf,
    newest: Mutex<Option<(RevocationList, SignedRevocations)>>,
}

impl Revocations {
    /// The stored list, if there is one.
    pub(crate) fn load(data_dir: &Path, mesh: MeshId) -> Result<Self, NetError> {
        let path = credentials::folder(data_dir, &mesh).join(FILE);
        let newest = match data_dir::read(&path)? {
            None => None,
            Some(bytes) => {
                let corrupt = |reason: String| NetError::CorruptFile { path: path.clone(), reason };
                let signed = SignedRevocations::from_bytes(bytes).map_err(|error| corrupt(error.to_string()))?;
                let list = signed.verify(mesh).map_err(|error| corrupt(error.to_string()))?;
                Some((list, signed))
            }
        };
        Ok(Revocations { mesh, path, newest: Mutex::new(newest) })
    }

    fn newest(&self) -> MutexGuard<'_, Option<(RevocationList, SignedRevocations)>> {
        self.newest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a certificate counts no more.
    pub(crate) fn revokes(&self, certificate: &MemberCertificate) -> bool {
        self.newest().as_ref().is_some_and(|(list, _)| list.revokes(certificate))
    }

    /// The list to hand on.
    pub(crate) fn signed(&self) -> Option<SignedRevocations> {
        self.newest().as_ref().map(|(_, signed)| signed.clone())
    }

    /// Takes a list from a peer. True if it is newer than the one known before.
    ///
    /// # Errors
    /// [`NetError::Protocol`] if the mesh's owner did not sign it; [`NetError::File`].
    pub(crate) fn offer(&self, signed: SignedRevocations) -> Result<bool, NetError> {
        let list = signed.verify(self.mesh).map_err(NetError::protocol)?;
        self.replace(&mut self.newest(), list, signed)
    }

    /// Revokes; the mesh's key signs. False if it was revoked before.
    pub(crate) fn add(&self, revocation: Revocation, owner: &MeshKey) -> Result<bool, NetError> {
        // Held until it is written: of two at the same moment both count.
        let mut newest = self.newest();
        let known = newest.as_ref().map(|(list, _)| list.clone());
        let mut list = known.unwrap_or_else(|| RevocationList::new(self.mesh));
        if !list.add(revocation) {
            return Ok(false);
        }
        let signed = list.sign(owner).map_err(NetError::protocol)?;
        self.replace(&mut newest, list, signed)
    }

    fn replace(
        &self,
        newest: &mut Option<(RevocationList, SignedRevocations)>,
        list: RevocationList,
        signed: SignedRevocations,
    ) -> Result<bool, NetError> {
        if newest.as_ref().is_some_and(|(known, _)| known.version >= list.version) {
            return Ok(false);
        }
        // On disk before it counts: a restart must not readmit anybody.
        data_dir::replace(&self.path, signed.as_bytes())?;
        *newest = Some((list, signed));
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use murmur_protocol::mesh::NodeId;

    use super::*;

    #[test]
    fn what_was_revoked_stays_revoked_after_a_restart_and_older_lists_change_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let owner = MeshKey::from_bytes(&[5; 32]);
        let mesh = owner.mesh_id();
        let revocations = Revocations::load(folder.path(), mesh).unwrap();
        assert!(revocations.add(Revocation::Node(NodeId::from_bytes([1; 32])), &owner).unwrap());
        let older = revocations.signed().unwrap();
        assert!(revocations.add(Revocation::Serial(7), &owner).unwrap());
        assert!(!revocations.add(Revocation::Serial(7), &owner).unwrap());
        assert!(!revocations.offer(older).unwrap());

        let restarted = Revocations::load(folder.path(), mesh).unwrap();
        assert_eq!(restarted.signed(), revocations.signed());
    }

    #[test]
    fn of_revocations_at_the_same_moment_none_is_lost() {
        const EACH: u8 = 50;
        let folder = tempfile::tempdir().unwrap();
        let owner = MeshKey::from_bytes(&[5; 32]);
        let revocations = Revocations::load(folder.path(), owner.mesh_id()).unwrap();
        std::thread::scope(|scope| {
            for first in [0, EACH] {
                let (revocations, owner) = (&revocations, &owner);
                scope.spawn(move || {
                    for number in first..first + EACH {
                        let node = NodeId::from_bytes([number; 32]);
                        assert!(revocations.add(Revocation::Node(node), owner).unwrap());
                    }
                });
            }
        });
        let list = revocations.signed().unwrap().verify(owner.mesh_id()).unwrap();
        assert_eq!((list.version, list.nodes.len()), (u64::from(2 * EACH), usize::from(2 * EACH)));
    }

    #[test]
    fn a_list_that_the_owner_did_not_sign_is_not_taken() {
        let folder = tempfile::tempdir().unwrap();
        let mesh = MeshKey::from_bytes(&[5; 32]).mesh_id();
        let other = MeshKey::from_bytes(&[6; 32]);
        let mut list = RevocationList::new(other.mesh_id());
        list.add(Revocation::Serial(1));
        let revocations = Revocations::load(folder.path(), mesh).unwrap();
        assert!(revocations.offer(list.sign(&other).unwrap()).is_err());
        assert!(revocations.signed().is_none());
    }
}
