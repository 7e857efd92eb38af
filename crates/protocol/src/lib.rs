//! What the parts of Murmur say to each other. No I/O beyond the readers and writers given by the caller.
//!
//! Start with [`sampling`] (what determines a token), then [`frame`] (how rows travel) and [`stage`] (what else a driver
//! and a stage say), then [`mesh`] (what nodes say to each other).

pub mod codec;
pub mod frame;
pub mod mesh;
pub mod sampling;
pub mod stage;
