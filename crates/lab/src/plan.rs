//! From names to numbers: which host has which address, and where an address leads.
//!
//! Public addresses are of 198.18.0.0/15, which is set apart for laboratories (RFC 2544), so that nothing in a lab can be taken
//! for a real machine: `198.18.0.x` are lone hosts, `198.18.S.x` the hosts of site S without a NAT, `198.19.0.S` the NATs.
//! Behind the NAT of site S, hosts have `10.S.0.x`.

use std::{collections::HashMap, net::Ipv4Addr};

use crate::{Host, LabError, Topology};

/// A host's place in the topology.
pub type HostIndex = usize;
/// A site's number: first those of the topology, then one for each lone host.
pub type SiteIndex = usize;

/// The network part of addresses at a site with several hosts, in bits.
const SITE_PREFIX_BITS: u8 = 24;

/// One host with its address.
#[derive(Clone, Debug)]
pub struct PlannedHost {
    /// Its name.
    pub name: String,
    /// Where it stands.
    pub site: SiteIndex,
    /// Its own address.
    pub address: Ipv4Addr,
    /// The length of the local network's prefix, in bits; 32 where it is alone.
    pub prefix_bits: u8,
}

/// Where a public address leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// To a host with a public address.
    Host(HostIndex),
    /// To the NAT of a site.
    Nat(SiteIndex),
}

/// All addresses of a lab.
#[derive(Clone, Debug)]
pub struct Plan {
    /// In the order of the topology.
    pub hosts: Vec<PlannedHost>,
    /// The members of each site.
    pub members: Vec<Vec<HostIndex>>,
    /// The outer address of each site that has a NAT.
    pub nat_addresses: Vec<Option<Ipv4Addr>>,
    site_names: HashMap<String, SiteIndex>,
    host_names: HashMap<String, HostIndex>,
    public: HashMap<Ipv4Addr, Target>,
}

impl Plan {
    /// Gives every host of a checked topology its address.
    pub fn new(topology: &Topology) -> Result<Self, LabError> {
        topology.check()?;
        let mut plan = Self {
            hosts: Vec::new(),
            members: vec![Vec::new(); topology.sites.len()],
            nat_addresses: vec![None; topology.sites.len()],
            site_names: HashMap::new(),
            host_names: HashMap::new(),
            public: HashMap::new(),
        };
        for (index, site) in topology.sites.iter().enumerate() {
            plan.site_names.insert(site.name.clone(), index);
            if site.nat.is_some() {
                let address = Ipv4Addr::new(198, 19, 0, octet(index));
                plan.nat_addresses[index] = Some(address);
                plan.public.insert(address, Target::Nat(index));
            }
        }
        for host in &topology.hosts {
            plan.add_host(host, topology);
        }
        Ok(plan)
    }

    fn add_host(&mut self, host: &Host, topology: &Topology) {
        let index = self.hosts.len();
        let (site, address, prefix_bits) = match host.site.as_ref().and_then(|name| self.site_names.get(name)) {
            None => {
                let site = self.members.len();
                self.members.push(Vec::new());
                self.nat_addresses.push(None);
                self.site_names.insert(host.name.clone(), site);
                (site, Ipv4Addr::new(198, 18, 0, octet(index)), 32)
            }
            Some(&site) if self.nat_addresses[site].is_some() => (
                site,
                host.address.unwrap_or_else(|| self.free_private_address(site, host, topology)),
                SITE_PREFIX_BITS,
            ),
            Some(&site) => {
                (site, Ipv4Addr::new(198, 18, octet(site), octet(self.members[site].len())), SITE_PREFIX_BITS)
            }
        };
        if self.nat_addresses[site].is_none() {
            self.public.insert(address, Target::Host(index));
        }
        self.members[site].push(index);
        self.host_names.insert(host.name.clone(), index);
        self.hosts.push(PlannedHost { name: host.name.clone(), site, address, prefix_bits });
    }

    /// The next one that neither was given nor is named by the topology.
    fn free_private_address(&self, site: SiteIndex, host: &Host, topology: &Topology) -> Ipv4Addr {
        let is_named = |address| topology.hosts.iter().any(|it| it.site == host.site && it.address == Some(address));
        let mut address = Ipv4Addr::new(10, octet(site), 0, 1);
        while self.at_site(site, address).is_some() || is_named(address) {
            address = Ipv4Addr::from_bits(address.to_bits() + 1);
        }
        address
    }

    /// Where a public address leads.
    pub fn public(&self, address: Ipv4Addr) -> Option<Target> {
        self.public.get(&address).copied()
    }

    /// The host of a site that has an address.
    pub fn at_site(&self, site: SiteIndex, address: Ipv4Addr) -> Option<HostIndex> {
        self.members[site].iter().copied().find(|host| self.hosts[*host].address == address)
    }

    /// Whether packets to an address go to all hosts of the sender's site.
    pub fn is_for_all(&self, sender: HostIndex, destination: Ipv4Addr) -> bool {
        let host = &self.hosts[sender];
        let host_bits = 32 - u32::from(host.prefix_bits);
        let local_broadcast = u32::from(host.address) | ((1u64 << host_bits) - 1) as u32;
        destination.is_multicast()
            || destination.is_broadcast()
            || (host_bits > 0 && u32::from(destination) == local_broadcast)
    }

    /// The host of a name.
    pub fn host(&self, name: &str) -> Result<HostIndex, LabError> {
        let found = self.host_names.get(name).copied();
        found.ok_or_else(|| LabError::Unknown { kind: "host", name: name.to_owned() })
    }

    /// The site of a name; lone hosts are sites too.
    pub fn site(&self, name: &str) -> Result<SiteIndex, LabError> {
        let found = self.site_names.get(name).copied();
        found.ok_or_else(|| LabError::Unknown { kind: "site", name: name.to_owned() })
    }
}

/// The last number of an address: hosts and sites are counted from 0, addresses from 1. The limits of a topology keep it below 255.
fn octet(index: usize) -> u8 {
    u8::try_from(index + 1).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{NatKind, Site};

    #[test]
    fn every_host_has_an_address_of_its_own_where_it_can_be_seen() {
        let mut topology = Topology::of_hosts(["lone"])
            .with_site(Site::new("home").behind(NatKind::FullCone))
            .with_site(Site::new("campus"));
        for n in 0..5 {
            topology = topology.with_host(Host::new(format!("home-{n}")).at("home"));
            topology = topology.with_host(Host::new(format!("campus-{n}")).at("campus"));
        }
        topology.hosts[1].address = Some(Ipv4Addr::new(10, 1, 0, 3));
        topology.hosts[9].address = Some(Ipv4Addr::new(10, 1, 0, 2));
        let plan = Plan::new(&topology).unwrap();
        let lone = plan.host("lone").unwrap();
        assert_eq!(plan.hosts[lone].address, Ipv4Addr::new(198, 18, 0, 1));
        assert_eq!(plan.public(plan.hosts[lone].address), Some(Target::Host(lone)));
        let home = plan.site("home").unwrap();
        for &host in &plan.members[home] {
            let address = plan.hosts[host].address;
            assert_eq!(plan.at_site(home, address), Some(host), "no other host has {address}");
            assert_eq!(plan.public(address), None);
        }
        assert_eq!(plan.public(plan.nat_addresses[home].unwrap()), Some(Target::Nat(home)));
        let campus = plan.host("campus-4").unwrap();
        assert_eq!(plan.public(plan.hosts[campus].address), Some(Target::Host(campus)));
    }

    #[test]
    fn broadcasts_are_for_the_site_and_nobody_else() {
        let plan =
            Plan::new(&Topology::of_hosts(["lone"]).with_site(Site::new("lan")).with_host(Host::new("a").at("lan")));
        let plan = plan.unwrap();
        let (lone, a) = (plan.host("lone").unwrap(), plan.host("a").unwrap());
        assert!(plan.is_for_all(a, Ipv4Addr::new(224, 0, 0, 251)));
        assert!(plan.is_for_all(a, Ipv4Addr::new(198, 18, 1, 255)));
        assert!(!plan.is_for_all(a, Ipv4Addr::new(198, 18, 1, 1)));
        assert!(!plan.is_for_all(lone, plan.hosts[lone].address));
    }
}
