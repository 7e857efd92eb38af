//! Which peer gets a request.
//!
//! One unit decides: predicted milliseconds until the last token, from the round trip, the queue, the loading of a model
//! that is not loaded, the prefill of what the peer does not hold cached, and the decoding. Measured figures
//! ([`crate::health`]) go before declared ones. The ranking keeps its reasons: it prints as a table of costs.
//!
//! Records are up to a second old, and many drivers see the same ones. Two things keep them from running to the same
//! peer: the driver counts its own requests in flight, and costs within [`TIE_FRACTION`] of each other count as equal and are
//! ordered by a hash of request and node.

use std::{collections::BTreeMap, fmt};

use murmur_protocol::mesh::{ModelDigest, ModelState, NodeId, ServedModel};

use crate::{
    health::{Admission, Health},
    prefix::{PrefixChain, Prefixes},
    time::Now,
};

/// Costs that differ by less than about this fraction are equal.
pub const TIE_FRACTION: f64 = 0.05;

/// Round trip to a peer of which none was measured.
pub const RTT_MS_UNKNOWN: f64 = 100.0;

/// Decode time per token where neither a measurement nor a declaration is at hand.
pub const DECODE_MS_UNKNOWN: f64 = 50.0;

/// Prefill time per token where neither a measurement nor a declaration is at hand.
pub const PREFILL_MS_UNKNOWN: f64 = 5.0;

/// Time to load a model that was never seen loading.
pub const LOAD_MS_UNKNOWN: f64 = 30_000.0;

/// Tokens that a request in a peer's queue is thought to generate.
pub const QUEUED_TOKENS_TYPICAL: f64 = 256.0;

/// Excluded candidates that a ranking lists, at most.
pub const EXCLUDED_MAX: usize = 256;

/// What the router has to know of a request.
#[derive(Debug, Clone)]
pub struct RequestFacts {
    /// The model.
    pub model: ModelDigest,
    /// Tokens to prefill: the prompt, and when a request moves, what was generated.
    pub prompt_tokens: u32,
    /// The hashes of these tokens.
    pub prefix: PrefixChain,
    /// Tokens that are expected to be generated.
    pub output_tokens: u32,
    /// Cells of context that the request needs, at most: prompt and all tokens it may generate.
    pub context_tokens: u32,
    /// The engine build that generated the beginning, when a request moves. Peers with the same go before others: they
    /// continue with the very same tokens.
    pub build: Option<String>,
    /// Orders peers of equal cost: a number of the request.
    pub salt: u64,
}

/// A peer that serves the model.
#[derive(Debug, Clone, Copy)]
pub struct Candidate<'a> {
    /// The peer.
    pub node: NodeId,
    /// What its record says of the model.
    pub served: &'a ServedModel,
}

/// Predicted milliseconds, one by one.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Cost {
    /// One round trip.
    pub rtt_ms: f64,
    /// Waiting for others' requests.
    pub queue_ms: f64,
    /// Loading the model.
    pub load_ms: f64,
    /// Computing the part of the prompt that is not cached.
    pub prefill_ms: f64,
    /// Generating all tokens.
    pub decode_ms: f64,
    /// Generating one token.
    pub decode_ms_per_token: f64,
}

impl Cost {
    /// Until the last token.
    pub fn total_ms(&self) -> f64 {
        self.rtt_ms + self.queue_ms + self.load_ms + self.prefill_ms + self.decode_ms
    }

    /// Until the first token.
    pub fn first_token_ms(&self) -> f64 {
        self.rtt_ms + self.queue_ms + self.load_ms + self.prefill_ms + self.decode_ms_per_token
    }
}

/// A peer that may be asked, with what it would cost.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// The peer.
    pub node: NodeId,
    /// The prediction.
    pub cost: Cost,
    /// Tokens of the prompt that it is thought to hold.
    pub cached_tokens: u32,
    /// The model's state there.
    pub state: ModelState,
    /// Its engine build is the one that generated the beginning (or nothing was generated yet).
    pub same_build: bool,
    /// It failed lately, and this request tries it again.
    pub probe: bool,
    /// The figures are measured, not declared.
    pub measured: bool,
}

/// Why a peer was left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Excluded {
    /// The request was there already, or is.
    Tried,
    /// It serves another model.
    OtherModel,
    /// It takes no new requests for the model.
    Draining,
    /// Its context is too small.
    ContextTooSmall,
    /// See [`Admission::Broken`], [`Admission::Busy`], [`Admission::NoMemory`].
    Unfit(Admission),
}

/// All candidates, the best first.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Ranking {
    /// Those that may be asked.
    pub choices: Vec<Choice>,
    /// Those that may not, and why.
    pub excluded: Vec<(NodeId, Excluded)>,
}

impl Ranking {
    /// The earliest moment at which one that is left out for a while may be asked, if there is still nobody else.
    pub fn next_admission(&self) -> Option<Now> {
        let until = self.excluded.iter().filter_map(|(_, why)| match why {
            Excluded::Unfit(Admission::Busy { until } | Admission::NoMemory { until }) => Some(*until),
            Excluded::Unfit(Admission::Broken { last_resort, .. }) => Some(*last_resort),
            _ => None,
        });
        until.min()
    }

    fn exclude(&mut self, node: NodeId, why: Excluded) {
        if self.excluded.len() < EXCLUDED_MAX {
            self.excluded.push((node, why));
        }
    }
}

impl fmt::Display for Ranking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "peer         total ms      rtt    queue     load  prefill   decode  why")?;
        for choice in &self.choices {
            let cost = &choice.cost;
            write!(f, "{:<10} {:>10.1}", choice.node.short(), cost.total_ms())?;
            for part in [cost.rtt_ms, cost.queue_ms, cost.load_ms, cost.prefill_ms, cost.decode_ms] {
                write!(f, " {part:>8.1}")?;
            }
            write!(f, "  {}", if choice.measured { "measured" } else { "declared" })?;
            if choice.cached_tokens > 0 {
                write!(f, ", {} tokens cached", choice.cached_tokens)?;
            }
            if choice.probe {
                f.write_str(", on probation")?;
            }
            if !choice.same_build {
                f.write_str(", another build")?;
            }
            writeln!(f)?;
        }
        for (node, why) in &self.excluded {
            let why = match why {
                Excluded::Tried => "has the request, or had it",
                Excluded::OtherModel => "serves another model",
                Excluded::Draining => "takes no new requests",
                Excluded::ContextTooSmall => "context too small",
                Excluded::Unfit(Admission::Broken { .. }) => "failed lately",
                Excluded::Unfit(Admission::Busy { .. }) => "busy",
                Excluded::Unfit(Admission::NoMemory { .. }) => "no memory",
                Excluded::Unfit(Admission::Yes | Admission::Probe) => "fit",
            };
            writeln!(f, "{:<10}          -  {why}", node.short())?;
        }
        Ok(())
    }
}

/// Ranks peers, and remembers what it needs for it.
#[derive(Debug, Default)]
pub struct Router {
    /// Which peers hold which prompts.
    pub prefixes: Prefixes,
    in_flight: BTreeMap<NodeId, u32>,
}

impl Router {
    /// Knows nothing yet.
    pub fn new() -> Self {
        Router::default()
    }

    /// A request is opened at `node`.
    pub fn begin(&mut self, node: NodeId, prefix: &PrefixChain) {
        *self.in_flight.entry(node).or_default() += 1;
        self.prefixes.note_sent(node, prefix);
    }

    /// A request that was opened at `node` has ended there, in whatever way.
    pub fn end(&mut self, node: NodeId) {
        if let Some(count) = self.in_flight.get_mut(&node) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.in_flight.remove(&node);
            }
        }
    }

    /// Ranks `candidates` for a request, without those in `tried`. Where nobody may be asked, those that failed lately may, if only
    /// their failure speaks against them and [`Admission::Broken`] has its last resort.
    pub fn choose<'a>(
        &self,
        request: &RequestFacts,
        candidates: impl IntoIterator<Item = Candidate<'a>>,
        health: &Health,
        tried: &[NodeId],
        now: Now,
    ) -> Ranking {
        let mut ranking = Ranking::default();
        let mut broken = Vec::new();
        for candidate in candidates {
            match self.judge(request, candidate, health, tried, now) {
                Ok(choice) => ranking.choices.push(choice),
                Err(Excluded::Unfit(why @ Admission::Broken { .. })) => broken.push((candidate, why)),
                Err(why) => ranking.exclude(candidate.node, why),
            }
        }
        let is_last_resort = ranking.choices.is_empty();
        for (candidate, why) in broken {
            match (why, self.predict(request, candidate, health)) {
                (Admission::Broken { last_resort, .. }, Ok(choice)) if is_last_resort && last_resort <= now => {
                    ranking.choices.push(Choice { probe: true, ..choice });
                }
                _ => ranking.exclude(candidate.node, Excluded::Unfit(why)),
            }
        }
        ranking.choices.sort_by_cached_key(|choice| {
            let tier = (choice.cost.total_ms().ln_1p() / TIE_FRACTION.ln_1p()) as u64;
            (!choice.same_build, tier, tie_break(request.salt, &choice.node))
        });
        ranking
    }

    fn judge(
        &self,
        request: &RequestFacts,
        candidate: Candidate<'_>,
        health: &Health,
        tried: &[NodeId],
        now: Now,
    ) -> Result<Choice, Excluded> {
        let Candidate { node, served } = candidate;
        if served.digest != request.model {
            return Err(Excluded::OtherModel);
        }
        if tried.contains(&node) {
            return Err(Excluded::Tried);
        }
        if served.context_tokens < request.context_tokens {
            return Err(Excluded::ContextTooSmall);
        }
        let admission = health.admission(&node, &request.model, now);
        match admission {
            Admission::Yes => self.predict(request, candidate, health),
            Admission::Probe => Ok(Choice { probe: true, ..self.predict(request, candidate, health)? }),
            Admission::Broken { .. } | Admission::Busy { .. } | Admission::NoMemory { .. } => {
                Err(Excluded::Unfit(admission))
            }
        }
    }

    fn predict(
        &self,
        request: &RequestFacts,
        Candidate { node, served }: Candidate<'_>,
        health: &Health,
    ) -> Result<Choice, Excluded> {
        let speed = health.speed(&node, &request.model);
        let declared_load_ms = (served.load_ms > 0).then_some(f64::from(served.load_ms));
        let load_ms = speed.load_ms.or(declared_load_ms).unwrap_or(LOAD_MS_UNKNOWN);
        let load_ms = match served.state {
            ModelState::Ready => 0.0,
            // How far it is nobody knows: half of it, on average.
            ModelState::Loading => load_ms / 2.0,
            ModelState::Available => load_ms,
            ModelState::Draining | ModelState::Unknown => return Err(Excluded::Draining),
        };
        let decode_ms_per_token =
            speed.decode_ms_per_token.or(declared_ms(served.decode_us_per_token)).unwrap_or(DECODE_MS_UNKNOWN);
        let prefill_ms_per_token =
            speed.prefill_ms_per_token.or(declared_ms(served.prefill_us_per_token)).unwrap_or(PREFILL_MS_UNKNOWN);
        let cached_tokens = self.prefixes.cached_tokens(&node, &request.prefix).min(request.prompt_tokens);
        let cost = Cost {
            rtt_ms: health.rtt_ms(&node).unwrap_or(RTT_MS_UNKNOWN),
            queue_ms: self.queue_ms(&node, served, decode_ms_per_token),
            load_ms,
            prefill_ms: f64::from(request.prompt_tokens - cached_tokens) * prefill_ms_per_token,
            decode_ms: f64::from(request.output_tokens) * decode_ms_per_token,
            decode_ms_per_token,
        };
        Ok(Choice {
            node,
            cost,
            cached_tokens,
            state: served.state,
            same_build: request.build.as_ref().is_none_or(|build| *build == served.build),
            probe: false,
            measured: speed.decode_ms_per_token.is_some(),
        })
    }

    /// A slot becomes free every so often, and everybody ahead takes one.
    fn queue_ms(&self, node: &NodeId, served: &ServedModel, decode_ms_per_token: f64) -> f64 {
        let parallel = served.parallel.max(1);
        let in_flight = self.in_flight.get(node).copied().unwrap_or(0);
        let known = served.running.saturating_add(served.queued).max(in_flight);
        let ahead = known.saturating_add(1).saturating_sub(parallel);
        f64::from(ahead) * QUEUED_TOKENS_TYPICAL * decode_ms_per_token / f64::from(parallel)
    }
}

/// Declared figures are whole microseconds, and 0 where the peer has none.
fn declared_ms(us_per_token: u32) -> Option<f64> {
    (us_per_token > 0).then(|| f64::from(us_per_token) / 1_000.0)
}

fn tie_break(salt: u64, node: &NodeId) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&salt.to_le_bytes()).update(node.as_bytes());
    *hasher.finalize().as_bytes()
}
