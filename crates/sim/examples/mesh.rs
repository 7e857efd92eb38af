//! Prints what a mesh of any size costs and how fast it is, and whether that is within the bars.
//!
//! `cargo run -p murmur-sim --release --example mesh -- --nodes 1000 --churn 1 --loss 5 --minutes 10 --seed 1`
#![allow(clippy::print_stdout)] // its purpose

use std::process::ExitCode;

use clap::Parser;
use murmur_sim::{Churn, DISCOVERY_MS_MAX, GONE_MS_MAX, NetworkOptions, RECORD_BYTES, Scenario, Sim, Survey, Times};

const MINUTE_MS: u64 = 60_000;

/// Times count as kept if this part of them is.
const PART: f64 = 0.99;

#[derive(Parser)]
#[command(about = "Simulates a mesh and prints discovery times, ghosts and bytes")]
struct Options {
    /// Nodes.
    #[arg(long, default_value_t = 1_000)]
    nodes: u32,
    /// Of these, how many lie.
    #[arg(long, default_value_t = 0)]
    liars: u32,
    /// Percent of the nodes that go in a minute, and come back.
    #[arg(long, default_value_t = 1.0)]
    churn: f64,
    /// Percent of the packets that are lost.
    #[arg(long, default_value_t = 5.0)]
    loss: f64,
    /// Simulated seconds in which the nodes start, before half a minute of rest.
    #[arg(long, default_value_t = 30)]
    starting: u64,
    /// The nodes know each other from the beginning.
    #[arg(long)]
    settled: bool,
    /// Simulated minutes after that.
    #[arg(long, default_value_t = 10)]
    minutes: u64,
    /// Decides everything that is drawn.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Exit with 1 when a bar is missed.
    #[arg(long)]
    strict: bool,
}

fn main() -> Result<ExitCode, Box<dyn std::error::Error>> {
    let options = Options::parse();
    let mut sim = Sim::new(Scenario {
        nodes: options.nodes,
        liars: options.liars,
        seed: options.seed,
        network: NetworkOptions { loss: options.loss / 100.0, ..NetworkOptions::default() },
        starting_ms: options.starting * 1_000,
        settled: options.settled,
        ..Scenario::default()
    })?;
    println!(
        "{} nodes, {} % churn per minute, {} % loss, records of {RECORD_BYTES} bytes, seed {}",
        options.nodes, options.churn, options.loss, options.seed
    );
    println!("             alive   pairs unknown, overdue   ghosts listed, overdue   one core");
    let mut worst = Survey::default();
    let mut look = |sim: &Sim, when: &str| {
        let survey = sim.survey();
        worst.overdue_pairs = worst.overdue_pairs.max(survey.overdue_pairs);
        worst.overdue_ghosts = worst.overdue_ghosts.max(survey.overdue_ghosts);
        println!(
            "{when:<12}{:>6}{:>16}{:>9}{:>16}{:>9}{:>10.0} s",
            sim.alive().count(),
            survey.unknown_pairs,
            survey.overdue_pairs,
            survey.ghost_pairs,
            survey.overdue_ghosts,
            core_s()
        );
    };
    sim.run_for(options.starting * 1_000 + MINUTE_MS / 2);
    look(&sim, "start");
    let start = sim.report().discovery.clone();
    sim.reset_report();
    let mut churn = Churn::new(options.nodes, options.churn / 100.0, options.seed);
    for minute in 1..=options.minutes {
        churn.run(&mut sim, MINUTE_MS);
        look(&sim, &format!("minute {minute}"));
    }
    let report = sim.report();
    println!("\ndiscovery, start  {start}\n{report}");
    let rates = sim.bytes_per_second();
    let rate =
        |part: f64| rates.get((rates.len() as f64 * part) as usize).or(rates.last()).map_or(0.0, |rate| rate / 1e3);
    println!("of each node      p50 {:.1} kB/s, p99 {:.1} kB/s, max {:.1} kB/s", rate(0.5), rate(PART), rate(1.0));
    println!("this run          {:.0} s of one core, {} of memory at most", core_s(), memory_at_most());

    println!();
    let mut bars = Bars::default();
    bars.time("known to every other, all starting: p99", &start, PART, DISCOVERY_MS_MAX);
    bars.time("known to every other, with churn: p99", &report.discovery, PART, DISCOVERY_MS_MAX);
    bars.time("gone after a goodbye: max", &report.farewell, 1.0, GONE_MS_MAX);
    bars.time("gone after the last record's end: max", &report.ghosts, 1.0, GONE_MS_MAX);
    // What has not happened at all has no time.
    let pairs = f64::from(options.nodes) * f64::from(options.nodes.saturating_sub(1));
    let overdue = 100.0 * worst.overdue_pairs as f64 / pairs.max(1.0);
    bars.line(
        "pairs unknown beyond that, at worst",
        &format!("{overdue:.2} %"),
        "1 %",
        overdue <= 100.0 * (1.0 - PART),
    );
    let ghosts = worst.overdue_ghosts as u64 + report.resurrections;
    bars.line("ghosts listed beyond that, and anew", &ghosts.to_string(), "0", ghosts == 0);
    println!("{} bars missed", bars.missed);
    Ok(ExitCode::from(u8::from(options.strict && bars.missed > 0)))
}

/// What is printed with what it should be.
#[derive(Default)]
struct Bars {
    missed: usize,
}

impl Bars {
    fn time(&mut self, what: &str, times: &Times, part: f64, bar_ms: u64) {
        let time_ms = times.quantile_ms(part);
        let seconds = |ms: u64| format!("{:.2} s", ms as f64 / 1_000.0);
        self.line(what, &seconds(time_ms), &seconds(bar_ms), time_ms <= bar_ms);
    }

    fn line(&mut self, what: &str, value: &str, bar: &str, reached: bool) {
        self.missed += usize::from(!reached);
        println!("{what:<42}{value:>9}   bar {bar:>7}   {}", if reached { "reached" } else { "missed" });
    }
}

/// Seconds that this thread has computed for, as Linux tells; 0 elsewhere.
fn core_s() -> f64 {
    let schedule = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let ns = schedule.split(' ').next().and_then(|ns| ns.parse().ok());
    ns.map_or(0.0, |ns: f64| ns / 1e9)
}

/// The most memory that this process has had, as Linux tells.
fn memory_at_most() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.map_or_else(|| "unknown".to_owned(), |kib| kib.trim().to_owned())
}
