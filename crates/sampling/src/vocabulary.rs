//! What sampling needs to know of a model's vocabulary: the bytes of each token, and which tokens are not text.

use std::sync::{Arc, OnceLock};

use llguidance::ParserFactory;
use murmur_protocol::sampling::Token;

use crate::grammar;

/// How many tokens a vocabulary may have. The largest in use have 262,144.
pub const MAX_VOCABULARY_TOKENS: usize = 1 << 21;
/// How many bytes the tokens of a vocabulary may have together.
pub const MAX_VOCABULARY_BYTES: usize = 1 << 28;

/// What kind of token it is: the kinds of GGUF's `tokenizer.ggml.token_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TokenAttribute {
    /// Text.
    Normal,
    /// Stands for text that the tokenizer cannot encode.
    Unknown,
    /// Structure, not text: begin, end, turn markers.
    Control,
    /// Text that is always one token.
    UserDefined,
    /// A place that was left free.
    Unused,
    /// One byte.
    Byte,
}

/// Why a vocabulary was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VocabularyError {
    /// No tokens.
    #[error("the vocabulary is empty: the model file has no tokenizer")]
    Empty,
    /// Over a limit.
    #[error(
        "the vocabulary has {tokens} tokens of {bytes} bytes together; at most {MAX_VOCABULARY_TOKENS} tokens and {MAX_VOCABULARY_BYTES} bytes are supported"
    )]
    TooLarge {
        /// Number of tokens.
        tokens: usize,
        /// Bytes of all tokens.
        bytes: usize,
    },
    /// Not one attribute per token.
    #[error("the vocabulary has {tokens} tokens but {attributes} attributes: the model file contradicts itself")]
    Attributes {
        /// Number of tokens.
        tokens: usize,
        /// Number of attributes.
        attributes: usize,
    },
    /// A special token's id is not in the vocabulary.
    #[error(
        "the {role} token has id {token}, but the vocabulary has {tokens} tokens: the model file contradicts itself"
    )]
    OutOfRange {
        /// Which special token.
        role: &'static str,
        /// Its id.
        token: Token,
        /// Number of tokens.
        tokens: usize,
    },
}

/// The tokens of a model. Built once per model and shared.
pub struct Vocabulary {
    bytes: Vec<u8>,
    /// Token `i` ends at `ends[i]` in `bytes`.
    ends: Vec<u32>,
    attributes: Vec<TokenAttribute>,
    /// Sorted, without repetition.
    end_of_generation: Vec<Token>,
    bos: Option<Token>,
    eos: Option<Token>,
    /// llguidance's tables, a second of work for a large vocabulary: built when the first grammar comes.
    grammars: OnceLock<Result<Arc<ParserFactory>, String>>,
}

impl std::fmt::Debug for Vocabulary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vocabulary")
            .field("tokens", &self.len())
            .field("end_of_generation", &self.end_of_generation)
            .finish_non_exhaustive()
    }
}

impl Vocabulary {
    /// A vocabulary from each token's bytes and attribute. `eog`: the tokens that end a generation; `eos` is added to them.
    pub fn new(
        pieces: Vec<Vec<u8>>,
        attributes: Vec<TokenAttribute>,
        eog: Vec<Token>,
        bos: Option<Token>,
        eos: Option<Token>,
    ) -> Result<Vocabulary, VocabularyError> {
        let tokens = pieces.len();
        if tokens == 0 {
            return Err(VocabularyError::Empty);
        }
        let total = pieces.iter().fold(0usize, |sum, piece| sum.saturating_add(piece.len()));
        if tokens > MAX_VOCABULARY_TOKENS || total > MAX_VOCABULARY_BYTES {
            return Err(VocabularyError::TooLarge { tokens, bytes: total });
        }
        if attributes.len() != tokens {
            return Err(VocabularyError::Attributes { tokens, attributes: attributes.len() });
        }
        let roles = [("beginning-of-text", bos), ("end-of-text", eos)];
        let named = roles.iter().filter_map(|(role, token)| token.map(|token| (*role, token)));
        for (role, token) in named.chain(eog.iter().map(|token| ("end-of-generation", *token))) {
            if !usize::try_from(token).is_ok_and(|id| id < tokens) {
                return Err(VocabularyError::OutOfRange { role, token, tokens });
            }
        }

        let mut bytes = Vec::with_capacity(total);
        let mut ends = Vec::with_capacity(tokens);
        for piece in pieces {
            bytes.extend_from_slice(&piece);
            ends.push(bytes.len() as u32);
        }
        let mut end_of_generation = eog;
        end_of_generation.extend(eos);
        end_of_generation.sort_unstable();
        end_of_generation.dedup();
        Ok(Vocabulary { bytes, ends, attributes, end_of_generation, bos, eos, grammars: OnceLock::new() })
    }

    /// Number of tokens; at least one.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Never: a vocabulary has at least one token.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Whether the id names a token.
    pub fn contains(&self, token: Token) -> bool {
        usize::try_from(token).is_ok_and(|id| id < self.len())
    }

    /// The token's bytes, as the model's detokeniser gives them; empty for an id that is not in the vocabulary.
    pub fn bytes(&self, token: Token) -> &[u8] {
        let Some(id) = usize::try_from(token).ok().filter(|id| *id < self.len()) else {
            return &[];
        };
        let start = if id == 0 { 0 } else { self.ends[id - 1] as usize };
        &self.bytes[start..self.ends[id] as usize]
    }

    /// What kind of token it is; [`TokenAttribute::Unused`] for an id that is not in the vocabulary.
    pub fn attribute(&self, token: Token) -> TokenAttribute {
        let id = usize::try_from(token).unwrap_or(usize::MAX);
        self.attributes.get(id).copied().unwrap_or(TokenAttribute::Unused)
    }

    /// Whether the token is structure, not text.
    pub fn is_control(&self, token: Token) -> bool {
        self.attribute(token) == TokenAttribute::Control
    }

    /// Whether the token ends a generation.
    pub fn is_end_of_generation(&self, token: Token) -> bool {
        self.end_of_generation.binary_search(&token).is_ok()
    }

    /// The tokens that end a generation, ascending.
    pub fn end_of_generation(&self) -> &[Token] {
        &self.end_of_generation
    }

    /// The token that begins a text, if the model has one.
    pub fn bos(&self) -> Option<Token> {
        self.bos
    }

    /// The token that ends a text, if the model has one.
    pub fn eos(&self) -> Option<Token> {
        self.eos
    }

    /// Compiles grammars for this vocabulary. The first call builds the tables; one may call it early, on a thread that can wait.
    pub(crate) fn grammars(&self) -> Result<Arc<ParserFactory>, String> {
        self.grammars.get_or_init(|| grammar::parser_factory(self).map(Arc::new)).clone()
    }

    /// Builds the tables that grammars need (about a second for a large vocabulary), which otherwise the first grammar pays for.
    pub fn prepare_grammars(&self) {
        let _ = self.grammars();
    }
}
