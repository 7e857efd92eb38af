//! What a small model, which guesses what a large one will say, holds of a session.
//!
//! It runs as a stage of its own, of a whole model. It gets the rows of what is known and of its own guesses, and each newest row asks
//! for the next guess. Rows of other tokens than it has guessed tell it that it was wrong.

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
    /// Rows that were sent: those of the session's first tokens, guesses included.
    sent: u32,
    /// Of these, those that it has certainly computed.
    computed: u32,
    /// A guess is on its way.
    is_asked: bool,
    /// When it was asked for, us.
    asked_at_us: u64,
    /// It is on its way for so long that nobody counts on it any more.
    is_late: bool,
    /// No guess follows the last: that one ends the answer.
    is_at_end: bool,
    /// What is on its way is in vain, which it was not told yet.
    is_stale: bool,
    deaths: u32,
}

/// What to send next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ask {
    /// The session.
    Open,
    /// Rows from this position to the end.
    Rows(u32),
}

impl Pursuit {
    /// Of whatever is sent or awaited.
    pub(super) fn epoch(&self) -> u32 {
        self.epoch
    }

    /// Whether it may come to guesses.
    pub(super) fn goes_on(&self) -> bool {
        self.phase != Phase::GivenUp && !self.is_at_end
    }

    /// Whether a guess is on its way that is worth waiting for.
    pub(super) fn is_asked(&self) -> bool {
        self.is_asked && !self.is_late
    }

    /// Notes whether the guess on its way has taken longer than `patience_us`, and says so.
    pub(super) fn is_late(&mut self, now_us: u64, patience_us: f64) -> bool {
        self.is_late = self.is_asked && now_us.saturating_sub(self.asked_at_us) as f64 > patience_us;
        self.is_late
    }

    /// Whether a guess is on its way that follows rows up to `end`; since when, us. Nothing else is a guess that was asked for.
    pub(super) fn awaited_since(&self, end: u32) -> Option<u64> {
        (self.is_asked && self.sent == end).then_some(self.asked_at_us)
    }

    /// Whether the model holds something of the session.
    pub(super) fn is_known(&self) -> bool {
        matches!(self.phase, Phase::Opening | Phase::Open)
    }

    /// Whether what is on its way is in vain and must be called back before more is sent. It is taken for done.
    pub(super) fn take_stale(&mut self) -> bool {
        std::mem::take(&mut self.is_stale)
    }

    /// What to send at `now_us` so that it guesses what follows `length` tokens and guesses.
    pub(super) fn ask(&mut self, length: u32, now_us: u64) -> Option<Ask> {
        match self.phase {
            Phase::Away => {
                self.phase = Phase::Opening;
                Some(Ask::Open)
            }
            Phase::Open if !self.is_asked && !self.is_at_end && self.sent < length => {
                let first = std::mem::replace(&mut self.sent, length);
                (self.is_asked, self.is_late, self.asked_at_us) = (true, false, now_us);
                Some(Ask::Rows(first))
            }
            _ => None,
        }
    }

    /// It holds so many tokens of the session.
    pub(super) fn opened(&mut self, held: u32) {
        self.phase = Phase::Open;
        (self.sent, self.computed) = (held, held);
    }

    /// It has no room, perhaps later, or cannot take the session at all.
    pub(super) fn give_up(&mut self) {
        self.phase = Phase::GivenUp;
        (self.is_asked, self.is_stale) = (false, false);
    }

    /// Rows up to `end` are computed; the last of them gave a guess, or none.
    pub(super) fn computed(&mut self, end: u32, has_guess: bool) {
        self.computed = end.min(self.sent);
        self.is_asked &= !has_guess;
    }

    /// Nothing follows the last guess, or its rows failed: there is nothing to be asked until it was compared.
    pub(super) fn pause(&mut self) {
        (self.is_asked, self.is_at_end) = (false, true);
        self.sent = self.computed;
    }

    /// The rows from `position` on are those of other tokens now.
    pub(super) fn forget(&mut self, position: u32) {
        self.is_at_end = false;
        if self.phase != Phase::Open {
            return;
        }
        if self.sent > self.computed {
            self.epoch += 1;
            self.is_stale = true;
            self.is_asked = false;
        }
        self.computed = self.computed.min(position);
        self.sent = self.computed;
    }

    /// The model has died, or the session begins again everywhere: it may know the session later.
    pub(super) fn lose(&mut self, is_death: bool) {
        self.deaths += u32::from(is_death && self.is_asked);
        // Answers that are on their way belong to what is over.
        let (epoch, deaths) = (self.epoch + 1, self.deaths);
        let phase = if deaths < DEATHS_MAX { Phase::Away } else { Phase::GivenUp };
        *self = Pursuit { phase, epoch, deaths, ..Pursuit::default() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_sent_once_and_those_of_wrong_guesses_again() {
        let mut pursuit = Pursuit::default();
        assert_eq!((pursuit.ask(10, 0), pursuit.ask(10, 0)), (Some(Ask::Open), None));
        pursuit.opened(4);
        assert_eq!((pursuit.ask(10, 0), pursuit.ask(11, 0)), (Some(Ask::Rows(4)), None));
        pursuit.computed(10, true);
        assert_eq!((pursuit.ask(10, 0), pursuit.ask(11, 0)), (None, Some(Ask::Rows(10))));
        // Its guess for position 10 was wrong, while the next is on its way.
        pursuit.forget(10);
        assert!(pursuit.take_stale() && !pursuit.take_stale());
        assert_eq!(pursuit.ask(11, 0), Some(Ask::Rows(10)));
        pursuit.computed(11, true);
        // All computed: nothing is on its way in vain.
        pursuit.forget(10);
        assert!(!pursuit.take_stale());
        assert_eq!((pursuit.epoch(), pursuit.ask(11, 0)), (1, Some(Ask::Rows(10))));
    }

    #[test]
    fn behind_the_end_nothing_is_asked_until_that_was_wrong() {
        let mut pursuit = Pursuit::default();
        pursuit.ask(3, 0);
        pursuit.opened(0);
        pursuit.ask(3, 0);
        pursuit.computed(3, true);
        pursuit.pause();
        assert!(!pursuit.goes_on() && pursuit.ask(4, 0).is_none());
        pursuit.forget(3);
        assert_eq!(pursuit.ask(4, 0), Some(Ask::Rows(3)));
    }

    #[test]
    fn an_answer_about_a_session_that_was_closed_since_is_none() {
        let mut pursuit = Pursuit::default();
        pursuit.ask(3, 0);
        let before = pursuit.epoch();
        pursuit.lose(false);
        assert!(pursuit.epoch() > before && !pursuit.is_known());
    }

    #[test]
    fn a_session_that_kills_the_model_is_not_its_business_for_long() {
        let mut pursuit = Pursuit::default();
        for _ in 0..DEATHS_MAX {
            assert_eq!(pursuit.ask(3, 0), Some(Ask::Open));
            pursuit.opened(0);
            pursuit.ask(3, 0);
            pursuit.lose(true);
        }
        assert!(!pursuit.goes_on() && pursuit.ask(3, 0).is_none());
    }

    #[test]
    fn a_guess_that_takes_too_long_is_not_counted_on_and_taken_when_it_comes_after_all() {
        let mut pursuit = Pursuit::default();
        pursuit.ask(3, 0);
        pursuit.opened(0);
        pursuit.ask(3, 1_000);
        assert!(!pursuit.is_late(2_000, 1_500.0) && pursuit.is_asked());
        assert!(pursuit.is_late(3_000, 1_500.0) && !pursuit.is_asked());
        assert_eq!(
            (pursuit.ask(4, 3_000), pursuit.awaited_since(3), pursuit.awaited_since(4)),
            (None, Some(1_000), None)
        );
        pursuit.computed(3, true);
        assert_eq!((pursuit.awaited_since(3), pursuit.ask(4, 3_000)), (None, Some(Ask::Rows(3))));
        assert!(pursuit.is_asked());
    }

    #[test]
    fn what_it_claims_to_have_computed_and_was_not_sent_is_not_believed() {
        let mut pursuit = Pursuit::default();
        pursuit.ask(3, 0);
        pursuit.opened(0);
        pursuit.ask(3, 0);
        pursuit.computed(u32::MAX, true);
        assert_eq!(pursuit.ask(4, 0), Some(Ask::Rows(3)));
    }
}
