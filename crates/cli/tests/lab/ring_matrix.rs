//! Deaths, hangs and bad links in a ring, by the hundred: whoever of it is hit, whenever and however, every stream ends with the
//! text of the undisturbed run, and the ring is whole again.
//!
//! A scenario is made from a number. A few run by default. `MURMUR_RING_SEED=17` has the one of that number run instead, and
//! `MURMUR_RING_SCENARIOS=300` as many from there on, or from 0:
//!
//! ```text
//! MURMUR_RING_SCENARIOS=300 cargo test -p murmur --test lab ring_matrix::whatever_befalls_a_ring_no -- --nocapture
//! MURMUR_RING_SCENARIOS=100 cargo test -p murmur --test lab ring_matrix::whatever_befalls_a_ring_that -- --nocapture
//! ```
//!
//! The second has a ring whose driver guesses, which is hit when guesses have just turned out wrong. At the end a table says after
//! which time the streams went on, by what was done. (With `cargo nextest` a test ends after five minutes.)
//!
//! A fault counts only if it has met a stream. A scenario whose streams were over is played again, and its moment is earlier.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::PathBuf,
    thread::{self, ScopedJoinHandle},
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
        signal, until, until_at,
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
/// What runs by default is chosen from so many.
const CHOICE: u64 = 1000;
/// What runs by default where guesses are made.
const GUESSED_SCENARIOS: [u64; 3] = [1, 3, 4];
/// How often a scenario is played whose streams are over before they are hit: on a busy machine who looks for the moment may come late.
const ATTEMPTS: u64 = 4;
/// Of so many scenarios one may meet no stream.
const IN_VAIN_ONE_IN: usize = 20;
/// So many pieces of text come after a fault that has met a stream: more than are on their way at any time.
const PIECES_AFTER_FAULT: usize = 4;
/// One way to a machine of a ring that guesses: so long that it pays.
const WAY_MS: f64 = 4.0;
/// Part of the guesses that are made wrong there.
const SPOILT: &str = "0.3";
/// What goes to a machine while it is told what the one held that it replaces, so that this takes a moment: 2,000 rows a second.
const REPLAY_MBIT_S: f64 = 0.5;

/// Who is hit.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Victim {
    First,
    Middle,
    Last,
    /// The machine that the streams run on, which holds a stage.
    Own,
    /// Who replaces a machine that died before, as soon as it does.
    Replacement,
    /// The same, while it is given what the dead one held.
    Replaying,
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
    /// So many tokens have come, and a guess has just been wrong: rows that are on their way are in vain.
    Rollback(u64),
}

impl Phase {
    /// The moment at a further attempt, after the streams were over.
    fn at(self, attempt: u64) -> Self {
        let earlier = |tokens: u64| (tokens >> (2 * attempt)).max(1);
        match self {
            Self::Opening | Self::Prefill(_) => self,
            Self::Decode(tokens) => Self::Decode(earlier(tokens)),
            Self::Cancel(tokens) => Self::Cancel(earlier(tokens)),
            Self::Rollback(tokens) => Self::Rollback(earlier(tokens)),
        }
    }
}

/// How.
#[derive(Debug, Clone, Copy)]
enum Fault {
    NodeKilled,
    EngineKilled,
    /// It hangs until its node ends it.
    EngineStopped,
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
    /// How often it was played before.
    attempt: u64,
}

impl Scenario {
    fn new(seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let first = random.random_range(0..3);
        let stages = [first, (first + random.random_range(1..3)) % 3];
        let while_for = Duration::from_millis(random.random_range(400..4000));
        let victims = [
            Victim::First,
            Victim::Middle,
            Victim::Last,
            Victim::Own,
            Victim::Replacement,
            Victim::Replaying,
            Victim::Two,
        ];
        let victim = victims[random.random_range(0..victims.len())];
        let tokens = random.random_range(1..=ANSWER_TOKENS / 3);
        let phases =
            [Phase::Opening, Phase::Prefill(random.random_range(1..=3)), Phase::Decode(tokens), Phase::Cancel(tokens)];
        let phase = phases[random.random_range(0..phases.len())];
        let faults = [
            Fault::NodeKilled,
            Fault::EngineKilled,
            Fault::EngineStopped,
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
        Self { seed, streams, driver, stages, victim, phase, fault, attempt: 0 }
    }

    /// The one of the same number where guesses are made.
    fn guessed(seed: u64) -> Self {
        let tokens = StdRng::seed_from_u64(seed).random_range(1..=ANSWER_TOKENS / 3);
        Self { phase: Phase::Rollback(tokens), ..Self::new(seed) }
    }

    /// The kinds of its victim, phase and fault.
    fn kinds(&self) -> [String; 3] {
        let Self { victim, phase, fault, .. } = self;
        let kind = |shown: String| shown.split('(').next().unwrap().to_owned();
        [format!("{victim:?}"), format!("{phase:?}"), format!("{fault:?}")].map(kind)
    }

    /// Numbers of a few scenarios in which every victim, phase and fault is, as in all together.
    fn some_of_each() -> Vec<u64> {
        let all: Vec<_> = (0..CHOICE).map(|seed| Self::new(seed).kinds()).collect();
        let mut missing: BTreeSet<&String> = all.iter().flatten().collect();
        let mut chosen = Vec::new();
        while !missing.is_empty() {
            let adds = |seed: &u64| all[*seed as usize].iter().filter(|kind| missing.contains(kind)).count();
            let seed = (0..CHOICE).rev().max_by_key(adds).unwrap();
            for kind in &all[seed as usize] {
                missing.remove(kind);
            }
            chosen.push(seed);
        }
        chosen
    }

    /// A request that nobody has made before.
    fn request(&self, n: u64) -> Value {
        let mut random = StdRng::seed_from_u64(1000 * self.seed + 10 * self.attempt + n);
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
        let Self { seed, streams, victim, fault, .. } = self;
        let phase = self.phase.at(self.attempt);
        write!(f, "scenario {seed}: {streams} streams, {victim:?}, {phase:?}, {fault:?}")
    }
}

/// The machines, and what they are compared with.
struct World<'a> {
    lab: &'a Lab,
    file: PathBuf,
    join: String,
    /// Between a machine and the others, as long as nothing is wrong.
    link: Link,
    /// What the machines are started with, beside their parts.
    further: Vec<String>,
    machines: Vec<Node<'a>>,
    /// In the mesh and never hit.
    client: Node<'a>,
    /// In no mesh, with all layers.
    whole: Node<'a>,
}

const SIZES: [&str; 3] = ["--alias=ring", "--ctx=1024", "--parallel=8"];

impl<'a> World<'a> {
    /// With guesses, the machines are some way from each other.
    fn new(lab: &'a Lab, files: &Home, guesses: bool) -> Self {
        let file = files.path().join("ring.gguf");
        let (link, further) = match guesses {
            true => {
                let draft = ["--draft", file.to_str().unwrap(), "--draft-spoilt", SPOILT];
                (Link::delay(WAY_MS), draft.map(str::to_owned).to_vec())
            }
            false => (Link::default(), Vec::new()),
        };
        let spec = Spec::tiny("llama").unwrap().with_weights(Weights::Q8_0).with_layers(LAYERS);
        synth::write(&spec, &file).unwrap();
        let (host, home) = (lab.host("client").unwrap(), Home::new());
        run(host, &home, ["mesh", "create", "home"]).succeeds();
        let client = Node::client(host, home, &[&UNAIDED[..], &["--mesh=home"]].concat());
        let whole = Node::serving_files(lab.host("whole").unwrap(), Home::new(), std::slice::from_ref(&file), &SIZES);
        let mut world = Self { lab, file, join: client.join(), link, further, machines: Vec::new(), client, whole };
        MACHINES.iter().for_each(|name| world.set_link(name, &world.link));
        world.machines = MACHINES.iter().map(|name| world.machine(name, Home::new())).collect();
        world.recovers();
        world
    }

    fn machine(&self, name: &str, home: Home) -> Node<'a> {
        let part = format!("--max-layers={}", LAYERS / 3);
        let further: Vec<&str> = self.further.iter().map(String::as_str).collect();
        let arguments = [&SIZES[..], &UNAIDED, &[&part, &self.join], &further].concat();
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
                Victim::Replacement | Victim::Replaying if !ring.contains(&driver) => return None,
                Victim::Replacement => vec![ring[scenario.stages[0]]],
                // Hidden states take longer than tokens.
                Victim::Replaying => vec![ring[*scenario.stages.iter().find(|stage| **stage > 0).unwrap()]],
            };
            (!victims.contains(&driver)).then_some((driver, victims))
        });
        cast.next().unwrap()
    }

    /// Waits for somebody who replaces a machine that is dead, unless the streams are over before.
    fn replacement(&self, dead: usize, layers: &Value, is_over: impl Fn() -> bool) -> Option<usize> {
        let mut replaces = None;
        before_the_end("somebody replaces the dead machine", is_over, || {
            let mut others = (0..MACHINES.len()).filter(|&at| at != dead);
            replaces = others.find(|&at| &self.machines[at].model_status()["ring"]["held"] == layers);
            replaces.is_some()
        });
        replaces
    }

    /// Waits until a driver gives a machine what it has to know of the streams, unless they are over before.
    fn is_told(&self, driver: &Node<'_>, at: usize, is_over: impl Fn() -> bool) -> bool {
        let name = MACHINES[at];
        self.set_link(name, &Link::rate(REPLAY_MBIT_S));
        before_the_end(&format!("{name} is told what it has to know"), is_over, || {
            let stages = driver.model_status()["stages"].take();
            let stages = stages.as_array().map(Vec::as_slice).unwrap_or_default();
            stages.iter().any(|stage| stage["node"] == self.machines[at].id())
        })
    }

    fn set_link(&self, name: &str, link: &Link) {
        for wire in [Wire::Up(name.into()), Wire::Down(name.into())] {
            self.lab.set_link(&wire, link).unwrap();
        }
    }

    fn hit(&self, at: usize, fault: Fault) {
        let node = &self.machines[at];
        match fault {
            Fault::NodeKilled => node.dies(),
            Fault::EngineKilled => signal(&node.hosting_process(), "KILL"),
            Fault::EngineStopped => signal(&node.hosting_process(), "STOP"),
            Fault::NodeStopped(_) => node.server.signal("STOP"),
            Fault::LinkDead(_) => self.lab.isolate(node.host.name()).unwrap(),
            Fault::LinkLossy => self.set_link(node.host.name(), &Link { loss: 0.01, ..self.link }),
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
        self.set_link(MACHINES[at], &self.link);
        if let Fault::NodeKilled = fault {
            let Node { host, home, server } = self.machines.remove(at);
            drop(server);
            let machine = self.machine(host.name(), home);
            self.machines.insert(at, machine);
        }
    }

    /// Lets a scenario happen until its fault meets a stream, and says after which times the streams went on. None: it never met one.
    fn plays(&mut self, mut scenario: Scenario) -> Option<Vec<Duration>> {
        for attempt in 0..ATTEMPTS {
            scenario.attempt = attempt;
            eprintln!("{scenario}");
            let resumed = self.attempts(&scenario);
            if resumed.is_some() {
                return resumed;
            }
            eprintln!("  the streams were over before");
        }
        None
    }

    /// Lets a scenario happen once. None: the streams were over.
    fn attempts(&mut self, scenario: &Scenario) -> Option<Vec<Duration>> {
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
            let is_over = || streams.iter().all(ScopedJoinHandle::is_finished);
            let mut is_time = world.waits_for(node, scenario.phase.at(scenario.attempt), is_over);
            if is_time && let Victim::Replacement | Victim::Replaying = scenario.victim {
                let layers = world.machines[victims[0]].model_status()["ring"]["held"].take();
                world.hit(victims[0], Fault::NodeKilled);
                dead.append(&mut victims);
                victims.extend(world.replacement(dead[0], &layers, is_over));
                let is_told = |at: &usize| world.is_told(node, *at, is_over);
                is_time =
                    !victims.is_empty() && (scenario.victim == Victim::Replacement || victims.iter().all(is_told));
            }
            let began = Instant::now();
            if is_time {
                victims.iter().for_each(|&at| world.hit(at, scenario.fault));
            }
            let struck = is_time.then(|| (began, Instant::now()));
            drop(given_up);
            if is_time && let Fault::NodeStopped(pause) | Fault::LinkDead(pause) = scenario.fault {
                thread::sleep(pause);
                victims.iter().for_each(|&at| world.relieve(at, scenario.fault));
            }
            (struck, streams.into_iter().map(|stream| stream.join().unwrap()).collect::<Vec<(End, Completion)>>())
        });
        let (mut resumed, mut has_met) = (Vec::new(), false);
        for ((end, stream), request) in streams.into_iter().zip(&requests) {
            assert_eq!(end, End::Finished("length".into()));
            assert_eq!(stream.text, self.whole.complete(request));
            let Some((began, done)) = struck else { continue };
            resumed.extend(pause(began, &stream.arrivals));
            has_met |= stream.arrivals.iter().filter(|at| **at > done).count() >= PIECES_AFTER_FAULT;
        }
        dead.into_iter().for_each(|at| self.repair(at, Fault::NodeKilled));
        // What was not hit needs its link at most.
        let done = if struck.is_some() { scenario.fault } else { Fault::LinkLossy };
        victims.iter().for_each(|&at| self.repair(at, done));
        self.recovers();
        let again = &requests[0];
        let text = self.whole.complete(again);
        for at in victims {
            assert_eq!(self.machines[at].complete(again), text, "{} afterwards", MACHINES[at]);
        }
        assert_eq!(self.client.complete(again), text, "the client afterwards");
        has_met.then_some(resumed)
    }

    /// Waits for a moment, and says whether it came before the streams were over.
    fn waits_for(&self, node: &Node<'_>, phase: Phase, is_over: impl Fn() -> bool) -> bool {
        let (field, count) = match phase {
            Phase::Opening => return true,
            Phase::Prefill(chunks) => ("prompt_tokens_done", chunks * CHUNK_ROWS),
            Phase::Decode(tokens) | Phase::Cancel(tokens) | Phase::Rollback(tokens) => ("generated_tokens", tokens),
        };
        let has_come = before_the_end(&format!("{field} is {count}"), &is_over, || {
            let requests = node.status()["requests"].take();
            requests.as_array().unwrap().iter().any(|request| request[field].as_u64() >= Some(count))
        });
        let wrong_guesses = || {
            let model = node.model_status();
            let count = |what: &str| model[what].as_u64().unwrap();
            count("guessed_tokens") - count("right_tokens")
        };
        if let Phase::Rollback(_) = phase {
            let before = wrong_guesses();
            return has_come && before_the_end("a guess is wrong", is_over, || wrong_guesses() > before);
        }
        has_come
    }
}

/// Asks again and again until something is so. False: the streams were over before.
fn before_the_end(what: &str, is_over: impl Fn() -> bool, mut ask: impl FnMut() -> bool) -> bool {
    until_at(what, Duration::from_millis(5), || {
        // In this order: what was so at the end has come.
        let was_over = is_over();
        if ask() { Some(true) } else { was_over.then_some(false) }
    })
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

/// Plays the scenarios of these numbers, or of those that the environment names.
fn play(seeds: &[u64], guesses: bool) {
    let Some(lab) = lab(&Topology::of_hosts(MACHINES.into_iter().chain(["client", "whole"]))) else { return };
    let seeds: Vec<u64> = match (number("MURMUR_RING_SEED"), number("MURMUR_RING_SCENARIOS")) {
        (None, None) => seeds.to_vec(),
        (first, count) => (first.unwrap_or(0)..).take(count.unwrap_or(1) as usize).collect(),
    };
    let files = Home::new();
    let mut world = World::new(&lab, &files, guesses);
    let (mut resumed, mut in_vain): (BTreeMap<String, Vec<Duration>>, Vec<u64>) = Default::default();
    for &seed in &seeds {
        let scenario = if guesses { Scenario::guessed(seed) } else { Scenario::new(seed) };
        let fault = match scenario.fault {
            Fault::NodeKilled => "node killed",
            Fault::EngineKilled => "engine killed",
            Fault::EngineStopped => "engine stopped",
            Fault::NodeStopped(_) => "node stopped",
            Fault::LinkDead(_) => "link dead",
            Fault::LinkLossy => "link lossy",
        };
        let whose = if scenario.victim == Victim::Own { "own " } else { "" };
        let begun = Instant::now();
        let Some(times) = world.plays(scenario) else {
            in_vain.push(seed);
            continue;
        };
        let ms: Vec<u128> = times.iter().map(Duration::as_millis).collect();
        eprintln!("  resumed after {ms:?} ms, over after {:.1?}", begun.elapsed());
        resumed.entry(format!("{whose}{fault}")).or_default().extend(times);
    }
    print_table(&mut resumed);
    // Who is hit while he replays may be done each time before he is.
    assert!(
        in_vain.len() * IN_VAIN_ONE_IN < seeds.len(),
        "scenarios that met no stream in {ATTEMPTS} attempts: {in_vain:?}"
    );
}

#[test]
fn whatever_befalls_a_ring_no_stream_loses_or_changes_a_token() {
    play(&Scenario::some_of_each(), false);
}

#[test]
fn whatever_befalls_a_ring_that_takes_guesses_back_no_stream_loses_or_changes_a_token() {
    play(&GUESSED_SCENARIOS, true);
}
