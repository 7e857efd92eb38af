//! One session as the driver sees it: what it asked for, what it has, and how often stages died under it.

use std::{fmt, path::PathBuf, sync::Arc};

use murmur_protocol::{
    codec::Codec,
    sampling::{Sampled, SamplingParams, Token},
    stage::{Open, Opened},
};
use tokio::sync::mpsc;

use super::{
    DriverOptions, EVENTS_MARGIN, LAG_MAX,
    draft::{Guesses, Outcome},
    train::Train,
};
use crate::link::RemoteStage;

/// A session under which stages died so often, without a token in between, is a suspect: it may be what kills them. It
/// then runs alone, and is given up if that death has no other explanation.
pub(super) const SUSPECT_DEATHS: u32 = 2;
/// A session under which stages died so often altogether is given up, tokens or not.
pub(super) const DEATHS_MAX: u32 = 32;

/// What a session asks for.
#[derive(Debug, Clone)]
pub struct SessionRequest {
    /// Prompt tokens, at least one.
    pub prompt: Vec<Token>,
    /// The beginning of the answer, if another engine generated it. The session goes on behind it, with the tokens that
    /// would have followed there. An answer that a token has ended ends at once; one that its grammar has ended
    /// (`grammar_ended`) must not be given.
    pub generated: Vec<Token>,
    /// Tokens of the whole answer at most, more than `generated` has; prompt and answer together must fit the context.
    pub max_tokens: u32,
    /// How to sample.
    pub sampling: SamplingParams,
}

/// What happens to a session.
#[derive(Debug, Clone, PartialEq)]
pub enum SessionEvent {
    /// Prompt tokens are done so far.
    Prefill {
        /// Prompt tokens done, cached ones included.
        done_tokens: u32,
        /// Tokens found in the prefix cache.
        cached_tokens: u32,
    },
    /// A token.
    Token(Sampled),
    /// Guesses of the whole answer, if there were any; comes before the end.
    Guesses {
        /// Those that were right.
        right: u32,
        /// Those that were wrong, or in vain because one before them was.
        wrong: u32,
    },
    /// The end, after the last token.
    Ended(Ending),
    /// The session failed: what happened.
    Failed(String),
    /// The engine has lost its stages for now, and every session with them: why. Another engine can go on with it.
    Lost(String),
}

/// Why a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The model (or the grammar) ended.
    EndOfText,
    /// `max_tokens` were generated.
    Length,
}

/// Who guesses what a model will say.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum Draft {
    /// Nobody.
    #[default]
    Off,
    /// What has followed the same tokens before, in prompt or answer.
    Lookup,
    /// The same, or a small model: whoever makes tokens cheaper at the moment.
    Model(DraftModel),
    /// The same, with the model on another machine. It may come and go: nobody ever waits for it.
    Peer(PeerDraft),
}

/// A model on another machine that guesses, as a stage that is all of its model. Its vocabulary must be the same. What it says is compared
/// like any other guess, so that a wrong word costs time and changes nothing.
#[derive(Clone)]
pub struct PeerDraft {
    /// Who finds it and carries the frames.
    pub stage: Arc<dyn RemoteStage>,
    /// What part of its guesses is made wrong, 0 to 1: for tests and benchmarks.
    pub spoilt: f64,
}

impl PartialEq for PeerDraft {
    fn eq(&self, other: &PeerDraft) -> bool {
        Arc::ptr_eq(&self.stage, &other.stage) && self.spoilt == other.spoilt
    }
}

impl fmt::Debug for PeerDraft {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PeerDraft")
    }
}

/// A model that guesses what another will say.
#[derive(Debug, Clone, PartialEq)]
pub struct DraftModel {
    /// Its GGUF file; the vocabulary must be the same.
    pub path: PathBuf,
    /// What part of its guesses is made wrong, 0 to 1: for tests and benchmarks.
    pub spoilt: f64,
}

impl Draft {
    /// Whether the guess for a position is made wrong. The same in each run.
    pub(super) fn spoils(&self, session: u64, position: u32) -> bool {
        let spoilt = match self {
            Draft::Off | Draft::Lookup => return false,
            Draft::Model(model) => model.spoilt,
            Draft::Peer(peer) => peer.spoilt,
        };
        let mut hash = session.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ u64::from(position);
        // The finaliser of MurmurHash3.
        for factor in [0xFF51_AFD7_ED55_8CCD_u64, 0xC4CE_B9FE_1A85_EC53] {
            hash = (hash ^ (hash >> 33)).wrapping_mul(factor);
        }
        let part = ((hash ^ (hash >> 33)) >> 11) as f64 / (1u64 << 53) as f64;
        part < spoilt
    }
}

pub(super) enum Phase {
    /// Waiting for room, or for stages to come (back).
    Queued,
    /// `Open` is on its way, sent when `releases` sessions had ended.
    Opening { opened: Vec<Option<Opened>>, releases: u64 },
    /// Rows are on their way, for the stage `feeding` and those behind it. `next`: first position not sent. `in_flight`: frames
    /// sent and not answered; `prefill`: whether these are prompt rows.
    Running { feeding: usize, next: u32, in_flight: usize, prefill: bool },
}

/// Rows to send.
pub(super) struct Rows {
    /// Position behind the last.
    pub(super) end: u32,
    /// Prompt rows?
    pub(super) prefill: bool,
    /// How many stages compute them; 0: all that follow.
    pub(super) stages: u16,
}

pub(super) struct Session {
    pub(super) epoch: u32,
    pub(super) phase: Phase,
    /// Queued, while stages keep what they hold of it.
    pub(super) is_held: bool,
    pub(super) tokens: Vec<Token>,
    /// What may follow them.
    pub(super) guesses: Guesses,
    /// Its generated rows and guesses that are on their way.
    pub(super) train: Train,
    /// When the newest guess was wrong, until a token follows, us.
    pub(super) rejected_at: Option<u64>,
    /// A step failed after a wrong guess: the position behind its rows, and why, until a token for that position has come without guesses.
    pub(super) failed_with_guesses: Option<(u32, String)>,
    /// When the newest token came, if no other session ran, us.
    pub(super) token_at: Option<u64>,
    /// The first position that each stage computes, of those that it was opened with: see [`Session::plan`].
    pub(super) starts: Vec<u32>,
    pub(super) prompt_tokens: u32,
    pub(super) cached_tokens: u32,
    pub(super) max_tokens: u32,
    pub(super) sampling: SamplingParams,
    pub(super) events: mpsc::Sender<SessionEvent>,
    /// Stages that died while they worked on it, since its last token.
    deaths: u32,
    /// The same, since it began.
    deaths_total: u32,
}

impl Session {
    pub(super) fn new(request: SessionRequest, events: mpsc::Sender<SessionEvent>, draft: &Draft) -> Session {
        let mut tokens = request.prompt;
        let prompt_tokens = tokens.len() as u32;
        tokens.extend_from_slice(&request.generated);
        Session {
            epoch: 0,
            phase: Phase::Queued,
            is_held: false,
            prompt_tokens,
            tokens,
            guesses: Guesses::new(draft),
            train: Train::default(),
            rejected_at: None,
            failed_with_guesses: None,
            token_at: None,
            starts: Vec::new(),
            cached_tokens: 0,
            max_tokens: request.max_tokens,
            sampling: request.sampling,
            events,
            deaths: 0,
            deaths_total: 0,
        }
    }

    /// Whether its reader has so much to read that it should have no more for now.
    pub(super) fn is_far_ahead(&self) -> bool {
        self.events.max_capacity() - self.events.capacity() >= LAG_MAX - EVENTS_MARGIN
    }

    /// What a stage is told when the session begins there, or goes on.
    pub(super) fn opening(&self, sampling: Option<SamplingParams>, codec: Codec) -> Open {
        Open {
            prompt: self.tokens[..self.prompt_tokens as usize].to_vec(),
            generated: self.generated().to_vec(),
            reserve_cells: self.prompt_tokens + self.max_tokens,
            sampling,
            codec,
        }
    }

    pub(super) fn generated(&self) -> &[Token] {
        &self.tokens[self.prompt_tokens as usize..]
    }

    /// Decides where each stage begins: behind what it holds, if the one before it can send on all rows from there, be it that it
    /// computes them or that it has kept them; otherwise that one computes them again. The last stage computes the last row in
    /// any case, in exact mode with the chunk of the prompt that it is in: its token is wanted.
    ///
    /// A stage that begins before the one in front of it is fed what that one has kept, the hindmost first. So none lacks a row
    /// that comes before those it gets.
    pub(super) fn plan(&mut self, opened: &[Opened], options: &DriverOptions) {
        let length = self.tokens.len() as u32;
        let mut wanted = length.saturating_sub(1);
        if options.exact && wanted < self.prompt_tokens {
            wanted -= wanted % options.chunk_rows;
        }
        self.starts = vec![0; opened.len()];
        for (start, opened) in self.starts.iter_mut().zip(opened).rev() {
            let held = opened.cached_tokens.min(length);
            let is_kept = wanted >= held.saturating_sub(opened.kept_tokens);
            *start = if is_kept { held } else { wanted };
            wanted = *start;
        }
    }

    /// The next frame's rows for the stage `feeding`, from position `start` on.
    pub(super) fn next_rows(&self, feeding: usize, start: u32, options: &DriverOptions) -> Rows {
        // Up to the first stage that has them.
        let has_them = (feeding + 1..self.starts.len()).find(|&stage| self.starts[stage] > start);
        let before = feeding.checked_sub(1).map(|before| self.starts[before]);
        let limit = has_them.map(|stage| self.starts[stage]).into_iter().chain(before);
        let limit = limit.fold(self.tokens.len() as u32, u32::min);
        let stages = has_them.map_or(0, |stage| (stage - feeding) as u16);
        let chunk = options.chunk_rows;
        if start < self.prompt_tokens {
            let end = ((start / chunk + 1) * chunk).min(self.prompt_tokens).min(limit);
            return Rows { end, prefill: true, stages };
        }
        let left = limit - start;
        Rows { end: start + left.min(chunk), prefill: left > 1 && !options.exact, stages }
    }

    /// The next token is there. What it means for a guess of it; `None`: it was not guessed.
    pub(super) fn push(&mut self, token: Token) -> Option<Outcome> {
        self.tokens.push(token);
        self.guesses.compare(token)
    }

    /// True when only its own run can tell whether it kills stages.
    pub(super) fn is_suspect(&self) -> bool {
        self.deaths >= SUSPECT_DEATHS
    }

    /// It got through: whatever killed the stages, this was not it.
    pub(super) fn clear(&mut self) {
        self.deaths = 0;
    }

    /// A stage died. The session goes back to the queue under a new epoch; the reason, if it is given up instead.
    pub(super) fn on_death(&mut self) -> Option<String> {
        let at_work = match self.phase {
            Phase::Queued => false,
            Phase::Opening { .. } => true,
            Phase::Running { in_flight, .. } => in_flight > 0,
        };
        self.requeue();
        if !at_work {
            return None;
        }
        // A suspect is at work only when nothing else is.
        let died_alone = self.is_suspect();
        self.deaths += 1;
        self.deaths_total += 1;
        let deaths = self.deaths;
        if died_alone {
            return Some(format!(
                "the engine process died {deaths} times in a row while it worked on this request, the last time on \
                 nothing else; it was restarted each time, and the request is now given up"
            ));
        }
        (self.deaths_total > DEATHS_MAX).then(|| {
            format!("the engine process died more than {DEATHS_MAX} times during this request, which is now given up")
        })
    }

    /// It has to begin again, which no request is charged with. As [`Session::on_death`] otherwise.
    pub(super) fn on_interruption(&mut self) -> Option<String> {
        self.requeue();
        None
    }

    pub(super) fn requeue(&mut self) {
        self.phase = Phase::Queued;
        self.guesses.drop_waiting();
        self.train.stop();
        (self.rejected_at, self.token_at) = (None, None);
        self.epoch += 1;
    }
}
