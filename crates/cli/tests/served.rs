//! A server and its clients, all of them the real binary; the model is small, random and made on the spot.

#![allow(clippy::unwrap_used, reason = "a test ends when something is off")]

mod common;

use common::{Home, Server, with_input};

#[test]
fn a_served_model_answers_status_run_and_bench_and_ends_in_order() {
    let home = Home::new();
    let model = home.model("tiny.gguf");
    let mut server = Server::start(&home, ["--stages", "2", "--alias", "other-name", model.to_str().unwrap()]);
    let api = server.address.clone();

    let status = home.run(["status", "--json", "--api", &api]).succeeds().json();
    assert_eq!(status["models"][0]["id"], "other-name");
    let page = home.run(["status", "--api", &api]).succeeds().out;
    assert!(page.contains("other-name") && page.contains("STAGE OF"), "{page}");
    assert!(home.run(["doctor", "--api", &api]).out.contains("a murmur server is at"));
    home.run(["serve", "tiny.gguf", "--api", &api]).fails(5, "in use by a murmur server");

    let run = ["run", "other-name", "--raw", "--max-tokens", "8", "--seed", "1", "--api", &api];
    let once = home.run(run.into_iter().chain(["hello", "--json"])).succeeds().json();
    assert_eq!(once["finish_reason"], "length");
    assert_eq!(once["completion_tokens"], 8);
    let piped = with_input(home.murmur(run), "hello").succeeds();
    assert_eq!(
        piped.out.trim_end_matches('\n'),
        once["text"].as_str().unwrap().trim_end_matches('\n'),
        "same seed, another answer"
    );
    assert!(!piped.out.contains('\x1b') && !piped.err.contains('\x1b'));

    let bench = [
        "bench",
        "--prompt-tokens",
        "16",
        "--max-tokens",
        "4",
        "--repeat",
        "1",
        "--concurrency",
        "1,2",
        "--json",
        "--api",
        &api,
    ];
    let levels = home.run(bench).succeeds().json()["levels"].as_array().unwrap().clone();
    assert_eq!(levels.len(), 2);
    assert_eq!((&levels[1]["streams"], &levels[1]["prompt_tokens"]), (&2.into(), &16.into()));

    server.signal("TERM");
    assert_eq!(server.child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_key_is_demanded_and_given() {
    let home = Home::new();
    let model = home.model("tiny.gguf");
    let server = Server::start(&home, ["--api-key", "k3y", model.to_str().unwrap()]);
    home.run(["status", "--api", &server.address]).fails(5, "--api-key");
    home.murmur(["status", "--api", &server.address])
        .env("MURMUR_API_KEY", "k3y")
        .output()
        .map(common::Outcome::from)
        .unwrap()
        .succeeds();
}

#[test]
fn without_a_server_a_model_runs_in_the_command_itself() {
    let home = Home::new();
    home.model("tiny.gguf");
    let answer = home
        .run(["run", "tiny.gguf", "hello", "--raw", "--max-tokens", "4", "--threads", "1", "--json"])
        .succeeds()
        .json();
    assert_eq!(answer["completion_tokens"], 4);
    home.run(["run", "tiny.gguf", "hello", "--max-memory", "1M"]).fails(4, "does not fit");
    with_input(home.murmur(["run", "tiny.gguf"]), "  \n").fails(2, "no prompt");
}

#[test]
fn one_model_may_not_hide_another() {
    let home = Home::new();
    home.model("tiny.gguf");
    home.run(["serve", "tiny.gguf", "./tiny.gguf", "--api", "127.0.0.1:0"]).fails(2, "--alias");
}
