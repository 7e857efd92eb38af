//! How the next token is chosen.
//!
//! Same seed, same tokens: the randomness of a token is a pure function of (seed, position, token id), so that a request can move to another
//! machine mid-stream, a validator can replay it, and speculation changes nothing but the speed. No I/O, no clock, no model: logits
//! go in, a token comes out.
//!
//! Start with [`noise`] (the formula), then [`sampler`] (the order of the steps). [`text`] turns the chosen tokens into text and finds stop
//! strings; [`vocabulary`] is what all of it must know of a model's tokenizer; [`grammar`] constrains the text through llguidance.

mod choose;
mod error;
mod filters;
pub mod grammar;
pub mod noise;
mod numeric;
pub mod params;
mod penalties;
pub mod sampler;
pub mod text;
pub mod vocabulary;

pub use error::SamplingError;
pub use sampler::Sampler;
pub use text::{Emission, StopError, StopMatcher};
pub use vocabulary::{TokenAttribute, Vocabulary, VocabularyError};
