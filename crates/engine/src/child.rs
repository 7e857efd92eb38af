//! The child process: one stage, vocabulary or embedding model behind a socket.
//!
//! Two threads. The reader parses frames as they arrive and puts them in the inbox; the compute thread alternates between
//! taking everything from the inbox and computing one batch. So a close (a client that left) is seen before the next
//! batch. The process ends when the socket does: a child never outlives its node.

use std::{
    collections::VecDeque,
    io::{BufReader, Write},
    os::unix::net::UnixStream,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
};

use murmur_protocol::{
    frame::{FLAG_FORGET, Frame, FrameError, HEADER_BYTES, Header, Kind},
    stage::{Load, Role, Tokenize},
};

use crate::{
    embedding::EmbeddingModel,
    ffi::{Model, ModelOptions},
    schedule::Schedule,
    stage::{Stage, StageError, Work},
};

/// A driver keeps far fewer frames in flight; more means that it does not follow the protocol.
const INBOX_FRAMES_MAX: usize = 65_536;
/// Below the owner's programs: idle time is what a node contributes.
const NICENESS: i32 = 10;

/// Why the child ended.
#[derive(Debug, thiserror::Error)]
pub enum ChildError {
    /// The socket failed or carried something else than frames.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The first frame was not `Load`.
    #[error("the parent did not begin with a load frame")]
    NoLoad,
    /// The reader found more frames than a driver may have in flight.
    #[error("more than {INBOX_FRAMES_MAX} frames are queued")]
    Flooded,
}

#[derive(Default)]
struct Inbox {
    state: Mutex<InboxState>,
    arrived: Condvar,
}

#[derive(Default)]
struct InboxState {
    frames: VecDeque<Frame>,
    ended: Option<Result<(), ChildError>>,
}

impl Inbox {
    fn lock(&self) -> MutexGuard<'_, InboxState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Frames that arrived together are delivered together: the first of eight must not start a batch of one.
    fn read_all(&self, mut input: BufReader<UnixStream>) {
        let mut arrived = VecDeque::new();
        let result = loop {
            match Frame::read_from(&mut input) {
                Ok(Some(frame)) => arrived.push_back(frame),
                Ok(None) => break Ok(()),
                Err(error) => break Err(error.into()),
            }
            if input.buffer().len() < HEADER_BYTES {
                let mut state = self.lock();
                if state.frames.len() + arrived.len() > INBOX_FRAMES_MAX {
                    break Err(ChildError::Flooded);
                }
                state.frames.append(&mut arrived);
                self.arrived.notify_one();
            }
        };
        self.lock().ended = Some(result);
        self.arrived.notify_one();
    }

    /// Everything that has arrived; waits for something if `wait`. `Err` ends the process.
    fn take(&self, wait: bool) -> Result<VecDeque<Frame>, Result<(), ChildError>> {
        let mut state = self.lock();
        loop {
            if let Some(end) = state.ended.take() {
                return Err(end);
            }
            if !wait || !state.frames.is_empty() {
                return Ok(std::mem::take(&mut state.frames));
            }
            state = self.arrived.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Serves one model part on `socket` until the parent closes it.
pub fn run(socket: UnixStream) -> Result<(), ChildError> {
    // Failing to be nice is no reason to fail.
    let _ = rustix::process::nice(NICENESS);
    let mut out = Outbox { socket: socket.try_clone().map_err(FrameError::from)?, buffer: Vec::new() };
    let mut input = BufReader::with_capacity(1 << 16, socket);
    let first = Frame::read_from(&mut input)?.filter(|f| f.header.kind == Kind::Load).ok_or(ChildError::NoLoad)?;
    let load: Load = first.decode()?;
    let server = match Server::load(&load, &mut out) {
        Ok(server) => server,
        Err(error) => {
            out.push(&Frame::text(Header::new(Kind::LoadFailed, 0), &error.to_string()))?;
            return Ok(out.flush()?);
        }
    };
    out.flush()?;
    let inbox = Arc::new(Inbox::default());
    let reader = inbox.clone();
    thread::Builder::new().name("reader".into()).spawn(move || reader.read_all(input)).map_err(FrameError::from)?;
    server.serve(&inbox, &mut out)
}

/// Frames on their way out; one write for all answers of a batch.
struct Outbox {
    socket: UnixStream,
    buffer: Vec<u8>,
}

impl Outbox {
    fn push(&mut self, frame: &Frame) -> Result<(), FrameError> {
        frame.append_to(&mut self.buffer)
    }

    fn flush(&mut self) -> Result<(), FrameError> {
        if !self.buffer.is_empty() {
            self.socket.write_all(&self.buffer)?;
            self.buffer.clear();
        }
        Ok(())
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
                // A parent that is gone is noticed by the reader.
                let _ = out.push(&frame).and_then(|()| out.flush());
            }
        };
        let (server, facts) = match load.role {
            Role::Stage { .. } => {
                let stage = Stage::load(load, &mut progress)?;
                let facts = stage.facts().clone();
                let schedule = Schedule::new(load.chunk_rows as usize * 2, load.exact);
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

    fn serve(mut self, inbox: &Inbox, out: &mut Outbox) -> Result<(), ChildError> {
        loop {
            let idle = match &self {
                Server::Stage(_, schedule) => schedule.is_empty(),
                _ => true,
            };
            match inbox.take(idle) {
                Ok(frames) => self.receive(frames, out)?,
                Err(end) => return end,
            }
            if let Server::Stage(stage, schedule) = &mut self {
                schedule.retain(|work| stage.is_current(work));
                let batch = schedule.next_batch();
                if !batch.is_empty() {
                    for answer in stage.forward(&batch) {
                        out.push(&answer)?;
                    }
                }
            }
            out.flush()?;
        }
    }

    fn receive(&mut self, frames: VecDeque<Frame>, out: &mut Outbox) -> Result<(), ChildError> {
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
        Kind::Close => {
            stage.close(header.session, header.has(FLAG_FORGET));
            Ok(None)
        }
        Kind::Tokens | Kind::Hidden => {
            if let Some(work) = stage.accept(frame)? {
                schedule.push(work);
            }
            Ok(None)
        }
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

fn tokenize(model: &Model, frame: &Frame) -> Result<Frame, StageError> {
    if frame.header.kind != Kind::Tokenize {
        return Err(StageError::Protocol("a vocabulary only tokenises"));
    }
    let request: Tokenize = frame.decode()?;
    let tokens = model.tokenize(&request.text, request.add_special, request.parse_special)?;
    Ok(Frame::tokens(Header { kind: Kind::Tokenized, ..frame.header }, &tokens))
}
