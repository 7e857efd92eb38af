//! A small model that guesses what a larger one will say: which one would do, and what to write to have it.

use std::path::Path;

use murmur_gguf::{Gguf, same_vocabulary};
use murmur_store::{ModelEntry, Store};
use serde_json::{Value, json};

use super::{super::Session, recommended::Recommendations};
use crate::units::Size;

/// A model that guesses has at most this part of the bytes of the one that it guesses for, as with `--draft auto`.
const PART_MAX: u64 = 4;

/// A model that could guess for another one.
pub(in crate::commands) struct Offer {
    /// What `--draft` takes: a name in the store, or a reference to a hub.
    model: String,
    bytes: u64,
    /// Else it is pulled when it is used first.
    is_here: bool,
}

impl Offer {
    /// What to write to have it.
    pub(in crate::commands) fn advice(&self, target: &str) -> String {
        let pulled = if self.is_here { String::new() } else { format!(" ({} to pull)", Size(self.bytes)) };
        format!("{}{pulled}", advice(target, &self.model))
    }
}

/// What to write to have one model guess for another one.
pub(in crate::commands) fn advice(target: &str, draft: &str) -> String {
    format!("a smaller model can guess ahead, for faster answers: murmur serve {target} --draft {draft}")
}

/// For `--json`.
pub(in crate::commands) fn as_json(offer: Option<&Offer>) -> Value {
    offer.map_or(Value::Null, |offer| json!({"model": offer.model, "bytes": offer.bytes, "is_here": offer.is_here}))
}

/// Who could guess for a model: the one that is recommended for it if that is here, or else the smallest of the same vocabulary that is
/// here, or else the recommended one from its hub. An offer is no reason to fail: without one nothing is said.
pub(in crate::commands) fn offer(session: &Session, store: &Store, name: &str, path: &Path) -> Option<Offer> {
    let recommended = Recommendations::for_advice(session);
    let entries: Vec<ModelEntry> = store.list().unwrap_or_default();
    let here: Vec<&ModelEntry> = entries.iter().filter(|entry| entry.path.exists()).collect();
    let own = here.iter().find(|entry| entry.path == path);
    let by_entry = own.and_then(|entry| recommended.find(entry));
    let wanted = by_entry.or_else(|| recommended.find_file(name)).and_then(|model| recommended.draft_of(model));
    let from_store =
        |entry: &ModelEntry| Offer { model: entry.name.to_string(), bytes: entry.size_bytes, is_here: true };
    if let Some(found) = wanted.and_then(|draft| here.iter().find(|entry| draft.is_it(entry))) {
        return Some(from_store(found));
    }
    if let Some(found) = smallest_alike(&here, path) {
        return Some(from_store(found));
    }
    wanted.map(|draft| Offer { model: draft.reference.to_string(), bytes: draft.bytes, is_here: false })
}

fn smallest_alike<'a>(entries: &[&'a ModelEntry], path: &Path) -> Option<&'a ModelEntry> {
    let target = Gguf::open(path).ok()?;
    let mut small: Vec<&ModelEntry> =
        entries.iter().copied().filter(|entry| entry.size_bytes <= target.file_bytes() / PART_MAX).collect();
    small.sort_by_key(|entry| entry.size_bytes);
    // What cannot be read cannot guess; a part of a model has holes where its header should be.
    small.into_iter().find(|entry| Gguf::open(&entry.path).is_ok_and(|gguf| same_vocabulary(&gguf, &target)))
}
