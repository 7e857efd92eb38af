//! The network between the hosts, without any I/O: packets go in with the time, packets and the next time to look come out.
//!
//! A packet goes through a few *places*, and through one shaper between each two of them:
//!
//! ```text
//! host ──up──> Edge ─────────────────────(same site)───────────────────┬──down──> Access: host
//!               │ NAT: translate                                        │ NAT: filter, translate
//!               └──site up──> Exit ──route──> Entrance ──site down──> Door
//! ```
//!
//! What happens at a place happens at the time the packet is there: a NAT that gets a packet 50 ms after it was sent decides by
//! its table of that moment, without which simultaneous hole punching would look different from what it is. A packet whose next
//! shaper lets it pass at once moves on in the same call; any other waits in a heap, ordered by time and then by arrival.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap, HashSet},
    net::SocketAddrV4,
};

use rand::{SeedableRng, rngs::StdRng};

use crate::{
    LabError, Link, Nat, NatSettings, Topology,
    packet::Packet,
    plan::{HostIndex, Plan, SiteIndex, Target},
    shaper::{Passage, Shaper},
};

/// What may be under way at once, in bytes; packets beyond it are dropped. More than a second at 500 Mbit/s.
pub const UNDER_WAY_BYTES_MAX: usize = 128 * 1024 * 1024;

/// A direction of a link that can be changed, by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wire {
    /// From a host to its site or the world.
    Up(String),
    /// From its site or the world to a host.
    Down(String),
    /// From a site to the world.
    SiteUp(String),
    /// From the world to a site.
    SiteDown(String),
    /// From one site to another; lone hosts are sites.
    Route(String, String),
}

/// What became of packets, since the lab began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Reached a host (a broadcast counts once per receiver).
    pub delivered: u64,
    /// Lost by a link, as asked.
    pub lost: u64,
    /// Found a full queue before a link with a rate.
    pub queue_full: u64,
    /// Cut off by a partition or isolation.
    pub cut_off: u64,
    /// Not let through by a NAT.
    pub refused_by_nat: u64,
    /// Had no destination in the lab.
    pub no_route: u64,
    /// Were not IPv4, were damaged, or did not come from their host's address.
    pub malformed: u64,
    /// Found [`UNDER_WAY_BYTES_MAX`] under way.
    pub too_many: u64,
}

/// What one host sent and received, in whole IP packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostCounters {
    /// Packets that the host sent.
    pub sent_packets: u64,
    /// Their bytes.
    pub sent_bytes: u64,
    /// Packets that reached the host.
    pub received_packets: u64,
    /// Their bytes.
    pub received_bytes: u64,
}

/// A packet that has reached its host.
#[derive(Debug)]
pub struct Delivery {
    /// To whom.
    pub host: HostIndex,
    /// As it arrives.
    pub packet: Packet,
}

/// Where a packet is; the page above draws the way.
#[derive(Clone, Copy, Debug)]
enum Place {
    Edge,
    Exit(Target),
    Entrance(Target),
    Door(Target),
    Access(HostIndex),
}

#[derive(Debug)]
struct UnderWay {
    at_ns: u64,
    arrival: u64,
    from: HostIndex,
    place: Place,
    packet: Packet,
}

impl PartialEq for UnderWay {
    fn eq(&self, other: &Self) -> bool {
        self.arrival == other.arrival
    }
}

impl Eq for UnderWay {}

impl PartialOrd for UnderWay {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for UnderWay {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at_ns, self.arrival).cmp(&(other.at_ns, other.arrival))
    }
}

#[derive(Debug)]
struct Shapers {
    up: Vec<Shaper>,
    down: Vec<Shaper>,
    site_up: Vec<Shaper>,
    site_down: Vec<Shaper>,
    routes: HashMap<(SiteIndex, SiteIndex), Shaper>,
    default_route: Link,
}

/// All links, NATs and partitions of a lab, and the packets under way.
#[derive(Debug)]
pub struct Fabric {
    plan: Plan,
    shapers: Shapers,
    nats: Vec<Option<Nat>>,
    /// The part of the partition that each host is in; all 0 when whole.
    part: Vec<usize>,
    isolated: HashSet<HostIndex>,
    under_way: BinaryHeap<Reverse<UnderWay>>,
    under_way_bytes: usize,
    arrivals: u64,
    random: StdRng,
    counters: Counters,
    host_counters: Vec<HostCounters>,
}

impl Fabric {
    /// A network at rest. Fails where the topology does not [`check`](Topology::check).
    pub fn new(topology: &Topology) -> Result<Self, LabError> {
        let plan = Plan::new(topology)?;
        let lone = vec![Shaper::new(&Link::default()); plan.members.len() - topology.sites.len()];
        let with_lone = |sites: Vec<Shaper>| [sites, lone.clone()].concat();
        let mut shapers = Shapers {
            up: topology.hosts.iter().map(|host| Shaper::new(&host.up)).collect(),
            down: topology.hosts.iter().map(|host| Shaper::new(&host.down)).collect(),
            site_up: with_lone(topology.sites.iter().map(|site| Shaper::new(&site.up)).collect()),
            site_down: with_lone(topology.sites.iter().map(|site| Shaper::new(&site.down)).collect()),
            routes: HashMap::new(),
            default_route: topology.default_route,
        };
        for route in &topology.routes {
            let (one, other) = (plan.site(&route.between[0])?, plan.site(&route.between[1])?);
            shapers.routes.insert((one, other), Shaper::new(&route.link));
            shapers.routes.insert((other, one), Shaper::new(&route.link));
        }
        let nat = |(site, address): (usize, &Option<_>)| Some(Nat::new(topology.sites.get(site)?.nat?, (*address)?));
        Ok(Self {
            nats: plan.nat_addresses.iter().enumerate().map(nat).collect(),
            part: vec![0; plan.hosts.len()],
            isolated: HashSet::new(),
            under_way: BinaryHeap::new(),
            under_way_bytes: 0,
            arrivals: 0,
            random: StdRng::seed_from_u64(topology.seed),
            counters: Counters::default(),
            host_counters: vec![HostCounters::default(); plan.hosts.len()],
            shapers,
            plan,
        })
    }

    /// The addresses.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// A host sends bytes, at a time not before that of any earlier call, in nanoseconds since the lab began. What reaches
    /// its host by then is appended to `out`.
    pub fn send(&mut self, from: HostIndex, bytes: Vec<u8>, now_ns: u64, out: &mut Vec<Delivery>) {
        self.advance(now_ns, out);
        let Some(packet) = Packet::parse(bytes).filter(|packet| packet.source() == self.plan.hosts[from].address)
        else {
            self.counters.malformed += 1;
            return;
        };
        let count = &mut self.host_counters[from];
        count.sent_packets += 1;
        count.sent_bytes += packet.length_bytes() as u64;
        if self.isolated.contains(&from) {
            self.counters.cut_off += 1;
            return;
        }
        let passage = self.shapers.up[from].offer(packet.length_bytes(), now_ns, &mut self.random);
        self.travel(from, packet, Place::Edge, passage, now_ns, out);
    }

    /// Moves all packets on to where they are now.
    pub fn advance(&mut self, now_ns: u64, out: &mut Vec<Delivery>) {
        while self.next_ns().is_some_and(|at_ns| at_ns <= now_ns) {
            let Some(Reverse(next)) = self.under_way.pop() else { return };
            self.under_way_bytes -= next.packet.length_bytes();
            self.arrive(next.from, next.packet, next.place, next.at_ns, out);
        }
    }

    /// When [`advance`](Self::advance) has something to do. None: not before the next packet is sent.
    pub fn next_ns(&self) -> Option<u64> {
        self.under_way.peek().map(|Reverse(next)| next.at_ns)
    }

    fn travel(
        &mut self,
        from: HostIndex,
        packet: Packet,
        place: Place,
        passage: Passage,
        now_ns: u64,
        out: &mut Vec<Delivery>,
    ) {
        match passage {
            Passage::Lost => self.counters.lost += 1,
            Passage::QueueFull => self.counters.queue_full += 1,
            // At most five places follow each other, so this does not go deep.
            Passage::At(at_ns) if at_ns <= now_ns => self.arrive(from, packet, place, now_ns, out),
            Passage::At(_) if self.under_way_bytes + packet.length_bytes() > UNDER_WAY_BYTES_MAX => {
                self.counters.too_many += 1;
            }
            Passage::At(at_ns) => {
                self.arrivals += 1;
                self.under_way_bytes += packet.length_bytes();
                let arrival = self.arrivals;
                self.under_way.push(Reverse(UnderWay { at_ns, arrival, from, place, packet }));
            }
        }
    }

    fn arrive(&mut self, from: HostIndex, packet: Packet, place: Place, now_ns: u64, out: &mut Vec<Delivery>) {
        let length_bytes = packet.length_bytes();
        match place {
            Place::Edge => self.leave_host(from, packet, now_ns, out),
            Place::Exit(target) => {
                let sites = (self.plan.hosts[from].site, self.site_of(target));
                let passage = self.shapers.route(sites).offer(length_bytes, now_ns, &mut self.random);
                self.travel(from, packet, Place::Entrance(target), passage, now_ns, out);
            }
            Place::Entrance(target) => {
                let site = self.site_of(target);
                let passage = self.shapers.site_down[site].offer(length_bytes, now_ns, &mut self.random);
                self.travel(from, packet, Place::Door(target), passage, now_ns, out);
            }
            Place::Door(Target::Host(to)) => self.approach(from, packet, to, now_ns, out),
            Place::Door(Target::Nat(site)) => self.enter_site(from, packet, site, now_ns, out),
            Place::Access(to) => self.deliver(from, packet, to, out),
        }
    }

    fn leave_host(&mut self, from: HostIndex, packet: Packet, now_ns: u64, out: &mut Vec<Delivery>) {
        let site = self.plan.hosts[from].site;
        let destination = packet.destination();
        if self.plan.is_for_all(from, destination) {
            let others = self.plan.members[site].clone();
            for to in others.into_iter().filter(|to| *to != from) {
                self.approach(from, packet.clone(), to, now_ns, out);
            }
            return;
        }
        if let Some(to) = self.plan.at_site(site, destination) {
            return self.approach(from, packet, to, now_ns, out);
        }
        let Some(target) = self.plan.public(destination) else {
            self.counters.no_route += 1;
            return;
        };
        let Some(packet) = self.translate_out(site, packet, target, now_ns) else {
            self.counters.refused_by_nat += 1;
            return;
        };
        if target == Target::Nat(site) {
            return self.enter_site(from, packet, site, now_ns, out);
        }
        let passage = self.shapers.site_up[site].offer(packet.length_bytes(), now_ns, &mut self.random);
        self.travel(from, packet, Place::Exit(target), passage, now_ns, out);
    }

    fn translate_out(&mut self, site: SiteIndex, mut packet: Packet, target: Target, now_ns: u64) -> Option<Packet> {
        let Some(nat) = &mut self.nats[site] else { return Some(packet) };
        if target == Target::Nat(site) && !nat.settings().hairpin {
            return None;
        }
        let flow = packet.flow()?;
        let outer = nat.outbound(flow.transport, flow.source, flow.destination, now_ns, &mut self.random)?;
        packet.set_source(outer);
        Some(packet)
    }

    fn enter_site(&mut self, from: HostIndex, packet: Packet, site: SiteIndex, now_ns: u64, out: &mut Vec<Delivery>) {
        match self.translate_in(site, packet, now_ns) {
            Some((packet, to)) => self.approach(from, packet, to, now_ns, out),
            None => self.counters.refused_by_nat += 1,
        }
    }

    fn translate_in(&self, site: SiteIndex, mut packet: Packet, now_ns: u64) -> Option<(Packet, HostIndex)> {
        let flow = packet.flow()?;
        let nat = self.nats[site].as_ref()?;
        let inner: SocketAddrV4 = nat.inbound(flow.transport, flow.destination.port(), flow.source, now_ns)?;
        packet.set_destination(inner);
        Some((packet, self.plan.at_site(site, *inner.ip())?))
    }

    fn approach(&mut self, from: HostIndex, packet: Packet, to: HostIndex, now_ns: u64, out: &mut Vec<Delivery>) {
        let passage = self.shapers.down[to].offer(packet.length_bytes(), now_ns, &mut self.random);
        self.travel(from, packet, Place::Access(to), passage, now_ns, out);
    }

    /// Partitions cut what is under way as well, so they are looked at here, at the end of the way.
    fn deliver(&mut self, from: HostIndex, packet: Packet, to: HostIndex, out: &mut Vec<Delivery>) {
        if self.part[from] != self.part[to] || self.isolated.contains(&from) || self.isolated.contains(&to) {
            self.counters.cut_off += 1;
            return;
        }
        self.counters.delivered += 1;
        let count = &mut self.host_counters[to];
        count.received_packets += 1;
        count.received_bytes += packet.length_bytes() as u64;
        out.push(Delivery { host: to, packet });
    }

    fn site_of(&self, target: Target) -> SiteIndex {
        match target {
            Target::Host(host) => self.plan.hosts[host].site,
            Target::Nat(site) => site,
        }
    }

    /// Replaces a link. Packets that are under way on it keep their times; those that come later may overtake them.
    pub fn set_link(&mut self, wire: &Wire, link: &Link) -> Result<(), LabError> {
        crate::topology::check_link(link, || format!("{wire:?}"))?;
        let shaper = match wire {
            Wire::Up(host) => &mut self.shapers.up[self.plan.host(host)?],
            Wire::Down(host) => &mut self.shapers.down[self.plan.host(host)?],
            Wire::SiteUp(site) => &mut self.shapers.site_up[self.plan.site(site)?],
            Wire::SiteDown(site) => &mut self.shapers.site_down[self.plan.site(site)?],
            Wire::Route(from, to) if from == to => {
                return Err(LabError::topology(format!("a route from `{from}` to itself")));
            }
            Wire::Route(from, to) => self.shapers.route((self.plan.site(from)?, self.plan.site(to)?)),
        };
        *shaper = Shaper::new(link);
        Ok(())
    }

    /// Replaces the NAT of a site that has one. All mappings are gone, as after a restart of the device.
    pub fn set_nat(&mut self, site: &str, settings: NatSettings) -> Result<(), LabError> {
        let Some(nat) = &mut self.nats[self.plan.site(site)?] else {
            return Err(LabError::topology(format!("site `{site}` has no NAT, so its hosts have public addresses")));
        };
        *nat = Nat::new(settings, nat.outer_address());
        Ok(())
    }

    /// Splits the hosts into parts that do not reach each other: those named together, and one more of all that are not named.
    /// Replaces an earlier partition.
    pub fn partition(&mut self, parts: &[&[&str]]) -> Result<(), LabError> {
        let mut part = vec![0; self.plan.hosts.len()];
        for (index, names) in parts.iter().enumerate() {
            for name in *names {
                part[self.plan.host(name)?] = index + 1;
            }
        }
        self.part = part;
        Ok(())
    }

    /// Cuts a host off from everyone, or lets it back in. Its interface stays up: nobody is told.
    pub fn set_isolated(&mut self, host: &str, isolated: bool) -> Result<(), LabError> {
        let host = self.plan.host(host)?;
        if isolated {
            self.isolated.insert(host);
        } else {
            self.isolated.remove(&host);
        }
        Ok(())
    }

    /// Ends every partition and isolation. Links stay as they are.
    pub fn heal(&mut self) {
        self.part.fill(0);
        self.isolated.clear();
    }

    /// What became of all packets.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// What a host sent and received.
    pub fn host_counters(&self, host: HostIndex) -> HostCounters {
        self.host_counters[host]
    }
}

impl Shapers {
    fn route(&mut self, sites: (SiteIndex, SiteIndex)) -> &mut Shaper {
        self.routes.entry(sites).or_insert_with(|| Shaper::new(&self.default_route))
    }
}

#[cfg(test)]
mod tests;
