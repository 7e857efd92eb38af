use std::io;

/// What can go wrong with a lab.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// This machine or user cannot run labs; the text says what is missing. Tests skip on it.
    #[error("a lab cannot run here: {0}")]
    Missing(String),
    /// The topology contradicts itself or exceeds a limit.
    #[error("the topology cannot be: {0}")]
    Topology(String),
    /// The topology file is no TOML, or has other keys or values than a topology has.
    #[error("the topology cannot be read: {0}")]
    Syntax(#[from] toml::de::Error),
    /// A name that the topology does not have.
    #[error("the lab has no {kind} `{name}`")]
    Unknown {
        /// `host` or `site`.
        kind: &'static str,
        /// The name.
        name: String,
    },
    /// A system program did not do what it was asked.
    #[error("`{command}` failed: {message}")]
    Command {
        /// The command line.
        command: String,
        /// What it said, or how it ended.
        message: String,
    },
    /// The system refused something.
    #[error("{action}: {source}")]
    Io {
        /// What was tried.
        action: String,
        /// Why it failed.
        source: io::Error,
    },
}

impl LabError {
    pub(crate) fn topology(message: impl Into<String>) -> Self {
        Self::Topology(message.into())
    }
}

/// Adds what was tried to a system error.
pub(crate) trait Trying<T> {
    fn trying(self, action: impl FnOnce() -> String) -> Result<T, LabError>;
}

impl<T, E: Into<io::Error>> Trying<T> for Result<T, E> {
    fn trying(self, action: impl FnOnce() -> String) -> Result<T, LabError> {
        self.map_err(|source| LabError::Io { action: action(), source: source.into() })
    }
}
