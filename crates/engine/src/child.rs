//! The child process: one stage, vocabulary or embedding model behind a socket.
//!
//! One thread, that alternates between taking everything from the socket and computing one batch. So a close (a client
//! that left) is seen before the next batch; what arrives during one waits in the socket, or with the sender. The process
//! ends when the socket does: a child never outlives its node by more than a batch. A second thread says that the process is there as
//! long as the first is at work.

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, Thread},
    time::{Duration, Instant},
};

use murmur_protocol::{
    frame::{FLAG_FORGET, FLAG_HOLD, Frame, FrameError, Header, Kind},
    stage::{Load, Role},
};
use rustix::net::RecvFlags;

use crate::{
    embedding::EmbeddingModel,
    ffi::{Model, ModelOptions},
    schedule::{Limits, Schedule},
    stage::{Stage, StageError, Work},
    vocabulary::tokenize,
};

/// Below the owner's programs: idle time is what a node contributes.
const NICENESS: i32 = 10;
/// After an answer of a whole model the driver's next frame comes within this, mostly. Sleeping and being woken takes as long, so the
/// thread looks at the socket this long before it sleeps. After an answer of one stage of several, others compute first.
const PATIENCE: Duration = Duration::from_micros(150);
/// How often a child says that it is there while it is at work.
pub(crate) const ALIVE_EVERY: Duration = Duration::from_millis(500);
/// Bytes read at once.
const READ_BYTES: usize = 1 << 16;

/// Why the child ended.
#[derive(Debug, thiserror::Error)]
pub enum ChildError {
    /// The socket failed or carried something else than frames.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The first frame was not `Load`.
    #[error("the parent did not begin with a load frame")]
    NoLoad,
}

/// Frames as they arrive.
struct Inbox {
    socket: UnixStream,
    bytes: Vec<u8>,
    chunk: Vec<u8>,
    /// How long it looks for a frame before it sleeps.
    patience: Duration,
}

impl Inbox {
    fn new(socket: UnixStream) -> Inbox {
        Inbox { socket, bytes: Vec::new(), chunk: vec![0; READ_BYTES], patience: Duration::ZERO }
    }

    /// Every frame that has arrived; waits for one if `wait`. `None`: the parent has closed the socket.
    fn take(&mut self, wait: bool) -> Result<Option<Vec<Frame>>, ChildError> {
        let impatient = Instant::now() + self.patience;
        let mut frames = Vec::new();
        loop {
            let arrived = loop {
                match rustix::net::recv(&self.socket, &mut self.chunk[..], RecvFlags::DONTWAIT) {
                    Ok((n, _)) => break Some(n),
                    Err(rustix::io::Errno::INTR) => {}
                    Err(rustix::io::Errno::AGAIN) => break None,
                    Err(error) => return Err(FrameError::Io(error.into()).into()),
                }
            };
            match arrived {
                Some(0) => return Ok(None),
                Some(n) => self.bytes.extend_from_slice(&self.chunk[..n]),
                None if !wait || !frames.is_empty() => return Ok(Some(frames)),
                None if Instant::now() < impatient => std::hint::spin_loop(),
                None => {
                    let n = match self.socket.read(&mut self.chunk) {
                        Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                        read => read.map_err(FrameError::from)?,
                    };
                    if n == 0 {
                        return Ok(None);
                    }
                    self.bytes.extend_from_slice(&self.chunk[..n]);
                }
            }
            let mut taken = 0;
            while let Some((frame, length)) = Frame::parse(&self.bytes[taken..])? {
                frames.push(frame);
                taken += length;
            }
            self.bytes.drain(..taken);
        }
    }
}

/// Serves one model part on `socket` until the parent closes it.
pub fn run(socket: UnixStream) -> Result<(), ChildError> {
    // Failing to be nice is no reason to fail.
    let _ = rustix::process::nice(NICENESS);
    let mut out = Outbox::new(socket.try_clone().map_err(FrameError::from)?);
    let pulse = Pulse::start(out.socket.clone()).map_err(FrameError::from)?;
    let mut inbox = Inbox::new(socket);
    let Some(mut frames) = inbox.take(true)? else { return Ok(()) };
    let first = frames.drain(..1).next().filter(|f| f.header.kind == Kind::Load).ok_or(ChildError::NoLoad)?;
    let load: Load = first.decode()?;
    if load.role == (Role::Stage { first: true, last: true }) {
        inbox.patience = PATIENCE;
    }
    let mut server = match Server::load(&load, &mut out) {
        Ok(server) => server,
        Err(error) => {
            out.push(&Frame::text(Header::new(Kind::LoadFailed, 0), &error.to_string()))?;
            return Ok(out.flush()?);
        }
    };
    server.receive(frames, &mut out)?;
    out.flush()?;
    server.serve(&mut inbox, &mut out, &pulse)
}

/// Frames on their way out; one write for all answers of a batch.
struct Outbox {
    socket: Arc<Mutex<UnixStream>>,
    buffer: Vec<u8>,
}

impl Outbox {
    fn new(socket: UnixStream) -> Outbox {
        Outbox { socket: Arc::new(Mutex::new(socket)), buffer: Vec::new() }
    }

    fn push(&mut self, frame: &Frame) -> Result<(), FrameError> {
        frame.append_to(&mut self.buffer)
    }

    fn flush(&mut self) -> Result<(), FrameError> {
        if !self.buffer.is_empty() {
            lock(&self.socket).write_all(&self.buffer)?;
            self.buffer.clear();
        }
        Ok(())
    }
}

fn lock(socket: &Mutex<UnixStream>) -> MutexGuard<'_, UnixStream> {
    socket.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Says [`Kind::Alive`] every [`ALIVE_EVERY`] while there is work, however long that takes: a process that is stopped, or that the system
/// does not let run, cannot. While there is none it sleeps, and says nothing.
struct Pulse {
    state: Arc<PulseState>,
    thread: Thread,
}

struct PulseState {
    is_working: AtomicBool,
    is_asleep: AtomicBool,
}

impl Pulse {
    /// Begins at work: a child loads first.
    fn start(socket: Arc<Mutex<UnixStream>>) -> io::Result<Pulse> {
        let state = Arc::new(PulseState { is_working: AtomicBool::new(true), is_asleep: AtomicBool::new(false) });
        let seen = state.clone();
        let thread = thread::Builder::new().name("pulse".into()).spawn(move || seen.beat(&socket))?;
        Ok(Pulse { state, thread: thread.thread().clone() })
    }

    fn works(&self) {
        self.state.is_working.store(true, Ordering::SeqCst);
        if self.state.is_asleep.swap(false, Ordering::SeqCst) {
            self.thread.unpark();
        }
    }

    fn rests(&self) {
        self.state.is_working.store(false, Ordering::SeqCst);
    }
}

impl PulseState {
    /// Until the parent is gone.
    fn beat(&self, socket: &Mutex<UnixStream>) {
        let mut alive = Vec::new();
        let frame = Frame { header: Header::new(Kind::Alive, 0), payload: Vec::new() };
        if frame.append_to(&mut alive).is_err() {
            return;
        }
        loop {
            thread::sleep(ALIVE_EVERY);
            if self.is_working.load(Ordering::SeqCst) {
                if lock(socket).write_all(&alive).is_err() {
                    return;
                }
                continue;
            }
            self.is_asleep.store(true, Ordering::SeqCst);
            // What begins from now on wakes this thread.
            if !self.is_working.load(Ordering::SeqCst) {
                thread::park();
            }
            self.is_asleep.store(false, Ordering::SeqCst);
        }
    }
}

enum Server {
    Stage(Box<Stage>, Schedule<Work>),
    Vocabulary(Model),
    Embedding(EmbeddingModel),
}

impl Server {
    fn load(load: &Load, out: &mut Outbox) -> Result<Server, StageError> {
        let mut reported = -1.0;
        let mut progress = |fraction: f32| {
            if fraction - reported >= 0.01 || fraction >= 1.0 {
                reported = fraction;
                let frame = Frame { header: Header::new(Kind::Progress, 0), payload: fraction.to_le_bytes().to_vec() };
                // A parent that is gone needs no model.
                return out.push(&frame).and_then(|()| out.flush()).is_ok();
            }
            true
        };
        let (server, facts) = match load.role {
            Role::Stage { .. } => {
                let stage = Stage::load(load, &mut progress)?;
                let facts = stage.facts().clone();
                let schedule = Schedule::new(Limits::new(stage.batch_rows(), load.exact));
                (Server::Stage(Box::new(stage), schedule), facts)
            }
            Role::Vocabulary => {
                let options = ModelOptions { vocabulary_only: true, repack: false, gpu_layers: 0 };
                let model = Model::load(&load.path, &options, &mut progress)?;
                let facts = murmur_protocol::stage::Loaded {
                    n_embd: 0,
                    n_layer: 0,
                    kv_cells: 0,
                    load_ms: 0,
                    weight_bytes: 0,
                    vocabulary: Some(model.vocabulary()),
                };
                (Server::Vocabulary(model), facts)
            }
            Role::Embedding => {
                let model = EmbeddingModel::load(load, &mut progress)?;
                let facts = model.facts();
                (Server::Embedding(model), facts)
            }
        };
        out.push(&Frame::message(Header::new(Kind::Loaded, 0), &facts)?)?;
        Ok(server)
    }

    fn serve(&mut self, inbox: &mut Inbox, out: &mut Outbox, pulse: &Pulse) -> Result<(), ChildError> {
        loop {
            let idle = match self {
                Server::Stage(stage, schedule) if schedule.is_empty() => {
                    // Whoever asks must have an answer: a child that owes one and is silent is taken to hang.
                    stage.unfollowed().iter().try_for_each(|answer| out.push(answer))?;
                    out.flush()?;
                    true
                }
                Server::Stage(..) => false,
                Server::Vocabulary(_) | Server::Embedding(_) => true,
            };
            if idle {
                pulse.rests();
            }
            let Some(frames) = inbox.take(idle)? else { return Ok(()) };
            pulse.works();
            self.receive(frames, out)?;
            if let Server::Stage(stage, schedule) = self {
                schedule.retain(|work| stage.is_current(work));
                let batch = schedule.next_batch(|waiting| stage.joins(waiting));
                if !batch.is_empty() {
                    // Whoever was admitted can send its rows meanwhile.
                    out.flush()?;
                    for answer in stage.forward(&batch) {
                        out.push(&answer)?;
                    }
                    stage.following().into_iter().for_each(|work| schedule.push(work));
                }
            }
            out.flush()?;
        }
    }

    fn receive(&mut self, frames: Vec<Frame>, out: &mut Outbox) -> Result<(), ChildError> {
        for frame in frames {
            let answer = match self {
                Server::Stage(stage, schedule) => receive_stage(stage, schedule, &frame),
                Server::Vocabulary(model) => tokenize(model, &frame).map(Some),
                Server::Embedding(model) => model.embed(&frame).map(Some),
            };
            match answer {
                Ok(None) => {}
                Ok(Some(answer)) => out.push(&answer)?,
                Err(error) => {
                    out.push(&Frame::text(Header { kind: Kind::StepFailed, ..frame.header }, &error.to_string()))?;
                }
            }
        }
        Ok(())
    }
}

fn receive_stage(stage: &mut Stage, schedule: &mut Schedule<Work>, frame: &Frame) -> Result<Option<Frame>, StageError> {
    let header = frame.header;
    match header.kind {
        Kind::Open => {
            let answer = match stage.open(&header, &frame.decode()?) {
                Ok(opened) => Frame::message(Header { kind: Kind::Opened, ..header }, &opened)?,
                Err(refused) => Frame::message(Header { kind: Kind::NotOpened, ..header }, &refused)?,
            };
            Ok(Some(answer))
        }
        Kind::Close if !header.has(FLAG_HOLD) => {
            stage.close(header.session, header.has(FLAG_FORGET));
            Ok(None)
        }
        Kind::Close | Kind::Rewind => {
            stage.hold(&header);
            Ok(None)
        }
        Kind::Tokens | Kind::Hidden | Kind::Next => {
            if let Some(work) = stage.accept(frame)? {
                schedule.push(work);
            }
            Ok(None)
        }
        Kind::Repeat => stage.repeat(&header),
        Kind::SaveState => {
            let payload = stage.save(header.session)?;
            Ok(Some(Frame { header: Header { kind: Kind::State, ..header }, payload }))
        }
        Kind::State => {
            // Rows x token ids, then the opaque state.
            let ids = header.rows as usize * 4;
            let (tokens, state) =
                frame.payload.split_at_checked(ids).ok_or(StageError::Protocol("a state shorter than its tokens"))?;
            stage.restore(header.session, &bytemuck::pod_collect_to_vec(tokens), state)?;
            Ok(Some(Frame {
                header: Header { kind: Kind::Restored, position: header.rows, ..header },
                payload: Vec::new(),
            }))
        }
        _ => Err(StageError::Protocol("a stage does not take this kind of frame")),
    }
}
