//! Time as an argument.
//!
//! Every machine of this crate is told what time it is and never asks. The time is the node's own monotonic clock: it says
//! how long ago something was, never what a calendar says, so a wall clock that is off by ten minutes cannot matter.

/// A moment of the node's monotonic clock, in milliseconds since any fixed moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Now(u64);

impl Now {
    /// The moment from which the others are counted.
    pub const ZERO: Now = Now(0);

    /// The moment `ms` milliseconds after the fixed one.
    pub const fn from_ms(ms: u64) -> Self {
        Now(ms)
    }

    /// Milliseconds since the fixed moment.
    pub const fn as_ms(self) -> u64 {
        self.0
    }

    /// `ms` milliseconds later; stays at the end of time when it would go past it.
    pub const fn plus_ms(self, ms: u64) -> Self {
        Now(self.0.saturating_add(ms))
    }

    /// Milliseconds from `earlier` until here; 0 if `earlier` is the later of both.
    pub const fn since_ms(self, earlier: Now) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}
