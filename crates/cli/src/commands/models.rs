//! `murmur models`: the store, from the command line.

pub(super) mod drafts;
mod hub;
pub(super) mod recommended;

use std::time::{Duration, SystemTime};

use murmur_gguf::synth::{self, Spec};
use murmur_store::{ImportOptions, ModelEntry, ModelName, ModelRef, Origin, Store};
use serde_json::{Value, json};

use super::{Session, mesh_models, show, sign, small_runtime, upkeep};
use crate::{
    args::Models,
    exit::{Code, Failure},
    pull, ui,
    units::Size,
};

pub(super) fn run(session: &Session, command: Models) -> anyhow::Result<()> {
    let store = session.store();
    match command {
        Models::Ls => list(session, &store),
        Models::Show { model } => show::run(session, &store, &model),
        Models::Sign { model } => sign::run(session, &store, &model),
        Models::Import { file, name, copy } => {
            let entry = store.import(&file, &ImportOptions { name, copy })?;
            added(session, &entry, if copy { "copied" } else { "imported" })
        }
        Models::Synth { preset, file, layers, seed } => {
            let preset = Spec::preset(&preset)?;
            let (layers, seed) = (layers.unwrap_or(preset.facts.layers), seed.unwrap_or(preset.seed));
            let spec = if layers == preset.facts.layers { preset } else { preset.with_layers(layers) }.with_seed(seed);
            let bytes = synth::write(&spec, &file)?;
            if session.global.json {
                return ui::print_json(&json!({"path": file, "size_bytes": bytes}));
            }
            ui::print(&format!("{} ({})", file.display(), Size(bytes)))
        }
        Models::Rm { names } => remove(session, &store, &names),
        Models::Pull { model, signed_by: Some(signer), .. } => {
            small_runtime()?.block_on(mesh_models::pull_signed(session, &model, &signer))
        }
        Models::Pull { model: ModelRef::Hub(model), name, stop: false, .. } => {
            let runtime = small_runtime()?;
            // Who wants another name than that of the file gets it from the hub alone, by this command.
            if name.is_none() && runtime.block_on(mesh_models::pull_of_hub(session, &model))? {
                return Ok(());
            }
            let entry = runtime.block_on(pull::pull(&store, &model, name, session.global.quiet))?;
            added(session, &entry, "pulled")
        }
        Models::Pull { model: ModelRef::Hub(model), stop: true, .. } => {
            small_runtime()?.block_on(mesh_models::end(session, &model.to_string()))
        }
        Models::Pull { model: ModelRef::Name(model), name: None, stop, .. } => {
            small_runtime()?.block_on(mesh_models::pull(session, &model, stop))
        }
        Models::Pull { .. } => Err(Failure::because(
            Code::Usage,
            "only a model of a hub can have another name or a path: pull hf:owner/repo[:quant] --name NAME. A model of the mesh keeps its \
             name, and its download can be stopped: pull NAME [--stop]",
        )),
        Models::Pin { names, off } => upkeep::pin(session, &store, &names, off),
        Models::Quota { quota } => upkeep::quota(session, &store, quota),
        Models::Gc { quota } => upkeep::collect(session, &store, quota.map(|quota| quota.0)),
        Models::Fsck => upkeep::check(session, &store),
        Models::Search { text: Some(text), hub: true, limit } => {
            small_runtime()?.block_on(hub::search(session, &text, limit.into()))
        }
        Models::Search { text, .. } => small_runtime()?.block_on(mesh_models::search(session, text.as_deref())),
        Models::Recommended { memory } => {
            small_runtime()?.block_on(recommended::run(session, &store, memory.map(|memory| memory.0)))
        }
    }
}

fn list(session: &Session, store: &Store) -> anyhow::Result<()> {
    let entries = store.list()?;
    if session.global.json {
        return ui::print_json(&entries.iter().map(as_json).collect::<Vec<_>>());
    }
    if entries.is_empty() {
        if !session.global.quiet {
            ui::say("no models yet: `murmur models import FILE` or `murmur models pull hf:owner/repo` adds one");
        }
        return Ok(());
    }
    let rows: Vec<Vec<String>> = entries
        .iter()
        .map(|entry| {
            let missing = match (&entry.origin, entry.path.exists()) {
                (_, true) => "",
                (Origin::Hub { .. }, false) => " (not here any more; pull it again)",
                (_, false) => " (missing!)",
            };
            vec![
                entry.name.to_string(),
                Size(entry.size_bytes).to_string(),
                pull::age(SystemTime::UNIX_EPOCH + Duration::from_secs(entry.added_unix_s)),
                entry.licence.as_deref().map_or_else(|| "-".to_owned(), ui::without_controls),
                format!("{}{missing}", origin(entry)),
            ]
        })
        .collect();
    ui::print(&ui::table(&["NAME", "SIZE", "ADDED", "LICENCE", "FROM"], &rows, &[1]))
}

fn remove(session: &Session, store: &Store, names: &[ModelName]) -> anyhow::Result<()> {
    let mut removed = Vec::new();
    for name in names {
        let outcome = store.remove(name)?;
        if !session.global.json && !session.global.quiet {
            let what = match outcome.freed_bytes {
                0 => format!("{} stays", outcome.entry.path.display()),
                freed => format!("{} freed", Size(freed)),
            };
            ui::say(&format!("removed {name}; {what}"));
        }
        removed.push(json!({"name": name, "path": outcome.entry.path, "freed_bytes": outcome.freed_bytes}));
    }
    if session.global.json { ui::print_json(&removed) } else { Ok(()) }
}

fn added(session: &Session, entry: &ModelEntry, how: &str) -> anyhow::Result<()> {
    let draft = drafts::offer(session, &session.store(), entry.name.as_str(), &entry.path);
    if session.global.json {
        let mut value = as_json(entry);
        value["draft"] = drafts::as_json(draft.as_ref());
        return ui::print_json(&value);
    }
    if !session.global.quiet {
        let licence = entry.licence.as_deref().map_or_else(String::new, |licence| format!(", licence {licence}"));
        let line = format!("{how} {} ({}{licence}): {}", entry.name, Size(entry.size_bytes), entry.path.display());
        ui::say(&ui::without_controls(&line));
        ui::say(&format!("try: murmur run {}", entry.name));
        draft.iter().for_each(|draft| ui::say(&draft.advice(entry.name.as_str())));
    }
    Ok(())
}

pub(super) fn as_json(entry: &ModelEntry) -> Value {
    json!({
        "name": entry.name,
        "path": entry.path,
        "present": entry.path.exists(),
        "size_bytes": entry.size_bytes,
        "added_unix_s": entry.added_unix_s,
        "origin": entry.origin,
        "licence": entry.licence,
        "pinned": entry.pinned,
    })
}

fn origin(entry: &ModelEntry) -> String {
    match &entry.origin {
        Origin::Reference => entry.path.display().to_string(),
        Origin::Copy => "copy".to_owned(),
        Origin::Hub { repo, file, .. } => format!("hf:{repo}:{file}"),
        Origin::Mesh { .. } => entry.asked_as.clone().unwrap_or_else(|| "mesh".to_owned()),
    }
}
