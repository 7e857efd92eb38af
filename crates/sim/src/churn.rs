//! Nodes that come and go.

use rand::{RngExt, SeedableRng, rngs::StdRng};

use crate::{node::Index, sim::Sim};

/// A node that went comes back within this time at the earliest and at the latest, in milliseconds.
const AWAY_MS: std::ops::RangeInclusive<u64> = 5_000..=120_000;

/// Lets a constant part of the nodes go and come back. Half of those that go say goodbye; the other half crash.
#[derive(Debug)]
pub struct Churn {
    rng: StdRng,
    nodes: Index,
    pause_ms: u64,
    away: Vec<(u64, Index)>,
}

impl Churn {
    /// `per_minute`: the part of `nodes` that goes in a minute, 0 to 1.
    pub fn new(nodes: Index, per_minute: f64, seed: u64) -> Self {
        let going_per_minute = f64::from(nodes) * per_minute;
        let pause_ms = if going_per_minute > 0.0 { (60_000.0 / going_per_minute) as u64 } else { u64::MAX };
        Churn { rng: StdRng::seed_from_u64(seed), nodes, pause_ms: pause_ms.max(1), away: Vec::new() }
    }

    /// Runs `sim` for `ms` milliseconds.
    pub fn run(&mut self, sim: &mut Sim, ms: u64) {
        let until_ms = sim.now_ms() + ms;
        let mut next_ms = sim.now_ms().saturating_add(self.pause_ms);
        while sim.now_ms() < until_ms {
            let back_ms = self.away.iter().map(|(back_ms, _)| *back_ms).min().unwrap_or(u64::MAX);
            let step_until_ms = next_ms.min(back_ms).min(until_ms);
            sim.run_for(step_until_ms.saturating_sub(sim.now_ms()));
            for (_, index) in self.away.extract_if(.., |(back_ms, _)| *back_ms <= step_until_ms) {
                sim.start(index);
            }
            if next_ms <= step_until_ms {
                next_ms = step_until_ms.saturating_add(self.pause_ms);
                self.one_goes(sim);
            }
        }
    }

    fn one_goes(&mut self, sim: &mut Sim) {
        let index = self.rng.random_range(0..self.nodes);
        if self.away.iter().any(|(_, gone)| *gone == index) {
            return;
        }
        if self.rng.random_bool(0.5) {
            sim.leave(index);
        } else {
            sim.crash(index);
        }
        self.away.push((sim.now_ms() + self.rng.random_range(AWAY_MS), index));
    }
}
