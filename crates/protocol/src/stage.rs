//! What a driver and a stage tell each other besides rows.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::codec::Codec;
use crate::mesh::{NodeId, RingId};
use crate::sampling::{Sampled, SamplingParams, Token};

/// What a child process is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// A layer range. `first`: takes token ids; otherwise hidden states. `last`: samples; otherwise gives hidden states.
    Stage {
        /// Holds the embedding.
        first: bool,
        /// Holds the head.
        last: bool,
    },
    /// The vocabulary only: tokenises.
    Vocabulary,
    /// A pooling model: whole sequences in, one vector out.
    Embedding,
}

/// What to load and how to run it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Load {
    /// The file: a whole model or a slice of one.
    pub path: PathBuf,
    /// What for.
    pub role: Role,
    /// KV cells of the stage, over all sequences.
    pub kv_cells: u32,
    /// Tokens one sequence may have at most.
    pub context_tokens: u32,
    /// Sequences that may be resident at once, kept prefixes included.
    pub sequences: u32,
    /// Prompt rows per chunk; prompts are cut at multiples of it.
    pub chunk_rows: u32,
    /// Threads, or `None` to measure and choose.
    pub threads: Option<u32>,
    /// Most threads to consider.
    pub threads_max: u32,
    /// Bit-equal results whatever shares a batch.
    pub exact: bool,
    /// Layers to put on a GPU, where the build has a back end for one.
    pub gpu_layers: i32,
    /// Tensor that leaves a stage which is not the last (see `murmur_gguf::hidden_tap_name`).
    pub tap: Option<String>,
    /// Tensor to overwrite with what enters a stage which is not the first (see `murmur_gguf::HiddenInput`).
    pub inject: Option<String>,
    /// How much to keep of what leaves a stage which is not the last.
    pub keep: Keep,
}

/// How much a stage keeps of the hidden states that it has sent on, over all its sessions. Sessions for which there is no more
/// room are not kept; losing the next stage then costs computing them again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keep {
    /// In memory, bytes.
    pub memory_bytes: u64,
    /// In a file beside the one it was loaded from, bytes. It has no name there, and is gone with the process.
    pub file_bytes: u64,
}

impl Default for Keep {
    /// 4,096 rows of 4,096 f32 in memory, and 64 times as many on disk.
    fn default() -> Self {
        Keep { memory_bytes: 64 << 20, file_bytes: 4 << 30 }
    }
}

/// What was loaded.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Loaded {
    /// Width of the hidden state.
    pub n_embd: u32,
    /// Layers in this stage.
    pub n_layer: u32,
    /// KV cells the engine really has.
    pub kv_cells: u32,
    /// Time it took.
    pub load_ms: u64,
    /// Bytes of weights.
    pub weight_bytes: u64,
    /// The vocabulary, from [`Role::Vocabulary`] and [`Role::Embedding`].
    pub vocabulary: Option<VocabularyFacts>,
}

/// What a driver must know of a vocabulary to detokenise and to build prompts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VocabularyFacts {
    /// Bytes of every token, control tokens by their name.
    pub pieces: Vec<Vec<u8>>,
    /// Is a control token, by id.
    pub control: Vec<bool>,
    /// Tokens that end a generation.
    pub end_of_generation: Vec<Token>,
    /// Beginning of sequence.
    pub bos: Option<Token>,
    /// End of sequence.
    pub eos: Option<Token>,
}

/// A session begins.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Open {
    /// Prompt tokens.
    pub prompt: Vec<Token>,
    /// Tokens already generated, when a session is taken up again.
    pub generated: Vec<Token>,
    /// KV cells to set aside: prompt and answer together.
    pub reserve_cells: u32,
    /// How to sample; only the last stage needs it.
    pub sampling: Option<SamplingParams>,
    /// How hidden states travel from this stage to the next.
    pub codec: Codec,
}

/// A session was admitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opened {
    /// Leading tokens whose KV the stage already holds.
    pub cached_tokens: u32,
    /// The newest of them, in number, whose hidden states it can send on once more.
    pub kept_tokens: u32,
}

/// A session was not admitted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum NotOpened {
    /// No room now.
    Busy {
        /// When to try again.
        retry_ms: u32,
    },
    /// Never, as asked: what and why.
    Bad(String),
}

/// The sessions that a driver has, by its own numbers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sessions {
    /// Begun and not ended.
    pub open: Vec<u64>,
}

/// Where a stage's hidden states go from now on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// The next stage, on another machine; `None`: back to the driver.
    pub next: Option<RouteTo>,
    /// Who stands by for the next stage and gets the same, but is never waited for.
    pub standby: Option<RouteTo>,
    /// This host is itself one that stands by: it computes and keeps what it is given, and sends nothing on.
    pub is_standby: bool,
}

/// A stage of a ring on another machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteTo {
    /// Its host.
    pub node: NodeId,
    /// The ring that its host knows it by: goes first on the stream there, as `mesh::Work::Hop`.
    pub ring: RingId,
}

/// The account of one step, with the tokens that were wanted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// The tokens that follow the rows: one for the last row; of a guess ([`FLAG_GUESS`](crate::frame::FLAG_GUESS)) one for each
    /// row that was right.
    pub sampled: Vec<Sampled>,
    /// Time the batch that held these rows took to compute, in this stage.
    pub compute_us: u32,
    /// Rows in that batch.
    pub batch_rows: u32,
    /// Threads that computed it.
    pub threads: u32,
}

/// Text to tokenise.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tokenize {
    /// The text.
    pub text: String,
    /// Add what the model wants at the start (and end).
    pub add_special: bool,
    /// Read control tokens written in the text as such.
    pub parse_special: bool,
}
