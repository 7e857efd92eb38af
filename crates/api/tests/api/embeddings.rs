//! `/v1/embeddings`.

use murmur_api::backend::Prompt;
use serde_json::json;

use crate::support::{Fake, Server};

const PATH: &str = "/v1/embeddings";

#[tokio::test]
async fn vectors_come_as_numbers_or_as_base64_of_little_endian_floats() {
    let server = Server::start(Fake::saying(&[])).await;
    let answer = server.ask(PATH, &json!({"model": "embedder", "input": ["a", "b"]})).await;
    assert_eq!(
        answer,
        json!({
            "object": "list",
            "data": [
                {"object": "embedding", "index": 0, "embedding": [0.0, 0.6, -0.8]},
                {"object": "embedding", "index": 1, "embedding": [1.0, 0.6, -0.8]},
            ],
            "model": "embedder",
            "usage": {"prompt_tokens": 11, "total_tokens": 11},
        })
    );
    let body = json!({"model": "embedder", "input": "a", "encoding_format": "base64"});
    // 0.0, 0.6 and -0.8 as f32: 00000000 9a99193f cdcc4cbf
    assert_eq!(server.ask(PATH, &body).await["data"][0]["embedding"], "AAAAAJqZGT/NzEy/");
}

#[tokio::test]
async fn inputs_may_be_texts_or_token_ids() {
    let server = Server::start(Fake::saying(&[])).await;
    server.ask(PATH, &json!({"model": "embedder", "input": [[1, 2], [3]]})).await;
    assert!(matches!(&server.fake.embedded.lock().unwrap()[..], [Prompt::Tokens(a), Prompt::Tokens(b)]
        if *a == [1, 2] && *b == [3]));
    server.ask(PATH, &json!({"model": "auto", "input": "a"})).await;
    assert!(matches!(&server.fake.embedded.lock().unwrap()[..], [Prompt::Text(text)] if text == "a"));
}

#[tokio::test]
async fn what_embeddings_cannot_do_is_refused() {
    let server = Server::start(Fake::saying(&[])).await;
    for (more, param) in [
        (json!({"input": []}), "input"),
        (json!({"input": {}}), "input"),
        (json!({"input": null}), "input"),
        (json!({"input": vec!["a"; 2049]}), "input"),
        (json!({"dimensions": 2}), "dimensions"),
        (json!({"dimensions": 0}), "dimensions"),
        (json!({"encoding_format": "int8"}), "encoding_format"),
        (json!({"truncate": true}), "truncate"),
        (json!({"model": "org/tiny"}), "model"),
    ] {
        let mut body = json!({"model": "embedder", "input": "a"});
        for (key, value) in more.as_object().unwrap() {
            body[key] = value.clone();
        }
        let (status, error) = server.fail(PATH, &body).await;
        assert_eq!((status, error["param"].as_str()), (400, Some(param)), "{more}");
    }
    // The vectors' own length may be asked for.
    server.ask(PATH, &json!({"model": "embedder", "input": "a", "dimensions": 3})).await;
}
