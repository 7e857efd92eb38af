//! Frames from streams that are waited for in a runtime.

use std::io;

use bytes::{Buf, BytesMut};
use murmur_protocol::frame::{Frame, FrameError};
use tokio::io::{AsyncRead, AsyncReadExt};

/// Bytes of one frame at most: a chunk of 512 rows of 32,768 f32, or a request with a very long prompt.
const FRAME_BYTES_MAX: usize = 64 << 20;
/// Bytes that are taken from the stream at once.
const CHUNK_BYTES: usize = 64 << 10;

/// Reads frames, one after the other.
pub struct FrameReader<S> {
    source: S,
    bytes: BytesMut,
}

impl<S: AsyncRead + Unpin> FrameReader<S> {
    /// `begun`: bytes of the stream that were read already.
    pub fn new(source: S, begun: &[u8]) -> FrameReader<S> {
        FrameReader { source, bytes: BytesMut::from(begun) }
    }

    /// Whether the next frame has come already.
    pub fn has_next(&self) -> bool {
        matches!(Frame::length(&self.bytes), Ok(Some(length)) if length <= self.bytes.len())
    }

    /// The next frame; `None` at the end of the stream. Nothing is lost if it is dropped before it is done.
    ///
    /// # Errors
    /// The stream fails or ends within a frame, or carries something else, or a frame that is too long.
    pub async fn next(&mut self) -> Result<Option<Frame>, FrameError> {
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

#[cfg(test)]
mod tests {
    use murmur_protocol::frame::{HEADER_BYTES, Header, Kind};
    use tokio::io::AsyncWriteExt;

    use super::*;

    fn frame(bytes: usize) -> Frame {
        Frame { header: Header::new(Kind::Hidden, 7), payload: vec![3; bytes] }
    }

    fn written(frames: &[Frame]) -> Vec<u8> {
        let mut bytes = Vec::new();
        frames.iter().for_each(|frame| frame.append_to(&mut bytes).unwrap());
        bytes
    }

    #[tokio::test]
    async fn frames_come_as_they_went_however_the_stream_is_torn() {
        let (near, mut far) = tokio::io::duplex(64);
        let frames = [frame(0), frame(1), frame(1000), frame(0)];
        let sent = written(&frames);
        tokio::spawn(async move { far.write_all(&sent).await.unwrap() });
        let mut reader = FrameReader::new(near, &written(&[frame(5)]));
        assert!(reader.has_next());
        assert_eq!(reader.next().await.unwrap(), Some(frame(5)));
        assert!(!reader.has_next());
        for frame in frames {
            assert_eq!(reader.next().await.unwrap(), Some(frame));
        }
        assert_eq!(reader.next().await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_frame_that_is_too_long_is_refused_before_it_has_come() {
        let mut bytes = written(&[frame(8)]);
        bytes[28..32].copy_from_slice(&u32::try_from(FRAME_BYTES_MAX).unwrap().to_le_bytes());
        let (near, _far) = tokio::io::duplex(64);
        let mut reader = FrameReader::new(near, &bytes[..HEADER_BYTES]);
        assert!(reader.next().await.is_err());
    }

    #[tokio::test]
    async fn a_stream_that_ends_within_a_frame_is_an_error() {
        let bytes = written(&[frame(8)]);
        let mut reader = FrameReader::new(&b""[..], &bytes[..20]);
        assert!(reader.next().await.is_err());
    }
}
