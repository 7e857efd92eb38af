//! How messages travel between simulated nodes.
//!
//! Each pair of nodes has a delay of its own, and each message some jitter on it. What loss means depends on what the
//! messages travel in. In a stream, as in QUIC, a lost packet is sent again: the message comes later, and what was sent
//! after it comes after it. A datagram is gone; others come twice, or overtake each other. The real mesh uses streams;
//! datagrams are there because the tables must not need streams to stay true.

use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
    ops::RangeInclusive,
};

use rand::{RngExt, rngs::StdRng};

/// What messages travel in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// Lost packets are sent again, and order is kept.
    Stream,
    /// Lost is lost, and order is not kept.
    Datagram,
}

/// The links between nodes.
#[derive(Debug, Clone, PartialEq)]
pub struct NetworkOptions {
    /// One-way delay of a pair of nodes, in milliseconds; drawn once for each pair.
    pub delay_ms: RangeInclusive<u64>,
    /// What is drawn on top of it for each message, in milliseconds.
    pub jitter_ms: u64,
    /// Part of the packets that is lost, 0 to 1.
    pub loss: f64,
    /// Part of the datagrams that comes twice, 0 to 1.
    pub duplication: f64,
    /// What messages travel in.
    pub transport: Transport,
    /// How long a node takes to find out that the other end of a connection is silent, in milliseconds.
    pub dead_connection_ms: u64,
}

impl Default for NetworkOptions {
    fn default() -> Self {
        NetworkOptions {
            delay_ms: 5..=60,
            jitter_ms: 5,
            loss: 0.0,
            duplication: 0.0,
            transport: Transport::Stream,
            dead_connection_ms: 10_000,
        }
    }
}

/// QUIC sends again after about this many round trips without an acknowledgement (RFC 9002: the probe timeout).
const RESEND_ROUND_TRIPS: f64 = 1.5;

/// What the other end adds to that before it acknowledges: RFC 9002's `max_ack_delay`.
const ACK_DELAY_MS: u64 = 25;

/// Copies of one message arrive within this time of each other.
const DUPLICATE_MS_MAX: u64 = 2_000;

/// How many times in a row a packet may be lost before that is a broken link.
const LOSSES_MAX: u32 = 16;

/// The delays of one message: none, one, or two if it was doubled.
pub(crate) type Arrivals = [Option<u64>; 2];

/// The links between nodes.
#[derive(Debug)]
pub(crate) struct Network {
    options: NetworkOptions,
    seed: u64,
    /// When the last message of a stream arrives, by sender and receiver.
    last_arrival_ms: HashMap<u64, u64, BuildHasherDefault<Mixed>>,
    /// Nodes in different groups do not reach each other.
    groups: Option<Vec<u32>>,
}

impl Network {
    pub(crate) fn new(options: NetworkOptions, seed: u64) -> Self {
        Network { options, seed, last_arrival_ms: HashMap::default(), groups: None }
    }

    pub(crate) fn dead_connection_ms(&self) -> u64 {
        self.options.dead_connection_ms
    }

    /// Splits the network, by the group of each node; or heals it.
    pub(crate) fn set_groups(&mut self, groups: Option<Vec<u32>>) {
        self.groups = groups;
    }

    /// Whether packets get from one node to the other.
    pub(crate) fn connects(&self, from: u32, to: u32) -> bool {
        let Some(groups) = &self.groups else { return true };
        groups.get(from as usize) == groups.get(to as usize)
    }

    /// After how many milliseconds a message arrives.
    pub(crate) fn arrivals(&mut self, from: u32, to: u32, now_ms: u64, rng: &mut StdRng) -> Arrivals {
        let delay_ms = self.pair_delay_ms(from, to);
        let once = |rng: &mut StdRng, most: u64| if most == 0 { 0 } else { rng.random_range(0..=most) };
        let mut arrival_ms = delay_ms + once(rng, self.options.jitter_ms);
        match self.options.transport {
            Transport::Stream => {
                let resend_ms = (RESEND_ROUND_TRIPS * 2.0 * delay_ms as f64) as u64 + ACK_DELAY_MS;
                let mut losses = 0;
                while losses < LOSSES_MAX && rng.random_bool(self.options.loss) {
                    // Each probe timeout is twice the one before.
                    arrival_ms += resend_ms << losses.min(4);
                    losses += 1;
                }
                let last_ms = self.last_arrival_ms.entry(u64::from(from) << 32 | u64::from(to)).or_default();
                *last_ms = (*last_ms).max(now_ms + arrival_ms);
                [Some(*last_ms - now_ms), None]
            }
            Transport::Datagram => {
                let lost = rng.random_bool(self.options.loss);
                let doubled = rng.random_bool(self.options.duplication);
                let again = doubled.then(|| arrival_ms + once(rng, DUPLICATE_MS_MAX));
                [(!lost).then_some(arrival_ms), again]
            }
        }
    }

    /// The same for both directions, and for the whole run.
    fn pair_delay_ms(&self, from: u32, to: u32) -> u64 {
        let (low, high) = (u64::from(from.min(to)), u64::from(from.max(to)));
        let mut mixed = SplitMix(self.seed ^ (low << 32 | high));
        let (least, most) = (*self.options.delay_ms.start(), *self.options.delay_ms.end());
        least + mixed.next() % (most.saturating_sub(least) + 1)
    }
}

/// Sebastiano Vigna's SplitMix64: one step turns similar numbers into unrelated ones.
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

/// Hashes a pair of nodes. Nobody chooses them to collide, and it is done for every message.
#[derive(Default)]
struct Mixed(u64);

impl Hasher for Mixed {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }

    fn write_u64(&mut self, number: u64) {
        self.0 = SplitMix(self.0 ^ number).next();
    }

    fn finish(&self) -> u64 {
        self.0
    }
}
