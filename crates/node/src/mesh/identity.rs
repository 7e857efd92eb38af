//! What a model is to other nodes: the digest of its file, and the card with which they read and write its tokens.

use std::{
    path::Path,
    sync::{Arc, Weak},
    time::Duration,
};

use murmur_api::backend::ModelKind;
use murmur_gguf::{Gguf, GgufError};
use murmur_protocol::mesh::{
    GuessOffer, ModelDigest, TokenizerDigest, VocabularyId,
    card::{CARD_BYTES_MAX, card_digest},
};
use murmur_store::StoreError;

use super::{MeshNode, both};
use crate::{Node, contents::Library};

/// How often it is looked whether a model has come.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// A model's names in the mesh.
#[derive(Debug)]
pub(crate) struct ModelIdentity {
    /// Of the whole file.
    pub(crate) digest: ModelDigest,
    /// Of the card.
    pub(crate) tokenizer: TokenizerDigest,
    /// Metadata without tensors, as a GGUF file.
    pub(crate) card: Vec<u8>,
    /// As whom it can guess, or be guessed for. `None`: its tokens have no list.
    pub(crate) guesses: Option<GuessOffer>,
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
        Ok(ModelIdentity { digest, tokenizer: card_digest(&card), card, guesses: guesses(&gguf) })
    }

    /// Of a file with a digest that is known.
    pub(crate) fn known(path: &Path, digest: ModelDigest) -> Result<ModelIdentity, IdentityError> {
        let gguf = Gguf::open(path)?;
        let card = card(&gguf)?;
        Ok(ModelIdentity { digest, tokenizer: card_digest(&card), card, guesses: guesses(&gguf) })
    }
}

/// Gives the models their names, one after the other, for as long as there is a node. A large file takes minutes to be read: nothing
/// else waits for it.
pub(super) async fn run(node: Weak<Node>, mesh: Weak<MeshNode>) {
    loop {
        let Some((node, mesh)) = both(&node, &mesh) else { return };
        match nameless(&node) {
            Some(at) => {
                identify(node, at).await;
                mesh.identified.notify_one();
            }
            None => {
                drop((node, mesh));
                tokio::time::sleep(LOOK_EVERY).await;
            }
        }
    }
}

/// A model that has no identity yet: those that are loaded before those that could be.
fn nameless(node: &Node) -> Option<usize> {
    let nameless = |at: &usize| {
        let model = &node.models[*at];
        !model.is_identified() && model.kind() == ModelKind::Generate
    };
    let all = || (0..node.models.len()).filter(nameless);
    let loaded = all().find(|&at| node.models[at].loaded().is_some());
    let is_spread = || all().find(|&at| node.models[at].is_spread());
    let could_be = || all().find(|&at| node.models[at].is_on_demand());
    loaded.or_else(is_spread).or_else(could_be)
}

/// Reads the file of a model.
async fn identify(node: Arc<Node>, at: usize) {
    let reading = Arc::clone(&node);
    let read = tokio::task::spawn_blocking(move || {
        let model = &reading.models[at];
        ModelIdentity::of(model.id(), model.path(), &reading.library).map_err(|error| error.to_string())
    });
    let model = &node.models[at];
    // Without it the model is not offered, and nothing else is amiss.
    let identity = read.await.unwrap_or_else(|error| Err(error.to_string())).inspect_err(|reason| {
        tracing::error!("{} cannot be offered to the mesh: {reason}", model.id());
    });
    model.identify(identity.ok());
}

fn guesses(gguf: &Gguf) -> Option<GuessOffer> {
    let digest = murmur_gguf::vocabulary_digest(gguf)?;
    let vocabulary = VocabularyId::from_bytes(*digest.first_chunk()?);
    Some(GuessOffer { vocabulary, file_bytes: gguf.file_bytes() })
}

fn card(gguf: &Gguf) -> Result<Vec<u8>, IdentityError> {
    let card = murmur_gguf::tokenizer_card(gguf)?;
    match card.len() {
        0..=CARD_BYTES_MAX => Ok(card),
        bytes => Err(IdentityError::CardTooLarge(bytes)),
    }
}
