//! What the tasks of one mesh share: nothing in here decides who is in the mesh; that is [`crate::state`]'s.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use iroh::Endpoint;
use iroh::address_lookup::memory::MemoryLookup;
use iroh::endpoint::Connection;
use iroh_gossip::net::Gossip;
use murmur_protocol::mesh::{Capabilities, NodeId};
use tokio::sync::{mpsc, oneshot};

use crate::NetError;
use crate::admission::{Admission, close};
use crate::identity::{Greeted, Identity};
use crate::links::{self, Links};
use crate::mesh::Work;
use crate::state::Command;

/// A greeted connection over which a peer sends work.
#[derive(Debug, Clone)]
pub(crate) struct Guest {
    pub node: NodeId,
    pub connection: Connection,
    pub greeted: Greeted,
}

/// One node in one mesh.
#[derive(Debug)]
pub(crate) struct Shared {
    pub identity: Identity,
    pub capabilities: Capabilities,
    pub endpoint: Endpoint,
    /// What the endpoint and the overlay dial from.
    pub addresses: MemoryLookup,
    pub gossip: Gossip,
    pub admission: Arc<Admission>,
    pub links: Links,
    /// Connections that this node has dialled to send work over.
    pub workers: Mutex<HashMap<NodeId, Connection>>,
    /// Connections over which others send work, each for as long as it lasts.
    pub guests: Mutex<Vec<Guest>>,
    /// Work that others have sent.
    pub work: mpsc::Sender<Work>,
    pub commands: mpsc::Sender<Command>,
}

impl Shared {
    /// Orders something of the state's task and waits for the answer.
    pub(crate) async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, NetError> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.map_err(|_| NetError::Closed)?;
        answer.await.map_err(|_| NetError::Closed)
    }

    /// Counts an offence of a peer. True when it is shut out with this one; its connections are closed then.
    pub(crate) fn offence(&self, node: NodeId) -> bool {
        let out = self.admission.strike(node);
        if out {
            tracing::warn!(node = %node.short(), "a peer is shut out for its offences");
            self.disconnect(&node);
        }
        out
    }

    /// Closes every connection to a peer.
    pub(crate) fn disconnect(&self, node: &NodeId) {
        self.admission.expel(node);
        if let Some(link) = self.links.get(node) {
            link.connection.close(close::SHUT_OUT, b"shut out");
        }
        let worker = self.workers.lock().unwrap_or_else(PoisonError::into_inner).remove(node);
        if let Some(connection) = worker {
            connection.close(close::SHUT_OUT, b"shut out");
        }
        for guest in self.guests().iter().filter(|guest| guest.node == *node) {
            guest.connection.close(close::SHUT_OUT, b"shut out");
        }
    }

    /// Those that this node has dialled to send work to.
    pub(crate) fn worker_ids(&self) -> Vec<NodeId> {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner).keys().copied().collect()
    }

    /// The live connections for work with a peer, whoever has dialled them.
    pub(crate) fn work_connections(&self, node: &NodeId) -> Vec<Connection> {
        let worker = self.workers.lock().unwrap_or_else(PoisonError::into_inner).get(node).cloned();
        let guests = self.guests();
        let invited = guests.iter().filter(|guest| guest.node == *node).map(|guest| guest.connection.clone());
        let all = worker.into_iter().chain(invited);
        all.filter(|connection| connection.close_reason().is_none()).collect()
    }

    /// Round trip to a node as QUIC has it now: the longest one of the connections with it.
    pub(crate) fn round_trip(&self, node: &NodeId) -> Option<Duration> {
        let link = self.links.get(node).map(|link| link.connection.clone());
        link.into_iter().chain(self.work_connections(node)).filter_map(|it| links::round_trip(&it)).max()
    }

    /// The connections over which others send work.
    pub(crate) fn guests(&self) -> MutexGuard<'_, Vec<Guest>> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
