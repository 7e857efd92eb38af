//! The planner against trying every ring there is, on small meshes.

#![allow(clippy::unwrap_used, reason = "a test may panic in its helpers too")]

mod common;

use common::node;
use murmur_core::planner::{
    Ask, Codec, LayerFacts, Link, Links, ModelFacts, NoRing, NodeFacts, Objective, Origin, Pin, Placement, Planner,
    Remedy,
    cost::{ANSWER_BYTES, FRAME_BYTES, LOSSY_GAIN_US_MIN, TOKEN_BYTES},
};
use murmur_gguf::LayerRange;
use proptest::{prelude::*, sample::select};

/// Rounding to nanoseconds, and what counts for a stage when rings are otherwise equal.
const TOLERANCE_US: f64 = 0.1;

#[derive(Debug, Clone)]
struct Case {
    model: ModelFacts,
    nodes: Vec<NodeFacts>,
    links: Links,
    ask: Ask,
}

impl Case {
    fn planner(&self) -> Planner<'_> {
        Planner { model: &self.model, nodes: &self.nodes, links: &self.links }
    }

    fn count(&self) -> u32 {
        self.model.layers.len() as u32
    }

    fn facts(&self, stage: &Placement) -> &NodeFacts {
        self.nodes.iter().find(|node| node.node == stage.node).unwrap()
    }

    fn memory_bytes(&self, range: LayerRange) -> u64 {
        let layers = &self.model.layers[range.first as usize..range.end as usize];
        let cells = u64::from(self.ask.context_tokens * self.ask.streams);
        let bytes: u64 = layers.iter().map(|layer| layer.weight_bytes + layer.kv_bytes_per_token * cells).sum();
        let head = if range.end == self.count() { self.model.head_bytes } else { 0 };
        let kept = if range.end == self.count() { 0 } else { self.model.kept_bytes };
        bytes + head + kept + self.model.stage_bytes + self.model.stage_bytes_per_token * cells
    }

    fn compute_us(&self, stage: &Placement) -> f64 {
        let layers = &self.model.layers[stage.layers.first as usize..stage.layers.end as usize];
        let head = if stage.layers.end == self.count() { self.model.head_cost } else { 0.0 };
        let cost = layers.iter().map(|layer| layer.cost).sum::<f64>() + head;
        self.facts(stage).step_us + self.facts(stage).decode_us_per_layer * cost
    }

    /// Time on the wire of each hop, without latency, and the latencies together. `None` when a hop is not allowed.
    fn travel_us(&self, ring: &[Placement]) -> Option<(Vec<f64>, f64)> {
        let mut stops = vec![self.ask.driver];
        stops.extend(ring.iter().map(|stage| stage.node));
        stops.push(self.ask.driver);
        let (mut transfers, mut latency) = (Vec::new(), 0.0);
        for (i, pair) in stops.windows(2).enumerate().filter(|(_, pair)| pair[0] != pair[1]) {
            let (there, back) = (self.links.get(pair[0], pair[1]), self.links.get(pair[1], pair[0]));
            if there.bytes_per_s == 0.0
                || self.ask.rtt_us_max.is_some_and(|most| there.one_way_us + back.one_way_us > most)
            {
                return None;
            }
            let codecs = [Codec::F32]
                .iter()
                .chain(&self.ask.lossy)
                .map(|codec| codec.row_bytes(self.model.width as usize) as u64);
            let exact = Codec::F32.row_bytes(self.model.width as usize) as u64;
            let smallest = codecs.min().unwrap();
            let pays = (exact - smallest) as f64 / there.bytes_per_s * 1e6 >= LOSSY_GAIN_US_MIN;
            let row_bytes = match i {
                0 => TOKEN_BYTES,
                i if i == ring.len() => ANSWER_BYTES,
                _ => TOKEN_BYTES + if pays { smallest } else { exact },
            };
            transfers.push((FRAME_BYTES + row_bytes) as f64 / there.bytes_per_s * 1e6);
            latency += there.one_way_us;
        }
        Some((transfers, latency))
    }

    /// The objective in microseconds; `None` when the ring is not allowed.
    fn cost_us(&self, ring: &[Placement]) -> Option<f64> {
        let (transfers, latency) = self.travel_us(ring)?;
        let at = |node| ring.iter().filter(move |stage| stage.node == node);
        for stage in ring {
            let facts = self.facts(stage);
            let memory: u64 = at(stage.node).map(|stage| self.memory_bytes(stage.layers)).sum();
            let layers: u32 = at(stage.node).map(|stage| stage.layers.len()).sum();
            if memory > facts.memory_bytes || facts.layers_max.is_some_and(|most| layers > most) {
                return None;
            }
        }
        let met = |pin: &Pin| {
            at(pin.node()).any(|stage| match pin {
                Pin::Used(_) => true,
                Pin::Exactly(_, layers) => stage.layers == *layers,
                Pin::AtLeast(_, layers) => stage.layers.first <= layers.first && layers.end <= stage.layers.end,
            })
        };
        if !self.ask.pins.iter().all(met) || ring.iter().any(|stage| self.ask.excluded.contains(&stage.node)) {
            return None;
        }
        let token =
            ring.iter().map(|stage| self.compute_us(stage)).sum::<f64>() + transfers.iter().sum::<f64>() + latency;
        if self.ask.objective == Objective::OneStream {
            return Some(token);
        }
        let busy = ring.iter().map(|stage| at(stage.node).map(|stage| self.compute_us(stage)).sum());
        Some(busy.chain(transfers).fold(token / f64::from(self.ask.streams), f64::max))
    }

    /// Tries every ring from layer `first` on; returns the best that begins with `ring`.
    fn least_us(&self, ring: &mut Vec<Placement>, first: u32) -> Option<f64> {
        if first == self.count() {
            return self.cost_us(ring);
        }
        let mut least: Option<f64> = None;
        let ends: Vec<u32> = self.model.cuts.iter().copied().filter(|cut| *cut > first).chain([self.count()]).collect();
        for (node, &end) in self.nodes.iter().flat_map(|node| ends.iter().map(move |end| (node, end))) {
            let layers = LayerRange::new(first, end);
            if self.may(ring, node, layers) {
                ring.push(Placement { node: node.node, layers });
                let cost = self.least_us(ring, end);
                least = least.into_iter().chain(cost).reduce(f64::min);
                ring.pop();
            }
        }
        least
    }

    /// A node holds one stage; with kept ends the driver holds the whole model, or the first layers and the last.
    fn may(&self, ring: &[Placement], node: &NodeFacts, layers: LayerRange) -> bool {
        let keep = self.ask.keep_ends;
        if node.only.is_some_and(|only| only != layers) {
            return false;
        }
        let (first, last) = (layers.first == 0, layers.end == self.count());
        if keep == 0 {
            return ring.iter().all(|stage| stage.node != node.node);
        }
        let smallest = self.model.cuts.iter().copied().find(|cut| *cut >= keep);
        match node.node == self.ask.driver {
            true if first => last || Some(layers.end) == smallest,
            true => {
                last && layers.first + keep <= self.count() && ring.last().is_some_and(|stage| stage.node != node.node)
            }
            false => !first && !last && ring.iter().all(|stage| stage.node != node.node),
        }
    }
}

fn cases() -> impl Strategy<Value = Case> {
    let layer = (1..=4u64, 0..=2u64, 1..=4u32).prop_map(|(weight_bytes, kv_bytes_per_token, cost)| LayerFacts {
        weight_bytes: weight_bytes * 1000,
        kv_bytes_per_token,
        cost: cost.into(),
    });
    let model = (prop::collection::vec(layer, 1..=8), any::<u8>(), 0..=3u32, 0..=2u64, 0..=3u64).prop_map(
        |(layers, cuts, head, stage, kept)| {
            let cut = |il: &u32| cuts & 1 << (il % 8) != 0 || cuts % 3 != 0;
            ModelFacts {
                cuts: (1..layers.len() as u32).filter(cut).collect(),
                layers,
                head_bytes: u64::from(head) * 1000,
                head_cost: head.into(),
                width: 512,
                stage_bytes: stage * 500,
                stage_bytes_per_token: stage,
                kept_bytes: kept * 500,
            }
        },
    );
    let peer = (3..=16u64, 50..=400u32, 0..=100u32, prop::option::weighted(0.2, 1..=5u32));
    let peers = prop::collection::vec(peer, 1..=5).prop_map(|peers| {
        let node = |(i, (memory, us, step, layers_max)): (usize, (u64, u32, u32, Option<u32>))| NodeFacts {
            step_us: step.into(),
            layers_max,
            loaded: vec![LayerRange::new(0, 8)],
            ..NodeFacts::new(node(i as u32), memory * 1000, us.into())
        };
        peers.into_iter().enumerate().map(node).collect::<Vec<_>>()
    });
    let link = (0..=800u32, select(vec![0.0, 1e6, 1e7, 1e7, 1e8, 1e8, 1e9, 1e9, 1e9]));
    let links = prop::collection::vec(link, 49).prop_map(|drawn| {
        let mut links = Links::new();
        for (i, (one_way_us, bytes_per_s)) in drawn.into_iter().enumerate() {
            let (from, to) = (node(i as u32 / 7), node(i as u32 % 7));
            links.set(from, to, Link { one_way_us: one_way_us.into(), bytes_per_s });
        }
        links
    });
    // The driver is one of the nodes, or, as number 6, a client that holds no layers.
    let asked = (
        select(vec![0, 0, 1, 6]),
        select(vec![1, 2, 5]),
        any::<bool>(),
        0..=3u32,
        any::<[bool; 2]>(),
        any::<[u8; 4]>(),
    );
    (model, peers, links, asked, any::<[u8; 5]>()).prop_map(|(model, mut nodes, links, asked, held)| {
        let (driver, streams, many, keep_ends, lossy, dice) = asked;
        let bounds: Vec<u32> =
            [0].into_iter().chain(model.cuts.iter().copied()).chain([model.layers.len() as u32]).collect();
        // A few hold layers for others. Once in a while such as no ring of this model can have.
        for (node, die) in nodes.iter_mut().zip(held.map(usize::from)).filter(|(_, die)| die % 4 == 0) {
            let first = die / 4 % (bounds.len() - 1);
            let end = first + 1 + die / 32 % (bounds.len() - 1 - first);
            node.only = Some(LayerRange::new(bounds[first], bounds[end] + u32::from(die == 0)));
        }
        let driver_serves = nodes.iter().any(|it| it.node == node(driver));
        let mut ask = Ask::new(node(driver), 100);
        ask.streams = streams;
        ask.objective = if many { Objective::ManyStreams } else { Objective::OneStream };
        ask.keep_ends = if driver_serves && keep_ends < 3 && dice[3] % 2 == 0 { keep_ends } else { 0 };
        ask.lossy =
            [Codec::F16, Codec::Q8].into_iter().zip(lossy).filter(|(_, yes)| *yes).map(|(codec, _)| codec).collect();
        ask.rtt_us_max = (dice[0] % 3 == 0).then_some(1_200.0);
        let [pinned, excluded] = [dice[1], dice[2]].map(|die| node(u32::from(die) % 10));
        let known = |it| nodes.iter().any(|node| node.node == it);
        if known(pinned) && (ask.keep_ends == 0 || pinned != ask.driver) {
            let at = usize::from(dice[3]) % (bounds.len() - 1);
            let layers = LayerRange::new(bounds[at], bounds[at + 1]);
            ask.pins = vec![match dice[3] % 5 {
                0 => Pin::Exactly(pinned, layers),
                1 => Pin::AtLeast(pinned, layers),
                _ => Pin::Used(pinned),
            }];
        }
        if excluded != pinned && (ask.keep_ends == 0 || excluded != ask.driver) {
            ask.excluded = vec![excluded];
        }
        Case { model, nodes, links, ask }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3_000))]

    #[test]
    fn no_ring_is_better_than_the_planned_one(case in cases()) {
        let least = case.least_us(&mut Vec::new(), 0);
        match case.planner().plan(&case.ask) {
            Ok(plan) => {
                let cost = case.cost_us(&plan.placements());
                prop_assert!(cost.is_some(), "not allowed:\n{plan}");
                let (cost, least) = (cost.unwrap(), least.unwrap());
                prop_assert!((cost - least).abs() < TOLERANCE_US, "{cost} us, and {least} us is possible\n{plan}");
                let told = match case.ask.objective {
                    Objective::OneStream => plan.token_us,
                    Objective::ManyStreams => 1e6 / plan.tokens_per_s(),
                };
                prop_assert!((cost - told).abs() < TOLERANCE_US, "{cost} us, told as {told} us\n{plan}");
            }
            Err(NoRing::Short(shortage)) => {
                prop_assert_eq!(least, None, "{}", shortage);
                for remedy in &shortage.would_do {
                    let ask = case.ask.clone();
                    let ask = match remedy {
                        Remedy::Context { tokens } => Ask { context_tokens: *tokens, ..ask },
                        Remedy::Streams { streams } => Ask { streams: *streams, ..ask },
                        Remedy::AnyRoundTrip => Ask { rtt_us_max: None, ..ask },
                        Remedy::EndsAnywhere => Ask { keep_ends: 0, ..ask },
                        Remedy::WithoutPin(_) => Ask { pins: vec![], ..ask },
                        Remedy::Including(_) => Ask { excluded: vec![], ..ask },
                        _ => continue,
                    };
                    let case = Case { ask, ..case.clone() };
                    prop_assert!(case.least_us(&mut Vec::new(), 0).is_some(), "{remedy} would not do");
                }
            }
            Err(refused) => prop_assert!(false, "{}", refused),
        }
    }

    #[test]
    fn after_a_death_no_layer_moves_that_was_not_lost_if_that_is_possible(case in cases(), dead in any::<prop::sample::Index>()) {
        let Ok(before) = case.planner().plan(&case.ask) else { return Ok(()) };
        let lost = before.stages[dead.index(before.stages.len())].node;
        let ask = Ask { previous: before.placements(), ..case.ask.clone() };
        let Ok(after) = case.planner().mend(&ask, &[lost]) else { return Ok(()) };
        let kept = before.placements().into_iter().filter(|stage| stage.node != lost);
        // With kept ends the driver's first stage is given, and its second is the one that may grow.
        let stays = |stage: &Placement| after.stages.iter().any(|now| {
            now.node == stage.node && now.layers.first <= stage.layers.first && stage.layers.end <= now.layers.end
        });
        if after.origin != Origin::Anew {
            prop_assert!(kept.clone().all(|stage| stays(&stage)), "before:\n{before}\nafter:\n{after}");
        }
        let pinned = kept.filter(|stage| case.ask.keep_ends == 0 || stage.node != ask.driver);
        let pins: Vec<Pin> = pinned.map(|stage| Pin::AtLeast(stage.node, stage.layers)).collect();
        let excluded = case.ask.excluded.iter().copied().chain([lost]).collect();
        let stay = Case { ask: Ask { pins, excluded, previous: vec![], ..case.ask.clone() }, ..case.clone() };
        if case.ask.pins.is_empty() && case.ask.keep_ends == 0 {
            let least = stay.least_us(&mut Vec::new(), 0);
            prop_assert_eq!(least.is_none(), after.origin == Origin::Anew);
            if let Some(least) = least {
                // All layers are loaded everywhere, so that the holders are all nodes.
                prop_assert!((stay.cost_us(&after.placements()).unwrap() - least).abs() < TOLERANCE_US, "{after}");
            }
        }
    }
}
