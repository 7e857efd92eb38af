//! The control connections: one per pair of nodes.
//!
//! Both ends may dial at the same moment, which NATs even ask for. Of two connections both ends keep the same one: that
//! which the node with the smaller id has dialled. Of two that the same node has dialled, the newer: it has restarted.

use std::collections::HashMap;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use iroh::TransportAddr;
use iroh::endpoint::{Connection, ConnectionError};
use murmur_protocol::mesh::NodeId;

use crate::admission::close;
use crate::identity::Greeted;

/// For so long a node has come back only just: the overlay has joined it anew by then, which it tries every
/// [`crate::Timing::heal_every_ms`].
pub(crate) const JUST_BACK: Duration = Duration::from_secs(60);

/// A greeted control connection.
#[derive(Debug)]
pub(crate) struct Link {
    pub node: NodeId,
    pub connection: Connection,
    pub greeted: Greeted,
    pub dialled_by_us: bool,
    /// The peer was sent a new certificate over this connection.
    pub prolonged: AtomicBool,
}

impl Link {
    /// A connection that was greeted.
    pub(crate) fn new(node: NodeId, connection: Connection, greeted: Greeted, dialled_by_us: bool) -> Self {
        Link { node, connection, greeted, dialled_by_us, prolonged: AtomicBool::new(false) }
    }
}

/// How the packets of a connection travel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Path {
    /// Directly, to this socket address.
    Direct(std::net::SocketAddr),
    /// Through the relay of this URL.
    Relayed(String),
    /// There is no connection, or its path is not known yet.
    Unknown,
}

/// All of them.
#[derive(Debug, Default)]
pub(crate) struct Links {
    by_node: Mutex<HashMap<NodeId, Arc<Link>>>,
    buried: Mutex<HashMap<NodeId, Instant>>,
}

impl Links {
    fn by_node(&self) -> MutexGuard<'_, HashMap<NodeId, Arc<Link>>> {
        self.by_node.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a connection, or closes it because another one of the pair is kept. `own`: this node.
    pub(crate) fn add(&self, own: NodeId, link: Link) -> Option<Arc<Link>> {
        let link = Arc::new(link);
        let mut links = self.by_node();
        if let Some(old) = links.get(&link.node).filter(|old| old.connection.close_reason().is_none()) {
            let smaller_is_us = own < link.node;
            if old.dialled_by_us != link.dialled_by_us && old.dialled_by_us == smaller_is_us {
                link.connection.close(close::DUPLICATE, b"duplicate");
                return None;
            }
            old.connection.close(close::DUPLICATE, b"duplicate");
        }
        links.insert(link.node, Arc::clone(&link));
        Some(link)
    }

    /// Forgets a connection that has ended. False if another one has taken its place.
    pub(crate) fn remove(&self, link: &Arc<Link>) -> bool {
        let mut links = self.by_node();
        let is_current = links.get(&link.node).is_some_and(|current| Arc::ptr_eq(current, link));
        if is_current {
            links.remove(&link.node);
        }
        is_current
    }

    /// The live connection to a node.
    pub(crate) fn get(&self, node: &NodeId) -> Option<Arc<Link>> {
        self.by_node().get(node).filter(|link| link.connection.close_reason().is_none()).cloned()
    }

    /// Notes that the connections of a node's earlier life have been closed.
    pub(crate) fn note_burial(&self, node: NodeId) {
        let mut buried = self.buried.lock().unwrap_or_else(PoisonError::into_inner);
        buried.retain(|_, at| at.elapsed() < JUST_BACK);
        buried.insert(node, Instant::now());
    }

    /// When that was, if it was within [`JUST_BACK`].
    pub(crate) fn buried(&self, node: &NodeId) -> Option<Instant> {
        let buried = self.buried.lock().unwrap_or_else(PoisonError::into_inner);
        buried.get(node).copied().filter(|at| at.elapsed() < JUST_BACK)
    }

    /// All live connections.
    pub(crate) fn all(&self) -> Vec<Arc<Link>> {
        self.by_node().values().filter(|link| link.connection.close_reason().is_none()).cloned().collect()
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.by_node().len()
    }
}

/// Whether a connection was closed because another one of the pair is kept.
pub(crate) fn is_duplicate(connection: &Connection) -> bool {
    match connection.close_reason() {
        Some(ConnectionError::ApplicationClosed(closed)) => closed.error_code == close::DUPLICATE,
        // We have closed it ourselves.
        Some(ConnectionError::LocallyClosed) => true,
        _ => false,
    }
}

/// What has gone over a connection from here, and what could.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Flow {
    /// Bytes of packets that were sent so far and are not known to be lost.
    pub sent_bytes: u64,
    /// What congestion control would let go at present in a second: its window per round trip. Where little is sent that says
    /// little.
    pub bytes_per_s_max: f64,
}

/// What has gone over a connection on the path that it takes now.
pub(crate) fn flow(connection: &Connection) -> Option<Flow> {
    let paths = connection.paths();
    let stats = paths.iter().find(|path| path.is_selected())?.stats();
    let bytes_per_s_max = stats.cwnd as f64 / stats.rtt.as_secs_f64();
    Some(Flow { sent_bytes: stats.sent_bytes.saturating_sub(stats.lost_bytes), bytes_per_s_max })
}

/// Round-trip time of a connection on the path that it takes now, as QUIC sees it.
pub(crate) fn round_trip(connection: &Connection) -> Option<Duration> {
    let paths = connection.paths();
    paths.iter().find(|path| path.is_selected()).map(|path| path.rtt())
}

/// Round-trip time, in milliseconds, and path of a connection, as QUIC sees them.
pub(crate) fn path(connection: &Connection) -> (Option<f64>, Path) {
    let paths = connection.paths();
    let Some(selected) = paths.iter().find(|path| path.is_selected()) else { return (None, Path::Unknown) };
    let kind = match selected.remote_addr() {
        TransportAddr::Ip(address) => Path::Direct(*address),
        TransportAddr::Relay(url) => Path::Relayed(url.to_string()),
        _ => Path::Unknown,
    };
    (Some(selected.rtt().as_secs_f64() * 1e3), kind)
}
