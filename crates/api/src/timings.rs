//! `timings`, llama-server's account of the time an answer took: its clients show speeds from it.

use std::time::Duration;

use serde_json::{Value, json};

use crate::backend::{Completion, Guesses};

/// How long the parts of an answer took.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Timings {
    cached_tokens: u32,
    /// Prompt tokens that were computed.
    prompt_tokens: u32,
    prompt: Duration,
    predicted_tokens: u32,
    predicted: Duration,
    pub(crate) guesses: Guesses,
}

impl Timings {
    pub(crate) fn of(completion: &Completion) -> Timings {
        Timings {
            cached_tokens: completion.cached_tokens,
            prompt_tokens: completion.prompt_tokens.saturating_sub(completion.cached_tokens),
            prompt: completion.prefill,
            predicted_tokens: completion.completion_tokens,
            predicted: completion.decode,
            guesses: completion.guesses,
        }
    }

    /// Of two generations that ran beside each other: tokens add up, times do not.
    pub(crate) fn beside(self, other: Timings) -> Timings {
        Timings {
            cached_tokens: self.cached_tokens.saturating_add(other.cached_tokens),
            prompt_tokens: self.prompt_tokens.saturating_add(other.prompt_tokens),
            prompt: self.prompt.max(other.prompt),
            predicted_tokens: self.predicted_tokens.saturating_add(other.predicted_tokens),
            predicted: self.predicted.max(other.predicted),
            guesses: self.guesses.and(other.guesses),
        }
    }

    /// With llama-server's names. Rates of nothing are 0, as JSON has no NaN.
    pub(crate) fn render(&self) -> Value {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let ratio = |a: f64, b: f64| if b > 0.0 { a / b } else { 0.0 };
        let (prompt, predicted) = (f64::from(self.prompt_tokens), f64::from(self.predicted_tokens));
        let mut timings = json!({
            "cache_n": self.cached_tokens,
            "prompt_n": self.prompt_tokens,
            "prompt_ms": ms(self.prompt),
            "prompt_per_token_ms": ratio(ms(self.prompt), prompt),
            "prompt_per_second": ratio(prompt, self.prompt.as_secs_f64()),
            "predicted_n": self.predicted_tokens,
            "predicted_ms": ms(self.predicted),
            "predicted_per_token_ms": ratio(ms(self.predicted), predicted),
            "predicted_per_second": ratio(predicted, self.predicted.as_secs_f64()),
        });
        if self.guesses.count() > 0 {
            timings["draft_n"] = self.guesses.count().into();
            timings["draft_n_accepted"] = self.guesses.right.into();
        }
        timings
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_took_no_time_or_did_nothing_has_a_rate_of_zero() {
        let nothing = Timings {
            cached_tokens: 7,
            prompt_tokens: 0,
            prompt: Duration::from_millis(5),
            predicted_tokens: 1,
            predicted: Duration::ZERO,
            guesses: Guesses::default(),
        };
        let rendered = nothing.render();
        assert_eq!((&rendered["prompt_per_token_ms"], &rendered["predicted_per_second"]), (&json!(0.0), &json!(0.0)));
        let both = nothing.beside(Timings { predicted: Duration::from_secs(2), predicted_tokens: 9, ..nothing });
        assert_eq!(both.render()["predicted_per_second"], json!(5.0));
    }
}
