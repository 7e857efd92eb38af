//! Vocabularies for tests.
#![allow(dead_code, reason = "each test file uses its part")]

use std::sync::Arc;

use murmur_sampling::{TokenAttribute, Vocabulary};

/// `tokens` tokens of text; the last one ends a generation.
pub(crate) fn plain(tokens: usize) -> Arc<Vocabulary> {
    let pieces = (0..tokens).map(|id| format!("t{id} ").into_bytes()).collect();
    let mut attributes = vec![TokenAttribute::Normal; tokens];
    attributes[tokens - 1] = TokenAttribute::Control;
    let eos = tokens as i32 - 1;
    Arc::new(Vocabulary::new(pieces, attributes, vec![eos], None, Some(eos)).unwrap())
}

pub(crate) const EOS: i32 = 256;
pub(crate) const END_OF_TURN: i32 = 257;
pub(crate) const CONTROL: i32 = 258;
pub(crate) const UNUSED: i32 = 259;
pub(crate) const WORDS: i32 = 260;

/// All single bytes, then two tokens that end a generation, a control token, an unused one, and some longer pieces.
pub(crate) fn bytes() -> Arc<Vocabulary> {
    let mut pieces: Vec<Vec<u8>> = (0..=255u8).map(|byte| vec![byte]).collect();
    let mut attributes = vec![TokenAttribute::Byte; 256];
    for (piece, attribute) in [
        ("<|end|>", TokenAttribute::Control),
        ("<|turn|>", TokenAttribute::Control),
        ("<|start|>", TokenAttribute::Control),
        ("unused", TokenAttribute::Unused),
    ] {
        pieces.push(piece.into());
        attributes.push(attribute);
    }
    for word in
        ["{\"", "\":", "\",", "\"}", "true", "false", "null", "name", "age", "12", "  ", "\n", "é", "😀", "}}", "]}"]
    {
        pieces.push(word.into());
        attributes.push(TokenAttribute::Normal);
    }
    Arc::new(Vocabulary::new(pieces, attributes, vec![END_OF_TURN, EOS], None, Some(EOS)).unwrap())
}
