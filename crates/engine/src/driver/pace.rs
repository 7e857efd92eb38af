//! How long frames take, as measured: what guessing costs, and what it can save.

use murmur_protocol::stage::Step;

use super::{gain::Gain, pursuit::Took, train::Came};
use crate::row_costs::{RowCosts, SMOOTHING, smooth};

/// Chunks of a prompt on their way at most, beside one in each stage: each is a few MiB that somebody has to hold.
const CHUNKS_AHEAD_MAX: usize = 16;
/// An average of all there was, and once that is enough, of the newest only.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Mean {
    pub(super) value: f64,
    /// Of how many.
    pub(super) count: u32,
}

impl Mean {
    /// One more. `newest`: so many are enough.
    pub(super) fn note(&mut self, new: f64, newest: u32) {
        self.count = self.count.saturating_add(1);
        self.value += (new - self.value) / f64::from(self.count.min(newest));
    }
}

/// Of a ring: its stages, the way around it, and the model that guesses.
#[derive(Debug)]
pub(super) struct Pace {
    stages: Vec<RowCosts>,
    drafter: RowCosts,
    /// Of the model that guesses on a machine of its own: the time until a guess is there that nothing goes before, us.
    alone_us: Option<f64>,
    /// What each stage takes for a row of a prompt, us.
    prompt_row_us: Vec<Option<f64>>,
    /// Of the way around the ring, beside computing, us. What was known of it at first is forgotten like a measurement.
    travel_us: f64,
    /// How soon a row has come around after another that it had to wait for, be it on a link or in a stage that others use as well, us.
    row_us: Option<f64>,
    is_one_machine: bool,
    /// The model that guesses is on a machine of its own.
    is_drafter_elsewhere: bool,
    gain: Gain,
}

impl Pace {
    pub(super) fn new(stages: usize, travel_us: u64, is_one_machine: bool) -> Pace {
        Pace {
            stages: vec![RowCosts::default(); stages],
            drafter: RowCosts::default(),
            alone_us: None,
            prompt_row_us: vec![None; stages],
            travel_us: travel_us as f64,
            row_us: None,
            is_one_machine,
            is_drafter_elsewhere: false,
            gain: Gain::default(),
        }
    }

    /// The same, with the model that guesses on a machine of its own.
    pub(super) fn with_drafter_elsewhere(self) -> Pace {
        Pace { is_drafter_elsewhere: true, ..self }
    }

    /// Whether the model that guesses is on a machine of its own.
    pub(super) fn is_drafter_elsewhere(&self) -> bool {
        self.is_drafter_elsewhere
    }

    /// Whether all stages, and the model that guesses unless it is elsewhere, have the same processors.
    pub(super) fn is_one_machine(&self) -> bool {
        self.is_one_machine
    }

    /// A stage has computed generated rows.
    pub(super) fn note(&mut self, stage: usize, step: &Step) {
        self.stages[stage].note(step.batch_rows, step.compute_us);
    }

    /// The model that guesses has computed `rows`, which gave a guess. Of one on a machine of its own counts when its guesses come, and not what
    /// that machine says.
    pub(super) fn note_guess(&mut self, rows: u32, took: Took, step: &Step) {
        match took {
            _ if !self.is_drafter_elsewhere => self.drafter.note(step.batch_rows, step.compute_us),
            Took::Alone(us) if rows == 1 => smooth(&mut self.alone_us, us as f64),
            Took::Alone(_) => {}
            Took::Behind(us) => self.drafter.note(1, u32::try_from(us).unwrap_or(u32::MAX)),
        }
    }

    /// A frame has come around.
    pub(super) fn note_came(&mut self, came: &Came) {
        if let Some(gap) = came.gap.filter(|gap| gap.has_waited || self.row_us.is_some_and(|known| gap.row_us < known))
        {
            smooth(&mut self.row_us, gap.row_us);
        }
        if let Some((alone, expected_us)) = came.alone.zip(self.ring_us(came.rows)) {
            let (least_us, most_us) = (alone.us.saturating_sub(alone.waited_us) as f64, alone.us as f64);
            let off_us = expected_us.clamp(least_us, most_us) - expected_us;
            self.travel_us = (self.travel_us + SMOOTHING * off_us).max(0.0);
        }
    }

    /// A stage has computed rows of prompts.
    pub(super) fn note_prompt(&mut self, stage: usize, step: &Step) {
        smooth(&mut self.prompt_row_us[stage], f64::from(step.compute_us) / f64::from(step.batch_rows.max(1)));
    }

    /// How many chunks of a prompt, of so many rows, the way around the ring has room for beside one in each stage. They are what keeps
    /// the slowest stage busy while the answers to others travel.
    pub(super) fn chunks_ahead(&self, chunk_rows: u32) -> usize {
        let slowest_us = self.prompt_row_us.iter().try_fold(0.0, |most, us| Some(us.as_ref()?.max(most)));
        let chunks = slowest_us.map_or(0.0, |row_us| self.travel_us / (row_us * f64::from(chunk_rows)).max(1.0));
        (chunks as usize).min(CHUNKS_AHEAD_MAX)
    }

    /// A token has come, with guesses or without; of the only session it is known how long after the one before it, us.
    pub(super) fn note_token(&mut self, is_guessed: bool, took_us: Option<u64>) {
        match (took_us, self.ring_us(1)) {
            (Some(us), Some(expected_us)) => self.gain.note(is_guessed, us as f64, expected_us, self.travel_us),
            _ if !is_guessed => self.gain.pass(),
            _ => {}
        }
    }

    /// Tokens for each way around the ring, as timed lately with guesses.
    pub(super) fn tokens_around(&self) -> Option<f64> {
        Some(self.ring_us(1)? / self.gain.guessed_us()?)
    }

    /// How long the way around the ring is, beside computing, us.
    pub(super) fn travel_us(&self) -> f64 {
        self.travel_us
    }

    /// How many tokens are had without guesses before the next is guessed, because guesses may have cost time, or have.
    pub(super) fn plain_left(&self) -> u32 {
        self.gain.plain_left()
    }

    fn compute_us(&self, rows: usize) -> Option<f64> {
        self.stages.iter().map(|stage| stage.of(rows)).sum()
    }

    /// How long a frame of so many rows takes to come around, us. `None`: not measured yet.
    pub(super) fn ring_us(&self, rows: usize) -> Option<f64> {
        let further_us = (self.row_us.unwrap_or(0.0) - self.slowest_us(1)?).max(0.0);
        Some(self.compute_us(rows)? + self.travel_us + (rows - 1) as f64 * further_us)
    }

    /// How soon a frame of so many rows can follow another, us: the slowest stage or link.
    pub(super) fn spacing_us(&self, rows: usize) -> Option<f64> {
        Some(self.slowest_us(rows)?.max(self.row_us.unwrap_or(0.0) * rows as f64))
    }

    fn slowest_us(&self, rows: usize) -> Option<f64> {
        self.stages.iter().map(|stage| stage.of(rows)).try_fold(0.0, |most, us| Some(us?.max(most)))
    }

    /// How long the model that guesses takes for a token, us: that of the slowest stage, as long as it was never measured.
    pub(super) fn draft_us(&self) -> Option<f64> {
        self.drafter.of(1).or_else(|| self.spacing_us(1))
    }

    /// How much longer it takes until the first guess is there, us: the way to the model that makes it and back.
    pub(super) fn draft_way_us(&self) -> f64 {
        let alone_us = self.alone_us.unwrap_or(0.0);
        (alone_us - self.draft_us().unwrap_or(0.0)).max(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::train::Alone, *};

    fn step(rows: u32, compute_us: u32) -> Step {
        Step { sampled: Vec::new(), compute_us, batch_rows: rows, threads: 1 }
    }

    #[test]
    fn a_long_way_has_room_for_chunks_of_a_prompt_and_a_short_one_has_none() {
        let ahead = |travel_us: u64, prompt_us: u32| {
            let mut pace = Pace::new(2, travel_us, false);
            assert_eq!(pace.chunks_ahead(512), 0);
            pace.note_prompt(0, &step(512, prompt_us / 2));
            pace.note_prompt(1, &step(256, prompt_us / 2));
            pace.chunks_ahead(512)
        };
        assert_eq!(ahead(100, 1_000_000), 0);
        assert_eq!(ahead(200_000, 1_000_000), 0);
        assert_eq!(ahead(200_000, 40_000), 5);
        assert_eq!(ahead(1_000_000, 1_000), CHUNKS_AHEAD_MAX);
    }

    #[test]
    fn what_a_guess_of_another_machine_takes_is_seen_by_when_it_comes_and_the_way_counts_once() {
        let mut pace = Pace::new(1, 100, false).with_drafter_elsewhere();
        pace.note(0, &step(1, 1000));
        assert_eq!((pace.draft_us(), pace.draft_way_us()), (Some(1000.0), 0.0));
        // It says that it needs no time.
        pace.note_guess(1, Took::Alone(7000), &step(1, 0));
        pace.note_guess(1, Took::Behind(3000), &step(1, 0));
        assert_eq!((pace.draft_us(), pace.draft_way_us()), (Some(3000.0), 4000.0));
        // Rows of a prompt say nothing about the way.
        pace.note_guess(200, Took::Alone(900_000), &step(200, 0));
        assert_eq!(pace.draft_way_us(), 4000.0);
    }

    #[test]
    fn a_ring_takes_what_its_stages_compute_and_the_way_that_was_measured_be_it_longer_or_shorter_than_it_was() {
        let mut pace = Pace::new(2, 100, false);
        pace.note(0, &step(1, 1000));
        assert_eq!(pace.ring_us(1), None);
        pace.note(1, &step(1, 3000));
        assert_eq!((pace.ring_us(1), pace.spacing_us(1)), (Some(4100.0), Some(3000.0)));
        for us in [64_000, 5000] {
            let came = |us, waited_us| Came { rows: 1, alone: Some(Alone { us, waited_us }), gap: None };
            (0..300).for_each(|_| pace.note_came(&came(us, 0)));
            // What may have waited for rows in vain, nobody knows for how long, says no more than this.
            (0..300).for_each(|_| pace.note_came(&came(us + 90_000, 90_000)));
            assert!(pace.ring_us(1).is_some_and(|known| (known - us as f64).abs() < 1.0), "{pace:?}");
        }
    }
}
