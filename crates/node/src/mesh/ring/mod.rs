//! Models that are spread over the mesh, because no node holds one whole: the ring.
//!
//! Every node that was given such a model offers to hold some of its layers ([`host`]), and drives its own requests through
//! all of them: its engine's stages are where the layers are. The plan is made by `murmur_core`'s planner. Nobody is in charge:
//! who finds all layers loaded in the mesh uses them where they are; if there is no such ring yet, the node with the lowest id
//! makes one, by asking hosts for their layers, and the next one if that node does not get it done.
//!
//! A stage that is lost is looked for again where the layers are loaded, or loaded by a node that still has room. Sessions
//! wait for it, and go on with the same tokens.

mod carry;
mod form;
pub(crate) mod host;
pub(crate) mod plan;

use std::{
    os::unix::net::UnixStream,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, Instant},
};

use murmur_engine::RemoteStage;
use murmur_gguf::LayerRange;
use murmur_net::{Mesh, NetError, stream};
use murmur_protocol::{
    frame::{Frame, FrameError, Header, Kind},
    mesh::{ModelDigest, NodeId, RingId, StageOpen, Work},
    stage::{Route, RouteTo},
};
use tokio::{runtime::Handle, sync::mpsc, time::timeout};

use crate::{
    Node,
    mesh::{MeshNode, both},
};
use carry::Drain;
pub(crate) use carry::FrameReader;
use form::Offer;
pub(crate) use form::{Spread, run};

/// A host that says nothing for so long is asked whether it is there: it says so twice as often.
const SILENCE_MAX: Duration = Duration::from_millis(500);
/// One that does not answer within this is lost.
const SIGN_OF_LIFE: Duration = Duration::from_millis(500);
/// A host that was lost is not asked again before others for so long.
const AVOIDED: Duration = Duration::from_secs(30);
/// Nodes at round trips of less than this, in us, are equally near; beyond, those that differ by a factor of less than two.
const NEAR_US: f64 = 20_000.0;
/// Bytes on their way within this process.
const PIPE_BYTES: usize = 256 << 10;

/// The stages of a driver's ring.
pub(crate) struct Ring {
    node: Weak<Node>,
    mesh: Weak<MeshNode>,
    runtime: Handle,
    model: ModelDigest,
    layers: u32,
    context_tokens: u32,
    parallel: u32,
    exact: bool,
    seats: Mutex<Vec<Seat>>,
    /// Who did not hold what it was asked for.
    refused: Mutex<Vec<NodeId>>,
}

/// A stage of it.
struct Seat {
    range: LayerRange,
    /// Who is to hold it, or held it last.
    planned: NodeId,
    /// Who holds it, under which name of the ring, and how to tell them.
    taken: Option<(NodeId, RingId, mpsc::UnboundedSender<Frame>)>,
    /// Who was lost last, and when.
    lost: Option<(NodeId, Instant)>,
    /// That one could not be reached any more; its stage did not end before.
    is_unreachable: bool,
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
        let stage = |index| Arc::new(Stage { ring: Arc::clone(self), index }) as Arc<dyn RemoteStage>;
        (0..self.seats().len()).map(stage).collect()
    }

    /// Who holds which layers; `None`: nobody at present.
    pub(crate) fn view(&self) -> Vec<(LayerRange, Option<NodeId>)> {
        self.seats().iter().map(|seat| (seat.range, seat.taken.as_ref().map(|taken| taken.0))).collect()
    }

    /// Time that a token travels, us, as far as it is known here: a way between two hosts is taken to be no longer than the way
    /// through this node.
    pub(crate) fn around_us(&self, mesh: &Mesh) -> u64 {
        let peers = mesh.peers();
        let rtt_ms = |host: NodeId| peers.iter().find(|peer| peer.record().node == host).and_then(|peer| peer.rtt_ms);
        let hosts = self.view().into_iter().filter_map(|(_, host)| host);
        (1000.0 * hosts.filter_map(rtt_ms).sum::<f64>()) as u64
    }

    async fn connect(self: &Arc<Self>, index: usize) -> Result<UnixStream, String> {
        let (node, mesh) = both(&self.node, &self.mesh).ok_or("this node is stopping")?;
        let ring = RingId::from_bytes(rand::random());
        let (range, candidates) = self.candidates(&node, &mesh, index);
        let mut reasons = Vec::new();
        for holder in candidates {
            let opening = self.open(&node, &mesh, holder, range, ring);
            match opening.await {
                Ok(opened) => return self.seat(index, holder, ring, opened).map_err(|error| error.to_string()),
                Err(reason) => {
                    reasons.push(format!("{}: {reason}", holder.short()));
                    self.refused.lock().unwrap_or_else(PoisonError::into_inner).push(holder);
                }
            }
        }
        match reasons.is_empty() {
            true => Err(format!("no node offers to hold layers {range}")),
            false => Err(format!("nobody holds layers {range}: {}", reasons.join("; "))),
        }
    }

    /// Whom to ask for a stage, in this order: who is to hold it, who has it loaded, who could load it.
    fn candidates(&self, node: &Node, mesh: &MeshNode, index: usize) -> (LayerRange, Vec<NodeId>) {
        let offers = form::offers(node, mesh, &self.model);
        let seats = self.seats();
        let seat = &seats[index];
        let others: Vec<NodeId> = seats
            .iter()
            .filter(|other| other.range != seat.range)
            .filter_map(|other| Some(other.taken.as_ref()?.0))
            .collect();
        let mut asked: Vec<&Offer> = offers.iter().filter(|offer| !others.contains(&offer.node)).collect();
        asked.sort_by_cached_key(|offer| {
            let is_avoided = seat.lost.is_some_and(|(lost, at)| lost == offer.node && at.elapsed() < AVOIDED);
            (is_avoided, offer.node != seat.planned, order(offer, seat.range))
        });
        (seat.range, asked.into_iter().map(|offer| offer.node).collect())
    }

    /// Asks a host for a stage, and waits until it is loaded there. Errors are for people.
    async fn open(
        &self,
        node: &Arc<Node>,
        mesh: &Arc<MeshNode>,
        holder: NodeId,
        range: LayerRange,
        ring: RingId,
    ) -> Result<Opened, String> {
        let open = StageOpen {
            model: self.model,
            first: range.first,
            end: range.end,
            layers: self.layers,
            context_tokens: self.context_tokens,
            parallel: self.parallel,
            exact: self.exact,
            build: self.exact.then(murmur_engine::build_id),
            ring,
        };
        let (mut reader, drain): (FrameReader, Drain) = if holder == mesh.mesh().node_id() {
            let (here, there) = tokio::io::duplex(PIPE_BYTES);
            let (source, drain) = tokio::io::split(there);
            let reader = FrameReader::new(Box::pin(source), &[]);
            tokio::spawn(host::serve(Arc::clone(node), Arc::clone(mesh), open, reader, Box::pin(drain)));
            let (source, drain) = tokio::io::split(here);
            (FrameReader::new(Box::pin(source), &[]), Box::pin(drain))
        } else {
            let asking = async {
                let (mut send, recv) = mesh.mesh().open_work(holder).await?;
                stream::write(&mut send, &Work::Stage(Box::new(open))).await?;
                Ok::<_, NetError>((send, recv))
            };
            // To reach one that died a moment ago would be tried for ten seconds.
            let asked = while_alive(mesh, holder, asking).await.map_err(|error| error.to_string())?;
            let (send, recv) = asked.map_err(|error| error.to_string())?;
            (FrameReader::new(Box::pin(recv), &[]), Box::pin(send))
        };
        loop {
            let frame = hear(mesh, holder, &mut reader).await.map_err(|error| error.to_string())?;
            let frame = frame.ok_or("it has hung up")?;
            match frame.header.kind {
                Kind::Loaded => return Ok(Opened { reader, drain, loaded: frame }),
                Kind::LoadFailed => return Err(frame.as_text()),
                _ => {}
            }
        }
    }

    /// Notes who holds a stage, tells the neighbours in the ring, and carries frames from now on.
    fn seat(
        self: &Arc<Self>,
        index: usize,
        holder: NodeId,
        ring: RingId,
        opened: Opened,
    ) -> Result<UnixStream, std::io::Error> {
        let (engines, ours) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let ours = tokio::net::UnixStream::from_std(ours)?;
        let (words, told) = mpsc::unbounded_channel();
        {
            let mut seats = self.seats();
            seats[index].taken = Some((holder, ring, words));
            seats[index].planned = holder;
            index.checked_sub(1).into_iter().chain([index]).for_each(|at| show_the_way(&seats, at));
        }
        let seat = Arc::clone(self);
        tokio::spawn(async move {
            let (source, drain) = ours.into_split();
            // The engine learns of the end when these are dropped, and then asks for its reason.
            let (mut engine, mut questions): (Drain, _) = (Box::pin(drain), FrameReader::new(Box::pin(source), &[]));
            let ended = carry_both(&seat.mesh, holder, (&mut engine, &mut questions), opened, told).await;
            seat.lose(index, ring, ended);
        });
        Ok(engines)
    }

    fn lose(&self, index: usize, ring: RingId, ended: Result<(), FrameError>) {
        let mut seats = self.seats();
        let seat = &mut seats[index];
        if let Some((holder, ..)) = seat.taken.take_if(|taken| taken.1 == ring) {
            (seat.lost, seat.is_unreachable) = (Some((holder, Instant::now())), ended.is_err());
            tracing::debug!(node = %holder.short(), layers = %seat.range, ?ended, "a stage of a ring is lost");
            index.checked_sub(1).into_iter().for_each(|at| show_the_way(&seats, at));
        }
    }
}

/// In which order nodes are asked for layers: who has them loaded, who has nothing loaded, who is near. Among those that are
/// about as near, all drivers ask the same one first: if each had another one load the same layers, no room would be left for
/// others. For each range that is another one, since several may be lost at once.
fn order(offer: &Offer, range: LayerRange) -> impl Ord + use<> {
    let (holds, is_free) = (offer.range() == range, offer.stage.first == offer.stage.end);
    let distance = (offer.rtt_us / NEAR_US).max(1.0).log2() as u32;
    let mut id = *offer.node.as_bytes();
    let turned = range.first as usize % id.len();
    id.rotate_left(turned);
    (!holds, !is_free, distance, id)
}

/// Tells the host of a stage who holds the next one, if anybody does.
fn show_the_way(seats: &[Seat], at: usize) {
    let next = seats.get(at + 1).and_then(|next| next.taken.as_ref());
    let next = next.map(|(node, ring, _)| RouteTo { node: *node, ring: *ring });
    let frame = Frame::message(Header::new(Kind::Route, 0), &Route { next });
    if let (Some((.., words)), Ok(frame)) = (&seats[at].taken, frame) {
        // A host that is gone need not know.
        let _ = words.send(frame);
    }
}

/// The next frame of a host.
async fn hear(mesh: &MeshNode, host: NodeId, reader: &mut FrameReader) -> Result<Option<Frame>, FrameError> {
    while_alive(mesh, host, reader.next()).await?
}

/// Waits for what a host is to do. One that is silent for longer than it should be is asked for a sign of life.
async fn while_alive<T>(mesh: &MeshNode, host: NodeId, doing: impl Future<Output = T>) -> Result<T, FrameError> {
    tokio::pin!(doing);
    loop {
        if let Ok(done) = timeout(SILENCE_MAX, &mut doing).await {
            return Ok(done);
        }
        let is_own = host == mesh.mesh().node_id();
        let answer = timeout(SIGN_OF_LIFE, mesh.mesh().ping(host));
        if !is_own && !matches!(answer.await, Ok(Ok(_))) {
            return Err(FrameError::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, "it does not answer")));
        }
    }
}

/// Carries frames between the engine of a driver and a host, until either has enough.
async fn carry_both(
    mesh: &Weak<MeshNode>,
    holder: NodeId,
    (engine, questions): (&mut Drain, &mut FrameReader),
    opened: Opened,
    mut told: mpsc::UnboundedReceiver<Frame>,
) -> Result<(), FrameError> {
    let Opened { reader: mut answers, drain: mut host, loaded } = opened;
    carry::write(engine, &[loaded]).await?;
    let outward = async {
        loop {
            let frame = tokio::select! {
                biased;
                Some(frame) = told.recv() => frame,
                frame = questions.next() => match frame? {
                    Some(frame) => frame,
                    None => return Ok(()),
                },
            };
            carry::write(&mut host, &[frame]).await?;
        }
    };
    let inward = async {
        while let Some(mesh) = mesh.upgrade() {
            let Some(frame) = hear(&mesh, holder, &mut answers).await? else { break };
            // A sign of life is no answer.
            if frame.header.kind != Kind::Progress {
                carry::write(engine, &[frame]).await?;
            }
        }
        Ok(())
    };
    tokio::select! {
        ended = outward => ended,
        ended = inward => ended,
    }
}

/// How the engine finds one of them.
struct Stage {
    ring: Arc<Ring>,
    index: usize,
}

impl RemoteStage for Stage {
    fn connect(&self) -> Result<UnixStream, String> {
        self.ring.runtime.block_on(self.ring.connect(self.index))
    }

    fn lost_because(&self) -> String {
        let seats = self.ring.seats();
        let seat = &seats[self.index];
        match seat.lost {
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
    use murmur_protocol::mesh::{ModelState, ServedStage};

    use super::*;

    fn offer(node: u8, held: LayerRange, rtt_us: f64) -> Offer {
        let stage = ServedStage {
            digest: ModelDigest::from_bytes([0; 32]),
            name: "model".to_owned(),
            layers: 12,
            first: held.first,
            end: held.end,
            state: ModelState::Ready,
            context_tokens: 512,
            parallel: 1,
            exact: false,
            build: String::new(),
            memory_bytes: 0,
            decode_us_per_layer: 0,
            prefill_us_per_layer: 0,
            layers_max: 0,
        };
        // An id whose bytes are in no order.
        let bytes = std::array::from_fn(|at| (node + 1).wrapping_mul(at as u8 * 2 + 77).wrapping_mul(151));
        Offer { node: NodeId::from_bytes(bytes), stage, rtt_us }
    }

    fn asked(mut offers: Vec<Offer>, range: LayerRange) -> Vec<NodeId> {
        offers.sort_by_cached_key(|offer| order(offer, range));
        offers.into_iter().map(|offer| offer.node).collect()
    }

    #[test]
    fn all_drivers_ask_the_same_free_node_for_a_range_and_another_one_for_another_range() {
        let free = LayerRange::new(0, 0);
        let ranges = [LayerRange::new(0, 4), LayerRange::new(4, 8), LayerRange::new(8, 12)];
        // What six drivers see: each is nearest to itself.
        let seen =
            |driver: u8| (0..6).map(|node| offer(node, free, 300.0 * f64::from(driver.abs_diff(node)))).collect();
        let firsts = ranges.map(|range| {
            let asked_by = [0, 1, 2, 3, 4, 5].map(|driver| asked(seen(driver), range));
            assert!(asked_by.iter().all(|order| *order == asked_by[0]));
            asked_by[0][0]
        });
        assert_ne!(firsts[0], firsts[1]);
        assert_ne!(firsts[1], firsts[2]);
    }

    #[test]
    fn who_holds_the_layers_is_asked_first_then_who_holds_none_and_the_near_before_the_far() {
        let (free, range) = (LayerRange::new(0, 0), LayerRange::new(4, 8));
        let offers = [
            offer(0, range, 90_000.0),
            offer(1, free, 100.0),
            offer(2, free, 50_000.0),
            offer(3, free, f64::MAX),
            offer(4, LayerRange::new(0, 4), 0.0),
        ];
        let ids: Vec<NodeId> = offers.iter().map(|offer| offer.node).collect();
        assert_eq!(asked(offers.into_iter().rev().collect(), range), ids);
    }
}
