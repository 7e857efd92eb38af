//! What a user may write as `MODEL`: a path to a GGUF file, a name in the store, or `hf:owner/repo[@revision][:quant]`.

use std::{fmt, path::PathBuf, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::error::StoreError;

/// Bytes in a model's name at most; it becomes a file name.
pub const NAME_BYTES_MAX: usize = 128;
/// Bytes in an owner or a repository name at most (the hub's own limit).
const HUB_PART_BYTES_MAX: usize = 96;
/// Bytes in a revision, a quant or a file name at most.
const HUB_TAIL_BYTES_MAX: usize = 256;

/// A model's name in the store: `[A-Za-z0-9]` first, then also `.`, `_`, `-`. Safe as a file name everywhere.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ModelName(String);

impl ModelName {
    /// Makes a name out of a file's name: the `.gguf` ending goes, what a name cannot have becomes `-`.
    pub fn from_file_name(file_name: &str) -> Result<Self, StoreError> {
        let stem = match file_name.len().checked_sub(".gguf".len()).and_then(|at| file_name.split_at_checked(at)) {
            Some((stem, ending)) if ending.eq_ignore_ascii_case(".gguf") => stem,
            _ => file_name,
        };
        let clean: String = stem.chars().map(|c| if allowed_in_name(c) { c } else { '-' }).collect();
        let clean = clean.trim_start_matches(|c: char| !c.is_ascii_alphanumeric());
        clean[..clean.len().min(NAME_BYTES_MAX)].parse()
    }

    /// The same of a file of a hub, which may lie in a folder there.
    pub fn from_hub_file(file: &str) -> Result<Self, StoreError> {
        Self::from_file_name(file.rsplit('/').next().unwrap_or(file))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

fn allowed_in_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-')
}

impl FromStr for ModelName {
    type Err = StoreError;

    fn from_str(text: &str) -> Result<Self, StoreError> {
        let bad = |why: &str| StoreError::BadReference { text: shown(text), why: why.to_owned() };
        if text.is_empty() {
            return Err(bad("it is empty"));
        }
        if text.len() > NAME_BYTES_MAX {
            return Err(bad(&format!("a name has {NAME_BYTES_MAX} bytes at most")));
        }
        if !text.starts_with(|c: char| c.is_ascii_alphanumeric()) {
            return Err(bad("a name begins with a letter or a digit"));
        }
        if let Some(odd) = text.chars().find(|c| !allowed_in_name(*c)) {
            return Err(bad(&format!("a name has letters, digits, '.', '_' and '-', not {odd:?}")));
        }
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for ModelName {
    type Error = StoreError;

    fn try_from(text: String) -> Result<Self, StoreError> {
        text.parse()
    }
}

impl From<ModelName> for String {
    fn from(name: ModelName) -> Self {
        name.0
    }
}

impl fmt::Display for ModelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A model on a hub.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct HubRef {
    /// `owner/repo`.
    pub repo: String,
    /// Branch, tag or commit; `main` unless given.
    pub revision: String,
    /// A quantisation such as `Q4_K_M`, or a file of the repository; `None`: the preferred one.
    pub wanted: Option<String>,
}

impl HubRef {
    /// Whether this place, which says its commit, is in a repository at the revision that is wanted. What `main` is moves, so any commit may have been it.
    pub fn is_in(&self, wanted: &HubRef) -> bool {
        self.repo.eq_ignore_ascii_case(&wanted.repo)
            && (wanted.revision == "main" || self.revision.starts_with(&wanted.revision))
    }
}

impl FromStr for HubRef {
    type Err = StoreError;

    /// Reads `owner/repo[@revision][:quant]`, with or without `hf:` before it.
    fn from_str(text: &str) -> Result<Self, StoreError> {
        let bad = |why: &str| StoreError::BadReference { text: shown(text), why: why.to_owned() };
        let rest = text.strip_prefix("hf:").unwrap_or(text);
        let (rest, wanted) = match rest.split_once(':') {
            Some((rest, wanted)) => (rest, Some(wanted)),
            None => (rest, None),
        };
        let (repo, revision) = match rest.split_once('@') {
            Some((repo, revision)) => (repo, revision),
            None => (rest, "main"),
        };
        let Some((owner, name)) = repo.split_once('/') else {
            return Err(bad("a hub reference is hf:owner/repo[:quant]"));
        };
        for part in [owner, name] {
            let fits = (1..=HUB_PART_BYTES_MAX).contains(&part.len())
                && part.chars().all(allowed_in_name)
                && part.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
                && !part.contains("--")
                && !part.contains("..");
            if !fits {
                return Err(bad(&format!("{part:?} cannot be an owner or a repository on a hub")));
            }
        }
        if !is_safe_relative_path(revision) {
            return Err(bad("the revision after '@' is a branch, a tag or a commit"));
        }
        if wanted.is_some_and(|wanted| !is_safe_relative_path(wanted)) {
            return Err(bad("after ':' comes a quantisation such as Q4_K_M, or a file of the repository"));
        }
        Ok(Self { repo: repo.to_owned(), revision: revision.to_owned(), wanted: wanted.map(str::to_owned) })
    }
}

impl fmt::Display for HubRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "hf:{}", self.repo)?;
        if self.revision != "main" {
            write!(f, "@{}", self.revision)?;
        }
        match &self.wanted {
            Some(wanted) => write!(f, ":{wanted}"),
            None => Ok(()),
        }
    }
}

/// Whether a text from outside may become a path below a directory of ours.
pub(crate) fn is_safe_relative_path(text: &str) -> bool {
    (1..=HUB_TAIL_BYTES_MAX).contains(&text.len())
        && text.split('/').all(|part| !part.is_empty() && part != "." && part != "..")
        && text
            .chars()
            .all(|c| !c.is_control() && !matches!(c, '\\' | ':' | '?' | '#' | '%' | '"' | '<' | '>' | '|' | '*'))
}

/// What a user may write as `MODEL`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelRef {
    /// A file.
    Path(PathBuf),
    /// A name in the store.
    Name(ModelName),
    /// A model on a hub.
    Hub(HubRef),
}

impl FromStr for ModelRef {
    type Err = StoreError;

    fn from_str(text: &str) -> Result<Self, StoreError> {
        if text.starts_with("hf:") {
            return text.parse().map(Self::Hub);
        }
        let looks_like_path = text.contains(['/', std::path::MAIN_SEPARATOR])
            || text.to_ascii_lowercase().ends_with(".gguf")
            || matches!(text, "." | "..")
            || text.starts_with('~');
        if looks_like_path {
            return Ok(Self::Path(PathBuf::from(text)));
        }
        text.parse().map(Self::Name)
    }
}

/// A text of the user's, cut so that a message stays readable.
fn shown(text: &str) -> String {
    const SHOWN_CHARS_MAX: usize = 200;
    match text.char_indices().nth(SHOWN_CHARS_MAX) {
        Some((at, _)) => format!("{}...", &text[..at]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_hub_reference_has_a_repository_and_may_have_a_revision_and_a_quant() {
        let full: HubRef = "hf:bartowski/Llama-3.2-1B-Instruct-GGUF@v1.0:Q4_K_M".parse().unwrap();
        assert_eq!(full.repo, "bartowski/Llama-3.2-1B-Instruct-GGUF");
        assert_eq!(full.revision, "v1.0");
        assert_eq!(full.wanted.as_deref(), Some("Q4_K_M"));
        let bare: HubRef = "hf:a/b".parse().unwrap();
        assert_eq!((bare.revision.as_str(), bare.wanted), ("main", None));
    }

    #[test]
    fn a_hub_reference_that_could_leave_the_cache_directory_is_refused() {
        for text in [
            "hf:",
            "hf:a",
            "hf:/b",
            "hf:a/",
            "hf:a/b/c",
            "hf:../b",
            "hf:a/..",
            "hf:a/b@../../etc",
            "hf:a/b:../x",
            "hf:a/b:",
            "hf:a/b@",
            "hf:a--b/c",
            "hf:a/b:/etc/passwd",
            "hf:a/b:x\n",
        ] {
            assert!(text.parse::<HubRef>().is_err(), "{text:?} was taken");
        }
    }

    #[test]
    fn a_path_a_name_and_a_hub_reference_are_told_apart() {
        assert!(matches!("./model".parse(), Ok(ModelRef::Path(_))));
        assert!(matches!("model.GGUF".parse(), Ok(ModelRef::Path(_))));
        assert!(matches!("model-q8".parse(), Ok(ModelRef::Name(_))));
        assert!(matches!("hf:a/b".parse(), Ok(ModelRef::Hub(_))));
        assert!("".parse::<ModelRef>().is_err());
    }

    proptest! {
        #[test]
        fn what_is_shown_of_a_hub_reference_reads_back_as_the_same(
            owner in "[a-z0-9]{1,8}", repo in "[A-Za-z0-9][A-Za-z0-9._]{0,8}", revision in "[a-z0-9]{1,6}", quant in proptest::option::of("[A-Z0-9_]{1,8}")
        ) {
            prop_assume!(!repo.contains(".."));
            let reference = HubRef { repo: format!("{owner}/{repo}"), revision, wanted: quant };
            prop_assert_eq!(reference.to_string().parse::<HubRef>().unwrap(), reference);
        }

        #[test]
        fn no_text_makes_the_parsers_panic_and_every_name_is_one_path_component(text in "\\PC{0,200}") {
            let _ = text.parse::<ModelRef>();
            let _ = text.parse::<HubRef>();
            for name in [text.parse::<ModelName>(), ModelName::from_file_name(&text)].into_iter().flatten() {
                prop_assert_eq!(std::path::Path::new(name.as_str()).components().count(), 1);
            }
        }
    }
}
