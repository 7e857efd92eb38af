//! Models' files between nodes: what this node has of each, handed out to others ([`give`]), and what it lacks, fetched from them
//! ([`take`]).
//!
//! A file is known by its digest, and every group of bytes is checked against that before it is kept, so a part can come from
//! anybody. Which part comes from whom is decided by [`murmur_core::swarm`]; [`murmur_store::Contents`] keeps what has come. A model that
//! a user has asked for by name, and that is not on this machine, is found and fetched by [`wanted`].

pub(crate) mod give;
pub(crate) mod pace;
pub(crate) mod pull;
pub(crate) mod take;
pub(crate) mod wanted;

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use murmur_gguf::{ByteRange, Digest};
use murmur_protocol::mesh::{
    HeldContent, ModelDigest, NodeId,
    content::{CONTENTS_MAX, GROUP_BYTES},
};
use murmur_store::{Content, Contents, Store, StoreError};
use serde_json::{Value, json};
use tokio::sync::watch;

pub use take::TakeError;

use crate::Node;

const _: () = assert!(GROUP_BYTES == murmur_store::GROUP_BYTES, "nodes check the groups that they keep");

/// A part that grows is told anew when it has grown by one of so many steps.
const HELD_STEPS: u64 = 10;

/// The files that this node has, or has parts of.
pub(crate) struct Library {
    contents: Contents,
    shelves: Mutex<BTreeMap<ModelDigest, Arc<Shelf>>>,
}

/// One of them.
pub(crate) struct Shelf {
    /// What it is called here.
    pub(crate) name: String,
    pub(crate) content: Content,
    /// Bytes before the tensors; 0: not known yet.
    header_bytes: watch::Sender<u64>,
    /// Who fetches what is missing, if somebody does.
    taking: Mutex<Option<take::Taking>>,
    /// Nodes that have sent what is not of it, for as long as they are there. They are not asked for it.
    liars: Mutex<BTreeSet<NodeId>>,
}

impl Library {
    pub(crate) fn new(data_dir: &Path) -> Library {
        Library { contents: Contents::at(data_dir), shelves: Mutex::default() }
    }

    fn shelves(&self) -> MutexGuard<'_, BTreeMap<ModelDigest, Arc<Shelf>>> {
        self.shelves.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A file of this machine, read through unless that was done before. Blocks.
    pub(crate) fn adopt(&self, name: &str, path: &Path, header_bytes: u64) -> Result<Arc<Shelf>, StoreError> {
        let content = self.contents.adopt(path, &mut |_, _| ())?;
        let shelf = self.put(name, content);
        shelf.header_bytes.send_replace(header_bytes);
        Ok(shelf)
    }

    /// A file that is not here, or is in parts. Blocks.
    pub(crate) fn begin(&self, name: &str, digest: ModelDigest, file_bytes: u64) -> Result<Arc<Shelf>, StoreError> {
        let content = self.contents.create(Digest(*digest.as_bytes()), file_bytes)?;
        Ok(self.put(name, content))
    }

    fn put(&self, name: &str, content: Content) -> Arc<Shelf> {
        let digest = ModelDigest::from_bytes(content.digest().0);
        let mut shelves = self.shelves();
        // One of another length was begun by a false claim.
        if let Some(known) = shelves.get(&digest).filter(|shelf| shelf.content.bytes() == content.bytes()) {
            return Arc::clone(known);
        }
        let (header_bytes, taking, liars) = (watch::Sender::new(0), Mutex::default(), Mutex::default());
        let shelf = Arc::new(Shelf { name: name.to_owned(), content, header_bytes, taking, liars });
        shelves.insert(digest, Arc::clone(&shelf));
        shelf
    }

    pub(crate) fn find(&self, digest: &ModelDigest) -> Option<Arc<Shelf>> {
        self.shelves().get(digest).cloned()
    }

    /// All of them.
    pub(crate) fn list(&self) -> Vec<Arc<Shelf>> {
        self.shelves().values().cloned().collect()
    }

    /// What the record says of them. Parts that grow are told in steps of one [`HELD_STEPS`]th.
    pub(crate) fn held(&self) -> Vec<HeldContent> {
        let held = |shelf: Arc<Shelf>| {
            let (file_bytes, held_bytes) = (shelf.content.bytes(), shelf.held_bytes());
            let step = (file_bytes / HELD_STEPS).max(1);
            let told_bytes = if held_bytes == file_bytes { held_bytes } else { held_bytes / step * step };
            (held_bytes > 0).then(|| HeldContent {
                digest: shelf.digest(),
                name: shelf.name.clone(),
                file_bytes,
                held_bytes: told_bytes,
            })
        };
        self.list().into_iter().filter_map(held).take(CONTENTS_MAX).collect()
    }
}

impl Shelf {
    pub(crate) fn digest(&self) -> ModelDigest {
        ModelDigest::from_bytes(self.content.digest().0)
    }

    fn liars(&self) -> MutexGuard<'_, BTreeSet<NodeId>> {
        self.liars.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes that are here.
    pub(crate) fn held_bytes(&self) -> u64 {
        self.content.held_bytes()
    }

    /// For `/api/status`.
    pub(crate) fn view(&self) -> Value {
        let standing = self.standing();
        let fetch = standing.as_ref().and_then(|standing| Some((standing, standing.progress.as_ref()?)));
        json!({
            "digest": self.digest().to_string(),
            "name": self.name,
            "file_bytes": self.content.bytes(),
            "held_bytes": self.held_bytes(),
            "fetch": fetch.map(|(standing, progress)| standing.view(progress)),
            "liars": self.liars().iter().map(ToString::to_string).collect::<Vec<_>>(),
        })
    }

    /// Enters it in the store under its name, once all of it is here. Blocks.
    fn enter(&self, data_dir: &Path) -> Result<(), StoreError> {
        if self.content.is_complete() && !self.content.is_reference() {
            Store::at(data_dir).add_content(self.name.parse()?, &self.content)?;
        }
        Ok(())
    }

    /// All of the file.
    pub(crate) fn whole(&self) -> ByteRange {
        ByteRange { start: 0, end: self.content.bytes() }
    }
}

/// Bytes in all of them.
pub(crate) fn length(ranges: &[ByteRange]) -> u64 {
    ranges.iter().map(|range| range.end - range.start).sum()
}

fn to_wire(ranges: &[ByteRange]) -> Vec<Range<u64>> {
    ranges.iter().map(|range| range.start..range.end).collect()
}

fn from_wire(ranges: &[Range<u64>]) -> Vec<ByteRange> {
    ranges.iter().map(|range| ByteRange { start: range.start, end: range.end }).collect()
}

/// For `/api/models`: each file that this node has or could have, with who has how much of it.
pub(crate) fn view(node: &Node) -> Vec<Value> {
    let mut files: BTreeMap<ModelDigest, Value> = BTreeMap::new();
    let file = |digest: ModelDigest, name: &str, file_bytes: u64, held_bytes: u64| {
        json!({
            "digest": digest.to_string(), "name": name, "file_bytes": file_bytes, "held_bytes": held_bytes, "nodes": [],
        })
    };
    for shelf in node.library.list() {
        let digest = shelf.digest();
        files.insert(digest, file(digest, &shelf.name, shelf.content.bytes(), shelf.held_bytes()));
    }
    let peers = node.mesh.get().map(|mesh| mesh.mesh().peers()).unwrap_or_default();
    for peer in &peers {
        for content in &peer.record().contents {
            let holder = json!({
                "node": peer.record().node.to_string(),
                "name": content.name,
                "held_bytes": content.held_bytes,
                "rtt_ms": peer.rtt_ms,
            });
            let HeldContent { digest, name, file_bytes, .. } = content;
            let known = files.entry(*digest).or_insert_with(|| file(*digest, name, *file_bytes, 0));
            known["nodes"].as_array_mut().into_iter().for_each(|nodes| nodes.push(holder.clone()));
        }
    }
    files.into_values().collect()
}
