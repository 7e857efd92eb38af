//! A tokenizer card from a stranger, in parts: what is given back is what was asked for, however it was cut, and nothing else
//! is given back.
#![no_main]

use libfuzzer_sys::fuzz_target;
use murmur_protocol::mesh::{Card, CardAssembly, TokenizerDigest, card_digest};

fuzz_target!(|input: (Option<u32>, Vec<Vec<u8>>)| {
    let (announced, parts) = input;
    let whole = parts.concat();
    let honest = announced.is_none();
    let expected = if honest { card_digest(&whole) } else { TokenizerDigest::from_bytes([1; 32]) };
    let total_bytes = announced.map_or(whole.len() as u64, u64::from).try_into().expect("both are small");
    let Ok(mut assembly) = CardAssembly::new(Card { tokenizer: expected, total_bytes }, expected) else { return };
    for part in &parts {
        match assembly.push(part) {
            Ok(Some(card)) => return assert!(honest && card == whole),
            Ok(None) => {}
            Err(_) => return assert!(!honest),
        }
    }
});
