//! A small hub on loopback that can be told to misbehave.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "each test file uses some of it, and may end when something is off"
)]

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicUsize, Ordering},
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{Path, RawQuery, State},
    http::{HeaderMap, Method, StatusCode},
    response::{Html, IntoResponse, Response},
    routing::get,
};
use futures::StreamExt;
use sha2::{Digest, Sha256};

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
pub const REPO: &str = "someone/Tiny-GGUF";

/// How the hub behaves.
#[derive(Clone)]
pub struct Behaviour {
    pub files: Vec<&'static str>,
    pub content: Vec<u8>,
    /// Files with another content.
    pub others: Vec<(String, Vec<u8>)>,
    /// Announced instead of the real ones.
    pub sha256: Option<String>,
    pub size_bytes: Option<u64>,
    /// Bytes after which each transfer breaks off.
    pub breaks_off_after: Option<usize>,
    pub honours_ranges: bool,
    /// A redirect to another host for the bytes, as the real hub does.
    pub redirects: bool,
    /// Answers before anything works: status, headers.
    pub refusals: Vec<(StatusCode, Vec<(&'static str, &'static str)>)>,
    /// Sends the headers and then nothing more, so many times.
    pub stalls: usize,
    /// Of the bytes, at the place that sends them.
    pub etag: Option<&'static str>,
    pub honours_if_range: bool,
    /// Sends so many bytes more than were asked for.
    pub too_many: usize,
    /// Sends bytes from so much further on than was asked for.
    pub shift: usize,
    /// In the repository's card, as JSON.
    pub licence: &'static str,
    /// Answers every question with a web page.
    pub is_web_page: bool,
    /// What searches find: names of repositories.
    pub found: Vec<&'static str>,
    /// Of them, those that cannot be looked at.
    pub hidden: Vec<&'static str>,
    /// Of them on each page of the list.
    pub page_repos: usize,
    /// Whether the list says that it goes on at another place.
    pub leads_astray: bool,
}

impl Default for Behaviour {
    fn default() -> Self {
        Self {
            files: vec!["README.md", "tiny-Q4_K_M.gguf", "tiny-Q8_0.gguf"],
            content: gguf_of_size(300_000),
            others: Vec::new(),
            sha256: None,
            size_bytes: None,
            breaks_off_after: None,
            honours_ranges: true,
            redirects: true,
            refusals: Vec::new(),
            stalls: 0,
            etag: None,
            honours_if_range: true,
            too_many: 0,
            shift: 0,
            licence: r#""apache-2.0""#,
            is_web_page: false,
            found: vec![REPO],
            hidden: Vec::new(),
            page_repos: usize::MAX,
            leads_astray: false,
        }
    }
}

impl Behaviour {
    fn content_of(&self, file: &str) -> &[u8] {
        let other = self.others.iter().find(|(other, _)| other.rsplit('/').next() == file.rsplit('/').next());
        other.map_or(&self.content, |(_, content)| content)
    }
}

/// A GGUF file with one long string in its header.
pub fn gguf_of_size(size_bytes: usize) -> Vec<u8> {
    let mut bytes = Vec::from(*b"GGUF");
    bytes.extend(3u32.to_le_bytes());
    bytes.extend(0u64.to_le_bytes());
    bytes.extend(3u64.to_le_bytes());
    let mut string = |key: &str, value: &[u8]| {
        bytes.extend((key.len() as u64).to_le_bytes());
        bytes.extend(key.as_bytes());
        bytes.extend(8u32.to_le_bytes());
        bytes.extend((value.len() as u64).to_le_bytes());
        bytes.extend(value);
    };
    string("general.architecture", b"llama");
    string("general.license", b"mit");
    let filler: Vec<u8> = (0..size_bytes).map(|n| b'a' + (n * n % 26) as u8).collect();
    string("test.filler", &filler);
    bytes
}

pub fn sha256_of(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

pub struct Hub {
    pub behaviour: Mutex<Behaviour>,
    /// Where each transfer began.
    pub transfers: Mutex<Vec<u64>>,
    pub tokens_at_store: Mutex<Vec<Option<String>>>,
    pub requests: AtomicUsize,
    /// Queries of searches.
    pub searches: Mutex<Vec<String>>,
    pub address: std::net::SocketAddr,
}

impl Hub {
    pub async fn start(behaviour: Behaviour) -> Arc<Self> {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let hub = Arc::new(Self {
            behaviour: Mutex::new(behaviour),
            transfers: Mutex::default(),
            tokens_at_store: Mutex::default(),
            requests: AtomicUsize::new(0),
            searches: Mutex::default(),
            address: listener.local_addr().unwrap(),
        });
        let router = Router::new()
            .route("/api/models", get(search))
            .route("/api/models/{owner}/{repo}", get(description))
            .route("/api/models/{owner}/{repo}/revision/{revision}", get(listing))
            .route("/{owner}/{repo}/resolve/{commit}/{*file}", get(resolve))
            .route("/store/{file}", get(bytes))
            .with_state(Arc::clone(&hub));
        tokio::spawn(async move { axum::serve(listener, router).await });
        hub
    }

    fn refusal(&self) -> Option<Response> {
        self.requests.fetch_add(1, Ordering::SeqCst);
        let mut behaviour = self.behaviour.lock().unwrap();
        if behaviour.is_web_page {
            return Some(Html("<html>please log in</html>").into_response());
        }
        if behaviour.refusals.is_empty() {
            return None;
        }
        let (status, headers) = behaviour.refusals.remove(0);
        let mut response = status.into_response();
        for (name, value) in headers {
            response.headers_mut().insert(name, value.parse().unwrap());
        }
        Some(response)
    }

    pub fn set(&self, change: impl FnOnce(&mut Behaviour)) {
        change(&mut self.behaviour.lock().unwrap());
    }
}

async fn listing(State(hub): State<Arc<Hub>>, Path((owner, repo, _)): Path<(String, String, String)>) -> Response {
    if let Some(refusal) = hub.refusal() {
        return refusal;
    }
    if format!("{owner}/{repo}") != REPO {
        return (StatusCode::UNAUTHORIZED, [("x-error-code", "RepoNotFound")]).into_response();
    }
    let behaviour = hub.behaviour.lock().unwrap();
    let siblings: Vec<String> = behaviour.files.iter().map(|f| format!(r#"{{"rfilename":"{f}"}}"#)).collect();
    let (licence, siblings) = (behaviour.licence, siblings.join(","));
    format!(r#"{{"sha":"{COMMIT}","cardData":{{"license":{licence}}},"siblings":[{siblings}]}}"#).into_response()
}

/// A list of repositories, in pages.
async fn search(State(hub): State<Arc<Hub>>, RawQuery(query): RawQuery) -> Response {
    if let Some(refusal) = hub.refusal() {
        return refusal;
    }
    let query = query.unwrap_or_default();
    hub.searches.lock().unwrap().push(query.clone());
    let behaviour = hub.behaviour.lock().unwrap();
    let first = query.split("cursor=").nth(1).map_or(0, |at| at.parse().unwrap());
    let page: Vec<String> =
        behaviour.found.iter().skip(first).take(behaviour.page_repos).map(|id| format!(r#"{{"id":"{id}"}}"#)).collect();
    let next = first.saturating_add(behaviour.page_repos);
    let host = if behaviour.leads_astray { "localhost" } else { "127.0.0.1" };
    let link = format!("<http://{host}:{}/api/models?cursor={next}>; rel=\"next\"", hub.address.port());
    let body = format!("[{}]", page.join(","));
    if next < behaviour.found.len() { ([("link", link)], body).into_response() } else { body.into_response() }
}

/// What a repository is, with the sizes of its files.
async fn description(State(hub): State<Arc<Hub>>, Path((owner, repo)): Path<(String, String)>) -> Response {
    if let Some(refusal) = hub.refusal() {
        return refusal;
    }
    let (behaviour, id) = (hub.behaviour.lock().unwrap(), format!("{owner}/{repo}"));
    if behaviour.hidden.contains(&id.as_str()) {
        return (StatusCode::UNAUTHORIZED, [("x-error-code", "RepoNotFound")]).into_response();
    }
    let size = behaviour.content.len();
    let siblings: Vec<String> =
        behaviour.files.iter().map(|f| format!(r#"{{"rfilename":"{f}","size":{size}}}"#)).collect();
    let (licence, siblings) = (behaviour.licence, siblings.join(","));
    let facts = format!(r#""id":"{id}","gated":"manual","downloads":42,"cardData":{{"license":{licence}}}"#);
    format!(r#"{{{facts},"siblings":[{siblings}]}}"#).into_response()
}

async fn resolve(
    State(hub): State<Arc<Hub>>,
    method: Method,
    headers: HeaderMap,
    Path((_, _, commit, file)): Path<(String, String, String, String)>,
) -> Response {
    if let Some(refusal) = hub.refusal() {
        return refusal;
    }
    assert_eq!(commit, COMMIT, "the file was not asked for at the listed commit");
    let behaviour = hub.behaviour.lock().unwrap().clone();
    let content = behaviour.content_of(&file);
    let size = behaviour.size_bytes.unwrap_or(content.len() as u64);
    let etag = behaviour.sha256.clone().unwrap_or_else(|| sha256_of(content));
    let announced =
        [("x-linked-etag", format!("\"{etag}\"")), ("x-linked-size", size.to_string()), ("x-repo-commit", commit)];
    if behaviour.redirects {
        // `localhost` is another host than `127.0.0.1`: the token must not follow.
        let name = file.rsplit('/').next().unwrap();
        let location = format!("http://localhost:{}/store/{name}", hub.address.port());
        return (StatusCode::FOUND, announced, [("location", location)]).into_response();
    }
    let mut response =
        if method == Method::HEAD { StatusCode::OK.into_response() } else { send(&hub, &headers, &file) };
    for (name, value) in announced {
        response.headers_mut().insert(name, value.parse().unwrap());
    }
    response
}

async fn bytes(State(hub): State<Arc<Hub>>, headers: HeaderMap, Path(file): Path<String>) -> Response {
    let token = headers.get("authorization").map(|v| v.to_str().unwrap().to_owned());
    hub.tokens_at_store.lock().unwrap().push(token);
    send(&hub, &headers, &file)
}

fn send(hub: &Hub, headers: &HeaderMap, file: &str) -> Response {
    let mut behaviour = hub.behaviour.lock().unwrap();
    let total = behaviour.content_of(file).len();
    let text = |name: &str| headers.get(name).map(|value| value.to_str().unwrap());
    let is_the_same = !behaviour.honours_if_range || text("if-range").is_none_or(|etag| Some(etag) == behaviour.etag);
    let asked = text("range").filter(|_| behaviour.honours_ranges && is_the_same).map(|range| {
        let (start, last) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
        let end = last.parse().map_or(total, |last: usize| last + 1);
        (start.parse::<usize>().unwrap() + behaviour.shift, end + behaviour.shift)
    });
    let (start, end) = asked.unwrap_or((0, total));
    let mut response = Response::builder();
    if let Some(etag) = behaviour.etag {
        response = response.header("etag", etag);
    }
    if start >= total {
        let response = response.status(StatusCode::RANGE_NOT_SATISFIABLE);
        return response.header("content-range", format!("bytes */{total}")).body(Body::empty()).unwrap();
    }
    hub.transfers.lock().unwrap().push(start as u64);
    let end = end.min(total);
    let whole = behaviour.content_of(file)[start..(end + behaviour.too_many).min(total)].to_vec();
    let length = whole.len();
    let body = if behaviour.stalls > 0 {
        behaviour.stalls -= 1;
        Body::from_stream(futures::stream::pending::<Result<Bytes, std::io::Error>>())
    } else if let Some(limit) = behaviour.breaks_off_after.filter(|limit| *limit < length) {
        // A pause between the bytes and the end, so that the bytes are on their way when the connection breaks.
        let bytes = Bytes::from(whole[..limit].to_vec());
        let pieces = futures::stream::once(async { Ok(bytes) }).chain(futures::stream::once(async {
            tokio::task::yield_now().await;
            Err(std::io::Error::other("cut"))
        }));
        Body::from_stream(pieces)
    } else {
        Body::from(whole)
    };
    let response = response.header("content-length", length);
    match asked {
        Some(_) => response
            .status(StatusCode::PARTIAL_CONTENT)
            .header("content-range", format!("bytes {start}-{}/{total}", end - 1))
            .body(body)
            .unwrap(),
        None => response.body(body).unwrap(),
    }
}
