//! How the program ends: exit codes, and errors as users see them.

use std::{fmt, io, process::ExitCode};

use murmur_api::{OptionsError, ServeError};
use murmur_gguf::{GgufError, GgufErrorKind};
use murmur_net::NetError;
use murmur_node::NodeError;
use murmur_store::{ErrorKind, StoreError};

/// The exit codes, as `--help` tells them.
pub(crate) const EXIT_CODES_HELP: &str = "\
Exit codes:
  0    done
  1    failed
  2    wrong use: command line, environment or configuration file
  3    not found: no such model, file, repository, mesh
  4    no space: disk or memory
  5    unavailable or refused: no server, port in use, no permission, hub out of reach, ticket not accepted
  6    damaged or unsupported data: not a GGUF file, cut short, wrong checksum
  130  interrupted";

/// Why the program ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Code {
    /// Anything without a code of its own.
    Failed = 1,
    /// The command line, the environment or the configuration file makes no sense.
    Usage = 2,
    /// A model, a file or a repository does not exist.
    NotFound = 3,
    /// Disk or memory.
    NoSpace = 4,
    /// Something that is needed cannot be had, or says no.
    Unavailable = 5,
    /// Data is not what it claims to be.
    Damaged = 6,
    /// Ctrl-C.
    Interrupted = 130,
}

impl Code {
    fn name(self) -> &'static str {
        match self {
            Self::Failed => "failed",
            Self::Usage => "usage",
            Self::NotFound => "not_found",
            Self::NoSpace => "no_space",
            Self::Unavailable => "unavailable",
            Self::Damaged => "damaged",
            Self::Interrupted => "interrupted",
        }
    }
}

/// An error with its exit code. The message says what happened, why, and what to do.
#[derive(Debug)]
pub(crate) struct Failure {
    code: Code,
    message: String,
}

impl Failure {
    /// Makes an error for `?`.
    pub(crate) fn because(code: Code, message: impl Into<String>) -> anyhow::Error {
        Self { code, message: message.into() }.into()
    }
}

impl Failure {
    /// An exit code whose reason the user has been told.
    pub(crate) fn told(code: Code) -> anyhow::Error {
        Self::because(code, "")
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

/// The exit code of an error: the first cause that knows one decides.
fn code_of(error: &anyhow::Error) -> Code {
    for cause in error.chain() {
        if let Some(failure) = cause.downcast_ref::<Failure>() {
            return failure.code;
        }
        if let Some(store) = cause.downcast_ref::<StoreError>() {
            return match store.kind() {
                ErrorKind::Usage => Code::Usage,
                ErrorKind::NotFound => Code::NotFound,
                ErrorKind::NoSpace => Code::NoSpace,
                ErrorKind::Unavailable => Code::Unavailable,
                ErrorKind::Damaged => Code::Damaged,
                ErrorKind::Other => Code::Failed,
            };
        }
        if let Some(node) = cause.downcast_ref::<NodeError>() {
            return match node {
                NodeError::Gguf(error) => code_of_gguf(error),
                NodeError::Fit { .. } => Code::NoSpace,
                NodeError::SameName(_) | NodeError::Draft { .. } => Code::Usage,
                NodeError::ActivityUnseen => Code::Unavailable,
                NodeError::Unusable { .. } | NodeError::Slice(_) => Code::Damaged,
                NodeError::Interrupted => Code::Interrupted,
                _ => Code::Failed,
            };
        }
        if let Some(net) = cause.downcast_ref::<NetError>() {
            return match net {
                NetError::File { source, .. } => code_of_io(source),
                NetError::CorruptFile { .. } => Code::Damaged,
                NetError::Option { .. } => Code::Usage,
                NetError::Protocol(_) | NetError::Message(_) => Code::Failed,
                _ => Code::Unavailable,
            };
        }
        if let Some(gguf) = cause.downcast_ref::<GgufError>() {
            return code_of_gguf(gguf);
        }
        if cause.is::<OptionsError>() || matches!(cause.downcast_ref(), Some(ServeError::Options(_))) {
            return Code::Usage;
        }
        if let Some(io) = cause.downcast_ref::<io::Error>() {
            return code_of_io(io);
        }
    }
    Code::Failed
}

fn code_of_io(error: &io::Error) -> Code {
    match error.kind() {
        io::ErrorKind::NotFound => Code::NotFound,
        io::ErrorKind::PermissionDenied => Code::Unavailable,
        io::ErrorKind::StorageFull | io::ErrorKind::OutOfMemory => Code::NoSpace,
        _ => Code::Failed,
    }
}

fn code_of_gguf(error: &GgufError) -> Code {
    match error.kind() {
        GgufErrorKind::NotFound => Code::NotFound,
        GgufErrorKind::PermissionDenied => Code::Unavailable,
        GgufErrorKind::Io(_) => Code::Failed,
        _ => Code::Damaged,
    }
}

/// Tells an error, and gives the code to end with.
pub(crate) fn report(error: &anyhow::Error, wants_json: bool) -> ExitCode {
    // What clap has to say, it says itself: help is no error, and its errors are laid out.
    if let Some(clap) = error.downcast_ref::<clap::Error>() {
        // A closed pipe is the reader's wish.
        let _ = clap.print();
        return u8::try_from(clap.exit_code()).map_or(ExitCode::FAILURE, ExitCode::from);
    }
    // `murmur models ls | head -1`: the reader has what it wanted.
    if error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|e| e.kind() == io::ErrorKind::BrokenPipe)
    {
        return ExitCode::SUCCESS;
    }
    let code = code_of(error);
    let message = format!("{error:#}");
    if message.is_empty() {
        return ExitCode::from(code as u8);
    }
    if wants_json {
        let body = serde_json::json!({"error": {"message": message, "code": code.name(), "exit_code": code as u8}});
        let _ = crate::ui::print_json(&body);
    } else {
        crate::ui::say(&format!("error: {message}"));
    }
    ExitCode::from(code as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_exit_code_is_in_the_help() {
        for code in [
            Code::Failed,
            Code::Usage,
            Code::NotFound,
            Code::NoSpace,
            Code::Unavailable,
            Code::Damaged,
            Code::Interrupted,
        ] {
            assert!(EXIT_CODES_HELP.contains(&format!("\n  {:<5}", code as u8)), "{code:?}");
        }
    }

    #[test]
    fn the_cause_that_knows_a_code_decides() {
        let error = Failure::because(Code::NoSpace, "full").context("while pulling");
        assert_eq!(code_of(&error), Code::NoSpace);
        assert_eq!(code_of(&anyhow::anyhow!("?")), Code::Failed);
        let denied = io::Error::from(io::ErrorKind::PermissionDenied);
        assert_eq!(code_of(&anyhow::Error::from(denied)), Code::Unavailable);
    }
}
