//! Public meshes on loopback: finding each other, saying new things, leaving, falling silent, working.

#![allow(clippy::unwrap_used, clippy::panic, reason = "these are tests, helpers included")]

mod common;

use std::{
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use common::{QUICK, all_know_all, join, lists, meet, open_invitation, options, public, soon, start, until};
use murmur_net::{
    Mesh, MeshChoice, MeshOptions, NetError, Path, PeerView, Table, Timing,
    endpoint::{STREAM_WINDOW_BYTES, WORK_IDLE_TIMEOUT_MS, WORK_WINDOW_BYTES},
    remembered::CONTACTS_FILE,
};
use murmur_protocol::mesh::{Capabilities, MeasuredLink, NodeId, NodeKey};
use tempfile::TempDir;
use tokio::sync::oneshot;

#[tokio::test]
async fn two_nodes_find_each_other_by_ticket_and_see_each_other_directly() {
    let nodes = meet(start(public()).await, 2).await;
    for (a, b) in [(&nodes[0], &nodes[1]), (&nodes[1], &nodes[0])] {
        let peers = common::with_paths(&a.mesh).await;
        assert_eq!(peers.len(), 1);
        assert_eq!(peers[0].record().node, b.mesh.node_id());
        assert!(matches!(peers[0].path, Path::Direct(_)), "{:?}", peers[0].path);
        assert!(peers[0].rtt_ms.is_some_and(|rtt_ms| rtt_ms > 0.0));
        assert!(peers[0].clock_ahead_ms.is_some_and(|ahead_ms| ahead_ms.abs() < 60_000));
    }
}

#[tokio::test]
async fn five_nodes_that_know_one_of_them_all_find_each_other() {
    meet(start(public()).await, 5).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_nodes_find_each_other_and_hear_each_other() {
    let begun = std::time::Instant::now();
    let nodes = meet(start(public()).await, 20).await;
    println!("20 nodes know each other after {:?}", begun.elapsed());
    let (said, speaker) = (std::time::Instant::now(), nodes[7].mesh.node_id());
    nodes[7].mesh.update(|own| own.memory_free_bytes = 7).await.unwrap();
    for node in nodes.iter().filter(|node| node.mesh.node_id() != speaker) {
        let heard = |table: &murmur_net::Table| {
            table.get(&speaker).is_some_and(|known| known.verified.record().memory_free_bytes == 7)
        };
        until(&node.mesh, "the news", heard).await;
    }
    println!("all have heard the news after {:?}", said.elapsed());
    let (left, gone) = (std::time::Instant::now(), nodes[3].mesh.node_id());
    nodes[3].mesh.leave().await;
    for node in nodes.iter().filter(|node| node.mesh.node_id() != gone) {
        until(&node.mesh, "the leaver is gone", |table| !lists(table, gone)).await;
    }
    println!("the leaver is gone everywhere after {:?}", left.elapsed());
}

#[tokio::test]
async fn what_a_node_says_anew_reaches_everybody() {
    let nodes = meet(start(public()).await, 3).await;
    let speaker = nodes[2].mesh.node_id();
    nodes[2].mesh.update(|own| own.memory_free_bytes = 77).await.unwrap();
    for node in &nodes[..2] {
        let said = |table: &murmur_net::Table| {
            table.get(&speaker).is_some_and(|known| known.verified.record().memory_free_bytes == 77)
        };
        until(&node.mesh, "the news", said).await;
    }
}

#[tokio::test]
async fn a_way_that_is_measured_anew_is_told_with_the_next_news() {
    let nodes = meet(start(public()).await, 2).await;
    let (from, to) = (nodes[0].mesh.node_id(), nodes[1].mesh.node_id());
    let way = |rtt_us| MeasuredLink::to(&to, rtt_us, 0);
    let said = |table: &murmur_net::Table, rtt_us: u32, memory_free_bytes: u64| {
        let record = table.get(&from).map(|known| known.verified.record().clone());
        record.is_some_and(|said| said.links == [way(rtt_us)] && said.memory_free_bytes == memory_free_bytes)
    };
    nodes[0].mesh.update(|own| own.links = vec![way(900)]).await.unwrap();
    until(&nodes[1].mesh, "a way", |table| said(table, 900, 0)).await;
    nodes[0].mesh.update(|own| own.links = vec![way(200)]).await.unwrap();
    nodes[0].mesh.update(|own| own.memory_free_bytes = 7).await.unwrap();
    until(&nodes[1].mesh, "the way as it is now", |table| said(table, 200, 7)).await;
}

#[tokio::test]
async fn a_node_that_leaves_is_gone_everywhere_long_before_its_record_expires() {
    let folder = tempfile::tempdir().unwrap();
    let mut slow = options(&folder, public());
    slow.timing.ttl_ms = 60_000;
    let leaver = common::Node { mesh: Mesh::start(slow).await.unwrap(), folder };
    let first = start(public()).await;
    let ticket = first.mesh.invite(&open_invitation()).await.unwrap();
    leaver.mesh.join(&ticket).await.unwrap();
    let nodes = vec![first, join(&ticket).await, join(&ticket).await, leaver];
    all_know_all(&nodes).await;

    let gone = nodes[3].mesh.node_id();
    let left = std::time::Instant::now();
    nodes[3].mesh.leave().await;
    for node in &nodes[..3] {
        until(&node.mesh, "the leaver is gone", |table| !lists(table, gone)).await;
    }
    assert!(left.elapsed() < Duration::from_millis(60_000), "it took {:?}", left.elapsed());
    assert!(matches!(nodes[3].mesh.update(|own| own.memory_free_bytes = 1).await, Err(NetError::Closed)));
    assert!(nodes[3].mesh.accept_work().await.is_none());
}

#[tokio::test]
async fn nodes_that_start_again_find_those_whom_they_knew_without_any_help() {
    let nodes = meet(start(public()).await, 2).await;
    let written = async {
        while !nodes.iter().all(|node| node.folder.path().join(CONTACTS_FILE).exists()) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    soon("it is written down who is there", written).await;
    let mut folders = Vec::new();
    for common::Node { mesh, folder } in nodes {
        mesh.leave().await;
        folders.push(folder);
    }
    let mut again = Vec::new();
    for folder in folders {
        again.push(common::Node { mesh: Mesh::start(options(&folder, public())).await.unwrap(), folder });
    }
    all_know_all(&again).await;
}

#[tokio::test]
async fn a_node_that_crashes_is_gone_when_its_record_expires_and_stays_gone() {
    let mut nodes = meet(start(public()).await, 3).await;
    let crashed = nodes.pop().unwrap();
    let gone = crashed.mesh.node_id();
    drop(crashed.mesh);
    for node in &nodes {
        until(&node.mesh, "the crashed node is gone", |table| !lists(table, gone)).await;
    }
    // The others go on comparing what they know: for as long as a record is valid, none of them may bring it back.
    let mut watch = nodes[0].mesh.watch();
    let still = std::time::Duration::from_millis(u64::from(QUICK.ttl_ms));
    let back = tokio::time::timeout(still, watch.wait_for(|table| lists(table, gone))).await;
    assert!(back.is_err(), "a crashed node came back");
    all_know_all(&nodes).await;
}

#[tokio::test]
async fn a_node_that_restarts_is_the_same_node_and_heard_at_once() {
    let mut nodes = meet(start(public()).await, 2).await;
    let restarting = nodes.pop().unwrap();
    let (id, folder) = (restarting.mesh.node_id(), restarting.folder);
    restarting.mesh.leave().await;
    until(&nodes[0].mesh, "it is gone", |table| !lists(table, id)).await;
    let mut again = options(&folder, public());
    again.bootstrap = vec![nodes[0].mesh.contact()];
    let mesh = Mesh::start(again).await.unwrap();
    assert_eq!(mesh.node_id(), id);
    until(&nodes[0].mesh, "it is back", |table| lists(table, id)).await;
}

#[tokio::test]
async fn the_rest_stays_together_when_the_node_through_which_they_met_crashes() {
    let mut nodes = meet(start(public()).await, 5).await;
    drop(nodes.remove(0).mesh);
    all_know_all(&nodes).await;
    let speaker = nodes[0].mesh.node_id();
    nodes[0].mesh.update(|own| own.memory_free_bytes = 5).await.unwrap();
    for node in &nodes[1..] {
        let said = |table: &murmur_net::Table| {
            table.get(&speaker).is_some_and(|known| known.verified.record().memory_free_bytes == 5)
        };
        until(&node.mesh, "the news", said).await;
    }
}

#[tokio::test]
async fn nodes_of_different_meshes_do_not_list_each_other() {
    let one = start(public()).await;
    let folder = tempfile::tempdir().unwrap();
    let mut elsewhere = options(&folder, MeshChoice::Public("other".into()));
    elsewhere.bootstrap = vec![one.mesh.contact()];
    let other = Mesh::start(elsewhere).await.unwrap();
    let refused = other.open_work(one.mesh.node_id()).await.unwrap_err();
    assert!(matches!(refused, NetError::Refused(_)), "{refused}");
    assert!(refused.to_string().contains("another mesh"), "{refused}");
    assert!(one.mesh.peers().is_empty() && other.peers().is_empty());
    let ticket = one.mesh.invite(&open_invitation()).await.unwrap();
    assert!(matches!(other.join(&ticket).await, Err(NetError::Ticket(_))));
}

#[tokio::test]
async fn requests_go_over_one_connection_and_say_who_asks() {
    let nodes = meet(start(public()).await, 2).await;
    let (driver, worker) = (&nodes[0].mesh, &nodes[1].mesh);
    let serve = async {
        for _ in 0..3 {
            let mut work = soon("work", worker.accept_work()).await.unwrap();
            assert_eq!(work.node, driver.node_id());
            let question = work.recv.read_to_end(100).await.unwrap();
            work.send.write_all(&question).await.unwrap();
            work.send.finish().unwrap();
        }
    };
    let ask = async {
        for question in [b"one", b"two", b"six"] {
            let (mut send, mut recv) = driver.open_work(worker.node_id()).await.unwrap();
            send.write_all(question).await.unwrap();
            send.finish().unwrap();
            assert_eq!(recv.read_to_end(100).await.unwrap(), question);
        }
    };
    tokio::join!(serve, ask);
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_nobody_reads_leave_room_for_all_else_on_the_same_connection_both_ways() {
    let nodes = meet(start(public()).await, 2).await;
    let (taker, giver) = (&nodes[0].mesh, &nodes[1].mesh);
    let mut unread = Vec::new();
    for _ in 0..WORK_WINDOW_BYTES / STREAM_WINDOW_BYTES / 2 {
        let (mut send, recv) = taker.open_work(giver.node_id()).await.unwrap();
        send.write_all(b"a file").await.unwrap();
        let mut work = soon("the work", giver.accept_work()).await.unwrap();
        let window = vec![0; STREAM_WINDOW_BYTES as usize];
        soon("a stream's window is filled", work.send.write_all(&window)).await.unwrap();
        unread.push((send, recv, work));
    }
    let (mut send, mut recv) = taker.open_work(giver.node_id()).await.unwrap();
    // More than the windows of a few streams, in parts.
    let mut part = vec![0; STREAM_WINDOW_BYTES as usize];
    send.write_all(b"frames").await.unwrap();
    let mut work = soon("the work", giver.accept_work()).await.unwrap();
    for _ in 0..8 {
        let (there, back) = (part.clone(), part.clone());
        let mut read = part.clone();
        let sent = async { tokio::join!(work.send.write_all(&there), send.write_all(&back)) };
        let heard = async { tokio::join!(recv.read_exact(&mut part), work.recv.read_exact(&mut read)) };
        let (sent, heard) = soon("frames there and back", async { tokio::join!(sent, heard) }).await;
        assert!(sent.0.is_ok() && sent.1.is_ok() && heard.0.is_ok() && heard.1.is_ok());
    }
}

#[tokio::test]
async fn work_goes_on_after_a_moments_silence_and_ends_when_it_lasts_long_before_the_peer_is_given_up() {
    let patient = |folder: &_, mesh| MeshOptions { timing: Timing::default(), ..options(folder, mesh) };
    let folder = tempfile::tempdir().unwrap();
    let worker = Mesh::start(patient(&folder, public())).await.unwrap();
    let ticket = worker.invite(&open_invitation()).await.unwrap();
    let (worker_id, (back, away)) = (worker.node_id(), mpsc::channel::<()>());
    // On a thread of its own, and whenever that blocks it is as silent as a process that is stopped.
    let driver = thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let folder = tempfile::tempdir().unwrap();
            let driver = Mesh::start(patient(&folder, MeshChoice::Ticket(ticket))).await.unwrap();
            let (mut send, mut recv) = driver.open_work(worker_id).await.unwrap();
            for question in [b"one", b"two"] {
                send.write_all(question).await.unwrap();
                recv.read_exact(&mut [0; 3]).await.unwrap();
                thread::sleep(Duration::from_millis(WORK_IDLE_TIMEOUT_MS / 4));
            }
            let _ = away.recv();
        });
    });
    let mut work = soon("work", worker.accept_work()).await.unwrap();
    for question in [b"one", b"two"] {
        let mut heard = [0; 3];
        work.recv.read_exact(&mut heard).await.unwrap();
        assert_eq!(&heard, question);
        until(&worker, "the driver is listed", |table| !table.is_empty()).await;
        common::with_paths(&worker).await;
        work.send.write_all(&heard).await.unwrap(); // from here on it is silent
    }
    let ended = soon("the work ends", work.recv.read(&mut [0])).await;
    assert!(ended.is_err(), "{ended:?}");
    let peers = worker.peers();
    assert!(matches!(peers[..], [PeerView { path: Path::Direct(_), .. }]), "{peers:?}");
    drop(back);
    driver.join().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_works_for_a_node_gives_it_signs_of_life_in_a_mesh_too_large_to_be_connected_completely() {
    let mut nodes = Vec::new();
    let mut first = None;
    for _ in 0..12 {
        let folder = tempfile::tempdir().unwrap();
        let sparse = MeshOptions {
            links_wanted: 2,
            bootstrap: first.clone().into_iter().collect(),
            ..options(&folder, public())
        };
        let mesh = Mesh::start(sparse).await.unwrap();
        first.get_or_insert_with(|| mesh.contact());
        nodes.push(common::Node { mesh, folder });
    }
    all_know_all(&nodes).await;
    let mut strangers = 0;
    for driver in &nodes {
        let far = driver.mesh.peers().into_iter().find(|peer| peer.rtt_ms.is_none());
        let Some(far) = far.map(|peer| peer.record().node) else { continue };
        strangers += 1;
        let (_send, _recv) = driver.mesh.open_work(far).await.unwrap();
        driver.mesh.ping(far).await.unwrap();
        let is_near = |peer: &PeerView| peer.record().node == far && peer.rtt_ms.is_some();
        assert!(driver.mesh.peers().iter().any(is_near));
    }
    assert!(strangers > 0, "all were connected with all, and nothing was tested");
}

#[tokio::test]
async fn two_nodes_that_ask_each_other_for_a_sign_of_life_at_the_same_moment_both_get_one() {
    // Each has to dial the other first.
    for _ in 0..5 {
        let (one, other) = (start(public()).await, start(public()).await);
        one.mesh.join(&other.mesh.invite(&open_invitation()).await.unwrap()).await.unwrap();
        other.mesh.join(&one.mesh.invite(&open_invitation()).await.unwrap()).await.unwrap();
        let (there, back) = tokio::join!(one.mesh.ping(other.mesh.node_id()), other.mesh.ping(one.mesh.node_id()));
        assert!(there.is_ok() && back.is_ok(), "{there:?} {back:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_node_says_that_died_and_has_come_back_is_known_soon() {
    // Within this test nobody heals the overlay, and nobody compares records by the clock.
    let timing = Timing { exchange_every_ms: 3_600_000, heal_every_ms: 3_600_000, ..Timing::default() };
    let calm = move |folder: &TempDir, bootstrap| MeshOptions { timing, bootstrap, ..options(folder, public()) };
    let (here, there) = (tempfile::tempdir().unwrap(), Arc::new(tempfile::tempdir().unwrap()));
    let witness = Mesh::start(calm(&here, Vec::new())).await.unwrap();
    let (contact, folder) = (witness.contact(), Arc::clone(&there));
    let ((go, gone), (back, away)) = (oneshot::channel::<()>(), mpsc::channel::<()>());
    // On a thread of its own, which blocks when it is known: as silent as a process that is gone.
    let first_life = thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mesh = Mesh::start(calm(&folder, vec![contact])).await.unwrap();
            until(&mesh, "the witness is listed", |table| !table.is_empty()).await;
            let _ = gone.await;
            let _ = away.recv();
        });
    });
    until(&witness, "the first life is listed", |table| !table.is_empty()).await;
    let first = *witness.watch().borrow().keys().next().unwrap();
    let _work = witness.open_work(first).await.unwrap();
    let _ = go.send(());
    let second_life = Mesh::start(calm(&there, vec![witness.contact()])).await.unwrap();
    // An answer comes when the witness has done with the first life.
    second_life.ping(witness.node_id()).await.unwrap();
    // Iroh sent what is meant for it to the port of the first life, which is held by that still.
    witness.open_work(second_life.node_id()).await.unwrap();
    let says = |who: &Mesh, bytes| {
        let node = who.node_id();
        move |table: &Table| table.get(&node).is_some_and(|known| known.verified.record().memory_free_bytes == bytes)
    };
    for bytes in 7..10 {
        second_life.update(|own| own.memory_free_bytes = bytes).await.unwrap();
        until(&witness, "what the second life says is known", says(&second_life, bytes)).await;
        witness.update(|own| own.memory_free_bytes = bytes).await.unwrap();
        until(&second_life, "what the witness says is known to it", says(&witness, bytes)).await;
    }
    drop(back);
    first_life.join().unwrap();
}

#[tokio::test]
async fn who_waits_for_work_is_told_when_the_mesh_is_left() {
    let nodes = meet(start(public()).await, 2).await;
    let (waiting, leaving) = (nodes[0].mesh.accept_work(), async {
        // Polled after the other: by then that one waits.
        tokio::task::yield_now().await;
        nodes[0].mesh.leave().await;
    });
    let (work, ()) = soon("the end", async { tokio::join!(waiting, leaving) }).await;
    assert!(work.is_none());
}

#[tokio::test]
async fn nodes_of_different_versions_meet_if_they_have_one_in_common_and_say_why_not_if_they_have_none() {
    let speaking = |folder: &_, versions, first: &common::Node| MeshOptions {
        versions,
        bootstrap: vec![first.mesh.contact()],
        ..options(folder, public())
    };
    let first = start(public()).await;
    let (folder, apart) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let both = Mesh::start(speaking(&folder, 1..=9, &first)).await.unwrap();
    let newer = Mesh::start(speaking(&apart, 7..=9, &first)).await.unwrap();
    let (old, new) = (first.mesh.node_id(), newer.node_id());
    until(&first.mesh, "the one that speaks both", |table| lists(table, both.node_id())).await;
    assert!(both.ping(old).await.is_ok());
    let refused = newer.open_work(old).await.unwrap_err();
    assert!(matches!(refused, NetError::Refused(_)), "{refused}");
    assert!(refused.to_string().contains('7') && refused.to_string().contains('1'), "{refused}");
    assert!(matches!(newer.ping(old).await, Err(NetError::Refused(_))));
    assert!(!lists(&first.mesh.watch().borrow(), new) && !lists(&newer.watch().borrow(), old));
    let folder = tempfile::tempdir().unwrap();
    #[allow(clippy::reversed_empty_ranges, reason = "that is what is refused")]
    let none = Mesh::start(speaking(&folder, 2..=1, &first)).await;
    assert!(matches!(none, Err(NetError::Option { .. })));
}

#[tokio::test]
async fn work_for_a_node_that_is_not_there_fails_with_the_reason() {
    let node = start(public()).await;
    let error = node.mesh.open_work(nobody()).await.unwrap_err();
    assert!(matches!(error, NetError::Unreachable { .. }), "{error}");
}

#[tokio::test]
async fn a_public_mesh_counts_no_uses_and_revokes_nobody() {
    let node = start(public()).await;
    let counted = murmur_net::Invitation::default();
    assert!(matches!(node.mesh.invite(&counted).await, Err(NetError::Ticket(_))));
    let revocation = murmur_protocol::mesh::Revocation::Serial(1);
    assert!(matches!(node.mesh.revoke(revocation).await, Err(NetError::NotOwner(_))));
}

#[tokio::test]
async fn options_that_cannot_be_honoured_are_refused_before_anything_starts() {
    let folder = tempfile::tempdir().unwrap();
    let mut rare = options(&folder, public());
    rare.timing.renew_every_ms = rare.timing.ttl_ms.into();
    assert!(matches!(Mesh::start(rare).await, Err(NetError::Option { .. })));
    let mut nostr = options(&folder, public());
    nostr.nostr = vec!["not a url".into()];
    assert!(matches!(Mesh::start(nostr).await, Err(NetError::Option { .. })));
    std::fs::write(folder.path().join("node.key"), "broken").unwrap();
    assert!(matches!(Mesh::start(options(&folder, public())).await, Err(NetError::CorruptFile { .. })));
}

/// The id of a node that does not exist.
fn nobody() -> NodeId {
    NodeKey::from_bytes(&[42; 32]).node_id()
}

#[tokio::test]
async fn capabilities_are_told_in_records() {
    let folder = tempfile::tempdir().unwrap();
    let mut able = options(&folder, public());
    able.own.capabilities = Capabilities::GRAMMARS;
    let able = common::Node { mesh: Mesh::start(able).await.unwrap(), folder };
    let id = able.mesh.node_id();
    let nodes = meet(able, 2).await;
    let said = |table: &murmur_net::Table| {
        let known = table.get(&id).map(|known| known.verified.record().capabilities);
        known.is_some_and(|capabilities| capabilities.contains(Capabilities::GRAMMARS))
    };
    until(&nodes[1].mesh, "what it can do", said).await;
}
