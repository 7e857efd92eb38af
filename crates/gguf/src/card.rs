//! A tokenizer card: all that the driver of a model needs of its file, which is everything but the weights.
//!
//! A driver whose workers are other machines renders prompts, counts tokens and turns tokens into text, but computes
//! nothing. The card is a GGUF file with the model's metadata and no tensors: a few MiB instead of many GiB. llama.cpp
//! loads it as a vocabulary, and [`Gguf::validate_for_engine`] refuses it as a model.

use crate::error::{GgufError, GgufErrorKind};
use crate::gguf::Gguf;
use crate::validate;
use crate::write::GgufBuilder;

/// The bytes of the card of `gguf`: a GGUF file with its metadata in the order of the file, and no tensors. The same file
/// gives the same bytes, at most as many as its own header has, and padding. Reads nothing.
///
/// Refused is a file whose vocabulary llama.cpp would not survive, and one that has none.
pub fn tokenizer_card(gguf: &Gguf) -> Result<Vec<u8>, GgufError> {
    validate::check_tokenizer(gguf).map_err(|reason| GgufError::new(gguf.path(), GgufErrorKind::Unrunnable(reason)))?;
    let mut builder = GgufBuilder::default();
    // The card of a part stands for itself: llama.cpp would look for the other parts beside it.
    for (key, value) in gguf.keys().filter(|(key, _)| !key.starts_with("split.")) {
        builder.set(key, value.clone());
    }
    builder.header_bytes().map_err(|error| GgufError::new(gguf.path(), GgufErrorKind::malformed(error.to_string())))
}
