//! Text that must match a grammar: JSON, JSON Schema, regular expression, Lark; compiled and followed by llguidance.
//!
//! llguidance holds a parser at the end of the text so far and says which tokens may follow. What it knows of the vocabulary is a trie
//! of the tokens' bytes, in which control tokens carry the byte 0xFF in front (which no UTF-8 text contains): no grammar over text
//! ever emits one. Only a Lark grammar that names a special token (`<|name|>`) does. The tokens that end a generation are allowed
//! exactly when the text so far matches the grammar; they are handled here and never reach the parser.
//!
//! llguidance builds its automata lazily and keeps them per request; its limits (below) bound memory and the time of one step, so that a hostile
//! schema costs its own request, with an error, and nothing else. It catches its own panics and returns them as errors.

use std::sync::Arc;

use llguidance::api::{GrammarWithLexer, ParserLimits, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, INVALID_TOKEN, SimpleVob, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use murmur_protocol::sampling::{Grammar, JSON_WHITESPACE_PATTERN, Token};

use crate::error::SamplingError;
use crate::vocabulary::{TokenAttribute, Vocabulary};

/// How long a JSON schema may be.
pub const MAX_SCHEMA_BYTES: usize = 512 * 1024;
/// How long a regular expression may be; the patterns of a JSON schema together. Thousands of optional parts in a row make each
/// step quadratic, unseen by llguidance's fuel: `a*` repeated takes a quarter of a second here, and sixteen times that at four times the length.
pub const MAX_REGEX_BYTES: usize = 8 * 1024;
/// How long a Lark grammar may be, for the same reason.
pub const MAX_LARK_BYTES: usize = 16 * 1024;
/// Lark's intersection and complement are refused, wherever in the text they stand: they make product automata, whose states llguidance's
/// fuel counts too late (nine expressions in 200 bytes took a minute).
pub const REFUSED_LARK_OPERATORS: [char; 2] = ['&', '~'];
/// Steps for building the lexer of a grammar: tens of milliseconds. (A fifth of llguidance's default, with which
/// intersections took minutes; a schema may still have thousands of properties.)
pub const MAX_COMPILE_FUEL: u64 = 200_000;
/// Symbols in the productions of a compiled grammar.
pub const MAX_GRAMMAR_SYMBOLS: usize = 500_000;
/// Lexer steps for one token; 14,000 take about a millisecond.
pub const MAX_STEP_FUEL: u64 = 200_000;
/// Parser items for one token; 20,000 take about a millisecond.
pub const MAX_STEP_ITEMS: usize = 50_000;
/// Lexer states per request, 1 to 2 kB each.
pub const MAX_LEXER_STATES: usize = 50_000;
/// Longer tokens are never chosen under a grammar (the trie's nodes count up to 1,024).
pub const MAX_TOKEN_BYTES: usize = 512;
/// Nodes of the trie: its node format has 22 bits for them.
pub const MAX_TRIE_NODES: usize = (1 << 22) - 1;
/// How much of llguidance's explanation is passed on.
const MAX_REASON_CHARS: usize = 500;
/// Compiling descends into the schema; this is enough for the deepest that JSON parsing lets through.
const COMPILE_STACK_BYTES: usize = 64 * 1024 * 1024;

/// Builds what llguidance needs to know of a vocabulary.
pub(crate) fn parser_factory(vocabulary: &Vocabulary) -> Result<ParserFactory, String> {
    let words: Vec<Vec<u8>> = (0..vocabulary.len() as Token).map(|token| trie_word(vocabulary, token)).collect();
    let nodes = trie_nodes(&words);
    if nodes > MAX_TRIE_NODES {
        return Err(format!("the model's vocabulary has {nodes} distinct prefixes, grammars support {MAX_TRIE_NODES}"));
    }
    let eog = vocabulary.end_of_generation();
    let end = vocabulary.eos().or(eog.first().copied()).map_or(INVALID_TOKEN, |token| token as u32);
    let info = TokRxInfo::new(words.len() as u32, end);
    let mut trie = TokTrie::from(&info, &words);
    if end != INVALID_TOKEN {
        let others = eog.iter().map(|token| *token as u32).filter(|token| *token != end);
        let ends: Vec<u32> = std::iter::once(end).chain(others).collect();
        trie = trie.with_eos_tokens(&ends);
    }
    let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
    let mut factory = ParserFactory::new_simple(&env).map_err(|error| reason_of(&error.to_string()))?;
    factory.quiet();
    *factory.limits_mut() = ParserLimits {
        initial_lexer_fuel: MAX_COMPILE_FUEL,
        max_grammar_size: MAX_GRAMMAR_SYMBOLS,
        step_lexer_fuel: MAX_STEP_FUEL,
        step_max_items: MAX_STEP_ITEMS,
        max_lexer_states: MAX_LEXER_STATES,
        verbose_errors: false,
        ..ParserLimits::default()
    };
    Ok(factory)
}

/// How a token stands in the trie: its bytes if it is text, marked if it is not, empty if a grammar can never choose it.
fn trie_word(vocabulary: &Vocabulary, token: Token) -> Vec<u8> {
    const MARKER: u8 = TokTrie::SPECIAL_TOKEN_MARKER;
    let bytes = vocabulary.bytes(token);
    if bytes.is_empty() || bytes.len() > MAX_TOKEN_BYTES || bytes.contains(&MARKER) {
        return Vec::new();
    }
    let special = match vocabulary.attribute(token) {
        TokenAttribute::Normal | TokenAttribute::UserDefined | TokenAttribute::Byte => {
            vocabulary.is_end_of_generation(token)
        }
        TokenAttribute::Control | TokenAttribute::Unknown => true,
        TokenAttribute::Unused => return Vec::new(),
    };
    match special {
        false => bytes.to_vec(),
        // The marker and a number in brackets is how llguidance writes a token by its id: no name may look like that.
        true if bytes[0] == b'[' => Vec::new(),
        true => [&[MARKER], bytes].concat(),
    }
}

/// How many nodes the trie of these words has.
fn trie_nodes(words: &[Vec<u8>]) -> usize {
    let mut sorted: Vec<&[u8]> = words.iter().map(Vec::as_slice).collect();
    sorted.sort_unstable();
    let mut previous: &[u8] = &[];
    let mut nodes = 1;
    for word in sorted {
        let shared = word.iter().zip(previous).take_while(|(a, b)| a == b).count();
        nodes += word.len() - shared;
        previous = word;
    }
    nodes
}

/// Where a request's text stands in its grammar.
pub(crate) struct GrammarState {
    source: Grammar,
    vocabulary: Arc<Vocabulary>,
    matcher: Matcher,
    /// What may follow; `None` until it is asked for.
    mask: Option<SimpleVob>,
    /// Given to the matcher to see whether it ends the text, but not accepted.
    ahead: Option<Token>,
    /// An end-of-generation token was accepted; the matcher knows nothing of it.
    closed: bool,
}

impl GrammarState {
    pub(crate) fn new(source: &Grammar, vocabulary: &Arc<Vocabulary>) -> Result<GrammarState, SamplingError> {
        let mut matcher = compile(source, vocabulary)?;
        // A grammar that cannot even begin is the client's mistake: say so now.
        let mask = matcher
            .compute_mask_or_eos()
            .map_err(|error| SamplingError::Grammar { kind: kind_of(source), reason: reason_of(&error.to_string()) })?;
        Ok(GrammarState {
            source: source.clone(),
            vocabulary: Arc::clone(vocabulary),
            matcher,
            mask: Some(mask),
            ahead: None,
            closed: false,
        })
    }

    /// Bans what may not follow.
    pub(crate) fn ban(&mut self, logits: &mut [f32], position: u32) -> Result<(), SamplingError> {
        if self.closed {
            return Err(stuck(position, "its end was already generated"));
        }
        self.step_back().map_err(|reason| stuck(position, &reason))?;
        let mask = match self.mask.take() {
            Some(mask) => mask,
            None => {
                self.matcher.compute_mask_or_eos().map_err(|error| stuck(position, &reason_of(&error.to_string())))?
            }
        };
        for (word, chunk) in mask.as_slice().iter().zip(logits.chunks_mut(32)) {
            match *word {
                0 => chunk.fill(f32::NEG_INFINITY),
                u32::MAX => {}
                allowed => {
                    for (bit, logit) in chunk.iter_mut().enumerate() {
                        if allowed >> bit & 1 == 0 {
                            *logit = f32::NEG_INFINITY;
                        }
                    }
                }
            }
        }
        self.mask = Some(mask);
        Ok(())
    }

    /// Whether nothing can follow this token, which the mask allows.
    pub(crate) fn ends_with(&mut self, token: Token, position: u32) -> Result<bool, SamplingError> {
        if self.vocabulary.is_end_of_generation(token) {
            return Ok(true);
        }
        self.matcher.consume_token(token as u32).map_err(|error| stuck(position, &reason_of(&error.to_string())))?;
        self.ahead = Some(token);
        Ok(self.matcher.is_stopped())
    }

    /// `before`: the tokens accepted so far.
    pub(crate) fn accept(&mut self, token: Token, before: &[Token]) -> Result<(), SamplingError> {
        if self.closed {
            return Err(SamplingError::GrammarRefused { token });
        }
        if self.ahead.take_if(|ahead| *ahead == token).is_some() {
            self.mask = None;
            return Ok(());
        }
        let refused = |_| SamplingError::GrammarRefused { token };
        if let Err(reason) = self.step_back() {
            self.rebuild(before).map_err(|_| SamplingError::Grammar { kind: kind_of(&self.source), reason })?;
        }
        if self.vocabulary.is_end_of_generation(token) {
            if !self.matcher.is_accepting().map_err(refused)? {
                return Err(SamplingError::GrammarRefused { token });
            }
            self.closed = true;
            return Ok(());
        }
        // Asking first: a refused token would leave the matcher in an error that nothing undoes.
        if self.matcher.validate_tokens(&[token as u32]).map_err(refused)? != 1 {
            return Err(SamplingError::GrammarRefused { token });
        }
        if let Err(error) = self.matcher.consume_token(token as u32) {
            let reason = reason_of(&error.to_string());
            self.rebuild(before)?;
            return Err(SamplingError::Grammar { kind: kind_of(&self.source), reason });
        }
        self.mask = None;
        Ok(())
    }

    /// Undoes the tokens `undone`, which came after `remaining`.
    pub(crate) fn rollback(&mut self, remaining: &[Token], undone: &[Token]) -> Result<(), SamplingError> {
        if undone.is_empty() {
            return Ok(());
        }
        let consumed = undone.len() - usize::from(self.closed);
        let stepped_back = self.step_back().is_ok();
        if !stepped_back || self.matcher.rollback(consumed).is_err() {
            self.rebuild(remaining)?;
        }
        self.closed = false;
        self.mask = None;
        Ok(())
    }

    /// Takes back the token that was tried but not accepted.
    fn step_back(&mut self) -> Result<(), String> {
        match self.ahead.take() {
            // The mask is still that of the state before it.
            Some(_) => self.matcher.rollback(1).map_err(|error| reason_of(&error.to_string())),
            None => Ok(()),
        }
    }

    /// Begins anew and follows these tokens, none of which ends the generation: for a matcher that cannot step back.
    fn rebuild(&mut self, tokens: &[Token]) -> Result<(), SamplingError> {
        self.matcher = compile(&self.source, &self.vocabulary)?;
        self.mask = None;
        self.ahead = None;
        for &token in tokens {
            self.matcher.consume_token(token as u32).map_err(|_| SamplingError::GrammarRefused { token })?;
        }
        Ok(())
    }
}

fn kind_of(grammar: &Grammar) -> &'static str {
    match grammar {
        Grammar::JsonObject => "JSON grammar",
        Grammar::JsonSchema(_) => "JSON schema",
        Grammar::Regex(_) => "regular expression",
        Grammar::Lark(_) => "Lark grammar",
    }
}

fn stuck(position: u32, reason: &str) -> SamplingError {
    SamplingError::GrammarStuck { position, reason: reason.to_owned() }
}

/// Compiles on a thread of its own: compiling recurses as deep as the schema, and a full stack would end the process.
fn compile(source: &Grammar, vocabulary: &Vocabulary) -> Result<Matcher, SamplingError> {
    let failed = |reason: String| SamplingError::Grammar { kind: kind_of(source), reason };
    let factory = vocabulary.grammars().map_err(failed)?;
    let grammar = read(source).map_err(failed)?;
    let compiled = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("grammar".to_owned()).stack_size(COMPILE_STACK_BYTES);
        let handle = thread.spawn_scoped(scope, || factory.create_parser(grammar));
        handle.map(|handle| handle.join())
    });
    let parser = match compiled {
        Ok(Ok(parser)) => parser,
        Ok(Err(_)) => return Err(failed("its compiler failed on it".to_owned())),
        Err(error) => {
            return Err(failed(format!("no thread to compile it could be started ({error}): try again")));
        }
    };
    let matcher = Matcher::new(parser);
    match matcher.get_error() {
        None => Ok(matcher),
        Some(error) => Err(failed(reason_of(&error))),
    }
}

fn read(source: &Grammar) -> Result<TopLevelGrammar, String> {
    match source {
        Grammar::JsonObject => {}
        Grammar::JsonSchema(text) => within(text.len(), MAX_SCHEMA_BYTES)?,
        Grammar::Regex(text) => within(text.len(), MAX_REGEX_BYTES)?,
        Grammar::Lark(text) => {
            within(text.len(), MAX_LARK_BYTES)?;
            if let Some(operator) = text.chars().find(|char| REFUSED_LARK_OPERATORS.contains(char)) {
                return Err(format!(
                    "it contains `{operator}`: intersection and complement are not supported, because nothing bounds their \
                     cost; write repetition as {{n,m}} and the character as \\u{:04x} in a string or \\x{:02x} in an expression",
                    u32::from(operator),
                    u32::from(operator)
                ));
            }
        }
    }
    let grammar = match source {
        Grammar::JsonObject => json_grammar(serde_json::json!({ "type": "object" })),
        Grammar::JsonSchema(text) => {
            let schema: serde_json::Value =
                serde_json::from_str(text).map_err(|error| format!("it is not valid JSON: {error}"))?;
            within(pattern_bytes(&schema), MAX_REGEX_BYTES)
                .map_err(|reason| format!("its patterns together: {reason}"))?;
            json_grammar(match schema {
                serde_json::Value::Bool(true) => serde_json::json!({}),
                serde_json::Value::Bool(false) => return Err("it allows nothing at all".to_owned()),
                serde_json::Value::Object(_) => schema,
                _ => return Err("a JSON schema is an object or a boolean".to_owned()),
            })
        }
        Grammar::Regex(expression) => {
            let backslashes = expression.bytes().rev().take_while(|byte| *byte == b'\\').count();
            if backslashes % 2 == 1 {
                return Err("it ends in a backslash that escapes nothing".to_owned());
            }
            GrammarWithLexer::from_regex(expression)
        }
        Grammar::Lark(text) => GrammarWithLexer::from_lark(text.clone()),
    };
    Ok(TopLevelGrammar::from_grammar(grammar))
}

fn within(bytes: usize, limit: usize) -> Result<(), String> {
    match bytes > limit {
        true => Err(format!("it has {bytes} bytes, at most {limit} are allowed: make it smaller")),
        false => Ok(()),
    }
}

/// The regular expressions in a schema: `pattern`, the keys of `patternProperties`, and llguidance's own.
/// JSON parsing has bounded how deep this recurses.
fn pattern_bytes(schema: &serde_json::Value) -> usize {
    match schema {
        serde_json::Value::Array(items) => items.iter().map(pattern_bytes).sum(),
        serde_json::Value::Object(object) => object
            .iter()
            .map(|(key, value)| match (key.as_str(), value) {
                ("pattern" | "whitespace_pattern", serde_json::Value::String(pattern)) => pattern.len(),
                ("patternProperties", serde_json::Value::Object(properties)) => {
                    properties.iter().map(|(pattern, schema)| pattern.len() + pattern_bytes(schema)).sum()
                }
                (_, value) => pattern_bytes(value),
            })
            .sum(),
        _ => 0,
    }
}

/// A schema with our bound on white space, unless it brings its own options for llguidance.
fn json_grammar(mut schema: serde_json::Value) -> GrammarWithLexer {
    const OPTIONS: &str = "x-guidance";
    if let Some(object) = schema.as_object_mut().filter(|object| !object.contains_key(OPTIONS)) {
        object.insert(OPTIONS.to_owned(), serde_json::json!({ "whitespace_pattern": JSON_WHITESPACE_PATTERN }));
    }
    GrammarWithLexer::from_json_schema(schema)
}

/// llguidance's message without the dumps it appends, its beginning and end if it quotes too much between them.
fn reason_of(message: &str) -> String {
    let end = ["<state>", "<non-verbose/>", "<backtrace>"].iter().filter_map(|dump| message.find(dump)).min();
    let essence = message[..end.unwrap_or(message.len())].trim();
    if essence == "NoExtensionBias" {
        return "no token of the model's vocabulary continues the text as it demands".to_owned();
    }
    if essence.starts_with("panic:") || essence.contains("lexer precomputation failed") {
        return "it is beyond what the grammar engine can handle: make it simpler".to_owned();
    }
    let chars = essence.chars().count();
    if chars <= MAX_REASON_CHARS {
        return essence.to_owned();
    }
    let head: String = essence.chars().take(MAX_REASON_CHARS / 2).collect();
    let tail: String = essence.chars().skip(chars - MAX_REASON_CHARS / 2).collect();
    format!("{head} … {tail}")
}
