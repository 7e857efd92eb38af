//! The runtime of a node: it loads models through the engine and serves them behind `murmur_api`'s [`Backend`].
//!
//! Start with [`Node::open`] and [`Node::load`] (a node can be asked while it loads), then `models` and `model` (what is loaded
//! when, and what happens then), then `generate` (how tokens become text).
//!
//! [`Backend`]: murmur_api::backend::Backend

mod activity;
mod backend;
mod contents;
mod draft;
pub mod fit;
mod generate;
mod measure;
mod mesh;
mod model;
mod models;
mod readers;
mod requests;
pub mod sharing;
pub mod signatures;
mod status;

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError, atomic::AtomicBool},
    time::{Duration, Instant},
};

pub use contents::{Sought, TakeError};
pub use draft::{DraftWish, WantedDraft};
pub use murmur_api::backend::RingWishes;
pub use murmur_engine::{CHILD_SUBCOMMAND, child};
pub use murmur_net as net;
use murmur_protocol::{
    codec::Codec,
    mesh::{MachineSpeed, NodeId},
};
use murmur_store::hub::HubConfig;
use tokio::task::{AbortHandle, JoinSet};

use crate::{
    contents::{Library, ask::Answers, give::Giving, pace::Pace, pull::Pulls, room::Room, wanted::Wanted},
    model::Model,
    models::Models,
    readers::Readers,
    requests::Requests,
    sharing::{Gate, Sharing},
};

/// What a node loads and how.
#[derive(Debug, Clone)]
pub struct NodeOptions {
    /// Where the node keeps its state; slices of models go below it.
    pub data_dir: PathBuf,
    /// The models to serve, loaded from the start to the end.
    pub models: Vec<ModelSpec>,
    /// Whether other nodes may have of this one: its models, its layers, its files.
    pub contributes: bool,
    /// Models that others have: found in the mesh or on the hub, and fetched as far as this node needs them.
    pub wanted: Vec<WantedModel>,
    /// Further models, each loaded when somebody asks for it. What cannot be read, or has the name of another, is left out.
    pub on_demand: Vec<ModelSpec>,
    /// How long a model on demand stays loaded that nobody asks for.
    pub idle: Duration,
    /// Stages each model is split into.
    pub stages: u32,
    /// Threads per stage.
    pub threads: Threads,
    /// Tokens per request at most; `None`: what the model allows and memory holds, up to
    /// [`fit::DEFAULT_CONTEXT_TOKENS`].
    pub ctx_tokens: Option<u32>,
    /// Requests of full length at once.
    pub parallel: u32,
    /// Memory the node may use; `None`: what the machine has free.
    pub max_memory_bytes: Option<u64>,
    /// Layers of one model that the node holds at most; `None`: as many as memory allows.
    pub layers_max: Option<u32>,
    /// Where it is, as its user calls the place; empty: other nodes are not told.
    pub region: String,
    /// A model that is too large for this node is spread over the nodes of its mesh, instead of being refused.
    pub spread: bool,
    /// Forms beside f32 in which hidden states may travel between the nodes of a spread model, where a link is slow. Empty with
    /// `exact`.
    pub lossy: Vec<Codec>,
    /// What rings that this node makes are to be like.
    pub ring: RingWishes,
    /// Has another node stand by for each stage of the rings that this one drives, where there is one.
    pub standby: bool,
    /// Who guesses what models will say.
    pub draft: DraftWish,
    /// Bit-equal results whatever shares a batch.
    pub exact: bool,
    /// How long a request waits, at a stretch, for another node that would take it.
    pub peer_wait: Duration,
    /// What other nodes may have of this one.
    pub sharing: Sharing,
    /// Whether other nodes may have the files of its models.
    pub hands_out_files: bool,
    /// Bytes of model files that go out per second, at most; `None`: as fast as it goes.
    pub upload_bytes_per_s: Option<u64>,
    /// The same of those that come in.
    pub download_bytes_per_s: Option<u64>,
    /// The hub, from which files come as well that other nodes have; `None`: from nodes alone.
    pub hub: Option<HubConfig>,
    /// Whether the hub is asked also for files of which only other nodes say that it has them. What the user names as the hub does, it is
    /// asked for in any case.
    pub hub_by_word: bool,
    /// Layers on a GPU, in builds with a back end for one.
    pub gpu_layers: i32,
    /// The binary that has the engine's child process as a hidden subcommand.
    pub engine_program: PathBuf,
}

/// One model to serve.
#[derive(Debug, Clone)]
pub struct ModelSpec {
    /// The GGUF file.
    pub path: PathBuf,
    /// The name clients use.
    pub id: String,
}

/// One model to fetch from others, and to serve.
#[derive(Debug, Clone)]
pub struct WantedModel {
    /// What it is called there.
    pub sought: Sought,
    /// The name clients use; `None`: the one that it has there.
    pub id: Option<String>,
    /// The key that must have signed it: nothing else is fetched.
    pub signed_by: Option<NodeId>,
}

/// How many threads a stage gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Threads {
    /// Measured, and measured again when the machine changes.
    Auto,
    /// Always so many.
    Fixed(u32),
}

/// How far loading is.
#[derive(Debug, Clone, PartialEq)]
pub struct LoadProgress {
    /// Model id.
    pub model: String,
    /// Which stage, from 0.
    pub stage: usize,
    /// 0 to 1.
    pub fraction: f32,
}

/// Why a node did not start.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The file is not a model that can be run.
    #[error(transparent)]
    Gguf(#[from] murmur_gguf::GgufError),
    /// The file is a GGUF file, but not of a model that can be run.
    #[error("{path} cannot be served: {reason}", path = .path.display())]
    Unusable {
        /// Which file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The model cannot be split as asked.
    #[error(transparent)]
    Slice(#[from] murmur_gguf::SliceError),
    /// The model does not fit.
    #[error("{model} does not fit: {shortage}")]
    Fit {
        /// Which model.
        model: String,
        /// What it needs and what there is.
        shortage: fit::DoesNotFit,
    },
    /// Layers of a model do not fit.
    #[error("layers {layers} of {model} need {} and {} are available", murmur_core::planner::size(*needed_bytes), murmur_core::planner::size(*available_bytes))]
    StageFit {
        /// Which model.
        model: String,
        /// Which layers.
        layers: murmur_gguf::LayerRange,
        /// Weights, KV cache and buffers.
        needed_bytes: u64,
        /// What there is.
        available_bytes: u64,
    },
    /// The engine could not load it.
    #[error("{model} could not be loaded")]
    Engine {
        /// Which model.
        model: String,
        /// Why.
        source: murmur_engine::EngineError,
    },
    /// A model cannot guess for another one.
    #[error(
        "{} cannot guess what {model} will say: {reason}. Name a smaller model of the same family with --draft, or take --draft lookup",
        path.display()
    )]
    Draft {
        /// The model that was to guess.
        path: PathBuf,
        /// For which model.
        model: String,
        /// Why not.
        reason: String,
    },
    /// The file cannot be read.
    #[error("{path} cannot be read", path = .path.display())]
    Unread {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Parts of a file cannot be kept.
    #[error(transparent)]
    Store(#[from] murmur_store::StoreError),
    /// Nobody in the mesh has a model of this name.
    #[error("no node of the mesh has a model called {0}; `murmur models search` lists what there is")]
    Nowhere(String),
    /// No node has it, and the hub does not give it.
    #[error("no node of the mesh has {name}, and the hub does not give it: {reason}")]
    NorOnHub {
        /// The name on the hub.
        name: String,
        /// Why not.
        reason: String,
    },
    /// A model is not signed by whom the user wants to have signed it.
    #[error(
        "{name} is not taken: no node of the mesh shows that {signer} has signed it; {others}. Leave out --signed-by to take it unsigned"
    )]
    NotSigned {
        /// The name of the model.
        name: String,
        /// Who should have signed it.
        signer: String,
        /// Who has, in words.
        others: String,
    },
    /// Parts of a file cannot be had from other nodes.
    #[error(transparent)]
    Take(#[from] TakeError),
    /// Two models with one name.
    #[error("two models are called {0}; give one of them another name")]
    SameName(String),
    /// To pause while the machine is used, one has to see that it is.
    #[error(
        "--pause-when-active is not possible: this system has no /proc/stat, from which it is seen whether the machine is used"
    )]
    ActivityUnseen,
    /// The loading task was ended.
    #[error("loading was interrupted")]
    Interrupted,
}

/// A node that nobody may want any more. Dropping it stops the node.
struct Loading(Option<Arc<Node>>);

impl Drop for Loading {
    fn drop(&mut self) {
        if let Some(node) = &self.0 {
            node.stop();
        }
    }
}

/// A node: its models, loaded or on their way.
pub struct Node {
    models: Arc<Models>,
    /// Vocabularies of models that are not loaded here.
    readers: Readers,
    mesh: mesh::MeshCell,
    /// A place in a mesh is to be taken, or is taken.
    is_to_join: AtomicBool,
    requests: Arc<Requests>,
    gate: Gate,
    /// Models' files, and parts of them.
    library: Library,
    room: Arc<Room>,
    pulls: Pulls,
    giving: Giving,
    answers: Answers,
    taking_pace: Pace,
    /// Models that are to come from others.
    wanted: Vec<Arc<Wanted>>,
    /// Where models may be spread over a mesh.
    machine: Option<MachineSpeed>,
    /// What goes on beside requests.
    tending: Mutex<JoinSet<()>>,
    started: Instant,
}

impl Node {
    /// A node that has read what its models are, and has loaded none of them: it can be served, and tells clients how far
    /// loading is. Blocks while it reads the files' headers.
    pub fn open(options: NodeOptions) -> Result<Node, NodeError> {
        if options.sharing.pause_when_active && !activity::can_be_seen() {
            return Err(NodeError::ActivityUnseen);
        }
        let machine = (options.spread && options.contributes).then(|| measure::machine(options.threads));
        let (gate, readers) = (Gate::new(options.sharing.clone()), Readers::new(options.engine_program.clone()));
        Ok(Node {
            library: Library::new(&options.data_dir),
            room: Arc::default(),
            pulls: Pulls::default(),
            giving: Giving::new(options.upload_bytes_per_s),
            answers: Answers::new(),
            taking_pace: Pace::new(options.download_bytes_per_s),
            wanted: options.wanted.iter().map(Wanted::new).map(Arc::new).collect(),
            models: Arc::new(Models::open(options)?),
            readers,
            mesh: mesh::MeshCell::new(),
            is_to_join: AtomicBool::new(false),
            requests: Arc::default(),
            gate,
            machine,
            tending: Mutex::default(),
            started: Instant::now(),
        })
    }

    /// Loads every model that is not on demand; `progress` hears how far it is. The first that cannot be loaded ends it. A model that is to guess
    /// and is not on this machine comes first.
    pub async fn load(
        self: &Arc<Self>,
        progress: impl Fn(LoadProgress) + Send + Sync + 'static,
    ) -> Result<(), NodeError> {
        self.fetch_draft().await?;
        let models = Arc::clone(&self.models);
        let loading = tokio::task::spawn_blocking(move || models.load(&progress));
        loading.await.map_err(|_| NodeError::Interrupted)??;
        self.tend(models::remember_use(Arc::downgrade(&self.models)));
        if self.models.iter().any(Model::is_on_demand) {
            self.tend(models::tend(Arc::downgrade(&self.models)));
        }
        Ok(())
    }

    /// Runs a task until it is over, or the node ends.
    fn tend(&self, task: impl Future<Output = ()> + Send + 'static) -> AbortHandle {
        let mut tending = self.tending.lock().unwrap_or_else(PoisonError::into_inner);
        while tending.try_join_next().is_some() {}
        tending.spawn(task)
    }

    /// Opens a node, loads its models and is then ready to serve.
    pub async fn start(
        options: NodeOptions,
        progress: impl Fn(LoadProgress) + Send + Sync + 'static,
    ) -> Result<Arc<Node>, NodeError> {
        let opened = tokio::task::spawn_blocking(move || Node::open(options)).await;
        let node = Arc::new(opened.map_err(|_| NodeError::Interrupted)??);
        // Whoever gives up waiting leaves no process behind.
        let mut loading = Loading(Some(node));
        if let Some(node) = &loading.0 {
            node.load(progress).await?;
        }
        loading.0.take().ok_or(NodeError::Interrupted)
    }

    /// The models' names, loaded or not.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.models.iter().map(Model::id)
    }

    /// Fails every request and kills every engine process, loaded or not, without waiting for them.
    pub fn stop(&self) {
        self.models.iter().for_each(Model::stop);
    }

    /// Leaves the mesh, ends every engine process and waits for their end. Requests that still run fail.
    pub async fn shutdown(self: Arc<Self>) {
        self.stop();
        self.leave_mesh().await;
        // What came from the mesh in between.
        self.stop();
        let mut tending = std::mem::take(&mut *self.tending.lock().unwrap_or_else(PoisonError::into_inner));
        tending.shutdown().await;
        // Dropping an engine waits for its processes.
        let _ = tokio::task::spawn_blocking(move || drop(self)).await;
    }

    /// How fast this machine is, if that matters to others.
    fn machine(&self) -> Option<MachineSpeed> {
        self.machine
    }

    fn options(&self) -> &NodeOptions {
        self.models.options()
    }
}
