//! An opened GGUF file: its metadata and where its tensors lie. Tensor data stays on disk.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use crate::error::{GgufError, GgufErrorKind};
use crate::parse::{self, Header, TensorInfo};
use crate::value::{StringArray, Value};

/// An opened, checked GGUF file.
#[derive(Debug, Clone)]
pub struct Gguf {
    path: PathBuf,
    file_bytes: u64,
    header: Header,
    key_index: HashMap<String, usize>,
    tensor_index: HashMap<String, usize>,
    architecture: String,
}

impl Gguf {
    /// Opens a file and checks its header, without reading tensor data.
    ///
    /// The result is well formed; whether llama.cpp may see it is a second question, answered by
    /// [`Gguf::validate_for_engine`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, GgufError> {
        let path = path.as_ref();
        let fail = |kind| GgufError::new(path, kind);
        // Asked before opening: opening a pipe would wait for a writer.
        let metadata = std::fs::metadata(path).map_err(|e| fail(GgufErrorKind::from_io(e)))?;
        if metadata.is_dir() {
            return Err(fail(GgufErrorKind::IsDirectory));
        }
        if !metadata.is_file() {
            return Err(fail(GgufErrorKind::NotAFile));
        }
        let file = File::open(path).map_err(|e| fail(GgufErrorKind::from_io(e)))?;
        let file_bytes = file.metadata().map_err(|e| fail(GgufErrorKind::from_io(e)))?.len();
        Self::from_reader(BufReader::with_capacity(1 << 16, file), file_bytes, path)
    }

    /// Checks a header from any reader. `file_bytes` is the size of the whole file, `path` what messages call it.
    pub fn from_reader(reader: impl Read, file_bytes: u64, path: impl Into<PathBuf>) -> Result<Self, GgufError> {
        let path = path.into();
        match parse::parse(reader, file_bytes) {
            Ok(header) => {
                let key_index = parse::index(header.keys.iter().map(|(key, _)| key.as_str()));
                let tensor_index = parse::index(header.tensors.iter().map(|t| t.name.as_str()));
                let mut gguf = Self { path, file_bytes, header, key_index, tensor_index, architecture: String::new() };
                gguf.architecture = gguf.str("general.architecture").unwrap_or_default().to_owned();
                Ok(gguf)
            }
            Err(kind) => Err(GgufError::new(&path, kind)),
        }
    }

    /// The file this was read from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Size of the file, in bytes.
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// Format version, 2 or 3.
    pub fn version(&self) -> u32 {
        self.header.version
    }

    /// Alignment of tensor data, in bytes.
    pub fn alignment(&self) -> u32 {
        self.header.alignment
    }

    /// File offset at which tensor data begins.
    pub fn data_offset(&self) -> u64 {
        self.header.data_offset
    }

    /// Size of the header without the padding after it, in bytes.
    pub fn header_bytes(&self) -> u64 {
        self.header.header_bytes
    }

    /// `general.architecture`; empty when the file states none.
    pub fn architecture(&self) -> &str {
        &self.architecture
    }

    /// `general.name`, if any.
    pub fn name(&self) -> Option<&str> {
        self.str("general.name")
    }

    /// The value of a metadata key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.header.keys.get(*self.key_index.get(key)?).map(|(_, value)| value)
    }

    /// All keys and values in file order.
    pub fn keys(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.header.keys.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// An integer that fits in 32 unsigned bits, whatever its width in the file.
    pub fn u32(&self, key: &str) -> Option<u32> {
        self.get(key)?.as_u32()
    }

    /// An integer that is not negative.
    pub fn u64(&self, key: &str) -> Option<u64> {
        self.get(key)?.as_u64()
    }

    /// A float.
    pub fn f32(&self, key: &str) -> Option<f32> {
        self.get(key)?.as_f32()
    }

    /// A string.
    pub fn str(&self, key: &str) -> Option<&str> {
        self.get(key)?.as_str()
    }

    /// A boolean.
    pub fn bool(&self, key: &str) -> Option<bool> {
        self.get(key)?.as_bool()
    }

    /// The full name of an architecture's key: `block_count` is `llama.block_count` in a llama file.
    pub fn arch_key(&self, suffix: &str) -> String {
        format!("{}.{suffix}", self.architecture)
    }

    /// The value of an architecture's key.
    pub fn arch_get(&self, suffix: &str) -> Option<&Value> {
        self.get(&self.arch_key(suffix))
    }

    /// An architecture's key as integer: `arch_u32("block_count")`.
    pub fn arch_u32(&self, suffix: &str) -> Option<u32> {
        self.arch_get(suffix)?.as_u32()
    }

    /// An architecture's key as float.
    pub fn arch_f32(&self, suffix: &str) -> Option<f32> {
        self.arch_get(suffix)?.as_f32()
    }

    /// Number of layers (`block_count`), if stated.
    pub fn layer_count(&self) -> Option<u32> {
        self.arch_u32("block_count")
    }

    /// The vocabulary, if the file has one.
    pub fn tokens(&self) -> Option<&StringArray> {
        self.get("tokenizer.ggml.tokens")?.as_strings()
    }

    /// All tensors in file order.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.header.tensors
    }

    /// The tensor with this name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.header.tensors.get(*self.tensor_index.get(name)?)
    }

    /// Reads the data of a tensor. Meant for tests and small tensors: the result is as large as the tensor.
    pub fn read_tensor(&self, tensor: &TensorInfo) -> Result<Vec<u8>, GgufError> {
        let read = || -> std::io::Result<Vec<u8>> {
            let mut file = File::open(&self.path)?;
            file.seek(SeekFrom::Start(tensor.offset))?;
            let mut data = vec![0; usize::try_from(tensor.bytes).map_err(std::io::Error::other)?];
            file.read_exact(&mut data)?;
            Ok(data)
        };
        read().map_err(|e| GgufError::new(&self.path, GgufErrorKind::from_io(e)))
    }
}
