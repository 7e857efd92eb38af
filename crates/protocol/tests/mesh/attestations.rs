//! What was signed of a model's file: it holds for its signer, its file and its bytes, and nothing else is believed.

use murmur_protocol::mesh::attestation::{ATTESTATION_BYTES_MAX, ATTESTATIONS_MAX, LICENCE_BYTES_MAX};
use murmur_protocol::mesh::content::{FILE_BYTES_MAX, SOURCE_BYTES_MAX};
use murmur_protocol::mesh::model::MODEL_NAME_BYTES_MAX;
use murmur_protocol::mesh::*;
use proptest::prelude::*;
use proptest::sample::Index;

use crate::samples::{any_attestation, attestation, mesh_key, model, node_key};

#[test]
fn an_attestation_is_believed_for_its_own_file_only() {
    let signed = attestation().sign(&node_key(2)).unwrap();
    assert_eq!(signed.verify(attestation().model), Ok(attestation()));
    let other = ModelDigest::from_bytes([0x12; 32]);
    let found = attestation().model;
    assert_eq!(signed.verify(other), Err(AttestationError::WrongModel { expected: other, found }));
}

#[test]
fn nobody_signs_for_another_node() {
    assert_eq!(attestation().sign(&node_key(3)), Err(AttestationError::WrongKey(attestation().signer)));
    // What node 2 says, under a signature of node 3.
    let honest = attestation().sign(&node_key(2)).unwrap();
    let foreign = Attestation { signer: node_key(3).node_id(), ..attestation() }.sign(&node_key(3)).unwrap();
    let forged = [&foreign.as_bytes()[..64], &honest.as_bytes()[64..]].concat();
    let forged = SignedAttestation::from_bytes(forged).unwrap();
    assert_eq!(forged.verify(attestation().model), Err(AttestationError::BadSignature(BadSignature)));
}

#[test]
fn a_signature_of_another_kind_of_statement_is_none() {
    let honest = attestation().sign(&node_key(2)).unwrap();
    let body = &honest.as_bytes()[64..];
    for domain in [contact::DOMAIN, "murmur ticket v1", "murmur member certificate v1"] {
        let confused = [node_key(2).sign(domain, body).as_slice(), body].concat();
        let confused = SignedAttestation::from_bytes(confused).unwrap();
        assert_eq!(confused.verify(attestation().model), Err(AttestationError::BadSignature(BadSignature)));
    }
    let certificate = crate::samples::certificate().sign(&mesh_key()).unwrap();
    let confused = SignedAttestation::from_bytes(certificate.as_bytes()).unwrap();
    assert!(confused.verify(attestation().model).is_err());
}

#[test]
fn the_longest_attestation_fits_and_what_breaks_a_limit_is_not_signed() {
    let longest = Attestation {
        file_bytes: FILE_BYTES_MAX,
        name: "n".repeat(MODEL_NAME_BYTES_MAX),
        licence: Some("l".repeat(LICENCE_BYTES_MAX)),
        source: Some("s".repeat(SOURCE_BYTES_MAX)),
        signed_ms: u64::MAX,
        ..attestation()
    };
    let signed = longest.sign(&node_key(2)).unwrap();
    assert!(signed.as_bytes().len() <= ATTESTATION_BYTES_MAX);
    let full = Work::Attestations(vec![signed.clone(); ATTESTATIONS_MAX]);
    let sent = encode(&full).unwrap();
    assert_eq!(Decoder::<Work>::new().next(&mut sent.as_slice()), Ok(Some(full)));
    let fuller = Work::Attestations(vec![signed; ATTESTATIONS_MAX + 1]);
    assert!(matches!(encode(&fuller), Err(MessageError::TooMany { .. })));

    let broken = [
        Attestation { file_bytes: 0, ..attestation() },
        Attestation { file_bytes: FILE_BYTES_MAX + 1, ..attestation() },
        Attestation { name: String::new(), ..attestation() },
        Attestation { name: "n".repeat(MODEL_NAME_BYTES_MAX + 1), ..attestation() },
        Attestation { name: "qwen3\x1b[2J".into(), ..attestation() },
        Attestation { licence: Some(String::new()), ..attestation() },
        Attestation { licence: Some("l".repeat(LICENCE_BYTES_MAX + 1)), ..attestation() },
        Attestation { licence: Some("mit\n".into()), ..attestation() },
        Attestation { source: Some(String::new()), ..attestation() },
        Attestation { source: Some("s".repeat(SOURCE_BYTES_MAX + 1)), ..attestation() },
        Attestation { source: Some("hf:a/b\x07".into()), ..attestation() },
    ];
    for broken in broken {
        assert!(matches!(broken.sign(&node_key(2)), Err(AttestationError::Message(_))), "{broken:?}");
    }
}

#[test]
fn what_a_key_has_signed_is_refused_if_it_breaks_a_limit() {
    // A body that this version would not write, signed all the same: a name of no bytes, and one with control characters.
    let honest = attestation().sign(&node_key(2)).unwrap();
    let name = attestation().name;
    let at = honest.as_bytes().windows(name.len()).position(|window| window == name.as_bytes()).unwrap();
    let body = honest.as_bytes()[64..].to_vec();
    let mut rung = body.clone();
    rung[at - 64] = 0x07;
    let mut shortened = body;
    shortened.splice(at - 65..at - 64 + name.len(), [0]);
    for body in [rung, shortened] {
        let signed = [node_key(2).sign(attestation::DOMAIN, &body).as_slice(), &body].concat();
        let refused = SignedAttestation::from_bytes(signed).unwrap().verify(model().digest);
        assert!(matches!(refused, Err(AttestationError::Message(_))), "{refused:?}");
    }
}

#[test]
fn what_is_too_long_or_too_short_to_be_one_is_not_taken() {
    for bytes in [0, 1, 63, 64, ATTESTATION_BYTES_MAX + 1] {
        assert!(SignedAttestation::from_bytes(vec![7; bytes]).is_err(), "{bytes}");
    }
}

proptest! {
    #[test]
    fn an_attestation_that_was_altered_anywhere_is_refused(
        says in any_attestation(),
        flip in any::<Index>(),
        bit in 0u8..8,
    ) {
        let signed = says.sign(&node_key(2)).unwrap();
        prop_assert_eq!(signed.verify(says.model).unwrap(), says.clone());
        let mut altered = signed.as_bytes().to_vec();
        let at = flip.index(altered.len());
        altered[at] ^= 1 << bit;
        prop_assert!(SignedAttestation::from_bytes(altered).unwrap().verify(says.model).is_err());
    }

    #[test]
    fn arbitrary_bytes_are_no_attestation(bytes in proptest::collection::vec(any::<u8>(), 65..300), model: [u8; 32]) {
        let signed = SignedAttestation::from_bytes(bytes).unwrap();
        prop_assert!(signed.verify(ModelDigest::from_bytes(model)).is_err());
    }
}
