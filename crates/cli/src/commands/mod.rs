//! One file per command.

mod bench;
mod client;
mod doctor;
pub(crate) mod engine;
mod launch;
mod machine;
mod memberships;
mod mesh;
pub(crate) mod mesh_models;
mod models;
mod pages;
mod run;
mod seed;
mod self_test;
mod serve;
mod server;
mod show;
mod sign;
mod signed;
mod status;
mod top;
mod upkeep;

use std::path::PathBuf;

use anyhow::Context;
use murmur_store::Store;
use tokio::runtime::Runtime;

use crate::{
    args::{Command, Global},
    client::ApiClient,
    settings::{Invocation, Setting},
};

/// What every command may need.
#[derive(Debug, Clone)]
pub(crate) struct Session {
    pub(crate) global: Global,
    pub(crate) data_dir: PathBuf,
    pub(crate) config_file: Option<PathBuf>,
    pub(crate) effective: Vec<Setting>,
}

impl Session {
    pub(crate) fn store(&self) -> Store {
        Store::at(&self.data_dir)
    }

    /// A client of the server at `--api`.
    pub(crate) fn client(&self) -> ApiClient {
        ApiClient::new(self.global.api, self.global.api_key.clone())
    }
}

/// Does what was asked.
pub(crate) fn run(invocation: Invocation) -> anyhow::Result<()> {
    let Invocation { cli, data_dir, config_file, effective } = invocation;
    let session = Session { global: cli.global, data_dir, config_file, effective };
    match cli.command {
        Command::Serve(args) => serve::run(&session, *args),
        Command::Run(args) => run::run(&session, args),
        Command::Models(command) => models::run(&session, command),
        Command::Client(args) => client::run(&session, &args),
        Command::Mesh(command) => mesh::run(&session, command),
        Command::Seed(args) => seed::run(&session, &args),
        Command::Status => status::run(&session),
        Command::Top(args) => top::run(&session, &args),
        Command::Doctor(args) => doctor::run(&session, &args),
        Command::Bench(args) => bench::run(&session, args),
        Command::Completions { shell } => pages::completions(shell),
        Command::Man { dir } => pages::man(dir.as_deref()),
    }
}

/// A runtime for commands that ask one thing and wait for it.
pub(crate) fn small_runtime() -> anyhow::Result<Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting the runtime")
}

/// A runtime for commands in which a node runs.
pub(crate) fn node_runtime() -> anyhow::Result<Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().context("starting the runtime")
}
