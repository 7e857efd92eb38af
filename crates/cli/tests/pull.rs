//! `murmur models pull` against a small hub on loopback. What the hub can do wrong is tested in murmur-store; here it is what the user sees.

#![allow(clippy::unwrap_used, reason = "a test ends when something is off")]

mod common;

use std::{
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
};

use common::{Home, Outcome};

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
    let (status, headers, body) = if request.starts_with("GET /api/models/a/tiny/revision/main") {
        let listing = format!(r#"{{"sha":"{COMMIT}","siblings":[{{"rfilename":"tiny-Q8_0.gguf"}}]}}"#);
        ("200 OK", format!("content-length: {}", listing.len()), listing.into_bytes())
    } else if request.starts_with(&format!("HEAD /a/tiny/resolve/{COMMIT}/tiny-Q8_0.gguf")) {
        ("200 OK", format!("content-length: {size}\r\netag: \"{etag}\""), Vec::new())
    } else if request.starts_with(&format!("GET /a/tiny/resolve/{COMMIT}/tiny-Q8_0.gguf")) {
        ("200 OK", format!("content-length: {size}"), content.to_vec())
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
