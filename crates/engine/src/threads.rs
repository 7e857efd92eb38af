//! How many threads a step gets: measured, and measured again when the machine changes.
//!
//! llama.cpp's workers meet at spin barriers, so one preempted worker stalls all of them: two threads on a busy two-core
//! machine were measured to be five times slower than one. No declared number can know that. The governor keeps the
//! recent step time per thread count for each batch size, tries a neighbouring count now and then, and at once when steps
//! become much slower than they were. Pure: the caller measures.

use std::{collections::HashMap, time::Duration};

/// Steps between two periodic trials. A trial of a bad count costs a few times its length.
const STEPS_BETWEEN_TRIALS: u32 = 400;
/// Steps before the first trial: the machine may be busy from the start.
const STEPS_BEFORE_FIRST_TRIAL: u32 = 8;
/// Steps of one trial; the first is not counted, as workers wake up in it.
const TRIAL_STEPS: u32 = 4;
/// A step this much slower than usual starts a trial at once.
const ALARM_RATIO: f64 = 1.6;
/// This many slow steps in a row are an alarm.
const ALARM_STEPS: u32 = 3;
/// A count must be this much better to be chosen.
const SWITCH_RATIO: f64 = 0.93;
/// Weight of a new measurement in the moving average.
const SMOOTHING: f64 = 0.15;

/// From so many rows on time grows with their number, and batches share measurements per row.
const PROPORTIONAL_ROWS: usize = 16;

/// Batches that share measurements, and the row count to divide their time by.
fn bucket(rows: usize) -> (u32, f64) {
    if rows < PROPORTIONAL_ROWS { (rows as u32, 1.0) } else { (PROPORTIONAL_ROWS as u32, rows as f64) }
}

#[derive(Default)]
struct Bucket {
    chosen: u32,
    /// Moving average of the chosen count's step time, us.
    usual_us: f64,
    since_trial: u32,
    slow_steps: u32,
    trial: Option<Trial>,
    /// Next periodic trial goes up or down.
    upwards: bool,
}

struct Trial {
    threads: u32,
    steps: u32,
    best_us: f64,
    alarmed: bool,
}

/// Chooses thread counts.
pub(crate) struct ThreadGovernor {
    max: u32,
    fixed: Option<u32>,
    buckets: HashMap<u32, Bucket>,
    /// What the most recently settled bucket chose: the start of a new one.
    last_choice: u32,
}

impl ThreadGovernor {
    /// Up to `max` threads; `fixed` turns choosing off.
    pub(crate) fn new(max: u32, fixed: Option<u32>) -> ThreadGovernor {
        let max = max.max(1);
        ThreadGovernor { max, fixed: fixed.map(|n| n.clamp(1, max)), buckets: HashMap::new(), last_choice: max }
    }

    /// Threads for a step of `rows` rows.
    pub(crate) fn choose(&mut self, rows: usize) -> u32 {
        if let Some(fixed) = self.fixed {
            return fixed;
        }
        let start = self.last_choice;
        let bucket = self.buckets.entry(bucket(rows).0).or_insert_with(|| Bucket {
            chosen: start,
            since_trial: STEPS_BETWEEN_TRIALS - STEPS_BEFORE_FIRST_TRIAL,
            ..Bucket::default()
        });
        bucket.trial.as_ref().map_or(bucket.chosen, |trial| trial.threads)
    }

    /// Learns how long a step of `rows` rows took with the threads that [`ThreadGovernor::choose`] gave.
    pub(crate) fn observe(&mut self, rows: usize, took: Duration) {
        if self.fixed.is_some() || self.max == 1 {
            return;
        }
        let (key, divisor) = bucket(rows);
        let took_us = took.as_secs_f64() * 1e6 / divisor;
        let Some(bucket) = self.buckets.get_mut(&key) else { return };
        if let Some(trial) = &mut bucket.trial {
            trial.steps += 1;
            if trial.steps > 1 {
                trial.best_us = trial.best_us.min(took_us);
            }
            // A trial that goes badly ends at once.
            let hopeless = trial.steps > 1 && trial.best_us > bucket.usual_us * 1.3;
            if trial.steps >= TRIAL_STEPS || hopeless {
                if trial.best_us < bucket.usual_us * SWITCH_RATIO {
                    bucket.chosen = trial.threads;
                    bucket.usual_us = trial.best_us;
                    self.last_choice = trial.threads;
                    // What helped may help further: look again soon.
                    bucket.since_trial = STEPS_BETWEEN_TRIALS - STEPS_BETWEEN_TRIALS / 8;
                } else {
                    bucket.upwards = !bucket.upwards;
                    bucket.since_trial = 0;
                    if trial.alarmed {
                        // Slower with fewer threads as well: the work itself has grown.
                        bucket.usual_us = bucket.usual_us.max(took_us.min(bucket.usual_us * ALARM_RATIO));
                    }
                }
                bucket.slow_steps = 0;
                bucket.trial = None;
            }
            return;
        }
        if bucket.usual_us == 0.0 {
            bucket.usual_us = took_us;
        }
        let slow = took_us > bucket.usual_us * ALARM_RATIO;
        bucket.slow_steps = if slow { bucket.slow_steps + 1 } else { 0 };
        bucket.since_trial += 1;
        let alarmed = bucket.slow_steps >= ALARM_STEPS;
        if alarmed {
            bucket.usual_us = took_us;
        } else if !slow {
            bucket.usual_us += SMOOTHING * (took_us - bucket.usual_us);
        }
        if alarmed || bucket.since_trial >= STEPS_BETWEEN_TRIALS {
            let down = (bucket.chosen / 2).max(1);
            let up = (bucket.chosen * 2).min(self.max);
            let go_up = !alarmed && (bucket.upwards || bucket.chosen == 1) && bucket.chosen < self.max;
            let threads = if go_up { up } else { down };
            bucket.since_trial = 0;
            if threads != bucket.chosen {
                bucket.trial = Some(Trial { threads, steps: 0, best_us: f64::INFINITY, alarmed });
            } else {
                bucket.upwards = !bucket.upwards;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs steps on a machine whose step time depends on the thread count; returns (time spent, last choice).
    fn run(governor: &mut ThreadGovernor, steps: u32, machine: impl Fn(u32) -> u64) -> (u64, u32) {
        let mut spent = 0;
        for _ in 0..steps {
            let took = machine(governor.choose(1));
            spent += took;
            governor.observe(1, Duration::from_micros(took));
        }
        (spent, governor.choose(1))
    }

    fn idle(threads: u32) -> u64 {
        40_000 / u64::from(threads)
    }

    fn busy(threads: u32) -> u64 {
        if threads == 1 { 45_000 } else { 200_000 }
    }

    #[test]
    fn a_machine_that_becomes_busy_gets_one_thread_within_a_few_steps() {
        let mut governor = ThreadGovernor::new(2, None);
        assert_eq!(run(&mut governor, 100, idle).1, 2);
        assert_eq!(run(&mut governor, 12, busy).1, 1);
    }

    #[test]
    fn a_machine_that_becomes_idle_gets_its_threads_back() {
        let mut governor = ThreadGovernor::new(2, None);
        run(&mut governor, 20, idle);
        run(&mut governor, 20, busy);
        assert_eq!(run(&mut governor, 2 * STEPS_BETWEEN_TRIALS, idle).1, 2);
    }

    #[test]
    fn trials_cost_little_on_a_steady_machine() {
        let mut governor = ThreadGovernor::new(8, None);
        let steps = 5 * STEPS_BETWEEN_TRIALS;
        let (spent, _) = run(&mut governor, steps, idle);
        assert!((spent as f64) < f64::from(steps) * idle(8) as f64 * 1.01, "{spent}");
        let mut governor = ThreadGovernor::new(2, None);
        run(&mut governor, 30, busy);
        let (spent, _) = run(&mut governor, steps, busy);
        assert!((spent as f64) < f64::from(steps) * busy(1) as f64 * 1.03, "{spent}");
    }

    #[test]
    fn a_growing_context_is_not_mistaken_for_a_busy_machine() {
        let mut governor = ThreadGovernor::new(4, None);
        for step in 0..3000u64 {
            let took = idle(governor.choose(1)) + step * 10;
            governor.observe(1, Duration::from_micros(took));
        }
        assert_eq!(governor.choose(1), 4);
    }

    #[test]
    fn a_fixed_count_stays() {
        let mut governor = ThreadGovernor::new(4, Some(3));
        assert_eq!(run(&mut governor, 2000, busy).1, 3);
    }
}
