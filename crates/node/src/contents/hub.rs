//! The hub as one more source of a file that comes from other nodes.
//!
//! A hub has no hashes of parts. So it is asked for what some node has and gives the hashes of: these come first, and every group that the
//! hub sends is checked with them like any other. Where the file lies on the hub is told by nodes that have it from there, or by the user; a
//! wrong word costs one question, or one group.

use std::{
    io::{self, Read},
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use murmur_core::swarm::{GroupSet, Outcome, SourceId};
use murmur_gguf::ByteRange;
use murmur_protocol::mesh::{NodeId, content::FETCH_RANGES_MAX};
use murmur_store::{
    DecodeError, HubRef, StoreError,
    hub::{HubConfig, HubFile, RangeError, Transfer},
};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::{
    Shelf,
    ask::{Ask, Failure, READ_BYTES, What},
    pace::Paced,
};
use crate::{Node, mesh::MeshNode, model::with_causes};

/// Before a hub that could not be reached is tried again.
const RETRY: Duration = Duration::from_secs(30);
/// Nodes that are asked for the hashes of a part, at most.
const PROVERS_MAX: usize = 4;
/// What the hub is left alone for when nobody gives the hashes. Milliseconds.
const PROOF_RETRY_MS: u64 = 1_000;

/// The file on the hub, as soon as that can be reached, and how long it took to answer; or why it is of no use.
pub(super) async fn find(config: HubConfig, source: HubRef, bytes: u64) -> Result<(HubFile, Duration), String> {
    loop {
        let asked = Instant::now();
        match HubFile::open(&config, &source).await {
            Ok(file) if file.bytes() == bytes => return Ok((file, asked.elapsed())),
            Ok(file) => return Err(format!("{source} has {} bytes there, and not {bytes}", file.bytes())),
            Err(error @ StoreError::HubUnavailable { .. }) => {
                tracing::debug!("{source} is asked for again later: {}", with_causes(&error));
                tokio::time::sleep(RETRY).await;
            }
            Err(error) => return Err(with_causes(&error)),
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

/// One request to the hub.
pub(super) struct AskHub {
    pub(super) shelf: Arc<Shelf>,
    pub(super) file: Arc<HubFile>,
    /// Whom to ask for hashes, the nearest first.
    pub(super) provers: Vec<Prover>,
    pub(super) ranges: Vec<ByteRange>,
    pub(super) unwanted: CancellationToken,
}

impl AskHub {
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
            let AskHub { shelf, file, ranges, unwanted, .. } = self;
            let left = ranges.clone().into_iter();
            let mut parts = Parts { file: &file, left, transfer: None, runtime, unwanted, failure: None };
            let mut stream = io::BufReader::with_capacity(READ_BYTES, Paced(&mut parts, &node.taking_pace));
            let filled = shelf.content.fill(&ranges, &mut stream, &mut received);
            drop(stream);
            filled.map_err(|error| failure(error, parts.failure))
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
            let busy = Failure::Source(Outcome::Busy { retry_ms: PROOF_RETRY_MS });
            let Prover { id, node: from, held } = provers.next().ok_or(busy)?;
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

fn failure(error: DecodeError, of_hub: Option<RangeError>) -> Failure {
    match (error, of_hub) {
        (DecodeError::Wrong { .. }, _) => Failure::Source(Outcome::Wrong),
        // Somebody has given up the hashes in the meantime.
        (DecodeError::Store(StoreError::ContentLacks { .. }), _) => {
            Failure::Source(Outcome::Busy { retry_ms: PROOF_RETRY_MS })
        }
        (DecodeError::Store(error), _) => Failure::Store(with_causes(&error)),
        (_, Some(RangeError::Later { retry_after: Some(wait), .. })) => {
            let retry_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
            Failure::Source(Outcome::Busy { retry_ms })
        }
        (_, Some(RangeError::Later { .. }) | None) => Failure::GONE,
        (_, Some(error @ (RangeError::Changed { .. } | RangeError::Final(_)))) => Failure::Useless(error.to_string()),
    }
}

/// Ranges of a file on a hub, one after the other. Ends with an error as soon as nobody wants them any more.
struct Parts<'a> {
    file: &'a HubFile,
    left: std::vec::IntoIter<ByteRange>,
    transfer: Option<Transfer<'a>>,
    runtime: Handle,
    unwanted: CancellationToken,
    /// Why reading has failed.
    failure: Option<RangeError>,
}

impl Parts<'_> {
    async fn next(&mut self, buffer: &mut [u8]) -> Result<usize, RangeError> {
        loop {
            if let Some(transfer) = &mut self.transfer {
                match transfer.read(buffer).await? {
                    0 => self.transfer = None,
                    read => return Ok(read),
                }
            }
            let Some(range) = self.left.next() else { return Ok(0) };
            self.transfer = Some(self.file.range(range).await?);
        }
    }
}

impl Read for Parts<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let (runtime, unwanted) = (self.runtime.clone(), self.unwanted.clone());
        match runtime.block_on(unwanted.run_until_cancelled(self.next(buffer))) {
            Some(Ok(read)) => Ok(read),
            Some(Err(error)) => {
                self.failure = Some(error);
                Err(io::Error::other("the hub does not send it"))
            }
            None => Err(io::Error::other("not wanted any more")),
        }
    }
}
