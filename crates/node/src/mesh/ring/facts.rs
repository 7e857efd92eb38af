//! What the planner is told of others: the ways between them, and how fast they are before they have computed anything.
//!
//! A node has measured its own ways. Of those between two others it believes what both have told in their records, the longer of
//! the two; what one has told alone; and at least what follows from its own ways to them. A way that nobody has measured is taken
//! to be the one through this node.
//!
//! Machines were measured when their nodes started. That compares them with each other: as soon as one has computed layers of the
//! model, the others are taken to need as much longer or less long as their machines are slower or faster.

use murmur_core::planner::{Link, Links, ModelFacts, NODES_MAX, Plan, facts::BYTES_PER_S_UNKNOWN};
use murmur_engine::Speed;
use murmur_gguf::LayerRange;
use murmur_net::PeerView;
use murmur_protocol::mesh::{MachineSpeed, MeasuredLink, ModelDigest, NodeId};

use super::offers::Offer;
use crate::{Node, mesh::MeshNode};

/// Two nodes are no nearer to each other than this part of the difference between the ways to them from here. In theory it is all
/// of it; but packets do not go the shortest way.
const TRIANGLE_SHARE: f64 = 0.5;
/// The engine's kernels multiply so many times as fast as the plain loop that machines are measured with.
const KERNEL_GAIN: f64 = 4.0;
/// A machine that was not measured is taken to read memory at this rate, in bytes per second.
const BYTES_PER_S_UNMEASURED: f64 = 10e9;
/// What a step of a stage takes besides computing and the way there, us: frames go from the node into its engine process and out again.
/// Measured on one machine, computing left out (docs/benchmarks.md, a hop in a ring of four).
pub(super) const STEP_US: f64 = 300.0;

/// What is known of the ways to and from a node that offers layers.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Ways {
    /// Bytes per second from here to it; 0: not measured.
    pub(super) bytes_per_s: u64,
    /// What it has measured itself.
    pub(super) told: Vec<MeasuredLink>,
    /// It has come a moment ago.
    pub(super) is_new: bool,
    /// How fast its machine is.
    pub(super) machine: Option<MachineSpeed>,
    /// Where it is, as its user calls the place; empty: not said.
    pub(super) region: String,
    /// It has a part of the model's file only: what it is to load may have to come from others first.
    pub(super) lacks_part: bool,
}

impl Ways {
    /// Those of this node, for a model.
    pub(super) fn own(node: &Node, model: &ModelDigest) -> Ways {
        let lacks_part = node.library.find(model).is_some_and(|shelf| shelf.held_bytes() < shelf.content.bytes());
        Ways { machine: node.machine(), region: node.options().region.clone(), lacks_part, ..Ways::default() }
    }
}

/// Round trip to a node from here in microseconds, [`f64::MAX`] if it is not known, and what else is known of it, for a model.
pub(super) fn ways(mesh: &MeshNode, peer: &PeerView, model: &ModelDigest) -> (f64, Ways) {
    let record = peer.record();
    // What others are told changes less than what QUIC says at the moment.
    let told = mesh.links().to(&record.node);
    let now_us = || peer.rtt_ms.map_or(f64::MAX, |ms| 1000.0 * ms);
    let ways = Ways {
        bytes_per_s: told.map_or(0, |(_, bytes_per_s)| bytes_per_s),
        told: record.links.clone(),
        is_new: mesh.links().is_new(&record.node),
        machine: record.machine,
        region: record.region.clone(),
        // Who hands out no files says nothing of those that it has.
        lacks_part: record.contents.iter().any(|held| held.digest == *model && held.held_bytes < held.file_bytes),
    };
    (told.map_or_else(now_us, |(rtt_us, _)| rtt_us), ways)
}

/// What a machine takes for a byte of weights.
#[derive(Debug, Clone, Copy)]
pub(super) struct Estimated {
    /// For a row that is alone.
    pub(super) decode_us_per_byte: f64,
    /// For each row of a chunk of a prompt.
    pub(super) prefill_us_per_byte: f64,
}

/// What a machine will take before it has computed anything. Most weights have about one byte, and are multiplied once for each row.
pub(super) fn estimated(machine: Option<MachineSpeed>) -> Estimated {
    match machine {
        Some(MachineSpeed { read_bytes_per_s: read @ 1.., multiply_adds_per_s: multiply @ 1.. }) => {
            let (read_us, multiply_us) = (1e6 / read as f64, 1e6 / (KERNEL_GAIN * multiply as f64));
            Estimated { decode_us_per_byte: read_us.max(multiply_us), prefill_us_per_byte: multiply_us }
        }
        _ => Estimated {
            decode_us_per_byte: 1e6 / BYTES_PER_S_UNMEASURED,
            prefill_us_per_byte: 1e5 / BYTES_PER_S_UNMEASURED,
        },
    }
}

/// What a machine will take for a token of a model in a file of so many bytes, if it has all of it: us, decoding alone. All weights count as read for
/// each token, so one with experts takes less.
pub(crate) fn token_us(machine: Option<MachineSpeed>, file_bytes: u64) -> f64 {
    file_bytes as f64 * estimated(machine).decode_us_per_byte
}

/// What a row takes in a layer of average cost, (decoding, prompt) in microseconds, as a stage's speed says; 0: not measured. With the head
/// the last stage computes as much more as that is worth; of a prompt only the last row goes there.
pub(crate) fn per_layer(speed: Speed, model: &ModelFacts, stage: LayerRange) -> (u32, u32) {
    let us = |stage_us: Option<f64>, cost: f64| stage_us.map_or(0, |us| (us / cost).max(1.0) as u32);
    (us(speed.decode_us, model.stage_cost(stage)), us(speed.prefill_us, model.layers_cost(stage)))
}

/// What a node takes for a layer that has not computed any, (decoding, prompt) in microseconds, from what others take that have:
/// 0 if there are none.
pub(super) fn presumed(machine: Option<MachineSpeed>, known: &[(Option<MachineSpeed>, (u32, u32))]) -> (u32, u32) {
    let mean = |us: fn(&(u32, u32)) -> u32, per_byte: fn(Estimated) -> f64| {
        let slower = |other: Option<MachineSpeed>| match machine.and(other) {
            Some(_) => per_byte(estimated(machine)) / per_byte(estimated(other)),
            None => 1.0,
        };
        let known = known.iter().filter(|(_, speed)| us(speed) > 0);
        let (sum, count) = known
            .fold((0.0, 0u32), |(sum, count), (other, speed)| (sum + f64::from(us(speed)) * slower(*other), count + 1));
        if count > 0 { (sum / f64::from(count)).max(1.0) as u32 } else { 0 }
    };
    (mean(|speed| speed.0, |at| at.decode_us_per_byte), mean(|speed| speed.1, |at| at.prefill_us_per_byte))
}

impl Offer {
    fn told_of(&self, other: NodeId) -> Option<&MeasuredLink> {
        self.ways.told.iter().find(|link| link.is_to(&other))
    }

    /// Round trip from here; `None`: not known.
    fn rtt_us_from(&self, own: NodeId) -> Option<f64> {
        let told = || self.told_of(own).map(|link| f64::from(link.rtt_us));
        if self.rtt_us < f64::MAX { Some(self.rtt_us) } else { told() }
    }
}

/// The round trip between two nodes as they have told it.
fn told_us(a: &Offer, b: &Offer) -> Option<f64> {
    let told = a.told_of(b.node).into_iter().chain(b.told_of(a.node));
    told.map(|link| f64::from(link.rtt_us)).reduce(f64::max)
}

/// The round trip between two nodes that are not this one; `None`: not even a guess.
fn between_us(own: NodeId, a: &Offer, b: &Offer) -> Option<f64> {
    let here = a.rtt_us_from(own).zip(b.rtt_us_from(own));
    match (told_us(a, b), here) {
        (Some(told), Some((a, b))) => Some(told.max(TRIANGLE_SHARE * (a - b).abs())),
        (told, here) => told.or(here.map(|(a, b)| a + b)),
    }
}

fn link(rtt_us: f64, bytes_per_s: u64) -> Link {
    let bytes_per_s = if bytes_per_s > 0 { bytes_per_s as f64 } else { BYTES_PER_S_UNKNOWN };
    Link { one_way_us: rtt_us / 2.0, bytes_per_s }
}

/// The ways between this node and those that offer layers, and between these.
pub(super) fn links(own: NodeId, offers: &[Offer]) -> Links {
    let mut links = Links::new();
    let mut others: Vec<&Offer> = offers.iter().filter(|offer| offer.node != own).collect();
    let rate = |from: &Offer, to: NodeId| from.told_of(to).map_or(0, |link| link.bytes_per_s);
    for other in &others {
        if let Some(rtt_us) = other.rtt_us_from(own) {
            links.set(own, other.node, link(rtt_us, other.ways.bytes_per_s));
            links.set(other.node, own, link(rtt_us, rate(other, own)));
        }
    }
    // More than the planner looks at would only take time.
    others.sort_by(|a, b| a.rtt_us.total_cmp(&b.rtt_us));
    others.truncate(NODES_MAX);
    for (at, a) in others.iter().enumerate() {
        for b in &others[at + 1..] {
            if let Some(rtt_us) = between_us(own, a, b) {
                links.set(a.node, b.node, link(rtt_us, rate(a, b.node)));
                links.set(b.node, a.node, link(rtt_us, rate(b, a.node)));
            }
        }
    }
    links
}

/// Those that a ring may be made of: without those that came a moment ago and are not measured yet.
pub(super) fn measured(own: NodeId, offers: &[Offer]) -> Vec<Offer> {
    let is_known = |a: &Offer, b: &Offer| match own {
        own if own == a.node => b.rtt_us_from(own).is_some(),
        own if own == b.node => a.rtt_us_from(own).is_some(),
        _ => told_us(a, b).is_some(),
    };
    let is_measured = |a: &&Offer| !a.ways.is_new || offers.iter().all(|b| a.node == b.node || is_known(a, b));
    offers.iter().filter(is_measured).cloned().collect()
}

/// What is to be said of ways in a plan that are guessed.
pub(super) fn guessed(own: NodeId, offers: &[Offer], plan: &Plan) -> Vec<String> {
    let offer = |node: NodeId| offers.iter().find(|offer| offer.node == node && node != own);
    let hops = plan.edges.iter().filter_map(|edge| offer(edge.from).zip(offer(edge.to)));
    let unknown = hops.filter(|(from, to)| from.node != to.node && told_us(from, to).is_none());
    let remark = |(from, to): (&Offer, &Offer)| {
        let (from, to) = (from.node.short(), to.node.short());
        format!("Nobody has measured the way from {from} to {to} yet: it is taken to be the one through this node.")
    };
    unknown.map(remark).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use murmur_core::planner::{Ask, LayerFacts, NodeFacts, Planner, facts::ONE_WAY_US_UNKNOWN};
    use murmur_protocol::mesh::{ModelState, ServedStage};

    use super::*;

    const OWN: u8 = 0;

    fn id(number: u8) -> NodeId {
        NodeId::from_bytes([number; 32])
    }

    /// One that is so far away and tells so much.
    fn offer(number: u8, rtt_us: f64, told: &[(u8, u32)]) -> Offer {
        let stage = ServedStage {
            digest: ModelDigest::from_bytes([0; 32]),
            name: "model".to_owned(),
            layers: 12,
            first: 0,
            end: 0,
            state: ModelState::Available,
            context_tokens: 512,
            parallel: 1,
            exact: false,
            build: String::new(),
            memory_bytes: 3 << 20,
            decode_us_per_layer: 100,
            prefill_us_per_layer: 10,
            layers_max: 3,
        };
        let told = told.iter().map(|&(to, rtt_us)| MeasuredLink::to(&id(to), rtt_us, 0)).collect();
        Offer { node: id(number), stage, rtt_us, ways: Ways { told, ..Ways::default() } }
    }

    fn between(a: Offer, b: Offer) -> f64 {
        let (from, to) = (a.node, b.node);
        let links = links(id(OWN), &[offer(OWN, 0.0, &[]), a, b]);
        assert_eq!(links.get(from, to), links.get(to, from));
        2.0 * links.get(from, to).one_way_us
    }

    #[test]
    fn of_what_two_nodes_tell_the_longer_counts_and_what_one_tells_alone_counts_too() {
        assert_eq!(between(offer(1, 9e3, &[(2, 4_000)]), offer(2, 9e3, &[(1, 7_000)])), 7_000.0);
        assert_eq!(between(offer(1, 9e3, &[(3, 1)]), offer(2, 9e3, &[(1, 7_000)])), 7_000.0);
        assert_eq!(between(offer(1, f64::MAX, &[(2, 4_000)]), offer(2, 9e3, &[])), 4_000.0);
    }

    #[test]
    fn nobody_is_nearer_to_another_than_the_ways_from_here_allow() {
        let far = offer(2, 100e3, &[(1, 50)]);
        assert_eq!(between(offer(1, 10e3, &[(2, 50)]), far), TRIANGLE_SHARE * 90e3);
    }

    #[test]
    fn a_way_that_nobody_has_measured_is_the_one_through_this_node() {
        assert_eq!(between(offer(1, 1e3, &[]), offer(2, 2e3, &[])), 3e3);
        assert_eq!(between(offer(1, 1e3, &[]), offer(2, f64::MAX, &[])), 2.0 * ONE_WAY_US_UNKNOWN);
        // That one has told of its way here is as good as having measured it.
        assert_eq!(between(offer(1, 1e3, &[]), offer(2, f64::MAX, &[(OWN, 4_000)])), 5e3);
    }

    #[test]
    fn a_rate_is_that_of_its_direction() {
        let mut from = offer(1, 1e3, &[]);
        from.ways = Ways { bytes_per_s: 7, told: vec![MeasuredLink::to(&id(2), 800, 9)], ..Ways::default() };
        let links = links(id(OWN), &[from, offer(2, 1e3, &[])]);
        let rates = [(OWN, 1), (1, 2), (2, 1), (1, OWN)].map(|(from, to)| links.get(id(from), id(to)).bytes_per_s);
        assert_eq!(rates, [7.0, 9.0, BYTES_PER_S_UNKNOWN, BYTES_PER_S_UNKNOWN]);
    }

    #[test]
    fn who_has_just_come_is_left_out_until_its_ways_are_told() {
        let new = |told: &[(u8, u32)]| {
            let mut new = offer(3, 1e3, told);
            new.ways.is_new = true;
            new
        };
        let measured = |offers: &[Offer]| measured(id(OWN), offers).iter().map(|offer| offer.node).collect::<Vec<_>>();
        let [own, one, two] = [offer(OWN, 0.0, &[]), offer(1, 1e3, &[]), offer(2, 1e3, &[(3, 900)])];
        let all = [own.clone(), one.clone(), two.clone(), new(&[])];
        assert_eq!(measured(&all), [id(OWN), id(1), id(2)]);
        let all = [own.clone(), one, two.clone(), new(&[(1, 900)])];
        assert_eq!(measured(&all).len(), 4);
        // Others may be there for long, and not measured for some reason.
        assert_eq!(measured(&[own, offer(1, 1e3, &[]), two]).len(), 3);
    }

    /// A model of twelve layers: as many as four such nodes hold.
    pub(in super::super) fn model() -> ModelFacts {
        let layer = LayerFacts { weight_bytes: 1 << 20, kv_bytes_per_token: 0, cost: 1.0 };
        ModelFacts {
            layers: vec![layer; 12],
            cuts: (1..12).collect(),
            head_bytes: 0,
            head_cost: 0.0,
            width: 256,
            stage_bytes: 0,
            stage_bytes_per_token: 0,
            kept_bytes: 0,
        }
    }

    fn plan(offers: &[Offer], facts: impl Fn(&Offer) -> NodeFacts) -> Plan {
        let (model, nodes) = (model(), offers.iter().map(facts).collect::<Vec<_>>());
        let links = links(id(OWN), offers);
        Planner { model: &model, nodes: &nodes, links: &links }.plan(&Ask::new(id(OWN), 512)).unwrap()
    }

    fn machine(read_bytes_per_s: u64) -> Option<MachineSpeed> {
        Some(MachineSpeed { read_bytes_per_s, multiply_adds_per_s: read_bytes_per_s })
    }

    #[test]
    fn before_anything_was_computed_a_slow_machine_gets_fewer_layers_than_a_fast_one() {
        let machines = [machine(20_000_000_000), machine(5_000_000_000), None];
        let us = machines.map(|machine| estimated(machine).decode_us_per_byte * f64::from(1 << 20));
        let offers = [offer(OWN, 0.0, &[]), offer(1, 300.0, &[])];
        let facts = |offer: &Offer| {
            let us = if offer.node == id(OWN) { us[1] } else { us[0] };
            NodeFacts::new(offer.node, 8 << 20, us)
        };
        let found = plan(&offers, facts);
        let layers = |number| found.stages.iter().find(|stage| stage.node == id(number)).unwrap().layers;
        assert_eq!((layers(OWN).end - layers(OWN).first, layers(1).end - layers(1).first), (4, 8));
        assert!(us[0] < us[2] && us[2] < us[1]);
    }

    #[test]
    fn the_head_makes_no_node_look_slow_that_has_the_last_layers() {
        let model = ModelFacts { head_cost: 4.0, ..model() };
        let stages = [(0, 4, 400.0), (4, 8, 400.0), (8, 12, 800.0)];
        let told = stages.map(|(first, end, us)| {
            let speed = Speed { decode_us: Some(us), prefill_us: Some(40.0) };
            per_layer(speed, &model, LayerRange::new(first, end))
        });
        assert_eq!(told, [(100, 10); 3]);
        assert_eq!(per_layer(Speed::default(), &model, LayerRange::new(0, 4)), (0, 0));
        // A layer that costs as much as three others.
        let mut uneven = model.clone();
        uneven.layers[3].cost = 3.0;
        let speed = Speed { decode_us: Some(600.0), prefill_us: None };
        assert_eq!(per_layer(speed, &uneven, LayerRange::new(0, 4)), (100, 0));
    }

    #[test]
    fn a_machine_that_has_computed_says_what_others_will_take() {
        let (slow, fast) = (machine(5_000_000_000), machine(20_000_000_000));
        assert_eq!(presumed(fast, &[]), (0, 0));
        assert_eq!(presumed(fast, &[(slow, (400, 80))]), (100, 20));
        assert_eq!(presumed(fast, &[(slow, (400, 0)), (fast, (200, 10))]), (150, 10));
        assert_eq!(presumed(None, &[(slow, (400, 80)), (None, (200, 40))]), (300, 60));
        assert_eq!(estimated(machine(0)).decode_us_per_byte, estimated(None).decode_us_per_byte);
    }

    #[test]
    fn a_ring_does_not_go_where_the_way_between_two_others_is_long_and_says_what_is_guessed() {
        // All are near to this node, and two of them far from each other.
        let [near, far] = [800, 120_000];
        let mut offers = [
            offer(OWN, 0.0, &[]),
            offer(1, 1e3, &[(2, near), (3, far)]),
            offer(2, 1e3, &[(1, near), (3, near)]),
            offer(3, 1e3, &[(1, far), (2, near)]),
        ];
        let facts = |offer: &Offer| NodeFacts {
            layers_max: Some(3),
            ..NodeFacts::new(offer.node, offer.stage.memory_bytes, 100.0)
        };
        let found = plan(&offers, facts);
        assert!(found.edges.iter().all(|edge| edge.latency_us <= 500.0), "{found}");
        assert!(guessed(id(OWN), &offers, &found).is_empty());
        offers.iter_mut().for_each(|offer| offer.ways.told.clear());
        assert!(!guessed(id(OWN), &offers, &plan(&offers, facts)).is_empty());
    }
}
