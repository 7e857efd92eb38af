//! The best ring for an ask: which nodes are looked at, which search is used, and how the most throughput is found with
//! searches for the least time.

use std::cmp::Reverse;

use super::{
    EXACT_NODES_MAX, NODES_MAX, Planner,
    beam::{self, Rank},
    cost::{Ns, ns},
    exact,
    facts::{Ask, NodeFacts, Placement},
    problem::{Limits, Problem},
};

/// Ways that the beam search follows from each layer and last node.
pub(super) const BEAM_WIDTH: usize = 16;

/// Ways that it follows to find a ring quickly, so that the exact search need not follow what is worse.
const BOUND_WIDTH: usize = 2;

/// Searches for a better throughput among many nodes, at most.
const BEAM_TRIES_MAX: u32 = 12;

impl Planner<'_> {
    /// The ring of the best [`Planner::objective_ns`]. Equally good ones go by their score: by the time of a token, then by
    /// hops.
    ///
    /// The most throughput is found by asking whether a ring exists that takes no longer than a given time on any node, and
    /// no more than that time, once per stream, on its way around; and by halving the interval between the times known to be
    /// possible and impossible. When the middle was impossible, the best ring may be found already: that is asked next.
    pub(super) fn best_ring(&self, ask: &Ask) -> Option<Vec<Placement>> {
        let nodes = self.nodes_considered(ask);
        let streams = Ns::from(ask.streams_counted());
        let mut best = self.fastest_ring(&nodes, ask, Limits::NONE)?;
        if streams == 1 {
            return Some(best);
        }
        let mut possible = self.objective_ns(&best, ask);
        let mut impossible = self.score(&best, ask) / streams - 1;
        let mut tries = if nodes.len() > EXACT_NODES_MAX { BEAM_TRIES_MAX } else { u32::MAX };
        let mut best_already = false;
        while possible - impossible > 1 && tries > 0 {
            let step = if best_already { possible - 1 } else { impossible + (possible - impossible) / 2 };
            let better = self.fastest_ring(&nodes, ask, Limits { step, score: step.saturating_mul(streams) });
            best_already = better.is_none();
            tries -= 1;
            match better {
                Some(ring) => {
                    possible = self.objective_ns(&ring, ask);
                    best = ring;
                }
                None => impossible = step,
            }
        }
        Some(best)
    }

    /// Any ring: whether there is one.
    pub(super) fn any_ring(&self, ask: &Ask) -> Option<Vec<Placement>> {
        self.fastest_ring(&self.nodes_considered(ask), ask, Limits::NONE)
    }

    /// The ring of the least score within the limits.
    fn fastest_ring(&self, nodes: &[&NodeFacts], ask: &Ask, limits: Limits) -> Option<Vec<Placement>> {
        let split = Problem::of(self, nodes, ask, limits).and_then(|mut problem| {
            let beam = |width, rank| beam::solve(&problem, width, rank);
            let route = if nodes.len() > EXACT_NODES_MAX {
                beam(BEAM_WIDTH, Rank::Score).or_else(|| beam(BEAM_WIDTH, Rank::Memory))
            } else {
                let bound = beam(BOUND_WIDTH, Rank::Score).map(|route| route.score);
                problem.score_max = bound.unwrap_or(problem.score_max);
                exact::solve(&problem)
            };
            Some(problem.ring(&route?))
        });
        // Where the driver keeps the ends it may as well keep all.
        let driver = nodes.iter().filter(|node| ask.keep_ends > 0 && node.node == ask.driver);
        let whole = driver.filter_map(|node| self.whole_on(node, ask, limits));
        split.into_iter().chain(whole).min_by_key(|ring| self.score(ring, ask))
    }

    /// The whole model as one stage on `node`, if that is within the limits and what is asked for.
    pub(super) fn whole_on(&self, node: &NodeFacts, ask: &Ask, limits: Limits) -> Option<Vec<Placement>> {
        let allowed =
            (ask.keep_ends == 0 || node.node == ask.driver) && ask.pins.iter().all(|pin| pin.node() == node.node);
        let ask = Ask { keep_ends: 0, ..ask.clone() };
        let problem = Problem::of(self, &[node], &ask, limits).filter(|_| allowed)?;
        Some(problem.ring(&exact::solve(&problem)?))
    }

    /// The nodes that a search looks at, in an order that does not depend on the caller's. Of too many, those that must be
    /// used and those that place a layer in the least time, the way from and to the driver shared by all the layers they
    /// can hold.
    pub(super) fn nodes_considered(&self, ask: &Ask) -> Vec<&NodeFacts> {
        let mut nodes: Vec<&NodeFacts> = self.nodes.iter().filter(|node| !ask.excluded.contains(&node.node)).collect();
        nodes.sort_by_key(|node| node.node);
        nodes.dedup_by_key(|node| node.node);
        if nodes.len() > NODES_MAX {
            let needed =
                |node: &NodeFacts| node.node == ask.driver || ask.pins.iter().any(|pin| pin.node() == node.node);
            nodes.sort_by_cached_key(|node| (Reverse(needed(node)), self.ns_per_layer_placed(node, ask), node.node));
            nodes.truncate(NODES_MAX);
            nodes.sort_by_key(|node| node.node);
        }
        nodes
    }

    fn ns_per_layer_placed(&self, node: &NodeFacts, ask: &Ask) -> Ns {
        let layers = self.model.layers.len().max(1) as u64;
        let layer_bytes = (self.model.stage_memory_bytes(self.model.whole(), ask) / layers).max(1);
        let held = (node.memory_bytes / layer_bytes).min(node.layers_max.map_or(layers, u64::from)).min(layers);
        let way_us =
            self.links.get(ask.driver, node.node).one_way_us + self.links.get(node.node, ask.driver).one_way_us;
        match held {
            0 => Ns::MAX,
            _ => ns(node.decode_us_per_layer + (node.step_us + way_us) / held as f64),
        }
    }

    /// By what rings are compared, for one stream: the time of a token, the share of loading, and a little for each stage.
    pub(super) fn score(&self, ring: &[Placement], ask: &Ask) -> Ns {
        let stages: Ns = self.nodes_of(ring).map(|(node, stage)| self.stage_score(node, stage.layers, ask)).sum();
        stages + self.hops_of(ring, ask).iter().map(|(_, _, hop)| hop.latency() + hop.transfer(1)).sum::<Ns>()
    }

    /// By what rings are compared: the time between two tokens of all streams together. The streams share the ring, each of
    /// them at most once on its way around, and what is busiest in it sets the pace.
    pub(super) fn objective_ns(&self, ring: &[Placement], ask: &Ask) -> Ns {
        let streams = Ns::from(ask.streams_counted());
        let alone = (self.score(ring, ask) + streams - 1) / streams;
        if streams == 1 { alone } else { alone.max(self.bottleneck_ns(ring, ask)) }
    }
}
