//! What each event leads to, one by one, and then any of them in any order.

use std::{collections::BTreeMap, ops::Range};

use murmur_core::{
    swarm::{
        Action, DropReason, Event, GROUP_BYTES, GroupSet, Outcome, Purpose, RequestId, SOURCES_MAX, SourceId,
        SourceKind, SourceProgress, SourceState, StuckReason, Swarm,
        choice::RANGES_PER_REQUEST_MAX,
        source::{
            FAILURES_MAX, HOPELESS_MS, IN_FLIGHT_MAX, IN_FLIGHT_MIN, PAUSE_MS_MAX, PAUSE_MS_MIN, RANGES_MAX,
            REQUEST_GROUPS_FIRST, REQUEST_GROUPS_MAX, REQUEST_GROUPS_MIN, SILENCE_MS_MIN, WINDOW_GROUPS,
        },
    },
    time::Now,
};
use proptest::prelude::*;

use crate::sim::assert_asked_once;

const RTT_MS: u32 = 20;

/// A request under way.
#[derive(Debug, Clone)]
struct Open {
    id: SourceId,
    request: RequestId,
    groups: GroupSet,
    purpose: Purpose,
}

/// A swarm with its clock, and the requests that it has made.
struct Bench {
    swarm: Swarm,
    now: Now,
    open: Vec<Open>,
    done: GroupSet,
    /// Those actions of the last event that are no requests.
    others: Vec<Action>,
}

impl Bench {
    fn new(groups: u64) -> Self {
        let swarm = Swarm::new(groups * GROUP_BYTES, 7);
        Bench { swarm, now: Now::from_ms(5_000), open: vec![], done: GroupSet::default(), others: vec![] }
    }

    /// All groups are wanted.
    fn wanting(groups: u64) -> Self {
        let mut bench = Bench::new(groups);
        bench.want(0..groups, false);
        bench
    }

    /// What was asked for, in consequence.
    fn tell(&mut self, event: Event) -> Vec<Open> {
        match &event {
            Event::Received { groups, .. } => {
                self.done.insert(groups.clone());
                let groups = GroupSet::from(groups.clone());
                self.open.iter_mut().for_each(|open| open.groups = open.groups.difference(&groups));
                self.open.retain(|open| !open.groups.is_empty());
            }
            Event::Finished { id, request } => self.open.retain(|open| (open.id, open.request) != (*id, *request)),
            Event::Failed { id, request, outcome } => {
                let all = request.is_none() || *outcome == Outcome::Wrong;
                self.open.retain(|open| open.id != *id || !(all || Some(open.request) == *request));
            }
            Event::Left { id } => self.open.retain(|open| open.id != *id),
            Event::Source { .. } | Event::Tick | Event::Want { .. } => {}
        }
        self.others.clear();
        let mut asked = Vec::new();
        for action in self.swarm.handle(event, self.now) {
            match action {
                Action::Request { id, request, groups, purpose } => asked.push(Open { id, request, groups, purpose }),
                Action::Cancel { id, request } => {
                    self.open.retain(|open| (open.id, open.request) != (id, request));
                    self.others.push(action);
                }
                other => self.others.push(other),
            }
        }
        self.open.extend(asked.iter().cloned());
        assert_asked_once(&self.swarm.progress(self.now), &self.done);
        asked
    }

    fn want(&mut self, groups: Range<u64>, urgent: bool) -> Vec<Open> {
        self.tell(Event::Want { groups: groups.into(), urgent })
    }

    fn source(&mut self, id: u32, has: impl Into<GroupSet>) -> Vec<Open> {
        self.tell(Event::Source { id: SourceId(id), kind: SourceKind::Peer, has: has.into(), rtt_ms: RTT_MS })
    }

    fn failed(&mut self, open: &Open, outcome: Outcome) -> Vec<Open> {
        self.tell(Event::Failed { id: open.id, request: Some(open.request), outcome })
    }

    /// The source sends so many groups, of what it was asked for first.
    fn deliver(&mut self, id: u32, count: u64) -> Vec<Open> {
        let mut left = count;
        let mut asked = Vec::new();
        while left > 0
            && let Some(open) = self.open.iter().find(|open| open.id == SourceId(id))
        {
            let (request, first) = (open.request, open.groups.ranges()[0].clone());
            let groups = first.start..first.end.min(first.start + left);
            left -= groups.end - groups.start;
            asked.extend(self.tell(Event::Received { id: SourceId(id), request, groups }));
        }
        asked
    }

    /// The time passes; whenever the swarm wants to be woken, it is.
    fn pass(&mut self, ms: u64) -> Vec<Open> {
        let until = self.now.plus_ms(ms);
        let mut asked = Vec::new();
        while let Some(next) = self.swarm.next_tick().filter(|next| *next <= until) {
            assert!(next >= self.now || self.swarm.next_tick().is_some());
            self.now = self.now.max(next);
            asked.extend(self.tell(Event::Tick));
            assert!(self.swarm.next_tick().is_none_or(|next| next > self.now), "a tick changed nothing");
        }
        self.now = until;
        asked
    }

    fn owed_by(&self, id: u32) -> GroupSet {
        let open = self.open.iter().filter(|open| open.id == SourceId(id));
        open.fold(GroupSet::default(), |owed, open| owed.union(&open.groups))
    }

    /// What the swarm knows to be owed of a request.
    fn owed(&self, of: &Open) -> GroupSet {
        let sources = self.swarm.progress(self.now).sources;
        let owes = sources.into_iter().flat_map(|source| source.owes).find(|owes| owes.request == of.request);
        owes.map_or_else(GroupSet::default, |owes| owes.groups)
    }

    fn state(&self, id: u32) -> Option<SourceState> {
        let sources = self.swarm.progress(self.now).sources;
        sources.into_iter().find(|source| source.id == SourceId(id)).map(|source| source.state)
    }
}

fn total(asked: &[Open]) -> u64 {
    asked.iter().map(|open| open.groups.len()).sum()
}

#[test]
fn each_group_is_asked_of_one_source_and_the_end_is_told_once() {
    let mut bench = Bench::wanting(100);
    let first = bench.source(1, 0..100);
    assert_eq!(first.len(), IN_FLIGHT_MIN, "so that the round trip is not waited for");
    assert_eq!(total(&first), 2 * REQUEST_GROUPS_FIRST, "little, as long as nothing is known of its speed");
    bench.source(2, 0..100);
    assert_eq!(bench.owed_by(1).intersection(&bench.owed_by(2)), GroupSet::default());
    let mut done = 0;
    while !bench.open.is_empty() {
        let id = bench.open[0].id.0;
        bench.deliver(id, 1);
        done += bench.others.iter().filter(|action| **action == Action::Done).count();
        bench.now = bench.now.plus_ms(5);
    }
    assert_eq!((done, bench.done.len()), (1, 100));
    assert_eq!(bench.swarm.progress(bench.now).eta_ms, Some(0));
    bench.want(0..100, true);
    assert_eq!(bench.others, [Action::Done], "what has come already is there");
    assert_eq!(bench.swarm.next_tick(), None);
}

#[test]
fn requests_follow_the_speed_of_a_source() {
    let mut bench = Bench::wanting(100_000);
    bench.source(1, 0..100_000);
    bench.source(2, 0..100_000);
    for _ in 0..300 {
        bench.now = bench.now.plus_ms(100);
        bench.deliver(1, 50);
        bench.deliver(2, 2);
    }
    let of = |id| bench.open.iter().rev().find(|open| open.id == SourceId(id)).unwrap().groups.len();
    assert!((300..=500).contains(&of(1)), "a second of 500 groups each: {}", of(1));
    assert!((REQUEST_GROUPS_MIN..=20).contains(&of(2)), "a second of 20 groups each: {}", of(2));
    let speeds: Vec<f64> = bench.swarm.progress(bench.now).sources.iter().map(|source| source.bytes_per_s).collect();
    let expected = 500.0 * GROUP_BYTES as f64;
    assert!((speeds[0] / expected - 1.0).abs() < 0.05, "{speeds:?}");
}

#[test]
fn a_long_way_is_kept_filled() {
    let mut bench = Bench::wanting(1_000_000);
    let has = GroupSet::from(0..1_000_000);
    bench.tell(Event::Source { id: SourceId(1), kind: SourceKind::Peer, has, rtt_ms: 800 });
    for _ in 0..300 {
        bench.now = bench.now.plus_ms(10);
        bench.deliver(1, 40);
    }
    // 4,000 groups a second: more than a request may be, and more than two on their way.
    assert!(bench.open.len() > IN_FLIGHT_MIN, "{}", bench.open.len());
    assert!(bench.open.len() <= IN_FLIGHT_MAX);
}

#[test]
fn where_each_stream_has_a_window_so_many_are_under_way_that_the_link_is_the_limit() {
    const RTT: u64 = 100;
    const LINK_GROUPS: u64 = 5 * WINDOW_GROUPS;
    let mut bench = Bench::wanting(1_000_000);
    let has = GroupSet::from(0..1_000_000);
    bench.tell(Event::Source { id: SourceId(1), kind: SourceKind::Peer, has, rtt_ms: RTT as u32 });
    let mut delivered = 0;
    for _ in 0..200 {
        bench.now = bench.now.plus_ms(RTT);
        delivered = LINK_GROUPS.min(bench.open.len() as u64 * WINDOW_GROUPS);
        bench.deliver(1, delivered);
    }
    assert_eq!(delivered, LINK_GROUPS, "{} requests", bench.open.len());
    assert!((5..=IN_FLIGHT_MAX).contains(&bench.open.len()), "{}", bench.open.len());
}

#[test]
fn a_source_that_lied_is_reported_and_never_asked_again() {
    let mut bench = Bench::wanting(100);
    let asked = bench.source(1, 0..100);
    let owed = bench.owed_by(1);
    bench.failed(&asked[0], Outcome::Wrong);
    let dropped = Action::Drop { id: SourceId(1), reason: DropReason::WrongBytes };
    assert!(bench.others.contains(&dropped), "{:?}", bench.others);
    assert_eq!(bench.source(1, 0..100).len(), 0);
    bench.source(2, owed.clone());
    assert_eq!(bench.owed_by(2), owed);
}

#[test]
fn a_busy_source_is_left_alone_for_longer_and_longer() {
    let mut bench = Bench::wanting(100);
    let mut asked = bench.source(1, 0..100);
    let mut pauses = Vec::new();
    for _ in 0..4 {
        bench.tell(Event::Failed { id: SourceId(1), request: None, outcome: Outcome::Busy { retry_ms: 600 } });
        assert!(matches!(bench.state(1), Some(SourceState::Paused { .. })));
        assert_eq!(bench.source(1, 0..100).len(), 0, "whatever it announces");
        let before = bench.now;
        while asked.is_empty() || bench.open.is_empty() {
            asked = bench.pass(1);
        }
        pauses.push(bench.now.since_ms(before));
    }
    assert_eq!(pauses, [600, 1_000, 2_000, 4_000]);
    bench.deliver(1, 1);
    let open = bench.open[0].clone();
    bench.failed(&open, Outcome::Busy { retry_ms: 0 });
    assert_eq!(
        bench.state(1),
        Some(SourceState::Paused { until: bench.now.plus_ms(PAUSE_MS_MIN) }),
        "it has delivered"
    );
}

#[test]
fn a_source_whose_streams_die_is_tried_again_and_one_whose_connection_died_is_not() {
    let mut bench = Bench::wanting(100);
    bench.source(1, 0..100);
    let mut died = 0;
    while !bench.others.iter().any(|action| matches!(action, Action::Stuck { .. })) {
        bench.pass(10);
        if let Some(open) = bench.open.first().cloned() {
            died += 1;
            bench.failed(&open, Outcome::Gone);
        }
    }
    assert_eq!(died, FAILURES_MAX + 1);
    bench.pass(PAUSE_MS_MAX);
    assert!(!bench.open.is_empty(), "still");
    bench.deliver(1, 1);
    bench.tell(Event::Failed { id: SourceId(1), request: None, outcome: Outcome::Gone });
    assert_eq!(bench.state(1), None);
    assert!(bench.pass(PAUSE_MS_MAX).is_empty());
    assert!(!bench.source(1, 0..100).is_empty(), "until it is announced again");
}

#[test]
fn what_a_source_lacks_is_asked_of_others_and_not_again_of_it() {
    let mut bench = Bench::wanting(40);
    let asked = bench.source(1, 0..40);
    let lacks = asked[0].groups.clone();
    bench.failed(&asked[0], Outcome::Lacks);
    bench.pass(10 * PAUSE_MS_MIN);
    assert_eq!(bench.owed_by(1).intersection(&lacks), GroupSet::default());
    bench.source(2, 0..40);
    assert_eq!(bench.owed_by(2).intersection(&lacks), lacks);
    let second = bench.open.iter().find(|open| open.id == SourceId(2)).unwrap().clone();
    bench.tell(Event::Finished { id: second.id, request: second.request });
    assert_eq!(bench.owed_by(2).intersection(&second.groups), GroupSet::default(), "done without a byte: it lacks it");
}

#[test]
fn a_silent_source_loses_its_work_keeps_a_probe_and_comes_back() {
    let mut bench = Bench::wanting(1_000);
    bench.source(1, 0..1_000);
    let owed = bench.owed_by(1);
    bench.pass(SILENCE_MS_MIN as u64 + u64::from(RTT_MS) + 1);
    assert!(matches!(bench.state(1), Some(SourceState::Slow { .. })));
    assert_eq!(bench.open.len(), 1, "the probe");
    let probe = bench.open[0].clone();
    bench.source(2, owed.clone());
    assert_eq!(bench.owed_by(2), owed, "also that of the probe");
    bench.now = bench.now.plus_ms(100);
    let asked = bench.deliver(1, 1);
    assert_eq!(bench.state(1), Some(SourceState::Ready));
    assert!(total(&asked) > 0, "it is asked for more");
    assert!(bench.open.iter().all(|open| open.id != probe.id || open.request != probe.request), "2 has that");
}

#[test]
fn a_source_that_stays_silent_is_probed_less_often() {
    let mut bench = Bench::wanting(100_000);
    bench.source(1, 0..100_000);
    bench.source(2, 0..100_000);
    let mut probes = 0;
    for _ in 0..1_000 {
        probes += bench.pass(100).iter().filter(|open| open.purpose == Purpose::Probe).count();
        bench.deliver(2, 16);
    }
    assert!((1..=8).contains(&probes), "{probes} probes in 100 s");
}

#[test]
fn nobody_is_told_to_wait_for_a_source_that_does_not_answer_and_it_is_still_tried() {
    let mut bench = Bench::wanting(100);
    let no_answer = Action::Stuck { missing: (0..100).into(), reason: StuckReason::NoAnswer { sources: 1 } };
    bench.source(1, 0..100);
    bench.pass(HOPELESS_MS);
    assert!(!bench.others.contains(&no_answer), "not yet");
    bench.pass(SILENCE_MS_MIN as u64 + u64::from(RTT_MS));
    assert_eq!(bench.others, [no_answer]);
    assert!(!bench.deliver(1, 1).is_empty(), "it has come back");
    assert_eq!(bench.state(1), Some(SourceState::Ready));
}

#[test]
fn urgent_groups_come_first_and_then_the_rarest() {
    let mut bench = Bench::new(1_000);
    bench.source(2, 0..900);
    bench.source(3, 0..800);
    bench.tell(Event::Source {
        id: SourceId(1),
        kind: SourceKind::Peer,
        has: (0..1_000).into(),
        rtt_ms: 1, // asked first
    });
    bench.want(500..505, true);
    assert_eq!(bench.owed_by(1), (500..505).into());
    bench.want(0..1_000, false);
    let rarest = bench.owed_by(1).difference(&(500..505).into());
    assert_eq!(rarest, GroupSet::from(900..1_000).intersection(&rarest), "nobody else has these");
    assert_eq!(rarest.len(), REQUEST_GROUPS_FIRST);
}

#[test]
fn urgent_groups_of_a_drip_are_asked_of_who_is_fast() {
    let mut bench = Bench::new(10_000);
    bench.source(1, 0..10);
    bench.want(0..10, true);
    bench.source(2, 0..10_000);
    bench.want(0..10_000, false);
    let urgent = GroupSet::from(0..10);
    let mut rescued = 0;
    for step in 0..60 {
        bench.now = bench.now.plus_ms(50);
        let asked = bench.deliver(2, 20);
        rescued +=
            asked.iter().filter(|open| open.purpose == Purpose::Rescue).map(|open| open.groups.len()).sum::<u64>();
        if step % 20 == 0 && !bench.owed_by(1).is_empty() {
            bench.deliver(1, 1);
        }
    }
    assert!(urgent.difference(&bench.done).is_empty(), "{:?}", bench.done);
    assert!(rescued > 0 && bench.done.len() < 1_500, "with much left to do");
    assert_eq!(bench.owed_by(1), GroupSet::default(), "the drip was told to stop");
}

#[test]
fn nothing_is_asked_of_two_as_long_as_there_is_something_that_nobody_is_asked_for() {
    let mut bench = Bench::wanting(1_000);
    bench.source(1, 0..1_000);
    let owed = bench.owed_by(1);
    // A fast one comes that has what the slow one owes already, and nothing else.
    bench.tell(Event::Source { id: SourceId(2), kind: SourceKind::Peer, has: owed, rtt_ms: 1 });
    for _ in 0..20 {
        bench.now = bench.now.plus_ms(100);
        bench.deliver(1, 1);
        assert_eq!(bench.owed_by(2), GroupSet::default());
    }
}

#[test]
fn at_the_end_the_last_part_of_what_a_slow_source_owes_is_asked_of_a_fast_one() {
    let mut bench = Bench::wanting(200);
    bench.source(1, 0..200);
    bench.source(2, 0..200);
    let mut cancelled = 0;
    while bench.done.len() < 200 {
        bench.now = bench.now.plus_ms(100);
        let fast = bench.open.iter().any(|open| open.id == SourceId(2));
        for (id, count) in if fast { vec![(2, 20), (1, 1)] } else { vec![(1, 1)] } {
            if bench.owed_by(id).is_empty() {
                continue;
            }
            for open in bench.deliver(id, count).iter().filter(|open| open.purpose == Purpose::Rescue) {
                let left = open.groups.difference(&bench.done);
                assert_eq!(left, bench.owed_by(1).intersection(&left), "2 helps 1");
            }
            cancelled += bench.others.iter().filter(|a| matches!(a, Action::Cancel { id: SourceId(1), .. })).count();
        }
        if !fast {
            bench.pass(0);
        }
    }
    assert!(cancelled > 0);
    let elapsed_ms = bench.now.since_ms(Now::from_ms(5_000));
    assert!(elapsed_ms < 2_000, "{elapsed_ms} ms; alone the slow one takes 3 s for its first requests");
}

#[test]
fn nodes_that_begin_together_begin_in_different_places() {
    let first = |salt| {
        let mut swarm = Swarm::new(100_000 * GROUP_BYTES, salt);
        let groups = GroupSet::from(0..100_000);
        swarm.handle(Event::Want { groups: groups.clone(), urgent: false }, Now::ZERO);
        let source = Event::Source { id: SourceId(1), kind: SourceKind::Peer, has: groups, rtt_ms: 1 };
        match &swarm.handle(source, Now::ZERO)[..] {
            [Action::Request { groups: one, .. }, Action::Request { groups: two, .. }] => one.union(two),
            other => panic!("{other:?}"),
        }
    };
    let places: Vec<GroupSet> = (0..20).map(first).collect();
    assert!(places.iter().all(|place| place.ranges().len() == 1), "in one piece each");
    let all = places.iter().fold(GroupSet::default(), |all, place| all.union(place));
    assert_eq!(all.len(), 20 * 2 * REQUEST_GROUPS_FIRST);
}

#[test]
fn what_nobody_has_is_said_and_a_source_gets_it_going_again() {
    let mut bench = Bench::wanting(20);
    let stuck = |missing: Range<u64>, reason| vec![Action::Stuck { missing: missing.into(), reason }];
    assert_eq!(bench.others, stuck(0..20, StuckReason::NoSource));
    bench.source(1, 0..10);
    assert_eq!(bench.others, []);
    let open = bench.open[0].clone();
    bench.failed(&open, Outcome::Busy { retry_ms: 100 });
    assert_eq!(bench.others, [], "a pause is no end");
    bench.pass(PAUSE_MS_MIN);
    bench.deliver(1, 10);
    assert_eq!(bench.others, stuck(10..20, StuckReason::NobodyHas { sources: 1 }));
    bench.tell(Event::Tick);
    assert_eq!(bench.others, [], "once is enough");
    bench.source(2, 15..20);
    bench.tell(Event::Left { id: SourceId(2) });
    assert!(bench.others.ends_with(&stuck(10..20, StuckReason::NobodyHas { sources: 1 })));
    bench.source(3, 10..20);
    bench.deliver(3, 10);
    assert_eq!(bench.others, [Action::Done]);
}

#[test]
fn an_empty_file_is_there_at_once() {
    let mut bench = Bench::new(0);
    bench.want(0..10, false);
    assert_eq!(bench.others, [Action::Done]);
}

#[test]
fn claims_without_bounds_cost_a_bounded_amount() {
    let mut bench = Bench::wanting(1_000_000);
    let scraps: GroupSet = (0..500_000).map(|group| 2 * group..2 * group + 1).collect();
    bench.source(1, scraps);
    assert!(bench.open.iter().all(|open| open.groups.ranges().len() <= RANGES_PER_REQUEST_MAX));
    assert!(bench.open.iter().all(|open| open.groups.ranges().last().unwrap().end <= 2 * RANGES_MAX as u64));
    bench.source(2, 0..u64::MAX);
    assert!(bench.open.iter().all(|open| open.groups.ranges().last().unwrap().end <= 1_000_000));
    for id in 3..1_000 {
        bench.source(id, 0..1_000_000);
    }
    assert_eq!(bench.swarm.progress(bench.now).sources.len(), SOURCES_MAX);
}

#[derive(Debug, Clone)]
enum Op {
    Announce {
        id: u32,
        kind: SourceKind,
        has: Vec<Range<u64>>,
        rtt_ms: u32,
    },
    Deliver {
        which: usize,
        count: u64,
    },
    Fail {
        which: usize,
        all: bool,
        outcome: Outcome,
    },
    Finish {
        which: usize,
    },
    /// Something that was not asked for, or not any more.
    Stray {
        id: u32,
        groups: Range<u64>,
    },
    Leave {
        id: u32,
    },
    Want {
        groups: Range<u64>,
        urgent: bool,
    },
    Pass {
        ms: u64,
    },
}

const GROUPS: u64 = 400;

fn op() -> impl Strategy<Value = Op> {
    let range = || (0..GROUPS, 1u64..200).prop_map(|(start, len)| start..start + len);
    let outcome = prop_oneof![
        (0u64..3_000).prop_map(|retry_ms| Outcome::Busy { retry_ms }),
        Just(Outcome::Lacks),
        Just(Outcome::Wrong),
        Just(Outcome::Gone),
        Just(Outcome::Slow),
    ];
    let kind = prop_oneof![2 => Just(SourceKind::Peer), 1 => Just(SourceKind::Hub), 1 => Just(SourceKind::Disk)];
    prop_oneof![
        4 => (0u32..6, kind, proptest::collection::vec(range(), 0..4), 0u32..500)
            .prop_map(|(id, kind, has, rtt_ms)| Op::Announce { id, kind, has, rtt_ms }),
        10 => (any::<usize>(), 1u64..40).prop_map(|(which, count)| Op::Deliver { which, count }),
        2 => (any::<usize>(), any::<bool>(), outcome).prop_map(|(which, all, outcome)| Op::Fail { which, all, outcome }),
        1 => any::<usize>().prop_map(|which| Op::Finish { which }),
        1 => (0u32..7, range()).prop_map(|(id, groups)| Op::Stray { id, groups }),
        1 => (0u32..6).prop_map(|id| Op::Leave { id }),
        1 => (range(), any::<bool>()).prop_map(|(groups, urgent)| Op::Want { groups, urgent }),
        4 => (0u64..4_000).prop_map(|ms| Op::Pass { ms }),
    ]
}

/// What each source has, as far as it may be believed.
type Has = BTreeMap<SourceId, GroupSet>;

fn check(bench: &Bench, asked: &[Open], has: &Has, wanted: &GroupSet) {
    for open in asked {
        let has = has.get(&open.id).expect("only sources are asked, and none that lied");
        assert_eq!(open.groups.difference(has), GroupSet::default(), "asked for what it has not: {open:?}");
        assert_eq!(open.groups.difference(wanted), GroupSet::default(), "nobody wants {open:?}");
        assert_eq!(open.groups.intersection(&bench.done), GroupSet::default(), "{open:?} is here already");
        assert!(open.groups.len() <= REQUEST_GROUPS_MAX && open.groups.ranges().len() <= RANGES_PER_REQUEST_MAX);
    }
    let progress = bench.swarm.progress(bench.now);
    let under_way =
        progress.sources.iter().flat_map(|source| &source.owes).filter(|owes| owes.purpose != Purpose::Probe);
    let under_way = under_way.fold(GroupSet::default(), |all, owes| all.union(&owes.groups));
    let missing = wanted.difference(&bench.done);
    let is_disk =
        |source: &&SourceProgress| source.kind == SourceKind::Disk && matches!(source.state, SourceState::Ready);
    let on_disk = progress.sources.iter().filter(is_disk);
    let on_disk = on_disk.fold(GroupSet::default(), |all, disk| all.union(&has[&disk.id]));
    for source in &progress.sources {
        assert!(source.owes.len() <= IN_FLIGHT_MAX);
        // A hub may wait where peers have the same, and peers where it is on this disk.
        if source.state == SourceState::Ready && source.owes.is_empty() && source.kind == SourceKind::Peer {
            let idle = missing.difference(&under_way).intersection(&has[&source.id]).difference(&on_disk);
            assert!(idle.is_empty(), "{:?} has {idle:?} and is not asked: {progress:#?}", source.id);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    #[test]
    fn whatever_happens_groups_are_asked_once_and_all_come_in_the_end(ops in proptest::collection::vec(op(), 0..120)) {
        let mut bench = Bench::new(GROUPS);
        let (mut has, mut liars, mut wanted) = (Has::new(), Vec::new(), GroupSet::default());
        for op in ops {
            let picked = |which: usize| bench.open.get(which % bench.open.len().max(1)).cloned();
            let asked = match op {
                Op::Announce { id, kind, has: ranges, rtt_ms } => {
                    let set: GroupSet = ranges.into_iter().collect();
                    if !liars.contains(&SourceId(id)) {
                        has.insert(SourceId(id), set.intersection(&(0..GROUPS).into()));
                    }
                    bench.tell(Event::Source { id: SourceId(id), kind, has: set, rtt_ms })
                }
                Op::Deliver { which, count } => {
                    let Some(open) = picked(which) else { continue };
                    let first = open.groups.ranges()[0].clone();
                    let groups = first.start..first.end.min(first.start + count);
                    bench.tell(Event::Received { id: open.id, request: open.request, groups })
                }
                Op::Fail { which, all, outcome } => {
                    let Some(open) = picked(which) else { continue };
                    match outcome {
                        Outcome::Wrong => {
                            has.remove(&open.id);
                            liars.push(open.id);
                        }
                        Outcome::Gone if all => drop(has.remove(&open.id)),
                        Outcome::Lacks => {
                            let lacked = bench.open.iter().filter(|o| o.id == open.id && (all || o.request == open.request));
                            let lacked = lacked.fold(GroupSet::default(), |all, open| all.union(&bench.owed(open)));
                            has.entry(open.id).and_modify(|has| *has = has.difference(&lacked));
                        }
                        _ => {}
                    }
                    let request = (!all).then_some(open.request);
                    bench.tell(Event::Failed { id: open.id, request, outcome })
                }
                Op::Finish { which } => {
                    let Some(open) = picked(which) else { continue };
                    has.entry(open.id).and_modify(|has| *has = has.difference(&bench.owed(&open)));
                    bench.tell(Event::Finished { id: open.id, request: open.request })
                }
                Op::Stray { id, groups } => {
                    let groups = groups.start..groups.end.min(GROUPS);
                    bench.tell(Event::Received { id: SourceId(id), request: RequestId(u64::MAX), groups })
                }
                Op::Leave { id } => {
                    has.remove(&SourceId(id));
                    bench.tell(Event::Left { id: SourceId(id) })
                }
                Op::Want { groups, urgent } => {
                    wanted = wanted.union(&GroupSet::from(groups.clone()).intersection(&(0..GROUPS).into()));
                    bench.want(groups, urgent)
                }
                Op::Pass { ms } => bench.pass(ms),
            };
            check(&bench, &asked, &has, &wanted);
        }

        bench.want(0..GROUPS, false);
        bench.source(9, 0..GROUPS);
        for _ in 0..2_000 {
            let progress = bench.swarm.progress(bench.now);
            if progress.done_bytes == GROUPS * GROUP_BYTES {
                prop_assert!(bench.open.is_empty());
                return Ok(());
            }
            bench.pass(20);
            if bench.open.iter().any(|open| open.id == SourceId(9)) {
                bench.deliver(9, 8);
            }
        }
        prop_assert!(false, "one honest source is enough: {:#?}", bench.swarm.progress(bench.now));
    }
}
