//! A stage that several drivers use, those of other machines among them.
//!
//! Every driver counts its sessions for itself. Here each gets a number of its own towards the child, and answers find the
//! way back. A driver says only what drivers may say: whatever else it sends is refused before the child sees it.
//!
//! A driver that has somebody stand by for a stage waits for the stage and not for who stands by. To the latter, hidden states may
//! come sooner than the word that opens their session: they wait for it.

use std::{
    cmp,
    collections::{HashMap, VecDeque},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
};

use murmur_gguf::{Gguf, LayerRange};
use murmur_protocol::{
    frame::{FLAG_HOLD, Frame, Header, Kind},
    stage::{Loaded, Sessions, Step},
};
use tokio::runtime::Handle;

use crate::{
    EngineError, EngineOptions, Stop,
    engine::stage_load,
    link::{Frames, Link},
};

/// Sessions that one driver may have open at a stage.
const SESSIONS_PER_GUEST_MAX: usize = 1024;
/// Hidden states of one driver that may wait for the word that opens their session: then the oldest are of no more use.
const EARLY_BYTES_MAX: usize = 16 << 20;

/// Why a frame of a driver is not passed on. The driver is of no more use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HostError {
    /// Not a driver's to say.
    #[error("a driver does not send frames of kind {0:?}")]
    Kind(Kind),
    /// More sessions than a driver may have.
    #[error("more than {SESSIONS_PER_GUEST_MAX} sessions of one driver")]
    TooManySessions,
}

/// Weight of a new measurement in the moving average.
const SMOOTHING: f64 = 0.1;
/// Rows of a frame of which the time of a prompt row is measured, at least.
const PREFILL_ROWS_MIN: u32 = 32;

/// How fast a stage is, as measured. `None`: not yet.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Speed {
    /// A step of one row, us.
    pub decode_us: Option<f64>,
    /// A row of a long prompt, us.
    pub prefill_us: Option<f64>,
}

impl Speed {
    /// Notes a batch. Those that several sessions share say nothing about one.
    fn note(&mut self, rows: u32, step: &Step) {
        let average =
            |known: &mut Option<f64>, us: f64| *known = Some(known.map_or(us, |was| was + SMOOTHING * (us - was)));
        match rows {
            _ if step.batch_rows != rows => {}
            1 => average(&mut self.decode_us, step.compute_us.into()),
            PREFILL_ROWS_MIN.. => average(&mut self.prefill_us, f64::from(step.compute_us) / f64::from(rows)),
            _ => {}
        }
    }
}

/// Takes the answers for one driver. It must not block.
type Sink = Box<dyn Fn(Frame) + Send>;

/// A layer range in a child process, for many drivers. Dropping it ends the process.
pub struct Host {
    inner: Arc<Inner>,
    file: PathBuf,
    loaded: Loaded,
}

struct Inner {
    link: Arc<Link>,
    routes: Mutex<Routes>,
    is_dead: AtomicBool,
}

#[derive(Default)]
struct Routes {
    next: u64,
    /// Drivers, by number.
    guests: HashMap<u64, Sink>,
    /// Sessions of drivers, by both their numbers.
    inward: HashMap<(u64, u64), Session>,
    /// The reverse.
    outward: HashMap<u64, (u64, u64)>,
    /// Hidden states of sessions that a driver has not opened yet, by driver.
    early: HashMap<u64, Early>,
    computed_rows: u64,
    speed: Speed,
}

#[derive(Clone, Copy)]
struct Session {
    /// What the child calls it.
    number: u64,
    epoch: u32,
    /// It stops until it is opened again.
    is_held: bool,
}

/// Frames that came too soon, the oldest first.
#[derive(Default)]
struct Early {
    frames: VecDeque<Frame>,
    bytes: usize,
}

impl Early {
    fn push(&mut self, frame: Frame) {
        self.bytes += frame.payload.len();
        self.frames.push_back(frame);
        while self.bytes > EARLY_BYTES_MAX
            && let Some(oldest) = self.frames.pop_front()
        {
            self.bytes -= oldest.payload.len();
        }
    }

    /// Takes out those of a session.
    fn take(&mut self, session: u64) -> Vec<Frame> {
        let (taken, left): (Vec<Frame>, Vec<Frame>) =
            self.frames.drain(..).partition(|frame| frame.header.session == session);
        self.frames = left.into();
        self.bytes = self.frames.iter().map(|frame| frame.payload.len()).sum();
        taken
    }
}

impl Inner {
    fn routes(&self) -> MutexGuard<'_, Routes> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Routes {
    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn of(&self, guest: u64) -> impl Iterator<Item = u64> {
        self.inward.keys().filter(move |(other, _)| *other == guest).map(|(_, session)| *session)
    }

    /// What becomes of a frame of a driver: frames as the child knows them, none if it is about a session that is over.
    fn inward(&mut self, guest: u64, mut frame: Frame) -> Result<Vec<Frame>, HostError> {
        let Header { session, epoch, .. } = frame.header;
        let key = (guest, session);
        let known = self.inward.get(&key).copied();
        let number = match frame.header.kind {
            Kind::Open => return self.open(guest, frame),
            Kind::Sessions => {
                let open = frame.decode::<Sessions>().map(|sessions| sessions.open).unwrap_or_default();
                return Ok(self.close_all_but(guest, &open));
            }
            Kind::Rewind => {
                let begin = |known: &mut Session| {
                    (known.epoch, known.is_held) = (epoch, false);
                    known.number
                };
                let number = self.inward.get_mut(&key).map(begin);
                return Ok(number.map(|number| self.with_early(guest, number, frame)).unwrap_or_default());
            }
            Kind::Hidden if known.is_none_or(|known| known.epoch < epoch) => {
                self.early.entry(guest).or_default().push(frame);
                return Ok(Vec::new());
            }
            Kind::Close if !frame.header.has(FLAG_HOLD) => {
                self.early.entry(guest).and_modify(|early| drop(early.take(session)));
                let known = self.inward.remove(&key);
                known.and_then(|known| self.outward.remove(&known.number).map(|_| known.number))
            }
            Kind::Close => {
                self.inward.entry(key).and_modify(|known| known.is_held = true);
                known.map(|known| known.number)
            }
            // The child says nothing to rows that came too late, and must not seem to owe an answer.
            Kind::Tokens | Kind::Hidden | Kind::Next | Kind::Repeat => {
                known.filter(|known| known.epoch == epoch && !known.is_held).map(|known| known.number)
            }
            kind => return Err(HostError::Kind(kind)),
        };
        let frame = number.map(|number| {
            frame.header.session = number;
            frame
        });
        Ok(frame.into_iter().collect())
    }

    /// A session begins or goes on, and with it what came too soon.
    fn open(&mut self, guest: u64, open: Frame) -> Result<Vec<Frame>, HostError> {
        let Header { session, epoch, .. } = open.header;
        let key = (guest, session);
        let number = match self.inward.get(&key) {
            Some(known) => known.number,
            None if self.of(guest).count() >= SESSIONS_PER_GUEST_MAX => return Err(HostError::TooManySessions),
            None => self.number(),
        };
        self.inward.insert(key, Session { number, epoch, is_held: false });
        self.outward.insert(number, key);
        Ok(self.with_early(guest, number, open))
    }

    /// A word that begins an epoch of a session, and what came too soon for it.
    fn with_early(&mut self, guest: u64, number: u64, begin: Frame) -> Vec<Frame> {
        let Header { session, epoch, .. } = begin.header;
        let mut frames = vec![begin];
        if let Some(early) = self.early.get_mut(&guest) {
            for frame in early.take(session) {
                match frame.header.epoch.cmp(&epoch) {
                    cmp::Ordering::Less => {}
                    cmp::Ordering::Equal => frames.push(frame),
                    cmp::Ordering::Greater => early.push(frame),
                }
            }
        }
        frames.iter_mut().for_each(|frame| frame.header.session = number);
        frames
    }

    /// Ends the sessions of a driver but these.
    fn close_all_but(&mut self, guest: u64, open: &[u64]) -> Vec<Frame> {
        let over: Vec<u64> = self.of(guest).filter(|session| !open.contains(session)).collect();
        let close = |session| Frame { header: Header::new(Kind::Close, session), payload: Vec::new() };
        over.into_iter().flat_map(|session| self.inward(guest, close(session)).unwrap_or_default()).collect()
    }

    fn outward(&mut self, mut frame: Frame) {
        if let (Kind::Done | Kind::Sampled, Ok(step)) = (frame.header.kind, frame.decode::<Step>()) {
            self.computed_rows += u64::from(frame.header.rows);
            self.speed.note(frame.header.rows, &step);
        }
        let Some(&(guest, session)) = self.outward.get(&frame.header.session) else { return };
        if let Some(sink) = self.guests.get(&guest) {
            frame.header.session = session;
            sink(frame);
        }
    }
}

impl Host {
    /// Cuts the range from the model's file if needed, starts the child and waits until it has loaded. Blocks. Of the
    /// options, `ranges` does not count. What the child says is taken in `runtime`, whose tasks hand it on.
    ///
    /// # Errors
    /// As [`crate::Engine::load`].
    pub fn load(
        options: &EngineOptions,
        range: LayerRange,
        stop: &Stop,
        runtime: &Handle,
        mut progress: impl FnMut(f32),
    ) -> Result<Host, EngineError> {
        options.check()?;
        let load = stage_load(options, &Gguf::open(&options.model)?, range)?;
        let (link, mut receiver) = Link::start(&options.program, &load, options.patience.silence_floor)?;
        let link = Arc::new(link);
        stop.adopt(&link);
        let loaded = receiver.loaded(&link, &mut progress)?;
        let frames = {
            let _entered = runtime.enter();
            receiver
                .into_frames()
                .map_err(|error| EngineError::Io("an engine process could not be listened to", error))?
        };
        let inner = Arc::new(Inner { link, routes: Mutex::default(), is_dead: AtomicBool::new(false) });
        runtime.spawn(receive(Arc::downgrade(&inner), frames));
        Ok(Host { inner, file: load.path, loaded })
    }

    /// The file that the child has loaded.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// What was loaded.
    pub fn loaded(&self) -> &Loaded {
        &self.loaded
    }

    /// Whether the child is gone. It does not come back.
    pub fn is_dead(&self) -> bool {
        self.inner.is_dead.load(Ordering::Acquire)
    }

    /// The child's process id.
    pub fn process_id(&self) -> Option<u32> {
        self.inner.link.process_id()
    }

    /// A driver comes. `sink` gets the answers to its frames, and is dropped when the child is gone.
    pub fn enter(&self, sink: impl Fn(Frame) + Send + 'static) -> Guest {
        let mut routes = self.inner.routes();
        let number = routes.number();
        // After a death nobody is left who would drop it.
        if !self.is_dead() {
            routes.guests.insert(number, Box::new(sink));
        }
        drop(routes);
        Guest { inner: self.inner.clone(), number }
    }

    /// How fast it is.
    pub fn speed(&self) -> Speed {
        self.inner.routes().speed
    }

    /// Rows that it has computed for all its drivers, those of sessions that were over by then as well.
    pub fn computed_rows(&self) -> u64 {
        self.inner.routes().computed_rows
    }

    /// Drivers that use it now.
    pub fn guests(&self) -> usize {
        self.inner.routes().guests.len()
    }
}

/// Hands on what the child says, until it is gone.
async fn receive(inner: Weak<Inner>, mut frames: Frames) {
    while let Some(frame) = frames.next().await {
        let Some(inner) = inner.upgrade() else { return };
        inner.routes().outward(frame);
    }
    let Some(inner) = inner.upgrade() else { return };
    let mut routes = inner.routes();
    inner.is_dead.store(true, Ordering::Release);
    routes.guests.clear();
}

impl Drop for Host {
    fn drop(&mut self) {
        self.inner.link.kill();
    }
}

/// A driver at a [`Host`]. Dropping it ends all its sessions there.
pub struct Guest {
    inner: Arc<Inner>,
    number: u64,
}

impl Guest {
    /// Passes a frame on to the child, without blocking. One about a session that is over goes nowhere.
    ///
    /// # Errors
    /// [`HostError`]: no driver sends this.
    pub fn send(&self, frame: Frame) -> Result<(), HostError> {
        // Under the lock, so that what two threads pass on for one session keeps its order.
        let mut routes = self.inner.routes();
        let frames = routes.inward(self.number, frame)?;
        // What cannot be sent was too large to have been received.
        self.inner.link.send(&frames);
        Ok(())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let mut routes = self.inner.routes();
        routes.guests.remove(&self.number);
        let closed = routes.close_all_but(self.number, &[]);
        routes.early.remove(&self.number);
        self.inner.link.send(&closed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GUEST: u64 = 1;

    fn frame(kind: Kind, epoch: u32) -> Frame {
        Frame { header: Header { epoch, ..Header::new(kind, 7) }, payload: Vec::new() }
    }

    /// Kinds and epochs of what the child hears of it.
    fn said(routes: &mut Routes, frame: Frame) -> Vec<(Kind, u32)> {
        let frames = routes.inward(GUEST, frame).unwrap();
        frames.into_iter().map(|frame| (frame.header.kind, frame.header.epoch)).collect()
    }

    #[test]
    fn rows_of_an_epoch_that_is_over_or_never_began_go_nowhere_and_those_that_came_too_soon_wait() {
        let mut routes = Routes::default();
        said(&mut routes, frame(Kind::Open, 3));
        for kind in [Kind::Tokens, Kind::Hidden, Kind::Next, Kind::Repeat] {
            assert_eq!(said(&mut routes, frame(kind, 3)), [(kind, 3)]);
            assert!(said(&mut routes, frame(kind, 2)).is_empty(), "{kind:?}");
            assert!(said(&mut routes, frame(kind, 4)).is_empty(), "{kind:?}");
        }
        assert_eq!(said(&mut routes, frame(Kind::Rewind, 4)), [(Kind::Rewind, 4), (Kind::Hidden, 4)]);
        assert!(said(&mut routes, frame(Kind::Hidden, 3)).is_empty());
    }

    #[test]
    fn rows_of_a_session_that_is_held_go_nowhere_until_it_is_opened_again() {
        let mut routes = Routes::default();
        said(&mut routes, frame(Kind::Open, 3));
        let mut hold = frame(Kind::Close, 4);
        hold.header.flags = FLAG_HOLD;
        assert_eq!(said(&mut routes, hold), [(Kind::Close, 4)]);
        assert!(said(&mut routes, frame(Kind::Hidden, 3)).is_empty());
        assert!(said(&mut routes, frame(Kind::Hidden, 4)).is_empty());
        assert_eq!(said(&mut routes, frame(Kind::Open, 4)), [(Kind::Open, 4), (Kind::Hidden, 4)]);
        assert_eq!(said(&mut routes, frame(Kind::Hidden, 4)), [(Kind::Hidden, 4)]);
    }
}
