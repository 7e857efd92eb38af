//! Whether a file can be a model at all, before anything remembers it.

use std::path::Path;

use murmur_gguf::Gguf;

use crate::{error::StoreError, hub::select};

/// A licence is a name such as `apache-2.0`; what is longer is cut.
const LICENCE_CHARS_MAX: usize = 100;

/// What is remembered of a file.
pub(crate) struct ModelFile {
    /// Its size.
    pub(crate) bytes: u64,
    /// `general.license`.
    pub(crate) licence: Option<String>,
}

/// Checks that `path` is a well-formed GGUF file with a whole model.
pub(crate) fn check_model_file(path: &Path) -> Result<ModelFile, StoreError> {
    let gguf = Gguf::open(path)?;
    let file_name = path.file_name().unwrap_or_default().to_string_lossy();
    if let Some(part) = select::split_part(&file_name) {
        return Err(StoreError::BadModel {
            path: path.to_owned(),
            why: format!("it is part {} of a model that was split into {} files", part.number, part.count),
            advice: format!("Make one file of them first: murmur models import {}", path.display()),
        });
    }
    let licence = gguf.str("general.license").and_then(licence);
    Ok(ModelFile { bytes: gguf.file_bytes(), licence })
}

/// Under which licence a model may be used, as its file says; `None`: it does not, or is none.
pub fn licence_of(path: &Path) -> Option<String> {
    Gguf::open(path).ok()?.str("general.license").and_then(licence)
}

/// The name of a licence as somebody else wrote it, on one line and of a length that fits there; `None`: it names none.
pub(crate) fn licence(text: &str) -> Option<String> {
    let clean: String = text.chars().filter(|c| !c.is_control()).collect();
    let clean: String = clean.trim().chars().take(LICENCE_CHARS_MAX).collect();
    let says_nothing = matches!(clean.to_ascii_lowercase().as_str(), "" | "unknown" | "none");
    (!says_nothing).then_some(clean)
}

#[cfg(test)]
mod tests {
    use super::licence;

    #[test]
    fn a_licence_is_one_short_line_or_none() {
        assert_eq!(licence(" apache-2.0\n").as_deref(), Some("apache-2.0"));
        assert_eq!(licence("a\x1b[31mb\nc").as_deref(), Some("a[31mbc"));
        assert_eq!(licence(&"x".repeat(1000)).map(|text| text.len()), Some(100));
        for nothing in ["", "  ", "\n", "unknown", "None"] {
            assert_eq!(licence(nothing), None, "{nothing:?}");
        }
    }
}
