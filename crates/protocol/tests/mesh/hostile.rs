//! Bytes from strangers: forged, damaged, cut, oversized, of another mesh or nothing at all.

use std::ops::Range;

use murmur_protocol::mesh::content::{
    CONTENTS_MAX, FETCH_RANGES_MAX, FILE_BYTES_MAX, GROUP_BYTES, HELD_RANGES_MAX, SOURCE_BYTES_MAX,
};
use murmur_protocol::mesh::control::{DIGEST_ENTRIES_MAX, RECORDS_MAX};
use murmur_protocol::mesh::open::REQUEST_TOKENS_MAX;
use murmur_protocol::mesh::summary::RANGES_MAX;
use murmur_protocol::mesh::wire::{HEADER_BYTES, UNKNOWN_BODY_BYTES_MAX};
use murmur_protocol::mesh::*;
use murmur_protocol::sampling::{Grammar, SamplingParams};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

use crate::samples::{self, node_key, record};

/// What the decoder makes of bytes that end here.
fn decode<M: Message>(mut bytes: &[u8]) -> Result<Option<M>, MessageError> {
    Decoder::new().next(&mut bytes)
}

fn framed(kind: u16, body: &[u8]) -> Vec<u8> {
    [(body.len() as u32).to_le_bytes().as_slice(), &kind.to_le_bytes(), body].concat()
}

/// A number as protobuf writes it.
fn varint(mut number: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while number > 0x7f {
        bytes.push(0x80 | (number & 0x7f) as u8);
        number >>= 7;
    }
    bytes.push(number as u8);
    bytes
}

/// A field that is a number.
fn number(field: u64, number: u64) -> Vec<u8> {
    [varint(field << 3), varint(number)].concat()
}

/// A field that is bytes, text, a message or packed numbers.
fn field(field: u64, bytes: &[u8]) -> Vec<u8> {
    [varint(field << 3 | 2), varint(bytes.len() as u64), bytes.to_vec()].concat()
}

/// A field that is a list of numbers.
fn packed(at: u64, numbers: &[u64]) -> Vec<u8> {
    field(at, &numbers.iter().copied().flat_map(varint).collect::<Vec<_>>())
}

/// What was read once can be sent, and is then read as the same.
fn settles<M: Message>(message: &M) {
    let bytes = encode(message).unwrap();
    let again = decode::<M>(&bytes).unwrap().unwrap();
    assert_eq!(encode(&again).unwrap(), bytes);
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(kind in 0u16..18, bytes in vec(any::<u8>(), 0..400)) {
        let _ = decode::<Control>(&bytes);
        let _ = decode::<Work>(&bytes);
        if let Ok(Some(message)) = decode::<Control>(&framed(kind, &bytes)) {
            settles(&message);
        }
        if let Ok(Some(message)) = decode::<Work>(&framed(kind, &bytes)) {
            settles(&message);
        }
        if let Ok(signed) = SignedRecord::from_bytes(&bytes) {
            let _ = signed.claim();
            prop_assert!(signed.verify(MeshId::public("m")).is_err());
        }
    }

    #[test]
    fn a_damaged_message_is_an_error_or_a_message_that_can_be_sent(
        control in samples::any_control(),
        work in samples::any_work(),
        damage in vec((any::<Index>(), any::<u8>()), 1..4),
    ) {
        let damaged = |mut bytes: Vec<u8>| {
            for (at, byte) in &damage {
                let at = at.index(bytes.len());
                bytes[at] = *byte;
            }
            bytes
        };
        if let Ok(Some(message)) = decode::<Control>(&damaged(encode(&control).unwrap())) {
            settles(&message);
        }
        if let Ok(Some(message)) = decode::<Work>(&damaged(encode(&work).unwrap())) {
            settles(&message);
        }
    }

    #[test]
    fn a_message_that_is_cut_is_not_a_message(message in samples::any_control(), at in any::<Index>()) {
        let bytes = encode(&message).unwrap();
        let cut = &bytes[..at.index(bytes.len())];
        prop_assert_eq!(decode::<Control>(cut), Ok(None));
        let mut decoder = Decoder::<Control>::new();
        let mut input = cut;
        prop_assert_eq!(decoder.next(&mut input), Ok(None));
        prop_assert_eq!(decoder.is_at_boundary(), cut.is_empty());
    }

    #[test]
    fn a_record_with_one_bit_flipped_never_verifies(
        (record, key) in samples::any_record(MeshId::public("m")),
        at in any::<Index>(),
        bit in 0u8..8,
    ) {
        let mut bytes = record.sign(&key).unwrap().as_bytes().to_vec();
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        prop_assert!(SignedRecord::from_bytes(bytes).unwrap().verify(record.mesh).is_err());
    }

    #[test]
    fn a_contact_that_is_damaged_or_cut_is_not_opened(at in any::<Index>(), bit in 0u8..8) {
        let mut bytes = contact::seal(&record().addresses, &node_key(1)).unwrap();
        let at = at.index(bytes.len());
        prop_assert!(contact::open(&bytes[..at]).is_err());
        bytes[at] ^= 1 << bit;
        prop_assert!(contact::open(&bytes).is_err());
    }

    #[test]
    fn a_record_that_is_cut_or_longer_never_verifies(
        (record, key) in samples::any_record(MeshId::public("m")),
        at in any::<Index>(),
        more in vec(any::<u8>(), 1..20),
    ) {
        let bytes = record.sign(&key).unwrap().as_bytes().to_vec();
        for bytes in [bytes[..at.index(bytes.len())].to_vec(), [bytes, more].concat()] {
            if let Ok(signed) = SignedRecord::from_bytes(bytes) {
                prop_assert!(signed.verify(record.mesh).is_err());
            }
        }
    }
}

#[test]
fn a_record_of_another_mesh_is_refused_and_the_error_names_both() {
    let signed = record().sign(&node_key(1)).unwrap();
    let other = MeshId::public("other");
    let refused = RecordError::WrongMesh { expected: other, found: record().mesh };
    assert_eq!(signed.verify(other), Err(refused));
}

#[test]
fn nobody_can_speak_or_bury_in_anothers_name() {
    let refused = samples::tombstone().sign(&node_key(2)).unwrap_err();
    assert_eq!(refused, RecordError::WrongKey(record().node));
    // Somebody else's signature over their own record, put before this node's tombstone.
    let theirs = NodeRecord { node: node_key(2).node_id(), ..samples::tombstone() }.sign(&node_key(2)).unwrap();
    let honest = samples::tombstone().sign(&node_key(1)).unwrap();
    let forged = [&theirs.as_bytes()[..64], &honest.as_bytes()[64..]].concat();
    let forged = SignedRecord::from_bytes(forged).unwrap();
    assert_eq!(forged.verify(record().mesh), Err(RecordError::BadSignature(BadSignature)));
    // What it claims to be can be read all the same: only verification tells.
    assert_eq!(forged.claim(), honest.claim());
}

#[test]
fn a_record_above_the_limit_is_refused_before_it_is_read() {
    let refused = SignedRecord::from_bytes(vec![0; RECORD_BYTES_MAX + 1]).unwrap_err();
    assert!(matches!(refused, MessageError::TooLarge { bytes, limit, .. } if bytes == limit + 1));
    assert!(SignedRecord::from_bytes(vec![0; RECORD_BYTES_MAX]).is_ok());
    assert!(SignedRecord::from_bytes([0; 64]).is_err(), "a signature over nothing");
}

#[test]
fn a_record_that_breaks_a_rule_is_not_signed() {
    let key = node_key(1);
    let too_long_a_name = ServedModel { name: "n".repeat(97), ..samples::model() };
    let no_name = ServedModel { name: String::new(), ..samples::model() };
    let escape = ServedModel { name: "\x1b[2J".into(), ..samples::model() };
    let mut no_round_trip = samples::links()[0];
    no_round_trip.rtt_us = 0;
    let broken = [
        NodeRecord { ttl_ms: 0, ..record() },
        NodeRecord { ttl_ms: record::TTL_MS_MAX + 1, ..record() },
        NodeRecord { software: "s".repeat(65), ..record() },
        NodeRecord { models: vec![too_long_a_name], ..record() },
        NodeRecord { models: vec![no_name], ..record() },
        NodeRecord { models: vec![escape], ..record() },
        NodeRecord { models: vec![samples::model(), samples::model()], ..record() },
        NodeRecord { stages: vec![samples::stage(), samples::stage()], ..record() },
        NodeRecord { stages: vec![ServedStage { name: "n".repeat(97), ..samples::stage() }], ..record() },
        NodeRecord { stages: vec![ServedStage { build: "\x1b[2J".into(), ..samples::stage() }], ..record() },
        NodeRecord { stages: vec![ServedStage { end: 81, ..samples::stage() }], ..record() },
        NodeRecord { stages: vec![ServedStage { layers: 1_025, ..samples::stage() }], ..record() },
        NodeRecord { links: vec![samples::links()[0]; 2], ..record() },
        NodeRecord { links: vec![no_round_trip], ..record() },
        NodeRecord { addresses: Addresses { relay: None, direct: vec!["0.0.0.0:7".parse().unwrap()] }, ..record() },
    ];
    for record in broken {
        assert!(matches!(record.sign(&key), Err(RecordError::Message(_))), "{record:?}");
    }
}

fn held(digest: u8) -> HeldContent {
    HeldContent { digest: ModelDigest::from_bytes([digest; 32]), ..samples::contents().remove(0) }
}

#[test]
fn contents_that_break_a_rule_are_neither_signed_nor_read() {
    let key = node_key(1);
    // As it travels, whatever it says.
    let raw = |content: &HeldContent| {
        let HeldContent { digest, name, file_bytes, held_bytes, source } = content;
        let source = source.as_ref().map_or_else(Vec::new, |source| field(5, source.as_bytes()));
        let fields =
            [field(1, digest.as_bytes()), field(2, name.as_bytes()), number(3, *file_bytes), number(4, *held_bytes)];
        field(16, &[fields.concat(), source].concat())
    };
    let signed = |contents: &[Vec<u8>]| {
        let body = [&record().sign(&key).unwrap().as_bytes()[64..], &contents.concat()].concat();
        SignedRecord::from_bytes([key.sign("murmur node record v1", &body).as_slice(), &body].concat()).unwrap()
    };
    let read = |contents: &[Vec<u8>]| signed(contents).verify(record().mesh);
    let with = |contents: Vec<HeldContent>| NodeRecord { contents, ..record() };

    let most: Vec<_> = (0..CONTENTS_MAX as u8).map(held).collect();
    assert_eq!(read(&most.iter().map(raw).collect::<Vec<_>>()), Ok(with(most.clone())));
    assert!(with(most.clone()).sign(&key).is_ok());
    let largest = HeldContent { file_bytes: FILE_BYTES_MAX, held_bytes: FILE_BYTES_MAX, ..held(1) };
    assert_eq!(read(&[raw(&largest)]), Ok(with(vec![largest])));
    let sourced = HeldContent { source: Some("s".repeat(SOURCE_BYTES_MAX)), ..held(1) };
    assert_eq!(read(&[raw(&sourced)]), Ok(with(vec![sourced])));

    let broken = [
        [most, vec![held(0xff)]].concat(),
        vec![held(1), held(2), held(1)],
        vec![HeldContent { name: String::new(), ..held(1) }],
        vec![HeldContent { name: "n".repeat(97), ..held(1) }],
        vec![HeldContent { name: "qwen3\x1b[2J".into(), ..held(1) }],
        vec![HeldContent { name: "qwen3\n".into(), ..held(1) }],
        vec![HeldContent { file_bytes: 0, held_bytes: 0, ..held(1) }],
        vec![HeldContent { file_bytes: FILE_BYTES_MAX + 1, ..held(1) }],
        vec![HeldContent { file_bytes: u64::MAX, held_bytes: u64::MAX, ..held(1) }],
        vec![HeldContent { held_bytes: held(1).file_bytes + 1, ..held(1) }],
        vec![HeldContent { held_bytes: u64::MAX, ..held(1) }],
        vec![HeldContent { source: Some(String::new()), ..held(1) }],
        vec![HeldContent { source: Some("s".repeat(SOURCE_BYTES_MAX + 1)), ..held(1) }],
        vec![HeldContent { source: Some("hf:a/b\x1b[2J".into()), ..held(1) }],
    ];
    for contents in broken {
        assert!(
            matches!(read(&contents.iter().map(raw).collect::<Vec<_>>()), Err(RecordError::Message(_))),
            "{contents:?}"
        );
        assert!(matches!(with(contents.clone()).sign(&key), Err(RecordError::Message(_))), "{contents:?}");
    }
    let without_digest = [field(2, b"n"), number(3, 5)].concat();
    let short_digest = [field(1, &[1; 31]), without_digest.clone()].concat();
    let no_text = [field(1, &[1; 32]), field(2, &[0xff, 0xfe]), number(3, 5)].concat();
    for content in [without_digest, short_digest, no_text, b"\xff".to_vec()] {
        assert!(matches!(read(&[field(16, &content)]), Err(RecordError::Message(_))), "{content:?}");
    }
}

#[test]
fn ranges_that_are_not_apart_ascending_and_of_the_file_are_neither_sent_nor_read() {
    const G: u64 = GROUP_BYTES;
    const FILE_BYTES: u64 = 100 * G + 7;
    let content = |held| {
        Work::Content(Content { file_bytes: FILE_BYTES, header_bytes: 9, held, gives_hashes: false, is_news: false })
    };
    let fetch = |ranges| Work::Fetch(Fetch { model: samples::model().digest, ranges, only_hashes: false });
    // As they travel: the distance from the end before, and the length, of each.
    let read_content = |numbers: &[u64]| {
        let body = [number(1, FILE_BYTES), number(2, 9), packed(3, numbers)].concat();
        decode::<Work>(&framed(content(Vec::new()).kind(), &body))
    };
    let read_fetch = |numbers: &[u64]| {
        let body = [field(1, samples::model().digest.as_bytes()), packed(2, numbers)].concat();
        decode::<Work>(&framed(fetch(Vec::new()).kind(), &body))
    };
    let ranges = |pairs: &[(u64, u64)]| pairs.iter().map(|&(start, end)| start..end).collect::<Vec<Range<u64>>>();
    let apart = |count: usize| (0..count as u64).map(|at| 2 * at * G..(2 * at + 1) * G).collect::<Vec<_>>();

    let right = ranges(&[(0, G), (3 * G, 100 * G + 7)]);
    let numbers = [0, G, 2 * G, 97 * G + 7];
    assert_eq!(read_content(&numbers), Ok(Some(content(right.clone()))));
    assert_eq!(read_fetch(&numbers), Ok(Some(fetch(right))));
    assert_eq!(read_content(&[]), Ok(Some(content(Vec::new()))), "it may have nothing");
    assert_eq!(read_fetch(&[]), Err(MessageError::Missing("ranges")));
    assert_eq!(encode(&fetch(Vec::new())), Err(MessageError::Missing("ranges")));

    let wrong = [
        ranges(&[(0, 2 * G), (G, 3 * G)]),
        ranges(&[(0, 9 * G), (G, 3 * G)]),
        ranges(&[(0, G), (G, 2 * G)]),
        ranges(&[(4 * G, 5 * G), (0, G)]),
        ranges(&[(G, 2 * G), (G, 2 * G)]),
        ranges(&[(G, G)]),
        ranges(&[(2 * G, G)]),
        ranges(&[(0, FILE_BYTES_MAX + 1)]),
        ranges(&[(0, u64::MAX)]),
        ranges(&[(u64::MAX - G, u64::MAX)]),
    ];
    for ranges in wrong {
        assert!(matches!(encode(&content(ranges.clone())), Err(MessageError::Invalid { .. })), "{ranges:?}");
        assert!(matches!(encode(&fetch(ranges.clone())), Err(MessageError::Invalid { .. })), "{ranges:?}");
    }
    let wrong: [&[u64]; 10] = [
        &[0, G, 2 * G],
        &[0],
        &[0, G, 0, G],
        &[G, 0],
        &[0, 0, G, G],
        &[0, FILE_BYTES_MAX + 1],
        &[0, u64::MAX],
        &[u64::MAX, u64::MAX],
        // Where numbers wrap around, these would be the first groups once more.
        &[0, 3 * G, u64::MAX - 3 * G + 1, G],
        &[0, 3 * G, G, u64::MAX - 4 * G + 1, 0, G],
    ];
    for numbers in wrong {
        assert!(matches!(read_content(numbers), Err(MessageError::Invalid { .. })), "{numbers:?}");
        assert!(matches!(read_fetch(numbers), Err(MessageError::Invalid { .. })), "{numbers:?}");
    }
    // Only of a content it is known where it ends, and only a request has to begin with groups.
    for end in [FILE_BYTES + 1, FILE_BYTES_MAX] {
        assert!(matches!(encode(&content(ranges(&[(0, end)]))), Err(MessageError::Invalid { .. })), "{end}");
        assert!(matches!(read_content(&[0, end]), Err(MessageError::Invalid { .. })), "{end}");
    }
    for (start, end) in [(1, G), (G - 1, 2 * G), (G + 512, 3 * G)] {
        assert!(matches!(encode(&fetch(ranges(&[(start, end)]))), Err(MessageError::Invalid { .. })), "{start}");
        assert!(matches!(read_fetch(&[start, end - start]), Err(MessageError::Invalid { .. })), "{start}");
    }

    let longest = Content {
        file_bytes: FILE_BYTES_MAX,
        header_bytes: FILE_BYTES_MAX,
        held: apart(HELD_RANGES_MAX),
        gives_hashes: true,
        is_news: true,
    };
    for message in [Work::Content(longest.clone()), fetch(apart(FETCH_RANGES_MAX))] {
        assert_eq!(decode::<Work>(&encode(&message).unwrap()), Ok(Some(message)));
    }
    let too_long = Work::Content(Content { held: apart(HELD_RANGES_MAX + 1), ..longest });
    for message in [too_long, fetch(apart(FETCH_RANGES_MAX + 1))] {
        assert!(matches!(encode(&message), Err(MessageError::TooMany { .. })));
    }
    for more in [1, 2] {
        let too_many = vec![G; 2 * FETCH_RANGES_MAX + more];
        assert!(matches!(read_fetch(&too_many), Err(MessageError::TooMany { .. })));
        let too_many = vec![1; 2 * HELD_RANGES_MAX + more];
        assert!(matches!(read_content(&too_many), Err(MessageError::TooMany { .. })));
    }
}

#[test]
fn a_content_has_from_one_byte_to_four_tebibytes_and_a_header_within() {
    let kind = Work::Content(Content {
        file_bytes: 1,
        header_bytes: 0,
        held: Vec::new(),
        gives_hashes: false,
        is_news: false,
    })
    .kind();
    for (file_bytes, header_bytes, is_right) in [
        (1, 0, true),
        (1, 1, true),
        (FILE_BYTES_MAX, FILE_BYTES_MAX, true),
        (0, 0, false),
        (FILE_BYTES_MAX + 1, 0, false),
        (u64::MAX, 0, false),
        (1, 2, false),
        (FILE_BYTES_MAX, u64::MAX, false),
    ] {
        let message =
            Work::Content(Content { file_bytes, header_bytes, held: Vec::new(), gives_hashes: false, is_news: false });
        let read = decode::<Work>(&framed(kind, &[number(1, file_bytes), number(2, header_bytes)].concat()));
        if is_right {
            assert_eq!(read, Ok(Some(message)));
        } else {
            assert!(matches!(read, Err(MessageError::Invalid { .. })), "{message:?}");
            assert!(matches!(encode(&message), Err(MessageError::Invalid { .. })), "{message:?}");
        }
    }
}

#[test]
fn a_file_is_asked_for_by_a_whole_digest() {
    let fetch = Work::Fetch(Fetch { model: samples::model().digest, ranges: Vec::new(), only_hashes: false });
    let watch = Work::WatchContent(WatchContent { model: samples::model().digest, only_news: false });
    for digest in [0, 31, 33, 64] {
        let named = field(1, &vec![0x11; digest]);
        for (kind, body) in [(watch.kind(), named.clone()), (fetch.kind(), [named, packed(2, &[0, 7])].concat())] {
            let read = decode::<Work>(&framed(kind, &body));
            assert!(matches!(read, Err(MessageError::Missing(_) | MessageError::Invalid { .. })), "{digest}: {read:?}");
        }
    }
}

#[test]
fn a_length_above_the_kinds_limit_is_refused_before_the_body_comes() {
    let header = |length: u32, kind: u16| [length.to_le_bytes().as_slice(), &kind.to_le_bytes()].concat();
    for kind in (0..24).chain([u16::MAX]) {
        for length in [Control::body_bytes_max(kind) as u32 + 1, u32::MAX] {
            assert!(matches!(decode::<Control>(&header(length, kind)), Err(MessageError::TooLarge { .. })));
        }
        for length in [Work::body_bytes_max(kind) as u32 + 1, u32::MAX] {
            assert!(matches!(decode::<Work>(&header(length, kind)), Err(MessageError::TooLarge { .. })));
        }
        assert_eq!(decode::<Control>(&header(Control::body_bytes_max(kind) as u32, kind)), Ok(None));
    }
}

#[test]
fn a_kind_that_is_not_known_is_skipped_and_reported() {
    let ping = encode(&Control::Ping(5)).unwrap();
    let bytes = [framed(999, &vec![0xff; UNKNOWN_BODY_BYTES_MAX]), ping].concat();
    let (mut decoder, mut input) = (Decoder::<Control>::new(), bytes.as_slice());
    assert_eq!(decoder.next(&mut input), Ok(Some(Control::Unknown { kind: 999 })));
    assert_eq!(decoder.next(&mut input), Ok(Some(Control::Ping(5))));
    assert_eq!(decoder.next(&mut input), Ok(None));
    // It cannot be used to smuggle an empty message of a kind that is known.
    assert!(encode(&Control::Unknown { kind: Control::Ping(5).kind() }).is_err());
    for (name, work) in samples::works() {
        assert_eq!(encode(&Work::Unknown { kind: work.kind() }).is_err(), name != "unknown", "{name}");
    }
}

#[test]
fn streams_of_another_protocol_are_refused_at_the_first_bytes() {
    for bytes in [b"GET / HTTP/1.1\r\n".as_slice(), b"SSH-2.0-OpenSSH_9\r\n", &[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3]] {
        assert!(decode::<Control>(bytes).is_err());
        assert!(decode::<Work>(bytes).is_err());
    }
}

#[test]
fn lists_arrive_at_their_limit_and_not_above() {
    let ids = |count: usize| {
        (0..count as u64).map(|i| {
            let mut id = [0xff; 32];
            id[..8].copy_from_slice(&i.to_be_bytes());
            NodeId::from_bytes(id)
        })
    };
    let record = SignedRecord::from_bytes(vec![0xff; RECORD_BYTES_MAX]).unwrap();
    let record = AgedRecord { age_ms: u32::MAX, record };
    let with = |more: usize| {
        [
            Control::Digest(ids(DIGEST_ENTRIES_MAX + more).map(|id| (id, u64::MAX)).collect()),
            Control::Want(ids(DIGEST_ENTRIES_MAX + more).collect()),
            Control::Differing(Differing {
                ranges: (0..RANGES_MAX as u16).collect(),
                entries: ids(DIGEST_ENTRIES_MAX + more).map(|id| (id, u64::MAX)).collect(),
            }),
            Control::Records(vec![record.clone(); RECORDS_MAX + more]),
        ]
    };
    for message in with(0) {
        assert!(decode::<Control>(&encode(&message).unwrap()).unwrap() == Some(message));
    }
    for message in with(1) {
        assert!(matches!(encode(&message), Err(MessageError::TooMany { .. })));
    }
}

#[test]
fn a_digest_with_duplicates_keeps_the_highest_number() {
    let [a, b] = [NodeId::from_bytes([1; 32]), NodeId::from_bytes([2; 32])];
    let bytes = encode(&Control::Digest(vec![(b, 1), (a, 5), (b, 9), (a, 2)])).unwrap();
    assert_eq!(decode::<Control>(&bytes), Ok(Some(Control::Digest(vec![(a, 5), (b, 9)]))));
    // The same unsorted on the wire: nodes (field 1), then packed sequence numbers (field 2).
    let mut body = vec![0x0a, 96];
    for id in [b, a, b] {
        body.extend_from_slice(id.as_bytes());
    }
    body.extend_from_slice(&[0x12, 24]);
    for sequence in [1u64, 5, 9] {
        body.extend_from_slice(&sequence.to_le_bytes());
    }
    let kind = Control::Digest(Vec::new()).kind();
    let digest = Control::Digest(vec![(a, 5), (b, 9)]);
    assert_eq!(decode::<Control>(&framed(kind, &body)), Ok(Some(digest)));
    // One number too few.
    body.truncate(body.len() - 8);
    body[99] = 16;
    assert!(matches!(decode::<Control>(&framed(kind, &body)), Err(MessageError::Invalid { .. })));
}

#[test]
fn summaries_of_no_sensible_number_of_ranges_and_ranges_beyond_all_summaries_are_refused() {
    let kind = Control::Summary(samples::summary()).kind();
    let body = |ranges: usize| field(2, &vec![0xff; 4 * ranges]); // packed fingerprints
    for ranges in [1, 64, RANGES_MAX] {
        let Ok(Some(Control::Summary(read))) = decode::<Control>(&framed(kind, &body(ranges))) else { panic!() };
        assert_eq!(read.fingerprints(), vec![u32::MAX; ranges]);
    }
    for ranges in [0, 3, RANGES_MAX - 1] {
        assert!(matches!(decode::<Control>(&framed(kind, &body(ranges))), Err(MessageError::Invalid { .. })));
    }
    assert!(decode::<Control>(&framed(kind, &body(2 * RANGES_MAX))).is_err());
    let differing = |range| Control::Differing(Differing { ranges: vec![range], entries: Vec::new() });
    let last = differing(RANGES_MAX as u16 - 1);
    assert_eq!(decode::<Control>(&encode(&last).unwrap()), Ok(Some(last)));
    assert!(encode(&differing(RANGES_MAX as u16)).is_err());
    // Field 1, packed: 70,000 must not be cut to a number that there is.
    let beyond = framed(differing(0).kind(), &[0x0a, 3, 0xf0, 0xa2, 0x04]);
    assert!(matches!(decode::<Control>(&beyond), Err(MessageError::Invalid { .. })));
}

#[test]
fn a_request_that_breaks_a_rule_is_neither_sent_nor_read() {
    let open = samples::open;
    let bias = vec![(1, 1.0); murmur_protocol::mesh::open::LOGIT_BIAS_MAX + 1];
    let grammar = Grammar::Lark("x".repeat(murmur_protocol::mesh::open::GRAMMAR_BYTES_MAX + 1));
    let broken = [
        Open { prompt: Vec::new(), ..open() },
        Open { prompt: vec![1, -1], ..open() },
        Open { generated: vec![-5], ..open() },
        Open { max_tokens: 1, ..open() },
        Open { prompt: vec![1; REQUEST_TOKENS_MAX], ..open() },
        Open { build: Some("b".repeat(65)), ..open() },
        Open { sampling: SamplingParams { logit_bias: bias, ..SamplingParams::default() }, ..open() },
        Open { sampling: SamplingParams { grammar: Some(grammar), ..SamplingParams::default() }, ..open() },
    ];
    for open in broken {
        assert!(encode(&Work::Open(Box::new(open))).is_err());
    }
}

#[test]
fn a_request_for_a_stage_that_breaks_a_rule_is_not_sent() {
    let open = samples::stage_open;
    let broken = [
        StageOpen { first: 52, ..open() },
        StageOpen { end: 81, ..open() },
        StageOpen { layers: 1_025, ..open() },
        StageOpen { context_tokens: 0, ..open() },
        StageOpen { context_tokens: REQUEST_TOKENS_MAX as u32 + 1, ..open() },
        StageOpen { parallel: 257, ..open() },
        StageOpen { build: Some("b".repeat(65)), ..open() },
    ];
    for open in broken {
        assert!(encode(&Work::Stage(Box::new(open))).is_err());
    }
}

#[test]
fn a_request_for_guesses_that_breaks_a_rule_is_neither_sent_nor_read() {
    let open = samples::draft_open;
    let broken = [
        DraftOpen { context_tokens: 0, ..open() },
        DraftOpen { context_tokens: REQUEST_TOKENS_MAX as u32 + 1, ..open() },
        DraftOpen { parallel: 0, ..open() },
        DraftOpen { parallel: 257, ..open() },
    ];
    for open in broken {
        assert!(encode(&Work::Draft(open)).is_err());
    }
    // Nothing but figures that are allowed, and the beginning of a model's digest.
    let kind = Work::Draft(open()).kind();
    for body in [&[0x18, 1, 0x20, 1][..], &[0x0a, 1, 7, 0x12, 1, 7, 0x18, 1, 0x20, 1]] {
        assert!(decode::<Work>(&framed(kind, body)).is_err());
    }
}

#[test]
fn the_longest_request_arrives() {
    let sampling = SamplingParams {
        logit_bias: vec![(i32::MAX, f32::MIN); murmur_protocol::mesh::open::LOGIT_BIAS_MAX],
        grammar: Some(Grammar::JsonSchema("x".repeat(murmur_protocol::mesh::open::GRAMMAR_BYTES_MAX))),
        ..SamplingParams::default()
    };
    let open = Open { prompt: vec![i32::MAX; REQUEST_TOKENS_MAX - 1], sampling, ..samples::open() };
    let message = Work::Open(Box::new(open));
    assert!(decode::<Work>(&encode(&message).unwrap()).unwrap() == Some(message));
}

#[test]
fn a_grammar_of_an_unknown_kind_is_an_error_and_not_left_out() {
    let mut open = samples::open();
    open.sampling.grammar = Some(Grammar::JsonObject);
    let message = Work::Open(Box::new(open));
    let bytes = encode(&message).unwrap();
    let json_object = [0x7a, 2, 0x0a, 0]; // field 15 of Sampling: a Grammar with field 1, empty
    let at = bytes.windows(4).position(|window| window == json_object).unwrap();
    let mut newer = bytes;
    newer[at + 2] = 0x4a; // field 9 instead
    assert_eq!(decode::<Work>(&newer), Err(MessageError::Unsupported("grammar")));
}

#[test]
fn waiting_times_without_measure_are_cut_to_the_limit() {
    let refused = framed(Work::Refused(Refused::Busy { retry_ms: 0 }).kind(), &[0x08, 1, 0x10, 0xff, 0xff, 0xff, 0x7f]);
    let expected = Work::Refused(Refused::Busy { retry_ms: work::RETRY_MS_MAX });
    assert_eq!(decode::<Work>(&refused), Ok(Some(expected)));
    let admitted = Work::Admitted(Admitted { lease_ms: u32::MAX, cached_tokens: 0 });
    let expected = Work::Admitted(Admitted { lease_ms: work::LEASE_MS_MAX, cached_tokens: 0 });
    assert_eq!(decode::<Work>(&encode(&admitted).unwrap()), Ok(Some(expected)));
}

#[test]
fn no_message_is_longer_than_its_frame_says() {
    for (_, message) in samples::controls() {
        let bytes = encode(&message).unwrap();
        let header = wire::Header::parse::<Control>(bytes.first_chunk().unwrap()).unwrap();
        assert_eq!((header.kind, HEADER_BYTES + header.body_bytes), (message.kind(), bytes.len()));
    }
}
