//! Every limit of the HTTP layer, by name. A request beyond one is refused with a message that says the number.

use std::time::Duration;

/// Bytes of a request body.
pub const MAX_BODY_BYTES: usize = 8 * 1024 * 1024;
/// Bytes of a refused request's body that are read and thrown away, so that a client that writes before it reads
/// gets the error and not a reset connection.
pub const MAX_DISCARDED_BYTES: usize = 128 * 1024 * 1024;
/// Time for the same.
pub const DISCARD_TIMEOUT: Duration = Duration::from_secs(2);
/// Time in which a request's body must have arrived.
pub const BODY_READ_TIMEOUT: Duration = Duration::from_secs(30);
/// Time in which a request's headers must have arrived, on an idle kept-alive connection too.
pub const HEADER_READ_TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes of a request's line and headers together; beyond it the answer is 431.
pub const MAX_HEADER_BYTES: usize = 64 * 1024;
/// Headers of a request; beyond it the answer is 431.
pub const MAX_HEADERS: usize = 100;
/// Time for which a client may accept no byte of an answer before it counts as gone. Long, as a reader may be slow
/// on purpose; finite, as its KV cells are withheld from others.
pub const WRITE_STALL_TIMEOUT: Duration = Duration::from_secs(300);
/// Open connections; further ones wait in the kernel's backlog.
pub const MAX_CONNECTIONS: usize = 1024;
/// Pause after a failed accept (no file descriptors left, for instance) before the next.
pub const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(100);
/// Requests for tokens or embeddings at work or queued, unless the options say otherwise; beyond it the answer is 429.
pub const MAX_IN_FLIGHT: usize = 256;
/// What `Retry-After` says when the HTTP layer itself is full.
pub const IN_FLIGHT_RETRY_AFTER: Duration = Duration::from_secs(1);
/// What `Retry-After` says while a model is being loaded.
pub const LOADING_RETRY_AFTER: Duration = Duration::from_secs(2);
/// What `Retry-After` says while a model cannot be had.
pub const FAILED_RETRY_AFTER: Duration = Duration::from_secs(15);
/// Silence on a stream after which a comment line keeps proxies from closing it, unless the options say otherwise.
pub const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// How long running answers may take to finish once the server is to stop, unless the options say otherwise.
pub const SHUTDOWN_GRACE: Duration = Duration::from_secs(30);
/// How long answers that were cut off after that may take to say so.
pub const FAREWELL: Duration = Duration::from_secs(2);

/// Answers to one prompt (`n`).
pub const MAX_N: u32 = 16;
/// Generations of one request (prompts times `n`).
pub const MAX_CHOICES: usize = 64;
/// Stop strings of one request.
pub const MAX_STOP_STRINGS: usize = 16;
/// Bytes of one stop string.
pub const MAX_STOP_BYTES: usize = 1024;
/// Entries of `logit_bias`.
pub const MAX_LOGIT_BIAS: usize = 1024;
/// Alternatives reported per token.
pub const MAX_TOP_LOGPROBS: u8 = 20;
/// Messages of a chat.
pub const MAX_MESSAGES: usize = 4096;
/// Tools of a request.
pub const MAX_TOOLS: usize = 128;
/// Bytes of a grammar, a regular expression or a schema.
pub const MAX_GRAMMAR_BYTES: usize = 256 * 1024;
/// Seconds for which a ticket counts, unless it is asked otherwise: a day.
pub const DEFAULT_INVITE_VALID_S: i64 = 24 * 3600;
/// Seconds for which a ticket may count: a year.
pub const MAX_INVITE_VALID_S: i64 = 365 * 24 * 3600;
/// Nodes that a ticket may be made for.
pub const MAX_INVITE_USES: i64 = 4096;
/// Tokens of context, or of a prompt, that a ring is planned for.
pub const MAX_PLAN_TOKENS: i64 = 1 << 24;
/// Streams at once that a ring is planned for.
pub const MAX_PLAN_STREAMS: i64 = 4096;
/// Layers at either end that are to stay on the driver's machine.
pub const MAX_PLAN_KEEP_ENDS: i64 = 4096;
/// Milliseconds of the longest round trip in a ring: a minute.
pub const MAX_PLAN_RTT_MS: f64 = 60_000.0;
/// Nodes that a question about a ring excludes or pins.
pub const MAX_PLAN_NODES: usize = 64;
/// Bytes of a ticket, an id or the name of a model.
pub const MAX_MESH_TEXT_BYTES: usize = 4096;
/// Bytes of the name of a model to pull.
pub const MAX_MODEL_NAME_BYTES: usize = 256;
/// Inputs of one embeddings request (OpenAI's own limit).
pub const MAX_EMBEDDING_INPUTS: usize = 2048;
