//! Sources that have bytes and no hashes: the hub ([`hub`]), and other files of this machine ([`twin`](super::twin)).
//!
//! They are asked for what some node has and gives the hashes of: these come first, and every group is checked with them like any other.

use std::sync::{Arc, Weak};

use murmur_core::swarm::{GroupSet, Outcome, SourceId};
use murmur_gguf::ByteRange;
use murmur_protocol::mesh::{NodeId, content::FETCH_RANGES_MAX};
use murmur_store::hub::HubFile;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::{
    Shelf,
    ask::{Ask, Failure, What},
    hub,
    twin::Twin,
};
use crate::{Node, mesh::MeshNode, model::with_causes};

/// Nodes that are asked for the hashes of a part, at most.
const PROVERS_MAX: usize = 4;
/// What a source is left alone for when nobody gives the hashes. Milliseconds.
const UNPROVEN_RETRY_MS: u64 = 1_000;
/// Nobody gives the hashes now.
pub(super) const UNPROVEN: Failure = Failure::Source(Outcome::Busy { retry_ms: UNPROVEN_RETRY_MS });

/// Where the bytes come from.
#[derive(Clone)]
pub(super) enum Supply {
    Hub(Arc<HubFile>),
    Twin(Arc<Twin>),
}

impl Supply {
    /// What it has of a file of `file_bytes`.
    pub(super) fn has(&self, file_bytes: u64) -> GroupSet {
        match self {
            Supply::Hub(_) => GroupSet::all(file_bytes),
            Supply::Twin(twin) => twin.has(),
        }
    }
}

/// A node that has hashes.
pub(super) struct Prover {
    pub(super) id: SourceId,
    pub(super) node: NodeId,
    /// Of which groups.
    pub(super) held: GroupSet,
}

/// One request to such a source.
pub(super) struct AskUnproven {
    pub(super) shelf: Arc<Shelf>,
    pub(super) supply: Supply,
    /// Whom to ask for hashes, the nearest first.
    pub(super) provers: Vec<Prover>,
    pub(super) ranges: Vec<ByteRange>,
    pub(super) unwanted: CancellationToken,
}

impl AskUnproven {
    /// Asks, and keeps what is right of the answer. Each group that was kept is `received`. Says as well which nodes have sent wrong hashes.
    pub(super) async fn run(
        self,
        node: &Weak<Node>,
        mesh: &Weak<MeshNode>,
        received: impl FnMut(ByteRange) + Send + 'static,
    ) -> (Result<(), Failure>, Vec<SourceId>) {
        let mut liars = Vec::new();
        let ended = match self.prove(node, mesh, &mut liars).await {
            Ok(()) => self.fill(node, received).await,
            Err(failure) => Err(failure),
        };
        (ended, liars)
    }

    async fn fill(
        self,
        node: &Weak<Node>,
        mut received: impl FnMut(ByteRange) + Send + 'static,
    ) -> Result<(), Failure> {
        let node = node.upgrade().ok_or(Failure::GONE)?;
        let runtime = Handle::current();
        let reading = tokio::task::spawn_blocking(move || {
            let AskUnproven { shelf, supply, ranges, unwanted, .. } = self;
            match supply {
                Supply::Hub(file) => {
                    let way = (runtime, &node.taking_pace);
                    hub::fill(&shelf, &file, &ranges, way, unwanted, &mut received)
                }
                Supply::Twin(twin) => twin.fill(&shelf.content, &ranges, &unwanted, &mut received),
            }
        });
        reading.await.map_err(|_| Failure::GONE)?
    }

    /// Gets the hashes that are not here yet.
    async fn prove(&self, node: &Weak<Node>, mesh: &Weak<MeshNode>, liars: &mut Vec<SourceId>) -> Result<(), Failure> {
        let mut provers = self.provers.iter().take(PROVERS_MAX);
        loop {
            let (shelf, ranges) = (Arc::clone(&self.shelf), self.ranges.clone());
            let unproven = tokio::task::spawn_blocking(move || shelf.content.unproven(&ranges)).await;
            let unproven = unproven.map_err(|_| Failure::GONE)?.map_err(|error| Failure::Store(with_causes(&error)))?;
            if unproven.is_empty() {
                return Ok(());
            }
            let Prover { id, node: from, held } = provers.next().ok_or(UNPROVEN)?;
            let mut ranges = GroupSet::covering(&unproven).intersection(held).byte_ranges(self.shelf.content.bytes());
            ranges.truncate(FETCH_RANGES_MAX);
            if ranges.is_empty() {
                continue;
            }
            let ask = Ask {
                shelf: Arc::clone(&self.shelf),
                from: *from,
                what: What::Hashes,
                ranges,
                unwanted: self.unwanted.clone(),
            };
            match ask.run(node, mesh, |_| ()).await {
                Err(Failure::Source(Outcome::Wrong)) => liars.push(*id),
                Err(Failure::Store(reason)) => return Err(Failure::Store(reason)),
                // What has not come, another one is asked for.
                Ok(()) | Err(Failure::Source(_) | Failure::Useless(_)) => {}
            }
        }
    }
}
