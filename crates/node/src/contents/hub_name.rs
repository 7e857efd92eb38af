//! A model that a user names as the hub does (`hf:owner/repo:quant`), from nodes that have it from there, from the hub, or from both at once.
//!
//! The hub says which file is meant, how long it is, and what its SHA-256 is; nodes say which of the files that they have are that one. Where
//! the hub cannot be reached, their word has to do. Where it can, it is a source as well, and in the end the file is the hub's, bit by bit, or
//! it is not kept. What no node has, the hub gives alone.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use murmur_net::Table;
use murmur_protocol::mesh::ModelDigest;
use murmur_store::{
    HubRef, ModelEntry, ModelName, Store, StoreError,
    hub::{HubConfig, HubFile, PullEvent},
};
use tokio::time::timeout;

use super::{
    InUse, Shelf,
    fetch::TakeError,
    wanted::{begin, blocking, contents, search_within},
};
use crate::{
    Node, NodeError,
    mesh::{MeshNode, by_count},
    model::with_causes,
};

/// A hub that has not answered after this is not waited for.
const HUB_ANSWER_MAX: Duration = Duration::from_secs(10);
/// So long it is waited for a node that has the file: who knows the hub's name for it can get it there.
const SEARCH_MAX: Duration = Duration::from_secs(5);

/// The hub, as this node may ask it, and the store for what comes from there.
pub(super) struct Hub {
    /// Or why it is not asked.
    config: Result<HubConfig, String>,
    store: Store,
}

impl Hub {
    pub(super) fn of(node: &Node) -> Hub {
        let config = match &node.options().hub {
            Some(config) if config.is_offline() => {
                Err(with_causes(&StoreError::HubOffline { endpoint: config.endpoint().to_string() }))
            }
            Some(config) => Ok(config.clone()),
            None => Err("its settings are wrong, see the server's log".to_owned()),
        };
        Hub { config, store: node.library.store() }
    }

    /// What was pulled under this name before.
    pub(super) async fn find_pulled(&self, wanted: &HubRef) -> Result<Option<ModelEntry>, NodeError> {
        let (store, wanted) = (self.store.clone(), wanted.clone());
        blocking(move || Ok(store.find_pulled(&wanted)?)).await
    }

    /// Pulls a file from it alone. `heard` is told how far it is.
    pub(super) async fn pull(
        &self,
        wanted: &HubRef,
        heard: impl Fn(FromHub) + Send + Sync + 'static,
    ) -> Result<ModelEntry, NodeError> {
        let config = self
            .config
            .as_ref()
            .map_err(|reason| NodeError::NorOnHub { name: wanted.to_string(), reason: reason.clone() })?;
        let now = Mutex::new(FromHub::default());
        let on_event = move |event| {
            let mut now = now.lock().unwrap_or_else(PoisonError::into_inner);
            if now.hear(event) {
                heard(now.clone());
            }
        };
        Ok(self.store.pull(config, wanted, None, Arc::new(on_event)).await?)
    }
}

/// How far a file is that comes from the hub alone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct FromHub {
    /// Bytes that are here.
    pub(super) done_bytes: u64,
    /// The length of the file; 0: not known yet.
    pub(super) total_bytes: u64,
    /// Why nothing comes at the moment, if so.
    pub(super) trouble: Option<String>,
}

impl FromHub {
    /// Takes in what a pull tells. False: that is nothing of how far it is.
    fn hear(&mut self, event: PullEvent) -> bool {
        match event {
            PullEvent::Chosen { total_bytes, resumed_bytes: done_bytes, .. }
            | PullEvent::Progress { done_bytes, total_bytes } => {
                *self = FromHub { done_bytes, total_bytes, trouble: None };
            }
            PullEvent::Retrying { why, .. } => self.trouble = Some(why),
            PullEvent::MadeRoom { removed } => {
                for gone in removed {
                    let name = gone.names.first().map_or_else(|| gone.nameless(), ToString::to_string);
                    tracing::info!(
                        freed_bytes = gone.bytes,
                        "{name} was removed to make room for what comes from the hub"
                    );
                }
                return false;
            }
            PullEvent::AlreadyThere { .. } => return false,
        }
        true
    }
}

/// Looks for a file by its name on the hub.
pub(super) struct HubFinder {
    wanted: HubRef,
    /// What the hub says, or why it says nothing.
    told: Result<Told, String>,
}

/// What the hub says.
struct Told {
    place: HubRef,
    bytes: u64,
    /// In lower-case hex.
    sha256: Option<String>,
    /// Whether it is in several files there.
    is_split: bool,
}

/// A file that nodes have from a hub.
#[derive(Debug, Clone)]
pub(super) struct OfHub {
    pub(super) digest: ModelDigest,
    /// Where it is there, with its file and commit.
    pub(super) place: HubRef,
    /// What the hub says, in lower-case hex, if it could be asked.
    sha256: Option<String>,
}

impl HubFinder {
    /// Asks the hub which file is meant, if it can be asked.
    pub(super) async fn of(hub: &Hub, wanted: HubRef) -> Result<HubFinder, NodeError> {
        let config = match &hub.config {
            Ok(config) => config,
            Err(reason) => return Ok(HubFinder { wanted, told: Err(reason.clone()) }),
        };
        let told = match timeout(HUB_ANSWER_MAX, HubFile::open(config, &wanted)).await {
            Ok(Ok(file)) => Ok(Told {
                place: HubRef {
                    repo: wanted.repo.clone(),
                    revision: file.commit().to_owned(),
                    wanted: Some(file.file().to_owned()),
                },
                bytes: file.bytes(),
                sha256: file.sha256().map(str::to_owned),
                is_split: file.is_part(),
            }),
            // What there is not, nobody can have from there.
            Ok(Err(error @ StoreError::NotOnHub { .. })) => return Err(error.into()),
            Ok(Err(error)) => Err(with_causes(&error)),
            Err(_) => Err("the hub does not answer".to_owned()),
        };
        if let Err(reason) = &told {
            tracing::info!("{wanted} is looked for in the mesh alone: {reason}");
        }
        Ok(HubFinder { wanted, told })
    }

    /// Looks for it in the mesh. [`NodeError::Nowhere`]: no node has it, and the hub does; [`NodeError::NorOnHub`]: nor does the hub give it.
    pub(super) async fn search(&self, mesh: &MeshNode) -> Result<OfHub, NodeError> {
        // What its parts become when they are joined, the hub has no checksum of.
        if self.told.as_ref().is_ok_and(|told| told.is_split) {
            return Err(NodeError::Nowhere(self.wanted.to_string()));
        }
        let found = search_within(mesh, SEARCH_MAX, |table| self.find(table), &self.wanted).await;
        let (digest, place) = found.map_err(|error| match &self.told {
            Ok(_) => error,
            Err(reason) => NodeError::NorOnHub { name: self.wanted.to_string(), reason: reason.clone() },
        })?;
        Ok(OfHub { digest, place, sha256: self.told.as_ref().ok().and_then(|told| told.sha256.clone()) })
    }

    /// The file that most nodes have from there, and where that is.
    fn find(&self, table: &Table) -> Option<(ModelDigest, HubRef)> {
        let from_there = contents(table).filter(|content| content.held_bytes > 0).filter_map(|content| {
            let place: HubRef = content.source.as_ref()?.parse().ok()?;
            let is_it = match &self.told {
                Ok(told) => {
                    place.repo.eq_ignore_ascii_case(&self.wanted.repo)
                        && place.wanted == told.place.wanted
                        && content.file_bytes == told.bytes
                }
                Err(_) => place.is_in(&self.wanted),
            };
            is_it.then_some((content.digest, place))
        });
        let from_there: Vec<_> = from_there.collect();
        let file = match &self.told {
            Ok(told) => told.place.wanted.as_deref()?,
            Err(_) => {
                let mut files: Vec<&str> = from_there.iter().filter_map(|(_, place)| place.wanted.as_deref()).collect();
                files.sort_unstable();
                files.dedup();
                self.wanted.choose(&files)?
            }
        };
        let is_chosen = |(_, place): &&(ModelDigest, HubRef)| place.wanted.as_deref() == Some(file);
        let digest = by_count(from_there.iter().filter(is_chosen).map(|(digest, _)| *digest)).into_iter().next()?;
        let place = match &self.told {
            Ok(told) => told.place.clone(),
            Err(_) => from_there.iter().filter(is_chosen).find(|(of, _)| *of == digest)?.1.clone(),
        };
        Some((digest, place))
    }
}

impl OfHub {
    /// What it is called in a store.
    pub(super) fn name(&self) -> Result<ModelName, StoreError> {
        ModelName::from_hub_file(self.place.wanted.as_deref().unwrap_or_default())
    }

    /// Begins to fetch it from those who have it. `begun` hears of it as soon as it is known what comes.
    pub(super) async fn begin(
        &self,
        node: &Arc<Node>,
        mesh: &Arc<MeshNode>,
        begun: impl Fn(&Arc<Shelf>),
    ) -> Result<InUse, NodeError> {
        begin(node, mesh, self.name()?.as_str(), self.digest, |shelf| {
            shelf.on_hub().said = Some(self.place.clone());
            begun(shelf);
        })
        .await
    }

    /// Makes sure that what has come whole is the hub's. Blocks.
    pub(super) fn compare(&self, node: &Node, shelf: &Shelf) -> Result<(), NodeError> {
        let Some(of_hub) = self.sha256.clone() else { return Ok(()) };
        let sha256 = shelf.content.sha256()?;
        if sha256 == of_hub {
            shelf.on_hub().prove(&self.place);
            return Ok(shelf.flush()?);
        }
        shelf.on_hub().refute(self.place.clone());
        if let Err(error) = node.library.forget(&shelf.digest()) {
            tracing::warn!("what came as {} is not removed: {}", self.place, with_causes(&error));
        }
        Err(TakeError::NotTheHubs { place: self.place.to_string(), sha256, of_hub }.into())
    }

    /// Fetches it whole.
    pub(super) async fn fetch(
        self,
        node: &Arc<Node>,
        mesh: &Arc<MeshNode>,
        begun: impl Fn(&Arc<Shelf>),
    ) -> Result<InUse, NodeError> {
        let shelf = self.begin(node, mesh, begun).await?;
        shelf.fetch(node, mesh, &[shelf.whole()], false).await?;
        shelf.rest().await;
        let node = Arc::clone(node);
        blocking(move || {
            self.compare(&node, &shelf)?;
            Ok(shelf)
        })
        .await
    }
}
