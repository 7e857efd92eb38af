//! Sets of groups: the pieces in which a file is verified, kept and asked for.
//!
//! Work and memory grow with the number of *ranges* of groups, never with that of groups. To insert or remove a range takes a
//! binary search, and moves what lies behind it only where the number of ranges changes.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::manifest::ByteRange;

/// Bytes that are verified, kept and sent as one: a subtree of 16 chunks of BLAKE3. A file's last group may be shorter. A hash
/// pair per group is 0.4 % of the file.
pub const GROUP_BYTES: u64 = 16 * 1024;

/// A set of group numbers: ascending ranges that neither touch nor overlap.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Vec<(u64, u64)>", into = "Vec<(u64, u64)>")]
pub struct GroupSet {
    ranges: Vec<Range<u64>>,
}

/// The bytes of these groups in a file of `file_bytes`.
pub fn byte_range(groups: &Range<u64>, file_bytes: u64) -> ByteRange {
    let byte = |group: u64| group.saturating_mul(GROUP_BYTES).min(file_bytes);
    ByteRange { start: byte(groups.start), end: byte(groups.end) }
}

impl GroupSet {
    /// Every group of a file of `file_bytes`.
    pub fn all(file_bytes: u64) -> Self {
        Self::from(0..file_bytes.div_ceil(GROUP_BYTES))
    }

    /// The groups that have a byte of these ranges.
    pub fn covering(ranges: &[ByteRange]) -> Self {
        Self::touching(ranges, u64::MAX)
    }

    /// The groups that have a byte of these ranges, in a file of `file_bytes`.
    pub fn touching(ranges: &[ByteRange], file_bytes: u64) -> Self {
        let inside =
            ranges.iter().map(|range| range.start..range.end.min(file_bytes)).filter(|range| !range.is_empty());
        inside.map(|range| range.start / GROUP_BYTES..range.end.div_ceil(GROUP_BYTES)).collect()
    }

    /// The groups that lie in these ranges whole, in a file of `file_bytes`.
    pub fn filled(ranges: &[ByteRange], file_bytes: u64) -> Self {
        // Bytes are numbers, as groups are: ranges that touch become one.
        let joined: Self = ranges.iter().map(|range| range.start..range.end).collect();
        let end = |byte: u64| if byte < file_bytes { byte / GROUP_BYTES } else { file_bytes.div_ceil(GROUP_BYTES) };
        joined.ranges.iter().map(|range| range.start.div_ceil(GROUP_BYTES)..end(range.end)).collect()
    }

    /// The bytes of these groups in a file of `file_bytes`: ascending, apart from each other, none empty.
    pub fn byte_ranges(&self, file_bytes: u64) -> Vec<ByteRange> {
        let ranges = self.ranges.iter().map(|range| byte_range(range, file_bytes));
        ranges.filter(|range| range.start < range.end).collect()
    }

    /// The number of bytes of these groups in a file of `file_bytes`.
    pub fn bytes(&self, file_bytes: u64) -> u64 {
        self.ranges.iter().map(|range| byte_range(range, file_bytes)).map(|range| range.end - range.start).sum()
    }

    /// Ascending; they neither touch nor overlap.
    pub fn ranges(&self) -> &[Range<u64>] {
        &self.ranges
    }

    /// How many groups.
    pub fn len(&self) -> u64 {
        self.ranges.iter().map(|range| range.end - range.start).sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Whether `group` is one of them.
    pub fn contains(&self, group: u64) -> bool {
        let at = self.ranges.partition_point(|own| own.end <= group);
        self.ranges.get(at).is_some_and(|own| own.start <= group)
    }

    /// Those of them that lie in `range`, ascending.
    pub fn within<'a>(&'a self, range: &'a Range<u64>) -> impl Iterator<Item = Range<u64>> + 'a {
        let first = self.ranges.partition_point(|own| own.end <= range.start);
        let reached = self.ranges[first..].iter().take_while(|own| own.start < range.end);
        reached.map(|own| own.start.max(range.start)..own.end.min(range.end)).filter(|part| !part.is_empty())
    }

    /// Adds a range.
    pub fn insert(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        // Those that touch it become one with it.
        let first = self.ranges.partition_point(|own| own.end < range.start);
        let after = self.ranges.partition_point(|own| own.start <= range.end);
        let touched = &self.ranges[first..after];
        let start = touched.first().map_or(range.start, |own| own.start.min(range.start));
        let end = touched.last().map_or(range.end, |own| own.end.max(range.end));
        self.ranges.splice(first..after, std::iter::once(start..end));
    }

    /// Takes a range away.
    pub fn remove(&mut self, range: &Range<u64>) {
        let first = self.ranges.partition_point(|own| own.end <= range.start);
        let after = self.ranges.partition_point(|own| own.start < range.end);
        if first >= after || range.is_empty() {
            return;
        }
        let (before, behind) = (self.ranges[first].start..range.start, range.end..self.ranges[after - 1].end);
        self.ranges.splice(first..after, [before, behind].into_iter().filter(|rest| !rest.is_empty()));
    }

    /// Those of either.
    pub fn union(&self, other: &Self) -> Self {
        self.ranges.iter().chain(&other.ranges).cloned().collect()
    }

    /// Those of both.
    pub fn intersection(&self, other: &Self) -> Self {
        let (few, many) = if self.ranges.len() < other.ranges.len() { (self, other) } else { (other, self) };
        Self { ranges: few.ranges.iter().flat_map(|range| many.within(range)).collect() }
    }

    /// Those that `other` has not.
    pub fn difference(&self, other: &Self) -> Self {
        let mut ranges = Vec::new();
        for range in &self.ranges {
            let mut start = range.start;
            for taken in other.within(range) {
                ranges.push(start..taken.start);
                start = taken.end;
            }
            ranges.push(start..range.end);
        }
        ranges.retain(|range| !range.is_empty());
        Self { ranges }
    }

    /// The `count` last ones, or all.
    pub fn last(&self, count: u64) -> Self {
        let mut left = count;
        let mut ranges = Vec::new();
        for range in self.ranges.iter().rev() {
            if left == 0 {
                break;
            }
            let start = range.start.max(range.end.saturating_sub(left));
            left -= range.end - start;
            ranges.push(start..range.end);
        }
        ranges.reverse();
        Self { ranges }
    }

    /// The one that `before` others precede.
    pub fn nth(&self, before: u64) -> Option<u64> {
        let mut before = before;
        for range in &self.ranges {
            let len = range.end - range.start;
            if before < len {
                return Some(range.start + before);
            }
            before -= len;
        }
        None
    }
}

impl FromIterator<Range<u64>> for GroupSet {
    /// In any order; they may touch and overlap.
    fn from_iter<I: IntoIterator<Item = Range<u64>>>(ranges: I) -> Self {
        let mut sorted: Vec<Range<u64>> = ranges.into_iter().filter(|range| !range.is_empty()).collect();
        sorted.sort_by_key(|range| range.start);
        sorted.dedup_by(|next, last| {
            let touches = next.start <= last.end;
            if touches {
                last.end = last.end.max(next.end);
            }
            touches
        });
        Self { ranges: sorted }
    }
}

impl From<Range<u64>> for GroupSet {
    fn from(range: Range<u64>) -> Self {
        std::iter::once(range).collect()
    }
}

impl From<Vec<(u64, u64)>> for GroupSet {
    fn from(ranges: Vec<(u64, u64)>) -> Self {
        ranges.into_iter().map(|(start, end)| start..end).collect()
    }
}

impl From<GroupSet> for Vec<(u64, u64)> {
    fn from(set: GroupSet) -> Self {
        set.ranges.into_iter().map(|range| (range.start, range.end)).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn ranges() -> impl Strategy<Value = Vec<Range<u64>>> {
        prop::collection::vec((0u64..60, 0u64..12).prop_map(|(start, len)| start..start + len), 0..12)
    }

    fn plain(ranges: &[Range<u64>]) -> BTreeSet<u64> {
        ranges.iter().cloned().flatten().collect()
    }

    /// The set's groups, after a look at its form.
    fn groups(set: &GroupSet) -> BTreeSet<u64> {
        assert!(set.ranges().iter().all(|range| !range.is_empty()), "{set:?}");
        assert!(set.ranges().windows(2).all(|two| two[0].end < two[1].start), "{set:?}");
        let groups = plain(set.ranges());
        assert_eq!(set.len(), groups.len() as u64);
        assert_eq!(set.is_empty(), groups.is_empty());
        groups
    }

    fn byte_ranges(ranges: &[(u64, u64)]) -> Vec<ByteRange> {
        ranges.iter().map(|&(start, end)| ByteRange { start, end }).collect()
    }

    proptest! {
        #[test]
        fn a_set_of_ranges_is_a_set(a in ranges(), b in ranges(), change in (0u64..60, 0u64..12), count in 0u64..70) {
            let (set_a, set_b) = (a.iter().cloned().collect::<GroupSet>(), b.iter().cloned().collect::<GroupSet>());
            let (plain_a, plain_b) = (plain(&a), plain(&b));
            prop_assert_eq!(groups(&set_a), plain_a.clone());
            prop_assert_eq!(groups(&set_a.union(&set_b)), &plain_a | &plain_b);
            prop_assert_eq!(groups(&set_a.intersection(&set_b)), &plain_a & &plain_b);
            prop_assert_eq!(groups(&set_a.difference(&set_b)), &plain_a - &plain_b);

            let range = change.0..change.0 + change.1;
            let in_range: BTreeSet<u64> = range.clone().collect();
            prop_assert_eq!(set_a.within(&range).flatten().collect::<BTreeSet<_>>(), &plain_a & &in_range);
            prop_assert_eq!(groups(&set_a.last(count)), plain_a.iter().rev().take(count as usize).copied().collect());
            prop_assert_eq!(set_a.nth(count), plain_a.iter().nth(count as usize).copied());
        }

        #[test]
        fn a_set_that_changes_does_what_a_set_of_numbers_does(
            steps in prop::collection::vec((any::<bool>(), 0..60u64, 0..12u64), 0..40),
        ) {
            let (mut set, mut model) = (GroupSet::default(), BTreeSet::new());
            for (add, start, len) in steps {
                let range = start..start + len;
                if add {
                    set.insert(range.clone());
                    model.extend(range);
                } else {
                    set.remove(&range);
                    model.retain(|group| !range.contains(group));
                }
                prop_assert_eq!(&groups(&set), &model);
                prop_assert!((0..80).all(|group| set.contains(group) == model.contains(&group)));
            }
            let again: GroupSet = serde_json::from_slice(&serde_json::to_vec(&set).unwrap()).unwrap();
            prop_assert_eq!(again, set);
        }

        #[test]
        fn bytes_become_the_groups_they_touch_or_fill(
            bytes in 1..20 * GROUP_BYTES,
            ranges in prop::collection::vec((0..21 * GROUP_BYTES, 0..5 * GROUP_BYTES), 0..5),
        ) {
            let ranges: Vec<_> = ranges.iter().map(|&(start, len)| ByteRange { start, end: start + len }).collect();
            let has = |byte: u64| ranges.iter().any(|range| (range.start..range.end).contains(&byte));
            let (touching, filled) = (GroupSet::touching(&ranges, bytes), GroupSet::filled(&ranges, bytes));
            for group in 0..bytes.div_ceil(GROUP_BYTES) {
                let ByteRange { start, end } = byte_range(&(group..group + 1), bytes);
                // Where a range begins or ends inside the group, and its first and last byte, decide for all between.
                let inside = ranges.iter().flat_map(|range| [range.start, range.end.saturating_sub(1), range.end]);
                let samples = inside.chain([start, end - 1]).filter(|byte| (start..end).contains(byte));
                let samples: Vec<_> = samples.collect();
                prop_assert_eq!(touching.contains(group), samples.iter().any(|&byte| has(byte)));
                prop_assert_eq!(filled.contains(group), samples.iter().all(|&byte| has(byte)));
            }
            let all = GroupSet::all(bytes);
            prop_assert!(touching.difference(&all).is_empty() && filled.difference(&all).is_empty());
            prop_assert_eq!(all.bytes(bytes), bytes);
        }
    }

    #[test]
    fn groups_cover_bytes_and_end_with_the_file() {
        let file_bytes = 3 * GROUP_BYTES + 100;
        let ranges = [(5, 6), (2 * GROUP_BYTES - 1, 2 * GROUP_BYTES), (3 * GROUP_BYTES, file_bytes)];
        let set = GroupSet::covering(&byte_ranges(&ranges));
        assert_eq!(set.ranges(), [0..2, 3..4]);
        assert_eq!(set.byte_ranges(file_bytes), byte_ranges(&[(0, 2 * GROUP_BYTES), (3 * GROUP_BYTES, file_bytes)]));
        assert_eq!(set.bytes(file_bytes), 2 * GROUP_BYTES + 100);
        assert_eq!(GroupSet::covering(&byte_ranges(&[(7, 7)])), GroupSet::default());
        assert_eq!(GroupSet::from(5..9).byte_ranges(file_bytes), [], "what lies past the end is no part of the file");
        assert_eq!(GroupSet::from(5..9).bytes(file_bytes), 0);
    }

    #[test]
    fn the_largest_numbers_are_numbers_too() {
        let everything = byte_ranges(&[(0, u64::MAX)]);
        assert_eq!(GroupSet::covering(&everything), GroupSet::all(u64::MAX));
        assert_eq!(GroupSet::filled(&everything, 1), GroupSet::all(1));
        assert_eq!(GroupSet::all(u64::MAX).bytes(u64::MAX), u64::MAX);
        let mut set = GroupSet::from(0..u64::MAX);
        set.remove(&(1..u64::MAX));
        set.insert(u64::MAX - 1..u64::MAX);
        assert_eq!(set.bytes(5), 5);
        assert!(set.contains(u64::MAX - 1) && !set.contains(u64::MAX));
    }

    #[test]
    fn what_is_read_becomes_a_set_however_it_was_written() {
        let read: GroupSet = serde_json::from_str("[[7,9],[3,3],[5,4],[0,2],[1,4],[9,10]]").unwrap();
        assert_eq!(read.ranges(), [0..4, 7..10]);
        assert_eq!(serde_json::to_string(&read).unwrap(), "[[0,4],[7,10]]");
    }
}
