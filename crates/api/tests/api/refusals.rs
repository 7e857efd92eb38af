//! Bad input: each gets a clear error in OpenAI's shape, and the server goes on.

use std::time::Duration;

use murmur_api::{backend::Refusal, limits::MAX_BODY_BYTES};
use reqwest::{Body, Method, header};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::support::{Fake, Server, chat, client, completion, error};

const PATHS: [&str; 2] = ["/v1/completions", "/v1/chat/completions"];

async fn raw(server: &Server, path: &str, content_type: Option<&str>, body: impl Into<Body>) -> (u16, Value) {
    let mut request = client().post(server.url(path)).body(body);
    if let Some(content_type) = content_type {
        request = request.header(header::CONTENT_TYPE, content_type);
    }
    error(request.send().await.unwrap()).await
}

#[tokio::test]
async fn bodies_that_are_not_json_objects_are_refused() {
    let server = Server::start(Fake::saying(&["x"])).await;
    let deep = "[".repeat(100_000);
    let bodies: [&[u8]; 10] = [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\"text\"",
        b"{\"prompt\": \"\xff\xfe\"}",
        b"{\"temperature\": NaN}",
        b"{\"temperature\": Infinity}",
        b"{\"temperature\": 1e999}",
        deep.as_bytes(),
    ];
    for path in PATHS {
        for body in bodies {
            let (status, error) = raw(&server, path, Some("application/json"), body.to_vec()).await;
            assert_eq!((status, error["type"].as_str()), (400, Some("invalid_request_error")), "{body:?}");
        }
    }
    let (_, error) = raw(&server, PATHS[0], Some("application/json"), b"{\"prompt\": \"\xff\"}".to_vec()).await;
    assert!(error["message"].as_str().unwrap().contains("UTF-8 at byte 12"), "{error}");
    server.ask(PATHS[0], &completion(json!({}))).await;
}

#[tokio::test]
async fn other_content_types_are_refused() {
    let server = Server::start(Fake::saying(&["x"])).await;
    let body = completion(json!({})).to_string();
    for content_type in [None, Some("text/plain"), Some("application/x-www-form-urlencoded"), Some("application/jsonx")]
    {
        assert_eq!(raw(&server, PATHS[0], content_type, body.clone()).await.0, 415, "{content_type:?}");
    }
    let request = client().post(server.url(PATHS[0])).header(header::CONTENT_TYPE, "Application/JSON; charset=utf-8");
    assert_eq!(request.body(body).send().await.unwrap().status(), 200);
}

#[tokio::test]
async fn a_body_of_100_mb_is_refused_with_an_answer_that_arrives() {
    const SIZE: usize = 100 * 1024 * 1024;
    let server = Server::start(Fake::saying(&["x"])).await;
    let (status, error) = raw(&server, PATHS[0], Some("application/json"), vec![b' '; SIZE]).await;
    assert_eq!((status, error["code"].as_str()), (413, Some("request_too_large")));
    assert!(error["message"].as_str().unwrap().contains(&MAX_BODY_BYTES.to_string()));
    // Without an announced length, too.
    let pieces = (0..SIZE / 65_536).map(|_| Ok::<_, std::io::Error>(vec![b' '; 65_536]));
    let body = Body::wrap_stream(futures::stream::iter(pieces));
    assert_eq!(raw(&server, PATHS[1], Some("application/json"), body).await.0, 413);
    server.ask(PATHS[0], &completion(json!({}))).await;
}

#[tokio::test]
async fn a_body_of_exactly_the_limit_is_read() {
    let server = Server::start(Fake::saying(&["x"])).await;
    let frame = completion(json!({"prompt": ""})).to_string().len();
    let body = completion(json!({"prompt": "a".repeat(MAX_BODY_BYTES - frame)}));
    assert_eq!(body.to_string().len(), MAX_BODY_BYTES);
    server.ask(PATHS[0], &body).await;
    let body = completion(json!({"prompt": "a".repeat(MAX_BODY_BYTES - frame + 1)}));
    assert_eq!(server.fail(PATHS[0], &body).await.0, 413);
}

#[tokio::test]
async fn unknown_routes_and_methods_have_openais_shape() {
    let server = Server::start(Fake::saying(&[])).await;
    for path in ["/", "/v1", "/v1/models/", "/v2/chat/completions", "/v1/chat/completions/"] {
        let (status, error) = error(server.get(path).send().await.unwrap()).await;
        assert_eq!(status, 404, "{path}: {error}");
    }
    for (method, path) in [(Method::GET, PATHS[0]), (Method::DELETE, "/v1/models/org/tiny"), (Method::POST, "/health")]
    {
        let response = client().request(method, server.url(path)).send().await.unwrap();
        assert!(response.headers().contains_key("allow"));
        let (status, error) = error(response).await;
        assert_eq!((status, error["code"].as_str()), (405, Some("method_not_allowed")));
    }
}

#[tokio::test]
async fn every_field_out_of_range_or_of_the_wrong_type_is_named() {
    let server = Server::start(Fake::saying(&["x"])).await;
    let bad = [
        ("temperature", json!(-0.1)),
        ("temperature", json!(101)),
        ("temperature", json!("NaN")),
        ("temperature", json!([])),
        ("top_p", json!(1.1)),
        ("top_p", json!(-1)),
        ("min_p", json!(2)),
        ("typical_p", json!(-0.5)),
        ("top_k", json!(-1)),
        ("top_k", json!(1.5)),
        ("repeat_penalty", json!(0)),
        ("penalty_last_n", json!(-1)),
        ("presence_penalty", json!(2.1)),
        ("frequency_penalty", json!(-2.1)),
        ("logit_bias", json!([])),
        ("logit_bias.a", json!({"a": 1})),
        ("logit_bias.-1", json!({"-1": 1})),
        ("logit_bias.1", json!({"1": 101})),
        ("logit_bias.1", json!({"1": "x"})),
        ("seed", json!(0.5)),
        ("seed", json!("1")),
        ("seed", json!(1e30)),
        ("n", json!(0)),
        ("n", json!(17)),
        ("max_tokens", json!(0)),
        ("max_tokens", json!(-1)),
        ("max_tokens", json!(1u64 << 40)),
        ("stop", json!(vec!["x"; 10_000])),
        ("stop", json!("")),
        ("stop", json!([""])),
        ("stop[1]", json!(["a", 1])),
        ("stop", json!("x".repeat(1025))),
        ("stop", json!({})),
        ("stream", json!("yes")),
        ("stream_options", json!({"include_usage": true})),
        ("ignore_eos", json!(1)),
        ("store", json!(true)),
        ("service_tier", json!("priority")),
        ("metadata", json!("x")),
        ("user", json!(1)),
        ("model", json!(7)),
        ("grammar", json!(1)),
        ("grammar", json!("x".repeat(300_000))),
        ("guided_regex", json!({})),
        ("response_format", json!("json")),
        ("response_format.type", json!({})),
        ("response_format.type", json!({"type": "xml"})),
        ("response_format.schema", json!({"type": "json_object", "schema": {}})),
        ("response_format.json_schema", json!({"type": "json_schema"})),
        ("response_format.json_schema.name", json!({"type": "json_schema", "json_schema": {"schema": {}}})),
        (
            "response_format.json_schema.name",
            json!({"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}),
        ),
        ("response_format.json_schema.schema", json!({"type": "json_schema", "json_schema": {"name": "a"}})),
        ("frobnicate", json!(1)),
    ];
    for (param, value) in bad {
        let field = param.split(['.', '[']).next().unwrap();
        for (path, body) in [(PATHS[0], completion(json!({field: value}))), (PATHS[1], chat(json!({field: value})))] {
            let (status, error) = server.fail(path, &body).await;
            assert_eq!((status, error["param"].as_str()), (400, Some(param)), "{path} {error}");
            assert!(error["message"].as_str().unwrap().len() < 500, "{error}");
        }
    }
    assert!(server.fake.seen.lock().unwrap().is_empty());
}

#[tokio::test]
async fn bad_chats_are_refused_with_the_place() {
    let server = Server::start(Fake::saying(&["x"])).await;
    let message = |message: Value| json!({"messages": [message]});
    let tool = json!({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}});
    let bad = [
        ("messages", json!({"messages": null})),
        ("messages", json!({"messages": []})),
        ("messages", json!({"messages": "hi"})),
        ("messages", json!({"messages": vec![json!({"role": "user", "content": "a"}); 4097]})),
        ("messages[0]", message(json!("hi"))),
        ("messages[0].role", message(json!({"content": "a"}))),
        ("messages[0].role", message(json!({"role": "owner", "content": "a"}))),
        ("messages[0].role", message(json!({"role": "function", "name": "f", "content": "a"}))),
        ("messages[0].content", message(json!({"role": "user"}))),
        ("messages[0].content", message(json!({"role": "user", "content": 1}))),
        ("messages[0].content", message(json!({"role": "assistant", "content": null}))),
        ("messages[0].content[0]", message(json!({"role": "user", "content": ["a"]}))),
        (
            "messages[0].content[0].type",
            message(json!({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]})),
        ),
        ("messages[0].content[0].text", message(json!({"role": "user", "content": [{"type": "text"}]}))),
        (
            "messages[0].content[0].cache",
            message(json!({"role": "user", "content": [{"type": "text", "text": "", "cache": 1}]})),
        ),
        ("messages[0].mood", message(json!({"role": "user", "content": "a", "mood": "good"}))),
        ("messages[0].tool_call_id", message(json!({"role": "tool", "content": "a"}))),
        ("messages[0].tool_calls", message(json!({"role": "user", "content": "a", "tool_calls": []}))),
        (
            "messages[0].function_call",
            message(json!({"role": "assistant", "content": "a", "function_call": {"name": "f"}})),
        ),
        ("messages[0].tool_calls[0].function", message(json!({"role": "assistant", "tool_calls": [{"id": "1"}]}))),
        (
            "messages[0].tool_calls[0].function.arguments",
            message(
                json!({"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}]}),
            ),
        ),
        ("top_logprobs", json!({"top_logprobs": 2})),
        ("top_logprobs", json!({"logprobs": true, "top_logprobs": 21})),
        ("logprobs", json!({"logprobs": 2})),
        ("max_tokens", json!({"max_tokens": 1, "max_completion_tokens": 2})),
        ("functions", json!({"functions": []})),
        ("function_call", json!({"function_call": "auto"})),
        ("audio", json!({"audio": {}})),
        ("prediction", json!({"prediction": {}})),
        ("modalities", json!({"modalities": ["text", "audio"]})),
        ("reasoning_effort", json!({"reasoning_effort": "extreme"})),
        ("chat_template_kwargs.nonsense", json!({"chat_template_kwargs": {"nonsense": 1}})),
        ("chat_template_kwargs.messages", json!({"chat_template_kwargs": {"messages": []}})),
        (
            "stream_options.include_obfuscation",
            json!({"stream": true, "stream_options": {"include_obfuscation": true}}),
        ),
        ("tools[0]", json!({"tools": ["f"]})),
        ("tools[0].type", json!({"tools": [{"type": "custom", "custom": {"name": "f"}}]})),
        ("tools[0].function", json!({"tools": [{"type": "function"}]})),
        ("tools[0].function.name", json!({"tools": [{"type": "function", "function": {"name": "not a name"}}]})),
        (
            "tools[0].function.strictness",
            json!({"tools": [{"type": "function", "function": {"name": "f", "strictness": 1}}]}),
        ),
        ("tools", json!({"tools": vec![tool.clone(); 129]})),
        ("tool_choice", json!({"tool_choice": "required"})),
        ("tool_choice", json!({"tools": [tool.clone()], "tool_choice": "any"})),
        (
            "tool_choice",
            json!({"tools": [tool.clone()], "tool_choice": {"type": "function", "function": {"name": "g"}}}),
        ),
        ("tool_choice.type", json!({"tools": [tool.clone()], "tool_choice": {"type": "allowed_tools"}})),
        ("response_format", json!({"tools": [tool], "response_format": {"type": "json_object"}})),
    ];
    for (param, more) in bad {
        let (status, error) = server.fail(PATHS[1], &chat(more)).await;
        assert_eq!((status, error["param"].as_str()), (400, Some(param)), "{error}");
    }
    assert!(server.fake.seen.lock().unwrap().is_empty());
}

#[tokio::test]
async fn what_the_node_refuses_has_the_right_status_and_header() {
    let message = || "what happened, and what to do".to_owned();
    let retry_after = Duration::from_millis(1500);
    let cases = [
        (Refusal::Busy { retry_after, message: message() }, 429, Some("2"), "rate_limit_error"),
        (Refusal::NotReady { retry_after: Duration::ZERO, message: message() }, 503, Some("1"), "server_error"),
        (Refusal::NoSuchModel { message: message() }, 404, None, "invalid_request_error"),
        (Refusal::Failed { message: message() }, 500, None, "server_error"),
        (
            Refusal::BadRequest {
                message: message(),
                param: Some("messages".into()),
                code: Some("context_length_exceeded".into()),
            },
            400,
            None,
            "invalid_request_error",
        ),
    ];
    for (refusal, status, wait, kind) in cases {
        let server = Server::start(Fake::refusing(refusal)).await;
        for stream in [false, true] {
            let response = server.post(PATHS[0], &completion(json!({"stream": stream}))).send().await.unwrap();
            assert_eq!(response.headers().get("retry-after").map(|value| value.to_str().unwrap()), wait);
            let (found, error) = error(response).await;
            assert_eq!((found, error["type"].as_str()), (status, Some(kind)));
            if status == 400 {
                assert_eq!(
                    (error["param"].as_str(), error["code"].as_str()),
                    (Some("messages"), Some("context_length_exceeded"))
                );
            }
        }
    }
}

#[tokio::test]
async fn what_is_not_http_does_not_disturb_the_server() {
    let server = Server::start(Fake::saying(&["x"])).await;
    let huge_header = format!("GET /health HTTP/1.1\r\nhost: localhost\r\nx: {}\r\n\r\n", "a".repeat(1 << 20));
    let many_headers = format!("GET /health HTTP/1.1\r\nhost: localhost\r\n{}\r\n", "x: y\r\n".repeat(200));
    for garbage in [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc".as_slice(),
        b"GARBAGE\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nhost: evil.example\r\n\r\n",
        huge_header.as_bytes(),
        many_headers.as_bytes(),
    ] {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        // The server may answer and close before all is written.
        let _ = stream.write_all(garbage).await;
        let _ = stream.shutdown().await;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        let answer = String::from_utf8_lossy(&answer);
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
    }
    server.ask(PATHS[0], &completion(json!({}))).await;
}
