//! The transfer of one file: resumable, verified, and honest about a full disk.
//!
//! The partial file is the whole state. Its length says where to go on, its bytes are hashed again on resume, and it gets its final
//! name only after the checksum matched. Whatever stops a transfer, except a wrong checksum, leaves it in place.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    path::Path,
};

use reqwest::{Response, StatusCode};
use sha2::{Digest, Sha256};

use super::{
    PullEvent,
    client::{Client, ContentRange, Failure, RemoteFile},
};
use crate::{error::StoreError, files};

/// Bytes read at once when a partial file is hashed again.
const HASH_BUFFER_BYTES: usize = 1 << 20;
/// Bytes between two progress events.
const PROGRESS_STEP_BYTES: u64 = 1 << 20;

/// The partial file and what is known of it.
struct Partial<'a> {
    path: &'a Path,
    file: File,
    hasher: Sha256,
    len: u64,
}

/// The SHA-256 of a file, in lower-case hex. `seen` is told how many bytes more were read.
pub(crate) fn sha256_of(path: &Path, seen: &mut dyn FnMut(u64)) -> io::Result<String> {
    Ok(hex(hash(File::open(path)?, seen)?.0))
}

/// Reads to the end; gives the hash so far, and the length.
fn hash(mut from: impl Read, seen: &mut dyn FnMut(u64)) -> io::Result<(Sha256, u64)> {
    let (mut hasher, mut len) = (Sha256::new(), 0);
    let mut buffer = vec![0; HASH_BUFFER_BYTES];
    loop {
        let read = match from.read(&mut buffer) {
            Ok(0) => return Ok((hasher, len)),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        hasher.update(&buffer[..read]);
        len += read as u64;
        seen(read as u64);
    }
}

fn hex(hasher: Sha256) -> String {
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Downloads `remote` into `partial`, going on where an earlier attempt ended.
pub(super) async fn download(
    client: &Client,
    remote: &RemoteFile,
    partial: &Path,
    on_event: &(dyn Fn(PullEvent) + Send + Sync),
) -> Result<(), StoreError> {
    let mut partial = Partial::open(partial, remote.size_bytes).await?;
    // Progress is only what goes beyond the furthest point so far: a server that cannot resume and breaks off at the same place each
    // time must not keep us busy for ever.
    let mut furthest = partial.len;
    let mut fruitless = 0;
    while partial.len < remote.size_bytes {
        match attempt(client, remote, &mut partial, on_event).await {
            Ok(()) => {}
            Err(Failure::Final(error)) => return Err(error),
            Err(Failure::Temporary { why, retry_after }) => {
                fruitless = if partial.len > furthest { 1 } else { fruitless + 1 };
                furthest = furthest.max(partial.len);
                let pause = client.pause(fruitless, &why, retry_after)?;
                on_event(PullEvent::Retrying { pause, why });
                tokio::time::sleep(pause).await;
            }
        }
    }
    on_event(PullEvent::Progress { done_bytes: partial.len, total_bytes: remote.size_bytes });
    partial.file.sync_all().map_err(|error| partial.write_failed(error, remote.size_bytes))?;
    partial.verify(remote)
}

/// One request: ends when the file is whole, or with why it is not.
async fn attempt(
    client: &Client,
    remote: &RemoteFile,
    partial: &mut Partial<'_>,
    on_event: &(dyn Fn(PullEvent) + Send + Sync),
) -> Result<(), Failure> {
    let mut response = client.get_from(remote, partial.len).await?;
    match response.status() {
        StatusCode::PARTIAL_CONTENT if starts_at(&response, partial.len, remote.size_bytes) => {}
        StatusCode::PARTIAL_CONTENT => {
            return Err(Failure::Final(client.bad_answer("it sends another range than was asked for")));
        }
        StatusCode::OK if partial.len == 0 => {}
        StatusCode::OK => partial.restart().map_err(Failure::Final)?,
        StatusCode::RANGE_NOT_SATISFIABLE => {
            partial.restart().map_err(Failure::Final)?;
            return Err(Failure::Temporary {
                why: "the hub does not accept where the partial file ends".to_owned(),
                retry_after: None,
            });
        }
        status => {
            return Err(Failure::Final(client.bad_answer(&format!("{status} for {}", remote.file))));
        }
    }
    let total_bytes = remote.size_bytes;
    let mut told = partial.len;
    while let Some(piece) = response.chunk().await.map_err(|error| client.temporary(&error))? {
        if piece.len() as u64 > total_bytes - partial.len {
            partial.restart().map_err(Failure::Final)?;
            return Err(Failure::Final(
                client.bad_answer(&format!("more bytes than {total_bytes} for {}", remote.file)),
            ));
        }
        partial.append(&piece).map_err(|error| Failure::Final(partial.write_failed(error, total_bytes)))?;
        if partial.len - told >= PROGRESS_STEP_BYTES {
            told = partial.len;
            on_event(PullEvent::Progress { done_bytes: partial.len, total_bytes });
        }
    }
    if partial.len < total_bytes {
        return Err(Failure::Temporary { why: "the transfer broke off".to_owned(), retry_after: None });
    }
    Ok(())
}

/// Whether a partial answer is the part that was asked for.
fn starts_at(response: &Response, offset: u64, total_bytes: u64) -> bool {
    ContentRange::of(response).is_some_and(|part| {
        let starts_there = part.bytes.is_some_and(|bytes| bytes.start == offset);
        starts_there && part.total_bytes.is_none_or(|total| total == total_bytes)
    })
}

impl<'a> Partial<'a> {
    /// Opens what is there, hashes it, and is ready to append. More bytes than the file has are not a part of it.
    async fn open(path: &'a Path, total_bytes: u64) -> Result<Self, StoreError> {
        let failed = |source| StoreError::Io { doing: "open the partial download", path: path.to_owned(), source };
        let mut file =
            OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path).map_err(failed)?;
        if file.metadata().map_err(failed)?.len() > total_bytes {
            file.set_len(0).map_err(failed)?;
        }
        let kept_bytes = file.metadata().map_err(failed)?.len();
        // Gigabytes, perhaps: not on the thread that serves others.
        let hashed = tokio::task::spawn_blocking(move || -> io::Result<(File, Sha256, u64)> {
            file.seek(SeekFrom::Start(0))?;
            let (hasher, len) = hash((&file).take(kept_bytes), &mut |_| {})?;
            file.seek(SeekFrom::Start(len))?;
            Ok((file, hasher, len))
        });
        let (file, hasher, len) = hashed.await.map_err(|error| failed(io::Error::other(error)))?.map_err(failed)?;
        Ok(Self { path, file, hasher, len })
    }

    fn append(&mut self, piece: &[u8]) -> io::Result<()> {
        // A write that fails half way leaves bytes that are neither counted nor hashed: cut them off, so that the file's length is
        // the truth for the next attempt.
        if let Err(error) = self.file.write_all(piece) {
            let _ = self.file.set_len(self.len);
            return Err(error);
        }
        self.hasher.update(piece);
        self.len += piece.len() as u64;
        Ok(())
    }

    fn restart(&mut self) -> Result<(), StoreError> {
        self.file
            .set_len(0)
            .and_then(|()| self.file.seek(SeekFrom::Start(0)))
            .map_err(StoreError::io("empty the partial download", self.path))?;
        self.hasher = Sha256::new();
        self.len = 0;
        Ok(())
    }

    fn write_failed(&self, source: io::Error, total_bytes: u64) -> StoreError {
        let directory = self.path.parent().unwrap_or(self.path).to_owned();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => StoreError::NoSpace {
                needs: format!("{} more are needed", files::human_bytes(total_bytes - self.len)),
                available: match files::available_bytes(&directory) {
                    Some(bytes) => format!("{} are free", files::human_bytes(bytes)),
                    None => "the disk is full".to_owned(),
                },
                path: directory,
                place: "HF_HOME",
                kept: format!(" The {} that are there are kept: pull again to go on.", files::human_bytes(self.len)),
            },
            _ => StoreError::Io { doing: "write", path: self.path.to_owned(), source },
        }
    }

    fn verify(self, remote: &RemoteFile) -> Result<(), StoreError> {
        let Some(want) = &remote.sha256 else {
            tracing::warn!(file = remote.file, "the hub publishes no SHA-256 for this file: only its size was checked");
            return Ok(());
        };
        let got = hex(self.hasher);
        if got == *want {
            return Ok(());
        }
        // Nothing in it can be trusted; kept, it would spoil the next attempt too.
        let _ = std::fs::remove_file(self.path);
        Err(StoreError::WrongChecksum { file: remote.file.clone(), want: want.clone(), got })
    }
}
