//! Network address translation, in the terms of RFC 4787.
//!
//! A NAT gives an inner endpoint (address and port) an outer port: a *mapping*. Kinds differ in two ways. *Mapping*: does the
//! same inner endpoint keep its outer port for every remote it talks to (endpoint-independent), or get one for each?
//! *Filtering*: who may send in through a mapping: anyone, any port of an address that was sent to, or exactly the endpoints
//! that were sent to?
//!
//! | kind | mapping | filtering | hole punching |
//! |---|---|---|---|
//! | full cone | endpoint-independent | endpoint-independent | not needed |
//! | restricted cone | endpoint-independent | address-dependent | works |
//! | port-restricted cone | endpoint-independent | address- and port-dependent | works, except with a symmetric one |
//! | symmetric | address- and port-dependent | address- and port-dependent | fails with itself and port-restricted ones |
//!
//! Cones keep the inner port number where it is free, as most home routers do; a symmetric NAT takes ports at random, so that
//! they cannot be guessed. Only outbound packets keep a mapping alive (REQ-6 asks for no more). TCP is treated like UDP: its
//! states are not followed. ICMP echo is mapped by its identifier (RFC 5508). Fragments, ICMP errors and all else are dropped.

use std::{
    collections::HashMap,
    net::{Ipv4Addr, SocketAddrV4},
};

use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::packet::Transport;

/// Mappings that one NAT holds; where all are alive, nothing new gets out. Home routers hold as many or fewer.
pub const MAPPINGS_MAX: usize = 4096;
/// Remotes that one mapping lets in; beyond it the one that was sent to the longest ago is forgotten.
pub const REMOTES_PER_MAPPING_MAX: usize = 1024;
/// Mappings live for so long after the last outbound packet, in seconds, where nothing else is said: RFC 4787 asks for two
/// minutes at least.
pub const IDLE_S_DEFAULT: u32 = 120;
/// Ports below are never given out.
const PORT_MIN: u16 = 1024;
const NS_PER_S: u64 = 1_000_000_000;

/// How a NAT maps and filters; see the [module page](self).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NatKind {
    /// One outer port per inner endpoint; anyone may send to it.
    FullCone,
    /// One outer port per inner endpoint; addresses that were sent to may send to it.
    RestrictedCone,
    /// One outer port per inner endpoint; endpoints that were sent to may send to it.
    PortRestrictedCone,
    /// One outer port per inner endpoint and remote endpoint; only that remote may send to it.
    Symmetric,
}

/// A NAT as a topology states it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NatSettings {
    /// How it maps and filters.
    pub kind: NatKind,
    /// Whether hosts behind it reach each other by its outer address (REQ-9 asks for it; many devices do not).
    #[serde(default = "yes")]
    pub hairpin: bool,
    /// Whether it lets no UDP out, as some companies' networks do.
    #[serde(default)]
    pub blocks_udp: bool,
    /// How long a mapping lives after its last outbound packet, in seconds.
    #[serde(default = "idle_s_default")]
    pub idle_s: u32,
}

fn yes() -> bool {
    true
}

fn idle_s_default() -> u32 {
    IDLE_S_DEFAULT
}

impl From<NatKind> for NatSettings {
    fn from(kind: NatKind) -> Self {
        Self { kind, hairpin: true, blocks_udp: false, idle_s: IDLE_S_DEFAULT }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct MappingKey {
    transport: Transport,
    inner: SocketAddrV4,
    /// Set where the mapping depends on the remote.
    remote: Option<SocketAddrV4>,
}

#[derive(Debug)]
struct Mapping {
    key: MappingKey,
    last_sent_ns: u64,
    /// Who was sent to, and when last; addresses alone have port 0. Empty where everyone is let in.
    remotes: HashMap<SocketAddrV4, u64>,
}

/// One NAT with its table. Time is an argument, in nanoseconds of the caller's clock.
#[derive(Debug)]
pub struct Nat {
    settings: NatSettings,
    outer_address: Ipv4Addr,
    ports: HashMap<MappingKey, u16>,
    mappings: HashMap<(Transport, u16), Mapping>,
}

impl Nat {
    /// An empty table behind one outer address.
    pub fn new(settings: NatSettings, outer_address: Ipv4Addr) -> Self {
        Self { settings, outer_address, ports: HashMap::new(), mappings: HashMap::new() }
    }

    /// How it was set up.
    pub fn settings(&self) -> NatSettings {
        self.settings
    }

    /// The address that the world sees.
    pub fn outer_address(&self) -> Ipv4Addr {
        self.outer_address
    }

    /// A packet goes out from `inner` to `remote`: the outer endpoint it comes from. None where it does not get out.
    pub fn outbound(
        &mut self,
        transport: Transport,
        inner: SocketAddrV4,
        remote: SocketAddrV4,
        now_ns: u64,
        random: &mut impl Rng,
    ) -> Option<SocketAddrV4> {
        if self.settings.blocks_udp && transport == Transport::Udp {
            return None;
        }
        let depends_on_remote = self.settings.kind == NatKind::Symmetric;
        let key = MappingKey { transport, inner, remote: depends_on_remote.then_some(remote) };
        let port = match self.alive_port(&key, now_ns) {
            Some(port) => port,
            None => self.open(key, now_ns, random)?,
        };
        let allowed = self.filter_entry(remote);
        let mapping = self.mappings.get_mut(&(transport, port))?;
        mapping.last_sent_ns = now_ns;
        if let Some(allowed) = allowed {
            allow(&mut mapping.remotes, allowed, now_ns);
        }
        Some(SocketAddrV4::new(self.outer_address, port))
    }

    /// A packet comes in from `remote` to the outer port: the inner endpoint it goes to. None where it is not let in.
    pub fn inbound(
        &self,
        transport: Transport,
        outer_port: u16,
        remote: SocketAddrV4,
        now_ns: u64,
    ) -> Option<SocketAddrV4> {
        let mapping = self.mappings.get(&(transport, outer_port))?;
        if !self.is_alive(mapping.last_sent_ns, now_ns) {
            return None;
        }
        let let_in = self
            .filter_entry(remote)
            .is_none_or(|entry| mapping.remotes.get(&entry).is_some_and(|sent_ns| self.is_alive(*sent_ns, now_ns)));
        let_in.then_some(mapping.key.inner)
    }

    /// What of a remote the filter looks at. None where it looks at nothing.
    fn filter_entry(&self, remote: SocketAddrV4) -> Option<SocketAddrV4> {
        match self.settings.kind {
            NatKind::FullCone => None,
            NatKind::RestrictedCone => Some(SocketAddrV4::new(*remote.ip(), 0)),
            NatKind::PortRestrictedCone | NatKind::Symmetric => Some(remote),
        }
    }

    fn is_alive(&self, last_sent_ns: u64, now_ns: u64) -> bool {
        now_ns.saturating_sub(last_sent_ns) < u64::from(self.settings.idle_s) * NS_PER_S
    }

    fn alive_port(&self, key: &MappingKey, now_ns: u64) -> Option<u16> {
        let port = *self.ports.get(key)?;
        let mapping = self.mappings.get(&(key.transport, port))?;
        self.is_alive(mapping.last_sent_ns, now_ns).then_some(port)
    }

    fn open(&mut self, key: MappingKey, now_ns: u64, random: &mut impl Rng) -> Option<u16> {
        // An expired mapping of the same key gives its port back first.
        if let Some(port) = self.ports.remove(&key) {
            self.mappings.remove(&(key.transport, port));
        }
        if self.mappings.len() >= MAPPINGS_MAX {
            self.sweep(now_ns);
            if self.mappings.len() >= MAPPINGS_MAX {
                return None;
            }
        }
        let inner_port = key.inner.port();
        let keeps_port = self.settings.kind != NatKind::Symmetric && inner_port >= PORT_MIN;
        let first = if keeps_port { inner_port } else { random.random_range(PORT_MIN..=u16::MAX) };
        let port = (first..=u16::MAX).chain(PORT_MIN..first).find(|port| self.claim(key.transport, *port, now_ns))?;
        self.ports.insert(key, port);
        self.mappings.insert((key.transport, port), Mapping { key, last_sent_ns: now_ns, remotes: HashMap::new() });
        Some(port)
    }

    /// Whether a port can be given out; what has expired on it is removed.
    fn claim(&mut self, transport: Transport, port: u16, now_ns: u64) -> bool {
        let Some(mapping) = self.mappings.get(&(transport, port)) else { return true };
        if self.is_alive(mapping.last_sent_ns, now_ns) {
            return false;
        }
        self.ports.remove(&mapping.key);
        self.mappings.remove(&(transport, port));
        true
    }

    fn sweep(&mut self, now_ns: u64) {
        let idle_ns = u64::from(self.settings.idle_s) * NS_PER_S;
        self.mappings.retain(|_, mapping| now_ns.saturating_sub(mapping.last_sent_ns) < idle_ns);
        self.ports.retain(|key, port| self.mappings.contains_key(&(key.transport, *port)));
    }
}

fn allow(remotes: &mut HashMap<SocketAddrV4, u64>, remote: SocketAddrV4, now_ns: u64) {
    let is_full = remotes.len() >= REMOTES_PER_MAPPING_MAX;
    if is_full && !remotes.contains_key(&remote) {
        let oldest = remotes.iter().min_by_key(|(_, sent_ns)| **sent_ns).map(|(remote, _)| *remote);
        if let Some(oldest) = oldest {
            remotes.remove(&oldest);
        }
    }
    remotes.insert(remote, now_ns);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::{SeedableRng, rngs::StdRng};

    use super::*;

    const OUTER: Ipv4Addr = Ipv4Addr::new(198, 19, 0, 1);
    const KINDS: [NatKind; 4] =
        [NatKind::FullCone, NatKind::RestrictedCone, NatKind::PortRestrictedCone, NatKind::Symmetric];

    fn end(text: &str) -> SocketAddrV4 {
        text.parse().unwrap()
    }

    /// A NAT of which the test says who sends and who tries to answer.
    struct Bench {
        nat: Nat,
        random: StdRng,
        now_ns: u64,
    }

    impl Bench {
        fn new(settings: impl Into<NatSettings>) -> Self {
            Self { nat: Nat::new(settings.into(), OUTER), random: StdRng::seed_from_u64(3), now_ns: 0 }
        }

        fn try_send(&mut self, inner: &str, remote: &str) -> Option<u16> {
            let sent = self.nat.outbound(Transport::Udp, end(inner), end(remote), self.now_ns, &mut self.random);
            sent.map(|outer| {
                assert_eq!(*outer.ip(), OUTER);
                outer.port()
            })
        }

        fn send(&mut self, inner: &str, remote: &str) -> u16 {
            self.try_send(inner, remote).unwrap()
        }

        fn receives(&self, port: u16, remote: &str) -> bool {
            self.nat.inbound(Transport::Udp, port, end(remote), self.now_ns).is_some()
        }
    }

    #[test]
    fn cones_map_by_the_inner_endpoint_alone_and_symmetric_by_both() {
        for kind in KINDS {
            let mut bench = Bench::new(kind);
            let first = bench.send("10.0.0.1:5000", "8.8.8.8:53");
            let same = bench.send("10.0.0.1:5000", "8.8.8.8:53");
            let other_port = bench.send("10.0.0.1:5000", "8.8.8.8:54");
            let other_address = bench.send("10.0.0.1:5000", "9.9.9.9:53");
            assert_eq!(first, same, "{kind:?}");
            let independent = kind != NatKind::Symmetric;
            assert_eq!(first == other_port, independent, "{kind:?}");
            assert_eq!(first == other_address, independent, "{kind:?}");
        }
    }

    #[test]
    fn each_kind_lets_in_whom_its_definition_names() {
        for (kind, other_port, stranger) in [
            (NatKind::FullCone, true, true),
            (NatKind::RestrictedCone, true, false),
            (NatKind::PortRestrictedCone, false, false),
            (NatKind::Symmetric, false, false),
        ] {
            let mut bench = Bench::new(kind);
            let port = bench.send("10.0.0.1:5000", "8.8.8.8:53");
            assert!(bench.receives(port, "8.8.8.8:53"), "{kind:?}");
            assert_eq!(bench.receives(port, "8.8.8.8:54"), other_port, "{kind:?}");
            assert_eq!(bench.receives(port, "9.9.9.9:53"), stranger, "{kind:?}");
            assert!(!bench.receives(port ^ 1, "8.8.8.8:53"), "{kind:?}: nothing is mapped there");
        }
    }

    #[test]
    fn a_cone_keeps_the_port_number_where_it_is_free() {
        let mut bench = Bench::new(NatKind::PortRestrictedCone);
        assert_eq!(bench.send("10.0.0.1:5000", "8.8.8.8:53"), 5000);
        let second = bench.send("10.0.0.2:5000", "8.8.8.8:53");
        assert_ne!(second, 5000);
        let inner = |port| bench.nat.inbound(Transport::Udp, port, end("8.8.8.8:53"), 0).unwrap();
        assert_eq!(inner(5000), end("10.0.0.1:5000"));
        assert_eq!(inner(second), end("10.0.0.2:5000"));
    }

    #[test]
    fn a_mapping_ends_when_nothing_goes_out_and_gets_no_life_from_what_comes_in() {
        for kind in KINDS {
            let mut bench = Bench::new(NatSettings { idle_s: 30, ..kind.into() });
            let port = bench.send("10.0.0.1:5000", "8.8.8.8:53");
            bench.now_ns = 29 * NS_PER_S;
            assert!(bench.receives(port, "8.8.8.8:53"));
            bench.now_ns = 30 * NS_PER_S;
            assert!(!bench.receives(port, "8.8.8.8:53"), "{kind:?}");
            let again = bench.send("10.0.0.1:5000", "8.8.8.8:53");
            assert!(bench.receives(again, "8.8.8.8:53"));
            bench.now_ns = 59 * NS_PER_S;
            bench.send("10.0.0.1:5000", "8.8.8.8:53");
            bench.now_ns = 88 * NS_PER_S;
            assert!(bench.receives(again, "8.8.8.8:53"), "{kind:?}: going out keeps it");
        }
    }

    #[test]
    fn the_filter_forgets_a_remote_while_the_mapping_lives_on_with_others() {
        let mut bench = Bench::new(NatSettings { idle_s: 30, ..NatKind::PortRestrictedCone.into() });
        let port = bench.send("10.0.0.1:5000", "8.8.8.8:53");
        bench.now_ns = 20 * NS_PER_S;
        bench.send("10.0.0.1:5000", "9.9.9.9:53");
        bench.now_ns = 40 * NS_PER_S;
        assert!(!bench.receives(port, "8.8.8.8:53"));
        assert!(bench.receives(port, "9.9.9.9:53"));
    }

    #[test]
    fn udp_can_be_blocked_while_tcp_passes() {
        let mut bench = Bench::new(NatSettings { blocks_udp: true, ..NatKind::FullCone.into() });
        assert_eq!(bench.try_send("10.0.0.1:5000", "8.8.8.8:53"), None);
        let tcp = bench.nat.outbound(Transport::Tcp, end("10.0.0.1:5000"), end("8.8.8.8:53"), 0, &mut bench.random);
        assert!(tcp.is_some());
    }

    #[test]
    fn a_full_table_refuses_new_mappings_until_old_ones_expire() {
        let mut bench = Bench::new(NatKind::Symmetric);
        for n in 0..MAPPINGS_MAX {
            bench.send("10.0.0.1:5000", &format!("8.8.{}.{}:53", n / 256, n % 256));
        }
        assert_eq!(bench.try_send("10.0.0.1:5000", "9.9.9.9:53"), None);
        bench.now_ns = u64::from(IDLE_S_DEFAULT) * NS_PER_S;
        assert!(bench.try_send("10.0.0.1:5000", "9.9.9.9:53").is_some());
        assert_eq!(bench.nat.mappings.len(), 1);
        assert_eq!(bench.nat.ports.len(), 1);
    }

    #[test]
    fn the_filter_is_bounded_and_forgets_the_oldest() {
        let mut bench = Bench::new(NatKind::PortRestrictedCone);
        for n in 0..=REMOTES_PER_MAPPING_MAX {
            bench.now_ns = n as u64;
            bench.send("10.0.0.1:5000", &format!("8.8.{}.{}:53", n / 256, n % 256));
        }
        assert!(!bench.receives(5000, "8.8.0.0:53"));
        assert!(bench.receives(5000, "8.8.0.1:53"));
    }

    proptest! {
        #[test]
        fn no_two_inner_endpoints_share_an_outer_port(
            kind in proptest::sample::select(KINDS.to_vec()),
            sends in proptest::collection::vec((0u8..4, 0u16..4, 0u8..4, 0u64..100 * NS_PER_S), 1..100),
        ) {
            let mut bench = Bench::new(NatSettings { idle_s: 60, ..kind.into() });
            for (host, port, remote, wait_ns) in sends {
                bench.now_ns += wait_ns;
                let inner = SocketAddrV4::new(Ipv4Addr::new(10, 0, 0, host), 5000 + port);
                let remote = SocketAddrV4::new(Ipv4Addr::new(8, 8, 8, remote), 53);
                let (udp, now_ns) = (Transport::Udp, bench.now_ns);
                let outer = bench.nat.outbound(udp, inner, remote, now_ns, &mut bench.random).unwrap();
                prop_assert_eq!(bench.nat.inbound(udp, outer.port(), remote, now_ns), Some(inner));
                prop_assert_eq!(bench.nat.ports.len(), bench.nat.mappings.len());
            }
        }
    }
}
