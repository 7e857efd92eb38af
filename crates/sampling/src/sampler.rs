//! One request's sampler: from logits to a token.
//!
//! The order in which a token comes about, and what each step sees:
//!
//! 1. Log-probabilities, if asked for, are those of the softmax of the logits as the model gave them, before anything below. (OpenAI reports
//!    the model's distribution; so a reported value does not depend on temperature, bias, penalties or grammar.)
//! 2. `logit_bias` is added; −100 and below, and −∞, ban.
//! 3. Repeat penalty on the last `penalty_last_n` of prompt and answer, then presence and frequency penalty on the answer.
//! 4. `ignore_eos` bans the tokens that end a generation; the grammar bans what it does not allow.
//! 5. top-k, typical-p, top-p, min-p (`filters.rs`), on probabilities at temperature 1.
//! 6. Of the kept tokens the one with the largest logit + T * G ([`crate::noise`]); at T = 0 the one with the largest logit;
//!    the lower id on a tie.
//!
//! A sampler has no state but the tokens it was given: making one and accepting the tokens that were already generated continues
//! exactly where another one, elsewhere, stopped.

use std::sync::Arc;

use murmur_protocol::sampling::{Sampled, SamplingParams, Token};

use crate::choose;
use crate::error::SamplingError;
use crate::filters::{self, Candidate};
use crate::grammar::GrammarState;
use crate::noise::PositionNoise;
use crate::numeric::{is_broken, mass, max_logit};
use crate::params::{BAN_BIAS, validate};
use crate::penalties::History;
use crate::vocabulary::Vocabulary;

/// Chooses the tokens of one request.
pub struct Sampler {
    params: SamplingParams,
    vocabulary: Arc<Vocabulary>,
    history: History,
    grammar: Option<GrammarState>,
    /// Reused between tokens: the logits as the model gave them, and the tokens that pass the filters.
    raw: Vec<f32>,
    kept: Vec<Candidate>,
}

impl std::fmt::Debug for Sampler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sampler")
            .field("params", &self.params)
            .field("generated", &self.generated().len())
            .finish_non_exhaustive()
    }
}

impl Sampler {
    /// A sampler for a request whose prompt has these tokens. Compiles the grammar, if there is one, which may take
    /// milliseconds (and a second the first time for a vocabulary: see [`Vocabulary::prepare_grammars`]).
    pub fn new(
        params: SamplingParams,
        vocabulary: Arc<Vocabulary>,
        prompt: &[Token],
    ) -> Result<Sampler, SamplingError> {
        validate(&params, &vocabulary)?;
        if let Some(&token) = prompt.iter().find(|token| !vocabulary.contains(**token)) {
            return Err(SamplingError::TokenOutOfRange { place: "the prompt", token, tokens: vocabulary.len() });
        }
        let grammar = match &params.grammar {
            Some(grammar) => Some(GrammarState::new(grammar, &vocabulary)?),
            None => None,
        };
        let history = History::new(&params, prompt);
        Ok(Sampler { params, vocabulary, history, grammar, raw: Vec::new(), kept: Vec::new() })
    }

    /// Chooses the token for absolute `position` (prompt included) from the model's `logits`, one per token of the vocabulary, which it
    /// changes. The token is not part of the history until it is accepted.
    pub fn sample(&mut self, logits: &mut [f32], position: u32) -> Result<Sampled, SamplingError> {
        let tokens = self.vocabulary.len();
        if logits.len() != tokens {
            return Err(SamplingError::LogitsLength { position, logits: logits.len(), tokens });
        }
        let untouched_max = max_logit(logits).ok_or_else(|| not_finite(logits, position))?;
        if self.params.top_logprobs.is_some() {
            self.raw.clear();
            self.raw.extend_from_slice(logits);
        }

        let touched = self.constrain(logits, position)?;
        let max = if touched { max_logit(logits).ok_or_else(|| not_finite(logits, position))? } else { untouched_max };
        if max == f32::NEG_INFINITY {
            return Err(SamplingError::NothingAllowed { position });
        }

        let token = self.choose(logits, max, position) as Token;
        let grammar_ended = match &mut self.grammar {
            Some(grammar) => grammar.ends_with(token, position)?,
            None => false,
        };
        let (logprob, top) = self.log_probabilities(token, untouched_max);
        Ok(Sampled { token, logprob, top, grammar_ended })
    }

    /// Bias, penalties, bans. Whether any logit may have changed.
    fn constrain(&mut self, logits: &mut [f32], position: u32) -> Result<bool, SamplingError> {
        for &(token, bias) in &self.params.logit_bias {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = if bias <= BAN_BIAS { f32::NEG_INFINITY } else { (*logit + bias).min(f32::MAX) };
            }
        }
        self.history.penalise(logits);
        if self.params.ignore_eos {
            for &token in self.vocabulary.end_of_generation() {
                if let Some(logit) = logits.get_mut(token as usize) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        if let Some(grammar) = &mut self.grammar {
            grammar.ban(logits, position)?;
        }
        Ok(self.grammar.is_some()
            || self.params.ignore_eos
            || !self.params.logit_bias.is_empty()
            || self.history.penalises())
    }

    fn choose(&mut self, logits: &[f32], max: f32, position: u32) -> u32 {
        let temperature = self.params.temperature;
        let noise = PositionNoise::new(self.params.seed, position);
        // Only typical-p may drop the most probable token.
        let greedy = temperature == 0.0;
        if !filters::any(&self.params, logits.len()) || (greedy && self.params.typical_p >= 1.0) {
            return match greedy {
                true => choose::greedy(logits, max),
                false => choose::gumbel(logits, max, noise, temperature),
            };
        }
        filters::apply(&self.params, logits, max, &mut self.kept);
        let chosen = match greedy {
            true => choose::greedy_among(&self.kept),
            false => choose::gumbel_among(&self.kept, noise, temperature),
        };
        // Filters keep at least one token.
        chosen.unwrap_or_else(|| choose::greedy(logits, max))
    }

    fn log_probabilities(&mut self, token: Token, max: f32) -> (Option<f32>, Vec<(Token, f32)>) {
        let Some(count) = self.params.top_logprobs else {
            return (None, Vec::new());
        };
        let log_total = f64::from(max) + libm::log(mass(&self.raw, max));
        let log_probability = |logit: f32| (f64::from(logit) - log_total) as f32;
        filters::top_k(&self.raw, usize::from(count), &mut self.kept);
        let top = self.kept.iter().map(|best| (best.token as Token, log_probability(best.logit))).collect();
        let logprob = self.raw.get(token as usize).map(|logit| log_probability(*logit));
        (logprob, top)
    }

    /// Makes the token the next of the answer. On an error nothing changed.
    pub fn accept(&mut self, token: Token) -> Result<(), SamplingError> {
        if !self.vocabulary.contains(token) {
            let tokens = self.vocabulary.len();
            return Err(SamplingError::TokenOutOfRange { place: "the answer", token, tokens });
        }
        if let Some(grammar) = &mut self.grammar {
            grammar.accept(token, self.history.generated())?;
        }
        self.history.push(token);
        Ok(())
    }

    /// Whether an answer ends with this token.
    pub fn ends(&self, token: Token) -> bool {
        !self.params.ignore_eos && self.vocabulary.is_end_of_generation(token)
    }

    /// The accepted tokens, oldest first.
    pub fn generated(&self) -> &[Token] {
        self.history.generated()
    }

    /// Undoes the last `count` accepted tokens. On an error nothing changed.
    pub fn rollback(&mut self, count: usize) -> Result<(), SamplingError> {
        let generated = self.generated().len();
        let Some(left) = generated.checked_sub(count) else {
            return Err(SamplingError::RollbackTooFar { asked: count, generated });
        };
        if let Some(grammar) = &mut self.grammar {
            let (remaining, undone) = self.history.generated().split_at(left);
            grammar.rollback(remaining, undone)?;
        }
        for _ in 0..count {
            self.history.pop();
        }
        Ok(())
    }

    /// The parameters it was made with.
    pub fn params(&self) -> &SamplingParams {
        &self.params
    }
}

fn not_finite(logits: &[f32], position: u32) -> SamplingError {
    let at = logits.iter().position(|logit| is_broken(*logit)).unwrap_or(0);
    let logit = logits.get(at).copied().unwrap_or(f32::NAN);
    SamplingError::LogitNotFinite { position, token: at as Token, logit }
}
