//! The hub as one more source of a file that other nodes have: asked for what can be checked, believed in nothing, and never needed.

#![allow(clippy::unwrap_used, clippy::panic, reason = "these are tests, helpers included")]

mod common;
#[path = "../../store/tests/hub_server/mod.rs"]
mod hub_server;

use std::{
    path::Path,
    sync::{Arc, atomic::Ordering::SeqCst},
    time::Duration,
};

use axum::http::StatusCode;
use common::{Claim, Pull, Trick, World, until};
use hub_server::{Behaviour, Hub, sha256_of};
use murmur_api::backend::Backend;
use murmur_node::{DraftWish, Node, NodeOptions, WantedDraft, WantedModel};
use murmur_store::{HubRef, Origin, Store, hub::HubConfig};
use serde_json::{Value, json};
use tokio::task::JoinSet;

/// Where the hub has the file.
const PLACE: &str = "hf:someone/Tiny-GGUF@0123456789abcdef0123456789abcdef01234567:tiny-Q8_0.gguf";
/// So slowly does a node send that the hub is worth asking.
const SLOW_BYTES_PER_S: u64 = 600_000;

fn the_file() -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    common::the_file(&folder.path().join("tiny.gguf"))
}

async fn hub() -> Arc<Hub> {
    Hub::start(Behaviour { content: the_file(), ..Behaviour::default() }).await
}

fn config(hub: &Hub) -> HubConfig {
    config_with_cache(hub, Path::new("unused"))
}

/// What comes from the hub alone lies in its cache.
fn config_with_cache(hub: &Hub, cache: &Path) -> HubConfig {
    let endpoint = format!("http://127.0.0.1:{}", hub.address.port());
    let mut config = HubConfig::new(&endpoint, None, cache.to_owned()).unwrap();
    config.backoff_base = Duration::from_millis(1);
    config.attempts_max = 2;
    config.stall_timeout = Duration::from_millis(500);
    config
}

/// Pulls from a slow node, and from the hub as far as that is possible. Returns what was told on the way.
async fn pull_with(hub: &Hub, pulls: &str) -> (World, Vec<Value>) {
    let world = World::with_hub(config(hub)).await;
    let _honest = world.honest_with(Some(SLOW_BYTES_PER_S), Some(PLACE)).await;
    world.knows_holders(1).await;
    let events = Pull::named(&world, pulls).await.until_its_end(|_| world.holds_only_what_is_right()).await;
    world.has_the_file(&events);
    (world, events)
}

fn sources(events: &[Value]) -> impl Iterator<Item = &Value> {
    events.iter().filter_map(|event| event["fetch"]["sources"].as_array()).flatten()
}

/// Most that was ever told to have come from the hub, in bytes.
fn from_hub(events: &[Value]) -> u64 {
    let hub = sources(events).filter(|source| source["hub"] == PLACE);
    hub.filter_map(|source| source["received_bytes"].as_u64()).max().unwrap_or(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_comes_from_a_slow_node_and_from_the_hub_at_once_and_it_is_told_on_where_it_is() {
    let hub = hub().await;
    let (world, events) = pull_with(&hub, "tiny").await;
    assert!(!hub.transfers.lock().unwrap().is_empty());
    let last = events.last().unwrap();
    assert_eq!((&last["liars"], &last["source"]), (&json!([]), &json!(PLACE)));
    let from_node = sources(&events).any(|source| source["node"].is_string() && source["received_bytes"] != 0);
    assert!(from_node, "{events:#?}");
    // The next start of the node knows it as well.
    let content = murmur_store::Contents::at(&world.taker_dir).find(&world.own_digest()).unwrap().unwrap();
    until("it is written down", || content.source().as_deref() == Some(PLACE)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hub_with_other_bytes_is_found_out_and_named() {
    let hub = hub().await;
    hub.set(|behaviour| behaviour.content.iter_mut().for_each(|byte| *byte ^= 1));
    let (_world, events) = pull_with(&hub, "tiny").await;
    assert_eq!(from_hub(&events), 0);
    let last = events.last().unwrap();
    assert_eq!((&last["liars"], &last["source"]), (&json!([PLACE]), &Value::Null), "{events:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hub_with_a_file_of_another_length_is_not_asked_for_bytes() {
    let hub = hub().await;
    hub.set(|behaviour| behaviour.content.push(0));
    let (_world, events) = pull_with(&hub, "tiny").await;
    assert!(hub.transfers.lock().unwrap().is_empty());
    let is_told = |event: &Value| event["fetch"]["no_hub"].as_str().is_some_and(|why| why.contains("bytes there"));
    assert!(events.iter().any(is_told), "{events:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hub_that_breaks_off_stalls_or_is_overloaded_holds_nobody_up() {
    let troubles: [fn(&mut Behaviour); 4] = [
        |behaviour| behaviour.breaks_off_after = Some(50_000),
        |behaviour| behaviour.stalls = usize::MAX,
        |behaviour| behaviour.honours_ranges = false,
        |behaviour| behaviour.too_many = 1,
    ];
    let mut pulls = JoinSet::new();
    for trouble in troubles {
        pulls.spawn(async move {
            let hub = hub().await;
            hub.set(trouble);
            let (_world, events) = pull_with(&hub, "tiny").await;
            assert!(!hub.transfers.lock().unwrap().is_empty());
            assert_eq!(events.last().unwrap()["liars"], json!([]));
        });
    }
    pulls.join_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hub_that_asks_to_be_left_alone_is_left_alone() {
    let hub = hub().await;
    let world = World::with_hub(config(&hub)).await;
    let _honest = world.honest_with(Some(SLOW_BYTES_PER_S), Some(PLACE)).await;
    world.knows_holders(1).await;
    hub.set(|behaviour| behaviour.breaks_off_after = Some(20_000));
    let mut pull = Pull::begin(&world).await;
    pull.waits_for("the hub is asked", |_| !hub.transfers.lock().unwrap().is_empty()).await;
    let many = vec![(StatusCode::TOO_MANY_REQUESTS, vec![("retry-after", "600")]); 1_000];
    hub.set(|behaviour| behaviour.refusals = many);
    let events = pull.until_its_end(|_| ()).await;
    world.has_the_file(&events);
    let left = hub.behaviour.lock().unwrap().refusals.len();
    // As many as were under way, and no more.
    assert!(left >= 1_000 - 16, "it was asked {} times", 1_000 - left);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_whose_hashes_are_wrong_is_found_out_and_those_of_another_are_taken() {
    let hub = hub().await;
    let world = World::with_hub(config(&hub)).await;
    let claim = Claim { source: Some(PLACE), gives_hashes: true, ..world.claim() };
    let rogue = world.rogue(claim, Trick::WrongHashes).await;
    world.knows_holders(1).await;
    let mut pull = Pull::begin(&world).await;
    pull.waits_for("it is found out", |event| event["liars"][0] == rogue.id()).await;
    let _honest = world.honest_with(Some(SLOW_BYTES_PER_S), Some(PLACE)).await;
    let events = pull.until_its_end(|_| world.holds_only_what_is_right()).await;
    world.has_the_file(&events);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_hashes_the_hub_is_not_asked_and_nor_is_it_where_it_is_not_to_be() {
    let hub = hub().await;
    let world = World::with_hub(config(&hub)).await;
    let claim = Claim { source: Some(PLACE), gives_hashes: false, ..world.claim() };
    let _rogue = world.rogue(claim, Trick::Busy).await;
    world.knows_holders(1).await;
    let mut pull = Pull::begin(&world).await;
    let is_stuck = |event: &Value| event["fetch"]["stuck"].is_string();
    pull.waits_for("nothing comes", is_stuck).await;
    assert_eq!(hub.requests.load(SeqCst), 0);
    drop(world);

    let endpoint = format!("http://127.0.0.1:{}", hub.address.port());
    let variables = [("HF_ENDPOINT", endpoint.as_str()), ("HF_HOME", "/unused"), ("HF_HUB_OFFLINE", "1")];
    let variable = |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).into());
    let offline = HubConfig::from_variables(variable).unwrap();
    let world = World::with_hub(offline).await;
    let _honest = world.honest_with(None, Some(PLACE)).await;
    world.knows_holders(1).await;
    for name in ["tiny", "hf:someone/Tiny-GGUF:Q8_0"] {
        world.has_the_file(&Pull::named(&world, name).await.until_its_end(|_| ()).await);
    }
    assert_eq!(hub.requests.load(SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_of_the_hub_is_fetched_from_a_node_and_the_hub_and_is_the_hubs_file() {
    for name in ["hf:someone/Tiny-GGUF:Q8_0", PLACE] {
        let hub = hub().await;
        let (world, events) = pull_with(&hub, name).await;
        assert_eq!(events.last().unwrap()["source"], PLACE);
        let entry = Store::at(&world.taker_dir).get(&"tiny-Q8_0".parse().unwrap()).unwrap();
        assert_eq!(sha256_of(&std::fs::read(entry.path).unwrap()), sha256_of(&the_file()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_of_the_hub_is_found_in_the_mesh_when_the_hub_is_down() {
    let hub = hub().await;
    hub.set(|behaviour| behaviour.refusals = vec![(StatusCode::SERVICE_UNAVAILABLE, Vec::new()); 1_000]);
    let world = World::with_hub(config(&hub)).await;
    let _honest = world.honest_with(None, Some(PLACE)).await;
    world.knows_holders(1).await;
    let store = Store::at(&world.taker_dir);
    for name in ["hf:someone/tiny-gguf", "hf:someone/Tiny-GGUF@0123456:Q8_0"] {
        world.has_the_file(&Pull::named(&world, name).await.until_its_end(|_| ()).await);
        assert!(store.find_pulled(&name.parse().unwrap()).unwrap().is_some(), "{name} is not found by that name again");
        store.remove(&"tiny-Q8_0".parse().unwrap()).unwrap();
    }
    for name in ["hf:someone/Other-GGUF", "hf:someone/Tiny-GGUF:Q4_K_M", "hf:someone/Tiny-GGUF@fedcba9:Q8_0"] {
        let events = Pull::named(&world, name).await.until_its_end(|_| ()).await;
        let last = events.last().unwrap();
        assert_eq!((&last["state"], &last["nowhere"]), (&json!("failed"), &json!(true)), "{name}: {last}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nodes_have_by_a_name_of_the_hub_and_is_not_its_file_is_not_kept() {
    let hub = hub().await;
    // The same length and another file, of which the hub sends nothing.
    hub.set(|behaviour| {
        let mut other = behaviour.content.clone();
        other[100] ^= 1;
        behaviour.sha256 = Some(sha256_of(&other));
        behaviour.honours_ranges = false;
    });
    let world = World::with_hub(config(&hub)).await;
    let _honest = world.honest_with(None, Some(PLACE)).await;
    world.knows_holders(1).await;
    let events = Pull::named(&world, "hf:someone/Tiny-GGUF:Q8_0").await.until_its_end(|_| ()).await;
    let last = events.last().unwrap();
    let reason = last["reason"].as_str().unwrap();
    assert!(reason.contains("SHA-256") && reason.contains(&sha256_of(&the_file())), "{reason}");
    assert!(Store::at(&world.taker_dir).list().unwrap().is_empty());
    assert!(murmur_store::Contents::at(&world.taker_dir).find(&world.own_digest()).unwrap().is_none());
    assert_eq!(world.taker.status()["contents"], json!([]));
    // What there is not on the hub is not looked for elsewhere.
    let events = Pull::named(&world, "hf:someone/Tiny-GGUF:Q2_K").await.until_its_end(|_| ()).await;
    assert!(events.last().unwrap()["reason"].as_str().unwrap().contains("Q2_K"), "{events:?}");
}

/// A model that is to be served, by its name on the hub.
fn served() -> Vec<WantedModel> {
    vec![WantedModel { sought: NAME.parse().unwrap(), id: Some("mine".to_owned()), signed_by: None }]
}

const NAME: &str = "hf:someone/Tiny-GGUF:Q8_0";

/// What a store has under the name.
fn pulled(data_dir: &Path) -> Option<murmur_store::ModelEntry> {
    let name: HubRef = NAME.parse().unwrap();
    Store::at(data_dir).find_pulled(&name).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_of_the_hub_that_is_to_be_served_comes_from_a_node_when_the_hub_is_down() {
    let hub = hub().await;
    hub.set(|behaviour| behaviour.refusals = vec![(StatusCode::SERVICE_UNAVAILABLE, Vec::new()); 1_000]);
    let hub = config(&hub);
    let world = World::with_taker(|options| NodeOptions { hub: Some(hub), wanted: served(), ..options }).await;
    let _honest = world.honest_with(None, Some(PLACE)).await;
    until("it is in the store", || pulled(&world.taker_dir).is_some()).await;
    let entry = pulled(&world.taker_dir).unwrap();
    assert!(matches!(entry.origin, Origin::Mesh { .. }) && world.is_the_file(&entry.path), "{entry:?}");
    assert_eq!(world.taker.names().collect::<Vec<_>>(), ["mine"]);
    assert_eq!(world.taker.status()["wanted"], json!([{"name": NAME, "waiting": null}]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_of_the_hub_that_is_to_be_served_comes_from_the_hub_alone_when_no_node_has_it() {
    let hub = hub().await;
    let cache = tempfile::tempdir().unwrap();
    let config = config_with_cache(&hub, cache.path());
    let world = World::with_taker(|options| NodeOptions { hub: Some(config), wanted: served(), ..options }).await;
    until("it is listed", || world.taker.names().count() == 1).await;
    let entry = pulled(&world.taker_dir).unwrap();
    assert!(matches!(entry.origin, Origin::Hub { .. }) && world.is_the_file(&entry.path), "{entry:?}");
    assert_eq!(world.taker.names().collect::<Vec<_>>(), ["mine"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_is_to_guess_is_fetched_before_anything_is_loaded_from_a_node_when_the_hub_is_down() {
    let hub = hub().await;
    hub.set(|behaviour| behaviour.refusals = vec![(StatusCode::SERVICE_UNAVAILABLE, Vec::new()); 1_000]);
    let (hub, wanted) = (config(&hub), || DraftWish::Wanted(WantedDraft::new(NAME.parse().unwrap(), None, None)));
    let world = World::with_taker(|options| NodeOptions { hub: Some(hub), draft: wanted(), ..options }).await;
    let _honest = world.honest_with(None, Some(PLACE)).await;
    world.knows_holders(1).await;
    world.taker.load(|_| ()).await.unwrap();
    let entry = pulled(&world.taker_dir).unwrap();
    assert!(matches!(entry.origin, Origin::Mesh { .. }) && world.is_the_file(&entry.path), "{entry:?}");

    let folder = tempfile::tempdir().unwrap();
    let alone = Arc::new(Node::open(NodeOptions { draft: wanted(), ..common::options(folder.path()) }).unwrap());
    let error = alone.load(|_| ()).await.unwrap_err().to_string();
    assert!(error.contains(NAME), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_by_a_name_of_the_hub_ends_at_the_hub_when_there_is_no_mesh_or_nobody_in_it_and_is_done_at_once_when_it_is_here()
 {
    let hub = hub().await;
    let home = tempfile::tempdir().unwrap();
    let config = config_with_cache(&hub, &home.path().join("cache"));
    let world = World::with_hub(config.clone()).await;
    world.has_the_file(&Pull::named(&world, NAME).await.until_its_end(|_| ()).await);
    assert!(matches!(pulled(&world.taker_dir).unwrap().origin, Origin::Hub { .. }));

    let data_dir = home.path().join("data");
    let node = Node::open(NodeOptions { hub: Some(config), ..common::options(&data_dir) }).unwrap();
    for _ in 0..2 {
        let mut events = node.pull(NAME.to_owned(), None).await.unwrap();
        let mut last = Value::Null;
        while let Some(event) = events.recv().await {
            last = event;
        }
        assert_eq!(last["state"], "done", "{last}");
        assert!(world.is_the_file(Path::new(last["path"].as_str().unwrap())));
        // The second time it is here, and nobody is asked.
        hub.set(|behaviour| behaviour.refusals = vec![(StatusCode::SERVICE_UNAVAILABLE, Vec::new()); 1_000]);
    }
    assert!(node.pull("tiny".to_owned(), None).await.is_err(), "that is a name of a mesh");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_hub_is_not_asked_on_the_word_of_others_where_the_user_does_not_want_that() {
    let hub = hub().await;
    let config = config(&hub);
    let world = World::with_taker(|options| NodeOptions { hub: Some(config), hub_by_word: false, ..options }).await;
    let _honest = world.honest_with(Some(SLOW_BYTES_PER_S), Some(PLACE)).await;
    world.knows_holders(1).await;
    world.has_the_file(&Pull::named(&world, "tiny").await.until_its_end(|_| ()).await);
    assert_eq!(hub.requests.load(SeqCst), 0);
    // By its name on the hub the user asks for it there.
    world.has_the_file(&Pull::named(&world, NAME).await.until_its_end(|_| ()).await);
    assert!(hub.requests.load(SeqCst) > 0);
}
