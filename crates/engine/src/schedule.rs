//! Which queued rows are computed together: continuous batching.
//!
//! Generated rows of many sequences share a batch; a prompt chunk has one to itself. The two take turns, so a long prompt
//! delays running streams by one chunk at most. Mixing them would gain little: a chunk keeps the processor busy by itself,
//! and llama.cpp, with a KV stream for each sequence, computes only equal numbers of rows per sequence together.

use std::collections::VecDeque;

/// What the scheduler must know of queued rows.
pub(crate) trait Rows {
    /// How many.
    fn rows(&self) -> usize;
    /// Prompt rows?
    fn is_prefill(&self) -> bool;
    /// The KV sequence, by which batches are ordered.
    fn sequence(&self) -> i32;
}

/// In exact mode batches stay below the 8 rows at which llama.cpp's tiled K-quant kernel starts.
pub(crate) const EXACT_DECODE_ROWS_MAX: usize = 7;

/// The queue of one stage.
pub(crate) struct Schedule<W> {
    decode: VecDeque<W>,
    prefill: VecDeque<W>,
    decode_rows_max: usize,
    decoded_last: bool,
}

impl<W: Rows> Schedule<W> {
    /// A queue whose batches have at most `decode_rows_max` rows of different sequences.
    pub(crate) fn new(decode_rows_max: usize) -> Schedule<W> {
        Schedule { decode: VecDeque::new(), prefill: VecDeque::new(), decode_rows_max, decoded_last: false }
    }

    /// Queues rows.
    pub(crate) fn push(&mut self, work: W) {
        if work.is_prefill() { self.prefill.push_back(work) } else { self.decode.push_back(work) }
    }

    /// Drops queued rows.
    pub(crate) fn retain(&mut self, mut keep: impl FnMut(&W) -> bool) {
        self.decode.retain(&mut keep);
        self.prefill.retain(keep);
    }

    /// Nothing queued.
    pub(crate) fn is_empty(&self) -> bool {
        self.decode.is_empty() && self.prefill.is_empty()
    }

    /// The next batch; empty only when nothing is queued.
    pub(crate) fn next_batch(&mut self) -> Vec<W> {
        let decode = !self.decode.is_empty() && (self.prefill.is_empty() || !self.decoded_last);
        self.decoded_last = decode;
        if !decode {
            return self.prefill.pop_front().into_iter().collect();
        }
        let mut batch: Vec<W> = Vec::new();
        // One row per sequence, in sequence order, or one sequence alone: then rows come out in the order they went in.
        while let Some(work) = self.decode.front() {
            let alone = batch.is_empty();
            let distinct = batch.iter().all(|w| w.sequence() != work.sequence());
            let single = work.rows() == 1 && batch.iter().all(|w| w.rows() == 1);
            if !(alone || distinct && single && batch.len() < self.decode_rows_max) {
                break;
            }
            batch.extend(self.decode.pop_front());
        }
        batch.sort_by_key(Rows::sequence);
        batch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Clone, Copy)]
    struct W(i32, usize, bool);

    impl Rows for W {
        fn rows(&self) -> usize {
            self.1
        }
        fn is_prefill(&self) -> bool {
            self.2
        }
        fn sequence(&self) -> i32 {
            self.0
        }
    }

    fn queue(decode_rows_max: usize, works: &[W]) -> Schedule<W> {
        let mut schedule = Schedule::new(decode_rows_max);
        works.iter().for_each(|&w| schedule.push(w));
        schedule
    }

    #[test]
    fn rows_of_prompts_and_answers_never_mix_and_neither_side_starves() {
        let mut schedule = queue(7, &[W(0, 12, true), W(0, 12, true), W(2, 1, false), W(1, 1, false)]);
        assert_eq!(schedule.next_batch(), [W(1, 1, false), W(2, 1, false)]);
        schedule.push(W(1, 1, false));
        assert_eq!(schedule.next_batch(), [W(0, 12, true)]);
        assert_eq!(schedule.next_batch(), [W(1, 1, false)]);
        assert_eq!(schedule.next_batch(), [W(0, 12, true)]);
        assert!(schedule.is_empty());
    }

    #[test]
    fn batches_of_generated_rows_have_the_size_that_was_asked_for_at_most() {
        let works: Vec<W> = (0..20).map(|i| W(i, 1, false)).collect();
        let mut schedule = queue(7, &works);
        let sizes: Vec<usize> = std::iter::from_fn(|| Some(schedule.next_batch().len()).filter(|&n| n > 0)).collect();
        assert_eq!(sizes, [7, 7, 6]);
    }

    #[test]
    fn two_pieces_of_one_sequence_are_never_in_one_batch() {
        let mut schedule = queue(7, &[W(0, 1, false), W(0, 1, false)]);
        assert_eq!(schedule.next_batch().len(), 1);
        assert_eq!(schedule.next_batch().len(), 1);
    }
}
