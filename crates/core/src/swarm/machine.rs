//! The swarm's state, and what each event does to it. See [the module above](super).

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use super::{
    Action, DropReason, Event, GROUP_BYTES, GroupSet, Outcome, Progress, Purpose, RequestId, SourceId, SourceKind,
    StuckReason,
    holders::Holders,
    source::{Asked, IN_FLIGHT_MAX, RANGES_MAX, REQUEST_GROUPS_MIN, Source},
};
use crate::time::Now;

/// Sources at a time. Another one is taken when one of them has gone.
pub const SOURCES_MAX: usize = 64;

/// While one source owes something and another has nothing to do, it is seen so often whether the second should help.
/// Milliseconds.
const LOOK_MS: u64 = 250;

/// One file, on its way from many sources.
#[derive(Debug)]
pub struct Swarm {
    file_bytes: u64,
    pub(super) file_groups: u64,
    pub(super) salt: u64,
    done: GroupSet,
    /// Wanted, and has not come.
    pub(super) missing: GroupSet,
    /// Those of the missing ones that come first.
    pub(super) urgent: GroupSet,
    /// Those of the missing ones that nobody is asked for, except by a probe.
    pub(super) unassigned: GroupSet,
    pub(super) holders: Holders,
    pub(super) sources: BTreeMap<SourceId, Source>,
    dropped: BTreeSet<SourceId>,
    pub(super) next_request: u64,
    doubled_groups: u64,
    /// [`Action::Done`] was said of all that is wanted.
    told_done: bool,
    /// What [`Action::Stuck`] was said of.
    told_stuck: Option<GroupSet>,
    /// When it was last decided whom to ask.
    looked: Now,
    look_at: Option<Now>,
    actions: Vec<Action>,
}

impl Swarm {
    /// A file of `file_bytes`, of which nothing is wanted yet. `salt`: any number that is another on each node, so that nodes
    /// that begin together do not fetch the same parts first.
    pub fn new(file_bytes: u64, salt: u64) -> Self {
        Swarm {
            file_bytes,
            file_groups: file_bytes.div_ceil(GROUP_BYTES),
            salt,
            done: GroupSet::default(),
            missing: GroupSet::default(),
            urgent: GroupSet::default(),
            unassigned: GroupSet::default(),
            holders: Holders::default(),
            sources: BTreeMap::new(),
            dropped: BTreeSet::new(),
            next_request: 0,
            doubled_groups: 0,
            told_done: true,
            told_stuck: None,
            looked: Now::ZERO,
            look_at: None,
            actions: Vec::new(),
        }
    }

    /// Takes an event, and says what to do.
    pub fn handle(&mut self, event: Event, now: Now) -> Vec<Action> {
        let go_on = match event {
            Event::Source { id, kind, has, rtt_ms } => self.announced(id, kind, has, rtt_ms, now),
            Event::Received { id, request, groups } => self.received(id, request, groups, now),
            Event::Finished { id, request } => self.finished(id, request, now),
            Event::Failed { id, request, outcome } => self.failed(id, request, outcome, now),
            Event::Left { id } => self.remove(id),
            Event::Tick => true,
            Event::Want { groups, urgent } => self.want(&groups, urgent),
        };
        if go_on {
            self.go_on(now);
        }
        std::mem::take(&mut self.actions)
    }

    /// When it wants [`Event::Tick`]; `None` if time alone changes nothing.
    pub fn next_tick(&self) -> Option<Now> {
        if self.missing.is_empty() {
            return None;
        }
        let hopeless_at = |source: &Source| source.hopeless_at().filter(|at| *at > self.looked);
        let of = |source: &Source| [source.paused, source.silent_at(), hopeless_at(source)];
        self.sources.values().flat_map(of).chain([self.look_at]).flatten().min()
    }

    /// How far it is, and what each source does.
    pub fn progress(&self, now: Now) -> Progress {
        let (done_bytes, missing_bytes) = (self.done.bytes(self.file_bytes), self.missing.bytes(self.file_bytes));
        let sources: Vec<_> = self.sources.iter().map(|(id, source)| source.progress(*id, now)).collect();
        let working = sources.iter().filter(|source| !source.owes.is_empty());
        let bytes_per_s: f64 = working.map(|source| source.bytes_per_s).sum();
        Progress {
            wanted_bytes: done_bytes + missing_bytes,
            done_bytes,
            doubled_bytes: self.doubled_groups * GROUP_BYTES,
            bytes_per_s,
            eta_ms: match missing_bytes {
                0 => Some(0),
                _ => (bytes_per_s > 0.0).then(|| (missing_bytes as f64 / bytes_per_s * 1_000.0) as u64),
            },
            sources,
        }
    }

    fn announced(&mut self, id: SourceId, kind: SourceKind, has: GroupSet, rtt_ms: u32, now: Now) -> bool {
        let known = self.sources.contains_key(&id);
        if self.dropped.contains(&id) || (!known && self.sources.len() >= SOURCES_MAX) {
            return false;
        }
        let ranges = has.ranges().iter().take(RANGES_MAX);
        let has: GroupSet = ranges.map(|range| range.start..range.end.min(self.file_groups)).collect();
        let source = self.sources.entry(id).or_insert_with(|| Source::new(kind, now));
        self.holders.remove(&source.has.difference(&has));
        self.holders.add(&has.difference(&source.has));
        source.kind = kind;
        source.rtt_ms = rtt_ms;
        source.has = has;
        true
    }

    fn want(&mut self, groups: &GroupSet, urgent: bool) -> bool {
        let groups = groups.intersection(&GroupSet::from(0..self.file_groups)).difference(&self.done);
        self.unassigned = self.unassigned.union(&groups.difference(&self.missing));
        self.missing = self.missing.union(&groups);
        if urgent {
            self.urgent = self.urgent.union(&groups);
        }
        self.told_done = false;
        true
    }

    /// Says whether somebody may have to be asked: the end of a request, or of a silence, makes room.
    fn received(&mut self, id: SourceId, request: RequestId, groups: Range<u64>, now: Now) -> bool {
        let groups = groups.start..groups.end.min(self.file_groups);
        let count = groups.end.saturating_sub(groups.start);
        let new: u64 = self.missing.within(&groups).map(|new| new.end - new.start).sum();
        self.doubled_groups += count - new;
        for set in [&mut self.missing, &mut self.unassigned, &mut self.urgent] {
            set.remove(&groups);
        }
        self.done.insert(groups.clone());

        let mut go_on = false;
        if let Some(source) = self.sources.get_mut(&id) {
            source.deliver(count, now);
            go_on = source.slow.take().is_some();
            // What others were asked for meanwhile it does not owe any more.
            let is_over = |asked: &mut Asked| {
                if asked.purpose == Purpose::Probe {
                    asked.purpose = Purpose::Fetch;
                    asked.owed = asked.owed.intersection(&self.unassigned);
                    asked.owed.ranges().iter().for_each(|range| self.unassigned.remove(range));
                }
                asked.owed.is_empty()
            };
            let over = source.asked.extract_if(.., is_over);
            self.actions.extend(over.map(|asked| Action::Cancel { id, request: asked.request }));
        }
        for (owner, source) in &mut self.sources {
            let is_over = |asked: &mut Asked| {
                asked.owed.remove(&groups);
                asked.owed.is_empty()
            };
            for over in source.asked.extract_if(.., is_over).collect::<Vec<_>>() {
                go_on = true;
                if (*owner, over.request) == (id, request) {
                    source.completed_groups_max = source.completed_groups_max.max(over.groups);
                    continue;
                }
                if over.purpose == Purpose::Probe {
                    source.pause(0, now);
                }
                self.actions.push(Action::Cancel { id: *owner, request: over.request });
            }
        }
        go_on
    }

    fn finished(&mut self, id: SourceId, request: RequestId, now: Now) -> bool {
        let owes = |source: &Source| source.asked.iter().any(|asked| asked.request == request);
        self.sources.get(&id).is_some_and(owes) && self.failed(id, Some(request), Outcome::Lacks, now)
    }

    fn failed(&mut self, id: SourceId, request: Option<RequestId>, outcome: Outcome, now: Now) -> bool {
        if outcome == Outcome::Wrong && self.dropped.insert(id) {
            self.actions.push(Action::Drop { id, reason: DropReason::WrongBytes });
        }
        let Some(source) = self.sources.get_mut(&id) else { return false };
        let is_over = |asked: &mut Asked| request.is_none_or(|request| request == asked.request);
        let over: Vec<Asked> = source.asked.extract_if(.., is_over).collect();
        match outcome {
            // It was cancelled before.
            _ if over.is_empty() && request.is_some() && outcome != Outcome::Wrong => return false,
            Outcome::Busy { retry_ms } => source.pause(retry_ms, now),
            Outcome::Lacks => {
                source.pause(0, now);
                for asked in &over {
                    self.holders.remove(&asked.owed.intersection(&source.has));
                    source.has = source.has.difference(&asked.owed);
                }
            }
            Outcome::Slow => self.silence(id, now),
            Outcome::Gone if request.is_some() => source.fail(now),
            Outcome::Wrong | Outcome::Gone => {
                self.remove(id);
            }
        }
        over.iter().for_each(|asked| self.release(&asked.owed));
        true
    }

    /// It sends nothing: others are asked for what it owes, and one request remains, by which it can show that it is back.
    fn silence(&mut self, id: SourceId, now: Now) {
        let Some(source) = self.sources.get_mut(&id) else { return };
        source.slow.get_or_insert(now);
        let owed: Vec<GroupSet> = source.asked.iter().map(|asked| asked.owed.clone()).collect();
        match source.asked.first_mut() {
            Some(first) => first.purpose = Purpose::Probe,
            None => source.pause(0, now),
        }
        for asked in source.asked.drain(1.min(owed.len())..) {
            self.actions.push(Action::Cancel { id, request: asked.request });
        }
        owed.iter().for_each(|owed| self.release(owed));
    }

    fn remove(&mut self, id: SourceId) -> bool {
        let Some(source) = self.sources.remove(&id) else { return false };
        self.holders.remove(&source.has);
        for asked in source.asked {
            self.actions.push(Action::Cancel { id, request: asked.request });
            self.release(&asked.owed);
        }
        true
    }

    /// Groups that a source owed and does not owe any more: they are free, unless another owes them too.
    fn release(&mut self, owed: &GroupSet) {
        let asked = self.sources.values().flat_map(|source| &source.asked);
        let others = asked.filter(|asked| asked.purpose != Purpose::Probe);
        let free = others.fold(owed.clone(), |free, asked| free.difference(&asked.owed));
        free.ranges().iter().for_each(|range| self.unassigned.insert(range.clone()));
    }

    /// What follows from the state alone, whatever event led to it.
    fn go_on(&mut self, now: Now) {
        self.looked = now;
        self.sources.values_mut().for_each(|source| source.paused = source.paused.filter(|until| *until > now));
        let is_silent = |source: &Source| source.silent_at().is_some_and(|at| at <= now);
        let silent = self.sources.iter().filter(|(_, source)| is_silent(source));
        for id in silent.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.silence(id, now);
        }
        self.assign(now);
        let owing = self.sources.values().any(|source| !source.asked.is_empty() && !source.is_hopeless(now));
        let has_room = |source: &Source| source.is_ready() && source.asked.len() < source.in_flight_wanted(now);
        self.look_at = (owing && self.sources.values().any(has_room)).then(|| now.plus_ms(LOOK_MS));
        if self.missing.is_empty() {
            if !std::mem::replace(&mut self.told_done, true) {
                self.actions.push(Action::Done);
            }
        } else if !owing && self.told_stuck.as_ref() != Some(&self.missing) {
            self.tell_if_stuck(now);
        }
    }

    fn tell_if_stuck(&mut self, now: Now) {
        let has_some = |source: &&Source| !source.has.intersection(&self.missing).is_empty();
        let (hopeless, hopeful): (Vec<_>, Vec<_>) =
            self.sources.values().filter(has_some).partition(|source| source.is_hopeless(now));
        // One that is paused or silent may still give what it has.
        if !hopeful.is_empty() {
            return;
        }
        let reason = match (self.sources.len(), hopeless.len()) {
            (0, _) => StuckReason::NoSource,
            (sources, 0) => StuckReason::NobodyHas { sources },
            (_, sources) => StuckReason::NoAnswer { sources },
        };
        self.told_stuck = Some(self.missing.clone());
        self.actions.push(Action::Stuck { missing: self.missing.clone(), reason });
    }

    /// Asks sources until each has enough to do or nothing is left for it. Peers before hubs, then the nearest and fastest
    /// ones; each one once before any gets a second request.
    fn assign(&mut self, now: Now) {
        let able = self.sources.iter().filter(|(_, source)| source.paused.is_none());
        let mut able: Vec<_> =
            able.map(|(id, source)| (*id, source.kind, source.predicted_ms(REQUEST_GROUPS_MIN, now))).collect();
        able.sort_by(|a, b| a.1.cmp(&b.1).then(a.2.total_cmp(&b.2)));
        for round in 0..IN_FLIGHT_MAX {
            able.retain(|(id, ..)| {
                let asked = self.sources.get(id).map_or(0, |source| source.asked.len());
                asked > round || self.ask(*id, now)
            });
        }
    }

    fn ask(&mut self, id: SourceId, now: Now) -> bool {
        let Some((purpose, groups)) = self.choose(id, now) else { return false };
        let request = RequestId(self.next_request);
        self.next_request += 1;
        if purpose != Purpose::Probe {
            groups.ranges().iter().for_each(|range| self.unassigned.remove(range));
        }
        if let Some(source) = self.sources.get_mut(&id) {
            source.ask(request, purpose, groups.clone(), now);
        }
        self.told_stuck = None;
        self.actions.push(Action::Request { id, request, groups, purpose });
        true
    }
}
