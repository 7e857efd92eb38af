//! A client of the API, for the commands that talk to a running server.
//!
//! Plain HTTP/1.1 over one connection per request: no TLS to set up, so that `murmur status` is there at once, and dropping a
//! response closes its connection, which is how the server learns that an answer is no longer wanted.

use std::{io, net::SocketAddr, time::Duration};

use http_body_util::{BodyExt, Full};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    client::conn::http1,
    header,
};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::{net::TcpStream, time::timeout};

use crate::{
    exit::{Code, Failure},
    sse::SseParser,
};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// For answers that need no computing.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// Where a server is, and the key it wants.
#[derive(Debug, Clone)]
pub(crate) struct ApiClient {
    address: SocketAddr,
    key: Option<String>,
}

/// A connection and the response on it; dropped, both end.
struct Answer {
    response: Response<Incoming>,
    _connection: AbortOnDrop,
}

struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Events of a streamed answer.
pub(crate) struct Events {
    answer: Answer,
    parser: SseParser,
    ready: std::collections::VecDeque<String>,
}

impl ApiClient {
    /// A client of the server at `address`. A server that listens on every address is reached on this machine's own.
    pub(crate) fn new(address: SocketAddr, key: Option<String>) -> Self {
        let mut address = address;
        if address.ip().is_unspecified() {
            address.set_ip(match address {
                SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
                SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
            });
        }
        Self { address, key }
    }

    /// The server's address.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// `GET`, and the JSON that comes back.
    pub(crate) async fn get(&self, path: &str) -> anyhow::Result<Value> {
        let whole = async { self.json(self.send(Method::GET, path, None).await?).await };
        timeout(ANSWER_TIMEOUT, whole).await.map_err(|_| self.silent())?
    }

    /// `POST`, and the JSON that comes back.
    pub(crate) async fn post(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        self.json(self.send(Method::POST, path, Some(body)).await?).await
    }

    /// `POST` of something that needs no computing, and the JSON that comes back.
    pub(crate) async fn ask(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        timeout(ANSWER_TIMEOUT, self.post(path, body)).await.map_err(|_| self.silent())?
    }

    /// Whether anything listens at the address.
    pub(crate) async fn is_there(&self) -> bool {
        matches!(timeout(CONNECT_TIMEOUT, TcpStream::connect(self.address)).await, Ok(Ok(_)))
    }

    /// `POST`, and the events that come back.
    pub(crate) async fn stream(&self, path: &str, body: &Value) -> anyhow::Result<Events> {
        let answer = self.send(Method::POST, path, Some(body)).await?;
        if answer.response.status().is_success() {
            return Ok(Events { answer, parser: SseParser::default(), ready: Default::default() });
        }
        match self.json(answer).await {
            Ok(_) => Err(self.nonsense("an error without a reason")),
            Err(error) => Err(error),
        }
    }

    async fn send(&self, method: Method, path: &str, body: Option<&Value>) -> anyhow::Result<Answer> {
        let connected = timeout(CONNECT_TIMEOUT, TcpStream::connect(self.address)).await;
        let stream = connected
            .unwrap_or_else(|_| Err(io::Error::from(io::ErrorKind::TimedOut)))
            .map_err(|error| self.unreachable(&error))?;
        // Questions are small and wanted at once; where it cannot be set, they are merely later.
        let _ = stream.set_nodelay(true);
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| self.broken(&error))?;
        let connection = AbortOnDrop(tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection to the server ended");
            }
        }));
        let mut request = Request::builder().method(method).uri(path).header(header::HOST, self.address.to_string());
        if let Some(key) = &self.key {
            request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
        }
        let bytes = match body {
            Some(body) => {
                request = request.header(header::CONTENT_TYPE, "application/json");
                Bytes::from(serde_json::to_vec(body)?)
            }
            None => Bytes::new(),
        };
        let request = request
            .body(Full::new(bytes))
            .map_err(|_| Failure::because(Code::Usage, "the API key has characters that a header cannot have"))?;
        let response = sender.send_request(request).await.map_err(|error| self.broken(&error))?;
        Ok(Answer { response, _connection: connection })
    }

    async fn json(&self, mut answer: Answer) -> anyhow::Result<Value> {
        let status = answer.response.status();
        let mut text = Vec::new();
        while let Some(frame) = answer.response.body_mut().frame().await {
            let Ok(data) = frame.map_err(|error| self.broken(&error))?.into_data() else {
                continue;
            };
            if text.len() + data.len() > ANSWER_BYTES_MAX {
                return Err(self.nonsense("an answer without end"));
            }
            text.extend_from_slice(&data);
        }
        let value: Option<Value> = serde_json::from_slice(&text).ok();
        if status.is_success() {
            return value.ok_or_else(|| self.nonsense("no JSON"));
        }
        let message = value.as_ref().and_then(|value| value.pointer("/error/message")).and_then(Value::as_str);
        Err(self.refusal(status, message))
    }

    fn refusal(&self, status: StatusCode, message: Option<&str>) -> anyhow::Error {
        let Some(message) = message else {
            return self.nonsense(&format!("{status} without a reason"));
        };
        match status {
            StatusCode::UNAUTHORIZED => Failure::because(
                Code::Unavailable,
                format!(
                    "the server at {} wants an API key: {message} Give it with --api-key or MURMUR_API_KEY.",
                    self.address
                ),
            ),
            StatusCode::NOT_FOUND => Failure::because(Code::NotFound, message),
            StatusCode::BAD_REQUEST | StatusCode::UNPROCESSABLE_ENTITY => Failure::because(Code::Usage, message),
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE | StatusCode::FORBIDDEN => {
                Failure::because(Code::Unavailable, message)
            }
            _ => Failure::because(Code::Failed, message),
        }
    }

    fn unreachable(&self, error: &io::Error) -> anyhow::Error {
        let why = match error.kind() {
            io::ErrorKind::ConnectionRefused => "nothing listens there".to_owned(),
            io::ErrorKind::TimedOut => "no answer to the connection".to_owned(),
            _ => error.to_string(),
        };
        Failure::because(
            Code::Unavailable,
            format!(
                "no murmur server at {}: {why}. Start one with `murmur serve MODEL`, or name its address with --api.",
                self.address
            ),
        )
    }

    fn broken(&self, error: &hyper::Error) -> anyhow::Error {
        let why = std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string);
        Failure::because(
            Code::Unavailable,
            format!(
                "the connection to {} broke off: {why}. If this is no murmur server, name the right address with --api.",
                self.address
            ),
        )
    }

    fn silent(&self) -> anyhow::Error {
        Failure::because(
            Code::Unavailable,
            format!(
                "the server at {} does not answer within {} s. Is it murmur? `murmur doctor` tells.",
                self.address,
                ANSWER_TIMEOUT.as_secs()
            ),
        )
    }

    fn nonsense(&self, what: &str) -> anyhow::Error {
        Failure::because(
            Code::Failed,
            format!("the server at {} answers with {what}. Is it murmur? `murmur doctor` tells.", self.address),
        )
    }
}

impl Events {
    /// The next event's data; `None` after the last one.
    pub(crate) async fn next(&mut self) -> anyhow::Result<Option<String>> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(Some(event));
            }
            let Some(frame) = self.answer.response.body_mut().frame().await else {
                return Ok(None);
            };
            let frame = frame.map_err(|error| {
                Failure::because(
                    Code::Unavailable,
                    format!("the answer broke off: {error}. Ask again; `murmur status` says how the server is."),
                )
            })?;
            if let Ok(data) = frame.into_data() {
                self.ready.extend(self.parser.push(&data)?);
            }
        }
    }
}
