//! What the user decides about the HTTP layer.

use std::{fmt, net::SocketAddr, time::Duration};

use crate::limits;

/// How the API is offered. The default suits a loopback address: no key, no foreign origins.
#[derive(Clone)]
pub struct ApiOptions {
    /// Keys of which a client must present one, as `Authorization: Bearer KEY`. Empty: no key is asked for, which only
    /// a loopback address may do.
    pub api_keys: Vec<String>,
    /// Names by which clients may reach this server in `Host`, besides `localhost` and IP addresses.
    pub allowed_hosts: Vec<String>,
    /// Origins (`https://chat.example.org`) of web pages that may use this server, besides pages on loopback addresses
    /// and the server's own. `*` allows all, and needs a key.
    pub allowed_origins: Vec<String>,
    /// Requests for tokens or embeddings at work or queued; beyond it the answer is 429.
    pub max_in_flight: usize,
    /// Silence on a stream after which a comment line is sent.
    pub keep_alive: Duration,
    /// How long running answers may take to finish once the server is to stop.
    pub shutdown_grace: Duration,
}

impl Default for ApiOptions {
    fn default() -> Self {
        ApiOptions {
            api_keys: Vec::new(),
            allowed_hosts: Vec::new(),
            allowed_origins: Vec::new(),
            max_in_flight: limits::MAX_IN_FLIGHT,
            keep_alive: limits::KEEP_ALIVE_INTERVAL,
            shutdown_grace: limits::SHUTDOWN_GRACE,
        }
    }
}

/// By hand, as keys must not end up in a log.
impl fmt::Debug for ApiOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ApiOptions")
            .field("api_keys", &format_args!("[{} keys]", self.api_keys.len()))
            .field("allowed_hosts", &self.allowed_hosts)
            .field("allowed_origins", &self.allowed_origins)
            .field("max_in_flight", &self.max_in_flight)
            .field("keep_alive", &self.keep_alive)
            .field("shutdown_grace", &self.shutdown_grace)
            .finish()
    }
}

/// Options that would be unsafe or cannot work.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OptionsError {
    /// Anyone on the network could use the node.
    #[error(
        "{0} can be reached from other machines, and no API key is set: anyone on the network could use this node. \
         Set an API key (for instance the output of `openssl rand -hex 16`), or listen on 127.0.0.1"
    )]
    KeyRequired(SocketAddr),
    /// A key that no client could send.
    #[error("an API key must be 1 or more printable ASCII characters without spaces; choose another one")]
    BadKey,
    /// Any web page could use the node.
    #[error(
        "the allowed origin `*` lets every web page that a user of this machine visits use the node; \
         set an API key as well, or name the origins"
    )]
    AnyOriginWithoutKey,
    /// Not an origin.
    #[error("`{0}` is not an origin: write scheme, host and port, such as https://chat.example.org, without a path")]
    BadOrigin(String),
    /// Not a host name.
    #[error("`{0}` is not a host name: write the name alone, such as murmur.example.org, without scheme and port")]
    BadHost(String),
    /// Nothing could ever be served.
    #[error("max_in_flight is 0: no request could ever be served; allow at least 1")]
    NothingInFlight,
}

impl ApiOptions {
    /// Checks the options against the address that the server listens on.
    pub fn validate(&self, bound: SocketAddr) -> Result<(), OptionsError> {
        if !self.api_keys.iter().all(|key| !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_graphic())) {
            return Err(OptionsError::BadKey);
        }
        if self.api_keys.is_empty() && !bound.ip().to_canonical().is_loopback() {
            return Err(OptionsError::KeyRequired(bound));
        }
        for origin in &self.allowed_origins {
            if origin == "*" {
                if self.api_keys.is_empty() {
                    return Err(OptionsError::AnyOriginWithoutKey);
                }
            } else if !is_origin(origin) {
                return Err(OptionsError::BadOrigin(origin.clone()));
            }
        }
        if let Some(host) = self.allowed_hosts.iter().find(|host| !is_host_name(host)) {
            return Err(OptionsError::BadHost(host.clone()));
        }
        if self.max_in_flight == 0 {
            return Err(OptionsError::NothingInFlight);
        }
        Ok(())
    }
}

fn is_origin(text: &str) -> bool {
    text.split_once("://").is_some_and(|(scheme, authority)| {
        !scheme.is_empty()
            && scheme.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte))
            && !authority.contains(['/', '?', '#', '@'])
            && authority.parse::<axum::http::uri::Authority>().is_ok()
    })
}

fn is_host_name(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOOPBACK: &str = "127.0.0.1:6876";
    const ANYWHERE: &str = "0.0.0.0:6876";

    fn check(address: &str, change: impl FnOnce(&mut ApiOptions)) -> Result<(), OptionsError> {
        let mut options = ApiOptions::default();
        change(&mut options);
        options.validate(address.parse().unwrap())
    }

    #[test]
    fn a_loopback_address_needs_no_key() {
        for address in [LOOPBACK, "[::1]:80", "127.3.2.1:80", "[::ffff:127.0.0.1]:80"] {
            assert_eq!(check(address, |_| ()), Ok(()), "{address}");
        }
    }

    #[test]
    fn any_other_address_needs_a_key() {
        for address in [ANYWHERE, "[::]:80", "192.168.1.2:80", "[::ffff:10.0.0.1]:80"] {
            let error = check(address, |_| ()).unwrap_err();
            assert_eq!(error, OptionsError::KeyRequired(address.parse().unwrap()));
            assert!(error.to_string().contains("Set an API key"), "{error}");
        }
        assert_eq!(check(ANYWHERE, |o| o.api_keys = vec!["k3y".into()]), Ok(()));
    }

    #[test]
    fn an_empty_or_unsendable_key_is_no_key() {
        for key in ["", "two words", "tab\t", "schlüssel"] {
            assert_eq!(check(ANYWHERE, |o| o.api_keys = vec![key.into()]), Err(OptionsError::BadKey), "{key:?}");
        }
    }

    #[test]
    fn all_origins_need_a_key() {
        let any = |o: &mut ApiOptions| o.allowed_origins = vec!["*".into()];
        assert_eq!(check(LOOPBACK, any), Err(OptionsError::AnyOriginWithoutKey));
        assert_eq!(
            check(LOOPBACK, |o| {
                any(o);
                o.api_keys = vec!["k".into()];
            }),
            Ok(())
        );
    }

    #[test]
    fn origins_and_hosts_are_checked_before_they_are_compared() {
        for origin in ["example.org", "https://example.org/", "https://", "https://a@b", ""] {
            let result = check(LOOPBACK, |o| o.allowed_origins = vec![origin.into()]);
            assert_eq!(result, Err(OptionsError::BadOrigin(origin.into())));
        }
        for host in ["http://a", "a:80", "", "a/b"] {
            let result = check(LOOPBACK, |o| o.allowed_hosts = vec![host.into()]);
            assert_eq!(result, Err(OptionsError::BadHost(host.into())));
        }
        assert_eq!(
            check(LOOPBACK, |o| {
                o.allowed_origins = vec!["https://chat.example.org:8443".into()];
                o.allowed_hosts = vec!["murmur.example.org".into()];
            }),
            Ok(())
        );
    }

    #[test]
    fn keys_are_not_printed() {
        let options = ApiOptions { api_keys: vec!["hunter2".into()], ..Default::default() };
        assert!(!format!("{options:?}").contains("hunter2"));
    }
}
