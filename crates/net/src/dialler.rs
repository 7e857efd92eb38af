//! Whom to dial, when, and the dialling.
//!
//! Known nodes and contacts that discovery found are dialled until there are enough control connections. Who does not
//! answer is left alone for a pause that doubles; a contact that never answers is forgotten. One dial per node and
//! purpose is under way at a time; whoever else wants the same waits for it.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use iroh::endpoint::{ConnectOptions, Connection};
use iroh::{EndpointAddr, RelayUrl};
use murmur_core::time::Now;
use murmur_protocol::mesh::{Addresses, NodeId};
use tokio::sync::oneshot;
use tokio::task::{self, JoinSet};
use tokio::time::timeout;

use crate::contact::{Contact, endpoint_id};
use crate::endpoint::{
    CONTROL_WINDOW_BYTES, IDLE_TIMEOUT_MS, MESH_ALPN, WORK_ALPN, WORK_IDLE_TIMEOUT_MS, WORK_WINDOW_BYTES, causes,
    transport,
};
use crate::identity::Greeted;
use crate::shared::Shared;
use crate::{NetError, hello};

/// Within this time a node that can be reached answers, hole punching included.
pub const DIAL_DEADLINE_MS: u64 = 10_000;

/// Dials under way at once, at most.
pub const DIALS_MAX: usize = 32;

/// Contacts that are remembered beside the nodes of the table, at most.
pub const CONTACTS_MAX: usize = 1_024;

/// Pause after the first failure; each further one doubles it.
pub const PAUSE_MS: u64 = 1_000;

/// Longest pause.
pub const PAUSE_MS_MAX: u64 = 60_000;

/// Failures after which a contact is forgotten, unless it is a bootstrap one.
pub const FAILURES_MAX: u32 = 8;

/// Callers that wait for one dial, at most.
const WAITING_MAX: usize = 1_024;

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Purpose {
    Control,
    Work,
}

/// A connection, greeted.
pub(crate) type Dialled = Result<(Connection, Greeted), NetError>;

/// Who waits for a connection.
#[derive(Debug)]
pub(crate) enum Waiting {
    /// For the greeting alone.
    Greeting(oneshot::Sender<Result<(), NetError>>),
    /// For the connection.
    Connection(oneshot::Sender<Result<Connection, NetError>>),
}

impl Waiting {
    fn tell(self, outcome: impl FnOnce() -> Result<Connection, NetError>) {
        // Whoever has stopped waiting needs no answer.
        match self {
            Waiting::Greeting(reply) => drop(reply.send(outcome().map(drop))),
            Waiting::Connection(reply) => drop(reply.send(outcome())),
        }
    }
}

#[derive(Debug, Default)]
struct Candidate {
    addresses: Addresses,
    /// Given by the user or a ticket: never forgotten.
    bootstrap: bool,
    failures: u32,
    not_before: Now,
}

/// The list of those to dial.
#[derive(Debug, Default)]
pub(crate) struct Dialler {
    candidates: BTreeMap<NodeId, Candidate>,
    waiting: HashMap<(NodeId, Purpose), Vec<Waiting>>,
    dials: JoinSet<Dialled>,
    under_way: HashMap<task::Id, (NodeId, Purpose)>,
}

impl Dialler {
    /// Notes where a node may be found. False if there is no room for another.
    pub(crate) fn found(&mut self, contact: &Contact, bootstrap: bool) -> bool {
        let full = self.candidates.len() >= CONTACTS_MAX;
        match self.candidates.get_mut(&contact.node) {
            Some(known) => {
                // Another place than before is worth another try at once.
                if known.addresses != contact.addresses {
                    known.addresses = contact.addresses.clone();
                    known.failures = 0;
                    known.not_before = Now::ZERO;
                }
                known.bootstrap |= bootstrap;
                true
            }
            None if full && !bootstrap => false,
            None => {
                let addresses = contact.addresses.clone();
                self.candidates.insert(contact.node, Candidate { addresses, bootstrap, ..Candidate::default() });
                true
            }
        }
    }

    /// Forgets a node that has left.
    pub(crate) fn forget(&mut self, node: &NodeId) {
        if self.candidates.get(node).is_some_and(|candidate| !candidate.bootstrap) {
            self.candidates.remove(node);
        }
    }

    /// Nodes that may be dialled now, of those found by discovery.
    pub(crate) fn due(&self, now: Now) -> impl Iterator<Item = NodeId> {
        self.candidates
            .iter()
            .filter(move |(node, candidate)| candidate.not_before <= now && !self.is_dialling(node))
            .map(|(node, _)| *node)
    }

    /// Whether a node may be dialled now: it did not fail lately.
    pub(crate) fn may_dial(&self, node: &NodeId, now: Now) -> bool {
        !self.is_dialling(node) && self.candidates.get(node).is_none_or(|candidate| candidate.not_before <= now)
    }

    fn is_dialling(&self, node: &NodeId) -> bool {
        self.waiting.contains_key(&(*node, Purpose::Control))
    }

    /// Whether more dials can be begun by ourselves.
    pub(crate) fn has_room(&self) -> bool {
        self.waiting.len() < DIALS_MAX
    }

    /// Dials, unless that is under way. `told`: addresses in the node's own record.
    pub(crate) fn dial(
        &mut self,
        shared: &Arc<Shared>,
        node: NodeId,
        purpose: Purpose,
        told: Option<&Addresses>,
        waiting: Option<Waiting>,
    ) {
        if let Some(others) = self.waiting.get_mut(&(node, purpose)) {
            match waiting {
                Some(waiting) if others.len() < WAITING_MAX => others.push(waiting),
                Some(waiting) => waiting.tell(|| Err(NetError::unreachable(node, "too many wait for that already"))),
                None => {}
            }
            return;
        }
        self.waiting.insert((node, purpose), waiting.into_iter().collect());
        let found = self.candidates.get(&node).map(|candidate| &candidate.addresses);
        let target = target(node, told.into_iter().chain(found));
        let shared = Arc::clone(shared);
        let dialling = self.dials.spawn(async move { dial(&shared, node, target?, purpose).await });
        self.under_way.insert(dialling.id(), (node, purpose));
    }

    /// The next dial that has ended. Pends while none is under way.
    pub(crate) async fn ended(&mut self) -> (NodeId, Purpose, Dialled) {
        loop {
            let (id, dialled) = match self.dials.join_next_with_id().await {
                Some(Ok((id, dialled))) => (id, Some(dialled)),
                Some(Err(error)) => {
                    tracing::error!(%error, "dialling failed within");
                    (error.id(), None)
                }
                None => std::future::pending().await,
            };
            if let Some((node, purpose)) = self.under_way.remove(&id) {
                let failed = || Err(NetError::unreachable(node, "dialling it failed within"));
                return (node, purpose, dialled.unwrap_or_else(failed));
            }
        }
    }

    /// Notes how a dial ended, and tells those that wait for it.
    pub(crate) fn note(&mut self, node: NodeId, purpose: Purpose, dialled: &Dialled, now: Now) {
        if let Some(candidate) = self.candidates.get_mut(&node) {
            if dialled.is_ok() {
                candidate.failures = 0;
                candidate.not_before = Now::ZERO;
            } else {
                let pause_ms = PAUSE_MS.saturating_mul(1 << candidate.failures.min(10)).min(PAUSE_MS_MAX);
                candidate.failures += 1;
                candidate.not_before = now.plus_ms(pause_ms);
            }
            if candidate.failures >= FAILURES_MAX && !candidate.bootstrap {
                self.candidates.remove(&node);
            }
        } else if dialled.is_err() && self.candidates.len() < CONTACTS_MAX {
            // A node of the table: remembered for its pause.
            let candidate = Candidate { failures: 1, not_before: now.plus_ms(PAUSE_MS), ..Candidate::default() };
            self.candidates.insert(node, candidate);
        }
        for waiting in self.waiting.remove(&(node, purpose)).unwrap_or_default() {
            waiting.tell(|| told(node, dialled));
        }
    }
}

fn told(node: NodeId, dialled: &Dialled) -> Result<Connection, NetError> {
    match dialled {
        Ok((connection, _)) => Ok(connection.clone()),
        Err(NetError::Refused(refusal)) => Err(NetError::Refused(refusal.clone())),
        Err(NetError::Unwelcome(refusal)) => Err(NetError::Unwelcome(refusal.clone())),
        Err(error) => Err(NetError::unreachable(node, error)),
    }
}

fn target<'a>(node: NodeId, known: impl Iterator<Item = &'a Addresses>) -> Result<EndpointAddr, NetError> {
    let mut target = EndpointAddr::new(endpoint_id(node)?);
    for addresses in known {
        if let Some(relay) = addresses.relay.as_ref().and_then(|relay| relay.parse::<RelayUrl>().ok()) {
            target = target.with_relay_url(relay);
        }
        for direct in &addresses.direct {
            target = target.with_ip_addr(*direct);
        }
    }
    Ok(target)
}

async fn dial(shared: &Shared, node: NodeId, target: EndpointAddr, purpose: Purpose) -> Dialled {
    let (alpn, transport) = match purpose {
        Purpose::Control => (MESH_ALPN, transport(IDLE_TIMEOUT_MS, CONTROL_WINDOW_BYTES)?),
        Purpose::Work => (WORK_ALPN, transport(WORK_IDLE_TIMEOUT_MS, WORK_WINDOW_BYTES)?),
    };
    let options = ConnectOptions::new().with_transport_config(transport);
    let connecting = async {
        let connecting = shared.endpoint.connect_with_opts(target, alpn, options).await;
        connecting.map_err(|error| causes(&error))?.await.map_err(|error| causes(&error))
    };
    let connection = timeout(Duration::from_millis(DIAL_DEADLINE_MS), connecting)
        .await
        .map_err(|_| NetError::unreachable(node, "it does not answer"))?
        .map_err(|why| NetError::unreachable(node, why))?;
    let greeted = hello::greet(&connection, &shared.identity, shared.capabilities, &shared.admission).await?;
    Ok((connection, greeted))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contact(number: u16) -> Contact {
        let mut bytes = [0; 32];
        bytes[..2].copy_from_slice(&number.to_le_bytes());
        Contact { node: NodeId::from_bytes(bytes), addresses: Addresses::default() }
    }

    fn failed() -> Dialled {
        Err(NetError::Late("answer"))
    }

    #[test]
    fn who_does_not_answer_is_left_alone_longer_and_longer_and_then_forgotten() {
        let mut dialler = Dialler::default();
        let contact = contact(1);
        assert!(dialler.found(&contact, false));
        let mut now = Now::from_ms(1);
        let mut pause_ms = PAUSE_MS;
        for _ in 1..FAILURES_MAX {
            assert_eq!(dialler.due(now).count(), 1);
            dialler.note(contact.node, Purpose::Control, &failed(), now);
            assert_eq!(dialler.due(now.plus_ms(pause_ms - 1)).count(), 0);
            now = now.plus_ms(pause_ms);
            pause_ms = (2 * pause_ms).min(PAUSE_MS_MAX);
        }
        dialler.note(contact.node, Purpose::Control, &failed(), now);
        assert_eq!(dialler.due(now.plus_ms(PAUSE_MS_MAX)).count(), 0);
    }

    #[tokio::test]
    async fn a_dial_that_fails_within_is_told_to_those_that_wait_and_can_be_tried_again() {
        let (mut dialler, node) = (Dialler::default(), contact(1).node);
        let (reply, told) = oneshot::channel();
        dialler.waiting.insert((node, Purpose::Control), vec![Waiting::Greeting(reply)]);
        let dialling = dialler.dials.spawn(async { panic!("as a test wants it") });
        dialler.under_way.insert(dialling.id(), (node, Purpose::Control));
        let (node, purpose, dialled) = dialler.ended().await;
        dialler.note(node, purpose, &dialled, Now::ZERO);
        assert!(matches!(told.await.unwrap(), Err(NetError::Unreachable { .. })));
        assert!(!dialler.is_dialling(&node) && dialler.under_way.is_empty());
    }

    #[test]
    fn a_bootstrap_contact_is_never_forgotten() {
        let mut dialler = Dialler::default();
        let contact = contact(1);
        dialler.found(&contact, true);
        for _ in 0..3 * FAILURES_MAX {
            dialler.note(contact.node, Purpose::Control, &failed(), Now::ZERO);
        }
        dialler.forget(&contact.node);
        assert_eq!(dialler.due(Now::from_ms(PAUSE_MS_MAX)).count(), 1);
    }

    #[test]
    fn a_new_address_is_tried_at_once() {
        let mut dialler = Dialler::default();
        let mut contact = contact(1);
        dialler.found(&contact, false);
        dialler.note(contact.node, Purpose::Control, &failed(), Now::ZERO);
        assert_eq!(dialler.due(Now::from_ms(1)).count(), 0);
        contact.addresses.direct.push("192.0.2.1:7".parse().unwrap());
        dialler.found(&contact, false);
        assert_eq!(dialler.due(Now::from_ms(1)).count(), 1);
    }

    #[test]
    fn a_flood_of_contacts_does_not_grow_the_list_nor_displace_bootstrap_ones() {
        let mut dialler = Dialler::default();
        dialler.found(&contact(60_000), true);
        for number in 0..3_000 {
            dialler.found(&contact(number), false);
        }
        assert_eq!(dialler.candidates.len(), CONTACTS_MAX);
        assert!(dialler.candidates.contains_key(&contact(60_000).node));
        assert!(dialler.found(&contact(60_001), true));
    }
}
