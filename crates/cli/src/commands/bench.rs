//! `murmur bench`: tokens per second, as a client of the API sees them.
//!
//! Prompts are made of random words, other ones for each request, so that no prefix cache answers for the engine. Prefill counts
//! from the request to the first token, decode from the first token to the last.

use std::time::{Duration, Instant};

use anyhow::Context;
use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use serde::Serialize;
use serde_json::{Value, json};

use super::{Session, launch::Served, node_runtime};
use crate::{
    args::Bench,
    chat::{Question, answer},
    client::ApiClient,
    exit::{Code, Failure},
    target, ui,
};

const WORDS: [&str; 32] = [
    "river", "stone", "light", "under", "seven", "garden", "paper", "north", "quiet", "engine", "window", "letter",
    "silver", "morning", "bridge", "harvest", "copper", "winter", "signal", "market", "forest", "number", "island",
    "carry", "follow", "between", "yellow", "minute", "simple", "record", "travel", "music",
];

/// One request's times.
#[derive(Debug, Clone, Copy)]
struct Times {
    prompt_tokens: u64,
    completion_tokens: u64,
    started: Instant,
    first: Instant,
    last: Instant,
}

/// One level of concurrency; medians over the repetitions.
#[derive(Debug, Clone, Serialize)]
struct Level {
    streams: u32,
    prompt_tokens: u64,
    completion_tokens: u64,
    first_token_ms: f64,
    prefill_tokens_per_s: f64,
    decode_tokens_per_s_per_stream: f64,
    decode_tokens_per_s: f64,
}

pub(super) fn run(session: &Session, args: Bench) -> anyhow::Result<()> {
    let runtime = node_runtime()?;
    let outcome = runtime.block_on(async {
        let target = target::find(session, args.model.as_ref()).await?;
        let served = Served::start(session, target, &args.engine).await?;
        let levels = tokio::select! {
            levels = measure_all(session, &served.client, &served.model, &args) => levels,
            _ = tokio::signal::ctrl_c() => Err(Failure::because(Code::Interrupted, "interrupted")),
        };
        let model = served.model.clone();
        served.end().await;
        levels.map(|levels| (model, levels))
    });
    runtime.shutdown_background();
    let (model, levels) = outcome?;
    if session.global.json {
        return ui::print_json(&json!({"model": model, "repeat": args.repeat, "levels": levels}));
    }
    let rows: Vec<Vec<String>> = levels
        .iter()
        .map(|level| {
            vec![
                level.streams.to_string(),
                level.prompt_tokens.to_string(),
                level.completion_tokens.to_string(),
                format!("{:.0}", level.first_token_ms),
                format!("{:.1}", level.prefill_tokens_per_s),
                format!("{:.1}", level.decode_tokens_per_s_per_stream),
                format!("{:.1}", level.decode_tokens_per_s),
            ]
        })
        .collect();
    let headings =
        ["STREAMS", "PROMPT", "TOKENS", "FIRST TOKEN ms", "PREFILL tok/s", "DECODE tok/s EACH", "DECODE tok/s ALL"];
    ui::print(&format!("{model}\n{}", ui::table(&headings, &rows, &[0, 1, 2, 3, 4, 5, 6])))
}

async fn measure_all(session: &Session, client: &ApiClient, model: &str, args: &Bench) -> anyhow::Result<Vec<Level>> {
    let mut random = StdRng::from_os_rng();
    // Whatever happens only once happens here.
    one_request(client, model, prompt(client, model, 8, &mut random).await?, 2).await?;
    let mut levels = Vec::new();
    for streams in &args.concurrency {
        let mut runs = Vec::new();
        for turn in 1..=args.repeat {
            if !session.global.quiet && !session.global.json {
                ui::say(&format!("{streams} streams, {turn} of {}", args.repeat));
            }
            let mut requests = Vec::new();
            for _ in 0..*streams {
                requests.push(one_request(
                    client,
                    model,
                    prompt(client, model, args.prompt_tokens, &mut random).await?,
                    args.max_tokens,
                ));
            }
            runs.push(futures::future::try_join_all(requests).await?);
        }
        levels.push(level(*streams, &runs));
    }
    Ok(levels)
}

/// A prompt of exactly so many tokens.
async fn prompt(client: &ApiClient, model: &str, tokens: u32, random: &mut StdRng) -> anyhow::Result<Vec<Value>> {
    let wanted = tokens as usize;
    // A word is a token or more in most vocabularies; in the smallest it is several.
    let words = (0..wanted.max(4)).filter_map(|_| WORDS.choose(random).copied()).collect::<Vec<_>>().join(" ");
    let text = format!("{} {words}", random.random::<u32>());
    let answer = client
        .post("/api/tokenize", &json!({"model": model, "content": text}))
        .await
        .context("tokenising the prompt")?;
    let mut ids = answer.get("tokens").and_then(Value::as_array).cloned().unwrap_or_default();
    if ids.is_empty() {
        return Err(Failure::because(
            Code::Failed,
            "the server made no tokens of a text. Is it murmur? `murmur doctor` tells",
        ));
    }
    while ids.len() < wanted {
        ids.extend_from_within(..ids.len().min(wanted - ids.len()));
    }
    ids.truncate(wanted);
    Ok(ids)
}

async fn one_request(client: &ApiClient, model: &str, prompt: Vec<Value>, max_tokens: u32) -> anyhow::Result<Times> {
    let body = json!({
        "model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true,
        "stream": true, "stream_options": {"include_usage": true},
    });
    let started = Instant::now();
    let (mut first, mut last) = (None, started);
    let finished = answer::stream(client, &Question { path: "/v1/completions", body }, |_| {
        last = Instant::now();
        first.get_or_insert(last);
        Ok(())
    })
    .await?;
    Ok(Times {
        prompt_tokens: finished.prompt_tokens.unwrap_or(0),
        completion_tokens: finished.completion_tokens.unwrap_or(0),
        started,
        // An answer of unprintable tokens only has no first text: its end is all that is known.
        first: first.unwrap_or_else(Instant::now),
        last: if first.is_some() { last } else { Instant::now() },
    })
}

fn level(streams: u32, runs: &[Vec<Times>]) -> Level {
    let rate = |tokens: u64, time: Duration| tokens as f64 / time.as_secs_f64().max(1e-9);
    let requests: Vec<Times> = runs.iter().flatten().copied().collect();
    let over_all = runs.iter().filter_map(|run| {
        let began = run.iter().map(|times| times.first).min()?;
        let ended = run.iter().map(|times| times.last).max()?;
        let tokens: u64 = run.iter().map(|times| times.completion_tokens.saturating_sub(1)).sum();
        Some(rate(tokens, ended - began))
    });
    Level {
        streams,
        prompt_tokens: requests.iter().map(|times| times.prompt_tokens).max().unwrap_or(0),
        completion_tokens: requests.iter().map(|times| times.completion_tokens).max().unwrap_or(0),
        first_token_ms: median(requests.iter().map(|times| (times.first - times.started).as_secs_f64() * 1e3)),
        prefill_tokens_per_s: median(
            requests.iter().map(|times| rate(times.prompt_tokens, times.first - times.started)),
        ),
        decode_tokens_per_s_per_stream: median(
            requests.iter().map(|times| rate(times.completion_tokens.saturating_sub(1), times.last - times.first)),
        ),
        decode_tokens_per_s: median(over_all),
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.as_slice() {
        [] => 0.0,
        all if all.len() % 2 == 1 => all[middle],
        all => (all[middle - 1] + all[middle]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_count_from_request_to_first_token_and_from_first_to_last() {
        let started = Instant::now();
        let at = |ms: u64| started + Duration::from_millis(ms);
        let times = |last| Times { prompt_tokens: 100, completion_tokens: 11, started, first: at(500), last: at(last) };
        let level = level(2, &[vec![times(1500), times(1500)]]);
        assert_eq!(level.first_token_ms.round(), 500.0);
        assert_eq!(level.prefill_tokens_per_s.round(), 200.0);
        assert_eq!(level.decode_tokens_per_s_per_stream.round(), 10.0);
        assert_eq!(level.decode_tokens_per_s.round(), 20.0);
    }

    #[test]
    fn a_median_of_an_even_number_is_the_mean_of_the_middle_two() {
        assert_eq!(median([4.0, 1.0, 3.0, 2.0].into_iter()), 2.5);
        assert_eq!(median(std::iter::empty()), 0.0);
    }
}
