//! The table itself. See [the module above](super).

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use murmur_protocol::mesh::record::TTL_MS_MAX;
use murmur_protocol::mesh::{MeshId, NodeId, NodeRecord};

use super::{
    CHANGE_BURST, MembershipOptions, Outcome, RECORDS_PER_SECOND, RENEW_PAUSE_MS, RENEWALS_PER_TTL, UPDATE_BURST,
    Unwelcome, Verified,
    entry::{Entry, Peer},
    graves::Graves,
};
use crate::time::Now;

/// Graves of nodes of which nothing but their tombstone was ever seen. Anybody can make up such nodes, so they have few.
const STRANGER_GRAVES_MAX: usize = 1_024;

/// When the own record was signed, and what was right for the size of the mesh then.
#[derive(Debug, Clone, Copy)]
pub(super) struct Renewed {
    pub(super) at: Now,
    every_ms: u64,
    ttl_ms: u32,
}

/// One node's view of the mesh.
///
/// The own record is renewed by the shell, which has the key: it asks when ([`Membership::next_renewal`]), takes a sequence
/// number ([`Membership::renew`]), signs with the validity that fits ([`Membership::ttl_ms`]), gives the record back ([`Membership::set_own`]) and broadcasts it.
#[derive(Debug)]
pub struct Membership {
    pub(super) own: NodeId,
    mesh: MeshId,
    options: MembershipOptions,
    pub(super) own_record: Option<Arc<Verified>>,
    pub(super) next_sequence: u64,
    pub(super) renewed: Option<Renewed>,
    /// Each own record moves this on by the node's share of the time; see [`Membership::next_renewal`].
    spent_until: Now,
    changed: bool,
    left: bool,
    pub(super) nodes: BTreeSet<Entry>,
    graves: Graves,
    stranger_graves: Graves,
    /// No entry runs out before: entries are looked through only when this has come.
    next_expiry: Option<Now>,
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
            nodes: BTreeSet::new(),
            next_expiry: None,
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
        self.nodes.iter().filter(move |entry| entry.is_valid(now)).map(|entry| &entry.verified.record)
    }

    /// The record of a node that is in the mesh.
    pub fn get(&self, node: &NodeId, now: Now) -> Option<&NodeRecord> {
        self.nodes.get(node).filter(|entry| entry.is_valid(now)).map(|entry| &entry.verified.record)
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
        self.nodes.get(node).map(Entry::sequence).max(self.buried(node)).is_none_or(|known| known < sequence)
    }

    /// The highest sequence number seen of a node that is gone.
    pub(super) fn buried(&self, node: &NodeId) -> Option<u64> {
        self.graves.sequence(node).max(self.stranger_graves.sequence(node))
    }

    /// The last word of a node that is gone since lately, with its age in milliseconds.
    pub(super) fn last_word(&self, node: &NodeId, now: Now) -> Option<(&Arc<Verified>, u64)> {
        self.graves.last_word(node, now).or_else(|| self.stranger_graves.last_word(node, now))
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
        if self.buried(&record.node).is_some_and(|buried| record.sequence <= buried) {
            return Outcome::Old;
        }
        if record.tombstone {
            return self.bury(verified, now);
        }
        let valid_until = now.plus_ms(u64::from(record.ttl_ms).saturating_sub(age_ms));
        let Some(known) = self.nodes.get(&record.node) else {
            return self.list(verified, valid_until, from, now);
        };
        let mut entry = known.clone();
        if from == record.node {
            entry.introducer = Peer::from(from);
        }
        let outcome = match record.sequence.cmp(&entry.sequence()) {
            Ordering::Less => Outcome::Old,
            Ordering::Equal => {
                entry.prolong(valid_until);
                Outcome::Known
            }
            Ordering::Greater if entry.paced_until().since_ms(now) > UPDATE_BURST * RENEW_PAUSE_MS => {
                Outcome::Refused(Unwelcome::TooOften)
            }
            Ordering::Greater => {
                entry.renew(verified, valid_until, now);
                Outcome::Newer
            }
        };
        let valid_until = entry.valid_until();
        self.nodes.replace(entry);
        if outcome == Outcome::Newer {
            self.noted(Some(valid_until));
        }
        outcome
    }

    /// Takes the record of a node that is not listed.
    fn list(&mut self, verified: &Arc<Verified>, valid_until: Now, from: NodeId, now: Now) -> Outcome {
        if valid_until <= now {
            return Outcome::Old;
        }
        let node = verified.record.node;
        let displaced = match self.make_room(from, node, now) {
            Ok(displaced) => displaced,
            Err(unwelcome) => return Outcome::Refused(unwelcome),
        };
        self.graves.fill(&node);
        self.stranger_graves.fill(&node);
        self.nodes.insert(Entry::new(verified, valid_until, from, now));
        self.noted(Some(valid_until));
        Outcome::New { displaced }
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
        let mut next_expiry: Option<Now> = None;
        let expired = self.nodes.extract_if(.., |entry| {
            let valid = entry.is_valid(now);
            if valid {
                let valid_until = entry.valid_until();
                next_expiry = Some(next_expiry.map_or(valid_until, |next| next.min(valid_until)));
            }
            !valid
        });
        let expired: Vec<Arc<Verified>> = expired.map(|entry| entry.verified).collect();
        self.next_expiry = next_expiry;
        for last_word in &expired {
            self.graves.dig(Arc::clone(last_word), now);
        }
        if !expired.is_empty() {
            self.noted(None);
        }
        expired.iter().map(|last_word| last_word.record.node).collect()
    }

    /// Takes a node off the list that does not belong to the mesh any more. No copy of what it has said brings it back.
    pub fn expel(&mut self, node: &NodeId, now: Now) {
        if let Some(entry) = self.nodes.take(node) {
            self.graves.dig(entry.verified, now);
            self.noted(None);
        }
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
        let introducer = Peer::from(introducer);
        let mut introduced: BTreeMap<Peer, usize> = BTreeMap::new();
        for entry in &self.nodes {
            *introduced.entry(entry.introducer).or_default() += 1;
        }
        let own_share =
            if introducer == Peer::from(newcomer) { 0 } else { introduced.get(&introducer).copied().unwrap_or(0) };
        let largest = introduced.into_iter().max_by_key(|(_, count)| *count);
        let Some((greediest, _)) = largest.filter(|(_, count)| *count > own_share + 1) else {
            return Err(Unwelcome::Full);
        };
        let of_greediest = self.nodes.iter().filter(|entry| entry.introducer == greediest);
        let newest = of_greediest.max_by_key(|entry| (entry.listed_s, entry.node())).map(|entry| *entry.node());
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
