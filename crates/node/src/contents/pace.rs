//! A limit to how many bytes a second go through something, and how many have.

use std::{
    io::{self, Read, Write},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// After a pause, so much may go through at once, in seconds of the rate.
const BURST: Duration = Duration::from_millis(250);
/// What passes at once is asked for in parts of this, so that those who share a limit take turns.
const PART_BYTES: usize = 64 << 10;

/// Many threads may share one.
pub(crate) struct Pace {
    bytes_per_s: Option<u64>,
    /// Until when what has gone through so far takes at this rate.
    taken_until: Mutex<Instant>,
}

impl Pace {
    /// `None`: no limit.
    pub(crate) fn new(bytes_per_s: Option<u64>) -> Pace {
        Pace { bytes_per_s, taken_until: Mutex::new(Instant::now()) }
    }

    /// Waits until so many bytes may go through. Blocks.
    fn wait(&self, bytes: usize) {
        let Some(rate) = self.bytes_per_s else { return };
        let takes = Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64);
        let pause = {
            let mut until = self.taken_until.lock().unwrap_or_else(PoisonError::into_inner);
            let now = Instant::now();
            *until = (*until).max(now.checked_sub(BURST).unwrap_or(now)) + takes;
            until.saturating_duration_since(now)
        };
        std::thread::sleep(pause);
    }
}

/// A stream of which is counted what is read.
pub(crate) struct Counted<'a, S>(pub(crate) S, pub(crate) &'a AtomicU64);

impl<S: Read> Read for Counted<'_, S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.0.read(buffer)?;
        self.1.fetch_add(read as u64, Ordering::Relaxed);
        Ok(read)
    }
}

/// A stream that keeps to a limit.
pub(crate) struct Paced<'a, S>(pub(crate) S, pub(crate) &'a Pace);

impl<S> Paced<'_, S> {
    pub(crate) fn into_inner(self) -> S {
        self.0
    }
}

impl<S: Read> Read for Paced<'_, S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let room = buffer.len().min(PART_BYTES);
        let read = self.0.read(&mut buffer[..room])?;
        self.1.wait(read);
        Ok(read)
    }
}

impl<S: Write> Write for Paced<'_, S> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let part = &bytes[..bytes.len().min(PART_BYTES)];
        self.1.wait(part.len());
        self.0.write(part)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_who_share_a_limit_together_keep_to_it() {
        let pace = Pace::new(Some(4_000_000));
        let begun = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| Paced(io::sink(), &pace).write_all(&[0; 1_000_000]).unwrap());
            }
        });
        // A burst's worth may go ahead.
        assert!(begun.elapsed() >= Duration::from_secs(1) - BURST, "{:?}", begun.elapsed());
    }
}
