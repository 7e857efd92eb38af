//! A running lab: namespaces, the router, and the handle that changes the network between them.

use std::{
    ffi::OsStr,
    fmt::Write,
    net::Ipv4Addr,
    process::Command,
    sync::{Arc, Mutex},
};

use crate::{
    Counters, HostCounters, LabError, Link, NatSettings, Topology, Wire,
    fabric::Fabric,
    lease::Lease,
    namespace::{self, Namespace},
    plan::{HostIndex, Plan},
    router::{Router, lock},
};

/// Hosts with a network between them, until dropped: then programs that still run in it are killed and all of it is removed.
/// What a killed process leaves behind is removed by the next lab on the machine.
///
/// ```no_run
/// use murmur_lab::{Lab, Link, Topology, Wire};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let lab = Lab::new(&Topology::of_hosts(["a", "b"]))?;
/// lab.set_link(&Wire::Up("a".into()), &Link::delay(20.0))?;
/// let mut child = lab.host("a")?.command("ping").arg(lab.host("b")?.address().to_string()).spawn()?;
/// lab.partition(&[&["a"], &["b"]])?;
/// lab.heal();
/// child.kill()?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Lab {
    // Dropped in this order: first the programs, then what carries their packets, then the name.
    namespaces: Vec<Namespace>,
    _router: Router,
    fabric: Arc<Mutex<Fabric>>,
    plan: Plan,
    _lease: Lease,
}

/// One host of a [`Lab`].
#[derive(Clone, Copy, Debug)]
pub struct HostHandle<'a> {
    lab: &'a Lab,
    index: HostIndex,
}

impl Lab {
    /// Says what this machine or user lacks to run a lab: root, TUN devices, `ip`. None where all is there.
    pub fn missing() -> Option<String> {
        namespace::missing()
    }

    /// Builds all hosts and starts the network. Fails with [`LabError::Missing`] where labs cannot run, and with
    /// [`LabError::Topology`] where the topology cannot be; then nothing of it remains.
    pub fn new(topology: &Topology) -> Result<Self, LabError> {
        if let Some(missing) = Self::missing() {
            return Err(LabError::Missing(missing));
        }
        let fabric = Fabric::new(topology)?;
        let plan = fabric.plan().clone();
        let lease = Lease::take()?;
        let (mut namespaces, mut devices) = (Vec::new(), Vec::new());
        for (index, host) in plan.hosts.iter().enumerate() {
            let created = Namespace::create(format!("{}{}", lease.prefix(), host.name));
            // Root in a container may not be allowed to; that shows only when it is tried.
            let namespace = created.map_err(|error| LabError::Missing(error.to_string()))?;
            devices.push(namespace.plug_in(host.address, host.prefix_bits, topology.mtu_bytes)?);
            namespace.set_names(&hosts_file(&plan, index))?;
            namespaces.push(namespace);
        }
        let fabric = Arc::new(Mutex::new(fabric));
        let router = Router::start(devices, fabric.clone())?;
        Ok(Self { namespaces, _router: router, fabric, plan, _lease: lease })
    }

    /// A host by its name.
    pub fn host(&self, name: &str) -> Result<HostHandle<'_>, LabError> {
        Ok(HostHandle { lab: self, index: self.plan.host(name)? })
    }

    /// All hosts, in the order of the topology.
    pub fn hosts(&self) -> impl Iterator<Item = HostHandle<'_>> {
        (0..self.plan.hosts.len()).map(|index| HostHandle { lab: self, index })
    }

    /// Replaces one direction of a link. Packets under way on it keep their times.
    pub fn set_link(&self, wire: &Wire, link: &Link) -> Result<(), LabError> {
        lock(&self.fabric).set_link(wire, link)
    }

    /// Replaces both directions of the route between two sites (lone hosts are sites).
    pub fn set_route(&self, one: &str, other: &str, link: &Link) -> Result<(), LabError> {
        let mut fabric = lock(&self.fabric);
        fabric.set_link(&Wire::Route(one.into(), other.into()), link)?;
        fabric.set_link(&Wire::Route(other.into(), one.into()), link)
    }

    /// Replaces the NAT of a site that has one; its mappings are gone, as after a restart of the device.
    pub fn set_nat(&self, site: &str, nat: impl Into<NatSettings>) -> Result<(), LabError> {
        lock(&self.fabric).set_nat(site, nat.into())
    }

    /// Splits the hosts into parts that do not reach each other: those named together, and one more of all that are not
    /// named. Replaces an earlier partition.
    pub fn partition(&self, parts: &[&[&str]]) -> Result<(), LabError> {
        lock(&self.fabric).partition(parts)
    }

    /// Cuts a host off from everyone; its interface stays up and nobody is told.
    pub fn isolate(&self, host: &str) -> Result<(), LabError> {
        lock(&self.fabric).set_isolated(host, true)
    }

    /// Lets an isolated host back in.
    pub fn rejoin(&self, host: &str) -> Result<(), LabError> {
        lock(&self.fabric).set_isolated(host, false)
    }

    /// Ends every partition and isolation. Links stay as they are.
    pub fn heal(&self) {
        lock(&self.fabric).heal();
    }

    /// What became of all packets since the start.
    pub fn counters(&self) -> Counters {
        lock(&self.fabric).counters()
    }

    /// The outer address of a site's NAT. None where it has none.
    pub fn nat_address(&self, site: &str) -> Result<Option<Ipv4Addr>, LabError> {
        Ok(self.plan.nat_addresses[self.plan.site(site)?])
    }
}

impl<'a> HostHandle<'a> {
    /// Its name.
    pub fn name(&self) -> &'a str {
        &self.lab.plan.hosts[self.index].name
    }

    /// Its own address; behind a NAT not the one that others see.
    pub fn address(&self) -> Ipv4Addr {
        self.lab.plan.hosts[self.index].address
    }

    /// A program that will run on this host, otherwise an ordinary one: the child's process is the program's own, and it sees
    /// the names of the hosts it can reach in `/etc/hosts`, and no name server.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        self.namespace().command(program)
    }

    /// Runs a closure on a thread inside the host. Sockets that it opens and returns stay on the host's network, whichever
    /// thread uses them later.
    pub fn enter<T: Send>(&self, action: impl FnOnce() -> T + Send) -> Result<T, LabError> {
        self.namespace().enter(action)
    }

    /// Kills every program that runs on the host, at once and without warning, and says how many there were.
    pub fn kill_programs(&self) -> Result<usize, LabError> {
        self.namespace().kill_programs()
    }

    /// What it sent and received since the start.
    pub fn counters(&self) -> HostCounters {
        lock(&self.lab.fabric).host_counters(self.index)
    }

    fn namespace(&self) -> &'a Namespace {
        &self.lab.namespaces[self.index]
    }
}

/// The hosts that `host` can address: those of its site, and all that are public.
fn hosts_file(plan: &Plan, host: HostIndex) -> String {
    let mut text = String::from("127.0.0.1 localhost\n");
    let site = plan.hosts[host].site;
    for other in plan.hosts.iter().filter(|it| it.site == site || plan.nat_addresses[it.site].is_none()) {
        // Writing to a string does not fail.
        let _ = writeln!(text, "{} {}", other.address, other.name);
    }
    text
}
