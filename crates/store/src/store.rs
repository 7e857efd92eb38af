//! The store itself: import, list, resolve, remove.

use std::{
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use crate::{
    content::{Content, Contents},
    error::StoreError,
    files::{self, FileLock},
    hub::select,
    index::{Index, ModelEntry, Origin},
    inspect::{self, ModelFile},
    quota,
    reference::{HubRef, ModelName, ModelRef},
};

/// When a model was last used is written down again after so long. Finer is of no use to what goes first when room is short.
const USED_STEP_S: u64 = 600;

/// The models under one data directory. Opening it touches nothing; directories appear with the first write.
///
/// Several processes may use one store: each change takes the lock, reads the index anew and replaces it.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
}

/// How to import.
#[derive(Debug, Clone, Default)]
pub struct ImportOptions {
    /// The name in the store; `None`: made from the file's name.
    pub name: Option<ModelName>,
    /// Copy the file into the store, instead of remembering where it lies.
    pub copy: bool,
}

/// What a removal did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removed {
    /// The entry that is gone.
    pub entry: ModelEntry,
    /// Bytes deleted from the disk; 0 when the file was not the store's own.
    pub freed_bytes: u64,
}

/// A model that can be opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// What to call it: the name in the store, or one made from the file's name.
    pub name: ModelName,
    /// The GGUF file, absolute.
    pub path: PathBuf,
}

impl Store {
    /// The store of a data directory.
    pub fn at(data_dir: &Path) -> Self {
        Self { root: data_dir.join("models") }
    }

    /// Where layer ranges that were cut out of models lie. Created on the first call; its content can be made again at any
    /// time, so whoever needs room may delete it while no node runs.
    pub fn slices_dir(&self) -> Result<PathBuf, StoreError> {
        let path = self.root.with_file_name("slices");
        files::create_directory(&path)?;
        Ok(path)
    }

    /// What has come from peers, by digest.
    pub fn contents(&self) -> Contents {
        Contents::below(&self.root)
    }

    /// Every model, by name.
    pub fn list(&self) -> Result<Vec<ModelEntry>, StoreError> {
        Ok(Index::read(&self.index_path())?.models)
    }

    /// A model by its name.
    pub fn get(&self, name: &ModelName) -> Result<ModelEntry, StoreError> {
        let index = Index::read(&self.index_path())?;
        index.find(name).cloned().ok_or_else(|| no_such_model(name.as_str(), &index))
    }

    /// Adds a GGUF file. The file is checked first; with `copy`, the disk's room too. Of a model in several files any names all; they are joined
    /// into a copy.
    pub fn import(&self, file: &Path, options: &ImportOptions) -> Result<ModelEntry, StoreError> {
        let path = std::path::absolute(file).map_err(StoreError::io("find", file))?;
        if let Some(part) = path.to_str().and_then(select::split_part) {
            return self.import_parts(&part, options.name.clone());
        }
        let model = inspect::check_model_file(&path)?;
        let name = match &options.name {
            Some(name) => name.clone(),
            None => name_of(&path)?,
        };
        let (path, origin) = if options.copy {
            // The lock comes later: copying may take minutes, and its target is decided by the name alone.
            self.demand_unknown(&name)?;
            (self.copy_in(&path, &name, model.bytes)?, Origin::Copy)
        } else {
            (path, Origin::Reference)
        };
        self.add(ModelEntry::new(name, path, origin, model))
    }

    /// Enters what has come from peers, or is on its way, under a name. Once it is whole, it must be a model. `asked_as`: what the user has
    /// asked for, if that was a file of a hub; [`resolve`](Store::resolve) finds it by that as well.
    pub fn add_content(
        &self,
        name: ModelName,
        content: &Content,
        asked_as: Option<&HubRef>,
    ) -> Result<ModelEntry, StoreError> {
        let model = match content.is_complete() {
            true => inspect::check_model_file(content.path())?,
            false => ModelFile { bytes: content.bytes(), licence: None },
        };
        let origin = Origin::Mesh { digest: content.digest() };
        let asked_as = asked_as.map(ToString::to_string);
        self.add(ModelEntry { asked_as, ..ModelEntry::new(name, content.path().to_owned(), origin, model) })
    }

    /// Removes a model: the entry always, the file when the store put it there.
    pub fn remove(&self, name: &ModelName) -> Result<Removed, StoreError> {
        let mut freed_bytes = 0;
        let entry = self.update(|index| {
            let Some(entry) = index.find(name).cloned() else { return Err(no_such_model(name.as_str(), index)) };
            index.models.retain(|other| other.name != *name);
            // What somebody is fetching stays, and so does its name.
            if let Origin::Mesh { digest } = &entry.origin
                && !index.models.iter().any(|other| other.origin == entry.origin)
            {
                freed_bytes = self.contents().remove(digest)?;
            }
            Ok(entry)
        })?;
        // Entry first, file second: a crash between leaves a file too many, never a name without its file.
        let still_used = self.list()?.iter().any(|other| other.path == entry.path);
        let deleted = match &entry.origin {
            _ if still_used => Ok(0),
            Origin::Reference | Origin::Hub { downloaded: false, .. } => Ok(0),
            Origin::Mesh { .. } => Ok(freed_bytes),
            Origin::Copy => delete(&entry.path),
            Origin::Hub { downloaded: true, .. } => crate::hub::layout::delete_snapshot_file(&entry.path),
        };
        let freed_bytes = deleted.map_err(StoreError::io("delete", &entry.path))?;
        Ok(Removed { entry, freed_bytes })
    }

    /// Finds the file of a `MODEL` argument. A hub reference is found when it was pulled before; otherwise the error says how to
    /// pull it.
    pub fn resolve(&self, model: &ModelRef) -> Result<Resolved, StoreError> {
        match model {
            ModelRef::Path(path) => resolve_path(path),
            ModelRef::Name(name) => match Index::read(&self.index_path())?.find(name) {
                Some(entry) => self.resolve_entry(entry),
                // A file without an ending in the current directory is what the user meant, when the store has no such name.
                None if Path::new(name.as_str()).is_file() => resolve_path(Path::new(name.as_str())),
                None => match self.find_digest(name)? {
                    Some(content) => self.resolve_content(&content),
                    None => Err(no_such_model(name.as_str(), &Index::read(&self.index_path())?)),
                },
            },
            ModelRef::Hub(wanted) => match self.find_pulled(wanted)? {
                Some(entry) => self.resolve_entry(&entry),
                None => Err(StoreError::NoSuchModel {
                    name: wanted.to_string(),
                    advice: format!("Pull it first: murmur models pull {wanted}"),
                }),
            },
        }
    }

    /// What was pulled under a name of the hub before, from there or from peers, if it is here and whole.
    pub fn find_pulled(&self, wanted: &HubRef) -> Result<Option<ModelEntry>, StoreError> {
        let mut entries = self.list()?.into_iter();
        Ok(entries.find(|entry| was_pulled_as(entry, wanted) && self.is_whole(entry)))
    }

    /// A model by its name, or the digest of its file, if it is here and whole.
    pub fn find_whole(&self, name: &ModelName) -> Result<Option<ModelEntry>, StoreError> {
        let by_digest = self.find_digest(name)?.filter(Content::is_complete);
        let is_it = |entry: &ModelEntry| {
            entry.name == *name || by_digest.as_ref().is_some_and(|content| is_entry_of(entry, content))
        };
        let mut entries = self.list()?.into_iter();
        Ok(entries.find(|entry| is_it(entry) && self.is_whole(entry)))
    }

    /// The file that a name is the digest of, if it is one and anything of that file is here. A file of the user's is known by its digest
    /// once it has been read through for it, as it is where it is signed or served in a mesh.
    fn find_digest(&self, name: &ModelName) -> Result<Option<Content>, StoreError> {
        match name.as_str().parse() {
            Ok(digest) => self.contents().find(&digest),
            Err(_) => Ok(None),
        }
    }

    fn is_whole(&self, entry: &ModelEntry) -> bool {
        match &entry.origin {
            Origin::Mesh { digest } => matches!(self.contents().open(digest), Ok(Some(found)) if found.is_complete()),
            _ => entry.path.exists(),
        }
    }

    /// The file of a model, which stays until this process ends if it was downloaded.
    fn resolve_entry(&self, entry: &ModelEntry) -> Result<Resolved, StoreError> {
        let resolved = |path: &Path| Resolved { name: entry.name.clone(), path: path.to_owned() };
        let incomplete = |held_bytes| StoreError::Incomplete {
            name: entry.name.to_string(),
            held: files::human_bytes(held_bytes),
            bytes: files::human_bytes(entry.size_bytes),
            source_name: entry.asked_as.clone().unwrap_or_else(|| entry.name.to_string()),
        };
        match &entry.origin {
            Origin::Reference | Origin::Copy => Ok(resolved(&entry.path)),
            Origin::Hub { .. } if quota::hold(&entry.path) => {
                self.mark_entry_used(entry);
                Ok(resolved(&entry.path))
            }
            Origin::Hub { repo, revision, file, .. } => {
                let source = HubRef { repo: repo.clone(), revision: revision.clone(), wanted: Some(file.clone()) };
                let name = entry.name.to_string();
                Err(StoreError::NotHere { name, path: entry.path.clone(), source_name: source.to_string() })
            }
            Origin::Mesh { digest } => match self.contents().find(digest)? {
                Some(content) if content.is_complete() && quota::hold(content.path()) => Ok(resolved(content.path())),
                Some(part) if !part.is_complete() => Err(incomplete(part.held_bytes())),
                _ => Err(incomplete(0)),
            },
        }
    }

    /// A file that was named by its digest, under the name that it has here. What has none and came from peers is called by its digest.
    fn resolve_content(&self, content: &Content) -> Result<Resolved, StoreError> {
        let digest = content.digest().to_string();
        let incomplete = |held_bytes| StoreError::Incomplete {
            name: digest.clone(),
            held: files::human_bytes(held_bytes),
            bytes: files::human_bytes(content.bytes()),
            source_name: digest.clone(),
        };
        if !content.is_complete() {
            return Err(incomplete(content.held_bytes()));
        }
        if let Some(entry) = self.list()?.iter().find(|entry| is_entry_of(entry, content)) {
            return self.resolve_entry(entry);
        }
        if content.is_reference() {
            return resolve_path(content.path());
        }
        inspect::check_model_file(content.path())?;
        match quota::hold(content.path()) {
            true => Ok(Resolved { name: digest.parse()?, path: content.path().to_owned() }),
            false => Err(incomplete(0)),
        }
    }

    /// Remembers that a file is being used, if it is one that was downloaded: it goes later. Best effort, as a store that cannot be
    /// written to makes no room either.
    pub fn mark_used(&self, file: &Path) {
        self.contents().touch(file);
        for entry in self.list().unwrap_or_default().iter().filter(|entry| entry.path == file) {
            self.mark_entry_used(entry);
        }
    }

    /// Contents remember it themselves.
    fn mark_entry_used(&self, entry: &ModelEntry) {
        let now = unix_now_s();
        if now.saturating_sub(entry.used_unix_s.max(entry.added_unix_s)) < USED_STEP_S {
            return;
        }
        let marked = self.update(|index| {
            let same = index.models.iter_mut().filter(|other| other.name == entry.name);
            same.for_each(|other| other.used_unix_s = now);
            Ok(())
        });
        if let Err(error) = marked {
            tracing::debug!(%error, "when a model was used cannot be written down");
        }
    }

    /// Adds an entry whose file is in place. The same file under the same name is not an error: it is refreshed.
    pub(crate) fn add(&self, entry: ModelEntry) -> Result<ModelEntry, StoreError> {
        self.update(|index| {
            match index.models.iter_mut().find(|old| old.name == entry.name) {
                Some(old) if old.path == entry.path || is_same_source(&old.origin, &entry.origin) => {
                    let keeps_ownership =
                        matches!(old.origin, Origin::Hub { downloaded: true, .. }) && old.path == entry.path;
                    *old = ModelEntry {
                        pinned: old.pinned,
                        used_unix_s: old.used_unix_s,
                        asked_as: entry.asked_as.clone().or(old.asked_as.take()),
                        licence: entry.licence.clone().or(old.licence.take()),
                        ..entry.clone()
                    };
                    if let (Origin::Hub { downloaded, .. }, true) = (&mut old.origin, keeps_ownership) {
                        *downloaded = true;
                    }
                    return Ok(old.clone());
                }
                Some(old) => {
                    return Err(StoreError::NameTaken { name: entry.name.to_string(), path: old.path.clone() });
                }
                None => index.models.push(entry.clone()),
            }
            Ok(entry)
        })
    }

    pub(crate) fn update<T>(&self, change: impl FnOnce(&mut Index) -> Result<T, StoreError>) -> Result<T, StoreError> {
        files::create_directory(&self.root)?;
        let _lock = FileLock::wait(&self.root.join("index.lock"))?;
        let mut index = Index::read(&self.index_path())?;
        let outcome = change(&mut index)?;
        index.write(&self.index_path())?;
        Ok(outcome)
    }

    /// Refuses a name that a model has.
    pub(crate) fn demand_unknown(&self, name: &ModelName) -> Result<(), StoreError> {
        match Index::read(&self.index_path())?.find(name) {
            Some(taken) => Err(StoreError::NameTaken { name: name.to_string(), path: taken.path.clone() }),
            None => Ok(()),
        }
    }

    fn copy_in(&self, from: &Path, name: &ModelName, size_bytes: u64) -> Result<PathBuf, StoreError> {
        let directory = self.files_dir()?;
        files::demand_space(&directory, size_bytes, "--data-dir, or import without --copy")?;
        let target = directory.join(format!("{name}.gguf"));
        let temporary = files::with_suffix(&target, &format!(".tmp-{}", std::process::id()));
        let copied = std::fs::copy(from, &temporary)
            .and_then(|_| std::fs::File::open(&temporary)?.sync_all())
            .and_then(|()| std::fs::rename(&temporary, &target));
        if let Err(source) = copied {
            let _ = std::fs::remove_file(&temporary);
            return Err(StoreError::Io { doing: "copy to", path: target, source });
        }
        files::sync_parent(&target);
        Ok(target)
    }

    /// Where copies lie. It is made.
    pub(crate) fn files_dir(&self) -> Result<PathBuf, StoreError> {
        let directory = self.root.join("files");
        files::create_directory(&directory)?;
        Ok(directory)
    }

    pub(crate) fn index_path(&self) -> PathBuf {
        self.root.join("index.json")
    }
}

fn resolve_path(path: &Path) -> Result<Resolved, StoreError> {
    let path = std::path::absolute(path).map_err(StoreError::io("find", path))?;
    inspect::check_model_file(&path)?;
    Ok(Resolved { name: name_of(&path)?, path })
}

pub(crate) fn name_of(path: &Path) -> Result<ModelName, StoreError> {
    ModelName::from_file_name(&path.file_name().unwrap_or_default().to_string_lossy())
}

pub(crate) fn no_such_model(name: &str, index: &Index) -> StoreError {
    let advice = match index.models.as_slice() {
        [] => {
            "The store is empty: `murmur models import FILE` or `murmur models pull hf:owner/repo` fills it.".to_owned()
        }
        some => {
            let nearest = some
                .iter()
                .map(|entry| entry.name.as_str())
                .max_by(|a, b| likeness(name, a).total_cmp(&likeness(name, b)));
            format!("Did you mean '{}'? `murmur models ls` shows all {}.", nearest.unwrap_or_default(), some.len())
        }
    };
    StoreError::NoSuchModel { name: name.to_owned(), advice }
}

/// Shared pairs of letters (Dice's coefficient): good enough to guess which name was meant.
fn likeness(a: &str, b: &str) -> f64 {
    let pairs = |text: &str| -> Vec<[u8; 2]> {
        text.to_ascii_lowercase().as_bytes().windows(2).map(|w| [w[0], w[1]]).collect()
    };
    let (a, b) = (pairs(a), pairs(b));
    let shared = a.iter().filter(|pair| b.contains(pair)).count();
    2.0 * shared as f64 / (a.len() + b.len()).max(1) as f64
}

fn was_pulled_as(entry: &ModelEntry, wanted: &HubRef) -> bool {
    match &entry.origin {
        Origin::Hub { repo, revision, commit, file, .. } => {
            *repo == wanted.repo
                && (*revision == wanted.revision || *commit == wanted.revision)
                && wanted.wanted.as_deref().is_none_or(|w| select::is_wanted(file, w))
        }
        Origin::Mesh { .. } => {
            let place: Option<HubRef> = entry.asked_as.as_ref().and_then(|place| place.parse().ok());
            place.is_some_and(|place| is_place_of(&place, wanted))
        }
        _ => false,
    }
}

/// Whether a file of a hub at one commit is what is wanted.
fn is_place_of(place: &HubRef, wanted: &HubRef) -> bool {
    let is_file = |wanted: &str| place.wanted.as_deref().is_some_and(|file| select::is_wanted(file, wanted));
    place.is_in(wanted) && wanted.wanted.as_deref().is_none_or(is_file)
}

/// Whether an entry is for this file.
fn is_entry_of(entry: &ModelEntry, content: &Content) -> bool {
    entry.origin == Origin::Mesh { digest: content.digest() } || entry.path == content.path()
}

fn is_same_source(a: &Origin, b: &Origin) -> bool {
    match (a, b) {
        (Origin::Mesh { digest: a }, Origin::Mesh { digest: b }) => a == b,
        (Origin::Hub { repo: repo_a, file: file_a, .. }, Origin::Hub { repo: repo_b, file: file_b, .. }) => {
            repo_a == repo_b && file_a == file_b
        }
        _ => false,
    }
}

/// Deletes a file and says how large it was; one that is gone already is no failure.
pub(crate) fn delete(path: &Path) -> std::io::Result<u64> {
    match std::fs::metadata(path).and_then(|meta| std::fs::remove_file(path).map(|()| meta.len())) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(0),
        other => other,
    }
}

pub(crate) fn unix_now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
