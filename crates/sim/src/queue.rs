//! What happens when.
//!
//! A simulated minute of a thousand nodes has some ten million events, most of them a few milliseconds ahead. A ring with
//! one line per millisecond takes and gives them in constant time; what lies further ahead than the ring waits in a
//! tree. Events of one millisecond come out in the order in which they went in, so a run depends on its seed alone.
//!
//! All events are in one block of memory, linked to lines: it is as large as there were events at once. (Lines with memory
//! of their own keep what the busiest moments took, and were most of the memory of four thousand nodes.)

use std::collections::BTreeMap;

/// Length of the ring in milliseconds.
const RING_MS: u64 = 1 << 15;

/// No place.
const NONE: usize = usize::MAX;

/// A place for an event; empty ones are linked as well.
#[derive(Debug)]
struct Place<E> {
    event: Option<E>,
    next: usize,
}

/// Events of one moment, in order.
#[derive(Debug, Clone, Copy)]
struct Line {
    first: usize,
    last: usize,
}

const EMPTY: Line = Line { first: NONE, last: NONE };

/// Events by time.
#[derive(Debug)]
pub(crate) struct Queue<E> {
    now_ms: u64,
    places: Vec<Place<E>>,
    /// The first empty place.
    empty: usize,
    ring: Vec<Line>,
    in_ring: usize,
    far: BTreeMap<u64, Line>,
}

impl<E> Queue<E> {
    /// An empty queue at time 0.
    pub(crate) fn new() -> Self {
        let ring = vec![EMPTY; RING_MS as usize];
        Queue { now_ms: 0, places: Vec::new(), empty: NONE, ring, in_ring: 0, far: BTreeMap::new() }
    }

    /// Milliseconds since the beginning.
    pub(crate) fn now_ms(&self) -> u64 {
        self.now_ms
    }

    /// `event` happens in `delay_ms` milliseconds.
    pub(crate) fn after(&mut self, delay_ms: u64, event: E) {
        let at_ms = self.now_ms.saturating_add(delay_ms);
        let place = Place { event: Some(event), next: NONE };
        let at = if self.empty == NONE {
            self.places.push(place);
            self.places.len() - 1
        } else {
            let at = self.empty;
            self.empty = std::mem::replace(&mut self.places[at], place).next;
            at
        };
        let line = if delay_ms < RING_MS {
            self.in_ring += 1;
            &mut self.ring[(at_ms % RING_MS) as usize]
        } else {
            self.far.entry(at_ms).or_insert(EMPTY)
        };
        if line.first == NONE {
            line.first = at;
        } else {
            self.places[line.last].next = at;
        }
        line.last = at;
    }

    /// The next event before `until_ms`; afterwards it is `until_ms`, and there is none.
    pub(crate) fn next(&mut self, until_ms: u64) -> Option<E> {
        loop {
            // What was far when it went in went in before whatever the ring has for the same moment.
            if let Some(line) = self.far.get_mut(&self.now_ms) {
                let at = line.first;
                line.first = self.places[at].next;
                if line.first == NONE {
                    self.far.remove(&self.now_ms);
                }
                return self.take(at);
            }
            let line = &mut self.ring[(self.now_ms % RING_MS) as usize];
            if line.first != NONE {
                let at = line.first;
                line.first = self.places[at].next;
                self.in_ring -= 1;
                return self.take(at);
            }
            if self.now_ms >= until_ms {
                return None;
            }
            self.now_ms = if self.in_ring > 0 {
                self.now_ms + 1
            } else {
                self.far.first_key_value().map_or(until_ms, |(at_ms, _)| (*at_ms).min(until_ms))
            };
        }
    }

    fn take(&mut self, at: usize) -> Option<E> {
        let place = &mut self.places[at];
        place.next = std::mem::replace(&mut self.empty, at);
        place.event.take()
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
