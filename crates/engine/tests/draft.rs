//! Guessed tokens: answers are those of an engine that does not guess, whatever is guessed and whoever dies meanwhile.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

mod common;

use std::{sync::atomic::Ordering, time::Duration};

use common::{
    spread::{Cut, Spread, Twist, guesser},
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

/// How long frames are at most on their way to hosts that are far away, and from them.
const WAY: Duration = Duration::from_millis(5);
/// Requests that have long answers: so many come first.
const LONG: usize = 6;
/// Of these, one that is chosen by chance and has to be JSON.
const FORMED: usize = 4;
/// The same few words again and again, in an order that nobody knows before.
const SCHEMA: &str = r#"{"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}, "colours": {"type": "array",
    "items": {"enum": ["red", "green", "blue"]}, "minItems": 6, "maxItems": 10}}, "required": ["name", "colours"],
    "additionalProperties": false}"#;

/// A prompt of which the answers will repeat parts.
fn repeating(salt: i32) -> Vec<i32> {
    let part = prompt(25, salt);
    [&part[..], &part[..], &part[..]].concat()
}

/// Chosen by chance, with all that counts against saying again what was said.
fn varied(seed: u64) -> SamplingParams {
    SamplingParams { temperature: 0.8, top_p: 0.9, frequency_penalty: 0.4, presence_penalty: 0.2, ..sampled(seed) }
}

fn requests() -> Vec<SessionRequest> {
    let logit_bias = (40..60).map(|token| (token, 12.0)).collect();
    let biased = SamplingParams { logit_bias, frequency_penalty: 0.0, ..varied(7) };
    let formed = |grammar: Grammar, sampling: SamplingParams| SamplingParams {
        grammar: Some(grammar),
        ignore_eos: false,
        ..sampling
    };
    let regex = Grammar::Regex("(abc|abd|xyz){12,20}".into());
    let schema = || Grammar::JsonSchema(SCHEMA.into());
    vec![
        request(repeating(1), 120, greedy()),
        request(repeating(2), 80, varied(3)),
        request(repeating(3), 100, biased),
        request(repeating(4), 60, formed(regex, varied(5))),
        request(repeating(7), 100, formed(schema(), varied(9))),
        request(repeating(8), 60, formed(schema(), greedy())),
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

/// Of guesses that were compared with what was said, since the engine has begun: right ones, and wrong ones.
fn compared(engine: &Engine) -> (u64, u64) {
    let Counters { guessed_by_depth, right_tokens, .. } = engine.status().counters;
    (right_tokens, guessed_by_depth.iter().sum::<u64>() - right_tokens)
}

/// In all that the engine has said there were guesses of both kinds.
#[track_caller]
fn assert_guessed(engine: &Engine, what: &str) {
    let (right, wrong) = compared(engine);
    assert!(right > 0 && wrong > 0, "{what}: {right} right guesses, {wrong} wrong ones");
}

/// Taking guesses back is nothing that a stage fails at. One that is the whole model may be asked to go on behind the end of an answer, and
/// says that it cannot.
#[track_caller]
fn assert_no_step_failed(spread: &Spread) {
    assert!(spread.holders.len() == 1 || spread.failed_steps() == 0, "over {} stages", spread.holders.len());
}

/// Eight sessions that run together say what each says alone.
async fn assert_same_together(engine: &Engine, plain: &[Answer], what: &str) {
    let started = (0..8).map(|n| tokio::spawn(read(engine.start(requests().swap_remove(n % LONG)).unwrap())));
    let streams: Vec<_> = started.collect();
    for (n, stream) in streams.into_iter().enumerate() {
        assert_eq!(stream.await.unwrap().unwrap().tokens, plain[n % LONG].tokens, "{what}, session {n}");
    }
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
            let what = format!("{preset} in {}", ranges.len());
            let guessing = engine(&lab, &model, ranges, Draft::Lookup);
            assert_eq!(answers(&guessing).await, plain, "{what}");
            assert_guessed(&guessing, &what);
        }
        // And over machines that are far away, where one architecture is as good as another.
        for stages in (1..=4).filter(|_| preset == "llama") {
            let what = format!("{preset} over {stages}");
            let spread = Spread::new(&lab, &model, stages);
            let guessing = spread.engine_far(stages > 1, WAY, Draft::Lookup);
            assert_eq!(answers(&guessing).await, plain, "{what}");
            assert_guessed(&guessing, &what);
            assert_no_step_failed(&spread);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_guesses_what_another_says() {
    let lab = Lab::new();
    let large = lab.tiny("llama", Weights::Q4KM);
    let plain = answers(&engine(&lab, &large, ranges(&[0, 8]), Draft::Off)).await;
    let stranger = lab.tiny("qwen2", Weights::F32);
    // One that is always right but for what is made wrong, and one that knows nothing of what the large one says.
    let guessers = [(&large, 0.0), (&large, 0.3), (&stranger, 0.0)];
    for stages in 1..=4 {
        let spread = Spread::new(&lab, &large, stages);
        for (path, spoilt) in guessers {
            let what = format!("{} over {stages}, {spoilt} spoilt", path.display());
            let guessing = spread.engine_far(stages > 1, WAY, model(path, spoilt));
            assert_eq!(answers(&guessing).await, plain, "{what}");
            let Counters { guessed_tokens, right_tokens, guessed_by_depth, right_by_depth, .. } =
                guessing.status().counters;
            assert!(guessed_tokens > right_tokens, "{what}: {right_tokens} of {guessed_tokens}");
            let knows = *path == large && spoilt == 0.0;
            assert!(!knows || knows_it(right_tokens, guessed_tokens), "{what}: {right_tokens} of {guessed_tokens}");
            assert!(knows || compared(&guessing).1 > 0, "{what}: no wrong guess");
            assert_eq!(right_by_depth.iter().sum::<u64>(), right_tokens);
            if spoilt > 0.0 {
                assert!(right_by_depth[0] < guessed_by_depth[0], "{right_by_depth:?} of {guessed_by_depth:?}");
            }
        }
        assert_no_step_failed(&spread);
    }
    for (path, spoilt) in guessers {
        let what = format!("{} here, {spoilt} spoilt", path.display());
        let guessing = engine(&lab, &large, ranges(&[0, 3, 8]), model(path, spoilt));
        assert_eq!(answers(&guessing).await, plain, "{what}");
        let knows = *path == large && spoilt == 0.0;
        let (right, wrong) = compared(&guessing);
        let is_guessed = if knows { right > 0 } else { wrong > 0 };
        assert!(is_guessed, "{what}: {right} right guesses, {wrong} wrong ones");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_guesses_what_a_deep_model_of_which_the_others_add_nothing_says() {
    let lab = Lab::new();
    let (deep, layer) = (lab.deep(24), lab.deep(1));
    let plain = run(&engine(&lab, &layer, ranges(&[0, 1]), Draft::Off), first_request()).await;
    // It guesses faster than the stages compute, so that guesses wait there and go together.
    let spread = Spread::new(&lab, &deep, 2);
    let guessing = spread.engine_far(true, WAY, model(&layer, 0.0));
    assert_eq!(run(&guessing, first_request()).await.tokens, plain.tokens);
    let Counters { guessed_by_depth, right_by_depth, .. } = guessing.status().counters;
    assert!(right_by_depth[0] > 0 && right_by_depth == guessed_by_depth, "{right_by_depth:?} of {guessed_by_depth:?}");
    assert_no_step_failed(&spread);
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
    assert!(before > 0);
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
    // At once, and nearly as late as rows come around a ring of three.
    let twists: [(Twist, Duration, f64); 7] = [
        (|frame| frame, Duration::ZERO, 0.0),
        (|frame| frame, Duration::ZERO, 0.3),
        (|frame| frame, WAY * 3 / 2, 0.0),
        (often_wrong, Duration::ZERO, 0.0),
        (garbage, Duration::ZERO, 0.0),
        (misplaced, Duration::ZERO, 0.0),
        (noise, Duration::ZERO, 0.0),
    ];
    for stages in 1..=4 {
        let spread = Spread::new(&lab, &large, stages);
        // The first two over all numbers of stages.
        let told = twists.into_iter().enumerate().filter(|(number, _)| stages == 3 || *number < 2);
        for (number, (twist, way, spoilt)) in told {
            let what = format!("twist {number} over {stages}");
            let (holder, draft) = guesser(&lab, &large, way, twist, spoilt);
            let guessing = spread.engine_far(stages > 1, WAY, draft);
            assert_eq!(answers(&guessing).await, plain, "{what}");
            let Counters { guessed_tokens, right_tokens, .. } = guessing.status().counters;
            assert!(holder.arrived(Kind::Open) > 0, "{what}: it was never asked");
            // Some can be looked up, whoever guesses.
            assert!(guessed_tokens > 0, "{what}");
            let knows = number == 0 || number == 2;
            assert!(!knows || knows_it(right_tokens, guessed_tokens), "{what}: {right_tokens} of {guessed_tokens}");
            assert!(knows || compared(&guessing).1 > 0, "{what}: no wrong guess");
            // What is right goes on by itself.
            assert!(holder.arrived(Kind::Next) > 0 || number > 1, "{what}: it waited for each word");
        }
        assert_no_step_failed(&spread);
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
    assert!(guessing.status().counters.guessed_tokens > 0);
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
        assert!(guessing.status().counters.guessed_tokens > 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stage_may_be_lost_in_the_middle_of_a_rewind_whoever_guesses() {
    let lab = Lab::new();
    let large = lab.tiny("llama", Weights::Q4KM);
    let plain = answers(&engine(&lab, &large, ranges(&[0, 8]), Draft::Off)).await;
    let spread = Spread::new(&lab, &large, 3);
    let (holder, peer) = guesser(&lab, &large, WAY / 4, |frame| frame, 0.3);
    for draft in [Draft::Lookup, model(&large, 0.3), peer] {
        let by_peer = matches!(draft, Draft::Peer(_));
        let guessing = |way: Duration| {
            let engine = spread.engine_far(true, way, draft.clone());
            if by_peer {
                until("it is found", || (holder.host().guests() > 0).then_some(()));
            }
            engine
        };
        // The model on another machine as well.
        let victims = spread.holders.iter().chain(by_peer.then_some(&holder));
        for (number, victim) in victims.enumerate() {
            let what = format!("{draft:?}, {number} is lost");
            let cuts_left = || victim.cuts.lock().unwrap().len();
            let assert_lost = |engine: &Engine| {
                assert_eq!(cuts_left(), 0, "{what}: guesses were not taken back so often");
                let lost = if number < spread.holders.len() { 2 } else { 0 };
                until("it is missed", || (engine.status().counters.stages_lost == lost).then_some(()));
            };
            for first in [0, FORMED] {
                victim.cuts.lock().unwrap().extend([Cut::Process, Cut::Connection]);
                let engine = guessing(WAY);
                // What is looked up may be right all the time, for an answer or two.
                for at in (first..first + LONG).map(|at| at % LONG) {
                    if cuts_left() > 0 {
                        let answer = run(&engine, requests().swap_remove(at)).await;
                        assert_eq!(answer.tokens, plain[at].tokens, "{what}, request {at}");
                    }
                }
                assert_lost(&engine);
            }
            if number == 1 {
                victim.cuts.lock().unwrap().extend([Cut::Process, Cut::Connection]);
                let engine = guessing(WAY * 2);
                assert_same_together(&engine, &plain, &what).await;
                assert_lost(&engine);
            }
        }
    }
    assert_no_step_failed(&spread);
}

#[tokio::test(flavor = "multi_thread")]
async fn several_sessions_are_guessed_as_long_as_frames_are_mostly_on_their_way() {
    let lab = Lab::new();
    let large = lab.tiny("llama", Weights::Q4KM);
    let plain = answers(&engine(&lab, &large, ranges(&[0, 8]), Draft::Off)).await;
    for stages in 1..=4 {
        let spread = Spread::new(&lab, &large, stages);
        let (holder, peer) = guesser(&lab, &large, WAY / 4, |frame| frame, 0.2);
        for draft in [Draft::Lookup, model(&large, 0.2), peer] {
            let (what, by_peer) = (format!("{draft:?} over {stages}"), matches!(draft, Draft::Peer(_)));
            let guessing = spread.engine_far(stages > 1, WAY * 2, draft);
            if by_peer {
                until("it is found", || (holder.host().guests() > 0).then_some(()));
            }
            assert_same_together(&guessing, &plain, &what).await;
            assert_guessed(&guessing, &what);
        }
        assert!(holder.arrived(Kind::Tokens) > 0, "it was never asked over {stages}");
        assert_no_step_failed(&spread);
    }
}
