//! What is sent is what arrives.

use murmur_protocol::mesh::*;
use murmur_protocol::sampling::{Sampled, SamplingParams};
use proptest::collection::vec;
use proptest::prelude::*;

use crate::samples;

/// Every message in `bytes`, which come in pieces of the given lengths, over and over.
fn decoded<M: Message>(bytes: &[u8], pieces: &[usize]) -> Vec<M> {
    let (mut decoder, mut messages) = (Decoder::<M>::new(), Vec::new());
    let (mut rest, mut pieces) = (bytes, pieces.iter().cycle());
    while !rest.is_empty() {
        let (piece, later) = rest.split_at((*pieces.next().unwrap()).min(rest.len()));
        let mut piece = piece;
        while let Some(message) = decoder.next(&mut piece).unwrap() {
            messages.push(message);
        }
        assert!(piece.is_empty());
        rest = later;
    }
    assert!(decoder.is_at_boundary());
    messages
}

/// As the decoder gives it: sorted, without duplicates.
fn normalised(control: Control) -> Control {
    let highest = |mut entries: Vec<(NodeId, u64)>| {
        entries.sort();
        entries.reverse();
        entries.dedup_by_key(|(node, _)| *node);
        entries.reverse();
        entries
    };
    match control {
        Control::Digest(entries) => Control::Digest(highest(entries)),
        Control::Differing(Differing { mut ranges, entries }) => {
            ranges.sort();
            ranges.dedup();
            Control::Differing(Differing { ranges, entries: highest(entries) })
        }
        Control::Want(mut nodes) => {
            nodes.sort();
            nodes.dedup();
            Control::Want(nodes)
        }
        other => other,
    }
}

/// Equality by bits, for NaN equals nothing and -0.0 equals 0.0.
fn bits(params: &SamplingParams) -> (Vec<u32>, Vec<(i32, u32)>, SamplingParams) {
    let p = params;
    let floats =
        [p.temperature, p.top_p, p.min_p, p.typical_p, p.repeat_penalty, p.presence_penalty, p.frequency_penalty];
    let rest = SamplingParams {
        temperature: 0.0,
        top_p: 0.0,
        min_p: 0.0,
        typical_p: 0.0,
        repeat_penalty: 0.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        logit_bias: Vec::new(),
        ..p.clone()
    };
    let bias = p.logit_bias.iter().map(|&(token, bias)| (token, bias.to_bits())).collect();
    (floats.map(f32::to_bits).to_vec(), bias, rest)
}

fn sampled_bits(sampled: &Sampled) -> impl PartialEq + std::fmt::Debug + use<> {
    let top: Vec<_> = sampled.top.iter().map(|&(token, logprob)| (token, logprob.to_bits())).collect();
    (sampled.token, sampled.logprob.map(f32::to_bits), top, sampled.grammar_ended)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn a_record_arrives_as_it_was_signed((record, key) in samples::any_record(MeshId::public("m"))) {
        let signed = record.sign(&key).unwrap();
        prop_assert!(signed.as_bytes().len() <= RECORD_BYTES_MAX);
        let received = SignedRecord::from_bytes(signed.as_bytes()).unwrap();
        prop_assert_eq!(received.claim(), Ok(Claim { node: record.node, sequence: record.sequence }));
        prop_assert_eq!(received.verify(record.mesh).unwrap(), record);
    }

    #[test]
    fn a_certificate_and_a_list_of_revocations_arrive_as_they_were_signed(
        certificate in samples::any_certificate(),
        list in samples::any_revocations(),
    ) {
        let (key, mesh) = (samples::mesh_key(), samples::mesh_key().mesh_id());
        let received = SignedCertificate::from_bytes(certificate.sign(&key).unwrap().as_bytes()).unwrap();
        prop_assert_eq!(received.verify(mesh, certificate.node, certificate.expires_ms).unwrap(), certificate);
        let received = SignedRevocations::from_bytes(list.sign(&key).unwrap().as_bytes()).unwrap();
        prop_assert_eq!(received.verify(mesh).unwrap(), list);
    }

    #[test]
    fn a_ticket_arrives_through_its_text_in_either_case_and_broken_over_lines(
        (ticket, key) in samples::any_ticket(),
        line in 1usize..80,
    ) {
        let text = ticket.clone().sign(&key).unwrap().to_string();
        prop_assert!(text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit()));
        let lines: Vec<_> = text.as_bytes().chunks(line).map(|line| std::str::from_utf8(line).unwrap()).collect();
        for text in [text.to_uppercase(), format!(" {}\r\n", lines.join("\r\n")), text] {
            let arrived: SignedTicket = text.parse().unwrap();
            prop_assert_eq!(arrived.ticket(), &ticket);
        }
    }

    #[test]
    fn control_messages_arrive_in_pieces_of_any_length(
        messages in vec(samples::any_control(), 1..5),
        pieces in vec(1usize..200, 1..5),
    ) {
        let bytes: Vec<u8> = messages.iter().flat_map(|message| encode(message).unwrap()).collect();
        let expected: Vec<_> = messages.into_iter().map(normalised).collect();
        prop_assert_eq!(decoded::<Control>(&bytes, &pieces), expected);
    }

    #[test]
    fn work_messages_arrive_in_pieces_of_any_length(
        messages in vec(samples::any_work(), 1..5),
        pieces in vec(1usize..200, 1..5),
    ) {
        let encoded: Vec<_> = messages.iter().map(|message| encode(message).unwrap()).collect();
        let arrived = decoded::<Work>(&encoded.concat(), &pieces);
        // Bytes, not values: NaN is not equal to itself.
        let again: Vec<_> = arrived.iter().map(|message| encode(message).unwrap()).collect();
        prop_assert_eq!(again, encoded);
    }

    #[test]
    fn every_bit_of_a_request_arrives(open in samples::any_open()) {
        let Work::Open(arrived) = &decoded::<Work>(&encode(&Work::Open(Box::new(open.clone()))).unwrap(), &[64])[0] else {
            return Err(TestCaseError::fail("another message"));
        };
        prop_assert_eq!(bits(&arrived.sampling), bits(&open.sampling));
        let plain = |open: &Open| Open { sampling: SamplingParams::default(), ..open.clone() };
        prop_assert_eq!(plain(arrived), plain(&open));
    }

    #[test]
    fn every_bit_of_a_token_arrives(tokens in samples::any_tokens()) {
        let Work::Tokens(arrived) = &decoded::<Work>(&encode(&Work::Tokens(tokens.clone())).unwrap(), &[64])[0] else {
            return Err(TestCaseError::fail("another message"));
        };
        prop_assert_eq!(arrived.first, tokens.first);
        let all = |tokens: &Tokens| tokens.sampled.iter().map(sampled_bits).collect::<Vec<_>>();
        prop_assert_eq!(all(arrived), all(&tokens));
    }
}

#[test]
fn addresses_that_cannot_be_published_are_left_out() {
    let direct = ["0.0.0.0:1", "[::]:1", "10.0.0.1:0", "224.0.0.1:1", "255.255.255.255:1", "10.0.0.1:1", "10.0.0.1:1"];
    let addresses = Addresses::publishable(Some("x".repeat(300)), direct.map(|text| text.parse().unwrap()));
    assert_eq!(addresses, Addresses { relay: None, direct: vec!["10.0.0.1:1".parse().unwrap()] });
    let many = (1..100).map(|port| ([10, 0, 0, 1], port).into());
    let addresses = Addresses::publishable(None, many);
    NodeRecord { addresses, ..samples::record() }.sign(&samples::node_key(1)).unwrap();
}

#[test]
fn a_record_with_too_many_models_is_shortened_from_the_end_until_it_can_be_signed() {
    let mut record = samples::record();
    record.models = (0..60u8)
        .map(|i| ServedModel { digest: ModelDigest::from_bytes([i; 32]), name: "n".repeat(96), ..samples::model() })
        .collect();
    assert!(matches!(record.sign(&samples::node_key(1)), Err(RecordError::Message(MessageError::TooMany { .. }))));
    let before = record.models.clone();
    let left_out = record.shorten();
    assert!(left_out > 28 && record.models.len() > 10, "{left_out} left out");
    assert_eq!(record.models, before[..before.len() - left_out]);
    record.sign(&samples::node_key(1)).unwrap();
    assert_eq!(record.shorten(), 0);
}

#[test]
fn as_many_links_as_a_record_may_have_fit_into_it_and_no_more() {
    let link = |i: u8| MeasuredLink::to(&NodeId::from_bytes([i; 32]), measured::RTT_US_MAX, u64::MAX);
    let mut record = NodeRecord { links: (0..20).map(link).collect(), ..samples::record() };
    assert!(record.sign(&samples::node_key(1)).is_err());
    assert_eq!(record.shorten(), 0);
    assert_eq!(record.links.len(), measured::LINKS_MAX);
    record.sign(&samples::node_key(1)).unwrap();
}

#[test]
fn a_record_that_is_too_long_loses_its_links_then_its_models_and_its_stages_last() {
    let stage = |i| ServedStage {
        digest: ModelDigest::from_bytes([i; 32]),
        name: "n".repeat(96),
        build: "b".repeat(64),
        ..samples::stage()
    };
    let mut record = NodeRecord { stages: vec![stage(0), stage(1)], links: samples::links(), ..samples::record() };
    record.models = (0..60u8)
        .map(|i| ServedModel { digest: ModelDigest::from_bytes([i; 32]), name: "n".repeat(96), ..samples::model() })
        .collect();
    let left_out = record.shorten();
    assert_eq!((record.models.len() + left_out, record.stages.len(), record.links.len()), (60, 2, 0));
    assert!(record.models.len() > 10);
    record.sign(&samples::node_key(1)).unwrap();

    let stages: Vec<_> = (0..20).map(stage).collect();
    record.stages = stages.clone();
    record.shorten();
    assert!(record.models.is_empty() && record.stages.len() > 10);
    assert_eq!(record.stages, stages[..record.stages.len()]);
    record.sign(&samples::node_key(1)).unwrap();
    assert_eq!(record.shorten(), 0);
}
