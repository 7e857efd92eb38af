//! Control messages on a QUIC stream: bounded by their kind's limit, and by a deadline that the caller sets.

use iroh::endpoint::{RecvStream, SendStream};
use murmur_protocol::mesh::Control;
use murmur_protocol::mesh::wire::{self, Decoder};

use crate::NetError;

/// Bytes that are taken from QUIC at once.
const CHUNK_BYTES: usize = 16 * 1024;

/// Reads control messages one after the other.
#[derive(Debug)]
pub(crate) struct Reader {
    stream: RecvStream,
    decoder: Decoder<Control>,
    chunk: Vec<u8>,
    used: usize,
}

impl Reader {
    /// At the beginning of a stream.
    pub(crate) fn new(stream: RecvStream) -> Self {
        Reader { stream, decoder: Decoder::new(), chunk: Vec::new(), used: 0 }
    }

    /// The next message; `None` when the peer has finished the stream between two messages.
    pub(crate) async fn next(&mut self) -> Result<Option<Control>, NetError> {
        loop {
            let mut rest = self.chunk.get(self.used..).unwrap_or_default();
            let message = self.decoder.next(&mut rest)?;
            self.used = self.chunk.len() - rest.len();
            if message.is_some() {
                return Ok(message);
            }
            self.chunk.resize(CHUNK_BYTES, 0);
            self.used = 0;
            match self.stream.read(&mut self.chunk).await {
                Ok(Some(length)) => self.chunk.truncate(length),
                Ok(None) if self.decoder.is_at_boundary() => {
                    self.chunk.clear();
                    return Ok(None);
                }
                Ok(None) => return Err(NetError::protocol("a stream ended within a message")),
                Err(error) => return Err(NetError::protocol(format!("a stream broke: {error}"))),
            }
        }
    }

    /// The next message, where there must be one.
    pub(crate) async fn expect(&mut self) -> Result<Control, NetError> {
        self.next().await?.ok_or_else(|| NetError::protocol("a stream ended before its answer"))
    }
}

/// Writes one message.
pub(crate) async fn write(stream: &mut SendStream, message: &Control) -> Result<(), NetError> {
    let bytes = wire::encode(message)?;
    stream.write_all(&bytes).await.map_err(|error| NetError::protocol(format!("a stream broke: {error}")))
}

/// Says that nothing more comes.
pub(crate) fn finish(stream: &mut SendStream) {
    // It fails only for a stream that is closed already.
    let _ = stream.finish();
}
