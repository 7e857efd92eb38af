//! What a node serves: one entry per model in its record.

use super::check::{self, open_enum};
use super::error::MessageError;
use super::id::{ModelDigest, TokenizerDigest};
use super::proto;

/// Models in one record.
pub const MODELS_MAX: usize = 32;
/// Length of a model's name.
pub const MODEL_NAME_BYTES_MAX: usize = 96;
/// Length of a build id.
pub const BUILD_BYTES_MAX: usize = 64;

/// How far a model is from answering.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ModelState {
    /// On disk; would be loaded on demand.
    Available,
    /// Being loaded.
    Loading,
    /// Answers.
    Ready,
    /// Finishes what it has and takes nothing new.
    Draining,
    /// A state of a newer version: do not send requests.
    Unknown,
}

open_enum!(ModelState { Available, Loading, Ready, Draining });

impl ModelState {
    /// In one word, for people and programs.
    pub const fn name(self) -> &'static str {
        match self {
            ModelState::Available => "available",
            ModelState::Loading => "loading",
            ModelState::Ready => "ready",
            ModelState::Draining => "draining",
            ModelState::Unknown => "unknown",
        }
    }
}

/// A model that a node serves or could serve. Figures are the node's own measurements; a router prefers what it has
/// observed itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServedModel {
    /// Which model.
    pub digest: ModelDigest,
    /// Its name for people and for the API, 1..=[`MODEL_NAME_BYTES_MAX`] bytes.
    pub name: String,
    /// How far it is from answering.
    pub state: ModelState,
    /// Tokens that one request may have, prompt and answer together.
    pub context_tokens: u32,
    /// Requests that run at once.
    pub parallel: u32,
    /// Requests that run now.
    pub running: u32,
    /// Requests that wait.
    pub queued: u32,
    /// Measured time per generated token of a request that runs alone; 0: not measured.
    pub decode_us_per_token: u32,
    /// Measured time per prompt token of a request that runs alone; 0: not measured.
    pub prefill_us_per_token: u32,
    /// Expected time to load it; 0: loaded or not known.
    pub load_ms: u32,
    /// Vocabulary and chat template.
    pub tokenizer: TokenizerDigest,
    /// Results do not depend on what shares a batch.
    pub exact: bool,
    /// The engine's build and execution class, at most [`BUILD_BYTES_MAX`] bytes. Two nodes that serve the same model in
    /// exact mode with equal builds give bit-equal results.
    pub build: String,
}

impl ServedModel {
    fn check(&self) -> Result<(), MessageError> {
        if self.name.is_empty() {
            return Err(MessageError::Missing("model name"));
        }
        check::text("model name", &self.name, MODEL_NAME_BYTES_MAX)?;
        check::text("build", &self.build, BUILD_BYTES_MAX)
    }

    pub(super) fn to_proto(&self) -> Result<proto::ServedModel, MessageError> {
        self.check()?;
        Ok(proto::ServedModel {
            digest: self.digest.as_bytes().to_vec(),
            name: self.name.clone(),
            state: self.state.to_wire(),
            context_tokens: self.context_tokens,
            parallel: self.parallel,
            running: self.running,
            queued: self.queued,
            decode_us_per_token: self.decode_us_per_token,
            prefill_us_per_token: self.prefill_us_per_token,
            tokenizer: self.tokenizer.as_bytes().to_vec(),
            exact: self.exact,
            build: self.build.clone(),
            load_ms: self.load_ms,
        })
    }

    pub(super) fn from_proto(proto: proto::ServedModel) -> Result<ServedModel, MessageError> {
        let model = ServedModel {
            digest: ModelDigest::from_bytes(check::array("model digest", &proto.digest)?),
            name: proto.name,
            state: ModelState::from_wire(proto.state),
            context_tokens: proto.context_tokens,
            parallel: proto.parallel,
            running: proto.running,
            queued: proto.queued,
            decode_us_per_token: proto.decode_us_per_token,
            prefill_us_per_token: proto.prefill_us_per_token,
            load_ms: proto.load_ms,
            tokenizer: TokenizerDigest::from_bytes(check::array("tokenizer digest", &proto.tokenizer)?),
            exact: proto.exact,
            build: proto.build,
        };
        model.check()?;
        Ok(model)
    }
}
