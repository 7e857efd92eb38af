//! How long one choice takes over a vocabulary of 151,936 tokens (Qwen's). Medians; see the crate's tests for what is chosen.
//!
//! ```text
//! cargo run --release -p murmur-sampling --example sampler_speed
//! ```
#![allow(clippy::print_stdout, reason = "a program whose output is its purpose")]

use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use murmur_protocol::sampling::{Grammar, SamplingParams};
use murmur_sampling::noise::PositionNoise;
use murmur_sampling::{Sampler, StopMatcher, TokenAttribute, Vocabulary};

const TOKENS: usize = 151_936;
const REPETITIONS: u32 = 301;

fn main() -> Result<(), Box<dyn Error>> {
    let vocabulary = Arc::new(vocabulary()?);
    // Logits of a confident, a usual and an undecided model: normal noise of different spread (Irwin-Hall of 12).
    for (model, spread) in [("confident", 4.0f32), ("usual", 2.5), ("undecided", 0.5)] {
        let logits: Vec<f32> = (0..TOKENS as u32)
            .map(|token| (0..12).map(|p| PositionNoise::new(1, p).uniform(token) as f32 - 0.5).sum::<f32>() * spread)
            .collect();
        println!("{model} model (logits spread {spread})");
        for (name, params) in parameters() {
            println!("  {name:<42} {:>9.3?}", choice(&vocabulary, params, &logits)?);
        }
    }

    let began = Instant::now();
    vocabulary.prepare_grammars();
    println!("grammar tables for the vocabulary           {:>9.3?}", began.elapsed());
    let logits = vec![0.0; TOKENS];
    let params = SamplingParams { grammar: Some(Grammar::JsonObject), ..SamplingParams::default() };
    let began = Instant::now();
    Sampler::new(params.clone(), Arc::clone(&vocabulary), &[])?;
    println!("a sampler with a JSON grammar               {:>9.3?}", began.elapsed());
    println!("  a choice at its beginning                 {:>9.3?}", choice(&vocabulary, params, &logits)?);

    let stops: Vec<String> = (0..1000).map(|i| format!("stop number {i}")).collect();
    let mut matcher = StopMatcher::new(&stops)?;
    let began = Instant::now();
    for _ in 0..10_000 {
        matcher.push(b" stops ");
    }
    println!("a token's text with 1000 stop strings       {:>9.3?}", began.elapsed() / 10_000);
    Ok(())
}

fn parameters() -> Vec<(&'static str, SamplingParams)> {
    let default = SamplingParams::default;
    vec![
        ("greedy", SamplingParams { temperature: 0.0, ..default() }),
        ("temperature 1", default()),
        ("temperature 1, log-probabilities, 5 best", SamplingParams { top_logprobs: Some(5), ..default() }),
        ("top_k 40", SamplingParams { top_k: 40, ..default() }),
        (
            "top_k 40, top_p 0.95, min_p 0.05, T 0.8",
            SamplingParams { top_k: 40, top_p: 0.95, min_p: 0.05, temperature: 0.8, ..default() },
        ),
        ("min_p 0.05", SamplingParams { min_p: 0.05, ..default() }),
        ("top_p 0.9", SamplingParams { top_p: 0.9, ..default() }),
        ("typical_p 0.9", SamplingParams { typical_p: 0.9, ..default() }),
    ]
}

fn choice(vocabulary: &Arc<Vocabulary>, params: SamplingParams, logits: &[f32]) -> Result<Duration, Box<dyn Error>> {
    let mut sampler = Sampler::new(params, Arc::clone(vocabulary), &[])?;
    let mut buffer = logits.to_vec();
    let mut times = Vec::new();
    for position in 0..REPETITIONS {
        buffer.copy_from_slice(logits);
        let began = Instant::now();
        sampler.sample(&mut buffer, position)?;
        times.push(began.elapsed());
    }
    times.sort_unstable();
    Ok(times[times.len() / 2])
}

/// All bytes, then words of letters.
fn vocabulary() -> Result<Vocabulary, Box<dyn Error>> {
    let mut pieces: Vec<Vec<u8>> = (0..=255u8).map(|byte| vec![byte]).collect();
    while pieces.len() < TOKENS {
        let mut rest = pieces.len();
        let mut piece = if rest.is_multiple_of(3) { vec![b' '] } else { Vec::new() };
        while rest > 0 {
            piece.push(b'a' + (rest % 26) as u8);
            rest /= 26;
        }
        pieces.push(piece);
    }
    let mut attributes = vec![TokenAttribute::Normal; TOKENS];
    attributes[TOKENS - 1] = TokenAttribute::Control;
    let eos = TOKENS as i32 - 1;
    Ok(Vocabulary::new(pieces, attributes, vec![eos], None, Some(eos))?)
}
