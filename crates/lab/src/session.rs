//! One run of the command: the lab, the programs in it, and the lines that come in.

use std::{
    fs,
    io::{self, BufRead, BufReader, Read, Write},
    path::PathBuf,
    process::{Child, Command, ExitCode, ExitStatus, Stdio},
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread,
};

use anyhow::Context;
use clap::Parser;
use murmur_lab::{Lab, Topology};

use crate::control::{Control, HELP};

/// Events that wait to be handled; programs that print faster than the terminal takes it wait.
const EVENTS_MAX: usize = 1024;
/// Longer lines of a program are printed in pieces, in bytes.
const LINE_BYTES_MAX: u64 = 64 * 1024;

/// Hosts in network namespaces with emulated links between them. Needs root.
///
/// Programs named by `run` in the topology start with it. Without any, the lab stands until Ctrl-C, and its hosts can be entered
/// with `ip netns exec`. Lines on standard input change the network; `help` lists them.
#[derive(Debug, Parser)]
#[command(version, after_help = HELP)]
struct Arguments {
    /// The topology file.
    topology: PathBuf,
}

enum Event {
    Interrupted,
    Told(String),
    Printed { host: String, line: String },
    Ended { host: String, status: io::Result<ExitStatus> },
}

pub(crate) fn main() -> anyhow::Result<ExitCode> {
    tracing_subscriber::fmt().with_writer(io::stderr).with_env_filter(log_filter()).init();
    let path = Arguments::parse().topology;
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let topology: Topology = text.parse().with_context(|| path.display().to_string())?;
    let (events, incoming) = sync_channel(EVENTS_MAX);
    let interrupts = events.clone();
    // The handler runs on a thread of its own; when nobody listens any more the lab is ending already.
    ctrlc::set_handler(move || drop(interrupts.send(Event::Interrupted))).context("waiting for signals")?;
    let mut session = Session { lab: Lab::new(&topology)?, events, running: 0, has_failed: false };
    session.print_hosts()?;
    for host in topology.hosts.iter().filter(|host| !host.run.is_empty()) {
        session.start(&host.name, &host.run)?;
    }
    let ends_with_programs = session.running > 0;
    session.listen();
    session.serve(&incoming, ends_with_programs)?;
    Ok(if session.has_failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn log_filter() -> tracing_subscriber::EnvFilter {
    tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into())
}

struct Session {
    lab: Lab,
    events: SyncSender<Event>,
    running: usize,
    has_failed: bool,
}

impl Session {
    fn print_hosts(&self) -> io::Result<()> {
        let mut output = io::stdout().lock();
        for host in self.lab.hosts() {
            let address = host.address();
            let entry = host.command("PROGRAM");
            let words: Vec<_> = std::iter::once(entry.get_program()).chain(entry.get_args()).collect();
            let words = words.join(std::ffi::OsStr::new(" "));
            writeln!(output, "{:16} {address:16} {}", host.name(), words.to_string_lossy())?;
        }
        output.flush()
    }

    fn start(&mut self, host: &str, words: &[String]) -> anyhow::Result<()> {
        let (program, arguments) = words.split_first().context("which program?")?;
        let mut command: Command = self.lab.host(host)?.command(program);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().with_context(|| format!("starting {program} on {host}"))?;
        self.running += 1;
        self.follow(host.to_owned(), child);
        Ok(())
    }

    /// Passes on what a program prints and how it ends, the end last.
    fn follow(&self, host: String, mut child: Child) {
        let (output, errors) = (child.stdout.take(), child.stderr.take());
        let events = self.events.clone();
        thread::spawn(move || {
            thread::scope(|scope| {
                scope.spawn(|| pass_on(&host, output, &events));
                scope.spawn(|| pass_on(&host, errors, &events));
            });
            let status = child.wait();
            drop(events.send(Event::Ended { host, status }));
        });
    }

    /// The end of the input is no reason to end: it may never have been there.
    fn listen(&self) {
        let events = self.events.clone();
        thread::spawn(move || {
            for line in io::stdin().lock().lines().map_while(Result::ok) {
                if events.send(Event::Told(line)).is_err() {
                    return;
                }
            }
        });
    }

    fn serve(&mut self, incoming: &Receiver<Event>, ends_with_programs: bool) -> io::Result<()> {
        while self.running > 0 || !ends_with_programs {
            let Ok(event) = incoming.recv() else { return Ok(()) };
            let mut output = io::stdout().lock();
            match event {
                Event::Interrupted => return Ok(()),
                Event::Printed { host, line } => writeln!(output, "{host} | {line}")?,
                Event::Ended { host, status } => {
                    self.running -= 1;
                    self.has_failed |= !status.as_ref().is_ok_and(ExitStatus::success);
                    match status {
                        Ok(status) => writeln!(output, "{host}: {status}")?,
                        Err(error) => writeln!(output, "{host}: {error}")?,
                    }
                }
                Event::Told(line) => match line.parse::<Control>() {
                    Ok(Control::Quit) => return Ok(()),
                    Ok(Control::Run(host, words)) => match self.start(&host, &words) {
                        Ok(()) => writeln!(output, "done")?,
                        Err(error) => writeln!(output, "error: {error:#}")?,
                    },
                    Ok(control) => match control.apply(&self.lab) {
                        Some(Ok(answer)) => writeln!(output, "{answer}")?,
                        Some(Err(error)) => writeln!(output, "error: {error}")?,
                        None => {}
                    },
                    Err(message) => writeln!(output, "error: {message}")?,
                },
            }
            output.flush()?;
        }
        Ok(())
    }
}

fn pass_on(host: &str, stream: Option<impl Read>, events: &SyncSender<Event>) {
    let Some(stream) = stream else { return };
    let mut reader = BufReader::new(stream);
    let mut line = Vec::new();
    while reader.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
        let text = String::from_utf8_lossy(&line).trim_end().to_owned();
        if events.send(Event::Printed { host: host.to_owned(), line: text }).is_err() {
            return;
        }
        line.clear();
    }
}
