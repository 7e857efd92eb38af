//! The numbers that shape a model: read from metadata with llama.cpp's own defaults (`llama_model_base::load_hparams`).

use crate::arch::{Arch, Window};
use crate::gguf::Gguf;
use crate::value::{Array, Value};

/// llama.cpp's limit `LLAMA_MAX_LAYERS`.
pub const LAYERS_MAX: u32 = 512;

/// Shape of a model.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Facts {
    /// Number of layers.
    pub layers: u32,
    /// Width of the hidden state (`n_embd`).
    pub embedding_length: u32,
    /// Width of the dense feed-forward part; the largest where it differs by layer.
    pub feed_forward_length: u32,
    /// Query heads.
    pub heads: u32,
    /// Key and value heads.
    pub kv_heads: u32,
    /// Elements of a key per head.
    pub key_length: u32,
    /// Elements of a value per head.
    pub value_length: u32,
    /// Elements per head that are rotated.
    pub rope_dimensions: u32,
    /// Number of tokens.
    pub vocabulary: u32,
    /// Context length the model was trained for.
    pub context_length: u32,
    /// Experts per layer; 0 for dense models.
    pub experts: u32,
    /// Experts that a token uses.
    pub experts_used: u32,
    /// Width of one expert.
    pub expert_feed_forward_length: u32,
    /// Width of the shared expert; 0 where there is none.
    pub shared_feed_forward_length: u32,
    /// Window in tokens of the layers that have one.
    pub sliding_window: Option<u32>,
    /// For each layer, whether it has the window.
    pub windowed_layers: Vec<bool>,
}

impl Facts {
    /// Reads the facts of a file. The error says which key is missing or senseless.
    pub fn of(gguf: &Gguf) -> Result<Self, String> {
        let need = |suffix: &str| match gguf.arch_get(suffix) {
            None => Err(format!("the metadata key {} is missing", gguf.arch_key(suffix))),
            Some(value) => first_or_scalar(value).ok_or_else(|| {
                format!("the metadata key {} is not a non-negative integer below 2^32", gguf.arch_key(suffix))
            }),
        };
        let optional = |suffix: &str| match gguf.arch_get(suffix) {
            None => Ok(None),
            Some(_) => need(suffix).map(Some),
        };
        let arch = Arch::from_name(gguf.architecture());

        let layers = need("block_count")?;
        if layers == 0 || layers > LAYERS_MAX {
            return Err(format!("it states {layers} layers; llama.cpp takes 1 to {LAYERS_MAX}"));
        }
        let embedding_length = need("embedding_length")?;
        let heads = need("attention.head_count")?;
        if heads == 0 {
            return Err("it states zero attention heads".into());
        }
        let kv_heads = optional("attention.head_count_kv")?.unwrap_or(heads);
        let key_length = optional("attention.key_length")?.unwrap_or(embedding_length / heads);
        let value_length = optional("attention.value_length")?.unwrap_or(embedding_length / heads);
        let rope_dimensions = optional("rope.dimension_count")?.unwrap_or(key_length);
        let feed_forward_length = optional("feed_forward_length")?.unwrap_or(0);
        let experts = optional("expert_count")?.unwrap_or(0);
        let experts_used = optional("expert_used_count")?.unwrap_or(0);
        let expert_feed_forward_length = match optional("expert_feed_forward_length")? {
            Some(width) if width > 0 => width,
            _ if matches!(arch, Some(Arch::Qwen2Moe | Arch::Qwen3Moe)) => {
                feed_forward_length.checked_div(experts_used).unwrap_or(0)
            }
            _ => feed_forward_length,
        };
        let shared_feed_forward_length = match optional("expert_shared_feed_forward_length")? {
            Some(width) if width > 0 => width,
            _ if arch == Some(Arch::Qwen2Moe) => feed_forward_length,
            _ => 0,
        };
        let (sliding_window, windowed_layers) = windows(gguf, arch, layers)?;
        Ok(Self {
            layers,
            embedding_length,
            feed_forward_length,
            heads,
            kv_heads,
            key_length,
            value_length,
            rope_dimensions,
            vocabulary: vocabulary(gguf),
            context_length: need("context_length")?,
            experts,
            experts_used,
            expert_feed_forward_length,
            shared_feed_forward_length,
            sliding_window,
            windowed_layers,
        })
    }

    /// Bytes of keys and values that one token adds in one layer, stored as f16.
    pub fn kv_bytes_per_token_per_layer(&self) -> u64 {
        2 * u64::from(self.kv_heads) * (u64::from(self.key_length) + u64::from(self.value_length))
    }
}

/// Vocabulary size: the token list, or `vocab_size`, or the embedding's rows.
fn vocabulary(gguf: &Gguf) -> u32 {
    let listed = gguf.tokens().and_then(|tokens| u32::try_from(tokens.len()).ok());
    let stated = || gguf.arch_u32("vocab_size");
    let rows = || gguf.tensor("token_embd.weight").and_then(|t| u32::try_from(*t.dims.get(1)?).ok());
    listed.or_else(stated).or_else(rows).unwrap_or(0)
}

/// A scalar, or the first element of a per-layer array, as llama.cpp's `n_head()` and friends take it.
fn first_or_scalar(value: &Value) -> Option<u32> {
    match value {
        Value::Array(array) => u32::try_from(*array.integers()?.first()?).ok(),
        scalar => scalar.as_u32(),
    }
}

/// Window length and the layers it applies to.
fn windows(gguf: &Gguf, arch: Option<Arch>, layers: u32) -> Result<(Option<u32>, Vec<bool>), String> {
    let none = || (None, vec![false; layers as usize]);
    let declared = gguf.arch_u32("attention.sliding_window");
    let (period, window) = match arch.map_or(Window::Never, Arch::window) {
        Window::Never => return Ok(none()),
        Window::WhenDeclared { period } => match declared {
            Some(window) if window > 0 => (period, window),
            _ => return Ok(none()),
        },
        Window::Always { period, default_window } => match declared.or(default_window) {
            Some(window) => (period, window),
            None => {
                return Err(format!("the metadata key {} is missing", gguf.arch_key("attention.sliding_window")));
            }
        },
    };
    let key = "attention.sliding_window_pattern";
    let pattern = match gguf.arch_get(key) {
        None => by_period(period, layers),
        Some(Value::Array(Array::Bool(pattern))) if pattern.len() == layers as usize => pattern.clone(),
        Some(Value::Array(array)) if array.len() == layers as usize => match array.integers() {
            Some(integers) => integers.iter().map(|&x| x != 0).collect(),
            None => {
                return Err(format!("the metadata key {} is not a list of booleans", gguf.arch_key(key)));
            }
        },
        Some(value) => match value.as_u32() {
            Some(period) => by_period(period, layers),
            None => {
                return Err(format!(
                    "the metadata key {} fits neither a period nor {layers} layers",
                    gguf.arch_key(key)
                ));
            }
        },
    };
    Ok((Some(window), pattern))
}

/// `llama_hparams::set_swa_pattern`: all layers but each `period`-th; a period of zero means every layer.
fn by_period(period: u32, layers: u32) -> Vec<bool> {
    (0..layers).map(|il| period == 0 || il % period < period - 1).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_period_leaves_every_nth_layer_without_a_window() {
        assert_eq!(by_period(2, 5), [true, false, true, false, true]);
        assert_eq!(by_period(1, 3), [false; 3]);
        assert_eq!(by_period(0, 3), [true; 3]);
    }
}
