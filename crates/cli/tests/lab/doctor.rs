//! What `murmur doctor` finds behind NATs, without the services that it is told of, and with a clock that is wrong.

use murmur_lab::{Host, HostHandle, NatKind, Site, Topology};
use serde_json::Value;

use crate::{
    clocks::home_ahead,
    common::{Home, until},
    world::{Node, Seed, lab, run, with},
};

/// One finding.
#[track_caller]
fn finding<'a>(report: &'a Value, name: &str) -> &'a Value {
    let checks = report["checks"].as_array().unwrap();
    checks.iter().find(|check| check["name"] == name).unwrap_or_else(|| panic!("no {name:?} in {report}"))
}

/// Checks a finding, and that its advice says something where something is to be done.
#[track_caller]
fn finds(report: &Value, name: &str, verdict: &str, found: &str, advice: &str) {
    let check = finding(report, name);
    let text = |key: &str| check[key].as_str().unwrap();
    assert!(check["verdict"] == verdict && text("found").contains(found) && text("advice").contains(advice), "{check}");
    assert_eq!(text("advice").is_empty(), verdict == "ok", "{check}");
}

/// What a machine hears that uses the services of these seeds, and these arguments.
fn doctor(host: HostHandle<'_>, home: &Home, seeds: &[Seed], arguments: &[&str]) -> Value {
    let services = [relays(seeds), format!("--nostr-relay={}", seeds[0].nostr)];
    let services = services.iter().map(String::as_str);
    let arguments = ["doctor", "--json"].into_iter().chain(services).chain(arguments.iter().copied());
    run(host, home, arguments).succeeds().json()
}

/// The flag that names the relays of all of these.
fn relays(seeds: &[Seed]) -> String {
    format!("--relay={}", seeds.iter().map(|seed| seed.relay.as_str()).collect::<Vec<_>>().join(","))
}

/// A founder at home behind a symmetric NAT, a guest at home behind another one or on the internet, and two seeds there. In both
/// places the services of the seeds answer and tell the NAT, and one connection is there of this kind.
fn hears_of_connections(guest_at_home: bool, path: &str, verdict: &str, found: &str, advice: &str) {
    let site = |name| Site::new(name).behind(NatKind::Symmetric);
    let guest = Host::new("guest");
    let topology = Topology::of_hosts(["seed", "second"]).with_site(site("green")).with_site(site("blue"));
    let topology = topology.with_host(Host::new("founder").at("green"));
    let Some(lab) = lab(&topology.with_host(if guest_at_home { guest.at("blue") } else { guest })) else { return };
    let seeds = ["seed", "second"].map(|name| Seed::start(lab.host(name).unwrap()));
    let relay = relays(&seeds);
    let ways = ["--no-nostr", "--no-mdns", &relay];
    let home = Home::new();
    run(lab.host("founder").unwrap(), &home, ["mesh", "create", "home"]).succeeds();
    let founder = Node::client(lab.host("founder").unwrap(), home, &with(&ways, "--mesh=home"));
    founder.waits_for_its_relay();
    let guest = Node::client(lab.host("guest").unwrap(), Home::new(), &with(&ways, &founder.join()));
    for (node, other) in [(&founder, &guest), (&guest, &founder)] {
        until(&format!("the other node is {path}"), || node.path_to(other).starts_with(path).then_some(()));
        let report = doctor(node.host, &node.home, &seeds, &["--api", &node.server.address]);
        finds(&report, "mesh", verdict, found, advice);
        finds(&report, "relay", "ok", &format!("{} answers in", seeds[0].relay), "");
        finds(&report, "Nostr relay", "ok", &format!("{} answers in", seeds[0].nostr), "");
        finds(&report, "clock", "ok", "right, by the clocks of relays", "");
        finds(&report, "UDP", "ok", &node.host.address().to_string(), "");
        finds(&report, "way out", "ok", "UDP goes out; others see", "");
        match guest_at_home || node.id() == founder.id() {
            true => finds(&report, "NAT", "warn", "symmetric", "Forward a UDP port"),
            false => finds(&report, "NAT", "ok", "none", ""),
        }
    }
}

#[test]
fn behind_a_nat_doctor_finds_the_direct_connection_to_a_machine_on_the_internet() {
    let found = "is in mesh home; other nodes: 1, connections: 1 direct, 0 through relays";
    hears_of_connections(false, "direct", "ok", found, "");
}

#[test]
fn behind_two_symmetric_nats_doctor_finds_that_everything_goes_through_a_relay_and_says_what_to_do() {
    let found = "is in mesh home; other nodes: 1, connections: 0 direct, 1 through relays";
    hears_of_connections(true, "relayed", "warn", found, "--bind");
}

#[test]
fn a_machine_that_is_in_no_mesh_hears_of_services_that_do_not_answer() {
    let Some(lab) = lab(&Topology::of_hosts(["seed", "here"])) else { return };
    let (seeds, here, home) = ([Seed::start(lab.host("seed").unwrap())], lab.host("here").unwrap(), Home::new());
    let report = doctor(here, &home, &seeds, &[]);
    finds(&report, "mesh", "ok", "no node of a mesh is running here", "");
    finds(&report, "relay", "ok", "answers in", "");

    lab.isolate("seed").unwrap();
    let report = doctor(here, &home, &seeds, &[]);
    finds(&report, "way out", "warn", "no relay answers", "TCP port 443");
    finds(&report, "relay", "warn", &format!("{} does not answer", seeds[0].relay), "name another one with --relay");
    finds(&report, "Nostr relay", "warn", "does not answer", "name another one with --nostr-relay");
    finds(&report, "clock", "ok", "nobody is there to compare it with", "");
    finds(&report, "UDP", "ok", &here.address().to_string(), "");
}

#[test]
fn a_clock_that_is_ten_minutes_off_is_told_with_its_direction() {
    let Some(lab) = lab(&Topology::of_hosts(["seed", "here"])) else { return };
    let (seeds, here) = ([Seed::start(lab.host("seed").unwrap())], lab.host("here").unwrap());
    for (ahead_s, side) in [(600, "fast"), (-600, "slow")] {
        let report = doctor(here, &home_ahead(ahead_s), &seeds, &[]);
        finds(&report, "clock", "warn", side, "timedatectl set-ntp true");
        let found = finding(&report, "clock")["found"].as_str().unwrap();
        // A second is what it takes to ask, and a busy machine takes more.
        assert!(["10 min", "9 min 5"].iter().any(|about| found.contains(about)), "{found}");
        assert!(found.ends_with("by the clocks of relays"), "{found}");
    }
}
