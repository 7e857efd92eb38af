//! Wall clocks that are wrong. A library that the test compiles shifts them for one node and what it starts.

use std::process::Command;

use murmur_lab::Topology;

use crate::{
    common::{Home, until},
    world::{Node, Seed, UNAIDED, lab, short_story, with},
};

const TEN_MINUTES_S: i64 = 600;

/// A home in which the wall clock is ahead.
pub fn home_ahead(seconds: i64) -> Home {
    let home = Home::new();
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/lab/clock.c");
    let library = home.path().join("clock.so");
    let compiled = Command::new("cc").args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(source).status();
    assert!(compiled.unwrap().success());
    home.with("LD_PRELOAD", library.to_str().unwrap()).with("CLOCK_AHEAD_S", seconds.to_string())
}

/// What another node is told of a clock.
fn sees_clock(node: &Node<'_>, other: &Node<'_>, ahead_s: i64) {
    let what = format!("{} has greeted {}", node.host.name(), other.host.name());
    let seen_ms = until(&what, || {
        let peers = node.peers();
        peers.iter().find(|peer| peer["node"] == other.id())?["clock_ahead_ms"].as_i64()
    });
    // With the way of the greeting, which may be long on a busy machine.
    assert!((seen_ms - ahead_s * 1000).abs() < 60_000, "{seen_ms} ms");
}

/// Between two servers and a client.
fn all_is_well(servers: [&Node<'_>; 2], client: &Node<'_>) {
    client.waits_for_servers_of_demo(2);
    for [one, other] in [servers, [servers[1], servers[0]]] {
        until("the servers know each other", || {
            one.peers().iter().any(|peer| peer["node"] == other.id()).then_some(())
        });
        assert_eq!(client.complete(&short_story()), one.complete(&short_story()));
    }
}

#[test]
fn clocks_that_are_ten_minutes_off_harm_no_private_mesh() {
    let Some(lab) = lab(&Topology::of_hosts(["founder", "fast", "slow"])) else { return };
    let host = |name| lab.host(name).unwrap();
    let founder = Node::founder(host("founder"), Home::new(), &UNAIDED);
    let join = founder.join();
    let fast = Node::serving(host("fast"), home_ahead(TEN_MINUTES_S), &with(&UNAIDED, &join));
    let slow = Node::client(host("slow"), home_ahead(-TEN_MINUTES_S), &with(&UNAIDED, &join));
    all_is_well([&founder, &fast], &slow);
    sees_clock(&founder, &fast, TEN_MINUTES_S);
    sees_clock(&founder, &slow, -TEN_MINUTES_S);
}

#[test]
fn a_founder_whose_clock_is_ten_minutes_off_can_let_others_in() {
    let Some(lab) = lab(&Topology::of_hosts(["founder", "guest"])) else { return };
    for ahead_s in [TEN_MINUTES_S, -TEN_MINUTES_S] {
        let founder = Node::founder(lab.host("founder").unwrap(), home_ahead(ahead_s), &UNAIDED);
        let guest = Node::client(lab.host("guest").unwrap(), Home::new(), &with(&UNAIDED, &founder.join()));
        guest.waits_for_servers_of_demo(1);
        assert_eq!(guest.complete(&short_story()), founder.complete(&short_story()));
        sees_clock(&guest, &founder, ahead_s);
    }
}

#[test]
fn nodes_whose_clocks_are_ten_minutes_off_are_found_through_nostr() {
    let Some(lab) = lab(&Topology::of_hosts(["seed", "right", "fast", "slow"])) else { return };
    let host = |name| lab.host(name).unwrap();
    let seed = Seed::start(host("seed"));
    let nostr = format!("--nostr-relay={}", seed.nostr);
    let ways = ["--mesh=park", "--no-mdns", "--relay=none", &nostr];
    let right = Node::serving(host("right"), Home::new(), &ways);
    let fast = Node::serving(host("fast"), home_ahead(TEN_MINUTES_S), &ways);
    let slow = Node::client(host("slow"), home_ahead(-TEN_MINUTES_S), &ways);
    all_is_well([&right, &fast], &slow);
}
