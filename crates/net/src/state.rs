//! The task that owns what a node knows of its mesh.
//!
//! The table itself is the pure machine of `murmur_core::membership`; this is its shell. Everything that happens
//! reaches it as a [`Command`] through one bounded channel: heard broadcasts, records handed over, contacts found,
//! connections made and lost. It signs the own record when the table says so, dials, keeps the overlay together, and
//! shows the outcome in a watch channel. It never waits for the network itself: whatever does is a task of its own,
//! owned here.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use iroh::Watcher;
use iroh::endpoint::Connection;
use murmur_core::membership::{Aged, Answer, Digest, Membership, Opening, Outcome, Verified};
use murmur_core::overlay::{Join, Overlay};
use murmur_protocol::mesh::{
    Addresses, Capabilities, Control, Differing, HeldContent, MachineSpeed, MeasuredLink, NodeId, NodeRecord, Ranges,
    RecordError, Role, ServedModel, ServedStage, SignedRecord, Summary,
};
use rand::seq::{IteratorRandom, SliceRandom};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};

use crate::contact::Contact;
use crate::dialler::{Dialled, Dialler, Purpose, Waiting};
use crate::gossip::Topic;
use crate::links::Link;
use crate::mesh::Timing;
use crate::shared::Shared;
use crate::{NetError, anti_entropy, clock, endpoint, serve};

/// Commands that wait, at most. Whoever sends more waits.
pub(crate) const COMMANDS_MAX: usize = 1_024;

/// Commands that are dealt with before watchers are told what has changed.
const BATCH_MAX: usize = 64;

/// How often timers are looked at.
const TICK_MS: u64 = 100;

/// Control connections that are wanted. Smaller meshes are connected completely, larger ones by so many random pairs
/// per node.
pub const LINKS_WANTED: usize = 32;

/// Exchanges of records that this node has begun and that are not over, at most: what a newcomer gets from the first, the
/// next need not send.
const EXCHANGES_MAX: usize = 4;

/// Exchanges that wait for those, at most.
const EXCHANGES_WAITING_MAX: usize = LINKS_WANTED;

/// What reaches the state.
#[derive(Debug)]
pub(crate) enum Command {
    /// Something was broadcast: a record, if all is well. `from`: the last hop; `direct`: it claims to be the first as well.
    Broadcast { content: Bytes, from: NodeId, direct: bool },
    /// A record was handed over, and its signature is good. The answer: whether something newer is known here.
    Handed { verified: Arc<Verified>, age_ms: u64, from: NodeId, reply: oneshot::Sender<bool> },
    /// The overlay has a new neighbour.
    NeighbourUp(NodeId),
    /// The overlay has lost a neighbour.
    NeighbourDown(NodeId),
    /// The overlay begins anew.
    NeighboursLost,
    /// Discovery has found somebody.
    Found(Contact),
    /// The user or a ticket names somebody to begin with.
    Bootstrap(Contact),
    /// A peer has to be greeted before the overlay talks to it.
    Greet { node: NodeId, reply: oneshot::Sender<Result<(), NetError>> },
    /// A control connection is wanted.
    Link { node: NodeId, reply: oneshot::Sender<Result<(), NetError>> },
    /// A connection for work is wanted.
    Work { node: NodeId, reply: oneshot::Sender<Result<Connection, NetError>> },
    /// A peer has dialled and was greeted.
    LinkUp(Arc<Link>),
    /// A control connection has ended.
    LinkDown(Arc<Link>),
    /// The beginning of a comparison; `salt`: for a neighbour that knows summaries.
    Opening { salt: Option<u64>, reply: oneshot::Sender<Opening> },
    /// A neighbour's summary.
    Differing { summary: Summary, reply: oneshot::Sender<Differing> },
    /// A neighbour's answer to a summary of these ranges.
    AnswerDiffering { differing: Differing, ranges: Ranges, reply: oneshot::Sender<Answer> },
    /// A neighbour's digest.
    Answer { digest: Digest, reply: oneshot::Sender<Answer> },
    /// Records that a neighbour asks for.
    Wanted { nodes: Vec<NodeId>, reply: oneshot::Sender<Vec<Aged>> },
    /// The own record changes.
    Update(OwnRecord),
    /// There is a newer list of revocations.
    Revoked,
    /// This node has a newer certificate.
    Prolonged,
    /// The node leaves; the answer is its tombstone.
    Leave { reply: oneshot::Sender<Option<SignedRecord>> },
}

/// What a node says about itself, beyond who and where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnRecord {
    /// What it is in the mesh for.
    pub role: Role,
    /// What it serves or could serve, those that matter most first: what does not fit into a record is left out from
    /// the end.
    pub models: Vec<ServedModel>,
    /// Layers that it holds or would hold.
    pub stages: Vec<ServedStage>,
    /// What it has measured of its ways to others, those that matter most first.
    pub links: Vec<MeasuredLink>,
    /// How fast its machine is, once that is measured.
    pub machine: Option<MachineSpeed>,
    /// Models' files of which it hands out what it has.
    pub contents: Vec<HeldContent>,
    /// Where it is, as its user calls the place; empty: not said.
    pub region: String,
    /// What it can do.
    pub capabilities: Capabilities,
    /// Memory in which it could load models, in bytes.
    pub memory_free_bytes: u64,
}

impl Default for OwnRecord {
    /// A client without models.
    fn default() -> Self {
        OwnRecord {
            role: Role::Client,
            models: Vec::new(),
            stages: Vec::new(),
            links: Vec::new(),
            machine: None,
            contents: Vec::new(),
            region: String::new(),
            capabilities: Capabilities::NONE,
            memory_free_bytes: 0,
        }
    }
}

impl OwnRecord {
    /// Whether others are to hear of this before the next record is due. Ways that are longer or shorter than they were told to
    /// be can wait, and so can those that are gone: round trips change all the time.
    fn is_news_after(&self, told: &OwnRecord) -> bool {
        let is_told = |link: &MeasuredLink| told.links.iter().any(|known| known.is_to_same(link));
        OwnRecord { links: told.links.clone(), ..self.clone() } != *told || !self.links.iter().all(is_told)
    }
}

/// A node of the table.
#[derive(Debug, Clone)]
pub struct Known {
    /// Its latest record.
    pub verified: Arc<Verified>,
    /// Since when it is listed.
    pub since: Instant,
}

/// The other nodes of the mesh. A snapshot, cheap to clone.
pub type Table = Arc<BTreeMap<NodeId, Known>>;

/// How often, and how much at most.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) timing: Timing,
    /// Control connections that are wanted.
    pub(crate) links_wanted: usize,
}

pub(crate) struct State {
    shared: Arc<Shared>,
    membership: Membership,
    limits: Limits,
    own: OwnRecord,
    /// What did not fit into the own record.
    left_out: usize,
    own_addresses: watch::Sender<Addresses>,
    known: BTreeMap<NodeId, Known>,
    table: watch::Sender<Table>,
    dialler: Dialler,
    topic: Topic,
    overlay: Overlay<NodeId>,
    exchanges: JoinSet<()>,
    exchanges_waiting: VecDeque<Arc<Link>>,
    serving: JoinSet<()>,
    exchange_due: Instant,
    heal_due: Instant,
    changed: bool,
}

impl State {
    pub(crate) fn new(
        shared: Arc<Shared>,
        membership: Membership,
        limits: Limits,
        own: OwnRecord,
        topic: Topic,
        own_addresses: watch::Sender<Addresses>,
        table: watch::Sender<Table>,
    ) -> Self {
        let now = Instant::now();
        State {
            exchange_due: now + Duration::from_millis(limits.timing.exchange_every_ms),
            heal_due: now + Duration::from_millis(limits.timing.heal_every_ms),
            shared,
            membership,
            limits,
            own,
            left_out: 0,
            own_addresses,
            known: BTreeMap::new(),
            table,
            dialler: Dialler::default(),
            topic,
            overlay: Overlay::default(),
            exchanges: JoinSet::new(),
            exchanges_waiting: VecDeque::new(),
            serving: JoinSet::new(),
            changed: false,
        }
    }

    /// Runs until dropped, or nobody can command it any more.
    pub(crate) async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        let mut batch = Vec::with_capacity(BATCH_MAX);
        let mut ticks = interval(Duration::from_millis(TICK_MS));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut addresses = self.shared.endpoint.watch_addr().stream();
        loop {
            tokio::select! {
                count = commands.recv_many(&mut batch, BATCH_MAX) => {
                    if count == 0 {
                        return;
                    }
                    for command in batch.drain(..) {
                        self.handle(command);
                    }
                }
                (node, purpose, dialled) = self.dialler.ended() => self.dialled(node, purpose, dialled),
                Some(addr) = addresses.next() => self.moved(endpoint::own_addresses(&self.shared.endpoint, &addr)),
                Some(_) = self.exchanges.join_next(), if !self.exchanges.is_empty() => self.exchange_next(),
                Some(_) = self.serving.join_next(), if !self.serving.is_empty() => {}
                _ = ticks.tick() => self.tick(),
            }
            if std::mem::take(&mut self.changed) {
                self.table.send_replace(Arc::new(self.known.clone()));
            }
        }
    }

    fn handle(&mut self, command: Command) {
        let now = clock::now();
        // Replies go to whoever still waits for one.
        match command {
            Command::Broadcast { content, from, direct } => self.heard(&content, from, direct),
            Command::Handed { verified, age_ms, from, reply } => {
                let _ = reply.send(self.handed(&verified, age_ms, from));
            }
            Command::NeighbourUp(node) => {
                tracing::debug!(node = %node.short(), "overlay neighbour");
                if self.overlay.up(node) {
                    // What was broadcast before has reached nobody.
                    self.membership.note_change();
                }
            }
            Command::NeighbourDown(node) => self.overlay.down(node),
            Command::NeighboursLost => self.overlay.lost(),
            Command::Found(contact) => self.found(&contact, false),
            Command::Bootstrap(contact) => self.found(&contact, true),
            Command::Greet { node, reply } => self.greet(node, reply),
            Command::Link { node, reply } => self.link(node, Some(reply)),
            Command::Work { node, reply } => {
                let waiting = Waiting::Connection(reply);
                self.dial(node, Purpose::Work, Some(waiting));
                // A handshake would be too long to wait for when a sign of life is wanted.
                self.link(node, None);
            }
            Command::LinkUp(link) => self.link_up(&link),
            Command::LinkDown(link) => {
                if self.shared.links.remove(&link) {
                    self.shared.admission.lapse(&link.node);
                }
            }
            Command::Opening { salt, reply } => drop(reply.send(self.membership.opening(salt, now))),
            Command::Differing { summary, reply } => drop(reply.send(self.membership.differing(&summary, now))),
            Command::AnswerDiffering { differing, ranges, reply } => {
                drop(reply.send(self.membership.answer_differing(&differing, ranges, now)));
            }
            Command::Answer { digest, reply } => drop(reply.send(self.membership.answer(&digest, now))),
            Command::Wanted { nodes, reply } => drop(reply.send(self.membership.wanted(&nodes, now))),
            Command::Update(own) => {
                if own.is_news_after(&self.own) {
                    self.membership.note_change();
                }
                self.own = own;
            }
            Command::Revoked => self.drop_revoked(),
            Command::Prolonged => self.membership.note_change(),
            Command::Leave { reply } => drop(reply.send(self.leave())),
        }
    }

    fn tick(&mut self) {
        let now = clock::now();
        for node in self.membership.expire(now) {
            tracing::info!(node = %node.short(), "a node has fallen silent");
            self.remove(&node);
        }
        if self.membership.next_renewal().is_some_and(|due| due <= now) {
            self.renew();
        }
        if self.exchange_due <= Instant::now() {
            self.exchange_due = Instant::now() + Duration::from_millis(self.limits.timing.exchange_every_ms);
            let links = self.shared.links.all();
            if let Some(link) = links.into_iter().choose(&mut rand::rng()) {
                self.exchange(link);
            }
        }
        if self.heal_due <= Instant::now() {
            self.heal_due = Instant::now() + Duration::from_millis(self.limits.timing.heal_every_ms);
            self.heal();
            self.drop_expired_members();
            for link in self.shared.links.all() {
                self.prolong(&link);
            }
        }
        self.dial_more();
    }

    /// Hangs up on strangers in the overlay, and has it join somebody, if there is a reason to.
    fn heal(&mut self) {
        for connected in self.shared.admission.connected_to_overlay() {
            self.overlay.connected(connected, clock::now());
        }
        for stranger in self.overlay.strangers(clock::now()) {
            self.shared.admission.hang_up(&stranger);
        }
        match self.overlay.join(self.known.len(), clock::now()) {
            Join::Nobody => {}
            Join::Peer(peer) => self.topic.join([peer]),
            Join::Any(count) => {
                self.topic.join(self.known.keys().copied().choose_multiple(&mut rand::rng(), count));
            }
        }
    }

    fn heard(&mut self, content: &[u8], from: NodeId, direct: bool) {
        let checked = SignedRecord::from_bytes(content).map_err(RecordError::from).and_then(|record| {
            // Most of what is heard is known already; that is seen without checking a signature.
            let claim = record.claim()?;
            if !self.membership.is_news(&claim.node, claim.sequence) {
                return Ok(None);
            }
            Verified::check(record, self.shared.identity.mesh).map(Some)
        });
        match checked {
            Ok(None) => {}
            Ok(Some(verified)) => drop(self.accept(&verified, 0, from)),
            Err(error) => {
                tracing::debug!(from = %from.short(), %error, direct, "a bad record was broadcast");
                if direct {
                    self.shared.offence(from);
                }
            }
        }
    }

    /// Takes a record that a peer has handed over. True if something newer is known here.
    fn handed(&mut self, verified: &Arc<Verified>, age_ms: u64, from: NodeId) -> bool {
        match self.accept(verified, age_ms, from) {
            Some(Outcome::Newer) => self.overlay.handed_newer(from, age_ms),
            // The departed cannot see to it any more that its last word reaches everybody.
            Some(Outcome::Departed) => self.topic.broadcast(verified.signed()),
            Some(Outcome::Old) => return true,
            _ => {}
        }
        false
    }

    fn accept(&mut self, verified: &Arc<Verified>, age_ms: u64, from: NodeId) -> Option<Outcome> {
        let record = verified.record();
        if !self.shared.identity.accepts(record) {
            tracing::debug!(node = %record.node.short(), "a record of a node that is no member");
            return None;
        }
        let outcome = self.membership.accept(verified, age_ms, from, clock::now());
        match &outcome {
            Outcome::New { displaced } => {
                for displaced in displaced {
                    self.remove(displaced);
                }
                tracing::info!(node = %record.node.short(), "a node has joined");
                self.list(verified, Instant::now());
            }
            Outcome::Newer => {
                let since = self.known.get(&record.node).map_or_else(Instant::now, |known| known.since);
                self.list(verified, since);
            }
            Outcome::Departed => {
                tracing::info!(node = %record.node.short(), "a node has left");
                self.remove(&record.node);
            }
            Outcome::Refused(why) => tracing::debug!(node = %record.node.short(), %why, "a record was not taken"),
            Outcome::Known | Outcome::Old | Outcome::Overtaken => {}
        }
        Some(outcome)
    }

    fn list(&mut self, verified: &Arc<Verified>, since: Instant) {
        let record = verified.record();
        let contact = Contact { node: record.node, addresses: record.addresses.clone() };
        if let Ok(addr) = contact.to_endpoint_addr() {
            self.shared.addresses.set_endpoint_info(addr);
        }
        self.known.insert(record.node, Known { verified: Arc::clone(verified), since });
        self.changed = true;
    }

    fn remove(&mut self, node: &NodeId) {
        if let Ok(id) = crate::contact::endpoint_id(*node) {
            self.shared.addresses.remove_endpoint_info(id);
        }
        self.dialler.forget(node);
        self.changed |= self.known.remove(node).is_some();
    }

    fn renew(&mut self) {
        let sequence = self.membership.renew(clock::now());
        if let Some(signed) = self.sign(sequence, false) {
            self.topic.broadcast(&signed);
        }
    }

    /// Signs the own record; broadcasting is the caller's.
    fn sign(&mut self, sequence: u64, tombstone: bool) -> Option<SignedRecord> {
        let identity = &self.shared.identity;
        let mut record = NodeRecord {
            node: identity.node,
            mesh: identity.mesh,
            sequence,
            ttl_ms: self.membership.ttl_ms(),
            tombstone,
            role: self.own.role,
            addresses: self.own_addresses.borrow().clone(),
            models: if tombstone { Vec::new() } else { self.own.models.clone() },
            stages: if tombstone { Vec::new() } else { self.own.stages.clone() },
            links: if tombstone { Vec::new() } else { self.own.links.clone() },
            machine: self.own.machine,
            contents: self.own.contents.clone(),
            region: self.own.region.clone(),
            software: identity.software.clone(),
            capabilities: self.own.capabilities,
            memory_free_bytes: self.own.memory_free_bytes,
            certificate: identity.certificate(),
        };
        let left_out = record.shorten();
        if left_out > 0 && left_out != self.left_out {
            tracing::warn!(left_out, "not all models fit into the record of this node");
        }
        self.left_out = left_out;
        match record.sign(&identity.key) {
            Ok(signed) => {
                self.membership.set_own(Verified::trusted(record, signed.clone()));
                Some(signed)
            }
            Err(error) => {
                tracing::error!(%error, "the own record cannot be signed");
                None
            }
        }
    }

    fn moved(&mut self, addresses: Addresses) {
        let moved = self.own_addresses.send_if_modified(|known| {
            let moved = *known != addresses;
            *known = addresses;
            moved
        });
        if moved {
            self.membership.note_change();
        }
    }

    fn found(&mut self, contact: &Contact, bootstrap: bool) {
        if contact.node == self.shared.identity.node {
            return;
        }
        self.dialler.found(contact, bootstrap);
        self.dial_more();
    }

    fn greet(&mut self, node: NodeId, reply: oneshot::Sender<Result<(), NetError>>) {
        if self.shared.admission.is_admitted(&node) {
            let _ = reply.send(Ok(()));
        } else {
            self.dial(node, Purpose::Control, Some(Waiting::Greeting(reply)));
        }
    }

    /// Sees to it that there is a control connection.
    fn link(&mut self, node: NodeId, reply: Option<oneshot::Sender<Result<(), NetError>>>) {
        match (self.shared.links.get(&node), reply) {
            (None, reply) => self.dial(node, Purpose::Control, reply.map(Waiting::Greeting)),
            // Whoever has stopped waiting needs no answer.
            (Some(_), Some(reply)) => drop(reply.send(Ok(()))),
            (Some(_), None) => {}
        }
    }

    fn dial(&mut self, node: NodeId, purpose: Purpose, waiting: Option<Waiting>) {
        let told = self.known.get(&node).map(|known| known.verified.record().addresses.clone());
        self.dialler.dial(&self.shared, node, purpose, told.as_ref(), waiting);
    }

    /// Dials until there are enough control connections.
    fn dial_more(&mut self) {
        if !self.dialler.has_room() {
            return;
        }
        let wanted = self.limits.links_wanted.saturating_sub(self.shared.links.len());
        let now = clock::now();
        let unlinked =
            |node: &NodeId| self.shared.links.get(node).is_none() && !self.shared.admission.is_shut_out(node);
        let mut candidates: Vec<NodeId> = self.dialler.due(now).filter(unlinked).collect();
        if wanted == 0 {
            // Who is found and not known may be of a part of the mesh that lost touch: one of them is tried all the same.
            candidates.retain(|node| !self.known.contains_key(node));
        } else {
            let known = self.known.keys().filter(|node| self.dialler.may_dial(node, now));
            candidates.extend(known.filter(|node| unlinked(node)));
        }
        candidates.shuffle(&mut rand::rng());
        candidates.truncate(wanted.max(1));
        for node in candidates {
            if self.dialler.has_room() {
                self.dial(node, Purpose::Control, None);
            }
        }
    }

    fn dialled(&mut self, node: NodeId, purpose: Purpose, dialled: Dialled) {
        if let Err(error) = &dialled {
            tracing::debug!(node = %node.short(), %error, "dialling failed");
        }
        // Who waits for it finds it in its place.
        let link = match (purpose, &dialled) {
            (Purpose::Control, Ok((connection, greeted))) => {
                let link = Link::new(node, connection.clone(), greeted.clone(), true);
                self.shared.links.add(self.shared.identity.node, link)
            }
            _ => None,
        };
        self.dialler.note(node, purpose, &dialled, clock::now());
        if let Some(link) = link {
            self.serving.spawn(serve::control(Arc::clone(&self.shared), Arc::clone(&link)));
            self.link_up(&link);
            self.exchange(link);
        }
    }

    fn link_up(&mut self, link: &Arc<Link>) {
        // The peer of this link may not be listed yet.
        if self.overlay.is_thin(self.known.len().max(1)) {
            self.topic.join([link.node]);
        }
        if self.shared.links.buried(&link.node).is_some() {
            self.serving.spawn(anti_entropy::accompany(Arc::clone(&self.shared), Arc::clone(link)));
        }
        self.tell_revocations(link);
        self.prolong(link);
    }

    /// On the owner's node: sends a member a new certificate when its own ends in a while.
    fn prolong(&mut self, link: &Arc<Link>) {
        if link.prolonged.load(Ordering::Relaxed) {
            return;
        }
        let Some(prolonged) = self.shared.identity.prolonged(&link.greeted) else { return };
        link.prolonged.store(true, Ordering::Relaxed);
        let link = Arc::clone(link);
        self.serving.spawn(async move {
            if let Err(error) = serve::tell(&link, &Control::Redeemed(prolonged)).await {
                tracing::debug!(node = %link.node.short(), %error, "a membership was not prolonged; next time");
            }
        });
    }

    fn tell_revocations(&mut self, link: &Arc<Link>) {
        if let Some(list) = self.shared.identity.private.as_ref().and_then(|private| private.revocations.signed()) {
            let link = Arc::clone(link);
            self.serving.spawn(async move {
                if let Err(error) = serve::tell_revocations(&link, list).await {
                    tracing::debug!(node = %link.node.short(), %error, "revocations were not handed on");
                }
            });
        }
    }

    fn exchange(&mut self, link: Arc<Link>) {
        if self.exchanges_waiting.len() < EXCHANGES_WAITING_MAX {
            self.exchanges_waiting.push_back(link);
        }
        self.exchange_next();
    }

    fn exchange_next(&mut self) {
        while self.exchanges.len() < EXCHANGES_MAX
            && let Some(link) = self.exchanges_waiting.pop_front()
        {
            let shared = Arc::clone(&self.shared);
            self.exchanges.spawn(async move {
                if let Err(error) = anti_entropy::exchange(&shared, &link).await {
                    tracing::debug!(node = %link.node.short(), %error, "an exchange of records failed");
                }
            });
        }
    }

    fn drop_revoked(&mut self) {
        let identity = &self.shared.identity;
        let gone: Vec<NodeId> = self
            .known
            .iter()
            .filter(|(_, known)| !identity.accepts(known.verified.record()))
            .map(|(node, _)| *node)
            .collect();
        for node in gone {
            tracing::info!(node = %node.short(), "a node is no member any more");
            self.membership.expel(&node, clock::now());
            self.remove(&node);
            self.shared.disconnect(&node);
        }
        self.drop_expired_members();
        for link in self.shared.links.all() {
            self.tell_revocations(&link);
        }
    }

    /// Closes connections with those that are no members any more.
    fn drop_expired_members(&self) {
        let links = self.shared.links.all();
        let guests = self.shared.guests().clone();
        let greeted = links.iter().map(|link| (link.node, &link.greeted));
        for (node, greeted) in greeted.chain(guests.iter().map(|guest| (guest.node, &guest.greeted))) {
            if !self.shared.identity.is_member(greeted) {
                self.shared.disconnect(&node);
            }
        }
        // Those that work for this node may have no other connection with it.
        for node in self.shared.worker_ids() {
            if self.known.get(&node).is_some_and(|known| !self.shared.identity.accepts(known.verified.record())) {
                self.shared.disconnect(&node);
            }
        }
    }

    fn leave(&mut self) -> Option<SignedRecord> {
        let sequence = self.membership.leave(clock::now());
        let tombstone = self.sign(sequence, true)?;
        self.topic.broadcast(&tombstone);
        Some(tombstone)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_way_to_another_node_is_news_and_another_round_trip_is_none() {
        let [near, far] = [1, 2].map(|number| NodeId::from_bytes([number; 32]));
        let with = |links: &[MeasuredLink]| OwnRecord { links: links.to_vec(), ..OwnRecord::default() };
        let (first, second) = (MeasuredLink::to(&near, 800, 0), MeasuredLink::to(&far, 40_000, 0));
        let told = with(&[first, second]);
        assert!(told.is_news_after(&with(&[])) && told.is_news_after(&with(&[first])));
        let faster = MeasuredLink::to(&near, 80, 5_000_000);
        for later in [with(&[second, faster]), with(&[second]), with(&[])] {
            assert!(!later.is_news_after(&told));
        }
        let more = OwnRecord { memory_free_bytes: 1, ..told.clone() };
        assert!(more.is_news_after(&told));
    }
}
