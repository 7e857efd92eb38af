//! The child that tokenises, or embeds: questions and answers instead of sessions. Started again when it dies or hangs.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use murmur_protocol::{
    frame::{Frame, Kind},
    stage::{Load, Loaded, VocabularyFacts},
};
use tokio::sync::oneshot;

use super::{EngineError, lock, stop::Stop};
use crate::link::{Link, LinkError};

/// One child without sessions.
pub(super) struct Helper {
    program: PathBuf,
    load: Load,
    silence_floor: Duration,
    stop: Stop,
    /// Held while a child is started, so that only one is.
    starting: Mutex<()>,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    link: Option<Arc<Link>>,
    loaded: Option<Loaded>,
    waiting: HashMap<u64, oneshot::Sender<Frame>>,
    next_id: u64,
}

impl Drop for Helper {
    fn drop(&mut self) {
        // The receiving thread may hold the state an instant longer, but the process must be gone when this returns.
        let link = lock(&self.state).link.take();
        drop(link);
    }
}

impl Helper {
    /// Starts the child and waits until it has loaded.
    pub(super) fn new(
        program: PathBuf,
        load: Load,
        silence_floor: Duration,
        stop: Stop,
        progress: &mut dyn FnMut(f32),
    ) -> Result<Helper, EngineError> {
        let helper = Helper { program, load, silence_floor, stop, starting: Mutex::default(), state: Arc::default() };
        helper.link(progress)?;
        Ok(helper)
    }

    /// The vocabulary that the child reported; can be had once.
    pub(super) fn vocabulary_facts(&self) -> Result<VocabularyFacts, EngineError> {
        let mut state = lock(&self.state);
        let facts = state.loaded.as_mut().and_then(|loaded| loaded.vocabulary.take());
        facts.ok_or_else(|| EngineError::Child("the engine process did not report a vocabulary".into()))
    }

    /// The child's process, while there is one.
    pub(super) fn process_id(&self) -> Option<u32> {
        lock(&self.state).link.as_ref()?.process_id()
    }

    /// The child, started if it is not there.
    fn link(&self, progress: &mut dyn FnMut(f32)) -> Result<Arc<Link>, EngineError> {
        let _starting = lock(&self.starting);
        if let Some(link) = &lock(&self.state).link {
            return Ok(link.clone());
        }
        if self.stop.is_stopped() {
            return Err(EngineError::Stopped);
        }
        let (link, mut receiver) = Link::start(&self.program, &self.load, self.silence_floor)?;
        let link = Arc::new(link);
        self.stop.adopt(&link);
        let loaded = receiver.loaded(&link, progress)?;
        {
            let mut state = lock(&self.state);
            state.link = Some(link.clone());
            // A child that was started again reports the same, and nobody asks for it twice.
            state.loaded.get_or_insert(loaded);
        }
        let (shared, stop) = (Arc::downgrade(&self.state), self.stop.clone());
        let receive = move || {
            while let Some((frame, _)) = receiver.receive() {
                let Some(state) = shared.upgrade() else { return };
                let waiting = lock(&state).waiting.remove(&frame.header.session);
                if let Some(answer) = waiting {
                    let _ = answer.send(frame);
                }
            }
            // Dead: whoever waits hears it by the closed channel, and the next question starts a new child.
            let Some(state) = shared.upgrade() else { return };
            let link = {
                let mut state = lock(&state);
                state.waiting.clear();
                state.link.take()
            };
            // One that was told to end has not died.
            if let Some(link) = link.filter(|_| !stop.is_stopped()) {
                tracing::warn!("{}; the next text starts it again", link.died());
            }
        };
        thread::Builder::new()
            .name("engine-helper".into())
            .spawn(receive)
            .map_err(|e| EngineError::Io("a receiving thread could not be started", e))?;
        Ok(link)
    }

    /// Asks the child, or a new one if it dies over the question.
    pub(super) async fn ask(self: &Arc<Self>, mut frame: Frame) -> Result<Frame, EngineError> {
        // Two tries: the first may find a child that died in the meantime.
        for _ in 0..2 {
            let helper = self.clone();
            let started = tokio::task::spawn_blocking(move || helper.link(&mut |_| {}));
            let link = started.await.map_err(|_| EngineError::Stopped)??;
            let (sender, receiver) = oneshot::channel();
            let id = {
                let mut state = lock(&self.state);
                // A child that died since would never answer, and nobody would clear the question.
                if !state.link.as_ref().is_some_and(|current| Arc::ptr_eq(current, &link)) {
                    continue;
                }
                state.next_id += 1;
                let id = state.next_id;
                state.waiting.insert(id, sender);
                id
            };
            frame.header.session = id;
            if let Some(unsendable) = link.send(std::slice::from_ref(&frame)).pop() {
                lock(&self.state).waiting.remove(&id);
                return Err(LinkError::from(unsendable.error).into());
            }
            match receiver.await {
                Ok(answer) if answer.header.kind == Kind::StepFailed => {
                    return Err(EngineError::Child(answer.as_text()));
                }
                Ok(answer) => return Ok(answer),
                Err(_) if self.stop.is_stopped() => return Err(EngineError::Stopped),
                Err(_) => {}
            }
        }
        Err(EngineError::Child("the engine process that reads texts died twice on this one; it is given up".into()))
    }
}
