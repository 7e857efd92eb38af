//! OpenAI's dialect.
//!
//! Each endpoint has its module; [`request`] reads what they have in common.

pub(crate) mod chat;
pub(crate) mod chat_request;
pub(crate) mod completions;
pub(crate) mod constraint;
pub(crate) mod embeddings;
pub(crate) mod harmless;
pub(crate) mod head;
pub(crate) mod logprobs;
pub(crate) mod messages;
pub(crate) mod models;
pub(crate) mod request;
pub(crate) mod templates;
