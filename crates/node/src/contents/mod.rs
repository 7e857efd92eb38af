//! Models' files between nodes: what this node has of each, handed out to others ([`give`]), and what it lacks, fetched from them
//! and from the hub ([`fetch`]).
//!
//! A file is known by its digest, and every group of bytes is checked against that before it is kept, so a part can come from
//! anybody. Which part comes from whom is decided by [`murmur_core::swarm`]; [`murmur_store::Contents`] keeps what has come. A model that
//! a user has asked for by name, and that is not on this machine, is found and fetched by [`wanted`].

pub(crate) mod ask;
mod fetch;
pub(crate) mod give;
mod hub;
mod hub_name;
pub(crate) mod pace;
pub(crate) mod pull;
pub(crate) mod room;
mod signers;
mod sought;
mod speed;
mod standing;
mod take;
mod twin;
mod unproven;
pub(crate) mod wanted;

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    ops::{Deref, Range},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use murmur_gguf::{ByteRange, Digest};
use murmur_protocol::mesh::{
    HeldContent, ModelDigest, NodeId,
    content::{CONTENTS_MAX, GROUP_BYTES, SOURCE_BYTES_MAX},
};
use murmur_store::{Content, Contents, Hold, HubRef, Origin, Store, StoreError};
use serde_json::{Value, json};
use tokio::sync::watch;

pub use fetch::TakeError;
pub use sought::Sought;

use self::speed::Speeds;
use crate::{
    Node,
    signatures::{self, Attested},
};

const _: () = assert!(GROUP_BYTES == murmur_store::GROUP_BYTES, "nodes check the groups that they keep");

/// A part that grows is told anew when it has grown by one of so many steps.
const HELD_STEPS: u64 = 10;

/// Bytes of sources in a record, at most: a record has some 3,800 in all.
const SOURCES_BYTES_MAX: usize = 1_024;

/// The files that this node has, or has parts of.
pub(crate) struct Library {
    data_dir: PathBuf,
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
    /// What has come of it since this program started, with hashes, and with what came twice or was wrong.
    received_bytes: AtomicU64,
    /// Who fetches what is missing, if somebody does.
    taking: Mutex<Option<fetch::Taking>>,
    /// Nodes that have sent what is not of it, for as long as they are there. They are not asked for it.
    liars: Mutex<BTreeSet<NodeId>>,
    on_hub: Mutex<OnHub>,
    /// Bytes of it that were copied from other files of this machine.
    copied_bytes: AtomicU64,
}

/// One of them that is used here: no process removes it to make room.
pub(crate) struct InUse {
    shelf: Arc<Shelf>,
    _held: Hold,
}

impl Deref for InUse {
    type Target = Arc<Shelf>;

    fn deref(&self) -> &Arc<Shelf> {
        &self.shelf
    }
}

/// What is known of where a hub has a file: references to it at one commit.
#[derive(Default)]
pub(crate) struct OnHub {
    /// It is there: it came from there, or parts of it did that were right.
    proven: Option<HubRef>,
    /// It may be there, as somebody says who wants to have it.
    said: Option<HubRef>,
    /// There is something else.
    wrong: HashSet<HubRef>,
}

impl OnHub {
    /// Places to ask. What was proven may have been found by the word of another node.
    fn likely(&self, by_word: bool) -> Vec<HubRef> {
        self.proven.iter().filter(|_| by_word).chain(&self.said).cloned().collect()
    }

    fn prove(&mut self, place: &HubRef) {
        if self.proven.is_none() {
            self.proven = Some(place.clone());
        }
    }

    fn refute(&mut self, place: HubRef) {
        self.proven = self.proven.take().filter(|proven| *proven != place);
        self.wrong.insert(place);
    }
}

impl Library {
    pub(crate) fn new(data_dir: &Path) -> Library {
        Library { data_dir: data_dir.to_owned(), contents: Contents::at(data_dir), shelves: Mutex::default() }
    }

    fn shelves(&self) -> MutexGuard<'_, BTreeMap<ModelDigest, Arc<Shelf>>> {
        self.shelves.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The store that they are in.
    fn store(&self) -> Store {
        Store::at(&self.data_dir)
    }

    /// A file of this machine, read through unless that was done before. Blocks.
    pub(crate) fn adopt(&self, name: &str, path: &Path, header_bytes: u64) -> Result<Arc<Shelf>, StoreError> {
        let content = self.contents.adopt(path, &mut |_, _| ())?;
        let shelf = self.put(name, content);
        shelf.header_bytes.send_replace(header_bytes);
        if let Some(place) = self.pulled_from(path) {
            shelf.on_hub().prove(&place);
        }
        Ok(shelf)
    }

    /// Where on the hub a file of the store was pulled from.
    fn pulled_from(&self, path: &Path) -> Option<HubRef> {
        let entries = self.store().list().ok()?;
        entries.into_iter().filter(|entry| entry.path == path).find_map(|entry| match entry.origin {
            Origin::Hub { repo, commit, file, .. } => Some(HubRef { repo, revision: commit, wanted: Some(file) }),
            _ => None,
        })
    }

    /// A file that is not here, or is in parts, for somebody who fetches it. Blocks.
    pub(crate) fn begin(&self, name: &str, digest: ModelDigest, file_bytes: u64) -> Result<InUse, StoreError> {
        let content = self.contents.create(Digest(*digest.as_bytes()), file_bytes)?;
        let held = content.hold()?;
        Ok(InUse { shelf: self.put(name, content), _held: held })
    }

    fn put(&self, name: &str, content: Content) -> Arc<Shelf> {
        let digest = ModelDigest::from_bytes(content.digest().0);
        let mut shelves = self.shelves();
        // One of another length was begun by a false claim, and one that has gone made room.
        if let Some(known) = shelves.get(&digest).filter(|shelf| shelf.content.is_same(&content)) {
            return Arc::clone(known);
        }
        let proven = content.source().and_then(|source| source.parse().ok());
        let shelf = Arc::new(Shelf {
            name: name.to_owned(),
            content,
            header_bytes: watch::Sender::new(0),
            received_bytes: AtomicU64::new(0),
            taking: Mutex::default(),
            liars: Mutex::default(),
            on_hub: Mutex::new(OnHub { proven, ..OnHub::default() }),
            copied_bytes: AtomicU64::new(0),
        });
        shelves.insert(digest, Arc::clone(&shelf));
        shelf
    }

    /// Removes a file that came from others. Blocks.
    fn forget(&self, digest: &ModelDigest) -> Result<(), StoreError> {
        self.shelves().remove(digest);
        self.contents.remove(&Digest(*digest.as_bytes())).map(drop)
    }

    pub(crate) fn find(&self, digest: &ModelDigest) -> Option<Arc<Shelf>> {
        self.shelves().get(digest).cloned()
    }

    /// All of them. What has gone meanwhile, by whomever it was removed, takes no room any more.
    pub(crate) fn list(&self) -> Vec<Arc<Shelf>> {
        let mut shelves = self.shelves();
        shelves.retain(|_, shelf| shelf.content.is_there());
        shelves.values().cloned().collect()
    }

    /// Other files than this one that are here whole. Blocks.
    fn others(&self, digest: &ModelDigest) -> HashSet<PathBuf> {
        let listed = self.store().list().unwrap_or_default().into_iter().map(|entry| entry.path);
        let shelves = self.list().into_iter().filter(|shelf| shelf.content.is_complete());
        let mut others: HashSet<PathBuf> = listed.chain(shelves.map(|shelf| shelf.content.path().to_owned())).collect();
        others.retain(|path| self.find(digest).is_none_or(|own| own.content.path() != path));
        others
    }

    /// What the record says of them. Parts that grow are told in steps of one [`HELD_STEPS`]th.
    pub(crate) fn held(&self) -> Vec<HeldContent> {
        let mut sources_bytes_left = SOURCES_BYTES_MAX;
        let held = |shelf: Arc<Shelf>| {
            let (file_bytes, held_bytes) = (shelf.content.bytes(), shelf.held_bytes());
            let step = (file_bytes / HELD_STEPS).max(1);
            let told_bytes = if held_bytes == file_bytes { held_bytes } else { held_bytes / step * step };
            (held_bytes > 0).then(|| {
                let source = shelf.on_hub().proven.as_ref().map(ToString::to_string);
                let source = source.filter(|source| source.len() <= SOURCE_BYTES_MAX.min(sources_bytes_left));
                sources_bytes_left -= source.as_ref().map_or(0, String::len);
                HeldContent {
                    digest: shelf.digest(),
                    name: shelf.name.clone(),
                    file_bytes,
                    held_bytes: told_bytes,
                    source,
                }
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

    fn on_hub(&self) -> MutexGuard<'_, OnHub> {
        self.on_hub.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts on disk what is here, and where else it is. Blocks.
    fn flush(&self) -> Result<(), StoreError> {
        self.content.flush()?;
        let source = self.on_hub().proven.as_ref().map(ToString::to_string);
        match source.filter(|source| self.content.source().as_ref() != Some(source)) {
            Some(source) => self.content.set_source(&source),
            None => Ok(()),
        }
    }

    /// Bytes that are here.
    pub(crate) fn held_bytes(&self) -> u64 {
        self.content.held_bytes()
    }

    /// For `/api/status`.
    pub(crate) fn view(&self) -> Value {
        let mut liars: Vec<String> = self.liars().iter().map(ToString::to_string).collect();
        let source = {
            let on_hub = self.on_hub();
            liars.extend(on_hub.wrong.iter().map(ToString::to_string));
            on_hub.proven.as_ref().map(ToString::to_string)
        };
        json!({
            "digest": self.digest().to_string(),
            "name": self.name,
            "file_bytes": self.content.bytes(),
            "held_bytes": self.held_bytes(),
            "received_bytes": self.received_bytes.load(Ordering::Relaxed),
            "source": source,
            "copied_bytes": self.copied_bytes.load(Ordering::Relaxed),
            "fetch": self.standing().and_then(|standing| standing.view()),
            "liars": liars,
        })
    }

    /// Enters it in the store under its name, once all of it is here, and as what a user has asked for. Blocks.
    fn enter(&self, store: &Store) -> Result<(), StoreError> {
        if self.content.is_complete() && !self.content.is_reference() {
            let asked_as = self.on_hub().said.clone();
            store.add_content(self.name.parse()?, &self.content, asked_as.as_ref())?;
        }
        Ok(())
    }

    /// What is known to have been signed of it. Blocks.
    fn attestations(&self) -> Vec<Attested> {
        signatures::attestations(&self.content).unwrap_or_else(|error| {
            tracing::warn!("what was signed of {} cannot be read: {error}", self.name);
            Vec::new()
        })
    }

    /// The same, for programs.
    fn view_attestations(&self) -> Value {
        self.attestations().iter().map(Attested::view).collect()
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

/// For `/api/models/signatures`: by the digest of each file that this node has or could have, what was signed of it.
pub(crate) async fn view_signatures(node: &Node) -> Value {
    let known = signers::of_all(node).await;
    let view = |attested: Vec<Attested>| attested.iter().map(Attested::view).collect::<Value>();
    known.into_iter().map(|(digest, attested)| (digest.to_string(), view(attested))).collect()
}

/// For `/api/models`: each file that this node has or could have, with who has how much of it, and how fast the model is here. Blocks.
pub(crate) fn view(node: &Node) -> Vec<Value> {
    let mut files: BTreeMap<ModelDigest, Value> = BTreeMap::new();
    let speeds = Speeds::of(node);
    let file = |digest: ModelDigest, name: &str, file_bytes: u64, held_bytes: u64| {
        json!({
            "digest": digest.to_string(),
            "name": name,
            "file_bytes": file_bytes,
            "held_bytes": held_bytes,
            "speed": speeds.view(digest, file_bytes),
            "signatures": [],
            "nodes": [],
        })
    };
    for shelf in node.library.list() {
        let digest = shelf.digest();
        let mut own = file(digest, &shelf.name, shelf.content.bytes(), shelf.held_bytes());
        own["signatures"] = shelf.view_attestations();
        files.insert(digest, own);
    }
    let peers = node.mesh.get().map(|mesh| mesh.mesh().peers()).unwrap_or_default();
    for peer in &peers {
        for content in &peer.record().contents {
            let holder = json!({
                "node": peer.record().node.to_string(),
                "name": content.name,
                "held_bytes": content.held_bytes,
                "rtt_ms": peer.rtt_ms,
                "source": content.source,
            });
            let HeldContent { digest, name, file_bytes, .. } = content;
            let known = files.entry(*digest).or_insert_with(|| file(*digest, name, *file_bytes, 0));
            known["nodes"].as_array_mut().into_iter().for_each(|nodes| nodes.push(holder.clone()));
        }
    }
    files.into_values().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_files_are_on_a_hub_is_told_as_far_as_a_record_has_room_for_it() {
        let folder = tempfile::tempdir().unwrap();
        let library = Library::new(folder.path());
        let adopt = |number: u8, name_bytes: usize| {
            let file = folder.path().join(format!("{number}.gguf"));
            std::fs::write(&file, [number]).unwrap();
            let place = format!("hf:someone/Tiny-GGUF@0123456:{}-{number}.gguf", "n".repeat(name_bytes));
            library.adopt("tiny", &file, 1).unwrap().on_hub().prove(&place.parse().unwrap());
        };
        let told = || library.held().into_iter().filter_map(|held| held.source).collect::<Vec<_>>();
        adopt(0, SOURCE_BYTES_MAX - 30);
        assert!(told().is_empty(), "it is longer than a record may say");
        adopt(1, 100);
        assert_eq!(told().len(), 1);
        (2..12).for_each(|number| adopt(number, 100));
        let bytes: usize = told().iter().map(String::len).sum();
        assert!((SOURCES_BYTES_MAX - 150..=SOURCES_BYTES_MAX).contains(&bytes), "{bytes}");
        assert_eq!(library.held().len(), 12);
    }
}
