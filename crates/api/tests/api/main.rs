//! The HTTP layer over real sockets, with a node that says what each test wants it to.

mod chat;
mod completions;
mod embeddings;
mod flow;
mod native;
mod refusals;
mod security;
mod streams;
mod support;
