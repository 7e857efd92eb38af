//! Sessions in the default mode: endings, the prefix cache, cancelling, slow readers, refusals, embeddings.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

mod common;

use common::*;
use murmur_engine::{Ending, Engine, SessionEvent, StartError, Stop};
use murmur_gguf::{LayerRange, synth::Weights};
use murmur_protocol::sampling::{Grammar, SamplingParams};

fn whole(lab: &Lab) -> Engine {
    let model = lab.tiny("llama", Weights::F32);
    lab.engine(&model, ranges(&[0, layers(&model)]), false)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_seed_gives_the_same_tokens_and_another_seed_others() {
    let lab = Lab::new();
    let engine = whole(&lab);
    let a = run(&engine, request(prompt(30, 1), 30, sampled(5))).await;
    let b = run(&engine, request(prompt(30, 1), 30, sampled(5))).await;
    let c = run(&engine, request(prompt(30, 1), 30, sampled(6))).await;
    assert_eq!(a.tokens, b.tokens);
    assert_ne!(a.tokens, c.tokens);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shared_prefix_is_not_computed_again_on_one_stage_or_three() {
    let lab = Lab::new();
    let model = lab.tiny("llama", Weights::F32);
    for split in [vec![0, 8], vec![0, 2, 5, 8]] {
        let engine = lab.engine(&model, ranges(&split), false);
        let first = run(&engine, request(prompt(200, 1), 5, greedy())).await;
        let mut longer = prompt(200, 1);
        longer.extend(prompt(20, 9));
        let second = run(&engine, request(longer.clone(), 5, greedy())).await;
        assert_eq!((first.cached_tokens, second.cached_tokens), (0, 200));
        let fresh = lab.engine(&model, ranges(&split), false);
        assert_eq!(run(&fresh, request(longer, 5, greedy())).await.tokens, second.tokens);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn exact_mode_reuses_whole_chunks_of_a_prefix() {
    let lab = Lab::new();
    let model = lab.tiny("llama", Weights::Q4KM);
    let engine = lab.engine(&model, ranges(&[0, 8]), true);
    run(&engine, request(prompt(200, 1), 5, greedy())).await;
    let again = run(&engine, request(prompt(200, 1), 5, greedy())).await;
    assert_eq!(again.cached_tokens, 200 / CHUNK_ROWS * CHUNK_ROWS);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_stream_stops_the_work_and_frees_its_place() {
    let lab = Lab::new();
    let engine = whole(&lab);
    let mut stream = engine.start(request(prompt(30, 1), 400, greedy())).unwrap();
    while !matches!(stream.next().await, Some(SessionEvent::Token(_))) {}
    drop(stream);
    assert_eq!(engine.status().running, 0);
    let generated = engine.status().counters.generated_tokens;
    run(&engine, request(prompt(30, 2), 10, greedy())).await;
    assert!(engine.status().counters.generated_tokens <= generated + 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_pauses_holds_its_stream_back_and_loses_nothing() {
    let lab = Lab::new();
    let engine = whole(&lab);
    let expected = run(&engine, request(prompt(30, 1), 300, greedy())).await;
    let mut slow = engine.start(request(prompt(30, 1), 300, greedy())).unwrap();
    while !matches!(slow.next().await, Some(SessionEvent::Token(_))) {}
    // Another stream runs to its end; the slow one may run ahead by its buffer only.
    run(&engine, request(prompt(30, 2), 300, greedy())).await;
    let produced = engine.status().counters.generated_tokens;
    assert!(produced < 300 + 300 + 80, "{produced}");
    let rest = read(slow).await.unwrap();
    assert_eq!(rest.tokens, expected.tokens[1..]);
}

#[tokio::test(flavor = "multi_thread")]
async fn more_sessions_than_fit_wait_and_more_than_may_wait_are_refused() {
    let lab = Lab::new();
    let model = lab.tiny("llama", Weights::F32);
    let mut options = lab.options(&model, ranges(&[0, 8]), false);
    (options.parallel, options.queue_max) = (2, 3);
    let engine = Engine::load(options, Stop::new(), |_, _| {}).unwrap();
    // Each takes the whole of a full-length place.
    let start = |i| engine.start(request(prompt(100, i), 412, greedy()));
    let mut streams: Vec<_> = (0..2).map(|i| start(i).unwrap()).collect();
    for stream in &mut streams {
        while !matches!(stream.next().await, Some(SessionEvent::Token(_))) {}
    }
    let waiting: Vec<_> = (2..5).map(|i| start(i).unwrap()).collect();
    assert_eq!(start(9).err(), Some(StartError::QueueFull(3)));
    drop(streams);
    for stream in waiting {
        assert_eq!(read(stream).await.unwrap().tokens.len(), 412);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grammar_is_obeyed_through_a_three_stage_ring() {
    let lab = Lab::new();
    let model = lab.tiny("llama", Weights::F32);
    let engine = lab.engine(&model, ranges(&[0, 2, 5, 8]), false);
    let sampling =
        SamplingParams { grammar: Some(Grammar::Regex("[a-f]{12}".into())), ignore_eos: false, ..sampled(3) };
    let answer = run(&engine, request(prompt(30, 1), 100, sampling)).await;
    let vocabulary = engine.vocabulary();
    let text: Vec<u8> = answer
        .tokens
        .iter()
        .filter(|&&t| !vocabulary.is_control(t))
        .flat_map(|&t| vocabulary.bytes(t).to_vec())
        .collect();
    assert_eq!(answer.ending, Ending::EndOfText);
    assert!(text.len() == 12 && text.iter().all(|b| (b'a'..=b'f').contains(b)), "{text:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_prompt_does_not_stall_a_running_stream_by_more_than_a_chunk() {
    let lab = Lab::new();
    let engine = whole(&lab);
    let mut running = engine.start(request(prompt(20, 1), 400, greedy())).unwrap();
    while !matches!(running.next().await, Some(SessionEvent::Token(_))) {}
    let mut long = engine.start(request(prompt(480, 2), 1, greedy())).unwrap();
    let (mut tokens_meanwhile, mut chunks) = (0, 0);
    loop {
        tokio::select! {
            biased;
            event = running.next() => {
                if let Some(SessionEvent::Token(_)) = event { tokens_meanwhile += 1 }
            }
            event = long.next() => match event.unwrap() {
                SessionEvent::Prefill { .. } => chunks += 1,
                SessionEvent::Token(_) => break,
                other => panic!("{other:?}"),
            }
        }
    }
    assert!(chunks >= 4 && tokens_meanwhile >= chunks / 2, "{tokens_meanwhile} tokens in {chunks} chunks");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_file_that_is_damaged_is_an_error_not_a_crash() {
    let lab = Lab::new();
    let model = lab.tiny("llama", Weights::F32);
    let bytes = std::fs::read(&model).unwrap();
    let cut = lab.dir.path().join("cut.gguf");
    std::fs::write(&cut, &bytes[..bytes.len() / 2]).unwrap();
    let error = Engine::load(lab.options(&cut, ranges(&[0, 8]), false), Stop::new(), |_, _| {}).err().unwrap();
    assert!(error.to_string().contains("cut.gguf"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn texts_become_tokens_and_embeddings_have_length_one() {
    let lab = Lab::new();
    let model = lab.tiny("bert", Weights::F32);
    let mut options = lab.options(&model, vec![LayerRange::new(0, layers(&model))], false);
    options.embedding = true;
    let engine = Engine::load(options, Stop::new(), |_, _| {}).unwrap();
    let tokens = engine.tokenize("hello world", true, false).await.unwrap();
    assert!(!tokens.is_empty());
    let a = engine.embed(&tokens).await.unwrap();
    let b = engine.embed(&tokens).await.unwrap();
    let c = engine.embed(&tokens[..1]).await.unwrap();
    let norm: f32 = a.iter().map(|x| x * x).sum();
    assert!((norm - 1.0).abs() < 1e-4, "{norm}");
    assert_eq!(a, b);
    assert_ne!(a, c);
    assert!(engine.embed(&[i32::MAX]).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tokenizer_process_that_is_killed_is_replaced() {
    let lab = Lab::new();
    let engine = whole(&lab);
    let expected = engine.tokenize("one two three", true, false).await.unwrap();
    let stages: Vec<u32> = (0..1).filter_map(|s| stage_pid(&engine, s)).collect();
    lab.children().into_iter().filter(|pid| !stages.contains(pid)).for_each(kill);
    tokio::time::timeout(LIMIT, async {
        assert_eq!(engine.tokenize("one two three", true, false).await.unwrap(), expected);
    })
    .await
    .unwrap();
}

/// What is behind a sliding window is needed again when a prompt goes back to it.
#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_may_go_back_behind_a_sliding_window() {
    let lab = Lab::new();
    let model = lab.tiny("gemma3", Weights::F32);
    let mut options = lab.options(&model, ranges(&[0, layers(&model)]), false);
    options.parallel = 2;
    let fresh = Engine::load(options.clone(), Stop::new(), |_, _| {}).unwrap();
    let engine = Engine::load(options, Stop::new(), |_, _| {}).unwrap();
    let mut last = prompt(400, 2)[..100].to_vec();
    last.extend(prompt(30, 7));
    let best = |answer: &Answer| f32::from_bits(answer.logprob_bits[0][0].1);
    let expected = run(&fresh, request(last.clone(), 1, greedy())).await;
    for (length, salt) in [(300, 1), (400, 2), (440, 3)] {
        run(&engine, request(prompt(length, salt), 5, greedy())).await;
    }
    let again = run(&engine, request(last, 1, greedy())).await;
    assert!((best(&again) - best(&expected)).abs() < 0.02, "{} {}", best(&again), best(&expected));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_cannot_be_computed_fails_alone() {
    let lab = Lab::new();
    let engine = whole(&lab);
    let good: Vec<_> = (0..4).map(|i| engine.start(request(prompt(20, i), 60, greedy())).unwrap()).collect();
    let bad = engine.start(request(vec![5, i32::MAX, 6], 5, SamplingParams { temperature: 0.0, ..greedy() }));
    if let Ok(bad) = bad {
        assert!(read(bad).await.is_err());
    }
    for stream in good {
        assert_eq!(read(stream).await.unwrap().tokens.len(), 60);
    }
    assert!(engine.start(request(vec![], 5, greedy())).is_err());
    assert!(engine.start(request(prompt(500, 1), 100, greedy())).is_err());
}

/// Prefixes are taken over, copied and evicted all the time here. Whatever was reused, the logits are those of computing
/// the prompt, up to what other kernels and the f16 KV cache make of them (0.01 in the logits at most were measured); with
/// the wrong prefix they would be others altogether.
#[tokio::test(flavor = "multi_thread")]
async fn reused_prefixes_give_the_logits_of_computed_ones() {
    let lab = Lab::new();
    let model = lab.tiny("llama", Weights::F32);
    let reference = lab.engine(&model, ranges(&[0, 8]), true);
    let mut options = lab.options(&model, ranges(&[0, 8]), false);
    options.parallel = 4;
    let engine = Engine::load(options, Stop::new(), |_, _| {}).unwrap();
    let best = |answer: &Answer| f32::from_bits(answer.logprob_bits[0][0].1);
    let (mut reused, mut largest) = (0, 0f32);
    for round in 0..12 {
        let streams: Vec<_> = (0..3)
            .map(|i| {
                // One of three conversations, cut somewhere, and a tail of its own.
                let mut tokens = prompt(200, (round + i) % 3)[..60 + 37 * ((round * 5 + i * 3) % 4) as usize].to_vec();
                tokens.extend(prompt(10 + round as usize, 50 + round * 3 + i));
                (tokens.clone(), engine.start(request(tokens, 20, greedy())).unwrap())
            })
            .collect();
        for (tokens, stream) in streams {
            let answer = read(stream).await.unwrap();
            let expected = run(&reference, request(tokens, 1, greedy())).await;
            reused += answer.cached_tokens;
            let difference = (best(&answer) - best(&expected)).abs();
            largest = largest.max(difference);
            assert!(difference < 0.02, "round {round}: {difference} with {} cached tokens", answer.cached_tokens);
        }
    }
    eprintln!("largest difference {largest}, {reused} tokens reused");
    assert!(reused > 1000, "{reused}");
}
