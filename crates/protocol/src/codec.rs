//! How hidden states travel between two stages: as they are, or smaller and not quite the same.
//!
//! | codec | bytes of a row of `n` values | a value comes back as |
//! |---|---|---|
//! | f32 | 4n | itself |
//! | f16 | 2n | the nearest IEEE 754 half, at most 65,504 in magnitude |
//! | q8 | n + 2 for each 32 | a multiple of its block's scale, 1/127 of the block's largest magnitude, as `Q8_0` in llama.cpp |
//!
//! Equal values give equal bytes: rows that are sent again arrive as they did the first time.

use half::{f16, slice::HalfFloatSliceExt};

/// Values that share a scale in [`Codec::Q8`].
const BLOCK: usize = 32;

/// How hidden states travel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[repr(u8)]
pub enum Codec {
    /// 32-bit floats: exact.
    #[default]
    F32 = 0,
    /// Half precision.
    F16 = 1,
    /// Blocks of 32 8-bit integers with a half-precision scale.
    Q8 = 2,
}

impl Codec {
    /// Every codec, the exact one first.
    pub const ALL: [Codec; 3] = [Codec::F32, Codec::F16, Codec::Q8];

    /// The codec with this number in a frame's header.
    pub(crate) fn parse(byte: u8) -> Option<Codec> {
        Codec::ALL.into_iter().find(|codec| *codec as u8 == byte)
    }

    /// In one word, for people and programs.
    pub const fn name(self) -> &'static str {
        match self {
            Codec::F32 => "f32",
            Codec::F16 => "f16",
            Codec::Q8 => "q8",
        }
    }

    /// Bytes of one row of `width` values.
    pub const fn row_bytes(self, width: usize) -> usize {
        match self {
            Codec::F32 => 4 * width,
            Codec::F16 => 2 * width,
            Codec::Q8 => width + 2 * width.div_ceil(BLOCK),
        }
    }

    /// Appends `rows`, each of `width` values, to `out`.
    pub fn encode(self, rows: &[f32], width: usize, out: &mut Vec<u8>) {
        match self {
            Codec::F32 => out.extend_from_slice(bytemuck::cast_slice(rows)),
            Codec::F16 => {
                let mut halves = vec![f16::ZERO; rows.len()];
                halves.convert_from_f32_slice(rows);
                let finite = |half: &f16| if half.is_infinite() { f16::MAX.copysign(*half) } else { *half };
                out.extend(halves.iter().flat_map(|half| finite(half).to_le_bytes()));
            }
            Codec::Q8 => rows.chunks(width).flat_map(|row| row.chunks(BLOCK)).for_each(|block| {
                let largest = block.iter().fold(0f32, |largest, value| largest.max(value.abs()));
                let scale = f16::from_f32(largest / 127.0).min(f16::MAX);
                let inverse = if scale > f16::ZERO { 1.0 / scale.to_f32() } else { 0.0 };
                out.extend_from_slice(&scale.to_le_bytes());
                // A conversion saturates, and takes what is no number for zero.
                out.extend(block.iter().map(|value| (value * inverse).round() as i8 as u8));
            }),
        }
    }

    /// The values of `bytes`, rows of `width` values each; `None` unless it is a whole number of rows.
    pub fn decode(self, bytes: &[u8], width: usize) -> Option<Vec<f32>> {
        let row_bytes = self.row_bytes(width);
        if row_bytes == 0 || !bytes.len().is_multiple_of(row_bytes) {
            return None;
        }
        let half_at = |bytes: &[u8]| f16::from_le_bytes([bytes[0], bytes[1]]);
        Some(match self {
            Codec::F32 => bytemuck::pod_collect_to_vec(bytes),
            Codec::F16 => {
                let halves: Vec<f16> = bytes.chunks_exact(2).map(half_at).collect();
                halves.to_f32_vec()
            }
            Codec::Q8 => {
                let blocks = bytes.chunks_exact(row_bytes).flat_map(|row| row.chunks(BLOCK + 2));
                let value = |scale: f32| move |&integer: &u8| scale * f32::from(integer as i8);
                blocks.flat_map(|block| block[2..].iter().map(value(half_at(block).to_f32()))).collect()
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn there_and_back(codec: Codec, rows: &[f32], width: usize) -> Vec<f32> {
        let mut bytes = Vec::new();
        codec.encode(rows, width, &mut bytes);
        assert_eq!(bytes.len(), rows.len() / width * codec.row_bytes(width));
        codec.decode(&bytes, width).unwrap()
    }

    proptest! {
        #[test]
        fn values_come_back_as_near_as_the_table_says(
            width in 1usize..100,
            values in proptest::collection::vec(-60_000f32..60_000.0, 100..400),
        ) {
            let rows = &values[..values.len() / width * width];
            prop_assert_eq!(&there_and_back(Codec::F32, rows, width), rows);
            for (back, value) in there_and_back(Codec::F16, rows, width).iter().zip(rows) {
                // Half an ulp of eleven bits, or of the smallest halves.
                prop_assert!((back - value).abs() <= (value.abs() * 2f32.powi(-11)).max(2f32.powi(-25)), "{value} {back}");
            }
            let back = there_and_back(Codec::Q8, rows, width);
            for (back, row) in back.chunks(width).zip(rows.chunks(width)) {
                for (back, block) in back.chunks(BLOCK).zip(row.chunks(BLOCK)) {
                    let largest = block.iter().fold(0f32, |largest, value| largest.max(value.abs()));
                    for (back, value) in back.iter().zip(block) {
                        // Half a step, and what rounding the scale adds.
                        prop_assert!((back - value).abs() <= largest * (0.5 / 127.0 + 2f32.powi(-10)) + 1e-5, "{value} {back}");
                    }
                }
            }
        }

        #[test]
        fn rows_that_went_through_once_do_not_change_again(values in proptest::collection::vec(-9f32..9.0, 64)) {
            let once = there_and_back(Codec::F16, &values, 32);
            prop_assert_eq!(&there_and_back(Codec::F16, &once, 32), &once);
        }

        #[test]
        fn any_bytes_decode_or_are_refused(width in 0usize..70, bytes in proptest::collection::vec(any::<u8>(), 0..500)) {
            for codec in Codec::ALL {
                if let Some(values) = codec.decode(&bytes, width) {
                    prop_assert_eq!(values.len() / width * codec.row_bytes(width), bytes.len());
                }
            }
        }
    }

    #[test]
    fn what_no_half_can_hold_stays_finite() {
        let rows = [1e9, -1e9, 0.0, 1e-30];
        assert_eq!(there_and_back(Codec::F16, &rows, 4), [65504.0, -65504.0, 0.0, 0.0]);
        assert!(there_and_back(Codec::Q8, &[f32::NAN, 3.0, f32::MAX], 3).iter().all(|value| value.is_finite()));
        assert_eq!(there_and_back(Codec::Q8, &[0.0; 40], 40), [0.0; 40]);
    }

    #[test]
    fn numbers_in_headers_name_codecs() {
        assert!(Codec::ALL.iter().all(|&codec| Codec::parse(codec as u8) == Some(codec)));
        assert_eq!(Codec::parse(3), None);
    }
}
