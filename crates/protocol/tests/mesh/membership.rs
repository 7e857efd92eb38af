//! Certificates, revocations and tickets: who gets in, and who does not.

use murmur_protocol::mesh::member::CLOCK_SKEW_MS_MAX;
use murmur_protocol::mesh::*;
use proptest::prelude::*;
use proptest::sample::Index;

use crate::samples::{self, certificate, mesh_key, node_key, private_ticket, public_ticket, revocations};

#[test]
fn a_certificate_counts_for_its_mesh_and_node_only() {
    let signed = certificate().sign(&mesh_key()).unwrap();
    let (mesh, node, now) = (certificate().mesh, certificate().node, certificate().issued_ms);
    assert_eq!(signed.verify(mesh, node, now), Ok(certificate()));
    let refused = signed.verify(MeshId::public("other"), node, now);
    assert!(matches!(refused, Err(MemberError::WrongMesh { .. })));
    let refused = signed.verify(mesh, node_key(2).node_id(), now);
    assert!(matches!(refused, Err(MemberError::WrongNode { .. })));
}

#[test]
fn only_the_key_of_the_mesh_can_sign_for_it() {
    let other = MeshKey::from_bytes(&[0xdd; 32]);
    assert!(matches!(certificate().sign(&other), Err(MemberError::WrongMesh { .. })));
    assert!(matches!(revocations().sign(&other), Err(MemberError::WrongMesh { .. })));
    // A certificate that names this mesh but carries another key's signature.
    let honest = certificate().sign(&mesh_key()).unwrap();
    let foreign = MemberCertificate { mesh: other.mesh_id(), ..certificate() }.sign(&other).unwrap();
    let forged = [&foreign.as_bytes()[..64], &honest.as_bytes()[64..]].concat();
    let forged = SignedCertificate::from_bytes(forged).unwrap();
    let refused = forged.verify(certificate().mesh, certificate().node, certificate().issued_ms);
    assert_eq!(refused, Err(MemberError::BadSignature(BadSignature)));
}

#[test]
fn a_certificate_ends_but_not_for_a_clock_that_is_a_little_fast() {
    let signed = certificate().sign(&mesh_key()).unwrap();
    let at = |now| signed.verify(certificate().mesh, certificate().node, now);
    let end = certificate().expires_ms;
    assert!(at(0).is_ok(), "a clock that is slow does no harm");
    assert!(at(end + CLOCK_SKEW_MS_MAX).is_ok());
    assert_eq!(at(end + CLOCK_SKEW_MS_MAX + 1), Err(MemberError::Expired { ago_s: 900 }));
    assert!(at(u64::MAX).is_err());
}

#[test]
fn a_certificate_that_ends_before_it_begins_is_not_signed() {
    let never = MemberCertificate { expires_ms: certificate().issued_ms, ..certificate() };
    assert!(matches!(never.sign(&mesh_key()), Err(MemberError::Message(_))));
}

#[test]
fn a_list_revokes_by_node_and_by_serial_and_counts_its_versions() {
    let mut list = RevocationList::new(certificate().mesh);
    assert!(!list.revokes(&certificate()));
    assert!(list.add(Revocation::Serial(certificate().serial)));
    assert!(!list.add(Revocation::Serial(certificate().serial)));
    assert!(list.revokes(&certificate()));
    let renewed = MemberCertificate { serial: 5, ..certificate() };
    assert!(!list.revokes(&renewed));
    assert!(list.add(Revocation::Node(renewed.node)));
    assert!(list.revokes(&renewed));
    assert_eq!(list.version, 2);
}

#[test]
fn a_list_of_another_mesh_or_a_certificate_shown_as_a_list_is_refused() {
    let signed = revocations().sign(&mesh_key()).unwrap();
    assert!(matches!(signed.verify(MeshId::public("other")), Err(MemberError::WrongMesh { .. })));
    let certificate = certificate().sign(&mesh_key()).unwrap();
    let confused = SignedRevocations::from_bytes(certificate.as_bytes()).unwrap();
    assert!(confused.verify(mesh_key().mesh_id()).is_err());
}

#[test]
fn a_full_list_of_revocations_can_be_sent_and_a_fuller_one_is_refused() {
    let mut list = RevocationList::new(mesh_key().mesh_id());
    for i in 0..member::REVOCATIONS_MAX as u64 {
        let mut id = [0xff; 32];
        id[..8].copy_from_slice(&i.to_le_bytes());
        list.add(Revocation::Node(NodeId::from_bytes(id)));
        list.add(Revocation::Serial(u64::MAX - i));
    }
    let signed = list.sign(&mesh_key()).unwrap();
    let bytes = encode(&Control::Revocations(signed)).unwrap();
    let Ok(Some(Control::Revocations(arrived))) = Decoder::new().next(&mut bytes.as_slice()) else {
        panic!("another message");
    };
    assert_eq!(arrived.verify(list.mesh).unwrap(), list);
    list.add(Revocation::Serial(1));
    assert!(matches!(list.sign(&mesh_key()), Err(MemberError::Message(MessageError::TooMany { .. }))));
}

#[test]
fn what_is_not_a_ticket_is_told_from_a_damaged_and_from_a_forged_one() {
    let text = private_ticket().sign(&node_key(1)).unwrap().to_string();
    assert_eq!("hello".parse::<SignedTicket>(), Err(TicketError::NotATicket));
    assert_eq!("".parse::<SignedTicket>(), Err(TicketError::NotATicket));
    assert_eq!(format!("murmur1{}", "a".repeat(5_000)).parse::<SignedTicket>(), Err(TicketError::TooLong));
    for damaged in [&text[..text.len() - 1], "murmur1", "murmur1a", "murmur1!!!!", "murmur1é", &format!("{text}a")] {
        assert_eq!(damaged.parse::<SignedTicket>(), Err(TicketError::Damaged), "{damaged}");
    }
}

#[test]
fn a_ticket_that_its_issuer_did_not_sign_is_refused() {
    assert!(matches!(private_ticket().sign(&node_key(2)), Err(TicketError::WrongKey(_))));
    // The honest ticket's body under a signature by someone else, with a good checksum.
    let other = Ticket { issuer: node_key(2).node_id(), ..private_ticket() }.sign(&node_key(2)).unwrap();
    let bytes = |ticket: &SignedTicket| {
        let digits = ticket.to_string()["murmur1".len()..].to_uppercase();
        let mut bytes = data_encoding::BASE32_NOPAD.decode(digits.as_bytes()).unwrap();
        bytes.truncate(bytes.len() - 4);
        bytes
    };
    let honest = bytes(&private_ticket().sign(&node_key(1)).unwrap());
    let mut forged = [&bytes(&other)[..64], &honest[64..]].concat();
    let sum = blake3::hash(&forged);
    forged.extend_from_slice(&sum.as_bytes()[..4]);
    let text = format!("murmur1{}", data_encoding::BASE32_NOPAD.encode(&forged));
    assert_eq!(text.parse::<SignedTicket>(), Err(TicketError::BadSignature(BadSignature)));
}

#[test]
fn a_ticket_ends_at_its_time() {
    let ticket = private_ticket();
    assert_eq!(ticket.check_expiry(ticket.expires_ms - 1), Ok(()));
    assert_eq!(ticket.check_expiry(ticket.expires_ms), Err(TicketError::Expired { ago_s: 0 }));
    assert_eq!(ticket.check_expiry(ticket.expires_ms + 61_000), Err(TicketError::Expired { ago_s: 61 }));
    let endless = Ticket { expires_ms: 0, ..private_ticket() };
    assert!(matches!(endless.sign(&node_key(1)), Err(TicketError::Message(MessageError::Missing(_)))));
}

#[test]
fn a_public_ticket_leads_into_the_mesh_of_its_name_and_nowhere_else() {
    assert!(!public_ticket().is_private());
    assert!(public_ticket().sign(&node_key(1)).is_ok());
    let elsewhere = Ticket { mesh: MeshId::public("trap"), ..public_ticket() };
    assert!(matches!(elsewhere.sign(&node_key(1)), Err(TicketError::Message(MessageError::Invalid { .. }))));
}

#[test]
fn a_ticket_does_not_show_its_secret_in_logs() {
    let signed = private_ticket().sign(&node_key(1)).unwrap();
    let shown = format!("{signed:?}");
    assert!(shown.contains("hidden") && !shown.contains("44444") && !shown.contains("68, 68"), "{shown}");
}

proptest! {
    #[test]
    fn one_bit_flipped_is_no_certificate_and_no_list(at in any::<Index>(), bit in 0u8..8) {
        let mut bytes = certificate().sign(&mesh_key()).unwrap().as_bytes().to_vec();
        let at_byte = at.index(bytes.len());
        bytes[at_byte] ^= 1 << bit;
        let signed = SignedCertificate::from_bytes(bytes).unwrap();
        prop_assert!(signed.verify(certificate().mesh, certificate().node, 0).is_err());

        let mut bytes = revocations().sign(&mesh_key()).unwrap().as_bytes().to_vec();
        let at_byte = at.index(bytes.len());
        bytes[at_byte] ^= 1 << bit;
        prop_assert!(SignedRevocations::from_bytes(bytes).unwrap().verify(mesh_key().mesh_id()).is_err());
    }

    #[test]
    fn a_ticket_with_one_wrong_character_is_refused(at in any::<Index>(), letter in "[a-z2-7]") {
        let text = private_ticket().sign(&node_key(1)).unwrap().to_string();
        let at = at.index(text.len());
        prop_assume!(text[at..=at] != letter);
        let wrong = format!("{}{letter}{}", &text[..at], &text[at + 1..]);
        prop_assert!(wrong.parse::<SignedTicket>().is_err());
    }

    #[test]
    fn arbitrary_text_and_bytes_never_panic(
        text in any::<String>(),
        digits in "[A-Za-z2-7]{0,400}",
        bytes in proptest::collection::vec(any::<u8>(), 0..300),
    ) {
        prop_assert!(text.parse::<SignedTicket>().is_err());
        let ticket = format!("murmur1{digits}");
        prop_assert!(ticket.parse::<SignedTicket>().is_err());
        if let Ok(signed) = SignedCertificate::from_bytes(&bytes) {
            prop_assert!(signed.verify(mesh_key().mesh_id(), node_key(1).node_id(), 0).is_err());
        }
        if let Ok(signed) = SignedRevocations::from_bytes(&bytes) {
            prop_assert!(signed.verify(mesh_key().mesh_id()).is_err());
        }
    }

    #[test]
    fn any_ticket_fits_its_text((ticket, key) in samples::any_ticket()) {
        prop_assert!(ticket.sign(&key).unwrap().to_string().len() <= ticket::TICKET_TEXT_BYTES_MAX);
    }
}
