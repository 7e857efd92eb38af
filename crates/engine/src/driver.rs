//! The driver of one model's sessions: which rows go to which stage, and what happens when a stage dies.
//!
//! A pure state machine without I/O or clock (it is told the time). Frames from the stages and requests from the API go in; frames for the
//! stages come out of [`Driver::take_output`], and every session hears its own events through a bounded channel.
//!
//! A session's truth is its list of tokens (prompt, then what was generated). Everything the stages hold can be computed
//! from it again, so a lost stage costs time and nothing else: all sessions get a new epoch and are opened again on every
//! stage. Each says how much it holds, and how much of that it can send on once more; each is then fed what it lacks, from as
//! near as possible (`Session::plan`). Prompt rows are always cut at the same boundaries, so in exact mode the replay gives
//! the same bits, and the stream goes on with the same tokens.
//!
//! Rows of guessed tokens are sent before the tokens are known, where that pays (`driver::draft`, by times from `driver::pace`). A wrong guess
//! begins a new epoch in place: stages drop what is queued of the old one, and the position of the next row says what to forget. Guesses
//! are looked up, or made by a small model beside the ring (`driver::guessing`, `driver::pursuit`).
//!
//! A request may be what kills the stages. Those that were being computed at a death are charged with it, and a token
//! clears a session. One that was charged twice is a suspect: suspects are run one at a time with nothing else beside
//! them, and only a suspect that dies alone is given up, so a poisonous request takes no other with it.

mod draft;
mod gain;
mod guessing;
mod pace;
mod pursuit;
mod session;
mod train;

use std::collections::{BTreeMap, VecDeque};

use murmur_protocol::{
    codec::Codec,
    frame::{FLAG_FORGET, FLAG_GUESS, FLAG_HANDED_ON, FLAG_HOLD, FLAG_PREFILL, FLAG_WANT_OUTPUT, Frame, Header, Kind},
    sampling::{Sampled, SamplingParams, Token},
    stage::{NotOpened, Opened, Sessions, Step},
};
use tokio::sync::mpsc;

use draft::Plan;
pub use draft::{DEPTHS, Guessing};
use pace::Pace;
pub use session::{Draft, DraftModel, Ending, PeerDraft, SessionEvent, SessionRequest};
use session::{Phase, Rows, Session};

/// Events a reader may lag behind before its session pauses.
pub const LAG_MAX: usize = 64;
/// Events there is room for: guesses that were right come many at a time.
const EVENTS_MAX: usize = 256;
/// Room that is left for what ends an answer: its last token, what was guessed, and an ending.
const EVENTS_MARGIN: usize = 4;
/// Why a session does not begin.
#[derive(Debug, PartialEq, Eq)]
pub enum NotStarted {
    /// As many sessions wait as may.
    QueueFull,
    /// A stage cannot be had at present, or the engine ends: why.
    Unavailable(String),
}

/// A stage, as the driver knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Health {
    /// Loading, or dead and about to be started again.
    Down,
    /// Loaded.
    Up,
    /// Tried repeatedly in vain: why. It may come back later.
    Failed(String),
}

/// Fixed facts of a ring.
#[derive(Debug, Clone)]
pub struct DriverOptions {
    /// Number of stages.
    pub stages: usize,
    /// Sessions that run at once.
    pub parallel: usize,
    /// Prompt rows per frame.
    pub chunk_rows: u32,
    /// Replay generated tokens through the kernels that computed them first.
    pub exact: bool,
    /// Sessions that may wait for admission.
    pub queue_max: usize,
    /// Tokens that end a generation.
    pub end_of_generation: Vec<Token>,
    /// Number of tokens that there are: no stage can have chosen another.
    pub vocabulary: usize,
    /// Stages have other drivers too, so that they may be full although nothing runs here.
    pub is_shared: bool,
    /// How hidden states leave each stage; f32 where nothing is said.
    pub codecs: Vec<Codec>,
    /// Who guesses.
    pub draft: Draft,
    /// How long a frame is on its way around the stages, beside computing, us, as far as is known. It is measured when they run.
    pub travel_us: u64,
}

impl DriverOptions {
    fn ends(&self, token: Token, sampling: &SamplingParams) -> bool {
        !sampling.ignore_eos && self.end_of_generation.contains(&token)
    }

    fn has(&self, token: Token) -> bool {
        usize::try_from(token).is_ok_and(|token| token < self.vocabulary)
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
    /// Tokens guessed.
    pub guessed_tokens: u64,
    /// Of these, those that were right.
    pub right_tokens: u64,
    /// Guesses that were compared with what was chosen, by how many others waited before them; the last for all beyond.
    pub guessed_by_depth: [u64; DEPTHS],
    /// Of these, those that were right.
    pub right_by_depth: [u64; DEPTHS],
    /// Time from each wrong guess to the token after the one that was chosen instead, us: what wrong guesses have cost at most.
    pub rejected_us: u64,
    /// Sessions begun.
    pub sessions: u64,
    /// Stages lost.
    pub stages_lost: u64,
    /// Steps of the last stage on the row of a known token, which gave the next, by session: one batch of eight streams counts eight times.
    /// Guesses do not count: a step of many is one.
    pub token_steps: u64,
    /// Time the batches of these steps took to compute in all stages, us.
    pub token_compute_us: u64,
}

impl Counters {
    /// Measured time of a token, us; `None`: not measured.
    pub fn us_per_token(&self) -> Option<u64> {
        self.token_compute_us.checked_div(self.token_steps)
    }
}

/// What a stage has said of its work.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Account {
    /// Its newest step.
    pub last_step: Option<Step>,
    /// Rows that it has computed.
    pub computed_rows: u64,
}

/// Whether rows are those of a single token that is known: what they take is the time of a token.
fn is_plain(header: &Header) -> bool {
    header.rows == 1 && !header.has(FLAG_GUESS)
}

/// Whether others were computed with these rows, which held them up.
fn is_held_up(header: &Header, step: &Step) -> bool {
    step.batch_rows > header.rows
}

/// Events and the room for them in their session's channel.
type News = Vec<(mpsc::OwnedPermit<SessionEvent>, SessionEvent)>;

/// The state machine. See the module's page.
pub struct Driver {
    options: DriverOptions,
    health: Vec<Health>,
    sessions: BTreeMap<u64, Session>,
    queue: VecDeque<u64>,
    /// Sessions that ended so far, each of which made room.
    releases: u64,
    next_id: u64,
    output: Vec<(usize, Frame)>,
    /// What sessions are told once the output is on its way: waking a reader takes time that the next step need not wait.
    news: News,
    /// The engine ends: what sessions are told.
    stopped: Option<String>,
    counters: Counters,
    accounts: Vec<Account>,
    pace: Pace,
    /// The model that guesses.
    drafter_health: Health,
    last_plan: Option<Plan>,
    /// Whether there was a plan when one was last sought.
    guesses_pay: bool,
    /// The time, us since whenever.
    now_us: u64,
}

impl Driver {
    /// No stage is ready yet.
    pub fn new(options: DriverOptions) -> Driver {
        let stages = options.stages;
        let pace = Pace::new(stages, options.travel_us, !options.is_shared);
        let pace = if matches!(options.draft, Draft::Peer(_)) { pace.with_drafter_elsewhere() } else { pace };
        Driver {
            options,
            health: vec![Health::Down; stages],
            sessions: BTreeMap::new(),
            queue: VecDeque::new(),
            releases: 0,
            next_id: 1,
            output: Vec::new(),
            news: Vec::new(),
            stopped: None,
            counters: Counters::default(),
            accounts: vec![Account::default(); stages],
            pace,
            drafter_health: Health::Down,
            last_plan: None,
            guesses_pay: false,
            now_us: 0,
        }
    }

    /// Tells the time, us since whenever.
    pub fn at(&mut self, now_us: u64) {
        self.now_us = now_us;
    }

    /// Frames to send, by stage, in order. Behind the last stage is the model that guesses.
    pub fn take_output(&mut self) -> Vec<(usize, Frame)> {
        std::mem::take(&mut self.output)
    }

    /// Tells the sessions what has happened to them: after [`Driver::take_output`] was sent.
    pub fn deliver(&mut self) {
        for (place, event) in self.news.drain(..) {
            place.send(event);
        }
    }

    /// False when the session's reader is gone.
    fn tell(news: &mut News, session: &Session, event: SessionEvent) -> bool {
        let place = session.events.clone().try_reserve_owned();
        place.map(|place| news.push((place, event))).is_ok()
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
        self.health.iter().all(|health| *health == Health::Up)
    }

    /// Why sessions fail at once, when they do.
    pub fn unavailable(&self) -> Option<&str> {
        let failed = self.health.iter().find_map(|health| match health {
            Health::Failed(reason) => Some(reason),
            Health::Down | Health::Up => None,
        });
        self.stopped.as_ref().or(failed).map(String::as_str)
    }

    /// How was guessed lately. `None`: not at all so far.
    pub fn guessing(&self) -> Option<Guessing> {
        self.last_plan.map(|plan| plan.explained(&self.pace, self.guesses_pay))
    }

    /// How long a row is on its way around the stages, beside computing, us: as was known at first, and then as measured.
    pub fn travel_us(&self) -> u64 {
        self.pace.travel_us() as u64
    }

    /// What each stage has done.
    pub fn accounts(&self) -> &[Account] {
        &self.accounts
    }

    /// A session begins, or waits its turn.
    pub fn start(&mut self, request: SessionRequest) -> Result<(u64, mpsc::Receiver<SessionEvent>), NotStarted> {
        if let Some(reason) = self.unavailable() {
            return Err(NotStarted::Unavailable(reason.to_owned()));
        }
        if self.queued() >= self.options.queue_max {
            return Err(NotStarted::QueueFull);
        }
        let id = self.next_id;
        self.next_id += 1;
        let (events, receiver) = mpsc::channel(EVENTS_MAX);
        self.counters.sessions += 1;
        if request.generated.last().is_some_and(|&token| self.options.ends(token, &request.sampling)) {
            // Whoever generated it was lost between the last token and the ending.
            let _ = events.try_send(SessionEvent::Ended(Ending::EndOfText));
            return Ok((id, receiver));
        }
        self.sessions.insert(id, Session::new(request, events, &self.options.draft));
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

    /// Stages that had no room may have some now: other drivers' requests end unseen.
    pub fn retry(&mut self) {
        self.admit();
    }

    /// A stage is loaded. It is empty, or has stood by for the one that was lost and holds what that one held, or a part of it.
    pub fn on_ready(&mut self, stage: usize) {
        if stage == self.drafter() {
            return self.on_drafter(Health::Up);
        }
        self.health[stage] = Health::Up;
        if self.options.is_shared {
            // Who stood by was not told of sessions that have ended in the meantime.
            let sessions = Sessions { open: self.sessions.keys().copied().collect() };
            let frame = Frame::message(Header::new(Kind::Sessions, 0), &sessions);
            self.output.extend(frame.map(|frame| (stage, frame)));
        }
        self.admit();
    }

    /// A stage died with everything it held. True when a request is to blame, and was given up for it.
    pub fn on_lost(&mut self, stage: usize) -> bool {
        self.lose(stage, Session::on_death)
    }

    /// The machine of a stage cannot be reached any more, for which no request is to blame. As [`on_lost`](Self::on_lost)
    /// otherwise.
    pub fn on_unreachable(&mut self, stage: usize) -> bool {
        self.lose(stage, Session::on_interruption)
    }

    fn lose(&mut self, stage: usize, charge: impl Fn(&mut Session) -> Option<String>) -> bool {
        if stage == self.drafter() {
            self.on_drafter(Health::Down);
            return false;
        }
        self.counters.stages_lost += 1;
        self.health[stage] = Health::Down;
        self.output.retain(|(to, _)| *to != stage);
        self.interrupt(charge)
    }

    /// Rows were lost between two stages, and the way that they took is not used any more.
    pub fn on_rows_lost(&mut self) {
        self.interrupt(Session::on_interruption);
        self.admit();
    }

    /// Puts every session that was admitted back to the head of the queue, under a new epoch. True when one is given up instead.
    fn interrupt(&mut self, charge: impl Fn(&mut Session) -> Option<String>) -> bool {
        let mut given_up = Vec::new();
        let mut interrupted = Vec::new();
        for (&id, session) in self.sessions.iter_mut().filter(|(_, s)| !matches!(s.phase, Phase::Queued)) {
            given_up.extend(charge(session).map(|reason| (id, reason)));
            interrupted.push((!session.is_suspect(), id));
        }
        // Suspects first: now nothing else runs.
        interrupted.sort_unstable();
        for &(_, id) in interrupted.iter().rev() {
            self.hold(id);
            self.queue.push_front(id);
        }
        let is_explained = !given_up.is_empty();
        for (id, reason) in given_up {
            self.fail(id, reason);
        }
        is_explained
    }

    /// A stage was tried repeatedly in vain: every session fails, also new ones, until it is ready after all.
    pub fn on_unavailable(&mut self, stage: usize, reason: &str) {
        if stage == self.drafter() {
            return self.on_drafter(Health::Failed(reason.to_owned()));
        }
        self.health[stage] = Health::Failed(reason.to_owned());
        self.end_all(|| SessionEvent::Lost(reason.to_owned()));
    }

    /// The engine ends: every session fails, now and later.
    pub fn stop(&mut self, reason: &str) {
        self.stopped = Some(reason.to_owned());
        self.end_all(|| SessionEvent::Failed(reason.to_owned()));
    }

    /// Sessions that still wait for their turn are for another engine, but for suspects: what they did is known here.
    pub fn send_waiting_away(&mut self, reason: &str) {
        let waits = |session: &Session| !matches!(session.phase, Phase::Running { .. }) && !session.is_suspect();
        let waiting: Vec<u64> = self.sessions.iter().filter(|(_, s)| waits(s)).map(|(&id, _)| id).collect();
        waiting.into_iter().for_each(|id| self.end(id, SessionEvent::Lost(reason.to_owned())));
    }

    fn end_all(&mut self, last: impl Fn() -> SessionEvent) {
        for id in self.sessions.keys().copied().collect::<Vec<_>>() {
            self.end(id, last());
        }
    }

    /// A frame could not be sent, so its session cannot go on.
    pub fn on_unsendable(&mut self, id: u64, reason: &str) {
        self.fail(id, format!("the request cannot be sent to the engine process: {reason}"));
    }

    /// A frame from a stage.
    pub fn on_frame(&mut self, stage: usize, frame: Frame) {
        let header = frame.header;
        if stage == self.drafter() {
            return self.on_drafter_frame(&frame);
        }
        if header.kind == Kind::RouteLost {
            return self.on_rows_lost();
        }
        if let Kind::Done | Kind::Sampled = header.kind {
            self.accounts[stage].computed_rows += u64::from(header.rows);
        }
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
            Kind::Done if header.has(FLAG_HANDED_ON) => {
                frame.decode().map(|step| self.on_handed_on(stage, &header, step))
            }
            Kind::Done | Kind::Sampled => frame.decode().map(|step| self.on_step(stage, &header, step)),
            Kind::StepFailed => {
                self.on_step_failed(&header, frame.as_text());
                Ok(())
            }
            _ => Ok(()),
        };
        if let Err(error) = handled {
            self.fail(header.session, format!("the engine process sent something unreadable: {error}"));
        }
    }

    /// Opens queued sessions, oldest first, as long as there should be room. Whether there is, the stages say.
    fn admit(&mut self) {
        while self.is_ready() && self.admitted().count() < self.options.parallel {
            // A suspect shares the stages with nothing.
            if self.admitted().any(Session::is_suspect) || self.is_next_suspect() && self.admitted().count() > 0 {
                return;
            }
            let Some(id) = self.queue.pop_front() else { return };
            self.open(id);
        }
    }

    /// Sessions that run or are being opened.
    fn admitted(&self) -> impl Iterator<Item = &Session> {
        self.sessions.values().filter(|session| !matches!(session.phase, Phase::Queued))
    }

    fn open(&mut self, id: u64) {
        let stages = self.options.stages;
        let Some(session) = self.sessions.get_mut(&id) else { return };
        session.is_held = false;
        session.phase = Phase::Opening { opened: vec![None; stages], releases: self.releases };
        let mut header = Header::new(Kind::Open, id);
        header.epoch = session.epoch;
        for stage in 0..stages {
            let sampling = (stage + 1 == stages).then(|| session.sampling.clone());
            let codec = self.options.codecs.get(stage).copied().unwrap_or_default();
            match Frame::message(header, &session.opening(sampling, codec)) {
                Ok(frame) => self.output.push((stage, frame)),
                Err(error) => {
                    let reason = format!("the request cannot be sent to the engine: {error}");
                    return self.fail(id, reason);
                }
            }
        }
    }

    /// Rows of a session could not be computed. If some of its guesses were wrong, these may be why: a memory that cannot forget a part of
    /// what it holds, that of a recurrent model, takes no row back. So the session begins again without guesses, once, and if that helps,
    /// nobody guesses any more.
    fn on_step_failed(&mut self, header: &Header, reason: String) {
        let id = header.session;
        let may_be_why = |session: &Session| session.guesses.were_some_wrong() && !session.guesses.are_over();
        if !self.sessions.get(&id).is_some_and(may_be_why) {
            return self.fail(id, reason);
        }
        if let Some(session) = self.sessions.get_mut(&id) {
            session.requeue();
        }
        self.hold(id);
        if let Some(session) = self.sessions.get_mut(&id) {
            session.guesses.end();
            session.failed_with_guesses = Some((header.position.saturating_add(header.rows), reason));
        }
        self.queue.push_front(id);
        self.admit();
    }

    fn is_next_suspect(&self) -> bool {
        let next = self.queue.front().and_then(|id| self.sessions.get(id));
        next.is_some_and(Session::is_suspect)
    }

    /// A suspect has got through. It makes room for the next one, or the others may go on.
    fn on_cleared(&mut self, id: u64) {
        if self.is_next_suspect() {
            self.park(id);
        }
        self.admit();
    }

    /// Puts a running session back into the queue, behind the suspects and in the order of arrival. The stages keep what they
    /// hold of it.
    fn park(&mut self, id: u64) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        session.requeue();
        self.hold(id);
        let sessions = &self.sessions;
        let is_before = |other: &u64| *other < id || sessions.get(other).is_some_and(Session::is_suspect);
        let at = self.queue.iter().take_while(|other| is_before(other)).count();
        self.queue.insert(at, id);
    }

    fn on_opened(&mut self, stage: usize, id: u64, opened: Opened) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let Phase::Opening { opened: all, .. } = &mut session.phase else { return };
        all[stage] = Some(opened);
        let Some(all) = all.iter().copied().collect::<Option<Vec<Opened>>>() else { return };
        let is_first = session.starts.is_empty();
        session.plan(&all, &self.options);
        if is_first {
            session.cached_tokens = session.starts[0].min(session.prompt_tokens);
            self.counters.cached_tokens += u64::from(session.cached_tokens);
        }
        let feeding = all.len() - 1;
        session.phase = Phase::Running { feeding, next: session.starts[feeding], in_flight: 0, prefill: false };
        self.advance(id);
        self.admit();
    }

    fn on_not_opened(&mut self, id: u64, refused: NotOpened) {
        match refused {
            NotOpened::Bad(reason) => self.fail(id, reason),
            NotOpened::Busy { .. } => {
                let releases = self.releases;
                // Who waits until others have ended holds nothing that they may wait for.
                let held: Vec<u64> = self.sessions.iter().filter(|(_, s)| s.is_held).map(|(&id, _)| id).collect();
                held.into_iter().for_each(|id| self.close_everywhere(id, 0));
                let is_alone = self.admitted().count() == 1;
                self.close_everywhere(id, 0);
                let Some(session) = self.sessions.get_mut(&id) else { return };
                // Room made after the question was sent was not seen by the answer.
                let made_room = !matches!(session.phase, Phase::Opening { releases: at, .. } if at == releases);
                session.requeue();
                self.queue.push_front(id);
                if made_room {
                    self.admit();
                } else if is_alone && !self.options.is_shared {
                    // No session will end and make room: an answer is better than waiting for ever.
                    self.fail(id, "the engine is full although nothing runs; this is a bug, please report it".into());
                }
                // Otherwise the next session that ends makes room, or another driver's.
            }
        }
    }

    /// A stage has computed rows that are now on their way to the next.
    fn on_handed_on(&mut self, stage: usize, header: &Header, step: Step) {
        if header.has(FLAG_PREFILL) {
            self.pace.note_prompt(stage, &step);
        } else if header.has(FLAG_WANT_OUTPUT) {
            self.pace.note(stage, &step);
            if is_plain(header) {
                self.counters.token_compute_us += u64::from(step.compute_us);
            }
        }
        if let Some(session) = self.sessions.get_mut(&header.session)
            && is_held_up(header, &step)
        {
            session.train.is_held_up(header.position);
        }
        self.accounts[stage].last_step = Some(step);
    }

    fn on_step(&mut self, stage: usize, header: &Header, mut step: Step) {
        let id = header.session;
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let Phase::Running { in_flight, .. } = &mut session.phase else { return };
        *in_flight = in_flight.saturating_sub(1);
        let done = header.position.saturating_add(header.rows);
        if header.has(FLAG_PREFILL) {
            self.pace.note_prompt(stage, &step);
            self.counters.prompt_tokens += u64::from(header.rows);
            let progress = SessionEvent::Prefill {
                done_tokens: done.min(session.prompt_tokens),
                cached_tokens: session.cached_tokens,
            };
            if session.events.capacity() > EVENTS_MARGIN {
                Self::tell(&mut self.news, session, progress);
            }
        }
        if is_held_up(header, &step) {
            session.train.is_held_up(header.position);
        }
        if let Some(came) = session.train.comes(header.position, self.now_us) {
            self.pace.note_came(&came);
        }
        let sampled = std::mem::take(&mut step.sampled);
        if !sampled.is_empty() && !header.has(FLAG_PREFILL) {
            self.pace.note(stage, &step);
            if is_plain(header) {
                self.counters.token_steps += 1;
                self.counters.token_compute_us += u64::from(step.compute_us);
            }
        }
        self.accounts[stage].last_step = Some(step);
        for sampled in sampled {
            if !self.on_token(id, sampled, header.has(FLAG_GUESS)) {
                return;
            }
        }
        self.advance(id);
    }

    /// A token was chosen, in a frame `with_guesses` or without. Whether the session goes on.
    fn on_token(&mut self, id: u64, sampled: Sampled, with_guesses: bool) -> bool {
        let is_only = self.running() == 1;
        let Some(session) = self.sessions.get_mut(&id) else { return false };
        let token = sampled.token;
        if !self.options.has(token) {
            self.fail(id, format!("a stage has chosen token {token}, which the vocabulary does not have"));
            return false;
        }
        let was_suspect = session.is_suspect();
        let ended = self.options.ends(token, &session.sampling) || sampled.grammar_ended;
        session.clear();
        self.counters.generated_tokens += 1;
        let rejected = session.rejected_at.take();
        self.counters.rejected_us += rejected.map_or(0, |at| self.now_us.saturating_sub(at));
        let before = std::mem::replace(&mut session.token_at, is_only.then_some(self.now_us));
        let outcome = session.push(token);
        let length = session.tokens.len();
        // The rows that failed have been computed.
        if let Some((_, reason)) = session.failed_with_guesses.take_if(|(end, _)| length > *end as usize) {
            tracing::warn!(
                "guesses are left alone from now on: a step after a wrong one failed ({reason}), and does not without"
            );
            self.options.draft = Draft::Off;
        }
        // What follows a wrong guess has waited for it, and what follows the last of right ones in a frame was had with them.
        let is_guessed = with_guesses || outcome.is_some() || rejected.is_some();
        let took_us = before.filter(|_| is_only).map(|before| self.now_us.saturating_sub(before));
        self.pace.note_token(is_guessed, took_us);
        if let Some(outcome) = outcome {
            self.on_outcome(id, outcome);
        }
        let Some(session) = self.sessions.get_mut(&id) else { return false };
        let full = session.generated().len() as u32 >= session.max_tokens;
        let heard = Self::tell(&mut self.news, session, SessionEvent::Token(sampled));
        if ended || full {
            let (right, made) = (session.guesses.right, session.guesses.made);
            if made > 0 {
                Self::tell(&mut self.news, session, SessionEvent::Guesses { right, wrong: made - right });
            }
            let ending = if ended { Ending::EndOfText } else { Ending::Length };
            Self::tell(&mut self.news, session, SessionEvent::Ended(ending));
        }
        // The reader is gone if it has not heard (a full channel cannot be: a step is sent only when there is room for its tokens).
        if ended || full || !heard {
            self.remove(id, false);
            return false;
        }
        if was_suspect {
            self.on_cleared(id);
        }
        true
    }

    /// Sends what may be sent: enough rows to keep every stage busy, and a wanted row only when its token will find room.
    fn advance(&mut self, id: u64) {
        let plan = self.plan(id);
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let Phase::Running { mut feeding, mut next, mut in_flight, prefill: mut prefill_before } = session.phase else {
            return;
        };
        let length = session.tokens.len() as u32;
        let chunks_ahead = self.pace.chunks_ahead(self.options.chunk_rows);
        while in_flight <= self.options.stages + if prefill_before { chunks_ahead } else { 0 } {
            if feeding > 0 && next >= session.starts[feeding - 1] {
                // What comes next reaches that stage on another way, and must find there what was sent so far.
                if in_flight > 0 {
                    break;
                }
                feeding -= 1;
                next = session.starts[feeding];
                continue;
            }
            if next >= length {
                break;
            }
            let Rows { end, prefill, stages } = session.next_rows(feeding, next, &self.options);
            let wanted = end == length && stages == 0;
            if wanted && session.is_far_ahead() {
                // A suspect that waits for its reader has done all it may; others need not wait for that reader.
                if in_flight == 0 && session.is_suspect() {
                    session.clear();
                    session.phase = Phase::Running { feeding, next, in_flight, prefill: prefill_before };
                    return self.on_cleared(id);
                }
                break;
            }
            // Stages compute decode rows before prompt rows: replayed ones must not overtake the prompt they follow.
            if in_flight > 0 && prefill != prefill_before {
                break;
            }
            prefill_before = prefill;
            let mut rows = session.tokens[next as usize..end as usize].to_vec();
            if let Some(plan) = plan.filter(|_| wanted && rows.len() == 1) {
                if plan.waits && session.guesses.len() < plan.depth && session.guesses.are_more_to_come() {
                    break;
                }
                rows.extend(session.guesses.tokens(0, plan.rows - 1));
            }
            if wanted && !prefill {
                let spacing_us = self.pace.spacing_us(rows.len()).unwrap_or(0.0) as u64;
                session.train.leaves(next, rows.len(), in_flight == 0, spacing_us, self.now_us);
            }
            let end = next + rows.len() as u32;
            let is_guess = end > length;
            let mut header = Header::new(Kind::Tokens, id);
            (header.epoch, header.position, header.rows, header.stages) = (session.epoch, next, end - next, stages);
            header.flags = if prefill { FLAG_PREFILL } else { 0 }
                | if wanted { FLAG_WANT_OUTPUT } else { 0 }
                | if is_guess { FLAG_GUESS } else { 0 };
            self.output.push(match feeding.checked_sub(1) {
                None => (0, Frame::tokens(header, &rows)),
                Some(before) => {
                    (before, Frame { header: Header { kind: Kind::Repeat, ..header }, payload: Vec::new() })
                }
            });
            next = end;
            in_flight += 1;
        }
        // What is guessed need not wait for the tokens before it.
        while let Some(plan) = plan.filter(|_| in_flight > 0 && next >= length) {
            let guess = session.guesses.tokens((next - length) as usize, plan.rows);
            if guess.is_empty() || guess.len() < plan.rows && session.guesses.are_more_to_come() {
                break;
            }
            let mut header = Header::new(Kind::Tokens, id);
            (header.epoch, header.position) = (session.epoch, next);
            header.flags = FLAG_WANT_OUTPUT | FLAG_GUESS;
            let spacing_us = self.pace.spacing_us(guess.len()).unwrap_or(0.0) as u64;
            session.train.leaves(next, guess.len(), false, spacing_us, self.now_us);
            next += guess.len() as u32;
            in_flight += 1;
            self.output.push((0, Frame::tokens(header, &guess)));
        }
        // A stage that is the whole model need not wait for us to tell it the token that it has sampled itself.
        let goes_on = plan.is_none() && next == length && next + 1 < session.prompt_tokens + session.max_tokens;
        if self.options.stages == 1 && in_flight == 1 && goes_on && !session.is_far_ahead() {
            let mut header = Header::new(Kind::Next, id);
            (header.epoch, header.position, header.rows) = (session.epoch, next, 1);
            header.flags = FLAG_WANT_OUTPUT;
            self.output.push((0, Frame { header, payload: Vec::new() }));
            (next, in_flight, prefill_before) = (next + 1, 2, false);
        }
        session.phase = Phase::Running { feeding, next, in_flight, prefill: prefill_before };
    }

    fn fail(&mut self, id: u64, reason: String) {
        self.end(id, SessionEvent::Failed(reason));
    }

    fn end(&mut self, id: u64, last: SessionEvent) {
        if let Some(session) = self.sessions.get(&id) {
            Self::tell(&mut self.news, session, last);
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

    /// Stops a session, which goes on later where it is. New sessions queue up behind it, so there is room for it till then.
    fn hold(&mut self, id: u64) {
        self.close_everywhere(id, FLAG_HOLD);
    }

    fn close_everywhere(&mut self, id: u64, flags: u16) {
        self.leave_drafter(id, flags);
        let Some(session) = self.sessions.get_mut(&id) else { return };
        session.is_held = flags & FLAG_HOLD != 0;
        let header = Header { epoch: session.epoch, flags, ..Header::new(Kind::Close, id) };
        self.tell_stages(header);
    }

    /// Tells all stages something that makes what was to be sent of a session superfluous.
    fn tell_stages(&mut self, header: Header) {
        let (is_word, stages) = (|kind| matches!(kind, Kind::Close | Kind::Rewind), self.options.stages);
        self.output.retain(|(to, frame)| {
            *to >= stages || frame.header.session != header.session || is_word(frame.header.kind)
        });
        for stage in (0..stages).filter(|&s| self.health[s] == Health::Up) {
            self.output.push((stage, Frame { header, payload: Vec::new() }));
        }
    }
}

#[cfg(test)]
mod gain_tests;
#[cfg(test)]
mod peer_tests;
#[cfg(test)]
mod replay_tests;
#[cfg(test)]
mod tests;
