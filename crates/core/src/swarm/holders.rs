//! How many sources have each group.

use std::{collections::BTreeMap, ops::Range};

use super::GroupSet;

/// Counts as steps: each holds from its key to the next one, and none is as high as the one before.
#[derive(Debug, Default)]
pub(super) struct Holders(BTreeMap<u64, u32>);

impl Holders {
    /// One source more has these groups.
    pub(super) fn add(&mut self, groups: &GroupSet) {
        self.change(groups, |count| count + 1);
    }

    /// One source less has them.
    pub(super) fn remove(&mut self, groups: &GroupSet) {
        self.change(groups, |count| count.saturating_sub(1));
    }

    fn change(&mut self, groups: &GroupSet, change: impl Fn(u32) -> u32) {
        for range in groups.ranges() {
            for edge in [range.start, range.end] {
                let count = self.at(edge);
                self.0.entry(edge).or_insert(count);
            }
            self.0.range_mut(range.clone()).for_each(|(_, count)| *count = change(*count));
            for edge in [range.start, range.end] {
                let before = self.0.range(..edge).next_back().map_or(0, |(_, count)| *count);
                if self.0.get(&edge) == Some(&before) {
                    self.0.remove(&edge);
                }
            }
        }
    }

    fn at(&self, group: u64) -> u32 {
        self.0.range(..=group).next_back().map_or(0, |(_, count)| *count)
    }

    /// The parts of `range` and how many have each, ascending. `range` is not empty.
    pub(super) fn steps(&self, range: &Range<u64>) -> impl Iterator<Item = (u32, Range<u64>)> {
        let inner = self.0.range(range.start + 1..range.end).map(|(start, count)| (*start, *count));
        let mut starts = std::iter::once((range.start, self.at(range.start))).chain(inner).peekable();
        let end = range.end;
        std::iter::from_fn(move || {
            let (start, count) = starts.next()?;
            Some((count, start..starts.peek().map_or(end, |(next, _)| *next)))
        })
    }
}
