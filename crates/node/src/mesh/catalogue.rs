//! The models of others: which there are, and what a driver needs of each.
//!
//! A driver reads and writes tokens itself, so it needs a model's vocabulary and chat template without having the model. Both
//! are in the *card*: the metadata of the model's file. It is fetched when the model is asked for first, from any peer that
//! offers it, checked against the digest in the record, kept on disk, and read by a child process, as any file of strangers
//! is.
//!
//! Which card belongs to a file cannot be seen without the file. So peers that say different things of the same file offer different models:
//! the name goes to what most of them say, and among as many to what was known before; the others are told apart. Who says
//! something else than the rest has its words for itself, and no part in theirs.

use std::{
    cmp::Reverse,
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
use rand::seq::SliceRandom;
use serde_json::json;
use tokio::{task::JoinSet, time::timeout};

use super::{replace_file, view};
use crate::{
    model::{unix_seconds, with_texts},
    readers::{Reader, ReaderError, Readers},
};

/// A whole card comes within this: the largest one, at 4 Mbit/s.
const CARD_DEADLINE: Duration = Duration::from_secs(128);
/// A card that has not come within this is asked for elsewhere as well.
const ELSEWHERE_AFTER: Duration = Duration::from_secs(2);
/// Peers that are asked for a card at the same time.
const ASKED_MAX: usize = 4;

/// A file, and the card that is said to be its.
type What = (ModelDigest, TokenizerDigest);

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
    #[error("the card did not come in time")]
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
        mesh: &Arc<Mesh>,
        model: &RemoteModel,
        readers: &Readers,
    ) -> Result<Arc<Reader>, CatalogueError> {
        let path = self.card_path(model);
        readers.get(&path, self.get(mesh, model, &path)).await
    }

    /// Sees to it that a model's card is on disk.
    async fn get(&self, mesh: &Arc<Mesh>, model: &RemoteModel, path: &Path) -> Result<(), CatalogueError> {
        if is_intact(path, model.tokenizer) {
            return Ok(());
        }
        let mut holders = model.holders.clone();
        holders.shuffle(&mut rand::rng());
        let (digest, tokenizer) = (model.digest, model.tokenizer);
        let card = first_of(holders, |node| {
            let mesh = Arc::clone(mesh);
            async move {
                let fetched = timeout(CARD_DEADLINE, fetch(&mesh, node, digest, tokenizer)).await;
                fetched.unwrap_or(Err(CatalogueError::Late)).inspect_err(|error| {
                    tracing::debug!("card {} from {}: {error}", tokenizer.short(), node.short());
                })
            }
        });
        replace_file(path, &card.await?).map_err(|source| CatalogueError::File { path: path.to_owned(), source })
    }
}

/// Asks one after the other until one gives a card; the next one as soon as another has failed, or takes its time.
async fn first_of<F>(holders: Vec<NodeId>, ask: impl Fn(NodeId) -> F) -> Result<Vec<u8>, CatalogueError>
where
    F: Future<Output = Result<Vec<u8>, CatalogueError>> + Send + 'static,
{
    let mut asked = JoinSet::new();
    let (mut holders, mut outcome) = (holders.into_iter(), Err(CatalogueError::Late));
    loop {
        if let Some(node) = holders.next() {
            asked.spawn(ask(node));
        }
        let asked_count = asked.len();
        let elsewhere = async {
            match holders.len() > 0 && asked_count < ASKED_MAX {
                true => tokio::time::sleep(ELSEWHERE_AFTER).await,
                false => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            ended = asked.join_next() => match ended {
                Some(Ok(Ok(card))) => return Ok(card),
                Some(Ok(error)) => outcome = error,
                // It panicked, and is as good as one that does not answer.
                Some(Err(_)) => {}
                None => return outcome,
            },
            () = elsewhere => {}
        }
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
    let mut by_what: BTreeMap<What, Offers> = BTreeMap::new();
    for (node, served) in offers {
        by_what.entry((served.digest, served.tokenizer)).or_default().push((node, served));
    }
    let before = |what: &What| known.iter().find(|model| (model.digest, model.tokenizer) == *what);
    let mut by_name: BTreeMap<&str, Vec<(What, Offers)>> = BTreeMap::new();
    for (what, offers) in by_what {
        // The name by which most call it.
        let Some(&name) = by_count(offers.iter().map(|(_, served)| served.name.as_str())).first() else { continue };
        by_name.entry(name).or_default().push((what, offers));
    }
    let mut models = Vec::new();
    for (name, mut candidates) in by_name {
        // Different models under one name: the one that most peers offer has it, the others are told apart.
        candidates.sort_by_key(|(what, offers)| {
            let had_it = before(what).is_some_and(|model| model.card.id == name);
            (Reverse(offers.len()), !had_it, *what)
        });
        let mut listed: Vec<ModelDigest> = Vec::new();
        for (what @ (digest, tokenizer), offers) in candidates {
            let id = match listed.as_slice() {
                [] => name.to_owned(),
                listed if listed.contains(&digest) => format!("{name}@{}", tokenizer.short()),
                _ => format!("{name}@{}", digest.short()),
            };
            listed.push(digest);
            let created = before(&what).map_or_else(unix_seconds, |model| model.card.created);
            models.push(model(id, what, &offers, created));
        }
    }
    models
}

/// What occurs, first what occurs most often; of what occurs as often, first what is less.
pub(crate) fn by_count<T: Ord>(items: impl Iterator<Item = T>) -> Vec<T> {
    let mut counts: BTreeMap<T, usize> = BTreeMap::new();
    items.for_each(|item| *counts.entry(item).or_default() += 1);
    let mut counts: Vec<(T, usize)> = counts.into_iter().collect();
    counts.sort_by_key(|(_, count)| Reverse(*count));
    counts.into_iter().map(|(item, _)| item).collect()
}

fn model(id: String, (digest, tokenizer): What, offers: &[(NodeId, &ServedModel)], created: u64) -> Arc<RemoteModel> {
    let holders = offers.iter().map(|(node, _)| *node).collect();
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
    Arc::new(RemoteModel { card: Arc::new(card), digest, tokenizer, holders })
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
        match (reader.expect().await?, &mut assembly) {
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
            guesses: None,
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
    fn who_says_something_else_of_a_file_than_the_rest_decides_nothing() {
        let node = |number: u8| NodeId::from_bytes([number; 32]);
        let honest = served("a", 1, ModelState::Ready);
        let tokenizer = |byte: u8| TokenizerDigest::from_bytes([byte; 32]);
        let liar = ServedModel { tokenizer: tokenizer(0), name: "b".into(), ..honest.clone() };
        let another = ServedModel { tokenizer: tokenizer(0), ..honest.clone() };
        let names = |listed: &[Arc<RemoteModel>]| -> Vec<(String, TokenizerDigest, usize)> {
            listed.iter().map(|model| (model.card.id.clone(), model.tokenizer, model.holders.len())).collect()
        };
        // Ids are made until one is low.
        let listed = models([(node(0), &liar), (node(1), &honest), (node(2), &honest)].into_iter(), &[]);
        assert_eq!(names(&listed), [("a".to_owned(), tokenizer(1), 2), ("b".to_owned(), tokenizer(0), 1)]);
        let listed = models([(node(0), &another), (node(1), &honest), (node(2), &honest)].into_iter(), &[]);
        let apart = format!("a@{}", tokenizer(0).short());
        assert_eq!(names(&listed), [("a".to_owned(), tokenizer(1), 2), (apart.clone(), tokenizer(0), 1)]);
        // A newcomer does not take the name of one that has it, whatever its numbers are.
        let before = models([(node(1), &honest)].into_iter(), &[]);
        let listed = models([(node(0), &another), (node(1), &honest)].into_iter(), &before);
        assert_eq!(names(&listed), [("a".to_owned(), tokenizer(1), 1), (apart, tokenizer(0), 1)]);
        // Nor does one that calls it something else.
        let renamed = ServedModel { name: "0".into(), ..honest.clone() };
        let listed = models([(node(0), &renamed), (node(1), &honest), (node(2), &honest)].into_iter(), &before);
        assert_eq!(names(&listed), [("a".to_owned(), tokenizer(1), 3)]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_card_that_does_not_come_holds_nobody_up_who_can_have_it_elsewhere() {
        let node = |number: u8| NodeId::from_bytes([number; 32]);
        let begun = tokio::time::Instant::now();
        let silent_but = |honest: u8| {
            move |asked: NodeId| async move {
                match asked == node(honest) {
                    true => Ok(vec![honest]),
                    false => std::future::pending().await,
                }
            }
        };
        let card = first_of((0..4).map(node).collect(), silent_but(3)).await.unwrap();
        assert_eq!(card, [3]);
        assert!((3 * ELSEWHERE_AFTER..4 * ELSEWHERE_AFTER).contains(&begun.elapsed()));
        let refuse = |_| async { Err(CatalogueError::Refused("no".to_owned())) };
        let begun = tokio::time::Instant::now();
        assert!(matches!(first_of((0..20).map(node).collect(), refuse).await, Err(CatalogueError::Refused(_))));
        assert!(begun.elapsed() < ELSEWHERE_AFTER);
        assert!(matches!(first_of(Vec::new(), refuse).await, Err(CatalogueError::Late)));
        // No more at once than some.
        let asking = timeout(10 * ELSEWHERE_AFTER, first_of((0..20).map(node).collect(), silent_but(19)));
        assert!(asking.await.is_err());
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
