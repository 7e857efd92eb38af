//! The driver's side of guessing: whose guesses are taken, and what the model that makes them is told.
//!
//! That model is no stage of the ring. It runs beside it, has a place behind the last stage in what goes out and comes in, and is
//! missed by nobody: sessions go on without guesses while it is away. It may run on another machine, which is not trusted: what it says is
//! a guess if it was asked for, and a token of the vocabulary. Nobody waits for that machine; a guess that takes longer than a way around
//! the ring is not counted on. That machine goes on by itself behind what it has guessed, until it is told that it was wrong.

use murmur_protocol::{
    codec::Codec,
    frame::{FLAG_FORGET, FLAG_PREFILL, FLAG_WANT_OUTPUT, Frame, Header, Kind, NEXT_ROWS_MAX},
    sampling::{SamplingParams, Token},
    stage::{NotOpened, Opened, Step},
};

use super::{
    Driver, EVENTS_MARGIN, Health,
    draft::{DEPTHS, Guesser, Outcome, Plan},
    pursuit::{Ask, Pursuit, Took},
    session::{Draft, Phase, Session},
};

impl Session {
    /// How many more tokens may be guessed: each gives a token, for which there must be room in the answer and with the reader.
    fn room_for_guesses(&self) -> usize {
        let known = self.tokens.len() + self.guesses.len() + 1;
        let in_answer = ((self.prompt_tokens + self.max_tokens) as usize).saturating_sub(known);
        let with_reader = self.events.capacity().saturating_sub(EVENTS_MARGIN + self.guesses.len());
        in_answer.min(with_reader)
    }

    /// Tokens and guesses from `first` on.
    fn rows_from(&self, first: u32) -> Vec<Token> {
        let first = first as usize;
        let known = self.tokens.get(first..).unwrap_or_default().to_vec();
        [known, self.guesses.tokens(first.saturating_sub(self.tokens.len()), usize::MAX)].concat()
    }

    /// Tokens and guesses.
    fn length_with_guesses(&self) -> u32 {
        (self.tokens.len() + self.guesses.len()) as u32
    }

    /// The token or guess at a position.
    fn token_at(&self, position: u32) -> Option<Token> {
        let position = position as usize;
        let guessed = |beyond| self.guesses.tokens(beyond, 1).pop();
        self.tokens.get(position).copied().or_else(|| guessed(position.checked_sub(self.tokens.len())?))
    }
}

impl Driver {
    /// The place of the model that guesses, in what goes out and comes in.
    pub(super) fn drafter(&self) -> usize {
        self.options.stages
    }

    /// How to guess behind what a session has; what can be had at once is had, and the rest asked for. `None`: not at all.
    pub(super) fn plan(&mut self, id: u64) -> Option<Plan> {
        if self.options.draft == Draft::Off {
            return None;
        }
        let sessions = self.running();
        let is_drafter_up = self.drafter_health == Health::Up;
        let session = self.sessions.get_mut(&id)?;
        let Phase::Running { feeding: 0, next, .. } = session.phase else { return None };
        let length = session.tokens.len() as u32;
        // The prompt comes first, and what is computed again; a stage that goes on by itself is ahead of guesses.
        if length == session.prompt_tokens || next + 1 < length || next > session.length_with_guesses() {
            return None;
        }
        let (room, made) = (session.room_for_guesses(), session.guesses.made);
        let patience_us = self.pace.ring_us(1).filter(|_| self.pace.is_drafter_elsewhere());
        let is_late =
            |pursuit: &mut Pursuit| patience_us.is_some_and(|patience| pursuit.is_late(self.now_us, patience));
        let is_there = |pursuit: &mut Pursuit| !is_late(pursuit) && pursuit.goes_on(self.now_us);
        let is_drafter_there = is_drafter_up && session.guesses.pursuit.as_mut().is_some_and(is_there);
        let plan = session.guesses.plan(&session.tokens, &self.pace, sessions, is_drafter_there, room);
        self.guesses_pay = plan.is_some();
        let plan = plan?;
        self.counters.guessed_tokens += u64::from(session.guesses.made - made);
        self.last_plan = Some(plan);
        let wanted = plan.depth.saturating_sub(session.guesses.len()).min(session.room_for_guesses());
        if plan.guesser == Guesser::Model && wanted > 0 {
            let ahead = if self.pace.is_drafter_elsewhere() { wanted.min(NEXT_ROWS_MAX as usize) } else { 1 };
            self.pursue(id, ahead as u32);
        }
        Some(plan)
    }

    /// Asks the model that guesses for the next, so that `ahead` of them are on their way.
    fn pursue(&mut self, id: u64, ahead: u32) {
        self.call_back(id);
        let (drafter, chunk) = (self.drafter(), self.options.chunk_rows as usize);
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let length = session.length_with_guesses();
        let Some(pursuit) = &mut session.guesses.pursuit else { return };
        let ask = pursuit.ask(length, ahead, self.now_us);
        let header = Header { epoch: pursuit.epoch(), ..Header::new(Kind::Open, id) };
        match ask {
            None => {}
            Some(Ask::Open) => {
                // The same noise, so that the same token is chosen wherever both models agree.
                let sampling = SamplingParams { top_logprobs: None, ..session.sampling.clone() };
                match Frame::message(header, &session.opening(Some(sampling), Codec::default())) {
                    Ok(frame) => self.output.push((drafter, frame)),
                    Err(_) => session.guesses.pursuit.iter_mut().for_each(Pursuit::give_up),
                }
            }
            Some(Ask::Rows { first, further }) => {
                let rows = session.rows_from(first);
                let prefill = if rows.len() > 1 { FLAG_PREFILL } else { 0 };
                let mut position = first;
                for part in rows.chunks(chunk) {
                    let end = position + part.len() as u32;
                    let wanted = if end == length { FLAG_WANT_OUTPUT } else { 0 };
                    let header = Header { kind: Kind::Tokens, position, flags: prefill | wanted, ..header };
                    self.output.push((drafter, Frame::tokens(header, part)));
                    position = end;
                }
                self.let_go_on(header, length, further);
            }
            Some(Ask::Further { first, further }) => self.let_go_on(header, first, further),
        }
    }

    /// Lets the model that guesses compute so many `rows` of its own choice.
    fn let_go_on(&mut self, header: Header, position: u32, rows: u32) {
        if rows > 0 {
            let header = Header { kind: Kind::Next, position, rows, flags: FLAG_WANT_OUTPUT, ..header };
            self.output.push((self.drafter(), Frame { header, payload: Vec::new() }));
        }
    }

    /// Tells the model that guesses if what it computes is in vain.
    fn call_back(&mut self, id: u64) {
        let drafter = self.drafter();
        let Some(session) = self.sessions.get_mut(&id) else { return };
        if let Some(pursuit) = &mut session.guesses.pursuit
            && pursuit.take_stale()
        {
            let header = Header { epoch: pursuit.epoch(), ..Header::new(Kind::Rewind, id) };
            self.output.push((drafter, Frame { header, payload: Vec::new() }));
        }
    }

    /// A frame from the model that guesses.
    pub(super) fn on_drafter_frame(&mut self, frame: &Frame) {
        let Header { session: id, epoch, kind, position, rows, .. } = frame.header;
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let Some(pursuit) = session.guesses.pursuit.as_mut().filter(|pursuit| pursuit.epoch() == epoch) else { return };
        let end = position.saturating_add(rows);
        match kind {
            Kind::Opened => match frame.decode::<Opened>() {
                // The row of the newest token gives the first guess.
                Ok(opened) => pursuit.opened(opened.cached_tokens.min(session.tokens.len() as u32 - 1)),
                Err(_) => pursuit.give_up(),
            },
            Kind::NotOpened => match frame.decode() {
                Ok(NotOpened::Busy { retry_ms }) => pursuit.has_no_room(self.now_us + 1000 * u64::from(retry_ms)),
                Ok(NotOpened::Bad(_)) | Err(_) => pursuit.give_up(),
            },
            Kind::Done => pursuit.computed(end),
            Kind::Sampled => match (frame.decode::<Step>(), pursuit.guessed(end, self.now_us)) {
                (Ok(step), Some(took)) => self.on_guess(id, &frame.header, took, step),
                // Nobody can tell what it holds.
                _ => pursuit.give_up(),
            },
            Kind::StepFailed => {
                tracing::debug!("no guess: {}", frame.as_text());
                pursuit.pause();
            }
            _ => {}
        }
        self.call_back(id);
        self.advance(id);
    }

    /// The model that guesses has said, of rows that were sent or that it has chosen itself, what may follow them.
    fn on_guess(&mut self, id: u64, header: &Header, took: Took, mut step: Step) {
        let position = header.position.saturating_add(header.rows);
        self.pace.note_guess(header.rows, took, &step);
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let Some(sampled) = step.sampled.pop() else { return };
        if !self.options.has(sampled.token) {
            return session.guesses.pursuit.iter_mut().for_each(Pursuit::give_up);
        }
        // Something may have been chosen or looked up meanwhile. Where it is the same, what follows goes on from it.
        let length = session.length_with_guesses();
        if position < length && session.token_at(position) == Some(sampled.token) {
            return;
        }
        if position != length || session.room_for_guesses() == 0 {
            return session.guesses.pursuit.iter_mut().for_each(|pursuit| pursuit.forget(position.min(length)));
        }
        let token = match self.options.draft.spoils(id, position) {
            true => (sampled.token + 1) % self.options.vocabulary as Token,
            false => sampled.token,
        };
        let is_end = sampled.grammar_ended || self.options.ends(token, &session.sampling);
        session.guesses.add(token, Guesser::Model);
        self.counters.guessed_tokens += 1;
        if is_end {
            session.guesses.pursuit.iter_mut().for_each(Pursuit::pause);
        }
    }

    /// A guess was compared with what was chosen.
    pub(super) fn on_outcome(&mut self, id: u64, outcome: Outcome) {
        let depth = outcome.depth.min(DEPTHS - 1);
        self.counters.guessed_by_depth[depth] += 1;
        if outcome.is_right {
            self.counters.right_tokens += 1;
            self.counters.right_by_depth[depth] += 1;
        } else {
            self.rewind(id);
        }
    }

    /// A guess was wrong: what is on its way is in vain, and the row of the newest token is the next.
    fn rewind(&mut self, id: u64) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let newest = session.tokens.len() as u32 - 1;
        session.guesses.pursuit.iter_mut().for_each(|pursuit| pursuit.forget(newest));
        self.call_back(id);
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let Phase::Running { next, in_flight, .. } = &mut session.phase else { return };
        *next = newest;
        session.train.stop();
        session.rejected_at = Some(self.now_us);
        if std::mem::take(in_flight) > 0 {
            session.epoch += 1;
            let header = Header { epoch: session.epoch, ..Header::new(Kind::Rewind, id) };
            self.tell_stages(header);
        }
    }

    /// The model that guesses has come, or has died.
    pub(super) fn on_drafter(&mut self, health: Health) {
        let is_death = health != Health::Up;
        self.drafter_health = health;
        let drafter = self.drafter();
        if is_death {
            self.output.retain(|(to, _)| *to != drafter);
        }
        for id in self.sessions.keys().copied().collect::<Vec<_>>() {
            if is_death && let Some(session) = self.sessions.get_mut(&id) {
                session.guesses.pursuit.iter_mut().for_each(|pursuit| pursuit.lose(true));
            }
            self.advance(id);
        }
    }

    /// What the model that guesses holds of a session is not needed at present.
    pub(super) fn leave_drafter(&mut self, id: u64, flags: u16) {
        let drafter = self.drafter();
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let Some(pursuit) = session.guesses.pursuit.as_mut().filter(|pursuit| pursuit.is_known()) else { return };
        let header = Header { epoch: pursuit.epoch(), flags: flags & FLAG_FORGET, ..Header::new(Kind::Close, id) };
        pursuit.lose(false);
        if self.drafter_health == Health::Up {
            self.output.push((drafter, Frame { header, payload: Vec::new() }));
        }
    }
}
