//! Who may use the server, asked over real sockets.

use murmur_api::{ApiOptions, OptionsError, ServeError};
use reqwest::{Method, Response};
use serde_json::json;
use std::sync::Arc;
use tokio::net::TcpListener;

use crate::support::{Fake, Server, client, completion, error};

async fn with_headers(server: &Server, method: Method, path: &str, headers: &[(&str, &str)]) -> Response {
    let request = client().request(method, server.url(path));
    headers.iter().fold(request, |request, (name, value)| request.header(*name, *value)).send().await.unwrap()
}

#[tokio::test]
async fn a_rebound_name_is_refused_on_every_route() {
    let server = Server::start(Fake::saying(&["x"])).await;
    for path in ["/v1/models", "/health", "/metrics", "/api/status", "/nothing"] {
        let response = with_headers(&server, Method::GET, path, &[("host", "evil.example")]).await;
        let (status, error) = error(response).await;
        assert_eq!((status, error["code"].as_str()), (403, Some("host_not_allowed")), "{path}");
    }
    for host in ["localhost", "[::1]:6876", "127.0.0.1"] {
        assert_eq!(with_headers(&server, Method::GET, "/v1/models", &[("host", host)]).await.status(), 200);
    }
    let listed = Server::with(Fake::saying(&[]), |o| o.allowed_hosts = vec!["node.example".into()]).await;
    let response = with_headers(&listed, Method::GET, "/v1/models", &[("host", "node.example:6876")]).await;
    assert_eq!(response.status(), 200);
}

#[tokio::test]
async fn a_foreign_web_page_is_refused_before_anything_happens() {
    let server = Server::start(Fake::saying(&["x"])).await;
    for origin in ["https://evil.example", "null", "http://localhost.evil.example"] {
        let request = server.post("/v1/completions", &completion(json!({}))).header("origin", origin);
        let response = request.send().await.unwrap();
        assert!(response.headers().get("access-control-allow-origin").is_none());
        let (status, error) = error(response).await;
        assert_eq!((status, error["code"].as_str()), (403, Some("origin_not_allowed")));
        let preflight = [("origin", origin), ("access-control-request-method", "POST")];
        assert_eq!(with_headers(&server, Method::OPTIONS, "/v1/completions", &preflight).await.status(), 403);
    }
    assert!(server.fake.seen.lock().unwrap().is_empty());
}

#[tokio::test]
async fn allowed_web_pages_get_the_cors_headers_without_showing_a_key_in_the_preflight() {
    let server = Server::with(Fake::saying(&["x"]), |o| {
        o.allowed_origins = vec!["https://chat.example".into()];
        o.api_keys = vec!["k3y".into()];
    })
    .await;
    for origin in ["https://chat.example", "http://localhost:3000"] {
        let preflight = [
            ("origin", origin),
            ("access-control-request-method", "POST"),
            ("access-control-request-headers", "authorization,content-type,x-stainless-os"),
        ];
        let response = with_headers(&server, Method::OPTIONS, "/v1/completions", &preflight).await;
        assert_eq!(response.status(), 204);
        assert_eq!(response.headers()["access-control-allow-origin"], origin);
        assert_eq!(response.headers()["access-control-allow-headers"], "authorization,content-type,x-stainless-os");
        let request = server.post("/v1/completions", &completion(json!({}))).header("origin", origin);
        let response = request.bearer_auth("k3y").send().await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["access-control-allow-origin"], origin);
        assert_eq!(response.headers()["vary"], "origin");
        // A page may read the refusal, too.
        let request = server.post("/v1/completions", &completion(json!({}))).header("origin", origin);
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 401);
        assert_eq!(response.headers()["access-control-allow-origin"], origin);
    }
}

#[tokio::test]
async fn with_keys_set_only_health_is_open() {
    let server = Server::with(Fake::saying(&["x"]), |o| o.api_keys = vec!["k3y".into(), "other".into()]).await;
    assert_eq!(server.get("/health").send().await.unwrap().status(), 200);
    for path in ["/v1/models", "/metrics", "/api/status", "/nothing", "/healthy"] {
        let response = server.get(path).send().await.unwrap();
        assert_eq!(response.headers()["www-authenticate"], "Bearer");
        let (status, missing) = error(response).await;
        assert_eq!((status, missing["type"].as_str()), (401, Some("authentication_error")));
        assert_eq!(missing["code"], "missing_api_key");
        let (status, wrong) = error(server.get(path).bearer_auth("k3x").send().await.unwrap()).await;
        assert_eq!((status, wrong["code"].as_str()), (401, Some("invalid_api_key")));
    }
    for key in ["k3y", "other"] {
        assert_eq!(server.get("/v1/models").bearer_auth(key).send().await.unwrap().status(), 200);
    }
}

#[tokio::test]
async fn other_machines_cannot_reach_a_server_without_a_key() {
    let listener = TcpListener::bind("0.0.0.0:0").await.unwrap();
    let fake = Arc::new(Fake::saying(&[]));
    let served = murmur_api::serve(listener, fake, ApiOptions::default(), std::future::pending()).await;
    assert!(matches!(served, Err(ServeError::Options(OptionsError::KeyRequired(_)))));
}

#[tokio::test]
async fn a_panicking_handler_costs_one_request() {
    let server = Server::start(Fake::answering(|_| panic!("a defect"))).await;
    let (status, error) = server.fail("/v1/completions", &completion(json!({}))).await;
    assert_eq!((status, error["code"].as_str()), (500, Some("internal_error")));
    assert_eq!(server.get("/health").send().await.unwrap().status(), 200);
}
