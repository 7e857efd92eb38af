//! Hashes without bytes, and bytes without hashes.

use std::io::{self, Read};

use murmur_store::{Contents, DecodeError, GROUP_BYTES, StoreError};
use proptest::prelude::*;

use super::{ALL, ByteRange, Content, assert_right, fetch, groups, noise, source, target};

fn hashes(source: &Content, ranges: &[ByteRange]) -> Vec<u8> {
    let mut hashes = Vec::new();
    source.encode_hashes(ranges, &mut hashes).unwrap();
    hashes
}

/// What a hub would send for `ranges`.
fn bytes_of(original: &[u8], ranges: &[ByteRange]) -> Vec<u8> {
    let slices = ranges.iter().map(|range| &original[range.start as usize..range.end as usize]);
    slices.collect::<Vec<_>>().concat()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn bytes_from_elsewhere_are_taken_for_exactly_those_groups_whose_hashes_are_here(
        bytes in prop_oneof![1..3u64, GROUP_BYTES - 1..GROUP_BYTES + 2, 1..70 * GROUP_BYTES],
        known in prop::collection::vec((0..72 * GROUP_BYTES, 0..20 * GROUP_BYTES), 0..4),
        wanted in prop::collection::vec((0..72 * GROUP_BYTES, 0..20 * GROUP_BYTES), 0..4),
    ) {
        let home = tempfile::tempdir().unwrap();
        let source = source(home.path(), bytes);
        let target = target(home.path(), &source);
        let original = noise(bytes);
        let ranges = |pairs: Vec<(u64, u64)>| {
            let ranges: Vec<_> = pairs.into_iter().map(|(start, len)| ByteRange { start, end: start + len }).collect();
            target.missing(&ranges)
        };
        let (known, wanted) = (ranges(known), ranges(wanted));
        let known_hashes = hashes(&source, &known);
        prop_assert!(known_hashes.len() as u64 <= source.encoded_bytes(&known));
        target.decode_hashes(&known, &mut [&known_hashes[..], b"what follows is another's"].concat().as_slice()).unwrap();
        prop_assert!(target.unproven(&known).unwrap().is_empty());
        prop_assert!(target.held().is_empty());

        let unproven = target.unproven(&wanted).unwrap();
        let mut heard = 0;
        let filled = target.fill(&wanted, &mut bytes_of(&original, &wanted).as_slice(), &mut |range| heard += range.end - range.start);
        if unproven.is_empty() {
            filled.unwrap();
            prop_assert_eq!(target.held(), wanted.clone());
        } else {
            let is_lacking = matches!(&filled, Err(DecodeError::Store(StoreError::ContentLacks { start, .. })) if *start == unproven[0].start);
            prop_assert!(is_lacking, "{filled:?}");
            prop_assert_eq!(heard, 0);
            target.decode_hashes(&unproven, &mut hashes(&source, &unproven).as_slice()).unwrap();
            target.fill(&wanted, &mut bytes_of(&original, &wanted).as_slice(), &mut |_| {}).unwrap();
        }
        assert_right(&target, &original);
        // What came in this way is handed on as any other.
        let end = Contents::at(&home.path().join("end")).create(source.digest(), source.bytes()).unwrap();
        fetch(&target, &end, &wanted).unwrap();
        prop_assert_eq!(end.held(), wanted);
    }

    #[test]
    fn a_wrong_bit_in_hashes_or_in_bytes_is_noticed(
        len in 2 * GROUP_BYTES..30 * GROUP_BYTES,
        at in any::<prop::sample::Index>(),
        in_hashes in any::<bool>(),
        bit in 0..8u8,
    ) {
        let home = tempfile::tempdir().unwrap();
        let source = source(home.path(), len);
        let target = target(home.path(), &source);
        let (mut hashes, mut bytes) = (hashes(&source, ALL), noise(len));
        let sent = if in_hashes { &mut hashes } else { &mut bytes };
        let at = at.index(sent.len());
        sent[at] ^= 1 << bit;
        let come = target.decode_hashes(ALL, &mut hashes.as_slice());
        if in_hashes {
            prop_assert!(matches!(come, Err(DecodeError::Wrong { .. })), "{come:?}");
            prop_assert!(!target.unproven(ALL).unwrap().is_empty());
            return Ok(());
        }
        come.unwrap();
        let whole = target.missing(ALL);
        let error = target.fill(&whole, &mut bytes.as_slice(), &mut |_| {}).unwrap_err();
        let group = at as u64 / GROUP_BYTES;
        prop_assert!(matches!(error, DecodeError::Wrong { at } if at == group * GROUP_BYTES), "{error}");
        prop_assert_eq!(target.held_bytes(), group * GROUP_BYTES);
        assert_right(&target, &noise(len));
        let rest = target.missing(ALL);
        target.fill(&rest, &mut bytes_of(&noise(len), &rest).as_slice(), &mut |_| {}).unwrap();
        prop_assert!(target.is_complete());
    }
}

#[test]
fn what_is_cut_short_or_breaks_off_is_told_apart_and_what_came_is_kept() {
    struct Breaks<'a>(&'a [u8]);
    impl Read for Breaks<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            if self.0.is_empty() { Err(io::Error::other("the line is dead")) } else { self.0.read(buffer) }
        }
    }
    let home = tempfile::tempdir().unwrap();
    let source = source(home.path(), 40 * GROUP_BYTES);
    let target = target(home.path(), &source);
    let hashes = hashes(&source, ALL);
    let half = &hashes[..hashes.len() / 2];
    assert!(matches!(target.decode_hashes(ALL, &mut &half[..]), Err(DecodeError::Ended { .. })));
    assert!(matches!(target.decode_hashes(ALL, &mut Breaks(half)), Err(DecodeError::Receive(_))));
    // The first hashes prove the first groups.
    assert!(target.unproven(&[groups(0..1)]).unwrap().is_empty());
    assert!(!target.unproven(ALL).unwrap().is_empty());
    target.decode_hashes(ALL, &mut hashes.as_slice()).unwrap();

    let original = noise(source.bytes());
    let some = &original[..5 * GROUP_BYTES as usize + 100];
    assert!(matches!(target.fill(&target.missing(ALL), &mut &some[..], &mut |_| {}), Err(DecodeError::Ended { .. })));
    assert_eq!(target.held(), [groups(0..5)]);
    let some = &original[5 * GROUP_BYTES as usize..8 * GROUP_BYTES as usize];
    assert!(matches!(target.fill(&target.missing(ALL), &mut Breaks(some), &mut |_| {}), Err(DecodeError::Receive(_))));
    assert_eq!(target.held(), [groups(0..8)]);
    // The next process has the hashes, too.
    let (digest, whole) = (target.digest(), target.missing(ALL));
    drop(target);
    let target = Contents::at(&home.path().join("target")).find(&digest).unwrap().unwrap();
    assert!(target.unproven(&whole).unwrap().is_empty());
    assert!(target.decode_hashes(ALL, &mut io::empty()).is_err());
}

#[test]
fn hashes_that_are_not_here_are_not_handed_out() {
    let home = tempfile::tempdir().unwrap();
    let source = source(home.path(), 64 * GROUP_BYTES);
    let target = target(home.path(), &source);
    fetch(&source, &target, &[groups(10..12)]).unwrap();
    assert_eq!(hashes(&target, &[groups(10..12)]), hashes(&source, &[groups(10..12)]));
    let mut sent = Vec::new();
    let error = target.encode_hashes(&[groups(10..40)], &mut sent).unwrap_err();
    assert!(matches!(error, StoreError::ContentLacks { .. }), "{error}");
    // Of what was sent before, each pair is right.
    assert!(hashes(&source, &[groups(10..40)]).starts_with(&sent));
}
