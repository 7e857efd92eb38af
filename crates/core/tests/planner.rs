//! Rings: the planner against plain enumeration, and cases with known answers.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test may panic in its helpers too, and figures are printed"
)]

mod common;

use common::node;
use murmur_core::planner::{
    Ask, Codec, LayerFacts, Link, Links, ModelFacts, NoRing, NodeFacts, Objective, Origin, Pin, Placement, Plan,
    Planner, Rejected, Remedy,
};
use murmur_gguf::{LayerRange, Manifest};
use murmur_protocol::mesh::NodeId;

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

/// The driver of every ring here.
fn driver() -> NodeId {
    node(0)
}

fn layers(first: u32, end: u32) -> LayerRange {
    LayerRange::new(first, end)
}

/// `count` equal layers of 100 MiB, each with 1 KiB of KV per token.
fn model(count: u32) -> ModelFacts {
    ModelFacts {
        layers: vec![LayerFacts { weight_bytes: 100 * MIB, kv_bytes_per_token: 1024, cost: 1.0 }; count as usize],
        cuts: (1..count).collect(),
        head_bytes: 0,
        head_cost: 0.0,
        width: 2048,
        stage_bytes: 50 * MIB,
        stage_bytes_per_token: 0,
        kept_bytes: 0,
    }
}

/// A node with `gib` of memory that has everything on disk.
fn peer(number: u32, gib: u64, us_per_layer: f64) -> NodeFacts {
    NodeFacts { on_disk: vec![layers(0, 1000)], ..NodeFacts::new(node(number), gib * GIB, us_per_layer) }
}

/// Links between all of the nodes 0..`count`, each with the same one-way time.
fn links(count: u32, one_way_us: f64) -> Links {
    let mut links = Links::new();
    for a in 0..count {
        for b in (0..count).filter(|b| *b != a) {
            links.set(node(a), node(b), Link { one_way_us, bytes_per_s: 125e6 });
        }
    }
    links
}

fn held(plan: &Plan) -> Vec<(NodeId, u32)> {
    plan.stages.iter().map(|stage| (stage.node, stage.layers.len())).collect()
}

fn order(plan: &Plan) -> Vec<NodeId> {
    plan.stages.iter().map(|stage| stage.node).collect()
}

fn ask() -> Ask {
    Ask::new(driver(), 4096)
}

#[test]
fn a_model_that_fits_one_node_is_not_split() {
    let (model, links) = (model(16), links(4, 5_000.0));
    let nodes = [peer(1, 8, 1_000.0), peer(2, 8, 1_100.0), peer(3, 8, 1_050.0)];
    let plan = Planner { model: &model, nodes: &nodes, links: &links }.plan(&ask()).unwrap();
    assert_eq!(held(&plan), [(node(1), 16)]);
}

#[test]
fn of_equally_fast_rings_the_one_with_fewer_hops_is_taken() {
    let (model, mut links) = (model(16), links(3, 0.0));
    for (a, b) in [(0, 1), (0, 2), (1, 2)] {
        links.set_both(node(a), node(b), Link { one_way_us: 0.0, bytes_per_s: f64::INFINITY });
    }
    let nodes = [peer(1, 8, 1_000.0), peer(2, 8, 1_000.0)];
    let plan = Planner { model: &model, nodes: &nodes, links: &links }.plan(&ask()).unwrap();
    assert_eq!(held(&plan), [(node(1), 16)]);
}

#[test]
fn a_slow_node_is_left_out_when_it_does_not_pay_and_used_when_nothing_else_fits() {
    let (model, links) = (model(16), links(4, 1_000.0));
    let mut nodes = [peer(1, 1, 1_000.0), peer(2, 1, 1_000.0), peer(3, 1, 30_000.0)];
    let with = |nodes: &[NodeFacts]| Planner { model: &model, nodes, links: &links }.plan(&ask()).unwrap();
    let plan = with(&nodes);
    assert_eq!(plan.stages.len(), 2, "{plan}");
    assert!(
        matches!(plan.rejected[..], [Rejected::WholeTooLarge { .. }, Rejected::LeftOut { node: id, slower_us, .. }] if id == node(3) && slower_us > 29_000.0),
        "{plan}"
    );
    nodes[1].layers_max = Some(4);
    let plan = with(&nodes);
    assert_eq!(plan.stages.iter().find(|stage| stage.node == node(3)).unwrap().layers.len(), 16 - 9 - 4, "{plan}");
}

#[test]
fn the_fast_node_gets_as_many_layers_as_it_can_hold() {
    let (model, links) = (model(16), links(3, 1_000.0));
    let nodes = [peer(1, 1, 2_000.0), peer(2, 1, 1_000.0)];
    let plan = Planner { model: &model, nodes: &nodes, links: &links }.plan(&ask()).unwrap();
    // 1024 MiB less 50 of buffers hold nine layers of 104 MiB.
    let fast = plan.stages.iter().find(|stage| stage.node == node(2)).unwrap();
    assert_eq!((fast.layers.len(), fast.memory_bytes), (9, 9 * 104 * MIB + 50 * MIB), "{plan}");
}

#[test]
fn for_many_streams_layers_are_shared_so_that_all_are_equally_busy() {
    let (model, links) = (model(15), links(4, 1_000.0));
    let nodes = [peer(1, 8, 1_000.0), peer(2, 8, 2_000.0), peer(3, 8, 4_000.0)];
    let ask = Ask { streams: 8, objective: Objective::ManyStreams, context_tokens: 512, ..ask() };
    let plan = Planner { model: &model, nodes: &nodes, links: &links }.plan(&ask).unwrap();
    let mut shares = held(&plan);
    shares.sort();
    // Shares of 8.6, 4.3 and 2.1 layers would be even. 9 ms is the least for whole layers.
    assert_eq!(plan.bottleneck_us, 9_000.0, "{plan}");
    assert!(shares[0].1 == 9 && shares[1].1 <= 4 && shares[2].1 <= 2, "{plan}");
}

#[test]
fn a_link_that_is_slow_in_one_direction_decides_the_order() {
    let (model, mut links) = (model(16), links(3, 2_000.0));
    let nodes = [peer(1, 1, 1_000.0), peer(2, 1, 1_000.0)];
    let plan = |links: &Links| Planner { model: &model, nodes: &nodes, links }.plan(&ask()).unwrap();
    links.set(node(1), node(2), Link { one_way_us: 80_000.0, bytes_per_s: 125e6 });
    assert_eq!(order(&plan(&links)), [node(2), node(1)]);
    links.set_both(node(1), node(2), Link { one_way_us: 2_000.0, bytes_per_s: 125e6 });
    links.set(node(2), node(1), Link { one_way_us: 2_000.0, bytes_per_s: 0.0 });
    assert_eq!(order(&plan(&links)), [node(1), node(2)]);
}

#[test]
fn the_last_stage_has_room_for_the_head() {
    let links = links(3, 1_000.0);
    let model = ModelFacts { head_bytes: 500 * MIB, head_cost: 5.0, ..model(14) };
    let nodes = [peer(1, 1, 1_000.0), peer(2, 1, 1_000.0)];
    let planner = Planner { model: &model, nodes: &nodes, links: &links };
    assert!(matches!(planner.plan(&ask()), Err(NoRing::Short(_))));
    let model = ModelFacts { head_bytes: 400 * MIB, ..model.clone() };
    let plan = Planner { model: &model, ..planner }.plan(&ask()).unwrap();
    let last = plan.stages.last().unwrap();
    assert_eq!((last.layers, last.memory_bytes), (layers(9, 14), 50 * MIB + 5 * 104 * MIB + 400 * MIB), "{plan}");
    assert_eq!(last.compute_us, 10_000.0);
}

#[test]
fn what_equal_nodes_take_for_their_stages_makes_them_equal_also_the_one_that_has_the_head() {
    let (model, links) = (ModelFacts { head_cost: 4.0, ..model(12) }, links(4, 1_000.0));
    let measured = [(layers(0, 4), 400.0), (layers(4, 8), 400.0), (layers(8, 12), 800.0)];
    let us_per_layer = measured.map(|(range, stage_us)| stage_us / model.stage_cost(range));
    assert_eq!(us_per_layer, [100.0; 3]);
    let nodes = [1, 2, 3].map(|number| NodeFacts { layers_max: Some(4), ..peer(number, 8, us_per_layer[0]) });
    let plan = Planner { model: &model, nodes: &nodes, links: &links }.plan(&ask()).unwrap();
    let computing: Vec<(LayerRange, f64)> = plan.stages.iter().map(|stage| (stage.layers, stage.compute_us)).collect();
    assert_eq!(computing, measured);
    assert_eq!(model.layers_cost(layers(8, 12)), 4.0);
}

#[test]
fn stages_end_only_where_the_model_may_be_cut() {
    let links = links(4, 1_000.0);
    let model = ModelFacts { cuts: vec![4, 8, 12], ..model(16) };
    let nodes = [peer(1, 1, 1_000.0), peer(2, 1, 1_000.0), peer(3, 1, 1_000.0)];
    let plan = Planner { model: &model, nodes: &nodes, links: &links }.plan(&ask()).unwrap();
    assert_eq!(plan.stages.iter().map(|stage| stage.layers.len()).collect::<Vec<_>>(), [8, 8], "{plan}");
    let whole_only = ModelFacts { cuts: Vec::new(), ..model };
    let planner = Planner { model: &whole_only, nodes: &nodes, links: &links };
    let Err(NoRing::Short(shortage)) = planner.plan(&ask()) else { panic!("nothing fits the whole model") };
    assert_eq!(shortage.would_do, [Remedy::Memory { bytes: shortage.needed_bytes / 64 * 64 + 64 }], "{shortage}");
}

#[test]
fn first_and_last_layers_stay_with_the_driver_when_asked() {
    let (model, links) = (model(16), links(3, 1_000.0));
    let nodes = [peer(0, 1, 3_000.0), peer(1, 8, 1_000.0)];
    let planner = Planner { model: &model, nodes: &nodes, links: &links };
    let plan = planner.plan(&Ask { keep_ends: 2, ..ask() }).unwrap();
    assert_eq!(held(&plan), [(node(0), 2), (node(1), 12), (node(0), 2)], "{plan}");
    assert_eq!(plan.token_us, 4.0 * 3_000.0 + 12_000.0 + 2.0 * 1_000.0 + 2.0 * plan.edges[1].transfer_us);
    assert_eq!(plan.edges.iter().map(|edge| edge.codec.is_some()).collect::<Vec<_>>(), [false, true, true, false]);
    assert!(
        matches!(planner.plan(&Ask { keep_ends: 5, ..ask() }), Err(NoRing::Short(short)) if short.would_do.contains(&Remedy::EndsAnywhere))
    );
    let roomy = [peer(0, 8, 3_000.0), peer(1, 8, 2_990.0)];
    let plan = Planner { nodes: &roomy, ..planner }.plan(&Ask { keep_ends: 2, ..ask() }).unwrap();
    assert_eq!(held(&plan), [(node(0), 16)], "all layers on the driver are its ends, too");
    let alone = Planner { nodes: &nodes[1..], ..planner }.plan(&Ask { keep_ends: 2, ..ask() }).unwrap_err();
    assert!(alone.to_string().contains("the driver, which contributes no memory"), "{alone}");
}

#[test]
fn pinned_nodes_are_used_and_excluded_ones_are_not() {
    let (model, links) = (model(16), links(4, 1_000.0));
    let nodes = [peer(1, 8, 1_000.0), peer(2, 8, 2_000.0), peer(3, 8, 3_000.0)];
    let planner = Planner { model: &model, nodes: &nodes, links: &links };
    let plan = |pins: Vec<Pin>, excluded: Vec<NodeId>| planner.plan(&Ask { pins, excluded, ..ask() });
    assert_eq!(
        held(&plan(vec![Pin::Used(node(3))], vec![]).unwrap()).iter().find(|it| it.0 == node(3)),
        Some(&(node(3), 1))
    );
    let exactly = plan(vec![Pin::Exactly(node(2), layers(4, 10))], vec![]).unwrap();
    assert_eq!(exactly.placements()[1], Placement { node: node(2), layers: layers(4, 10) }, "{exactly}");
    let without = plan(vec![], vec![node(1)]).unwrap();
    assert_eq!(held(&without), [(node(2), 16)]);
    assert_eq!(without.rejected[1], Rejected::Excluded { node: node(1) });
    let both = plan(vec![Pin::Used(node(1))], vec![node(1)]).unwrap_err();
    assert!(both.to_string().contains("is pinned and is excluded"), "{both}");
}

#[test]
fn a_lossy_codec_is_used_where_it_is_allowed_and_pays() {
    let (model, mut links) = (model(16), links(4, 1_000.0));
    let nodes = [peer(1, 1, 1_000.0), peer(2, 1, 1_000.0), peer(3, 1, 1_000.0)];
    for (from, to) in [(1, 2), (2, 1), (1, 3), (3, 1), (2, 3), (3, 2)] {
        // 10 Mbit/s: 8 KiB take 6.7 ms, 2 KiB and a bit 1.8 ms.
        links.set(node(from), node(to), Link { one_way_us: 1_000.0, bytes_per_s: 1.25e6 });
    }
    let planner = Planner { model: &model, nodes: &nodes, links: &links };
    let codec = |lossy: Vec<Codec>| planner.plan(&Ask { lossy, ..ask() }).unwrap().edges[1].codec.unwrap();
    assert_eq!(codec(vec![]), Codec::F32);
    assert_eq!(codec(vec![Codec::F16]), Codec::F16);
    assert_eq!(codec(vec![Codec::F16, Codec::Q8]), Codec::Q8);
    let fast = self::links(4, 1_000.0);
    let planner = Planner { links: &fast, ..planner };
    assert_eq!(planner.plan(&Ask { lossy: vec![Codec::Q8], ..ask() }).unwrap().edges[1].codec, Some(Codec::F32));
}

#[test]
fn a_node_that_holds_layers_is_preferred_to_a_slightly_faster_one_that_must_load_them() {
    let (model, links) = (model(16), links(3, 1_000.0));
    let fetches = |number, us| NodeFacts::new(node(number), 8 * GIB, us);
    let mut nodes = [fetches(1, 1_000.0), fetches(2, 1_010.0)];
    nodes[1].loaded = vec![layers(0, 16)];
    let plan = |nodes: &[NodeFacts]| Planner { model: &model, nodes, links: &links }.plan(&ask()).unwrap();
    assert_eq!((held(&plan(&nodes)), plan(&nodes).load_us()), (vec![(node(2), 16)], 0.0));
    nodes[1].decode_us_per_layer = 1_200.0;
    assert_eq!(held(&plan(&nodes)), [(node(1), 16)]);
}

/// Three nodes with six layers each, and two spare ones.
fn ring_with_spares() -> (ModelFacts, Links, [NodeFacts; 5], Ask) {
    let nodes =
        [peer(1, 1, 1_000.0), peer(2, 1, 1_000.0), peer(3, 1, 1_000.0), peer(4, 1, 3_000.0), peer(5, 1, 2_000.0)]
            .map(|node| NodeFacts { layers_max: Some(6), ..node });
    let stage = |i: u32| Placement { node: node(i + 1), layers: layers(6 * i, 6 * i + 6) };
    let ask = Ask { previous: (0..3).map(stage).collect(), ..ask() };
    (model(18), links(6, 1_000.0), nodes, ask)
}

#[test]
fn after_a_death_only_the_lost_range_moves() {
    let (model, links, nodes, ask) = ring_with_spares();
    let plan = Planner { model: &model, nodes: &nodes, links: &links }.mend(&ask, &[node(2)]).unwrap();
    assert_eq!(plan.origin, Origin::LostMoved);
    let expected = [(1, layers(0, 6)), (5, layers(6, 12)), (3, layers(12, 18))];
    assert_eq!(plan.placements(), expected.map(|(n, layers)| Placement { node: node(n), layers }), "{plan}");
    assert!(plan.stages.iter().all(|stage| (stage.load_us > 0.0) == (stage.node == node(5))), "{plan}");
}

#[test]
fn after_a_death_a_node_that_holds_the_lost_range_goes_before_a_faster_one() {
    let (model, links, mut nodes, ask) = ring_with_spares();
    nodes[3].loaded = vec![layers(5, 13)];
    let plan = Planner { model: &model, nodes: &nodes, links: &links }.mend(&ask, &[node(2)]).unwrap();
    assert_eq!((plan.origin, order(&plan)), (Origin::Holder, vec![node(1), node(4), node(3)]), "{plan}");
    assert_eq!(plan.load_us(), 0.0);
}

#[test]
fn after_a_death_neighbours_take_the_lost_range_when_they_have_room() {
    let (model, links, mut nodes, ask) = ring_with_spares();
    nodes[0].layers_max = Some(9);
    nodes[2].layers_max = Some(9);
    let plan = Planner { model: &model, nodes: &nodes[..3], links: &links }.mend(&ask, &[node(2)]).unwrap();
    assert_eq!(held(&plan), [(node(1), 9), (node(3), 9)], "{plan}");
    let two_dead = Planner { model: &model, nodes: &nodes, links: &links }.mend(&ask, &[node(2), node(3)]).unwrap();
    assert_eq!(two_dead.placements()[0].layers.first, 0);
    assert!(two_dead.stages[0].node == node(1) && two_dead.stages[0].layers.len() >= 6, "{two_dead}");
}

#[test]
fn when_the_lost_range_fits_nowhere_alone_all_is_planned_anew() {
    let (model, links, mut nodes, ask) = ring_with_spares();
    // Only the spare node has room, for nine layers, and the last stage can hold nine: but not its own and three before.
    let ask = Ask { pins: vec![Pin::Exactly(node(3), layers(9, 18))], ..ask };
    nodes[2].layers_max = Some(9);
    nodes[3].layers_max = Some(9);
    let plan = Planner { model: &model, nodes: &nodes[..4], links: &links }.mend(&ask, &[node(2)]).unwrap();
    assert_eq!((plan.origin, plan.stages.last().unwrap().layers), (Origin::Anew, layers(9, 18)), "{plan}");
}

#[test]
fn who_counts_least_in_a_lost_stage_is_whom_mending_finds() {
    let (model, links, mut nodes, ask) = ring_with_spares();
    let neighbours = (Some(node(1)), Some(node(3)));
    let counts = |nodes: &[NodeFacts], number, neighbours, ask: &Ask| {
        let stage = Placement { node: node(number), layers: layers(6, 12) };
        Planner { model: &model, nodes, links: &links }.stage_us(&stage, neighbours, ask)
    };
    for us_per_layer in [1_500.0, 2_500.0, 4_000.0] {
        nodes[4].decode_us_per_layer = us_per_layer;
        let [four, five] = [4, 5].map(|number| counts(&nodes, number, neighbours, &ask).unwrap());
        let plan = Planner { model: &model, nodes: &nodes, links: &links }.mend(&ask, &[node(2)]).unwrap();
        assert_eq!(plan.stages[1].node, if four < five { node(4) } else { node(5) }, "{plan}");
        assert_eq!(four < five, us_per_layer > 3_000.0);
    }
    let (alone, between) = (counts(&nodes, 5, (None, None), &ask), counts(&nodes, 5, neighbours, &ask));
    let ways_us = between.unwrap() - alone.unwrap();
    assert!((2_000.0..2_200.0).contains(&ways_us), "{ways_us}");
    let near = Ask { rtt_us_max: Some(1_999.0), ..ask.clone() };
    assert_eq!((counts(&nodes, 5, neighbours, &near), counts(&nodes, 5, (None, None), &near)), (None, alone));
    nodes[4].layers_max = Some(5);
    nodes[3].memory_bytes = 600 * MIB;
    assert_eq!([4, 5].map(|number| counts(&nodes, number, neighbours, &ask)), [None, None]);
}

#[test]
fn a_ring_stays_as_it_is_until_another_is_better_by_the_margin() {
    let (model, links) = (model(16), links(4, 1_000.0));
    let mut nodes = [peer(1, 8, 1_000.0), peer(2, 8, 1_100.0)];
    let previous = vec![Placement { node: node(2), layers: layers(0, 16) }];
    let ask = Ask { previous: previous.clone(), ..ask() };
    let plan = |nodes: &[NodeFacts]| Planner { model: &model, nodes, links: &links }.plan(&ask).unwrap();
    let kept = plan(&nodes);
    assert_eq!((kept.origin, kept.placements()), (Origin::Kept, previous));
    assert!(matches!(kept.rejected[0], Rejected::Moving { slower_us, .. } if slower_us < 0.0), "{kept}");
    nodes[1].decode_us_per_layer = 1_500.0;
    let moved = plan(&nodes);
    assert_eq!((moved.origin, order(&moved)), (Origin::Best, vec![node(1)]));
    assert!(matches!(moved.rejected[0], Rejected::Previous { slower_us, .. } if slower_us > 7_000.0), "{moved}");
}

/// A ring of three nodes, and a fourth node that has room for `count` layers.
fn ring_and_newcomer(count: u32, us_per_layer: f64) -> ([NodeFacts; 4], Ask) {
    let used = |number: u32| {
        let held = layers(6 * number - 6, 6 * number);
        NodeFacts { only: Some(held), loaded: vec![held], ..peer(number, 8, 1_000.0) }
    };
    let nodes = [used(1), used(2), used(3), NodeFacts { layers_max: Some(count), ..peer(4, 8, us_per_layer) }];
    let previous = nodes[..3].iter().map(|node| Placement { node: node.node, layers: node.loaded[0] }).collect();
    (nodes, Ask { previous, ..ask() })
}

fn improved(nodes: &[NodeFacts], ask: &Ask) -> Option<Plan> {
    Planner { model: &model(18), nodes, links: &links(5, 5_000.0) }.improve(ask)
}

#[test]
fn a_newcomer_takes_over_ranges_as_they_are() {
    let shares = |plan: &Plan| {
        let mut shares = held(plan);
        shares.sort_by_key(|&(node, count)| (count, node));
        shares
    };
    // It could hold eight layers; but whoever gave up two of its six would have to hold four others at the same time.
    let (nodes, ask) = ring_and_newcomer(8, 200.0);
    let plan = improved(&nodes, &ask).unwrap();
    assert!(plan.stages.len() == 3 && shares(&plan).contains(&(node(4), 6)), "{plan}");
    // Twelve are two ranges: one hop less.
    let (mut nodes, ask) = ring_and_newcomer(12, 1_000.0);
    let plan = improved(&nodes, &ask).unwrap();
    assert!(plan.stages.len() == 2 && shares(&plan)[1] == (node(4), 12), "{plan}");
    let loaded_only = Ask { loaded_only: true, ..ask };
    assert_eq!(improved(&nodes, &loaded_only), None);
    nodes[3].loaded = vec![layers(6, 18)];
    nodes[3].only = Some(layers(6, 18));
    let plan = improved(&nodes, &loaded_only).unwrap();
    assert_eq!((held(&plan), plan.load_us()), (vec![(node(1), 6), (node(4), 12)], 0.0), "{plan}");
    // Cuts that the model does not have.
    nodes[3].only = Some(layers(7, 30));
    assert_eq!(improved(&nodes, &loaded_only), None);
}

#[test]
fn speeds_that_drift_by_a_tenth_move_nothing() {
    for (drift, of_newcomer) in [(0.9, 1.1), (1.0, 0.9), (1.1, 0.9)] {
        let (mut nodes, ask) = ring_and_newcomer(6, 1_000.0 * of_newcomer);
        nodes[1].decode_us_per_layer *= drift;
        assert_eq!(improved(&nodes, &ask), None, "{drift} {of_newcomer}");
    }
}

#[test]
fn without_a_ring_the_error_says_what_would_do() {
    let (model, links) = (model(16), links(4, 1_000.0));
    let nodes = [peer(1, 1, 1_000.0), peer(2, 1, 1_000.0)];
    let planner = Planner { model: &model, nodes: &nodes, links: &links };
    let why = |planner: Planner<'_>, ask: Ask| planner.plan(&ask).unwrap_err().to_string();
    let long = Ask { context_tokens: 65_536, ..ask() };
    assert_eq!(
        why(planner, long.clone()),
        "the layers need 2.6 GiB with a context of 65536; the 2 nodes have 2.0 GiB: another node with 1.0 GiB, or a context \
         of 22272 would do"
    );
    assert!(planner.plan(&Ask { context_tokens: 22_272, ..ask() }).is_ok());
    assert!(planner.plan(&Ask { context_tokens: 22_528, ..ask() }).is_err());
    assert_eq!(
        why(planner, Ask { streams: 16, ..ask() }),
        "the layers need 2.6 GiB with a context of 4096 for each of 16 streams; the 2 nodes have 2.0 GiB: another node with \
         1.0 GiB, a context of 1280, or 5 streams at once would do"
    );
    assert_eq!(
        why(planner, Ask { rtt_us_max: Some(500.0), ..ask() }),
        "the layers need 1.7 GiB with a context of 4096; the 2 nodes have 2.0 GiB, but no ring of them fits what was asked for: \
         another node with 1.7 GiB, or no limit on round trips would do"
    );
    assert_eq!(
        why(planner, Ask { excluded: vec![node(1)], ..ask() }),
        format!(
            "the layers need 1.7 GiB with a context of 4096; the one node has 1.0 GiB: another node with 803.4 MiB, or using {} \
             as well would do",
            node(1).short()
        )
    );
}

#[test]
fn the_facts_of_a_model_come_from_its_manifest() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/demo/murmur-demo-q8_0.gguf");
    let manifest = Manifest::of(file, |_, _| {}).unwrap();
    let facts = ModelFacts::of(&manifest, 10 * MIB, 1024);
    assert_eq!(facts.layers.len(), manifest.layers.len());
    assert_eq!(facts.layers.iter().map(|layer| layer.weight_bytes).sum::<u64>(), manifest.layer_bytes(facts.whole()));
    let cost: f64 = facts.layers.iter().map(|layer| layer.cost).sum();
    assert!((cost - facts.layers.len() as f64).abs() < 1e-9, "the average layer costs 1");
    assert_eq!(facts.head_bytes, manifest.head.unwrap().bytes);
    assert_eq!(facts.stage_bytes, 10 * MIB + manifest.shared.map_or(0, |shared| shared.bytes));
    assert_eq!((facts.cuts, facts.width), (manifest.allowed_cuts, manifest.facts.unwrap().embedding_length));
}

#[test]
fn a_plan_explains_itself() {
    let (model, links) = (model(16), links(5, 4_000.0));
    let tiny = NodeFacts::new(node(4), 100 * MIB, 500.0);
    let nodes = [peer(1, 1, 1_000.0), peer(2, 1, 1_500.0), peer(3, 2, 2_500.0), tiny];
    let plan = Planner { model: &model, nodes: &nodes, links: &links }.plan(&ask()).unwrap();
    let expected = "\
2 stages: 31.6 ms a token, 31.7 tokens/s, first token of a prompt of 512 after 797 ms
node        layers    compute ms  fixed ms  memory                 load s
0000000207  0..7           10.50      0.00  778.0 MiB of 1.0 GiB      1.5
0000000107  7..16           9.00      0.00  986.0 MiB of 1.0 GiB      1.9
from        to          latency ms  transfer ms  carries
0000000007  0000000207        4.00         0.00  tokens
0000000207  0000000107        4.00         0.07  f32
0000000107  0000000007        4.00         0.00  tokens
whole model on 0000000307: 48.0 ms a token, 16.4 ms slower
0000000307 left out: with it 36.7 ms a token, 5.1 ms slower
0000000407 left out: the smallest piece needs 154.0 MiB, there are 100.0 MiB
";
    assert_eq!(plan.to_string(), expected);
}

/// Nodes that each hold a seventh of a model of 128 layers, none so slow or so far that it can be left out early.
fn equal_nodes(count: u32) -> (Links, Vec<NodeFacts>) {
    let mut links = Links::new();
    for (a, b) in (0..=count).flat_map(|a| (0..=count).map(move |b| (a, b))).filter(|(a, b)| a != b) {
        let one_way_us = f64::from(500 + (a * 7 + b * 13) % 11 * 40);
        links.set(node(a), node(b), Link { one_way_us, bytes_per_s: 125e6 });
    }
    (links, (1..=count).map(|i| peer(i, 2, 1_000.0 + f64::from(i * 37 % 10) * 20.0)).collect())
}

/// Plans for both objectives; prints how long it takes.
fn both_objectives(count: u32) -> [Plan; 2] {
    let (model, (links, nodes)) = (model(128), equal_nodes(count));
    [Objective::OneStream, Objective::ManyStreams].map(|objective| {
        let ask = Ask { streams: 8, objective, context_tokens: 512, ..ask() };
        let started = std::time::Instant::now();
        let plan = Planner { model: &model, nodes: &nodes, links: &links }.plan(&ask).unwrap();
        println!("{count} nodes, {objective:?}: {:.0} ms\n{plan}", started.elapsed().as_secs_f64() * 1e3);
        plan
    })
}

#[test]
fn twelve_nodes_and_128_layers_are_planned_exactly() {
    let [one, many] = both_objectives(12);
    assert!(one.token_us < many.token_us && one.tokens_per_s() < many.tokens_per_s());
}

#[test]
fn sixty_four_nodes_make_a_ring_that_is_no_slower_than_that_of_the_first_twelve() {
    let ([one, many], [one_of_few, many_of_few]) = (both_objectives(64), both_objectives(12));
    assert!(one.token_us <= one_of_few.token_us && many.tokens_per_s() >= many_of_few.tokens_per_s());
}
