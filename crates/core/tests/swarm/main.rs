//! Files from many sources: fast and slow ones, liars, drips, and each other.

#![allow(unreachable_pub, clippy::expect_used, reason = "helpers of tests are of this test alone, and may end it")]

mod events;
mod sim;
mod worlds;
