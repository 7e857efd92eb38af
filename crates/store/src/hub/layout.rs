//! The hub's cache on disk, as `huggingface_hub` lays it out:
//!
//! ```text
//! models--owner--repo/blobs/<etag>                    the bytes, named by their checksum
//! models--owner--repo/blobs/<etag>.part               an interrupted download
//! models--owner--repo/snapshots/<commit>/<file>       links to blobs
//! models--owner--repo/refs/<revision>                 which commit a branch was
//! ```

use std::{
    io,
    path::{Path, PathBuf},
};

use hf_hub::{Cache, CacheRepo, Repo, RepoType};

use crate::{error::StoreError, files, reference::HubRef, store::delete};

/// One repository in the cache.
pub(super) struct RepoCache {
    repo: CacheRepo,
    root: PathBuf,
}

impl RepoCache {
    pub(super) fn new(cache_dir: &Path, reference: &HubRef) -> Self {
        let repo = Repo::with_revision(reference.repo.clone(), RepoType::Model, reference.revision.clone());
        let root = cache_dir.join(repo.folder_name());
        Self { repo: Cache::new(cache_dir.to_owned()).repo(repo), root }
    }

    pub(super) fn create(&self) -> Result<(), StoreError> {
        files::create_directory(&self.root.join("blobs"))
    }

    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.root.join("blobs").join(etag)
    }

    pub(super) fn partial(&self, etag: &str) -> PathBuf {
        files::with_suffix(&self.blob(etag), ".part")
    }

    pub(super) fn lock(&self, etag: &str) -> PathBuf {
        files::with_suffix(&self.blob(etag), ".lock")
    }

    /// Where `file` of `commit` is found.
    pub(super) fn snapshot(&self, commit: &str, file: &str) -> PathBuf {
        let mut path = self.repo.pointer_path(commit);
        path.extend(file.split('/'));
        path
    }

    /// Whether the bytes are there, whole. Blobs get their name only when they are complete, here and in the other tools.
    pub(super) fn has(&self, etag: &str, size_bytes: u64) -> bool {
        std::fs::metadata(self.blob(etag)).is_ok_and(|meta| meta.is_file() && meta.len() == size_bytes)
    }

    /// Turns a finished download into a blob.
    pub(super) fn complete(&self, etag: &str) -> Result<(), StoreError> {
        let blob = self.blob(etag);
        std::fs::rename(self.partial(etag), &blob).map_err(StoreError::io("rename the download to", &blob))?;
        files::sync_parent(&blob);
        // The lock file is only there for the lock; another puller that waits on it sees the blob next.
        let _ = std::fs::remove_file(self.lock(etag));
        Ok(())
    }

    /// Makes `file` of `commit` point to a blob, and the revision to the commit.
    pub(super) fn link(&self, etag: &str, commit: &str, file: &str) -> Result<(), StoreError> {
        let path = self.snapshot(commit, file);
        if let Some(directory) = path.parent() {
            files::create_directory(directory)?;
        }
        let blob = self.blob(etag);
        let linked = || -> io::Result<()> {
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            link_to_blob(&blob, &path, Path::new(etag), file)
        };
        linked().map_err(StoreError::io("link", &path))?;
        self.repo.create_ref(commit).map_err(StoreError::io("write the revision of", &self.root))
    }
}

/// A relative link, so that the cache can be moved as a whole.
#[cfg(unix)]
fn link_to_blob(_blob: &Path, path: &Path, etag: &Path, file: &str) -> io::Result<()> {
    // From snapshots/<commit>/<directories of file>/ up to the repository's root.
    let mut target = PathBuf::from("../..");
    for _ in file.split('/').skip(1) {
        target.push("..");
    }
    std::os::unix::fs::symlink(target.join("blobs").join(etag), path)
}

/// Where links need a privilege, the same bytes under a second name.
#[cfg(not(unix))]
fn link_to_blob(blob: &Path, path: &Path, _etag: &Path, _file: &str) -> io::Result<()> {
    std::fs::hard_link(blob, path)
}

/// Deletes a file of a snapshot, and its blob when no other snapshot has it; returns the bytes freed.
pub(crate) fn delete_snapshot_file(path: &Path) -> io::Result<u64> {
    let blob = path.canonicalize().ok();
    delete(path)?;
    let Some(snapshots) = path.ancestors().find(|p| p.file_name().is_some_and(|name| name == "snapshots")) else {
        return Ok(0);
    };
    let Some(blob) = blob.filter(|blob| {
        let blobs = snapshots.parent().map(|root| root.join("blobs")).and_then(|blobs| blobs.canonicalize().ok());
        blob.parent() == blobs.as_deref()
    }) else {
        return Ok(0);
    };
    if is_linked_below(snapshots, &blob, 0) { Ok(0) } else { delete(&blob) }
}

fn is_linked_below(directory: &Path, blob: &Path, depth: u32) -> bool {
    /// Directories in a repository are not deeper.
    const DEPTH_MAX: u32 = 16;
    let Ok(entries) = std::fs::read_dir(directory) else {
        return false;
    };
    entries.flatten().any(|entry| {
        let path = entry.path();
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => depth < DEPTH_MAX && is_linked_below(&path, blob, depth + 1),
            _ => path.canonicalize().is_ok_and(|target| target == blob),
        }
    })
}
