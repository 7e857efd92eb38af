//! What is asked of another node: what it has of a file, bytes of it, and hashes.

use std::{
    io::{self, Read},
    pin::Pin,
    sync::{Arc, Weak},
    task::{Context, Poll},
    time::Duration,
};

use murmur_core::swarm::{Outcome, source::IN_FLIGHT_MAX};
use murmur_gguf::ByteRange;
use murmur_net::{
    RecvStream,
    endpoint::{STREAM_WINDOW_BYTES, WORK_WINDOW_BYTES},
    stream::{self, Reader},
};
use murmur_protocol::mesh::{Content, Fetch, ModelDigest, NodeId, Refused, WatchContent, Work};
use murmur_store::DecodeError;
use tokio::{
    io::{AsyncRead, ReadBuf},
    time::timeout,
};
use tokio_io_timeout::TimeoutReader;
use tokio_util::{
    io::SyncIoBridge,
    sync::{CancellationToken, WaitForCancellationFutureOwned},
};

use super::{
    Shelf,
    pace::{Counted, Paced},
    to_wire,
};
use crate::{
    Node,
    mesh::{MeshNode, Place, Places},
    model::with_causes,
};

/// A node that is asked for bytes says within this whether it sends them.
const ANSWER_DEADLINE: Duration = Duration::from_secs(10);
/// A stream on which nothing comes for so long is given up; the swarm asks others long before.
const STALL_MAX: Duration = Duration::from_secs(30);
/// Before a node that could not be watched is tried again.
const RETRY: Duration = Duration::from_secs(2);
/// What a node says of its part is listened to once in so long, however much it says.
const LISTEN_EVERY: Duration = Duration::from_millis(250);
/// Answers with bytes that are read from one node at once, of all files together: twice what one file asks for, since one that has all it wanted may still be ending.
const ANSWERS_PER_NODE_MAX: usize = 2 * IN_FLIGHT_MAX;
/// The same of answers with hashes.
const PROOFS_PER_NODE_MAX: usize = 8;
/// What is asked of a node of which all these are being read is asked again after so long.
const RETRY_OWN_MS: u64 = 500;
// What a slow disk or a limit leaves unread of files takes half of what may be unread on a connection: tokens and hidden states never wait behind it.
const _: () = assert!(
    (ANSWERS_PER_NODE_MAX + PROOFS_PER_NODE_MAX) as u32 * STREAM_WINDOW_BYTES <= WORK_WINDOW_BYTES / 2,
    "files leave room for all else"
);
/// Bytes that are read from a stream at once.
pub(super) const READ_BYTES: usize = 64 << 10;

/// Hears from a node what it has, for as long as it is there and `heard` wants to hear it. `None`: nothing more is heard for now.
pub(super) async fn watch<H: Future<Output = bool>>(
    mesh: Weak<MeshNode>,
    digest: ModelDigest,
    node: NodeId,
    heard: impl Fn(Option<Content>) -> H,
) {
    let watch = Work::WatchContent(WatchContent { model: digest, only_news: true });
    while let Some(mesh) = mesh.upgrade() {
        let opened = mesh.mesh().open_work(node).await;
        drop(mesh);
        if let Ok((mut send, recv)) = opened
            && let Ok(Ok(())) = timeout(ANSWER_DEADLINE, stream::write(&mut send, &watch)).await
        {
            let mut reader = Reader::<Work>::new(recv);
            while let Ok(Some(message)) = reader.next().await {
                match message {
                    Work::Content(content) => {
                        if !heard(Some(content)).await {
                            return;
                        }
                    }
                    Work::Unknown { .. } => {}
                    _ => break,
                }
                tokio::time::sleep(LISTEN_EVERY).await;
            }
        }
        if !heard(None).await {
            return;
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Why an answer has ended early.
pub(super) enum Failure {
    /// The source, or the way to it.
    Source(Outcome),
    /// The source is of no use for this file, and will not be.
    Useless(String),
    /// What comes cannot be kept.
    Store(String),
}

impl Failure {
    pub(super) const GONE: Failure = Failure::Source(Outcome::Gone);
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    Bytes,
    Hashes,
}

/// Answers that are being read from each node.
pub(crate) struct Answers {
    bytes: Arc<Places>,
    hashes: Arc<Places>,
}

impl Answers {
    pub(crate) fn new() -> Answers {
        let [bytes, hashes] = [ANSWERS_PER_NODE_MAX, PROOFS_PER_NODE_MAX].map(|most| Arc::new(Places::new(most)));
        Answers { bytes, hashes }
    }

    fn place(&self, of: NodeId, what: What) -> Option<Place> {
        match what {
            What::Bytes => self.bytes.take(of),
            What::Hashes => self.hashes.take(of),
        }
    }
}

/// One request to a node.
pub(super) struct Ask {
    pub(super) shelf: Arc<Shelf>,
    pub(super) from: NodeId,
    pub(super) what: What,
    pub(super) ranges: Vec<ByteRange>,
    pub(super) unwanted: CancellationToken,
}

impl Ask {
    /// Asks, and keeps what is right of the answer. Of bytes each group that was kept is `received`.
    pub(super) async fn run(
        self,
        node: &Weak<Node>,
        mesh: &Weak<MeshNode>,
        mut received: impl FnMut(ByteRange) + Send + 'static,
    ) -> Result<(), Failure> {
        let place = node.upgrade().ok_or(Failure::GONE)?.answers.place(self.from, self.what);
        let _place = place.ok_or(Failure::Source(Outcome::Busy { retry_ms: RETRY_OWN_MS }))?;
        let reader = self.unwanted.run_until_cancelled(self.begin(mesh)).await.ok_or(Failure::GONE)??;
        let node = node.upgrade().ok_or(Failure::GONE)?;
        let (recv, begun) = reader.into_rest();
        let mut patient = TimeoutReader::new(recv);
        patient.set_timeout(Some(STALL_MAX));
        let wanted = Wanted { stream: Box::pin(patient), unwanted: Box::pin(self.unwanted.cancelled_owned()) };
        let bridge = SyncIoBridge::new(wanted);
        let reading = tokio::task::spawn_blocking(move || {
            let counted = Counted(io::Cursor::new(begun).chain(bridge), &self.shelf.received_bytes);
            let stream = Paced(counted, &node.taking_pace);
            let mut stream = io::BufReader::with_capacity(READ_BYTES, stream);
            match self.what {
                What::Bytes => self.shelf.content.decode(&self.ranges, &mut stream, &mut received),
                What::Hashes => self.shelf.content.decode_hashes(&self.ranges, &mut stream),
            }
        });
        reading.await.map_err(|_| Failure::GONE)?.map_err(|error| match error {
            DecodeError::Wrong { .. } => Failure::Source(Outcome::Wrong),
            DecodeError::Ended { .. } | DecodeError::Receive(_) => Failure::GONE,
            DecodeError::Store(error) => Failure::Store(with_causes(&error)),
        })
    }

    /// Asks, and hears that the bytes come.
    async fn begin(&self, mesh: &Weak<MeshNode>) -> Result<Reader<Work>, Failure> {
        let opened = {
            let mesh = mesh.upgrade().ok_or(Failure::GONE)?;
            mesh.mesh().open_work(self.from).await
        };
        let (mut send, recv) = opened.map_err(|_| Failure::GONE)?;
        let mut reader = Reader::new(recv);
        let answer = async {
            let (model, only_hashes) = (self.shelf.digest(), self.what == What::Hashes);
            let fetch = Work::Fetch(Fetch { model, ranges: to_wire(&self.ranges), only_hashes });
            stream::write(&mut send, &fetch).await?;
            stream::finish(&mut send);
            reader.expect().await
        };
        match timeout(ANSWER_DEADLINE, answer).await {
            Ok(Ok(Work::Sending)) => Ok(reader),
            Ok(Ok(Work::Refused(Refused::Busy { retry_ms }))) => {
                Err(Failure::Source(Outcome::Busy { retry_ms: retry_ms.into() }))
            }
            Ok(Ok(Work::Refused(_))) => Err(Failure::Source(Outcome::Lacks)),
            _ => Err(Failure::GONE),
        }
    }
}

/// A stream that ends with an error as soon as nobody wants it any more.
struct Wanted {
    stream: Pin<Box<TimeoutReader<RecvStream>>>,
    unwanted: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl AsyncRead for Wanted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.unwanted.as_mut().poll(context) {
            Poll::Ready(()) => Poll::Ready(Err(io::Error::other("not wanted any more"))),
            Poll::Pending => self.stream.as_mut().poll_read(context, buffer),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_one_node_twenty_four_answers_are_read_at_once_sixteen_with_bytes_and_eight_with_hashes() {
        let answers = Answers::new();
        let [one, other] = [1, 2].map(|number| NodeId::from_bytes([number; 32]));
        let all_of = |node, what| std::iter::from_fn(|| answers.place(node, what)).collect::<Vec<Place>>();
        let mut bytes = all_of(one, What::Bytes);
        let hashes = all_of(one, What::Hashes);
        assert_eq!((bytes.len(), hashes.len()), (16, 8));
        // Neither takes room of the other kind, nor of another node.
        assert_eq!((all_of(other, What::Bytes).len(), all_of(other, What::Hashes).len()), (16, 8));
        bytes.truncate(13);
        assert_eq!((all_of(one, What::Bytes).len(), all_of(one, What::Hashes).len()), (3, 0));
    }
}
