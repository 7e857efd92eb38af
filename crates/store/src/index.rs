//! The index: one JSON file, small, versioned, readable by people, replaced as a whole.

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use murmur_gguf::Digest;
use serde::{Deserialize, Serialize};

use crate::{error::StoreError, files, inspect::ModelFile, reference::ModelName, store::unix_now_s};

/// The layout that this code writes. A newer one is refused, an older one would be read and rewritten.
const INDEX_VERSION: u32 = 2;
/// An index larger than this is not ours.
const INDEX_BYTES_MAX: u64 = 16 << 20;

/// A model that the store knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelEntry {
    /// The name users and clients write.
    pub name: ModelName,
    /// The GGUF file, absolute.
    pub path: PathBuf,
    /// Its size when it was added.
    pub size_bytes: u64,
    /// When it was added, Unix seconds.
    pub added_unix_s: u64,
    /// Where it came from, and so what removing it deletes.
    pub origin: Origin,
    /// Whether it is kept whatever the quota says.
    #[serde(default)]
    pub pinned: bool,
    /// When it was last used, Unix seconds, to within some minutes; 0: not since it was added.
    #[serde(default)]
    pub used_unix_s: u64,
    /// Under which licence it may be used, as the hub says, or else the file; `None`: neither does.
    #[serde(default)]
    pub licence: Option<String>,
    /// What the user had asked for when peers sent it, if that was a file of a hub: `hf:owner/repo@commit:file`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub asked_as: Option<String>,
}

impl ModelEntry {
    /// A model that was added now.
    pub(crate) fn new(name: ModelName, path: PathBuf, origin: Origin, model: ModelFile) -> Self {
        Self {
            name,
            path,
            size_bytes: model.bytes,
            added_unix_s: unix_now_s(),
            origin,
            pinned: false,
            used_unix_s: 0,
            licence: model.licence,
            asked_as: None,
        }
    }
}

/// Where a model came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Origin {
    /// The user's own file, where it lay: never deleted.
    Reference,
    /// A copy in the store: deleted with the entry.
    Copy,
    /// From a hub, in the hub's cache.
    Hub {
        /// `owner/repo`.
        repo: String,
        /// What the user asked for: branch, tag or commit.
        revision: String,
        /// The commit it was.
        commit: String,
        /// The file in the repository.
        file: String,
        /// Checksum of the file, lower-case hex; `None` when the hub publishes none for it.
        sha256: Option<String>,
        /// Whether murmur downloaded it (deleted with the entry) or found it in the cache (left there).
        downloaded: bool,
    },
    /// From peers: a content, which is deleted with the entry. It may not be whole yet, or not any more.
    Mesh {
        /// BLAKE3 of the whole file.
        digest: Digest,
    },
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Index {
    version: u32,
    pub(crate) models: Vec<ModelEntry>,
    /// Bytes that may stay of what was downloaded; `None`: any number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) quota_bytes: Option<u64>,
}

impl Default for Index {
    fn default() -> Self {
        Self { version: INDEX_VERSION, models: Vec::new(), quota_bytes: None }
    }
}

impl Index {
    /// Reads the index; a missing one is empty.
    pub(crate) fn read(path: &Path) -> Result<Self, StoreError> {
        let mut text = Vec::new();
        match File::open(path).and_then(|file| file.take(INDEX_BYTES_MAX + 1).read_to_end(&mut text)) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(source) => {
                return Err(StoreError::Io { doing: "read", path: path.to_owned(), source });
            }
        }
        let bad =
            |why: String, advice: &str| StoreError::BadIndex { path: path.to_owned(), why, advice: advice.to_owned() };
        const MOVE_ASIDE: &str = "Move it aside and import the models again; no model file is touched by that.";
        if text.len() as u64 > INDEX_BYTES_MAX {
            return Err(bad(format!("it is larger than {}", files::human_bytes(INDEX_BYTES_MAX)), MOVE_ASIDE));
        }
        // The version first: what a newer one means by the rest is not for this code to guess.
        #[derive(Deserialize)]
        struct VersionOnly {
            version: u32,
        }
        let version = serde_json::from_slice::<VersionOnly>(&text).map_err(|e| bad(e.to_string(), MOVE_ASIDE))?.version;
        if version > INDEX_VERSION {
            return Err(bad(
                format!("it has version {version}, this murmur knows version {INDEX_VERSION}"),
                "A newer murmur wrote it: use that one, or another --data-dir.",
            ));
        }
        serde_json::from_slice(&text).map_err(|e| bad(e.to_string(), MOVE_ASIDE))
    }

    /// Replaces the index.
    pub(crate) fn write(&mut self, path: &Path) -> Result<(), StoreError> {
        self.version = INDEX_VERSION;
        self.models.sort_by(|a, b| a.name.cmp(&b.name));
        let mut text = serde_json::to_vec_pretty(self).map_err(|e| StoreError::BadIndex {
            path: path.to_owned(),
            why: e.to_string(),
            advice: "A model's path must be valid Unicode to be stored.".to_owned(),
        })?;
        text.push(b'\n');
        files::replace_file(path, &text)
    }

    pub(crate) fn find(&self, name: &ModelName) -> Option<&ModelEntry> {
        self.models.iter().find(|entry| entry.name == *name)
    }
}
