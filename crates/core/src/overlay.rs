//! The overlay on which records are broadcast: its times, and when a node has it join another.
//!
//! Each node has a few neighbours in a random graph (HyParView), and broadcasts go along a tree in it (PlumTree): in full
//! on the tree, as announcements beside it, so that a neighbour can ask for what does not come. A node that joins forces
//! its way in. A dozen other links give way to it, and every new link carries copies until the tree has found its form
//! again. In a simulated mesh of which each node joined another once a minute, in case the graph had split, each record
//! was sent five times. So a node joins for a reason: it has too few neighbours, or a neighbour in the comparison of
//! records knew for a while what it should have heard, and the graph may really have split.
//!
//! When two nodes part, what one of them has still sent puts it back among those to whom the other announces broadcasts
//! (iroh-gossip 0.101), and so for good: in a simulated mesh of a thousand, five of six announcements went to such former
//! neighbours. The end of their connection ends it. So a node hangs up on those that are connected and no neighbours.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use iroh_gossip::proto::PlumtreeConfig;

use crate::time::Now;

/// Neighbours with which a node is content. The overlay itself looks for up to five.
pub const NEIGHBOURS_WANTED: usize = 2;

/// A broadcast has gone around after this time, or not at all, in milliseconds.
pub const HEARD_WITHIN_MS: u64 = 5_000;

/// Pause between two joins because of what was missed, in milliseconds.
pub const MISSED_PAUSE_MS: u64 = 30_000;

/// How long one that is no neighbour may be connected, in milliseconds: while two get to know each other it is not one yet.
pub const STRANGER_MS: u64 = 10_000;

/// How long a node that was told of a broadcast waits for it before it asks for it, in milliseconds: longer than the tree
/// mostly takes to bring it, a lost packet included.
const GRAFT_AFTER_MS: u64 = 600;

/// How long it waits for the answer before it asks another, in milliseconds: a round trip, a lost packet included.
const GRAFT_AGAIN_MS: u64 = 400;

/// PlumTree can exchange an edge of the tree for one that saves so many hops to the origin of a broadcast. That helps where
/// one node broadcasts. Here all do, on one tree: what is a detour from one is none from another, and the edges would be
/// exchanged for ever. No path is as long as this.
const HOPS_SAVED_MIN: u16 = u16::MAX;

/// Announcements are gathered for this time, in milliseconds.
const ANNOUNCE_EVERY_MS: u64 = 200;

/// How long a broadcast is known when it comes again, in milliseconds: longer than it takes to go around, and a connection
/// that has died to be given up with what is still in it.
const MESSAGES_KNOWN_MS: u64 = 15_000;

/// How broadcasts go around, in a real mesh and in a simulated one.
pub fn broadcast_config() -> PlumtreeConfig {
    PlumtreeConfig {
        graft_timeout_1: Duration::from_millis(GRAFT_AFTER_MS),
        graft_timeout_2: Duration::from_millis(GRAFT_AGAIN_MS),
        dispatch_timeout: Duration::from_millis(ANNOUNCE_EVERY_MS),
        optimization_threshold: HOPS_SAVED_MIN.into(),
        // For neighbours that ask for it.
        message_cache_retention: Duration::from_millis(HEARD_WITHIN_MS),
        message_id_retention: Duration::from_millis(MESSAGES_KNOWN_MS),
        ..PlumtreeConfig::default()
    }
}

/// Whom the overlay is to join.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Join<P> {
    /// Nobody.
    Nobody,
    /// This one: it knew what was missed here.
    Peer(P),
    /// Any nodes that are known, so many at most.
    Any(usize),
}

/// One node's view of the overlay. `P` names a peer.
#[derive(Debug)]
pub struct Overlay<P> {
    neighbours: BTreeSet<P>,
    /// Those that are connected, with since when they are no neighbours.
    connected: BTreeMap<P, Now>,
    knew_more: Option<P>,
    not_before: Now,
}

impl<P: Copy + Ord> Default for Overlay<P> {
    fn default() -> Self {
        Overlay { neighbours: BTreeSet::new(), connected: BTreeMap::new(), knew_more: None, not_before: Now::ZERO }
    }
}

impl<P: Copy + Ord> Overlay<P> {
    /// A neighbour is connected. True if it is the first: what was broadcast before has reached nobody.
    pub fn up(&mut self, peer: P) -> bool {
        let first = self.neighbours.is_empty();
        self.neighbours.insert(peer);
        first
    }

    /// A neighbour is gone.
    pub fn down(&mut self, peer: P) {
        self.neighbours.remove(&peer);
    }

    /// All neighbours are gone.
    pub fn lost(&mut self) {
        self.neighbours.clear();
    }

    /// The neighbours.
    pub fn neighbours(&self) -> impl ExactSizeIterator<Item = P> {
        self.neighbours.iter().copied()
    }

    /// A peer has a connection of the overlay with this node. To be said anew at any time.
    pub fn connected(&mut self, peer: P, now: Now) {
        self.connected.entry(peer).or_insert(now);
    }

    /// Peers to hang up on. To be asked every few seconds.
    pub fn strangers(&mut self, now: Now) -> Vec<P> {
        for (peer, since) in &mut self.connected {
            if self.neighbours.contains(peer) {
                *since = now;
            }
        }
        self.connected.extract_if(.., |_, since| now.since_ms(*since) >= STRANGER_MS).map(|(peer, _)| peer).collect()
    }

    /// Whether one more neighbour would be welcome, where `known` other nodes are known.
    pub fn is_thin(&self, known: usize) -> bool {
        self.neighbours.len() < NEIGHBOURS_WANTED.min(known)
    }

    /// A peer has handed over the newer record of a node that was known before; `age_ms`: how long ago it was signed.
    pub fn handed_newer(&mut self, from: P, age_ms: u64) {
        if age_ms >= HEARD_WITHIN_MS {
            self.knew_more = Some(from);
        }
    }

    /// Whom to join now. To be asked every few seconds.
    pub fn join(&mut self, known: usize, now: Now) -> Join<P> {
        if self.is_thin(known) {
            return Join::Any(NEIGHBOURS_WANTED - self.neighbours.len());
        }
        match self.knew_more.take_if(|_| self.not_before <= now) {
            Some(peer) => {
                self.not_before = now.plus_ms(MISSED_PAUSE_MS);
                Join::Peer(peer)
            }
            None => Join::Nobody,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_with_too_few_neighbours_joins_any_and_one_with_enough_nobody() {
        let mut overlay = Overlay::default();
        assert_eq!(overlay.join(0, Now::ZERO), Join::<u32>::Nobody);
        assert_eq!(overlay.join(10, Now::ZERO), Join::Any(2));
        assert!(overlay.up(1));
        assert_eq!(overlay.join(1, Now::ZERO), Join::Nobody);
        assert_eq!(overlay.join(10, Now::ZERO), Join::Any(1));
        assert!(!overlay.up(2));
        assert_eq!(overlay.join(10, Now::ZERO), Join::Nobody);
        overlay.down(2);
        assert_eq!(overlay.join(10, Now::ZERO), Join::Any(1));
        overlay.lost();
        assert!(overlay.up(1));
    }

    #[test]
    fn who_is_connected_and_no_neighbour_for_a_while_is_a_stranger() {
        let mut overlay = Overlay::default();
        let at = |ms| Now::from_ms(1_000_000 + ms);
        overlay.up(1);
        for peer in 1..=2 {
            overlay.connected(peer, at(0));
        }
        assert!(overlay.strangers(at(STRANGER_MS - 1)).is_empty());
        overlay.connected(2, at(STRANGER_MS - 1));
        assert_eq!(overlay.strangers(at(STRANGER_MS)), [2]);
        assert!(overlay.strangers(at(2 * STRANGER_MS)).is_empty());
        overlay.down(1);
        overlay.connected(2, at(2 * STRANGER_MS));
        overlay.up(2);
        assert_eq!(overlay.strangers(at(3 * STRANGER_MS)), [1]);
    }

    #[test]
    fn who_knew_what_was_missed_is_joined_once_and_then_not_for_a_while() {
        let mut overlay = Overlay::default();
        for peer in 1..=5 {
            overlay.up(peer);
        }
        overlay.handed_newer(7, HEARD_WITHIN_MS - 1);
        assert_eq!(overlay.join(100, Now::ZERO), Join::Nobody);
        overlay.handed_newer(7, HEARD_WITHIN_MS);
        assert_eq!(overlay.join(100, Now::ZERO), Join::Peer(7));
        overlay.handed_newer(8, HEARD_WITHIN_MS);
        assert_eq!(overlay.join(100, Now::from_ms(MISSED_PAUSE_MS - 1)), Join::Nobody);
        assert_eq!(overlay.join(100, Now::from_ms(MISSED_PAUSE_MS)), Join::Peer(8));
    }
}
