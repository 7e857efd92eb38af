//! A server and its clients, all of them the real binary; the model is small, random and made on the spot.

#![allow(clippy::unwrap_used, reason = "a test ends when something is off")]

mod common;

use common::{Home, Server, http, with_input};
use murmur_gguf::synth::{self, Spec};

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
fn an_empty_key_in_the_environment_is_none() {
    let home = Home::new();
    let model = home.model("tiny.gguf");
    let server = Server::start(&home, [model.to_str().unwrap()]);
    let mut status = home.murmur(["status", "--api", &server.address]);
    status.env("MURMUR_API_KEY", "").output().map(common::Outcome::from).unwrap().succeeds();
}

#[test]
fn more_parallel_requests_than_the_engine_can_run_are_refused_at_once() {
    let home = Home::new();
    home.model("tiny.gguf");
    home.run(["serve", "tiny.gguf", "--parallel", "257", "--api", "127.0.0.1:0"]).fails(2, "1..=256");
}

#[test]
fn a_model_that_does_not_fit_is_named_with_sizes_that_say_something() {
    let home = Home::new();
    home.model("tiny.gguf");
    let outcome = home.run(["serve", "tiny.gguf", "--max-memory", "1M", "--api", "127.0.0.1:0"]);
    let outcome = outcome.fails(4, "tiny does not fit: it needs");
    assert!(!outcome.err.contains(" 0.0 "), "{}", outcome.err);
}

#[test]
fn a_server_can_be_asked_while_it_loads_and_ends_at_once() {
    let home = Home::new();
    let model = home.model("tiny.gguf");
    let address = common::unused_address();
    let server = home
        .murmur(["serve", "--api", &address, model.to_str().unwrap()])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    // Its first engine process hangs, so it loads for as long as this looks at it.
    common::stop_first_child(server.id());
    let loading = common::get(&address, "/health");
    assert!(loading.starts_with("HTTP/1.1 503") && loading.contains("retry-after"), "{loading}");
    assert!(loading.contains(r#""status":"loading""#), "{loading}");
    let models = common::get(&address, "/v1/models");
    assert!(models.contains(r#""id":"tiny""#) && models.contains(r#""state":"loading""#), "{models}");
    home.run(["run", "tiny", "hello", "--api", &address]).fails(5, "being loaded");
    std::process::Command::new("kill").args(["-INT", &server.id().to_string()]).status().unwrap();
    let outcome: common::Outcome = server.wait_with_output().unwrap().into();
    outcome.fails(130, "interrupted while loading");
}

#[test]
fn one_model_may_not_hide_another() {
    let home = Home::new();
    home.model("tiny.gguf");
    home.run(["serve", "tiny.gguf", "./tiny.gguf", "--api", "127.0.0.1:0"]).fails(2, "--alias");
}

/// A model of one layer with a vocabulary of so many tokens; that of [`Home::model`] has eight, and 1,024.
fn draft(home: &Home, file_name: &str, vocabulary: u32) -> String {
    let mut spec = Spec::tiny("llama").unwrap().with_layers(1);
    spec.facts.vocabulary = vocabulary;
    let path = home.path().join(file_name);
    synth::write(&spec, &path).unwrap();
    path.to_str().unwrap().to_owned()
}

/// Which model guesses at a server.
fn guesser(server: &Server) -> serde_json::Value {
    http::get(&server.address, "/api/status").1["node"]["models"][0]["draft"]["model"].take()
}

#[test]
fn a_model_that_cannot_guess_ends_the_server_before_anything_is_loaded() {
    let home = Home::new();
    home.model("tiny.gguf");
    draft(&home, "other.gguf", 512);
    draft(&home, "draft.gguf", 1024);
    home.write("broken.gguf", "GG");
    let refused = |draft: &[&str], code, says| {
        let serve = ["serve", "tiny.gguf", "--ctx", "256", "--parallel", "1", "--draft"];
        home.run(serve.iter().chain(draft)).fails(code, says)
    };
    refused(&["absent.gguf"], 3, "--draft: ");
    refused(&["absent"], 3, "--draft: ");
    refused(&["broken.gguf"], 6, "--draft: ");
    refused(&["other.gguf"], 2, "another vocabulary");
    refused(&["tiny.gguf"], 2, "a guess would take as long");
    refused(&["lookup", "--draft-spoilt", "0.5"], 2, "names none");
    let outcome = refused(&["draft.gguf", "--max-memory", "100M"], 4, "for the model that guesses");
    assert!(outcome.err.contains("--draft lookup"), "{}", outcome.err);
}

#[test]
fn the_model_that_guesses_is_named_or_found_in_the_store() {
    let home = Home::new();
    let model = home.model("tiny.gguf");
    let [small, other] = [("small.gguf", 1024), ("other.gguf", 512)].map(|(name, tokens)| draft(&home, name, tokens));
    for file in [&small, &other] {
        home.run(["models", "import", file]).succeeds();
    }
    let serve = |more: &[&str]| {
        let server =
            Server::start(&home, [&[model.to_str().unwrap(), "--ctx", "256", "--parallel", "1"], more].concat());
        let request = serde_json::json!({"model": "tiny", "prompt": "ba ba ba", "max_tokens": 8, "ignore_eos": true});
        http::complete(&server.address, &request);
        server
    };
    for who in ["auto", "small", small.as_str()] {
        assert_eq!(guesser(&serve(&["--draft", who])), "small.gguf", "{who}");
    }
    // One that was only found takes no room from the model.
    assert_eq!(guesser(&serve(&["--draft", "auto", "--max-memory", "100M"])), serde_json::Value::Null);
    assert_eq!(guesser(&serve(&["--draft", "lookup"])), serde_json::Value::Null);
}
