//! Which sequence of the KV cache belongs to whom: admission, and the prefix cache.
//!
//! A *slot* is one sequence of llama.cpp with its own KV stream, so no session's steps walk over another's cells. A
//! finished session leaves its tokens in its slot until the slot is needed; a new session takes over the slot that shares
//! the longest prefix with its prompt, or copies the prefix from a slot that is still in use. Pure bookkeeping: the caller
//! carries out [`Admitted::kv`] on the real cache.

use murmur_protocol::sampling::Token;

/// llama.cpp copies all cells of a stream, used or not. Copying so many is taken to cost less than computing one token: on
/// a CPU that holds for models of some hundred million parameters and more, on a GPU by far.
const CELLS_COPIED_PER_TOKEN: u32 = 256;

/// What the caller must do to the KV cache for an admission, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum KvOp {
    /// Forget the positions from `from` on.
    Truncate {
        /// Which sequence.
        sequence: i32,
        /// First position to forget.
        from: u32,
    },
    /// Make `to` (empty) a copy of `from`.
    Copy {
        /// Source.
        from: i32,
        /// Destination.
        to: i32,
    },
}

/// A session got a slot.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Admitted {
    /// Its sequence id.
    pub(crate) sequence: i32,
    /// Leading tokens that are in the cache already.
    pub(crate) cached_tokens: u32,
    /// What to do to the cache first.
    pub(crate) kv: Vec<KvOp>,
}

/// Why a session got none.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum NotAdmitted {
    /// Not now.
    Busy,
    /// Never: more cells than the cache has.
    TooLarge,
}

#[derive(Default)]
struct Slot {
    tokens: Vec<Token>,
    /// Leading tokens computed as prompt rows in whole chunks; only these are reusable in exact mode.
    aligned: u32,
    session: Option<u64>,
    used_at: u64,
}

fn common(a: &[Token], b: &[Token]) -> u32 {
    a.iter().zip(b).take_while(|(a, b)| a == b).count() as u32
}

/// The slots of one stage.
pub(crate) struct Slots {
    /// Cells of each slot.
    cells: u32,
    chunk_rows: u32,
    exact: bool,
    slots: Vec<Slot>,
    clock: u64,
}

impl Slots {
    /// `sequences` slots of `cells` each. In exact mode only whole chunks of prompt rows are reused, so that a cached
    /// prefix is bit-equal to a computed one.
    pub(crate) fn new(cells: u32, sequences: u32, chunk_rows: u32, exact: bool) -> Slots {
        let slots = (0..sequences).map(|_| Slot::default()).collect();
        Slots { cells, chunk_rows, exact, slots, clock: 0 }
    }

    /// Cells of each slot.
    pub(crate) fn cells(&self) -> u32 {
        self.cells
    }

    fn reusable(&self, slot: &Slot, prompt: &[Token]) -> u32 {
        // The last token is always computed: its logits are what the session wants.
        let common = common(&slot.tokens, prompt).min(prompt.len().saturating_sub(1) as u32);
        if self.exact { common.min(slot.aligned) / self.chunk_rows * self.chunk_rows } else { common }
    }

    /// Finds a slot for a session that needs `reserve` cells and begins with `prompt`.
    pub(crate) fn admit(&mut self, session: u64, prompt: &[Token], reserve: u32) -> Result<Admitted, NotAdmitted> {
        let reserve = reserve.max(prompt.len() as u32);
        if reserve > self.cells {
            return Err(NotAdmitted::TooLarge);
        }
        let free: Vec<usize> = (0..self.slots.len()).filter(|&i| self.slots[i].session.is_none()).collect();
        if free.is_empty() {
            return Err(NotAdmitted::Busy);
        }
        self.clock += 1;
        let best = |this: &Slots, among: &mut dyn Iterator<Item = usize>| {
            among.map(|i| (this.reusable(&this.slots[i], prompt), i)).max_by_key(|&(n, i)| (n, std::cmp::Reverse(i)))
        };
        let (idle_match, idle) = best(self, &mut free.iter().copied()).unwrap_or_default();
        let busy_slots: Vec<usize> = (0..self.slots.len()).filter(|i| !free.contains(i)).collect();
        let (busy_match, busy) = best(self, &mut busy_slots.into_iter()).unwrap_or_default();

        let mut kv = Vec::new();
        let (source, matched) = if busy_match > idle_match { (busy, busy_match) } else { (idle, idle_match) };
        // Taking over a slot forgets what lies behind the match: right for the next turn of a conversation, wrong for a
        // stranger that shares a system prompt. Then the prefix is copied, as from a slot in use, and both stay.
        let most_of_it = 2 * matched as usize >= self.slots[source].tokens.len();
        let is_idle = self.slots[source].session.is_none();
        let takes_over = matched > 0 && is_idle && (most_of_it || free.len() == 1);
        let target = if takes_over { source } else { self.least_valuable(&free, source) };
        let copy_pays = matched >= self.cells / CELLS_COPIED_PER_TOKEN;
        let matched = if target == source || copy_pays { matched } else { 0 };
        let keep = if target == source { matched } else { 0 };
        kv.push(KvOp::Truncate { sequence: target as i32, from: keep });
        self.cut(target, keep);
        if matched > keep {
            kv.push(KvOp::Copy { from: source as i32, to: target as i32 });
            kv.push(KvOp::Truncate { sequence: target as i32, from: matched });
            let tokens = self.slots[source].tokens[..matched as usize].to_vec();
            let aligned = self.slots[source].aligned.min(matched);
            (self.slots[target].tokens, self.slots[target].aligned) = (tokens, aligned);
        }
        if matched > 0 {
            // It was of use: it is as young as what it served.
            self.slots[source].used_at = self.clock;
        }
        let slot = &mut self.slots[target];
        (slot.session, slot.used_at) = (Some(session), self.clock);
        Ok(Admitted { sequence: target as i32, cached_tokens: matched, kv })
    }

    /// The idle slot to overwrite: an empty one, else the one used longest ago, `source` last.
    fn least_valuable(&self, free: &[usize], source: usize) -> usize {
        let key = |&&i: &&usize| (i == source, !self.slots[i].tokens.is_empty(), self.slots[i].used_at);
        free.iter().min_by_key(key).copied().unwrap_or(0)
    }

    fn cut(&mut self, slot: usize, length: u32) {
        let slot = &mut self.slots[slot];
        slot.tokens.truncate(length as usize);
        slot.aligned = slot.aligned.min(length);
    }

    /// Notes that the positions from `from` on were forgotten.
    pub(crate) fn truncated(&mut self, sequence: i32, from: u32) {
        self.cut(sequence as usize, from);
    }

    /// Notes that rows were computed at the end of a sequence.
    pub(crate) fn extended(&mut self, sequence: i32, tokens: &[Token], prefill: bool) {
        let chunk = self.chunk_rows;
        let slot = &mut self.slots[sequence as usize];
        let before = slot.tokens.len() as u32;
        slot.tokens.extend_from_slice(tokens);
        if prefill && slot.aligned == before && tokens.len() as u32 == chunk {
            slot.aligned += chunk;
        }
    }

    /// Tokens in a sequence.
    pub(crate) fn length(&self, sequence: i32) -> u32 {
        self.slots[sequence as usize].tokens.len() as u32
    }

    /// How many of a sequence's first tokens are those given.
    pub(crate) fn common(&self, sequence: i32, tokens: &[Token]) -> u32 {
        common(&self.slots[sequence as usize].tokens, tokens)
    }

    /// `count` tokens of a sequence; `None`: it has fewer.
    pub(crate) fn tokens(&self, sequence: i32, position: u32, count: u32) -> Option<&[Token]> {
        self.slots[sequence as usize].tokens.get(position as usize..)?.get(..count as usize)
    }

    /// Ends a session; its tokens stay for reuse unless `forget`. True when the cache must forget them as well.
    pub(crate) fn release(&mut self, sequence: i32, forget: bool) -> bool {
        self.clock += 1;
        let slot = &mut self.slots[sequence as usize];
        (slot.session, slot.used_at) = (None, self.clock);
        if forget {
            self.cut(sequence as usize, 0);
        }
        forget
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_finished_prompt_is_found_again_and_its_last_token_computed_anew() {
        let mut slots = Slots::new(100, 2, 4, false);
        let first = slots.admit(1, &[1, 2, 3, 4, 5], 20).unwrap();
        slots.extended(first.sequence, &[1, 2, 3, 4, 5, 6], true);
        slots.release(first.sequence, false);
        let second = slots.admit(2, &[1, 2, 3, 4, 5, 6], 20).unwrap();
        assert_eq!((second.sequence, second.cached_tokens), (first.sequence, 5));
        assert_eq!(second.kv, [KvOp::Truncate { sequence: first.sequence, from: 5 }]);
    }

    #[test]
    fn a_prefix_of_a_running_session_is_copied() {
        let mut slots = Slots::new(100, 2, 4, false);
        let first = slots.admit(1, &[1, 2, 3, 4], 20).unwrap();
        slots.extended(first.sequence, &[1, 2, 3, 4], true);
        let second = slots.admit(2, &[1, 2, 9], 20).unwrap();
        assert_eq!(second.cached_tokens, 2);
        assert!(second.kv.contains(&KvOp::Copy { from: first.sequence, to: second.sequence }));
    }

    #[test]
    fn two_conversations_with_one_system_prompt_keep_a_slot_each() {
        let mut slots = Slots::new(1000, 4, 4, false);
        let conversation = |own: i32| -> Vec<Token> { (0..10).chain((0..30).map(|i| own * 100 + i)).collect() };
        for round in 0..3 {
            for own in [1, 2] {
                let prompt = conversation(own);
                let admitted = slots.admit(round * 2 + own as u64, &prompt, 60).unwrap();
                let expected = match (round, own) {
                    (0, 1) => 0,
                    (0, _) => 10,
                    _ => prompt.len() as u32 - 1,
                };
                assert_eq!(admitted.cached_tokens, expected, "round {round}, conversation {own}");
                slots.extended(admitted.sequence, &prompt[admitted.cached_tokens as usize..], true);
                slots.release(admitted.sequence, false);
            }
        }
    }

    #[test]
    fn a_prefix_that_costs_less_to_compute_than_to_copy_is_computed() {
        let mut slots = Slots::new(8 * CELLS_COPIED_PER_TOKEN, 2, 4, false);
        let first = slots.admit(1, &(0..20).collect::<Vec<_>>(), 20).unwrap();
        slots.extended(first.sequence, &(0..20).collect::<Vec<_>>(), true);
        for (common, cached) in [(7, 0), (8, 8)] {
            let prompt: Vec<Token> = (0..common).chain([99]).collect();
            let other = slots.admit(2, &prompt, 20).unwrap();
            assert_eq!(other.cached_tokens, cached);
            slots.release(other.sequence, true);
        }
    }

    #[test]
    fn exact_mode_reuses_whole_prompt_chunks_only() {
        let mut slots = Slots::new(100, 2, 4, true);
        let first = slots.admit(1, &[1, 2, 3, 4, 5, 6], 20).unwrap();
        slots.extended(first.sequence, &[1, 2, 3, 4], true);
        slots.extended(first.sequence, &[5, 6], true);
        slots.extended(first.sequence, &[7, 8], false);
        slots.release(first.sequence, false);
        let second = slots.admit(2, &[1, 2, 3, 4, 5, 6, 7, 8, 9], 20).unwrap();
        assert_eq!(second.cached_tokens, 4);
    }

    #[test]
    fn more_than_a_slot_holds_is_refused_at_once_and_without_a_free_slot_it_says_busy() {
        let mut slots = Slots::new(100, 4, 4, false);
        assert_eq!(slots.admit(1, &[1], 101), Err(NotAdmitted::TooLarge));
        for session in 0..4 {
            slots.admit(session, &[1], 100).unwrap();
        }
        assert_eq!(slots.admit(4, &[2], 1), Err(NotAdmitted::Busy));
    }

    proptest! {
        #[test]
        fn a_slot_holds_what_was_admitted_to_it_and_never_more_than_its_cells(steps in proptest::collection::vec((0u8..3, 1usize..30, 0u32..30, 0i32..3), 1..200)) {
            let mut slots = Slots::new(64, 4, 8, false);
            let mut live: Vec<(u64, i32)> = Vec::new();
            for (session, (what, length, extra, flavour)) in steps.into_iter().enumerate() {
                if what == 0 && !live.is_empty() {
                    let (_, sequence) = live.remove(length % live.len());
                    slots.release(sequence, false);
                    continue;
                }
                let prompt: Vec<Token> = (0..length as i32).map(|i| if i < 5 { i } else { i * flavour }).collect();
                let reserve = length as u32 + extra;
                if let Ok(admitted) = slots.admit(session as u64, &prompt, reserve) {
                    prop_assert!(live.iter().all(|l| l.1 != admitted.sequence));
                    prop_assert!((admitted.cached_tokens as usize) < prompt.len());
                    let held = &slots.slots[admitted.sequence as usize].tokens;
                    prop_assert_eq!(held.as_slice(), &prompt[..admitted.cached_tokens as usize]);
                    slots.extended(admitted.sequence, &prompt[admitted.cached_tokens as usize..], true);
                    live.push((session as u64, admitted.sequence));
                }
                prop_assert!(slots.slots.iter().all(|slot| slot.tokens.len() <= 64));
            }
        }
    }
}
