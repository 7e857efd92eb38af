//! Shared by the tests: where real models may lie, and a tiny valid file to start from.
#![allow(dead_code, reason = "each test file uses some of it")]

use std::path::PathBuf;

use murmur_gguf::synth::{self, Spec, Weights};
use murmur_gguf::{GgufBuilder, TensorSource, TensorType};

/// A file of the test models, or `None` with a notice when it is not there.
pub(crate) fn shared_model(relative: &str) -> Option<PathBuf> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/models").join(relative);
    if path.exists() {
        return Some(path);
    }
    eprintln!("skipped: {} is not there", path.display());
    None
}

/// Few bytes, but every kind of thing: all value types, arrays, two tensors with padding between them.
pub(crate) fn small_file() -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("small.gguf");
    let mut builder = GgufBuilder::new("llama");
    builder
        .set("llama.block_count", 1u32)
        .set("a.u8", 1u8)
        .set("a.i32", -5i32)
        .set("a.u64", u64::MAX)
        .set("a.f32", 1.5f32)
        .set("a.bool", true)
        .set("a.text", "text")
        .set("list.i32", vec![1i32, -2, 3])
        .set("list.bool", vec![true, false])
        .set("tokenizer.ggml.tokens", ["a", "b", ""].into_iter().collect::<murmur_gguf::StringArray>());
    builder.tensor_f32("output_norm.weight", &[5], &[1.0, 2.0, 3.0, 4.0, 5.0]).unwrap();
    builder.tensor("blk.0.ffn_up.weight", &[32, 2], TensorType::Q8_0, TensorSource::Zeros).unwrap();
    builder.write(&path).unwrap();
    std::fs::read(&path).unwrap()
}

/// A model small enough to write in a moment: two layers, the smallest vocabulary.
pub(crate) fn tiny(name: &str) -> Spec {
    let mut spec = Spec::tiny(name).unwrap().with_layers(4).with_weights(Weights::Q8_0);
    spec.facts.vocabulary = 300;
    spec.facts.embedding_length = 64;
    spec.facts.feed_forward_length = 96;
    (spec.facts.heads, spec.facts.kv_heads) = (2, 1);
    if spec.facts.experts > 0 {
        (spec.facts.experts, spec.facts.experts_used) = (4, 2);
        spec.facts.expert_feed_forward_length = if name == "mixtral" { 96 } else { 32 };
        spec.facts.shared_feed_forward_length = spec.facts.shared_feed_forward_length.min(32);
    }
    let head = 32;
    (spec.facts.key_length, spec.facts.value_length, spec.facts.rope_dimensions) = (head, head, head);
    if name == "bert" {
        spec.facts.kv_heads = 2;
    }
    spec
}

/// The bytes of a tiny model.
pub(crate) fn tiny_bytes(name: &str) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    synth::write(&tiny(name), &path).unwrap();
    std::fs::read(&path).unwrap()
}
