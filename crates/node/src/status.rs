//! What `/api/status` says of a node, under `node`:
//!
//! | field | |
//! |---|---|
//! | `version`, `process_id`, `uptime_s` | of the running program |
//! | `data_dir` | where its models and settings are |
//! | `tokens_per_s.api`, `.nodes` | tokens that came for this node's own API, and for other nodes; average over the last 5 s |
//! | `requests[]` | answers in progress, the oldest first, see below |
//! | `models[]` | this machine's models, see below |
//! | `wanted[]` | models that were to come from other nodes or the hub: `name`, and what each is `waiting` for; null: it is one of `models` |
//! | `contents[]` | model files that are here, or parts of them, see below |
//! | `sharing` | what other nodes may have, where the node offers models to a mesh; else null |
//! | `sharing.paused` | why nothing of theirs is taken now; null: it is taken |
//! | `sharing.requests`, `.requests_max` | of theirs in progress, and how many may be; null: what the models take |
//! | `sharing.hours[]`, `.pause_when_active` | when it is taken, in local time; empty: always |
//!
//! One of `requests`:
//!
//! | field | |
//! |---|---|
//! | `model` | the name it was asked for by |
//! | `from` | id of the node that asked; null: this node's own API |
//! | `at` | id of the node that computes it; null: this one, or none yet |
//! | `prompt_tokens`, `prompt_tokens_done` | length of the prompt, and how much of it has been read |
//! | `generated_tokens` | tokens of the answer so far |
//! | `tokens_per_s` | since the first token; null before the second |
//! | `age_ms` | since it was asked |
//!
//! One of `contents`:
//!
//! | field | |
//! |---|---|
//! | `digest`, `name` | of the file, and of the model |
//! | `file_bytes`, `held_bytes` | of the whole file, and those that are here |
//! | `copied_bytes` | of these, what was copied from other files of this machine since the program started |
//! | `received_bytes` | what has come of it since the program started, with hashes, and with what came twice or was wrong |
//! | `fetch.wanted_bytes`, `.done_bytes`, `.doubled_bytes` | what is wanted, how much of it has come, and what came twice; `fetch` is null when nothing is being fetched |
//! | `fetch.bytes_per_s`, `.eta_s`, `.stuck` | how fast it comes, when all is there at this rate, why nothing comes |
//! | `fetch.sources[]` | `node`, `hub` or `file` (another one of this machine), `state`, `rtt_ms`, `bytes_per_s`, `received_bytes`, `owed_requests` of each that has some of it |
//! | `liars[]` | nodes that have sent what is not of it; they are not asked for it while they are there |
//!
//! One of `models`, once it is loaded:
//!
//! | field | |
//! |---|---|
//! | `id`, `state`, `reason`, `details` | as in `/v1/models`; `restarting` while a process is replaced |
//! | `on_demand` | loaded when somebody asks for it |
//! | `memory_bytes_planned` | what was set aside for it |
//! | `requests_running`, `requests_queued` | now |
//! | `decode_tokens_per_s` | measured speed of a lone answer; null: not measured |
//! | `generated_tokens`, `prompt_tokens`, `cached_tokens` | since it was loaded; prompt tokens computed, and those that need not be |
//! | `guessed_tokens`, `right_tokens` | tokens that were guessed (`--draft`), and those of them that were right |
//! | `guessed_by_depth[]`, `right_by_depth[]` | guesses that were compared with what was chosen, and the right ones of them, by how many others waited before each when it was made; the last entry has all further ones. Guesses behind a wrong one are compared with nothing |
//! | `guessing.rows_per_frame`, `.frames_in_flight`, `.by_model` | how was guessed lately: rows sent together, and such frames on their way, at most; by a model, or looked up; null: not at all so far |
//! | `guessing.right`, `.around_us`, `.frame_us`, `.token_us` | why so: the part of guesses that was expected to be right, the time of a row around the stages, the time after which one frame can follow another, and what a token was expected to take with that |
//! | `guessing.plain_left` | tokens that are had without guesses before the next is guessed, because guesses may have cost time, or have |
//! | `guessing.pays` | false: the newest tokens were had without guesses, which would not have paid or which nobody had |
//! | `guessing.tokens_around` | tokens for each way around the stages, as timed lately of a request that ran alone, with guesses; null: not timed yet |
//! | `travel_us` | how long a row is on its way around the stages, beside computing: as was known at first, and then as measured |
//! | `rejected_us` | time from wrong guesses to the tokens after those that were chosen instead |
//! | `draft.model`, `.node`, `.process_id`, `.restarts` | the model that guesses: its file and process; or its name at the `node` that has it guess, and no process; null: none does |
//! | `token_steps`, `token_compute_us` | steps on one row of a sequence that gave its next token, and their time |
//! | `stages[]` | `layers` from and to; `process_id`, or the `node` that holds it; `restarts`, `load_ms`, `weight_bytes`, `kv_cells`; `computed_rows` for requests of this node; `codec` in which hidden states go on to the next node |
//! | `stages[].standby` | who stands by for it: `node`, and the `computed_rows` of this node's requests that it has computed as well; null: nobody |
//! | `stages[].last_step` | `compute_us`, `batch_rows`, `threads` of its last batch |
//! | `stages[].hop_us` | half of the round trip from its node to that of the next stage, and from that of the last one to this node, as one of the two has measured it; 0 within one node; null: neither has, or nobody holds it |
//! | `ring` | of a model that is spread over the mesh: `because` of what, what it is `waiting` for, which layers are `held` here, by which `process_id`, and the `computed_rows` of that process, whoever asked for them |

use std::{
    borrow::Cow,
    ffi::OsStr,
    time::{Duration, Instant},
};

use murmur_api::backend::ModelState;
use murmur_engine::Draft;
use murmur_gguf::LayerRange;
use serde_json::{Value, json};

use crate::{
    Node,
    mesh::{one_way_us, ring::Ring},
    model::Model,
};

pub(crate) fn node(node: &Node) -> Value {
    let offers = node.mesh.get().is_some() && node.options().contributes;
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "process_id": std::process::id(),
        "uptime_s": node.started.elapsed().as_secs(),
        "data_dir": std::path::absolute(&node.options().data_dir).unwrap_or_default().to_string_lossy(),
        "tokens_per_s": node.requests.tokens_per_s(Instant::now()),
        "requests": node.requests.list(),
        "sharing": offers.then(|| node.gate.view(node.requests.of_others())),
        "models": node.models.iter().map(|own| model(node, own)).collect::<Vec<_>>(),
        "wanted": node.wanted.iter().map(|wanted| wanted.view()).collect::<Vec<_>>(),
        "contents": node.library.list().iter().map(|shelf| shelf.view()).collect::<Vec<_>>(),
    })
}

fn model(node: &Node, model: &Model) -> Value {
    let state = model.state();
    let Some(loaded) = model.loaded() else {
        let (card, on_demand) = (model.card(), model.is_on_demand());
        return json!({
            "id": model.id(), "state": state.name(), "on_demand": on_demand, "details": card.details, "ring": ring(model),
        });
    };
    let status = loaded.engine.status();
    let counters = &status.counters;
    let around = model.ring().1;
    let hosts = around.as_ref().map(|ring| ring.view()).unwrap_or_default();
    let options = loaded.engine.options();
    let (codecs, hops_us) = (&options.codecs, hops_us(node, around.as_deref(), &options.ranges));
    let stages = status.stages.iter().enumerate().map(|(at, stage)| {
        let host = hosts.iter().find(|(range, _)| *range == stage.range).and_then(|(_, host)| *host);
        let standby = around.as_ref().and_then(|ring| ring.standby(stage.range));
        json!({
            "layers": [stage.range.first, stage.range.end],
            "node": host.map(|node| node.to_string()),
            "standby": standby.map(|standby| json!({
                "node": standby.node.to_string(), "computed_rows": standby.computed_rows,
            })),
            "process_id": stage.process_id,
            "restarts": stage.restarts,
            "load_ms": stage.loaded.as_ref().map(|l| l.load_ms),
            "weight_bytes": stage.loaded.as_ref().map(|l| l.weight_bytes),
            "kv_cells": stage.loaded.as_ref().map(|l| l.kv_cells),
            "computed_rows": stage.computed_rows,
            "codec": codecs.get(at).map(|codec| codec.name()),
            "hop_us": hops_us.get(at),
            "last_step": stage.last_step.as_ref().map(|step| json!({
                "compute_us": step.compute_us, "batch_rows": step.batch_rows, "threads": step.threads,
            })),
        })
    });
    let held_bytes = model.holding().held().as_ref().map_or(0, |held| held.memory_bytes);
    let restarting = state == ModelState::Ready && !loaded.engine.is_ready();
    json!({
        "id": model.id(),
        "state": if restarting { "restarting" } else { state.name() },
        "reason": status.unavailable,
        "on_demand": model.is_on_demand(),
        "details": loaded.card.details,
        "memory_bytes_planned": loaded.memory_bytes + held_bytes,
        "requests_running": status.running,
        "requests_queued": status.queued,
        "decode_tokens_per_s": counters.us_per_token().and_then(per_second),
        "generated_tokens": counters.generated_tokens,
        "guessed_tokens": counters.guessed_tokens,
        "right_tokens": counters.right_tokens,
        "guessed_by_depth": counters.guessed_by_depth,
        "right_by_depth": counters.right_by_depth,
        "draft": status.draft.as_ref().and_then(|draft| {
            let (model, node) = guesser(&options.draft, model)?;
            Some(json!({"model": model, "node": node, "process_id": draft.process_id, "restarts": draft.restarts}))
        }),
        "guessing": status.guessing.map(|guessing| json!({
            "rows_per_frame": guessing.rows_per_frame,
            "frames_in_flight": guessing.frames_in_flight,
            "by_model": guessing.by_model,
            "right": guessing.right,
            "around_us": guessing.around_us,
            "frame_us": guessing.frame_us,
            "token_us": guessing.token_us,
            "plain_left": guessing.plain_left,
            "pays": guessing.pays,
            "tokens_around": guessing.tokens_around,
        })),
        "travel_us": status.travel_us,
        "rejected_us": counters.rejected_us,
        "token_steps": counters.token_steps,
        "token_compute_us": counters.token_compute_us,
        "prompt_tokens": counters.prompt_tokens,
        "cached_tokens": counters.cached_tokens,
        "stages": stages.collect::<Vec<_>>(),
        "ring": ring(model),
    })
}

/// The way from each stage's node to that of the next, and from that of the last to this one, us; `None`: not known.
fn hops_us(node: &Node, ring: Option<&Ring>, ranges: &[LayerRange]) -> Vec<Option<u64>> {
    let Some((ring, mesh)) = ring.zip(node.mesh.get()) else { return vec![Some(0); ranges.len()] };
    let (own, peers, seats) = (mesh.mesh().node_id(), mesh.mesh().peers(), ring.view());
    // Those that are in no seat are this node's own.
    let holder = |range: &LayerRange| seats.iter().find(|(seat, _)| seat == range).map_or(Some(own), |(_, host)| *host);
    let holders: Vec<_> = ranges.iter().map(holder).chain([Some(own)]).collect();
    holders.windows(2).map(|hop| one_way_us(mesh, &peers, hop[0]?, hop[1]?)).collect()
}

/// File of the model that guesses for another, if one does; or its name, and the node where it is.
fn guesser<'a>(draft: &'a Draft, model: &Model) -> Option<(Cow<'a, str>, Option<String>)> {
    match draft {
        Draft::Model(guesser) => Some((guesser.path.file_name().map(OsStr::to_string_lossy)?, None)),
        Draft::Peer(_) => {
            let (name, node) = model.ring().1?.lender()?;
            Some((name.into(), Some(node.to_string())))
        }
        Draft::Off | Draft::Lookup => None,
    }
}

/// Of a model that is spread over the mesh: why it is, what is waited for, which layers of it are held here.
fn ring(model: &Model) -> Option<Value> {
    let spread = model.spread()?;
    let waiting = model.ring().0;
    let held = model.holding().held();
    let held = held.as_ref();
    let host = held.and_then(|held| held.host.as_ref());
    Some(json!({
        "because": spread.reason,
        "waiting": waiting,
        "held": held.map(|held| [held.terms.range.first, held.terms.range.end]),
        "process_id": host.and_then(|host| host.process_id()),
        "computed_rows": host.map(|host| host.computed_rows()),
    }))
}

/// How many come in a second when one takes so many us; 0 us: not known.
pub(crate) fn per_second(us: u64) -> Option<f64> {
    (us > 0).then(|| Duration::from_secs(1).as_micros() as f64 / us as f64)
}
