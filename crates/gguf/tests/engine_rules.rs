//! `validate_for_engine` accepts what llama.cpp runs and refuses what would make it abort.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may fail by panicking, in its helpers too")]

mod common;

use std::fs::File;
use std::sync::Arc;

use murmur_gguf::synth::{self, Spec};
use murmur_gguf::{Gguf, GgufBuilder, StringArray, TensorSource, TensorType, Value};

/// Rewrites a tiny model with some keys and tensors changed; returns the refusal, or `None` when it is accepted.
fn with(
    name: &str,
    change_keys: impl Fn(&mut GgufBuilder),
    change_tensor: impl Fn(&mut String, &mut Vec<u64>, &mut TensorType),
) -> Option<String> {
    let folder = tempfile::tempdir().unwrap();
    let (path, changed) = (folder.path().join("good"), folder.path().join("changed"));
    synth::write(&common::tiny(name), &path).unwrap();
    let good = Gguf::open(&path).unwrap();
    good.validate_for_engine().unwrap();
    let mut builder = GgufBuilder::default();
    for (key, value) in good.keys() {
        builder.set(key, value.clone());
    }
    change_keys(&mut builder);
    let file = Arc::new(File::open(&path).unwrap());
    for tensor in good.tensors() {
        let (mut name, mut dims, mut ty) = (tensor.name.clone(), tensor.dims.clone(), tensor.ty);
        change_tensor(&mut name, &mut dims, &mut ty);
        if name.is_empty() {
            continue;
        }
        let untouched = (&name, &dims, ty) == (&tensor.name, &tensor.dims, tensor.ty);
        let source = if untouched {
            TensorSource::FileRange { file: file.clone(), offset: tensor.offset }
        } else {
            TensorSource::Zeros
        };
        builder.tensor(name, &dims, ty, source).unwrap();
    }
    builder.write(&changed).unwrap();
    Gguf::open(&changed).unwrap().validate_for_engine().err().map(|error| error.to_string())
}

#[track_caller]
fn key_refused(name: &str, key: &str, value: impl Into<Value>, reason: &str) {
    let value = value.into();
    let refusal = with(name, |builder| _ = builder.set(key, value.clone()), |_, _, _| {});
    assert!(refusal.as_ref().is_some_and(|text| text.contains(reason)), "{key}: wanted {reason:?}, got {refusal:?}");
}

#[track_caller]
fn tensor_refused(
    name: &str,
    tensor: &str,
    change: impl Fn(&mut String, &mut Vec<u64>, &mut TensorType),
    reason: &str,
) {
    let refusal = with(
        name,
        |_| {},
        |name, dims, ty| {
            if name == tensor {
                change(name, dims, ty);
            }
        },
    );
    assert!(refusal.as_ref().is_some_and(|text| text.contains(reason)), "{tensor}: wanted {reason:?}, got {refusal:?}");
}

#[test]
fn every_made_up_model_is_accepted() {
    let folder = tempfile::tempdir().unwrap();
    for name in Spec::tiny_presets() {
        for weights in ["f32", "q4_k_m"] {
            let path = folder.path().join(name);
            synth::write(&common::tiny(name).with_weights(weights.parse().unwrap()), &path).unwrap();
            Gguf::open(&path)
                .unwrap()
                .validate_for_engine()
                .unwrap_or_else(|error| panic!("{name} {weights}: {error}"));
        }
    }
}

#[test]
fn counts_that_reach_assertions_are_refused() {
    key_refused("llama", "llama.block_count", 0u32, "0 layers");
    key_refused("llama", "llama.block_count", 513u32, "513 layers");
    key_refused("llama", "llama.block_count", "four", "not a non-negative integer");
    key_refused("llama", "llama.attention.head_count", 0u32, "zero attention heads");
    key_refused("llama", "llama.attention.head_count_kv", 0u32, "key-value heads");
    key_refused("llama", "llama.attention.head_count_kv", 3u32, "key-value heads");
    key_refused("llama", "llama.embedding_length", 0u32, "embedding length");
    key_refused("llama", "llama.context_length", 0u32, "context length");
    key_refused("llama", "llama.expert_count", 2000u32, "experts");
    key_refused("llama", "llama.expert_used_count", 3u32, "experts");
    key_refused("qwen3moe", "qwen3moe.expert_count", 0u32, "experts");
    key_refused("qwen3moe", "qwen3moe.expert_used_count", 9u32, "experts");
    key_refused("qwen3moe", "qwen3moe.expert_group_count", 3u32, "groups");
    key_refused("llama", "llama.attention.head_count_kv", vec![1u32, 1, 2, 1], "differs from layer to layer");
}

#[test]
fn head_sizes_that_the_graph_asserts_on_are_refused() {
    key_refused("llama", "llama.rope.dimension_count", 16u32, "rotates 16 of 32");
    key_refused("qwen3", "qwen3.rope.dimension_count", 31u32, "rotates 31");
    key_refused("llama", "llama.attention.value_length", 16u32, "wants them equal");
    key_refused("gemma3", "gemma3.rope.dimension_count", 64u32, "rotates 64 of 32");
}

#[test]
fn heads_that_differ_in_windowed_layers_or_do_not_fill_the_state_are_refused() {
    for key in ["attention.key_length_swa", "attention.value_length_swa", "rope.dimension_count_swa"] {
        key_refused("olmo2", &format!("olmo2.{key}"), 16u32, "as in the layers");
    }
    key_refused("qwen2", "qwen2.attention.head_count", 1u32, "do not fill");
    key_refused("olmo2", "olmo2.attention.head_count", 4u32, "do not fill");
}

#[test]
fn windows_that_no_layer_has_are_refused() {
    key_refused("gemma3", "gemma3.attention.sliding_window_pattern", vec![false; 4], "no layer has one");
    key_refused("gemma2", "gemma2.attention.sliding_window_pattern", vec![false; 4], "no layer has one");
    key_refused("gemma2", "gemma2.attention.sliding_window_pattern", 1u32, "no layer has one");
    key_refused("gpt-oss", "gpt-oss.attention.sliding_window_pattern", vec![true; 3], "fits neither");
}

#[test]
fn numbers_that_divide_or_name_things_are_refused() {
    key_refused("llama", "llama.attention.layer_norm_rms_epsilon", -1f32, "small positive");
    key_refused("llama", "llama.attention.layer_norm_rms_epsilon", f32::NAN, "small positive");
    key_refused("llama", "llama.rope.freq_base", 0f32, "not a usable number");
    key_refused("llama", "llama.rope.scaling.type", "magic", "no kind of scaling");
    key_refused("gemma2", "gemma2.final_logit_softcapping", 0f32, "not a usable number");
    key_refused("bert", "bert.pooling_type", 9u32, "no kind of pooling");
    key_refused("llama", "general.architecture", "", "does not state its architecture");
    key_refused("llama", "split.count", Value::U16(3), "part 1 of 3");
}

#[test]
fn tensors_that_the_kernels_cannot_take_are_refused() {
    tensor_refused("llama", "blk.1.ffn_up.weight", |_, _, ty| *ty = TensorType::F64, "F64");
    tensor_refused("llama", "blk.1.ffn_up.weight", |_, _, ty| *ty = TensorType::I32, "I32");
    tensor_refused("llama", "blk.1.ffn_up.weight", |_, _, ty| *ty = TensorType::Q8_1, "Q8_1");
    tensor_refused("llama", "blk.0.attn_norm.weight", |_, _, ty| *ty = TensorType::F16, "vectors in F32 only");
    tensor_refused("gpt-oss", "blk.0.ffn_up_exps.bias", |_, _, ty| *ty = TensorType::F16, "vectors in F32 only");
}

#[test]
fn shapes_that_do_not_fit_and_missing_tensors_are_refused() {
    for name in ["llama", "qwen2moe", "gemma3", "gpt-oss", "phi3", "olmo2", "bert"] {
        tensor_refused(name, "token_embd.weight", |_, dims, _| dims[1] += 1, "has the shape");
        tensor_refused(name, "blk.2.attn_output.weight", |_, dims, _| dims[0] += 32, "has the shape");
        tensor_refused(name, "blk.3.attn_output.weight", |name, _, _| name.clear(), "is missing");
    }
    tensor_refused("phi3", "blk.3.attn_qkv.weight", |name, _, _| name.clear(), "attn_qkv.weight is missing");
    tensor_refused("llama", "blk.3.attn_q.weight", |name, _, _| name.clear(), "attn_q.weight is missing");
    tensor_refused(
        "llama",
        "blk.3.attn_q.weight",
        |name, _, _| *name = "blk.9.attn_q.weight".into(),
        "attn_q.weight is missing",
    );
    tensor_refused("olmo2", "output.weight", |name, _, _| name.clear(), "output.weight is missing");
}

fn tokens(change: impl Fn(&mut Vec<Vec<u8>>)) -> Value {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("good");
    synth::write(&common::tiny("llama"), &path).unwrap();
    let mut tokens: Vec<Vec<u8>> = Gguf::open(&path).unwrap().tokens().unwrap().iter().map(<[u8]>::to_vec).collect();
    change(&mut tokens);
    tokens.into_iter().collect::<StringArray>().into()
}

#[test]
fn tokenizers_that_llama_cpp_would_not_survive_are_refused() {
    let key = "tokenizer.ggml.tokens";
    key_refused("llama", key, tokens(|t| t[299] = t[298].clone()), "appears twice");
    key_refused("llama", key, tokens(|t| t[13] = b"gone".to_vec()), "no token for the byte 0x0A");
    key_refused("llama", key, tokens(|t| t[299] = b"[EMPTY_5]".to_vec()), "keeps for itself");
    key_refused("llama", key, tokens(Vec::clear), "0 tokens");
    key_refused("llama", key, vec![1u32; 300], "not a list of strings");
    key_refused("llama", "tokenizer.ggml.scores", vec![0f32; 299], "scores does not hold");
    key_refused("llama", "tokenizer.ggml.token_type", vec![0u32; 300], "token_type does not hold");
    key_refused("bert", "tokenizer.ggml.token_type", vec![6i32; 300], "claims to stand for a byte");
    key_refused("llama", "tokenizer.ggml.model", "bert", "claims to stand for a byte");
    key_refused("llama", "tokenizer.ggml.model", "abacus", "not one that llama.cpp knows");
    key_refused("llama", "tokenizer.ggml.model", "rwkv", "not one that llama.cpp knows");
    key_refused("llama", "tokenizer.ggml.model", "gpt2", "merges is missing");
    key_refused("bert", "tokenizer.ggml.merges", 1u32, "not a list of strings");
    // Not there, and the default is not there either: llama.cpp falls back to 1, which is.
    let out_of_range = with("llama", |builder| _ = builder.set("tokenizer.ggml.bos_token_id", u32::MAX), |_, _, _| {});
    assert_eq!(out_of_range, None);
}

#[test]
fn a_file_with_a_vocabulary_only_is_refused() {
    let refusal = with("llama", |_| {}, |name, _, _| name.clear());
    assert!(refusal.unwrap().contains("only a vocabulary"));
}
