//! The node as the HTTP layer sees it.

use std::{
    collections::HashSet,
    fmt::Write,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use murmur_api::{
    backend::{
        Backend, BoxFuture, Embeddings, GenerateRequest, Generation, MeshAction, ModelCard, ModelKind, ModelState,
        Prompt, Refusal,
    },
    limits::{FAILED_RETRY_AFTER, LOADING_RETRY_AFTER},
};
use murmur_core::request::RequestError;
use murmur_engine::{EngineError, SessionRequest, StartError, Tokenizer};
use murmur_protocol::sampling::{SamplingParams, Token};
use murmur_sampling::{Sampler, SamplingError, StopMatcher, Vocabulary};
use tokio::sync::mpsc;

use crate::{
    Node, NodeError, contents,
    generate::{EVENTS_MAX, Pump, Source},
    mesh::{MeshNode, RemoteModel, RemoteRequest},
    model::{LoadedModel, Model, with_causes, with_texts},
    models::LocalStream,
    readers::{Reader, ReaderError},
    requests::{Asker, Progress},
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
enum Target {
    /// The model at this place in the list, which is loaded.
    Local(usize, Arc<LoadedModel>),
    /// The model at this place in the list, which is to be loaded for it.
    OnDemand(usize, Arc<Reader>, Arc<ModelCard>),
    Remote(Arc<MeshNode>, Arc<RemoteModel>, Arc<Reader>, Arc<ModelCard>),
}

impl Target {
    fn card(&self) -> &Arc<ModelCard> {
        match self {
            Target::Local(_, model) => &model.card,
            Target::OnDemand(.., card) | Target::Remote(.., card) => card,
        }
    }

    fn tokenizer(&self) -> &Arc<Tokenizer> {
        match self {
            Target::Local(_, model) => model.engine.tokenizer(),
            Target::OnDemand(_, reader, _) | Target::Remote(_, _, reader, _) => &reader.tokenizer,
        }
    }
}

impl Node {
    /// A model by its name, ready to read and write texts with. One of this machine goes before one of the mesh.
    async fn target(&self, id: &str) -> Result<Target, Refusal> {
        let Some(at) = self.models.find(id) else { return self.remote(id).await };
        match self.models[at].used() {
            Some(loaded) => Ok(Target::Local(at, loaded)),
            None if self.models[at].is_on_demand() => {
                let model = &self.models[at];
                let unread = |error: ReaderError| engine_message(id, &error);
                let reader = self.readers.get(model.path(), async { Ok(()) }).await.map_err(unread)?;
                let card = with_texts(&model.card(), reader.tokenizer.vocabulary());
                Ok(Target::OnDemand(at, reader, Arc::new(card)))
            }
            // Others may have it, or a ring for it.
            None if self.models[at].is_spread() || self.models[at].is_supplied() => match self.remote(id).await {
                Err(Refusal::NoSuchModel { .. }) => {
                    let state = self.models[at].state();
                    Err(state.refusal(id).unwrap_or_else(|| being_loaded(id)))
                }
                target => target,
            },
            None => Err(being_loaded(id)),
        }
    }

    async fn remote(&self, id: &str) -> Result<Target, Refusal> {
        let unjoined = || if self.is_joining() { Refusal::joining() } else { no_such_model(id) };
        let mesh = self.mesh.get().ok_or_else(unjoined)?;
        let model = mesh.remotes().iter().find(|model| model.card.id == id).cloned();
        let model = model.ok_or_else(|| match self.wanted.iter().find(|wanted| wanted.is_called(id)) {
            Some(wanted) => Refusal::NotReady {
                retry_after: LOADING_RETRY_AFTER,
                message: wanted.waiting().unwrap_or_else(|| format!("{id} is being loaded: try again shortly")),
            },
            None => no_such_model(id),
        })?;
        let reader = mesh.reader(&model, &self.readers).await.map_err(|error| Refusal::NotReady {
            retry_after: FAILED_RETRY_AFTER,
            message: format!("{id} cannot be used at present, its vocabulary cannot be had: {}", with_causes(&error)),
        })?;
        let card = model.complete(&reader);
        Ok(Target::Remote(Arc::clone(mesh), model, reader, card))
    }

    /// The vocabulary of a model that was prepared just before.
    fn vocabulary(&self, id: &str) -> Option<Arc<Vocabulary>> {
        let reader = match self.models.find(id).map(|at| &self.models[at]) {
            Some(model) => match model.loaded() {
                Some(loaded) => return Some(loaded.engine.vocabulary().clone()),
                None => self.readers.known(model.path())?,
            },
            None => {
                let mesh = self.mesh.get()?;
                let model = mesh.remotes().iter().find(|model| model.card.id == id).cloned()?;
                self.readers.known(&mesh.card_path(&model))?
            }
        };
        Some(reader.tokenizer.vocabulary().clone())
    }

    /// A model of this machine that is of a kind, loaded.
    async fn local(&self, id: &str, kind: ModelKind) -> Result<Arc<LoadedModel>, Refusal> {
        let at = self.models.find(id).ok_or_else(|| no_such_model(id))?;
        let model = &self.models[at];
        if model.kind() != kind {
            return Err(wrong_kind(id, kind));
        }
        match model.used() {
            Some(loaded) => Ok(loaded),
            None if model.is_on_demand() => {
                let waking = self.models.wake(at).await.map_err(|error| not_loaded(id, &error))?;
                waking.loaded().await.map_err(|message| Refusal::Failed { message })
            }
            None => Err(being_loaded(id)),
        }
    }

    /// Starts an answer to a prompt that fits the context.
    async fn start_at(
        &self,
        target: Target,
        prompt: Vec<Token>,
        (max_tokens, sampling): (u32, SamplingParams),
        progress: &Arc<Progress>,
    ) -> Result<Source, Refusal> {
        let local = |prompt, sampling| SessionRequest { prompt, generated: Vec::new(), max_tokens, sampling };
        match target {
            Target::Local(at, model) => {
                let id = model.card.id.clone();
                let started = LocalStream::start(&self.models, at, model, local(prompt, sampling));
                started.map(Source::Local).map_err(|error| not_started(error, &id))
            }
            Target::OnDemand(at, _, card) => {
                let waking = self.models.wake(at).await.map_err(|error| not_loaded(&card.id, &error))?;
                Ok(Source::Waking(waking, Some(Box::new(local(prompt, sampling)))))
            }
            Target::Remote(mesh, model, ..) => {
                let (progress, wait) = (Arc::clone(progress), self.options().peer_wait);
                let id = model.card.id.clone();
                let started = mesh.start(RemoteRequest { model, prompt, max_tokens, sampling, wait, progress }).await;
                started.map(Source::Remote).map_err(|error| not_taken(error, &id))
            }
        }
    }

    async fn start_generation(&self, request: GenerateRequest) -> Result<Generation, Refusal> {
        let target = self.target(&request.model).await?;
        if target.card().kind != ModelKind::Generate {
            return Err(wrong_kind(&request.model, ModelKind::Generate));
        }
        let prompt = tokens(target.tokenizer(), target.card(), request.prompt).await?;
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
        let listed = self.requests.begin(&request.model, Asker::Api, length);
        let wanted = (max_tokens, request.sampling);
        let session = self.start_at(target, prompt, wanted, listed.progress()).await?;
        let (out, events) = mpsc::channel(EVENTS_MAX);
        let pump = Pump {
            session,
            listed,
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
        let model = self.local(&id, ModelKind::Embed).await?;
        let mut embeddings = Embeddings { vectors: Vec::with_capacity(inputs.len()), prompt_tokens: 0 };
        for (index, input) in inputs.into_iter().enumerate() {
            // A tokenizer would still add its marks around nothing.
            if matches!(&input, Prompt::Text(text) if text.is_empty()) {
                return Err(bad_request(format!("input {index} is empty: there is nothing to embed"), "input"));
            }
            let tokens = tokens(model.engine.tokenizer(), &model.card, input).await?;
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

fn being_loaded(id: &str) -> Refusal {
    let message = format!("{id} is being loaded: try again shortly");
    Refusal::NotReady { retry_after: LOADING_RETRY_AFTER, message }
}

/// It cannot be loaded on demand; perhaps when others are gone.
fn not_loaded(id: &str, error: &NodeError) -> Refusal {
    let message = match error {
        NodeError::Fit { .. } => format!("at present {}", with_causes(error)),
        error => format!("{id} cannot be loaded at present: {}", with_causes(error)),
    };
    Refusal::NotReady { retry_after: FAILED_RETRY_AFTER, message }
}

fn engine_message(id: &str, error: &ReaderError) -> Refusal {
    Refusal::Failed { message: format!("the vocabulary of {id} cannot be read: {}", with_causes(error)) }
}

pub(crate) fn no_such_model(id: &str) -> Refusal {
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

async fn tokens(tokenizer: &Tokenizer, card: &ModelCard, prompt: Prompt) -> Result<Vec<Token>, Refusal> {
    match prompt {
        Prompt::Text(text) => tokenizer.tokenize(&text, true, false).await.map_err(engine_failed),
        Prompt::Rendered(text) => {
            // A template that writes the beginning-of-sequence token itself must not get a second one.
            let bos = &card.bos_text;
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
        let remotes = self.mesh.get().map(|mesh| mesh.remotes()).unwrap_or_default();
        // What is still on its way here others may have ready.
        let ready =
            |id: &str| remotes.iter().find(|remote| remote.card.id == id && remote.card.state == ModelState::Ready);
        let card = |model: &Model| match model.card() {
            card if model.is_supplied() && card.state != ModelState::Ready => {
                ready(&card.id).map_or(card, |remote| Arc::clone(&remote.card))
            }
            card => card,
        };
        let mut cards: Vec<_> = self.models.iter().map(card).collect();
        let unhidden = remotes.iter().filter(|remote| self.models.find(&remote.card.id).is_none());
        cards.extend(unhidden.map(|remote| Arc::clone(&remote.card)));
        cards
    }

    fn prepare(&self, model: Arc<ModelCard>) -> BoxFuture<'_, Result<Arc<ModelCard>, Refusal>> {
        Box::pin(async move {
            if let Some(refusal) = model.state.refusal(&model.id) {
                return Err(refusal);
            }
            // An embedding model reads no templates, and has its vocabulary when it is loaded.
            match model.kind {
                ModelKind::Embed => Ok(model),
                ModelKind::Generate => Ok(Arc::clone(self.target(&model.id).await?.card())),
            }
        })
    }

    fn generate(&self, request: GenerateRequest) -> BoxFuture<'_, Result<Generation, Refusal>> {
        Box::pin(self.start_generation(request))
    }

    fn embed(&self, model: String, inputs: Vec<Prompt>) -> BoxFuture<'_, Result<Embeddings, Refusal>> {
        Box::pin(self.embed_inputs(model, inputs))
    }

    fn tokenize(&self, model: String, prompt: Prompt) -> BoxFuture<'_, Result<Vec<Token>, Refusal>> {
        Box::pin(async move {
            let target = self.target(&model).await?;
            tokens(target.tokenizer(), target.card(), prompt).await
        })
    }

    fn detokenize(&self, model: String, tokens_given: Vec<Token>) -> BoxFuture<'_, Result<String, Refusal>> {
        Box::pin(async move {
            let target = self.target(&model).await?;
            let ids = tokens(target.tokenizer(), target.card(), Prompt::Tokens(tokens_given)).await?;
            let vocabulary = target.tokenizer().vocabulary();
            let bytes: Vec<u8> = ids.iter().flat_map(|&token| vocabulary.bytes(token).iter().copied()).collect();
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        })
    }

    fn control_token(&self, model: &str, text: &str) -> Option<Token> {
        let vocabulary = self.vocabulary(model)?;
        control_token(&vocabulary, text)
    }

    fn cut_off(&self) {
        self.stop();
    }

    fn mesh(&self) -> Result<serde_json::Value, Refusal> {
        self.mesh.get().map(|mesh| mesh.view()).ok_or_else(|| self.no_mesh())
    }

    fn is_joining(&self) -> bool {
        self.mesh.get().is_none() && self.is_to_join.load(Ordering::Relaxed)
    }

    fn mesh_action(&self, action: MeshAction) -> BoxFuture<'_, Result<serde_json::Value, Refusal>> {
        Box::pin(async move {
            let mesh = self.mesh.get().ok_or_else(|| self.no_mesh())?;
            mesh.act(self, action).await
        })
    }

    fn contents(&self) -> Vec<serde_json::Value> {
        contents::view(self)
    }

    fn signatures(&self) -> BoxFuture<'_, serde_json::Value> {
        Box::pin(contents::view_signatures(self))
    }

    fn pull(
        &self,
        model: String,
        signed_by: Option<String>,
    ) -> BoxFuture<'_, Result<mpsc::Receiver<serde_json::Value>, Refusal>> {
        Box::pin(async move { self.pulls.begin(self, model, signed_by) })
    }

    fn stop_pull(&self, model: &str) -> bool {
        self.pulls.stop(model)
    }

    fn status(&self) -> serde_json::Value {
        crate::status::node(self)
    }

    fn metrics(&self) -> String {
        type Read = fn(&murmur_engine::EngineStatus) -> u64;
        let families: [(&str, &str, &str, Read); 9] = [
            ("murmur_generated_tokens_total", "counter", "Tokens generated.", |s| s.counters.generated_tokens),
            ("murmur_computed_prompt_tokens_total", "counter", "Prompt tokens computed.", |s| s.counters.prompt_tokens),
            ("murmur_cached_tokens_total", "counter", "Prompt tokens found in the prefix cache.", |s| {
                s.counters.cached_tokens
            }),
            ("murmur_guessed_tokens_total", "counter", "Tokens guessed.", |s| s.counters.guessed_tokens),
            ("murmur_right_tokens_total", "counter", "Tokens guessed right.", |s| s.counters.right_tokens),
            ("murmur_sessions_total", "counter", "Generations begun.", |s| s.counters.sessions),
            ("murmur_stages_lost_total", "counter", "Engine processes that died.", |s| s.counters.stages_lost),
            ("murmur_sessions_running", "gauge", "Generations running.", |s| s.running as u64),
            ("murmur_sessions_queued", "gauge", "Generations waiting.", |s| s.queued as u64),
        ];
        type ReadAll = fn(&murmur_engine::EngineStatus) -> &[u64];
        let by_depth: [(&str, &str, ReadAll); 2] = [
            ("murmur_compared_guesses_total", "Guesses compared, by how many others waited before each.", |s| {
                &s.counters.guessed_by_depth
            }),
            ("murmur_right_guesses_total", "Right guesses, by how many others waited before each.", |s| {
                &s.counters.right_by_depth
            }),
        ];
        let label = |id: &str| id.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        let loaded = self.models.iter().filter_map(Model::loaded);
        let statuses: Vec<_> = loaded.map(|model| (label(&model.card.id), model.engine.status())).collect();
        let mut text = String::new();
        for (name, kind, help, read) in families {
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
            for (label, status) in &statuses {
                let _ = writeln!(text, "{name}{{model=\"{label}\"}} {}", read(status));
            }
        }
        for (name, help, read) in by_depth {
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} counter");
            for (label, status) in &statuses {
                for (depth, tokens) in read(status).iter().enumerate() {
                    let _ = writeln!(text, "{name}{{model=\"{label}\",depth=\"{depth}\"}} {tokens}");
                }
            }
        }
        let name = "murmur_rejected_seconds_total";
        let help = "Time from wrong guesses to the tokens after those that were chosen instead.";
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} counter");
        for (label, status) in &statuses {
            let seconds = Duration::from_micros(status.counters.rejected_us).as_secs_f64();
            let _ = writeln!(text, "{name}{{model=\"{label}\"}} {seconds}");
        }
        text
    }
}
