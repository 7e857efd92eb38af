//! The services that a mesh of one's own needs in a place that everybody reaches: a Nostr relay, where nodes find each
//! other, and an iroh relay, which carries what cannot go directly. Both see ciphertext or public contacts only, and
//! keep nothing on disk.
//!
//! Both speak plain HTTP here. On loopback and in a trusted network that is enough: what goes through is encrypted end
//! to end. On the internet, put a proxy with a certificate in front of both: browsers and firewalls insist on TLS, and it
//! hides which nodes talk. The relay also tells nodes how they look from outside, over UDP at its port
//! (`own_relays`).

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};

use iroh_relay::server::{QuicConfig, RelayConfig, Server, ServerConfig};
use nostr_relay_builder::builder::RateLimit;
use nostr_relay_builder::{LocalRelay, RelayBuilder};
use nostr_sdk::Url;

use crate::endpoint::causes;
use crate::{NetError, own_relays};

/// Connections to the Nostr relay, at most.
pub const NOSTR_CONNECTIONS_MAX: usize = 4_096;

/// Events that one connection may publish per minute. A node publishes one in ten minutes, and when its addresses
/// change.
pub const NOSTR_EVENTS_PER_MINUTE_MAX: u32 = 60;

/// Subscriptions that one connection may have. A node has one.
pub const NOSTR_SUBSCRIPTIONS_MAX: usize = 16;

/// Where a seed's services listen. Port 0: any free one.
#[derive(Debug, Clone)]
pub struct SeedOptions {
    /// The address of both.
    pub ip: IpAddr,
    /// The name or address by which others reach this machine; `None`: [`ip`](Self::ip).
    pub host: Option<String>,
    /// Port of the Nostr relay.
    pub nostr_port: u16,
    /// Port of the iroh relay: TCP for what it carries, UDP for address discovery.
    pub relay_port: u16,
}

impl Default for SeedOptions {
    /// Loopback, any ports.
    fn default() -> Self {
        SeedOptions { ip: IpAddr::V4(Ipv4Addr::LOCALHOST), host: None, nostr_port: 0, relay_port: 0 }
    }
}

/// The running services. Dropping it stops them; [`Seed::shutdown`] waits for the end.
#[derive(Debug)]
pub struct Seed {
    nostr: LocalRelay,
    nostr_url: String,
    relay: Server,
    relay_url: String,
}

impl Seed {
    /// Starts both services.
    ///
    /// # Errors
    /// [`NetError::Start`], for example when a port is in use; [`NetError::Option`] for a host that cannot stand in a URL.
    pub async fn start(options: SeedOptions) -> Result<Seed, NetError> {
        let mut builder = RelayBuilder::default()
            .addr(options.ip)
            .max_connections(NOSTR_CONNECTIONS_MAX)
            .rate_limit(RateLimit { max_reqs: NOSTR_SUBSCRIPTIONS_MAX, notes_per_minute: NOSTR_EVENTS_PER_MINUTE_MAX });
        if options.nostr_port != 0 {
            builder = builder.port(options.nostr_port);
        }
        let nostr = LocalRelay::new(builder);
        nostr.run().await.map_err(|error| NetError::Start { what: "Nostr relay", reason: causes(&error) })?;
        let nostr_url = at_host(&nostr.url().await.to_string(), options.host.as_deref())?;

        let start = |reason: String| NetError::Start { what: "iroh relay", reason };
        let address = match options.relay_port {
            0 => free_for_both(options.ip).map_err(|error| start(causes(&error)))?,
            port => SocketAddr::new(options.ip, port),
        };
        let mut discovery = QuicConfig::new(address);
        discovery.server_config = Some(own_relays::self_signed()?);
        let mut config = ServerConfig::default();
        config.relay = Some(RelayConfig::new(address));
        config.quic = Some(discovery);
        let relay = Server::spawn(config).await.map_err(|error| start(causes(&error)))?;
        let address = relay.http_addr().ok_or_else(|| start("it does not listen".into()))?;
        let relay_url = at_host(&format!("http://{address}"), options.host.as_deref())?;
        Ok(Seed { nostr, nostr_url, relay, relay_url })
    }

    /// URL of the Nostr relay, for [`MeshOptions::nostr`](crate::MeshOptions::nostr).
    pub fn nostr_url(&self) -> &str {
        &self.nostr_url
    }

    /// URL of the iroh relay, for [`Relays::Own`](crate::Relays::Own).
    pub fn relay_url(&self) -> &str {
        &self.relay_url
    }

    /// Stops both and waits for the end of the iroh relay.
    ///
    /// # Errors
    /// [`NetError::Start`] if the relay had ended before, by an error of its own.
    pub async fn shutdown(self) -> Result<(), NetError> {
        self.nostr.shutdown();
        self.relay.shutdown().await.map_err(|error| NetError::Start { what: "iroh relay", reason: causes(&error) })
    }
}

/// A URL with this host in place of its own.
fn at_host(url: &str, host: Option<&str>) -> Result<String, NetError> {
    let wrong = |reason: String| NetError::Option { what: "host", reason };
    let mut url = Url::parse(url).map_err(|error| wrong(error.to_string()))?;
    if let Some(host) = host {
        url.set_host(Some(host)).map_err(|error| wrong(format!("{host}: {error}")))?;
    }
    Ok(url.as_str().trim_end_matches('/').to_owned())
}

/// An address whose port nobody listens at over TCP or UDP.
fn free_for_both(ip: IpAddr) -> io::Result<SocketAddr> {
    let mut tries = PORT_TRIES_MAX;
    loop {
        let address = TcpListener::bind((ip, 0))?.local_addr()?;
        match UdpSocket::bind(address) {
            Ok(_) => return Ok(address),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && tries > 0 => tries -= 1,
            Err(error) => return Err(error),
        }
    }
}

/// Ports that are tried where any will do.
const PORT_TRIES_MAX: u32 = 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_seed_is_called_as_its_owner_says() {
        let called = |host: &str| SeedOptions { host: Some(host.into()), ..SeedOptions::default() };
        let seed = Seed::start(called("seed.example")).await.unwrap();
        let (nostr, relay) = (seed.nostr_url(), seed.relay_url());
        assert!(
            nostr.starts_with("ws://seed.example:") && relay.starts_with("http://seed.example:"),
            "{nostr} {relay}"
        );
        let error = Seed::start(called("seed of mine")).await.unwrap_err();
        assert!(matches!(&error, NetError::Option { what: "host", .. }), "{error}");
    }
}
