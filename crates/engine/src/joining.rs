//! Whether rows of one sequence that wait for their turn are computed together.
//!
//! Guesses are sent one by one, as they are made. Where they come sooner than a stage computes them, some wait. Together they cost as much
//! reading of weights as one, so a stage that is short of memory bandwidth, or whose steps are mostly overhead, catches up; one that is short
//! of arithmetic gains nothing, and the first of them, which the next stage waits for, is done later. So it is measured what a row more costs.

use std::time::Duration;

/// A row that joins others costs this part of one alone at most. With `S` stages to go, `n` rows are there after `S (1 + c (n - 1))` steps
/// together and `S + n - 1` one by one: with `c` at a half and two stages that is the same, for less work.
const SHARE_MAX: f64 = 0.5;
/// Weight of a new measurement in the moving average.
const SMOOTHING: f64 = 0.1;
/// Times that rows went one by one after which they go together once, as that may have become cheaper.
const ANOTHER_TRY: u32 = 64;

/// What steps of generated rows took.
#[derive(Debug, Default)]
pub(crate) struct Joining {
    /// A step of one row, us.
    one_us: Option<f64>,
    /// Each row more, us.
    further_us: Option<f64>,
    /// Times that rows went one by one since they last went together.
    apart: u32,
}

impl Joining {
    /// Notes a step of generated rows.
    pub(crate) fn note(&mut self, rows: usize, took: Duration) {
        let us = took.as_secs_f64() * 1e6;
        let smooth =
            |known: &mut Option<f64>, new: f64| *known = Some(known.map_or(new, |was| was + SMOOTHING * (new - was)));
        match (rows, self.one_us) {
            (0, _) | (2.., None) => {}
            (1, _) => smooth(&mut self.one_us, us),
            // A step that something held up counts as if the rows had gone one by one.
            (_, Some(one_us)) => smooth(&mut self.further_us, ((us - one_us) / (rows - 1) as f64).clamp(0.0, one_us)),
        }
    }

    /// Whether rows that wait now go together. Before that was measured they do.
    pub(crate) fn pays(&mut self) -> bool {
        let is_dear = |one_us: f64, further_us: f64| further_us > SHARE_MAX * one_us;
        if self.one_us.zip(self.further_us).is_some_and(|(one_us, further_us)| is_dear(one_us, further_us)) {
            self.apart += 1;
            if self.apart < ANOTHER_TRY {
                return false;
            }
        }
        self.apart = 0;
        true
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
    fn rows_go_together_where_that_is_cheaper_and_at_first() {
        assert!(joining(&[]).pays());
        assert!(joining(&[(1, 1000)]).pays());
        // What is known of several rows alone says nothing.
        assert!(joining(&[(4, 4000)]).pays());
        assert!(joining(&[(1, 1000), (8, 3000)]).pays());
        assert!(!joining(&[(1, 1000), (8, 6000)]).pays());
    }

    #[test]
    fn rows_that_are_dear_together_are_tried_again_and_one_step_that_was_held_up_rules_out_nothing_for_ever() {
        let mut held_up = joining(&[(1, 1000), (4, 90_000)]);
        let mut tries = 0;
        while !held_up.pays() || held_up.further_us.is_some_and(|us| us > 500.0) {
            if held_up.apart == 0 {
                tries += 1;
                held_up.note(4, Duration::from_micros(1300));
            }
            assert!(tries < 20);
        }
        assert!((0..1000).all(|_| held_up.pays()));
    }
}
