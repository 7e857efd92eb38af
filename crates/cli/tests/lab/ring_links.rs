//! What the planner knows of the ways between machines is measured: by those who are at their ends, and with the ring's own traffic.

use murmur_lab::{Lab, Link, Topology};
use serde_json::{Value, json};

use crate::{
    common::{Home, until},
    world::{Node, UNAIDED, lab, with},
};

/// A private mesh of machines that hold this part of the model each.
fn mesh<'a>(lab: &'a Lab, names: &[&str], part: &str) -> Vec<Node<'a>> {
    let mut join = String::new();
    let machine = |name: &&str| {
        let host = lab.host(name).unwrap();
        if join.is_empty() {
            let founder = Node::founder(host, Home::new(), &with(&UNAIDED, part));
            join = founder.join();
            return founder;
        }
        Node::serving(host, Home::new(), &with(&with(&UNAIDED, part), &join))
    };
    names.iter().map(machine).collect()
}

fn plan(node: &Node<'_>) -> Value {
    node.mesh(["plan", "demo", "--json"]).succeeds().json()
}

/// The hops of a plan: from, to, one way in milliseconds.
fn hops<'a>(plan: &'a Value) -> impl Iterator<Item = (&'a str, &'a str, f64)> {
    let hop = |edge: &'a Value| {
        let id = |key: &str| edge[key].as_str().unwrap();
        (id("from"), id("to"), edge["latency_us"].as_f64().unwrap() / 1e3)
    };
    plan["edges"].as_array().unwrap().iter().map(hop)
}

/// One way between two machines that are near to all others, in milliseconds.
const FAR_MS: f64 = 60.0;

#[test]
fn a_ring_does_not_go_the_long_way_between_two_machines_although_its_driver_is_near_to_both() {
    let names = ["one", "two", "three", "four"];
    let Some(lab) = lab(&Topology::of_hosts(names)) else { return };
    lab.set_route("two", "four", &Link::delay(FAR_MS)).unwrap();
    // Twelve layers: the ring needs all of them.
    let machines = mesh(&lab, &names, "--max-layers=3");
    machines.iter().for_each(Node::waits_for_its_models);
    let far = [machines[1].id(), machines[3].id()];
    for machine in [&machines[0], &machines[2]] {
        let made = until("every way of the ring is measured", || {
            let plan = plan(machine);
            let mut remarks = plan["remarks"].as_array().unwrap().iter();
            let guesses = remarks.any(|remark| remark.as_str().unwrap().contains("Nobody has measured"));
            (!guesses).then_some(plan)
        });
        eprintln!("{}", made["text"].as_str().unwrap());
        for (from, to, one_way_ms) in hops(&made) {
            assert!(!far.contains(&from) || !far.contains(&to), "{made}");
            assert!(one_way_ms < FAR_MS / 2.0, "{made}");
        }
    }
}

#[test]
fn a_ring_finds_out_with_its_own_traffic_how_much_goes_over_a_link() {
    let Some(lab) = lab(&Topology::of_hosts(["one", "two"])) else { return };
    // A fifth of what is taken to go over a link that nobody knows.
    lab.set_route("one", "two", &Link::rate(2.0)).unwrap();
    let files = Home::new();
    let model = files.model("demo.gguf");
    let serve = |name: &str, more: &[&str]| {
        let sizes = ["--max-layers=4", "--ctx=4096", "--parallel=1"];
        let arguments = [&UNAIDED[..], &sizes, more].concat();
        Node::serving_files(lab.host(name).unwrap(), Home::new(), std::slice::from_ref(&model), &arguments)
    };
    let one = serve("one", &["--mesh=links"]);
    let two = serve("two", &[&one.join()]);
    one.waits_for_its_models();
    two.waits_for_its_models();
    let row_us = || {
        let edges = plan(&one)["edges"].take();
        edges.as_array().unwrap().iter().find(|edge| !edge["codec"].is_null()).unwrap()["transfer_us"].as_f64().unwrap()
    };
    let guessed_us = row_us();
    let request = json!({"model": "demo", "prompt": "ba ".repeat(3_000), "max_tokens": 1, "ignore_eos": true});
    one.complete(&request);
    // The first figures may still be between the two.
    let measured_us = until("the rate is known", || Some(row_us()).filter(|us| *us > 2.0 * guessed_us));
    eprintln!("a row takes the link {measured_us:.0} us; {guessed_us:.0} us were guessed");
}
