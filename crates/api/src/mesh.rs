//! The node's mesh: who is in it, and what can be done about it. `GET /api/mesh`, `POST /api/mesh/invite`, `join`, `plan`
//! and `revoke`.
//!
//! Whoever may use the API may do all of it: on a loopback address that is this machine, elsewhere the holders of a key.

use std::{ops::RangeInclusive, sync::Arc, time::Duration};

use axum::{Json, extract::State};
use serde_json::Value;

use crate::{
    backend::{MeshAction, PlanQuestion, RingWishes, node_digits, region},
    body::JsonObject,
    errors::ApiError,
    fields::{Fields, shorten, too_long, too_many, wrong_type},
    limits::{
        DEFAULT_INVITE_VALID_S, MAX_INVITE_USES, MAX_INVITE_VALID_S, MAX_MESH_TEXT_BYTES, MAX_PLAN_KEEP_ENDS,
        MAX_PLAN_NODES, MAX_PLAN_RTT_MS, MAX_PLAN_STREAMS, MAX_PLAN_TOKENS,
    },
    state::AppState,
};

/// What the bearer of a ticket can become.
const ROLES: [&str; 2] = ["worker", "client"];
/// What a ring can be best at.
const OBJECTIVES: [&str; 2] = ["one_stream", "many_streams"];

/// `GET /api/mesh`: the mesh and its peers. 404 where the node is in none, 503 where it is in none yet.
pub(crate) async fn show(State(state): State<Arc<AppState>>) -> Result<Json<Value>, ApiError> {
    Ok(Json(state.backend.mesh()?))
}

/// `POST /api/mesh/invite`: `{"valid_s", "role", "uses"}`, all of them optional, to `{"ticket", "id",
/// "expires_unix_ms"}`. Without `uses` any number of nodes may come in until the ticket expires.
pub(crate) async fn invite(
    State(state): State<Arc<AppState>>,
    JsonObject(map): JsonObject,
) -> Result<Json<Value>, ApiError> {
    let mut fields = Fields::new(map);
    let valid_s = fields.integer("valid_s", 1..=MAX_INVITE_VALID_S)?.unwrap_or(DEFAULT_INVITE_VALID_S);
    let role = word(&mut fields, "role", ROLES)?.unwrap_or(ROLES[0]);
    let uses = count(&mut fields, "uses", 1..=MAX_INVITE_USES)?;
    fields.finish()?;
    let action = MeshAction::Invite { valid_s: valid_s.unsigned_abs(), role: role.to_owned(), uses };
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

/// `POST /api/mesh/plan`: `{"model"}`, and optionally `"context_tokens"`, `"streams"`, `"prompt_tokens"`, `"keep_ends"`,
/// `"objective"`, `"exclude"`, `"pin"`, `"max_rtt_ms"` and `"only_region"`, to the ring that the node would make. What is left
/// out is as the node has it. 503 where there is no ring.
pub(crate) async fn plan(
    State(state): State<Arc<AppState>>,
    JsonObject(map): JsonObject,
) -> Result<Json<Value>, ApiError> {
    let mut fields = Fields::new(map);
    let wishes = RingWishes {
        keep_ends: count(&mut fields, "keep_ends", 0..=MAX_PLAN_KEEP_ENDS)?,
        many_streams: word(&mut fields, "objective", OBJECTIVES)?.map(|objective| objective == OBJECTIVES[1]),
        exclude: each(&mut fields, "exclude", node_digits)?,
        pin: each(&mut fields, "pin", str::parse)?,
        rtt_max: fields.number("max_rtt_ms", 0.0..=MAX_PLAN_RTT_MS)?.map(|ms| Duration::from_secs_f64(ms / 1e3)),
        only_region: each(&mut fields, "only_region", region)?,
    };
    let question = PlanQuestion {
        model: required_text(&mut fields, "model")?,
        context_tokens: count(&mut fields, "context_tokens", 1..=MAX_PLAN_TOKENS)?,
        streams: count(&mut fields, "streams", 1..=MAX_PLAN_STREAMS)?,
        prompt_tokens: count(&mut fields, "prompt_tokens", 1..=MAX_PLAN_TOKENS)?,
        wishes,
    };
    fields.finish()?;
    act(&state, MeshAction::Plan(question)).await
}

/// What `/api/status` says about the mesh: everything but the peers, of which it gives the number.
pub(crate) fn summary(state: &AppState) -> Value {
    let Ok(Value::Object(mut mesh)) = state.backend.mesh() else { return Value::Null };
    let peers = mesh.get("peers").and_then(Value::as_array).map_or(0, Vec::len);
    mesh.insert("peers".to_owned(), peers.into());
    mesh.into()
}

fn only_text(map: serde_json::Map<String, Value>, key: &str) -> Result<String, ApiError> {
    let mut fields = Fields::new(map);
    let text = required_text(&mut fields, key)?;
    fields.finish()?;
    Ok(text)
}

fn required_text(fields: &mut Fields, key: &str) -> Result<String, ApiError> {
    let text = fields.required_string(key)?;
    if text.len() > MAX_MESH_TEXT_BYTES {
        return Err(too_long(key, text.len(), MAX_MESH_TEXT_BYTES));
    }
    Ok(text)
}

fn count(fields: &mut Fields, key: &str, range: RangeInclusive<i64>) -> Result<Option<u32>, ApiError> {
    Ok(fields.integer(key, range)?.and_then(|count| count.try_into().ok()))
}

/// One of these words.
fn word(fields: &mut Fields, key: &str, words: [&'static str; 2]) -> Result<Option<&'static str>, ApiError> {
    let Some(text) = fields.string(key)? else { return Ok(None) };
    let found = words.into_iter().find(|word| *word == text);
    let refused = || invalid(key, &format!("`{}`. Use `{}`.", shorten(&text), words.join("` or `")));
    found.map(Some).ok_or_else(refused)
}

/// What is written in the texts of a list.
fn each<T>(fields: &mut Fields, key: &str, read: impl Fn(&str) -> Result<T, String>) -> Result<Vec<T>, ApiError> {
    let items = fields.array(key)?.unwrap_or_default();
    if items.len() > MAX_PLAN_NODES {
        return Err(too_many(key, "nodes", items.len(), MAX_PLAN_NODES));
    }
    let item = |(at, item)| match (format!("{key}[{at}]"), item) {
        (path, Value::String(text)) => read(&text).map_err(|why| invalid(&path, &why)),
        (path, other) => Err(wrong_type(&path, "a string", &other)),
    };
    items.into_iter().enumerate().map(item).collect()
}

fn invalid(path: &str, why: &str) -> ApiError {
    ApiError::param(path, format!("Invalid value for `{path}`: {why}")).code("invalid_value")
}

async fn act(state: &AppState, action: MeshAction) -> Result<Json<Value>, ApiError> {
    Ok(Json(state.backend.mesh_action(action).await?))
}
