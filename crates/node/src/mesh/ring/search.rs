//! What a search for a ring remembers from one look to the next.

use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, Instant},
};

use murmur_core::planner::Placement;
use murmur_protocol::mesh::NodeId;

use super::{AVOIDED, NotHeld, facts, offers::Offer};
use crate::mesh::links::is_another_rtt;

/// A node that did not hold what it had offered, and said so, is not asked for so long: it had promised its room to another driver, and what
/// it has is known by then. Each time that it does so again it is twice as long, up to [`AVOIDED`].
const REFUSED: Duration = Duration::from_secs(2);

/// The memory of the search for a model's ring.
pub(crate) struct Search {
    /// The offers and the ring in use at the last look.
    seen: Option<(Vec<Offer>, Option<Vec<Placement>>)>,
    /// Who offered layers when it was looked at last, and since when these did.
    same_nodes: Option<(Vec<NodeId>, Instant)>,
    /// Since when there is no ring: the last one, or the last that was tried, is no more.
    without_since: Option<Instant>,
    /// Whether there was one before, or one was tried.
    is_another: bool,
    /// When to look again although nothing has changed.
    again_at: Option<Instant>,
    /// Since when there is a better ring than the one in use.
    better_since: Option<Instant>,
    /// Before that no better ring is opened.
    pub(super) moves_from: Instant,
    /// Since when requests wait here although fewer run than a ring takes: other drivers' requests have their room.
    crowded_since: Option<Instant>,
    /// Since when no request runs or waits here.
    idle_since: Option<Instant>,
    /// Before that no better ring is looked for than the one beside the crowded one.
    stays_until: Instant,
    /// Who did not hold what it said, and until when it is not believed.
    avoided: HashMap<NodeId, Avoided>,
    /// Time of a row in a layer, us, when decoding and in a prompt, as it was measured last.
    measured: BTreeMap<NodeId, (u32, u32)>,
}

/// A node that did not hold what it said.
struct Avoided {
    time: Duration,
    until: Instant,
}

impl Search {
    pub(crate) fn new() -> Search {
        Search {
            seen: None,
            same_nodes: None,
            without_since: None,
            is_another: false,
            again_at: None,
            better_since: None,
            moves_from: Instant::now(),
            crowded_since: None,
            idle_since: None,
            stays_until: Instant::now(),
            avoided: HashMap::new(),
            measured: BTreeMap::new(),
        }
    }

    /// Whether another look is worth it: something has changed, or the time for it has come.
    pub(super) fn is_due(&mut self, offers: &[Offer], in_use: Option<&Vec<Placement>>) -> bool {
        let is_known = self.seen.as_ref().is_some_and(|(seen, ring)| {
            let pairs = || seen.iter().zip(offers);
            ring.as_ref() == in_use && seen.len() == offers.len() && pairs().all(|(seen, now)| is_about(seen, now))
        });
        let is_time = self.again_at.is_some_and(|at| at <= Instant::now());
        if is_known && !is_time {
            return false;
        }
        self.seen = Some((offers.to_vec(), in_use.cloned()));
        self.again_at = None;
        true
    }

    /// Whether it is this late. If not, there is another look then.
    pub(super) fn is_time(&mut self, at: Instant) -> bool {
        let is_time = at <= Instant::now();
        if !is_time {
            self.again_at = Some(at);
        }
        is_time
    }

    /// Notes who offers layers now, and says since when the same nodes do.
    pub(super) fn same_nodes_since(&mut self, offers: &[Offer]) -> Instant {
        let nodes: Vec<NodeId> = offers.iter().map(|offer| offer.node).collect();
        let same = self.same_nodes.take().filter(|(before, _)| *before == nodes);
        self.same_nodes.insert(same.unwrap_or_else(|| (nodes, Instant::now()))).1
    }

    /// Notes whether there is a ring now, and says since when there is none, and whether that is not for the first time.
    pub(super) fn without_since(&mut self, is_without: bool) -> (Instant, bool) {
        let now = Instant::now();
        self.is_another |= !is_without;
        self.without_since = is_without.then(|| self.without_since.unwrap_or(now));
        (self.without_since.unwrap_or(now), self.is_another)
    }

    /// Notes whether there is a better ring now, and says since when there is.
    pub(super) fn better_since(&mut self, is_better: bool) -> Option<Instant> {
        self.better_since = is_better.then(|| self.better_since.unwrap_or_else(Instant::now));
        self.better_since
    }

    /// Notes whether the ring in use is crowded now, and says since when it is.
    pub(super) fn crowded_since(&mut self, is_crowded: bool) -> Option<Instant> {
        self.crowded_since = is_crowded.then(|| self.crowded_since.unwrap_or_else(Instant::now));
        self.crowded_since
    }

    /// Notes whether no request runs or waits here now, and says since when none does.
    pub(super) fn idle_since(&mut self, is_idle: bool) -> Option<Instant> {
        self.idle_since = is_idle.then(|| self.idle_since.unwrap_or_else(Instant::now));
        self.idle_since
    }

    /// A ring beside the crowded one is about to be used.
    pub(super) fn stays_for(&mut self, time: Duration) {
        self.stays_until = Instant::now() + time;
    }

    /// Whether a better ring is looked for. If not, it is later.
    pub(super) fn may_improve(&mut self) -> bool {
        self.is_time(self.stays_until)
    }

    /// A ring could not be opened, or is lost. The next one is without the nodes that did not hold their layers; when there are none, no
    /// better one is opened for as long.
    pub(super) fn failed(&mut self, without: impl IntoIterator<Item = (NodeId, NotHeld)>) {
        let now = Instant::now();
        // Nothing has changed for which a better one would have to wait.
        self.stays_until = now;
        let mut without = without.into_iter().peekable();
        if without.peek().is_none() {
            self.moves_from = now + AVOIDED;
        }
        self.avoided.retain(|_, avoided| avoided.until + AVOIDED > now);
        for (node, not_held) in without {
            let before = self.avoided.get(&node).map(|avoided| avoided.time);
            let time = match not_held {
                NotHeld::Refused(_) => before.map_or(REFUSED, |before| (2 * before).min(AVOIDED)),
                NotHeld::Unreachable(_) => AVOIDED,
            };
            self.avoided.insert(node, Avoided { time, until: now + time });
        }
        (self.seen, self.without_since, self.is_another) = (None, None, true);
    }

    /// Whether rings are made without this node now.
    pub(super) fn is_avoided(&self, node: NodeId) -> bool {
        self.avoided.get(&node).is_some_and(|avoided| avoided.until > Instant::now())
    }

    /// Notes what is measured now, and adds what was before.
    pub(super) fn recall(&mut self, offers: &mut [Offer]) {
        self.measured.retain(|node, _| offers.iter().any(|offer| offer.node == *node));
        for Offer { node, stage, .. } in offers.iter() {
            if stage.decode_us_per_layer > 0 {
                self.measured.insert(*node, (stage.decode_us_per_layer, stage.prefill_us_per_layer));
            }
        }
        self.add_measured(offers);
    }

    /// Adds what was measured before. Of a node that has let go of its layers that counts on, and one that has not computed any
    /// yet takes what others take, by how fast the machines are: else layers would move to whoever is unknown, and back.
    pub(super) fn add_measured(&self, offers: &mut [Offer]) {
        let measured = |Offer { node, stage, .. }: &Offer| match stage.decode_us_per_layer {
            0 => self.measured.get(node).copied(),
            decode_us => Some((decode_us, stage.prefill_us_per_layer)),
        };
        let speed = |offer: &Offer| Some((offer.ways.machine, measured(offer)?));
        let known: Vec<_> = offers.iter().filter_map(speed).collect();
        for offer in offers {
            let presumed = facts::presumed(offer.ways.machine, &known);
            let (decode_us, prefill_us) = measured(offer).unwrap_or(presumed);
            offer.stage.decode_us_per_layer = decode_us;
            offer.stage.prefill_us_per_layer = if prefill_us > 0 { prefill_us } else { presumed.1 };
        }
    }
}

/// Whether the same is known of a node, but for the jitter of its round trip.
fn is_about(seen: &Offer, now: &Offer) -> bool {
    !is_another_rtt(seen.rtt_us, now.rtt_us) && Offer { rtt_us: now.rtt_us, ..seen.clone() } == *now
}

#[cfg(test)]
mod tests {
    use murmur_gguf::LayerRange;
    use murmur_protocol::mesh::ModelState;

    use super::{
        super::choice::tests::{LAYERS, Peer, RING, id, seen_by},
        *,
    };

    #[test]
    fn nothing_is_planned_again_before_something_has_changed() {
        let (mut search, mut offers) = (Search::new(), seen_by(1, &RING));
        let due = [search.is_due(&offers, None), search.is_due(&offers, None)];
        assert_eq!(due, [true, false]);
        offers[1].rtt_us *= 1.2;
        assert!(!search.is_due(&offers, None), "a round trip is never the same");
        offers[1].rtt_us *= 2.0;
        assert!(search.is_due(&offers, None));
        offers[1].stage.state = ModelState::Draining;
        assert!(search.is_due(&offers, None));
        let ring = vec![Placement { node: id(1), layers: LayerRange::new(0, LAYERS) }];
        let due = [search.is_due(&offers, Some(&ring)), search.is_due(&offers, Some(&ring))];
        assert_eq!(due, [true, false]);
        search.failed([(id(2), NotHeld::Refused(String::new()))]);
        assert!(search.is_due(&offers, Some(&ring)) && search.is_avoided(id(2)) && !search.is_avoided(id(1)));
    }

    #[test]
    fn who_refuses_is_asked_again_soon_and_each_time_later_and_who_cannot_be_reached_not_before_long() {
        let mut search = Search::new();
        let refused = || NotHeld::Refused(String::new());
        let times = [(); 6].map(|()| {
            search.failed([(id(1), refused()), (id(2), NotHeld::Unreachable(String::new()))]);
            [1, 2].map(|node| search.avoided[&id(node)].time.as_secs())
        });
        assert_eq!(times.map(|[refuses, _]| refuses), [2, 4, 8, 16, 30, 30]);
        assert_eq!(times.map(|[_, silent]| silent), [30; 6]);
        // That was long ago.
        search.avoided.get_mut(&id(1)).unwrap().until = Instant::now() - AVOIDED;
        assert!(!search.is_avoided(id(1)));
        search.failed([(id(1), refused())]);
        assert_eq!(search.avoided[&id(1)].time, REFUSED);
    }

    #[test]
    fn turns_to_make_a_ring_begin_anew_when_one_is_lost_and_when_one_could_not_be_made() {
        let mut search = Search::new();
        let (first, is_another) = search.without_since(true);
        assert!(!is_another && search.without_since(true) == (first, false));
        search.without_since(false);
        let (lost, is_another) = search.without_since(true);
        assert!(lost > first && is_another && search.without_since(true).0 == lost);
        search.failed([]);
        assert!(search.without_since(true).0 > lost);
    }

    #[test]
    fn a_node_that_has_just_been_heard_of_is_waited_for_before_a_first_ring() {
        let mut search = Search::new();
        let two = search.same_nodes_since(&seen_by(1, &RING[..2]));
        assert_eq!(search.same_nodes_since(&seen_by(1, &[RING[0], Peer(None, 4, 0)])), two);
        let three = search.same_nodes_since(&seen_by(1, &RING));
        assert!(three > two);
        assert!(search.same_nodes_since(&seen_by(1, &RING[..2])) > three, "one that is gone may be making a ring");
    }

    #[test]
    fn what_was_measured_of_a_node_counts_when_it_has_let_go_of_its_layers() {
        let mut search = Search::new();
        search.recall(&mut seen_by(1, &[RING[0], Peer(Some((4, 8)), 4, 700)]));
        let mut offers = seen_by(1, &[RING[0], Peer(None, 4, 0)]);
        search.recall(&mut offers);
        assert_eq!(offers[1].stage.decode_us_per_layer, 700);
        // One that was away is as unknown as one that was never there.
        search.recall(&mut seen_by(1, &RING[..1]));
        let mut offers = seen_by(1, &[RING[0], Peer(None, 4, 0)]);
        search.recall(&mut offers);
        assert_eq!(offers[1].stage.decode_us_per_layer, 100);
    }
}
