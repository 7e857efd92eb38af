//! The task that fetches a file: it watches who has what, lets [`Swarm`] decide whom to ask for which part, and has each answer read by a
//! thread that checks every group before it is kept ([`ask`], [`unproven`](super::unproven)).

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Weak, atomic::Ordering},
    time::{Duration, Instant},
};

use murmur_core::swarm::{
    Action, Event, GroupSet, Outcome, RequestId, SOURCES_MAX, SourceId, SourceKind, Swarm,
    source::{RANGES_MAX, WINDOW_GROUPS},
};
use murmur_gguf::{ByteRange, Gguf};
use murmur_net::{Table, endpoint::STREAM_WINDOW_BYTES};
use murmur_protocol::mesh::{Content, HeldContent, NodeId, content::GROUP_BYTES};
use murmur_store::{
    HubRef,
    hub::{HubConfig, HubFile},
};
use tokio::{
    sync::{mpsc, watch},
    task::{AbortHandle, JoinSet},
};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    Shelf,
    ask::{self, Ask, Failure, What},
    fetch::Wish,
    from_wire,
    give::longest,
    hub,
    standing::{Standing, Who},
    twin::{self, Twin},
    unproven::{AskUnproven, Prover, Supply},
};
use crate::{Node, mesh::MeshNode, model::with_causes};

const _: () = assert!(
    WINDOW_GROUPS * GROUP_BYTES <= STREAM_WINDOW_BYTES as u64,
    "the swarm does not count on more than a stream takes"
);

/// How often those who wait hear how far it is.
pub(super) const TELL_EVERY: Duration = Duration::from_millis(250);
/// What those who fetch may leave unheard.
const HEARD_MAX: usize = 256;
/// Round trip to a node that was not spoken with yet.
const UNKNOWN_RTT_MS: u32 = 50;
/// The hub is asked for a file under so many names at most: anybody may say one.
const HUB_NAMES_MAX: usize = 4;

/// What a task hears of those that it has to do with.
enum Heard {
    Has(SourceId, Content),
    Lost(SourceId),
    /// Other files of this machine may have some of it.
    Twins(Vec<Twin>),
    /// The hub has the file, and took so long to say so.
    OnHub(SourceId, Arc<HubFile>, Duration),
    Received(SourceId, RequestId, ByteRange),
    Ended(SourceId, RequestId, Result<(), Failure>),
    /// The hub is of no use for this file.
    Useless(SourceId, String),
    /// What it sends is not of the file.
    Lies(SourceId),
}

struct Source {
    who: Who,
    watching: Option<AbortHandle>,
    /// What it has; where it has no hashes, what of that can be checked.
    has: GroupSet,
    gives_hashes: bool,
    rtt_ms: u32,
    /// Where it has no hashes: the bytes, as soon as they are known.
    supply: Option<Supply>,
}

impl Source {
    fn new(who: Who, watching: Option<AbortHandle>, supply: Option<Supply>) -> Source {
        Source { who, watching, has: GroupSet::default(), gives_hashes: false, rtt_ms: UNKNOWN_RTT_MS, supply }
    }

    fn is_left(&self) {
        self.watching.iter().for_each(AbortHandle::abort);
    }
}

/// A fetch.
pub(super) struct Take {
    shelf: Arc<Shelf>,
    node: Weak<Node>,
    mesh: Weak<MeshNode>,
    /// `None`: the hub is not asked.
    hub: Option<HubConfig>,
    /// Whether it is asked also for what only other nodes say that it has.
    hub_by_word: bool,
    swarm: Swarm,
    sources: HashMap<SourceId, Source>,
    /// Names of those that are, or were, sources.
    ids: HashMap<Who, SourceId>,
    /// Places on the hub that are of no use.
    useless: HashSet<HubRef>,
    /// What is under way. Taken out of here it is not wanted any more, and ends.
    under_way: HashMap<RequestId, DropGuard>,
    tasks: JoinSet<()>,
    tell: watch::Sender<Standing>,
    standing: Standing,
    /// Whether it was looked for files of this machine that have some of it.
    has_sought_twins: bool,
    hear: mpsc::Sender<Heard>,
    heard: mpsc::Receiver<Heard>,
    is_done: bool,
}

impl Take {
    pub(super) fn new(
        shelf: &Arc<Shelf>,
        node: &Arc<Node>,
        mesh: &Arc<MeshNode>,
        tell: watch::Sender<Standing>,
    ) -> Take {
        let (hear, heard) = mpsc::channel(HEARD_MAX);
        // Who fetch the same file at the same time begin at different places.
        let salt = mesh.mesh().node_id().as_bytes().first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        Take {
            shelf: Arc::clone(shelf),
            node: Arc::downgrade(node),
            mesh: Arc::downgrade(mesh),
            hub: node.options().hub.clone().filter(|hub| !hub.is_offline()),
            hub_by_word: node.options().hub_by_word,
            swarm: Swarm::new(shelf.content.bytes(), salt),
            sources: HashMap::new(),
            ids: HashMap::new(),
            useless: HashSet::new(),
            under_way: HashMap::new(),
            tasks: JoinSet::new(),
            tell,
            standing: Standing::default(),
            has_sought_twins: false,
            hear,
            heard,
            is_done: false,
        }
    }

    /// Fetches what is wished for, urgently or not, until all of it has come, nobody waits for it, or it cannot be kept.
    pub(super) async fn run(mut self, mut wishes: mpsc::UnboundedReceiver<Wish>) {
        let Some(mut table) = self.mesh.upgrade().map(|mesh| mesh.mesh().watch()) else { return };
        let mut ticks = tokio::time::interval(TELL_EVERY);
        while self.standing.broken.is_none() {
            tokio::select! {
                wish = wishes.recv() => {
                    let Some(Wish { groups, urgent }) = wish else { return };
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
        self.sources.values().for_each(Source::is_left);
        while self.tasks.join_next().await.is_some() {}
        if let Err(error) = self.flush().await {
            tracing::warn!("{}: {error}", self.shelf.name);
        }
    }

    async fn flush(&self) -> Result<(), String> {
        let shelf = Arc::clone(&self.shelf);
        let flushed = tokio::task::spawn_blocking(move || shelf.flush().map_err(|error| with_causes(&error)));
        flushed.await.map_err(|error| error.to_string())?
    }

    fn now(&self) -> murmur_core::time::Now {
        self.mesh.upgrade().map_or(murmur_core::time::Now::ZERO, |mesh| mesh.now())
    }

    /// Begins to watch those who have some of it, and forgets who has left.
    fn look(&mut self) {
        let Some(mesh) = self.mesh.upgrade() else { return };
        let table = Arc::clone(&mesh.mesh().watch().borrow());
        let mut there = self.holders(&table, mesh.mesh().node_id());
        there.extend(self.place_on_hub(&table).map(Who::Hub));
        let is_gone = |source: &Source| !matches!(source.who, Who::Twin(_)) && !there.contains(&source.who);
        let gone = self.sources.iter().filter(|(_, source)| is_gone(source)).map(|(id, _)| *id);
        for id in gone.collect::<Vec<_>>() {
            self.leave(id);
        }
        for who in there {
            let id = self.id_of(&who);
            if self.sources.len() < SOURCES_MAX && !self.sources.contains_key(&id) {
                self.begin_to_watch(id, who);
            }
        }
        self.seek_twins();
        self.standing.sources = self.sources.iter().map(|(id, source)| (*id, source.who.clone())).collect();
    }

    fn id_of(&mut self, who: &Who) -> SourceId {
        let next = SourceId(u32::try_from(self.ids.len()).unwrap_or(u32::MAX));
        *self.ids.entry(who.clone()).or_insert(next)
    }

    /// Looks once for other files of this machine that may have some of it, as soon as its header is here, which comes first for that.
    fn seek_twins(&mut self) {
        let header_bytes = *self.shelf.header_bytes.borrow();
        if self.has_sought_twins || header_bytes == 0 {
            return;
        }
        let header = [ByteRange { start: 0, end: header_bytes.min(self.shelf.content.bytes()) }];
        if !self.shelf.content.missing(&header).is_empty() {
            return self.decide(Event::Want { groups: GroupSet::covering(&header), urgent: true });
        }
        let Some(node) = self.node.upgrade() else { return };
        self.has_sought_twins = true;
        let (shelf, hear) = (Arc::clone(&self.shelf), self.hear.clone());
        self.tasks.spawn(async move {
            let search = tokio::task::spawn_blocking(move || {
                let wanted = Gguf::open(shelf.content.path()).ok()?;
                Some(twin::find(&wanted, &node.library.others(&shelf.digest())))
            });
            if let Ok(Some(twins)) = search.await {
                let _ = hear.send(Heard::Twins(twins)).await;
            }
        });
    }

    /// The other nodes that have some of it.
    fn holders(&self, table: &Table, own: NodeId) -> HashSet<Who> {
        let mut liars = self.shelf.liars();
        liars.retain(|node| table.contains_key(node));
        let nodes = table.keys().filter(|node| **node != own && !liars.contains(node));
        nodes.filter(|node| self.told_by(table, node).is_some()).copied().map(Who::Node).collect()
    }

    /// What a node tells of the file.
    fn told_by<'a>(&self, table: &'a Table, node: &NodeId) -> Option<&'a HeldContent> {
        let (digest, bytes) = (self.shelf.digest(), self.shelf.content.bytes());
        let contents = &table.get(node)?.verified.record().contents;
        contents.iter().find(|content| content.digest == digest && content.file_bytes == bytes)
    }

    /// Where the hub has it, if it is to be asked: that makes sense when somebody has hashes.
    fn place_on_hub(&self, table: &Table) -> Option<HubRef> {
        let is_of_use = |place: &HubRef| {
            place.wanted.is_some() && !self.useless.contains(place) && !self.shelf.on_hub().wrong.contains(place)
        };
        let asked = self.sources.values().find_map(|source| match &source.who {
            Who::Hub(place) => Some(place.clone()),
            Who::Node(_) | Who::Twin(_) => None,
        });
        let can_check = asked.is_some() || self.sources.values().any(|source| source.gives_hashes);
        if self.hub.is_none() || !can_check || self.useless.len() >= HUB_NAMES_MAX {
            return None;
        }
        let likely = self.shelf.on_hub().likely(self.hub_by_word);
        let others = table.keys().filter(|_| self.hub_by_word);
        let told = others.filter_map(|node| self.told_by(table, node)?.source.as_ref()?.parse().ok());
        asked.into_iter().chain(likely).chain(told).find(is_of_use)
    }

    fn begin_to_watch(&mut self, id: SourceId, who: Who) {
        let hear = self.hear.clone();
        let watching = match (&who, &self.hub) {
            (Who::Node(node), _) => {
                let heard = move |content: Option<Content>| {
                    let hear = hear.clone();
                    let said = content.map_or(Heard::Lost(id), |content| Heard::Has(id, content));
                    async move { hear.send(said).await.is_ok() }
                };
                self.tasks.spawn(ask::watch(Weak::clone(&self.mesh), self.shelf.digest(), *node, heard))
            }
            (Who::Hub(place), Some(hub)) => {
                let found = hub::find(hub.clone(), place.clone(), self.shelf.content.bytes());
                self.tasks.spawn(async move {
                    let said = match found.await {
                        Ok((file, took)) => Heard::OnHub(id, Arc::new(file), took),
                        Err(reason) => Heard::Useless(id, reason),
                    };
                    let _ = hear.send(said).await;
                })
            }
            (Who::Hub(_), None) | (Who::Twin(_), _) => return,
        };
        self.sources.insert(id, Source::new(who, Some(watching), None));
    }

    /// A source is not there any more.
    fn leave(&mut self, id: SourceId) -> Option<Source> {
        let source = self.sources.remove(&id)?;
        source.is_left();
        self.decide(Event::Left { id });
        self.announce_unproven();
        Some(source)
    }

    /// Who has no hashes is asked for what can be checked.
    fn announce_unproven(&mut self) {
        let nodes = self.sources.values().filter(|source| source.gives_hashes);
        let provable = nodes.fold(GroupSet::default(), |all, source| all.union(&source.has));
        let mut news = Vec::new();
        for (&id, source) in &mut self.sources {
            let Some(supply) = &source.supply else { continue };
            let kind = match supply {
                Supply::Hub(_) => SourceKind::Hub,
                Supply::Twin(_) => SourceKind::Disk,
            };
            let has = longest(supply.has(self.shelf.content.bytes()).intersection(&provable), RANGES_MAX);
            if source.has != has {
                source.has = has.clone();
                news.push(Event::Source { id, kind, has, rtt_ms: source.rtt_ms });
            }
        }
        news.into_iter().for_each(|event| self.decide(event));
    }

    fn hear(&mut self, heard: Heard) {
        match heard {
            Heard::Has(id, content) if content.file_bytes == self.shelf.content.bytes() => {
                self.hear_content(id, content)
            }
            Heard::Has(..) => {}
            Heard::Lost(id) => {
                if let Some(source) = self.sources.get_mut(&id) {
                    (source.has, source.gives_hashes) = (GroupSet::default(), false);
                }
                self.decide(Event::Failed { id, request: None, outcome: Outcome::Gone });
                self.announce_unproven();
            }
            Heard::Twins(twins) => {
                for twin in twins {
                    let who = Who::Twin(twin.path().to_owned());
                    let id = self.id_of(&who);
                    tracing::info!("{}: {who} may have some of it", self.shelf.name);
                    self.sources.insert(id, Source::new(who, None, Some(Supply::Twin(Arc::new(twin)))));
                }
                self.announce_unproven();
            }
            Heard::OnHub(id, file, took) => {
                if let Some(source) = self.sources.get_mut(&id) {
                    // It was asked two questions.
                    (source.supply, source.rtt_ms) = (Some(Supply::Hub(file)), milliseconds(took / 2));
                }
                self.announce_unproven();
            }
            Heard::Received(id, request, range) => {
                match self.sources.get(&id).map(|source| &source.who) {
                    Some(Who::Hub(place)) => self.shelf.on_hub().prove(place),
                    Some(Who::Twin(_)) => {
                        self.shelf.copied_bytes.fetch_add(range.end - range.start, Ordering::Relaxed);
                    }
                    Some(Who::Node(_)) | None => {}
                }
                self.decide(Event::Received {
                    id,
                    request,
                    groups: range.start / GROUP_BYTES..range.end.div_ceil(GROUP_BYTES),
                });
            }
            Heard::Ended(id, request, ended) => {
                let was_cancelled = self.under_way.remove(&request).is_none();
                match ended {
                    Ok(()) => self.decide(Event::Finished { id, request }),
                    Err(Failure::Store(reason)) => self.standing.broken = Some(reason),
                    Err(Failure::Useless(reason)) => self.find_useless(id, reason),
                    // Of a request that was taken back nothing is owed; a lie is one all the same.
                    Err(Failure::Source(outcome)) if !was_cancelled || outcome == Outcome::Wrong => {
                        self.decide(Event::Failed { id, request: Some(request), outcome });
                    }
                    Err(Failure::Source(_)) => {}
                }
                // It may have found out that it has less.
                self.announce_unproven();
            }
            Heard::Useless(id, reason) => self.find_useless(id, reason),
            Heard::Lies(id) => self.decide(Event::Failed { id, request: None, outcome: Outcome::Wrong }),
        }
    }

    fn hear_content(&mut self, id: SourceId, content: Content) {
        // The first word counts until the header has been read.
        self.shelf.header_bytes.send_if_modified(|known| {
            let is_news = *known == 0 && content.header_bytes > 0;
            *known = if is_news { content.header_bytes } else { *known };
            is_news
        });
        let Some(source) = self.sources.get_mut(&id) else { return };
        let Who::Node(node) = source.who else { return };
        let rtt = self.mesh.upgrade().and_then(|mesh| mesh.mesh().round_trip(node));
        let (told, rtt_ms) = (GroupSet::covering(&from_wire(&content.held)), rtt.map_or(UNKNOWN_RTT_MS, milliseconds));
        let has = if content.is_news { source.has.union(&told) } else { told };
        // News may go on for ever, and the swarm looks at no more.
        let has = longest(has, RANGES_MAX);
        (source.has, source.gives_hashes, source.rtt_ms) = (has.clone(), content.gives_hashes, rtt_ms);
        self.decide(Event::Source { id, kind: SourceKind::Peer, has, rtt_ms });
        self.announce_unproven();
    }

    fn find_useless(&mut self, id: SourceId, reason: String) {
        if let Some(Source { who: Who::Hub(place), .. }) = self.leave(id) {
            tracing::warn!("{place} is not asked for {}: {reason}", self.shelf.name);
            self.standing.no_hub = Some(reason);
            self.useless.insert(place);
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
                self.request(id, request, &groups);
            }
            Action::Cancel { request, .. } => drop(self.under_way.remove(&request)),
            Action::Drop { id, reason } => {
                let Some(source) = self.sources.remove(&id) else { return };
                source.is_left();
                tracing::warn!(
                    "{} sends what is not of {} ({reason}): it is not asked for it any more",
                    source.who,
                    self.shelf.name
                );
                match source.who {
                    Who::Node(node) => drop(self.shelf.liars().insert(node)),
                    Who::Hub(place) => {
                        self.standing.no_hub = Some(reason.to_string());
                        self.shelf.on_hub().refute(place);
                    }
                    // What of it is something else it has found out itself.
                    Who::Twin(_) => {}
                }
                self.announce_unproven();
            }
            Action::Done => self.is_done = true,
            Action::Stuck { reason, .. } => {
                let since = self.standing.stuck.as_ref().map_or_else(Instant::now, |(since, _)| *since);
                self.standing.stuck = Some((since, reason.to_string()));
            }
        }
    }

    /// Asks a source for groups.
    fn request(&mut self, id: SourceId, request: RequestId, groups: &GroupSet) {
        let Some(source) = self.sources.get(&id) else { return };
        let unwanted = CancellationToken::new();
        self.under_way.insert(request, unwanted.clone().drop_guard());
        let (shelf, ranges) = (Arc::clone(&self.shelf), groups.byte_ranges(self.shelf.content.bytes()));
        let (node, mesh, hear) = (Weak::clone(&self.node), Weak::clone(&self.mesh), self.hear.clone());
        let heard = hear.clone();
        let received = move |range| {
            // The task is gone: so is whoever would want to know.
            let _ = heard.blocking_send(Heard::Received(id, request, range));
        };
        match (&source.who, &source.supply) {
            (Who::Node(from), _) => {
                let ask = Ask { shelf, from: *from, what: What::Bytes, ranges, unwanted };
                self.tasks.spawn(async move {
                    let ended = ask.run(&node, &mesh, received).await;
                    let _ = hear.send(Heard::Ended(id, request, ended)).await;
                });
            }
            (_, Some(supply)) => {
                let supply = supply.clone();
                let ask = AskUnproven { shelf, supply, provers: self.provers(groups), ranges, unwanted };
                self.tasks.spawn(async move {
                    let (ended, liars) = ask.run(&node, &mesh, received).await;
                    for liar in liars {
                        let _ = hear.send(Heard::Lies(liar)).await;
                    }
                    let _ = hear.send(Heard::Ended(id, request, ended)).await;
                });
            }
            // It is announced when it has answered.
            (Who::Hub(_) | Who::Twin(_), None) => {}
        }
    }

    /// Who gives hashes of these groups, the nearest first.
    fn provers(&self, groups: &GroupSet) -> Vec<Prover> {
        let able = self.sources.iter().filter(|(_, source)| source.gives_hashes);
        let able = able.filter(|(_, source)| !source.has.intersection(groups).is_empty());
        let mut able: Vec<_> = able.collect();
        able.sort_by_key(|(id, source)| (source.rtt_ms, **id));
        let prover = |(id, source): (&SourceId, &Source)| match source.who {
            Who::Node(node) => Some(Prover { id: *id, node, held: source.has.clone() }),
            Who::Hub(_) | Who::Twin(_) => None,
        };
        able.into_iter().filter_map(prover).collect()
    }
}

fn milliseconds(time: Duration) -> u32 {
    u32::try_from(time.as_millis()).unwrap_or(u32::MAX)
}
