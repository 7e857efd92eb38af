//! Forming rings: when one is to be had, and whose turn it is. Which one: [`choice`](super::choice).
//!
//! A model without a ring gets one as soon as there can be one. A model that has one gets a better one when there can be one, which
//! is opened beside it: requests that run end where they are, further ones go around the new one, and what nobody uses any more
//! is let go. So that nothing needs memory twice, layers that drivers use stay where they are: newcomers take over whole ranges.
//!
//! Drivers share a ring as long as it has room for the requests of all. One whose requests find none there, because others' have it,
//! goes around the machines that are not in it, if these can hold the model as well: a second ring, and so on. When it has had no request
//! for a while it goes back, and the second ring's machines let go of what nobody uses.

use std::{
    sync::{Arc, Mutex, OnceLock, Weak},
    time::{Duration, Instant},
};

use murmur_core::planner::{Ask, ModelFacts, Placement, Plan, StagePlan};
use murmur_gguf::LayerRange;
use murmur_protocol::mesh::NodeId;
use tokio::{runtime::Handle, time::MissedTickBehavior};

use super::{
    Ring, Seat,
    borrow::Borrower,
    choice::Wanted,
    host::{self, Terms},
    offers::{Sight, Size},
    wishes::Ids,
};
use crate::{
    Node,
    mesh::{MeshNode, both},
    model::{LoadedModel, Model, RingOptions, with_causes},
};

/// How often it is looked whether a ring, or a better one, can be had.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How long each node gives those with lower ids to make a ring.
const TURN: Duration = Duration::from_secs(10);
/// The same when there was one before: they know each other, and requests may wait. All whose ring is lost notice it at about the same time,
/// and what one of them begins is known to the others within it.
const TURN_AGAIN: Duration = Duration::from_secs(2);
/// So many are waited for at most: requests do not wait for long.
const TURNS_AGAIN_MAX: u32 = 10;
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
        drop((model.holding().let_go(host::UNUSED_MAX), model.let_go_left()));
        if let (Some(failed), (_, Some(ring))) = (model.let_go_failed(), model.ring()) {
            model.search().failed(ring.lost());
            // Only now: with its engine a ring loses all its hosts.
            drop(failed);
        }
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
        let same_nodes_since = search.same_nodes_since(&offers);
        let first_from = match search.without_since(in_use.is_none()) {
            (since, true) => since + TURN_AGAIN * before.min(TURNS_AGAIN_MAX),
            // Where nodes come and go all the time, there is an end to it.
            (since, false) => (same_nodes_since + HEARD_OF).min(since + TURN).max(since + TURN * before),
        };
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

/// A ring for a model that has none. Layers have to be loaded for it only `from` then on; so many others may do so `before`. `is_wish`: the
/// user has said how long requests may be, and a ring for shorter ones is none.
fn first(wanted: &Wanted<'_>, model: &Model, is_wish: bool, (from, before): (Instant, u32)) -> Option<(Plan, Size)> {
    let found = match wanted.loaded(|size| wanted.is_long_enough(size, is_wish)) {
        Some(ring) => return Some(ring),
        None if wanted.is_one_loading() => return None,
        None => wanted.measured(|wanted| wanted.best(is_wish)),
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
        not_held: Mutex::default(),
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
                model.search().failed(ring.not_held());
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

/// What a spread model is to the planner.
pub(crate) struct Spread {
    /// For the planner.
    pub(crate) facts: ModelFacts,
    /// Context that is wanted.
    pub(crate) context_tokens: u32,
    /// Why it is spread, for people.
    pub(crate) reason: String,
}

impl Spread {
    /// Memory that a stage takes.
    pub(crate) fn stage_bytes(&self, terms: Terms) -> u64 {
        // Whose stage it is does not matter.
        let ask = Ask { streams: terms.parallel, ..Ask::new(NodeId::from_bytes([0; 32]), terms.context_tokens) };
        self.facts.stage_memory_bytes(terms.range, &ask)
    }
}
