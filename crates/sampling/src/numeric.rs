//! The arithmetic over a whole vocabulary: maximum, validity, softmax mass.
//!
//! Written in independent lanes, so that the compiler vectorises it, and in plain IEEE operations of a fixed order, so that every
//! platform gets the same bits.

/// Independent accumulators: as many f32 as the widest common vector register holds.
pub(crate) const LANES: usize = 16;

/// The largest logit, or `None` if some logit is NaN or +∞ (−∞ is a banned token). −∞ when there are none.
pub(crate) fn max_logit(logits: &[f32]) -> Option<f32> {
    let mut best = [f32::NEG_INFINITY; LANES];
    let mut invalid = [false; LANES];
    let (chunks, rest) = logits.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            let logit = chunk[lane];
            best[lane] = if logit > best[lane] { logit } else { best[lane] };
            invalid[lane] |= is_broken(logit);
        }
    }
    let mut max = best.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut bad = invalid.contains(&true);
    for &logit in rest {
        max = if logit > max { logit } else { max };
        bad |= is_broken(logit);
    }
    (!bad).then_some(max)
}

/// NaN or +∞: what no model means.
#[inline(always)]
pub(crate) fn is_broken(logit: f32) -> bool {
    logit.is_nan() | (logit == f32::INFINITY)
}

/// Σ exp(logit − max), in f64. `max` must be finite and the largest.
pub(crate) fn mass(logits: &[f32], max: f32) -> f64 {
    let mut sums = [0f64; LANES];
    let (chunks, rest) = logits.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            sums[lane] += f64::from(exp(chunk[lane] - max));
        }
    }
    let mut total: f64 = sums.iter().sum();
    for &logit in rest {
        total += f64::from(exp(logit - max));
    }
    total
}

/// exp(x) for x <= 0 to about one unit in the last place of f32; 0 below −87 (where the result leaves the normal numbers).
///
/// Range reduction to x = n ln 2 + r with |r| <= ln 2 / 2, then the Taylor series, whose eighth term is below half an ulp.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    /// Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    /// ln 2 in two parts: the first has few enough bits that n * LN2_HIGH is exact.
    const LN2_HIGH: f32 = 355.0 / 512.0;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    const UNDERFLOW: f32 = -87.0;

    let clamped = if x > UNDERFLOW { x } else { UNDERFLOW };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = clamped - n * LN2_HIGH - n * LN2_LOW;
    let mut series = 1.0 / 5040.0;
    series = series * r + 1.0 / 720.0;
    series = series * r + 1.0 / 120.0;
    series = series * r + 1.0 / 24.0;
    series = series * r + 1.0 / 6.0;
    series = series * r + 0.5;
    series = series * r + 1.0;
    series = series * r + 1.0;
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127);
    let value = series * f32::from_bits(exponent << 23);
    if x > UNDERFLOW { value } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_is_within_two_units_in_the_last_place() {
        let mut x = 0.0f32;
        while x > -86.9 {
            let (ours, exact) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((ours - exact).abs() <= exact * 2.4e-7, "exp({x}) = {ours}, not {exact}");
            x -= 0.000_97;
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-87.5), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(f32::MIN), 0.0);
    }

    #[test]
    fn the_maximum_refuses_nan_and_positive_infinity_wherever_they_are() {
        for length in [1, 15, 16, 17, 64, 100] {
            let logits: Vec<f32> = (0..length).map(|i| -(i as f32)).rev().collect();
            assert_eq!(max_logit(&logits), Some(0.0));
            for at in 0..length {
                for bad in [f32::NAN, f32::INFINITY] {
                    let mut spoilt = logits.clone();
                    spoilt[at] = bad;
                    assert_eq!(max_logit(&spoilt), None);
                }
            }
        }
        assert_eq!(max_logit(&[]), Some(f32::NEG_INFINITY));
        assert_eq!(max_logit(&[f32::NEG_INFINITY; 40]), Some(f32::NEG_INFINITY));
    }
}
