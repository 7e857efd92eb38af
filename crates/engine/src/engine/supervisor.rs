//! Keeps one stage alive: loads it, carries its frames to the driver, starts it again when it dies or hangs.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard},
    thread,
    time::{Duration, Instant},
};

use murmur_gguf::LayerRange;
use murmur_protocol::{
    frame::Frame,
    stage::{Load, Loaded},
};

use super::{Patience, lock, stop::Stop};
use crate::{
    driver::Driver,
    link::{Link, LinkError, Receiver, RemoteStage},
};

/// A stage that cannot be loaded this often in a row has failed: sessions are told so, and it is tried less often.
const QUICK_RELOADS: u32 = 5;
/// Wait before the second reload; doubled each time.
const RELOAD_PAUSE: Duration = Duration::from_millis(100);
/// A stage that dies sooner than this after loading counts as one that could not be loaded, unless a request is to blame.
const PROVEN_AFTER: Duration = Duration::from_secs(2);
/// The pause between tries of a failed stage doubles this often at most (from 30 s to 16 min).
const FAILED_PAUSE_DOUBLINGS_MAX: u32 = 5;

/// How often a stage is asked again that was busy with the requests of other drivers.
const SHARED_RETRY: Duration = Duration::from_millis(250);

/// What running requests are told when the engine ends.
pub(super) const ENDING: &str = "the server is shutting down";

/// The driver and the stages it drives.
pub(super) struct Shared {
    pub(super) driver: Mutex<Driver>,
    /// When the driver's time began.
    pub(super) started: Instant,
    /// Those of the driver; behind them the model that guesses, if there is one.
    pub(super) stages: Vec<StageCell>,
    /// So many of them have to be up before the engine is; nobody waits for one behind them, or misses it.
    pub(super) awaited: usize,
    pub(super) stop: Stop,
    pub(super) program: PathBuf,
    pub(super) patience: Patience,
}

/// A stage: what it is, and its process.
pub(super) struct StageCell {
    pub(super) place: Place,
    pub(super) range: LayerRange,
    pub(super) state: Mutex<StageState>,
}

/// Where a stage runs.
pub(super) enum Place {
    /// In a child process, which loads this.
    Here(Box<Load>),
    /// On another machine.
    Elsewhere(Arc<dyn RemoteStage>),
}

/// What changes about a stage.
#[derive(Default)]
pub(super) struct StageState {
    pub(super) link: Option<Arc<Link>>,
    pub(super) loaded: Option<Loaded>,
    pub(super) restarts: u32,
}

impl Shared {
    /// Changes the driver's state and sends what comes out. Sending never blocks, and happens under the lock so that
    /// frames leave in the order the driver made them.
    pub(super) fn drive<T>(&self, change: impl FnOnce(&mut Driver) -> T) -> T {
        let mut driver = self.driver();
        let result = change(&mut driver);
        self.flush(&mut driver);
        result
    }

    /// The driver, that knows what time it is.
    fn driver(&self) -> MutexGuard<'_, Driver> {
        let mut driver = lock(&self.driver);
        driver.at(self.started.elapsed().as_micros() as u64);
        driver
    }

    fn flush(&self, driver: &mut Driver) {
        // A frame that cannot be sent ends its session, and that is told to the stages in turn.
        loop {
            let output = driver.take_output();
            if output.is_empty() {
                return driver.deliver();
            }
            let mut by_stage: Vec<Vec<Frame>> = vec![Vec::new(); self.stages.len()];
            for (stage, frame) in output {
                if let Some(frames) = by_stage.get_mut(stage) {
                    frames.push(frame);
                }
            }
            for (cell, frames) in self.stages.iter().zip(by_stage).filter(|(_, frames)| !frames.is_empty()) {
                let link = lock(&cell.state).link.clone();
                for unsendable in link.map(|link| link.send(&frames)).unwrap_or_default() {
                    driver.on_unsendable(unsendable.session, &unsendable.error.to_string());
                }
            }
        }
    }

    /// Starts a stage's process, or connects to where it runs, and waits until it has loaded.
    pub(super) fn bring_up(&self, stage: usize, progress: &mut dyn FnMut(f32)) -> Result<Receiver, LinkError> {
        let cell = &self.stages[stage];
        let (link, mut receiver) = match &cell.place {
            Place::Here(load) => Link::start(&self.program, load, self.patience.silence_floor)?,
            Place::Elsewhere(remote) => Link::connect(remote, &self.stop)?,
        };
        let link = Arc::new(link);
        self.stop.adopt(&link);
        let loaded = receiver.loaded(&link, progress)?;
        {
            let mut state = lock(&cell.state);
            state.link = Some(link);
            state.loaded = Some(loaded);
        }
        self.drive(|driver| driver.on_ready(stage));
        Ok(receiver)
    }

    /// Starts all stages, one after the other.
    pub(super) fn bring_up_in_turn(&self, progress: &dyn Fn(usize, f32)) -> Result<Vec<Receiver>, LinkError> {
        let stages = 0..self.awaited;
        stages.map(|stage| self.bring_up(stage, &mut |fraction| progress(stage, fraction))).collect()
    }

    /// Connects to all stages at once, so that every machine loads at the same time.
    pub(super) fn bring_up_at_once(&self) -> Result<Vec<Receiver>, LinkError> {
        thread::scope(|scope| {
            let stages = 0..self.awaited;
            let connecting: Vec<_> =
                stages.map(|stage| scope.spawn(move || self.bring_up(stage, &mut |_| {}))).collect();
            let panicked = |_| Err(LinkError::Lost(ENDING.to_owned()));
            connecting.into_iter().map(|stage| stage.join().unwrap_or_else(panicked)).collect()
        })
    }

    /// Serves a stage until the engine is stopped. `None`: it is not up yet.
    pub(super) fn supervise(self: &Arc<Self>, stage: usize, receiver: Option<Receiver>) {
        let mut failures = 0;
        let found = receiver.or_else(|| self.bring_back(stage, String::new(), &mut failures));
        let Some(mut receiver) = found else { return self.drive(|driver| driver.stop(ENDING)) };
        let mut loaded_at = Instant::now();
        loop {
            self.receive(stage, &mut receiver);
            // Taken out first: waiting for the process must not hold the lock that sending needs.
            let link = lock(&self.stages[stage].state).link.take();
            let is_unreachable = link.as_ref().is_some_and(|link| link.is_unreachable());
            let died = link.map(|link| link.died().to_string()).unwrap_or_default();
            if self.stop.is_stopped() {
                return self.drive(|driver| driver.stop(ENDING));
            }
            if stage < self.awaited {
                tracing::warn!(stage, "{died}; starting it again");
            }
            let is_explained = self.drive(|driver| match is_unreachable {
                true => driver.on_unreachable(stage),
                false => driver.on_lost(stage),
            });
            // One that cannot be reached is had from somebody else, at once.
            let is_proven = is_explained || is_unreachable || loaded_at.elapsed() >= PROVEN_AFTER;
            failures = if is_proven { 0 } else { failures + 1 };
            let Some(again) = self.bring_back(stage, died, &mut failures) else {
                return self.drive(|driver| driver.stop(ENDING));
            };
            lock(&self.stages[stage].state).restarts += 1;
            receiver = again;
            loaded_at = Instant::now();
        }
    }

    /// Asks stages again that other drivers use as well and that had no room.
    pub(super) fn retry(&self) {
        while self.stop.pause(SHARED_RETRY) {
            self.drive(Driver::retry);
        }
    }

    /// Tries until the stage is up; `None` when the engine is stopped. `failures`: times in a row that it did not live,
    /// `reason`: why it did not the last time.
    fn bring_back(&self, stage: usize, mut reason: String, failures: &mut u32) -> Option<Receiver> {
        loop {
            if *failures >= QUICK_RELOADS {
                let reason = format!("the engine process could not be restarted: {reason}");
                if stage < self.awaited {
                    tracing::error!(stage, "{reason}; trying again later");
                }
                self.drive(|driver| driver.on_unavailable(stage, &reason));
            }
            if !self.stop.pause(self.pause(*failures)) {
                return None;
            }
            match self.bring_up(stage, &mut |_| {}) {
                Ok(receiver) => return Some(receiver),
                Err(error) => {
                    *failures = failures.saturating_add(1);
                    reason = error.to_string();
                }
            }
        }
    }

    fn pause(&self, failures: u32) -> Duration {
        match failures.checked_sub(QUICK_RELOADS) {
            Some(slow) => self.patience.failed_pause * 2u32.pow(slow.min(FAILED_PAUSE_DOUBLINGS_MAX)),
            None if failures == 0 => Duration::ZERO,
            None => RELOAD_PAUSE * 2u32.pow(failures - 1),
        }
    }

    fn receive(self: &Arc<Self>, stage: usize, receiver: &mut Receiver) {
        let shared = Arc::clone(self);
        receiver.receive_all(move |frame, more| {
            let mut driver = shared.driver();
            driver.on_frame(stage, frame);
            // What arrived together is answered together, so that the next batch is not torn apart.
            if !more {
                shared.flush(&mut driver);
            }
        });
    }
}
