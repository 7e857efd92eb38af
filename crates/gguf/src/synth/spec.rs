//! What a made-up model should look like: presets by name, small ones for tests and some for benchmarks.

use std::str::FromStr;

use crate::arch::Arch;
use crate::facts::Facts;
use crate::value::Value;

/// Why a model could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SynthError {
    /// No preset of this name.
    #[error("there is no made-up model called {name:?}; there are: {}", Spec::PRESETS.join(", "))]
    UnknownPreset {
        /// The name that was asked for.
        name: String,
    },
    /// No weight type of this name.
    #[error("there is no weight type {0:?}; there are f32, f16, q8_0, q4_0 and q4_k_m")]
    UnknownWeights(String),
    /// The file could not be written.
    #[error(transparent)]
    Write(#[from] crate::write::WriteError),
}

/// How the matrices are stored. Vectors and expert routers are always F32, as in real models.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weights {
    /// 32-bit floats.
    F32,
    /// 16-bit floats.
    F16,
    /// 8-bit blocks.
    Q8_0,
    /// 4-bit blocks, with an 8-bit head.
    Q4_0,
    /// llama.cpp's `Q4_K_M`: Q4_K, with Q6_K for the head and for some value and down projections. Random blocks.
    Q4KM,
}

impl FromStr for Weights {
    type Err = SynthError;

    fn from_str(name: &str) -> Result<Self, SynthError> {
        match name.to_ascii_lowercase().as_str() {
            "f32" => Ok(Self::F32),
            "f16" => Ok(Self::F16),
            "q8_0" => Ok(Self::Q8_0),
            "q4_0" => Ok(Self::Q4_0),
            "q4_k_m" => Ok(Self::Q4KM),
            _ => Err(SynthError::UnknownWeights(name.to_owned())),
        }
    }
}

/// Description of a made-up model.
#[derive(Debug, Clone)]
pub struct Spec {
    /// `general.name`.
    pub name: String,
    /// Architecture.
    pub arch: Arch,
    /// Shape. Vocabulary sizes below 262 (256 for BERT) are raised to that.
    pub facts: Facts,
    /// Storage of matrices.
    pub weights: Weights,
    /// Same seed, same file.
    pub seed: u64,
    /// Whether the head is the embedding, where the architecture leaves the choice.
    pub tied: bool,
    /// Optional tensors to include, by name without `blk.N.`.
    pub optional_tensors: Vec<&'static str>,
    /// Further keys, by name without the architecture.
    pub keys: Vec<(&'static str, Value)>,
    /// Layers from here on add nothing to what comes in, and cost what layers cost. So a model with as many layers as are before them says
    /// what one with any number says, for a part of the time.
    pub idle_from: Option<u32>,
}

/// Widths shared by most tiny models.
fn shape(layers: u32, heads: u32, kv_heads: u32, head_length: u32) -> Facts {
    Facts {
        layers,
        embedding_length: 256,
        feed_forward_length: 768,
        heads,
        kv_heads,
        key_length: head_length,
        value_length: head_length,
        rope_dimensions: head_length,
        vocabulary: 1024,
        context_length: 8192,
        experts: 0,
        experts_used: 0,
        expert_feed_forward_length: 0,
        shared_feed_forward_length: 0,
        sliding_window: None,
        windowed_layers: vec![false; layers as usize],
    }
}

fn with_experts(mut facts: Facts, shared: u32) -> Facts {
    facts.experts = 8;
    facts.experts_used = 2;
    facts.feed_forward_length = 512;
    facts.expert_feed_forward_length = 256;
    facts.shared_feed_forward_length = shared;
    facts
}

const QKV_BIASES: [&str; 3] = ["attn_q.bias", "attn_k.bias", "attn_v.bias"];

impl Spec {
    /// Names that [`Spec::preset`] knows.
    pub const PRESETS: &'static [&'static str] = &[
        "llama",
        "llama-tied",
        "mixtral",
        "mistral3",
        "qwen2",
        "qwen2moe",
        "qwen3",
        "qwen3moe",
        "gemma2",
        "gemma3",
        "phi3",
        "olmo2",
        "olmo3",
        "gpt-oss",
        "smollm3",
        "bert",
        "bench-1b",
        "bench-0.5b",
        "bench-wide",
        "bench-deep",
    ];

    /// The presets that are small: every one but the benchmarks.
    pub fn tiny_presets() -> impl Iterator<Item = &'static str> {
        Self::PRESETS.iter().copied().filter(|name| !name.starts_with("bench-"))
    }

    /// A small model (about 1 to 8 million parameters) with F32 weights.
    pub fn tiny(name: &str) -> Result<Self, SynthError> {
        match Self::preset(name) {
            Ok(spec) if !name.starts_with("bench-") => Ok(spec),
            _ => Err(SynthError::UnknownPreset { name: name.to_owned() }),
        }
    }

    /// Any preset.
    pub fn preset(name: &str) -> Result<Self, SynthError> {
        let spec = |arch, facts| Self {
            // llama.cpp gives tokens a special meaning when a model's name contains "phi3".
            name: format!("murmur-synth-{}", name.replace("phi3", "phi-three")),
            arch,
            facts,
            weights: Weights::F32,
            seed: 42,
            tied: false,
            optional_tensors: vec![],
            keys: vec![],
            idle_from: None,
        };
        let yarn = |original: u32| {
            vec![
                ("rope.scaling.type", Value::from("yarn")),
                ("rope.scaling.factor", 4f32.into()),
                ("rope.scaling.original_context_length", original.into()),
            ]
        };
        Ok(match name {
            "llama" => spec(Arch::Llama, shape(8, 8, 4, 32)),
            "llama-tied" => Self {
                tied: true,
                optional_tensors: vec!["rope_freqs.weight"],
                ..spec(Arch::Llama, shape(8, 8, 4, 32))
            },
            "mixtral" => {
                let mut facts = with_experts(shape(8, 8, 4, 32), 0);
                // The llama architecture has one width for both.
                facts.feed_forward_length = 256;
                spec(Arch::Llama, facts)
            }
            "mistral3" => {
                let mut keys = yarn(64);
                keys.push(("attention.temperature_scale", 0.1f32.into()));
                Self { keys, ..spec(Arch::Mistral3, shape(8, 8, 4, 32)) }
            }
            "qwen2" => Self { optional_tensors: QKV_BIASES.to_vec(), ..spec(Arch::Qwen2, shape(8, 8, 2, 32)) },
            "qwen2moe" => Self {
                optional_tensors: QKV_BIASES.to_vec(),
                ..spec(Arch::Qwen2Moe, with_experts(shape(8, 8, 2, 32), 256))
            },
            "qwen3" => spec(Arch::Qwen3, shape(8, 8, 2, 64)),
            "qwen3moe" => spec(Arch::Qwen3Moe, with_experts(shape(8, 8, 4, 32), 0)),
            "gemma2" => Self {
                tied: true,
                keys: vec![
                    ("attention.sliding_window", 16u32.into()),
                    ("attn_logit_softcapping", 50f32.into()),
                    ("final_logit_softcapping", 30f32.into()),
                ],
                ..spec(Arch::Gemma2, shape(8, 4, 2, 64))
            },
            "gemma3" => Self {
                tied: true,
                keys: vec![("attention.sliding_window", 16u32.into()), ("rope.freq_base_swa", 10_000f32.into())],
                ..spec(Arch::Gemma3, shape(12, 4, 2, 64))
            },
            "phi3" => {
                let mut keys = vec![
                    ("rope.scaling.original_context_length", Value::from(64u32)),
                    ("attention.sliding_window", 47u32.into()),
                ];
                keys.push(("rope.scaling.attn_factor", 1.19f32.into()));
                let optional_tensors = vec!["rope_factors_long.weight", "rope_factors_short.weight"];
                Self { keys, optional_tensors, ..spec(Arch::Phi3, shape(8, 8, 4, 32)) }
            }
            "olmo2" => spec(Arch::Olmo2, shape(8, 8, 4, 32)),
            "olmo3" => {
                let mut keys = yarn(64);
                keys.push(("attention.sliding_window", 16u32.into()));
                Self { keys, ..spec(Arch::Olmo2, shape(8, 8, 4, 32)) }
            }
            "gpt-oss" => {
                let mut keys = yarn(64);
                keys.push(("attention.sliding_window", 16u32.into()));
                Self {
                    keys,
                    optional_tensors: QKV_BIASES.to_vec(),
                    ..spec(Arch::GptOss, with_experts(shape(8, 8, 4, 64), 0))
                }
            }
            "smollm3" => Self { tied: true, ..spec(Arch::SmolLm3, shape(8, 8, 4, 32)) },
            "bert" => {
                let mut facts = shape(4, 8, 8, 32);
                facts.context_length = 512;
                let mut optional_tensors = QKV_BIASES.to_vec();
                optional_tensors.extend(["attn_output.bias", "ffn_up.bias", "ffn_down.bias", "token_types.weight"]);
                Self { optional_tensors, ..spec(Arch::Bert, facts) }
            }
            "bench-1b" => {
                let mut facts = shape(16, 32, 8, 64);
                facts.embedding_length = 2048;
                facts.feed_forward_length = 8192;
                facts.vocabulary = 128_256;
                facts.context_length = 131_072;
                Self {
                    weights: Weights::Q4KM,
                    tied: true,
                    optional_tensors: vec!["rope_freqs.weight"],
                    ..spec(Arch::Llama, facts)
                }
            }
            "bench-0.5b" => {
                let mut facts = shape(24, 14, 2, 64);
                facts.embedding_length = 896;
                facts.feed_forward_length = 4864;
                facts.vocabulary = 151_936;
                facts.context_length = 32_768;
                Self {
                    weights: Weights::Q8_0,
                    tied: true,
                    optional_tensors: QKV_BIASES.to_vec(),
                    ..spec(Arch::Qwen2, facts)
                }
            }
            // Hidden states as wide as those of a model of 1B, and next to nothing to compute.
            "bench-wide" => {
                let mut facts = shape(4, 8, 2, 32);
                facts.embedding_length = 2048;
                facts.feed_forward_length = 256;
                Self { weights: Weights::Q8_0, tied: true, ..spec(Arch::Llama, facts) }
            }
            // Its first layer alone guesses all that it says. So small that many layers fit the caches of processors, which stages on one
            // machine share.
            "bench-deep" => {
                Self { idle_from: Some(1), weights: Weights::Q4_0, ..spec(Arch::Llama, shape(8, 8, 4, 32)) }
            }
            _ => {
                return Err(SynthError::UnknownPreset { name: name.to_owned() });
            }
        })
    }

    /// The same model with other weights.
    pub fn with_weights(mut self, weights: Weights) -> Self {
        self.weights = weights;
        self
    }

    /// The same shape from another seed.
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// The same model with another number of layers.
    pub fn with_layers(mut self, layers: u32) -> Self {
        self.facts.layers = layers;
        self.facts.windowed_layers = vec![false; layers as usize];
        self
    }
}
