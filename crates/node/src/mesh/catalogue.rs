//! The models of others: which there are, and what a driver needs of each.
//!
//! A driver reads and writes tokens itself, so it needs a model's vocabulary and chat template without having the model. Both
//! are in the *card*: the metadata of the model's file. It is fetched when the model is asked for first, from any peer that
//! offers it, checked against the digest in the record, kept on disk, and read by a child process, as any file of strangers
//! is.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use murmur_api::backend::{ModelCard, ModelKind, ModelState as State};
use murmur_net::{
    Mesh, NetError, Table,
    stream::{self, Reader as StreamReader},
};
use murmur_protocol::mesh::{
    ModelDigest, ModelState, NodeId, ServedModel, TokenizerDigest, Work,
    card::{CardAssembly, CardError},
};
use serde_json::json;
use tokio::time::timeout;

use super::{replace_file, view};
use crate::{
    model::{unix_seconds, with_texts},
    readers::{Reader, ReaderError, Readers},
};

/// The next part of a card comes within this.
const PART_DEADLINE: Duration = Duration::from_secs(15);

/// Who offers a model, and what they say of it.
type Offers<'a> = Vec<(NodeId, &'a ServedModel)>;

/// A model that others offer.
pub(crate) struct RemoteModel {
    /// Complete in what is known from records; the rest comes with [`RemoteModel::complete`].
    pub(crate) card: Arc<ModelCard>,
    pub(crate) digest: ModelDigest,
    pub(crate) tokenizer: TokenizerDigest,
    holders: Vec<NodeId>,
}

/// Why a card is of no use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CatalogueError {
    #[error(transparent)]
    Net(#[from] NetError),
    #[error(transparent)]
    Card(#[from] CardError),
    #[error("the card stopped coming")]
    Late,
    #[error("the peer does not hand it out: {0}")]
    Refused(String),
    #[error("{path}: {source}", path = .path.display())]
    File { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Reader(#[from] ReaderError),
}

/// What others offer, by the table that it was read off.
pub(super) struct Catalogue {
    cards_dir: PathBuf,
    listed: Mutex<Listed>,
}

#[derive(Default)]
struct Listed {
    table: Option<Table>,
    models: Arc<Vec<Arc<RemoteModel>>>,
}

impl Catalogue {
    pub(super) fn new(data_dir: &Path) -> Catalogue {
        Catalogue { cards_dir: data_dir.join("cards"), listed: Mutex::default() }
    }

    /// The models that a peer offers now, by name.
    pub(super) fn models(&self, mesh: &Mesh) -> Arc<Vec<Arc<RemoteModel>>> {
        let table = Arc::clone(&mesh.watch().borrow());
        let mut listed = self.listed.lock().unwrap_or_else(PoisonError::into_inner);
        if !listed.table.as_ref().is_some_and(|known| Arc::ptr_eq(known, &table)) {
            let offers = table.iter().flat_map(|(&node, known)| {
                let served = known.verified.record().models.iter();
                served.filter(|served| is_offered(served)).map(move |served| (node, served))
            });
            let models = models(offers, &listed.models);
            listed.models = Arc::new(models);
            listed.table = Some(table);
        }
        Arc::clone(&listed.models)
    }

    /// Where the card of a model is kept.
    pub(super) fn card_path(&self, model: &RemoteModel) -> PathBuf {
        self.cards_dir.join(format!("{}.gguf", model.tokenizer))
    }

    /// What reads and writes a model's tokens.
    pub(super) async fn reader(
        &self,
        mesh: &Mesh,
        model: &RemoteModel,
        readers: &Readers,
    ) -> Result<Arc<Reader>, CatalogueError> {
        let path = self.card_path(model);
        readers.get(&path, self.get(mesh, model, &path)).await
    }

    /// Sees to it that a model's card is on disk.
    async fn get(&self, mesh: &Mesh, model: &RemoteModel, path: &Path) -> Result<(), CatalogueError> {
        if is_intact(path, model.tokenizer) {
            return Ok(());
        }
        let mut outcome = Err(CatalogueError::Late);
        for node in &model.holders {
            outcome = fetch(mesh, *node, model.digest, model.tokenizer).await;
            match &outcome {
                Ok(_) => break,
                Err(error) => tracing::debug!("card {} from {}: {error}", model.tokenizer.short(), node.short()),
            }
        }
        replace_file(path, &outcome?).map_err(|source| CatalogueError::File { path: path.to_owned(), source })
    }
}

impl RemoteModel {
    /// The card with what the vocabulary says.
    pub(crate) fn complete(&self, reader: &Reader) -> Arc<ModelCard> {
        let vocabulary = reader.tokenizer.vocabulary();
        let mut details = self.card.details.clone();
        details["architecture"] = reader.architecture.clone().into();
        details["vocabulary"] = vocabulary.len().into();
        Arc::new(ModelCard {
            chat_template: reader.chat_template.clone(),
            details,
            ..with_texts(&self.card, vocabulary)
        })
    }
}

/// What can be asked for.
fn is_offered(served: &ServedModel) -> bool {
    matches!(served.state, ModelState::Ready | ModelState::Loading | ModelState::Available)
}

/// The models behind the offers. Those that were `known` before keep the time at which they were learnt of.
fn models<'a>(
    offers: impl Iterator<Item = (NodeId, &'a ServedModel)>,
    known: &[Arc<RemoteModel>],
) -> Vec<Arc<RemoteModel>> {
    let mut by_digest: BTreeMap<ModelDigest, Offers> = BTreeMap::new();
    for (node, served) in offers {
        by_digest.entry(served.digest).or_default().push((node, served));
    }
    let mut by_name: BTreeMap<&str, Vec<(ModelDigest, Offers)>> = BTreeMap::new();
    for (digest, offers) in by_digest {
        let Some(&(_, first)) = offers.first() else { continue };
        by_name.entry(&first.name).or_default().push((digest, offers));
    }
    let mut models = Vec::new();
    for (name, mut candidates) in by_name {
        // Different models under one name: the one that most peers offer has it, the others are told apart.
        candidates.sort_by_key(|(digest, offers)| (std::cmp::Reverse(offers.len()), *digest));
        for (rank, (digest, offers)) in candidates.into_iter().enumerate() {
            let id = if rank == 0 { name.to_owned() } else { format!("{name}@{}", digest.short()) };
            let created = known.iter().find(|model| model.digest == digest).map(|model| model.card.created);
            models.extend(model(id, digest, &offers, created.unwrap_or_else(unix_seconds)));
        }
    }
    models
}

fn model(id: String, digest: ModelDigest, offers: &[(NodeId, &ServedModel)], created: u64) -> Option<Arc<RemoteModel>> {
    let tokenizer = offers.first()?.1.tokenizer;
    let holders = offers.iter().filter(|(_, served)| served.tokenizer == tokenizer).map(|(node, _)| *node).collect();
    let in_state = |state| offers.iter().any(|(_, served)| served.state == state);
    let served_by = offers.iter().map(|(node, served)| {
        let mut offer = view::model(served);
        offer["node"] = node.to_string().into();
        offer
    });
    let card = ModelCard {
        id,
        created,
        kind: ModelKind::Generate,
        context_tokens: offers.iter().map(|(_, served)| served.context_tokens).max().unwrap_or(0),
        chat_template: None,
        bos_text: String::new(),
        eos_text: String::new(),
        state: match (in_state(ModelState::Ready), in_state(ModelState::Loading)) {
            (true, _) => State::Ready,
            // How far it is its node does not say.
            (false, true) => State::Available { loading: Some(0.0) },
            (false, false) => State::Available { loading: None },
        },
        details: json!({"served_by": served_by.collect::<Vec<_>>()}),
    };
    Some(Arc::new(RemoteModel { card: Arc::new(card), digest, tokenizer, holders }))
}

async fn fetch(
    mesh: &Mesh,
    node: NodeId,
    model: ModelDigest,
    tokenizer: TokenizerDigest,
) -> Result<Vec<u8>, CatalogueError> {
    let (mut send, recv) = mesh.open_work(node).await?;
    stream::write(&mut send, &Work::GetCard(model)).await?;
    let mut reader = StreamReader::<Work>::new(recv);
    let mut assembly: Option<CardAssembly> = None;
    loop {
        let message = timeout(PART_DEADLINE, reader.expect()).await.map_err(|_| CatalogueError::Late)??;
        match (message, &mut assembly) {
            (Work::Card(card), None) => assembly = Some(CardAssembly::new(card, tokenizer)?),
            (Work::CardPart(part), Some(assembly)) => {
                if let Some(card) = assembly.push(&part)? {
                    return Ok(card);
                }
            }
            (Work::Failed(failed), _) => return Err(CatalogueError::Refused(failed.reason)),
            (Work::Unknown { .. }, _) => {}
            _ => return Err(CatalogueError::Refused("it sends something else".to_owned())),
        }
    }
}

/// A card that was stored before; what the disk has made of it is checked.
fn is_intact(path: &Path, tokenizer: TokenizerDigest) -> bool {
    fs::read(path).is_ok_and(|bytes| murmur_protocol::mesh::card::card_digest(&bytes) == tokenizer)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn served(name: &str, digest: u8, state: ModelState) -> ServedModel {
        ServedModel {
            digest: ModelDigest::from_bytes([digest; 32]),
            name: name.into(),
            state,
            context_tokens: 512,
            parallel: 1,
            running: 0,
            queued: 0,
            decode_us_per_token: 0,
            prefill_us_per_token: 0,
            load_ms: 0,
            tokenizer: TokenizerDigest::from_bytes([digest; 32]),
            exact: false,
            build: String::new(),
        }
    }

    #[test]
    fn models_are_listed_by_name_with_the_best_state_that_a_peer_offers() {
        let node = |number: u8| NodeId::from_bytes([number; 32]);
        let offers = [
            (node(1), served("a", 1, ModelState::Available)),
            (node(2), served("a", 1, ModelState::Ready)),
            (node(3), served("a", 2, ModelState::Loading)),
            (node(4), served("b", 3, ModelState::Available)),
            (node(5), served("c", 4, ModelState::Draining)),
        ];
        let offered = || offers.iter().filter(|(_, served)| is_offered(served)).map(|(node, served)| (*node, served));
        let listed = models(offered(), &[]);
        let names: Vec<(&str, &str)> = listed.iter().map(|m| (m.card.id.as_str(), m.card.state.name())).collect();
        let other = format!("a@{}", ModelDigest::from_bytes([2; 32]).short());
        assert_eq!(names, [("a", "ready"), (other.as_str(), "loading"), ("b", "available")]);
        assert_eq!(listed[0].holders, [node(1), node(2)]);
        assert_eq!(listed[0].card.details["served_by"][0]["node"], node(1).to_string());
    }

    #[test]
    fn a_model_keeps_the_time_at_which_it_was_learnt_of() {
        let (node, served) = (NodeId::from_bytes([1; 32]), served("a", 1, ModelState::Ready));
        let before = models([(node, &served)].into_iter(), &[]);
        let aged = RemoteModel {
            card: Arc::new(ModelCard { created: 7, ..(*before[0].card).clone() }),
            digest: before[0].digest,
            tokenizer: before[0].tokenizer,
            holders: Vec::new(),
        };
        assert_eq!(models([(node, &served)].into_iter(), &[Arc::new(aged)])[0].card.created, 7);
    }
}
