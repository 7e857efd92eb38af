//! The `murmur` command.
//!
//! `main` does nothing before it knows what is asked: no runtime, no engine, no network. Start reading at [`args`] (every command,
//! flag, environment variable and configuration key, each in one place), then [`settings`] (where values come from), then the
//! command of interest in [`commands`].

mod args;
mod chat;
mod client;
mod commands;
mod exit;
mod membership;
mod pull;
mod qr;
mod settings;
mod sse;
mod target;
mod ui;
mod units;

use std::process::ExitCode;

fn main() -> ExitCode {
    // The engine's child process has a socket for everything it needs to know, and reads no settings.
    if std::env::args_os().nth(1).is_some_and(|name| name == murmur_node::CHILD_SUBCOMMAND) {
        return match commands::engine::run() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => exit::report(&error, false),
        };
    }
    let invocation = match settings::parse(std::env::args_os()) {
        Ok(invocation) => invocation,
        Err(error) => return exit::report(&error, false),
    };
    let wants_json = invocation.cli.global.json;
    let outcome = ui::start_log(&invocation.cli.global).and_then(|()| commands::run(invocation));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => exit::report(&error, wants_json),
    }
}
