//! A request as its driver sees it, from the first peer to the last token.
//!
//! The driver keeps the prompt and every token that it has shown to the client. Both determine all that follows (sampling
//! is a function of seed and position), so any peer can take over at any token. The [`Session`] decides when:
//!
//! ```text
//!              Peers            first token               Finished
//!  Opening ───────────> opened ─────────────> Streaming ───────────> Ended
//!     ^  │ none            │ silent for too long   │  ▲
//!     │  ▼                 ▼                       │  │ first token of either; the other is cancelled
//!   Waiting             Hedged: the same request   │  │
//!                       at a second peer ──────────┼──┘
//!                          ▲                       │ silent for too long
//!                          └───────────────────────┤
//!  Resuming: opened anew with the tokens so far <──┘ gone
//! ```
//!
//! **Silence** is told apart in three steps ([`attempt`]). A peer that is silent for longer than its own steps explain is
//! *suspected*: it is asked for a sign of life, and the request is opened at a second peer. Without the sign of life
//! it is *dead* a moment later. With it the peer is alive but slow; it may still win, until it counts as *stalled*.
//!
//! **Every token once.** A token is emitted if its sequence number is the next one and its peer has not been given up.
//! What was emitted already is dropped; a gap, a different token in the same place, more tokens than asked for, or an end
//! for "length" before it, break the protocol, and a peer that breaks it is gone.
//!
//! **A request that cannot go on fails**, with the reason. It never looks finished.

pub mod attempt;
mod session;

use murmur_protocol::{
    mesh::{FailureCode, FinishReason, NodeId, Refused},
    sampling::{Sampled, Token},
};

pub use session::Session;

use crate::{health::Verdict, time::Now};

/// How often a request may be opened a second time because a peer was silent.
pub const HEDGES_MAX: u32 = 8;

/// How often it may be opened altogether without a new token in between.
pub const ATTEMPTS_MAX: u32 = 128;

/// How many peers may die over it without a new token in between: it may be what kills them.
pub const DEATHS_MAX: u32 = 4;

/// How long a request waits, at a stretch, for a peer that would take it.
pub const WAIT_MS_MAX: u64 = 30_000;

/// How often it looks for one meanwhile.
pub const WAIT_POLL_MS: u64 = 500;

/// How long a peer that was gone is not asked again by the same request.
pub const GONE_PAUSE_MS: u64 = 1_000;

/// How long a peer that has no memory for the model, or does not serve it after all, is not asked again by the same request.
pub const REFUSED_PAUSE_MS: u64 = 10_000;

/// Names one opening of a request at one peer: a peer may be asked twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AttemptId(pub u32);

/// A peer that could take the request, with what to expect of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Offer {
    /// The peer.
    pub peer: NodeId,
    /// Predicted milliseconds until the first new token.
    pub first_token_ms: f64,
    /// Predicted milliseconds between tokens.
    pub step_ms: f64,
}

/// What a session is told.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The answer to [`Action::FindPeers`], best first. `retry_at`: when one that is busy or on its pause may be asked.
    Peers {
        /// Those that may be asked.
        offers: Vec<Offer>,
        /// When more may be there.
        retry_at: Option<Now>,
    },
    /// The mesh has changed: worth another look when waiting for a peer.
    PeersChanged,
    /// A peer admitted the request.
    Admitted {
        /// Where.
        attempt: AttemptId,
        /// Tokens that it need not compute.
        cached_tokens: u32,
    },
    /// A peer refused it: at the beginning, or a session that it can no longer carry.
    Refused {
        /// Where.
        attempt: AttemptId,
        /// Why.
        because: Refused,
    },
    /// A peer says that it is working on the request: prefill, loading.
    Progress {
        /// Where.
        attempt: AttemptId,
    },
    /// Tokens.
    Tokens {
        /// From where.
        attempt: AttemptId,
        /// Place of the first one among all generated tokens, from 0.
        first_sequence: u32,
        /// In order.
        tokens: Vec<Sampled>,
    },
    /// A peer says that the answer is complete.
    Finished {
        /// Where.
        attempt: AttemptId,
        /// Why. [`FinishReason::Length`] is believed only when [`RequestLimits::tokens_max`] is reached.
        reason: FinishReason,
    },
    /// A peer says that it cannot complete the answer.
    Failed {
        /// Where.
        attempt: AttemptId,
        /// Why.
        code: FailureCode,
    },
    /// The connection or the stream died, could not be opened, or the peer broke the protocol.
    Gone {
        /// Where.
        attempt: AttemptId,
    },
    /// A sign of life of a peer: the answer to [`Action::Probe`].
    Alive {
        /// Of whom.
        peer: NodeId,
    },
    /// The client does not read; tokens wait here, and nobody is to blame for their not coming.
    ReaderFull,
    /// The client reads again.
    ReaderReady,
    /// The time that [`Action::SetTimer`] named has come. Early and extra timers do no harm.
    Timer,
    /// The client has left.
    ClientGone,
}

/// What a session wants done.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Rank peers, without these, and answer with [`Event::Peers`].
    FindPeers {
        /// Not these.
        excluded: Vec<NodeId>,
    },
    /// Open the request at a peer, with the tokens generated so far: [`Session::generated`].
    Open {
        /// Named thus from now on.
        attempt: AttemptId,
        /// Where.
        peer: NodeId,
    },
    /// Reset the stream of an attempt. Nothing that it says counts any more.
    Cancel {
        /// Which.
        attempt: AttemptId,
        /// Where.
        peer: NodeId,
    },
    /// Ask a peer for a sign of life ([`Event::Alive`]).
    Probe {
        /// Whom.
        peer: NodeId,
    },
    /// The next token, for the client.
    Emit(Sampled),
    /// Send [`Event::Timer`] then. Replaces the timer before.
    SetTimer(Now),
    /// For [`crate::health::Health::note`].
    Report {
        /// Of whom.
        peer: NodeId,
        /// How it went.
        verdict: Verdict,
    },
    /// For the speeds in [`crate::health::Health`].
    Measured {
        /// Of whom.
        peer: NodeId,
        /// What was seen.
        measured: Measured,
    },
    /// Every token was emitted.
    Finish(FinishReason),
    /// The request cannot go on.
    Fail(RequestError),
}

/// Speeds that an attempt has shown.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measured {
    /// Milliseconds from admission to the first token: queue and prefill.
    pub prefill_ms: Option<f64>,
    /// Tokens that were not computed for it.
    pub cached_tokens: u32,
    /// Milliseconds between tokens, on average.
    pub decode_ms_per_token: Option<f64>,
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// Nobody serves the model.
    #[error("no peer serves this model now")]
    NoPeer,
    /// All peers are busy, and were for as long as a request waits.
    #[error("all peers that serve this model are busy; waited {waited_ms} ms")]
    Busy {
        /// Milliseconds.
        waited_ms: u64,
    },
    /// No peer has the memory for it.
    #[error("no peer that serves this model has memory for this request: {0}")]
    NoMemory(String),
    /// It is wrong.
    #[error("the request was refused: {0}")]
    BadRequest(String),
    /// The peers that worked on it are gone, and no other takes it.
    #[error("the peers that served this request are gone, and no other was found in {waited_ms} ms")]
    Lost {
        /// Milliseconds.
        waited_ms: u64,
    },
    /// It may be what kills them.
    #[error("{deaths} peers failed over this request without a token in between")]
    Deadly {
        /// How many.
        deaths: u32,
    },
}

/// What the session has to know of the request itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestLimits {
    /// Tokens to generate, at most, those in `generated` included. No more than the context leaves beside the prompt: an
    /// answer that ends for its length before is not believed.
    pub tokens_max: u32,
    /// Tokens that were generated before this session began; empty for a new request.
    pub generated: Vec<Token>,
}

/// Where a session stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Before the first token: looking for a peer, or opened at one.
    Opening,
    /// Opened at two peers; the first token decides.
    Hedged,
    /// Tokens come.
    Streaming,
    /// After a token: looking for a peer to continue, or opened at one that has not sent a token yet.
    Resuming,
    /// Nobody takes it now.
    Waiting,
    /// Finished, failed, or the client has left.
    Ended,
}
