//! What lies on disk against the digest: after an unclean end, and when somebody wants to know.

use std::{
    fs::File,
    io::{self, BufReader},
    ops::Range,
};

use bao_tree::io::{
    EncodeError,
    sync::{CreateOutboard, encode_ranges_validated},
};
use murmur_gguf::{ByteRange, Digest, GroupSet};

use super::{CHUNKS_PER_GROUP, Content, GROUP_BYTES, STREAM_BUFFER_BYTES, TREE};
use crate::{error::StoreError, files, hub};

impl Content {
    /// Takes in what an unclean end has left beyond the last checkpoint. Whoever may not write sees the checkpoint.
    pub(super) fn recover(&self) -> Result<(), StoreError> {
        if self.0.progress().recovered {
            return Ok(());
        }
        let leftovers = self.leftovers()?;
        if leftovers.is_empty() && self.0.progress().unsynced_bytes == 0 {
            self.0.progress().recovered = true;
            return Ok(());
        }
        let Ok(turn) = self.turn() else { return Ok(()) };
        self.take_in(&leftovers)?;
        drop(turn);
        if let Err(error) = self.flush() {
            tracing::warn!(digest = %self.digest(), %error, "what an earlier process has left cannot be made durable");
        }
        Ok(())
    }

    /// What lies on disk and nobody has listed. Unchecked.
    pub(super) fn leftovers(&self) -> Result<GroupSet, StoreError> {
        if self.0.progress().recovered {
            return Ok(GroupSet::default());
        }
        let missing = self.lacking(&GroupSet::all(self.bytes()));
        self.on_disk(&missing).map_err(StoreError::io("read", self.path()))
    }

    /// Counts as held what of `leftovers` matches the digest.
    pub(super) fn take_in(&self, leftovers: &GroupSet) -> Result<(), StoreError> {
        let valid = self.check(leftovers, &mut |_| {})?;
        let mut progress = self.0.progress();
        progress.held = progress.held.union(&valid);
        progress.doubted = progress.doubted.difference(&valid);
        progress.unsynced_bytes += valid.bytes(self.bytes());
        progress.recovered = true;
        Ok(())
    }

    /// Checks everything that is held against the digest. What does not match is returned, and not held any more; of a file that is
    /// whole with a tree that is not, the tree is made anew. `seen` is told the bytes that match, as it goes.
    pub(crate) fn verify(&self, seen: &mut dyn FnMut(u64)) -> Result<Vec<ByteRange>, StoreError> {
        let held = self.0.progress().held.clone();
        let damaged = held.difference(&self.check(&held, seen)?);
        let is_whole = damaged.is_empty() || self.is_complete() && !self.is_reference() && self.rebuild_tree()?;
        if is_whole {
            return Ok(Vec::new());
        }
        if !self.is_reference() {
            let writing = self.write()?;
            self.doubt(&damaged);
            drop(writing);
            self.flush()?;
        }
        Ok(damaged.byte_ranges(self.bytes()))
    }

    /// SHA-256 of the file as it lies there, by which hubs name it: lower-case hex. Reads all of it.
    pub fn sha256(&self) -> Result<String, StoreError> {
        hub::sha256_of(self.path(), &mut |_| ()).map_err(StoreError::io("read", self.path()))
    }

    /// Makes the tree anew, if the file is whole; says whether it is.
    fn rebuild_tree(&self) -> Result<bool, StoreError> {
        let read_failed = |error| StoreError::io("read", self.path())(error);
        let file = || File::open(self.path()).map_err(read_failed);
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(file()?).map_err(read_failed)?;
        let is_whole = Digest::from(hasher.finalize()) == self.digest();
        if is_whole {
            let mut writing = self.write()?;
            let rebuilt = writing.outboard.init_from(BufReader::with_capacity(STREAM_BUFFER_BYTES, file()?));
            let synced = rebuilt.and_then(|()| writing.outboard.data.sync_all());
            synced.map_err(|error| files::write_failed(error, &self.0.directory.join(TREE), 0))?;
            drop(writing);
            self.flush()?;
        }
        Ok(is_whole)
    }

    /// Those of `groups` that match the digest. `seen` is told their bytes, as it goes.
    fn check(&self, groups: &GroupSet, seen: &mut dyn FnMut(u64)) -> Result<GroupSet, StoreError> {
        let mut wrong = GroupSet::default();
        let meta = self.0.data.metadata().map_err(StoreError::io("read", self.path()))?;
        if meta.len() < self.bytes() {
            wrong.insert(meta.len() / GROUP_BYTES..u64::MAX);
        }
        let mut rest = groups.difference(&wrong);
        while !rest.is_empty() {
            let chunks = self.chunks(&rest);
            let Err(error) = encode_ranges_validated(&self.0.data, &self.0.outboard, &chunks, Seen(seen)) else {
                break;
            };
            let Some(damaged) = wrong_groups(&error) else {
                return Err(StoreError::io("read", self.path())(error.into()));
            };
            rest.remove(&(0..damaged.end));
            wrong.insert(damaged);
        }
        Ok(groups.difference(&wrong))
    }

    /// Those of `groups` that are no holes in the file, as far as the system tells.
    fn on_disk(&self, groups: &GroupSet) -> io::Result<GroupSet> {
        let mut there = Vec::new();
        for range in groups.byte_ranges(self.bytes()) {
            let mut at = range.start;
            while let Some(stretch) = next_stretch(&self.0.data, at)?.filter(|stretch| stretch.start < range.end) {
                there.push(ByteRange { start: stretch.start, end: stretch.end.min(range.end) });
                if stretch.end >= range.end {
                    break;
                }
                at = stretch.end;
            }
        }
        Ok(GroupSet::covering(&there))
    }
}

/// Where the tree and the bytes do not match; `None` when it is another failure. A file that ends early is not the file.
pub(super) fn wrong_groups(error: &EncodeError) -> Option<Range<u64>> {
    let groups = |start: u64, end: u64| start / CHUNKS_PER_GROUP..end.div_ceil(CHUNKS_PER_GROUP);
    match error {
        EncodeError::ParentHashMismatch(node) => {
            let chunks = node.chunk_range();
            Some(groups(chunks.start.0, chunks.end.0))
        }
        EncodeError::LeafHashMismatch(chunk) => Some(groups(chunk.0, chunk.0 + CHUNKS_PER_GROUP)),
        EncodeError::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof => Some(0..u64::MAX),
        _ => None,
    }
}

/// Counts what is written and forgets it.
struct Seen<'a>(&'a mut dyn FnMut(u64));

impl io::Write for Seen<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        (self.0)(bytes.len() as u64);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The next stretch of a file that is not a hole, from `at` on.
#[cfg(any(target_os = "linux", target_os = "android", target_os = "macos", target_os = "freebsd"))]
fn next_stretch(file: &File, at: u64) -> io::Result<Option<ByteRange>> {
    use rustix::{
        fs::{SeekFrom, seek},
        io::Errno,
    };
    match seek(file, SeekFrom::Data(at)) {
        Ok(start) => Ok(Some(ByteRange { start, end: seek(file, SeekFrom::Hole(start))? })),
        Err(Errno::NXIO) => Ok(None),
        Err(Errno::INVAL) => Ok(Some(ByteRange { start: at, end: u64::MAX })),
        Err(error) => Err(error.into()),
    }
}

/// Where the system does not tell, everything may be data.
#[cfg(not(any(target_os = "linux", target_os = "android", target_os = "macos", target_os = "freebsd")))]
fn next_stretch(_file: &File, at: u64) -> io::Result<Option<ByteRange>> {
    Ok(Some(ByteRange { start: at, end: u64::MAX }))
}
