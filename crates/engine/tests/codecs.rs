//! Hidden states that travel smaller than they are: nearly the same answers, and the same ones each time.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests

mod common;

use common::*;
use murmur_engine::{Engine, EngineOptions, SessionEvent, Stop};
use murmur_gguf::synth::Weights;
use murmur_protocol::codec::Codec;

/// How far the likeliest first tokens of an answer are off, in log-probability.
fn distance(answer: &Answer, exact: &Answer) -> f32 {
    let of =
        |token: i32| answer.logprob_bits[0].iter().find(|(id, _)| *id == token).map(|(_, bits)| f32::from_bits(*bits));
    let pairs = exact.logprob_bits[0].iter().filter_map(|(id, bits)| Some((of(*id)?, f32::from_bits(*bits))));
    pairs.map(|(lossy, exact)| (lossy - exact).abs()).fold(0.0, f32::max)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lossy_codec_rounds_a_little_and_rows_that_are_sent_again_as_they_were() {
    let lab = Lab::new();
    // Weights that are not quantised, so that nothing else is rounded.
    let model = lab.tiny("llama", Weights::F32);
    let engine = |codecs| {
        let options = EngineOptions { codecs, ..lab.options(&model, ranges(&[0, 3, 6, 8]), true) };
        Engine::load(options, Stop::new(), |_, _| {}).unwrap()
    };
    let asked = request(prompt(100, 1), 24, greedy());
    let exact = run(&engine(Vec::new()), asked.clone()).await;
    assert_eq!(run(&engine(vec![Codec::F32; 2]), asked.clone()).await, exact);
    let mut distances = vec![0.0];
    for codec in [Codec::F16, Codec::Q8] {
        let engine = engine(vec![codec; 2]);
        let undisturbed = run(&engine, asked.clone()).await;
        distances.push(distance(&undisturbed, &exact));
        let mut stream = engine.start(asked.clone()).unwrap();
        let mut tokens = Vec::new();
        while let Some(event) = stream.next().await {
            match event {
                SessionEvent::Token(sampled) => tokens.push(sampled.token),
                SessionEvent::Failed(reason) | SessionEvent::Lost(reason) => panic!("{reason}"),
                _ => continue,
            }
            if tokens.len() == 5 {
                kill(stage_pid(&engine, 1).unwrap());
            }
        }
        assert_eq!(tokens, undisturbed.tokens, "{}", codec.name());
    }
    assert!(distances.is_sorted_by(|less, more| less < more) && distances[2] < 1.0, "{distances:?}");
}
