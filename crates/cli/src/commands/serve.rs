//! `murmur serve`: models behind the API, offered to a mesh where one is named.

use murmur_node::{ModelSpec, NodeOptions};
use murmur_protocol::codec::Codec;
use murmur_store::ModelRef;

use super::{
    Session, launch,
    server::{self, Plan},
};
use crate::{
    args::Serve,
    exit::{Code, Failure},
    membership,
    target::{self, LocalModel},
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
    let mesh = membership::wanted(&session.data_dir, &args.mesh)?;
    if let (Some(layers), None) = (args.limits.max_layers, &mesh) {
        return Err(Failure::because(
            Code::Usage,
            format!(
                "--max-layers {layers} leaves the other layers to a mesh, and none is named. Name one with --mesh or --join"
            ),
        ));
    }
    if args.engine.exact && args.codec != Codec::F32 {
        return Err(Failure::because(
            Code::Usage,
            format!(
                "--codec {} rounds hidden states, and --exact allows no rounding. Leave one of them out",
                args.codec.name()
            ),
        ));
    }
    let plan = async {
        let models = models(session, &args).await?;
        let on_demand = if args.on_demand { others(session, &models)? } else { Vec::new() };
        let node = NodeOptions {
            on_demand,
            idle: args.idle.into(),
            sharing: args.limits.sharing(),
            layers_max: args.limits.max_layers,
            lossy: Codec::ALL.into_iter().filter(|codec| (Codec::F16..=args.codec).contains(codec)).collect(),
            ring: args.ring.wishes(),
            standby: args.standby,
            spread: mesh.is_some(),
            peer_wait: args.mesh.wait.into(),
            ..launch::node_options(session, models, &args.engine).await?
        };
        Ok(Plan { node, mesh })
    };
    server::run(session, &args.server, plan)
}

/// The models to serve, under the names that clients use.
async fn models(session: &Session, args: &Serve) -> anyhow::Result<Vec<LocalModel>> {
    let wanted = match args.models.is_empty() {
        false => args.models.clone(),
        true if args.on_demand => Vec::new(),
        true => vec![only_model(session)?],
    };
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

/// All other models of the store.
fn others(session: &Session, models: &[LocalModel]) -> anyhow::Result<Vec<ModelSpec>> {
    let entries = session.store().list()?.into_iter();
    let others = entries.filter(|entry| models.iter().all(|model| model.path != entry.path));
    Ok(others.map(|entry| ModelSpec { path: entry.path, id: entry.name.to_string() }).collect())
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
