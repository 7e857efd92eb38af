//! `murmur models show`: what a model is.

use std::{
    fmt::Write,
    io::{self, IsTerminal},
    time::{Duration, SystemTime},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use murmur_gguf::{Gguf, Manifest, manifest::Part};
use murmur_node::signatures::{self, Attested};
use murmur_protocol::mesh::NodeId;
use murmur_store::{ModelRef, Store};

use super::{Session, models::drafts};
use crate::{membership::own_node, pull, ui, units::Size};

/// Later times of signing are shown as this one, the end of the year 9999: a signer may say any.
const SIGNED_MS_SHOWN_MAX: u64 = 253_402_300_799_000;

/// Hexadecimal digits of a digest in a table; --json has all.
const DIGEST_DIGITS: usize = 16;

pub(super) fn run(session: &Session, store: &Store, model: &ModelRef) -> anyhow::Result<()> {
    let resolved = store.resolve(model)?;
    let bar = reading_bar(session);
    let manifest = Manifest::of(&resolved.path, |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    })?;
    bar.finish_and_clear();
    let content = store.contents().find(&manifest.digest)?;
    let signatures = content.as_ref().map_or_else(|| Ok(Vec::new()), signatures::attestations)?;
    let own = own_node(&session.data_dir)?;
    let stated = || Some(Gguf::open(&resolved.path).ok()?.str("general.license")?.to_owned());
    let licence = store.get(&resolved.name).ok().filter(|entry| entry.path == resolved.path);
    let licence = licence.and_then(|entry| entry.licence).or_else(stated);
    let draft = drafts::offer(session, store, resolved.name.as_str(), &resolved.path);
    if session.global.json {
        let mut value = serde_json::to_value(&manifest)?;
        if let Some(object) = value.as_object_mut() {
            object.insert("path".to_owned(), resolved.path.to_string_lossy().into_owned().into());
            object.insert("store_name".to_owned(), resolved.name.as_str().into());
            object.insert("licence".to_owned(), licence.into());
            object.insert("draft".to_owned(), drafts::as_json(draft.as_ref()));
            let signatures = signatures.iter().map(|one| signature_as_json(one, &manifest, own)).collect();
            object.insert("signatures".to_owned(), signatures);
        }
        return ui::print_json(&value);
    }
    let mut page = facts(&resolved.path.display().to_string(), licence, &manifest);
    signatures.iter().for_each(|one| page.push_str(&signature(one, &manifest, own)));
    if let Some(draft) = draft {
        page.push_str(&draft.advice(resolved.name.as_str()));
        page.push('\n');
    }
    page.push('\n');
    page.push_str(&parts(&manifest));
    ui::print(&ui::without_controls(&page))
}

/// A bar for a file that is read through. `--quiet`, and a standard error that is no terminal, hide it.
pub(super) fn reading_bar(session: &Session) -> ProgressBar {
    let hidden = session.global.quiet || !io::stderr().is_terminal();
    let bar = ProgressBar::with_draw_target(
        None,
        if hidden { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() },
    );
    if let Ok(style) = ProgressStyle::with_template("reading {wide_bar} {binary_bytes}/{binary_total_bytes} {eta}") {
        bar.set_style(style);
    }
    bar
}

/// Whether who has signed the file means what is in it.
fn fits(attested: &Attested, manifest: &Manifest) -> bool {
    *attested.says().manifest.as_bytes() == manifest.own_digest().0
}

fn signature_as_json(attested: &Attested, manifest: &Manifest, own: Option<NodeId>) -> serde_json::Value {
    let mut view = attested.view();
    view["own"] = (Some(attested.says().signer) == own).into();
    view["fits"] = fits(attested, manifest).into();
    view
}

fn signature(attested: &Attested, manifest: &Manifest, own: Option<NodeId>) -> String {
    let says = attested.says();
    let here = if Some(says.signer) == own { " (this machine)" } else { "" };
    let then = SystemTime::UNIX_EPOCH + Duration::from_millis(says.signed_ms.min(SIGNED_MS_SHOWN_MAX));
    let licence = says.licence.as_ref().map_or_else(String::new, |licence| format!(", licence {licence}"));
    let source = says.source.as_ref().map_or_else(String::new, |source| format!(", from {source}"));
    let doubt = match fits(attested, manifest) {
        true => "",
        false => {
            "; but what it says of the parts is not so: do not trust it, or have it signed anew by a current murmur"
        }
    };
    format!(
        "{:<13} {}{here}, {}, as {}{licence}{source}{doubt}\n",
        "signed by",
        says.signer,
        pull::age(then),
        says.name
    )
}

fn facts(path: &str, licence: Option<String>, manifest: &Manifest) -> String {
    let mut rows: Vec<(&str, String)> = vec![
        ("file", path.to_owned()),
        ("name", manifest.name.clone().unwrap_or_else(|| "-".to_owned())),
        ("architecture", manifest.architecture.clone()),
        ("parameters", parameters(manifest.parameters)),
        ("quantisation", manifest.quantization.clone()),
        ("size", Size(manifest.file_bytes).to_string()),
        ("licence", licence.unwrap_or_else(|| "-".to_owned())),
    ];
    if let Some(facts) = &manifest.facts {
        rows.push(("context", format!("{} tokens", facts.context_length)));
        rows.push(("vocabulary", format!("{} tokens", facts.vocabulary)));
        rows.push(("layers", facts.layers.to_string()));
        rows.push(("width", format!("{}, feed-forward {}", facts.embedding_length, facts.feed_forward_length)));
        rows.push(("attention", format!("{} heads, {} for keys and values", facts.heads, facts.kv_heads)));
        if facts.experts > 0 {
            rows.push(("experts", format!("{}, {} at work per token", facts.experts, facts.experts_used)));
        }
        let kv_bytes = manifest.kv_bytes_per_token_per_layer * u64::from(facts.layers);
        rows.push(("KV cache", format!("{} per 1,000 tokens, as f16", Size(kv_bytes * 1000))));
    }
    if let Some(slice) = &manifest.slice {
        rows.push(("slice", format!("layers {} to {} of a model", slice.first, slice.end)));
    }
    rows.push((
        "stages",
        match &manifest.not_sliceable {
            Some(reason) => format!("cannot be split: {reason}"),
            None => format!("can be split at {} places", manifest.allowed_cuts.len()),
        },
    ));
    rows.push(("BLAKE3", manifest.digest.to_string()));
    let mut page = String::new();
    for (name, value) in rows {
        // Writing to a string cannot fail.
        let _ = writeln!(page, "{name:<13} {value}");
    }
    page
}

fn parts(manifest: &Manifest) -> String {
    let row = |name: String, part: &Part| {
        let digest: String = part.digest.to_string().chars().take(DIGEST_DIGITS).collect();
        let place = part.ranges.first().map_or_else(|| "-".to_owned(), |range| range.start.to_string());
        vec![name, Size(part.bytes).to_string(), parameters(part.parameters), place, digest]
    };
    let mut rows = Vec::new();
    rows.extend(manifest.embedding.iter().map(|part| row("embedding".to_owned(), part)));
    rows.extend(manifest.layers.iter().enumerate().map(|(n, part)| row(format!("layer {n}"), part)));
    let head = if manifest.tied { "head (tied)" } else { "head" };
    rows.extend(manifest.head.iter().map(|part| row(head.to_owned(), part)));
    rows.extend(manifest.shared.iter().map(|part| row("shared".to_owned(), part)));
    ui::table(&["PART", "SIZE", "PARAMETERS", "AT BYTE", "BLAKE3"], &rows, &[1, 2, 3])
}

fn parameters(count: u64) -> String {
    match count {
        0..1_000_000 => format!("{:.1} K", count as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} M", count as f64 / 1e6),
        _ => format!("{:.2} B", count as f64 / 1e9),
    }
}
