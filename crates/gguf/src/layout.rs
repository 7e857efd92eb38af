//! Which tensors a model of a known architecture has, and their shapes: one table for checking files and for making them.
//!
//! Taken from `load_arch_tensors` in each of llama.cpp's `src/models/<arch>.cpp`.

use crate::arch::{Arch, Head};
use crate::facts::Facts;

/// One expected tensor of a layer (or of the whole model).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Slot {
    /// Full name, or the part after `blk.N.`.
    pub(crate) name: &'static str,
    /// Shape, fastest dimension first.
    pub(crate) dims: Vec<u64>,
    /// Whether the loader insists on it.
    pub(crate) required: bool,
}

fn required(name: &'static str, dims: &[u64]) -> Slot {
    Slot { name, dims: dims.to_vec(), required: true }
}

fn optional(name: &'static str, dims: &[u64]) -> Slot {
    Slot { name, dims: dims.to_vec(), required: false }
}

/// The dimensions that shapes are made of.
struct Dims {
    d: u64,
    q: u64,
    k: u64,
    v: u64,
    ff: u64,
    experts: u64,
    expert_ff: u64,
    shared_ff: u64,
    heads: u64,
    vocabulary: u64,
    key_length: u64,
    half_rope: u64,
}

impl Dims {
    fn of(arch: Arch, facts: &Facts) -> Self {
        let head = |n: u32, length: u32| u64::from(n) * u64::from(length);
        let d = u64::from(facts.embedding_length);
        let key = if arch == Arch::GptOss { facts.rope_dimensions } else { facts.key_length };
        let value = if matches!(arch, Arch::Llama | Arch::Mistral3 | Arch::SmolLm3 | Arch::Gemma2 | Arch::Gemma3) {
            facts.value_length
        } else {
            key
        };
        Self {
            d,
            q: if arch.heads_fill_embedding() { d } else { head(facts.heads, key) },
            k: head(facts.kv_heads, key),
            v: head(facts.kv_heads, value),
            ff: facts.feed_forward_length.into(),
            experts: facts.experts.into(),
            expert_ff: facts.expert_feed_forward_length.into(),
            shared_ff: facts.shared_feed_forward_length.into(),
            heads: facts.heads.into(),
            vocabulary: facts.vocabulary.into(),
            key_length: facts.key_length.into(),
            half_rope: u64::from(facts.rope_dimensions) / 2,
        }
    }
}

/// Tensors of one layer, without the `blk.N.` prefix.
pub(crate) fn layer(arch: Arch, facts: &Facts) -> Vec<Slot> {
    let n = Dims::of(arch, facts);
    let mut slots = Vec::new();
    attention(arch, &n, &mut slots);
    if arch.has_experts(facts.experts) {
        experts(arch, &n, &mut slots);
    } else {
        dense(arch, &n, &mut slots);
    }
    slots
}

fn attention(arch: Arch, n: &Dims, slots: &mut Vec<Slot>) {
    if !matches!(arch, Arch::Olmo2 | Arch::Bert) {
        slots.push(required("attn_norm.weight", &[n.d]));
    }
    // Either fused or separate: the checker knows that one stands for the other.
    let fused = arch == Arch::Phi3;
    let qkv = n.q + n.k + n.v;
    slots.push(Slot { name: "attn_qkv.weight", dims: vec![n.d, qkv], required: fused });
    slots.push(optional("attn_qkv.bias", &[qkv]));
    for (weight, bias, rows) in [
        ("attn_q.weight", "attn_q.bias", n.q),
        ("attn_k.weight", "attn_k.bias", n.k),
        ("attn_v.weight", "attn_v.bias", n.v),
    ] {
        slots.push(Slot { name: weight, dims: vec![n.d, rows], required: !fused });
        slots.push(optional(bias, &[rows]));
    }
    slots.push(required("attn_output.weight", &[n.q, n.d]));
    match arch {
        Arch::Llama | Arch::Mistral3 | Arch::Bert => slots.push(optional("attn_output.bias", &[n.d])),
        Arch::GptOss => {
            slots.push(required("attn_output.bias", &[n.d]));
            slots.push(required("attn_sinks.weight", &[n.heads]));
        }
        _ => {}
    }
    match arch {
        Arch::Qwen3 | Arch::Qwen3Moe | Arch::Gemma3 => {
            slots.push(required("attn_q_norm.weight", &[n.key_length]));
            slots.push(required("attn_k_norm.weight", &[n.key_length]));
        }
        Arch::Olmo2 => {
            slots.push(required("attn_q_norm.weight", &[n.d]));
            slots.push(required("attn_k_norm.weight", &[n.k]));
        }
        _ => {}
    }
    if matches!(arch, Arch::Gemma2 | Arch::Gemma3 | Arch::Olmo2 | Arch::GptOss) {
        slots.push(required("post_attention_norm.weight", &[n.d]));
    }
    if matches!(arch, Arch::Gemma2 | Arch::Gemma3 | Arch::Olmo2) {
        slots.push(required("post_ffw_norm.weight", &[n.d]));
    }
    if arch == Arch::Bert {
        for name in
            ["attn_output_norm.weight", "attn_output_norm.bias", "layer_output_norm.weight", "layer_output_norm.bias"]
        {
            slots.push(required(name, &[n.d]));
        }
    }
    if !matches!(arch, Arch::Olmo2 | Arch::GptOss | Arch::Bert) {
        slots.push(required("ffn_norm.weight", &[n.d]));
    }
}

fn dense(arch: Arch, n: &Dims, slots: &mut Vec<Slot>) {
    let gated = !matches!(arch, Arch::Phi3 | Arch::Bert);
    if gated {
        slots.push(required("ffn_gate.weight", &[n.d, n.ff]));
    }
    // Phi 3 keeps gate and up in one matrix.
    let up = if arch == Arch::Phi3 { 2 * n.ff } else { n.ff };
    slots.push(required("ffn_up.weight", &[n.d, up]));
    slots.push(required("ffn_down.weight", &[n.ff, n.d]));
    if matches!(arch, Arch::Llama | Arch::Mistral3) {
        slots.push(optional("ffn_gate.bias", &[n.ff]));
    }
    if matches!(arch, Arch::Llama | Arch::Mistral3 | Arch::Bert) {
        slots.push(optional("ffn_up.bias", &[n.ff]));
        slots.push(optional("ffn_down.bias", &[n.d]));
    }
}

fn experts(arch: Arch, n: &Dims, slots: &mut Vec<Slot>) {
    slots.push(required("ffn_gate_inp.weight", &[n.d, n.experts]));
    slots.push(required("ffn_gate_exps.weight", &[n.d, n.expert_ff, n.experts]));
    slots.push(required("ffn_up_exps.weight", &[n.d, n.expert_ff, n.experts]));
    slots.push(required("ffn_down_exps.weight", &[n.expert_ff, n.d, n.experts]));
    match arch {
        Arch::GptOss => {
            slots.push(required("ffn_gate_inp.bias", &[n.experts]));
            slots.push(required("ffn_gate_exps.bias", &[n.expert_ff, n.experts]));
            slots.push(required("ffn_up_exps.bias", &[n.expert_ff, n.experts]));
            slots.push(required("ffn_down_exps.bias", &[n.d, n.experts]));
        }
        Arch::Qwen2Moe => {
            slots.push(required("ffn_gate_inp_shexp.weight", &[n.d]));
            slots.push(required("ffn_gate_shexp.weight", &[n.d, n.shared_ff]));
            slots.push(required("ffn_up_shexp.weight", &[n.d, n.shared_ff]));
            slots.push(required("ffn_down_shexp.weight", &[n.shared_ff, n.d]));
        }
        _ => {}
    }
}

/// Tensors that belong to no layer.
pub(crate) fn global(arch: Arch, facts: &Facts) -> Vec<Slot> {
    let n = Dims::of(arch, facts);
    let mut slots = vec![required("token_embd.weight", &[n.d, n.vocabulary])];
    if arch == Arch::Bert {
        slots.push(required("position_embd.weight", &[n.d, facts.context_length.into()]));
        slots.push(required("token_embd_norm.weight", &[n.d]));
        slots.push(required("token_embd_norm.bias", &[n.d]));
        slots.push(optional("token_types.weight", &[n.d, 2]));
        return slots;
    }
    slots.push(required("output_norm.weight", &[n.d]));
    match arch.head() {
        Head::Required => slots.push(required("output.weight", &[n.d, n.vocabulary])),
        Head::Optional => slots.push(optional("output.weight", &[n.d, n.vocabulary])),
        Head::Tied | Head::None => {}
    }
    if arch == Arch::Qwen2 {
        slots.push(optional("output.bias", &[n.vocabulary]));
    }
    if matches!(arch, Arch::Llama | Arch::Mistral3) {
        slots.push(optional("rope_freqs.weight", &[n.half_rope]));
    }
    if matches!(arch, Arch::Llama | Arch::Mistral3 | Arch::Phi3) {
        slots.push(optional("rope_factors_long.weight", &[n.half_rope]));
        slots.push(optional("rope_factors_short.weight", &[n.half_rope]));
    }
    slots
}

/// Whether `name` may be absent because the fused or the separate form of the same projection is there.
pub(crate) fn is_qkv(name: &str) -> bool {
    matches!(name, "attn_qkv.weight" | "attn_q.weight" | "attn_k.weight" | "attn_v.weight")
}
