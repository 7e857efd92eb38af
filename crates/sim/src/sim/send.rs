//! What is sent: how long it is, and on its way.

use iroh_gossip::proto::{state::MessageKind, topic::Message};
use postcard::experimental::serialized_size;

use super::{Direct, Event, Happening, Sim};
use crate::{node::Index, notary};

/// Bytes around a message: QUIC, UDP and IP headers.
const ENVELOPE_BYTES: u64 = 60;

/// What names the topic in each message of the overlay.
const TOPIC_BYTES: u64 = 32;

/// Bytes of an entry of a digest.
const DIGEST_ENTRY_BYTES: u64 = 40;

/// Bytes of a fingerprint of a summary.
const FINGERPRINT_BYTES: u64 = 4;

/// Bytes of the number of a range.
const RANGE_BYTES: u64 = 2;

impl Sim {
    /// Sends a message of the overlay.
    pub(super) fn send_gossip(&mut self, from: Index, to: Index, message: Message<Index>) {
        let bytes = gossip_bytes(&message);
        self.report.gossip_bytes += bytes;
        self.report.record_bytes += if is_record(&message) { bytes } else { 0 };
        self.nodes[from as usize].sent_bytes += bytes;
        self.send(from, to, Event::Gossip { from, message });
    }

    /// Sends what neighbours say to each other beside broadcasts.
    pub(super) fn send_direct(&mut self, from: Index, to: Index, message: Direct) {
        let bytes = match &message {
            Direct::Digest(digest) => digest.len() as u64 * DIGEST_ENTRY_BYTES,
            Direct::Summary(summary) => summary.fingerprints().len() as u64 * FINGERPRINT_BYTES,
            Direct::Differing(differing, _) => {
                differing.ranges.len() as u64 * RANGE_BYTES + differing.entries.len() as u64 * DIGEST_ENTRY_BYTES
            }
            Direct::Want(nodes) => nodes.len() as u64 * DIGEST_ENTRY_BYTES,
            Direct::Records(records) => records.len() as u64 * notary::RECORD_BYTES as u64,
        };
        self.report.exchange_bytes += ENVELOPE_BYTES + bytes;
        self.nodes[from as usize].sent_bytes += ENVELOPE_BYTES + bytes;
        self.send(from, to, Event::Direct { from, message });
    }

    /// Closes a connection: the other end finds out.
    pub(super) fn hang_up(&mut self, from: Index, to: Index) {
        self.report.gossip_bytes += ENVELOPE_BYTES;
        self.nodes[from as usize].sent_bytes += ENVELOPE_BYTES;
        self.send(from, to, Event::ConnectionLost(from));
    }

    /// Puts a message on its way.
    fn send(&mut self, from: Index, to: Index, event: Event) {
        let target = &self.nodes[to as usize];
        if target.life.is_none() || !self.network.connects(from, to) {
            let dead_ms = self.network.dead_connection_ms();
            let Some(life) = &mut self.nodes[from as usize].life else { return };
            if !life.giving_up.contains(&to) {
                life.giving_up.push(to);
                self.after(dead_ms, from, Event::ConnectionLost(to));
            }
            return;
        }
        let lives = target.lives;
        let [first_ms, again_ms] = self.network.arrivals(from, to, self.queue.now_ms(), &mut self.rng);
        if let Some(delay_ms) = again_ms {
            self.queue.after(delay_ms, Happening { at: to, life: lives, event: event.clone() });
        }
        if let Some(delay_ms) = first_ms {
            self.queue.after(delay_ms, Happening { at: to, life: lives, event });
        }
    }
}

/// Whether it is a broadcast in full.
pub(super) fn is_record(message: &Message<Index>) -> bool {
    matches!(message.kind(), MessageKind::Data)
}

/// How long a message of the overlay is, in bytes.
fn gossip_bytes(message: &Message<Index>) -> u64 {
    let unsent = if is_record(message) { notary::UNSENT_BYTES } else { 0 };
    ENVELOPE_BYTES + TOPIC_BYTES + serialized_size(message).unwrap_or_default() as u64 + unsent
}
