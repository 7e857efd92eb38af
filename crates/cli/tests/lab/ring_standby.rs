//! Machines that stand by for the parts of a model: whoever holds a part is lost, an answer goes on after a moment, with the same
//! text, and nothing is computed twice. And what happens where nobody stands by: when only the way between two machines is lost, and
//! when the machine that drives the others is.
//!
//! The pauses are printed:
//!
//! ```text
//! cargo test -p murmur --test lab ring_standby -- --nocapture
//! ```

use std::{
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use murmur_gguf::synth::{self, Spec, Weights};
use murmur_lab::{Lab, Link, Topology};
use serde_json::{Value, json};

use crate::{
    common::{Home, http::End, until},
    ring_matrix::pause,
    world::{Node, UNAIDED, lab, run},
};

/// Machines that hold a third of the model each, twice as many as are needed.
const MACHINES: [&str; 6] = ["one", "two", "three", "four", "five", "six"];
const STAGES: usize = 3;
const LAYERS: u32 = 12;
/// Rows of a chunk of a prompt in exact mode.
const CHUNK_ROWS: u64 = 128;
const ANSWER_TOKENS: u64 = 200;
const SIZES: [&str; 3] = ["--alias=ring", "--ctx=1024", "--parallel=4"];
/// As many requests as a stage runs at once.
const PARALLEL: usize = 4;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Moment {
    /// A part of the prompt has been read.
    Prefill,
    /// A part of the answer has come.
    Decode,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    Killed,
    Stopped,
    Unreachable,
}

struct World<'a> {
    lab: &'a Lab,
    file: PathBuf,
    join: String,
    /// It has no room for a part of its own.
    driver: Node<'a>,
    machines: Vec<Node<'a>>,
    /// In no mesh, with all layers.
    whole: Node<'a>,
}

impl<'a> World<'a> {
    /// With `further` arguments for the one that drives.
    fn new(lab: &'a Lab, files: &Home, further: &[&str]) -> Self {
        let file = files.path().join("ring.gguf");
        let spec = Spec::tiny("llama").unwrap().with_weights(Weights::Q8_0).with_layers(LAYERS);
        synth::write(&spec, &file).unwrap();
        let (host, home) = (lab.host("driver").unwrap(), Home::new());
        run(host, &home, ["mesh", "create", "home"]).succeeds();
        let drives = [&SIZES[..], &UNAIDED, &["--mesh=home", "--max-memory=1MiB"], further].concat();
        let driver = Node::serving_files(host, home, std::slice::from_ref(&file), &drives);
        let whole = Node::serving_files(lab.host("whole").unwrap(), Home::new(), std::slice::from_ref(&file), &SIZES);
        let mut world = Self { lab, file, join: driver.join(), driver, machines: Vec::new(), whole };
        let machines = MACHINES.iter().filter(|name| lab.host(name).is_ok());
        world.machines = machines.map(|name| world.machine(name, Home::new())).collect();
        world
    }

    fn machine(&self, name: &str, home: Home) -> Node<'a> {
        let part = format!("--max-layers={}", LAYERS / STAGES as u32);
        let arguments = [&SIZES[..], &UNAIDED, &[&part, &self.join]].concat();
        Node::serving_files(self.lab.host(name).unwrap(), home, std::slice::from_ref(&self.file), &arguments)
    }

    fn stages(&self) -> Option<Vec<Value>> {
        self.driver.model_status()["stages"].as_array().cloned().filter(|stages| stages.len() == STAGES)
    }

    /// Waits until somebody holds every stage.
    fn ring(&self) -> Vec<Value> {
        self.driver.waits_for_its_models();
        until("somebody holds every stage", || {
            self.stages().filter(|stages| stages.iter().all(|stage| stage["node"].is_string()))
        })
    }

    /// Waits until somebody stands by for every stage.
    fn stands(&self) -> Vec<Value> {
        self.ring();
        until("somebody stands by for every stage", || {
            self.stages().filter(|stages| stages.iter().all(|stage| stage["standby"]["node"].is_string()))
        })
    }

    fn machine_of(&self, node: &Value) -> usize {
        self.machines.iter().position(|machine| node == machine.id()).unwrap()
    }

    fn hit(&self, at: usize, fault: Fault) {
        let node = &self.machines[at];
        match fault {
            Fault::Killed => node.dies(),
            Fault::Stopped => node.server.signal("STOP"),
            Fault::Unreachable => self.lab.isolate(node.host.name()).unwrap(),
        }
    }

    /// What would outlive the machines is undone.
    fn repair(&self, at: usize, fault: Fault) {
        match fault {
            Fault::Killed => {}
            Fault::Stopped => self.machines[at].server.signal("CONT"),
            Fault::Unreachable => self.lab.rejoin(self.machines[at].host.name()).unwrap(),
        }
    }

    /// Waits for the moment, and says how long the prompt is.
    fn waits_for(&self, moment: Moment) -> u64 {
        let (field, count) = match moment {
            Moment::Prefill => ("prompt_tokens_done", CHUNK_ROWS),
            Moment::Decode => ("generated_tokens", ANSWER_TOKENS / 10),
        };
        until(&format!("{field} is {count}"), || {
            let request = self.driver.status()["requests"][0].take();
            (request[field].as_u64()? >= count).then(|| request["prompt_tokens"].as_u64().unwrap())
        })
    }
}

/// A request that nobody has made before.
fn request(salt: usize, moment: Moment) -> Value {
    let words = if moment == Moment::Prefill { 5 * CHUNK_ROWS as usize } else { 10 };
    let vowels = ["a", "e", "i", "o", "u"];
    let prompt: Vec<_> =
        (0..words).map(|at| format!("b{}", vowels[(at * at + at / 5 + salt * (at + 1)) % 5])).collect();
    let tokens = ANSWER_TOKENS;
    json!({"model": "ring", "prompt": prompt.join(" "), "max_tokens": tokens, "seed": salt, "ignore_eos": true})
}

#[test]
fn who_stands_by_goes_on_at_once_where_whoever_held_the_part_was_lost() {
    let hosts = MACHINES.into_iter().chain(["driver", "whole"]);
    let Some(lab) = lab(&Topology::of_hosts(hosts)) else { return };
    let files = Home::new();
    let cases = [
        (1, Moment::Decode, Fault::Killed),
        (2, Moment::Decode, Fault::Unreachable),
        (0, Moment::Prefill, Fault::Stopped),
    ];
    for (salt, (stage, moment, fault)) in cases.into_iter().enumerate() {
        let world = World::new(&lab, &files, &["--standby"]);
        // An engine waits 100 ms before it replaces a stage that has been up for less than two seconds. This one has answered before.
        world.stands();
        world.driver.complete(&request(salt + cases.len(), Moment::Decode));
        let request = request(salt, moment);
        let text = world.whole.complete(&request);
        let before = world.stands();
        let mut stream = world.driver.start_stream(&request);
        let prompt_tokens = world.waits_for(moment);
        let held = &before[stage];
        let victim = world.machine_of(&held["node"]);
        let so_far = world.stages().unwrap()[stage]["standby"]["computed_rows"].as_u64().unwrap();
        let struck = Instant::now();
        world.hit(victim, fault);
        let hit_ms = struck.elapsed().as_millis();
        assert_eq!(stream.finish(), End::Finished("length".into()));
        let ms = pause(struck, &stream.arrivals).unwrap().as_millis();
        eprintln!(
            "stage {stage}, {moment:?}, {fault:?}: went on after {ms} ms, of which the fault took {hit_ms} ms at most"
        );
        assert_eq!(stream.text, text);
        let after = &world.stages().unwrap()[stage];
        assert_eq!(after["node"], held["standby"]["node"], "who stood by holds the part now");
        assert!(so_far > held["standby"]["computed_rows"].as_u64().unwrap(), "it had computed nothing");
        // Rows of which the account was on its way, and the last row or chunk, of which the token was.
        let again = if moment == Moment::Prefill { 3 * CHUNK_ROWS } else { 4 };
        let once = prompt_tokens + ANSWER_TOKENS - 1;
        let computed = after["computed_rows"].as_u64().unwrap() - held["computed_rows"].as_u64().unwrap();
        assert!(computed <= once + again, "{computed} rows of {once}");
        world.repair(victim, fault);
    }
}

#[test]
fn the_loss_of_one_that_stands_by_is_no_loss() {
    let hosts = MACHINES.into_iter().chain(["driver", "whole"]);
    let Some(lab) = lab(&Topology::of_hosts(hosts)) else { return };
    let files = Home::new();
    let world = World::new(&lab, &files, &["--standby"]);
    let (stage, request) = (1, request(1, Moment::Decode));
    let before = world.stands();
    let mut stream = world.driver.start_stream(&request);
    world.waits_for(Moment::Decode);
    world.hit(world.machine_of(&before[stage]["standby"]["node"]), Fault::Killed);
    assert_eq!(stream.finish(), End::Finished("length".into()));
    assert_eq!(stream.text, world.whole.complete(&request));
    assert_eq!(world.stages().unwrap()[stage]["node"], before[stage]["node"], "who holds the part holds it still");
}

#[test]
fn rows_of_two_machines_that_have_lost_each_other_go_through_the_driver() {
    let hosts = MACHINES.into_iter().take(STAGES).chain(["driver", "whole"]);
    let Some(lab) = lab(&Topology::of_hosts(hosts)) else { return };
    let files = Home::new();
    let world = World::new(&lab, &files, &[]);
    for (stage, moment) in [(0, Moment::Decode), (1, Moment::Prefill)] {
        let before = world.ring();
        let [from, to] =
            [stage, stage + 1].map(|stage| world.machines[world.machine_of(&before[stage]["node"])].host.name());
        let first = request(2 * stage, moment);
        let mut stream = world.driver.start_stream(&first);
        world.waits_for(moment);
        let struck = Instant::now();
        lab.set_route(from, to, &Link::lossy(1.0)).unwrap();
        assert_eq!(stream.finish(), End::Finished("length".into()));
        let ms = pause(struck, &stream.arrivals).unwrap().as_millis();
        eprintln!("way from stage {stage}, {moment:?}: went on after {ms} ms");
        assert_eq!(stream.text, world.whole.complete(&first));
        let second = request(2 * stage + 1, Moment::Decode);
        assert_eq!(world.driver.complete(&second), world.whole.complete(&second));
        let nodes = |stages: &[Value]| stages.iter().map(|stage| stage["node"].clone()).collect::<Vec<_>>();
        assert_eq!(nodes(&world.ring()), nodes(&before), "nobody was given up");
        lab.set_route(from, to, &Link::default()).unwrap();
    }
}

#[test]
fn a_driver_that_stops_for_a_while_goes_on_and_one_that_dies_makes_room_for_others() {
    let hosts = MACHINES.into_iter().take(STAGES).chain(["driver", "whole"]);
    let Some(lab) = lab(&Topology::of_hosts(hosts)) else { return };
    let files = Home::new();
    let world = World::new(&lab, &files, &[]);
    world.ring();
    world.machines.iter().for_each(Node::waits_for_its_models);
    let requests = |round| (round * PARALLEL..(round + 1) * PARALLEL).map(|salt| request(salt, Moment::Decode));
    let start = |round| requests(round).map(|request| world.driver.start_stream(&request)).collect::<Vec<_>>();
    let restarts = || world.ring().iter().map(|stage| stage["restarts"].clone()).collect::<Vec<_>>();

    // A part of the lease that hosts give it, and more than that.
    for (round, stopped_s) in [1, 5].into_iter().enumerate() {
        let (mut streams, before) = (start(round), restarts());
        world.waits_for(Moment::Decode);
        world.driver.server.signal("STOP");
        thread::sleep(Duration::from_secs(stopped_s));
        let continued = Instant::now();
        world.driver.server.signal("CONT");
        for (stream, request) in streams.iter_mut().zip(requests(round)) {
            assert_eq!(stream.finish(), End::Finished("length".into()));
            assert_eq!(stream.text, world.whole.complete(&request));
            let ms = pause(continued, &stream.arrivals).map(|pause| pause.as_millis());
            eprintln!("the driver stopped for {stopped_s} s and continued: went on after {ms:?} ms");
        }
        assert!(stopped_s > 1 || restarts() == before, "its hosts have given it up");
    }

    let _streams = start(2);
    world.waits_for(Moment::Decode);
    world.driver.dies();
    let died = Instant::now();
    let another = request(3 * PARALLEL, Moment::Decode);
    let mut stream = world.machines[0].begin(&another);
    eprintln!("the driver died: another had its first token after {:.1?}", died.elapsed());
    assert_eq!(stream.finish(), End::Finished("length".into()));
    assert_eq!(stream.text, world.whole.complete(&another));
}
