//! Whole fetches in a simulated world.

use murmur_core::swarm::{GROUP_BYTES, Purpose, SourceId, SourceKind};

use crate::sim::{Habit, Node, Random, World, rate_of_mbit_per_s};

/// 200 MB.
const GROUPS: u64 = 12_207;

fn seconds(ms: u64) -> f64 {
    ms as f64 / 1_000.0
}

/// Any source, from a slow one far away to a fast one next door.
fn any_source(groups: u64, random: &mut Random) -> Node {
    let up = rate_of_mbit_per_s(random.between(5.0, 200.0));
    Node::source(groups, up, 2 + random.below(200))
}

#[test]
fn a_fetch_ends_complete_whatever_its_sources_do() {
    for seed in 0..60 {
        let mut random = Random(seed);
        let groups = 1 + random.below(6_000);
        let mut nodes = vec![Node::fetching(groups, 0.1, 0, seed)];
        let count = 2 + random.below(8);
        for _ in 0..count {
            let habit = match random.below(8) {
                0 => Habit::Stalls { after: random.below(400) },
                1 => Habit::Lies { after: random.below(400) },
                2 => Habit::Boasts { has_before: random.below(groups) },
                3 => Habit::Busy { until_ms: random.below(8_000) },
                4 => Habit::Pauses { from_ms: random.below(3_000), until_ms: 3_000 + random.below(9_000) },
                _ => Habit::Honest,
            };
            let mut node = Node { habit, ..any_source(groups, &mut random) };
            if random.below(4) == 0 {
                node.up = rate_of_mbit_per_s(0.3);
            }
            if random.below(4) == 0 {
                node.from_ms = random.below(5_000);
            }
            if random.below(4) == 0 {
                node.dies_ms = random.below(5_000);
            }
            nodes.push(node);
        }
        // The one on which it depends, though not a fast one.
        nodes.push(Node { kind: SourceKind::Hub, up: rate_of_mbit_per_s(20.0), ..any_source(groups, &mut random) });
        let mut world = World::new(groups, nodes);
        world.run(120_000);
        let fetch = world.fetch(0);
        let liars = world.nodes.iter().filter(|node| matches!(node.habit, Habit::Lies { after } if node.sent > after));
        assert_eq!(fetch.dropped.len(), liars.count(), "seed {seed}");
    }
}

#[test]
fn honest_sources_are_used_for_nearly_all_that_they_can_give() {
    for seed in 0..20 {
        let mut random = Random(seed);
        let mut nodes = vec![Node::fetching(GROUPS, 0.1, 0, seed)];
        let count = 1 + seed % 6;
        nodes.extend((0..count).map(|_| any_source(GROUPS, &mut random)));
        let rate: f64 = nodes[1..].iter().map(|node| node.up).sum();
        let ideal_ms = GROUPS as f64 / rate;
        let mut world = World::new(GROUPS, nodes);
        world.run(10 * ideal_ms as u64 + 60_000);
        let fetch = world.fetch(0);
        let done_ms = fetch.done_ms.unwrap();
        let doubled = fetch.received - GROUPS;
        println!(
            "{count} sources, {:.0} Mbit/s: {:.2} s, ideal {:.2} s, ratio {:.3}, {:.2} % twice",
            rate * GROUP_BYTES as f64 * 8.0 / 1e3,
            seconds(done_ms),
            ideal_ms / 1e3,
            done_ms as f64 / ideal_ms,
            100.0 * doubled as f64 / GROUPS as f64,
        );
        assert!(done_ms as f64 <= 1.1 * ideal_ms + 2_000.0, "seed {seed}");
    }
}

/// Nodes that fetch a file from one seed, where each sends so much: how many times as long it takes as sending it once, and an account.
fn fetched_from_one_seed(fetching: u64, bytes: u64, mbit_per_s: f64) -> (f64, String) {
    let (groups, up) = (bytes / GROUP_BYTES, rate_of_mbit_per_s(mbit_per_s));
    let mut nodes = vec![Node::source(groups, up, 10)];
    nodes.extend((0..fetching).map(|salt| Node::fetching(groups, up, 10, salt)));
    let mut world = World::new(groups, nodes);
    world.strict = false;
    let seed_ms = groups as f64 / up;
    world.run(10 * seed_ms as u64);
    let done: Vec<u64> = (1..=fetching).filter_map(|node| world.fetch(node as usize).done_ms).collect();
    let (first, last) = done.iter().fold((u64::MAX, 0), |(first, last), at| (first.min(*at), last.max(*at)));
    let received: u64 = (1..=fetching).map(|node| world.fetch(node as usize).received).sum();
    let ratio = last as f64 / seed_ms;
    let account = format!(
        "{fetching} nodes, {} MB from one seed at {mbit_per_s} Mbit/s: first {:.0} s, last {:.0} s; the seed alone once {:.0} s, \
         ratio {ratio:.2}; {fetching} downloads one after the other {:.0} s; the seed sent {:.2} files; {:.2} % came twice",
        bytes / 1_000_000,
        seconds(first),
        seconds(last),
        seed_ms / 1e3,
        fetching as f64 * seed_ms / 1e3,
        world.nodes[0].sent as f64 / groups as f64,
        100.0 * (received as f64 / (groups * fetching) as f64 - 1.0),
    );
    (ratio, account)
}

#[test]
fn twenty_nodes_that_fetch_from_one_seed_serve_each_other() {
    let (ratio, account) = fetched_from_one_seed(20, 1_000_000_000, 50.0);
    println!("{account}");
    assert!(ratio <= 1.3);
}

/// What `./x bench fetch` measures with real nodes.
#[test]
fn the_same_holds_of_an_eighth_of_the_file_on_an_eighth_of_the_links() {
    let (ratio, account) = fetched_from_one_seed(20, 125_000_000, 6.25);
    println!("{account}");
    assert!(ratio <= 1.3);
}

#[test]
fn a_death_each_second_costs_no_more_than_what_the_dead_owed() {
    for seed in 0..10 {
        let mut random = Random(seed);
        let mut nodes = vec![Node::fetching(GROUPS, 0.1, 0, seed)];
        for second in 0..40 {
            let from_ms = second * 1_000;
            let up = rate_of_mbit_per_s(random.between(10.0, 40.0));
            nodes.push(Node { from_ms, dies_ms: from_ms + 3_500, ..Node::source(GROUPS, up, 40) });
        }
        nodes.push(Node { kind: SourceKind::Hub, ..Node::source(GROUPS, rate_of_mbit_per_s(10.0), 40) });
        let mut world = World::new(GROUPS, nodes);
        world.run(200_000);
        let fetch = world.fetch(0);
        let of = |purpose| fetch.asked.get(&purpose).copied().unwrap_or_default();
        println!(
            "seed {seed}: {:.1} s, asked for {} groups of {GROUPS}, {} lost with the dead, {} rescued, {} came twice",
            seconds(fetch.done_ms.unwrap()),
            of(Purpose::Fetch),
            fetch.lost_with_the_dead,
            of(Purpose::Rescue),
            fetch.received - GROUPS,
        );
        assert!(of(Purpose::Fetch) <= GROUPS + fetch.lost_with_the_dead, "seed {seed}");
    }
}

#[test]
fn a_hub_is_left_alone_where_peers_are_as_fast() {
    // 10 MB: a second, or half a second with the hub.
    let groups = 610;
    let up = rate_of_mbit_per_s(100.0);
    let hub = Node { kind: SourceKind::Hub, ..Node::source(groups, up, 20) };
    let mut world = World::new(groups, vec![Node::fetching(groups, up, 0, 1), hub, Node::source(groups, up, 20)]);
    world.run(10_000);
    let [_, hub, peer] = &world.nodes[..] else { panic!() };
    assert!(hub.sent * 4 < peer.sent, "the hub sent {}, the peer {}", hub.sent, peer.sent);
}

#[test]
fn a_hub_gives_what_peers_lack_and_helps_where_that_saves_time() {
    let up = rate_of_mbit_per_s(20.0);
    let hub = Node { kind: SourceKind::Hub, ..Node::source(GROUPS, up, 20) };
    let half = Node { has: (0..GROUPS / 2).into(), ..Node::source(GROUPS, up, 20) };
    let mut world = World::new(GROUPS, vec![Node::fetching(GROUPS, up, 0, 1), hub, half]);
    world.run(200_000);
    let ideal_ms = GROUPS as f64 / (2.0 * up);
    assert!(world.fetch(0).done_ms.unwrap() as f64 <= 1.1 * ideal_ms + 2_000.0);
}

#[test]
fn what_is_on_this_disk_is_asked_of_nobody_else() {
    let up = rate_of_mbit_per_s(20.0);
    let disk = Node { kind: SourceKind::Disk, has: (0..GROUPS / 2).into(), ..Node::source(GROUPS, 2.0 * up, 1) };
    let mut world =
        World::new(GROUPS, vec![Node::fetching(GROUPS, 3.0 * up, 0, 1), disk, Node::source(GROUPS, up, 20)]);
    world.run(200_000);
    let [_, disk, peer] = &world.nodes[..] else { panic!() };
    assert!(disk.sent >= GROUPS / 2 && peer.sent <= GROUPS / 2 + GROUPS / 50, "{} and {}", disk.sent, peer.sent);
}

#[test]
fn a_source_that_stops_for_a_while_is_used_again() {
    let up = rate_of_mbit_per_s(50.0);
    let pauses = Habit::Pauses { from_ms: 2_000, until_ms: 9_000 };
    let stopped = Node { habit: pauses, ..Node::source(GROUPS, 2.0 * up, 20) };
    let mut world = World::new(GROUPS, vec![Node::fetching(GROUPS, up, 0, 1), Node::source(GROUPS, up, 20), stopped]);
    world.run(60_000);
    let before = 2.0 * 2.0 * up * 1_000.0;
    assert!(
        world.nodes[2].sent as f64 > 1.5 * before,
        "it sent {} in all, {before:.0} before its pause",
        world.nodes[2].sent
    );
    assert!(!world.fetch(0).dropped.contains(&SourceId(2)));
}
