//! The GGUF header: bytes in, checked structure out.
//!
//! Layout (ggml's `docs/gguf.md`): magic `GGUF`, version u32, tensor count u64, key count u64, the key-value pairs, the
//! tensor infos, padding, then tensor data at aligned offsets. Everything is little-endian.
//!
//! The file is hostile until proven otherwise. Every count and length is compared with what is left of the file and
//! with a limit *before* anything is allocated for it, so that memory use is bounded by a small multiple of the
//! header's real size.

use std::collections::{HashMap, HashSet};
use std::io::Read;

use crate::error::GgufErrorKind as Kind;
use crate::tensor_type::TensorType;
use crate::value::{Array, StringArray, Value, id};

/// Most header bytes accepted. The largest known (256,000 tokens with merges) take 15 MiB.
pub const HEADER_BYTES_MAX: u64 = 128 << 20;
/// Most metadata keys accepted. Real models have fewer than 100.
pub const KEYS_MAX: u64 = 16_384;
/// Most tensors accepted. The largest known models have 2,500.
pub const TENSORS_MAX: u64 = 65_536;
/// Longest metadata key, from the format's specification.
pub const KEY_BYTES_MAX: u64 = 65_535;
/// Longest tensor name: ggml's `GGML_MAX_NAME` is 64 with the terminating zero.
pub const TENSOR_NAME_BYTES_MAX: u64 = 63;
/// Longest string value. Chat templates reach 30 KiB, embedded tokenizer files 20 MiB.
pub const STRING_BYTES_MAX: u64 = 64 << 20;
/// Most array elements accepted.
pub const ARRAY_ELEMENTS_MAX: u64 = 16 << 20;
/// Largest alignment accepted; 32 is usual.
pub const ALIGNMENT_MAX: u32 = 1 << 16;
/// Alignment of a file that states none.
pub const ALIGNMENT_DEFAULT: u32 = 32;
/// Most tensor dimensions: ggml's `GGML_MAX_DIMS`.
pub const DIMS_MAX: u32 = 4;
/// Largest tensor accepted, in bytes. Keeps every later sum far from overflow.
pub const TENSOR_BYTES_MAX: u64 = 1 << 42;

/// The metadata key that sets the alignment of tensor data.
pub(crate) const KEY_ALIGNMENT: &str = "general.alignment";

/// Where a tensor lies in the file and what it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name, unique in the file.
    pub name: String,
    /// Elements along each dimension, fastest first (`[columns, rows, ...]`); 1 to 4 of them, none zero.
    pub dims: Vec<u64>,
    /// Element type.
    pub ty: TensorType,
    /// Offset from the start of the file, in bytes.
    pub offset: u64,
    /// Size without padding, in bytes.
    pub bytes: u64,
}

impl TensorInfo {
    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.dims.iter().product()
    }

    /// The layer number `N` of a tensor named `blk.N.…`, and the rest of the name.
    pub fn layer(&self) -> Option<(u32, &str)> {
        split_layer(&self.name)
    }
}

/// Splits `blk.N.rest`.
pub(crate) fn split_layer(name: &str) -> Option<(u32, &str)> {
    let (number, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    // "007" and "+7" are other names than "7": llama.cpp would never ask for them.
    if number.is_empty() || number.len() > 1 && number.starts_with('0') || !number.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    Some((number.parse().ok()?, rest))
}

/// A checked header.
#[derive(Debug, Clone)]
pub(crate) struct Header {
    pub(crate) version: u32,
    pub(crate) keys: Vec<(String, Value)>,
    pub(crate) tensors: Vec<TensorInfo>,
    pub(crate) alignment: u32,
    /// File offset at which tensor data begins.
    pub(crate) data_offset: u64,
    /// Bytes of the header before padding.
    pub(crate) header_bytes: u64,
}

/// Rounds `n` up to a multiple of the power of two `alignment`.
pub(crate) fn align_up(n: u64, alignment: u64) -> Option<u64> {
    n.checked_next_multiple_of(alignment)
}

/// Bytes of a tensor; `None` when the shape is not representable.
pub(crate) fn tensor_bytes(dims: &[u64], ty: TensorType) -> Option<u64> {
    let (&row, rest) = dims.split_first()?;
    rest.iter().try_fold(ty.row_bytes(row)?, |bytes, &n| bytes.checked_mul(n))
}

/// Reads and checks the header of a file of `file_bytes`.
pub(crate) fn parse(reader: impl Read, file_bytes: u64) -> Result<Header, Kind> {
    let mut cursor = Cursor { reader, position: 0, file_bytes };
    let version = cursor.magic_and_version()?;
    let n_tensors = cursor.count("the number of tensors", TENSORS_MAX)?;
    let n_keys = cursor.count("the number of metadata keys", KEYS_MAX)?;

    let mut keys = Vec::new();
    let mut seen = HashSet::new();
    for _ in 0..n_keys {
        let (key, value) = cursor.key_value()?;
        if !seen.insert(key.clone()) {
            return Err(Kind::malformed(format!("the metadata key {key:?} appears twice")));
        }
        keys.push((key, value));
    }
    let alignment = alignment_of(&keys)?;

    let mut tensors = Vec::new();
    let mut names = HashSet::new();
    for _ in 0..n_tensors {
        let tensor = cursor.tensor_info(alignment)?;
        if !names.insert(tensor.name.clone()) {
            return Err(Kind::malformed(format!("the tensor {:?} appears twice", tensor.name)));
        }
        tensors.push(tensor);
    }

    let header_bytes = cursor.position;
    let data_offset =
        if tensors.is_empty() { header_bytes } else { align_up(header_bytes, alignment.into()).unwrap_or(u64::MAX) };
    place_tensors(&mut tensors, data_offset, file_bytes)?;
    Ok(Header { version, keys, tensors, alignment, data_offset, header_bytes })
}

fn alignment_of(keys: &[(String, Value)]) -> Result<u32, Kind> {
    let Some((_, value)) = keys.iter().find(|(key, _)| key == KEY_ALIGNMENT) else {
        return Ok(ALIGNMENT_DEFAULT);
    };
    match *value {
        Value::U32(alignment) if alignment.is_power_of_two() && alignment <= ALIGNMENT_MAX => Ok(alignment),
        Value::U32(alignment) => Err(Kind::malformed(format!(
            "the alignment {alignment} is not a power of two between 1 and {ALIGNMENT_MAX}"
        ))),
        _ => Err(Kind::malformed(format!("{KEY_ALIGNMENT} is not a 32-bit unsigned integer"))),
    }
}

/// Turns offsets into file offsets, and checks that every tensor lies in the file and on no other.
fn place_tensors(tensors: &mut [TensorInfo], data_offset: u64, file_bytes: u64) -> Result<(), Kind> {
    let mut furthest_end = 0;
    for tensor in tensors.iter_mut() {
        let placed =
            tensor.offset.checked_add(data_offset).and_then(|start| Some((start, start.checked_add(tensor.bytes)?)));
        let Some((start, end)) = placed else {
            return Err(Kind::malformed(format!("the offset of tensor {:?} does not fit in 64 bits", tensor.name)));
        };
        tensor.offset = start;
        furthest_end = furthest_end.max(end);
    }
    let mut by_offset: Vec<&TensorInfo> = tensors.iter().collect();
    by_offset.sort_by_key(|t| (t.offset, t.bytes));
    for pair in by_offset.windows(2) {
        if let [a, b] = pair
            && a.offset + a.bytes > b.offset
        {
            return Err(Kind::malformed(format!("the tensors {:?} and {:?} overlap", a.name, b.name)));
        }
    }
    if furthest_end > file_bytes {
        return Err(Kind::Truncated { missing_bytes: furthest_end - file_bytes, while_reading: "tensor data".into() });
    }
    Ok(())
}

struct Cursor<R> {
    reader: R,
    position: u64,
    file_bytes: u64,
}

impl<R: Read> Cursor<R> {
    /// Makes sure that `n` more bytes exist and are within the header's limit.
    fn require(&self, n: u64, what: &str) -> Result<(), Kind> {
        let end = self.position.saturating_add(n);
        if end > self.file_bytes {
            return Err(Kind::Truncated { missing_bytes: end - self.file_bytes, while_reading: what.to_owned() });
        }
        if end > HEADER_BYTES_MAX {
            return Err(Kind::OverLimit {
                what: "the header's size in bytes".into(),
                found: end,
                limit: HEADER_BYTES_MAX,
            });
        }
        Ok(())
    }

    fn read_exact(&mut self, buffer: &mut [u8], what: &str) -> Result<(), Kind> {
        self.require(buffer.len() as u64, what)?;
        self.reader.read_exact(buffer).map_err(|error| match error.kind() {
            // The file shrank between asking for its length and reading it.
            std::io::ErrorKind::UnexpectedEof => Kind::Truncated { missing_bytes: 1, while_reading: what.to_owned() },
            _ => Kind::from_io(error),
        })?;
        self.position += buffer.len() as u64;
        Ok(())
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], Kind> {
        let mut bytes = [0; N];
        self.read_exact(&mut bytes, what)?;
        Ok(bytes)
    }

    fn u32(&mut self, what: &str) -> Result<u32, Kind> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64, Kind> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    fn magic_and_version(&mut self) -> Result<u32, Kind> {
        if self.file_bytes == 0 {
            return Err(Kind::Empty);
        }
        let mut magic = [0; 4];
        let present = self.file_bytes.min(4) as usize;
        self.read_exact(&mut magic[..present], "the magic number")?;
        if magic[..present] != b"GGUF"[..present] {
            return Err(Kind::NotGguf { found: format!("\"{}\"", magic[..present].escape_ascii()) });
        }
        self.require(4 - present as u64, "the magic number")?;
        match self.u32("the version")? {
            version @ 2..=3 => Ok(version),
            1 => Err(Kind::VersionTooOld),
            // A big-endian 3 reads as 0x03000000.
            version if version & 0xffff == 0 && version != 0 => Err(Kind::BigEndian),
            version => Err(Kind::VersionUnknown { version }),
        }
    }

    fn count(&mut self, what: &str, limit: u64) -> Result<u64, Kind> {
        let n = self.u64(what)?;
        if n > limit {
            return Err(Kind::OverLimit { what: what.to_owned(), found: n, limit });
        }
        Ok(n)
    }

    fn bytes(&mut self, what: &str, limit: u64) -> Result<Vec<u8>, Kind> {
        let n = self.count(what, limit)?;
        self.require(n, what)?;
        let mut bytes = vec![0; n as usize];
        self.read_exact(&mut bytes, what)?;
        Ok(bytes)
    }

    fn text(&mut self, what: &str, limit: u64) -> Result<String, Kind> {
        String::from_utf8(self.bytes(what, limit)?).map_err(|_| Kind::malformed(format!("{what}: not valid UTF-8")))
    }

    fn key_value(&mut self) -> Result<(String, Value), Kind> {
        let key = self.text("the length of a metadata key", KEY_BYTES_MAX)?;
        if key.is_empty() {
            return Err(Kind::malformed("a metadata key is empty"));
        }
        if key.contains('\0') {
            return Err(Kind::malformed(format!("the metadata key {key:?} contains a zero byte")));
        }
        let what = format!("the value of {key}");
        let value = match self.u32(&what)? {
            id::ARRAY => Value::Array(self.array_value(&key, &what)?),
            ty => self.scalar(ty, &key, &what)?,
        };
        Ok((key, value))
    }

    fn scalar(&mut self, ty: u32, key: &str, what: &str) -> Result<Value, Kind> {
        Ok(match ty {
            id::U8 => Value::U8(u8::from_le_bytes(self.array(what)?)),
            id::I8 => Value::I8(i8::from_le_bytes(self.array(what)?)),
            id::U16 => Value::U16(u16::from_le_bytes(self.array(what)?)),
            id::I16 => Value::I16(i16::from_le_bytes(self.array(what)?)),
            id::U32 => Value::U32(u32::from_le_bytes(self.array(what)?)),
            id::I32 => Value::I32(i32::from_le_bytes(self.array(what)?)),
            id::F32 => Value::F32(f32::from_le_bytes(self.array(what)?)),
            id::BOOL => Value::Bool(truth(self.array::<1>(what)?[0], key)?),
            id::STRING => Value::Str(self.text(what, STRING_BYTES_MAX)?),
            id::U64 => Value::U64(u64::from_le_bytes(self.array(what)?)),
            id::I64 => Value::I64(i64::from_le_bytes(self.array(what)?)),
            id::F64 => Value::F64(f64::from_le_bytes(self.array(what)?)),
            ty => {
                return Err(Kind::malformed(format!("{key} has the unknown value type {ty}")));
            }
        })
    }

    fn array_value(&mut self, key: &str, what: &str) -> Result<Array, Kind> {
        let ty = self.u32(what)?;
        let n = self.count(&format!("the number of elements of {key}"), ARRAY_ELEMENTS_MAX)?;
        Ok(match ty {
            id::U8 => Array::U8(self.elements(n, what, u8::from_le_bytes)?),
            id::I8 => Array::I8(self.elements(n, what, i8::from_le_bytes)?),
            id::U16 => Array::U16(self.elements(n, what, u16::from_le_bytes)?),
            id::I16 => Array::I16(self.elements(n, what, i16::from_le_bytes)?),
            id::U32 => Array::U32(self.elements(n, what, u32::from_le_bytes)?),
            id::I32 => Array::I32(self.elements(n, what, i32::from_le_bytes)?),
            id::F32 => Array::F32(self.elements(n, what, f32::from_le_bytes)?),
            id::BOOL => {
                let bytes = self.elements(n, what, u8::from_le_bytes)?;
                Array::Bool(bytes.into_iter().map(|b| truth(b, key)).collect::<Result<_, _>>()?)
            }
            id::STRING => Array::Str(self.strings(n, what)?),
            id::U64 => Array::U64(self.elements(n, what, u64::from_le_bytes)?),
            id::I64 => Array::I64(self.elements(n, what, i64::from_le_bytes)?),
            id::F64 => Array::F64(self.elements(n, what, f64::from_le_bytes)?),
            id::ARRAY => {
                return Err(Kind::malformed(format!("{key} is an array of arrays, which llama.cpp does not read")));
            }
            ty => {
                return Err(Kind::malformed(format!("{key} has the unknown element type {ty}")));
            }
        })
    }

    fn elements<T, const N: usize>(&mut self, n: u64, what: &str, decode: fn([u8; N]) -> T) -> Result<Vec<T>, Kind> {
        // n is at most ARRAY_ELEMENTS_MAX, so the product cannot overflow.
        let total = n * N as u64;
        self.require(total, what)?;
        let mut bytes = vec![0; total as usize];
        self.read_exact(&mut bytes, what)?;
        Ok(bytes.as_chunks::<N>().0.iter().map(|chunk| decode(*chunk)).collect())
    }

    fn strings(&mut self, n: u64, what: &str) -> Result<StringArray, Kind> {
        // Each string takes at least its length field.
        self.require(n * 8, what)?;
        let mut strings = StringArray::default();
        for _ in 0..n {
            let text = self.bytes(what, STRING_BYTES_MAX)?;
            strings.push(&text);
        }
        Ok(strings)
    }

    fn tensor_info(&mut self, alignment: u32) -> Result<TensorInfo, Kind> {
        let name = self.text("the length of a tensor name", TENSOR_NAME_BYTES_MAX)?;
        if name.is_empty() || name.contains('\0') {
            return Err(Kind::malformed(format!("the tensor name {name:?} is not usable")));
        }
        let what = format!("the description of tensor {name}");
        let n_dims = self.u32(&what)?;
        if n_dims == 0 || n_dims > DIMS_MAX {
            return Err(Kind::malformed(format!("the tensor {name:?} has {n_dims} dimensions, not 1 to {DIMS_MAX}")));
        }
        let dims = (0..n_dims).map(|_| self.u64(&what)).collect::<Result<Vec<u64>, _>>()?;
        if dims.contains(&0) {
            return Err(Kind::malformed(format!("the tensor {name:?} has a dimension of zero")));
        }
        let ty_id = self.u32(&what)?;
        let Some(ty) = TensorType::from_id(ty_id) else {
            return Err(Kind::malformed(format!("the tensor {name:?} has the unknown type {ty_id}")));
        };
        if !dims[0].is_multiple_of(ty.block_elements()) {
            let block = ty.block_elements();
            return Err(Kind::malformed(format!(
                "the rows of tensor {name:?} ({} elements) are not whole {ty} blocks of {block}",
                dims[0]
            )));
        }
        let elements =
            dims.iter().try_fold(1u64, |product, &n| product.checked_mul(n)).filter(|&n| n <= i64::MAX as u64);
        let bytes = elements.and_then(|_| tensor_bytes(&dims, ty)).filter(|&bytes| bytes <= TENSOR_BYTES_MAX);
        let Some(bytes) = bytes else {
            return Err(Kind::malformed(format!("the shape {dims:?} of tensor {name:?} is impossibly large")));
        };
        let offset = self.u64(&what)?;
        if !offset.is_multiple_of(alignment.into()) {
            return Err(Kind::malformed(format!(
                "the offset {offset} of tensor {name:?} is not aligned to {alignment}"
            )));
        }
        Ok(TensorInfo { name, dims, ty, offset, bytes })
    }
}

fn truth(byte: u8, key: &str) -> Result<bool, Kind> {
    match byte {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(Kind::malformed(format!("{key} holds {other} where only false (0) or true (1) may stand"))),
    }
}

/// Position of each name.
pub(crate) fn index<'a>(names: impl Iterator<Item = &'a str>) -> HashMap<String, usize> {
    names.enumerate().map(|(i, name)| (name.to_owned(), i)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layer_names_are_split_and_odd_spellings_are_not_layers() {
        assert_eq!(split_layer("blk.12.attn_q.weight"), Some((12, "attn_q.weight")));
        assert_eq!(split_layer("blk.0.x"), Some((0, "x")));
        for odd in ["blk.", "blk.1", "blk.01.x", "blk.+1.x", "blk.-1.x", "blk..x", "blk.99999999999.x", "output.weight"]
        {
            assert_eq!(split_layer(odd), None, "{odd}");
        }
    }
}
