//! GGUF, the file format of local language models: read it, check it, write it, cut it by layers, make it up.
//!
//! A model file from a stranger is untrusted input to a C++ program that answers broken input with `abort()`. So the
//! first half of this crate is about trust: [`Gguf::open`] accepts only well-formed files, and
//! [`Gguf::validate_for_engine`] only those that llama.cpp can load without reaching an assertion.
//!
//! The second half is about layers. [`slice()`] writes the part of a model that one stage of a ring runs, as a GGUF file of
//! its own that unpatched llama.cpp loads: layers renumbered from zero, the embedding only in the first stage, the head
//! only in the last. [`tokenizer_card`] is what is left without any layer. [`Manifest`] says what a model is, in bytes and digests; [`synth`] makes small random models of every
//! supported architecture for tests and large ones for benchmarks. [`groups`] are the pieces in which a file travels. [`join`] makes
//! one file of a model that comes in several.
//!
//! The format's specification is `docs/gguf.md` of ggml; where it is silent, `ggml/src/gguf.cpp` decides.
//! Start reading at [`mod@gguf`], then [`mod@slice`].

pub mod arch;
pub mod card;
pub mod error;
pub mod facts;
pub mod gguf;
pub mod groups;
pub mod join;
mod layout;
pub mod manifest;
pub mod parse;
pub mod quant;
pub mod range;
pub mod slice;
pub mod synth;
pub mod tensor_type;
mod validate;
pub mod value;
mod vocabulary;
pub mod write;

pub use arch::{Arch, HiddenInput, hidden_tap_name};
pub use card::tokenizer_card;
pub use error::{GgufError, GgufErrorKind};
pub use facts::Facts;
pub use gguf::Gguf;
pub use groups::{GROUP_BYTES, GroupSet};
pub use manifest::{ByteRange, Digest, Manifest};
pub use parse::TensorInfo;
pub use range::{LayerRange, allowed_cuts, even_cuts, sliceable};
pub use slice::{SliceError, slice, slice_ranges};
pub use tensor_type::TensorType;
pub use value::{Array, StringArray, Value};
pub use vocabulary::{same_vocabulary, vocabulary_digest};
pub use write::{GgufBuilder, TensorSource, WriteError};
