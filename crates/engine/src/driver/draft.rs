//! Guesses of what a model will say, so that several tokens are had from one way through the stages.
//!
//! The rows of guessed tokens are sent before the tokens are known. The last stage compares: each row whose token is the one that
//! was sampled for its place gives the next, as it would have without guessing, at any temperature, since the noise of a token
//! depends on its position alone. So guesses cost time or save it, and change nothing.

use std::collections::HashMap;

use murmur_protocol::{frame::GUESS_ROWS_MAX, sampling::Token, stage::Step};

/// Tokens guessed at once at most: their rows and that of the token before them are one frame.
pub(super) const WINDOW_MAX: usize = GUESS_ROWS_MAX as usize - 1;
/// Tokens that a guess must follow as they have occurred before.
const CONTEXT: usize = 3;
/// How much of the newest measurement enters an average.
const SMOOTHING: f64 = 0.1;
/// What part of guesses is expected to be right before any was made.
const EXPECTED: f64 = 0.6;
/// A guess is made if it makes tokens cheaper by this factor at least: what is measured is not that exact.
const GAIN_MIN: f64 = 1.05;
/// After so many steps in which guesses would not have paid one is made nevertheless: texts change.
const ANOTHER_TRY: u32 = 64;

/// Who guesses. It sees every token of its session.
pub(super) trait Proposer: Send {
    /// Up to `count` tokens that may follow `tokens`, which were chosen, and `guessed`, which were not yet.
    fn propose(&mut self, tokens: &[Token], guessed: &[Token], count: usize) -> Vec<Token>;
}

/// What has followed the last few tokens before, in prompt or answer. It costs nothing where nothing is repeated.
#[derive(Debug, Default)]
pub(super) struct Lookup {
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
}

impl Proposer for Lookup {
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

/// What rows of one session cost in one frame, relative to a single one, as measured: steps of other sessions beside it, and
/// chunks of prompts, say nothing about it.
#[derive(Debug, Default)]
pub(super) struct RowCosts {
    /// Time of a step, us, by rows.
    us: [Option<f64>; WINDOW_MAX + 2],
}

impl RowCosts {
    pub(super) fn note(&mut self, rows: u32, step: &Step) {
        if let Some(known) = self.us.get_mut(rows as usize).filter(|_| step.batch_rows == rows) {
            let us = f64::from(step.compute_us);
            *known = Some(known.map_or(us, |was| was + SMOOTHING * (us - was)));
        }
    }

    /// Of a frame of so many rows, in single rows. Between what was measured it grows evenly; what was never measured is hoped to cost
    /// nothing more, which ends with its first measurement.
    fn of(&self, rows: usize) -> f64 {
        let Some(one) = self.us[1] else { return 1.0 };
        let measured = |rows: usize| Some((rows, self.us[rows]?));
        let below = (1..=rows).rev().find_map(measured).unwrap_or((1, one));
        let us = match (rows..self.us.len()).find_map(measured) {
            Some(above) if above.0 > below.0 => {
                below.1 + (above.1 - below.1) * (rows - below.0) as f64 / (above.0 - below.0) as f64
            }
            _ => below.1,
        };
        (us / one).max(1.0)
    }
}

/// How well a session is guessed, and what it makes of that.
#[derive(Debug)]
pub(super) struct Aim {
    /// What part of guesses was right lately.
    right: f64,
    /// Decisions against guessing since the last guess.
    refrained: u32,
}

impl Default for Aim {
    fn default() -> Self {
        Aim { right: EXPECTED, refrained: 0 }
    }
}

impl Aim {
    /// A guess was compared with what was chosen.
    pub(super) fn note(&mut self, is_right: bool) {
        self.right += SMOOTHING * (f64::from(u8::from(is_right)) - self.right);
    }

    /// How many tokens to guess at once: as many as make a token cheapest. `travel`: how long a frame is on its way, in times of
    /// computing a single row.
    pub(super) fn window(&mut self, costs: &RowCosts, travel: f64) -> usize {
        let per_token = |guesses: usize| {
            let mut tokens = 1.0;
            let mut right = 1.0;
            for _ in 0..guesses {
                right *= self.right;
                tokens += right;
            }
            (travel + costs.of(guesses + 1)) / tokens
        };
        let best = (1..=WINDOW_MAX).min_by(|&a, &b| per_token(a).total_cmp(&per_token(b))).unwrap_or(0);
        if per_token(best) * GAIN_MIN <= per_token(0) {
            self.refrained = 0;
            return best;
        }
        self.refrained += 1;
        if self.refrained < ANOTHER_TRY {
            return 0;
        }
        self.refrained = 0;
        1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn guesses_are_made_where_they_pay_and_tried_now_and_then_where_they_do_not() {
        let mut dear = RowCosts::default();
        (1..=16).for_each(|rows| dear.note(rows, &step(rows, 1000 * rows)));
        let mut aim = Aim::default();
        let windows: Vec<usize> = (0..2 * ANOTHER_TRY).map(|_| aim.window(&dear, 0.0)).collect();
        assert_eq!(windows.iter().sum::<usize>(), 2, "each row costs as much as a token: {windows:?}");
        // On a long way many rows cost hardly more than one.
        (0..100).for_each(|_| aim.note(true));
        assert_eq!(aim.window(&dear, 100.0), WINDOW_MAX);
        (0..100).for_each(|_| aim.note(false));
        assert_eq!(aim.window(&dear, 100.0), 0);
    }

    #[test]
    fn costs_between_measured_ones_grow_evenly_and_those_beyond_are_taken_for_the_last() {
        let mut costs = RowCosts::default();
        assert_eq!(costs.of(9), 1.0);
        costs.note(1, &step(1, 1000));
        costs.note(5, &step(5, 3000));
        // Not alone in its batch.
        costs.note(3, &step(4, 9000));
        assert_eq!([1, 3, 5, 9].map(|rows| costs.of(rows)), [1.0, 2.0, 3.0, 3.0]);
        costs.note(5, &step(5, 13000));
        assert_eq!(costs.of(5), 4.0);
    }
}
