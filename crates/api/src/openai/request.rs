//! What chat and completion requests have in common: model, sampling, limits, streaming.

use std::{ops::RangeInclusive, sync::Arc};

use murmur_protocol::sampling::{SamplingParams, Token};
use serde_json::Value;

use crate::{
    backend::{Backend, ModelCard, ModelKind, ModelState},
    errors::ApiError,
    fields::{Fields, out_of_range, shorten, too_long, too_many, wrong_type},
    limits::{MAX_CHOICES, MAX_LOGIT_BIAS, MAX_N, MAX_STOP_BYTES, MAX_STOP_STRINGS},
};

/// Names that mean "a model that is there".
const ANY_MODEL: [&str; 2] = ["auto", "default"];
/// Random seeds stay below 2^53, so that a client whose numbers are doubles can send one back unchanged.
const RANDOM_SEED_BITS: u32 = 53;

/// What is asked of every generating endpoint.
pub(crate) struct Common {
    pub(crate) model: Arc<ModelCard>,
    pub(crate) sampling: SamplingParams,
    pub(crate) stop: Vec<String>,
    /// Answers per prompt.
    pub(crate) n: usize,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
}

impl Common {
    pub(crate) async fn read(fields: &mut Fields, backend: &dyn Backend) -> Result<Self, ApiError> {
        let stream = fields.boolean("stream")?.unwrap_or(false);
        Ok(Common {
            model: model(fields, backend, Some(ModelKind::Generate)).await?,
            sampling: sampling(fields)?,
            stop: stop(fields)?,
            n: fields.integer("n", 1..=i64::from(MAX_N))?.unwrap_or(1) as usize,
            stream,
            include_usage: include_usage(fields, stream)?,
        })
    }

    /// The sampling parameters of the answer number `i` to a prompt.
    pub(crate) fn sampling_of(&self, i: usize) -> SamplingParams {
        SamplingParams { seed: self.sampling.seed.wrapping_add(i as u64), ..self.sampling.clone() }
    }
}

/// The model that `model` names, ready to be used.
pub(crate) async fn model(
    fields: &mut Fields,
    backend: &dyn Backend,
    wanted: Option<ModelKind>,
) -> Result<Arc<ModelCard>, ApiError> {
    let named = named(fields, backend, wanted)?;
    Ok(backend.prepare(named).await?)
}

/// The model that `model` names. `auto` is the first that can be asked now, in the order in which they are listed, loaded
/// ones before others; no name at all is the only one there is.
fn named(fields: &mut Fields, backend: &dyn Backend, wanted: Option<ModelKind>) -> Result<Arc<ModelCard>, ApiError> {
    let name = fields.string("model")?;
    let models = backend.models();
    let suits = |model: &ModelCard| wanted.is_none_or(|kind| kind == model.kind);
    let suitable = || models.iter().filter(|model| suits(model));
    let names = || suitable().map(|model| format!("`{}`", model.id)).collect::<Vec<_>>().join(", ");
    if let Some(name) = &name
        && let Some(model) = models.iter().find(|model| model.id == *name)
    {
        if suits(model) {
            return Ok(model.clone());
        }
        let message = match model.kind {
            ModelKind::Embed => {
                format!("`{name}` makes embeddings only; ask it at /v1/embeddings.")
            }
            ModelKind::Generate => format!("`{name}` generates text and makes no embeddings."),
        };
        return Err(ApiError::param("model", message).code("model_not_supported"));
    }
    match name {
        Some(name) if !ANY_MODEL.contains(&name.as_str()) => {
            let advice = match names() {
                names if names.is_empty() => "No suitable model is loaded.".to_owned(),
                names => format!("There is {names}."),
            };
            Err(ApiError::no_such_model(format!("The model `{}` does not exist here. {advice}", shorten(&name))))
        }
        _ => match (suitable().next(), suitable().nth(1)) {
            (None, _) => Err(ApiError::no_such_model("No suitable model is loaded.")),
            (Some(only), None) => Ok(only.clone()),
            // Where none is ready, the first one says when to come back.
            (Some(first), _) if name.is_some() => {
                let ready = suitable().find(|model| model.state == ModelState::Ready);
                let best = ready.or_else(|| suitable().find(|model| model.state.refusal(&model.id).is_none()));
                Ok(best.unwrap_or(first).clone())
            }
            (Some(_), Some(_)) => {
                let message = format!("There are several models; name one in `model`: {}.", names());
                Err(ApiError::param("model", message).code("missing_required_parameter"))
            }
        },
    }
}

/// Parameters that choose tokens. The defaults are OpenAI's; what OpenAI does not have is off.
fn sampling(fields: &mut Fields) -> Result<SamplingParams, ApiError> {
    let default = SamplingParams::default();
    let mut number = |key: &str, range: RangeInclusive<f64>, default: f32| -> Result<f32, ApiError> {
        Ok(fields.number(key, range)?.map_or(default, |number| number as f32))
    };
    let temperature = number("temperature", 0.0..=100.0, default.temperature)?;
    let top_p = number("top_p", 0.0..=1.0, default.top_p)?;
    let min_p = number("min_p", 0.0..=1.0, default.min_p)?;
    let typical_p = number("typical_p", 0.0..=1.0, default.typical_p)?;
    let repeat_penalty = number("repeat_penalty", 0.01..=100.0, default.repeat_penalty)?;
    let presence_penalty = number("presence_penalty", -2.0..=2.0, default.presence_penalty)?;
    let frequency_penalty = number("frequency_penalty", -2.0..=2.0, default.frequency_penalty)?;
    Ok(SamplingParams {
        temperature,
        top_p,
        min_p,
        typical_p,
        repeat_penalty,
        presence_penalty,
        frequency_penalty,
        top_k: fields.integer("top_k", 0..=i64::from(i32::MAX))?.unwrap_or(0) as u32,
        penalty_last_n: fields
            .integer("penalty_last_n", 0..=i64::from(i32::MAX))?
            .map_or(default.penalty_last_n, |tokens| tokens as u32),
        logit_bias: logit_bias(fields)?,
        seed: seed(fields)?,
        ignore_eos: fields.boolean("ignore_eos")?.unwrap_or(false),
        top_logprobs: None,
        grammar: None,
    })
}

/// The seed asked for, or a fresh one: two requests without a seed must not be given the same answer.
fn seed(fields: &mut Fields) -> Result<u64, ApiError> {
    let Some(value) = fields.take("seed") else {
        return Ok(rand::random::<u64>() >> (u64::BITS - RANDOM_SEED_BITS));
    };
    // OpenAI's seeds are signed; ours are the same 64 bits.
    let seed = value.as_u64().or_else(|| crate::fields::as_integer(&value).map(|seed| seed as u64));
    seed.ok_or_else(|| wrong_type("seed", "an integer of 64 bits", &value))
}

fn logit_bias(fields: &mut Fields) -> Result<Vec<(Token, f32)>, ApiError> {
    const RANGE: RangeInclusive<f64> = -100.0..=100.0;
    let Some(map) = fields.object("logit_bias")? else {
        return Ok(Vec::new());
    };
    if map.len() > MAX_LOGIT_BIAS {
        return Err(too_many("logit_bias", "entries", map.len(), MAX_LOGIT_BIAS));
    }
    let read = |(key, value): (String, Value)| {
        let path = format!("logit_bias.{}", shorten(&key));
        let token = key.parse::<Token>().ok().filter(|token| *token >= 0).ok_or_else(|| {
            ApiError::param(&path, format!("`{path}`: a key of `logit_bias` must be a token id.")).code("invalid_value")
        })?;
        let bias = value.as_f64().ok_or_else(|| wrong_type(&path, "a number", &value))?;
        if RANGE.contains(&bias) { Ok((token, bias as f32)) } else { Err(out_of_range(&path, &bias, &RANGE)) }
    };
    map.into_iter().map(read).collect()
}

fn stop(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let texts = match fields.take("stop") {
        None => return Ok(Vec::new()),
        Some(Value::String(text)) => vec![text],
        Some(Value::Array(items)) => {
            if items.len() > MAX_STOP_STRINGS {
                return Err(too_many("stop", "strings", items.len(), MAX_STOP_STRINGS));
            }
            let read = |(index, item)| match item {
                Value::String(text) => Ok(text),
                other => Err(wrong_type(&format!("stop[{index}]"), "a string", &other)),
            };
            items.into_iter().enumerate().map(read).collect::<Result<_, _>>()?
        }
        Some(other) => {
            return Err(wrong_type("stop", "a string or an array of strings", &other));
        }
    };
    for text in &texts {
        if text.is_empty() {
            return Err(ApiError::param("stop", "A stop string must not be empty.").code("invalid_value"));
        }
        if text.len() > MAX_STOP_BYTES {
            return Err(too_long("stop", text.len(), MAX_STOP_BYTES));
        }
    }
    Ok(texts)
}

fn include_usage(fields: &mut Fields, stream: bool) -> Result<bool, ApiError> {
    let Some(mut options) = fields.fields("stream_options")? else {
        return Ok(false);
    };
    if !stream {
        let message = "`stream_options` is allowed only with `stream`: true.";
        return Err(ApiError::param("stream_options", message).code("invalid_value"));
    }
    let include_usage = options.boolean("include_usage")?.unwrap_or(false);
    // OpenAI pads chunks against eavesdroppers who watch their lengths; it may be declined, not asked for.
    if options.boolean("include_obfuscation")? == Some(true) {
        let message = "`stream_options.include_obfuscation` is not supported; leave it out.";
        return Err(ApiError::unsupported("stream_options.include_obfuscation", message));
    }
    options.finish()?;
    Ok(include_usage)
}

/// A limit on generated tokens.
pub(crate) fn token_limit(fields: &mut Fields, key: &str) -> Result<Option<u32>, ApiError> {
    Ok(fields.integer(key, 1..=i64::from(u32::MAX))?.map(|tokens| tokens as u32))
}

/// Refuses more generations than one request may start.
pub(crate) fn check_choices(param: &str, prompts: usize, n: usize) -> Result<(), ApiError> {
    if prompts.saturating_mul(n) <= MAX_CHOICES {
        return Ok(());
    }
    let message =
        format!("{prompts} prompts with n = {n} are more than {MAX_CHOICES} answers; send several requests instead.");
    Err(ApiError::param(param, message).code("array_above_max_length"))
}

/// Token ids.
pub(crate) fn tokens(path: &str, items: &[Value]) -> Result<Vec<Token>, ApiError> {
    items
        .iter()
        .map(|item| {
            item.as_i64()
                .and_then(|id| Token::try_from(id).ok())
                .filter(|id| *id >= 0)
                .ok_or_else(|| wrong_type(path, "an array of token ids", item))
        })
        .collect()
}
