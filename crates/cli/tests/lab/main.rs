//! Meshes of real processes in the lab: hosts of their own behind NATs and bad links. Needs root and TUN devices; without, every
//! test says so and passes.

#![cfg(target_os = "linux")]
#![allow(
    clippy::panic,
    clippy::unwrap_used,
    unreachable_pub,
    reason = "a test ends when something is off, and is no library"
)]

mod clocks;
#[path = "../common/mod.rs"]
mod common;
mod contents;
mod death;
mod doctor;
mod faults;
mod join;
mod many;
mod meshes;
mod ring;
mod ring_architectures;
mod ring_drafts;
mod ring_links;
mod ring_matrix;
mod ring_moves;
mod ring_standby;
mod world;
