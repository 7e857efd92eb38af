//! The hub as one more source of a file that comes from other nodes, which give the hashes ([`unproven`](super::unproven)). Where the file
//! lies on the hub is told by nodes that have it from there, or by the user; a wrong word costs one question, or one group.

use std::{
    io::{self, Read},
    time::{Duration, Instant},
};

use murmur_core::swarm::Outcome;
use murmur_gguf::ByteRange;
use murmur_store::{
    DecodeError, HubRef, StoreError,
    hub::{HubConfig, HubFile, RangeError, Transfer},
};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::{
    Shelf,
    ask::{Failure, READ_BYTES},
    pace::{Counted, Pace, Paced},
    unproven::UNPROVEN,
};
use crate::model::with_causes;

/// Before a hub that could not be reached is tried again.
const RETRY: Duration = Duration::from_secs(30);

/// The file on the hub, as soon as that can be reached, and how long it took to answer; or why it is of no use.
pub(super) async fn find(config: HubConfig, source: HubRef, bytes: u64) -> Result<(HubFile, Duration), String> {
    loop {
        let asked = Instant::now();
        match HubFile::open(&config, &source).await {
            Ok(file) if file.bytes() == bytes => return Ok((file, asked.elapsed())),
            Ok(file) => return Err(format!("{source} has {} bytes there, and not {bytes}", file.bytes())),
            Err(error @ StoreError::HubUnavailable { .. }) => {
                tracing::debug!("{source} is asked for again later: {}", with_causes(&error));
                tokio::time::sleep(RETRY).await;
            }
            Err(error) => return Err(with_causes(&error)),
        }
    }
}

/// Keeps these ranges of the file on the hub, of which all hashes are here. Each group that was kept is `received`. Blocks.
pub(super) fn fill(
    shelf: &Shelf,
    file: &HubFile,
    ranges: &[ByteRange],
    (runtime, pace): (Handle, &Pace),
    unwanted: CancellationToken,
    received: &mut dyn FnMut(ByteRange),
) -> Result<(), Failure> {
    let left = ranges.iter().copied();
    let mut parts = Parts { file, left, transfer: None, runtime, unwanted, failure: None };
    let counted = Counted(&mut parts, &shelf.received_bytes);
    let mut stream = io::BufReader::with_capacity(READ_BYTES, Paced(counted, pace));
    let filled = shelf.content.fill(ranges, &mut stream, received);
    drop(stream);
    filled.map_err(|error| failure(error, parts.failure))
}

fn failure(error: DecodeError, of_hub: Option<RangeError>) -> Failure {
    match (error, of_hub) {
        (DecodeError::Wrong { .. }, _) => Failure::Source(Outcome::Wrong),
        // Somebody has given up the hashes in the meantime.
        (DecodeError::Store(StoreError::ContentLacks { .. }), _) => UNPROVEN,
        (DecodeError::Store(error), _) => Failure::Store(with_causes(&error)),
        (_, Some(RangeError::Later { retry_after: Some(wait), .. })) => {
            let retry_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
            Failure::Source(Outcome::Busy { retry_ms })
        }
        (_, Some(RangeError::Later { .. }) | None) => Failure::GONE,
        (_, Some(error @ (RangeError::Changed { .. } | RangeError::Final(_)))) => Failure::Useless(error.to_string()),
    }
}

/// Ranges of a file on a hub, one after the other. Ends with an error as soon as nobody wants them any more.
struct Parts<'a> {
    file: &'a HubFile,
    left: std::iter::Copied<std::slice::Iter<'a, ByteRange>>,
    transfer: Option<Transfer<'a>>,
    runtime: Handle,
    unwanted: CancellationToken,
    /// Why reading has failed.
    failure: Option<RangeError>,
}

impl Parts<'_> {
    async fn next(&mut self, buffer: &mut [u8]) -> Result<usize, RangeError> {
        loop {
            if let Some(transfer) = &mut self.transfer {
                match transfer.read(buffer).await? {
                    0 => self.transfer = None,
                    read => return Ok(read),
                }
            }
            let Some(range) = self.left.next() else { return Ok(0) };
            self.transfer = Some(self.file.range(range).await?);
        }
    }
}

impl Read for Parts<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let (runtime, unwanted) = (self.runtime.clone(), self.unwanted.clone());
        match runtime.block_on(unwanted.run_until_cancelled(self.next(buffer))) {
            Some(Ok(read)) => Ok(read),
            Some(Err(error)) => {
                self.failure = Some(error);
                Err(io::Error::other("the hub does not send it"))
            }
            None => Err(io::Error::other("not wanted any more")),
        }
    }
}
