//! Which groups a source is asked for.
//!
//! A request is taken from what the source has and nobody is asked for: the rarest groups first, and equally rare ones from
//! the **cursor** on, around the file. The cursor is where the last request to this source ended, as long as the rarest
//! groups go on there; otherwise it is drawn. So a source is walked through in long runs; and where another node has been
//! meanwhile, which makes the groups there less rare, the walk goes on somewhere else. (In the simulation of twenty nodes that
//! fetch from one, that one sends 1.08 files in all.)

use std::ops::Range;

use super::{
    GroupSet, Purpose, SourceId, SourceKind, Swarm,
    source::{REQUEST_GROUPS_MIN, Source},
};
use crate::time::Now;

/// Ranges of a request, at most.
pub const RANGES_PER_REQUEST_MAX: usize = 16;

/// What a source owes is asked of another one if that would take this many times longer from the first...
pub const RESCUE_FACTOR: f64 = 1.5;

/// ...and so much longer, in milliseconds.
pub const RESCUE_MARGIN_MS: f64 = 250.0;

/// A hub is asked for what peers have as well, if that saves so much of the time until all has come. Milliseconds.
pub const HUB_SAVES_MS_MIN: f64 = 1_000.0;

impl Swarm {
    /// What to ask a source for next, and why; `None` if it has enough to do, or nothing that is needed.
    pub(super) fn choose(&self, id: SourceId, now: Now) -> Option<(Purpose, GroupSet)> {
        let source = self.sources.get(&id)?;
        if source.slow.is_some() {
            let probe = self.missing.intersection(&source.has).last(REQUEST_GROUPS_MIN);
            return (source.asked.is_empty() && !probe.is_empty()).then_some((Purpose::Probe, probe));
        }
        if source.asked.len() >= source.in_flight_wanted(now) {
            return None;
        }
        let free = self.free(source, now);
        for among in [&self.urgent, &self.missing] {
            let free = free.intersection(among);
            if !free.is_empty() {
                return Some((Purpose::Fetch, self.pick(id, source, &free, now)));
            }
            // What is asked of two comes twice in part. Where many fetch from each other, which is when a source often has nothing new, that takes from all.
            if self.is_free(among) {
                continue;
            }
            let late = self.late(id, source, among, now);
            if !late.is_empty() {
                return Some((Purpose::Rescue, late));
            }
        }
        None
    }

    /// Whether somebody has groups of these of which nobody is asked for.
    fn is_free(&self, among: &GroupSet) -> bool {
        let free = self.unassigned.intersection(among);
        free.ranges().iter().any(|range| self.holders.steps(range).any(|(holders, _)| holders > 0))
    }

    /// What nobody is asked for and the source has. Of others, only what is not on this disk; of a hub, only what no peer has, unless the
    /// rest saves time.
    fn free(&self, source: &Source, now: Now) -> GroupSet {
        let mut free = self.unassigned.intersection(&source.has);
        if source.kind != SourceKind::Disk {
            let disks = self.sources.values().filter(|disk| disk.kind == SourceKind::Disk && disk.is_ready());
            free = disks.fold(free, |free, disk| free.difference(&disk.has));
        }
        if source.kind != SourceKind::Hub || free.is_empty() {
            return free;
        }
        let peers = || self.sources.values().filter(|peer| peer.kind == SourceKind::Peer && peer.is_ready());
        let rate: f64 = peers().filter(|peer| !peer.asked.is_empty()).map(|peer| peer.rate(now)).sum();
        let left = self.unassigned.len() as f64;
        let saved_ms = left / rate - left / (rate + source.rate(now));
        if saved_ms >= HUB_SAVES_MS_MIN {
            return free;
        }
        peers().fold(free, |free, peer| free.difference(&peer.has))
    }

    /// A request's worth of `free`, which is not empty.
    fn pick(&self, id: SourceId, source: &Source, free: &GroupSet, now: Now) -> GroupSet {
        let steps: Vec<_> = free.ranges().iter().flat_map(|range| self.holders.steps(range)).collect();
        let fewest = steps.iter().map(|(holders, _)| *holders).min();
        let rarest: GroupSet =
            steps.iter().filter(|(holders, _)| Some(*holders) == fewest).map(|(_, range)| range.clone()).collect();
        let cursor = source.cursor.filter(|cursor| rarest.contains(*cursor));
        let cursor = cursor.unwrap_or_else(|| self.draw(id, &rarest));

        let around = |(holders, range): (u32, Range<u64>)| {
            let (before, from) = (range.start..range.end.min(cursor), range.start.max(cursor)..range.end);
            [(holders, false, from), (holders, true, before)]
        };
        let mut parts: Vec<_> = steps.into_iter().flat_map(around).filter(|(_, _, range)| !range.is_empty()).collect();
        parts.sort_by_key(|(holders, before, range)| (*holders, *before, range.start));

        // Towards the end, no more than its share of what is left: all are to be done at the same time.
        let rates: f64 = self.sources.values().filter(|other| other.is_ready()).map(|other| other.rate(now)).sum();
        let share = (self.unassigned.len() as f64 * source.rate(now) / rates) as u64;
        let mut left = source.request_groups(now).min(share.max(source.request_groups_min()));
        let mut picked = GroupSet::default();
        for (_, _, range) in parts {
            let end = range.end.min(range.start + left);
            left -= end - range.start;
            picked.insert(range.start..end);
            if left == 0 || picked.ranges().len() == RANGES_PER_REQUEST_MAX {
                break;
            }
        }
        picked
    }

    /// Any group, another one on each node and each time; on a border of shortest requests, so that no scraps remain.
    fn draw(&self, id: SourceId, groups: &GroupSet) -> u64 {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.salt.to_le_bytes()).update(&id.0.to_le_bytes()).update(&self.next_request.to_le_bytes());
        let drawn = hasher.finalize().as_bytes().first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        let group = groups.nth(drawn % groups.len().max(1)).unwrap_or_default();
        let begin = group - group % REQUEST_GROUPS_MIN;
        if groups.contains(begin) { begin } else { group }
    }

    /// What others owe and this source could deliver much earlier: of each late request the last part, so large that both
    /// would be done at the same time. Who owes it goes on meanwhile from the front.
    fn late(&self, id: SourceId, source: &Source, among: &GroupSet, now: Now) -> GroupSet {
        let mut picked = GroupSet::default();
        if among.is_empty() {
            return picked;
        }
        let rescues = self.sources.values().flat_map(|other| &other.asked).filter(|a| a.purpose == Purpose::Rescue);
        let rescued: GroupSet = rescues.flat_map(|asked| asked.owed.ranges()).cloned().collect();
        let mut owed = Vec::new();
        for (_, other) in self.sources.iter().filter(|(other, source)| **other != id && source.slow.is_none()) {
            let rate = other.rate(now);
            let mut ahead = 0;
            for asked in other.asked.iter().filter(|asked| asked.purpose == Purpose::Fetch) {
                let left = asked.owed.difference(&rescued);
                ahead += left.len();
                owed.push((ahead as f64 / rate, rate, left));
            }
        }
        owed.sort_by(|a, b| b.0.total_cmp(&a.0));

        let own_rate = source.rate(now);
        let mut room = source.request_groups(now);
        for (late_ms, rate, left) in owed {
            let able = left.intersection(&source.has).intersection(among);
            let share = able.len() as f64 * own_rate / (own_rate + rate);
            let part = able.last((share.ceil() as u64).min(room));
            let own_ms = source.predicted_ms(picked.len() + part.len(), now);
            let ranges = picked.ranges().len() + part.ranges().len();
            if late_ms < RESCUE_FACTOR * own_ms + RESCUE_MARGIN_MS || ranges > RANGES_PER_REQUEST_MAX {
                break;
            }
            room -= part.len();
            picked = picked.union(&part);
        }
        picked
    }
}
