//! Downloads with a progress bar.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use murmur_store::{
    Download, HubRef, ModelEntry, ModelName, Store,
    hub::{HubConfig, OnPullEvent, PullEvent},
};

use crate::{
    exit::{Code, Failure},
    ui,
    units::{Size, human_duration},
};

/// Pulls a model; Ctrl-C ends it and keeps what is there.
pub(crate) async fn pull(
    store: &Store,
    reference: &HubRef,
    name: Option<ModelName>,
    quiet: bool,
) -> anyhow::Result<ModelEntry> {
    let config = HubConfig::from_env()?;
    let progress = Progress::new(quiet);
    tokio::select! {
        entry = store.pull(&config, reference, name, progress.listener()) => {
            progress.finish();
            Ok(entry?)
        }
        _ = tokio::signal::ctrl_c() => {
            progress.finish();
            Err(Failure::because(Code::Interrupted, "interrupted. What was downloaded is kept: pull again to go on."))
        }
    }
}

struct Progress {
    bar: Arc<Mutex<Option<ProgressBar>>>,
    quiet: bool,
}

impl Progress {
    fn new(quiet: bool) -> Self {
        Self { bar: Arc::default(), quiet }
    }

    fn listener(&self) -> OnPullEvent {
        let (bar, quiet) = (Arc::clone(&self.bar), self.quiet);
        Arc::new(move |event| {
            let Ok(mut bar) = bar.lock() else { return };
            match event {
                _ if quiet => {}
                PullEvent::MadeRoom { removed } => {
                    removed.iter().for_each(|download| ui::say(&removal(download)));
                }
                PullEvent::Chosen { file, licence, total_bytes, resumed_bytes } => {
                    let going_on = if resumed_bytes > 0 {
                        format!(", going on after {}", Size(resumed_bytes))
                    } else {
                        String::new()
                    };
                    let licence = licence.map_or_else(String::new, |licence| format!(", licence {licence}"));
                    let line = format!("pulling {file} ({}{licence}{going_on})", Size(total_bytes));
                    ui::say(&ui::without_controls(&line));
                    *bar = Some(new_bar(total_bytes, resumed_bytes));
                }
                PullEvent::AlreadyThere { file } => {
                    ui::say(&format!("{} is in the hub's cache already", ui::without_controls(&file)))
                }
                PullEvent::Progress { done_bytes, .. } => {
                    if let Some(bar) = bar.as_ref() {
                        bar.set_position(done_bytes);
                    }
                }
                PullEvent::Retrying { pause, why } => {
                    let line = format!("{}; trying again in {}", ui::without_controls(&why), human_duration(pause));
                    match bar.as_ref() {
                        Some(bar) => bar.suspend(|| ui::say(&line)),
                        None => ui::say(&line),
                    }
                }
            }
        })
    }

    fn finish(&self) {
        if let Ok(Some(bar)) = self.bar.lock().as_deref_mut() {
            bar.finish_and_clear();
        }
    }
}

/// What went to make room, and why it was this.
pub(crate) fn removal(download: &Download) -> String {
    let name = match download.names.as_slice() {
        [] => download.nameless(),
        names => names.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
    };
    let part = if download.is_whole { "" } else { "only a part of it was here, " };
    format!("removed {name} to make room, {} freed: {part}last used {}", Size(download.bytes), age(download.used))
}

/// How long ago something was, as people say it.
pub(crate) fn age(then: SystemTime) -> String {
    let seconds = SystemTime::now().duration_since(then).map_or(0, |age| age.as_secs());
    match seconds {
        0..120 => "just now".to_owned(),
        120..7200 => format!("{} minutes ago", seconds / 60),
        7200..172_800 => format!("{} hours ago", seconds / 3600),
        _ => format!("{} days ago", seconds / 86_400),
    }
}

/// Draws on standard error, and only when that is a terminal.
pub(crate) fn new_bar(total_bytes: u64, resumed_bytes: u64) -> ProgressBar {
    const REDRAWS_PER_SECOND: u8 = 8;
    let bar = ProgressBar::with_draw_target(Some(total_bytes), ProgressDrawTarget::stderr_with_hz(REDRAWS_PER_SECOND));
    if let Ok(style) = ProgressStyle::with_template(
        "{wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta} {msg}",
    ) {
        bar.set_style(style);
    }
    bar.set_position(resumed_bytes);
    bar.reset_eta();
    bar.enable_steady_tick(Duration::from_secs(1));
    bar
}
