//! Bytes of models' files for other nodes.
//!
//! Whoever is in the mesh may have what is on the shelves. Each taker has a few streams at once, and all of them together share
//! one rate (`--max-upload`). What is sent is checked on its way from the disk, so nobody gets what the disk has spoilt.

use std::{io::BufWriter, sync::Arc, time::Duration};

use murmur_core::swarm::GroupSet;
use murmur_net::{NetError, SendStream, stream};
use murmur_protocol::mesh::{
    Content, Fetch, ModelDigest, NodeId, Refused, WatchContent, Work, content::HELD_RANGES_MAX,
};
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
pub(crate) async fn tell(node: &Node, watch: WatchContent, send: &mut SendStream) -> Result<(), NetError> {
    let Some(shelf) = shared(node, &watch.model) else {
        return say(send, &Work::Refused(not_here())).await;
    };
    // Who watches does not keep it from making room.
    let shelf = Arc::downgrade(&shelf);
    let mut ticks = tokio::time::interval(LOOK_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let left = send.stopped();
    tokio::pin!(left);
    let mut told = Told { only_news: watch.only_news, before: None };
    loop {
        tokio::select! {
            // Reset, or the connection is gone.
            _ = &mut left => return Ok(()),
            _ = ticks.tick() => {}
        }
        let Some(shelf) = shelf.upgrade() else {
            return say(send, &Work::Refused(not_here())).await;
        };
        let next = told.next(facts(&shelf), GroupSet::covering(&shelf.content.held()));
        drop(shelf);
        if let Some(content) = next {
            say(send, &Work::Content(content)).await?;
        }
    }
}

/// What somebody who watches a content has been told of it.
struct Told {
    only_news: bool,
    /// What was said last beside what is held, and all that was said to be held.
    before: Option<(Content, GroupSet)>,
}

impl Told {
    /// What to say now, if anything: what has come, to whom that is enough; all, where something has gone or is otherwise. `facts`: what is said beside what
    /// is held.
    fn next(&mut self, facts: Content, held: GroupSet) -> Option<Content> {
        let is_more = |(before, told): &&(Content, GroupSet)| *before == facts && told.difference(&held).is_empty();
        let told = self.before.as_ref().filter(is_more).map(|(_, told)| told);
        let (said, in_all) = match told {
            Some(told) if self.only_news => {
                let news = longest(held.difference(told), HELD_RANGES_MAX);
                let in_all = told.union(&news);
                (news, in_all)
            }
            _ => {
                let all = longest(held, HELD_RANGES_MAX);
                (if told == Some(&all) { GroupSet::default() } else { all.clone() }, all)
            }
        };
        if told.is_some() && said.is_empty() {
            return None;
        }
        let content = Content {
            held: to_wire(&said.byte_ranges(facts.file_bytes)),
            is_news: told.is_some() && self.only_news,
            ..facts.clone()
        };
        self.before = Some((facts, in_all));
        Some(content)
    }
}

/// Of more stretches than this, the longest.
pub(super) fn longest(groups: GroupSet, most: usize) -> GroupSet {
    if groups.ranges().len() <= most {
        return groups;
    }
    let mut ranges = groups.ranges().to_vec();
    ranges.sort_by_key(|range| std::cmp::Reverse(range.end - range.start));
    ranges.truncate(most);
    ranges.into_iter().collect()
}

/// Says what was signed of a file.
pub(crate) async fn tell_attestations(node: &Node, model: ModelDigest, send: &mut SendStream) -> Result<(), NetError> {
    let Some(shelf) = shared(node, &model) else {
        return say(send, &Work::Refused(not_here())).await;
    };
    let read = tokio::task::spawn_blocking(move || shelf.attestations()).await.unwrap_or_default();
    say(send, &Work::Attestations(read.iter().map(|attested| attested.signed().clone()).collect())).await
}

/// What is said of a file beside what is held of it.
fn facts(shelf: &Shelf) -> Content {
    Content {
        file_bytes: shelf.content.bytes(),
        header_bytes: *shelf.header_bytes.borrow(),
        held: Vec::new(),
        gives_hashes: true,
        is_news: false,
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

#[cfg(test)]
mod tests {
    use murmur_protocol::mesh::content::GROUP_BYTES;

    use super::*;

    /// In each second group of a file of a thousand times as many as a message has room for.
    const FILE_BYTES: u64 = 2_000 * HELD_RANGES_MAX as u64 * GROUP_BYTES;

    fn facts(header_bytes: u64) -> Content {
        Content { file_bytes: FILE_BYTES, header_bytes, held: Vec::new(), gives_hashes: true, is_news: false }
    }

    fn apart(groups: std::ops::Range<u64>) -> GroupSet {
        groups.step_by(2).map(|group| group..group + 1).collect()
    }

    /// What a message says is held, if it is one, and whether that is news.
    fn said(content: Option<Content>) -> Option<(GroupSet, bool)> {
        content.map(|content| (GroupSet::covering(&from_wire(&content.held)), content.is_news))
    }

    #[test]
    fn to_whom_news_are_enough_hears_only_what_has_come_and_all_when_something_has_gone_or_is_otherwise() {
        let mut told = Told { only_news: true, before: None };
        assert_eq!(said(told.next(facts(0), GroupSet::default())), Some((GroupSet::default(), false)));
        assert_eq!(said(told.next(facts(0), apart(0..9))), Some((apart(0..9), true)));
        assert_eq!(said(told.next(facts(0), apart(0..9))), None);
        assert_eq!(said(told.next(facts(0), apart(0..13))), Some((apart(10..13), true)));
        assert_eq!(said(told.next(facts(7), apart(0..15))), Some((apart(0..15), false)));
        assert_eq!(said(told.next(facts(7), apart(2..17))), Some((apart(2..17), false)));
    }

    #[test]
    fn who_does_not_know_news_hears_all_each_time_and_nothing_twice() {
        let mut told = Told { only_news: false, before: None };
        assert_eq!(said(told.next(facts(0), apart(0..9))), Some((apart(0..9), false)));
        assert_eq!(said(told.next(facts(0), apart(0..11))), Some((apart(0..11), false)));
        assert_eq!(said(told.next(facts(0), apart(0..11))), None);
        // More than a message has room for.
        let many = apart(0..3 * HELD_RANGES_MAX as u64);
        assert!(told.next(facts(0), many.clone()).is_some());
        assert_eq!(told.next(facts(0), many), None);
    }

    #[test]
    fn a_taker_is_sent_eight_answers_with_bytes_and_eight_with_hashes_at_once_and_others_have_room_beside_it() {
        let giving = Giving::new(None);
        let [one, other] = [1, 2].map(|number| NodeId::from_bytes([number; 32]));
        let all_of = |places: &Arc<Places>, taker| std::iter::from_fn(|| places.take(taker)).collect::<Vec<_>>();
        let (bytes, hashes) = (all_of(&giving.takers, one), all_of(&giving.proofs, one));
        assert_eq!((bytes.len(), hashes.len()), (8, 8));
        assert_eq!((all_of(&giving.takers, other).len(), all_of(&giving.proofs, other).len()), (8, 8));
    }

    #[test]
    fn more_stretches_than_a_message_has_room_for_are_told_in_several() {
        let mut told = Told { only_news: true, before: None };
        let many = apart(0..5 * HELD_RANGES_MAX as u64);
        let mut heard = GroupSet::default();
        for round in 0..3 {
            let (part, is_news) = said(told.next(facts(0), many.clone())).unwrap();
            assert!(is_news == (round > 0) && part.ranges().len() <= HELD_RANGES_MAX, "{round}");
            heard = heard.union(&part);
        }
        assert_eq!((heard, told.next(facts(0), many.clone())), (many, None));
    }
}
