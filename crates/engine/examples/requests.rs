//! Measures requests per second, for one token each: straight into an engine, and through the API of running servers.
//!
//! `requests CHILD MODEL SCRATCH_DIR CONCURRENCY REQUESTS ROUNDS [ADDRESS...]` measures all in turns and prints a line of JSON for
//! each round: requests per second of `engine` and of each address.
#![allow(clippy::expect_used, clippy::panic, clippy::print_stdout)] // a tool for its developers

use std::{path::PathBuf, time::Instant};

use futures::{
    FutureExt,
    future::{BoxFuture, join_all},
};
use murmur_engine::{Engine, EngineOptions, Patience, SessionEvent, SessionRequest, Stop};
use murmur_gguf::{Gguf, LayerRange};
use murmur_protocol::sampling::{SamplingParams, Token};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
};

const PROMPT_TOKENS: usize = 16;
/// Ids that exist in any vocabulary of at least a thousand tokens and are no special tokens.
const TOKENS: std::ops::Range<Token> = 300..1000;

fn options(child: &str, model: &str, scratch: &str, concurrency: usize) -> EngineOptions {
    let model = PathBuf::from(model);
    let layers = Gguf::open(&model).expect("the model opens").layer_count().expect("the model has layers");
    EngineOptions {
        program: PathBuf::from(child),
        model,
        slices_dir: PathBuf::from(scratch),
        embedding: false,
        ranges: vec![LayerRange::new(0, layers)],
        context_tokens: 2048,
        parallel: u32::try_from(concurrency).expect("a small number"),
        queue_max: 64,
        chunk_rows: 256,
        threads: Some(1),
        exact: false,
        gpu_layers: 0,
        patience: Patience::default(),
    }
}

/// One that no earlier request shares a prefix with.
fn prompt(mut number: usize) -> Vec<Token> {
    let digit = |_| {
        let digit = number % TOKENS.len();
        number /= TOKENS.len();
        TOKENS.start + digit as Token
    };
    (0..PROMPT_TOKENS).map(digit).collect()
}

async fn directly(engine: &Engine, number: usize) {
    let sampling = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
    let request = SessionRequest { prompt: prompt(number), generated: Vec::new(), max_tokens: 1, sampling };
    let mut stream = engine.start(request).expect("there is room");
    while let Some(event) = stream.next().await {
        if let SessionEvent::Failed(reason) = event {
            panic!("{reason}");
        }
    }
}

/// As a program does that keeps its connection.
async fn by_api(connection: &mut BufReader<TcpStream>, number: usize) {
    let body = format!(
        "{{\"model\":\"auto\",\"prompt\":{:?},\"max_tokens\":1,\"temperature\":0,\"ignore_eos\":true}}",
        prompt(number)
    );
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    connection.write_all((head + &body).as_bytes()).await.expect("the server reads");
    let (mut line, mut length) = (String::new(), 0);
    connection.read_line(&mut line).await.expect("the server answers");
    assert!(line.contains(" 200 "), "{line}");
    while line != "\r\n" {
        line.clear();
        connection.read_line(&mut line).await.expect("the server answers");
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().expect("a number");
        }
    }
    connection.read_exact(&mut vec![0; length]).await.expect("the whole answer comes");
}

/// Requests per second of workers that begin a request as soon as their last one has ended.
async fn rate(requests: usize, workers: Vec<BoxFuture<'_, ()>>) -> f64 {
    let started = Instant::now();
    join_all(workers).await;
    requests as f64 / started.elapsed().as_secs_f64()
}

#[tokio::main]
async fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [child, model, scratch, concurrency, requests, rounds, addresses @ ..] = args.as_slice() else {
        panic!("usage: requests CHILD MODEL SCRATCH_DIR CONCURRENCY REQUESTS ROUNDS [ADDRESS...]");
    };
    let number = |text: &String| text.parse::<usize>().expect("a number");
    let (concurrency, requests, rounds) = (number(concurrency), number(requests), number(rounds));
    let engine = Engine::load(options(child, model, scratch, concurrency), Stop::new(), |_, _| {}).expect("it loads");
    // The first round warms up.
    for round in 0..=rounds {
        // Every request of every turn has a number of its own.
        let numbers = |turn: usize, worker: usize| {
            let first = (round * (addresses.len() + 1) + turn) * requests;
            (first + worker..first + requests).step_by(concurrency)
        };
        let mut rates = Vec::new();
        for (turn, target) in [None].into_iter().chain(addresses.iter().map(Some)).enumerate() {
            let mut workers = Vec::new();
            for worker in 0..concurrency {
                let (numbers, engine) = (numbers(turn, worker), &engine);
                workers.push(match target {
                    None => async move {
                        for number in numbers {
                            directly(engine, number).await;
                        }
                    }
                    .boxed(),
                    Some(address) => {
                        let mut connection =
                            BufReader::new(TcpStream::connect(address).await.expect("the server is there"));
                        async move {
                            for number in numbers {
                                by_api(&mut connection, number).await;
                            }
                        }
                        .boxed()
                    }
                });
            }
            let name = target.map_or("engine", String::as_str);
            rates.push(format!("\"{name}\":{:.1}", rate(requests, workers).await));
        }
        if round > 0 {
            println!("{{{}}}", rates.join(","));
        }
    }
}
