//! `murmur models pin`, `gc` and `fsck`: what stays, what goes, and whether it is right.

use std::{collections::HashSet, io::IsTerminal};

use indicatif::{ProgressBar, ProgressDrawTarget};
use murmur_gguf::Digest;
use murmur_store::{Checked, Health, ModelName, Store};
use serde_json::{Value, json};

use super::{Session, small_runtime};
use crate::{
    exit::{Code, Failure},
    pull, ui,
    units::Size,
};

/// Keeps models whatever the quota, or does not any more.
pub(super) fn pin(session: &Session, store: &Store, names: &[ModelName], off: bool) -> anyhow::Result<()> {
    for name in names {
        if off { store.unpin(name) } else { store.pin(name) }?;
        if !session.global.json && !session.global.quiet {
            ui::say(&format!("{name} {}", if off { "goes when room is short" } else { "stays" }));
        }
    }
    if session.global.json { ui::print_json(&json!({"names": names, "pinned": !off})) } else { Ok(()) }
}

/// Removes what came from other nodes until the rest takes no more than `quota_bytes`.
pub(super) fn collect(session: &Session, store: &Store, quota_bytes: u64) -> anyhow::Result<()> {
    // What a server here has in hand stays. No server has nothing.
    let status = small_runtime()?.block_on(session.client().get("/api/status")).unwrap_or_default();
    let digests = status["node"]["contents"].as_array().into_iter().flatten();
    let in_use: HashSet<Digest> = digests.filter_map(|content| content["digest"].as_str()?.parse().ok()).collect();
    let collected = store.collect(quota_bytes, &in_use)?;
    if session.global.json {
        let removed =
            collected.removed.iter().map(|entry| json!({"digest": entry.digest, "held_bytes": entry.held_bytes}));
        return ui::print_json(&json!({
            "freed_bytes": collected.freed_bytes,
            "left_bytes": collected.left_bytes,
            "removed": removed.collect::<Vec<_>>(),
        }));
    }
    ui::say(&format!("{} freed, {} left", Size(collected.freed_bytes), Size(collected.left_bytes)));
    if collected.left_bytes > quota_bytes && !session.global.quiet {
        ui::say(&format!("the rest is pinned or in use, and more than {}", Size(quota_bytes)));
    }
    Ok(())
}

/// Reads everything through. What is damaged is fetched again when it is wanted next.
pub(super) fn check(session: &Session, store: &Store) -> anyhow::Result<()> {
    let mut bar: Option<ProgressBar> = None;
    let is_shown = !session.global.quiet && std::io::stderr().is_terminal();
    let report = store.fsck(&mut |done, total| {
        let bar = bar.get_or_insert_with(|| match is_shown {
            true => pull::new_bar(total, 0),
            false => ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::hidden()),
        });
        bar.set_position(done);
    });
    bar.iter().for_each(ProgressBar::finish_and_clear);
    let report = report?;
    if session.global.json {
        ui::print_json(&report.iter().map(as_json).collect::<Vec<_>>())?;
    } else {
        let rows: Vec<Vec<String>> = report.iter().map(row).collect();
        ui::print(&ui::table(&["NAME", "STATE", "FILE"], &rows, &[]))?;
    }
    match report.iter().filter(|checked| !matches!(checked.health, Health::Ok { .. })).count() {
        0 => Ok(()),
        bad => Err(Failure::because(
            Code::Failed,
            format!(
                "{bad} of {} files are not as they should be. Pull them again: only what is damaged is fetched",
                report.len()
            ),
        )),
    }
}

fn state(health: &Health) -> String {
    match health {
        Health::Ok { held_bytes } => format!("ok, {}", Size(*held_bytes)),
        Health::Damaged { ranges } => {
            format!("damaged, {}", Size(ranges.iter().map(|range| range.end - range.start).sum()))
        }
        Health::Missing => "missing".to_owned(),
        Health::Unusable { why } => why.clone(),
    }
}

fn row(checked: &Checked) -> Vec<String> {
    let name = checked.name.as_ref().map_or_else(|| "-".to_owned(), ToString::to_string);
    vec![name, state(&checked.health), checked.path.display().to_string()]
}

fn as_json(checked: &Checked) -> Value {
    json!({
        "name": checked.name,
        "digest": checked.digest,
        "path": checked.path,
        "ok": matches!(checked.health, Health::Ok { .. }),
        "state": state(&checked.health),
    })
}
