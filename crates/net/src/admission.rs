//! Who is let in at the moment, and who is not for a while.
//!
//! A peer is admitted by the greeting on a control connection (see [`crate::hello`]). The gossip overlay opens
//! connections of its own, without a greeting of ours: so the endpoint asks here, through `Gate`, before it dials and
//! after each handshake on gossip's ALPN. Dialling somebody who was not greeted yet greets him first.
//!
//! Peers that hand over what no honest peer would get strikes; with enough of them they are shut out for a while.
//! So do bad broadcasts of which they say themselves that they begin with them. Overlay neighbours pass on what they have
//! not checked, so others are not to blame.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use iroh::EndpointAddr;
use iroh::endpoint::{
    AfterHandshakeOutcome, BeforeConnectOutcome, Connection, EndpointHooks, VarInt, WeakConnectionHandle,
};
use murmur_protocol::mesh::NodeId;
use tokio::sync::{mpsc, oneshot};

use crate::contact::node_id;
use crate::endpoint::GOSSIP_ALPN;
use crate::state::Command;

/// How long a greeting counts without another. Peers that stay are greeted again by whoever dials them.
pub const ADMISSION_MS: u64 = 30 * 60_000;

/// Peers that are remembered as admitted, at most; the one greeted longest ago gives way.
pub const ADMITTED_MAX: usize = 8_192;

/// Offences after which a peer is shut out.
pub const STRIKES_MAX: u32 = 8;

/// How long a peer is shut out.
pub const SHUT_OUT_MS: u64 = 10 * 60_000;

/// Peers whose strikes are remembered, at most.
const OFFENDERS_MAX: usize = 4_096;

/// QUIC close codes of ours.
pub(crate) mod close {
    use iroh::endpoint::VarInt;

    /// Everything was said.
    pub(crate) const DONE: VarInt = VarInt::from_u32(0);
    /// The greeting failed; the refusal says why.
    pub(crate) const REFUSED: VarInt = VarInt::from_u32(1);
    /// Another connection of the same pair is kept.
    pub(crate) const DUPLICATE: VarInt = VarInt::from_u32(2);
    /// The node leaves the mesh.
    pub(crate) const LEAVING: VarInt = VarInt::from_u32(3);
    /// The peer broke the protocol, or its membership ended.
    pub(crate) const SHUT_OUT: VarInt = VarInt::from_u32(4);
    /// The peer is no neighbour in the overlay.
    pub(crate) const STRANGER: VarInt = VarInt::from_u32(6);
}

#[derive(Debug, Default)]
struct Inner {
    admitted: HashMap<NodeId, Instant>,
    offenders: BTreeMap<NodeId, Offender>,
    gossip: HashMap<NodeId, Vec<WeakConnectionHandle>>,
}

#[derive(Debug)]
struct Offender {
    strikes: u32,
    last: Instant,
}

/// The list at the door.
#[derive(Debug, Default)]
pub(crate) struct Admission {
    inner: Mutex<Inner>,
}

impl Admission {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        // A panic elsewhere leaves at worst one entry more or less.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that the greeting of a peer was accepted.
    pub(crate) fn admit(&self, node: NodeId) {
        let mut inner = self.inner();
        if inner.admitted.len() >= ADMITTED_MAX && !inner.admitted.contains_key(&node) {
            let oldest = inner.admitted.iter().min_by_key(|(_, since)| **since).map(|(node, _)| *node);
            if let Some(oldest) = oldest {
                inner.admitted.remove(&oldest);
            }
        }
        inner.admitted.insert(node, Instant::now());
    }

    /// Whether a peer was greeted lately and did nothing since to be shut out.
    pub(crate) fn is_admitted(&self, node: &NodeId) -> bool {
        let inner = self.inner();
        let lately = |since: &Instant| since.elapsed() < Duration::from_millis(ADMISSION_MS);
        inner.admitted.get(node).is_some_and(lately) && !inner.is_shut_out(node)
    }

    /// Whether a peer is shut out for its offences.
    pub(crate) fn is_shut_out(&self, node: &NodeId) -> bool {
        self.inner().is_shut_out(node)
    }

    /// Counts an offence. True when the peer is shut out with this one: its connections are to be closed.
    pub(crate) fn strike(&self, node: NodeId) -> bool {
        let mut inner = self.inner();
        if inner.offenders.len() >= OFFENDERS_MAX && !inner.offenders.contains_key(&node) {
            let oldest = inner.offenders.iter().min_by_key(|(_, offender)| offender.last).map(|(node, _)| *node);
            if let Some(oldest) = oldest {
                inner.offenders.remove(&oldest);
            }
        }
        let offender = inner.offenders.entry(node).or_insert(Offender { strikes: 0, last: Instant::now() });
        if offender.last.elapsed() > Duration::from_millis(SHUT_OUT_MS) {
            offender.strikes = 0;
        }
        offender.strikes += 1;
        offender.last = Instant::now();
        let out = offender.strikes >= STRIKES_MAX;
        if out {
            inner.expel(&node);
        }
        out
    }

    /// Ends the admission of a peer whose control connection has ended: it may have restarted, and know nothing of a
    /// greeting.
    pub(crate) fn lapse(&self, node: &NodeId) {
        self.inner().admitted.remove(node);
    }

    /// Ends the admission of a peer and closes its gossip connections.
    pub(crate) fn expel(&self, node: &NodeId) {
        self.inner().expel(node);
    }

    /// Nodes that have a gossip connection with this one.
    pub(crate) fn connected_to_overlay(&self) -> Vec<NodeId> {
        let lives = |connection: &WeakConnectionHandle| {
            connection.upgrade().is_some_and(|connection| connection.close_reason().is_none())
        };
        let mut inner = self.inner();
        inner.gossip.retain(|_, connections| connections.iter().any(lives));
        inner.gossip.keys().copied().collect()
    }

    /// Closes the gossip connections with a peer.
    pub(crate) fn hang_up(&self, node: &NodeId) {
        self.inner().close_gossip(node, close::STRANGER, b"no neighbour");
    }

    fn add_gossip(&self, node: NodeId, connection: WeakConnectionHandle) {
        let mut inner = self.inner();
        let connections = inner.gossip.entry(node).or_default();
        connections.retain(|known| known.upgrade().is_some_and(|known| known.close_reason().is_none()));
        connections.push(connection);
    }
}

impl Inner {
    fn is_shut_out(&self, node: &NodeId) -> bool {
        self.offenders.get(node).is_some_and(|offender| {
            offender.strikes >= STRIKES_MAX && offender.last.elapsed() < Duration::from_millis(SHUT_OUT_MS)
        })
    }

    fn expel(&mut self, node: &NodeId) {
        self.admitted.remove(node);
        self.close_gossip(node, close::SHUT_OUT, b"shut out");
    }

    fn close_gossip(&mut self, node: &NodeId, code: VarInt, reason: &[u8]) {
        for connection in self.gossip.remove(node).unwrap_or_default() {
            if let Some(connection) = connection.upgrade() {
                connection.close(code, reason);
            }
        }
    }
}

/// What the endpoint asks about gossip connections.
#[derive(Debug)]
pub(crate) struct Gate {
    pub(crate) admission: Arc<Admission>,
    /// Where greetings are ordered. No endpoint in here: the endpoint owns the gate.
    pub(crate) commands: mpsc::Sender<Command>,
}

impl Gate {
    async fn greet(&self, node: NodeId) -> bool {
        if self.admission.is_admitted(&node) {
            return true;
        }
        let (reply, greeted) = oneshot::channel();
        let asked = self.commands.send(Command::Greet { node, reply }).await;
        asked.is_ok() && greeted.await.is_ok_and(|result| result.is_ok())
    }
}

impl EndpointHooks for Gate {
    async fn before_connect<'a>(&'a self, remote: &'a EndpointAddr, alpn: &'a [u8]) -> BeforeConnectOutcome {
        if alpn != GOSSIP_ALPN || self.greet(node_id(remote.id)).await {
            BeforeConnectOutcome::Accept
        } else {
            BeforeConnectOutcome::Reject
        }
    }

    async fn after_handshake<'a>(&'a self, connection: &'a Connection) -> AfterHandshakeOutcome {
        let node = node_id(connection.remote_id());
        let reject =
            |code: VarInt, reason: &[u8]| AfterHandshakeOutcome::Reject { error_code: code, reason: reason.to_vec() };
        if self.admission.is_shut_out(&node) {
            return reject(close::SHUT_OUT, b"shut out");
        }
        if connection.alpn() != GOSSIP_ALPN {
            return AfterHandshakeOutcome::Accept;
        }
        if !self.admission.is_admitted(&node) {
            return reject(close::REFUSED, b"greet on the control connection first");
        }
        self.admission.add_gossip(node, connection.weak_handle());
        AfterHandshakeOutcome::Accept
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(number: u32) -> NodeId {
        let mut bytes = [0; 32];
        bytes[..4].copy_from_slice(&number.to_le_bytes());
        NodeId::from_bytes(bytes)
    }

    #[test]
    fn a_peer_is_shut_out_with_its_last_strike_and_not_before() {
        let admission = Admission::default();
        admission.admit(node(1));
        for _ in 1..STRIKES_MAX {
            assert!(!admission.strike(node(1)));
            assert!(admission.is_admitted(&node(1)));
        }
        assert!(admission.strike(node(1)));
        assert!(admission.is_shut_out(&node(1)));
        admission.admit(node(1));
        assert!(!admission.is_admitted(&node(1)), "another greeting changes nothing");
    }

    #[test]
    fn the_lists_are_bounded() {
        let admission = Admission::default();
        for number in 0..(ADMITTED_MAX as u32 + 10) {
            admission.admit(node(number));
        }
        assert_eq!(admission.inner().admitted.len(), ADMITTED_MAX);
        for number in 0..(OFFENDERS_MAX as u32 + 10) {
            admission.strike(node(number));
        }
        assert_eq!(admission.inner().offenders.len(), OFFENDERS_MAX);
    }

    #[test]
    fn who_is_expelled_has_to_greet_again() {
        let admission = Admission::default();
        admission.admit(node(1));
        admission.expel(&node(1));
        assert!(!admission.is_admitted(&node(1)));
        admission.admit(node(1));
        assert!(admission.is_admitted(&node(1)));
    }
}
