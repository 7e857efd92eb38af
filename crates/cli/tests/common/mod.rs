//! The real binary, each time with a data directory of its own and an environment that has nothing of the user's.

#![allow(
    clippy::panic,
    clippy::unwrap_used,
    dead_code,
    unreachable_pub,
    reason = "helpers of tests end the test when something is off, and not every test needs each"
)]

pub mod http;
#[cfg(unix)]
pub mod screen;

use std::{
    ffi::OsStr,
    io::{BufRead, BufReader, Read, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::Mutex,
    time::{Duration, Instant},
};

use tokio::net::TcpSocket;

/// Longer than anything here takes on a busy machine, a long story in one answer included.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// Asks again and again until there is an answer. For what nothing announces.
#[track_caller]
pub fn until<T>(what: &str, ask: impl FnMut() -> Option<T>) -> T {
    until_at(what, Duration::from_millis(20), ask)
}

/// The same, with so long between the questions: for what is over soon.
#[track_caller]
pub fn until_at<T>(what: &str, pause: Duration, mut ask: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(started.elapsed() < PATIENCE, "never came true: {what}");
        std::thread::sleep(pause);
    }
}

/// A home of its own for one test.
pub struct Home {
    directory: tempfile::TempDir,
    environment: Vec<(&'static str, String)>,
    /// Where the API is that a command means if it is not told: nowhere.
    api: String,
}

impl Home {
    pub fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap(), environment: Vec::new(), api: unused_address() }
    }

    /// What runs here finds this variable in its environment.
    pub fn with(mut self, variable: &'static str, value: impl Into<String>) -> Self {
        self.environment.push((variable, value.into()));
        self
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    pub fn data_dir(&self) -> PathBuf {
        self.path().join("data")
    }

    /// `murmur` with arguments, not started.
    pub fn murmur<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_murmur"));
        command
            .args(arguments)
            .env_clear()
            .env("HOME", self.path())
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("MURMUR_DATA_DIR", self.data_dir())
            .env("MURMUR_API", &self.api)
            .envs(self.environment.iter().cloned())
            .current_dir(self.path())
            .stdin(Stdio::null());
        command
    }

    pub fn run<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Outcome {
        self.murmur(arguments).output().unwrap().into()
    }

    /// A small model with random weights.
    pub fn model(&self, file_name: &str) -> PathBuf {
        let path = self.path().join(file_name);
        let spec = murmur_gguf::synth::Spec::tiny("llama").unwrap();
        murmur_gguf::synth::write(&spec, &path).unwrap();
        path
    }

    pub fn write(&self, file_name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path().join(file_name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, content).unwrap();
        path
    }
}

/// An address on which nothing listens, until somebody listens on just this one: the system gives its port to nobody who asks for
/// any, as a socket of this process has it.
pub fn unused_address() -> String {
    static TAKEN: Mutex<Vec<TcpSocket>> = Mutex::new(Vec::new());
    let socket = TcpSocket::new_v4().unwrap();
    // So may a server have it that sets the same, as all do, while this one does not listen.
    socket.set_reuseaddr(true).unwrap();
    socket.bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let address = socket.local_addr().unwrap();
    TAKEN.lock().unwrap().push(socket);
    address.to_string()
}

/// What a finished command left.
#[derive(Debug)]
pub struct Outcome {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl From<Output> for Outcome {
    fn from(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Self { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
    }
}

impl Outcome {
    /// Checks the exit code and that standard error says something.
    #[track_caller]
    pub fn fails(self, code: i32, says: &str) -> Self {
        assert_eq!(self.code, Some(code), "{self:?}");
        assert!(self.err.contains(says), "no {says:?} in: {}", self.err);
        assert!(!self.err.contains("panicked"), "{}", self.err);
        self
    }

    #[track_caller]
    pub fn succeeds(self) -> Self {
        assert_eq!(self.code, Some(0), "{self:?}");
        self
    }

    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.out).unwrap()
    }
}

/// A running `murmur serve`, `client` or `seed`.
pub struct Server {
    pub child: Child,
    /// Of the API.
    pub address: String,
    /// What it said when it was ready.
    pub ready: serde_json::Value,
}

impl Server {
    /// Starts one and waits until it is ready.
    pub fn start<S: AsRef<OsStr>>(home: &Home, arguments: impl IntoIterator<Item = S>) -> Self {
        let mut command = home.murmur(["serve", "--json", "--api", "127.0.0.1:0", "--threads", "1"]);
        command.args(arguments);
        Self::ready(command)
    }

    /// Starts a command that says as JSON when it is ready, and waits for that.
    pub fn ready(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        let mut said = BufReader::new(child.stdout.as_mut().unwrap());
        said.read_line(&mut line).unwrap();
        let ready: serde_json::Value = serde_json::from_str(&line).unwrap_or_else(|_| {
            // It has ended, and says why.
            said.read_to_string(&mut line).unwrap();
            panic!("it did not start: {line}")
        });
        let address = ready["address"].as_str().unwrap_or_default().to_owned();
        Self { child, address, ready }
    }

    pub fn signal(&self, name: &str) {
        signal(&self.child.id(), name);
    }
}

/// Sends a signal to a process.
pub fn signal(process: &dyn std::fmt::Display, name: &str) {
    let status = Command::new("kill").args([&format!("-{name}"), &process.to_string()]).status().unwrap();
    assert!(status.success());
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended as the test wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Makes the first child of a process hang, as soon as there is one.
pub fn stop_first_child(parent: u32) {
    let children = format!("/proc/{parent}/task");
    let program = |pid: &str| std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    // A program that has just been begun has no command line for a moment.
    let own = until_at("the parent has begun", Duration::from_millis(1), || {
        Some(program(&parent.to_string())).filter(|own| !own.is_empty())
    });
    // Between its fork and its exec a child is its parent still, and the parent waits for it.
    let child = until_at("a child is started", Duration::from_millis(1), || {
        let tasks = std::fs::read_dir(&children).unwrap().flatten();
        let lines: String =
            tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok()).collect();
        let runs = |pid: &&str| ![&own, &Vec::new()].contains(&&program(pid));
        lines.split_whitespace().find(runs).map(str::to_owned)
    });
    signal(&child, "STOP");
}

/// One answer of a server, headers included.
pub fn get(address: &str, path: &str) -> String {
    use std::io::Read;
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// Runs a command with something on its standard input.
pub fn with_input(mut command: Command, input: &str) -> Outcome {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap().into()
}
