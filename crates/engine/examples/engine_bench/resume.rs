//! What the death of a stage costs a running answer: the pause until its next token, with what stages keep and without.

use std::time::{Duration, Instant};

use murmur_engine::{Engine, Keep, SessionRequest};
use murmur_protocol::{
    codec::Codec,
    sampling::{SamplingParams, Token},
};

use super::{Place, next_token, prompt};

/// Tokens of the answer before a stage is killed.
const TOKENS_BEFORE: usize = 8;
const TOKENS: u32 = 16;
/// Stages that cannot keep anything.
const NOTHING: Keep = Keep { memory_bytes: 0, file_bytes: 0 };

/// Prints the pause for each stage in turn, and of it the time for which the stage was being loaded.
pub(crate) async fn measure(place: &Place<'_>, threads: u32, stages: u32, context: usize) {
    for keep in [NOTHING, Keep::default()] {
        let engine = place.load_cut(stages, 1, threads, true, keep, Codec::F32);
        for victim in 0..stages as usize {
            let before = rows(&engine);
            let (pause, loading) = pause(&engine, prompt(1 + victim, context), victim).await;
            let rows: Vec<u64> = rows(&engine).iter().zip(before).map(|(after, before)| after - before).collect();
            println!(
                r#"{{"keeps":{},"killed":{victim},"pause_ms":{:.0},"loading_ms":{:.0},"rows_by_stage":{rows:?}}}"#,
                keep != NOTHING,
                pause.as_secs_f64() * 1e3,
                loading.as_secs_f64() * 1e3,
            );
        }
    }
}

fn rows(engine: &Engine) -> Vec<u64> {
    engine.status().stages.iter().map(|stage| stage.computed_rows).collect()
}

async fn pause(engine: &Engine, prompt: Vec<Token>, victim: usize) -> (Duration, Duration) {
    let sampling = SamplingParams { ignore_eos: true, ..SamplingParams::default() };
    let request = SessionRequest { prompt, generated: Vec::new(), max_tokens: TOKENS, sampling };
    let mut stream = engine.start(request).expect("there is room");
    for _ in 0..TOKENS_BEFORE {
        next_token(&mut stream).await.expect("the answer goes on");
    }
    let stage = || engine.status().stages.swap_remove(victim);
    let restarts = stage().restarts;
    let process = stage().process_id.and_then(|id| rustix::process::Pid::from_raw(id as i32)).expect("it runs");
    let killed = Instant::now();
    rustix::process::kill_process(process, rustix::process::Signal::KILL).expect("it can be killed");
    let mut loaded = None;
    let mut next = Box::pin(next_token(&mut stream));
    loop {
        match tokio::time::timeout(Duration::from_millis(1), &mut next).await {
            Err(_) if stage().restarts > restarts => drop(loaded.get_or_insert_with(|| killed.elapsed())),
            Err(_) => {}
            // Tokens that were on their way when it died.
            Ok(Some(_)) if stage().restarts == restarts => {
                drop(next);
                next = Box::pin(next_token(&mut stream));
            }
            Ok(token) => {
                token.expect("the answer goes on");
                let pause = killed.elapsed();
                return (pause, loaded.unwrap_or(pause));
            }
        }
    }
}
