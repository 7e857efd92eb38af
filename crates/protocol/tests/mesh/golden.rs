//! The encoding of every message, checked in. What once was sent must be read for ever; a change here is a new version of
//! the protocol, or a mistake.
//!
//! `MURMUR_GOLDEN=write` writes the file anew: for added messages.

use std::fmt::{Debug, Write};

use data_encoding::HEXLOWER;
use murmur_protocol::mesh::*;

use crate::samples::{self, mesh_key, node_key};

const PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/mesh.txt");

/// One vector: name, meaning, bytes; a blank line in between.
pub(crate) fn add(vectors: &mut String, name: &str, meaning: &impl Debug, bytes: &[u8]) {
    writeln!(vectors, "{name}\n  {meaning:?}").unwrap();
    for line in HEXLOWER.encode(bytes).as_bytes().chunks(112) {
        writeln!(vectors, "  {}", std::str::from_utf8(line).unwrap()).unwrap();
    }
    vectors.push('\n');
}

fn vectors() -> String {
    let mut text = String::new();
    let record = samples::record();
    add(&mut text, "record", &record, record.sign(&node_key(1)).unwrap().as_bytes());
    let stages = NodeRecord { stages: vec![samples::stage(), samples::offer()], ..samples::record() };
    add(&mut text, "record with stages", &stages, stages.sign(&node_key(1)).unwrap().as_bytes());
    let measured = NodeRecord { links: samples::links(), machine: Some(samples::machine()), ..stages };
    add(&mut text, "record with what was measured", &measured, measured.sign(&node_key(1)).unwrap().as_bytes());
    let holding = NodeRecord { contents: samples::contents(), ..samples::record() };
    add(&mut text, "record with contents", &holding, holding.sign(&node_key(1)).unwrap().as_bytes());
    let sourced = NodeRecord { contents: samples::contents_of_a_hub(), ..samples::record() };
    add(&mut text, "record with contents of a hub", &sourced, sourced.sign(&node_key(1)).unwrap().as_bytes());
    let placed = NodeRecord { region: "eu-north".into(), ..samples::record() };
    add(&mut text, "record with a region", &placed, placed.sign(&node_key(1)).unwrap().as_bytes());
    let guessing =
        NodeRecord { models: vec![samples::guesser()], capabilities: Capabilities::GUESSES, ..samples::record() };
    add(&mut text, "record with a model that guesses", &guessing, guessing.sign(&node_key(1)).unwrap().as_bytes());
    let member = NodeRecord {
        mesh: mesh_key().mesh_id(),
        certificate: Some(samples::certificate().sign(&mesh_key()).unwrap()),
        ..samples::record()
    };
    add(&mut text, "record of a member", &member, member.sign(&node_key(1)).unwrap().as_bytes());
    let tombstone = samples::tombstone();
    add(&mut text, "tombstone", &tombstone, tombstone.sign(&node_key(1)).unwrap().as_bytes());
    let certificate = samples::certificate();
    add(&mut text, "certificate", &certificate, certificate.sign(&mesh_key()).unwrap().as_bytes());
    let list = samples::revocations();
    add(&mut text, "revocations", &list, list.sign(&mesh_key()).unwrap().as_bytes());
    add(&mut text, "contact", &record.addresses, &contact::seal(&record.addresses, &node_key(1)).unwrap());
    let attestation = samples::attestation();
    add(&mut text, "attestation", &attestation, attestation.sign(&node_key(2)).unwrap().as_bytes());
    for (name, ticket) in [("private ticket", samples::private_ticket()), ("public ticket", samples::public_ticket())] {
        let signed = ticket.clone().sign(&node_key(1)).unwrap();
        writeln!(text, "{name}\n  {ticket:?}\n  {signed}\n").unwrap();
    }
    for (name, message) in samples::controls() {
        add(&mut text, &format!("control: {name}"), &message, &encode(&message).unwrap());
    }
    for (name, message) in samples::works() {
        add(&mut text, &format!("work: {name}"), &message, &encode(&message).unwrap());
    }
    let secret = MeshSecret::from_bytes([0x55; 32]);
    let (public, private) = (MeshId::public("home"), mesh_key().mesh_id());
    add(&mut text, "id of the public mesh home", &"MeshId", public.as_bytes());
    add(&mut text, "topic of the public mesh", &"public", &public.topic(None));
    add(&mut text, "topic of the private mesh", &"private", &private.topic(Some(&secret)));
    add(&mut text, "publishing key of the private mesh", &"private", &secret.publishing_key(&private));
    text
}

/// The lines below the name of each vector.
pub(crate) fn entries(text: &str) -> impl Iterator<Item = (&str, Vec<&str>)> {
    text.split("\n\n").filter(|entry| !entry.trim().is_empty()).map(|entry| {
        let mut lines = entry.lines();
        (lines.next().unwrap(), lines.map(str::trim).collect())
    })
}

/// Compares vectors with those of a file, or writes the file.
pub(crate) fn is_what_it_was(path: &str, now: &str) {
    if std::env::var("MURMUR_GOLDEN").is_ok_and(|value| value == "write") {
        std::fs::write(path, now).unwrap();
    }
    let was = std::fs::read_to_string(path).unwrap();
    for ((name, now), (old_name, was)) in entries(now).zip(entries(&was)) {
        assert_eq!((name, now), (old_name, was));
    }
    assert_eq!(now, was, "a vector was added or left out");
}

/// Meaning and bytes of a vector, of the lines below its name.
pub(crate) fn read_bytes<'a>(lines: &[&'a str]) -> (&'a str, Vec<u8>) {
    let (meaning, hex) = lines.split_first().unwrap();
    (meaning, HEXLOWER.decode(hex.concat().as_bytes()).unwrap())
}

#[test]
fn the_encoding_of_every_message_is_what_it_was() {
    is_what_it_was(PATH, &vectors());
}

#[test]
fn what_was_written_down_is_read_as_what_it_meant() {
    let text = std::fs::read_to_string(PATH).unwrap();
    let mut read = 0;
    for (name, lines) in entries(&text) {
        let (meaning, rest) = lines.split_first().unwrap();
        let hex = rest.concat();
        let bytes = || HEXLOWER.decode(hex.as_bytes()).unwrap();
        let found = match name.split_once(": ") {
            Some(("control", _)) => {
                format!("{:?}", Decoder::<Control>::new().next(&mut bytes().as_slice()).unwrap().unwrap())
            }
            Some(("work", _)) => {
                format!("{:?}", Decoder::<Work>::new().next(&mut bytes().as_slice()).unwrap().unwrap())
            }
            _ if name.ends_with("ticket") => format!("{:?}", hex.parse::<SignedTicket>().unwrap().ticket()),
            _ if name.starts_with("record of") => {
                format!("{:?}", SignedRecord::from_bytes(bytes()).unwrap().verify(mesh_key().mesh_id()).unwrap())
            }
            _ if matches!(
                name,
                "record"
                    | "record with stages"
                    | "record with what was measured"
                    | "record with contents"
                    | "record with a region"
                    | "record with a model that guesses"
                    | "tombstone"
            ) =>
            {
                format!("{:?}", SignedRecord::from_bytes(bytes()).unwrap().verify(MeshId::public("home")).unwrap())
            }
            _ if name == "contact" => format!("{:?}", contact::open(&bytes()).unwrap().1),
            _ if name == "certificate" => {
                let signed = SignedCertificate::from_bytes(bytes()).unwrap();
                format!("{:?}", signed.verify(mesh_key().mesh_id(), node_key(1).node_id(), 0).unwrap())
            }
            _ if name == "revocations" => {
                format!("{:?}", SignedRevocations::from_bytes(bytes()).unwrap().verify(mesh_key().mesh_id()).unwrap())
            }
            _ if name == "attestation" => {
                let signed = SignedAttestation::from_bytes(bytes()).unwrap();
                format!("{:?}", signed.verify(samples::attestation().model).unwrap())
            }
            _ => continue,
        };
        assert_eq!(&found, meaning, "{name}");
        read += 1;
    }
    assert_eq!(read, 14 + samples::controls().len() + samples::works().len());
}
