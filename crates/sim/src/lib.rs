//! A deterministic simulator of whole meshes.
//!
//! What decides in a real node decides here: the membership table of `murmur-core`, and the state machines of
//! `iroh-gossip` (HyParView for the overlay, PlumTree for broadcasts) that the `net` crate runs over QUIC. Replaced are the
//! clock, the links, and the signatures:
//!
//! - **time** is a queue of events ([`Sim::run_for`]); every node has a monotonic clock of its own, which starts anywhere
//!   and drifts, and a wall clock that may be minutes off;
//! - **links** have delays, lose packets, double and reorder them, and can be cut (`network`);
//! - **signatures** are an entry in a book (`notary`).
//!
//! Nodes crash, restart, say goodbye, and lie (forged tombstones, records of other meshes, old records as if they were
//! new). A [`Scenario`] with its seed is the whole run: the same seed gives the same messages at the same moments.
//!
//! Not simulated: the cost of connections (handshakes, NAT traversal), bandwidth and its queues. What is sent to a node that
//! cannot be reached is lost, and the sender finds out after [`NetworkOptions::dead_connection_ms`]; real QUIC would deliver
//! it late if the link comes back before.
//!
//! Start with [`Scenario`] and [`Sim`]; `examples/mesh.rs` prints what a mesh of any size costs.

mod churn;
mod measure;
mod network;
mod node;
mod notary;
mod queue;
mod sim;

pub use churn::Churn;
pub use measure::{DISCOVERY_MS_MAX, GONE_MS_MAX, ROUND_MS, Report, Survey, Times};
pub use network::{NetworkOptions, Transport};
pub use node::Index;
pub use notary::RECORD_BYTES;
pub use sim::{Scenario, Sim};
