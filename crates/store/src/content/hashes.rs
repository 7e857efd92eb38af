//! The hashes of a content without its bytes, for whoever has the bytes from elsewhere and must know whether they are the right ones.
//!
//! On the wire they are what the [encoding](Content::encode) of the same ranges has between its groups: pairs of hashes, in pre-order. Each is
//! checked against the one above it, and the first against the digest, before it is kept.

use std::{
    io::{self, Read, Write},
    ops::Range,
};

use bao_tree::{
    ChunkRanges, TreeNode,
    io::{
        self as bao,
        sync::{Outboard, OutboardMut},
    },
    iter::{BaoChunk, ResponseIterRef},
};
use blake3::{
    Hash,
    hazmat::{Mode, merge_subtrees_non_root, merge_subtrees_root},
};
use murmur_gguf::{ByteRange, GroupSet, groups::byte_range};

use super::{CHUNKS_PER_GROUP, Content, TREE, handle::Writing, stream::DecodeError};
use crate::error::StoreError;

/// Bytes of a pair of hashes.
pub(super) const PAIR_BYTES: usize = 64;

/// A pair of hashes: of what is left and of what is right below a node.
type Pair = (Hash, Hash);

impl Content {
    /// The whole groups of `ranges` whose hashes are not here: bytes for them that come without hashes cannot be checked.
    pub fn unproven(&self, ranges: &[ByteRange]) -> Result<Vec<ByteRange>, StoreError> {
        let chunks = self.all_chunks(ranges);
        let mut unproven = GroupSet::default();
        // What each subtree that comes next should hash to, if that is known.
        let mut expected = vec![Some(self.0.outboard.root)];
        for item in ResponseIterRef::new(self.0.outboard.tree, &chunks) {
            let above = expected.pop().flatten();
            match item {
                BaoChunk::Parent { node, is_root, left, right, .. } => {
                    let pair = above.map(|_| self.pair(node)).transpose()?;
                    let pair = pair.filter(|pair| Some(parent(pair, is_root)) == above);
                    let (of_left, of_right) = pair.unzip();
                    expected.extend(right.then_some(of_right));
                    expected.extend(left.then_some(of_left));
                }
                BaoChunk::Leaf { start_chunk, .. } if above.is_none() => {
                    let group = start_chunk.0 / CHUNKS_PER_GROUP;
                    unproven.insert(group..group + 1);
                }
                BaoChunk::Leaf { .. } => {}
            }
        }
        Ok(unproven.byte_ranges(self.bytes()))
    }

    /// Writes the hashes of `ranges`, rounded to whole groups. Those that are not here, or not right, end it.
    pub fn encode_hashes(&self, ranges: &[ByteRange], to: &mut impl Write) -> Result<(), StoreError> {
        let pass = |node: TreeNode| self.pair(node);
        let wrong = self.descend(ranges, pass, |_, pair| to.write_all(&bytes_of(pair)).map_err(StoreError::Send))?;
        match wrong {
            None => Ok(()),
            Some(node) => {
                let ByteRange { start, end } = self.below(node);
                Err(StoreError::ContentLacks { digest: self.digest(), start, end })
            }
        }
    }

    /// Reads the hashes of `ranges`, rounded to whole groups, and not a byte more. What verifies is kept, also when the rest is missing or
    /// wrong.
    pub fn decode_hashes(&self, ranges: &[ByteRange], from: &mut impl Read) -> Result<(), DecodeError> {
        let mut writing = self.write()?;
        let read = |node: TreeNode| {
            let mut hashes = [0; PAIR_BYTES];
            from.read_exact(&mut hashes).map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => DecodeError::Ended { at: self.below(node).start },
                _ => DecodeError::Receive(error),
            })?;
            Ok(pair_of(&hashes))
        };
        let wrong =
            self.descend(ranges, read, |node, pair| self.save(&mut writing, node, pair).map_err(DecodeError::Store))?;
        match wrong {
            None => Ok(()),
            Some(node) => Err(DecodeError::Wrong { at: self.below(node).start }),
        }
    }

    /// Reads the bytes of `ranges`, rounded to whole groups, one range after the other, from a source that has no hashes of them: these must be
    /// here. Every group is checked, kept at once and `heard`, as by [`decode`](Self::decode).
    pub fn fill(
        &self,
        ranges: &[ByteRange],
        from: &mut impl Read,
        heard: &mut dyn FnMut(ByteRange),
    ) -> Result<(), DecodeError> {
        if let Some(&ByteRange { start, end }) = self.unproven(ranges)?.first() {
            return Err(StoreError::ContentLacks { digest: self.digest(), start, end }.into());
        }
        let chunks = self.all_chunks(ranges);
        let items = ResponseIterRef::new(self.0.outboard.tree, &chunks);
        let mut woven = Woven { content: self, items, pair: io::Cursor::default(), group_bytes_left: 0, from };
        self.decode(ranges, &mut woven, heard)
    }

    pub(super) fn save(&self, writing: &mut Writing<'_>, node: TreeNode, pair: &Pair) -> Result<(), StoreError> {
        let saved = writing.outboard.save(node, pair);
        saved.map_err(|error| self.write_failed(error, &self.path().with_file_name(TREE)))
    }

    /// Goes down the tree to `ranges`, and has each pair seen once it is known to be right. Returns where one is not, if so.
    fn descend<E>(
        &self,
        ranges: &[ByteRange],
        mut pair: impl FnMut(TreeNode) -> Result<Pair, E>,
        mut seen: impl FnMut(TreeNode, &Pair) -> Result<(), E>,
    ) -> Result<Option<TreeNode>, E> {
        let chunks = self.all_chunks(ranges);
        let mut expected = vec![self.0.outboard.root];
        for item in ResponseIterRef::new(self.0.outboard.tree, &chunks) {
            let above = expected.pop();
            if let BaoChunk::Parent { node, is_root, left, right, .. } = item {
                let pair = pair(node)?;
                if above != Some(parent(&pair, is_root)) {
                    return Ok(Some(node));
                }
                seen(node, &pair)?;
                expected.extend(right.then_some(pair.1));
                expected.extend(left.then_some(pair.0));
            }
        }
        Ok(None)
    }

    /// What the tree file says; zeros where it says nothing.
    fn pair(&self, node: TreeNode) -> Result<Pair, StoreError> {
        let loaded = match self.0.outboard.load(node) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => None,
            loaded => loaded.map_err(StoreError::io("read", &self.path().with_file_name(TREE)))?,
        };
        Ok(loaded.unwrap_or_else(|| pair_of(&[0; PAIR_BYTES])))
    }

    /// `ranges` in whole groups, as an encoding walks through them.
    pub(super) fn all_chunks(&self, ranges: &[ByteRange]) -> ChunkRanges {
        let chunks = self.chunks(&GroupSet::touching(ranges, self.bytes()));
        let bounds = bao::sync::truncate_ranges(&chunks, self.bytes()).boundaries();
        ChunkRanges::new(bounds.iter().copied().collect()).unwrap_or_default()
    }

    fn below(&self, node: TreeNode) -> ByteRange {
        let Range { start, end } = node.chunk_range();
        byte_range(&(start.0 / CHUNKS_PER_GROUP..end.0.div_ceil(CHUNKS_PER_GROUP)), self.bytes())
    }
}

fn pair_of(hashes: &[u8; PAIR_BYTES]) -> Pair {
    let (halves, _) = hashes.as_chunks::<{ PAIR_BYTES / 2 }>();
    (Hash::from_bytes(halves[0]), Hash::from_bytes(halves[1]))
}

fn bytes_of((left, right): &Pair) -> Vec<u8> {
    [*left.as_bytes(), *right.as_bytes()].concat()
}

fn parent((left, right): &Pair, is_root: bool) -> Hash {
    match is_root {
        true => merge_subtrees_root(left.as_bytes(), right.as_bytes(), Mode::Hash),
        false => Hash::from_bytes(merge_subtrees_non_root(left.as_bytes(), right.as_bytes(), Mode::Hash)),
    }
}

/// An encoding, of the hashes that are here and of bytes from elsewhere.
struct Woven<'a, R> {
    content: &'a Content,
    items: ResponseIterRef<'a>,
    pair: io::Cursor<Vec<u8>>,
    group_bytes_left: usize,
    from: &'a mut R,
}

impl<R: Read> Read for Woven<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let read = self.pair.read(buffer)?;
            if read > 0 || buffer.is_empty() {
                return Ok(read);
            }
            if self.group_bytes_left > 0 {
                let room = buffer.len().min(self.group_bytes_left);
                let read = self.from.read(&mut buffer[..room])?;
                self.group_bytes_left -= read;
                return Ok(read);
            }
            match self.items.next() {
                Some(BaoChunk::Parent { node, .. }) => {
                    let pair = self.content.pair(node).map_err(io::Error::other)?;
                    self.pair = io::Cursor::new(bytes_of(&pair));
                }
                Some(BaoChunk::Leaf { size, .. }) => self.group_bytes_left = size,
                None => return Ok(0),
            }
        }
    }
}
