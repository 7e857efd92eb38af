//! How a ring of stages over several machines begins: what a driver asks of the host of a stage, and of a node whose model guesses for it,
//! and how one host greets the next. All else on these streams are [`crate::frame`]s; [`super::work`] shows them in order.

use super::body::Body;
use super::check;
use super::error::MessageError;
use super::id::{ModelDigest, RingId, VocabularyId};
use super::model::{BUILD_BYTES_MAX, check_layers};
use super::open::REQUEST_TOKENS_MAX;
use super::proto;

/// Requests that a stage may be asked to run at once.
pub const STAGE_PARALLEL_MAX: u32 = 256;

/// A driver asks a host to be a stage of its ring.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StageOpen {
    /// Which model.
    pub model: ModelDigest,
    /// First layer of the stage. A stage that begins at 0 embeds tokens.
    pub first: u32,
    /// Layer after its last one, above `first`. A stage that ends at `layers` samples.
    pub end: u32,
    /// Layers of the whole model, 1..=[`LAYERS_MAX`](super::model::LAYERS_MAX); not served if the model has another number.
    pub layers: u32,
    /// Tokens that one request may have, prompt and answer together, 1..=[`REQUEST_TOKENS_MAX`].
    pub context_tokens: u32,
    /// Requests that run at once, 1..=[`STAGE_PARALLEL_MAX`].
    pub parallel: u32,
    /// The stage must compute in exact mode.
    pub exact: bool,
    /// The build that must serve it, since another's tokens may differ; `None`: any.
    pub build: Option<String>,
    /// What the driver calls the ring: the host of the stage before names it in [`Work::Hop`](super::Work::Hop).
    pub ring: RingId,
}

impl StageOpen {
    fn check(&self) -> Result<(), MessageError> {
        check_layers(self.first, self.end, self.layers)?;
        if self.first == self.end {
            return Err(MessageError::Invalid { what: "layer range", why: "it is empty" });
        }
        check_size(self.context_tokens, self.parallel)?;
        self.build.as_ref().map_or(Ok(()), |build| check::text("build", build, BUILD_BYTES_MAX))
    }
}

impl Body for StageOpen {
    type Proto = proto::StageOpen;
    const WHAT: &'static str = "request for a stage";
    const BYTES_MAX: usize = 1_024;

    fn to_proto(&self) -> Result<proto::StageOpen, MessageError> {
        self.check()?;
        Ok(proto::StageOpen {
            model: self.model.as_bytes().to_vec(),
            first: self.first,
            end: self.end,
            layers: self.layers,
            context_tokens: self.context_tokens,
            parallel: self.parallel,
            exact: self.exact,
            build: self.build.clone(),
            ring: self.ring.as_bytes().to_vec(),
        })
    }

    fn from_proto(proto: proto::StageOpen) -> Result<StageOpen, MessageError> {
        let open = StageOpen {
            model: ModelDigest::from_bytes(check::array("model digest", &proto.model)?),
            first: proto.first,
            end: proto.end,
            layers: proto.layers,
            context_tokens: proto.context_tokens,
            parallel: proto.parallel,
            exact: proto.exact,
            build: proto.build,
            ring: RingId::from_bytes(check::array("ring id", &proto.ring)?),
        };
        open.check()?;
        Ok(open)
    }
}

/// A driver asks a node to have one of its models, all of it, guess what the driver's own will say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DraftOpen {
    /// Which model.
    pub model: ModelDigest,
    /// The vocabulary that it must have.
    pub vocabulary: VocabularyId,
    /// Tokens that one request may have, prompt and answer together, 1..=[`REQUEST_TOKENS_MAX`].
    pub context_tokens: u32,
    /// Requests that run at once, 1..=[`STAGE_PARALLEL_MAX`].
    pub parallel: u32,
}

impl Body for DraftOpen {
    type Proto = proto::DraftOpen;
    const WHAT: &'static str = "request for guesses";
    const BYTES_MAX: usize = 256;

    fn to_proto(&self) -> Result<proto::DraftOpen, MessageError> {
        check_size(self.context_tokens, self.parallel)?;
        Ok(proto::DraftOpen {
            model: self.model.as_bytes().to_vec(),
            vocabulary: self.vocabulary.as_bytes().to_vec(),
            context_tokens: self.context_tokens,
            parallel: self.parallel,
        })
    }

    fn from_proto(proto: proto::DraftOpen) -> Result<DraftOpen, MessageError> {
        check_size(proto.context_tokens, proto.parallel)?;
        Ok(DraftOpen {
            model: ModelDigest::from_bytes(check::array("model digest", &proto.model)?),
            vocabulary: VocabularyId::from_bytes(check::array("vocabulary id", &proto.vocabulary)?),
            context_tokens: proto.context_tokens,
            parallel: proto.parallel,
        })
    }
}

fn check_size(context_tokens: u32, parallel: u32) -> Result<(), MessageError> {
    if !(1..=REQUEST_TOKENS_MAX).contains(&(context_tokens as usize)) {
        return Err(MessageError::Invalid { what: "context_tokens", why: "it must be from 1 to 1048576" });
    }
    if !(1..=STAGE_PARALLEL_MAX).contains(&parallel) {
        return Err(MessageError::Invalid { what: "parallel", why: "it must be from 1 to 256" });
    }
    Ok(())
}

/// The body of [`Work::Hop`](super::Work::Hop).
pub(super) struct Hop(pub(super) RingId);

impl Body for Hop {
    type Proto = proto::Hop;
    const WHAT: &'static str = "hop";
    const BYTES_MAX: usize = 256;

    fn to_proto(&self) -> Result<proto::Hop, MessageError> {
        Ok(proto::Hop { ring: self.0.as_bytes().to_vec() })
    }

    fn from_proto(proto: proto::Hop) -> Result<Hop, MessageError> {
        Ok(Hop(RingId::from_bytes(check::array("ring id", &proto.ring)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::model::LAYERS_MAX;

    fn good() -> proto::StageOpen {
        proto::StageOpen {
            model: vec![1; 32],
            first: 0,
            end: LAYERS_MAX,
            layers: LAYERS_MAX,
            context_tokens: REQUEST_TOKENS_MAX as u32,
            parallel: STAGE_PARALLEL_MAX,
            exact: true,
            build: Some("b".repeat(BUILD_BYTES_MAX)),
            ring: vec![2; 16],
        }
    }

    #[test]
    fn a_request_for_a_stage_at_every_limit_is_read_and_written() {
        let open = StageOpen::from_proto(good()).unwrap();
        assert_eq!(open.to_proto(), Ok(good()));
        let least = proto::StageOpen { first: LAYERS_MAX - 1, context_tokens: 1, parallel: 1, build: None, ..good() };
        assert_eq!(StageOpen::from_proto(least.clone()).and_then(|open| open.to_proto()), Ok(least));
    }

    #[test]
    fn a_request_for_a_stage_that_breaks_a_rule_is_not_read() {
        let broken = [
            (proto::StageOpen { model: Vec::new(), ..good() }, "model digest is missing"),
            (proto::StageOpen { model: vec![1; 31], ..good() }, "model digest is not valid: it has the wrong length"),
            (proto::StageOpen { ring: Vec::new(), ..good() }, "ring id is missing"),
            (proto::StageOpen { ring: vec![2; 32], ..good() }, "ring id is not valid: it has the wrong length"),
            (proto::StageOpen { layers: 0, ..good() }, "layers is not valid: a model has from 1 to 1024"),
            (proto::StageOpen { layers: LAYERS_MAX + 1, ..good() }, "layers is not valid: a model has from 1 to 1024"),
            (
                proto::StageOpen { end: LAYERS_MAX + 1, ..good() },
                "layer range is not valid: it does not lie within the model's layers",
            ),
            (
                proto::StageOpen { first: 8, end: 7, ..good() },
                "layer range is not valid: it does not lie within the model's layers",
            ),
            (proto::StageOpen { first: 7, end: 7, ..good() }, "layer range is not valid: it is empty"),
            (
                proto::StageOpen { context_tokens: 0, ..good() },
                "context_tokens is not valid: it must be from 1 to 1048576",
            ),
            (
                proto::StageOpen { context_tokens: (1 << 20) + 1, ..good() },
                "context_tokens is not valid: it must be from 1 to 1048576",
            ),
            (proto::StageOpen { parallel: 0, ..good() }, "parallel is not valid: it must be from 1 to 256"),
            (proto::StageOpen { parallel: 257, ..good() }, "parallel is not valid: it must be from 1 to 256"),
            (proto::StageOpen { build: Some("b".repeat(65)), ..good() }, "build: 65 bytes, and 64 are the limit"),
            (
                proto::StageOpen { build: Some("a\nb".into()), ..good() },
                "build is not valid: it holds control characters",
            ),
        ];
        for (proto, message) in broken {
            assert_eq!(StageOpen::from_proto(proto).unwrap_err().to_string(), message);
        }
    }
}
