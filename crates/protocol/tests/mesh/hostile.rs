//! Bytes from strangers: forged, damaged, cut, oversized, of another mesh or nothing at all.

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

#[test]
fn a_length_above_the_kinds_limit_is_refused_before_the_body_comes() {
    let header = |length: u32, kind: u16| [length.to_le_bytes().as_slice(), &kind.to_le_bytes()].concat();
    for kind in (0..20).chain([u16::MAX]) {
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
    let body = |ranges: usize| {
        let mut body = vec![0x12]; // packed fingerprints (field 2)
        let mut length = 4 * ranges;
        while length > 0x7f {
            body.push(0x80 | (length & 0x7f) as u8);
            length >>= 7;
        }
        body.push(length as u8);
        body.extend(vec![0xff; 4 * ranges]);
        body
    };
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
