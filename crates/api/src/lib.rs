//! The HTTP dialects of a node: today OpenAI's, and the node's own under `/api`.
//!
//! A handler does three things: it parses the request, calls the node through [`Backend`], and renders what comes
//! back. Whatever decides about tokens (stop strings, grammars, limits, queues) is the node's business.
//!
//! Three rules hold everywhere:
//!
//! - **Honoured or refused.** Every field of a request is either obeyed or answered with an error that names it; the
//!   fields that are accepted without effect are listed, with the reason, in `openai::harmless`. `null` means absent.
//! - **A cut-off answer never looks complete.** A stream ends with exactly one `[DONE]`, or with an `error` event and
//!   no `[DONE]`; a `finish_reason` is sent only when the node said that the generation ended.
//! - **Everything from outside has a limit**, and every limit a name: see [`limits`].
//!
//! The reference for the dialect is OpenAI's API reference; for the extensions (`top_k`, `min_p`, `ignore_eos` ...) it
//! is llama-server's, and `guided_regex` is vLLM's name.
//!
//! Start reading at [`serve`] (sockets), then `router` (routes), then `openai::chat` (the longest way a request takes).

pub mod backend;
pub mod limits;

mod body;
mod choices;
mod contents;
mod errors;
mod fields;
mod mesh;
mod metrics;
mod native;
mod openai;
mod options;
mod router;
mod security;
mod server;
mod sse;
mod stall;
mod state;
mod timings;
mod wishes;

pub use backend::Backend;
pub use options::{ApiOptions, OptionsError};
pub use router::router;
pub use server::{ServeError, serve};
