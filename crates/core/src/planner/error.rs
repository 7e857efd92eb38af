//! When there is no ring: what is missing, and what would do. What would do is found by trying it.

use std::fmt;

use murmur_protocol::mesh::NodeId;

use super::{
    Planner,
    facts::{Ask, Link, Links, NodeFacts},
    plan::size,
};

/// Contexts that are offered instead are multiples of this.
pub const CONTEXT_STEP_TOKENS: u32 = 256;

/// Memory that would do is found to this fraction of the model.
const MEMORY_STEPS: u64 = 64;

/// Why there is no ring.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum NoRing {
    /// What is asked for contradicts itself or what is known.
    #[error("{0}")]
    BadAsk(String),
    /// It does not fit.
    #[error("{0}")]
    Short(Shortage),
}

/// What is asked for, what there is, and what would do.
#[derive(Debug, Clone, PartialEq)]
pub struct Shortage {
    /// Weights, KV of all streams at their full context, buffers of one stage.
    pub needed_bytes: u64,
    /// Memory of all nodes together.
    pub available_bytes: u64,
    /// Nodes that may be used.
    pub nodes: usize,
    /// Tokens of context of each stream.
    pub context_tokens: u32,
    /// Streams at once.
    pub streams: u32,
    /// Changes of which each alone would do.
    pub would_do: Vec<Remedy>,
}

/// A change with which there would be a ring.
#[derive(Debug, Clone, PartialEq)]
pub enum Remedy {
    /// Another node with so much memory.
    Memory {
        /// About so much.
        bytes: u64,
    },
    /// A shorter context.
    Context {
        /// The longest that fits.
        tokens: u32,
    },
    /// Fewer streams at once.
    Streams {
        /// The most that fit.
        streams: u32,
    },
    /// No limit on round trips.
    AnyRoundTrip,
    /// Ends anywhere.
    EndsAnywhere,
    /// No limits on the layers that nodes contribute.
    AnyNumberOfLayers,
    /// A node need not be used, or not with these layers.
    WithoutPin(NodeId),
    /// A node may be used after all.
    Including(NodeId),
    /// Layers that are not loaded yet.
    Loading,
    /// Links that carry something: the nodes cannot reach each other.
    Links,
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Shortage { nodes, context_tokens, streams, .. } = self;
        let (needed, available) = (size(self.needed_bytes), size(self.available_bytes));
        let at_once = if *streams == 1 { String::new() } else { format!(" for each of {streams} streams") };
        write!(f, "the layers need {needed} with a context of {context_tokens}{at_once}; ")?;
        match nodes {
            0 => f.write_str("no node may be used")?,
            1 => write!(f, "the one node has {available}")?,
            _ => write!(f, "the {nodes} nodes have {available}")?,
        }
        if self.needed_bytes <= self.available_bytes {
            f.write_str(", but no ring of them fits what was asked for")?;
        }
        match self.would_do.split_last() {
            None => f.write_str(". A smaller model or a smaller quantisation would do"),
            Some((last, [])) => write!(f, ": {last} would do"),
            Some((last, others)) => {
                let others: Vec<String> = others.iter().map(Remedy::to_string).collect();
                write!(f, ": {}, or {last} would do", others.join(", "))
            }
        }
    }
}

impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Remedy::Memory { bytes } => write!(f, "another node with {}", size(*bytes)),
            Remedy::Context { tokens } => write!(f, "a context of {tokens}"),
            Remedy::Streams { streams: 1 } => f.write_str("one stream at a time"),
            Remedy::Streams { streams } => write!(f, "{streams} streams at once"),
            Remedy::AnyRoundTrip => f.write_str("no limit on round trips"),
            Remedy::EndsAnywhere => f.write_str("first and last layers on any node"),
            Remedy::AnyNumberOfLayers => f.write_str("no limit on the layers of a node"),
            Remedy::WithoutPin(node) => write!(f, "no pin on {}", node.short()),
            Remedy::Including(node) => write!(f, "using {} as well", node.short()),
            Remedy::Loading => f.write_str("loading layers"),
            Remedy::Links => f.write_str("nodes that reach each other"),
        }
    }
}

impl Planner<'_> {
    /// What is missing for a ring.
    pub(super) fn shortage(&self, ask: &Ask) -> Shortage {
        let usable: Vec<&NodeFacts> = self.nodes_considered(ask);
        Shortage {
            needed_bytes: self.model.stage_memory_bytes(self.model.whole(), ask),
            available_bytes: usable.iter().map(|node| node.memory_bytes).fold(0, u64::saturating_add),
            nodes: usable.len(),
            context_tokens: ask.context_tokens,
            streams: ask.streams,
            would_do: self.remedies(ask),
        }
    }

    fn remedies(&self, ask: &Ask) -> Vec<Remedy> {
        let contexts = (ask.context_tokens.saturating_sub(1)) / CONTEXT_STEP_TOKENS;
        let context =
            most(contexts, |steps| self.has_ring(&Ask { context_tokens: steps * CONTEXT_STEP_TOKENS, ..ask.clone() }));
        let streams = most(ask.streams.saturating_sub(1), |streams| self.has_ring(&Ask { streams, ..ask.clone() }));
        let without_pin = |i: usize| {
            let mut ask = ask.clone();
            let pin = ask.pins.remove(i);
            self.has_ring(&ask).then(|| Remedy::WithoutPin(pin.node()))
        };
        let including = |node: &NodeId| {
            let excluded = ask.excluded.iter().copied().filter(|other| other != node).collect();
            self.has_ring(&Ask { excluded, ..ask.clone() }).then_some(Remedy::Including(*node))
        };
        let when = |set: bool, ask: Ask, remedy: Remedy| (set && self.has_ring(&ask)).then_some(remedy);
        self.more_memory(ask)
            .into_iter()
            .chain(context.map(|steps| Remedy::Context { tokens: steps * CONTEXT_STEP_TOKENS }))
            .chain(streams.map(|streams| Remedy::Streams { streams }))
            .chain(when(ask.rtt_us_max.is_some(), Ask { rtt_us_max: None, ..ask.clone() }, Remedy::AnyRoundTrip))
            .chain(when(ask.keep_ends > 0, Ask { keep_ends: 0, ..ask.clone() }, Remedy::EndsAnywhere))
            .chain(when(ask.loaded_only, Ask { loaded_only: false, ..ask.clone() }, Remedy::Loading))
            .chain(self.any_number_of_layers(ask))
            .chain(self.links_that_carry(ask))
            .chain((0..ask.pins.len()).filter_map(without_pin))
            .chain(ask.excluded.iter().filter_map(including))
            .collect()
    }

    fn has_ring(&self, ask: &Ask) -> bool {
        self.any_ring(ask).is_some()
    }

    /// The least memory of another node with which there would be a ring.
    fn more_memory(&self, ask: &Ask) -> Option<Remedy> {
        let whole = self.model.stage_memory_bytes(self.model.whole(), ask);
        let newcomer = NodeId::from_bytes([0xff; 32]);
        let mut links = self.links.clone();
        for node in self.nodes.iter().map(|node| node.node).chain([ask.driver]) {
            links.set_both(node, newcomer, Link { one_way_us: 0.0, bytes_per_s: f64::INFINITY });
        }
        let fits = |steps: u32| {
            let bytes = (whole / MEMORY_STEPS + 1) * u64::from(steps);
            let mut nodes = self.nodes.to_vec();
            nodes.push(NodeFacts::new(newcomer, bytes, 0.0));
            Planner { nodes: &nodes, links: &links, ..*self }.has_ring(ask).then_some(bytes)
        };
        let bytes = (1..=MEMORY_STEPS as u32).collect::<Vec<_>>();
        let least = bytes.partition_point(|steps| fits(*steps).is_none());
        bytes.get(least).and_then(|steps| fits(*steps)).map(|bytes| Remedy::Memory { bytes })
    }

    fn any_number_of_layers(&self, ask: &Ask) -> Option<Remedy> {
        let limited = self.nodes.iter().any(|node| node.layers_max.is_some());
        let free = |node: &NodeFacts| NodeFacts { layers_max: None, ..node.clone() };
        let nodes: Vec<NodeFacts> = self.nodes.iter().map(free).collect();
        (limited && Planner { nodes: &nodes, ..*self }.has_ring(ask)).then_some(Remedy::AnyNumberOfLayers)
    }

    fn links_that_carry(&self, ask: &Ask) -> Option<Remedy> {
        let ask = Ask { rtt_us_max: None, ..ask.clone() };
        let links = Links::new();
        (!self.has_ring(&ask) && Planner { links: &links, ..*self }.has_ring(&ask)).then_some(Remedy::Links)
    }
}

/// The most up to `most` for which `fits` holds, if it holds for less whenever it holds for more.
fn most(most: u32, fits: impl Fn(u32) -> bool) -> Option<u32> {
    let (mut fit, mut too_much) = (0, most + 1);
    while too_much - fit > 1 {
        let middle = fit + (too_much - fit) / 2;
        if fits(middle) { fit = middle } else { too_much = middle }
    }
    (fit > 0).then_some(fit)
}
