//! A mesh that has run for long.

use std::sync::Arc;

use murmur_core::{membership::RENEWALS_PER_TTL, time::Now};
use murmur_protocol::mesh::record::TTL_MS_MAX;
use rand::RngExt;

use super::Sim;
use crate::{node::Index, notary};

impl Sim {
    /// Starts all nodes with the records of all others. Their overlay is yet to form; they broadcast when their records are due,
    /// as if they had started one after the other. The records count for as long as in the largest meshes.
    pub(super) fn settle(&mut self) {
        let indices = 0..self.nodes.len() as Index;
        let mut records = Vec::new();
        for index in indices.clone() {
            let sequence = self.begin(index);
            let age_ms = self.rng.random_range(0..u64::from(TTL_MS_MAX) / RENEWALS_PER_TTL);
            let node = &mut self.nodes[index as usize];
            node.valid_until_ms = u64::from(TTL_MS_MAX) - age_ms;
            let record = notary::record(node.id, self.mesh, sequence, TTL_MS_MAX, false);
            let (verified, _) = self.notary.put_down(record, true);
            records.push((verified, age_ms, index));
        }
        // Tables are sorted, and take the least memory when they are filled in order.
        records.sort_by_key(|(verified, ..)| verified.record().node);
        let now_ms = self.queue.now_ms();
        for index in indices {
            let node = &mut self.nodes[index as usize];
            let now = node.clock.at(now_ms);
            let Some(life) = &mut node.life else { continue };
            for (verified, age_ms, of) in &records {
                if *of != index {
                    life.membership.accept(verified, *age_ms, verified.record().node, now);
                }
            }
            // How often it is renewed depends on how many there are.
            if let Some((verified, age_ms, _)) = records.iter().find(|(.., of)| *of == index) {
                let signed = Now::from_ms(now.as_ms().saturating_sub(*age_ms));
                node.stored_sequence = life.membership.renew(signed);
                life.membership.set_own(Arc::clone(verified));
            }
            life.found.fill(1);
        }
    }
}
