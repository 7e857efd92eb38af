//! What the planner is told: the model, the nodes, the links, and what is asked for.

use std::collections::BTreeMap;

use murmur_gguf::{LayerRange, Manifest};
use murmur_protocol::{codec::Codec, mesh::NodeId};

/// One way of a link that was never measured, in microseconds: pessimistic, so that measured links go first.
pub const ONE_WAY_US_UNKNOWN: f64 = 100_000.0;

/// Bandwidth of a link that was never measured: 10 Mbit/s.
pub const BYTES_PER_S_UNKNOWN: f64 = 1_250_000.0;

/// Rows of a chunk of a prompt, where the ask does not say.
pub const CHUNK_ROWS_DEFAULT: u32 = 256;

/// One layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerFacts {
    /// Bytes of weights.
    pub weight_bytes: u64,
    /// Bytes of keys and values per token of context.
    pub kv_bytes_per_token: u64,
    /// Time it takes, relative to an average layer.
    pub cost: f64,
}

/// The model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelFacts {
    /// The layers, in order.
    pub layers: Vec<LayerFacts>,
    /// Layers before which it may be cut, ascending. Empty: it runs whole or not at all.
    pub cuts: Vec<u32>,
    /// Bytes of final norm and head in the last stage; of the embedding's copy, where that serves as head.
    pub head_bytes: u64,
    /// Time of the head for one row, relative to an average layer.
    pub head_cost: f64,
    /// Width of the hidden state.
    pub width: u32,
    /// Bytes a stage takes besides layers, KV and head: buffers for one batch, the process.
    pub stage_bytes: u64,
    /// Of such bytes, those per token of context of each stream: the attention mask and the like.
    pub stage_bytes_per_token: u64,
    /// Bytes of hidden states that a stage keeps of what it has sent on, at most. The last one sends nothing on.
    pub kept_bytes: u64,
}

impl ModelFacts {
    /// From a manifest; nothing is kept. Decoding reads each weight once, so that a layer's cost is its bytes; of a mixture of experts, those
    /// of the experts used. The embedding counts nothing: a stage reads rows of it from disk.
    pub fn of(manifest: &Manifest, stage_bytes: u64, stage_bytes_per_token: u64) -> ModelFacts {
        let bytes: u64 = manifest.layers.iter().map(|layer| layer.bytes).sum();
        let mean = (bytes as f64 / manifest.layers.len().max(1) as f64).max(1.0);
        let facts = manifest.facts.as_ref();
        let read = facts
            .filter(|facts| facts.experts > 0)
            .map_or(1.0, |facts| f64::from(facts.experts_used.clamp(1, facts.experts)) / f64::from(facts.experts));
        let head_bytes = manifest.head.as_ref().map_or(0, |head| head.bytes);
        let layer = |part: &murmur_gguf::manifest::Part| LayerFacts {
            weight_bytes: part.bytes,
            kv_bytes_per_token: manifest.kv_bytes_per_token_per_layer,
            cost: part.bytes as f64 / mean,
        };
        ModelFacts {
            layers: manifest.layers.iter().map(layer).collect(),
            cuts: manifest.allowed_cuts.clone(),
            head_bytes,
            head_cost: head_bytes as f64 / (mean * read),
            width: facts.map_or(0, |facts| facts.embedding_length),
            stage_bytes: stage_bytes + manifest.shared.as_ref().map_or(0, |shared| shared.bytes),
            stage_bytes_per_token,
            kept_bytes: 0,
        }
    }

    /// All layers.
    pub fn whole(&self) -> LayerRange {
        LayerRange::new(0, self.layers.len() as u32)
    }

    /// Where stages may begin and end: 0, the cuts, the number of layers.
    pub(super) fn bounds(&self) -> Vec<u32> {
        let end = self.whole().end;
        let mut bounds: Vec<u32> =
            self.cuts.iter().copied().filter(|cut| (1..end).contains(cut)).chain([0, end]).collect();
        bounds.sort_unstable();
        bounds.dedup();
        bounds
    }

    /// The layers of `range`.
    pub(super) fn layers_of(&self, range: LayerRange) -> impl Iterator<Item = &LayerFacts> {
        self.layers.iter().take(range.end as usize).skip(range.first as usize)
    }

    /// Time of the layers of `range` for one row, relative to an average layer.
    pub fn layers_cost(&self, range: LayerRange) -> f64 {
        self.layers_of(range).map(|layer| layer.cost).sum()
    }

    /// The same of a stage: with the head, where its layers end the model.
    pub fn stage_cost(&self, range: LayerRange) -> f64 {
        let head = if range.end == self.whole().end { self.head_cost } else { 0.0 };
        self.layers_cost(range) + head
    }

    /// Bytes of weights of a stage, the head of the last one included.
    pub(super) fn weight_bytes(&self, range: LayerRange) -> u64 {
        let head = if range.end == self.whole().end { self.head_bytes } else { 0 };
        self.layers_of(range).map(|layer| layer.weight_bytes).fold(head, u64::saturating_add)
    }

    /// Bytes of memory of a stage, with all streams at their full context.
    pub fn stage_memory_bytes(&self, range: LayerRange, ask: &Ask) -> u64 {
        let sent = if range.end < self.whole().end { ask.cells().saturating_mul(4 * u64::from(self.width)) } else { 0 };
        let kept = sent.min(self.kept_bytes);
        let kv: u64 = self.layers_of(range).map(|layer| layer.kv_bytes_per_token).fold(0, u64::saturating_add);
        kv.saturating_add(self.stage_bytes_per_token)
            .saturating_mul(ask.cells())
            .saturating_add(self.stage_bytes)
            .saturating_add(kept)
            .saturating_add(self.weight_bytes(range))
    }
}

/// A node that could hold a stage. Times are measured, never declared.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeFacts {
    /// Which.
    pub node: NodeId,
    /// Memory for this model: what is free, and what layers of this model take already.
    pub memory_bytes: u64,
    /// Time of one row in a layer of cost 1.
    pub decode_us_per_layer: f64,
    /// Time of each row of a chunk of a prompt in such a layer.
    pub prefill_us_per_layer: f64,
    /// Time of a step besides: the child process, the batch's set-up.
    pub step_us: f64,
    /// Layers it contributes at most.
    pub layers_max: Option<u32>,
    /// Layers that it holds loaded.
    pub loaded: Vec<LayerRange>,
    /// Layers that it holds for rings in use: it has these in a ring, or none.
    pub only: Option<LayerRange>,
    /// Layers that it has on disk.
    pub on_disk: Vec<LayerRange>,
}

impl NodeFacts {
    /// A node that decodes at `decode_us_per_layer`, prefills ten times as fast, and holds nothing yet.
    pub fn new(node: NodeId, memory_bytes: u64, decode_us_per_layer: f64) -> NodeFacts {
        NodeFacts {
            node,
            memory_bytes,
            decode_us_per_layer,
            prefill_us_per_layer: decode_us_per_layer / 10.0,
            step_us: 0.0,
            layers_max: None,
            loaded: Vec::new(),
            only: None,
            on_disk: Vec::new(),
        }
    }
}

/// One direction between two nodes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Link {
    /// From here to there; half the round trip where only that was measured.
    pub one_way_us: f64,
    /// Bandwidth. 0: nothing gets through, and no ring goes this way.
    pub bytes_per_s: f64,
}

impl Default for Link {
    /// A link that was never measured.
    fn default() -> Self {
        Link { one_way_us: ONE_WAY_US_UNKNOWN, bytes_per_s: BYTES_PER_S_UNKNOWN }
    }
}

/// The links, each direction on its own.
#[derive(Debug, Clone, Default)]
pub struct Links(BTreeMap<(NodeId, NodeId), Link>);

impl Links {
    /// Nothing is measured yet.
    pub fn new() -> Links {
        Links::default()
    }

    /// Notes the direction from `from` to `to`.
    pub fn set(&mut self, from: NodeId, to: NodeId, link: Link) {
        self.0.insert((from, to), link);
    }

    /// Notes both directions.
    pub fn set_both(&mut self, a: NodeId, b: NodeId, link: Link) {
        self.set(a, b, link);
        self.set(b, a, link);
    }

    /// The direction from `from` to `to`; [`Link::default`] where it was never measured.
    pub fn get(&self, from: NodeId, to: NodeId) -> Link {
        self.0.get(&(from, to)).copied().unwrap_or_default()
    }

    /// There and back.
    pub fn rtt_us(&self, a: NodeId, b: NodeId) -> f64 {
        self.get(a, b).one_way_us + self.get(b, a).one_way_us
    }
}

/// What the ring is to be best at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Objective {
    /// Least time per token of a stream that is alone.
    OneStream,
    /// Most tokens per second of all streams together.
    ManyStreams,
}

/// A node that must be in the ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pin {
    /// With any layers.
    Used(NodeId),
    /// With these layers and no others.
    Exactly(NodeId, LayerRange),
    /// With these layers and perhaps some beside them.
    AtLeast(NodeId, LayerRange),
}

impl Pin {
    /// Which node.
    pub fn node(&self) -> NodeId {
        match self {
            Pin::Used(node) | Pin::Exactly(node, _) | Pin::AtLeast(node, _) => *node,
        }
    }

    /// Which layers.
    pub fn layers(&self) -> Option<LayerRange> {
        match self {
            Pin::Used(_) => None,
            Pin::Exactly(_, layers) | Pin::AtLeast(_, layers) => Some(*layers),
        }
    }
}

/// A stage: who holds what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placement {
    /// The node.
    pub node: NodeId,
    /// Its layers.
    pub layers: LayerRange,
}

/// What is asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Ask {
    /// The node that owns the requests. It holds layers only if it is among the nodes.
    pub driver: NodeId,
    /// Tokens that each stream may have.
    pub context_tokens: u32,
    /// Streams at once; the KV cache holds all of them.
    pub streams: u32,
    /// Best at what.
    pub objective: Objective,
    /// Codecs that may be used beside [`Codec::F32`].
    pub lossy: Vec<Codec>,
    /// So many layers at either end stay on the driver, so that nobody else sees text; 0: any node may hold them.
    pub keep_ends: u32,
    /// Nodes that must be used.
    pub pins: Vec<Pin>,
    /// Nodes that must not be used.
    pub excluded: Vec<NodeId>,
    /// Longest round trip between neighbours in the ring, in microseconds.
    pub rtt_us_max: Option<f64>,
    /// Only layers that are loaded already, each where it is.
    pub loaded_only: bool,
    /// The ring as it is now: left as it is, or as far as it is still there, unless another is better by
    /// [`super::MOVE_GAIN_MIN`].
    pub previous: Vec<Placement>,
    /// Prompt for which the time of the first token is predicted.
    pub prompt_tokens: u32,
    /// Rows of a chunk of a prompt.
    pub chunk_rows: u32,
}

impl Ask {
    /// One stream, as fast as it can be, exact, without constraints.
    pub fn new(driver: NodeId, context_tokens: u32) -> Ask {
        Ask {
            driver,
            context_tokens,
            streams: 1,
            objective: Objective::OneStream,
            lossy: Vec::new(),
            keep_ends: 0,
            pins: Vec::new(),
            excluded: Vec::new(),
            rtt_us_max: None,
            loaded_only: false,
            previous: Vec::new(),
            prompt_tokens: 512,
            chunk_rows: CHUNK_ROWS_DEFAULT,
        }
    }

    /// Cells of KV cache in each layer.
    pub(super) fn cells(&self) -> u64 {
        u64::from(self.context_tokens) * u64::from(self.streams.max(1))
    }

    /// Streams over which the objective shares the time of a token.
    pub(super) fn streams_counted(&self) -> u32 {
        match self.objective {
            Objective::OneStream => 1,
            Objective::ManyStreams => self.streams.max(1),
        }
    }
}
