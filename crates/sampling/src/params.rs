//! What sampling parameters may be.
//!
//! Parameters come from clients and from peers; everything after this check relies on it.

use murmur_protocol::sampling::SamplingParams;

use crate::error::SamplingError;
use crate::vocabulary::Vocabulary;

/// The highest temperature: at it, even logits 100 apart are nearly equal.
pub const TEMPERATURE_MAX: f32 = 100.0;
/// The highest repeat penalty.
pub const REPEAT_PENALTY_MAX: f32 = 100.0;
/// The largest presence and frequency penalty, either sign. (OpenAI's interface allows 2.)
pub const PENALTY_MAX: f32 = 100.0;
/// How many tokens may be biased.
pub const MAX_LOGIT_BIAS_ENTRIES: usize = 65_536;
/// A bias of this or less bans a token, as OpenAI's interface has it.
pub const BAN_BIAS: f32 = -100.0;

/// Refuses what is not a number, out of range or too much. The grammar is checked where it is compiled.
pub(crate) fn validate(params: &SamplingParams, vocabulary: &Vocabulary) -> Result<(), SamplingError> {
    let ranges = [
        ("temperature", params.temperature, 0.0..=TEMPERATURE_MAX, "from 0 to 100"),
        ("top_p", params.top_p, 0.0..=1.0, "from 0 to 1"),
        ("min_p", params.min_p, 0.0..=1.0, "from 0 to 1"),
        ("typical_p", params.typical_p, 0.0..=1.0, "from 0 to 1"),
        ("repeat_penalty", params.repeat_penalty, f32::MIN_POSITIVE..=REPEAT_PENALTY_MAX, "above 0 and at most 100"),
        ("presence_penalty", params.presence_penalty, -PENALTY_MAX..=PENALTY_MAX, "from -100 to 100"),
        ("frequency_penalty", params.frequency_penalty, -PENALTY_MAX..=PENALTY_MAX, "from -100 to 100"),
    ];
    for (name, value, range, allowed) in ranges {
        // Also false for NaN.
        if !range.contains(&value) {
            return Err(SamplingError::Parameter { name, value: f64::from(value), allowed });
        }
    }
    let count = params.logit_bias.len();
    if count > MAX_LOGIT_BIAS_ENTRIES {
        return Err(SamplingError::TooMany { name: "logit_bias", count, limit: MAX_LOGIT_BIAS_ENTRIES });
    }
    for &(token, bias) in &params.logit_bias {
        if !vocabulary.contains(token) {
            return Err(SamplingError::TokenOutOfRange { place: "logit_bias", token, tokens: vocabulary.len() });
        }
        if bias.is_nan() || bias == f32::INFINITY {
            let allowed = "a finite number, or negative infinity to ban the token";
            return Err(SamplingError::Parameter { name: "logit_bias", value: f64::from(bias), allowed });
        }
    }
    Ok(())
}
