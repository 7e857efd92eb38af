//! Contents on the wire: the Bao encoding of ranges, checked on its way out and on its way in.
//!
//! An encoding is the hash pairs and groups that the ranges need, in pre-order: a pair of hashes always precedes what it proves. Both sides round
//! the ranges to whole groups. The size does not travel with it.

use std::{
    io::{self, BufReader, BufWriter, Read, Write},
    path::Path,
};

use bao_tree::{
    ChunkNum, ChunkRanges,
    io::{
        self as bao, BaoContentItem,
        sync::{DecodeResponseIter, WriteAt, encode_ranges_validated},
    },
    iter::{BaoChunk, ResponseIterRef},
};
use murmur_gguf::{ByteRange, GroupSet, groups::byte_range};

use super::{
    CHUNK_BYTES, CHUNKS_PER_GROUP, Content, GROUP_BYTES, STREAM_BUFFER_BYTES, check::wrong_groups, handle::Writing,
    hashes::PAIR_BYTES,
};
use crate::{error::StoreError, files};

/// Why receiving a part of a content ended early. What had been verified is kept.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The sender lies, or the size that the content was claimed to have is wrong.
    #[error(
        "what was sent for byte {at} does not match the digest: the sender, or the size that was claimed, is wrong"
    )]
    Wrong {
        /// Where, in bytes.
        at: u64,
    },
    /// The sender stopped before the end.
    #[error("the sender stopped before byte {at}")]
    Ended {
        /// The first byte that did not come.
        at: u64,
    },
    /// Reading from the sender failed.
    #[error("receiving broke off: {0}")]
    Receive(#[source] io::Error),
    /// Keeping it failed: the disk is full, or somebody else writes.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Content {
    /// Bytes of the encoding of `ranges`: what [`encode`](Self::encode) writes and [`decode`](Self::decode) reads, at most.
    pub fn encoded_bytes(&self, ranges: &[ByteRange]) -> u64 {
        let chunks = self.all_chunks(ranges);
        let sizes = ResponseIterRef::new(self.0.outboard.tree, &chunks).map(|item| match item {
            BaoChunk::Parent { .. } => PAIR_BYTES as u64,
            BaoChunk::Leaf { size, .. } => size as u64,
        });
        sizes.sum()
    }

    /// Writes the encoding of `ranges`, rounded to whole groups, all of which must be held. Everything is checked against the digest
    /// before it is written, so a file that changed is noticed and never sent; a group that does not match is not held any more.
    pub fn encode(&self, ranges: &[ByteRange], to: &mut impl Write) -> Result<(), StoreError> {
        let wanted = GroupSet::touching(ranges, self.bytes());
        self.demand(&wanted)?;
        if self.0.reference.as_ref().is_some_and(|reference| !reference.is_unchanged()) {
            return Err(StoreError::ContentChanged { path: self.path().to_owned() });
        }
        let mut sink = Sink { to, has_failed: false };
        let mut buffered = BufWriter::with_capacity(STREAM_BUFFER_BYTES, &mut sink);
        let chunks = self.chunks(&wanted);
        let encoded = encode_ranges_validated(&self.0.data, &self.0.outboard, &chunks, &mut buffered)
            .and_then(|()| Ok(buffered.flush()?));
        drop(buffered);
        let Err(error) = encoded else { return Ok(()) };
        if sink.has_failed {
            return Err(StoreError::Send(error.into()));
        }
        let Some(wrong) = wrong_groups(&error) else {
            return Err(StoreError::Io { doing: "read", path: self.path().to_owned(), source: error.into() });
        };
        if self.is_reference() {
            return Err(StoreError::ContentChanged { path: self.path().to_owned() });
        }
        // Given up in the meantime is not damaged.
        self.demand(&wanted)?;
        let at = byte_range(&wrong, self.bytes()).start;
        self.doubt(&GroupSet::from(wrong));
        Err(StoreError::ContentDamaged { path: self.path().to_owned(), at })
    }

    /// Reads the encoding of `ranges`, rounded to whole groups, and not a byte more. Every group that verifies is kept at once and `heard`, also
    /// when the rest is missing or wrong. Several may do so at the same time.
    pub fn decode(
        &self,
        ranges: &[ByteRange],
        from: &mut impl Read,
        heard: &mut dyn FnMut(ByteRange),
    ) -> Result<(), DecodeError> {
        let received = {
            let mut writing = self.write()?;
            self.receive(ranges, from, heard, &mut writing)
        };
        if self.is_complete() {
            self.flush()?;
        }
        received
    }

    fn receive(
        &self,
        ranges: &[ByteRange],
        from: &mut impl Read,
        heard: &mut dyn FnMut(ByteRange),
        writing: &mut Writing<'_>,
    ) -> Result<(), DecodeError> {
        let chunks = self.chunks(&GroupSet::touching(ranges, self.bytes()));
        let limited = BufReader::with_capacity(STREAM_BUFFER_BYTES, from.take(self.encoded_bytes(ranges)));
        let (root, tree) = (writing.outboard.root, writing.outboard.tree);
        for item in DecodeResponseIter::new(root, tree, limited, &chunks) {
            match item.map_err(refused)? {
                BaoContentItem::Parent(parent) => self.save(writing, parent.node, &parent.pair)?,
                BaoContentItem::Leaf(leaf) => {
                    let written = writing.data.write_all_at(leaf.offset, &leaf.data);
                    written.map_err(|error| self.write_failed(error, self.path()))?;
                    heard(self.keep(leaf.offset / GROUP_BYTES));
                    self.checkpoint_if_due()?;
                }
            }
        }
        Ok(())
    }

    /// Groups of it as chunks of BLAKE3.
    pub(super) fn chunks(&self, groups: &GroupSet) -> ChunkRanges {
        let chunks = self.bytes().div_ceil(CHUNK_BYTES);
        let bounds = groups.ranges().iter().flat_map(|range| {
            [range.start * CHUNKS_PER_GROUP, (range.end * CHUNKS_PER_GROUP).min(chunks)].map(ChunkNum)
        });
        // The ranges of a set are apart from each other, so the bounds ascend.
        ChunkRanges::new(bounds.collect()).unwrap_or_default()
    }

    fn demand(&self, wanted: &GroupSet) -> Result<(), StoreError> {
        match self.lacking(wanted).byte_ranges(self.bytes()).first() {
            Some(&ByteRange { start, end }) => Err(StoreError::ContentLacks { digest: self.digest(), start, end }),
            None => Ok(()),
        }
    }

    pub(super) fn write_failed(&self, error: io::Error, path: &Path) -> StoreError {
        files::write_failed(error, path, self.bytes() - self.held_bytes())
    }
}

fn refused(error: bao::DecodeError) -> DecodeError {
    let first = |chunk: ChunkNum| chunk.to_bytes();
    match error {
        bao::DecodeError::ParentHashMismatch(node) => DecodeError::Wrong { at: first(node.chunk_range().start) },
        bao::DecodeError::LeafHashMismatch(chunk) => DecodeError::Wrong { at: first(chunk) },
        bao::DecodeError::ParentNotFound(node) => DecodeError::Ended { at: first(node.chunk_range().start) },
        bao::DecodeError::LeafNotFound(chunk) => DecodeError::Ended { at: first(chunk) },
        bao::DecodeError::Io(error) => DecodeError::Receive(error),
    }
}

/// Where an encoding goes, and whether it was this that failed.
struct Sink<'a, W> {
    to: &'a mut W,
    has_failed: bool,
}

impl<W: Write> Write for Sink<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.to.write(bytes).inspect_err(|error| self.has_failed = error.kind() != io::ErrorKind::Interrupted)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush().inspect_err(|_| self.has_failed = true)
    }
}
