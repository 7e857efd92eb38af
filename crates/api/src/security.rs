//! Who may use the server.
//!
//! A server on localhost is reachable by every web page that the user visits: directly (a cross-origin `fetch`, stopped
//! by the `Origin` check) and by a name of the attacker's that resolves to 127.0.0.1 (DNS rebinding, stopped by the
//! `Host` check, for such a page's requests carry the attacker's name). An IP address in `Host` is harmless, as nobody
//! can rebind an address. Other machines need a key.

use std::{collections::HashSet, net::Ipv6Addr, sync::Arc};

use axum::{
    extract::{Request, State},
    http::{
        HeaderMap, HeaderValue, Method, StatusCode, header,
        uri::{Authority, Uri},
    },
    middleware::Next,
    response::{IntoResponse, Response},
};

use crate::{ApiOptions, body::reject, errors::ApiError, fields::shorten, state::AppState};

/// The one route that needs no key: load balancers ask it, and it says nothing.
const OPEN_ROUTE: &str = "/health";
/// How long a browser may remember the answer to a preflight request.
const PREFLIGHT_MAX_AGE_SECONDS: &str = "600";

/// The options, in the form in which requests are compared with them.
pub(crate) struct Policy {
    /// Hashes, as their comparison takes the same time whatever differs, lengths included.
    keys: Vec<blake3::Hash>,
    hosts: HashSet<String>,
    origins: HashSet<String>,
    any_origin: bool,
}

impl Policy {
    pub(crate) fn new(options: &ApiOptions) -> Self {
        Policy {
            keys: options.api_keys.iter().map(|key| blake3::hash(key.as_bytes())).collect(),
            hosts: options.allowed_hosts.iter().map(|host| host.to_ascii_lowercase()).collect(),
            origins: options.allowed_origins.iter().map(|origin| origin.to_ascii_lowercase()).collect(),
            any_origin: options.allowed_origins.iter().any(|origin| origin == "*"),
        }
    }

    /// True when not everyone may ask.
    pub(crate) fn demands_key(&self) -> bool {
        !self.keys.is_empty()
    }

    /// The name by which the client reached us, if it is one of ours.
    fn check_host(&self, headers: &HeaderMap, uri: &Uri) -> Result<Authority, ApiError> {
        let mut hosts = headers.get_all(header::HOST).iter();
        let (Some(host), None) = (hosts.next(), hosts.next()) else {
            return Err(ApiError::new(StatusCode::BAD_REQUEST, "The request must have exactly one `Host` header."));
        };
        let authority = parse_authority(host).filter(|authority| self.is_own_name(authority.host()));
        // The absolute form (`GET http://name/path`) has a second place for a name.
        let target_is_own = uri.authority().is_none_or(|target| self.is_own_name(target.host()));
        authority.filter(|_| target_is_own).ok_or_else(|| {
            let message = format!(
                "This server does not answer to the host name `{}`, to protect it from DNS rebinding. Use localhost or \
                 an IP address, or allow the name in the server's options.",
                shorten(&String::from_utf8_lossy(host.as_bytes()))
            );
            ApiError::new(StatusCode::FORBIDDEN, message).code("host_not_allowed")
        })
    }

    fn is_own_name(&self, host: &str) -> bool {
        let host = host.to_ascii_lowercase();
        is_loopback_name(&host) || is_ip_literal(&host) || self.hosts.contains(&host)
    }

    /// The origin to allow in the answer, if the request has one.
    fn check_origin(&self, headers: &HeaderMap, host: &Authority) -> Result<Option<HeaderValue>, ApiError> {
        let mut origins = headers.get_all(header::ORIGIN).iter();
        let Some(origin) = origins.next() else {
            return Ok(None);
        };
        if origins.next().is_none() && self.allows_origin(origin, host) {
            return Ok(Some(origin.clone()));
        }
        let message = format!(
            "Web pages of the origin `{}` may not use this server. Allow the origin in the server's options.",
            shorten(&String::from_utf8_lossy(origin.as_bytes()))
        );
        Err(ApiError::new(StatusCode::FORBIDDEN, message).code("origin_not_allowed"))
    }

    fn allows_origin(&self, origin: &HeaderValue, host: &Authority) -> bool {
        let Ok(origin) = origin.to_str() else {
            return false;
        };
        let origin = origin.to_ascii_lowercase();
        if self.any_origin || self.origins.contains(&origin) {
            return true;
        }
        let Some((scheme, authority)) = origin.split_once("://") else {
            return false;
        };
        let Ok(authority) = authority.parse::<Authority>() else {
            return false;
        };
        let web = scheme == "http" || scheme == "https";
        web && (is_loopback(authority.host()) || authority.as_str().eq_ignore_ascii_case(host.as_str()))
    }

    fn check_key(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        if self.keys.is_empty() {
            return Ok(());
        }
        let unauthorised = |message: &str, code: &str| Err(ApiError::new(StatusCode::UNAUTHORIZED, message).code(code));
        let Some(value) = headers.get(header::AUTHORIZATION) else {
            return unauthorised(
                "An API key is required: send the header `Authorization: Bearer KEY`.",
                "missing_api_key",
            );
        };
        let bytes = value.as_bytes();
        let key = match bytes.split_at_checked("Bearer ".len()) {
            Some((scheme, key)) if scheme.eq_ignore_ascii_case(b"Bearer ") => key.trim_ascii(),
            _ => b"",
        };
        let hash = blake3::hash(key);
        // No early end: the time must not tell which key came close, nor how many there are before it.
        let known = self.keys.iter().fold(false, |known, candidate| known | (*candidate == hash));
        if known { Ok(()) } else { unauthorised("The API key is not valid for this server.", "invalid_api_key") }
    }
}

fn parse_authority(value: &HeaderValue) -> Option<Authority> {
    let authority = value.to_str().ok()?.parse::<Authority>().ok()?;
    (!authority.as_str().contains('@')).then_some(authority)
}

fn is_loopback_name(host: &str) -> bool {
    host.trim_end_matches('.').eq_ignore_ascii_case("localhost")
}

fn is_ip_literal(host: &str) -> bool {
    host.parse::<std::net::Ipv4Addr>().is_ok() || ipv6(host).is_some()
}

fn is_loopback(host: &str) -> bool {
    is_loopback_name(host)
        || host.parse::<std::net::Ipv4Addr>().is_ok_and(|address| address.is_loopback())
        || ipv6(host).is_some_and(|address| address.to_canonical().is_loopback())
}

fn ipv6(host: &str) -> Option<Ipv6Addr> {
    host.strip_prefix('[')?.strip_suffix(']')?.parse().ok()
}

/// Middleware: the checks, in the order of what they cost an attacker to pass.
pub(crate) async fn guard(State(state): State<Arc<AppState>>, request: Request, next: Next) -> Response {
    let policy = &state.policy;
    let origin = policy
        .check_host(request.headers(), request.uri())
        .and_then(|host| policy.check_origin(request.headers(), &host));
    let origin = match origin {
        Ok(origin) => origin,
        Err(error) => return reject(request, error).await,
    };
    let is_preflight = request.method() == Method::OPTIONS
        && origin.is_some()
        && request.headers().contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    let mut response = if is_preflight {
        preflight(request.headers())
    } else if request.uri().path() == OPEN_ROUTE {
        next.run(request).await
    } else {
        // A browser shows a page the status of a refusal only if the refusal, too, allows the origin.
        match policy.check_key(request.headers()) {
            Ok(()) => next.run(request).await,
            Err(error) => reject(request, error).await,
        }
    };
    let headers = response.headers_mut();
    headers.append(header::VARY, HeaderValue::from_static("origin"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    if let Some(origin) = origin {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static("retry-after"));
    }
    response
}

fn preflight(headers: &HeaderMap) -> Response {
    let mut response = StatusCode::NO_CONTENT.into_response();
    let answer = response.headers_mut();
    answer.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST, OPTIONS"));
    answer.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static(PREFLIGHT_MAX_AGE_SECONDS));
    // The headers that OpenAI's clients send vary with their version, and none of them gives a page any power.
    if let Some(wanted) = headers.get(header::ACCESS_CONTROL_REQUEST_HEADERS) {
        answer.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, wanted.clone());
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(change: impl FnOnce(&mut ApiOptions)) -> Policy {
        let mut options = ApiOptions::default();
        change(&mut options);
        Policy::new(&options)
    }

    fn host_passes(policy: &Policy, host: &str) -> bool {
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, HeaderValue::from_str(host).unwrap());
        policy.check_host(&headers, &Uri::from_static("/v1/models")).is_ok()
    }

    fn origin_passes(policy: &Policy, host: &str, origin: &str) -> bool {
        policy.allows_origin(&HeaderValue::from_str(origin).unwrap(), &host.parse().unwrap())
    }

    #[test]
    fn only_own_names_and_addresses_pass_as_host() {
        let policy = policy(|o| o.allowed_hosts = vec!["Murmur.Example.org".into()]);
        for host in [
            "localhost",
            "LOCALHOST:6876",
            "localhost.",
            "127.0.0.1:1",
            "[::1]:6876",
            "10.0.0.7",
            "murmur.example.org:80",
        ] {
            assert!(host_passes(&policy, host), "{host}");
        }
        for host in [
            "evil.com",
            "localhost.evil.com",
            "127.0.0.1.evil.com",
            "user@localhost",
            "localhost@evil.com",
            "evil.com:127",
            "example.org",
            "0x7f.1",
            "[::1",
            "",
            "localhost/evil",
            "2130706433",
        ] {
            assert!(!host_passes(&policy, host), "{host}");
        }
    }

    #[test]
    fn a_foreign_name_in_the_request_line_is_found() {
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, HeaderValue::from_static("localhost"));
        assert!(policy(|_| ()).check_host(&headers, &Uri::from_static("http://evil.com/v1/models")).is_err());
    }

    #[test]
    fn only_loopback_own_and_listed_origins_pass() {
        let policy = policy(|o| o.allowed_origins = vec!["https://chat.example.org".into()]);
        for origin in [
            "http://localhost:3000",
            "https://127.0.0.1",
            "http://[::1]:80",
            "https://chat.example.org",
            "http://10.0.0.7:6876",
        ] {
            assert!(origin_passes(&policy, "10.0.0.7:6876", origin), "{origin}");
        }
        for origin in [
            "null",
            "https://evil.com",
            "http://chat.example.org",
            "https://chat.example.org:444",
            "http://localhost.evil.com",
            "chrome-extension://abc",
            "file://localhost",
            "http://10.0.0.7:80",
            "",
        ] {
            assert!(!origin_passes(&policy, "10.0.0.7:6876", origin), "{origin}");
        }
    }

    #[test]
    fn any_of_the_keys_opens_and_nothing_else_does() {
        let policy = policy(|o| o.api_keys = vec!["alpha".into(), "beta".into()]);
        let passes = |value: Option<&str>| {
            let mut headers = HeaderMap::new();
            if let Some(value) = value {
                headers.insert(header::AUTHORIZATION, HeaderValue::from_str(value).unwrap());
            }
            policy.check_key(&headers).is_ok()
        };
        assert!(passes(Some("Bearer alpha")) && passes(Some("bearer beta")));
        for value in
            ["Bearer alph", "Bearer alphaa", "Bearer ", "Bearer", "alpha", "Basic alpha", "Bearer alpha beta", ""]
        {
            assert!(!passes(Some(value)), "{value:?}");
        }
        assert!(!passes(None));
    }
}
