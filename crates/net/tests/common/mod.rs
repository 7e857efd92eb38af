//! Nodes on loopback for tests: real sockets, quick times, and waiting for what is watched instead of sleeping.

#![allow(dead_code, reason = "each test file uses another part")]

use std::future::Future;
use std::time::Duration;

use murmur_net::mesh::LEASE_MS;
use murmur_net::{
    EndpointOptions, Invitation, Mesh, MeshChoice, MeshOptions, NetError, OwnRecord, Path, PeerView, Relays, Table,
    Timing,
};
use murmur_protocol::mesh::{NodeId, Role, SignedTicket};
use tempfile::TempDir;

/// Nothing here takes longer, however busy the machine is.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Times that let a test see an expiry.
pub(crate) const QUICK: Timing =
    Timing { ttl_ms: 3_000, renew_every_ms: 900, exchange_every_ms: 500, heal_every_ms: 1_000, lease_ms: LEASE_MS };

/// A running node with its data folder.
pub(crate) struct Node {
    pub(crate) mesh: Mesh,
    pub(crate) folder: TempDir,
}

/// Options of a node on loopback without any discovery.
pub(crate) fn options(folder: &TempDir, mesh: MeshChoice) -> MeshOptions {
    MeshOptions {
        endpoint: EndpointOptions { relays: Relays::None, bind: Some("127.0.0.1:0".parse().unwrap()), dht: None },
        timing: QUICK,
        own: OwnRecord { role: Role::Worker, ..OwnRecord::default() },
        ..MeshOptions::new(folder.path(), mesh)
    }
}

pub(crate) fn public() -> MeshChoice {
    MeshChoice::Public("test".into())
}

/// Starts a node of `mesh`.
pub(crate) async fn start(mesh: MeshChoice) -> Node {
    let folder = tempfile::tempdir().unwrap();
    let mesh = Mesh::start(options(&folder, mesh)).await.unwrap();
    Node { mesh, folder }
}

/// Starts a node with a ticket.
pub(crate) async fn try_join(ticket: &SignedTicket) -> Result<Node, NetError> {
    let folder = tempfile::tempdir().unwrap();
    let mesh = Mesh::start(options(&folder, MeshChoice::Ticket(ticket.clone()))).await?;
    Ok(Node { mesh, folder })
}

pub(crate) async fn join(ticket: &SignedTicket) -> Node {
    try_join(ticket).await.unwrap()
}

/// A ticket of any number of uses.
pub(crate) fn open_invitation() -> Invitation {
    Invitation { uses: None, ..Invitation::default() }
}

/// A mesh of `count` nodes that came in by tickets of the first.
pub(crate) async fn meet(first: Node, count: usize) -> Vec<Node> {
    let ticket = first.mesh.invite(&open_invitation()).await.unwrap();
    let mut nodes = vec![first];
    for _ in 1..count {
        nodes.push(join(&ticket).await);
    }
    all_know_all(&nodes).await;
    nodes
}

/// Waits until every node lists all others.
pub(crate) async fn all_know_all(nodes: &[Node]) {
    for node in nodes {
        until(&node.mesh, "everybody is listed", |table| table.len() == nodes.len() - 1).await;
    }
}

/// Waits until the table of `mesh` is as wanted.
pub(crate) async fn until(mesh: &Mesh, what: &str, wanted: impl FnMut(&Table) -> bool) -> Table {
    let mut watch = mesh.watch();
    match tokio::time::timeout(PATIENCE, watch.wait_for(wanted)).await {
        Ok(table) => table.unwrap().clone(),
        Err(_) => panic!("{}: never came true: {what}; it lists {:?}", mesh.node_id().short(), listed(mesh)),
    }
}

/// Waits for anything, but not for ever.
pub(crate) async fn soon<T>(what: &str, event: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, event).await {
        Ok(value) => value,
        Err(_) => panic!("never happened: {what}"),
    }
}

/// The peers, once the path of each is known. Nothing tells when that is, so this asks again and again.
pub(crate) async fn with_paths(mesh: &Mesh) -> Vec<PeerView> {
    let known = async {
        loop {
            let peers = mesh.peers();
            if !peers.is_empty() && peers.iter().all(|peer| peer.path != Path::Unknown) {
                return peers;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    soon("the paths are known", known).await
}

pub(crate) fn listed(mesh: &Mesh) -> Vec<String> {
    mesh.peers().iter().map(|peer| peer.record().node.short()).collect()
}

pub(crate) fn lists(table: &Table, node: NodeId) -> bool {
    table.contains_key(&node)
}
