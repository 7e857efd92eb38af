//! Ranges of a file on a hub: one more source for a file that comes in parts.
//!
//! Nothing is kept and nothing tried again here: who asks has other sources, and decides when to come back. Whether the bytes
//! are the right ones is theirs to check as well; here is made sure that they are the part that was asked for, of the file
//! that the hub had at the beginning.

use std::{sync::OnceLock, time::Duration};

use bytes::Bytes;
use murmur_gguf::ByteRange;
use reqwest::{Response, StatusCode, header};

use super::{
    HubConfig,
    client::{Client, ContentRange, Failure, RemoteFile},
    select,
};
use crate::{error::StoreError, reference::HubRef};

/// A file on a hub, at one commit.
pub struct HubFile {
    client: Client,
    remote: RemoteFile,
    commit: String,
    /// Of the bytes, where they are sent from. It is another one than the hub's own if that is another host.
    etag: OnceLock<String>,
}

impl HubRef {
    /// The one of these files of its repository that is meant, as the hub would be asked; `None`: none of them, or it is not clear which.
    pub fn choose<'a>(&self, files: &[&'a str]) -> Option<&'a str> {
        select::choose(files, self.wanted.as_deref(), &self.to_string(), "").ok()
    }
}

/// Why a range has not come, or not all of it.
#[derive(Debug, thiserror::Error)]
pub enum RangeError {
    /// The hub is overloaded or cannot be reached, or the transfer stalled or broke off.
    #[error("{endpoint} cannot be used now: {why}. Ask again later, or somebody else")]
    Later {
        /// The hub.
        endpoint: String,
        /// Why.
        why: String,
        /// How long the hub asks to be left alone.
        retry_after: Option<Duration>,
    },
    /// The file is not the one any more that it was.
    #[error("{file} on {endpoint} has changed since it was looked up: {why}. Look it up again")]
    Changed {
        /// The file.
        file: String,
        /// The hub.
        endpoint: String,
        /// What is different.
        why: String,
    },
    /// Asking again would not help.
    #[error(transparent)]
    Final(StoreError),
}

impl HubFile {
    /// Looks a file up on a hub. Tries several times where that may help.
    pub async fn open(config: &HubConfig, wanted: &HubRef) -> Result<Self, StoreError> {
        let client = Client::new(config)?;
        let (commit, file) = client.choose(wanted).await?;
        let remote = client.describe(&wanted.repo, &commit, &file, &wanted.to_string()).await?;
        Ok(Self { client, remote, commit, etag: OnceLock::new() })
    }

    /// Its path in the repository.
    pub fn file(&self) -> &str {
        &self.remote.file
    }

    /// Whether it is one of several files of a model.
    pub fn is_part(&self) -> bool {
        select::split_part(&self.remote.file).is_some()
    }

    /// The commit at which it was looked up.
    pub fn commit(&self) -> &str {
        &self.commit
    }

    /// Its length.
    pub fn bytes(&self) -> u64 {
        self.remote.size_bytes
    }

    /// What the hub says its SHA-256 is, in lower-case hex.
    pub fn sha256(&self) -> Option<&str> {
        self.remote.sha256.as_deref()
    }

    /// Asks for a range, which lies in `0..bytes()`; what lies outside never comes. Dropping the transfer ends it.
    pub async fn range(&self, range: ByteRange) -> Result<Transfer<'_>, RangeError> {
        let range = ByteRange { start: range.start, end: range.end.min(self.bytes()) };
        let left_bytes = range.end.saturating_sub(range.start);
        let response = if left_bytes > 0 { Some(self.ask(range).await?) } else { None };
        Ok(Transfer { file: self, response, piece: Bytes::new(), left_bytes })
    }

    /// An answer whose body is this range of the file.
    async fn ask(&self, range: ByteRange) -> Result<Response, RangeError> {
        let etag = self.etag.get().map(String::as_str);
        let response =
            self.client.get_range(&self.remote, range, etag).await.map_err(|failure| self.failed(failure))?;
        let part = ContentRange::of(&response);
        let total_bytes = match response.status() {
            StatusCode::OK => response.content_length(),
            _ => part.as_ref().and_then(|part| part.total_bytes),
        };
        if let Some(total_bytes) = total_bytes.filter(|total| *total != self.bytes()) {
            return Err(self.changed(format!("it had {} bytes and has {total_bytes}", self.bytes())));
        }
        let now = response.headers().get(header::ETAG).and_then(|value| value.to_str().ok());
        // A weak one does not name bytes.
        if let Some(now) = now.filter(|now| now.starts_with('"')) {
            let first = self.etag.get_or_init(|| now.to_owned());
            if first != now {
                return Err(self.changed(format!("its ETag was {first} and is {now}")));
            }
        }
        match response.status() {
            StatusCode::PARTIAL_CONTENT if part.is_some_and(|part| part.bytes == Some(range)) => Ok(response),
            StatusCode::PARTIAL_CONTENT => Err(self.bad("it sends another range than was asked for")),
            StatusCode::OK if range.end - range.start == self.bytes() => Ok(response),
            StatusCode::OK => Err(self.bad("it sends whole files only, and no ranges of them")),
            status => Err(self.bad(&format!("{status} for a range of {}", self.file()))),
        }
    }

    fn failed(&self, failure: Failure) -> RangeError {
        match failure {
            Failure::Temporary { why, retry_after } => {
                RangeError::Later { endpoint: self.client.config.endpoint().to_owned(), why, retry_after }
            }
            Failure::Final(error) => RangeError::Final(error),
        }
    }

    fn changed(&self, why: String) -> RangeError {
        let endpoint = self.client.config.endpoint().to_owned();
        RangeError::Changed { file: self.file().to_owned(), endpoint, why }
    }

    fn bad(&self, why: &str) -> RangeError {
        RangeError::Final(self.client.bad_answer(why))
    }
}

/// A range of a file on a hub, on its way.
pub struct Transfer<'a> {
    file: &'a HubFile,
    /// `None`: the range is empty.
    response: Option<Response>,
    /// What has come and was not read yet.
    piece: Bytes,
    /// What has not come.
    left_bytes: u64,
}

impl Transfer<'_> {
    /// The next bytes, as many as there are and the buffer takes; 0 when the range is over. What was read before it fails is part of the
    /// range as well. Cancel-safe.
    pub async fn read(&mut self, buffer: &mut [u8]) -> Result<usize, RangeError> {
        while self.piece.is_empty() {
            let Some(response) = &mut self.response else { return Ok(0) };
            match response.chunk().await {
                Ok(Some(piece)) if piece.len() as u64 > self.left_bytes => {
                    return Err(self.file.bad("it sends more bytes than were asked for"));
                }
                Ok(Some(piece)) => {
                    self.left_bytes -= piece.len() as u64;
                    self.piece = piece;
                }
                Ok(None) if self.left_bytes == 0 => return Ok(0),
                Ok(None) => {
                    let why = "the transfer broke off".to_owned();
                    return Err(self.file.failed(Failure::Temporary { why, retry_after: None }));
                }
                Err(error) => return Err(self.file.failed(self.file.client.temporary(&error))),
            }
        }
        let read = buffer.len().min(self.piece.len());
        buffer[..read].copy_from_slice(&self.piece.split_to(read));
        Ok(read)
    }
}
