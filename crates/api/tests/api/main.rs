//! The HTTP layer over real sockets, with a node that says what each test wants it to.

// The test profile's exemption (clippy.toml) covers test functions, not what they call.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod chat;
mod completions;
mod embeddings;
mod flow;
mod mesh;
mod native;
mod refusals;
mod security;
mod streams;
mod support;
