//! What people have signed of a content: bytes that this crate does not understand, so whoever reads them checks them. They stay for as
//! long as something of the content is here, and are on disk before anybody is told that they are kept.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use data_encoding::HEXLOWER;
use serde::{Deserialize, Serialize};

use super::{Content, LOCK, state};
use crate::{
    error::StoreError,
    files::{self, FileLock},
};

/// File of a content's directory.
pub(super) const SIGNATURES: &str = "signatures";
/// The layout that this code writes. Those in a newer one are not seen.
const SIGNATURES_VERSION: u32 = 1;
/// A file larger than this is not ours.
const SIGNATURES_BYTES_MAX: u64 = 1 << 20;

#[derive(Serialize, Deserialize)]
struct Signatures {
    version: u32,
    /// Each in hexadecimal digits.
    signed: Vec<String>,
}

impl Content {
    /// What is kept of what people have signed, in the order in which it was [put](Self::change_signatures). What was damaged on disk is
    /// not there any more: somebody else may have it.
    ///
    /// # Errors
    /// [`StoreError::Io`] if it cannot be read.
    pub fn signatures(&self) -> Result<Vec<Vec<u8>>, StoreError> {
        read(&self.0.directory.join(SIGNATURES))
    }

    /// Changes what is kept of what people have signed. No other process does so meanwhile, whoever writes to the content.
    ///
    /// # Errors
    /// [`StoreError::ContentGone`] if the content was removed, and others if it cannot be written.
    pub fn change_signatures(&self, change: impl FnOnce(Vec<Vec<u8>>) -> Vec<Vec<u8>>) -> Result<(), StoreError> {
        let _all = FileLock::wait(&self.0.root.join(LOCK))?;
        if !self.0.directory.is_dir() {
            return Err(StoreError::ContentGone { digest: self.digest() });
        }
        let path = self.0.directory.join(SIGNATURES);
        let known = read(&path)?;
        let changed = change(known.clone());
        if changed == known {
            return Ok(());
        }
        let signed = changed.iter().map(|bytes| HEXLOWER.encode(bytes)).collect();
        state::write_sealed(&Signatures { version: SIGNATURES_VERSION, signed }, &path)
    }
}

/// Takes along what was signed when a content gets another place.
pub(super) fn carry(from: &Path, to: &Path) -> Result<(), StoreError> {
    let (from, to) = (from.join(SIGNATURES), to.join(SIGNATURES));
    match std::fs::copy(&from, &to) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(files::write_failed(error, &to, 0)),
    }
}

fn read(path: &Path) -> Result<Vec<Vec<u8>>, StoreError> {
    let mut text = Vec::new();
    match File::open(path).and_then(|file| file.take(SIGNATURES_BYTES_MAX + 1).read_to_end(&mut text)) {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(StoreError::Io { doing: "read", path: path.to_owned(), source }),
    }
    let read = state::unsealed(&text).and_then(|json| serde_json::from_slice::<Signatures>(json).ok());
    let Some(known) = read.filter(|read| read.version == SIGNATURES_VERSION) else {
        tracing::warn!(path = %path.display(), "what was signed of a content cannot be read, and is fetched or signed anew");
        return Ok(Vec::new());
    };
    Ok(known.signed.iter().filter_map(|digits| HEXLOWER.decode(digits.as_bytes()).ok()).collect())
}
