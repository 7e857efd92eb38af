//! Whether the engine computes on this machine: a small made-up model, as two stages, through the whole path from the API to the
//! engine's processes. What it says is noise; that it says it is the point.

use std::{num::NonZeroU32, path::Path, time::Duration};

use anyhow::Context;
use murmur_gguf::synth::{self, Spec};
use serde_json::{Value, json};

use super::{Session, launch::OwnServer, node_runtime};
use crate::{
    args::{Draft, EngineArgs},
    target::LocalModel,
    units::Threads,
};

const PATIENCE: Duration = Duration::from_secs(60);
const TOKENS: u64 = 4;

pub(super) fn run(session: &Session) -> anyhow::Result<()> {
    let place = session.data_dir.join(format!(".self-test-{}", std::process::id()));
    std::fs::create_dir_all(&place).with_context(|| format!("creating {}", place.display()))?;
    let outcome = run_in(session, &place);
    let cleaned = std::fs::remove_dir_all(&place).with_context(|| format!("deleting {}", place.display()));
    outcome.and(cleaned)
}

fn run_in(session: &Session, place: &Path) -> anyhow::Result<()> {
    let path = place.join("self-test.gguf");
    synth::write(&Spec::tiny("llama")?, &path).context("making a small model")?;
    let mut session = session.clone();
    session.global.quiet = true;
    session.data_dir = place.to_owned();
    let model = LocalModel { path, id: "self-test".to_owned() };
    let engine = EngineArgs {
        stages: 2,
        threads: Threads::Fixed(NonZeroU32::MIN),
        ctx: Some(64),
        parallel: 1,
        max_memory: None,
        gpu_layers: 0,
        exact: false,
        draft: Draft::Off,
        draft_spoilt: None,
    };
    let runtime = node_runtime()?;
    let outcome = runtime.block_on(async {
        let test = async {
            let server = OwnServer::start(&session, model, &engine).await?;
            let body = json!({"model": "self-test", "prompt": [1, 5, 6, 7], "max_tokens": TOKENS, "temperature": 0, "ignore_eos": true});
            let answer = server.client.post("/v1/completions", &body).await;
            server.end().await;
            answer
        };
        tokio::time::timeout(PATIENCE, test).await.with_context(|| format!("no answer within {} s", PATIENCE.as_secs()))?
    });
    runtime.shutdown_background();
    let made = outcome?.pointer("/usage/completion_tokens").and_then(Value::as_u64);
    anyhow::ensure!(made == Some(TOKENS), "it made {made:?} tokens instead of {TOKENS}");
    Ok(())
}
