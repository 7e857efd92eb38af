//! From what the child read of a vocabulary to what sampling needs.

use murmur_protocol::stage::VocabularyFacts;
use murmur_sampling::{TokenAttribute, Vocabulary, VocabularyError};

/// Builds the sampler's vocabulary.
pub(crate) fn from_facts(facts: VocabularyFacts) -> Result<Vocabulary, VocabularyError> {
    let attribute = |control: bool| if control { TokenAttribute::Control } else { TokenAttribute::Normal };
    let attributes = facts.control.into_iter().map(attribute).collect();
    Vocabulary::new(facts.pieces, attributes, facts.end_of_generation, facts.bos, facts.eos)
}
