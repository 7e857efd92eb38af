//! The table itself. See [the module above](super).

use std::{cmp::Ordering, collections::BTreeMap, sync::Arc};

use murmur_protocol::mesh::record::TTL_MS_MAX;
use murmur_protocol::mesh::{MeshId, NodeId, NodeRecord};

use super::{
    ANSWER_RECORDS_MAX, Aged, Answer, CHANGE_BURST, DIGEST_NODES_MAX, Digest, MembershipOptions, Outcome,
    RECORDS_PER_SECOND, RENEW_PAUSE_MS, RENEWALS_PER_TTL, UPDATE_BURST, Unwelcome, Verified, graves::Graves,
};
use crate::time::Now;

/// Graves of nodes of which nothing but their tombstone was ever seen. Anybody can make up such nodes, so they have few.
const STRANGER_GRAVES_MAX: usize = 1_024;

#[derive(Debug)]
struct Entry {
    verified: Arc<Verified>,
    valid_until: Now,
    /// When this very record was first heard. However new a copy calls itself, it is valid from here on at most.
    first_heard: Now,
    /// The peer that first brought it: the node itself, as soon as it was heard directly. See [`Membership::make_room`].
    introducer: NodeId,
    listed: Now,
    /// Each record taken moves this on by [`RENEW_PAUSE_MS`]; it may be [`UPDATE_BURST`] of them ahead of the time.
    paced_until: Now,
}

impl Entry {
    fn sequence(&self) -> u64 {
        self.verified.record.sequence
    }

    fn aged(&self, now: Now) -> Aged {
        let left_ms = self.valid_until.since_ms(now);
        let age_ms = u64::from(self.verified.record.ttl_ms).saturating_sub(left_ms);
        Aged { verified: Arc::clone(&self.verified), age_ms: u32::try_from(age_ms).unwrap_or(u32::MAX) }
    }
}

/// When the own record was signed, and what was right for the size of the mesh then.
#[derive(Debug, Clone, Copy)]
struct Renewed {
    at: Now,
    every_ms: u64,
    ttl_ms: u32,
}

/// One node's view of the mesh.
///
/// The own record is renewed by the shell, which has the key: it asks when ([`Membership::next_renewal`]), takes a sequence
/// number ([`Membership::renew`]), signs with the validity that fits ([`Membership::ttl_ms`]), gives the record back ([`Membership::set_own`]) and broadcasts it.
#[derive(Debug)]
pub struct Membership {
    own: NodeId,
    mesh: MeshId,
    options: MembershipOptions,
    own_record: Option<Arc<Verified>>,
    next_sequence: u64,
    renewed: Option<Renewed>,
    /// Each own record moves this on by the node's share of the time; see [`Membership::next_renewal`].
    spent_until: Now,
    changed: bool,
    left: bool,
    nodes: BTreeMap<NodeId, Entry>,
    graves: Graves,
    stranger_graves: Graves,
    /// No entry runs out before: entries are looked through only when this has come.
    next_expiry: Option<Now>,
    /// Where the next digest begins when one does not hold all nodes.
    digest_from: NodeId,
    version: u64,
}

impl Membership {
    /// An empty table.
    ///
    /// `first_sequence`: what the own records are numbered from: the time of day in Unix milliseconds or one more than the
    /// last number of the node's earlier life, whichever is larger. Only the node's own records are compared with it.
    pub fn new(own: NodeId, mesh: MeshId, first_sequence: u64, options: MembershipOptions) -> Self {
        Membership {
            own,
            mesh,
            graves: Graves::new(options.graves_max),
            stranger_graves: Graves::new(STRANGER_GRAVES_MAX.min(options.graves_max)),
            options,
            own_record: None,
            next_sequence: first_sequence,
            renewed: None,
            spent_until: Now::ZERO,
            changed: false,
            left: false,
            nodes: BTreeMap::new(),
            next_expiry: None,
            digest_from: NodeId::from_bytes([0; 32]),
            version: 0,
        }
    }

    /// The own id.
    pub fn own(&self) -> NodeId {
        self.own
    }

    /// Grows whenever a node joins, leaves, or says something new: what a watcher compares.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The other nodes' records, by id.
    pub fn nodes(&self, now: Now) -> impl Iterator<Item = &NodeRecord> {
        self.nodes.values().filter(move |entry| entry.valid_until > now).map(|entry| &entry.verified.record)
    }

    /// The record of a node that is in the mesh.
    pub fn get(&self, node: &NodeId, now: Now) -> Option<&NodeRecord> {
        self.nodes.get(node).filter(|entry| entry.valid_until > now).map(|entry| &entry.verified.record)
    }

    /// How many other nodes are listed. Some may have expired since [`Membership::expire`] was called last.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether no other node is listed.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// When the own record has to be signed anew. `None` after [`Membership::leave`].
    pub fn next_renewal(&self) -> Option<Now> {
        if self.left {
            return None;
        }
        let Some(renewed) = self.renewed else { return Some(Now::ZERO) };
        let regular = renewed.at.plus_ms(renewed.every_ms);
        if !self.changed {
            return Some(regular);
        }
        let ahead_ms = (CHANGE_BURST - 1) * self.share_ms();
        let paced = Now::from_ms(self.spent_until.as_ms().saturating_sub(ahead_ms));
        Some(regular.min(paced.max(renewed.at.plus_ms(RENEW_PAUSE_MS))))
    }

    /// How long the record counts for which [`Membership::renew`] has given a number last, in milliseconds.
    pub fn ttl_ms(&self) -> u32 {
        self.renewed.map_or(self.options.ttl_ms, |renewed| renewed.ttl_ms)
    }

    /// The pause between two records of each node at which all together send [`RECORDS_PER_SECOND`].
    fn share_ms(&self) -> u64 {
        (self.nodes.len() as u64 + 1) * 1_000 / RECORDS_PER_SECOND
    }

    /// Something changed that others need for their decisions: the record is renewed early.
    pub fn note_change(&mut self) {
        self.changed = true;
    }

    /// The sequence number of the record that is to be signed now. Each is given out once.
    pub fn renew(&mut self, now: Now) -> u64 {
        let share_ms = self.share_ms();
        let stretched_ms = share_ms.min(u64::from(TTL_MS_MAX) / RENEWALS_PER_TTL);
        let ttl_ms = u32::try_from(stretched_ms * RENEWALS_PER_TTL).unwrap_or(TTL_MS_MAX);
        self.renewed = Some(Renewed {
            at: now,
            every_ms: self.options.renew_every_ms.max(stretched_ms),
            ttl_ms: self.options.ttl_ms.max(ttl_ms),
        });
        self.spent_until = self.spent_until.max(now).plus_ms(share_ms);
        self.changed = false;
        let sequence = self.next_sequence;
        self.next_sequence = sequence.saturating_add(1);
        sequence
    }

    /// Takes the own record that was just signed, so that neighbours get it.
    pub fn set_own(&mut self, record: Arc<Verified>) {
        self.own_record = Some(record);
    }

    /// The sequence number of the own tombstone. The own record is not renewed any more.
    pub fn leave(&mut self, now: Now) -> u64 {
        self.left = true;
        self.renew(now)
    }

    /// Whether a record that claims to be this one would change anything: signatures of copies need not be checked.
    pub fn is_news(&self, node: &NodeId, sequence: u64) -> bool {
        if *node == self.own {
            return sequence >= self.next_sequence;
        }
        let known = self.nodes.get(node).map(Entry::sequence);
        known
            .max(self.graves.sequence(node))
            .max(self.stranger_graves.sequence(node))
            .is_none_or(|known| known < sequence)
    }

    /// Takes a record.
    ///
    /// `age_ms`: how long ago the record was signed, as `from` says; 0 for a broadcast. `from`: the peer that handed it over.
    pub fn accept(&mut self, verified: &Arc<Verified>, age_ms: u64, from: NodeId, now: Now) -> Outcome {
        let record = &verified.record;
        if record.mesh != self.mesh {
            return Outcome::Refused(Unwelcome::WrongMesh);
        }
        if record.node == self.own {
            return self.heard_of_own(record.sequence);
        }
        let buried = self.graves.sequence(&record.node).max(self.stranger_graves.sequence(&record.node));
        if buried.is_some_and(|buried| record.sequence <= buried) {
            return Outcome::Old;
        }
        if record.tombstone {
            return self.bury(verified, now);
        }
        let valid_until = now.plus_ms(u64::from(record.ttl_ms).saturating_sub(age_ms));
        match self.nodes.get_mut(&record.node) {
            Some(entry) => {
                if from == record.node {
                    entry.introducer = from;
                }
                match record.sequence.cmp(&entry.sequence()) {
                    Ordering::Less => return Outcome::Old,
                    Ordering::Equal => {
                        let at_most = entry.first_heard.plus_ms(record.ttl_ms.into());
                        entry.valid_until = entry.valid_until.max(valid_until.min(at_most));
                        return Outcome::Known;
                    }
                    Ordering::Greater => {}
                }
                let paced_until = entry.paced_until.max(now);
                if paced_until > now.plus_ms(UPDATE_BURST * RENEW_PAUSE_MS) {
                    return Outcome::Refused(Unwelcome::TooOften);
                }
                entry.paced_until = paced_until.plus_ms(RENEW_PAUSE_MS);
                entry.verified = Arc::clone(verified);
                entry.first_heard = now;
                // A newer record shows that the one before does not count, even if it has run out itself. That it has
                // run out is hearsay: the entry lives on as long as it would have.
                entry.valid_until = entry.valid_until.max(valid_until);
                let valid_until = entry.valid_until;
                self.noted(Some(valid_until));
                Outcome::Newer
            }
            None if valid_until <= now => Outcome::Old,
            None => {
                let displaced = match self.make_room(from, record.node, now) {
                    Ok(displaced) => displaced,
                    Err(unwelcome) => return Outcome::Refused(unwelcome),
                };
                self.graves.fill(&record.node);
                self.stranger_graves.fill(&record.node);
                let entry = Entry {
                    verified: Arc::clone(verified),
                    valid_until,
                    first_heard: now,
                    introducer: from,
                    listed: now,
                    paced_until: now.plus_ms(RENEW_PAUSE_MS),
                };
                self.nodes.insert(record.node, entry);
                self.noted(Some(valid_until));
                Outcome::New { displaced }
            }
        }
    }

    /// The next moment at which a node may expire. To be asked again after [`Membership::expire`].
    pub fn next_expiry(&self) -> Option<Now> {
        self.next_expiry
    }

    /// Removes the nodes whose records have run out, and says which.
    pub fn expire(&mut self, now: Now) -> Vec<NodeId> {
        if self.next_expiry.is_none_or(|next| next > now) {
            return Vec::new();
        }
        let expired = self.nodes.extract_if(.., |_, entry| entry.valid_until <= now);
        let expired: Vec<Arc<Verified>> = expired.map(|(_, entry)| entry.verified).collect();
        for last_word in &expired {
            self.graves.dig(Arc::clone(last_word), now);
        }
        self.next_expiry = self.nodes.values().map(|entry| entry.valid_until).min();
        if !expired.is_empty() {
            self.noted(None);
        }
        expired.iter().map(|last_word| last_word.record.node).collect()
    }

    /// Takes a node off the list that does not belong to the mesh any more. No copy of what it has said brings it back.
    pub fn expel(&mut self, node: &NodeId, now: Now) {
        if let Some(entry) = self.nodes.remove(node) {
            self.graves.dig(entry.verified, now);
            self.noted(None);
        }
    }

    /// What to tell a neighbour about what is known here, by id. A table larger than [`DIGEST_NODES_MAX`] is told part by
    /// part, the next with the next call.
    pub fn digest(&mut self, now: Now) -> Digest {
        let live = |(node, entry): (&NodeId, &Entry)| (entry.valid_until > now).then(|| (*node, entry.sequence()));
        let mut digest: Digest = self.nodes.range(self.digest_from..).filter_map(live).take(DIGEST_NODES_MAX).collect();
        if digest.len() < DIGEST_NODES_MAX {
            // The end of the table. A part has to be of full length: a shorter one would say that this is all.
            digest = self.nodes.iter().rev().filter_map(live).take(DIGEST_NODES_MAX).collect();
            digest.reverse();
            self.digest_from = NodeId::from_bytes([0; 32]);
        } else if let Some((last, _)) = digest.last() {
            self.digest_from = *last;
        }
        if digest.len() + 1 < DIGEST_NODES_MAX {
            let at = digest.partition_point(|(node, _)| *node < self.own);
            let own = self.own_record.as_ref().map(|own| (self.own, own.record.sequence));
            digest.splice(at..at, own);
        }
        digest
    }

    /// Compares a neighbour's digest with what is known here.
    pub fn answer(&mut self, digest: &[(NodeId, u64)], now: Now) -> Answer {
        let digest = digest.get(..DIGEST_NODES_MAX).unwrap_or(digest);
        let mut theirs: BTreeMap<NodeId, u64> = BTreeMap::new();
        for (node, sequence) in digest {
            let known = theirs.entry(*node).or_insert(*sequence);
            *known = (*known).max(*sequence);
        }
        let covers =
            if digest.len() < DIGEST_NODES_MAX { None } else { theirs.keys().next().zip(theirs.keys().next_back()) };
        let covered = |node: &NodeId| covers.is_none_or(|(first, last)| (first..=last).contains(&node));
        let mut answer = Answer::default();
        for (node, sequence) in &theirs {
            if *node == self.own {
                // Asked for, not believed: the number that the own records go on from has to bear the own signature.
                answer.want.extend((*sequence >= self.next_sequence).then_some(self.own));
                continue;
            }
            let ours = self.nodes.get(node).map(Entry::sequence);
            let buried = self.graves.sequence(node).max(self.stranger_graves.sequence(node));
            if ours.max(buried).is_none_or(|known| known < *sequence) {
                answer.want.push(*node);
            } else if ours.is_none() && buried.is_some_and(|buried| buried > *sequence) {
                answer.records.extend(self.last_word(node, now));
            }
        }
        let own = self
            .own_aged(now)
            .filter(|own| theirs.get(&self.own).is_none_or(|known| *known < own.verified.record.sequence));
        answer.records.extend(own);
        let lacking = self.nodes.iter().filter(|(node, entry)| {
            entry.valid_until > now && covered(node) && theirs.get(node).is_none_or(|known| *known < entry.sequence())
        });
        let room = ANSWER_RECORDS_MAX.saturating_sub(answer.records.len());
        answer.records.extend(lacking.take(room).map(|(_, entry)| entry.aged(now)));
        answer
    }

    /// The records that a neighbour asks for, as far as they are here.
    pub fn wanted(&self, nodes: &[NodeId], now: Now) -> Vec<Aged> {
        let wanted = nodes.iter().take(DIGEST_NODES_MAX).filter_map(|node| {
            if *node == self.own {
                return self.own_aged(now);
            }
            match self.nodes.get(node) {
                Some(entry) => (entry.valid_until > now).then(|| entry.aged(now)),
                None => self.last_word(node, now),
            }
        });
        wanted.collect()
    }

    fn own_aged(&self, now: Now) -> Option<Aged> {
        let verified = Arc::clone(self.own_record.as_ref()?);
        let age_ms = self.renewed.map_or(0, |renewed| now.since_ms(renewed.at));
        Some(Aged { verified, age_ms: u32::try_from(age_ms).unwrap_or(u32::MAX) })
    }

    fn last_word(&self, node: &NodeId, now: Now) -> Option<Aged> {
        let last_word = self.graves.last_word(node, now).or_else(|| self.stranger_graves.last_word(node, now));
        let (verified, age_ms) = last_word?;
        Some(Aged { verified: Arc::clone(verified), age_ms: u32::try_from(age_ms).unwrap_or(u32::MAX) })
    }

    fn heard_of_own(&mut self, sequence: u64) -> Outcome {
        if sequence < self.next_sequence {
            return Outcome::Known;
        }
        self.next_sequence = sequence.saturating_add(1);
        self.changed = true;
        Outcome::Overtaken
    }

    fn bury(&mut self, tombstone: &Arc<Verified>, now: Now) -> Outcome {
        let record = &tombstone.record;
        match self.nodes.get(&record.node) {
            Some(entry) if entry.sequence() > record.sequence => Outcome::Old,
            Some(_) => {
                self.nodes.remove(&record.node);
                self.graves.dig(Arc::clone(tombstone), now);
                self.noted(None);
                Outcome::Departed
            }
            // Expired here already: the grave is one of a node that was listed, and now has its last word in it.
            None if self.graves.sequence(&record.node).is_some() => {
                self.graves.dig(Arc::clone(tombstone), now);
                Outcome::Known
            }
            None => {
                self.stranger_graves.dig(Arc::clone(tombstone), now);
                Outcome::Known
            }
        }
    }

    /// Sees to it that one more node fits, and says which had to go for it.
    ///
    /// Anybody can make up any number of nodes, but each comes in through some peer. In a full table, the peer that has
    /// introduced the most gives up its newest introduction for one of a peer that has introduced fewer; so a flood displaces
    /// itself. A node heard directly counts as introduced by itself, and stays.
    fn make_room(&mut self, introducer: NodeId, newcomer: NodeId, now: Now) -> Result<Vec<NodeId>, Unwelcome> {
        if self.nodes.len() < self.options.nodes_max {
            return Ok(Vec::new());
        }
        let expired = self.expire(now);
        if !expired.is_empty() {
            return Ok(expired);
        }
        let mut introduced: BTreeMap<NodeId, usize> = BTreeMap::new();
        for entry in self.nodes.values() {
            *introduced.entry(entry.introducer).or_default() += 1;
        }
        let own_share = if introducer == newcomer { 0 } else { introduced.get(&introducer).copied().unwrap_or(0) };
        let largest = introduced.into_iter().max_by_key(|(_, count)| *count);
        let Some((greediest, _)) = largest.filter(|(_, count)| *count > own_share + 1) else {
            return Err(Unwelcome::Full);
        };
        let of_greediest = self.nodes.iter().filter(|(_, entry)| entry.introducer == greediest);
        let newest = of_greediest.max_by_key(|(node, entry)| (entry.listed, **node)).map(|(node, _)| *node);
        if let Some(node) = newest {
            // No grave: it has not gone anywhere.
            self.nodes.remove(&node);
        }
        Ok(newest.into_iter().collect())
    }

    fn noted(&mut self, valid_until: Option<Now>) {
        self.version += 1;
        if let Some(valid_until) = valid_until {
            self.next_expiry = Some(self.next_expiry.map_or(valid_until, |next| next.min(valid_until)));
        }
    }
}
