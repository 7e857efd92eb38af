//! The fields with which every answer and every chunk begins.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::{backend::ModelCard, timings::Timings};

/// What one request's answer, or all chunks of it, have in common.
pub(crate) struct Head {
    object: &'static str,
    id: String,
    created: u64,
    model: String,
    fingerprint: String,
    /// An extension: the seed in force, also where none was asked for, so that an answer can be had again. The answer
    /// number `i` to a prompt was made with `seed + i`.
    seed: u64,
}

impl Head {
    pub(crate) fn new(object: &'static str, id_prefix: &str, model: &ModelCard, seed: u64) -> Self {
        Head {
            object,
            id: random_id(id_prefix),
            created: unix_seconds(),
            model: model.id.clone(),
            fingerprint: fingerprint(model),
            seed,
        }
    }

    pub(crate) fn with_choices(&self, choices: Value) -> Value {
        json!({
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "seed": self.seed,
            "choices": choices,
        })
    }

    /// The end of a whole answer.
    pub(crate) fn account(mut answer: Value, usage: Value, timings: Option<Timings>) -> Value {
        answer["usage"] = usage;
        add_timings(&mut answer, timings);
        answer
    }

    /// A chunk of a stream. Where usage was asked for, every chunk has the field, and all but the last have it null.
    pub(crate) fn chunk(&self, choices: Value, include_usage: bool) -> Value {
        let mut chunk = self.with_choices(choices);
        if include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }
}

/// llama-server's `timings`, beside what OpenAI's dialect has.
pub(crate) fn add_timings(answer: &mut Value, timings: Option<Timings>) {
    if let Some(timings) = timings {
        answer["timings"] = timings.render();
    }
}

/// What, besides the seed and the request, an answer depends on.
fn fingerprint(model: &ModelCard) -> String {
    const DIGEST_CHARS: usize = 12;
    let version = env!("CARGO_PKG_VERSION");
    match model.details.get("digest").and_then(Value::as_str) {
        Some(digest) => format!("murmur-{version}-{}", digest.chars().take(DIGEST_CHARS).collect::<String>()),
        None => format!("murmur-{version}"),
    }
}

/// An id no one can guess, as others may list them one day.
pub(crate) fn random_id(prefix: &str) -> String {
    format!("{prefix}{:032x}", rand::random::<u128>())
}

pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |duration| duration.as_secs())
}
