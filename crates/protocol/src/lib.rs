//! What the parts of Murmur say to each other.
//!
//! Start with [`sampling`] (what determines a token).

pub mod sampling;
