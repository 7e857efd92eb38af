//! Exact mode: a stream gives the same bits whatever shares its batches, however its prompt came in, and whoever died.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

mod common;

use common::*;
use murmur_engine::{Engine, SessionEvent, SessionRequest, Stop};
use murmur_gguf::synth::Weights;

fn eight() -> Vec<SessionRequest> {
    (0..8)
        .map(|i| request(prompt(20 + 45 * i, i as i32), 40, if i % 2 == 0 { greedy() } else { sampled(i as u64) }))
        .collect()
}

async fn one_by_one(engine: &Engine) -> Vec<Answer> {
    let mut answers = Vec::new();
    for request in eight() {
        answers.push(run(engine, request).await);
    }
    answers
}

async fn together(engine: &Engine) -> Vec<Answer> {
    let streams: Vec<_> = eight().into_iter().map(|r| tokio::spawn(read(engine.start(r).unwrap()))).collect();
    let mut answers = Vec::new();
    for stream in streams {
        answers.push(stream.await.unwrap().unwrap());
    }
    answers
}

/// What a client sees; how much came from the prefix cache is another matter.
fn seen(answers: Vec<Answer>) -> Vec<Answer> {
    answers.into_iter().map(|answer| Answer { cached_tokens: 0, ..answer }).collect()
}

async fn crowds_do_not_matter(preset: &str, weights: Weights, stages: &[u32]) {
    let lab = Lab::new();
    let model = lab.tiny(preset, weights);
    let alone = seen(one_by_one(&lab.engine(&model, ranges(&[0, layers(&model)]), true)).await);
    let crowded = lab.engine(&model, ranges(stages), true);
    for round in 0..2 {
        // The second round finds its prompts in the prefix cache.
        assert_eq!(seen(together(&crowded).await), alone, "{preset} {weights:?} round {round}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn eight_concurrent_streams_equal_eight_lonely_ones() {
    for weights in [Weights::F32, Weights::F16, Weights::Q8_0, Weights::Q4_0, Weights::Q4KM] {
        crowds_do_not_matter("llama", weights, &[0, 8]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn eight_concurrent_streams_over_three_stages_equal_eight_lonely_ones() {
    crowds_do_not_matter("llama", Weights::Q4KM, &[0, 2, 5, 8]).await;
    crowds_do_not_matter("qwen3moe", Weights::Q8_0, &[0, 3, 8]).await;
    crowds_do_not_matter("gemma3", Weights::Q4KM, &[0, 5, 12]).await;
    crowds_do_not_matter("gemma2", Weights::F32, &[0, 3, 8]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn thread_counts_do_not_matter() {
    let lab = Lab::new();
    let model = lab.tiny("llama", Weights::Q4KM);
    let one = seen(one_by_one(&lab.engine(&model, ranges(&[0, 8]), true)).await);
    let two = |bounds: &[u32]| {
        let mut options = lab.options(&model, ranges(bounds), true);
        options.threads = Some(2);
        Engine::load(options, Stop::new(), |_, _| {}).unwrap()
    };
    let several = two(&[0, 8]);
    assert_eq!(seen(one_by_one(&several).await), one, "one by one");
    assert_eq!(seen(together(&several).await), one, "together");
    assert_eq!(seen(together(&two(&[0, 3, 8])).await), one, "two stages");
}

/// Runs eight streams and kills stage `victim` of `stages` as soon as stream 7 (the longest prompt) has come to `phase`.
async fn a_killed_stage_is_not_noticed(stages: &[u32], victim: usize, phase: Phase) {
    let lab = Lab::new();
    let model = lab.tiny("llama", Weights::Q4KM);
    let expected = seen(one_by_one(&lab.engine(&model, ranges(&[0, 8]), true)).await);
    let engine = lab.engine(&model, ranges(stages), true);
    let mut requests = eight();
    let watched = requests.pop().unwrap();
    let streams: Vec<_> = requests.into_iter().map(|r| tokio::spawn(read(engine.start(r).unwrap()))).collect();
    let mut stream = engine.start(watched).unwrap();
    let (mut killed, mut tokens) = (false, Vec::new());
    loop {
        let event = stream.next().await.expect("the stream goes on until its ending");
        let now = match (&event, phase) {
            (SessionEvent::Prefill { .. }, Phase::Prefill) => true,
            (SessionEvent::Token(_), Phase::Decode(n)) => tokens.len() == n,
            (SessionEvent::Token(_), Phase::Reload) => tokens.len() == 3,
            _ => false,
        };
        if now && !killed {
            killed = true;
            let before = lab.children();
            kill(stage_pid(&engine, victim).unwrap());
            if let Phase::Reload = phase {
                // The replacement is killed as well, as early as it can be seen.
                kill(lab.child_besides(&before));
            }
        }
        match event {
            SessionEvent::Token(sampled) => tokens.push(sampled.token),
            SessionEvent::Ended(_) => break,
            SessionEvent::Failed(reason) | SessionEvent::Lost(reason) => panic!("{reason}"),
            SessionEvent::Prefill { .. } | SessionEvent::Guesses { .. } => {}
        }
    }
    assert!(killed);
    assert_eq!(tokens, expected[7].tokens);
    for (stream, expected) in streams.into_iter().zip(&expected) {
        let answer = seen(vec![stream.await.unwrap().unwrap()]).remove(0);
        assert_eq!(&answer, expected);
    }
    assert!(engine.status().stages[victim].restarts >= 1);
}

#[derive(Clone, Copy)]
enum Phase {
    Prefill,
    Decode(usize),
    Reload,
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_process_killed_in_prefill_is_not_noticed() {
    a_killed_stage_is_not_noticed(&[0, 8], 0, Phase::Prefill).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_process_killed_in_decode_is_not_noticed() {
    for token in [0, 1, 17] {
        a_killed_stage_is_not_noticed(&[0, 8], 0, Phase::Decode(token)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_process_killed_again_while_it_loads_is_not_noticed() {
    a_killed_stage_is_not_noticed(&[0, 8], 0, Phase::Reload).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn any_of_three_stages_may_die() {
    for victim in 0..3 {
        a_killed_stage_is_not_noticed(&[0, 3, 5, 8], victim, Phase::Prefill).await;
        a_killed_stage_is_not_noticed(&[0, 3, 5, 8], victim, Phase::Decode(9)).await;
    }
}
