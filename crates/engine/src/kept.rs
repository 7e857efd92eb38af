//! What a stage has sent on: the hidden states of its sequences, by position, so that a stage behind it that was lost can be
//! fed again without anything being computed again here. They stay as long as what the KV cache has of the sequence: who goes on
//! with a prefix that is kept there has its rows as well.
//!
//! Rows lie in blocks. Full ones go to a file without a name when memory for them is used up. When there is no room, sequences
//! that nobody uses make some. When that does not help, or the file fails, a sequence is not kept any more: then its rows are
//! computed again when they are needed.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::Path,
};

use murmur_protocol::stage::Keep;

/// Rows of a block. Beyond the limit of memory each sequence has one block that is not full.
const BLOCK_ROWS: usize = 16;

/// Hidden states of the sequences of one stage.
pub(crate) struct Kept {
    /// Values of a row.
    width: usize,
    memory_bytes: u64,
    memory_bytes_max: u64,
    spill: Spill,
    /// `None`: not kept any more.
    sequences: HashMap<i32, Option<Rows>>,
    /// Those that no session uses.
    idle: HashSet<i32>,
}

/// Rows `from..end` of one sequence.
struct Rows {
    from: u32,
    end: u32,
    /// All but the last are full.
    blocks: Vec<Block>,
}

enum Block {
    Memory(Vec<f32>),
    File(Place),
}

impl Rows {
    /// Block and row in it of a position.
    fn at(&self, position: u32) -> (usize, usize) {
        let row = (position - self.from) as usize;
        (row / BLOCK_ROWS, row % BLOCK_ROWS)
    }
}

impl Kept {
    /// Nothing is kept yet. `width`: values of a row; `folder`: where the file goes.
    pub(crate) fn new(width: usize, keep: Keep, folder: &Path) -> Kept {
        let folder = folder.to_owned();
        Kept::with_file(width, keep, Box::new(move || tempfile::tempfile_in(&folder)))
    }

    fn with_file(width: usize, keep: Keep, make: MakeFile) -> Kept {
        let block_bytes = (BLOCK_ROWS * width * size_of::<f32>()).max(1) as u64;
        let places_max = u32::try_from(keep.file_bytes / block_bytes).unwrap_or(u32::MAX);
        let spill = Spill { make, file: None, block_bytes, places: 0, places_max, free: Vec::new() };
        Kept {
            width,
            memory_bytes: 0,
            memory_bytes_max: keep.memory_bytes,
            spill,
            sequences: HashMap::new(),
            idle: HashSet::new(),
        }
    }

    /// Rows of `sequence` from `position` on, which takes the place of what was there: `hidden` has `[rows, width]`.
    pub(crate) fn append(&mut self, sequence: i32, position: u32, hidden: &[f32]) {
        self.idle.remove(&sequence);
        self.truncate(sequence, position);
        let rows = self.sequences.entry(sequence);
        let rows = rows.or_insert(Some(Rows { from: position, end: position, blocks: Vec::new() }));
        let Some(mut rows) = rows.take() else { return };
        // Given back below, unless there is no room.
        if rows.end == position && self.extend(&mut rows, hidden).is_ok() {
            self.sequences.insert(sequence, Some(rows));
        } else {
            self.free(rows.blocks);
        }
    }

    fn extend(&mut self, rows: &mut Rows, hidden: &[f32]) -> io::Result<()> {
        for row in hidden.chunks_exact(self.width) {
            let (block, at) = rows.at(rows.end);
            if at == 0 {
                rows.blocks.push(Block::Memory(Vec::with_capacity(BLOCK_ROWS * self.width)));
                self.memory_bytes += self.spill.block_bytes;
            }
            let block = &mut rows.blocks[block];
            if let Block::Memory(values) = block {
                values.extend_from_slice(row);
            }
            rows.end += 1;
            while at + 1 == BLOCK_ROWS
                && self.memory_bytes > self.memory_bytes_max
                && let Block::Memory(values) = block
            {
                match self.spill.write(values) {
                    Ok(place) => {
                        *block = Block::File(place);
                        self.memory_bytes -= self.spill.block_bytes;
                    }
                    Err(_) if self.forget_idle() => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }

    /// How many of the newest of the first `length` rows of a sequence are kept.
    pub(crate) fn count(&self, sequence: i32, length: u32) -> u32 {
        let rows = self.sequences.get(&sequence).and_then(Option::as_ref).filter(|rows| rows.end >= length);
        rows.map_or(0, |rows| length.saturating_sub(rows.from))
    }

    /// The rows `position..position + count` of a sequence, `[count, width]`; `None`: not all of them are kept.
    pub(crate) fn read(&self, sequence: i32, position: u32, count: u32) -> Option<Vec<f32>> {
        let rows = self.sequences.get(&sequence)?.as_ref()?;
        let end = position.checked_add(count).filter(|&end| rows.from <= position && end <= rows.end)?;
        let mut hidden = Vec::with_capacity(count as usize * self.width);
        let mut next = position;
        while next < end {
            let (block, at) = rows.at(next);
            let until = BLOCK_ROWS.min(at + (end - next) as usize);
            let values = at * self.width..until * self.width;
            match &rows.blocks[block] {
                Block::Memory(block) => hidden.extend_from_slice(&block[values]),
                Block::File(place) => hidden.extend_from_slice(&self.spill.read(*place).ok()?[values]),
            }
            next += (until - at) as u32;
        }
        Some(hidden)
    }

    /// Forgets the rows of a sequence from `end` on.
    pub(crate) fn truncate(&mut self, sequence: i32, end: u32) {
        let Some(kept) = self.sequences.get_mut(&sequence) else { return };
        let Some(mut rows) = kept.take_if(|rows| rows.end > end) else {
            if end == 0 {
                // What begins anew is kept anew.
                self.sequences.remove(&sequence);
            }
            return;
        };
        if end <= rows.from {
            self.free(rows.blocks);
            self.sequences.remove(&sequence);
            return;
        }
        rows.end = end;
        let (block, at) = rows.at(end);
        let beyond = rows.blocks.split_off(block + usize::from(at > 0));
        self.free(beyond);
        // What is not full has to be in memory.
        let is_intact = at == 0 || self.fetch(&mut rows.blocks[block], at).is_ok();
        match is_intact {
            true => drop(self.sequences.insert(sequence, Some(rows))),
            false => self.free(rows.blocks),
        }
    }

    /// Cuts a block to its first rows, in memory.
    fn fetch(&mut self, block: &mut Block, rows: usize) -> io::Result<()> {
        match block {
            Block::Memory(values) => values.truncate(rows * self.width),
            Block::File(place) => {
                let mut values = self.spill.read(*place)?;
                values.truncate(rows * self.width);
                self.memory_bytes += self.spill.block_bytes;
                let in_file = std::mem::replace(block, Block::Memory(values));
                self.free(vec![in_file]);
            }
        }
        Ok(())
    }

    /// A session begins on the first `length` rows of a sequence.
    pub(crate) fn claim(&mut self, sequence: i32, length: u32) {
        self.idle.remove(&sequence);
        self.truncate(sequence, length);
    }

    /// No session uses a sequence any more: what is kept of it stays while there is room.
    pub(crate) fn release(&mut self, sequence: i32) {
        self.idle.insert(sequence);
    }

    /// Makes the first `length` rows of `to`, which is empty, those of `from`, as far as they are kept.
    pub(crate) fn copy(&mut self, from: i32, to: i32, length: u32) {
        let count = self.count(from, length);
        if let Some(hidden) = self.read(from, length - count, count) {
            self.append(to, length - count, &hidden);
        }
    }

    /// Forgets the sequences that nobody uses. True when there were some.
    fn forget_idle(&mut self) -> bool {
        let idle: Vec<Block> = (self.idle.drain())
            .filter_map(|sequence| self.sequences.remove(&sequence).flatten())
            .flat_map(|rows| rows.blocks)
            .collect();
        let is_some = !idle.is_empty();
        self.free(idle);
        is_some
    }

    fn free(&mut self, blocks: Vec<Block>) {
        for block in blocks {
            match block {
                Block::Memory(_) => self.memory_bytes -= self.spill.block_bytes,
                Block::File(place) => self.spill.free(place),
            }
        }
    }
}

/// Number of a block in the file.
type Place = u32;
/// Makes the file.
type MakeFile = Box<dyn Fn() -> io::Result<File> + Send>;

/// The file with the blocks for which memory has no room.
struct Spill {
    make: MakeFile,
    /// There while a block is in it.
    file: Option<File>,
    block_bytes: u64,
    /// Places in the file.
    places: u32,
    places_max: u32,
    /// Those of them that are free.
    free: Vec<Place>,
}

impl Spill {
    fn write(&mut self, values: &[f32]) -> io::Result<Place> {
        let place = match self.free.pop() {
            Some(place) => place,
            None if self.places == self.places_max => return Err(io::ErrorKind::StorageFull.into()),
            None => {
                self.places += 1;
                self.places - 1
            }
        };
        let written = self.write_at(place, values);
        if written.is_err() {
            self.free(place);
        }
        written.map(|()| place)
    }

    fn write_at(&mut self, place: Place, values: &[f32]) -> io::Result<()> {
        let file = match self.file.take() {
            Some(file) => file,
            None => (self.make)()?,
        };
        self.file.insert(file).write_all_at(bytemuck::cast_slice(values), u64::from(place) * self.block_bytes)
    }

    fn read(&self, place: Place) -> io::Result<Vec<f32>> {
        let file = self.file.as_ref().ok_or(io::ErrorKind::NotFound)?;
        let mut values = vec![0f32; self.block_bytes as usize / size_of::<f32>()];
        file.read_exact_at(bytemuck::cast_slice_mut(&mut values), u64::from(place) * self.block_bytes)?;
        Ok(values)
    }

    fn free(&mut self, place: Place) {
        self.free.push(place);
        if self.free.len() == self.places as usize {
            (self.file, self.places) = (None, 0);
            self.free.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const WIDTH: usize = 3;
    const BLOCK_BYTES: u64 = (BLOCK_ROWS * WIDTH * 4) as u64;

    fn keep(memory_blocks: u64, file_blocks: u64) -> Keep {
        Keep { memory_bytes: memory_blocks * BLOCK_BYTES, file_bytes: file_blocks * BLOCK_BYTES }
    }

    fn kept(memory_blocks: u64, file_blocks: u64) -> Kept {
        Kept::with_file(WIDTH, keep(memory_blocks, file_blocks), Box::new(tempfile::tempfile))
    }

    /// Rows whose values say what they are.
    fn rows(salt: u32, positions: std::ops::Range<u32>) -> Vec<f32> {
        positions.flat_map(|position| [salt as f32, position as f32, 0.5]).collect()
    }

    fn is_empty(kept: &Kept) -> bool {
        kept.memory_bytes == 0 && kept.spill.file.is_none() && kept.spill.places == 0
    }

    #[test]
    fn rows_beyond_memory_go_to_the_file_and_come_back() {
        let mut kept = kept(2, 100);
        kept.append(1, 10, &rows(1, 10..200));
        kept.append(2, 0, &rows(2, 0..50));
        assert!(kept.spill.places > 8 && kept.memory_bytes <= 4 * BLOCK_BYTES);
        assert_eq!((kept.count(1, 200), kept.count(1, 150), kept.count(1, 201), kept.count(2, 50)), (190, 140, 0, 50));
        assert_eq!(kept.read(1, 10, 190), Some(rows(1, 10..200)));
        assert_eq!(kept.read(2, 15, 3), Some(rows(2, 15..18)));
        for (position, count) in [(9, 1), (199, 2), (u32::MAX, 2)] {
            assert_eq!(kept.read(1, position, count), None);
        }
        kept.claim(1, 0);
        kept.claim(2, 0);
        assert!(is_empty(&kept));
    }

    #[test]
    fn a_sequence_for_which_there_is_no_room_is_not_kept_and_leaves_the_others_theirs() {
        let mut kept = kept(1, 2);
        kept.append(1, 0, &rows(1, 0..40));
        for position in 0..100 {
            kept.append(2, position, &rows(2, position..position + 1));
        }
        assert_eq!((kept.count(2, 100), kept.read(2, 99, 1)), (0, None));
        assert_eq!(kept.read(1, 0, 40), Some(rows(1, 0..40)));
        kept.claim(1, 0);
        kept.claim(2, 0);
        assert!(is_empty(&kept));
        // What begins anew is kept again.
        kept.append(2, 0, &rows(2, 0..20));
        assert_eq!(kept.count(2, 20), 20);
    }

    #[test]
    fn sequences_that_nobody_uses_stay_until_their_room_is_needed() {
        let mut kept = kept(1, 4);
        kept.append(1, 0, &rows(1, 0..40));
        kept.release(1);
        kept.copy(1, 2, 20);
        assert_eq!((kept.count(1, 40), kept.count(2, 20)), (40, 20));
        kept.append(2, 20, &rows(3, 20..30));
        assert_eq!(kept.read(2, 0, 30), Some([rows(1, 0..20), rows(3, 20..30)].concat()));
        // Claimed again, it is no longer idle: now the other one has no room.
        kept.claim(1, 30);
        kept.append(2, 30, &rows(3, 30..100));
        assert_eq!((kept.count(1, 30), kept.count(2, 100)), (30, 0));
        kept.claim(2, 0);
        kept.release(1);
        kept.append(2, 0, &rows(2, 0..80));
        assert_eq!((kept.count(1, 30), kept.read(2, 0, 80)), (0, Some(rows(2, 0..80))));
        kept.claim(2, 0);
        assert!(is_empty(&kept));
    }

    #[test]
    fn a_disk_that_is_full_or_a_folder_that_is_gone_costs_what_was_kept_and_nothing_else() {
        let full: MakeFile = Box::new(|| File::options().read(true).write(true).open("/dev/full"));
        for mut kept in [
            Kept::with_file(WIDTH, keep(0, 100), full),
            Kept::new(WIDTH, keep(0, 100), Path::new("/proc/no/such/folder")),
        ] {
            kept.append(1, 0, &rows(1, 0..10));
            assert_eq!(kept.count(1, 10), 10);
            kept.append(1, 10, &rows(1, 10..40));
            assert_eq!(kept.count(1, 40), 0);
            kept.claim(1, 0);
            assert!(is_empty(&kept));
        }
    }

    proptest! {
        #[test]
        fn what_is_kept_is_what_was_put_there_last(
            steps in proptest::collection::vec((0i32..3, 0u32..60, 0u32..40, 0u8..6), 1..80),
            memory_blocks in 0u64..6,
            file_blocks in 0u64..12,
        ) {
            let mut kept = kept(memory_blocks, file_blocks);
            // By sequence: the first position, and the salt of each row from there.
            let mut truth: HashMap<i32, (u32, Vec<u32>)> = HashMap::new();
            for (salt, (sequence, back, count, what)) in (0..).zip(steps) {
                match what {
                    0 => {
                        kept.claim(sequence, 0);
                        truth.remove(&sequence);
                    }
                    1 => if let Some((from, salts)) = truth.get_mut(&sequence) {
                        let end = (*from + salts.len() as u32).saturating_sub(back);
                        kept.truncate(sequence, end);
                        salts.truncate(end.saturating_sub(*from) as usize);
                    },
                    _ => {
                        let (from, salts) = truth.entry(sequence).or_insert((back, Vec::new()));
                        let at = (*from + salts.len() as u32).saturating_sub(back % 5).max(*from);
                        salts.truncate((at - *from) as usize);
                        salts.extend(std::iter::repeat_n(salt, count as usize));
                        kept.append(sequence, at, &rows(salt, at..at + count));
                    }
                }
                for (&sequence, (from, salts)) in &truth {
                    let length = from + salts.len() as u32;
                    let count = kept.count(sequence, length);
                    prop_assert!(count <= salts.len() as u32);
                    let expected: Vec<f32> = (length - count..length)
                        .flat_map(|at| rows(salts[(at - from) as usize], at..at + 1))
                        .collect();
                    prop_assert_eq!(kept.read(sequence, length - count, count).unwrap_or_default(), expected);
                }
                prop_assert!(kept.memory_bytes <= (memory_blocks + 3) * BLOCK_BYTES);
                prop_assert!(u64::from(kept.spill.places) <= file_blocks);
            }
            (0..3).for_each(|sequence| kept.claim(sequence, 0));
            prop_assert!(is_empty(&kept));
        }
    }
}
