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
    common::{
        Home,
        http::{Completion, End},
        until, until_at,
    },
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
/// How often a case is tried that says nothing: on a busy machine an answer may be over before it is hit, or a machine may be given up
/// that is only slow.
const ATTEMPTS: usize = 4;

/// Lets something happen until an attempt counts; each says why it does not.
fn until_it_counts(what: &str, mut attempt: impl FnMut(usize) -> Result<(), String>) {
    for number in 0..ATTEMPTS {
        match attempt(number) {
            Ok(()) => return,
            Err(reason) => eprintln!("{what}, attempt {number}: {reason}"),
        }
    }
    panic!("{what}: none of {ATTEMPTS} attempts counts");
}

const OVER: &str = "the answer was over before";

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

    /// Tokens that the driver has generated in all.
    fn generated(&self) -> u64 {
        self.driver.model_status()["generated_tokens"].as_u64().unwrap()
    }

    /// How often the driver has lost who held a stage.
    fn losses(&self) -> u64 {
        let stages = self.stages().unwrap_or_default();
        stages.iter().map(|stage| stage["restarts"].as_u64().unwrap()).sum()
    }

    /// Waits for the moment in these answers, and says how long the prompt is.
    fn waits_for(&self, moment: Moment, answers: &Answers) -> Result<u64, String> {
        let (field, count) = match moment {
            Moment::Prefill => ("prompt_tokens_done", CHUNK_ROWS),
            Moment::Decode => ("generated_tokens", ANSWER_TOKENS / 10),
        };
        self.before_the_end(&format!("{field} is {count}"), answers, || {
            let request = self.driver.status()["requests"][0].take();
            (request[field].as_u64()? >= count).then(|| request["prompt_tokens"].as_u64().unwrap())
        })
    }

    /// Asks again and again until there is something, or the answers are over.
    fn before_the_end<T>(
        &self,
        what: &str,
        answers: &Answers,
        mut ask: impl FnMut() -> Option<T>,
    ) -> Result<T, String> {
        let mut were_there = false;
        until_at(what, Duration::from_millis(5), || {
            if let Some(something) = ask() {
                return Some(Ok(something));
            }
            let are_there = self.driver.status()["requests"] != json!([]);
            let are_over = were_there && !are_there || self.generated() >= answers.generated;
            were_there |= are_there;
            are_over.then(|| Err(OVER.to_owned()))
        })
    }

    /// Waits until who stands by for a stage has computed more than before.
    fn has_computed(&self, stage: usize, before: &Value, answers: &Answers) -> Result<(), String> {
        let computed = |standby: &Value| standby["computed_rows"].as_u64();
        self.before_the_end("who stands by has computed something", answers, || {
            let now = self.stages()?[stage]["standby"].take();
            if now["node"] != before["node"] {
                return Some(Err("another one stands by".to_owned()));
            }
            (computed(&now) > computed(before)).then_some(Ok(()))
        })?
    }

    /// Starts answers to these requests.
    fn start(&self, requests: &[Value]) -> (Vec<Completion>, Answers) {
        let generated = self.generated() + requests.len() as u64 * ANSWER_TOKENS;
        (requests.iter().map(|request| self.driver.start_stream(request)).collect(), Answers { generated })
    }

    /// Reads an answer to its end: the text is right, and it went on after so long since something happened.
    fn goes_on(&self, request: &Value, mut stream: Completion, happened: Instant) -> Result<Duration, String> {
        assert_eq!(stream.finish(), End::Finished("length".into()));
        assert_eq!(stream.text, self.whole.complete(request));
        pause(happened, &stream.arrivals).ok_or(OVER.to_owned())
    }
}

/// Answers in progress, of which nothing may be read for a while.
struct Answers {
    /// Tokens that their driver will have generated when they are over.
    generated: u64,
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
    for (stage, moment, fault) in cases {
        let what = format!("stage {stage}, {moment:?}, {fault:?}");
        until_it_counts(&what, |attempt| {
            let world = World::new(&lab, &files, &["--standby"]);
            // An engine waits 100 ms before it replaces a stage that has been up for less than two seconds. This one has answered before.
            world.stands();
            world.driver.complete(&request(2 * attempt + 1, Moment::Decode));
            let asked = request(2 * attempt, moment);
            let (before, losses) = (world.stands(), world.losses());
            let held = &before[stage];
            let victim = world.machine_of(&held["node"]);
            let (mut streams, answers) = world.start(std::slice::from_ref(&asked));
            let prompt_tokens = world.waits_for(moment, &answers)?;
            world.has_computed(stage, &held["standby"], &answers)?;
            let struck = Instant::now();
            world.hit(victim, fault);
            let hit_ms = struck.elapsed().as_millis();
            let went_on = world.goes_on(&asked, streams.remove(0), struck);
            let (after, further) = (world.ring(), world.losses().checked_sub(losses));
            world.repair(victim, fault);
            let ms = went_on?.as_millis();
            eprintln!("{what}: went on after {ms} ms, of which the fault took {hit_ms} ms at most");
            if further != Some(1) {
                return Err(format!("{further:?} machines were given up"));
            }
            let after = &after[stage];
            assert_eq!(after["node"], held["standby"]["node"], "who stood by holds the part now");
            // Rows of which the account was on its way, and the last row or chunk, of which the token was.
            let again = if moment == Moment::Prefill { 3 * CHUNK_ROWS } else { 4 };
            let once = prompt_tokens + ANSWER_TOKENS - 1;
            let computed = after["computed_rows"].as_u64().unwrap() - held["computed_rows"].as_u64().unwrap();
            assert!(computed <= once + again, "{computed} rows of {once}");
            Ok(())
        });
    }
}

#[test]
fn the_loss_of_one_that_stands_by_is_no_loss() {
    let hosts = MACHINES.into_iter().chain(["driver", "whole"]);
    let Some(lab) = lab(&Topology::of_hosts(hosts)) else { return };
    let files = Home::new();
    let (stage, asked) = (1, request(1, Moment::Decode));
    until_it_counts("who stands by is lost", |_| {
        let world = World::new(&lab, &files, &["--standby"]);
        let (before, losses) = (world.stands(), world.losses());
        let (mut streams, answers) = world.start(std::slice::from_ref(&asked));
        world.waits_for(Moment::Decode, &answers)?;
        let struck = Instant::now();
        world.hit(world.machine_of(&before[stage]["standby"]["node"]), Fault::Killed);
        world.goes_on(&asked, streams.remove(0), struck)?;
        let after = world.ring()[stage]["node"].take();
        if world.losses() != losses || after != before[stage]["node"] {
            return Err("who holds the part was lost as well".to_owned());
        }
        Ok(())
    });
}

#[test]
fn rows_of_two_machines_that_have_lost_each_other_go_through_the_driver() {
    let hosts = MACHINES.into_iter().take(STAGES).chain(["driver", "whole"]);
    let Some(lab) = lab(&Topology::of_hosts(hosts)) else { return };
    let files = Home::new();
    for (stage, moment) in [(0, Moment::Decode), (1, Moment::Prefill)] {
        let what = format!("way from stage {stage}, {moment:?}");
        until_it_counts(&what, |_| {
            let world = World::new(&lab, &files, &[]);
            let before = world.ring();
            let [from, to] =
                [stage, stage + 1].map(|stage| world.machines[world.machine_of(&before[stage]["node"])].host.name());
            let first = request(0, moment);
            let (mut streams, answers) = world.start(std::slice::from_ref(&first));
            let has_come = world.waits_for(moment, &answers);
            let struck = Instant::now();
            lab.set_route(from, to, &Link::lossy(1.0)).unwrap();
            let went_on = world.goes_on(&first, streams.remove(0), struck);
            let second = request(1, Moment::Decode);
            assert_eq!(world.driver.complete(&second), world.whole.complete(&second));
            lab.set_route(from, to, &Link::default()).unwrap();
            has_come?;
            eprintln!("{what}: went on after {} ms", went_on?.as_millis());
            let nodes = |stages: &[Value]| stages.iter().map(|stage| stage["node"].clone()).collect::<Vec<_>>();
            match nodes(&world.ring()) == nodes(&before) && world.losses() == 0 {
                true => Ok(()),
                false => Err("somebody was given up".to_owned()),
            }
        });
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
    let mut salts = 0..;
    let mut requests =
        || -> Vec<Value> { salts.by_ref().take(PARALLEL).map(|salt| request(salt, Moment::Decode)).collect() };

    // A part of the lease that hosts give it, and more than that.
    for stopped_s in [1, 5] {
        let what = format!("the driver stops for {stopped_s} s");
        until_it_counts(&what, |_| {
            let requests = requests();
            let losses = world.losses();
            let (streams, answers) = world.start(&requests);
            world.waits_for(Moment::Decode, &answers)?;
            world.driver.server.signal("STOP");
            thread::sleep(Duration::from_secs(stopped_s));
            let continued = Instant::now();
            world.driver.server.signal("CONT");
            let mut went_on = Vec::new();
            for (stream, request) in streams.into_iter().zip(&requests) {
                went_on.extend(world.goes_on(request, stream, continued).map(|pause| pause.as_millis()));
            }
            eprintln!("{what}: went on after {went_on:?} ms");
            if went_on.is_empty() {
                return Err(OVER.to_owned());
            }
            match stopped_s > 1 || world.losses() == losses {
                true => Ok(()),
                false => Err("its hosts have given it up".to_owned()),
            }
        });
    }

    until_it_counts("the driver dies", |_| {
        let (_streams, answers) = world.start(&requests());
        world.waits_for(Moment::Decode, &answers)?;
        world.driver.dies();
        Ok(())
    });
    let died = Instant::now();
    let another = request(1_000, Moment::Decode);
    let mut stream = world.machines[0].begin(&another);
    eprintln!("the driver died: another had its first token after {:.1?}", died.elapsed());
    assert_eq!(stream.finish(), End::Finished("length".into()));
    assert_eq!(stream.text, world.whole.complete(&another));
}
