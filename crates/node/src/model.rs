//! One loaded model: its file's facts, its engine, and what clients see of it.

use std::{
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use murmur_api::backend::{ModelCard, ModelKind};
use murmur_engine::{Engine, EngineOptions};
use murmur_gguf::{Facts, Gguf, LayerRange};
use murmur_sampling::Vocabulary;

use crate::{LoadProgress, ModelSpec, NodeError, NodeOptions, Threads, fit};

/// Prompt rows per chunk. A long prompt delays running streams by one chunk; larger chunks read the weights less often.
const CHUNK_ROWS: u32 = 256;
/// Requests that may wait for their turn; more are refused with 429.
const QUEUE_MAX: usize = 64;

/// A model that is loaded.
pub(crate) struct LoadedModel {
    pub(crate) card: Arc<ModelCard>,
    pub(crate) engine: Arc<Engine>,
    pub(crate) memory_bytes: u64,
}

impl LoadedModel {
    /// Checks, splits and loads a file. `used_bytes`: what models before it take of the node's memory limit.
    pub(crate) fn load(
        spec: &ModelSpec,
        options: &NodeOptions,
        used_bytes: u64,
        progress: &Arc<dyn Fn(LoadProgress) + Send + Sync>,
    ) -> Result<LoadedModel, NodeError> {
        let gguf = Gguf::open(&spec.path)?;
        gguf.validate_for_engine()?;
        let embedding = is_pooling(&gguf);
        let facts = Facts::of(&gguf).map_err(|reason| NodeError::Unusable { path: spec.path.clone(), reason })?;
        let ranges = if embedding || options.stages <= 1 {
            vec![LayerRange::new(0, facts.layers)]
        } else {
            murmur_gguf::even_cuts(&gguf, options.stages)?
        };
        let stages = ranges.len() as u32;
        let parallel = if embedding { 1 } else { options.parallel.max(1) };
        let mut demand = fit::Demand::of(&facts, gguf.file_bytes(), parallel, CHUNK_ROWS * 2, stages);
        if embedding {
            demand.whole_sequences(&facts);
        }
        let limit = options.max_memory_bytes.map(|max| max.saturating_sub(used_bytes));
        let available = match (fit::available_bytes(), limit) {
            (Some(free), Some(limit)) => free.min(limit),
            (free, limit) => free.or(limit).unwrap_or(u64::MAX),
        };
        let context_tokens = demand.context(options.ctx_tokens, available)?;
        let engine_options = EngineOptions {
            program: options.engine_program.clone(),
            model: spec.path.clone(),
            slices_dir: options.data_dir.join("slices"),
            embedding,
            ranges,
            context_tokens,
            parallel,
            queue_max: QUEUE_MAX,
            chunk_rows: CHUNK_ROWS,
            threads: match options.threads {
                Threads::Auto => None,
                Threads::Fixed(n) => Some(n),
            },
            exact: options.exact,
            gpu_layers: options.gpu_layers,
        };
        let (hear, id) = (progress.clone(), spec.id.clone());
        let heard = move |stage, fraction| hear(LoadProgress { model: id.clone(), stage, fraction });
        let engine = Engine::load(engine_options, heard)
            .map_err(|source| NodeError::Engine { model: spec.id.clone(), source })?;
        let card = card(spec, &gguf, &facts, &engine, embedding);
        Ok(LoadedModel { card: Arc::new(card), engine: Arc::new(engine), memory_bytes: demand.bytes(context_tokens) })
    }
}

/// Models that pool their outputs give embeddings, not text.
fn is_pooling(gguf: &Gguf) -> bool {
    gguf.arch_u32("pooling_type").is_some_and(|kind| kind > 0) || gguf.architecture() == "bert"
}

fn card(spec: &ModelSpec, gguf: &Gguf, facts: &Facts, engine: &Engine, embedding: bool) -> ModelCard {
    let vocabulary = engine.vocabulary();
    let text = |token: Option<i32>| token.map(|t| piece(vocabulary, t)).unwrap_or_default();
    let options = engine.options();
    let stages: Vec<String> = options.ranges.iter().map(|r| format!("{}-{}", r.first, r.end)).collect();
    ModelCard {
        id: spec.id.clone(),
        created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        kind: if embedding { ModelKind::Embed } else { ModelKind::Generate },
        context_tokens: options.context_tokens,
        chat_template: gguf.str("tokenizer.chat_template").map(str::to_owned),
        bos_text: text(vocabulary.bos()),
        eos_text: text(vocabulary.eos()),
        state: "ready".into(),
        details: serde_json::json!({
            "architecture": gguf.architecture(),
            "name": gguf.name(),
            "layers": facts.layers,
            "embedding_length": facts.embedding_length,
            "vocabulary": facts.vocabulary,
            "trained_context_tokens": facts.context_length,
            "context_tokens": options.context_tokens,
            "parallel": options.parallel,
            "file_bytes": gguf.file_bytes(),
            "exact": options.exact,
            "stages": stages,
        }),
    }
}

fn piece(vocabulary: &Vocabulary, token: i32) -> String {
    String::from_utf8_lossy(vocabulary.bytes(token)).into_owned()
}
