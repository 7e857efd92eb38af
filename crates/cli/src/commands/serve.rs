//! `murmur serve`: models behind the API, until told to stop.

use std::net::TcpListener;

use murmur_api::ApiOptions;
use murmur_store::ModelRef;
use serde_json::json;

use super::{Session, launch, node_runtime};
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
    let names: Vec<String> = models.iter().map(|model| model.id.clone()).collect();
    let node = launch::load(session, models, &args.engine).await?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let address = listener.local_addr()?;
    if session.global.json {
        ui::print(&format!("{}\n", json!({"event": "ready", "address": address.to_string(), "models": names})))?;
    } else if !session.global.quiet {
        ui::say(&format!("serving {} at http://{address}/v1", names.join(", ")));
        ui::say("Ctrl-C ends it");
    }
    let quiet = session.global.quiet;
    let until = async move {
        wait_for_stop().await;
        if !quiet {
            ui::say("finishing what runs; Ctrl-C again ends at once");
        }
    };
    let serving = murmur_api::serve(listener, node.clone(), api, until);
    tokio::select! {
        outcome = serving => outcome?,
        () = async { wait_for_stop().await; wait_for_stop().await } => {}
    }
    node.shutdown().await;
    Ok(())
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
