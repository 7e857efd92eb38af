//! Log-probabilities in the two forms that OpenAI has: one for chats, one for completions.

use serde_json::{Map, Value, json};

use crate::backend::TokenInfo;

/// The chat form of some tokens: entries of `logprobs.content`. All generated tokens are there, also those of reasoning
/// and tool calls.
pub(crate) fn chat(tokens: &[TokenInfo]) -> Vec<Value> {
    let entry = |bytes: &[u8], logprob: Option<f32>| json!({"token": String::from_utf8_lossy(bytes), "logprob": finite(logprob), "bytes": bytes});
    tokens
        .iter()
        .map(|token| {
            let top: Vec<Value> = token.top.iter().map(|(_, bytes, logprob)| entry(bytes, Some(*logprob))).collect();
            let mut token = entry(&token.bytes, token.logprob);
            token["top_logprobs"] = json!(top);
            token
        })
        .collect()
}

/// JSON has no infinity; -9999 is what OpenAI writes for a probability of nothing.
fn finite(logprob: Option<f32>) -> Option<f32> {
    logprob.map(|logprob| if logprob.is_finite() { logprob } else { -9999.0 })
}

/// The completions form, built up over a choice's tokens.
#[derive(Debug, Default)]
pub(crate) struct Legacy {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Map<String, Value>>,
    text_offset: Vec<usize>,
    /// Characters before the next token, counted from the beginning of the answer's `text`.
    offset_chars: usize,
}

impl Legacy {
    /// `offset_chars`: characters of the echoed prompt.
    pub(crate) fn starting_at(offset_chars: usize) -> Self {
        Legacy { offset_chars, ..Default::default() }
    }

    pub(crate) fn push(&mut self, tokens: &[TokenInfo]) {
        for token in tokens {
            self.tokens.push(spell(&token.bytes));
            self.token_logprobs.push(finite(token.logprob));
            let mut top: Map<String, Value> =
                token.top.iter().map(|(_, bytes, logprob)| (spell(bytes), json!(finite(Some(*logprob))))).collect();
            // OpenAI lists the chosen token, too, where it is not among the best.
            top.entry(spell(&token.bytes)).or_insert_with(|| json!(finite(token.logprob)));
            self.top_logprobs.push(top);
            self.text_offset.push(self.offset_chars);
            // A character counts where its first byte is.
            self.offset_chars += token.bytes.iter().filter(|byte| **byte & 0xC0 != 0x80).count();
        }
    }

    /// What has come together since the last call.
    pub(crate) fn take(&mut self) -> Value {
        let Legacy { tokens, token_logprobs, top_logprobs, text_offset, .. } =
            std::mem::replace(self, Self::starting_at(self.offset_chars));
        json!({
            "tokens": tokens,
            "token_logprobs": token_logprobs,
            "top_logprobs": top_logprobs,
            "text_offset": text_offset,
        })
    }
}

/// A token as text; parts of characters as OpenAI writes them.
fn spell(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.iter().fold("bytes:".to_owned(), |text, byte| format!("{text}\\x{byte:02x}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(bytes: &[u8], logprob: f32) -> TokenInfo {
        TokenInfo { id: 1, bytes: bytes.to_vec(), logprob: Some(logprob), top: vec![(2, b"x".to_vec(), -0.5)] }
    }

    #[test]
    fn parts_of_characters_are_spelt_in_bytes_and_counted_once() {
        let mut legacy = Legacy::starting_at(3);
        legacy.push(&[token(b"a", -1.0), token(b"\xc3", -2.0), token(b"\xa4", -3.0), token(b"b", -4.0)]);
        let value = legacy.take();
        assert_eq!(value["tokens"], json!(["a", "bytes:\\xc3", "bytes:\\xa4", "b"]));
        assert_eq!(value["text_offset"], json!([3, 4, 5, 5]));
        assert_eq!(value["top_logprobs"][0], json!({"x": -0.5, "a": -1.0}));
    }

    #[test]
    fn a_probability_of_nothing_is_still_json() {
        let value = chat(&[token(b"a", f32::NEG_INFINITY)]);
        assert_eq!(value[0]["logprob"], -9999.0);
        assert_eq!(value[0]["bytes"], json!([97]));
    }
}
