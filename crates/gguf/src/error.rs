//! Why a file could not be used. Every message says what happened, why, and what to do about it.

use std::io;
use std::path::{Path, PathBuf};

/// A GGUF file that was refused: which one, and why.
#[derive(Debug, thiserror::Error)]
#[error("{}: {kind}", path.display())]
pub struct GgufError {
    path: PathBuf,
    kind: GgufErrorKind,
}

impl GgufError {
    pub(crate) fn new(path: &Path, kind: GgufErrorKind) -> Self {
        Self { path: path.to_path_buf(), kind }
    }

    /// The file that was refused.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The reason, for callers that act on it.
    pub fn kind(&self) -> &GgufErrorKind {
        &self.kind
    }
}

/// The reason for a refusal.
#[derive(Debug, thiserror::Error)]
pub enum GgufErrorKind {
    /// No such file.
    #[error("there is no such file; check the path")]
    NotFound,
    /// The path names a directory.
    #[error("this is a directory; name the .gguf file inside it")]
    IsDirectory,
    /// A pipe, socket or device.
    #[error("this is not a regular file; a model must be a file on disk")]
    NotAFile,
    /// The operating system refuses to let us read it.
    #[error("permission denied; make the file readable for this user")]
    PermissionDenied,
    /// Any other failure of the operating system.
    #[error("reading failed: {0}; check the disk and try again")]
    Io(#[source] io::Error),
    /// Zero bytes.
    #[error("the file is empty; the download probably never started, fetch it again")]
    Empty,
    /// The first four bytes are not `GGUF`.
    #[error("this is not a GGUF file (it starts with {found}); convert the model to GGUF, or fetch the .gguf file")]
    NotGguf {
        /// The first bytes, printable.
        found: String,
    },
    /// Header fields are in the other byte order.
    #[error(
        "this GGUF file is big-endian; only little-endian files are supported, convert it with gguf-py's gguf_convert_endian"
    )]
    BigEndian,
    /// GGUF version 1.
    #[error(
        "this is a GGUF version 1 file, a format given up in 2023; convert the original model again, or fetch a newer file"
    )]
    VersionTooOld,
    /// A version nobody knows yet.
    #[error(
        "this is a GGUF version {version} file; versions 2 and 3 are supported, update this program or fetch another file"
    )]
    VersionUnknown {
        /// The version that the file states.
        version: u32,
    },
    /// The file ends too early.
    #[error(
        "the file is cut short: {missing_bytes} bytes or more are missing ({while_reading}); the download was probably interrupted, fetch it again"
    )]
    Truncated {
        /// Bytes known to be missing. Exact when tensor data is cut, a lower bound when the header is.
        missing_bytes: u64,
        /// What was being read when the file ended.
        while_reading: String,
    },
    /// A count or length above what this program accepts.
    #[error("{what} is {found}, above the limit of {limit}; the file is damaged or hostile")]
    OverLimit {
        /// The quantity.
        what: String,
        /// Its value in the file.
        found: u64,
        /// The highest accepted value.
        limit: u64,
    },
    /// The file breaks the format.
    #[error("the file is malformed: {0}; it is damaged or hostile, fetch it again from a source you trust")]
    Malformed(String),
    /// The file is well formed, but llama.cpp would abort or crash on it.
    #[error("the model cannot be run: {0}")]
    Unrunnable(String),
}

impl GgufErrorKind {
    pub(crate) fn malformed(reason: impl Into<String>) -> Self {
        Self::Malformed(reason.into())
    }

    pub(crate) fn from_io(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::NotFound => Self::NotFound,
            io::ErrorKind::PermissionDenied => Self::PermissionDenied,
            io::ErrorKind::IsADirectory => Self::IsDirectory,
            _ => Self::Io(error),
        }
    }
}
