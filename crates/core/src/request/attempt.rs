//! One opening of a request at one peer, and what its silence means.
//!
//! | silence | means | then |
//! |---|---|---|
//! | longer than the first token was predicted to take, or than the peer's own steps explain | suspected | ask for a sign of life; open at a second peer |
//! | and no sign of life for [`PROBE_MS`] | dead | gone |
//! | with signs of life, for very long | stalled | gone |
//!
//! The second is what makes the death of a machine short: a connection whose other end was switched off stays open for
//! half a minute.

use murmur_protocol::mesh::NodeId;

use super::{AttemptId, Measured, Offer};
use crate::time::Now;

/// A first token that takes this many times as long as predicted is suspicious.
pub const FIRST_TOKEN_FACTOR: f64 = 2.0;

/// What is added to that: predictions of a few milliseconds are never that exact.
pub const FIRST_TOKEN_SLACK_MS: u64 = 300;

/// A step that takes this many times as long as the average one is suspicious.
pub const STEP_AVERAGE_FACTOR: f64 = 4.0;

/// A step that takes this many times as long as the slowest one so far is suspicious.
pub const STEP_SLOWEST_FACTOR: f64 = 1.5;

/// Shorter silence between tokens is never suspicious.
pub const SUSPECT_MS_MIN: u64 = 250;

/// Longer silence between tokens always is.
pub const SUSPECT_MS_MAX: u64 = 5_000;

/// How long a suspected peer has for a sign of life.
pub const PROBE_MS: u64 = 750;

/// How long after it was suspected a peer that has shown a sign of life is asked again.
pub const PROBE_AGAIN_MS: u64 = 2_000;

/// A peer that is alive and silent for this many times its slowest step is stalled.
pub const STALL_FACTOR: f64 = 30.0;

/// Shorter silence is never a stall.
pub const STALL_MS_MIN: u64 = 15_000;

/// Longer predictions than a day are cut, so that arithmetic stays sane whatever is predicted.
const PREDICTED_MS_MAX: f64 = 86_400_000.0;

/// Weight of a new step in the moving average.
const GAIN: f64 = 0.125;

#[derive(Debug, Clone, Copy, PartialEq)]
struct Suspicion {
    since: Now,
    /// A sign of life has come since.
    alive: bool,
}

/// What a peer's silence means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Silence {
    /// Nothing, or nothing new.
    Fine,
    /// Suspected from now on, until a sign of life.
    Suspicious,
    /// Dead or stalled.
    Gone,
}

/// One opening of a request at one peer.
#[derive(Debug, Clone)]
pub(super) struct Attempt {
    pub(super) id: AttemptId,
    pub(super) peer: NodeId,
    pub(super) admitted: Option<Now>,
    cached_tokens: u32,
    offer: Offer,
    opened: Now,
    /// When it was opened, or said that it is working, or a token came.
    heard: Now,
    first_token: Option<Now>,
    step_ms_average: Option<f64>,
    step_ms_slowest: f64,
    suspicion: Option<Suspicion>,
    /// The client did not read for part of the present step: its length says nothing.
    disturbed: bool,
}

impl Attempt {
    pub(super) fn open(id: AttemptId, offer: Offer, now: Now) -> Self {
        Attempt {
            id,
            peer: offer.peer,
            admitted: None,
            cached_tokens: 0,
            offer,
            opened: now,
            heard: now,
            first_token: None,
            step_ms_average: None,
            step_ms_slowest: 0.0,
            suspicion: None,
            disturbed: false,
        }
    }

    pub(super) fn admit(&mut self, cached_tokens: u32, now: Now) {
        self.admitted.get_or_insert(now);
        self.cached_tokens = cached_tokens;
        self.alive();
    }

    pub(super) fn progressed(&mut self, now: Now) {
        self.heard = now;
        self.alive();
    }

    pub(super) fn alive(&mut self) {
        if let Some(suspicion) = &mut self.suspicion {
            suspicion.alive = true;
        }
    }

    pub(super) fn has_streamed(&self) -> bool {
        self.first_token.is_some()
    }

    pub(super) fn is_suspected(&self) -> bool {
        self.suspicion.is_some()
    }

    /// `count` new tokens came.
    pub(super) fn stepped(&mut self, count: usize, now: Now) {
        if self.first_token.is_some() && !self.disturbed && count > 0 {
            let step_ms = now.since_ms(self.heard) as f64 / count as f64;
            let average = self.step_ms_average.unwrap_or(step_ms);
            self.step_ms_average = Some(average + GAIN * (step_ms - average));
            self.step_ms_slowest = self.step_ms_slowest.max(step_ms);
        }
        self.first_token.get_or_insert(now);
        self.heard = now;
        self.suspicion = None;
        self.disturbed = false;
    }

    /// Time in which nothing could come, by no fault of the peer, is over.
    pub(super) fn excuse(&mut self, now: Now) {
        self.opened = now;
        self.heard = now;
        self.suspicion = None;
        self.disturbed = true;
    }

    /// What its silence means now.
    pub(super) fn judge(&mut self, now: Now) -> Silence {
        if self.stalled_at() <= now || self.dead_at().is_some_and(|dead_at| dead_at <= now) {
            return Silence::Gone;
        }
        if self.next_suspicion().is_some_and(|at| at <= now) {
            self.suspicion = Some(Suspicion { since: now, alive: false });
            return Silence::Suspicious;
        }
        Silence::Fine
    }

    /// When it is suspected next: for the first time, or again after its last sign of life.
    fn next_suspicion(&self) -> Option<Now> {
        match self.suspicion {
            None => Some(self.suspect_at()),
            Some(Suspicion { since, alive: true }) => Some(since.plus_ms(PROBE_AGAIN_MS)),
            Some(Suspicion { alive: false, .. }) => None,
        }
    }

    /// When silence becomes suspicious.
    fn suspect_at(&self) -> Now {
        if !self.has_streamed() {
            let predicted_ms = whole_ms(self.offer.first_token_ms * FIRST_TOKEN_FACTOR);
            return self.opened.plus_ms(predicted_ms.saturating_add(FIRST_TOKEN_SLACK_MS));
        }
        let by_average = self.step_ms_average.unwrap_or(self.offer.step_ms) * STEP_AVERAGE_FACTOR;
        let silence_ms = whole_ms(by_average.max(self.step_ms_slowest * STEP_SLOWEST_FACTOR));
        self.heard.plus_ms(silence_ms.clamp(SUSPECT_MS_MIN, SUSPECT_MS_MAX))
    }

    /// When it counts as dead if no sign of life comes: known once it is suspected.
    fn dead_at(&self) -> Option<Now> {
        self.suspicion.filter(|suspicion| !suspicion.alive).map(|suspicion| suspicion.since.plus_ms(PROBE_MS))
    }

    /// When it counts as stalled, though alive.
    fn stalled_at(&self) -> Now {
        let step_ms =
            if self.has_streamed() { self.step_ms_slowest.max(self.offer.step_ms) } else { self.offer.first_token_ms };
        self.heard.plus_ms(whole_ms(step_ms * STALL_FACTOR).max(STALL_MS_MIN))
    }

    /// The next moment at which its silence means something new.
    pub(super) fn next_deadline(&self) -> Now {
        let deadlines = [self.next_suspicion(), self.dead_at(), Some(self.stalled_at())];
        deadlines.into_iter().flatten().min().unwrap_or_else(|| self.stalled_at())
    }

    pub(super) fn measured(&self) -> Measured {
        let prefill_ms = self.admitted.zip(self.first_token).map(|(from, to)| to.since_ms(from) as f64);
        Measured { prefill_ms, cached_tokens: self.cached_tokens, decode_ms_per_token: self.step_ms_average }
    }
}

/// Whole milliseconds, within reason.
fn whole_ms(ms: f64) -> u64 {
    if ms.is_nan() { 0 } else { ms.clamp(0.0, PREDICTED_MS_MAX) as u64 }
}
