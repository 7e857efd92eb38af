//! Which model, and who runs it: the server that is there, or a node that this command starts for itself.

use std::path::PathBuf;

use murmur_node::Sought;
use murmur_store::{ModelRef, Resolved, StoreError};
use serde_json::Value;

use crate::{
    client::ApiClient,
    commands::{Session, mesh_models},
    exit::{Code, Failure},
    pull,
};

/// A model as a node opens it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LocalModel {
    pub(crate) path: PathBuf,
    /// The name under which the API knows it.
    pub(crate) id: String,
}

impl From<Resolved> for LocalModel {
    fn from(resolved: Resolved) -> Self {
        Self { path: resolved.path, id: resolved.name.to_string() }
    }
}

/// Where a model is that a server is to have.
#[derive(Debug)]
pub(crate) enum Place {
    Here(LocalModel),
    /// In the mesh or on the hub.
    Elsewhere(Sought),
}

/// Who runs the model.
#[derive(Debug)]
pub(crate) enum Target {
    /// The server at `--api`, under this name.
    Server(ApiClient, String),
    /// Nobody yet.
    Local(LocalModel),
}

/// Finds the model of a command line. A name that the running server knows is the server's; a path is always this machine's own, as
/// a name made from it could mean another file there.
pub(crate) async fn find(session: &Session, model: Option<&ModelRef>) -> anyhow::Result<Target> {
    let client = session.client();
    let served = client.get("/v1/models").await.map(|answer| ids(&answer));
    let Some(model) = model else {
        return match served?.as_slice() {
            [only] => Ok(Target::Server(client, only.clone())),
            [] => Err(Failure::because(
                Code::NotFound,
                format!("the server at {} has no model. Name one to start it here.", client.address()),
            )),
            several => Err(Failure::because(
                Code::Usage,
                format!("the server has several models: {}. Name one.", several.join(", ")),
            )),
        };
    };
    // No server is no failure: the model then runs here.
    let served = served.unwrap_or_default();
    match model {
        ModelRef::Path(_) => {}
        ModelRef::Name(name) => {
            if let Some(id) = served.iter().find(|id| *id == name.as_str()) {
                return Ok(Target::Server(client, id.clone()));
            }
            // A digest is of what the server may have under a name.
            let here = local(session, model).await?;
            return Ok(match served.into_iter().find(|id| *id == here.id) {
                Some(id) => Target::Server(client, id),
                None => Target::Local(here),
            });
        }
        ModelRef::Hub(reference) => {
            let known = session.store().resolve(model).ok();
            if let Some(id) =
                served.into_iter().find(|id| known.as_ref().is_some_and(|known| id == known.name.as_str()))
            {
                return Ok(Target::Server(client, id));
            }
            // What that has fetched is in the store then. What it has not, the hub gives.
            if known.is_none() {
                mesh_models::fetch_of_hub(session, reference).await?;
            }
        }
    }
    Ok(Target::Local(local(session, model).await?))
}

fn ids(answer: &Value) -> Vec<String> {
    let models = answer.get("data").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    models.iter().filter_map(|model| model.get("id").and_then(Value::as_str)).map(str::to_owned).collect()
}

/// Finds the file of a model on this machine; one on a hub is pulled when it is not here yet.
pub(crate) async fn local(session: &Session, model: &ModelRef) -> anyhow::Result<LocalModel> {
    let store = session.store();
    match (store.resolve(model), model) {
        (Err(StoreError::NoSuchModel { .. }), ModelRef::Hub(reference)) => {
            let entry = pull::pull(&store, reference, None, session.global.quiet).await?;
            // By its name it is held.
            Ok(store.resolve(&ModelRef::Name(entry.name))?.into())
        }
        (other, _) => Ok(other?.into()),
    }
}
