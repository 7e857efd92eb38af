//! What goes wrong around a stage: it hangs, it cannot be loaded again, it is ended while it loads.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

mod common;

use std::time::{Duration, Instant};

use common::*;
use murmur_engine::{Engine, EngineError, EngineOptions, PARALLEL_MAX, Patience, SessionEvent, StartError, Stop};
use murmur_gguf::synth::Weights;
use murmur_protocol::{
    frame::{Frame, Header, Kind, MAX_PAYLOAD_BYTES},
    stage::Role,
};

/// Far less than anyone waits in earnest, and enough for a tiny model on a busy machine.
const IMPATIENT: Patience =
    Patience { silence_floor: Duration::from_millis(400), failed_pause: Duration::from_millis(50) };

fn options(lab: &Lab, bounds: &[u32], patience: Patience) -> EngineOptions {
    let model = lab.tiny("llama", Weights::F32);
    EngineOptions { patience, ..lab.options(&model, ranges(bounds), true) }
}

fn load(options: EngineOptions) -> Engine {
    Engine::load(options, Stop::new(), |_, _| {}).unwrap()
}

async fn a_hung_stage_is_not_noticed(bounds: &[u32], victim: usize) {
    let lab = Lab::new();
    let engine = load(options(&lab, bounds, IMPATIENT));
    let asked = || request(prompt(100, 1), 40, sampled(3));
    let expected = run(&engine, asked()).await.tokens;
    let mut stream = engine.start(asked()).unwrap();
    let mut tokens = Vec::new();
    loop {
        match stream.next().await.expect("the stream goes on until its ending") {
            SessionEvent::Token(sampled) => {
                tokens.push(sampled.token);
                if tokens.len() == 7 {
                    stop_process(stage_pid(&engine, victim).unwrap());
                }
            }
            SessionEvent::Ended(_) => break,
            SessionEvent::Failed(reason) | SessionEvent::Lost(reason) => panic!("{reason}"),
            SessionEvent::Prefill { .. } | SessionEvent::Guesses { .. } => {}
        }
    }
    assert_eq!(tokens, expected);
    assert!(engine.status().stages[victim].restarts >= 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_process_that_hangs_is_not_noticed() {
    tokio::time::timeout(LIMIT, a_hung_stage_is_not_noticed(&[0, 8], 0)).await.unwrap();
    tokio::time::timeout(LIMIT, a_hung_stage_is_not_noticed(&[0, 3, 8], 1)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_engine_process_is_left_alone_however_long_it_is_silent() {
    let lab = Lab::new();
    let engine = load(options(&lab, &[0, 8], Patience { silence_floor: Duration::from_millis(200), ..IMPATIENT }));
    run(&engine, request(prompt(30, 1), 5, greedy())).await;
    let (before, pid) = (engine.status().stages[0].restarts, stage_pid(&engine, 0));
    // Five times the silence after which one that owes something is dead.
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!((engine.status().stages[0].restarts, stage_pid(&engine, 0)), (before, pid));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tokenizer_process_that_hangs_is_replaced() {
    let lab = Lab::new();
    let engine = load(options(&lab, &[0, 8], IMPATIENT));
    let expected = engine.tokenize("one two three", true, false).await.unwrap();
    let stage = stage_pid(&engine, 0);
    engine.process_ids().into_iter().filter(|&pid| Some(pid) != stage).for_each(stop_process);
    let again = tokio::time::timeout(LIMIT, engine.tokenize("one two three", true, false)).await.unwrap();
    assert_eq!(again.unwrap(), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stage_that_cannot_be_loaded_again_fails_with_the_reason_and_comes_back_when_it_can() {
    let lab = Lab::new();
    let options = options(&lab, &[0, 8], IMPATIENT);
    let (model, away) = (options.model.clone(), lab.dir.path().join("away"));
    let engine = load(options);
    let expected = run(&engine, request(prompt(30, 1), 5, greedy())).await.tokens;
    std::fs::rename(&model, &away).unwrap();
    let mut running = engine.start(request(prompt(30, 1), 400, greedy())).unwrap();
    while !matches!(running.next().await, Some(SessionEvent::Token(_))) {}
    kill(stage_pid(&engine, 0).unwrap());
    let reason = tokio::time::timeout(LIMIT, read(running)).await.unwrap().unwrap_err();
    assert!(reason.contains("could not be restarted"), "{reason}");
    assert_eq!(engine.status().unavailable.as_deref(), Some(reason.as_str()));
    let refused = engine.start(request(prompt(30, 1), 5, greedy())).err().unwrap();
    assert!(matches!(refused, StartError::Unavailable(_)), "{refused}");
    std::fs::rename(&away, &model).unwrap();
    let back = async {
        while engine.status().unavailable.is_some() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(LIMIT, back).await.unwrap();
    assert_eq!(run(&engine, request(prompt(30, 1), 5, greedy())).await.tokens, expected);
}

#[test]
fn an_engine_ends_at_once_while_a_stage_loads_or_is_to_be_tried_again_later() {
    let lab = Lab::new();
    let engine = load(options(&lab, &[0, 8], Patience::default()));
    let known = lab.children();
    kill(stage_pid(&engine, 0).unwrap());
    stop_process(lab.child_besides(&known));
    let started = Instant::now();
    drop(engine);
    assert!(started.elapsed() < LIMIT, "while it loads");

    let options = options(&lab, &[0, 8], Patience { failed_pause: Duration::from_secs(3600), ..IMPATIENT });
    let model = options.model.clone();
    let engine = load(options);
    std::fs::rename(&model, lab.dir.path().join("away")).unwrap();
    kill(stage_pid(&engine, 0).unwrap());
    until("it is to be tried again later", || engine.status().unavailable);
    let started = Instant::now();
    drop(engine);
    assert!(started.elapsed() < LIMIT, "while it pauses");
}

#[test]
fn loading_can_be_stopped() {
    let lab = Lab::new();
    let (options, stop, known) = (options(&lab, &[0, 8], Patience::default()), Stop::new(), lab.children());
    let loading = std::thread::spawn({
        let stop = stop.clone();
        move || Engine::load(options, stop, |_, _| {})
    });
    stop_process(lab.child_besides(&known));
    stop.stop();
    assert!(matches!(loading.join().unwrap().err(), Some(EngineError::Stopped)));
}

#[test]
fn a_stage_that_cannot_be_loaded_at_first_is_an_error_that_says_why() {
    use std::os::unix::fs::PermissionsExt;
    let lab = Lab::new();
    let options = options(&lab, &[0, 8], IMPATIENT);
    // The first process, which reads the vocabulary, works.
    let program = lab.dir.path().join("program");
    let script = format!("#!/bin/sh\nmkdir \"$0.used\" && exec {} \"$@\"\nexit 1\n", options.program.display());
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let error = Engine::load(EngineOptions { program, ..options }, Stop::new(), |_, _| {}).err().unwrap();
    assert!(error.to_string().contains("the engine process died"), "{error}");
}

#[test]
fn more_parallel_requests_than_the_engine_can_run_are_refused_and_as_many_as_it_can_are_not() {
    let lab = Lab::new();
    let options = EngineOptions { parallel: PARALLEL_MAX, context_tokens: 64, ..options(&lab, &[0, 8], IMPATIENT) };
    let engine = load(options.clone());
    assert_eq!(engine.status().stages[0].loaded.as_ref().map(|l| l.kv_cells >= 64 * PARALLEL_MAX), Some(true));
    let too_many = EngineOptions { parallel: PARALLEL_MAX + 1, ..options };
    let refused = Engine::load(too_many, Stop::new(), |_, _| {}).err().unwrap();
    assert!(refused.to_string().contains("1 to 256"), "{refused}");
}

#[test]
fn a_frame_that_is_too_large_is_given_back_and_the_others_are_sent() {
    let lab = Lab::new();
    let (link, mut receiver) = start_child(&common::load(&lab.tiny("llama", Weights::F32), Role::Vocabulary));
    let too_large = Frame { header: Header::new(Kind::Tokenize, 7), payload: vec![0; MAX_PAYLOAD_BYTES as usize + 1] };
    let unsendable = link.send(&[too_large, Frame::text(Header::new(Kind::Tokenize, 8), "")]);
    assert_eq!(unsendable.iter().map(|frame| frame.session).collect::<Vec<_>>(), [7]);
    // A tokenizer has an answer to everything, if only that it cannot read it.
    assert_eq!(receiver.receive().unwrap().0.header.session, 8);
}
