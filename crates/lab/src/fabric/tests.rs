use std::net::Ipv4Addr;

use proptest::prelude::*;

use super::*;
use crate::{
    Host, NatKind, Site,
    packet::{Transport, tests::packet},
};

const MS: u64 = 1_000_000;
/// Longer than anything in these tests is under way, shorter than a mapping lives.
const SETTLE_NS: u64 = 1000 * MS;

/// A fabric with a clock of its own.
struct Bench {
    fabric: Fabric,
    now_ns: u64,
}

/// A delivery, read.
#[derive(Debug, PartialEq)]
struct Arrival {
    host: String,
    source: SocketAddrV4,
    at_ns: u64,
}

impl Bench {
    fn new(topology: &Topology) -> Self {
        Self { fabric: Fabric::new(topology).unwrap(), now_ns: 0 }
    }

    fn address(&self, host: &str) -> Ipv4Addr {
        self.fabric.plan.hosts[self.fabric.plan.host(host).unwrap()].address
    }

    /// A host sends from port 5000; returns what arrives anywhere at once.
    fn send(&mut self, from: &str, to: SocketAddrV4) -> Vec<Arrival> {
        let source = SocketAddrV4::new(self.address(from), 5000);
        let bytes = packet(Transport::Udp, source, to, b"data").bytes().to_vec();
        let host = self.fabric.plan.host(from).unwrap();
        let mut out = Vec::new();
        self.fabric.send(host, bytes, self.now_ns, &mut out);
        self.read(out)
    }

    /// Lets time pass from event to event; returns all that arrives.
    fn pass(&mut self, span_ns: u64) -> Vec<Arrival> {
        let end_ns = self.now_ns + span_ns;
        let mut arrivals = Vec::new();
        while let Some(next_ns) = self.fabric.next_ns().filter(|at_ns| *at_ns <= end_ns) {
            self.now_ns = next_ns;
            let mut out = Vec::new();
            self.fabric.advance(next_ns, &mut out);
            arrivals.extend(self.read(out));
        }
        self.now_ns = end_ns;
        arrivals
    }

    fn send_and_settle(&mut self, from: &str, to: SocketAddrV4) -> Vec<Arrival> {
        let mut arrivals = self.send(from, to);
        arrivals.extend(self.pass(SETTLE_NS));
        arrivals
    }

    fn read(&self, out: Vec<Delivery>) -> Vec<Arrival> {
        let read = |delivery: Delivery| Arrival {
            host: self.fabric.plan.hosts[delivery.host].name.clone(),
            source: delivery.packet.flow().unwrap().source,
            at_ns: self.now_ns,
        };
        out.into_iter().map(read).collect()
    }

    fn end(&self, host: &str) -> SocketAddrV4 {
        SocketAddrV4::new(self.address(host), 5000)
    }
}

/// Two homes with one host each (`a`, `b`) behind NATs, and a public server; 50 ms between any two.
fn two_homes(one: NatKind, other: NatKind) -> Topology {
    let mut topology = Topology::of_hosts(["server"])
        .with_site(Site::new("home-a").behind(one))
        .with_site(Site::new("home-b").behind(other))
        .with_host(Host::new("a").at("home-a"))
        .with_host(Host::new("b").at("home-b"));
    topology.default_route = Link::delay(50.0);
    topology
}

#[test]
fn links_in_series_add_up_and_hosts_of_one_site_use_their_own_alone() {
    let mut topology = Topology::of_hosts(["server"]).with_site(Site {
        up: Link::delay(3.0),
        down: Link::delay(100.0),
        ..Site::new("home").behind(NatKind::FullCone)
    });
    topology.hosts[0].down = Link::delay(5.0);
    topology = topology
        .with_host(Host { up: Link::delay(2.0), ..Host::new("a").at("home") })
        .with_host(Host { down: Link::delay(7.0), ..Host::new("b").at("home") });
    topology.default_route = Link::delay(40.0);
    let mut bench = Bench::new(&topology);
    let arrivals = bench.send_and_settle("a", bench.end("server"));
    assert_eq!(arrivals.len(), 1);
    assert_eq!(arrivals[0].at_ns, 50 * MS);
    let sent_ns = bench.now_ns;
    let arrivals = bench.send_and_settle("a", bench.end("b"));
    assert_eq!(arrivals[0].at_ns - sent_ns, 9 * MS);
    assert_eq!(arrivals[0].source, bench.end("a"), "nothing is translated");
}

#[test]
fn a_packet_without_delay_arrives_in_the_call_that_sends_it() {
    let mut bench = Bench::new(&Topology::of_hosts(["a", "b"]));
    assert_eq!(bench.send("a", bench.end("b")).len(), 1);
    assert_eq!(bench.fabric.next_ns(), None);
}

#[test]
fn a_partition_cuts_what_is_under_way_and_healing_lets_the_rest_through() {
    let mut topology = Topology::of_hosts(["a", "b", "c"]);
    topology.default_route = Link::delay(50.0);
    let mut bench = Bench::new(&topology);
    let b = bench.end("b");
    bench.send("a", b);
    bench.fabric.partition(&[&["a", "c"]]).unwrap();
    assert_eq!(bench.pass(SETTLE_NS), []);
    let c = bench.end("c");
    assert_eq!(bench.send_and_settle("a", c).len(), 1, "those of one part reach each other");
    bench.fabric.heal();
    assert_eq!(bench.send_and_settle("a", b).len(), 1);
    assert_eq!(bench.fabric.counters().cut_off, 1);
}

#[test]
fn an_isolated_host_neither_sends_nor_receives() {
    let mut bench = Bench::new(&Topology::of_hosts(["a", "b", "c"]));
    let (a, b, c) = (bench.end("a"), bench.end("b"), bench.end("c"));
    bench.fabric.set_isolated("a", true).unwrap();
    assert_eq!(bench.send("a", b), []);
    assert_eq!(bench.send("b", a), []);
    assert_eq!(bench.send("b", c).len(), 1);
    bench.fabric.set_isolated("a", false).unwrap();
    assert_eq!(bench.send("a", b).len(), 1);
}

#[test]
fn simultaneous_hole_punching_works_for_the_pairs_of_nats_that_theory_says() {
    use NatKind::*;
    for one in [FullCone, RestrictedCone, PortRestrictedCone, Symmetric] {
        for other in [FullCone, RestrictedCone, PortRestrictedCone, Symmetric] {
            let mut bench = Bench::new(&two_homes(one, other));
            let server = bench.end("server");
            let seen_a = bench.send_and_settle("a", server)[0].source;
            let seen_b = bench.send_and_settle("b", server)[0].source;
            // Both send at once, then again: the second packets find the holes of the first.
            for _ in 0..2 {
                bench.send("a", seen_b);
                bench.send("b", seen_a);
                bench.pass(10 * MS);
            }
            let arrivals = bench.pass(SETTLE_NS);
            // Each answers to where it got a packet from.
            let works = !arrivals.is_empty() && {
                let Arrival { host, source, .. } = &arrivals[0];
                !bench.send_and_settle(host, *source).is_empty()
            };
            let hopeless =
                matches!((one, other), (Symmetric, Symmetric | PortRestrictedCone) | (PortRestrictedCone, Symmetric));
            assert_eq!(works, !hopeless, "{one:?} and {other:?}");
        }
    }
}

#[test]
fn a_nat_decides_when_a_packet_arrives_and_not_when_it_was_sent() {
    let mut bench = Bench::new(&two_homes(NatKind::PortRestrictedCone, NatKind::FullCone));
    let server = bench.end("server");
    let seen_a = bench.send_and_settle("a", server)[0].source;
    let seen_b = bench.send_and_settle("b", server)[0].source;
    bench.send("b", seen_a);
    bench.pass(20 * MS);
    bench.send("a", seen_b);
    let arrived = bench.pass(SETTLE_NS);
    assert!(
        arrived.iter().any(|arrival| arrival.host == "a"),
        "a opened the way while the packet travelled: {arrived:?}"
    );
}

#[test]
fn two_sites_may_use_the_same_private_addresses() {
    let mut topology = two_homes(NatKind::FullCone, NatKind::FullCone);
    for host in &mut topology.hosts[1..] {
        host.address = Some(Ipv4Addr::new(192, 168, 1, 2));
    }
    let mut bench = Bench::new(&topology);
    let server = bench.end("server");
    let seen_a = bench.send_and_settle("a", server)[0].source;
    let arrivals = bench.send_and_settle("b", seen_a);
    assert_eq!(arrivals.len(), 1);
    assert_eq!(arrivals[0].host, "a");
}

#[test]
fn hosts_behind_one_nat_reach_each_other_by_its_outer_address_only_where_it_hairpins() {
    for hairpin in [true, false] {
        let nat = NatSettings { hairpin, ..NatKind::FullCone.into() };
        let mut bench =
            Bench::new(&two_homes(NatKind::FullCone, NatKind::FullCone).with_host(Host::new("c").at("home-a")));
        bench.fabric.set_nat("home-a", nat).unwrap();
        let server = bench.end("server");
        let seen_a = bench.send_and_settle("a", server)[0].source;
        let arrivals = bench.send_and_settle("c", seen_a);
        assert_eq!(arrivals.len(), usize::from(hairpin));
        if let Some(arrival) = arrivals.first() {
            assert_eq!(arrival.source.ip(), seen_a.ip(), "REQ-9: it comes from the outer address");
        }
    }
}

#[test]
fn private_addresses_lead_nowhere_from_outside() {
    let mut bench = Bench::new(&two_homes(NatKind::FullCone, NatKind::FullCone));
    let a = bench.end("a");
    assert_eq!(bench.send_and_settle("server", a), []);
    assert_eq!(bench.send_and_settle("b", a), []);
    assert_eq!(bench.fabric.counters().no_route, 2);
}

#[test]
fn multicast_reaches_all_others_of_the_site_and_nobody_else() {
    let topology = two_homes(NatKind::FullCone, NatKind::FullCone)
        .with_host(Host::new("c").at("home-a"))
        .with_host(Host::new("d").at("home-a"));
    let mut bench = Bench::new(&topology);
    let arrivals = bench.send_and_settle("a", "224.0.0.251:5353".parse().unwrap());
    let hosts: Vec<&str> = arrivals.iter().map(|arrival| arrival.host.as_str()).collect();
    assert_eq!(hosts, ["c", "d"]);
    assert_eq!(bench.send_and_settle("server", "224.0.0.251:5353".parse().unwrap()), []);
}

#[test]
fn a_host_cannot_send_in_the_name_of_another() {
    let mut bench = Bench::new(&Topology::of_hosts(["a", "b"]));
    let (a, b) = (bench.end("a"), bench.end("b"));
    let forged = packet(Transport::Udp, b, a, b"data").bytes().to_vec();
    let mut out = Vec::new();
    bench.fabric.send(0, forged, 0, &mut out);
    assert!(out.is_empty());
    assert_eq!(bench.fabric.counters().malformed, 1);
}

#[test]
fn a_changed_link_acts_on_the_next_packet() {
    let mut bench = Bench::new(&Topology::of_hosts(["a", "b"]));
    let b = bench.end("b");
    bench.fabric.set_link(&Wire::Up("a".into()), &Link::lossy(1.0)).unwrap();
    assert_eq!(bench.send_and_settle("a", b), []);
    bench.fabric.set_link(&Wire::Up("a".into()), &Link::default()).unwrap();
    bench.fabric.set_link(&Wire::Route("a".into(), "b".into()), &Link::delay(9.0)).unwrap();
    let sent_ns = bench.now_ns;
    assert_eq!(bench.send_and_settle("a", b)[0].at_ns - sent_ns, 9 * MS);
    let error = bench.fabric.set_link(&Wire::Down("x".into()), &Link::default()).unwrap_err();
    assert_eq!(error.to_string(), "the lab has no host `x`");
    assert!(bench.fabric.set_link(&Wire::Down("a".into()), &Link::lossy(1.5)).is_err());
    assert!(bench.fabric.set_link(&Wire::Route("a".into(), "a".into()), &Link::default()).is_err());
}

#[test]
fn what_is_under_way_is_bounded() {
    let mut topology = Topology::of_hosts(["a", "b"]);
    topology.default_route = Link::delay(60_000.0);
    let mut bench = Bench::new(&topology);
    let (a, b) = (bench.end("a"), bench.end("b"));
    let bytes = packet(Transport::Udp, a, b, &vec![0; 60_000]).bytes().to_vec();
    let fitting = UNDER_WAY_BYTES_MAX / bytes.len();
    for _ in 0..fitting + 10 {
        bench.fabric.send(0, bytes.clone(), 0, &mut Vec::new());
    }
    assert_eq!(bench.fabric.counters().too_many, 10);
    bench.pass(61_000 * MS);
    assert_eq!(bench.fabric.counters().delivered as usize, fitting);
    assert_eq!(bench.fabric.under_way_bytes, 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn every_packet_is_accounted_for_and_the_seed_decides_all_chance(
        seed in any::<u64>(),
        loss in 0.0f64..0.5,
        jitter_ms in 0.0f64..20.0,
        rate_mbit_s in 0.1f64..10.0,
        sends in proptest::collection::vec((0usize..3, 0usize..3, 0u64..5 * MS), 1..100),
    ) {
        let run = || {
            let mut topology = two_homes(NatKind::FullCone, NatKind::Symmetric);
            topology.seed = seed;
            topology.hosts[0].up = Link { loss, jitter_ms, queue_bytes: 3000, ..Link::rate(rate_mbit_s) };
            topology.default_route = Link { loss, jitter_ms, reorders: true, ..Link::delay(10.0) };
            let mut bench = Bench::new(&topology);
            let names = ["server", "a", "b"];
            let outer = |site| SocketAddrV4::new(Ipv4Addr::new(198, 19, 0, site), 5000);
            let ends = [bench.end("server"), outer(1), outer(2)];
            let mut arrivals = Vec::new();
            for (from, to, gap_ns) in &sends {
                arrivals.extend(bench.send(names[*from], ends[*to]));
                arrivals.extend(bench.pass(*gap_ns));
            }
            arrivals.extend(bench.pass(10 * SETTLE_NS));
            (arrivals, bench.fabric.counters())
        };
        let (arrivals, counters) = run();
        let Counters { delivered, lost, queue_full, cut_off, refused_by_nat, no_route, malformed, too_many } = counters;
        let all = delivered + lost + queue_full + cut_off + refused_by_nat + no_route + malformed + too_many;
        prop_assert_eq!(all as usize, sends.len());
        prop_assert_eq!(delivered as usize, arrivals.len());
        prop_assert_eq!(run().0, arrivals);
    }
}
