//! Contents on a real disk: what arrives, what is kept, what is served on.

#![allow(clippy::unwrap_used, reason = "helpers of tests, too, end the test when something is off")]

mod crashes;
mod disks;
mod hashes;
mod held;
mod lies;
mod signatures;

use std::{
    fs,
    io::{Read, Seek, SeekFrom},
    path::Path,
    process::Command,
};

use murmur_gguf::{Digest, manifest::ByteRange};
use murmur_store::{Content, Contents, DecodeError, ErrorKind, GROUP_BYTES, StoreError};
use proptest::prelude::*;

/// The whole of any content.
const ALL: &[ByteRange] = &[ByteRange { start: 0, end: u64::MAX }];

/// Bytes that look like nothing else, always the same.
fn noise(len: u64) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    blake3::Hasher::new().update(&len.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

fn groups(range: std::ops::Range<u64>) -> ByteRange {
    ByteRange { start: range.start * GROUP_BYTES, end: range.end * GROUP_BYTES }
}

/// A file of `len` bytes in `folder`, adopted: whom the others fetch from.
fn source(folder: &Path, len: u64) -> Content {
    let file = folder.join("original.gguf");
    if !file.exists() {
        fs::write(&file, noise(len)).unwrap();
    }
    Contents::at(&folder.join("source")).adopt(&file, &mut |_, _| {}).unwrap()
}

fn target(folder: &Path, source: &Content) -> Content {
    Contents::at(&folder.join("target")).create(source.digest(), source.bytes()).unwrap()
}

fn encoding(source: &Content, ranges: &[ByteRange]) -> Vec<u8> {
    let mut encoded = Vec::new();
    source.encode(ranges, &mut encoded).unwrap();
    assert_eq!(encoded.len() as u64, source.encoded_bytes(ranges));
    encoded
}

/// Sends `ranges` from one to the other; returns the groups that were kept.
fn fetch(source: &Content, target: &Content, ranges: &[ByteRange]) -> Result<Vec<u64>, DecodeError> {
    let mut kept = Vec::new();
    let mut heard = |range: ByteRange| kept.push(range.start / GROUP_BYTES);
    target.decode(ranges, &mut encoding(source, ranges).as_slice(), &mut heard)?;
    Ok(kept)
}

/// What is held is there, byte for byte, and in whole groups.
fn assert_right(content: &Content, original: &[u8]) {
    let mut file = fs::File::open(content.path()).unwrap();
    let held = content.held();
    assert!(held.windows(2).all(|pair| pair[0].end < pair[1].start), "{held:?}");
    for ByteRange { start, end } in held {
        assert!(start % GROUP_BYTES == 0 && (end % GROUP_BYTES == 0 || end == content.bytes()));
        let mut bytes = vec![0; (end - start) as usize];
        file.seek(SeekFrom::Start(start)).unwrap();
        file.read_exact(&mut bytes).unwrap();
        assert!(bytes == original[start as usize..end as usize], "{start}..{end}");
    }
}

/// This test once more, in a process of its own that knows `folder`.
fn again(test: &str, folder: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture"]).env("MURMUR_TEST_FOLDER", folder);
    command
}

/// The folder, in such a process.
fn folder_of_child() -> Option<std::path::PathBuf> {
    std::env::var_os("MURMUR_TEST_FOLDER").map(Into::into)
}

#[test]
fn a_content_arrives_in_parts_and_is_whole_in_the_end() {
    let home = tempfile::tempdir().unwrap();
    let source = source(home.path(), 40 * GROUP_BYTES + 123);
    let original = noise(source.bytes());
    assert!(source.is_complete() && source.is_reference());
    assert_eq!(source.digest(), Digest::from(blake3::hash(&original)));

    let target = target(home.path(), &source);
    assert!(target.held().is_empty() && !target.is_complete());
    assert_eq!(target.missing(ALL), [ByteRange { start: 0, end: source.bytes() }]);
    assert_eq!(fs::metadata(target.path()).unwrap().len(), source.bytes());

    // A few bytes are as good as the groups that they are in.
    let some = [ByteRange { start: 5 * GROUP_BYTES + 7, end: 6 * GROUP_BYTES + 1 }];
    assert_eq!(fetch(&source, &target, &some).unwrap(), [5, 6]);
    assert_eq!(target.held(), [groups(5..7)]);
    assert!(target.missing(&some).is_empty());
    assert_right(&target, &original);

    let last = [ByteRange { start: source.bytes() - 1, end: source.bytes() }];
    assert_eq!(fetch(&source, &target, &last).unwrap(), [40]);
    assert_eq!(target.held()[1], ByteRange { start: 40 * GROUP_BYTES, end: source.bytes() });

    let rest = target.missing(ALL);
    assert_eq!(rest, [groups(0..5), groups(7..40)]);
    fetch(&source, &target, &rest).unwrap();
    assert!(target.is_complete());
    assert!(fs::read(target.path()).unwrap() == original);
}

#[test]
fn a_part_is_served_on_and_what_is_not_here_is_not() {
    let home = tempfile::tempdir().unwrap();
    let source = source(home.path(), 64 * GROUP_BYTES);
    let middle = target(home.path(), &source);
    fetch(&source, &middle, &[groups(10..30)]).unwrap();
    let end = Contents::at(&home.path().join("end")).create(source.digest(), source.bytes()).unwrap();
    fetch(&middle, &end, &[groups(12..20), groups(25..26)]).unwrap();
    assert_eq!(end.held(), [groups(12..20), groups(25..26)]);
    assert_right(&end, &noise(source.bytes()));
    // A part and the whole are told in the same bytes.
    assert!(encoding(&source, &[groups(12..20)]) == encoding(&middle, &[groups(12..20)]));

    let mut nothing = Vec::new();
    let error = middle.encode(&[groups(29..31)], &mut nothing).unwrap_err();
    assert!(matches!(error, StoreError::ContentLacks { start, .. } if start == 30 * GROUP_BYTES), "{error}");
    assert!(nothing.is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_ranges_of_any_size_arrive(
        bytes in prop_oneof![1..3u64, GROUP_BYTES - 1..GROUP_BYTES + 2, 1..70 * GROUP_BYTES],
        wanted in prop::collection::vec((0..72 * GROUP_BYTES, 0..20 * GROUP_BYTES), 0..6),
    ) {
        let home = tempfile::tempdir().unwrap();
        let source = source(home.path(), bytes);
        let target = target(home.path(), &source);
        let wanted: Vec<_> = wanted.into_iter().map(|(start, len)| ByteRange { start, end: start + len }).collect();
        let missing = target.missing(&wanted);
        let kept = fetch(&source, &target, &wanted).unwrap();
        prop_assert!(target.missing(&wanted).is_empty());
        prop_assert_eq!(target.held(), missing);
        prop_assert!(kept.is_sorted_by(|a, b| a < b));
        assert_right(&target, &noise(bytes));
        fetch(&source, &target, ALL).unwrap();
        prop_assert!(fs::read(target.path()).unwrap() == noise(bytes));
    }
}

#[test]
fn several_peers_send_at_the_same_time() {
    const PEERS: u64 = 8;
    let home = tempfile::tempdir().unwrap();
    let source = source(home.path(), 256 * GROUP_BYTES - 5);
    let target = target(home.path(), &source);
    std::thread::scope(|scope| {
        for peer in 0..PEERS {
            let (source, target) = (&source, target.clone());
            scope.spawn(move || {
                for n in 0..256 / PEERS {
                    fetch(source, &target, &[groups(n * PEERS + peer..n * PEERS + peer + 1)]).unwrap();
                    if n % 8 == peer {
                        target.flush().unwrap();
                    }
                }
            });
        }
    });
    assert!(target.is_complete());
    assert!(fs::read(target.path()).unwrap() == noise(source.bytes()));
}

#[test]
fn handles_of_one_content_share_what_they_know_and_the_next_process_knows_it_too() {
    let home = tempfile::tempdir().unwrap();
    let source = source(home.path(), 20 * GROUP_BYTES);
    let contents = Contents::at(&home.path().join("target"));
    let first = contents.create(source.digest(), source.bytes()).unwrap();
    let second = Contents::at(&home.path().join("target")).find(&source.digest()).unwrap().unwrap();
    fetch(&source, &first, &[groups(3..8)]).unwrap();
    assert_eq!(second.held(), [groups(3..8)]);

    let entry = contents.list().unwrap().remove(0);
    assert_eq!((entry.digest, entry.bytes, entry.held_bytes), (source.digest(), 20 * GROUP_BYTES, 5 * GROUP_BYTES));
    assert!(!entry.is_reference && entry.path.ends_with("model.gguf"));

    // All handles gone, the content is opened from disk.
    drop((first, second));
    let third = contents.create(source.digest(), source.bytes()).unwrap();
    assert_eq!(third.held(), [groups(3..8)]);
    assert!(contents.find(&Digest([7; 32])).unwrap().is_none());
}

#[test]
fn a_file_is_read_once_and_never_changed() {
    let home = tempfile::tempdir().unwrap();
    let contents = Contents::at(&home.path().join("data"));
    assert!(contents.list().unwrap().is_empty() && !home.path().join("data").exists(), "looking wrote something");
    let file = home.path().join("m.gguf");
    fs::write(&file, noise(5_000_000)).unwrap();
    let read = |path: &Path| {
        let mut last = (0, 0);
        let content = contents.adopt(path, &mut |done, total| last = (done, total)).unwrap();
        assert!(content.is_complete() && content.path() == file);
        last
    };
    assert_eq!(read(&file), (5_000_000, 5_000_000));
    assert_eq!(read(&file), (0, 0), "read again");
    // Another copy is the same content, and is remembered as well.
    let copy = home.path().join("copy.gguf");
    fs::copy(&file, &copy).unwrap();
    assert_eq!(read(&copy), (5_000_000, 5_000_000));
    assert_eq!(read(&copy), (0, 0), "read again");
    assert_eq!(contents.list().unwrap().len(), 1);

    // When the first goes, the second serves.
    fs::remove_file(&file).unwrap();
    let digest = Digest::from(blake3::hash(&noise(5_000_000)));
    let content = contents.find(&digest).unwrap().unwrap();
    assert!(content.path() == copy && content.is_complete());
    assert_eq!(encoding(&content, &[groups(0..1)]).len() as u64, content.encoded_bytes(&[groups(0..1)]));
    assert!(matches!(content.forget(ALL), Err(StoreError::ContentIsReference { .. })));
    assert_eq!(contents.remove(&digest).unwrap(), 0);
    assert!(copy.exists() && contents.list().unwrap().is_empty());
}

#[test]
fn a_file_that_changed_or_is_gone_is_not_served_and_forgotten() {
    let home = tempfile::tempdir().unwrap();
    let source = source(home.path(), 10 * GROUP_BYTES);
    let contents = Contents::at(&home.path().join("source"));
    let file = source.path().to_owned();

    // Same size, same time of change: the tree notices, and what is wrong is not sent.
    let modified = fs::metadata(&file).unwrap().modified().unwrap();
    let mut bytes = noise(source.bytes());
    bytes[4 * GROUP_BYTES as usize] ^= 1;
    fs::write(&file, &bytes).unwrap();
    fs::File::options().write(true).open(&file).unwrap().set_modified(modified).unwrap();
    let mut sent = Vec::new();
    let error = source.encode(ALL, &mut sent).unwrap_err();
    assert!(matches!(error, StoreError::ContentChanged { .. }), "{error}");
    assert!(
        (sent.len() as u64) < 6 * GROUP_BYTES
            && !sent.windows(64).any(|sent| bytes[4 * GROUP_BYTES as usize..].starts_with(sent))
    );

    // Another time of change is enough.
    fs::write(&file, noise(source.bytes())).unwrap();
    let error = source.encode(&[groups(0..1)], &mut Vec::new()).unwrap_err();
    assert!(error.to_string().contains("original.gguf has changed"), "{error}");
    assert!(contents.find(&source.digest()).unwrap().is_none());

    let anew = contents.adopt(&file, &mut |_, _| {}).unwrap();
    assert_eq!(anew.digest(), source.digest());
    fs::remove_file(&file).unwrap();
    assert!(contents.list().unwrap().is_empty());
    assert_eq!(fs::read_dir(home.path().join("source/models/contents")).unwrap().count(), 1, "only the lock is left");
}

#[test]
fn a_part_gives_way_to_the_whole_file() {
    let home = tempfile::tempdir().unwrap();
    let source = source(home.path(), 10 * GROUP_BYTES);
    let part = target(home.path(), &source);
    fetch(&source, &part, &[groups(0..4)]).unwrap();
    part.flush().unwrap();
    let whole = Contents::at(&home.path().join("target")).adopt(source.path(), &mut |_, _| {}).unwrap();
    assert!(whole.is_reference() && whole.is_complete() && whole.path() == source.path());
    assert!(!part.path().exists());
    let error = fetch(&source, &part, ALL).unwrap_err();
    assert!(matches!(error, DecodeError::Store(StoreError::ContentGone { .. })), "{error}");
}

#[test]
fn what_is_removed_is_gone_for_writers_and_not_for_readers() {
    let home = tempfile::tempdir().unwrap();
    let source = source(home.path(), 10 * GROUP_BYTES);
    let contents = Contents::at(&home.path().join("target"));
    let content = target(home.path(), &source);
    fetch(&source, &content, &[groups(0..4)]).unwrap();
    assert_eq!(contents.remove(&source.digest()).unwrap(), 4 * GROUP_BYTES);
    assert!(contents.find(&source.digest()).unwrap().is_none() && contents.list().unwrap().is_empty());
    encoding(&content, &[groups(0..4)]);
    let error = fetch(&source, &content, ALL).unwrap_err();
    assert!(matches!(error, DecodeError::Store(StoreError::ContentGone { .. })), "{error}");
    assert_eq!(contents.remove(&source.digest()).unwrap(), 0, "twice is no mistake");

    // The next of that digest is another.
    let anew = target(home.path(), &source);
    assert!(anew.held().is_empty());
    fetch(&source, &anew, ALL).unwrap();
    assert_right(&anew, &noise(source.bytes()));
    assert_eq!(content.held(), [groups(0..4)]);
}

#[cfg(target_os = "linux")]
#[test]
fn what_is_given_up_takes_no_room_and_can_be_fetched_again() {
    use std::os::unix::fs::MetadataExt;
    let home = tempfile::tempdir().unwrap();
    let source = source(home.path(), 100 * GROUP_BYTES + 1);
    let content = target(home.path(), &source);
    fetch(&source, &content, ALL).unwrap();
    let room = || fs::metadata(content.path()).unwrap().blocks() * 512;
    let whole = room();
    // Groups that lie in it only in part stay.
    let part = [ByteRange { start: 10 * GROUP_BYTES + 1, end: 50 * GROUP_BYTES - 1 }, groups(60..61), groups(61..62)];
    assert_eq!(content.forget(&part).unwrap(), (38 + 2) * GROUP_BYTES);
    assert_eq!(content.missing(ALL), [groups(11..49), groups(60..62)]);
    assert!(room() + 40 * GROUP_BYTES <= whole, "{} of {whole}", room());
    assert_right(&content, &noise(source.bytes()));
    assert_eq!(content.forget(&[ByteRange { start: 99 * GROUP_BYTES, end: u64::MAX }]).unwrap(), GROUP_BYTES + 1);
    assert_eq!(content.forget(&[groups(20..30)]).unwrap(), 0);

    let held = content.held();
    drop(content);
    let content = target(home.path(), &source);
    assert_eq!(content.held(), held);
    fetch(&source, &content, &content.missing(ALL)).unwrap();
    assert!(fs::read(content.path()).unwrap() == noise(source.bytes()));
}

#[test]
fn one_process_writes_and_others_read() {
    use std::io::{BufRead, BufReader, Write};
    const TEST: &str = "one_process_writes_and_others_read";
    if let Some(folder) = folder_of_child() {
        let source = source(&folder, 50 * GROUP_BYTES);
        let content = target(&folder, &source);
        fetch(&source, &content, &[groups(0..10)]).unwrap();
        content.flush().unwrap();
        fetch(&source, &content, &[groups(10..20)]).unwrap();
        std::io::stderr().write_all(b"\nwriting\n").unwrap();
        // Until the other says so.
        std::io::stdin().read_line(&mut String::new()).unwrap();
        return;
    }
    let home = tempfile::tempdir().unwrap();
    let source = source(home.path(), 50 * GROUP_BYTES);
    let mut child = again(TEST, home.path());
    let mut child = child.stdin(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap();
    let said = BufReader::new(child.stderr.take().unwrap()).lines().find(|line| line.as_ref().unwrap() == "writing");
    assert!(said.is_some());

    let contents = Contents::at(&home.path().join("target"));
    let content = contents.find(&source.digest()).unwrap().unwrap();
    assert_eq!(content.held(), [groups(0..10)], "what the other has made durable");
    encoding(&content, &[groups(2..9)]);
    let refused = |error: StoreError| {
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert!(error.to_string().contains(&format!("process {} writes to the content", child.id())), "{error}");
    };
    match fetch(&source, &content, &[groups(30..31)]).unwrap_err() {
        DecodeError::Store(error) => refused(error),
        other => panic!("{other}"),
    }
    refused(content.forget(ALL).unwrap_err());
    refused(contents.remove(&source.digest()).unwrap_err());

    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());
    fetch(&source, &content, &[groups(30..31)]).unwrap();
    assert_eq!(content.held(), [groups(0..20), groups(30..31)]);
    assert_right(&content, &noise(source.bytes()));
}

#[test]
fn where_a_hub_has_the_file_is_remembered_with_the_rest() {
    let home = tempfile::tempdir().unwrap();
    let source = source(home.path(), 3 * GROUP_BYTES);
    let target = target(home.path(), &source);
    fetch(&source, &target, &[groups(1..2)]).unwrap();
    assert_eq!(target.source(), None);
    for content in [&source, &target] {
        content.set_source("hf:someone/Tiny-GGUF@0123456:tiny.gguf").unwrap();
    }
    target.forget(&[groups(1..2)]).unwrap();
    let (digest, held) = (target.digest(), target.held());
    drop((source, target));
    for folder in ["source", "target"] {
        let content = Contents::at(&home.path().join(folder)).find(&digest).unwrap().unwrap();
        assert_eq!(content.source().as_deref(), Some("hf:someone/Tiny-GGUF@0123456:tiny.gguf"));
    }
    assert!(held.is_empty());
}
