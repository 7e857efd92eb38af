//! Errors as OpenAI's clients expect them: `{"error": {"message", "type", "param", "code"}}`.

use std::time::Duration;

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

use crate::backend::Refusal;

/// An answer that is an error. The message says what happened, why, and what to do.
#[derive(Debug, Clone)]
pub(crate) struct ApiError {
    status: StatusCode,
    message: String,
    param: Option<String>,
    code: Option<String>,
    retry_after: Option<Duration>,
}

impl ApiError {
    pub(crate) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        ApiError { status, message: message.into(), param: None, code: None, retry_after: None }
    }

    /// 400 about one field.
    pub(crate) fn param(param: impl Into<String>, message: impl Into<String>) -> Self {
        ApiError { param: Some(param.into()), ..Self::new(StatusCode::BAD_REQUEST, message) }
    }

    /// 400 about a field that is known, and not supported.
    pub(crate) fn unsupported(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::param(param, message).code("unsupported_parameter")
    }

    pub(crate) fn code(mut self, code: impl Into<String>) -> Self {
        self.code = Some(code.into());
        self
    }

    pub(crate) fn retry_after(mut self, delay: Duration) -> Self {
        self.retry_after = Some(delay);
        self
    }

    /// Names the field as the client called it.
    pub(crate) fn rename_param(mut self, from: &str, to: &str) -> Self {
        if self.param.as_deref() == Some(from) {
            self.param = Some(to.to_owned());
        }
        self
    }

    pub(crate) fn no_such_model(message: impl Into<String>) -> Self {
        ApiError { param: Some("model".into()), ..Self::new(StatusCode::NOT_FOUND, message) }.code("model_not_found")
    }

    /// The `error` object, alone: what a stream sends once its status is out.
    pub(crate) fn body(&self) -> Value {
        json!({"error": {"message": self.message, "type": self.kind(), "param": self.param, "code": self.code}})
    }

    fn kind(&self) -> &'static str {
        match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::FORBIDDEN => "permission_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        }
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        let message = refusal.to_string();
        match refusal {
            Refusal::Busy { retry_after, .. } => {
                Self::new(StatusCode::TOO_MANY_REQUESTS, message).code("rate_limit_exceeded").retry_after(retry_after)
            }
            Refusal::BadRequest { param, code, .. } => {
                ApiError { param, code, ..Self::new(StatusCode::BAD_REQUEST, message) }
            }
            Refusal::Forbidden { .. } => Self::new(StatusCode::FORBIDDEN, message).code("forbidden"),
            Refusal::NoSuchModel { .. } => Self::no_such_model(message),
            Refusal::NotFound { code, .. } => Self::new(StatusCode::NOT_FOUND, message).code(code),
            Refusal::NotReady { retry_after, .. } => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, message).code("model_not_ready").retry_after(retry_after)
            }
            Refusal::Failed { .. } => Self::new(StatusCode::INTERNAL_SERVER_ERROR, message).code("generation_failed"),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        let headers = response.headers_mut();
        if let Some(delay) = self.retry_after {
            // Whole seconds, and never 0: a client that retries at once is what the header is to prevent.
            let seconds = delay.as_secs_f64().ceil().max(1.0) as u64;
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
