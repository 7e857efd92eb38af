//! `murmur serve`: models behind the API, offered to a mesh where one is named.

use std::time::Duration;

use murmur_node::{ModelSpec, NodeOptions, Sought, WantedModel};
use murmur_protocol::{codec::Codec, mesh::NodeId};
use murmur_store::{HubRef, ModelRef, StoreError, hub::HubFile};
use tokio::time::timeout;

use super::{
    Session, launch,
    server::{self, Plan},
    signed,
};
use crate::{
    args::Serve,
    exit::{Code, Failure},
    membership,
    target::{self, LocalModel, Place},
};

/// A hub that has not said by then whether it has a model is not waited for.
const HUB_ANSWER_MAX: Duration = Duration::from_secs(3);

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
        let Models { here, elsewhere } = models(session, &args, mesh.is_some()).await?;
        let on_demand = if args.on_demand { others(session, &here, args.signed_by)? } else { Vec::new() };
        let find = async |model: &ModelRef| find(session, &args, mesh.is_some(), model).await;
        let draft = launch::draft(session, &here, &args.engine, find, args.signed_by).await?;
        let node = NodeOptions {
            wanted: elsewhere,
            on_demand,
            idle: args.idle.into(),
            sharing: args.limits.sharing(),
            hands_out_files: !args.limits.keep_files,
            upload_bytes_per_s: args.limits.max_upload.map(|size| size.0),
            download_bytes_per_s: args.limits.max_download.map(|size| size.0),
            layers_max: args.limits.max_layers,
            region: args.limits.region.clone().unwrap_or_default(),
            lossy: Codec::ALL.into_iter().filter(|codec| (Codec::F16..=args.codec).contains(codec)).collect(),
            ring: args.ring.wishes(),
            standby: args.standby,
            spread: mesh.is_some(),
            peer_wait: args.mesh.wait.into(),
            hub_by_word: !args.mesh.no_hub,
            ..launch::node_options(session, here, &args.engine, draft)?
        };
        Ok(Plan { node, mesh })
    };
    server::run(session, &args.server, plan)
}

/// What is to be served.
#[derive(Default)]
struct Models {
    /// Models of this machine, under the names that clients use.
    here: Vec<LocalModel>,
    /// Those that other nodes may have, or the hub.
    elsewhere: Vec<WantedModel>,
}

/// What was named. What is not on this machine may be in the mesh, where there is one.
async fn models(session: &Session, args: &Serve, has_mesh: bool) -> anyhow::Result<Models> {
    let wanted = match args.models.is_empty() {
        false => args.models.clone(),
        true if args.on_demand => Vec::new(),
        true => vec![only_model(session)?],
    };
    let Models { here: mut models, mut elsewhere } = Models::default();
    for (at, reference) in wanted.iter().enumerate() {
        let alias = args.alias.get(at).map(ToString::to_string);
        let mut model = match find(session, args, has_mesh, reference).await? {
            Place::Here(model) => model,
            Place::Elsewhere(sought) => {
                elsewhere.push(WantedModel { sought, id: alias, signed_by: args.signed_by });
                continue;
            }
        };
        if let Some(alias) = alias {
            model.id = alias;
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
    Ok(Models { here: models, elsewhere })
}

/// Finds a model that was named, and refuses what is not to be served, before anything of it is downloaded or loaded.
async fn find(session: &Session, args: &Serve, has_mesh: bool, reference: &ModelRef) -> anyhow::Result<Place> {
    let place = match (has_mesh, args.signed_by) {
        (false, None) => Place::Here(target::local(session, reference).await?),
        _ => here_or_elsewhere(session, reference)?,
    };
    match (&place, args.signed_by) {
        (Place::Here(model), Some(signer)) => signed::demand(session, model, signer)?,
        (Place::Elsewhere(sought), Some(signer)) if !has_mesh => {
            return Err(Failure::because(
                Code::Usage,
                format!(
                    "{sought} is not on this machine, and that {signer} has signed it only the nodes of a mesh could show. Name one with --mesh or --join"
                ),
            ));
        }
        (Place::Elsewhere(Sought::Hub(reference)), _) => refuse_unknown(reference).await?,
        (Place::Here(_) | Place::Elsewhere(Sought::Name(_)), _) => {}
    }
    Ok(place)
}

/// What is not on this machine, or not all of it, or not any more, is fetched by the node, from the mesh and from the hub.
fn here_or_elsewhere(session: &Session, reference: &ModelRef) -> anyhow::Result<Place> {
    let sought = |error: &StoreError| match (error, reference) {
        (StoreError::NoSuchModel { .. }, ModelRef::Name(name)) => Some(Sought::Name(name.clone())),
        (StoreError::NoSuchModel { .. }, ModelRef::Hub(reference)) => Some(Sought::Hub(reference.clone())),
        (StoreError::NotHere { source_name, .. } | StoreError::Incomplete { source_name, .. }, _) => {
            source_name.parse().ok()
        }
        _ => None,
    };
    match session.store().resolve(reference) {
        Ok(resolved) => Ok(Place::Here(resolved.into())),
        Err(error) => sought(&error).map(Place::Elsewhere).ok_or_else(|| error.into()),
    }
}

/// Refuses at once what the hub does not know: no node can have it from there. A hub that is not to be asked, does not answer or says anything
/// else is no reason to: nodes may have the file.
async fn refuse_unknown(reference: &HubRef) -> anyhow::Result<()> {
    let Some(hub) = launch::hub().filter(|hub| !hub.is_offline()) else { return Ok(()) };
    match timeout(HUB_ANSWER_MAX, HubFile::open(&hub, reference)).await {
        Ok(Err(error @ StoreError::NotOnHub { .. })) => Err(error.into()),
        _ => Ok(()),
    }
}

/// All other models of the store, or those of them that a key has signed.
fn others(session: &Session, models: &[LocalModel], signed_by: Option<NodeId>) -> anyhow::Result<Vec<ModelSpec>> {
    let entries = session.store().list()?.into_iter();
    // What went to make room has its name still.
    let others = entries.filter(|entry| entry.path.exists() && models.iter().all(|model| model.path != entry.path));
    let others = others.filter(|entry| signed::is_known_to_be(session, &entry.path, signed_by));
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
