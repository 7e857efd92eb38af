//! Models that are spread over the mesh, because no node holds one whole: the ring.
//!
//! Every node that was given such a model offers to hold some of its layers ([`host`]), and drives its own requests through
//! all of them: its engine's stages are where the layers are. The plan is made by `murmur_core`'s planner. Nobody is in charge:
//! who finds all layers loaded in the mesh uses them where they are; if there is no such ring yet, the node with the lowest id
//! makes one, by asking hosts for their layers, and the next one if that node does not get it done.
//!
//! A stage that is lost is looked for again where the layers are loaded, or loaded by a node that still has room ([`successor`]). Sessions
//! wait for it, and go on with the same tokens. With `--standby` somebody has been given the same rows all the time ([`standby`]).

mod alive;
mod borrow;
mod carry;
mod choice;
pub(crate) mod facts;
mod form;
mod hop;
pub(crate) mod host;
mod lag;
mod leave;
pub(crate) mod lend;
mod offers;
pub(crate) mod plan;
mod search;
pub(crate) mod standby;
mod successor;
mod wishes;

use std::{
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak},
    time::{Duration, Instant},
};

use murmur_core::planner::{Ask, ModelFacts};
use murmur_engine::{Answers, Connection, FarEnd, RemoteStage, Stop};
use murmur_gguf::LayerRange;
use murmur_net::{NetError, PeerView, stream};
use murmur_protocol::{
    frame::{FLAG_NEVER_TAKEN, FLAG_WATCHED, Frame, FrameError, Header, Kind},
    mesh::{ModelDigest, NodeId, RingId, StageOpen, Work},
    stage::{Route, RouteTo},
};
use tokio::{
    runtime::Handle,
    sync::{Notify, mpsc},
    time::sleep,
};

use crate::{
    Node,
    mesh::{MeshNode, both},
    model::Model,
};
use alive::{silent, while_there};
use borrow::Borrower;
use carry::Drain;
pub(crate) use carry::FrameReader;
pub(crate) use form::{Spread, run};
pub(crate) use hop::take_hidden;
use host::Terms;
use lag::Lag;
use offers::Offer;
pub(crate) use search::Search;
use standby::Standby;
use successor::{Neighbour, Successors, Vacancy};

/// A host that was lost is not asked again before others for so long.
const AVOIDED: Duration = Duration::from_secs(30);
/// Two hosts that have lost each other are given another try after this, when no request runs.
const DETOUR_MIN: Duration = Duration::from_secs(30);
/// How often an engine that looks for a stage looks whether it has been stopped.
const STOP_SEEN_EVERY: Duration = Duration::from_millis(100);
/// Frames for a host that are written at once.
const QUESTIONS_AT_ONCE: usize = 64;
/// Bytes on their way within this process.
const PIPE_BYTES: usize = 256 << 10;

/// The stages of a driver's ring.
pub(crate) struct Ring {
    node: Weak<Node>,
    mesh: Weak<MeshNode>,
    runtime: Handle,
    model: ModelDigest,
    /// All layers, and what they are held for.
    whole: Terms,
    seats: Mutex<Vec<Seat>>,
    /// Who did not hold the layers that were planned for it.
    not_held: Mutex<Vec<(NodeId, NotHeld)>>,
    /// What looks for a node nearby that guesses for it, if that is wished.
    borrower: OnceLock<Arc<Borrower>>,
}

/// A stage of it.
struct Seat {
    range: LayerRange,
    /// Who is to hold it, or held it last.
    planned: NodeId,
    taken: Option<Taken>,
    standby: Option<Standby>,
    /// Who stood by last and does not any more, and since when.
    unfit: Option<(NodeId, Instant)>,
    /// How far whoever holds it lags behind whoever stands by, and who waits for news of that.
    lag: Lag,
    lags: Arc<Notify>,
    /// Hidden states from the one did not arrive at the other, who holds the next stage: since then they go through this node.
    detour: Option<(NodeId, NodeId, Instant)>,
    /// Who was lost of late, and when, the last one at the end.
    lost: Vec<(NodeId, Instant)>,
    /// That one could not be reached any more; its stage did not end before.
    is_unreachable: bool,
}

/// Who holds a stage, under which name of the ring, and how to tell them.
struct Taken {
    to: RouteTo,
    words: mpsc::UnboundedSender<Frame>,
}

impl Seat {
    fn new(range: LayerRange, planned: NodeId) -> Seat {
        Seat {
            range,
            planned,
            taken: None,
            standby: None,
            unfit: None,
            lag: Lag::default(),
            lags: Arc::default(),
            detour: None,
            lost: Vec::new(),
            is_unreachable: false,
        }
    }

    fn holder(&self) -> Option<NodeId> {
        self.taken.as_ref().map(|taken| taken.to.node)
    }

    /// Who holds it, or is to; `None`: who did is lost.
    fn awaited(&self) -> Option<NodeId> {
        let is_lost = self.lost.iter().any(|(node, _)| *node == self.planned);
        self.holder().or((!is_lost).then_some(self.planned))
    }

    fn is_lost(&mut self, holder: NodeId, now: Instant) {
        self.lost.retain(|(node, at)| *node != holder && now.saturating_duration_since(*at) < AVOIDED);
        self.lost.push((holder, now));
    }

    /// When a node was lost here, if that was of late.
    fn lost_at(&self, holder: NodeId) -> Option<Instant> {
        let lost = self.lost.iter().find(|(node, at)| *node == holder && at.elapsed() < AVOIDED);
        lost.map(|(_, at)| *at)
    }

    /// In which order nodes are asked to hold it: those that were not lost, by their ranks, then whose loss is longest ago.
    fn order<R: Ord>(&self, node: NodeId, rank: R) -> impl Ord + use<R> {
        (self.lost_at(node), node != self.planned, rank)
    }
}

/// Why a node does not hold layers, for people.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
enum NotHeld {
    /// It says why.
    #[error("{0}")]
    Refused(String),
    /// It does not answer, or ends.
    #[error("{0}")]
    Unreachable(String),
}

/// A host that has its layers ready.
struct Opened {
    reader: FrameReader,
    drain: Drain,
    loaded: Frame,
}

impl Ring {
    fn seats(&self) -> MutexGuard<'_, Vec<Seat>> {
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the engine needs to find each stage.
    fn stages(self: &Arc<Self>) -> Vec<Arc<dyn RemoteStage>> {
        self.runtime.spawn(standby::keep(Arc::downgrade(self)));
        let stage = |index| Arc::new(Stage { ring: Arc::clone(self), index }) as Arc<dyn RemoteStage>;
        (0..self.seats().len()).map(stage).collect()
    }

    /// Who holds which layers; `None`: nobody at present.
    pub(crate) fn view(&self) -> Vec<(LayerRange, Option<NodeId>)> {
        self.seats().iter().map(|seat| (seat.range, seat.holder())).collect()
    }

    /// Time that a token travels, us, as far as it is known here, with what is known of the `peers`.
    pub(crate) fn around_us(&self, mesh: &MeshNode, peers: &[PeerView]) -> u64 {
        let own = mesh.mesh().node_id();
        let hosts: Vec<NodeId> = self.view().into_iter().filter_map(|(_, host)| host).collect();
        let mut offers = offers::of_peers(mesh, peers, &self.model);
        offers.retain(|offer| hosts.contains(&offer.node));
        let links = facts::links(own, &offers);
        let (from, to) = ([own].into_iter().chain(hosts.clone()), hosts.into_iter().chain([own]));
        let hops = from.zip(to).filter(|(from, to)| from != to);
        hops.map(|(from, to)| links.get(from, to).one_way_us).sum::<f64>() as u64
    }

    /// Who did not hold the layers that were planned for it.
    fn not_held(&self) -> Vec<(NodeId, NotHeld)> {
        self.not_held.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Who was lost and has no successor.
    fn lost(&self) -> Vec<(NodeId, NotHeld)> {
        let lost = |seat: &Seat| {
            let (node, _) = seat.lost.last().filter(|_| seat.taken.is_none())?;
            Some((*node, unreachable("it was lost")))
        };
        self.seats().iter().filter_map(lost).collect()
    }

    async fn connect(self: &Arc<Self>, index: usize) -> Result<Connection, String> {
        if let Some((to, opened)) = self.steps_in(index).await {
            return Ok(self.seat(index, to, opened));
        }
        let (node, mesh) = both(&self.node, &self.mesh).ok_or("this node is stopping")?;
        let ring = RingId::from_bytes(rand::random());
        let planned = self.seats()[index].planned;
        let (range, candidates) = self.candidates(&node, &mesh, index);
        let mut reasons = Vec::new();
        for holder in candidates {
            let opening = self.open(&node, &mesh, holder, range, ring);
            match opening.await {
                Ok(opened) => {
                    let to = RouteTo { node: holder, ring };
                    return Ok(self.seat(index, to, opened));
                }
                Err(reason) => {
                    reasons.push(format!("{}: {reason}", holder.short()));
                    // Others refuse what they have not offered.
                    if holder == planned {
                        self.not_held.lock().unwrap_or_else(PoisonError::into_inner).push((holder, reason));
                    }
                }
            }
        }
        match reasons.is_empty() {
            true => Err(format!("no node offers to hold layers {range}")),
            false => Err(format!("nobody holds layers {range}: {}", reasons.join("; "))),
        }
    }

    /// What is offered of its model, with what was measured before, and what the planner is told of that.
    fn offered<'a>(&self, node: &'a Node, mesh: &MeshNode) -> Option<(Vec<Offer>, &'a ModelFacts)> {
        let is_meant = |model: &&Model| model.identity().is_some_and(|identity| identity.digest == self.model);
        let (model, spread) = node.models.iter().filter(is_meant).find_map(|model| Some((model, model.spread()?)))?;
        let mut offers = offers::listed(node, mesh, &self.model);
        model.search().add_measured(&mut offers);
        Some((offers, &spread.facts))
    }

    /// What is asked of whoever holds a stage.
    fn wanted(&self, node: &Node, mesh: &MeshNode) -> Ask {
        let (options, Terms { context_tokens, parallel, .. }) = (node.options(), self.whole);
        Ask {
            streams: parallel,
            lossy: options.lossy.clone(),
            keep_ends: options.ring.keep_ends.unwrap_or(0),
            rtt_us_max: wishes::rtt_us_max(&options.ring),
            ..Ask::new(mesh.mesh().node_id(), context_tokens)
        }
    }

    /// Whom to ask for a stage, in this order: who is to hold it, who has it loaded, who could load it, the best first.
    fn candidates(&self, node: &Node, mesh: &MeshNode, index: usize) -> (LayerRange, Vec<NodeId>) {
        // Before the seats are locked: who looks for rings has locked the search when it asks who was lost.
        let Some((offers, facts)) = self.offered(node, mesh) else { return (self.seats()[index].range, Vec::new()) };
        let successors = Successors::new(&offers, facts, self.wanted(node, mesh));
        let seats = self.seats();
        let (seat, vacancy, wishes) = (&seats[index], vacancy(&seats, index), &node.options().ring);
        let others: Vec<NodeId> =
            seats.iter().filter(|other| other.range != seat.range).filter_map(Seat::holder).collect();
        // Whoever was planned for it is near enough: that is how it was planned.
        let is_near = |node| seat.awaited() == Some(node) || successors.allows(&vacancy, node);
        let mut asked: Vec<&Offer> = offers.iter().filter(|offer| wishes::allow(wishes, offer)).collect();
        asked.retain(|offer| !others.contains(&offer.node) && is_near(offer.node));
        if wishes::is_pinned(wishes, seat.planned) {
            asked.retain(|offer| offer.node == seat.planned);
        }
        let there = asked.iter().copied().filter(|offer| seat.lost_at(offer.node).is_none());
        let least_us = successors.least_us(&vacancy, there);
        asked.sort_by_cached_key(|offer| seat.order(offer.node, successors.rank(&vacancy, offer, least_us)));
        (seat.range, asked.into_iter().map(|offer| offer.node).collect())
    }

    /// Asks a host for a stage, and waits until it is loaded there.
    async fn open(
        &self,
        node: &Arc<Node>,
        mesh: &Arc<MeshNode>,
        holder: NodeId,
        range: LayerRange,
        ring: RingId,
    ) -> Result<Opened, NotHeld> {
        let Terms { range: whole, context_tokens, parallel, exact } = self.whole;
        let open = StageOpen {
            model: self.model,
            first: range.first,
            end: range.end,
            layers: whole.end,
            context_tokens,
            parallel,
            exact,
            build: exact.then(murmur_engine::build_id),
            ring,
        };
        let (reader, drain): (FrameReader, Drain) = if holder == mesh.mesh().node_id() {
            let (here, there) = tokio::io::duplex(PIPE_BYTES);
            let (source, drain) = tokio::io::split(there);
            let reader = FrameReader::new(Box::pin(source), &[]);
            tokio::spawn(host::serve(Arc::clone(node), Arc::clone(mesh), open, reader, Box::pin(drain)));
            let (source, drain) = tokio::io::split(here);
            (FrameReader::new(Box::pin(source), &[]), Box::pin(drain))
        } else {
            ask(mesh, holder, &Work::Stage(Box::new(open))).await?
        };
        until_loaded(mesh, holder, reader, drain).await
    }

    /// Which model of which node guesses for it now, if one does.
    pub(crate) fn lender(&self) -> Option<(String, NodeId)> {
        self.borrower.get()?.lender()
    }

    /// Notes who holds a stage, tells the neighbours in the ring, and carries frames from now on.
    fn seat(self: &Arc<Self>, index: usize, to: RouteTo, opened: Opened) -> Connection {
        let (engines, ours) = murmur_engine::connection();
        let (words, told) = mpsc::unbounded_channel();
        {
            let mut seats = self.seats();
            seats[index].taken = Some(Taken { to, words });
            seats[index].planned = to.node;
            seats[index].lag.close_all();
            seats[index.saturating_sub(1)..=index].iter_mut().for_each(|seat| seat.detour = None);
            show_the_way_around(&seats, index);
        }
        let ring = Arc::clone(self);
        tokio::spawn(async move {
            let FarEnd { questions, answers } = ours;
            // The engine learns of the end when the answers end, and then asks for its reason.
            let ended = ring.carry_both(index, to, (&answers, questions), opened, told).await;
            ring.lose(index, to, ended);
        });
        engines
    }

    fn lose(&self, index: usize, to: RouteTo, ended: Result<(), FrameError>) {
        let mut seats = self.seats();
        let seat = &mut seats[index];
        if seat.taken.take_if(|taken| taken.to == to).is_none() {
            return;
        }
        seat.is_lost(to.node, Instant::now());
        seat.is_unreachable = ended.is_err();
        tracing::debug!(node = %to.node.short(), layers = %seat.range, ?ended, "a stage of a ring is lost");
        // Who stands by is about to be named.
        if seat.standby.is_none() {
            show_the_way_around(&seats, index);
        }
    }

    /// Carries frames between the engine of this driver and a host, until either has enough.
    async fn carry_both(
        &self,
        index: usize,
        to: RouteTo,
        (engine, mut questions): (&Answers, mpsc::UnboundedReceiver<Frame>),
        opened: Opened,
        mut told: mpsc::UnboundedReceiver<Frame>,
    ) -> Result<(), FrameError> {
        let Opened { reader: mut answers, drain: mut host, loaded } = opened;
        engine.give([loaded]);
        let outward = async {
            let mut frames = Vec::new();
            loop {
                tokio::select! {
                    biased;
                    Some(frame) = told.recv() => frames.push(frame),
                    questions = questions.recv_many(&mut frames, QUESTIONS_AT_ONCE) => match questions {
                        0 => return Ok(()),
                        _ => frames.iter().for_each(|frame| self.copy(index, frame)),
                    },
                };
                carry::write(&mut host, &frames).await?;
                frames.clear();
            }
        };
        let inward = async {
            let mut frames = Vec::new();
            while let Some(mesh) = self.mesh.upgrade() {
                let Some(frame) = hear(&mesh, to.node, &mut answers).await? else { break };
                self.note(index, &frame.header);
                match frame.header.kind {
                    // A sign of life is no answer.
                    Kind::Progress => {}
                    Kind::RouteLost if !self.is_lost_way(index, to.node, &frame)? => {}
                    _ => frames.push(frame),
                }
                if !answers.has_next() {
                    engine.give(frames.drain(..));
                }
            }
            Ok(())
        };
        tokio::select! {
            ended = outward => ended,
            ended = inward => ended,
            () = self.lags(index, to.node) => Err(silent("who stands by for it has computed what it has not")),
        }
    }

    /// A host says that what it sends to another does not arrive. True: sessions have lost rows by that, and a way around it is
    /// named.
    fn is_lost_way(&self, index: usize, from: NodeId, said: &Frame) -> Result<bool, FrameError> {
        let to: RouteTo = said.decode()?;
        let mut seats = self.seats();
        let Some(next) = seats.get_mut(index + 1) else { return Ok(false) };
        if next.taken.as_ref().is_some_and(|taken| taken.to == to) {
            tracing::debug!(from = %from.short(), to = %to.node.short(), "hidden states go through this node now");
            seats[index].detour = Some((from, to.node, Instant::now()));
            show_the_way(&seats, index);
            return Ok(!said.header.has(FLAG_NEVER_TAKEN));
        }
        if standby::give_up(next, &to) {
            show_the_way(&seats, index);
        }
        Ok(false)
    }
}

/// What is sought when somebody is sought for a stage.
fn vacancy(seats: &[Seat], at: usize) -> Vacancy {
    let neighbour = |seat: Option<&Seat>| match seat {
        None => Neighbour::Driver,
        Some(seat) => seat.awaited().map_or(Neighbour::Nobody, Neighbour::Host),
    };
    let before = at.checked_sub(1).and_then(|before| seats.get(before));
    Vacancy { range: seats[at].range, before: neighbour(before), after: neighbour(seats.get(at + 1)) }
}

/// Tells the hosts of a stage who holds the next one and who stands by for that, if anybody does.
fn show_the_way(seats: &[Seat], at: usize) {
    let (seat, next) = (&seats[at], seats.get(at + 1));
    let way = |from: NodeId, is_standby| {
        let holder = next.and_then(|next| next.taken.as_ref()).map(|taken| taken.to);
        let standby = next.and_then(|next| next.standby.as_ref()).map(|standby| standby.to);
        let is_detour = |to: &RouteTo| seat.detour.is_some_and(|(one, other, _)| (one, other) == (from, to.node));
        let route = Route { next: holder.filter(|to| !is_detour(to)), standby, is_standby };
        let flags = if seat.standby.is_some() { FLAG_WATCHED } else { 0 };
        Frame::message(Header { flags, ..Header::new(Kind::Route, 0) }, &route)
    };
    // A host that is gone need not know.
    if let Some(taken) = &seat.taken
        && let Ok(frame) = way(taken.to.node, false)
    {
        let _ = taken.words.send(frame);
    }
    if let Some(standby) = &seat.standby
        && let Ok(frame) = way(standby.to.node, true)
    {
        let _ = standby.send(frame);
    }
}

/// The same, to all who have to know that a stage is held by somebody else.
fn show_the_way_around(seats: &[Seat], changed: usize) {
    changed.checked_sub(1).into_iter().chain([changed]).for_each(|at| show_the_way(seats, at));
}

/// Opens a stream to a node on which frames follow a request.
async fn ask(mesh: &MeshNode, node: NodeId, request: &Work) -> Result<(FrameReader, Drain), NotHeld> {
    let asking = async {
        let (mut send, recv) = mesh.mesh().open_work(node).await?;
        stream::write(&mut send, request).await?;
        Ok::<_, NetError>((send, recv))
    };
    // To reach one that died a moment ago would be tried for ten seconds.
    let asked = while_there(mesh, node, asking).await.map_err(unreachable)?;
    let (send, recv) = asked.map_err(unreachable)?;
    Ok((FrameReader::new(Box::pin(recv), &[]), Box::pin(send)))
}

fn unreachable(error: impl ToString) -> NotHeld {
    NotHeld::Unreachable(error.to_string())
}

/// Waits until a host has loaded what it was asked for.
async fn until_loaded(mesh: &MeshNode, host: NodeId, mut reader: FrameReader, drain: Drain) -> Result<Opened, NotHeld> {
    loop {
        let frame = hear(mesh, host, &mut reader).await.map_err(unreachable)?;
        let frame = frame.ok_or_else(|| unreachable("it has hung up"))?;
        match frame.header.kind {
            Kind::Loaded => return Ok(Opened { reader, drain, loaded: frame }),
            Kind::LoadFailed => return Err(NotHeld::Refused(frame.as_text())),
            _ => {}
        }
    }
}

/// Connects an engine with one of its stages, or with whoever guesses for it, unless it is stopped meanwhile. Blocks.
fn while_wanted<T>(
    runtime: &Handle,
    stop: &Stop,
    connecting: impl Future<Output = Result<T, String>>,
) -> Result<T, String> {
    let stopped = async {
        while !stop.is_stopped() {
            sleep(STOP_SEEN_EVERY).await;
        }
    };
    runtime.block_on(async {
        tokio::select! {
            connected = connecting => connected,
            () = stopped => Err("it is not wanted any more".to_owned()),
        }
    })
}

/// The next frame of a host.
async fn hear(mesh: &MeshNode, host: NodeId, reader: &mut FrameReader) -> Result<Option<Frame>, FrameError> {
    while_there(mesh, host, reader.next()).await?
}

/// How the engine finds one of them.
struct Stage {
    ring: Arc<Ring>,
    index: usize,
}

impl RemoteStage for Stage {
    fn connect(&self, stop: &Stop) -> Result<Connection, String> {
        // A host may load for minutes.
        while_wanted(&self.ring.runtime, stop, self.ring.connect(self.index))
    }

    fn lost_because(&self) -> String {
        let seats = self.ring.seats();
        let seat = &seats[self.index];
        match seat.lost.last() {
            Some((node, _)) => format!("node {}, which held layers {}, is lost", node.short(), seat.range),
            None => format!("the connection to layers {} has ended", seat.range),
        }
    }

    fn is_unreachable(&self) -> bool {
        self.ring.seats()[self.index].is_unreachable
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seat(range: (u32, u32), planned: u8) -> Seat {
        Seat::new(LayerRange::new(range.0, range.1), NodeId::from_bytes([planned; 32]))
    }

    #[test]
    fn who_was_lost_is_asked_after_all_others_and_first_whose_loss_is_longest_ago() {
        let [planned, other, lost_first, lost_last] = [0, 1, 2, 3].map(|node| NodeId::from_bytes([node; 32]));
        let mut seat = seat((4, 8), 0);
        let began = Instant::now();
        // The one was lost before as well.
        for (at, node) in [lost_last, lost_first, lost_last].into_iter().enumerate() {
            seat.is_lost(node, began + Duration::from_nanos(at as u64));
        }
        let mut asked = [lost_last, lost_first, other, planned];
        asked.sort_by_cached_key(|node| seat.order(*node, ()));
        assert_eq!(asked, [planned, other, lost_first, lost_last]);
    }

    #[test]
    fn the_neighbours_of_a_stage_are_those_that_hold_the_next_ones_or_are_to_and_the_driver_at_the_ends() {
        let mut seats = [seat((0, 4), 1), seat((4, 8), 2), seat((8, 12), 3)];
        let neighbours = |seats: &[Seat], at: usize| {
            let Vacancy { before, after, .. } = vacancy(seats, at);
            (before, after)
        };
        let host = |node: u8| Neighbour::Host(NodeId::from_bytes([node; 32]));
        assert_eq!(neighbours(&seats, 0), (Neighbour::Driver, host(2)));
        assert_eq!(neighbours(&seats, 1), (host(1), host(3)));
        seats[2].is_lost(NodeId::from_bytes([3; 32]), Instant::now());
        assert_eq!(neighbours(&seats, 1), (host(1), Neighbour::Nobody));
        assert_eq!(neighbours(&seats, 2), (host(2), Neighbour::Driver));
    }
}
