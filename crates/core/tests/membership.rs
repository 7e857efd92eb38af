//! The membership table under late, lost, doubled, reordered and forged copies.

mod common;

use std::collections::{BTreeMap, BTreeSet};

use common::{TTL_MS, mesh, node, record, record_of_another_mesh, tombstone};
use murmur_core::{
    membership::{
        Answer, CHANGE_BURST, DIGEST_NODES_MAX, Membership, MembershipOptions, Opening, Outcome, RENEW_EVERY_MS,
        RENEW_PAUSE_MS, UPDATE_BURST, Unwelcome,
    },
    time::Now,
};
use murmur_protocol::mesh::summary::RANGES_MAX;
use murmur_protocol::mesh::{Control, Differing, NodeId, Ranges, encode};
use proptest::prelude::*;

const T0: Now = Now::from_ms(1_000_000);
const FIRST_SEQUENCE: u64 = 1_000;

fn table(own: u32) -> Membership {
    Membership::new(node(own), mesh(), FIRST_SEQUENCE, MembershipOptions::default())
}

/// Signs and sets the own record, as the shell does.
fn renewed(table: &mut Membership, now: Now) -> u64 {
    let sequence = table.renew(now);
    table.set_own(record(table.own(), sequence));
    sequence
}

fn listing(table: &Membership, now: Now) -> BTreeMap<NodeId, u64> {
    table.nodes(now).map(|record| (record.node, record.sequence)).collect()
}

/// What is wanted of `from`, and the records of an answer of `to`, get to the other.
fn settle(from: &mut Membership, to: &mut Membership, answer: Answer, now: Now) {
    let records = from.wanted(&answer.want, now);
    for aged in answer.records {
        from.accept(&aged.verified, aged.age_ms.into(), to.own(), now);
    }
    for aged in records {
        to.accept(&aged.verified, aged.age_ms.into(), from.own(), now);
    }
}

/// `from` sends its digest to `to`, and both do what follows.
fn exchange(from: &mut Membership, to: &mut Membership, now: Now) {
    let answer = to.answer(&from.digest(now), now);
    settle(from, to, answer, now);
}

/// `from` sends its summary to `to`, and both do what follows. Returns the bytes of what was said beside the records, and how
/// many records were handed over.
fn exchange_in_short(from: &mut Membership, to: &mut Membership, salt: u64, now: Now) -> (usize, usize) {
    let summary = from.summary(salt, now);
    let differing = to.differing(&summary, now);
    let answer = from.answer_differing(&differing, summary.ranges(), now);
    let records = answer.records.len() + answer.want.len();
    let said = [Control::Summary(summary), Control::Differing(differing), Control::Want(answer.want.clone())];
    settle(to, from, answer, now);
    (said.iter().map(|message| encode(message).map_or(usize::MAX, |bytes| bytes.len())).sum(), records)
}

#[test]
fn a_record_lists_its_node_until_its_time_has_run_out() {
    let mut table = table(0);
    assert_eq!(table.accept(&record(node(1), 5), 0, node(1), T0), Outcome::New { displaced: Vec::new() });
    let last = T0.plus_ms(TTL_MS - 1);
    assert!(table.expire(last).is_empty() && table.get(&node(1), last).is_some());
    let end = T0.plus_ms(TTL_MS);
    assert!(table.get(&node(1), end).is_none());
    assert_eq!(table.next_expiry(), Some(end));
    assert_eq!(table.expire(end), [node(1)]);
    assert_eq!((table.len(), table.next_expiry()), (0, None));
}

#[test]
fn the_same_record_heard_again_does_not_live_longer() {
    let mut table = table(0);
    table.accept(&record(node(1), 5), 0, node(1), T0);
    for later_ms in [1, 30_000, TTL_MS - 1] {
        assert_eq!(table.accept(&record(node(1), 5), 0, node(2), T0.plus_ms(later_ms)), Outcome::Known);
    }
    assert_eq!(table.expire(T0.plus_ms(TTL_MS)), [node(1)]);
    assert_eq!(table.accept(&record(node(1), 5), 0, node(2), T0.plus_ms(TTL_MS)), Outcome::Old);
}

#[test]
fn a_liar_that_calls_a_new_record_old_does_not_hide_its_node() {
    let mut table = table(0);
    table.accept(&record(node(1), 5), 0, node(1), T0);
    for renewal in 1..=10 {
        let now = T0.plus_ms(renewal * RENEW_EVERY_MS);
        assert_eq!(table.accept(&record(node(1), 5 + renewal), TTL_MS, node(2), now), Outcome::Newer);
        assert_eq!(table.accept(&record(node(1), 5 + renewal), 0, node(1), now.plus_ms(50)), Outcome::Known);
        assert!(table.expire(now.plus_ms(50)).is_empty());
    }
}

#[test]
fn whoever_saw_a_node_die_shows_its_last_record_to_those_that_are_shown_older_ones() {
    let (mut witness, mut newcomer) = (table(1), table(2));
    witness.accept(&record(node(9), 8), 0, node(9), T0);
    let now = T0.plus_ms(TTL_MS);
    assert_eq!(witness.expire(now), [node(9)]);
    newcomer.accept(&record(node(9), 3), 0, node(66), now);
    exchange(&mut newcomer, &mut witness, now);
    let end = now.plus_ms(TTL_MS);
    assert_eq!(newcomer.expire(end), [node(9)]);
    for sequence in 0..=8 {
        assert_eq!(newcomer.accept(&record(node(9), sequence), 0, node(66), end), Outcome::Old);
    }
    assert!(witness.is_empty());
}

#[test]
fn ages_add_up_along_a_chain_of_nodes_whose_clocks_have_nothing_in_common() {
    let verified = record(node(9), 5);
    let (mut age_ms, mut held_ms) = (0, 0);
    for hop in 1..=5_u32 {
        let received = Now::from_ms(u64::from(hop) * 77_777_777);
        let mut table = table(hop);
        table.accept(&verified, age_ms, node(hop - 1), received);
        held_ms += 10_000;
        let handed_on = table.wanted(&[node(9)], received.plus_ms(10_000));
        age_ms = handed_on[0].age_ms.into();
        assert_eq!(age_ms, held_ms);
    }
    let mut last = table(6);
    assert!(matches!(last.accept(&verified, age_ms, node(5), T0), Outcome::New { .. }));
    assert_eq!(last.expire(T0.plus_ms(TTL_MS - age_ms)), [node(9)]);
    assert_eq!(table(7).accept(&verified, TTL_MS, node(5), T0), Outcome::Old, "older than it is valid");
}

#[test]
fn a_tombstone_ends_a_node_and_a_restart_begins_it_again() {
    let mut table = table(0);
    table.accept(&record(node(1), 5), 0, node(1), T0);
    assert_eq!(table.accept(&tombstone(node(1), 6), 0, node(2), T0), Outcome::Departed);
    assert_eq!(table.accept(&record(node(1), 6), 0, node(2), T0), Outcome::Old);
    assert_eq!(table.accept(&record(node(1), 3), 0, node(2), T0), Outcome::Old);
    assert!(table.is_empty());
    assert!(matches!(table.accept(&record(node(1), 7), 0, node(1), T0), Outcome::New { .. }));
    assert_eq!(table.accept(&tombstone(node(1), 6), 0, node(2), T0), Outcome::Old, "the restarted node is newer");
    assert_eq!(table.len(), 1);
}

#[test]
fn a_tombstone_is_handed_to_whoever_still_lists_the_node() {
    let (mut a, mut b) = (table(1), table(2));
    for table in [&mut a, &mut b] {
        table.accept(&record(node(9), 5), 0, node(9), T0);
    }
    a.accept(&tombstone(node(9), 6), 0, node(9), T0);
    exchange(&mut b, &mut a, T0);
    assert!(b.is_empty());
    assert_eq!(b.accept(&record(node(9), 5), 0, node(3), T0), Outcome::Old);
}

#[test]
fn records_of_another_mesh_are_refused() {
    let outcome = table(0).accept(&record_of_another_mesh(node(1)), 0, node(1), T0);
    assert_eq!(outcome, Outcome::Refused(Unwelcome::WrongMesh));
}

#[test]
fn the_own_record_is_renewed_regularly_and_soon_after_a_change_and_never_after_leaving() {
    let mut table = table(0);
    assert_eq!(table.next_renewal(), Some(Now::ZERO));
    assert_eq!(renewed(&mut table, T0), FIRST_SEQUENCE);
    assert_eq!(table.next_renewal(), Some(T0.plus_ms(RENEW_EVERY_MS)));
    table.note_change();
    assert_eq!(table.next_renewal(), Some(T0.plus_ms(RENEW_PAUSE_MS)));
    assert_eq!(renewed(&mut table, T0.plus_ms(RENEW_PAUSE_MS)), FIRST_SEQUENCE + 1);
    assert_eq!(table.leave(T0.plus_ms(5_000)), FIRST_SEQUENCE + 2);
    table.note_change();
    assert_eq!(table.next_renewal(), None);
}

/// A table of `count` nodes beside the own.
fn crowd(count: u32) -> Membership {
    let mut table = table(0);
    for number in 1..=count {
        table.accept(&record(node(number), 1), 0, node(number), T0);
    }
    table
}

#[test]
fn in_a_large_mesh_records_count_longer_and_are_renewed_less_often() {
    for (others, every_ms, ttl_ms) in
        [(0, RENEW_EVERY_MS, 60_000), (499, RENEW_EVERY_MS, 60_000), (999, 40_000, 120_000), (9_999, 200_000, 600_000)]
    {
        let mut table = crowd(others);
        renewed(&mut table, T0);
        assert_eq!((table.next_renewal(), table.ttl_ms()), (Some(T0.plus_ms(every_ms)), ttl_ms), "{others}");
    }
}

#[test]
fn a_newcomer_that_finds_a_large_mesh_renews_within_what_its_record_said_before() {
    let mut table = table(0);
    renewed(&mut table, T0);
    for number in 1..=5_000 {
        table.accept(&record(node(number), 1), 0, node(number), T0);
    }
    assert_eq!((table.next_renewal(), table.ttl_ms()), (Some(T0.plus_ms(RENEW_EVERY_MS)), 60_000));
}

#[test]
fn changes_are_told_at_once_and_in_a_large_mesh_no_faster_than_the_share_of_each_allows() {
    for (others, changes_at_most) in [(0, 60), (499, CHANGE_BURST + 3)] {
        let mut table = crowd(others);
        renewed(&mut table, T0);
        let mut renewals = 0;
        for now in (1..=60).map(|second| T0.plus_ms(second * 1_000)) {
            table.note_change();
            if table.next_renewal().is_some_and(|due| due <= now) {
                renewed(&mut table, now);
                renewals += 1;
            }
            assert!(now != T0.plus_ms(1_000) || renewals == 1, "the first change waits for nothing");
        }
        assert!(renewals <= changes_at_most && renewals + 2 >= changes_at_most, "{others} others: {renewals}");
    }
}

#[test]
fn a_node_that_is_expelled_is_gone_at_once_and_its_copies_do_not_bring_it_back() {
    let mut table = table(0);
    table.accept(&record(node(1), 5), 0, node(1), T0);
    table.expel(&node(1), T0);
    table.expel(&node(2), T0);
    assert!(table.is_empty());
    assert_eq!(table.accept(&record(node(1), 5), 0, node(2), T0), Outcome::Old);
    assert!(matches!(table.accept(&record(node(1), 6), 0, node(1), T0), Outcome::New { .. }));
}

#[test]
fn a_node_that_hears_of_its_earlier_life_goes_on_from_there() {
    let mut table = table(0);
    renewed(&mut table, T0);
    let own = table.own();
    assert_eq!(table.accept(&record(own, FIRST_SEQUENCE), 0, node(1), T0), Outcome::Known);
    assert_eq!(table.accept(&tombstone(own, 50_000), 0, node(1), T0), Outcome::Overtaken);
    assert_eq!(table.next_renewal(), Some(T0.plus_ms(RENEW_PAUSE_MS)));
    assert_eq!(renewed(&mut table, T0), 50_001);
}

#[test]
fn a_digest_that_lies_about_the_own_record_is_asked_for_proof() {
    let mut table = table(0);
    renewed(&mut table, T0);
    let own = table.own();
    assert_eq!(table.answer(&[(own, u64::MAX)], T0).want, [own]);
    assert_eq!(renewed(&mut table, T0), FIRST_SEQUENCE + 1);
}

#[test]
fn a_node_that_floods_the_mesh_with_records_is_heard_once_a_second() {
    let mut table = table(0);
    let outcomes: Vec<Outcome> =
        (0..1_000).map(|sequence| table.accept(&record(node(1), sequence), 0, node(1), T0)).collect();
    let heard = outcomes.iter().filter(|outcome| !matches!(outcome, Outcome::Refused(_))).count() as u64;
    assert!(heard <= UPDATE_BURST + 2, "{heard}");
    assert_eq!(outcomes.last(), Some(&Outcome::Refused(Unwelcome::TooOften)));
    let later = T0.plus_ms(20 * RENEW_PAUSE_MS);
    assert_eq!(table.accept(&record(node(1), 2_000), 0, node(1), later), Outcome::Newer);
    assert_eq!(table.accept(&tombstone(node(1), 2_001), 0, node(1), later), Outcome::Departed);
}

#[test]
fn a_flood_of_made_up_nodes_displaces_itself_and_not_those_heard_directly() {
    let options = MembershipOptions { nodes_max: 100, graves_max: 50, ..MembershipOptions::default() };
    let mut table = Membership::new(node(0), mesh(), FIRST_SEQUENCE, options);
    let (friends, flooder, honest) = (1..=20, node(500), node(501));
    for friend in friends.clone() {
        table.accept(&record(node(friend), 1), 0, node(friend), T0);
    }
    for number in 1_000..11_000 {
        table.accept(&record(node(number), 1), 0, flooder, T0);
    }
    for number in 600..630 {
        assert!(!matches!(table.accept(&record(node(number), 1), 0, honest, T0), Outcome::Refused(_)));
    }
    for number in 21..=40 {
        assert!(!matches!(table.accept(&record(node(number), 1), 0, node(number), T0), Outcome::Refused(_)));
    }
    assert_eq!(table.len(), 100);
    let listed: BTreeSet<NodeId> = table.nodes(T0).map(|record| record.node).collect();
    let kept = friends.chain(21..=40).chain(600..630).all(|number| listed.contains(&node(number)));
    assert!(kept, "{listed:?}");
    assert_eq!(table.accept(&record(node(99_999), 1), 0, flooder, T0), Outcome::Refused(Unwelcome::Full));
}

#[test]
fn tombstones_of_nodes_never_heard_of_do_not_push_out_the_graves_of_nodes_that_were_here() {
    let options = MembershipOptions { graves_max: 2_000, ..MembershipOptions::default() };
    let mut table = Membership::new(node(0), mesh(), FIRST_SEQUENCE, options);
    table.accept(&record(node(1), 5), 0, node(1), T0);
    table.accept(&tombstone(node(1), 6), 0, node(1), T0);
    for number in 10..10_010 {
        assert_eq!(table.accept(&tombstone(node(number), 6), 0, node(2), T0), Outcome::Known);
    }
    assert_eq!(table.accept(&record(node(1), 5), 0, node(2), T0), Outcome::Old);
}

/// A node whose place among the ids is anywhere, as keys are.
fn scattered(number: u32) -> NodeId {
    node(number.reverse_bits())
}

#[test]
fn two_tables_of_five_thousand_that_differ_in_three_nodes_become_equal_for_a_few_kilobytes() {
    let (mut a, mut b) = (table(1), table(2));
    for number in 10..5_010 {
        for table in [&mut a, &mut b] {
            table.accept(&record(scattered(number), 5), 0, scattered(number), T0);
        }
    }
    a.accept(&record(scattered(9_001), 5), 0, node(3), T0);
    b.accept(&record(scattered(9_002), 5), 0, node(3), T0);
    a.accept(&record(scattered(77), 6), 0, scattered(77), T0);
    let (bytes, records) = exchange_in_short(&mut a, &mut b, 1, T0);
    assert!(bytes < 6_000, "{bytes}");
    assert_eq!((records, listing(&a, T0).len(), listing(&a, T0)), (3, 5_002, listing(&b, T0)));
    let (bytes, records) = exchange_in_short(&mut b, &mut a, 2, T0);
    assert!(bytes < 4_200 && records == 0, "{bytes}");
}

#[test]
fn a_newcomer_gets_ten_thousand_nodes_in_one_exchange_and_brings_its_own() {
    let (mut mesh, mut newcomer) = (table(1), table(2));
    for number in 10..10_010 {
        mesh.accept(&record(scattered(number), 5), 0, scattered(number), T0);
    }
    renewed(&mut newcomer, T0);
    let Opening::Digest(digest) = newcomer.opening(Some(1), T0) else { panic!("a small table is told whole") };
    let answer = mesh.answer(&digest, T0);
    settle(&mut newcomer, &mut mesh, answer, T0);
    assert_eq!((newcomer.len(), mesh.len()), (10_000, 10_001));
    assert!(matches!(mesh.opening(Some(1), T0), Opening::Summary(_)));
    assert!(matches!(mesh.opening(None, T0), Opening::Digest(_)), "for neighbours that know no summaries");
}

#[test]
fn a_goodbye_that_was_missed_is_found_in_a_large_table_too() {
    let (mut a, mut b) = (table(1), table(2));
    for number in 10..2_010 {
        for table in [&mut a, &mut b] {
            table.accept(&record(scattered(number), 5), 0, scattered(number), T0);
        }
    }
    for (number, by) in [(20, &mut a), (30, &mut b)] {
        by.accept(&tombstone(scattered(number), 6), 0, scattered(number), T0);
    }
    exchange_in_short(&mut a, &mut b, 1, T0);
    exchange_in_short(&mut b, &mut a, 2, T0);
    assert_eq!((listing(&a, T0).len(), listing(&a, T0)), (1_998, listing(&b, T0)));
}

#[test]
fn a_digest_of_a_part_of_a_table_is_not_taken_for_all_of_it() {
    let mut table = crowd(3_000);
    let part: Vec<(NodeId, u64)> =
        (1_000..2_024).filter(|number| *number != 1_500).map(|number| (node(number), 1)).collect();
    assert_eq!(table.answer(&part, T0).records.len(), 3_000 - 1_023, "a short one speaks for all");
    let part: Vec<(NodeId, u64)> = part.into_iter().chain([(node(2_024), 1)]).collect();
    let lacking: Vec<NodeId> = table.answer(&part, T0).records.iter().map(|aged| aged.verified.record().node).collect();
    assert_eq!(lacking, [node(1_500)]);
    renewed(&mut table, T0);
    assert_eq!(table.digest(T0).len(), 3_001);
}

#[test]
fn what_is_known_is_not_news() {
    let mut table = table(0);
    assert!(table.is_news(&node(1), 1));
    table.accept(&record(node(1), 5), 0, node(1), T0);
    assert!(!table.is_news(&node(1), 5) && table.is_news(&node(1), 6));
    table.accept(&tombstone(node(1), 6), 0, node(1), T0);
    assert!(!table.is_news(&node(1), 6) && table.is_news(&node(1), 7));
    assert!(!table.is_news(&node(0), FIRST_SEQUENCE - 1) && table.is_news(&node(0), FIRST_SEQUENCE));
}

/// Few enough distinct records of one node that none comes too often.
fn statements() -> impl Strategy<Value = Vec<(u32, u64)>> {
    prop::collection::vec((1..5_u32, 1..UPDATE_BURST), 0..40)
}

fn many_statements() -> impl Strategy<Value = Vec<(u32, u64)>> {
    prop::collection::vec((1..500_u32, 1..UPDATE_BURST), 0..3 * DIGEST_NODES_MAX)
}

/// Every third statement of a node is its tombstone; the next one is of its next life.
fn hear(table: &mut Membership, (number, sequence): (u32, u64), age_ms: u64, now: Now) -> Outcome {
    let make = if sequence.is_multiple_of(3) { tombstone } else { record };
    table.accept(&make(node(number), sequence), age_ms, node(99), now)
}

proptest! {
    #[test]
    fn tables_agree_whatever_the_order_and_number_of_deliveries(
        heard in statements(), order in any::<prop::sample::Index>(), twice in any::<prop::sample::Index>(),
    ) {
        let (mut straight, mut shuffled) = (table(0), table(0));
        for statement in &heard {
            hear(&mut straight, *statement, 0, T0);
        }
        let mut other = heard.clone();
        if !other.is_empty() {
            other.rotate_left(order.index(heard.len()));
            other.reverse();
            other.push(heard[twice.index(heard.len())]);
        }
        for statement in other {
            hear(&mut shuffled, statement, 0, T0);
        }
        prop_assert_eq!(listing(&straight, T0), listing(&shuffled, T0));
    }

    #[test]
    fn no_copy_of_what_was_there_before_brings_a_node_back(
        steps in prop::collection::vec((statements(), 0..40_000_u64, 0..TTL_MS), 1..8),
    ) {
        let mut table = table(0);
        let mut now = T0;
        let mut buried: BTreeMap<NodeId, u64> = BTreeMap::new();
        for (heard, pause_ms, age_ms) in steps {
            for statement in heard {
                let before = listing(&table, now);
                hear(&mut table, statement, age_ms, now);
                let after = listing(&table, now);
                for (id, sequence) in &after {
                    prop_assert!(buried.get(id).is_none_or(|buried| buried < sequence), "{:?} is back", id);
                }
                for (id, sequence) in before.iter().filter(|(id, _)| !after.contains_key(id)) {
                    buried.insert(*id, *sequence);
                }
            }
            now = now.plus_ms(pause_ms);
            let before: BTreeMap<NodeId, u64> = listing(&table, Now::ZERO);
            for gone in table.expire(now) {
                buried.insert(gone, before[&gone]);
            }
        }
    }

    #[test]
    fn one_exchange_makes_two_tables_equal(at_a in statements(), at_b in statements()) {
        let (mut a, mut b) = (table(100), table(101));
        at_a.iter().for_each(|statement| { hear(&mut a, *statement, 0, T0); });
        at_b.iter().for_each(|statement| { hear(&mut b, *statement, 0, T0); });
        exchange(&mut a, &mut b, T0);
        // Expired or departed here is not a reason for the other to list it: a second exchange carries the tombstones back.
        exchange(&mut b, &mut a, T0);
        prop_assert_eq!(listing(&a, T0), listing(&b, T0));
    }

    #[test]
    fn summaries_lead_to_the_same_tables_as_telling_each_other_everything(
        at_a in many_statements(), at_b in many_statements(), common in many_statements(), salts in any::<[u64; 2]>(),
    ) {
        let tables = || {
            let (mut a, mut b) = (table(100_000), table(100_001));
            for (table, heard) in [(&mut a, &at_a), (&mut b, &at_b)] {
                common.iter().chain(heard).for_each(|(number, sequence)| {
                    hear(table, (number.reverse_bits(), *sequence), 0, T0);
                });
                renewed(table, T0);
            }
            (a, b)
        };
        let (mut a, mut b) = tables();
        exchange(&mut a, &mut b, T0);
        exchange(&mut b, &mut a, T0);
        let (mut c, mut d) = tables();
        exchange_in_short(&mut c, &mut d, salts[0], T0);
        exchange_in_short(&mut d, &mut c, salts[1], T0);
        prop_assert_eq!(listing(&c, T0), listing(&a, T0));
        prop_assert_eq!(listing(&d, T0), listing(&b, T0));
    }

    #[test]
    fn lies_about_where_tables_differ_cost_no_more_than_the_table_and_change_nothing(
        ranges in prop::collection::vec(any::<u16>(), 0..100),
        lies in prop::collection::vec((any::<u32>(), any::<u64>()), 0..200),
        count_log2 in 0..11_u32,
        heard in many_statements(),
    ) {
        let mut table = table(100_000);
        heard.iter().for_each(|(number, sequence)| { hear(&mut table, (number.reverse_bits(), *sequence), 0, T0); });
        renewed(&mut table, T0);
        let before = listing(&table, T0);
        let entries: Vec<(NodeId, u64)> = lies.into_iter().map(|(number, sequence)| (node(number), sequence)).collect();
        let mut ranges = ranges;
        ranges.sort_unstable();
        ranges.dedup();
        let differing = Differing { ranges, entries };
        let answer = table.answer_differing(&differing, Ranges::new(1 << count_log2).unwrap(), T0);
        prop_assert!(answer.want.len() <= differing.entries.len());
        prop_assert!(answer.records.len() <= before.len() + 1 + differing.entries.len());
        let everywhere = Differing { ranges: (0..RANGES_MAX as u16).collect(), entries: Vec::new() };
        let answer = table.answer_differing(&everywhere, Ranges::new(RANGES_MAX).unwrap(), T0);
        prop_assert_eq!(answer.records.len(), before.len() + 1);
        prop_assert_eq!(listing(&table, T0), before);
    }

    #[test]
    fn a_digest_from_a_liar_never_asks_for_more_than_it_names(
        lies in prop::collection::vec((0..2_000_u32, any::<u64>()), 0..2_000), heard in statements(),
    ) {
        let mut table = table(0);
        heard.iter().for_each(|statement| { hear(&mut table, *statement, 0, T0); });
        let before = listing(&table, T0);
        let lies: Vec<(NodeId, u64)> = lies.into_iter().map(|(number, sequence)| (node(number), sequence)).collect();
        let answer = table.answer(&lies, T0);
        prop_assert!(answer.want.len() <= lies.len());
        prop_assert!(answer.records.len() <= before.len() + 4);
        prop_assert_eq!(listing(&table, T0), before);
    }
}
