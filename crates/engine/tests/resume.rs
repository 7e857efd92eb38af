//! An answer that one engine began goes on in another as if it had never moved.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

mod common;

use common::*;
use murmur_engine::{Ending, Engine, SessionRequest, StartError};
use murmur_gguf::synth::Weights;
use murmur_protocol::sampling::{Grammar, SamplingParams, Token};

const MAX_TOKENS: u32 = 40;

/// Everything that looks back on the tokens before: penalties, and a grammar that does not end within the answer.
fn with_a_past(seed: u64, grammar: &str) -> SamplingParams {
    SamplingParams {
        presence_penalty: 0.4,
        frequency_penalty: 0.3,
        penalty_last_n: 30,
        ignore_eos: false,
        grammar: Some(Grammar::Regex(grammar.into())),
        ..sampled(seed)
    }
}

fn requests() -> Vec<SessionRequest> {
    vec![
        request(prompt(150, 1), MAX_TOKENS, with_a_past(3, "[a-z ]{2000}")),
        request(prompt(1, 2), MAX_TOKENS, sampled(4)),
        request(prompt(64, 3), MAX_TOKENS, SamplingParams { frequency_penalty: 0.5, ..greedy() }),
        // This one ends by its grammar.
        request(prompt(30, 4), MAX_TOKENS, with_a_past(5, "[a-f]{12}")),
    ]
}

fn resumed(request: &SessionRequest, generated: &[Token]) -> SessionRequest {
    SessionRequest { generated: generated.to_vec(), ..request.clone() }
}

fn two_engines(lab: &Lab) -> (Engine, Engine) {
    let model = lab.tiny("llama", Weights::Q4KM);
    (lab.engine(&model, ranges(&[0, 8]), true), lab.engine(&model, ranges(&[0, 3, 8]), true))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_moves_to_another_engine_goes_on_with_the_same_bits() {
    let lab = Lab::new();
    let (first, second) = two_engines(&lab);
    for request in requests() {
        let whole = run(&first, request.clone()).await;
        let last = whole.tokens.len() - 1;
        // Replayed rows come in frames of up to seven: on both sides of that, and at both ends of the answer. All at once,
        // so that they share batches.
        let splits = [1, 2, 6, 7, 8, 9, 15, 23, last].map(|split: usize| split.min(last));
        let streams = splits.map(|split| second.start(resumed(&request, &whole.tokens[..split])).unwrap());
        for (stream, split) in streams.into_iter().zip(splits) {
            let rest = read(stream).await.unwrap();
            assert_eq!(rest.tokens, whole.tokens[split..], "{split}");
            assert_eq!(rest.logprob_bits, whole.logprob_bits[split..], "{split}");
            assert_eq!(rest.ending, whole.ending, "{split}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_may_move_at_every_token() {
    let lab = Lab::new();
    let (first, second) = two_engines(&lab);
    let request = requests().remove(0);
    let whole = run(&first, request.clone()).await;
    let mut tokens = Vec::new();
    while tokens.len() < whole.tokens.len() {
        let engine = if tokens.len() % 2 == 0 { &second } else { &first };
        let mut upto = resumed(&request, &tokens);
        upto.max_tokens = tokens.len() as u32 + 1;
        let one = run(engine, upto).await;
        assert_eq!(one.logprob_bits, whole.logprob_bits[tokens.len()..tokens.len() + 1]);
        tokens.extend(one.tokens);
    }
    assert_eq!(tokens, whole.tokens);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_whole_answer_counts_and_something_must_be_left_of_it() {
    let lab = Lab::new();
    let (engine, _) = two_engines(&lab);
    let generated = prompt(10, 7);
    let request = |max_tokens| resumed(&request(prompt(100, 1), max_tokens, greedy()), &generated);
    let rest = run(&engine, request(12)).await;
    assert_eq!((rest.tokens.len(), rest.ending), (2, Ending::Length));
    let wrong = Err(StartError::WrongLength { context_tokens: 512 });
    for max_tokens in [0, 9, 10, 413, u32::MAX] {
        assert_eq!(engine.start(request(max_tokens)).map(drop), wrong, "{max_tokens}");
    }
    assert_eq!(run(&engine, request(412)).await.tokens.len(), 402);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_past_that_could_not_have_been_generated_fails_its_session_alone() {
    let lab = Lab::new();
    let (engine, _) = two_engines(&lab);
    let good = engine.start(request(prompt(20, 1), 30, greedy())).unwrap();
    for (sampling, impossible) in [(greedy(), i32::MAX), (greedy(), -1), (with_a_past(1, "[a-f]{12}"), 0)] {
        let request = request(prompt(20, 2), 30, sampling);
        assert!(read(engine.start(resumed(&request, &[impossible])).unwrap()).await.is_err(), "{impossible}");
    }
    assert_eq!(read(good).await.unwrap().tokens.len(), 30);
    assert_eq!(engine.status().counters.stages_lost, 0);
}
