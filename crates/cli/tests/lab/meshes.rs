//! Several meshes in one network, and who is let into a private one.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use murmur_lab::{Host, NatKind, Site, Topology};
use serde_json::Value;

use crate::{
    clocks::home_ahead,
    common::{Home, until},
    world::{Node, Seed, UNAIDED, lab, run, with},
};

/// Neighbours have told each other whom they know, which they do every ten seconds, and everybody was announced.
fn is_old(peer: &Value) -> bool {
    peer["since_s"].as_u64().unwrap() > 10
}

#[test]
fn meshes_in_one_network_do_not_see_each_other_whatever_they_are_called() {
    let mut topology = Topology::of_hosts(["seed"]).with_site(Site::new("flat").behind(NatKind::PortRestrictedCone));
    for name in ["founder", "guest", "public-1", "public-2", "park-1", "park-2"] {
        topology = topology.with_host(Host::new(name).at("flat"));
    }
    let Some(lab) = lab(&topology) else { return };
    let host = |name| lab.host(name).unwrap();
    // All of them listen on the same local network and on the same relays.
    let seed = Seed::start(host("seed"));
    let ways = [format!("--nostr-relay={}", seed.nostr), format!("--relay={}", seed.relay)];
    let ways = ways.each_ref().map(String::as_str);
    // A private mesh and a public one of the same name, and another public one.
    let founder = Node::founder(host("founder"), Home::new(), &ways);
    let guest = Node::client(host("guest"), Home::new(), &with(&ways, &founder.join()));
    let public = |name, mesh| Node::serving(host(name), Home::new(), &with(&ways, mesh));
    let home = [public("public-1", "--mesh=home"), public("public-2", "--mesh=home")];
    let park = [public("park-1", "--mesh=park"), public("park-2", "--mesh=park")];
    for [one, other] in [[&founder, &guest], [&home[0], &home[1]], [&park[0], &park[1]]] {
        for (node, peer) in [(one, other), (other, one)] {
            let name = node.host.name();
            until(&format!("{name} knows a peer long enough"), || node.peers().iter().any(is_old).then_some(()));
            assert_eq!(node.peers().iter().map(|peer| &peer["node"]).collect::<Vec<_>>(), [peer.id()], "{name}");
        }
    }
    let join = park[0].join();
    home[0].mesh(["join", join.trim_start_matches("--join=")]).fails(2, "park");
}

#[test]
fn tickets_that_have_expired_or_were_revoked_are_refused_with_the_reason_whatever_the_bearers_clock_says() {
    let Some(lab) = lab(&Topology::of_hosts(["founder", "guest"])) else { return };
    let founder = Node::founder(lab.host("founder").unwrap(), Home::new(), &UNAIDED);
    let comes_in = |home: &Home, invitation: &Value| {
        let join = format!("--join={}", invitation["ticket"].as_str().unwrap());
        run(lab.host("guest").unwrap(), home, ["client"].into_iter().chain(with(&UNAIDED, &join)))
    };
    let revoked = founder.invite([]);
    founder.mesh(["revoke", revoked["id"].as_str().unwrap()]).succeeds();
    comes_in(&Home::new(), &revoked).fails(5, "revoked");

    let short = founder.invite(["--valid=1s"]);
    let expires = UNIX_EPOCH + Duration::from_millis(short["expires_unix_ms"].as_u64().unwrap());
    std::thread::sleep(expires.duration_since(SystemTime::now()).unwrap_or_default());
    for ahead_s in [0, -600] {
        comes_in(&home_ahead(ahead_s), &short).fails(5, "expired");
    }
}
