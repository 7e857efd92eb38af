//! The child process in which a node computes: the same binary, started by the node with a socket as standard input. Not for people.

use std::{
    io::{self, IsTerminal},
    os::{fd::AsFd, unix::net::UnixStream},
};

use anyhow::Context;

use crate::exit::{Code, Failure};

/// Serves the node at the other end of standard input until it closes.
pub(crate) fn run() -> anyhow::Result<()> {
    let input = io::stdin();
    let socket = UnixStream::from(input.as_fd().try_clone_to_owned().context("taking over the socket")?);
    // Standard input that is no socket has no peer.
    if input.is_terminal() || socket.peer_addr().is_err() {
        return Err(Failure::because(
            Code::Usage,
            format!(
                "`murmur {}` is started by a node, with a socket to talk over; by hand it has nothing to do. Start a node with `murmur serve MODEL`",
                murmur_node::CHILD_SUBCOMMAND
            ),
        ));
    }
    murmur_node::child::run(socket).context("the engine process")
}
