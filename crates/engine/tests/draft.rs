//! Guessed tokens: answers are those of an engine that does not guess, whatever is guessed and whoever dies meanwhile.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

mod common;

use common::*;
use murmur_engine::{Draft, Engine, EngineOptions, SessionEvent, SessionRequest, Stop};
use murmur_gguf::{LayerRange, synth::Weights};
use murmur_protocol::sampling::{Grammar, SamplingParams};

/// A prompt of which the answers will repeat parts.
fn repeating(salt: i32) -> Vec<i32> {
    let part = prompt(25, salt);
    [&part[..], &part[..], &part[..]].concat()
}

fn requests() -> Vec<SessionRequest> {
    let biased = SamplingParams { logit_bias: (40..60).map(|token| (token, 12.0)).collect(), ..sampled(7) };
    let grammar = Some(Grammar::Regex("(abc|abd|xyz)*".into()));
    vec![
        request(repeating(1), 120, greedy()),
        request(repeating(2), 120, SamplingParams { repeat_penalty: 1.0, ..sampled(3) }),
        request(repeating(3), 120, biased),
        request(repeating(4), 60, SamplingParams { grammar, ignore_eos: false, ..sampled(5) }),
        request(prompt(5, 5), 1, greedy()),
        request(prompt(5, 6), 2, greedy()),
    ]
}

fn engine(lab: &Lab, model: &std::path::Path, ranges: Vec<LayerRange>, draft: Draft) -> Engine {
    // As over a long way, so that guesses are made whatever they cost here.
    let options = EngineOptions { draft, travel_us: 1_000_000, ..lab.options(model, ranges, true) };
    Engine::load(options, Stop::new(), |_, _| {}).unwrap()
}

async fn answers(engine: &Engine) -> Vec<Answer> {
    let mut answers = Vec::new();
    for request in requests() {
        answers.push(Answer { cached_tokens: 0, ..run(engine, request).await });
    }
    answers
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_are_those_without_guessing_to_the_bit() {
    let lab = Lab::new();
    for (preset, weights) in [("llama", Weights::Q4KM), ("qwen3moe", Weights::Q8_0), ("gemma3", Weights::F32)] {
        let model = lab.tiny(preset, weights);
        let plain = answers(&engine(&lab, &model, ranges(&[0, layers(&model)]), Draft::Off)).await;
        for ranges in splits(&model) {
            let stages = ranges.len();
            let guessing = engine(&lab, &model, ranges, Draft::Lookup);
            assert_eq!(answers(&guessing).await, plain, "{preset} in {stages}");
            let counters = guessing.status().counters;
            assert!(counters.right_tokens > 0, "{preset} in {stages}: {counters:?}");
            assert!(counters.right_tokens < counters.guessed_tokens, "{preset} in {stages}: {counters:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stage_may_die_while_guesses_are_on_their_way() {
    let lab = Lab::new();
    let model = lab.tiny("llama", Weights::Q4KM);
    let request = || requests().swap_remove(0);
    let plain = run(&engine(&lab, &model, ranges(&[0, 8]), Draft::Off), request()).await;
    for victim in 0..3 {
        let guessing = engine(&lab, &model, ranges(&[0, 2, 5, 8]), Draft::Lookup);
        let mut stream = guessing.start(request()).unwrap();
        let mut tokens = Vec::new();
        while let Some(event) = stream.next().await {
            match event {
                SessionEvent::Token(sampled) => {
                    tokens.push(sampled.token);
                    if tokens.len() % 40 == 20 {
                        kill(guessing.status().stages[victim].process_id.unwrap());
                    }
                }
                SessionEvent::Failed(reason) => panic!("{reason}"),
                _ => {}
            }
        }
        assert_eq!(tokens, plain.tokens, "stage {victim}");
        assert!(guessing.status().stages[victim].restarts > 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn several_sessions_are_not_guessed_and_one_that_is_left_is_again() {
    let lab = Lab::new();
    let model = lab.tiny("llama", Weights::Q4KM);
    let plain = answers(&engine(&lab, &model, ranges(&[0, 8]), Draft::Off)).await;
    let guessing = engine(&lab, &model, ranges(&[0, 3, 8]), Draft::Lookup);
    let streams: Vec<_> = requests().into_iter().map(|r| tokio::spawn(read(guessing.start(r).unwrap()))).collect();
    for (stream, plain) in streams.into_iter().zip(plain) {
        let answer = stream.await.unwrap().unwrap();
        assert_eq!(answer.tokens, plain.tokens);
    }
    assert_eq!(run(&guessing, requests().swap_remove(0)).await.ending, murmur_engine::Ending::Length);
    assert!(guessing.status().counters.right_tokens > 0);
}
