//! How fast this machine is, found out in a moment before anything is loaded: how fast its processors read memory, which is what
//! generating takes, and how fast they multiply, which is what reading prompts takes. It is a comparison with other machines, and
//! no forecast for a model; that is measured when the model runs.

use std::{
    hint::black_box,
    num::NonZero,
    sync::OnceLock,
    thread,
    time::{Duration, Instant},
};

use murmur_protocol::mesh::MachineSpeed;

use crate::Threads;

/// Time for each of the two.
const PROBE: Duration = Duration::from_millis(60);
/// Memory that is read, shared among the threads: more than caches hold, and little enough to be set up in a moment.
const READ_BYTES: usize = 64 << 20;
/// The clock is looked at after so many of them.
const PIECE_BYTES: usize = 1 << 18;
/// As the engine's.
#[cfg(target_os = "linux")]
const NICENESS: i32 = 10;
/// Numbers that are multiplied: they stay in the nearest cache.
const NUMBERS: usize = 1 << 10;
/// Sums that are kept apart, so that no addition waits for the one before.
const LANES: usize = 64;

/// The speed of this machine with the threads that a stage gets. Measured once in the life of a process, by the first caller, who
/// waits for it: somewhat more than twice [`PROBE`].
pub(crate) fn machine(threads: Threads) -> MachineSpeed {
    static MACHINE: OnceLock<MachineSpeed> = OnceLock::new();
    *MACHINE.get_or_init(|| {
        let threads = match threads {
            Threads::Auto => thread::available_parallelism().map_or(1, NonZero::get),
            Threads::Fixed(count) => count.max(1) as usize,
        };
        MachineSpeed {
            read_bytes_per_s: together(threads, || read(READ_BYTES / threads)),
            multiply_adds_per_s: together(threads, multiply),
        }
    })
}

/// What all threads do in a second, when each says what it does.
fn together(threads: usize, work: impl Fn() -> f64 + Sync) -> u64 {
    let sum: f64 = thread::scope(|scope| {
        let nicely = || {
            be_nice();
            work()
        };
        let started: Vec<_> = (0..threads).map(|_| scope.spawn(nicely)).collect();
        started.into_iter().filter_map(|thread| thread.join().ok()).sum()
    });
    sum as u64
}

/// Lets others go first, as the engine does. Elsewhere than on Linux that would hold for the whole process, for ever.
fn be_nice() {
    // Failing to be nice is no reason to fail.
    #[cfg(target_os = "linux")]
    let _ = rustix::process::nice(NICENESS);
}

/// Bytes that this thread reads in a second of as many as no cache holds.
fn read(bytes: usize) -> f64 {
    // Not zero: untouched memory is one page that the kernel shows everywhere.
    let memory = vec![1u8; bytes.max(PIECE_BYTES)];
    let (begun, mut count) = (Instant::now(), 0);
    for piece in memory.chunks_exact(PIECE_BYTES).cycle() {
        let (words, _) = piece.as_chunks::<8>();
        let sum = words.iter().fold(0u64, |sum, word| sum.wrapping_add(u64::from_ne_bytes(*word)));
        black_box(sum);
        count += PIECE_BYTES;
        if begun.elapsed() >= PROBE {
            break;
        }
    }
    count as f64 / begun.elapsed().as_secs_f64()
}

/// Multiplications with an addition each that this thread does in a second.
fn multiply() -> f64 {
    let (a, b) = (black_box([1.5f32; NUMBERS]), black_box([0.5f32; NUMBERS]));
    let (begun, mut count) = (Instant::now(), 0);
    let mut sums = [0f32; LANES];
    while begun.elapsed() < PROBE {
        for _ in 0..64 {
            for (a, b) in a.as_chunks::<LANES>().0.iter().zip(b.as_chunks::<LANES>().0) {
                for lane in 0..LANES {
                    sums[lane] += a[lane] * b[lane];
                }
            }
            count += NUMBERS;
        }
        sums = black_box(sums);
    }
    count as f64 / begun.elapsed().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_measured_once_and_does_something() {
        let speed = machine(Threads::Fixed(2));
        assert!(speed.read_bytes_per_s > 0 && speed.multiply_adds_per_s > 0, "{speed:?}");
        assert_eq!(machine(Threads::Auto), speed);
    }
}
