//! A table in a few kilobytes, to be compared with a neighbour's.
//!
//! Tables of thousands of nodes differ in a few entries, those that have not got around yet. So the ids are divided into
//! [`Ranges`] of some [`RANGE_NODES`] nodes each, one fingerprint per range is sent, and entries only of ranges whose
//! fingerprints differ: range-based set reconciliation (Aljoscha Meyer, 2022), with the one level that tables of this size need.
//!
//! ```text
//! mark        = first 8 bytes of BLAKE3.derive_key("murmur 2026-11 entry of a table", id, sequence), little-endian
//! fingerprint = sum of the upper halves of mix(mark xor salt) over the entries of a range, modulo 2^32
//! ```
//!
//! where `mix` is the output function of SplitMix64, and sequence 8 bytes, little-endian. The salt is drawn for each
//! comparison: two that are taken for equal by chance are not so the next time, and nobody can choose ids and sequence
//! numbers that hide a difference between others.

use std::ops::RangeInclusive;

use super::error::MessageError;
use super::id::NodeId;

/// Ranges in one summary.
pub const RANGES_MAX: usize = 2_048;
/// Nodes in one range on average, at most, unless there would have to be more than [`RANGES_MAX`].
pub const RANGE_NODES: usize = 8;

const MARK_CONTEXT: &str = "murmur 2026-11 entry of a table";

/// What stands for an entry of a table wherever it is compared.
pub fn mark(node: &NodeId, sequence: u64) -> u64 {
    let mut hasher = blake3::Hasher::new_derive_key(MARK_CONTEXT);
    hasher.update(node.as_bytes()).update(&sequence.to_le_bytes());
    let mut mark = [0; 8];
    hasher.finalize_xof().fill(&mut mark);
    u64::from_le_bytes(mark)
}

/// All ids, divided into a power of two of ranges of equal width.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ranges {
    count_log2: u32,
}

impl Ranges {
    /// As many as a table of so many nodes is compared in.
    pub fn for_nodes(nodes: usize) -> Ranges {
        let count = nodes.div_ceil(RANGE_NODES).min(RANGES_MAX).next_power_of_two();
        Ranges { count_log2: count.ilog2() }
    }

    /// So many; `None` unless it is a power of two, and not above [`RANGES_MAX`].
    pub fn new(count: usize) -> Option<Ranges> {
        (count.is_power_of_two() && count <= RANGES_MAX).then(|| Ranges { count_log2: count.ilog2() })
    }

    /// How many there are.
    pub fn count(self) -> usize {
        1 << self.count_log2
    }

    /// The number of the range that an id is in.
    pub fn of(self, node: &NodeId) -> usize {
        let [a, b, ..] = *node.as_bytes();
        usize::from(u16::from_be_bytes([a, b])) >> (u16::BITS - self.count_log2)
    }

    /// First and last id of a range; `None` if there is none of this number.
    pub fn bounds(self, range: usize) -> Option<RangeInclusive<NodeId>> {
        if range >= self.count() {
            return None;
        }
        let width_log2 = u16::BITS - self.count_log2;
        let bound = |number: usize, rest: u8| {
            let mut id = [rest; 32];
            id[..2].copy_from_slice(&u16::try_from(number).unwrap_or(u16::MAX).to_be_bytes());
            NodeId::from_bytes(id)
        };
        Some(bound(range << width_log2, 0)..=bound(((range + 1) << width_log2) - 1, u8::MAX))
    }
}

/// One fingerprint per range of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    salt: u64,
    ranges: Ranges,
    fingerprints: Vec<u32>,
}

impl Summary {
    /// Of a table, given as ids with the [`mark`]s of their entries, in any order.
    pub fn of(salt: u64, ranges: Ranges, entries: impl Iterator<Item = (NodeId, u64)>) -> Summary {
        let mut fingerprints = vec![0u32; ranges.count()];
        for (node, mark) in entries {
            if let Some(fingerprint) = fingerprints.get_mut(ranges.of(&node)) {
                *fingerprint = fingerprint.wrapping_add((mix(mark ^ salt) >> 32) as u32);
            }
        }
        Summary { salt, ranges, fingerprints }
    }

    pub(super) fn new(salt: u64, fingerprints: Vec<u32>) -> Result<Summary, MessageError> {
        let why = "not a power of two of ranges, or too many";
        let ranges = Ranges::new(fingerprints.len()).ok_or(MessageError::Invalid { what: "summary", why })?;
        Ok(Summary { salt, ranges, fingerprints })
    }

    /// What the fingerprints depend on beside the entries.
    pub fn salt(&self) -> u64 {
        self.salt
    }

    /// What is told apart.
    pub fn ranges(&self) -> Ranges {
        self.ranges
    }

    /// The fingerprints, by number of range.
    pub fn fingerprints(&self) -> &[u32] {
        &self.fingerprints
    }

    /// The numbers of the ranges in which this table and another of the same salt and ranges differ.
    pub fn differing(&self, other: &Summary) -> Vec<u16> {
        let pairs = self.fingerprints.iter().zip(&other.fingerprints);
        (0..).zip(pairs).filter(|(_, (one, other))| one != other).map(|(range, _)| range).collect()
    }
}

/// The output function of Sebastiano Vigna's SplitMix64.
fn mix(mark: u64) -> u64 {
    let mark = (mark ^ (mark >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mark = (mark ^ (mark >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mark ^ (mark >> 31)
}

/// The answer to a [`Summary`]: where the tables differ, and what the sender's table has there.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Differing {
    /// Numbers of ranges, each below [`RANGES_MAX`]. Arrive sorted and without duplicates.
    pub ranges: Vec<u16>,
    /// The sender's entries in these ranges, like a digest: what is not in it, the sender lacks.
    pub entries: Vec<(NodeId, u64)>,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_id_is_within_the_bounds_of_its_range_alone(id in any::<[u8; 32]>(), count_log2 in 0u32..=11) {
            let (node, ranges) = (NodeId::from_bytes(id), Ranges { count_log2 });
            let range = ranges.of(&node);
            for other in [range.wrapping_sub(1), range, range + 1] {
                let within = ranges.bounds(other).is_some_and(|bounds| bounds.contains(&node));
                prop_assert_eq!(within, other == range, "{}", other);
            }
        }
    }

    #[test]
    fn ranges_hold_a_few_nodes_each_and_touch_each_other() {
        let counts = [(0, 1), (1, 1), (8, 1), (9, 2), (5_000, 1_024), (10_000, 2_048), (100_000, RANGES_MAX)];
        for (nodes, count) in counts {
            assert_eq!(Ranges::for_nodes(nodes).count(), count, "{nodes}");
        }
        for count in [0, 3, 2 * RANGES_MAX] {
            assert_eq!(Ranges::new(count), None);
        }
        let ranges = Ranges::new(RANGES_MAX).unwrap();
        assert_eq!(ranges.bounds(0).unwrap().start(), &NodeId::from_bytes([0; 32]));
        assert_eq!(ranges.bounds(RANGES_MAX - 1).unwrap().end(), &NodeId::from_bytes([0xff; 32]));
        assert_eq!(ranges.bounds(RANGES_MAX), None);
        let (end, next) = (*ranges.bounds(6).unwrap().end(), *ranges.bounds(7).unwrap().start());
        let bytes = |id: NodeId| u16::from_be_bytes([id.as_bytes()[0], id.as_bytes()[1]]);
        assert_eq!(bytes(end) + 1, bytes(next));
    }

    #[test]
    fn one_entry_more_or_newer_shows_in_its_range_and_nowhere_else() {
        let ranges = Ranges::new(256).unwrap();
        let node = |number: u8| NodeId::from_bytes([number; 32]);
        let table = |changed: u8| {
            (0..=255).map(move |number| (node(number), mark(&node(number), u64::from(number == changed))))
        };
        let summary = Summary::of(7, ranges, table(0));
        assert_eq!(summary.differing(&Summary::of(7, ranges, table(9))), [0, 9]);
        assert_eq!(summary.differing(&Summary::of(7, ranges, table(0).skip(1))), [0]);
        assert!(summary.differing(&Summary::of(7, ranges, table(0))).is_empty());
        assert_eq!(summary.differing(&Summary::of(8, ranges, table(0))).len(), 256, "another salt");
    }
}
