//! Writes GGUF version 3: metadata, then tensors streamed from memory, from other files or from generators.
//!
//! A file appears under its name only when it is complete and on disk: it is written under a temporary name in the same
//! folder, synced, and renamed. When anything fails, a full disk above all, the temporary file is removed.
//!
//! File systems such as btrfs and XFS let two files share blocks, if the same bytes lie at the same place within a block in both. What is copied
//! from another file is written so that it can be shared where [`GgufBuilder::share_blocks`] has moved it there.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::parse::{self, ALIGNMENT_DEFAULT, ALIGNMENT_MAX, DIMS_MAX, KEY_ALIGNMENT, TENSOR_NAME_BYTES_MAX};
use crate::tensor_type::TensorType;
use crate::value::{Value, encode_bytes};

/// File systems share blocks of this size; where theirs are smaller, these are several of them.
const BLOCK_BYTES: u64 = 4096;
/// Holds nothing, and moves the tensors by as much as it is long.
const KEY_PADDING: &str = "murmur.padding";

/// Why a file could not be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// No space left.
    #[error("{}: the disk is full ({needed_bytes} bytes are needed in all); free some space or choose another folder", path.display())]
    DiskFull {
        /// The file that was to be written.
        path: PathBuf,
        /// Its full size.
        needed_bytes: u64,
    },
    /// The file system, or a limit set for this process, does not take files of this size.
    #[error("{}: files of {needed_bytes} bytes cannot be stored here; choose another folder, or raise the file size limit (ulimit -f)", path.display())]
    FileTooLarge {
        /// The file that was to be written.
        path: PathBuf,
        /// Its full size.
        needed_bytes: u64,
    },
    /// Any other failure of the operating system.
    #[error("{}: writing failed: {source}; check that the folder exists and is writable", path.display())]
    Io {
        /// The file that was to be written.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The caller described something that cannot stand in a GGUF file.
    #[error("cannot write this GGUF file: {0}")]
    Invalid(String),
}

/// Writes the content of one tensor, exactly as many bytes as its shape and type ask for.
pub type Generator<'a> = Box<dyn FnMut(&mut dyn Write) -> io::Result<()> + 'a>;

/// Where a tensor's data comes from.
pub enum TensorSource<'a> {
    /// Memory.
    Bytes(Cow<'a, [u8]>),
    /// Part of an open file.
    FileRange {
        /// The file.
        file: Arc<File>,
        /// First byte.
        offset: u64,
    },
    /// Zeros. They become a hole in the file where the file system has holes, and then cost no space.
    Zeros,
    /// A function that writes them.
    Generate(Generator<'a>),
}

struct PlannedTensor<'a> {
    name: String,
    dims: Vec<u64>,
    ty: TensorType,
    bytes: u64,
    source: TensorSource<'a>,
}

/// Collects keys and tensors, then writes them.
#[derive(Default)]
pub struct GgufBuilder<'a> {
    keys: Vec<(String, Value)>,
    tensors: Vec<PlannedTensor<'a>>,
    names: HashSet<String>,
}

impl<'a> GgufBuilder<'a> {
    /// A file of this architecture.
    pub fn new(architecture: &str) -> Self {
        let mut builder = Self::default();
        builder.set("general.architecture", architecture);
        builder
    }

    /// Sets a key, replacing an earlier value in place.
    pub fn set(&mut self, key: impl Into<String>, value: impl Into<Value>) -> &mut Self {
        let (key, value) = (key.into(), value.into());
        match self.keys.iter_mut().find(|(k, _)| *k == key) {
            Some((_, slot)) => *slot = value,
            None => self.keys.push((key, value)),
        }
        self
    }

    /// Adds a tensor after those added before. `dims` is fastest first.
    pub fn tensor(
        &mut self,
        name: impl Into<String>,
        dims: &[u64],
        ty: TensorType,
        source: TensorSource<'a>,
    ) -> Result<&mut Self, WriteError> {
        let name = name.into();
        let invalid = |reason: String| Err(WriteError::Invalid(reason));
        if name.is_empty() || name.len() as u64 > TENSOR_NAME_BYTES_MAX {
            return invalid(format!(
                "the tensor name {name:?} has {} bytes, not 1 to {TENSOR_NAME_BYTES_MAX}",
                name.len()
            ));
        }
        if dims.is_empty() || dims.len() > DIMS_MAX as usize || dims.contains(&0) {
            return invalid(format!("the tensor {name} cannot have the shape {dims:?}"));
        }
        let Some(bytes) = parse::tensor_bytes(dims, ty) else {
            return invalid(format!("rows of {} elements are not whole {ty} blocks in tensor {name}", dims[0]));
        };
        if let TensorSource::Bytes(data) = &source
            && data.len() as u64 != bytes
        {
            return invalid(format!("the tensor {name} takes {bytes} bytes, but {} were given", data.len()));
        }
        if !self.names.insert(name.clone()) {
            return invalid(format!("the tensor {name} was given twice"));
        }
        self.tensors.push(PlannedTensor { name, dims: dims.to_vec(), ty, bytes, source });
        Ok(self)
    }

    /// Adds a tensor of floats.
    pub fn tensor_f32(&mut self, name: impl Into<String>, dims: &[u64], data: &[f32]) -> Result<&mut Self, WriteError> {
        let bytes: Vec<u8> = data.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.tensor(name, dims, TensorType::F32, TensorSource::Bytes(bytes.into()))
    }

    fn alignment(&self) -> Result<u64, WriteError> {
        match self.keys.iter().find(|(key, _)| key == KEY_ALIGNMENT) {
            None => Ok(ALIGNMENT_DEFAULT.into()),
            Some((_, Value::U32(a))) if a.is_power_of_two() && *a <= ALIGNMENT_MAX => Ok((*a).into()),
            Some(_) => Err(WriteError::Invalid(format!(
                "{KEY_ALIGNMENT} must be a power of two, as u32, of at most {ALIGNMENT_MAX}"
            ))),
        }
    }

    /// Header with padding, and the size of the whole file.
    fn header(&self, alignment: u64) -> Result<(Vec<u8>, u64), WriteError> {
        let too_large = || WriteError::Invalid("the file would be impossibly large".into());
        let mut header = b"GGUF".to_vec();
        header.extend(3u32.to_le_bytes());
        header.extend((self.tensors.len() as u64).to_le_bytes());
        header.extend((self.keys.len() as u64).to_le_bytes());
        for (key, value) in &self.keys {
            encode_bytes(key.as_bytes(), &mut header);
            value.encode(&mut header);
        }
        let mut offset = 0u64;
        for tensor in &self.tensors {
            encode_bytes(tensor.name.as_bytes(), &mut header);
            header.extend((tensor.dims.len() as u32).to_le_bytes());
            header.extend(tensor.dims.iter().flat_map(|n| n.to_le_bytes()));
            header.extend(tensor.ty.id().to_le_bytes());
            header.extend(offset.to_le_bytes());
            offset = offset
                .checked_add(tensor.bytes)
                .and_then(|end| parse::align_up(end, alignment))
                .ok_or_else(too_large)?;
        }
        let padded = (header.len() as u64).next_multiple_of(alignment);
        header.resize(padded as usize, 0);
        let total = padded.checked_add(offset).ok_or_else(too_large)?;
        Ok((header, total))
    }

    /// Makes the header so much longer that most of what is copied from files begins at the same place within a block as it does there. Keys and
    /// tensors that are added later may undo that.
    pub fn share_blocks(&mut self) -> Result<&mut Self, WriteError> {
        self.set(KEY_PADDING, "");
        let alignment = self.alignment()?;
        let mut position = self.header(alignment)?.0.len() as u64;
        let mut bytes_by_gap: BTreeMap<u64, u64> = BTreeMap::new();
        for tensor in &self.tensors {
            if let TensorSource::FileRange { offset, .. } = &tensor.source {
                let gap = (offset % BLOCK_BYTES + BLOCK_BYTES - position % BLOCK_BYTES) % BLOCK_BYTES;
                *bytes_by_gap.entry(gap).or_default() += tensor.bytes;
            }
            position = (position + tensor.bytes).next_multiple_of(alignment);
        }
        let most = bytes_by_gap.into_iter().filter(|(gap, _)| gap % alignment == 0).max_by_key(|(_, bytes)| *bytes);
        let gap = most.map_or(0, |(gap, _)| gap);
        Ok(self.set(KEY_PADDING, " ".repeat(gap as usize)))
    }

    /// The bytes of the file up to its tensor data: the whole of a file without tensors.
    pub(crate) fn header_bytes(&self) -> Result<Vec<u8>, WriteError> {
        Ok(self.header(self.alignment()?)?.0)
    }

    /// Writes the file and returns its size in bytes.
    pub fn write(mut self, path: impl AsRef<Path>) -> Result<u64, WriteError> {
        let path = path.as_ref();
        let alignment = self.alignment()?;
        let (header, total_bytes) = self.header(alignment)?;
        let io_error = |source: io::Error| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                WriteError::DiskFull { path: path.to_path_buf(), needed_bytes: total_bytes }
            }
            io::ErrorKind::FileTooLarge => {
                WriteError::FileTooLarge { path: path.to_path_buf(), needed_bytes: total_bytes }
            }
            _ => WriteError::Io { path: path.to_path_buf(), source },
        };
        let mut temporary = Temporary::create(path).map_err(io_error)?;
        self.write_to(&mut temporary.file, &header, alignment, total_bytes).map_err(io_error)?;
        temporary.commit(path).map_err(io_error)?;
        Ok(total_bytes)
    }

    fn write_to(&mut self, file: &mut File, header: &[u8], alignment: u64, total_bytes: u64) -> io::Result<()> {
        file.write_all(header)?;
        let mut position = header.len() as u64;
        for tensor in &mut self.tensors {
            file.seek(SeekFrom::Start(position))?;
            let end = position + tensor.bytes;
            match &mut tensor.source {
                TensorSource::Bytes(data) => file.write_all(data)?,
                TensorSource::Zeros => {}
                TensorSource::FileRange { file: source, offset } => {
                    let mut source: &File = source;
                    source.seek(SeekFrom::Start(*offset))?;
                    // Copied in the kernel where it can be. Whole blocks apart from what is around them: these need no copy where blocks are shared.
                    let first = position.next_multiple_of(BLOCK_BYTES).min(end);
                    let last = (end / BLOCK_BYTES * BLOCK_BYTES).max(first);
                    let mut copied = 0;
                    for part in [first - position, last - first, end - last] {
                        copied += io::copy(&mut source.take(part), file)?;
                    }
                    if copied != tensor.bytes {
                        let message = format!(
                            "the file that tensor {} is copied from ended {} bytes early",
                            tensor.name,
                            tensor.bytes - copied
                        );
                        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, message));
                    }
                }
                TensorSource::Generate(generate) => {
                    let mut counted =
                        Counted { inner: BufWriter::with_capacity(1 << 20, &mut *file), left: tensor.bytes };
                    generate(&mut counted)?;
                    let left = counted.left;
                    counted.inner.flush()?;
                    if left != 0 {
                        return Err(io::Error::other(format!(
                            "the generator of tensor {} wrote {left} bytes too few",
                            tensor.name
                        )));
                    }
                }
            }
            position = end.next_multiple_of(alignment);
        }
        // Padding and zeros were skipped over; this makes them real.
        file.set_len(total_bytes)?;
        file.sync_all()
    }
}

/// Refuses more bytes than were promised.
struct Counted<W> {
    inner: W,
    left: u64,
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if data.len() as u64 > self.left {
            return Err(io::Error::other(format!(
                "a tensor generator wrote {} bytes too many",
                data.len() as u64 - self.left
            )));
        }
        let written = self.inner.write(data)?;
        self.left -= written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// A file under a temporary name, removed unless it is committed.
struct Temporary {
    path: PathBuf,
    file: File,
    committed: bool,
}

impl Temporary {
    fn create(target: &Path) -> io::Result<Self> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let name =
            target.file_name().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the path names no file"))?;
        loop {
            let serial = COUNTER.fetch_add(1, Ordering::Relaxed);
            let mut temporary_name = std::ffi::OsString::from(".");
            temporary_name.push(name);
            temporary_name.push(format!(".{}.{serial}.partial", std::process::id()));
            let path = target.with_file_name(temporary_name);
            // Never an existing file, and never through a link that someone laid out.
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(file) => {
                    return Ok(Self { path, file, committed: false });
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn commit(mut self, target: &Path) -> io::Result<()> {
        fs::rename(&self.path, target)?;
        self.committed = true;
        // The rename itself must survive a power cut. Not every system lets a folder be opened; the data is safe anyway.
        #[cfg(unix)]
        {
            let folder = target.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
            if let Ok(folder) = File::open(folder) {
                let _ = folder.sync_all();
            }
        }
        Ok(())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.committed {
            let _ = fs::remove_file(&self.path);
        }
    }
}
