//! One model on this machine: its child processes, kept alive, and the sessions that run on them.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use murmur_gguf::{Arch, Gguf, HiddenInput, LayerRange};
use murmur_protocol::{
    frame::{Frame, Header, Kind},
    sampling::Token,
    stage::{Load, Loaded, Role, Step, Tokenize},
};
use murmur_sampling::Vocabulary;
use tokio::sync::{mpsc, oneshot};

use crate::{
    driver::{Counters, Driver, DriverOptions, EVENTS_MAX, QueueFull, SessionEvent, SessionRequest},
    link::{Link, LinkError, Receiver},
    vocabulary,
};

/// A stage that cannot be loaded this often in a row is given up.
const RELOADS_MAX: u32 = 5;
/// Wait before the second reload; doubled each time.
const RELOAD_PAUSE: Duration = Duration::from_millis(100);
/// A stage that dies sooner than this after loading counts as one that could not be loaded.
const PROVEN_AFTER: Duration = Duration::from_secs(2);
/// Most KV cells of a stage: llama.cpp counts them in 32 bits and rounds up.
const KV_CELLS_MAX: u32 = 1 << 30;

/// What to run and how.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// The binary whose hidden subcommand is the child process.
    pub program: PathBuf,
    /// The GGUF file.
    pub model: PathBuf,
    /// Where slices of the file are kept.
    pub slices_dir: PathBuf,
    /// A pooling model instead of a generating one.
    pub embedding: bool,
    /// Layer ranges, in order; one range of all layers is the whole file.
    pub ranges: Vec<LayerRange>,
    /// Tokens per request at most.
    pub context_tokens: u32,
    /// Requests of full length that fit the KV cache at once.
    pub parallel: u32,
    /// Requests that may wait.
    pub queue_max: usize,
    /// Prompt rows per chunk.
    pub chunk_rows: u32,
    /// Threads per stage, or `None` to measure.
    pub threads: Option<u32>,
    /// Bit-equal results whatever shares a batch.
    pub exact: bool,
    /// Layers on a GPU.
    pub gpu_layers: i32,
}

/// Why a model cannot run.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The file is not what it should be.
    #[error(transparent)]
    Gguf(#[from] murmur_gguf::GgufError),
    /// The layers cannot be cut as asked.
    #[error(transparent)]
    Slice(#[from] murmur_gguf::SliceError),
    /// A child process could not be had.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The file's vocabulary is unusable.
    #[error(transparent)]
    Vocabulary(#[from] murmur_sampling::VocabularyError),
    /// The system refused a thread or a file.
    #[error("{0}: {1}")]
    Io(&'static str, #[source] std::io::Error),
    /// The engine process answered with an error.
    #[error("{0}")]
    Child(String),
    /// The engine is shutting down.
    #[error("the engine is shutting down")]
    Stopped,
}

/// Why a session did not begin.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum StartError {
    /// As many requests wait as may.
    #[error("{0} requests are waiting already")]
    QueueFull(usize),
    /// The prompt is empty, or prompt and answer together are longer than the context.
    #[error("a session has at least one prompt token, and with its answer at most {context_tokens}")]
    WrongLength {
        /// The context.
        context_tokens: u32,
    },
    /// An embedding model generates nothing.
    #[error("this model gives embeddings, not text")]
    NoStages,
}

/// A look at the engine.
#[derive(Debug, Clone)]
pub struct EngineStatus {
    /// Stage by stage: layers, process id, up or not.
    pub stages: Vec<StageStatus>,
    /// Sessions running.
    pub running: usize,
    /// Sessions waiting.
    pub queued: usize,
    /// Since the start.
    pub counters: Counters,
    /// The last stage's newest step.
    pub last_step: Option<Step>,
}

/// A look at one stage.
#[derive(Debug, Clone)]
pub struct StageStatus {
    /// Its layers.
    pub range: LayerRange,
    /// Its process.
    pub process_id: Option<u32>,
    /// Loaded.
    pub loaded: Option<Loaded>,
    /// How often it was restarted.
    pub restarts: u32,
}

/// A model with its processes. Dropping it ends them.
pub struct Engine {
    shared: Arc<Shared>,
    helper: Arc<Helper>,
    vocabulary: Arc<Vocabulary>,
    options: EngineOptions,
    threads: Vec<thread::JoinHandle<()>>,
}

struct Shared {
    driver: Mutex<Driver>,
    stages: Vec<StageCell>,
    stopping: AtomicBool,
}

struct StageCell {
    load: Load,
    range: LayerRange,
    state: Mutex<StageState>,
}

#[derive(Default)]
struct StageState {
    link: Option<Arc<Link>>,
    loaded: Option<Loaded>,
    restarts: u32,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Changes the driver's state and sends what comes out. Sending never blocks, and happens under the lock so that
    /// frames leave in the order the driver made them.
    fn drive<T>(&self, change: impl FnOnce(&mut Driver) -> T) -> T {
        let mut driver = lock(&self.driver);
        let result = change(&mut driver);
        self.flush(&mut driver);
        result
    }

    fn flush(&self, driver: &mut Driver) {
        let mut by_stage: Vec<Vec<Frame>> = vec![Vec::new(); self.stages.len()];
        for (stage, frame) in driver.take_output() {
            if let Some(frames) = by_stage.get_mut(stage) {
                frames.push(frame);
            }
        }
        for (cell, frames) in self.stages.iter().zip(by_stage).filter(|(_, frames)| !frames.is_empty()) {
            if let Some(link) = &lock(&cell.state).link
                && let Err(error) = link.send(&frames)
            {
                tracing::error!(%error, "a frame could not be sent to an engine process");
            }
        }
    }
}

type Progress = Arc<dyn Fn(usize, f32) + Send + Sync>;

impl Engine {
    /// Cuts the file if needed, starts the child processes and waits until they are loaded. Blocks; `progress` hears
    /// (stage, fraction).
    pub fn load(
        options: EngineOptions,
        progress: impl Fn(usize, f32) + Send + Sync + 'static,
    ) -> Result<Engine, EngineError> {
        let progress: Progress = Arc::new(progress);
        let gguf = Gguf::open(&options.model)?;
        let helper = Arc::new(Helper::new(&options)?);
        let facts = helper.vocabulary_facts()?;
        let end_of_generation = facts.end_of_generation.clone();
        let vocabulary = Arc::new(vocabulary::from_facts(facts)?);
        let stages = if options.embedding { Vec::new() } else { stage_cells(&options, &gguf)? };
        let driver = Driver::new(DriverOptions {
            stages: stages.len(),
            chunk_rows: options.chunk_rows,
            exact: options.exact,
            queue_max: options.queue_max,
            end_of_generation,
        });
        let shared = Arc::new(Shared { driver: Mutex::new(driver), stages, stopping: AtomicBool::new(false) });
        let mut engine = Engine { shared, helper, vocabulary, options, threads: Vec::new() };
        for stage in 0..engine.shared.stages.len() {
            let (link, receiver, loaded) = spawn(&engine.options.program, &engine.shared, stage, &progress)?;
            install(&engine.shared, stage, link.clone(), loaded);
            let (shared, program) = (engine.shared.clone(), engine.options.program.clone());
            let supervisor = thread::Builder::new()
                .name(format!("stage-{stage}"))
                .spawn(move || supervise(&program, &shared, stage, receiver))
                .map_err(|e| EngineError::Io("a supervising thread could not be started", e))?;
            engine.threads.push(supervisor);
        }
        Ok(engine)
    }

    /// The model's vocabulary.
    pub fn vocabulary(&self) -> &Arc<Vocabulary> {
        &self.vocabulary
    }

    /// What it runs.
    pub fn options(&self) -> &EngineOptions {
        &self.options
    }

    /// Text to tokens. `add_special`: with what the model wants at the start; `parse_special`: control tokens written in
    /// the text are read as such.
    pub async fn tokenize(
        &self,
        text: &str,
        add_special: bool,
        parse_special: bool,
    ) -> Result<Vec<Token>, EngineError> {
        let request = Tokenize { text: text.to_owned(), add_special, parse_special };
        let frame = Frame::message(Header::new(Kind::Tokenize, 0), &request).map_err(LinkError::from)?;
        let answer = self.helper.ask(frame).await?;
        Ok(answer.token_rows().map_err(LinkError::from)?)
    }

    /// A unit-length embedding of tokens; only for pooling models.
    pub async fn embed(&self, tokens: &[Token]) -> Result<Vec<f32>, EngineError> {
        let answer = self.helper.ask(Frame::tokens(Header::new(Kind::Embed, 0), tokens)).await?;
        Ok(bytemuck::pod_collect_to_vec(&answer.payload))
    }

    /// Begins a session, or queues it.
    pub fn start(&self, request: SessionRequest) -> Result<SessionStream, StartError> {
        let room = self.options.context_tokens as usize;
        if request.prompt.is_empty() || request.prompt.len() + request.max_tokens as usize > room {
            return Err(StartError::WrongLength { context_tokens: self.options.context_tokens });
        }
        if self.shared.stages.is_empty() {
            return Err(StartError::NoStages);
        }
        let started = self.shared.drive(|driver| driver.start(request));
        let (id, events) = started.map_err(|QueueFull| StartError::QueueFull(self.options.queue_max))?;
        Ok(SessionStream { id, events, shared: self.shared.clone() })
    }

    /// A look at the engine.
    pub fn status(&self) -> EngineStatus {
        let stages = self.shared.stages.iter().map(|cell| {
            let state = lock(&cell.state);
            StageStatus {
                range: cell.range,
                process_id: state.link.as_ref().map(|link| link.process_id()),
                loaded: state.loaded.clone(),
                restarts: state.restarts,
            }
        });
        let stages = stages.collect();
        let driver = lock(&self.shared.driver);
        EngineStatus {
            stages,
            running: driver.running(),
            queued: driver.queued(),
            counters: driver.counters().clone(),
            last_step: driver.last_step().cloned(),
        }
    }

    /// True when every stage is up.
    pub fn is_ready(&self) -> bool {
        lock(&self.shared.driver).is_ready()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        self.shared.drive(|driver| driver.on_failed("the engine is shutting down"));
        for cell in &self.shared.stages {
            // Closing the link ends the child and the receiver of its supervisor.
            let link = lock(&cell.state).link.take();
            if let Some(link) = link {
                let _ = link.died();
            }
        }
        for supervisor in self.threads.drain(..) {
            let _ = supervisor.join();
        }
    }
}

fn stage_cells(options: &EngineOptions, gguf: &Gguf) -> Result<Vec<StageCell>, EngineError> {
    let stages = options.ranges.len();
    let tap = murmur_gguf::hidden_tap_name(gguf.architecture());
    let inject = match murmur_gguf::Arch::from_name(gguf.architecture()).map(Arch::hidden_input) {
        Some(HiddenInput::OverwriteScaled { tensor }) => Some(tensor.to_owned()),
        Some(HiddenInput::Batch) | None => None,
    };
    let cell = |(stage, &range): (usize, &LayerRange)| {
        let path = if stages == 1 { options.model.clone() } else { slice_file(options, gguf, range)? };
        let load = Load {
            kv_cells: options.context_tokens.saturating_mul(options.parallel).min(KV_CELLS_MAX),
            sequences: sequences(options),
            tap: tap.filter(|_| stage + 1 < stages).map(str::to_owned),
            inject: inject.clone().filter(|_| stage > 0),
            ..load_of(options, path, Role::Stage { first: stage == 0, last: stage + 1 == stages })
        };
        Ok(StageCell { load, range, state: Mutex::default() })
    };
    options.ranges.iter().enumerate().map(cell).collect()
}

/// What every child of an engine is told; a child without KV cache needs no more.
fn load_of(options: &EngineOptions, path: PathBuf, role: Role) -> Load {
    let processors = thread::available_parallelism().map_or(1, |n| n.get() as u32);
    Load {
        path,
        role,
        kv_cells: 0,
        context_tokens: options.context_tokens,
        sequences: 1,
        chunk_rows: options.chunk_rows,
        threads: options.threads,
        threads_max: options.threads.unwrap_or(processors).max(1),
        exact: options.exact,
        gpu_layers: options.gpu_layers,
        tap: None,
        inject: None,
    }
}

/// More sequences than full-length requests: short requests and kept prefixes share the cells. With one KV stream each
/// (exact mode) a sequence has its share of the cells for itself.
fn sequences(options: &EngineOptions) -> u32 {
    const SEQUENCES_MAX: u32 = 64;
    if options.exact { options.parallel } else { (options.parallel * 4).min(SEQUENCES_MAX) }
}

/// The file that holds a layer range: cut once, kept under the identity of its source.
fn slice_file(options: &EngineOptions, gguf: &Gguf, range: LayerRange) -> Result<PathBuf, EngineError> {
    let identity = file_identity(&options.model).map_err(|e| EngineError::Io("the model file cannot be read", e))?;
    let path = options.slices_dir.join(format!("{identity:016x}-{}-{}.gguf", range.first, range.end));
    if !path.exists() {
        std::fs::create_dir_all(&options.slices_dir)
            .map_err(|e| EngineError::Io("the folder for model slices cannot be made", e))?;
        murmur_gguf::slice(gguf, range, &path)?;
    }
    Ok(path)
}

fn file_identity(path: &Path) -> std::io::Result<u64> {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let metadata = std::fs::metadata(path)?;
    let mut hasher = DefaultHasher::new();
    (path.canonicalize()?, metadata.len(), metadata.modified().ok(), env!("CARGO_PKG_VERSION")).hash(&mut hasher);
    Ok(hasher.finish())
}

fn spawn(
    program: &Path,
    shared: &Shared,
    stage: usize,
    progress: &Progress,
) -> Result<(Arc<Link>, Receiver, Loaded), LinkError> {
    let mut report = |fraction| progress(stage, fraction);
    let (link, receiver, loaded) = Link::spawn(program, &shared.stages[stage].load, &mut report)?;
    Ok((Arc::new(link), receiver, loaded))
}

fn install(shared: &Shared, stage: usize, link: Arc<Link>, loaded: Loaded) {
    {
        let mut state = lock(&shared.stages[stage].state);
        state.link = Some(link);
        state.loaded = Some(loaded);
    }
    shared.drive(|driver| driver.on_ready(stage));
}

/// Carries a stage's frames to the driver; when the child dies, starts it again.
fn supervise(program: &Path, shared: &Shared, stage: usize, mut receiver: Receiver) {
    let silent: Progress = Arc::new(|_, _| {});
    let mut attempt = 0;
    let mut loaded_at = Instant::now();
    loop {
        receive(shared, stage, &mut receiver);
        // Taken out first: waiting for the process must not hold the lock that sending needs.
        let link = lock(&shared.stages[stage].state).link.take();
        let died = link.map(|link| link.died());
        if shared.stopping.load(Ordering::SeqCst) {
            return;
        }
        if let Some(how) = died {
            tracing::warn!(stage, "{how}; starting it again");
        }
        shared.drive(|driver| driver.on_lost(stage));
        attempt = if loaded_at.elapsed() < PROVEN_AFTER { attempt + 1 } else { 0 };
        let mut why = "it died at once each time".to_owned();
        receiver = loop {
            if attempt >= RELOADS_MAX {
                let reason = format!("the engine process could not be restarted: {why}");
                tracing::error!(stage, "{reason}");
                return shared.drive(|driver| driver.on_failed(&reason));
            }
            if attempt > 0 {
                thread::sleep(RELOAD_PAUSE * 2u32.pow(attempt - 1));
            }
            if shared.stopping.load(Ordering::SeqCst) {
                return;
            }
            match spawn(program, shared, stage, &silent) {
                Ok((link, receiver, loaded)) => {
                    lock(&shared.stages[stage].state).restarts += 1;
                    loaded_at = Instant::now();
                    install(shared, stage, link, loaded);
                    break receiver;
                }
                Err(error) => {
                    attempt += 1;
                    why = error.to_string();
                }
            }
        };
        if shared.stopping.load(Ordering::SeqCst) {
            lock(&shared.stages[stage].state).link = None;
            return;
        }
    }
}

fn receive(shared: &Shared, stage: usize, receiver: &mut Receiver) {
    while let Some((frame, more)) = receiver.receive() {
        let mut driver = lock(&shared.driver);
        driver.on_frame(stage, frame);
        // What arrived together is answered together, so that the next batch is not torn apart.
        if !more {
            shared.flush(&mut driver);
        }
    }
}

/// The events of a session. Dropping it cancels the session.
pub struct SessionStream {
    id: u64,
    events: mpsc::Receiver<SessionEvent>,
    shared: Arc<Shared>,
}

impl SessionStream {
    /// The next event; `None` after the last.
    pub async fn next(&mut self) -> Option<SessionEvent> {
        let event = self.events.recv().await;
        // A session that was held back for a slow reader goes on when half its events are read.
        if event.is_some() && self.events.len() == EVENTS_MAX / 2 {
            self.shared.drive(|driver| driver.resume(self.id));
        }
        event
    }
}

impl Drop for SessionStream {
    fn drop(&mut self) {
        self.shared.drive(|driver| driver.cancel(self.id));
    }
}

/// The child that tokenises, or embeds: questions and answers instead of sessions. Started again when it dies.
struct Helper {
    program: PathBuf,
    load: Load,
    state: Arc<Mutex<HelperState>>,
}

#[derive(Default)]
struct HelperState {
    link: Option<Arc<Link>>,
    loaded: Option<Loaded>,
    waiting: HashMap<u64, oneshot::Sender<Frame>>,
    next_id: u64,
}

impl Helper {
    fn new(options: &EngineOptions) -> Result<Helper, EngineError> {
        let role = if options.embedding { Role::Embedding } else { Role::Vocabulary };
        let load = load_of(options, options.model.clone(), role);
        let helper = Helper { program: options.program.clone(), load, state: Arc::default() };
        helper.link()?;
        Ok(helper)
    }

    fn vocabulary_facts(&self) -> Result<murmur_protocol::stage::VocabularyFacts, EngineError> {
        let mut state = lock(&self.state);
        let facts = state.loaded.as_mut().and_then(|loaded| loaded.vocabulary.take());
        facts.ok_or_else(|| EngineError::Child("the engine process did not report a vocabulary".into()))
    }

    /// The child, started if it is not there.
    fn link(&self) -> Result<Arc<Link>, EngineError> {
        let mut state = lock(&self.state);
        if let Some(link) = &state.link {
            return Ok(link.clone());
        }
        let (link, mut receiver, loaded) = Link::spawn(&self.program, &self.load, &mut |_| {})?;
        let link = Arc::new(link);
        state.link = Some(link.clone());
        state.loaded = Some(loaded);
        let shared = Arc::downgrade(&self.state);
        let receive = move || {
            while let Some((frame, _)) = receiver.receive() {
                let Some(state) = shared.upgrade() else { return };
                let waiting = lock(&state).waiting.remove(&frame.header.session);
                if let Some(answer) = waiting {
                    let _ = answer.send(frame);
                }
            }
            // Dead: whoever waits hears it by the closed channel, and the next question starts a new child.
            if let Some(state) = shared.upgrade() {
                let mut state = lock(&state);
                state.link = None;
                state.waiting.clear();
            }
        };
        thread::Builder::new()
            .name("engine-helper".into())
            .spawn(receive)
            .map_err(|e| EngineError::Io("a receiving thread could not be started", e))?;
        Ok(link)
    }

    async fn ask(self: &Arc<Self>, mut frame: Frame) -> Result<Frame, EngineError> {
        // Two tries: the first may find a child that died in the meantime.
        for _ in 0..2 {
            let helper = self.clone();
            let link = tokio::task::spawn_blocking(move || helper.link()).await.map_err(|_| EngineError::Stopped)??;
            let (sender, receiver) = oneshot::channel();
            {
                let mut state = lock(&self.state);
                // A child that died since would never answer, and nobody would clear the question.
                if !state.link.as_ref().is_some_and(|current| Arc::ptr_eq(current, &link)) {
                    continue;
                }
                state.next_id += 1;
                frame.header.session = state.next_id;
                state.waiting.insert(frame.header.session, sender);
            }
            link.send(std::slice::from_ref(&frame)).map_err(LinkError::from)?;
            match receiver.await {
                Ok(answer) if answer.header.kind == Kind::StepFailed => {
                    return Err(EngineError::Child(answer.as_text()));
                }
                Ok(answer) => return Ok(answer),
                Err(_) => {}
            }
        }
        Err(EngineError::Child("the engine process that reads texts died twice on this one; it is given up".into()))
    }
}
