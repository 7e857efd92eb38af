//! Commands that need no server: what they print, and how they fail.

#![allow(clippy::unwrap_used, reason = "a test ends when something is off")]

mod common;

use std::{
    fs,
    time::{Duration, Instant},
};

use common::{Home, unused_address};

#[test]
fn wrong_use_ends_with_code_2_and_says_what_is_wrong() {
    let home = Home::new();
    let cases: [(&[&str], &str); 15] = [
        (&["frobnicate"], "frobnicate"),
        (&["serve", "--stages", "0"], "--stages"),
        (&["serve", "--threads", "many"], "auto"),
        (&["serve", "--max-memory", "lots"], "8GiB"),
        (&["serve", "--ctx", "x"], "--ctx"),
        (&["serve", "--hours", "late"], "22-7"),
        (&["serve", "--max-requests", "0"], "--max-requests"),
        (&["status", "--api", "nowhere"], "--api"),
        (&["status", "--log", "=,="], "log filter"),
        (&["models", "pull", "./a-path.gguf"], "hf:owner/repo"),
        (&["models", "import", "x.gguf", "--name", "../up"], "name"),
        (&["run", "m", "--temperature", "NaN"], "0 to 100"),
        (&["serve", "m", "--alias", "a", "--alias", "b"], "--alias"),
        (&["serve", "m", "--draft", ""], "--draft"),
        (&["serve", "m", "--draft", "d", "--draft-spoilt", "1.5"], "0 to 1"),
    ];
    for (arguments, says) in cases {
        home.run(arguments).fails(2, says);
    }
}

#[test]
fn a_name_that_is_of_no_hub_is_pulled_by_a_server_and_without_one_both_ways_are_told() {
    let outcome = Home::new().run(["models", "pull", "some-name", "--api", &unused_address()]);
    outcome.fails(5, "hf:owner/repo").fails(5, "murmur client --mesh");
}

#[test]
fn help_version_completions_and_manual_are_there() {
    let home = Home::new();
    let help = home.run(["--help"]).succeeds().out;
    for word in ["serve", "doctor", "MURMUR_API", "config.toml", "Exit codes"] {
        assert!(help.contains(word), "no {word} in the help");
    }
    assert!(!help.contains("engine-child"), "the hidden command is shown");
    assert!(home.run(["--version"]).succeeds().out.starts_with("murmur "));
    for shell in ["bash", "zsh", "fish"] {
        assert!(home.run(["completions", shell]).succeeds().out.contains("max-memory"));
    }
    assert!(home.run(["man"]).succeeds().out.contains(".TH"));
    home.run(["man", "--dir", "pages"]).succeeds();
    assert!(home.path().join("pages/murmur-serve.1").is_file());
    assert!(!home.data_dir().exists(), "asking for help wrote something");
}

#[test]
fn status_without_a_server_says_how_to_start_one_and_is_quick() {
    /// What the command may take, start of the process included.
    const BUDGET: Duration = Duration::from_millis(30);
    let home = Home::new();
    home.run(["status"]).fails(5, "murmur serve MODEL");
    let fastest = (0..20).map(|_| {
        let mut command = home.murmur(["status"]);
        let started = Instant::now();
        command.output().unwrap();
        started.elapsed()
    });
    let fastest = fastest.min().unwrap();
    assert!(fastest <= BUDGET, "{fastest:?}");
}

#[test]
fn errors_are_json_too_when_that_is_wanted() {
    let outcome = Home::new().run(["status", "--json"]);
    assert_eq!(outcome.json()["error"]["code"], "unavailable");
    assert_eq!(outcome.json()["error"]["exit_code"], 5);
    assert_eq!(outcome.code, Some(5));
}

#[test]
fn what_answers_at_the_address_but_is_not_murmur_is_told() {
    let home = Home::new();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut stream = &stream;
            let _ = std::io::Read::read(&mut stream, &mut [0; 4096]);
            let _ = std::io::Write::write_all(&mut stream, b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi");
        }
    });
    home.run(["status", "--api", &address]).fails(1, "Is it murmur?");
    home.model("m.gguf");
    home.run(["serve", "m.gguf", "--api", &address]).fails(5, "in use by");
    let doctor = home.run(["doctor", "--api", &address]);
    assert!(doctor.out.contains("warn  API address"), "{}", doctor.out);
}

#[test]
fn configuration_mistakes_name_the_file_and_the_key() {
    let home = Home::new();
    home.write("data/config.toml", "stagse = 2");
    home.run(["status"]).fails(2, "Did you mean 'stages'");
    home.write("data/config.toml", "stages = \"two\"");
    home.run(["status"]).fails(2, "'stages'");
    home.write("data/config.toml", "stages = 2\napi = \"127.0.0.1:1\"");
    home.run(["models", "ls"]).succeeds();
    home.run(["status", "--config", "absent.toml"]).fails(2, "absent.toml");
    home.write("data/config.toml", [0xff, 0xfe]);
    home.run(["status"]).fails(2, "config.toml");
}

#[test]
fn a_server_beyond_this_machine_needs_a_key_before_anything_is_loaded() {
    let home = Home::new();
    home.run(["serve", "absent.gguf", "--api", "0.0.0.0:0"]).fails(2, "API key");
    home.run(["serve", "absent.gguf", "--api", "192.0.2.1:1", "--api-key", "k"]).fails(5, "no address of this machine");
    home.run(["serve", "absent.gguf", "--allow-origin", "*"]).fails(2, "allowed origin");
}

#[test]
fn models_are_imported_listed_shown_and_removed() {
    let home = Home::new();
    home.model("tiny.gguf");
    assert_eq!(home.run(["models", "ls", "--json"]).succeeds().json(), serde_json::json!([]));
    home.run(["models", "import", "tiny.gguf", "--name", "tiny"]).succeeds();
    let listed = home.run(["models", "ls", "--json"]).succeeds().json();
    assert_eq!((&listed[0]["name"], &listed[0]["present"]), (&"tiny".into(), &true.into()));
    let shown = home.run(["models", "show", "tiny", "--json"]).succeeds().json();
    assert_eq!(shown["architecture"], "llama");
    assert_eq!(shown["digest"].as_str().unwrap().len(), 64);
    let page = home.run(["models", "show", "tiny.gguf"]).succeeds().out;
    assert!(page.contains("architecture  llama") && page.contains("layer 0"), "{page}");
    home.run(["models", "show", "tinny"]).fails(3, "Did you mean 'tiny'");
    home.run(["models", "rm", "tiny"]).succeeds();
    assert!(home.path().join("tiny.gguf").exists());
    home.run(["models", "rm", "tiny"]).fails(3, "tiny");
}

#[test]
fn files_that_are_no_models_are_refused_with_their_own_codes() {
    let home = Home::new();
    let whole = fs::read(home.model("whole.gguf")).unwrap();
    home.write("short.gguf", &whole[..whole.len() / 2]);
    home.write("header.gguf", &whole[..40]);
    home.write("text.gguf", "hello");
    home.write("empty.gguf", "");
    for command in ["show", "import"] {
        home.run(["models", command, "absent.gguf"]).fails(3, "absent.gguf");
        home.run(["models", command, "."]).fails(6, "directory");
        home.run(["models", command, "short.gguf"]).fails(6, "cut short");
        home.run(["models", command, "header.gguf"]).fails(6, "cut short");
        home.run(["models", command, "text.gguf"]).fails(6, "not a GGUF file");
        home.run(["models", command, "empty.gguf"]).fails(6, "empty");
    }
    home.run(["serve", "short.gguf"]).fails(6, "cut short");
    home.run(["run", "absent.gguf", "hi"]).fails(3, "absent.gguf");
    home.run(["serve"]).fails(2, "store is empty");
    home.run(["serve", "nameless"]).fails(3, "nameless");
}

#[cfg(unix)]
#[test]
fn a_file_or_directory_without_permission_is_told_as_such() {
    use std::os::unix::fs::PermissionsExt;
    let home = Home::new();
    let model = home.model("secret.gguf");
    fs::set_permissions(&model, fs::Permissions::from_mode(0o000)).unwrap();
    if fs::File::open(&model).is_ok() {
        eprintln!("skipped: this user (root) may read everything");
        return;
    }
    home.run(["models", "import", "secret.gguf"]).fails(5, "permission denied");
}

#[test]
fn a_data_directory_that_cannot_be_one_is_told() {
    let home = Home::new();
    home.model("m.gguf");
    let file = home.write("occupied", "x");
    let doctor = home.run(["doctor".as_ref(), "--data-dir".as_ref(), file.as_os_str()]);
    assert_eq!(doctor.code, Some(1));
    assert!(doctor.out.contains("FAIL  data directory"), "{}", doctor.out);
    let import = home.run(["models", "import", "m.gguf", "--data-dir", "occupied"]);
    assert_eq!(import.code, Some(1), "{import:?}");
}

#[test]
fn doctor_runs_the_engine_and_tells_every_setting_and_its_source() {
    let home = Home::new();
    home.write("data/config.toml", "parallel = 2");
    let report = home.run(["doctor", "--json", "--api", &unused_address()]).succeeds().json();
    let checks = report["checks"].as_array().unwrap();
    let verdict = |name: &str| checks.iter().find(|check| check["name"] == name).unwrap()["verdict"].clone();
    for name in ["data directory", "API address", "models", "hub", "engine"] {
        assert_eq!(verdict(name), "ok", "{name}: {report}");
    }
    let settings = report["settings"].as_array().unwrap();
    let source = |key: &str| settings.iter().find(|s| s["key"] == key).unwrap()["source"].clone();
    assert_eq!(
        (source("api"), source("parallel"), source("data-dir"), source("stages")),
        ("flag".into(), "file".into(), "environment".into(), "default".into())
    );
    let left: Vec<_> = fs::read_dir(home.data_dir()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["config.toml"], "doctor left something behind");
}

#[test]
fn the_engine_command_started_by_hand_says_that_it_is_not_for_hands() {
    Home::new().run(["engine-child"]).fails(2, "murmur serve MODEL");
}

#[test]
fn a_reader_that_has_seen_enough_is_no_failure() {
    let home = Home::new();
    let mut child = home.murmur(["man"]).stdout(std::process::Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    assert_eq!(child.wait().unwrap().code(), Some(0));
}
