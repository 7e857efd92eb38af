//! The QUIC endpoint of a node, by iroh: dialled by key, through NATs where that works and through a relay where not.
//!
//! The key in `node.key` of the data folder is the node. It is made once and never silently replaced.

use std::net::{SocketAddr, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use iroh::address_lookup::AddrFilter;
use iroh::address_lookup::memory::MemoryLookup;
use iroh::endpoint::{
    AckFrequencyConfig, Builder, EndpointHooks, PortmapperConfig, QuicTransportConfig, VarInt, presets,
};
use iroh::{Endpoint, EndpointAddr, RelayMode, RelayUrl, SecretKey};
use iroh_mainline_address_lookup::DhtAddressLookup;
use murmur_protocol::mesh::{Addresses, NodeKey};
use n0_mainline::DhtBuilder;

use crate::congestion::Bursts;
use crate::contact::Contact;
use crate::{NetError, data_dir, own_relays};

/// The control connection: greeting, exchange of records, tickets.
pub const MESH_ALPN: &[u8] = b"murmur/mesh/1";

/// Work: one stream per request, after the same greeting.
pub const WORK_ALPN: &[u8] = b"murmur/work/1";

/// The overlay on which records are broadcast. Taken from and offered to greeted peers only.
pub const GOSSIP_ALPN: &[u8] = b"murmur/gossip/1";

/// File of the node's secret key in the data folder.
pub const KEY_FILE: &str = "node.key";

/// A connection over which nothing came for so long is gone. Peers that crash cannot say so.
pub const IDLE_TIMEOUT_MS: u64 = 10_000;

/// The same of a connection for work: what a peer holds here that others wait for is free again soon. It is longer than
/// [`KEEP_ALIVE_EVERY_MS`], and QUIC tries again every second at least.
pub const WORK_IDLE_TIMEOUT_MS: u64 = 4_000;

/// How often a silent connection is kept alive: three tries within [`IDLE_TIMEOUT_MS`].
pub const KEEP_ALIVE_EVERY_MS: u64 = 3_000;

/// So many packets may come before it is said at once that they did: two rows of hidden states and more. QUIC says it after every other
/// one unless it is asked not to, and whoever waits for a row then waits for that, too.
const ACK_AFTER_PACKETS: u32 = 16;

/// What came is acknowledged after this at the latest. It is added to the time after which what is lost at the end of a row is sent again,
/// so it is shorter than QUIC's 25 ms.
const ACK_DELAY_MAX: Duration = Duration::from_millis(5);

/// Streams that a peer may have open on one connection before its greeting is accepted, and on control connections.
pub const CONTROL_STREAMS_MAX: u32 = 16;

/// What of one stream may be on its way and unread, bytes: 100 Mbit/s over 100 ms, and QUIC's usual figure. What is fetched in bulk takes several
/// streams where the way is longer.
pub const STREAM_WINDOW_BYTES: u32 = 1_250_000;

/// The same of all streams together of a connection whose greeting is not accepted yet, of one for control, and of the overlay's: all that comes there is
/// read at once.
pub const CONTROL_WINDOW_BYTES: u32 = 4 * STREAM_WINDOW_BYTES;

/// The same of a connection for work, which is 1 Gbit/s over 480 ms. A peer that writes on all of its streams has us hold no more than that. Whoever leaves
/// something unread must leave room for what else comes over the connection: files take half of it at most.
pub const WORK_WINDOW_BYTES: u32 = 48 * STREAM_WINDOW_BYTES;

/// Which relays carry what cannot go directly. They see ciphertext only.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Relays {
    /// The public ones of iroh's makers, together with their directory of addresses.
    #[default]
    Public,
    /// These, and no directory. Of a [`Seed`](crate::seed::Seed), say.
    Own(Vec<String>),
    /// None: for machines without internet, and tests. Nobody outside is contacted.
    None,
}

/// How the endpoint meets the network.
#[derive(Debug, Clone, Default)]
pub struct EndpointOptions {
    /// Relays.
    pub relays: Relays,
    /// The socket address to bind instead of any port on all interfaces.
    pub bind: Option<SocketAddr>,
    /// Whether to find nodes by their ids, and to be found by the own one, in the DHT of BitTorrent.
    pub dht: Option<Dht>,
}

/// Where a lookup in the DHT begins. Whoever knows the id of a node that is in it learns the node's addresses.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Dht {
    /// At the nodes that everybody begins with.
    #[default]
    Public,
    /// At these, `HOST:PORT`: a DHT of one's own.
    Own(Vec<String>),
}

impl Dht {
    fn lookup(&self) -> iroh_mainline_address_lookup::Builder {
        // Relays alone, its default, would be of no use to nodes without one.
        let builder = DhtAddressLookup::builder().addr_filter(AddrFilter::unfiltered());
        match self {
            Dht::Public => builder,
            Dht::Own(nodes) => {
                let mut own = DhtBuilder::default();
                own.bootstrap(nodes);
                builder.dht_builder(own)
            }
        }
    }
}

/// The secret key of the node whose data folder this is; made on first use.
///
/// # Errors
/// [`NetError::CorruptFile`] if the file is there and holds no key: a node never gets another identity by accident.
pub fn node_key(data_dir: &Path) -> Result<NodeKey, NetError> {
    let secret = data_dir::secret(&data_dir.join(KEY_FILE), || SecretKey::generate().to_bytes())?;
    Ok(NodeKey::from_bytes(&secret))
}

/// A bound endpoint, and the book of addresses from which it dials.
#[derive(Debug, Clone)]
pub(crate) struct Bound {
    pub endpoint: Endpoint,
    pub addresses: MemoryLookup,
}

/// File in the data folder of the sockets that the node was bound to.
const SOCKETS_FILE: &str = "sockets.json";

/// The sockets to bind: what was asked for, and where no port was, those of the last time if they are free. Peers that
/// knew this node before it died go on sending to where it was, and are slow to learn better.
fn sockets(options: &EndpointOptions, before: &[SocketAddr]) -> Vec<SocketAddr> {
    let is_asked_for = |socket: &SocketAddr| match options.bind {
        Some(asked) => asked.port() == 0 && asked.ip() == socket.ip(),
        None => socket.ip().is_unspecified(),
    };
    let free: Vec<SocketAddr> =
        before.iter().copied().filter(is_asked_for).filter(|socket| UdpSocket::bind(socket).is_ok()).collect();
    // iroh wants a socket for IPv4 in any case.
    let suffices = free.iter().any(SocketAddr::is_ipv4) || options.bind.is_some() && !free.is_empty();
    if suffices { free } else { options.bind.into_iter().collect() }
}

/// Binds the endpoint, where it was before if that can be.
pub(crate) async fn bind(
    data_dir: &Path,
    key: &NodeKey,
    options: &EndpointOptions,
    hooks: impl EndpointHooks + 'static,
) -> Result<Bound, NetError> {
    let remembered = data_dir.join(SOCKETS_FILE);
    // What cannot be read is of no use, and written anew.
    let before: Vec<SocketAddr> = data_dir::read_json(&remembered).ok().flatten().unwrap_or_default();
    let addresses = MemoryLookup::new();
    let mut builder = relays(&options.relays)?
        .secret_key(SecretKey::from_bytes(&key.to_bytes()))
        .alpns(vec![MESH_ALPN.to_vec(), WORK_ALPN.to_vec(), GOSSIP_ALPN.to_vec()])
        .transport_config(transport(IDLE_TIMEOUT_MS, CONTROL_WINDOW_BYTES)?)
        .address_lookup(addresses.clone())
        .hooks(hooks);
    if let Some(dht) = &options.dht {
        builder = builder.address_lookup(dht.lookup());
    }
    let endpoint = bind_to(builder, &sockets(options, &before)).await?;
    let bound = endpoint.bound_sockets();
    if bound != before {
        data_dir::replace_json(&remembered, &bound)?;
    }
    Ok(Bound { endpoint, addresses })
}

/// Binds an endpoint to these sockets, or to any port on all interfaces if there are none.
pub(crate) async fn bind_to(mut builder: Builder, sockets: &[SocketAddr]) -> Result<Endpoint, NetError> {
    if !sockets.is_empty() {
        builder = builder.clear_ip_transports();
    }
    for &socket in sockets {
        builder = builder
            .bind_addr(socket)
            .map_err(|error| NetError::Option { what: "bind address", reason: error.to_string() })?;
    }
    builder.bind().await.map_err(|error| NetError::Start { what: "QUIC endpoint", reason: causes(&error) })
}

pub(crate) fn relays(relays: &Relays) -> Result<Builder, NetError> {
    match relays {
        Relays::Public => Ok(Endpoint::builder(presets::N0)),
        Relays::Own(urls) => {
            let parse = |url: &String| {
                url.parse::<RelayUrl>()
                    .map_err(|error| NetError::Option { what: "relay", reason: format!("{url}: {error}") })
            };
            let urls = urls.iter().map(parse).collect::<Result<Vec<_>, _>>()?;
            Ok(Endpoint::builder(presets::Minimal)
                .relay_mode(RelayMode::Custom(own_relays::relay_map(&urls)))
                .ca_tls_config(own_relays::certificates(&urls)))
        }
        Relays::None => Ok(Endpoint::builder(presets::Minimal)
            .relay_mode(RelayMode::Disabled)
            .portmapper_config(PortmapperConfig::Disabled)),
    }
}

/// iroh's defaults are the fastest that were measured; only what bounds a peer, how soon a dead one is noticed, how often it is said what
/// came, and what leaves at once ([`crate::congestion`]) differ, and that each packet is handed to the system by itself. Of the idle timeouts of both ends the shorter one counts. `window_bytes`: what
/// of all streams together may be unread.
pub(crate) fn transport(idle_timeout_ms: u64, window_bytes: u32) -> Result<QuicTransportConfig, NetError> {
    let idle = Duration::from_millis(idle_timeout_ms);
    let keep_alive = Duration::from_millis(KEEP_ALIVE_EVERY_MS);
    let idle_timeout = idle
        .try_into()
        .map_err(|_| NetError::Option { what: "idle timeout", reason: "it is too long for QUIC".into() })?;
    let mut acks = AckFrequencyConfig::default();
    acks.ack_eliciting_threshold(VarInt::from_u32(ACK_AFTER_PACKETS)).max_ack_delay(Some(ACK_DELAY_MAX));
    Ok(QuicTransportConfig::builder()
        .ack_frequency_config(Some(acks))
        // Packets that are handed over together are as small as the first of them. noq 1.4 writes a repeated request for fewer acknowledgements
        // without looking whether it fits there, and panics: any peer that dies right after its handshake would take this node with it.
        .enable_segmentation_offload(false)
        .max_idle_timeout(Some(idle_timeout))
        .keep_alive_interval(keep_alive)
        .default_path_keep_alive_interval(keep_alive)
        .default_path_max_idle_timeout(idle)
        .max_concurrent_bidi_streams(VarInt::from_u32(CONTROL_STREAMS_MAX))
        .congestion_controller_factory(Arc::new(Bursts::default()))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW_BYTES))
        .receive_window(VarInt::from_u32(window_bytes))
        .build())
}

/// Where this endpoint can be dialled, to be told to others.
///
/// An endpoint bound to all interfaces knows the addresses of the machine and those under which relays saw it; one
/// bound to a particular address says that one too, loopback included.
pub(crate) fn own_addresses(endpoint: &Endpoint, addr: &EndpointAddr) -> Addresses {
    let mut contact = Contact::from_transport_addrs(addr.id, &addr.addrs);
    for socket in endpoint.bound_sockets() {
        let known = contact.addresses.direct.contains(&socket);
        if !socket.ip().is_unspecified() && !known {
            contact.addresses.direct.push(socket);
        }
    }
    contact.addresses.direct.truncate(ADVERTISED_ADDRESSES_MAX);
    Addresses::publishable(contact.addresses.relay, contact.addresses.direct)
}

/// Direct addresses in the own record, at most: it has to stay small.
const ADVERTISED_ADDRESSES_MAX: usize = 8;

/// The endpoint's own socket addresses and relay as one contact.
pub(crate) fn own_contact(endpoint: &Endpoint) -> Contact {
    let addr = endpoint.addr();
    let addresses = own_addresses(endpoint, &addr);
    Contact { node: crate::contact::node_id(addr.id), addresses }
}

/// An error with its causes, in one line.
pub(crate) fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_comes_back_to_its_sockets_unless_they_are_taken_or_others_are_asked_for() {
        let taken = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let asking = |bind: Option<&str>| EndpointOptions {
            bind: bind.map(|bind| bind.parse().unwrap()),
            ..EndpointOptions::default()
        };
        let everywhere = SocketAddr::from(([0, 0, 0, 0], taken.port()));
        let before = vec![everywhere, taken];
        assert_eq!(sockets(&asking(None), &before), [everywhere]);
        assert_eq!(sockets(&asking(Some("127.0.0.1:0")), &before), [taken]);
        let (fixed, elsewhere) = ("127.0.0.1:9", "127.0.0.2:0");
        assert_eq!(sockets(&asking(Some(fixed)), &before), [fixed.parse().unwrap()]);
        assert_eq!(sockets(&asking(Some(elsewhere)), &before), [elsewhere.parse().unwrap()]);
        let _holder = UdpSocket::bind(taken).unwrap();
        assert_eq!(sockets(&asking(Some("127.0.0.1:0")), &before), ["127.0.0.1:0".parse().unwrap()]);
        assert!(sockets(&asking(None), &before).is_empty());
    }
}
