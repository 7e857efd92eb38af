//! One model: what its file says, how far loading is, its engine once loaded, and what clients see of it.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use murmur_api::{
    backend::{ModelCard, ModelKind, ModelState, Refusal},
    limits::LOADING_RETRY_AFTER,
};
use murmur_engine::{Engine, EngineError, EngineOptions, Patience, Stop};
use murmur_gguf::{Facts, Gguf, LayerRange};
use murmur_sampling::Vocabulary;

use crate::{LoadProgress, ModelSpec, NodeError, NodeOptions, Threads, fit, mesh::ModelIdentity};

/// Prompt rows per chunk. A long prompt delays running streams by one chunk; larger chunks read the weights less often.
const CHUNK_ROWS: u32 = 256;
/// The same in exact mode, where the attention scores of a chunk are written out.
const CHUNK_ROWS_EXACT: u32 = 128;
/// Requests that may wait for their turn; more are refused with 429.
const QUEUE_MAX: usize = 64;
/// Loading progress is counted in so many parts.
const PROGRESS_PARTS: f32 = 1000.0;

/// Where a node keeps slices.
pub(crate) fn slices_dir(options: &NodeOptions) -> PathBuf {
    options.data_dir.join("slices")
}

/// A model of this node.
pub(crate) struct Model {
    spec: ModelSpec,
    /// What clients see until it is loaded.
    card: Arc<ModelCard>,
    /// What loading needs of the file; taken by it.
    file: Mutex<Option<ModelFile>>,
    /// How far loading is, in parts of [`PROGRESS_PARTS`].
    progress: AtomicU32,
    stop: Stop,
    loaded: OnceLock<LoadedModel>,
    /// What it is to other nodes; `None` inside: it cannot be offered.
    identity: OnceLock<Option<ModelIdentity>>,
}

/// A file that was checked.
struct ModelFile {
    gguf: Gguf,
    facts: Facts,
    embedding: bool,
}

/// A model that is loaded.
pub(crate) struct LoadedModel {
    pub(crate) card: Arc<ModelCard>,
    pub(crate) engine: Engine,
    pub(crate) memory_bytes: u64,
}

impl Model {
    /// Reads a file's header and checks that it can be run.
    pub(crate) fn open(spec: &ModelSpec, options: &NodeOptions) -> Result<Model, NodeError> {
        let gguf = Gguf::open(&spec.path)?;
        gguf.validate_for_engine()?;
        let facts = Facts::of(&gguf).map_err(|reason| NodeError::Unusable { path: spec.path.clone(), reason })?;
        let embedding = is_pooling(&gguf);
        let context_tokens = options.ctx_tokens.unwrap_or(fit::DEFAULT_CONTEXT_TOKENS).min(facts.context_length);
        let card = ModelCard {
            id: spec.id.clone(),
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
            kind: if embedding { ModelKind::Embed } else { ModelKind::Generate },
            context_tokens,
            chat_template: gguf.str("tokenizer.chat_template").map(str::to_owned),
            bos_text: String::new(),
            eos_text: String::new(),
            state: ModelState::Loading { fraction: 0.0 },
            details: details(&gguf, &facts),
        };
        Ok(Model {
            spec: spec.clone(),
            card: Arc::new(card),
            file: Mutex::new(Some(ModelFile { gguf, facts, embedding })),
            progress: AtomicU32::new(0),
            stop: Stop::new(),
            loaded: OnceLock::new(),
            identity: OnceLock::new(),
        })
    }

    /// The name clients use.
    pub(crate) fn id(&self) -> &str {
        &self.spec.id
    }

    /// Its file.
    pub(crate) fn path(&self) -> &Path {
        &self.spec.path
    }

    /// What it is to other nodes, once that is known.
    pub(crate) fn identity(&self) -> Option<&ModelIdentity> {
        self.identity.get()?.as_ref()
    }

    /// Whether it was found out what it is to other nodes.
    pub(crate) fn is_identified(&self) -> bool {
        self.identity.get().is_some()
    }

    /// Says what it is to other nodes, if it can be offered to them. The first word counts.
    pub(crate) fn identify(&self, identity: Option<ModelIdentity>) {
        let _ = self.identity.set(identity);
    }

    /// What it can be asked for.
    pub(crate) fn kind(&self) -> ModelKind {
        self.card.kind
    }

    /// The model, once it is loaded.
    pub(crate) fn loaded(&self) -> Option<&LoadedModel> {
        self.loaded.get()
    }

    /// The model, or what a client is told that asks too early.
    pub(crate) fn ready(&self) -> Result<&LoadedModel, Refusal> {
        self.loaded().ok_or_else(|| Refusal::NotReady {
            retry_after: LOADING_RETRY_AFTER,
            message: format!("{} is being loaded: try again shortly", self.id()),
        })
    }

    /// Whether it can be asked now.
    pub(crate) fn state(&self) -> ModelState {
        match self.loaded() {
            None => {
                let parts = self.progress.load(Ordering::Relaxed) as f32;
                ModelState::Loading { fraction: (parts / PROGRESS_PARTS).min(1.0) }
            }
            Some(loaded) => match loaded.engine.status().unavailable {
                None => ModelState::Ready,
                Some(reason) => ModelState::Failed { reason },
            },
        }
    }

    /// What clients see of it now.
    pub(crate) fn card(&self) -> Arc<ModelCard> {
        let card = self.loaded().map_or(&self.card, |loaded| &loaded.card);
        match self.state() {
            state if state == card.state => card.clone(),
            state => Arc::new(ModelCard { state, ..(**card).clone() }),
        }
    }

    /// Ends what runs or loads, without waiting.
    pub(crate) fn stop(&self) {
        self.stop.stop();
        if let Some(loaded) = self.loaded() {
            loaded.engine.stop();
        }
    }

    /// Splits and loads it, beside the models that were loaded before.
    pub(crate) fn load(
        &self,
        options: &NodeOptions,
        before: &[Model],
        progress: &Arc<dyn Fn(LoadProgress) + Send + Sync>,
    ) -> Result<(), NodeError> {
        let file = self.file.lock().unwrap_or_else(PoisonError::into_inner).take();
        // Somebody else loads it.
        let Some(file) = file else { return Ok(()) };
        let ranges = if file.embedding || options.stages <= 1 {
            vec![LayerRange::new(0, file.facts.layers)]
        } else {
            murmur_gguf::even_cuts(&file.gguf, options.stages)?
        };
        let parallel = if file.embedding { 1 } else { options.parallel };
        let (demand, context_tokens) = self.fit(&file, options, (parallel, ranges.len() as u32), before)?;
        let engine_options = EngineOptions {
            program: options.engine_program.clone(),
            model: self.spec.path.clone(),
            slices_dir: slices_dir(options),
            embedding: file.embedding,
            ranges,
            context_tokens,
            parallel,
            queue_max: QUEUE_MAX,
            chunk_rows: if options.exact { CHUNK_ROWS_EXACT } else { CHUNK_ROWS },
            threads: match options.threads {
                Threads::Auto => None,
                Threads::Fixed(n) => Some(n),
            },
            exact: options.exact,
            gpu_layers: options.gpu_layers,
            patience: Patience::default(),
        };
        let stages = engine_options.ranges.len();
        // Stages are loaded one after the other.
        let heard = |stage: usize, fraction: f32| {
            let share = (stage as f32 + fraction.clamp(0.0, 1.0)) / stages as f32;
            self.progress.store((share * PROGRESS_PARTS) as u32, Ordering::Relaxed);
            progress(LoadProgress { model: self.spec.id.clone(), stage, fraction });
        };
        let engine = Engine::load(engine_options, self.stop.clone(), heard);
        let engine = engine.map_err(|source| match source {
            EngineError::Stopped => NodeError::Interrupted,
            source => NodeError::Engine { model: self.spec.id.clone(), source },
        })?;
        let card = Arc::new(self.loaded_card(&engine));
        let _ = self.loaded.set(LoadedModel { card, engine, memory_bytes: demand.bytes(context_tokens) });
        // Stopped in the last moment, before there was an engine to tell.
        if self.stop.is_stopped() {
            self.stop();
            return Err(NodeError::Interrupted);
        }
        Ok(())
    }

    /// What loading takes, and the context that memory allows.
    fn fit(
        &self,
        file: &ModelFile,
        options: &NodeOptions,
        (parallel, stages): (u32, u32),
        before: &[Model],
    ) -> Result<(fit::Demand, u32), NodeError> {
        let sequences = EngineOptions::sequences(parallel, options.exact);
        let weights_bytes = file.gguf.file_bytes();
        let batch_rows = if options.exact { CHUNK_ROWS_EXACT.max(sequences) } else { CHUNK_ROWS * 2 };
        let mut demand = fit::Demand::of(&file.facts, weights_bytes, (parallel, sequences), batch_rows, stages);
        if options.exact {
            demand.exact(&file.facts, batch_rows, stages);
        }
        if file.embedding {
            demand.whole_sequences(&file.facts);
        }
        let loaded = || before.iter().filter_map(Model::loaded);
        let planned: u64 = loaded().map(|model| model.memory_bytes).sum();
        let outstanding: u64 =
            loaded().map(|model| fit::outstanding_bytes(model.memory_bytes, &model.engine.process_ids())).sum();
        let free = fit::available_bytes().map(|free| free.saturating_sub(outstanding));
        let limit = options.max_memory_bytes.map(|max| max.saturating_sub(planned));
        let available = match (free, limit) {
            (Some(free), Some(limit)) => free.min(limit),
            (free, limit) => free.or(limit).unwrap_or(u64::MAX),
        };
        let context_tokens = demand
            .context(options.ctx_tokens, available)
            .map_err(|shortage| NodeError::Fit { model: self.spec.id.clone(), shortage })?;
        Ok((demand, context_tokens))
    }

    fn loaded_card(&self, engine: &Engine) -> ModelCard {
        let vocabulary = engine.vocabulary();
        let text = |token: Option<i32>| token.map(|t| piece(vocabulary, t)).unwrap_or_default();
        let options = engine.options();
        let mut details = self.card.details.clone();
        details["context_tokens"] = options.context_tokens.into();
        details["parallel"] = options.parallel.into();
        details["exact"] = options.exact.into();
        details["stages"] = options.ranges.iter().map(|r| format!("{}-{}", r.first, r.end)).collect();
        ModelCard {
            context_tokens: options.context_tokens,
            bos_text: text(vocabulary.bos()),
            eos_text: text(vocabulary.eos()),
            state: ModelState::Ready,
            details,
            ..(*self.card).clone()
        }
    }
}

/// Models that pool their outputs give embeddings, not text.
fn is_pooling(gguf: &Gguf) -> bool {
    gguf.arch_u32("pooling_type").is_some_and(|kind| kind > 0) || gguf.architecture() == "bert"
}

/// What the file alone says.
fn details(gguf: &Gguf, facts: &Facts) -> serde_json::Value {
    serde_json::json!({
        "architecture": gguf.architecture(),
        "name": gguf.name(),
        "layers": facts.layers,
        "embedding_length": facts.embedding_length,
        "vocabulary": facts.vocabulary,
        "trained_context_tokens": facts.context_length,
        "file_bytes": gguf.file_bytes(),
    })
}

fn piece(vocabulary: &Vocabulary, token: i32) -> String {
    String::from_utf8_lossy(vocabulary.bytes(token)).into_owned()
}
