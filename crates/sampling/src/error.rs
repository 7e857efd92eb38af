//! Why a sampler could not be made or a token not be chosen.

use murmur_protocol::sampling::Token;

/// Why a sampler could not be made or a token not be chosen.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SamplingError {
    /// A parameter is not a number, or outside its range.
    #[error("{name} is {value}, it must be {allowed}")]
    Parameter {
        /// The field of `SamplingParams`.
        name: &'static str,
        /// What it was.
        value: f64,
        /// What it may be.
        allowed: &'static str,
    },
    /// A list is longer than its limit.
    #[error("{name} has {count} entries, at most {limit} are allowed: send fewer")]
    TooMany {
        /// The field of `SamplingParams`.
        name: &'static str,
        /// How many entries it has.
        count: usize,
        /// How many it may have.
        limit: usize,
    },
    /// A token id that the vocabulary does not have.
    #[error("{place} names token {token}, but the model's vocabulary has ids 0 to {last}", last = .tokens.saturating_sub(1))]
    TokenOutOfRange {
        /// Where the id stands.
        place: &'static str,
        /// The id.
        token: Token,
        /// Number of tokens in the vocabulary.
        tokens: usize,
    },
    /// The grammar cannot be used.
    #[error("the {kind} cannot be used: {reason}")]
    Grammar {
        /// What was given: "JSON schema", "regular expression", ...
        kind: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The grammar became too complex, or admits no token of this vocabulary.
    #[error("the grammar cannot continue at position {position}: {reason}")]
    GrammarStuck {
        /// Absolute position of the token to be chosen.
        position: u32,
        /// Why.
        reason: String,
    },
    /// A token was to be accepted that the grammar does not allow here.
    #[error("token {token} does not continue the text as the grammar demands")]
    GrammarRefused {
        /// The token.
        token: Token,
    },
    /// The model's output is not one logit per token.
    #[error("the model gave {logits} logits at position {position}, the vocabulary has {tokens} tokens")]
    LogitsLength {
        /// Absolute position of the token to be chosen.
        position: u32,
        /// How many logits there were.
        logits: usize,
        /// Number of tokens in the vocabulary.
        tokens: usize,
    },
    /// The model computed something that is not a number.
    #[error(
        "the model's logit of token {token} at position {position} is {logit}: its weights or its computation are broken"
    )]
    LogitNotFinite {
        /// Absolute position of the token to be chosen.
        position: u32,
        /// The first such token.
        token: Token,
        /// NaN or +∞.
        logit: f32,
    },
    /// Bans, grammar and model together leave nothing.
    #[error(
        "no token is allowed at position {position}: logit_bias, ignore_eos and the grammar together ban all of them"
    )]
    NothingAllowed {
        /// Absolute position of the token to be chosen.
        position: u32,
    },
    /// Rolling back beyond the first generated token.
    #[error("cannot undo {asked} tokens, only {generated} were generated")]
    RollbackTooFar {
        /// How many were to be undone.
        asked: usize,
        /// How many there are.
        generated: usize,
    },
}
