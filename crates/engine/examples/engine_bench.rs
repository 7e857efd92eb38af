//! Measures what only the engine can: the cost of the process boundary per step, and how often the default mode chooses
//! another token than it would have chosen alone.
//!
//! `engine_bench CHILD MODEL SCRATCH_DIR` prints one JSON object. MODEL should be a real one (the flip rate of random
//! weights says nothing).
#![allow(clippy::expect_used, clippy::panic, clippy::print_stdout)] // a tool for its developers

use std::{path::PathBuf, time::Instant};

use murmur_engine::{Engine, EngineOptions, Patience, SessionEvent, SessionRequest, Stop};
use murmur_gguf::{Gguf, LayerRange};
use murmur_protocol::sampling::{SamplingParams, Token};

const STREAMS: usize = 8;
const ROUNDS: usize = 12;
const TOKENS: u32 = 200;

const PROMPTS: [&str; STREAMS] = [
    "Tell me a story about Lily and a kitten.",
    "Tell me a story about a brave little boat.",
    "Who are you?",
    "Tell me a story about a girl who wanted to grow a tree. It was a warm day in spring.",
    "What is the capital of Italy?",
    "Name three colors.",
    "Tell me a story about Tom and his friend the fox, who lived in the forest behind the house.",
    "Hi, I am Nora.",
];

fn options(args: &[String], exact: bool, stages: u32) -> EngineOptions {
    let model = PathBuf::from(&args[1]);
    let gguf = Gguf::open(&model).expect("the model opens");
    let layers = gguf.layer_count().expect("the model has layers");
    let ranges = match stages {
        1 => vec![LayerRange::new(0, layers)],
        n => murmur_gguf::even_cuts(&gguf, n).expect("the model can be cut"),
    };
    EngineOptions {
        program: PathBuf::from(&args[0]),
        model,
        slices_dir: PathBuf::from(&args[2]),
        embedding: false,
        ranges,
        context_tokens: 512,
        parallel: STREAMS as u32,
        queue_max: 64,
        chunk_rows: 256,
        threads: Some(1),
        exact,
        gpu_layers: 0,
        patience: Patience::default(),
    }
}

/// The tokens of an answer, and when the first came.
async fn tokens_of(engine: &Engine, prompt: Vec<Token>, sampling: SamplingParams) -> (Vec<Token>, Instant) {
    let request = SessionRequest { prompt, generated: Vec::new(), max_tokens: TOKENS, sampling };
    let mut stream = engine.start(request).expect("there is room");
    let mut tokens = Vec::new();
    let mut first_token = Instant::now();
    while let Some(event) = stream.next().await {
        match event {
            SessionEvent::Token(sampled) => {
                if tokens.is_empty() {
                    first_token = Instant::now();
                }
                tokens.push(sampled.token);
            }
            SessionEvent::Failed(reason) => panic!("{reason}"),
            _ => {}
        }
    }
    (tokens, first_token)
}

/// (us per step outside the computation, us per step) of a single stream, from its first token on: the prompt is no step.
async fn overhead(engine: &Engine, prompt: &[Token]) -> (f64, f64) {
    let before = engine.status().counters;
    let sampling = SamplingParams { temperature: 0.0, ignore_eos: true, ..SamplingParams::default() };
    let (_, first_token) = tokens_of(engine, prompt.to_vec(), sampling).await;
    let wall_us = first_token.elapsed().as_secs_f64() * 1e6;
    let after = engine.status().counters;
    let steps = (after.token_steps - before.token_steps) as f64;
    let compute_us = (after.token_compute_us - before.token_compute_us) as f64;
    ((wall_us - compute_us) / steps, wall_us / steps)
}

/// (tokens compared, streams that diverged, streams) of eight streams together against each of them alone. A stream is
/// compared up to its first difference: what follows has another history.
async fn flips(engine: &Engine, prompts: &[Vec<Token>], temperature: f32) -> (usize, usize, usize) {
    let (mut compared, mut diverged, mut streams) = (0, 0, 0);
    for round in 0..ROUNDS {
        let sampling = |i: usize| SamplingParams {
            temperature,
            seed: (round * STREAMS + i) as u64,
            ignore_eos: true,
            ..SamplingParams::default()
        };
        let together = (0..STREAMS).map(|i| tokens_of(engine, prompts[i].clone(), sampling(i)));
        let together = futures::future::join_all(together).await;
        for (i, (crowd, _)) in together.into_iter().enumerate() {
            let (alone, _) = tokens_of(engine, prompts[i].clone(), sampling(i)).await;
            let same = crowd.iter().zip(&alone).take_while(|(a, b)| a == b).count();
            streams += 1;
            diverged += usize::from(same < alone.len());
            compared += same + usize::from(same < alone.len());
        }
    }
    (compared, diverged, streams)
}

#[tokio::main]
async fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    assert!(args.len() == 3, "usage: engine_bench CHILD MODEL SCRATCH_DIR");
    for exact in [false, true] {
        let engine = Engine::load(options(&args, exact, 1), Stop::new(), |_, _| {}).expect("the model loads");
        let mut prompts = Vec::new();
        for text in PROMPTS {
            let chat = format!("<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n");
            prompts.push(engine.tokenize(&chat, true, true).await.expect("the prompt tokenises"));
        }
        let mut runs = Vec::new();
        for _ in 0..5 {
            runs.push(overhead(&engine, &prompts[0]).await);
        }
        runs.sort_by(|a, b| a.0.total_cmp(&b.0));
        let (outside_us, step_us) = runs[runs.len() / 2];
        for temperature in [0.0, 0.8] {
            let (compared, diverged, streams) = flips(&engine, &prompts, temperature).await;
            println!(
                "{{\"exact\":{exact},\"temperature\":{temperature},\"step_us\":{step_us:.1},\"outside_compute_us\":{outside_us:.1},\"tokens_compared\":{compared},\"streams\":{streams},\"streams_diverged\":{diverged},\"flips_per_million_tokens\":{:.0}}}",
                1e6 * diverged as f64 / compared as f64
            );
        }
    }
}
