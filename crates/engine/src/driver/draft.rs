//! Guesses of what a model will say, so that several tokens are had from one way through the stages.
//!
//! The rows of guessed tokens are sent before the tokens are known. The last stage compares: each row whose token is the one that
//! was sampled for its place gives the next, as it would have without guessing, at any temperature, since the noise of a token
//! depends on its position alone. So guesses cost time or save it, and change nothing.
//!
//! How much is guessed follows from what was measured ([`Plan::of`]). While a part `a` of guesses is right, a run of right ones with the
//! wrong one at its end gives `1 / (1 - a)` tokens, and takes one way around the ring for the answer to the wrong one, and before it as
//! many frames as the run has, as fast as the slowest of stages and guesser lets them follow one another.

use std::collections::{HashMap, VecDeque};

use murmur_protocol::{frame::GUESS_ROWS_MAX, sampling::Token};

use super::{
    pace::{Mean, Pace},
    pursuit::Pursuit,
    session::Draft,
};

/// Tokens that a guess must follow as they have occurred before.
const CONTEXT: usize = 3;
/// What part of guesses is expected to be right before any was made.
const EXPECTED: f64 = 0.6;
/// No guesser is better than this: even a perfect one cannot be sure.
const RIGHT_MAX: f64 = 0.99;
/// Frames on their way, as a part of those that fill the ring: times vary, and it must not run dry.
const QUEUED: f64 = 1.25;
/// Guesses after which the part that was right is an average over the newest only, of so many.
const AVERAGED: u32 = 30;
/// What is expected before any was made counts as so many.
const EXPECTED_COUNTS: u32 = 5;
/// Guesses are made if they make tokens cheaper by this factor at least: what is measured is not that exact.
const GAIN_MIN: f64 = 1.05;
/// After so many tokens without guesses, which would not have paid, one is guessed nevertheless: texts change.
const ANOTHER_TRY: u32 = 64;
/// Guesses that are told apart by how many came before them since the last known token.
pub const DEPTHS: usize = 16;

/// What has followed the last few tokens before, in prompt or answer. It costs nothing where nothing is repeated.
#[derive(Debug, Default)]
struct Lookup {
    /// Where each run of [`CONTEXT`] tokens was last followed by something: at which position.
    followed: HashMap<[Token; CONTEXT], usize>,
    /// Positions that are in it.
    known: usize,
}

impl Lookup {
    fn learn(&mut self, tokens: &[Token]) {
        for at in self.known.max(CONTEXT)..tokens.len() {
            if let Some(run) = tokens[..at].last_chunk::<CONTEXT>() {
                self.followed.insert(*run, at);
            }
        }
        self.known = tokens.len();
    }

    /// Up to `count` tokens that may follow `tokens`, which were chosen, and `guessed`, which were not yet.
    fn propose(&mut self, tokens: &[Token], guessed: &[Token], count: usize) -> Vec<Token> {
        self.learn(tokens);
        let newest: Vec<Token> = tokens.iter().rev().take(CONTEXT).rev().chain(guessed).copied().collect();
        let Some(&from) = newest.last_chunk::<CONTEXT>().and_then(|run| self.followed.get(run)) else {
            return Vec::new();
        };
        let mut proposed: Vec<Token> = Vec::with_capacity(count);
        for at in from..from + count {
            // What is repeated may overlap with what repeats it.
            let beyond = at.checked_sub(tokens.len());
            let token = match beyond {
                None => tokens.get(at),
                Some(beyond) => guessed.get(beyond).or_else(|| proposed.get(beyond - guessed.len())),
            };
            match token {
                Some(&token) => proposed.push(token),
                None => break,
            }
        }
        proposed
    }
}

/// Who guesses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Guesser {
    Lookup,
    Model,
}

/// How to guess next.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Plan {
    pub(super) guesser: Guesser,
    /// Rows of a frame at most.
    pub(super) rows: usize,
    /// Guesses that wait for an answer at most.
    pub(super) depth: usize,
    /// The row of a known token waits for guesses that can go with it, instead of hurrying ahead.
    pub(super) waits: bool,
    /// What part of guesses was expected to be right.
    right: f64,
    /// How soon another frame can follow, us.
    frame_us: f64,
    /// What a token is expected to take, us.
    us_per_token: f64,
}

/// How was guessed lately, and why.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Guessing {
    /// By a model; otherwise looked up.
    pub by_model: bool,
    /// Rows of a frame at most.
    pub rows_per_frame: u32,
    /// Frames on their way at most.
    pub frames_in_flight: u32,
    /// What part of guesses was expected to be right, 0 to 1.
    pub right: f64,
    /// How long a row is on its way around the ring, us.
    pub around_us: f64,
    /// How soon one such frame can follow another, us.
    pub frame_us: f64,
    /// What a token was expected to take, us.
    pub token_us: f64,
    /// Tokens that are had without guesses before the next is guessed, because guesses may have cost time, or have.
    pub plain_left: u32,
    /// False: the newest tokens were had without guesses, which would not have paid or which nobody had.
    pub pays: bool,
    /// Tokens for each way around the stages, as timed lately of a session that ran alone, with guesses. `None`: not timed yet.
    pub tokens_around: Option<f64>,
}

impl Plan {
    /// For people.
    pub(super) fn explained(&self, pace: &Pace, pays: bool) -> Guessing {
        Guessing {
            by_model: self.guesser == Guesser::Model,
            rows_per_frame: self.rows as u32,
            frames_in_flight: self.depth.div_ceil(self.rows) as u32,
            right: self.right,
            around_us: pace.ring_us(1).unwrap_or_default(),
            frame_us: self.frame_us,
            token_us: self.us_per_token,
            plain_left: pace.plain_left(),
            pays,
            tokens_around: pace.tokens_around(),
        }
    }

    /// The best, if any is better than no guesses. `right`: what part of guesses is; `sessions`: how many share the stages.
    ///
    /// With `R(w)` the time of a frame of `w` rows around the ring, `S(w)` the time after which another can follow, `d` the time of a
    /// guess, `a` the part that is right and `b = a^w`, a token takes
    /// - `R(1)` without guesses;
    /// - `(1 - a) (R(w) + b / (1 - b) S(w))` in frames that follow one another, if guesses cost nothing;
    /// - `(1 - a) (R(w) + a / (1 - b) max(S(w), w d))` if a model makes them while the known token is on its way already. On one machine it
    ///   is the sum instead of the larger: stages and guesser have the same processors. A model elsewhere adds the way there and back to
    ///   `R(w)`, once for each run of right guesses: it goes on by itself while they travel;
    /// - `(1 - a) / (1 - b) (R(w) + (w - 1) d)` if the known token waits for guesses, and these for its answer: only for a model of this
    ///   machine. One elsewhere may be gone at any time.
    fn of(guesser: Guesser, right: f64, pace: &Pace, sessions: usize) -> Option<Plan> {
        let plain_us = pace.ring_us(1)?;
        let (guess_us, way_us) = match guesser {
            Guesser::Lookup => (0.0, 0.0),
            Guesser::Model => (pace.draft_us()?, pace.draft_way_us()),
        };
        let mut best: Option<Plan> = None;
        for rows in 1..=GUESS_ROWS_MAX as usize {
            let (ring_us, spacing_us) = (pace.ring_us(rows)?, pace.spacing_us(rows)?);
            let all_right = right.powi(rows as i32);
            let per_token = |us: f64| (1.0 - right) * us;
            let guesses_us = rows as f64 * guess_us;
            let (frame_us, first) = match guesser {
                Guesser::Lookup => (spacing_us, all_right),
                Guesser::Model if pace.is_one_machine() && !pace.is_drafter_elsewhere() => {
                    (spacing_us + guesses_us, right)
                }
                Guesser::Model => (spacing_us.max(guesses_us), right),
            };
            // The ring is full of so many frames of all sessions, and the way of guesses; some more may wait.
            let frames = ((ring_us + way_us) / frame_us * QUEUED).round().max(2.0) / sessions as f64 - 1.0;
            // A guess saves a way around the ring if all before it are right. It costs what it keeps the slowest stage and the guesser from, even
            // where these have nothing else to do: somebody pays for that, and often they share processors.
            let worth = ((spacing_us / rows as f64 + guess_us) / plain_us).ln() / right.ln();
            let streamed = Plan {
                guesser,
                rows,
                depth: (frames * rows as f64 + (rows - 1) as f64).min(worth).max(0.0) as usize,
                waits: false,
                right,
                frame_us,
                us_per_token: per_token(ring_us + way_us + first / (1.0 - all_right) * frame_us),
            };
            let in_turns = Plan {
                guesser,
                rows,
                depth: rows - 1,
                waits: true,
                right,
                frame_us,
                us_per_token: per_token((ring_us + guesses_us - guess_us) / (1.0 - all_right)),
            };
            let streamed = Some(streamed).filter(|_| frames > 0.0);
            let can_wait = guesser == Guesser::Model && sessions == 1 && !pace.is_drafter_elsewhere();
            let in_turns = Some(in_turns).filter(|_| can_wait);
            let possible = streamed.into_iter().chain(in_turns).filter(|plan| plan.depth > 0);
            best = best.into_iter().chain(possible).min_by(|a, b| a.us_per_token.total_cmp(&b.us_per_token));
        }
        best.filter(|best| best.us_per_token * GAIN_MIN <= plain_us)
    }
}

/// What is expected of whoever has not guessed yet.
const HOPED: Mean = Mean { value: EXPECTED, count: EXPECTED_COUNTS };

/// A guess that waits for what is chosen.
#[derive(Debug, Clone, Copy)]
struct Guess {
    token: Token,
    by: Guesser,
    /// Guesses before it that waited as well when it was made.
    depth: usize,
}

/// What became of a guess.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Outcome {
    pub(super) is_right: bool,
    pub(super) depth: usize,
}

/// The guesses of one session, and who makes them.
#[derive(Debug)]
pub(super) struct Guesses {
    lookup: Option<Lookup>,
    /// What the model that guesses knows of the session, if there is one.
    pub(super) pursuit: Option<Pursuit>,
    /// What part of each one's guesses was right lately.
    aims: [Mean; 2],
    waiting: VecDeque<Guess>,
    /// How they were made.
    plan: Option<Plan>,
    /// Tokens since the last guess.
    refrained: u32,
    /// Guesses so far.
    pub(super) made: u32,
    /// Right ones among them.
    pub(super) right: u32,
}

impl Guesses {
    pub(super) fn new(draft: &Draft) -> Guesses {
        Guesses {
            lookup: (*draft != Draft::Off).then(Lookup::default),
            pursuit: matches!(draft, Draft::Model(_) | Draft::Peer(_)).then(Pursuit::default),
            aims: [HOPED; 2],
            waiting: VecDeque::new(),
            plan: None,
            refrained: 0,
            made: 0,
            right: 0,
        }
    }

    /// Guesses that wait to be compared.
    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Whether one was compared and was wrong, or was in vain because one before it was.
    pub(super) fn were_some_wrong(&self) -> bool {
        self.made as usize > self.right as usize + self.waiting.len()
    }

    /// Nobody makes any more. What became of those that were made is still known.
    pub(super) fn end(&mut self) {
        (self.lookup, self.pursuit) = (None, None);
        self.waiting.clear();
    }

    /// Whether nobody makes any, from the beginning or since [`Guesses::end`].
    pub(super) fn are_over(&self) -> bool {
        self.lookup.is_none()
    }

    /// Those from `first` on, `count` at most.
    pub(super) fn tokens(&self, first: usize, count: usize) -> Vec<Token> {
        self.waiting.iter().skip(first).take(count).map(|guess| guess.token).collect()
    }

    /// Whether a guess is being made.
    pub(super) fn are_more_to_come(&self) -> bool {
        self.pursuit.as_ref().is_some_and(Pursuit::is_asked)
    }

    /// How to guess on behind `tokens`: by whoever makes tokens cheapest; what can be looked up is added at once, as far as there is
    /// `room`. `None`: guesses would not pay, or nobody has any.
    pub(super) fn plan(
        &mut self,
        tokens: &[Token],
        pace: &Pace,
        sessions: usize,
        is_drafter_up: bool,
        room: usize,
    ) -> Option<Plan> {
        let lookup = self.lookup.as_mut()?;
        let guessed: Vec<Token> = self.waiting.iter().map(|guess| guess.token).collect();
        let is_known = !lookup.propose(tokens, &guessed, room.min(1)).is_empty();
        let who = [Some(Guesser::Lookup).filter(|_| is_known), Some(Guesser::Model).filter(|_| is_drafter_up)];
        let of = |guesser: Guesser| {
            let right = self.aims[guesser as usize].value.min(RIGHT_MAX);
            Plan::of(guesser, right, pace, sessions).or_else(|| {
                let us = pace.ring_us(2)?;
                let waits = !pace.is_drafter_elsewhere();
                let another = Plan { guesser, rows: 2, depth: 1, waits, right, frame_us: us, us_per_token: us };
                // On one machine sessions together are one batch, which guesses can only make larger.
                let is_room = sessions == 1 || !pace.is_one_machine();
                Some(another).filter(|_| self.refrained >= ANOTHER_TRY && is_room)
            })
        };
        let who = who.into_iter().flatten().filter(|_| pace.plain_left() == 0);
        let best = who.filter_map(of).min_by(|a, b| a.us_per_token.total_cmp(&b.us_per_token));
        // Guesses that are there are not thrown away.
        let rest = |plan: Plan| Plan { depth: guessed.len(), waits: false, ..plan };
        let plan = best.or_else(|| self.plan.map(rest).filter(|rest| rest.depth > 0))?;
        self.plan = Some(plan);
        if plan.guesser == Guesser::Lookup {
            // All that the ring has room for: nothing else is heard of until the first of them has come around.
            let more = room.min(plan.depth.saturating_sub(guessed.len()));
            let found = lookup.propose(tokens, &guessed, more);
            found.into_iter().for_each(|token| self.add(token, Guesser::Lookup));
        }
        Some(plan)
    }

    /// A guess of what follows all others.
    pub(super) fn add(&mut self, token: Token, by: Guesser) {
        self.waiting.push_back(Guess { token, by, depth: self.waiting.len() });
        self.made += 1;
        self.refrained = 0;
    }

    /// What follows is known. `None`: it was not guessed. After a wrong guess all further ones are in vain.
    pub(super) fn compare(&mut self, token: Token) -> Option<Outcome> {
        let Some(guess) = self.waiting.pop_front() else {
            self.refrained += 1;
            return None;
        };
        let is_right = guess.token == token;
        self.aims[guess.by as usize].note(f64::from(u8::from(is_right)), AVERAGED);
        self.right += u32::from(is_right);
        if !is_right {
            self.waiting.clear();
        }
        Some(Outcome { is_right, depth: guess.depth })
    }

    /// Whatever was on its way is lost.
    pub(super) fn drop_waiting(&mut self) {
        self.waiting.clear();
    }
}

#[cfg(test)]
mod tests {
    use murmur_protocol::stage::Step;

    use super::{
        super::{
            pursuit::Took,
            train::{Came, Gap},
        },
        *,
    };

    #[test]
    fn what_followed_before_is_guessed_again_and_nothing_else() {
        let mut lookup = Lookup::default();
        assert!(lookup.propose(&[1, 2, 3, 4], &[], 4).is_empty());
        let tokens = [1, 2, 3, 4, 5, 9, 1, 2, 3];
        assert_eq!(lookup.propose(&tokens, &[], 2), [4, 5]);
        assert_eq!(lookup.propose(&tokens, &[4, 5], 2), [9, 1]);
        assert!(lookup.propose(&tokens, &[7], 2).is_empty());
        // The newest occurrence counts.
        let tokens = [1, 2, 3, 4, 1, 2, 3, 8, 1, 2, 3];
        assert_eq!(Lookup::default().propose(&tokens, &[], 1), [8]);
    }

    #[test]
    fn a_repetition_that_overlaps_itself_goes_on_for_as_long_as_asked() {
        let tokens = [7, 7, 7, 7];
        assert_eq!(Lookup::default().propose(&tokens, &[], 6), [7; 6]);
        assert_eq!(Lookup::default().propose(&[1, 2, 1, 2, 1], &[2], 5), [1, 2, 1, 2, 1]);
        assert!(Lookup::default().propose(&[1], &[], 3).is_empty());
    }

    fn step(rows: u32, compute_us: u32) -> Step {
        Step { sampled: Vec::new(), compute_us, batch_rows: rows, threads: 1 }
    }

    /// A ring whose stages need `us` for a row, and as much for each further one in the same frame.
    fn pace(stages: usize, us: u32, further_us: u32, travel_us: u64, is_one_machine: bool) -> Pace {
        let mut pace = Pace::new(stages, travel_us, is_one_machine);
        for rows in 1..=GUESS_ROWS_MAX {
            (0..stages).for_each(|stage| pace.note(stage, &step(rows, us + further_us * (rows - 1))));
        }
        pace
    }

    #[test]
    fn over_a_long_way_single_rows_follow_one_another_and_fill_it() {
        let mut pace = pace(2, 2000, 2000, 96_000, false);
        pace.note_guess(1, Took::Alone(0), &step(1, 1500));
        let plan = Plan::of(Guesser::Model, 0.8, &pace, 1).unwrap();
        assert_eq!((plan.rows, plan.waits), (1, false));
        // X(a) = 1 / ((1 - a) L + a tau), with L = 100 ms and tau = 2 ms.
        assert!((plan.us_per_token - 21_600.0).abs() < 1.0, "{plan:?}");
        // Of guesses behind fifteen others too few are needed.
        assert!((13..=17).contains(&plan.depth), "{plan:?}");
        let sure = Plan::of(Guesser::Model, 0.99, &pace, 1).unwrap();
        assert!((50..=65).contains(&sure.depth), "the ring is full: {sure:?}");
        let shared = Plan::of(Guesser::Model, 0.99, &pace, 8).unwrap();
        assert!((5..=8).contains(&shared.depth), "{shared:?}");
        assert_eq!(Plan::of(Guesser::Model, 0.99, &pace, 70), None);
    }

    #[test]
    fn over_a_slow_link_no_more_rows_are_sent_ahead_than_it_carries() {
        let mut pace = pace(2, 200, 200, 20_000, false);
        pace.note_guess(1, Took::Alone(0), &step(1, 200));
        let plan = |pace: &Pace| Plan::of(Guesser::Model, 0.99, pace, 1).unwrap();
        assert!(plan(&pace).depth > 100);
        // What each of these took alone is known; together they come as the link lets them.
        let gap = |row_us: f64, has_waited: bool| Came { rows: 1, alone: None, gap: Some(Gap { row_us, has_waited }) };
        (0..50).for_each(|_| pace.note_came(&gap(4000.0, true)));
        let slow = plan(&pace);
        assert!(slow.rows == 1 && (4..=7).contains(&slow.depth), "{slow:?}");
        assert!((slow.us_per_token - 0.01 * 20_400.0 - 0.99 * 4000.0).abs() < 100.0, "{slow:?}");
        // Rows that were not sent any sooner say that it is no slower, and not how much faster it is.
        (0..50).for_each(|_| pace.note_came(&gap(9000.0, false)));
        assert_eq!(plan(&pace), slow);
        (0..50).for_each(|_| pace.note_came(&gap(1000.0, false)));
        assert!(plan(&pace).depth > 15);
    }

    #[test]
    fn on_one_machine_guesses_are_made_if_rows_together_are_cheaper_than_one_by_one() {
        assert_eq!(Plan::of(Guesser::Lookup, 0.8, &pace(1, 1000, 1000, 0, true), 1), None);
        let mut cheap = pace(1, 1000, 100, 0, true);
        let looked_up = Plan::of(Guesser::Lookup, 0.8, &cheap, 1).unwrap();
        assert!(looked_up.rows > 3 && looked_up.us_per_token < 410.0, "{looked_up:?}");
        cheap.note_guess(1, Took::Alone(0), &step(1, 100));
        let by_model = Plan::of(Guesser::Model, 0.8, &cheap, 1).unwrap();
        assert!(by_model.waits && by_model.depth + 1 == by_model.rows, "{by_model:?}");
        assert!(by_model.us_per_token > looked_up.us_per_token);
        // Sessions that share a machine are computed together already.
        assert_eq!(Plan::of(Guesser::Model, 0.8, &cheap, 2), None);
        // A model that is as slow as the one it guesses for.
        let mut slow = pace(1, 1000, 100, 0, true);
        slow.note_guess(1, Took::Alone(0), &step(1, 1000));
        assert_eq!(Plan::of(Guesser::Model, 0.8, &slow, 1), None);
    }

    #[test]
    fn no_known_token_waits_for_a_guess_of_another_machine() {
        // Rows together cost hardly more than one: to wait for guesses that are made at once is best.
        let plan = |is_elsewhere: bool| {
            let pace = pace(1, 1000, 100, 0, false);
            let mut pace = if is_elsewhere { pace.with_drafter_elsewhere() } else { pace };
            pace.note_guess(1, Took::Behind(100), &step(1, 100));
            Plan::of(Guesser::Model, 0.8, &pace, 1).unwrap()
        };
        let (here, elsewhere) = (plan(false), plan(true));
        assert!(here.waits && !elsewhere.waits, "{here:?}, {elsewhere:?}");
        assert!(elsewhere.us_per_token > here.us_per_token, "{here:?}, {elsewhere:?}");
    }

    #[test]
    fn the_way_of_guesses_from_another_machine_is_filled_as_well_and_costs_once_for_each_run() {
        let plan = |way_us: u64| {
            let mut pace = pace(2, 2000, 2000, 96_000, false).with_drafter_elsewhere();
            pace.note_guess(1, Took::Alone(1500 + way_us), &step(1, 0));
            pace.note_guess(1, Took::Behind(1500), &step(1, 0));
            Plan::of(Guesser::Model, 0.99, &pace, 1).unwrap()
        };
        let (beside, near) = (plan(0), plan(20_000));
        assert!((near.us_per_token - beside.us_per_token - 200.0).abs() < 1.0, "{beside:?}, {near:?}");
        assert!((12..=13).contains(&(near.depth - beside.depth)), "{beside:?}, {near:?}");
    }

    #[test]
    fn what_can_be_looked_up_fills_the_ring_at_once() {
        let pace = pace(2, 1000, 50, 100_000, false);
        let mut guesses = Guesses::new(&Draft::Lookup);
        for _ in 0..10 * AVERAGED {
            guesses.add(7, Guesser::Lookup);
            let _ = guesses.compare(7);
        }
        let mut planned = |room: usize| (guesses.plan(&[7; 8], &pace, 1, false, room).unwrap().depth, guesses.len());
        assert_eq!(planned(20).1, 20);
        let (depth, waiting) = planned(1000);
        assert!(depth > 4 * GUESS_ROWS_MAX as usize, "{depth}");
        assert_eq!(waiting, depth);
    }

    #[test]
    fn guesses_that_do_not_pay_are_tried_now_and_then() {
        let dear = pace(1, 1000, 1000, 0, true);
        let mut guesses = Guesses::new(&Draft::Lookup);
        let tokens = [7; 8];
        let mut made = 0;
        for _ in 0..2 * (ANOTHER_TRY + 1) {
            made += usize::from(guesses.plan(&tokens, &dear, 1, false, 10).is_some());
            let _ = guesses.compare(7);
        }
        assert_eq!(made, 2);
        assert_eq!((guesses.made, guesses.right), (2, 2));
    }

    #[test]
    fn where_guesses_have_cost_time_those_that_are_there_are_used_and_no_more_are_made() {
        let mut pace = pace(2, 1000, 100, 50_000, false);
        let mut guesses = Guesses::new(&Draft::Lookup);
        let mut plan = |pace: &Pace| (guesses.plan(&[7; 8], pace, 1, false, 10), guesses.made, guesses.len());
        let (begun, made, _) = plan(&pace);
        assert!(begun.is_some_and(|plan| plan.depth > 0));
        // Tokens come no sooner than they should without guesses. So some are had without, and come much sooner.
        for (is_guessed, us) in [(true, 52_000), (false, 30_000), (true, 52_000)] {
            while (pace.plain_left() == 0) == is_guessed {
                pace.note_token(is_guessed, Some(us));
            }
        }
        let (rest, still_made, waiting) = plan(&pace);
        assert_eq!(still_made, made);
        assert_eq!(rest.map(|rest| (rest.depth, rest.waits)), Some((waiting, false)));
        guesses.drop_waiting();
        assert_eq!(guesses.plan(&[7; 8], &pace, 1, false, 10), None);
    }
}
