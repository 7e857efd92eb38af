//! `murmur top` against real servers, in real terminals.

#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test ends when something is off")]

mod common;

use std::{
    io::Write,
    os::fd::AsFd,
    process::{Child, Command, Stdio},
};

use common::{Home, Server, http, screen::Screen, unused_address};
use pty_process::blocking::Pty;
use serde_json::json;

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
