//! Deaths, hangs and bad links in a ring, by the hundred: whoever of it is hit, whenever and however, every stream ends with the
//! text of the undisturbed run, and the ring is whole again.
//!
//! A scenario is made from a number. A few run by default. `MURMUR_RING_SEED=17` has the one of that number run instead, and
//! `MURMUR_RING_SCENARIOS=300` as many from there on, or from 0:
//!
//! ```text
//! MURMUR_RING_SCENARIOS=300 cargo test -p murmur --test lab ring_matrix -- --nocapture
//! ```
//!
//! At the end a table says after which time the streams went on, by what was done. (With `cargo nextest` a test ends after five
//! minutes.)

use std::{
    collections::BTreeMap,
    fmt,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use murmur_gguf::synth::{self, Spec, Weights};
use murmur_lab::{Lab, Link, Topology, Wire};
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};

use crate::{
    common::{
        Home,
        http::{Completion, End},
        signal, until,
    },
    world::{Node, UNAIDED, lab, run},
};

/// Machines that can hold a part, as many as a ring has stages, twice.
const MACHINES: [&str; 6] = ["one", "two", "three", "four", "five", "six"];
/// Layers of the model, of which a machine holds a third at most.
const LAYERS: u32 = 12;
/// Rows of a chunk of a prompt in exact mode.
const CHUNK_ROWS: u64 = 128;
/// Tokens of each answer.
const ANSWER_TOKENS: u64 = 100;
/// What runs by default: every victim, phase and fault at least once.
const SCENARIOS: [u64; 7] = [1, 3, 4, 10, 13, 44, 49];

/// Who is hit.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Victim {
    First,
    Middle,
    Last,
    /// The machine that the streams run on, which holds a stage.
    Own,
    /// Who replaces a machine that died before.
    Replacement,
    Two,
}

/// When.
#[derive(Debug, Clone, Copy)]
enum Phase {
    Opening,
    /// So many chunks of the prompts have been read.
    Prefill(u64),
    /// So many tokens have come.
    Decode(u64),
    /// The same, and one more stream is given up at the moment.
    Cancel(u64),
}

/// How.
#[derive(Debug, Clone, Copy)]
enum Fault {
    NodeKilled,
    EngineKilled,
    NodeStopped(Duration),
    LinkDead(Duration),
    /// One packet of a hundred is lost until the streams are over.
    LinkLossy,
}

/// What happens to a ring.
struct Scenario {
    seed: u64,
    streams: u64,
    /// Which machine the streams run on, if it will do.
    driver: usize,
    /// Which stages are hit, where the victim leaves it open.
    stages: [usize; 2],
    victim: Victim,
    phase: Phase,
    fault: Fault,
}

impl Scenario {
    fn new(seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let first = random.random_range(0..3);
        let stages = [first, (first + random.random_range(1..3)) % 3];
        let while_for = Duration::from_millis(random.random_range(400..4000));
        let victims = [Victim::First, Victim::Middle, Victim::Last, Victim::Own, Victim::Replacement, Victim::Two];
        let victim = victims[random.random_range(0..victims.len())];
        let tokens = random.random_range(1..=ANSWER_TOKENS / 3);
        let phases =
            [Phase::Opening, Phase::Prefill(random.random_range(1..=3)), Phase::Decode(tokens), Phase::Cancel(tokens)];
        let phase = phases[random.random_range(0..phases.len())];
        let faults = [
            Fault::NodeKilled,
            Fault::EngineKilled,
            Fault::NodeStopped(while_for),
            Fault::LinkDead(while_for),
            Fault::LinkLossy,
        ];
        let fault = match faults[random.random_range(0..faults.len())] {
            // Nobody would be left to ask.
            Fault::NodeKilled if victim == Victim::Own => Fault::EngineKilled,
            fault => fault,
        };
        let (streams, driver) = (random.random_range(1..=4), random.random_range(0..MACHINES.len()));
        Self { seed, streams, driver, stages, victim, phase, fault }
    }

    /// A request that nobody has made before.
    fn request(&self, n: u64) -> Value {
        let mut random = StdRng::seed_from_u64(1000 * self.seed + n);
        let words = match self.phase {
            Phase::Prefill(chunks) => chunks * CHUNK_ROWS + CHUNK_ROWS / 2,
            _ => 10,
        };
        let vowels = ["a", "e", "i", "o", "u"];
        let prompt: Vec<_> = (0..words).map(|_| format!("b{}", vowels[random.random_range(0..5)])).collect();
        json!({
            "model": "ring", "prompt": prompt.join(" "), "max_tokens": ANSWER_TOKENS, "seed": n, "ignore_eos": true,
        })
    }
}

impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, streams, victim, phase, fault, .. } = self;
        write!(f, "scenario {seed}: {streams} streams, {victim:?}, {phase:?}, {fault:?}")
    }
}

/// The machines, and what they are compared with.
struct World<'a> {
    lab: &'a Lab,
    file: PathBuf,
    join: String,
    machines: Vec<Node<'a>>,
    /// In the mesh and never hit.
    client: Node<'a>,
    /// In no mesh, with all layers.
    whole: Node<'a>,
}

const SIZES: [&str; 3] = ["--alias=ring", "--ctx=1024", "--parallel=8"];

impl<'a> World<'a> {
    fn new(lab: &'a Lab, files: &Home) -> Self {
        let file = files.path().join("ring.gguf");
        let spec = Spec::tiny("llama").unwrap().with_weights(Weights::Q8_0).with_layers(LAYERS);
        synth::write(&spec, &file).unwrap();
        let (host, home) = (lab.host("client").unwrap(), Home::new());
        run(host, &home, ["mesh", "create", "home"]).succeeds();
        let client = Node::client(host, home, &[&UNAIDED[..], &["--mesh=home"]].concat());
        let whole = Node::serving_files(lab.host("whole").unwrap(), Home::new(), std::slice::from_ref(&file), &SIZES);
        let mut world = Self { lab, file, join: client.join(), machines: Vec::new(), client, whole };
        world.machines = MACHINES.iter().map(|name| world.machine(name, Home::new())).collect();
        world.recovers();
        world
    }

    fn machine(&self, name: &str, home: Home) -> Node<'a> {
        let part = format!("--max-layers={}", LAYERS / 3);
        let arguments = [&SIZES[..], &UNAIDED, &[&part, &self.join]].concat();
        Node::serving_files(self.lab.host(name).unwrap(), home, std::slice::from_ref(&self.file), &arguments)
    }

    /// Waits until all machines see each other, have a ring, and nothing to do.
    fn recovers(&self) {
        for node in &self.machines {
            node.waits_for_its_models();
            let name = node.host.name();
            let is_direct = |peer: &Value| peer["path"].as_str().unwrap().starts_with("direct");
            until(&format!("{name} sees the others"), || {
                (node.peers().iter().filter(|peer| is_direct(peer)).count() == MACHINES.len()).then_some(())
            });
            until(&format!("{name} has nothing to do"), || (node.status()["requests"] == json!([])).then_some(()));
        }
    }

    /// Which machines hold the stages of the ring that a machine drives.
    fn ring(&self, driver: usize) -> Vec<usize> {
        until(&format!("{} has a ring", MACHINES[driver]), || {
            let status = self.machines[driver].model_status();
            let holder = |stage: &Value| self.machines.iter().position(|node| stage["node"] == node.id());
            status["stages"].as_array()?.iter().map(holder).collect()
        })
    }

    /// Which machine drives, and who is hit.
    fn cast(&self, scenario: &Scenario) -> (usize, Vec<usize>) {
        let candidates = (0..MACHINES.len()).map(|n| (scenario.driver + n) % MACHINES.len());
        let mut cast = candidates.filter_map(|driver| {
            let ring = self.ring(driver);
            let victims = match scenario.victim {
                Victim::First => vec![ring[0]],
                Victim::Middle => vec![ring[1]],
                Victim::Last => vec![ring[2]],
                Victim::Two => scenario.stages.map(|stage| ring[stage]).to_vec(),
                Victim::Own => return ring.contains(&driver).then(|| (driver, vec![driver])),
                // Who drives is not to be the replacement.
                Victim::Replacement if !ring.contains(&driver) => return None,
                Victim::Replacement => vec![ring[scenario.stages[0]]],
            };
            (!victims.contains(&driver)).then_some((driver, victims))
        });
        cast.next().unwrap()
    }

    /// Waits for somebody who replaces a machine that is dead.
    fn replacement(&self, dead: usize, layers: &Value) -> usize {
        let alive = || (0..MACHINES.len()).filter(|&at| at != dead);
        until("somebody replaces the dead machine", || {
            alive().find(|&at| &self.machines[at].model_status()["ring"]["held"] == layers)
        })
    }

    fn set_link(&self, name: &str, link: Link) {
        for wire in [Wire::Up(name.into()), Wire::Down(name.into())] {
            self.lab.set_link(&wire, &link).unwrap();
        }
    }

    fn hit(&self, at: usize, fault: Fault) {
        let node = &self.machines[at];
        match fault {
            Fault::NodeKilled => node.dies(),
            Fault::EngineKilled => {
                let process = || node.model_status()["ring"]["process_id"].as_u64();
                signal(&until("its engine process is known", process), "KILL");
            }
            Fault::NodeStopped(_) => node.server.signal("STOP"),
            Fault::LinkDead(_) => self.lab.isolate(node.host.name()).unwrap(),
            Fault::LinkLossy => self.set_link(node.host.name(), Link::lossy(0.01)),
        }
    }

    /// Undoes what ends by itself.
    fn relieve(&self, at: usize, fault: Fault) {
        let node = &self.machines[at];
        match fault {
            Fault::NodeStopped(_) => node.server.signal("CONT"),
            Fault::LinkDead(_) => self.lab.rejoin(node.host.name()).unwrap(),
            _ => {}
        }
    }

    /// Undoes the rest.
    fn repair(&mut self, at: usize, fault: Fault) {
        match fault {
            Fault::NodeKilled => {
                let Node { host, home, server } = self.machines.remove(at);
                drop(server);
                let machine = self.machine(host.name(), home);
                self.machines.insert(at, machine);
            }
            Fault::LinkLossy => self.set_link(MACHINES[at], Link::default()),
            _ => {}
        }
    }

    /// Lets a scenario happen, and says after which times the streams went on.
    fn plays(&mut self, scenario: &Scenario) -> Vec<Duration> {
        let (driver, mut victims) = self.cast(scenario);
        let requests: Vec<Value> = (0..scenario.streams).map(|n| scenario.request(n)).collect();
        let mut dead = Vec::new();
        let world = &*self;
        let node = &world.machines[driver];
        let (struck, streams) = thread::scope(|scope| {
            let given_up = match scenario.phase {
                Phase::Cancel(_) => Some(node.begin(&scenario.request(scenario.streams))),
                _ => None,
            };
            let follow = |request| {
                let mut stream = node.start_stream(request);
                (stream.finish(), stream)
            };
            let streams: Vec<_> = requests.iter().map(|request| scope.spawn(move || follow(request))).collect();
            world.waits_for(node, scenario.phase);
            if scenario.victim == Victim::Replacement {
                let layers = world.machines[victims[0]].model_status()["ring"]["held"].take();
                world.hit(victims[0], Fault::NodeKilled);
                dead.append(&mut victims);
                victims.push(world.replacement(dead[0], &layers));
            }
            let struck = Instant::now();
            victims.iter().for_each(|&at| world.hit(at, scenario.fault));
            drop(given_up);
            if let Fault::NodeStopped(pause) | Fault::LinkDead(pause) = scenario.fault {
                thread::sleep(pause);
                victims.iter().for_each(|&at| world.relieve(at, scenario.fault));
            }
            (struck, streams.into_iter().map(|stream| stream.join().unwrap()).collect::<Vec<(End, Completion)>>())
        });
        let mut resumed = Vec::new();
        for ((end, stream), request) in streams.into_iter().zip(&requests) {
            assert_eq!(end, End::Finished("length".into()));
            assert_eq!(stream.text, self.whole.complete(request));
            resumed.extend(pause(struck, &stream.arrivals));
        }
        dead.into_iter().for_each(|at| self.repair(at, Fault::NodeKilled));
        victims.iter().for_each(|&at| self.repair(at, scenario.fault));
        self.recovers();
        let again = &requests[0];
        let text = self.whole.complete(again);
        for at in victims {
            assert_eq!(self.machines[at].complete(again), text, "{} afterwards", MACHINES[at]);
        }
        assert_eq!(self.client.complete(again), text, "the client afterwards");
        resumed
    }

    fn waits_for(&self, node: &Node<'_>, phase: Phase) {
        let (field, count) = match phase {
            Phase::Opening => return,
            Phase::Prefill(chunks) => ("prompt_tokens_done", chunks * CHUNK_ROWS),
            Phase::Decode(tokens) | Phase::Cancel(tokens) => ("generated_tokens", tokens),
        };
        until(&format!("{field} is {count}"), || {
            let requests = node.status()["requests"].take();
            requests.as_array().unwrap().iter().any(|request| request[field].as_u64() >= Some(count)).then_some(())
        });
    }
}

/// The time from a fault to the end of the longest silence that ended after it.
pub fn pause(struck: Instant, arrivals: &[Instant]) -> Option<Duration> {
    let since = [struck].into_iter().chain(arrivals.iter().copied().filter(|at| *at > struck));
    let silences = since.clone().zip(since.skip(1));
    silences.max_by_key(|(from, to)| *to - *from).map(|(_, to)| to - struck)
}

fn print_table(resumed: &mut BTreeMap<String, Vec<Duration>>) {
    eprintln!("\nfrom the fault to the next token, ms");
    eprintln!("{:<28}{:>8}{:>8}{:>8}{:>8}{:>8}", "", "streams", "min", "median", "p90", "max");
    for (what, times) in resumed {
        times.sort_unstable();
        let part = |part: f64| times[((times.len() - 1) as f64 * part).round() as usize].as_millis();
        let (least, half, most, all) = (part(0.0), part(0.5), part(0.9), part(1.0));
        eprintln!("{what:<28}{:>8}{least:>8}{half:>8}{most:>8}{all:>8}", times.len());
    }
}

fn number(variable: &str) -> Option<u64> {
    Some(std::env::var(variable).ok()?.parse().unwrap())
}

#[test]
fn whatever_befalls_a_ring_no_stream_loses_or_changes_a_token() {
    let Some(lab) = lab(&Topology::of_hosts(MACHINES.into_iter().chain(["client", "whole"]))) else { return };
    let seeds: Vec<u64> = match (number("MURMUR_RING_SEED"), number("MURMUR_RING_SCENARIOS")) {
        (None, None) => SCENARIOS.to_vec(),
        (first, count) => (first.unwrap_or(0)..).take(count.unwrap_or(1) as usize).collect(),
    };
    let files = Home::new();
    let mut world = World::new(&lab, &files);
    let mut resumed: BTreeMap<String, Vec<Duration>> = BTreeMap::new();
    for seed in seeds {
        let (scenario, begun) = (Scenario::new(seed), Instant::now());
        eprintln!("{scenario}");
        let times = world.plays(&scenario);
        let ms: Vec<u128> = times.iter().map(Duration::as_millis).collect();
        eprintln!("  resumed after {ms:?} ms, over after {:.1?}", begun.elapsed());
        let fault = match scenario.fault {
            Fault::NodeKilled => "node killed",
            Fault::EngineKilled => "engine killed",
            Fault::NodeStopped(_) => "node stopped",
            Fault::LinkDead(_) => "link dead",
            Fault::LinkLossy => "link lossy",
        };
        let whose = if scenario.victim == Victim::Own { "own " } else { "" };
        resumed.entry(format!("{whose}{fault}")).or_default().extend(times);
    }
    print_table(&mut resumed);
}
