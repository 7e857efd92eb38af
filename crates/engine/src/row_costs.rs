//! How long a stage computes for generated rows, by how many there are in a step.

use murmur_protocol::frame::GUESS_ROWS_MAX;

/// How much of the newest measurement enters an average.
pub(crate) const SMOOTHING: f64 = 0.1;
/// Rows in a step for which times are kept.
const ROWS_MAX: usize = GUESS_ROWS_MAX as usize;

/// One more measurement of something.
pub(crate) fn smooth(known: &mut Option<f64>, new: f64) {
    *known = Some(known.map_or(new, |was| was + SMOOTHING * (new - was)));
}

/// Time of a step of generated rows in one stage, us, by their number.
#[derive(Debug, Clone, Default)]
pub(crate) struct RowCosts {
    us: [Option<f64>; ROWS_MAX + 1],
}

impl RowCosts {
    pub(crate) fn note(&mut self, rows: u32, us: u32) {
        let most_us = self.most_us(rows as usize);
        if let Some(known) = self.us.get_mut(rows as usize) {
            smooth(known, f64::from(us).min(most_us));
        }
    }

    /// No more than the same rows one by one: a step that something held up must not speak against so many rows for ever.
    fn most_us(&self, rows: usize) -> f64 {
        self.us[1].filter(|_| rows > 1).map_or(f64::INFINITY, |one| one * rows as f64)
    }

    /// Of so many rows, at least one; `None` as long as a single row was never measured. Between what was measured it grows evenly; what
    /// was never measured is hoped to cost nothing more, which ends with its first measurement.
    pub(crate) fn of(&self, rows: usize) -> Option<f64> {
        let one = self.us[1]?;
        let measured = |rows: usize| Some((rows, self.us[rows]?));
        let below = (1..=rows.min(ROWS_MAX)).rev().find_map(measured)?;
        let us = match (rows..self.us.len()).find_map(measured) {
            Some(above) if above.0 > below.0 => {
                below.1 + (above.1 - below.1) * (rows - below.0) as f64 / (above.0 - below.0) as f64
            }
            _ => below.1,
        };
        Some(us.max(one).min(self.most_us(rows)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn costs_between_measured_ones_grow_evenly_and_those_beyond_are_taken_for_the_last() {
        let mut costs = RowCosts::default();
        costs.note(5, 3000);
        assert_eq!(costs.of(9), None);
        costs.note(1, 1000);
        // More than are ever guessed at once.
        costs.note(17, 9000);
        assert_eq!([1, 3, 5, 9, 40].map(|rows| costs.of(rows)), [1000.0, 2000.0, 3000.0, 3000.0, 3000.0].map(Some));
        costs.note(5, 4000);
        assert_eq!(costs.of(5), Some(3100.0));
    }

    #[test]
    fn a_step_that_was_held_up_does_not_make_rows_together_dearer_than_one_by_one() {
        let mut costs = RowCosts::default();
        costs.note(1, 1000);
        costs.note(4, 90_000);
        assert_eq!([2, 4, 8].map(|rows| costs.of(rows)), [2000.0, 4000.0, 4000.0].map(Some));
        // Nor for long.
        (0..20).for_each(|_| costs.note(4, 1000));
        assert!(costs.of(4).is_some_and(|us| us < 1500.0), "{costs:?}");
    }
}
