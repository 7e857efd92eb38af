//! What a model is, in numbers and digests: what a planner needs to place it and a peer to trust a copy of it.
//!
//! # Digests
//!
//! All are BLAKE3.
//! - The *file* digest covers every byte of the file.
//! - A *part* digest covers a layer, the embedding, the head or the shared tensors, whatever file they are in. It is
//!   BLAKE3 in key-derivation mode (context [`PART_CONTEXT`]) of the following for each tensor of the part, in ascending
//!   order of part names: length of the name (u32), name, type id (u32), number of dimensions (u32), dimensions (u64
//!   each), BLAKE3 of the tensor's data (32 bytes); all integers little-endian. The part name of a layer's tensor is its
//!   name without `blk.N.`; that of the matrix that serves as head is `output.weight`, whether or not it is tied.
//! - The *tokenizer* digest is the same mode (context [`TOKENIZER_CONTEXT`]) of all `tokenizer.*` keys but the chat
//!   templates, in ascending order: each as it stands in a file.
//!
//! - The *manifest* digest, which people sign, is the same mode (context [`MANIFEST_CONTEXT`]) of the file digest, the file's length
//!   (u64), the architecture (length as u32, text), the number of layers in all (u32), the parts in this order: the layers, the embedding,
//!   the head, the shared tensors, the tokenizer; each as 1 and itself or, where there is none, as 0 (u8). A part is its digest, its bytes
//!   (u64), the number of its ranges (u32) and these (two u64 each); the tokenizer is its digest. Then the shape: 0, or 1 and the numbers of
//!   [`Facts`] from `embedding_length` to `experts_used`, in their order (u32 each).
//!
//! So a layer has the same digest in the whole model and in a slice, where it has another number and another place.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::str::FromStr;

use serde::Serialize;

use crate::error::{GgufError, GgufErrorKind};
use crate::facts::Facts;
use crate::gguf::Gguf;
use crate::parse::TensorInfo;
use crate::range::{LayerRange, allowed_cuts, sliceable};
use crate::tensor_type::TensorType;
use crate::value::encode_bytes;

/// Key-derivation context of part digests.
pub const PART_CONTEXT: &str = "murmur 2026 gguf part digest v1";
/// Key-derivation context of tokenizer digests.
pub const TOKENIZER_CONTEXT: &str = "murmur 2026 gguf tokenizer digest v1";

/// Key-derivation context of manifest digests.
pub const MANIFEST_CONTEXT: &str = "murmur 2026 gguf manifest digest v1";

/// Bytes read at a time.
const CHUNK_BYTES: usize = 1 << 20;

/// A BLAKE3 digest, written as 64 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest(pub [u8; 32]);

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&blake3::Hash::from_bytes(self.0).to_hex())
    }
}

impl From<blake3::Hash> for Digest {
    fn from(hash: blake3::Hash) -> Self {
        Self(*hash.as_bytes())
    }
}

/// The text is not 64 hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a BLAKE3 digest; 64 hexadecimal digits are")]
pub struct ParseDigestError(String);

impl FromStr for Digest {
    type Err = ParseDigestError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        blake3::Hash::from_hex(text).map(Self::from).map_err(|_| ParseDigestError(text.chars().take(80).collect()))
    }
}

impl Serialize for Digest {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// A stretch of the file, `start..end` in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ByteRange {
    /// First byte.
    pub start: u64,
    /// Byte after the last.
    pub end: u64,
}

/// Some tensors that belong together.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Part {
    /// Content, see the module's page.
    pub digest: Digest,
    /// Bytes of tensor data, without padding.
    pub bytes: u64,
    /// Number of parameters.
    pub parameters: u64,
    /// Where the data lies in the file, ascending; neighbours are joined over padding.
    pub ranges: Vec<ByteRange>,
}

/// How much of a model is stored in one type.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct TypeUse {
    /// Number of tensors.
    pub tensors: u64,
    /// Number of parameters.
    pub parameters: u64,
    /// Bytes of data.
    pub bytes: u64,
}

/// Rotary position encoding.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Rope {
    /// Base of the frequencies.
    pub freq_base: f32,
    /// Kind of context extension: `none`, `linear`, `yarn` or `longrope`.
    pub scaling: String,
    /// Factor of the extension.
    pub scaling_factor: Option<f32>,
    /// Context length before the extension.
    pub original_context_length: Option<u32>,
}

/// What a model is.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Manifest {
    /// Content of the whole file.
    pub digest: Digest,
    /// Size of the file in bytes.
    pub file_bytes: u64,
    /// `general.architecture`.
    pub architecture: String,
    /// `general.name`.
    pub name: Option<String>,
    /// The tokenizer's content; `None` where there is none.
    pub tokenizer: Option<Digest>,
    /// Each layer.
    pub layers: Vec<Part>,
    /// The token embedding.
    pub embedding: Option<Part>,
    /// Final norm and head. Shares its matrix with the embedding where the two are tied.
    pub head: Option<Part>,
    /// Whether head and embedding are the same matrix.
    pub tied: bool,
    /// Tensors that every layer uses, such as rotary factors.
    pub shared: Option<Part>,
    /// Number of parameters; a tied head is counted once.
    pub parameters: u64,
    /// Bytes of all tensors.
    pub tensor_bytes: u64,
    /// Storage in one word, such as `Q4_K_M`.
    pub quantization: String,
    /// Storage in detail.
    pub types: BTreeMap<String, TypeUse>,
    /// Shape; `None` for architectures without attention.
    pub facts: Option<Facts>,
    /// Rotary encoding.
    pub rope: Rope,
    /// Bytes of keys and values per token and layer, as f16; 0 where unknown.
    pub kv_bytes_per_token_per_layer: u64,
    /// Why the model cannot be split by layers; `None` when it can.
    pub not_sliceable: Option<String>,
    /// Layers before which it may be cut.
    pub allowed_cuts: Vec<u32>,
    /// What it is a part of, when it is a slice.
    pub slice: Option<LayerRange>,
}

impl Manifest {
    /// Opens a file, reads it through once and describes it. `progress` is told bytes done and bytes in all.
    pub fn of(path: impl AsRef<Path>, progress: impl FnMut(u64, u64)) -> Result<Self, GgufError> {
        Self::of_gguf(&Gguf::open(path)?, progress)
    }

    /// Describes an opened file.
    pub fn of_gguf(gguf: &Gguf, progress: impl FnMut(u64, u64)) -> Result<Self, GgufError> {
        Ok(Self::describe(gguf, Hashed::read(gguf, progress)?))
    }

    /// Describes an opened file without reading its tensors: all digests are zero.
    pub fn outline(gguf: &Gguf) -> Self {
        let none = Digest([0; 32]);
        Self::describe(gguf, Hashed { file: none, tensors: vec![none; gguf.tensors().len()] })
    }

    fn describe(gguf: &Gguf, hashed: Hashed) -> Self {
        let output = gguf.tensor("output.weight");
        let embedding_tensor = gguf.tensor("token_embd.weight");
        let facts = Facts::of(gguf).ok();

        let mut layers: Vec<Vec<(&str, usize)>> = vec![];
        let (mut embedding, mut head, mut shared) = (vec![], vec![], vec![]);
        for (i, tensor) in gguf.tensors().iter().enumerate() {
            match (tensor.layer(), tensor.name.as_str()) {
                (Some((il, rest)), _) if il < crate::facts::LAYERS_MAX => {
                    let il = il as usize;
                    layers.resize_with(layers.len().max(il + 1), Vec::new);
                    if let Some(layer) = layers.get_mut(il) {
                        layer.push((rest, i));
                    }
                }
                (_, "token_embd.weight") => {
                    embedding.push(("token_embd.weight", i));
                    if output.is_none() && gguf.tensor("output_norm.weight").is_some() {
                        head.push(("output.weight", i));
                    }
                }
                (_, name) if name.starts_with("output.") || name.starts_with("output_norm.") => head.push((name, i)),
                (_, name) => shared.push((name, i)),
            }
        }
        let mut types: BTreeMap<String, TypeUse> = BTreeMap::new();
        for tensor in gguf.tensors() {
            let used = types.entry(tensor.ty.name().to_owned()).or_default();
            used.tensors += 1;
            used.parameters = used.parameters.saturating_add(tensor.elements());
            used.bytes += tensor.bytes;
        }
        Self {
            digest: hashed.file,
            file_bytes: gguf.file_bytes(),
            architecture: gguf.architecture().to_owned(),
            name: gguf.name().map(str::to_owned),
            tokenizer: tokenizer_digest(gguf),
            layers: layers.into_iter().map(|tensors| hashed.part(gguf, tensors)).collect(),
            tied: embedding_tensor.is_some() && output.is_none() && !head.is_empty(),
            embedding: (!embedding.is_empty()).then(|| hashed.part(gguf, embedding)),
            head: (!head.is_empty()).then(|| hashed.part(gguf, head)),
            shared: (!shared.is_empty()).then(|| hashed.part(gguf, shared)),
            parameters: types.values().fold(0, |sum, used| used.parameters.saturating_add(sum)),
            tensor_bytes: types.values().map(|used| used.bytes).sum(),
            quantization: quantization(gguf, &types),
            types,
            kv_bytes_per_token_per_layer: facts.as_ref().map_or(0, Facts::kv_bytes_per_token_per_layer),
            facts,
            rope: Rope {
                freq_base: gguf.arch_f32("rope.freq_base").unwrap_or(10_000.0),
                scaling: gguf.arch_get("rope.scaling.type").and_then(|v| v.as_str()).unwrap_or("none").to_owned(),
                scaling_factor: gguf.arch_f32("rope.scaling.factor"),
                original_context_length: gguf.arch_u32("rope.scaling.original_context_length"),
            },
            not_sliceable: sliceable(gguf).err().map(|reason| reason.to_string()),
            allowed_cuts: allowed_cuts(gguf),
            slice: gguf
                .u32("murmur.slice.first")
                .zip(gguf.u32("murmur.slice.end"))
                .map(|(first, end)| LayerRange::new(first, end)),
        }
    }

    /// BLAKE3 of the manifest itself, see the module's page: who signs it signs all that follows from the file's bytes.
    pub fn own_digest(&self) -> Digest {
        let mut hasher = blake3::Hasher::new_derive_key(MANIFEST_CONTEXT);
        hasher.update(&self.digest.0).update(&self.file_bytes.to_le_bytes());
        hasher.update(&(self.architecture.len() as u32).to_le_bytes()).update(self.architecture.as_bytes());
        hasher.update(&(self.layers.len() as u32).to_le_bytes());
        let others = [&self.embedding, &self.head, &self.shared];
        for part in self.layers.iter().map(Some).chain(others.map(Option::as_ref)) {
            hasher.update(&[u8::from(part.is_some())]);
            if let Some(part) = part {
                part.hash_into(&mut hasher);
            }
        }
        hasher.update(&[u8::from(self.tokenizer.is_some())]);
        if let Some(tokenizer) = self.tokenizer {
            hasher.update(&tokenizer.0);
        }
        hasher.update(&[u8::from(self.facts.is_some())]);
        for number in self.facts.iter().flat_map(shape) {
            hasher.update(&number.to_le_bytes());
        }
        hasher.finalize().into()
    }

    /// Bytes of keys and values that one token takes in the layers of `range`, as f16.
    ///
    /// Layers with a sliding window take that much for the tokens of the window only.
    pub fn kv_bytes_per_token(&self, range: LayerRange) -> u64 {
        let end = range.end.min(u32::try_from(self.layers.len()).unwrap_or(u32::MAX));
        self.kv_bytes_per_token_per_layer * u64::from(end.saturating_sub(range.first))
    }

    /// Bytes of tensor data in the layers of `range`, without embedding and head.
    pub fn layer_bytes(&self, range: LayerRange) -> u64 {
        self.layers.iter().take(range.end as usize).skip(range.first as usize).map(|layer| layer.bytes).sum()
    }
}

impl Part {
    fn hash_into(&self, hasher: &mut blake3::Hasher) {
        hasher.update(&self.digest.0).update(&self.bytes.to_le_bytes());
        hasher.update(&(self.ranges.len() as u32).to_le_bytes());
        for range in &self.ranges {
            hasher.update(&range.start.to_le_bytes()).update(&range.end.to_le_bytes());
        }
    }
}

/// What a manifest digest has of the shape, the number of layers aside.
fn shape(facts: &Facts) -> [u32; 11] {
    [
        facts.embedding_length,
        facts.feed_forward_length,
        facts.heads,
        facts.kv_heads,
        facts.key_length,
        facts.value_length,
        facts.rope_dimensions,
        facts.vocabulary,
        facts.context_length,
        facts.experts,
        facts.experts_used,
    ]
}

/// The digests of one pass over the file.
struct Hashed {
    file: Digest,
    /// In header order.
    tensors: Vec<Digest>,
}

impl Hashed {
    fn read(gguf: &Gguf, mut progress: impl FnMut(u64, u64)) -> Result<Self, GgufError> {
        let fail = |e| GgufError::new(gguf.path(), GgufErrorKind::from_io(e));
        let mut file = File::open(gguf.path()).map_err(fail)?;
        let total = gguf.file_bytes();
        let mut by_offset: Vec<(usize, &TensorInfo)> = gguf.tensors().iter().enumerate().collect();
        by_offset.sort_by_key(|(_, tensor)| tensor.offset);
        let mut tensors = vec![Digest([0; 32]); by_offset.len()];
        let mut pending = by_offset.into_iter().peekable();

        let mut whole = blake3::Hasher::new();
        let mut current = blake3::Hasher::new();
        let mut buffer = vec![0; CHUNK_BYTES];
        let mut position = 0u64;
        while position < total {
            let wanted = usize::try_from(total - position).unwrap_or(CHUNK_BYTES).min(CHUNK_BYTES);
            let chunk = &mut buffer[..wanted];
            file.read_exact(chunk).map_err(|error| match error.kind() {
                std::io::ErrorKind::UnexpectedEof => {
                    let kind = GgufErrorKind::Truncated {
                        missing_bytes: total - position,
                        while_reading: "the file shrank while it was read".into(),
                    };
                    GgufError::new(gguf.path(), kind)
                }
                _ => fail(error),
            })?;
            whole.update(chunk);
            let end = position + wanted as u64;
            while let Some((i, tensor)) = pending.peek() {
                let tensor_end = tensor.offset + tensor.bytes;
                let from = tensor.offset.clamp(position, end) - position;
                let to = tensor_end.clamp(position, end) - position;
                current.update(&chunk[from as usize..to as usize]);
                if tensor_end > end {
                    break;
                }
                if let Some(slot) = tensors.get_mut(*i) {
                    *slot = current.finalize().into();
                }
                current = blake3::Hasher::new();
                pending.next();
            }
            position = end;
            progress(position, total);
        }
        Ok(Self { file: whole.finalize().into(), tensors })
    }

    fn part(&self, gguf: &Gguf, mut tensors: Vec<(&str, usize)>) -> Part {
        tensors.sort_unstable();
        let mut hasher = blake3::Hasher::new_derive_key(PART_CONTEXT);
        let mut ranges = vec![];
        let (mut bytes, mut parameters) = (0, 0u64);
        for (name, i) in tensors {
            let (Some(tensor), Some(digest)) = (gguf.tensors().get(i), self.tensors.get(i)) else {
                continue;
            };
            hasher.update(&(name.len() as u32).to_le_bytes()).update(name.as_bytes());
            hasher.update(&tensor.ty.id().to_le_bytes()).update(&(tensor.dims.len() as u32).to_le_bytes());
            for n in &tensor.dims {
                hasher.update(&n.to_le_bytes());
            }
            hasher.update(&digest.0);
            bytes += tensor.bytes;
            parameters = parameters.saturating_add(tensor.elements());
            ranges.push(ByteRange { start: tensor.offset, end: tensor.offset + tensor.bytes });
        }
        Part { digest: hasher.finalize().into(), bytes, parameters, ranges: join(ranges, gguf.alignment().into()) }
    }
}

/// Sorts ranges and joins those with no more than padding between them.
pub(crate) fn join(mut ranges: Vec<ByteRange>, alignment: u64) -> Vec<ByteRange> {
    ranges.sort_by_key(|range| range.start);
    let mut joined: Vec<ByteRange> = vec![];
    for range in ranges {
        match joined.last_mut() {
            Some(last) if last.end.next_multiple_of(alignment) >= range.start => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

fn tokenizer_digest(gguf: &Gguf) -> Option<Digest> {
    let mut keys: Vec<_> = gguf
        .keys()
        .filter(|(key, _)| key.starts_with("tokenizer.") && !key.starts_with("tokenizer.chat_template"))
        .collect();
    if keys.is_empty() {
        return None;
    }
    keys.sort_by_key(|(key, _)| *key);
    let mut hasher = blake3::Hasher::new_derive_key(TOKENIZER_CONTEXT);
    for (key, value) in keys {
        let mut encoded = vec![];
        encode_bytes(key.as_bytes(), &mut encoded);
        value.encode(&mut encoded);
        hasher.update(&encoded);
    }
    Some(hasher.finalize().into())
}

/// The name that the file's type number has in `llama.h` (`llama_ftype`), or the type of most bytes.
fn quantization(gguf: &Gguf, types: &BTreeMap<String, TypeUse>) -> String {
    let named = gguf.u32("general.file_type").and_then(|ftype| {
        Some(match ftype {
            0 => "F32",
            1 => "F16",
            2 => "Q4_0",
            3 => "Q4_1",
            7 => "Q8_0",
            8 => "Q5_0",
            9 => "Q5_1",
            10 => "Q2_K",
            11 => "Q3_K_S",
            12 => "Q3_K_M",
            13 => "Q3_K_L",
            14 => "Q4_K_S",
            15 => "Q4_K_M",
            16 => "Q5_K_S",
            17 => "Q5_K_M",
            18 => "Q6_K",
            19 => "IQ2_XXS",
            20 => "IQ2_XS",
            21 => "Q2_K_S",
            22 => "IQ3_XS",
            23 => "IQ3_XXS",
            24 => "IQ1_S",
            25 => "IQ4_NL",
            26 => "IQ3_S",
            27 => "IQ3_M",
            28 => "IQ2_S",
            29 => "IQ2_M",
            30 => "IQ4_XS",
            31 => "IQ1_M",
            32 => "BF16",
            36 => "TQ1_0",
            37 => "TQ2_0",
            38 => "MXFP4",
            _ => return None,
        })
    });
    let most =
        || types.iter().max_by_key(|(_, used)| used.bytes).map_or(TensorType::F32.name(), |(name, _)| name.as_str());
    named.unwrap_or_else(most).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_join_over_padding_and_nothing_else() {
        let range = |start, end| ByteRange { start, end };
        let joined = join(vec![range(96, 100), range(0, 30), range(32, 64), range(128, 130)], 32);
        assert_eq!(joined, [range(0, 64), range(96, 130)]);
    }

    #[test]
    fn a_digest_reads_back_from_its_text() {
        let digest = Digest::from(blake3::hash(b"murmur"));
        assert_eq!(digest.to_string().parse(), Ok(digest));
        assert!("xyz".parse::<Digest>().is_err());
    }
}
