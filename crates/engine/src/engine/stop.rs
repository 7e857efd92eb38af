//! The end of an engine: a switch that every process and every pause of it listens to, so that nobody waits for a stage
//! that is loading, hangs, or is to be tried again later.

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use crate::link::Link;

/// Ends an engine from outside, also while it is still being loaded. Clones are the same switch.
#[derive(Clone, Default)]
pub struct Stop(Arc<Inner>);

#[derive(Default)]
struct Inner {
    state: Mutex<State>,
    stopped: Condvar,
}

#[derive(Default)]
struct State {
    is_stopped: bool,
    links: Vec<Weak<Link>>,
}

impl Stop {
    /// A switch that is not thrown.
    pub fn new() -> Stop {
        Stop::default()
    }

    /// Kills every process and ends every pause, now and later. Does not wait.
    pub fn stop(&self) {
        let mut state = self.lock();
        state.is_stopped = true;
        self.0.stopped.notify_all();
        for link in std::mem::take(&mut state.links).iter().filter_map(Weak::upgrade) {
            link.kill();
        }
    }

    /// True once [`Stop::stop`] was called.
    pub fn is_stopped(&self) -> bool {
        self.lock().is_stopped
    }

    /// Ends this process as well when the time comes, which may be now.
    pub(crate) fn adopt(&self, link: &Arc<Link>) {
        let mut state = self.lock();
        if state.is_stopped {
            return link.kill();
        }
        state.links.retain(|link| link.strong_count() > 0);
        state.links.push(Arc::downgrade(link));
    }

    /// Waits so long. False: it was stopped.
    pub(crate) fn pause(&self, duration: Duration) -> bool {
        let state = self.lock();
        let waited = self.0.stopped.wait_timeout_while(state, duration, |state| !state.is_stopped);
        !waited.unwrap_or_else(PoisonError::into_inner).0.is_stopped
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn a_pause_ends_when_all_ends() {
        let stop = Stop::new();
        let pausing = thread::spawn({
            let stop = stop.clone();
            move || stop.pause(Duration::from_secs(3600))
        });
        stop.stop();
        assert!(!pausing.join().unwrap());
        assert!(!stop.pause(Duration::from_secs(3600)));
    }
}
