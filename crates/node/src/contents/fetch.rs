//! What is missing of a file, fetched from other nodes and from the hub.
//!
//! One task for each file of which something is missing ([`Take`]). It ends when nothing that is wanted is missing, and another one begins when
//! more is.

use std::{
    sync::{Arc, PoisonError},
    time::Duration,
};

use murmur_core::{planner::size, swarm::GroupSet};
use murmur_gguf::ByteRange;
use tokio::sync::{mpsc, watch};

use super::{Shelf, length, room::Promise, standing::Standing, take::Take};
use crate::{Node, mesh::MeshNode, model::with_causes};

/// Without anybody who has what is missing, this long is waited.
const NOBODY_MAX: Duration = Duration::from_secs(30);

/// Why bytes of a model's file do not come from other nodes.
#[derive(Debug, Clone, thiserror::Error)]
pub enum TakeError {
    /// Nobody has them.
    #[error("{} of {name} are missing: {reason}. It goes on when a node that has them is there", size(*missing_bytes))]
    Nobody {
        /// Of which model.
        name: String,
        /// How many.
        missing_bytes: u64,
        /// What is known of those who could have them.
        reason: String,
    },
    /// They are of another file than the hub's.
    #[error(
        "what the nodes of this mesh have as {place} is not what the hub has: its SHA-256 is {sha256}, and the hub's is {of_hub}. Nothing of it \
         was kept; get it from the hub alone, where no server is in a mesh"
    )]
    NotTheHubs {
        /// What was asked for.
        place: String,
        /// Of what came, in lower-case hex.
        sha256: String,
        /// Of what should have come.
        of_hub: String,
    },
    /// They cannot be kept.
    #[error("what comes of {name} cannot be kept: {reason}")]
    Store {
        /// Of which model.
        name: String,
        /// Why.
        reason: String,
    },
    /// The node ends.
    #[error("this node is stopping")]
    Stopping,
}

/// Groups that somebody waits for. `urgent`: they go before others.
pub(super) struct Wish {
    pub(super) groups: GroupSet,
    pub(super) urgent: bool,
}

/// A task that fetches.
pub(super) struct Taking {
    wants: mpsc::UnboundedSender<Wish>,
    standing: watch::Receiver<Standing>,
}

impl Shelf {
    /// Waits until these bytes are here, for which room is made first. `urgent`: they go before others that are wanted.
    pub(crate) async fn fetch(
        self: &Arc<Self>,
        node: &Arc<Node>,
        mesh: &Arc<MeshNode>,
        wanted: &[ByteRange],
        urgent: bool,
    ) -> Result<(), TakeError> {
        let missing = self.content.missing(wanted);
        if missing.is_empty() {
            return Ok(());
        }
        let _room = self.make_room(node, GroupSet::covering(&missing)).await?;
        loop {
            let missing = self.content.missing(wanted);
            if missing.is_empty() {
                return Ok(());
            }
            let mut standing = self.want(node, mesh, GroupSet::covering(&missing), urgent);
            while standing.changed().await.is_ok() {
                let missing = self.content.missing(wanted);
                let now = standing.borrow_and_update();
                if missing.is_empty() {
                    return Ok(());
                }
                if let Some(reason) = &now.broken {
                    return Err(TakeError::Store { name: self.name.clone(), reason: reason.clone() });
                }
                if let Some((since, reason)) = &now.stuck
                    && since.elapsed() >= NOBODY_MAX
                {
                    let (name, missing_bytes) = (self.name.clone(), length(&missing));
                    return Err(TakeError::Nobody { name, missing_bytes, reason: reason.clone() });
                }
            }
            if mesh.mesh().watch().has_changed().is_err() {
                return Err(TakeError::Stopping);
            }
        }
    }

    async fn make_room(self: &Arc<Self>, node: &Arc<Node>, groups: GroupSet) -> Result<Promise, TakeError> {
        let (node, shelf) = (Arc::clone(node), Arc::clone(self));
        let made = tokio::task::spawn_blocking(move || {
            let made = node.room.make(&node.library.store(), &shelf, groups);
            // What has gone takes room for as long as it is open.
            drop(node.library.list());
            made.map_err(|error| TakeError::Store { name: shelf.name.clone(), reason: with_causes(&error) })
        });
        made.await.map_err(|_| TakeError::Stopping)?
    }

    /// Waits until nothing of it is being fetched.
    pub(super) async fn rest(&self) {
        if let Some(mut standing) = self.last_standing() {
            while standing.changed().await.is_ok() {}
        }
    }

    fn last_standing(&self) -> Option<watch::Receiver<Standing>> {
        let taking = self.taking.lock().unwrap_or_else(PoisonError::into_inner);
        taking.as_ref().map(|taking| taking.standing.clone())
    }

    /// How far the fetch of it is, if there is one.
    pub(crate) fn standing(&self) -> Option<Standing> {
        let taking = self.taking.lock().unwrap_or_else(PoisonError::into_inner);
        taking.as_ref().filter(|taking| !taking.wants.is_closed()).map(|taking| taking.standing.borrow().clone())
    }

    fn want(
        self: &Arc<Self>,
        node: &Arc<Node>,
        mesh: &Arc<MeshNode>,
        groups: GroupSet,
        urgent: bool,
    ) -> watch::Receiver<Standing> {
        let mut taking = self.taking.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = Wish { groups, urgent };
        let wanted = match taking.as_ref() {
            Some(taking) => match taking.wants.send(wanted) {
                Ok(()) => return taking.standing.clone(),
                Err(mpsc::error::SendError(wanted)) => wanted,
            },
            None => wanted,
        };
        let (wants, wishes) = mpsc::unbounded_channel();
        let (tell, standing) = watch::channel(Standing::default());
        // The other end is held below.
        let _ = wants.send(wanted);
        let take = Take::new(self, node, mesh, tell);
        mesh.spawn(take.run(wishes));
        *taking = Some(Taking { wants, standing: standing.clone() });
        standing
    }
}
