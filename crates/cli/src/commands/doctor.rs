//! `murmur doctor`: is everything as it should be, and if not, what to do. The way to other nodes is in [`network`].

mod network;

use std::{fmt::Write, fs, io, net::TcpListener};

use murmur_store::{available_bytes, hub::HubConfig};
use serde::Serialize;

use super::{Session, machine, node_runtime, self_test, small_runtime};
use crate::{
    args::mesh::Doctor,
    exit::{Code, Failure},
    ui,
    units::{Size, human_duration},
};

/// Below this, not even a small model fits.
const DISK_WARN_BYTES: u64 = 2 << 30;
const DISK_FAIL_BYTES: u64 = 64 << 20;
const MEMORY_WARN_BYTES: u64 = 1 << 30;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Ok,
    Warn,
    Fail,
}

#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    verdict: Verdict,
    /// What was found.
    found: String,
    /// What to do; empty when nothing needs doing.
    advice: String,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Ok, found: found.into(), advice: String::new() }
    }

    fn warn(name: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Warn, found: found.into(), advice: advice.into() }
    }

    fn fail(name: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Fail, found: found.into(), advice: advice.into() }
    }
}

pub(super) fn run(session: &Session, args: &Doctor) -> anyhow::Result<()> {
    let mut checks = vec![
        data_directory(session),
        disk(session),
        memory(),
        processor(),
        port(session),
        store(session),
        hub(),
        engine(session),
    ];
    checks.extend(node_runtime()?.block_on(network::checks(session, &args.mesh)));
    if session.global.json {
        ui::print_json(&serde_json::json!({
            "version": env!("CARGO_PKG_VERSION"),
            "checks": checks,
            "settings": session.effective,
            "config_file": session.config_file,
            "data_dir": session.data_dir,
        }))?;
    } else {
        ui::print(&page(session, &checks))?;
    }
    let failed: Vec<&str> =
        checks.iter().filter(|check| check.verdict == Verdict::Fail).map(|check| check.name).collect();
    if failed.is_empty() {
        return Ok(());
    }
    if session.global.json {
        // The report says it already, and is one JSON document.
        return Err(Failure::told(Code::Failed));
    }
    Err(Failure::because(Code::Failed, format!("not in order: {}", failed.join(", "))))
}

fn page(session: &Session, checks: &[Check]) -> String {
    let mut out = format!("murmur {}\n\n", env!("CARGO_PKG_VERSION"));
    for check in checks {
        let mark = match check.verdict {
            Verdict::Ok => "ok  ",
            Verdict::Warn => "warn",
            Verdict::Fail => "FAIL",
        };
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{mark}  {}: {}", check.name, check.found);
        if !check.advice.is_empty() {
            let _ = writeln!(out, "      {}", check.advice);
        }
    }
    let file = session.config_file.as_ref().map_or("none".to_owned(), |path| path.display().to_string());
    let _ = writeln!(out, "\nsettings (configuration file: {file})");
    let rows: Vec<Vec<String>> = session
        .effective
        .iter()
        .map(|s| {
            vec![
                s.key.clone(),
                s.value.clone().unwrap_or_else(|| "-".to_owned()),
                s.source.to_owned(),
                s.variable.clone(),
            ]
        })
        .collect();
    out.push_str(&ui::table(&["KEY", "VALUE", "FROM", "VARIABLE"], &rows, &[]));
    out
}

fn data_directory(session: &Session) -> Check {
    const NAME: &str = "data directory";
    let path = session.data_dir.display();
    let probe = session.data_dir.join(format!(".doctor-{}", std::process::id()));
    let writable = fs::create_dir_all(&session.data_dir)
        .and_then(|()| fs::write(&probe, b""))
        .and_then(|()| fs::remove_file(&probe));
    match writable {
        Ok(()) => Check::ok(NAME, format!("{path} is writable")),
        Err(error) => Check::fail(
            NAME,
            format!("{path} cannot be written: {error}"),
            "Make it writable for this user, or choose another place with --data-dir.",
        ),
    }
}

fn disk(session: &Session) -> Check {
    const NAME: &str = "disk";
    let place = session.data_dir.display();
    match available_bytes(&session.data_dir) {
        None => Check::warn(
            NAME,
            "this system does not say how much room there is",
            "Look yourself before pulling large models.",
        ),
        Some(free) if free < DISK_FAIL_BYTES => Check::fail(
            NAME,
            format!("{} free at {place}", Size(free)),
            "Free some space, or choose another place with --data-dir.",
        ),
        Some(free) if free < DISK_WARN_BYTES => {
            Check::warn(NAME, format!("{} free at {place}", Size(free)), "Enough to run, too little for most models.")
        }
        Some(free) => Check::ok(NAME, format!("{} free at {place}", Size(free))),
    }
}

fn memory() -> Check {
    const NAME: &str = "memory";
    match machine::available_memory_bytes() {
        None => Check::warn(
            NAME,
            "this system does not say how much is free",
            "Set --max-memory, so that a model that does not fit is refused.",
        ),
        Some(free) if free < MEMORY_WARN_BYTES => Check::warn(
            NAME,
            format!("{} available", Size(free)),
            "Enough for the smallest models only; end other programs.",
        ),
        Some(free) => Check::ok(NAME, format!("{} available", Size(free))),
    }
}

fn processor() -> Check {
    const NAME: &str = "processor";
    let threads = std::thread::available_parallelism().map_or_else(|_| "?".to_owned(), |n| n.to_string());
    let features: Vec<&str> =
        machine::cpu_features().into_iter().filter(|(_, present)| *present).map(|(name, _)| name).collect();
    let found = format!("{}, {threads} threads, {}", std::env::consts::ARCH, features.join(" "));
    match machine::missing_essential_feature() {
        Some(missing) => Check::warn(
            NAME,
            format!("{found}; no {missing}"),
            "Models will run, many times slower than on a newer processor.",
        ),
        None => Check::ok(NAME, found),
    }
}

fn port(session: &Session) -> Check {
    const NAME: &str = "API address";
    let address = session.global.api;
    match TcpListener::bind(address) {
        Ok(_) => Check::ok(NAME, format!("{address} is free")),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => match occupant(session) {
            Occupant::Murmur => Check::ok(NAME, format!("a murmur server is at {address}")),
            Occupant::Other(who) => Check::warn(
                NAME,
                format!("{address} is used by {who}"),
                "End it, or serve elsewhere: --api 127.0.0.1:6877.",
            ),
        },
        Err(error) => Check::fail(
            NAME,
            format!("{address} cannot be listened on: {error}"),
            "Choose an address of this machine with --api.",
        ),
    }
}

/// Who has the API's port.
pub(super) enum Occupant {
    /// A server of ours, as far as it can be told.
    Murmur,
    /// Something else, in words.
    Other(String),
}

/// Asks whoever listens at `--api` whether it is murmur.
pub(super) fn occupant(session: &Session) -> Occupant {
    use std::time::Duration;
    const PATIENCE: Duration = Duration::from_secs(2);
    let client = session.client();
    let is_murmur = small_runtime().is_ok_and(|runtime| {
        runtime.block_on(async {
            let status = tokio::time::timeout(PATIENCE, client.get("/api/status")).await;
            match status {
                Ok(Ok(status)) => status.get("version").is_some(),
                // It wants a key: then it speaks our errors, which is as good a sign.
                Ok(Err(error)) => error.to_string().contains("wants an API key"),
                Err(_) => false,
            }
        })
    });
    if is_murmur {
        return Occupant::Murmur;
    }
    Occupant::Other(machine::listener_on(session.global.api.port()).unwrap_or_else(|| "another program".to_owned()))
}

fn store(session: &Session) -> Check {
    const NAME: &str = "models";
    match session.store().list() {
        Err(error) => Check::fail(NAME, "the index cannot be read", error.to_string()),
        Ok(entries) => {
            let missing: Vec<String> =
                entries.iter().filter(|entry| !entry.path.exists()).map(|entry| entry.name.to_string()).collect();
            if missing.is_empty() {
                return Check::ok(NAME, format!("{} in the store", entries.len()));
            }
            let advice = format!("Put the files back, or forget them: murmur models rm {}", missing.join(" "));
            Check::warn(NAME, format!("files of {} are gone", missing.join(", ")), advice)
        }
    }
}

fn hub() -> Check {
    const NAME: &str = "hub";
    match HubConfig::from_env() {
        Ok(config) => {
            let token = if config.has_token() { "with a token" } else { "without a token" };
            Check::ok(NAME, format!("{}, {token}, cache {}", config.endpoint(), config.cache_dir().display()))
        }
        Err(error) => Check::fail(NAME, "the hub settings cannot be used", error.to_string()),
    }
}

fn engine(session: &Session) -> Check {
    const NAME: &str = "engine";
    let started = std::time::Instant::now();
    match self_test::run(session) {
        Ok(()) => Check::ok(NAME, format!("a small model ran as two stages, in {}", human_duration(started.elapsed()))),
        Err(error) => Check::fail(
            NAME,
            format!("a small model does not run: {error:#}"),
            "If the program was built for another processor, build it here or with a lower target-cpu.",
        ),
    }
}
