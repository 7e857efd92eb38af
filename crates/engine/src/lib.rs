//! The stage engine: layer ranges of a model on unpatched llama.cpp.
//!
//! A model runs as 1..n *stages*. Each stage is a child process (this same binary) that holds a contiguous layer range,
//! cut from the file by `murmur_gguf`, with its KV cache; rows travel between stages as frames. Whether there is one stage
//! or several is the same code path, and whether they are in this machine or in others.
//!
//! Where to start reading:
//! - parent: [`Engine`] (what the node holds; of models that others hold: [`Tokenizer`]) - `driver` (pure: which rows go where, what a death means) - `link` (process
//!   and socket, or a way to another machine). [`Host`] is a stage for drivers of other machines;
//! - child: `child` (the loop) - `stage` (rows in, tokens or hidden states out) - `schedule` and `slots` and `threads`
//!   (pure: what is computed together, whose KV is where, how many threads) - `kept` (what was sent on) - `ffi` (the only unsafe code).

mod build_id;
pub mod child;
pub mod driver;
mod embedding;
mod engine;
mod ffi;
mod frames;
mod host;
mod joining;
mod kept;
pub mod link;
mod row_costs;
mod schedule;
mod slots;
mod stage;
mod threads;
mod vocabulary;

pub use build_id::{BUILD_ID_BYTES_MAX, build_id};
pub use driver::{Counters, DEPTHS, Draft, DraftModel, Ending, Guessing, PeerDraft, SessionEvent, SessionRequest};
pub use engine::{
    DraftStatus, Engine, EngineError, EngineOptions, EngineStatus, PARALLEL_MAX, Patience, SessionStream, StartError,
    Stop, Tokenizer, UNUSED_SLICES_BYTES_MAX, prune_slices,
};
pub use frames::FrameReader;
pub use host::{Guest, Host, HostError, Speed};
pub use link::{Answers, CHILD_SUBCOMMAND, Connection, FarEnd, LinkError, RemoteStage, connection};
pub use murmur_protocol::stage::Keep;
