//! Cuts a model by layers: writes the part that one stage runs as a GGUF file that unpatched llama.cpp loads.
//!
//! llama.cpp's loader wants every tensor it knows of and none besides, so a stage file is a complete model with fewer
//! layers, numbered from zero. What differs by position in the ring:
//!
//! | stage | embedding | head | tokenizer |
//! |---|---|---|---|
//! | first | real: takes token ids | never used; zeros where the loader insists on one | real |
//! | middle | zeros for 32 tokens: takes hidden states | zeros where the loader insists | none |
//! | last | never used: the head takes its name, or zeros | real | real |
//!
//! A stage that is not the last stops computing after its last layer (see [`crate::hidden_tap_name`]), so the head it
//! carries is never read. Zeros are holes in the file. Metadata that counts layers or lists something per layer is cut
//! with them; what llama.cpp derives from a layer's number is written out, or the cut is refused.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use crate::arch::{Arch, Head, Window};
use crate::facts::Facts;
use crate::gguf::Gguf;
use crate::manifest::{ByteRange, join};
use crate::parse::TensorInfo;
use crate::range::LayerRange;
use crate::tensor_type::TensorType;
use crate::value::Value;
use crate::write::{GgufBuilder, TensorSource, WriteError};

/// Tokens of the stand-in vocabulary of a middle stage.
const DUMMY_VOCABULARY: u32 = 32;

/// A window that never ends, for stages whose layers all attend to everything but whose architecture cannot do without
/// one. Small enough that llama.cpp's 32-bit `n_swa * n_seq_max` holds for 256 sequences.
const ENDLESS_WINDOW: u32 = 1 << 22;

/// Keys that may hold one value per layer (llama.cpp's `get_key_or_arr`).
const PER_LAYER_KEYS: &[&str] = &[
    "attention.head_count",
    "attention.head_count_kv",
    "attention.recurrent_layers",
    "attention.rope_pattern",
    "attention.sliding_window_pattern",
    "expert_feed_forward_length",
    "expert_used_count",
    "feed_forward_length",
    "swiglu_clamp_exp",
    "swiglu_clamp_shexp",
];

/// Keys that hold arrays of another kind, whatever their length.
const OTHER_ARRAY_KEYS: &[&str] = &["rope.dimension_sections"];

/// Keys of features that tie layers together or add some; a model that uses one is not cut.
const REFUSED_KEYS: &[(&str, &str)] = &[
    ("nextn_predict_layers", "it has extra layers that predict further tokens"),
    ("n_deepstack_layers", "it feeds image features into several layers"),
    ("attention.shared_kv_layers", "its layers share keys and values"),
    ("embedding_length_per_layer_input", "it has embeddings for every layer"),
    ("adapters.count", "it has embedded adapters"),
];

/// Tensors that every stage needs.
const GLOBAL_TENSORS: &[&str] =
    &["output_norm.weight", "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"];

/// Why a model was not cut.
#[derive(Debug, thiserror::Error)]
pub enum SliceError {
    /// Not on the list of architectures.
    #[error(
        "models of architecture {architecture:?} cannot be split by layers yet; run it whole on one machine that has the memory"
    )]
    UnknownArchitecture {
        /// What the file calls itself.
        architecture: String,
    },
    /// A known architecture, but something about this model.
    #[error("this model cannot be split by layers: {0}; run it whole on one machine that has the memory")]
    Unsupported(String),
    /// The range is empty or reaches past the last layer.
    #[error("the layers {range} are not a part of this model, which has the layers 0..{layers}")]
    OutOfRange {
        /// What was asked for.
        range: LayerRange,
        /// Number of layers.
        layers: u32,
    },
    /// The range is the whole model.
    #[error("the layers {0} are the whole model; use the original file")]
    WholeModel(LayerRange),
    /// The model cannot be cut there.
    #[error("the layers {range} cannot be cut out: this model can only be cut before the layers {}", list(allowed))]
    CutNotAllowed {
        /// What was asked for.
        range: LayerRange,
        /// Where cuts are possible.
        allowed: Vec<u32>,
    },
    /// More stages than pieces.
    #[error("this model cannot be split into {stages} stages; 1 to {stages_max} are possible")]
    StageCount {
        /// What was asked for.
        stages: u32,
        /// The most that are possible.
        stages_max: u32,
    },
    /// The original could not be read.
    #[error("{}: reading failed: {source}; check the disk and try again", path.display())]
    Read {
        /// The original.
        path: std::path::PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The original is not the file any more that was opened.
    #[error("{}: the file changed while it was in use; start again", path.display())]
    Changed {
        /// The original.
        path: std::path::PathBuf,
    },
    /// The slice could not be written.
    #[error(transparent)]
    Write(#[from] WriteError),
}

fn list(cuts: &[u32]) -> String {
    cuts.iter().map(u32::to_string).collect::<Vec<_>>().join(", ")
}

/// A model that can be cut.
pub(crate) struct Source<'a> {
    pub(crate) gguf: &'a Gguf,
    pub(crate) arch: Arch,
    pub(crate) facts: Facts,
    embedding: &'a TensorInfo,
}

/// Writes the stage file of `range`.
///
/// The file says in `murmur.slice.first`, `.end` and `.layers` what it is a part of.
pub fn slice(gguf: &Gguf, range: LayerRange, out: impl AsRef<Path>) -> Result<(), SliceError> {
    let mut builder = SliceWriter::plan(&Source::of(gguf)?, range)?.builder;
    builder.share_blocks()?;
    builder.write(out)?;
    Ok(())
}

/// The bytes of the file that [`slice()`] reads for `range`, ascending: the header and the tensors of the stage, joined where
/// only padding lies between. Nothing else needs to be on disk for the stage file to be written.
pub fn slice_ranges(gguf: &Gguf, range: LayerRange) -> Result<Vec<ByteRange>, SliceError> {
    let mut reads = SliceWriter::plan(&Source::of(gguf)?, range)?.reads;
    reads.push(ByteRange { start: 0, end: gguf.header_bytes() });
    Ok(join(reads, gguf.alignment().into()))
}

impl<'a> Source<'a> {
    /// Checks that the model can be cut.
    pub(crate) fn of(gguf: &'a Gguf) -> Result<Self, SliceError> {
        let unsupported = |reason: String| SliceError::Unsupported(reason);
        let arch = Arch::from_name(gguf.architecture()).filter(|arch| arch.can_slice());
        let Some(arch) = arch else {
            return Err(SliceError::UnknownArchitecture { architecture: gguf.architecture().to_owned() });
        };
        if gguf.u32("split.count").is_some_and(|count| count > 1) {
            return Err(unsupported(
                "it is one part of a model in several files; merge them with llama-gguf-split --merge".into(),
            ));
        }
        if gguf.get("murmur.slice.first").is_some() {
            return Err(unsupported("it is itself a part of a model; cut the whole one".into()));
        }
        let facts = Facts::of(gguf).map_err(unsupported)?;
        for (key, reason) in REFUSED_KEYS {
            if gguf.arch_u32(key).is_some_and(|n| n > 0) {
                return Err(unsupported((*reason).to_owned()));
            }
        }
        let Some(embedding) = gguf.tensor("token_embd.weight") else {
            return Err(unsupported("the tensor token_embd.weight is missing".into()));
        };
        if embedding.dims != [u64::from(facts.embedding_length), u64::from(facts.vocabulary)] {
            return Err(unsupported(format!(
                "the embedding has the shape {:?}, not {} x {}",
                embedding.dims, facts.embedding_length, facts.vocabulary
            )));
        }
        let source = Self { gguf, arch, facts, embedding };
        source.check_tensors().map_err(unsupported)?;
        source.check_arrays().map_err(unsupported)?;
        if source.attention_scale_changes(source.facts.layers, 1) {
            return Err(unsupported("llama.cpp knows its attention scale only by its number of layers".into()));
        }
        Ok(source)
    }

    fn check_tensors(&self) -> Result<(), String> {
        let mut seen = vec![false; self.facts.layers as usize];
        for tensor in self.gguf.tensors() {
            let name = tensor.name.as_str();
            match tensor.layer() {
                Some((il, _)) => match seen.get_mut(il as usize) {
                    Some(seen) => *seen = true,
                    None => {
                        return Err(format!(
                            "the tensor {name} belongs to a layer beyond the {} it states",
                            self.facts.layers
                        ));
                    }
                },
                None => {
                    let known = GLOBAL_TENSORS.contains(&name)
                        || matches!(
                            name,
                            "token_embd.weight"
                                | "output.weight"
                                | "output.bias"
                                | "output.scale"
                                | "output.input_scale"
                        );
                    if !known {
                        return Err(format!("it has the tensor {name}, and no rule says which stage that belongs to"));
                    }
                }
            }
        }
        if let Some(il) = seen.iter().position(|seen| !seen) {
            return Err(format!("it has no tensors for layer {il}"));
        }
        for required in ["output_norm.weight", "output.weight"] {
            let needed = required == "output_norm.weight" || self.arch.head() == Head::Required;
            if needed && self.gguf.tensor(required).is_none() {
                return Err(format!("the tensor {required} is missing"));
            }
        }
        if let Some(output) = self.gguf.tensor("output.weight")
            && output.dims != self.embedding.dims
        {
            return Err(format!(
                "the head has the shape {:?}, not the embedding's {:?}",
                output.dims, self.embedding.dims
            ));
        }
        Ok(())
    }

    /// An array with one value per layer that no rule knows would go wrong silently.
    fn check_arrays(&self) -> Result<(), String> {
        let prefix = format!("{}.", self.gguf.architecture());
        for (key, value) in self.gguf.keys() {
            let (Some(suffix), Some(array)) = (key.strip_prefix(&prefix), value.as_array()) else {
                continue;
            };
            let per_layer = array.len() == self.facts.layers as usize;
            if PER_LAYER_KEYS.contains(&suffix) {
                if !per_layer {
                    return Err(format!("{key} lists {} values for {} layers", array.len(), self.facts.layers));
                }
            } else if per_layer && !OTHER_ARRAY_KEYS.contains(&suffix) {
                return Err(format!("{key} lists a value per layer, and no rule says what it means"));
            }
        }
        Ok(())
    }

    /// Whether llama.cpp would take models of `a` and `b` layers for different ones and scale attention differently.
    fn attention_scale_changes(&self, a: u32, b: u32) -> bool {
        let special = self.arch.layers_of_27b();
        let by_width = self.facts.embedding_length / self.facts.heads;
        special.is_some_and(|n| (a == n) != (b == n)) && by_width != self.facts.key_length
    }

    /// Where the model may be cut.
    pub(crate) fn allowed_cuts(&self) -> Vec<u32> {
        (1..self.facts.layers).filter(|cut| cut % self.arch.cut_multiple() == 0).collect()
    }

    fn check(&self, range: LayerRange) -> Result<(), SliceError> {
        let layers = self.facts.layers;
        if range.is_empty() || range.end > layers {
            return Err(SliceError::OutOfRange { range, layers });
        }
        if range == LayerRange::new(0, layers) {
            return Err(SliceError::WholeModel(range));
        }
        let allowed = self.allowed_cuts();
        let on_cut = |edge: u32| edge == 0 || edge == layers || allowed.binary_search(&edge).is_ok();
        if !on_cut(range.first) || !on_cut(range.end) {
            return Err(SliceError::CutNotAllowed { range, allowed });
        }
        if self.attention_scale_changes(layers, range.len()) {
            return Err(SliceError::Unsupported(format!(
                "llama.cpp would take a part of {} layers for another model",
                range.len()
            )));
        }
        Ok(())
    }

    fn output(&self) -> Option<&'a TensorInfo> {
        self.gguf.tensor("output.weight")
    }
}

struct SliceWriter<'a, 'b> {
    source: &'b Source<'a>,
    range: LayerRange,
    file: Arc<File>,
    builder: GgufBuilder<'static>,
    /// What is copied from the file.
    reads: Vec<ByteRange>,
}

impl<'a, 'b> SliceWriter<'a, 'b> {
    /// Decides what the stage file consists of; nothing of the tensors is read yet.
    fn plan(source: &'b Source<'a>, range: LayerRange) -> Result<Self, SliceError> {
        source.check(range)?;
        let gguf = source.gguf;
        let read_error = |source| SliceError::Read { path: gguf.path().to_path_buf(), source };
        let file = File::open(gguf.path()).map_err(read_error)?;
        if file.metadata().map_err(read_error)?.len() != gguf.file_bytes() {
            return Err(SliceError::Changed { path: gguf.path().to_path_buf() });
        }
        let mut plan = Self { source, range, file: Arc::new(file), builder: GgufBuilder::default(), reads: vec![] };
        plan.keys()?;
        plan.tensors()?;
        Ok(plan)
    }

    fn is_first(&self) -> bool {
        self.range.first == 0
    }

    fn is_last(&self) -> bool {
        self.range.end == self.source.facts.layers
    }

    /// A stage between others sees neither tokens nor logits.
    fn is_middle(&self) -> bool {
        !self.is_first() && !self.is_last()
    }

    fn vocabulary(&self) -> u32 {
        if self.is_middle() { DUMMY_VOCABULARY } else { self.source.facts.vocabulary }
    }

    fn keys(&mut self) -> Result<(), SliceError> {
        let gguf = self.source.gguf;
        let prefix = format!("{}.", gguf.architecture());
        for (key, value) in gguf.keys() {
            if key.starts_with("split.")
                || key.starts_with("murmur.slice.")
                || self.is_middle() && key.starts_with("tokenizer.")
            {
                continue;
            }
            let value = match (key.strip_prefix(&prefix), value) {
                (Some(suffix), Value::Array(array)) if PER_LAYER_KEYS.contains(&suffix) => {
                    let cut = array.cut(self.range.first as usize..self.range.end as usize);
                    Value::Array(
                        cut.ok_or_else(|| SliceError::Unsupported(format!("{key} is shorter than the model")))?,
                    )
                }
                _ => value.clone(),
            };
            self.builder.set(key, value);
        }
        let mut set = |suffix: &str, value: Value| {
            self.builder.set(format!("{prefix}{suffix}"), value);
        };
        set("block_count", self.range.len().into());
        if let Some(dense) = gguf.arch_u32("leading_dense_block_count") {
            set("leading_dense_block_count", dense.saturating_sub(self.range.first).min(self.range.len()).into());
        }
        let vocabulary = self.vocabulary();
        self.builder.set(format!("{prefix}vocab_size"), vocabulary);
        if self.is_middle() {
            self.builder.set("tokenizer.ggml.model", "no_vocab");
        }
        self.window_keys(&prefix);
        self.builder.set("murmur.slice.first", self.range.first);
        self.builder.set("murmur.slice.end", self.range.end);
        self.builder.set("murmur.slice.layers", self.source.facts.layers);
        Ok(())
    }

    /// Writes out which layers have a window, because llama.cpp would count from the stage's first layer.
    fn window_keys(&mut self, prefix: &str) {
        let facts = &self.source.facts;
        let Some(window) = facts.sliding_window else {
            return;
        };
        let range = self.range.first as usize..self.range.end as usize;
        let windowed = facts.windowed_layers.get(range).unwrap_or_default().to_vec();
        let any = windowed.contains(&true);
        let key = |suffix: &str| format!("{prefix}{suffix}");
        let pattern = key("attention.sliding_window_pattern");
        match self.source.arch.window() {
            _ if any => {
                self.builder.set(key("attention.sliding_window"), window);
                self.builder.set(pattern, windowed);
            }
            // A window that no layer has is an assertion in llama.cpp.
            Window::WhenDeclared { .. } | Window::Never => {
                self.builder.set(key("attention.sliding_window"), 0u32);
                self.builder.set(pattern, windowed);
            }
            // No window at all is one as well. One that never ends is the same as none, with the same rotary base.
            Window::Always { .. } => {
                self.builder.set(key("attention.sliding_window"), ENDLESS_WINDOW);
                self.builder.set(pattern, vec![true; windowed.len()]);
                let rope_base = self.source.gguf.arch_f32("rope.freq_base").unwrap_or(10_000.0);
                self.builder.set(key("rope.freq_base_swa"), rope_base);
            }
        }
    }

    fn tensors(&mut self) -> Result<(), SliceError> {
        let source = self.source;
        let head = source.output().unwrap_or(source.embedding);
        // The head must keep its own name where the loader wants it there, or where scales refer to it by that name.
        let scaled = source.gguf.tensor("output.scale").is_some() || source.gguf.tensor("output.input_scale").is_some();
        let keeps_output = source.output().is_some() && (source.arch.head() == Head::Required || scaled);

        let embedding = source.embedding;
        match (self.is_first(), self.is_last()) {
            (true, _) => self.copy("token_embd.weight", embedding)?,
            (_, true) if !keeps_output => self.copy("token_embd.weight", head)?,
            _ => self.dummy("token_embd.weight")?,
        }
        for tensor in source.gguf.tensors() {
            match tensor.layer() {
                Some((il, rest)) if self.range.contains(il) => {
                    self.copy(&format!("blk.{}.{rest}", il - self.range.first), tensor)?
                }
                Some(_) => {}
                None if GLOBAL_TENSORS.contains(&tensor.name.as_str()) => self.copy(&tensor.name, tensor)?,
                // What goes with the head stays with it.
                None if self.is_last() && tensor.name == "output.bias" => self.copy(&tensor.name, tensor)?,
                None if self.is_last() && keeps_output && tensor.name.starts_with("output.") => {
                    self.copy(&tensor.name, tensor)?
                }
                None => {}
            }
        }
        if source.arch.head() == Head::Required && !self.is_last() {
            self.dummy("output.weight")?;
        }
        Ok(())
    }

    fn copy(&mut self, name: &str, tensor: &TensorInfo) -> Result<(), SliceError> {
        let source = TensorSource::FileRange { file: Arc::clone(&self.file), offset: tensor.offset };
        self.builder.tensor(name, &tensor.dims, tensor.ty, source)?;
        self.reads.push(ByteRange { start: tensor.offset, end: tensor.offset + tensor.bytes });
        Ok(())
    }

    /// A matrix of zeros with the shape of the embedding, in the smallest type whose blocks divide its rows.
    fn dummy(&mut self, name: &str) -> Result<(), SliceError> {
        const SMALLEST_FIRST: [TensorType; 5] =
            [TensorType::Q1_0, TensorType::TQ1_0, TensorType::Q2_0, TensorType::Q4_0, TensorType::F16];
        let columns = u64::from(self.source.facts.embedding_length);
        let ty = SMALLEST_FIRST.into_iter().find(|ty| ty.row_bytes(columns).is_some()).unwrap_or(TensorType::F16);
        self.builder.tensor(name, &[columns, self.vocabulary().into()], ty, TensorSource::Zeros)?;
        Ok(())
    }
}
