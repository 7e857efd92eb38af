//! A model whose memory takes nothing back: a tiny random Mamba, which runs whole.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::{Path, PathBuf};

use common::{Lab, greedy, prompt, ranges, read, request};
use murmur_engine::{Draft, Engine, EngineOptions, Stop};
use murmur_gguf::{Gguf, GgufBuilder, synth::Weights};
use murmur_protocol::sampling::SamplingParams;

const LAYERS: u32 = 2;
const EMBEDDING: u64 = 64;
/// llama.cpp knows no other.
const INNER: u64 = 2 * EMBEDDING;
const STATE: u64 = 8;
const STEP_RANK: u64 = 4;
const CONVOLUTION: u64 = 4;

/// Numbers around `mean` that look like noise.
fn noise(seed: u64, count: u64, mean: f32, spread: f32) -> Vec<f32> {
    let numbers = (0..count).map(|i| {
        let mixed = (seed * 1_000_003 + i).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        ((mixed >> 40) as f32 / (1 << 24) as f32 - 0.5) * 2.0 * spread + mean
    });
    numbers.collect()
}

/// With the vocabulary of another model. Tensors as in llama.cpp's `src/models/mamba.cpp`.
fn mamba(vocabulary_of: &Path, folder: &Path) -> PathBuf {
    let other = Gguf::open(vocabulary_of).unwrap();
    let mut file = GgufBuilder::new("mamba");
    for (key, value) in other.keys().filter(|(key, _)| key.starts_with("tokenizer.")) {
        file.set(key, value.clone());
    }
    let sizes = [
        ("block_count", u64::from(LAYERS)),
        ("context_length", 1024),
        ("embedding_length", EMBEDDING),
        ("feed_forward_length", 0),
        ("attention.head_count", 0),
        ("ssm.conv_kernel", CONVOLUTION),
        ("ssm.inner_size", INNER),
        ("ssm.state_size", STATE),
        ("ssm.time_step_rank", STEP_RANK),
    ];
    for (key, size) in sizes {
        file.set(format!("mamba.{key}"), size as u32);
    }
    file.set("mamba.attention.layer_norm_rms_epsilon", 1e-5f32);
    let vocabulary = other.tokens().unwrap().len() as u64;
    let mut seed = 0;
    let mut add = |name: String, dims: &[u64], mean: f32, spread: f32| {
        seed += 1;
        file.tensor_f32(name, dims, &noise(seed, dims.iter().product(), mean, spread)).unwrap();
    };
    add("token_embd.weight".into(), &[EMBEDDING, vocabulary], 0.0, 1.0);
    for il in 0..LAYERS {
        let mut add = |name: &str, dims: &[u64], mean, spread| add(format!("blk.{il}.{name}"), dims, mean, spread);
        add("attn_norm.weight", &[EMBEDDING], 1.0, 0.1);
        add("ssm_in.weight", &[EMBEDDING, 2 * INNER], 0.0, 0.2);
        add("ssm_conv1d.weight", &[CONVOLUTION, INNER], 0.0, 0.5);
        add("ssm_conv1d.bias", &[INNER], 0.0, 0.1);
        add("ssm_x.weight", &[INNER, STEP_RANK + 2 * STATE], 0.0, 0.2);
        add("ssm_dt.weight", &[STEP_RANK, INNER], 0.0, 0.5);
        add("ssm_dt.bias", &[INNER], 0.0, 0.5);
        add("ssm_a", &[STATE, INNER], -1.0, 0.5);
        add("ssm_d", &[INNER], 1.0, 0.1);
        add("ssm_out.weight", &[INNER, EMBEDDING], 0.0, 0.2);
    }
    add("output_norm.weight".into(), &[EMBEDDING], 1.0, 0.1);
    let path = folder.join("mamba.gguf");
    file.write(&path).unwrap();
    path
}

#[tokio::test]
async fn a_wrong_guess_costs_a_model_that_forgets_nothing_its_guesses_and_no_answer() {
    let lab = Lab::new();
    let model = mamba(&lab.tiny("llama", Weights::F32), lab.dir.path());
    let engine = |draft: Draft| {
        let options = EngineOptions { draft, ..lab.options(&model, ranges(&[0, LAYERS]), false) };
        Engine::load(options, Stop::new(), |_, _| {}).unwrap()
    };
    let (plain, guessing) = (engine(Draft::Off), engine(Draft::Lookup));
    // What was said before is looked up, and a penalty sees to it that something else follows sometimes.
    let sampling = SamplingParams { frequency_penalty: 0.5, ..greedy() };
    for round in 0..3 {
        let asked = [prompt(40, round), prompt(40, round)].concat();
        let expected = read(plain.start(request(asked.clone(), 300, sampling.clone())).unwrap()).await.unwrap();
        let answer = read(guessing.start(request(asked, 300, sampling.clone())).unwrap()).await.unwrap();
        assert_eq!(answer.tokens, expected.tokens);
    }
    let counters = guessing.status().counters;
    assert!(counters.guessed_tokens > counters.right_tokens, "nothing was guessed wrong: {counters:?}");
}
