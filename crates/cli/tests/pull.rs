//! `murmur models pull` against a small hub on loopback. What the hub can do wrong is tested in murmur-store; here it is what the user sees.

#![allow(clippy::unwrap_used, reason = "a test ends when something is off")]

mod common;

use std::{
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
};
#[cfg(unix)]
use std::{
    os::unix::process::ExitStatusExt,
    path::PathBuf,
    sync::{Arc, Mutex},
};

#[cfg(unix)]
use common::screen::Screen;
use common::{Home, Outcome, Server};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Serves one repository with one file, as long as the test runs; returns its address.
fn hub(content: Vec<u8>, etag: &'static str) -> String {
    hub_that_sends(content, etag, |stream, body| stream.write_all(body))
}

/// The same, with another way to send what follows the headers.
fn hub_that_sends(
    content: Vec<u8>,
    etag: &'static str,
    send: impl Fn(&mut TcpStream, &[u8]) -> std::io::Result<()> + Send + 'static,
) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            // A client that goes away is not the test's concern.
            let _ = answer(&mut stream, &content, etag).and_then(|body| send(&mut stream, &body));
        }
    });
    address
}

/// Reads a request and sends the headers of its answer; returns the body.
fn answer(stream: &mut TcpStream, content: &[u8], etag: &str) -> std::io::Result<Vec<u8>> {
    let mut request = String::new();
    let mut reader = BufReader::new(stream.try_clone()?);
    while reader.read_line(&mut request)? > 2 {}
    let size = content.len();
    let from = request.split("range: bytes=").nth(1).and_then(|range| range.split('-').next()?.parse::<usize>().ok());
    let (status, headers, body) = if request.starts_with("GET /api/models/a/tiny/revision/main") {
        let listing = format!(r#"{{"sha":"{COMMIT}","siblings":[{{"rfilename":"tiny-Q8_0.gguf"}}]}}"#);
        ("200 OK", format!("content-length: {}", listing.len()), listing.into_bytes())
    } else if request.starts_with(&format!("HEAD /a/tiny/resolve/{COMMIT}/tiny-Q8_0.gguf")) {
        ("200 OK", format!("content-length: {size}\r\netag: \"{etag}\""), Vec::new())
    } else if request.starts_with(&format!("GET /a/tiny/resolve/{COMMIT}/tiny-Q8_0.gguf")) {
        match from {
            None => ("200 OK", format!("content-length: {size}"), content.to_vec()),
            Some(from) => {
                let headers =
                    format!("content-length: {}\r\ncontent-range: bytes {from}-{}/{size}", size - from, size - 1);
                ("206 Partial Content", headers, content[from..].to_vec())
            }
        }
    } else {
        ("404 Not Found", "content-length: 0".to_owned(), Vec::new())
    };
    write!(stream, "HTTP/1.1 {status}\r\n{headers}\r\nconnection: close\r\n\r\n")?;
    Ok(body)
}

fn pull(home: &Home, endpoint: &str, arguments: &[&str]) -> Outcome {
    let mut command = home.murmur(["models", "pull"].iter().chain(arguments));
    command.env("HF_ENDPOINT", endpoint).env("HF_HOME", home.path().join("hf")).output().unwrap().into()
}

#[test]
fn a_pulled_model_is_in_the_store_and_can_be_shown_by_its_reference() {
    let home = Home::new();
    let content = std::fs::read(home.model("source.gguf")).unwrap();
    let endpoint = hub(content, "d41d8cd98f00b204e9800998ecf8427e");
    let pulled = pull(&home, &endpoint, &["hf:a/tiny", "--json"]).succeeds().json();
    assert_eq!(pulled["name"], "tiny-Q8_0");
    assert!(pulled["path"].as_str().unwrap().starts_with(home.path().join("hf/hub").to_str().unwrap()));
    assert_eq!(home.run(["models", "show", "hf:a/tiny:Q8_0", "--json"]).succeeds().json()["store_name"], "tiny-Q8_0");
    home.run(["models", "rm", "tiny-Q8_0"]).succeeds();
}

#[test]
fn a_pull_that_fails_says_why_and_has_its_own_exit_code() {
    let home = Home::new();
    let wrong = hub(vec![1; 1000], "abababababababababababababababababababababababababababababababab");
    pull(&home, &wrong, &["hf:a/tiny"]).fails(6, "damaged");
    pull(&home, &wrong, &["hf:a/absent"]).fails(3, "spelling");
    pull(&home, &wrong, &["hf:a/tiny:Q4_K_M"]).fails(3, "tiny-Q8_0.gguf");
    pull(&home, "huggingface", &["hf:a/tiny"]).fails(2, "HF_ENDPOINT");
}

/// A pull onto a file system of its own, which something else fills while the model arrives; then once more, with room.
const PULL_ONTO_A_SMALL_DISK: &str = r#"
mount -t tmpfs -o size="$ROOM" none "$HF_HOME" || exit 77
{ "$@"; echo $? > first; } &
until [ -e half ] || [ -e first ]; do sleep 0.01; done
head -c "$ROOM" /dev/zero > "$HF_HOME/filler" 2>/dev/null
touch full
wait
rm "$HF_HOME/filler"
"$@" >/dev/null || exit 99
exit "$(cat first)"
"#;

#[test]
fn a_disk_that_fills_up_during_a_pull_is_named_and_with_room_again_the_pull_succeeds() {
    let home = Home::new();
    let content = std::fs::read(home.model("source.gguf")).unwrap();
    let (half, full) = (home.path().join("half"), home.path().join("full"));
    let sign = half.clone();
    // A pull begins only where 64 MiB are left beside the model.
    let (size, room) = (content.len(), content.len() + (80 << 20));
    let endpoint = hub_that_sends(content, "d41d8cd98f00b204e9800998ecf8427e", move |stream, body| {
        if body.len() < size || full.exists() {
            return stream.write_all(body);
        }
        stream.write_all(&body[..size / 2])?;
        std::fs::write(&sign, "")?;
        common::until("the disk is full", || full.exists().then_some(()));
        stream.write_all(&body[size / 2..])
    });
    std::fs::create_dir(home.path().join("hf")).unwrap();
    let pull = home.murmur(["models", "pull", "hf:a/tiny"]);
    let outcome: Outcome = std::process::Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "sh", "-c", PULL_ONTO_A_SMALL_DISK, "sh"])
        .arg(pull.get_program())
        .args(pull.get_args())
        .current_dir(home.path())
        .env_clear()
        .envs(pull.get_envs().filter_map(|(name, value)| Some((name, value?))))
        .env("HF_ENDPOINT", endpoint)
        .env("HF_HOME", home.path().join("hf"))
        .env("ROOM", room.to_string())
        .output()
        .unwrap()
        .into();
    if outcome.code == Some(77) || outcome.err.starts_with("unshare: ") {
        eprintln!("skipped: this system allows no file systems of one's own: {}", outcome.err);
        return;
    }
    assert!(half.exists(), "{outcome:?}");
    outcome.fails(4, "no space in");
}

/// What a program gets whose terminal is closed.
#[cfg(unix)]
const SIGHUP: i32 = 1;

/// A hub that stops in the middle of the file until it is told to go on.
#[cfg(unix)]
struct HaltingHub {
    endpoint: String,
    content: Vec<u8>,
    /// Lengths of the answers with bytes of the file.
    answers: Arc<Mutex<Vec<usize>>>,
    /// There as soon as half of the file is under way.
    half: PathBuf,
    goes_on: PathBuf,
}

#[cfg(unix)]
impl HaltingHub {
    fn new(home: &Home) -> Self {
        let content = std::fs::read(home.model("source.gguf")).unwrap();
        let [half, goes_on] = ["half", "goes-on"].map(|sign| home.path().join(sign));
        let answers = Arc::<Mutex<Vec<usize>>>::default();
        let (told, sign, awaited, bytes) = (Arc::clone(&answers), half.clone(), goes_on.clone(), content.len());
        let endpoint = hub_that_sends(content.clone(), "d41d8cd98f00b204e9800998ecf8427e", move |stream, body| {
            // What is shorter says where the file is.
            if body.len() < bytes / 4 {
                return stream.write_all(body);
            }
            told.lock().unwrap().push(body.len());
            let (first, rest) = body.split_at(body.len() / 2);
            stream.write_all(first)?;
            std::fs::write(&sign, "")?;
            common::until("the hub is told to go on", || awaited.exists().then_some(()));
            stream.write_all(rest)
        });
        Self { endpoint, content, answers, half, goes_on }
    }

    /// What of the file is on the disk.
    fn partial_bytes(&self, home: &Home) -> u64 {
        let blobs = home.path().join("hf/hub/models--a--tiny/blobs");
        let files = std::fs::read_dir(blobs).into_iter().flatten().flatten();
        let partial = files.filter(|file| file.path().extension().is_some_and(|ending| ending == "part"));
        partial.map(|file| file.metadata().map_or(0, |meta| meta.len())).sum()
    }

    /// A pull of the file in a terminal, of which half has come.
    fn pull_half(&self, home: &Home, more: &[&str]) -> (pty_process::blocking::Pty, std::process::Child) {
        let (terminal, terminal_of_program) = pty_process::blocking::open().unwrap();
        let pull = home.murmur(["models", "pull", "hf:a/tiny"].iter().chain(more));
        let program = pty_process::blocking::Command::new(pull.get_program())
            .args(pull.get_args())
            .env_clear()
            .envs(pull.get_envs().filter_map(|(name, value)| Some((name, value?))))
            .spawn(terminal_of_program)
            .unwrap();
        common::until("the hub has sent half of the file", || self.half.exists().then_some(()));
        // The last of it may still be in the sockets.
        let half = self.content.len() as u64 / 2;
        common::until("half of it is on the disk", || (self.partial_bytes(home) >= half - (1 << 20)).then_some(()));
        (terminal, program)
    }

    fn goes_on(&self) {
        std::fs::write(&self.goes_on, "").unwrap();
    }

    fn answers(&self) -> Vec<usize> {
        self.answers.lock().unwrap().clone()
    }
}

/// A home for this hub.
#[cfg(unix)]
fn home_with_hub() -> (Home, HaltingHub) {
    let home = Home::new();
    let hub = HaltingHub::new(&home);
    let cache = home.path().join("hf").to_str().unwrap().to_owned();
    let home = home.with("HF_ENDPOINT", &hub.endpoint).with("HF_HOME", cache).with("TERM", "xterm");
    (home, hub)
}

#[cfg(unix)]
#[test]
fn where_a_server_runs_a_pull_goes_on_after_ctrl_c_and_when_its_terminal_is_closed() {
    for closes_terminal in [false, true] {
        let (home, hub) = home_with_hub();
        home.model("served.gguf");
        let server = Server::start(&home, ["served.gguf"]);
        let (terminal, mut program) = hub.pull_half(&home, &["--api", &server.address]);
        if closes_terminal {
            drop(terminal);
            assert_eq!(program.wait().unwrap().signal(), Some(SIGHUP));
        } else {
            let mut screen = Screen::of(&terminal);
            screen.wait_for("pulling hf:a/tiny");
            (&terminal).write_all(b"\x03").unwrap();
            screen.wait_for("the server goes on with it");
            assert_eq!(program.wait().unwrap().code(), Some(130));
        }
        hub.goes_on();
        let listed = common::until("the server has the model", || {
            let listed = home.run(["models", "ls", "--json"]).succeeds().json();
            listed[0]["present"].as_bool().unwrap_or_default().then(|| listed[0].clone())
        });
        assert_eq!((&listed["name"], &listed["origin"]["kind"]), (&"tiny-Q8_0".into(), &"hub".into()));
        assert!(std::fs::read(listed["path"].as_str().unwrap()).unwrap() == hub.content);
        assert_eq!(hub.answers(), [hub.content.len()], "it came in one piece");
        // Once more is nothing to do.
        let again = home.run(["models", "pull", "hf:a/tiny", "--json", "--api", &server.address]).succeeds().json();
        assert_eq!((&again["name"], &again["path"]), (&listed["name"], &listed["path"]));
    }
}

#[cfg(unix)]
#[test]
fn without_a_server_a_pull_whose_terminal_was_closed_is_resumed_by_the_next_one() {
    let (home, hub) = home_with_hub();
    let (terminal, mut program) = hub.pull_half(&home, &[]);
    let before = hub.partial_bytes(&home);
    drop(terminal);
    assert_eq!(program.wait().unwrap().signal(), Some(SIGHUP));
    hub.goes_on();
    let pulled = home.run(["models", "pull", "hf:a/tiny", "--json"]).succeeds().json();
    assert!(std::fs::read(pulled["path"].as_str().unwrap()).unwrap() == hub.content);
    let (bytes, answers) = (hub.content.len(), hub.answers());
    assert!(answers.len() == 2 && answers[1] <= bytes - before as usize, "{answers:?} of {bytes}, {before} were here");
}

#[cfg(unix)]
#[test]
fn what_a_server_cannot_get_or_keeps_elsewhere_is_pulled_by_the_command_itself() {
    let home = Home::new();
    let content = std::fs::read(home.model("source.gguf")).unwrap();
    let endpoint = hub(content, "d41d8cd98f00b204e9800998ecf8427e");
    let mut serve = home.murmur(["serve", "--json", "--api", "127.0.0.1:0", "--threads", "1", "source.gguf"]);
    serve.env("HF_HUB_OFFLINE", "1");
    let offline = Server::ready(serve);
    let pulled = pull(&home, &endpoint, &["hf:a/tiny", "--api", &offline.address]).succeeds();
    assert!(pulled.err.contains("HF_HUB_OFFLINE") && pulled.err.contains("it is pulled here"), "{}", pulled.err);
    // The server of another data directory is not asked.
    let other = Home::new();
    let pulled = pull(&other, &endpoint, &["hf:a/tiny", "--api", &offline.address]).succeeds();
    assert!(!pulled.err.contains("HF_HUB_OFFLINE"), "{}", pulled.err);
    assert_eq!(other.run(["models", "ls", "--json"]).succeeds().json()[0]["present"], true);
}
