//! Small private files: keys, credentials, the ledger of invitations.
//!
//! All of them decide who somebody is, so each is readable by its owner only and appears whole or not at all: it is
//! written to a temporary file beside its place, flushed to disk and renamed. Two processes that start at once on an
//! empty folder agree on one key, because the second finds the first's.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::NetError;

/// Longest private file that is read; anything longer is not ours.
const FILE_BYTES_MAX: u64 = 1024 * 1024;

/// Bytes of `path`, or `None` when there is no such file.
pub(crate) fn read(path: &Path) -> Result<Option<Vec<u8>>, NetError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(NetError::file(path, error)),
    };
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(|error| NetError::file(path, error))?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(NetError::CorruptFile {
            path: path.to_owned(),
            reason: "it is larger than any file of ours".into(),
        });
    }
    Ok(Some(bytes))
}

/// Replaces `path` by `bytes`, readable by its owner only.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> Result<(), NetError> {
    let file = written(path, bytes)?;
    file.persist(path).map_err(|error| NetError::file(path, error.error))?;
    Ok(())
}

/// Creates `path` with `bytes`. False when somebody else created it first; the file is then left as it is.
pub(crate) fn create(path: &Path, bytes: &[u8]) -> Result<bool, NetError> {
    let file = written(path, bytes)?;
    match file.persist_noclobber(path) {
        Ok(_) => Ok(true),
        Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(NetError::file(path, error.error)),
    }
}

/// The value that `path` holds as JSON, or `None` when there is no such file.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, NetError> {
    let Some(bytes) = read(path)? else { return Ok(None) };
    let value = serde_json::from_slice(&bytes)
        .map_err(|error| NetError::CorruptFile { path: path.to_owned(), reason: error.to_string() })?;
    Ok(Some(value))
}

/// Replaces `path` by `value` as JSON.
pub(crate) fn replace_json<T: Serialize>(path: &Path, value: &T) -> Result<(), NetError> {
    let bytes = serde_json::to_vec_pretty(value)
        .map_err(|error| NetError::CorruptFile { path: path.to_owned(), reason: error.to_string() })?;
    replace(path, &bytes)
}

/// A 32-byte secret kept in `path` as hex; `generate` makes it on first use.
pub(crate) fn secret(path: &Path, generate: impl FnOnce() -> [u8; 32]) -> Result<[u8; 32], NetError> {
    if let Some(secret) = read_secret(path)? {
        return Ok(secret);
    }
    let secret = generate();
    let text = data_encoding::HEXLOWER.encode(&secret);
    if create(path, text.as_bytes())? {
        return Ok(secret);
    }
    read_secret(path)?.ok_or_else(|| NetError::CorruptFile { path: path.to_owned(), reason: "it vanished".into() })
}

fn read_secret(path: &Path) -> Result<Option<[u8; 32]>, NetError> {
    let Some(bytes) = read(path)? else { return Ok(None) };
    let corrupt = |reason: &str| NetError::CorruptFile { path: path.to_owned(), reason: reason.into() };
    let decoded = data_encoding::HEXLOWER_PERMISSIVE
        .decode(bytes.trim_ascii())
        .map_err(|_| corrupt("it should be 64 hexadecimal digits"))?;
    decoded.try_into().map(Some).map_err(|_| corrupt("it should be 64 hexadecimal digits"))
}

fn written(path: &Path, bytes: &[u8]) -> Result<tempfile::NamedTempFile, NetError> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder).map_err(|error| NetError::file(folder, error))?;
    // Temporary files are created with mode 0600, and renaming keeps it.
    let mut file = tempfile::NamedTempFile::new_in(folder).map_err(|error| NetError::file(folder, error))?;
    file.write_all(bytes).map_err(|error| NetError::file(path, error))?;
    file.as_file().sync_all().map_err(|error| NetError::file(path, error))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_made_once_and_then_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("node.key");
        assert_eq!(secret(&path, || [7; 32]).unwrap(), [7; 32]);
        assert_eq!(secret(&path, || [8; 32]).unwrap(), [7; 32]);
    }

    #[test]
    fn a_corrupted_secret_is_an_error_that_names_the_file_and_never_a_new_identity() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("node.key");
        for content in ["", "abc", "zz", &"0".repeat(63), &"0".repeat(66)] {
            fs::write(&path, content).unwrap();
            let error = secret(&path, || [1; 32]).unwrap_err();
            assert!(error.to_string().contains("node.key"), "{error}");
            assert_eq!(fs::read_to_string(&path).unwrap(), *content);
        }
    }

    #[test]
    fn creating_never_overwrites() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        assert!(create(&path, b"first").unwrap());
        assert!(!create(&path, b"second").unwrap());
        assert_eq!(read(&path).unwrap().unwrap(), b"first");
    }

    #[cfg(unix)]
    #[test]
    fn private_files_are_readable_by_their_owner_only() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        replace(&path, b"secret").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }
}
