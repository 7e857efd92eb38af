//! The noise that makes sampling random: a pure function of (seed, position, token id).
//!
//! Drawing from `softmax(logits / T)` is the same as taking the largest of `logits + T * G`, with one independent
//! standard Gumbel variate `G` per token (the Gumbel-max trick; Gumbel 1954, Maddison, Tarlow & Minka 2014). Where `G`
//! comes from a counter instead of a stream, no state has to be carried: a request can move to another machine
//! and choose the same tokens, a third party can replay it, and a drafted token is right exactly when it is the
//! token that sampling would have chosen.
//!
//! The formula, which every implementation must follow bit for bit (all integers wrap at 64 bits; `mix` is the output
//! function of SplitMix64, Steele, Lea & Flood 2014; γ = `0x9E3779B97F4A7C15`, its increment):
//!
//! ```text
//! mix(z):  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
//!          z = (z ^ (z >> 27)) * 0x94D049BB133111EB
//!          z ^ (z >> 31)
//! key = mix(mix(seed + γ) + (position + 1) * 0xD1342543DE82EF95)
//! h   = mix(key + (token + 1) * γ)
//! u   = ((h >> 12) + 0.5) * 2^-52          exact in f64, never 0 and never 1
//! G   = -ln(-ln u)
//! ```
//!
//! So the tokens of one position are consecutive outputs of a SplitMix64 generator that starts at `key`. 52 bits and not 53:
//! with 53 the sum `(h >> 11) + 0.5` is not representable in the upper half, and the largest value would round to u = 1, G = ∞.

use murmur_protocol::sampling::Token;

/// SplitMix64's increment: 2^64 divided by the golden ratio, made odd.
pub(crate) const GAMMA: u64 = 0x9E37_79B9_7F4A_7C15;
/// Spreads positions before they are mixed; a different odd constant than [`GAMMA`], so that positions and tokens do not meet.
const POSITION_STRIDE: u64 = 0xD134_2543_DE82_EF95;

/// SplitMix64's output function: a bijection of 64 bits in which every input bit moves about half of the output bits.
#[inline(always)]
pub(crate) fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The noise of all tokens at one position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PositionNoise {
    key: u64,
}

impl PositionNoise {
    /// The noise for the token at absolute `position` (prompt included) of a request with this `seed`.
    pub fn new(seed: u64, position: u32) -> PositionNoise {
        let seeded = mix(seed.wrapping_add(GAMMA));
        let stride = (u64::from(position) + 1).wrapping_mul(POSITION_STRIDE);
        PositionNoise { key: mix(seeded.wrapping_add(stride)) }
    }

    /// Where the generator of this position stands before token 0.
    #[inline(always)]
    pub(crate) fn key(self) -> u64 {
        self.key
    }

    /// 64 uniform bits for the token with this id.
    #[inline(always)]
    pub fn bits(self, token: u32) -> u64 {
        mix(self.key.wrapping_add((u64::from(token) + 1).wrapping_mul(GAMMA)))
    }

    /// A uniform number strictly between 0 and 1.
    pub fn uniform(self, token: u32) -> f64 {
        uniform_of(self.bits(token))
    }

    /// A standard Gumbel variate: mean 0.5772, never infinite, at most [`GUMBEL_MAX`].
    pub fn gumbel(self, token: u32) -> f64 {
        gumbel_of(self.bits(token))
    }
}

/// The Gumbel variate of (seed, position, token): what a validator recomputes.
pub fn gumbel(seed: u64, position: u32, token: Token) -> f64 {
    PositionNoise::new(seed, position).gumbel(token as u32)
}

/// No variate exceeds this: u <= 1 - 2^-53, so G <= 53 ln 2, and a little for rounding.
pub const GUMBEL_MAX: f64 = 36.737;

fn uniform_of(bits: u64) -> f64 {
    const STEP: f64 = 1.0 / (1u64 << 52) as f64;
    ((bits >> 12) as f64 + 0.5) * STEP
}

pub(crate) fn gumbel_of(bits: u64) -> f64 {
    -libm::log(-libm::log(uniform_of(bits)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_extremes_of_the_hash_give_finite_noise() {
        assert_eq!(uniform_of(0), 0.5 / (1u64 << 52) as f64);
        assert_eq!(uniform_of(u64::MAX), 1.0 - f64::EPSILON / 2.0);
        assert!(gumbel_of(0) > -3.7 && gumbel_of(0) < -3.5);
        assert!(gumbel_of(u64::MAX) < GUMBEL_MAX && gumbel_of(u64::MAX) > GUMBEL_MAX - 0.001);
    }

    #[test]
    fn mixing_is_splitmix64() {
        // The first outputs of the published generator from state 0.
        assert_eq!(mix(GAMMA), 0xE220_A839_7B1D_CDAF);
        assert_eq!(mix(GAMMA.wrapping_mul(2)), 0x6E78_9E6A_A1B9_65F4);
        assert_eq!(mix(GAMMA.wrapping_mul(3)), 0x06C4_5D18_8009_454F);
    }
}
