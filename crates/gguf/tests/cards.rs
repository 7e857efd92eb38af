//! Tokenizer cards: the whole metadata of a model, none of its weights, under the same checks as any file.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may fail by panicking, in its helpers too")]

mod common;

use std::path::Path;

use murmur_gguf::{Facts, Gguf, GgufBuilder, StringArray, synth, tokenizer_card};

const PRESETS: &[&str] = &["llama", "qwen3moe", "gemma3", "phi3", "bert"];

fn read(bytes: &[u8]) -> Gguf {
    Gguf::from_reader(bytes, bytes.len() as u64, "card.gguf").unwrap()
}

#[test]
fn a_card_has_all_metadata_and_no_tensors_and_is_small() {
    for preset in PRESETS {
        let bytes = common::tiny_bytes(preset);
        let gguf = read(&bytes);
        let bytes = tokenizer_card(&gguf).unwrap();
        let card = read(&bytes);
        assert!(card.tensors().is_empty());
        assert!(card.keys().eq(gguf.keys()), "{preset}");
        assert_eq!(Facts::of(&card).unwrap(), Facts::of(&gguf).unwrap(), "{preset}");
        card.validate_vocabulary().unwrap();
        assert!(card.file_bytes() < gguf.data_offset(), "{preset}");
    }
}

#[test]
fn a_card_is_refused_as_a_model() {
    let card = tokenizer_card(&read(&common::tiny_bytes("llama"))).unwrap();
    let error = read(&card).validate_for_engine().unwrap_err();
    assert!(error.to_string().contains("only a vocabulary"), "{error}");
}

#[test]
fn the_same_file_gives_the_same_card_and_the_card_of_a_card_is_itself() {
    let bytes = common::tiny_bytes("llama");
    let card = tokenizer_card(&read(&bytes)).unwrap();
    assert_eq!(tokenizer_card(&read(&bytes)).unwrap(), card);
    assert_eq!(tokenizer_card(&read(&card)).unwrap(), card);
}

#[test]
fn only_the_header_of_a_model_is_read_for_its_card() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    synth::write(&common::tiny("llama"), &path).unwrap();
    let gguf = Gguf::open(&path).unwrap();
    let card = tokenizer_card(&gguf).unwrap();
    // Weights of zeros in a hole of the same size.
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_len(gguf.data_offset()).unwrap();
    file.set_len(gguf.file_bytes()).unwrap();
    assert_eq!(tokenizer_card(&Gguf::open(&path).unwrap()).unwrap(), card);
    std::fs::remove_file(&path).unwrap();
    assert_eq!(tokenizer_card(&gguf).unwrap(), card);
}

#[test]
fn a_cut_card_is_a_cut_file_wherever_it_is_cut() {
    let card = tokenizer_card(&read(&common::tiny_bytes("llama"))).unwrap();
    let header = read(&card).header_bytes() as usize;
    for length in (0..header).step_by(97).chain([header - 1]) {
        assert!(Gguf::from_reader(&card[..length], length as u64, "cut.gguf").is_err(), "{length}");
    }
}

/// A file of metadata alone.
fn metadata(folder: &Path, change: impl FnOnce(&mut GgufBuilder<'_>)) -> Gguf {
    let path = folder.join("metadata.gguf");
    let mut builder = GgufBuilder::default();
    for (key, value) in read(&common::tiny_bytes("llama")).keys() {
        builder.set(key, value.clone());
    }
    change(&mut builder);
    builder.write(&path).unwrap();
    Gguf::open(&path).unwrap()
}

#[test]
fn the_card_of_a_part_names_no_other_parts() {
    let folder = tempfile::tempdir().unwrap();
    let part = metadata(folder.path(), |builder| {
        builder.set("split.count", 3u16).set("split.no", 0u16);
    });
    assert!(part.validate_vocabulary().unwrap_err().to_string().contains("part 1 of 3"));
    let card = tokenizer_card(&part).unwrap();
    assert!(read(&card).keys().all(|(key, _)| !key.starts_with("split.")));
    read(&card).validate_vocabulary().unwrap();
}

#[test]
fn a_vocabulary_that_llama_cpp_would_not_survive_has_no_card() {
    let folder = tempfile::tempdir().unwrap();
    let twice = metadata(folder.path(), |builder| {
        let tokens: StringArray = ["a"; 300].into_iter().collect();
        builder.set("tokenizer.ggml.tokens", tokens);
    });
    assert!(tokenizer_card(&twice).unwrap_err().to_string().contains("appears twice"));
    assert!(twice.validate_vocabulary().is_err());
    let without = metadata(folder.path(), |builder| {
        builder.set("tokenizer.ggml.model", "no_vocab").set("tokenizer.ggml.tokens", 1u32);
    });
    assert!(tokenizer_card(&without).unwrap_err().to_string().contains("no vocabulary"));
    let nameless = metadata(folder.path(), |builder| {
        builder.set("general.architecture", "");
    });
    assert!(tokenizer_card(&nameless).is_err());
}

#[test]
fn real_vocabularies_have_cards() {
    for name in ["llama-spm", "bert-bge", "gpt-2", "falcon", "phi-3", "deepseek-coder", "starcoder", "refact"] {
        let Some(path) = common::shared_model(&format!("gguf-vocab/ggml-vocab-{name}.gguf")) else {
            return;
        };
        let gguf = Gguf::open(path).unwrap();
        let card = tokenizer_card(&gguf).unwrap();
        assert!(read(&card).keys().eq(gguf.keys()), "{name}");
    }
}
