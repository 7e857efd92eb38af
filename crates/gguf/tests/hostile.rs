//! Nothing that a file can contain makes this crate panic, hang or eat memory.
//!
//! The same property as the fuzz target in `fuzz/`, in a form that runs briefly with every test run: set
//! `MURMUR_FUZZ_SECONDS` to run it for longer.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may fail by panicking, in its helpers too")]

mod common;

use std::time::{Duration, Instant};

use murmur_gguf::{Facts, Gguf, Manifest, allowed_cuts, even_cuts, sliceable, tokenizer_card};
use proptest::prelude::*;

/// Everything that can be asked of a file without its data.
fn examine(bytes: &[u8]) -> bool {
    let Ok(gguf) = Gguf::from_reader(bytes, bytes.len() as u64, "hostile.gguf") else {
        return false;
    };
    for tensor in gguf.tensors() {
        assert!(tensor.offset + tensor.bytes <= bytes.len() as u64);
        assert!(tensor.elements() > 0);
    }
    let valid = gguf.validate_for_engine().is_ok();
    if let Ok(card) = tokenizer_card(&gguf) {
        // What one node makes, another can read.
        let card = Gguf::from_reader(card.as_slice(), card.len() as u64, "card.gguf").unwrap();
        card.validate_vocabulary().unwrap();
    }
    let _ = (Facts::of(&gguf).map(|facts| facts.kv_bytes_per_token_per_layer()), sliceable(&gguf).is_ok());
    let _ = (allowed_cuts(&gguf), even_cuts(&gguf, 2), gguf.layer_count(), gguf.tokens().map(|t| t.iter().count()));
    valid
}

/// xorshift64: enough to pick bytes.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n.max(1) as u64) as usize
    }
}

/// One to four changes, mostly in the header and mostly to values that have hurt parsers before.
fn mutate(bytes: &mut Vec<u8>, header: usize, dice: &mut Dice) {
    const NASTY: &[u64] = &[
        0,
        1,
        0x7f,
        0xff,
        0x7fff_ffff,
        0x8000_0000,
        0xffff_ffff,
        0x7fff_ffff_ffff_ffff,
        u64::MAX,
        u64::MAX - 31,
        1 << 32,
    ];
    for _ in 0..1 + dice.below(4) {
        let reach = if dice.below(8) == 0 { bytes.len() } else { header.min(bytes.len()) };
        let at = dice.below(reach);
        match dice.below(6) {
            0 => bytes.truncate(at.max(1)),
            1 => {
                let nasty = NASTY[dice.below(NASTY.len())].to_le_bytes();
                let width = [1, 2, 4, 8][dice.below(4)];
                for (slot, byte) in bytes.iter_mut().skip(at).zip(&nasty[..width]) {
                    *slot = *byte;
                }
            }
            2 => {
                let copied: Vec<u8> = bytes.iter().skip(dice.below(header)).take(1 + dice.below(64)).copied().collect();
                bytes.splice(at..at, copied);
            }
            3 => {
                let end = (at + 1 + dice.below(16)).min(bytes.len());
                bytes.drain(at.min(end)..end);
            }
            _ => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= 1 << dice.below(8);
                }
            }
        }
    }
}

#[test]
fn mutated_models_are_examined_without_a_panic() {
    let seconds = std::env::var("MURMUR_FUZZ_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(3);
    let seed = std::env::var("MURMUR_FUZZ_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(0x6d75_726d_7572u64);
    let mut corpus = vec![common::small_file()];
    for name in ["llama", "qwen2moe", "gemma3", "gpt-oss", "phi3", "smollm3", "bert"] {
        corpus.push(common::tiny_bytes(name));
    }
    let headers: Vec<usize> = corpus
        .iter()
        .map(|b| Gguf::from_reader(b.as_slice(), b.len() as u64, "x").unwrap().data_offset() as usize)
        .collect();
    let mut dice = Dice(seed);
    let end = Instant::now() + Duration::from_secs(seconds);
    let (mut rounds, mut accepted) = (0u64, 0u64);
    while Instant::now() < end {
        let pick = dice.below(corpus.len());
        let mut bytes = corpus[pick].clone();
        mutate(&mut bytes, headers[pick], &mut dice);
        accepted += u64::from(examine(&bytes));
        rounds += 1;
    }
    eprintln!("{rounds} mutated files, {accepted} still valid");
    assert!(rounds > 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn arbitrary_bytes_are_refused_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(!examine(&bytes));
    }

    #[test]
    fn arbitrary_bytes_after_a_good_start_are_examined_without_a_panic(
        version in 2u32..4, tensors in 0u64..4, keys in 0u64..4, rest in prop::collection::vec(any::<u8>(), 0..400),
    ) {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(version.to_le_bytes());
        bytes.extend(tensors.to_le_bytes());
        bytes.extend(keys.to_le_bytes());
        bytes.extend(rest);
        examine(&bytes);
    }
}

#[test]
fn a_manifest_of_a_mutated_file_is_made_without_a_panic() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("hostile.gguf");
    let whole = common::tiny_bytes("llama");
    let mut dice = Dice(99);
    for _ in 0..200 {
        let mut bytes = whole.clone();
        mutate(&mut bytes, 4096, &mut dice);
        std::fs::write(&path, bytes).unwrap();
        let _ = Manifest::of(&path, |_, _| {});
    }
}
