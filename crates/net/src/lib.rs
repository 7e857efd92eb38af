//! The mesh on real networks.
//!
//! `murmur-core` decides; this crate is the shell that gives its machines a network: QUIC by iroh, gossip by
//! iroh-gossip, and several ways to find each other. The rest of the program sees [`Mesh`] and little else.
//!
//! How the parts play together:
//!
//! - [`endpoint`]: one QUIC endpoint per node, with the node's key. Three ALPNs: control, work, gossip.
//! - [`hello`]: the greeting with which every control and work connection begins. [`admission`] remembers who was
//!   greeted, and lets nobody else into the overlay.
//! - [`gossip`]: records are broadcast. [`anti_entropy`]: neighbours compare what they know, since broadcasts get lost.
//! - [`mdns`], [`nostr`], [`ticket`], [`remembered`]: finding the first peers. All of it yields hints; only a greeting proves anything.
//! - `state`: the one task that owns the table; start reading there, with [`mesh`] beside it.
//! - [`seed`]: an infrastructure node's services.
//!
//! **Private meshes.** Membership is a certificate signed with the mesh's key, bound to the node's QUIC identity.
//! Without one a connection gets a refusal and nothing else. The mesh's secret, which members learn on joining, keys
//! the gossip topic and hides what is published for discovery; it proves nothing.
//!
//! **Hostile bytes.** All messages have limits per kind, streams have deadlines, queues have bounds, and who hands over
//! forgeries is shut out for a while.

pub mod admission;
pub mod anti_entropy;
mod beacon;
mod clock;
mod congestion;
pub mod contact;
pub mod credentials;
mod data_dir;
pub mod dialler;
pub mod endpoint;
mod error;
pub mod gossip;
pub mod hello;
mod identity;
mod links;
pub mod mdns;
pub mod mesh;
pub mod nostr;
mod own_relays;
pub mod probe;
pub mod remembered;
mod revocations;
pub mod seed;
pub mod serve;
mod shared;
mod state;
pub mod stream;
pub mod ticket;

pub use contact::Contact;
pub use credentials::Credentials;
pub use endpoint::{Dht, EndpointOptions, Relays, node_key};
pub use error::NetError;
pub use iroh::endpoint::{RecvStream, SendStream};
pub use links::{Flow, Path};
pub use mesh::{Mesh, MeshChoice, MeshOptions, PeerView, Timing, Work};
pub use seed::{Seed, SeedOptions};
pub use state::{Known, LINKS_WANTED, OwnRecord, Table};
pub use ticket::Invitation;
