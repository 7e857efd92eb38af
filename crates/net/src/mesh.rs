//! A node's place in a mesh: what the rest of the program holds.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::future::join_all;
use iroh::endpoint::{RecvStream, SendStream};
use murmur_core::membership::{
    Membership, MembershipOptions, RECORD_TTL_MS, RENEW_EVERY_MS, RENEWALS_PER_TTL, Verified,
};
use murmur_protocol::mesh::record::TTL_MS_MAX;
use murmur_protocol::mesh::{
    Admission as TicketAdmission, BearerSecret, Capabilities, Control, MeshId, NodeId, NodeRecord, PROTOCOL_VERSIONS,
    Revocation, SignedTicket, Ticket, TicketId,
};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::admission::{Admission, Gate, close};
use crate::beacon::Beacon;
use crate::contact::{Contact, node_id};
use crate::credentials::Credentials;
use crate::dialler::DIAL_DEADLINE_MS;
use crate::endpoint::{self, Bound, EndpointOptions, MESH_ALPN, causes};
use crate::identity::Identity;
use crate::links::{self, Flow, Link, Links, Path};
use crate::nostr::Publisher;
use crate::shared::Shared;
use crate::state::{COMMANDS_MAX, Command, LINKS_WANTED, Limits, OwnRecord, State, Table};
use crate::ticket::Invitation;
use crate::{NetError, clock, data_dir, gossip, hello, mdns, nostr, remembered, serve};

/// Work of others that waits to be taken, at most. What comes beyond is refused at once.
pub const WORK_QUEUE_MAX: usize = 256;

/// Within this time a stream for work is open, on a connection that stands.
pub const OPEN_DEADLINE_MS: u64 = 5_000;

/// How long a peer may leave unread what it has asked for.
pub const LEASE_MS: u32 = 60_000;

/// Control connections over which one ping is tried: of two that both ends have dialled at the same moment one is closed.
const PING_LINKS_MAX: usize = 3;

/// How long leaving waits for neighbours to take notice.
pub const LEAVE_DEADLINE_MS: u64 = 2_000;

/// File with the number of the last record that this node may have signed.
const SEQUENCE_FILE: &str = "sequence";

/// Which mesh, and by what right.
#[derive(Debug, Clone)]
pub enum MeshChoice {
    /// The public mesh of this name.
    Public(String),
    /// A private mesh of which this node is a member: see [`Credentials::load`] and [`Credentials::found`].
    Private(Credentials),
    /// The mesh of a ticket. A ticket for a private mesh is redeemed unless this node is a member already.
    Ticket(SignedTicket),
}

/// The times of a mesh. The defaults are what all nodes of a mesh should use; tests are in more of a hurry.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// How long a record counts, in milliseconds: a node that falls silent is gone after that. Longer in a mesh so large
    /// that records are renewed less often (`murmur_core::membership::RECORDS_PER_SECOND`).
    pub ttl_ms: u32,
    /// How often the own record is renewed, in milliseconds: at most a third of `ttl_ms`.
    pub renew_every_ms: u64,
    /// How often records are compared with some neighbour, in milliseconds.
    pub exchange_every_ms: u64,
    /// How often it is looked at whether the overlay has to join somebody, in milliseconds.
    pub heal_every_ms: u64,
    /// How long a peer may leave unread what it has asked for, in milliseconds. Kept by who does work for others.
    pub lease_ms: u32,
}

impl Default for Timing {
    fn default() -> Self {
        Timing {
            ttl_ms: RECORD_TTL_MS,
            renew_every_ms: RENEW_EVERY_MS,
            exchange_every_ms: 10_000,
            heal_every_ms: 15_000,
            lease_ms: LEASE_MS,
        }
    }
}

/// How to take part in a mesh.
#[derive(Debug, Clone)]
pub struct MeshOptions {
    /// Folder of keys, memberships and tickets. One running node each.
    pub data_dir: PathBuf,
    /// Which mesh.
    pub mesh: MeshChoice,
    /// Relays and sockets.
    pub endpoint: EndpointOptions,
    /// Whether to find and be found on the local network.
    pub mdns: bool,
    /// URLs of the Nostr relays on which to find and be found; none: not at all.
    pub nostr: Vec<String>,
    /// Nodes to begin with.
    pub bootstrap: Vec<Contact>,
    /// Name and version of the software, as others see it.
    pub software: String,
    /// What the node says about itself at first.
    pub own: OwnRecord,
    /// Times.
    pub timing: Timing,
    /// Control connections that are wanted: [`LINKS_WANTED`], and fewer where a small mesh is to be like a large one.
    pub links_wanted: usize,
    /// Versions of the protocol that the node speaks: [`PROTOCOL_VERSIONS`], and others where an older or newer node is to be met.
    pub versions: RangeInclusive<u32>,
}

impl MeshOptions {
    /// The defaults: public relays, no discovery beyond tickets.
    pub fn new(data_dir: impl Into<PathBuf>, mesh: MeshChoice) -> Self {
        MeshOptions {
            data_dir: data_dir.into(),
            mesh,
            endpoint: EndpointOptions::default(),
            mdns: false,
            nostr: Vec::new(),
            bootstrap: Vec::new(),
            software: concat!("murmur/", env!("CARGO_PKG_VERSION")).into(),
            own: OwnRecord::default(),
            timing: Timing::default(),
            links_wanted: LINKS_WANTED,
            versions: PROTOCOL_VERSIONS,
        }
    }
}

/// Another node of the mesh.
#[derive(Debug, Clone)]
pub struct PeerView {
    /// Its latest record.
    pub verified: Arc<Verified>,
    /// Round-trip time to it in milliseconds, as QUIC measures it, where there is a connection.
    pub rtt_ms: Option<f64>,
    /// What goes there over the connection for work, where there is one.
    pub flow: Option<Flow>,
    /// How packets to it travel.
    pub path: Path,
    /// Since when it is listed.
    pub since: Instant,
    /// How far its wall clock is ahead of ours in milliseconds, where there is a connection. For people.
    pub clock_ahead_ms: Option<i64>,
}

impl PeerView {
    /// What it says about itself.
    pub fn record(&self) -> &NodeRecord {
        self.verified.record()
    }
}

/// A request of another node: one stream, the greeting done.
#[derive(Debug)]
pub struct Work {
    /// Who asks.
    pub node: NodeId,
    /// To it.
    pub send: SendStream,
    /// From it.
    pub recv: RecvStream,
}

/// A running node of a mesh. Dropping it ends it without a word; [`Mesh::leave`] says goodbye.
#[derive(Debug)]
pub struct Mesh {
    shared: Arc<Shared>,
    table: watch::Receiver<Table>,
    work: tokio::sync::Mutex<mpsc::Receiver<Work>>,
    own: Mutex<OwnRecord>,
    left: watch::Sender<bool>,
    tasks: Mutex<JoinSet<()>>,
}

impl Mesh {
    /// Takes a node's place in a mesh.
    ///
    /// Returns as soon as the endpoint is bound and, with a ticket for a private mesh, the ticket redeemed; peers are
    /// found after that: see [`Mesh::watch`].
    ///
    /// # Errors [`NetError`]: options that cannot be honoured, damaged files, a refused ticket, an endpoint that cannot
    /// be bound.
    pub async fn start(options: MeshOptions) -> Result<Mesh, NetError> {
        check(&options)?;
        let relays = nostr::relay_urls(&options.nostr)?;
        let key = endpoint::node_key(&options.data_dir)?;
        let first_sequence = first_sequence(&options.data_dir)?;
        let (commands, command_queue) = mpsc::channel(COMMANDS_MAX);
        let admission = Arc::new(Admission::default());
        let gate = Gate { admission: Arc::clone(&admission), commands: commands.clone() };
        let bound = endpoint::bind(&options.data_dir, &key, &options.endpoint, gate).await?;
        let identity = match identify(&options, &bound, &key).await {
            Ok(identity) => Identity { versions: options.versions.clone(), ..identity },
            Err(error) => {
                bound.endpoint.close().await;
                return Err(error);
            }
        };

        let gossip = gossip::overlay(&bound.endpoint);
        let secret = identity.private.as_ref().map(|private| private.credentials.secret.clone());
        let (topic, topic_task) =
            gossip::subscribe(gossip.clone(), identity.mesh.topic(secret.as_ref()), commands.clone()).await?;
        let (work_sender, work) = mpsc::channel(WORK_QUEUE_MAX);
        let beacon = Beacon::new(identity.mesh, secret.as_ref());
        let publisher = match relays.is_empty() {
            true => None,
            false => Some(Publisher::new(&options.data_dir, key, beacon.clone())?),
        };
        let shared = Arc::new(Shared {
            identity,
            capabilities: options.own.capabilities.with(Capabilities::SUMMARIES),
            endpoint: bound.endpoint,
            addresses: bound.addresses,
            gossip,
            admission,
            links: Links::default(),
            workers: Mutex::default(),
            guests: Mutex::default(),
            work: work_sender,
            commands,
        });

        let own_addresses = watch::Sender::new(endpoint::own_contact(&shared.endpoint).addresses);
        let table = watch::Sender::new(Table::default());
        let table_watch = table.subscribe();
        let mut tasks = JoinSet::new();
        for relay in relays {
            if let Some(publisher) = publisher.clone() {
                tasks.spawn(publisher.serve(relay, own_addresses.subscribe(), shared.commands.clone()));
            }
        }
        let membership = Membership::new(
            shared.identity.node,
            shared.identity.mesh,
            first_sequence,
            MembershipOptions {
                renew_every_ms: options.timing.renew_every_ms,
                ttl_ms: options.timing.ttl_ms,
                ..MembershipOptions::default()
            },
        );
        let own = options.own.clone();
        let limits = Limits { timing: options.timing, links_wanted: options.links_wanted };
        let state = State::new(Arc::clone(&shared), membership, limits, own, topic, own_addresses, table);
        tasks.spawn(state.run(command_queue));
        tasks.spawn(topic_task);
        tasks.spawn(serve::accept(Arc::clone(&shared)));
        let remembered = remembered::recall(&options.data_dir, shared.identity.mesh);
        tasks.spawn(remembered::keep(options.data_dir.clone(), shared.identity.mesh, table_watch.clone()));
        if options.mdns {
            tasks.spawn(local_network(Arc::clone(&shared), beacon));
        }

        let mesh = Mesh {
            shared,
            table: table_watch,
            work: tokio::sync::Mutex::new(work),
            own: Mutex::new(options.own),
            left: watch::Sender::new(false),
            tasks: Mutex::new(tasks),
        };
        for contact in options.bootstrap {
            mesh.command(Command::Bootstrap(contact)).await?;
        }
        for contact in remembered {
            mesh.command(Command::Found(contact)).await?;
        }
        if let MeshChoice::Ticket(ticket) = &options.mesh {
            mesh.command(Command::Bootstrap(issuer(ticket.ticket()))).await?;
        }
        Ok(mesh)
    }

    /// This node.
    pub fn node_id(&self) -> NodeId {
        self.shared.identity.node
    }

    /// The mesh.
    pub fn mesh_id(&self) -> MeshId {
        self.shared.identity.mesh
    }

    /// The mesh's name, for people.
    pub fn mesh_name(&self) -> &str {
        &self.shared.identity.mesh_name
    }

    /// Whether the mesh is private.
    pub fn is_private(&self) -> bool {
        self.shared.identity.private.is_some()
    }

    /// How this node can be reached now, as far as it knows itself.
    pub fn contact(&self) -> Contact {
        endpoint::own_contact(&self.shared.endpoint)
    }

    /// The other nodes, by id.
    pub fn peers(&self) -> Vec<PeerView> {
        let table = Arc::clone(&self.table.borrow());
        let workers = self.workers();
        let view = |(node, known): (&NodeId, &crate::state::Known)| {
            let (link, worker) = (self.shared.links.get(node), workers.get(node));
            let connection = link.as_ref().map(|link| &link.connection).or(worker);
            let (rtt_ms, path) = connection.map_or((None, Path::Unknown), links::path);
            PeerView {
                verified: Arc::clone(&known.verified),
                rtt_ms,
                flow: worker.and_then(links::flow),
                path,
                since: known.since,
                clock_ahead_ms: link.map(|link| link.greeted.clock_ahead_ms),
            }
        };
        table.iter().map(view).collect()
    }

    /// Round trip to a node as QUIC has it now: the longest one of the connections with it, since what fills one of them holds up the
    /// others as well. `None`: there is no connection.
    pub fn round_trip(&self, node: NodeId) -> Option<Duration> {
        self.shared.round_trip(&node)
    }

    /// The table of the other nodes as it changes. Connections and their round-trip times are in [`Mesh::peers`] only.
    pub fn watch(&self) -> watch::Receiver<Table> {
        self.table.clone()
    }

    /// Changes what this node says about itself. Others hear of it within about a second.
    ///
    /// # Errors
    /// [`NetError::Closed`] after [`Mesh::leave`].
    pub async fn update(&self, change: impl FnOnce(&mut OwnRecord)) -> Result<(), NetError> {
        let own = {
            let mut own = self.own.lock().unwrap_or_else(PoisonError::into_inner);
            change(&mut own);
            own.clone()
        };
        self.command(Command::Update(own)).await
    }

    /// Opens a stream for one request to another node, over the connection that stands or a new one. Whoever works for this node is to
    /// give signs of life as well: with a new connection for work comes one for control, if there is none.
    ///
    /// # Errors
    /// [`NetError::Unreachable`], [`NetError::Refused`], [`NetError::Late`]: try another node.
    pub async fn open_work(&self, node: NodeId) -> Result<(SendStream, RecvStream), NetError> {
        let standing = self.workers().get(&node).filter(|connection| connection.close_reason().is_none()).cloned();
        let connection = match standing {
            Some(connection) => connection,
            None => {
                let connection = self.shared.ask(|reply| Command::Work { node, reply }).await??;
                let mut workers = self.workers();
                workers.retain(|_, standing| standing.close_reason().is_none());
                workers.insert(node, connection.clone());
                connection
            }
        };
        timeout(Duration::from_millis(OPEN_DEADLINE_MS), connection.open_bi())
            .await
            .map_err(|_| NetError::Late("stream for work"))?
            .map_err(|error| NetError::unreachable(node, error))
    }

    /// Asks another node for a sign of life, and says how long it took.
    ///
    /// # Errors
    /// [`NetError::Unreachable`], [`NetError::Refused`], [`NetError::Late`].
    pub async fn ping(&self, node: NodeId) -> Result<Duration, NetError> {
        let mut links_left = PING_LINKS_MAX;
        loop {
            let link = self.link(node).await?;
            let (nonce, asked) = (rand::random(), Instant::now());
            links_left -= 1;
            match serve::ask(&link, &Control::Ping(nonce)).await {
                Ok(Some(Control::Pong(answer))) if answer == nonce => return Ok(asked.elapsed()),
                Ok(_) => return Err(NetError::protocol("a ping was answered with something else")),
                // It gave way to another one.
                Err(_) if links_left > 0 && links::is_duplicate(&link.connection) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// The control connection to a node, which is dialled if there is none.
    async fn link(&self, node: NodeId) -> Result<Arc<Link>, NetError> {
        if let Some(link) = self.shared.links.get(&node) {
            return Ok(link);
        }
        self.shared.ask(|reply| Command::Link { node, reply }).await??;
        self.shared.links.get(&node).ok_or_else(|| NetError::unreachable(node, "it hung up"))
    }

    /// The next request of another node; `None` once the mesh has been left. May be called from several tasks.
    pub async fn accept_work(&self) -> Option<Work> {
        let mut left = self.left.subscribe();
        tokio::select! {
            biased;
            _ = left.wait_for(|left| *left) => None,
            // The lock is the queue of those that wait, and guards nothing else.
            work = async { self.work.lock().await.recv().await } => work,
        }
    }

    /// Makes a ticket that leads others here.
    ///
    /// # Errors [`NetError::NotOwner`] on a node of a private mesh that does not hold its key. [`NetError::Ticket`] if
    /// a limit of uses is asked of a public mesh, where nobody counts them, or if the ticket cannot be signed.
    pub async fn invite(&self, invitation: &Invitation) -> Result<SignedTicket, NetError> {
        let identity = &self.shared.identity;
        let id = TicketId::from_bytes(rand::random());
        let expires_ms = clock::unix_ms().saturating_add(invitation.valid_ms);
        let admission = match &identity.private {
            None if invitation.uses.is_some() => {
                return Err(NetError::Ticket(
                    "nobody counts who comes into a public mesh; leave the number of uses out".into(),
                ));
            }
            None => TicketAdmission::Public,
            Some(private) => {
                if private.credentials.owner.is_none() {
                    return Err(NetError::NotOwner(identity.mesh));
                }
                let secret = BearerSecret::from_bytes(rand::random());
                private.tickets.issue(id, &secret, invitation, expires_ms)?;
                TicketAdmission::Private { secret, uses: invitation.uses }
            }
        };
        let ticket = Ticket {
            id,
            mesh: identity.mesh,
            mesh_name: identity.mesh_name.clone(),
            issuer: identity.node,
            addresses: self.contact().addresses,
            role: invitation.role,
            expires_ms,
            admission,
        };
        ticket.sign(&identity.key).map_err(|error| NetError::Ticket(error.to_string()))
    }

    /// Looks for peers at the issuer of a ticket for this very mesh.
    ///
    /// # Errors
    /// [`NetError::Ticket`] if it leads into another mesh or has expired.
    pub async fn join(&self, ticket: &SignedTicket) -> Result<(), NetError> {
        let ticket = ticket.ticket();
        ticket.check_expiry(clock::unix_ms()).map_err(|error| NetError::Ticket(error.to_string()))?;
        if ticket.mesh != self.mesh_id() {
            return Err(NetError::Ticket(format!("it leads into mesh {}, not into this one", ticket.mesh_name)));
        }
        self.command(Command::Bootstrap(issuer(ticket))).await
    }

    /// Revokes a ticket of this node: nobody comes in with it any more; who is in stays. False if there is no such
    /// ticket.
    ///
    /// # Errors
    /// [`NetError::Ticket`] in a public mesh, [`NetError::File`].
    pub fn revoke_ticket(&self, ticket: TicketId) -> Result<bool, NetError> {
        let Some(private) = &self.shared.identity.private else {
            return Err(NetError::Ticket(
                "tickets of a public mesh cannot be revoked: they hold nothing but addresses".into(),
            ));
        };
        private.tickets.revoke(ticket)
    }

    /// Ends a membership, everywhere and for ever. False if it was ended before.
    ///
    /// # Errors
    /// [`NetError::NotOwner`] unless this node holds the mesh's key; [`NetError::File`].
    pub async fn revoke(&self, revocation: Revocation) -> Result<bool, NetError> {
        let identity = &self.shared.identity;
        let not_owner = || NetError::NotOwner(identity.mesh);
        let private = identity.private.as_ref().ok_or_else(not_owner)?;
        let owner = private.credentials.owner.as_ref().ok_or_else(not_owner)?;
        let added = private.revocations.add(revocation, owner)?;
        self.command(Command::Revoked).await?;
        Ok(added)
    }

    /// Says goodbye to everybody, and ends.
    pub async fn leave(&self) {
        let deadline = Duration::from_millis(LEAVE_DEADLINE_MS);
        let farewell = async {
            let tombstone = self.shared.ask(|reply| Command::Leave { reply }).await.ok().flatten();
            if let Some(tombstone) = tombstone {
                let goodbye = Control::Goodbye(tombstone);
                let links = self.shared.links.all();
                join_all(links.iter().map(|link| serve::tell(link, &goodbye))).await;
            }
        };
        // Who does not take notice in time finds the tombstone with others, or the record expires.
        let _ = timeout(deadline, farewell).await;
        let _ = timeout(deadline, self.shared.gossip.shutdown()).await;
        for link in self.shared.links.all() {
            link.connection.close(close::LEAVING, b"leaving");
        }
        let mut tasks = std::mem::take(&mut *self.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        tasks.shutdown().await;
        self.left.send_replace(true);
        self.shared.endpoint.close().await;
    }

    fn workers(&self) -> std::sync::MutexGuard<'_, std::collections::HashMap<NodeId, iroh::endpoint::Connection>> {
        self.shared.workers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn command(&self, command: Command) -> Result<(), NetError> {
        self.shared.commands.send(command).await.map_err(|_| NetError::Closed)
    }
}

fn check(options: &MeshOptions) -> Result<(), NetError> {
    let (timing, versions) = (&options.timing, &options.versions);
    if versions.is_empty() {
        let reason = format!("none is from {} to {}", versions.start(), versions.end());
        return Err(NetError::Option { what: "versions of the protocol", reason });
    }
    if !(1..=TTL_MS_MAX).contains(&timing.ttl_ms) || timing.renew_every_ms > u64::from(timing.ttl_ms) / RENEWALS_PER_TTL
    {
        let reason =
            format!("records count for at most {TTL_MS_MAX} ms and are renewed at least three times within that");
        return Err(NetError::Option { what: "times of records", reason });
    }
    Ok(())
}

/// What the own records are numbered from. The number on disk is one that no earlier life can have reached.
fn first_sequence(data_dir: &std::path::Path) -> Result<u64, NetError> {
    let path = data_dir.join(SEQUENCE_FILE);
    let stored: u64 = data_dir::read_json(&path)?.unwrap_or(0);
    let first = clock::unix_ms().max(stored);
    data_dir::replace_json(&path, &first.saturating_add(SEQUENCES_PER_LIFE))?;
    Ok(first)
}

/// Records that one life of a node may sign: one per second for three years. A clock that was set back is thereby no
/// matter.
const SEQUENCES_PER_LIFE: u64 = 100_000_000;

async fn identify(
    options: &MeshOptions,
    bound: &Bound,
    key: &murmur_protocol::mesh::NodeKey,
) -> Result<Identity, NetError> {
    let private = |credentials| Identity::private(key.clone(), credentials, &options.software, &options.data_dir);
    match &options.mesh {
        MeshChoice::Public(name) => Ok(Identity::public(key.clone(), name, &options.software)),
        MeshChoice::Private(credentials) => private(credentials.clone()),
        MeshChoice::Ticket(signed) => {
            let ticket = signed.ticket();
            if !ticket.is_private() {
                ticket.check_expiry(clock::unix_ms()).map_err(|error| NetError::Ticket(error.to_string()))?;
                return Ok(Identity::public(key.clone(), &ticket.mesh_name, &options.software));
            }
            if let Some(credentials) = Credentials::load(&options.data_dir, &ticket.mesh)? {
                return private(credentials);
            }
            private(redeem(options, bound, ticket, key.node_id()).await?)
        }
    }
}

async fn redeem(options: &MeshOptions, bound: &Bound, ticket: &Ticket, node: NodeId) -> Result<Credentials, NetError> {
    let target = issuer(ticket).to_endpoint_addr()?;
    let unreachable = |why: String| {
        let advice = format!(
            "it has issued the ticket and alone can let this node into mesh {}. See that murmur runs there with that mesh, and \
             try again; if its address has changed since, ask for a new ticket",
            ticket.mesh_name
        );
        NetError::unreachable(ticket.issuer, format!("{why}; {advice}"))
    };
    let connection = timeout(Duration::from_millis(DIAL_DEADLINE_MS), bound.endpoint.connect(target, MESH_ALPN))
        .await
        .map_err(|_| unreachable("it does not answer".into()))?
        .map_err(|error| unreachable(causes(&error)))?;
    debug_assert_eq!(node_id(connection.remote_id()), ticket.issuer);
    let redeemed = hello::redeem(&connection, ticket, &options.versions).await?;
    redeemed.certificate.verify(ticket.mesh, node, clock::unix_ms()).map_err(NetError::protocol)?;
    let credentials = Credentials {
        mesh: ticket.mesh,
        name: redeemed.mesh_name,
        certificate: redeemed.certificate,
        secret: redeemed.mesh_secret,
        owner: None,
    };
    credentials.store(&options.data_dir)?;
    Ok(credentials)
}

fn issuer(ticket: &Ticket) -> Contact {
    Contact { node: ticket.issuer, addresses: ticket.addresses.clone() }
}

async fn local_network(shared: Arc<Shared>, beacon: Beacon) {
    use futures::StreamExt;
    let mut found = match mdns::discover(&shared.endpoint, &beacon).await {
        Ok(found) => found,
        Err(error) => {
            tracing::warn!(%error, "no discovery on the local network");
            return;
        }
    };
    while let Some(contact) = found.next().await {
        if shared.commands.send(Command::Found(contact)).await.is_err() {
            return;
        }
    }
}
