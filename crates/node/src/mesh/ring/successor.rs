//! Who takes a stage that nobody holds: whom to ask for it, and in which order.
//!
//! Who holds the layers goes first, as nothing has to be loaded there; then who holds nothing that is used. Among these the planner's costs
//! decide: how long a token takes there and on the ways from and to the neighbours in the ring, and whether there is room at all.
//!
//! All drivers are to ask the same one first: if each had another one load the same layers, no room would be left for others. So what
//! counts is what all know alike, the ways from and to a driver are the mean of those of all, and those that are about as good are asked
//! in an order that has nothing to do with who asks. For each range that is another one, since several may be lost at once.

use murmur_core::planner::{Ask, Links, ModelFacts, NodeFacts, Placement, Planner};
use murmur_gguf::LayerRange;
use murmur_protocol::mesh::NodeId;

use super::{choice::Wanted, offers::Offer};

/// Two nodes are about as good when a token takes longer by less than this factor at one of them: links are told anew when they are off by
/// a quarter.
const ABOUT_AS_GOOD: f64 = 1.25;
/// Nor does it make a difference when it is less than a part of this, us: machines that are busy are off by as much.
const UNSURE_US: f64 = 2_000.0;

/// Who has the stage before, or the one after.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Neighbour {
    /// Whose ring it is, at both of its ends.
    Driver,
    /// Whoever holds it, or is to.
    Host(NodeId),
    /// Nobody at present.
    Nobody,
}

impl Neighbour {
    fn node(self, driver: NodeId) -> Option<NodeId> {
        match self {
            Neighbour::Driver => Some(driver),
            Neighbour::Host(node) => Some(node),
            Neighbour::Nobody => None,
        }
    }
}

/// A stage for which somebody is sought.
#[derive(Debug, Clone, Copy)]
pub(super) struct Vacancy {
    pub(super) range: LayerRange,
    pub(super) before: Neighbour,
    pub(super) after: Neighbour,
}

impl Vacancy {
    fn neighbours(&self, driver: NodeId) -> (Option<NodeId>, Option<NodeId>) {
        (self.before.node(driver), self.after.node(driver))
    }
}

/// In which order nodes are asked.
pub(super) type Rank = (bool, bool, u32, [u8; 32]);

/// What is known of those that could hold stages of a ring.
pub(super) struct Successors<'a> {
    wanted: Wanted<'a>,
    links: Links,
    nodes: Vec<NodeFacts>,
    /// What all drivers would ask, and the ways for that.
    of_all: (Ask, Links),
}

impl<'a> Successors<'a> {
    /// `ask`: of this driver, for the size of the ring.
    pub(super) fn new(offers: &'a [Offer], facts: &'a ModelFacts, ask: Ask) -> Successors<'a> {
        let of_driver = ask.clone();
        let wanted = Wanted { offers, facts, ask };
        let (links, nodes, of_all) = (wanted.links(), wanted.nodes(), wanted.of_all_drivers(of_driver));
        Successors { wanted, links, nodes, of_all }
    }

    /// Whether a node is as near to the neighbours as the user wants, as far as these are known: by the same ways as where a ring is planned.
    pub(super) fn allows(&self, vacancy: &Vacancy, node: NodeId) -> bool {
        let Some(rtt_us_max) = self.wanted.ask.rtt_us_max else { return true };
        let driver = self.wanted.ask.driver;
        let is_known = |it: NodeId| it == driver || self.wanted.offers.iter().any(|offer| offer.node == it);
        let is_near = |it: NodeId| it == node || !is_known(it) || self.links.rtt_us(it, node) <= rtt_us_max;
        let (before, after) = vacancy.neighbours(driver);
        before.is_none_or(is_near) && after.is_none_or(is_near)
    }

    /// What a stage would count at a node, us; `None`: it has no room for it.
    fn us(&self, vacancy: &Vacancy, node: NodeId) -> Option<f64> {
        let (ask, links) = &self.of_all;
        let planner = Planner { model: self.wanted.facts, nodes: &self.nodes, links };
        planner.stage_us(&Placement { node, layers: vacancy.range }, vacancy.neighbours(ask.driver), ask)
    }

    /// The least that it counts at any of these that might take it; infinite, if none of them has room.
    pub(super) fn least_us<'b>(&self, vacancy: &Vacancy, asked: impl IntoIterator<Item = &'b Offer>) -> f64 {
        let might = asked.into_iter().filter(|offer| offer.is_free() || offer.range() == vacancy.range);
        might.filter_map(|offer| self.us(vacancy, offer.node)).fold(f64::INFINITY, f64::min)
    }

    /// When a node is asked, where others are at which the stage counts `least_us`.
    pub(super) fn rank(&self, vacancy: &Vacancy, offer: &Offer, least_us: f64) -> Rank {
        let steps = |us: f64| ((us + UNSURE_US) / (least_us + UNSURE_US)).log(ABOUT_AS_GOOD) as u32;
        let steps = self.us(vacancy, offer.node).map_or(u32::MAX, steps);
        let mut id = *offer.node.as_bytes();
        let turned = vacancy.range.first as usize % id.len();
        id.rotate_left(turned);
        (offer.range() != vacancy.range, !offer.is_free(), steps, id)
    }
}

#[cfg(test)]
mod tests {
    use murmur_protocol::mesh::{MeasuredLink, ModelDigest, ModelState, ServedStage};

    use super::{
        super::facts::{Ways, tests::model},
        *,
    };

    const NOTHING: LayerRange = LayerRange { first: 0, end: 0 };
    const RANGE: LayerRange = LayerRange { first: 4, end: 8 };
    /// A driver that holds nothing.
    const DRIVER: u8 = 9;

    /// One whose bytes are in no order.
    fn id(number: u8) -> NodeId {
        NodeId::from_bytes(std::array::from_fn(|at| (number + 1).wrapping_mul(at as u8 * 2 + 77).wrapping_mul(151)))
    }

    /// A machine that holds these layers in use, takes so long for a layer, us, and holds so many at most.
    #[derive(Clone, Copy)]
    struct Machine(LayerRange, u32, u32);

    /// What a driver knows of machines that are so far from each other.
    fn seen_by(driver: u8, machines: &[Machine], far_us: impl Fn(u8, u8) -> u32) -> Vec<Offer> {
        let numbers = 0..machines.len() as u8;
        let offer = |(number, &Machine(held, layer_us, layers_max)): (u8, &Machine)| {
            let others = numbers.clone().filter(|other| *other != number);
            let told = others.map(|other| MeasuredLink::to(&id(other), far_us(number, other), 0)).collect();
            let stage = ServedStage {
                digest: ModelDigest::from_bytes([0; 32]),
                name: "model".to_owned(),
                layers: 12,
                first: held.first,
                end: held.end,
                state: if held.is_empty() { ModelState::Available } else { ModelState::Ready },
                context_tokens: 512,
                parallel: 1,
                exact: false,
                build: String::new(),
                memory_bytes: 1 << 30,
                decode_us_per_layer: layer_us,
                prefill_us_per_layer: 0,
                layers_max,
            };
            let rtt_us = if number == driver { 0.0 } else { f64::from(far_us(driver, number)) };
            Offer { node: id(number), stage, rtt_us, ways: Ways { told, ..Ways::default() } }
        };
        numbers.clone().zip(machines).map(offer).collect()
    }

    /// Whom a driver asks, in this order.
    fn asked(driver: u8, offers: &[Offer], vacancy: &Vacancy, rtt_us_max: Option<f64>) -> Vec<NodeId> {
        let facts = model();
        let successors = Successors::new(offers, &facts, Ask { rtt_us_max, ..Ask::new(id(driver), 512) });
        let mut asked: Vec<&Offer> = offers.iter().filter(|offer| successors.allows(vacancy, offer.node)).collect();
        let least_us = successors.least_us(vacancy, asked.iter().copied());
        asked.sort_by_cached_key(|offer| successors.rank(vacancy, offer, least_us));
        asked.into_iter().map(|offer| offer.node).collect()
    }

    fn between(before: Neighbour, after: Neighbour) -> Vacancy {
        Vacancy { range: RANGE, before, after }
    }

    #[test]
    fn all_drivers_ask_the_same_free_node_for_a_range_and_another_one_for_another_range() {
        let machines = [Machine(NOTHING, 100, 4); 6];
        let vacancies = [(0, 4), (4, 8), (8, 12)].map(|(first, end)| Vacancy {
            range: LayerRange::new(first, end),
            before: if first == 0 { Neighbour::Driver } else { Neighbour::Nobody },
            after: if end == 12 { Neighbour::Driver } else { Neighbour::Nobody },
        });
        let firsts = vacancies.map(|vacancy| {
            // Each is nearest to itself.
            let asked_by = [0, 1, 2, 3, 4, 5].map(|driver| {
                let offers = seen_by(driver, &machines, |a, b| 300 * u32::from(a.abs_diff(b)));
                asked(driver, &offers, &vacancy, None)
            });
            assert!(asked_by.iter().all(|order| *order == asked_by[0]));
            asked_by[0][0]
        });
        assert_ne!(firsts[0], firsts[1]);
        assert_ne!(firsts[1], firsts[2]);
    }

    #[test]
    fn who_holds_the_layers_is_asked_first_then_who_holds_none_the_fast_before_the_slow_and_those_with_room() {
        let machines = [
            Machine(RANGE, 5_000, 4),
            Machine(NOTHING, 1_000, 4),
            Machine(NOTHING, 2_000, 4),
            Machine(NOTHING, 10, 3),
            Machine(LayerRange { first: 0, end: 4 }, 10, 4),
        ];
        let offers: Vec<Offer> = seen_by(DRIVER, &machines, |_, _| 1_000).into_iter().rev().collect();
        let vacancy = between(Neighbour::Nobody, Neighbour::Nobody);
        assert_eq!(asked(DRIVER, &offers, &vacancy, None), [0, 1, 2, 3, 4].map(id));
        // Differences that may be none are no reason.
        let machines = [Machine(NOTHING, 100, 4), Machine(NOTHING, 110, 4), Machine(NOTHING, 105, 4)];
        let orders = [machines, [machines[2], machines[0], machines[1]]].map(|machines| {
            let offers = seen_by(DRIVER, &machines, |_, _| 1_000);
            asked(DRIVER, &offers, &vacancy, None)
        });
        assert_eq!(orders[0], orders[1]);
    }

    #[test]
    fn who_is_near_the_neighbours_goes_before_who_is_near_the_driver() {
        let held = [(0, 4), (8, 12)].map(|(first, end)| Machine(LayerRange::new(first, end), 100, 4));
        let machines = [Machine(NOTHING, 100, 4), Machine(NOTHING, 100, 4), held[0], held[1]];
        let is_home = |number: u8| number == 0 || number == DRIVER;
        let offers = seen_by(DRIVER, &machines, |a, b| if is_home(a) == is_home(b) { 2_000 } else { 80_000 });
        let vacancy = between(Neighbour::Host(id(2)), Neighbour::Host(id(3)));
        assert_eq!(asked(DRIVER, &offers, &vacancy, None)[..2], [1, 0].map(id));
    }

    #[test]
    fn the_longest_round_trip_is_one_to_the_neighbours_in_the_ring_however_far_the_driver_is() {
        // The ring is A, X, Y, Z, A, and W is where A is.
        let [a, x, y, z, w] = [0, 1, 2, 3, 4];
        let machines = [
            Machine(NOTHING, 100, 4),
            Machine(LayerRange { first: 0, end: 4 }, 100, 4),
            Machine(NOTHING, 100, 4),
            Machine(LayerRange { first: 8, end: 12 }, 100, 4),
            Machine(NOTHING, 100, 4),
        ];
        let far_us = |one: u8, other: u8| match (one.min(other), one.max(other)) {
            (0, 1) | (1, 2) | (2, 3) | (0, 3) => 25_000,
            (0, 2) => 50_000,
            (0, 4) => 5_000,
            (1, 3) => 28_000,
            _ => 40_000,
        };
        let offers = seen_by(a, &machines, far_us);
        let facts = model();
        let allowed = |vacancy: Vacancy, node: u8| {
            let ask = Ask { rtt_us_max: Some(30_000.0), ..Ask::new(id(a), 512) };
            Successors::new(&offers, &facts, ask).allows(&vacancy, id(node))
        };
        let middle = between(Neighbour::Host(id(x)), Neighbour::Host(id(z)));
        assert_eq!([a, y, w].map(|node| allowed(middle, node)), [true, true, false]);
        assert!(allowed(between(Neighbour::Driver, Neighbour::Host(id(y))), x));
        assert!(!allowed(between(Neighbour::Driver, Neighbour::Host(id(x))), y));
        // Of whoever is not there nothing is known.
        assert!(allowed(between(Neighbour::Nobody, Neighbour::Host(id(8))), w));
        assert!(!asked(a, &offers, &middle, Some(30_000.0)).contains(&id(w)));
    }
}
