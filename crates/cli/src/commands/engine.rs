//! `murmur engine`: the child process that a node starts to compute in. Not for people.

use crate::exit::{Code, Failure};

pub(super) fn run() -> anyhow::Result<()> {
    Err(Failure::new(
        Code::Usage,
        "`murmur engine` is started by a node, with a socket to talk over; by hand it has nothing to do. Start a node with `murmur serve MODEL`.",
    ))
}
