//! A ring with everything it costs, and how it is written for people.

use std::fmt;

use murmur_gguf::LayerRange;
use murmur_protocol::{codec::Codec, mesh::NodeId};

use super::{
    Planner,
    cost::{Hop, Ns, Payload, us},
    facts::{Ask, NodeFacts, Placement},
    rejected::Rejected,
};

/// One stage, and what a token costs there.
#[derive(Debug, Clone, PartialEq)]
pub struct StagePlan {
    /// The node.
    pub node: NodeId,
    /// Its layers.
    pub layers: LayerRange,
    /// Computing its layers, and the head in the last stage.
    pub compute_us: f64,
    /// Besides: the child process, the batch's set-up.
    pub fixed_us: f64,
    /// Memory it takes: weights, KV of all streams at their full context, buffers.
    pub memory_bytes: u64,
    /// Memory that the node has for the model.
    pub available_bytes: u64,
    /// Loading what is not loaded there.
    pub load_us: f64,
}

/// One hop, and what a token costs there.
#[derive(Debug, Clone, PartialEq)]
pub struct EdgePlan {
    /// From this node.
    pub from: NodeId,
    /// To this one.
    pub to: NodeId,
    /// How hidden states travel; `None` where token ids do.
    pub codec: Option<Codec>,
    /// One way.
    pub latency_us: f64,
    /// How long one row keeps the link busy.
    pub transfer_us: f64,
}

/// How a plan came about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The best ring there is.
    Best,
    /// The ring as it was, or as far as it is still there: another would not be better enough to move layers for it.
    Kept,
    /// The lost layers are loaded already on nodes that are left. Nothing is loaded.
    Holder,
    /// The lost layers alone are loaded elsewhere.
    LostMoved,
    /// Layers besides the lost ones must move: without that there is no ring.
    Anew,
}

/// A ring, what it costs, and why it and no other.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Stages in order.
    pub stages: Vec<StagePlan>,
    /// From the driver to the first stage, from each stage to the next, from the last to the driver.
    pub edges: Vec<EdgePlan>,
    /// One circulation: the time of a token of a stream that is alone.
    pub token_us: f64,
    /// What is busiest for a token: a node, or a link.
    pub bottleneck_us: f64,
    /// Streams at once.
    pub streams: u32,
    /// Prompt for which [`Plan::first_token_us`] is predicted.
    pub prompt_tokens: u32,
    /// Time until the first token, chunks of the prompt being in different stages at once.
    pub first_token_us: f64,
    /// Where it comes from.
    pub origin: Origin,
    /// What else was considered.
    pub rejected: Vec<Rejected>,
}

impl Plan {
    /// Tokens per second of a stream that is alone.
    pub fn tokens_per_s_alone(&self) -> f64 {
        1e6 / self.token_us.max(1.0)
    }

    /// Tokens per second of all streams together: each has one token in the ring, and the busiest part sets the pace.
    pub fn tokens_per_s(&self) -> f64 {
        1e6 / (self.token_us / f64::from(self.streams)).max(self.bottleneck_us).max(1.0)
    }

    /// Who holds what.
    pub fn placements(&self) -> Vec<Placement> {
        self.stages.iter().map(|stage| Placement { node: stage.node, layers: stage.layers }).collect()
    }

    /// Time until all layers are loaded: nodes load at the same time.
    pub fn load_us(&self) -> f64 {
        self.stages.iter().map(|stage| stage.load_us).fold(0.0, f64::max)
    }
}

impl Planner<'_> {
    /// What the ring costs.
    pub(super) fn plan_of(&self, ring: &[Placement], ask: &Ask, origin: Origin) -> Plan {
        let stages: Vec<StagePlan> = self
            .nodes_of(ring)
            .map(|(node, &Placement { layers, .. })| StagePlan {
                node: node.node,
                layers,
                compute_us: us(self.compute_ns(node, layers)),
                fixed_us: us(self.stage_ns(node, layers) - self.compute_ns(node, layers)),
                memory_bytes: self.model.stage_memory_bytes(layers, ask),
                available_bytes: node.memory_bytes,
                load_us: self.load_us(node, layers, ask),
            })
            .collect();
        let edge = |(from, to, hop): (NodeId, NodeId, Hop)| EdgePlan {
            from,
            to,
            codec: hop.codec,
            latency_us: us(hop.latency()),
            transfer_us: us(hop.transfer(1)),
        };
        let hops = self.hops_of(ring, ask);
        let computing: Ns = self.nodes_of(ring).map(|(node, stage)| self.stage_ns(node, stage.layers)).sum();
        let travelling: Ns = hops.iter().map(|(_, _, hop)| hop.latency() + hop.transfer(1)).sum();
        Plan {
            token_us: us(computing + travelling),
            bottleneck_us: us(self.bottleneck_ns(ring, ask)),
            streams: ask.streams.max(1),
            prompt_tokens: ask.prompt_tokens,
            first_token_us: us(self.first_token_ns(ring, ask)),
            origin,
            rejected: Vec::new(),
            stages,
            edges: hops.into_iter().map(edge).collect(),
        }
    }

    /// Each stage with its node.
    pub(super) fn nodes_of<'a>(
        &'a self,
        ring: &'a [Placement],
    ) -> impl Iterator<Item = (&'a NodeFacts, &'a Placement)> {
        ring.iter().filter_map(|stage| Some((self.nodes.iter().find(|node| node.node == stage.node)?, stage)))
    }

    /// The hops of a ring that the ask allows.
    pub(super) fn hops_of(&self, ring: &[Placement], ask: &Ask) -> Vec<(NodeId, NodeId, Hop)> {
        let stops: Vec<NodeId> =
            [ask.driver].into_iter().chain(ring.iter().map(|stage| stage.node)).chain([ask.driver]).collect();
        let payload = |i: usize| match i {
            0 => Payload::Tokens,
            i if i == ring.len() => Payload::Answer,
            _ => Payload::Hidden,
        };
        let hop =
            |(i, pair): (usize, &[NodeId])| Some((pair[0], pair[1], self.hop(pair[0], pair[1], payload(i), ask)?));
        stops.windows(2).enumerate().filter_map(hop).collect()
    }

    /// Time that the busiest node or link spends on a token.
    pub(super) fn bottleneck_ns(&self, ring: &[Placement], ask: &Ask) -> Ns {
        let transfers = self.hops_of(ring, ask).into_iter().map(|(_, _, hop)| hop.transfer(1));
        self.busy(ring, |node, layers| self.stage_ns(node, layers)).chain(transfers).max().unwrap_or(0)
    }

    /// The time that each node spends, in all of its stages.
    fn busy<'a>(
        &'a self,
        ring: &'a [Placement],
        stage_ns: impl Fn(&NodeFacts, LayerRange) -> Ns + Copy + 'a,
    ) -> impl Iterator<Item = Ns> + 'a {
        ring.iter().map(move |at| {
            self.nodes_of(ring)
                .filter(|(node, _)| node.node == at.node)
                .map(|(node, stage)| stage_ns(node, stage.layers))
                .sum()
        })
    }

    /// The first chunk's way through all stages, then one chunk after the other at the pace of what is busiest.
    fn first_token_ns(&self, ring: &[Placement], ask: &Ask) -> Ns {
        let rows = ask.prompt_tokens.min(ask.chunk_rows).max(1);
        let chunks = Ns::from(ask.prompt_tokens.div_ceil(rows).max(1));
        let hops = self.hops_of(ring, ask);
        let hop_rows =
            |(i, (_, _, hop)): (usize, &(NodeId, NodeId, Hop))| hop.transfer(if i < ring.len() { rows } else { 1 });
        let transfers: Vec<Ns> = hops.iter().enumerate().map(hop_rows).collect();
        let latencies: Ns = hops.iter().map(|(_, _, hop)| hop.latency()).sum();
        let stages: Ns = self.nodes_of(ring).map(|(node, stage)| self.prefill_ns(node, stage.layers, rows)).sum();
        let head = self.nodes_of(ring).last().map_or(0, |(node, _)| self.head_ns(node));
        let busy = self.busy(ring, |node, layers| self.prefill_ns(node, layers, rows));
        let pace = busy.chain(transfers.iter().copied()).max().unwrap_or(0);
        latencies + stages + transfers.iter().sum::<Ns>() + head + (chunks - 1) * pace
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |us: f64| us / 1_000.0;
        let origin = match self.origin {
            Origin::Best => "",
            Origin::Kept => ", as before",
            Origin::Holder => ", nothing to load",
            Origin::LostMoved => ", only the lost layers move",
            Origin::Anew => ", all anew",
        };
        let count = if self.stages.len() == 1 { "stage" } else { "stages" };
        write!(f, "{} {count}: {:.1} ms a token", self.stages.len(), ms(self.token_us))?;
        write!(f, ", {:.1} tokens/s", self.tokens_per_s_alone())?;
        if self.streams > 1 {
            write!(f, ", {} streams {:.1} tokens/s", self.streams, self.tokens_per_s())?;
        }
        writeln!(
            f,
            ", first token of a prompt of {} after {:.0} ms{origin}",
            self.prompt_tokens,
            ms(self.first_token_us)
        )?;
        writeln!(f, "node        layers    compute ms  fixed ms  memory                 load s")?;
        for stage in &self.stages {
            let memory = format!("{} of {}", size(stage.memory_bytes), size(stage.available_bytes));
            writeln!(
                f,
                "{:<10}  {:<8} {:>11.2} {:>9.2}  {memory:<21} {:>7.1}",
                stage.node.short(),
                stage.layers.to_string(),
                ms(stage.compute_us),
                ms(stage.fixed_us),
                stage.load_us / 1e6,
            )?;
        }
        writeln!(f, "from        to          latency ms  transfer ms  carries")?;
        for edge in &self.edges {
            let carries = edge.codec.map_or("tokens", Codec::name);
            writeln!(
                f,
                "{:<10}  {:<10} {:>11.2} {:>12.2}  {carries}",
                edge.from.short(),
                edge.to.short(),
                ms(edge.latency_us),
                ms(edge.transfer_us),
            )?;
        }
        self.rejected.iter().try_for_each(|rejected| writeln!(f, "{rejected}"))
    }
}

/// Bytes as people read them.
pub fn size(bytes: u64) -> String {
    let (unit, shift) = match bytes {
        0..0x10_0000 => ("KiB", 10),
        0x10_0000..0x4000_0000 => ("MiB", 20),
        _ => ("GiB", 30),
    };
    format!("{:.1} {unit}", bytes as f64 / (1u64 << shift) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_a_unit_in_which_they_are_not_zero() {
        let sizes = [20 << 10, 3 << 19, 5 << 30].map(size);
        assert_eq!(sizes, ["20.0 KiB", "1.5 MiB", "5.0 GiB"]);
    }
}
