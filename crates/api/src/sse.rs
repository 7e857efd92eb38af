//! Answers as they are generated: server-sent events in the order that OpenAI's clients expect.
//!
//! The stream is pulled by the connection, so it runs at the client's pace and stops when the client leaves. It ends
//! in one of two ways: with exactly one `[DONE]`; or, when the generation failed after the stream had begun, with one
//! `{"error": ...}` event and no `[DONE]`. OpenAI's clients raise an exception at such an event.
//!
//! Silence is filled with comment lines, which clients skip: `: loading 40 %` while the model is being loaded for this
//! request, `: prefill 512/4096` (prompt tokens done and to do) while the prompt is being read, `: keep-alive` later. Before the end
//! comes one with usage and timings as JSON, also where the request did not ask for them: `: murmur {...}`.

use std::{collections::VecDeque, time::Duration};

use axum::{
    body::Body,
    http::header,
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures::stream;
use serde_json::{Value, json};
use tokio::time::{Instant, timeout_at};

use crate::{
    backend::{Finish, TokenInfo},
    choices::{ChoiceEvent, Choices},
    errors::ApiError,
    timings::Timings,
};

/// Makes the chunks of one dialect.
pub(crate) trait Render: Send + 'static {
    /// Before the first token.
    fn begin(&mut self, out: &mut Chunks);
    /// New text of a choice. Returns whether the choice has all that is wanted of it.
    fn text(&mut self, choice: usize, text: String, tokens: &[TokenInfo], out: &mut Chunks) -> bool;
    /// The end of a choice; `timings` where the generation came to its own end.
    fn done(&mut self, choice: usize, finish: &Finish, timings: Option<Timings>, out: &mut Chunks);
    /// After the end of all choices.
    fn end(&mut self, usage: Value, timings: Option<Timings>, out: &mut Chunks);
}

/// Chunks that wait to be sent: those of one event at most.
#[derive(Default)]
pub(crate) struct Chunks(VecDeque<Bytes>);

impl Chunks {
    pub(crate) fn push(&mut self, chunk: &Value) {
        // JSON text has no line breaks, so a chunk is one line.
        self.0.push_back(format!("data: {chunk}\n\n").into());
    }

    fn push_done(&mut self) {
        self.0.push_back(Bytes::from_static(b"data: [DONE]\n\n"));
    }

    fn push_comment(&mut self, text: &str) {
        self.0.push_back(format!(": {text}\n\n").into());
    }
}

struct Stream<R> {
    choices: Choices,
    render: R,
    chunks: Chunks,
    keep_alive: Duration,
    has_ended: bool,
}

/// The answer to a streaming request.
pub(crate) fn respond(choices: Choices, mut render: impl Render, keep_alive: Duration) -> Response {
    let mut chunks = Chunks::default();
    render.begin(&mut chunks);
    let stream = Stream { choices, render, chunks, keep_alive, has_ended: false };
    let body = stream::unfold(stream, |mut stream| async move {
        let chunk = stream.next().await?;
        Some((Ok::<_, std::convert::Infallible>(chunk), stream))
    });
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream"),
        (header::CACHE_CONTROL, "no-cache"),
        // nginx would collect the chunks otherwise.
        (header::HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    (headers, Body::from_stream(body)).into_response()
}

impl<R: Render> Stream<R> {
    async fn next(&mut self) -> Option<Bytes> {
        let silent_until = Instant::now() + self.keep_alive;
        loop {
            if let Some(chunk) = self.chunks.0.pop_front() {
                return Some(chunk);
            }
            if self.has_ended {
                return None;
            }
            match timeout_at(silent_until, self.choices.next()).await {
                Ok(event) => self.handle(event),
                Err(_) => self.comment(),
            }
        }
    }

    fn handle(&mut self, event: Option<(usize, ChoiceEvent)>) {
        match event {
            Some((choice, ChoiceEvent::Text { text, tokens })) => {
                if self.render.text(choice, text, &tokens, &mut self.chunks) {
                    self.choices.finish(choice);
                    self.render.done(choice, &Finish::EndOfText, None, &mut self.chunks);
                }
            }
            Some((choice, ChoiceEvent::Done(finish, timings))) => {
                self.render.done(choice, &finish, Some(timings), &mut self.chunks);
            }
            Some((_, ChoiceEvent::Failed(refusal))) => {
                self.has_ended = true;
                self.chunks.push(&ApiError::from(refusal).body());
            }
            None => {
                self.has_ended = true;
                let (usage, timings) = (self.choices.usage(), self.choices.timings());
                let statistics = json!({"usage": usage, "timings": timings.map(|timings| timings.render())});
                self.chunks.push_comment(&format!("murmur {statistics}"));
                self.render.end(usage, timings, &mut self.chunks);
                self.chunks.push_done();
            }
        }
    }

    fn comment(&mut self) {
        match (self.choices.loading(), self.choices.prefill_progress()) {
            (Some(fraction), _) => self.chunks.push_comment(&format!("loading {:.0} %", 100.0 * fraction)),
            (None, Some((done, total))) => self.chunks.push_comment(&format!("prefill {done}/{total}")),
            (None, None) => self.chunks.push_comment("keep-alive"),
        }
    }
}
