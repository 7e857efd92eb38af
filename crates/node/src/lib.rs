//! The runtime of a node: it loads models through the engine and serves them behind `murmur_api`'s [`Backend`].
//!
//! Start with [`Node::start`] (what happens when a model is loaded), then `generate` (how tokens become text).
//!
//! [`Backend`]: murmur_api::backend::Backend

mod backend;
pub mod fit;
mod generate;
mod model;

use std::{path::PathBuf, sync::Arc, time::Instant};

pub use murmur_engine::{CHILD_SUBCOMMAND, child};

use crate::model::LoadedModel;

/// What a node loads and how.
#[derive(Debug, Clone)]
pub struct NodeOptions {
    /// Where the node keeps its state; slices of models go below it.
    pub data_dir: PathBuf,
    /// The models to serve.
    pub models: Vec<ModelSpec>,
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
    /// Bit-equal results whatever shares a batch.
    pub exact: bool,
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
    #[error(transparent)]
    Fit(#[from] fit::DoesNotFit),
    /// The engine could not load it.
    #[error("{model} could not be loaded: {source}")]
    Engine {
        /// Which model.
        model: String,
        /// Why.
        source: murmur_engine::EngineError,
    },
    /// Two models with one name.
    #[error("two models are called {0}; give one of them another name")]
    SameName(String),
    /// The loading task was ended.
    #[error("loading was interrupted")]
    Interrupted,
}

/// A running node.
pub struct Node {
    models: Vec<LoadedModel>,
    started: Instant,
}

impl Node {
    /// Loads every model and is then ready to serve; `progress` hears how far it is.
    pub async fn start(
        options: NodeOptions,
        progress: impl Fn(LoadProgress) + Send + Sync + 'static,
    ) -> Result<Arc<Node>, NodeError> {
        let load = move || {
            let progress: Arc<dyn Fn(LoadProgress) + Send + Sync> = Arc::new(progress);
            let mut models: Vec<LoadedModel> = Vec::new();
            for spec in &options.models {
                if models.iter().any(|model| model.card.id == spec.id) {
                    return Err(NodeError::SameName(spec.id.clone()));
                }
                let used: u64 = models.iter().map(|model| model.memory_bytes).sum();
                models.push(LoadedModel::load(spec, &options, used, &progress)?);
            }
            Ok(models)
        };
        let models = tokio::task::spawn_blocking(load).await.map_err(|_| NodeError::Interrupted)??;
        Ok(Arc::new(Node { models, started: Instant::now() }))
    }

    /// Ends every engine process. Requests that still run fail.
    pub async fn shutdown(self: Arc<Self>) {
        // Dropping an engine waits for its processes.
        let _ = tokio::task::spawn_blocking(move || drop(self)).await;
    }
}
