//! What a node serves: one entry per model in its record, and one per model of which it computes, or would compute, a range
//! of layers.

use super::check::{self, open_enum};
use super::error::MessageError;
use super::id::{ModelDigest, TokenizerDigest, VocabularyId};
use super::proto;

/// Models in one record.
pub const MODELS_MAX: usize = 32;
/// Stages in one record.
pub const STAGES_MAX: usize = 16;
/// Layers of one model.
pub const LAYERS_MAX: u32 = 1_024;
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
    /// It would guess what larger models say, for nodes nearby. `None`: it would not, or its node is of a version that cannot.
    pub guesses: Option<GuessOffer>,
}

/// What a driver must know of a model that would guess for its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuessOffer {
    /// Its tokens.
    pub vocabulary: VocabularyId,
    /// Length of its file: a guess takes the time in which that much is read.
    pub file_bytes: u64,
}

impl GuessOffer {
    fn to_proto(self) -> proto::GuessOffer {
        proto::GuessOffer { vocabulary: self.vocabulary.as_bytes().to_vec(), file_bytes: self.file_bytes }
    }

    fn from_proto(proto: &proto::GuessOffer) -> Result<GuessOffer, MessageError> {
        let vocabulary = VocabularyId::from_bytes(check::array("vocabulary id", &proto.vocabulary)?);
        Ok(GuessOffer { vocabulary, file_bytes: proto.file_bytes })
    }
}

impl ServedModel {
    pub(super) fn to_proto(&self) -> Result<proto::ServedModel, MessageError> {
        check_name_and_build(&self.name, &self.build)?;
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
            guesses: self.guesses.map(GuessOffer::to_proto),
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
            guesses: proto.guesses.as_ref().map(GuessOffer::from_proto).transpose()?,
        };
        check_name_and_build(&model.name, &model.build)?;
        Ok(model)
    }
}

/// A range of a model's layers that a node holds for rings, or its offer to hold one. Figures are the node's own
/// measurements, as in [`ServedModel`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServedStage {
    /// Which model.
    pub digest: ModelDigest,
    /// Its name for people and for the API, 1..=[`MODEL_NAME_BYTES_MAX`] bytes.
    pub name: String,
    /// Layers of the whole model, 1..=[`LAYERS_MAX`].
    pub layers: u32,
    /// First layer held.
    pub first: u32,
    /// Layer after the last one held, at most `layers`; `first`: none is held yet.
    pub end: u32,
    /// How far the stage is from computing. [`ModelState::Available`]: it would be loaded when a driver asks; with layers
    /// held, these are loaded, and nobody uses them.
    pub state: ModelState,
    /// Tokens that one request may have, prompt and answer together.
    pub context_tokens: u32,
    /// Requests that run at once.
    pub parallel: u32,
    /// Results do not depend on what shares a batch.
    pub exact: bool,
    /// The engine's build and execution class, at most [`BUILD_BYTES_MAX`] bytes, as in [`ServedModel::build`].
    pub build: String,
    /// Most memory that the node would give to layers of this model, weights and KV together.
    pub memory_bytes: u64,
    /// Measured time of a token of a request that runs alone in a layer of average cost; the head counts as the layers that it is worth.
    /// 0: not measured.
    pub decode_us_per_layer: u32,
    /// Measured time of a row of a prompt chunk in a layer of average cost; 0: not measured.
    pub prefill_us_per_layer: u32,
    /// Most layers that the node would hold; 0: as many as fit.
    pub layers_max: u32,
}

impl ServedStage {
    fn check(&self) -> Result<(), MessageError> {
        check_name_and_build(&self.name, &self.build)?;
        check_layers(self.first, self.end, self.layers)
    }

    pub(super) fn to_proto(&self) -> Result<proto::ServedStage, MessageError> {
        self.check()?;
        Ok(proto::ServedStage {
            digest: self.digest.as_bytes().to_vec(),
            name: self.name.clone(),
            state: self.state.to_wire(),
            layers: self.layers,
            first: self.first,
            end: self.end,
            context_tokens: self.context_tokens,
            parallel: self.parallel,
            exact: self.exact,
            build: self.build.clone(),
            memory_bytes: self.memory_bytes,
            decode_us_per_layer: self.decode_us_per_layer,
            prefill_us_per_layer: self.prefill_us_per_layer,
            layers_max: self.layers_max,
        })
    }

    pub(super) fn from_proto(proto: proto::ServedStage) -> Result<ServedStage, MessageError> {
        let stage = ServedStage {
            digest: ModelDigest::from_bytes(check::array("model digest", &proto.digest)?),
            name: proto.name,
            layers: proto.layers,
            first: proto.first,
            end: proto.end,
            state: ModelState::from_wire(proto.state),
            context_tokens: proto.context_tokens,
            parallel: proto.parallel,
            exact: proto.exact,
            build: proto.build,
            memory_bytes: proto.memory_bytes,
            decode_us_per_layer: proto.decode_us_per_layer,
            prefill_us_per_layer: proto.prefill_us_per_layer,
            layers_max: proto.layers_max,
        };
        stage.check()?;
        Ok(stage)
    }
}

fn check_name_and_build(name: &str, build: &str) -> Result<(), MessageError> {
    if name.is_empty() {
        return Err(MessageError::Missing("model name"));
    }
    check::text("model name", name, MODEL_NAME_BYTES_MAX)?;
    check::text("build", build, BUILD_BYTES_MAX)
}

/// Refuses a range `first..end` that does not lie within a model of `layers`; an empty one passes.
pub(super) fn check_layers(first: u32, end: u32, layers: u32) -> Result<(), MessageError> {
    if !(1..=LAYERS_MAX).contains(&layers) {
        return Err(MessageError::Invalid { what: "layers", why: "a model has from 1 to 1024" });
    }
    if first > end || end > layers {
        return Err(MessageError::Invalid { what: "layer range", why: "it does not lie within the model's layers" });
    }
    Ok(())
}
