//! A model over hosts in this process, each found by whoever carries the frames.

use std::{
    path::Path,
    sync::{
        Arc, LazyLock, Mutex, Weak,
        atomic::{AtomicBool, Ordering},
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

use super::{Lab, until};

/// In which what children of hosts say is taken.
static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Runtime::new().unwrap());

/// Who holds a range: a host in this process, another one once it is dead.
pub struct Holder {
    load: Box<dyn Fn() -> Host + Send + Sync>,
    host: Mutex<Option<Arc<Host>>>,
    /// Hidden states from the stage before it do not arrive: they are on their way until they may.
    pub is_cut_off: AtomicBool,
    /// It is looked for in vain.
    pub is_gone: AtomicBool,
    /// What has arrived.
    arrived: Mutex<Vec<Kind>>,
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
            arrived: Mutex::default(),
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
    /// How long frames from the driver are on their way.
    delay: Duration,
    /// What becomes of the answers.
    twist: Twist,
}

/// What becomes of a frame.
pub type Twist = fn(Frame) -> Frame;

/// A model that guesses on a machine of its own, with frames to it `delay` on their way, and what it says twisted. So much of it is made
/// wrong.
pub fn guesser(lab: &Lab, model: &Path, delay: Duration, twist: Twist, spoilt: f64) -> (Arc<Holder>, Draft) {
    let layers = murmur_gguf::Gguf::open(model).unwrap().layer_count().unwrap();
    let holder = Holder::new(lab, model, LayerRange::new(0, layers));
    let seat = Seat { holder: holder.clone(), next: None, place: Arc::default(), delay, twist };
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
        let (answer, answered) = mpsc::channel::<Frame>();
        let guest = Arc::new(host.enter(move |frame| drop(answer.send(frame))));
        *self.place.lock().unwrap() = Arc::downgrade(&guest);
        let (next, twist) = (self.next.clone(), self.twist);
        let loaded = Frame::message(Header::new(Kind::Loaded, 0), host.loaded()).unwrap();
        thread::spawn(move || {
            answers.give([loaded]);
            while let Ok(frame) = answered.recv() {
                let next = next.as_ref().and_then(|(holder, place)| Some((holder, place.lock().unwrap().upgrade()?)));
                if let (Kind::Hidden, Some((holder, guest))) = (frame.header.kind, next) {
                    holder.take(&guest, frame);
                    continue;
                }
                answers.give([twist(frame)]);
            }
        });
        let (sent, on_its_way) = mpsc::channel::<(Instant, Frame)>();
        let (delay, holder) = (self.delay, self.holder.clone());
        thread::spawn(move || {
            while let Some(frame) = questions.blocking_recv() {
                sent.send((Instant::now() + delay, frame)).unwrap();
            }
        });
        thread::spawn(move || {
            while let Ok((due, frame)) = on_its_way.recv() {
                thread::sleep(due.saturating_duration_since(Instant::now()));
                holder.take(&guest, frame);
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

    /// A driver of its own, to which all answers come back.
    pub fn engine(&self) -> Engine {
        self.engine_with(false)
    }

    /// A driver of its own. With `hops`, hidden states go from host to host.
    pub fn engine_with(&self, hops: bool) -> Engine {
        self.engine_far(hops, Duration::ZERO, Draft::Off)
    }

    /// The same, with frames to each host `delay` on their way, and guesses.
    pub fn engine_far(&self, hops: bool, delay: Duration, draft: Draft) -> Engine {
        let places: Vec<Arc<Place>> = self.holders.iter().map(|_| Arc::default()).collect();
        let seat = |(at, holder): (usize, &Arc<Holder>)| {
            let next = self.holders.get(at + 1).cloned().zip(places.get(at + 1).cloned()).filter(|_| hops);
            let place = places[at].clone();
            let seat = Seat { holder: holder.clone(), next, place, delay, twist: |frame| frame };
            Some(Arc::new(seat) as Arc<dyn RemoteStage>)
        };
        let stages: Vec<_> = self.holders.iter().enumerate().map(seat).collect();
        // As over a long way, so that guesses are made whatever they cost here.
        let travel_us = if draft == Draft::Off { 0 } else { 1_000_000 };
        let options = EngineOptions { draft, travel_us, ..self.lab.options(self.model, self.ranges.clone(), true) };
        Engine::load_spread(options, &stages, Stop::new(), |_, _| {}).unwrap()
    }
}
