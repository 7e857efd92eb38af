//! What a run is judged by.

use std::fmt;

/// A gossip round: how often a node compares what it knows with a neighbour, in milliseconds.
pub const ROUND_MS: u64 = 10_000;

/// A live node is to be known to every other within this time, in milliseconds.
pub const DISCOVERY_MS_MAX: u64 = 10_000;

/// A node that is gone is to be off every list within this time, in milliseconds: two rounds.
pub const GONE_MS_MAX: u64 = 2 * ROUND_MS;

/// Who lists whom at one moment, as counts of pairs of nodes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Survey {
    /// Both live, and the first does not list the second.
    pub unknown_pairs: usize,
    /// Of these, both live for longer than [`DISCOVERY_MS_MAX`].
    pub overdue_pairs: usize,
    /// The first lives and lists the second, which does not live.
    pub ghost_pairs: usize,
    /// Of these, the second is gone for longer than [`GONE_MS_MAX`]: since its goodbye, or since its last record has run out.
    pub overdue_ghosts: usize,
}

/// A distribution of times in milliseconds.
#[derive(Debug, Clone, Default)]
pub struct Times {
    /// How many samples there are of each whole number of [`Times::RESOLUTION_MS`].
    buckets: Vec<u64>,
    count: u64,
    max_ms: u64,
}

impl Times {
    /// Samples are told apart to so many milliseconds.
    pub const RESOLUTION_MS: u64 = 10;

    /// Longer times than this are put down as this, in milliseconds.
    pub const LONGEST_MS: u64 = 3_600_000;

    pub(crate) fn add(&mut self, ms: u64) {
        let bucket = (ms.min(Times::LONGEST_MS) / Times::RESOLUTION_MS) as usize;
        if self.buckets.len() <= bucket {
            self.buckets.resize(bucket + 1, 0);
        }
        self.buckets[bucket] += 1;
        self.count += 1;
        self.max_ms = self.max_ms.max(ms);
    }

    /// How many samples there are.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The largest sample, in milliseconds.
    pub fn max_ms(&self) -> u64 {
        self.max_ms
    }

    /// The time within which `part` (0 to 1) of the samples lie, in milliseconds.
    pub fn quantile_ms(&self, part: f64) -> u64 {
        let wanted = (self.count as f64 * part).ceil() as u64;
        let mut seen = 0;
        let reached = self.buckets.iter().position(|count| {
            seen += count;
            seen >= wanted.max(1)
        });
        reached.map_or(0, |bucket| ((bucket as u64 + 1) * Times::RESOLUTION_MS).min(self.max_ms))
    }
}

impl fmt::Display for Times {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = |ms: u64| ms as f64 / 1_000.0;
        let (p50, p99) = (seconds(self.quantile_ms(0.5)), seconds(self.quantile_ms(0.99)));
        write!(f, "p50 {p50:.2} s, p99 {p99:.2} s, max {:.2} s ({} samples)", seconds(self.max_ms), self.count)
    }
}

/// What was counted in a run.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// Time until a live node lists another, from when the later of both came.
    pub discovery: Times,
    /// Time until a node that said goodbye is off a live node's list.
    pub farewell: Times,
    /// Time until a node that crashed is off a live node's list, from when its last record ran out.
    pub ghosts: Times,
    /// How often a node that is gone for longer than two rounds got onto a live node's list.
    pub resurrections: u64,
    /// How often a live and reachable node was taken for dead.
    pub false_departures: u64,
    /// Records with a bad signature that nodes were handed.
    pub forgeries_refused: u64,
    /// Records of other meshes that nodes were handed.
    pub strangers_refused: u64,
    /// Bytes sent in broadcasts: records, announcements, and the upkeep of the overlay.
    pub gossip_bytes: u64,
    /// Of these, records in full.
    pub record_bytes: u64,
    /// Bytes sent between neighbours to compare what they know.
    pub exchange_bytes: u64,
    /// Messages delivered.
    pub messages: u64,
    /// Of these, broadcasts in full.
    pub copies: u64,
    /// Of which were the first of their broadcast for the node.
    pub first_copies: u64,
    /// How often a node had the overlay join somebody.
    pub joins: u64,
    /// How often a node got a new neighbour in the overlay.
    pub new_neighbours: u64,
    /// Milliseconds that nodes were alive, summed over all.
    pub node_ms: u64,
}

impl Report {
    /// Bytes that a node sends per second, on average.
    pub fn bytes_per_node_second(&self) -> f64 {
        (self.gossip_bytes + self.exchange_bytes) as f64 * 1_000.0 / self.node_ms.max(1) as f64
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let per_second = |bytes: u64| bytes as f64 / self.node_ms.max(1) as f64;
        let rounds = |times: &Times, part| times.quantile_ms(part) as f64 / ROUND_MS as f64;
        writeln!(f, "discovery         {}", self.discovery)?;
        writeln!(f, "gone: goodbye     {}", self.farewell)?;
        writeln!(
            f,
            "gone: expired     {}; in rounds of {} s: p99 {:.2}, max {:.2}",
            self.ghosts,
            ROUND_MS / 1_000,
            rounds(&self.ghosts, 0.99),
            rounds(&self.ghosts, 1.0)
        )?;
        writeln!(f, "resurrections     {}", self.resurrections)?;
        writeln!(f, "false departures  {}", self.false_departures)?;
        writeln!(f, "refused           {} forged, {} of another mesh", self.forgeries_refused, self.strangers_refused)?;
        writeln!(
            f,
            "overlay           {:.2} copies of each broadcast, {} joins, {} new neighbours",
            self.copies as f64 / self.first_copies.max(1) as f64,
            self.joins,
            self.new_neighbours
        )?;
        write!(
            f,
            "sent per node     {:.1} kB/s: records {:.1} ({:.1} different ones a second), announcements and overlay {:.1}, \
             comparing {:.1} ({} messages)",
            self.bytes_per_node_second() / 1_000.0,
            per_second(self.record_bytes),
            per_second(self.first_copies) * 1_000.0,
            per_second(self.gossip_bytes - self.record_bytes),
            per_second(self.exchange_bytes),
            self.messages
        )
    }
}
