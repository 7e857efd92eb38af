//! The two clocks: a monotonic one that decides, and the wall clock for what people wrote dates on.

use std::sync::OnceLock;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use murmur_core::time::Now;

/// This process's monotonic clock.
pub(crate) fn now() -> Now {
    static START: OnceLock<Instant> = OnceLock::new();
    let elapsed = START.get_or_init(Instant::now).elapsed();
    Now::from_ms(u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX))
}

/// The wall clock in Unix milliseconds; 0 before 1970.
pub(crate) fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
