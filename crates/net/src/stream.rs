//! Messages on a QUIC stream: bounded by their kind's limit, and by a deadline that the caller sets.

use iroh::endpoint::{ReadError, RecvStream, SendStream, VarInt, WriteError};
use murmur_protocol::mesh::wire::{self, Decoder, Message};

use crate::NetError;

/// Bytes that are taken from QUIC at once.
const CHUNK_BYTES: usize = 16 * 1024;

/// Why a stream was reset: said by a code of QUIC where no message can be, before one was read, or when the other end reads nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StreamEnd {
    /// There is no room for it now: nothing of it was read.
    #[error("it has no room for another stream now")]
    Busy,
    /// What was sent was left unread for too long.
    #[error("what it sent was left unread for too long")]
    LeaseExpired,
    /// For another reason, or for none.
    #[error("it has reset the stream (code {0})")]
    Other(u64),
}

impl StreamEnd {
    /// The code. 0 is what a stream ends with that is dropped.
    fn code(self) -> VarInt {
        match self {
            StreamEnd::Busy => VarInt::from_u32(5),
            StreamEnd::LeaseExpired => VarInt::from_u32(6),
            StreamEnd::Other(code) => VarInt::from_u64(code).unwrap_or(VarInt::MAX),
        }
    }

    /// What a code of QUIC says.
    pub fn of(code: VarInt) -> StreamEnd {
        let known = [StreamEnd::Busy, StreamEnd::LeaseExpired];
        known.into_iter().find(|end| end.code() == code).unwrap_or(StreamEnd::Other(code.into_inner()))
    }

    /// Ends a stream so. What was written and not read yet is lost.
    pub fn tell(self, send: &mut SendStream, recv: Option<&mut RecvStream>) {
        // Both fail only for a stream that has ended already.
        let _ = send.reset(self.code());
        if let Some(recv) = recv {
            let _ = recv.stop(self.code());
        }
    }
}

/// Reads messages of one kind of stream, one after the other.
#[derive(Debug)]
pub struct Reader<M> {
    stream: RecvStream,
    decoder: Decoder<M>,
    chunk: Vec<u8>,
    used: usize,
}

impl<M: Message> Reader<M> {
    /// At the beginning of a stream.
    pub fn new(stream: RecvStream) -> Self {
        Reader { stream, decoder: Decoder::new(), chunk: Vec::new(), used: 0 }
    }

    /// The next message; `None` when the peer has finished the stream between two messages. Nothing is lost if it is
    /// dropped before it is done.
    ///
    /// # Errors
    /// [`NetError::Message`], [`NetError::Ended`], [`NetError::Protocol`]: the stream is of no more use.
    pub async fn next(&mut self) -> Result<Option<M>, NetError> {
        loop {
            let mut rest = self.chunk.get(self.used..).unwrap_or_default();
            let message = self.decoder.next(&mut rest)?;
            self.used = self.chunk.len() - rest.len();
            if message.is_some() {
                return Ok(message);
            }
            // What was in it is in the decoder; `used` says so should this be dropped while it waits.
            self.chunk.resize(CHUNK_BYTES, 0);
            self.used = self.chunk.len();
            match self.stream.read(&mut self.chunk).await {
                Ok(Some(length)) => {
                    self.chunk.truncate(length);
                    self.used = 0;
                }
                Ok(None) if self.decoder.is_at_boundary() => return Ok(None),
                Ok(None) => return Err(NetError::protocol("a stream ended within a message")),
                Err(ReadError::Reset(code)) => return Err(NetError::Ended(StreamEnd::of(code))),
                Err(error) => return Err(NetError::protocol(format!("a stream broke: {error}"))),
            }
        }
    }

    /// The stream behind the last message, for what follows that is no message: what was read of it already goes first.
    pub fn into_rest(self) -> (RecvStream, Vec<u8>) {
        let begun = self.chunk.get(self.used..).unwrap_or_default().to_vec();
        (self.stream, begun)
    }

    /// The next message, where there must be one.
    ///
    /// # Errors
    /// As for [`Reader::next`], and [`NetError::Protocol`] at the end of the stream.
    pub async fn expect(&mut self) -> Result<M, NetError> {
        self.next().await?.ok_or_else(|| NetError::protocol("a stream ended before its answer"))
    }
}

/// Writes one message.
///
/// # Errors
/// [`NetError::Message`] for one that no peer would read; [`NetError::Ended`], [`NetError::Protocol`] when the stream has ended.
pub async fn write<M: Message>(stream: &mut SendStream, message: &M) -> Result<(), NetError> {
    let bytes = wire::encode(message)?;
    stream.write_all(&bytes).await.map_err(|error| match error {
        WriteError::Stopped(code) => NetError::Ended(StreamEnd::of(code)),
        error => NetError::protocol(format!("a stream broke: {error}")),
    })
}

/// Says that nothing more comes.
pub fn finish(stream: &mut SendStream) {
    // It fails only for a stream that is closed already.
    let _ = stream.finish();
}
