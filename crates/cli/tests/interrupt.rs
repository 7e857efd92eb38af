//! Ctrl-C during an answer, against a server that never finishes one.

#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test ends when something is off")]

mod common;

use std::{
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    process::{Command, Stdio},
    sync::mpsc,
};

use common::{Home, PATIENCE, screen::Screen};

/// What the server saw.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    /// A question; the first word of the answer is on its way.
    Asked,
    /// The client hung up in the middle of the answer.
    HungUp,
}

/// A server with one model, `slow`, that says one word and then nothing more.
fn slow_server() -> (String, mpsc::Receiver<Seen>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (seen, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // A client that goes away is what this is about.
            let _ = answer(stream, &seen);
        }
    });
    (address, receiver)
}

fn answer(mut stream: TcpStream, seen: &mpsc::Sender<Seen>) -> std::io::Result<()> {
    let mut request = String::new();
    let mut reader = BufReader::new(stream.try_clone()?);
    while reader.read_line(&mut request)? > 2 {}
    if request.starts_with("GET /v1/models") {
        let body = r#"{"data":[{"id":"slow"}]}"#;
        return write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    }
    let event = "data: {\"choices\":[{\"delta\":{\"content\":\"word\"}}]}\n\n";
    write!(
        stream,
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n{:x}\r\n{event}\r\n",
        event.len()
    )?;
    seen.send(Seen::Asked).unwrap();
    // The rest of the request, and then the end of the connection.
    std::io::copy(&mut reader, &mut std::io::sink()).ok();
    seen.send(Seen::HungUp).unwrap();
    Ok(())
}

#[test]
fn ctrl_c_ends_a_command_that_answers_a_script_and_the_server_sees_it_go() {
    let home = Home::new();
    let (address, seen) = slow_server();
    let child = home
        .murmur(["run", "slow", "hello", "--api", &address])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    assert_eq!(seen.recv().unwrap(), Seen::Asked);
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    let outcome: common::Outcome = child.wait_with_output().unwrap().into();
    outcome.fails(130, "interrupted");
    assert_eq!(seen.recv().unwrap(), Seen::HungUp);
}

#[test]
fn ctrl_c_in_a_conversation_stops_the_answer_and_not_the_program() {
    let home = Home::new();
    let (address, seen) = slow_server();
    let (terminal, terminal_of_program) = pty_process::blocking::open().unwrap();
    let mut program = pty_process::blocking::Command::new(env!("CARGO_BIN_EXE_murmur"))
        .args(["run", "slow", "--api", &address])
        .env("MURMUR_DATA_DIR", home.data_dir())
        .env("TERM", "xterm")
        .spawn(terminal_of_program)
        .unwrap();
    let mut screen = Screen::of(&terminal);
    screen.wait_for(">>> ");
    (&terminal).write_all(b"hello\r").unwrap();
    assert_eq!(seen.recv_timeout(PATIENCE), Ok(Seen::Asked), "the screen: {:?}", screen.shown);
    screen.wait_for("word");
    (&terminal).write_all(b"\x03").unwrap();
    assert_eq!(seen.recv_timeout(PATIENCE), Ok(Seen::HungUp), "the screen: {:?}", screen.shown);
    screen.wait_for("(stopped)");
    screen.wait_for(">>> ");
    (&terminal).write_all(b"/exit\r").unwrap();
    assert_eq!(program.wait().unwrap().code(), Some(0));
}
