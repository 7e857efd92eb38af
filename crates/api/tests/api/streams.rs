//! What a stream consists of, in which order, and how it ends.

use std::time::Duration;

use murmur_api::backend::{Event, Finish, Prompt, Refusal};
use reqwest::Response;
use serde_json::{Value, json};

use crate::support::{
    CACHED_TOKENS, EVENTS, Fake, PROMPT_TOKENS, Server, Stream, chat, completion, conducted, done, play, script, text,
    token,
};

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

/// Reads a stream until it contains something.
async fn read_until(response: &mut Response, wanted: &str) -> String {
    let mut read = String::new();
    while !read.contains(wanted) {
        let chunk = response.chunk().await.unwrap().unwrap_or_else(|| panic!("{wanted} is not in {read}"));
        read.push_str(std::str::from_utf8(&chunk).unwrap());
    }
    read
}

#[tokio::test]
async fn a_completion_streams_text_then_the_finish_reason_then_one_done() {
    let server = Server::start(Fake::saying(&["a", "", "b"])).await;
    let stream = server.stream(COMPLETIONS, &completion(json!({"stream": true, "seed": 3}))).await;
    stream.assert_complete();
    let choices: Vec<_> = stream.chunks.iter().map(|chunk| chunk["choices"][0].clone()).collect();
    let choice =
        |text: &str, finish: Value| json!({"index": 0, "text": text, "logprobs": null, "finish_reason": finish});
    assert_eq!(choices, [choice("a", Value::Null), choice("b", Value::Null), choice("", json!("stop"))]);
    for chunk in &stream.chunks {
        assert_eq!((&chunk["object"], &chunk["seed"]), (&json!("text_completion"), &json!(3)));
        assert_eq!(chunk["id"], stream.chunks[0]["id"]);
        assert!(chunk.get("usage").is_none());
    }
}

#[tokio::test]
async fn a_chat_streams_the_role_first_and_the_usage_last_when_asked() {
    let server = Server::start(Fake::saying(&["Hel", "lo"])).await;
    let body = chat(json!({"stream": true, "stream_options": {"include_usage": true}}));
    let stream = server.stream(CHAT, &body).await;
    stream.assert_complete();
    let [first, middle @ .., last] = &stream.chunks[..] else { panic!("{stream:?}") };
    assert_eq!(first["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert_eq!(first["object"], "chat.completion.chunk");
    assert_eq!(stream.text(0, "content"), "Hello");
    assert_eq!(stream.finish_reasons(), ["stop"]);
    assert_eq!(middle.last().unwrap()["choices"][0]["delta"], json!({}));
    assert!(middle.iter().all(|chunk| chunk.get("usage") == Some(&Value::Null)));
    assert_eq!(last["choices"], json!([]));
    assert_eq!(
        last["usage"],
        json!({
            "prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10,
            "prompt_tokens_details": {"cached_tokens": 3},
        })
    );
}

#[tokio::test]
async fn several_answers_stream_at_once_and_each_ends_once() {
    let fake = Fake::answering(|request| {
        let piece = request.sampling.seed.to_string();
        Ok(play(script(request, &[&piece, &piece], Finish::EndOfText)))
    });
    let server = Server::start(fake).await;
    let stream = server.stream(CHAT, &chat(json!({"stream": true, "n": 3, "seed": 4}))).await;
    stream.assert_complete();
    for (index, wanted) in ["44", "55", "66"].iter().enumerate() {
        assert_eq!(stream.text(index as u64, "content"), *wanted);
    }
    assert_eq!(stream.finish_reasons(), ["stop"; 3]);
}

#[tokio::test]
async fn a_failure_after_the_start_is_an_error_event_without_a_false_end() {
    let failed = || Event::Failed(Refusal::Failed { message: "the engine stopped and could not be restarted".into() });
    for path in [COMPLETIONS, CHAT] {
        // Told, or by silence: a generation that just ends is not a complete one.
        for events in [vec![text("half"), failed()], vec![text("half")], vec![failed()], vec![]] {
            let events = std::sync::Mutex::new(Some(events));
            let server =
                Server::start(Fake::answering(move |_| Ok(play(events.lock().unwrap().take().unwrap())))).await;
            let body = if path == CHAT { chat(json!({"stream": true})) } else { completion(json!({"stream": true})) };
            let stream = server.stream(path, &body).await;
            assert_eq!(stream.dones, 0);
            assert!(stream.finish_reasons().is_empty(), "{stream:?}");
            let error = &stream.chunks.last().unwrap()["error"];
            assert_eq!(error["type"], "server_error");
            assert!(error["message"].as_str().unwrap().len() > 10);
        }
    }
}

#[tokio::test]
async fn one_failed_answer_of_several_ends_the_stream_with_an_error() {
    let fake = Fake::answering(|request| match request.sampling.seed {
        1 => Ok(play(vec![text("x")])),
        _ => Ok(play(script(request, &["y"], Finish::EndOfText))),
    });
    let server = Server::start(fake).await;
    let stream = server.stream(COMPLETIONS, &completion(json!({"stream": true, "n": 2, "seed": 0}))).await;
    assert_eq!(stream.dones, 0);
    assert!(stream.chunks.last().unwrap()["error"].is_object());
}

#[tokio::test]
async fn silence_is_filled_with_progress_while_the_prompt_is_read() {
    let (fake, mut generations) = conducted();
    let server = Server::with(fake, |o| o.keep_alive = Duration::from_millis(20)).await;
    let mut response = server.post(COMPLETIONS, &completion(json!({"stream": true}))).send().await.unwrap();
    let node = generations.recv().await.unwrap();
    node.send(Event::Loading { fraction: 0.25 }).await.unwrap();
    read_until(&mut response, ": loading 25 %\n\n").await;
    node.send(Event::Prefill { done_tokens: 0, cached_tokens: 0 }).await.unwrap();
    read_until(&mut response, ": prefill 0/7\n\n").await;
    node.send(Event::Prefill { done_tokens: 5, cached_tokens: CACHED_TOKENS }).await.unwrap();
    read_until(&mut response, ": prefill 5/7\n\n").await;
    node.send(text("a")).await.unwrap();
    let read = read_until(&mut response, ": keep-alive\n\n").await;
    assert!(read.contains("\"text\":\"a\""));
    node.send(done(1, 2, Finish::EndOfText)).await.unwrap();
    let rest = response.text().await.unwrap();
    let stream = Stream::read(&rest);
    stream.assert_complete();
}

#[tokio::test]
async fn each_token_is_sent_when_it_is_there() {
    let (fake, mut generations) = conducted();
    let server = Server::start(fake).await;
    let mut response = server.post(CHAT, &chat(json!({"stream": true}))).send().await.unwrap();
    read_until(&mut response, "\"role\":\"assistant\"").await;
    let node = generations.recv().await.unwrap();
    for piece in ["one", "two", "three"] {
        node.send(text(piece)).await.unwrap();
        let read = read_until(&mut response, "\n\n").await;
        assert!(read.contains(piece), "{read}");
    }
}

#[tokio::test]
async fn log_probabilities_are_sent_also_for_tokens_without_text() {
    let fake = Fake::answering(|request| {
        let half = Event::Text { text: String::new(), tokens: vec![token(b"\xc3")] };
        let rest = Event::Text { text: "ä".into(), tokens: vec![token(b"\xa4")] };
        Ok(play(vec![half, rest, done(request.sampling.seed, 2, Finish::EndOfText)]))
    });
    let server = Server::start(fake).await;
    let stream = server.stream(CHAT, &chat(json!({"stream": true, "logprobs": true, "top_logprobs": 2}))).await;
    let bytes: Vec<_> =
        stream.chunks.iter().filter_map(|c| c["choices"][0]["logprobs"]["content"][0]["bytes"].as_array()).collect();
    assert_eq!(bytes, [&[json!(0xc3)], &[json!(0xa4)]]);
    assert_eq!(stream.text(0, "content"), "ä");
}

#[tokio::test]
async fn a_stream_holds_as_many_events_as_the_node_allows_and_no_more() {
    const TOTAL: usize = 50_000;
    let (fake, mut generations) = conducted();
    let server = Server::start(fake).await;
    let response = server.post(COMPLETIONS, &completion(json!({"stream": true}))).send().await.unwrap();
    let node = generations.recv().await.unwrap();
    // Produce until the channel stays full: then sockets and buffers are full, too, and nothing else takes events.
    let mut sent = 0;
    let piece =
        |i: usize| text(&format!("{i:06} and some more text to fill the buffers on the way to a client that sleeps "));
    while let Ok(permit) = tokio::time::timeout(Duration::from_secs(1), node.reserve()).await {
        permit.unwrap().send(piece(sent));
        sent += 1;
        assert!(sent < TOTAL, "{sent} events were swallowed although nobody reads");
    }
    assert!(sent > EVENTS);
    // The reader wakes up: nothing was lost, nothing came twice.
    let producer = tokio::spawn(async move {
        for i in sent..TOTAL {
            node.send(piece(i)).await.unwrap();
        }
        node.send(done(1, TOTAL as u32, Finish::Length)).await.unwrap();
    });
    let stream = Stream::read(&response.text().await.unwrap());
    producer.await.unwrap();
    stream.assert_complete();
    let wanted = (0..TOTAL).map(|i| i.to_string());
    let found =
        stream.chunks.iter().filter_map(|chunk| chunk["choices"][0]["text"].as_str()).filter(|text| !text.is_empty());
    assert!(found.map(|text| text[..6].parse::<usize>().unwrap().to_string()).eq(wanted));
    assert_eq!(stream.finish_reasons(), ["length"]);
    assert_eq!(PROMPT_TOKENS, 7);
}

#[tokio::test]
async fn a_prompt_with_a_magic_text_is_a_prompt_like_any_other() {
    let server = Server::start(Fake::saying(&["x"])).await;
    for prompt in ["EXO_TEST_ERROR", "__test__", "data: [DONE]"] {
        server.ask(COMPLETIONS, &completion(json!({"prompt": prompt}))).await;
        assert!(matches!(server.fake.last().prompt, Prompt::Text(text) if text == prompt));
    }
}
