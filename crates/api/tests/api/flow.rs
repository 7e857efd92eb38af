//! Clients that leave, that are too many, and a server that stops.

use std::time::Duration;

use murmur_api::backend::{Event, Finish, Refusal};
use serde_json::{Value, json};
use tokio::{sync::mpsc, time::timeout};

use crate::support::{Server, Stream, chat, completion, conducted, done, error, text};

const COMPLETIONS: &str = "/v1/completions";
const SOON: Duration = Duration::from_secs(60);

/// The generation's receiver is dropped: that is what cancels it in the node.
async fn assert_cancelled(node: &mpsc::Sender<Event>) {
    timeout(SOON, node.closed()).await.expect("the generation must be cancelled when its client leaves");
}

#[tokio::test]
async fn a_client_that_leaves_a_stream_cancels_it_even_while_nothing_is_sent() {
    let (fake, mut generations) = conducted();
    let server = Server::start(fake).await;
    let response = server.post("/v1/chat/completions", &chat(json!({"stream": true, "n": 2}))).send().await.unwrap();
    let nodes = [generations.recv().await.unwrap(), generations.recv().await.unwrap()];
    assert!(!nodes[0].is_closed());
    drop(response);
    for node in &nodes {
        assert_cancelled(node).await;
    }
    let metrics = server.get("/metrics").send().await.unwrap().text().await.unwrap();
    assert!(metrics.contains("murmur_generations_total{outcome=\"cancelled\"} 2"), "{metrics}");
}

#[tokio::test]
async fn a_client_that_leaves_while_it_waits_for_a_whole_answer_cancels_it() {
    let (fake, mut generations) = conducted();
    let server = Server::start(fake).await;
    let request = server.post(COMPLETIONS, &completion(json!({})));
    let waiting = tokio::spawn(request.send());
    let node = generations.recv().await.unwrap();
    node.send(text("a")).await.unwrap();
    waiting.abort();
    assert_cancelled(&node).await;
}

#[tokio::test]
async fn one_request_too_many_is_told_when_to_come_back() {
    let (fake, mut generations) = conducted();
    let server = Server::with(fake, |o| o.max_in_flight = 1).await;
    let first = server.post(COMPLETIONS, &completion(json!({"stream": true}))).send().await.unwrap();
    let node = generations.recv().await.unwrap();
    let second = server.post(COMPLETIONS, &completion(json!({}))).send().await.unwrap();
    assert_eq!(second.headers()["retry-after"], "1");
    let (status, error) = error(second).await;
    assert_eq!((status, error["type"].as_str()), (429, Some("rate_limit_error")));
    // What makes no work is answered all the same.
    for path in ["/health", "/metrics", "/v1/models", "/api/status"] {
        assert_eq!(server.get(path).send().await.unwrap().status(), 200);
    }
    node.send(done(1, 1, Finish::EndOfText)).await.unwrap();
    Stream::read(&first.text().await.unwrap()).assert_complete();
    // The place is free again.
    let third = tokio::spawn(server.post(COMPLETIONS, &completion(json!({}))).send());
    let node = generations.recv().await.unwrap();
    node.send(done(1, 1, Finish::EndOfText)).await.unwrap();
    assert_eq!(third.await.unwrap().unwrap().status(), 200);
}

#[tokio::test]
async fn a_refused_second_answer_cancels_the_first() {
    let (first, mut started) = mpsc::unbounded_channel();
    let fake = crate::support::Fake::answering(move |request| {
        if request.sampling.seed > 0 {
            let message = "There is no room; come back later.".to_owned();
            return Err(murmur_api::backend::Refusal::Busy { retry_after: SOON, message });
        }
        let (sender, events) = mpsc::channel(1);
        first.send(sender).unwrap();
        Ok(murmur_api::backend::Generation { prompt_tokens: 1, events })
    });
    let server = Server::start(fake).await;
    let (status, _) = server.fail(COMPLETIONS, &completion(json!({"n": 2, "seed": 0}))).await;
    assert_eq!(status, 429);
    assert_cancelled(&started.recv().await.unwrap()).await;
}

#[tokio::test]
async fn a_stopping_server_finishes_its_streams_and_takes_no_new_connections() {
    let (fake, mut generations) = conducted();
    let server = Server::start(fake).await;
    let address = server.address;
    let response = server.post(COMPLETIONS, &completion(json!({"stream": true}))).send().await.unwrap();
    let node = generations.recv().await.unwrap();
    let stopping = tokio::spawn(server.stop());
    let finishing = tokio::spawn(async move {
        node.send(text("to the end")).await.unwrap();
        node.send(done(1, 2, Finish::EndOfText)).await.unwrap();
    });
    let stream = Stream::read(&response.text().await.unwrap());
    stream.assert_complete();
    assert_eq!(stream.text(0, "text"), "to the end");
    finishing.await.unwrap();
    timeout(SOON, stopping).await.unwrap().unwrap();
    assert!(tokio::net::TcpStream::connect(address).await.is_err());
}

#[tokio::test]
async fn a_stopping_server_cuts_off_what_does_not_finish_and_the_client_can_tell() {
    let (fake, mut generations) = conducted();
    let server = Server::with(fake, |o| o.shutdown_grace = Duration::from_millis(50)).await;
    let response = server.post(COMPLETIONS, &completion(json!({"stream": true}))).send().await.unwrap();
    let node = generations.recv().await.unwrap();
    timeout(SOON, server.stop()).await.unwrap();
    assert_cancelled(&node).await;
    assert!(response.text().await.is_err(), "a cut-off stream must not look like one that ended");
}

#[tokio::test]
async fn answers_that_a_stopping_server_cuts_off_end_with_an_error() {
    let (fake, mut generations) = conducted();
    let server = Server::with(fake, |o| o.shutdown_grace = Duration::from_millis(50)).await;
    let stream = server.post(COMPLETIONS, &completion(json!({"stream": true}))).send().await.unwrap();
    let whole = tokio::spawn(server.post(COMPLETIONS, &completion(json!({}))).send());
    let nodes = [generations.recv().await.unwrap(), generations.recv().await.unwrap()];
    let fake = server.fake.clone();
    tokio::spawn(async move {
        fake.cut_off.notified().await;
        for node in nodes {
            let message = "the server is shutting down".to_owned();
            node.send(Event::Failed(Refusal::Failed { message })).await.unwrap();
        }
    });
    timeout(SOON, server.stop()).await.unwrap();
    let stream = Stream::read(&stream.text().await.unwrap());
    assert_eq!((stream.dones, stream.finish_reasons().len()), (0, 0));
    assert_eq!(stream.chunks.last().unwrap()["error"]["message"], "the server is shutting down");
    assert_eq!(whole.await.unwrap().unwrap().status(), 500);
}

#[tokio::test]
async fn many_clients_at_once_are_all_answered() {
    const CLIENTS: usize = 100;
    let server = std::sync::Arc::new(Server::start(crate::support::Fake::saying(&["a", "b"])).await);
    let ask = |i: usize| {
        let server = server.clone();
        async move { server.ask(COMPLETIONS, &completion(json!({"seed": i}))).await }
    };
    let answers: Vec<Value> = futures::future::join_all((0..CLIENTS).map(ask)).await;
    for (i, answer) in answers.iter().enumerate() {
        assert_eq!((answer["seed"].as_u64(), &answer["choices"][0]["text"]), (Some(i as u64), &json!("ab")));
    }
}
