//! The simulation: nodes, links between them, and what befalls them.

mod count;
mod liar;
mod send;
mod settle;

use std::{collections::HashMap, sync::Arc};

use iroh_gossip::proto::{
    Scope,
    topic::{Command, Event as GossipEvent, InEvent, Message, OutEvent, Timer},
};
use murmur_core::{
    membership::{Aged, Answer, Digest, Membership, MembershipOptions, Opening, Outcome, Unwelcome, Verified},
    overlay::Join,
};
use murmur_protocol::mesh::{Differing, MeshId, MessageError, NodeId, Ranges, Summary};
use n0_future::time::{Duration, Instant};
use rand::{RngExt, SeedableRng, rngs::StdRng};

use crate::{
    measure::{ROUND_MS, Report},
    network::{Network, NetworkOptions},
    node::{Clock, Index, Life, Node},
    notary::{self, Notary},
    queue::Queue,
};

/// The time of day when a simulation begins: a morning in 2026, in Unix milliseconds.
const MORNING_UNIX_MS: u64 = 1_790_000_000_000;

/// How often a node looks whether something is due.
const TICK_MS: u64 = 500;

/// How often a node looks whether it has neighbours enough.
const HEAL_MS: u64 = 2_000;

/// How often discovery names a node; one that is not listed is compared with.
const DISCOVER_MS: u64 = 60_000;

/// Pause between a newcomer's comparisons with its first neighbours: what the first knows, the next need not send.
const NEXT_COMPARISON_MS: u64 = 500;

/// How often a node tries to find somebody to compare with, before it waits for the next round.
const CHOICES_MAX: u32 = 8;

/// How often a liar lies.
const LIE_MS: u64 = 5_000;

/// How many nodes a newcomer asks for their neighbourhood.
const CONTACTS: usize = 3;

/// What is simulated.
#[derive(Debug, Clone, PartialEq)]
pub struct Scenario {
    /// Nodes.
    pub nodes: u32,
    /// Of these, how many lie.
    pub liars: u32,
    /// What all that is drawn depends on.
    pub seed: u64,
    /// The links.
    pub network: NetworkOptions,
    /// The tables.
    pub membership: MembershipOptions,
    /// The nodes start within this time, in milliseconds.
    pub starting_ms: u64,
    /// The nodes run from the beginning, and each knows all others: what a mesh that is too large to be watched while it
    /// starts would have become.
    pub settled: bool,
    /// Wall clocks are off by so much at most, in milliseconds.
    pub wall_skew_ms_max: u64,
    /// Monotonic clocks are fast or slow by so many parts per million at most.
    pub drift_ppm_max: u32,
}

impl Default for Scenario {
    fn default() -> Self {
        Scenario {
            nodes: 20,
            liars: 0,
            seed: 1,
            network: NetworkOptions::default(),
            membership: MembershipOptions::default(),
            starting_ms: 5_000,
            settled: false,
            wall_skew_ms_max: 600_000,
            drift_ppm_max: 500,
        }
    }
}

/// What neighbours say to each other beside broadcasts.
#[derive(Debug, Clone)]
enum Direct {
    Digest(Digest),
    Summary(Summary),
    /// The answer to a summary, with the ranges that the other has asked about.
    Differing(Differing, Ranges),
    Want(Vec<NodeId>),
    /// Records with the age in milliseconds that the sender states, and whether they are genuine.
    Records(Vec<(Arc<Verified>, u32, bool)>),
}

#[derive(Debug, Clone)]
enum Event {
    Start(Index),
    Gossip { from: Index, message: Message<Index> },
    Direct { from: Index, message: Direct },
    GossipTimer(Timer<Index>),
    ConnectionLost(Index),
    Tick,
    Exchange,
    Compare(Index),
    Heal,
    Discover,
    Lie,
}

/// An event at a node, in the life that it is meant for.
#[derive(Debug)]
struct Happening {
    at: Index,
    life: u16,
    event: Event,
}

/// A mesh in one thread.
#[derive(Debug)]
pub struct Sim {
    scenario: Scenario,
    mesh: MeshId,
    /// The overlay measures time in moments of the real clock; only differences count.
    epoch: Instant,
    rng: StdRng,
    queue: Queue<Happening>,
    network: Network,
    notary: Notary,
    nodes: Vec<Node>,
    by_id: HashMap<NodeId, Index>,
    /// Old records, for liars.
    hoard: Vec<Arc<Verified>>,
    /// What an overlay wants done: empty between events, kept for its memory.
    wanted: Vec<OutEvent<Index>>,
    report: Report,
    /// When counting began.
    counting_from_ms: u64,
}

impl Sim {
    /// A mesh that is about to start.
    ///
    /// # Errors
    /// [`MessageError`] if the protocol does not take records of the length that is simulated.
    pub fn new(scenario: Scenario) -> Result<Self, MessageError> {
        let mut rng = StdRng::seed_from_u64(scenario.seed);
        let skew_ms = scenario.wall_skew_ms_max as i64;
        let drift_ppm = i64::from(scenario.drift_ppm_max);
        let mut queue = Queue::new();
        let mut nodes = Vec::new();
        for index in 0..scenario.nodes {
            let mut name = scenario.seed.to_le_bytes().to_vec();
            name.extend(index.to_le_bytes());
            nodes.push(Node {
                id: NodeId::from_bytes(*blake3::hash(&name).as_bytes()),
                clock: Clock {
                    offset_ms: rng.random_range(0..=1 << 40),
                    drift_ppm: rng.random_range(-drift_ppm..=drift_ppm),
                },
                wall_skew_ms: rng.random_range(-skew_ms..=skew_ms),
                liar: index >= scenario.nodes - scenario.liars.min(scenario.nodes),
                lives: 0,
                life: None,
                stored_sequence: 0,
                sent_bytes: 0,
                lived_ms: 0,
                began_ms: 0,
                ended_ms: 0,
                disconnected_ms: 0,
                valid_until_ms: 0,
            });
            if !scenario.settled {
                let delay_ms = rng.random_range(0..=scenario.starting_ms);
                queue.after(delay_ms, Happening { at: index, life: 0, event: Event::Start(index) });
            }
        }
        let mut sim = Sim {
            mesh: MeshId::public("simulated"),
            epoch: Instant::now(),
            queue,
            network: Network::new(scenario.network.clone(), scenario.seed),
            notary: Notary::new()?,
            by_id: nodes.iter().zip(0..).map(|(node, index)| (node.id, index)).collect(),
            nodes,
            hoard: Vec::new(),
            wanted: Vec::new(),
            report: Report::default(),
            counting_from_ms: 0,
            rng,
            scenario,
        };
        if sim.scenario.settled {
            sim.settle();
        }
        Ok(sim)
    }

    /// Simulated milliseconds since the beginning.
    pub fn now_ms(&self) -> u64 {
        self.queue.now_ms()
    }

    /// Lets `ms` milliseconds pass.
    pub fn run_for(&mut self, ms: u64) {
        let until_ms = self.queue.now_ms() + ms;
        while let Some(Happening { at, life, event }) = self.queue.next(until_ms) {
            if let Event::Start(index) = event {
                self.start(index);
            } else if self.nodes[at as usize].lives == life && self.nodes[at as usize].life.is_some() {
                self.happen(at, event);
            }
        }
        self.count_time();
    }

    /// What was counted so far.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// The nodes that run.
    pub fn alive(&self) -> impl Iterator<Item = Index> {
        self.nodes.iter().zip(0..).filter(|(node, _)| node.life.is_some()).map(|(_, index)| index)
    }

    /// Whether `observer` runs and lists `node`.
    pub fn lists(&self, observer: Index, node: Index) -> bool {
        let (observer, node) = (&self.nodes[observer as usize], &self.nodes[node as usize]);
        let now = observer.clock.at(self.queue.now_ms());
        observer.life.as_ref().is_some_and(|life| life.membership.get(&node.id, now).is_some())
    }

    /// Starts a node that does not run, with what it has on disk.
    pub fn start(&mut self, index: Index) {
        if self.nodes[index as usize].life.is_some() {
            return;
        }
        self.begin(index);
        self.renew(index);
    }

    /// Begins a life of a node, of which nobody has heard yet. Its first record is to have the number that is returned.
    fn begin(&mut self, index: Index) -> u64 {
        let now_ms = self.queue.now_ms();
        let contacts = self.contacts(index, CONTACTS);
        // As `iroh-gossip` makes one for a topic out of the node's.
        let overlay_rng = StdRng::from_rng(&mut StdRng::seed_from_u64(self.rng.random()));
        let count = self.nodes.len();
        let node = &mut self.nodes[index as usize];
        node.lives += 1;
        node.began_ms = now_ms;
        let wall_ms = (MORNING_UNIX_MS + now_ms).saturating_add_signed(node.wall_skew_ms);
        let first_sequence = wall_ms.max(node.stored_sequence + 1);
        let membership = Membership::new(node.id, self.mesh, first_sequence, self.scenario.membership.clone());
        node.life = Some(Life::new(index, membership, count, overlay_rng));
        self.command(index, Command::Join(contacts));
        let first_exchange_ms = self.rng.random_range(0..ROUND_MS);
        self.after(first_exchange_ms, index, Event::Exchange);
        self.after(HEAL_MS, index, Event::Heal);
        self.after(DISCOVER_MS, index, Event::Discover);
        self.after(TICK_MS, index, Event::Tick);
        if self.nodes[index as usize].liar {
            self.after(LIE_MS, index, Event::Lie);
        }
        first_sequence
    }

    /// Switches a node off.
    pub fn crash(&mut self, index: Index) {
        let lived_ms = self.lived_ms(&self.nodes[index as usize]);
        let disconnected_ms = self.queue.now_ms() + self.network.dead_connection_ms();
        let node = &mut self.nodes[index as usize];
        if node.life.take().is_some() {
            node.lived_ms = lived_ms;
            node.ended_ms = node.valid_until_ms;
            node.disconnected_ms = disconnected_ms;
        }
    }

    /// Lets a node say goodbye and end.
    pub fn leave(&mut self, index: Index) {
        let now_ms = self.queue.now_ms();
        let node = &mut self.nodes[index as usize];
        let Some(life) = &mut node.life else { return };
        let sequence = life.membership.leave(node.clock.at(now_ms));
        node.stored_sequence = sequence;
        let tombstone = notary::record(node.id, self.mesh, sequence, life.membership.ttl_ms(), true);
        let (verified, bytes) = self.notary.put_down(tombstone, true);
        let neighbours: Vec<Index> = life.overlay.neighbours().collect();
        self.command(index, Command::Broadcast(bytes, Scope::Swarm));
        for neighbour in neighbours {
            self.send_direct(index, neighbour, Direct::Records(vec![(Arc::clone(&verified), 0, true)]));
        }
        self.command(index, Command::Quit);
        self.crash(index);
        let node = &mut self.nodes[index as usize];
        (node.ended_ms, node.disconnected_ms) = (now_ms, now_ms);
    }

    /// Splits the network into groups, by number of node; or heals it with `None`.
    pub fn partition(&mut self, groups: Option<Vec<u32>>) {
        self.network.set_groups(groups);
    }

    fn happen(&mut self, at: Index, event: Event) {
        match event {
            Event::Start(_) => {}
            Event::Gossip { from, message } => {
                self.report.messages += 1;
                self.report.copies += u64::from(send::is_record(&message));
                self.connected(at, from, &message);
                self.overlay(at, InEvent::RecvMessage(from, message));
            }
            Event::Direct { from, message } => {
                self.report.messages += 1;
                self.hear_direct(at, from, message);
            }
            Event::GossipTimer(timer) => self.overlay(at, InEvent::TimerExpired(timer)),
            Event::ConnectionLost(peer) => {
                let Some(life) = &mut self.nodes[at as usize].life else { return };
                life.giving_up.retain(|known| *known != peer);
                self.overlay(at, InEvent::PeerDisconnected(peer));
            }
            Event::Tick => {
                self.tick(at);
                self.after(TICK_MS, at, Event::Tick);
            }
            Event::Exchange => {
                if let Some(other) = self.somebody_listed(at) {
                    self.compare(at, other);
                }
                let wait_ms = self.rng.random_range(ROUND_MS * 9 / 10..ROUND_MS * 11 / 10);
                self.after(wait_ms, at, Event::Exchange);
            }
            Event::Compare(other) => self.compare(at, other),
            Event::Heal => {
                self.heal(at);
                self.after(HEAL_MS, at, Event::Heal);
            }
            Event::Discover => {
                let found = self.contacts(at, 1).first().copied().filter(|found| !self.lists(at, *found));
                if let Some(found) = found {
                    self.compare(at, found);
                }
                self.after(DISCOVER_MS, at, Event::Discover);
            }
            Event::Lie => {
                self.lie(at);
                self.after(LIE_MS, at, Event::Lie);
            }
        }
    }

    fn tick(&mut self, at: Index) {
        let now_ms = self.queue.now_ms();
        let node = &mut self.nodes[at as usize];
        let now = node.clock.at(now_ms);
        let Some(life) = &mut node.life else { return };
        let expired = life.membership.expire(now);
        let due = life.membership.next_renewal().is_some_and(|due| due <= now);
        for gone in expired {
            self.dropped(at, gone);
        }
        if due {
            self.renew(at);
        }
    }

    /// Signs the own record anew and broadcasts it.
    fn renew(&mut self, at: Index) {
        let now_ms = self.queue.now_ms();
        let node = &mut self.nodes[at as usize];
        let Some(life) = &mut node.life else { return };
        let sequence = life.membership.renew(node.clock.at(now_ms));
        node.stored_sequence = sequence;
        let ttl_ms = life.membership.ttl_ms();
        node.valid_until_ms = now_ms + u64::from(ttl_ms);
        let record = notary::record(node.id, self.mesh, sequence, ttl_ms, false);
        let (verified, bytes) = self.notary.put_down(record, true);
        life.membership.set_own(Arc::clone(&verified));
        life.has_broadcast = true;
        if self.scenario.liars > 0 && self.rng.random_ratio(1, 8) {
            self.hoard.push(verified);
        }
        self.command(at, Command::Broadcast(bytes, Scope::Swarm));
    }

    fn command(&mut self, at: Index, command: Command<Index>) {
        self.report.joins += u64::from(matches!(command, Command::Join(_)));
        self.overlay(at, InEvent::Command(command));
    }

    /// Lets the overlay of a node take an event, and does what it wants done.
    fn overlay(&mut self, at: Index, event: InEvent<Index>) {
        let now = self.epoch + Duration::from_millis(self.queue.now_ms());
        let Some(life) = &mut self.nodes[at as usize].life else { return };
        let mut wanted = std::mem::take(&mut self.wanted);
        wanted.extend(life.gossip.handle(event, now));
        for out in wanted.drain(..) {
            match out {
                OutEvent::SendMessage(to, message) => self.send_gossip(at, to, message),
                OutEvent::EmitEvent(GossipEvent::Received(received)) => {
                    self.report.first_copies += 1;
                    self.hear_broadcast(at, received.delivered_from, &received.content);
                }
                OutEvent::EmitEvent(GossipEvent::NeighborUp(peer)) => self.neighbour_up(at, peer),
                OutEvent::EmitEvent(GossipEvent::NeighborDown(peer)) => {
                    if let Some(life) = &mut self.nodes[at as usize].life {
                        life.overlay.down(peer);
                    }
                }
                OutEvent::ScheduleTimer(delay, timer) => {
                    let delay_ms = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
                    self.after(delay_ms, at, Event::GossipTimer(timer));
                }
                OutEvent::DisconnectPeer(_) | OutEvent::PeerData(..) => {}
            }
        }
        self.wanted = wanted;
    }

    /// Who sends along the tree has a connection.
    fn connected(&mut self, at: Index, from: Index, message: &Message<Index>) {
        let now_ms = self.queue.now_ms();
        let node = &mut self.nodes[at as usize];
        if let (Some(life), Message::Gossip(_)) = (&mut node.life, message) {
            life.overlay.connected(from, node.clock.at(now_ms));
        }
    }

    /// Hangs up on strangers, and has the overlay join somebody, if there is a reason to.
    fn heal(&mut self, at: Index) {
        let now_ms = self.queue.now_ms();
        let node = &mut self.nodes[at as usize];
        let now = node.clock.at(now_ms);
        let Some(life) = &mut node.life else { return };
        for stranger in life.overlay.strangers(now) {
            self.overlay(at, InEvent::PeerDisconnected(stranger));
            self.hang_up(at, stranger);
        }
        let Some(life) = &mut self.nodes[at as usize].life else { return };
        // Discovery names nodes that are not listed yet, so one is known if any is there.
        let known = life.membership.len().max(1);
        match life.overlay.join(known, now) {
            Join::Nobody => {}
            Join::Peer(peer) => self.command(at, Command::Join(vec![peer])),
            Join::Any(count) => {
                let contacts = self.contacts(at, count);
                self.command(at, Command::Join(contacts));
            }
        }
    }

    fn neighbour_up(&mut self, at: Index, peer: Index) {
        let Some(life) = &mut self.nodes[at as usize].life else { return };
        self.report.new_neighbours += 1;
        if life.overlay.up(peer) && life.has_broadcast {
            life.membership.note_change();
        }
        let before = life.met.len() as u64;
        if life.met.insert(peer) {
            self.after(before.min(CONTACTS as u64) * NEXT_COMPARISON_MS, at, Event::Compare(peer));
        }
    }

    /// Somebody to compare with: any node on the list. Real nodes keep connections to some of those, and choose among them.
    fn somebody_listed(&mut self, at: Index) -> Option<Index> {
        let now_ms = self.queue.now_ms();
        (0..CHOICES_MAX).find_map(|_| {
            let other = self.rng.random_range(0..self.scenario.nodes);
            let node = &self.nodes[other as usize];
            let connected = node.life.is_some() || now_ms < node.disconnected_ms;
            (connected && self.lists(at, other)).then_some(other)
        })
    }

    /// Tells a neighbour what is known here; it answers with what is lacking.
    fn compare(&mut self, at: Index, neighbour: Index) {
        let now_ms = self.queue.now_ms();
        let node = &self.nodes[at as usize];
        let now = node.clock.at(now_ms);
        let Some(life) = &node.life else { return };
        let opening = match life.membership.opening(Some(self.rng.random()), now) {
            Opening::Digest(digest) => Direct::Digest(digest),
            Opening::Summary(summary) => Direct::Summary(summary),
        };
        self.send_direct(at, neighbour, opening);
    }

    fn hear_broadcast(&mut self, at: Index, from: Index, bytes: &[u8]) {
        let Some(entry) = self.notary.look_up(bytes) else { return };
        let (verified, genuine) = (Arc::clone(&entry.verified), entry.genuine);
        self.hear_record(at, from, &verified, 0, genuine);
    }

    /// Takes records that a peer has handed over, as the `net` crate does.
    fn take_handed(&mut self, at: Index, from: Index, records: Vec<(Arc<Verified>, u32, bool)>) {
        let mut outdated = Vec::new();
        for (verified, age_ms, genuine) in records {
            let record = verified.record();
            let outcome = self.hear_record(at, from, &verified, age_ms, genuine);
            let Some(life) = &mut self.nodes[at as usize].life else { return };
            match outcome {
                Some(Outcome::Newer) => life.overlay.handed_newer(from, age_ms.into()),
                Some(Outcome::Old) => outdated.push(record.node),
                // The overlay has lost it, or it would have been heard.
                Some(Outcome::Departed) => {
                    let bytes = self.notary.bytes(&verified);
                    self.command(at, Command::Broadcast(bytes, Scope::Swarm));
                }
                _ => {}
            }
        }
        let now_ms = self.queue.now_ms();
        let node = &self.nodes[at as usize];
        let Some(life) = &node.life else { return };
        let corrected = life.membership.wanted(&outdated, node.clock.at(now_ms));
        if !corrected.is_empty() {
            self.send_direct(at, from, handed(corrected));
        }
    }

    fn hear_direct(&mut self, at: Index, from: Index, message: Direct) {
        let now_ms = self.queue.now_ms();
        let node = &self.nodes[at as usize];
        let now = node.clock.at(now_ms);
        let Some(life) = &node.life else { return };
        let table = &life.membership;
        match message {
            Direct::Digest(digest) => {
                let answer = table.answer(&digest, now);
                self.send_answer(at, from, answer);
            }
            Direct::Summary(summary) => {
                let differing = Direct::Differing(table.differing(&summary, now), summary.ranges());
                self.send_direct(at, from, differing);
            }
            Direct::Differing(differing, ranges) => {
                let answer = table.answer_differing(&differing, ranges, now);
                self.send_answer(at, from, answer);
            }
            Direct::Want(nodes) => {
                let records = table.wanted(&nodes, now);
                self.send_direct(at, from, handed(records));
            }
            Direct::Records(records) => self.take_handed(at, from, records),
        }
    }

    fn send_answer(&mut self, at: Index, to: Index, answer: Answer) {
        if !answer.records.is_empty() {
            self.send_direct(at, to, handed(answer.records));
        }
        if !answer.want.is_empty() {
            self.send_direct(at, to, Direct::Want(answer.want));
        }
    }

    /// Gives a record to the table of a node; `None` if its signature is bad.
    fn hear_record(
        &mut self,
        at: Index,
        from: Index,
        verified: &Arc<Verified>,
        age_ms: u32,
        genuine: bool,
    ) -> Option<Outcome> {
        if !genuine {
            self.report.forgeries_refused += 1;
            return None;
        }
        let now_ms = self.queue.now_ms();
        let from_id = self.nodes[from as usize].id;
        let node = &mut self.nodes[at as usize];
        let now = node.clock.at(now_ms);
        let outcome = node.life.as_mut()?.membership.accept(verified, u64::from(age_ms), from_id, now);
        match &outcome {
            Outcome::New { displaced } => {
                self.listed(at, verified.record().node);
                for gone in displaced {
                    self.dropped(at, *gone);
                }
            }
            Outcome::Departed => self.dropped(at, verified.record().node),
            Outcome::Refused(Unwelcome::WrongMesh) => self.report.strangers_refused += 1,
            Outcome::Newer | Outcome::Known | Outcome::Old | Outcome::Overtaken | Outcome::Refused(_) => {}
        }
        Some(outcome)
    }

    /// Live nodes that discovery names: any.
    fn contacts(&mut self, of: Index, count: usize) -> Vec<Index> {
        let others: Vec<Index> =
            self.alive().filter(|index| *index != of && self.network.connects(of, *index)).collect();
        let mut contacts = Vec::new();
        for _ in 0..count.min(others.len()) {
            contacts.push(others[self.rng.random_range(0..others.len())]);
        }
        contacts.dedup();
        contacts
    }

    fn after(&mut self, delay_ms: u64, at: Index, event: Event) {
        let life = self.nodes[at as usize].lives;
        self.queue.after(delay_ms, Happening { at, life, event });
    }
}

fn handed(records: Vec<Aged>) -> Direct {
    Direct::Records(records.into_iter().map(|aged| (aged.verified, aged.age_ms, true)).collect())
}
