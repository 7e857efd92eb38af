//! Machines that die while they answer: the reader gets the text that nobody's death would have changed.

use std::thread;

use murmur_lab::{Lab, Topology};
use serde_json::json;

use crate::{
    common::{Home, http::End, until},
    world::{Node, STORY_BYTES_BEFORE_FAULT, UNAIDED, lab, long_story, run, serving, with},
};

/// A private mesh of servers and a client, each on a host of its own. Undisturbed, all give the same text.
fn mesh<'a, const N: usize>(lab: &'a Lab, servers: [&str; N]) -> ([Node<'a>; N], Node<'a>) {
    let mut join = String::new();
    let servers = servers.map(|name| {
        let host = lab.host(name).unwrap();
        if join.is_empty() {
            let founder = Node::founder(host, Home::new(), &UNAIDED);
            join = founder.join();
            return founder;
        }
        Node::serving(host, Home::new(), &with(&UNAIDED, &join))
    });
    let client = Node::client(lab.host("client").unwrap(), Home::new(), &with(&UNAIDED, &join));
    client.waits_for_servers_of_demo(N);
    (servers, client)
}

#[test]
fn a_machine_that_dies_before_the_first_token_costs_nothing_but_time() {
    let Some(lab) = lab(&Topology::of_hosts(["one", "two", "client"])) else { return };
    let (servers, client) = mesh(&lab, ["one", "two"]);
    // Whoever is asked takes the request, and no token comes.
    servers.iter().for_each(|server| server.signal_engine("STOP"));
    thread::scope(|scope| {
        let answer = scope.spawn(|| client.complete(&long_story()));
        let is_asked = |server: &&Node<'_>| server.get("/api/status").1["node"]["requests"] != json!([]);
        let first = until("somebody is asked", || servers.iter().find(is_asked));
        first.dies();
        let other = survivor(&servers, &[first]);
        other.signal_engine("CONT");
        assert_eq!(answer.join().unwrap(), other.complete(&long_story()));
    });
}

#[test]
fn a_machine_that_dies_in_mid_stream_changes_no_token() {
    let Some(lab) = lab(&Topology::of_hosts(["one", "two", "client"])) else { return };
    let (servers, client) = mesh(&lab, ["one", "two"]);
    dies_in_mid_stream(&servers, &client, 1);
}

#[test]
fn two_machines_that_die_one_after_the_other_in_mid_stream_change_no_token() {
    let Some(lab) = lab(&Topology::of_hosts(["one", "two", "three", "client"])) else { return };
    let (servers, client) = mesh(&lab, ["one", "two", "three"]);
    dies_in_mid_stream(&servers, &client, 2);
}

/// Two servers; the one that serves dies in each story, and is there again for the next.
#[test]
fn machines_that_come_back_after_they_died_carry_the_next_stories() {
    let Some(lab) = lab(&Topology::of_hosts(["one", "two", "client"])) else { return };
    let home = Home::new();
    run(lab.host("client").unwrap(), &home, ["mesh", "create", "home"]).succeeds();
    let client = Node::client(lab.host("client").unwrap(), home, &with(&UNAIDED, "--mesh=home"));
    let join = client.join();
    let start = |name, home| Node::serving(lab.host(name).unwrap(), home, &with(&UNAIDED, &join));
    let mut servers = vec![start("one", Home::new()), start("two", Home::new())];
    let mut story = None;
    for _ in 0..4 {
        for server in &servers {
            until("the server has the client", || server.path_to(&client).starts_with("direct").then_some(()));
        }
        client.waits_for_servers_of_demo(2);
        let mut stream = client.begin(&long_story());
        stream.read(STORY_BYTES_BEFORE_FAULT);
        let dies = serving(&client, &servers, &[]).id().to_owned();
        let Node { host, home, .. } =
            servers.swap_remove(servers.iter().position(|server| server.id() == dies).unwrap());
        host.kill_programs().unwrap();
        assert_eq!(stream.finish(), End::Finished("length".into()));
        assert_eq!(&stream.text, story.get_or_insert_with(|| servers[0].complete(&long_story())));
        servers.push(start(host.name(), home));
    }
}

/// One machine after the other dies while it serves the same request; the last one goes on.
fn dies_in_mid_stream(servers: &[Node<'_>], client: &Node<'_>, deaths: usize) {
    let mut stream = client.begin(&long_story());
    let mut dead = Vec::new();
    for _ in 0..deaths {
        stream.read(stream.text.len() + STORY_BYTES_BEFORE_FAULT);
        let server = serving(client, servers, &dead);
        server.dies();
        dead.push(server);
    }
    assert_eq!(stream.finish(), End::Finished("length".into()));
    let last = survivor(servers, &dead);
    let resumed = last.model_status()["generated_tokens"].as_u64().unwrap();
    assert!(resumed > 0, "nobody died in mid-stream");
    assert_eq!(stream.text, last.complete(&long_story()));
}

fn survivor<'a, 'b>(servers: &'b [Node<'a>], dead: &[&Node<'a>]) -> &'b Node<'a> {
    servers.iter().find(|server| dead.iter().all(|dead| dead.id() != server.id())).unwrap()
}
