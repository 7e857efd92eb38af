//! Ways into a mesh.

use std::net::Ipv4Addr;

use murmur_lab::{Host, Link, NatKind, Site, Topology};

use crate::{
    common::{Home, until},
    world::{Node, Seed, UNAIDED, lab, short_story, with},
};

/// A server in one home and a client in another, whose own addresses are the same, and seeds on the internet.
fn homes(nats: [NatKind; 2], seeds: &[&str]) -> Topology {
    let mut topology = Topology::of_hosts(seeds.iter().copied());
    for ((home, host), nat) in [("green", "server"), ("blue", "client")].into_iter().zip(nats) {
        let host = Host { address: Some(Ipv4Addr::new(192, 168, 1, 10)), ..Host::new(host).at(home) };
        topology = topology.with_site(Site::new(home).behind(nat)).with_host(host);
    }
    topology
}

/// The client has the server's model, and gets the text that the server gives.
fn serves_alike(server: &Node<'_>, client: &Node<'_>) {
    client.waits_for_servers_of_demo(1);
    assert_eq!(client.complete(&short_story()), server.complete(&short_story()));
}

#[test]
fn a_ticket_leads_from_one_host_to_another() {
    let Some(lab) = lab(&Topology::of_hosts(["server", "client"])) else { return };
    let server = Node::founder(lab.host("server").unwrap(), Home::new(), &UNAIDED);
    let client = Node::client(lab.host("client").unwrap(), Home::new(), &with(&UNAIDED, &server.join()));
    serves_alike(&server, &client);
}

/// A round trip takes both ways, and is known before anybody has asked for anything.
#[test]
fn a_peer_that_is_far_away_is_listed_as_far_as_it_is() {
    const ONE_WAY_MS: f64 = 30.0;
    let Some(lab) = lab(&Topology::of_hosts(["server", "client"])) else { return };
    lab.set_route("server", "client", &Link::delay(ONE_WAY_MS)).unwrap();
    let server = Node::founder(lab.host("server").unwrap(), Home::new(), &UNAIDED);
    let client = Node::client(lab.host("client").unwrap(), Home::new(), &with(&UNAIDED, &server.join()));
    for (one, other) in [(&server, &client), (&client, &server)] {
        let rtt_ms = until("the other one is listed with its round trip", || {
            let peers = one.peers();
            peers.iter().find(|peer| peer["node"] == other.id())?["rtt_ms"].as_f64()
        });
        assert!((2.0 * ONE_WAY_MS..1_000.0).contains(&rtt_ms), "{rtt_ms} ms");
    }
}

/// A server and a client in homes of their own, with nothing in common but a ticket and the relay of a seed.
fn across_homes(nats: [NatKind; 2], test: impl FnOnce(&Node<'_>, &Node<'_>)) {
    let Some(lab) = lab(&homes(nats, &["seed"])) else { return };
    let seed = Seed::start(lab.host("seed").unwrap());
    let relay = format!("--relay={}", seed.relay);
    let ways = ["--no-nostr", "--no-mdns", &relay];
    let server = Node::founder(lab.host("server").unwrap(), Home::new(), &ways);
    server.waits_for_its_relay();
    let client = Node::client(lab.host("client").unwrap(), Home::new(), &with(&ways, &server.join()));
    serves_alike(&server, &client);
    test(&server, &client);
}

#[test]
fn a_ticket_leads_from_one_home_to_another_and_a_seed_tells_both_how_to_do_without_it() {
    across_homes([NatKind::PortRestrictedCone; 2], |server, client| {
        for (one, other) in [(client, server), (server, client)] {
            let what = format!("{} reaches {} directly", one.host.name(), other.host.name());
            until(&what, || one.path_to(other).starts_with("direct").then_some(()));
        }
    });
}

#[test]
fn two_symmetric_nats_are_crossed_by_the_relay_of_a_seed_and_peers_say_so() {
    across_homes([NatKind::Symmetric; 2], |server, client| {
        for (one, other) in [(client, server), (server, client)] {
            let what = format!("{} reaches {} by a relay", one.host.name(), other.host.name());
            until(&what, || one.path_to(other).starts_with("relayed http://").then_some(()));
        }
        let shown = client.mesh(["peers"]).succeeds().out;
        assert!(shown.contains("relayed http://"), "{shown}");
    });
}

#[test]
fn strangers_in_two_homes_who_know_a_seed_alone_come_together_by_its_node() {
    let Some(lab) = lab(&homes([NatKind::PortRestrictedCone; 2], &["seed"])) else { return };
    let seed = Seed::of_mesh(lab.host("seed").unwrap(), "park");
    let (relay, join) = (format!("--relay={}", seed.relay), seed.join());
    let ways = ["--no-nostr", "--no-mdns", &relay, &join];
    let server = Node::serving(lab.host("server").unwrap(), Home::new(), &ways);
    let client = Node::client(lab.host("client").unwrap(), Home::new(), &ways);
    serves_alike(&server, &client);
    // It is no use for requests, and nobody takes it for a server.
    assert_eq!((client.peers().len(), client.servers_of_demo()), (2, 1));
}

#[test]
fn nodes_on_one_local_network_find_each_other_without_being_told() {
    let topology = Topology::default().with_site(Site::new("home").behind(NatKind::PortRestrictedCone));
    let topology = topology.with_host(Host::new("server").at("home")).with_host(Host::new("client").at("home"));
    let Some(lab) = lab(&topology) else { return };
    let ways = ["--mesh=kitchen", "--relay=none", "--no-nostr"];
    let server = Node::serving(lab.host("server").unwrap(), Home::new(), &ways);
    let client = Node::client(lab.host("client").unwrap(), Home::new(), &ways);
    serves_alike(&server, &client);
}

#[test]
fn one_live_seed_of_three_brings_strangers_in_two_homes_together() {
    let seeds = ["crashed", "unreachable", "alive"];
    let Some(lab) = lab(&homes([NatKind::PortRestrictedCone; 2], &seeds)) else { return };
    let seeds = seeds.map(|name| Seed::start(lab.host(name).unwrap()));
    let relays = seeds.each_ref().map(|seed| seed.relay.as_str()).join(",");
    let mut ways = vec!["--mesh=park".to_owned(), "--no-mdns".to_owned(), format!("--relay={relays}")];
    ways.extend(seeds.iter().map(|seed| format!("--nostr-relay={}", seed.nostr)));
    let ways: Vec<&str> = ways.iter().map(String::as_str).collect();
    lab.host("crashed").unwrap().kill_programs().unwrap();
    lab.isolate("unreachable").unwrap();
    let server = Node::serving(lab.host("server").unwrap(), Home::new(), &ways);
    let client = Node::client(lab.host("client").unwrap(), Home::new(), &ways);
    serves_alike(&server, &client);
}
