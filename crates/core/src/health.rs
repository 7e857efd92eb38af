//! What is known of each peer from dealing with it.
//!
//! Four things can go wrong with a request, and they mean different things: BUSY is a peer that works for others, NO_MEMORY
//! one that has no room for this model now, BAD_REQUEST our own mistake. Only GONE (the connection died, the deadline passed,
//! the protocol was broken) says something against the peer. Then its breaker opens at once, so that no other request runs
//! into it; after a pause that grows with every failure one request may try again, and its outcome decides. A request that has nobody
//! else to ask need not wait for so long: a peer that was killed may be back under the same name.
//!
//! Speeds are measured, never believed: what a peer declares counts until there are figures of our own. Round trips are
//! averages of complete ones. (A minimum would remember the luckiest one for ever, and one taken before the reply was read
//! is no round trip at all: either makes every peer look next door.)

use std::collections::BTreeMap;

use murmur_protocol::mesh::{ModelDigest, NodeId};

use crate::time::Now;

/// Peers remembered, at most; the one not dealt with for longest is forgotten.
pub const PEERS_MAX: usize = 16_384;

/// Models whose speed is remembered per peer, at most.
pub const MODELS_PER_PEER_MAX: usize = 64;

/// How long a peer is left alone after its first failure.
pub const BREAKER_PAUSE_MS_MIN: u64 = 1_000;

/// How long a peer is left alone at most, however often it failed.
pub const BREAKER_PAUSE_MS_MAX: u64 = 60_000;

/// How long one request may try out a peer whose pause is over, before another may.
pub const PROBE_MS: u64 = 30_000;

/// How long a BUSY peer is left alone at most, whatever it asks for.
pub const BUSY_MS_MAX: u64 = 60_000;

/// How long a peer without memory for a model is not asked for that model.
pub const NO_MEMORY_MS: u64 = 10_000;

/// Weight of a new measurement in a moving average, as for TCP's round trips (RFC 6298).
const GAIN: f64 = 0.125;

/// How a request at a peer ended, or that it did not begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The peer did what it was asked for.
    Ok,
    /// It works for others. `retry_ms`: when to ask again.
    Busy {
        /// Milliseconds from now.
        retry_ms: u64,
    },
    /// It has no room for the model now.
    NoMemory,
    /// It calls the request wrong.
    BadRequest,
    /// The connection died, a deadline passed, or the peer broke the protocol.
    Gone,
}

/// Whether a peer may be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// It may.
    Yes,
    /// It failed before, and its pause is over: one request may try.
    Probe,
    /// It failed, and is left alone until then.
    Broken {
        /// When one request may try again.
        until: Now,
        /// When one may that has nobody else to ask.
        last_resort: Now,
    },
    /// It said BUSY and when to ask again.
    Busy {
        /// When to ask again.
        until: Now,
    },
    /// It has no memory for this model, and is not asked for it until then.
    NoMemory {
        /// When to ask again.
        until: Now,
    },
}

/// A moving average of measurements.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Average(f64);

impl Average {
    fn take(average: &mut Option<Average>, value: f64) {
        if !value.is_finite() || value < 0.0 {
            return;
        }
        *average = Some(match average {
            Some(Average(known)) => Average(*known + GAIN * (value - *known)),
            None => Average(value),
        });
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Breaker {
    Closed,
    Open {
        until: Now,
        last_resort: Now,
    },
    /// One request tries, and until then no other.
    HalfOpen {
        until: Now,
    },
}

#[derive(Debug, Default)]
struct ModelHealth {
    decode_ms_per_token: Option<Average>,
    prefill_ms_per_token: Option<Average>,
    load_ms: Option<Average>,
    no_memory_until: Option<Now>,
    touched: Now,
}

#[derive(Debug)]
struct PeerHealth {
    breaker: Breaker,
    /// How long the breaker stays open when it opens next.
    pause_ms: u64,
    busy_until: Option<Now>,
    rtt_ms: Option<Average>,
    models: BTreeMap<ModelDigest, ModelHealth>,
    touched: Now,
}

impl PeerHealth {
    fn new(now: Now) -> Self {
        PeerHealth {
            breaker: Breaker::Closed,
            pause_ms: BREAKER_PAUSE_MS_MIN,
            busy_until: None,
            rtt_ms: None,
            models: BTreeMap::new(),
            touched: now,
        }
    }

    fn model(&mut self, model: ModelDigest, now: Now) -> &mut ModelHealth {
        if !self.models.contains_key(&model) && self.models.len() >= MODELS_PER_PEER_MAX {
            let idlest = self.models.iter().min_by_key(|(_, health)| health.touched).map(|(digest, _)| *digest);
            idlest.and_then(|digest| self.models.remove(&digest));
        }
        let health = self.models.entry(model).or_default();
        health.touched = now;
        health
    }
}

/// Measured speeds of one peer with one model. `None` where nothing was measured.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Speed {
    /// Milliseconds between two tokens of one stream.
    pub decode_ms_per_token: Option<f64>,
    /// Milliseconds per prompt token that was not cached.
    pub prefill_ms_per_token: Option<f64>,
    /// Milliseconds to load the model.
    pub load_ms: Option<f64>,
}

/// The health of all peers.
#[derive(Debug, Default)]
pub struct Health {
    peers: BTreeMap<NodeId, PeerHealth>,
}

impl Health {
    /// Knows nobody: every peer may be asked.
    pub fn new() -> Self {
        Health::default()
    }

    /// Whether `peer` may be asked for `model`.
    pub fn admission(&self, peer: &NodeId, model: &ModelDigest, now: Now) -> Admission {
        let Some(health) = self.peers.get(peer) else { return Admission::Yes };
        let breaker = match health.breaker {
            Breaker::Closed => Admission::Yes,
            Breaker::Open { until, last_resort } if until > now => return Admission::Broken { until, last_resort },
            Breaker::HalfOpen { until } if until > now => return Admission::Broken { until, last_resort: until },
            Breaker::Open { .. } | Breaker::HalfOpen { .. } => Admission::Probe,
        };
        if let Some(until) = health.busy_until.filter(|until| *until > now) {
            return Admission::Busy { until };
        }
        let no_memory_until = health.models.get(model).and_then(|health| health.no_memory_until);
        if let Some(until) = no_memory_until.filter(|until| *until > now) {
            return Admission::NoMemory { until };
        }
        breaker
    }

    /// A request is opened at `peer`. If the peer is on probation this is the one that tries it.
    pub fn begin(&mut self, peer: NodeId, now: Now) {
        let Some(health) = self.peers.get_mut(&peer) else { return };
        if health.breaker != Breaker::Closed {
            health.breaker = Breaker::HalfOpen { until: now.plus_ms(PROBE_MS) };
        }
    }

    /// A request that was begun at `peer` is over, whatever is noted of it, or nothing because it was cancelled: if it was the
    /// one that tries the peer, another may.
    pub fn end(&mut self, peer: NodeId, now: Now) {
        let Some(health) = self.peers.get_mut(&peer) else { return };
        if matches!(health.breaker, Breaker::HalfOpen { .. }) {
            health.breaker = Breaker::Open { until: now, last_resort: now };
        }
    }

    /// Takes note of how a request for `model` went at `peer`.
    pub fn note(&mut self, peer: NodeId, model: ModelDigest, verdict: Verdict, now: Now) {
        let health = self.peer(peer, now);
        match verdict {
            Verdict::Gone => {
                // Several requests that die with one peer are one failure: the pause grows once.
                let already_open = matches!(health.breaker, Breaker::Open { until, .. } if until > now);
                if !already_open {
                    let last_resort = now.plus_ms(BREAKER_PAUSE_MS_MIN);
                    health.breaker = Breaker::Open { until: now.plus_ms(health.pause_ms), last_resort };
                    health.pause_ms = (health.pause_ms * 2).min(BREAKER_PAUSE_MS_MAX);
                }
                return;
            }
            Verdict::Ok => {
                health.busy_until = None;
                health.model(model, now).no_memory_until = None;
                // Halved and not forgotten: a peer that comes and goes is tried less and less often.
                health.pause_ms = (health.pause_ms / 2).max(BREAKER_PAUSE_MS_MIN);
            }
            Verdict::Busy { retry_ms } => health.busy_until = Some(now.plus_ms(retry_ms.min(BUSY_MS_MAX))),
            Verdict::NoMemory => health.model(model, now).no_memory_until = Some(now.plus_ms(NO_MEMORY_MS)),
            Verdict::BadRequest => {}
        }
        // Whoever refuses is alive.
        health.breaker = Breaker::Closed;
    }

    /// A complete round trip: from sending until the reply was *read*. Microseconds.
    pub fn note_round_trip(&mut self, peer: NodeId, round_trip_us: u64, now: Now) {
        Average::take(&mut self.peer(peer, now).rtt_ms, round_trip_us as f64 / 1_000.0);
    }

    /// The time between two tokens of one stream. Milliseconds.
    pub fn note_decode(&mut self, peer: NodeId, model: ModelDigest, ms_per_token: f64, now: Now) {
        Average::take(&mut self.peer(peer, now).model(model, now).decode_ms_per_token, ms_per_token);
    }

    /// The time per prompt token that was not cached. Milliseconds.
    pub fn note_prefill(&mut self, peer: NodeId, model: ModelDigest, ms_per_token: f64, now: Now) {
        Average::take(&mut self.peer(peer, now).model(model, now).prefill_ms_per_token, ms_per_token);
    }

    /// How long the peer took to load the model. Milliseconds.
    pub fn note_load(&mut self, peer: NodeId, model: ModelDigest, load_ms: f64, now: Now) {
        Average::take(&mut self.peer(peer, now).model(model, now).load_ms, load_ms);
    }

    /// The average round trip in milliseconds, if one was measured.
    pub fn rtt_ms(&self, peer: &NodeId) -> Option<f64> {
        self.peers.get(peer)?.rtt_ms.map(|average| average.0)
    }

    /// What was measured of `peer` with `model`.
    pub fn speed(&self, peer: &NodeId, model: &ModelDigest) -> Speed {
        let Some(health) = self.peers.get(peer).and_then(|health| health.models.get(model)) else {
            return Speed::default();
        };
        Speed {
            decode_ms_per_token: health.decode_ms_per_token.map(|average| average.0),
            prefill_ms_per_token: health.prefill_ms_per_token.map(|average| average.0),
            load_ms: health.load_ms.map(|average| average.0),
        }
    }

    fn peer(&mut self, peer: NodeId, now: Now) -> &mut PeerHealth {
        if !self.peers.contains_key(&peer) && self.peers.len() >= PEERS_MAX {
            let idlest = self.peers.iter().min_by_key(|(_, health)| health.touched).map(|(node, _)| *node);
            idlest.and_then(|node| self.peers.remove(&node));
        }
        let health = self.peers.entry(peer).or_insert_with(|| PeerHealth::new(now));
        health.touched = now;
        health
    }
}
