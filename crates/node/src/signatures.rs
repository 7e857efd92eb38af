//! Signed manifests of models' files: what this machine has signed, and what others have.
//!
//! What is signed lies beside the file in the store ([`Content::change_signatures`]), as it was signed. It is verified whenever it is read,
//! so it does not matter who sent it, nor what the disk has made of it. Nodes hand it on with the file (`contents::signers`).

use std::{
    collections::BTreeSet,
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use murmur_gguf::{GgufError, Manifest};
use murmur_protocol::mesh::{
    Attestation, AttestationError, ManifestDigest, ModelDigest, NodeId, NodeKey, SignedAttestation,
    attestation::ATTESTATIONS_MAX, content::SOURCE_BYTES_MAX, model::MODEL_NAME_BYTES_MAX,
};
use murmur_store::{Content, HubRef, Origin, Resolved, Store, StoreError};
use serde_json::{Value, json};

/// Signers that a message names.
const SHOWN_MAX: usize = 4;

/// Something that was signed of a file, verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attested {
    signed: SignedAttestation,
    says: Attestation,
}

/// Why a model was not signed.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// The file is no model.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// It cannot be read, or what was signed cannot be kept.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What is known of the file cannot be signed.
    #[error("the model cannot be signed: {0}")]
    Attestation(#[from] AttestationError),
}

impl Attested {
    /// Verifies what somebody is said to have signed of a file.
    ///
    /// # Errors
    /// [`AttestationError`], for what nobody has signed of it.
    pub fn verify(signed: SignedAttestation, model: ModelDigest) -> Result<Attested, AttestationError> {
        let says = signed.verify(model)?;
        Ok(Attested { signed, says })
    }

    /// What it says.
    pub fn says(&self) -> &Attestation {
        &self.says
    }

    /// Whether this node's key has signed it.
    pub fn is_by(&self, node: NodeId) -> bool {
        self.says.signer == node
    }

    /// What it says, for programs.
    pub fn view(&self) -> Value {
        let Attestation { signer, manifest, name, licence, source, signed_ms, .. } = &self.says;
        json!({
            "signer": signer.to_string(),
            "manifest": manifest.to_string(),
            "name": name,
            "licence": licence,
            "source": source,
            "signed_unix_s": signed_ms / 1_000,
        })
    }

    pub(crate) fn signed(&self) -> &SignedAttestation {
        &self.signed
    }
}

/// Signs a model of the store, or a file, with the key of this machine's node: its digest, its manifest, and what is known of its licence
/// and source. The file is read through; `progress` is told bytes done and bytes in all. What the same key had signed of it before is
/// replaced.
///
/// # Errors
/// [`SignError`]; nothing is kept then.
pub fn sign(
    store: &Store,
    key: &NodeKey,
    model: &Resolved,
    progress: impl FnMut(u64, u64),
) -> Result<Attested, SignError> {
    let manifest = Manifest::of(&model.path, progress)?;
    let content = store.contents().adopt(&model.path, &mut |_, _| ())?;
    if content.digest() != manifest.digest {
        return Err(StoreError::ContentChanged { path: model.path.clone() }.into());
    }
    let signer = key.node_id();
    let before = attestations(&content)?.into_iter().find(|known| known.is_by(signer));
    let entry = store.list()?.into_iter().find(|entry| entry.path == model.path);
    let source = entry.as_ref().and_then(|entry| match &entry.origin {
        Origin::Hub { repo, commit, file, .. } => {
            Some(HubRef { repo: repo.clone(), revision: commit.clone(), wanted: Some(file.clone()) }.to_string())
        }
        _ => None,
    });
    let source = source.or_else(|| content.source()).filter(|source| source.len() <= SOURCE_BYTES_MAX);
    let name = model.name.as_str();
    let says = Attestation {
        signer,
        model: ModelDigest::from_bytes(manifest.digest.0),
        manifest: ManifestDigest::from_bytes(manifest.own_digest().0),
        file_bytes: manifest.file_bytes,
        name: name[..name.floor_char_boundary(MODEL_NAME_BYTES_MAX)].to_owned(),
        licence: entry.and_then(|entry| entry.licence).or_else(|| murmur_store::licence_of(&model.path)),
        source,
        // A clock that was ahead once must not keep what is signed now from counting.
        signed_ms: unix_ms().max(before.map_or(0, |before| before.says.signed_ms.saturating_add(1))),
    };
    let attested = Attested { signed: says.sign(key)?, says };
    keep(&content, vec![attested.clone()], &[signer])?;
    Ok(attested)
}

/// All that is known to have been signed of a content, those first that were to be kept first. Blocks.
///
/// # Errors
/// [`StoreError::Io`] if it cannot be read.
pub fn attestations(content: &Content) -> Result<Vec<Attested>, StoreError> {
    Ok(verified(content, content.signatures()?))
}

/// All that is known here to have been signed of a file, of the store or elsewhere on this machine. It is read through, unless that was done
/// before; `progress` is told bytes done and bytes in all. Blocks.
///
/// # Errors
/// [`StoreError`] if it cannot be read.
pub fn known_of(store: &Store, file: &Path, mut progress: impl FnMut(u64, u64)) -> Result<Vec<Attested>, StoreError> {
    attestations(&store.contents().adopt(file, &mut progress)?)
}

/// The same, without reading it: of a file that was not read through since it has changed last, nothing is known. Blocks.
///
/// # Errors
/// [`StoreError`] if what was signed cannot be read.
pub fn known_unread(store: &Store, file: &Path) -> Result<Vec<Attested>, StoreError> {
    store.contents().find_file(file)?.as_ref().map_or_else(|| Ok(Vec::new()), attestations)
}

/// Who has signed something, in words.
pub fn signers(attested: &[Attested]) -> String {
    let signers: BTreeSet<NodeId> = attested.iter().map(|attested| attested.says.signer).collect();
    let shown: Vec<String> = signers.iter().take(SHOWN_MAX).map(ToString::to_string).collect();
    match signers.len().saturating_sub(SHOWN_MAX) {
        _ if shown.is_empty() => "nobody has, as far as is known".to_owned(),
        0 => format!("those who have: {}", shown.join(", ")),
        more => format!("those who have: {} and {more} more", shown.join(", ")),
    }
}

/// What of this was signed of the content.
fn verified(content: &Content, signatures: Vec<Vec<u8>>) -> Vec<Attested> {
    let model = ModelDigest::from_bytes(content.digest().0);
    let verify = |bytes: Vec<u8>| {
        let signed = SignedAttestation::from_bytes(bytes).map_err(AttestationError::from);
        let attested = signed.and_then(|signed| Attested::verify(signed, model));
        attested.inspect_err(|error| tracing::warn!("what was signed of {}: {error}", content.path().display())).ok()
    };
    let is_of_it = |attested: &Attested| attested.says.file_bytes == content.bytes();
    signatures.into_iter().filter_map(verify).filter(is_of_it).collect()
}

/// Keeps what was signed of a content beside it, as much as there may be, and of what these have signed first. Blocks.
pub(crate) fn keep(content: &Content, new: Vec<Attested>, first: &[NodeId]) -> Result<(), StoreError> {
    content.change_signatures(|known| {
        let new = new.into_iter().filter(|attested| attested.says.file_bytes == content.bytes()).collect();
        let kept = merged(verified(content, known), new, first);
        kept.iter().map(|attested| attested.signed.as_bytes().to_vec()).collect()
    })
}

/// Of each signer the latest: first those of `first`, then what was known. A flood of signatures by keys that nobody knows displaces none
/// that were there before.
pub(crate) fn merged(known: Vec<Attested>, new: Vec<Attested>, first: &[NodeId]) -> Vec<Attested> {
    let mut all: Vec<Attested> = Vec::new();
    for one in known.into_iter().chain(new) {
        match all.iter_mut().find(|other| other.says.signer == one.says.signer) {
            Some(other) if other.says.signed_ms < one.says.signed_ms => *other = one,
            Some(_) => {}
            None => all.push(one),
        }
    }
    all.sort_by_key(|one| first.iter().position(|signer| *signer == one.says.signer).unwrap_or(first.len()));
    all.truncate(ATTESTATIONS_MAX);
    all
}

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use murmur_gguf::synth::{self, Spec};
    use murmur_store::{Contents, ImportOptions, ModelRef};
    use tempfile::TempDir;

    use super::*;

    fn key(number: u8) -> NodeKey {
        NodeKey::from_bytes(&[number; 32])
    }

    /// A store with a model in it.
    fn store() -> (TempDir, Store, Resolved) {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("tiny.gguf");
        synth::write(&Spec::tiny("llama").unwrap().with_layers(1), &file).unwrap();
        let store = Store::at(folder.path());
        let name = store.import(&file, &ImportOptions::default()).unwrap().name;
        let resolved = store.resolve(&ModelRef::Name(name)).unwrap();
        (folder, store, resolved)
    }

    fn content(store: &Store, model: &Resolved) -> Content {
        store.contents().adopt(&model.path, &mut |_, _| ()).unwrap()
    }

    fn attested(number: u8, signed_ms: u64, like: &Attestation) -> Attested {
        let says = Attestation { signer: key(number).node_id(), signed_ms, ..like.clone() };
        Attested { signed: says.sign(&key(number)).unwrap(), says }
    }

    #[test]
    fn what_is_signed_covers_the_file_and_its_manifest_and_is_found_beside_the_file() {
        let (folder, store, model) = store();
        let signed = sign(&store, &key(1), &model, |_, _| ()).unwrap();
        let manifest = Manifest::of(&model.path, |_, _| ()).unwrap();
        let says = signed.says();
        assert_eq!((says.signer, says.name.as_str()), (key(1).node_id(), "tiny"));
        assert_eq!((says.model.as_bytes(), says.file_bytes), (&manifest.digest.0, manifest.file_bytes));
        assert_eq!(says.manifest.as_bytes(), &manifest.own_digest().0);
        let found = Contents::at(folder.path()).find(&manifest.digest).unwrap().unwrap();
        assert_eq!(attestations(&found).unwrap(), [signed]);
    }

    #[test]
    fn a_key_that_signs_again_replaces_what_it_had_signed_even_where_its_clock_has_gone_back() {
        let (_folder, store, model) = store();
        let first = sign(&store, &key(1), &model, |_, _| ()).unwrap();
        let ahead = attested(1, u64::MAX - 1, first.says());
        keep(&content(&store, &model), vec![ahead, attested(2, 5, first.says())], &[]).unwrap();
        let again = sign(&store, &key(1), &model, |_, _| ()).unwrap();
        assert_eq!(again.says().signed_ms, u64::MAX);
        let known = attestations(&content(&store, &model)).unwrap();
        assert_eq!(known, [again, attested(2, 5, first.says())]);
    }

    #[test]
    fn what_is_forged_damaged_or_of_another_file_is_not_shown() {
        let (_folder, store, model) = store();
        let right = sign(&store, &key(1), &model, |_, _| ()).unwrap();
        let elsewhere = Attestation { model: ModelDigest::from_bytes([9; 32]), ..right.says().clone() };
        let longer = Attestation { file_bytes: right.says().file_bytes + 1, ..right.says().clone() };
        let mut forged = attested(2, 5, right.says()).signed.as_bytes().to_vec();
        forged[70] ^= 1;
        let content = content(&store, &model);
        let wrong = [
            elsewhere.sign(&key(1)).unwrap().as_bytes().to_vec(),
            longer.sign(&key(1)).unwrap().as_bytes().to_vec(),
            forged,
            Vec::new(),
            vec![7; 5_000],
        ];
        content.change_signatures(|known| known.into_iter().chain(wrong).collect()).unwrap();
        assert_eq!(attestations(&content).unwrap(), [right]);
    }

    #[test]
    fn a_flood_of_strangers_displaces_nobody_and_whoever_is_wanted_finds_room() {
        let (_folder, store, model) = store();
        let own = sign(&store, &key(1), &model, |_, _| ()).unwrap();
        let content = content(&store, &model);
        keep(&content, vec![attested(2, 5, own.says())], &[]).unwrap();
        keep(&content, (10..100).map(|number| attested(number, 9, own.says())).collect(), &[]).unwrap();
        let signers = || -> Vec<NodeId> { attestations(&content).unwrap().iter().map(|one| one.says.signer).collect() };
        assert_eq!(signers().len(), ATTESTATIONS_MAX);
        assert_eq!(signers()[..2], [key(1).node_id(), key(2).node_id()]);
        keep(&content, vec![attested(200, 1, own.says())], &[key(200).node_id()]).unwrap();
        assert_eq!(signers()[..3], [key(200).node_id(), key(1).node_id(), key(2).node_id()]);
    }
}
