//! The session's state machine. See [the module above](super).

use std::collections::BTreeMap;

use murmur_protocol::{
    mesh::{FailureCode, FinishReason, NodeId, Refused},
    sampling::{Sampled, Token},
};

use super::{
    ATTEMPTS_MAX, Action, AttemptId, DEATHS_MAX, Event, GONE_PAUSE_MS, HEDGES_MAX, Offer, REFUSED_PAUSE_MS,
    RequestError, RequestLimits, State, WAIT_MS_MAX, WAIT_POLL_MS,
    attempt::{Attempt, Silence},
};
use crate::{health::Verdict, time::Now};

/// How many peers have to call a request wrong before they are believed while others are left to ask.
const BAD_REQUESTS_MAX: usize = 2;

/// A BUSY peer is not asked again before, whatever it says.
const BUSY_MS_MIN: u64 = 20;

/// What stood in the way last: what a request that gives up says.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Obstacle {
    Nobody,
    Busy,
    NoMemory { reason: String },
    Gone,
}

/// One request, at its driver.
#[derive(Debug)]
pub struct Session {
    limits_tokens_max: u32,
    wait_ms_max: u64,
    generated: Vec<Token>,
    began_with: usize,
    /// The grammar accepts nothing after the last token.
    grammar_ended: bool,
    /// One, or two while hedged.
    attempts: Vec<Attempt>,
    next_attempt: u32,
    /// Peers that are not asked, until when; for good if `None`.
    excluded: BTreeMap<NodeId, Option<Now>>,
    finding: bool,
    hedges: u32,
    next_hedge: Now,
    opened_since_token: u32,
    deaths_since_token: u32,
    bad_requests: Vec<String>,
    obstacle: Obstacle,
    waiting_since: Option<Now>,
    look_again: Option<Now>,
    reader_full: bool,
    timer: Option<Now>,
    ended: bool,
    actions: Vec<Action>,
}

impl Session {
    /// A session, and what it wants done first.
    pub fn new(limits: RequestLimits, now: Now) -> (Self, Vec<Action>) {
        let mut session = Session {
            limits_tokens_max: limits.tokens_max,
            wait_ms_max: WAIT_MS_MAX,
            began_with: limits.generated.len(),
            generated: limits.generated,
            grammar_ended: false,
            attempts: Vec::new(),
            next_attempt: 0,
            excluded: BTreeMap::new(),
            finding: false,
            hedges: 0,
            next_hedge: now,
            opened_since_token: 0,
            deaths_since_token: 0,
            bad_requests: Vec::new(),
            obstacle: Obstacle::Nobody,
            waiting_since: None,
            look_again: None,
            reader_full: false,
            timer: None,
            ended: false,
            actions: Vec::new(),
        };
        session.go_on(now);
        let actions = std::mem::take(&mut session.actions);
        (session, actions)
    }

    /// Waits at most so long, at a stretch, for a peer that would take it; [`WAIT_MS_MAX`] unless it is told so.
    pub fn wait_at_most(&mut self, wait_ms: u64) {
        self.wait_ms_max = wait_ms;
    }

    /// All tokens so far, those included that it began with.
    pub fn generated(&self) -> &[Token] {
        &self.generated
    }

    /// Where the session stands.
    pub fn state(&self) -> State {
        let streaming = self.attempts.iter().any(Attempt::has_streamed);
        match self.attempts.len() {
            _ if self.ended => State::Ended,
            2.. => State::Hedged,
            1 if streaming => State::Streaming,
            0 if self.look_again.is_some() => State::Waiting,
            _ if self.generated.len() == self.began_with => State::Opening,
            _ => State::Resuming,
        }
    }

    /// Takes an event, and says what to do.
    pub fn handle(&mut self, event: Event, now: Now) -> Vec<Action> {
        if self.ended {
            return Vec::new();
        }
        match event {
            Event::Peers { offers, retry_at } => self.peers(offers, retry_at, now),
            Event::PeersChanged => self.look_again = self.look_again.map(|_| now),
            Event::Admitted { attempt, cached_tokens } => {
                if let Some(index) = self.find(attempt) {
                    self.attempts[index].admit(cached_tokens, now);
                    self.waiting_since = None;
                }
            }
            Event::Refused { attempt, because } => self.refused(attempt, because, now),
            Event::Progress { attempt } => {
                if let Some(index) = self.find(attempt) {
                    self.attempts[index].progressed(now);
                }
            }
            Event::Tokens { attempt, first_sequence, tokens } => self.tokens(attempt, first_sequence, tokens, now),
            Event::Finished { attempt, reason } => self.finished(attempt, reason, now),
            Event::Failed { attempt, code } => self.failed(attempt, code, now),
            Event::Gone { attempt } => {
                if let Some(index) = self.find(attempt) {
                    self.lose(index, now);
                }
            }
            Event::Alive { peer } => {
                self.attempts.iter_mut().filter(|attempt| attempt.peer == peer).for_each(Attempt::alive);
            }
            Event::ReaderFull => self.reader_full = true,
            Event::ReaderReady => {
                self.reader_full = false;
                self.attempts.iter_mut().for_each(|attempt| attempt.excuse(now));
            }
            Event::Timer => self.timer = None,
            Event::ClientGone => {
                self.cancel_all();
                self.ended = true;
            }
        }
        self.go_on(now);
        std::mem::take(&mut self.actions)
    }

    /// What follows from the state alone, whatever event led to it.
    fn go_on(&mut self, now: Now) {
        if !self.ended && !self.reader_full {
            self.judge_silence(now);
        }
        if !self.ended && self.attempts.is_empty() && self.is_complete() {
            self.complete_without_word();
        }
        if self.ended {
            return;
        }
        let looking = self.attempts.is_empty() && self.look_again.is_none_or(|at| at <= now);
        if !self.finding && (looking || (self.wants_hedge() && self.next_hedge <= now)) {
            self.finding = true;
            self.look_again = None;
            self.excluded.retain(|_, until| until.is_none_or(|until| until > now));
            let active = self.attempts.iter().map(|attempt| attempt.peer);
            let excluded = self.excluded.keys().copied().chain(active).collect();
            self.actions.push(Action::FindPeers { excluded });
        }
        let deadlines = self.attempts.iter().filter(|_| !self.reader_full).map(Attempt::next_deadline);
        let hedge = (self.wants_hedge() && !self.finding).then_some(self.next_hedge);
        let next = deadlines.chain(self.look_again).chain(hedge).min();
        if let Some(at) = next.filter(|at| self.timer != Some(*at)) {
            self.timer = Some(at);
            self.actions.push(Action::SetTimer(at));
        }
    }

    fn judge_silence(&mut self, now: Now) {
        let mut index = 0;
        while let Some(attempt) = self.attempts.get_mut(index) {
            let (id, peer) = (attempt.id, attempt.peer);
            match attempt.judge(now) {
                // Nothing is missing but the word that it is complete.
                Silence::Suspicious | Silence::Gone if self.is_complete() => return self.complete_without_word(),
                Silence::Suspicious => self.actions.push(Action::Probe { peer }),
                Silence::Gone => {
                    self.actions.push(Action::Cancel { attempt: id, peer });
                    self.lose(index, now);
                    if self.ended {
                        return;
                    }
                    continue;
                }
                Silence::Fine => {}
            }
            index += 1;
        }
    }

    fn wants_hedge(&self) -> bool {
        let suspected = matches!(self.attempts.as_slice(), [only] if only.is_suspected());
        suspected && self.hedges < HEDGES_MAX && !self.reader_full
    }

    fn peers(&mut self, offers: Vec<Offer>, retry_at: Option<Now>, now: Now) {
        if !std::mem::take(&mut self.finding) {
            return;
        }
        let asked = |offer: &Offer| self.attempts.iter().any(|attempt| attempt.peer == offer.peer);
        let fit = |offer: &Offer| !self.excluded.contains_key(&offer.peer) && !asked(offer);
        let best = offers.into_iter().find(fit);
        match best {
            Some(offer) if self.attempts.is_empty() => self.open(offer, now),
            Some(offer) if self.wants_hedge() => {
                self.hedges += 1;
                self.open(offer, now);
            }
            None if self.attempts.is_empty() => self.wait(retry_at, now),
            _ => self.next_hedge = now.plus_ms(WAIT_POLL_MS),
        }
    }

    fn open(&mut self, offer: Offer, now: Now) {
        if self.opened_since_token >= ATTEMPTS_MAX {
            return self.give_up(now);
        }
        self.opened_since_token += 1;
        let attempt = AttemptId(self.next_attempt);
        self.next_attempt = self.next_attempt.wrapping_add(1);
        self.attempts.push(Attempt::open(attempt, offer, now));
        self.actions.push(Action::Open { attempt, peer: offer.peer });
    }

    /// Nobody can be asked now.
    fn wait(&mut self, retry_at: Option<Now>, now: Now) {
        let since = *self.waiting_since.get_or_insert(now);
        if self.obstacle == Obstacle::Nobody && retry_at.is_some() {
            self.obstacle = Obstacle::Busy;
        }
        let hopeless = self.obstacle == Obstacle::Nobody || !self.bad_requests.is_empty();
        if hopeless || now.since_ms(since) >= self.wait_ms_max {
            return self.give_up(now);
        }
        let excluded_until = self.excluded.values().flatten().copied();
        let poll_at = now.plus_ms(WAIT_POLL_MS);
        let soonest = excluded_until.chain(retry_at).filter(|at| *at > now).fold(poll_at, Now::min);
        self.look_again = Some(soonest);
    }

    fn give_up(&mut self, now: Now) {
        let waited_ms = self.waiting_since.map_or(0, |since| now.since_ms(since));
        let obstacle = std::mem::replace(&mut self.obstacle, Obstacle::Nobody);
        let why = match (self.bad_requests.pop(), obstacle) {
            (Some(reason), _) => RequestError::BadRequest(reason),
            (None, Obstacle::Nobody) => RequestError::NoPeer,
            (None, Obstacle::Busy) => RequestError::Busy { waited_ms },
            (None, Obstacle::NoMemory { reason }) => RequestError::NoMemory(reason),
            (None, Obstacle::Gone) => RequestError::Lost { waited_ms },
        };
        self.end(Action::Fail(why));
    }

    fn refused(&mut self, attempt: AttemptId, because: Refused, now: Now) {
        let Some(index) = self.find(attempt) else { return };
        let peer = self.attempts.remove(index).peer;
        let pause_until = Some(now.plus_ms(REFUSED_PAUSE_MS));
        let (until, verdict) = match because {
            Refused::Busy { retry_ms } => {
                self.obstacle = Obstacle::Busy;
                let retry_ms = u64::from(retry_ms);
                // A peer that says BUSY and "at once" would be asked at once, for ever.
                (Some(now.plus_ms(retry_ms.clamp(BUSY_MS_MIN, WAIT_MS_MAX))), Some(Verdict::Busy { retry_ms }))
            }
            Refused::NoMemory { reason } => {
                self.obstacle = Obstacle::NoMemory { reason };
                (pause_until, Some(Verdict::NoMemory))
            }
            Refused::BadRequest { reason } => {
                self.bad_requests.push(reason);
                (None, Some(Verdict::BadRequest))
            }
            Refused::NotServed { .. } | Refused::Unknown { .. } => (pause_until, None),
        };
        self.excluded.insert(peer, until);
        self.actions.extend(verdict.map(|verdict| Action::Report { peer, verdict }));
        if self.attempts.is_empty() && self.bad_requests.len() >= BAD_REQUESTS_MAX {
            self.give_up(now);
        }
    }

    fn tokens(&mut self, attempt: AttemptId, first_sequence: u32, tokens: Vec<Sampled>, now: Now) {
        let Some(index) = self.find(attempt) else { return };
        let mut accepted = 0;
        let mut broken = false;
        for (offset, sampled) in tokens.into_iter().enumerate() {
            let place = usize::try_from(first_sequence).unwrap_or(usize::MAX).saturating_add(offset);
            match self.generated.get(place) {
                Some(known) if *known == sampled.token => continue,
                Some(_) => broken = true,
                None => broken = place > self.generated.len() || self.is_complete(),
            }
            if broken {
                break;
            }
            if accepted == 0 {
                self.won_by(attempt);
            }
            accepted += 1;
            self.generated.push(sampled.token);
            self.grammar_ended = sampled.grammar_ended;
            self.actions.push(Action::Emit(sampled));
        }
        // The others were cancelled if a token was accepted, so the place of this one may have changed.
        let index = if accepted > 0 { 0 } else { index };
        if accepted > 0 {
            self.attempts[index].stepped(accepted, now);
            self.opened_since_token = 0;
            self.deaths_since_token = 0;
            self.waiting_since = None;
        }
        if broken {
            self.break_off(index, now);
        }
    }

    fn finished(&mut self, attempt: AttemptId, reason: FinishReason, now: Now) {
        let Some(index) = self.find(attempt) else { return };
        if reason == FinishReason::Length && self.generated.len() < self.tokens_max() {
            // A part of an answer must not look like all of it.
            return self.break_off(index, now);
        }
        self.won_by(attempt);
        let winner = self.attempts.remove(0);
        self.actions.push(Action::Measured { peer: winner.peer, measured: winner.measured() });
        self.actions.push(Action::Report { peer: winner.peer, verdict: Verdict::Ok });
        self.end(Action::Finish(reason));
    }

    fn failed(&mut self, attempt: AttemptId, code: FailureCode, now: Now) {
        let Some(index) = self.find(attempt) else { return };
        match code {
            // It says so in good order, and nothing is wrong with it.
            FailureCode::Leaving => self.part_from(index, REFUSED_PAUSE_MS, now),
            // It was this reader who was slow: whoever has begun can go on at once.
            FailureCode::LeaseExpired => self.part_from(index, BUSY_MS_MIN, now),
            FailureCode::Engine | FailureCode::BadMessage | FailureCode::Unknown => self.lose(index, now),
        }
    }

    /// An attempt has ended for which its peer is not to blame; it is not asked again for so long.
    fn part_from(&mut self, index: usize, pause_ms: u64, now: Now) {
        let left = self.attempts.remove(index);
        self.actions.push(Action::Measured { peer: left.peer, measured: left.measured() });
        self.excluded.insert(left.peer, Some(now.plus_ms(pause_ms)));
        self.obstacle = Obstacle::Gone;
    }

    /// Cancels all other attempts: this one is the only one then.
    fn won_by(&mut self, winner: AttemptId) {
        for loser in self.attempts.extract_if(.., |attempt| attempt.id != winner) {
            self.actions.push(Action::Cancel { attempt: loser.id, peer: loser.peer });
        }
    }

    /// The peer broke the protocol.
    fn break_off(&mut self, index: usize, now: Now) {
        let Some(attempt) = self.attempts.get(index) else { return };
        self.actions.push(Action::Cancel { attempt: attempt.id, peer: attempt.peer });
        self.lose(index, now);
    }

    /// The attempt is gone, with its peer.
    fn lose(&mut self, index: usize, now: Now) {
        let lost = self.attempts.remove(index);
        let peer = lost.peer;
        self.actions.push(Action::Measured { peer, measured: lost.measured() });
        self.actions.push(Action::Report { peer, verdict: Verdict::Gone });
        self.excluded.insert(peer, Some(now.plus_ms(GONE_PAUSE_MS)));
        self.obstacle = Obstacle::Gone;
        self.deaths_since_token += u32::from(lost.admitted.is_some());
        if self.attempts.is_empty() && !self.is_complete() && self.deaths_since_token >= DEATHS_MAX {
            self.end(Action::Fail(RequestError::Deadly { deaths: self.deaths_since_token }));
        }
    }

    fn tokens_max(&self) -> usize {
        usize::try_from(self.limits_tokens_max).unwrap_or(usize::MAX)
    }

    /// No token can follow.
    fn is_complete(&self) -> bool {
        self.grammar_ended || self.generated.len() >= self.tokens_max()
    }

    fn complete_without_word(&mut self) {
        let reason = if self.grammar_ended { FinishReason::EndOfText } else { FinishReason::Length };
        self.end(Action::Finish(reason));
    }

    fn end(&mut self, last: Action) {
        self.cancel_all();
        self.ended = true;
        self.actions.push(last);
    }

    fn cancel_all(&mut self) {
        for attempt in self.attempts.drain(..) {
            self.actions.push(Action::Cancel { attempt: attempt.id, peer: attempt.peer });
        }
    }

    fn find(&self, attempt: AttemptId) -> Option<usize> {
        self.attempts.iter().position(|known| known.id == attempt)
    }
}
