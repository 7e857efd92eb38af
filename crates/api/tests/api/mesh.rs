//! The mesh as programs see it.

use std::time::Duration;

use murmur_api::backend::{MeshAction, PlanQuestion, Refusal, RingWishes};
use serde_json::{Value, json};

use crate::support::{Fake, Server, error};

fn in_a_mesh() -> Fake {
    let mut fake = Fake::saying(&[]);
    fake.mesh = Some(json!({"name": "home", "id": "00ff", "private": true, "peers": [{"node": "aa"}, {"node": "bb"}]}));
    fake
}

#[tokio::test]
async fn the_mesh_and_its_peers_are_shown_and_counted_in_the_status() {
    let server = Server::start(in_a_mesh()).await;
    let mesh: Value = server.get("/api/mesh").send().await.unwrap().json().await.unwrap();
    assert_eq!((&mesh["name"], &mesh["peers"][1]["node"]), (&json!("home"), &json!("bb")));
    let status: Value = server.get("/api/status").send().await.unwrap().json().await.unwrap();
    assert_eq!(status["mesh"], json!({"name": "home", "id": "00ff", "private": true, "peers": 2}));
}

#[tokio::test]
async fn a_node_without_a_mesh_says_so_and_how_to_get_into_one() {
    let server = Server::start(Fake::saying(&[])).await;
    let (status, missing) = error(server.get("/api/mesh").send().await.unwrap()).await;
    assert_eq!((status, missing["code"].as_str()), (404, Some("not_in_a_mesh")));
    assert!(missing["message"].as_str().unwrap().contains("--join"), "{missing}");
    for (path, body) in [
        ("/api/mesh/invite", json!({})),
        ("/api/mesh/join", json!({"ticket": "murmur1x"})),
        ("/api/mesh/plan", json!({"model": "big"})),
        ("/api/mesh/revoke", json!({"what": "00"})),
    ] {
        let (status, error) = server.fail(path, &body).await;
        assert_eq!((status, error["code"].as_str()), (404, Some("not_in_a_mesh")), "{path}");
    }
    let status: Value = server.get("/api/status").send().await.unwrap().json().await.unwrap();
    assert_eq!(status["mesh"], Value::Null);
}

#[tokio::test]
async fn actions_reach_the_node_as_they_were_asked_for() {
    let server = Server::start(in_a_mesh()).await;
    let asked = [
        ("/api/mesh/invite", json!({})),
        ("/api/mesh/invite", json!({"valid_s": 60, "role": "client", "uses": 3})),
        ("/api/mesh/join", json!({"ticket": "murmur1abc"})),
        ("/api/mesh/revoke", json!({"what": "0123"})),
        ("/api/mesh/plan", json!({"model": "big", "objective": "one_stream", "streams": null})),
        (
            "/api/mesh/plan",
            json!({
                "model": "big", "context_tokens": 4096, "streams": 8, "prompt_tokens": 100, "keep_ends": 1,
                "objective": "many_streams", "exclude": ["0A"], "pin": ["01", "02:0-8"], "max_rtt_ms": 2.5, "only_region": ["eu"],
            }),
        ),
    ];
    for (path, body) in asked {
        assert_eq!(server.ask(path, &body).await, json!({"done": true}), "{path}");
    }
    let invite = |valid_s, role: &str, uses| MeshAction::Invite { valid_s, role: role.into(), uses };
    let expected = [
        invite(86_400, "worker", None),
        invite(60, "client", Some(3)),
        MeshAction::Join { ticket: "murmur1abc".into() },
        MeshAction::Revoke { what: "0123".into() },
        MeshAction::Plan(PlanQuestion {
            model: "big".into(),
            wishes: RingWishes { many_streams: Some(false), ..RingWishes::default() },
            ..PlanQuestion::default()
        }),
        MeshAction::Plan(PlanQuestion {
            model: "big".into(),
            context_tokens: Some(4096),
            streams: Some(8),
            prompt_tokens: Some(100),
            wishes: RingWishes {
                keep_ends: Some(1),
                many_streams: Some(true),
                exclude: vec!["0a".into()],
                pin: ["01", "02:0-8"].map(|pin| pin.parse().unwrap()).into(),
                rtt_max: Some(Duration::from_micros(2500)),
                only_region: vec!["eu".into()],
            },
        }),
    ];
    assert_eq!(*server.fake.mesh_actions.lock().unwrap(), expected);
}

#[tokio::test]
async fn what_makes_no_sense_does_not_reach_the_node() {
    let server = Server::start(in_a_mesh()).await;
    for (path, body, param) in [
        ("/api/mesh/invite", json!({"valid_s": 0}), "valid_s"),
        ("/api/mesh/invite", json!({"valid_s": u64::MAX}), "valid_s"),
        ("/api/mesh/invite", json!({"uses": 0}), "uses"),
        ("/api/mesh/invite", json!({"role": "owner"}), "role"),
        ("/api/mesh/invite", json!({"for_ever": true}), "for_ever"),
        ("/api/mesh/join", json!({}), "ticket"),
        ("/api/mesh/join", json!({"ticket": "x".repeat(5_000)}), "ticket"),
        ("/api/mesh/revoke", json!({"what": 7}), "what"),
        ("/api/mesh/plan", json!({}), "model"),
        ("/api/mesh/plan", json!({"model": "x".repeat(5_000)}), "model"),
        ("/api/mesh/plan", json!({"model": "big", "context_tokens": 0}), "context_tokens"),
        ("/api/mesh/plan", json!({"model": "big", "streams": 5_000}), "streams"),
        ("/api/mesh/plan", json!({"model": "big", "prompt_tokens": 0.5}), "prompt_tokens"),
        ("/api/mesh/plan", json!({"model": "big", "keep_ends": -1}), "keep_ends"),
        ("/api/mesh/plan", json!({"model": "big", "objective": "fast"}), "objective"),
        ("/api/mesh/plan", json!({"model": "big", "exclude": "0a"}), "exclude"),
        ("/api/mesh/plan", json!({"model": "big", "exclude": ["0a", "xy"]}), "exclude[1]"),
        ("/api/mesh/plan", json!({"model": "big", "exclude": [""]}), "exclude[0]"),
        ("/api/mesh/plan", json!({"model": "big", "exclude": vec!["0a"; 65]}), "exclude"),
        ("/api/mesh/plan", json!({"model": "big", "pin": [7]}), "pin[0]"),
        ("/api/mesh/plan", json!({"model": "big", "pin": ["0a:"]}), "pin[0]"),
        ("/api/mesh/plan", json!({"model": "big", "pin": ["0a:8-8"]}), "pin[0]"),
        ("/api/mesh/plan", json!({"model": "big", "pin": [":0-8"]}), "pin[0]"),
        ("/api/mesh/plan", json!({"model": "big", "max_rtt_ms": -1}), "max_rtt_ms"),
        ("/api/mesh/plan", json!({"model": "big", "only_region": ["The North"]}), "only_region[0]"),
        ("/api/mesh/plan", json!({"model": "big", "layers": 3}), "layers"),
    ] {
        let (status, error) = server.fail(path, &body).await;
        assert_eq!((status, error["param"].as_str()), (400, Some(param)), "{path} {body}");
    }
    assert!(server.fake.mesh_actions.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_refusal_of_the_node_is_told_with_its_reason() {
    let mut fake = in_a_mesh();
    fake.mesh_refusal = Some(Refusal::Forbidden { message: "only the owner can do that".into() });
    let server = Server::start(fake).await;
    let (status, error) = server.fail("/api/mesh/invite", &json!({})).await;
    assert_eq!((status, error["message"].as_str()), (403, Some("only the owner can do that")));
    assert_eq!((error["type"].as_str(), error["code"].as_str()), (Some("permission_error"), Some("forbidden")));
}

#[tokio::test]
async fn foreign_pages_and_strangers_make_no_tickets() {
    let server = Server::with(in_a_mesh(), |o| o.api_keys = vec!["k3y".into()]).await;
    let ask = || server.post("/api/mesh/invite", &json!({}));
    assert_eq!(ask().send().await.unwrap().status(), 401);
    assert_eq!(server.get("/api/mesh").send().await.unwrap().status(), 401);
    let keyed = || ask().bearer_auth("k3y");
    assert_eq!(keyed().header("origin", "https://evil.example").send().await.unwrap().status(), 403);
    assert_eq!(keyed().header("host", "evil.example").send().await.unwrap().status(), 403);
    // The one kind of request that a page can send without being asked about it first.
    let simple = crate::support::client().post(server.url("/api/mesh/invite")).bearer_auth("k3y").body("{}");
    assert_eq!(simple.header("content-type", "text/plain").send().await.unwrap().status(), 415);
    assert!(server.fake.mesh_actions.lock().unwrap().is_empty());
    assert_eq!(keyed().send().await.unwrap().status(), 200);
}
