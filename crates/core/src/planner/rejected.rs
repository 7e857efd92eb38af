//! What else was considered for a ring, and why it was not taken.

use std::fmt;

use murmur_gguf::LayerRange;
use murmur_protocol::mesh::NodeId;

use super::{
    Planner,
    cost::us,
    facts::{Ask, NodeFacts, Pin, Placement},
    plan::size,
    problem::Limits,
};

/// Alternatives of each kind that a plan lists, at most.
pub const REJECTED_MAX: usize = 16;

/// An alternative. Times are per token: of one stream, or of all together, whatever was asked for.
#[derive(Debug, Clone, PartialEq)]
pub enum Rejected {
    /// The whole model on one node.
    Whole {
        /// The node.
        node: NodeId,
        /// Time per token.
        token_us: f64,
        /// How much slower than the plan that is.
        slower_us: f64,
    },
    /// The whole model does not fit even the largest node.
    WholeTooLarge {
        /// The node.
        node: NodeId,
        /// Memory it would take.
        needed_bytes: u64,
        /// Memory it has.
        available_bytes: u64,
    },
    /// The best ring of the plan's nodes and one more.
    LeftOut {
        /// The node that is not in the plan.
        node: NodeId,
        /// Time per token with it.
        token_us: f64,
        /// How much slower than the plan that is.
        slower_us: f64,
    },
    /// A node cannot hold the smallest piece of the model.
    TooSmall {
        /// The node.
        node: NodeId,
        /// Memory it would take.
        needed_bytes: u64,
        /// Memory it has.
        available_bytes: u64,
    },
    /// With a node there is no ring that keeps what was asked for: pins, round trips, links.
    NoWay {
        /// The node.
        node: NodeId,
    },
    /// The user does not want it.
    Excluded {
        /// The node.
        node: NodeId,
    },
    /// A better ring, but not by enough to move layers for it.
    Moving {
        /// Time per token.
        token_us: f64,
        /// How much slower than the plan that is: less than nothing.
        slower_us: f64,
    },
    /// The ring as it was, or as far as it is still there.
    Previous {
        /// Time per token.
        token_us: f64,
        /// How much slower than the plan that is.
        slower_us: f64,
    },
}

impl fmt::Display for Rejected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Rejected::Whole { node, token_us, slower_us } => {
                write!(f, "whole model on {}: {}", node.short(), token_time(*token_us, *slower_us))
            }
            Rejected::WholeTooLarge { node, needed_bytes, available_bytes } => {
                let (needs, has) = (size(*needed_bytes), size(*available_bytes));
                write!(f, "whole model on {}, the largest: it needs {needs}, there are {has}", node.short())
            }
            Rejected::LeftOut { node, token_us, slower_us } => {
                write!(f, "{} left out: with it {}", node.short(), token_time(*token_us, *slower_us))
            }
            Rejected::TooSmall { node, needed_bytes, available_bytes } => {
                let (needs, has) = (size(*needed_bytes), size(*available_bytes));
                write!(f, "{} left out: the smallest piece needs {needs}, there are {has}", node.short())
            }
            Rejected::NoWay { node } => write!(f, "{} left out: no ring with it fits what was asked for", node.short()),
            Rejected::Excluded { node } => write!(f, "{} left out, as asked", node.short()),
            Rejected::Moving { token_us, slower_us } => {
                write!(f, "another ring, not worth moving layers: {}", token_time(*token_us, *slower_us))
            }
            Rejected::Previous { token_us, slower_us } => {
                write!(f, "the ring as it was: {}", token_time(*token_us, *slower_us))
            }
        }
    }
}

fn token_time(token_us: f64, slower_us: f64) -> String {
    let by = if slower_us < 0.0 { "faster" } else { "slower" };
    format!("{:.1} ms a token, {:.1} ms {by}", token_us / 1_000.0, slower_us.abs() / 1_000.0)
}

impl Planner<'_> {
    /// Why not the whole model on one node, and why not the nodes that are left out.
    pub(super) fn rejected(&self, ring: &[Placement], ask: &Ask) -> Vec<Rejected> {
        let rest = self.nodes.iter().filter(|node| ring.iter().all(|stage| stage.node != node.node));
        let left_out = rest.take(REJECTED_MAX).map(|node| self.why_left_out(node, ring, ask));
        self.why_not_whole(ring, ask).into_iter().chain(left_out).collect()
    }

    fn why_not_whole(&self, ring: &[Placement], ask: &Ask) -> Vec<Rejected> {
        let needed_bytes = self.model.stage_memory_bytes(self.model.whole(), ask);
        let ours = self.objective_ns(ring, ask);
        let mut alternatives: Vec<_> = self
            .nodes_considered(ask)
            .into_iter()
            .filter_map(|node| {
                let whole = self.whole_on(node, ask, Limits::NONE)?;
                (whole != ring).then(|| (self.objective_ns(&whole, ask), node.node))
            })
            .collect();
        if alternatives.is_empty() && ring.len() > 1 {
            let largest = self.nodes_considered(ask).into_iter().max_by_key(|node| node.memory_bytes);
            let too_large = largest.filter(|node| node.memory_bytes < needed_bytes).map(|node| {
                Rejected::WholeTooLarge { node: node.node, needed_bytes, available_bytes: node.memory_bytes }
            });
            return too_large.into_iter().collect();
        }
        alternatives.sort_unstable();
        let whole = |(ns, node)| Rejected::Whole { node, token_us: us(ns), slower_us: us(ns - ours) };
        alternatives.into_iter().take(REJECTED_MAX).map(whole).collect()
    }

    fn why_left_out(&self, node: &NodeFacts, ring: &[Placement], ask: &Ask) -> Rejected {
        let id = node.node;
        if ask.excluded.contains(&id) {
            return Rejected::Excluded { node: id };
        }
        let bounds = self.model.bounds();
        let pieces =
            bounds.windows(2).map(|pair| self.model.stage_memory_bytes(LayerRange::new(pair[0], pair[1]), ask));
        let needed_bytes = pieces.min().unwrap_or(0);
        if needed_bytes > node.memory_bytes {
            return Rejected::TooSmall { node: id, needed_bytes, available_bytes: node.memory_bytes };
        }
        let others: Vec<NodeFacts> = self.nodes_of(ring).map(|(node, _)| node).chain([node]).cloned().collect();
        let mut with = ask.clone();
        with.pins.push(Pin::Used(id));
        let planner = Planner { nodes: &others, ..*self };
        let Some(best) = planner.best_ring(&with) else { return Rejected::NoWay { node: id } };
        let (token, ours) = (self.objective_ns(&best, ask), self.objective_ns(ring, ask));
        Rejected::LeftOut { node: id, token_us: us(token), slower_us: us(token - ours) }
    }
}
