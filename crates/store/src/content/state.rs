//! What is remembered of a content besides its bytes and its tree: one small file, replaced as a whole, that ends with its own
//! digest. A line of JSON, then 64 hexadecimal digits.

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use murmur_gguf::GroupSet;
use serde::{Deserialize, Serialize};

use super::CONTENT_BYTES_MAX;
use crate::{error::StoreError, files};

/// The layout that this code writes. A newer one is refused.
const STATE_VERSION: u32 = 1;
/// A state file larger than this is not ours: four million ranges, each a stretch of a file.
const STATE_BYTES_MAX: u64 = 128 << 20;

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct State {
    version: u32,
    /// Size of the content: proven when its last group is held, a claim before.
    pub(super) bytes: u64,
    /// Tells this place from an earlier one for the same digest.
    pub(super) born_unix_ns: u64,
    /// Files elsewhere that have these bytes.
    pub(super) references: Vec<Reference>,
    /// Where a hub has the file, as whoever had it said: a reference to it at one commit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) source: Option<String>,
    /// What is verified and synced. Empty for a content that is only referred to, which is whole.
    pub(super) held: GroupSet,
}

/// A file outside the store. Another size or time of change makes it another file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Reference {
    pub(super) path: PathBuf,
    pub(super) bytes: u64,
    pub(super) modified_unix_ns: u64,
}

/// What lies where a state file should be.
pub(super) enum Found {
    State(State),
    /// Not what was written.
    Damaged,
    Nothing,
}

impl State {
    pub(super) fn new(bytes: u64) -> Self {
        let born_unix_ns = unix_ns(SystemTime::now());
        Self {
            version: STATE_VERSION,
            bytes,
            born_unix_ns,
            references: Vec::new(),
            source: None,
            held: GroupSet::default(),
        }
    }

    /// Fails when the file cannot be read, or was written by a newer murmur.
    pub(super) fn read(path: &Path) -> Result<Found, StoreError> {
        let mut text = Vec::new();
        match File::open(path).and_then(|file| file.take(STATE_BYTES_MAX + 1).read_to_end(&mut text)) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::Nothing),
            Err(source) => return Err(StoreError::Io { doing: "read", path: path.to_owned(), source }),
        }
        let Some(json) = unsealed(&text) else { return Ok(Found::Damaged) };
        #[derive(Deserialize)]
        struct VersionOnly {
            version: u32,
        }
        match serde_json::from_slice::<VersionOnly>(json) {
            Ok(VersionOnly { version }) if version > STATE_VERSION => Err(StoreError::BadContent {
                path: path.to_owned(),
                why: format!("it has version {version}, this murmur knows version {STATE_VERSION}"),
                advice: "A newer murmur wrote it: use that one, or another --data-dir.".to_owned(),
            }),
            _ => match serde_json::from_slice::<Self>(json) {
                Ok(state) if (1..=CONTENT_BYTES_MAX).contains(&state.bytes) => Ok(Found::State(state)),
                _ => Ok(Found::Damaged),
            },
        }
    }

    pub(super) fn write(&self, path: &Path) -> Result<(), StoreError> {
        write_sealed(self, path)
    }
}

/// Replaces a file by a line of JSON and its digest.
pub(super) fn write_sealed(value: &impl Serialize, path: &Path) -> Result<(), StoreError> {
    let mut text = serde_json::to_vec(value).map_err(|error| StoreError::BadContent {
        path: path.to_owned(),
        why: error.to_string(),
        advice: "The path of a file must be valid Unicode to be remembered.".to_owned(),
    })?;
    let seal = blake3::hash(&text);
    text.push(b'\n');
    text.extend_from_slice(seal.to_hex().as_bytes());
    text.push(b'\n');
    files::replace_file(path, &text)
}

/// The JSON, if the digest after it is its own.
pub(super) fn unsealed(text: &[u8]) -> Option<&[u8]> {
    let (json, seal) = text.strip_suffix(b"\n")?.split_last_chunk::<64>()?;
    let json = json.strip_suffix(b"\n")?;
    (blake3::Hash::from_hex(seal).ok()? == blake3::hash(json)).then_some(json)
}

impl Reference {
    pub(super) fn to(path: &Path) -> io::Result<Self> {
        let meta = std::fs::metadata(path)?;
        if !meta.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a file"));
        }
        Ok(Self { path: path.to_owned(), bytes: meta.len(), modified_unix_ns: unix_ns(meta.modified()?) })
    }

    pub(super) fn is_unchanged(&self) -> bool {
        Self::to(&self.path).is_ok_and(|now| now == *self)
    }
}

/// Nanoseconds since 1970; 0 for earlier.
fn unix_ns(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}
