//! What is remembered of nodes that are gone.
//!
//! A copy of a departed node's record may still travel, by accident or on purpose, and its signature is as good as ever.
//! A grave is the highest sequence number that was seen of such a node: nothing that is not newer gets back into the
//! table. For a while it also holds the node's last word (its tombstone, or the record that ran out), to show to those that
//! still list the node under a lower number. Graves are bounded; the oldest gives way. What then comes back is a ghost
//! for as long as one record is valid, and gets a grave again.

use std::{collections::BTreeMap, sync::Arc};

use murmur_protocol::mesh::NodeId;

use super::Verified;
use crate::time::Now;

/// How long a node's last word is handed on.
const LAST_WORD_KEEP_MS: u64 = 10 * 60_000;

#[derive(Debug)]
struct Grave {
    /// The node's tombstone, or its last record.
    last_word: Arc<Verified>,
    dug: Now,
    /// Key of this grave in `oldest_first`.
    order: u64,
}

/// A bounded set of graves.
#[derive(Debug)]
pub(crate) struct Graves {
    graves_max: usize,
    by_node: BTreeMap<NodeId, Grave>,
    oldest_first: BTreeMap<u64, NodeId>,
    next_order: u64,
}

impl Graves {
    /// Room for `graves_max` graves.
    pub(crate) fn new(graves_max: usize) -> Self {
        Graves { graves_max, by_node: BTreeMap::new(), oldest_first: BTreeMap::new(), next_order: 0 }
    }

    /// The highest sequence number seen of a node that is gone.
    pub(crate) fn sequence(&self, node: &NodeId) -> Option<u64> {
        self.by_node.get(node).map(|grave| grave.last_word.record().sequence)
    }

    /// The last word of a node that is gone since lately, with its age in milliseconds.
    pub(crate) fn last_word(&self, node: &NodeId, now: Now) -> Option<(&Arc<Verified>, u64)> {
        let grave = self.by_node.get(node)?;
        let buried_ms = now.since_ms(grave.dug);
        let record = grave.last_word.record();
        let lived_ms = if record.tombstone { 0 } else { u64::from(record.ttl_ms) };
        (buried_ms < LAST_WORD_KEEP_MS).then_some((&grave.last_word, lived_ms + buried_ms))
    }

    /// Remembers a node that is gone. A grave never goes back to a lower sequence number.
    pub(crate) fn dig(&mut self, last_word: Arc<Verified>, now: Now) {
        let (node, sequence) = (last_word.record().node, last_word.record().sequence);
        if self.sequence(&node).is_some_and(|known| known > sequence) {
            return;
        }
        self.fill(&node);
        while self.by_node.len() >= self.graves_max {
            let Some((_, oldest)) = self.oldest_first.pop_first() else { return };
            self.by_node.remove(&oldest);
        }
        let order = self.next_order;
        self.next_order += 1;
        self.oldest_first.insert(order, node);
        self.by_node.insert(node, Grave { last_word, dug: now, order });
    }

    /// Forgets a grave: the node is back, and the table remembers its sequence number.
    pub(crate) fn fill(&mut self, node: &NodeId) {
        if let Some(grave) = self.by_node.remove(node) {
            self.oldest_first.remove(&grave.order);
        }
    }
}
