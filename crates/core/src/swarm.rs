//! A file from many sources at once: who is asked for which part of it, and when another is asked instead.
//!
//! A file is fetched in [groups](GROUP_BYTES), each of which can be verified on its own. The [`Swarm`] is told who has which
//! groups, which are [wanted](Event::Want), and what has come; it answers with [requests](Action::Request).
//!
//! - Each wanted group is asked of **one** source. A request is as long as the source takes for it in a second, and enough
//!   requests are under way that the round trip is not waited for ([`source`]).
//! - **Which groups** ([`choice`]): urgent ones first; among them those that the fewest sources have; among these the ones
//!   that follow on what the source was asked for last, and otherwise anywhere, so that nodes that begin together fetch
//!   different parts from the first source and have something for each other.
//! - A source that is **silent** for longer than its own history explains loses what it owes, keeps one request as a probe,
//!   and is asked again when it delivers. One that is **busy** is left alone for pauses that grow. One that sent **wrong
//!   bytes** is never asked again.
//! - **The end**: when nothing is left to ask for, a source that would be done much earlier is asked for the last part of what
//!   a slower one owes. A request of which everything has come, from wherever, is stopped.
//! - **What is on this disk** already, in another file, is asked of nobody else.
//! - **Hubs** are asked for what no peer has, and for the rest only where that saves time: their bytes cost somebody.
//!
//! Work and memory grow with the number of *ranges* of groups, never with that of groups.

pub mod choice;
mod holders;
mod machine;
pub mod source;

use std::ops::Range;

pub use machine::{SOURCES_MAX, Swarm};
pub use murmur_gguf::{GROUP_BYTES, GroupSet};

use crate::time::Now;

/// Names a source, as long as its swarm lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SourceId(pub u32);

/// Names a request, among all of its swarm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// What a source is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SourceKind {
    /// Another file of this machine that seems to have some of the same bytes.
    Disk,
    /// Another node.
    Peer,
    /// A server that has the file: one more source, and the last resort.
    Hub,
}

/// What a swarm is told.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A source, new or changed. One that was [dropped](Action::Drop) stays so.
    Source {
        /// Which.
        id: SourceId,
        /// What it is.
        kind: SourceKind,
        /// All that it says it has now. Only the first [`source::RANGES_MAX`] ranges count.
        has: GroupSet,
        /// Milliseconds.
        rtt_ms: u32,
    },
    /// Groups are verified and kept.
    Received {
        /// From whom.
        id: SourceId,
        /// For which request; it counts as well when the request was cancelled.
        request: RequestId,
        /// Which.
        groups: Range<u64>,
    },
    /// A source says that it has sent all of a request. What has not come of it, the source has not got.
    Finished {
        /// Which source.
        id: SourceId,
        /// Which request.
        request: RequestId,
    },
    /// A request has ended otherwise, or all requests of a source.
    Failed {
        /// Which source.
        id: SourceId,
        /// Which request; all of the source if `None`.
        request: Option<RequestId>,
        /// How.
        outcome: Outcome,
    },
    /// A source goes: it is not asked until it is announced again.
    Left {
        /// Which.
        id: SourceId,
    },
    /// The time that [`Swarm::next_tick`] named has come. Early and extra ticks do no harm.
    Tick,
    /// More is wanted.
    Want {
        /// Which groups. Those that have come already, and those past the end of the file, change nothing.
        groups: GroupSet,
        /// Before all that is wanted and not urgent: what a stage needs to start.
        urgent: bool,
    },
}

/// How a request failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The source serves others now.
    Busy {
        /// Milliseconds after which it may be asked again.
        retry_ms: u64,
    },
    /// The source says that it has not got what it was asked for.
    Lacks,
    /// What came is not part of the file: a hash did not match.
    Wrong,
    /// The connection died, if no request is named: the source is not asked until it is announced again. Otherwise only the
    /// stream of the request did.
    Gone,
    /// The source sends nothing, or too little.
    Slow,
}

/// Why a request is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Purpose {
    /// Nobody else is asked for these groups.
    Fetch,
    /// Another source is asked for them as well, and would take much longer.
    Rescue,
    /// To see whether a silent source has come back. Others may be asked for the same groups.
    Probe,
}

/// What a swarm wants done.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Ask a source for groups.
    Request {
        /// Whom.
        id: SourceId,
        /// Named thus from now on.
        request: RequestId,
        /// What for; no more than [`choice::RANGES_PER_REQUEST_MAX`] ranges.
        groups: GroupSet,
        /// Why.
        purpose: Purpose,
    },
    /// Stop a request: everything of it came from elsewhere, or the source is silent, gone, or a liar.
    Cancel {
        /// At whom.
        id: SourceId,
        /// Which.
        request: RequestId,
    },
    /// Report this source. It is never asked again.
    Drop {
        /// Whom.
        id: SourceId,
        /// Why.
        reason: DropReason,
    },
    /// All that is wanted has come.
    Done,
    /// Nothing is under way, and nobody has what is missing, or nobody who answers. A source that has some of it gets things
    /// going again.
    Stuck {
        /// Which groups.
        missing: GroupSet,
        /// Why.
        reason: StuckReason,
    },
}

/// Why a source is never asked again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DropReason {
    /// Its bytes are not those of the file.
    #[error("it sent bytes that are not those of the file")]
    WrongBytes,
}

/// Why a fetch cannot go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StuckReason {
    /// There are no sources.
    #[error("nobody is known who has any part of the file")]
    NoSource,
    /// There are, and each lacks it.
    #[error("none of the {sources} known sources has the missing part of the file")]
    NobodyHas {
        /// How many there are.
        sources: usize,
    },
    /// Those that have it do not answer; they are still tried.
    #[error("the {sources} known sources that have the missing part of the file do not answer")]
    NoAnswer {
        /// How many there are.
        sources: usize,
    },
}

/// How far a fetch is, and what each source does for it.
#[derive(Debug, Clone, PartialEq)]
pub struct Progress {
    /// Bytes wanted so far, those included that have come.
    pub wanted_bytes: u64,
    /// Bytes of these that have come.
    pub done_bytes: u64,
    /// Bytes that came once more.
    pub doubled_bytes: u64,
    /// Bytes per second, of all sources that owe something.
    pub bytes_per_s: f64,
    /// Milliseconds until all is there, at this rate; `None` if nothing comes.
    pub eta_ms: Option<u64>,
    /// One for each source, by its number.
    pub sources: Vec<SourceProgress>,
}

/// What a source does.
#[derive(Debug, Clone, PartialEq)]
pub struct SourceProgress {
    /// Which.
    pub id: SourceId,
    /// What it is.
    pub kind: SourceKind,
    /// How it stands.
    pub state: SourceState,
    /// Milliseconds.
    pub rtt_ms: u32,
    /// Bytes per second, while it owed something. A guess before the first bytes.
    pub bytes_per_s: f64,
    /// Bytes that came from it.
    pub received_bytes: u64,
    /// What it was asked for and has not come, in the order in which it was asked.
    pub owes: Vec<Owes>,
}

/// What has not come of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owes {
    /// The request.
    pub request: RequestId,
    /// Why it was made.
    pub purpose: Purpose,
    /// The groups.
    pub groups: GroupSet,
}

/// How a source stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourceState {
    /// It is asked for what it has.
    Ready,
    /// It was busy, or lacked what it said it had, and is left alone until then.
    Paused {
        /// Until when.
        until: Now,
    },
    /// It was silent for too long.
    Slow {
        /// Since when.
        since: Now,
    },
}
