//! The mesh's messages from outside: what is sent arrives, what is hostile is refused, and the encoding stays what it is.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test ends when something is off")]

mod attestations;
mod frames;
mod golden;
mod hostile;
mod membership;
mod round_trips;
mod samples;
