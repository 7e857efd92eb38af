//! Which ring: what the planner makes of what is offered.

use murmur_core::planner::{
    Ask, Link, Links, ModelFacts, NODES_MAX, NoRing, NodeFacts, Pin, Placement, Plan, Planner, StagePlan,
};
use murmur_protocol::mesh::{ModelState, NodeId};

use super::{
    facts,
    offers::{Offer, Size},
};
use crate::fit;

/// A ring is about as good as another one if a token takes it this factor of time at most.
const AS_GOOD: f64 = 1.1;

/// A ring that is wanted.
pub(super) struct Wanted<'a> {
    pub(super) offers: &'a [Offer],
    pub(super) facts: &'a ModelFacts,
    /// By this node. Its size is the first that is tried.
    pub(super) ask: Ask,
}

impl Wanted<'_> {
    /// What is found among the nodes that are measured.
    pub(super) fn measured<T>(&self, find: impl FnOnce(&Wanted<'_>) -> T) -> T {
        let offers = facts::measured(self.ask.driver, self.offers);
        find(&Wanted { offers: &offers, facts: self.facts, ask: self.ask.clone() })
    }

    pub(super) fn is_one_loading(&self) -> bool {
        self.offers.iter().any(|offer| offer.stage.state == ModelState::Loading)
    }

    fn ask(&self, size: Size) -> Ask {
        Ask { context_tokens: size.context_tokens, streams: size.parallel, ..self.ask.clone() }
    }

    /// A ring of layers that are loaded already, for requests of a size that will do.
    pub(super) fn loaded(&self, will_do: impl Fn(Size) -> bool) -> Option<(Plan, Size)> {
        let mut sizes: Vec<Size> = Vec::new();
        for size in self.offers.iter().filter(|offer| offer.is_loaded()).map(Offer::size) {
            if will_do(size) && !sizes.contains(&size) {
                sizes.push(size);
            }
        }
        sizes.into_iter().find_map(|size| {
            let ask = Ask { loaded_only: true, ..self.ask(size) };
            Some((self.plan(&self.held(size), &ask).ok()?, size))
        })
    }

    /// Whether requests may be as long in a ring of this size as the user wants. Where that is no wish, any length will do.
    pub(super) fn is_long_enough(&self, size: Size, is_wish: bool) -> bool {
        !is_wish || size.context_tokens >= self.ask.context_tokens
    }

    /// The best ring there can be. Layers that drivers use stay where they are, if that is possible. Without a wish of the user,
    /// the context is as long as memory allows.
    pub(super) fn best(&self, is_wish: bool) -> Result<(Plan, Size), NoRing> {
        let mut size = Size { context_tokens: self.ask.context_tokens, parallel: self.ask.streams };
        loop {
            let (settled, ask) = (self.settled(size), self.ask(size));
            let held = settled.iter().filter_map(|held| Some(Pin::Exactly(held.node, held.only?)));
            let is_free =
                |pin: &Pin| !ask.excluded.contains(&pin.node()) && ask.pins.iter().all(|it| it.node() != pin.node());
            let pins = ask.pins.iter().copied().chain(held.filter(is_free)).collect();
            let found = self
                .plan(&settled, &Ask { pins, ..ask.clone() })
                .or_else(|_| self.plan(&settled, &ask))
                .or_else(|_| self.plan(&self.nodes(), &ask));
            match found {
                Ok(plan) => return Ok((plan, size)),
                Err(reason) if is_wish || size.context_tokens / 2 < fit::CONTEXT_TOKENS_MIN => return Err(reason),
                Err(_) => size.context_tokens /= 2,
            }
        }
    }

    /// A ring that is better than the one in use by enough to change to it: of loaded layers, if there is one. It takes no part of a ring
    /// that others have beside this one, which would be in the way of both, but may be the whole of it.
    pub(super) fn better(&self, size: Size, now: &[Placement]) -> Option<Plan> {
        let others = self.of_others(size, now);
        let is_ring_without = |node: Option<NodeId>| {
            let left: Vec<_> = others.iter().filter(|other| Some(other.node) != node).cloned().collect();
            self.plan(&left, &Ask { loaded_only: true, ..self.ask(size) }).is_ok()
        };
        let is_theirs = |node: NodeId| others.iter().any(|other| other.node == node) && !self.is_given(node);
        // Those without which the others have no ring.
        let mut needed: Vec<NodeId> = Vec::new();
        if is_ring_without(None) {
            let theirs = others.iter().map(|other| other.node).filter(|node| is_theirs(*node));
            needed.extend(theirs.filter(|node| !is_ring_without(Some(*node))));
        }
        let improve = |nodes, loaded_only| {
            self.for_all(size, now, nodes, |planner, ask| planner.improve(&Ask { loaded_only, ..ask }))
        };
        let is_whole = |plan: &Plan| plan.stages.iter().all(|it| self.is_given(it.node) || is_theirs(it.node));
        let better = |nodes: Vec<NodeFacts>, loaded_only| {
            if needed.is_empty() {
                return improve(nodes, loaded_only);
            }
            let apart = nodes.iter().filter(|node| !needed.contains(&node.node)).cloned().collect();
            improve(apart, loaded_only).or_else(|| improve(nodes, loaded_only).filter(is_whole))
        };
        better(self.held(size), true).or_else(|| better(self.settled(size), false))
    }

    /// The ring in use without these nodes.
    pub(super) fn without(&self, size: Size, now: &[Placement], lost: &[NodeId]) -> Option<Plan> {
        self.for_all(size, now, self.settled(size), |planner, ask| planner.mend(&ask, lost).ok())
    }

    /// The best ring without the nodes of the one in use. Ends that are kept here are kept in both.
    pub(super) fn beside(&self, size: Size, now: &[Placement]) -> Option<Plan> {
        let mut nodes = self.settled(size);
        nodes.retain(|other| self.is_given(other.node) || now.iter().all(|stage| stage.node != other.node));
        self.plan(&nodes, &self.ask(size)).ok()
    }

    /// A ring of loaded layers that other drivers use, without the nodes of the one in use and about as good, which all drivers would
    /// rather keep of the two: the one with the lowest id in it. So they meet, and do not change places.
    pub(super) fn back(&self, size: Size, now: &[Placement]) -> Option<Plan> {
        let others = self.of_others(size, now);
        let lowest = |nodes: &mut dyn Iterator<Item = NodeId>| nodes.filter(|node| !self.is_given(*node)).min();
        let lowest_here = lowest(&mut now.iter().map(|stage| stage.node));
        if lowest(&mut others.iter().map(|other| other.node)).is_none_or(|other| Some(other) > lowest_here) {
            return None;
        }
        let ask = Ask { loaded_only: true, ..self.ask(size) };
        let plan = self.plan(&others, &ask).ok()?;
        let pins = now.iter().filter(|stage| !self.is_given(stage.node));
        let pins = pins.map(|stage| Pin::Exactly(stage.node, stage.layers)).collect();
        let here = self.plan(&self.held(size), &Ask { pins, ..ask }).ok()?;
        let is_kept = lowest(&mut plan.stages.iter().map(|stage| stage.node)) < lowest_here;
        (is_kept && plan.token_us <= AS_GOOD * here.token_us).then_some(plan)
    }

    /// A ring that is found not for this driver but for all together, as it is for this one: a change is for all of them to follow.
    fn for_all(
        &self,
        size: Size,
        now: &[Placement],
        nodes: Vec<NodeFacts>,
        find: impl FnOnce(&Planner<'_>, Ask) -> Option<Plan>,
    ) -> Option<Plan> {
        let (ask, links) = self.of_all_drivers(Ask { previous: now.to_vec(), ..self.ask(size) });
        let found = find(&Planner { model: self.facts, nodes: &nodes, links: &links }, ask)?;
        let is_free = |stage: &&StagePlan| !self.is_given(stage.node);
        let pins = found.stages.iter().filter(is_free).map(|stage| Pin::Exactly(stage.node, stage.layers)).collect();
        self.plan(&nodes, &Ask { pins, ..self.ask(size) }).ok()
    }

    /// The same asked by all drivers together: the ways from and to the driver are the mean of theirs. Who has wishes of its own goes its
    /// own way.
    pub(super) fn of_all_drivers(&self, mut ask: Ask) -> (Ask, Links) {
        let mut links = self.links();
        if ask.keep_ends == 0 && ask.rtt_us_max.is_none() {
            ask.driver = NodeId::from_bytes([0; 32]);
            let mut drivers: Vec<NodeId> = self.offers.iter().map(|offer| offer.node).collect();
            drivers.sort_unstable();
            drivers.truncate(NODES_MAX);
            for Offer { node, .. } in self.offers {
                let mean = |one_way_us: &dyn Fn(NodeId) -> f64| {
                    let ways = drivers.iter().filter(|driver| *driver != node).map(|driver| one_way_us(*driver));
                    Link { one_way_us: ways.sum::<f64>() / drivers.len() as f64, ..Link::default() }
                };
                let there = mean(&|driver| links.get(driver, *node).one_way_us);
                let back = mean(&|driver| links.get(*node, driver).one_way_us);
                links.set(ask.driver, *node, there);
                links.set(*node, ask.driver, back);
            }
        }
        (ask, links)
    }

    /// The best ring, wherever layers are loaded; the previous one, if there is one and no other is better by enough to move
    /// layers.
    pub(super) fn anywhere(&self, size: Size, previous: Vec<Placement>) -> Result<Plan, NoRing> {
        self.plan(&self.nodes(), &Ask { previous, ..self.ask(size) })
    }

    pub(super) fn nodes(&self) -> Vec<NodeFacts> {
        self.offers.iter().map(|offer| self.facts_of(offer)).collect()
    }

    /// The nodes of a ring of this size, when layers that drivers use stay where they are. Others that are loaded for rings of another
    /// size are as good as not loaded. What this node holds for others is no hindrance for ends that are kept here, but takes memory.
    fn settled(&self, size: Size) -> Vec<NodeFacts> {
        let with_only = |offer: &Offer| {
            let facts = self.facts_of(offer);
            if self.ask.keep_ends > 0 && offer.node == self.ask.driver {
                let held_bytes = self.held_bytes(offer);
                let memory_bytes = facts.memory_bytes.saturating_sub(held_bytes);
                return NodeFacts { memory_bytes, loaded: vec![self.facts.whole()], ..facts };
            }
            let loaded = if offer.size() == size { facts.loaded } else { Vec::new() };
            NodeFacts { only: offer.is_used().then(|| offer.range()), loaded, ..facts }
        };
        self.offers.iter().filter(|offer| !offer.is_used() || offer.size() == size).map(with_only).collect()
    }

    /// Those of them that hold layers.
    fn held(&self, size: Size) -> Vec<NodeFacts> {
        self.settled(size).into_iter().filter(|node| !node.loaded.is_empty()).collect()
    }

    /// Those of them that other drivers use and that are not in this ring, beside what is kept here for every ring.
    fn of_others(&self, size: Size, now: &[Placement]) -> Vec<NodeFacts> {
        let is_here = |node: NodeId| now.iter().any(|stage| stage.node == node);
        let is_used = |node: NodeId| self.offers.iter().any(|offer| offer.node == node && offer.is_used());
        let mut others = self.held(size);
        others.retain(|other| self.is_given(other.node) || is_used(other.node) && !is_here(other.node));
        others
    }

    /// It is in every ring of this driver: ends are kept here.
    fn is_given(&self, node: NodeId) -> bool {
        self.ask.keep_ends > 0 && node == self.ask.driver
    }

    fn plan(&self, nodes: &[NodeFacts], ask: &Ask) -> Result<Plan, NoRing> {
        Planner { model: self.facts, nodes, links: &self.links() }.plan(ask)
    }

    pub(super) fn links(&self) -> Links {
        facts::links(self.ask.driver, self.offers)
    }

    /// Memory of the layers that a node holds.
    fn held_bytes(&self, offer: &Offer) -> u64 {
        if offer.is_loaded() { self.facts.stage_memory_bytes(offer.range(), &self.ask(offer.size())) } else { 0 }
    }

    fn facts_of(&self, offer: &Offer) -> NodeFacts {
        let stage = &offer.stage;
        let layers = self.facts.layers.len().max(1) as f64;
        let bytes = self.facts.layers.iter().map(|layer| layer.weight_bytes).sum::<u64>() as f64 / layers;
        let estimated = facts::estimated(offer.ways.machine);
        let measured = |us: u32, otherwise: f64| if us > 0 { f64::from(us) } else { otherwise };
        let decode_us = measured(stage.decode_us_per_layer, bytes * estimated.decode_us_per_byte);
        // What is loaded fits, however coarsely memory is told.
        let mut facts = NodeFacts::new(offer.node, stage.memory_bytes.max(self.held_bytes(offer)), decode_us);
        let prefill_us = decode_us * estimated.prefill_us_per_byte / estimated.decode_us_per_byte;
        facts.prefill_us_per_layer = measured(stage.prefill_us_per_layer, prefill_us);
        facts.step_us = facts::STEP_US;
        facts.layers_max = (stage.layers_max > 0).then_some(stage.layers_max);
        facts.loaded = offer.is_loaded().then(|| offer.range()).into_iter().collect();
        // Nodes do not say which part of a file they have.
        facts.on_disk = if offer.ways.lacks_part { Vec::new() } else { vec![self.facts.whole()] };
        facts
    }
}

#[cfg(test)]
pub(super) mod tests {
    use murmur_gguf::LayerRange;
    use murmur_protocol::mesh::{MeasuredLink, ModelDigest, ServedStage};

    use super::{
        super::facts::{Ways, tests::model},
        *,
    };

    pub(in super::super) const LAYERS: u32 = 12;
    const SIZE: Size = Size { context_tokens: 512, parallel: 1 };
    /// Between any two nodes.
    const RTT_US: u32 = 2_000;

    pub(in super::super) fn id(number: u8) -> NodeId {
        NodeId::from_bytes([number; 32])
    }

    /// A node that holds layers in use, or could hold so many, at so many us each. Numbers begin at 1.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Peer(
        pub(in super::super) Option<(u32, u32)>,
        pub(in super::super) u32,
        pub(in super::super) u32,
    );

    /// What the driver of this number knows of them.
    pub(in super::super) fn seen_by(driver: u8, peers: &[Peer]) -> Vec<Offer> {
        let numbers = 1..=peers.len() as u8;
        let told: Vec<_> = numbers.clone().map(|other| MeasuredLink::to(&id(other), RTT_US, 0)).collect();
        let offer = |(number, &Peer(held, layers_max, us)): (u8, &Peer)| {
            let (first, end) = held.unwrap_or_default();
            let stage = ServedStage {
                digest: ModelDigest::from_bytes([0; 32]),
                name: "model".to_owned(),
                layers: LAYERS,
                first,
                end,
                state: if held.is_some() { ModelState::Ready } else { ModelState::Available },
                context_tokens: SIZE.context_tokens,
                parallel: SIZE.parallel,
                exact: false,
                build: String::new(),
                memory_bytes: 1 << 30,
                decode_us_per_layer: us,
                prefill_us_per_layer: us,
                layers_max,
            };
            let rtt_us = if number == driver { 0.0 } else { f64::from(RTT_US) };
            Offer { node: id(number), stage, rtt_us, ways: Ways { told: told.clone(), ..Ways::default() } }
        };
        numbers.zip(peers).map(offer).collect()
    }

    /// The ring that it finds better than the one of the layers in use by `now`.
    fn better(driver: u8, peers: &[Peer], now: &[u8]) -> Option<Vec<Placement>> {
        let facts = model();
        let offers = seen_by(driver, peers);
        let now: Vec<_> = now.iter().map(|&number| &offers[usize::from(number) - 1]).collect();
        let now: Vec<_> = now.iter().map(|offer| Placement { node: offer.node, layers: offer.range() }).collect();
        let ask = Ask::new(id(driver), SIZE.context_tokens);
        let plan = Wanted { offers: &offers, facts: &facts, ask }.better(SIZE, &now)?;
        Some(plan.placements())
    }

    pub(in super::super) const RING: [Peer; 3] =
        [Peer(Some((0, 4)), 4, 100), Peer(Some((4, 8)), 4, 100), Peer(Some((8, 12)), 4, 100)];

    #[test]
    fn all_drivers_find_the_same_ring_better_and_none_when_it_is_theirs() {
        let peers = [RING[0], RING[1], RING[2], Peer(None, 8, 100)];
        let found = [1, 2, 3, 4].map(|driver| better(driver, &peers, &[1, 2, 3]));
        let ring = found[0].clone().unwrap();
        assert!(ring.len() == 2 && ring.iter().any(|stage| stage.node == id(4) && stage.layers.len() == 8), "{ring:?}");
        assert!(found.iter().all(|other| other.as_ref() == Some(&ring)), "{found:?}");
        // The first of them has moved: the others find the same loaded, and nobody wants to go back.
        let (held, now) = if ring[0].node == id(4) { ((0, 8), [4, 3]) } else { ((4, 12), [1, 4]) };
        let peers = [RING[0], RING[1], RING[2], Peer(Some(held), 8, 100)];
        for driver in 1..=4 {
            assert_eq!(better(driver, &peers, &[1, 2, 3]), Some(ring.clone()));
            assert_eq!(better(driver, &peers, &now), None);
        }
    }

    #[test]
    fn speeds_that_drift_by_a_tenth_move_no_driver_there_or_back() {
        let held = [(0, 4), (4, 8), (8, 12), (4, 8)];
        for drift in 0..81u32 {
            let us = |number: u32| [90, 100, 110][(drift / 3u32.pow(number) % 3) as usize];
            let loaded: Vec<_> = (0..4).map(|number| Peer(Some(held[number]), 4, us(number as u32))).collect();
            let free = [loaded[0], loaded[1], loaded[2], Peer(None, 4, us(3))];
            for driver in [1, 2] {
                assert_eq!(better(driver, &free, &[1, 2, 3]), None);
                assert_eq!(better(driver, &loaded, &[1, 2, 3]), None);
                assert_eq!(better(driver, &loaded, &[1, 4, 3]), None);
            }
        }
    }

    #[test]
    fn no_part_of_a_ring_that_others_have_is_better_but_the_whole_may_be() {
        let ring = |us: [u32; 3]| [0, 1, 2].map(|at| Peer(RING[at].0, 4, us[at]));
        let beside = |us: [u32; 3]| [ring([1000; 3]), ring(us)].concat();
        let ring_of = |placements: Option<Vec<Placement>>| {
            placements.map(|ring| {
                ring.iter().map(|stage| (1..=8).find(|&number| id(number) == stage.node).unwrap()).collect::<Vec<_>>()
            })
        };
        for driver in [1, 2, 5] {
            let better = |peers: &[Peer], now: &[u8]| ring_of(better(driver, peers, now));
            // One of them looks faster.
            let peers = beside([1000, 100, 1000]);
            assert_eq!(better(&peers, &[1, 2, 3]), None);
            // It is the one that another driver has moved to, and the other ring has its own.
            let moved = [&beside([1000; 3])[..], &[Peer(RING[1].0, 4, 100)]].concat();
            assert_eq!(better(&moved, &[1, 2, 3]), Some(vec![1, 7, 3]));
            // One that nobody uses is taken where those of others are not.
            let free = [&peers[..], &[Peer(None, 4, 50)]].concat();
            let found = better(&free, &[1, 2, 3]).unwrap();
            assert!(found.contains(&7) && found.iter().all(|number| [1, 2, 3, 7].contains(number)), "{found:?}");
            assert_eq!(better(&beside([100; 3]), &[1, 2, 3]), Some(vec![4, 5, 6]));
            assert_eq!(better(&beside([100; 3]), &[4, 5, 6]), None);
        }
    }

    #[test]
    fn layers_that_nobody_uses_are_used_where_they_are_and_given_up_where_they_are_in_the_way() {
        let facts = model();
        let ring_of = |offers: &[Offer], find: fn(&Wanted<'_>) -> Option<(Plan, Size)>| {
            let ask = Ask { streams: SIZE.parallel, ..Ask::new(id(1), SIZE.context_tokens) };
            let found = find(&Wanted { offers, facts: &facts, ask })?.0;
            Some(found.stages.iter().map(|stage| (stage.node, stage.layers)).collect::<Vec<_>>())
        };
        let of_loaded = |wanted: &Wanted<'_>| wanted.loaded(|_| true);
        let ring = [1, 2, 3].map(|number| (id(number), RING[usize::from(number) - 1].0.unwrap()));
        let ring = ring.map(|(node, (first, end))| (node, LayerRange::new(first, end))).to_vec();

        let mut offers = seen_by(1, &RING);
        offers.iter_mut().for_each(|offer| offer.stage.state = ModelState::Available);
        assert_eq!(ring_of(&offers, of_loaded), Some(ring.clone()));
        // For requests of another length they would have to be loaded anew.
        offers[2].stage.context_tokens = 2 * SIZE.context_tokens;
        assert_eq!(ring_of(&offers, of_loaded), None);

        let mut offers = seen_by(1, &[RING[0], RING[1], RING[0]]);
        assert_eq!(ring_of(&offers, of_loaded), None);
        offers[2].stage.state = ModelState::Available;
        assert_eq!(ring_of(&offers, |wanted| wanted.best(true).ok()), Some(ring));
    }

    #[test]
    fn a_loaded_ring_for_shorter_requests_than_the_user_has_asked_for_is_not_taken() {
        let facts = model();
        let offers = seen_by(1, &RING);
        let loaded = |context_tokens, is_wish| {
            let wanted = Wanted { offers: &offers, facts: &facts, ask: Ask::new(id(1), context_tokens) };
            wanted.loaded(|size| wanted.is_long_enough(size, is_wish)).map(|(_, size)| size)
        };
        for context_tokens in [SIZE.context_tokens / 2, SIZE.context_tokens] {
            assert_eq!(loaded(context_tokens, true), Some(SIZE));
        }
        assert_eq!(loaded(16 * SIZE.context_tokens, true), None);
        // The default is nobody's wish.
        assert_eq!(loaded(16 * SIZE.context_tokens, false), Some(SIZE));
    }

    #[test]
    fn what_has_to_be_fetched_takes_longer_to_load_than_what_is_on_the_disk() {
        let facts = model();
        let mut offers = seen_by(1, &[Peer(None, 6, 100), Peer(None, 6, 100)]);
        offers[1].ways.lacks_part = true;
        let wanted = Wanted { offers: &offers, facts: &facts, ask: Ask::new(id(1), SIZE.context_tokens) };
        let (plan, _) = wanted.best(true).unwrap();
        let load_us = |number| plan.stages.iter().find(|stage| stage.node == id(number)).unwrap().load_us;
        assert!(load_us(2) > 10.0 * load_us(1) && load_us(1) > 0.0, "{plan}");
        assert!(plan.stages.iter().all(|stage| stage.fixed_us == facts::STEP_US), "{plan}");
    }

    #[test]
    fn beside_a_ring_there_is_another_where_those_that_are_left_can_hold_the_model() {
        let facts = model();
        let beside = |peers: &[Peer], ask: Ask| {
            let offers = seen_by(1, peers);
            let now: Vec<_> =
                offers[..3].iter().map(|offer| Placement { node: offer.node, layers: offer.range() }).collect();
            let plan = Wanted { offers: &offers, facts: &facts, ask }.beside(SIZE, &now)?;
            Some(plan.placements())
        };
        let ask = || Ask::new(id(1), SIZE.context_tokens);
        let (free, slow) = (Peer(None, 6, 100), Peer(None, 6, 2_000));
        assert_eq!(beside(&[RING[0], RING[1], RING[2], free], ask()), None);
        let ring = beside(&[RING[0], RING[1], RING[2], free, slow], ask()).unwrap();
        assert!(ring.len() == 2 && [4, 5].iter().all(|n| ring.iter().any(|stage| stage.node == id(*n))), "{ring:?}");
        // One that other drivers use already is as good.
        let held = [Peer(Some((0, 6)), 6, 100), Peer(Some((6, 12)), 6, 100)];
        let expected = [(4, 0, 6), (5, 6, 12)];
        let expected =
            expected.map(|(node, first, end)| Placement { node: id(node), layers: LayerRange::new(first, end) });
        assert_eq!(beside(&[RING[0], RING[1], RING[2], held[0], held[1]], ask()), Some(expected.to_vec()));
        assert_eq!(
            beside(&[RING[0], RING[1], RING[2], held[0], held[1]], Ask { pins: vec![Pin::Used(id(1))], ..ask() }),
            None
        );
    }

    #[test]
    fn a_driver_without_requests_goes_back_to_the_ring_of_others_and_never_the_other_way_round() {
        let facts = model();
        let back = |peers: &[Peer], now: &[u8], change: fn(&mut Offer)| {
            let mut offers = seen_by(1, peers);
            offers.iter_mut().for_each(change);
            let now: Vec<_> = now.iter().map(|&number| &offers[usize::from(number) - 1]).collect();
            let now: Vec<_> = now.iter().map(|offer| Placement { node: offer.node, layers: offer.range() }).collect();
            let ask = Ask::new(id(1), SIZE.context_tokens);
            let plan = Wanted { offers: &offers, facts: &facts, ask }.back(SIZE, &now)?;
            Some(plan.stages.iter().map(|stage| stage.node).collect::<Vec<_>>())
        };
        // Its rows travel once less from host to host, and are computed more slowly.
        let second = [Peer(Some((0, 6)), 6, 150), Peer(Some((6, 12)), 6, 150)];
        let peers = [RING[0], RING[1], RING[2], second[0], second[1]];
        assert_eq!(back(&peers, &[4, 5], |_| ()), Some([1, 2, 3].map(id).to_vec()));
        assert_eq!(back(&peers, &[1, 2, 3], |_| ()), None);
        // Its own is the only one: nobody uses the other, or a part of that is missing.
        let unused = |offer: &mut Offer| {
            if offer.node < id(4) {
                offer.stage.state = ModelState::Available;
            }
        };
        assert_eq!(back(&peers, &[4, 5], unused), None);
        assert_eq!(back(&[RING[0], Peer(None, 4, 100), RING[2], second[0], second[1]], &[4, 5], |_| ()), None);
        // Who would be slower there stays.
        let slow = Peer(Some((4, 8)), 4, 20_000);
        assert_eq!(back(&[RING[0], slow, RING[2], second[0], second[1]], &[4, 5], |_| ()), None);
    }

    #[test]
    fn a_slow_node_is_replaced_by_a_fast_one_that_takes_its_layers() {
        let peers = [RING[0], Peer(Some((4, 8)), 4, 2_000), RING[2], Peer(None, 4, 100)];
        let expected = [(1, 0, 4), (4, 4, 8), (3, 8, 12)];
        let expected =
            expected.map(|(node, first, end)| Placement { node: id(node), layers: LayerRange::new(first, end) });
        assert_eq!(better(1, &peers, &[1, 2, 3]), Some(expected.to_vec()));
    }
}
