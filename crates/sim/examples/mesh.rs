//! Prints what a mesh of any size costs and how fast it is.
//!
//! `cargo run -p murmur-sim --release --example mesh -- --nodes 1000 --churn 1 --loss 5 --minutes 10 --seed 1`
#![allow(clippy::print_stdout)] // its purpose

use std::time::Instant;

use clap::Parser;
use murmur_sim::{Churn, NetworkOptions, RECORD_BYTES, Scenario, Sim};

const MINUTE_MS: u64 = 60_000;

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
    /// Simulated minutes, after one in which the nodes start.
    #[arg(long, default_value_t = 10)]
    minutes: u64,
    /// Decides everything that is drawn.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let options = Options::parse();
    let began = Instant::now();
    let mut sim = Sim::new(Scenario {
        nodes: options.nodes,
        liars: options.liars,
        seed: options.seed,
        network: NetworkOptions { loss: options.loss / 100.0, ..NetworkOptions::default() },
        starting_ms: MINUTE_MS / 2,
        ..Scenario::default()
    })?;
    println!(
        "{} nodes, {} % churn per minute, {} % loss, records of {RECORD_BYTES} bytes, seed {}",
        options.nodes, options.churn, options.loss, options.seed
    );
    sim.run_for(MINUTE_MS);
    println!("start:  discovery {}; {} pairs unknown after a minute", sim.report().discovery, sim.unknown_pairs());
    sim.reset_report();
    let mut churn = Churn::new(options.nodes, options.churn / 100.0, options.seed);
    for minute in 1..=options.minutes {
        churn.run(&mut sim, MINUTE_MS);
        println!(
            "minute {minute}: {} alive, {} pairs unknown, {:.0} s of real time",
            sim.alive().count(),
            sim.unknown_pairs(),
            began.elapsed().as_secs_f64()
        );
    }
    println!("{}", sim.report());
    Ok(())
}
