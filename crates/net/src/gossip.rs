//! Broadcast of records on the mesh's topic.
//!
//! The overlay is iroh-gossip: HyParView keeps each node connected to a few others, PlumTree sends each message along a
//! tree of them. It is fast and best effort; what it loses, [`crate::anti_entropy`] brings. Two of its traps are met
//! here:
//!
//! - A message above its limit is taken, reaches nobody and silences the node for a minute. So sizes are checked first.
//! - When the node dies through which the others met, the swarm can fall apart and not heal. So it is told to join peers
//!   that are known (`Topic::join`), when there is a reason: `murmur_core::overlay` decides, and says what joining costs.
//!
//! It hands on what it has not checked, and checks nothing: so of what is bad only the one is to blame who sends it as its
//! own (`Command::Broadcast`'s `direct`).

use std::collections::VecDeque;

use bytes::Bytes;
use futures::StreamExt;
use iroh::EndpointId;
use iroh_gossip::api::{Event, GossipReceiver, GossipSender};
use iroh_gossip::net::Gossip;
use iroh_gossip::proto::TopicId;
use murmur_core::overlay;
use murmur_protocol::mesh::{NodeId, RECORD_BYTES_MAX, SignedRecord};
use tokio::sync::mpsc;

use crate::NetError;
use crate::contact::{endpoint_id, node_id};
use crate::endpoint::GOSSIP_ALPN;
use crate::state::Command;

/// Longest message of the overlay, its own overhead included.
pub const MESSAGE_BYTES_MAX: usize = 4_096;

/// What the overlay adds to a message, at most: about 90 bytes were measured.
pub const OVERHEAD_BYTES_MAX: usize = 200;

const _: () = assert!(RECORD_BYTES_MAX + OVERHEAD_BYTES_MAX <= MESSAGE_BYTES_MAX);

/// Orders that wait for the topic's task, at most. What does not fit is dropped: records are renewed, joins repeated.
const ORDERS_MAX: usize = 64;

/// Peers to begin with when the topic has to be subscribed anew.
const BOOTSTRAP_MAX: usize = 16;

/// What the topic's task is told.
#[derive(Debug)]
enum Order {
    Broadcast(Bytes),
    Join(Vec<EndpointId>),
}

/// The mesh's topic. Its task ends when this is dropped.
#[derive(Debug, Clone)]
pub(crate) struct Topic {
    orders: mpsc::Sender<Order>,
}

impl Topic {
    /// Sends a record to everyone. Lost where the overlay is overloaded.
    pub(crate) fn broadcast(&self, record: &SignedRecord) {
        let bytes = record.as_bytes();
        if bytes.len() + OVERHEAD_BYTES_MAX > MESSAGE_BYTES_MAX {
            tracing::error!(bytes = bytes.len(), "a record is too long to be broadcast");
            return;
        }
        if self.orders.try_send(Order::Broadcast(Bytes::copy_from_slice(bytes))).is_err() {
            tracing::debug!("a broadcast was dropped: the overlay is slow");
        }
    }

    /// Has the overlay connect to these nodes as well. They must be resolvable, and are greeted before they are
    /// dialled.
    pub(crate) fn join(&self, nodes: impl IntoIterator<Item = NodeId>) {
        let ids: Vec<EndpointId> = nodes.into_iter().filter_map(|node| endpoint_id(node).ok()).collect();
        if !ids.is_empty() && self.orders.try_send(Order::Join(ids)).is_err() {
            tracing::debug!("joining peers was dropped: the overlay is slow");
        }
    }
}

/// The overlay on this endpoint.
pub(crate) fn overlay(endpoint: &iroh::Endpoint) -> Gossip {
    let builder = Gossip::builder().max_message_size(MESSAGE_BYTES_MAX).broadcast_config(overlay::broadcast_config());
    builder.alpn(GOSSIP_ALPN).spawn(endpoint.clone())
}

/// The topic, and the task that serves it: to be spawned by whoever owns the mesh. What is heard goes to `heard`.
pub(crate) async fn subscribe(
    gossip: Gossip,
    topic: [u8; 32],
    heard: mpsc::Sender<Command>,
) -> Result<(Topic, impl Future<Output = ()> + Send + 'static), NetError> {
    let (orders, waiting) = mpsc::channel(ORDERS_MAX);
    let topic = TopicId::from_bytes(topic);
    let subscription = subscription(&gossip, topic, Vec::new()).await?;
    let task = serve(gossip, topic, subscription, waiting, heard);
    Ok((Topic { orders }, task))
}

async fn subscription(
    gossip: &Gossip,
    topic: TopicId,
    bootstrap: Vec<EndpointId>,
) -> Result<(GossipSender, GossipReceiver), NetError> {
    let failed = |error: iroh_gossip::api::ApiError| NetError::Start { what: "gossip", reason: error.to_string() };
    Ok(gossip.subscribe(topic, bootstrap).await.map_err(failed)?.split())
}

async fn serve(
    gossip: Gossip,
    topic: TopicId,
    mut subscribed: (GossipSender, GossipReceiver),
    mut orders: mpsc::Receiver<Order>,
    heard: mpsc::Sender<Command>,
) {
    let mut met: VecDeque<EndpointId> = VecDeque::new();
    loop {
        let (sender, receiver) = &mut subscribed;
        let told = tokio::select! {
            order = orders.recv() => match order {
                Some(Order::Broadcast(bytes)) => sender.broadcast(bytes).await.map(|()| None).map_err(drop),
                Some(Order::Join(ids)) => sender.join_peers(ids).await.map(|()| None).map_err(drop),
                None => return,
            },
            event = receiver.next() => match event {
                Some(Ok(Event::Received(message))) => {
                    let (from, direct) = (node_id(message.delivered_from), message.scope.is_direct());
                    Ok(Some(Command::Broadcast { content: message.content, from, direct }))
                }
                Some(Ok(Event::NeighborUp(id))) => {
                    met.retain(|known| *known != id);
                    met.push_front(id);
                    met.truncate(BOOTSTRAP_MAX);
                    Ok(Some(Command::NeighbourUp(node_id(id))))
                }
                Some(Ok(Event::NeighborDown(id))) => Ok(Some(Command::NeighbourDown(node_id(id)))),
                // The overlay closes a subscription that lags; what was missed comes by anti-entropy.
                Some(Ok(Event::Lagged) | Err(_)) | None => Err(()),
            },
        };
        let (alive, told) = told.map_or((false, Some(Command::NeighboursLost)), |told| (true, told));
        if let Some(told) = told
            && heard.send(told).await.is_err()
        {
            return;
        }
        if !alive {
            match subscription(&gossip, topic, met.iter().copied().collect()).await {
                Ok(anew) => subscribed = anew,
                Err(_) => return,
            }
        }
    }
}
