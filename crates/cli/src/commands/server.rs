//! A node behind the API, until told to stop. The API is there from the first moment, and says how far loading is.

use std::{
    future::Future,
    net::{SocketAddr, TcpListener},
    sync::Arc,
};

use anyhow::Context;
use murmur_api::ApiOptions;
use murmur_net::{Mesh, MeshOptions};
use murmur_node::{Node, NodeError, NodeOptions};
use serde_json::{Value, json};
use tokio::sync::watch;

use super::{
    Session,
    launch::{self, LoadBar},
    node_runtime,
};
use crate::{
    args::ServerArgs,
    exit::{Code, Failure},
    membership::DataLock,
    ui,
};

/// What runs behind the API.
pub(super) struct Plan {
    pub(super) node: NodeOptions,
    /// `None`: the node stays alone.
    pub(super) mesh: Option<MeshOptions>,
}

/// Serves what `plan` says, which is asked for once it is clear that there is an address to serve at.
pub(super) fn run(
    session: &Session,
    args: &ServerArgs,
    plan: impl Future<Output = anyhow::Result<Plan>>,
) -> anyhow::Result<()> {
    let api = ApiOptions {
        api_keys: session.global.api_key.iter().cloned().collect(),
        allowed_hosts: args.allow_host.clone(),
        allowed_origins: args.allow_origin.clone(),
        ..ApiOptions::default()
    };
    // What is wrong with the address is told before anything is loaded.
    api.validate(session.global.api)?;
    let listener = launch::listen(session)?;
    let runtime = node_runtime()?;
    let outcome = runtime.block_on(async { serve(session, plan.await?, api, listener).await });
    // A load that was interrupted may still be reading a file; nobody waits for it.
    runtime.shutdown_background();
    outcome
}

async fn serve(session: &Session, plan: Plan, api: ApiOptions, listener: TcpListener) -> anyhow::Result<()> {
    let Plan { node: options, mesh } = plan;
    let _lock = mesh.is_some().then(|| DataLock::take(&session.data_dir)).transpose()?;
    let bar = LoadBar::new(session, options.stages);
    let opened = tokio::task::spawn_blocking(move || Node::open(options));
    let node = Arc::new(opened.await.context("reading the models")??);
    if mesh.is_some() {
        node.will_join_mesh();
    }
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let address = listener.local_addr()?;
    // The first says to stop, the second to stop at once.
    let (stop, stopping) = watch::channel(0u32);
    let signals = tokio::spawn(count_stops(stop));
    let outcome = {
        let starting = start_and_tell(session, bar, &node, mesh, address, stopping.clone());
        let serving = serve_until_stopped(session, &node, listener, api, stopping);
        // A model that cannot be loaded ends the server; a server that has ended needs no model.
        tokio::pin!(starting, serving);
        tokio::select! {
            outcome = &mut starting => match outcome {
                Ok(()) => serving.await,
                failed => failed,
            },
            // What is stopped while it loads was interrupted, although the server ends in order.
            outcome = &mut serving => outcome.and_then(|()| Err(interrupted())),
        }
    };
    signals.abort();
    node.shutdown().await;
    outcome
}

/// Joins the mesh and loads the models, which clients can watch at `/health`, and says when they can be used.
async fn start_and_tell(
    session: &Session,
    bar: LoadBar,
    node: &Arc<Node>,
    mesh: Option<MeshOptions>,
    address: SocketAddr,
    mut stopping: watch::Receiver<u32>,
) -> anyhow::Result<()> {
    let starting = async {
        if let Some(mesh) = mesh {
            node.join_mesh(mesh).await.context("joining the mesh")?;
        }
        node.load(bar.listener()).await.map_err(|error| match error {
            NodeError::Interrupted => interrupted(),
            error => error.into(),
        })
    };
    let outcome = tokio::select! {
        outcome = starting => outcome,
        _ = stopping.wait_for(|&times| times > 0) => {
            node.stop();
            Err(interrupted())
        }
    };
    drop(bar);
    outcome?;
    let names: Vec<String> = node.names().map(ui::without_controls).collect();
    let mesh = node.mesh();
    if session.global.json {
        let mesh = mesh.as_deref().map_or(Value::Null, describe);
        let ready = json!({"event": "ready", "address": address.to_string(), "models": names, "mesh": mesh});
        ui::print(&format!("{ready}\n"))?;
    } else if !session.global.quiet {
        let what = if names.is_empty() { "the mesh's models".to_owned() } else { names.join(", ") };
        ui::say(&format!("serving {what} at http://{address}/v1"));
        if let Some(mesh) = mesh.as_deref() {
            let kind = if mesh.is_private() { "private" } else { "public" };
            ui::say(&format!("in the {kind} mesh {}", ui::without_controls(mesh.mesh_name())));
        }
        ui::say("Ctrl-C ends it");
    }
    Ok(())
}

fn describe(mesh: &Mesh) -> Value {
    json!({
        "name": mesh.mesh_name(),
        "id": mesh.mesh_id().to_string(),
        "private": mesh.is_private(),
        "node": mesh.node_id().to_string(),
    })
}

fn interrupted() -> anyhow::Error {
    Failure::because(Code::Interrupted, "interrupted while loading")
}

async fn serve_until_stopped(
    session: &Session,
    node: &Arc<Node>,
    listener: tokio::net::TcpListener,
    api: ApiOptions,
    stopping: watch::Receiver<u32>,
) -> anyhow::Result<()> {
    let times = |least: u32| {
        let mut stopping = stopping.clone();
        async move {
            // The counter of signals lives as long as the server.
            let _ = stopping.wait_for(|&times| times >= least).await;
        }
    };
    let first = async {
        times(1).await;
        node.close();
        if !session.global.quiet {
            ui::say("finishing what runs; Ctrl-C again ends at once");
        }
    };
    let serving = murmur_api::serve(listener, node.clone(), api, first);
    tokio::pin!(serving);
    tokio::select! {
        outcome = &mut serving => {
            outcome?;
            tokio::select! {
                () = node.drain() => {}
                () = times(2) => {}
            }
        }
        () = times(2) => {
            // Clients hear that their answers are cut off, if they listen.
            node.stop();
            if let Ok(outcome) = tokio::time::timeout(murmur_api::limits::FAREWELL, serving).await {
                outcome?;
            }
        }
    }
    Ok(())
}

/// Counts what says to stop.
async fn count_stops(stop: watch::Sender<u32>) {
    loop {
        wait_for_stop().await;
        stop.send_modify(|times| *times += 1);
    }
}

/// Ctrl-C, or what a service manager sends.
pub(super) async fn wait_for_stop() {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let Ok(mut terminate) = signal(SignalKind::terminate()) {
            tokio::select! {
                _ = tokio::signal::ctrl_c() => {}
                _ = terminate.recv() => {}
            }
            return;
        }
    }
    // Without signals there is nothing to wait for but the end of the process.
    if tokio::signal::ctrl_c().await.is_err() {
        std::future::pending::<()>().await;
    }
}
