//! Joins a model that was split into several files (`name-00001-of-00003.gguf`, as llama.cpp's `llama-gguf-split` makes them).
//!
//! The first part has the metadata, each part has some of the tensors and says `split.no`, `split.count` and
//! `split.tensors.count`. The joined file has the metadata of the first part without `split.*`, in their order, and the
//! tensors of all parts in theirs. It depends on nothing else: whoever joins the same parts gets the same bytes, and so the
//! same digest.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::GgufError;
use crate::gguf::Gguf;
use crate::write::{GgufBuilder, TensorSource, WriteError};

/// Most parts of one model. The largest known has 191.
pub const PARTS_MAX: usize = 1_024;

const KEY_NUMBER: &str = "split.no";
const KEY_COUNT: &str = "split.count";
const KEY_TENSORS: &str = "split.tensors.count";
const KEYS_PREFIX: &str = "split.";

/// Why parts were not joined.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// A part that cannot be read, or is no GGUF file.
    #[error(transparent)]
    Part(#[from] GgufError),
    /// The files are not the parts of one model, in order.
    #[error("{}: {reason}; get all parts again from one place", path.display())]
    Mismatch {
        /// The part that does not fit.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// There are none, or too many.
    #[error("{0} parts cannot be joined: a model has 1 to {PARTS_MAX}")]
    Count(usize),
    /// The joined file could not be written.
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// All parts of one model, checked against each other.
#[derive(Debug)]
pub struct Parts(Vec<Gguf>);

impl Parts {
    /// Reads the headers of all parts, which are given in their order.
    pub fn open(paths: &[impl AsRef<Path>]) -> Result<Self, JoinError> {
        if !(1..=PARTS_MAX).contains(&paths.len()) {
            return Err(JoinError::Count(paths.len()));
        }
        let parts = Self(paths.iter().map(Gguf::open).collect::<Result<_, _>>()?);
        for (at, part) in parts.0.iter().enumerate() {
            parts.check(part, at as u64)?;
        }
        parts.check_tensors()?;
        Ok(parts)
    }

    /// The part is the one of its place.
    fn check(&self, part: &Gguf, at: u64) -> Result<(), JoinError> {
        let wanted = [(KEY_COUNT, self.0.len() as u64), (KEY_NUMBER, at), (KEY_TENSORS, self.tensors() as u64)];
        for (key, wanted) in wanted {
            let found = part.u64(key);
            if found != Some(wanted) {
                let found = found.map_or_else(|| "nothing".to_owned(), |found| found.to_string());
                return Err(mismatch(
                    part,
                    format!("{key} is {found}, and of part {} of {} it should be {wanted}", at + 1, self.0.len()),
                ));
            }
        }
        Ok(())
    }

    /// No tensor is in two of them.
    fn check_tensors(&self) -> Result<(), JoinError> {
        let mut seen: HashMap<&str, &Gguf> = HashMap::new();
        for part in &self.0 {
            for tensor in part.tensors() {
                if let Some(other) = seen.insert(&tensor.name, part) {
                    let reason = format!("the tensor {} is in {} as well", tensor.name, other.path().display());
                    return Err(mismatch(part, reason));
                }
            }
        }
        Ok(())
    }

    /// Tensors in all parts.
    fn tensors(&self) -> usize {
        self.0.iter().map(|part| part.tensors().len()).sum()
    }

    /// Bytes of all parts: the joined file is smaller.
    pub fn bytes(&self) -> u64 {
        self.0.iter().map(Gguf::file_bytes).sum()
    }

    /// Writes the joined file and returns its size in bytes.
    pub fn join(&self, path: impl AsRef<Path>) -> Result<u64, JoinError> {
        let mut joined = GgufBuilder::default();
        for (key, value) in self.0.iter().take(1).flat_map(Gguf::keys) {
            if !key.starts_with(KEYS_PREFIX) {
                joined.set(key, value.clone());
            }
        }
        for part in &self.0 {
            let unread = |source| WriteError::Io { path: part.path().to_path_buf(), source };
            let file = Arc::new(File::open(part.path()).map_err(unread)?);
            for tensor in part.tensors() {
                let source = TensorSource::FileRange { file: Arc::clone(&file), offset: tensor.offset };
                joined.tensor(&*tensor.name, &tensor.dims, tensor.ty, source)?;
            }
        }
        Ok(joined.write(path)?)
    }
}

fn mismatch(part: &Gguf, reason: String) -> JoinError {
    JoinError::Mismatch { path: part.path().to_path_buf(), reason }
}
