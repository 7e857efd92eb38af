//! Element types of tensors: the ids, block lengths and block sizes of ggml
//! (`ggml.h`, enum `ggml_type`; `ggml.c`, table `type_traits`; `ggml-common.h` for the block layouts).

use std::fmt;

macro_rules! tensor_types {
    ($( $(#[$doc:meta])* $variant:ident = $id:literal, $name:literal, $block_elements:literal, $block_bytes:literal; )*) => {
        /// How the elements of a tensor are stored.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[allow(non_camel_case_types, reason = "the names are ggml's own")]
        pub enum TensorType {
            $( $(#[$doc])* $variant, )*
        }

        impl TensorType {
            /// Every type that may stand in a file.
            pub const ALL: &'static [TensorType] = &[ $( TensorType::$variant, )* ];

            /// The type with this ggml id; `None` for ids that ggml removed or never had.
            pub fn from_id(id: u32) -> Option<Self> {
                match id { $( $id => Some(Self::$variant), )* _ => None }
            }

            /// ggml's id.
            pub fn id(self) -> u32 {
                match self { $( Self::$variant => $id, )* }
            }

            /// ggml's name, as `llama-quantize` prints it.
            pub fn name(self) -> &'static str {
                match self { $( Self::$variant => $name, )* }
            }

            /// Elements per block; a row must be a whole number of blocks.
            pub fn block_elements(self) -> u64 {
                match self { $( Self::$variant => $block_elements, )* }
            }

            /// Bytes per block.
            pub fn block_bytes(self) -> u64 {
                match self { $( Self::$variant => $block_bytes, )* }
            }
        }
    };
}

tensor_types! {
    /// 32-bit floats.
    F32 = 0, "F32", 1, 4;
    /// 16-bit IEEE floats.
    F16 = 1, "F16", 1, 2;
    /// 4 bits, one f16 scale per 32.
    Q4_0 = 2, "Q4_0", 32, 18;
    /// 4 bits, scale and minimum per 32.
    Q4_1 = 3, "Q4_1", 32, 20;
    /// 5 bits, one scale per 32.
    Q5_0 = 6, "Q5_0", 32, 22;
    /// 5 bits, scale and minimum per 32.
    Q5_1 = 7, "Q5_1", 32, 24;
    /// 8 bits, one scale per 32.
    Q8_0 = 8, "Q8_0", 32, 34;
    /// ggml's internal activation format; never in a model.
    Q8_1 = 9, "Q8_1", 32, 36;
    /// K-quant, about 2.6 bits.
    Q2_K = 10, "Q2_K", 256, 84;
    /// K-quant, about 3.4 bits.
    Q3_K = 11, "Q3_K", 256, 110;
    /// K-quant, 4.5 bits.
    Q4_K = 12, "Q4_K", 256, 144;
    /// K-quant, 5.5 bits.
    Q5_K = 13, "Q5_K", 256, 176;
    /// K-quant, about 6.6 bits.
    Q6_K = 14, "Q6_K", 256, 210;
    /// ggml's internal activation format; never in a model.
    Q8_K = 15, "Q8_K", 256, 292;
    /// Codebook quant, about 2.1 bits.
    IQ2_XXS = 16, "IQ2_XXS", 256, 66;
    /// Codebook quant, about 2.3 bits.
    IQ2_XS = 17, "IQ2_XS", 256, 74;
    /// Codebook quant, about 3.1 bits.
    IQ3_XXS = 18, "IQ3_XXS", 256, 98;
    /// Codebook quant, about 1.6 bits.
    IQ1_S = 19, "IQ1_S", 256, 50;
    /// Non-linear 4 bits per 32.
    IQ4_NL = 20, "IQ4_NL", 32, 18;
    /// Codebook quant, about 3.4 bits.
    IQ3_S = 21, "IQ3_S", 256, 110;
    /// Codebook quant, about 2.6 bits.
    IQ2_S = 22, "IQ2_S", 256, 82;
    /// Non-linear 4.25 bits.
    IQ4_XS = 23, "IQ4_XS", 256, 136;
    /// 8-bit integers.
    I8 = 24, "I8", 1, 1;
    /// 16-bit integers.
    I16 = 25, "I16", 1, 2;
    /// 32-bit integers.
    I32 = 26, "I32", 1, 4;
    /// 64-bit integers.
    I64 = 27, "I64", 1, 8;
    /// 64-bit floats; ggml has no kernels for them.
    F64 = 28, "F64", 1, 8;
    /// Codebook quant, about 1.75 bits.
    IQ1_M = 29, "IQ1_M", 256, 56;
    /// bfloat16.
    BF16 = 30, "BF16", 1, 2;
    /// Ternary, about 1.7 bits.
    TQ1_0 = 34, "TQ1_0", 256, 54;
    /// Ternary, about 2.1 bits.
    TQ2_0 = 35, "TQ2_0", 256, 66;
    /// OCP microscaling 4-bit floats.
    MXFP4 = 39, "MXFP4", 32, 17;
    /// NVIDIA's 4-bit floats.
    NVFP4 = 40, "NVFP4", 64, 36;
    /// One bit, one scale per 128.
    Q1_0 = 41, "Q1_0", 128, 18;
    /// Two bits, one scale per 64.
    Q2_0 = 42, "Q2_0", 64, 18;
}

impl TensorType {
    /// Bytes of a row of `elements`; `None` when it is not a whole number of blocks or does not fit in 64 bits.
    pub fn row_bytes(self, elements: u64) -> Option<u64> {
        if !elements.is_multiple_of(self.block_elements()) {
            return None;
        }
        (elements / self.block_elements()).checked_mul(self.block_bytes())
    }

    /// Whether ggml can multiply with a matrix of this type. Others crash it (F64 by a null function pointer).
    pub fn is_weight(self) -> bool {
        !matches!(self, Self::F64 | Self::I8 | Self::I16 | Self::I32 | Self::I64 | Self::Q8_1 | Self::Q8_K)
    }

    /// Average bits per element.
    pub fn bits_per_element(self) -> f64 {
        self.block_bytes() as f64 * 8.0 / self.block_elements() as f64
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl serde::Serialize for TensorType {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_round_trip_and_removed_ids_are_unknown() {
        for &t in TensorType::ALL {
            assert_eq!(TensorType::from_id(t.id()), Some(t));
        }
        for removed in [4, 5, 31, 32, 33, 36, 37, 38, 43, u32::MAX] {
            assert_eq!(TensorType::from_id(removed), None);
        }
    }

    #[test]
    fn a_row_is_a_whole_number_of_blocks() {
        assert_eq!(TensorType::Q4_K.row_bytes(512), Some(288));
        assert_eq!(TensorType::Q4_K.row_bytes(500), None);
        assert_eq!(TensorType::F64.row_bytes(u64::MAX), None);
    }
}
