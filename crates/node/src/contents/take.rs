//! Bytes of models' files from other nodes.
//!
//! One task for each file of which something is missing ([`Take`]): it watches who has what, lets [`Swarm`] decide whom to ask for which
//! part, and has each answer read by a thread that checks every group before it is kept. The task ends when nothing that is wanted is
//! missing, and another one begins when more is.

use std::{
    collections::HashMap,
    io::{self, Read},
    pin::Pin,
    sync::{Arc, PoisonError, Weak},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use murmur_core::planner::size;
use murmur_core::swarm::{
    Action, Event, GroupSet, Outcome, Progress, RequestId, SOURCES_MAX, SourceId, SourceKind, SourceProgress,
    SourceState, Swarm,
};
use murmur_gguf::ByteRange;
use murmur_net::{
    RecvStream,
    stream::{self, Reader},
};
use murmur_protocol::mesh::{Content, Fetch, HeldContent, ModelDigest, NodeId, Refused, Work, content::GROUP_BYTES};
use murmur_store::DecodeError;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncRead, ReadBuf},
    sync::{mpsc, watch},
    task::{AbortHandle, JoinSet},
    time::timeout,
};
use tokio_io_timeout::TimeoutReader;
use tokio_util::{
    io::SyncIoBridge,
    sync::{CancellationToken, DropGuard, WaitForCancellationFutureOwned},
};

use super::{Shelf, from_wire, length, pace::Paced, to_wire};
use crate::{Node, mesh::MeshNode, model::with_causes};

/// A node that is asked for bytes says within this whether it sends them.
const ANSWER_DEADLINE: Duration = Duration::from_secs(10);
/// A stream on which nothing comes for so long is given up; the swarm asks others long before.
const STALL_MAX: Duration = Duration::from_secs(30);
/// Before a node that could not be watched is tried again.
const RETRY: Duration = Duration::from_secs(2);
/// How often those who wait hear how far it is.
pub(super) const TELL_EVERY: Duration = Duration::from_millis(250);
/// Without anybody who has what is missing, this long is waited.
const NOBODY_MAX: Duration = Duration::from_secs(30);
/// Bytes that are read from a stream at once.
const READ_BYTES: usize = 64 << 10;
/// What those who fetch may leave unheard.
const HEARD_MAX: usize = 256;
/// What a node says of its part is listened to once in so long, however much it says.
const LISTEN_EVERY: Duration = Duration::from_millis(250);
/// Round trip to a node that was not spoken with yet.
const UNKNOWN_RTT_MS: u32 = 50;

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

/// How far a fetch is.
#[derive(Debug, Clone, Default)]
pub(crate) struct Standing {
    /// Since when nobody has what is missing, and what is known of that.
    stuck: Option<(Instant, String)>,
    /// Why it cannot go on here.
    broken: Option<String>,
    pub(crate) progress: Option<Progress>,
    /// Who is asked, by number in `progress`.
    pub(crate) sources: Vec<(SourceId, NodeId)>,
}

impl Standing {
    /// For `/api/status`: how far it is, and what each node does for it.
    pub(super) fn view(&self, progress: &Progress) -> Value {
        let node =
            |id: SourceId| self.sources.iter().find(|(source, _)| *source == id).map(|(_, node)| node.to_string());
        let source = |source: &SourceProgress| {
            json!({
                "node": node(source.id),
                "state": state(source.state),
                "rtt_ms": source.rtt_ms,
                "bytes_per_s": source.bytes_per_s as u64,
                "received_bytes": source.received_bytes,
                "owed_requests": source.owes.len(),
            })
        };
        json!({
            "wanted_bytes": progress.wanted_bytes,
            "done_bytes": progress.done_bytes,
            "doubled_bytes": progress.doubled_bytes,
            "bytes_per_s": progress.bytes_per_s as u64,
            "eta_s": progress.eta_ms.map(|ms| ms as f64 / 1e3),
            "stuck": self.why_nothing_comes(progress),
            "sources": progress.sources.iter().map(source).collect::<Vec<_>>(),
        })
    }

    fn why_nothing_comes(&self, progress: &Progress) -> Option<String> {
        let stuck = self.stuck.as_ref().map(|(_, reason)| reason.clone());
        let is_ready = |source: &SourceProgress| matches!(source.state, SourceState::Ready);
        let waits = !progress.sources.is_empty() && !progress.sources.iter().any(is_ready);
        stuck
            .or_else(|| waits.then(|| "those that have some of it are busy or silent; they are asked again".to_owned()))
    }
}

fn state(state: SourceState) -> &'static str {
    match state {
        SourceState::Ready => "ready",
        SourceState::Paused { .. } => "paused",
        SourceState::Slow { .. } => "slow",
    }
}

/// A task that fetches.
pub(crate) struct Taking {
    wants: mpsc::UnboundedSender<(GroupSet, bool)>,
    pub(crate) standing: watch::Receiver<Standing>,
}

impl Shelf {
    /// Waits until these bytes are here. `urgent`: they go before others that are wanted.
    pub(crate) async fn fetch(
        self: &Arc<Self>,
        node: &Arc<Node>,
        mesh: &Arc<MeshNode>,
        wanted: &[ByteRange],
        urgent: bool,
    ) -> Result<(), TakeError> {
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
        let wanted = (groups, urgent);
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

/// What a task hears of those that it has to do with.
enum Heard {
    Has(SourceId, Content),
    Lost(SourceId),
    Received(SourceId, RequestId, ByteRange),
    Ended(SourceId, RequestId, Result<(), Outcome>),
    Broken(String),
}

struct Source {
    node: NodeId,
    watching: AbortHandle,
}

/// A fetch.
struct Take {
    shelf: Arc<Shelf>,
    node: Weak<Node>,
    mesh: Weak<MeshNode>,
    swarm: Swarm,
    sources: HashMap<SourceId, Source>,
    /// Names of nodes that are, or were, sources.
    ids: HashMap<NodeId, SourceId>,
    /// What is under way. Taken out of here it is not wanted any more, and ends.
    under_way: HashMap<RequestId, DropGuard>,
    tasks: JoinSet<()>,
    tell: watch::Sender<Standing>,
    standing: Standing,
    hear: mpsc::Sender<Heard>,
    heard: mpsc::Receiver<Heard>,
    is_done: bool,
}

impl Take {
    fn new(shelf: &Arc<Shelf>, node: &Arc<Node>, mesh: &Arc<MeshNode>, tell: watch::Sender<Standing>) -> Take {
        let (hear, heard) = mpsc::channel(HEARD_MAX);
        // Who fetch the same file at the same time begin at different places.
        let salt = mesh.mesh().node_id().as_bytes().first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        Take {
            shelf: Arc::clone(shelf),
            node: Arc::downgrade(node),
            mesh: Arc::downgrade(mesh),
            swarm: Swarm::new(shelf.content.bytes(), salt),
            sources: HashMap::new(),
            ids: HashMap::new(),
            under_way: HashMap::new(),
            tasks: JoinSet::new(),
            tell,
            standing: Standing::default(),
            hear,
            heard,
            is_done: false,
        }
    }

    async fn run(mut self, mut wishes: mpsc::UnboundedReceiver<(GroupSet, bool)>) {
        let Some(mut table) = self.mesh.upgrade().map(|mesh| mesh.mesh().watch()) else { return };
        let mut ticks = tokio::time::interval(TELL_EVERY);
        while self.standing.broken.is_none() {
            tokio::select! {
                wish = wishes.recv() => {
                    let Some((groups, urgent)) = wish else { return };
                    self.is_done = false;
                    self.decide(Event::Want { groups, urgent });
                }
                Some(heard) = self.heard.recv() => self.hear(heard),
                changed = table.changed() => if changed.is_err() { return },
                _ = ticks.tick() => {
                    // One listens for those who come later.
                    if self.tell.receiver_count() <= 1 {
                        break;
                    }
                    self.look();
                    self.decide(Event::Tick);
                    self.standing.progress = Some(self.swarm.progress(self.now()));
                    self.tell.send_replace(self.standing.clone());
                }
                Some(_) = self.tasks.join_next(), if !self.tasks.is_empty() => {}
            }
            if self.is_done && wishes.is_empty() {
                break;
            }
        }
        // First nothing more is taken, then those who wait hear of it.
        wishes.close();
        self.tell.send_replace(self.standing.clone());
        self.heard.close();
        self.under_way.clear();
        self.sources.values().for_each(|source| source.watching.abort());
        while self.tasks.join_next().await.is_some() {}
        if let Err(error) = self.flush().await {
            tracing::warn!("{}: {error}", self.shelf.name);
        }
    }

    async fn flush(&self) -> Result<(), String> {
        let shelf = Arc::clone(&self.shelf);
        let flushed = tokio::task::spawn_blocking(move || shelf.content.flush().map_err(|error| with_causes(&error)));
        flushed.await.map_err(|error| error.to_string())?
    }

    fn now(&self) -> murmur_core::time::Now {
        self.mesh.upgrade().map_or(murmur_core::time::Now::ZERO, |mesh| mesh.now())
    }

    /// Begins to watch those who have some of it, and forgets who has left.
    fn look(&mut self) {
        let Some(mesh) = self.mesh.upgrade() else { return };
        let (digest, own, bytes) = (self.shelf.digest(), mesh.mesh().node_id(), self.shelf.content.bytes());
        let table = Arc::clone(&mesh.mesh().watch().borrow());
        let mut liars = self.shelf.liars();
        liars.retain(|node| table.contains_key(node));
        let has_some = |node: &NodeId| {
            let listed = table.get(node).map(|known| &known.verified.record().contents);
            let is_it = |content: &HeldContent| content.digest == digest && content.file_bytes == bytes;
            listed.is_some_and(|contents| contents.iter().any(is_it)) && !liars.contains(node)
        };
        let gone: Vec<SourceId> =
            self.sources.iter().filter(|(_, source)| !has_some(&source.node)).map(|(id, _)| *id).collect();
        let there: Vec<NodeId> = table.keys().filter(|node| **node != own && has_some(node)).copied().collect();
        drop(liars);
        for id in gone {
            if let Some(source) = self.sources.remove(&id) {
                source.watching.abort();
            }
            self.decide(Event::Left { id });
        }
        for node in there {
            let next = SourceId(u32::try_from(self.ids.len()).unwrap_or(u32::MAX));
            let id = *self.ids.entry(node).or_insert(next);
            if self.sources.len() < SOURCES_MAX && !self.sources.contains_key(&id) {
                let watching =
                    self.tasks.spawn(watch_source(Weak::clone(&self.mesh), digest, id, node, self.hear.clone()));
                self.sources.insert(id, Source { node, watching });
            }
        }
        self.standing.sources = self.sources.iter().map(|(id, source)| (*id, source.node)).collect();
    }

    fn hear(&mut self, heard: Heard) {
        match heard {
            Heard::Has(id, content) if content.file_bytes == self.shelf.content.bytes() => {
                // The first word counts until the header has been read.
                self.shelf.header_bytes.send_if_modified(|known| {
                    let is_news = *known == 0 && content.header_bytes > 0;
                    *known = if is_news { content.header_bytes } else { *known };
                    is_news
                });
                let node = self.sources.get(&id).map(|source| source.node);
                let rtt = node.and_then(|node| self.mesh.upgrade()?.mesh().round_trip(node));
                let rtt_ms = rtt.map_or(UNKNOWN_RTT_MS, |rtt| u32::try_from(rtt.as_millis()).unwrap_or(u32::MAX));
                let has = GroupSet::covering(&from_wire(&content.held));
                self.decide(Event::Source { id, kind: SourceKind::Peer, has, rtt_ms });
            }
            Heard::Has(..) => {}
            Heard::Lost(id) => self.decide(Event::Failed { id, request: None, outcome: Outcome::Gone }),
            Heard::Received(id, request, range) => {
                self.decide(Event::Received {
                    id,
                    request,
                    groups: range.start / GROUP_BYTES..range.end.div_ceil(GROUP_BYTES),
                });
            }
            Heard::Ended(id, request, outcome) => {
                let was_cancelled = self.under_way.remove(&request).is_none();
                match outcome {
                    // Of a request that was taken back nothing is owed; a lie is one all the same.
                    Err(outcome) if !was_cancelled || matches!(outcome, Outcome::Wrong) => {
                        self.decide(Event::Failed { id, request: Some(request), outcome });
                    }
                    Err(_) => {}
                    Ok(()) => self.decide(Event::Finished { id, request }),
                }
            }
            Heard::Broken(reason) => self.standing.broken = Some(reason),
        }
    }

    fn decide(&mut self, event: Event) {
        let before = self.standing.stuck.as_ref().map(|(since, _)| *since);
        for action in self.swarm.handle(event, self.now()) {
            self.act(action);
        }
        // To try those again of whom nothing is hoped is no news.
        if let (Some(before), Some((since, _))) = (before, &mut self.standing.stuck) {
            *since = before;
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Request { id, request, groups, .. } => {
                self.standing.stuck = None;
                let Some(source) = self.sources.get(&id) else { return };
                let unwanted = CancellationToken::new();
                self.under_way.insert(request, unwanted.clone().drop_guard());
                let ask = Ask {
                    shelf: Arc::clone(&self.shelf),
                    from: source.node,
                    ranges: groups.byte_ranges(self.shelf.content.bytes()),
                    unwanted,
                };
                let (node, mesh, hear) = (Weak::clone(&self.node), Weak::clone(&self.mesh), self.hear.clone());
                self.tasks.spawn(async move {
                    let heard = hear.clone();
                    let received = move |range| {
                        // The task is gone: so is whoever would want to know.
                        let _ = heard.blocking_send(Heard::Received(id, request, range));
                    };
                    let ended = match ask.run(&node, &mesh, received).await {
                        Ok(()) => Heard::Ended(id, request, Ok(())),
                        Err(Failure::Source(outcome)) => Heard::Ended(id, request, Err(outcome)),
                        Err(Failure::Store(reason)) => Heard::Broken(reason),
                    };
                    let _ = hear.send(ended).await;
                });
            }
            Action::Cancel { request, .. } => drop(self.under_way.remove(&request)),
            Action::Drop { id, reason } => {
                if let Some(source) = self.sources.remove(&id) {
                    source.watching.abort();
                    self.shelf.liars().insert(source.node);
                    let (node, name) = (source.node.short(), &self.shelf.name);
                    tracing::warn!(
                        "node {node} sends what is not of {name} ({reason}): it is not asked for it any more"
                    );
                }
            }
            Action::Done => self.is_done = true,
            Action::Stuck { reason, .. } => {
                let since = self.standing.stuck.as_ref().map_or_else(Instant::now, |(since, _)| *since);
                self.standing.stuck = Some((since, reason.to_string()));
            }
        }
    }
}

/// Hears from a node what it has, for as long as it is there.
async fn watch_source(
    mesh: Weak<MeshNode>,
    digest: ModelDigest,
    id: SourceId,
    node: NodeId,
    hear: mpsc::Sender<Heard>,
) {
    while let Some(mesh) = mesh.upgrade() {
        let opened = mesh.mesh().open_work(node).await;
        drop(mesh);
        if let Ok((mut send, recv)) = opened
            && let Ok(Ok(())) = timeout(ANSWER_DEADLINE, stream::write(&mut send, &Work::WatchContent(digest))).await
        {
            let mut reader = Reader::<Work>::new(recv);
            while let Ok(Some(message)) = reader.next().await {
                match message {
                    Work::Content(content) => {
                        if hear.send(Heard::Has(id, content)).await.is_err() {
                            return;
                        }
                    }
                    Work::Unknown { .. } => {}
                    _ => break,
                }
                tokio::time::sleep(LISTEN_EVERY).await;
            }
        }
        if hear.send(Heard::Lost(id)).await.is_err() {
            return;
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Why an answer has ended early.
enum Failure {
    Source(Outcome),
    Store(String),
}

/// One request to a node.
struct Ask {
    shelf: Arc<Shelf>,
    from: NodeId,
    ranges: Vec<ByteRange>,
    unwanted: CancellationToken,
}

impl Ask {
    async fn run(
        self,
        node: &Weak<Node>,
        mesh: &Weak<MeshNode>,
        mut received: impl FnMut(ByteRange) + Send + 'static,
    ) -> Result<(), Failure> {
        let gone = || Failure::Source(Outcome::Gone);
        let reader = self.unwanted.run_until_cancelled(self.begin(mesh)).await.ok_or_else(gone)??;
        let node = node.upgrade().ok_or_else(gone)?;
        let (recv, begun) = reader.into_rest();
        let mut patient = TimeoutReader::new(recv);
        patient.set_timeout(Some(STALL_MAX));
        let wanted = Wanted { stream: Box::pin(patient), unwanted: Box::pin(self.unwanted.cancelled_owned()) };
        let bridge = SyncIoBridge::new(wanted);
        let reading = tokio::task::spawn_blocking(move || {
            let stream = Paced(io::Cursor::new(begun).chain(bridge), &node.taking_pace);
            let mut stream = io::BufReader::with_capacity(READ_BYTES, stream);
            self.shelf.content.decode(&self.ranges, &mut stream, &mut received)
        });
        reading.await.map_err(|_| gone())?.map_err(|error| match error {
            DecodeError::Wrong { .. } => Failure::Source(Outcome::Wrong),
            DecodeError::Ended { .. } | DecodeError::Receive(_) => gone(),
            DecodeError::Store(error) => Failure::Store(with_causes(&error)),
        })
    }

    /// Asks, and hears that the bytes come.
    async fn begin(&self, mesh: &Weak<MeshNode>) -> Result<Reader<Work>, Failure> {
        let gone = || Failure::Source(Outcome::Gone);
        let opened = {
            let mesh = mesh.upgrade().ok_or_else(gone)?;
            mesh.mesh().open_work(self.from).await
        };
        let (mut send, recv) = opened.map_err(|_| gone())?;
        let mut reader = Reader::new(recv);
        let answer = async {
            let fetch = Work::Fetch(Fetch { model: self.shelf.digest(), ranges: to_wire(&self.ranges) });
            stream::write(&mut send, &fetch).await?;
            stream::finish(&mut send);
            reader.expect().await
        };
        match timeout(ANSWER_DEADLINE, answer).await {
            Ok(Ok(Work::Sending)) => Ok(reader),
            Ok(Ok(Work::Refused(Refused::Busy { retry_ms }))) => {
                Err(Failure::Source(Outcome::Busy { retry_ms: retry_ms.into() }))
            }
            Ok(Ok(Work::Refused(_))) => Err(Failure::Source(Outcome::Lacks)),
            _ => Err(gone()),
        }
    }
}

/// A stream that ends with an error as soon as nobody wants it any more.
struct Wanted {
    stream: Pin<Box<TimeoutReader<RecvStream>>>,
    unwanted: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl AsyncRead for Wanted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.unwanted.as_mut().poll(context) {
            Poll::Ready(()) => Poll::Ready(Err(io::Error::other("not wanted any more"))),
            Poll::Pending => self.stream.as_mut().poll_read(context, buffer),
        }
    }
}
