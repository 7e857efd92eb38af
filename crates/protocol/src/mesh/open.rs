//! The request that a driver sends to a worker: all that determines its tokens, so that any worker with the same model can
//! take it up at any token.

use super::body::Body;
use super::check;
use super::error::MessageError;
use super::hello::Capabilities;
use super::id::{ModelDigest, RequestId, TokenizerDigest};
use super::model::BUILD_BYTES_MAX;
use super::proto;
use crate::sampling::{Grammar, SamplingParams, Token};

/// Tokens of prompt and answer together.
pub const REQUEST_TOKENS_MAX: usize = 1 << 20;
/// Entries of `logit_bias`.
pub const LOGIT_BIAS_MAX: usize = 65_536;
/// Length of a grammar.
pub const GRAMMAR_BYTES_MAX: usize = 256 << 10;

/// A request.
#[derive(Debug, Clone, PartialEq)]
pub struct Open {
    /// Names the request in both ends' logs; the same at every worker that it moves to.
    pub request: RequestId,
    /// Which model.
    pub model: ModelDigest,
    /// The build that must serve it, since another's tokens may differ; `None`: any.
    pub build: Option<String>,
    /// The worker must compute in exact mode.
    pub exact: bool,
    /// What the driver tokenised with: not served if it is not the model's.
    pub tokenizer: TokenizerDigest,
    /// Prompt tokens, at least one; ids are not negative.
    pub prompt: Vec<Token>,
    /// Tokens of the answer that the driver already has, in order; ids are not negative.
    pub generated: Vec<Token>,
    /// Most tokens of the answer, `generated` included, which must be fewer.
    pub max_tokens: u32,
    /// How to sample. Ranges are the sampler's to check; every bit of every number arrives as it was.
    pub sampling: SamplingParams,
    /// What the worker must be able to do to honour the request as a whole. A worker that lacks a bit, perhaps because it
    /// is older than the bit, refuses.
    pub requires: Capabilities,
}

impl Open {
    fn check(&self) -> Result<(), MessageError> {
        const TOKENS: &str = "tokens";
        if self.prompt.is_empty() {
            return Err(MessageError::Missing("prompt"));
        }
        check::count(TOKENS, self.prompt.len().saturating_add(self.generated.len()), REQUEST_TOKENS_MAX)?;
        if self.prompt.iter().chain(&self.generated).any(|&token| token < 0) {
            return Err(MessageError::Invalid { what: TOKENS, why: "a token id is negative" });
        }
        if self.generated.len() as u64 >= u64::from(self.max_tokens) {
            return Err(MessageError::Invalid { what: "max_tokens", why: "nothing is left to generate" });
        }
        if let Some(build) = &self.build {
            check::text("build", build, BUILD_BYTES_MAX)?;
        }
        Ok(())
    }
}

impl Body for Open {
    type Proto = proto::Open;
    const WHAT: &'static str = "request";
    const BYTES_MAX: usize = 4 * REQUEST_TOKENS_MAX + 8 * LOGIT_BIAS_MAX + GRAMMAR_BYTES_MAX + 1_024;

    fn to_proto(&self) -> Result<proto::Open, MessageError> {
        self.check()?;
        Ok(proto::Open {
            request: self.request.as_bytes().to_vec(),
            model: self.model.as_bytes().to_vec(),
            build: self.build.clone(),
            exact: self.exact,
            tokenizer: self.tokenizer.as_bytes().to_vec(),
            prompt: self.prompt.clone(),
            generated: self.generated.clone(),
            max_tokens: self.max_tokens,
            sampling: Some(sampling_to_proto(&self.sampling)?),
            requires: self.requires.0,
        })
    }

    fn from_proto(proto: proto::Open) -> Result<Open, MessageError> {
        let open = Open {
            request: RequestId::from_bytes(check::array("request id", &proto.request)?),
            model: ModelDigest::from_bytes(check::array("model digest", &proto.model)?),
            build: proto.build,
            exact: proto.exact,
            tokenizer: TokenizerDigest::from_bytes(check::array("tokenizer digest", &proto.tokenizer)?),
            prompt: proto.prompt,
            generated: proto.generated,
            max_tokens: proto.max_tokens,
            sampling: sampling_from_proto(proto.sampling.ok_or(MessageError::Missing("sampling"))?)?,
            requires: Capabilities(proto.requires),
        };
        open.check()?;
        Ok(open)
    }
}

fn sampling_to_proto(params: &SamplingParams) -> Result<proto::Sampling, MessageError> {
    check::count("logit_bias", params.logit_bias.len(), LOGIT_BIAS_MAX)?;
    // Taken apart, so that a new parameter cannot be forgotten here.
    let SamplingParams {
        temperature,
        top_k,
        top_p,
        min_p,
        typical_p,
        repeat_penalty,
        presence_penalty,
        frequency_penalty,
        penalty_last_n,
        logit_bias,
        seed,
        ignore_eos,
        top_logprobs,
        grammar,
    } = params;
    Ok(proto::Sampling {
        temperature: Some(*temperature),
        top_k: Some(*top_k),
        top_p: Some(*top_p),
        min_p: Some(*min_p),
        typical_p: Some(*typical_p),
        repeat_penalty: Some(*repeat_penalty),
        presence_penalty: Some(*presence_penalty),
        frequency_penalty: Some(*frequency_penalty),
        penalty_last_n: Some(*penalty_last_n),
        bias_tokens: logit_bias.iter().map(|&(token, _)| token).collect(),
        bias_values: logit_bias.iter().map(|&(_, bias)| bias).collect(),
        seed: *seed,
        ignore_eos: *ignore_eos,
        top_logprobs: top_logprobs.map(u32::from),
        grammar: grammar.as_ref().map(grammar_to_proto).transpose()?,
    })
}

fn sampling_from_proto(proto: proto::Sampling) -> Result<SamplingParams, MessageError> {
    const TOP: MessageError = MessageError::Invalid { what: "top_logprobs", why: "255 is the limit" };
    let default = SamplingParams::default();
    Ok(SamplingParams {
        temperature: proto.temperature.unwrap_or(default.temperature),
        top_k: proto.top_k.unwrap_or(default.top_k),
        top_p: proto.top_p.unwrap_or(default.top_p),
        min_p: proto.min_p.unwrap_or(default.min_p),
        typical_p: proto.typical_p.unwrap_or(default.typical_p),
        repeat_penalty: proto.repeat_penalty.unwrap_or(default.repeat_penalty),
        presence_penalty: proto.presence_penalty.unwrap_or(default.presence_penalty),
        frequency_penalty: proto.frequency_penalty.unwrap_or(default.frequency_penalty),
        penalty_last_n: proto.penalty_last_n.unwrap_or(default.penalty_last_n),
        logit_bias: pairs("logit_bias", proto.bias_tokens, proto.bias_values, LOGIT_BIAS_MAX)?,
        seed: proto.seed,
        ignore_eos: proto.ignore_eos,
        top_logprobs: proto.top_logprobs.map(|count| u8::try_from(count).map_err(|_| TOP)).transpose()?,
        grammar: proto.grammar.map(grammar_from_proto).transpose()?,
    })
}

/// Tokens with the values at the same places.
pub(super) fn pairs(
    what: &'static str,
    tokens: Vec<Token>,
    values: Vec<f32>,
    limit: usize,
) -> Result<Vec<(Token, f32)>, MessageError> {
    check::count(what, tokens.len(), limit)?;
    if tokens.len() != values.len() {
        return Err(MessageError::Invalid { what, why: "not one value per token" });
    }
    Ok(tokens.into_iter().zip(values).collect())
}

fn grammar_to_proto(grammar: &Grammar) -> Result<proto::Grammar, MessageError> {
    use proto::grammar::Kind;
    let bounded = |text: &String| grammar_text(text).map(|()| text.clone());
    let kind = match grammar {
        Grammar::JsonObject => Kind::JsonObject(proto::Empty {}),
        Grammar::JsonSchema(text) => Kind::JsonSchema(bounded(text)?),
        Grammar::Regex(text) => Kind::Regex(bounded(text)?),
        Grammar::Lark(text) => Kind::Lark(bounded(text)?),
    };
    Ok(proto::Grammar { kind: Some(kind) })
}

/// A constraint that cannot be honoured must not be dropped: a kind that is not known is an error.
fn grammar_from_proto(proto: proto::Grammar) -> Result<Grammar, MessageError> {
    use proto::grammar::Kind;
    let bounded = |text: String| grammar_text(&text).map(|()| text);
    Ok(match proto.kind.ok_or(MessageError::Unsupported("grammar"))? {
        Kind::JsonObject(proto::Empty {}) => Grammar::JsonObject,
        Kind::JsonSchema(text) => Grammar::JsonSchema(bounded(text)?),
        Kind::Regex(text) => Grammar::Regex(bounded(text)?),
        Kind::Lark(text) => Grammar::Lark(bounded(text)?),
    })
}

fn grammar_text(text: &str) -> Result<(), MessageError> {
    check::size("grammar", text.len(), GRAMMAR_BYTES_MAX)
}
