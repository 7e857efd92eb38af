//! The node as the HTTP layer sees it.

use std::{collections::HashSet, fmt::Write, sync::Arc, time::Duration};

use murmur_api::{
    backend::{
        Backend, BoxFuture, Embeddings, GenerateRequest, Generation, ModelCard, ModelKind, ModelState, Prompt, Refusal,
    },
    limits::FAILED_RETRY_AFTER,
};
use murmur_engine::{EngineError, SessionRequest, StartError};
use murmur_protocol::sampling::Token;
use murmur_sampling::{Sampler, SamplingError, StopMatcher};
use tokio::sync::mpsc;

use crate::{
    Node,
    generate::{EVENTS_MAX, Pump},
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

impl Node {
    fn model(&self, id: &str, kind: ModelKind) -> Result<&LoadedModel, Refusal> {
        let model = self.find(id)?;
        if model.kind() == kind {
            return model.ready();
        }
        let message = match kind {
            ModelKind::Generate => format!("{id} is an embedding model: it gives vectors (/v1/embeddings), not text"),
            ModelKind::Embed => {
                format!("{id} generates text and has no pooled embeddings: serve an embedding model beside it")
            }
        };
        Err(bad_request(message, "model"))
    }

    fn any_model(&self, id: &str) -> Result<&LoadedModel, Refusal> {
        self.find(id)?.ready()
    }

    fn find(&self, id: &str) -> Result<&Model, Refusal> {
        self.models.iter().find(|model| model.id() == id).ok_or_else(|| Refusal::NoSuchModel {
            message: format!("there is no model called {id} here; GET /v1/models lists what there is"),
        })
    }

    async fn tokens(&self, model: &LoadedModel, prompt: Prompt) -> Result<Vec<Token>, Refusal> {
        let vocabulary = model.engine.vocabulary();
        match prompt {
            Prompt::Text(text) => model.engine.tokenize(&text, true, false).await.map_err(engine_failed),
            Prompt::Rendered(text) => {
                // A template that writes the beginning-of-sequence token itself must not get a second one.
                let written = !model.card.bos_text.is_empty() && text.starts_with(&model.card.bos_text);
                model.engine.tokenize(&text, !written, true).await.map_err(engine_failed)
            }
            Prompt::Tokens(tokens) => match tokens.iter().find(|&&token| !vocabulary.contains(token)) {
                None => Ok(tokens),
                Some(token) => Err(bad_request(
                    format!("token {token} is not in the vocabulary, whose ids go from 0 to {}", vocabulary.len() - 1),
                    "prompt",
                )),
            },
        }
    }

    async fn start_generation(&self, request: GenerateRequest) -> Result<Generation, Refusal> {
        let model = self.model(&request.model, ModelKind::Generate)?;
        let prompt = self.tokens(model, request.prompt).await?;
        let context = model.card.context_tokens;
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
        let vocabulary = model.engine.vocabulary().clone();
        let (checked, params, history) = (vocabulary.clone(), request.sampling.clone(), prompt.clone());
        // Compiling a grammar takes a while; a bad one must be refused before the stream begins.
        tokio::task::spawn_blocking(move || Sampler::new(params, checked, &history).map(drop))
            .await
            .map_err(|error| Refusal::Failed { message: format!("checking the sampling parameters failed: {error}") })?
            .map_err(sampling_refused)?;
        let max_tokens = request.max_tokens.unwrap_or(u32::MAX).min(context - length);
        let seed = request.sampling.seed;
        let visible: HashSet<Token> =
            request.visible_tokens.iter().filter_map(|text| control_token(model, text)).collect();
        let started = model.engine.start(SessionRequest { prompt, max_tokens, sampling: request.sampling });
        let session = started.map_err(|error| match error {
            StartError::QueueFull(_) => Refusal::Busy {
                retry_after: RETRY_AFTER,
                message: format!("{error} for {}: try again later", request.model),
            },
            StartError::Unavailable(reason) => Refusal::NotReady {
                retry_after: FAILED_RETRY_AFTER,
                message: format!("{} is not available at present, try again later: {reason}", request.model),
            },
            StartError::WrongLength { .. } | StartError::NoStages => bad_request(error.to_string(), "prompt"),
        })?;
        let (out, events) = mpsc::channel(EVENTS_MAX);
        let pump = Pump { session, out, vocabulary, visible, stop: request.stop, matcher, prompt_tokens: length, seed };
        tokio::spawn(pump.run());
        Ok(Generation { prompt_tokens: length, events })
    }

    async fn embed_inputs(&self, id: String, inputs: Vec<Prompt>) -> Result<Embeddings, Refusal> {
        let model = self.model(&id, ModelKind::Embed)?;
        let mut embeddings = Embeddings { vectors: Vec::with_capacity(inputs.len()), prompt_tokens: 0 };
        for (index, input) in inputs.into_iter().enumerate() {
            // A tokenizer would still add its marks around nothing.
            if matches!(&input, Prompt::Text(text) if text.is_empty()) {
                return Err(bad_request(format!("input {index} is empty: there is nothing to embed"), "input"));
            }
            let tokens = self.tokens(model, input).await?;
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

fn control_token(model: &LoadedModel, text: &str) -> Option<Token> {
    let vocabulary = model.engine.vocabulary();
    (0..vocabulary.len() as Token).find(|&t| vocabulary.is_control(t) && vocabulary.bytes(t) == text.as_bytes())
}

impl Backend for Node {
    fn models(&self) -> Vec<Arc<ModelCard>> {
        self.models.iter().map(Model::card).collect()
    }

    fn generate(&self, request: GenerateRequest) -> BoxFuture<'_, Result<Generation, Refusal>> {
        Box::pin(self.start_generation(request))
    }

    fn embed(&self, model: String, inputs: Vec<Prompt>) -> BoxFuture<'_, Result<Embeddings, Refusal>> {
        Box::pin(self.embed_inputs(model, inputs))
    }

    fn tokenize(&self, model: String, prompt: Prompt) -> BoxFuture<'_, Result<Vec<Token>, Refusal>> {
        Box::pin(async move {
            let loaded = self.any_model(&model)?;
            self.tokens(loaded, prompt).await
        })
    }

    fn detokenize(&self, model: String, tokens: Vec<Token>) -> BoxFuture<'_, Result<String, Refusal>> {
        Box::pin(async move {
            let loaded = self.any_model(&model)?;
            let tokens = self.tokens(loaded, Prompt::Tokens(tokens)).await?;
            let bytes: Vec<u8> =
                tokens.iter().flat_map(|&token| loaded.engine.vocabulary().bytes(token).iter().copied()).collect();
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        })
    }

    fn control_token(&self, model: &str, text: &str) -> Option<Token> {
        control_token(self.any_model(model).ok()?, text)
    }

    fn cut_off(&self) {
        self.stop();
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
