//! The frames of a session that are on their way around the ring, and what the times of their answers tell.
//!
//! A frame that nothing of its session goes before tells how long the way is, unless it has waited behind rows that were in vain: of a link
//! these are not taken back. Frames that were sent sooner after one another than their answers came have waited for whatever is slowest, and
//! tell how soon rows can follow one another there: a stage, that others may use as well, or a link, of whose rate nothing else is known here.

use std::collections::VecDeque;

/// Answers that come so many times as slowly as their frames were sent have waited for each other on the way, and were not merely late.
const WAITED: u64 = 2;

#[derive(Debug, Clone, Copy)]
struct Sent {
    position: u32,
    rows: usize,
    at_us: u64,
    /// Nothing of its session was on its way but what was in vain, which it may have waited for, us.
    alone: Option<u64>,
}

/// See the module's page.
#[derive(Debug, Default)]
pub(super) struct Train {
    under_way: VecDeque<Sent>,
    /// The newest that has come around: when it was sent, and when it came, us.
    before: Option<(u64, u64)>,
    /// Until then all rows that were sent keep whatever is slowest busy, us.
    busy_until_us: u64,
}

/// What an answer tells.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Came {
    /// Rows of its frame.
    pub(super) rows: usize,
    pub(super) alone: Option<Alone>,
    pub(super) gap: Option<Gap>,
}

/// How long a frame was on its way that no other of its session was to hold up.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Alone {
    pub(super) us: u64,
    /// So much of it, at most, it has waited for rows that were in vain.
    pub(super) waited_us: u64,
}

/// How soon an answer came after the one before it, whose frame was still on its way when this one's was sent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Gap {
    /// For each row, us.
    pub(super) row_us: f64,
    /// No sooner was possible.
    pub(super) has_waited: bool,
}

impl Train {
    /// A frame leaves, another of which could follow in `spacing_us`. `is_alone`: nothing of its session is on its way that is not in vain.
    pub(super) fn leaves(&mut self, position: u32, rows: usize, is_alone: bool, spacing_us: u64, now_us: u64) {
        let alone = is_alone.then(|| self.busy_until_us.saturating_sub(now_us));
        self.busy_until_us = self.busy_until_us.max(now_us) + spacing_us;
        self.under_way.push_back(Sent { position, rows, at_us: now_us, alone });
    }

    /// Others were computed with a frame, which took longer than it would have.
    pub(super) fn is_held_up(&mut self, position: u32) {
        self.under_way.iter_mut().filter(|sent| sent.position == position).for_each(|sent| sent.alone = None);
    }

    /// A frame has come around. `None`: it is not one of these.
    pub(super) fn comes(&mut self, position: u32, now_us: u64) -> Option<Came> {
        let Sent { rows, at_us, alone, .. } = self.under_way.pop_front_if(|sent| sent.position == position)?;
        let before = self.before.replace((at_us, now_us)).filter(|&(_, came_us)| at_us < came_us);
        let gap = before.map(|(sent_us, came_us)| {
            let gap_us = now_us.saturating_sub(came_us);
            Gap { row_us: gap_us as f64 / rows as f64, has_waited: gap_us > WAITED * at_us.saturating_sub(sent_us) }
        });
        let alone = alone.map(|waited_us| Alone { us: now_us.saturating_sub(at_us), waited_us });
        Some(Came { rows, alone, gap })
    }

    /// What is on its way is in vain.
    pub(super) fn stop(&mut self) {
        *self = Train { busy_until_us: self.busy_until_us, ..Train::default() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_that_wait_for_each_other_on_the_way_tell_how_soon_rows_can_follow() {
        let mut train = Train::default();
        train.leaves(10, 1, true, 400, 1000);
        train.leaves(11, 2, false, 800, 1100);
        train.leaves(13, 1, false, 400, 1500);
        let came = |rows, alone_us: Option<u64>, gap: Option<(f64, bool)>| {
            let gap = gap.map(|(row_us, has_waited)| Gap { row_us, has_waited });
            Some(Came { rows, alone: alone_us.map(|us| Alone { us, waited_us: 0 }), gap })
        };
        assert_eq!(train.comes(10, 5000), came(1, Some(4000), None));
        assert_eq!(train.comes(11, 5800), came(2, None, Some((400.0, true))));
        // No later after one another than they were sent.
        assert_eq!(train.comes(13, 6200), came(1, None, Some((400.0, false))));
        // Sent when nothing was on its way.
        train.leaves(14, 1, true, 400, 7000);
        assert_eq!(train.comes(14, 9000), came(1, Some(2000), None));
    }

    #[test]
    fn what_was_held_up_or_is_in_vain_tells_nothing_and_neither_does_what_is_not_of_it() {
        let mut train = Train::default();
        train.leaves(10, 1, true, 400, 1000);
        train.is_held_up(10);
        assert_eq!(train.comes(9, 4000), None);
        assert_eq!(train.comes(10, 5000).and_then(|came| came.alone), None);
        (11..21).for_each(|position| train.leaves(position, 1, false, 400, 5100));
        train.stop();
        assert_eq!(train.comes(11, 7000), None);
        // Ten rows in vain are done 4 ms after they were sent.
        train.leaves(11, 1, true, 400, 7100);
        assert_eq!(train.comes(11, 9900).and_then(|came| came.alone), Some(Alone { us: 2800, waited_us: 2000 }));
    }
}
