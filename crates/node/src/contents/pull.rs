//! Whole files that a user wants to have: found by name in the mesh, fetched, and entered in the store. A pull goes on when whoever
//! began it has gone.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use murmur_api::backend::Refusal;
use murmur_store::{HubRef, ModelName, StoreError};
use serde_json::{Value, json};
use tokio::{
    sync::{mpsc, watch},
    task::AbortHandle,
    time::timeout,
};

use super::{
    Shelf,
    hub_name::HubFinder,
    wanted::{begin, blocking, find, search_within},
};
use crate::{Node, NodeError, mesh::MeshNode, model::with_causes};

/// So long it is waited for a node that has the model.
const SEARCH_MAX: Duration = Duration::from_secs(30);
/// How often those who listen hear how far it is.
const TELL_EVERY: Duration = Duration::from_millis(500);
/// What those may leave unread.
const EVENTS_MAX: usize = 4;

/// Those that run, by name.
#[derive(Default)]
pub(crate) struct Pulls(Mutex<BTreeMap<String, Pull>>);

struct Pull {
    state: watch::Receiver<State>,
    task: AbortHandle,
}

#[derive(Clone)]
enum State {
    Searching,
    Fetching(Arc<Shelf>),
    Done(Arc<Shelf>),
    /// Why, and whether that is because nobody in the mesh has it: it may still be had from the hub.
    Failed {
        reason: String,
        is_nowhere: bool,
    },
}

impl State {
    fn view(&self) -> Value {
        match self {
            State::Searching => json!({"state": "searching"}),
            State::Fetching(shelf) | State::Done(shelf) => {
                let mut view = shelf.view();
                view["state"] = if matches!(self, State::Done(_)) { "done" } else { "fetching" }.into();
                view["path"] = shelf.content.path().to_string_lossy().into();
                view
            }
            State::Failed { reason, is_nowhere } => {
                json!({"state": "failed", "reason": reason, "nowhere": is_nowhere})
            }
        }
    }

    fn is_last(&self) -> bool {
        matches!(self, State::Done(_) | State::Failed { .. })
    }
}

impl Pulls {
    fn pulls(&self) -> MutexGuard<'_, BTreeMap<String, Pull>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to pull a model, or listens to a pull that runs.
    pub(crate) fn begin(
        &self,
        node: &Arc<Node>,
        mesh: &Arc<MeshNode>,
        name: String,
    ) -> Result<mpsc::Receiver<Value>, Refusal> {
        let sought = Sought::parse(&name).map_err(|error| Refusal::BadRequest {
            message: error.to_string(),
            param: Some("model".to_owned()),
            code: None,
        })?;
        let mut pulls = self.pulls();
        pulls.retain(|_, pull| !pull.task.is_finished());
        let state = match pulls.get(&name) {
            Some(pull) => pull.state.clone(),
            None => {
                let (tell, state) = watch::channel(State::Searching);
                let (node, mesh_node) = (Arc::clone(node), Arc::clone(mesh));
                let task = mesh.spawn(async move {
                    let last = match run(&node, &mesh_node, sought, &tell).await {
                        Ok(shelf) => State::Done(shelf),
                        Err(error) => State::Failed {
                            reason: with_causes(&error),
                            is_nowhere: matches!(error, NodeError::Nowhere(_)),
                        },
                    };
                    tell.send_replace(last);
                });
                pulls.insert(name, Pull { state: state.clone(), task });
                state
            }
        };
        let (events, heard) = mpsc::channel(EVENTS_MAX);
        tokio::spawn(tell_on(state, events));
        Ok(heard)
    }

    /// Ends one. False: there was none.
    pub(crate) fn stop(&self, name: &str) -> bool {
        let pull = self.pulls().remove(name);
        pull.is_some_and(|pull| {
            let runs = !pull.task.is_finished();
            pull.task.abort();
            runs
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

/// What a user asks for.
enum Sought {
    Name(ModelName),
    Hub(HubRef),
}

impl Sought {
    fn parse(name: &str) -> Result<Sought, StoreError> {
        match name.starts_with("hf:") {
            true => name.parse().map(Sought::Hub),
            false => name.parse().map(Sought::Name),
        }
    }
}

async fn run(
    node: &Arc<Node>,
    mesh: &Arc<MeshNode>,
    sought: Sought,
    tell: &watch::Sender<State>,
) -> Result<Arc<Shelf>, NodeError> {
    let begun = |shelf: &Arc<Shelf>| drop(tell.send_replace(State::Fetching(Arc::clone(shelf))));
    let shelf = match sought {
        Sought::Name(name) => {
            let digest = search_within(mesh, SEARCH_MAX, |table| find(table, name.as_str()), &name).await?;
            let shelf = begin(node, mesh, name.as_str(), digest, begun).await?;
            shelf.fetch(node, mesh, &[shelf.whole()], false).await?;
            shelf
        }
        Sought::Hub(reference) => HubFinder::of(node, reference).await?.fetch(node, mesh, begun).await?,
    };
    let node = Arc::clone(node);
    blocking(move || {
        shelf.enter(&node.options().data_dir)?;
        Ok(shelf)
    })
    .await
}
