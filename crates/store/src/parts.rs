//! Models in several files, joined into one: files of the user's, and what comes from a hub ([`crate::hub`]).
//!
//! Who joins the same parts gets the same bytes ([`murmur_gguf::join`]). The joined file appears when it is whole and on disk; what a crash
//! leaves of one is removed when the next is made.

use std::path::PathBuf;

use murmur_gguf::join::Parts;

use crate::{
    content::Content,
    error::StoreError,
    files::{self, FileLock},
    hub::select::SplitPart,
    index::{ModelEntry, Origin},
    inspect,
    reference::ModelName,
    store::{Store, name_of},
};

/// How a file is called that is not whole ([`murmur_gguf::GgufBuilder`]).
const PARTIAL_SUFFIX: &str = ".partial";

impl Store {
    /// Joins the user's own files into a copy, and adds that.
    pub(crate) fn import_parts(&self, part: &SplitPart<'_>, name: Option<ModelName>) -> Result<ModelEntry, StoreError> {
        let parts = Parts::open(&part.all())?;
        let name = match name {
            Some(name) => name,
            None => name_of(&PathBuf::from(part.joined()))?,
        };
        self.demand_unknown(&name)?;
        let directory = self.files_dir()?;
        let _one = FileLock::wait(&directory.join("join.lock"))?;
        sweep(&directory);
        files::demand_space(&directory, parts.bytes(), "--data-dir")?;
        let path = directory.join(format!("{name}.gguf"));
        parts.join(&path)?;
        let model = inspect::check_model_file(&path)?;
        self.add(ModelEntry::new(name, path, Origin::Copy, model))
    }

    /// Joins files into a content.
    pub(crate) fn join_content(&self, paths: &[PathBuf]) -> Result<Content, StoreError> {
        let parts = Parts::open(paths)?;
        files::demand_space(&self.index_path(), parts.bytes(), "--data-dir")?;
        self.contents().make(|path| Ok(parts.join(path).map(drop)?))
    }
}

/// Removes what was not finished. The caller holds the lock of all who join.
fn sweep(directory: &std::path::Path) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.as_encoded_bytes();
        if name.starts_with(b".")
            && name.ends_with(PARTIAL_SUFFIX.as_bytes())
            && let Err(error) = std::fs::remove_file(entry.path())
        {
            tracing::warn!(path = %entry.path().display(), %error, "cannot remove what an earlier process has left");
        }
    }
}
