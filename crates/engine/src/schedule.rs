//! Which queued rows are computed together: continuous batching.
//!
//! Generated rows of many sequences share a batch, and so do short prompts; the two take turns, so a long prompt delays
//! running streams by one chunk at most. Mixing them would gain little: a chunk keeps the processor busy by itself, and
//! llama.cpp, with a KV stream for each sequence, computes only equal numbers of rows per sequence together.
//!
//! Sequences take turns as well: one that has sent many guesses ahead delays the others by one batch at most. Guesses of a sequence that
//! wait behind one another are computed together where that is cheaper ([`crate::joining`]) and nobody else waits.

use std::collections::{HashSet, VecDeque};

use murmur_protocol::frame::GUESS_ROWS_MAX;

/// What the scheduler must know of queued rows.
pub(crate) trait Rows {
    /// How many.
    fn rows(&self) -> usize;
    /// Prompt rows?
    fn is_prefill(&self) -> bool;
    /// The KV sequence, by which batches are ordered.
    fn sequence(&self) -> i32;
    /// Whether these are guesses of what follows `before`, which may be computed in one batch with it.
    fn follows(&self, before: &Self) -> bool;
}

/// The queue of one stage.
pub(crate) struct Schedule<W> {
    decode: VecDeque<W>,
    prefill: VecDeque<W>,
    limits: Limits,
    decoded_last: bool,
    /// Sequences of the last batch of generated rows.
    had_turn: HashSet<i32>,
}

/// Rows of one batch at most.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Generated rows of different sequences.
    pub(crate) decode_rows: usize,
    /// Prompt rows of different sequences; a chunk is never split.
    pub(crate) prefill_rows: usize,
    /// Generated rows of one sequence that follow one another.
    pub(crate) guess_rows: usize,
}

impl Limits {
    /// In exact mode a chunk has a batch to itself.
    pub(crate) fn new(batch_rows: usize, exact: bool) -> Limits {
        Limits {
            decode_rows: batch_rows,
            prefill_rows: if exact { 0 } else { batch_rows },
            guess_rows: batch_rows.min(GUESS_ROWS_MAX as usize),
        }
    }
}

impl<W: Rows> Schedule<W> {
    /// Nothing is queued yet.
    pub(crate) fn new(limits: Limits) -> Schedule<W> {
        Schedule {
            decode: VecDeque::new(),
            prefill: VecDeque::new(),
            limits,
            decoded_last: false,
            had_turn: HashSet::new(),
        }
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

    /// The next batch; empty only when nothing is queued. `joins`: how many of so many rows of guesses that follow one another go together.
    pub(crate) fn next_batch(&mut self, joins: impl FnOnce(usize) -> usize) -> Vec<W> {
        self.decoded_last = !self.decode.is_empty() && (self.prefill.is_empty() || !self.decoded_last);
        let mut batch = if self.decoded_last { self.generated_rows(joins) } else { self.prompt_rows() };
        // In the order of sequences: then rows come out as they went in. Those of one stay in their order.
        batch.sort_by_key(Rows::sequence);
        batch
    }

    /// What has waited longest of a sequence that had no turn last time; if it is a single row, with the next rows of others that are. If it is
    /// alone, with the guesses that follow it.
    fn generated_rows(&mut self, joins: impl FnOnce(usize) -> usize) -> Vec<W> {
        let waits = |work: &W| !self.had_turn.contains(&work.sequence());
        let first = self.decode.iter().position(waits).unwrap_or(0);
        let mut batch: Vec<W> = self.decode.remove(first).into_iter().collect();
        let mut seen: HashSet<i32> = batch.iter().map(Rows::sequence).collect();
        let mut at = 0;
        while batch.len() < self.limits.decode_rows && batch[0].rows() == 1 {
            let Some(work) = self.decode.get(at) else { break };
            // What follows of a sequence must not overtake.
            let is_next = seen.insert(work.sequence());
            if is_next && work.rows() == 1 {
                batch.extend(self.decode.remove(at));
            } else {
                at += 1;
            }
        }
        self.had_turn = batch.iter().map(Rows::sequence).collect();
        if let [first] = &batch[..]
            && self.decode.iter().all(|work| work.sequence() == first.sequence())
        {
            let waiting = first.rows() + self.followers(first).map(Rows::rows).sum::<usize>();
            if waiting > first.rows() {
                self.join(&mut batch, joins(waiting.min(self.limits.guess_rows)));
            }
        }
        batch
    }

    /// What waits of a sequence and follows what is computed next of it, as far as it does without a gap.
    fn followers<'a>(&'a self, first: &'a W) -> impl Iterator<Item = &'a W> {
        let of_it = self.decode.iter().filter(|work| work.sequence() == first.sequence());
        of_it.scan(first, |last, work| {
            let follows = work.follows(last);
            *last = work;
            follows.then_some(work)
        })
    }

    /// Adds to a batch what follows it, up to so many rows.
    fn join(&mut self, batch: &mut Vec<W>, rows_max: usize) {
        let mut rows = batch[0].rows();
        let fits = |work: &&W| {
            rows += work.rows();
            rows <= rows_max
        };
        let count = self.followers(&batch[0]).take_while(fits).count();
        let sequence = batch[0].sequence();
        for _ in 0..count {
            let next = self.decode.iter().position(|work| work.sequence() == sequence);
            batch.extend(next.and_then(|at| self.decode.remove(at)));
        }
    }

    /// Pieces of one length of different sequences, as far as they come one after the other.
    fn prompt_rows(&mut self) -> Vec<W> {
        let (queue, rows_max) = (&mut self.prefill, self.limits.prefill_rows);
        let mut batch: Vec<W> = queue.pop_front().into_iter().collect();
        let fits = |batch: &[W], work: &W| {
            let is_alike = batch.iter().all(|w| w.sequence() != work.sequence() && w.rows() == work.rows());
            is_alike && (batch.len() + 1) * work.rows() <= rows_max
        };
        while queue.front().is_some_and(|work| fits(&batch, work)) {
            batch.extend(queue.pop_front());
        }
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
        fn follows(&self, before: &W) -> bool {
            // Guesses are marked by nothing here: all that is generated is one.
            self.0 == before.0 && !self.2 && !before.2
        }
    }

    fn queue(works: &[W]) -> Schedule<W> {
        let mut schedule = Schedule::new(Limits { decode_rows: 7, prefill_rows: 16, guess_rows: 6 });
        works.iter().for_each(|&w| schedule.push(w));
        schedule
    }

    #[test]
    fn rows_of_prompts_and_answers_never_mix_and_neither_side_starves() {
        let mut schedule = queue(&[W(0, 12, true), W(0, 12, true), W(2, 1, false), W(1, 1, false)]);
        assert_eq!(schedule.next_batch(|_| 1), [W(1, 1, false), W(2, 1, false)]);
        schedule.push(W(1, 1, false));
        assert_eq!(schedule.next_batch(|_| 1), [W(0, 12, true)]);
        assert_eq!(schedule.next_batch(|_| 1), [W(1, 1, false)]);
        assert_eq!(schedule.next_batch(|_| 1), [W(0, 12, true)]);
        assert!(schedule.is_empty());
    }

    #[test]
    fn prompts_of_one_length_are_computed_together_as_far_as_they_fit() {
        let works = [W(3, 5, true), W(1, 5, true), W(0, 5, true), W(2, 5, true), W(4, 4, true), W(4, 4, true)];
        let mut schedule = queue(&works);
        assert_eq!(schedule.next_batch(|_| 1), [W(0, 5, true), W(1, 5, true), W(3, 5, true)]);
        for alone in [W(2, 5, true), W(4, 4, true), W(4, 4, true)] {
            assert_eq!(schedule.next_batch(|_| 1), [alone]);
        }
        let mut exact = Schedule::new(Limits::new(16, true));
        works.into_iter().for_each(|work| exact.push(work));
        assert_eq!(exact.next_batch(|_| 1), [W(3, 5, true)]);
    }

    #[test]
    fn batches_of_generated_rows_have_the_size_that_was_asked_for_at_most() {
        let works: Vec<W> = (0..20).map(|i| W(i, 1, false)).collect();
        let mut schedule = queue(&works);
        let sizes: Vec<usize> =
            std::iter::from_fn(|| Some(schedule.next_batch(|_| 1).len()).filter(|&n| n > 0)).collect();
        assert_eq!(sizes, [7, 7, 6]);
    }

    #[test]
    fn a_sequence_with_many_rows_ahead_lets_the_others_have_their_turn() {
        let mut schedule = queue(&[W(0, 4, false), W(0, 4, false), W(0, 1, false), W(1, 1, false), W(2, 1, false)]);
        assert_eq!(schedule.next_batch(|_| 1), [W(0, 4, false)]);
        assert_eq!(schedule.next_batch(|_| 1), [W(1, 1, false), W(2, 1, false)]);
        schedule.push(W(1, 1, false));
        assert_eq!(schedule.next_batch(|_| 1), [W(0, 4, false)]);
        // A single row ahead goes with the others', and none of a sequence goes before an earlier one.
        assert_eq!(schedule.next_batch(|_| 1), [W(0, 1, false), W(1, 1, false)]);
        schedule.push(W(0, 2, false));
        schedule.push(W(0, 1, false));
        schedule.push(W(1, 1, false));
        assert_eq!(schedule.next_batch(|_| 1), [W(0, 2, false)]);
        assert_eq!(schedule.next_batch(|_| 1), [W(0, 1, false), W(1, 1, false)]);
        assert!(schedule.is_empty());
    }

    #[test]
    fn two_pieces_of_one_sequence_are_never_in_one_batch() {
        let mut schedule = queue(&[W(0, 1, false), W(0, 1, false)]);
        assert_eq!(schedule.next_batch(|_| 1).len(), 1);
        assert_eq!(schedule.next_batch(|_| 1).len(), 1);
    }

    #[test]
    fn guesses_that_wait_behind_one_another_go_together_as_far_as_there_is_room_and_only_if_nobody_else_waits() {
        let mut schedule = queue(&[W(0, 1, false), W(0, 2, false), W(0, 1, false), W(0, 3, false), W(0, 1, false)]);
        let all = |waiting: usize| {
            assert_eq!(waiting, 6);
            waiting
        };
        assert_eq!(schedule.next_batch(all), [W(0, 1, false), W(0, 2, false), W(0, 1, false)]);
        assert_eq!(schedule.next_batch(|_| 1), [W(0, 3, false)]);
        schedule.push(W(0, 1, false));
        schedule.push(W(1, 1, false));
        schedule.push(W(1, 1, false));
        assert_eq!(schedule.next_batch(|all| all), [W(0, 1, false), W(1, 1, false)]);
        // Both have had a turn, and one waits as long as the other.
        assert_eq!(schedule.next_batch(|all| all), [W(0, 1, false), W(1, 1, false)]);
        schedule.push(W(0, 1, false));
        assert_eq!(schedule.next_batch(|_| unreachable!("nothing follows")), [W(0, 1, false)]);
        // Rows of others wait that do not go with these.
        let others = |_| -> usize { unreachable!("another sequence waits") };
        [W(1, 2, false), W(0, 1, false), W(1, 1, false)].into_iter().for_each(|work| schedule.push(work));
        assert_eq!(schedule.next_batch(others), [W(1, 2, false)]);
        assert_eq!(schedule.next_batch(others), [W(0, 1, false), W(1, 1, false)]);
        [W(0, 1, false), W(0, 1, false), W(1, 2, false), W(0, 1, false)]
            .into_iter()
            .for_each(|work| schedule.push(work));
        assert_eq!(schedule.next_batch(others), [W(0, 1, false)]);
        assert_eq!(schedule.next_batch(others), [W(1, 2, false)]);
        assert_eq!(schedule.next_batch(|all| all), [W(0, 1, false), W(0, 1, false)]);
        assert!(schedule.is_empty());
    }
}
