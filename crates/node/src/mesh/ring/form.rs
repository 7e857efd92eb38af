//! Forming rings: what the planner makes of what is offered, and whose turn it is.
//!
//! A model without a ring gets one as soon as there can be one. A model that has one gets a better one when there can be one, which
//! is opened beside it: requests that run end where they are, further ones go around the new one, and what nobody uses any more
//! is let go. So that nothing needs memory twice, layers that drivers use stay where they are: newcomers take over whole ranges.
//!
//! Drivers share a ring as long as it has room for the requests of all. One whose requests find none there, because others' have it,
//! goes around the machines that are not in it, if these can hold the model as well: a second ring, and so on. When it has had no request
//! for a while it goes back, and the second ring's machines let go of what nobody uses.

use std::{
    sync::{Arc, Mutex, OnceLock, PoisonError, Weak},
    time::{Duration, Instant},
};

use murmur_core::planner::{
    Ask, Link, Links, ModelFacts, NODES_MAX, NoRing, NodeFacts, Pin, Placement, Plan, Planner, StagePlan,
};
use murmur_gguf::LayerRange;
use murmur_protocol::mesh::{ModelState, NodeId};
use tokio::{runtime::Handle, time::MissedTickBehavior};

use super::{
    Ring, Seat,
    borrow::Borrower,
    facts,
    host::{self, Terms},
    offers::{Offer, Sight, Size},
    wishes::Ids,
};
use crate::{
    Node, fit,
    mesh::{MeshNode, both},
    model::{LoadedModel, Model, RingOptions, with_causes},
};

/// How often it is looked whether a ring, or a better one, can be had.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How long each node gives those with lower ids to make a ring.
const TURN: Duration = Duration::from_secs(10);
/// A first ring is made when the same nodes have offered layers for so long. Those that start together hear of each other one by one,
/// and of what the others have begun a moment after they did: who goes ahead at once takes itself for the first.
const HEARD_OF: Duration = Duration::from_millis(1500);
/// A better ring must have been to be had for so long: of a node that has just come little is known.
const SETTLED: Duration = Duration::from_secs(10);
/// Turns are shorter when a node is about to leave a ring, or a ring is crowded.
const TURN_WHEN_PRESSED: Duration = Duration::from_secs(1);
/// Requests must have found no room for so long: mostly some soon does.
const CROWDED: Duration = Duration::from_secs(5);
/// A ring beside a crowded one is used for so long at least, be the other one better.
const BESIDE_MIN: Duration = Duration::from_secs(120);
/// A driver that has had no request for so long goes back to the ring of others, if it has one of its own.
const IDLE_MAX: Duration = Duration::from_secs(300);
/// A ring is about as good as another one if a token takes it this factor of time at most.
const AS_GOOD: f64 = 1.1;

/// Makes rings for the models that need one, and better ones, for as long as there is a node.
pub(crate) async fn run(node: Weak<Node>, mesh: Weak<MeshNode>) {
    let mut ticks = tokio::time::interval(LOOK_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some((node, mesh)) = both(&node, &mesh) else { return };
        if node.gate.is_closed() {
            return;
        }
        // What is let go waits for its processes, and with many nodes there is much to compare.
        let _ = tokio::task::spawn_blocking(move || look_at_all(&node, &mesh)).await;
    }
}

/// Looks at each model that is spread over the mesh.
fn look_at_all(node: &Arc<Node>, mesh: &Arc<MeshNode>) {
    let spread: Vec<usize> = (0..node.models.len()).filter(|&at| node.models[at].is_spread()).collect();
    if spread.is_empty() {
        return;
    }
    for model in spread.iter().map(|&at| &node.models[at]) {
        drop((model.holding().let_go(host::UNUSED_MAX), model.let_go_failed(), model.let_go_left()));
    }
    let sight = Sight::of(node, mesh);
    spread.into_iter().for_each(|at| look(node, mesh, at, &sight));
}

/// Makes a ring if there is none, or a better one, if one can be had and it is this node's turn.
fn look(node: &Arc<Node>, mesh: &Arc<MeshNode>, at: usize, sight: &Sight<'_>) {
    let model = &node.models[at];
    let (Some(identity), Some(spread)) = (model.identity(), model.spread()) else { return };
    let in_use = match model.needs_ring() {
        true => None,
        // One that is not whole mends itself.
        false => match in_use(model, mesh.mesh().node_id()) {
            Some(ring) => Some(ring),
            None => return,
        },
    };
    let (mut offers, leaving) = sight.matching_offers(model, &identity.digest);
    let is_waiting = in_use.is_some() && model.is_crowded();
    let is_idle = in_use.is_some() && !model.is_working();
    let (options, own) = (node.options(), mesh.mesh().node_id());
    let (before, first_from, is_crowded, is_unused) = {
        let mut search = model.search();
        offers.retain(|offer| !search.is_avoided(offer.node));
        let before = offers.iter().filter(|offer| offer.node < own).count() as u32;
        let first_from = (spread.since + TURN * before).max(search.same_nodes_since(&offers) + HEARD_OF);
        let since = search.crowded_since(is_waiting);
        let is_crowded = since.is_some_and(|since| since.elapsed() >= CROWDED + TURN_WHEN_PRESSED * before);
        let is_unused = search.idle_since(is_idle).is_some_and(|since| since.elapsed() >= IDLE_MAX);
        let is_due = search.is_due(&offers, in_use.as_ref().map(|(_, placements)| placements));
        if !is_due && !is_crowded && !is_unused {
            return;
        }
        (before, first_from, is_crowded, is_unused)
    };
    let ids = Ids::of(node, sight.peers(), own);
    let size = Size { context_tokens: spread.context_tokens, parallel: options.parallel };
    let ask = match ids.ask(&options.ring, size) {
        Ok(ask) => Ask { lossy: options.lossy.clone(), ..ask },
        Err(_) if in_use.is_some() => return,
        Err(reason) => return model.wait_for_ring(reason),
    };
    let wanted = Wanted { offers: &offers, facts: &spread.facts, ask };
    let found = match &in_use {
        None => first(&wanted, model, options.ctx_tokens.is_some(), (first_from, before)),
        Some((size, placements)) if is_crowded => beside(&wanted, model, (*size, placements)),
        Some((size, placements)) if is_unused => back(&wanted, model, (*size, placements)),
        Some((size, placements)) => {
            // What this one pauses for is others.
            let is_used = |node: &NodeId| *node != own && placements.iter().any(|stage| stage.node == *node);
            let lost: Vec<NodeId> = leaving.into_iter().filter(is_used).collect();
            better(&wanted, model, (*size, placements), &lost, before)
        }
    };
    if let Some((plan, size)) = found {
        open(node, mesh, at, &plan, size);
    }
}

/// The ring that a model's requests go around, when all of it is there.
fn in_use(model: &Model, own: NodeId) -> Option<(Size, Vec<Placement>)> {
    let loaded: Arc<LoadedModel> = model.in_use()?;
    let holders = model.ring().1?.view();
    let options = loaded.engine.options();
    let size = Size { context_tokens: options.context_tokens, parallel: options.parallel };
    let placement = |layers: &LayerRange| {
        // Those that are in no seat are this node's own.
        let node = holders.iter().find(|(range, _)| range == layers).map_or(Some(own), |(_, node)| *node)?;
        Some(Placement { node, layers: *layers })
    };
    Some((size, options.ranges.iter().map(placement).collect::<Option<_>>()?))
}

/// A ring for a model that has none. Layers have to be loaded for it only `from` then on; so many others may do so `before`.
fn first(wanted: &Wanted<'_>, model: &Model, is_limited: bool, (from, before): (Instant, u32)) -> Option<(Plan, Size)> {
    let found = match wanted.loaded(|_| true) {
        Some(ring) => return Some(ring),
        None if wanted.is_one_loading() => return None,
        None => wanted.measured(|wanted| wanted.best(is_limited)),
    };
    match found {
        Ok(ring) if model.search().is_time(from) => return Some(ring),
        Ok(_) if before == 0 => model.wait_for_ring("it is being heard which nodes have room".to_owned()),
        Ok(_) => model.wait_for_ring("another node is making a ring".to_owned()),
        Err(reason) => model.wait_for_ring(reason.to_string()),
    }
    None
}

/// A better ring than the one in use, when it has been better for long enough. One that nodes are about to leave (`lost`) is
/// replaced at once. Layers that are loaded wait for nobody's turn.
fn better(
    wanted: &Wanted<'_>,
    model: &Model,
    (size, now): (Size, &[Placement]),
    lost: &[NodeId],
    before: u32,
) -> Option<(Plan, Size)> {
    let is_known = |node: NodeId| lost.contains(&node) || wanted.offers.iter().any(|offer| offer.node == node);
    if wanted.is_one_loading() || !now.iter().all(|stage| is_known(stage.node)) {
        return None;
    }
    let (plan, settled, turn) = match lost {
        [] if !model.search().may_improve() => return None,
        [] => (wanted.better(size, now), SETTLED, TURN),
        _ => (wanted.without(size, now, lost), Duration::ZERO, TURN_WHEN_PRESSED),
    };
    let mut search = model.search();
    let since = search.better_since(plan.is_some())?;
    let plan = plan?;
    let turns = if plan.load_us() > 0.0 { turn * before } else { Duration::ZERO };
    let from = (since + settled + turns).max(search.moves_from);
    search.is_time(from).then(|| {
        search.better_since(false);
        (plan, size)
    })
}

/// A ring of the nodes that have no part of the crowded one in use.
fn beside(wanted: &Wanted<'_>, model: &Model, (size, now): (Size, &[Placement])) -> Option<(Plan, Size)> {
    let plan = if wanted.is_one_loading() { None } else { wanted.beside(size, now) };
    let mut search = model.search();
    // If there is none, it is looked for again when it has been crowded for as long again.
    search.crowded_since(false);
    let plan = plan?;
    search.stays_for(BESIDE_MIN);
    Some((plan, size))
}

/// The ring that others use, when this node has not used its own for long: the machines of one of the two are free then.
fn back(wanted: &Wanted<'_>, model: &Model, (size, now): (Size, &[Placement])) -> Option<(Plan, Size)> {
    // Where there is none, it is looked for again when this one was not used for as long again.
    model.search().idle_since(false);
    Some((wanted.back(size, now)?, size))
}

/// Opens a ring, beside the one in use if there is one.
fn open(node: &Arc<Node>, mesh: &Arc<MeshNode>, at: usize, plan: &Plan, size: Size) {
    let model = &node.models[at];
    let Some(identity) = model.identity() else { return };
    tracing::info!("{}: {plan}", model.id());
    let own = mesh.mesh().node_id();
    // Ends that are kept are the engine's own; they are nobody else's business.
    let is_here = |stage: &StagePlan| node.options().ring.keep_ends.is_some_and(|ends| ends > 0) && stage.node == own;
    let seats = plan.stages.iter().filter(|stage| !is_here(stage)).map(|stage| Seat::new(stage.layers, stage.node));
    let ring = Arc::new(Ring {
        node: Arc::downgrade(node),
        mesh: Arc::downgrade(mesh),
        runtime: Handle::current(),
        model: identity.digest,
        whole: Terms {
            range: LayerRange::new(0, model.layers()),
            context_tokens: size.context_tokens,
            parallel: size.parallel,
            exact: node.options().exact,
        },
        seats: seats.collect::<Vec<_>>().into(),
        refused: Mutex::default(),
        borrower: OnceLock::new(),
    });
    let mut elsewhere = ring.stages().into_iter();
    let stage = |stage: &StagePlan| (stage.layers, if is_here(stage) { None } else { elsewhere.next() });
    let options = RingOptions {
        context_tokens: size.context_tokens,
        parallel: size.parallel,
        stages: plan.stages.iter().map(stage).collect(),
        // Edges from and to the driver carry tokens.
        codecs: plan.edges.iter().filter_map(|edge| edge.codec).collect(),
        travel_us: plan.edges.iter().map(|edge| edge.latency_us).sum::<f64>() as u64,
        guessing_elsewhere: Borrower::of(node, &ring, at)
            .map(|borrower| ring.borrower.get_or_init(|| borrower).draft()),
    };
    let node = Arc::clone(node);
    // It ends with the model: Model::stop.
    let planned = node.models.plan_ring(at, options);
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
                let reason = with_causes(&error);
                let refused = ring.refused.lock().unwrap_or_else(PoisonError::into_inner).clone();
                model.search().failed(refused);
                match model.needs_ring() {
                    true => {
                        tracing::warn!("{}: no ring: {reason}", model.id());
                        model.wait_for_ring(reason);
                    }
                    false => tracing::warn!("{}: no better ring, the present one stays: {reason}", model.id()),
                }
            }
        }
    });
}

/// A ring that is wanted.
pub(super) struct Wanted<'a> {
    pub(super) offers: &'a [Offer],
    pub(super) facts: &'a ModelFacts,
    /// By this node. Its size is the first that is tried.
    pub(super) ask: Ask,
}

impl Wanted<'_> {
    /// What is found among the nodes that are measured.
    fn measured<T>(&self, find: impl FnOnce(&Wanted<'_>) -> T) -> T {
        let offers = facts::measured(self.ask.driver, self.offers);
        find(&Wanted { offers: &offers, facts: self.facts, ask: self.ask.clone() })
    }

    fn is_one_loading(&self) -> bool {
        self.offers.iter().any(|offer| offer.stage.state == ModelState::Loading)
    }

    fn ask(&self, size: Size) -> Ask {
        Ask { context_tokens: size.context_tokens, streams: size.parallel, ..self.ask.clone() }
    }

    /// A ring of layers that are loaded already, for requests of a size that will do.
    pub(super) fn loaded(&self, will_do: impl Fn(Size) -> bool) -> Option<(Plan, Size)> {
        let mut sizes: Vec<Size> = Vec::new();
        for size in self.offers.iter().filter(|offer| offer.is_loaded()).map(Offer::size) {
            if will_do(size) && !sizes.contains(&size) {
                sizes.push(size);
            }
        }
        sizes.into_iter().find_map(|size| {
            let ask = Ask { loaded_only: true, ..self.ask(size) };
            Some((self.plan(&self.held(size), &ask).ok()?, size))
        })
    }

    /// The best ring there can be. Layers that drivers use stay where they are, if that is possible. Without a wish of the user,
    /// the context is as long as memory allows.
    pub(super) fn best(&self, is_wish: bool) -> Result<(Plan, Size), NoRing> {
        let mut size = Size { context_tokens: self.ask.context_tokens, parallel: self.ask.streams };
        loop {
            let (settled, ask) = (self.settled(size), self.ask(size));
            let held = settled.iter().filter_map(|held| Some(Pin::Exactly(held.node, held.only?)));
            let is_free =
                |pin: &Pin| !ask.excluded.contains(&pin.node()) && ask.pins.iter().all(|it| it.node() != pin.node());
            let pins = ask.pins.iter().copied().chain(held.filter(is_free)).collect();
            let found = self
                .plan(&settled, &Ask { pins, ..ask.clone() })
                .or_else(|_| self.plan(&settled, &ask))
                .or_else(|_| self.plan(&self.nodes(), &ask));
            match found {
                Ok(plan) => return Ok((plan, size)),
                Err(reason) if is_wish || size.context_tokens / 2 < fit::CONTEXT_TOKENS_MIN => return Err(reason),
                Err(_) => size.context_tokens /= 2,
            }
        }
    }

    /// A ring that is better than the one in use by enough to change to it: of loaded layers, if there is one.
    pub(super) fn better(&self, size: Size, now: &[Placement]) -> Option<Plan> {
        let better = |nodes: Vec<NodeFacts>, loaded_only| {
            self.for_all(size, now, nodes, |planner, ask| planner.improve(&Ask { loaded_only, ..ask }))
        };
        better(self.held(size), true).or_else(|| better(self.settled(size), false))
    }

    /// The ring in use without these nodes.
    fn without(&self, size: Size, now: &[Placement], lost: &[NodeId]) -> Option<Plan> {
        self.for_all(size, now, self.settled(size), |planner, ask| planner.mend(&ask, lost).ok())
    }

    /// The best ring without the nodes of the one in use. Ends that are kept here are kept in both.
    pub(super) fn beside(&self, size: Size, now: &[Placement]) -> Option<Plan> {
        let mut nodes = self.settled(size);
        let is_given = |node: NodeId| self.ask.keep_ends > 0 && node == self.ask.driver;
        nodes.retain(|other| is_given(other.node) || now.iter().all(|stage| stage.node != other.node));
        self.plan(&nodes, &self.ask(size)).ok()
    }

    /// A ring of loaded layers that other drivers use, without the nodes of the one in use and about as good, which all drivers would
    /// rather keep of the two: the one with the lowest id in it. So they meet, and do not change places.
    pub(super) fn back(&self, size: Size, now: &[Placement]) -> Option<Plan> {
        let is_given = |node: NodeId| self.ask.keep_ends > 0 && node == self.ask.driver;
        let is_here = |node: NodeId| now.iter().any(|stage| stage.node == node);
        let is_used = |node: NodeId| self.offers.iter().any(|offer| offer.node == node && offer.is_used());
        let mut others = self.held(size);
        others.retain(|other| is_given(other.node) || is_used(other.node) && !is_here(other.node));
        let lowest = |nodes: &mut dyn Iterator<Item = NodeId>| nodes.filter(|node| !is_given(*node)).min();
        let lowest_here = lowest(&mut now.iter().map(|stage| stage.node));
        if lowest(&mut others.iter().map(|other| other.node)).is_none_or(|other| Some(other) > lowest_here) {
            return None;
        }
        let ask = Ask { loaded_only: true, ..self.ask(size) };
        let plan = self.plan(&others, &ask).ok()?;
        let pins = now.iter().filter(|stage| !is_given(stage.node));
        let pins = pins.map(|stage| Pin::Exactly(stage.node, stage.layers)).collect();
        let here = self.plan(&self.held(size), &Ask { pins, ..ask }).ok()?;
        let is_kept = lowest(&mut plan.stages.iter().map(|stage| stage.node)) < lowest_here;
        (is_kept && plan.token_us <= AS_GOOD * here.token_us).then_some(plan)
    }

    /// A ring that is found not for this driver but for all together, as it is for this one: a change is for all of them to follow.
    /// Who has wishes of its own goes its own way.
    fn for_all(
        &self,
        size: Size,
        now: &[Placement],
        nodes: Vec<NodeFacts>,
        find: impl FnOnce(&Planner<'_>, Ask) -> Option<Plan>,
    ) -> Option<Plan> {
        let mut ask = Ask { previous: now.to_vec(), ..self.ask(size) };
        let mut links = self.links();
        if ask.keep_ends == 0 && ask.rtt_us_max.is_none() {
            ask.driver = NodeId::from_bytes([0; 32]);
            let mut drivers: Vec<NodeId> = self.offers.iter().map(|offer| offer.node).collect();
            drivers.sort_unstable();
            drivers.truncate(NODES_MAX);
            for Offer { node, .. } in self.offers {
                let mean = |one_way_us: &dyn Fn(NodeId) -> f64| {
                    let ways = drivers.iter().filter(|driver| *driver != node).map(|driver| one_way_us(*driver));
                    Link { one_way_us: ways.sum::<f64>() / drivers.len() as f64, ..Link::default() }
                };
                let there = mean(&|driver| links.get(driver, *node).one_way_us);
                let back = mean(&|driver| links.get(*node, driver).one_way_us);
                links.set(ask.driver, *node, there);
                links.set(*node, ask.driver, back);
            }
        }
        let found = find(&Planner { model: self.facts, nodes: &nodes, links: &links }, ask)?;
        // Kept ends are given.
        let is_free = |stage: &&StagePlan| self.ask.keep_ends == 0 || stage.node != self.ask.driver;
        let pins = found.stages.iter().filter(is_free).map(|stage| Pin::Exactly(stage.node, stage.layers)).collect();
        self.plan(&nodes, &Ask { pins, ..self.ask(size) }).ok()
    }

    /// The best ring, wherever layers are loaded; the previous one, if there is one and no other is better by enough to move
    /// layers.
    pub(super) fn anywhere(&self, size: Size, previous: Vec<Placement>) -> Result<Plan, NoRing> {
        self.plan(&self.nodes(), &Ask { previous, ..self.ask(size) })
    }

    fn nodes(&self) -> Vec<NodeFacts> {
        self.offers.iter().map(|offer| self.facts_of(offer)).collect()
    }

    /// The nodes of a ring of this size, when layers that drivers use stay where they are. Others that are loaded for rings of another
    /// size are as good as not loaded. What this node holds for others is no hindrance for ends that are kept here, but takes memory.
    fn settled(&self, size: Size) -> Vec<NodeFacts> {
        let with_only = |offer: &Offer| {
            let facts = self.facts_of(offer);
            if self.ask.keep_ends > 0 && offer.node == self.ask.driver {
                let held_bytes = self.held_bytes(offer);
                let memory_bytes = facts.memory_bytes.saturating_sub(held_bytes);
                return NodeFacts { memory_bytes, loaded: vec![self.facts.whole()], ..facts };
            }
            let loaded = if offer.size() == size { facts.loaded } else { Vec::new() };
            NodeFacts { only: offer.is_used().then(|| offer.range()), loaded, ..facts }
        };
        self.offers.iter().filter(|offer| !offer.is_used() || offer.size() == size).map(with_only).collect()
    }

    /// Those of them that hold layers.
    fn held(&self, size: Size) -> Vec<NodeFacts> {
        self.settled(size).into_iter().filter(|node| !node.loaded.is_empty()).collect()
    }

    fn plan(&self, nodes: &[NodeFacts], ask: &Ask) -> Result<Plan, NoRing> {
        Planner { model: self.facts, nodes, links: &self.links() }.plan(ask)
    }

    fn links(&self) -> Links {
        facts::links(self.ask.driver, self.offers)
    }

    /// Memory of the layers that a node holds.
    fn held_bytes(&self, offer: &Offer) -> u64 {
        if offer.is_loaded() { self.facts.stage_memory_bytes(offer.range(), &self.ask(offer.size())) } else { 0 }
    }

    fn facts_of(&self, offer: &Offer) -> NodeFacts {
        let stage = &offer.stage;
        let layers = self.facts.layers.len().max(1) as f64;
        let bytes = self.facts.layers.iter().map(|layer| layer.weight_bytes).sum::<u64>() as f64 / layers;
        let estimated = facts::estimated(offer.ways.machine);
        let measured = |us: u32, otherwise: f64| if us > 0 { f64::from(us) } else { otherwise };
        let decode_us = measured(stage.decode_us_per_layer, bytes * estimated.decode_us_per_byte);
        // What is loaded fits, however coarsely memory is told.
        let mut facts = NodeFacts::new(offer.node, stage.memory_bytes.max(self.held_bytes(offer)), decode_us);
        let prefill_us = decode_us * estimated.prefill_us_per_byte / estimated.decode_us_per_byte;
        facts.prefill_us_per_layer = measured(stage.prefill_us_per_layer, prefill_us);
        facts.layers_max = (stage.layers_max > 0).then_some(stage.layers_max);
        facts.loaded = offer.is_loaded().then(|| offer.range()).into_iter().collect();
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

#[cfg(test)]
mod tests {
    use murmur_protocol::mesh::{MeasuredLink, ModelDigest, ServedStage};

    use super::{
        super::facts::{Ways, tests::model},
        *,
    };
    use crate::mesh::ring::Search;

    const LAYERS: u32 = 12;
    const SIZE: Size = Size { context_tokens: 512, parallel: 1 };
    /// Between any two nodes.
    const RTT_US: u32 = 2_000;

    fn id(number: u8) -> NodeId {
        NodeId::from_bytes([number; 32])
    }

    /// A node that holds layers in use, or could hold so many, at so many us each. Numbers begin at 1.
    #[derive(Clone, Copy)]
    struct Peer(Option<(u32, u32)>, u32, u32);

    /// What the driver of this number knows of them.
    fn seen_by(driver: u8, peers: &[Peer]) -> Vec<Offer> {
        let numbers = 1..=peers.len() as u8;
        let told: Vec<_> = numbers.clone().map(|other| MeasuredLink::to(&id(other), RTT_US, 0)).collect();
        let offer = |(number, &Peer(held, layers_max, us)): (u8, &Peer)| {
            let (first, end) = held.unwrap_or_default();
            let stage = ServedStage {
                digest: ModelDigest::from_bytes([0; 32]),
                name: "model".to_owned(),
                layers: LAYERS,
                first,
                end,
                state: if held.is_some() { ModelState::Ready } else { ModelState::Available },
                context_tokens: SIZE.context_tokens,
                parallel: SIZE.parallel,
                exact: false,
                build: String::new(),
                memory_bytes: 1 << 30,
                decode_us_per_layer: us,
                prefill_us_per_layer: us,
                layers_max,
            };
            let rtt_us = if number == driver { 0.0 } else { f64::from(RTT_US) };
            Offer { node: id(number), stage, rtt_us, ways: Ways { told: told.clone(), ..Ways::default() } }
        };
        numbers.zip(peers).map(offer).collect()
    }

    /// The ring that it finds better than the one of the layers in use by `now`.
    fn better(driver: u8, peers: &[Peer], now: &[u8]) -> Option<Vec<Placement>> {
        let facts = model();
        let offers = seen_by(driver, peers);
        let now: Vec<_> = now.iter().map(|&number| &offers[usize::from(number) - 1]).collect();
        let now: Vec<_> = now.iter().map(|offer| Placement { node: offer.node, layers: offer.range() }).collect();
        let ask = Ask::new(id(driver), SIZE.context_tokens);
        let plan = Wanted { offers: &offers, facts: &facts, ask }.better(SIZE, &now)?;
        Some(plan.placements())
    }

    const RING: [Peer; 3] = [Peer(Some((0, 4)), 4, 100), Peer(Some((4, 8)), 4, 100), Peer(Some((8, 12)), 4, 100)];

    #[test]
    fn all_drivers_find_the_same_ring_better_and_none_when_it_is_theirs() {
        let peers = [RING[0], RING[1], RING[2], Peer(None, 8, 100)];
        let found = [1, 2, 3, 4].map(|driver| better(driver, &peers, &[1, 2, 3]));
        let ring = found[0].clone().unwrap();
        assert!(ring.len() == 2 && ring.iter().any(|stage| stage.node == id(4) && stage.layers.len() == 8), "{ring:?}");
        assert!(found.iter().all(|other| other.as_ref() == Some(&ring)), "{found:?}");
        // The first of them has moved: the others find the same loaded, and nobody wants to go back.
        let (held, now) = if ring[0].node == id(4) { ((0, 8), [4, 3]) } else { ((4, 12), [1, 4]) };
        let peers = [RING[0], RING[1], RING[2], Peer(Some(held), 8, 100)];
        for driver in 1..=4 {
            assert_eq!(better(driver, &peers, &[1, 2, 3]), Some(ring.clone()));
            assert_eq!(better(driver, &peers, &now), None);
        }
    }

    #[test]
    fn speeds_that_drift_by_a_tenth_move_no_driver_there_or_back() {
        let held = [(0, 4), (4, 8), (8, 12), (4, 8)];
        for drift in 0..81u32 {
            let us = |number: u32| [90, 100, 110][(drift / 3u32.pow(number) % 3) as usize];
            let loaded: Vec<_> = (0..4).map(|number| Peer(Some(held[number]), 4, us(number as u32))).collect();
            let free = [loaded[0], loaded[1], loaded[2], Peer(None, 4, us(3))];
            for driver in [1, 2] {
                assert_eq!(better(driver, &free, &[1, 2, 3]), None);
                assert_eq!(better(driver, &loaded, &[1, 2, 3]), None);
                assert_eq!(better(driver, &loaded, &[1, 4, 3]), None);
            }
        }
    }

    #[test]
    fn nothing_is_planned_again_before_something_has_changed() {
        let (mut search, mut offers) = (Search::new(), seen_by(1, &RING));
        let due = [search.is_due(&offers, None), search.is_due(&offers, None)];
        assert_eq!(due, [true, false]);
        offers[1].rtt_us *= 1.2;
        assert!(!search.is_due(&offers, None), "a round trip is never the same");
        offers[1].rtt_us *= 2.0;
        assert!(search.is_due(&offers, None));
        offers[1].stage.state = ModelState::Draining;
        assert!(search.is_due(&offers, None));
        let ring = vec![Placement { node: id(1), layers: LayerRange::new(0, LAYERS) }];
        let due = [search.is_due(&offers, Some(&ring)), search.is_due(&offers, Some(&ring))];
        assert_eq!(due, [true, false]);
        search.failed(vec![id(2)]);
        assert!(search.is_due(&offers, Some(&ring)) && search.is_avoided(id(2)) && !search.is_avoided(id(1)));
    }

    #[test]
    fn a_node_that_has_just_been_heard_of_is_waited_for_before_a_first_ring() {
        let mut search = Search::new();
        let two = search.same_nodes_since(&seen_by(1, &RING[..2]));
        assert_eq!(search.same_nodes_since(&seen_by(1, &[RING[0], Peer(None, 4, 0)])), two);
        let three = search.same_nodes_since(&seen_by(1, &RING));
        assert!(three > two);
        assert!(search.same_nodes_since(&seen_by(1, &RING[..2])) > three, "one that is gone may be making a ring");
    }

    #[test]
    fn what_was_measured_of_a_node_counts_when_it_has_let_go_of_its_layers() {
        let mut search = Search::new();
        search.recall(&mut seen_by(1, &[RING[0], Peer(Some((4, 8)), 4, 700)]));
        let mut offers = seen_by(1, &[RING[0], Peer(None, 4, 0)]);
        search.recall(&mut offers);
        assert_eq!(offers[1].stage.decode_us_per_layer, 700);
        // One that was away is as unknown as one that was never there.
        search.recall(&mut seen_by(1, &RING[..1]));
        let mut offers = seen_by(1, &[RING[0], Peer(None, 4, 0)]);
        search.recall(&mut offers);
        assert_eq!(offers[1].stage.decode_us_per_layer, 100);
    }

    #[test]
    fn layers_that_nobody_uses_are_used_where_they_are_and_given_up_where_they_are_in_the_way() {
        let facts = model();
        let ring_of = |offers: &[Offer], find: fn(&Wanted<'_>) -> Option<(Plan, Size)>| {
            let ask = Ask { streams: SIZE.parallel, ..Ask::new(id(1), SIZE.context_tokens) };
            let found = find(&Wanted { offers, facts: &facts, ask })?.0;
            Some(found.stages.iter().map(|stage| (stage.node, stage.layers)).collect::<Vec<_>>())
        };
        let of_loaded = |wanted: &Wanted<'_>| wanted.loaded(|_| true);
        let ring = [1, 2, 3].map(|number| (id(number), RING[usize::from(number) - 1].0.unwrap()));
        let ring = ring.map(|(node, (first, end))| (node, LayerRange::new(first, end))).to_vec();

        let mut offers = seen_by(1, &RING);
        offers.iter_mut().for_each(|offer| offer.stage.state = ModelState::Available);
        assert_eq!(ring_of(&offers, of_loaded), Some(ring.clone()));
        // For requests of another length they would have to be loaded anew.
        offers[2].stage.context_tokens = 2 * SIZE.context_tokens;
        assert_eq!(ring_of(&offers, of_loaded), None);

        let mut offers = seen_by(1, &[RING[0], RING[1], RING[0]]);
        assert_eq!(ring_of(&offers, of_loaded), None);
        offers[2].stage.state = ModelState::Available;
        assert_eq!(ring_of(&offers, |wanted| wanted.best(true).ok()), Some(ring));
    }

    #[test]
    fn beside_a_ring_there_is_another_where_those_that_are_left_can_hold_the_model() {
        let facts = model();
        let beside = |peers: &[Peer], ask: Ask| {
            let offers = seen_by(1, peers);
            let now: Vec<_> =
                offers[..3].iter().map(|offer| Placement { node: offer.node, layers: offer.range() }).collect();
            let plan = Wanted { offers: &offers, facts: &facts, ask }.beside(SIZE, &now)?;
            Some(plan.placements())
        };
        let ask = || Ask::new(id(1), SIZE.context_tokens);
        let (free, slow) = (Peer(None, 6, 100), Peer(None, 6, 2_000));
        assert_eq!(beside(&[RING[0], RING[1], RING[2], free], ask()), None);
        let ring = beside(&[RING[0], RING[1], RING[2], free, slow], ask()).unwrap();
        assert!(ring.len() == 2 && [4, 5].iter().all(|n| ring.iter().any(|stage| stage.node == id(*n))), "{ring:?}");
        // One that other drivers use already is as good.
        let held = [Peer(Some((0, 6)), 6, 100), Peer(Some((6, 12)), 6, 100)];
        let expected = [(4, 0, 6), (5, 6, 12)];
        let expected =
            expected.map(|(node, first, end)| Placement { node: id(node), layers: LayerRange::new(first, end) });
        assert_eq!(beside(&[RING[0], RING[1], RING[2], held[0], held[1]], ask()), Some(expected.to_vec()));
        assert_eq!(
            beside(&[RING[0], RING[1], RING[2], held[0], held[1]], Ask { pins: vec![Pin::Used(id(1))], ..ask() }),
            None
        );
    }

    #[test]
    fn a_driver_without_requests_goes_back_to_the_ring_of_others_and_never_the_other_way_round() {
        let facts = model();
        let back = |peers: &[Peer], now: &[u8], change: fn(&mut Offer)| {
            let mut offers = seen_by(1, peers);
            offers.iter_mut().for_each(change);
            let now: Vec<_> = now.iter().map(|&number| &offers[usize::from(number) - 1]).collect();
            let now: Vec<_> = now.iter().map(|offer| Placement { node: offer.node, layers: offer.range() }).collect();
            let ask = Ask::new(id(1), SIZE.context_tokens);
            let plan = Wanted { offers: &offers, facts: &facts, ask }.back(SIZE, &now)?;
            Some(plan.stages.iter().map(|stage| stage.node).collect::<Vec<_>>())
        };
        // Its rows travel once less from host to host, and are computed more slowly.
        let second = [Peer(Some((0, 6)), 6, 140), Peer(Some((6, 12)), 6, 140)];
        let peers = [RING[0], RING[1], RING[2], second[0], second[1]];
        assert_eq!(back(&peers, &[4, 5], |_| ()), Some([1, 2, 3].map(id).to_vec()));
        assert_eq!(back(&peers, &[1, 2, 3], |_| ()), None);
        // Its own is the only one: nobody uses the other, or a part of that is missing.
        let unused = |offer: &mut Offer| {
            if offer.node < id(4) {
                offer.stage.state = ModelState::Available;
            }
        };
        assert_eq!(back(&peers, &[4, 5], unused), None);
        assert_eq!(back(&[RING[0], Peer(None, 4, 100), RING[2], second[0], second[1]], &[4, 5], |_| ()), None);
        // Who would be slower there stays.
        let slow = Peer(Some((4, 8)), 4, 20_000);
        assert_eq!(back(&[RING[0], slow, RING[2], second[0], second[1]], &[4, 5], |_| ()), None);
    }

    #[test]
    fn a_slow_node_is_replaced_by_a_fast_one_that_takes_its_layers() {
        let peers = [RING[0], Peer(Some((4, 8)), 4, 2_000), RING[2], Peer(None, 4, 100)];
        let expected = [(1, 0, 4), (4, 4, 8), (3, 8, 12)];
        let expected =
            expected.map(|(node, first, end)| Placement { node: id(node), layers: LayerRange::new(first, end) });
        assert_eq!(better(1, &peers, &[1, 2, 3]), Some(expected.to_vec()));
    }
}
