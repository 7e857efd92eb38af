//! A stage takes the memory that was set aside for it, and no more: its layers, its KV cache, what computing takes. Real nodes on
//! this machine, and a model large enough that little things do not count.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test ends when something is off")]

mod common;

use std::path::Path;

use common::{Home, Server, http, until};
use murmur_gguf::{
    Arch, Facts,
    synth::{self, Spec, Weights},
};
use serde_json::{Value, json};

/// Nobody outside this machine is asked or told anything.
const OFFLINE: [&str; 5] = ["--relay=none", "--no-nostr", "--no-mdns", "--bind", "127.0.0.1:0"];

const LAYERS: u32 = 16;
const CONTEXT_TOKENS: u32 = 2048;

/// Some 300 MB in bytes, of which the embedding is a part that shows.
fn model(file: &Path, weights: Weights) {
    let spec = Spec::tiny("llama").unwrap();
    let facts = Facts {
        layers: LAYERS,
        embedding_length: 1024,
        feed_forward_length: 4096,
        heads: 16,
        kv_heads: 8,
        key_length: 64,
        value_length: 64,
        rope_dimensions: 64,
        vocabulary: 32_000,
        windowed_layers: vec![false; LAYERS as usize],
        ..spec.facts.clone()
    };
    synth::write(&Spec { arch: Arch::Llama, facts, weights, ..spec }, file).unwrap();
}

/// A figure of the memory of a process, in bytes.
fn memory(process: u64, what: &str) -> u64 {
    let rollup = std::fs::read_to_string(format!("/proc/{process}/smaps_rollup")).unwrap();
    let line = rollup.lines().find_map(|line| line.strip_prefix(what)?.strip_prefix(':')).unwrap();
    1024 * line.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
}

#[test]
fn a_stage_takes_what_was_set_aside_for_it_and_no_more() {
    takes_what_was_set_aside(Weights::Q8_0);
}

#[test]
fn so_does_one_whose_weights_are_rearranged_when_they_are_loaded() {
    takes_what_was_set_aside(Weights::Q4KM);
}

fn takes_what_was_set_aside(weights: Weights) {
    let files = Home::new();
    let file = files.path().join("demo.gguf");
    model(&file, weights);
    let file = file.to_str().unwrap();
    let (half, context) = (format!("--max-layers={}", LAYERS / 2), format!("--ctx={CONTEXT_TOKENS}"));
    let homes = [Home::new(), Home::new()];
    homes[0].run(["mesh", "create", "home"]).succeeds();
    let serve = |home: &Home, mesh: &[&str]| {
        Server::start(home, [&[file, "--parallel=2", &half, &context], &OFFLINE[..], mesh].concat())
    };
    let first = serve(&homes[0], &["--mesh=home"]);
    let invite = homes[0].run(["mesh", "invite", "--json", "--api", &first.address]).succeeds().json();
    let second = serve(&homes[1], &["--join", invite["ticket"].as_str().unwrap()]);
    let status = |server: &Server| http::get(&server.address, "/api/status").1["node"]["models"][0].take();
    for server in [&first, &second] {
        until("the ring is ready", || (status(server)["state"] == "ready").then_some(()));
    }
    let mut salt = 0;
    let mut fills_up = || {
        salt += 1;
        let prompt = format!("ba{salt} {}", "ba ".repeat(1_500));
        let request = json!({"model": "demo", "prompt": prompt, "max_tokens": 8, "ignore_eos": true});
        http::complete(&first.address, &request);
    };
    fills_up();
    for server in [&first, &second] {
        let status: Value = status(server);
        let process = status["ring"]["process_id"].as_u64().unwrap();
        let planned = status["memory_bytes_planned"].as_u64().unwrap();
        // Where others need memory, the system takes some away that is needed again at the next request.
        let taken = until("what was set aside is taken", || {
            let taken = memory(process, "Rss");
            assert!(taken <= planned, "{taken} of {planned}: {status}");
            if planned > taken + taken / 10 {
                eprintln!("{taken} of {planned} bytes are taken");
                fills_up();
                return None;
            }
            Some(taken)
        });
        eprintln!(
            "layers {}: {:.0} MiB were set aside, {:.0} are taken, {:.0} of them anonymous; shared pages by part {:.0}",
            status["ring"]["held"],
            planned as f64 / 1048576.0,
            taken as f64 / 1048576.0,
            memory(process, "Anonymous") as f64 / 1048576.0,
            memory(process, "Pss") as f64 / 1048576.0,
        );
    }
}

#[test]
fn the_model_that_guesses_for_a_ring_runs_at_its_driver_and_its_memory_is_set_aside_there() {
    let files = Home::new();
    let model = files.model("tiny.gguf");
    let draft = files.path().join("draft.gguf");
    synth::write(&Spec::tiny("llama").unwrap().with_layers(1), &draft).unwrap();
    let draft_bytes = draft.metadata().unwrap().len();
    let homes = [Home::new(), Home::new()];
    homes[0].run(["mesh", "create", "home"]).succeeds();
    let shape = [model.to_str().unwrap(), "--max-layers=4", "--ctx=1024", "--parallel=1", "--exact"];
    let serve = |home: &Home, more: &[&str]| Server::start(home, [&shape, &OFFLINE[..], more].concat());
    let first = serve(&homes[0], &["--mesh=home", "--draft", draft.to_str().unwrap()]);
    let invite = homes[0].run(["mesh", "invite", "--json", "--api", &first.address]).succeeds().json();
    let second = serve(&homes[1], &["--join", invite["ticket"].as_str().unwrap()]);
    let status = |server: &Server| http::get(&server.address, "/api/status").1["node"]["models"][0].take();
    for server in [&first, &second] {
        until("the ring is ready", || (status(server)["state"] == "ready").then_some(()));
    }
    let mut seed = 0;
    // Whether a guess pays is decided by times that are measured; on a busy machine it may not for a while.
    let with = until("a token is guessed", || {
        seed += 1;
        let prompt = "ba na ".repeat(20);
        let request = json!({"model": "tiny", "prompt": prompt, "max_tokens": 200, "ignore_eos": true, "seed": seed});
        assert_eq!(http::complete(&first.address, &request), http::complete(&second.address, &request));
        Some(status(&first)).filter(|with| with["guessed_tokens"].as_u64() > Some(0))
    });
    let without = status(&second);
    assert_eq!(with["draft"]["model"], "draft.gguf");
    assert!(with["draft"]["process_id"].is_u64(), "{with}");
    assert_eq!((&without["draft"], &without["guessed_tokens"]), (&Value::Null, &json!(0)));
    let planned = |status: &Value| status["memory_bytes_planned"].as_u64().unwrap();
    assert!(planned(&with) > planned(&without) + draft_bytes, "{with}\n{without}");
}
