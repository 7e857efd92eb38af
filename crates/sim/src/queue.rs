//! What happens when.
//!
//! A simulated minute of a thousand nodes has some ten million events, most of them a few milliseconds ahead. A ring with
//! one bucket per millisecond takes and gives them in constant time; what lies further ahead than the ring waits in a
//! tree. Events of one millisecond come out in the order in which they went in, so a run depends on its seed alone.

use std::collections::{BTreeMap, VecDeque};

/// Length of the ring in milliseconds.
const RING_MS: u64 = 1 << 15;

/// Events by time.
#[derive(Debug)]
pub(crate) struct Queue<E> {
    now_ms: u64,
    ring: Vec<VecDeque<E>>,
    /// The memory of buckets that were emptied, for those that are filled next: what is worked on fits into few pages.
    spare: Vec<VecDeque<E>>,
    in_ring: usize,
    far: BTreeMap<u64, VecDeque<E>>,
}

impl<E> Queue<E> {
    /// An empty queue at time 0.
    pub(crate) fn new() -> Self {
        let ring = std::iter::repeat_with(VecDeque::new).take(RING_MS as usize).collect();
        Queue { now_ms: 0, ring, spare: Vec::new(), in_ring: 0, far: BTreeMap::new() }
    }

    /// Milliseconds since the beginning.
    pub(crate) fn now_ms(&self) -> u64 {
        self.now_ms
    }

    /// `event` happens in `delay_ms` milliseconds.
    pub(crate) fn after(&mut self, delay_ms: u64, event: E) {
        let at_ms = self.now_ms.saturating_add(delay_ms);
        if delay_ms < RING_MS {
            let bucket = &mut self.ring[(at_ms % RING_MS) as usize];
            if bucket.capacity() == 0 {
                *bucket = self.spare.pop().unwrap_or_default();
            }
            bucket.push_back(event);
            self.in_ring += 1;
        } else {
            self.far.entry(at_ms).or_default().push_back(event);
        }
    }

    /// The next event before `until_ms`; afterwards it is `until_ms`, and there is none.
    pub(crate) fn next(&mut self, until_ms: u64) -> Option<E> {
        loop {
            // What was far when it went in went in before whatever the ring has for the same moment.
            if let Some(mut events) = self.far.remove(&self.now_ms) {
                let event = events.pop_front();
                if !events.is_empty() {
                    self.far.insert(self.now_ms, events);
                }
                return event;
            }
            if let Some(event) = self.ring[(self.now_ms % RING_MS) as usize].pop_front() {
                self.in_ring -= 1;
                return Some(event);
            }
            if self.now_ms >= until_ms {
                return None;
            }
            let emptied = std::mem::take(&mut self.ring[(self.now_ms % RING_MS) as usize]);
            if emptied.capacity() > 0 {
                self.spare.push(emptied);
            }
            self.now_ms = if self.in_ring > 0 {
                self.now_ms + 1
            } else {
                self.far.first_key_value().map_or(until_ms, |(at_ms, _)| (*at_ms).min(until_ms))
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_come_in_the_order_of_time_and_then_of_going_in() {
        let mut queue = Queue::new();
        for (delay_ms, name) in [(5, "b"), (RING_MS + 5, "d"), (0, "a"), (5, "c"), (3 * RING_MS, "e")] {
            queue.after(delay_ms, (delay_ms, name));
        }
        let mut seen = Vec::new();
        while let Some((at_ms, name)) = queue.next(2 * RING_MS) {
            assert_eq!(queue.now_ms(), at_ms);
            seen.push(name);
        }
        assert_eq!(seen, ["a", "b", "c", "d"]);
        assert_eq!(queue.now_ms(), 2 * RING_MS);
        assert_eq!(queue.next(4 * RING_MS), Some((3 * RING_MS, "e")));
    }
}
