//! What a table holds of each node, in few bytes: a simulated mesh of ten thousand nodes holds it a hundred million times.

use std::{borrow::Borrow, cmp::Ordering, sync::Arc};

use murmur_protocol::mesh::NodeId;

use super::{Aged, RENEW_PAUSE_MS, Verified};
use crate::time::Now;

/// The beginning of a peer's id: enough to tell peers apart, as it takes 2^64 keys to find another one with the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Peer([u8; 8]);

impl From<NodeId> for Peer {
    fn from(node: NodeId) -> Self {
        let [a, b, c, d, e, f, g, h, ..] = *node.as_bytes();
        Peer([a, b, c, d, e, f, g, h])
    }
}

/// A listed node. Sorted, and found, by the id in its record.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) verified: Arc<Verified>,
    /// When this very record was first heard. However new a copy calls itself, it is valid from here on at most.
    first_heard: Now,
    /// The peer that first brought it: the node itself, as soon as it was heard directly.
    pub(super) introducer: Peer,
    /// Since it was first heard.
    valid_for_ms: u32,
    /// When the node was listed, by the second.
    pub(super) listed_s: u32,
    /// Since this record was first heard. Each record taken moves it on by [`RENEW_PAUSE_MS`].
    paced_for_ms: u16,
}

const _: () = assert!(size_of::<Entry>() <= 40);

impl Entry {
    /// A node that is listed now.
    pub(super) fn new(verified: &Arc<Verified>, valid_until: Now, introducer: NodeId, now: Now) -> Self {
        Entry {
            verified: Arc::clone(verified),
            first_heard: now,
            introducer: introducer.into(),
            valid_for_ms: as_u32(valid_until.since_ms(now)),
            listed_s: as_u32(now.as_ms() / 1_000),
            paced_for_ms: RENEW_PAUSE_MS as u16,
        }
    }

    pub(super) fn node(&self) -> &NodeId {
        &self.verified.record.node
    }

    pub(super) fn sequence(&self) -> u64 {
        self.verified.record.sequence
    }

    pub(super) fn valid_until(&self) -> Now {
        self.first_heard.plus_ms(self.valid_for_ms.into())
    }

    pub(super) fn is_valid(&self, now: Now) -> bool {
        self.valid_until() > now
    }

    /// Until when the node has spent its time, at one record per [`RENEW_PAUSE_MS`].
    pub(super) fn paced_until(&self) -> Now {
        self.first_heard.plus_ms(self.paced_for_ms.into())
    }

    /// The same record has come again, and is valid until then as its bringer says.
    pub(super) fn prolong(&mut self, valid_until: Now) {
        let valid_for_ms = as_u32(valid_until.since_ms(self.first_heard)).min(self.verified.record.ttl_ms);
        self.valid_for_ms = self.valid_for_ms.max(valid_for_ms);
    }

    /// A newer record has come. It shows that the one before does not count, even if it has run out itself. That it has run
    /// out is hearsay: the entry lives on as long as it would have.
    pub(super) fn renew(&mut self, verified: &Arc<Verified>, valid_until: Now, now: Now) {
        let paced_for_ms = self.paced_until().since_ms(now) + RENEW_PAUSE_MS;
        self.valid_for_ms = as_u32(self.valid_until().max(valid_until).since_ms(now));
        self.paced_for_ms = u16::try_from(paced_for_ms).unwrap_or(u16::MAX);
        self.first_heard = now;
        self.verified = Arc::clone(verified);
    }

    /// How long ago the record was signed, as far as known here, in milliseconds.
    pub(super) fn age_ms(&self, now: Now) -> u32 {
        self.verified.record.ttl_ms.saturating_sub(as_u32(self.valid_until().since_ms(now)))
    }

    /// The record as it is handed on.
    pub(super) fn aged(&self, now: Now) -> Aged {
        Aged { verified: Arc::clone(&self.verified), age_ms: self.age_ms(now) }
    }
}

fn as_u32(number: u64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

impl Borrow<NodeId> for Entry {
    fn borrow(&self) -> &NodeId {
        self.node()
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.node() == other.node()
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> Ordering {
        self.node().cmp(other.node())
    }
}
