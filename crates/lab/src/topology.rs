//! What a lab consists of, as a file or a test states it.
//!
//! A *host* runs programs. A *site* is a place whose hosts share a local network and, where it has a NAT, one outer address: a
//! home, a company. A host without a site is alone at a site of its own that has the host's name, with a public address. A
//! *route* is the way through the internet between two sites.
//!
//! ```toml
//! seed = 7                                    # of all chance: loss, jitter, ports
//!
//! [default_route]                             # between any two sites, each way
//! delay_ms = 10
//!
//! [[site]]
//! name = "home"
//! nat = { kind = "port-restricted-cone" }     # full-cone, restricted-cone, port-restricted-cone, symmetric
//! up = { rate_mbit_s = 20 }                   # what all its hosts share
//! down = { rate_mbit_s = 100 }
//!
//! [[host]]
//! name = "laptop"
//! site = "home"
//! up = { delay_ms = 2, jitter_ms = 3, loss = 0.01 }
//! run = ["sh", "-c", "ip address; hostname -I"]
//!
//! [[host]]
//! name = "server"
//!
//! [[route]]
//! between = ["home", "server"]
//! link = { delay_ms = 40 }
//! ```
//!
//! Links in series add up: from the laptop to the server the way is the laptop's `up`, the home's `up`, the route, the
//! server's `down`. Hosts of one site reach each other over their own `up` and `down` alone.

use std::{collections::HashSet, net::Ipv4Addr, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{LabError, Link, NatSettings};

/// The most hosts of one lab. Each is a namespace, a TUN device and a share of one router thread.
pub const HOSTS_MAX: usize = 200;
/// The most sites of one lab, not counting those of lone hosts.
pub const SITES_MAX: usize = 200;
/// The longest name of a host or site, in bytes.
pub const NAME_BYTES_MAX: usize = 32;
/// The largest IP packet where nothing else is said, in bytes: that of Ethernet.
pub const MTU_BYTES_DEFAULT: u16 = 1500;
/// The least that IPv4 programs rely on, in bytes.
pub const MTU_BYTES_MIN: u16 = 576;

/// A whole lab.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Topology {
    /// Seed of loss, jitter and random ports.
    pub seed: u64,
    /// The largest IP packet, in bytes.
    pub mtu_bytes: u16,
    /// Between any two sites that have no route of their own, in each direction.
    pub default_route: Link,
    /// Places with a local network.
    #[serde(rename = "site")]
    pub sites: Vec<Site>,
    /// Machines.
    #[serde(rename = "host")]
    pub hosts: Vec<Host>,
    /// Ways between sites that differ from the default.
    #[serde(rename = "route")]
    pub routes: Vec<Route>,
}

/// A place whose hosts share a local network.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Site {
    /// Its name: lower-case letters, digits, hyphens.
    pub name: String,
    /// What translates addresses between it and the world. Without, its hosts have public addresses.
    #[serde(default)]
    pub nat: Option<NatSettings>,
    /// From the site to the world.
    #[serde(default)]
    pub up: Link,
    /// From the world to the site.
    #[serde(default)]
    pub down: Link,
}

/// A machine: a network namespace.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Host {
    /// Its name: lower-case letters, digits, hyphens.
    pub name: String,
    /// Where it stands. Without, it is alone, with a public address.
    #[serde(default)]
    pub site: Option<String>,
    /// Its address, only behind a NAT, where two sites may well use the same. Without, one is given.
    #[serde(default)]
    pub address: Option<Ipv4Addr>,
    /// From the host to the network.
    #[serde(default)]
    pub up: Link,
    /// From the network to the host.
    #[serde(default)]
    pub down: Link,
    /// Program and arguments that the `murmur-lab` command runs there; nothing where empty.
    #[serde(default)]
    pub run: Vec<String>,
}

/// The way through the internet between two sites.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Route {
    /// The two sites (lone hosts are sites too).
    pub between: [String; 2],
    /// Each direction is one of these.
    pub link: Link,
}

impl Default for Topology {
    fn default() -> Self {
        Self {
            seed: 0,
            mtu_bytes: MTU_BYTES_DEFAULT,
            default_route: Link::default(),
            sites: Vec::new(),
            hosts: Vec::new(),
            routes: Vec::new(),
        }
    }
}

impl Site {
    /// A site with links that let everything pass.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), nat: None, up: Link::default(), down: Link::default() }
    }

    /// Puts it behind a NAT.
    pub fn behind(self, nat: impl Into<NatSettings>) -> Self {
        Self { nat: Some(nat.into()), ..self }
    }
}

impl Host {
    /// A lone host with links that let everything pass.
    pub fn new(name: impl Into<String>) -> Self {
        let (up, down) = (Link::default(), Link::default());
        Self { name: name.into(), site: None, address: None, up, down, run: Vec::new() }
    }

    /// Puts it at a site.
    pub fn at(self, site: impl Into<String>) -> Self {
        Self { site: Some(site.into()), ..self }
    }
}

impl Topology {
    /// Lone hosts with perfect links.
    pub fn of_hosts<'a>(names: impl IntoIterator<Item = &'a str>) -> Self {
        Self { hosts: names.into_iter().map(Host::new).collect(), ..Self::default() }
    }

    /// Adds a host.
    pub fn with_host(mut self, host: Host) -> Self {
        self.hosts.push(host);
        self
    }

    /// Adds a site.
    pub fn with_site(mut self, site: Site) -> Self {
        self.sites.push(site);
        self
    }

    /// Refuses what cannot be built, and says why.
    pub fn check(&self) -> Result<(), LabError> {
        let limit = |what: &str, count: usize, most: usize| {
            if count > most {
                return Err(LabError::topology(format!("{count} {what}, at most {most} are possible")));
            }
            Ok(())
        };
        limit("hosts", self.hosts.len(), HOSTS_MAX)?;
        limit("sites", self.sites.len(), SITES_MAX)?;
        if self.mtu_bytes < MTU_BYTES_MIN {
            return Err(LabError::topology(format!(
                "mtu_bytes is {}, must be {MTU_BYTES_MIN} or more",
                self.mtu_bytes
            )));
        }
        check_link(&self.default_route, || "default_route".into())?;
        self.check_sites()?;
        self.check_hosts()?;
        self.check_routes()
    }

    fn check_sites(&self) -> Result<(), LabError> {
        let mut names = HashSet::new();
        for site in &self.sites {
            check_name(&site.name)?;
            if !names.insert(&site.name) {
                return Err(LabError::topology(format!("two sites are called `{}`", site.name)));
            }
            check_link(&site.up, || format!("site {}, up", site.name))?;
            check_link(&site.down, || format!("site {}, down", site.name))?;
        }
        Ok(())
    }

    fn check_hosts(&self) -> Result<(), LabError> {
        let (mut names, mut addresses) = (HashSet::new(), HashSet::new());
        for host in &self.hosts {
            check_name(&host.name)?;
            if !names.insert(&host.name) {
                return Err(LabError::topology(format!("two hosts are called `{}`", host.name)));
            }
            check_link(&host.up, || format!("host {}, up", host.name))?;
            check_link(&host.down, || format!("host {}, down", host.name))?;
            let site = self.site_of(host)?;
            if site.is_none() && self.sites.iter().any(|site| site.name == host.name) {
                return Err(LabError::topology(format!("the lone host `{}` has the name of a site", host.name)));
            }
            let Some(address) = host.address else { continue };
            if site.is_none_or(|site| site.nat.is_none()) {
                return Err(LabError::topology(format!("host `{}` has an address but no NAT before it", host.name)));
            }
            if !address.is_private() || [0, 255].contains(&address.octets()[3]) {
                return Err(LabError::topology(format!("{address} is no address for a private host")));
            }
            if !addresses.insert((&host.site, address)) {
                return Err(LabError::topology(format!("two hosts of one site have the address {address}")));
            }
        }
        Ok(())
    }

    fn check_routes(&self) -> Result<(), LabError> {
        for Route { between: [from, to], link } in &self.routes {
            check_link(link, || format!("route between {from} and {to}"))?;
            for name in [from, to] {
                let is_lone_host = |host: &Host| host.site.is_none() && host.name == *name;
                if !self.sites.iter().any(|site| site.name == *name) && !self.hosts.iter().any(is_lone_host) {
                    return Err(LabError::Unknown { kind: "site", name: name.clone() });
                }
            }
            if from == to {
                return Err(LabError::topology(format!("a route from `{from}` to itself")));
            }
        }
        Ok(())
    }

    fn site_of(&self, host: &Host) -> Result<Option<&Site>, LabError> {
        let Some(name) = &host.site else { return Ok(None) };
        let site = self.sites.iter().find(|site| site.name == *name);
        site.map(Some).ok_or_else(|| LabError::Unknown { kind: "site", name: name.clone() })
    }
}

impl FromStr for Topology {
    type Err = LabError;

    /// Reads and checks a topology file.
    fn from_str(text: &str) -> Result<Self, LabError> {
        let topology: Self = toml::from_str(text)?;
        topology.check()?;
        Ok(topology)
    }
}

pub(crate) fn check_link(link: &Link, place: impl FnOnce() -> String) -> Result<(), LabError> {
    link.check().map_err(|message| LabError::topology(format!("{}: {message}", place())))
}

fn check_name(name: &str) -> Result<(), LabError> {
    let is_plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.bytes().all(is_plain) {
        return Err(LabError::topology(format!(
            "`{name}` is no name: 1 to {NAME_BYTES_MAX} lower-case letters, digits and hyphens"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::NatKind;

    #[test]
    fn the_example_of_the_module_page_is_a_topology() {
        let page = include_str!("topology.rs");
        let lines = page.lines().skip_while(|line| *line != "//! ```toml").skip(1);
        let example: Vec<&str> = lines
            .take_while(|line| *line != "//! ```")
            .map(|line| line.trim_start_matches("//!").trim_start())
            .collect();
        let topology: Topology = example.join("\n").parse().unwrap();
        assert_eq!(topology.seed, 7);
        assert_eq!(topology.default_route, Link::delay(10.0));
        assert_eq!(topology.sites[0].nat.unwrap().kind, NatKind::PortRestrictedCone);
        assert_eq!(topology.hosts[0].site.as_deref(), Some("home"));
        assert_eq!(topology.hosts[0].up.loss, 0.01);
        assert_eq!(topology.routes[0].link, Link::delay(40.0));
    }

    #[test]
    fn the_example_file_is_a_topology() {
        let topology: Topology = include_str!("../examples/homes.toml").parse().unwrap();
        assert_eq!(topology.hosts.len(), 4);
    }

    #[test]
    fn what_cannot_be_is_refused_with_the_reason() {
        for (text, reason) in [
            ("[[host]]\nname = \"a\"\n[[host]]\nname = \"a\"", "two hosts are called `a`"),
            ("[[host]]\nname = \"A b\"", "`A b` is no name"),
            ("[[host]]\nname = \"a\"\nsite = \"b\"", "no site `b`"),
            ("[[host]]\nname = \"a\"\nup = { loss = 2.0 }", "host a, up: loss is 2, must be from 0 to 1"),
            ("[[host]]\nname = \"a\"\nup = { delay_ms = nan }", "delay_ms is NaN"),
            ("[[host]]\nname = \"a\"\nup = { latency = 2 }", "unknown field `latency`"),
            ("[[host]]\nname = \"a\"\naddress = \"10.0.0.1\"", "no NAT before it"),
            ("[[site]]\nname = \"a\"\n[[host]]\nname = \"a\"", "the name of a site"),
            ("[[host]]\nname = \"a\"\n[[route]]\nbetween = [\"a\", \"b\"]\nlink = {}", "no site `b`"),
            ("mtu_bytes = 100", "must be 576 or more"),
        ] {
            let error = text.parse::<Topology>().unwrap_err().to_string();
            assert!(error.contains(reason), "{text}\n{error}");
        }
    }

    #[test]
    fn too_many_hosts_are_refused() {
        let names: Vec<String> = (0..=HOSTS_MAX).map(|n| n.to_string()).collect();
        let error = Topology::of_hosts(names.iter().map(String::as_str)).check().unwrap_err();
        assert_eq!(error.to_string(), "the topology cannot be: 201 hosts, at most 200 are possible");
    }
}
