//! File work that must not go half wrong: atomic replacement, room on the disk, locks between processes.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
};

use crate::error::StoreError;

/// Bytes a normal user may still write in the file system of `path`, or of its nearest parent that exists; `None` when the
/// system does not say.
pub fn available_bytes(path: &Path) -> Option<u64> {
    let existing = path.ancestors().find(|p| p.exists()).unwrap_or(Path::new("."));
    #[cfg(unix)]
    {
        let stat = rustix::fs::statvfs(existing).ok()?;
        stat.f_bavail.checked_mul(stat.f_frsize)
    }
    #[cfg(not(unix))]
    {
        let _ = existing;
        None
    }
}

/// Refuses work for which `path` has no room. `place` tells how to choose another one.
pub(crate) fn demand_space(path: &Path, needs_bytes: u64, place: &'static str) -> Result<(), StoreError> {
    /// Room that is left for everything else on the machine.
    const RESERVE_BYTES: u64 = 64 << 20;
    match available_bytes(path) {
        Some(available) if available < needs_bytes.saturating_add(RESERVE_BYTES) => Err(StoreError::NoSpace {
            path: path.to_owned(),
            needs: format!("{} are needed", human_bytes(needs_bytes)),
            available: format!(
                "{} are free and {} of them are left for everything else, so {} are missing",
                human_bytes(available),
                human_bytes(RESERVE_BYTES),
                human_bytes(needs_bytes.saturating_add(RESERVE_BYTES) - available)
            ),
            place,
            kept: String::new(),
        }),
        _ => Ok(()),
    }
}

/// Replaces `path` by `content` so that a reader, or a crash, sees the old or the new file and nothing between. One at a time: the caller
/// holds a lock.
pub(crate) fn replace_file(path: &Path, content: &[u8]) -> Result<(), StoreError> {
    let temporary = path.with_extension("tmp");
    let written = File::create(&temporary).and_then(|mut file| {
        file.write_all(content)?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)
    });
    if let Err(source) = written {
        // The first failure is the one to tell; the leftover is harmless.
        let _ = std::fs::remove_file(&temporary);
        return Err(write_failed(source, path, content.len() as u64));
    }
    sync_parent(path);
    Ok(())
}

/// Why `path`, in the data directory, could not be written to; `needs_bytes` more were to come, if that is known and not 0.
pub(crate) fn write_failed(source: io::Error, path: &Path, needs_bytes: u64) -> StoreError {
    if !is_full(&source) {
        return StoreError::Io { doing: "write", path: path.to_owned(), source };
    }
    let directory = path.parent().unwrap_or(path).to_owned();
    StoreError::NoSpace {
        needs: if needs_bytes == 0 {
            "more is needed".to_owned()
        } else {
            format!("{} more are needed", human_bytes(needs_bytes))
        },
        available: match available_bytes(&directory) {
            Some(bytes) => format!("{} are free", human_bytes(bytes)),
            None => "the disk is full".to_owned(),
        },
        path: directory,
        place: "--data-dir",
        kept: " What has arrived is kept.".to_owned(),
    }
}

pub(crate) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Makes a rename durable. Best effort: not every file system lets a directory be synced.
pub(crate) fn sync_parent(path: &Path) {
    if let Some(Ok(directory)) = path.parent().map(File::open) {
        let _ = directory.sync_all();
    }
}

/// A lock between processes, held until dropped (and by the kernel dropped with the process). The file says who has it.
#[derive(Debug)]
pub(crate) struct FileLock {
    _file: File,
}

impl FileLock {
    /// Waits for the lock.
    pub(crate) fn wait(path: &Path) -> Result<Self, StoreError> {
        let file = open_lock(path).map_err(StoreError::io("open the lock", path))?;
        file.lock().map_err(StoreError::io("lock", path))?;
        Ok(Self { _file: file })
    }

    /// Takes the lock if nobody has it.
    pub(crate) fn try_take(path: &Path) -> Result<Option<Self>, StoreError> {
        let file = open_lock(path).map_err(StoreError::io("open the lock", path))?;
        match file.try_lock() {
            Ok(()) => {
                // For whoever is refused; a lock is one without it, too.
                let _ = file.set_len(0).and_then(|()| write!(&file, "{}", std::process::id()));
                Ok(Some(Self { _file: file }))
            }
            Err(std::fs::TryLockError::WouldBlock) => Ok(None),
            Err(std::fs::TryLockError::Error(source)) => {
                Err(StoreError::Io { doing: "lock", path: path.to_owned(), source })
            }
        }
    }
}

/// Who holds a lock, in words.
pub(crate) fn lock_holder(path: &Path) -> String {
    let number = std::fs::read_to_string(path).ok().and_then(|text| text.parse::<u32>().ok());
    number.map_or_else(|| "another process".to_owned(), |number| format!("process {number}"))
}

fn open_lock(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).truncate(false).write(true).open(path)
}

/// Whether an open file has not been removed from its path. Not every file system has numbers of files that stay, so they are not compared.
pub(crate) fn is_at(file: &File, path: &Path) -> bool {
    #[cfg(unix)]
    let is_linked = {
        use std::os::unix::fs::MetadataExt;
        file.metadata().is_ok_and(|open| open.nlink() > 0)
    };
    #[cfg(not(unix))]
    let is_linked = file.metadata().is_ok();
    is_linked && path.exists()
}

/// Whether what is written at both paths takes room on the same disk. Where nobody says: it does.
pub(crate) fn is_same_disk(a: &Path, b: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let disk = |path: &Path| path.ancestors().find_map(|path| Some(std::fs::metadata(path).ok()?.dev()));
        disk(a) == disk(b)
    }
    #[cfg(not(unix))]
    {
        let _ = (a, b);
        true
    }
}

/// Creates a directory and its parents.
pub(crate) fn create_directory(path: &Path) -> Result<(), StoreError> {
    std::fs::create_dir_all(path).map_err(StoreError::io("create the directory", path))
}

/// `path` with more at the end of its file name.
pub(crate) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// Sizes as people say them.
pub(crate) fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} bytes");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}
