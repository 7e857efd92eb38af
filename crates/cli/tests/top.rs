//! `murmur top` against real servers, in real terminals.

#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test ends when something is off")]

mod common;

use std::{
    io::Write,
    os::fd::AsFd,
    process::{Child, Command, Stdio},
};

use common::{
    Home, Server,
    http::{self, Completion, End},
    screen::Screen,
    signal, until, unused_address,
};
use pty_process::blocking::Pty;
use serde_json::{Value, json};

/// Nobody outside this machine is asked or told anything.
const OFFLINE: [&str; 5] = ["--relay=none", "--no-nostr", "--no-mdns", "--bind", "127.0.0.1:0"];

/// How a program takes over a terminal, and gives it back.
const TAKEN: &str = "\x1b[?1049h";
const GIVEN_BACK: &str = "\x1b[?1049l";

fn top(home: &Home, api: &str) -> (Pty, Child, Screen) {
    let (terminal, terminal_of_program) = pty_process::blocking::open().unwrap();
    terminal.resize(pty_process::Size::new(30, 120)).unwrap();
    let program = pty_process::blocking::Command::new(env!("CARGO_BIN_EXE_murmur"))
        .args(["top", "--api", api])
        .env("MURMUR_DATA_DIR", home.data_dir())
        .env("TERM", "xterm")
        .spawn(terminal_of_program)
        .unwrap();
    let mut screen = Screen::of(&terminal);
    screen.wait_for(TAKEN);
    (terminal, program, screen)
}

/// What `stty` says of a terminal.
fn settings(terminal: &Pty) -> String {
    let terminal = Stdio::from(terminal.as_fd().try_clone_to_owned().unwrap());
    let output = Command::new("stty").arg("-a").stdin(terminal).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_terminal_shows_the_server_at_every_size_and_is_given_back_as_it_was() {
    let home = Home::new();
    let model = home.model("tiny.gguf");
    let server = Server::start(&home, [model.to_str().unwrap()]);
    for leave in ["q", "\x1b", "\x03"] {
        let (mut terminal, mut program, mut screen) = top(&home, &server.address);
        screen.wait_for("tiny");
        screen.wait_for("ready");
        assert!(settings(&terminal).contains("-icanon"), "keys are not read one by one");
        terminal.resize(pty_process::Size::new(10, 40)).unwrap();
        screen.wait_for("q leaves");
        terminal.write_all(leave.as_bytes()).unwrap();
        screen.wait_for(GIVEN_BACK);
        assert_eq!(program.wait().unwrap().code(), Some(0), "{leave:?}");
        let left = settings(&terminal);
        assert!(left.contains(" icanon") && left.contains(" echo "), "{left}");
    }
}

#[test]
fn a_server_that_goes_away_is_shown_and_met_again() {
    let home = Home::new();
    let model = home.model("tiny.gguf");
    let api = unused_address();
    let (mut terminal, mut program, mut screen) = top(&home, &api);
    // In one word: what was blank before is not drawn again.
    screen.wait_for("listens");
    let serve = || Server::ready(home.murmur(["serve", "--json", "--api", &api, model.to_str().unwrap()]));
    let server = serve();
    screen.wait_for("tokens/s");
    screen.wait_for("tiny");
    drop(server);
    // In one word: what was blank before is not drawn again.
    screen.wait_for("listens");
    // Everything is drawn anew, as it is true again.
    let _server = serve();
    screen.wait_for("tokens/s");
    Command::new("kill").args(["-TERM", &program.id().to_string()]).status().unwrap();
    screen.wait_for(GIVEN_BACK);
    assert_eq!(program.wait().unwrap().code(), Some(0));
    terminal.flush().unwrap();
}

#[test]
fn scripts_get_one_look_as_text_or_as_json() {
    let home = Home::new();
    home.run(["top"]).fails(5, "murmur serve MODEL");
    let model = home.model("tiny.gguf");
    let server = Server::start(&home, [model.to_str().unwrap()]);
    let request = json!({"model": "tiny", "prompt": "hello", "max_tokens": 40, "ignore_eos": true});
    http::complete(&server.address, &request);
    let page = home.run(["top", "--once", "--api", &server.address]).succeeds().out;
    for words in ["tokens/s", "no requests", "tiny", "ready", "here", "no other nodes"] {
        assert!(page.contains(words), "no {words:?} in {page}");
    }
    assert!(!page.contains('\x1b'), "{page:?}");
    let look = home.run(["top", "--json", "--api", &server.address]).succeeds().json();
    assert_eq!(look["mesh"], serde_json::Value::Null);
    let model = &look["status"]["node"]["models"][0];
    assert_eq!((&model["id"], &model["generated_tokens"]), (&"tiny".into(), &40.into()));
    assert!(model["decode_tokens_per_s"].as_f64().unwrap() > 0.0, "{model}");
}

/// A private mesh of two homes, of which the first one serves with these arguments, and the second one with those.
fn mesh(homes: &[Home; 2], first: &[&str], second: impl FnOnce(&str) -> Server) -> [Server; 2] {
    homes[0].run(["mesh", "create", "home"]).succeeds();
    let founder = Server::start(&homes[0], [first, &OFFLINE[..], &["--mesh=home"]].concat());
    let invite = homes[0].run(["mesh", "invite", "--json", "--api", &founder.address]).succeeds().json();
    let second = second(invite["ticket"].as_str().unwrap());
    [founder, second]
}

/// A node as others show it.
fn short(server: &Server) -> &str {
    &server.ready["mesh"]["node"].as_str().unwrap()[..10]
}

/// The line of one look in which all these words stand, once there is one.
#[track_caller]
fn until_shown(home: &Home, server: &Server, words: &[&str]) {
    until(&format!("{words:?} in a line"), || {
        let page = home.run(["top", "--once", "--api", &server.address]).succeeds().out;
        page.lines().any(|line| words.iter().all(|word| line.contains(word))).then_some(())
    });
}

#[test]
fn a_request_in_a_mesh_is_shown_where_it_was_made_and_where_it_runs_with_the_nodes_between() {
    let homes = [Home::new(), Home::new()];
    let model = homes[0].model("tiny.gguf");
    let [server, client] = mesh(&homes, &[model.to_str().unwrap()], |ticket| {
        let command = [&["client", "--json", "--api=127.0.0.1:0"], &OFFLINE[..], &["--join", ticket]].concat();
        Server::ready(homes[1].murmur(command))
    });
    until_shown(&homes[1], &client, &["tiny", "ready", short(&server)]);
    until_shown(&homes[1], &client, &[short(&server), "worker", "direct 127.0.0.1:", "tiny"]);
    until_shown(&homes[0], &server, &[short(&client), "client", "direct 127.0.0.1:"]);

    // It runs for as long as the process that computes it stands still.
    let model = http::get(&server.address, "/api/status").1["node"]["models"][0].take();
    let process = &model["stages"][0]["process_id"];
    const TOKENS: u64 = 900;
    let request = json!({"model": "tiny", "prompt": "hello", "max_tokens": TOKENS, "seed": 1, "ignore_eos": true});
    let mut stream = until("a request stands still in its first half", || {
        let stream = Completion::begin(&client.address, &request);
        signal(process, "STOP");
        let running = http::get(&client.address, "/api/status").1["node"]["requests"][0].take();
        if running["generated_tokens"].as_u64().is_some_and(|tokens| tokens < TOKENS / 2) {
            return Some(stream);
        }
        signal(process, "CONT");
        None
    });
    until_shown(&homes[1], &client, &["tiny", "this machine", short(&server)]);
    until_shown(&homes[0], &server, &["tiny", short(&client), "here"]);
    let (mut terminal, mut program, mut screen) = top(&homes[1], &client.address);
    // Of the request, of the model, of the node.
    for _ in 0..3 {
        screen.wait_for(short(&server));
    }
    screen.wait_for("direct");
    terminal.write_all(b"q").unwrap();
    assert_eq!(program.wait().unwrap().code(), Some(0));
    signal(process, "CONT");
    assert_eq!(stream.finish(), End::Finished("length".into()));
    until_shown(&homes[1], &client, &["no requests"]);
}

#[test]
fn a_model_over_two_nodes_is_shown_at_both() {
    let homes = [Home::new(), Home::new()];
    let model = homes[0].model("tiny.gguf");
    let part = [model.to_str().unwrap(), "--max-layers=4", "--ctx=256", "--parallel=1"];
    let servers =
        mesh(&homes, &part, |ticket| Server::start(&homes[1], [&part, &OFFLINE[..], &["--join", ticket]].concat()));
    let request = json!({"model": "tiny", "prompt": "hello", "max_tokens": 40, "ignore_eos": true});
    for (home, [server, other]) in homes.iter().zip([[&servers[0], &servers[1]], [&servers[1], &servers[0]]]) {
        until_shown(home, server, &["tiny", "ready", "here"]);
        until_shown(home, server, &[short(other), "worker", "direct 127.0.0.1:"]);
        http::complete(&server.address, &request);
        let look = home.run(["top", "--json", "--api", &server.address]).succeeds().json();
        let model = &look["status"]["node"]["models"][0];
        let nodes: Vec<&Value> = model["stages"].as_array().unwrap().iter().map(|stage| &stage["node"]).collect();
        assert_eq!(nodes.len(), 2, "{model}");
        assert!(nodes.contains(&&other.ready["mesh"]["node"]), "{model}");
        assert_eq!(model["generated_tokens"], 40);
        assert!(model["travel_us"].is_u64(), "{model}");
        until_shown(home, server, &["tiny", "..", "this node", " ms"]);
        let hops = until("the ways between them are measured", || {
            let model = http::get(&server.address, "/api/status").1["node"]["models"][0].take();
            model["stages"].as_array()?.iter().map(|stage| stage["hop_us"].as_u64()).collect::<Option<Vec<_>>>()
        });
        assert!(hops.len() == 2 && hops[0] > 0, "{hops:?}");
    }
}
