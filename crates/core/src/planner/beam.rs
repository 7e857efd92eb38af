//! A good ring of many nodes: the same steps as in [`super::exact`], but of all the ways to place the layers before a bound
//! with a given node as the last, only the best few are followed.

use std::collections::BTreeMap;

use super::{
    cost::{NEVER, Ns},
    problem::{Problem, Route},
};

/// What makes one way better than another that has placed as many layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rank {
    /// It is faster.
    Score,
    /// It has used less memory: for models that barely fit.
    Memory,
}

/// A way from the driver to the end of a stage.
#[derive(Debug, Clone, Copy)]
struct Way {
    score: Ns,
    /// By which ways are compared.
    rank: u64,
    /// Rows used, as bits.
    set: u64,
    /// Its last stage: row, first bound, end bound.
    stage: (usize, usize, usize),
    /// The way without its last stage.
    before: Option<usize>,
}

/// The best way of those that follow `width` ways from each bound and last node.
pub(super) fn solve(problem: &Problem, width: usize, rank: Rank) -> Option<Route> {
    let (nodes, last) = (problem.rows.len(), problem.last());
    let mut kept: Vec<Way> = Vec::new();
    // Ways by the bound at which they end and their last row; sorted into `kept` when that bound's turn comes.
    let mut open: Vec<Vec<Best>> = vec![vec![Best::default(); nodes]; last + 1];
    for bound in problem.from..last {
        let first_here = kept.len();
        kept.extend(open[bound].drain(..).flat_map(Best::into_ways));
        for (next, row) in problem.rows.iter().enumerate().filter(|(_, row)| row.begins.contains(&bound)) {
            let mut begins = Best::default();
            let mut begin = |score: Ns, rank_before: u64, set: u64, before: Option<usize>| {
                let rank = match rank {
                    Rank::Score => score as u64,
                    Rank::Memory => rank_before + row.memory_bytes / 1024,
                };
                let way = Way { score, rank, set: set | 1 << next, stage: (next, bound, bound), before };
                begins.add(way, problem.must, width);
            };
            if bound == problem.from && row.enter < NEVER {
                begin(row.enter, 0, 0, None);
            }
            for (i, way) in kept.iter().enumerate().skip(first_here) {
                let hop = problem.rows[way.stage.0].hops[next];
                if way.set & 1 << next == 0 && hop < NEVER {
                    begin(way.score + hop, way.rank, way.set, Some(i));
                }
            }
            for way in begins.into_ways() {
                for end in (bound + 1..=last).take_while(|end| row.earliest[*end] <= bound) {
                    let score = way.score + row.before[end] - row.before[bound] + row.fixed;
                    let allowed = row.ends.contains(&end) && score + problem.rest[next][end] <= problem.score_max;
                    let due = problem.due[end];
                    if allowed && way.set & due == due {
                        let rank = if rank == Rank::Score { score as u64 } else { way.rank };
                        let way = Way { score, rank, stage: (next, bound, end), ..way };
                        open[end][next].add(way, problem.must, width);
                    }
                }
            }
        }
    }
    let complete = open[last].drain(..).flat_map(Best::into_ways).filter(|way| way.set & problem.must == problem.must);
    let back = |mut way: Way| {
        way.score += problem.rows[way.stage.0].leave;
        way
    };
    let best = complete.map(back).filter(|way| way.score <= problem.score_max).min_by_key(|way| way.score)?;
    let mut stages: Vec<_> =
        std::iter::successors(Some(&best), |way| Some(&kept[way.before?])).map(|way| way.stage).collect();
    stages.reverse();
    Some(Route { score: best.score, stages })
}

/// The best ways to the same place: of those with the same nodes the best one, of those with the same pinned nodes a few. A
/// way without a pinned node is faster, and must not push out the one that is wanted.
#[derive(Debug, Clone, Default)]
struct Best(BTreeMap<u64, Vec<Way>>);

impl Best {
    fn add(&mut self, way: Way, must: u64, width: usize) {
        let ways = self.0.entry(way.set & must).or_default();
        if let Some(same) = ways.iter_mut().find(|other| other.set == way.set) {
            if way.score < same.score {
                *same = way;
            }
        } else if ways.len() < width {
            ways.push(way);
        } else if let Some(worst) = ways.iter_mut().max_by_key(|other| other.rank)
            && way.rank < worst.rank
        {
            *worst = way;
        }
    }

    fn into_ways(self) -> impl Iterator<Item = Way> {
        self.0.into_values().flatten()
    }
}

#[cfg(test)]
mod tests {
    use murmur_protocol::mesh::NodeId;
    use proptest::{prelude::*, strategy::ValueTree, test_runner::TestRunner};

    use super::*;
    use crate::planner::{
        Ask, LayerFacts, Link, Links, ModelFacts, NodeFacts, Planner, exact, problem::Limits, search::BEAM_WIDTH,
    };

    /// The beam search may be slower than the best ring by this factor in the meshes drawn here. Most often it finds the best.
    const FACTOR_MAX: f64 = 1.25;

    fn node(number: usize) -> NodeId {
        NodeId::from_bytes([number as u8; 32])
    }

    /// Machines of all sizes and speeds in three towns, for a model of which most hold a fraction.
    fn meshes(nodes: std::ops::RangeInclusive<usize>) -> impl Strategy<Value = (ModelFacts, Vec<NodeFacts>, Links)> {
        let node_facts = (2..=12u64, 200..=4_000u32, 0..=300u32, 0..3usize);
        let jitter = prop::collection::vec(0..=3_000u32, 256);
        (prop::collection::vec(1..=3u32, 8..=32), prop::collection::vec(node_facts, nodes), jitter).prop_map(
            |(costs, drawn, jitter)| {
                let layer =
                    |cost: &u32| LayerFacts { weight_bytes: 1_000, kv_bytes_per_token: 0, cost: (*cost).into() };
                let model = ModelFacts {
                    layers: costs.iter().map(layer).collect(),
                    cuts: (1..costs.len() as u32).collect(),
                    head_bytes: 2_000,
                    head_cost: 3.0,
                    width: 4_096,
                    stage_bytes: 500,
                    stage_bytes_per_token: 0,
                    kept_bytes: 0,
                };
                let facts = |(i, (layers, us, step_us, _)): (usize, &(u64, u32, u32, usize))| NodeFacts {
                    step_us: (*step_us).into(),
                    ..NodeFacts::new(node(i), layers * 1_000, (*us).into())
                };
                let mut links = Links::new();
                for (a, from) in drawn.iter().enumerate() {
                    for (b, to) in drawn.iter().enumerate() {
                        let far = if from.3 == to.3 { 300.0 } else { 10_000.0 };
                        let one_way_us = far + f64::from(jitter[a * 16 + b]);
                        links.set(node(a), node(b), Link { one_way_us, bytes_per_s: 12.5e6 });
                    }
                }
                (model, drawn.iter().enumerate().map(facts).collect(), links)
            },
        )
    }

    /// Scores of the beam search and of the best ring.
    fn scores(model: &ModelFacts, nodes: &[NodeFacts], links: &Links) -> (Option<Ns>, Option<Ns>) {
        let planner = Planner { model, nodes, links };
        let ask = Ask::new(node(0), 0);
        let all: Vec<&NodeFacts> = nodes.iter().collect();
        let problem = Problem::of(&planner, &all, &ask, Limits::NONE).unwrap();
        let beam = solve(&problem, BEAM_WIDTH, Rank::Score).or_else(|| solve(&problem, BEAM_WIDTH, Rank::Memory));
        (beam.map(|route| route.score), exact::solve(&problem).map(|route| route.score))
    }

    proptest! {
        /// Four others make sixteen sets, and all of them are followed.
        #[test]
        fn of_five_nodes_the_best_ring_is_found((model, nodes, links) in meshes(1..=5)) {
            let (beam, exact) = scores(&model, &nodes, &links);
            prop_assert_eq!(beam, exact);
        }
    }

    #[test]
    fn of_ten_nodes_a_good_ring_is_found() {
        let mut runner = TestRunner::deterministic();
        let (mut possible, mut found, mut best, mut sum, mut worst) = (0, 0, 0, 0.0, 1.0f64);
        for _ in 0..150 {
            let (model, nodes, links) = meshes(6..=10).new_tree(&mut runner).unwrap().current();
            let (beam, exact) = scores(&model, &nodes, &links);
            let Some(exact) = exact else { continue };
            possible += 1;
            let Some(beam) = beam else { continue };
            let factor = beam as f64 / exact as f64;
            assert!((1.0..=FACTOR_MAX).contains(&factor), "{beam} ns, and {exact} ns is possible");
            found += 1;
            best += usize::from(beam == exact);
            sum += factor;
            worst = worst.max(factor);
        }
        println!(
            "a ring exists in {possible} meshes; found in {found}, the best one in {best}; factor {:.4} on average, {worst:.3} at worst",
            sum / f64::from(found)
        );
        assert_eq!(found, possible);
    }
}
