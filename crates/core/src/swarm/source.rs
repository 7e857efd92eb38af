//! One source: what it has, what it owes, and what its deliveries tell.
//!
//! All is measured over times in which it owed something. The **rate** is a moving average. The **usual wait** between two
//! deliveries is one in which each wait counts by its length, so that many short ones do not hide the long one before them: a
//! source may serve its takers in turns.

use super::{GROUP_BYTES, GroupSet, Owes, Purpose, RequestId, SourceId, SourceKind, SourceProgress, SourceState};
use crate::time::Now;

/// Ranges of what a source has, at most; later ones do not count.
pub const RANGES_MAX: usize = 4_096;

/// A request is as long as the source takes for it in this time.
pub const REQUEST_MS: f64 = 1_000.0;

/// The first request to a source is so long, and none to a hub is shorter, unless less is left.
pub const REQUEST_GROUPS_FIRST: u64 = 16;

/// Nor is one to a peer shorter than this, which costs a kilobyte of hashes besides. Where many fetch from one that is slow for each of them, what they have asked for
/// and do not have yet must be a small part of the file, or several ask for the same, since none can tell.
pub const REQUEST_GROUPS_MIN: u64 = 4;

/// A request is not longer.
pub const REQUEST_GROUPS_MAX: u64 = 1_024;

/// A request is not so many times as long as the longest one that the source has completed: a rate that was measured over a
/// moment may be that of a buffer on the way.
const GROWTH_MAX: u64 = 4;

/// Requests under way at one source, where it has enough.
pub const IN_FLIGHT_MIN: usize = 2;

/// The same, where the round trip is long for the rate.
pub const IN_FLIGHT_MAX: usize = 8;

/// What one request at a node brings in a round trip, however fast the way is: 1 MiB, a little less than the flow-control window of a stream (QUIC's is
/// 1.25 MB here, and widened when an eighth of it was read). What more is to be on its way takes further requests. A hub's connections have windows that
/// grow.
pub const WINDOW_GROUPS: u64 = 64;

/// A source is never called silent before this time, and a round trip. Milliseconds.
pub const SILENCE_MS_MIN: f64 = 2_000.0;

/// A source is called silent after so many times its usual wait, and a round trip.
pub const SILENCE_FACTOR: f64 = 4.0;

/// A source is always called silent after this time, and a round trip. Milliseconds.
pub const SILENCE_MS_MAX: f64 = 15_000.0;

/// A source that stays silent for so long after it was called so is [hopeless](FAILURES_MAX). Milliseconds.
pub const HOPELESS_MS: u64 = 60_000;

/// The shortest pause in which a source is left alone. Each is twice as long as the one before, until something comes.
pub const PAUSE_MS_MIN: u64 = 500;

/// It does not grow beyond this.
pub const PAUSE_MS_MAX: u64 = 60_000;

/// A source is hopeless when more of its streams than this have died in a row: it is still tried, but nobody is told to wait for
/// it.
pub const FAILURES_MAX: u32 = 4;

/// However long a source asks to be left alone for, it is not for longer.
pub const RETRY_MS_MAX: u64 = 600_000;

/// What a source is taken to deliver before it has: 1 MiB/s. Groups per millisecond.
const RATE_UNKNOWN: f64 = 0.064;

/// What that guess counts for, as a measurement over this time. Milliseconds.
const RATE_UNKNOWN_MS: f64 = 100.0;

/// How far back the rate reaches. Milliseconds.
const RATE_WINDOW_MS: f64 = 3_000.0;

/// How far back the usual wait reaches. Milliseconds.
const WAIT_WINDOW_MS: f64 = 10_000.0;

/// A request, and what has not come of it.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) request: RequestId,
    pub(super) purpose: Purpose,
    pub(super) owed: GroupSet,
    /// How many groups it was made for.
    pub(super) groups: u64,
}

#[derive(Debug)]
pub(super) struct Source {
    pub(super) kind: SourceKind,
    pub(super) has: GroupSet,
    pub(super) rtt_ms: u32,
    /// In the order in which it was asked.
    pub(super) asked: Vec<Asked>,
    /// The group behind those that it was asked for last.
    pub(super) cursor: Option<u64>,
    pub(super) paused: Option<Now>,
    /// Since when it has been silent for too long.
    pub(super) slow: Option<Now>,
    pub(super) received_groups: u64,
    /// How many groups the longest request had that it has completed.
    pub(super) completed_groups_max: u64,
    /// Pauses since something came.
    fruitless: u32,
    /// Streams that died since something came.
    failures: u32,
    /// Groups that came in `rate_ms`; what is long past counts less in both.
    rate_groups: f64,
    rate_ms: f64,
    wait_ms: f64,
    /// When something came last, or when it was asked while it owed nothing.
    heard: Now,
}

impl Source {
    pub(super) fn new(kind: SourceKind, now: Now) -> Self {
        Source {
            kind,
            has: GroupSet::default(),
            rtt_ms: 0,
            asked: Vec::new(),
            cursor: None,
            paused: None,
            slow: None,
            received_groups: 0,
            completed_groups_max: 0,
            fruitless: 0,
            failures: 0,
            rate_groups: RATE_UNKNOWN * RATE_UNKNOWN_MS,
            rate_ms: RATE_UNKNOWN_MS,
            wait_ms: 0.0,
            heard: now,
        }
    }

    /// It is asked.
    pub(super) fn ask(&mut self, request: RequestId, purpose: Purpose, groups: GroupSet, now: Now) {
        if self.asked.is_empty() {
            self.heard = now;
        }
        if purpose == Purpose::Fetch {
            self.cursor = groups.ranges().last().map(|last| last.end);
        }
        self.asked.push(Asked { request, purpose, groups: groups.len(), owed: groups });
    }

    /// Groups came from it.
    pub(super) fn deliver(&mut self, groups: u64, now: Now) {
        self.received_groups += groups;
        self.fruitless = 0;
        self.failures = 0;
        if self.asked.is_empty() {
            return;
        }
        let wait_ms = now.since_ms(self.heard) as f64;
        let kept = RATE_WINDOW_MS / (RATE_WINDOW_MS + wait_ms);
        self.rate_groups = self.rate_groups * kept + groups as f64;
        self.rate_ms = self.rate_ms * kept + wait_ms;
        self.wait_ms += (wait_ms - self.wait_ms) * wait_ms / (WAIT_WINDOW_MS + wait_ms);
        self.heard = now;
    }

    /// It is left alone for as long as it asks for, or for longer if nothing has come since the last time.
    pub(super) fn pause(&mut self, retry_ms: u64, now: Now) {
        let own_ms = PAUSE_MS_MIN.saturating_mul(1 << self.fruitless.min(16)).min(PAUSE_MS_MAX);
        self.paused = Some(now.plus_ms(retry_ms.min(RETRY_MS_MAX).max(own_ms)));
        self.fruitless += 1;
    }

    /// One of its streams died.
    pub(super) fn fail(&mut self, now: Now) {
        self.failures += 1;
        self.pause(0, now);
    }

    /// Nobody should wait for it.
    pub(super) fn is_hopeless(&self, now: Now) -> bool {
        self.failures > FAILURES_MAX || self.slow.is_some_and(|since| now.since_ms(since) >= HOPELESS_MS)
    }

    /// Groups per millisecond; the silence counts in which something is owed.
    pub(super) fn rate(&self, now: Now) -> f64 {
        let silence_ms = if self.asked.is_empty() { 0 } else { now.since_ms(self.heard) };
        self.rate_groups / (self.rate_ms + silence_ms as f64)
    }

    pub(super) fn owed_groups(&self) -> u64 {
        self.asked.iter().map(|asked| asked.owed.len()).sum()
    }

    /// Milliseconds until so many groups more have come, behind all that it owes.
    pub(super) fn predicted_ms(&self, groups: u64, now: Now) -> f64 {
        f64::from(self.rtt_ms) + (self.owed_groups() + groups) as f64 / self.rate(now)
    }

    /// How many groups it is asked for at once.
    pub(super) fn request_groups(&self, now: Now) -> u64 {
        let second = (self.rate(now) * REQUEST_MS) as u64;
        second.min(self.completed_groups_max * GROWTH_MAX).clamp(self.request_groups_min(), REQUEST_GROUPS_MAX)
    }

    /// It is not asked for less, unless less is left.
    pub(super) fn request_groups_min(&self) -> u64 {
        match (self.kind, self.completed_groups_max) {
            (SourceKind::Hub | SourceKind::Disk, _) | (_, 0) => REQUEST_GROUPS_FIRST,
            (SourceKind::Peer, _) => REQUEST_GROUPS_MIN,
        }
    }

    /// How many requests it is to have under way.
    pub(super) fn in_flight_wanted(&self, now: Now) -> usize {
        // One that it works on, and those that are on their way meanwhile. Where windows are what holds the rate down, it rises with each more.
        let one_at_most = match self.kind {
            SourceKind::Peer => WINDOW_GROUPS,
            SourceKind::Hub | SourceKind::Disk => REQUEST_GROUPS_MAX,
        };
        let on_the_way = self.rate(now) * f64::from(self.rtt_ms) / self.request_groups(now).min(one_at_most) as f64;
        (1 + on_the_way.ceil() as usize).clamp(IN_FLIGHT_MIN, IN_FLIGHT_MAX)
    }

    /// When it counts as silent, unless something comes before.
    pub(super) fn silent_at(&self) -> Option<Now> {
        let patience_ms =
            f64::from(self.rtt_ms) + (SILENCE_FACTOR * self.wait_ms).clamp(SILENCE_MS_MIN, SILENCE_MS_MAX);
        (self.slow.is_none() && !self.asked.is_empty()).then(|| self.heard.plus_ms(patience_ms as u64))
    }

    /// When its silence becomes hopeless, unless something comes before.
    pub(super) fn hopeless_at(&self) -> Option<Now> {
        self.slow.map(|since| since.plus_ms(HOPELESS_MS))
    }

    /// Whether it may be asked for what nobody else is asked for.
    pub(super) fn is_ready(&self) -> bool {
        self.paused.is_none() && self.slow.is_none()
    }

    pub(super) fn progress(&self, id: SourceId, now: Now) -> SourceProgress {
        let owes = |asked: &Asked| Owes { request: asked.request, purpose: asked.purpose, groups: asked.owed.clone() };
        SourceProgress {
            id,
            kind: self.kind,
            state: match (self.slow, self.paused) {
                (Some(since), _) => SourceState::Slow { since },
                (None, Some(until)) => SourceState::Paused { until },
                (None, None) => SourceState::Ready,
            },
            rtt_ms: self.rtt_ms,
            bytes_per_s: self.rate(now) * (GROUP_BYTES * 1_000) as f64,
            received_bytes: self.received_groups * GROUP_BYTES,
            owes: self.asked.iter().map(owes).collect(),
        }
    }
}
