//! Which labs on this machine are alive, so that what dead ones left behind can be told from what is in use.
//!
//! A lab holds a lock on a file of its own for as long as it lives; the kernel takes the lock away with the process, however it
//! ends. Whoever starts a lab removes what belongs to files that nobody holds. A process number would not do: it is used again.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use crate::{LabError, error::Trying, namespace};

const FOLDER: &str = "/run/murmur-lab";
/// Locked while leases are taken or looked through, so that none is taken for dead between its creation and its lock.
const GUARD: &str = "guard";
/// Leases that one process can hold.
const LEASES_MAX: u32 = 10_000;

/// A name that no other lab on this machine has.
#[derive(Debug)]
pub(crate) struct Lease {
    path: PathBuf,
    prefix: String,
    /// Holds the lock.
    _file: File,
}

impl Lease {
    /// Removes what dead labs left, then takes a name.
    pub(crate) fn take() -> Result<Self, LabError> {
        fs::create_dir_all(FOLDER).trying(|| format!("creating {FOLDER}"))?;
        let guard_path = Path::new(FOLDER).join(GUARD);
        let guard = File::create(&guard_path).trying(|| format!("creating {}", guard_path.display()))?;
        guard.lock().trying(|| format!("locking {}", guard_path.display()))?;
        remove_dead()?;
        for number in 0..LEASES_MAX {
            let name = format!("{}-{number}", std::process::id());
            let path = Path::new(FOLDER).join(&name);
            match File::create_new(&path) {
                Ok(file) => {
                    file.lock().trying(|| format!("locking {}", path.display()))?;
                    return Ok(Self { path, prefix: prefix(&name), _file: file });
                }
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error).trying(|| format!("creating {}", path.display())),
            }
        }
        Err(LabError::Missing(format!("{LEASES_MAX} labs of this process are alive")))
    }

    /// What all namespaces of this lab begin with.
    pub(crate) fn prefix(&self) -> &str {
        &self.prefix
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "the lab's lock file stays");
        }
    }
}

fn prefix(lease: &str) -> String {
    format!("murmur-lab-{lease}-")
}

fn remove_dead() -> Result<(), LabError> {
    let entries = fs::read_dir(FOLDER).trying(|| format!("reading {FOLDER}"))?;
    for entry in entries.flatten().filter(|entry| entry.file_name() != GUARD) {
        let Ok(file) = File::open(entry.path()) else { continue };
        if file.try_lock().is_err() {
            continue;
        }
        let name = entry.file_name();
        tracing::info!(lab = ?name, "removing what a dead lab left");
        namespace::remove_all(&prefix(&name.to_string_lossy()));
        fs::remove_file(entry.path()).trying(|| format!("removing {}", entry.path().display()))?;
    }
    Ok(())
}
