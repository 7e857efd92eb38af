//! Meshes of real processes on this machine, without internet: who comes in, and what becomes of a request whose server
//! is killed.

#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test ends when something is off")]

mod common;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use common::{
    Home, Outcome, Server,
    http::{self, Completion, End},
    signal, until,
};
use serde_json::{Value, json};

/// The model in this repository.
const DEMO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/demo/murmur-demo-q8_0.gguf");

/// Nobody outside this machine is asked or told anything.
const OFFLINE: [&str; 5] = ["--relay=none", "--no-nostr", "--no-mdns", "--bind", "127.0.0.1:0"];

/// A node with its home.
struct Node {
    home: Home,
    server: Server,
}

impl Node {
    /// One that serves the demo model. In exact mode, since texts are compared that come about in different batches.
    fn serving(home: Home, arguments: &[&str]) -> Self {
        let server = Server::start(&home, [&[DEMO, "--alias", "demo", "--exact"], &OFFLINE[..], arguments].concat());
        Self { home, server }
    }

    fn client(arguments: &[&str]) -> Self {
        let home = Home::new();
        let server = Server::ready(client_command(&home, &[arguments, &["--json"]].concat()));
        Self { home, server }
    }

    fn api(&self) -> &str {
        &self.server.address
    }

    fn mesh<const N: usize>(&self, arguments: [&str; N]) -> Outcome {
        self.home.run([&["mesh"], &arguments[..], &["--api", self.api()]].concat())
    }

    #[track_caller]
    fn invite(&self, arguments: &[&str]) -> Value {
        let arguments = [&["mesh", "invite", "--json", "--api", self.api()], arguments].concat();
        self.home.run(arguments).succeeds().json()
    }

    #[track_caller]
    fn ticket(&self) -> String {
        self.invite(&[])["ticket"].as_str().unwrap().to_owned()
    }

    /// How many nodes serve the demo model, as this one knows.
    fn servers_of_demo(&self) -> usize {
        let (_, model) = http::get(self.api(), "/v1/models/demo");
        let ready = |served: &&Value| served["state"] == "ready";
        model["details"]["served_by"].as_array().map_or(0, |nodes| nodes.iter().filter(ready).count())
    }

    #[track_caller]
    fn waits_for_servers_of_demo(&self, count: usize) {
        until(&format!("{count} nodes serve the model"), || (self.servers_of_demo() == count).then_some(()));
    }
}

fn client_command(home: &Home, arguments: &[&str]) -> std::process::Command {
    home.murmur([&["client", "--api", "127.0.0.1:0"], &OFFLINE[..], arguments].concat())
}

/// The founder of a private mesh, which serves.
fn founder() -> Node {
    let home = Home::new();
    home.run(["mesh", "create", "home"]).succeeds();
    Node::serving(home, &["--mesh", "home"])
}

#[test]
fn a_client_hears_what_its_server_has_guessed() {
    let home = Home::new();
    home.run(["mesh", "create", "home"]).succeeds();
    let server = Node::serving(home, &["--mesh", "home", "--draft", "lookup"]);
    let client = Node::client(&["--join", &server.ticket()]);
    client.waits_for_servers_of_demo(1);
    // So long an answer of so small a model repeats itself.
    let request =
        json!({"model": "demo", "prompt": "Once upon a time", "max_tokens": 400, "temperature": 0, "ignore_eos": true});
    let (mut right, mut wrong) = (0, 0);
    // On a busy machine guesses may not be worth their time.
    until("something was guessed", || {
        let (_, answer) = http::post(client.api(), "/v1/completions", &request);
        let details = &answer["usage"]["completion_tokens_details"];
        let count = |which| details[which].as_u64().unwrap_or(0);
        right += count("accepted_prediction_tokens");
        wrong += count("rejected_prediction_tokens");
        (right + wrong > 0).then_some(())
    });
    let (_, status) = http::get(server.api(), "/api/status");
    let model = &status["node"]["models"][0];
    assert_eq!((&model["right_tokens"], &model["guessed_tokens"]), (&json!(right), &json!(right + wrong)));
}

/// Tokens of a story that is long enough to be killed in.
const STORY_TOKENS: u64 = 450;

/// About a sixth of it.
const STORY_BYTES_BEFORE_KILL: usize = 250;

fn long_story() -> Value {
    json!({"model": "demo", "prompt": "Once upon a time", "max_tokens": STORY_TOKENS, "seed": 7, "ignore_eos": true})
}

#[test]
fn a_client_that_joined_by_ticket_has_the_servers_models_and_gets_the_same_text() {
    let server = founder();
    let client = Node::client(&["--join", &server.ticket()]);
    assert_eq!(client.server.ready["mesh"]["name"], "home");
    client.waits_for_servers_of_demo(1);

    let request = json!({"model": "demo", "prompt": "Lily and the kitten", "max_tokens": 60, "seed": 3});
    assert_eq!(http::complete(client.api(), &request), http::complete(server.api(), &request));
    let mut auto = request.clone();
    auto["model"] = json!("auto");
    assert_eq!(http::complete(client.api(), &auto), http::complete(server.api(), &request));
    let chat = json!({"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 40, "seed": 3});
    let answer = |api: &str| http::post(api, "/v1/chat/completions", &chat).1["choices"][0]["message"].clone();
    assert_eq!(answer(client.api()), answer(server.api()));
    let run = client.home.run(["run", "demo", "Hello", "--max-tokens", "8", "--json", "--api", client.api()]);
    assert!(run.succeeds().json()["completion_tokens"].as_u64().unwrap() > 0);

    let status = client.home.run(["status", "--api", client.api()]).succeeds();
    assert!(status.out.contains("mesh home: 1 other node"), "{}", status.out);
    let peers = client.mesh(["peers"]).succeeds();
    assert!(peers.out.contains("worker") && peers.out.contains("demo"), "{}", peers.out);
    let shown = client.mesh(["show", "--json"]).succeeds().json();
    assert_eq!((&shown["running"]["node"], &shown["memberships"][0]["name"]), (&shown["node"], &json!("home")));
    client.mesh(["join", &server.ticket()]).succeeds();
    client.mesh(["invite"]).fails(5, "owner");

    // It says goodbye, and nobody has to wait until its record expires.
    server.server.signal("TERM");
    until("the server is gone", || (http::get(client.api(), "/api/mesh").1["peers"] == json!([])).then_some(()));
    let (status, _) = http::post(client.api(), "/v1/completions", &request);
    assert_eq!(status, 404);
}

#[test]
fn a_stream_goes_on_with_the_same_text_when_its_server_is_killed() {
    let first = founder();
    let ticket = first.ticket();
    let second = Node::serving(Home::new(), &["--join", &ticket]);
    let client = Node::client(&["--join", &ticket]);
    client.waits_for_servers_of_demo(2);

    let mut stream = Completion::begin(client.api(), &long_story());
    stream.read(STORY_BYTES_BEFORE_KILL);
    let at = until("somebody serves it", || {
        let (_, status) = http::get(client.api(), "/api/status");
        status["node"]["requests"][0]["at"].as_str().map(str::to_owned)
    });
    let (mut serving, other) = match first.server.ready["mesh"]["node"] == at.as_str() {
        true => (first, second),
        false => (second, first),
    };
    serving.server.child.kill().unwrap();
    let read_before = stream.text.len();
    assert_eq!(stream.finish(), End::Finished("length".into()));
    assert!(stream.text.len() > read_before);
    let (_, status) = http::get(other.api(), "/api/status");
    let resumed = status["node"]["models"][0]["generated_tokens"].as_u64().unwrap();
    assert!(resumed > 0, "it was not killed in mid-stream");
    assert_eq!(stream.text, http::complete(other.api(), &long_story()));
}

#[test]
fn a_stream_ends_with_an_error_when_nobody_is_left_to_go_on_with_it() {
    let mut server = founder();
    let client = Node::client(&["--join", &server.ticket(), "--wait", "2s"]);
    client.waits_for_servers_of_demo(1);
    let mut stream = Completion::begin(client.api(), &long_story());
    stream.read(STORY_BYTES_BEFORE_KILL);
    server.server.child.kill().unwrap();
    match stream.finish() {
        End::Failed(message) => assert!(message.contains("gone"), "{message}"),
        other => panic!("{other:?}"),
    }
}

/// A part of the day in which it is not now, nor within the next hours.
fn other_hours() -> String {
    // As the node sees it, which is given no environment.
    let output = std::process::Command::new("date").arg("+%H").env_remove("TZ").output().unwrap();
    let now: u32 = String::from_utf8(output.stdout).unwrap().trim().parse().unwrap();
    format!("{}-{}", (now + 8) % 24, (now + 12) % 24)
}

fn paused(node: &Node) -> Option<String> {
    let (_, status) = http::get(node.api(), "/api/status");
    status["node"]["sharing"]["paused"].as_str().map(str::to_owned)
}

#[test]
fn outside_its_hours_a_node_serves_its_own_user_and_nobody_else() {
    let home = Home::new();
    home.run(["mesh", "create", "home"]).succeeds();
    let server = Node::serving(home, &["--mesh", "home", "--hours", &other_hours()]);
    let client = Node::client(&["--join", &server.ticket()]);
    until("the client hears that the node pauses", || {
        let (_, mesh) = http::get(client.api(), "/api/mesh");
        (mesh["peers"][0]["models"][0]["state"] == "draining").then_some(())
    });
    let request = json!({"model": "demo", "prompt": "Lily", "max_tokens": 4, "seed": 3});
    assert_ne!(http::post(client.api(), "/v1/completions", &request).0, 200);
    http::complete(server.api(), &request);
    assert!(paused(&server).unwrap().contains("outside its hours"));
    for command in [&["status"][..], &["top", "--once"]] {
        let page = server.home.run([command, &["--api", server.api()]].concat()).succeeds().out;
        assert!(page.contains("paused for other nodes: outside its hours"), "{page}");
    }
    let doctor = server.home.run([&["doctor", "--api", server.api()], &OFFLINE[..]].concat());
    assert!(doctor.out.contains("outside its hours"), "{}", doctor.out);
}

#[test]
fn a_node_pauses_while_its_machine_is_used_and_finishes_what_runs() {
    /// Ends with the test.
    struct Busy(std::process::Child);
    impl Drop for Busy {
        fn drop(&mut self) {
            self.0.kill().unwrap();
            self.0.wait().unwrap();
        }
    }
    let home = Home::new();
    home.run(["mesh", "create", "home"]).succeeds();
    let server = Node::serving(home, &["--mesh", "home", "--pause-when-active"]);
    let processors = std::thread::available_parallelism().unwrap().get();
    let busy = || Busy(std::process::Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap());
    let _others: Vec<Busy> = (0..processors).map(|_| busy()).collect();
    let reason = until("the node pauses", || paused(&server));
    assert!(reason.contains("this machine is in use"), "{reason}");
    http::complete(server.api(), &json!({"model": "demo", "prompt": "Lily", "max_tokens": 4, "seed": 3}));
}

#[test]
fn a_node_takes_no_more_requests_of_others_than_it_was_told() {
    let home = Home::new();
    home.run(["mesh", "create", "home"]).succeeds();
    let server = Node::serving(home, &["--mesh", "home", "--max-requests", "1"]);
    let client = Node::client(&["--join", &server.ticket(), "--wait", "1s"]);
    client.waits_for_servers_of_demo(1);
    let stages = || http::get(server.api(), "/api/status").1["node"]["models"][0]["stages"].clone();
    let engine = stages()[0]["process_id"].clone();
    let _stream = Completion::begin(client.api(), &long_story());
    // A story is long, and a fast machine may be through with it before the next request is refused.
    signal(&engine, "STOP");
    let request = json!({"model": "demo", "prompt": "Lily", "max_tokens": 4, "seed": 3});
    assert_eq!(http::post(client.api(), "/v1/completions", &request).0, 429);
    let (_, status) = http::get(server.api(), "/api/status");
    assert_eq!(status["node"]["sharing"]["requests"], 1);
    let listed = &status["node"]["requests"][0];
    assert_eq!((&listed["from"], &listed["at"]), (&client.server.ready["mesh"]["node"], &Value::Null));
    signal(&engine, "CONT");
    http::complete(server.api(), &request);
}

/// A server of one request at a time, whose engine is stopped with the first request in it; and who asked for that.
fn full_server() -> (Node, Value, Node, Completion) {
    let home = Home::new();
    home.run(["mesh", "create", "home"]).succeeds();
    let server = Node::serving(home, &["--mesh", "home", "--parallel", "1"]);
    let client = Node::client(&["--join", &server.ticket(), "--wait", "1s"]);
    client.waits_for_servers_of_demo(1);
    let (_, status) = http::get(server.api(), "/api/status");
    let engine = status["node"]["models"][0]["stages"][0]["process_id"].clone();
    let stream = Completion::begin(client.api(), &long_story());
    signal(&engine, "STOP");
    (server, engine, client, stream)
}

#[test]
fn an_answer_that_nobody_waits_for_any_more_is_not_computed_to_its_end() {
    let (server, engine, _client, stream) = full_server();
    let model = || http::get(server.api(), "/api/status").1["node"]["models"][0].clone();
    let generated = |model: &Value| model["generated_tokens"].as_u64().unwrap();
    drop(stream);
    // The engine takes no step meanwhile.
    until("nothing of others is in progress", || {
        let (_, status) = http::get(server.api(), "/api/status");
        (status["node"]["sharing"]["requests"] == 0).then_some(())
    });
    let before = generated(&model());
    assert!((1..STORY_TOKENS).contains(&before), "{before}");
    signal(&engine, "CONT");
    until("nothing is computed", || (model()["requests_running"] == 0).then_some(()));
    let after = generated(&model());
    // The step that was being computed, and the one that its stage began by itself.
    assert!((before..=before + 2).contains(&after), "{before} {after}");
    http::complete(server.api(), &json!({"model": "demo", "prompt": "Lily", "max_tokens": 4, "seed": 3}));
    assert_eq!(generated(&model()), after + 4);
}

#[test]
fn a_full_server_is_shared_by_those_who_ask_and_who_has_its_share_is_told_that_it_is_busy() {
    let (server, engine, first, mut stream) = full_server();
    let second = Node::client(&["--join", &server.ticket(), "--wait", "1s"]);
    second.waits_for_servers_of_demo(1);
    let request = json!({"model": "demo", "prompt": "Lily", "max_tokens": 4, "seed": 3});
    // It has the engine already.
    let (status, answer) = http::post(first.api(), "/v1/completions", &request);
    assert_eq!(status, 429, "{answer}");
    let (later, api) = (request.clone(), second.api().to_owned());
    // Whoever has nothing yet waits in the queue, and is the next.
    let queued = std::thread::spawn(move || http::complete(&api, &request));
    until("it waits", || {
        let (_, status) = http::get(server.api(), "/api/status");
        (status["node"]["models"][0]["requests_queued"] == 1).then_some(())
    });
    // Beyond one that waits for each that runs there is no room for anybody.
    let third = Node::client(&["--join", &server.ticket(), "--wait", "1s"]);
    third.waits_for_servers_of_demo(1);
    assert_eq!(http::post(third.api(), "/v1/completions", &later).0, 429);
    signal(&engine, "CONT");
    assert!(!queued.join().unwrap().is_empty());
    assert_eq!(stream.finish(), End::Finished("length".into()));
}

#[test]
fn doctor_finds_the_way_to_a_mesh_by_a_seed_and_says_what_is_missing_without_it() {
    let home = Home::new();
    let seed = Server::ready(home.murmur(["seed", "--json", "--nostr-port", "0", "--relay-port", "0"]));
    let (nostr, relay) = (seed.ready["nostr"].as_str().unwrap(), seed.ready["relay"].as_str().unwrap());
    // Nothing listens on the discard port.
    let (dead_nostr, dead_relay) = ("ws://127.0.0.1:9", "http://127.0.0.1:9");
    let doctor = |nostr: &str, relay: &str| {
        let flags = ["--nostr-relay", nostr, "--relay", relay, "--bind", "127.0.0.1:0", "--no-mdns", "--json"];
        let report = home.run([&["doctor"], &flags[..]].concat()).succeeds().json();
        let checks = report["checks"].as_array().unwrap().clone();
        move |name: &str| -> Vec<Value> { checks.iter().filter(|check| check["name"] == name).cloned().collect() }
    };
    let checks = doctor(&format!("{nostr},{dead_nostr}"), &format!("{relay},{dead_relay}"));
    assert!(checks("UDP")[0]["found"].as_str().unwrap().contains("127.0.0.1 in"), "{:?}", checks("UDP"));
    assert_eq!((&checks("clock")[0]["verdict"], checks("way out").len()), (&json!("ok"), 1));
    for (name, alive, dead) in [("relay", relay, dead_relay), ("Nostr relay", nostr, dead_nostr)] {
        let found = checks(name);
        assert!(found[0]["found"].as_str().unwrap().contains(&format!("{alive} answers in")), "{found:?}");
        assert!(found[1]["found"].as_str().unwrap().contains(&format!("{dead} does not answer")), "{found:?}");
        assert_eq!(found[1]["advice"], "Another one does, which is enough.");
    }
    let alone = doctor(dead_nostr, dead_relay);
    for name in ["relay", "Nostr relay", "way out"] {
        assert_eq!(alone(name)[0]["verdict"], "warn", "{:?}", alone(name));
    }
    assert!(alone("clock")[0]["found"].as_str().unwrap().contains("nobody is there"), "{:?}", alone("clock"));
    let holder = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let bind = holder.local_addr().unwrap().to_string();
    let refused = home.run(["doctor", "--relay", "none", "--no-nostr", "--mesh", "x", "--bind", &bind]);
    assert!(refused.code == Some(1) && refused.out.contains("FAIL  UDP"), "{}", refused.out);
    assert!(home.run(["doctor"]).out.contains("talks to no other"), "a machine in no mesh asks nobody");
}

/// A node that has the demo model in its store, and loads it when somebody asks.
fn on_demand(arguments: &[&str]) -> Node {
    let home = Home::new();
    home.run(["models", "import", DEMO, "--name", "demo"]).succeeds();
    home.run(["mesh", "create", "home"]).succeeds();
    let given = [&["--mesh", "home", "--on-demand", "--exact"], &OFFLINE[..], arguments].concat();
    let server = Server::start(&home, given);
    Node { home, server }
}

fn state_of_demo(node: &Node) -> Value {
    http::get(node.api(), "/v1/models/demo").1["state"].clone()
}

/// The processes that this one has started.
fn children(node: &Node) -> usize {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", node.server.child.id())).unwrap().flatten();
    let lists = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    lists.map(|list| list.split_whitespace().count()).sum()
}

#[test]
fn a_model_that_nobody_serves_is_loaded_for_whoever_asks_and_let_go_when_nobody_does() {
    let owner = on_demand(&["--idle", "2s"]);
    let client = Node::client(&["--join", &owner.ticket()]);
    until("the model is listed at the client", || (state_of_demo(&client) == "available").then_some(()));
    assert_eq!(http::get(owner.api(), "/health").0, 200);
    assert_eq!((children(&owner), children(&client)), (0, 0), "processes for what nobody has asked for");
    let request = json!({"model": "demo", "prompt": "Lily and the kitten", "max_tokens": 20, "seed": 3});
    let text = http::complete(client.api(), &request);
    let mut stream = Completion::begin(client.api(), &long_story());
    assert_eq!(state_of_demo(&owner), "ready");
    assert!(children(&owner) > 0);
    assert_eq!(stream.finish(), End::Finished("length".into()));
    until("the model is let go, with its processes", || {
        (state_of_demo(&client) == "available" && children(&owner) == 0).then_some(())
    });
    // It comes back, for its owner as well.
    assert_eq!(http::complete(owner.api(), &request), text);
}

#[test]
fn a_model_on_demand_that_does_not_fit_is_refused_with_what_would() {
    let owner = on_demand(&["--max-memory", "1M", "--wait", "1s"]);
    let client = Node::client(&["--join", &owner.ticket(), "--wait", "1s"]);
    until("the model is listed at the client", || (state_of_demo(&client) == "available").then_some(()));
    for node in [&owner, &client] {
        let (status, answer) = http::post(node.api(), "/v1/completions", &json!({"model": "demo", "prompt": "x"}));
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(status == 503 && message.contains("does not fit") && message.contains("MiB"), "{answer}");
    }
}

/// Who holds which layers in a plan.
fn stages(plan: &Value) -> Vec<(String, u64, u64)> {
    let stages = plan["stages"].as_array().unwrap().iter();
    let layers = |stage: &Value, at: usize| stage["layers"][at].as_u64().unwrap();
    stages.map(|stage| (stage["node"].as_str().unwrap().to_owned(), layers(stage, 0), layers(stage, 1))).collect()
}

#[test]
fn the_ring_for_a_model_can_be_asked_for_and_why_there_is_none() {
    const PART: [&str; 2] = ["--max-layers", "7"];
    let id = |node: &Node| node.server.ready["mesh"]["node"].as_str().unwrap().to_owned();
    let plan = |node: &Node, arguments: &[&str]| -> Outcome {
        node.home.run([&["mesh", "plan", "demo", "--api", node.api()], arguments].concat())
    };
    let home = Home::new();
    home.run(["mesh", "create", "home"]).succeeds();
    let first = Node::serving(home, &[&["--mesh", "home"], &PART[..]].concat());
    until("the node knows its model", || (!plan(&first, &[]).err.contains("being read")).then_some(()));
    let alone = plan(&first, &[]).fails(5, "another node with");
    assert!(alone.err.contains("the one node has") && alone.err.contains("no limit on the layers"), "{}", alone.err);

    let join = ["--join", &first.ticket()];
    let second = Node::serving(Home::new(), &[&join, &PART[..]].concat());
    until("there is a ring", || (plan(&first, &[]).code == Some(0)).then_some(()));
    for node in [&first, &second] {
        until("each knows the other's offer", || (plan(node, &[]).code == Some(0)).then_some(()));
        let found = plan(node, &["--json"]).succeeds().json();
        let stages = stages(&found);
        assert!((stages[0].1, stages[1].2) == (0, 12) && stages[0].2 == stages[1].1, "{found}");
        assert!([&first, &second].iter().all(|node| stages.iter().any(|stage| stage.0 == id(node))), "{found}");
        assert_eq!((stages.len(), found["edges"].as_array().unwrap().len()), (2, 3), "{found}");
        assert_eq!(found["driver"], id(node), "{found}");
        assert!(found["tokens_per_s"].as_f64().unwrap() >= found["tokens_per_s_alone"].as_f64().unwrap(), "{found}");
    }
    let page = plan(&first, &["--streams", "2", "--many-streams"]).succeeds().out;
    assert!(page.contains("for each of 2 streams") && page.contains("2 stages"), "{page}");

    // What is asked for is kept to, or said to be what there is no ring with.
    let (pin, other) = (format!("{}:0-5", &id(&second)[..8]), &id(&second)[..8]);
    let pinned = plan(&first, &["--json", "--pin", &pin]).succeeds().json();
    assert_eq!(stages(&pinned), [(id(&second), 0, 5), (id(&first), 5, 12)]);
    let kept = plan(&first, &["--json", "--keep-ends", "1"]).succeeds().json();
    assert_eq!([&stages(&kept)[0].0, &stages(&kept)[2].0], [&id(&first); 2], "{kept}");
    plan(&first, &["--exclude", other]).fails(5, &format!("using {} as well", &id(&second)[..10]));
    plan(&first, &["--max-rtt", "0"]).fails(5, "no limit on round trips");
    plan(&first, &["--exclude", other, "--pin", other]).fails(2, "drop the pin");
    plan(&first, &["--pin", &format!("{other}:5-0")]).fails(2, "0-8");
    plan(&first, &["--exclude", "no"]).fails(2, "hex digits");
    plan(&first, &["--ctx", "16000000"]).fails(2, "at most");
    first.mesh(["plan", "nothing"]).fails(3, "no model called nothing");

    // A node without the file, and one that holds it whole.
    let client = Node::client(&join);
    until("the client hears of the model", || (client.servers_of_demo() > 0).then_some(()));
    plan(&client, &[]).fails(3, "Ask one that serves it");
    let whole = Node::serving(Home::new(), &join);
    until("it hears of the others", || {
        let found = plan(&whole, &["--json"]);
        let remark = found.code.filter(|code| *code == 0).map(|_| found.json()["remarks"].to_string())?;
        remark.contains("2 at present").then_some(())
    });
    let found = plan(&whole, &["--json"]).succeeds().json();
    assert_eq!(stages(&found), [(id(&whole), 0, 12)], "{found}");
    assert_eq!(found["rejected"].as_array().unwrap().len(), 2, "{found}");
}

#[test]
fn an_invitation_is_a_picture_too_where_somebody_looks_at_it() {
    let server = founder();
    let piped = server.mesh(["invite"]).succeeds();
    assert!(piped.out.starts_with("murmur1") && piped.out.lines().count() == 1, "{}", piped.out);
    let (terminal, terminal_of_program) = pty_process::blocking::open().unwrap();
    let mut program = pty_process::blocking::Command::new(env!("CARGO_BIN_EXE_murmur"))
        .args(["mesh", "invite", "--api", server.api()])
        .env("MURMUR_DATA_DIR", server.home.data_dir())
        .spawn(terminal_of_program)
        .unwrap();
    let mut shown = Vec::new();
    // A terminal that its program has left is an error to read.
    let _ = std::io::Read::read_to_end(&mut &terminal, &mut shown);
    assert_eq!(program.wait().unwrap().code(), Some(0));
    let shown = String::from_utf8(shown).unwrap();
    assert!(shown.lines().filter(|line| line.contains('▀')).count() > 20, "{shown}");
    assert!(shown.contains("murmur1"), "{shown}");
}

#[test]
fn tickets_that_do_not_count_are_refused_with_the_reason() {
    let server = founder();
    let join = |ticket: &str| -> Outcome {
        client_command(&Home::new(), &["--join", ticket]).output().map(Outcome::from).unwrap()
    };
    let text = |invitation: &Value| invitation["ticket"].as_str().unwrap().to_owned();
    join("murmur1nonsense").fails(2, "damaged");
    join("home").fails(2, "not a ticket");

    let short = server.invite(&["--valid", "1s"]);
    let expires = UNIX_EPOCH + Duration::from_millis(short["expires_unix_ms"].as_u64().unwrap());
    std::thread::sleep(expires.duration_since(SystemTime::now()).unwrap_or_default());
    join(&text(&short)).fails(5, "expired");

    let revoked = server.invite(&[]);
    let id = revoked["id"].as_str().unwrap();
    assert_eq!(server.mesh(["revoke", id, "--json"]).succeeds().json(), json!({"revoked": true}));
    join(&text(&revoked)).fails(5, "revoked");

    let once = text(&server.invite(&["--uses", "1"]));
    let _guest = Node::client(&["--join", &once]);
    join(&once).fails(5, "used up");
    server.mesh(["join", "murmur1nonsense"]).fails(2, "damaged");
}

#[test]
fn a_revoked_member_is_shut_out() {
    let server = founder();
    let guest = Node::client(&["--join", &server.ticket(), "--wait", "2s"]);
    guest.waits_for_servers_of_demo(1);
    let node = guest.server.ready["mesh"]["node"].as_str().unwrap();
    let known = || http::get(server.api(), "/api/mesh").1["peers"][0]["node"] == node;
    until("the server knows the guest", || known().then_some(()));
    // A connection that stands does not outlive the membership.
    let ask =
        || http::post(guest.api(), "/v1/completions", &json!({"model": "demo", "prompt": "x", "max_tokens": 1})).0;
    assert_eq!(ask(), 200);
    server.mesh(["revoke", &node[..10]]).succeeds();
    until("the guest is forgotten", || (!known()).then_some(()));
    assert_ne!(ask(), 200);
}

#[test]
fn strangers_of_a_public_mesh_find_each_other_through_a_seed_of_ones_own() {
    let home = Home::new();
    let ports = ["seed", "--json", "--nostr-port", "0", "--relay-port", "0"];
    let seed = Server::ready(home.murmur(ports));
    let url = |key: &str| seed.ready[key].as_str().unwrap().to_owned();
    let discovery = ["--mesh", "park", "--nostr-relay", &url("nostr"), "--no-nostr=false", "--relay", &url("relay")];
    let with_seed = |command: &[&str]| {
        let all = [command, &["--json", "--api", "127.0.0.1:0", "--no-mdns"], &discovery].concat();
        let home = Home::new();
        let server = Server::ready(home.murmur(all));
        Node { home, server }
    };
    let server = with_seed(&["serve", DEMO, "--alias", "demo", "--exact", "--threads", "1"]);
    let client = with_seed(&["client"]);
    client.waits_for_servers_of_demo(1);
    assert_eq!(server.server.ready["mesh"]["private"], false);
    server.mesh(["invite", "--uses", "2"]).fails(2, "uses");
    seed.signal("TERM");
}

#[test]
fn a_node_stays_alone_unless_a_mesh_is_named_and_then_has_its_data_directory_for_itself() {
    let home = Home::new();
    let server = Server::start(&home, [DEMO]);
    assert_eq!(server.ready["mesh"], Value::Null);
    home.run(["mesh", "peers", "--api", &server.address]).fails(3, "no mesh");
    home.run(["mesh", "invite", "--api", &server.address]).fails(3, "--join TICKET");
    assert!(!home.data_dir().join("node.key").exists(), "a node that is in no mesh needs no key");

    home.run(["client", "--api", "127.0.0.1:0"]).fails(2, "needs a mesh");
    home.run(["mesh", "create", "home"]).succeeds();
    let first = Server::ready(client_command(&home, &["--json"]));
    assert_eq!(first.ready["mesh"]["name"], "home");
    client_command(&home, &["--mesh", "home"]).output().map(Outcome::from).unwrap().fails(5, "--data-dir");
    home.run(["mesh", "leave", "home", "--give-up-key"]).fails(5, "end it");
}

#[test]
fn memberships_are_made_shown_and_given_up_without_a_running_node() {
    let home = Home::new();
    assert_eq!(
        home.run(["mesh", "show", "--json"]).succeeds().json(),
        json!({
            "node": null, "memberships": [], "running": null,
        })
    );
    let made = home.run(["mesh", "create", "home", "--json"]).succeeds().json();
    home.run(["mesh", "create", "home"]).fails(2, "already");
    let shown = home.run(["mesh", "show", "--json"]).succeeds().json();
    let member = &shown["memberships"][0];
    assert_eq!((&shown["node"], &member["id"], &member["owner"]), (&made["node"], &made["id"], &json!(true)));
    assert!(home.run(["mesh", "show"]).succeeds().out.contains("home"));
    home.run(["mesh", "join", "murmur1x"]).fails(2, "ticket");
    home.run(["mesh", "peers"]).fails(5, "murmur serve");
    home.run(["mesh", "leave", "office"]).fails(3, "no member");
    home.run(["mesh", "leave", "home"]).fails(2, "--give-up-key");
    home.run(["mesh", "leave", made["id"].as_str().unwrap(), "--give-up-key"]).succeeds();
    assert!(home.run(["mesh", "show"]).succeeds().out.contains("no member"));
}
