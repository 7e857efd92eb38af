//! What can go wrong with stored models. Every message says what happened, why, and what to do.

use std::{io, path::PathBuf};

use murmur_gguf::{Digest, GgufErrorKind, WriteError, join::JoinError};

use crate::files;

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
    /// The parts of a model that was split cannot be joined.
    #[error(transparent)]
    Join(#[from] murmur_gguf::join::JoinError),
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
    /// What was to be downloaded does not fit into the quota.
    #[error(
        "{needs} more do not fit into the quota of {quota} for downloads{kept}. Raise it (murmur models quota SIZE), let something go (murmur models pin --off NAME), or remove something (murmur models rm NAME)"
    )]
    OverQuota {
        /// How much was to come, in words.
        needs: String,
        /// The quota, in words.
        quota: String,
        /// What stays of what is there, in words; or nothing.
        kept: String,
    },
    /// A model whose name is known and whose file is gone, to make room or otherwise.
    #[error("the file of '{name}' is not here any more ({path}). Get it again with: murmur models pull {source_name}")]
    NotHere {
        /// Its name.
        name: String,
        /// Where it was.
        path: PathBuf,
        /// How it is called where it came from.
        source_name: String,
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
    /// The user does not want the hub to be asked.
    #[error(
        "{endpoint} is not asked: HF_HUB_OFFLINE is set. Unset it, or take what is on this machine (murmur models ls) or in the mesh (murmur models search)"
    )]
    HubOffline {
        /// The hub.
        endpoint: String,
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
    /// What is kept of a content cannot be used.
    #[error("{path} cannot be used: {why}. {advice}")]
    BadContent {
        /// The file.
        path: PathBuf,
        /// Why.
        why: String,
        /// What to do.
        advice: String,
    },
    /// A size that a content cannot have.
    #[error("the content {digest} cannot be as large as was said: {why}. Whoever said so is wrong: ask others")]
    ContentSize {
        /// Which.
        digest: Digest,
        /// What is wrong with it.
        why: String,
    },
    /// Bytes that are not here were to be sent.
    #[error("the bytes {start}..{end} of the content {digest} are not here. Fetch them first")]
    ContentLacks {
        /// Which.
        digest: Digest,
        /// The first byte that is not here.
        start: u64,
        /// The next one that is, or the end.
        end: u64,
    },
    /// Bytes that were verified once are not the same any more.
    #[error(
        "{path} is damaged at byte {at}: it was right when it was written. Suspect the disk; `murmur models fsck` finds what else is damaged, and what is will be fetched again."
    )]
    ContentDamaged {
        /// The file.
        path: PathBuf,
        /// Where, in bytes.
        at: u64,
    },
    /// A file that lies elsewhere is not the one any more that was read.
    #[error("{path} has changed since it was read, or while it was. Import it again when nobody writes to it")]
    ContentChanged {
        /// The file.
        path: PathBuf,
    },
    /// A file that lies elsewhere is never written to.
    #[error("{path} is the user's own file and is never changed. Remove the model, if it is to be fetched anew")]
    ContentIsReference {
        /// The file.
        path: PathBuf,
    },
    /// Somebody else writes to the content.
    #[error(
        "{holder} writes to the content {digest} (it holds {lock}). Wait for it, or end it: what has arrived is kept"
    )]
    ContentInUse {
        /// Which.
        digest: Digest,
        /// "process 123"
        holder: String,
        /// The lock file.
        lock: PathBuf,
    },
    /// The content was removed while it was open.
    #[error("the content {digest} was removed meanwhile. Begin again, if it is still wanted")]
    ContentGone {
        /// Which.
        digest: Digest,
    },
    /// A model of which not everything is here.
    #[error(
        "the model '{name}' is not whole: {held} of {bytes} are here. Go on with: murmur models pull {source_name}"
    )]
    Incomplete {
        /// Its name.
        name: String,
        /// What is here, in words.
        held: String,
        /// What there is, in words.
        bytes: String,
        /// How it is called where it came from.
        source_name: String,
    },
    /// Whoever was sent a content does not take it any more.
    #[error("sending broke off: {0}")]
    Send(#[source] io::Error),
}

impl StoreError {
    /// What sort of failure it was.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::BadReference { .. }
            | Self::NameTaken { .. }
            | Self::BadHubSetting { .. }
            | Self::ContentIsReference { .. } => ErrorKind::Usage,
            Self::NoSuchModel { .. } | Self::NotOnHub { .. } | Self::ContentGone { .. } | Self::NotHere { .. } => {
                ErrorKind::NotFound
            }
            Self::BadModel { .. }
            | Self::WrongChecksum { .. }
            | Self::BadIndex { .. }
            | Self::BadContent { .. }
            | Self::ContentSize { .. }
            | Self::ContentDamaged { .. }
            | Self::ContentChanged { .. } => ErrorKind::Damaged,
            Self::NoSpace { .. } | Self::OverQuota { .. } => ErrorKind::NoSpace,
            Self::HubRefuses { .. }
            | Self::HubUnavailable { .. }
            | Self::HubOffline { .. }
            | Self::PullInProgress { .. }
            | Self::ContentLacks { .. }
            | Self::ContentInUse { .. }
            | Self::Incomplete { .. } => ErrorKind::Unavailable,
            Self::BadHubAnswer { .. } | Self::Send(_) => ErrorKind::Other,
            Self::Gguf(error) | Self::Join(JoinError::Part(error)) => match error.kind() {
                GgufErrorKind::NotFound => ErrorKind::NotFound,
                GgufErrorKind::PermissionDenied => ErrorKind::Unavailable,
                GgufErrorKind::Io(_) => ErrorKind::Other,
                _ => ErrorKind::Damaged,
            },
            Self::Join(JoinError::Mismatch { .. } | JoinError::Count(_)) => ErrorKind::Damaged,
            Self::Join(JoinError::Write(WriteError::DiskFull { .. })) => ErrorKind::NoSpace,
            Self::Join(JoinError::Write(_)) => ErrorKind::Other,
            Self::Io { source, .. } => match source.kind() {
                io::ErrorKind::NotFound => ErrorKind::NotFound,
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => ErrorKind::Unavailable,
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::NoSpace,
                _ => ErrorKind::Other,
            },
        }
    }

    pub(crate) fn content_in_use(digest: Digest, lock: PathBuf) -> Self {
        Self::ContentInUse { digest, holder: files::lock_holder(&lock), lock }
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
        io::ErrorKind::FileTooLarge => {
            "This file system takes no file that large; choose another place with --data-dir."
        }
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "Free some space and try again.",
        _ => "If it happens again, run `murmur doctor`.",
    }
}
