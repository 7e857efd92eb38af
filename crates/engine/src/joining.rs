//! How many rows of one sequence that wait for their turn are computed together.
//!
//! Guesses are sent one by one, as they are made. Where they come sooner than a stage computes them, some wait. Together they cost as much
//! reading of weights as one, so a stage that is short of memory bandwidth, or whose steps are mostly overhead, catches up; one that is short
//! of arithmetic gains nothing, and the first of them, which the next stage waits for, is done later. So it is measured what rows cost.

use std::time::Duration;

use crate::row_costs::RowCosts;

/// A step of several rows takes so many times what one of a single row takes, at most: the first is held up by the others, and so is the
/// correction of what was guessed wrong. Where a part `a = 0.855` of guesses is right, rows that follow one another in frames of `w` make tokens
/// cheaper than single ones (`driver::draft`, `Plan::of`) as long as a frame takes 1.5 times as long as a row with two of them, 2 with four, 2.5
/// with eight, all around a ring of two stages; 1.7 with four and 1.9 with eight around one of four.
const STEP_MAX: f64 = 1.75;
/// Times that rows which waited were not all computed together after which they are once, as that may have become cheaper.
const ANOTHER_TRY: u32 = 64;

/// What steps of generated rows take.
#[derive(Debug, Default)]
pub(crate) struct Joining {
    costs: RowCosts,
    /// Times that some were left waiting since all were tried together.
    left: u32,
}

impl Joining {
    /// Notes a step of generated rows.
    pub(crate) fn note(&mut self, rows: usize, took: Duration) {
        self.costs.note(rows as u32, took.as_micros() as u32);
    }

    /// How many of so many rows go together. As long as that was not measured, all of them.
    pub(crate) fn rows(&mut self, waiting: usize) -> usize {
        let Some(one_us) = self.costs.of(1) else { return waiting };
        let is_short = |rows: &usize| self.costs.of(*rows).is_some_and(|us| us <= STEP_MAX * one_us);
        let rows = (1..=waiting).rev().find(is_short).unwrap_or(1);
        // What is left of many goes together sooner or later, which says nothing of the many.
        self.left += u32::from(rows < waiting);
        if self.left < ANOTHER_TRY {
            return rows;
        }
        self.left = 0;
        waiting
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn joining(steps: &[(usize, u64)]) -> Joining {
        let mut joining = Joining::default();
        steps.iter().for_each(|&(rows, us)| joining.note(rows, Duration::from_micros(us)));
        joining
    }

    #[test]
    fn as_many_rows_go_together_as_are_cheap_and_at_first_all() {
        assert_eq!(joining(&[]).rows(9), 9);
        assert_eq!(joining(&[(1, 1000)]).rows(9), 9);
        // What is known of several rows alone says nothing.
        assert_eq!(joining(&[(4, 4000)]).rows(9), 9);
        let mut dear_for_many = joining(&[(1, 1000), (2, 1200), (4, 1600), (5, 5000), (16, 16_000)]);
        assert_eq!([2, 4, 5, 16].map(|waiting| dear_for_many.rows(waiting)), [2, 4, 4, 4]);
        // Kernels for few rows may be dear and those for more cheap.
        let mut dear_for_few = joining(&[(1, 1000), (2, 1800), (8, 1700)]);
        assert_eq!([2, 3, 8].map(|waiting| dear_for_few.rows(waiting)), [1, 1, 8]);
    }

    #[test]
    fn rows_that_are_dear_together_are_tried_again_and_one_step_that_was_held_up_rules_out_nothing_for_ever() {
        let mut held_up = joining(&[(1, 1000), (4, 6000)]);
        let mut tries = 0;
        for _ in 0..10_000 {
            if held_up.rows(4) == 4 {
                tries += 1;
                held_up.note(4, Duration::from_micros(1300));
            }
        }
        assert!(tries > 5_000, "{tries}");
        // Eight at a time: those that are left of them go together at once.
        let mut bursts = joining(&[(1, 1000), (4, 1600), (8, 8000)]);
        assert!((0..2 * ANOTHER_TRY).any(|_| (bursts.rows(8) == 8) | (bursts.rows(4) == 8)));
    }
}
