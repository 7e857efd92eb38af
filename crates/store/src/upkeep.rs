//! Keeping the store in order: what is damaged, what is kept, and what goes when room is short.

use std::{collections::HashSet, path::PathBuf};

use murmur_gguf::{Digest, manifest::ByteRange};

use crate::{
    content::ContentEntry,
    error::StoreError,
    files,
    index::{ModelEntry, Origin},
    inspect,
    reference::ModelName,
    store::{Store, no_such_model},
};

/// What a check has found of one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checked {
    /// Its name in the store, if it has one; the first of several.
    pub name: Option<ModelName>,
    /// BLAKE3 of the whole file, where it is known.
    pub digest: Option<Digest>,
    /// The file.
    pub path: PathBuf,
    /// How it is.
    pub health: Health,
}

/// How a file is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// All that is held of it is right. Of a file without a digest: it is there, has its size, and a header that makes sense.
    Ok {
        /// Bytes that are here.
        held_bytes: u64,
    },
    /// These bytes do not match the digest. They are not held any more and will be fetched again; a file that lies
    /// elsewhere stays as it is and is not served any more.
    Damaged {
        /// In whole groups, ascending.
        ranges: Vec<ByteRange>,
    },
    /// The file is not there, or nothing of it.
    Missing,
    /// It cannot be used.
    Unusable {
        /// Why, and what to do.
        why: String,
    },
}

/// What went to make room.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Collected {
    /// What was removed, as it was. Names of it stay, and can be pulled again.
    pub removed: Vec<ContentEntry>,
    /// Bytes freed.
    pub freed_bytes: u64,
    /// Bytes that contents still take: more than the quota, if too much is pinned or in use.
    pub left_bytes: u64,
}

impl Store {
    /// Keeps a model whatever the quota says.
    pub fn pin(&self, name: &ModelName) -> Result<ModelEntry, StoreError> {
        self.set_pinned(name, true)
    }

    /// Lets a model go when room is short.
    pub fn unpin(&self, name: &ModelName) -> Result<ModelEntry, StoreError> {
        self.set_pinned(name, false)
    }

    fn set_pinned(&self, name: &ModelName, pinned: bool) -> Result<ModelEntry, StoreError> {
        self.update(|index| match index.models.iter_mut().find(|entry| entry.name == *name) {
            Some(entry) => {
                entry.pinned = pinned;
                Ok(entry.clone())
            }
            None => Err(no_such_model(name.as_str(), index)),
        })
    }

    /// Removes contents until they take no more than `quota_bytes`: those that are not whole first, then those that were not used for
    /// longest. Never what is pinned, `in_use` or being written to, nor files that lie elsewhere. Room is free when the
    /// last handle of a content is dropped.
    pub fn collect(&self, quota_bytes: u64, in_use: &HashSet<Digest>) -> Result<Collected, StoreError> {
        let names = self.list()?;
        let pinned: HashSet<Digest> = names.iter().filter(|entry| entry.pinned).filter_map(mesh_digest).collect();
        let contents = self.contents();
        let mut entries = contents.list()?;
        entries.retain(|entry| !entry.is_reference);
        entries.sort_by_key(|entry| (entry.held_bytes == entry.bytes, entry.used));
        let mut collected =
            Collected { left_bytes: entries.iter().map(|entry| entry.held_bytes).sum(), ..Collected::default() };
        for entry in entries {
            if collected.left_bytes <= quota_bytes {
                break;
            }
            if in_use.contains(&entry.digest) || pinned.contains(&entry.digest) {
                continue;
            }
            match contents.remove(&entry.digest) {
                Ok(_) => {}
                Err(StoreError::ContentInUse { .. }) => continue,
                Err(error) => return Err(error),
            }
            collected.freed_bytes += entry.held_bytes;
            collected.left_bytes -= entry.held_bytes;
            collected.removed.push(entry);
        }
        Ok(collected)
    }

    /// Checks everything: contents against their digests, which reads them through, and all other models for being there.
    /// `progress` is told bytes done and bytes in all.
    pub fn fsck(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<Vec<Checked>, StoreError> {
        let models = self.list()?;
        let mut report = self.check_contents(&models, progress)?;
        for model in &models {
            let is_checked = |checked: &Checked| match mesh_digest(model) {
                Some(digest) => checked.digest == Some(digest),
                None => checked.path == model.path,
            };
            if !report.iter().any(is_checked) {
                let health = if mesh_digest(model).is_some() { Health::Missing } else { check_file(model) };
                let (name, path) = (Some(model.name.clone()), model.path.clone());
                report.push(Checked { name, digest: mesh_digest(model), path, health });
            }
        }
        Ok(report)
    }

    fn check_contents(
        &self,
        models: &[ModelEntry],
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Vec<Checked>, StoreError> {
        let contents = self.contents();
        let opened = contents.digests()?.into_iter().map(|digest| (digest, contents.open(&digest)));
        let opened: Vec<_> = opened.collect();
        let held_bytes = opened.iter().filter_map(|(_, opened)| opened.as_ref().ok()?.as_ref()).map(|c| c.held_bytes());
        let (mut done, total) = (0, held_bytes.sum::<u64>());
        let mut report = Vec::new();
        for (digest, opened) in opened {
            let name_of = |path: &PathBuf| {
                let is_it = |model: &&ModelEntry| mesh_digest(model) == Some(digest) || model.path == *path;
                models.iter().find(is_it).map(|model| model.name.clone())
            };
            let (path, health) = match opened {
                // Its file is gone, or another; the model that it was the file of tells the rest.
                Ok(None) => continue,
                Ok(Some(content)) => {
                    let end = done + content.held_bytes();
                    let mut seen = |bytes: u64| {
                        // The tree is read as well, and not counted.
                        done = (done + bytes).min(end);
                        progress(done, total);
                    };
                    let health = match content.verify(&mut seen) {
                        Ok(ranges) if ranges.is_empty() => Health::Ok { held_bytes: content.held_bytes() },
                        Ok(ranges) => Health::Damaged { ranges },
                        Err(error) => Health::Unusable { why: error.to_string() },
                    };
                    done = end;
                    progress(done, total);
                    if content.is_reference() && matches!(health, Health::Damaged { .. }) {
                        contents.remove(&digest)?;
                    }
                    (content.path().to_owned(), health)
                }
                Err(error) => (contents.directory(&digest), Health::Unusable { why: error.to_string() }),
            };
            report.push(Checked { name: name_of(&path), digest: Some(digest), path, health });
        }
        Ok(report)
    }
}

fn mesh_digest(model: &ModelEntry) -> Option<Digest> {
    match &model.origin {
        Origin::Mesh { digest } => Some(*digest),
        _ => None,
    }
}

fn check_file(model: &ModelEntry) -> Health {
    if !model.path.exists() {
        return Health::Missing;
    }
    match inspect::check_model_file(&model.path) {
        Ok(bytes) if bytes == model.size_bytes => Health::Ok { held_bytes: bytes },
        Ok(bytes) => {
            let (now, then) = (files::human_bytes(bytes), files::human_bytes(model.size_bytes));
            Health::Unusable {
                why: format!("it has {now}, and had {then} when it was added. Import or pull it again."),
            }
        }
        Err(error) => Health::Unusable { why: error.to_string() },
    }
}
