//! Streams for work whose other ends are late, read nothing, or say what nobody understands: each loses its stream, and others are served.

#![allow(clippy::unwrap_used, clippy::panic, reason = "these are tests, helpers included")]

mod common;

use std::{fs, path::Path, sync::Arc};

use chrono::{Local, Timelike};
use common::{mesh, options, soon, the_file, until};
use murmur_api::backend::Backend;
use murmur_gguf::{Gguf, GgufBuilder, TensorSource};
use murmur_net::{
    Mesh, MeshOptions, NetError, RecvStream, SendStream, Timing,
    stream::{self, Reader, StreamEnd},
};
use murmur_node::{ModelSpec, Node, NodeOptions, sharing::Sharing};
use murmur_protocol::mesh::{
    FailureCode, Message, ModelDigest, NodeId, Open, RequestId, TokenizerDigest, Work, encode,
};
use tempfile::TempDir;

/// The same number as in `worker.rs`.
const STREAMS_PER_NODE_MAX: usize = 64;

/// A node that offers a model, and one that asks it.
struct Pair {
    _folder: TempDir,
    _node: Arc<Node>,
    driver: Mesh,
    worker: NodeId,
    model: ModelDigest,
}

impl Pair {
    /// Of a file that is prepared by the caller, who gets its path.
    async fn with(timing: Timing, prepare: impl FnOnce(&Path)) -> Pair {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tiny.gguf");
        the_file(&path);
        prepare(&path);
        let worker_dir = folder.path().join("worker");
        let on_demand = vec![ModelSpec { path, id: "tiny".to_owned() }];
        let node = Node::open(NodeOptions { contributes: true, on_demand, ..options(&worker_dir) }).unwrap();
        let node = Arc::new(node);
        node.join_mesh(MeshOptions { timing, ..mesh(&worker_dir, &[]) }).await.unwrap();
        let contact = node.mesh().unwrap().contact();
        let driver = Mesh::start(mesh(&folder.path().join("driver"), std::slice::from_ref(&contact))).await.unwrap();
        let mut table = driver.watch();
        let offered = table
            .wait_for(|table| table.get(&contact.node).is_some_and(|known| !known.verified.record().models.is_empty()));
        let model =
            soon("the model is offered", offered).await.unwrap()[&contact.node].verified.record().models[0].digest;
        Pair { _folder: folder, _node: node, driver, worker: contact.node, model }
    }

    async fn new() -> Pair {
        Pair::with(Timing::default(), |_| ()).await
    }

    /// A stream on which these bytes were written.
    async fn stream(&self, bytes: &[u8]) -> (SendStream, RecvStream) {
        let (mut send, recv) = self.driver.open_work(self.worker).await.unwrap();
        send.write_all(bytes).await.unwrap();
        (send, recv)
    }

    /// What is answered to these bytes first.
    async fn answer(&self, bytes: &[u8]) -> Result<Option<Work>, NetError> {
        let (_send, recv) = self.stream(bytes).await;
        soon("an answer", Reader::<Work>::new(recv).next()).await
    }

    /// What is answered to a question for the card, which may be refused before it is written.
    async fn card(&self) -> Result<Option<Work>, NetError> {
        let (mut send, recv) = self.driver.open_work(self.worker).await?;
        stream::write(&mut send, &Work::GetCard(self.model)).await?;
        soon("an answer", Reader::<Work>::new(recv).next()).await
    }

    async fn is_well(&self) {
        let answer = self.card().await;
        assert!(matches!(answer, Ok(Some(Work::Card(_)))), "{answer:?}");
    }
}

/// A request that nobody can take.
fn open(prompt_tokens: usize) -> Work {
    Work::Open(Box::new(Open {
        request: RequestId::from_bytes([1; 16]),
        model: ModelDigest::from_bytes([2; 32]),
        build: None,
        exact: false,
        tokenizer: TokenizerDigest::from_bytes([3; 32]),
        prompt: vec![4; prompt_tokens],
        generated: Vec::new(),
        max_tokens: 5,
        sampling: Default::default(),
        requires: Default::default(),
    }))
}

fn is_bad_message(answer: &Result<Option<Work>, NetError>) -> bool {
    matches!(answer, Ok(Some(Work::Failed(failed))) if failed.code == FailureCode::BadMessage)
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_and_lengths_without_bounds_are_refused_by_a_worker_and_do_no_harm() {
    let pair = Pair::new().await;
    let kind = open(1).kind();
    let longer = u32::try_from(Work::body_bytes_max(kind) + 1).unwrap();
    let header = |length: u32| [length.to_le_bytes().as_slice(), &kind.to_le_bytes()].concat();
    let wrong = encode(&Work::Sending).unwrap();
    for bytes in [vec![0xff; 4_000], b"GET / HTTP/1.1\r\n\r\n".to_vec(), header(longer), header(u32::MAX), wrong] {
        let answer = pair.answer(&bytes).await;
        assert!(is_bad_message(&answer), "{answer:?}");
    }
    let answer = pair.answer(&encode(&open(100)).unwrap()).await;
    assert!(matches!(answer, Ok(Some(Work::Refused(_)))), "{answer:?}");
    pair.is_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_drips_a_request_is_told_so_at_the_deadline_and_holds_nobody_up() {
    let pair = Pair::new().await;
    let whole = encode(&open(100_000)).unwrap();
    let (_send, recv) = pair.stream(&whole[..whole.len() / 2]).await;
    pair.is_well().await;
    let answer = soon("the deadline", Reader::<Work>::new(recv).next()).await;
    assert!(is_bad_message(&answer), "{answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_with_all_the_streams_that_it_may_have_is_told_that_there_is_no_room() {
    let pair = Pair::new().await;
    let mut held = Vec::new();
    for _ in 0..STREAMS_PER_NODE_MAX {
        held.push(pair.stream(&[1]).await);
    }
    let refused = async {
        // Those before it may not have been looked at yet.
        loop {
            match pair.card().await {
                Ok(_) => tokio::task::yield_now().await,
                Err(error) => break error,
            }
        }
    };
    let error = soon("a refusal", refused).await;
    assert!(matches!(error, NetError::Ended(StreamEnd::Busy)), "{error}");
    drop(held);
    let served = async {
        while !matches!(pair.card().await, Ok(Some(Work::Card(_)))) {
            tokio::task::yield_now().await;
        }
    };
    soon("room again", served).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_left_unread_for_longer_than_its_lease_ends_with_that_reason() {
    /// More than QUIC takes on a stream that nobody reads.
    const CARD_BYTES_MIN: usize = 16 << 20;
    let timing = Timing { lease_ms: 200, ..Timing::default() };
    let pair = Pair::with(timing, |path| {
        let tiny = Gguf::open(path).unwrap();
        let larger = path.with_extension("larger");
        let mut builder = GgufBuilder::default();
        for (key, value) in tiny.keys() {
            builder.set(key, value.clone());
        }
        builder.set("tokenizer.chat_template", "x".repeat(CARD_BYTES_MIN));
        for tensor in tiny.tensors() {
            builder.tensor(&tensor.name, &tensor.dims, tensor.ty, TensorSource::Zeros).unwrap();
        }
        builder.write(&larger).unwrap();
        fs::rename(larger, path).unwrap();
    })
    .await;
    let (_send, mut recv) = pair.stream(&encode(&Work::GetCard(pair.model)).unwrap()).await;
    let code = soon("the lease ends", recv.received_reset()).await.unwrap();
    assert_eq!(code.map(StreamEnd::of), Some(StreamEnd::LeaseExpired));
    // Who reads is not hurried.
    let (_send, recv) = pair.stream(&encode(&Work::GetCard(pair.model)).unwrap()).await;
    let mut reader = Reader::<Work>::new(recv);
    let mut bytes = 0;
    while bytes < CARD_BYTES_MIN {
        match soon("a part", reader.expect()).await.unwrap() {
            Work::CardPart(part) => bytes += part.len(),
            other => assert!(matches!(other, Work::Card(_)), "{other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_keeps_its_hours_while_a_large_file_is_read_for_its_name() {
    /// Nobody reads so much while a test waits. It is a hole, which takes no room.
    const ENDLESS_BYTES: u64 = 1 << 40;
    let folder = tempfile::tempdir().unwrap();
    let (path, data_dir) = (folder.path().join("tiny.gguf"), folder.path().join("node"));
    let bytes = the_file(&path);
    let on_demand = vec![ModelSpec { path: path.clone(), id: "tiny".to_owned() }];
    let hour = Local::now().hour();
    let other_hours = format!("{}-{}", (hour + 8) % 24, (hour + 12) % 24);
    let sharing = Sharing { hours: vec![other_hours.parse().unwrap()], ..Sharing::default() };
    let options = NodeOptions { contributes: true, on_demand, sharing, ..options(&data_dir) };
    let node = Arc::new(Node::open(options).unwrap());
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(ENDLESS_BYTES).unwrap();
    node.join_mesh(mesh(&data_dir, &[])).await.unwrap();
    until("the node pauses", || node.status()["sharing"]["paused"].is_string()).await;
    // Whoever reads it comes to its end now.
    file.set_len(bytes.len() as u64).unwrap();
}
