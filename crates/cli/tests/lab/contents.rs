//! Models that a machine has not got, fetched from those that have them.

use std::path::Path;

use murmur_lab::{Lab, Link, Topology, Wire};
use serde_json::{Value, json};

use crate::{
    common::{Home, until},
    world::{DEMO, Node, UNAIDED, lab, run, short_story, with},
};

/// At this rate the file of the demo model takes some seconds.
const SLOW: f64 = 6.0;

/// What a machine has of the file of the demo model, and the length of that. Nothing, before it has begun.
fn held(machine: &Node<'_>) -> (u64, u64) {
    let contents = &machine.status()["contents"][0];
    let bytes = |what: &str| contents.get(what).and_then(Value::as_u64).unwrap_or(0);
    (bytes("held_bytes"), bytes("file_bytes"))
}

/// It has this part of the file at least.
#[track_caller]
fn waits_for_part(machine: &Node<'_>, part: f64) -> u64 {
    until(&format!("{} has a part of the file", machine.host.name()), || {
        let (held_bytes, file_bytes) = held(machine);
        (file_bytes > 0 && held_bytes as f64 >= part * file_bytes as f64).then_some(held_bytes)
    })
}

fn slow_down(lab: &Lab, sources: &[&str]) {
    for source in sources {
        lab.set_link(&Wire::Up((*source).to_owned()), &Link::rate(SLOW)).unwrap();
    }
}

fn is_equal(one: &Path, other: &Path) -> bool {
    std::fs::read(one).unwrap() == std::fs::read(other).unwrap()
}

#[test]
fn a_machine_that_names_a_model_of_the_mesh_fetches_it_and_serves_it_when_the_source_is_gone() {
    let Some(lab) = lab(&Topology::of_hosts(["has", "wants"])) else { return };
    let has = Node::founder(lab.host("has").unwrap(), Home::new(), &UNAIDED);
    let wants = Node::fetching(lab.host("wants").unwrap(), Home::new(), &with(&UNAIDED, &has.join()));
    wants.waits_for_its_models();
    let (held_bytes, file_bytes) = held(&wants);
    assert_eq!(held_bytes, file_bytes);
    let text = has.complete(&short_story());
    has.dies();
    assert_eq!(wants.complete(&short_story()), text);
    // It is one of the models of this machine now.
    wants.dies();
    let Node { host, home, .. } = wants;
    let again = Node::fetching(host, home, &[&UNAIDED[..], &["--mesh=home"]].concat());
    again.waits_for_its_models();
    assert_eq!(again.complete(&short_story()), text);
}

#[test]
fn machines_without_the_file_fetch_only_the_layers_that_they_hold_and_give_the_text_of_the_whole() {
    let Some(lab) = lab(&Topology::of_hosts(["has", "second", "third", "whole"])) else { return };
    let part = with(&UNAIDED, "--max-layers=5");
    let has = Node::founder(lab.host("has").unwrap(), Home::new(), &part);
    let join = has.join();
    let others =
        ["second", "third"].map(|name| Node::fetching(lab.host(name).unwrap(), Home::new(), &with(&part, &join)));
    let whole = Node::serving(lab.host("whole").unwrap(), Home::new(), &[]);
    for machine in others.iter().chain([&has]) {
        machine.waits_for_its_models();
        assert_eq!(machine.complete(&short_story()), whole.complete(&short_story()));
    }
    for machine in &others {
        let (held_bytes, file_bytes) = held(machine);
        // Five of twelve layers at most, an end of the model, and the header.
        assert!(held_bytes < file_bytes * 3 / 4, "{} has {held_bytes} of {file_bytes} bytes", machine.host.name());
    }
}

#[test]
fn a_pull_goes_on_when_its_source_dies_and_after_its_own_death_with_what_had_come() {
    let Some(lab) = lab(&Topology::of_hosts(["first", "second", "wants"])) else { return };
    let first = Node::founder(lab.host("first").unwrap(), Home::new(), &UNAIDED);
    let join = first.join();
    let second = Node::serving(lab.host("second").unwrap(), Home::new(), &with(&UNAIDED, &join));
    slow_down(&lab, &["first", "second"]);
    let host = lab.host("wants").unwrap();
    let wants = Node::fetching(host, Home::new(), &with(&UNAIDED, &join));
    let before = waits_for_part(&wants, 0.3);
    wants.dies();
    let Node { home, .. } = wants;
    // Nothing that was checked is fetched again.
    let wants = Node::fetching(host, home, &[&UNAIDED[..], &["--mesh=home"]].concat());
    let after = until("it has begun again", || Some(held(&wants).0).filter(|held| *held > 0));
    assert!(after >= before, "{after} bytes were kept of {before}");
    waits_for_part(&wants, 0.6);
    first.dies();
    wants.waits_for_its_models();
    let path = wants.home.data_dir().join("models/contents");
    let digest = wants.status()["contents"][0]["digest"].as_str().unwrap().to_owned();
    assert!(is_equal(&path.join(digest).join("model.gguf"), Path::new(DEMO)));
    assert_eq!(wants.complete(&short_story()), second.complete(&short_story()));
}

#[test]
fn a_model_of_the_mesh_is_found_and_pulled_into_the_store_of_a_client() {
    let Some(lab) = lab(&Topology::of_hosts(["has", "client"])) else { return };
    let has = Node::founder(lab.host("has").unwrap(), Home::new(), &UNAIDED);
    let client = Node::client(lab.host("client").unwrap(), Home::new(), &with(&UNAIDED, &has.join()));
    let api = format!("--api={}", client.server.address);
    let here = |arguments: &[&str]| run(client.host, &client.home, [arguments, &["--json", &api]].concat());
    let found = until("the client knows the file", || {
        here(&["models", "search", "dem"]).succeeds().json().as_array().unwrap().first().cloned()
    });
    assert_eq!(
        (&found["name"], &found["held_bytes"], &found["nodes"][0]["node"]),
        (&json!("demo"), &json!(0), &json!(has.id()))
    );
    assert_eq!(here(&["models", "search", "nothing-of-that-name"]).succeeds().json(), json!([]));
    let pulled = here(&["models", "pull", "demo"]).succeeds().json();
    assert!(is_equal(Path::new(pulled["path"].as_str().unwrap()), Path::new(DEMO)), "{pulled}");
    let listed = here(&["models", "ls"]).succeeds().json();
    assert_eq!((&listed[0]["name"], &listed[0]["present"]), (&json!("demo"), &json!(true)), "{listed}");
    // Once more is nothing to do.
    here(&["models", "pull", "demo"]).succeeds();
    assert_eq!(here(&["models", "fsck"]).succeeds().json()[0]["ok"], json!(true));
    let freed = || here(&["models", "gc"]).succeeds().json()["freed_bytes"].clone();
    here(&["models", "pin", "demo"]).succeeds();
    assert_eq!(freed(), json!(0), "it is pinned");
    here(&["models", "pin", "--off", "demo"]).succeeds();
    // Nobody uses it: neither does the running node, which only has it.
    assert_eq!(freed(), json!(std::fs::metadata(DEMO).unwrap().len()));
    until("the node knows that it has gone", || (client.status()["contents"] == json!([])).then_some(()));
    client.dies();
    assert_eq!(here(&["models", "fsck"]).code, Some(1), "the store names what is gone");
}

#[test]
fn who_keeps_its_files_answers_and_hands_out_none() {
    let Some(lab) = lab(&Topology::of_hosts(["keeps", "client"])) else { return };
    let keeps = Node::founder(lab.host("keeps").unwrap(), Home::new(), &with(&UNAIDED, "--keep-files"));
    let client = Node::client(lab.host("client").unwrap(), Home::new(), &with(&UNAIDED, &keeps.join()));
    client.waits_for_a_model();
    assert_eq!(client.complete(&short_story()), keeps.complete(&short_story()));
    assert_eq!(client.get("/api/models").1, json!({"models": []}));
}
