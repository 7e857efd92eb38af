//! Checks a tokenizer before llama.cpp builds it (`llama_vocab::impl::load`): an assertion there, or a lookup that throws
//! past the C interface, ends the process.

use std::collections::HashSet;

use crate::gguf::Gguf;
use crate::value::{Array, StringArray, Value};

/// Most tokens accepted. The largest known vocabulary has 262,144.
pub(crate) const TOKENS_MAX: u32 = 1 << 22;

/// Tokenizers that llama.cpp knows and this module checks.
const KNOWN_MODELS: &[&str] = &["llama", "bert", "gpt2", "t5", "gemma4", "no_vocab", "none"];

/// Tokenizers with a syntax of their own in the tokens, and the architectures that may use them. llama.cpp throws past its
/// interface when another vocabulary claims to be one.
const RARE_MODELS: &[(&str, &str)] = &[("rwkv", "rwkv"), ("plamo2", "plamo")];

fn key(suffix: &str) -> String {
    format!("tokenizer.ggml.{suffix}")
}

/// Whether a token number means the same in both models: one can guess what the other will say.
pub fn same_vocabulary(a: &Gguf, b: &Gguf) -> bool {
    let tokens = a.tokens().zip(b.tokens());
    tokens.is_some_and(|(a, b)| a.iter().eq(b.iter())) && a.str(&key("model")) == b.str(&key("model"))
}

/// BLAKE3 of what [`same_vocabulary`] compares. `None`: the model has no list of tokens.
pub fn vocabulary_digest(gguf: &Gguf) -> Option<[u8; 32]> {
    let mut hasher = blake3::Hasher::new();
    let mut add = |text: &[u8]| {
        hasher.update(&(text.len() as u64).to_le_bytes()).update(text);
    };
    add(gguf.str(&key("model")).unwrap_or_default().as_bytes());
    gguf.tokens()?.iter().for_each(add);
    Some(*hasher.finalize().as_bytes())
}

/// The first reason, if any, why llama.cpp would not survive this tokenizer.
pub(crate) fn check(gguf: &Gguf) -> Result<(), String> {
    let Some(model) = gguf.str(&key("model")) else {
        return Err(format!("the metadata key {} is missing", key("model")));
    };
    let rare = |&(name, prefix): &(&str, &str)| name == model && gguf.architecture().contains(prefix);
    if !KNOWN_MODELS.contains(&model) && !RARE_MODELS.iter().any(rare) {
        return Err(format!("its tokenizer {model:?} is not one that llama.cpp knows"));
    }
    if matches!(model, "no_vocab" | "none") {
        return match gguf.arch_u32("vocab_size") {
            Some(n) if n > 0 && n <= TOKENS_MAX => Ok(()),
            _ => Err(format!("{} is not a usable number", gguf.arch_key("vocab_size"))),
        };
    }
    let Some(tokens) = gguf.tokens() else {
        return Err(format!("{} is not a list of strings", key("tokens")));
    };
    let n = tokens.len();
    if n == 0 || n > TOKENS_MAX as usize {
        return Err(format!("its vocabulary has {n} tokens; 1 to {TOKENS_MAX} make sense"));
    }
    let distinct = distinct(tokens)?;
    parallel_lists(gguf, n)?;
    byte_tokens(gguf, model, tokens)?;
    if matches!(model, "llama" | "t5") {
        bytes_are_covered(&distinct)?;
    }
    if model == "t5" {
        charsmap(gguf)?;
    }
    special_tokens(gguf, model, n)
}

/// `GGML_ASSERT(id_to_token.size() == token_to_id.size())`. llama.cpp names empty tokens `[EMPTY_n]`.
fn distinct(tokens: &StringArray) -> Result<HashSet<&[u8]>, String> {
    let mut seen = HashSet::with_capacity(tokens.len());
    for (id, token) in tokens.iter().enumerate() {
        if !token.is_empty() && !seen.insert(token) {
            return Err(format!(
                "its token {id} ({:?}) appears twice in the vocabulary",
                String::from_utf8_lossy(token)
            ));
        }
        // Could be the name that llama.cpp gives to an empty one.
        if token.starts_with(b"[EMPTY_") {
            return Err(format!("its token {id} has a name that llama.cpp keeps for itself"));
        }
    }
    Ok(seen)
}

/// Scores, types and merges, where they are, have the right type and are long enough.
fn parallel_lists(gguf: &Gguf, n: usize) -> Result<(), String> {
    let long_enough = |suffix: &str, right_type: fn(&Array) -> bool| match gguf.get(&key(suffix)) {
        None => Ok(()),
        Some(Value::Array(array)) if right_type(array) && array.len() >= n => Ok(()),
        Some(_) => Err(format!("{} does not hold a number for each of the {n} tokens", key(suffix))),
    };
    long_enough("scores", |array| matches!(array, Array::F32(_) | Array::I32(_)))?;
    long_enough("token_type", |array| matches!(array, Array::I32(_)))?;
    match gguf.get(&key("merges")) {
        Some(value) if value.as_strings().is_none() => Err(format!("{} is not a list of strings", key("merges"))),
        None if matches!(gguf.str(&key("model")), Some("gpt2" | "gemma4"))
            && gguf.str(&key("pre")) != Some("kimi-k2") =>
        {
            Err(format!("the metadata key {} is missing", key("merges")))
        }
        _ => Ok(()),
    }
}

/// `token_to_byte` takes the third and fourth character of a byte token's text, whatever it is, and aborts in BERT models.
fn byte_tokens(gguf: &Gguf, model: &str, tokens: &StringArray) -> Result<(), String> {
    /// `LLAMA_TOKEN_TYPE_BYTE`.
    const BYTE: i32 = 6;
    let Some(Array::I32(types)) = gguf.get(&key("token_type")).and_then(Value::as_array) else {
        return Ok(());
    };
    for (id, (token, _)) in tokens.iter().zip(types).enumerate().filter(|(_, (_, ty))| **ty == BYTE) {
        if model == "bert" || token.len() < 3 {
            return Err(format!("its token {id} ({:?}) claims to stand for a byte", String::from_utf8_lossy(token)));
        }
    }
    Ok(())
}

/// `llama_vocab::byte_to_token` throws for a byte that no token stands for, in the middle of tokenising a prompt.
fn bytes_are_covered(tokens: &HashSet<&[u8]>) -> Result<(), String> {
    for byte in 0..=u8::MAX {
        if !tokens.contains(format!("<0x{byte:02X}>").as_bytes()) && !tokens.contains([byte].as_slice()) {
            return Err(format!(
                "its vocabulary has no token for the byte 0x{byte:02X}, so some text cannot be put into tokens"
            ));
        }
    }
    Ok(())
}

/// The blob's first four bytes give the length of its first part.
fn charsmap(gguf: &Gguf) -> Result<(), String> {
    let Some(value) = gguf.get(&key("precompiled_charsmap")) else {
        return Ok(());
    };
    let bytes = match value.as_array() {
        Some(Array::U8(bytes)) => bytes.clone(),
        Some(Array::I8(bytes)) => bytes.iter().map(|&b| b as u8).collect(),
        _ => {
            return Err(format!("{} is not a list of bytes", key("precompiled_charsmap")));
        }
    };
    let fits =
        bytes.first_chunk().is_some_and(|&length| u64::from(u32::from_le_bytes(length)) + 4 < bytes.len() as u64);
    if fits { Ok(()) } else { Err(format!("{} is cut short", key("precompiled_charsmap"))) }
}

/// The tokens that tokenising puts around a text must exist (`GGML_ASSERT(special_bos_id != LLAMA_TOKEN_NULL)`).
fn special_tokens(gguf: &Gguf, model: &str, n: usize) -> Result<(), String> {
    // llama.cpp warns about a number out of range and falls back to its default.
    let stated = |suffix: &str| gguf.u32(&key(suffix)).is_some_and(|id| (id as usize) < n);
    let default_fits = |id: usize| id < n;
    // Defaults of llama.cpp where a file states nothing.
    let (bos, eos, sep) = match model {
        "llama" | "plamo2" => (Some(1), Some(2), None),
        "bert" => (Some(101), None, Some(102)),
        "gpt2" => (Some(11), Some(11), None),
        "t5" => (None, Some(1), None),
        _ => (None, None, None),
    };
    let exists = |suffix: &str, default: Option<usize>| stated(suffix) || default.is_some_and(default_fits);
    let wants = |suffix: &str| gguf.bool(&key(suffix)).unwrap_or(false);
    let is_bert = model == "bert";
    // Without the key it depends on the kind of tokenizer; these may.
    let by_default = matches!(model, "llama" | "gpt2") && gguf.get(&key("add_bos_token")).is_none();
    let adds_bos = wants("add_bos_token") || is_bert || by_default;
    if adds_bos && !exists("bos_token_id", bos) {
        return Err(format!("it wants text to begin with a token that it does not have ({})", key("bos_token_id")));
    }
    if wants("add_eos_token") && !exists("eos_token_id", eos) {
        return Err(format!("it wants text to end with a token that it does not have ({})", key("eos_token_id")));
    }
    if (is_bert || wants("add_sep_token")) && !exists("seperator_token_id", sep) {
        return Err(format!("it wants a separator token that it does not have ({})", key("seperator_token_id")));
    }
    Ok(())
}
