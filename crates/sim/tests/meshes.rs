//! Whole meshes over many seeds. A failure names its seed, which repeats it.

#![allow(clippy::unwrap_used)]

use murmur_sim::{Churn, NetworkOptions, ROUND_MS, Report, Scenario, Sim, Transport};

const SECOND_MS: u64 = 1_000;
const TTL_MS: u64 = 60_000;

/// Seeds per test: enough for every commit; `MURMUR_SIM_SEEDS=1000` for a night.
fn seeds() -> std::ops::Range<u64> {
    0..std::env::var("MURMUR_SIM_SEEDS").ok().and_then(|count| count.parse().ok()).unwrap_or(12)
}

fn lossy() -> NetworkOptions {
    NetworkOptions { loss: 0.05, ..NetworkOptions::default() }
}

fn mesh(seed: u64) -> Scenario {
    Scenario { nodes: 16, seed, network: lossy(), ..Scenario::default() }
}

fn started(scenario: Scenario) -> Sim {
    let settled_ms = scenario.starting_ms + 2 * ROUND_MS;
    let mut sim = Sim::new(scenario).unwrap();
    sim.run_for(settled_ms);
    sim
}

fn figures(report: &Report) -> [u64; 8] {
    [
        report.messages,
        report.gossip_bytes,
        report.exchange_bytes,
        report.node_ms,
        report.discovery.count(),
        report.discovery.max_ms(),
        report.ghosts.count(),
        report.farewell.max_ms(),
    ]
}

#[test]
fn the_same_seed_gives_the_same_run_and_another_seed_another() {
    let run = |seed| {
        let mut sim = started(Scenario { liars: 2, ..mesh(seed) });
        Churn::new(16, 1.0, seed).run(&mut sim, 120 * SECOND_MS);
        figures(sim.report())
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}

#[test]
fn a_mesh_that_begins_settled_stays_so() {
    for seed in seeds() {
        let mut sim = Sim::new(Scenario { settled: true, ..mesh(seed) }).unwrap();
        assert_eq!(sim.unknown_pairs(), 0, "seed {seed}");
        // Longer than any record of the beginning counts.
        sim.run_for(700 * SECOND_MS);
        assert_eq!(sim.unknown_pairs(), 0, "seed {seed}");
        let report = sim.report();
        assert_eq!((report.false_departures, report.discovery.count()), (0, 0), "seed {seed}: {report}");
    }
}

#[test]
fn nodes_find_each_other_within_ten_seconds_though_packets_are_lost_and_wall_clocks_are_wrong() {
    for seed in seeds() {
        let sim = started(mesh(seed));
        assert_eq!(sim.unknown_pairs(), 0, "seed {seed}");
        assert_eq!(sim.report().discovery.count(), 16 * 15, "seed {seed}");
        assert!(sim.report().discovery.quantile_ms(0.99) <= 10 * SECOND_MS, "seed {seed}: {}", sim.report());
    }
}

#[test]
fn datagrams_that_are_lost_doubled_and_reordered_do_not_confuse_the_tables() {
    for seed in seeds() {
        let network = NetworkOptions {
            loss: 0.2,
            duplication: 0.1,
            jitter_ms: 200,
            transport: Transport::Datagram,
            ..NetworkOptions::default()
        };
        let mut sim = started(Scenario { network, ..mesh(seed) });
        sim.run_for(3 * TTL_MS);
        assert_eq!(sim.unknown_pairs(), 0, "seed {seed}");
        assert_eq!(sim.report().resurrections, 0, "seed {seed}");
    }
}

#[test]
fn a_node_that_says_goodbye_is_gone_everywhere_within_two_rounds() {
    for seed in seeds() {
        let mut sim = started(mesh(seed));
        sim.leave(3);
        sim.run_for(2 * ROUND_MS);
        assert_eq!(sim.ghost_pairs(), 0, "seed {seed}");
        sim.run_for(2 * TTL_MS);
        assert_eq!((sim.ghost_pairs(), sim.report().resurrections), (0, 0), "seed {seed}");
    }
}

#[test]
fn goodbyes_get_around_within_two_rounds_while_others_crash_and_come() {
    for seed in seeds() {
        let mut sim = started(Scenario { nodes: 60, ..mesh(seed) });
        sim.reset_report();
        Churn::new(60, 0.2, seed).run(&mut sim, 3 * TTL_MS);
        let report = sim.report();
        assert!(report.farewell.count() > 100 && report.farewell.max_ms() <= 2 * ROUND_MS, "seed {seed}: {report}");
    }
}

#[test]
fn a_goodbye_that_a_few_nodes_alone_have_heard_reaches_all() {
    let mut heard_by_few = 0;
    for seed in seeds() {
        let mut sim = started(mesh(seed));
        // Most are cut off from the leaver when it says its last word.
        sim.partition(Some((0..16).map(|index| u32::from(index < 4)).collect()));
        sim.leave(0);
        sim.run_for(SECOND_MS);
        sim.partition(None);
        heard_by_few += u64::from((12..15).contains(&sim.ghost_pairs()));
        sim.run_for(2 * ROUND_MS);
        assert!(sim.ghost_pairs() == 0 || sim.ghost_pairs() == 15, "seed {seed}: {}", sim.report());
    }
    assert!(heard_by_few > 0, "the leaver never had a neighbour among the four");
}

#[test]
fn a_settled_mesh_sends_each_record_less_than_twice_to_each_node() {
    let mut sim = started(Scenario { nodes: 100, ..mesh(1) });
    sim.run_for(TTL_MS);
    sim.reset_report();
    sim.run_for(TTL_MS);
    assert!(sim.report().copies < 2 * sim.report().first_copies, "{}", sim.report());
}

#[test]
fn a_node_that_crashes_is_gone_everywhere_within_two_rounds_of_the_end_of_its_last_record() {
    for seed in seeds() {
        let mut sim = started(mesh(seed));
        sim.crash(3);
        assert_eq!((sim.ghost_pairs(), sim.survey().overdue_ghosts), (15, 0), "seed {seed}");
        sim.run_for(TTL_MS + 2 * ROUND_MS);
        assert_eq!(sim.ghost_pairs(), 0, "seed {seed}");
        assert!(sim.report().ghosts.count() > 0 && sim.report().ghosts.max_ms() <= 2 * ROUND_MS, "{}", sim.report());
        assert_eq!(sim.report().resurrections, 0, "seed {seed}");
    }
}

#[test]
fn a_restarted_node_is_back_at_once_and_is_not_taken_for_its_ghost() {
    for seed in seeds() {
        let mut sim = started(mesh(seed));
        for goodbye in [true, false] {
            if goodbye {
                sim.leave(3)
            } else {
                sim.crash(3)
            }
            sim.run_for(3 * SECOND_MS);
            sim.start(3);
            sim.run_for(10 * SECOND_MS);
            assert_eq!(sim.unknown_pairs(), 0, "seed {seed}");
        }
        sim.run_for(2 * TTL_MS);
        assert_eq!((sim.unknown_pairs(), sim.report().false_departures), (0, 0), "seed {seed}");
    }
}

#[test]
fn liars_neither_bury_the_living_nor_wake_the_dead() {
    for seed in seeds() {
        let mut sim = started(Scenario { liars: 4, ..mesh(seed) });
        sim.run_for(TTL_MS);
        sim.leave(1);
        sim.crash(2);
        sim.run_for(5 * TTL_MS);
        let report = sim.report();
        assert_eq!((sim.unknown_pairs(), sim.ghost_pairs()), (0, 0), "seed {seed}");
        assert_eq!((report.false_departures, report.resurrections), (0, 0), "seed {seed}: {report}");
        assert!(report.forgeries_refused > 0 && report.strangers_refused > 0, "seed {seed}: {report}");
    }
}

#[test]
fn a_liar_can_show_a_dead_node_to_a_newcomer_once_and_for_one_validity() {
    let mut resurrections = 0;
    for seed in seeds() {
        let mut sim = started(Scenario { liars: 4, ..mesh(seed) });
        sim.run_for(TTL_MS);
        sim.crash(2);
        sim.leave(5);
        sim.run_for(TTL_MS + 2 * ROUND_MS);
        // It has lost its memory of the dead: graves are not kept on disk.
        sim.crash(6);
        sim.start(6);
        sim.run_for(6 * TTL_MS);
        let report = sim.report();
        assert!(report.resurrections <= 2, "seed {seed}: {report}");
        assert_eq!((sim.unknown_pairs(), report.false_departures), (0, 0), "seed {seed}: {report}");
        resurrections += report.resurrections;
    }
    assert!(resurrections > 0, "the liars had nothing to lie with");
}

#[test]
fn halves_that_were_apart_forget_each_other_and_find_each_other_again() {
    for seed in seeds() {
        let mut sim = started(mesh(seed));
        sim.partition(Some((0..16).map(|index| index % 2).collect()));
        sim.run_for(3 * TTL_MS);
        assert_eq!((sim.unknown_pairs(), sim.survey().overdue_pairs), (2 * 8 * 8, 2 * 8 * 8), "seed {seed}");
        sim.partition(None);
        sim.run_for(2 * TTL_MS);
        assert_eq!((sim.unknown_pairs(), sim.report().resurrections), (0, 0), "seed {seed}");
    }
}

#[test]
fn a_mesh_of_which_everybody_keeps_coming_and_going_comes_to_rest_true() {
    for seed in seeds() {
        let mut sim = started(mesh(seed));
        Churn::new(16, 2.0, seed).run(&mut sim, 5 * TTL_MS);
        sim.run_for(2 * TTL_MS + 2 * ROUND_MS);
        assert_eq!((sim.unknown_pairs(), sim.ghost_pairs()), (0, 0), "seed {seed}: {}", sim.report());
    }
}
