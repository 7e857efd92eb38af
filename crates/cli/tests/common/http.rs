//! The API as a program uses it, without a client library between.
//!
//! HTTP/1.0 on purpose: no chunks, so that the bytes are the body until the connection ends.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    time::Instant,
};

use serde_json::{Value, json};

use super::PATIENCE;

/// Status and JSON of an answer.
pub fn get(address: &str, path: &str) -> (u16, Value) {
    whole(send(address, "GET", path, ""))
}

/// Status and JSON of an answer.
pub fn post(address: &str, path: &str, body: &Value) -> (u16, Value) {
    whole(send(address, "POST", path, &body.to_string()))
}

/// Text of a completion, to its end.
#[track_caller]
pub fn complete(address: &str, request: &Value) -> String {
    let (status, answer) = post(address, "/v1/completions", request);
    assert_eq!(status, 200, "{answer}");
    answer["choices"][0]["text"].as_str().unwrap().to_owned()
}

/// A streamed completion.
pub struct Completion {
    lines: BufReader<TcpStream>,
    pub text: String,
    /// When each piece of the text came.
    pub arrivals: Vec<Instant>,
}

/// How a stream ended.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    /// With a reason and `[DONE]`.
    Finished(String),
    /// With an error event, and neither.
    Failed(String),
    /// Just so, which must not happen.
    CutOff,
}

impl Completion {
    /// Starts one, and waits for nothing.
    pub fn start(address: &str, request: &Value) -> Self {
        let mut request = request.clone();
        request["stream"] = json!(true);
        let mut lines = send(address, "POST", "/v1/completions", &request.to_string());
        assert_eq!(head(&mut lines), 200);
        Self { lines, text: String::new(), arrivals: Vec::new() }
    }

    /// Starts one and waits for its first text.
    pub fn begin(address: &str, request: &Value) -> Self {
        let mut stream = Self::start(address, request);
        stream.read(1);
        stream
    }

    /// Reads on until so much text has come.
    pub fn read(&mut self, bytes: usize) {
        while self.text.len() < bytes {
            let event = self.event().unwrap();
            self.take(&event["choices"][0]);
        }
    }

    /// Reads the rest.
    pub fn finish(&mut self) -> End {
        let (mut reason, mut error) = (None, None);
        while let Some(event) = self.event() {
            let choice = &event["choices"][0];
            self.take(choice);
            reason = reason.or_else(|| choice["finish_reason"].as_str().map(str::to_owned));
            error = error.or_else(|| event["error"]["message"].as_str().map(str::to_owned));
            if event == json!("[DONE]") {
                assert_eq!(error, None, "an end after an error");
                return End::Finished(reason.unwrap());
            }
        }
        match (reason, error) {
            (None, Some(message)) => End::Failed(message),
            _ => End::CutOff,
        }
    }

    fn take(&mut self, choice: &Value) {
        if let Some(text) = choice["text"].as_str().filter(|text| !text.is_empty()) {
            self.text.push_str(text);
            self.arrivals.push(Instant::now());
        }
    }

    fn event(&mut self) -> Option<Value> {
        let mut line = String::new();
        loop {
            line.clear();
            if self.lines.read_line(&mut line).unwrap() == 0 {
                return None;
            }
            match line.trim_end().strip_prefix("data: ") {
                Some("[DONE]") => return Some(json!("[DONE]")),
                Some(data) => return Some(serde_json::from_str(data).unwrap()),
                None => {}
            }
        }
    }
}

fn send(address: &str, method: &str, path: &str, body: &str) -> BufReader<TcpStream> {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let length = body.len();
    write!(
        stream,
        "{method} {path} HTTP/1.0\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
    )
    .unwrap();
    BufReader::new(stream)
}

/// Reads the head of an answer, and gives its status.
fn head(answer: &mut impl BufRead) -> u16 {
    let mut line = String::new();
    answer.read_line(&mut line).unwrap();
    let status = line.split(' ').nth(1).unwrap().parse().unwrap();
    while line.trim_end() != "" {
        line.clear();
        answer.read_line(&mut line).unwrap();
    }
    status
}

fn whole(mut answer: BufReader<TcpStream>) -> (u16, Value) {
    let status = head(&mut answer);
    let mut body = String::new();
    answer.read_to_string(&mut body).unwrap();
    (status, serde_json::from_str(&body).unwrap())
}
