//! A laboratory for networked programs: hosts as network namespaces on one machine, and between them a network that can be made
//! as bad as wanted while they run.
//!
//! The usual way to this is `tc netem` on veth pairs and NAT by netfilter. Both need kernel modules that small kernels lack, and
//! netfilter has no full cone. Here every host's only interface is a TUN device, and a program of our own, in user space,
//! carries each IP packet from one to another: what it does to the packets is ordinary, tested, seeded code. Any program runs in
//! it unchanged: ours, or one that ours is measured against.
//!
//! The network is a pure state machine in [`fabric`] (time is an argument, chance has a seed) over [`shaper`] (one direction of
//! a link), [`nat`] and [`packet`]; its tests take microseconds. Around it is a thin shell for Linux: `namespace` makes hosts,
//! `router` moves bytes between the TUN devices and the fabric in one thread, and `Lab` holds it all together and removes it in
//! the end. Start reading at [`topology`], then [`fabric`].
//!
//! IPv4 only: IPv6 is switched off on the hosts' interfaces. Packets do not age (a TTL stays as it is), and nothing answers with
//! ICMP errors: what cannot be delivered vanishes, as it mostly does behind firewalls.

mod error;
pub mod fabric;
#[cfg(target_os = "linux")]
mod lab;
#[cfg(target_os = "linux")]
mod lease;
mod link;
#[cfg(target_os = "linux")]
mod namespace;
pub mod nat;
pub mod packet;
pub mod plan;
#[cfg(target_os = "linux")]
mod router;
pub mod shaper;
pub mod topology;

pub use error::LabError;
pub use fabric::{Counters, HostCounters, Wire};
#[cfg(target_os = "linux")]
pub use lab::{HostHandle, Lab};
pub use link::{DELAY_MS_MAX, Link, QUEUE_BYTES_DEFAULT, RATE_MBIT_S_MAX, RATE_MBIT_S_MIN};
pub use nat::{Nat, NatKind, NatSettings};
pub use topology::{Host, Route, Site, Topology};
