//! Guessed tokens: answers are those of an engine that does not guess, whatever is guessed and whoever dies meanwhile.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

mod common;

use std::{sync::atomic::Ordering, time::Duration};

use common::{
    spread::{Spread, Twist, guesser},
    *,
};
use murmur_engine::{Counters, Draft, DraftModel, Engine, EngineOptions, SessionRequest, Stop};
use murmur_gguf::{
    LayerRange,
    synth::{self, Spec, Weights},
};
use murmur_protocol::{
    frame::{Frame, Kind},
    sampling::{Grammar, SamplingParams, Token},
    stage::Step,
};

/// How long frames are on their way to hosts that are far away.
const WAY: Duration = Duration::from_millis(10);

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

fn first_request() -> SessionRequest {
    requests().swap_remove(0)
}

/// Its answer, where nobody guesses.
async fn undisturbed(lab: &Lab, model: &std::path::Path) -> Answer {
    run(&engine(lab, model, ranges(&[0, 8]), Draft::Off), first_request()).await
}

fn engine(lab: &Lab, model: &std::path::Path, ranges: Vec<LayerRange>, draft: Draft) -> Engine {
    // As over a long way, so that guesses are made whatever they cost here.
    let options = EngineOptions { draft, travel_us: 1_000_000, ..lab.options(model, ranges, true) };
    Engine::load(options, Stop::new(), |_, _| {}).unwrap()
}

/// Guesses of a model, some of which are made wrong.
fn model(path: &std::path::Path, spoilt: f64) -> Draft {
    Draft::Model(DraftModel { path: path.to_owned(), spoilt })
}

async fn answers(engine: &Engine) -> Vec<Answer> {
    let mut answers = Vec::new();
    for request in requests() {
        answers.push(Answer { cached_tokens: 0, ..run(engine, request).await });
    }
    answers
}

/// Whether so many right guesses are those of a model that knows what comes, however few a busy machine has the time for: what can be
/// looked up in these requests, whoever guesses, is right a fifth to a quarter of the time.
fn knows_it(right_tokens: u64, guessed_tokens: u64) -> bool {
    3 * right_tokens > guessed_tokens
}

/// The tokens of an answer. Something happens after each, by how many there are.
async fn tokens_while(engine: &Engine, request: SessionRequest, happens: impl Fn(usize)) -> Vec<Token> {
    read_while(engine.start(request).unwrap(), happens).await.unwrap().tokens
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
async fn a_model_guesses_what_another_says() {
    let lab = Lab::new();
    let large = lab.tiny("llama", Weights::Q4KM);
    let plain = answers(&engine(&lab, &large, ranges(&[0, 8]), Draft::Off)).await;
    // One that is always right but for what is made wrong, and one that knows nothing of what the large one says.
    for (path, spoilt) in [(&large, 0.0), (&large, 0.3), (&lab.tiny("qwen2", Weights::F32), 0.0)] {
        for stages in [1, 3] {
            let spread = Spread::new(&lab, &large, stages);
            let guessing = spread.engine_far(stages > 1, WAY, model(path, spoilt));
            assert_eq!(answers(&guessing).await, plain, "{} in {stages}, {spoilt} spoilt", path.display());
            let Counters { guessed_tokens, right_tokens, guessed_by_depth, right_by_depth, .. } =
                guessing.status().counters;
            assert!(guessed_tokens > right_tokens, "{right_tokens} of {guessed_tokens}");
            let knows = *path == large && spoilt == 0.0;
            assert!(!knows || knows_it(right_tokens, guessed_tokens), "{right_tokens} of {guessed_tokens}");
            assert_eq!(right_by_depth.iter().sum::<u64>(), right_tokens);
            if spoilt > 0.0 {
                assert!(right_by_depth[0] < guessed_by_depth[0], "{right_by_depth:?} of {guessed_by_depth:?}");
            }
        }
        let guessing = engine(&lab, &large, ranges(&[0, 3, 8]), model(path, spoilt));
        assert_eq!(answers(&guessing).await, plain, "{} here, {spoilt} spoilt", path.display());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_model_that_guesses_may_die_and_nobody_waits_for_it() {
    let lab = Lab::new();
    let large = lab.tiny("llama", Weights::Q4KM);
    let plain = undisturbed(&lab, &large).await;
    let spread = Spread::new(&lab, &large, 2);
    let guessing = spread.engine_far(true, WAY, model(&large, 0.1));
    let dies = |count| {
        if count == 20 {
            kill(guessing.status().draft.unwrap().process_id.unwrap());
        }
    };
    assert_eq!(tokens_while(&guessing, first_request(), dies).await, plain.tokens);
    until("it comes back", || (guessing.status().draft.unwrap().restarts > 0).then_some(()));
    // And guesses again.
    let before = guessing.status().counters.right_tokens;
    assert_eq!(run(&guessing, first_request()).await.tokens, plain.tokens);
    assert!(guessing.status().counters.right_tokens > before);
}

/// What a liar makes of a guess.
fn lied(frame: Frame, lie: impl Fn(u32, &mut Step)) -> Frame {
    match (frame.header.kind, frame.decode::<Step>()) {
        (Kind::Sampled, Ok(mut step)) => {
            lie(frame.header.position, &mut step);
            Frame::message(frame.header, &step).unwrap()
        }
        _ => frame,
    }
}

/// Every third guess is another token.
fn often_wrong(frame: Frame) -> Frame {
    lied(frame, |position, step| step.sampled.iter_mut().for_each(|s| s.token ^= i32::from(position % 3 == 0)))
}

/// No guess is a token.
fn garbage(frame: Frame) -> Frame {
    lied(frame, |position, step| step.sampled.iter_mut().for_each(|s| s.token = i32::MIN + position as i32))
}

/// Guesses are for another place than that which was asked for, and said to have taken no time.
fn misplaced(frame: Frame) -> Frame {
    let mut frame = lied(frame, |_, step| step.compute_us = 0);
    if frame.header.kind == Kind::Sampled {
        frame.header.position += 1;
    }
    frame
}

/// Bytes that mean nothing.
fn noise(mut frame: Frame) -> Frame {
    frame.payload.iter_mut().for_each(|byte| *byte ^= 0x5a);
    frame
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_on_another_machine_guesses_and_whatever_it_says_changes_no_token() {
    let lab = Lab::new();
    let large = lab.tiny("llama", Weights::Q4KM);
    let plain = answers(&engine(&lab, &large, ranges(&[0, 8]), Draft::Off)).await;
    let spread = Spread::new(&lab, &large, 3);
    // At once, and as late as rows come around the ring.
    let twists: [(Twist, Duration, f64); 7] = [
        (|frame| frame, Duration::ZERO, 0.0),
        (|frame| frame, Duration::ZERO, 0.3),
        (|frame| frame, WAY, 0.0),
        (often_wrong, Duration::ZERO, 0.0),
        (garbage, Duration::ZERO, 0.0),
        (misplaced, Duration::ZERO, 0.0),
        (noise, Duration::ZERO, 0.0),
    ];
    for (number, (twist, way, spoilt)) in twists.into_iter().enumerate() {
        let (holder, draft) = guesser(&lab, &large, way, twist, spoilt);
        let guessing = spread.engine_far(true, WAY, draft);
        assert_eq!(answers(&guessing).await, plain, "twist {number}");
        let Counters { guessed_tokens, right_tokens, .. } = guessing.status().counters;
        assert!(holder.arrived(Kind::Open) > 0, "twist {number}: it was never asked");
        // Some can be looked up, whoever guesses.
        assert!(guessed_tokens > 0, "twist {number}");
        let knows = number == 0 || number == 2;
        assert!(!knows || knows_it(right_tokens, guessed_tokens), "{right_tokens} of {guessed_tokens}");
        // What is right goes on by itself.
        assert!(holder.arrived(Kind::Next) > 0 || number > 1, "twist {number}: it waited for each word");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_on_another_machine_is_not_told_its_own_guesses_while_they_are_right() {
    let lab = Lab::new();
    let large = lab.tiny("llama", Weights::Q4KM);
    let plain = undisturbed(&lab, &large).await;
    let spread = Spread::new(&lab, &large, 2);
    let (holder, draft) = guesser(&lab, &large, WAY / 4, |frame| frame, 0.0);
    let guessing = spread.engine_far(true, WAY, draft);
    until("it is found", || (holder.host().guests() > 0).then_some(()));
    assert_eq!(run(&guessing, first_request()).await.tokens, plain.tokens);
    let Counters { right_tokens, .. } = guessing.status().counters;
    let told = holder.arrived(Kind::Tokens) as u64;
    assert!(2 * told < right_tokens, "it was told something {told} times for {right_tokens} right guesses");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_on_another_machine_may_die_or_stay_away_and_nobody_waits_for_it() {
    let lab = Lab::new();
    let large = lab.tiny("llama", Weights::Q4KM);
    let plain = undisturbed(&lab, &large).await;
    let spread = Spread::new(&lab, &large, 2);
    let (holder, draft) = guesser(&lab, &large, Duration::ZERO, |frame| frame, 0.0);
    // An engine is there before anybody guesses for it.
    holder.is_gone.store(true, Ordering::Relaxed);
    let guessing = spread.engine_far(true, WAY, draft);
    assert_eq!(run(&guessing, first_request()).await.tokens, plain.tokens);
    assert_eq!(holder.arrived(Kind::Open), 0);
    holder.is_gone.store(false, Ordering::Relaxed);
    until("it is found", || (holder.host().guests() > 0).then_some(()));
    let dies = |count| {
        if count == 20 {
            holder.is_gone.store(true, Ordering::Relaxed);
            kill(holder.host().process_id().unwrap());
        }
    };
    assert_eq!(tokens_while(&guessing, first_request(), dies).await, plain.tokens);
    assert!(holder.arrived(Kind::Open) > 0, "it was never asked");
    let asked = holder.arrived(Kind::Tokens);
    holder.is_gone.store(false, Ordering::Relaxed);
    until("it comes back", || (guessing.status().draft.unwrap().restarts > 0).then_some(()));
    assert_eq!(run(&guessing, first_request()).await.tokens, plain.tokens);
    assert!(holder.arrived(Kind::Tokens) > asked);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_on_another_machine_that_hangs_holds_no_token_up() {
    let lab = Lab::new();
    let large = lab.tiny("llama", Weights::Q4KM);
    let plain = undisturbed(&lab, &large).await;
    let spread = Spread::new(&lab, &large, 2);
    let (holder, draft) = guesser(&lab, &large, Duration::ZERO, |frame| frame, 0.0);
    let guessing = spread.engine_far(true, WAY, draft);
    until("it is found", || (holder.host().guests() > 0).then_some(()));
    let process = holder.host().process_id().unwrap();
    let hangs = |count| {
        if count == 20 {
            stop_process(process);
        }
    };
    assert_eq!(tokens_while(&guessing, first_request(), hangs).await, plain.tokens);
    // It still owes a guess, and nobody has given it up.
    assert_eq!(guessing.status().draft.unwrap().restarts, 0);
    assert_eq!(run(&guessing, first_request()).await.tokens, plain.tokens);
}

#[test]
fn a_model_with_another_vocabulary_cannot_guess() {
    let lab = Lab::new();
    let large = lab.tiny("llama", Weights::Q4KM);
    let mut spec = Spec::tiny("llama").unwrap();
    spec.facts.vocabulary += 1;
    let other = lab.dir.path().join("other.gguf");
    synth::write(&spec, &other).unwrap();
    let options = EngineOptions { draft: model(&other, 0.0), ..lab.options(&large, ranges(&[0, 8]), true) };
    let Err(refused) = Engine::load(options, Stop::new(), |_, _| {}) else { panic!("it loads") };
    assert!(refused.to_string().contains("another vocabulary"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stage_may_die_while_guesses_are_on_their_way() {
    let lab = Lab::new();
    let model = lab.tiny("llama", Weights::Q4KM);
    let plain = undisturbed(&lab, &model).await;
    for victim in 0..3 {
        let guessing = engine(&lab, &model, ranges(&[0, 2, 5, 8]), Draft::Lookup);
        let dies = |count| {
            if count % 40 == 20 {
                kill(guessing.status().stages[victim].process_id.unwrap());
            }
        };
        assert_eq!(tokens_while(&guessing, first_request(), dies).await, plain.tokens, "stage {victim}");
        assert!(guessing.status().stages[victim].restarts > 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn several_sessions_are_guessed_as_long_as_frames_are_mostly_on_their_way() {
    let lab = Lab::new();
    let large = lab.tiny("llama", Weights::Q4KM);
    let plain = answers(&engine(&lab, &large, ranges(&[0, 8]), Draft::Off)).await;
    let spread = Spread::new(&lab, &large, 2);
    for draft in [Draft::Lookup, model(&large, 0.2)] {
        let guessing = spread.engine_far(true, WAY, draft);
        let streams: Vec<_> = requests().into_iter().map(|r| tokio::spawn(read(guessing.start(r).unwrap()))).collect();
        for (stream, plain) in streams.into_iter().zip(&plain) {
            let answer = stream.await.unwrap().unwrap();
            assert_eq!(answer.tokens, plain.tokens);
        }
        assert!(guessing.status().counters.right_tokens > 0);
    }
}
