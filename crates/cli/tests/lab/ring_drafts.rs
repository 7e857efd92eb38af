//! Rings for which a machine nearby guesses: it has a small model of the same vocabulary, and the one that drives the ring has none.

use murmur_gguf::synth::{self, Spec, Weights};
use murmur_lab::{Lab, Link, Topology, Wire};
use serde_json::{Value, json};

use crate::{
    common::{Home, http::End, until},
    world::{Node, UNAIDED, lab, run},
};

/// One way to or from the machine that is far, so that a way around the ring takes twice as long and machines nearby are much nearer.
const WAY_MS: f64 = 40.0;
/// Tokens of a stream that is long enough to be guessed for, and for the one that guesses to die in.
const STREAM_TOKENS: u64 = 600;
/// At such a temperature the noise, which is the same for both, says more than what two made-up models think.
const TEMPERATURE: f64 = 5.0;

/// A ring of two machines far from each other.
struct Ring<'a> {
    driver: Node<'a>,
    _far: Node<'a>,
    /// In no mesh, with all layers.
    whole: Node<'a>,
}

impl<'a> Ring<'a> {
    fn new(lab: &'a Lab, files: &Home, draft: &str) -> Self {
        for wire in [Wire::Up("far".into()), Wire::Down("far".into())] {
            lab.set_link(&wire, &Link::delay(WAY_MS)).unwrap();
        }
        let file = files.path().join("ring.gguf");
        synth::write(&Spec::tiny("llama").unwrap().with_weights(Weights::Q8_0).with_layers(12), &file).unwrap();
        let sizes = ["--alias=ring", "--ctx=1024"];
        let machine = |name: &str, further: &[&str]| {
            let home = Home::new();
            if further.contains(&"--mesh=home") {
                run(lab.host(name).unwrap(), &home, ["mesh", "create", "home"]).succeeds();
            }
            Node::serving_files(lab.host(name).unwrap(), home, std::slice::from_ref(&file), &[&sizes, further].concat())
        };
        let part = [&["--max-layers=6"], &UNAIDED[..]].concat();
        let driver = machine("driver", &[&part[..], &["--mesh=home", draft]].concat());
        let join = driver.join();
        Ring { _far: machine("far", &[&part[..], &[&join]].concat()), whole: machine("whole", &[]), driver }
    }

    /// A machine beside the driver that serves a small model.
    fn neighbour(&self, lab: &'a Lab, files: &Home) -> Node<'a> {
        let file = files.path().join("small.gguf");
        synth::write(&Spec::tiny("llama").unwrap().with_weights(Weights::Q8_0).with_layers(1), &file).unwrap();
        let join = self.driver.join();
        let arguments = [&["--ctx=1024", &join], &UNAIDED[..]].concat();
        Node::serving_files(lab.host("near").unwrap(), Home::new(), &[file], &arguments)
    }

    fn right_tokens(&self) -> u64 {
        self.driver.model_status()["right_tokens"].as_u64().unwrap_or(0)
    }
}

fn request(seed: u64, tokens: u64) -> Value {
    json!({
        "model": "ring", "prompt": "ba ce di fo gu", "max_tokens": tokens, "seed": seed, "ignore_eos": true,
        "temperature": TEMPERATURE,
    })
}

#[test]
fn a_machine_nearby_guesses_for_a_ring_and_when_it_is_killed_the_text_goes_on_unchanged() {
    let Some(lab) = lab(&Topology::of_hosts(["driver", "far", "near", "whole"])) else { return };
    let files = Home::new();
    let ring = Ring::new(&lab, &files, "--draft=auto");
    ring.driver.waits_for_its_models();
    let near = ring.neighbour(&lab, &files);
    near.waits_for_its_models();
    until("the driver knows the neighbour's model", || {
        let peers = ring.driver.peers();
        peers.iter().any(|peer| peer["models"][0]["name"] == "small" && peer["rtt_ms"].is_number()).then_some(())
    });
    let mut stream = ring.driver.begin(&request(1, STREAM_TOKENS));
    until("the neighbour guesses", || (ring.driver.model_status()["draft"]["node"] == near.id()).then_some(()));
    assert_eq!(ring.driver.model_status()["draft"]["model"], "small");
    assert_eq!(near.status()["requests"][0]["from"], ring.driver.id());
    until("some of what it says is right", || (ring.right_tokens() > 20).then_some(()));
    near.dies();
    assert_eq!(ring.driver.model_status()["requests_running"], 1, "the stream was over before the neighbour died");
    until("nobody guesses any more", || ring.driver.model_status()["draft"].is_null().then_some(()));
    assert_eq!(stream.finish(), End::Finished("length".into()));
    assert_eq!(stream.text, ring.whole.complete(&request(1, STREAM_TOKENS)));
    assert_eq!(ring.driver.complete(&request(2, 40)), ring.whole.complete(&request(2, 40)));
}

#[test]
fn a_model_that_the_user_names_guesses_however_far_its_machine_is() {
    let Some(lab) = lab(&Topology::of_hosts(["driver", "far", "near", "whole"])) else { return };
    for wire in [Wire::Up("near".into()), Wire::Down("near".into())] {
        lab.set_link(&wire, &Link::delay(WAY_MS)).unwrap();
    }
    let files = Home::new();
    let ring = Ring::new(&lab, &files, "--draft=peer:small");
    ring.driver.waits_for_its_models();
    let near = ring.neighbour(&lab, &files);
    near.waits_for_its_models();
    let mut stream = ring.driver.begin(&request(1, STREAM_TOKENS));
    until("the named model guesses", || (ring.driver.model_status()["draft"]["node"] == near.id()).then_some(()));
    assert_eq!(stream.finish(), End::Finished("length".into()));
    assert_eq!(stream.text, ring.whole.complete(&request(1, STREAM_TOKENS)));
}
