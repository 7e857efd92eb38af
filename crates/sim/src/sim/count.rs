//! Keeping count: who lists whom, and since when.

use murmur_protocol::mesh::NodeId;

use super::Sim;
use crate::{
    measure::{DISCOVERY_MS_MAX, GONE_MS_MAX, Report, Survey},
    node::{Index, Life, Node},
};

impl Sim {
    /// Who lists whom at this moment.
    pub fn survey(&self) -> Survey {
        let now_ms = self.queue.now_ms();
        let settled = |node: &Node| node.began_ms + DISCOVERY_MS_MAX <= now_ms;
        let pairs = |nodes: usize| nodes * nodes.saturating_sub(1);
        let lives = || self.nodes.iter().filter_map(|node| Some((node, node.life.as_ref()?)));
        let mut survey = Survey {
            unknown_pairs: pairs(lives().count()),
            overdue_pairs: pairs(lives().filter(|(node, _)| settled(node)).count()),
            ..Survey::default()
        };
        for (observer, life) in lives() {
            for record in life.membership.nodes(observer.clock.at(now_ms)) {
                let Some(index) = self.by_id.get(&record.node) else { continue };
                let node = &self.nodes[*index as usize];
                if node.life.is_some() {
                    survey.unknown_pairs -= 1;
                    survey.overdue_pairs -= usize::from(settled(observer) && settled(node));
                } else {
                    survey.ghost_pairs += 1;
                    survey.overdue_ghosts += usize::from(node.ended_ms + GONE_MS_MAX < now_ms);
                }
            }
        }
        survey
    }

    /// Pairs of live nodes of which the first does not list the second.
    pub fn unknown_pairs(&self) -> usize {
        self.survey().unknown_pairs
    }

    /// Pairs of nodes of which the first lives and lists the second, which does not.
    pub fn ghost_pairs(&self) -> usize {
        self.survey().ghost_pairs
    }

    /// What each node has sent while it lived, in bytes per second, in ascending order.
    pub fn bytes_per_second(&self) -> Vec<f64> {
        let rate = |node: &Node| match self.lived_ms(node) {
            0 => None,
            lived_ms => Some(node.sent_bytes as f64 * 1_000.0 / lived_ms as f64),
        };
        let mut rates: Vec<f64> = self.nodes.iter().filter_map(rate).collect();
        rates.sort_by(f64::total_cmp);
        rates
    }

    /// Starts what is counted anew: after a mesh has settled, for instance.
    pub fn reset_report(&mut self) {
        self.report = Report::default();
        self.counting_from_ms = self.queue.now_ms();
        for node in &mut self.nodes {
            (node.sent_bytes, node.lived_ms) = (0, 0);
        }
    }

    /// `observer` has put a node on its list.
    pub(super) fn listed(&mut self, observer: Index, id: NodeId) {
        let Some(index) = self.by_id.get(&id).copied() else { return };
        let now_ms = self.queue.now_ms();
        let (began_ms, lives, gone) = {
            let node = &self.nodes[index as usize];
            // A copy that is late by less finds out soon.
            let gone = node.life.is_none() && node.ended_ms + GONE_MS_MAX < now_ms;
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

    /// How long a node has lived since counting began, in milliseconds.
    pub(super) fn lived_ms(&self, node: &Node) -> u64 {
        let alive = |_: &Life| self.queue.now_ms() - node.began_ms.max(self.counting_from_ms);
        node.lived_ms + node.life.as_ref().map_or(0, alive)
    }

    pub(super) fn count_time(&mut self) {
        self.report.node_ms = self.nodes.iter().map(|node| self.lived_ms(node)).sum();
    }
}
