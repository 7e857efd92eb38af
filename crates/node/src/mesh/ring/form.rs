//! Forming rings: who offers what, what the planner makes of it, and whose turn it is.

use std::{
    sync::{Arc, Mutex, PoisonError, Weak},
    time::{Duration, Instant},
};

use murmur_core::planner::{Ask, Link, Links, ModelFacts, NoRing, NodeFacts, Pin, Placement, Plan, Planner};
use murmur_gguf::LayerRange;
use murmur_protocol::mesh::{ModelDigest, ModelState, NodeId, ServedStage};
use tokio::{runtime::Handle, time::MissedTickBehavior};

use super::{
    AVOIDED, Ring, Seat,
    host::{self, Terms},
};
use crate::{
    Node, fit,
    mesh::{MeshNode, announce, both},
    model::{Model, with_causes},
};

/// How often it is looked whether a ring can be had.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How long each node gives those with lower ids to make a ring.
const TURN: Duration = Duration::from_secs(10);
/// A model that nobody has measured is taken to be read from memory at this rate, bytes per second.
const BYTES_PER_S_UNMEASURED: f64 = 10e9;

/// What a node offers of a model.
#[derive(Debug, Clone)]
pub(super) struct Offer {
    pub(super) node: NodeId,
    pub(super) stage: ServedStage,
    /// Round trip, where there is a connection; to ourselves 0.
    pub(super) rtt_us: f64,
}

impl Offer {
    pub(super) fn range(&self) -> LayerRange {
        LayerRange::new(self.stage.first, self.stage.end)
    }

    /// What its layers are held for.
    pub(super) fn terms(&self) -> Terms {
        let ServedStage { context_tokens, parallel, exact, .. } = self.stage;
        Terms { range: self.range(), context_tokens, parallel, exact }
    }

    pub(super) fn is_ready(&self) -> bool {
        self.stage.state == ModelState::Ready && self.stage.first < self.stage.end
    }
}

/// What is offered of a model, by this node too.
pub(super) fn offers(node: &Node, mesh: &MeshNode, model: &ModelDigest) -> Vec<Offer> {
    let own = node
        .models
        .iter()
        .filter_map(|own| announce::offered(node, own))
        .map(|stage| (mesh.mesh().node_id(), stage, 0.0));
    let peers = mesh.mesh().peers();
    let theirs = peers.iter().flat_map(|peer| {
        let rtt_us = peer.rtt_ms.map_or(f64::MAX, |ms| 1000.0 * ms);
        peer.record().stages.iter().map(move |stage| (peer.record().node, stage.clone(), rtt_us))
    });
    own.chain(theirs)
        .filter(|(_, stage, _)| stage.digest == *model && stage.state != ModelState::Draining)
        .map(|(node, stage, rtt_us)| Offer { node, stage, rtt_us })
        .collect()
}

/// Those of them that compute as this node does, so that they fit together in a ring.
pub(super) fn matching_offers(node: &Node, mesh: &MeshNode, model: &ModelDigest, layers: u32) -> Vec<Offer> {
    let (exact, build) = (node.options().exact, murmur_engine::build_id());
    let mut offers = offers(node, mesh, model);
    offers.retain(|Offer { stage, .. }| {
        stage.exact == exact && stage.layers == layers && (!exact || stage.build == build)
    });
    offers
}

/// Makes rings for the models that need one, for as long as there is a node.
pub(crate) async fn run(node: Weak<Node>, mesh: Weak<MeshNode>) {
    let mut ticks = tokio::time::interval(LOOK_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some((node, mesh)) = both(&node, &mesh) else { return };
        for (at, model) in node.models.iter().enumerate().filter(|(_, model)| model.is_spread()) {
            let unused = model.holding().let_go(host::UNUSED_MAX);
            let ended = model.let_go_failed();
            if unused.is_some() || ended.is_some() {
                // Both wait for their processes.
                let _ = tokio::task::spawn_blocking(move || drop((unused, ended))).await;
            }
            if model.needs_ring() {
                let (node, mesh) = (Arc::clone(&node), Arc::clone(&mesh));
                // With many nodes there is much to compare.
                let _ = tokio::task::spawn_blocking(move || form(&node, &mesh, at)).await;
            }
        }
    }
}

/// Makes a ring if one can be had and it is this node's turn.
fn form(node: &Arc<Node>, mesh: &Arc<MeshNode>, at: usize) {
    let model = &node.models[at];
    let (Some(identity), Some(spread)) = (model.identity(), model.spread()) else { return };
    let exact = node.options().exact;
    let mut offers = matching_offers(node, mesh, &identity.digest, spread.facts.whole().end);
    offers.retain(|offer| !model.is_avoided(offer.node));
    let (streams, lossy) = (node.options().parallel, node.options().lossy.clone());
    let ask = Ask { streams, lossy, ..Ask::new(mesh.mesh().node_id(), spread.context_tokens) };
    let wanted = Wanted { offers: &offers, facts: &spread.facts, ask };
    let ring = match wanted.loaded(|_| true) {
        Some(ring) => Ok(ring),
        None if offers.iter().any(|offer| offer.stage.state == ModelState::Loading) => return,
        None => wanted.best(node.options().ctx_tokens.is_some()),
    };
    let (plan, terms) = match ring {
        Ok(ring) => ring,
        Err(reason) => return model.wait_for_ring(reason.to_string()),
    };
    let is_loaded = plan.load_us() == 0.0;
    let own = mesh.mesh().node_id();
    let before = offers.iter().filter(|offer| offer.node < own).count() as u32;
    if !is_loaded && model.ring_possible_since().elapsed() < TURN * before {
        return model.wait_for_ring("another node is making a ring".to_owned());
    }
    tracing::info!("{}: {plan}", model.id());
    let seat = |stage: &murmur_core::planner::StagePlan| Seat {
        range: stage.layers,
        planned: stage.node,
        taken: None,
        lost: None,
        is_unreachable: false,
    };
    let ring = Arc::new(Ring {
        node: Arc::downgrade(node),
        mesh: Arc::downgrade(mesh),
        runtime: Handle::current(),
        model: identity.digest,
        layers: spread.facts.whole().end,
        context_tokens: terms.context_tokens,
        parallel: terms.parallel,
        exact,
        seats: plan.stages.iter().map(seat).collect::<Vec<_>>().into(),
        refused: Mutex::default(),
    });
    let ranges: Vec<LayerRange> = plan.stages.iter().map(|stage| stage.layers).collect();
    // Edges from and to the driver carry tokens.
    let codecs = plan.edges.iter().filter_map(|edge| edge.codec).collect();
    let node = Arc::clone(node);
    // It ends with the model: Model::stop.
    let planned = model.plan_ring(ranges, terms.context_tokens, terms.parallel, ring.stages(), codecs);
    tokio::task::spawn_blocking(move || {
        let model = &node.models[at];
        let plan = match planned {
            Ok(Some(plan)) => Ok(plan),
            // The node ends.
            Ok(None) => return,
            Err(error) => Err(error),
        };
        match plan.and_then(|plan| model.load(plan, node.options(), &|_| ())) {
            Ok(()) => model.has_ring(ring),
            Err(error) => {
                tracing::warn!("{}: no ring: {}", model.id(), with_causes(&error));
                let refused = ring.refused.lock().unwrap_or_else(PoisonError::into_inner).clone();
                model.avoid(refused, Instant::now() + AVOIDED);
                model.wait_for_ring(with_causes(&error));
            }
        }
    });
}

/// How long requests may be, and how many run at once.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Size {
    pub(super) context_tokens: u32,
    pub(super) parallel: u32,
}

/// A ring that is wanted.
pub(super) struct Wanted<'a> {
    pub(super) offers: &'a [Offer],
    pub(super) facts: &'a ModelFacts,
    /// By this node. Its size is the first that is tried.
    pub(super) ask: Ask,
}

impl Wanted<'_> {
    fn ask(&self, size: Size) -> Ask {
        Ask { context_tokens: size.context_tokens, streams: size.parallel, ..self.ask.clone() }
    }

    /// A ring of layers that are loaded already, for requests of a size that will do.
    pub(super) fn loaded(&self, will_do: impl Fn(Size) -> bool) -> Option<(Plan, Size)> {
        let mut sizes: Vec<Size> = Vec::new();
        for offer in self.offers.iter().filter(|offer| offer.is_ready()) {
            let size = Size { context_tokens: offer.stage.context_tokens, parallel: offer.stage.parallel };
            if will_do(size) && !sizes.contains(&size) {
                sizes.push(size);
            }
        }
        sizes.into_iter().find_map(|size| {
            let of_this_size = |offer: &&Offer| {
                offer.is_ready()
                    && (offer.stage.context_tokens, offer.stage.parallel) == (size.context_tokens, size.parallel)
            };
            let nodes: Vec<NodeFacts> =
                self.offers.iter().filter(of_this_size).map(|offer| self.facts_of(offer)).collect();
            let ask = Ask { loaded_only: true, ..self.ask(size) };
            Some((self.plan(&nodes, &ask).ok()?, size))
        })
    }

    /// The best ring there can be. Layers that drivers use stay where they are. Without a wish of the user, the context is as
    /// long as memory allows.
    pub(super) fn best(&self, is_wish: bool) -> Result<(Plan, Size), NoRing> {
        let mut pins = self.ask.pins.clone();
        for held in self.offers.iter().filter(|offer| offer.is_ready()) {
            if pins.iter().all(|pin| pin.node() != held.node) && !self.ask.excluded.contains(&held.node) {
                pins.push(Pin::Exactly(held.node, held.range()));
            }
        }
        let nodes = self.nodes();
        let mut size = Size { context_tokens: self.ask.context_tokens, parallel: self.ask.streams };
        loop {
            let pinned = self.plan(&nodes, &Ask { pins: pins.clone(), ..self.ask(size) });
            match pinned.or_else(|_| self.plan(&nodes, &self.ask(size))) {
                Ok(plan) => return Ok((plan, size)),
                Err(reason) if is_wish || size.context_tokens / 2 < fit::CONTEXT_TOKENS_MIN => return Err(reason),
                Err(_) => size.context_tokens /= 2,
            }
        }
    }

    /// The best ring, wherever layers are loaded; the previous one, if there is one and no other is better by enough to move
    /// layers.
    pub(super) fn anywhere(&self, size: Size, previous: Vec<Placement>) -> Result<Plan, NoRing> {
        self.plan(&self.nodes(), &Ask { previous, ..self.ask(size) })
    }

    fn nodes(&self) -> Vec<NodeFacts> {
        self.offers.iter().map(|offer| self.facts_of(offer)).collect()
    }

    fn plan(&self, nodes: &[NodeFacts], ask: &Ask) -> Result<Plan, NoRing> {
        let mut links = Links::new();
        let own = self.ask.driver;
        for offer in self.offers.iter().filter(|offer| offer.rtt_us < f64::MAX) {
            let link = Link { one_way_us: offer.rtt_us / 2.0, ..Link::default() };
            links.set_both(own, offer.node, link);
        }
        Planner { model: self.facts, nodes, links: &links }.plan(ask)
    }

    fn facts_of(&self, offer: &Offer) -> NodeFacts {
        let stage = &offer.stage;
        let layers = self.facts.layers.len().max(1) as f64;
        let bytes = self.facts.layers.iter().map(|layer| layer.weight_bytes).sum::<u64>() as f64 / layers;
        let measured = |us: u32, otherwise: f64| if us > 0 { f64::from(us) } else { otherwise };
        let decode_us = measured(stage.decode_us_per_layer, 1e6 * bytes / BYTES_PER_S_UNMEASURED);
        let mut facts = NodeFacts::new(offer.node, stage.memory_bytes, decode_us);
        facts.prefill_us_per_layer = measured(stage.prefill_us_per_layer, facts.prefill_us_per_layer);
        facts.layers_max = (stage.layers_max > 0).then_some(stage.layers_max);
        facts.loaded = offer.is_ready().then(|| offer.range()).into_iter().collect();
        facts.on_disk = vec![self.facts.whole()];
        facts
    }
}

/// What a spread model is to the planner.
pub(crate) struct Spread {
    /// For the planner.
    pub(crate) facts: ModelFacts,
    /// Context that is wanted.
    pub(crate) context_tokens: u32,
    /// Why it is spread, for people.
    pub(crate) reason: String,
    /// Since when it is.
    pub(crate) since: Instant,
}

impl Spread {
    /// Memory that a stage takes.
    pub(crate) fn stage_bytes(&self, terms: Terms) -> u64 {
        // Whose stage it is does not matter.
        let ask = Ask { streams: terms.parallel, ..Ask::new(NodeId::from_bytes([0; 32]), terms.context_tokens) };
        self.facts.stage_memory_bytes(terms.range, &ask)
    }
}

impl Model {
    /// Time since a ring could have been made.
    fn ring_possible_since(&self) -> Instant {
        self.spread().map_or_else(Instant::now, |spread| spread.since)
    }
}
