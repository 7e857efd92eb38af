//! Talking to the hub: which files a repository has, and what each is.

use std::time::Duration;

use murmur_gguf::ByteRange;
use reqwest::{Method, Response, StatusCode, Url, header, redirect};
use serde::de::DeserializeOwned;

use super::{
    HubConfig,
    repo::{Answer, Repo},
};
use crate::{error::StoreError, reference::HubRef};

/// What the hub says of a repository is JSON with one entry per file.
const DOCUMENT_BYTES_MAX: usize = 16 << 20;
/// Redirects followed for one request.
const REDIRECTS_MAX: usize = 5;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// A `Retry-After` longer than this is told to the user instead of waited for.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(120);
/// Pauses do not grow beyond this.
const BACKOFF_MAX: Duration = Duration::from_secs(30);

/// A file on the hub.
#[derive(Debug)]
pub(super) struct RemoteFile {
    /// Path in the repository.
    pub(super) file: String,
    pub(super) url: Url,
    pub(super) size_bytes: u64,
    /// The name of its bytes in the cache; the SHA-256 for large files.
    pub(super) etag: String,
    /// Lower-case hex.
    pub(super) sha256: Option<String>,
}

/// Why a request did not bring what it should.
pub(super) enum Failure {
    /// Worth another attempt, after the pause the server asked for.
    Temporary { why: String, retry_after: Option<Duration> },
    /// Final.
    Final(StoreError),
}

pub(super) struct Client {
    pub(super) config: HubConfig,
    /// Follows redirects: for bytes.
    following: reqwest::Client,
    /// Does not: the hub's own answer has the checksum, the store it redirects to does not.
    direct: reqwest::Client,
}

impl Client {
    pub(super) fn new(config: &HubConfig) -> Result<Self, StoreError> {
        if config.is_offline() {
            return Err(StoreError::HubOffline { endpoint: config.endpoint().to_owned() });
        }
        install_crypto_provider();
        let build = |policy| {
            let mut builder = reqwest::Client::builder()
                .user_agent(concat!("murmur/", env!("CARGO_PKG_VERSION")))
                .connect_timeout(CONNECT_TIMEOUT)
                .read_timeout(config.stall_timeout)
                .redirect(policy);
            if config.is_on_this_machine() {
                builder = builder.no_proxy();
            }
            builder.build().map_err(|error| StoreError::HubUnavailable {
                endpoint: config.endpoint().to_owned(),
                why: format!("secure connections cannot be set up: {}", whole_story(&error)),
                advice: "Check that this machine has its CA certificates (package ca-certificates).".to_owned(),
            })
        };
        let no_downgrade = redirect::Policy::custom(|attempt| {
            let from_https = attempt.previous().last().is_some_and(|url| url.scheme() == "https");
            if from_https && attempt.url().scheme() != "https" {
                attempt.error("the hub redirects from https to plain http")
            } else if attempt.previous().len() > REDIRECTS_MAX {
                attempt.error("too many redirects")
            } else {
                attempt.follow()
            }
        });
        Ok(Self { config: config.clone(), following: build(no_downgrade)?, direct: build(redirect::Policy::none())? })
    }

    /// A repository, and the commit that a revision is.
    pub(super) async fn repo(&self, wanted: &HubRef) -> Result<(Repo, String), StoreError> {
        let url = self.url(&format!("api/models/{}/revision/{}", wanted.repo, encode(&wanted.revision, false)))?;
        let (answer, _) = self.document::<Answer>(url, &wanted.to_string()).await?;
        let repo = Repo::from(answer);
        let commit = repo.commit.clone().ok_or_else(|| self.bad_answer("the commit is not a commit"))?;
        Ok((repo, commit))
    }

    /// The commit that is meant, and the file of it.
    pub(super) async fn choose(&self, wanted: &HubRef) -> Result<(String, String), StoreError> {
        let (repo, commit) = self.repo(wanted).await?;
        let file = self.file_of(&repo, wanted)?;
        Ok((commit, file))
    }

    /// The file of a repository that is meant.
    pub(super) fn file_of(&self, repo: &Repo, wanted: &HubRef) -> Result<String, StoreError> {
        let name = format!("hf:{}", wanted.repo);
        repo.choose(wanted.wanted.as_deref(), &name, self.config.endpoint()).map(str::to_owned)
    }

    /// A JSON document, and where the hub says that it goes on. `what` is for messages.
    pub(super) async fn document<T: DeserializeOwned>(
        &self,
        url: Url,
        what: &str,
    ) -> Result<(T, Option<Url>), StoreError> {
        let (text, next) = self
            .with_retries(|| async {
                let mut response = self.ask(&self.following, Method::GET, url.clone(), &[], what).await?;
                if is_web_page(&response) {
                    return Err(Failure::Final(self.bad_answer(
                        "a web page instead of data, as the login page of a network or a proxy would send it",
                    )));
                }
                let next = next_page(&url, &response);
                let mut text = Vec::new();
                while let Some(piece) = response.chunk().await.map_err(|e| self.temporary(&e))? {
                    if text.len() + piece.len() > DOCUMENT_BYTES_MAX {
                        return Err(Failure::Final(self.bad_answer(&format!("what it says of {what} is too long"))));
                    }
                    text.extend_from_slice(&piece);
                }
                Ok((text, next))
            })
            .await?;
        let document =
            serde_json::from_slice(&text).map_err(|e| self.bad_answer(&format!("what it says of {what}: {e}")))?;
        Ok((document, next))
    }

    /// Size and checksum of a file at a commit.
    pub(super) async fn describe(
        &self,
        repo: &str,
        commit: &str,
        file: &str,
        what: &str,
    ) -> Result<RemoteFile, StoreError> {
        let origin = self.url(&format!("{repo}/resolve/{commit}/{}", encode(file, true)))?;
        let response = self
            .with_retries(|| async {
                let mut url = origin.clone();
                for _ in 0..=REDIRECTS_MAX {
                    let response = self.ask(&self.direct, Method::HEAD, url.clone(), &[], what).await?;
                    // A renamed repository redirects within the hub; a large file redirects away from it.
                    match redirect_within(&url, &response) {
                        Some(next) => url = next,
                        None => return Ok(response),
                    }
                }
                Err(Failure::Final(self.bad_answer("too many redirects")))
            })
            .await?;
        let text = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
        let etag = text("x-linked-etag")
            .or_else(|| text("etag"))
            .map(|etag| etag.trim_start_matches("W/").trim_matches('"').to_ascii_lowercase());
        let etag = etag
            .filter(|etag| {
                (1..=128).contains(&etag.len()) && etag.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            })
            .ok_or_else(|| self.bad_answer(&format!("no usable ETag for {file}")))?;
        let redirected = response.status().is_redirection();
        let size_bytes = text("x-linked-size")
            .or_else(|| text("content-length").filter(|_| !redirected))
            .and_then(|size| size.parse().ok())
            .ok_or_else(|| self.bad_answer(&format!("no size for {file}")))?;
        let sha256 = (etag.len() == 64 && etag.bytes().all(|b| b.is_ascii_hexdigit())).then(|| etag.clone());
        Ok(RemoteFile { file: file.to_owned(), url: origin, size_bytes, etag, sha256 })
    }

    /// Starts a transfer from `offset`.
    pub(super) async fn get_from(&self, remote: &RemoteFile, offset: u64) -> Result<Response, Failure> {
        let range = (offset > 0).then(|| (header::RANGE, format!("bytes={offset}-")));
        self.ask(&self.following, Method::GET, remote.url.clone(), range.as_slice(), &remote.file).await
    }

    /// Starts a transfer of a range that is not empty; of the whole file, if its bytes do not have this ETag any more.
    pub(super) async fn get_range(
        &self,
        remote: &RemoteFile,
        range: ByteRange,
        etag: Option<&str>,
    ) -> Result<Response, Failure> {
        let mut headers = vec![(header::RANGE, format!("bytes={}-{}", range.start, range.end - 1))];
        headers.extend(etag.map(|etag| (header::IF_RANGE, etag.to_owned())));
        self.ask(&self.following, Method::GET, remote.url.clone(), &headers, &remote.file).await
    }

    /// Sends a request and sorts the answer. Redirects that the client does not follow count as success.
    async fn ask(
        &self,
        client: &reqwest::Client,
        method: Method,
        url: Url,
        headers: &[(header::HeaderName, String)],
        what: &str,
    ) -> Result<Response, Failure> {
        let mut request = client.request(method, url).header(header::ACCEPT_ENCODING, "identity");
        // reqwest takes the token off again when a redirect leads to another host.
        if let Some(token) = self.config.token() {
            request = request.bearer_auth(token);
        }
        for (name, value) in headers {
            request = request.header(name, value);
        }
        let response = request.send().await.map_err(|error| self.temporary(&error))?;
        let status = response.status();
        if status.is_success() || status.is_redirection() || status == StatusCode::RANGE_NOT_SATISFIABLE {
            return Ok(response);
        }
        Err(self.refusal(&response, what))
    }

    fn refusal(&self, response: &Response, what: &str) -> Failure {
        let status = response.status();
        let endpoint = self.config.endpoint().to_owned();
        let what = what.to_owned();
        // The hub says 401 also for what does not exist, and tells the two apart in this header.
        let code = response.headers().get("x-error-code").and_then(|value| value.to_str().ok()).unwrap_or_default();
        let token_hint = match self.config.token() {
            Some(_) => "The token in use has no access: check it with the hub's settings page.",
            None => "Set HF_TOKEN to a token from the hub's settings page, if it is private or gated.",
        };
        match (status.as_u16(), code) {
            (_, "GatedRepo") => Failure::Final(StoreError::HubRefuses {
                what,
                why: match self.config.token() {
                    Some(_) => "whoever the token in use belongs to has not accepted its licence, or waits for leave",
                    None => "its licence must be accepted first, and no token says by whom",
                }
                .to_owned(),
                advice: format!(
                    "Accept it on its page, {}, then {}",
                    page(&endpoint, response.url()),
                    match self.config.token() {
                        Some(_) => "pull again with a token of the same account",
                        None => "set HF_TOKEN to a token of that account and pull again",
                    }
                ),
                endpoint,
            }),
            (_, "RevisionNotFound") => Failure::Final(StoreError::NotOnHub {
                what,
                endpoint,
                why: "there is no such branch, tag or commit".to_owned(),
                advice: "Leave '@revision' away to take the main branch.".to_owned(),
            }),
            (404, _) | (_, "RepoNotFound" | "EntryNotFound") => Failure::Final(StoreError::NotOnHub {
                what,
                endpoint,
                why: format!("the hub says {status}"),
                advice: format!("Check the spelling of owner and repository. {token_hint}"),
            }),
            (401 | 403, _) => Failure::Final(StoreError::HubRefuses {
                what,
                endpoint,
                why: format!("the hub says {status}"),
                advice: token_hint.to_owned(),
            }),
            (408 | 425 | 429 | 500..=599, _) => {
                Failure::Temporary { why: format!("the hub says {status}"), retry_after: retry_after(response) }
            }
            _ => Failure::Final(self.bad_answer(&format!("{status} for {what}"))),
        }
    }

    /// A request that did not get through. Everything about it may be better in a moment, except what is wrong with us.
    pub(super) fn temporary(&self, error: &reqwest::Error) -> Failure {
        if error.is_builder() || error.is_redirect() {
            return Failure::Final(self.bad_answer(&whole_story(error)));
        }
        let why = if error.is_timeout() {
            format!("nothing came for {} s", self.config.stall_timeout.as_secs_f32())
        } else {
            whole_story(error)
        };
        Failure::Temporary { why, retry_after: None }
    }

    async fn with_retries<T, F: Future<Output = Result<T, Failure>>>(
        &self,
        attempt: impl Fn() -> F,
    ) -> Result<T, StoreError> {
        let mut fruitless = 0;
        loop {
            match attempt().await {
                Ok(value) => return Ok(value),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Temporary { why, retry_after }) => {
                    fruitless += 1;
                    let pause = self.pause(fruitless, &why, retry_after)?;
                    tracing::debug!(why, ?pause, "asking the hub again");
                    tokio::time::sleep(pause).await;
                }
            }
        }
    }

    /// How long to wait before the next attempt, or that there will be none.
    pub(super) fn pause(
        &self,
        fruitless: u32,
        why: &str,
        retry_after: Option<Duration>,
    ) -> Result<Duration, StoreError> {
        let give_up = |advice: String| StoreError::HubUnavailable {
            endpoint: self.config.endpoint().to_owned(),
            why: why.to_owned(),
            advice,
        };
        if let Some(wait) = retry_after.filter(|wait| *wait > RETRY_AFTER_MAX) {
            return Err(give_up(format!(
                "It asks to come back in {} minutes. What was downloaded is kept.",
                wait.as_secs().div_ceil(60)
            )));
        }
        if fruitless >= self.config.attempts_max {
            return Err(give_up(format!(
                "Tried {fruitless} times. Check the connection (and HF_ENDPOINT, if set) and pull again: what was downloaded is kept."
            )));
        }
        let backoff =
            self.config.backoff_base.saturating_mul(1 << fruitless.saturating_sub(1).min(16)).min(BACKOFF_MAX);
        Ok(retry_after.unwrap_or(backoff))
    }

    pub(super) fn bad_answer(&self, why: &str) -> StoreError {
        StoreError::BadHubAnswer { endpoint: self.config.endpoint().to_owned(), why: why.to_owned() }
    }

    fn url(&self, path: &str) -> Result<Url, StoreError> {
        Url::parse(&format!("{}/{path}", self.config.endpoint())).map_err(|error| self.bad_answer(&error.to_string()))
    }

    /// The address of something, with a query.
    pub(super) fn url_with(&self, path: &str, query: &[(&str, &str)]) -> Result<Url, StoreError> {
        let mut url = self.url(path)?;
        url.query_pairs_mut().extend_pairs(query);
        Ok(url)
    }
}

/// `ring` for TLS, unless the process has chosen already.
fn install_crypto_provider() {
    if rustls::crypto::CryptoProvider::get_default().is_none() {
        // Fails only when another thread was faster, and that is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
    }
}

fn retry_after(response: &Response) -> Option<Duration> {
    let seconds: u64 = response.headers().get(header::RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds))
}

/// What part of a file an answer is (RFC 9110, section 14.4).
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ContentRange {
    /// `None` when it says that it has no such part.
    pub(super) bytes: Option<ByteRange>,
    /// Of the whole file, if the server knows.
    pub(super) total_bytes: Option<u64>,
}

impl ContentRange {
    pub(super) fn of(response: &Response) -> Option<Self> {
        Self::parse(response.headers().get(header::CONTENT_RANGE)?.to_str().ok()?)
    }

    fn parse(text: &str) -> Option<Self> {
        let (span, total) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
        let number = |text: &str| text.trim().parse::<u64>().ok();
        let bytes = match span.trim() {
            "*" => None,
            span => {
                let (start, last) = span.split_once('-')?;
                let (start, end) = (number(start)?, number(last)?.checked_add(1)?);
                if start >= end {
                    return None;
                }
                Some(ByteRange { start, end })
            }
        };
        let total_bytes = if total.trim() == "*" { None } else { Some(number(total)?) };
        Some(Self { bytes, total_bytes })
    }
}

fn redirect_within(url: &Url, response: &Response) -> Option<Url> {
    if !response.status().is_redirection() {
        return None;
    }
    let next = url.join(response.headers().get(header::LOCATION)?.to_str().ok()?).ok()?;
    // A hub that serves large files itself still answers with the checksum first.
    (is_same_place(url, &next) && !response.headers().contains_key("x-linked-etag")).then_some(next)
}

fn is_same_place(a: &Url, b: &Url) -> bool {
    a.scheme() == b.scheme() && a.host() == b.host() && a.port_or_known_default() == b.port_or_known_default()
}

fn is_web_page(response: &Response) -> bool {
    let kind = response.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    kind.is_some_and(|kind| kind.trim_start().to_ascii_lowercase().starts_with("text/html"))
}

/// The page after this one, if the answer names one.
fn next_page(url: &Url, response: &Response) -> Option<Url> {
    let mut links = response.headers().get_all(header::LINK).iter().filter_map(|links| links.to_str().ok());
    links.find_map(|links| next_link(url, links))
}

/// Where a list goes on (RFC 8288), if that is at the same place: the token goes nowhere else.
fn next_link(url: &Url, links: &str) -> Option<Url> {
    links.split(", ").find_map(|link| {
        let (target, parameters) = link.trim().strip_prefix('<')?.split_once('>')?;
        let is_next = parameters.split(';').any(|part| matches!(part.trim(), "rel=\"next\"" | "rel=next"));
        url.join(target).ok().filter(|next| is_next && is_same_place(url, next))
    })
}

/// The page of the repository that an address is about, for people.
fn page(endpoint: &str, url: &Url) -> String {
    let path = url.path();
    let mut parts = path.strip_prefix("/api/models").unwrap_or(path).split('/').filter(|part| !part.is_empty());
    match (parts.next(), parts.next()) {
        (Some(owner), Some(repo)) => format!("{endpoint}/{owner}/{repo}"),
        _ => endpoint.to_owned(),
    }
}

/// Percent-encodes what a path segment cannot have.
fn encode(text: &str, keep_slashes: bool) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => out.push(char::from(byte)),
            b'/' if keep_slashes => out.push('/'),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

/// An error with its causes: the reason is never in the first line. Addresses are left out, a redirect's may hold a signature.
fn whole_story(error: &reqwest::Error) -> String {
    let mut parts = Vec::new();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        parts.push(inner.to_string());
        cause = inner.source();
    }
    match parts.last() {
        Some(last) if error.is_connect() => format!("no connection: {last}"),
        Some(last) => last.clone(),
        None if error.is_connect() => "no connection".to_owned(),
        None => "the request failed".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_content_range_is_read_or_refused() {
        let part = |start, end, total_bytes| Some(ContentRange { bytes: Some(ByteRange { start, end }), total_bytes });
        assert_eq!(ContentRange::parse("bytes 5-9/100"), part(5, 10, Some(100)));
        assert_eq!(ContentRange::parse(" bytes 0-0/*"), part(0, 1, None));
        assert_eq!(ContentRange::parse("bytes */7"), Some(ContentRange { bytes: None, total_bytes: Some(7) }));
        for bad in [
            "",
            "bytes",
            "bytes 5/9",
            "bytes 5-9",
            "bytes a-b/9",
            "bytes 9-5/100",
            "bytes 5-18446744073709551615/9",
            "bytes 1-2/x",
        ] {
            assert_eq!(ContentRange::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_list_goes_on_where_its_link_says_if_that_is_the_same_place() {
        let url = Url::parse("https://hub/api/models?search=a").unwrap();
        let next = |links: &str| next_link(&url, links).map(String::from);
        assert_eq!(
            next("<https://hub/api/models?cursor=1>; rel=\"next\"").as_deref(),
            Some("https://hub/api/models?cursor=1")
        );
        assert_eq!(next("</a?c=2>; rel=next; title=x").as_deref(), Some("https://hub/a?c=2"));
        assert_eq!(next("<https://hub/1>; rel=\"prev\", </2>; rel=\"next\"").as_deref(), Some("https://hub/2"));
        for none in
            ["", "<", "</2>", "</2>; rel=\"prev\"", "<https://other/2>; rel=\"next\"", "<http://hub/2>; rel=\"next\""]
        {
            assert_eq!(next(none), None, "{none}");
        }
    }

    #[test]
    fn the_page_of_a_repository_is_found_in_what_was_asked_for() {
        for (asked, wanted) in [
            ("https://hub/api/models/a/b/revision/main", "https://hub/a/b"),
            ("https://hub/a/b/resolve/main/c.gguf", "https://hub/a/b"),
            ("https://hub/a", "https://hub"),
        ] {
            assert_eq!(page("https://hub", &Url::parse(asked).unwrap()), wanted);
        }
    }

    proptest! {
        #[test]
        fn no_link_of_a_stranger_leads_to_another_place(
            links in prop_oneof!["\\PC{0,60}", "(<(https?:)?//?(hub|other)?[a-z/?]{0,9}>; rel=\"?next\"?(, )?){0,3}"],
        ) {
            let url = Url::parse("https://hub/api/models").unwrap();
            if let Some(next) = next_link(&url, &links) {
                prop_assert!(is_same_place(&url, &next), "{next}");
            }
        }

        #[test]
        fn a_content_range_of_a_stranger_is_a_part_that_there_can_be_or_refused(
            text in prop_oneof!["\\PC{0,40}", "bytes [-*+ 0-9]{0,22}/[*0-9]{0,21}"],
        ) {
            if let Some(ContentRange { bytes, total_bytes }) = ContentRange::parse(&text) {
                prop_assert!(bytes.is_none_or(|bytes| bytes.start < bytes.end), "{text}");
                let span = bytes.map_or("*".to_owned(), |bytes| format!("{}-{}", bytes.start, bytes.end - 1));
                let total = total_bytes.map_or("*".to_owned(), |total| total.to_string());
                let again = ContentRange::parse(&format!("bytes {span}/{total}"));
                prop_assert_eq!(again, Some(ContentRange { bytes, total_bytes }));
            }
        }
    }
}
