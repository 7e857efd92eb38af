//! Signed manifests: who says what a model's file is.
//!
//! A file is its digest, and from its bytes follows its manifest. What does not follow from them is who stands for it, under which
//! licence, and where it comes from. So whoever makes a file, or vouches for it, signs that with the key of a node. It says nothing of
//! who sent the file, and stays true wherever both of them go.
//!
//! ```text
//! taker                        holder
//!   GetAttestations   ->
//!                     <-   Attestations
//! ```
//!
//! A holder may leave out what it likes, and may hand on what anybody has signed. So whoever takes them verifies each, and asks several
//! when one particular signature is wanted. Only nodes with [`Capabilities::ATTESTATIONS`](super::Capabilities::ATTESTATIONS) are asked.

use std::fmt;
use std::sync::Arc;

use super::body::Body;
use super::check;
use super::content::{FILE_BYTES_MAX, SOURCE_BYTES_MAX};
use super::error::{BadSignature, MessageError};
use super::id::{ManifestDigest, ModelDigest, NodeId};
use super::key::{self, NodeKey, SIGNATURE_BYTES};
use super::model::MODEL_NAME_BYTES_MAX;
use super::proto;

/// Longest signed attestation.
pub const ATTESTATION_BYTES_MAX: usize = 1_024;
/// Attestations of one file that are sent, or kept.
pub const ATTESTATIONS_MAX: usize = 16;
/// Length of the name of a licence: a hundred characters of any script.
pub const LICENCE_BYTES_MAX: usize = 400;

/// The kind of statement that is signed.
pub const DOMAIN: &str = "murmur model attestation v1";

/// What is signed of a model's file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attestation {
    /// Who signs.
    pub signer: NodeId,
    /// The file.
    pub model: ModelDigest,
    /// What its manifest is.
    pub manifest: ManifestDigest,
    /// Its length, 1..=[`FILE_BYTES_MAX`].
    pub file_bytes: u64,
    /// What the signer calls the model, 1..=[`MODEL_NAME_BYTES_MAX`] bytes.
    pub name: String,
    /// Under which licence it may be used, as the signer says, 1..=[`LICENCE_BYTES_MAX`] bytes; `None`: it does not say.
    pub licence: Option<String>,
    /// Where it comes from, as the signer says: `hf:owner/repo@commit:file`, 1..=[`SOURCE_BYTES_MAX`] bytes; `None`: it does not say.
    pub source: Option<String>,
    /// When it was signed by the signer's clock, Unix ms. Of two by one signer the later counts.
    pub signed_ms: u64,
}

/// Why an attestation is not believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AttestationError {
    /// It cannot be read, or breaks a limit.
    #[error("{0}")]
    Message(#[from] MessageError),
    /// It is about another file.
    #[error("it is signed for the file {found}, not for {expected}")]
    WrongModel {
        /// The file in question.
        expected: ModelDigest,
        /// The other.
        found: ModelDigest,
    },
    /// Whoever it names did not sign it.
    #[error("it is forged: {0}")]
    BadSignature(#[from] BadSignature),
    /// It was to be signed with another node's key.
    #[error("the key to sign with is not that of node {0}")]
    WrongKey(NodeId),
}

impl Attestation {
    /// Signs it. The key must be the signer's.
    ///
    /// # Errors
    /// [`AttestationError::WrongKey`], and [`AttestationError::Message`] for what nobody would accept.
    pub fn sign(&self, key: &NodeKey) -> Result<SignedAttestation, AttestationError> {
        if key.node_id() != self.signer {
            return Err(AttestationError::WrongKey(self.signer));
        }
        let body = self.encode()?;
        Ok(SignedAttestation(key::sealed(key.sign(DOMAIN, &body), &body).into()))
    }

    fn check(&self) -> Result<(), MessageError> {
        if !(1..=FILE_BYTES_MAX).contains(&self.file_bytes) {
            return Err(MessageError::Invalid { what: "file bytes", why: "a file has from 1 byte to 4 TiB" });
        }
        filled("model name", &self.name, MODEL_NAME_BYTES_MAX)?;
        self.licence.as_ref().map_or(Ok(()), |licence| filled("licence", licence, LICENCE_BYTES_MAX))?;
        self.source.as_ref().map_or(Ok(()), |source| filled("source", source, SOURCE_BYTES_MAX))
    }
}

fn filled(what: &'static str, text: &str, bytes_max: usize) -> Result<(), MessageError> {
    if text.is_empty() {
        return Err(MessageError::Missing(what));
    }
    check::text(what, text, bytes_max)
}

impl Body for Attestation {
    type Proto = proto::Attestation;
    const WHAT: &'static str = "attestation";
    const BYTES_MAX: usize = ATTESTATION_BYTES_MAX - SIGNATURE_BYTES;

    fn to_proto(&self) -> Result<proto::Attestation, MessageError> {
        self.check()?;
        let Self { signer, model, manifest, file_bytes, name, licence, source, signed_ms } = self;
        Ok(proto::Attestation {
            signer: signer.as_bytes().to_vec(),
            model: model.as_bytes().to_vec(),
            manifest: manifest.as_bytes().to_vec(),
            file_bytes: *file_bytes,
            name: name.clone(),
            licence: licence.clone(),
            source: source.clone(),
            signed_ms: *signed_ms,
        })
    }

    fn from_proto(proto: proto::Attestation) -> Result<Attestation, MessageError> {
        let attestation = Attestation {
            signer: NodeId::from_bytes(check::array("signer", &proto.signer)?),
            model: ModelDigest::from_bytes(check::array("model digest", &proto.model)?),
            manifest: ManifestDigest::from_bytes(check::array("manifest digest", &proto.manifest)?),
            file_bytes: proto.file_bytes,
            name: proto.name,
            licence: proto.licence,
            source: proto.source,
            signed_ms: proto.signed_ms,
        };
        attestation.check()?;
        Ok(attestation)
    }
}

/// An attestation as it travels and is stored: 64 bytes of signature, then what is signed. Cheap to clone.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct SignedAttestation(Arc<[u8]>);

impl SignedAttestation {
    /// Takes received bytes; only their number is checked.
    ///
    /// # Errors
    /// For what is longer than any attestation, or shorter than its signature.
    pub fn from_bytes(bytes: impl AsRef<[u8]>) -> Result<SignedAttestation, MessageError> {
        let bytes = bytes.as_ref();
        check::size(Attestation::WHAT, bytes.len(), ATTESTATION_BYTES_MAX)?;
        if bytes.len() <= SIGNATURE_BYTES {
            return Err(MessageError::Invalid { what: Attestation::WHAT, why: "it is shorter than its signature" });
        }
        Ok(SignedAttestation(bytes.into()))
    }

    /// The bytes to send and to store.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// What it says, once it is known to be about this file and signed by whom it names. Whether that is somebody to be believed is for
    /// the user to say.
    ///
    /// # Errors
    /// [`AttestationError`], for what nobody has signed of this file.
    pub fn verify(&self, model: ModelDigest) -> Result<Attestation, AttestationError> {
        let (signature, body) = key::parts(&self.0)?;
        let attestation = Attestation::decode(body)?;
        if attestation.model != model {
            return Err(AttestationError::WrongModel { expected: model, found: attestation.model });
        }
        attestation.signer.verify(DOMAIN, body, signature)?;
        Ok(attestation)
    }
}

impl fmt::Debug for SignedAttestation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SignedAttestation({} bytes)", self.0.len())
    }
}

/// The body of [`Work::GetAttestations`](super::Work::GetAttestations).
pub(super) struct GetAttestations(pub(super) ModelDigest);

impl Body for GetAttestations {
    type Proto = proto::GetAttestations;
    const WHAT: &'static str = "question for attestations";
    const BYTES_MAX: usize = 256;

    fn to_proto(&self) -> Result<proto::GetAttestations, MessageError> {
        Ok(proto::GetAttestations { model: self.0.as_bytes().to_vec() })
    }

    fn from_proto(proto: proto::GetAttestations) -> Result<GetAttestations, MessageError> {
        Ok(GetAttestations(ModelDigest::from_bytes(check::array("model digest", &proto.model)?)))
    }
}

/// The body of [`Work::Attestations`](super::Work::Attestations).
pub(super) struct Attestations(pub(super) Vec<SignedAttestation>);

impl Body for Attestations {
    type Proto = proto::Attestations;
    const WHAT: &'static str = "attestations";
    // Each with its tag and its length.
    const BYTES_MAX: usize = ATTESTATIONS_MAX * (ATTESTATION_BYTES_MAX + 4);

    fn to_proto(&self) -> Result<proto::Attestations, MessageError> {
        check::count(Self::WHAT, self.0.len(), ATTESTATIONS_MAX)?;
        Ok(proto::Attestations { signed: self.0.iter().map(|signed| signed.as_bytes().to_vec()).collect() })
    }

    fn from_proto(proto: proto::Attestations) -> Result<Attestations, MessageError> {
        check::count(Self::WHAT, proto.signed.len(), ATTESTATIONS_MAX)?;
        Ok(Attestations(proto.signed.into_iter().map(SignedAttestation::from_bytes).collect::<Result<_, _>>()?))
    }
}
