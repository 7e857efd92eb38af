//! Requests per second, for one token each: straight into an engine, and through the API of running servers.

use std::time::Instant;

use futures::{
    FutureExt,
    future::{BoxFuture, join_all},
};
use murmur_engine::Engine;
use murmur_protocol::sampling::SamplingParams;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
};

use crate::{Place, answer, prompt};

const PROMPT_TOKENS: usize = 16;

async fn directly(engine: &Engine, number: usize) {
    let sampling = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
    answer(engine, prompt(number, PROMPT_TOKENS), 1, sampling).await;
}

/// As a program does that keeps its connection.
async fn by_api(connection: &mut BufReader<TcpStream>, number: usize) {
    let body = format!(
        "{{\"model\":\"auto\",\"prompt\":{:?},\"max_tokens\":1,\"temperature\":0,\"ignore_eos\":true}}",
        prompt(number, PROMPT_TOKENS)
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

/// In turns: the engine, then each of the addresses. Prints requests per second of `engine` and of each address, for each round.
pub(crate) async fn measure(place: &Place<'_>, concurrency: usize, requests: usize, rounds: usize, addresses: &[&str]) {
    let engine = place.load(u32::try_from(concurrency).expect("a small number"), 1, false);
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
            let name = target.copied().unwrap_or("engine");
            rates.push(format!("\"{name}\":{:.1}", rate(requests, workers).await));
        }
        if round > 0 {
            println!("{{{}}}", rates.join(","));
        }
    }
}
