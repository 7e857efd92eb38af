//! Bytes of models' files for other nodes.
//!
//! Whoever is in the mesh may have what is on the shelves. Each taker has a few streams at once, and all of them together share
//! one rate (`--max-upload`). What is sent is checked on its way from the disk, so nobody gets what the disk has spoilt.

use std::{io::BufWriter, sync::Arc, time::Duration};

use murmur_net::{NetError, SendStream, stream};
use murmur_protocol::mesh::{Content, Fetch, ModelDigest, NodeId, Refused, Work, content::HELD_RANGES_MAX};
use tokio::{
    sync::Semaphore,
    time::{MissedTickBehavior, timeout},
};
use tokio_io_timeout::TimeoutWriter;
use tokio_util::io::SyncIoBridge;

use super::{
    Shelf, from_wire,
    pace::{Pace, Paced},
    to_wire,
};
use crate::{Node, mesh::Places, model::with_causes};

/// How often it is looked whether there is more for those who watch a content.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Streams with bytes of files at once.
const STREAMS_MAX: usize = 32;
/// Of these, for one taker.
const STREAMS_PER_TAKER_MAX: usize = 8;
/// Streams with hashes for one taker at once, besides: who takes the bytes elsewhere does not wait behind those who take them here.
const PROOFS_PER_TAKER_MAX: usize = 8;
/// What a taker that found no room should wait.
const RETRY_MS: u32 = 500;
/// Whoever takes nothing of an answer for so long has gone.
const STALL_MAX: Duration = Duration::from_secs(30);
/// Bytes that are written at once.
const WRITE_BYTES: usize = 256 << 10;
/// Below tokens and hidden states on the same connection, which have 0.
const PRIORITY: i32 = -1;

/// Who may have how much at once.
pub(crate) struct Giving {
    streams: Arc<Semaphore>,
    takers: Arc<Places>,
    proofs: Arc<Places>,
    pace: Pace,
}

impl Giving {
    /// `None`: as fast as it goes.
    pub(crate) fn new(bytes_per_s_max: Option<u64>) -> Giving {
        let (takers, proofs) = (Places::new(STREAMS_PER_TAKER_MAX), Places::new(PROOFS_PER_TAKER_MAX));
        Giving {
            streams: Arc::new(Semaphore::new(STREAMS_MAX)),
            takers: Arc::new(takers),
            proofs: Arc::new(proofs),
            pace: Pace::new(bytes_per_s_max),
        }
    }
}

/// Says what is here of a file, now and whenever that changes, for as long as somebody wants to know.
pub(crate) async fn tell(node: &Node, model: ModelDigest, send: &mut SendStream) -> Result<(), NetError> {
    let Some(shelf) = shared(node, &model) else {
        return say(send, &Work::Refused(not_here())).await;
    };
    // Who watches does not keep it from making room.
    let shelf = Arc::downgrade(&shelf);
    let mut ticks = tokio::time::interval(LOOK_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let left = send.stopped();
    tokio::pin!(left);
    let mut told = None;
    loop {
        tokio::select! {
            // Reset, or the connection is gone.
            _ = &mut left => return Ok(()),
            _ = ticks.tick() => {}
        }
        let Some(now) = shelf.upgrade().map(|shelf| content(&shelf)) else {
            return say(send, &Work::Refused(not_here())).await;
        };
        if told.as_ref() != Some(&now) {
            say(send, &Work::Content(now.clone())).await?;
            told = Some(now);
        }
    }
}

/// Says what was signed of a file.
pub(crate) async fn tell_attestations(node: &Node, model: ModelDigest, send: &mut SendStream) -> Result<(), NetError> {
    let Some(shelf) = shared(node, &model) else {
        return say(send, &Work::Refused(not_here())).await;
    };
    let read = tokio::task::spawn_blocking(move || shelf.attestations()).await.unwrap_or_default();
    say(send, &Work::Attestations(read.iter().map(|attested| attested.signed().clone()).collect())).await
}

fn content(shelf: &Shelf) -> Content {
    let mut held = shelf.content.held();
    // Of too many, the longest.
    if held.len() > HELD_RANGES_MAX {
        held.sort_by_key(|range| std::cmp::Reverse(range.end - range.start));
        held.truncate(HELD_RANGES_MAX);
        held.sort_by_key(|range| range.start);
    }
    Content {
        file_bytes: shelf.content.bytes(),
        header_bytes: *shelf.header_bytes.borrow(),
        held: to_wire(&held),
        gives_hashes: true,
    }
}

/// Sends what was asked for.
pub(crate) async fn send(node: &Arc<Node>, taker: NodeId, fetch: Fetch, mut send: SendStream) {
    let outcome = match admit(node, taker, &fetch) {
        Ok((shelf, places)) => {
            let sent = begin(&shelf, &fetch, send, Arc::clone(node)).await;
            drop(places);
            sent
        }
        Err(refused) => {
            let said = say(&mut send, &Work::Refused(refused)).await;
            stream::finish(&mut send);
            said.map_err(|error| error.to_string())
        }
    };
    if let Err(error) = outcome {
        tracing::debug!("bytes of {} for {}: {error}", fetch.model.short(), taker.short());
    }
}

/// The file, and what the stream may use up.
fn admit(node: &Node, taker: NodeId, fetch: &Fetch) -> Result<(Arc<Shelf>, impl Sized + use<>), Refused> {
    let busy = || Refused::Busy { retry_ms: RETRY_MS };
    if node.gate.paused().is_some() {
        return Err(busy());
    }
    let shelf = shared(node, &fetch.model).ok_or_else(not_here)?;
    if !shelf.content.missing(&from_wire(&fetch.ranges)).is_empty() {
        return Err(Refused::NotServed { reason: "these bytes are not here".to_owned() });
    }
    if fetch.only_hashes {
        let place = node.giving.proofs.take(taker).ok_or_else(busy)?;
        return Ok((shelf, (place, None)));
    }
    let place = node.giving.takers.take(taker).ok_or_else(busy)?;
    let stream = Arc::clone(&node.giving.streams).try_acquire_owned().map_err(|_| busy())?;
    Ok((shelf, (place, Some(stream))))
}

/// A file that others may have.
fn shared(node: &Node, model: &ModelDigest) -> Option<Arc<Shelf>> {
    node.options().hands_out_files.then(|| node.library.find(model)).flatten()
}

fn not_here() -> Refused {
    Refused::NotServed { reason: "nothing of this file is here".to_owned() }
}

async fn begin(shelf: &Arc<Shelf>, fetch: &Fetch, mut send: SendStream, node: Arc<Node>) -> Result<(), String> {
    let _ = send.set_priority(PRIORITY);
    say(&mut send, &Work::Sending).await.map_err(|error| error.to_string())?;
    let (shelf, ranges, only_hashes) = (Arc::clone(shelf), from_wire(&fetch.ranges), fetch.only_hashes);
    let sending = tokio::task::spawn_blocking(move || {
        let _held = shelf.content.hold().map_err(|error| with_causes(&error))?;
        let mut patient = TimeoutWriter::new(send);
        patient.set_timeout(Some(STALL_MAX));
        let bridge = SyncIoBridge::new(Box::pin(patient));
        let mut stream = BufWriter::with_capacity(WRITE_BYTES, Paced(bridge, &node.giving.pace));
        let encoded = match only_hashes {
            true => shelf.content.encode_hashes(&ranges, &mut stream),
            false => shelf.content.encode(&ranges, &mut stream),
        };
        encoded.map_err(|error| with_causes(&error))?;
        let ended = stream.into_inner().map_err(|error| error.into_error());
        ended.and_then(|paced| paced.into_inner().shutdown()).map_err(|error| error.to_string())
    });
    sending.await.map_err(|error| error.to_string())?
}

/// Writes a message, if the taker takes it.
async fn say(send: &mut SendStream, message: &Work) -> Result<(), NetError> {
    timeout(STALL_MAX, stream::write(send, message)).await.unwrap_or(Err(NetError::Late("reading of contents")))
}
