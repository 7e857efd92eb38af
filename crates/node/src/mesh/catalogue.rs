//! The models of others: which there are, and what a driver needs of each.
//!
//! A driver reads and writes tokens itself, so it needs a model's vocabulary and chat template without having the model. Both
//! are in the *card*: the metadata of the model's file. It is fetched once from any peer that serves the model, checked
//! against the digest in the record, kept on disk, and read by a child process, as any file of strangers is.

use std::{
    collections::{BTreeMap, HashMap},
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use murmur_api::backend::{ModelCard, ModelKind, ModelState as State};
use murmur_engine::{Patience, Tokenizer};
use murmur_gguf::Gguf;
use murmur_net::{
    Mesh, NetError, PeerView,
    stream::{self, Reader},
};
use murmur_protocol::mesh::{
    ModelDigest, ModelState, NodeId, ServedModel, TokenizerDigest, Work,
    card::{CardAssembly, CardError},
};
use serde_json::json;
use tokio::time::timeout;

use super::{MeshNode, view};

/// Vocabularies of others that are held at once, each by a process of its own.
const VOCABULARIES_MAX: usize = 16;
/// A card that could not be had is not asked for again before.
const RETRY_AFTER: Duration = Duration::from_secs(10);
/// The next part of a card comes within this.
const PART_DEADLINE: Duration = Duration::from_secs(15);

/// Who serves a model, and what they say of it.
type Offers = Vec<(PeerView, ServedModel)>;

/// A model that others serve.
pub(crate) struct RemoteModel {
    pub(crate) card: Arc<ModelCard>,
    pub(crate) digest: ModelDigest,
    pub(crate) reader: Arc<CardReader>,
}

/// What reads and writes a model's tokens.
pub(crate) struct CardReader {
    pub(crate) digest: TokenizerDigest,
    pub(crate) tokenizer: Arc<Tokenizer>,
    chat_template: Option<String>,
    architecture: String,
    created: u64,
}

/// Why a card is of no use.
#[derive(Debug, thiserror::Error)]
enum CatalogueError {
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
    Gguf(#[from] murmur_gguf::GgufError),
    #[error(transparent)]
    Engine(#[from] murmur_engine::EngineError),
    #[error("reading it was interrupted")]
    Interrupted,
}

/// What is known of others' models beyond their records.
pub(super) struct Catalogue {
    cards_dir: PathBuf,
    program: PathBuf,
    readers: Mutex<HashMap<TokenizerDigest, Arc<CardReader>>>,
}

impl Catalogue {
    pub(super) fn new(data_dir: PathBuf, program: PathBuf) -> Catalogue {
        Catalogue { cards_dir: data_dir.join("cards"), program, readers: Mutex::default() }
    }

    fn readers(&self) -> MutexGuard<'_, HashMap<TokenizerDigest, Arc<CardReader>>> {
        self.readers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn find(&self, mesh: &Mesh, id: &str) -> Option<Arc<RemoteModel>> {
        self.models(mesh).into_iter().find(|model| model.card.id == id)
    }

    /// The models that a peer serves now and whose card is here, by name.
    pub(super) fn models(&self, mesh: &Mesh) -> Vec<Arc<RemoteModel>> {
        let readers = self.readers();
        let mut offers: BTreeMap<ModelDigest, Offers> = BTreeMap::new();
        for peer in mesh.peers() {
            for served in ready(&peer) {
                offers.entry(served.digest).or_default().push((peer.clone(), served.clone()));
            }
        }
        let mut by_name: BTreeMap<String, Vec<(ModelDigest, Offers)>> = BTreeMap::new();
        for (digest, offers) in offers {
            let Some((_, first)) = offers.first() else { continue };
            by_name.entry(first.name.clone()).or_default().push((digest, offers));
        }
        let mut models = Vec::new();
        for (name, mut candidates) in by_name {
            // Different models under one name: the one that most peers serve has it, the others are told apart.
            candidates.sort_by_key(|(digest, offers)| (std::cmp::Reverse(offers.len()), *digest));
            for (rank, (digest, offers)) in candidates.into_iter().enumerate() {
                let id = if rank == 0 { name.clone() } else { format!("{name}@{}", digest.short()) };
                let reader = offers.iter().find_map(|(_, served)| readers.get(&served.tokenizer));
                if let Some(reader) = reader {
                    let card = Arc::new(card(id, reader, &offers));
                    models.push(Arc::new(RemoteModel { card, digest, reader: Arc::clone(reader) }));
                }
            }
        }
        models
    }

    /// Cards that are wanted and not here, with who has them.
    fn missing(&self, mesh: &Mesh) -> HashMap<TokenizerDigest, Vec<(NodeId, ModelDigest)>> {
        let readers = self.readers();
        let mut missing: HashMap<TokenizerDigest, Vec<(NodeId, ModelDigest)>> = HashMap::new();
        for peer in mesh.peers() {
            for served in ready(&peer).filter(|served| !readers.contains_key(&served.tokenizer)) {
                missing.entry(served.tokenizer).or_default().push((peer.record().node, served.digest));
            }
        }
        missing
    }

    async fn get(
        &self,
        mesh: &Mesh,
        tokenizer: TokenizerDigest,
        holders: &[(NodeId, ModelDigest)],
    ) -> Result<(), CatalogueError> {
        let path = self.cards_dir.join(format!("{tokenizer}.gguf"));
        if !is_intact(&path, tokenizer) {
            let mut outcome = Err(CatalogueError::Late);
            for &(node, model) in holders {
                outcome = fetch(mesh, node, model, tokenizer).await;
                if let Err(error) = &outcome {
                    tracing::debug!("card {} from {}: {error}", tokenizer.short(), node.short());
                } else {
                    break;
                }
            }
            store(&path, &outcome?).map_err(|source| CatalogueError::File { path: path.clone(), source })?;
        }
        let program = self.program.clone();
        let read = tokio::task::spawn_blocking(move || CardReader::read(program, &path, tokenizer));
        let reader = read.await.map_err(|_| CatalogueError::Interrupted)??;
        self.readers().insert(tokenizer, Arc::new(reader));
        Ok(())
    }
}

impl CardReader {
    fn read(program: PathBuf, path: &Path, digest: TokenizerDigest) -> Result<CardReader, CatalogueError> {
        let gguf = Gguf::open(path)?;
        let tokenizer = Tokenizer::start(program, path, Patience::default().silence_floor)?;
        Ok(CardReader {
            digest,
            tokenizer: Arc::new(tokenizer),
            chat_template: gguf.str("tokenizer.chat_template").map(str::to_owned),
            architecture: gguf.architecture().to_owned(),
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        })
    }
}

/// The models that a peer can be asked for.
fn ready(peer: &PeerView) -> impl Iterator<Item = &ServedModel> {
    peer.record().models.iter().filter(|served| served.state == ModelState::Ready)
}

fn card(id: String, reader: &CardReader, offers: &[(PeerView, ServedModel)]) -> ModelCard {
    let vocabulary = reader.tokenizer.vocabulary();
    let text = |token: Option<i32>| {
        token.map(|token| String::from_utf8_lossy(vocabulary.bytes(token)).into_owned()).unwrap_or_default()
    };
    let served_by = offers.iter().map(|(peer, served)| {
        let mut offer = view::model(served);
        offer["node"] = peer.record().node.to_string().into();
        offer["rtt_ms"] = peer.rtt_ms.into();
        offer
    });
    ModelCard {
        id,
        created: reader.created,
        kind: ModelKind::Generate,
        context_tokens: offers.iter().map(|(_, served)| served.context_tokens).max().unwrap_or(0),
        chat_template: reader.chat_template.clone(),
        bos_text: text(vocabulary.bos()),
        eos_text: text(vocabulary.eos()),
        state: State::Ready,
        details: json!({
            "architecture": reader.architecture,
            "vocabulary": vocabulary.len(),
            "served_by": served_by.collect::<Vec<_>>(),
        }),
    }
}

/// Gets the cards of what others serve, as records come and go.
pub(super) async fn run(mesh: Weak<MeshNode>) {
    let Some(mut table) = mesh.upgrade().map(|mesh| mesh.mesh().watch()) else { return };
    let mut failed: HashMap<TokenizerDigest, Instant> = HashMap::new();
    loop {
        let Some(node) = mesh.upgrade() else { return };
        failed.retain(|_, at| at.elapsed() < RETRY_AFTER);
        for (tokenizer, holders) in node.catalogue.missing(node.mesh()) {
            if failed.contains_key(&tokenizer) || node.catalogue.readers().len() >= VOCABULARIES_MAX {
                continue;
            }
            if let Err(error) = node.catalogue.get(node.mesh(), tokenizer, &holders).await {
                tracing::warn!("a model of the mesh cannot be used: its card {}: {error}", tokenizer.short());
                failed.insert(tokenizer, Instant::now());
            }
        }
        drop(node);
        let news = async {
            match failed.is_empty() {
                true => table.changed().await.is_ok(),
                // What failed is tried again without news as well.
                false => {
                    timeout(RETRY_AFTER, table.changed()).await.is_ok_and(|changed| changed.is_ok())
                        || !failed.is_empty()
                }
            }
        };
        if !news.await {
            return;
        }
    }
}

async fn fetch(
    mesh: &Mesh,
    node: NodeId,
    model: ModelDigest,
    tokenizer: TokenizerDigest,
) -> Result<Vec<u8>, CatalogueError> {
    let (mut send, recv) = mesh.open_work(node).await?;
    stream::write(&mut send, &Work::GetCard(model)).await?;
    let mut reader = Reader::<Work>::new(recv);
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

fn store(path: &Path, card: &[u8]) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let partial = path.with_extension(format!("partial-{}", std::process::id()));
    fs::write(&partial, card)?;
    fs::rename(&partial, path)
}
