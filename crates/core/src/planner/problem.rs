//! A search as tables of numbers: what each node may take from where to where, at which cost, and what each hop costs.
//!
//! Constraints are folded into the tables, so that the searches know none of them. Memory, limits on layers and a longest
//! time per stage are the earliest bound at which a stage may begin that ends at a given one; pins are intervals for
//! beginnings and ends; a link that may not be used costs [`NEVER`].

use std::ops::RangeInclusive;

use murmur_gguf::LayerRange;
use murmur_protocol::mesh::NodeId;

use super::{
    Planner,
    cost::{NEVER, Ns, Payload, STAGE_TIE_NS, ns},
    facts::{Ask, NodeFacts, Pin, Placement},
};

/// No bound at all.
const NOWHERE: RangeInclusive<usize> = RangeInclusive::new(1, 0);

/// Most that may be spent.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// On a node or a transfer, per token.
    pub(super) step: Ns,
    /// Score of the ring.
    pub(super) score: Ns,
}

impl Limits {
    pub(super) const NONE: Limits = Limits { step: NEVER, score: NEVER - 1 };
}

/// What one node could do. Bounds are given by their index.
#[derive(Debug, Clone)]
pub(super) struct Row {
    pub(super) node: NodeId,
    pub(super) memory_bytes: u64,
    /// For each bound, the score of all layers before it.
    pub(super) before: Vec<Ns>,
    /// Score of a stage besides its layers.
    pub(super) fixed: Ns,
    /// For each bound, the earliest one at which a stage that ends there may begin; the bound itself where none may.
    pub(super) earliest: Vec<usize>,
    /// Bounds at which its stage may begin.
    pub(super) begins: RangeInclusive<usize>,
    /// Bounds at which its stage may end.
    pub(super) ends: RangeInclusive<usize>,
    /// From the driver.
    pub(super) enter: Ns,
    /// To each row's node; to its own, never.
    pub(super) hops: Vec<Ns>,
    /// To the driver.
    pub(super) leave: Ns,
}

/// A ring as a search finds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Route {
    pub(super) score: Ns,
    /// Row, first bound, end bound.
    pub(super) stages: Vec<(usize, usize, usize)>,
}

/// The tables.
#[derive(Debug, Clone)]
pub(super) struct Problem {
    /// Layers at which stages may begin and end.
    bounds: Vec<u32>,
    /// The bound at which the first stage begins.
    pub(super) from: usize,
    /// The nodes, at most 64.
    pub(super) rows: Vec<Row>,
    /// Rows that must be used, as bits.
    pub(super) must: u64,
    /// For each bound, the rows that must be used and can no longer be used from there on, as bits.
    pub(super) due: Vec<u64>,
    /// For each row, and each bound at which its stage may end, a score that the rest of the ring does not fall below.
    pub(super) rest: Vec<Vec<Ns>>,
    /// Routes with a higher score are of no use.
    pub(super) score_max: Ns,
    /// The driver's first stage, where the ends are kept.
    kept: Option<Kept>,
}

/// With `keep_ends` the driver holds the first stage, which is given, and the last one.
#[derive(Debug, Clone, Copy)]
struct Kept {
    first: Placement,
    score: Ns,
    /// The first and the latest bound at which the last stage may begin.
    last_begins: (usize, usize),
}

impl Problem {
    /// The tables for some of the planner's nodes. `None` when there cannot be a ring.
    pub(super) fn of(planner: &Planner<'_>, nodes: &[&NodeFacts], ask: &Ask, limits: Limits) -> Option<Problem> {
        let bounds = planner.model.bounds();
        let last = bounds.len() - 1;
        let mut rooms: Vec<Room<'_>> = nodes.iter().map(|node| Room::of(planner, node, ask, limits.step)).collect();
        let kept = match ask.keep_ends {
            0 => None,
            _ => Some(rooms.iter_mut().find(|room| room.node.node == ask.driver)?.keep_ends(&bounds)?),
        };
        let mut rows: Vec<Row> = rooms.iter().map(|room| room.row(&bounds)).collect();
        let hop = |from, to, payload| {
            let hop = planner.hop(from, to, payload, ask).filter(|hop| hop.transfer(1) <= limits.step);
            hop.map_or(NEVER, |hop| hop.latency() + hop.transfer(1))
        };
        for row in &mut rows {
            let hop_to =
                |to: &&NodeFacts| if to.node == row.node { NEVER } else { hop(row.node, to.node, Payload::Hidden) };
            row.hops = nodes.iter().map(hop_to).collect();
            row.leave = hop(row.node, ask.driver, Payload::Answer);
            match kept {
                None => row.enter = hop(ask.driver, row.node, Payload::Tokens),
                Some(kept) if kept.first.node == row.node => {
                    let (first, latest) = kept.last_begins;
                    row.begins = first..=latest.min(*row.begins.end());
                    row.ends = last..=last;
                }
                Some(_) => (row.enter, row.leave) = (hop(ask.driver, row.node, Payload::Hidden), NEVER),
            }
        }
        let pinned = |row: &Row| {
            ask.pins.iter().any(|pin| pin.node() == row.node) || kept.is_some_and(|kept| kept.first.node == row.node)
        };
        let bits = |which: &dyn Fn(&Row) -> bool| {
            rows.iter().enumerate().filter(|(_, row)| which(row)).fold(0, |bits, (i, _)| bits | 1 << i)
        };
        Some(Problem {
            from: kept.map_or(0, |kept| kept.last_begins.0 - 1),
            must: bits(&pinned),
            due: (0..=last).map(|bound| bits(&|row| pinned(row) && *row.begins.end() < bound)).collect(),
            rest: least_rest(&rows, last),
            score_max: limits.score - kept.map_or(0, |kept| kept.score),
            kept,
            bounds,
            rows,
        })
    }

    /// Index of the last bound: all layers are placed.
    pub(super) fn last(&self) -> usize {
        self.bounds.len() - 1
    }

    /// The route as a ring, with what every route begins with.
    pub(super) fn ring(&self, route: &Route) -> Vec<Placement> {
        let stages = route.stages.iter().map(|&(row, first, end)| Placement {
            node: self.rows[row].node,
            layers: LayerRange::new(self.bounds[first], self.bounds[end]),
        });
        self.kept.map(|kept| kept.first).into_iter().chain(stages).collect()
    }
}

/// The least score of the rest of a ring if nodes could be used again.
fn least_rest(rows: &[Row], last: usize) -> Vec<Vec<Ns>> {
    let mut rest: Vec<Vec<Ns>> = rows.iter().map(|row| vec![row.leave; last + 1]).collect();
    for begin in (0..last).rev() {
        let stage = |(row, rest): (&Row, &Vec<Ns>)| {
            let allowed =
                |end: &usize| row.earliest[*end] <= begin && row.begins.contains(&begin) && row.ends.contains(end);
            let score = |end: usize| row.before[end] - row.before[begin] + row.fixed + rest[end];
            (begin + 1..=last).filter(allowed).map(score).min().unwrap_or(NEVER)
        };
        let stages: Vec<Ns> = rows.iter().zip(&rest).map(stage).collect();
        for (row, rest) in rows.iter().zip(&mut rest) {
            let onward = row.hops.iter().zip(&stages).map(|(hop, stage)| hop + stage).min();
            rest[begin] = onward.unwrap_or(NEVER).min(NEVER);
        }
    }
    rest
}

/// What a node has to give.
struct Room<'a> {
    planner: &'a Planner<'a>,
    node: &'a NodeFacts,
    ask: &'a Ask,
    memory_bytes: u64,
    layers: u32,
    step: Ns,
}

impl<'a> Room<'a> {
    fn of(planner: &'a Planner<'a>, node: &'a NodeFacts, ask: &'a Ask, step: Ns) -> Room<'a> {
        let layers = node.layers_max.unwrap_or(u32::MAX);
        Room { planner, node, ask, memory_bytes: node.memory_bytes, layers, step }
    }

    /// Whether a stage fits. If it does, so does every part of it that ends where it ends.
    fn fits(&self, range: LayerRange) -> bool {
        range.len() <= self.layers
            && self.planner.model.stage_memory_bytes(range, self.ask) <= self.memory_bytes
            && self.planner.stage_ns(self.node, range) <= self.step
            && (!self.ask.loaded_only || (range.first..range.end).all(|il| self.planner.holds(self.node, il, self.ask)))
    }

    /// Takes the driver's first stage out of its room. One that holds layers of which it can have no others has no two stages.
    fn keep_ends(&mut self, bounds: &[u32]) -> Option<Kept> {
        let from = bounds.iter().position(|&bound| bound >= self.ask.keep_ends)?;
        let layers = LayerRange::new(0, bounds[from]);
        let latest = bounds.iter().rposition(|&bound| bound + self.ask.keep_ends <= self.planner.model.whole().end)?;
        if latest <= from || self.node.only.is_some() || !self.fits(layers) {
            return None;
        }
        self.memory_bytes -= self.planner.model.stage_memory_bytes(layers, self.ask);
        self.layers -= layers.len();
        self.step -= self.planner.stage_ns(self.node, layers);
        let score = self.planner.stage_score(self.node, layers, self.ask);
        Some(Kept { first: Placement { node: self.node.node, layers }, score, last_begins: (from + 1, latest) })
    }

    fn row(&self, bounds: &[u32]) -> Row {
        let mut before = vec![0; bounds.len()];
        for (i, pair) in bounds.windows(2).enumerate() {
            before[i + 1] =
                before[i] + self.planner.layers_score(self.node, LayerRange::new(pair[0], pair[1]), self.ask);
        }
        let mut begin = 0;
        let earliest = |end: usize| {
            if end == bounds.len() - 1 {
                // The last stage keeps nothing, and may have more layers.
                begin = 0;
            }
            while begin < end && !self.fits(LayerRange::new(bounds[begin], bounds[end])) {
                begin += 1;
            }
            begin
        };
        let (begins, ends) = self.intervals(bounds);
        Row {
            node: self.node.node,
            memory_bytes: self.node.memory_bytes,
            before,
            fixed: ns(self.node.step_us) + STAGE_TIE_NS,
            earliest: (0..bounds.len()).map(earliest).collect(),
            begins,
            ends,
            enter: NEVER,
            hops: Vec::new(),
            leave: NEVER,
        }
    }

    /// Where a stage may begin and end.
    fn intervals(&self, bounds: &[u32]) -> (RangeInclusive<usize>, RangeInclusive<usize>) {
        let last = bounds.len() - 1;
        let at = |layer| bounds.partition_point(|&bound| bound < layer);
        let pin = self.ask.pins.iter().find(|pin| pin.layers().is_some() && pin.node() == self.node.node);
        let (begins, ends) = match pin {
            None | Some(Pin::Used(_)) => (0..=last, 0..=last),
            Some(Pin::Exactly(_, layers)) => (at(layers.first)..=at(layers.first), at(layers.end)..=at(layers.end)),
            Some(Pin::AtLeast(_, layers)) => (0..=at(layers.first), at(layers.end)..=last),
        };
        match self.node.only {
            None => (begins, ends),
            Some(only) if bounds.contains(&only.first) && bounds.contains(&only.end) => {
                (only_at(&begins, at(only.first)), only_at(&ends, at(only.end)))
            }
            // Another model's cuts, or a lie.
            Some(_) => (NOWHERE, NOWHERE),
        }
    }
}

/// `interval` with this bound alone.
fn only_at(interval: &RangeInclusive<usize>, bound: usize) -> RangeInclusive<usize> {
    if interval.contains(&bound) { bound..=bound } else { NOWHERE }
}
