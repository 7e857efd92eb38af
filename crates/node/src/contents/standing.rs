//! How far a fetch is, for those who wait for it and for those who look.

use std::{fmt, path::PathBuf, time::Instant};

use murmur_core::swarm::{Progress, SourceId, SourceProgress, SourceState};
use murmur_protocol::mesh::NodeId;
use murmur_store::HubRef;
use serde_json::{Value, json};

/// Who is asked for a file.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Who {
    Node(NodeId),
    /// The hub, for this file of it.
    Hub(HubRef),
    /// Another file of this machine.
    Twin(PathBuf),
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Who::Node(node) => write!(f, "{node}"),
            Who::Hub(source) => write!(f, "{source}"),
            Who::Twin(path) => write!(f, "{}", path.display()),
        }
    }
}

/// How far a fetch is.
#[derive(Debug, Clone, Default)]
pub(crate) struct Standing {
    /// Since when nobody has what is missing, and what is known of that.
    pub(super) stuck: Option<(Instant, String)>,
    /// Why it cannot go on here.
    pub(super) broken: Option<String>,
    pub(super) progress: Option<Progress>,
    /// Who is asked, by number in `progress`.
    pub(super) sources: Vec<(SourceId, Who)>,
    /// Why the hub is not asked, if it could be.
    pub(super) no_hub: Option<String>,
}

impl Standing {
    /// For `/api/status`: how far it is, and what each source does for it. `None` before it has begun.
    pub(super) fn view(&self) -> Option<Value> {
        let progress = self.progress.as_ref()?;
        Some(json!({
            "wanted_bytes": progress.wanted_bytes,
            "done_bytes": progress.done_bytes,
            "doubled_bytes": progress.doubled_bytes,
            "bytes_per_s": progress.bytes_per_s as u64,
            "eta_s": progress.eta_ms.map(|ms| ms as f64 / 1e3),
            "stuck": self.why_nothing_comes(progress),
            "sources": progress.sources.iter().map(|source| self.view_source(source)).collect::<Vec<_>>(),
            "no_hub": self.no_hub,
        }))
    }

    fn view_source(&self, source: &SourceProgress) -> Value {
        let who = self.sources.iter().find(|(id, _)| *id == source.id).map(|(_, who)| who);
        let name = |is_it: fn(&Who) -> bool| who.filter(|who| is_it(who)).map(ToString::to_string);
        json!({
            "node": name(|who| matches!(who, Who::Node(_))),
            "hub": name(|who| matches!(who, Who::Hub(_))),
            "file": name(|who| matches!(who, Who::Twin(_))),
            "state": state(source.state),
            "rtt_ms": source.rtt_ms,
            "bytes_per_s": source.bytes_per_s as u64,
            "received_bytes": source.received_bytes,
            "owed_requests": source.owes.len(),
        })
    }

    fn why_nothing_comes(&self, progress: &Progress) -> Option<String> {
        let stuck = self.stuck.as_ref().map(|(_, reason)| reason.clone());
        let is_ready = |source: &SourceProgress| matches!(source.state, SourceState::Ready);
        let waits = !progress.sources.is_empty() && !progress.sources.iter().any(is_ready);
        stuck
            .or_else(|| waits.then(|| "those that have some of it are busy or silent; they are asked again".to_owned()))
    }
}

fn state(state: SourceState) -> &'static str {
    match state {
        SourceState::Ready => "ready",
        SourceState::Paused { .. } => "paused",
        SourceState::Slow { .. } => "slow",
    }
}
