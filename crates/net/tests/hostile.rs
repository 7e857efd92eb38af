//! Peers that do not keep to the protocol. They speak QUIC like anybody, and then misbehave.

#![allow(clippy::unwrap_used, clippy::panic, reason = "these are tests, helpers included")]

mod common;

use std::time::{Duration, Instant};

use common::{Node, all_know_all, join, meet, open_invitation, public, soon, start};
use iroh::endpoint::{Connection, ConnectionError, RecvStream, presets};
use iroh::{Endpoint, EndpointAddr, EndpointId, RelayMode};
use murmur_net::Mesh;
use murmur_net::admission::STRIKES_MAX;
use murmur_net::endpoint::{GOSSIP_ALPN, MESH_ALPN, WORK_ALPN};
use murmur_net::hello::HELLO_DEADLINE_MS;
use murmur_net::serve::CONNECTIONS_PER_PEER_MAX;
use murmur_protocol::mesh::{
    AgedRecord, Capabilities, Control, Decoder, Hello, MeshId, NodeKey, NodeRecord, PROTOCOL_VERSIONS, RefusalCode,
    Role, SignedRecord, encode,
};

/// An endpoint without manners.
struct Rogue {
    endpoint: Endpoint,
    target: EndpointAddr,
}

impl Rogue {
    async fn against(node: &Node) -> Rogue {
        let endpoint = Endpoint::builder(presets::Minimal)
            .relay_mode(RelayMode::Disabled)
            .clear_ip_transports()
            .bind_addr("127.0.0.1:0")
            .unwrap()
            .bind()
            .await
            .unwrap();
        let contact = node.mesh.contact();
        let mut target = EndpointAddr::new(EndpointId::from_bytes(contact.node.as_bytes()).unwrap());
        for direct in contact.addresses.direct {
            target = target.with_ip_addr(direct);
        }
        Rogue { endpoint, target }
    }

    async fn connect(&self, alpn: &[u8]) -> Connection {
        soon("a connection", self.endpoint.connect(self.target.clone(), alpn)).await.unwrap()
    }

    fn hello(&self) -> Hello {
        Hello {
            versions: PROTOCOL_VERSIONS,
            software: "rogue/1".into(),
            capabilities: Capabilities::NONE,
            mesh: MeshId::public("test"),
            certificate: None,
            wall_clock_ms: 0,
        }
    }

    /// A connection whose greeting was proper.
    async fn greeted(&self, alpn: &[u8]) -> Connection {
        let connection = self.connect(alpn).await;
        let answer = say(&connection, &encode(&Control::Hello(self.hello())).unwrap()).await;
        assert!(matches!(answer.as_slice(), [Control::Hello(_)]), "{answer:?}");
        connection
    }
}

/// Sends bytes on a stream of their own, and gives what is answered until the end.
async fn say(connection: &Connection, bytes: &[u8]) -> Vec<Control> {
    let (mut send, recv) = connection.open_bi().await.unwrap();
    send.write_all(bytes).await.unwrap();
    let _ = send.finish();
    answers(recv).await
}

async fn answers(mut recv: RecvStream) -> Vec<Control> {
    let mut decoder = Decoder::<Control>::new();
    let mut messages = Vec::new();
    while let Ok(Some(chunk)) = soon("an answer", recv.read_chunk(1 << 16)).await {
        let mut rest: &[u8] = &chunk;
        while let Some(message) = decoder.next(&mut rest).unwrap() {
            messages.push(message);
        }
    }
    messages
}

async fn refused(connection: &Connection, bytes: &[u8]) -> RefusalCode {
    match say(connection, bytes).await.as_slice() {
        [Control::Refusal(refusal)] => refusal.code,
        other => panic!("not refused: {other:?}"),
    }
}

/// The node still lets others in.
async fn is_well(node: Node) {
    let nodes = meet(node, 2).await;
    all_know_all(&nodes).await;
}

#[tokio::test]
async fn garbage_and_lengths_without_bounds_are_refused_and_do_no_harm() {
    let node = start(public()).await;
    let rogue = Rogue::against(&node).await;
    let mut endless = u32::MAX.to_le_bytes().to_vec();
    endless.extend_from_slice(&1u16.to_le_bytes());
    for bytes in [vec![0xff; 4_000], endless, b"GET / HTTP/1.1\r\n\r\n".to_vec()] {
        for alpn in [MESH_ALPN, WORK_ALPN] {
            let connection = rogue.connect(alpn).await;
            assert_eq!(refused(&connection, &bytes).await, RefusalCode::BadMessage);
            soon("the end of the connection", connection.closed()).await;
        }
    }
    is_well(node).await;
}

#[tokio::test]
async fn a_message_at_the_wrong_moment_and_an_older_version_are_refused_with_the_reason() {
    let node = start(public()).await;
    let rogue = Rogue::against(&node).await;
    let ping = encode(&Control::Ping(1)).unwrap();
    assert_eq!(refused(&rogue.connect(MESH_ALPN).await, &ping).await, RefusalCode::BadMessage);
    let newer = Hello { versions: 900..=901, ..rogue.hello() };
    let newer = encode(&Control::Hello(newer)).unwrap();
    assert_eq!(refused(&rogue.connect(MESH_ALPN).await, &newer).await, RefusalCode::Version);
    let elsewhere = Hello { mesh: MeshId::public("elsewhere"), ..rogue.hello() };
    let elsewhere = encode(&Control::Hello(elsewhere)).unwrap();
    assert_eq!(refused(&rogue.connect(MESH_ALPN).await, &elsewhere).await, RefusalCode::WrongMesh);
}

#[tokio::test]
async fn silent_and_slow_peers_are_dropped_at_the_deadline() {
    let node = start(public()).await;
    let rogue = Rogue::against(&node).await;
    let begun = Instant::now();
    let silent = rogue.connect(MESH_ALPN).await;
    let slow = rogue.connect(MESH_ALPN).await;
    let (mut send, _recv) = slow.open_bi().await.unwrap();
    send.write_all(&[9, 0]).await.unwrap();
    soon("the silent one is dropped", silent.closed()).await;
    soon("the slow one is dropped", slow.closed()).await;
    assert!(begun.elapsed() >= Duration::from_millis(HELLO_DEADLINE_MS / 2));
    is_well(node).await;
}

#[tokio::test]
async fn the_overlay_is_closed_to_those_that_have_not_greeted() {
    let node = start(public()).await;
    let rogue = Rogue::against(&node).await;
    let connection = rogue.connect(GOSSIP_ALPN).await;
    let end = soon("the end of the connection", connection.closed()).await;
    assert!(matches!(end, ConnectionError::ApplicationClosed(_)), "{end}");
}

#[tokio::test]
async fn one_peer_cannot_take_all_connections() {
    let node = start(public()).await;
    let rogue = Rogue::against(&node).await;
    let mut held = Vec::new();
    for _ in 0..CONNECTIONS_PER_PEER_MAX {
        held.push(rogue.greeted(WORK_ALPN).await);
    }
    let connection = rogue.connect(WORK_ALPN).await;
    soon("the end of the connection", connection.closed()).await;
    assert!(held.iter().all(|connection| connection.close_reason().is_none()));
    is_well(node).await;
}

fn record(key: &NodeKey) -> SignedRecord {
    let record = NodeRecord {
        node: key.node_id(),
        mesh: MeshId::public("test"),
        sequence: 1,
        ttl_ms: 60_000,
        tombstone: false,
        role: Role::Worker,
        addresses: Default::default(),
        models: Vec::new(),
        software: "rogue/1".into(),
        capabilities: Capabilities::NONE,
        memory_free_bytes: 0,
        certificate: None,
    };
    record.sign(key).unwrap()
}

#[tokio::test]
async fn forged_records_are_not_listed_and_who_hands_them_over_is_shut_out() {
    let node = start(public()).await;
    let rogue = Rogue::against(&node).await;
    let connection = rogue.greeted(MESH_ALPN).await;
    let mut forged = record(&NodeKey::from_bytes(&[3; 32])).as_bytes().to_vec();
    let last = forged.len() - 1;
    forged[last] ^= 1;
    let forged = AgedRecord { age_ms: 0, record: SignedRecord::from_bytes(forged).unwrap() };
    let mut bytes = encode(&Control::Digest(Vec::new())).unwrap();
    bytes.extend(encode(&Control::Records(vec![forged; STRIKES_MAX as usize])).unwrap());
    say(&connection, &bytes).await;
    soon("the end of the connection", connection.closed()).await;
    // Shut out at the handshake from now on.
    let again = rogue.connect(MESH_ALPN).await;
    soon("the end of the connection", again.closed()).await;
    assert!(node.mesh.peers().is_empty());
    is_well(node).await;
}

#[tokio::test]
async fn nobody_says_goodbye_for_another() {
    let nodes = meet(start(public()).await, 2).await;
    let rogue = Rogue::against(&nodes[0]).await;
    let connection = rogue.greeted(MESH_ALPN).await;
    let own = NodeKey::from_bytes(&rogue.endpoint.secret_key().to_bytes());
    let other = nodes[1].mesh.watch().borrow().values().next().unwrap().verified.signed().clone();
    for goodbye in [other, record(&own)] {
        assert!(say(&connection, &encode(&Control::Goodbye(goodbye)).unwrap()).await.is_empty());
    }
    assert_eq!(nodes[0].mesh.peers().len(), 1);
}

#[tokio::test]
async fn a_record_of_a_third_node_is_taken_from_anybody_when_its_signature_is_good() {
    let node = start(public()).await;
    let rogue = Rogue::against(&node).await;
    let connection = rogue.greeted(MESH_ALPN).await;
    let third = NodeKey::from_bytes(&[3; 32]);
    let mut bytes = encode(&Control::Digest(Vec::new())).unwrap();
    bytes.extend(encode(&Control::Records(vec![AgedRecord { age_ms: 0, record: record(&third) }])).unwrap());
    say(&connection, &bytes).await;
    common::until(&node.mesh, "the third node", |table| common::lists(table, third.node_id())).await;
    let _joined = join(&node.mesh.invite(&open_invitation()).await.unwrap()).await;
}

#[tokio::test]
async fn copies_of_a_departed_nodes_record_bring_it_back_nowhere() {
    let folder = tempfile::tempdir().unwrap();
    let mut lasting = common::options(&folder, public());
    lasting.timing.ttl_ms = 60_000;
    let leaver = Node { mesh: Mesh::start(lasting).await.unwrap(), folder };
    let gone = leaver.mesh.node_id();
    let mut nodes = vec![start(public()).await];
    let ticket = nodes[0].mesh.invite(&open_invitation()).await.unwrap();
    leaver.mesh.join(&ticket).await.unwrap();
    let table = common::until(&nodes[0].mesh, "the leaver", |table| common::lists(table, gone)).await;
    let copy = AgedRecord { age_ms: 0, record: table[&gone].verified.signed().clone() };
    leaver.mesh.leave().await;
    common::until(&nodes[0].mesh, "the leaver is gone", |table| !common::lists(table, gone)).await;

    // One that saw it leave, and one that never heard of it and believes the copy until it compares with its neighbour.
    nodes.push(join(&ticket).await);
    for node in &nodes {
        let connection = Rogue::against(node).await.greeted(MESH_ALPN).await;
        let mut bytes = encode(&Control::Digest(Vec::new())).unwrap();
        bytes.extend(encode(&Control::Records(vec![copy.clone()])).unwrap());
        say(&connection, &bytes).await;
    }
    assert!(!common::lists(&nodes[0].mesh.watch().borrow(), gone));
    common::until(&nodes[1].mesh, "the copy is seen through", |table| !common::lists(table, gone)).await;
}
