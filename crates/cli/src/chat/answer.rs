//! One answer, as it comes in.

use serde_json::Value;

use super::Question;
use crate::{
    client::ApiClient,
    exit::{Code, Failure},
};

/// A part of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Piece<'a> {
    /// What the model says.
    Text(&'a str),
    /// What it thinks before it speaks.
    Reasoning(&'a str),
}

/// What is known when an answer is complete.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Finished {
    /// `stop`, `length` ...
    pub(crate) reason: Option<String>,
    /// Prompt tokens, as the server counts.
    pub(crate) prompt_tokens: Option<u64>,
    /// Generated tokens, as the server counts.
    pub(crate) completion_tokens: Option<u64>,
}

/// Asks, and hands out pieces as they come. Dropping the future stops the answer on the server too.
pub(crate) async fn stream(
    client: &ApiClient,
    question: &Question,
    mut on_piece: impl FnMut(Piece<'_>) -> anyhow::Result<()>,
) -> anyhow::Result<Finished> {
    let mut events = client.stream(question.path, &question.body).await?;
    let mut finished = Finished::default();
    while let Some(event) = events.next().await? {
        if event == "[DONE]" {
            return Ok(finished);
        }
        let chunk: Value =
            serde_json::from_str(&event).map_err(|error| broken(&format!("an event is no JSON: {error}")))?;
        if let Some(message) = chunk.pointer("/error/message").and_then(Value::as_str) {
            return Err(Failure::because(Code::Failed, message));
        }
        read_chunk(&chunk, &mut finished, &mut on_piece)?;
    }
    Err(broken("it ended without saying so"))
}

fn read_chunk(
    chunk: &Value,
    finished: &mut Finished,
    on_piece: &mut impl FnMut(Piece<'_>) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    if let Some(choice) = chunk.pointer("/choices/0") {
        let text = |pointer: &str| choice.pointer(pointer).and_then(Value::as_str).filter(|text| !text.is_empty());
        if let Some(reasoning) = text("/delta/reasoning_content") {
            on_piece(Piece::Reasoning(reasoning))?;
        }
        if let Some(content) = text("/delta/content").or_else(|| text("/text")) {
            on_piece(Piece::Text(content))?;
        }
        if let Some(reason) = text("/finish_reason") {
            finished.reason = Some(reason.to_owned());
        }
    }
    let count = |pointer: &str| chunk.pointer(pointer).and_then(Value::as_u64);
    finished.prompt_tokens = count("/usage/prompt_tokens").or(finished.prompt_tokens);
    finished.completion_tokens = count("/usage/completion_tokens").or(finished.completion_tokens);
    Ok(())
}

fn broken(why: &str) -> anyhow::Error {
    Failure::because(
        Code::Unavailable,
        format!("the answer broke off: {why}. Ask again; `murmur status` says how the server is."),
    )
}
