//! What a liar does: everything that a node can do without others' keys.

use std::sync::Arc;

use iroh_gossip::proto::{Command, Scope};
use murmur_protocol::mesh::MeshId;
use rand::RngExt;

use super::{Direct, Sim};
use crate::{node::Index, notary};

impl Sim {
    /// A liar broadcasts and hands around what it should not.
    pub(super) fn lie(&mut self, at: Index) {
        let Some(victim) = self.contacts(at, 1).first().copied() else { return };
        let (id, sequence) = (self.nodes[victim as usize].id, self.nodes[victim as usize].stored_sequence);
        let ttl_ms = self.scenario.membership.ttl_ms;
        // The victim's tombstone, which the victim has not signed.
        let tombstone = notary::record(id, self.mesh, sequence + 1_000_000, ttl_ms, true);
        let (_, forged) = self.notary.put_down(tombstone, false);
        self.command(at, Command::Broadcast(forged, Scope::Swarm));
        // What the victim signed for another mesh.
        let stranger = notary::record(id, MeshId::public("another"), sequence + 1, ttl_ms, true);
        let (stranger, _) = self.notary.put_down(stranger, true);
        self.send_direct(at, victim, Direct::Records(vec![(stranger, 0, true)]));
        // An old record of anybody, as if it were new.
        if !self.hoard.is_empty() {
            let old = Arc::clone(&self.hoard[self.rng.random_range(0..self.hoard.len())]);
            let everybody: Vec<Index> = self.alive().collect();
            for other in everybody {
                self.send_direct(at, other, Direct::Records(vec![(Arc::clone(&old), 0, true)]));
            }
        }
    }
}
