//! `/v1/models`. A model that is being loaded or has failed is listed, with its `state`: clients choose by name from this
//! list, and a request for it is told when to come back. llama-server does the same.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, State, rejection::PathRejection},
};
use serde_json::{Value, json};

use crate::{
    backend::{ModelCard, ModelKind, ModelState},
    errors::ApiError,
    fields::shorten,
    state::AppState,
};

/// `GET /v1/models`.
pub(crate) async fn list(State(state): State<Arc<AppState>>) -> Json<Value> {
    let models: Vec<Value> = state.backend.models().iter().map(|model| describe(model)).collect();
    Json(json!({"object": "list", "data": models}))
}

/// `GET /v1/models/{id}`; an id may contain slashes.
pub(crate) async fn retrieve(
    State(state): State<Arc<AppState>>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<Value>, ApiError> {
    let Ok(Path(id)) = id else {
        return Err(ApiError::no_such_model("The model's name in the path is not valid UTF-8."));
    };
    match state.backend.models().iter().find(|model| model.id == id) {
        Some(model) => Ok(Json(describe(model))),
        None => {
            let message = format!("The model `{}` does not exist here. GET /v1/models lists the models.", shorten(&id));
            Err(ApiError::no_such_model(message))
        }
    }
}

pub(crate) fn describe(model: &ModelCard) -> Value {
    let mut described = json!({
        "id": model.id,
        "object": "model",
        "created": model.created,
        "owned_by": "murmur",
        "kind": match model.kind { ModelKind::Generate => "generate", ModelKind::Embed => "embed" },
        "state": model.state.name(),
        "context_tokens": model.context_tokens,
        "details": model.details,
    });
    match &model.state {
        ModelState::Loading { fraction } | ModelState::Available { loading: Some(fraction) } => {
            described["progress"] = json!(fraction);
        }
        ModelState::Waiting { reason } | ModelState::Failed { reason } => described["reason"] = json!(reason),
        ModelState::Ready | ModelState::Available { loading: None } => {}
    }
    described
}
