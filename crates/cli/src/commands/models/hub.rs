//! `murmur models search --hub`: what a hub has, and whether it fits this machine.

use murmur_node::fit;
use murmur_store::hub::{self, HubConfig, HubModel, HubModelFile};
use serde_json::{Value, json};

use super::{
    super::{Session, machine},
    drafts,
    recommended::Recommendations,
};
use crate::{
    exit::{Code, Failure},
    ui,
    units::Size,
};

/// Quantisations of one repository in the table.
const QUANTIZATIONS_SHOWN_MAX: usize = 4;

pub(super) async fn search(session: &Session, text: &str, repos_max: usize) -> anyhow::Result<()> {
    let config = HubConfig::from_env()?;
    let recommended = Recommendations::for_advice(session);
    let found = tokio::select! {
        found = hub::search(&config, text, repos_max) => found?,
        _ = tokio::signal::ctrl_c() => return Err(Failure::because(Code::Interrupted, "interrupted")),
    };
    let memory_bytes = machine::available_memory_bytes();
    if session.global.json {
        let models: Vec<Value> = found.iter().map(|model| as_json(model, memory_bytes, &recommended)).collect();
        return ui::print_json(&json!({"memory_bytes": memory_bytes, "models": models}));
    }
    if found.is_empty() {
        ui::say(&format!("{} has no GGUF models with '{text}' in their name", config.endpoint()));
        return Ok(());
    }
    let rows: Vec<Vec<String>> = found.iter().map(|model| row(model, memory_bytes)).collect();
    let headings = ["REPOSITORY", "LICENCE", "GATED", "DOWNLOADS", "TAKEN", "SIZE", "FITS", "ALSO"];
    ui::print(&ui::without_controls(&ui::table(&headings, &rows, &[3, 5])))?;
    if session.global.quiet {
        return Ok(());
    }
    ui::say(
        "TAKEN is what `murmur models pull hf:REPOSITORY` takes, and hf:REPOSITORY:QUANTISATION another one. FITS is an estimate",
    );
    if found.iter().any(|model| model.is_gated) && !config.has_token() {
        ui::say("gated: the licence is accepted on the repository's page, and HF_TOKEN says by whom");
    }
    for (target, draft) in found.iter().filter_map(|model| Some((model, draft_of(model, &recommended)?))) {
        ui::say(&ui::without_controls(&drafts::advice(&format!("hf:{}", target.repo), &draft)));
    }
    Ok(())
}

/// What runs with this file would take, about.
fn memory_bytes(file: &HubModelFile) -> Option<u64> {
    file.bytes.map(fit::estimated_bytes)
}

fn fits(file: &HubModelFile, available_bytes: Option<u64>) -> Option<bool> {
    Some(memory_bytes(file)? <= available_bytes?)
}

/// Who is recommended to guess for the models of a repository.
fn draft_of(model: &HubModel, recommended: &Recommendations) -> Option<String> {
    let mut names = model.files.iter().filter_map(|file| file.file.rsplit('/').next());
    names.find_map(|name| recommended.draft_of_file(name)).map(ToString::to_string)
}

fn named(file: &HubModelFile) -> String {
    file.quantization.clone().unwrap_or_else(|| file.file.clone())
}

fn sized(file: &HubModelFile) -> String {
    file.bytes.map_or_else(|| "?".to_owned(), |bytes| Size(bytes).to_string())
}

fn row(model: &HubModel, available_bytes: Option<u64>) -> Vec<String> {
    let taken = model.preferred.and_then(|at| model.files.get(at));
    let others = model.files.iter().enumerate().filter(|(at, _)| Some(*at) != model.preferred);
    let others: Vec<String> = others.map(|(_, file)| format!("{} {}", named(file), sized(file))).collect();
    let mut also = others.iter().take(QUANTIZATIONS_SHOWN_MAX).cloned().collect::<Vec<_>>().join(", ");
    if others.len() > QUANTIZATIONS_SHOWN_MAX {
        also.push_str(&format!(" and {} more", others.len() - QUANTIZATIONS_SHOWN_MAX));
    }
    vec![
        model.repo.clone(),
        model.licence.clone().unwrap_or_else(|| "-".to_owned()),
        if model.is_gated { "yes" } else { "no" }.to_owned(),
        model.downloads.map_or_else(|| "-".to_owned(), |downloads| downloads.to_string()),
        taken.map_or_else(|| "-".to_owned(), named),
        taken.map_or_else(|| "-".to_owned(), sized),
        match taken.and_then(|file| fits(file, available_bytes)) {
            Some(true) => "yes",
            Some(false) => "no",
            None => "?",
        }
        .to_owned(),
        also,
    ]
}

fn as_json(model: &HubModel, available_bytes: Option<u64>, recommended: &Recommendations) -> Value {
    let file = |file: &HubModelFile| {
        json!({
            "file": file.file,
            "quantization": file.quantization,
            "bytes": file.bytes,
            "memory_bytes_estimated": memory_bytes(file),
            "fits": fits(file, available_bytes),
        })
    };
    json!({
        "repo": model.repo,
        "licence": model.licence,
        "gated": model.is_gated,
        "downloads": model.downloads,
        "preferred": model.preferred.and_then(|at| model.files.get(at)).map(|file| &file.file),
        "files": model.files.iter().map(file).collect::<Vec<_>>(),
        "draft": draft_of(model, recommended),
    })
}
