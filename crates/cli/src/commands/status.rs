//! `murmur status`: what the running server does.

use std::fmt::Write;

use murmur_protocol::mesh::id::SHORT_DIGITS;
use serde_json::Value;

use super::{Session, small_runtime};
use crate::{ui, units::Size};

pub(super) fn run(session: &Session) -> anyhow::Result<()> {
    let client = session.client();
    let status = small_runtime()?.block_on(client.get("/api/status"))?;
    if session.global.json {
        return ui::print_json(&status);
    }
    let version = status.get("version").map(plain).unwrap_or_default();
    let mut page = format!("murmur {version} at http://{}\n", client.address());
    if let Some(name) = status.pointer("/mesh/name") {
        let nodes = match status.pointer("/mesh/peers").and_then(Value::as_u64).unwrap_or(0) {
            0 => "no other nodes".to_owned(),
            1 => "1 other node".to_owned(),
            peers => format!("{peers} other nodes"),
        };
        // Writing to a string cannot fail.
        let _ = writeln!(page, "mesh {}: {nodes}", plain(name));
    }
    if let Some(reason) = status.pointer("/node/sharing/paused").and_then(Value::as_str) {
        let _ = writeln!(page, "paused for other nodes: {reason}");
    }
    let models = list(&status, "/models");
    if models.is_empty() {
        page.push_str("no models\n");
    } else {
        page.push('\n');
        page.push_str(&models_table(models, list(&status, "/node/models")));
    }
    for model in models {
        if let (Some(id), Some(reason)) = (model.get("id"), model.get("reason").and_then(Value::as_str)) {
            let _ = writeln!(page, "{}: {reason}", plain(id));
        }
    }
    let stages = stage_rows(list(&status, "/node/models"));
    if !stages.is_empty() {
        page.push('\n');
        page.push_str(&ui::table(
            &["STAGE OF", "LAYERS", "WHERE", "STEP ms", "RESTARTS", "WEIGHTS", "KV CELLS"],
            &stages,
            &[3, 4, 5, 6],
        ));
    }
    ui::print(&ui::without_controls(&page))
}

fn list<'a>(value: &'a Value, pointer: &str) -> &'a [Value] {
    value.pointer(pointer).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}

/// What the API knows of each model, beside what the node does with it.
fn models_table(models: &[Value], at_work: &[Value]) -> String {
    let rows: Vec<Vec<String>> = models
        .iter()
        .map(|model| {
            let work = at_work.iter().find(|other| other.get("id") == model.get("id"));
            let known = |name: &str| model.get(name).map(plain).unwrap_or_default();
            let counted = |name: &str| work.and_then(|work| work.get(name)).map(plain).unwrap_or_default();
            let memory = work.and_then(|work| work.get("memory_bytes_planned")).and_then(Value::as_u64);
            vec![
                known("id"),
                known("state"),
                known("context_tokens"),
                memory.map(|bytes| Size(bytes).to_string()).unwrap_or_default(),
                counted("requests_running"),
                counted("requests_queued"),
                counted("prompt_tokens"),
                counted("generated_tokens"),
                model
                    .pointer("/details/served_by")
                    .and_then(Value::as_array)
                    .map(|n| n.len().to_string())
                    .unwrap_or_default(),
            ]
        })
        .collect();
    let headings =
        ["MODEL", "STATE", "CONTEXT", "MEMORY", "RUNNING", "QUEUED", "PROMPT TOKENS", "GENERATED", "OTHER NODES"];
    ui::table(&headings, &rows, &[2, 3, 4, 5, 6, 7, 8])
}

fn stage_rows(at_work: &[Value]) -> Vec<Vec<String>> {
    let mut rows = Vec::new();
    for model in at_work {
        for stage in list(model, "/stages") {
            let layer = |end: &str| stage.pointer(end).map(plain).unwrap_or_default();
            let weights = stage.get("weight_bytes").and_then(Value::as_u64);
            let step_us = stage.pointer("/last_step/compute_us").and_then(Value::as_f64);
            rows.push(vec![
                model.get("id").map(plain).unwrap_or_default(),
                format!("{} to {}", layer("/layers/0"), layer("/layers/1")),
                place(stage),
                step_us.map(|us| format!("{:.2}", us / 1000.0)).unwrap_or_default(),
                stage.get("restarts").map(plain).unwrap_or_default(),
                weights.map(|bytes| Size(bytes).to_string()).unwrap_or_default(),
                stage.get("kv_cells").map(plain).unwrap_or_default(),
            ]);
        }
    }
    rows
}

/// Where a stage runs.
fn place(stage: &Value) -> String {
    match (stage.get("process_id").and_then(Value::as_u64), stage.get("node").and_then(Value::as_str)) {
        (Some(process), _) => format!("process {process}"),
        (None, Some(node)) => format!("node {}", node.get(..SHORT_DIGITS).unwrap_or(node)),
        (None, None) => "lost".to_owned(),
    }
}

/// A value for people: texts without quotes.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".to_owned(),
        other => other.to_string(),
    }
}
