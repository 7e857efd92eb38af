//! A model over hosts in this process, each found by whoever carries the frames.

use std::{
    path::Path,
    sync::{
        Arc, LazyLock, Mutex, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use murmur_engine::{
    Connection, Draft, Engine, EngineOptions, FarEnd, Guest, Host, PeerDraft, RemoteStage, Stop, connection,
};
use murmur_gguf::{LayerRange, even_cuts};
use murmur_protocol::frame::{Frame, Header, Kind};
use tokio::runtime::Runtime;

use super::{Lab, kill, until};

/// In which what children of hosts say is taken.
static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Runtime::new().unwrap());

/// How a driver loses a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// The stage goes on, and keeps what it holds.
    Connection,
    /// It dies.
    Process,
}

/// Who holds a range: a host in this process, another one once it is dead.
pub struct Holder {
    load: Box<dyn Fn() -> Host + Send + Sync>,
    host: Mutex<Option<Arc<Host>>>,
    /// Hidden states from the stage before it do not arrive: they are on their way until they may.
    pub is_cut_off: AtomicBool,
    /// It is looked for in vain.
    pub is_gone: AtomicBool,
    /// What ends its connections, the last first: each time in the middle of a rewind.
    pub cuts: Mutex<Vec<Cut>>,
    /// What has arrived.
    arrived: Mutex<Vec<Kind>>,
    /// Rows that it could not compute, in frames.
    failed_steps: AtomicUsize,
}

impl Holder {
    fn new(lab: &Lab, model: &Path, range: LayerRange) -> Arc<Holder> {
        let options = lab.options(model, vec![range], true);
        let load = Box::new(move || Host::load(&options, range, &Stop::new(), RUNTIME.handle(), |_| {}).unwrap());
        Arc::new(Holder {
            load,
            host: Mutex::default(),
            is_cut_off: AtomicBool::default(),
            is_gone: AtomicBool::default(),
            cuts: Mutex::default(),
            arrived: Mutex::default(),
            failed_steps: AtomicUsize::default(),
        })
    }

    pub fn host(&self) -> Arc<Host> {
        let mut host = self.host.lock().unwrap();
        if host.as_ref().is_none_or(|host| host.is_dead()) {
            *host = Some(Arc::new((self.load)()));
        }
        host.clone().unwrap()
    }

    /// Frames of this kind that have arrived so far.
    pub fn arrived(&self, kind: Kind) -> usize {
        self.arrived.lock().unwrap().iter().filter(|arrived| **arrived == kind).count()
    }

    /// What ends the connection behind a frame of this kind.
    fn cut_by(&self, kind: Kind) -> Option<Cut> {
        if kind == Kind::Rewind { self.cuts.lock().unwrap().pop() } else { None }
    }

    fn take(&self, guest: &Guest, frame: Frame) {
        let kind = frame.header.kind;
        if kind == Kind::Hidden {
            until("hidden states arrive", || (!self.is_cut_off.load(Ordering::Relaxed)).then_some(()));
        }
        guest.send(frame).unwrap();
        self.arrived.lock().unwrap().push(kind);
    }
}

/// A stage of one driver's ring.
struct Seat {
    holder: Arc<Holder>,
    /// The next stage's host and the driver there, for hidden states that go there straight away.
    next: Option<(Arc<Holder>, Arc<Place>)>,
    place: Arc<Place>,
    /// How long frames are on their way, to it and from it: see [`Way`].
    delay: Duration,
    /// By which chance.
    seed: u64,
    /// What becomes of the answers.
    twist: Twist,
}

/// When the frames of a connection are there, in the order in which they left. Each is on its way for `most` at most and half of that at
/// least, as chance has it, which has it the same in each run.
struct Way {
    most: Duration,
    chance: u64,
}

impl Way {
    /// `seed` is not 0.
    fn new(most: Duration, seed: u64) -> Way {
        Way { most, chance: seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) }
    }

    /// Returns when the next frame is there, which left at `left`.
    fn wait(&mut self, left: Instant) {
        // Xorshift (Marsaglia 2003).
        self.chance ^= self.chance << 13;
        self.chance ^= self.chance >> 7;
        self.chance ^= self.chance << 17;
        let part = 0.5 + 0.5 * ((self.chance >> 11) as f64 / (1u64 << 53) as f64);
        thread::sleep((left + self.most.mul_f64(part)).saturating_duration_since(Instant::now()));
    }
}

/// What becomes of a frame.
pub type Twist = fn(Frame) -> Frame;

/// A model that guesses on a machine of its own, with frames up to `delay` on their way to it and from it, and what it says twisted. So
/// much of it is made wrong.
pub fn guesser(lab: &Lab, model: &Path, delay: Duration, twist: Twist, spoilt: f64) -> (Arc<Holder>, Draft) {
    let layers = murmur_gguf::Gguf::open(model).unwrap().layer_count().unwrap();
    let holder = Holder::new(lab, model, LayerRange::new(0, layers));
    let seat = Seat { holder: holder.clone(), next: None, place: Arc::default(), delay, seed: 64, twist };
    (holder, Draft::Peer(PeerDraft { stage: Arc::new(seat), spoilt }))
}

/// A driver at a host, while there is one.
type Place = Mutex<Weak<Guest>>;

impl RemoteStage for Seat {
    fn connect(&self, stop: &Stop) -> Result<Connection, String> {
        while self.holder.is_gone.load(Ordering::Relaxed) {
            if stop.is_stopped() {
                return Err("it is gone".to_owned());
            }
            thread::sleep(Duration::from_millis(10));
        }
        let (engines, FarEnd { mut questions, answers }) = connection();
        let host = self.holder.host();
        let (answer, answered) = mpsc::channel::<(Instant, Frame)>();
        let guest = Arc::new(host.enter(move |frame| drop(answer.send((Instant::now(), frame)))));
        *self.place.lock().unwrap() = Arc::downgrade(&guest);
        let is_cut = Arc::<AtomicBool>::default();
        let (next, twist, was_cut, answering) = (self.next.clone(), self.twist, is_cut.clone(), self.holder.clone());
        let (mut way, mut way_back) = (Way::new(self.delay, 2 * self.seed), Way::new(self.delay, 2 * self.seed + 1));
        let loaded = Frame::message(Header::new(Kind::Loaded, 0), host.loaded()).unwrap();
        thread::spawn(move || {
            answers.give([loaded]);
            while let Ok((left, frame)) = answered.recv() {
                way_back.wait(left);
                if was_cut.load(Ordering::Relaxed) {
                    continue;
                }
                if frame.header.kind == Kind::StepFailed {
                    answering.failed_steps.fetch_add(1, Ordering::Relaxed);
                }
                let next = next.as_ref().and_then(|(holder, place)| Some((holder, place.lock().unwrap().upgrade()?)));
                if let (Kind::Hidden, Some((holder, guest))) = (frame.header.kind, next) {
                    holder.take(&guest, frame);
                    continue;
                }
                answers.give([twist(frame)]);
            }
        });
        let (sent, on_its_way) = mpsc::channel::<(Instant, Frame)>();
        thread::spawn(move || {
            while let Some(frame) = questions.blocking_recv() {
                if sent.send((Instant::now(), frame)).is_err() {
                    return;
                }
            }
        });
        let (holder, host) = (self.holder.clone(), Arc::downgrade(&host));
        thread::spawn(move || {
            while let Ok((left, frame)) = on_its_way.recv() {
                way.wait(left);
                let cut = holder.cut_by(frame.header.kind);
                // Nothing that it says from now on arrives, nor what is on its way.
                is_cut.store(cut.is_some(), Ordering::Relaxed);
                holder.take(&guest, frame);
                if let Some(cut) = cut {
                    if cut == Cut::Process
                        && let Some(host) = host.upgrade()
                    {
                        kill(host.process_id().unwrap());
                        until("the host is dead", || host.is_dead().then_some(()));
                    }
                    return;
                }
            }
        });
        Ok(engines)
    }

    fn lost_because(&self) -> String {
        "the host is dead".to_owned()
    }
}

/// Holders of all ranges of a model.
pub struct Spread<'a> {
    lab: &'a Lab,
    model: &'a Path,
    ranges: Vec<LayerRange>,
    pub holders: Vec<Arc<Holder>>,
}

impl<'a> Spread<'a> {
    pub fn new(lab: &'a Lab, model: &'a Path, stages: u32) -> Self {
        let ranges = even_cuts(&murmur_gguf::Gguf::open(model).unwrap(), stages).unwrap();
        let holders = ranges.iter().map(|&range| Holder::new(lab, model, range)).collect();
        Spread { lab, model, ranges, holders }
    }

    /// How often rows could not be computed. A driver that guesses does without guesses then, and nobody else would know.
    pub fn failed_steps(&self) -> usize {
        self.holders.iter().map(|holder| holder.failed_steps.load(Ordering::Relaxed)).sum()
    }

    /// A driver of its own, to which all answers come back.
    pub fn engine(&self) -> Engine {
        self.engine_with(false)
    }

    /// A driver of its own. With `hops`, hidden states go from host to host.
    pub fn engine_with(&self, hops: bool) -> Engine {
        self.engine_far(hops, Duration::ZERO, Draft::Off)
    }

    /// The same, with frames up to `delay` on their way to each host and from it, and guesses.
    pub fn engine_far(&self, hops: bool, delay: Duration, draft: Draft) -> Engine {
        let places: Vec<Arc<Place>> = self.holders.iter().map(|_| Arc::default()).collect();
        let seat = |(at, holder): (usize, &Arc<Holder>)| {
            let next = self.holders.get(at + 1).cloned().zip(places.get(at + 1).cloned()).filter(|_| hops);
            let place = places[at].clone();
            let seed = at as u64 + 1;
            let seat = Seat { holder: holder.clone(), next, place, delay, seed, twist: |frame| frame };
            Some(Arc::new(seat) as Arc<dyn RemoteStage>)
        };
        let stages: Vec<_> = self.holders.iter().enumerate().map(seat).collect();
        // As over a long way, so that guesses are made whatever they cost here.
        let travel_us = if draft == Draft::Off { 0 } else { 1_000_000 };
        let options = EngineOptions { draft, travel_us, ..self.lab.options(self.model, self.ranges.clone(), true) };
        Engine::load_spread(options, &stages, Stop::new(), |_, _| {}).unwrap()
    }
}
