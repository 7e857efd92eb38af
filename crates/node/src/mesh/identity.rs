//! What a model is to other nodes: the digest of its file, and the card with which they read and write its tokens.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::UNIX_EPOCH,
};

use murmur_gguf::{Gguf, GgufError, Manifest};
use murmur_protocol::mesh::{
    ModelDigest, TokenizerDigest,
    card::{CARD_BYTES_MAX, card_digest},
};
use serde::{Deserialize, Serialize};

use super::replace_file;

/// Digests that are remembered; a file's digest takes a second per gigabyte or more.
const REMEMBERED_MAX: usize = 256;

/// A model's names in the mesh.
#[derive(Debug)]
pub(crate) struct ModelIdentity {
    /// Of the whole file.
    pub(crate) digest: ModelDigest,
    /// Of the card.
    pub(crate) tokenizer: TokenizerDigest,
    /// Metadata without tensors, as a GGUF file.
    pub(crate) card: Vec<u8>,
}

/// Why a model cannot be offered to others.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IdentityError {
    #[error(transparent)]
    Gguf(#[from] GgufError),
    #[error("its metadata have {0} bytes, more than the {CARD_BYTES_MAX} that can be handed on")]
    CardTooLarge(usize),
}

impl ModelIdentity {
    /// Reads the file through, unless it was before. `memory`: where digests are remembered. Blocks.
    pub(crate) fn of(path: &Path, memory: &Path) -> Result<ModelIdentity, IdentityError> {
        let gguf = Gguf::open(path)?;
        let card = murmur_gguf::tokenizer_card(&gguf)?;
        if card.len() > CARD_BYTES_MAX {
            return Err(IdentityError::CardTooLarge(card.len()));
        }
        let stamp = Stamp::of(path);
        let remembered = stamp.as_ref().and_then(|stamp| recall(memory, stamp));
        let digest = match remembered {
            Some(digest) => digest,
            None => {
                let digest = ModelDigest::from_bytes(Manifest::of_gguf(&gguf, |_, _| {})?.digest.0);
                if let Some(stamp) = stamp
                    && let Err(error) = remember(memory, stamp, digest)
                {
                    tracing::warn!(%error, "the digest of {} is not remembered", path.display());
                }
                digest
            }
        };
        Ok(ModelIdentity { digest, tokenizer: card_digest(&card), card })
    }
}

/// A file that was not touched since has the same digest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Stamp {
    path: PathBuf,
    bytes: u64,
    modified_ns: u128,
}

impl Stamp {
    fn of(path: &Path) -> Option<Stamp> {
        let path = path.canonicalize().ok()?;
        let metadata = fs::metadata(&path).ok()?;
        let modified = metadata.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
        Some(Stamp { path, bytes: metadata.len(), modified_ns: modified.as_nanos() })
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Remembered {
    stamp: Stamp,
    digest: ModelDigest,
}

fn recall(memory: &Path, stamp: &Stamp) -> Option<ModelDigest> {
    all(memory).into_iter().find(|known| known.stamp == *stamp).map(|known| known.digest)
}

fn remember(memory: &Path, stamp: Stamp, digest: ModelDigest) -> io::Result<()> {
    let mut known = all(memory);
    known.retain(|other| other.stamp.path != stamp.path);
    known.push(Remembered { stamp, digest });
    let excess = known.len().saturating_sub(REMEMBERED_MAX);
    known.drain(..excess);
    replace_file(memory, &serde_json::to_vec(&known)?)
}

/// What cannot be read is computed anew.
fn all(memory: &Path) -> Vec<Remembered> {
    fs::read(memory).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default()
}
