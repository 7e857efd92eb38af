//! The bytes of model files, kept while they arrive in parts from several peers, and served on from there.
//!
//! A model file is known by the BLAKE3 digest of its bytes. BLAKE3 is a tree: whoever knows the digest can check any group of
//! 16 KiB with the hashes on the way to the root (Bao, verified streaming). So a *content* is a file that may have holes, the hashes that are
//! known of its tree, and the set of groups that have been verified; the rest is a hole, costs no room, and is never served.
//!
//! ```text
//! <data-dir>/models/contents/lock                    held for the moment in which a content appears, goes, or gets a writer
//! <data-dir>/models/contents/<digest>/model.gguf     the bytes, each at its true offset; absent when the file lies elsewhere
//! <data-dir>/models/contents/<digest>/tree           hash pairs of the tree above the groups, in pre-order
//! <data-dir>/models/contents/<digest>/state          size, files elsewhere, verified groups; its own time of change: last use
//! <data-dir>/models/contents/<digest>/signatures      what people have signed of it
//! <data-dir>/models/contents/<digest>/lock           held by the one process that writes
//! <data-dir>/models/contents/.*                      being made or removed; swept up when nobody holds the lock in it
//! ```
//!
//! **Crashes.** `state` is replaced after the bytes and the tree are on disk, so what it lists is there. What lies on disk beyond
//! that, from a process that was killed or a machine that lost power, is checked against the tree when the content is opened next.
//! No state of the disk makes unverified bytes count.
//!
//! Start reading at [`Contents`], then [`Content`].

mod check;
mod handle;
mod hashes;
mod signatures;
mod state;
mod stream;

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, BufReader, Read},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use bao_tree::{
    BaoTree, BlockSize,
    io::{outboard::PreOrderOutboard, sync::CreateOutboard},
};
use murmur_gguf::{Digest, GroupSet};

pub use handle::Content;
pub use murmur_gguf::GROUP_BYTES;
pub use stream::DecodeError;

use self::{
    handle::Inner,
    state::{Found, Reference, State},
};
use crate::{
    error::StoreError,
    files::{self, FileLock},
};

/// The largest content. A peer may claim any size; a tree for this one takes 16 GiB at most, as it grows.
pub const CONTENT_BYTES_MAX: u64 = 4 << 40;

/// BLAKE3's leaves.
const CHUNK_BYTES: u64 = 1024;
const CHUNKS_PER_GROUP: u64 = GROUP_BYTES / CHUNK_BYTES;
const BLOCK_SIZE: BlockSize = BlockSize::from_chunk_log(CHUNKS_PER_GROUP.trailing_zeros() as u8);
/// Bytes read from a file or a peer, or handed to one, at a time.
const STREAM_BUFFER_BYTES: usize = 512 << 10;

const DATA: &str = "model.gguf";
const TREE: &str = "tree";
const STATE: &str = "state";
const LOCK: &str = "lock";

/// Contents that this process has open, by directory: two handles of one content share what they know.
static OPEN: Mutex<BTreeMap<PathBuf, Weak<Inner>>> = Mutex::new(BTreeMap::new());

/// Places that this process has made.
static PLACES: AtomicU64 = AtomicU64::new(0);

/// The contents under a data directory. Cheap to clone; made, it touches nothing.
#[derive(Debug, Clone)]
pub struct Contents {
    root: PathBuf,
}

/// A content, as listed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContentEntry {
    /// BLAKE3 of the whole file.
    pub digest: Digest,
    /// Size of the whole file; a claim until its last group is held.
    pub bytes: u64,
    /// Bytes that are verified and here.
    pub held_bytes: u64,
    /// The file. With holes, unless everything is held.
    pub path: PathBuf,
    /// Whether the file lies elsewhere and is only referred to.
    pub is_reference: bool,
    /// When it was last opened or written to.
    pub used: SystemTime,
}

impl Contents {
    /// The contents of a data directory.
    pub fn at(data_dir: &Path) -> Self {
        Self::below(&data_dir.join("models"))
    }

    pub(crate) fn below(models: &Path) -> Self {
        let root = models.join("contents");
        Self { root: std::path::absolute(&root).unwrap_or(root) }
    }

    /// Every content, by digest. One that cannot be opened is left out, with a warning; [`Store::fsck`](crate::Store::fsck) tells.
    pub fn list(&self) -> Result<Vec<ContentEntry>, StoreError> {
        let mut entries = Vec::new();
        for digest in self.digests()? {
            match self.open(&digest) {
                Ok(Some(content)) => entries.push(content.entry()),
                Ok(None) => {}
                Err(error) => tracing::warn!(%digest, %error, "a content cannot be opened"),
            }
        }
        Ok(entries)
    }

    /// A content that is known here, whole or not. A reference whose file changed or is gone is forgotten.
    ///
    /// The first to open a content after an unclean end checks what lies beyond the last checkpoint; that reads it once.
    pub fn find(&self, digest: &Digest) -> Result<Option<Content>, StoreError> {
        let content = self.open(digest)?;
        if let Some(content) = &content {
            content.touch();
        }
        Ok(content)
    }

    /// The content of a file that lies elsewhere. It is read through once, for its digest and tree, and never changed;
    /// a second call for the same path, size and time of change is instant. `progress` is told bytes done and bytes in all.
    ///
    /// Where the content is known already and whole, the path is only remembered.
    pub fn adopt(&self, path: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<Content, StoreError> {
        let path = std::path::absolute(path).map_err(StoreError::io("find", path))?;
        let reference = Reference::to(&path).map_err(StoreError::io("read", &path))?;
        if let Some(content) = self.known(&reference)? {
            return Ok(content);
        }
        let place = self.make_place()?;
        let tree_path = place.path.join(TREE);
        let digest = hash_file(&reference, &tree_path, progress)?;
        check_size(digest, reference.bytes)?;

        if let Some(content) = self.find(&digest)? {
            if content.is_complete() {
                content.remember(reference)?;
                return Ok(content);
            }
            // Parts of what lies there whole are not needed any more.
            self.discard_for(&place, &digest)?;
        }
        let mut state = State::new(reference.bytes);
        state.references.push(reference);
        state.write(&place.path.join(STATE))?;
        self.settle(place, &digest)?;
        self.find(&digest)?.ok_or(StoreError::ContentGone { digest })
    }

    /// The content of a file, if [`adopt`](Self::adopt) would not have to read it, or it is a content's own.
    pub fn find_file(&self, path: &Path) -> Result<Option<Content>, StoreError> {
        let path = std::path::absolute(path).map_err(StoreError::io("find", path))?;
        self.known(&Reference::to(&path).map_err(StoreError::io("read", &path))?)
    }

    /// The content of a file that is made at the path which `make` is told. Nobody sees it before it is whole, read through and on disk.
    pub(crate) fn make(&self, make: impl FnOnce(&Path) -> Result<(), StoreError>) -> Result<Content, StoreError> {
        let place = self.make_place()?;
        let data = place.path.join(DATA);
        make(&data)?;
        let made = Reference::to(&data).map_err(StoreError::io("read", &data))?;
        let digest = hash_file(&made, &place.path.join(TREE), &mut |_, _| ())?;
        check_size(digest, made.bytes)?;
        if let Some(content) = self.find(&digest)? {
            if content.is_complete() {
                return Ok(content);
            }
            self.discard_for(&place, &digest)?;
        }
        let mut state = State::new(made.bytes);
        state.held = GroupSet::all(made.bytes);
        state.write(&place.path.join(STATE))?;
        self.settle(place, &digest)?;
        self.find(&digest)?.ok_or(StoreError::ContentGone { digest })
    }

    /// A place for a content that arrives; what is there already counts. `bytes` is a claim until the last group has been
    /// verified: another claim replaces it, and what was fetched under it is lost. So whoever does not trust the
    /// claim asks for the last group first.
    pub fn create(&self, digest: Digest, bytes: u64) -> Result<Content, StoreError> {
        check_size(digest, bytes)?;
        let known = self.find(&digest)?;
        if let Some(content) = &known {
            if content.bytes() == bytes {
                return Ok(content.clone());
            }
            if content.is_size_proven() {
                let why = format!("it has {} bytes, which is proven, and not {bytes}", content.bytes());
                return Err(StoreError::ContentSize { digest, why });
            }
        }
        let place = self.make_place()?;
        if known.is_some() {
            self.discard_for(&place, &digest)?;
        }
        drop(known);
        let data = place.path.join(DATA);
        let sized = File::create_new(&data).and_then(|file| file.set_len(bytes));
        sized.map_err(|error| files::write_failed(error, &data, bytes))?;
        let tree = place.path.join(TREE);
        File::create_new(&tree).map_err(|error| files::write_failed(error, &tree, bytes))?;
        State::new(bytes).write(&place.path.join(STATE))?;
        self.settle(place, &digest)?;
        self.find(&digest)?.ok_or(StoreError::ContentGone { digest })
    }

    /// Deletes what is here of a content; returns the bytes freed. A file elsewhere stays. Refused while somebody writes to it;
    /// who reads goes on reading.
    pub fn remove(&self, digest: &Digest) -> Result<u64, StoreError> {
        let mut freed_bytes = 0;
        if let Some(content) = self.open(digest)?.filter(|content| !content.is_reference()) {
            // A handle that only has not been flushed does not stand in the way.
            content.flush()?;
            freed_bytes = content.held_bytes();
        }
        self.discard(digest)?;
        Ok(freed_bytes)
    }

    /// Marks the content of this file as used now, if it is one of these.
    pub(crate) fn touch(&self, file: &Path) {
        let is_it = |digest: &Digest| file == self.directory(digest).join(DATA);
        let named = file.parent().and_then(Path::file_name).and_then(|name| name.to_str()?.parse::<Digest>().ok());
        if let Some(digest) = named.filter(is_it)
            && let Ok(Some(content)) = self.open(&digest)
        {
            content.touch();
        }
    }

    /// Opens without counting as use.
    pub(crate) fn open(&self, digest: &Digest) -> Result<Option<Content>, StoreError> {
        let directory = self.directory(digest);
        // What is put there from now on is not for this call to clear away.
        let was_there = directory.is_dir();
        let found = State::read(&directory.join(STATE))?;
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|_, inner| inner.strong_count() > 0);
        let live = open.get(&directory).and_then(Weak::upgrade).filter(|inner| inner.is_current(&found));
        let content = match live {
            Some(inner) => Content(inner),
            None => match Inner::open(self.root.clone(), *digest, &directory, found)? {
                Some(inner) => {
                    let inner = Arc::new(inner);
                    open.insert(directory, Arc::downgrade(&inner));
                    Content(inner)
                }
                None => {
                    drop(open);
                    // A file that changed or is gone. If it cannot be forgotten now, it is ignored.
                    if was_there && let Err(error) = self.discard(digest) {
                        tracing::debug!(%digest, %error, "a content whose file is gone cannot be removed");
                    }
                    return Ok(None);
                }
            },
        };
        drop(open);
        content.recover()?;
        Ok(Some(content))
    }

    pub(crate) fn digests(&self) -> Result<Vec<Digest>, StoreError> {
        let entries = match std::fs::read_dir(&self.root) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(StoreError::Io { doing: "read", path: self.root.clone(), source }),
        };
        let named = entries.flatten().filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            name.parse::<Digest>().ok().filter(|digest| digest.to_string() == name)
        });
        let mut digests: Vec<_> = named.collect();
        digests.sort_unstable();
        Ok(digests)
    }

    pub(crate) fn directory(&self, digest: &Digest) -> PathBuf {
        self.root.join(digest.to_string())
    }

    /// The content that a file is known to have, because it was read before or is a content's own.
    fn known(&self, reference: &Reference) -> Result<Option<Content>, StoreError> {
        for digest in self.digests()? {
            let directory = self.directory(&digest);
            let is_remembered = || match State::read(&directory.join(STATE)) {
                Ok(Found::State(state)) => state.references.contains(reference),
                _ => false,
            };
            if reference.path == directory.join(DATA) || is_remembered() {
                return self.find(&digest);
            }
        }
        Ok(None)
    }

    /// An empty directory that nobody sees as a content.
    fn make_place(&self) -> Result<Place, StoreError> {
        files::create_directory(&self.root)?;
        let _all = FileLock::wait(&self.root.join(LOCK))?;
        self.sweep();
        loop {
            let number = PLACES.fetch_add(1, Ordering::Relaxed);
            let path = self.root.join(format!(".new-{}-{number}", std::process::id()));
            match std::fs::create_dir(&path) {
                Ok(()) => return Ok(Place { _lock: FileLock::wait(&path.join(LOCK))?, path }),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(files::write_failed(error, &path, 0)),
            }
        }
    }

    /// Makes a place the one of `digest`.
    fn settle(&self, place: Place, digest: &Digest) -> Result<(), StoreError> {
        let _all = FileLock::wait(&self.root.join(LOCK))?;
        let directory = self.directory(digest);
        match std::fs::rename(&place.path, &directory) {
            Ok(()) => files::sync_parent(&directory),
            // Somebody else was faster; theirs is as good.
            Err(_) if directory.join(STATE).exists() => {
                let _ = std::fs::remove_dir_all(&place.path);
            }
            Err(source) => return Err(StoreError::Io { doing: "rename to", path: directory, source }),
        }
        Ok(())
    }

    /// Removes what is here of a content that gets a new place. What people have signed of it is true there as well.
    fn discard_for(&self, place: &Place, digest: &Digest) -> Result<(), StoreError> {
        signatures::carry(&self.directory(digest), &place.path)?;
        self.discard(digest)
    }

    /// Removes the directory of a content, unless somebody writes to it.
    fn discard(&self, digest: &Digest) -> Result<(), StoreError> {
        let directory = self.directory(digest);
        if !directory.is_dir() {
            return Ok(());
        }
        let _all = FileLock::wait(&self.root.join(LOCK))?;
        let lock_path = directory.join(LOCK);
        let Some(lock) = FileLock::try_take(&lock_path)? else {
            return Err(StoreError::content_in_use(*digest, lock_path));
        };
        // Out of sight as a whole first: half a removal would be half a content.
        let out_of_sight = self.root.join(format!(".gone-{}-{digest}", std::process::id()));
        std::fs::rename(&directory, &out_of_sight).map_err(StoreError::io("remove", &directory))?;
        files::sync_parent(&directory);
        drop(lock);
        self.sweep();
        Ok(())
    }

    /// Removes what was being made or removed by a process that is no more.
    fn sweep(&self) {
        for entry in std::fs::read_dir(&self.root).into_iter().flatten().flatten() {
            let path = entry.path();
            if entry.file_name().as_encoded_bytes().starts_with(b".")
                && let Ok(Some(_lock)) = FileLock::try_take(&path.join(LOCK))
                && let Err(error) = std::fs::remove_dir_all(&path)
            {
                tracing::warn!(path = %path.display(), %error, "cannot remove what an earlier process has left");
            }
        }
    }
}

/// A directory in the making. What is not settled is removed, or swept up later.
struct Place {
    path: PathBuf,
    _lock: FileLock,
}

impl Drop for Place {
    fn drop(&mut self) {
        // After it was settled there is none.
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

fn check_size(digest: Digest, bytes: u64) -> Result<(), StoreError> {
    let why = match bytes {
        0 => "a content has at least one byte".to_owned(),
        1..=CONTENT_BYTES_MAX => return Ok(()),
        _ => format!(
            "{bytes} bytes are more than {}, the most a content may have",
            files::human_bytes(CONTENT_BYTES_MAX)
        ),
    };
    Err(StoreError::ContentSize { digest, why })
}

/// Reads a file through for its digest, and writes its tree.
fn hash_file(
    reference: &Reference,
    tree_path: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Digest, StoreError> {
    let Reference { path, bytes, .. } = reference;
    let file = File::open(path).map_err(StoreError::io("read", path))?;
    let tree_file = File::create_new(tree_path).map_err(|error| files::write_failed(error, tree_path, 0))?;
    let watched = Watched { inner: file, done: 0, total: *bytes, progress };
    let mut outboard = PreOrderOutboard {
        root: blake3::Hash::from_bytes([0; 32]),
        tree: BaoTree::new(*bytes, BLOCK_SIZE),
        data: tree_file,
    };
    match outboard.init_from(BufReader::with_capacity(STREAM_BUFFER_BYTES, watched)) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
        Err(error) if files::is_full(&error) => return Err(files::write_failed(error, tree_path, 0)),
        Err(source) => return Err(StoreError::Io { doing: "read", path: path.clone(), source }),
        Ok(()) if reference.is_unchanged() => {
            outboard.data.sync_all().map_err(|error| files::write_failed(error, tree_path, 0))?;
            return Ok(outboard.root.into());
        }
        Ok(()) => {}
    }
    Err(StoreError::ContentChanged { path: path.clone() })
}

/// Tells how far reading is.
struct Watched<'a, R> {
    inner: R,
    done: u64,
    total: u64,
    progress: &'a mut dyn FnMut(u64, u64),
}

impl<R: Read> Read for Watched<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.done += read as u64;
        (self.progress)(self.done.min(self.total), self.total);
        Ok(read)
    }
}
