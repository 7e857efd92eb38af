//! The cost of the process boundary per step, and how often the default mode chooses another token than it would have chosen
//! alone. The model should be a real one: the flip rate of random weights says nothing.

use murmur_engine::Engine;
use murmur_protocol::sampling::{SamplingParams, Token};

use crate::{Place, answer};

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

/// (us per step outside the computation, us per step) of a single stream, from its first token on: the prompt is no step.
async fn overhead(engine: &Engine, prompt: &[Token]) -> (f64, f64) {
    let before = engine.status().counters;
    let sampling = SamplingParams { temperature: 0.0, ignore_eos: true, ..SamplingParams::default() };
    let wall_us = answer(engine, prompt.to_vec(), TOKENS, sampling).await.since_first.as_secs_f64() * 1e6;
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
        let together = (0..STREAMS).map(|i| answer(engine, prompts[i].clone(), TOKENS, sampling(i)));
        let together = futures::future::join_all(together).await;
        for (i, crowd) in together.into_iter().enumerate() {
            let alone = answer(engine, prompts[i].clone(), TOKENS, sampling(i)).await.tokens;
            let same = crowd.tokens.iter().zip(&alone).take_while(|(a, b)| a == b).count();
            streams += 1;
            diverged += usize::from(same < alone.len());
            compared += same + usize::from(same < alone.len());
        }
    }
    (compared, diverged, streams)
}

pub(crate) async fn measure(place: &Place<'_>) {
    for exact in [false, true] {
        let engine = place.load(STREAMS as u32, 1, exact);
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
