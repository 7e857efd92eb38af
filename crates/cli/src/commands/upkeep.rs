//! `murmur models pin`, `quota`, `gc` and `fsck`: what stays, what goes, and whether it is right.

use std::{io::IsTerminal, time::UNIX_EPOCH};

use indicatif::{ProgressBar, ProgressDrawTarget};
use murmur_store::{Checked, Collected, Download, Health, ModelName, Stays, Store};
use serde_json::{Value, json};

use super::Session;
use crate::{
    args::Quota,
    exit::{Code, Failure},
    pull, ui,
    units::Size,
};

/// Keeps models whatever the quota, or does not any more.
pub(super) fn pin(session: &Session, store: &Store, names: &[ModelName], off: bool) -> anyhow::Result<()> {
    for name in names {
        if off { store.unpin(name) } else { store.pin(name) }?;
        if !session.global.json && !session.global.quiet {
            ui::say(&format!("{name} {}", if off { "may go when room is short" } else { "stays" }));
        }
    }
    if session.global.json { ui::print_json(&json!({"names": names, "pinned": !off})) } else { Ok(()) }
}

/// Removes what was downloaded until the rest takes no more than `quota_bytes`, or the store's own quota, or nothing.
pub(super) fn collect(session: &Session, store: &Store, quota_bytes: Option<u64>) -> anyhow::Result<()> {
    let quota_bytes = quota_bytes.or(store.quota()?).unwrap_or(0);
    let collected = store.collect(quota_bytes)?;
    if session.global.json {
        let removed: Vec<Value> = collected.removed.iter().map(download_as_json).collect();
        return ui::print_json(&json!({
            "freed_bytes": collected.freed_bytes, "left_bytes": collected.left_bytes, "removed": removed,
        }));
    }
    told(session, &collected, quota_bytes);
    Ok(())
}

fn told(session: &Session, collected: &Collected, quota_bytes: u64) {
    if !session.global.quiet {
        collected.removed.iter().for_each(|download| ui::say(&pull::removal(download)));
    }
    ui::say(&format!("{} freed, {} left", Size(collected.freed_bytes), Size(collected.left_bytes)));
    if collected.left_bytes > quota_bytes && !session.global.quiet {
        ui::say(&format!("the rest is pinned or in use, and more than {}", Size(quota_bytes)));
    }
}

/// Sets the quota and removes what is too much; without a new one, shows it and what takes it.
pub(super) fn quota(session: &Session, store: &Store, quota: Option<Quota>) -> anyhow::Result<()> {
    match quota {
        Some(Quota::Unlimited) => store.set_quota(None)?,
        Some(Quota::Bytes(bytes)) => {
            store.set_quota(Some(bytes))?;
            let collected = store.collect(bytes)?;
            if !session.global.json {
                told(session, &collected, bytes);
                return Ok(());
            }
        }
        None => {}
    }
    let (quota_bytes, downloads) = (store.quota()?, store.downloads()?);
    let taken_bytes: u64 = downloads.iter().map(|download| download.bytes).sum();
    if session.global.json {
        let downloads: Vec<Value> = downloads.iter().map(download_as_json).collect();
        return ui::print_json(
            &json!({"quota_bytes": quota_bytes, "taken_bytes": taken_bytes, "downloads": downloads}),
        );
    }
    if !downloads.is_empty() {
        let rows: Vec<Vec<String>> = downloads.iter().map(download_row).collect();
        ui::print(&ui::table(&["NAME", "SIZE", "USED", "STAYS"], &rows, &[1]))?;
    }
    let may = quota_bytes.map_or_else(
        || "no quota: `murmur models quota SIZE` sets one".to_owned(),
        |bytes| format!("the quota is {}", Size(bytes)),
    );
    ui::say(&format!("downloads take {}; {may}", Size(taken_bytes)));
    Ok(())
}

fn download_row(download: &Download) -> Vec<String> {
    let names: Vec<&str> = download.names.iter().map(ModelName::as_str).collect();
    let stays = match download.stays {
        Some(Stays::Pinned) => "pinned",
        Some(Stays::InUse) => "in use",
        None => "-",
    };
    let name = if names.is_empty() { "-".to_owned() } else { names.join(", ") };
    vec![name, Size(download.bytes).to_string(), pull::age(download.used), stays.to_owned()]
}

fn download_as_json(download: &Download) -> Value {
    json!({
        "names": download.names,
        "digest": download.digest,
        "path": download.path,
        "bytes": download.bytes,
        "is_whole": download.is_whole,
        "used_unix_s": download.used.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        "stays": download.stays.map(|stays| match stays {
            Stays::Pinned => "pinned",
            Stays::InUse => "in_use",
        }),
    })
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
