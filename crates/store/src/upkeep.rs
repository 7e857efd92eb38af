//! Keeping the store in order: what is damaged, and what is kept.

use std::{collections::HashSet, path::PathBuf};

use murmur_gguf::{Digest, manifest::ByteRange};

use crate::{
    content::Content,
    error::StoreError,
    files, hub,
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
    /// All that is held of it is right. Of a file without a digest or checksum: it is there, has its size, and a header that makes sense.
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

    /// Checks everything: contents against their digests, other downloads against the checksum that their hub had announced, which
    /// reads them all through; and all other models for being there. `progress` is told bytes done and bytes in all.
    pub fn fsck(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<Vec<Checked>, StoreError> {
        let models = self.list()?;
        let contents = self.contents();
        let opened = contents.digests()?.into_iter().map(|digest| (digest, contents.open(&digest)));
        let opened: Vec<Opened> = opened.collect();
        let whole: Vec<&Content> = opened.iter().filter_map(|(_, opened)| opened.as_ref().ok()?.as_ref()).collect();
        let mut sums = checksums(&models);
        sums.retain(|(model, _)| whole.iter().all(|content| content.path() != model.path));
        let held_bytes: u64 = whole.iter().map(|content| content.held_bytes()).sum();
        let summed_bytes: u64 = sums.iter().map(|(model, _)| model.size_bytes).sum();
        let mut progress = Progress { done: 0, total: held_bytes + summed_bytes, tell: progress };

        let mut report = self.check_contents(opened, &models, &mut progress)?;
        for (model, sha256) in sums {
            let end = progress.done + model.size_bytes;
            let health = match check_file(model) {
                Health::Ok { .. } => check_sum(model, sha256, &mut |bytes| progress.add(bytes, end)),
                health => health,
            };
            progress.add(u64::MAX, end);
            report.push(Checked { name: Some(model.name.clone()), digest: None, path: model.path.clone(), health });
        }
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
        opened: Vec<Opened>,
        models: &[ModelEntry],
        progress: &mut Progress<'_>,
    ) -> Result<Vec<Checked>, StoreError> {
        let contents = self.contents();
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
                    let end = progress.done + content.held_bytes();
                    // The tree is read as well, and not counted.
                    let health = match content.verify(&mut |bytes: u64| progress.add(bytes, end)) {
                        Ok(ranges) if ranges.is_empty() => Health::Ok { held_bytes: content.held_bytes() },
                        Ok(ranges) => Health::Damaged { ranges },
                        Err(error) => Health::Unusable { why: error.to_string() },
                    };
                    progress.add(u64::MAX, end);
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

/// A content, as far as it can be opened.
type Opened = (Digest, Result<Option<Content>, StoreError>);

/// How far a check is, and who is told.
struct Progress<'a> {
    done: u64,
    total: u64,
    tell: &'a mut dyn FnMut(u64, u64),
}

impl Progress<'_> {
    /// So many bytes more, but not beyond `end`.
    fn add(&mut self, bytes: u64, end: u64) {
        self.done = self.done.saturating_add(bytes).min(end);
        (self.tell)(self.done, self.total);
    }
}

/// Models that are here, each file once, with the SHA-256 that their hub had announced.
fn checksums(models: &[ModelEntry]) -> Vec<(&ModelEntry, &str)> {
    let mut paths = HashSet::new();
    let announced = models.iter().filter_map(|model| match &model.origin {
        Origin::Hub { sha256: Some(sha256), .. } => Some((model, sha256.as_str())),
        _ => None,
    });
    announced.filter(|(model, _)| model.path.exists() && paths.insert(&model.path)).collect()
}

/// Reads a file through. `seen` is told how many bytes more were read.
fn check_sum(model: &ModelEntry, want: &str, seen: &mut dyn FnMut(u64)) -> Health {
    let got = match hub::sha256_of(&model.path, seen) {
        Ok(got) if got == want => return Health::Ok { held_bytes: model.size_bytes },
        Ok(got) => got,
        Err(source) => return Health::Unusable { why: StoreError::io("read", &model.path)(source).to_string() },
    };
    let advice = match &model.origin {
        Origin::Hub { downloaded: true, repo, file, .. } => {
            let name = &model.name;
            format!("Remove it and pull it again: murmur models rm {name}; murmur models pull hf:{repo}:{file}")
        }
        _ => "Another program has downloaded it: delete the file there, and pull it again".to_owned(),
    };
    Health::Unusable {
        why: format!("its bytes are not those that the hub announced: sha256 is {got}, not {want}. {advice}"),
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
        Ok(file) if file.bytes == model.size_bytes => Health::Ok { held_bytes: file.bytes },
        Ok(file) => {
            let (now, then) = (files::human_bytes(file.bytes), files::human_bytes(model.size_bytes));
            Health::Unusable {
                why: format!("it has {now}, and had {then} when it was added. Import or pull it again."),
            }
        }
        Err(error) => Health::Unusable { why: error.to_string() },
    }
}
