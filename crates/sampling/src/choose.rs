//! The choice itself: the largest logit, or the largest logit + T * G.
//!
//! By definition every kept token's Gumbel variate costs a hash and two logarithms, 3 ms for a vocabulary of 150,000. But a token can only
//! win if its variate makes up for what its logit lacks, and a variate has a bound that costs no logarithm: with w = 1 − u,
//! −ln u >= w, so G <= −ln w = −log2(w) ln 2; and the bits of a float, read as an integer, are its logarithm
//! interpolated linearly between powers of two, which lies below the true one. Only tokens whose bound reaches the best
//! score so far, a few dozen, are scored exactly. The result is the definition's, bit for bit.

use crate::filters::Candidate;
use crate::noise::{GAMMA, PositionNoise, gumbel_of, mix};

/// Tokens that are tested together: enough for the compiler to vectorise the test.
const CHUNK: usize = 32;

/// The first token whose logit is `max`.
pub(crate) fn greedy(logits: &[f32], max: f32) -> u32 {
    logits.iter().position(|logit| *logit == max).unwrap_or(0) as u32
}

/// The candidate with the largest logit; of equal ones the lowest id.
pub(crate) fn greedy_among(candidates: &[Candidate]) -> Option<u32> {
    candidates.iter().min_by(|a, b| a.by_logit(b)).map(|best| best.token)
}

/// argmax over all tokens of logit + T * G; ties to the lower id. `max`: the largest logit, finite; `temperature` > 0.
pub(crate) fn gumbel(logits: &[f32], max: f32, noise: PositionNoise, temperature: f32) -> u32 {
    let mut race = Race::new(noise, temperature);
    // The most probable token's score is a good bar to begin with.
    race.enter(max, greedy(logits, max));
    let (chunks, rest) = logits.as_chunks::<CHUNK>();
    let mut first = 0u32;
    for chunk in chunks {
        if race.some_may_win(chunk, first) {
            for (offset, &logit) in chunk.iter().enumerate() {
                race.enter_if_it_may_win(logit, first + offset as u32);
            }
        }
        first += CHUNK as u32;
    }
    for (offset, &logit) in rest.iter().enumerate() {
        race.enter_if_it_may_win(logit, first + offset as u32);
    }
    race.winner
}

/// [`gumbel`] over some tokens only. `None` if there are none.
pub(crate) fn gumbel_among(candidates: &[Candidate], noise: PositionNoise, temperature: f32) -> Option<u32> {
    let first = candidates.first()?;
    let mut race = Race::new(noise, temperature);
    race.enter(first.logit, first.token);
    for candidate in candidates {
        race.enter_if_it_may_win(candidate.logit, candidate.token);
    }
    Some(race.winner)
}

struct Race {
    noise: PositionNoise,
    temperature: f64,
    /// The bound of T * G is `ceiling - slope * bits of the float`.
    ceiling: f32,
    slope: f32,
    best: f64,
    winner: u32,
    /// A token whose bound is below this cannot win, whatever f32 rounded away.
    bar: f32,
}

impl Race {
    fn new(noise: PositionNoise, temperature: f32) -> Race {
        /// log2 of the float whose bits, as an integer, are x is at least x * 2^-23 − 127; the 31 bits are a fraction of 2^31.
        const EXPONENT_BIAS: f32 = 127.0 + 31.0;
        let unit = temperature * std::f32::consts::LN_2;
        Race {
            noise,
            temperature: f64::from(temperature),
            ceiling: unit * EXPONENT_BIAS,
            slope: unit / (1u32 << 23) as f32,
            best: f64::NEG_INFINITY,
            winner: 0,
            bar: f32::NEG_INFINITY,
        }
    }

    /// At least logit + T * G, up to the rounding that [`Race::bar`] allows for.
    #[inline(always)]
    fn bound(&self, logit: f32, bits: u64) -> f32 {
        // The leading 31 bits of w = 1 − u, rounded down (31: what converts to f32 as a signed integer, which vector units do).
        let w = (!bits >> 33) as i32 as f32;
        logit + (self.ceiling - self.slope * w.to_bits() as i32 as f32)
    }

    #[inline(always)]
    fn some_may_win(&self, chunk: &[f32; CHUNK], first: u32) -> bool {
        let start = self.noise.key().wrapping_add((u64::from(first) + 1).wrapping_mul(GAMMA));
        let mut may_win = false;
        for (offset, &logit) in chunk.iter().enumerate() {
            let bits = mix(start.wrapping_add((offset as u64).wrapping_mul(GAMMA)));
            may_win |= self.bound(logit, bits) >= self.bar;
        }
        may_win
    }

    #[inline]
    fn enter_if_it_may_win(&mut self, logit: f32, token: u32) {
        // A banned token's bound is −∞, and so may the bar be.
        if logit > f32::NEG_INFINITY && self.bound(logit, self.noise.bits(token)) >= self.bar {
            self.enter(logit, token);
        }
    }

    fn enter(&mut self, logit: f32, token: u32) {
        let score = f64::from(logit) + self.temperature * gumbel_of(self.noise.bits(token));
        if score > self.best || (score == self.best && token < self.winner) {
            self.best = score;
            self.winner = token;
            // The bound is a sum of three f32 terms; near the bar none exceeds |best| + 160 T.
            let slack = 1e-3 * self.temperature + 1e-6 * score.abs();
            self.bar = (score - slack) as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition, without any shortcut.
    fn naive(logits: &[f32], noise: PositionNoise, temperature: f32) -> u32 {
        let mut best = (f64::NEG_INFINITY, 0);
        for (token, &logit) in logits.iter().enumerate() {
            let score = f64::from(logit) + f64::from(temperature) * noise.gumbel(token as u32);
            if score > best.0 {
                best = (score, token as u32);
            }
        }
        best.1
    }

    fn max_of(logits: &[f32]) -> f32 {
        logits.iter().copied().fold(f32::NEG_INFINITY, f32::max)
    }

    fn logit() -> impl Strategy<Value = f32> {
        prop_oneof![
            8 => -30.0f32..30.0,
            2 => Just(0.0f32),
            1 => Just(f32::NEG_INFINITY),
            1 => -1e6f32..1e6,
            1 => prop_oneof![Just(f32::MAX), Just(f32::MIN), Just(-0.0f32), Just(1e-40f32)],
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn the_fast_choice_is_the_definition(
            logits in prop::collection::vec(logit(), 1..200),
            seed: u64,
            position: u32,
            temperature in prop_oneof![0.01f32..3.0, Just(1.0f32), Just(100.0f32), Just(1e-40f32)],
        ) {
            let max = max_of(&logits);
            prop_assume!(max > f32::NEG_INFINITY);
            let noise = PositionNoise::new(seed, position);
            let expected = naive(&logits, noise, temperature);
            prop_assert_eq!(gumbel(&logits, max, noise, temperature), expected);
            let mut candidates: Vec<Candidate> = logits
                .iter()
                .enumerate()
                .filter(|(_, logit)| **logit > f32::NEG_INFINITY)
                .map(|(token, logit)| Candidate { token: token as u32, logit: *logit })
                .collect();
            candidates.reverse();
            prop_assert_eq!(gumbel_among(&candidates, noise, temperature), Some(expected));
        }
    }

    #[test]
    fn the_fast_choice_is_the_definition_on_a_whole_vocabulary() {
        for position in 0..40u32 {
            let spread = [0.0, 0.1, 1.0, 3.0][position as usize % 4];
            let logits: Vec<f32> = (0..50_001u64)
                .map(|i| spread * (mix(i ^ u64::from(position) << 32) >> 40) as f32 / (1u32 << 22) as f32)
                .collect();
            let noise = PositionNoise::new(7, position);
            assert_eq!(gumbel(&logits, max_of(&logits), noise, 0.8), naive(&logits, noise, 0.8));
        }
    }

    #[test]
    fn the_bound_holds_for_extreme_bits() {
        let mut race = Race::new(PositionNoise::new(0, 0), 1.0);
        race.bar = 0.0;
        for low in [0, 1, 0xFFF, 0x1000, u64::MAX >> 12] {
            for shift in 0..64 {
                for bits in [(!0u64 << shift) | (low & ((1 << shift) - 1)), low, !low, !(1u64 << shift)] {
                    let (bound, exact) = (f64::from(race.bound(0.0, bits)), gumbel_of(bits));
                    assert!(bound + 1e-4 >= exact, "{bits:#x}: {bound} < {exact}");
                }
            }
        }
    }
}
