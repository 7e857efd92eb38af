//! The folder of slices: each layer range of a model file is cut once and kept, and the folder does not grow for ever.
//!
//! A slice is named after its source's identity (path, size, time of change), so a file that changed gets new ones. The time does not
//! count for a file that is named after its content: while it is fetched in parts, it is touched all the time. Beside
//! the slices of a source lies a note with its path, by which [`prune`] sees that it is gone or has changed.

use std::{
    collections::HashSet,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    time::SystemTime,
};

use murmur_gguf::{Gguf, LayerRange};

use super::EngineError;

/// Slices that nothing uses at present are kept up to so many bytes, the least recently used ones go first.
pub const UNUSED_SLICES_BYTES_MAX: u64 = 32 << 30;
/// Ending of a note with the path of a source.
const NOTE: &str = "source";

/// The file that holds a layer range: cut once, kept under the identity of its source.
pub(super) fn slice_file(
    folder: &Path,
    gguf: &Gguf,
    range: LayerRange,
    content_addressed: bool,
) -> Result<PathBuf, EngineError> {
    let identity = source_identity(gguf.path(), content_addressed)
        .map_err(|e| EngineError::Io("the model file cannot be read", e))?;
    let path = folder.join(format!("{identity}-{}-{}.gguf", range.first, range.end));
    if path.exists() {
        // Its time of change is when it was used last; one that cannot be set costs a new cut some day.
        let _ = File::options().append(true).open(&path).and_then(|file| file.set_modified(SystemTime::now()));
        return Ok(path);
    }
    let noted = fs::create_dir_all(folder).and_then(|()| {
        let source = gguf.path().canonicalize()?;
        fs::write(folder.join(&identity).with_extension(NOTE), source.as_os_str().as_encoded_bytes())
    });
    noted.map_err(|e| EngineError::Io("the folder for model slices cannot be written to", e))?;
    murmur_gguf::slice(gguf, range, &path)?;
    Ok(path)
}

/// What tells one state of a model file from another: 16 hex digits.
fn source_identity(path: &Path, content_addressed: bool) -> io::Result<String> {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let metadata = fs::metadata(path)?;
    let mut hasher = DefaultHasher::new();
    let changed = if content_addressed { None } else { metadata.modified().ok() };
    (path.canonicalize()?, metadata.len(), changed, env!("CARGO_PKG_VERSION")).hash(&mut hasher);
    Ok(format!("{:016x}", hasher.finish()))
}

struct Slice {
    path: PathBuf,
    identity: String,
    bytes: u64,
    used: SystemTime,
}

/// Removes slices whose source is gone or has changed, and of the rest those that were not used for longest, beyond
/// `unused_bytes_max` bytes. `used`: slices to keep whatever their size. Returns the bytes that were freed. A file that cannot
/// be removed stays.
pub fn prune(folder: &Path, used: &HashSet<PathBuf>, unused_bytes_max: u64) -> u64 {
    let mut unused: Vec<Slice> = slices(folder).into_iter().filter(|slice| !used.contains(&slice.path)).collect();
    unused.sort_by_key(|slice| std::cmp::Reverse(slice.used));
    let (mut kept_bytes, mut freed_bytes) = (0u64, 0u64);
    for slice in &unused {
        if is_current(folder, &slice.identity) && kept_bytes.saturating_add(slice.bytes) <= unused_bytes_max {
            kept_bytes += slice.bytes;
        } else if fs::remove_file(&slice.path).is_ok() {
            freed_bytes += slice.bytes;
        }
    }
    let left: HashSet<String> = slices(folder).into_iter().map(|slice| slice.identity).collect();
    for note in entries(folder).filter(|path| path.extension().is_some_and(|ending| ending == NOTE)) {
        if note.file_stem().and_then(|stem| stem.to_str()).is_none_or(|identity| !left.contains(identity)) {
            // As above.
            let _ = fs::remove_file(note);
        }
    }
    freed_bytes
}

fn entries(folder: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path())
}

/// Files that are named as slices are; others are not ours.
fn slices(folder: &Path) -> Vec<Slice> {
    let slice = |path: PathBuf| {
        let name = path.file_name()?.to_str()?.strip_suffix(".gguf")?;
        let (identity, range) = name.split_once('-')?;
        let (first, end) = range.split_once('-')?;
        let is_number = |text: &str| text.parse::<u32>().is_ok();
        let is_slice = identity.len() == 16 && u64::from_str_radix(identity, 16).is_ok();
        let identity = (is_slice && is_number(first) && is_number(end)).then(|| identity.to_owned())?;
        let metadata = fs::metadata(&path).ok()?;
        Some(Slice { identity, bytes: metadata.len(), used: metadata.modified().ok()?, path })
    };
    entries(folder).filter_map(slice).collect()
}

fn is_current(folder: &Path, identity: &str) -> bool {
    let Ok(source) = fs::read_to_string(folder.join(identity).with_extension(NOTE)) else { return false };
    [false, true]
        .into_iter()
        .any(|addressed| source_identity(Path::new(&source), addressed).is_ok_and(|now| now == identity))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use murmur_gguf::synth::{self, Spec};

    use super::*;

    fn source(folder: &Path, name: &str) -> Gguf {
        let path = folder.join(name);
        synth::write(&Spec::tiny("llama").unwrap(), &path).unwrap();
        Gguf::open(&path).unwrap()
    }

    fn cut(folder: &Path, gguf: &Gguf, first: u32) -> PathBuf {
        slice_file(&folder.join("slices"), gguf, LayerRange::new(first, first + 1), false).unwrap()
    }

    #[test]
    fn slices_of_files_that_are_gone_or_changed_are_removed() {
        let temporary = tempfile::tempdir().unwrap();
        let folder = temporary.path();
        let (gone, changed, current) = (source(folder, "a.gguf"), source(folder, "b.gguf"), source(folder, "c.gguf"));
        let slices = [cut(folder, &gone, 0), cut(folder, &changed, 0), cut(folder, &current, 0)];
        let stranger = folder.join("slices/notes.txt");
        fs::write(&stranger, "mine").unwrap();
        fs::remove_file(gone.path()).unwrap();
        File::options().append(true).open(changed.path()).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
        assert!(prune(&folder.join("slices"), &HashSet::new(), u64::MAX) > 0);
        assert_eq!(slices.map(|path| path.exists()), [false, false, true]);
        let left: Vec<_> = entries(&folder.join("slices")).collect();
        assert_eq!(left.len(), 3, "{left:?}");
        assert!(stranger.exists());
    }

    #[test]
    fn a_slice_of_a_file_that_is_named_after_its_content_stays_good_when_the_file_is_touched() {
        let temporary = tempfile::tempdir().unwrap();
        let (folder, range) = (temporary.path().join("slices"), LayerRange::new(0, 1));
        let gguf = source(temporary.path(), "a.gguf");
        let cut = || slice_file(&folder, &gguf, range, true).unwrap();
        let before = cut();
        File::options().append(true).open(gguf.path()).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
        assert_eq!(cut(), before);
        assert_eq!(prune(&folder, &HashSet::new(), u64::MAX), 0);
        assert!(before.exists());
    }

    #[test]
    fn of_unused_slices_the_least_recently_used_go_first_and_used_ones_stay() {
        let temporary = tempfile::tempdir().unwrap();
        let folder = temporary.path();
        let gguf = source(folder, "a.gguf");
        let slices: Vec<PathBuf> = (0..4).map(|first| cut(folder, &gguf, first)).collect();
        for (age, path) in slices.iter().enumerate() {
            let at = SystemTime::now() - Duration::from_secs(100 * (age as u64 + 1));
            File::options().append(true).open(path).unwrap().set_modified(at).unwrap();
        }
        // Used again, the second oldest becomes the youngest.
        cut(folder, &gguf, 2);
        let bytes = |at: usize| fs::metadata(&slices[at]).unwrap().len();
        let room = bytes(2);
        prune(&folder.join("slices"), &HashSet::from([slices[3].clone()]), room);
        let left: Vec<bool> = slices.iter().map(|path| path.exists()).collect();
        assert_eq!(left, [false, false, true, true]);
        prune(&folder.join("slices"), &HashSet::new(), 0);
        assert_eq!(entries(&folder.join("slices")).count(), 0);
    }
}
