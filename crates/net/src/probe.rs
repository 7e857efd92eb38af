//! Can a node of this machine be in a mesh? What can be found out without being in one: for `murmur doctor`.
//!
//! Every probe ends within [`PROBE_DEADLINE_MS`], with a plain reason where it fails. Nobody is contacted but the relays that
//! are named.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant, SystemTime};

use futures::future::try_join_all;
use iroh::endpoint::{Builder, presets};
use iroh::{Endpoint, EndpointAddr, RelayMode, Watcher};
use nostr_sdk::{Client, Filter, Kind};
use tokio::time::timeout;

use crate::endpoint::{EndpointOptions, Relays, causes};
use crate::{NetError, endpoint};

/// A probe that has not ended by then has failed.
pub const PROBE_DEADLINE_MS: u64 = 6_000;

/// Both ends of the probe connection.
const PROBE_ALPN: &[u8] = b"murmur/probe/1";

const DEADLINE: Duration = Duration::from_millis(PROBE_DEADLINE_MS);

/// How this machine is connected.
#[derive(Debug, Clone)]
pub struct Network {
    /// Own addresses, with what a QUIC connection to them from this very machine took, or why there is none.
    pub own: Vec<(SocketAddr, Result<Duration, String>)>,
    /// How the machine looks from outside; `None`: no relay to ask was named, or none answered in time.
    pub outside: Option<Outside>,
}

/// How a machine looks from outside, as relays see it.
#[derive(Debug, Clone)]
pub struct Outside {
    /// The addresses that relays saw. None: no answer over UDP.
    pub seen_as: Vec<SocketAddr>,
    /// What kind of NAT is in between.
    pub nat: Nat,
    /// Something answers in the place of others until one has logged in.
    pub is_captive: bool,
}

/// What happens to addresses on the way out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nat {
    /// Nothing: the machine has the address that others see.
    None,
    /// One outer address for all destinations: two such machines connect directly.
    Cone,
    /// Another outer address for each destination: direct connections rarely come about.
    Symmetric,
    /// It takes the answers of two relays to know.
    Unknown,
}

/// A relay that answered.
#[derive(Debug, Clone, Copy)]
pub struct Answer {
    /// From the first packet on, name resolution included.
    pub took: Duration,
    /// How far its clock is ahead of ours in milliseconds, to the second; `None`: it does not say.
    pub clock_ahead_ms: Option<i64>,
}

/// Binds a node's socket as it would be bound, connects to it, and asks relays how it looks.
///
/// # Errors
/// [`NetError::Start`], [`NetError::Option`] if the socket cannot be bound.
pub async fn network(options: &EndpointOptions) -> Result<Network, NetError> {
    let node = bind(endpoint::relays(&options.relays)?, options.bind).await?;
    let outside = async {
        match options.relays {
            Relays::None => None,
            _ => timeout(DEADLINE, node.net_report().initialized()).await.ok(),
        }
    };
    let (report, own) = tokio::join!(outside, reach_own(&node));
    let own = own?;
    let outside = report.map(|report| {
        let (v4, v6) = (report.global_v4.map(SocketAddr::V4), report.global_v6.map(SocketAddr::V6));
        let seen_as: Vec<SocketAddr> = v4.into_iter().chain(v6).collect();
        let is_own = |seen: &SocketAddr| own.iter().any(|(address, _)| address.ip() == seen.ip());
        let nat = match report.mapping_varies_by_dest() {
            _ if !seen_as.is_empty() && seen_as.iter().all(is_own) => Nat::None,
            Some(true) => Nat::Symmetric,
            Some(false) => Nat::Cone,
            None => Nat::Unknown,
        };
        Outside { seen_as, nat, is_captive: report.captive_portal == Some(true) }
    });
    node.close().await;
    Ok(Network { own, outside })
}

/// Asks a relay between nodes over HTTP, where it also says what time it is.
///
/// # Errors
/// Why it does not answer, for people.
pub async fn relay(url: &str) -> Result<Answer, String> {
    install_crypto_provider();
    let client = reqwest::Client::builder().timeout(DEADLINE).build().map_err(|error| causes(&error))?;
    let url = format!("{}{}", url.trim_end_matches('/'), iroh_relay::http::RELAY_PROBE_PATH);
    let (started, asked_at) = (Instant::now(), SystemTime::now());
    let response = client.get(url).send().await.map_err(|error| causes(&error.without_url()))?;
    let took = started.elapsed();
    if !response.status().is_success() {
        return Err(format!("it answers {}, as no relay would", response.status()));
    }
    let date = response.headers().get(reqwest::header::DATE).and_then(|date| date.to_str().ok());
    let theirs = date.and_then(|date| httpdate::parse_http_date(date).ok());
    let clock_ahead_ms = theirs.map(|theirs| ahead_ms(theirs, asked_at, took));
    Ok(Answer { took, clock_ahead_ms })
}

/// How far a clock is ahead that showed a whole second while a question was on its way and back.
fn ahead_ms(theirs: SystemTime, asked_at: SystemTime, took: Duration) -> i64 {
    let ms = |time: SystemTime| {
        let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
    };
    let (earliest, latest) = (ms(asked_at), ms(asked_at + took));
    let (shown, shown_until) = (ms(theirs), ms(theirs) + 999);
    if shown > latest {
        shown - latest
    } else if shown_until < earliest {
        shown_until - earliest
    } else {
        0
    }
}

/// Connects to a Nostr relay and asks it for events, as a node would.
///
/// # Errors
/// Why it does not answer, for people.
pub async fn nostr(url: &str) -> Result<Answer, String> {
    let client = Client::default();
    let started = Instant::now();
    let asked = async {
        client.add_relay(url).await.map_err(|error| error.to_string())?;
        client.try_connect_relay(url, DEADLINE).await.map_err(|error| error.to_string())?;
        let any = Filter::new().kind(Kind::Custom(crate::nostr::EVENT_KIND)).limit(1);
        client.fetch_events_from([url], any, DEADLINE).await.map_err(|error| error.to_string())
    };
    let outcome = timeout(DEADLINE, asked).await;
    let took = started.elapsed();
    client.shutdown().await;
    outcome.map_err(|_| "it does not answer".to_owned())??;
    Ok(Answer { took, clock_ahead_ms: None })
}

/// The relays between nodes that are meant.
pub fn relay_urls(relays: &Relays) -> Vec<String> {
    match relays {
        Relays::None => Vec::new(),
        Relays::Own(urls) => urls.clone(),
        Relays::Public => {
            let urls: Vec<iroh::RelayUrl> = RelayMode::Default.relay_map().urls();
            urls.iter().map(ToString::to_string).collect()
        }
    }
}

async fn bind(builder: Builder, address: Option<SocketAddr>) -> Result<Endpoint, NetError> {
    endpoint::bind_to(builder.alpns(vec![PROBE_ALPN.to_vec()]), address.as_slice()).await
}

/// Connects to every own address. Each time as another node: one endpoint would try all addresses of a node that it knows.
async fn reach_own(node: &Endpoint) -> Result<Vec<(SocketAddr, Result<Duration, String>)>, NetError> {
    let accepting = async {
        // The other ends close them.
        let mut connections = Vec::new();
        while let Some(incoming) = node.accept().await {
            connections.extend(incoming.await);
        }
    };
    let connect = async |address: SocketAddr| {
        let other = bind(Endpoint::builder(presets::Minimal).relay_mode(RelayMode::Disabled), None).await?;
        let (started, target) = (Instant::now(), EndpointAddr::new(node.id()).with_ip_addr(address));
        let outcome = match timeout(DEADLINE, other.connect(target, PROBE_ALPN)).await {
            Ok(Ok(_)) => Ok(started.elapsed()),
            Ok(Err(error)) => Err(causes(&error)),
            Err(_) => Err("no answer".to_owned()),
        };
        other.close().await;
        Ok((address, outcome))
    };
    tokio::select! {
        outcomes = try_join_all(own_addresses(node).into_iter().map(connect)) => outcomes,
        () = accepting => Ok(Vec::new()),
    }
}

/// Loopback first, where the socket is bound to it.
fn own_addresses(node: &Endpoint) -> Vec<SocketAddr> {
    let bound = node.bound_sockets();
    let everywhere = bound.iter().find(|socket| socket.is_ipv4() && socket.ip().is_unspecified());
    let loopback = everywhere.map(|socket| SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), socket.port()));
    let particular = bound.iter().filter(|socket| !socket.ip().is_unspecified()).copied();
    let known = endpoint::own_contact(node).addresses.direct;
    let mut all: Vec<SocketAddr> = Vec::new();
    for address in loopback.into_iter().chain(particular).chain(known) {
        // What relays see is no address of this machine, unless it is: then it is bound, too.
        let is_own = std::net::UdpSocket::bind((address.ip(), 0)).is_ok();
        if is_own && !all.contains(&address) {
            all.push(address);
        }
    }
    all
}

/// `ring` for TLS, unless the process has chosen already.
fn install_crypto_provider() {
    if rustls::crypto::CryptoProvider::get_default().is_none() {
        // Fails only when another thread was faster, and that is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Seed, SeedOptions};

    #[test]
    fn a_clock_is_off_only_by_what_the_second_and_the_way_do_not_explain() {
        let at = |ms: u64| SystemTime::UNIX_EPOCH + Duration::from_millis(ms);
        let ahead = |shown_s: u64, asked_ms: u64, took_ms: u64| {
            ahead_ms(at(1_000 * shown_s), at(asked_ms), Duration::from_millis(took_ms))
        };
        assert_eq!(ahead(100, 100_900, 50), 0);
        assert_eq!(ahead(101, 100_900, 200), 0);
        assert_eq!(ahead(110, 100_000, 500), 9_500);
        assert_eq!(ahead(90, 100_000, 500), -9_001);
    }

    #[tokio::test]
    async fn a_seed_answers_and_knows_the_time_and_what_is_gone_does_not_answer() {
        let seed = Seed::start(SeedOptions::default()).await.unwrap();
        let (relay_url, nostr_url) = (seed.relay_url().to_owned(), seed.nostr_url().to_owned());
        let answer = relay(&relay_url).await.unwrap();
        assert_eq!(answer.clock_ahead_ms, Some(0));
        nostr(&nostr_url).await.unwrap();
        assert!(relay(&nostr_url.replace("ws://", "http://")).await.is_err());
        seed.shutdown().await.unwrap();
        assert!(relay(&relay_url).await.is_err() && nostr(&nostr_url).await.is_err());
    }

    #[tokio::test]
    async fn a_seed_tells_a_machine_how_it_looks_from_outside() {
        let seed = Seed::start(SeedOptions::default()).await.unwrap();
        let relays = Relays::Own(vec![seed.relay_url().to_owned()]);
        let bind = Some("127.0.0.1:0".parse().unwrap());
        let found = network(&EndpointOptions { relays, bind, dht: None }).await.unwrap();
        let outside = found.outside.unwrap();
        assert_eq!((outside.nat, outside.is_captive), (Nat::None, false));
        let own: Vec<SocketAddr> = found.own.iter().map(|(address, _)| *address).collect();
        assert!(
            !outside.seen_as.is_empty() && outside.seen_as.iter().all(|seen| own.contains(seen)),
            "{outside:?} {own:?}"
        );
    }

    #[tokio::test]
    async fn without_relays_a_machine_knows_its_own_addresses_only() {
        let bind = Some("127.0.0.1:0".parse().unwrap());
        let found = network(&EndpointOptions { relays: Relays::None, bind, dht: None }).await.unwrap();
        assert!(found.outside.is_none());
        assert!(found.own.iter().any(|(address, reached)| address.ip().is_loopback() && reached.is_ok()), "{found:?}");
    }
}
