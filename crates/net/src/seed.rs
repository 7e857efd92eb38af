//! The services that a mesh of one's own needs in a place that everybody reaches: a Nostr relay, where nodes find each
//! other, and an iroh relay, which carries what cannot go directly. Both see ciphertext or public contacts only, and
//! keep nothing on disk.
//!
//! Both speak plain HTTP here. On loopback and in a trusted network that is enough: what goes through is encrypted end
//! to end. On the internet, put a proxy with a certificate in front of both (browsers and firewalls insist on TLS, and
//! it hides which nodes talk); iroh's QUIC address discovery, with which nodes behind a NAT learn their outer address
//! best, needs a certificate of the server's own and is not offered.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use iroh_relay::server::{RelayConfig, Server, ServerConfig};
use nostr_relay_builder::builder::RateLimit;
use nostr_relay_builder::{LocalRelay, RelayBuilder};

use crate::NetError;
use crate::endpoint::causes;

/// Connections to the Nostr relay, at most.
pub const NOSTR_CONNECTIONS_MAX: usize = 4_096;

/// Events that one connection may publish per minute. A node publishes one in ten minutes, and when its addresses
/// change.
pub const NOSTR_EVENTS_PER_MINUTE_MAX: u32 = 60;

/// Subscriptions that one connection may have. A node has one.
pub const NOSTR_SUBSCRIPTIONS_MAX: usize = 16;

/// Where a seed's services listen. Port 0: any free one.
#[derive(Debug, Clone, Copy)]
pub struct SeedOptions {
    /// The address of both.
    pub ip: IpAddr,
    /// Port of the Nostr relay.
    pub nostr_port: u16,
    /// Port of the iroh relay.
    pub relay_port: u16,
}

impl Default for SeedOptions {
    /// Loopback, any ports.
    fn default() -> Self {
        SeedOptions { ip: IpAddr::V4(Ipv4Addr::LOCALHOST), nostr_port: 0, relay_port: 0 }
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
    /// [`NetError::Start`], for example when a port is in use.
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
        let nostr_url = nostr.url().await.to_string();

        let start = |reason: String| NetError::Start { what: "iroh relay", reason };
        let mut config = ServerConfig::default();
        config.relay = Some(RelayConfig::new(SocketAddr::new(options.ip, options.relay_port)));
        let relay = Server::spawn(config).await.map_err(|error| start(causes(&error)))?;
        let address = relay.http_addr().ok_or_else(|| start("it does not listen".into()))?;
        Ok(Seed { nostr, nostr_url, relay, relay_url: format!("http://{address}") })
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
