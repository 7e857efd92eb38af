//! Whole files that a user wants to have: found by name in the mesh, fetched, and entered in the store. A pull goes on when whoever
//! began it has gone.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use murmur_api::backend::Refusal;
use murmur_gguf::Digest;
use murmur_protocol::mesh::{IdError, ModelDigest, NodeId};
use murmur_store::{Content, HubRef, ModelEntry, Origin, StoreError};
use serde_json::{Value, json};
use tokio::{
    sync::{mpsc, watch},
    task::AbortHandle,
    time::timeout,
};

use super::{
    InUse, Shelf, Sought,
    hub_name::{FromHub, Hub, HubFinder},
    signers::{choose, demand, gather, gather_signed, not_signed},
    wanted::{begin, blocking, called, find, search_within},
};
use crate::{
    Node, NodeError,
    mesh::MeshNode,
    model::with_causes,
    signatures::{Attested, attestations, keep},
};

/// So long it is waited for a node that has the model.
const SEARCH_MAX: Duration = Duration::from_secs(30);
/// How often those who listen hear how far it is.
const TELL_EVERY: Duration = Duration::from_millis(500);
/// What those may leave unread.
const EVENTS_MAX: usize = 4;

/// Those that run, by name, and by who must have signed it.
#[derive(Default)]
pub(crate) struct Pulls(Mutex<BTreeMap<(String, Option<NodeId>), Pull>>);

struct Pull {
    state: watch::Receiver<State>,
    task: AbortHandle,
}

#[derive(Clone)]
enum State {
    Searching,
    Fetching(Arc<Shelf>),
    /// No node has it, and the hub gives it.
    FromHub(FromHub),
    /// It is here, as this view says.
    Done(Value),
    /// Why, and whether that is because nobody in the mesh has it: it may still be had from the hub.
    Failed {
        reason: String,
        is_nowhere: bool,
    },
}

impl State {
    /// How a pull has ended.
    fn of(pulled: Result<Pulled, NodeError>) -> State {
        pulled.map_or_else(
            |error| State::Failed {
                reason: with_causes(&error),
                is_nowhere: matches!(error, NodeError::Nowhere(_) | NodeError::NorOnHub { .. }),
            },
            |pulled| State::Done(pulled.view),
        )
    }

    /// How a pull has ended for which only the hub was asked. Whoever wanted it may have a key that this node has not, and can ask the hub as well.
    fn of_hub(pulled: Result<Pulled, NodeError>) -> State {
        match State::of(pulled) {
            State::Failed { reason, .. } => State::Failed { reason, is_nowhere: true },
            other => other,
        }
    }

    fn view(&self) -> Value {
        match self {
            State::Searching => json!({"state": "searching"}),
            State::Fetching(shelf) => view(shelf, "fetching"),
            State::FromHub(FromHub { done_bytes, total_bytes, trouble }) => json!({
                "state": "fetching", "from": "hub", "file_bytes": total_bytes, "held_bytes": done_bytes, "fetch": {"stuck": trouble},
            }),
            State::Done(view) => view.clone(),
            State::Failed { reason, is_nowhere } => {
                json!({"state": "failed", "reason": reason, "nowhere": is_nowhere})
            }
        }
    }

    fn is_last(&self) -> bool {
        matches!(self, State::Done(_) | State::Failed { .. })
    }
}

/// What is told of a file that comes from nodes.
fn view(shelf: &Shelf, state: &str) -> Value {
    let mut view = shelf.view();
    view["state"] = state.into();
    view["path"] = shelf.content.path().to_string_lossy().into();
    view
}

/// A model that is here now.
struct Pulled {
    path: PathBuf,
    /// What is told of it.
    view: Value,
}

impl From<ModelEntry> for Pulled {
    /// A file of the store.
    fn from(entry: ModelEntry) -> Pulled {
        let view = json!({
            "state": "done",
            "name": entry.name,
            "file_bytes": entry.size_bytes,
            "held_bytes": entry.size_bytes,
            "path": entry.path.to_string_lossy(),
        });
        Pulled { path: entry.path, view }
    }
}

/// Fetches a model whole, as a pull does, for something else of this node. Returns its file.
pub(crate) async fn fetch(
    node: &Arc<Node>,
    mesh: &Arc<MeshNode>,
    sought: &Sought,
    signer: Option<NodeId>,
) -> Result<PathBuf, NodeError> {
    let (tell, _) = watch::channel(State::Searching);
    Ok(pull(node, mesh, sought.clone(), signer, &tell).await?.path)
}

impl Pulls {
    fn pulls(&self) -> MutexGuard<'_, BTreeMap<(String, Option<NodeId>), Pull>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to pull a model, or listens to a pull that runs. Without a mesh, the hub may have it, but nobody who knows what was signed.
    pub(crate) fn begin(
        &self,
        node: &Node,
        name: String,
        signed_by: Option<String>,
    ) -> Result<mpsc::Receiver<Value>, Refusal> {
        let wrong = |param: &str, message| Refusal::BadRequest { message, param: Some(param.to_owned()), code: None };
        let sought: Sought = name.parse().map_err(|error: StoreError| wrong("model", error.to_string()))?;
        let signer: Option<NodeId> = signed_by
            .map(|key| key.parse::<NodeId>())
            .transpose()
            .map_err(|error: IdError| wrong("signed_by", error.to_string()))?;
        let mut pulls = self.pulls();
        pulls.retain(|_, pull| !pull.task.is_finished());
        let order = (name, signer);
        let state = match pulls.get(&order) {
            Some(pull) => pull.state.clone(),
            None => {
                let (tell, state) = watch::channel(State::Searching);
                let task = match (sought, node.mesh.get()) {
                    (sought, Some(mesh)) => {
                        let ending = || Refusal::Failed { message: "this node is stopping".to_owned() };
                        let (node, own) = (mesh.node().ok_or_else(ending)?, Arc::clone(mesh));
                        mesh.spawn(async move {
                            let pulled = pull(&node, &own, sought, signer, &tell).await;
                            tell.send_replace(State::of(pulled));
                        })
                    }
                    (Sought::Hub(reference), None) if signer.is_none() => {
                        let hub = Hub::of(node);
                        node.tend(async move {
                            let pulled = pull_from_hub(&hub, &reference, &tell).await;
                            tell.send_replace(State::of_hub(pulled));
                        })
                    }
                    (_, None) => return Err(node.no_mesh()),
                };
                pulls.insert(order, Pull { state: state.clone(), task });
                state
            }
        };
        let (events, heard) = mpsc::channel(EVENTS_MAX);
        tokio::spawn(tell_on(state, events));
        Ok(heard)
    }

    /// Ends those of a name. False: there was none.
    pub(crate) fn stop(&self, name: &str) -> bool {
        let mut pulls = self.pulls();
        let ended = pulls.extract_if(.., |(pulled, _), _| pulled == name);
        ended.fold(false, |ran, (_, pull)| {
            let runs = !pull.task.is_finished();
            pull.task.abort();
            ran || runs
        })
    }
}

/// Tells somebody how far it is, until it is over or nobody listens.
async fn tell_on(mut state: watch::Receiver<State>, events: mpsc::Sender<Value>) {
    loop {
        let now = state.borrow_and_update().clone();
        if events.send(now.view()).await.is_err() || now.is_last() {
            return;
        }
        if let Ok(Err(_)) = timeout(TELL_EVERY, state.changed()).await {
            let stopped = json!({"state": "failed", "reason": "it was stopped; what has come is kept"});
            let _ = events.send(stopped).await;
            return;
        }
    }
}

/// Gets a model that is not here from those of a mesh who have it, or else from the hub. With a signer, nothing is taken that it has not signed.
async fn pull(
    node: &Arc<Node>,
    mesh: &Arc<MeshNode>,
    sought: Sought,
    signer: Option<NodeId>,
    tell: &watch::Sender<State>,
) -> Result<Pulled, NodeError> {
    let begun = |shelf: &Arc<Shelf>| drop(tell.send_replace(State::Fetching(Arc::clone(shelf))));
    let (shelf, signed) = match sought {
        Sought::Name(name) => {
            let (store, known) = (node.library.store(), name.clone());
            if let Some(entry) = blocking(move || Ok(store.find_whole(&known)?)).await? {
                return have(node, mesh, entry, signer).await;
            }
            let digest = search_within(mesh, SEARCH_MAX, |table| find(table, name.as_str()), &name).await?;
            let (digest, signed) = choose(mesh, name.as_str(), digest, signer).await?;
            let shelf = begin(node, mesh, &called(mesh, digest, name.as_str()), digest, begun).await?;
            shelf.fetch(node, mesh, &[shelf.whole()], false).await?;
            (shelf, signed)
        }
        Sought::Hub(reference) => {
            let hub = Hub::of(node);
            if let Some(entry) = hub.find_pulled(&reference).await? {
                return have(node, mesh, entry, signer).await;
            }
            let name = reference.to_string();
            match HubFinder::of(&hub, reference.clone()).await?.search(mesh).await {
                Ok(of_hub) => {
                    let signed = demand(mesh, &name, of_hub.digest, signer).await?;
                    (of_hub.fetch(node, mesh, begun).await?, signed)
                }
                Err(NodeError::Nowhere(_)) => match signer {
                    None => return pull_from_hub(&hub, &reference, tell).await,
                    Some(signer) => return Err(not_signed(&name, signer, &[])),
                },
                Err(error) => return Err(error),
            }
        }
    };
    enter(node, mesh, shelf, signed, signer).await
}

/// Enters a file that has come in the store, with what is known to have been signed of it.
async fn enter(
    node: &Arc<Node>,
    mesh: &Arc<MeshNode>,
    shelf: InUse,
    signed: Vec<Attested>,
    signer: Option<NodeId>,
) -> Result<Pulled, NodeError> {
    let signed = match signer {
        Some(_) => signed,
        None => gather(mesh, shelf.digest(), None).await,
    };
    let (node, first) = (Arc::clone(node), signer.into_iter().chain([mesh.mesh().node_id()]).collect::<Vec<_>>());
    blocking(move || {
        // What was signed can be had again; the file is here.
        if let Err(error) = keep(&shelf.content, signed, &first) {
            tracing::warn!("what was signed of {} is not kept: {}", shelf.name, with_causes(&error));
        }
        shelf.enter(&node.library.store())?;
        let mut view = view(&shelf, "done");
        view["signatures"] = shelf.view_attestations();
        Ok(Pulled { path: shelf.content.path().to_owned(), view })
    })
    .await
}

/// What is told of a model that is here already, if the signer has signed it: what lies beside it says so, or a node shows it.
async fn have(
    node: &Arc<Node>,
    mesh: &Arc<MeshNode>,
    entry: ModelEntry,
    signer: Option<NodeId>,
) -> Result<Pulled, NodeError> {
    let Some(signer) = signer else { return Ok(entry.into()) };
    let (contents, of) = (node.library.store().contents(), entry.clone());
    let (content, known): (Content, Vec<Attested>) = blocking(move || {
        let content = match &of.origin {
            Origin::Mesh { digest } => contents.find(digest)?.ok_or(StoreError::ContentGone { digest: *digest })?,
            _ => contents.adopt(&of.path, &mut |_, _| ())?,
        };
        let known = attestations(&content)?;
        Ok((content, known))
    })
    .await?;
    if !known.iter().any(|attested| attested.is_by(signer)) {
        let Digest(digest) = content.digest();
        let shown = gather_signed(mesh, ModelDigest::from_bytes(digest), signer).await;
        let shown = shown.map_err(|others| {
            let others: Vec<Attested> = known.into_iter().chain(others).collect();
            not_signed(entry.name.as_str(), signer, &others)
        })?;
        blocking(move || Ok(keep(&content, shown, &[signer])?)).await?;
    }
    Ok(entry.into())
}

/// Gets a model from the hub alone, unless it was pulled before.
async fn pull_from_hub(hub: &Hub, reference: &HubRef, tell: &watch::Sender<State>) -> Result<Pulled, NodeError> {
    if let Some(entry) = hub.find_pulled(reference).await? {
        return Ok(entry.into());
    }
    let told = tell.clone();
    let heard = move |from_hub| drop(told.send_replace(State::FromHub(from_hub)));
    Ok(hub.pull(reference, heard).await?.into())
}
