//! The child process alone, for this crate's tests; the `murmur` binary has it as a hidden subcommand.

use std::{os::fd::AsFd, os::unix::net::UnixStream, process::ExitCode};

fn main() -> ExitCode {
    let socket = match std::io::stdin().as_fd().try_clone_to_owned() {
        Ok(fd) => UnixStream::from(fd),
        Err(error) => {
            eprintln!("standard input is not a socket: {error}");
            return ExitCode::FAILURE;
        }
    };
    match murmur_engine::child::run(socket) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
