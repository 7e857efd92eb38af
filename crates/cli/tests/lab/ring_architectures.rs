//! Every kind of model that can be cut, over rings of every size: the tokens and their log-probabilities are those of the
//! machine that holds all of it, to the last digit.

use std::{path::PathBuf, thread};

use murmur_gguf::synth::{self, Spec, Weights};
use murmur_lab::Topology;
use serde_json::{Value, json};

use crate::{
    common::Home,
    world::{Node, UNAIDED, lab},
};

/// Of any model each machine holds so many layers: where the most particular can be cut.
const LAYERS_EACH: u32 = 4;
/// Answers that are asked for at once.
const COMPANY: u64 = 8;
/// Models that the machines of a ring hold at once, each in processes of its own.
const MODELS_AT_ONCE: usize = 5;

/// The made-up models that can be cut.
fn presets() -> Vec<&'static str> {
    Spec::tiny_presets().filter(|name| Spec::tiny(name).unwrap().arch.can_slice()).collect()
}

/// The model with as many layers as so many machines can hold.
fn model(home: &Home, preset: &str, machines: u32) -> PathBuf {
    let path = home.path().join(format!("{preset}.gguf"));
    let spec = Spec::tiny(preset).unwrap().with_weights(Weights::Q8_0).with_layers(LAYERS_EACH * machines);
    synth::write(&spec, &path).unwrap();
    path
}

/// A request whose prompt is longer than the windows of the models that have any, and than a chunk if `n` is even.
fn request(preset: &str, n: u64, temperature: f32) -> Value {
    let words = ["ba", "ce", "di", "fo", "gu", "hel", "jim", "kor"];
    let length = if n.is_multiple_of(2) { 150 } else { 20 };
    let prompt: Vec<_> = (0..length).map(|i| words[((i * i + n * (i + 1)) % 8) as usize]).collect();
    json!({
        "model": preset, "prompt": prompt.join(" "), "max_tokens": 12, "temperature": temperature, "seed": n, "logprobs": 3,
        "ignore_eos": true,
    })
}

fn rings_agree_with_the_whole(machines: u32) {
    for some in presets().chunks(MODELS_AT_ONCE) {
        rings_of_these_agree(some, machines);
    }
}

fn rings_of_these_agree(presets: &[&str], machines: u32) {
    let names: Vec<String> = (0..machines).map(|n| format!("m{n}")).collect();
    let hosts = names.iter().map(String::as_str);
    let Some(lab) = lab(&Topology::of_hosts(hosts.clone().chain(["whole"]))) else { return };
    let files = Home::new();
    let files: (_, Vec<PathBuf>) = (&files, presets.iter().map(|preset| model(&files, preset, machines)).collect());
    let sizes = ["--ctx=256", "--parallel=8"];
    let whole = Node::serving_files(lab.host("whole").unwrap(), Home::new(), &files.1, &sizes);
    let part = format!("--max-layers={LAYERS_EACH}");
    let mut ring: Vec<Node<'_>> = Vec::new();
    for name in hosts {
        let (host, home) = (lab.host(name).unwrap(), Home::new());
        let way = match ring.first() {
            Some(founder) => founder.join(),
            None => {
                crate::world::run(host, &home, ["mesh", "create", "home"]).succeeds();
                "--mesh=home".to_owned()
            }
        };
        ring.push(Node::serving_files(host, home, &files.1, &[&sizes[..], &UNAIDED, &[&part, &way]].concat()));
    }
    ring.iter().chain([&whole]).for_each(Node::waits_for_its_models);
    for (at, preset) in presets.iter().enumerate() {
        let stages = ring[0].status()["models"][at]["stages"].as_array().unwrap().len();
        assert_eq!(stages, machines as usize, "{preset}");
        for asked in [request(preset, 2, 0.0), request(preset, 4, 1.0)] {
            assert_eq!(ring[1].choices(&asked), whole.choices(&asked), "{asked}");
        }
        // Long and short prompts, and of each kind some greedy and some sampled.
        let asked: Vec<Value> = (0..COMPANY).map(|n| request(preset, n, (n / 2 % 2) as f32)).collect();
        thread::scope(|scope| {
            let each = asked.iter().zip(ring.iter().cycle());
            let answers: Vec<_> = each.map(|(request, node)| scope.spawn(|| node.choices(request))).collect();
            for (request, answer) in asked.iter().zip(answers) {
                assert_eq!(answer.join().unwrap(), whole.choices(request), "{request}");
            }
        });
    }
}

#[test]
fn every_architecture_over_two_machines_gives_the_tokens_of_one() {
    rings_agree_with_the_whole(2);
}

#[test]
fn every_architecture_over_three_machines_gives_the_tokens_of_one() {
    rings_agree_with_the_whole(3);
}

#[test]
fn every_architecture_over_four_machines_gives_the_tokens_of_one() {
    rings_agree_with_the_whole(4);
}

#[test]
fn every_architecture_over_six_machines_gives_the_tokens_of_one() {
    rings_agree_with_the_whole(6);
}
