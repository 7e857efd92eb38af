//! The node's own endpoints: health, metrics, status, and the tokenizer and chat template as they are used.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
};
use serde_json::{Value, json};

use crate::{
    backend::Prompt,
    body::JsonObject,
    errors::ApiError,
    fields::Fields,
    openai::{
        chat_request::ChatInput,
        models::describe,
        request::{model, tokens},
        templates,
    },
    router::AppState,
};

/// What [`crate::backend::ModelCard::state`] says of a model that can be used.
const READY: &str = "ready";

/// `GET /health`: 200 when requests can be served, 503 while all models are loading. Needs no key.
pub(crate) async fn health(State(state): State<Arc<AppState>>) -> impl IntoResponse {
    let models = state.backend.models();
    if models.is_empty() || models.iter().any(|model| model.state == READY) {
        (StatusCode::OK, Json(json!({"status": "ok"})))
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, Json(json!({"status": "loading"})))
    }
}

/// `GET /metrics`.
pub(crate) async fn metrics(State(state): State<Arc<AppState>>) -> impl IntoResponse {
    let text = state.metrics.render() + &state.backend.metrics();
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text)
}

/// `GET /api/status`.
pub(crate) async fn status(State(state): State<Arc<AppState>>) -> Json<Value> {
    let models: Vec<Value> = state.backend.models().iter().map(|model| describe(model)).collect();
    Json(json!({"version": env!("CARGO_PKG_VERSION"), "models": models, "node": state.backend.status()}))
}

/// `POST /api/tokenize`: `{"model", "content", "parse_special"}` to `{"tokens"}`. The content is read as the prompt of a
/// completion; with `parse_special`, as a rendered chat.
pub(crate) async fn tokenize(
    State(state): State<Arc<AppState>>,
    JsonObject(map): JsonObject,
) -> Result<Json<Value>, ApiError> {
    let mut fields = Fields::new(map);
    let model = model(&mut fields, &*state.backend, None)?;
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
    let model = model(&mut fields, &*state.backend, None)?;
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
    let input = ChatInput::read(Fields::new(map), &*state.backend)?;
    let (_, prompt) = templates::prepare(&state, input).await?;
    Ok(Json(json!({"prompt": prompt.text})))
}
