//! The API as a program uses it, without a client library between.
//!
//! HTTP/1.0 on purpose: no chunks, so that the bytes are the body until the connection ends.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
};

use serde_json::{Value, json};

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
    /// Starts one and waits for its first text.
    pub fn begin(address: &str, request: &Value) -> Self {
        let mut request = request.clone();
        request["stream"] = json!(true);
        let lines = send(address, "POST", "/v1/completions", &request.to_string());
        let mut stream = Self { lines, text: String::new() };
        assert_eq!(head(&mut stream.lines), 200);
        stream.read(1);
        stream
    }

    /// Reads on until so much text has come.
    pub fn read(&mut self, bytes: usize) {
        while self.text.len() < bytes {
            let event = self.event().unwrap();
            self.text.push_str(event["choices"][0]["text"].as_str().unwrap());
        }
    }

    /// Reads the rest.
    pub fn finish(&mut self) -> End {
        let (mut reason, mut error) = (None, None);
        while let Some(event) = self.event() {
            let choice = &event["choices"][0];
            self.text.push_str(choice["text"].as_str().unwrap_or_default());
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
