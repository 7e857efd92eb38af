//! Another file of this machine as one more source of a file that comes from other nodes: an older version of the model, or one of its other
//! quantisations. A new chat template leaves every tensor as it was, and Q4_K_M and Q5_K_M share their head.
//!
//! Tensors of the same name, shape and type may be the same. Whether they are, the hashes tell that nodes give of the file that is fetched
//! ([`unproven`](super::unproven)); a tensor of which a group is not the same is left to others. What is copied is on the disk twice.

use std::{
    collections::HashSet,
    fs::File,
    io::{self, Read},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use murmur_core::swarm::{GroupSet, Outcome};
use murmur_gguf::{ByteRange, Gguf};
use murmur_store::{Content, DecodeError, StoreError};
use tokio_util::sync::CancellationToken;

use super::{ask::Failure, length, unproven::UNPROVEN};
use crate::model::with_causes;

/// So many other files are asked, those that may have most.
const TWINS_MAX: usize = 4;
/// One that may have less is not worth the hashes.
const TWIN_BYTES_MIN: u64 = 256 << 10;

/// Another file with some of the same tensors.
pub(super) struct Twin {
    path: PathBuf,
    file: File,
    /// Of the file that is fetched.
    file_bytes: u64,
    /// Padding between two tensors that follow each other is shorter.
    alignment: u64,
    /// By where they are in the file that is fetched.
    alike: Mutex<Vec<Alike>>,
}

/// A tensor of both files that may be the same, or several that follow each other.
#[derive(Debug, Clone, Copy)]
struct Alike {
    /// In the file that is fetched.
    here: ByteRange,
    /// Where it begins in the other one.
    there: u64,
}

/// The files of these that may have most of what a file has whose header is here. Blocks.
pub(super) fn find(wanted: &Gguf, others: &HashSet<PathBuf>) -> Vec<Twin> {
    let mut found: Vec<(u64, Twin)> = others
        .iter()
        .filter_map(|path| Twin::of(wanted, path))
        .map(|twin| (twin.has().bytes(twin.file_bytes), twin))
        .filter(|(bytes, _)| *bytes >= TWIN_BYTES_MIN)
        .collect();
    found.sort_by_key(|(bytes, _)| std::cmp::Reverse(*bytes));
    found.into_iter().map(|(_, twin)| twin).take(TWINS_MAX).collect()
}

impl Twin {
    /// `None`: it cannot be read, or is of another architecture.
    fn of(wanted: &Gguf, path: &Path) -> Option<Twin> {
        let other = Gguf::open(path).ok().filter(|other| other.architecture() == wanted.architecture())?;
        let alike = |tensor: &murmur_gguf::TensorInfo| {
            let same = other.tensor(&tensor.name)?;
            let here = ByteRange { start: tensor.offset, end: tensor.offset + tensor.bytes };
            (same.dims == tensor.dims && same.ty == tensor.ty).then_some(Alike { here, there: same.offset })
        };
        let mut alike: Vec<Alike> = wanted.tensors().iter().filter_map(alike).collect();
        alike.sort_unstable_by_key(|alike| alike.here.start);
        Some(Twin {
            path: path.to_owned(),
            file: File::open(path).ok()?,
            file_bytes: wanted.file_bytes(),
            alignment: wanted.alignment().into(),
            alike: Mutex::new(alike),
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    fn alike(&self) -> MutexGuard<'_, Vec<Alike>> {
        self.alike.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Groups that it may have.
    pub(super) fn has(&self) -> GroupSet {
        let runs: Vec<ByteRange> = self.runs().into_iter().map(|run| run.here).collect();
        GroupSet::filled(&runs, self.file_bytes)
    }

    /// What is alike, with the padding between tensors that follow each other in both files.
    fn runs(&self) -> Vec<Alike> {
        let mut runs: Vec<Alike> = Vec::new();
        for &next in self.alike().iter() {
            match runs.last_mut() {
                Some(run) if run.goes_on_with(&next, self.alignment) => run.here.end = next.here.end,
                _ => runs.push(next),
            }
        }
        runs
    }

    /// Keeps these ranges, of which all hashes are here. Each group that was kept is `received`. What turns out to be something else is not
    /// had any more. Blocks.
    pub(super) fn fill(
        &self,
        content: &Content,
        ranges: &[ByteRange],
        unwanted: &CancellationToken,
        received: &mut dyn FnMut(ByteRange),
    ) -> Result<(), Failure> {
        let runs = self.runs();
        let mut left: Vec<Alike> =
            ranges.iter().flat_map(|range| runs.iter().filter_map(|run| run.within(range))).collect();
        if left.iter().map(|part| part.here.end - part.here.start).sum::<u64>() < length(ranges) {
            // Somebody has found out meanwhile that it is not the same.
            return Err(Failure::Source(Outcome::Lacks));
        }
        left.reverse();
        let mut reader = Parts { file: &self.file, left, unwanted };
        content.fill(ranges, &mut reader, received).map_err(|error| match error {
            DecodeError::Wrong { at } => {
                self.differs(at);
                Failure::Source(Outcome::Lacks)
            }
            DecodeError::Ended { .. } | DecodeError::Receive(_) => Failure::GONE,
            DecodeError::Store(StoreError::ContentLacks { .. }) => UNPROVEN,
            DecodeError::Store(error) => Failure::Store(with_causes(&error)),
        })
    }

    /// A group is not the same: neither are the tensors that it is of, as far as is known.
    fn differs(&self, at: u64) {
        let group = GroupSet::covering(&[ByteRange { start: at, end: at + 1 }]).byte_ranges(self.file_bytes);
        let is_apart =
            |alike: &Alike| group.iter().all(|group| alike.here.end <= group.start || group.end <= alike.here.start);
        self.alike().retain(is_apart);
    }
}

impl Alike {
    /// What of it lies in a range.
    fn within(&self, range: &ByteRange) -> Option<Alike> {
        let here = ByteRange { start: self.here.start.max(range.start), end: self.here.end.min(range.end) };
        (here.start < here.end).then(|| Alike { here, there: self.there + (here.start - self.here.start) })
    }

    fn goes_on_with(&self, next: &Alike, alignment: u64) -> bool {
        let is_next = next.here.start >= self.here.end && next.here.start - self.here.end < alignment;
        is_next && next.there.checked_sub(self.there) == Some(next.here.start - self.here.start)
    }
}

/// Reads parts of a file, the last one first. Ends with an error as soon as nobody wants them any more.
struct Parts<'a> {
    file: &'a File,
    left: Vec<Alike>,
    unwanted: &'a CancellationToken,
}

impl Read for Parts<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.unwanted.is_cancelled() {
            return Err(io::Error::other("not wanted any more"));
        }
        let Some(part) = self.left.last_mut() else { return Ok(0) };
        let left = part.here.end - part.here.start;
        let room = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        let read = self.file.read_at(&mut buffer[..room], part.there)?;
        part.here.start += read as u64;
        part.there += read as u64;
        if part.here.start == part.here.end {
            self.left.pop();
        }
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use murmur_gguf::{GROUP_BYTES, GgufBuilder, TensorSource, TensorType};

    use super::*;

    /// f32 in a group.
    const GROUP: u64 = GROUP_BYTES / 4;

    /// A file with this text in its header, and tensors of so many f32.
    fn file(folder: &Path, text: &str, tensors: &[(&str, u64)]) -> PathBuf {
        let path = folder.join(format!("{}.gguf", text.len()));
        let mut builder = GgufBuilder::new("llama");
        builder.set("tokenizer.chat_template", text.to_owned());
        for (name, values) in tensors {
            builder.tensor(*name, &[*values], TensorType::F32, TensorSource::Zeros).unwrap();
        }
        builder.write(&path).unwrap();
        path
    }

    fn twin(folder: &Path, wanted: &[(&str, u64)], other: &[(&str, u64)]) -> (Gguf, Twin) {
        let wanted = Gguf::open(file(folder, &"new".repeat(100), wanted)).unwrap();
        let twin = Twin::of(&wanted, &file(folder, "old", other)).unwrap();
        (wanted, twin)
    }

    #[test]
    fn where_only_the_header_is_new_all_groups_behind_it_may_be_the_same() {
        let folder = tempfile::tempdir().unwrap();
        // The second one leaves room for padding.
        let tensors = [("a", 10 * GROUP), ("b", 10 * GROUP + 1), ("c", 20 * GROUP)];
        let (wanted, twin) = twin(folder.path(), &tensors, &tensors);
        let data = ByteRange { start: wanted.data_offset(), end: wanted.file_bytes() };
        assert_eq!(twin.has(), GroupSet::filled(&[data], wanted.file_bytes()));
        assert_eq!(twin.runs().len(), 1);
    }

    #[test]
    fn a_tensor_that_is_another_or_lies_elsewhere_parts_what_may_be_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let wanted = [("a", 10 * GROUP), ("b", 10 * GROUP), ("c", 10 * GROUP), ("d", 10 * GROUP)];
        let other = [("a", 10 * GROUP), ("b", 11 * GROUP), ("d", 10 * GROUP), ("c", 10 * GROUP)];
        let (wanted, twin) = twin(folder.path(), &wanted, &other);
        let other = Gguf::open(twin.path()).unwrap().data_offset();
        // The groups at both ends of `a` are of others as well. Those of `c` and `d` follow each other here.
        assert_eq!((twin.runs().len(), twin.has().len()), (3, 9 + 20));
        let both = wanted.tensor("c").unwrap().offset..wanted.file_bytes();
        let runs = twin.runs();
        let range = ByteRange { start: both.start + 1, end: both.end };
        let places = runs.iter().filter_map(|run| run.within(&range));
        let places: Vec<_> = places.map(|part| (part.here.start - both.start, part.there - other)).collect();
        // After `a` and the longer `b`.
        let longer = 21 * GROUP_BYTES;
        assert_eq!(places, [(1, longer + 10 * GROUP_BYTES + 1), (10 * GROUP_BYTES, longer)]);
    }

    #[test]
    fn a_group_that_is_not_the_same_costs_the_tensors_that_it_is_of() {
        let folder = tempfile::tempdir().unwrap();
        let tensors = [("a", 10 * GROUP), ("b", 10 * GROUP), ("c", 10 * GROUP)];
        let (wanted, twin) = twin(folder.path(), &tensors, &tensors);
        let before = twin.has().len();
        twin.differs(wanted.tensor("b").unwrap().offset + 5 * GROUP_BYTES);
        assert_eq!((twin.runs().len(), twin.has().len()), (2, before - 11));
        twin.differs(wanted.tensor("a").unwrap().offset + 5 * GROUP_BYTES);
        twin.differs(wanted.tensor("c").unwrap().offset + 5 * GROUP_BYTES);
        assert!(twin.has().is_empty());
    }

    #[test]
    fn files_that_can_have_nothing_are_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let wanted = Gguf::open(file(folder.path(), "wanted", &[("a", 100 * GROUP)])).unwrap();
        let same = file(folder.path(), "same", &[("a", 100 * GROUP)]);
        let others = [
            same.clone(),
            file(folder.path(), "another", &[("b", 100 * GROUP)]),
            file(folder.path(), "longer tensor", &[("a", 101 * GROUP)]),
            folder.path().join("gone.gguf"),
        ];
        let found = find(&wanted, &HashSet::from(others));
        assert_eq!(found.iter().map(Twin::path).collect::<Vec<_>>(), [same]);
    }
}
