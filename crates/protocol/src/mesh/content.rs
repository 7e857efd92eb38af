//! Bytes of model files between nodes: who has which, and how they travel.
//!
//! ```text
//! taker                       holder
//!   WatchContent    ->
//!                   <-   Content, and again when more has come or went, until either ends the stream: all that is there, or what has come since
//!
//!   Fetch           ->
//!                   <-   Sending, then the encoded bytes and the end of the stream; or Refused
//!
//!   Fetch, of hashes only
//!                   <-   Sending, then the pairs of hashes that would be between the groups; or Refused
//! ```
//!
//! A file is known by the BLAKE3 digest of all of it. What is fetched comes in the combined encoding of verified streaming (the BLAKE3
//! paper, section 6.4; `bao-tree`), with groups of [`GROUP_BYTES`]: whoever takes it checks each group against the digest before
//! it is kept, so that it does not matter who sent it. Hashes alone are for whoever takes the bytes from a hub, which has none.

use std::ops::Range;

use super::body::Body;
use super::check;
use super::error::MessageError;
use super::id::ModelDigest;
use super::model::MODEL_NAME_BYTES_MAX;
use super::proto;

/// Bytes that are checked together. A file's last group may be shorter.
pub const GROUP_BYTES: u64 = 16 * 1024;
/// Contents that a record lists.
pub const CONTENTS_MAX: usize = 16;
/// Stretches that a holder tells of one content; of more, the longest are told.
pub const HELD_RANGES_MAX: usize = 1_024;
/// Stretches that are asked for at once.
pub const FETCH_RANGES_MAX: usize = 64;
/// Length of a source: as of an owner, a repository, a commit and a file whose names are long.
pub const SOURCE_BYTES_MAX: usize = 256;
/// Longest file.
pub const FILE_BYTES_MAX: u64 = 1 << 42;

/// A model's file in a node's record: it is there, or a part of it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldContent {
    /// Which file.
    pub digest: ModelDigest,
    /// What the holder calls the model, 1..=[`MODEL_NAME_BYTES_MAX`] bytes.
    pub name: String,
    /// Bytes of the whole file, 1..=[`FILE_BYTES_MAX`].
    pub file_bytes: u64,
    /// Bytes of it that are there.
    pub held_bytes: u64,
    /// Where a hub has it, at which commit, as the holder says: `hf:owner/repo@commit:file`, 1..=[`SOURCE_BYTES_MAX`] bytes. Not checked to be a
    /// reference.
    pub source: Option<String>,
}

impl HeldContent {
    fn check(&self) -> Result<(), MessageError> {
        if self.name.is_empty() {
            return Err(MessageError::Missing("model name"));
        }
        check::text("model name", &self.name, MODEL_NAME_BYTES_MAX)?;
        check_file_bytes(self.file_bytes)?;
        if self.held_bytes > self.file_bytes {
            return Err(MessageError::Invalid { what: "held bytes", why: "they are more than the file has" });
        }
        match self.source.as_deref() {
            Some("") => Err(MessageError::Missing("source")),
            Some(source) => check::text("source", source, SOURCE_BYTES_MAX),
            None => Ok(()),
        }
    }

    pub(super) fn to_proto(&self) -> Result<proto::HeldContent, MessageError> {
        self.check()?;
        let Self { digest, name, file_bytes, held_bytes, source } = self;
        Ok(proto::HeldContent {
            digest: digest.as_bytes().to_vec(),
            name: name.clone(),
            file_bytes: *file_bytes,
            held_bytes: *held_bytes,
            source: source.clone(),
        })
    }

    pub(super) fn from_proto(proto: proto::HeldContent) -> Result<HeldContent, MessageError> {
        let content = HeldContent {
            digest: ModelDigest::from_bytes(check::array("model digest", &proto.digest)?),
            name: proto.name,
            file_bytes: proto.file_bytes,
            held_bytes: proto.held_bytes,
            source: proto.source,
        };
        content.check()?;
        Ok(content)
    }
}

/// What a node has of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Content {
    /// Bytes of the whole file, 1..=[`FILE_BYTES_MAX`]. A claim, until the last group was checked.
    pub file_bytes: u64,
    /// Bytes before the tensors, at most `file_bytes`: what to fetch first. A hint.
    pub header_bytes: u64,
    /// What is there: ascending, apart from each other, at most [`HELD_RANGES_MAX`].
    pub held: Vec<Range<u64>>,
    /// Whether hashes alone of what is there can be had.
    pub gives_hashes: bool,
    /// `held` is what has come since the message before, and all else is still there. Only for whoever has asked for
    /// [news](WatchContent::only_news).
    pub is_news: bool,
}

impl Body for Content {
    type Proto = proto::Content;
    const WHAT: &'static str = "content";
    // Two numbers of up to 7 bytes each.
    const BYTES_MAX: usize = HELD_RANGES_MAX * 14 + 64;

    fn to_proto(&self) -> Result<proto::Content, MessageError> {
        let proto = proto::Content {
            file_bytes: self.file_bytes,
            header_bytes: self.header_bytes,
            held: stretches_to_proto(&self.held),
            gives_hashes: self.gives_hashes,
            is_news: self.is_news,
        };
        Content::from_proto(proto.clone())?;
        Ok(proto)
    }

    fn from_proto(proto: proto::Content) -> Result<Content, MessageError> {
        let proto::Content { file_bytes, header_bytes, held, gives_hashes, is_news } = proto;
        check_file_bytes(file_bytes)?;
        let held = stretches_from_proto(&held, HELD_RANGES_MAX)?;
        if header_bytes > file_bytes || held.last().is_some_and(|last| last.end > file_bytes) {
            return Err(MessageError::Invalid { what: Self::WHAT, why: "it is longer than its file" });
        }
        Ok(Content { file_bytes, header_bytes, held, gives_hashes, is_news })
    }
}

/// A request for bytes of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetch {
    /// Which file.
    pub model: ModelDigest,
    /// Which bytes: ascending, apart from each other, 1..=[`FETCH_RANGES_MAX`], in whole groups but for the file's end.
    pub ranges: Vec<Range<u64>>,
    /// The hashes of these bytes, without the bytes.
    pub only_hashes: bool,
}

impl Body for Fetch {
    type Proto = proto::Fetch;
    const WHAT: &'static str = "request for bytes";
    const BYTES_MAX: usize = FETCH_RANGES_MAX * 14 + 64;

    fn to_proto(&self) -> Result<proto::Fetch, MessageError> {
        let proto = proto::Fetch {
            model: self.model.as_bytes().to_vec(),
            ranges: stretches_to_proto(&self.ranges),
            only_hashes: self.only_hashes,
        };
        Fetch::from_proto(proto.clone())?;
        Ok(proto)
    }

    fn from_proto(proto: proto::Fetch) -> Result<Fetch, MessageError> {
        let ranges = stretches_from_proto(&proto.ranges, FETCH_RANGES_MAX)?;
        if ranges.is_empty() {
            return Err(MessageError::Missing("ranges"));
        }
        if ranges.iter().any(|range| !range.start.is_multiple_of(GROUP_BYTES)) {
            return Err(MessageError::Invalid { what: "ranges", why: "they do not begin with groups" });
        }
        let model = ModelDigest::from_bytes(check::array("model digest", &proto.model)?);
        Ok(Fetch { model, ranges, only_hashes: proto.only_hashes })
    }
}

/// A question for what a node has of a file, now and whenever that changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WatchContent {
    /// Which file.
    pub model: ModelDigest,
    /// Of what has been told before only what has come since is to be told. Of a file that comes from many nodes in parts, that is a small part of all.
    pub only_news: bool,
}

impl Body for WatchContent {
    type Proto = proto::WatchContent;
    const WHAT: &'static str = "question for a content";
    const BYTES_MAX: usize = 256;

    fn to_proto(&self) -> Result<proto::WatchContent, MessageError> {
        Ok(proto::WatchContent { model: self.model.as_bytes().to_vec(), only_news: self.only_news })
    }

    fn from_proto(proto: proto::WatchContent) -> Result<WatchContent, MessageError> {
        let model = ModelDigest::from_bytes(check::array("model digest", &proto.model)?);
        Ok(WatchContent { model, only_news: proto.only_news })
    }
}

fn check_file_bytes(file_bytes: u64) -> Result<(), MessageError> {
    match file_bytes {
        1..=FILE_BYTES_MAX => Ok(()),
        _ => Err(MessageError::Invalid { what: "file bytes", why: "a file has from 1 byte to 4 TiB" }),
    }
}

fn check_stretches(stretches: &[Range<u64>], limit: usize) -> Result<(), MessageError> {
    check::count("ranges", stretches.len(), limit)?;
    let is_apart = stretches.windows(2).all(|pair| pair[0].end < pair[1].start);
    if !is_apart || stretches.iter().any(|stretch| stretch.start >= stretch.end || stretch.end > FILE_BYTES_MAX) {
        return Err(MessageError::Invalid { what: "ranges", why: "they are not ascending and apart from each other" });
    }
    Ok(())
}

/// The distance from the end before, and the length, of each.
fn stretches_to_proto(stretches: &[Range<u64>]) -> Vec<u64> {
    let mut at = 0;
    let mut numbers = Vec::with_capacity(2 * stretches.len());
    for stretch in stretches {
        numbers.extend([stretch.start.saturating_sub(at), stretch.end.saturating_sub(stretch.start)]);
        at = stretch.end;
    }
    numbers
}

fn stretches_from_proto(numbers: &[u64], limit: usize) -> Result<Vec<Range<u64>>, MessageError> {
    check::count("ranges", numbers.len().div_ceil(2), limit)?;
    let (pairs, rest) = numbers.as_chunks::<2>();
    if !rest.is_empty() {
        return Err(MessageError::Invalid { what: "ranges", why: "one has no end" });
    }
    let mut at = 0u64;
    let mut stretches = Vec::with_capacity(pairs.len());
    for &[gap, length] in pairs {
        let start = at.saturating_add(gap);
        at = start.saturating_add(length);
        stretches.push(start..at);
    }
    check_stretches(&stretches, limit)?;
    Ok(stretches)
}
