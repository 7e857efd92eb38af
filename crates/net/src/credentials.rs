//! What makes a node a member of a private mesh, as kept in its data folder: `meshes/<mesh id>/`.

use std::fs;
use std::path::{Path, PathBuf};

use data_encoding::HEXLOWER;
use murmur_protocol::mesh::ticket::MESH_NAME_BYTES_MAX;
use murmur_protocol::mesh::{MemberCertificate, MeshId, MeshKey, MeshSecret, NodeId, Role, SignedCertificate};
use serde::{Deserialize, Serialize};

use crate::{NetError, clock, data_dir};

/// How long the certificate counts that the founder of a mesh gives itself.
pub const FOUNDER_VALID_MS: u64 = 10 * 365 * 24 * 3_600_000;

/// How long a certificate counts that is given for a ticket. In its last third the owner's node sends a new one whenever
/// the member is connected to it.
pub const MEMBER_VALID_MS: u64 = 365 * 24 * 3_600_000;

const FILE: &str = "credentials.json";

/// A node's membership in a private mesh.
#[derive(Debug, Clone)]
pub struct Credentials {
    /// The mesh.
    pub mesh: MeshId,
    /// Its name, for people.
    pub name: String,
    /// The mesh's word that this node belongs to it.
    pub certificate: SignedCertificate,
    /// What only members know.
    pub secret: MeshSecret,
    /// The mesh's key, on the node of its owner: with it members are admitted and revoked.
    pub owner: Option<MeshKey>,
}

#[derive(Serialize, Deserialize)]
struct Stored {
    mesh: MeshId,
    name: String,
    certificate: String,
    secret: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    owner_key: Option<String>,
}

impl Credentials {
    /// Founds a private mesh: makes its key and secret, admits the founder, and stores all of it.
    ///
    /// # Errors
    /// [`NetError::Option`] for a name that is empty or too long; [`NetError::File`].
    pub fn found(data_dir: &Path, name: &str, founder: NodeId) -> Result<Credentials, NetError> {
        if name.is_empty() || name.len() > MESH_NAME_BYTES_MAX || name.chars().any(char::is_control) {
            let reason = format!("it must have 1 to {MESH_NAME_BYTES_MAX} bytes and no control characters");
            return Err(NetError::Option { what: "mesh name", reason });
        }
        let owner = MeshKey::from_bytes(&rand::random());
        let certificate = certify(&owner, founder, Role::Worker, FOUNDER_VALID_MS)?;
        let credentials = Credentials {
            mesh: owner.mesh_id(),
            name: name.to_owned(),
            certificate,
            secret: MeshSecret::from_bytes(rand::random()),
            owner: Some(owner),
        };
        credentials.store(data_dir)?;
        Ok(credentials)
    }

    /// Stores them in the data folder, in place of older ones of the same mesh.
    ///
    /// # Errors
    /// [`NetError::File`].
    pub fn store(&self, data_dir: &Path) -> Result<(), NetError> {
        let stored = Stored {
            mesh: self.mesh,
            name: self.name.clone(),
            certificate: HEXLOWER.encode(self.certificate.as_bytes()),
            secret: HEXLOWER.encode(self.secret.as_bytes()),
            owner_key: self.owner.as_ref().map(|key| HEXLOWER.encode(&key.to_bytes())),
        };
        data_dir::replace_json(&folder(data_dir, &self.mesh).join(FILE), &stored)
    }

    /// Those of a mesh; `None` if this node is no member of it.
    ///
    /// # Errors
    /// [`NetError::CorruptFile`], [`NetError::File`].
    pub fn load(data_dir: &Path, mesh: &MeshId) -> Result<Option<Credentials>, NetError> {
        let path = folder(data_dir, mesh).join(FILE);
        let Some(stored) = data_dir::read_json::<Stored>(&path)? else { return Ok(None) };
        let corrupt = |reason: String| NetError::CorruptFile { path: path.clone(), reason };
        let bytes = |what: &str, text: &str| {
            HEXLOWER.decode(text.as_bytes()).map_err(|_| corrupt(format!("{what} is not hexadecimal")))
        };
        let key = |what: &str, text: &str| -> Result<[u8; 32], NetError> {
            bytes(what, text)?.try_into().map_err(|_| corrupt(format!("{what} should have 32 bytes")))
        };
        let certificate = SignedCertificate::from_bytes(bytes("certificate", &stored.certificate)?)
            .map_err(|error| corrupt(error.to_string()))?;
        let owner = stored.owner_key.as_ref().map(|text| key("owner_key", text)).transpose()?;
        Ok(Some(Credentials {
            mesh: stored.mesh,
            name: stored.name,
            certificate,
            secret: MeshSecret::from_bytes(key("secret", &stored.secret)?),
            owner: owner.map(|bytes| MeshKey::from_bytes(&bytes)),
        }))
    }

    /// Those of all private meshes of which this node is a member.
    ///
    /// # Errors
    /// As [`Credentials::load`].
    pub fn all(data_dir: &Path) -> Result<Vec<Credentials>, NetError> {
        let meshes = data_dir.join(FOLDER);
        let Ok(entries) = fs::read_dir(&meshes) else { return Ok(Vec::new()) };
        let mut all = Vec::new();
        for entry in entries {
            let name = entry.map_err(|error| NetError::file(&meshes, error))?.file_name();
            if let Some(mesh) = name.to_str().and_then(|name| name.parse().ok()) {
                all.extend(Credentials::load(data_dir, &mesh)?);
            }
        }
        Ok(all)
    }

    /// Forgets a membership: the certificate, the secret and, on the owner's node, the mesh's key.
    ///
    /// # Errors
    /// [`NetError::File`].
    pub fn forget(data_dir: &Path, mesh: &MeshId) -> Result<(), NetError> {
        let folder = folder(data_dir, mesh);
        match fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(NetError::file(&folder, error)),
            _ => Ok(()),
        }
    }
}

const FOLDER: &str = "meshes";

/// Where everything about a mesh is kept.
pub(crate) fn folder(data_dir: &Path, mesh: &MeshId) -> PathBuf {
    data_dir.join(FOLDER).join(mesh.to_string())
}

/// The mesh's word that `node` belongs to it from now on.
pub(crate) fn certify(owner: &MeshKey, node: NodeId, role: Role, valid_ms: u64) -> Result<SignedCertificate, NetError> {
    let issued_ms = clock::unix_ms();
    let certificate = MemberCertificate {
        mesh: owner.mesh_id(),
        node,
        role,
        serial: rand::random(),
        issued_ms,
        expires_ms: issued_ms.saturating_add(valid_ms),
    };
    certificate.sign(owner).map_err(NetError::protocol)
}

/// Whether a certificate is in the last third of its time, in which the mesh's owner gives its member a new one.
pub(crate) fn is_due(certificate: &MemberCertificate) -> bool {
    let third_ms = certificate.expires_ms.saturating_sub(certificate.issued_ms) / 3;
    clock::unix_ms() >= certificate.expires_ms.saturating_sub(third_ms)
}

/// The same membership for another [`MEMBER_VALID_MS`]. The serial number stays: whoever revokes it means all of them.
pub(crate) fn prolong(owner: &MeshKey, certificate: &MemberCertificate) -> Result<SignedCertificate, NetError> {
    let issued_ms = clock::unix_ms();
    let prolonged =
        MemberCertificate { issued_ms, expires_ms: issued_ms.saturating_add(MEMBER_VALID_MS), ..certificate.clone() };
    prolonged.sign(owner).map_err(NetError::protocol)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_founded_mesh_is_found_again_and_can_be_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let founder = NodeId::from_bytes([1; 32]);
        let founded = Credentials::found(folder.path(), "home", founder).unwrap();
        let loaded = Credentials::load(folder.path(), &founded.mesh).unwrap().unwrap();
        assert_eq!((loaded.mesh, &loaded.name, &loaded.secret), (founded.mesh, &founded.name, &founded.secret));
        assert_eq!(loaded.owner.unwrap().mesh_id(), founded.mesh);
        loaded.certificate.verify(founded.mesh, founder, clock::unix_ms()).unwrap();
        assert_eq!(Credentials::all(folder.path()).unwrap().len(), 1);
        Credentials::forget(folder.path(), &founded.mesh).unwrap();
        assert!(Credentials::load(folder.path(), &founded.mesh).unwrap().is_none());
    }

    #[test]
    fn names_that_cannot_stand_in_a_ticket_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["", "a\nb", &"x".repeat(65)] {
            assert!(Credentials::found(folder.path(), name, NodeId::from_bytes([1; 32])).is_err());
        }
    }

    #[test]
    fn damaged_credentials_are_an_error_and_not_a_stranger() {
        let folder = tempfile::tempdir().unwrap();
        let founded = Credentials::found(folder.path(), "home", NodeId::from_bytes([1; 32])).unwrap();
        let path = super::folder(folder.path(), &founded.mesh).join(FILE);
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.replace("\"secret\": \"", "\"secret\": \"zz")).unwrap();
        assert!(matches!(Credentials::load(folder.path(), &founded.mesh), Err(NetError::CorruptFile { .. })));
    }
}
