//! A model gives the same bits whether it runs whole or in stages, for every architecture that can be cut.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

mod common;

use common::*;
use murmur_gguf::synth::Weights;

/// Whole = 1 = 2 = 4 = uneven stages, greedy and sampled, prompt in several chunks: tokens and the bits of the best
/// log-probabilities.
async fn stages_agree(lab: &Lab, model: &std::path::Path, exact: bool) {
    let mut reference = None;
    for split in splits(model) {
        let shape = format!("{} split {split:?} exact {exact}", model.display());
        let engine = lab.engine(model, split, exact);
        let greedy = run(&engine, request(prompt(150, 1), 24, greedy())).await;
        let sampled = run(&engine, request(prompt(70, 2), 24, sampled(7))).await;
        assert_eq!((greedy.tokens.len(), sampled.tokens.len()), (24, 24), "{shape}");
        assert_eq!((greedy.cached_tokens, sampled.cached_tokens), (0, 0), "{shape}");
        match &reference {
            None => reference = Some((greedy, sampled)),
            Some(reference) => assert_eq!(&(greedy, sampled), reference, "{shape}"),
        }
    }
}

macro_rules! architectures {
    ($($name:ident: $preset:literal,)*) => {$(
        #[tokio::test(flavor = "multi_thread")]
        async fn $name() {
            let lab = Lab::new();
            for weights in [Weights::F32, Weights::Q8_0, Weights::Q4KM] {
                let model = lab.tiny($preset, weights);
                stages_agree(&lab, &model, false).await;
                stages_agree(&lab, &model, true).await;
            }
        }
    )*};
}

architectures! {
    llama_stages_agree_with_the_whole: "llama",
    mixtral_stages_agree_with_the_whole: "mixtral",
    mistral3_stages_agree_with_the_whole: "mistral3",
    qwen2_stages_agree_with_the_whole: "qwen2",
    qwen2moe_stages_agree_with_the_whole: "qwen2moe",
    qwen3_stages_agree_with_the_whole: "qwen3",
    qwen3moe_stages_agree_with_the_whole: "qwen3moe",
    gemma2_stages_agree_with_the_whole: "gemma2",
    gemma3_stages_agree_with_the_whole: "gemma3",
    phi3_stages_agree_with_the_whole: "phi3",
    olmo2_stages_agree_with_the_whole: "olmo2",
    gpt_oss_stages_agree_with_the_whole: "gpt-oss",
    smollm3_stages_agree_with_the_whole: "smollm3",
}

#[tokio::test(flavor = "multi_thread")]
async fn real_small_models_agree_with_the_whole() {
    for name in ["stories260K/stories260K-f32.gguf", "demo/murmur-demo-q8_0.gguf", "demo/murmur-demo-f16.gguf"] {
        if let Some(model) = shared_model(name) {
            let lab = Lab::new();
            stages_agree(&lab, &model, false).await;
            stages_agree(&lab, &model, true).await;
        }
    }
}
