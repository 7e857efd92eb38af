//! Whether a file can be a model at all, before anything remembers it.

use std::path::Path;

use murmur_gguf::Gguf;

use crate::{error::StoreError, hub::select};

/// Checks that `path` is a well-formed GGUF file with a whole model; returns its size in bytes.
pub(crate) fn check_model_file(path: &Path) -> Result<u64, StoreError> {
    let gguf = Gguf::open(path)?;
    let file_name = path.file_name().unwrap_or_default().to_string_lossy();
    if let Some(part) = select::split_part(&file_name).filter(|part| part.count > 1) {
        return Err(StoreError::BadModel {
            path: path.to_owned(),
            why: format!("it is part {} of a model that was split into {} files", part.number, part.count),
            advice: select::JOIN_ADVICE.to_owned(),
        });
    }
    Ok(gguf.file_bytes())
}
