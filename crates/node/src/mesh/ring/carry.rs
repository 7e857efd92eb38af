//! Frames on streams that are waited for: those of QUIC, and sockets within this machine.

use std::{borrow::Borrow, pin::Pin, sync::Arc};

use murmur_protocol::frame::{Frame, FrameError, HEADER_BYTES};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    sync::{OwnedSemaphorePermit, Semaphore},
};

/// Where frames come from.
pub(crate) type Source = Pin<Box<dyn AsyncRead + Send>>;
/// Where frames go.
pub(crate) type Drain = Pin<Box<dyn AsyncWrite + Send>>;

/// Reads frames, one after the other.
pub(crate) type FrameReader = murmur_engine::FrameReader<Source>;

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
