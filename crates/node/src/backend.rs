//! The node as the HTTP layer sees it.

use std::{
    collections::HashSet,
    fmt::Write,
    sync::Arc,
    time::{Duration, Instant},
};

use murmur_api::{
    backend::{
        Backend, BoxFuture, Embeddings, GenerateRequest, Generation, MeshAction, ModelCard, ModelKind, ModelState,
        Prompt, Refusal,
    },
    limits::FAILED_RETRY_AFTER,
};
use murmur_core::request::RequestError;
use murmur_engine::{EngineError, SessionRequest, StartError, Tokenizer};
use murmur_protocol::sampling::{SamplingParams, Token};
use murmur_sampling::{Sampler, SamplingError, StopMatcher, Vocabulary};
use tokio::sync::mpsc;

use crate::{
    Node,
    generate::{EVENTS_MAX, Pump, Source},
    mesh::{MeshNode, RemoteModel, RemoteRequest},
    model::{LoadedModel, Model},
};

/// What a request that found the queue full should wait.
const RETRY_AFTER: Duration = Duration::from_secs(2);

fn bad_request(message: String, param: &str) -> Refusal {
    Refusal::BadRequest { message, param: Some(param.to_owned()), code: None }
}

fn engine_failed(error: EngineError) -> Refusal {
    Refusal::Failed { message: error.to_string() }
}

/// What generates: a model of this machine, or one of the mesh.
enum Target<'a> {
    Local(&'a LoadedModel),
    Remote(Arc<MeshNode>, Arc<RemoteModel>),
}

impl Target<'_> {
    fn card(&self) -> &Arc<ModelCard> {
        match self {
            Target::Local(model) => &model.card,
            Target::Remote(_, model) => &model.card,
        }
    }

    fn tokenizer(&self) -> &Arc<Tokenizer> {
        match self {
            Target::Local(model) => model.engine.tokenizer(),
            Target::Remote(_, model) => &model.reader.tokenizer,
        }
    }

    /// Starts an answer to a prompt that fits the context.
    async fn start(self, prompt: Vec<Token>, max_tokens: u32, sampling: SamplingParams) -> Result<Source, Refusal> {
        match self {
            Target::Local(model) => {
                let request = SessionRequest { prompt, generated: Vec::new(), max_tokens, sampling };
                let started = model.engine.start(request);
                started.map(Source::Local).map_err(|error| not_started(error, &model.card.id))
            }
            Target::Remote(mesh, model) => {
                let id = model.card.id.clone();
                let started = mesh.start(RemoteRequest { model, prompt, max_tokens, sampling }).await;
                started.map(Source::Remote).map_err(|error| not_taken(error, &id))
            }
        }
    }
}

impl Node {
    /// A model by its name. One of this machine goes before one of the mesh.
    fn target(&self, id: &str) -> Result<Target<'_>, Refusal> {
        match self.models.iter().find(|model| model.id() == id) {
            Some(model) => model.ready().map(Target::Local),
            None => self.remote(id).ok_or_else(|| no_such_model(id)),
        }
    }

    fn remote(&self, id: &str) -> Option<Target<'_>> {
        let mesh = self.mesh.get()?;
        Some(Target::Remote(Arc::clone(mesh), mesh.remote(id)?))
    }

    /// A model of this machine that is of a kind.
    fn local(&self, id: &str, kind: ModelKind) -> Result<&LoadedModel, Refusal> {
        let model = self.models.iter().find(|model| model.id() == id).ok_or_else(|| no_such_model(id))?;
        if model.kind() == kind {
            return model.ready();
        }
        Err(wrong_kind(id, kind))
    }

    async fn start_generation(&self, request: GenerateRequest) -> Result<Generation, Refusal> {
        let target = self.target(&request.model)?;
        if target.card().kind != ModelKind::Generate {
            return Err(wrong_kind(&request.model, ModelKind::Generate));
        }
        let prompt = tokens(&target, request.prompt).await?;
        let context = target.card().context_tokens;
        let length = prompt.len() as u32;
        if prompt.is_empty() {
            return Err(bad_request("the prompt has no tokens: there is nothing to continue".into(), "prompt"));
        }
        if length >= context {
            return Err(Refusal::BadRequest {
                message: format!(
                    "the prompt has {length} tokens and this model's context here is {context}, prompt and answer together: shorten the prompt, or start the server with a larger --ctx"
                ),
                param: Some("prompt".into()),
                code: Some("context_length_exceeded".into()),
            });
        }
        let matcher = StopMatcher::new(&request.stop).map_err(|error| bad_request(error.to_string(), "stop"))?;
        let vocabulary = target.tokenizer().vocabulary().clone();
        let (checked, params, history) = (vocabulary.clone(), request.sampling.clone(), prompt.clone());
        // Compiling a grammar takes a while; a bad one must be refused before the stream begins.
        tokio::task::spawn_blocking(move || Sampler::new(params, checked, &history).map(drop))
            .await
            .map_err(|error| Refusal::Failed { message: format!("checking the sampling parameters failed: {error}") })?
            .map_err(sampling_refused)?;
        let max_tokens = request.max_tokens.unwrap_or(u32::MAX).min(context - length);
        let seed = request.sampling.seed;
        let visible: HashSet<Token> =
            request.visible_tokens.iter().filter_map(|text| control_token(&vocabulary, text)).collect();
        let accepted = Instant::now();
        let session = target.start(prompt, max_tokens, request.sampling).await?;
        let (out, events) = mpsc::channel(EVENTS_MAX);
        let pump = Pump {
            session,
            accepted,
            out,
            vocabulary,
            visible,
            stop: request.stop,
            matcher,
            prompt_tokens: length,
            seed,
        };
        tokio::spawn(pump.run());
        Ok(Generation { prompt_tokens: length, events })
    }

    async fn embed_inputs(&self, id: String, inputs: Vec<Prompt>) -> Result<Embeddings, Refusal> {
        let model = self.local(&id, ModelKind::Embed)?;
        let mut embeddings = Embeddings { vectors: Vec::with_capacity(inputs.len()), prompt_tokens: 0 };
        for (index, input) in inputs.into_iter().enumerate() {
            // A tokenizer would still add its marks around nothing.
            if matches!(&input, Prompt::Text(text) if text.is_empty()) {
                return Err(bad_request(format!("input {index} is empty: there is nothing to embed"), "input"));
            }
            let tokens = tokens(&Target::Local(model), input).await?;
            let (length, context) = (tokens.len() as u32, model.card.context_tokens);
            if tokens.is_empty() || length > context {
                let message = format!("input {index} has {length} tokens; this model takes 1 to {context}");
                return Err(bad_request(message, "input"));
            }
            embeddings.prompt_tokens += length;
            embeddings.vectors.push(model.engine.embed(&tokens).await.map_err(engine_failed)?);
        }
        Ok(embeddings)
    }
}

fn sampling_refused(error: SamplingError) -> Refusal {
    let param = match &error {
        SamplingError::Parameter { name, .. } | SamplingError::TooMany { name, .. } => (*name).to_owned(),
        SamplingError::TokenOutOfRange { .. } => "logit_bias".to_owned(),
        _ => "grammar".to_owned(),
    };
    Refusal::BadRequest { message: error.to_string(), param: Some(param), code: None }
}

fn no_such_model(id: &str) -> Refusal {
    Refusal::NoSuchModel { message: format!("there is no model called {id} here; GET /v1/models lists what there is") }
}

fn wrong_kind(id: &str, wanted: ModelKind) -> Refusal {
    let message = match wanted {
        ModelKind::Generate => format!("{id} is an embedding model: it gives vectors (/v1/embeddings), not text"),
        ModelKind::Embed => {
            format!("{id} generates text and has no pooled embeddings: serve an embedding model beside it")
        }
    };
    bad_request(message, "model")
}

fn not_started(error: StartError, id: &str) -> Refusal {
    match error {
        StartError::QueueFull(_) => {
            Refusal::Busy { retry_after: RETRY_AFTER, message: format!("{error} for {id}: try again later") }
        }
        StartError::Unavailable(reason) => Refusal::NotReady {
            retry_after: FAILED_RETRY_AFTER,
            message: format!("{id} is not available at present, try again later: {reason}"),
        },
        StartError::WrongLength { .. } | StartError::NoStages => bad_request(error.to_string(), "prompt"),
    }
}

/// No peer took it.
fn not_taken(error: RequestError, id: &str) -> Refusal {
    let message = format!("{id}: {error}");
    match error {
        RequestError::Busy { .. } => Refusal::Busy { retry_after: RETRY_AFTER, message },
        RequestError::BadRequest(_) => Refusal::BadRequest { message, param: None, code: None },
        RequestError::NoPeer | RequestError::NoMemory(_) | RequestError::Lost { .. } => {
            Refusal::NotReady { retry_after: FAILED_RETRY_AFTER, message }
        }
        RequestError::Deadly { .. } => Refusal::Failed { message },
    }
}

async fn tokens(target: &Target<'_>, prompt: Prompt) -> Result<Vec<Token>, Refusal> {
    let tokenizer = target.tokenizer();
    match prompt {
        Prompt::Text(text) => tokenizer.tokenize(&text, true, false).await.map_err(engine_failed),
        Prompt::Rendered(text) => {
            // A template that writes the beginning-of-sequence token itself must not get a second one.
            let bos = &target.card().bos_text;
            let written = !bos.is_empty() && text.starts_with(bos);
            tokenizer.tokenize(&text, !written, true).await.map_err(engine_failed)
        }
        Prompt::Tokens(tokens) => {
            let vocabulary = tokenizer.vocabulary();
            match tokens.iter().find(|&&token| !vocabulary.contains(token)) {
                None => Ok(tokens),
                Some(token) => Err(bad_request(
                    format!("token {token} is not in the vocabulary, whose ids go from 0 to {}", vocabulary.len() - 1),
                    "prompt",
                )),
            }
        }
    }
}

fn control_token(vocabulary: &Vocabulary, text: &str) -> Option<Token> {
    (0..vocabulary.len() as Token).find(|&t| vocabulary.is_control(t) && vocabulary.bytes(t) == text.as_bytes())
}

impl Backend for Node {
    fn models(&self) -> Vec<Arc<ModelCard>> {
        let mut cards: Vec<_> = self.models.iter().map(Model::card).collect();
        let own = cards.len();
        for remote in self.mesh.get().map(|mesh| mesh.remotes()).unwrap_or_default() {
            if !cards[..own].iter().any(|card| card.id == remote.card.id) {
                cards.push(Arc::clone(&remote.card));
            }
        }
        cards
    }

    fn generate(&self, request: GenerateRequest) -> BoxFuture<'_, Result<Generation, Refusal>> {
        Box::pin(self.start_generation(request))
    }

    fn embed(&self, model: String, inputs: Vec<Prompt>) -> BoxFuture<'_, Result<Embeddings, Refusal>> {
        Box::pin(self.embed_inputs(model, inputs))
    }

    fn tokenize(&self, model: String, prompt: Prompt) -> BoxFuture<'_, Result<Vec<Token>, Refusal>> {
        Box::pin(async move {
            let target = self.target(&model)?;
            tokens(&target, prompt).await
        })
    }

    fn detokenize(&self, model: String, tokens_given: Vec<Token>) -> BoxFuture<'_, Result<String, Refusal>> {
        Box::pin(async move {
            let target = self.target(&model)?;
            let ids = tokens(&target, Prompt::Tokens(tokens_given)).await?;
            let vocabulary = target.tokenizer().vocabulary();
            let bytes: Vec<u8> = ids.iter().flat_map(|&token| vocabulary.bytes(token).iter().copied()).collect();
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        })
    }

    fn control_token(&self, model: &str, text: &str) -> Option<Token> {
        control_token(self.target(model).ok()?.tokenizer().vocabulary(), text)
    }

    fn cut_off(&self) {
        self.stop();
    }

    fn mesh(&self) -> Option<serde_json::Value> {
        self.mesh.get().map(|mesh| mesh.view())
    }

    fn mesh_action(&self, action: MeshAction) -> BoxFuture<'_, Result<serde_json::Value, Refusal>> {
        Box::pin(async move {
            let mesh = self.mesh.get().ok_or_else(Refusal::not_in_a_mesh)?;
            mesh.act(action).await
        })
    }

    fn status(&self) -> serde_json::Value {
        let models = self.models.iter().map(model_status);
        serde_json::json!({
            "version": env!("CARGO_PKG_VERSION"),
            "process_id": std::process::id(),
            "uptime_s": self.started.elapsed().as_secs(),
            "models": models.collect::<Vec<_>>(),
        })
    }

    fn metrics(&self) -> String {
        type Read = fn(&murmur_engine::EngineStatus) -> u64;
        let families: [(&str, &str, &str, Read); 7] = [
            ("murmur_generated_tokens_total", "counter", "Tokens generated.", |s| s.counters.generated_tokens),
            ("murmur_computed_prompt_tokens_total", "counter", "Prompt tokens computed.", |s| s.counters.prompt_tokens),
            ("murmur_cached_tokens_total", "counter", "Prompt tokens found in the prefix cache.", |s| {
                s.counters.cached_tokens
            }),
            ("murmur_sessions_total", "counter", "Generations begun.", |s| s.counters.sessions),
            ("murmur_stages_lost_total", "counter", "Engine processes that died.", |s| s.counters.stages_lost),
            ("murmur_sessions_running", "gauge", "Generations running.", |s| s.running as u64),
            ("murmur_sessions_queued", "gauge", "Generations waiting.", |s| s.queued as u64),
        ];
        let loaded = self.models.iter().filter_map(Model::loaded);
        let statuses: Vec<_> = loaded.map(|model| (&model.card.id, model.engine.status())).collect();
        let mut text = String::new();
        for (name, kind, help, read) in families {
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
            for (id, status) in &statuses {
                let label = id.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
                let _ = writeln!(text, "{name}{{model=\"{label}\"}} {}", read(status));
            }
        }
        text
    }
}

fn model_status(model: &Model) -> serde_json::Value {
    let state = model.state();
    let Some(loaded) = model.loaded() else {
        return serde_json::json!({"id": model.id(), "state": state.name(), "details": model.card().details});
    };
    let status = loaded.engine.status();
    let stages = status.stages.iter().map(|stage| {
        serde_json::json!({
            "layers": [stage.range.first, stage.range.end],
            "process_id": stage.process_id,
            "restarts": stage.restarts,
            "load_ms": stage.loaded.as_ref().map(|l| l.load_ms),
            "weight_bytes": stage.loaded.as_ref().map(|l| l.weight_bytes),
            "kv_cells": stage.loaded.as_ref().map(|l| l.kv_cells),
        })
    });
    let restarting = state == ModelState::Ready && !loaded.engine.is_ready();
    serde_json::json!({
        "id": model.id(),
        "state": if restarting { "restarting" } else { state.name() },
        "reason": status.unavailable,
        "details": loaded.card.details,
        "memory_bytes_planned": loaded.memory_bytes,
        "requests_running": status.running,
        "requests_queued": status.queued,
        "generated_tokens": status.counters.generated_tokens,
        "token_steps": status.counters.token_steps,
        "token_compute_us": status.counters.token_compute_us,
        "prompt_tokens": status.counters.prompt_tokens,
        "cached_tokens": status.counters.cached_tokens,
        "last_step": status.last_step.map(|step| serde_json::json!({
            "compute_us": step.compute_us, "batch_rows": step.batch_rows, "threads": step.threads,
        })),
        "stages": stages.collect::<Vec<_>>(),
    })
}
