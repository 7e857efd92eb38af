//! The own record: which models this node serves, how busy they are and how fast.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use murmur_api::backend::{ModelKind, ModelState as State};
use murmur_protocol::mesh::{
    ModelState, ServedModel,
    model::{BUILD_BYTES_MAX, MODEL_NAME_BYTES_MAX},
};
use tokio::time::MissedTickBehavior;

use super::{MeshNode, ModelIdentity, both};
use crate::{Node, fit, model::Model};

/// How often it is looked whether the record is still true. The mesh sends at most one per second.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Free memory is told in steps of this: smaller changes are no news.
const MEMORY_STEP_BYTES: u64 = 1 << 30;
/// Speeds are told when they have changed by more than this part.
const SPEED_STEP: f64 = 0.1;

pub(super) async fn run(node: Weak<Node>, mesh: Weak<MeshNode>) {
    let mut ticks = tokio::time::interval(LOOK_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut told: Vec<ServedModel> = Vec::new();
    loop {
        ticks.tick().await;
        let Some((node, mesh)) = both(&node, &mesh) else { return };
        identify(&node).await;
        let mut models: Vec<ServedModel> =
            node.models.iter().filter_map(|model| served(model, model.identity()?, &mesh)).collect();
        for model in &mut models {
            if let Some(before) = told.iter().find(|before| before.digest == model.digest) {
                steady(&mut model.decode_us_per_token, before.decode_us_per_token);
                steady(&mut model.prefill_us_per_token, before.prefill_us_per_token);
            }
        }
        if models == told {
            continue;
        }
        told.clone_from(&models);
        let memory_free_bytes = fit::available_bytes().unwrap_or(0) / MEMORY_STEP_BYTES * MEMORY_STEP_BYTES;
        let update = mesh.mesh().update(|own| {
            own.models = models;
            own.memory_free_bytes = memory_free_bytes;
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

/// Reads the files of models that are loaded and have no identity yet.
async fn identify(node: &Arc<Node>) {
    for at in 0..node.models.len() {
        let Some(model) = node.models.get(at) else { return };
        if model.loaded().is_none() || model.is_identified() || model.kind() != ModelKind::Generate {
            continue;
        }
        let node = Arc::clone(node);
        let identified = tokio::task::spawn_blocking(move || {
            let Some(model) = node.models.get(at) else { return };
            let memory = node.options.data_dir.join("digests.json");
            match ModelIdentity::of(model.path(), &memory) {
                Ok(identity) => model.identify(Some(identity)),
                Err(error) => {
                    tracing::error!("{} cannot be offered to the mesh: {error}", model.id());
                    model.identify(None);
                }
            }
        });
        if identified.await.is_err() {
            return;
        }
    }
}

fn served(model: &Model, identity: &ModelIdentity, mesh: &MeshNode) -> Option<ServedModel> {
    let loaded = model.loaded()?;
    let status = loaded.engine.status();
    let counters = &status.counters;
    let decode_us = counters.token_compute_us.checked_div(counters.token_steps).unwrap_or(0);
    Some(ServedModel {
        digest: identity.digest,
        name: cut(model.id(), MODEL_NAME_BYTES_MAX),
        state: match model.state() {
            State::Ready => ModelState::Ready,
            State::Loading { .. } => ModelState::Loading,
            State::Failed { .. } => ModelState::Draining,
        },
        context_tokens: loaded.card.context_tokens,
        parallel: loaded.engine.options().parallel,
        running: u32::try_from(status.running).unwrap_or(u32::MAX),
        queued: u32::try_from(status.queued).unwrap_or(u32::MAX),
        decode_us_per_token: u32::try_from(decode_us).unwrap_or(u32::MAX),
        prefill_us_per_token: mesh.speeds.prefill_us_per_token(&identity.digest),
        load_ms: 0,
        tokenizer: identity.tokenizer,
        exact: loaded.engine.options().exact,
        build: cut(&murmur_engine::build_id(), BUILD_BYTES_MAX),
    })
}

/// As much of a text as fits.
fn cut(text: &str, bytes_max: usize) -> String {
    let end = (0..=bytes_max.min(text.len())).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
    text[..end].to_owned()
}
