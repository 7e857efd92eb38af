//! The node's mesh: who is in it, and what can be done about it. `GET /api/mesh`, `POST /api/mesh/invite`, `join` and
//! `revoke`.
//!
//! Whoever may use the API may do all of it: on a loopback address that is this machine, elsewhere the holders of a key.

use std::sync::Arc;

use axum::{Json, extract::State};
use serde_json::Value;

use crate::{
    backend::{MeshAction, Refusal},
    body::JsonObject,
    errors::ApiError,
    fields::{Fields, shorten, too_long},
    limits::{DEFAULT_INVITE_VALID_S, MAX_INVITE_USES, MAX_INVITE_VALID_S, MAX_MESH_TEXT_BYTES},
    router::AppState,
};

/// What the bearer of a ticket can become.
const ROLES: [&str; 2] = ["worker", "client"];

/// `GET /api/mesh`: the mesh and its peers. 404 where the node is in none.
pub(crate) async fn show(State(state): State<Arc<AppState>>) -> Result<Json<Value>, ApiError> {
    Ok(Json(state.backend.mesh().ok_or_else(Refusal::not_in_a_mesh)?))
}

/// `POST /api/mesh/invite`: `{"valid_s", "role", "uses"}`, all of them optional, to `{"ticket", "id",
/// "expires_unix_ms"}`. Without `uses` any number of nodes may come in until the ticket expires.
pub(crate) async fn invite(
    State(state): State<Arc<AppState>>,
    JsonObject(map): JsonObject,
) -> Result<Json<Value>, ApiError> {
    let mut fields = Fields::new(map);
    let valid_s = fields.integer("valid_s", 1..=MAX_INVITE_VALID_S)?.unwrap_or(DEFAULT_INVITE_VALID_S);
    let role = fields.string("role")?.unwrap_or_else(|| ROLES[0].to_owned());
    let uses = fields.integer("uses", 1..=MAX_INVITE_USES)?;
    fields.finish()?;
    if !ROLES.contains(&role.as_str()) {
        let message = format!("Invalid value for `role`: `{}`. Use `{}`.", shorten(&role), ROLES.join("` or `"));
        return Err(ApiError::param("role", message).code("invalid_value"));
    }
    let action =
        MeshAction::Invite { valid_s: valid_s.unsigned_abs(), role, uses: uses.and_then(|uses| uses.try_into().ok()) };
    act(&state, action).await
}

/// `POST /api/mesh/join`: `{"ticket"}`. Looks for peers at the issuer of a ticket for the mesh that the node is in.
pub(crate) async fn join(
    State(state): State<Arc<AppState>>,
    JsonObject(map): JsonObject,
) -> Result<Json<Value>, ApiError> {
    let ticket = only_text(map, "ticket")?;
    act(&state, MeshAction::Join { ticket }).await
}

/// `POST /api/mesh/revoke`: `{"what"}`, the id of a ticket or of a node, to `{"revoked"}`: false if there was nothing to
/// revoke.
pub(crate) async fn revoke(
    State(state): State<Arc<AppState>>,
    JsonObject(map): JsonObject,
) -> Result<Json<Value>, ApiError> {
    let what = only_text(map, "what")?;
    act(&state, MeshAction::Revoke { what }).await
}

/// What `/api/status` says about the mesh: everything but the peers, of which it gives the number.
pub(crate) fn summary(state: &AppState) -> Value {
    let Some(Value::Object(mut mesh)) = state.backend.mesh() else { return Value::Null };
    let peers = mesh.get("peers").and_then(Value::as_array).map_or(0, Vec::len);
    mesh.insert("peers".to_owned(), peers.into());
    mesh.into()
}

fn only_text(map: serde_json::Map<String, Value>, key: &str) -> Result<String, ApiError> {
    let mut fields = Fields::new(map);
    let text = fields.required_string(key)?;
    fields.finish()?;
    if text.len() > MAX_MESH_TEXT_BYTES {
        return Err(too_long(key, text.len(), MAX_MESH_TEXT_BYTES));
    }
    Ok(text)
}

async fn act(state: &AppState, action: MeshAction) -> Result<Json<Value>, ApiError> {
    Ok(Json(state.backend.mesh_action(action).await?))
}
