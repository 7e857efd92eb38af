//! What can go wrong between a node and its mesh.

use std::io;
use std::path::{Path, PathBuf};

use murmur_protocol::mesh::{MeshId, MessageError, NodeId, Refusal};

use crate::stream::StreamEnd;

/// Why something on the network, or about the node's place in it, did not work.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// A file of the data folder cannot be read or written.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the operating system says.
        source: io::Error,
    },
    /// A file of the data folder does not hold what it should. It is never replaced silently: it may be a node's
    /// identity.
    #[error("{} is damaged: {reason}. Restore it from a copy, or remove it to begin anew", path.display())]
    CorruptFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// An option that cannot be honoured.
    #[error("{what} cannot be used: {reason}")]
    Option {
        /// Which one.
        what: &'static str,
        /// Why not.
        reason: String,
    },
    /// The QUIC endpoint or one of the services of a seed cannot start.
    #[error("{what} cannot start: {reason}")]
    Start {
        /// Endpoint or service.
        what: &'static str,
        /// Why not.
        reason: String,
    },
    /// A node cannot be reached, or the connection to it broke.
    #[error("node {} cannot be reached: {reason}", node.short())]
    Unreachable {
        /// The node.
        node: NodeId,
        /// What was tried and how it ended.
        reason: String,
    },
    /// The other side answered and wants nothing to do with us. Its reason is for people to read.
    #[error("refused by the other side: {}", .0.reason)]
    Refused(Refusal),
    /// We want nothing to do with the other side: the refusal that it was sent.
    #[error("the other side was refused: {}", .0.reason)]
    Unwelcome(Refusal),
    /// The other side did not keep a deadline.
    #[error("no {0} in time")]
    Late(&'static str),
    /// The other side has reset a stream.
    #[error("the other side has ended the stream: {0}")]
    Ended(StreamEnd),
    /// The other side broke the protocol.
    #[error("the other side broke the protocol: {0}")]
    Protocol(String),
    /// A message cannot be written or read.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// What was asked for is the right of the mesh's owner.
    #[error("only the owner of mesh {} can do that: this node does not hold the mesh's key", .0.short())]
    NotOwner(MeshId),
    /// A ticket cannot be issued as asked, or does not fit.
    #[error("ticket: {0}")]
    Ticket(String),
    /// The node has left the mesh, or the mesh has been shut down.
    #[error("the mesh has been left")]
    Closed,
}

impl NetError {
    pub(crate) fn file(path: &Path, source: io::Error) -> Self {
        NetError::File { path: path.to_owned(), source }
    }

    pub(crate) fn unreachable(node: NodeId, reason: impl ToString) -> Self {
        NetError::Unreachable { node, reason: reason.to_string() }
    }

    pub(crate) fn protocol(reason: impl ToString) -> Self {
        NetError::Protocol(reason.to_string())
    }
}
