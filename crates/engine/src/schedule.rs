//! Which queued rows are computed together: continuous batching.
//!
//! Decode rows go first; prompt chunks fill the rest of the batch, so a long prompt delays running streams by one chunk
//! at most. In exact mode a token must always pass through the same matrix kernels, so a prompt chunk has a batch to
//! itself and decode batches stay below the row count at which llama.cpp changes kernels.

use std::collections::VecDeque;

/// What the scheduler must know of queued rows.
pub(crate) trait Rows {
    /// How many.
    fn rows(&self) -> usize;
    /// Prompt rows?
    fn is_prefill(&self) -> bool;
    /// The KV sequence, by which exact batches are ordered.
    fn sequence(&self) -> i32;
}

/// llama.cpp's tiled K-quant kernel starts at 8 rows.
pub(crate) const EXACT_DECODE_ROWS_MAX: usize = 7;

/// The queue of one stage.
pub(crate) struct Schedule<W> {
    decode: VecDeque<W>,
    prefill: VecDeque<W>,
    batch_rows: usize,
    exact: bool,
    decoded_last: bool,
}

impl<W: Rows> Schedule<W> {
    /// A queue whose batches have at most `batch_rows` rows.
    pub(crate) fn new(batch_rows: usize, exact: bool) -> Schedule<W> {
        Schedule { decode: VecDeque::new(), prefill: VecDeque::new(), batch_rows, exact, decoded_last: false }
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
        if self.exact { self.next_exact() } else { self.next_mixed() }
    }

    fn next_mixed(&mut self) -> Vec<W> {
        let mut batch = Vec::new();
        let mut room = self.batch_rows;
        for queue in [&mut self.decode, &mut self.prefill] {
            while queue.front().is_some_and(|work| work.rows() <= room || batch.is_empty()) {
                let Some(work) = queue.pop_front() else { break };
                room = room.saturating_sub(work.rows());
                batch.push(work);
            }
        }
        batch
    }

    fn next_exact(&mut self) -> Vec<W> {
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
            if !(alone || distinct && single && batch.len() < EXACT_DECODE_ROWS_MAX) {
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

    fn queue(exact: bool, works: &[W]) -> Schedule<W> {
        let mut schedule = Schedule::new(16, exact);
        works.iter().for_each(|&w| schedule.push(w));
        schedule
    }

    #[test]
    fn decode_rows_go_first_and_chunks_fill_the_batch() {
        let mut schedule = queue(false, &[W(0, 12, true), W(1, 12, true), W(2, 1, false), W(3, 1, false)]);
        assert_eq!(schedule.next_batch(), [W(2, 1, false), W(3, 1, false), W(0, 12, true)]);
        assert_eq!(schedule.next_batch(), [W(1, 12, true)]);
        assert!(schedule.is_empty());
    }

    #[test]
    fn exact_batches_never_mix_and_neither_side_starves() {
        let mut schedule = queue(true, &[W(0, 12, true), W(0, 12, true), W(2, 1, false), W(1, 1, false)]);
        assert_eq!(schedule.next_batch(), [W(1, 1, false), W(2, 1, false)]);
        schedule.push(W(1, 1, false));
        assert_eq!(schedule.next_batch(), [W(0, 12, true)]);
        assert_eq!(schedule.next_batch(), [W(1, 1, false)]);
        assert_eq!(schedule.next_batch(), [W(0, 12, true)]);
    }

    #[test]
    fn exact_decode_batches_stay_below_the_kernel_change() {
        let works: Vec<W> = (0..20).map(|i| W(i, 1, false)).collect();
        let mut schedule = queue(true, &works);
        let sizes: Vec<usize> = std::iter::from_fn(|| Some(schedule.next_batch().len()).filter(|&n| n > 0)).collect();
        assert_eq!(sizes, [7, 7, 6]);
    }

    #[test]
    fn two_exact_pieces_of_one_sequence_are_never_in_one_batch() {
        let mut schedule = queue(true, &[W(0, 1, false), W(0, 1, false)]);
        assert_eq!(schedule.next_batch().len(), 1);
        assert_eq!(schedule.next_batch().len(), 1);
    }
}
