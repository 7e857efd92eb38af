//! How the next token is chosen: everything a stage, a validator or a resumed request needs to choose the same one.

use serde::{Deserialize, Serialize};

/// A token id of the model's vocabulary.
pub type Token = i32;

/// The sampling parameters of one request. Together with the prompt and the weights they determine every token:
/// no other randomness exists.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SamplingParams {
    /// 0 is greedy; otherwise logits are divided by it. Finite, 0..=100.
    pub temperature: f32,
    /// Keep the `top_k` most probable tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens at least this fraction as probable as the best; 0 keeps all.
    pub min_p: f32,
    /// Locally typical sampling (Meister et al. 2022); 1 keeps all.
    pub typical_p: f32,
    /// Divides (positive) or multiplies (negative) logits of tokens seen in the last `penalty_last_n`; 1 is off.
    pub repeat_penalty: f32,
    /// Subtracted once from every *generated* token's logit. OpenAI's range is -2..=2.
    pub presence_penalty: f32,
    /// Subtracted per occurrence among the *generated* tokens.
    pub frequency_penalty: f32,
    /// How many tokens (prompt and generated) the repeat penalty looks back on.
    pub penalty_last_n: u32,
    /// Added to the logits, by token id; `-inf` (or -100, as OpenAI says) bans.
    pub logit_bias: Vec<(Token, f32)>,
    /// Keys the noise: the random number of a token depends on (seed, position, token id) only.
    pub seed: u64,
    /// Never choose an end-of-generation token (for measuring).
    pub ignore_eos: bool,
    /// How many alternatives to report with each token's log-probability; `None` reports no log-probabilities.
    pub top_logprobs: Option<u8>,
    /// What the text must match.
    pub grammar: Option<Grammar>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        SamplingParams {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            typical_p: 1.0,
            repeat_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            penalty_last_n: 64,
            logit_bias: Vec::new(),
            seed: 0,
            ignore_eos: false,
            top_logprobs: None,
            grammar: None,
        }
    }
}

/// White space that a JSON grammar admits between two parts: a blank, or a line break or two with indentation. Without a
/// bound a small model may write line breaks until its tokens are spent. Regular expression, as llguidance's
/// `whitespace_pattern` option takes it.
pub const JSON_WHITESPACE_PATTERN: &str = r"\x20|\x0A{1,2}[\x20\x09]{0,20}";

/// A constraint on the generated text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Grammar {
    /// Any JSON object.
    JsonObject,
    /// A JSON Schema, as JSON text.
    JsonSchema(String),
    /// A regular expression over the whole text.
    Regex(String),
    /// A grammar in llguidance's Lark dialect.
    Lark(String),
}

/// A chosen token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sampled {
    /// The token.
    pub token: Token,
    /// Natural log of its probability under the model before temperature and filters; `None` unless asked for.
    pub logprob: Option<f32>,
    /// The most probable tokens with their log-probabilities, best first; empty unless asked for.
    pub top: Vec<(Token, f32)>,
    /// The grammar is complete and accepts nothing more: generation must end here.
    pub grammar_ended: bool,
}
