//! Serving those who dial this node: the door, the control connection, the intake of work.
//!
//! Everything a stranger can make this node do is bounded here: greetings in progress (in all, and per address),
//! connections (in all, and per peer), streams per connection, the time that one stream may take.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use iroh::endpoint::{Connection, Incoming, IncomingAddr, RecvStream, SendStream, VarInt};
use murmur_core::membership::Verified;
use murmur_protocol::mesh::{Control, NodeId, Redeemed, RefusalCode, SignedRecord, SignedRevocations};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::NetError;
use crate::admission::close;
use crate::anti_entropy;
use crate::contact::node_id;
use crate::endpoint::{GOSSIP_ALPN, MESH_ALPN, WORK_ALPN, WORK_WINDOW_BYTES, causes};
use crate::hello::{self, Answered, HELLO_DEADLINE_MS};
use crate::links::Link;
use crate::mesh::Work;
use crate::shared::{Guest, Shared};
use crate::state::Command;
use crate::stream::{self, Reader, StreamEnd};

/// Handshakes and greetings in progress, at most.
pub const GREETINGS_MAX: usize = 256;

/// Of which from one IP address or through a relay from one node.
pub const GREETINGS_PER_SOURCE_MAX: usize = 16;

/// Accepted connections, at most.
pub const CONNECTIONS_MAX: usize = 1_024;

/// Of which from one peer.
pub const CONNECTIONS_PER_PEER_MAX: usize = 8;

/// Requests that one peer may have open with this node.
pub const WORK_STREAMS_MAX: u32 = 256;

/// Within this time a control stream other than an exchange of records is over.
pub const STREAM_DEADLINE_MS: u64 = 5_000;

/// Within this time a peer that lives answers on a connection that stands, where round trips are short.
pub const SIGN_OF_LIFE_MS: u64 = 1_000;

/// Round trips that it has for it, where these are long: question and answer wait behind all that is on its way there.
pub const SIGN_OF_LIFE_ROUND_TRIPS: u32 = 4;

/// More time than this it never has: that of any other question.
pub const SIGN_OF_LIFE_MS_MAX: u64 = STREAM_DEADLINE_MS;

/// Counts what is in progress, in all and per key.
#[derive(Debug)]
struct Meter<K: Eq + Hash> {
    total_max: usize,
    each_max: usize,
    counts: Mutex<HashMap<K, usize>>,
}

/// One that is counted; ends when dropped.
#[derive(Debug)]
struct Counted<K: Eq + Hash + Clone> {
    meter: Arc<Meter<K>>,
    key: K,
}

impl<K: Eq + Hash + Clone> Meter<K> {
    fn new(total_max: usize, each_max: usize) -> Arc<Self> {
        Arc::new(Meter { total_max, each_max, counts: Mutex::new(HashMap::new()) })
    }

    /// Counts one more; `None` if there is no room.
    fn enter(self: &Arc<Self>, key: K) -> Option<Counted<K>> {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if counts.values().sum::<usize>() >= self.total_max {
            return None;
        }
        let count = counts.entry(key.clone()).or_insert(0);
        if *count >= self.each_max {
            return None;
        }
        *count += 1;
        Some(Counted { meter: Arc::clone(self), key })
    }
}

impl<K: Eq + Hash + Clone> Drop for Counted<K> {
    fn drop(&mut self) {
        let mut counts = self.meter.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.key);
            }
        }
    }
}

/// Where an attempt to connect comes from.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Source {
    Ip(IpAddr),
    Relayed(NodeId),
    Other,
}

impl From<IncomingAddr> for Source {
    fn from(addr: IncomingAddr) -> Self {
        match addr {
            IncomingAddr::Ip(addr) => Source::Ip(addr.ip()),
            IncomingAddr::Relay { endpoint_id, .. } => Source::Relayed(node_id(endpoint_id)),
            _ => Source::Other,
        }
    }
}

/// Accepts connections until the endpoint closes.
pub(crate) async fn accept(shared: Arc<Shared>) {
    let greetings = Meter::new(GREETINGS_MAX, GREETINGS_PER_SOURCE_MAX);
    let connections = Meter::new(CONNECTIONS_MAX, CONNECTIONS_PER_PEER_MAX);
    let mut tasks = JoinSet::new();
    loop {
        tokio::select! {
            incoming = shared.endpoint.accept() => {
                let Some(incoming) = incoming else { return };
                match greetings.enter(Source::from(incoming.remote_addr())) {
                    Some(greeting) => {
                        tasks.spawn(connection(Arc::clone(&shared), incoming, greeting, Arc::clone(&connections)));
                    }
                    None => incoming.refuse(),
                }
            }
            Some(_) = tasks.join_next(), if !tasks.is_empty() => {}
        }
    }
}

async fn connection(
    shared: Arc<Shared>,
    incoming: Incoming,
    greeting: Counted<Source>,
    connections: Arc<Meter<NodeId>>,
) {
    let handshake = timeout(Duration::from_millis(HELLO_DEADLINE_MS), incoming);
    let connection = match handshake.await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => {
            tracing::debug!(error = causes(&error), "a handshake failed");
            return;
        }
        Err(_) => {
            tracing::debug!("a handshake took too long");
            return;
        }
    };
    let (peer, begun) = (node_id(connection.remote_id()), Instant::now());
    let Some(counted) = connections.enter(peer) else {
        connection.close(close::REFUSED, b"too many connections");
        return;
    };
    if connection.alpn() == GOSSIP_ALPN {
        // The gate let it through; from here it belongs to the overlay.
        drop(greeting);
        if shared.gossip.handle_connection(connection.clone()).await.is_ok() {
            connection.closed().await;
        }
        return;
    }
    let answered = hello::answer(&connection, &shared.identity, shared.capabilities, &shared.admission).await;
    drop(greeting);
    match answered {
        Ok(Answered::Greeted(greeted)) if connection.alpn() == MESH_ALPN => {
            bury_earlier_life(&shared, peer).await;
            if shared.links.buried(&peer) > Some(begun) {
                // While the earlier life's connections stood iroh kept to where that one was, and looks for the way anew with the next connection alone.
                connection.close(close::DUPLICATE, b"dial again");
                return;
            }
            let link = Link::new(peer, connection, greeted, false);
            if let Some(link) = shared.links.add(shared.identity.node, link) {
                // The end of an earlier connection may have taken it back.
                shared.admission.admit(peer);
                if shared.commands.send(Command::LinkUp(Arc::clone(&link))).await.is_err() {
                    return;
                }
                control(shared, link).await;
            }
        }
        Ok(Answered::Greeted(greeted)) if connection.alpn() == WORK_ALPN => {
            bury_earlier_life(&shared, peer).await;
            intake(&shared, Guest { node: peer, connection, greeted }).await;
        }
        Ok(Answered::Greeted(_)) => connection.close(close::REFUSED, b"no such protocol"),
        Ok(Answered::Redeemed) => {
            tracing::info!(node = %peer.short(), "a ticket was redeemed");
            // The joiner closes when it has read its certificate.
            let _ = timeout(Duration::from_millis(HELLO_DEADLINE_MS), connection.closed()).await;
        }
        Err(error) => {
            let code = match &error {
                NetError::Unwelcome(refusal) => Some(refusal.code),
                _ => None,
            };
            tracing::debug!(node = %peer.short(), %error, "a connection was refused");
            if code == Some(RefusalCode::BadMessage) {
                shared.offence(peer);
            }
        }
    }
    drop(counted);
}

/// A peer dials although a connection to it stands: both have dialled at the same moment, it wants one for something else, or it has died
/// and come back. Then nothing comes over the old connections, and until QUIC gives them up iroh sends what is meant for the peer where
/// it was.
///
/// Who is slow to answer has not died: where links are full, questions wait. What tells is whether QUIC hears anything, which the question
/// asks for.
async fn bury_earlier_life(shared: &Shared, peer: NodeId) {
    let Some(old) = shared.links.get(&peer) else { return };
    let begun = |connection: Connection| (heard(&connection), connection);
    let link = begun(old.connection.clone());
    let others: Vec<_> = shared.work_connections(&peer).into_iter().map(begun).collect();
    let says_something = |(before, connection): &(u64, Connection)| heard(connection) > *before;
    let least = Duration::from_millis(SIGN_OF_LIFE_MS);
    let patience = Patience { least, round_trips: SIGN_OF_LIFE_ROUND_TRIPS }.with(shared.round_trip(&peer));
    let ping = Control::Ping(rand::random());
    let answer = timeout(patience, ask(&old, &ping)).await;
    // Of several connections of the new life the first has buried the old one.
    let is_over = old.connection.close_reason().is_some();
    if is_over || matches!(answer, Ok(Ok(Some(_)))) || says_something(&link) {
        return;
    }
    if others.iter().any(says_something) {
        tracing::info!(node = %peer.short(), "of several connections with a node the one for control has died");
        old.connection.close(close::DUPLICATE, b"silent");
    } else {
        tracing::info!(node = %peer.short(), "a node has come back");
        shared.disconnect(&peer);
        shared.links.note_burial(peer);
    }
}

/// How long a node may be silent that was asked for a sign of life. Where a link is full, question and answer wait behind all that is on
/// its way there, and that is what the round trips of the connections with the node tell: a link that is full is no node that is dead.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// So long at least.
    pub least: Duration,
    /// So many round trips, where these take longer; [`SIGN_OF_LIFE_MS_MAX`] at most.
    pub round_trips: u32,
}

impl Patience {
    /// With a node whose answers take so long, as far as that is known.
    pub fn with(self, round_trip: Option<Duration>) -> Duration {
        let longest = Duration::from_millis(SIGN_OF_LIFE_MS_MAX);
        (self.round_trips * round_trip.unwrap_or_default()).clamp(self.least, longest)
    }
}

/// Datagrams that have come over a connection.
fn heard(connection: &Connection) -> u64 {
    connection.stats().udp_rx.datagrams
}

/// Serves a control connection until it ends.
pub(crate) async fn control(shared: Arc<Shared>, link: Arc<Link>) {
    let mut streams = JoinSet::new();
    loop {
        tokio::select! {
            accepted = link.connection.accept_bi() => match accepted {
                Ok((send, recv)) => {
                    let (shared, link) = (Arc::clone(&shared), Arc::clone(&link));
                    streams.spawn(async move {
                        if let Err(error) = control_stream(&shared, &link, send, recv).await {
                            tracing::debug!(node = %link.node.short(), %error, "a control stream failed");
                        }
                    });
                }
                Err(error) => {
                    tracing::debug!(node = %link.node.short(), %error, "a control connection has ended");
                    break;
                }
            },
            Some(_) = streams.join_next(), if !streams.is_empty() => {}
        }
    }
    // A stream that was read completely is still to be dealt with: a goodbye is followed by the end of its connection.
    while streams.join_next().await.is_some() {}
    // Without a state there is nobody left to tell.
    let _ = shared.commands.send(Command::LinkDown(link)).await;
}

async fn control_stream(
    shared: &Arc<Shared>,
    link: &Link,
    mut send: SendStream,
    recv: RecvStream,
) -> Result<(), NetError> {
    let mut reader = Reader::new(recv);
    let deadline = Duration::from_millis(STREAM_DEADLINE_MS);
    let first = timeout(deadline, reader.next()).await.map_err(|_| NetError::Late("message"))?;
    let dealt = match first {
        Ok(Some(Control::Digest(digest))) => anti_entropy::respond(shared, link, digest, &mut send, &mut reader).await,
        Ok(Some(Control::Summary(summary))) => {
            anti_entropy::respond_in_short(shared, link, summary, &mut send, &mut reader).await
        }
        Ok(Some(Control::Goodbye(tombstone))) => goodbye(shared, link, tombstone).await,
        Ok(Some(Control::Revocations(list))) => revocations(shared, list).await,
        Ok(Some(Control::Redeemed(prolonged))) => prolong(shared, prolonged).await,
        Ok(Some(Control::Ping(nonce))) => stream::write(&mut send, &Control::Pong(nonce)).await,
        // A newer peer may know more; it learns from the end of the stream that we do not.
        Ok(Some(Control::Unknown { .. }) | None) => Ok(()),
        Ok(Some(_)) => Err(NetError::protocol("a message at the wrong moment")),
        Err(error) => Err(error),
    };
    if let Err(NetError::Protocol(_) | NetError::Message(_)) = &dealt
        && link.connection.close_reason().is_none()
    {
        shared.offence(link.node);
    }
    stream::finish(&mut send);
    dealt
}

async fn goodbye(shared: &Arc<Shared>, link: &Link, tombstone: SignedRecord) -> Result<(), NetError> {
    let verified = Verified::check(tombstone, shared.identity.mesh).map_err(NetError::protocol)?;
    if verified.record().node != link.node || !verified.record().tombstone {
        return Err(NetError::protocol("a goodbye that is not the sender's own"));
    }
    shared.ask(|reply| Command::Handed { verified, age_ms: 0, from: link.node, reply }).await.map(drop)
}

async fn revocations(shared: &Arc<Shared>, list: SignedRevocations) -> Result<(), NetError> {
    let Some(private) = &shared.identity.private else { return Ok(()) };
    if private.revocations.offer(list)? {
        tracing::info!("the mesh's owner has revoked memberships");
        shared.commands.send(Command::Revoked).await.map_err(|_| NetError::Closed)?;
    }
    Ok(())
}

async fn prolong(shared: &Arc<Shared>, prolonged: Redeemed) -> Result<(), NetError> {
    if shared.identity.prolong(prolonged.certificate)? {
        tracing::info!("the mesh's owner has prolonged the membership of this node");
        shared.commands.send(Command::Prolonged).await.map_err(|_| NetError::Closed)?;
    }
    Ok(())
}

/// Hands a list of revocations on.
pub(crate) async fn tell_revocations(link: &Link, list: SignedRevocations) -> Result<(), NetError> {
    tell(link, &Control::Revocations(list)).await
}

/// Sends one message that is answered by the end of the stream, and waits for that.
pub(crate) async fn tell(link: &Link, message: &Control) -> Result<(), NetError> {
    ask(link, message).await.map(drop)
}

/// Sends one message, and waits for its answer, or the end of the stream.
pub(crate) async fn ask(link: &Link, message: &Control) -> Result<Option<Control>, NetError> {
    let asking = async {
        let (mut send, recv) =
            link.connection.open_bi().await.map_err(|error| NetError::unreachable(link.node, error))?;
        stream::write(&mut send, message).await?;
        stream::finish(&mut send);
        Reader::new(recv).next().await
    };
    let deadline = Duration::from_millis(STREAM_DEADLINE_MS);
    timeout(deadline, asking).await.unwrap_or(Err(NetError::Late("answer")))
}

/// Takes work streams from a peer until its connection ends: by itself, or because the peer is no member any more.
async fn intake(shared: &Shared, guest: Guest) {
    let (peer, connection) = (guest.node, guest.connection.clone());
    let id = connection.stable_id();
    shared.guests().push(guest.clone());
    // It may have been revoked between its greeting and now, when nobody knew of this connection.
    if !shared.identity.is_member(&guest.greeted) {
        shared.disconnect(&peer);
    }
    connection.set_max_concurrent_bi_streams(VarInt::from_u32(WORK_STREAMS_MAX));
    connection.set_receive_window(VarInt::from_u32(WORK_WINDOW_BYTES));
    while let Ok((send, recv)) = connection.accept_bi().await {
        if let Err(unsent) = shared.work.try_send(Work { node: peer, send, recv }) {
            // The driver tries elsewhere at once rather than wait in a queue that does not move.
            let Work { mut send, mut recv, .. } = unsent.into_inner();
            StreamEnd::Busy.tell(&mut send, Some(&mut recv));
        }
    }
    shared.guests().retain(|other| other.connection.stable_id() != id);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_meter_counts_in_all_and_per_key_and_lets_go() {
        let meter = Meter::new(3, 2);
        let first = meter.enter(1).unwrap();
        let _second = meter.enter(1).unwrap();
        assert!(meter.enter(1).is_none());
        let _third = meter.enter(2).unwrap();
        assert!(meter.enter(3).is_none());
        drop(first);
        assert!(meter.enter(3).is_some());
        assert_eq!(meter.counts.lock().unwrap().len(), 2);
    }
}
