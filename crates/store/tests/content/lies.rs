//! Senders that lie, stop, or never end, and sizes that are not true.

use std::io::{self, Read, Write};

use murmur_gguf::Digest;
use murmur_store::{CONTENT_BYTES_MAX, Contents, DecodeError, ErrorKind, GROUP_BYTES, StoreError};
use proptest::prelude::*;

use super::{ALL, ByteRange, assert_right, encoding, fetch, groups, noise, source, target};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_wrong_bit_is_noticed_where_it_is_and_what_came_before_is_kept(
        len in 1..30 * GROUP_BYTES,
        at in any::<prop::sample::Index>(),
        bit in 0..8u8,
    ) {
        let home = tempfile::tempdir().unwrap();
        let source = source(home.path(), len);
        let target = target(home.path(), &source);
        let mut encoded = encoding(&source, ALL);
        let at = at.index(encoded.len());
        encoded[at] ^= 1 << bit;
        let mut kept = 0;
        let error = target.decode(ALL, &mut encoded.as_slice(), &mut |range| kept += range.end - range.start).unwrap_err();
        let DecodeError::Wrong { at: said } = error else { panic!("{error}") };
        // Nothing that came before it is lost, and nothing after it is believed.
        prop_assert!(kept <= said && said <= at as u64 && kept + 2 * GROUP_BYTES + 64 * 64 > at as u64, "{kept} {said} {at}");
        prop_assert_eq!(target.held_bytes(), kept);
        assert_right(&target, &noise(len));
        fetch(&source, &target, &target.missing(ALL)).unwrap();
        prop_assert!(target.is_complete());
    }

    #[test]
    fn a_sender_that_stops_loses_what_it_did_not_send(len in 1..30 * GROUP_BYTES, at in any::<prop::sample::Index>()) {
        let home = tempfile::tempdir().unwrap();
        let source = source(home.path(), len);
        let target = target(home.path(), &source);
        let encoded = encoding(&source, ALL);
        let sent = &encoded[..at.index(encoded.len())];
        let error = target.decode(ALL, &mut &sent[..], &mut |_| {}).unwrap_err();
        prop_assert!(matches!(error, DecodeError::Ended { at } if at == target.held_bytes()), "{error}");
        // Of a group there is at most one in the making, and the hashes before it.
        prop_assert!(target.held_bytes() + GROUP_BYTES + 64 * 8 + 64 * (len / GROUP_BYTES) > sent.len() as u64);
        assert_right(&target, &noise(len));
        let missing = target.missing(ALL);
        fetch(&source, &target, &missing).unwrap();
        prop_assert!(target.is_complete());
    }
}

#[test]
fn an_endless_stream_is_read_no_further_than_what_was_asked_for() {
    struct Endless(u64);
    impl Read for Endless {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.0 += buffer.len() as u64;
            buffer.fill(7);
            Ok(buffer.len())
        }
    }
    let home = tempfile::tempdir().unwrap();
    let source = source(home.path(), 40 * GROUP_BYTES);
    let target = target(home.path(), &source);
    let asked = [groups(3..5)];
    let mut endless = Endless(0);
    assert!(matches!(target.decode(&asked, &mut endless, &mut |_| {}), Err(DecodeError::Wrong { .. })));
    assert!(endless.0 <= target.encoded_bytes(&asked));

    // What follows the encoding is the next one's.
    let two = [encoding(&source, &asked), encoding(&source, &[groups(9..10)])].concat();
    let mut two = two.as_slice();
    target.decode(&asked, &mut two, &mut |_| {}).unwrap();
    target.decode(&[groups(9..10)], &mut two, &mut |_| {}).unwrap();
    assert!(two.is_empty());
    assert_eq!(target.held(), [groups(3..5), groups(9..10)]);
}

#[test]
fn a_connection_that_breaks_is_told_from_a_lie_and_from_a_full_disk() {
    struct Broken;
    impl Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::ErrorKind::ConnectionReset.into())
        }
    }
    impl Write for Broken {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::ConnectionReset.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let home = tempfile::tempdir().unwrap();
    let source = source(home.path(), 100 * GROUP_BYTES);
    let target = target(home.path(), &source);
    let encoded = encoding(&source, ALL);
    let half = &encoded[..encoded.len() / 2];
    let error = target.decode(ALL, &mut half.chain(Broken), &mut |_| {}).unwrap_err();
    assert!(matches!(&error, DecodeError::Receive(error) if error.kind() == io::ErrorKind::ConnectionReset), "{error}");
    assert!(target.held_bytes() > 40 * GROUP_BYTES);
    let error = source.encode(ALL, &mut Broken).unwrap_err();
    assert!(matches!(&error, StoreError::Send(_)), "{error}");
    assert!(source.is_complete());
}

#[test]
fn a_size_that_no_content_has_is_refused() {
    let home = tempfile::tempdir().unwrap();
    let contents = Contents::at(home.path());
    for bytes in [0, CONTENT_BYTES_MAX + 1, u64::MAX] {
        let error = contents.create(Digest([1; 32]), bytes).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Damaged, "{error}");
    }
    assert!(!home.path().join("models").exists());
    let empty = home.path().join("empty.gguf");
    std::fs::write(&empty, "").unwrap();
    assert!(matches!(contents.adopt(&empty, &mut |_, _| {}), Err(StoreError::ContentSize { .. })));
    assert!(contents.list().unwrap().is_empty());
}

#[cfg(target_os = "linux")]
#[test]
fn a_claim_costs_next_to_nothing() {
    use std::os::unix::fs::MetadataExt;
    let home = tempfile::tempdir().unwrap();
    let content = Contents::at(home.path()).create(Digest([1; 32]), CONTENT_BYTES_MAX).unwrap();
    let directory = content.path().parent().unwrap();
    let room = |file: std::fs::DirEntry| file.metadata().unwrap().blocks() * 512;
    assert!(std::fs::read_dir(directory).unwrap().map(|file| room(file.unwrap())).sum::<u64>() < 1 << 20);
    assert_eq!(content.missing(ALL), [ByteRange { start: 0, end: CONTENT_BYTES_MAX }]);
    assert!(matches!(
        content.decode(&[groups(0..1)], &mut &[0; 9999][..], &mut |_| {}),
        Err(DecodeError::Wrong { .. })
    ));
}

#[test]
fn what_verifies_under_a_wrong_size_is_right_and_the_last_group_never_does() {
    let home = tempfile::tempdir().unwrap();
    let true_bytes = 37 * GROUP_BYTES + 1000;
    let source = source(home.path(), true_bytes);
    let contents = Contents::at(&home.path().join("target"));
    let last = [ByteRange { start: true_bytes - 1, end: true_bytes }];
    for claimed in [1, GROUP_BYTES, true_bytes - 1, true_bytes + 1, true_bytes + GROUP_BYTES, 64 * GROUP_BYTES, 1 << 34]
    {
        let content = contents.create(source.digest(), claimed).unwrap();
        assert!(content.held().is_empty(), "another claim begins anew");
        let mut encoded = Vec::new();
        source.encode(ALL, &mut encoded).unwrap();
        let error = content.decode(ALL, &mut encoded.as_slice(), &mut |_| {}).unwrap_err();
        assert!(matches!(error, DecodeError::Wrong { .. } | DecodeError::Ended { .. }), "{claimed}: {error}");
        assert!(!content.is_complete(), "{claimed}");
        assert_right(&content, &noise(true_bytes));
        content.flush().unwrap();
    }
    // Asked for first, the last group proves the size. Then no other claim is taken.
    let content = contents.create(source.digest(), true_bytes).unwrap();
    fetch(&source, &content, &last).unwrap();
    let error = contents.create(source.digest(), true_bytes + 1).unwrap_err();
    assert!(error.to_string().contains("proven"), "{error}");
    assert_eq!(content.held_bytes(), 1000);
}
