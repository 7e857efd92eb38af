//! Peers that do not keep to the protocol. They speak QUIC like anybody, and then misbehave.

#![allow(clippy::unwrap_used, clippy::panic, reason = "these are tests, helpers included")]

mod common;

use std::{
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use common::{Node, all_know_all, join, meet, open_invitation, public, soon, start};
use iroh::address_lookup::memory::MemoryLookup;
use iroh::endpoint::{Connection, ConnectionError, RecvStream, presets};
use iroh::{Endpoint, EndpointAddr, EndpointId, RelayMode};
use iroh_gossip::net::Gossip;
use murmur_core::membership::DIGEST_NODES_MAX;
use murmur_net::Mesh;
use murmur_net::admission::STRIKES_MAX;
use murmur_net::endpoint::{GOSSIP_ALPN, MESH_ALPN, STREAM_WINDOW_BYTES, WORK_ALPN, WORK_WINDOW_BYTES};
use murmur_net::hello::HELLO_DEADLINE_MS;
use murmur_net::serve::{CONNECTIONS_PER_PEER_MAX, GREETINGS_PER_SOURCE_MAX, STREAM_DEADLINE_MS};
use murmur_protocol::mesh::summary::RANGES_MAX;
use murmur_protocol::mesh::{
    AgedRecord, BearerSecret, Capabilities, Control, Decoder, Differing, Hello, MeshId, Message, NodeId, NodeKey,
    NodeRecord, PROTOCOL_VERSIONS, Redeem, RefusalCode, Role, SignedRecord, TicketId, Work, encode,
};
use tokio::sync::oneshot;

/// An endpoint without manners.
struct Rogue {
    endpoint: Endpoint,
    target: EndpointAddr,
}

impl Rogue {
    async fn against(node: &Node) -> Rogue {
        Rogue::with_key(iroh::SecretKey::generate(), node.mesh.contact()).await
    }

    async fn with_key(secret: iroh::SecretKey, contact: murmur_net::Contact) -> Rogue {
        Rogue::bound_to("127.0.0.1:0", secret, contact).await
    }

    async fn bound_to(address: &str, secret: iroh::SecretKey, contact: murmur_net::Contact) -> Rogue {
        let addresses = MemoryLookup::new();
        let endpoint = Endpoint::builder(presets::Minimal)
            .relay_mode(RelayMode::Disabled)
            .clear_ip_transports()
            .bind_addr(address)
            .unwrap()
            .secret_key(secret)
            .address_lookup(addresses.clone())
            .bind()
            .await
            .unwrap();
        let mut target = EndpointAddr::new(EndpointId::from_bytes(contact.node.as_bytes()).unwrap());
        for direct in contact.addresses.direct {
            target = target.with_ip_addr(direct);
        }
        addresses.set_endpoint_info(target.clone());
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

fn unsigned(key: &NodeKey) -> NodeRecord {
    NodeRecord {
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
        stages: Vec::new(),
        links: Vec::new(),
        machine: None,
        contents: Vec::new(),
        region: String::new(),
    }
}

fn record(key: &NodeKey) -> SignedRecord {
    unsigned(key).sign(key).unwrap()
}

fn key(number: u8) -> NodeKey {
    NodeKey::from_bytes(&[number; 32])
}

/// Hands records over in an exchange that the rogue begins; gives what the node says.
async fn hand_over(connection: &Connection, digest: &[(NodeId, u64)], records: Vec<AgedRecord>) -> Vec<Control> {
    let mut bytes = encode(&Control::Digest(digest.to_vec())).unwrap();
    for part in records.chunks(murmur_protocol::mesh::control::RECORDS_MAX) {
        bytes.extend(encode(&Control::Records(part.to_vec())).unwrap());
    }
    say(connection, &bytes).await
}

fn fresh(record: SignedRecord) -> AgedRecord {
    AgedRecord { age_ms: 0, record }
}

/// The node answers on this connection.
async fn answers_pings(connection: &Connection) {
    assert_eq!(say(connection, &encode(&Control::Ping(7)).unwrap()).await, [Control::Pong(7)]);
}

/// Commits an offence so often that the node shuts the peer out, and not earlier.
async fn is_shut_out_for(node: &Node, bytes: &[u8]) {
    let rogue = Rogue::against(node).await;
    let connection = rogue.greeted(MESH_ALPN).await;
    for _ in 1..STRIKES_MAX {
        say(&connection, bytes).await;
    }
    answers_pings(&connection).await;
    // The last one may cut its own stream short. Who does not wait for the answer has done nothing wrong by that.
    let stream = connection.open_bi().await;
    if let Ok((mut send, recv)) = stream {
        let _ = send.write_all(bytes).await;
        let _ = send.finish();
        soon("the end of the connection", connection.closed()).await;
        drop(recv);
    }
    soon("the end of the connection", connection.closed()).await;
}

#[tokio::test]
async fn oversized_messages_are_refused_by_their_headers_alone() {
    let node = start(public()).await;
    let kind = Control::Records(Vec::new()).kind();
    let length = u32::try_from(Control::body_bytes_max(kind) + 1).unwrap();
    let header = [length.to_le_bytes().as_slice(), &kind.to_le_bytes()].concat();
    is_shut_out_for(&node, &header).await;
    is_well(node).await;
}

#[tokio::test]
async fn truncated_messages_are_offences_and_do_no_harm() {
    let node = start(public()).await;
    let whole = encode(&Control::Records(vec![fresh(record(&key(3)))])).unwrap();
    is_shut_out_for(&node, &whole[..whole.len() / 2]).await;
    is_shut_out_for(&node, &whole[..3]).await;
    assert!(node.mesh.peers().is_empty());
    is_well(node).await;
}

#[tokio::test]
async fn messages_of_another_protocol_or_moment_are_offences() {
    let node = start(public()).await;
    let rogue = Rogue::against(&node).await;
    let redeem = Redeem {
        versions: PROTOCOL_VERSIONS,
        mesh: MeshId::public("test"),
        ticket: TicketId::from_bytes([1; 16]),
        secret: BearerSecret::from_bytes([1; 16]),
    };
    let mut want_first = encode(&Control::Digest(Vec::new())).unwrap();
    want_first.extend(encode(&Control::Ping(1)).unwrap());
    let confused = [
        encode(&Control::Hello(rogue.hello())).unwrap(),
        encode(&Control::Redeem(redeem)).unwrap(),
        encode(&Control::Pong(1)).unwrap(),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        want_first,
    ];
    for bytes in confused {
        is_shut_out_for(&node, &bytes).await;
    }
    // What neither side knows yet is no offence: it is how newer versions speak.
    let connection = rogue.greeted(MESH_ALPN).await;
    for _ in 0..2 * STRIKES_MAX {
        say(&connection, &encode(&Work::Unknown { kind: 999 }).unwrap()).await;
    }
    answers_pings(&connection).await;
    is_well(node).await;
}

#[tokio::test]
async fn who_hangs_up_before_its_answer_is_slow_and_no_offender() {
    let nodes = meet(start(public()).await, 2).await;
    let rogue = Rogue::against(&nodes[0]).await;
    let connection = rogue.greeted(MESH_ALPN).await;
    for _ in 0..2 * STRIKES_MAX {
        let (mut send, mut recv) = connection.open_bi().await.unwrap();
        recv.stop(0u32.into()).unwrap();
        send.write_all(&encode(&Control::Digest(Vec::new())).unwrap()).await.unwrap();
        let _ = send.finish();
        // It has dealt with it when it has nothing more to read there.
        let _ = soon("the end of the stream", send.stopped()).await;
    }
    answers_pings(&connection).await;
}

#[tokio::test]
async fn records_of_another_mesh_are_not_listed_and_who_hands_them_over_is_shut_out() {
    let node = start(public()).await;
    let elsewhere = NodeRecord { mesh: MeshId::public("elsewhere"), ..unsigned(&key(3)) }.sign(&key(3)).unwrap();
    let rogue = Rogue::against(&node).await;
    let connection = rogue.greeted(MESH_ALPN).await;
    hand_over(&connection, &[], vec![fresh(elsewhere); STRIKES_MAX as usize]).await;
    soon("the end of the connection", connection.closed()).await;
    assert!(node.mesh.peers().is_empty());
    is_well(node).await;
}

#[tokio::test]
async fn a_replayed_goodbye_does_not_end_a_node_that_is_back() {
    let mut nodes = meet(start(public()).await, 2).await;
    let leaver = nodes.pop().unwrap();
    let (id, folder) = (leaver.mesh.node_id(), leaver.folder);
    leaver.mesh.leave().await;
    common::until(&nodes[0].mesh, "the leaver is gone", |table| !common::lists(table, id)).await;
    let rogue = Rogue::against(&nodes[0]).await;
    let connection = rogue.greeted(MESH_ALPN).await;
    // Whoever still lists it is told its last word.
    let told = hand_over(&connection, &[(id, 1)], Vec::new()).await;
    let [Control::Records(last_word), Control::Want(_)] = told.as_slice() else { panic!("{told:?}") };
    let goodbye = last_word.iter().find(|aged| aged.record.claim().unwrap().node == id).unwrap().record.clone();

    let mut again = common::options(&folder, public());
    again.bootstrap = vec![nodes[0].mesh.contact()];
    nodes.push(Node { mesh: Mesh::start(again).await.unwrap(), folder });
    common::until(&nodes[0].mesh, "the leaver is back", |table| common::lists(table, id)).await;
    hand_over(&connection, &[], vec![fresh(goodbye.clone()); 100]).await;
    assert!(say(&connection, &encode(&Control::Goodbye(goodbye)).unwrap()).await.is_empty());
    all_know_all(&nodes).await;
}

#[tokio::test]
async fn dates_and_numbers_of_the_future_give_nobody_power_over_others() {
    let nodes = meet(start(public()).await, 2).await;
    let rogue = Rogue::against(&nodes[0]).await;
    let victim = nodes[1].mesh.node_id();
    let connection = rogue.connect(MESH_ALPN).await;
    let hello = Control::Hello(Hello { wall_clock_ms: u64::MAX, ..rogue.hello() });
    assert!(matches!(say(&connection, &encode(&hello).unwrap()).await.as_slice(), [Control::Hello(_)]));

    // Whoever claims the last number of another is asked for what that one has signed, and has nothing.
    let said = hand_over(&connection, &[(victim, u64::MAX)], Vec::new()).await;
    assert!(matches!(said.last(), Some(Control::Want(nodes)) if nodes.contains(&victim)), "{said:?}");
    // Its own last number takes nothing but its own next word.
    let own = NodeKey::from_bytes(&rogue.endpoint.secret_key().to_bytes());
    let last = NodeRecord { sequence: u64::MAX, ..unsigned(&own) }.sign(&own).unwrap();
    let too_old = AgedRecord { age_ms: u32::MAX, record: record(&key(3)) };
    hand_over(&connection, &[], vec![fresh(last), too_old]).await;
    common::until(&nodes[0].mesh, "the rogue", |table| common::lists(table, own.node_id())).await;
    assert!(!common::lists(&nodes[0].mesh.watch().borrow(), key(3).node_id()));
    // The victim is heard as before.
    nodes[1].mesh.update(|own| own.memory_free_bytes = 9).await.unwrap();
    let said = |table: &murmur_net::Table| {
        table.get(&victim).is_some_and(|known| known.verified.record().memory_free_bytes == 9)
    };
    common::until(&nodes[0].mesh, "the news", said).await;
}

#[tokio::test]
async fn a_flood_of_streams_is_answered_in_turn_and_others_are_let_in_meanwhile() {
    let node = start(public()).await;
    let rogue = Rogue::against(&node).await;
    let connection = rogue.greeted(MESH_ALPN).await;
    let ping = encode(&Control::Ping(7)).unwrap();
    let flood = async {
        for _ in 0..20 {
            let pings = (0..200).map(|_| say(&connection, &ping));
            let pongs = futures::future::join_all(pings).await;
            assert!(pongs.iter().all(|pong| *pong == [Control::Pong(7)]));
        }
    };
    let ((), nodes) = tokio::join!(flood, meet(node, 2));
    all_know_all(&nodes).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_writes_on_all_its_streams_has_us_hold_one_window_and_no_more() {
    /// Long enough for what does not happen not to happen.
    const A_WHILE: Duration = Duration::from_millis(500);
    let node = start(public()).await;
    let rogue = Rogue::against(&node).await;
    let connection = rogue.greeted(WORK_ALPN).await;
    let window = vec![0; STREAM_WINDOW_BYTES as usize];
    {
        let fills_one = async || {
            let (mut send, recv) = connection.open_bi().await.unwrap();
            send.write_all(&window).await.unwrap();
            (send, recv, node.mesh.accept_work().await.unwrap())
        };
        let mut unread = Vec::new();
        // The room for what was read of its greeting may not have been given back.
        for _ in 1..WORK_WINDOW_BYTES / STREAM_WINDOW_BYTES {
            unread.push(soon("a stream's window is filled", fills_one()).await);
        }
        let beyond = async { tokio::join!(fills_one(), fills_one()) };
        tokio::pin!(beyond);
        assert!(tokio::time::timeout(A_WHILE, &mut beyond).await.is_err(), "more than a window was taken");
        // As soon as something of it is thrown away, more is taken.
        unread.truncate(unread.len() / 2);
        soon("more is taken", beyond).await;
    }
    is_well(node).await;
}

#[tokio::test]
async fn a_flood_of_made_up_nodes_does_not_keep_others_out() {
    let node = start(public()).await;
    let rogue = Rogue::against(&node).await;
    let connection = rogue.greeted(MESH_ALPN).await;
    let made_up = (0..2_000_u32).map(|number| {
        let mut secret = [9; 32];
        secret[..4].copy_from_slice(&number.to_le_bytes());
        fresh(record(&NodeKey::from_bytes(&secret)))
    });
    hand_over(&connection, &[], made_up.collect()).await;
    let joined = join(&node.mesh.invite(&open_invitation()).await.unwrap()).await;
    let (first, second) = (node.mesh.node_id(), joined.mesh.node_id());
    common::until(&joined.mesh, "the first", |table| common::lists(table, first)).await;
    common::until(&node.mesh, "the second", |table| common::lists(table, second)).await;
}

#[tokio::test]
async fn bad_broadcasts_are_counted_against_who_begins_them_and_not_against_who_passes_them_on() {
    let nodes = meet(start(public()).await, 3).await;
    let rogue = Rogue::against(&nodes[0]).await;
    let control = rogue.greeted(MESH_ALPN).await;
    let gossip = Gossip::builder().alpn(GOSSIP_ALPN).spawn(rogue.endpoint.clone());
    let topic = MeshId::public("test").topic(None).into();
    let joining = gossip.subscribe_and_join(topic, vec![rogue.target.id]);
    let (sender, _receiver) = soon("a neighbour", joining).await.unwrap().split();
    for number in 0..STRIKES_MAX {
        assert!(control.close_reason().is_none());
        let mut forged = record(&key(3)).as_bytes().to_vec();
        forged[0] ^= 1 + number as u8;
        sender.broadcast(forged.into()).await.unwrap();
    }
    soon("the end of the connection", control.closed()).await;
    assert!(nodes.iter().all(|node| !common::lists(&node.mesh.watch().borrow(), key(3).node_id())));
    // The others have had the forgeries from each other, and still talk.
    let speaker = nodes[2].mesh.node_id();
    nodes[2].mesh.update(|own| own.memory_free_bytes = 9).await.unwrap();
    let said = |table: &murmur_net::Table| {
        table.get(&speaker).is_some_and(|known| known.verified.record().memory_free_bytes == 9)
    };
    for node in &nodes[..2] {
        common::until(&node.mesh, "the news", said).await;
    }
}

#[tokio::test]
async fn who_drips_a_message_after_the_greeting_loses_the_stream_at_its_deadline() {
    let node = start(public()).await;
    let rogue = Rogue::against(&node).await;
    let connection = rogue.greeted(MESH_ALPN).await;
    let begun = Instant::now();
    let (mut send, recv) = connection.open_bi().await.unwrap();
    send.write_all(&encode(&Control::Ping(7)).unwrap()[..1]).await.unwrap();
    assert!(answers(recv).await.is_empty());
    assert!(begun.elapsed() >= Duration::from_millis(STREAM_DEADLINE_MS / 2));
    answers_pings(&connection).await;
    is_well(node).await;
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
async fn who_is_slow_to_answer_keeps_its_connections_when_it_opens_further_ones() {
    let node = start(public()).await;
    let rogue = Rogue::against(&node).await;
    // No question on it is ever answered, and it is alive all the same.
    let control = rogue.greeted(MESH_ALPN).await;
    let mut held = Vec::new();
    for _ in 0..2 {
        let work = rogue.greeted(WORK_ALPN).await;
        let (mut send, recv) = work.open_bi().await.unwrap();
        send.write_all(b"work").await.unwrap();
        // It is taken once it is clear that this is no new life of the peer.
        let taken = soon("the work", node.mesh.accept_work()).await.unwrap();
        held.push((work, send, recv, taken));
    }
    assert!(control.close_reason().is_none(), "{:?}", control.close_reason());
    assert!(held.iter().all(|(work, ..)| work.close_reason().is_none()));
    answers_pings(&control).await;
    is_well(node).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_died_and_came_back_does_not_meet_its_own_ghost() {
    let node = start(public()).await;
    let contact = node.mesh.contact();
    let secret = iroh::SecretKey::generate();
    let (gone, ends) = (secret.clone(), contact.clone());
    // With its runtime ends all that would say goodbye for it.
    let first_life = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let rogue = Rogue::with_key(gone, ends).await;
            let (control, work) = (rogue.greeted(MESH_ALPN).await, rogue.greeted(WORK_ALPN).await);
            std::mem::forget((control, work, rogue));
        });
        runtime.shutdown_background();
    });
    first_life.join().unwrap();
    let again = Rogue::with_key(secret, contact).await;
    let mut control = again.greeted(MESH_ALPN).await;
    // Where its earlier life has said no goodbye, its connections end with this one, and it is to dial again.
    if say(&control, &encode(&Control::Ping(7)).unwrap()).await.is_empty() {
        control = again.greeted(MESH_ALPN).await;
    }
    answers_pings(&control).await;
    is_well(node).await;
}

#[tokio::test]
async fn nobody_says_goodbye_for_another() {
    let nodes = meet(start(public()).await, 2).await;
    let rogue = Rogue::against(&nodes[0]).await;
    let connection = rogue.greeted(MESH_ALPN).await;
    let own = NodeKey::from_bytes(&rogue.endpoint.secret_key().to_bytes());
    let table = common::until(&nodes[1].mesh, "the first", |table| !table.is_empty()).await;
    let other = table.values().next().unwrap().verified.signed().clone();
    for goodbye in [other, record(&own)] {
        assert!(say(&connection, &encode(&Control::Goodbye(goodbye)).unwrap()).await.is_empty());
    }
    common::until(&nodes[0].mesh, "the other one is listed", |table| common::lists(table, nodes[1].mesh.node_id()))
        .await;
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
        let rogue = Rogue::against(node).await;
        let connection = rogue.greeted(MESH_ALPN).await;
        let mut bytes = encode(&Control::Digest(Vec::new())).unwrap();
        bytes.extend(encode(&Control::Records(vec![copy.clone()])).unwrap());
        say(&connection, &bytes).await;
    }
    assert!(!common::lists(&nodes[0].mesh.watch().borrow(), gone));
    common::until(&nodes[1].mesh, "the copy is seen through", |table| !common::lists(table, gone)).await;
}

/// A node and one that has joined it, with tables so large that they are compared by their summaries; and who filled them.
async fn large_meshes() -> (Vec<Node>, Rogue, Connection) {
    let first = start(public()).await;
    let rogue = Rogue::against(&first).await;
    let connection = rogue.greeted(MESH_ALPN).await;
    let crowd = (0..=DIGEST_NODES_MAX as u8).map(|number| fresh(record(&key(100 + number)))).collect();
    hand_over(&connection, &[], crowd).await;
    let joined = join(&first.mesh.invite(&open_invitation()).await.unwrap()).await;
    for node in [&first, &joined] {
        common::until(&node.mesh, "the crowd is listed", |table| table.len() > DIGEST_NODES_MAX + 1).await;
    }
    (vec![first, joined], rogue, connection)
}

#[tokio::test]
async fn what_a_neighbour_alone_knows_is_found_by_the_summaries_of_large_tables() {
    let (nodes, _rogue, connection) = large_meshes().await;
    // Handed over, it is not broadcast: only a comparison brings it to the other node.
    let third = key(3);
    hand_over(&connection, &[], vec![fresh(record(&third))]).await;
    for node in &nodes {
        common::until(&node.mesh, "the third node", |table| common::lists(table, third.node_id())).await;
    }
}

#[tokio::test]
async fn answers_to_summaries_that_lie_or_are_none_do_no_harm() {
    let (nodes, ..) = large_meshes().await;
    let rogue = Rogue::against(&nodes[0]).await;
    let hello = Control::Hello(Hello { capabilities: Capabilities::SUMMARIES, ..rogue.hello() });
    let connection = rogue.connect(MESH_ALPN).await;
    assert!(matches!(say(&connection, &encode(&hello).unwrap()).await.as_slice(), [Control::Hello(_)]));
    let lies: Vec<(NodeId, u64)> = (0..200).map(|number| (NodeId::from_bytes([number; 32]), u64::MAX)).collect();
    let everything = Differing { ranges: (0..RANGES_MAX as u16).collect(), entries: lies.clone() };
    for answer in [Control::Differing(everything), Control::Pong(1), Control::Differing(Differing::default())] {
        let (mut send, recv) = soon("a comparison", connection.accept_bi()).await.unwrap();
        send.write_all(&encode(&answer).unwrap()).await.unwrap();
        let _ = send.finish();
        let said = answers(recv).await;
        let [Control::Summary(summary), rest @ ..] = said.as_slice() else { panic!("{said:?}") };
        assert!(summary.ranges().count() < RANGES_MAX);
        let handed: usize =
            rest.iter().map(|part| if let Control::Records(part) = part { part.len() } else { 0 }).sum();
        match answer {
            // Told that nothing of its table is known, it hands it over once, and asks what it cannot believe.
            Control::Differing(differing) if !differing.ranges.is_empty() => {
                assert!(handed > DIGEST_NODES_MAX);
                assert_eq!(rest.last(), Some(&Control::Want(lies.iter().map(|(node, _)| *node).collect())));
            }
            Control::Differing(_) => assert_eq!(rest, [Control::Want(Vec::new())]),
            _ => assert!(rest.is_empty()),
        }
    }
    let newcomer = join(&nodes[0].mesh.invite(&open_invitation()).await.unwrap()).await;
    for node in &nodes {
        common::until(&node.mesh, "the newcomer", |table| common::lists(table, newcomer.mesh.node_id())).await;
    }
}

#[tokio::test]
async fn who_is_connected_with_the_overlay_and_is_no_neighbour_is_hung_up_on() {
    let node = start(public()).await;
    let rogue = Rogue::against(&node).await;
    let control = rogue.greeted(MESH_ALPN).await;
    let overlay = rogue.connect(GOSSIP_ALPN).await;
    let end = soon("the end of the connection", overlay.closed()).await;
    assert!(matches!(end, ConnectionError::ApplicationClosed(_)), "{end}");
    answers_pings(&control).await;
    // It may come back, as a neighbour for instance.
    soon("another connection", rogue.endpoint.connect(rogue.target.clone(), GOSSIP_ALPN)).await.unwrap();
}

/// A peer that dies in the first milliseconds owes the acknowledgement of everything that one says first. QUIC then sends some of that once
/// more in packets of the size of the first such, and asking for fewer acknowledgements did not fit there: noq 1.4 panics, and with it the node.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn peers_that_vanish_right_after_the_handshake_take_nobody_along() {
    const VANISHING: usize = 100;
    let node = start(public()).await;
    let (mut threads, mut held) = (Vec::new(), Vec::new());
    for number in 0..VANISHING {
        let (contact, (back, away), (go, gone)) = (node.mesh.contact(), mpsc::channel::<()>(), oneshot::channel());
        // On a thread of its own, which blocks: as silent as a process that is gone.
        threads.push(thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let address = format!("127.0.0.{}:0", 1 + number / GREETINGS_PER_SOURCE_MAX);
                let rogue = Rogue::bound_to(&address, iroh::SecretKey::generate(), contact).await;
                let connection = rogue.connect([MESH_ALPN, WORK_ALPN][number % 2]).await;
                for _ in 0..number / 2 % 8 {
                    tokio::task::yield_now().await;
                }
                let _ = go.send(());
                let _ = away.recv();
                drop(connection);
            });
        }));
        soon("it vanishes", gone).await.unwrap();
        held.push(back);
    }
    // Until then what they owe is asked for.
    tokio::time::sleep(Duration::from_millis(HELLO_DEADLINE_MS)).await;
    Rogue::against(&node).await.greeted(MESH_ALPN).await;
    drop(held);
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}
