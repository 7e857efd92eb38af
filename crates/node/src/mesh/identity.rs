//! What a model is to other nodes: the digest of its file, and the card with which they read and write its tokens.

use std::path::Path;

use murmur_gguf::{Gguf, GgufError};
use murmur_protocol::mesh::{
    ModelDigest, TokenizerDigest,
    card::{CARD_BYTES_MAX, card_digest},
};
use murmur_store::StoreError;

use crate::contents::Library;

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
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("its metadata have {0} bytes, more than the {CARD_BYTES_MAX} that can be handed on")]
    CardTooLarge(usize),
}

impl ModelIdentity {
    /// Puts the file of a model into the library: it is read through, unless it was before. Blocks.
    pub(crate) fn of(name: &str, path: &Path, library: &Library) -> Result<ModelIdentity, IdentityError> {
        let gguf = Gguf::open(path)?;
        let card = card(&gguf)?;
        let digest = library.adopt(name, path, gguf.data_offset())?.digest();
        Ok(ModelIdentity { digest, tokenizer: card_digest(&card), card })
    }

    /// Of a file with a digest that is known.
    pub(crate) fn known(path: &Path, digest: ModelDigest) -> Result<ModelIdentity, IdentityError> {
        let card = card(&Gguf::open(path)?)?;
        Ok(ModelIdentity { digest, tokenizer: card_digest(&card), card })
    }
}

fn card(gguf: &Gguf) -> Result<Vec<u8>, IdentityError> {
    let card = murmur_gguf::tokenizer_card(gguf)?;
    match card.len() {
        0..=CARD_BYTES_MAX => Ok(card),
        bytes => Err(IdentityError::CardTooLarge(bytes)),
    }
}
