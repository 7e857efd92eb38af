//! Who is in the mesh.
//!
//! Each node says one thing: its own signed record, renewed every [`MembershipOptions::renew_every_ms`] (less often in a
//! large mesh: see [`RECORDS_PER_SECOND`]). Everybody keeps the latest record of everybody, and hands it on. Three rules
//! make that safe with copies that arrive late, twice, in any order, or from liars:
//!
//! - **The latest sequence number wins**, whoever brings it; a tombstone is the last word of a node.
//! - **Validity counts from reception**, by the receiver's own monotonic clock, minus the age that the sender states. No
//!   two clocks are ever compared. Copies of one record never live longer than one that came first and new would have.
//! - **Those that are gone keep a grave** with their highest sequence number, so that no copy of an old record brings
//!   them back. A restarted node numbers its records from the time of day in milliseconds and is newer than its grave.
//!
//! A liar that states age 0 for an old copy can show a dead node to those that never saw it die, for as long as one record
//! is valid. Meanwhile somebody who did see it die shows them its last record: after that no older one counts.
//!
//! Broadcasts get lost. So neighbours compare what they know ([`Membership::opening`]), hand over what the other lacks and
//! ask for what is lacking here.
//!
//! Signatures are checked before: see [`Verified`].

mod compare;
mod entry;
mod graves;
mod table;

use std::sync::Arc;

use murmur_protocol::mesh::{MeshId, NodeId, NodeRecord, RecordError, SignedRecord, summary};

pub use compare::Opening;
use entry::Entry;
pub use table::Membership;

/// How often a node of a mesh that is not too large renews its record, unless something changes.
pub const RENEW_EVERY_MS: u64 = 20_000;

/// How long a record of such a node counts.
pub const RECORD_TTL_MS: u32 = 60_000;

/// Records that all nodes of a mesh together broadcast in a second. Everybody hears all of them: at some 700 bytes each
/// they are what a large mesh costs, 20 kB/s for one copy of each. Where [`RENEW_EVERY_MS`] would give more, each node
/// renews less often and states that its records count longer, up to the longest that the protocol allows.
pub const RECORDS_PER_SECOND: u64 = 25;

/// Records that a node may send at once because something changed, before its share of [`RECORDS_PER_SECOND`] limits it.
pub const CHANGE_BURST: u64 = 4;

/// How many times a record is renewed while it counts: two renewals may be lost.
pub const RENEWALS_PER_TTL: u64 = 3;

/// Pause between two records of one node, at least. Who sends more often is not heard (see [`UPDATE_BURST`]).
pub const RENEW_PAUSE_MS: u64 = 1_000;

/// How many records of one node may come at once, as they do after a pause of the network.
pub const UPDATE_BURST: u64 = 8;

/// Nodes up to which a table is compared by its digest, which speaks for all nodes: its sender lacks all others. Larger ones
/// are compared by their summaries.
pub const DIGEST_NODES_MAX: usize = 64;

/// Records in one answer, at most. The rest comes with the next comparison.
pub const ANSWER_RECORDS_MAX: usize = 16_384;

/// A record whose signature was checked, with the bytes that were signed: they are what is handed on.
#[derive(Debug, Clone, PartialEq)]
pub struct Verified {
    record: NodeRecord,
    signed: SignedRecord,
    /// What stands for it where tables are compared.
    mark: u64,
}

impl Verified {
    /// Checks the signature over the received bytes, and that the record is one of `mesh`.
    ///
    /// # Errors
    /// [`RecordError`] if the record is not what its node signed for this mesh.
    pub fn check(signed: SignedRecord, mesh: MeshId) -> Result<Arc<Self>, RecordError> {
        Ok(Self::trusted(signed.verify(mesh)?, signed))
    }

    /// Takes the caller's word that `signed` is the signed form of `record`: for the own record, which was signed a moment
    /// ago, and for simulations, which keep their own account of forgeries.
    pub fn trusted(record: NodeRecord, signed: SignedRecord) -> Arc<Self> {
        let mark = summary::mark(&record.node, record.sequence);
        Arc::new(Verified { record, signed, mark })
    }

    /// What the node says.
    pub fn record(&self) -> &NodeRecord {
        &self.record
    }

    /// The bytes it signed.
    pub fn signed(&self) -> &SignedRecord {
        &self.signed
    }
}

/// A record as it is handed on.
#[derive(Debug, Clone)]
pub struct Aged {
    /// The record.
    pub verified: Arc<Verified>,
    /// How long ago it was signed, as far as known here.
    pub age_ms: u32,
}

/// What neighbours tell each other about what they know: nodes with the sequence number of their latest record.
pub type Digest = Vec<(NodeId, u64)>;

/// The answer to a digest.
#[derive(Debug, Clone, Default)]
pub struct Answer {
    /// Records that the other lacks.
    pub records: Vec<Aged>,
    /// Nodes of which the other has a newer record.
    pub want: Vec<NodeId>,
}

/// What became of a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The node was not listed and is now. The table was full if others had to go for it.
    New {
        /// The nodes that went.
        displaced: Vec<NodeId>,
    },
    /// The node was listed; this record replaces an older one.
    Newer,
    /// It changes nothing: this very record was known, or it is the tombstone of a node that is not listed.
    Known,
    /// A newer record is known, or the node is gone since, or the record's time has run out.
    Old,
    /// The node was listed and has left: a tombstone.
    Departed,
    /// A record of this node itself with a sequence number that it has not reached: of an earlier life. It goes on from
    /// there, and renews its record at once.
    Overtaken,
    /// Not taken.
    Refused(Unwelcome),
}

/// Why a record was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unwelcome {
    /// It belongs to another mesh.
    #[error("the record belongs to another mesh")]
    WrongMesh,
    /// The node sends records faster than it may.
    #[error("the node renews its record more often than it may")]
    TooOften,
    /// The table is full, and the peer that brings the node has brought its share.
    #[error("the table is full")]
    Full,
}

/// Sizes and times of a membership table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MembershipOptions {
    /// How often the own record is renewed: at most `ttl_ms` divided by [`RENEWALS_PER_TTL`].
    pub renew_every_ms: u64,
    /// How long the own record counts.
    pub ttl_ms: u32,
    /// Other nodes in the table, at most.
    pub nodes_max: usize,
    /// Graves of nodes that were in the table, at most.
    pub graves_max: usize,
}

impl Default for MembershipOptions {
    fn default() -> Self {
        MembershipOptions {
            renew_every_ms: RENEW_EVERY_MS,
            ttl_ms: RECORD_TTL_MS,
            nodes_max: 16_384,
            graves_max: 65_536,
        }
    }
}
