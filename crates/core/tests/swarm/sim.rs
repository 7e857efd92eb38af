//! A world in which files are fetched: nodes with upload rates, round trips and bad habits, in steps of ten milliseconds, by a seed.

use std::collections::BTreeMap;

use murmur_core::{
    swarm::{Action, Event, GROUP_BYTES, GroupSet, Outcome, Progress, Purpose, RequestId, SourceId, SourceKind, Swarm},
    time::Now,
};

const STEP_MS: u64 = 10;
/// How often nodes that fetch tell the others what they have.
const ANNOUNCE_MS: u64 = 1_000;
/// How long after a death its connections are known to be dead.
const GONE_MS: u64 = 700;
/// For how long a node that is busy asks to be left alone.
const RETRY_MS: u64 = 400;

/// Groups per millisecond.
pub fn rate_of_mbit_per_s(mbit_per_s: f64) -> f64 {
    mbit_per_s * 1e6 / 8.0 / GROUP_BYTES as f64 / 1_000.0
}

/// Sebastiano Vigna's SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }

    pub fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.below(1 << 20) as f64 / (1 << 20) as f64
    }
}

/// What a node does that others ask.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Habit {
    Honest,
    /// Sends so many groups, and then nothing more.
    Stalls {
        after: u64,
    },
    /// Sends so many groups, and then one with wrong bytes.
    Lies {
        after: u64,
    },
    /// Has only the groups before this one, and says that it has all.
    Boasts {
        has_before: u64,
    },
    /// Refuses until then.
    Busy {
        until_ms: u64,
    },
    /// Sends nothing in between.
    Pauses {
        from_ms: u64,
        until_ms: u64,
    },
}

pub struct Node {
    pub kind: SourceKind,
    /// Groups per millisecond.
    pub up: f64,
    pub rtt_ms: u64,
    pub habit: Habit,
    /// When it is announced to those that fetch.
    pub from_ms: u64,
    pub dies_ms: u64,
    pub has: GroupSet,
    pub sent: u64,
    pub uploads: Uploads,
    pub fetch: Option<Fetch>,
}

impl Node {
    /// Has everything, from the beginning to the end.
    pub fn source(groups: u64, up: f64, rtt_ms: u64) -> Self {
        Node {
            kind: SourceKind::Peer,
            up,
            rtt_ms,
            habit: Habit::Honest,
            from_ms: 0,
            dies_ms: u64::MAX,
            has: GroupSet::from(0..groups),
            sent: 0,
            uploads: Uploads::default(),
            fetch: None,
        }
    }

    /// Has nothing, and wants everything.
    pub fn fetching(groups: u64, up: f64, rtt_ms: u64, salt: u64) -> Self {
        let fetch = Fetch {
            swarm: Swarm::new(groups * GROUP_BYTES, salt),
            done_ms: None,
            dropped: Vec::new(),
            received: 0,
            asked: BTreeMap::new(),
            lost_with_the_dead: 0,
        };
        Node { has: GroupSet::default(), fetch: Some(fetch), ..Node::source(groups, up, rtt_ms) }
    }
}

/// A node's own fetch.
pub struct Fetch {
    pub swarm: Swarm,
    pub done_ms: Option<u64>,
    pub dropped: Vec<SourceId>,
    /// Groups, those that came twice included.
    pub received: u64,
    /// Groups by purpose.
    pub asked: BTreeMap<Purpose, u64>,
    /// Groups that sources owed when they were known to be dead.
    pub lost_with_the_dead: u64,
}

/// What a node is asked for.
#[derive(Default)]
pub struct Uploads {
    serving: Vec<Serving>,
    /// Groups that each taker may get by now.
    credit: BTreeMap<usize, f64>,
    announced: GroupSet,
}

struct Serving {
    to: usize,
    request: RequestId,
    left: GroupSet,
}

enum Mail {
    Ask { from: usize, to: usize, request: RequestId, groups: GroupSet },
    Stop { from: usize, to: usize, request: RequestId },
    Tell { to: usize, event: Event },
}

pub struct World {
    pub now_ms: u64,
    pub nodes: Vec<Node>,
    groups: u64,
    /// By the time at which it arrives; the second number keeps the order.
    mail: BTreeMap<(u64, u64), Mail>,
    sent: u64,
    /// Checked at each request; not where thousands a second are made.
    pub strict: bool,
}

impl World {
    pub fn new(groups: u64, nodes: Vec<Node>) -> Self {
        World { now_ms: 0, nodes, groups, mail: BTreeMap::new(), sent: 0, strict: true }
    }

    pub fn fetch(&self, node: usize) -> &Fetch {
        self.nodes[node].fetch.as_ref().expect("the node fetches")
    }

    /// Until every node that fetches has everything. Panics when it takes longer.
    pub fn run(&mut self, until_ms: u64) {
        let everything = Event::Want { groups: GroupSet::from(0..self.groups), urgent: false };
        for node in self.fetching() {
            self.tell(node, everything.clone());
        }
        while self.fetching().any(|node| self.fetch(node).done_ms.is_none()) {
            assert!(self.now_ms < until_ms, "not done after {until_ms} ms: {:#?}", self.progress());
            self.step();
        }
    }

    fn progress(&self) -> Vec<Progress> {
        let now = Now::from_ms(self.now_ms);
        let short = |mut progress: Progress| {
            progress.sources.retain(|source| !source.owes.is_empty());
            progress
        };
        let fetches = self.nodes.iter().filter_map(|node| node.fetch.as_ref());
        fetches.filter(|fetch| fetch.done_ms.is_none()).map(|fetch| short(fetch.swarm.progress(now))).collect()
    }

    fn fetching(&self) -> impl Iterator<Item = usize> + use<> {
        let fetching: Vec<_> = (0..self.nodes.len()).filter(|node| self.nodes[*node].fetch.is_some()).collect();
        fetching.into_iter()
    }

    fn post(&mut self, delay_ms: u64, mail: Mail) {
        self.sent += 1;
        self.mail.insert((self.now_ms + delay_ms, self.sent), mail);
    }

    fn rtt_ms(&self, a: usize, b: usize) -> u64 {
        self.nodes[a].rtt_ms + self.nodes[b].rtt_ms
    }

    fn step(&mut self) {
        while let Some(next) = self.mail.first_entry().filter(|next| next.key().0 <= self.now_ms) {
            match next.remove() {
                Mail::Tell { to, event } => self.tell(to, event),
                Mail::Ask { from, to, request, groups } => self.asked(from, to, request, groups),
                Mail::Stop { from, to, request } => {
                    self.nodes[to].uploads.serving.retain(|serving| (serving.to, serving.request) != (from, request));
                }
            }
        }
        for node in 0..self.nodes.len() {
            self.die(node);
            self.serve(node);
            if self.now_ms.checked_sub(self.nodes[node].from_ms).is_some_and(|age_ms| age_ms % ANNOUNCE_MS < STEP_MS) {
                self.announce(node);
            }
        }
        for node in self.fetching() {
            let now = Now::from_ms(self.now_ms);
            if self.fetch(node).swarm.next_tick().is_some_and(|at| at <= now) {
                self.tell(node, Event::Tick);
                let next = self.fetch(node).swarm.next_tick();
                assert!(next.is_none_or(|next| next > now), "a tick changed nothing: {:#?}", self.progress());
            }
        }
        self.now_ms += STEP_MS;
    }

    fn is_alive(&self, node: usize) -> bool {
        self.now_ms < self.nodes[node].dies_ms
    }

    fn announce(&mut self, node: usize) {
        let kind = self.nodes[node].kind;
        if !self.is_alive(node) || self.nodes[node].uploads.announced == self.nodes[node].has {
            return;
        }
        self.nodes[node].uploads.announced = self.nodes[node].has.clone();
        for to in self.fetching().filter(|to| *to != node) {
            let rtt_ms = self.rtt_ms(node, to);
            let has = self.nodes[node].has.clone();
            let event = Event::Source { id: SourceId(node as u32), kind, has, rtt_ms: rtt_ms as u32 };
            self.post(rtt_ms / 2, Mail::Tell { to, event });
        }
    }

    fn die(&mut self, node: usize) {
        if self.is_alive(node) || self.now_ms - self.nodes[node].dies_ms >= STEP_MS {
            return;
        }
        self.nodes[node].uploads.serving.clear();
        for to in self.fetching() {
            let event = Event::Failed { id: SourceId(node as u32), request: None, outcome: Outcome::Gone };
            self.post(GONE_MS, Mail::Tell { to, event });
        }
    }

    fn asked(&mut self, from: usize, to: usize, request: RequestId, groups: GroupSet) {
        if !self.is_alive(to) {
            return;
        }
        let outcome = match self.nodes[to].habit {
            Habit::Busy { until_ms } if self.now_ms < until_ms => Some(Outcome::Busy { retry_ms: RETRY_MS }),
            Habit::Boasts { has_before } if groups.ranges().iter().any(|range| range.end > has_before) => {
                Some(Outcome::Lacks)
            }
            _ => None,
        };
        match outcome {
            Some(outcome) => {
                let event = Event::Failed { id: SourceId(to as u32), request: Some(request), outcome };
                self.post(self.rtt_ms(from, to) / 2, Mail::Tell { to: from, event });
            }
            None => self.nodes[to].uploads.serving.push(Serving { to: from, request, left: groups }),
        }
    }

    /// Takers share a node's upload, and each gets its requests one after the other.
    fn serve(&mut self, from: usize) {
        let node = &mut self.nodes[from];
        let silent = matches!(node.habit, Habit::Pauses { from_ms, until_ms } if (from_ms..until_ms).contains(&self.now_ms))
            || matches!(node.habit, Habit::Stalls { after } if node.sent >= after);
        if node.uploads.serving.is_empty() || silent {
            return;
        }
        let mut takers: Vec<usize> = node.uploads.serving.iter().map(|serving| serving.to).collect();
        takers.sort_unstable();
        takers.dedup();
        node.uploads.credit.retain(|taker, _| takers.contains(taker));
        let share = node.up * STEP_MS as f64 / takers.len() as f64;
        let mut mails = Vec::new();
        for taker in takers {
            let credit = node.uploads.credit.entry(taker).or_default();
            *credit += share;
            while *credit >= 1.0
                && let Some(at) = node.uploads.serving.iter().position(|serving| serving.to == taker)
            {
                let serving = &mut node.uploads.serving[at];
                let first = serving.left.ranges()[0].clone();
                let groups = first.start..first.end.min(first.start + *credit as u64);
                *credit -= (groups.end - groups.start) as f64;
                node.sent += groups.end - groups.start;
                let (id, request) = (SourceId(from as u32), serving.request);
                if matches!(node.habit, Habit::Lies { after } if node.sent > after) {
                    let event = Event::Failed { id, request: Some(request), outcome: Outcome::Wrong };
                    mails.push((taker, event));
                    node.uploads.serving.clear();
                    break;
                }
                serving.left.remove(&groups);
                mails.push((taker, Event::Received { id, request, groups }));
                if serving.left.is_empty() {
                    mails.push((taker, Event::Finished { id, request }));
                    node.uploads.serving.remove(at);
                }
            }
        }
        for (to, event) in mails {
            self.post(self.rtt_ms(from, to) / 2, Mail::Tell { to, event });
        }
    }

    fn tell(&mut self, to: usize, event: Event) {
        let now = Now::from_ms(self.now_ms);
        let node = &mut self.nodes[to];
        let fetch = node.fetch.as_mut().expect("only those that fetch are told");
        if let Event::Received { groups, .. } = &event {
            node.has.insert(groups.clone());
            fetch.received += groups.end - groups.start;
        }
        if let Event::Failed { id: dead, outcome: Outcome::Gone, .. } = &event {
            let sources = fetch.swarm.progress(now).sources;
            let owed = sources.iter().filter(|source| source.id == *dead).flat_map(|source| &source.owes);
            fetch.lost_with_the_dead += owed.map(|owes| owes.groups.len()).sum::<u64>();
        }
        let actions = fetch.swarm.handle(event, now);
        if self.strict && actions.iter().any(|action| matches!(action, Action::Request { .. })) {
            assert_asked_once(&fetch.swarm.progress(now), &node.has);
        }
        for action in actions {
            let fetch = self.nodes[to].fetch.as_mut().expect("it fetches");
            match action {
                Action::Request { id, request, groups, purpose } => {
                    assert!(!fetch.dropped.contains(&id), "a source that lied was asked again");
                    *fetch.asked.entry(purpose).or_default() += groups.len();
                    let source = id.0 as usize;
                    self.post(self.rtt_ms(to, source) / 2, Mail::Ask { from: to, to: source, request, groups });
                }
                Action::Cancel { id, request } => {
                    let source = id.0 as usize;
                    self.post(self.rtt_ms(to, source) / 2, Mail::Stop { from: to, to: source, request });
                }
                Action::Drop { id, .. } => {
                    fetch.dropped.push(id);
                    self.nodes[id.0 as usize].uploads.serving.retain(|serving| serving.to != to);
                }
                Action::Done => {
                    assert_eq!(self.nodes[to].has, GroupSet::from(0..self.groups));
                    self.fetch_mut(to).done_ms = Some(self.now_ms);
                }
                Action::Stuck { .. } => {}
            }
        }
    }

    fn fetch_mut(&mut self, node: usize) -> &mut Fetch {
        self.nodes[node].fetch.as_mut().expect("the node fetches")
    }
}

/// Each group is asked of one source, besides rescues and probes, and none that has come.
pub fn assert_asked_once(progress: &Progress, done: &GroupSet) {
    for purpose in [Purpose::Fetch, Purpose::Rescue] {
        let mut asked = done.clone();
        let owes = progress.sources.iter().flat_map(|source| &source.owes).filter(|owes| owes.purpose == purpose);
        for owes in owes {
            assert!(asked.intersection(&owes.groups).is_empty(), "{owes:?} has come, or is asked twice: {progress:#?}");
            asked = asked.union(&owes.groups);
        }
    }
}
