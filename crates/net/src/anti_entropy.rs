//! Neighbours compare what they know, and hand each other what is lacking.
//!
//! ```text
//! of a small table                         of a large one, to a peer that knows summaries
//!
//! one that asks            the other       one that asks            the other
//!   Digest ───────────────>                  Summary ──────────────>
//!          <──── Records ... Want                   <───────────── Differing
//!   Records ... end ──────>                  Records ... Want ─────>
//!          <────────────────  end                   <───── Records ... end
//!                                            end ──────────────────>
//! ```
//!
//! `Differing` is a digest of the ranges of ids in which the tables differ: from there on it is the same with the parts
//! exchanged. The last records are those that are wanted, and whatever is newer here than what the other has just handed over: it
//! may not have heard that a node is gone. After one exchange both know what either knew, up to the bounds of
//! `murmur_core::membership`. Each exchange is one stream with a deadline. Signatures are checked before a record is taken, on
//! the stream's own task, so that a flood of forgeries costs the one who checks and not the table; each one that fails is an
//! offence of the peer that handed it over.
//!
//! Usually this is the second way, which now and then brings what the overlay has lost. With a node that has died and come back it is for a
//! while the first (`accompany`): the overlay goes on sending to its earlier life until that heals.

use std::sync::Arc;
use std::time::{Duration, Instant};

use iroh::endpoint::SendStream;
use murmur_core::membership::{Aged, Answer, Digest, Opening, Verified};
use murmur_protocol::mesh::control::RECORDS_MAX;
use murmur_protocol::mesh::{AgedRecord, Capabilities, Control, NodeId, Summary};
use tokio::time::timeout;

use crate::NetError;
use crate::links::{JUST_BACK, Link};
use crate::shared::Shared;
use crate::state::Command;
use crate::stream::{self, Reader};

/// Within this time an exchange is over.
pub const EXCHANGE_DEADLINE_MS: u64 = 20_000;

/// How often records are compared with a node that has come back.
const ACCOMPANY_EVERY: Duration = Duration::from_secs(1);

/// Messages with records in one direction of one exchange, at most.
const RECORD_MESSAGES_MAX: usize = 512;

/// Compares with the neighbour at the other end.
pub(crate) async fn exchange(shared: &Arc<Shared>, link: &Link) -> Result<(), NetError> {
    let exchanging = async {
        let salt = link.greeted.capabilities.contains(Capabilities::SUMMARIES).then(rand::random);
        let opening = shared.ask(|reply| Command::Opening { salt, reply }).await?;
        let (mut send, recv) =
            link.connection.open_bi().await.map_err(|error| NetError::unreachable(link.node, error))?;
        let mut reader = Reader::new(recv);
        match opening {
            Opening::Digest(digest) => {
                stream::write(&mut send, &Control::Digest(digest)).await?;
                take_and_give(shared, link, &mut send, &mut reader).await
            }
            Opening::Summary(summary) => {
                let ranges = summary.ranges();
                stream::write(&mut send, &Control::Summary(summary)).await?;
                let Control::Differing(differing) = reader.expect().await? else {
                    return Err(NetError::protocol("a summary was answered by another message"));
                };
                let answer = shared.ask(|reply| Command::AnswerDiffering { differing, ranges, reply }).await?;
                give_and_take(shared, link, answer, &mut send, &mut reader).await?;
                stream::finish(&mut send);
                Ok(())
            }
        }
    };
    deadline(exchanging).await
}

/// Compares again and again with a node that has come back, while this connection lasts. Whoever has dialled has done so once already.
pub(crate) async fn accompany(shared: Arc<Shared>, link: Arc<Link>) {
    let begun = Instant::now();
    while begun.elapsed() < JUST_BACK {
        tokio::select! {
            () = tokio::time::sleep(ACCOMPANY_EVERY) => {}
            _ = link.connection.closed() => return,
        }
        if let Err(error) = exchange(&shared, &link).await {
            tracing::debug!(node = %link.node.short(), %error, "an exchange with a node that has come back failed");
        }
    }
}

/// Answers a neighbour's digest.
pub(crate) async fn respond(
    shared: &Arc<Shared>,
    link: &Link,
    digest: Digest,
    send: &mut SendStream,
    reader: &mut Reader<Control>,
) -> Result<(), NetError> {
    let responding = async {
        let answer: Answer = shared.ask(|reply| Command::Answer { digest, reply }).await?;
        give_and_take(shared, link, answer, send, reader).await
    };
    deadline(responding).await
}

/// Answers a neighbour's summary.
pub(crate) async fn respond_in_short(
    shared: &Arc<Shared>,
    link: &Link,
    summary: Summary,
    send: &mut SendStream,
    reader: &mut Reader<Control>,
) -> Result<(), NetError> {
    let responding = async {
        let differing = shared.ask(|reply| Command::Differing { summary, reply }).await?;
        stream::write(send, &Control::Differing(differing)).await?;
        take_and_give(shared, link, send, reader).await
    };
    deadline(responding).await
}

/// The part of the one whose entries the other knows: it takes what it lacks, and gives what is wanted.
async fn take_and_give(
    shared: &Arc<Shared>,
    link: &Link,
    send: &mut SendStream,
    reader: &mut Reader<Control>,
) -> Result<(), NetError> {
    let (mut outdated, Some(wanted)) = take_records(shared, link, reader).await? else {
        return Err(NetError::protocol("a digest was not answered"));
    };
    outdated.extend(wanted);
    let records = shared.ask(|reply| Command::Wanted { nodes: outdated, reply }).await?;
    hand_over(send, &records).await?;
    stream::finish(send);
    match reader.next().await? {
        None => Ok(()),
        Some(_) => Err(NetError::protocol("something came after the end of an exchange")),
    }
}

/// The part of the one that knows what both have: it gives what the other lacks, and takes what it wants.
async fn give_and_take(
    shared: &Arc<Shared>,
    link: &Link,
    answer: Answer,
    send: &mut SendStream,
    reader: &mut Reader<Control>,
) -> Result<(), NetError> {
    hand_over(send, &answer.records).await?;
    stream::write(send, &Control::Want(answer.want)).await?;
    match take_records(shared, link, reader).await? {
        (_, None) => Ok(()),
        (_, Some(_)) => Err(NetError::protocol("records were asked for twice")),
    }
}

async fn hand_over(send: &mut SendStream, records: &[Aged]) -> Result<(), NetError> {
    for part in records.chunks(RECORDS_MAX) {
        let part = part.iter().map(|aged| AgedRecord { age_ms: aged.age_ms, record: aged.verified.signed().clone() });
        stream::write(send, &Control::Records(part.collect())).await?;
    }
    Ok(())
}

/// Takes records until something is wanted, or the stream ends. Returns the nodes of which something newer is known here
/// than what was handed over, and those that are wanted.
async fn take_records(
    shared: &Arc<Shared>,
    link: &Link,
    reader: &mut Reader<Control>,
) -> Result<(Vec<NodeId>, Option<Vec<NodeId>>), NetError> {
    let mut outdated = Vec::new();
    for _ in 0..=RECORD_MESSAGES_MAX {
        match reader.next().await? {
            Some(Control::Records(records)) => {
                for aged in records {
                    outdated.extend(take(shared, link, &aged).await?);
                }
            }
            Some(Control::Want(nodes)) => return Ok((outdated, Some(nodes))),
            Some(Control::Unknown { .. }) => {}
            Some(_) => return Err(NetError::protocol("another message came in the middle of an exchange")),
            None => return Ok((outdated, None)),
        }
    }
    Err(NetError::protocol("an exchange does not end"))
}

/// Checks a record that a neighbour handed over, and gives it to the table. Returns its node if something newer is known.
async fn take(shared: &Arc<Shared>, link: &Link, aged: &AgedRecord) -> Result<Option<NodeId>, NetError> {
    match Verified::check(aged.record.clone(), shared.identity.mesh) {
        Ok(verified) => {
            let (node, age_ms) = (verified.record().node, u64::from(aged.age_ms));
            let outdated = shared.ask(|reply| Command::Handed { verified, age_ms, from: link.node, reply }).await?;
            Ok(outdated.then_some(node))
        }
        Err(error) => {
            tracing::debug!(from = %link.node.short(), %error, "a neighbour handed over a bad record");
            if shared.offence(link.node) { Err(NetError::protocol("too many bad records")) } else { Ok(None) }
        }
    }
}

async fn deadline(exchange: impl Future<Output = Result<(), NetError>>) -> Result<(), NetError> {
    timeout(Duration::from_millis(EXCHANGE_DEADLINE_MS), exchange)
        .await
        .unwrap_or(Err(NetError::Late("exchange of records")))
}
