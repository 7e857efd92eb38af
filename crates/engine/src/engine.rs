//! One model on this machine: its child processes, kept alive, and the sessions that run on them.

mod helper;
mod slices;
mod stop;
mod supervisor;
mod tokenizer;

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use murmur_gguf::{Arch, Gguf, HiddenInput, LayerRange, same_vocabulary};
use murmur_protocol::{
    codec::Codec,
    frame::{Frame, Header, Kind, MAX_ROWS},
    sampling::Token,
    stage::{Keep, Load, Loaded, Role, Step},
};
use murmur_sampling::Vocabulary;
use tokio::sync::mpsc;

pub use slices::{UNUSED_SLICES_BYTES_MAX, prune as prune_slices};
pub use stop::Stop;
pub use tokenizer::Tokenizer;

use crate::{
    driver::{
        Counters, Draft, DraftModel, Driver, DriverOptions, Guessing, LAG_MAX, NotStarted, PeerDraft, SessionEvent,
        SessionRequest,
    },
    engine::supervisor::{ENDING, Place, Shared, StageCell},
    link::{LinkError, RemoteStage},
};

/// Most KV cells of a stage: llama.cpp counts them in 32 bits and rounds up.
const KV_CELLS_MAX: u32 = 1 << 30;
/// Requests that can run at once, each in a sequence of llama.cpp: its own limit (`LLAMA_MAX_SEQ`).
pub const PARALLEL_MAX: u32 = 256;

/// How long things are waited for. Tests have less patience.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// A process that owes an answer and is silent is never killed sooner than this.
    pub silence_floor: Duration,
    /// Pause before a stage that could not be loaded several times is tried again; it grows.
    pub failed_pause: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Patience { silence_floor: Duration::from_secs(30), failed_pause: Duration::from_secs(30) }
    }
}

/// What to run and how.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// The binary whose hidden subcommand is the child process.
    pub program: PathBuf,
    /// The GGUF file.
    pub model: PathBuf,
    /// The file is named after its content: whenever it was touched, its slices stay good.
    pub content_addressed: bool,
    /// Where slices of the file are kept.
    pub slices_dir: PathBuf,
    /// A pooling model instead of a generating one.
    pub embedding: bool,
    /// Layer ranges, in order; one range of all layers is the whole file.
    pub ranges: Vec<LayerRange>,
    /// Tokens per request at most.
    pub context_tokens: u32,
    /// Requests that run at once, up to [`PARALLEL_MAX`].
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
    /// How long things are waited for.
    pub patience: Patience,
    /// How much stages keep of what they have sent on, for the case that the next one is lost.
    pub keep: Keep,
    /// How hidden states leave each stage; f32 where nothing is said.
    pub codecs: Vec<Codec>,
    /// Who guesses what the model will say.
    pub draft: Draft,
    /// How long a frame is on its way around stages elsewhere, us, as far as is known. It is measured when they run; the longer, the more is
    /// guessed.
    pub travel_us: u64,
}

impl EngineOptions {
    pub(crate) fn check(&self) -> Result<(), EngineError> {
        let bad = |what: String| Err(EngineError::Options(what));
        let parallel = self.parallel;
        if !(1..=PARALLEL_MAX).contains(&parallel) {
            return bad(format!(
                "{parallel} requests at once are not possible: the engine can run 1 to {PARALLEL_MAX}"
            ));
        }
        if self.context_tokens.checked_mul(parallel).is_none_or(|cells| cells > KV_CELLS_MAX) {
            return bad(format!(
                "{parallel} requests at once with {} tokens each are more than the {KV_CELLS_MAX} tokens that the \
                 engine can hold",
                self.context_tokens
            ));
        }
        if !(1..=MAX_ROWS).contains(&self.chunk_rows) {
            return bad(format!("a chunk of {} prompt rows: 1 to {MAX_ROWS} are possible", self.chunk_rows));
        }
        Ok(())
    }
}

/// Why a model cannot run.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The file is not what it should be.
    #[error(transparent)]
    Gguf(#[from] murmur_gguf::GgufError),
    /// The options ask for what the engine cannot do.
    #[error("{0}")]
    Options(String),
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
    /// The prompt is empty, nothing is left to generate, or prompt and answer together are longer than the context.
    #[error(
        "a session has at least one prompt token and one token to generate, and with its whole answer at most \
         {context_tokens}"
    )]
    WrongLength {
        /// The context.
        context_tokens: u32,
    },
    /// An embedding model generates nothing.
    #[error("this model gives embeddings, not text")]
    NoStages,
    /// The model's processes cannot be had at present, or the engine ends: why.
    #[error("{0}")]
    Unavailable(String),
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
    /// The model that guesses, if there is one.
    pub draft: Option<DraftStatus>,
    /// How was guessed lately. `None`: not at all so far.
    pub guessing: Option<Guessing>,
    /// How long a row is on its way around the stages, beside computing, us: as was known at first, and then as measured.
    pub travel_us: u64,
    /// Why requests fail at present, if they do: a stage could not be brought back, for instance.
    pub unavailable: Option<String>,
}

/// A look at the model that guesses.
#[derive(Debug, Clone)]
pub struct DraftStatus {
    /// Its process.
    pub process_id: Option<u32>,
    /// How often it was restarted.
    pub restarts: u32,
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
    /// Its newest step.
    pub last_step: Option<Step>,
    /// Rows that it has computed for this engine, before restarts as well.
    pub computed_rows: u64,
}

/// A model with its processes. Dropping it ends them.
pub struct Engine {
    shared: Arc<Shared>,
    tokenizer: Arc<Tokenizer>,
    options: EngineOptions,
    threads: Vec<thread::JoinHandle<()>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Engine {
    /// Cuts the file if needed, starts the child processes and waits until they are loaded. Blocks; `progress` hears
    /// (stage, fraction), and `stop` ends it, as it later ends the engine.
    pub fn load(options: EngineOptions, stop: Stop, progress: impl Fn(usize, f32)) -> Result<Engine, EngineError> {
        Engine::load_spread(options, &[], stop, progress)
    }

    /// The same for a model whose stages are somewhere in the mesh: `elsewhere` has, in the order of the ranges, who finds
    /// them; `None` for those that are here. `progress` hears nothing.
    pub fn load_spread(
        options: EngineOptions,
        elsewhere: &[Option<Arc<dyn RemoteStage>>],
        stop: Stop,
        progress: impl Fn(usize, f32),
    ) -> Result<Engine, EngineError> {
        options.check()?;
        Engine::start_processes(options, elsewhere, stop, &progress)
    }

    fn start_processes(
        options: EngineOptions,
        elsewhere: &[Option<Arc<dyn RemoteStage>>],
        stop: Stop,
        progress: &dyn Fn(usize, f32),
    ) -> Result<Engine, EngineError> {
        let gguf = Gguf::open(&options.model)?;
        let tokenizer = start_tokenizer(&options, stop.clone(), progress).map_err(|error| stopped_or(&stop, error));
        let tokenizer = Arc::new(tokenizer?);
        let mut stages = if options.embedding { Vec::new() } else { stage_cells(&options, &gguf, elsewhere)? };
        let ring_stages = stages.len();
        if let Draft::Model(draft) = &options.draft
            && ring_stages > 0
        {
            stages.push(drafter_cell(&options, &gguf, draft)?);
        }
        let awaited = stages.len();
        if let Draft::Peer(PeerDraft { stage: peer, .. }) = &options.draft
            && ring_stages > 0
        {
            let range = LayerRange { first: 0, end: 0 };
            stages.push(StageCell { place: Place::Elsewhere(peer.clone()), range, state: Mutex::default() });
        }
        let driver = Driver::new(DriverOptions {
            stages: ring_stages,
            parallel: options.parallel as usize,
            chunk_rows: options.chunk_rows,
            exact: options.exact,
            queue_max: options.queue_max,
            end_of_generation: tokenizer.vocabulary().end_of_generation().to_vec(),
            vocabulary: tokenizer.vocabulary().len(),
            is_shared: !elsewhere.is_empty(),
            codecs: options.codecs.clone(),
            draft: options.draft.clone(),
            travel_us: options.travel_us,
        });
        let shared = Arc::new(Shared {
            driver: Mutex::new(driver),
            started: Instant::now(),
            stages,
            awaited,
            stop,
            program: options.program.clone(),
            patience: options.patience,
        });
        let mut engine = Engine { shared, tokenizer, options, threads: Vec::new() };
        let heard = |stage, fraction| {
            if stage < ring_stages {
                progress(stage, fraction);
            }
        };
        let receivers = match elsewhere.is_empty() {
            true => engine.shared.bring_up_in_turn(&heard),
            false => engine.shared.bring_up_at_once(),
        };
        let receivers = receivers.map_err(|error| stopped_or(&engine.shared.stop, error.into()))?;
        // A model elsewhere that guesses is looked for while sessions run.
        let receivers = receivers.into_iter().map(Some).chain((awaited < engine.shared.stages.len()).then_some(None));
        for (stage, receiver) in receivers.enumerate() {
            let shared = engine.shared.clone();
            let supervisor = thread::Builder::new()
                .name(format!("stage-{stage}"))
                .spawn(move || shared.supervise(stage, receiver))
                .map_err(|e| EngineError::Io("a supervising thread could not be started", e))?;
            engine.threads.push(supervisor);
        }
        if !elsewhere.is_empty() {
            let shared = engine.shared.clone();
            let retrier = thread::Builder::new().name("ring-retry".into()).spawn(move || shared.retry());
            engine.threads.push(retrier.map_err(|e| EngineError::Io("a supervising thread could not be started", e))?);
        }
        Ok(engine)
    }

    /// The model's vocabulary and what reads texts. Ends with the engine, whoever else holds it.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }

    /// The model's vocabulary.
    pub fn vocabulary(&self) -> &Arc<Vocabulary> {
        self.tokenizer.vocabulary()
    }

    /// What it runs.
    pub fn options(&self) -> &EngineOptions {
        &self.options
    }

    /// Text to tokens: see [`Tokenizer::tokenize`].
    pub async fn tokenize(
        &self,
        text: &str,
        add_special: bool,
        parse_special: bool,
    ) -> Result<Vec<Token>, EngineError> {
        self.tokenizer.tokenize(text, add_special, parse_special).await
    }

    /// A unit-length embedding of tokens; only for pooling models.
    pub async fn embed(&self, tokens: &[Token]) -> Result<Vec<f32>, EngineError> {
        let answer = self.tokenizer.ask(Frame::tokens(Header::new(Kind::Embed, 0), tokens)).await?;
        Ok(bytemuck::pod_collect_to_vec(&answer.payload))
    }

    /// Begins a session, or queues it.
    pub fn start(&self, request: SessionRequest) -> Result<SessionStream, StartError> {
        let room = self.options.context_tokens as usize;
        let (most, given) = (request.max_tokens as usize, request.generated.len());
        if request.prompt.is_empty() || given >= most || request.prompt.len().saturating_add(most) > room {
            return Err(StartError::WrongLength { context_tokens: self.options.context_tokens });
        }
        if self.shared.stages.is_empty() {
            return Err(StartError::NoStages);
        }
        let started = self.shared.drive(|driver| driver.start(request));
        let (id, events) = started.map_err(|refused| match refused {
            NotStarted::QueueFull => StartError::QueueFull(self.options.queue_max),
            NotStarted::Unavailable(reason) => StartError::Unavailable(reason),
        })?;
        Ok(SessionStream { id, events, shared: self.shared.clone() })
    }

    /// A look at the engine.
    pub fn status(&self) -> EngineStatus {
        let driver = lock(&self.shared.driver);
        let (accounts, counters) = (driver.accounts().to_vec(), driver.counters().clone());
        let (running, queued) = (driver.running(), driver.queued());
        let (guessing, travel_us) = (driver.guessing(), driver.travel_us());
        let unavailable = driver.unavailable().map(str::to_owned);
        drop(driver);
        let drafter = self.shared.stages.get(accounts.len()).map(|cell| {
            let state = lock(&cell.state);
            let process_id = state.link.as_ref().and_then(|link| link.process_id());
            DraftStatus { process_id, restarts: state.restarts }
        });
        let stages = self.shared.stages.iter().zip(accounts).map(|(cell, account)| {
            let state = lock(&cell.state);
            StageStatus {
                range: cell.range,
                process_id: state.link.as_ref().and_then(|link| link.process_id()),
                loaded: state.loaded.clone(),
                restarts: state.restarts,
                last_step: account.last_step,
                computed_rows: account.computed_rows,
            }
        });
        EngineStatus {
            stages: stages.collect(),
            running,
            queued,
            counters,
            draft: drafter,
            guessing,
            travel_us,
            unavailable,
        }
    }

    /// Whether sessions run or wait.
    pub fn is_working(&self) -> bool {
        let driver = lock(&self.shared.driver);
        driver.running() + driver.queued() > 0
    }

    /// True when every stage is up.
    pub fn is_ready(&self) -> bool {
        lock(&self.shared.driver).is_ready()
    }
}

impl Engine {
    /// Fails every request and kills every process, without waiting for them. Nothing starts again.
    pub fn stop(&self) {
        self.shared.drive(|driver| driver.stop(ENDING));
        self.shared.stop.stop();
    }

    /// Ends the requests that still wait for their turn as [`SessionEvent::Lost`], so that another engine answers them. Those that may
    /// have killed stages stay.
    pub fn send_waiting_away(&self, reason: &str) {
        self.shared.drive(|driver| driver.send_waiting_away(reason));
    }

    /// The processes that the engine has now.
    pub fn process_ids(&self) -> Vec<u32> {
        let stages = self.shared.stages.iter();
        let stages = stages.filter_map(|cell| lock(&cell.state).link.as_ref()?.process_id());
        stages.chain(self.tokenizer.process_id()).collect()
    }

    /// The files that its processes have loaded, or would load again.
    pub fn files(&self) -> Vec<PathBuf> {
        let here = self.shared.stages.iter().filter_map(|cell| match &cell.place {
            Place::Here(load) => Some(load.path.clone()),
            Place::Elsewhere(_) => None,
        });
        here.collect()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.stop();
        for supervisor in self.threads.drain(..) {
            let _ = supervisor.join();
        }
    }
}

/// What a killed process leaves as a reason is not the reason.
fn stopped_or(stop: &Stop, error: EngineError) -> EngineError {
    if stop.is_stopped() { EngineError::Stopped } else { error }
}

fn start_tokenizer(
    options: &EngineOptions,
    stop: Stop,
    progress: &dyn Fn(usize, f32),
) -> Result<Tokenizer, EngineError> {
    let load = match options.embedding {
        true => load_of(options, options.model.clone(), Role::Embedding),
        false => tokenizer::vocabulary_of(&options.model),
    };
    // Only an embedding model is loaded here; reading a vocabulary is no progress to speak of.
    let mut report = |fraction| {
        if options.embedding {
            progress(0, fraction);
        }
    };
    Tokenizer::of_child(options.program.clone(), load, options.patience.silence_floor, stop, &mut report)
}

fn stage_cells(
    options: &EngineOptions,
    gguf: &Gguf,
    elsewhere: &[Option<Arc<dyn RemoteStage>>],
) -> Result<Vec<StageCell>, EngineError> {
    let cell = |(stage, &range): (usize, &LayerRange)| {
        let place = match elsewhere.get(stage) {
            Some(Some(remote)) => Place::Elsewhere(remote.clone()),
            _ => Place::Here(Box::new(stage_load(options, gguf, range)?)),
        };
        Ok(StageCell { place, range, state: Mutex::default() })
    };
    options.ranges.iter().enumerate().map(cell).collect()
}

/// The model that guesses what `gguf` will say: a stage of its own. It need not be exact.
fn drafter_cell(options: &EngineOptions, gguf: &Gguf, draft: &DraftModel) -> Result<StageCell, EngineError> {
    let guesser = Gguf::open(&draft.path)?;
    guesser.validate_for_engine()?;
    if !same_vocabulary(gguf, &guesser) {
        let (path, model) = (draft.path.display(), options.model.display());
        return Err(EngineError::Options(format!(
            "{path} cannot guess what {model} will say, as it has another vocabulary: take a smaller model of the same family"
        )));
    }
    let range = LayerRange { first: 0, end: guesser.layer_count().unwrap_or(0) };
    let options = EngineOptions { model: draft.path.clone(), exact: false, ..options.clone() };
    let load = stage_load(&options, &guesser, range)?;
    Ok(StageCell { place: Place::Here(Box::new(load)), range, state: Mutex::default() })
}

/// What the child of a layer range is told; the range is cut from the file if it is a part of it.
pub(crate) fn stage_load(options: &EngineOptions, gguf: &Gguf, range: LayerRange) -> Result<Load, EngineError> {
    let (first, last) = (range.first == 0, gguf.layer_count() == Some(range.end));
    let tap = murmur_gguf::hidden_tap_name(gguf.architecture());
    let inject = match murmur_gguf::Arch::from_name(gguf.architecture()).map(Arch::hidden_input) {
        Some(HiddenInput::OverwriteScaled { tensor }) => Some(tensor.to_owned()),
        Some(HiddenInput::Batch) | None => None,
    };
    let path = match (first, last) {
        (true, true) => options.model.clone(),
        _ => slices::slice_file(&options.slices_dir, gguf, range, options.content_addressed)?,
    };
    Ok(Load {
        kv_cells: options.context_tokens * options.parallel,
        sequences: options.parallel,
        tap: tap.filter(|_| !last).map(str::to_owned),
        inject: inject.filter(|_| !first),
        ..load_of(options, path, Role::Stage { first, last })
    })
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
        keep: options.keep,
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
        if event.is_some() && self.events.len() == LAG_MAX / 2 {
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
