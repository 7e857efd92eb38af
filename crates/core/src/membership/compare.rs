//! Two neighbours compare their tables, and each hands over what the other lacks.
//!
//! A small table is told whole ([`Opening::Digest`]). Of a larger one a fingerprint for each range of ids is told
//! ([`Opening::Summary`], see [`murmur_protocol::mesh::summary`]): the other names the ranges in which it knows something else,
//! and what ([`Membership::differing`]). What then has to be said grows with the number of differences alone.

use std::{collections::BTreeMap, iter, ops::RangeInclusive, sync::Arc};

use murmur_protocol::mesh::control::DIGEST_ENTRIES_MAX;
use murmur_protocol::mesh::{Differing, NodeId, Ranges, Summary};

use super::{ANSWER_RECORDS_MAX, Aged, Answer, DIGEST_NODES_MAX, Digest, Entry, Membership, Verified};
use crate::time::Now;

/// Nodes that know no summaries send digests of this length of the parts of their tables.
const DIGEST_PART_ENTRIES: usize = 1_024;

const ALL: RangeInclusive<NodeId> = NodeId::from_bytes([0; 32])..=NodeId::from_bytes([u8::MAX; 32]);

/// How a comparison begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Opening {
    /// All that is known here: for [`Membership::answer`].
    Digest(Digest),
    /// The same in short: for [`Membership::differing`].
    Summary(Summary),
}

impl Membership {
    /// Begins a comparison. `salt`: random, if the neighbour knows summaries.
    pub fn opening(&self, salt: Option<u64>, now: Now) -> Opening {
        match salt {
            Some(salt) if self.len() > DIGEST_NODES_MAX => Opening::Summary(self.summary(salt, now)),
            _ => Opening::Digest(self.digest(now)),
        }
    }

    /// All nodes that are known here, the own included, with the sequence numbers of their latest records.
    pub fn digest(&self, now: Now) -> Digest {
        self.entries(ALL, now).take(DIGEST_ENTRIES_MAX).collect()
    }

    /// Their fingerprints.
    pub fn summary(&self, salt: u64, now: Now) -> Summary {
        self.summary_of(salt, Ranges::for_nodes(self.len() + 1), now)
    }

    fn summary_of(&self, salt: u64, ranges: Ranges, now: Now) -> Summary {
        Summary::of(salt, ranges, self.known(ALL, now).map(|verified| (verified.record.node, verified.mark)))
    }

    /// Compares a neighbour's summary with what is known here.
    pub fn differing(&self, summary: &Summary, now: Now) -> Differing {
        let ranges = summary.differing(&self.summary_of(summary.salt(), summary.ranges(), now));
        let entries = bounds(&ranges, summary.ranges()).flat_map(|bounds| self.entries(bounds, now));
        Differing { entries: entries.take(DIGEST_ENTRIES_MAX).collect(), ranges }
    }

    /// Compares a neighbour's digest with what is known here.
    pub fn answer(&self, digest: &[(NodeId, u64)], now: Now) -> Answer {
        let ids = || digest.iter().map(|(node, _)| *node);
        let part = ids().min().zip(ids().max()).filter(|_| digest.len() >= DIGEST_PART_ENTRIES);
        self.answer_within(digest, iter::once(part.map_or(ALL, |(first, last)| first..=last)), now)
    }

    /// Compares what a neighbour has where it differs; `ranges`: those of the summary that it answers. Numbers of ranges that
    /// the summary did not have mean nothing.
    pub fn answer_differing(&self, differing: &Differing, ranges: Ranges, now: Now) -> Answer {
        self.answer_within(&differing.entries, bounds(&differing.ranges, ranges), now)
    }

    /// `theirs`: all that the neighbour knows within some bounds.
    fn answer_within(
        &self,
        theirs: &[(NodeId, u64)],
        within: impl Iterator<Item = RangeInclusive<NodeId>>,
        now: Now,
    ) -> Answer {
        let mut highest: BTreeMap<NodeId, u64> = BTreeMap::new();
        for (node, sequence) in theirs {
            let known = highest.entry(*node).or_insert(*sequence);
            *known = (*known).max(*sequence);
        }
        let mut answer = Answer::default();
        for (node, sequence) in &highest {
            if *node == self.own {
                // Asked for, not believed: the number that the own records go on from has to bear the own signature.
                answer.want.extend((*sequence >= self.next_sequence).then_some(self.own));
                continue;
            }
            let ours = self.nodes.get(node).map(Entry::sequence);
            let buried = self.buried(node);
            if ours.max(buried).is_none_or(|known| known < *sequence) {
                answer.want.push(*node);
            } else if ours.is_none() && buried.is_some_and(|buried| buried > *sequence) {
                answer.records.extend(self.held(node, now));
            }
        }
        let known = within.flat_map(|bounds| self.known(bounds, now));
        let lacking = known.filter(|verified| {
            highest.get(&verified.record.node).is_none_or(|known| *known < verified.record.sequence)
        });
        let room = ANSWER_RECORDS_MAX.saturating_sub(answer.records.len());
        answer.records.extend(lacking.take(room).filter_map(|verified| self.held(&verified.record.node, now)));
        answer
    }

    /// The records that a neighbour asks for, as far as they are here.
    pub fn wanted(&self, nodes: &[NodeId], now: Now) -> Vec<Aged> {
        nodes.iter().take(ANSWER_RECORDS_MAX).filter_map(|node| self.held(node, now)).collect()
    }

    /// The record of a node as it is handed on: its last word, if the node is gone since lately.
    fn held(&self, node: &NodeId, now: Now) -> Option<Aged> {
        if let Some(entry) = self.nodes.get(node) {
            return entry.is_valid(now).then(|| entry.aged(now));
        }
        let (verified, age_ms) = if *node == self.own {
            (self.own_record.as_ref()?, self.renewed.map_or(0, |renewed| now.since_ms(renewed.at)))
        } else {
            self.last_word(node, now)?
        };
        Some(Aged { verified: Arc::clone(verified), age_ms: u32::try_from(age_ms).unwrap_or(u32::MAX) })
    }

    /// The latest records of the nodes of a range, the own included.
    fn known(&self, within: RangeInclusive<NodeId>, now: Now) -> impl Iterator<Item = &Arc<Verified>> {
        let own = self.own_record.iter().filter({
            let within = within.clone();
            move |own| within.contains(&own.record.node)
        });
        let listed = self.nodes.range(within).filter(move |entry| entry.is_valid(now));
        listed.map(|entry| &entry.verified).chain(own)
    }

    fn entries(&self, within: RangeInclusive<NodeId>, now: Now) -> impl Iterator<Item = (NodeId, u64)> {
        self.known(within, now).map(|verified| (verified.record.node, verified.record.sequence))
    }
}

fn bounds(numbers: &[u16], ranges: Ranges) -> impl Iterator<Item = RangeInclusive<NodeId>> {
    numbers.iter().filter_map(move |number| ranges.bounds((*number).into()))
}
