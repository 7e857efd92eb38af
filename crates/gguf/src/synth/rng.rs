//! Reproducible random numbers: SplitMix64 (Steele, Lea, Flood 2014), the same on every machine and in every order of
//! tensors, because each tensor has a stream of its own.

/// A stream of random numbers.
pub(crate) struct Rng(u64);

impl Rng {
    /// The stream that belongs to `name` under `seed`.
    pub(crate) fn new(seed: u64, name: &str) -> Self {
        // FNV-1a spreads the names.
        let hash =
            name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        Self(hash ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    pub(crate) fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Nearly Gaussian, mean 0, variance 1: the sum of four uniform numbers (Irwin-Hall). Needs no transcendental function,
    /// whose last bit differs between systems.
    pub(crate) fn gaussian(&mut self) -> f32 {
        let r = self.next_u64();
        let sum = (r & 0xffff) + (r >> 16 & 0xffff) + (r >> 32 & 0xffff) + (r >> 48);
        // Mean 4 * 32767.5; variance 4 * 65536^2 / 12.
        (sum as f32 - 131_070.0) * (1.0 / 37_837.23)
    }

    /// Appends `n` random bytes.
    pub(crate) fn extend(&mut self, out: &mut Vec<u8>, n: usize) {
        for _ in 0..n / 8 {
            out.extend(self.next_u64().to_le_bytes());
        }
        let rest = self.next_u64().to_le_bytes();
        out.extend(&rest[..n % 8]);
    }
}
