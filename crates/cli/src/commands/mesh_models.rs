//! `murmur models pull` where a server runs, and `search` for the models of a mesh: the server does the work, and a pull goes on there when the
//! terminal in which it was begun has gone.

use std::path::Path;

use indicatif::ProgressBar;
use murmur_protocol::mesh::NodeId;
use murmur_store::{HubRef, ModelName, ModelRef};
use serde_json::{Value, json};

use super::{
    Session,
    models::{drafts, recommended::Recommendations},
};
use crate::{
    exit::{Code, Failure},
    membership::own_node,
    pull, ui,
    units::Size,
};

/// Signers of a file that a list names.
const SIGNERS_SHOWN_MAX: usize = 3;

/// Has the server fetch a model of the mesh, or end that.
pub(super) async fn pull(session: &Session, model: &ModelName, stop: bool) -> anyhow::Result<()> {
    let client = session.client();
    if !client.is_there().await {
        return Err(Failure::because(
            Code::Unavailable,
            format!(
                "{model} would be a model of a mesh, which is pulled by the server that is in it, and none listens at {}. Start one, such as \
                 `murmur client --mesh NAME`; or name a model of a hub as hf:owner/repo[:quant]",
                client.address()
            ),
        ));
    }
    if stop {
        return end(session, model.as_str()).await;
    }
    match fetch(session, model.as_str(), None).await? {
        Fetched::Whole(event) => done(session, model.as_str(), &event),
        Fetched::Nowhere(reason) => Err(Failure::because(Code::Failed, reason)),
    }
}

/// Has the server fetch a model if this key has signed it.
pub(super) async fn pull_signed(session: &Session, model: &ModelRef, signer: &NodeId) -> anyhow::Result<()> {
    let wanted = match model {
        ModelRef::Name(name) => name.to_string(),
        ModelRef::Hub(reference) => reference.to_string(),
        ModelRef::Path(path) => {
            let advice = format!("{} is a file: `murmur models show` tells who has signed it", path.display());
            return Err(Failure::because(Code::Usage, advice));
        }
    };
    let status = session.client().get("/api/status").await.unwrap_or_default();
    if !status["mesh"].is_object() {
        return Err(Failure::because(
            Code::Unavailable,
            format!(
                "who has signed a model is known to the nodes of a mesh alone, and no server that is in one listens at {}. Start one, such as \
                 `murmur client --mesh NAME`",
                session.client().address()
            ),
        ));
    }
    match fetch(session, &wanted, Some(signer)).await? {
        Fetched::Whole(event) => done(session, &wanted, &event),
        Fetched::Nowhere(reason) => Err(Failure::because(Code::Failed, reason)),
    }
}

/// Has the server of this machine fetch a model of a hub, and says so. False: see [`fetch_of_hub`].
pub(super) async fn pull_of_hub(session: &Session, model: &HubRef) -> anyhow::Result<bool> {
    match fetch_of_hub(session, model).await? {
        Some(event) => done(session, &model.to_string(), &event).map(|()| true),
        None => Ok(false),
    }
}

/// Has a server with the same store fetch a model of a hub, which goes on when this command has gone: from the hub, and from other nodes at the
/// same time if it is in a mesh. Returns what it says in the end. `None`: there is no such server, it is here already, or the server gets it
/// nowhere.
pub(crate) async fn fetch_of_hub(session: &Session, model: &HubRef) -> anyhow::Result<Option<Value>> {
    // No server is no failure: then this command fetches it.
    let status = session.client().get("/api/status").await.unwrap_or_default();
    if !has_store_of(session, &status) || session.store().find_pulled(model)?.is_some() {
        return Ok(None);
    }
    match fetch(session, &model.to_string(), None).await? {
        Fetched::Whole(event) => Ok(Some(event)),
        Fetched::Nowhere(reason) => {
            if !session.global.quiet {
                ui::say(&format!("the server does not get it ({reason}): it is pulled here"));
            }
            Ok(None)
        }
    }
}

/// Whether a server with this status keeps its models where this command does.
fn has_store_of(session: &Session, status: &Value) -> bool {
    let settled = |path: &Path| path.canonicalize().or_else(|_| std::path::absolute(path)).ok();
    let its = status["node"]["data_dir"].as_str().and_then(|path| settled(Path::new(path)));
    its.is_some() && its == settled(&session.data_dir)
}

/// Ends what the server fetches.
pub(super) async fn end(session: &Session, model: &str) -> anyhow::Result<()> {
    let answer = session.client().post("/api/models/stop", &json!({"model": model})).await?;
    if session.global.json {
        return ui::print_json(&answer);
    }
    let what = if answer["stopped"] == true { "stopped; what has come is kept" } else { "was not being pulled" };
    ui::say(&format!("{model} {what}"));
    Ok(())
}

/// How a fetch by the server has ended, if not by a failure.
enum Fetched {
    /// And what the server says of it.
    Whole(Value),
    /// No node has it; what the server says of that.
    Nowhere(String),
}

/// Has the server fetch a model, and shows how far it is. Ctrl-C ends the showing only.
async fn fetch(session: &Session, model: &str, signer: Option<&NodeId>) -> anyhow::Result<Fetched> {
    let mut order = json!({"model": model});
    if let Some(signer) = signer {
        order["signed_by"] = signer.to_string().into();
    }
    let mut events = session.client().stream("/api/models/pull", &order).await?;
    let mut shown: Option<ProgressBar> = None;
    loop {
        let event = tokio::select! {
            event = events.next() => event?,
            _ = tokio::signal::ctrl_c() => {
                shown.iter().for_each(ProgressBar::finish_and_clear);
                let advice = format!(
                    "the server goes on with it. `murmur models pull {model}` shows how far it is, with --stop it ends"
                );
                return Err(Failure::because(Code::Interrupted, advice));
            }
        };
        let Some(event) = event else {
            return Err(Failure::because(Code::Unavailable, "the server has ended. Pull again: what has come is kept"));
        };
        let event: Value = serde_json::from_str(&event)?;
        let bytes = |what: &str| event.get(what).and_then(Value::as_u64).unwrap_or(0);
        let (total, held) = (bytes("file_bytes"), bytes("held_bytes"));
        match event["state"].as_str() {
            Some("fetching") if !session.global.quiet => {
                let bar = shown.get_or_insert_with(|| {
                    let from = if event["from"] == "hub" { "hub" } else { "mesh" };
                    ui::say(&format!("pulling {model} ({}) from the {from}", Size(total)));
                    pull::new_bar(total, held)
                });
                bar.set_position(held);
                bar.set_message(sources(&event["fetch"]));
            }
            Some("done") => {
                shown.iter().for_each(ProgressBar::finish_and_clear);
                return Ok(Fetched::Whole(event));
            }
            Some("failed") => {
                shown.iter().for_each(ProgressBar::finish_and_clear);
                let reason = event["reason"].as_str().unwrap_or("the server does not say why");
                let reason = ui::without_controls(reason);
                return match event["nowhere"] == true {
                    true => Ok(Fetched::Nowhere(reason)),
                    false => Err(Failure::because(Code::Failed, reason)),
                };
            }
            _ => {}
        }
    }
}

fn done(session: &Session, model: &str, event: &Value) -> anyhow::Result<()> {
    // What it is called in the store.
    let name = ui::without_controls(event["name"].as_str().unwrap_or(model));
    let entry = name.parse::<ModelName>().ok().and_then(|name| session.store().get(&name).ok());
    if session.global.json {
        // As a pull without a server tells it, and what the server says besides.
        let mut value = entry.as_ref().map_or_else(|| json!({}), super::models::as_json);
        for (key, said) in event.as_object().into_iter().flatten() {
            value[key] = said.clone();
        }
        return ui::print_json(&value);
    }
    let total = event["file_bytes"].as_u64().unwrap_or(0);
    let licence = entry.and_then(|entry| entry.licence).map_or_else(String::new, |name| format!(", licence {name}"));
    let copied = event["copied_bytes"].as_u64().filter(|copied| *copied > 0);
    let copied =
        copied.map_or_else(String::new, |copied| format!(", {} of it from files that were here", Size(copied)));
    ui::say(&ui::without_controls(&format!("pulled {model} ({}{copied}{licence})", Size(total))));
    let signatures = event["signatures"].as_array().into_iter().flatten();
    signatures.filter_map(|one| one["signer"].as_str()).for_each(|key| ui::say(&format!("signed by {key}")));
    ui::say(&format!("try: murmur run {name}"));
    let path = event["path"].as_str().map(Path::new).filter(|path| path.exists());
    let draft = path.and_then(|path| drafts::offer(session, &session.store(), &name, path));
    draft.iter().for_each(|draft| ui::say(&draft.advice(&name)));
    Ok(())
}

/// From how many nodes something comes, and whether from another file of this machine, or why nothing does.
fn sources(fetch: &Value) -> String {
    if let Some(stuck) = fetch["stuck"].as_str() {
        return ui::without_controls(stuck);
    }
    let sources = fetch["sources"].as_array().into_iter().flatten();
    let owing = sources.filter(|source| source["owed_requests"].as_u64() > Some(0));
    let (files, nodes): (Vec<_>, Vec<_>) = owing.partition(|source| source["file"].is_string());
    let nodes = match nodes.len() {
        0 => None,
        1 => Some("from 1 node".to_owned()),
        nodes => Some(format!("from {nodes} nodes")),
    };
    let files = (!files.is_empty()).then(|| "from another file that is here".to_owned());
    nodes.into_iter().chain(files).collect::<Vec<_>>().join(" and ")
}

/// What there is in the mesh, and who has signed it.
pub(super) async fn search(session: &Session, text: Option<&str>) -> anyhow::Result<()> {
    let mut answer = session.client().get("/api/models").await?;
    let signed = session.client().get("/api/models/signatures").await?;
    let own = own_node(&session.data_dir)?;
    for file in answer["models"].as_array_mut().into_iter().flatten() {
        file["signatures"] = signatures_of(file, &signed["signatures"], own);
    }
    let wanted = text.unwrap_or_default().to_lowercase();
    let is_wanted = |file: &&Value| file["name"].as_str().is_some_and(|name| name.to_lowercase().contains(&wanted));
    let files: Vec<&Value> = answer["models"].as_array().into_iter().flatten().filter(is_wanted).collect();
    let recommended = Recommendations::for_advice(session);
    let draft = |file: &Value| recommended.draft_of_file(file["name"].as_str()?).map(ToString::to_string);
    if session.global.json {
        let with_draft = |file: &Value| {
            let mut file = file.clone();
            file["draft"] = draft(&file).into();
            file
        };
        return ui::print_json(&files.into_iter().map(with_draft).collect::<Vec<_>>());
    }
    if files.is_empty() {
        ui::say("no node of the mesh has such a model");
        return Ok(());
    }
    let rows: Vec<Vec<String>> = files.iter().map(|file| row(file)).collect();
    let headings = ["NAME", "SIZE", "HERE", "NODES", "NEAREST", "TOK/S HERE", "DIGEST", "SIGNED BY"];
    ui::print(&ui::table(&headings, &rows, &[1, 2, 3, 4, 5]))?;
    if !session.global.quiet {
        if files.iter().any(|file| file["speed"]["is_estimate"] == true) {
            ui::say(
                "~ is an estimate by how fast this machine reads memory; a model with experts is faster. - does not fit here",
            );
        }
        for (file, draft) in files.iter().filter_map(|file| Some((file["name"].as_str()?, draft(file)?))) {
            ui::say(&ui::without_controls(&drafts::advice(file, &draft)));
        }
    }
    Ok(())
}

/// What was signed of a file, and whether with the key of this machine.
fn signatures_of(file: &Value, signed: &Value, own: Option<NodeId>) -> Value {
    let known = file["digest"].as_str().and_then(|digest| signed[digest].as_array());
    let with_own = |one: &Value| {
        let mut one = one.clone();
        one["own"] = own.is_some_and(|own| one["signer"] == own.to_string()).into();
        one
    };
    known.into_iter().flatten().map(with_own).collect()
}

/// The keys that have signed a file, by their first digits.
fn signers(file: &Value) -> String {
    let signatures = file["signatures"].as_array().map(Vec::as_slice).unwrap_or_default();
    let short = |one: &Value| match (one["own"] == true, one["signer"].as_str().map(str::parse::<NodeId>)) {
        (true, _) => "this machine".to_owned(),
        (false, Some(Ok(signer))) => signer.short(),
        (false, _) => "?".to_owned(),
    };
    let shown: Vec<String> = signatures.iter().take(SIGNERS_SHOWN_MAX).map(short).collect();
    match signatures.len().saturating_sub(SIGNERS_SHOWN_MAX) {
        _ if shown.is_empty() => "-".to_owned(),
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

fn row(file: &Value) -> Vec<String> {
    let total = file["file_bytes"].as_u64().unwrap_or(0);
    let part = |bytes: &Value| match bytes.as_u64() {
        Some(0) | None => "-".to_owned(),
        Some(bytes) => format!("{} %", bytes.saturating_mul(100) / total.max(1)),
    };
    let nodes = file["nodes"].as_array().map(Vec::as_slice).unwrap_or_default();
    let nearest = nodes.iter().filter_map(|node| node["rtt_ms"].as_f64()).min_by(f64::total_cmp);
    vec![
        ui::without_controls(file["name"].as_str().unwrap_or_default()),
        Size(total).to_string(),
        part(&file["held_bytes"]),
        nodes.len().to_string(),
        nearest.map_or_else(|| "-".to_owned(), |ms| format!("{ms:.0} ms")),
        speed(&file["speed"]),
        file["digest"].as_str().unwrap_or_default().chars().take(16).collect(),
        signers(file),
    ]
}

/// Tokens a second on this machine.
fn speed(speed: &Value) -> String {
    let about = if speed["is_estimate"] == true { "~" } else { "" };
    match speed["tokens_per_s"].as_f64() {
        None => "-".to_owned(),
        Some(slow) if slow < 9.95 => format!("{about}{slow:.1}"),
        Some(fast) => format!("{about}{fast:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_speed_is_marked_where_it_is_an_estimate_and_left_out_where_there_is_none() {
        let shown = |tokens_per_s: f64, is_estimate: bool| {
            speed(&json!({"tokens_per_s": tokens_per_s, "is_estimate": is_estimate}))
        };
        assert_eq!([shown(41.4, false), shown(9.96, true), shown(0.31, true)], ["41", "~10", "~0.3"]);
        assert_eq!(speed(&Value::Null), "-");
    }
}
