//! Nodes on the hosts of a lab: the real binary in a network namespace, with the network between as bad as a test wants it.

use std::{
    ffi::OsStr,
    path::PathBuf,
    process::{Command, Stdio},
};

use murmur_lab::{HostHandle, Lab, LabError, Topology};
use serde_json::{Value, json};

use crate::common::{
    Home, Outcome, Server,
    http::{self, Completion},
    signal, until,
};

/// The model in this repository.
pub const DEMO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/demo/murmur-demo-q8_0.gguf");

/// No help in finding each other and in reaching each other.
pub const UNAIDED: [&str; 3] = ["--relay=none", "--no-nostr", "--no-mdns"];

/// Arguments and one more.
pub fn with<'a>(arguments: &[&'a str], more: &'a str) -> Vec<&'a str> {
    [arguments, &[more]].concat()
}

/// Tokens of a story that is long enough to be interrupted in.
pub const STORY_TOKENS: u64 = 450;

/// About a sixth of it.
pub const STORY_BYTES_BEFORE_FAULT: usize = 250;

/// The request for it.
pub fn long_story() -> Value {
    json!({"model": "demo", "prompt": "Once upon a time", "max_tokens": STORY_TOKENS, "seed": 7, "ignore_eos": true})
}

/// A request whose answer takes a moment.
pub fn short_story() -> Value {
    json!({"model": "demo", "prompt": "Lily and the kitten", "max_tokens": 40, "seed": 3, "ignore_eos": true})
}

/// The lab; none, which is said, where labs cannot run.
pub fn lab(topology: &Topology) -> Option<Lab> {
    match Lab::new(topology) {
        Err(LabError::Missing(missing)) => {
            eprintln!("skipped: {missing}");
            None
        }
        lab => Some(lab.unwrap()),
    }
}

/// A command as it is, on a host of the lab.
fn on(host: HostHandle<'_>, command: &Command) -> Command {
    let mut there = host.command(command.get_program());
    there.args(command.get_args()).env_clear().stdin(Stdio::null());
    there.envs(command.get_envs().filter_map(|(key, value)| Some((key, value?))));
    command.get_current_dir().map(|folder| there.current_dir(folder));
    there
}

/// What `murmur` says on a host, when it has ended.
pub fn run<S: AsRef<OsStr>>(host: HostHandle<'_>, home: &Home, arguments: impl IntoIterator<Item = S>) -> Outcome {
    on(host, &home.murmur(arguments)).output().unwrap().into()
}

/// A running `murmur serve` or `murmur client` on a host.
pub struct Node<'a> {
    pub host: HostHandle<'a>,
    pub home: Home,
    pub server: Server,
}

impl<'a> Node<'a> {
    /// One that serves the demo model. In exact mode, since texts are compared that come about in different batches.
    pub fn serving(host: HostHandle<'a>, home: Home, arguments: &[&str]) -> Self {
        let serve = ["serve", DEMO, "--alias=demo", "--exact", "--threads=1"];
        Self::start(host, home, &[&serve, arguments].concat())
    }

    /// One that serves these models, each by the name of its file, likewise.
    pub fn serving_files(host: HostHandle<'a>, home: Home, files: &[PathBuf], arguments: &[&str]) -> Self {
        let files = files.iter().map(|file| file.to_str().unwrap());
        let serve: Vec<&str> = ["serve", "--exact", "--threads=1"].into_iter().chain(files).collect();
        Self::start(host, home, &[&serve, arguments].concat())
    }

    /// One that serves the demo model by its name, without having its file.
    pub fn fetching(host: HostHandle<'a>, home: Home, arguments: &[&str]) -> Self {
        Self::start(host, home, &[&["serve", "demo", "--exact", "--threads=1"], arguments].concat())
    }

    /// The founder of a private mesh, which serves.
    pub fn founder(host: HostHandle<'a>, home: Home, arguments: &[&str]) -> Self {
        run(host, &home, ["mesh", "create", "home"]).succeeds();
        Self::serving(host, home, &[&["--mesh=home"], arguments].concat())
    }

    /// One without models of its own.
    pub fn client(host: HostHandle<'a>, home: Home, arguments: &[&str]) -> Self {
        Self::start(host, home, &[&["client"], arguments].concat())
    }

    fn start(host: HostHandle<'a>, home: Home, arguments: &[&str]) -> Self {
        let command = home.murmur([arguments, &["--json", "--api=127.0.0.1:0"]].concat());
        let server = Server::ready(on(host, &command));
        Self { host, home, server }
    }

    /// Status and JSON of an answer of its API.
    pub fn get(&self, path: &str) -> (u16, Value) {
        self.host.enter(|| http::get(&self.server.address, path)).unwrap()
    }

    /// What it chooses to say to a request for a completion.
    #[track_caller]
    pub fn choices(&self, request: &Value) -> Value {
        let (status, mut answer) =
            self.host.enter(|| http::post(&self.server.address, "/v1/completions", request)).unwrap();
        assert_eq!(status, 200, "{request}: {answer}");
        answer["choices"].take()
    }

    /// Text of a completion, to its end.
    pub fn complete(&self, request: &Value) -> String {
        self.host.enter(|| http::complete(&self.server.address, request)).unwrap()
    }

    /// A streamed completion of which nothing has come yet.
    pub fn start_stream(&self, request: &Value) -> Completion {
        self.host.enter(|| Completion::start(&self.server.address, request)).unwrap()
    }

    /// A streamed completion whose first text has come.
    pub fn begin(&self, request: &Value) -> Completion {
        self.host.enter(|| Completion::begin(&self.server.address, request)).unwrap()
    }

    /// `murmur mesh` about this node.
    pub fn mesh<const N: usize>(&self, arguments: [&str; N]) -> Outcome {
        run(self.host, &self.home, [&["mesh"], &arguments[..], &["--api", &self.server.address]].concat())
    }

    /// A new ticket, as an answer to `murmur mesh invite`.
    #[track_caller]
    pub fn invite<const N: usize>(&self, arguments: [&str; N]) -> Value {
        let invite = [&["mesh", "invite", "--json", "--api", &self.server.address], &arguments[..]].concat();
        run(self.host, &self.home, invite).succeeds().json()
    }

    /// The argument with which another node comes in.
    #[track_caller]
    pub fn join(&self) -> String {
        format!("--join={}", self.invite([])["ticket"].as_str().unwrap())
    }

    /// Its id.
    pub fn id(&self) -> &str {
        self.server.ready["mesh"]["node"].as_str().unwrap()
    }

    /// The others, as it lists them.
    pub fn peers(&self) -> Vec<Value> {
        self.get("/api/mesh").1["peers"].as_array().unwrap().clone()
    }

    /// How it reaches another node.
    pub fn path_to(&self, other: &Node<'_>) -> String {
        let peers = self.peers();
        let peer = peers.iter().find(|peer| peer["node"] == other.id());
        peer.map_or("not listed", |peer| peer["path"].as_str().unwrap()).to_owned()
    }

    /// How many nodes serve the demo model, as this one knows.
    pub fn servers_of_demo(&self) -> usize {
        let (_, model) = self.get("/v1/models/demo");
        let ready = |served: &&Value| served["state"] == "ready";
        model["details"]["served_by"].as_array().map_or(0, |nodes| nodes.iter().filter(ready).count())
    }

    /// It has a model to answer with.
    #[track_caller]
    pub fn waits_for_a_model(&self) {
        until(&format!("{} has a model", self.host.name()), || (self.servers_of_demo() > 0).then_some(()));
    }

    #[track_caller]
    pub fn waits_for_servers_of_demo(&self, count: usize) {
        let what = format!("{} knows {count} nodes that serve the model", self.host.name());
        until(&what, || (self.servers_of_demo() == count).then_some(()));
    }

    /// Before that a ticket could not name the relay.
    #[track_caller]
    pub fn waits_for_its_relay(&self) {
        let connected = || self.get("/api/mesh").1["relay"].is_string().then_some(());
        until(&format!("{} is connected to a relay", self.host.name()), connected);
    }

    /// What it says of itself.
    pub fn status(&self) -> Value {
        self.get("/api/status").1["node"].take()
    }

    /// What it says of the model that it serves.
    pub fn model_status(&self) -> Value {
        self.status()["models"][0].take()
    }

    /// The process that computes its part of a ring.
    #[track_caller]
    pub fn hosting_process(&self) -> u64 {
        until("its engine process is known", || self.model_status()["ring"]["process_id"].as_u64())
    }

    /// All models that it serves are ready.
    #[track_caller]
    pub fn waits_for_its_models(&self) {
        until(&format!("{} has its models", self.host.name()), || {
            let status = self.status();
            let models = status["models"].as_array().unwrap();
            (!models.is_empty() && models.iter().all(|model| model["state"] == "ready")).then_some(())
        });
    }

    /// Sends a signal to the processes that compute its model.
    pub fn signal_engine(&self, name: &str) {
        for stage in self.model_status()["stages"].as_array().unwrap() {
            signal(&stage["process_id"], name);
        }
    }

    /// The machine is off.
    pub fn dies(&self) {
        assert!(self.host.kill_programs().unwrap() > 0);
    }
}

/// A running `murmur seed` on a host.
pub struct Seed {
    /// URL of its Nostr relay.
    pub nostr: String,
    /// URL of its relay between nodes.
    pub relay: String,
    server: Server,
    _home: Home,
}

impl Seed {
    pub fn start(host: HostHandle<'_>) -> Self {
        Self::start_with(host, None)
    }

    /// One that is also a node of this public mesh.
    pub fn of_mesh(host: HostHandle<'_>, mesh: &str) -> Self {
        Self::start_with(host, Some(format!("--mesh={mesh}")))
    }

    fn start_with(host: HostHandle<'_>, argument: Option<String>) -> Self {
        let home = Home::new();
        let given = ["seed".to_owned(), "--json".to_owned(), format!("--bind={}", host.address())];
        let server = Server::ready(on(host, &home.murmur(given.into_iter().chain(argument))));
        let url = |key: &str| server.ready[key].as_str().unwrap().to_owned();
        Self { nostr: url("nostr"), relay: url("relay"), server, _home: home }
    }

    /// The flag with which a node comes into its mesh.
    pub fn join(&self) -> String {
        format!("--join={}", self.server.ready["ticket"].as_str().unwrap())
    }
}

/// The one of these that works on the client's only request, and is none of the dead.
#[track_caller]
pub fn serving<'a, 'b>(client: &Node<'_>, servers: &'b [Node<'a>], dead: &[&Node<'a>]) -> &'b Node<'a> {
    until("another node serves", || {
        let (_, status) = client.get("/api/status");
        let at = &status["node"]["requests"][0]["at"];
        servers.iter().find(|server| at == server.id() && dead.iter().all(|dead| dead.id() != server.id()))
    })
}
