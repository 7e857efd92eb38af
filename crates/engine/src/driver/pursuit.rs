//! What a small model, which guesses what a large one will say, holds of a session.
//!
//! It runs as a stage of its own, of a whole model. It gets the rows of what is known and of its own guesses, and each newest row asks
//! for the next guess. One that is on another machine goes on by itself (`Kind::Next`): several guesses are on their way then, each of which
//! follows the one before, and a guess takes what that machine computes and not a way there and back. Rows of other tokens than it has
//! guessed tell it that it was wrong.

use std::collections::VecDeque;

/// The model has died so often while it worked on a session: it is not asked about that any more.
const DEATHS_MAX: u32 = 2;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Phase {
    /// It knows nothing.
    #[default]
    Away,
    /// `Open` is on its way.
    Opening,
    Open,
    /// It cannot take the session, or must not any more.
    GivenUp,
}

/// See the module's page.
#[derive(Debug, Default)]
pub(super) struct Pursuit {
    phase: Phase,
    epoch: u32,
    /// Rows that were sent, or that it is to compute of its own accord: those of the session's first tokens, guesses included.
    sent: u32,
    /// Of these, those that it has certainly computed.
    computed: u32,
    /// When each guess on its way was asked for, us, the next to come first. The last one follows all rows that were sent.
    asked_us: VecDeque<u64>,
    /// When the newest guess has come, us.
    heard_us: u64,
    /// The next guess is on its way for so long that nobody counts on it any more.
    is_late: bool,
    /// No guess follows the last: that one ends the answer.
    is_at_end: bool,
    /// What is on its way is in vain, which it was not told yet.
    is_stale: bool,
    /// It is not asked before, us.
    again_us: u64,
    deaths: u32,
}

/// What to send next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ask {
    /// The session.
    Open,
    /// Rows from `first` to the end. Behind them it goes on by itself for so many `further` ones.
    Rows { first: u32, further: u32 },
    /// It goes on by itself from `first` on, for so many `further` rows.
    Further { first: u32, further: u32 },
}

/// What a guess took, us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Took {
    /// Since it was asked for, with nothing before it.
    Alone(u64),
    /// Since the one before it, behind which it was asked for already.
    Behind(u64),
}

impl Pursuit {
    /// Of whatever is sent or awaited.
    pub(super) fn epoch(&self) -> u32 {
        self.epoch
    }

    /// Whether it may come to guesses at `now_us`.
    pub(super) fn goes_on(&self, now_us: u64) -> bool {
        self.phase != Phase::GivenUp && !self.is_at_end && now_us >= self.again_us
    }

    /// Whether a guess is on its way that is worth waiting for.
    pub(super) fn is_asked(&self) -> bool {
        !self.asked_us.is_empty() && !self.is_late
    }

    /// Notes whether the next guess has taken longer than `patience_us`, and says so.
    pub(super) fn is_late(&mut self, now_us: u64, patience_us: f64) -> bool {
        let since_us = self.asked_us.front().map(|&asked_us| asked_us.max(self.heard_us));
        self.is_late = since_us.is_some_and(|since_us| now_us.saturating_sub(since_us) as f64 > patience_us);
        self.is_late
    }

    /// Whether the model holds something of the session.
    pub(super) fn is_known(&self) -> bool {
        matches!(self.phase, Phase::Opening | Phase::Open)
    }

    /// Whether what is on its way is in vain and must be called back before more is sent. It is taken for done.
    pub(super) fn take_stale(&mut self) -> bool {
        std::mem::take(&mut self.is_stale)
    }

    /// What to send at `now_us` so that it guesses what follows `length` tokens and guesses, and `ahead` guesses are on their way.
    pub(super) fn ask(&mut self, length: u32, ahead: u32, now_us: u64) -> Option<Ask> {
        let on_their_way = self.asked_us.len() as u32;
        match self.phase {
            Phase::Away if now_us < self.again_us => None,
            Phase::Away => {
                self.phase = Phase::Opening;
                Some(Ask::Open)
            }
            Phase::Open if self.is_at_end => None,
            Phase::Open if on_their_way == 0 && self.sent < length => {
                let (first, further) = (std::mem::replace(&mut self.sent, length), ahead.saturating_sub(1));
                self.expect(1, now_us);
                self.sent += further;
                self.expect(further, now_us);
                self.is_late = false;
                Some(Ask::Rows { first, further })
            }
            // Half of them at once, so that not every guess takes a frame of its own.
            Phase::Open if on_their_way > 0 && on_their_way <= ahead / 2 && !self.is_late => {
                let (first, further) = (self.sent, ahead - on_their_way);
                self.sent += further;
                self.expect(further, now_us);
                Some(Ask::Further { first, further })
            }
            _ => None,
        }
    }

    fn expect(&mut self, guesses: u32, now_us: u64) {
        self.asked_us.extend(std::iter::repeat_n(now_us, guesses as usize));
    }

    /// It holds so many tokens of the session.
    pub(super) fn opened(&mut self, held: u32) {
        self.phase = Phase::Open;
        (self.sent, self.computed) = (held, held);
    }

    /// It has no room: it is asked again at `again_us`.
    pub(super) fn has_no_room(&mut self, again_us: u64) {
        self.lose(false);
        self.again_us = again_us;
    }

    /// It cannot take the session at all.
    pub(super) fn give_up(&mut self) {
        self.phase = Phase::GivenUp;
        self.is_stale = false;
        self.asked_us.clear();
    }

    /// Rows up to `end` are computed, of which no guess was wanted.
    pub(super) fn computed(&mut self, end: u32) {
        self.computed = end.min(self.sent);
    }

    /// A guess has come at `now_us` that follows rows up to `end`. `None`: it is not the one that comes next of those that were asked for.
    pub(super) fn guessed(&mut self, end: u32, now_us: u64) -> Option<Took> {
        let expected = (self.sent + 1).checked_sub(self.asked_us.len() as u32);
        if expected != Some(end) {
            return None;
        }
        let asked_us = self.asked_us.pop_front()?;
        let heard_us = std::mem::replace(&mut self.heard_us, now_us);
        (self.computed, self.is_late) = (end, false);
        Some(match asked_us < heard_us {
            true => Took::Behind(now_us.saturating_sub(heard_us)),
            false => Took::Alone(now_us.saturating_sub(asked_us)),
        })
    }

    /// Nothing follows the last guess, or its rows failed: there is nothing to be asked until it was compared.
    pub(super) fn pause(&mut self) {
        self.call_back();
        (self.is_at_end, self.sent) = (true, self.computed);
    }

    /// The rows from `position` on are those of other tokens now.
    pub(super) fn forget(&mut self, position: u32) {
        self.is_at_end = false;
        if self.phase != Phase::Open {
            return;
        }
        self.call_back();
        self.computed = self.computed.min(position);
        self.sent = self.computed;
    }

    /// What is on its way is in vain.
    fn call_back(&mut self) {
        if self.sent > self.computed || !self.asked_us.is_empty() {
            self.epoch += 1;
            self.is_stale = true;
            self.asked_us.clear();
        }
    }

    /// The model has died, or the session begins again everywhere: it may know the session later.
    pub(super) fn lose(&mut self, is_death: bool) {
        self.deaths += u32::from(is_death && !self.asked_us.is_empty());
        // Answers that are on their way belong to what is over.
        let (epoch, deaths) = (self.epoch + 1, self.deaths);
        let phase = if deaths < DEATHS_MAX { Phase::Away } else { Phase::GivenUp };
        *self = Pursuit { phase, epoch, deaths, ..Pursuit::default() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(first: u32) -> Option<Ask> {
        Some(Ask::Rows { first, further: 0 })
    }

    /// One that holds so many tokens.
    fn opened(held: u32) -> Pursuit {
        let mut pursuit = Pursuit::default();
        assert_eq!((pursuit.ask(10, 1, 0), pursuit.ask(10, 1, 0)), (Some(Ask::Open), None));
        pursuit.opened(held);
        pursuit
    }

    #[test]
    fn rows_are_sent_once_and_those_of_wrong_guesses_again() {
        let mut pursuit = opened(4);
        assert_eq!((pursuit.ask(10, 1, 0), pursuit.ask(11, 1, 0)), (rows(4), None));
        assert!(pursuit.guessed(10, 0).is_some());
        assert_eq!((pursuit.ask(10, 1, 0), pursuit.ask(11, 1, 0)), (None, rows(10)));
        // Its guess for position 10 was wrong, while the next is on its way.
        pursuit.forget(10);
        assert!(pursuit.take_stale() && !pursuit.take_stale());
        assert_eq!(pursuit.ask(11, 1, 0), rows(10));
        assert!(pursuit.guessed(11, 0).is_some());
        // All computed: nothing is on its way in vain.
        pursuit.forget(10);
        assert!(!pursuit.take_stale());
        assert_eq!((pursuit.epoch(), pursuit.ask(11, 1, 0)), (1, rows(10)));
    }

    #[test]
    fn guesses_that_follow_one_another_are_asked_for_at_once_and_more_when_half_of_them_have_come() {
        let mut pursuit = opened(4);
        assert_eq!(pursuit.ask(10, 6, 1_000), Some(Ask::Rows { first: 4, further: 5 }));
        assert_eq!(pursuit.guessed(10, 4_000), Some(Took::Alone(3_000)));
        assert_eq!(pursuit.guessed(11, 4_500), Some(Took::Behind(500)));
        assert_eq!(pursuit.ask(12, 6, 4_500), None);
        assert_eq!(pursuit.guessed(12, 5_100), Some(Took::Behind(600)));
        // Those behind 13, 14 and 15 rows are on their way.
        assert_eq!(pursuit.ask(13, 6, 5_100), Some(Ask::Further { first: 15, further: 3 }));
        (13..=18).for_each(|end| assert!(matches!(pursuit.guessed(end, 6_000), Some(Took::Behind(_))), "{end}"));
        assert_eq!((pursuit.guessed(19, 6_000), pursuit.is_asked()), (None, false));
        // All of them were taken: the last one is the next row.
        assert_eq!(pursuit.ask(19, 2, 7_000), Some(Ask::Rows { first: 18, further: 1 }));
    }

    #[test]
    fn after_a_wrong_guess_those_that_follow_it_are_called_back() {
        let mut pursuit = opened(4);
        pursuit.ask(10, 6, 0);
        assert!(pursuit.guessed(10, 0).is_some() && pursuit.guessed(11, 0).is_some());
        pursuit.forget(10);
        assert!(pursuit.take_stale() && !pursuit.is_asked());
        assert_eq!(pursuit.guessed(12, 0), None);
        assert_eq!((pursuit.epoch(), pursuit.ask(11, 2, 0)), (1, Some(Ask::Rows { first: 10, further: 1 })));
    }

    #[test]
    fn behind_the_end_nothing_is_asked_until_that_was_wrong() {
        for (ahead, is_stale) in [(1, false), (4, true)] {
            let mut pursuit = opened(0);
            pursuit.ask(3, ahead, 0);
            assert!(pursuit.guessed(3, 0).is_some());
            pursuit.pause();
            // What it would compute behind the end is called back at once.
            assert_eq!(pursuit.take_stale(), is_stale);
            assert!(!pursuit.goes_on(0) && pursuit.ask(4, ahead, 0).is_none());
            pursuit.forget(3);
            assert_eq!(pursuit.ask(4, 1, 0), rows(3));
        }
    }

    #[test]
    fn an_answer_about_a_session_that_was_closed_since_is_none() {
        let mut pursuit = Pursuit::default();
        pursuit.ask(3, 1, 0);
        let before = pursuit.epoch();
        pursuit.lose(false);
        assert!(pursuit.epoch() > before && !pursuit.is_known());
    }

    #[test]
    fn a_session_that_kills_the_model_is_not_its_business_for_long() {
        let mut pursuit = Pursuit::default();
        for _ in 0..DEATHS_MAX {
            assert_eq!(pursuit.ask(3, 1, 0), Some(Ask::Open));
            pursuit.opened(0);
            pursuit.ask(3, 1, 0);
            pursuit.lose(true);
        }
        assert!(!pursuit.goes_on(0) && pursuit.ask(3, 1, 0).is_none());
    }

    #[test]
    fn a_guess_that_takes_too_long_is_not_counted_on_and_taken_when_it_comes_after_all() {
        let mut pursuit = opened(0);
        pursuit.ask(3, 4, 1_000);
        assert!(!pursuit.is_late(2_000, 1_500.0) && pursuit.is_asked());
        assert!(pursuit.is_late(3_000, 1_500.0) && !pursuit.is_asked());
        assert_eq!(pursuit.ask(4, 8, 3_000), None);
        assert_eq!(pursuit.guessed(3, 3_100), Some(Took::Alone(2_100)));
        // The next one counts from then on.
        assert!(!pursuit.is_late(4_500, 1_500.0) && pursuit.is_asked());
        assert!(pursuit.is_late(4_700, 1_500.0));
    }

    #[test]
    fn what_it_was_not_asked_for_is_no_guess() {
        let mut pursuit = opened(0);
        assert_eq!(pursuit.guessed(0, 0), None);
        pursuit.ask(3, 2, 0);
        for end in [0, 2, 4, u32::MAX] {
            assert_eq!(pursuit.guessed(end, 0), None);
        }
        pursuit.computed(u32::MAX);
        assert!(pursuit.guessed(3, 0).is_some() && pursuit.guessed(4, 0).is_some());
        assert_eq!(pursuit.guessed(5, 0), None);
    }
}
