//! Whether guesses pay after all, by how long tokens have taken with them and without.
//!
//! What a plan of guesses expects follows from times of single steps, as if each stage and the model that guesses had processors of their
//! own. Often they do not: that model shares the driver's machine with a stage, and machines may share one. So tokens are timed as they
//! come, while one session runs alone: where guesses have gained little, some are had without, and where they have cost time, many.

use super::pace::Mean;

/// Tokens with guesses after which it is known what they take.
const GUESSED_MIN: u32 = 32;
/// Tokens without guesses after which the same is known of them.
const PLAIN_MIN: u32 = 8;
/// Guesses are in doubt while they seem to make tokens cheaper by less than this factor.
const DOUBTED: f64 = 1.5;
/// The way around the ring is another one, and nothing is known of it, when it has changed by this part of what a token takes.
const ANOTHER_WAY: f64 = 0.25;
/// Tokens with guesses after which what a token takes without is not known any more.
const FORGOTTEN: u32 = 1024;
/// Nothing counts for more than this many times what a token should take without guesses: something has held it up.
const LATE: f64 = 4.0;
/// Tokens that are had without guesses once these have cost time: then they are tried again.
const WITHOUT: u32 = 512;

/// What tokens of a session that runs alone have taken.
#[derive(Debug, Default)]
pub(super) struct Gain {
    /// Time of a token with guesses, us.
    guessed: Mean,
    /// The same without.
    plain: Mean,
    /// So many tokens are had without guesses.
    plain_left: u32,
    /// With this way around the ring, us.
    travel_us: f64,
}

impl Gain {
    /// How many tokens are had without guesses before the next is guessed.
    pub(super) fn plain_left(&self) -> u32 {
        self.plain_left
    }

    /// What a token has taken lately with guesses, us. `None`: not measured.
    pub(super) fn guessed_us(&self) -> Option<f64> {
        (self.guessed.count > 0).then_some(self.guessed.value)
    }

    /// A token has come without guesses, and nobody knows how long it took.
    pub(super) fn pass(&mut self) {
        self.plain_left = self.plain_left.saturating_sub(1);
    }

    /// A token has come `us` after the one before it, `guessed` or not. Without guesses one should take `expected_us`, of which the way
    /// around the ring takes `travel_us`.
    pub(super) fn note(&mut self, guessed: bool, us: f64, expected_us: f64, travel_us: f64) {
        if (travel_us - self.travel_us).abs() > ANOTHER_WAY * expected_us {
            *self = Gain { travel_us, ..Gain::default() };
        }
        let mean = if guessed { &mut self.guessed } else { &mut self.plain };
        mean.note(us.min(LATE * expected_us), GUESSED_MIN);
        if !guessed {
            return self.pass();
        }
        if self.guessed.count < GUESSED_MIN {
            return;
        }
        let is_plain_known = self.plain.count >= PLAIN_MIN && self.guessed.count < FORGOTTEN;
        if is_plain_known && self.guessed.value > self.plain.value {
            (self.guessed, self.plain_left) = (Mean::default(), WITHOUT);
        } else if !is_plain_known && self.guessed.value * DOUBTED > expected_us {
            (self.guessed, self.plain, self.plain_left) = (Mean::default(), Mean::default(), PLAIN_MIN);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of so many tokens had guesses, and how many had none, where they take so long, us.
    fn had(gain: &mut Gain, guessed_us: f64, plain_us: f64, tokens: u32) -> (u32, u32) {
        let guessed = (0..tokens).filter(|_| {
            let guesses = gain.plain_left() == 0;
            // What is expected of tokens without guesses is measured while there are some, and so more than it is.
            gain.note(guesses, if guesses { guessed_us } else { plain_us }, 1.25 * plain_us, 0.0);
            guesses
        });
        let guessed = guessed.count() as u32;
        (guessed, tokens - guessed)
    }

    #[test]
    fn guesses_that_cost_time_are_left_alone_and_tried_again_after_a_while() {
        let mut gain = Gain::default();
        let (guessed, plain) = had(&mut gain, 1500.0, 1000.0, 32 + 8 + 32 + 512);
        assert_eq!((guessed, plain), (64, 520));
        assert_eq!(had(&mut gain, 1500.0, 1000.0, 32 + 512), (32, 512));
        // What is said has changed.
        assert_eq!(had(&mut gain, 300.0, 1000.0, 900), (900, 0));
    }

    #[test]
    fn guesses_that_gain_much_are_never_interrupted_and_those_that_gain_little_hardly_ever() {
        assert_eq!(had(&mut Gain::default(), 400.0, 1000.0, 5000), (5000, 0));
        let (guessed, plain) = had(&mut Gain::default(), 1300.0, 1500.0, 10_000);
        assert!(plain > 8 && plain < 100, "{plain} of {guessed}");
    }

    #[test]
    fn what_was_measured_around_another_ring_decides_nothing() {
        let mut gain = Gain::default();
        had(&mut gain, 1500.0, 1000.0, 100);
        assert!(gain.plain_left() > 0);
        gain.note(false, 60_000.0, 61_000.0, 60_000.0);
        assert_eq!(gain.plain_left(), 0);
        (0..1000).for_each(|_| gain.note(true, 30_000.0, 61_000.0, 60_000.0));
        assert_eq!(gain.plain_left(), 0);
    }

    #[test]
    fn tokens_of_sessions_that_run_together_end_a_pause_as_well() {
        let mut gain = Gain::default();
        had(&mut gain, 1500.0, 1000.0, 32 + 8 + 32);
        assert_eq!(gain.plain_left(), WITHOUT);
        (0..WITHOUT).for_each(|_| gain.pass());
        assert_eq!(gain.plain_left(), 0);
    }

    #[test]
    fn a_token_that_came_late_decides_nothing() {
        let mut gain = Gain::default();
        had(&mut gain, 400.0, 1000.0, 200);
        gain.note(true, 10_000.0, 1250.0, 0.0);
        assert_eq!(gain.plain_left(), 0);
    }
}
