//! What can go wrong with stored models. Every message says what happened, why, and what to do.

use std::{io, path::PathBuf};

use murmur_gguf::GgufErrorKind;

/// What sort of failure it was, for callers that map it to an exit code or an HTTP status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// What the user wrote makes no sense.
    Usage,
    /// A file, a name, a repository or a revision does not exist.
    NotFound,
    /// The disk is too small or full.
    NoSpace,
    /// Access was refused, or something that is needed cannot be had now.
    Unavailable,
    /// The data is not what it claims to be.
    Damaged,
    /// Anything else.
    Other,
}

/// A failure of the store or of a pull.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A `MODEL` argument or a name that cannot be read.
    #[error(
        "'{text}' does not name a model: {why}. Write a path to a GGUF file, a name from `murmur models ls`, or hf:owner/repo[:quant]."
    )]
    BadReference {
        /// What was given.
        text: String,
        /// What is wrong with it.
        why: String,
    },
    /// Nothing by that name.
    #[error("there is no model '{name}': neither the store nor the current directory has it. {advice}")]
    NoSuchModel {
        /// What was asked for.
        name: String,
        /// What to do.
        advice: String,
    },
    /// The name is in use for another file.
    #[error(
        "the name '{name}' is taken by {path}. Choose another one with --name, or remove the old one: murmur models rm {name}"
    )]
    NameTaken {
        /// The name.
        name: String,
        /// What has it.
        path: PathBuf,
    },
    /// A GGUF file that cannot be used.
    #[error("{path} is not usable as a model: {why}. {advice}")]
    BadModel {
        /// The file.
        path: PathBuf,
        /// Why.
        why: String,
        /// What to do.
        advice: String,
    },
    /// A GGUF file that cannot be read.
    #[error(transparent)]
    Gguf(#[from] murmur_gguf::GgufError),
    /// The file system said no.
    #[error("cannot {doing} {path}: {source}. {}", advice_for(source))]
    Io {
        /// "read", "write" ...
        doing: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's word.
        source: io::Error,
    },
    /// The disk has not enough room, or ran full.
    #[error("no space in {path}: {needs}, {available}. Free some space, or choose another place ({place}).{kept}")]
    NoSpace {
        /// The directory.
        path: PathBuf,
        /// What is needed.
        needs: String,
        /// What there is.
        available: String,
        /// How to choose another place.
        place: &'static str,
        /// What happens to a part that is there already.
        kept: String,
    },
    /// The index cannot be read.
    #[error("the model index {path} cannot be used: {why}. {advice}")]
    BadIndex {
        /// The index.
        path: PathBuf,
        /// Why.
        why: String,
        /// What to do.
        advice: String,
    },
    /// A setting of the hub is wrong.
    #[error("{what} is not usable: {why}")]
    BadHubSetting {
        /// Which.
        what: String,
        /// Why, and what to do.
        why: String,
    },
    /// The hub does not have it.
    #[error("{what} is not on {endpoint}: {why}. {advice}")]
    NotOnHub {
        /// Repository, revision or file.
        what: String,
        /// The hub.
        endpoint: String,
        /// Why.
        why: String,
        /// What to do.
        advice: String,
    },
    /// The hub wants a token, or a licence accepted.
    #[error("{endpoint} refuses access to {what}: {why}. {advice}")]
    HubRefuses {
        /// Repository or file.
        what: String,
        /// The hub.
        endpoint: String,
        /// Why.
        why: String,
        /// What to do.
        advice: String,
    },
    /// The hub cannot be reached, is overloaded, or keeps breaking off.
    #[error("{endpoint} cannot be used now: {why}. {advice}")]
    HubUnavailable {
        /// The hub.
        endpoint: String,
        /// Why.
        why: String,
        /// What to do.
        advice: String,
    },
    /// The hub said something that makes no sense.
    #[error("{endpoint} gave an answer that murmur cannot use: {why}. If HF_ENDPOINT names a mirror, try without it.")]
    BadHubAnswer {
        /// The hub.
        endpoint: String,
        /// Why.
        why: String,
    },
    /// The bytes are not the ones the hub announced.
    #[error(
        "the download of {file} is damaged: sha256 is {got}, the hub announced {want}. The download was deleted; pull again, and if it happens twice, suspect the mirror, the proxy or this machine's memory."
    )]
    WrongChecksum {
        /// The file on the hub.
        file: String,
        /// What the hub announced.
        want: String,
        /// What came.
        got: String,
    },
    /// Another process downloads the same file.
    #[error(
        "another process is downloading {file} (it holds {lock}). Wait for it, or end it and pull again: what it has done so far is kept."
    )]
    PullInProgress {
        /// The file on the hub.
        file: String,
        /// The lock file.
        lock: PathBuf,
    },
}

impl StoreError {
    /// What sort of failure it was.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::BadReference { .. } | Self::NameTaken { .. } | Self::BadHubSetting { .. } => ErrorKind::Usage,
            Self::NoSuchModel { .. } | Self::NotOnHub { .. } => ErrorKind::NotFound,
            Self::BadModel { .. } | Self::WrongChecksum { .. } | Self::BadIndex { .. } => ErrorKind::Damaged,
            Self::NoSpace { .. } => ErrorKind::NoSpace,
            Self::HubRefuses { .. } | Self::HubUnavailable { .. } | Self::PullInProgress { .. } => {
                ErrorKind::Unavailable
            }
            Self::BadHubAnswer { .. } => ErrorKind::Other,
            Self::Gguf(error) => match error.kind() {
                GgufErrorKind::NotFound => ErrorKind::NotFound,
                GgufErrorKind::PermissionDenied => ErrorKind::Unavailable,
                GgufErrorKind::Io(_) => ErrorKind::Other,
                _ => ErrorKind::Damaged,
            },
            Self::Io { source, .. } => match source.kind() {
                io::ErrorKind::NotFound => ErrorKind::NotFound,
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => ErrorKind::Unavailable,
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::NoSpace,
                _ => ErrorKind::Other,
            },
        }
    }

    pub(crate) fn io(doing: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { doing, path, source }
    }
}

/// What to do about a failure of the file system.
fn advice_for(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::NotFound => "Check the path.",
        io::ErrorKind::PermissionDenied => "Give this user access to it, or choose another place with --data-dir.",
        io::ErrorKind::ReadOnlyFilesystem => "The file system is read-only; choose another place with --data-dir.",
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "Free some space and try again.",
        _ => "If it happens again, run `murmur doctor`.",
    }
}
