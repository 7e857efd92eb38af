//! `murmur serve`: models behind the API, until told to stop. The API is there from the first moment, and says how far
//! loading is.

use std::{
    net::{SocketAddr, TcpListener},
    sync::Arc,
};

use anyhow::Context;
use murmur_api::ApiOptions;
use murmur_node::{Node, NodeError};
use murmur_store::ModelRef;
use serde_json::json;
use tokio::sync::watch;

use super::{
    Session,
    launch::{self, LoadBar},
    node_runtime,
};
use crate::{
    args::Serve,
    exit::{Code, Failure},
    target::{self, LocalModel},
    ui,
};

pub(super) fn run(session: &Session, args: Serve) -> anyhow::Result<()> {
    if args.alias.len() > args.models.len().max(1) {
        return Err(Failure::because(
            Code::Usage,
            format!(
                "{} names (--alias) for {} models. Give one name per MODEL at most",
                args.alias.len(),
                args.models.len()
            ),
        ));
    }
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
    let outcome = runtime.block_on(serve(session, args, api, listener));
    // A load that was interrupted may still be reading a file; nobody waits for it.
    runtime.shutdown_background();
    outcome
}

async fn serve(session: &Session, args: Serve, api: ApiOptions, listener: TcpListener) -> anyhow::Result<()> {
    let models = models(session, &args).await?;
    let options = launch::node_options(session, models, &args.engine)?;
    let opened = tokio::task::spawn_blocking(move || Node::open(options));
    let node = Arc::new(opened.await.context("reading the models")??);
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let address = listener.local_addr()?;
    // The first says to stop, the second to stop at once.
    let (stop, stopping) = watch::channel(0u32);
    let signals = tokio::spawn(count_stops(stop));
    let outcome = {
        let loading = load_and_tell(session, &args, &node, address, stopping.clone());
        let serving = serve_until_stopped(session, &node, listener, api, stopping);
        // A model that cannot be loaded ends the server; a server that has ended needs no model.
        tokio::pin!(loading, serving);
        tokio::select! {
            // What is stopped while it loads was interrupted, although the server ends in order.
            biased;
            outcome = &mut loading => match outcome {
                Ok(()) => serving.await,
                failed => failed,
            },
            outcome = &mut serving => outcome,
        }
    };
    signals.abort();
    node.shutdown().await;
    outcome
}

/// Loads the models, which clients can watch at `/health`, and says when they can be used.
async fn load_and_tell(
    session: &Session,
    args: &Serve,
    node: &Arc<Node>,
    address: SocketAddr,
    mut stopping: watch::Receiver<u32>,
) -> anyhow::Result<()> {
    let bar = LoadBar::new(session, &args.engine);
    let outcome = tokio::select! {
        outcome = node.load(bar.listener()) => outcome,
        _ = stopping.wait_for(|&times| times > 0) => {
            node.stop();
            Err(NodeError::Interrupted)
        }
    };
    drop(bar);
    match outcome {
        Err(NodeError::Interrupted) => {
            return Err(Failure::because(Code::Interrupted, "interrupted while loading"));
        }
        outcome => outcome?,
    }
    let names: Vec<String> = node.names().map(ui::without_controls).collect();
    if session.global.json {
        ui::print(&format!("{}\n", json!({"event": "ready", "address": address.to_string(), "models": names})))?;
    } else if !session.global.quiet {
        ui::say(&format!("serving {} at http://{address}/v1", names.join(", ")));
        ui::say("Ctrl-C ends it");
    }
    Ok(())
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
        if !session.global.quiet {
            ui::say("finishing what runs; Ctrl-C again ends at once");
        }
    };
    let serving = murmur_api::serve(listener, node.clone(), api, first);
    tokio::pin!(serving);
    tokio::select! {
        outcome = &mut serving => outcome?,
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

/// The models to serve, under the names that clients use.
async fn models(session: &Session, args: &Serve) -> anyhow::Result<Vec<LocalModel>> {
    let wanted = if args.models.is_empty() { vec![only_model(session)?] } else { args.models.clone() };
    let mut models: Vec<LocalModel> = Vec::new();
    for (at, reference) in wanted.iter().enumerate() {
        let mut model = target::local(session, reference).await?;
        if let Some(alias) = args.alias.get(at) {
            model.id = alias.to_string();
        }
        if let Some(other) = models.iter().find(|other| other.id == model.id) {
            return Err(Failure::because(
                Code::Usage,
                format!(
                    "{} and {} would both be called '{}'. Name them with --alias",
                    other.path.display(),
                    model.path.display(),
                    model.id
                ),
            ));
        }
        models.push(model);
    }
    Ok(models)
}

fn only_model(session: &Session) -> anyhow::Result<ModelRef> {
    let entries = session.store().list()?;
    match entries.as_slice() {
        [only] => Ok(ModelRef::Name(only.name.clone())),
        [] => Err(Failure::because(
            Code::Usage,
            "no MODEL was named and the store is empty. Name a GGUF file, or pull a model: murmur models pull hf:owner/repo",
        )),
        several => {
            let names: Vec<&str> = several.iter().map(|entry| entry.name.as_str()).collect();
            Err(Failure::because(
                Code::Usage,
                format!("no MODEL was named and the store has several: {}. Name those to serve", names.join(", ")),
            ))
        }
    }
}

/// Ctrl-C, or what a service manager sends.
async fn wait_for_stop() {
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
