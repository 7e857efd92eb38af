//! Request bodies: bounded in size and time, JSON objects only; and what becomes of the bodies of refused requests.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use axum::{
    body::{Body, HttpBody},
    extract::{FromRequest, Request},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::body::{Frame, SizeHint};
use serde_json::{Map, Value};
use tokio::time::timeout;

use crate::{
    errors::ApiError,
    limits::{BODY_READ_TIMEOUT, DISCARD_TIMEOUT, MAX_BODY_BYTES, MAX_DISCARDED_BYTES},
};

/// A JSON object.
pub(crate) struct JsonObject(pub(crate) Map<String, Value>);

impl<S: Send + Sync> FromRequest<S> for JsonObject {
    type Rejection = Response;

    async fn from_request(request: Request, _state: &S) -> Result<Self, Response> {
        // A web page can send any other type to any address without asking (a "simple request" of the fetch
        // standard), so the type is also a defence.
        if !is_json(request.headers()) {
            let error = ApiError::new(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "The request's body must be JSON: send the header `Content-Type: application/json`.",
            );
            return Err(reject(request, error).await);
        }
        let bytes = read(request).await?;
        parse(&bytes).map(JsonObject).map_err(IntoResponse::into_response)
    }
}

fn is_json(headers: &HeaderMap) -> bool {
    let Some(Ok(value)) = headers.get(header::CONTENT_TYPE).map(|value| value.to_str()) else {
        return false;
    };
    let essence = value.split(';').next().unwrap_or_default().trim();
    essence.eq_ignore_ascii_case("application/json")
}

async fn read(request: Request) -> Result<Bytes, Response> {
    let announced = request.body().size_hint().lower();
    if announced > MAX_BODY_BYTES as u64 {
        return Err(reject(request, too_large()).await);
    }
    let expects_continue = request.headers().contains_key(header::EXPECT);
    let mut body = request.into_body();
    let mut bytes = BytesMut::with_capacity(announced as usize);
    let reading = async {
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| {
                ApiError::new(StatusCode::BAD_REQUEST, format!("The request's body broke off: {error}."))
            })?;
            if let Ok(data) = frame.into_data() {
                if bytes.len() + data.len() > MAX_BODY_BYTES {
                    return Err(too_large());
                }
                bytes.extend_from_slice(&data);
            }
        }
        Ok(())
    };
    match timeout(BODY_READ_TIMEOUT, reading).await {
        Ok(Ok(())) => Ok(bytes.freeze()),
        Ok(Err(error)) => Err(refuse(body, expects_continue, error).await),
        Err(_) => {
            let error = ApiError::new(
                StatusCode::REQUEST_TIMEOUT,
                format!("The request's body did not arrive within {} seconds.", BODY_READ_TIMEOUT.as_secs()),
            );
            Err(closing(error))
        }
    }
}

fn too_large() -> ApiError {
    let message = format!("The request's body is larger than {MAX_BODY_BYTES} bytes; send less.");
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message).code("request_too_large")
}

fn parse(bytes: &[u8]) -> Result<Map<String, Value>, ApiError> {
    let bad = |message| Err(ApiError::new(StatusCode::BAD_REQUEST, message));
    let text = match std::str::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => {
            return bad(format!("The request's body is not valid UTF-8 at byte {}.", error.valid_up_to()));
        }
    };
    match serde_json::from_str(text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => bad("The request's body must be a JSON object.".to_owned()),
        Err(error) => bad(format!(
            "The request's body is not valid JSON: {error}. (JSON has neither NaN nor Infinity, and numbers must fit a \
             double.)"
        )),
    }
}

/// Answers a request whose body was not read. What the client still sends is thrown away for a while first: closing a
/// socket with unread data resets the connection, and the client would never see the answer.
pub(crate) async fn reject(request: Request, error: ApiError) -> Response {
    let expects_continue = request.headers().contains_key(header::EXPECT);
    refuse(request.into_body(), expects_continue, error).await
}

async fn refuse(mut body: Body, expects_continue: bool, error: ApiError) -> Response {
    // A client that waits for "100 Continue" sends nothing unless the body is polled.
    if body.is_end_stream() || expects_continue {
        return error.into_response();
    }
    let discarding = async {
        let mut discarded = 0;
        while let Some(Ok(frame)) = body.frame().await {
            discarded += frame.data_ref().map_or(0, Bytes::len);
            if discarded > MAX_DISCARDED_BYTES {
                return false;
            }
        }
        true
    };
    match timeout(DISCARD_TIMEOUT, discarding).await {
        Ok(true) => error.into_response(),
        _ => closing(error),
    }
}

/// An answer after which the connection cannot be used again.
fn closing(error: ApiError) -> Response {
    ([(header::CONNECTION, "close")], error).into_response()
}

/// Keeps a value until the answer's body has been sent or given up.
pub(crate) fn hold<T: Unpin + Send + 'static>(response: Response, value: T) -> Response {
    response.map(|body| Body::new(Held { body, _value: value }))
}

struct Held<T> {
    body: Body,
    _value: T,
}

impl<T: Unpin> HttpBody for Held<T> {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use futures::{StreamExt, stream};

    use super::*;

    type Piece = Result<&'static str, std::io::Error>;

    #[tokio::test(start_paused = true)]
    async fn a_body_that_does_not_arrive_is_given_up() {
        let dripping = stream::iter([Ok::<_, std::io::Error>("{")]).chain(stream::pending());
        let rejection = read(Request::new(Body::from_stream(dripping))).await.unwrap_err();
        assert_eq!(rejection.status(), StatusCode::REQUEST_TIMEOUT);
        assert_eq!(rejection.headers()[header::CONNECTION], "close");
    }

    #[tokio::test(start_paused = true)]
    async fn a_refused_body_is_thrown_away_for_a_bounded_time_only() {
        let endless = stream::repeat_with(|| Piece::Ok("x")).then(|piece| async {
            tokio::time::sleep(DISCARD_TIMEOUT / 100).await;
            piece
        });
        let started = tokio::time::Instant::now();
        let response = reject(Request::new(Body::from_stream(endless)), too_large()).await;
        assert_eq!(response.headers()[header::CONNECTION], "close");
        assert!(started.elapsed() <= 2 * DISCARD_TIMEOUT);
    }

    #[tokio::test]
    async fn a_refused_body_is_thrown_away_up_to_a_limit_only() {
        const PIECE: &str = "0123456789abcdef";
        let endless = stream::repeat_with(|| Ok::<_, std::io::Error>(PIECE.repeat(65_536)));
        let response = reject(Request::new(Body::from_stream(endless)), too_large()).await;
        assert_eq!(response.headers()[header::CONNECTION], "close");
    }
}
