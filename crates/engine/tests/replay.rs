//! A lost stage costs its own range: who lives computes nothing twice, and no token changes.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

mod common;

use std::{os::unix::fs::PermissionsExt, path::Path};

use common::*;
use futures::future::join_all;
use murmur_engine::{Engine, EngineOptions, Keep, SessionEvent, SessionRequest, SessionStream, Stop};
use murmur_gguf::synth::Weights;
use murmur_protocol::sampling::Token;

const TOKENS: u32 = 30;

/// When a stage dies.
#[derive(Debug, Clone, Copy)]
enum Phase {
    /// A part of the longest prompt is computed.
    Prefill,
    /// It has so many tokens.
    Decode(usize),
}

/// So many requests, the last with the longest prompt: other ones for every salt, so that none is found in the prefix cache.
fn requests(count: usize, salt: i32) -> Vec<SessionRequest> {
    let sampling = |i: usize| if i.is_multiple_of(2) { greedy() } else { sampled(i as u64) };
    let length = |i: usize| if i + 1 == count { 330 } else { 20 + 20 * i };
    (0..count).map(|i| request(prompt(length(i), salt * 8 + i as i32), TOKENS, sampling(i))).collect()
}

/// Rows that a stage computes for these requests if nobody dies.
fn rows(requests: &[SessionRequest]) -> u64 {
    requests.iter().map(|request| request.prompt.len() as u64 + u64::from(TOKENS) - 1).sum()
}

fn computed(engine: &Engine) -> Vec<u64> {
    engine.status().stages.iter().map(|stage| stage.computed_rows).collect()
}

/// Reads on until `phase`, does what is to be done then, and reads the rest.
async fn read_and(mut stream: SessionStream, phase: Phase, mut then: impl FnMut()) -> Vec<Token> {
    let (mut tokens, mut has_come) = (Vec::new(), false);
    loop {
        match stream.next().await.expect("the stream goes on until its ending") {
            SessionEvent::Token(sampled) => tokens.push(sampled.token),
            SessionEvent::Ended(_) => break,
            SessionEvent::Failed(reason) | SessionEvent::Lost(reason) => panic!("{reason}"),
            SessionEvent::Prefill { .. } | SessionEvent::Guesses { .. } => {}
        }
        let is_now = match phase {
            Phase::Prefill => true,
            Phase::Decode(count) => tokens.len() == count,
        };
        if is_now && !std::mem::replace(&mut has_come, true) {
            then();
        }
    }
    assert!(has_come);
    tokens
}

/// Kills stages under requests: their answers, and the rows that each stage has computed meanwhile.
async fn answers(
    engine: &Engine,
    asked: &[SessionRequest],
    victims: &[usize],
    phase: Phase,
) -> (Vec<Vec<Token>>, Vec<u64>) {
    let before = computed(engine);
    let mut streams: Vec<_> = asked.iter().map(|request| engine.start(request.clone()).unwrap()).collect();
    let watched = streams.pop().unwrap();
    let others = join_all(streams.into_iter().map(|stream| async { read(stream).await.unwrap().tokens }));
    let kill = || victims.iter().for_each(|&victim| kill(stage_pid(engine, victim).unwrap()));
    let (mut answers, last) = tokio::join!(others, read_and(watched, phase, kill));
    answers.push(last);
    (answers, computed(engine).iter().zip(before).map(|(after, before)| after - before).collect())
}

/// The same, and every answer must be that of `whole`.
async fn killed(
    engine: &Engine,
    whole: &Engine,
    asked: &[SessionRequest],
    victims: &[usize],
    phase: Phase,
) -> Vec<u64> {
    let (answers, computed) = answers(engine, asked, victims, phase).await;
    for (request, answer) in asked.iter().zip(answers) {
        assert_eq!(answer, run(whole, request.clone()).await.tokens, "{victims:?} in {phase:?}");
    }
    computed
}

struct Engines {
    lab: Lab,
    whole: Engine,
}

impl Engines {
    fn new() -> Engines {
        let lab = Lab::new();
        let whole = lab.engine(&lab.tiny("llama", Weights::Q4KM), ranges(&[0, 8]), true);
        Engines { lab, whole }
    }

    fn options(&self, bounds: &[u32], keep: Keep) -> EngineOptions {
        let model = self.lab.tiny("llama", Weights::Q4KM);
        EngineOptions { keep, ..self.lab.options(&model, ranges(bounds), true) }
    }

    fn ring(&self, bounds: &[u32]) -> Engine {
        Engine::load(self.options(bounds, Keep::default()), Stop::new(), |_, _| {}).unwrap()
    }
}

/// Of these victims, killed together, each survivor computes its rows once.
async fn survivors_compute_nothing_twice(bounds: &[u32], victims: &[&[usize]]) {
    let engines = Engines::new();
    for (count, phase) in [(1, Phase::Prefill), (1, Phase::Decode(1)), (8, Phase::Prefill), (8, Phase::Decode(9))] {
        // Another one each time: a stage that dies again and again is not started again at once.
        let engine = engines.ring(bounds);
        for (salt, victims) in (0..).zip(victims) {
            let asked = requests(count, salt);
            let once = rows(&asked);
            let computed = killed(&engine, &engines.whole, &asked, victims, phase).await;
            for (stage, &rows) in computed.iter().enumerate().filter(|(stage, _)| !victims.contains(stage)) {
                // Tokens that were on their way to the driver are chosen again, those of prompts with their chunk.
                let rows_again = if let Phase::Prefill = phase { u64::from(CHUNK_ROWS) } else { 1 };
                let again = if stage + 2 == bounds.len() { count as u64 * rows_again } else { 0 };
                assert!(
                    (once..=once + again).contains(&rows),
                    "{count} sessions, {victims:?} killed in {phase:?}: stage {stage} computed {rows} of {once}"
                );
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn any_of_three_stages_may_die_and_the_others_compute_nothing_twice() {
    survivors_compute_nothing_twice(&[0, 3, 5, 8], &[&[0], &[1], &[2]]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn any_of_four_stages_may_die_and_the_others_compute_nothing_twice() {
    survivors_compute_nothing_twice(&[0, 2, 4, 6, 8], &[&[0], &[1], &[2], &[3]]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_stages_may_die_at_once_and_the_others_compute_nothing_twice() {
    survivors_compute_nothing_twice(&[0, 2, 4, 6, 8], &[&[1, 2], &[0, 2], &[2, 3]]).await;
}

/// Files without a name in `folder` that a process has open.
fn nameless_files(pid: u32, folder: &Path) -> usize {
    let open = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let open = open.filter_map(|file| std::fs::read_link(file.ok()?.path()).ok());
    open.filter(|path| path.starts_with(folder) && path.to_string_lossy().ends_with("(deleted)")).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn without_exact_mode_nothing_is_computed_twice_either() {
    let engines = Engines::new();
    let options = EngineOptions { exact: false, ..engines.options(&[0, 3, 5, 8], Keep::default()) };
    let engine = Engine::load(options, Stop::new(), |_, _| {}).unwrap();
    for (salt, victim) in [(1, 0), (2, 1), (3, 2)] {
        let asked = requests(8, salt);
        let (answers, computed) = answers(&engine, &asked, &[victim], Phase::Decode(9)).await;
        assert!(answers.iter().all(|answer| answer.len() == TOKENS as usize));
        let once = rows(&asked);
        for stage in (0..3).filter(|&stage| stage != victim) {
            assert!((once..=once + 8).contains(&computed[stage]), "{victim} dies: {computed:?} of {once}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefix_from_the_cache_is_not_computed_again_either() {
    let engines = Engines::new();
    let engine = engines.ring(&[0, 3, 5, 8]);
    let begun = prompt(200, 1);
    run(&engine, request(begun.clone(), TOKENS, greedy())).await;
    let asked = [request([begun, prompt(100, 2)].concat(), TOKENS, greedy())];
    let computed = killed(&engine, &engines.whole, &asked, &[1], Phase::Decode(9)).await;
    // In exact mode whole chunks are found again.
    let once = rows(&asked) - 200 / u64::from(CHUNK_ROWS) * u64::from(CHUNK_ROWS);
    assert_eq!(computed[0], once);
    assert!((once..=once + 1).contains(&computed[2]), "{computed:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_memory_has_no_room_for_is_kept_in_a_file_without_a_name() {
    let engines = Engines::new();
    let options = engines.options(&[0, 3, 5, 8], Keep { memory_bytes: 0, file_bytes: 64 << 20 });
    let folder = options.slices_dir.clone();
    let engine = Engine::load(options, Stop::new(), |_, _| {}).unwrap();
    let asked = requests(8, 2);
    let computed = killed(&engine, &engines.whole, &asked, &[1], Phase::Decode(9)).await;
    assert_eq!(computed[0], rows(&asked));
    let folder = folder.canonicalize().unwrap();
    let files = (0..3).map(|stage| nameless_files(stage_pid(&engine, stage).unwrap(), &folder));
    assert_eq!(files.collect::<Vec<_>>(), [1, 1, 0], "the last stage keeps nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_kept_is_computed_again() {
    let engines = Engines::new();
    let small = Keep { memory_bytes: 0, file_bytes: 64 << 20 };
    let options = engines.options(&[0, 3, 5, 8], small);
    // Its processes cannot write to any file.
    let program = engines.lab.dir.path().join("program");
    let script = format!("#!/bin/sh\ntrap '' XFSZ\nulimit -f 0\nexec {} \"$@\"\n", options.program.display());
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let no_disk = EngineOptions { program, ..options };
    let no_room = engines.options(&[0, 3, 5, 8], Keep { file_bytes: 0, ..small });
    for options in [no_disk, no_room] {
        let engine = Engine::load(options, Stop::new(), |_, _| {}).unwrap();
        let asked = requests(8, 1);
        let computed = killed(&engine, &engines.whole, &asked, &[1], Phase::Decode(9)).await;
        assert!(computed[0] > rows(&asked), "{computed:?}");
        // Behind the loss everything is there.
        assert!(computed[2] <= rows(&asked) + 8, "{computed:?}");
    }
}
