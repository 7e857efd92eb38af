//! Bytes of a model's file from a peer, as a taker reads them: the right ones with some of them changed, or any. Only what is of the file is
//! ever held, and of what comes right nothing is refused.
#![no_main]

use std::{fs, path::Path, sync::LazyLock};

use libfuzzer_sys::fuzz_target;
use murmur_gguf::ByteRange;
use murmur_store::{Content, Contents, GROUP_BYTES};
use tempfile::TempDir;

const BYTES: u64 = 6 * GROUP_BYTES + 123;

/// A folder, and a file in it that somebody has.
static SOURCE: LazyLock<(TempDir, Content, Vec<u8>)> = LazyLock::new(|| {
    // In memory, where there is such a place: a disk would be waited for.
    let memory = Path::new("/dev/shm");
    let folder = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    let folder = folder.expect("there is room");
    let bytes: Vec<u8> = (0..BYTES).map(|at| (at * 31 + at / 251) as u8).collect();
    let file = folder.path().join("original");
    fs::write(&file, &bytes).expect("there is room");
    let source = Contents::at(&folder.path().join("source")).adopt(&file, &mut |_, _| ()).expect("it is read");
    (folder, source, bytes)
});

fuzz_target!(|input: (u8, u8, bool, Vec<(u32, u8)>, Option<Vec<u8>>)| {
    let (first, count, only_hashes, changes, other) = input;
    let (folder, source, original) = &*SOURCE;
    let start = u64::from(first % 7) * GROUP_BYTES;
    let wanted = [ByteRange { start, end: (start + (1 + u64::from(count % 7)) * GROUP_BYTES).min(BYTES) }];
    let mut right = Vec::new();
    match only_hashes {
        true => source.encode_hashes(&wanted, &mut right).expect("it is here"),
        false => source.encode(&wanted, &mut right).expect("it is here"),
    }
    let mut sent = other.unwrap_or_else(|| right.clone());
    for (at, change) in changes {
        let length = sent.len().max(1);
        if let Some(byte) = sent.get_mut(at as usize % length) {
            *byte ^= change;
        }
    }
    let contents = Contents::at(&folder.path().join("target"));
    let content = contents.create(source.digest(), BYTES).expect("there is room");
    let mut from = sent.as_slice();
    let read = match only_hashes {
        true => content.decode_hashes(&wanted, &mut from),
        false => content.decode(&wanted, &mut from, &mut |_| ()),
    };
    let is_right = sent.starts_with(&right);
    assert_eq!(read.is_ok(), is_right, "{read:?}");
    let file = fs::read(content.path()).expect("it is there");
    for held in content.held() {
        let held = held.start as usize..held.end as usize;
        assert!(file[held.clone()] == original[held.clone()], "{held:?} is held and wrong");
    }
    assert!(!is_right || only_hashes || content.missing(&wanted).is_empty());
    let digest = content.digest();
    drop(content);
    contents.remove(&digest).expect("nobody writes to it");
});
