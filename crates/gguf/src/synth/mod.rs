//! Made-up models: random weights in the exact shape that llama.cpp expects of an architecture.
//!
//! They say nothing sensible, but they exercise every code path a real model does, cost nothing to make, and come out
//! the same from the same seed everywhere. Weights are scaled so that activations stay near one through any number of
//! layers: matrices have variance 1 / fan-in, norms are near 1.

pub(crate) mod rng;
mod spec;
mod vocab;

use std::io::{self, Write};
use std::path::Path;

pub use spec::{Spec, SynthError, Weights};

use crate::arch::{Arch, Head};
use crate::layout;
use crate::quant;
use crate::tensor_type::TensorType;
use crate::write::{GgufBuilder, TensorSource};
use rng::Rng;

/// Elements made at a time; a multiple of every block length.
const CHUNK_ELEMENTS: u64 = 1 << 13;

/// Writes the model and returns the size of the file in bytes.
pub fn write(spec: &Spec, path: impl AsRef<Path>) -> Result<u64, SynthError> {
    let mut spec = spec.clone();
    let tokens_min = if spec.arch == Arch::Bert { vocab::WPM_TOKENS_MIN } else { vocab::SPM_TOKENS_MIN };
    spec.facts.vocabulary = spec.facts.vocabulary.max(tokens_min);

    let mut builder = GgufBuilder::new(spec.arch.name());
    set_keys(&spec, &mut builder);
    let included = |slot: &layout::Slot| slot.required || spec.optional_tensors.contains(&slot.name);
    let global: Vec<_> = layout::global(spec.arch, &spec.facts)
        .into_iter()
        .filter(|slot| included(slot) || slot.name == "output.weight" && !spec.tied)
        .collect();
    let is_last = |name: &str| name.starts_with("output");
    for slot in global.iter().filter(|slot| !is_last(slot.name)) {
        add(&spec, &mut builder, slot.name.to_owned(), slot, None)?;
    }
    let layer = layout::layer(spec.arch, &spec.facts);
    for il in 0..spec.facts.layers {
        for slot in layer.iter().filter(|slot| included(slot)) {
            add(&spec, &mut builder, format!("blk.{il}.{}", slot.name), slot, Some(il))?;
        }
    }
    for slot in global.iter().filter(|slot| is_last(slot.name)) {
        add(&spec, &mut builder, slot.name.to_owned(), slot, None)?;
    }
    Ok(builder.write(path)?)
}

fn set_keys(spec: &Spec, builder: &mut GgufBuilder) {
    let facts = &spec.facts;
    builder.set("general.type", "model");
    builder.set("general.name", spec.name.as_str());
    // llama_ftype of llama.h.
    let file_type: u32 = match spec.weights {
        Weights::F32 => 0,
        Weights::F16 => 1,
        Weights::Q4_0 => 2,
        Weights::Q8_0 => 7,
        Weights::Q4KM => 15,
    };
    builder.set("general.file_type", file_type);
    builder.set("general.quantization_version", 2u32);
    let mut set = |suffix: &str, value: crate::value::Value| {
        builder.set(format!("{}.{suffix}", spec.arch.name()), value);
    };
    set("block_count", facts.layers.into());
    set("context_length", facts.context_length.into());
    set("embedding_length", facts.embedding_length.into());
    set("feed_forward_length", facts.feed_forward_length.into());
    set("attention.head_count", facts.heads.into());
    if spec.arch == Arch::Bert {
        set("attention.layer_norm_epsilon", 1e-12f32.into());
        set("attention.causal", false.into());
        // Mean pooling: LLAMA_POOLING_TYPE_MEAN.
        set("pooling_type", 1u32.into());
    } else {
        set("attention.head_count_kv", facts.kv_heads.into());
        set("attention.key_length", facts.key_length.into());
        set("attention.value_length", facts.value_length.into());
        set("attention.layer_norm_rms_epsilon", 1e-5f32.into());
        set("rope.dimension_count", facts.rope_dimensions.into());
        set("rope.freq_base", if spec.arch == Arch::Llama { 500_000f32 } else { 1_000_000f32 }.into());
        set("vocab_size", facts.vocabulary.into());
    }
    if facts.experts > 0 {
        set("expert_count", facts.experts.into());
        set("expert_used_count", facts.experts_used.into());
        if spec.arch != Arch::Llama {
            set("expert_feed_forward_length", facts.expert_feed_forward_length.into());
        }
        if facts.shared_feed_forward_length > 0 {
            set("expert_shared_feed_forward_length", facts.shared_feed_forward_length.into());
        }
    }
    for (suffix, value) in &spec.keys {
        set(suffix, value.clone());
    }
    let tokenizer = if spec.arch == Arch::Bert {
        vocab::word_piece(facts.vocabulary)
    } else {
        vocab::sentence_piece(facts.vocabulary)
    };
    for (key, value) in tokenizer {
        builder.set(key, value);
    }
}

/// What the elements of a tensor look like.
#[derive(Clone, Copy)]
enum Fill {
    /// Mean, standard deviation.
    Gaussian(f32, f32),
    /// Rising evenly from 1 to 8, as the frequency factors of Llama 3 do, roughly.
    Ramp,
}

fn fill_of(spec: &Spec, name: &str, slot: &layout::Slot) -> Fill {
    let fan_in = slot.dims[0] as f32;
    // A head that is also the embedding must give logits near one.
    let head_is_embedding = spec.tied && spec.arch.head() != Head::Required || spec.arch.head() == Head::Tied;
    match slot.name {
        "rope_freqs.weight" | "rope_factors_long.weight" | "rope_factors_short.weight" => Fill::Ramp,
        "token_embd.weight" if head_is_embedding => Fill::Gaussian(0.0, 1.5 / fan_in.sqrt()),
        "token_embd.weight" => Fill::Gaussian(0.0, 1.0),
        "position_embd.weight" | "token_types.weight" => Fill::Gaussian(0.0, 0.3),
        "attn_sinks.weight" => Fill::Gaussian(0.0, 0.5),
        "ffn_gate_inp_shexp.weight" => Fill::Gaussian(0.0, 1.0 / fan_in.sqrt()),
        _ if name.ends_with("norm.weight") => Fill::Gaussian(1.0, 0.1),
        _ if name.ends_with(".bias") => Fill::Gaussian(0.0, 0.1),
        _ => Fill::Gaussian(0.0, 1.0 / fan_in.sqrt()),
    }
}

/// llama.cpp's `use_more_bits`: the first and last eighth of the layers and every third in between.
fn gets_more_bits(il: u32, layers: u32) -> bool {
    il < layers / 8 || il >= 7 * layers / 8 || (il - layers / 8) % 3 == 2
}

fn type_of(spec: &Spec, slot: &layout::Slot, il: Option<u32>) -> TensorType {
    let vector = slot.dims.len() == 1 || slot.name.ends_with(".bias");
    if vector || matches!(slot.name, "ffn_gate_inp.weight" | "position_embd.weight" | "token_types.weight") {
        return TensorType::F32;
    }
    let is_head = slot.name == "output.weight" || slot.name == "token_embd.weight" && spec.tied;
    let wanted = match spec.weights {
        Weights::F32 => TensorType::F32,
        Weights::F16 => TensorType::F16,
        Weights::Q8_0 => TensorType::Q8_0,
        Weights::Q4_0 if is_head => TensorType::Q8_0,
        Weights::Q4_0 => TensorType::Q4_0,
        Weights::Q4KM => {
            let favoured =
                matches!(slot.name, "attn_v.weight" | "attn_qkv.weight" | "ffn_down.weight" | "ffn_down_exps.weight");
            let more_bits = il.is_some_and(|il| favoured && gets_more_bits(il, spec.facts.layers));
            if is_head || more_bits { TensorType::Q6_K } else { TensorType::Q4_K }
        }
    };
    // llama-quantize falls back likewise when rows are not whole blocks.
    [wanted, TensorType::Q8_0, TensorType::F16]
        .into_iter()
        .find(|ty| ty.row_bytes(slot.dims[0]).is_some())
        .unwrap_or(TensorType::F32)
}

fn add(
    spec: &Spec,
    builder: &mut GgufBuilder,
    name: String,
    slot: &layout::Slot,
    il: Option<u32>,
) -> Result<(), SynthError> {
    let ty = type_of(spec, slot, il);
    let is_idle = il.zip(spec.idle_from).is_some_and(|(il, first)| il >= first);
    let fill = match slot.name {
        // What these give is added to what the layer got.
        "attn_output.weight" | "ffn_down.weight" if is_idle => Fill::Gaussian(0.0, 0.0),
        _ => fill_of(spec, &name, slot),
    };
    let elements = slot.dims.iter().product();
    let mut rng = Rng::new(spec.seed, &name);
    let generate = move |out: &mut dyn Write| generate(&mut rng, fill, ty, elements, out);
    builder.tensor(name, &slot.dims, ty, TensorSource::Generate(Box::new(generate)))?;
    Ok(())
}

fn generate(rng: &mut Rng, fill: Fill, ty: TensorType, elements: u64, out: &mut dyn Write) -> io::Result<()> {
    let mut packed = Vec::new();
    let mut made = 0;
    while made < elements {
        let count = CHUNK_ELEMENTS.min(elements - made);
        packed.clear();
        if let (Fill::Gaussian(_, std), TensorType::Q4_K | TensorType::Q6_K) = (fill, ty) {
            let block = if ty == TensorType::Q4_K { quant::random_q4_k } else { quant::random_q6_k };
            (0..count / quant::SUPER_BLOCK as u64).for_each(|_| block(rng, std, &mut packed));
        } else {
            let values: Vec<f32> = match fill {
                Fill::Gaussian(mean, std) => (0..count).map(|_| mean + std * rng.gaussian()).collect(),
                Fill::Ramp => (made..made + count).map(|i| 1.0 + 7.0 * i as f32 / elements as f32).collect(),
            };
            match ty {
                TensorType::F32 => packed.extend(values.iter().flat_map(|x| x.to_le_bytes())),
                TensorType::F16 => packed.extend(values.iter().flat_map(|&x| quant::f16_from_f32(x).to_le_bytes())),
                TensorType::Q8_0 => quant::q8_0(&values, &mut packed),
                TensorType::Q4_0 => quant::q4_0(&values, &mut packed),
                other => {
                    return Err(io::Error::other(format!("no way to make random {other} weights")));
                }
            }
        }
        out.write_all(&packed)?;
        made += count;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_bits_go_to_the_same_layers_as_in_llama_cpp() {
        let layers: Vec<u32> = (0..16).filter(|&il| gets_more_bits(il, 16)).collect();
        assert_eq!(layers, [0, 1, 4, 7, 10, 13, 14, 15]);
    }
}
