//! What peers are known for, and who gets a request for it.

mod common;

use common::{model, node, served};
use murmur_core::{
    health::{
        Admission, BREAKER_PAUSE_MS_MAX, BREAKER_PAUSE_MS_MIN, Health, MODELS_PER_PEER_MAX, NO_MEMORY_MS, PEERS_MAX,
        PROBE_MS, Verdict,
    },
    prefix::{BLOCK_TOKENS, PrefixChain, Prefixes},
    router::{Candidate, Excluded, LOAD_MS_UNKNOWN, RTT_MS_UNKNOWN, Ranking, RequestFacts, Router},
    time::Now,
};
use murmur_protocol::mesh::{ModelDigest, ModelState, NodeId, ServedModel};
use proptest::prelude::*;

const T0: Now = Now::from_ms(1_000_000);

fn facts(prompt: &[i32]) -> RequestFacts {
    RequestFacts {
        model: model(),
        prompt_tokens: prompt.len() as u32,
        prefix: PrefixChain::of(&model(), prompt),
        output_tokens: 100,
        context_tokens: prompt.len() as u32 + 100,
        build: None,
        salt: 1,
    }
}

fn prompt(tokens: u32) -> Vec<i32> {
    (0..tokens as i32).collect()
}

fn ranked(router: &Router, facts: &RequestFacts, peers: &[(NodeId, ServedModel)], health: &Health) -> Ranking {
    let candidates = peers.iter().map(|(node, served)| Candidate { node: *node, served });
    router.choose(facts, candidates, health, &[], T0)
}

fn order(ranking: &Ranking) -> Vec<NodeId> {
    ranking.choices.iter().map(|choice| choice.node).collect()
}

#[test]
fn a_peer_that_is_gone_is_left_alone_at_once_and_tried_by_one_request_after_a_growing_pause() {
    let mut health = Health::new();
    let peer = node(1);
    let admission = |health: &Health, now| health.admission(&peer, &model(), now);
    assert_eq!(admission(&health, T0), Admission::Yes);
    let (mut now, mut pause_ms) = (T0, BREAKER_PAUSE_MS_MIN);
    for _ in 0..10 {
        health.note(peer, model(), Verdict::Gone, now);
        let (until, last_resort) = (now.plus_ms(pause_ms), now.plus_ms(BREAKER_PAUSE_MS_MIN));
        let broken = Admission::Broken { until, last_resort };
        assert_eq!(admission(&health, now), broken);
        health.note(peer, model(), Verdict::Gone, now);
        assert_eq!(admission(&health, now), broken, "requests that die together are one failure");
        assert_eq!(admission(&health, until), Admission::Probe);
        health.begin(peer, until);
        let others = until.plus_ms(PROBE_MS);
        assert_eq!(admission(&health, until), Admission::Broken { until: others, last_resort: others });
        now = until;
        pause_ms = (pause_ms * 2).min(BREAKER_PAUSE_MS_MAX);
    }
    health.note(peer, model(), Verdict::Ok, now);
    assert_eq!(admission(&health, now), Admission::Yes);
}

#[test]
fn what_a_peer_says_next_of_itself_does_not_undo_what_is_known_of_it() {
    let (router, mut health) = (Router::new(), Health::new());
    for (number, verdict) in [(1, Verdict::Gone), (2, Verdict::NoMemory), (3, Verdict::Busy { retry_ms: 5_000 })] {
        health.note(node(number), model(), verdict, T0);
    }
    // Each says that it has nothing to do, and is faster than ever.
    let boast = ServedModel { decode_us_per_token: 1, prefill_us_per_token: 1, ..served() };
    let peers: Vec<(NodeId, ServedModel)> = (1..=4).map(|number| (node(number), boast.clone())).collect();
    let ranking = ranked(&router, &facts(&prompt(10)), &peers, &health);
    assert_eq!(order(&ranking), [node(4)]);
    assert_eq!(ranking.excluded.len(), 3);
}

#[test]
fn a_probe_that_never_ends_does_not_lock_a_peer_out_for_ever() {
    let mut health = Health::new();
    health.note(node(1), model(), Verdict::Gone, T0);
    let tried = T0.plus_ms(BREAKER_PAUSE_MS_MIN);
    health.begin(node(1), tried);
    assert_eq!(health.admission(&node(1), &model(), tried.plus_ms(PROBE_MS)), Admission::Probe);
}

#[test]
fn a_probe_that_is_cancelled_leaves_the_peer_to_the_next_request() {
    let mut health = Health::new();
    health.note(node(1), model(), Verdict::Gone, T0);
    let tried = T0.plus_ms(BREAKER_PAUSE_MS_MIN);
    health.begin(node(1), tried);
    health.end(node(1), tried);
    assert_eq!(health.admission(&node(1), &model(), tried), Admission::Probe);
    health.note(node(1), model(), Verdict::Gone, tried);
    health.end(node(1), tried);
    assert!(matches!(health.admission(&node(1), &model(), tried), Admission::Broken { .. }), "and not when it failed");
}

#[test]
fn busy_delays_a_peer_no_memory_a_model_and_a_bad_request_nothing() {
    let mut health = Health::new();
    let other_model = ModelDigest::from_bytes([9; 32]);
    health.note(node(1), model(), Verdict::Busy { retry_ms: 300 }, T0);
    assert_eq!(health.admission(&node(1), &other_model, T0), Admission::Busy { until: T0.plus_ms(300) });
    assert_eq!(health.admission(&node(1), &model(), T0.plus_ms(300)), Admission::Yes);
    health.note(node(2), model(), Verdict::NoMemory, T0);
    assert_eq!(health.admission(&node(2), &model(), T0), Admission::NoMemory { until: T0.plus_ms(NO_MEMORY_MS) });
    assert_eq!(health.admission(&node(2), &other_model, T0), Admission::Yes);
    health.note(node(3), model(), Verdict::BadRequest, T0);
    assert_eq!(health.admission(&node(3), &model(), T0), Admission::Yes);
}

#[test]
fn who_failed_is_asked_again_soon_where_nobody_else_can_be() {
    let (mut health, router) = (Health::new(), Router::new());
    let both = [(node(1), served()), (node(2), served())];
    let choices = |health: &Health, peers: &[(NodeId, ServedModel)], now| {
        let candidates = peers.iter().map(|(node, served)| Candidate { node: *node, served });
        let ranking = router.choose(&facts(&prompt(10)), candidates, health, &[], now);
        assert_eq!(ranking.choices.len() + ranking.excluded.len(), peers.len());
        (order(&ranking), ranking.choices.iter().all(|choice| choice.probe), ranking.next_admission())
    };
    // Its fourth failure: it is left alone for eight seconds.
    let mut failed = T0;
    for pause_ms in [1, 2, 4].map(|factor| factor * BREAKER_PAUSE_MS_MIN) {
        health.note(node(1), model(), Verdict::Gone, failed);
        failed = failed.plus_ms(pause_ms);
        health.begin(node(1), failed);
    }
    health.note(node(1), model(), Verdict::Gone, failed);
    let soon = failed.plus_ms(BREAKER_PAUSE_MS_MIN);
    assert_eq!(choices(&health, &both, soon).0, [node(2)], "as long as there is somebody else");
    assert_eq!(choices(&health, &both[..1], failed), (vec![], true, Some(soon)));
    assert_eq!(choices(&health, &both[..1], soon).0, [node(1)]);
    assert!(choices(&health, &both[..1], soon).1);
    health.begin(node(1), soon);
    assert_eq!(choices(&health, &both[..1], soon).0, [], "by one request at a time");
    let draining = ServedModel { state: ModelState::Draining, ..served() };
    assert_eq!(choices(&health, &[(node(1), draining)], soon).0, [], "and not if it would refuse");
}

#[test]
fn a_refusal_is_a_sign_of_life() {
    let mut health = Health::new();
    health.note(node(1), model(), Verdict::Gone, T0);
    let tried = T0.plus_ms(BREAKER_PAUSE_MS_MIN);
    health.begin(node(1), tried);
    health.note(node(1), model(), Verdict::Busy { retry_ms: 10 }, tried);
    assert_eq!(health.admission(&node(1), &model(), tried.plus_ms(10)), Admission::Yes);
}

#[test]
fn round_trips_are_averaged_and_the_luckiest_one_is_not_kept() {
    let mut health = Health::new();
    assert_eq!(health.rtt_ms(&node(1)), None);
    health.note_round_trip(node(1), 100, T0);
    for _ in 0..50 {
        health.note_round_trip(node(1), 40_000, T0);
    }
    assert!(health.rtt_ms(&node(1)).is_some_and(|rtt_ms| (39.0..40.0).contains(&rtt_ms)));
}

#[test]
fn measurements_that_are_no_numbers_change_nothing() {
    let mut health = Health::new();
    health.note_decode(node(1), model(), 20.0, T0);
    for nonsense in [f64::NAN, f64::INFINITY, -1.0] {
        health.note_decode(node(1), model(), nonsense, T0);
    }
    assert_eq!(health.speed(&node(1), &model()).decode_ms_per_token, Some(20.0));
}

#[test]
fn the_memory_for_peers_and_models_is_bounded() {
    let mut health = Health::new();
    for number in 0..=PEERS_MAX as u32 {
        health.note_round_trip(node(number), 1_000, T0.plus_ms(number.into()));
    }
    assert_eq!(health.rtt_ms(&node(0)), None, "not dealt with for longest");
    assert!(health.rtt_ms(&node(1)).is_some());
    for number in 0..=MODELS_PER_PEER_MAX as u8 {
        let model = ModelDigest::from_bytes([number; 32]);
        health.note_decode(node(1), model, 1.0, T0.plus_ms(number.into()));
    }
    assert_eq!(health.speed(&node(1), &ModelDigest::from_bytes([0; 32])).decode_ms_per_token, None);
}

#[test]
fn measured_speed_goes_before_declared_speed() {
    let mut health = Health::new();
    let boaster = ServedModel { decode_us_per_token: 1, prefill_us_per_token: 1, ..served() };
    let peers = [(node(1), boaster), (node(2), served())];
    let (router, facts) = (Router::new(), facts(&prompt(64)));
    assert_eq!(order(&ranked(&router, &facts, &peers, &health)), [node(1), node(2)]);
    health.note_decode(node(1), model(), 400.0, T0);
    let ranking = ranked(&router, &facts, &peers, &health);
    assert_eq!(order(&ranking), [node(2), node(1)]);
    assert!(ranking.choices[1].measured && !ranking.choices[0].measured);
}

#[test]
fn the_costs_are_the_ones_that_the_figures_say() {
    let mut health = Health::new();
    let mut router = Router::new();
    let facts = facts(&prompt(4 * BLOCK_TOKENS));
    health.note_round_trip(node(1), 12_000, T0);
    health.note_prefill(node(1), model(), 2.0, T0);
    router.prefixes.note_sent(node(1), &PrefixChain::of(&model(), &prompt(3 * BLOCK_TOKENS)));
    let loading = ServedModel { state: ModelState::Loading, ..served() };
    let busy = ServedModel { running: 4, queued: 3, decode_us_per_token: 10_000, ..served() };
    let ranking = ranked(&router, &facts, &[(node(1), served()), (node(2), loading), (node(3), busy)], &health);
    let cost = |number| ranking.choices.iter().find(|choice| choice.node == node(number)).unwrap().cost;
    assert_eq!((cost(1).rtt_ms, cost(1).queue_ms, cost(1).load_ms), (12.0, 0.0, 0.0));
    assert_eq!((cost(1).prefill_ms, cost(1).decode_ms), (f64::from(BLOCK_TOKENS) * 2.0, 100.0 * 20.0));
    assert_eq!((cost(2).rtt_ms, cost(2).load_ms), (RTT_MS_UNKNOWN, LOAD_MS_UNKNOWN / 2.0));
    assert_eq!(cost(3).queue_ms, 4.0 * 256.0 * 10.0 / 4.0);
    assert_eq!(order(&ranking), [node(1), node(3), node(2)]);
    let explained = ranking.to_string();
    assert!(explained.contains("192 tokens cached") && explained.contains("declared"), "{explained}");
}

#[test]
fn the_peer_that_holds_the_conversation_gets_its_next_turn() {
    let health = Health::new();
    let mut router = Router::new();
    let peers: Vec<_> = (1..=5).map(|number| (node(number), served())).collect();
    router.begin(node(4), &PrefixChain::of(&model(), &prompt(1_000)));
    router.end(node(4));
    let mut next_turn = prompt(1_000);
    next_turn.extend([5; 200]);
    assert_eq!(order(&ranked(&router, &facts(&next_turn), &peers, &health))[0], node(4));
    router.prefixes.forget(&node(4));
    assert!(
        ranked(&router, &facts(&next_turn), &peers, &health).choices.iter().all(|choice| choice.cached_tokens == 0)
    );
}

#[test]
fn what_a_worker_says_that_it_holds_corrects_what_was_thought() {
    let mut prefixes = Prefixes::new();
    let chain = PrefixChain::of(&model(), &prompt(10 * BLOCK_TOKENS));
    prefixes.note_sent(node(1), &chain);
    assert_eq!(prefixes.cached_tokens(&node(1), &chain), 10 * BLOCK_TOKENS);
    prefixes.note_cached(&node(1), &chain, 4 * BLOCK_TOKENS + 3);
    assert_eq!(prefixes.cached_tokens(&node(1), &chain), 4 * BLOCK_TOKENS);
    let another_model = PrefixChain::of(&ModelDigest::from_bytes([9; 32]), &prompt(10 * BLOCK_TOKENS));
    assert_eq!(prefixes.cached_tokens(&node(1), &another_model), 0);
}

#[test]
fn requests_in_flight_count_before_the_peers_record_says_so() {
    let health = Health::new();
    let mut router = Router::new();
    let peers = [(node(1), ServedModel { decode_us_per_token: 19_000, ..served() }), (node(2), served())];
    let facts = facts(&prompt(10));
    let mut sent = [0; 2];
    for _ in 0..8 {
        let best = order(&ranked(&router, &facts, &peers, &health))[0];
        router.begin(best, &facts.prefix);
        sent[usize::from(best == node(2))] += 1;
    }
    assert_eq!(sent, [4, 4]);
}

#[test]
fn peers_of_equal_cost_share_the_requests() {
    let (health, router) = (Health::new(), Router::new());
    let peers: Vec<_> = (1..=4).map(|number| (node(number), served())).collect();
    let mut first = std::collections::BTreeMap::new();
    for salt in 0..400 {
        let facts = RequestFacts { salt, ..facts(&prompt(10)) };
        *first.entry(order(&ranked(&router, &facts, &peers, &health))[0]).or_insert(0) += 1;
    }
    assert_eq!(first.len(), 4);
    assert!(first.values().all(|count| (60..140).contains(count)), "{first:?}");
}

#[test]
fn a_request_that_moves_prefers_the_build_that_began_it() {
    let (health, router) = (Health::new(), Router::new());
    let other = ServedModel { build: "other".to_owned(), decode_us_per_token: 1_000, ..served() };
    let facts = RequestFacts { build: Some("build".to_owned()), ..facts(&prompt(10)) };
    let ranking = ranked(&router, &facts, &[(node(1), other), (node(2), served())], &health);
    assert_eq!(order(&ranking), [node(2), node(1)]);
    assert!(ranking.to_string().contains("another build"));
}

#[test]
fn peers_that_cannot_take_the_request_are_left_out_and_the_reason_is_told() {
    let (mut health, router) = (Health::new(), Router::new());
    health.note(node(4), model(), Verdict::Gone, T0);
    health.note(node(5), model(), Verdict::Busy { retry_ms: 200 }, T0);
    let peers = [
        (node(1), ServedModel { state: ModelState::Draining, ..served() }),
        (node(2), ServedModel { context_tokens: 50, ..served() }),
        (node(3), ServedModel { digest: ModelDigest::from_bytes([9; 32]), ..served() }),
        (node(4), served()),
        (node(5), served()),
    ];
    let ranking = ranked(&router, &facts(&prompt(10)), &peers, &health);
    assert!(ranking.choices.is_empty());
    let why = |number| ranking.excluded.iter().find(|(peer, _)| *peer == node(number)).unwrap().1;
    assert_eq!([why(1), why(2), why(3)], [Excluded::Draining, Excluded::ContextTooSmall, Excluded::OtherModel]);
    assert!(matches!(why(4), Excluded::Unfit(Admission::Broken { .. })));
    assert_eq!(ranking.next_admission(), Some(T0.plus_ms(200)));
    assert!(ranking.to_string().contains("failed lately"));
}

proptest! {
    #[test]
    fn every_candidate_is_ranked_or_left_out_for_a_reason_and_costs_are_finite(
        figures in prop::collection::vec((any::<u32>(), any::<u32>(), any::<u32>(), any::<u32>(), 0..5_usize), 0..50),
        tokens in 0..500_u32,
    ) {
        let states = [
            ModelState::Available, ModelState::Loading, ModelState::Ready, ModelState::Draining, ModelState::Unknown,
        ];
        let peers: Vec<(NodeId, ServedModel)> = figures.iter().zip(0..).map(|(figures, number)| {
            let (decode, prefill, running, queued, state) = *figures;
            (node(number), ServedModel {
                decode_us_per_token: decode, prefill_us_per_token: prefill, running, queued, parallel: prefill % 3,
                load_ms: decode, state: states[state], ..served()
            })
        }).collect();
        let (health, router) = (Health::new(), Router::new());
        let ranking = ranked(&router, &facts(&prompt(tokens)), &peers, &health);
        prop_assert_eq!(ranking.choices.len() + ranking.excluded.len(), peers.len());
        for choice in &ranking.choices {
            prop_assert!(choice.cost.total_ms().is_finite() && choice.cost.total_ms() >= 0.0);
            prop_assert!(choice.cost.first_token_ms() >= 0.0);
        }
    }
}
