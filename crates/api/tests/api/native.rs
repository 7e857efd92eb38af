//! Models, health, metrics, status, tokenizer.

use std::sync::Arc;

use murmur_api::backend::{ModelCard, ModelKind, ModelState};
use serde_json::{Value, json};

use crate::support::{Fake, Server, card, completion, error};

#[tokio::test]
async fn models_are_listed_and_found_by_names_with_slashes() {
    let server = Server::start(Fake::saying(&[])).await;
    let list: Value = server.get("/v1/models").send().await.unwrap().json().await.unwrap();
    assert_eq!(list["object"], "list");
    assert_eq!(list["data"][0]["id"], "org/tiny");
    for path in ["/v1/models/org/tiny", "/v1/models/org%2Ftiny"] {
        let model: Value = server.get(path).send().await.unwrap().json().await.unwrap();
        assert_eq!(model["id"], "org/tiny");
        assert_eq!((model["object"].as_str(), model["owned_by"].as_str()), (Some("model"), Some("murmur")));
        assert_eq!((model["context_tokens"].as_u64(), model["created"].as_u64()), (Some(4096), Some(1_700_000_000)));
    }
    for path in ["/v1/models/none", "/v1/models/%ff%fe"] {
        let (status, error) = error(server.get(path).send().await.unwrap()).await;
        assert_eq!((status, error["code"].as_str()), (404, Some("model_not_found")));
    }
}

#[tokio::test]
async fn a_model_needs_no_name_where_there_is_one_and_a_name_or_auto_where_there_are_two() {
    let mut fake = Fake::saying(&["x"]);
    let server = Server::start(Fake::saying(&["x"])).await;
    for model in [json!("auto"), json!("default"), json!(null), json!("org/tiny")] {
        let answer = server.ask("/v1/completions", &completion(json!({"model": model}))).await;
        assert_eq!(answer["model"], "org/tiny");
    }
    let (status, error) = server.fail("/v1/completions", &completion(json!({"model": "gpt-4"}))).await;
    assert_eq!(
        (status, error["code"].as_str(), error["param"].as_str()),
        (404, Some("model_not_found"), Some("model"))
    );
    assert!(error["message"].as_str().unwrap().contains("`org/tiny`"), "{error}");

    fake.models.push(card("second", ModelKind::Generate));
    let server = Server::start(fake).await;
    assert_eq!(server.ask("/v1/completions", &completion(json!({"model": "auto"}))).await["model"], "org/tiny");
    let (status, error) = server.fail("/v1/completions", &completion(json!({"model": null}))).await;
    assert_eq!((status, error["param"].as_str()), (400, Some("model")));
    assert!(error["message"].as_str().unwrap().contains("`second`"), "{error}");
}

/// A node whose models are in these states.
fn in_states(states: [ModelState; 2]) -> Fake {
    let mut fake = Fake::saying(&["x"]);
    for (model, state) in fake.models.iter_mut().zip(states) {
        *model = Arc::new(ModelCard { state, ..(**model).clone() });
    }
    fake
}

fn failed() -> ModelState {
    ModelState::Failed { reason: "no such file".into() }
}

#[tokio::test]
async fn auto_prefers_a_model_that_can_be_asked_now() {
    for not_ready in [ModelState::Loading { fraction: 0.5 }, failed()] {
        let mut fake = in_states([not_ready, ModelState::Ready]);
        fake.models.push(card("second", ModelKind::Generate));
        let server = Server::start(fake).await;
        assert_eq!(server.ask("/v1/completions", &completion(json!({"model": "auto"}))).await["model"], "second");
    }
}

#[tokio::test]
async fn a_model_that_is_loaded_on_demand_is_asked_where_no_loaded_one_is_and_hinders_nobody() {
    let on_demand = |loading| ModelState::Available { loading };
    let server = Server::start(in_states([ModelState::Ready, on_demand(Some(0.5))])).await;
    assert_eq!(health(&server).await.0, 200);
    let models: Value = server.get("/v1/models").send().await.unwrap().json().await.unwrap();
    assert_eq!((&models["data"][1]["state"], &models["data"][1]["progress"]), (&json!("loading"), &json!(0.5)));
    let mut fake = in_states([failed(), ModelState::Ready]);
    fake.models.push(Arc::new(ModelCard { state: on_demand(None), ..(*card("second", ModelKind::Generate)).clone() }));
    let server = Server::start(fake).await;
    assert_eq!(server.ask("/v1/completions", &completion(json!({"model": "auto"}))).await["model"], "second");
}

async fn health(server: &Server) -> (u16, Option<String>, Value) {
    let response = server.get("/health").send().await.unwrap();
    let retry_after = response.headers().get("retry-after").map(|value| value.to_str().unwrap().to_owned());
    (response.status().as_u16(), retry_after, response.json().await.unwrap())
}

#[tokio::test]
async fn health_says_whether_the_models_are_ready() {
    let server = Server::start(Fake::saying(&[])).await;
    assert_eq!(health(&server).await, (200, None, json!({"status": "ok"})));

    let mut joining = Fake::saying(&[]);
    joining.is_joining = true;
    let server = Server::start(joining).await;
    assert_eq!(health(&server).await, (503, Some("2".into()), json!({"status": "joining"})));

    let half = ModelState::Loading { fraction: 0.5 };
    let server = Server::start(in_states([ModelState::Ready, half])).await;
    let models = json!([{"id": "org/tiny", "state": "ready"}, {"id": "embedder", "state": "loading", "progress": 0.5}]);
    let expected = json!({"status": "loading", "progress": 0.75, "models": models});
    assert_eq!(health(&server).await, (503, Some("2".into()), expected));

    let server = Server::start(in_states([ModelState::Ready, failed()])).await;
    let (status, _, body) = health(&server).await;
    assert_eq!((status, &body["models"][1]["reason"]), (200, &json!("no such file")));

    let server = Server::start(in_states([failed(), failed()])).await;
    let (status, retry_after, body) = health(&server).await;
    assert_eq!((status, retry_after.is_some(), &body["status"]), (503, true, &json!("failed")));

    let waiting = || ModelState::Waiting { reason: "2 GiB are missing".into() };
    let server = Server::start(in_states([failed(), waiting()])).await;
    let (status, _, body) = health(&server).await;
    assert_eq!(
        (status, &body["status"], &body["models"][1]["reason"]),
        (503, &json!("waiting"), &json!("2 GiB are missing"))
    );
    let server = Server::start(in_states([waiting(), ModelState::Ready])).await;
    assert_eq!(health(&server).await.0, 200);

    let server = Server::with(in_states([failed(), failed()]), |o| o.api_keys = vec!["key".into()]).await;
    assert_eq!(health(&server).await.2, json!({"status": "failed", "progress": 1.0}));
}

#[tokio::test]
async fn a_model_that_cannot_be_asked_yet_is_listed_and_requests_are_told_when_to_come_back() {
    let server = Server::start(in_states([ModelState::Loading { fraction: 0.25 }, failed()])).await;
    let list: Value = server.get("/v1/models").send().await.unwrap().json().await.unwrap();
    assert_eq!((&list["data"][0]["state"], &list["data"][0]["progress"]), (&json!("loading"), &json!(0.25)));
    assert_eq!((&list["data"][1]["state"], &list["data"][1]["reason"]), (&json!("failed"), &json!("no such file")));
    for (path, body, says) in [
        ("/v1/completions", completion(json!({})), "25 %"),
        ("/v1/completions", completion(json!({"model": null, "stream": true})), "25 %"),
        ("/v1/chat/completions", crate::support::chat(json!({})), "25 %"),
        ("/v1/embeddings", json!({"model": "embedder", "input": "x"}), "no such file"),
        ("/api/tokenize", json!({"model": "org/tiny", "content": "x"}), "25 %"),
    ] {
        let response = server.post(path, &body).send().await.unwrap();
        assert!(response.headers().contains_key("retry-after"), "{path}");
        let (status, error) = error(response).await;
        assert_eq!((status, error["code"].as_str()), (503, Some("model_not_ready")), "{path}");
        assert!(error["message"].as_str().unwrap().contains(says), "{error}");
    }
    assert!(server.fake.seen.lock().unwrap().is_empty());
}

#[tokio::test]
async fn metrics_count_requests_and_tokens_without_letting_clients_invent_labels() {
    let server = Server::start(Fake::saying(&["a", "b"])).await;
    server.ask("/v1/completions", &completion(json!({}))).await;
    server.stream("/v1/completions", &completion(json!({"stream": true}))).await;
    for path in ["/v1/models/org/tiny", "/nothing-here", "/nor-here"] {
        server.get(path).send().await.unwrap().text().await.unwrap();
    }
    let response = server.get("/metrics").send().await.unwrap();
    assert_eq!(response.headers()["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    let text = response.text().await.unwrap();
    for line in [
        "murmur_http_requests_total{route=\"/v1/completions\",method=\"POST\",status=\"200\"} 2",
        "murmur_http_requests_total{route=\"/v1/models/{*id}\",method=\"GET\",status=\"200\"} 1",
        "murmur_http_requests_total{route=\"unmatched\",method=\"GET\",status=\"404\"} 2",
        "murmur_http_request_duration_seconds_count{route=\"/v1/completions\"} 2",
        "murmur_time_to_first_token_seconds_count 2",
        "murmur_generations_total{outcome=\"stop\"} 2",
        "murmur_prompt_tokens_total 14",
        "murmur_prompt_tokens_cached_total 6",
        "murmur_completion_tokens_total 6",
        "murmur_http_requests_in_flight 1",
        "fake_node_metric 1",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
    }
    assert!(!text.contains("nothing-here"));
    // Every family is declared once, before its samples.
    for line in text.lines().filter(|line| line.starts_with("murmur_")) {
        let name = line.split(['{', ' ']).next().unwrap();
        let family = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
        assert_eq!(text.matches(&format!("# TYPE {family} ")).count(), 1, "{line}");
    }
}

#[tokio::test]
async fn status_shows_models_and_what_the_node_says() {
    let server = Server::start(Fake::saying(&[])).await;
    let status: Value = server.get("/api/status").send().await.unwrap().json().await.unwrap();
    assert_eq!(status["node"], json!({"peers": 0}));
    assert_eq!(status["models"][1]["kind"], "embed");
    assert!(status["version"].is_string());
}

#[tokio::test]
async fn texts_become_tokens_and_tokens_texts() {
    let server = Server::start(Fake::saying(&[])).await;
    let tokens = server.ask("/api/tokenize", &json!({"model": "org/tiny", "content": "ab"})).await;
    assert_eq!(tokens, json!({"tokens": [97, 98]}));
    let tokens =
        server.ask("/api/tokenize", &json!({"model": "embedder", "content": "abc", "parse_special": true})).await;
    assert_eq!(tokens, json!({"tokens": [3]}));
    let content = server.ask("/api/detokenize", &json!({"model": "org/tiny", "tokens": [1, 2]})).await;
    assert_eq!(content, json!({"content": "<1><2>"}));
    let (status, error) = server.fail("/api/detokenize", &json!({"model": "org/tiny", "tokens": ["x"]})).await;
    assert_eq!((status, error["param"].as_str()), (400, Some("tokens")));
}
