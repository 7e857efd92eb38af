//! The driver of one model's sessions: which rows go to which stage, and what happens when a stage dies.
//!
//! A pure state machine without I/O or clock. Frames from the stages and requests from the API go in; frames for the
//! stages come out of [`Driver::take_output`], and every session hears its own events through a bounded channel.
//!
//! A session's truth is its list of tokens (prompt, then what was generated). Everything the stages hold can be computed
//! from it again, so a lost stage costs time and nothing else: all sessions get a new epoch, are opened anew on every
//! stage, and the rows that are missing go through the ring once more. Prompt rows are always cut at the same boundaries,
//! so in exact mode the replay gives the same bits, and the stream goes on with the same tokens.

use std::collections::{BTreeMap, VecDeque};

use murmur_protocol::{
    frame::{FLAG_FORGET, FLAG_PREFILL, FLAG_WANT_OUTPUT, Frame, Header, Kind},
    sampling::{Sampled, SamplingParams, Token},
    stage::{NotOpened, Open, Opened, Step},
};
use tokio::sync::mpsc;

use crate::schedule::EXACT_DECODE_ROWS_MAX;

/// Events a reader may lag behind before its session pauses.
pub const EVENTS_MAX: usize = 64;
/// Room that must be left before another step is sent: its token and an ending.
const EVENTS_MARGIN: usize = 4;
/// A session whose stages died this often without a new token in between is given up: it may be what kills them.
const RESTARTS_MAX: u32 = 3;

/// What a session asks for.
#[derive(Debug, Clone)]
pub struct SessionRequest {
    /// Prompt tokens, at least one.
    pub prompt: Vec<Token>,
    /// Tokens to generate at most; prompt and answer together must fit the context.
    pub max_tokens: u32,
    /// How to sample.
    pub sampling: SamplingParams,
}

/// What happens to a session.
#[derive(Debug, Clone, PartialEq)]
pub enum SessionEvent {
    /// Prompt tokens are done so far.
    Prefill {
        /// Tokens done, cached ones included.
        done_tokens: u32,
        /// Tokens found in the prefix cache.
        cached_tokens: u32,
    },
    /// A token.
    Token(Sampled),
    /// The end, after the last token.
    Ended(Ending),
    /// The session failed: what happened.
    Failed(String),
}

/// Why a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The model (or the grammar) ended.
    EndOfText,
    /// `max_tokens` were generated.
    Length,
}

/// The queue is full.
#[derive(Debug, PartialEq, Eq)]
pub struct QueueFull;

/// Fixed facts of a ring.
#[derive(Debug, Clone)]
pub struct DriverOptions {
    /// Number of stages.
    pub stages: usize,
    /// Prompt rows per frame.
    pub chunk_rows: u32,
    /// Replay generated tokens through the kernels that computed them first.
    pub exact: bool,
    /// Sessions that may wait for admission.
    pub queue_max: usize,
    /// Tokens that end a generation.
    pub end_of_generation: Vec<Token>,
}

enum Phase {
    /// Waiting for room, or for stages to come (back).
    Queued,
    /// `Open` is on its way, sent when `releases` sessions had ended.
    Opening { missing: Vec<bool>, cached_tokens: u32, releases: u64 },
    /// Rows are on their way. `next`: first position not sent. `in_flight`: frames sent and not answered; `prefill`:
    /// whether these are prompt rows.
    Running { next: u32, in_flight: usize, prefill: bool },
}

struct Session {
    epoch: u32,
    phase: Phase,
    tokens: Vec<Token>,
    prompt_tokens: u32,
    cached_tokens: u32,
    max_tokens: u32,
    sampling: SamplingParams,
    events: mpsc::Sender<SessionEvent>,
    restarts: u32,
}

impl Session {
    fn generated(&self) -> &[Token] {
        &self.tokens[self.prompt_tokens as usize..]
    }

    /// The next frame's rows: positions `start..end`, and whether they are prompt rows.
    fn next_rows(&self, start: u32, options: &DriverOptions) -> (u32, bool) {
        let chunk = options.chunk_rows;
        if start < self.prompt_tokens {
            return (((start / chunk + 1) * chunk).min(self.prompt_tokens), true);
        }
        let left = self.tokens.len() as u32 - start;
        let rows = if options.exact { EXACT_DECODE_ROWS_MAX as u32 } else { chunk };
        (start + left.min(rows), left > 1 && !options.exact)
    }
}

/// Counters for metrics.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counters {
    /// Prompt tokens computed.
    pub prompt_tokens: u64,
    /// Prompt tokens found in the prefix cache.
    pub cached_tokens: u64,
    /// Tokens generated.
    pub generated_tokens: u64,
    /// Sessions begun.
    pub sessions: u64,
    /// Stages lost.
    pub stages_lost: u64,
    /// Steps of the last stage that gave tokens, by session: one batch of eight streams counts eight times.
    pub token_steps: u64,
    /// Time the batches of these steps took to compute in the last stage, us.
    pub token_compute_us: u64,
}

/// The state machine. See the module's page.
pub struct Driver {
    options: DriverOptions,
    ready: Vec<bool>,
    sessions: BTreeMap<u64, Session>,
    queue: VecDeque<u64>,
    /// Sessions that ended so far, each of which made room.
    releases: u64,
    next_id: u64,
    output: Vec<(usize, Frame)>,
    failed: Option<String>,
    counters: Counters,
    last_step: Vec<Option<Step>>,
}

impl Driver {
    /// No stage is ready yet.
    pub fn new(options: DriverOptions) -> Driver {
        let stages = options.stages;
        Driver {
            options,
            ready: vec![false; stages],
            sessions: BTreeMap::new(),
            queue: VecDeque::new(),
            releases: 0,
            next_id: 1,
            output: Vec::new(),
            failed: None,
            counters: Counters::default(),
            last_step: vec![None; stages],
        }
    }

    /// Frames to send, by stage, in order.
    pub fn take_output(&mut self) -> Vec<(usize, Frame)> {
        std::mem::take(&mut self.output)
    }

    /// Counters so far.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Sessions admitted and running.
    pub fn running(&self) -> usize {
        self.sessions.values().filter(|session| matches!(session.phase, Phase::Running { .. })).count()
    }

    /// Sessions waiting for admission.
    pub fn queued(&self) -> usize {
        self.sessions.len() - self.running()
    }

    /// True when all stages are up.
    pub fn is_ready(&self) -> bool {
        self.ready.iter().all(|&r| r)
    }

    /// The newest step account of the last stage.
    pub fn last_step(&self) -> Option<&Step> {
        self.last_step.last().and_then(Option::as_ref)
    }

    /// A session begins, or waits its turn.
    pub fn start(&mut self, request: SessionRequest) -> Result<(u64, mpsc::Receiver<SessionEvent>), QueueFull> {
        if self.queued() >= self.options.queue_max {
            return Err(QueueFull);
        }
        let id = self.next_id;
        self.next_id += 1;
        let (events, receiver) = mpsc::channel(EVENTS_MAX);
        if let Some(reason) = &self.failed {
            let _ = events.try_send(SessionEvent::Failed(reason.clone()));
            return Ok((id, receiver));
        }
        let session = Session {
            epoch: 0,
            phase: Phase::Queued,
            prompt_tokens: request.prompt.len() as u32,
            tokens: request.prompt,
            cached_tokens: 0,
            max_tokens: request.max_tokens,
            sampling: request.sampling,
            events,
            restarts: 0,
        };
        self.counters.sessions += 1;
        self.sessions.insert(id, session);
        self.queue.push_back(id);
        self.admit();
        Ok((id, receiver))
    }

    /// The session's reader is gone: stop computing for it.
    pub fn cancel(&mut self, id: u64) {
        self.remove(id, false);
    }

    /// The session's reader has caught up.
    pub fn resume(&mut self, id: u64) {
        self.advance(id);
    }

    /// A stage is loaded and empty.
    pub fn on_ready(&mut self, stage: usize) {
        self.ready[stage] = true;
        self.admit();
    }

    /// A stage died with everything it held.
    pub fn on_lost(&mut self, stage: usize) {
        self.counters.stages_lost += 1;
        self.ready[stage] = false;
        self.output.retain(|(to, _)| *to != stage);
        let mut given_up = Vec::new();
        let mut interrupted = Vec::new();
        for (&id, session) in &mut self.sessions {
            if !matches!(session.phase, Phase::Queued) {
                session.phase = Phase::Queued;
                session.epoch += 1;
                session.restarts += 1;
                interrupted.push(id);
                if session.restarts > RESTARTS_MAX {
                    given_up.push(id);
                }
            }
        }
        for &id in interrupted.iter().rev() {
            self.close_everywhere(id, 0);
            self.queue.push_front(id);
        }
        for id in given_up {
            let reason = "the engine process died repeatedly while it worked on this request; it was restarted each \
                          time, and the request is now given up"
                .to_owned();
            self.fail(id, reason);
        }
    }

    /// The stages cannot be brought back: every session fails, now and later.
    pub fn on_failed(&mut self, reason: &str) {
        self.failed = Some(reason.to_owned());
        for id in self.sessions.keys().copied().collect::<Vec<_>>() {
            self.fail(id, reason.to_owned());
        }
    }

    /// A frame from a stage.
    pub fn on_frame(&mut self, stage: usize, frame: Frame) {
        let header = frame.header;
        let current = self.sessions.get(&header.session).is_some_and(|s| s.epoch == header.epoch);
        if !current {
            return;
        }
        let handled = match header.kind {
            Kind::Opened => frame.decode().map(|opened| self.on_opened(stage, header.session, opened)),
            Kind::NotOpened => frame.decode().map(|refused| self.on_not_opened(header.session, refused)),
            Kind::Hidden => {
                self.output.push((stage + 1, frame));
                Ok(())
            }
            Kind::Done | Kind::Sampled => frame.decode().map(|step| self.on_step(stage, &header, step)),
            Kind::StepFailed => {
                self.fail(header.session, frame.as_text());
                Ok(())
            }
            _ => Ok(()),
        };
        if let Err(error) = handled {
            self.fail(header.session, format!("the engine process sent something unreadable: {error}"));
        }
    }

    /// Opens queued sessions, oldest first, one at a time: whether there is room is the stages' to say.
    fn admit(&mut self) {
        if !self.is_ready() || self.sessions.values().any(|s| matches!(s.phase, Phase::Opening { .. })) {
            return;
        }
        let Some(id) = self.queue.pop_front() else { return };
        let stages = self.options.stages;
        let Some(session) = self.sessions.get_mut(&id) else { return };
        session.phase =
            Phase::Opening { missing: vec![true; stages], cached_tokens: u32::MAX, releases: self.releases };
        let mut header = Header::new(Kind::Open, id);
        header.epoch = session.epoch;
        for stage in 0..stages {
            let open = Open {
                prompt: session.tokens[..session.prompt_tokens as usize].to_vec(),
                generated: session.generated().to_vec(),
                reserve_cells: session.prompt_tokens + session.max_tokens,
                sampling: (stage + 1 == stages).then(|| session.sampling.clone()),
            };
            match Frame::message(header, &open) {
                Ok(frame) => self.output.push((stage, frame)),
                Err(error) => {
                    let reason = format!("the request cannot be sent to the engine: {error}");
                    return self.fail(id, reason);
                }
            }
        }
    }

    fn on_opened(&mut self, stage: usize, id: u64, opened: Opened) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let Phase::Opening { missing, cached_tokens, .. } = &mut session.phase else { return };
        missing[stage] = false;
        *cached_tokens = opened.cached_tokens.min(*cached_tokens);
        if missing.iter().any(|&m| m) {
            return;
        }
        let cached = (*cached_tokens).min(session.tokens.len() as u32 - 1);
        if session.generated().is_empty() {
            session.cached_tokens = cached.min(session.prompt_tokens);
            self.counters.cached_tokens += u64::from(session.cached_tokens);
        }
        session.phase = Phase::Running { next: cached, in_flight: 0, prefill: false };
        self.advance(id);
        self.admit();
    }

    fn on_not_opened(&mut self, id: u64, refused: NotOpened) {
        match refused {
            NotOpened::Bad(reason) => self.fail(id, reason),
            NotOpened::Busy { .. } => {
                let releases = self.releases;
                let nothing_runs = self.running() == 0;
                self.close_everywhere(id, 0);
                let Some(session) = self.sessions.get_mut(&id) else { return };
                // Room made after the question was sent was not seen by the answer.
                let made_room = !matches!(session.phase, Phase::Opening { releases: at, .. } if at == releases);
                session.phase = Phase::Queued;
                session.epoch += 1;
                self.queue.push_front(id);
                if made_room {
                    self.admit();
                } else if nothing_runs {
                    // No session will end and make room: an answer is better than waiting for ever.
                    self.fail(id, "the engine is full although nothing runs; this is a bug, please report it".into());
                }
                // Otherwise the next session that ends makes room.
            }
        }
    }

    fn on_step(&mut self, stage: usize, header: &Header, step: Step) {
        let id = header.session;
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let Phase::Running { in_flight, .. } = &mut session.phase else { return };
        *in_flight = in_flight.saturating_sub(1);
        let done = header.position + header.rows;
        if header.has(FLAG_PREFILL) {
            self.counters.prompt_tokens += u64::from(header.rows);
            let progress = SessionEvent::Prefill {
                done_tokens: done.min(session.prompt_tokens),
                cached_tokens: session.cached_tokens,
            };
            if session.events.capacity() > EVENTS_MARGIN {
                let _ = session.events.try_send(progress);
            }
        }
        let sampled = step.sampled.clone();
        if sampled.is_some() && !header.has(FLAG_PREFILL) {
            self.counters.token_steps += 1;
            self.counters.token_compute_us += u64::from(step.compute_us);
        }
        self.last_step[stage] = Some(step);
        let Some(sampled) = sampled else { return self.advance(id) };
        let token = sampled.token;
        let grammar_ended = sampled.grammar_ended;
        session.restarts = 0;
        session.tokens.push(token);
        self.counters.generated_tokens += 1;
        let full = session.generated().len() as u32 >= session.max_tokens;
        let ended = !session.sampling.ignore_eos && self.options.end_of_generation.contains(&token) || grammar_ended;
        let heard = session.events.try_send(SessionEvent::Token(sampled)).is_ok();
        if ended || full {
            let ending = if ended { Ending::EndOfText } else { Ending::Length };
            let _ = session.events.try_send(SessionEvent::Ended(ending));
            self.remove(id, false);
        } else if !heard {
            // The reader is gone (a full channel cannot be: a step is sent only when there is room for its token).
            self.remove(id, false);
        } else {
            self.advance(id);
        }
    }

    /// Sends what may be sent: enough prompt chunks to keep every stage busy, and a wanted row only when its token will
    /// find room.
    fn advance(&mut self, id: u64) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let Phase::Running { mut next, mut in_flight, prefill: mut prefill_before } = session.phase else { return };
        let length = session.tokens.len() as u32;
        while next < length && in_flight <= self.options.stages {
            let (end, prefill) = session.next_rows(next, &self.options);
            let wanted = end == length;
            if wanted && session.events.capacity() < EVENTS_MARGIN {
                break;
            }
            // Stages compute decode rows before prompt rows: replayed ones must not overtake the prompt they follow.
            if in_flight > 0 && prefill != prefill_before {
                break;
            }
            prefill_before = prefill;
            let mut header = Header::new(Kind::Tokens, id);
            header.epoch = session.epoch;
            header.position = next;
            header.flags = if prefill { FLAG_PREFILL } else { 0 } | if wanted { FLAG_WANT_OUTPUT } else { 0 };
            self.output.push((0, Frame::tokens(header, &session.tokens[next as usize..end as usize])));
            next = end;
            in_flight += 1;
        }
        session.phase = Phase::Running { next, in_flight, prefill: prefill_before };
    }

    fn fail(&mut self, id: u64, reason: String) {
        if let Some(session) = self.sessions.get(&id) {
            let _ = session.events.try_send(SessionEvent::Failed(reason));
        }
        self.remove(id, true);
    }

    fn remove(&mut self, id: u64, forget: bool) {
        self.close_everywhere(id, if forget { FLAG_FORGET } else { 0 });
        self.sessions.remove(&id);
        self.releases += 1;
        self.queue.retain(|&queued| queued != id);
        self.admit();
    }

    fn close_everywhere(&mut self, id: u64, flags: u16) {
        let Some(session) = self.sessions.get(&id) else { return };
        let mut header = Header::new(Kind::Close, id);
        (header.epoch, header.flags) = (session.epoch, flags);
        self.output.retain(|(_, frame)| frame.header.session != id || frame.header.kind == Kind::Close);
        for stage in (0..self.options.stages).filter(|&s| self.ready[s]) {
            self.output.push((stage, Frame { header, payload: Vec::new() }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn driver(stages: usize) -> Driver {
        let mut driver = Driver::new(DriverOptions {
            stages,
            chunk_rows: 4,
            exact: false,
            queue_max: 8,
            end_of_generation: vec![0],
        });
        (0..stages).for_each(|stage| driver.on_ready(stage));
        driver
    }

    fn request() -> SessionRequest {
        SessionRequest { prompt: (1..=10).collect(), max_tokens: 3, sampling: SamplingParams::default() }
    }

    fn sent(driver: &mut Driver) -> Vec<(usize, Kind, u64, u32, u32)> {
        let frames = driver.take_output().into_iter();
        frames.map(|(to, f)| (to, f.header.kind, f.header.session, f.header.epoch, f.header.position)).collect()
    }

    fn answer<T: serde::Serialize>(driver: &mut Driver, stage: usize, kind: Kind, at: (u64, u32), message: &T) {
        let mut header = Header::new(kind, at.0);
        header.epoch = at.1;
        driver.on_frame(stage, Frame::message(header, message).unwrap());
    }

    #[test]
    fn room_made_while_a_busy_answer_was_on_its_way_is_not_forgotten() {
        let mut driver = driver(1);
        let (first, _events) = driver.start(request()).unwrap();
        answer(&mut driver, 0, Kind::Opened, (first, 0), &Opened { cached_tokens: 0 });
        let (second, _events) = driver.start(request()).unwrap();
        driver.cancel(first);
        sent(&mut driver);
        // The stage said this before it heard of the cancel.
        answer(&mut driver, 0, Kind::NotOpened, (second, 0), &NotOpened::Busy { retry_ms: 1 });
        assert!(sent(&mut driver).contains(&(0, Kind::Open, second, 1, 0)));
    }

    #[test]
    fn the_ring_starts_where_every_stage_has_the_prefix() {
        let mut driver = driver(2);
        let (id, _events) = driver.start(request()).unwrap();
        sent(&mut driver);
        answer(&mut driver, 0, Kind::Opened, (id, 0), &Opened { cached_tokens: 9 });
        assert!(sent(&mut driver).is_empty());
        answer(&mut driver, 1, Kind::Opened, (id, 0), &Opened { cached_tokens: 5 });
        // Rows 5..8 end at the chunk boundary, 8..10 are the rest.
        assert_eq!(sent(&mut driver), [(0, Kind::Tokens, id, 0, 5), (0, Kind::Tokens, id, 0, 8)]);
    }

    #[test]
    fn a_lost_stage_opens_every_session_anew_and_old_answers_are_ignored() {
        let mut driver = driver(2);
        let (id, mut events) = driver.start(request()).unwrap();
        for stage in 0..2 {
            answer(&mut driver, stage, Kind::Opened, (id, 0), &Opened { cached_tokens: 0 });
        }
        driver.on_lost(1);
        sent(&mut driver);
        let stale = Step { sampled: None, compute_us: 1, batch_rows: 1, threads: 1 };
        answer(&mut driver, 1, Kind::Done, (id, 0), &stale);
        assert!(sent(&mut driver).is_empty() && events.try_recv().is_err());
        driver.on_ready(1);
        let opened: Vec<_> = sent(&mut driver);
        assert_eq!(opened, [(0, Kind::Open, id, 1, 0), (1, Kind::Open, id, 1, 0)]);
    }

    #[test]
    fn a_session_whose_stages_keep_dying_is_given_up_with_a_reason() {
        let mut driver = driver(1);
        let (id, mut events) = driver.start(request()).unwrap();
        for epoch in 0..=RESTARTS_MAX {
            answer(&mut driver, 0, Kind::Opened, (id, epoch), &Opened { cached_tokens: 0 });
            driver.on_lost(0);
            driver.on_ready(0);
        }
        assert!(matches!(events.try_recv(), Ok(SessionEvent::Failed(_))));
        assert_eq!(driver.queued() + driver.running(), 0);
    }
}
