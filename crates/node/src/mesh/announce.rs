//! The own record: which models this node serves, how busy they are and how fast.

use std::{
    sync::Weak,
    time::{Duration, Instant},
};

use murmur_api::backend::ModelState as State;
use murmur_engine::EngineStatus;
use murmur_net::PeerView;
use murmur_protocol::mesh::{
    HeldContent, MeasuredLink, ModelDigest, ModelState, ServedModel, ServedStage,
    model::{BUILD_BYTES_MAX, MODEL_NAME_BYTES_MAX},
};
use tokio::time::MissedTickBehavior;

use super::{
    MeshNode, ModelIdentity, both, links,
    ring::{facts, host},
};
use crate::{
    Node, fit,
    model::{Model, Room},
};

/// How often it is looked whether the record is still true. The mesh sends at most one per second.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Free memory is told in steps of this: smaller changes are no news.
const MEMORY_STEP_BYTES: u64 = 1 << 30;
/// The same of the memory for layers of a model.
const STAGE_MEMORY_STEP_BYTES: u64 = 256 << 20;
/// Speeds are told when they have changed by more than this part.
const SPEED_STEP: f64 = 0.1;

pub(super) async fn run(node: Weak<Node>, mesh: Weak<MeshNode>) {
    let mut ticks = tokio::time::interval(LOOK_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut told: (Vec<ServedModel>, Vec<ServedStage>, Vec<MeasuredLink>, Vec<HeldContent>) = Default::default();
    loop {
        let Some(there) = mesh.upgrade() else { return };
        tokio::select! {
            _ = ticks.tick() => {}
            () = there.identified.notified() => {}
        }
        drop(there);
        let Some((node, mesh)) = both(&node, &mesh) else { return };
        look(&node);
        let peers = mesh.mesh().peers();
        let mut models: Vec<ServedModel> =
            node.models.iter().filter_map(|model| served(&node, model, model.identity()?, (&mesh, &peers))).collect();
        for model in &mut models {
            if let Some(before) = told.0.iter().find(|before| before.digest == model.digest) {
                steady(&mut model.decode_us_per_token, before.decode_us_per_token);
                steady(&mut model.prefill_us_per_token, before.prefill_us_per_token);
            }
        }
        let mut stages = all_offered(&node);
        let shared: Vec<ModelDigest> = stages.iter().map(|stage| stage.digest).collect();
        match host::layers_max(node.options()) {
            // All that this node contributes are the ends that it keeps.
            Some(0) => stages.clear(),
            layers_max => stages.iter_mut().for_each(|stage| stage.layers_max = layers_max.unwrap_or(0)),
        }
        for stage in &mut stages {
            if let Some(before) = told.1.iter().find(|before| before.digest == stage.digest) {
                steady(&mut stage.decode_us_per_layer, before.decode_us_per_layer);
                steady(&mut stage.prefill_us_per_layer, before.prefill_us_per_layer);
                // Where it is just more than a step says, a little less would be another one.
                if stage.memory_bytes == before.memory_bytes + STAGE_MEMORY_STEP_BYTES {
                    stage.memory_bytes = before.memory_bytes;
                }
            }
        }
        let links = mesh.links().look(peers.iter().filter(|peer| links::shares_a_model(peer, &shared)), Instant::now());
        let contents = if node.options().hands_out_files { node.library.held() } else { Vec::new() };
        let now = (models, stages, links, contents);
        if now == told {
            continue;
        }
        told.clone_from(&now);
        let memory_free_bytes = fit::available_bytes().unwrap_or(0) / MEMORY_STEP_BYTES * MEMORY_STEP_BYTES;
        let (machine, region) = (node.machine(), node.options().region.clone());
        let update = mesh.mesh().update(|own| {
            (own.models, own.stages, own.links, own.contents) = now;
            own.memory_free_bytes = memory_free_bytes;
            own.machine = machine;
            own.region = region;
        });
        if update.await.is_err() {
            return;
        }
    }
}

/// A speed that is about what was told stays what was told.
fn steady(now: &mut u32, told: u32) {
    if (f64::from(*now) - f64::from(told)).abs() <= SPEED_STEP * f64::from(told) {
        *now = told;
    }
}

/// Whether others' work is welcome now.
fn look(node: &Node) {
    let engines = node.models.iter().filter_map(Model::loaded).flat_map(|model| model.engine.process_ids());
    let own: Vec<u32> = engines.chain([std::process::id()]).collect();
    node.gate.look(&own);
}

/// What this node says of a model that it serves, with what it knows of its `peers`.
fn served(
    node: &Node,
    model: &Model,
    identity: &ModelIdentity,
    (mesh, peers): (&MeshNode, &[PeerView]),
) -> Option<ServedModel> {
    let (loaded, options) = (model.loaded(), node.options());
    if loaded.is_none() && !model.is_on_demand() {
        return None;
    }
    let status = loaded.as_ref().map(|loaded| loaded.engine.status());
    let count = |read: fn(&EngineStatus) -> usize| u32::try_from(status.as_ref().map_or(0, read)).unwrap_or(u32::MAX);
    let around_us = model.ring().1.map_or(0, |ring| ring.around_us(mesh, peers));
    let decode_us = status.as_ref().and_then(|status| status.counters.us_per_token()).map(|us| us + around_us);
    Some(ServedModel {
        digest: identity.digest,
        name: cut(model.id(), MODEL_NAME_BYTES_MAX),
        state: match model.state() {
            _ if node.gate.paused().is_some() => ModelState::Draining,
            State::Ready => ModelState::Ready,
            State::Available { loading: None } => ModelState::Available,
            State::Loading { .. } | State::Available { loading: Some(_) } => ModelState::Loading,
            State::Waiting { .. } | State::Failed { .. } => ModelState::Draining,
        },
        context_tokens: model.card().context_tokens,
        parallel: options.parallel.min(u32::try_from(node.gate.requests_max()).unwrap_or(u32::MAX)),
        running: count(|status| status.running),
        queued: count(|status| status.queued),
        decode_us_per_token: u32::try_from(decode_us.unwrap_or(0)).unwrap_or(u32::MAX),
        prefill_us_per_token: mesh.speeds.prefill_us_per_token(&identity.digest),
        load_ms: if loaded.is_some() { 0 } else { model.load_ms() },
        tokenizer: identity.tokenizer,
        exact: options.exact,
        build: cut(&murmur_engine::build_id(), BUILD_BYTES_MAX),
        // One that is not here whole has no process that could.
        guesses: identity.guesses.filter(|_| !model.is_spread()),
    })
}

/// What this node offers of all models that are spread over the mesh.
fn all_offered(node: &Node) -> Vec<ServedStage> {
    let room = Room::of(&node.models);
    node.models.iter().filter_map(|model| offered(node, model, &room)).collect()
}

/// What this node offers of a model that is spread over the mesh.
pub(super) fn offered(node: &Node, model: &Model, room: &Room<'_>) -> Option<ServedStage> {
    could_offer(node, model, model.spread()?.context_tokens, room)
}

/// What this node would offer of a model if that were spread over the mesh.
pub(super) fn could_offer(node: &Node, model: &Model, context_tokens: u32, room: &Room<'_>) -> Option<ServedStage> {
    let (identity, options) = (model.identity()?, node.options());
    let held = host::held(model);
    let terms = held.map(|(terms, ..)| terms);
    let measured = held.zip(model.spread());
    let (decode_us_per_layer, prefill_us_per_layer) =
        measured.map_or((0, 0), |((terms, _, speed), spread)| facts::per_layer(speed, &spread.facts, terms.range));
    Some(ServedStage {
        digest: identity.digest,
        name: cut(model.id(), MODEL_NAME_BYTES_MAX),
        layers: model.layers(),
        first: terms.map_or(0, |terms| terms.range.first),
        end: terms.map_or(0, |terms| terms.range.end),
        state: match held {
            _ if node.gate.paused().is_some() => ModelState::Draining,
            None => ModelState::Available,
            Some((_, state, _)) => state,
        },
        context_tokens: terms.map_or(context_tokens, |terms| terms.context_tokens),
        parallel: terms.map_or(options.parallel, |terms| terms.parallel),
        exact: options.exact,
        build: cut(&murmur_engine::build_id(), BUILD_BYTES_MAX),
        memory_bytes: model.available_bytes(options, room) / STAGE_MEMORY_STEP_BYTES * STAGE_MEMORY_STEP_BYTES,
        decode_us_per_layer,
        prefill_us_per_layer,
        layers_max: options.layers_max.unwrap_or(0),
    })
}

/// As much of a text as fits.
fn cut(text: &str, bytes_max: usize) -> String {
    let end = (0..=bytes_max.min(text.len())).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
    text[..end].to_owned()
}
