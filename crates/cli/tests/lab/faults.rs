//! Networks that fail and come back.

use std::{thread, time::Duration};

use murmur_lab::Topology;

use crate::{
    common::{Home, http::End, until},
    world::{Node, STORY_BYTES_BEFORE_FAULT, UNAIDED, lab, long_story, short_story, with},
};

#[test]
fn both_parts_of_a_partition_go_on_and_are_one_mesh_again_when_it_heals() {
    let Some(lab) = lab(&Topology::of_hosts(["left", "right", "client", "late"])) else { return };
    let host = |name| lab.host(name).unwrap();
    let right = Node::founder(host("right"), Home::new(), &UNAIDED);
    let join = right.join();
    let ways = with(&UNAIDED, &join);
    let left = Node::serving(host("left"), Home::new(), &ways);
    let client = Node::client(host("client"), Home::new(), &ways);
    client.waits_for_servers_of_demo(2);

    lab.partition(&[&["left"]]).unwrap();
    for node in [&left, &client] {
        assert_eq!(node.complete(&short_story()), right.complete(&short_story()));
    }
    let late = Node::client(host("late"), Home::new(), &ways);
    late.waits_for_a_model();
    until("the connection between the parts is given up", || (client.path_to(&left) == "unknown").then_some(()));

    lab.heal();
    for (one, other) in [(&left, &late), (&client, &left), (&left, &right)] {
        let what = format!("{} reaches {}", one.host.name(), other.host.name());
        until(&what, || one.path_to(other).starts_with("direct").then_some(()));
    }
    late.waits_for_servers_of_demo(2);
    right.dies();
    assert_eq!(client.complete(&short_story()), left.complete(&short_story()));
}

/// Longer than QUIC keeps a connection over which nothing comes.
const OUTAGE: Duration = Duration::from_secs(10);

#[test]
fn a_stream_goes_on_when_its_own_machine_was_off_the_network_for_ten_seconds() {
    let Some(lab) = lab(&Topology::of_hosts(["server", "client"])) else { return };
    let server = Node::founder(lab.host("server").unwrap(), Home::new(), &UNAIDED);
    let client = Node::client(lab.host("client").unwrap(), Home::new(), &with(&UNAIDED, &server.join()));
    client.waits_for_servers_of_demo(1);
    let mut stream = client.begin(&long_story());
    stream.read(STORY_BYTES_BEFORE_FAULT);
    // A fast machine would be through with the story.
    server.signal_engine("STOP");
    lab.isolate("client").unwrap();
    server.signal_engine("CONT");
    assert_ne!(
        client.get("/api/status").1["node"]["requests"].as_array().unwrap().len(),
        0,
        "it was not cut off in mid-stream"
    );
    thread::sleep(OUTAGE);
    lab.rejoin("client").unwrap();
    assert_eq!(stream.finish(), End::Finished("length".into()));
    assert_eq!(stream.text, server.complete(&long_story()));
}
