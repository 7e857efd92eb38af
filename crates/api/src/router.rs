//! The routes, and what happens before and after all of them.

use std::sync::Arc;

use axum::{
    Router,
    extract::{DefaultBodyLimit, Request, State},
    http::{Method, StatusCode, Uri},
    middleware::{Next, from_fn_with_state},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use tower_http::catch_panic::CatchPanicLayer;

use crate::{
    ApiOptions, Backend,
    body::{hold, reject},
    contents,
    errors::ApiError,
    fields::shorten,
    limits::IN_FLIGHT_RETRY_AFTER,
    mesh,
    metrics::observe,
    native, openai,
    security::guard,
    state::AppState,
};

/// The routes without sockets, for embedding and for tests. The options are not validated against an address here.
pub fn router(backend: Arc<dyn Backend>, options: &ApiOptions) -> Router {
    routes(Arc::new(AppState::new(backend, options)))
}

pub(crate) fn routes(state: Arc<AppState>) -> Router {
    let work = Router::new()
        .route("/v1/chat/completions", post(openai::chat::create))
        .route("/v1/completions", post(openai::completions::create))
        .route("/v1/embeddings", post(openai::embeddings::create))
        .route("/api/tokenize", post(native::tokenize))
        .route("/api/detokenize", post(native::detokenize))
        .route("/api/apply-template", post(native::apply_template))
        .route_layer(from_fn_with_state(state.clone(), admit));
    Router::new()
        .merge(work)
        .route("/v1/models", get(openai::models::list))
        .route("/v1/models/{*id}", get(openai::models::retrieve))
        .route("/api/status", get(native::status))
        .route("/api/models", get(contents::list))
        .route("/api/models/signatures", get(contents::signatures))
        .route("/api/models/pull", post(contents::pull))
        .route("/api/models/stop", post(contents::stop))
        .route("/api/mesh", get(mesh::show))
        .route("/api/mesh/invite", post(mesh::invite))
        .route("/api/mesh/join", post(mesh::join))
        .route("/api/mesh/plan", post(mesh::plan))
        .route("/api/mesh/revoke", post(mesh::revoke))
        .route("/health", get(native::health))
        .route("/metrics", get(native::metrics))
        .method_not_allowed_fallback(method_not_allowed)
        .fallback(not_found)
        // Bodies are bounded where they are read (body.rs), with an error in our own shape.
        .layer(DefaultBodyLimit::disable())
        .layer(from_fn_with_state(state.clone(), guard))
        .layer(CatchPanicLayer::custom(panicked))
        .layer(from_fn_with_state(state.clone(), observe))
        .with_state(state)
}

/// Middleware: admits so many requests at a time and no more. A permit is held until the answer is out.
async fn admit(State(state): State<Arc<AppState>>, request: Request, next: Next) -> Response {
    let Ok(permit) = state.in_flight.clone().try_acquire_owned() else {
        let message = format!(
            "The server is at work on {} requests, as many as it takes at a time. Try again shortly.",
            state.max_in_flight
        );
        let error = ApiError::new(StatusCode::TOO_MANY_REQUESTS, message)
            .code("rate_limit_exceeded")
            .retry_after(IN_FLIGHT_RETRY_AFTER);
        return reject(request, error).await;
    };
    hold(next.run(request).await, permit)
}

async fn not_found(method: Method, uri: Uri, request: Request) -> Response {
    let message = format!(
        "There is nothing at {method} {}. This server has /v1/chat/completions, /v1/completions, /v1/embeddings, \
         /v1/models, /health, /metrics, /api/status, /api/models and /api/mesh.",
        shorten(uri.path())
    );
    reject(request, ApiError::new(StatusCode::NOT_FOUND, message).code("unknown_url")).await
}

async fn method_not_allowed(method: Method, uri: Uri, request: Request) -> Response {
    let message = format!("{} does not take {method} requests.", shorten(uri.path()));
    reject(request, ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message).code("method_not_allowed")).await
}

/// A defect of ours must cost one request, not the server.
fn panicked(_: Box<dyn std::any::Any + Send>) -> Response {
    tracing::error!("a request handler panicked; this is a defect");
    ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "The server has a defect that this request brought out.")
        .code("internal_error")
        .into_response()
}
