//! What a link does to packets, as a topology file or a test states it.

use serde::{Deserialize, Serialize};

/// The longest delay or jitter, in milliseconds: a minute, longer than any time-out worth testing.
pub const DELAY_MS_MAX: f64 = 60_000.0;
/// Rates, in megabits per second: from a slow modem to more than a machine can push through a TUN device.
pub const RATE_MBIT_S_MIN: f64 = 0.001;
/// See [`RATE_MBIT_S_MIN`].
pub const RATE_MBIT_S_MAX: f64 = 100_000.0;
/// The queue of a link with a rate, where none is named: about what a home router holds, 40 ms at 50 Mbit/s.
pub const QUEUE_BYTES_DEFAULT: u32 = 256 * 1024;

/// One direction of a link. The default lets everything pass at once.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Link {
    /// What every packet waits, in milliseconds.
    pub delay_ms: f64,
    /// The most that is added to the delay, in milliseconds: evenly spread from 0 to this.
    pub jitter_ms: f64,
    /// How likely a packet is lost, 0 to 1, each by itself.
    pub loss: f64,
    /// Megabits per second, counted over whole IP packets. None: no limit, and no queue.
    pub rate_mbit_s: Option<f64>,
    /// What may wait for its turn on a link with a rate, in bytes; packets that find it full are dropped. An empty queue
    /// takes a packet of any size.
    pub queue_bytes: u32,
    /// Whether jitter lets packets overtake each other. Where not, a packet waits for the one before it, as on a real queue.
    pub reorders: bool,
}

impl Default for Link {
    fn default() -> Self {
        Self {
            delay_ms: 0.0,
            jitter_ms: 0.0,
            loss: 0.0,
            rate_mbit_s: None,
            queue_bytes: QUEUE_BYTES_DEFAULT,
            reorders: false,
        }
    }
}

impl Link {
    /// A link with nothing but a delay, in milliseconds.
    pub fn delay(delay_ms: f64) -> Self {
        Self { delay_ms, ..Self::default() }
    }

    /// A link with nothing but a rate, in megabits per second.
    pub fn rate(rate_mbit_s: f64) -> Self {
        Self { rate_mbit_s: Some(rate_mbit_s), ..Self::default() }
    }

    /// A link that loses packets, 0 to 1.
    pub fn lossy(loss: f64) -> Self {
        Self { loss, ..Self::default() }
    }

    /// Says which figure cannot be, if one cannot.
    pub(crate) fn check(&self) -> Result<(), String> {
        let within = |name: &str, value: f64, least: f64, most: f64| {
            // Written so that NaN is outside.
            if value >= least && value <= most {
                Ok(())
            } else {
                Err(format!("{name} is {value}, must be from {least} to {most}"))
            }
        };
        within("delay_ms", self.delay_ms, 0.0, DELAY_MS_MAX)?;
        within("jitter_ms", self.jitter_ms, 0.0, DELAY_MS_MAX)?;
        within("loss", self.loss, 0.0, 1.0)?;
        self.rate_mbit_s.map_or(Ok(()), |rate| within("rate_mbit_s", rate, RATE_MBIT_S_MIN, RATE_MBIT_S_MAX))
    }
}
