//! A mesh of many.

use std::thread;

use murmur_lab::Topology;

use crate::{
    common::{Home, until},
    world::{Node, UNAIDED, lab, short_story, with},
};

const SERVERS: usize = 3;
const NODES: usize = 20;

#[test]
fn twenty_nodes_know_each_other_and_have_the_models_of_three() {
    let names: Vec<String> = (0..NODES).map(|number| format!("node-{number}")).collect();
    let Some(lab) = lab(&Topology::of_hosts(names.iter().map(String::as_str))) else { return };
    let hosts: Vec<_> = lab.hosts().collect();
    let founder = Node::founder(hosts[0], Home::new(), &UNAIDED);
    let join = founder.join();
    let ways = with(&UNAIDED, &join);
    let guests: Vec<Node<'_>> = thread::scope(|scope| {
        let start = |number: usize| match number < SERVERS {
            true => Node::serving(hosts[number], Home::new(), &ways),
            false => Node::client(hosts[number], Home::new(), &ways),
        };
        let starting: Vec<_> = (1..NODES).map(|number| scope.spawn(move || start(number))).collect();
        starting.into_iter().map(|node| node.join().unwrap()).collect()
    });
    for node in guests.iter().chain([&founder]) {
        until(&format!("{} knows all others", node.host.name()), || (node.peers().len() == NODES - 1).then_some(()));
    }
    for client in &guests[SERVERS - 1..] {
        client.waits_for_servers_of_demo(SERVERS);
    }
    let expected = founder.complete(&short_story());
    thread::scope(|scope| {
        for client in &guests[SERVERS - 1..] {
            scope.spawn(|| assert_eq!(client.complete(&short_story()), expected));
        }
    });
}
