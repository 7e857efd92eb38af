//! Which node computes which layers of a model that is too large for one node, or faster on several: the ring.
//!
//! A token goes from the driver through the stages and back to the driver: one circulation. Its time is the sum of what the
//! stages compute and what the hops take, and that is what is made least for one stream. Many streams share the ring, each
//! with one token on its way around; then what counts is the time between two tokens of all of them together, which is the
//! circulation shared by the streams or what the busiest node or link takes for a token, whichever is more.
//!
//! Everything is predicted from measured figures in one unit, time, and every figure stands in the [`Plan`], together with
//! what else was considered and why it was not taken. When there is no ring, [`NoRing`] says what would make one possible:
//! it was tried.
//!
//! - [`facts`]: what the planner is told.
//! - [`cost`]: what a stage and a hop cost.
//! - `problem`: a search as tables of numbers, all constraints folded in; `exact` and `beam`: the two searches.
//! - `search`: which of them, and how the most throughput is found.
//! - `plan`, `rejected`, `error`: the answer, and its reasons.
//!
//! **Layers stay where they are.** Loading takes seconds to minutes, so a ring that exists is left as it is unless another
//! is better by [`MOVE_GAIN_MIN`], and after a death ([`Planner::mend`]) only the lost layers move, if that is possible
//! at all.

mod beam;
pub mod cost;
pub mod error;
mod exact;
pub mod facts;
pub mod plan;
mod problem;
pub mod rejected;
mod search;

use murmur_protocol::mesh::NodeId;

pub use error::{NoRing, Remedy, Shortage};
pub use facts::{Ask, LayerFacts, Link, Links, ModelFacts, NodeFacts, Objective, Pin, Placement};
pub use murmur_protocol::codec::Codec;
pub use plan::{EdgePlan, Origin, Plan, StagePlan, size};
pub use rejected::Rejected;

use cost::us;

/// Up to so many nodes the best ring is found; among more, a good one.
pub const EXACT_NODES_MAX: usize = 12;

/// Nodes that a search looks at. Of more, the most promising.
pub const NODES_MAX: usize = 64;

/// A ring for which layers move must be better by this fraction than the one for which they need not.
pub const MOVE_GAIN_MIN: f64 = 0.1;

/// What is known.
#[derive(Debug, Clone, Copy)]
pub struct Planner<'a> {
    /// The model.
    pub model: &'a ModelFacts,
    /// The nodes that could hold stages.
    pub nodes: &'a [NodeFacts],
    /// The links between them and with the driver.
    pub links: &'a Links,
}

impl Planner<'_> {
    /// The best ring, or the previous one if no other is better enough.
    pub fn plan(&self, ask: &Ask) -> Result<Plan, NoRing> {
        self.check(ask)?;
        let best = self.best_ring(ask).ok_or_else(|| NoRing::Short(self.shortage(ask)))?;
        let kept = self.survivors(ask).and_then(|pins| self.best_ring(&Ask { pins, ..ask.clone() }));
        let Some(kept) = kept else {
            return Ok(self.explained(&best, ask, Origin::Best, None));
        };
        let (best_ns, kept_ns) = (self.objective_ns(&best, ask), self.objective_ns(&kept, ask));
        let difference = us(kept_ns - best_ns);
        if (best_ns as f64) < kept_ns as f64 * (1.0 - MOVE_GAIN_MIN) {
            let previous = Rejected::Previous { token_us: us(kept_ns), slower_us: difference };
            return Ok(self.explained(&best, ask, Origin::Best, Some(previous)));
        }
        let moving = Rejected::Moving { token_us: us(best_ns), slower_us: -difference };
        Ok(self.explained(&kept, ask, Origin::Kept, (best != kept).then_some(moving)))
    }

    /// A ring that is better than the previous one by enough to move layers for it.
    pub fn improve(&self, ask: &Ask) -> Option<Plan> {
        let plan = self.plan(ask).ok()?;
        matches!(plan.rejected.first(), Some(Rejected::Previous { .. })).then_some(plan)
    }

    /// A ring after the death of nodes of [`Ask::previous`]. Layers that nobody lost stay where they are: the
    /// lost ones go to nodes that hold them loaded; else to the fastest, which may be neighbours in the ring; and only if
    /// there is no such ring, other layers move too.
    pub fn mend(&self, ask: &Ask, lost: &[NodeId]) -> Result<Plan, NoRing> {
        let mut ask = ask.clone();
        ask.excluded.extend(lost);
        ask.pins.retain(|pin| !lost.contains(&pin.node()));
        self.check(&ask)?;
        if let Some(pins) = self.survivors(&ask) {
            let stay = Ask { pins, ..ask.clone() };
            let holder = self.best_ring(&Ask { loaded_only: true, ..stay.clone() }).map(|ring| (ring, Origin::Holder));
            let mended = holder.or_else(|| Some((self.best_ring(&stay)?, Origin::LostMoved)));
            if let Some((ring, origin)) = mended {
                return Ok(self.explained(&ring, &ask, origin, None));
            }
        }
        let ring = self.best_ring(&ask).ok_or_else(|| NoRing::Short(self.shortage(&ask)))?;
        Ok(self.explained(&ring, &ask, Origin::Anew, None))
    }

    /// Pins that hold what is left of the previous ring in its place, beside those that were asked for. `None` when there was
    /// no ring, or a pin has other plans with a node.
    fn survivors(&self, ask: &Ask) -> Option<Vec<Pin>> {
        let mut pins = ask.pins.clone();
        let kept = |stage: &&Placement| {
            let there = self.nodes.iter().any(|node| node.node == stage.node);
            // With `keep_ends` the driver's first stage is given.
            let given = ask.keep_ends > 0 && stage.node == ask.driver && stage.layers.end < self.model.whole().end;
            there && !given && !ask.excluded.contains(&stage.node)
        };
        for stage in ask.previous.iter().filter(kept) {
            match pins.iter_mut().find(|pin| pin.node() == stage.node) {
                None => pins.push(Pin::AtLeast(stage.node, stage.layers)),
                Some(pin @ Pin::Used(_)) => *pin = Pin::AtLeast(stage.node, stage.layers),
                Some(pin) if pin.layers() == Some(stage.layers) => {}
                Some(_) => return None,
            }
        }
        (!ask.previous.is_empty()).then_some(pins)
    }

    fn explained(&self, ring: &[Placement], ask: &Ask, origin: Origin, why: Option<Rejected>) -> Plan {
        let mut plan = self.plan_of(ring, ask, origin);
        plan.rejected = why.into_iter().chain(self.rejected(ring, ask)).collect();
        plan
    }

    /// Refuses what contradicts itself.
    fn check(&self, ask: &Ask) -> Result<(), NoRing> {
        let known = |node: NodeId| self.nodes.iter().any(|known| known.node == node) && !ask.excluded.contains(&node);
        let bounds = self.model.bounds();
        let refuse = |why: String| Err(NoRing::BadAsk(why));
        if self.model.layers.is_empty() {
            return refuse("the model has no layers".to_owned());
        }
        if ask.keep_ends > 0 && !known(ask.driver) {
            return refuse(
                "first and last layers cannot stay on the driver, which contributes no memory; let it serve, too"
                    .to_owned(),
            );
        }
        for (i, pin) in ask.pins.iter().enumerate() {
            let node = pin.node();
            let short = node.short();
            if !known(node) {
                return refuse(format!("{short} is pinned and is excluded or not there; include it, or drop the pin"));
            }
            if ask.pins[..i].iter().any(|other| other.node() == node) {
                return refuse(format!("{short} is pinned twice; pin it once, with all its layers"));
            }
            let Some(layers) = pin.layers() else { continue };
            if layers.is_empty() || !bounds.contains(&layers.first) || !bounds.contains(&layers.end) {
                let cuts = bounds.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
                return refuse(format!("{short} is pinned to layers {layers}; stages begin and end at {cuts}"));
            }
            if ask.keep_ends > 0 && node == ask.driver {
                return refuse(format!(
                    "{short} keeps first and last layers and is pinned to layers {layers}; ask for one of them"
                ));
            }
        }
        Ok(())
    }
}
