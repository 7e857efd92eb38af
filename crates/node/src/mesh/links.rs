//! The ways from this node to those that hold layers of the same models. They are measured here and told in the own record, so
//! that who plans a ring knows more than its own ways (`ring/facts.rs`).
//!
//! Nothing is sent to find out a rate: what of the ring's own traffic went over a link while it was full counts. Of round trips the least
//! of a while counts, as the rest is what machines and queues add, and what was told stays told until it is off by a quarter: the
//! records of a mesh in which nothing happens are as many as without.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, Instant},
};

use murmur_core::planner::facts::BYTES_PER_S_UNKNOWN;
use murmur_net::{Flow, PeerView};
use murmur_protocol::mesh::{
    MeasuredLink, ModelDigest, NodeId,
    measured::{LINKS_MAX, RTT_US_MAX},
};
use rand::{Rng, seq::SliceRandom};
use tokio::task::JoinSet;

use super::{MeshNode, both};
use crate::Node;

/// The others are pinged about so often, so that there is a connection to measure.
const PING_EVERY: Duration = Duration::from_secs(20);
/// The least round trip of so long counts.
const WINDOW: Duration = Duration::from_secs(20);
/// The same for a way that was not told yet: the first round trips of a connection are its slowest.
const FIRST_WINDOW: Duration = Duration::from_secs(1);
/// Within this the ways to a node that has come are measured and told. Until they are, it gets no layers of a ring that is made
/// anew: those stay where they are loaded.
const MEASURED_WITHIN: Duration = Duration::from_secs(10);
/// What was told stays told unless it is off by more than this part.
const STEP: f64 = 0.25;
/// Nor do round trips count as changed that differ by less, us: on a busy machine they always do.
const RTT_STEP_US: f64 = 500.0;

/// A link is full when so much goes over it of what congestion control lets go: then no more could.
const FULL_SHARE: f64 = 0.5;
/// What goes between two looks says nothing of a link when it is less.
const FLOW_BYTES_MIN: u64 = 64 << 10;

/// What was measured.
#[derive(Default)]
pub(super) struct LinkBook(Mutex<BTreeMap<NodeId, Way>>);

/// The way to one of the others.
struct Way {
    /// Since when it matters.
    known_since: Instant,
    /// Since when these are gathered.
    since: Instant,
    least_rtt_us: Option<f64>,
    /// Bytes that went while the link was full, and seconds of that.
    full: (f64, f64),
    /// When there was room for more.
    most_bytes_per_s: f64,
    /// What had been sent at the last look, and when that was.
    sent: Option<(u64, Instant)>,
    /// What others are told; 0: nothing yet.
    told_rtt_us: f64,
    told_bytes_per_s: f64,
}

impl Way {
    fn new(now: Instant) -> Way {
        Way {
            known_since: now,
            since: now,
            least_rtt_us: None,
            full: (0.0, 0.0),
            most_bytes_per_s: 0.0,
            sent: None,
            told_rtt_us: 0.0,
            told_bytes_per_s: 0.0,
        }
    }

    /// Notes what goes there, and how far it is where that is known.
    fn note(&mut self, rtt_us: Option<f64>, flow: Option<Flow>, now: Instant) {
        self.note_flow(flow, now);
        let Some(rtt_us) = rtt_us else { return };
        let least = self.least_rtt_us.map_or(rtt_us, |least| least.min(rtt_us));
        self.least_rtt_us = Some(least);
        let window = if self.told_rtt_us > 0.0 { WINDOW } else { FIRST_WINDOW };
        if now.duration_since(self.since) < window {
            return;
        }
        if is_another_rtt(self.told_rtt_us, least) || self.told_rtt_us == 0.0 {
            self.told_rtt_us = least.max(1.0);
        }
        let told = self.told_bytes_per_s;
        let found = match self.full {
            (bytes, seconds) if seconds > 0.0 => bytes / seconds,
            // More could go than went: it is no less than was known.
            _ if self.most_bytes_per_s > told.max(BYTES_PER_S_UNKNOWN) => self.most_bytes_per_s,
            // Without traffic nothing is known anew.
            _ => told,
        };
        if (found - told).abs() > STEP * told {
            self.told_bytes_per_s = found;
        }
        (self.since, self.least_rtt_us, self.full, self.most_bytes_per_s) = (now, None, (0.0, 0.0), 0.0);
    }

    fn note_flow(&mut self, flow: Option<Flow>, now: Instant) {
        let before = std::mem::replace(&mut self.sent, flow.map(|flow| (flow.sent_bytes, now)));
        let (Some(flow), Some((sent, at))) = (flow, before) else { return };
        let bytes = flow.sent_bytes.saturating_sub(sent);
        if bytes >= FLOW_BYTES_MIN && now > at {
            let (bytes, seconds) = (bytes as f64, now.duration_since(at).as_secs_f64());
            match bytes / seconds {
                bytes_per_s if bytes_per_s < FULL_SHARE * flow.bytes_per_s_max => {
                    self.most_bytes_per_s = self.most_bytes_per_s.max(bytes_per_s);
                }
                _ => self.full = (self.full.0 + bytes, self.full.1 + seconds),
            }
        }
    }
}

impl LinkBook {
    fn book(&self) -> MutexGuard<'_, BTreeMap<NodeId, Way>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes what is known of the ways to these nodes, which are all that matter, and gives what others are to be told, the
    /// nearest first.
    pub(super) fn look<'a>(&self, peers: impl Iterator<Item = &'a PeerView>, now: Instant) -> Vec<MeasuredLink> {
        self.note(peers.map(|peer| (peer.record().node, peer.rtt_ms.map(|ms| 1000.0 * ms), peer.flow)), now)
    }

    fn note(&self, seen: impl Iterator<Item = (NodeId, Option<f64>, Option<Flow>)>, now: Instant) -> Vec<MeasuredLink> {
        let mut book = self.book();
        let mut before = std::mem::take(&mut *book);
        for (node, rtt_us, flow) in seen {
            let mut way = before.remove(&node).unwrap_or_else(|| Way::new(now));
            way.note(rtt_us, flow, now);
            book.insert(node, way);
        }
        let mut told: Vec<_> = book.iter().filter(|(_, way)| way.told_rtt_us > 0.0).collect();
        told.sort_by(|a, b| a.1.told_rtt_us.total_cmp(&b.1.told_rtt_us));
        let link = |(node, way): (&NodeId, &Way)| {
            MeasuredLink::to(node, way.told_rtt_us.min(f64::from(RTT_US_MAX)) as u32, way.told_bytes_per_s as u64)
        };
        told.into_iter().take(LINKS_MAX).map(link).collect()
    }

    /// Whether a node offers layers since a moment only, so that its ways are still being measured.
    pub(super) fn is_new(&self, node: &NodeId) -> bool {
        self.book().get(node).is_none_or(|way| way.known_since.elapsed() < MEASURED_WITHIN)
    }

    /// Round trip in microseconds and bytes per second, 0 if not known, of the way to a node, as others are told.
    pub(super) fn to(&self, node: &NodeId) -> Option<(f64, u64)> {
        let book = self.book();
        book.get(node).filter(|way| way.told_rtt_us > 0.0).map(|way| (way.told_rtt_us, way.told_bytes_per_s as u64))
    }
}

/// Half of the round trip between two nodes, us; 0 within one. Of what both ends have measured the longer counts; `None`: neither has.
pub(crate) fn one_way_us(mesh: &MeshNode, peers: &[PeerView], from: NodeId, to: NodeId) -> Option<u64> {
    if from == to {
        return Some(0);
    }
    let peer = |node: NodeId| peers.iter().find(|peer| peer.record().node == node);
    let measured_us = |from: NodeId, to: NodeId| {
        if from == mesh.mesh().node_id() {
            let told = mesh.links().to(&to).map(|(rtt_us, _)| rtt_us);
            return told.or_else(|| Some(1000.0 * peer(to)?.rtt_ms?));
        }
        let told = peer(from)?.record().links.iter().find(|link| link.is_to(&to))?;
        Some(f64::from(told.rtt_us))
    };
    let rtt_us = [measured_us(from, to), measured_us(to, from)].into_iter().flatten().reduce(f64::max)?;
    Some((rtt_us / 2.0) as u64)
}

/// Whether a round trip, us, is another one than before, and not the same with what machines and queues add.
pub(super) fn is_another_rtt(before_us: f64, now_us: f64) -> bool {
    (now_us - before_us).abs() > (STEP * before_us).max(RTT_STEP_US)
}

/// Whether a node offers layers of one of these models.
pub(super) fn shares_a_model(peer: &PeerView, own: &[ModelDigest]) -> bool {
    peer.record().stages.iter().any(|stage| own.contains(&stage.digest))
}

/// Pings the others now and then, for as long as there is a node: those that there is a connection to before those that would
/// need one, so that a large mesh does not become one of connections.
pub(super) async fn run(node: Weak<Node>, mesh: Weak<MeshNode>) {
    loop {
        let pause = PING_EVERY.mul_f64(rand::rng().random_range(0.75..1.25));
        tokio::time::sleep(pause).await;
        let Some((node, mesh)) = both(&node, &mesh) else { return };
        let spread = node.models.iter().filter(|model| model.is_spread());
        let own: Vec<ModelDigest> = spread.filter_map(|model| Some(model.identity()?.digest)).collect();
        let mut peers = mesh.mesh().peers();
        peers.retain(|peer| shares_a_model(peer, &own));
        peers.shuffle(&mut rand::rng());
        peers.sort_by_key(|peer| peer.rtt_ms.is_none());
        let mut pings = JoinSet::new();
        for peer in peers.into_iter().take(LINKS_MAX) {
            let mesh = Arc::clone(mesh.mesh());
            pings.spawn(async move { mesh.ping(peer.record().node).await });
        }
        // Who does not answer is not measured, and is found to be gone by others.
        while pings.join_next().await.is_some() {}
    }
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng, rngs::StdRng};

    use super::*;

    fn node(number: u8) -> NodeId {
        NodeId::from_bytes([number; 32])
    }

    #[test]
    fn round_trips_that_jitter_change_nothing_that_is_told_and_one_that_is_another_does() {
        let (book, start) = (LinkBook::default(), Instant::now());
        let mut random = StdRng::seed_from_u64(7);
        let mut told = Vec::new();
        // An hour of looks: 20 ms and what a busy machine adds, mostly little.
        for at in 0..7_200u32 {
            let rtt_us = 20_000.0 + 200_000.0 * random.random_range(0.0f64..1.0).powi(8);
            let links = book.note([(node(1), Some(rtt_us), None)].into_iter(), start + at * Duration::from_millis(500));
            if told.last() != Some(&links) {
                told.push(links);
            }
        }
        assert!(told.len() <= 3 && told[0].is_empty(), "{told:?}");
        let before = book.to(&node(1)).unwrap().0;
        assert!((20_000.0..27_000.0).contains(&before), "{before}");
        for at in 7_200..7_300u32 {
            book.note([(node(1), Some(60_000.0), None)].into_iter(), start + at * Duration::from_millis(500));
        }
        assert_eq!(book.to(&node(1)), Some((60_000.0, 0)));
    }

    #[test]
    fn the_nearest_are_told_and_who_offers_nothing_any_more_is_not() {
        let (book, start) = (LinkBook::default(), Instant::now());
        let seen = |from: u8| (from..40).map(|i| (node(i), Some(1_000.0 * f64::from(i)), None));
        assert!(book.note(seen(1), start).is_empty());
        let told = book.note(seen(1), start + FIRST_WINDOW);
        assert_eq!(told.len(), LINKS_MAX);
        assert!(told[0].is_to(&node(1)) && told[0].rtt_us == 1_000 && told[LINKS_MAX - 1].is_to(&node(16)));
        let told = book.note(seen(9), start + FIRST_WINDOW + WINDOW);
        assert!(told[0].is_to(&node(9)) && told[0].rtt_us == 9_000);
        // That there is no connection at the moment changes nothing.
        let told = book.note([(node(9), None, None)].into_iter(), start + FIRST_WINDOW + 2 * WINDOW);
        assert_eq!(told, [MeasuredLink::to(&node(9), 9_000, 0)]);
    }

    /// What is told of a link over which so many bytes go in a second each, and at most so many could.
    fn told_after(flows: &[(u64, f64)]) -> u64 {
        let (book, start, mut sent_bytes) = (LinkBook::default(), Instant::now(), 0);
        let mut looks = 0..;
        let mut look = |bytes: u64, bytes_per_s_max: f64| {
            sent_bytes += bytes;
            let flow = Flow { sent_bytes, bytes_per_s_max };
            let at = start + Duration::from_secs(looks.next().unwrap());
            book.note([(node(1), Some(900.0), Some(flow))].into_iter(), at).first().map_or(0, |link| link.bytes_per_s)
        };
        for &(bytes, most) in flows {
            look(bytes, most);
        }
        // What was learnt stays when nothing goes any more, and the window opens that congestion control has left.
        (0..60).map(|_| look(0, 1e9)).last().unwrap()
    }

    #[test]
    fn what_goes_over_a_full_link_is_its_rate_and_over_another_the_least_that_it_has() {
        assert_eq!(told_after(&[(0, 1e5), (300_000, 250e3), (280_000, 240e3), (100_000, 240e3)]), 300_000);
        assert_eq!(told_after(&[(0, 1e9), (9_000_000, 1e9)]), 9_000_000);
        assert_eq!(told_after(&[(0, 1e9), (500_000, 1e9)]), 0, "less than what is taken for granted");
        assert_eq!(told_after(&[(0, 1e5), (2_000, 1e3)]), 0, "too little to tell");
        let faster = [[(0, 1e5), (300_000, 250e3)].as_slice(), &[(0, 1e9); 30], &[(9_000_000, 1e9)]].concat();
        assert_eq!(told_after(&faster), 9_000_000);
        let slower = [[(0, 1e5), (9_000_000, 1e6)].as_slice(), &[(0, 1e9); 30], &[(300_000, 250e3)]].concat();
        assert_eq!(told_after(&slower), 300_000);
    }
}
