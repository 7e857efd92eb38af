//! What the parts of Murmur say to each other. No I/O beyond the readers and writers given by the caller.
//!
//! Start with [`sampling`] (what determines a token), then [`frame`] (how rows travel) and [`stage`] (what else a driver
//! and a stage say).

pub mod frame;
pub mod sampling;
pub mod stage;
