//! `/v1/embeddings`.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use serde::Serialize;
use serde_json::Value;

use crate::{
    backend::{Embeddings, ModelKind, Prompt},
    body::JsonObject,
    errors::ApiError,
    fields::{Fields, too_many, wrong_type},
    limits::MAX_EMBEDDING_INPUTS,
    openai::request::{model, tokens},
    state::AppState,
};

/// How vectors are written.
#[derive(Clone, Copy)]
enum Encoding {
    /// JSON numbers.
    Float,
    /// Little-endian f32, base64: what OpenAI's own clients ask for, as it is a quarter of the size.
    Base64,
}

/// `POST /v1/embeddings`.
pub(crate) async fn create(
    State(state): State<Arc<AppState>>,
    JsonObject(map): JsonObject,
) -> Result<Response, ApiError> {
    let mut fields = Fields::new(map);
    let model = model(&mut fields, &*state.backend, Some(ModelKind::Embed)).await?;
    let inputs = match fields.take("input") {
        Some(input) => prompts("input", input, MAX_EMBEDDING_INPUTS)?,
        None => return Err(fields.missing("input")),
    };
    let encoding = match fields.string("encoding_format")?.as_deref() {
        None | Some("float") => Encoding::Float,
        Some("base64") => Encoding::Base64,
        Some(_) => {
            let message = "`encoding_format` must be \"float\" or \"base64\".";
            return Err(ApiError::param("encoding_format", message).code("invalid_value"));
        }
    };
    let dimensions = fields.integer("dimensions", 1..=i64::from(u32::MAX))?;
    fields.string("user")?; // see `harmless`
    fields.finish()?;
    let embeddings = state.backend.embed(model.id.clone(), inputs).await?;
    check_dimensions(dimensions, &embeddings)?;
    Ok(render(&model.id, &embeddings, encoding))
}

/// Shortened vectors are meaningful only for models trained for it, which a model's file does not tell.
fn check_dimensions(wanted: Option<i64>, embeddings: &Embeddings) -> Result<(), ApiError> {
    let Some(wanted) = wanted else { return Ok(()) };
    match embeddings.vectors.iter().map(Vec::len).find(|len| *len as i64 != wanted) {
        None => Ok(()),
        Some(len) => {
            let message = format!("This model's vectors have {len} dimensions and are not shortened; leave it out.");
            Err(ApiError::unsupported("dimensions", message))
        }
    }
}

/// Written straight to text: a tree of JSON values would be many times the size of the vectors.
#[derive(Serialize)]
struct Answer<'a> {
    object: &'static str,
    data: Vec<Item<'a>>,
    model: &'a str,
    usage: Usage,
}

#[derive(Serialize)]
struct Item<'a> {
    object: &'static str,
    index: usize,
    embedding: Vector<'a>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Vector<'a> {
    Float(&'a [f32]),
    Base64(String),
}

#[derive(Serialize)]
struct Usage {
    prompt_tokens: u32,
    total_tokens: u32,
}

fn render(model: &str, embeddings: &Embeddings, encoding: Encoding) -> Response {
    let write = |vector: &'_ Vec<f32>| match encoding {
        Encoding::Float => None,
        Encoding::Base64 => {
            let bytes: Vec<u8> = vector.iter().flat_map(|number| number.to_le_bytes()).collect();
            Some(STANDARD.encode(bytes))
        }
    };
    let item = |(index, vector)| Item {
        object: "embedding",
        index,
        embedding: write(vector).map_or(Vector::Float(vector), Vector::Base64),
    };
    let tokens = embeddings.prompt_tokens;
    let answer = Answer {
        object: "list",
        data: embeddings.vectors.iter().enumerate().map(item).collect(),
        model,
        usage: Usage { prompt_tokens: tokens, total_tokens: tokens },
    };
    Json(answer).into_response()
}

/// One text, several texts, one list of token ids, or several such lists.
pub(crate) fn prompts(path: &str, value: Value, limit: usize) -> Result<Vec<Prompt>, ApiError> {
    let items = match value {
        Value::String(text) => return Ok(vec![Prompt::Text(text)]),
        Value::Array(items) => items,
        other => return Err(wrong_type(path, "a string or an array", &other)),
    };
    if items.is_empty() {
        return Err(ApiError::param(path, format!("`{path}` must not be an empty array.")).code("empty_array"));
    }
    if items.first().is_some_and(Value::is_number) {
        return Ok(vec![Prompt::Tokens(tokens(path, &items)?)]);
    }
    if items.len() > limit {
        return Err(too_many(path, "inputs", items.len(), limit));
    }
    let read = |(index, item)| {
        let path = format!("{path}[{index}]");
        match item {
            Value::String(text) => Ok(Prompt::Text(text)),
            Value::Array(ids) if ids.is_empty() => {
                Err(ApiError::param(&path, format!("`{path}` must not be an empty array.")).code("empty_array"))
            }
            Value::Array(ids) => Ok(Prompt::Tokens(tokens(&path, &ids)?)),
            other => Err(wrong_type(&path, "a string or an array of token ids", &other)),
        }
    };
    items.into_iter().enumerate().map(read).collect()
}
