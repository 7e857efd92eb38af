//! Signed manifests between nodes: what somebody has signed of a file travels with it, and who wants a file that a key has signed gets no other.

#![allow(clippy::unwrap_used, clippy::panic, reason = "these are tests, helpers included")]

mod common;

use common::{Pull, Trick, World, until};
use murmur_api::backend::{Backend, Refusal};
use murmur_gguf::Manifest;
use murmur_node::{
    NodeOptions, WantedModel,
    signatures::{Attested, attestations},
};
use murmur_protocol::mesh::{Attestation, ManifestDigest, ModelDigest, NodeKey, SignedAttestation};
use murmur_store::Contents;
use serde_json::Value;

fn key(number: u8) -> NodeKey {
    NodeKey::from_bytes(&[number; 32])
}

/// What a key could sign of the file.
fn says(world: &World, number: u8) -> Attestation {
    Attestation {
        signer: key(number).node_id(),
        model: world.digest,
        manifest: ManifestDigest::from_bytes([0x33; 32]),
        file_bytes: world.bytes(),
        name: "tiny".to_owned(),
        licence: None,
        source: None,
        signed_ms: 1,
    }
}

/// Who has signed what the taker has, as it lies in its store.
fn signers(world: &World) -> Vec<String> {
    let content = Contents::at(&world.taker_dir).find(&world.own_digest()).unwrap().unwrap();
    attestations(&content).unwrap().iter().map(|one| one.says().signer.to_string()).collect()
}

/// Of what this key has signed nothing is fetched, and the reason has this in it.
async fn is_refused(world: &World, signer: &NodeKey, because: &str) {
    let events = Pull::signed_by(world, &signer.node_id()).await.until_its_end(|_| ()).await;
    let last = events.last().unwrap();
    assert_eq!(last["state"], "failed", "{events:#?}");
    let reason = last["reason"].as_str().unwrap();
    assert!(reason.contains(because) && reason.contains(&signer.node_id().to_string()), "{reason}");
    assert!(events.iter().all(|event| event["state"] != "fetching"), "{events:#?}");
    assert!(Contents::at(&world.taker_dir).list().unwrap().is_empty(), "something of it was begun");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_somebody_has_signed_travels_with_the_file_and_is_told() {
    let world = World::new().await;
    world.signs(&key(1));
    let _honest = world.honest(None).await;
    world.knows_holders(1).await;
    let events = Pull::begin(&world).await.until_its_end(|_| world.holds_only_what_is_right()).await;
    world.has_the_file(&events);
    let signer = key(1).node_id().to_string();
    assert_eq!(events.last().unwrap()["signatures"][0]["signer"], signer);
    assert_eq!(signers(&world), std::slice::from_ref(&signer));
    let listed = world.taker.contents();
    assert_eq!(listed[0]["signatures"][0]["signer"], signer, "{listed:#?}");
    // It is about the very file that is here.
    let content = Contents::at(&world.taker_dir).find(&world.own_digest()).unwrap().unwrap();
    let manifest = Manifest::of(content.path(), |_, _| ()).unwrap();
    let attested: Vec<Attested> = attestations(&content).unwrap();
    assert_eq!(attested[0].says().manifest.as_bytes(), &manifest.own_digest().0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_the_wanted_key_has_signed_is_fetched_and_another_one_is_refused_before_anything_comes() {
    let world = World::new().await;
    world.signs(&key(1));
    world.signs(&key(2));
    let _honest = world.honest(None).await;
    world.knows_holders(1).await;
    is_refused(&world, &key(3), &key(1).node_id().to_string()).await;
    let events = Pull::signed_by(&world, &key(2).node_id()).await.until_its_end(|_| ()).await;
    world.has_the_file(&events);
    // The wanted one comes first.
    assert_eq!(signers(&world)[0], key(2).node_id().to_string());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_is_here_is_taken_for_signed_only_if_it_is() {
    let world = World::new().await;
    let honest = world.honest(None).await;
    world.knows_holders(1).await;
    world.has_the_file(&Pull::begin(&world).await.until_its_end(|_| ()).await);
    let ask = async || Pull::signed_by(&world, &key(1).node_id()).await.until_its_end(|_| ()).await.pop().unwrap();
    let last: Value = ask().await;
    assert!(last["reason"].as_str().unwrap().contains("nobody has"), "{last}");
    // Its maker signs it later.
    world.signs(&key(1));
    assert_eq!(ask().await["state"], "done");
    assert_eq!(signers(&world), [key(1).node_id().to_string()]);
    // What was shown once is known without the one that showed it.
    honest.shutdown().await;
    assert_eq!(ask().await["state"], "done");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_forged_altered_or_about_another_file_is_not_believed() {
    let world = World::new().await;
    let honest = says(&world, 1).sign(&key(1)).unwrap();
    let foreign = says(&world, 2).sign(&key(2)).unwrap();
    let forged = [&foreign.as_bytes()[..64], &honest.as_bytes()[64..]].concat();
    let mut altered = honest.as_bytes().to_vec();
    *altered.last_mut().unwrap() ^= 1;
    let elsewhere = Attestation { model: ModelDigest::from_bytes([7; 32]), ..says(&world, 1) };
    let shown = vec![
        SignedAttestation::from_bytes(forged).unwrap(),
        SignedAttestation::from_bytes(altered).unwrap(),
        elsewhere.sign(&key(1)).unwrap(),
        foreign,
    ];
    let rogue = world.rogue_that_shows(world.claim(), Trick::Silent, shown).await;
    world.knows_holders(1).await;
    is_refused(&world, &key(1), &key(2).node_id().to_string()).await;
    assert_eq!(rogue.asked(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_hides_what_was_signed_cannot_keep_another_from_showing_it() {
    let world = World::new().await;
    world.signs(&key(1));
    let _rogue = world.rogue(world.claim(), Trick::Lacks).await;
    let _honest = world.honest(None).await;
    world.knows_holders(2).await;
    world.has_the_file(&Pull::signed_by(&world, &key(1).node_id()).await.until_its_end(|_| ()).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signature_does_not_make_wrong_bytes_right() {
    let world = World::new().await;
    let signed = says(&world, 1).sign(&key(1)).unwrap();
    let rogue = world.rogue_that_shows(world.claim(), Trick::Wrong { at: 0.5 }, vec![signed]).await;
    let _honest = world.honest(Some(2_000_000)).await;
    world.knows_holders(2).await;
    let pull = Pull::signed_by(&world, &key(1).node_id()).await;
    world.has_the_file(&pull.until_its_end(|_| world.holds_only_what_is_right()).await);
    assert!(rogue.asked() > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_to_be_served_and_is_not_signed_by_the_wanted_key_is_refused_before_anything_comes_and_taken_once_it_is()
 {
    let wanted = WantedModel { sought: "tiny".parse().unwrap(), id: None, signed_by: Some(key(3).node_id()) };
    let world = World::with_taker(|options| NodeOptions { wanted: vec![wanted], ..options }).await;
    world.signs(&key(1));
    let _honest = world.honest(None).await;
    let waiting = || world.taker.status()["wanted"][0]["waiting"].as_str().map(str::to_owned);
    let is_refused = || waiting().is_some_and(|why| why.contains("no node of the mesh shows"));
    until("it is refused", is_refused).await;
    let why = waiting().unwrap();
    assert!([1, 3].iter().all(|number| why.contains(&key(*number).node_id().to_string())), "{why}");
    assert!(Contents::at(&world.taker_dir).list().unwrap().is_empty(), "something of it was begun");
    world.signs(&key(3));
    until("it is listed", || world.taker.names().count() == 1).await;
    assert_eq!(signers(&world)[0], key(3).node_id().to_string());
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_signed_what_is_listed_also_of_files_that_are_elsewhere() {
    let world = World::new().await;
    world.signs(&key(1));
    let honest = world.honest(None).await;
    let _rogue = world.rogue(world.claim(), Trick::Lacks).await;
    world.knows_holders(2).await;
    for node in [&world.taker, &honest] {
        let listed = node.signatures().await;
        assert_eq!(listed[world.digest.to_string()][0]["signer"], key(1).node_id().to_string(), "{listed}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_is_none_is_refused_with_its_field() {
    let world = World::new().await;
    let refused = world.taker.pull("tiny".to_owned(), Some("somebody".to_owned())).await.unwrap_err();
    let Refusal::BadRequest { message, param, .. } = refused else { panic!("{refused:?}") };
    assert_eq!(param.as_deref(), Some("signed_by"));
    assert!(message.contains("64 hex digits"), "{message}");
}
