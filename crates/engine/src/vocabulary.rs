//! The vocabulary, on both sides of the process boundary: text to tokens in the child, tokens to what sampling needs.

use murmur_protocol::{
    frame::{Frame, Header, Kind},
    stage::{Tokenize, VocabularyFacts},
};
use murmur_sampling::{TokenAttribute, Vocabulary, VocabularyError};

use crate::{ffi::Model, stage::StageError};

/// Builds the sampler's vocabulary.
pub(crate) fn from_facts(facts: VocabularyFacts) -> Result<Vocabulary, VocabularyError> {
    let attribute = |control: bool| if control { TokenAttribute::Control } else { TokenAttribute::Normal };
    let attributes = facts.control.into_iter().map(attribute).collect();
    Vocabulary::new(facts.pieces, attributes, facts.end_of_generation, facts.bos, facts.eos)
}

/// Answers a [`Kind::Tokenize`] frame.
pub(crate) fn tokenize(model: &Model, frame: &Frame) -> Result<Frame, StageError> {
    if frame.header.kind != Kind::Tokenize {
        return Err(StageError::Protocol("a vocabulary only tokenises"));
    }
    let request: Tokenize = frame.decode()?;
    let tokens = model.tokenize(&request.text, request.add_special, request.parse_special)?;
    Ok(Frame::tokens(Header { kind: Kind::Tokenized, ..frame.header }, &tokens))
}
