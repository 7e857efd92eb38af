//! Rings that change while they are used: a machine comes that makes the ring better, or dies before it has, or leaves in order.
//! And rings that are as their drivers want them.

use std::{path::PathBuf, time::Instant};

use murmur_gguf::synth::{self, Spec, Weights};
use murmur_lab::{Lab, Link, Topology, Wire};
use serde_json::{Value, json};

use crate::{
    common::{
        Home,
        http::{Completion, End},
        signal, until,
    },
    ring_matrix::pause,
    world::{Node, UNAIDED, lab, run},
};

/// One way from a machine to the world. A hop of a token is two of them, and takes longer than any machine that is busy with other
/// things computes.
const WAY_MS: f64 = 20.0;
/// Tokens of a stream that is longer than a move: at three hops each they take more than half a minute.
const STREAM_TOKENS: u64 = 300;

/// A mesh of machines that hold parts of a made-up model.
struct World<'a> {
    lab: &'a Lab,
    file: PathBuf,
    /// How the next one comes in.
    way: String,
    /// In no mesh, with all layers.
    whole: Node<'a>,
}

impl<'a> World<'a> {
    fn new(lab: &'a Lab, files: &Home, layers: u32, weights: Weights) -> Self {
        for host in lab.hosts() {
            for wire in [Wire::Up(host.name().into()), Wire::Down(host.name().into())] {
                lab.set_link(&wire, &Link::delay(WAY_MS)).unwrap();
            }
        }
        let file = files.path().join("ring.gguf");
        synth::write(&Spec::tiny("llama").unwrap().with_weights(weights).with_layers(layers), &file).unwrap();
        let sizes = ["--alias=ring", "--ctx=1024"];
        let whole = Node::serving_files(lab.host("whole").unwrap(), Home::new(), std::slice::from_ref(&file), &sizes);
        Self { lab, file, way: String::new(), whole }
    }

    /// A machine that holds so many layers at most. The first one founds the mesh.
    fn machine(&mut self, name: &str, layers_max: u32, arguments: &[&str]) -> Node<'a> {
        let (host, home) = (self.lab.host(name).unwrap(), Home::new());
        let is_first = self.way.is_empty();
        if is_first {
            run(host, &home, ["mesh", "create", "home"]).succeeds();
            self.way = "--mesh=home".to_owned();
        }
        let part = format!("--max-layers={layers_max}");
        let arguments = [&["--alias=ring", "--ctx=1024", &part, &self.way], &UNAIDED[..], arguments].concat();
        let node = Node::serving_files(host, home, std::slice::from_ref(&self.file), &arguments);
        if is_first {
            self.way = node.join();
        }
        node
    }
}

fn request(seed: u64, tokens: u64) -> Value {
    json!({"model": "ring", "prompt": "ba ce di fo gu", "max_tokens": tokens, "seed": seed, "ignore_eos": true})
}

/// Who holds the stages of the ring that a machine drives, in their order.
fn holders(node: &Node<'_>) -> Vec<String> {
    let status = node.model_status();
    let holder = |stage: &Value| stage["node"].as_str().unwrap_or_default().to_owned();
    status["stages"].as_array().map(|stages| stages.iter().map(holder).collect()).unwrap_or_default()
}

#[track_caller]
fn waits_for_stages(node: &Node<'_>, count: usize) {
    until(&format!("{} has a ring of {count}", node.host.name()), || (holders(node).len() == count).then_some(()));
}

/// A stream of so many tokens of which some text has come.
fn begin(node: &Node<'_>, tokens: u64) -> Completion {
    let mut stream = node.begin(&request(1, tokens));
    stream.read(50);
    stream
}

#[test]
fn a_machine_that_holds_two_parts_takes_them_over_and_no_stream_is_disturbed() {
    let Some(lab) = lab(&Topology::of_hosts(["one", "two", "three", "four", "whole"])) else { return };
    let files = Home::new();
    let mut world = World::new(&lab, &files, 12, Weights::Q8_0);
    let mut machines = Vec::from(["one", "two", "three"].map(|name| world.machine(name, 4, &[])));
    machines.iter().for_each(Node::waits_for_its_models);
    machines.iter().for_each(|machine| assert_eq!(holders(machine).len(), 3));
    machines.push(world.machine("four", 8, &[]));
    machines[3].waits_for_its_models();
    let mut stream = begin(&machines[0], STREAM_TOKENS);
    waits_for_stages(&machines[0], 2);
    let moved = Instant::now();
    machines.iter().for_each(|machine| waits_for_stages(machine, 2));
    let ring = holders(&machines[0]);
    assert!(ring.iter().any(|holder| holder == machines[3].id()), "{ring:?}");
    for machine in &machines {
        assert_eq!(holders(machine), ring, "{}", machine.host.name());
        assert_eq!(machine.complete(&request(2, 40)), world.whole.complete(&request(2, 40)));
    }
    assert_eq!(stream.finish(), End::Finished("length".into()));
    assert!(*stream.arrivals.last().unwrap() > moved, "the stream was over before the ring changed");
    assert_eq!(stream.text, world.whole.complete(&request(1, STREAM_TOKENS)));
}

#[test]
fn a_machine_that_dies_while_it_loads_what_it_would_take_over_disturbs_nobody() {
    let Some(lab) = lab(&Topology::of_hosts(["one", "two", "three", "four", "whole"])) else { return };
    let files = Home::new();
    // Large enough that loading takes a moment.
    let mut world = World::new(&lab, &files, 36, Weights::F32);
    let machines = ["one", "two", "three"].map(|name| world.machine(name, 12, &[]));
    machines.iter().for_each(Node::waits_for_its_models);
    let ring = holders(&machines[0]);
    let newcomer = world.machine("four", 24, &[]);
    newcomer.waits_for_its_models();
    let mut stream = begin(&machines[0], STREAM_TOKENS);
    until("the newcomer loads layers", || (!newcomer.model_status()["ring"]["held"].is_null()).then_some(()));
    newcomer.dies();
    assert_eq!(stream.finish(), End::Finished("length".into()));
    assert_eq!(stream.text, world.whole.complete(&request(1, STREAM_TOKENS)));
    for machine in &machines {
        assert_eq!(holders(machine), ring, "{}", machine.host.name());
        assert_eq!(machine.complete(&request(2, 40)), world.whole.complete(&request(2, 40)));
    }
}

#[test]
fn a_machine_that_is_stopped_in_order_is_replaced_before_it_goes() {
    let Some(lab) = lab(&Topology::of_hosts(["one", "two", "three", "four", "whole"])) else { return };
    let files = Home::new();
    let mut world = World::new(&lab, &files, 12, Weights::Q8_0);
    let mut machines = Vec::from(["one", "two", "three", "four"].map(|name| world.machine(name, 4, &[])));
    machines.iter().for_each(Node::waits_for_its_models);
    let held = |machine: &Node<'_>| machine.model_status()["ring"]["held"].clone();
    let driver = machines.remove(0);
    let mut stream = begin(&driver, STREAM_TOKENS);
    let at = machines.iter().position(|machine| holders(&driver).iter().any(|holder| holder == machine.id())).unwrap();
    let mut leaves = machines.remove(at);
    let layers = held(&leaves);
    leaves.server.signal("TERM");
    until("the driver has a ring without it", || {
        let ring = holders(&driver);
        (!ring.is_empty() && ring.iter().all(|holder| holder != leaves.id())).then_some(())
    });
    assert!(leaves.server.child.try_wait().unwrap().is_none(), "it has gone before it was replaced");
    let others = machines.iter().chain([&driver]);
    assert!(others.map(held).any(|held| held == layers), "nobody else holds {layers}");
    assert_eq!(driver.complete(&request(2, 40)), world.whole.complete(&request(2, 40)));
    until("it has gone", || leaves.server.child.try_wait().unwrap());
    assert_eq!(stream.finish(), End::Finished("length".into()));
    assert_eq!(stream.text, world.whole.complete(&request(1, STREAM_TOKENS)));
}

#[test]
fn an_answer_goes_on_around_another_ring_where_nobody_can_hold_what_was_lost() {
    let Some(lab) = lab(&Topology::of_hosts(["one", "two", "three", "four", "whole"])) else { return };
    let files = Home::new();
    let mut world = World::new(&lab, &files, 12, Weights::Q8_0);
    let (driver, dies) = (world.machine("one", 6, &[]), world.machine("two", 6, &[]));
    driver.waits_for_its_models();
    // Together they can hold what one of the first two did, and alone neither can.
    let others = ["three", "four"].map(|name| world.machine(name, 3, &[]));
    others.iter().for_each(Node::waits_for_its_models);
    let tokens = 80;
    let mut streams = [begin(&driver, tokens), begin(&others[0], tokens)];
    assert!(holders(&driver).iter().any(|holder| holder == dies.id()));
    dies.dies();
    for stream in &mut streams {
        assert_eq!(stream.finish(), End::Finished("length".into()));
        assert_eq!(stream.text, world.whole.complete(&request(1, tokens)));
    }
    assert_eq!(holders(&driver).len(), 3);
}

#[test]
fn requests_that_find_no_room_in_a_ring_go_around_a_second_one_of_the_machines_that_are_left() {
    let Some(lab) = lab(&Topology::of_hosts(["one", "two", "three", "four", "whole"])) else { return };
    let files = Home::new();
    let mut world = World::new(&lab, &files, 12, Weights::Q8_0);
    let machines = ["one", "two", "three", "four"].map(|name| world.machine(name, 6, &["--parallel=1"]));
    machines.iter().for_each(Node::waits_for_its_models);
    let ring = holders(&machines[0]);
    machines.iter().for_each(|machine| assert_eq!(holders(machine), ring));
    let tokens = 400;
    let mut stream = begin(&machines[0], tokens);
    let (mut waits, waited) = (machines[1].start_stream(&request(2, 40)), Instant::now());
    assert_eq!(waits.finish(), End::Finished("length".into()));
    eprintln!("a request that found no room was answered after {:.1?}", waited.elapsed());
    let second = holders(&machines[1]);
    assert!(second.len() == 2 && second.iter().all(|holder| !ring.contains(holder)), "{ring:?}, {second:?}");
    assert_eq!(machines[1].complete(&request(3, 40)), world.whole.complete(&request(3, 40)));
    assert_eq!(machines[0].model_status()["requests_running"], 1, "the stream that had the room is over");
    for machine in &machines {
        let rows = machine.model_status()["ring"]["computed_rows"].take();
        assert!(rows.as_u64() > Some(0), "{} has computed {rows} rows", machine.host.name());
    }
    assert_eq!(waits.text, world.whole.complete(&request(2, 40)));
    assert_eq!(stream.finish(), End::Finished("length".into()));
    assert_eq!(stream.text, world.whole.complete(&request(1, tokens)));
    assert_eq!(holders(&machines[0]), ring);
}

#[test]
fn an_engine_process_that_hangs_is_replaced_on_its_machine_and_no_token_changes() {
    let Some(lab) = lab(&Topology::of_hosts(["one", "two", "three", "whole"])) else { return };
    let files = Home::new();
    let mut world = World::new(&lab, &files, 12, Weights::Q8_0);
    let machines = ["one", "two", "three"].map(|name| world.machine(name, 4, &[]));
    machines.iter().for_each(Node::waits_for_its_models);
    let (ring, tokens) = (holders(&machines[0]), 80);
    let mut stream = begin(&machines[0], tokens);
    let hangs = machines[1].hosting_process();
    signal(&hangs, "STOP");
    let stopped = Instant::now();
    assert_eq!(stream.finish(), End::Finished("length".into()));
    assert_eq!(stream.text, world.whole.complete(&request(1, tokens)));
    eprintln!("the stream went on {:.1?} after that", pause(stopped, &stream.arrivals).unwrap());
    for machine in &machines {
        assert_eq!(machine.complete(&request(2, 40)), world.whole.complete(&request(2, 40)));
        // Nobody else has room for the part.
        assert_eq!(holders(machine), ring, "{}", machine.host.name());
    }
    assert_ne!(machines[1].hosting_process(), hangs);
}

#[test]
fn a_machine_whose_layers_nobody_uses_any_more_stands_by_for_others_at_once() {
    let Some(lab) = lab(&Topology::of_hosts(["one", "two", "three", "four", "driver", "whole"])) else { return };
    let files = Home::new();
    let mut world = World::new(&lab, &files, 12, Weights::Q8_0);
    let mut machines = Vec::from(["one", "two", "three"].map(|name| world.machine(name, 4, &[])));
    machines.iter().for_each(Node::waits_for_its_models);
    machines.push(world.machine("four", 8, &[]));
    machines.iter().for_each(|machine| waits_for_stages(machine, 2));
    let driver = world.machine("driver", 4, &["--standby", "--max-memory=1MiB"]);
    let begun = Instant::now();
    let standby = until("one of those that were in the ring stands by for what is left of it", || {
        let stages = driver.model_status()["stages"].take();
        stages.as_array()?.iter().find_map(|stage| stage["standby"]["node"].as_str().map(str::to_owned))
    });
    eprintln!("it stands by {:.1?} after a driver has come that wants that", begun.elapsed());
    let ring = holders(&driver);
    assert_eq!(ring.len(), 2);
    // One more is in no ring any more, for as long as the one that stands by.
    let others = machines.iter().filter(|machine| !ring.iter().chain([&standby]).any(|id| id == machine.id()));
    let held: Vec<Value> = others.map(|machine| machine.model_status()["ring"]["held"].take()).collect();
    assert!(held.len() == 1 && held[0].is_array(), "it was waited for until layers were let go: {held:?}");
    assert_eq!(driver.complete(&request(1, 40)), world.whole.complete(&request(1, 40)));
}

#[test]
fn kept_ends_stay_at_the_driver_and_are_all_that_it_contributes() {
    let Some(lab) = lab(&Topology::of_hosts(["one", "two", "whole"])) else { return };
    let files = Home::new();
    let mut world = World::new(&lab, &files, 12, Weights::Q8_0);
    let driver = world.machine("one", 4, &["--keep-ends=2"]);
    let other = world.machine("two", 8, &[]);
    driver.waits_for_its_models();
    let stages = driver.model_status()["stages"].take();
    let layers: Vec<&Value> = stages.as_array().unwrap().iter().map(|stage| &stage["layers"]).collect();
    assert_eq!(layers, [&json!([0, 2]), &json!([2, 10]), &json!([10, 12])]);
    assert_eq!(stages[1]["node"], other.id());
    for end in [&stages[0], &stages[2]] {
        assert!(end["node"].is_null() && end["process_id"].is_u64(), "{end}");
    }
    for asked in [request(1, 40), request(2, 40)] {
        assert_eq!(driver.complete(&asked), world.whole.complete(&asked));
    }
    // As many as it may hold are at either end of its own ring.
    until("nobody but the other one itself offers it layers", || {
        let status = other.get("/v1/models/ring").1;
        status["reason"].as_str()?.contains("the one node has").then_some(())
    });
}

#[test]
fn excluded_machines_are_left_out_and_named_where_they_would_do() {
    let Some(lab) = lab(&Topology::of_hosts(["one", "two", "whole"])) else { return };
    let files = Home::new();
    let mut world = World::new(&lab, &files, 12, Weights::Q8_0);
    let driver = world.machine("one", 6, &[]);
    let exclude = format!("--exclude={}", &driver.id()[..12]);
    let other = world.machine("two", 8, &[&exclude]);
    driver.waits_for_its_models();
    assert!(holders(&driver).iter().any(|holder| holder == other.id()));
    let waits = until("it says what would make a ring possible", || {
        let status = other.get("/v1/models/ring").1;
        status["reason"].as_str().filter(|reason| reason.contains("using")).map(str::to_owned)
    });
    assert!(waits.contains(&driver.id()[..10]), "{waits}");
}

#[test]
fn machines_of_other_regions_or_of_none_are_left_out() {
    let Some(lab) = lab(&Topology::of_hosts(["one", "two", "three", "four", "whole"])) else { return };
    let files = Home::new();
    let mut world = World::new(&lab, &files, 12, Weights::Q8_0);
    let north = world.machine("one", 6, &["--region=north"]);
    let south = world.machine("two", 8, &["--region=south"]);
    let nowhere = world.machine("three", 6, &[]);
    let picky = world.machine("four", 8, &["--region=south", "--only-region=south"]);
    [&north, &south, &nowhere, &picky].into_iter().for_each(Node::waits_for_its_models);
    let mut ring = holders(&picky);
    ring.sort();
    let mut in_the_south = [south.id(), picky.id()];
    in_the_south.sort();
    assert_eq!(ring, in_the_south);
    let told = picky.mesh(["peers"]).succeeds().out;
    assert!(["north", "south"].iter().all(|region| told.contains(region)), "{told}");
    assert_eq!(picky.complete(&request(1, 40)), world.whole.complete(&request(1, 40)));
}
