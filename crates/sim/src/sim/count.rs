//! Keeping count: who lists whom, and since when.

use murmur_protocol::mesh::NodeId;

use super::Sim;
use crate::{measure::ROUND_MS, node::Index};

impl Sim {
    /// Pairs of live nodes of which the first does not list the second.
    pub fn unknown_pairs(&self) -> usize {
        let alive: Vec<Index> = self.alive().collect();
        alive.iter().map(|a| alive.iter().filter(|b| a != *b && !self.lists(*a, **b)).count()).sum()
    }

    /// Pairs of nodes of which the first lives and lists the second, which does not.
    pub fn ghost_pairs(&self) -> usize {
        let dead = || self.nodes.iter().zip(0..).filter(|(node, _)| node.life.is_none()).map(|(_, index)| index);
        self.alive().map(|observer| dead().filter(|node| self.lists(observer, *node)).count()).sum()
    }

    /// `observer` has put a node on its list.
    pub(super) fn listed(&mut self, observer: Index, id: NodeId) {
        let Some(index) = self.by_id.get(&id).copied() else { return };
        let now_ms = self.queue.now_ms();
        let (began_ms, lives, gone) = {
            let node = &self.nodes[index as usize];
            // A copy that is late by less finds out soon.
            let gone = node.life.is_none() && node.ended_ms + 2 * ROUND_MS < now_ms;
            (node.began_ms, node.lives, gone)
        };
        let observer_began_ms = self.nodes[observer as usize].began_ms;
        let Some(life) = &mut self.nodes[observer as usize].life else { return };
        if gone {
            self.report.resurrections += 1;
        } else if life.found[index as usize] < lives {
            life.found[index as usize] = lives;
            self.report.discovery.add(now_ms - began_ms.max(observer_began_ms));
        }
    }

    /// `observer` has taken a node off its list.
    pub(super) fn dropped(&mut self, observer: Index, id: NodeId) {
        let Some(index) = self.by_id.get(&id).copied() else { return };
        let now_ms = self.queue.now_ms();
        let node = &self.nodes[index as usize];
        let listed = self.nodes[observer as usize].life.as_ref().is_some_and(|life| life.found[index as usize] > 0);
        if node.life.is_some() {
            let reachable = self.network.connects(observer, index);
            // Its earlier life may have ended a moment ago, and its new one not be known yet.
            let settled = now_ms.saturating_sub(node.began_ms) > u64::from(self.scenario.membership.ttl_ms);
            self.report.false_departures += u64::from(reachable && settled);
        } else if listed && node.ended_ms == node.valid_until_ms {
            self.report.ghosts.add(now_ms.saturating_sub(node.ended_ms));
        } else if listed {
            self.report.farewell.add(now_ms.saturating_sub(node.ended_ms));
        }
    }

    pub(super) fn count_time(&mut self) {
        let now_ms = self.queue.now_ms();
        self.report.node_ms += self.alive * (now_ms - self.counted_until_ms);
        self.counted_until_ms = now_ms;
    }
}
