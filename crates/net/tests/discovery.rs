//! Finding each other without a ticket: Nostr relays, relays for traffic, the local network.

#![allow(clippy::unwrap_used, clippy::panic, reason = "these are tests, helpers included")]

mod common;

use std::net::UdpSocket;

use common::{Node, all_know_all, join, lists, options, public, start, until};
use murmur_net::{
    Contact, Credentials, Dht, EndpointOptions, Invitation, Mesh, MeshChoice, MeshOptions, Relays, Seed, SeedOptions,
};
use murmur_protocol::mesh::Addresses;

async fn with_nostr(relays: &[String]) -> Node {
    let folder = tempfile::tempdir().unwrap();
    let mut found = options(&folder, public());
    found.nostr = relays.to_vec();
    Node { mesh: Mesh::start(found).await.unwrap(), folder }
}

#[tokio::test]
async fn nodes_find_each_other_on_one_nostr_relay_while_the_others_are_dead() {
    let seed = Seed::start(SeedOptions::default()).await.unwrap();
    // One refuses connections, one takes them and never says anything.
    // Nothing listens on the discard port.
    let closed = "127.0.0.1:9";
    let mute = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let dead = [format!("ws://{closed}"), format!("ws://{}", mute.local_addr().unwrap())];
    let relays = [dead[0].clone(), dead[1].clone(), seed.nostr_url().to_owned()];
    let nodes = vec![with_nostr(&relays).await, with_nostr(&relays).await, with_nostr(&relays[2..]).await];
    all_know_all(&nodes).await;
    seed.shutdown().await.unwrap();
}

#[tokio::test]
async fn members_of_a_private_mesh_find_each_other_on_a_nostr_relay_and_strangers_there_do_not() {
    let seed = Seed::start(SeedOptions::default()).await.unwrap();
    let relays = vec![seed.nostr_url().to_owned()];
    let folder = tempfile::tempdir().unwrap();
    let founder = murmur_net::node_key(folder.path()).unwrap().node_id();
    let credentials = Credentials::found(folder.path(), "home", founder).unwrap();
    let owned = MeshOptions { nostr: relays.clone(), ..options(&folder, MeshChoice::Private(credentials)) };
    let owner = Node { mesh: Mesh::start(owned).await.unwrap(), folder };
    let member = join(&owner.mesh.invite(&Invitation::default()).await.unwrap()).await;
    let id = member.mesh.node_id();
    until(&owner.mesh, "the member", |table| lists(table, id)).await;
    member.mesh.leave().await;
    until(&owner.mesh, "the member has left", |table| !lists(table, id)).await;

    // It comes back knowing no address, and a stranger listens on the same relay.
    let stranger = with_nostr(&relays).await;
    let credentials = Credentials::load(member.folder.path(), &owner.mesh.mesh_id()).unwrap().unwrap();
    let back = MeshOptions { nostr: relays, ..options(&member.folder, MeshChoice::Private(credentials)) };
    let back = Mesh::start(back).await.unwrap();
    until(&back, "the owner", |table| lists(table, founder)).await;
    until(&owner.mesh, "the member is back", |table| lists(table, id)).await;
    assert!(stranger.mesh.peers().is_empty());
    seed.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_node_of_which_the_id_is_known_and_at_most_where_it_was_is_found_in_the_dht() {
    let dht = n0_mainline::Testnet::new(3).await.unwrap();
    let in_dht = |bootstrap: Vec<Contact>| {
        let nodes = dht.bootstrap.clone();
        async move {
            let folder = tempfile::tempdir().unwrap();
            let mut options = options(&folder, public());
            options.endpoint.dht = Some(Dht::Own(nodes));
            options.bootstrap = bootstrap;
            Node { mesh: Mesh::start(options).await.unwrap(), folder }
        }
    };
    let one = in_dht(Vec::new()).await;
    let left = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let known = |direct| vec![Contact { node: one.mesh.node_id(), addresses: Addresses { relay: None, direct } }];
    let (other, third) = (in_dht(known(Vec::new())).await, in_dht(known(vec![left])).await);
    all_know_all(&[one, other, third]).await;
}

#[tokio::test]
async fn a_node_that_is_known_by_its_relay_alone_is_reached_through_it() {
    let seed = Seed::start(SeedOptions::default()).await.unwrap();
    let relayed = |bootstrap: Vec<Contact>| {
        let relays = Relays::Own(vec![seed.relay_url().to_owned()]);
        async move {
            let folder = tempfile::tempdir().unwrap();
            let mut options = options(&folder, public());
            let bind = Some("127.0.0.1:0".parse().unwrap());
            options.endpoint = EndpointOptions { relays, bind, ..EndpointOptions::default() };
            options.bootstrap = bootstrap;
            Node { mesh: Mesh::start(options).await.unwrap(), folder }
        }
    };
    let one = relayed(Vec::new()).await;
    let addresses = Addresses { relay: Some(seed.relay_url().to_owned()), direct: Vec::new() };
    let other = relayed(vec![Contact { node: one.mesh.node_id(), addresses }]).await;
    all_know_all(&[one, other]).await;
}

#[tokio::test]
async fn nodes_find_each_other_on_the_local_network() {
    // No packet is sent; the system says which address it would send from.
    let probe = UdpSocket::bind("0.0.0.0:0").unwrap();
    let outward = probe.connect("192.0.2.1:9").and_then(|()| probe.local_addr());
    if !outward.is_ok_and(|address| !address.ip().is_loopback() && !address.ip().is_unspecified()) {
        println!("skipped: this machine has no interface but loopback");
        return;
    }
    let local = || async {
        let folder = tempfile::tempdir().unwrap();
        let mut options = options(&folder, MeshChoice::Public(format!("local {}", std::process::id())));
        options.endpoint.bind = None;
        options.mdns = true;
        Node { mesh: Mesh::start(options).await.unwrap(), folder }
    };
    let nodes = vec![local().await, local().await];
    all_know_all(&nodes).await;
}

#[tokio::test]
async fn a_wrong_contact_costs_one_failed_attempt_and_no_more() {
    let (real, other) = (start(public()).await, start(public()).await);
    let folder = tempfile::tempdir().unwrap();
    let mut misled = options(&folder, public());
    // The address of one node under the id of another: whoever answers there cannot prove to be that.
    misled.bootstrap =
        vec![Contact { node: other.mesh.node_id(), addresses: real.mesh.contact().addresses }, real.mesh.contact()];
    let mesh = Mesh::start(misled).await.unwrap();
    let (right, wrong) = (real.mesh.node_id(), other.mesh.node_id());
    let table = until(&mesh, "the real one", |table| lists(table, right)).await;
    assert!(!lists(&table, wrong));
}
