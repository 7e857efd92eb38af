//! A model of which no machine holds all layers: spread over several, it gives the text that one machine gives.

use murmur_lab::{Lab, Topology};

use crate::{
    common::{Home, http::End, until},
    world::{Node, STORY_BYTES_BEFORE_FAULT, UNAIDED, lab, long_story, short_story, with},
};

/// Of the twelve layers of the demo model each machine holds five at most.
const PART: &str = "--max-layers=5";

/// A private mesh of machines that hold a part of the model each.
fn mesh<'a, const N: usize>(lab: &'a Lab, names: [&str; N]) -> [Node<'a>; N] {
    let mut join = String::new();
    names.map(|name| {
        let host = lab.host(name).unwrap();
        if join.is_empty() {
            let founder = Node::founder(host, Home::new(), &with(&UNAIDED, PART));
            join = founder.join();
            return founder;
        }
        Node::serving(host, Home::new(), &with(&with(&UNAIDED, PART), &join))
    })
}

/// A machine that holds all of it, in no mesh.
fn whole(lab: &Lab) -> Node<'_> {
    Node::serving(lab.host("whole").unwrap(), Home::new(), &[])
}

#[test]
fn three_machines_that_hold_a_part_each_give_the_text_of_one_that_holds_all() {
    let Some(lab) = lab(&Topology::of_hosts(["one", "two", "three", "client", "whole"])) else { return };
    let machines = mesh(&lab, ["one", "two", "three"]);
    let whole = whole(&lab);
    machines.iter().for_each(Node::waits_for_its_models);
    for machine in &machines {
        let held = machine.model_status()["ring"]["held"].clone();
        let layers = held[1].as_u64().unwrap() - held[0].as_u64().unwrap();
        assert!((1..=5).contains(&layers), "{held}");
        assert_eq!(machine.complete(&short_story()), whole.complete(&short_story()));
        let hops = until("every way around the ring is known", || {
            let model = machine.model_status();
            model["stages"].as_array()?.iter().map(|stage| stage["hop_us"].as_u64()).collect::<Option<Vec<_>>>()
        });
        assert_eq!(hops.len(), 3);
    }
    let join = machines[0].join();
    let client = Node::client(lab.host("client").unwrap(), Home::new(), &with(&UNAIDED, &join));
    client.waits_for_servers_of_demo(3);
    assert_eq!(client.complete(&long_story()), whole.complete(&long_story()));
}

#[test]
fn a_machine_that_dies_in_mid_stream_is_replaced_by_one_that_has_room_and_no_token_changes() {
    let Some(lab) = lab(&Topology::of_hosts(["one", "two", "three", "four", "whole"])) else { return };
    let machines = mesh(&lab, ["one", "two", "three", "four"]);
    let whole = whole(&lab);
    machines.iter().for_each(Node::waits_for_its_models);
    let (driver, others) = machines.split_first().unwrap();
    let stages = driver.model_status()["stages"].take();
    let of_its_ring =
        |machine: &&Node<'_>| stages.as_array().unwrap().iter().any(|stage| stage["node"] == machine.id());
    let dies = others.iter().find(of_its_ring).unwrap();
    let mut stream = driver.begin(&long_story());
    stream.read(STORY_BYTES_BEFORE_FAULT);
    dies.dies();
    assert_eq!(stream.finish(), End::Finished("length".into()));
    assert_eq!(stream.text, whole.complete(&long_story()));
    let stages = driver.model_status()["stages"].take();
    let lost = stages.as_array().unwrap().iter().any(|stage| stage["restarts"].as_u64() > Some(0));
    assert!(lost, "it was over before the machine died: {stages}");
}
