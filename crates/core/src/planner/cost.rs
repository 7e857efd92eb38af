//! What a stage and a hop cost, in whole nanoseconds: a sum is the same in whatever order it is taken, so that equally good
//! rings are found to be equal.

use murmur_gguf::LayerRange;
use murmur_protocol::{codec::Codec, mesh::NodeId};

use super::{
    Planner,
    facts::{Ask, Link, NodeFacts, Placement},
};

/// Nanoseconds.
pub(super) type Ns = i64;

/// What cannot be. Two of them can be added, and a third.
pub(super) const NEVER: Ns = 1 << 60;

/// The longest time that is told from longer ones: five hours for a single layer.
const NS_MAX: f64 = (1u64 << 44) as f64;

/// What a stage counts beside its time: of equally fast rings the one with fewer hops is taken.
pub(super) const STAGE_TIE_NS: Ns = 1;

/// A codec that loses something must save so much per row.
pub const LOSSY_GAIN_US_MIN: f64 = 100.0;

/// Bytes of a frame besides its rows: its header, QUIC's and UDP's.
pub const FRAME_BYTES: u64 = 100;

/// Bytes of a row besides the hidden state, and all of it where token ids travel alone.
pub const TOKEN_BYTES: u64 = 4;

/// Bytes of the sampled token on its way to the driver, with its account.
pub const ANSWER_BYTES: u64 = 64;

/// Loading counts as paid back over so many tokens: layers stay where they are loaded unless another place is faster.
pub const LOAD_PAID_BACK_TOKENS: f64 = 100_000.0;

/// Loading from disk.
pub const DISK_BYTES_PER_S: f64 = 500e6;

/// Loading from another machine: 100 Mbit/s.
pub const FETCH_BYTES_PER_S: f64 = 12.5e6;

/// Whole nanoseconds. What is no number is the longest time.
pub(super) fn ns(us: f64) -> Ns {
    let ns = if us.is_nan() { NS_MAX } else { (us * 1_000.0).round() };
    ns.clamp(0.0, NS_MAX) as Ns
}

/// In microseconds.
pub(super) fn us(ns: Ns) -> f64 {
    ns as f64 / 1_000.0
}

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Payload {
    /// Token ids, from the driver to a stage that embeds them.
    Tokens,
    /// Hidden states, from stage to stage.
    Hidden,
    /// The sampled token, from the last stage to the driver.
    Answer,
}

/// One way between two neighbours in the ring.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Hop {
    pub(super) link: Link,
    /// `None` where no hidden states travel.
    pub(super) codec: Option<Codec>,
    row_bytes: u64,
}

impl Hop {
    pub(super) fn latency(&self) -> Ns {
        ns(self.link.one_way_us)
    }

    /// How long `rows` rows keep the link busy.
    pub(super) fn transfer(&self, rows: u32) -> Ns {
        let bytes = FRAME_BYTES + u64::from(rows) * self.row_bytes;
        ns(bytes as f64 / self.link.bytes_per_s * 1e6)
    }
}

impl Planner<'_> {
    /// The way from one node to another; `None` where the ask does not allow it or nothing gets through.
    pub(super) fn hop(&self, from: NodeId, to: NodeId, payload: Payload, ask: &Ask) -> Option<Hop> {
        let link = if from == to {
            Link { one_way_us: 0.0, bytes_per_s: f64::INFINITY }
        } else {
            let there = self.links.get(from, to);
            if ask.rtt_us_max.is_some_and(|most| self.links.rtt_us(from, to) > most) || there.bytes_per_s <= 0.0 {
                return None;
            }
            there
        };
        let (codec, row_bytes) = match payload {
            Payload::Tokens => (None, TOKEN_BYTES),
            Payload::Answer => (None, ANSWER_BYTES),
            Payload::Hidden => {
                let codec = self.codec(&link, ask);
                (Some(codec), TOKEN_BYTES + codec.row_bytes(self.model.width as usize) as u64)
            }
        };
        Some(Hop { link, codec, row_bytes })
    }

    /// The codec of the smallest predicted time; exact unless loss pays.
    fn codec(&self, link: &Link, ask: &Ask) -> Codec {
        let row_us = |codec: Codec| codec.row_bytes(self.model.width as usize) as f64 / link.bytes_per_s * 1e6;
        let lossy = ask.lossy.iter().copied().min_by(|a, b| row_us(*a).total_cmp(&row_us(*b)));
        lossy.filter(|codec| row_us(Codec::F32) - row_us(*codec) >= LOSSY_GAIN_US_MIN).unwrap_or(Codec::F32)
    }

    /// One row in the layers of `range`, and in the head where it ends the model.
    pub(super) fn compute_ns(&self, node: &NodeFacts, range: LayerRange) -> Ns {
        let layers: Ns = self.model.layers_of(range).map(|layer| ns(node.decode_us_per_layer * layer.cost)).sum();
        if range.end == self.model.whole().end { layers + self.head_ns(node) } else { layers }
    }

    /// One row in the head.
    pub(super) fn head_ns(&self, node: &NodeFacts) -> Ns {
        ns(node.decode_us_per_layer * self.model.head_cost)
    }

    /// A chunk of `rows` rows in all layers of `range`, the head left out: only the last row of a prompt goes there.
    pub(super) fn prefill_ns(&self, node: &NodeFacts, range: LayerRange, rows: u32) -> Ns {
        ns(node.step_us + node.prefill_us_per_layer * self.model.layers_cost(range) * f64::from(rows))
    }

    /// One row in a stage.
    pub(super) fn stage_ns(&self, node: &NodeFacts, range: LayerRange) -> Ns {
        ns(node.step_us) + self.compute_ns(node, range)
    }

    /// Whether a node holds layer `il`: loaded for whatever reason, or as a stage of the previous ring.
    pub(super) fn holds(&self, node: &NodeFacts, il: u32, ask: &Ask) -> bool {
        let stage = |stage: &Placement| stage.node == node.node && stage.layers.contains(il);
        node.loaded.iter().any(|range| range.contains(il)) || ask.previous.iter().any(stage)
    }

    /// Time to load what is not loaded of `range`, the head with the last layer.
    pub(super) fn load_us(&self, node: &NodeFacts, range: LayerRange, ask: &Ask) -> f64 {
        let layer_us = |il: u32| {
            let bytes = self.model.weight_bytes(LayerRange::new(il, il + 1)) as f64;
            match (self.holds(node, il, ask), node.on_disk.iter().any(|range| range.contains(il))) {
                (true, _) => 0.0,
                (false, true) => bytes / DISK_BYTES_PER_S * 1e6,
                (false, false) => bytes / FETCH_BYTES_PER_S * 1e6,
            }
        };
        (range.first..range.end).map(layer_us).sum()
    }

    /// What layers count per token when rings are compared: their time, and their share of loading.
    pub(super) fn layers_score(&self, node: &NodeFacts, range: LayerRange, ask: &Ask) -> Ns {
        let layer_score = |il| {
            let range = LayerRange::new(il, il + 1);
            self.compute_ns(node, range) + ns(self.load_us(node, range, ask) / LOAD_PAID_BACK_TOKENS)
        };
        (range.first..range.end).map(layer_score).sum()
    }

    /// What a stage counts.
    pub(super) fn stage_score(&self, node: &NodeFacts, range: LayerRange, ask: &Ask) -> Ns {
        ns(node.step_us) + STAGE_TIE_NS + self.layers_score(node, range, ask)
    }

    /// What a stage counts per token in a ring in which nothing else changes, in microseconds: its time, its share of loading, and the
    /// ways from whoever has the stage before it and to whoever has the one after. One that is not known counts nothing. `None`: the
    /// node has no room for it, or the ask does not allow a way.
    pub fn stage_us(
        &self,
        stage: &Placement,
        (before, after): (Option<NodeId>, Option<NodeId>),
        ask: &Ask,
    ) -> Option<f64> {
        let node = self.nodes.iter().find(|node| node.node == stage.node)?;
        let range = stage.layers;
        let is_within = node.layers_max.is_none_or(|most| range.len() <= most);
        if !is_within || self.model.stage_memory_bytes(range, ask) > node.memory_bytes {
            return None;
        }
        let entering = if range.first == 0 { Payload::Tokens } else { Payload::Hidden };
        let leaving = if range.end == self.model.whole().end { Payload::Answer } else { Payload::Hidden };
        let hops = [
            before.map(|before| self.hop(before, stage.node, entering, ask)),
            after.map(|after| self.hop(stage.node, after, leaving, ask)),
        ];
        let mut score = self.stage_score(node, range, ask);
        for hop in hops.into_iter().flatten() {
            let hop = hop?;
            score += hop.latency() + hop.transfer(1);
        }
        Some(us(score))
    }
}
