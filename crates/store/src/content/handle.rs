//! One content: what is here of it, who may write, and what reaches the disk when.

use std::{
    fs::{File, OpenOptions},
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use bao_tree::{BaoTree, io::outboard::PreOrderOutboard};
use murmur_gguf::{ByteRange, Digest, GroupSet, groups::byte_range};

use super::{
    BLOCK_SIZE, CONTENT_BYTES_MAX, ContentEntry, DATA, GROUP_BYTES, LOCK, STATE, TREE,
    state::{Found, Reference, State},
};
use crate::{
    error::StoreError,
    files::{self, FileLock},
    quota::Hold,
};

/// Bytes that arrive between two checkpoints: as much as a power cut may cost.
const CHECKPOINT_BYTES: u64 = 256 << 20;
/// Time between two checkpoints while something arrives.
const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(5);

/// A content that is open: a handle to share and to clone. What it has verified survives its process without more ado, and a power cut
/// from the next checkpoint on; the last handle that is dropped makes one.
#[derive(Debug, Clone)]
pub struct Content(pub(super) Arc<Inner>);

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) root: PathBuf,
    pub(super) directory: PathBuf,
    digest: Digest,
    bytes: u64,
    born_unix_ns: u64,
    path: PathBuf,
    /// What the path is, when the file lies elsewhere.
    pub(super) reference: Option<Reference>,
    pub(super) data: File,
    pub(super) outboard: PreOrderOutboard<File>,
    progress: Mutex<Progress>,
    /// Held by whoever makes a checkpoint: one at a time, and others go on writing.
    checkpoint: Mutex<()>,
}

#[derive(Debug)]
pub(super) struct Progress {
    pub(super) held: GroupSet,
    /// What did not match when it was read, whatever was written down before.
    pub(super) doubted: GroupSet,
    references: Vec<Reference>,
    source: Option<String>,
    /// That this process is the one that writes: from its first write until a flush finds nobody writing.
    lock: Option<FileLock>,
    /// Turns that are taken.
    writers: usize,
    /// What was kept since the last checkpoint; any other change counts as one byte.
    pub(super) unsynced_bytes: u64,
    synced_at: Instant,
    /// Whether what lies beyond the last checkpoint has been looked at.
    pub(super) recovered: bool,
}

/// The right to write, for this process: nobody else begins while one is there.
pub(super) struct Turn<'a>(&'a Content);

/// A turn, and the files to write to.
pub(super) struct Writing<'a> {
    _turn: Turn<'a>,
    pub(super) data: File,
    pub(super) outboard: PreOrderOutboard<File>,
}

impl Inner {
    /// Opens the files of a content; `None` when there is nothing, or the file elsewhere is gone or another.
    pub(super) fn open(
        root: PathBuf,
        digest: Digest,
        directory: &Path,
        found: Found,
    ) -> Result<Option<Self>, StoreError> {
        let own = directory.join(DATA);
        let own_bytes = std::fs::metadata(&own).ok().filter(|meta| meta.is_file()).map(|meta| meta.len());
        let is_recorded = matches!(found, Found::State(_));
        let mut state = match (found, own_bytes) {
            (Found::State(state), _) => state,
            // The file was made as long as the content, and the tree tells what of it is right.
            (_, Some(bytes @ 1..=CONTENT_BYTES_MAX)) => State::new(bytes),
            _ => return Ok(None),
        };
        let reference = match own_bytes {
            Some(_) => None,
            None => match state.references.iter().find(|reference| reference.is_unchanged()) {
                Some(reference) => Some(reference.clone()),
                None => return Ok(None),
            },
        };
        let path = reference.as_ref().map_or(own, |reference| reference.path.clone());
        let data = File::open(&path).map_err(StoreError::io("read", &path))?;
        let tree_path = directory.join(TREE);
        let tree_file = match File::open(&tree_path) {
            // A reference without its tree has to be read again anyway.
            Err(error) if error.kind() == io::ErrorKind::NotFound && reference.is_some() => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                state.held = GroupSet::default();
                File::create_new(&tree_path).and_then(|_| File::open(&tree_path))
            }
            opened => opened,
        };
        let tree_file = tree_file.map_err(StoreError::io("read", &tree_path))?;
        let mut held = if reference.is_some() { GroupSet::all(state.bytes) } else { state.held };
        // What a shorter file has lost is not held any more.
        if let Some(short) = own_bytes.filter(|&own| own < state.bytes) {
            held.remove(&(short / GROUP_BYTES..u64::MAX));
        }
        Ok(Some(Self {
            root,
            directory: directory.to_owned(),
            digest,
            bytes: state.bytes,
            born_unix_ns: state.born_unix_ns,
            path,
            data,
            outboard: outboard(digest, state.bytes, tree_file),
            progress: Mutex::new(Progress {
                held,
                doubted: GroupSet::default(),
                references: state.references,
                source: state.source,
                lock: None,
                writers: 0,
                unsynced_bytes: u64::from(!is_recorded),
                synced_at: Instant::now(),
                recovered: reference.is_some(),
            }),
            reference,
            checkpoint: Mutex::new(()),
        }))
    }

    /// Whether this is what lies on disk now. If it is, what others have written down since is known.
    pub(super) fn is_current(&self, found: &Found) -> bool {
        !matches!(found, Found::Nothing)
            && self.reference.as_ref().is_none_or(Reference::is_unchanged)
            && self.learn(&mut self.progress()).unwrap_or(true)
    }

    pub(super) fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in what another process has written down; says whether it is still the same place. Who holds the lock knows it all.
    fn learn(&self, progress: &mut Progress) -> Result<bool, StoreError> {
        if progress.lock.is_some() {
            return Ok(true);
        }
        match State::read(&self.directory.join(STATE))? {
            Found::State(state) if state.born_unix_ns == self.born_unix_ns => {
                progress.held = progress.held.union(&state.held.difference(&progress.doubted));
                progress.references = state.references;
                progress.source = state.source;
                Ok(true)
            }
            Found::State(_) => Ok(false),
            Found::Damaged | Found::Nothing => Ok(true),
        }
    }

    /// Writes down what is held. It must be on disk.
    fn record(&self, held: &GroupSet, references: Vec<Reference>, source: Option<String>) -> Result<(), StoreError> {
        let mut state = State::new(self.bytes);
        state.born_unix_ns = self.born_unix_ns;
        (state.references, state.source) = (references, source);
        if self.reference.is_none() {
            state.held = held.clone();
        }
        state.write(&self.directory.join(STATE))
    }

    /// Puts everything that is held on disk, then writes down that it is. Needs the lock of the content.
    fn checkpoint(&self) -> Result<(), StoreError> {
        let _one = self.checkpoint.lock().unwrap_or_else(PoisonError::into_inner);
        let (held, references, source, bytes) = {
            let mut progress = self.progress();
            progress.synced_at = Instant::now();
            let Progress { held, references, source, unsynced_bytes, .. } = &*progress;
            (held.clone(), references.clone(), source.clone(), *unsynced_bytes)
        };
        if let Err(error) = self.sync() {
            // Nobody knows which of the pages the system has thrown away: only what was written down counts.
            if let Ok(Found::State(state)) = State::read(&self.directory.join(STATE)) {
                self.progress().held = state.held;
            }
            return Err(error);
        }
        self.record(&held, references, source)?;
        let mut progress = self.progress();
        progress.unsynced_bytes = progress.unsynced_bytes.saturating_sub(bytes);
        Ok(())
    }

    /// Puts bytes and tree on disk.
    fn sync(&self) -> Result<(), StoreError> {
        if self.reference.is_some() {
            return Ok(());
        }
        self.data.sync_data().map_err(|error| files::write_failed(error, &self.path, 0))?;
        self.outboard.data.sync_data().map_err(|error| files::write_failed(error, &self.directory.join(TREE), 0))
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let progress = self.progress.get_mut().unwrap_or_else(PoisonError::into_inner);
        if progress.lock.is_some()
            && progress.unsynced_bytes > 0
            && let Err(error) = self.checkpoint()
        {
            tracing::warn!(digest = %self.digest, %error, "what has arrived last may not survive a power cut");
        }
    }
}

impl Content {
    /// BLAKE3 of the whole file.
    pub fn digest(&self) -> Digest {
        self.0.digest
    }

    /// Size of the whole file; a claim until its last group is held.
    pub fn bytes(&self) -> u64 {
        self.0.bytes
    }

    /// The file, of full length: what is held is readable at its true offset, the rest reads as zeros.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Whether the file lies elsewhere and is only referred to.
    pub fn is_reference(&self) -> bool {
        self.0.reference.is_some()
    }

    /// Holds it: until that is dropped, no process removes it to make room. Waits while somebody decides whether to.
    pub fn hold(&self) -> Result<Hold, StoreError> {
        let gone = StoreError::ContentGone { digest: self.digest() };
        Hold::on(self.path()).filter(|_| self.is_there()).ok_or(gone)
    }

    /// Whether its file has not been removed, or replaced by another one. What was removed can be read as long as a handle is there.
    pub fn is_there(&self) -> bool {
        files::is_at(&self.0.data, self.path())
    }

    /// Whether both are handles of one content, and not of one that was removed and a later one of the same bytes.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// What is verified and here: ascending, joined, of whole groups (the last group ends where the file does).
    pub fn held(&self) -> Vec<ByteRange> {
        self.0.progress().held.byte_ranges(self.bytes())
    }

    /// How many bytes are verified and here.
    pub fn held_bytes(&self) -> u64 {
        self.0.progress().held.bytes(self.bytes())
    }

    /// What has to be fetched before all of `wanted` is held, in whole groups. What lies beyond the end is not missed.
    pub fn missing(&self, wanted: &[ByteRange]) -> Vec<ByteRange> {
        self.lacking(&GroupSet::touching(wanted, self.bytes())).byte_ranges(self.bytes())
    }

    /// Whether everything is held.
    pub fn is_complete(&self) -> bool {
        self.lacking(&GroupSet::all(self.bytes())).is_empty()
    }

    /// Puts everything that is held on disk, and lets other processes write, unless this one is writing.
    pub fn flush(&self) -> Result<(), StoreError> {
        let is_due = {
            let progress = self.0.progress();
            progress.lock.is_some() && progress.unsynced_bytes > 0
        };
        if is_due {
            self.0.checkpoint()?;
        }
        let mut progress = self.0.progress();
        if progress.writers == 0 && progress.unsynced_bytes == 0 {
            progress.lock = None;
        }
        Ok(())
    }

    /// Gives up the whole groups in `ranges`: they are not held any more and take no room on disk. Returns the bytes freed.
    /// Refused while somebody writes, and for a file that lies elsewhere.
    pub fn forget(&self, ranges: &[ByteRange]) -> Result<u64, StoreError> {
        let writing = self.write()?;
        let freed_bytes = {
            let _one = self.0.checkpoint.lock().unwrap_or_else(PoisonError::into_inner);
            // With this mutex nobody begins to write.
            let mut progress = self.0.progress();
            if progress.writers > 1 {
                return Err(StoreError::content_in_use(self.digest(), self.0.directory.join(LOCK)));
            }
            let kept = progress.held.difference(&GroupSet::filled(ranges, self.bytes()));
            let given_up = progress.held.difference(&kept);
            // First it is not listed, then it is not there.
            self.0.sync()?;
            self.0.record(&kept, progress.references.clone(), progress.source.clone())?;
            (progress.held, progress.unsynced_bytes) = (kept, 0);
            self.punch(&writing.data, &given_up)?;
            given_up.bytes(self.bytes())
        };
        drop(writing);
        self.flush()?;
        Ok(freed_bytes)
    }

    pub(super) fn entry(&self) -> ContentEntry {
        let state = std::fs::metadata(self.0.directory.join(STATE));
        ContentEntry {
            digest: self.digest(),
            bytes: self.bytes(),
            held_bytes: self.held_bytes(),
            path: self.path().to_owned(),
            is_reference: self.is_reference(),
            used: state.and_then(|meta| meta.modified()).unwrap_or(SystemTime::UNIX_EPOCH),
        }
    }

    /// Marks it as used now. Best effort: a store that cannot be written to evicts nothing.
    pub(super) fn touch(&self) {
        let state = OpenOptions::new().write(true).open(self.0.directory.join(STATE));
        let _ = state.and_then(|file| file.set_modified(SystemTime::now()));
    }

    /// Whether the size is more than a claim.
    pub(super) fn is_size_proven(&self) -> bool {
        self.0.progress().held.contains((self.bytes() - 1) / GROUP_BYTES)
    }

    pub(super) fn lacking(&self, wanted: &GroupSet) -> GroupSet {
        wanted.difference(&self.0.progress().held)
    }

    /// Where a hub has the file, if that was [said](Self::set_source). Nothing has proven it.
    pub fn source(&self) -> Option<String> {
        self.0.progress().source.clone()
    }

    /// Remembers where a hub has the file. While somebody else writes, it is left.
    pub fn set_source(&self, source: &str) -> Result<(), StoreError> {
        self.note(|progress| progress.source = Some(source.to_owned()))
    }

    /// Remembers another file that has these bytes. While somebody else writes, it is left: the file will be read again.
    pub(super) fn remember(&self, reference: Reference) -> Result<(), StoreError> {
        self.note(|progress| {
            progress.references.retain(|known| known.path != reference.path);
            progress.references.push(reference);
        })
    }

    /// Writes a change down, unless somebody else writes.
    fn note(&self, change: impl FnOnce(&mut Progress)) -> Result<(), StoreError> {
        let turn = match self.turn() {
            Err(StoreError::ContentInUse { .. }) => return Ok(()),
            turn => turn?,
        };
        {
            let mut progress = self.0.progress();
            change(&mut progress);
            progress.unsynced_bytes += 1;
        }
        drop(turn);
        self.flush()
    }

    /// Becomes the one that writes to this content, or one more of its threads.
    pub(super) fn turn(&self) -> Result<Turn<'_>, StoreError> {
        let mut progress = self.0.progress();
        if progress.lock.is_none() {
            let _all = FileLock::wait(&self.0.root.join(LOCK))?;
            let lock_path = self.0.directory.join(LOCK);
            let gone = StoreError::ContentGone { digest: self.digest() };
            if !self.0.directory.is_dir() {
                return Err(gone);
            }
            let Some(lock) = FileLock::try_take(&lock_path)? else {
                return Err(StoreError::content_in_use(self.digest(), lock_path));
            };
            if !self.0.learn(&mut progress)? {
                return Err(gone);
            }
            progress.lock = Some(lock);
            progress.synced_at = Instant::now();
            // The last to write may have come to a bad end.
            progress.recovered = self.is_reference();
        }
        progress.writers += 1;
        Ok(Turn(self))
    }

    /// The right to write, and the files.
    pub(super) fn write(&self) -> Result<Writing<'_>, StoreError> {
        if self.is_reference() {
            return Err(StoreError::ContentIsReference { path: self.path().to_owned() });
        }
        let turn = self.turn()?;
        self.take_in(&self.leftovers()?)?;
        let open = |path: &Path| {
            OpenOptions::new().read(true).write(true).open(path).map_err(StoreError::io("open for writing", path))
        };
        let data = open(self.path())?;
        let meta = data.metadata().map_err(StoreError::io("read", self.path()))?;
        if meta.len() != self.bytes() {
            data.set_len(self.bytes()).map_err(|error| files::write_failed(error, self.path(), self.bytes()))?;
        }
        let tree = open(&self.0.directory.join(TREE))?;
        Ok(Writing { _turn: turn, data, outboard: outboard(self.digest(), self.bytes(), tree) })
    }

    /// Does not count these groups as held any more.
    pub(super) fn doubt(&self, wrong: &GroupSet) {
        let mut progress = self.0.progress();
        progress.held = progress.held.difference(wrong);
        progress.doubted = progress.doubted.union(wrong);
        progress.unsynced_bytes += 1;
        // It has to be written down; whoever opens the content next sees to it.
        progress.recovered = false;
    }

    /// Counts a group as held. It must be written, and its hashes.
    pub(super) fn keep(&self, group: u64) -> ByteRange {
        let kept = byte_range(&(group..group + 1), self.bytes());
        let mut progress = self.0.progress();
        progress.held.insert(group..group + 1);
        progress.doubted.remove(&(group..group + 1));
        progress.unsynced_bytes += kept.end - kept.start;
        kept
    }

    /// A checkpoint, if it is time for one.
    pub(super) fn checkpoint_if_due(&self) -> Result<(), StoreError> {
        let is_due = {
            let progress = self.0.progress();
            progress.unsynced_bytes >= CHECKPOINT_BYTES
                || progress.unsynced_bytes > 0 && progress.synced_at.elapsed() >= CHECKPOINT_INTERVAL
        };
        if is_due { self.0.checkpoint() } else { Ok(()) }
    }

    #[cfg(target_os = "linux")]
    fn punch(&self, data: &File, groups: &GroupSet) -> Result<(), StoreError> {
        use rustix::fs::{FallocateFlags, fallocate};
        for range in groups.ranges() {
            let (start, len) = (range.start * GROUP_BYTES, (range.end - range.start) * GROUP_BYTES);
            fallocate(data, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, start, len)
                .map_err(|error| StoreError::io("free a part of", self.path())(error.into()))?;
        }
        Ok(())
    }

    #[cfg(not(target_os = "linux"))]
    fn punch(&self, _data: &File, _groups: &GroupSet) -> Result<(), StoreError> {
        Err(StoreError::io("free a part of", self.path())(io::ErrorKind::Unsupported.into()))
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.0.progress().writers -= 1;
    }
}

fn outboard(digest: Digest, bytes: u64, data: File) -> PreOrderOutboard<File> {
    PreOrderOutboard { root: blake3::Hash::from_bytes(digest.0), tree: BaoTree::new(bytes, BLOCK_SIZE), data }
}
