//! One simulated node: the membership table and the broadcast overlay, with a clock of its own.

use std::collections::HashSet;

use iroh_gossip::proto::topic::{Config, State};
use murmur_core::{
    membership::Membership,
    overlay::{self, Overlay},
    time::Now,
};
use murmur_protocol::mesh::NodeId;
use rand::rngs::StdRng;

/// A node by its number: what the overlay calls its peers.
pub type Index = u32;

/// A monotonic clock that is not anybody else's: it starts anywhere and runs a little fast or slow.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock {
    pub(crate) offset_ms: u64,
    pub(crate) drift_ppm: i64,
}

impl Clock {
    /// What the clock shows when `now_ms` of simulated time have passed.
    pub(crate) fn at(&self, now_ms: u64) -> Now {
        let drift_ms = now_ms as i64 * self.drift_ppm / 1_000_000;
        Now::from_ms(self.offset_ms.saturating_add(now_ms).saturating_add_signed(drift_ms))
    }
}

/// What is the same in all lives of a node.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) id: NodeId,
    pub(crate) clock: Clock,
    /// How far its wall clock is off, in milliseconds.
    pub(crate) wall_skew_ms: i64,
    pub(crate) liar: bool,
    /// Counts its starts: what was meant for an earlier life does not reach it.
    pub(crate) lives: u16,
    pub(crate) life: Option<Life>,
    /// The highest sequence number that it has on disk.
    pub(crate) stored_sequence: u64,
    /// Bytes that it has sent since counting began.
    pub(crate) sent_bytes: u64,
    /// How long its earlier lives were since then, in milliseconds.
    pub(crate) lived_ms: u64,
    pub(crate) began_ms: u64,
    /// When it was no longer to be listed: from when it said goodbye, or from when its last record had run out.
    pub(crate) ended_ms: u64,
    /// When nobody has a connection with it any more, while it does not run.
    pub(crate) disconnected_ms: u64,
    /// When its present record runs out.
    pub(crate) valid_until_ms: u64,
}

/// A running node.
pub(crate) struct Life {
    pub(crate) membership: Membership,
    pub(crate) gossip: State<Index, StdRng>,
    pub(crate) overlay: Overlay<Index>,
    /// Neighbours so far: those that are back have been compared with before.
    pub(crate) met: HashSet<Index>,
    /// For each node, by number, the last of its lives that this node has listed: what was found out before is not
    /// found out again.
    pub(crate) found: Vec<u16>,
    /// It has broadcast its record.
    pub(crate) has_broadcast: bool,
    /// Peers that have not answered, and will be given up.
    pub(crate) giving_up: Vec<Index>,
}

impl std::fmt::Debug for Life {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Life").field("overlay", &self.overlay).finish_non_exhaustive()
    }
}

impl Life {
    pub(crate) fn new(index: Index, membership: Membership, nodes: usize, rng: StdRng) -> Self {
        let broadcast = overlay::broadcast_config();
        Life {
            membership,
            gossip: State::with_rng(index, Some(Default::default()), Config { broadcast, ..Config::default() }, rng),
            overlay: Overlay::default(),
            met: HashSet::new(),
            found: vec![0; nodes],
            has_broadcast: false,
            giving_up: Vec::new(),
        }
    }
}
