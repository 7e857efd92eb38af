//! Which tokens stay in the race: top-k, typical-p, top-p, min-p, in the order of llama.cpp's samplers.
//!
//! Each filter sees what the one before it kept. Probabilities are always those at temperature 1, renormalised over the tokens
//! that are still there: temperature comes after the filters and changes the choice among the kept tokens, never which are kept.
//!
//! - top-k: the k largest logits.
//! - typical-p (Meister et al. 2022): tokens in the order of |−ln p − H|, H being the entropy, until their probabilities exceed `typical_p`.
//! - top-p (Holtzman et al. 2020): tokens in the order of their probability until the sum reaches `top_p`; at least one.
//! - min-p (Nguyen et al. 2024): tokens with p >= min_p * (largest p).
//!
//! Equal tokens are ordered by id, so that what is kept does not depend on how it was found. Nothing sorts a whole vocabulary:
//! prefixes of an order are found by selection, piece by piece.

use std::cmp::Ordering;

use murmur_protocol::sampling::SamplingParams;

use crate::numeric::{LANES, exp, mass};

/// A token that is still in the race. Its logit is finite.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Candidate {
    pub(crate) token: u32,
    pub(crate) logit: f32,
}

impl Candidate {
    /// Largest logit first, then lowest id.
    #[inline]
    pub(crate) fn by_logit(&self, other: &Candidate) -> Ordering {
        let logits = other.logit.partial_cmp(&self.logit).unwrap_or(Ordering::Equal);
        logits.then(self.token.cmp(&other.token))
    }
}

/// Whether any filter is on for a vocabulary of this size.
pub(crate) fn any(params: &SamplingParams, tokens: usize) -> bool {
    top_k_of(params, tokens).is_some() || params.typical_p < 1.0 || params.top_p < 1.0 || params.min_p > 0.0
}

fn top_k_of(params: &SamplingParams, tokens: usize) -> Option<usize> {
    let k = params.top_k as usize;
    (k > 0 && k < tokens).then_some(k)
}

/// Puts the tokens that pass all filters into `kept`, in no particular order. `max`: the largest logit, finite. At least one token passes.
pub(crate) fn apply(params: &SamplingParams, logits: &[f32], max: f32, kept: &mut Vec<Candidate>) {
    // Until the first filter that is on, everything is kept, and `kept` is not filled.
    let mut everything = true;
    if let Some(k) = top_k_of(params, logits.len()) {
        top_k(logits, k, kept);
        everything = false;
    }
    if params.typical_p < 1.0 {
        if everything {
            gather(logits, f32::MIN, kept);
            everything = false;
        }
        typical(kept, params.typical_p);
    }
    if params.top_p < 1.0 {
        if everything {
            top_p_of_all(logits, max, params.top_p, kept);
            everything = false;
        } else {
            let largest = largest_logit(kept);
            let total = kept.iter().map(|candidate| weight(candidate.logit, largest)).sum();
            top_p(kept, largest, total, params.top_p);
        }
    }
    if params.min_p > 0.0 {
        let largest = if everything { max } else { largest_logit(kept) };
        let least = f64::from(largest) + libm::log(f64::from(params.min_p));
        if everything {
            // Rounding may only let more through: the exact test follows.
            gather(logits, (least as f32).next_down(), kept);
        }
        kept.retain(|candidate| f64::from(candidate.logit) >= least);
    }
}

/// The k largest logits, best first. Banned tokens (−∞) are left out.
pub(crate) fn top_k(logits: &[f32], k: usize, kept: &mut Vec<Candidate>) {
    /// Selecting is worth it when so many have gathered.
    const BATCH_MIN: usize = 256;
    kept.clear();
    if k == 0 {
        return;
    }
    let batch = k.saturating_mul(2).max(BATCH_MIN);
    let mut bar = f32::NEG_INFINITY;
    let mut first = 0u32;
    for chunk in logits.chunks(2 * LANES) {
        if chunk.iter().fold(false, |any, logit| any | (*logit > bar)) {
            for (offset, &logit) in chunk.iter().enumerate() {
                // Not >=: what is already here has lower ids.
                if logit > bar {
                    kept.push(Candidate { token: first + offset as u32, logit });
                }
            }
            if kept.len() >= batch {
                let (_, least, _) = kept.select_nth_unstable_by(k - 1, Candidate::by_logit);
                bar = least.logit;
                kept.truncate(k);
            }
        }
        first += 2 * LANES as u32;
    }
    if kept.len() > k {
        kept.select_nth_unstable_by(k - 1, Candidate::by_logit);
        kept.truncate(k);
    }
    kept.sort_unstable_by(Candidate::by_logit);
}

/// All tokens whose logit is at least `least`, which is finite.
fn gather(logits: &[f32], least: f32, kept: &mut Vec<Candidate>) {
    kept.clear();
    let least = least.max(f32::MIN);
    let mut first = 0u32;
    for chunk in logits.chunks(2 * LANES) {
        if chunk.iter().fold(false, |any, logit| any | (*logit >= least)) {
            for (offset, &logit) in chunk.iter().enumerate() {
                if logit >= least {
                    kept.push(Candidate { token: first + offset as u32, logit });
                }
            }
        }
        first += 2 * LANES as u32;
    }
}

fn largest_logit(candidates: &[Candidate]) -> f32 {
    candidates.iter().map(|candidate| candidate.logit).fold(f32::MIN, f32::max)
}

/// A token's probability times a constant.
fn weight(logit: f32, largest: f32) -> f64 {
    f64::from(exp(logit - largest))
}

fn top_p(kept: &mut Vec<Candidate>, largest: f32, total: f64, p: f32) {
    let target = f64::from(p) * total;
    keep_prefix(kept, Candidate::by_logit, |candidate| weight(candidate.logit, largest), |sum| sum >= target);
}

/// Top-p over a vocabulary: few tokens hold most of the probability, so only those near the best are gathered and ordered.
fn top_p_of_all(logits: &[f32], max: f32, p: f32, kept: &mut Vec<Candidate>) {
    /// How far below the best logit to look at first; doubled until the tokens found hold enough.
    const FIRST_DEPTH: f32 = 4.0;
    /// exp() is 0 below this.
    const DEPTH_MAX: f32 = 100.0;
    /// The order of summation may cost this much.
    const ENOUGH: f64 = 1.0 + 1e-9;
    let total = mass(logits, max);
    let target = f64::from(p) * total;
    let mut depth = FIRST_DEPTH;
    while depth < DEPTH_MAX {
        gather(logits, max - depth, kept);
        let found: f64 = kept.iter().map(|candidate| weight(candidate.logit, max)).sum();
        if found >= target * ENOUGH {
            return top_p(kept, max, total, p);
        }
        depth *= 2.0;
    }
    gather(logits, f32::MIN, kept);
    top_p(kept, max, total, p);
}

fn typical(kept: &mut Vec<Candidate>, p: f32) {
    let largest = f64::from(largest_logit(kept));
    let weight_of = |candidate: &Candidate| weight(candidate.logit, largest as f32);
    let total: f64 = kept.iter().map(weight_of).sum();
    let log_total = libm::log(total);
    let surprise = |candidate: &Candidate| log_total - (f64::from(candidate.logit) - largest);
    let entropy: f64 = kept
        .iter()
        .map(|candidate| match weight_of(candidate) {
            // 0 ln 0 is 0, also where the surprise is too large to multiply.
            0.0 => 0.0,
            weight => weight / total * surprise(candidate),
        })
        .sum();
    let distance = |candidate: &Candidate| (surprise(candidate) - entropy).abs();
    let target = f64::from(p) * total;
    let order = |a: &Candidate, b: &Candidate| {
        let distances = distance(a).partial_cmp(&distance(b)).unwrap_or(Ordering::Equal);
        distances.then(a.token.cmp(&b.token))
    };
    keep_prefix(kept, order, weight_of, |sum| sum > target);
}

/// Keeps the shortest beginning, in this order, whose summed weights are enough; everything if none is. At least one token stays.
fn keep_prefix(
    kept: &mut Vec<Candidate>,
    order: impl Fn(&Candidate, &Candidate) -> Ordering,
    weight: impl Fn(&Candidate) -> f64,
    enough: impl Fn(f64) -> bool,
) {
    /// How many to order first; eight times as many each further time.
    const FIRST_PIECE: usize = 64;
    let mut sum = 0.0;
    let mut ordered = 0;
    let mut piece = FIRST_PIECE;
    while ordered < kept.len() {
        let end = kept.len().min(ordered.saturating_add(piece));
        if end < kept.len() {
            kept[ordered..].select_nth_unstable_by(end - ordered - 1, &order);
        }
        kept[ordered..end].sort_unstable_by(&order);
        for index in ordered..end {
            sum += weight(&kept[index]);
            if enough(sum) {
                kept.truncate(index + 1);
                return;
            }
        }
        ordered = end;
        piece *= 8;
    }
}
