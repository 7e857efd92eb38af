//! A node that fetches keeps the quota of its store: what is not used goes first, and what is used never.

#![allow(clippy::unwrap_used, clippy::panic, reason = "these are tests, helpers included")]

mod common;

use std::{
    fs::File,
    path::Path,
    time::{Duration, SystemTime},
};

use common::{Pull, World, until};
use murmur_api::backend::Backend;
use murmur_gguf::{
    ByteRange,
    synth::{self, Spec},
};
use murmur_store::{Content, Contents, Store};
use serde_json::json;

const ALL: [ByteRange; 1] = [ByteRange { start: 0, end: u64::MAX }];

/// Puts a model into a store that has come from peers and was last used so long ago.
fn put(data_dir: &Path, name: &str, seed: u64, ago: Duration) -> Content {
    let peer = tempfile::tempdir().unwrap();
    let file = peer.path().join("peer.gguf");
    synth::write(&Spec::tiny("llama").unwrap().with_layers(1).with_seed(seed), &file).unwrap();
    let source = Contents::at(peer.path()).adopt(&file, &mut |_, _| ()).unwrap();
    let mut encoded = Vec::new();
    source.encode(&ALL, &mut encoded).unwrap();
    let store = Store::at(data_dir);
    let content = store.contents().create(source.digest(), source.bytes()).unwrap();
    content.decode(&ALL, &mut encoded.as_slice(), &mut |_| ()).unwrap();
    store.add_content(name.parse().unwrap(), &content, None).unwrap();
    let state = File::options().write(true).open(content.path().with_file_name("state")).unwrap();
    state.set_modified(SystemTime::now() - ago).unwrap();
    content
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_makes_room_by_what_was_not_used_for_longest_and_is_let_go_itself_when_it_is_not_used() {
    let home = tempfile::tempdir().unwrap();
    let used = put(home.path(), "used", 7, Duration::from_secs(3_000));
    let old = put(home.path(), "old", 8, Duration::from_secs(2_000));
    let newer = put(home.path(), "newer", 9, Duration::from_secs(1_000));
    let held = used.hold().unwrap();
    let store = Store::at(home.path());
    let world = World::with_taker_at(home.path().to_owned()).await;
    store.set_quota(Some(3 * world.bytes() + 1_000)).unwrap();
    let _honest = world.honest(None).await;
    world.knows_holders(1).await;
    let events = Pull::begin(&world).await.until_its_end(|_| ()).await;
    world.has_the_file(&events);
    assert_eq!((used.is_there(), old.is_there(), newer.is_there()), (true, false, true));

    // Nobody uses it now, and the node has noticed when it has gone.
    drop(held);
    until("all of it has gone", || store.collect(0).unwrap().left_bytes == 0).await;
    until("the node knows that it has gone", || world.taker.status()["contents"] == json!([])).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_for_which_there_is_no_room_says_what_stands_in_the_way_and_removes_nothing() {
    let home = tempfile::tempdir().unwrap();
    let old = put(home.path(), "old", 7, Duration::from_secs(2_000));
    let newer = put(home.path(), "newer", 8, Duration::from_secs(1_000));
    let store = Store::at(home.path());
    for name in ["old", "newer"] {
        store.pin(&name.parse().unwrap()).unwrap();
    }
    let world = World::with_taker_at(home.path().to_owned()).await;
    store.set_quota(Some(2 * world.bytes() + 500_000)).unwrap();
    let _honest = world.honest(None).await;
    world.knows_holders(1).await;
    let events = Pull::begin(&world).await.until_its_end(|_| ()).await;
    let last = events.last().unwrap();
    let reason = last["reason"].as_str().unwrap();
    for part in ["the quota of", "pinned or in use:", "old (", "newer (", "models quota SIZE", "pin --off"] {
        assert!(reason.contains(part), "no {part:?} in: {reason}");
    }
    assert!(old.is_there() && newer.is_there());
    store.unpin(&"old".parse().unwrap()).unwrap();
    world.has_the_file(&Pull::begin(&world).await.until_its_end(|_| ()).await);
    assert!(!old.is_there() && newer.is_there());
}
