//! What the HTTP layer needs from a node. The node implements [`Backend`]; tests implement it with a fake.

use std::{future::Future, pin::Pin, sync::Arc, time::Duration};

use murmur_protocol::sampling::{SamplingParams, Token};
use tokio::sync::mpsc;

use crate::limits::{FAILED_RETRY_AFTER, LOADING_RETRY_AFTER};
pub use crate::wishes::{PlanPin, RingWishes, node_digits, region};

/// A boxed future, so that [`Backend`] can be a trait object.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// What a model can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModelKind {
    /// Chat and completions.
    Generate,
    /// Embeddings only.
    Embed,
}

/// Whether a model can be asked now.
#[derive(Debug, Clone, PartialEq)]
pub enum ModelState {
    /// Not yet: it is being loaded.
    Loading {
        /// 0 to 1.
        fraction: f32,
    },
    /// Requests are taken.
    Ready,
    /// Requests are taken, and wait until it is loaded for them.
    Available {
        /// How far that is, from 0 to 1, where somebody waits for it already.
        loading: Option<f32>,
    },
    /// Not yet: it is spread over several machines, and not all of its layers are there.
    Waiting {
        /// What is missing.
        reason: String,
    },
    /// Not at present: its processes could not be brought back. The node goes on trying.
    Failed {
        /// Why.
        reason: String,
    },
}

impl ModelState {
    /// One word for clients.
    pub fn name(&self) -> &'static str {
        match self {
            ModelState::Loading { .. } => "loading",
            ModelState::Ready => "ready",
            ModelState::Available { loading: None } => "available",
            ModelState::Available { loading: Some(_) } => "loading",
            ModelState::Waiting { .. } => "waiting",
            ModelState::Failed { .. } => "failed",
        }
    }

    /// Why a request for the model called `id` is not taken now, if it is not.
    pub fn refusal(&self, id: &str) -> Option<Refusal> {
        let message = match self {
            ModelState::Ready | ModelState::Available { .. } => return None,
            ModelState::Loading { fraction } => {
                format!("{id} is being loaded ({:.0} %): try again shortly", 100.0 * fraction)
            }
            ModelState::Waiting { reason } => {
                format!("{id} is spread over several machines, and not all of its layers are there yet: {reason}")
            }
            ModelState::Failed { reason } => format!("{id} is not available at present, try again later: {reason}"),
        };
        Some(Refusal::NotReady { retry_after: self.retry_after(), message })
    }

    /// When to ask again.
    pub fn retry_after(&self) -> Duration {
        match self {
            ModelState::Loading { .. } | ModelState::Ready | ModelState::Available { .. } => LOADING_RETRY_AFTER,
            ModelState::Waiting { .. } | ModelState::Failed { .. } => FAILED_RETRY_AFTER,
        }
    }
}

/// What the HTTP layer must know of a model.
#[derive(Debug, Clone)]
pub struct ModelCard {
    /// The name clients use.
    pub id: String,
    /// Unix seconds at which this node learnt of it.
    pub created: u64,
    /// What it can be asked for.
    pub kind: ModelKind,
    /// Tokens per request at most, prompt and answer together.
    pub context_tokens: u32,
    /// The model's own Jinja template, when it has one.
    pub chat_template: Option<String>,
    /// Text of the beginning-of-sequence token, for the template.
    pub bos_text: String,
    /// Text of the end-of-sequence token, for the template.
    pub eos_text: String,
    /// Whether it can be asked now. Until it is prepared ([`Backend::prepare`]), the context, the template and the texts of
    /// tokens are not final.
    pub state: ModelState,
    /// Facts for `/v1/models/{id}` and `/api/status` (architecture, parameters, quantisation, stages ...).
    pub details: serde_json::Value,
}

/// A prompt, before tokenisation.
#[derive(Debug, Clone)]
pub enum Prompt {
    /// Plain text: the tokenizer adds what the model wants at the start, control tokens are read as text.
    Text(String),
    /// A rendered chat template: control tokens are recognised, and nothing is added twice.
    Rendered(String),
    /// Token ids.
    Tokens(Vec<Token>),
}

/// One generation.
#[derive(Debug, Clone)]
pub struct GenerateRequest {
    /// Model id, already resolved.
    pub model: String,
    /// What to continue.
    pub prompt: Prompt,
    /// How to choose tokens; the seed is always set.
    pub sampling: SamplingParams,
    /// Tokens to generate at most; `None`: until the context is full.
    pub max_tokens: Option<u32>,
    /// Texts that end the generation; never part of the output, also when they cross token boundaries.
    pub stop: Vec<String>,
    /// Control tokens that must appear in the output as their text, because the reader of the answer looks for them
    /// (marks of tool calls and reasoning, for instance). Other control tokens make no text.
    pub visible_tokens: Vec<String>,
}

/// A started generation. Dropping it cancels the work within one step.
pub struct Generation {
    /// Prompt length.
    pub prompt_tokens: u32,
    /// Events, bounded: a reader that lags stops the generation for as long, and loses nothing.
    pub events: mpsc::Receiver<Event>,
}

/// What happens during a generation.
#[derive(Debug, Clone)]
pub enum Event {
    /// The model is being loaded for this request.
    Loading {
        /// 0 to 1.
        fraction: f32,
    },
    /// Prompt tokens done so far (for keep-alives); also says how many came from the prefix cache.
    Prefill {
        /// Prompt tokens processed, cached ones included.
        done_tokens: u32,
        /// Prompt tokens that were found in the prefix cache.
        cached_tokens: u32,
    },
    /// New text. `text` is always valid UTF-8 and never part of a stop string.
    Text {
        /// May be empty when only log-probabilities are reported (a token that ends in the middle of a character).
        text: String,
        /// One entry per token consumed for this event.
        tokens: Vec<TokenInfo>,
    },
    /// The end; the last event.
    Done(Completion),
    /// The generation failed after it had begun; the last event.
    Failed(Refusal),
}

/// A generated token, with log-probabilities when they were asked for.
#[derive(Debug, Clone)]
pub struct TokenInfo {
    /// Token id.
    pub id: Token,
    /// Its bytes (may be part of a character).
    pub bytes: Vec<u8>,
    /// Natural log-probability.
    pub logprob: Option<f32>,
    /// Alternatives, best first: (id, bytes, log-probability).
    pub top: Vec<(Token, Vec<u8>, f32)>,
}

/// Why a generation ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finish {
    /// The model ended its turn, or the grammar was complete.
    EndOfText,
    /// A stop string matched: which.
    StopString(String),
    /// `max_tokens` or the context was reached.
    Length,
}

/// The account of a finished generation.
#[derive(Debug, Clone)]
pub struct Completion {
    /// Why it ended.
    pub finish: Finish,
    /// Prompt length.
    pub prompt_tokens: u32,
    /// Prompt tokens that came from the prefix cache.
    pub cached_tokens: u32,
    /// Tokens generated (the end-of-turn token included).
    pub completion_tokens: u32,
    /// The seed in force.
    pub seed: u64,
    /// Time from acceptance to the first token.
    pub prefill: Duration,
    /// Time from the first token to the last.
    pub decode: Duration,
    /// What was guessed of it.
    pub guesses: Guesses,
}

/// Tokens of an answer that were guessed before they were chosen, where somebody guesses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Guesses {
    /// Those that were chosen.
    pub right: u32,
    /// Those that were not. They are no part of the answer, and of [`Completion::completion_tokens`].
    pub wrong: u32,
}

impl Guesses {
    /// Those of two answers.
    pub fn and(self, other: Guesses) -> Guesses {
        Guesses { right: self.right.saturating_add(other.right), wrong: self.wrong.saturating_add(other.wrong) }
    }

    /// How many there were.
    pub fn count(self) -> u32 {
        self.right.saturating_add(self.wrong)
    }
}

/// Why the node will not, or cannot, do something. The message says what, why and what to do.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Refusal {
    /// Too much work queued: 429 with Retry-After.
    #[error("{message}")]
    Busy {
        /// When to try again.
        retry_after: Duration,
        /// For the user.
        message: String,
    },
    /// The request cannot be served as it is: 400. `param` names the field.
    #[error("{message}")]
    BadRequest {
        /// For the user.
        message: String,
        /// The request's field at fault; `grammar` for [`SamplingParams::grammar`], whatever field it came from.
        param: Option<String>,
        /// OpenAI's error code, e.g. `context_length_exceeded`.
        code: Option<String>,
    },
    /// Whoever asks may not: 403.
    #[error("{message}")]
    Forbidden {
        /// For the user.
        message: String,
    },
    /// 404.
    #[error("{message}")]
    NoSuchModel {
        /// For the user.
        message: String,
    },
    /// Something other than a model does not exist: 404.
    #[error("{message}")]
    NotFound {
        /// For the user.
        message: String,
        /// Which kind of thing, for programs: `not_in_a_mesh`, for instance.
        code: String,
    },
    /// The model is loading or cannot be had at present, or the server ends: 503 with Retry-After.
    #[error("{message}")]
    NotReady {
        /// When to try again.
        retry_after: Duration,
        /// For the user.
        message: String,
    },
    /// The engine failed and could not be brought back: 500.
    #[error("{message}")]
    Failed {
        /// For the user.
        message: String,
    },
}

impl Refusal {
    /// What was asked for needs a mesh, and the node is in none.
    pub fn not_in_a_mesh() -> Self {
        Refusal::NotFound {
            message: "this node is in no mesh: start it with --mesh NAME or --join TICKET".into(),
            code: "not_in_a_mesh".into(),
        }
    }

    /// What was asked for needs the mesh that the node is not in yet.
    pub fn joining() -> Self {
        let message = "this node is still joining its mesh: try again shortly".into();
        Refusal::NotReady { retry_after: LOADING_RETRY_AFTER, message }
    }
}

/// Embeddings of several inputs.
#[derive(Debug, Clone)]
pub struct Embeddings {
    /// One unit-length vector per input, `[n_embd]` f32.
    pub vectors: Vec<Vec<f32>>,
    /// Tokens over all inputs.
    pub prompt_tokens: u32,
}

/// What can be done about a node's mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MeshAction {
    /// Make a ticket that leads others into the mesh.
    Invite {
        /// For how many seconds it counts.
        valid_s: u64,
        /// What its bearer becomes: `worker` or `client`.
        role: String,
        /// How many nodes may come in with it; `None`: any number. Private meshes only.
        uses: Option<u32>,
    },
    /// Look for peers at the issuer of a ticket for this very mesh.
    Join {
        /// Its text, `murmur1...`.
        ticket: String,
    },
    /// End a ticket or a membership.
    Revoke {
        /// The id of the ticket or of the node, in hexadecimal.
        what: String,
    },
    /// Say which ring the node would make for a model, what it would cost, and why it and no other.
    Plan(PlanQuestion),
}

/// Which ring is asked about. What is `None` is as the node would have it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PlanQuestion {
    /// The name of the model, one of the node's own.
    pub model: String,
    /// Tokens that each stream may have.
    pub context_tokens: Option<u32>,
    /// Streams at once.
    pub streams: Option<u32>,
    /// Prompt for which the time of the first token is predicted.
    pub prompt_tokens: Option<u32>,
    /// What it is to be like.
    pub wishes: RingWishes,
}

/// A node, as the HTTP layer sees it.
pub trait Backend: Send + Sync + 'static {
    /// Every model of this node, also those that cannot be asked yet.
    fn models(&self) -> Vec<Arc<ModelCard>>;
    /// Gets a model ready to read and write texts with: its card, complete. Quick where that was done before; else a
    /// vocabulary may have to come from another machine. Refuses what cannot be asked now.
    fn prepare(&self, model: Arc<ModelCard>) -> BoxFuture<'_, Result<Arc<ModelCard>, Refusal>> {
        let refusal = model.state.refusal(&model.id);
        Box::pin(std::future::ready(refusal.map_or(Ok(model), Err)))
    }
    /// Starts a generation: tokenises, checks the length, queues or refuses. It never waits for other generations to
    /// end: a queued request is an accepted one, and its events start later.
    fn generate(&self, request: GenerateRequest) -> BoxFuture<'_, Result<Generation, Refusal>>;
    /// Embeds texts or token lists.
    fn embed(&self, model: String, inputs: Vec<Prompt>) -> BoxFuture<'_, Result<Embeddings, Refusal>>;
    /// Tokenises as the prompt of a request would be.
    fn tokenize(&self, model: String, prompt: Prompt) -> BoxFuture<'_, Result<Vec<Token>, Refusal>>;
    /// Text of tokens.
    fn detokenize(&self, model: String, tokens: Vec<Token>) -> BoxFuture<'_, Result<String, Refusal>>;
    /// The id of the *control* token with exactly this text, if the model has one: a grammar names it by id.
    fn control_token(&self, model: &str, text: &str) -> Option<Token> {
        let _ = (model, text);
        None
    }
    /// For `/api/status`.
    fn status(&self) -> serde_json::Value;
    /// Ends all work at once, because the server stops: every generation fails with a reason, and none begins.
    fn cut_off(&self) {}
    /// The node's mesh for `/api/mesh`, with its peers. Refused where there is none.
    fn mesh(&self) -> Result<serde_json::Value, Refusal> {
        Err(Refusal::not_in_a_mesh())
    }
    /// Whether the node is to be in a mesh, and is not yet.
    fn is_joining(&self) -> bool {
        false
    }
    /// Does something about the mesh, and says what came of it. Refused where there is no mesh.
    fn mesh_action(&self, action: MeshAction) -> BoxFuture<'_, Result<serde_json::Value, Refusal>> {
        let _ = action;
        Box::pin(std::future::ready(Err(Refusal::not_in_a_mesh())))
    }
    /// For `/api/models`: model files of this node and its mesh, whole or in parts. May block.
    fn contents(&self) -> Vec<serde_json::Value> {
        Vec::new()
    }
    /// For `/api/models/signatures`: by the digest of each of these files, what was signed of it, as far as nodes say so in time.
    fn signatures(&self) -> BoxFuture<'_, serde_json::Value> {
        Box::pin(std::future::ready(serde_json::json!({})))
    }
    /// Fetches a model's file from the nodes of the mesh, and says how far it is until it is done. Goes on when nobody listens. `signed_by`:
    /// the key of whoever must have signed it.
    fn pull(
        &self,
        model: String,
        signed_by: Option<String>,
    ) -> BoxFuture<'_, Result<mpsc::Receiver<serde_json::Value>, Refusal>> {
        let _ = (model, signed_by);
        Box::pin(std::future::ready(Err(Refusal::not_in_a_mesh())))
    }
    /// Ends a fetch. False: there was none.
    fn stop_pull(&self, model: &str) -> bool {
        let _ = model;
        false
    }
    /// For `/metrics`: the node's own part, in Prometheus text format.
    fn metrics(&self) -> String;
}
