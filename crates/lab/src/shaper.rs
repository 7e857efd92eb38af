//! One direction of a link at work: when does a packet that arrives now come out at the other end, if at all?
//!
//! A packet passes three things in turn. The line sends one packet at a time at its rate, and those that wait for it form a
//! queue bounded in bytes. Then the packet may be lost, having used the line all the same. Then it travels: delay and jitter.
//! Nothing is stored: the state of the queue is the time at which the line will be free, which is exact for
//! first-in-first-out, and the packet itself waits elsewhere until the time that is answered here.

use rand::Rng;

use crate::link::Link;

const NS_PER_MS: f64 = 1e6;

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passage {
    /// It comes out at this time, in nanoseconds of the caller's clock.
    At(u64),
    /// It is lost on the way.
    Lost,
    /// The queue has no room for it.
    QueueFull,
}

/// One direction of a link with its queue.
#[derive(Clone, Debug)]
pub struct Shaper {
    delay_ns: u64,
    jitter_ns: u64,
    loss: f64,
    /// Nanoseconds that a byte takes; None without limit.
    byte_ns: Option<f64>,
    queue_bytes: f64,
    reorders: bool,
    free_at_ns: f64,
    last_exit_ns: u64,
}

impl Shaper {
    /// A link that nothing has passed yet. The caller has checked the link.
    pub fn new(link: &Link) -> Self {
        Self {
            delay_ns: (link.delay_ms * NS_PER_MS) as u64,
            jitter_ns: (link.jitter_ms * NS_PER_MS) as u64,
            loss: link.loss,
            byte_ns: link.rate_mbit_s.map(|rate| 8e3 / rate),
            queue_bytes: f64::from(link.queue_bytes),
            reorders: link.reorders,
            free_at_ns: 0.0,
            last_exit_ns: 0,
        }
    }

    /// A packet arrives at `now_ns`, which never goes back.
    pub fn offer(&mut self, length_bytes: usize, now_ns: u64, random: &mut impl Rng) -> Passage {
        let mut exit_ns = now_ns;
        if let Some(byte_ns) = self.byte_ns {
            // f64 holds whole nanoseconds for 104 days; fractions must not be lost at high rates, where a byte takes 0.08 ns.
            let now = now_ns as f64;
            let waiting_bytes = (self.free_at_ns - now).max(0.0) / byte_ns;
            if waiting_bytes > 0.0 && waiting_bytes + length_bytes as f64 > self.queue_bytes {
                return Passage::QueueFull;
            }
            self.free_at_ns = self.free_at_ns.max(now) + length_bytes as f64 * byte_ns;
            exit_ns = self.free_at_ns as u64;
        }
        if self.loss > 0.0 && random.random_bool(self.loss) {
            return Passage::Lost;
        }
        exit_ns += self.delay_ns;
        if self.jitter_ns > 0 {
            exit_ns += random.random_range(0..=self.jitter_ns);
        }
        if !self.reorders {
            exit_ns = exit_ns.max(self.last_exit_ns);
            self.last_exit_ns = exit_ns;
        }
        Passage::At(exit_ns)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::{SeedableRng, rngs::StdRng};

    use super::*;

    const MS: u64 = 1_000_000;

    fn random() -> StdRng {
        StdRng::seed_from_u64(7)
    }

    fn exit(passage: Passage) -> u64 {
        match passage {
            Passage::At(at_ns) => at_ns,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_link_without_properties_lets_packets_pass_at_once() {
        let mut shaper = Shaper::new(&Link::default());
        assert_eq!(shaper.offer(1500, 5, &mut random()), Passage::At(5));
    }

    #[test]
    fn a_rate_sends_packets_one_after_the_other() {
        // 12 Mbit/s: 1,500 bytes take 1 ms.
        let mut shaper = Shaper::new(&Link { delay_ms: 10.0, ..Link::rate(12.0) });
        let mut random = random();
        let exits: Vec<u64> = (0..3).map(|_| exit(shaper.offer(1500, 0, &mut random))).collect();
        assert_eq!(exits, [11 * MS, 12 * MS, 13 * MS]);
        assert_eq!(exit(shaper.offer(1500, 100 * MS, &mut random)), 111 * MS, "an idle line saves nothing up");
    }

    #[test]
    fn a_full_queue_drops_what_comes_and_takes_packets_again_when_it_has_drained() {
        let mut shaper = Shaper::new(&Link { queue_bytes: 3000, ..Link::rate(12.0) });
        let mut random = random();
        assert!(matches!(shaper.offer(1500, 0, &mut random), Passage::At(_)));
        assert!(matches!(shaper.offer(1500, 0, &mut random), Passage::At(_)));
        assert_eq!(shaper.offer(1500, 0, &mut random), Passage::QueueFull);
        assert!(matches!(shaper.offer(1500, MS, &mut random), Passage::At(_)));
    }

    #[test]
    fn an_empty_queue_takes_a_packet_larger_than_itself() {
        let mut shaper = Shaper::new(&Link { queue_bytes: 0, ..Link::rate(12.0) });
        assert!(matches!(shaper.offer(1500, 0, &mut random()), Passage::At(_)));
    }

    #[test]
    fn loss_is_as_likely_as_asked() {
        let mut shaper = Shaper::new(&Link::lossy(0.2));
        let mut random = random();
        let lost = (0..10_000).filter(|_| shaper.offer(100, 0, &mut random) == Passage::Lost).count();
        assert!((1800..2200).contains(&lost), "{lost} of 10,000");
        let mut all = Shaper::new(&Link::lossy(1.0));
        assert!((0..100).all(|_| all.offer(100, 0, &mut random) == Passage::Lost));
    }

    #[test]
    fn jitter_spreads_evenly_and_overtakes_only_where_asked() {
        let jittery = Link { delay_ms: 10.0, jitter_ms: 4.0, ..Link::default() };
        for reorders in [false, true] {
            let mut shaper = Shaper::new(&Link { reorders, ..jittery });
            let mut random = random();
            let exits: Vec<u64> = (0..2000).map(|n| exit(shaper.offer(100, n * MS, &mut random))).collect();
            assert_eq!(exits.is_sorted(), !reorders);
            let delays = exits.iter().enumerate().map(|(n, at)| at - n as u64 * MS);
            assert!(delays.clone().all(|delay| (10 * MS..=14 * MS).contains(&delay)));
            let mean_ms = delays.sum::<u64>() as f64 / 2000.0 / MS as f64;
            assert!(!reorders || (11.8..12.2).contains(&mean_ms), "{mean_ms}");
        }
    }

    proptest! {
        #[test]
        fn no_packet_leaves_early_or_faster_than_the_rate(
            rate_mbit_s in 0.1f64..10_000.0,
            queue_bytes in 0u32..100_000,
            packets in proptest::collection::vec((20usize..1500, 0u64..2 * MS), 1..200),
        ) {
            let mut shaper = Shaper::new(&Link { delay_ms: 1.0, queue_bytes, ..Link::rate(rate_mbit_s) });
            let (mut random, mut now_ns, mut bytes) = (random(), 0, 0);
            for (length, gap_ns) in packets {
                now_ns += gap_ns;
                if let Passage::At(at_ns) = shaper.offer(length, now_ns, &mut random) {
                    bytes += length;
                    prop_assert!(at_ns >= now_ns + MS);
                    let line_ns = bytes as f64 * 8e3 / rate_mbit_s;
                    prop_assert!(at_ns as f64 + 1000.0 >= line_ns + MS as f64);
                    let wait_ns = (f64::from(queue_bytes) + 1500.0) * 8e3 / rate_mbit_s;
                    prop_assert!((at_ns - now_ns - MS) as f64 <= wait_ns + 1000.0, "the queue is bounded");
                }
            }
        }
    }
}
