//! May llama.cpp see this file? It answers what it does not expect with an exception at best, and with `abort()` or a
//! wild read at worst. This module refuses the latter beforehand.
//!
//! Each rule names the place in llama.cpp that would fail. For the architectures in [`crate::arch`] the shapes of all
//! tensors are checked as well; for others the general rules must do, and the engine's child process does the rest.

use crate::arch::{Arch, Window};
use crate::error::{GgufError, GgufErrorKind};
use crate::facts::{Facts, LAYERS_MAX};
use crate::gguf::Gguf;
use crate::layout::{self, Slot};
use crate::parse::TensorInfo;
use crate::tensor_type::TensorType;
use crate::value::Value;
use crate::vocabulary;

/// llama.cpp's `LLAMA_MAX_EXPERTS`.
const EXPERTS_MAX: u32 = 1024;
/// Widest hidden state, feed-forward part or head accepted. The widest known model has 53,248.
const WIDTH_MAX: u32 = 1 << 20;
/// Most attention heads accepted.
const HEADS_MAX: u32 = 4096;
/// Longest context accepted: positions are 32-bit and get multiplied.
const CONTEXT_MAX: u32 = 1 << 27;

/// The answer of a rule: fine, or the reason why not.
type Rule = Result<(), String>;

impl Gguf {
    /// Checks that llama.cpp can load and run this file without reaching an assertion.
    pub fn validate_for_engine(&self) -> Result<(), GgufError> {
        check(self).map_err(|reason| GgufError::new(self.path(), GgufErrorKind::Unrunnable(reason)))
    }

    /// Checks that llama.cpp can load the vocabulary of this file, and nothing else of it, without reaching an assertion.
    /// The file may have weights or none.
    pub fn validate_vocabulary(&self) -> Result<(), GgufError> {
        let checked = check_tokenizer(self).and_then(|()| is_in_one_file(self));
        checked.map_err(|reason| GgufError::new(self.path(), GgufErrorKind::Unrunnable(reason)))
    }
}

/// The first reason, if any, why this file's tokenizer cannot be used.
pub(crate) fn check_tokenizer(gguf: &Gguf) -> Rule {
    states_architecture(gguf)?;
    vocabulary::check(gguf)?;
    if gguf.tokens().is_none() {
        return Err("it has no vocabulary".into());
    }
    Ok(())
}

fn states_architecture(gguf: &Gguf) -> Rule {
    if gguf.architecture().is_empty() {
        return Err("it does not state its architecture (general.architecture); it is not a language model".into());
    }
    Ok(())
}

/// llama.cpp opens the other parts, by names that it derives from this one's.
fn is_in_one_file(gguf: &Gguf) -> Rule {
    if let Some(count @ 2..) = gguf.u32("split.count") {
        let part = gguf.u32("split.no").unwrap_or(0).saturating_add(1);
        return Err(format!(
            "it is part {part} of {count} of a model in several files; merge them with llama-gguf-split --merge"
        ));
    }
    Ok(())
}

fn check(gguf: &Gguf) -> Rule {
    states_architecture(gguf)?;
    if gguf.tensors().is_empty() {
        return Err("it holds no weights, only a vocabulary; fetch the model itself".into());
    }
    is_in_one_file(gguf)?;
    contiguous(gguf)?;
    weight_types(gguf)?;
    vocabulary::check(gguf)?;
    if let Some(layers) = gguf.layer_count()
        && (layers == 0 || layers > LAYERS_MAX)
    {
        return Err(format!("it states {layers} layers; llama.cpp takes 1 to {LAYERS_MAX}"));
    }
    if let Some(arch) = Arch::from_name(gguf.architecture()) {
        let facts = Facts::of(gguf)?;
        uniform_layers(gguf)?;
        widths(arch, &facts)?;
        experts(gguf, arch, &facts)?;
        windows(gguf, arch, &facts)?;
        numbers(gguf, arch)?;
        shapes(gguf, arch, &facts)?;
    }
    Ok(())
}

/// `gguf_init_from_reader`: tensors follow each other in order, each padded, without gaps.
fn contiguous(gguf: &Gguf) -> Rule {
    let mut expected = gguf.data_offset();
    for tensor in gguf.tensors() {
        if tensor.offset != expected {
            return Err(format!(
                "the tensor {} is not where llama.cpp expects it; write the file anew with gguf-py",
                tensor.name
            ));
        }
        expected = (tensor.offset + tensor.bytes).next_multiple_of(gguf.alignment().into());
    }
    Ok(())
}

/// F64 has no kernels (a call through a null pointer); integers and ggml's internal formats have none either.
fn weight_types(gguf: &Gguf) -> Rule {
    match gguf.tensors().iter().find(|tensor| !tensor.ty.is_weight()) {
        Some(tensor) => Err(format!(
            "the tensor {} has the type {}, which llama.cpp cannot compute with; quantize the model anew",
            tensor.name, tensor.ty
        )),
        None => Ok(()),
    }
}

/// The known architectures read layer 0's value for all; the cache then disagrees with the graph.
fn uniform_layers(gguf: &Gguf) -> Rule {
    for suffix in [
        "attention.head_count",
        "attention.head_count_kv",
        "feed_forward_length",
        "expert_feed_forward_length",
        "expert_used_count",
    ] {
        let Some(Value::Array(array)) = gguf.arch_get(suffix) else {
            continue;
        };
        let values = array.integers().unwrap_or_default();
        if values.is_empty() || values.iter().any(|v| Some(v) != values.first()) {
            return Err(format!(
                "{} differs from layer to layer, which this architecture does not have",
                gguf.arch_key(suffix)
            ));
        }
    }
    Ok(())
}

fn in_range(what: &str, n: u32, max: u32) -> Rule {
    if n == 0 || n > max { Err(format!("its {what} is {n}; 1 to {max} make sense")) } else { Ok(()) }
}

/// Divisions by zero, and the assertions on head sizes at the top of each graph.
fn widths(arch: Arch, facts: &Facts) -> Rule {
    in_range("embedding length", facts.embedding_length, WIDTH_MAX)?;
    in_range("number of attention heads", facts.heads, HEADS_MAX)?;
    in_range("number of key-value heads", facts.kv_heads, facts.heads)?;
    in_range("key length", facts.key_length, WIDTH_MAX / facts.heads.max(1))?;
    in_range("value length", facts.value_length, WIDTH_MAX / facts.heads.max(1))?;
    in_range("context length", facts.context_length, CONTEXT_MAX)?;
    in_range("vocabulary size", facts.vocabulary, vocabulary::TOKENS_MAX)?;
    if facts.feed_forward_length > WIDTH_MAX
        || facts.expert_feed_forward_length > WIDTH_MAX
        || facts.shared_feed_forward_length > WIDTH_MAX
    {
        return Err("its feed-forward part is impossibly wide".into());
    }
    if !facts.heads.is_multiple_of(facts.kv_heads) {
        return Err(format!(
            "its {} attention heads cannot share {} key-value heads evenly",
            facts.heads, facts.kv_heads
        ));
    }
    if facts.key_length != facts.value_length {
        return Err(format!(
            "its keys have {} elements and its values {}; this architecture wants them equal",
            facts.key_length, facts.value_length
        ));
    }
    if arch.heads_fill_embedding() && facts.heads * facts.key_length != facts.embedding_length {
        return Err(format!(
            "its {} heads of {} elements do not fill its hidden state of {}",
            facts.heads, facts.key_length, facts.embedding_length
        ));
    }
    let rope = facts.rope_dimensions;
    if !rope.is_multiple_of(2) || rope > facts.key_length || rope == 0 {
        return Err(format!(
            "it rotates {rope} of {} elements per head; an even number from 2 to all is possible",
            facts.key_length
        ));
    }
    if arch.wants_equal_head_dims() && rope != facts.key_length {
        return Err(format!(
            "it rotates {rope} of {} elements per head; this architecture rotates all",
            facts.key_length
        ));
    }
    Ok(())
}

/// The block of assertions on experts in `llama_model_base::load_hparams`.
fn experts(gguf: &Gguf, arch: Arch, facts: &Facts) -> Rule {
    let (experts, used) = (facts.experts, facts.experts_used);
    if experts > EXPERTS_MAX || used > experts || (used == 0) != (experts == 0) {
        return Err(format!(
            "it uses {used} of {experts} experts; at least one, at most all, and at most {EXPERTS_MAX} are possible"
        ));
    }
    if arch.has_experts(experts) && (experts == 0 || facts.expert_feed_forward_length == 0) {
        return Err("its architecture has experts, but it states none".into());
    }
    let groups = gguf.arch_u32("expert_group_count").unwrap_or(0);
    if groups > 0 {
        let used = gguf.arch_u32("expert_group_used_count").unwrap_or(0);
        if groups >= experts || groups > 1 && (!experts.is_multiple_of(groups) || used == 0 || used >= groups) {
            return Err(format!("its {experts} experts cannot form {groups} groups of which {used} are used"));
        }
    }
    if gguf.arch_u32("nextn_predict_layers").is_some_and(|n| n > facts.layers) {
        return Err("it has more extra prediction layers than layers".into());
    }
    Ok(())
}

/// `llama_model::create_memory`: a window that no layer has, or a windowless windowed architecture, is an assertion.
fn windows(gguf: &Gguf, arch: Arch, facts: &Facts) -> Rule {
    // The graphs assert that heads are alike in layers with and without a window.
    for (suffix, length) in [
        ("attention.key_length_swa", facts.key_length),
        ("attention.value_length_swa", facts.value_length),
        ("rope.dimension_count_swa", facts.rope_dimensions),
    ] {
        if gguf.arch_get(suffix).is_some_and(|value| value.as_u32() != Some(length)) {
            return Err(format!("{} is not {length}, as in the layers without a window", gguf.arch_key(suffix)));
        }
    }
    let any = facts.windowed_layers.contains(&true);
    match (arch.window(), facts.sliding_window) {
        (Window::Never, _) | (Window::WhenDeclared { .. }, None) => Ok(()),
        (_, Some(window)) if any && window > 0 && window <= CONTEXT_MAX => Ok(()),
        (_, Some(window)) if any => Err(format!("its attention window of {window} tokens makes no sense")),
        _ => Err("it declares an attention window, but no layer has one".into()),
    }
}

/// Numbers that become divisors, square roots or enumerations.
fn numbers(gguf: &Gguf, arch: Arch) -> Rule {
    let epsilon = if arch == Arch::Bert { "attention.layer_norm_epsilon" } else { "attention.layer_norm_rms_epsilon" };
    match gguf.arch_f32(epsilon) {
        Some(x) if (0.0..1.0).contains(&x) => {}
        Some(x) => {
            return Err(format!("{} is {x}; a small positive number belongs there", gguf.arch_key(epsilon)));
        }
        None => {
            return Err(format!("the metadata key {} is missing", gguf.arch_key(epsilon)));
        }
    }
    let positive = [
        "rope.freq_base",
        "rope.freq_base_swa",
        "rope.scaling.attn_factor",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "expert_weights_scale",
    ];
    let not_negative = ["rope.scaling.factor", "rope.scale_linear", "attention.temperature_scale", "attention.scale"];
    for suffix in positive.into_iter().chain(not_negative) {
        let Some(value) = gguf.arch_get(suffix) else {
            continue;
        };
        // llama.cpp takes a scale of zero for "not set", but divides by caps.
        let zero_ok = not_negative.contains(&suffix);
        match value.as_f32() {
            Some(x) if x.is_finite() && (x > 0.0 || zero_ok && x == 0.0) => {}
            // A zero cap switches Gemma 3's off.
            Some(0.0) if suffix == "final_logit_softcapping" && arch == Arch::Gemma3 => {}
            _ => return Err(format!("{} is not a usable number", gguf.arch_key(suffix))),
        }
    }
    if let Some(value) = gguf.arch_get("rope.scaling.type") {
        let known = value.as_str().is_some_and(|name| matches!(name, "none" | "linear" | "yarn" | "longrope"));
        if !known {
            return Err(format!(
                "{} names no kind of scaling that llama.cpp knows",
                gguf.arch_key("rope.scaling.type")
            ));
        }
    }
    if let Some(original) = gguf.arch_get("rope.scaling.original_context_length")
        && original.as_u32().is_none_or(|n| n == 0 || n > CONTEXT_MAX)
    {
        return Err(format!("{} is not a usable number", gguf.arch_key("rope.scaling.original_context_length")));
    }
    // LLAMA_POOLING_TYPE_NONE to _RANK.
    if gguf.arch_get("pooling_type").is_some_and(|value| value.as_u32().is_none_or(|n| n > 4)) {
        return Err(format!("{} names no kind of pooling", gguf.arch_key("pooling_type")));
    }
    Ok(())
}

/// Shapes as `load_arch_tensors` wants them, and vectors in F32: ggml adds and multiplies by nothing else.
fn shapes(gguf: &Gguf, arch: Arch, facts: &Facts) -> Rule {
    let globals = layout::global(arch, facts);
    let layers = layout::layer(arch, facts);
    for slot in &globals {
        fits(gguf, slot, slot.name, false)?;
    }
    for il in 0..facts.layers {
        let has = |name: &str| gguf.tensor(&format!("blk.{il}.{name}")).is_some();
        let fused = has("attn_qkv.weight");
        for slot in &layers {
            let replaced = layout::is_qkv(slot.name) && (fused || arch == Arch::Phi3);
            fits(gguf, slot, &format!("blk.{il}.{}", slot.name), replaced)?;
        }
        if arch == Arch::Phi3 && !fused && !has("attn_q.weight") {
            return Err(format!("the tensor blk.{il}.attn_qkv.weight is missing"));
        }
    }
    for tensor in gguf.tensors() {
        if tensor.layer().is_some_and(|(il, _)| il >= facts.layers) {
            return Err(format!("the tensor {} belongs to a layer beyond the {} it states", tensor.name, facts.layers));
        }
        let vector = tensor.dims.len() == 1 || tensor.name.ends_with(".bias");
        if vector && tensor.ty != TensorType::F32 {
            return Err(format!(
                "the tensor {} has the type {}; llama.cpp computes with vectors in F32 only",
                tensor.name, tensor.ty
            ));
        }
    }
    // llama_model_base::load_tensors: scales of a head that is not there.
    let scaled = gguf.tensor("output.scale").is_some() || gguf.tensor("output.input_scale").is_some();
    if scaled && gguf.tensor("output.weight").is_none() {
        return Err("it has scales for a head, but no head".into());
    }
    Ok(())
}

fn fits(gguf: &Gguf, slot: &Slot, name: &str, replaced: bool) -> Rule {
    match gguf.tensor(name) {
        Some(tensor) if same_shape(tensor, &slot.dims) => Ok(()),
        Some(tensor) => Err(format!("the tensor {name} has the shape {:?}, not {:?}", tensor.dims, slot.dims)),
        None if slot.required && !replaced => Err(format!("the tensor {name} is missing")),
        None => Ok(()),
    }
}

/// Trailing dimensions of one do not count.
fn same_shape(tensor: &TensorInfo, dims: &[u64]) -> bool {
    (0..4).all(|i| tensor.dims.get(i).copied().unwrap_or(1) == dims.get(i).copied().unwrap_or(1))
}
