//! Frames on streams that are waited for: those of QUIC, and sockets within this machine.

use std::{borrow::Borrow, io, pin::Pin, sync::Arc};

use bytes::{Buf, BytesMut};
use murmur_protocol::frame::{Frame, FrameError, HEADER_BYTES};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::{OwnedSemaphorePermit, Semaphore},
};

/// Where frames come from.
pub(crate) type Source = Pin<Box<dyn AsyncRead + Send>>;
/// Where frames go.
pub(crate) type Drain = Pin<Box<dyn AsyncWrite + Send>>;

/// Bytes of one frame at most: a chunk of 512 rows of 32,768 f32, or a request with a very long prompt.
const FRAME_BYTES_MAX: usize = 64 << 20;
/// Bytes that are taken from the stream at once.
const CHUNK_BYTES: usize = 64 << 10;

/// Reads frames, one after the other.
pub(crate) struct FrameReader {
    source: Source,
    bytes: BytesMut,
}

impl FrameReader {
    /// `begun`: bytes of the stream that were read already.
    pub(crate) fn new(source: Source, begun: &[u8]) -> FrameReader {
        FrameReader { source, bytes: BytesMut::from(begun) }
    }

    /// The next frame; `None` at the end of the stream. Nothing is lost if it is dropped before it is done.
    pub(super) async fn next(&mut self) -> Result<Option<Frame>, FrameError> {
        loop {
            if Frame::length(&self.bytes)?.is_some_and(|length| length > FRAME_BYTES_MAX) {
                return Err(FrameError::Malformed("longer than any that a ring needs"));
            }
            if let Some((frame, length)) = Frame::parse(&self.bytes)? {
                self.bytes.advance(length);
                return Ok(Some(frame));
            }
            self.bytes.reserve(CHUNK_BYTES);
            if self.source.read_buf(&mut self.bytes).await? == 0 {
                return match self.bytes.is_empty() {
                    true => Ok(None),
                    false => Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                };
            }
        }
    }
}

/// Writes frames, as many at once as there are.
pub(super) async fn write<F: Borrow<Frame>>(drain: &mut Drain, frames: &[F]) -> Result<(), FrameError> {
    let frames = frames.iter().map(Borrow::borrow);
    let mut bytes = Vec::with_capacity(frames.clone().map(|frame| HEADER_BYTES + frame.payload.len()).sum());
    for frame in frames {
        frame.append_to(&mut bytes)?;
    }
    drain.write_all(&bytes).await?;
    Ok(drain.flush().await?)
}

/// Room for frames that wait to be written.
#[derive(Clone)]
pub(super) struct Room {
    bytes: Arc<Semaphore>,
    bytes_max: u32,
}

/// A frame that has room to wait.
pub(super) struct Waiting {
    frame: Frame,
    _room: OwnedSemaphorePermit,
}

impl Borrow<Frame> for Waiting {
    fn borrow(&self) -> &Frame {
        &self.frame
    }
}

impl Room {
    /// For so many bytes; a larger frame has room when it is alone.
    pub(super) fn new(bytes_max: u32) -> Room {
        Room { bytes: Arc::new(Semaphore::new(bytes_max as usize)), bytes_max }
    }

    fn size(&self, frame: &Frame) -> u32 {
        u32::try_from(HEADER_BYTES + frame.payload.len()).unwrap_or(u32::MAX).min(self.bytes_max)
    }

    /// `None`: there is no room now.
    pub(super) fn try_take(&self, frame: Frame) -> Option<Waiting> {
        let room = Arc::clone(&self.bytes).try_acquire_many_owned(self.size(&frame)).ok()?;
        Some(Waiting { frame, _room: room })
    }

    /// Waits until there is room. `None`: there never will be.
    pub(super) async fn take(&self, frame: Frame) -> Option<Waiting> {
        let room = Arc::clone(&self.bytes).acquire_many_owned(self.size(&frame)).await.ok()?;
        Some(Waiting { frame, _room: room })
    }
}

#[cfg(test)]
mod tests {
    use murmur_protocol::frame::{Header, Kind};

    use super::*;

    fn frame(bytes: usize) -> Frame {
        Frame { header: Header::new(Kind::Hidden, 7), payload: vec![3; bytes] }
    }

    #[tokio::test]
    async fn frames_come_as_they_went_however_the_stream_is_torn() {
        let (near, far) = tokio::io::duplex(64);
        let frames = [frame(0), frame(1), frame(1000), frame(0)];
        let sent = frames.clone();
        tokio::spawn(async move {
            let mut drain: Drain = Box::pin(far);
            write(&mut drain, &sent).await.unwrap();
        });
        let mut begun = Vec::new();
        frame(5).append_to(&mut begun).unwrap();
        let mut reader = FrameReader::new(Box::pin(near), &begun);
        assert_eq!(reader.next().await.unwrap(), Some(frame(5)));
        for frame in frames {
            assert_eq!(reader.next().await.unwrap(), Some(frame));
        }
        assert_eq!(reader.next().await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_frame_that_is_too_long_is_refused_before_it_has_come() {
        let mut bytes = Vec::new();
        frame(8).append_to(&mut bytes).unwrap();
        bytes[28..32].copy_from_slice(&u32::try_from(FRAME_BYTES_MAX).unwrap().to_le_bytes());
        let (near, _far) = tokio::io::duplex(64);
        let mut reader = FrameReader::new(Box::pin(near), &bytes[..HEADER_BYTES]);
        assert!(reader.next().await.is_err());
    }

    #[tokio::test]
    async fn a_stream_that_ends_within_a_frame_is_an_error() {
        let mut bytes = Vec::new();
        frame(8).append_to(&mut bytes).unwrap();
        let mut reader = FrameReader::new(Box::pin(&b""[..]), &bytes[..20]);
        assert!(reader.next().await.is_err());
    }

    #[tokio::test]
    async fn frames_wait_while_there_is_room_and_one_that_is_too_large_waits_alone() {
        let room = Room::new(1000);
        let small = room.try_take(frame(500)).unwrap();
        assert!(room.try_take(frame(500)).is_none());
        drop(small);
        let large = room.take(frame(10_000)).await.unwrap();
        assert!(room.try_take(frame(0)).is_none());
        drop(large);
        assert!(room.try_take(frame(0)).is_some());
    }
}
