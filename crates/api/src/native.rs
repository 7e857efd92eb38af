//! The node's own endpoints: health, metrics, status, and the tokenizer and chat template as they are used.

use std::{sync::Arc, time::Duration};

use axum::{
    Json,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

use crate::{
    backend::{ModelCard, ModelState, Prompt},
    body::JsonObject,
    errors::ApiError,
    fields::Fields,
    limits::LOADING_RETRY_AFTER,
    mesh,
    openai::{
        chat_request::ChatInput,
        models::describe,
        request::{model, tokens},
        templates,
    },
    state::AppState,
};

/// `GET /health`: 200 when requests are served; 503 while the node joins its mesh or loads a model, and when no model can be had.
/// Needs no key.
pub(crate) async fn health(State(state): State<Arc<AppState>>) -> Response {
    if state.backend.is_joining() {
        return not_healthy(LOADING_RETRY_AFTER, json!({"status": "joining"}));
    }
    let models = state.backend.models();
    let is_loading = |model: &&Arc<ModelCard>| matches!(model.state, ModelState::Loading { .. });
    let is_ready = |model: &Arc<ModelCard>| model.state.refusal(&model.id).is_none();
    let (status, hindrance) = match models.iter().find(is_loading) {
        Some(loading) => ("loading", Some(loading)),
        None if models.is_empty() || models.iter().any(is_ready) => ("ok", None),
        None => {
            let waiting = models.iter().find(|model| matches!(model.state, ModelState::Waiting { .. }));
            let hindrance = waiting.or(models.first());
            (hindrance.map_or("failed", |model| model.state.name()), hindrance)
        }
    };
    let mut body = json!({"status": status});
    // Without a key one learns no names and no reasons where a key is demanded.
    if !state.policy.demands_key() && models.iter().any(|model| !is_ready(model)) {
        body["models"] = models.iter().map(|model| describe_state(model)).collect();
    }
    let Some(hindrance) = hindrance else { return (StatusCode::OK, Json(body)).into_response() };
    let fractions = models.iter().map(|model| match model.state {
        ModelState::Loading { fraction } => fraction,
        ModelState::Waiting { .. } => 0.0,
        ModelState::Ready | ModelState::Available { .. } | ModelState::Failed { .. } => 1.0,
    });
    body["progress"] = json!(fractions.sum::<f32>() / models.len() as f32);
    not_healthy(hindrance.state.retry_after(), body)
}

fn not_healthy(retry_after: Duration, body: Value) -> Response {
    let retry_after = [(header::RETRY_AFTER, retry_after.as_secs())];
    (StatusCode::SERVICE_UNAVAILABLE, retry_after, Json(body)).into_response()
}

/// What anyone may know of a model.
fn describe_state(model: &ModelCard) -> Value {
    let mut described = describe(model);
    if let Some(fields) = described.as_object_mut() {
        fields.retain(|name, _| ["id", "state", "progress", "reason"].contains(&name.as_str()));
    }
    described
}

/// `GET /metrics`.
pub(crate) async fn metrics(State(state): State<Arc<AppState>>) -> impl IntoResponse {
    let text = state.metrics.render() + &state.backend.metrics();
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text)
}

/// `GET /api/status`: `version`; `models` as in `/v1/models`; `mesh` as in `/api/mesh`, with the number of `peers` instead of
/// the peers, null without a mesh; `node`, what the node itself says.
pub(crate) async fn status(State(state): State<Arc<AppState>>) -> Json<Value> {
    let models: Vec<Value> = state.backend.models().iter().map(|model| describe(model)).collect();
    let (mesh, node) = (mesh::summary(&state), state.backend.status());
    Json(json!({"version": env!("CARGO_PKG_VERSION"), "models": models, "mesh": mesh, "node": node}))
}

/// `POST /api/tokenize`: `{"model", "content", "parse_special"}` to `{"tokens"}`. The content is read as the prompt of a
/// completion; with `parse_special`, as a rendered chat.
pub(crate) async fn tokenize(
    State(state): State<Arc<AppState>>,
    JsonObject(map): JsonObject,
) -> Result<Json<Value>, ApiError> {
    let mut fields = Fields::new(map);
    let model = model(&mut fields, &*state.backend, None).await?;
    let content = fields.required_string("content")?;
    let is_rendered = fields.boolean("parse_special")?.unwrap_or(false);
    fields.finish()?;
    let prompt = if is_rendered { Prompt::Rendered(content) } else { Prompt::Text(content) };
    let tokens = state.backend.tokenize(model.id.clone(), prompt).await?;
    Ok(Json(json!({"tokens": tokens})))
}

/// `POST /api/detokenize`: `{"model", "tokens"}` to `{"content"}`.
pub(crate) async fn detokenize(
    State(state): State<Arc<AppState>>,
    JsonObject(map): JsonObject,
) -> Result<Json<Value>, ApiError> {
    let mut fields = Fields::new(map);
    let model = model(&mut fields, &*state.backend, None).await?;
    let ids = match fields.array("tokens")? {
        Some(items) => tokens("tokens", &items)?,
        None => return Err(fields.missing("tokens")),
    };
    fields.finish()?;
    let content = state.backend.detokenize(model.id.clone(), ids).await?;
    Ok(Json(json!({"content": content})))
}

/// `POST /api/apply-template`: a chat request to `{"prompt"}`, the text that its answer would continue.
pub(crate) async fn apply_template(
    State(state): State<Arc<AppState>>,
    JsonObject(map): JsonObject,
) -> Result<Json<Value>, ApiError> {
    let input = ChatInput::read(Fields::new(map), &*state.backend).await?;
    let (_, prompt) = templates::prepare(&state, input).await?;
    Ok(Json(json!({"prompt": prompt.text})))
}
