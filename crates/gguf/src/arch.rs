//! The architectures this crate knows in full, and what is special about each when its layers are cut apart.
//!
//! An architecture is on the list only after its source in llama.cpp (`src/models/<name>.cpp`) was read for everything
//! that depends on a layer's absolute number or on the number of layers, and after slices of a random model gave the
//! whole model's logits bit for bit. The rest still runs whole on one machine.

/// A known architecture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Arch {
    /// Llama 1 to 3, Mistral, Mixtral (with experts), and many more under the same name.
    Llama,
    /// Mistral 3 / Ministral.
    Mistral3,
    /// Qwen 2 and 2.5.
    Qwen2,
    /// Qwen 2 with experts.
    Qwen2Moe,
    /// Qwen 3.
    Qwen3,
    /// Qwen 3 with experts.
    Qwen3Moe,
    /// Gemma 2.
    Gemma2,
    /// Gemma 3.
    Gemma3,
    /// Phi 3 and 4.
    Phi3,
    /// OLMo 2 and 3.
    Olmo2,
    /// OpenAI gpt-oss.
    GptOss,
    /// SmolLM 3.
    SmolLm3,
    /// BERT embedding models. Known, but never sliced.
    Bert,
}

/// Where the output head comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Head {
    /// `output.weight` if present, otherwise `token_embd.weight`.
    Optional,
    /// The loader insists on `output.weight`.
    Required,
    /// Always `token_embd.weight`; the loader refuses `output.weight`.
    Tied,
    /// No head at all.
    None,
}

/// Which layers attend only to a window of recent tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Window {
    /// None, whatever the metadata says.
    Never,
    /// Those of the pattern, when the file declares a window.
    WhenDeclared {
        /// Every `period`-th layer attends to everything, unless the file says otherwise.
        period: u32,
    },
    /// Those of the pattern, always: a model without any such layer makes llama.cpp abort.
    Always {
        /// Every `period`-th layer attends to everything, unless the file says otherwise.
        period: u32,
        /// Window where the file states none.
        default_window: Option<u32>,
    },
}

/// How hidden states get into a stage that is not the first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HiddenInput {
    /// As `llama_batch.embd`, unchanged.
    Batch,
    /// As `llama_batch.embd`, but llama.cpp multiplies them by `sqrt(n_embd)` as if they were embeddings. To undo that
    /// exactly, overwrite this tensor with the hidden states once it is computed (evaluation callback), before anything
    /// reads it. Dividing beforehand is exact only where `sqrt(n_embd)` is a power of two.
    OverwriteScaled {
        /// The name of the tensor that holds the scaled input.
        tensor: &'static str,
    },
}

impl Arch {
    /// Every known architecture.
    pub const ALL: &'static [Arch] = &[
        Self::Llama,
        Self::Mistral3,
        Self::Qwen2,
        Self::Qwen2Moe,
        Self::Qwen3,
        Self::Qwen3Moe,
        Self::Gemma2,
        Self::Gemma3,
        Self::Phi3,
        Self::Olmo2,
        Self::GptOss,
        Self::SmolLm3,
        Self::Bert,
    ];

    /// The architecture that a file names in `general.architecture`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|arch| arch.name() == name)
    }

    /// llama.cpp's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral3 => "mistral3",
            Self::Qwen2 => "qwen2",
            Self::Qwen2Moe => "qwen2moe",
            Self::Qwen3 => "qwen3",
            Self::Qwen3Moe => "qwen3moe",
            Self::Gemma2 => "gemma2",
            Self::Gemma3 => "gemma3",
            Self::Phi3 => "phi3",
            Self::Olmo2 => "olmo2",
            Self::GptOss => "gpt-oss",
            Self::SmolLm3 => "smollm3",
            Self::Bert => "bert",
        }
    }

    /// Whether a model of this architecture can be cut by layers.
    pub fn can_slice(self) -> bool {
        self != Self::Bert
    }

    /// Where the head comes from.
    pub fn head(self) -> Head {
        match self {
            Self::Qwen2Moe | Self::Olmo2 | Self::GptOss => Head::Required,
            Self::Gemma2 => Head::Tied,
            Self::Bert => Head::None,
            _ => Head::Optional,
        }
    }

    /// Which layers have a sliding window. (llama.cpp ignores the window that Phi 3 and Mistral files declare.)
    pub fn window(self) -> Window {
        match self {
            Self::Gemma2 => Window::Always { period: 2, default_window: Some(4096) },
            Self::GptOss => Window::Always { period: 2, default_window: None },
            Self::Gemma3 => Window::WhenDeclared { period: 6 },
            Self::Olmo2 => Window::WhenDeclared { period: 4 },
            _ => Window::Never,
        }
    }

    /// Cuts must fall on multiples of this. SmolLM 3 has no rotary encoding in every fourth layer, counted from the
    /// file's first layer, and no key to say otherwise.
    pub fn cut_multiple(self) -> u32 {
        if self == Self::SmolLm3 { 4 } else { 1 }
    }

    /// How hidden states enter a later stage.
    pub fn hidden_input(self) -> HiddenInput {
        match self {
            // gemma2.cpp scales `inpL` whatever it is; gemma3.cpp scales token rows only.
            Self::Gemma2 => HiddenInput::OverwriteScaled { tensor: "inp_scaled" },
            _ => HiddenInput::Batch,
        }
    }

    /// Factor between a token's embedding row and the first layer's input.
    pub fn embedding_scale(self, embedding_length: u32) -> f32 {
        match self {
            Self::Gemma2 | Self::Gemma3 => (embedding_length as f32).sqrt(),
            _ => 1.0,
        }
    }

    /// The layer count that makes llama.cpp take the model for the 27B one, whose attention scale is
    /// `1/sqrt(n_embd / n_head)` where all others have `1/sqrt(key_length)`.
    pub(crate) fn layers_of_27b(self) -> Option<u32> {
        match self {
            Self::Gemma2 => Some(46),
            Self::Gemma3 => Some(62),
            _ => None,
        }
    }

    /// Whether the expert tensors, not the plain ones, make up the feed-forward part, given the number of experts.
    pub(crate) fn has_experts(self, experts: u32) -> bool {
        match self {
            Self::Qwen2Moe | Self::Qwen3Moe | Self::GptOss => true,
            Self::Llama | Self::Mistral3 => experts > 0,
            _ => false,
        }
    }

    /// Whether the loader takes the heads to be as wide together as the hidden state, where others multiply.
    pub(crate) fn heads_fill_embedding(self) -> bool {
        matches!(self, Self::Qwen2 | Self::Qwen2Moe | Self::Phi3 | Self::Olmo2 | Self::Bert)
    }

    /// Whether the graph asserts that key, value and rotary dimensions are one and the same.
    pub(crate) fn wants_equal_head_dims(self) -> bool {
        !matches!(self, Self::Gemma2 | Self::Gemma3 | Self::Phi3 | Self::GptOss | Self::Bert)
    }
}

/// Name of the tensor that holds a layer's output in llama.cpp's graph, without the layer number: the tensor of layer `il`
/// is `l_out-{il}`. `None` for architectures that cannot be sliced.
///
/// Read in each `src/models/<arch>.cpp`: `cb(cur, "l_out", il)` is the last thing every layer of the listed
/// architectures does. `llama_context::graph_get_cb` appends `-{il}`.
pub fn hidden_tap_name(architecture: &str) -> Option<&'static str> {
    Arch::from_name(architecture).filter(|arch| arch.can_slice()).map(|_| "l_out")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_architecture_is_found_by_its_name() {
        for &arch in Arch::ALL {
            assert_eq!(Arch::from_name(arch.name()), Some(arch));
        }
        assert_eq!(Arch::from_name("mamba"), None);
        assert_eq!(hidden_tap_name("gpt-oss"), Some("l_out"));
        assert_eq!(hidden_tap_name("bert"), None);
    }
}
