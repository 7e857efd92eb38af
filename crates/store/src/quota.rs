//! What goes when room is short. The store's quota is a limit for what was downloaded, from peers and from hubs; it is written
//! down in the index, as pins are, since all processes that download into one store have to keep the same one.
//!
//! The user's own files never count and never go: not what was imported, not copies, not what another tool had put into the hub's cache.
//! Nor does what is pinned or in use. A file is in use while a process [holds](Hold) it, or writes to it. That is a lock of the system's, so
//! all processes with this store see it, and it ends with the process that has it.

use std::{
    collections::BTreeMap,
    fs::File,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use murmur_gguf::Digest;

use crate::{
    content::ContentEntry,
    error::StoreError,
    files,
    hub::layout,
    index::{Index, ModelEntry, Origin},
    reference::ModelName,
    store::Store,
};

/// Names in a message at most.
const NAMES_SHOWN_MAX: usize = 8;
/// Hexadecimal digits of a digest in a message.
const DIGEST_DIGITS: usize = 16;

/// Files that this process has found by their names, held for as long as it runs.
static HELD: Mutex<BTreeMap<PathBuf, Hold>> = Mutex::new(BTreeMap::new());

/// A file that is used: while this is there, no process removes it to make room.
#[derive(Debug)]
pub struct Hold {
    _locked: File,
}

impl Hold {
    /// Holds the file at a path. Waits while somebody decides whether to remove it. `None`: there is none, or not any more.
    pub fn on(path: &Path) -> Option<Self> {
        let file = File::open(path).ok()?;
        // Where there are no locks, nobody removes anything.
        if let Err(error) = file.lock_shared() {
            tracing::debug!(path = %path.display(), %error, "a file that is used cannot be locked");
        }
        files::is_at(&file, path).then_some(Self { _locked: file })
    }
}

/// A file that was downloaded into the store, from peers or from a hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Download {
    /// Its names in the store; those stay when it goes, and can be pulled again.
    pub names: Vec<ModelName>,
    /// BLAKE3 of the whole file, if it came from peers.
    pub digest: Option<Digest>,
    /// The file.
    pub path: PathBuf,
    /// Bytes on the disk.
    pub bytes: u64,
    /// Whether all of it is here.
    pub is_whole: bool,
    /// When it was last used.
    pub used: SystemTime,
    /// Why it stays, if it does.
    pub stays: Option<Stays>,
}

impl Download {
    /// What it is called where it has no name.
    pub fn nameless(&self) -> String {
        match &self.digest {
            Some(digest) => digest.to_string().chars().take(DIGEST_DIGITS).collect(),
            None => self.path.display().to_string(),
        }
    }
}

/// Why a download does not go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stays {
    /// The user wants it to, or has imported the file.
    Pinned,
    /// Somebody uses it now.
    InUse,
}

/// What went to make room.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Collected {
    /// What was removed, with the bytes that this has freed.
    pub removed: Vec<Download>,
    /// Bytes freed.
    pub freed_bytes: u64,
    /// Bytes that downloads still take: more than the quota, if too much is pinned or in use.
    pub left_bytes: u64,
}

impl Store {
    /// Bytes that downloads may take; `None`: any number.
    pub fn quota(&self) -> Result<Option<u64>, StoreError> {
        Ok(Index::read(&self.index_path())?.quota_bytes)
    }

    /// Sets the quota. Nothing is removed before somebody [collects](Store::collect) or [makes room](Store::make_room).
    pub fn set_quota(&self, quota_bytes: Option<u64>) -> Result<(), StoreError> {
        self.update(|index| {
            index.quota_bytes = quota_bytes;
            Ok(())
        })
    }

    /// Everything that was downloaded, in the order in which it goes: first what is not whole, then what was not used for longest.
    pub fn downloads(&self) -> Result<Vec<Download>, StoreError> {
        let models = self.list()?;
        let contents = self.contents().list()?;
        let own = contents.iter().filter(|content| !content.is_reference);
        let mut downloads: Vec<Download> = own.map(|content| from_peers(content, &models)).collect();
        downloads.extend(from_hubs(&models));
        downloads.sort_by(|a, b| (a.is_whole, a.used, &a.path).cmp(&(b.is_whole, b.used, &b.path)));
        Ok(downloads)
    }

    /// Removes downloads until they take no more than `quota_bytes`, in the order of [`Store::downloads`]. Never what is pinned,
    /// held or being written to. Room is free when the last handle of a content is dropped, in whatever process.
    pub fn collect(&self, quota_bytes: u64) -> Result<Collected, StoreError> {
        self.collect_of(self.downloads()?, quota_bytes)
    }

    /// Makes room for `needs_bytes` more than there are, if the store has a quota. Where they cannot fit, nothing is removed, and the
    /// error says what stands in the way.
    pub fn make_room(&self, needs_bytes: u64) -> Result<Collected, StoreError> {
        let Some(quota_bytes) = self.quota()? else { return Ok(Collected::default()) };
        let downloads = self.downloads()?;
        let staying: Vec<&Download> = downloads.iter().filter(|download| download.stays.is_some()).collect();
        let staying_bytes: u64 = staying.iter().map(|download| download.bytes).sum();
        let refused = |kept_bytes: u64, kept: String| StoreError::OverQuota {
            needs: files::human_bytes(needs_bytes),
            quota: files::human_bytes(quota_bytes),
            kept: match kept_bytes {
                0 => String::new(),
                bytes => {
                    format!(", of which {} stay because they are pinned or in use: {kept}", files::human_bytes(bytes))
                }
            },
        };
        let Some(left_max) = quota_bytes.checked_sub(needs_bytes).filter(|max| staying_bytes <= *max) else {
            return Err(refused(staying_bytes, listed(staying.into_iter())));
        };
        let collected = self.collect_of(downloads, left_max)?;
        if collected.left_bytes > left_max {
            // Somebody has taken it in hand meanwhile.
            let left = self.downloads()?;
            return Err(refused(collected.left_bytes, listed(left.iter())));
        }
        Ok(collected)
    }

    /// What could go if more room were wanted, in words; `None`: nothing. For messages: what cannot be read cannot go.
    pub(crate) fn could_go(&self) -> Option<String> {
        let downloads = self.downloads().unwrap_or_default();
        let free: Vec<&Download> = downloads.iter().filter(|download| download.stays.is_none()).collect();
        (!free.is_empty()).then(|| listed(free.into_iter()))
    }

    fn collect_of(&self, downloads: Vec<Download>, left_max: u64) -> Result<Collected, StoreError> {
        let mut collected =
            Collected { left_bytes: downloads.iter().map(|download| download.bytes).sum(), ..Collected::default() };
        for download in downloads {
            if collected.left_bytes <= left_max {
                break;
            }
            if download.stays.is_some() {
                continue;
            }
            let Some(bytes) = self.let_go(&download)? else { continue };
            collected.freed_bytes += bytes;
            collected.left_bytes -= download.bytes;
            collected.removed.push(Download { bytes, ..download });
        }
        Ok(collected)
    }

    /// Removes a download; returns the bytes freed, which are none where another tool has the same file as well. `None`: somebody has
    /// begun to use it.
    fn let_go(&self, download: &Download) -> Result<Option<u64>, StoreError> {
        // Kept until the file is gone: who wants to use it waits, and finds out.
        let Some(_lock) = lock_unused(&download.path) else { return Ok(None) };
        if let Some(digest) = &download.digest {
            return match self.contents().remove(digest) {
                Ok(bytes) => Ok(Some(bytes)),
                Err(StoreError::ContentInUse { .. }) => Ok(None),
                Err(error) => Err(error),
            };
        }
        // As the names are now: one may have been pulled anew.
        let mut bytes = 0;
        for model in self.list()?.iter().filter(|model| download.names.contains(&model.name)) {
            if model.path.canonicalize().is_ok_and(|path| path == download.path) {
                bytes += layout::delete_snapshot_file(&model.path).map_err(StoreError::io("delete", &model.path))?;
            }
        }
        Ok(Some(bytes))
    }
}

fn from_peers(content: &ContentEntry, models: &[ModelEntry]) -> Download {
    let is_it = |model: &&ModelEntry| model.origin == Origin::Mesh { digest: content.digest };
    let entries: Vec<&ModelEntry> = models.iter().filter(is_it).collect();
    let is_kept = entries.iter().any(|entry| entry.pinned);
    let stays = stays(is_kept, &content.path);
    Download {
        names: entries.into_iter().map(|entry| entry.name.clone()).collect(),
        digest: Some(content.digest),
        path: content.path.clone(),
        bytes: content.held_bytes,
        is_whole: content.held_bytes == content.bytes,
        used: content.used,
        stays,
    }
}

/// What murmur has downloaded from hubs and is here. A file may have several names.
fn from_hubs(models: &[ModelEntry]) -> Vec<Download> {
    let mut by_file: BTreeMap<PathBuf, Vec<&ModelEntry>> = BTreeMap::new();
    for model in models {
        if let Ok(path) = model.path.canonicalize() {
            by_file.entry(path).or_default().push(model);
        }
    }
    let is_ours = |entry: &&ModelEntry| matches!(entry.origin, Origin::Hub { downloaded: true, .. });
    let downloads = by_file.into_iter().filter(|(_, entries)| entries.iter().any(is_ours));
    downloads
        .filter_map(|(path, entries)| {
            let bytes = path.metadata().ok()?.len();
            let ours: Vec<&Path> = entries.iter().copied().filter(is_ours).map(|entry| entry.path.as_path()).collect();
            // What was imported is the user's, and what lies at another place in the hub's cache is another tool's.
            let is_kept = |entry: &&ModelEntry| {
                let is_from_hub = matches!(entry.origin, Origin::Hub { .. });
                entry.pinned || !is_from_hub || !ours.contains(&entry.path.as_path())
            };
            let stays = stays(entries.iter().any(is_kept), &path);
            let used_unix_s = entries.iter().map(|entry| entry.used_unix_s.max(entry.added_unix_s)).max();
            Some(Download {
                names: entries.into_iter().map(|entry| entry.name.clone()).collect(),
                digest: None,
                path,
                bytes,
                is_whole: true,
                used: UNIX_EPOCH + Duration::from_secs(used_unix_s.unwrap_or(0)),
                stays,
            })
        })
        .collect()
}

fn stays(is_kept: bool, path: &Path) -> Option<Stays> {
    match is_kept {
        true => Some(Stays::Pinned),
        false => lock_unused(path).is_none().then_some(Stays::InUse),
    }
}

/// Names with sizes, for a message.
fn listed<'a>(downloads: impl ExactSizeIterator<Item = &'a Download>) -> String {
    let count = downloads.len();
    let shown = downloads.take(NAMES_SHOWN_MAX).map(|download| {
        let name = download.names.first().map_or_else(|| download.nameless(), ToString::to_string);
        format!("{name} ({})", files::human_bytes(download.bytes))
    });
    let mut text = shown.collect::<Vec<_>>().join(", ");
    if count > NAMES_SHOWN_MAX {
        text.push_str(&format!(" and {} more", count - NAMES_SHOWN_MAX));
    }
    text
}

/// Holds a file for as long as this process runs. False: there is none.
pub(crate) fn hold(path: &Path) -> bool {
    let Ok(path) = path.canonicalize() else { return false };
    let Some(held) = Hold::on(&path) else { return false };
    // Always the one that lies there now: one of the same name may have gone before.
    HELD.lock().unwrap_or_else(PoisonError::into_inner).insert(path, held);
    true
}

/// A lock on a file that nobody uses. `None`: somebody does, or nobody can tell.
fn lock_unused(path: &Path) -> Option<File> {
    let file = File::open(path).ok()?;
    file.try_lock().ok()?;
    Some(file)
}
