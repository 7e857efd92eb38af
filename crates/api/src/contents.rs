//! Model files of the node and its mesh: `GET /api/models` and `/api/models/signatures`, `POST /api/models/pull` and `stop`.
//!
//! Whoever may use the API may do all of it, as with the [mesh](crate::mesh).

use std::{convert::Infallible, sync::Arc};

use axum::{
    Json,
    body::Body,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures::stream;
use serde_json::{Value, json};

use crate::{
    body::JsonObject,
    errors::ApiError,
    fields::{Fields, too_long},
    limits::MAX_MODEL_NAME_BYTES,
    state::AppState,
};

/// `GET /api/models`: the model files that this node and the nodes of its mesh have, or have parts of.
pub(crate) async fn list(State(state): State<Arc<AppState>>) -> Result<Json<Value>, ApiError> {
    // What is said of files is read from the disk.
    let read = tokio::task::spawn_blocking(move || state.backend.contents()).await;
    let models = read.map_err(|_| {
        let message = "The server has a defect in how it lists models.";
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, message).code("internal_error")
    })?;
    Ok(Json(json!({"models": models})))
}

/// `GET /api/models/signatures`: by the digest of each of these files, what was signed of it. Nodes that have them are asked, so it takes a moment.
pub(crate) async fn signatures(State(state): State<Arc<AppState>>) -> Json<Value> {
    Json(json!({"signatures": state.backend.signatures().await}))
}

/// `POST /api/models/pull`: `{"model"}`, a name that a node of the mesh has, or one of the hub (`hf:owner/repo:quant`), to a stream of
/// server-sent events that say how far it is. With `signed_by`, a key, nothing is fetched that this key has not signed.
/// The last has the `state` `done` or `failed`. It goes on when nobody listens any more.
pub(crate) async fn pull(
    State(state): State<Arc<AppState>>,
    JsonObject(map): JsonObject,
) -> Result<Response, ApiError> {
    let mut fields = Fields::new(map);
    let (name, signed_by) = (required_name(&mut fields)?, fields.string("signed_by")?);
    fields.finish()?;
    let signed_by = signed_by.map(|key| short("signed_by", key)).transpose()?;
    let events = state.backend.pull(name, signed_by).await?;
    let body = stream::unfold(events, |mut events| async move {
        let event: Value = events.recv().await?;
        Some((Ok::<_, Infallible>(Bytes::from(format!("data: {event}\n\n"))), events))
    });
    let headers = [(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-cache")];
    Ok((headers, Body::from_stream(body)).into_response())
}

/// `POST /api/models/stop`: `{"model"}`, to `{"stopped"}`: false if it was not being pulled. What has come is kept.
pub(crate) async fn stop(
    State(state): State<Arc<AppState>>,
    JsonObject(map): JsonObject,
) -> Result<Json<Value>, ApiError> {
    Ok(Json(json!({"stopped": state.backend.stop_pull(&name(map)?)})))
}

fn name(map: serde_json::Map<String, Value>) -> Result<String, ApiError> {
    let mut fields = Fields::new(map);
    let name = required_name(&mut fields)?;
    fields.finish()?;
    Ok(name)
}

fn required_name(fields: &mut Fields) -> Result<String, ApiError> {
    short("model", fields.required_string("model")?)
}

fn short(field: &str, text: String) -> Result<String, ApiError> {
    match text.len() {
        0..=MAX_MODEL_NAME_BYTES => Ok(text),
        bytes => Err(too_long(field, bytes, MAX_MODEL_NAME_BYTES)),
    }
}
