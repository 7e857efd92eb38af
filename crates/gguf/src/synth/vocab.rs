//! Made-up vocabularies: bytes, a few control tokens, and syllables, so that random text can at least be read aloud.

use crate::value::{Array, StringArray, Value};

/// Token types of llama.cpp (`llama_token_type`).
mod kind {
    pub(super) const NORMAL: i32 = 1;
    pub(super) const UNKNOWN: i32 = 2;
    pub(super) const CONTROL: i32 = 3;
    pub(super) const BYTE: i32 = 6;
}

/// SentencePiece's stand-in for a space.
const SPACE: char = '\u{2581}';

/// The prompt format of the made-up models.
pub(crate) const CHAT_TEMPLATE: &str = "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}\
{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// Fewest tokens of a SentencePiece vocabulary: three specials, 256 bytes, two chat markers, the space.
pub(crate) const SPM_TOKENS_MIN: u32 = 262;
/// Fewest tokens of a WordPiece vocabulary.
pub(crate) const WPM_TOKENS_MIN: u32 = 256;

/// Endless distinct syllables, short ones first.
fn syllables() -> impl Iterator<Item = String> {
    const ONSETS: &str = "bcdfghjklmnprstvwz";
    const VOWELS: &str = "aeiou";
    let short = ONSETS.chars().flat_map(|a| VOWELS.chars().map(move |b| format!("{a}{b}")));
    let long = ONSETS
        .chars()
        .flat_map(|a| VOWELS.chars().flat_map(move |b| "lmnrst".chars().map(move |c| format!("{a}{b}{c}"))));
    short.chain(long).chain((0u64..).map(|i| format!("q{i}")))
}

/// A byte-level SentencePiece vocabulary of `size` tokens, as metadata keys.
pub(crate) fn sentence_piece(size: u32) -> Vec<(String, Value)> {
    let size = size.max(SPM_TOKENS_MIN) as usize;
    let mut tokens: Vec<(String, i32)> =
        vec![("<unk>".into(), kind::UNKNOWN), ("<s>".into(), kind::CONTROL), ("</s>".into(), kind::CONTROL)];
    tokens.extend((0..256).map(|byte| (format!("<0x{byte:02X}>"), kind::BYTE)));
    let start = tokens.len() as u32;
    tokens.push(("<|im_start|>".into(), kind::CONTROL));
    tokens.push(("<|im_end|>".into(), kind::CONTROL));
    tokens.push((SPACE.into(), kind::NORMAL));
    let words = syllables().flat_map(|s| [format!("{SPACE}{s}"), s]).map(|s| (s, kind::NORMAL));
    let missing = size - tokens.len();
    tokens.extend(words.take(missing));

    let key = |suffix: &str| format!("tokenizer.ggml.{suffix}");
    vec![
        (key("model"), "llama".into()),
        (key("pre"), "default".into()),
        (key("tokens"), tokens.iter().map(|(text, _)| text).collect::<StringArray>().into()),
        (key("scores"), Value::Array(Array::F32((0..tokens.len()).map(|i| -(i as f32)).collect()))),
        (key("token_type"), tokens.iter().map(|(_, ty)| *ty).collect::<Vec<i32>>().into()),
        (key("unknown_token_id"), 0u32.into()),
        (key("bos_token_id"), 1u32.into()),
        (key("eos_token_id"), 2u32.into()),
        (key("eot_token_id"), (start + 1).into()),
        (key("add_bos_token"), true.into()),
        (key("add_space_prefix"), false.into()),
        ("tokenizer.chat_template".into(), CHAT_TEMPLATE.into()),
    ]
}

/// A WordPiece vocabulary of `size` tokens, as metadata keys. llama.cpp marks the start of a word instead of its inside.
pub(crate) fn word_piece(size: u32) -> Vec<(String, Value)> {
    let size = size.max(WPM_TOKENS_MIN) as usize;
    let mut tokens: Vec<(String, i32)> = vec![("[PAD]".into(), kind::CONTROL)];
    tokens.extend((0..99).map(|i| (format!("[unused{i}]"), kind::CONTROL)));
    tokens.extend(["[UNK]", "[CLS]", "[SEP]", "[MASK]"].map(|text| (text.to_owned(), kind::CONTROL)));
    let characters = ('a'..='z').chain('0'..='9').chain(".,!?-'\"():;".chars());
    let pieces = characters
        .map(String::from)
        .chain(syllables())
        .flat_map(|s| [format!("{SPACE}{s}"), s])
        .map(|s| (s, kind::NORMAL));
    let missing = size - tokens.len();
    tokens.extend(pieces.take(missing));

    let key = |suffix: &str| format!("tokenizer.ggml.{suffix}");
    vec![
        (key("model"), "bert".into()),
        (key("pre"), "default".into()),
        (key("token_type_count"), 2u32.into()),
        (key("tokens"), tokens.iter().map(|(text, _)| text).collect::<StringArray>().into()),
        (key("token_type"), tokens.iter().map(|(_, ty)| *ty).collect::<Vec<i32>>().into()),
        (key("padding_token_id"), 0u32.into()),
        (key("unknown_token_id"), 100u32.into()),
        (key("cls_token_id"), 101u32.into()),
        (key("bos_token_id"), 101u32.into()),
        (key("seperator_token_id"), 102u32.into()),
        (key("eos_token_id"), 102u32.into()),
        (key("mask_token_id"), 103u32.into()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn tokens(keys: &[(String, Value)]) -> &StringArray {
        keys.iter().find(|(key, _)| key == "tokenizer.ggml.tokens").and_then(|(_, v)| v.as_strings()).unwrap()
    }

    #[test]
    fn vocabularies_have_the_asked_size_and_no_token_twice() {
        for keys in [sentence_piece(1024), sentence_piece(5000), word_piece(1024)] {
            let tokens = tokens(&keys);
            let distinct: HashSet<_> = tokens.iter().collect();
            assert_eq!(distinct.len(), tokens.len());
        }
        assert_eq!(tokens(&sentence_piece(1024)).len(), 1024);
        assert_eq!(tokens(&word_piece(1024)).len(), 1024);
    }
}
