//! Where the hub is, who we are there, and where its cache lies: the environment variables that every Hugging Face tool reads.

use std::{ffi::OsString, fmt, path::PathBuf, time::Duration};

use reqwest::Url;

use crate::error::StoreError;

/// The hub, unless `HF_ENDPOINT` names another.
const DEFAULT_ENDPOINT: &str = "https://huggingface.co";
/// A token is a line of text.
const TOKEN_BYTES_MAX: usize = 4096;

/// Settings of a hub client.
#[derive(Clone)]
pub struct HubConfig {
    endpoint: String,
    token: Option<String>,
    cache_dir: PathBuf,
    is_offline: bool,
    /// Fruitless attempts in a row before a transfer is given up (what it has done stays).
    pub attempts_max: u32,
    /// First pause between attempts; doubles each time.
    pub backoff_base: Duration,
    /// A transfer that brings no byte for so long counts as broken off.
    pub stall_timeout: Duration,
}

impl fmt::Debug for HubConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let token = self.token.as_ref().map(|_| "set");
        f.debug_struct("HubConfig")
            .field("endpoint", &self.endpoint)
            .field("token", &token)
            .field("cache_dir", &self.cache_dir)
            .finish_non_exhaustive()
    }
}

impl HubConfig {
    /// Settings from this process's environment.
    pub fn from_env() -> Result<Self, StoreError> {
        Self::from_variables(|name| std::env::var_os(name))
    }

    /// Settings from variables:
    ///
    /// - `HF_ENDPOINT`: the hub's address;
    /// - `HF_HUB_CACHE`, else `HF_HOME` + `/hub`, else `XDG_CACHE_HOME` or `~/.cache` + `/huggingface/hub`: the cache;
    /// - `HF_TOKEN`, else the file `HF_TOKEN_PATH`, else `token` in `HF_HOME`: the token;
    /// - `HF_HUB_OFFLINE`: the hub is not asked for anything.
    pub fn from_variables(variable: impl Fn(&str) -> Option<OsString>) -> Result<Self, StoreError> {
        let set = |name: &str| variable(name).filter(|value| !value.is_empty());
        let bad = |what: &str, why: &str| StoreError::BadHubSetting { what: what.to_owned(), why: why.to_owned() };

        let endpoint = match set("HF_ENDPOINT") {
            Some(value) => value
                .into_string()
                .map_err(|_| bad("HF_ENDPOINT", "it is not text. Write an address such as https://huggingface.co."))?,
            None => DEFAULT_ENDPOINT.to_owned(),
        };
        let home = set("HF_HOME")
            .map(PathBuf::from)
            .or_else(|| set("XDG_CACHE_HOME").map(|cache| PathBuf::from(cache).join("huggingface")))
            .or_else(|| dirs::home_dir().map(|home| home.join(".cache").join("huggingface")));
        let cache_dir = set("HF_HUB_CACHE").map(PathBuf::from).or_else(|| home.as_ref().map(|home| home.join("hub")));
        let Some(cache_dir) = cache_dir else {
            return Err(bad("the hub's cache", "this user has no home directory. Set HF_HOME to a directory."));
        };
        let token_file = set("HF_TOKEN_PATH").map(PathBuf::from).or_else(|| home.map(|home| home.join("token")));
        let token = match set("HF_TOKEN") {
            Some(value) => Some(
                value
                    .into_string()
                    .map_err(|_| bad("HF_TOKEN", "it is not text. Copy it again from the hub's settings page."))?,
            ),
            // No token file is the normal case.
            None => token_file.and_then(|path| std::fs::read_to_string(path).ok()),
        };
        let token = token.map(|text| text.trim().to_owned()).filter(|text| !text.is_empty());
        if token
            .as_ref()
            .is_some_and(|text| text.len() > TOKEN_BYTES_MAX || !text.bytes().all(|b| b.is_ascii_graphic()))
        {
            return Err(bad(
                "the hub token",
                "it has characters that no token has. Copy it again from the hub's settings page.",
            ));
        }
        let mut config = Self::new(&endpoint, token, std::path::absolute(&cache_dir).unwrap_or(cache_dir))?;
        // As the hub's own tools read it.
        let is_yes = |value: &str| matches!(value.to_ascii_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE");
        config.is_offline = set("HF_HUB_OFFLINE").is_some_and(|value| value.to_str().is_some_and(is_yes));
        Ok(config)
    }

    /// Settings given one by one.
    pub fn new(endpoint: &str, token: Option<String>, cache_dir: PathBuf) -> Result<Self, StoreError> {
        let bad = |why: &str| StoreError::BadHubSetting {
            what: format!("the hub address '{endpoint}' (HF_ENDPOINT)"),
            why: why.to_owned(),
        };
        let url = Url::parse(endpoint)
            .map_err(|error| bad(&format!("{error}. Write an address such as https://huggingface.co.")))?;
        if !matches!(url.scheme(), "http" | "https") || url.query().is_some() || url.fragment().is_some() {
            return Err(bad("it must be a plain http or https address."));
        }
        let token = match token {
            Some(_) if url.scheme() == "http" && !is_loopback(&url) => {
                tracing::warn!(
                    "the hub token is not sent: HF_ENDPOINT is a plain http address, anyone on the way could read it"
                );
                None
            }
            other => other,
        };
        Ok(Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token,
            cache_dir,
            is_offline: false,
            attempts_max: 6,
            backoff_base: Duration::from_secs(1),
            stall_timeout: Duration::from_secs(30),
        })
    }

    /// The hub's address, without a slash at the end.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Where the hub's cache lies.
    pub fn cache_dir(&self) -> &std::path::Path {
        &self.cache_dir
    }

    /// Whether the hub is not to be asked for anything.
    pub fn is_offline(&self) -> bool {
        self.is_offline
    }

    /// Whether requests carry a token.
    pub fn has_token(&self) -> bool {
        self.token.is_some()
    }

    pub(super) fn token(&self) -> Option<&str> {
        self.token.as_deref()
    }

    pub(super) fn is_on_this_machine(&self) -> bool {
        Url::parse(&self.endpoint).is_ok_and(|url| is_loopback(&url))
    }
}

fn is_loopback(url: &Url) -> bool {
    match url.host_str() {
        Some("localhost") => true,
        Some(host) => host.trim_matches(['[', ']']).parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback()),
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(variables: &[(&str, &str)]) -> Result<HubConfig, StoreError> {
        HubConfig::from_variables(|name| {
            variables.iter().find(|(n, _)| *n == name).map(|(_, value)| OsString::from(*value))
        })
    }

    #[test]
    fn the_usual_variables_decide_endpoint_cache_and_token() {
        let c =
            config(&[("HF_ENDPOINT", "https://mirror.example/"), ("HF_HOME", "/hf"), ("HF_TOKEN", " hf_secret \n")])
                .unwrap();
        assert_eq!(c.endpoint(), "https://mirror.example");
        assert_eq!(c.cache_dir(), std::path::Path::new("/hf/hub"));
        assert_eq!(c.token(), Some("hf_secret"));
        assert_eq!(
            config(&[("HF_HUB_CACHE", "/x"), ("HF_HOME", "/hf")]).unwrap().cache_dir(),
            std::path::Path::new("/x")
        );
        assert_eq!(
            config(&[("XDG_CACHE_HOME", "/c")]).unwrap().cache_dir(),
            std::path::Path::new("/c/huggingface/hub")
        );
    }

    #[test]
    fn the_hub_is_left_alone_where_its_own_tools_would() {
        let is_offline = |value| config(&[("HF_HUB_OFFLINE", value), ("HF_HOME", "/hf")]).unwrap().is_offline();
        assert!(["1", "true", "YES", "on"].into_iter().all(is_offline));
        assert!(!["", "0", "false", "off", "2"].into_iter().any(is_offline));
    }

    #[test]
    fn a_token_file_is_read_from_hf_home() {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("token"), "hf_file\n").unwrap();
        assert_eq!(config(&[("HF_HOME", home.path().to_str().unwrap())]).unwrap().token(), Some("hf_file"));
    }

    #[test]
    fn the_token_is_not_sent_in_the_clear_and_not_shown() {
        let c =
            config(&[("HF_ENDPOINT", "http://mirror.example"), ("HF_TOKEN", "hf_secret"), ("HF_HOME", "/hf")]).unwrap();
        assert_eq!(c.token(), None);
        let local =
            config(&[("HF_ENDPOINT", "http://127.0.0.1:1"), ("HF_TOKEN", "hf_secret"), ("HF_HOME", "/hf")]).unwrap();
        assert_eq!(local.token(), Some("hf_secret"));
        assert!(!format!("{local:?}").contains("secret"));
    }

    #[test]
    fn an_address_that_is_no_web_address_is_refused() {
        for bad in ["huggingface.co", "ftp://x", "https://x/?a=1", "http://"] {
            assert!(config(&[("HF_ENDPOINT", bad), ("HF_HOME", "/hf")]).is_err(), "{bad}");
        }
    }
}
