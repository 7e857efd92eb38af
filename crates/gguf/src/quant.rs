//! Packs floats into ggml's block formats, and makes random blocks of the formats whose quantisers are a search.
//!
//! F16, Q8_0 and Q4_0 are quantised as `ggml-quants.c` does (`quantize_row_*_ref`). Q4_K and Q6_K blocks are random: a
//! random model needs plausible weights, not the best fit to some others. Layouts are those of `ggml-common.h`.

use crate::synth::rng::Rng;

/// Elements of a K-quant block.
pub(crate) const SUPER_BLOCK: usize = 256;

/// IEEE half precision, rounded to nearest even; what is too large becomes infinite.
pub fn f16_from_f32(x: f32) -> u16 {
    let bits = x.to_bits();
    let sign = ((bits >> 16) & 0x8000) as u16;
    let magnitude = bits & 0x7fff_ffff;
    if magnitude > 0x7f80_0000 {
        return sign | 0x7e00;
    }
    if magnitude >= 0x4780_0000 {
        return sign | 0x7c00;
    }
    if magnitude < 0x3880_0000 {
        // Subnormal: in units of 2^-24. Adding 0.5 makes the hardware round the low bits away, to nearest even.
        let rounded = f32::from_bits(magnitude) + 0.5;
        return sign | (rounded.to_bits() - 0.5f32.to_bits()) as u16;
    }
    // The carry of the rounding may run into the exponent, which is then right as well.
    let odd = (magnitude >> 13) & 1;
    let rounded = magnitude - (112 << 23) + 0xfff + odd;
    sign | (rounded >> 13) as u16
}

/// Exact value of an IEEE half.
pub fn f16_to_f32(half: u16) -> f32 {
    let sign = u32::from(half & 0x8000) << 16;
    let exponent = u32::from(half >> 10) & 0x1f;
    let fraction = u32::from(half & 0x3ff);
    match exponent {
        0 => f32::from_bits(sign | (fraction as f32 * 2f32.powi(-24)).to_bits()),
        31 => f32::from_bits(sign | 0x7f80_0000 | fraction << 13),
        _ => f32::from_bits(sign | (exponent + 112) << 23 | fraction << 13),
    }
}

/// Blocks of 32: f16 scale, 32 signed bytes. `data` must be whole blocks.
pub fn q8_0(data: &[f32], out: &mut Vec<u8>) {
    for block in data.as_chunks::<32>().0 {
        let largest = block.iter().fold(0f32, |m, x| m.max(x.abs()));
        let scale = largest / 127.0;
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        out.extend(f16_from_f32(scale).to_le_bytes());
        out.extend(block.iter().map(|x| (x * inverse).round() as i8 as u8));
    }
}

/// Blocks of 32: f16 scale, 32 nibbles with an offset of 8; low nibbles hold the first half. `data` must be whole blocks.
pub fn q4_0(data: &[f32], out: &mut Vec<u8>) {
    for block in data.as_chunks::<32>().0 {
        // The value of largest magnitude becomes -8, the end of the scale that reaches furthest.
        let extreme = block.iter().fold(0f32, |m, &x| if x.abs() > m.abs() { x } else { m });
        let scale = extreme / -8.0;
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        out.extend(f16_from_f32(scale).to_le_bytes());
        let nibble = |x: f32| ((x * inverse + 8.5) as i32).clamp(0, 15) as u8;
        let (low, high) = block.split_at(16);
        out.extend(low.iter().zip(high).map(|(&a, &b)| nibble(a) | nibble(b) << 4));
    }
}

/// One random Q4_K block whose weights have mean zero and this standard deviation.
///
/// Weight = `d * s * q - dmin * m` with q uniform in 0..=15. Taking m = s and dmin = 7.5 d centres it.
pub(crate) fn random_q4_k(rng: &mut Rng, std: f32, out: &mut Vec<u8>) {
    // rms of q - 7.5 is 4.61; rms of scales uniform in 32..=63 is 48.4.
    let d = std / (4.61 * 48.4);
    out.extend(f16_from_f32(d).to_le_bytes());
    out.extend(f16_from_f32(f16_to_f32(f16_from_f32(d)) * 7.5).to_le_bytes());
    let random = rng.next_u64();
    let s: [u8; 8] = std::array::from_fn(|j| 32 + ((random >> (5 * j)) & 31) as u8);
    // Twelve bytes hold 8 scales and 8 minima of 6 bits: the first four whole, the others split four and two.
    let mut packed = [0u8; 12];
    for j in 0..4 {
        packed[j] = s[j] | (s[j + 4] >> 4) << 6;
        packed[j + 4] = packed[j];
        packed[j + 8] = (s[j + 4] & 15) | (s[j + 4] & 15) << 4;
    }
    out.extend(packed);
    rng.extend(out, SUPER_BLOCK / 2);
}

/// One random Q6_K block whose weights have mean zero and this standard deviation.
///
/// Weight = `d * s * (q - 32)` with q uniform in 0..=63; scales of either sign keep the mean at zero.
pub(crate) fn random_q6_k(rng: &mut Rng, std: f32, out: &mut Vec<u8>) {
    // 128 bytes of low nibbles, 64 of high bit pairs: any bits are valid.
    rng.extend(out, SUPER_BLOCK / 2 + SUPER_BLOCK / 4);
    let mut random = [0u64; 2];
    random.fill_with(|| rng.next_u64());
    for j in 0..16 {
        let byte = (random[j / 8] >> (8 * (j % 8))) as u8;
        let magnitude = (64 + (byte & 63)) as i8;
        out.push(if byte & 128 == 0 { magnitude } else { -magnitude } as u8);
    }
    // rms of q - 32 is 18.5; rms of magnitudes uniform in 64..=127 is 97.
    out.extend(f16_from_f32(std / (18.5 * 97.0)).to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_survives_the_way_through_single_precision() {
        for half in 0..=u16::MAX {
            let x = f16_to_f32(half);
            if x.is_nan() {
                assert!(f16_to_f32(f16_from_f32(x)).is_nan());
            } else {
                assert_eq!(f16_from_f32(x), half, "{x}");
            }
        }
    }

    #[test]
    fn halves_round_to_nearest_even() {
        assert_eq!(f16_from_f32(1.0), 0x3c00);
        assert_eq!(f16_from_f32(65504.0), 0x7bff);
        assert_eq!(f16_from_f32(65520.0), 0x7c00);
        // Halfway between 1 and the next half, and between that and the one after.
        assert_eq!(f16_from_f32(1.0 + 2f32.powi(-11)), 0x3c00);
        assert_eq!(f16_from_f32(1.0 + 3.0 * 2f32.powi(-11)), 0x3c02);
        assert_eq!(f16_from_f32(2f32.powi(-24)), 1);
        assert_eq!(f16_from_f32(2f32.powi(-26)), 0);
    }

    fn sample(n: usize) -> Vec<f32> {
        let mut rng = Rng::new(7, "sample");
        (0..n).map(|_| rng.gaussian() * 0.02).collect()
    }

    #[test]
    fn q8_0_is_within_half_a_step() {
        let data = sample(64);
        let mut packed = Vec::new();
        q8_0(&data, &mut packed);
        assert_eq!(packed.len(), 2 * 34);
        for (block, bytes) in data.chunks(32).zip(packed.chunks(34)) {
            let d = f16_to_f32(u16::from_le_bytes([bytes[0], bytes[1]]));
            for (x, &q) in block.iter().zip(&bytes[2..]) {
                assert!((x - d * f32::from(q as i8)).abs() <= d * 0.51 + 127.0 * d * 0.001);
            }
        }
    }

    #[test]
    fn q4_0_is_within_a_step() {
        let data = sample(64);
        let mut packed = Vec::new();
        q4_0(&data, &mut packed);
        assert_eq!(packed.len(), 2 * 18);
        for (block, bytes) in data.chunks(32).zip(packed.chunks(18)) {
            let d = f16_to_f32(u16::from_le_bytes([bytes[0], bytes[1]]));
            for (i, x) in block.iter().enumerate() {
                let nibble = if i < 16 { bytes[2 + i] & 15 } else { bytes[2 + i - 16] >> 4 };
                assert!((x - d * (f32::from(nibble) - 8.0)).abs() <= d.abs() * 1.01);
            }
        }
    }

    fn moments(weights: &[f32]) -> (f32, f32) {
        let n = weights.len() as f32;
        let mean = weights.iter().sum::<f32>() / n;
        (mean, (weights.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / n).sqrt())
    }

    #[test]
    fn random_k_quant_blocks_have_the_asked_spread() {
        let mut rng = Rng::new(1, "blocks");
        let (mut q4, mut q6) = (Vec::new(), Vec::new());
        for _ in 0..64 {
            let mut block = Vec::new();
            random_q4_k(&mut rng, 0.02, &mut block);
            assert_eq!(block.len(), 144);
            let d = f16_to_f32(u16::from_le_bytes([block[0], block[1]]));
            let dmin = f16_to_f32(u16::from_le_bytes([block[2], block[3]]));
            let scales = &block[4..16];
            for j in 0..8 {
                // get_scale_min_k4 of ggml-quants.c.
                let (s, m) = if j < 4 {
                    (scales[j] & 63, scales[j + 4] & 63)
                } else {
                    (scales[j + 4] & 15 | scales[j - 4] >> 6 << 4, scales[j + 4] >> 4 | scales[j] >> 6 << 4)
                };
                assert_eq!(s, m);
                assert!((32..64).contains(&s));
                for byte in &block[16 + j / 2 * 32..16 + j / 2 * 32 + 32] {
                    let q = if j % 2 == 0 { byte & 15 } else { byte >> 4 };
                    q4.push(d * f32::from(s) * f32::from(q) - dmin * f32::from(m));
                }
            }
            let mut block = Vec::new();
            random_q6_k(&mut rng, 0.02, &mut block);
            assert_eq!(block.len(), 210);
            let d = f16_to_f32(u16::from_le_bytes([block[208], block[209]]));
            for i in 0..256 {
                let low =
                    if i % 128 < 64 { block[i / 128 * 64 + i % 64] & 15 } else { block[i / 128 * 64 + i % 64] >> 4 };
                let high = block[128 + i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
                let scale = block[192 + i / 16] as i8;
                q6.push(d * f32::from(scale) * (f32::from(low | high << 4) - 32.0));
            }
        }
        for weights in [q4, q6] {
            let (mean, std) = moments(&weights);
            assert!(mean.abs() < 0.001, "{mean}");
            assert!((std - 0.02).abs() < 0.001, "{std}");
        }
    }
}
