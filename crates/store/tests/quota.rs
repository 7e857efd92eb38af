//! The quota: what goes when something is downloaded, and what never does.

#![allow(clippy::unwrap_used, reason = "helpers of tests, too, end the test when something is off")]

mod hub_server;

use std::{
    fs::{self, File},
    path::Path,
    sync::{Arc, Mutex},
};

use hub_server::{Behaviour, Hub};
use murmur_store::{
    Contents, Download, ErrorKind, ImportOptions, ModelEntry, ModelName, Stays, Store, StoreError,
    hub::{HubConfig, PullEvent},
};

/// A hub with several files, and a store.
struct Bench {
    home: tempfile::TempDir,
    hub: Arc<Hub>,
    config: HubConfig,
    events: Arc<Mutex<Vec<PullEvent>>>,
}

/// Of each file on the hub.
const MODEL_BYTES: usize = 100 << 10;

/// A model; another number is another one.
fn model(n: u8) -> Vec<u8> {
    let mut content = hub_server::gguf_of_size(MODEL_BYTES - hub_server::gguf_of_size(0).len());
    *content.last_mut().unwrap() = b'0' + n;
    content
}

impl Bench {
    async fn new() -> Self {
        let files = vec!["m1.gguf", "m2.gguf", "m3.gguf", "found.gguf"];
        let hub = Hub::start(Behaviour { files, ..Behaviour::default() }).await;
        let home = tempfile::tempdir().unwrap();
        let endpoint = format!("http://127.0.0.1:{}", hub.address.port());
        let config = HubConfig::new(&endpoint, None, home.path().join("hub")).unwrap();
        Self { home, hub, config, events: Arc::default() }
    }

    fn store(&self) -> Store {
        Store::at(&self.home.path().join("data"))
    }

    /// Pulls the hub's file `m1`, `m2` or `m3`.
    async fn pull(&self, n: u8) -> Result<ModelEntry, StoreError> {
        self.pull_file(&format!("m{n}.gguf"), model(n)).await
    }

    async fn pull_file(&self, file: &str, content: Vec<u8>) -> Result<ModelEntry, StoreError> {
        self.hub.set(|behaviour| behaviour.content = content);
        let events = Arc::clone(&self.events);
        let heard = Arc::new(move |event| events.lock().unwrap().push(event));
        let wanted = format!("someone/Tiny-GGUF:{file}").parse().unwrap();
        self.store().pull(&self.config, &wanted, None, heard).await
    }

    /// What went lately, by name.
    fn gone(&self) -> Vec<String> {
        let mut events = self.events.lock().unwrap();
        let gone = events.drain(..).filter_map(|event| match event {
            PullEvent::MadeRoom { removed } => Some(removed),
            _ => None,
        });
        gone.flatten().flat_map(|download| download.names).map(|name| name.to_string()).collect()
    }

    /// Makes it look as if a model had been added, and used, at these times.
    fn set_times(&self, name: &str, added_unix_s: u64, used_unix_s: u64) {
        let path = self.home.path().join("data/models/index.json");
        let mut index: serde_json::Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        let models = index["models"].as_array_mut().unwrap();
        let model = models.iter_mut().find(|model| model["name"] == name).unwrap();
        model["added_unix_s"] = added_unix_s.into();
        model["used_unix_s"] = used_unix_s.into();
        fs::write(&path, index.to_string()).unwrap();
    }

    fn downloads(&self) -> Vec<Download> {
        self.store().downloads().unwrap()
    }
}

fn name(text: &str) -> ModelName {
    text.parse().unwrap()
}

#[tokio::test]
async fn a_pull_makes_room_by_what_was_not_used_for_longest() {
    let bench = Bench::new().await;
    let store = bench.store();
    let bytes = bench.pull(1).await.unwrap().size_bytes;
    bench.pull(2).await.unwrap();
    bench.set_times("m1", 1000, 3000);
    bench.set_times("m2", 2000, 0);
    store.set_quota(Some(2 * bytes + bytes / 2)).unwrap();
    assert_eq!(store.quota().unwrap(), Some(2 * bytes + bytes / 2));
    assert!(bench.gone().is_empty());

    let third = bench.pull(3).await.unwrap();
    assert_eq!(bench.gone(), ["m2"]);
    let left: Vec<_> = bench.downloads().into_iter().flat_map(|download| download.names).collect();
    assert_eq!(left, [name("m1"), name("m3")]);
    // It is there again when it is wanted again.
    let error = store.resolve(&"m2".parse().unwrap()).unwrap_err();
    assert!(matches!(error, StoreError::NotHere { .. }) && error.kind() == ErrorKind::NotFound, "{error}");
    assert!(error.to_string().contains("murmur models pull hf:someone/Tiny-GGUF:m2.gguf"), "{error}");
    let blobs = bench.home.path().join("hub/models--someone--Tiny-GGUF/blobs");
    assert_eq!(fs::read_dir(blobs).unwrap().count(), 2, "the bytes themselves are gone, and no others");
    assert!(third.path.exists());
}

#[tokio::test]
async fn what_is_pinned_or_in_use_stays_and_a_pull_that_cannot_fit_removes_nothing_and_says_why() {
    let bench = Bench::new().await;
    let store = bench.store();
    let bytes = bench.pull(1).await.unwrap().size_bytes;
    let second = bench.pull(2).await.unwrap();
    bench.pull(3).await.unwrap();
    ["m1", "m2", "m3"].iter().zip(1..).for_each(|(name, n)| bench.set_times(name, n * 1000, 0));
    store.set_quota(Some(3 * bytes)).unwrap();
    store.pin(&name("m1")).unwrap();
    // As another process would that has it loaded.
    let used = File::open(&second.path).unwrap();
    used.lock_shared().unwrap();
    let stays: Vec<_> = bench.downloads().into_iter().map(|download| download.stays).collect();
    assert_eq!(stays, [Some(Stays::Pinned), Some(Stays::InUse), None]);

    let error = store.make_room(2 * bytes).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    let says = error.to_string();
    for part in ["200.0 KiB more", "300.0 KiB", "m1 (100.0 KiB), m2 (100.0 KiB)", "models quota SIZE", "pin --off"] {
        assert!(says.contains(part), "no {part:?} in: {says}");
    }
    assert_eq!(bench.downloads().len(), 3, "something went for nothing");
    assert!(matches!(store.make_room(4 * bytes), Err(StoreError::OverQuota { .. })));

    assert_eq!(store.make_room(bytes).unwrap().removed[0].names, [name("m3")]);
    drop(used);
    store.unpin(&name("m1")).unwrap();
    let collected = store.make_room(2 * bytes).unwrap();
    assert_eq!((collected.freed_bytes, collected.left_bytes), (bytes, bytes));
}

#[tokio::test]
async fn a_refused_pull_transfers_nothing_and_leaves_the_store_as_it_was() {
    let bench = Bench::new().await;
    let entry = bench.pull(1).await.unwrap();
    bench.store().pin(&entry.name).unwrap();
    bench.store().set_quota(Some(entry.size_bytes)).unwrap();
    let transfers = bench.hub.transfers.lock().unwrap().len();
    assert!(matches!(bench.pull(2).await, Err(StoreError::OverQuota { .. })));
    assert_eq!(bench.hub.transfers.lock().unwrap().len(), transfers);
    assert_eq!(bench.store().list().unwrap().len(), 1);
    bench.store().set_quota(None).unwrap();
    bench.pull(2).await.unwrap();
}

#[tokio::test]
async fn a_model_that_this_process_has_found_is_in_use_until_it_ends() {
    let bench = Bench::new().await;
    let entry = bench.pull(1).await.unwrap();
    let free = bench.downloads();
    assert_eq!(free[0].stays, None);
    bench.store().resolve(&"m1".parse().unwrap()).unwrap();
    assert_eq!(bench.downloads()[0].stays, Some(Stays::InUse));
    assert!(bench.store().collect(0).unwrap().removed.is_empty());
    assert!(entry.path.exists());
}

#[tokio::test]
async fn finding_a_model_is_a_use_that_is_remembered() {
    let bench = Bench::new().await;
    bench.pull(1).await.unwrap();
    bench.set_times("m1", 1000, 2000);
    bench.store().resolve(&"m1".parse().unwrap()).unwrap();
    let used = bench.store().get(&name("m1")).unwrap().used_unix_s;
    assert!(used > 1_700_000_000, "{used}");
    // Pulling again forgets neither that nor a pin.
    bench.store().pin(&name("m1")).unwrap();
    let again = bench.pull(1).await.unwrap();
    assert!(again.pinned && again.used_unix_s == used);
}

#[tokio::test]
async fn the_users_own_files_neither_count_nor_go() {
    let bench = Bench::new().await;
    let store = bench.store();
    let own = bench.home.path().join("own.gguf");
    fs::write(&own, model(7)).unwrap();
    store.import(&own, &ImportOptions { name: Some(name("own")), copy: false }).unwrap();
    let copy = store.import(&own, &ImportOptions { name: Some(name("copy")), copy: true }).unwrap();
    // Another tool's download, and one of murmur's that the user has imported as well.
    put_in_cache(bench.home.path(), &model(9));
    let found = bench.pull_file("found.gguf", model(9)).await.unwrap();
    let both = bench.pull(2).await.unwrap();
    store.import(&both.path, &ImportOptions { name: Some(name("mine-too")), copy: false }).unwrap();

    let stays: Vec<_> = bench.downloads().into_iter().map(|download| (download.names.len(), download.stays)).collect();
    assert_eq!(stays, [(2, Some(Stays::Pinned))]);
    assert!(store.collect(0).unwrap().removed.is_empty());
    for path in [&own, &copy.path, &found.path, &both.path] {
        assert!(path.exists(), "{}", path.display());
    }
}

#[cfg(unix)]
#[tokio::test]
async fn what_another_tool_has_linked_in_the_hubs_cache_stays_there_when_murmurs_own_goes() {
    let bench = Bench::new().await;
    let entry = bench.pull(1).await.unwrap();
    let snapshots = bench.home.path().join("hub/models--someone--Tiny-GGUF/snapshots");
    let theirs = snapshots.join("another/m1.gguf");
    fs::create_dir_all(theirs.parent().unwrap()).unwrap();
    std::os::unix::fs::symlink(entry.path.canonicalize().unwrap(), &theirs).unwrap();
    let collected = bench.store().collect(0).unwrap();
    assert_eq!((collected.removed.len(), collected.freed_bytes, collected.left_bytes), (1, 0, 0));
    assert!(!entry.path.exists() && fs::read(&theirs).unwrap() == model(1));
}

/// A whole file where another tool would have put it.
fn put_in_cache(home: &Path, content: &[u8]) {
    let blobs = home.join("hub/models--someone--Tiny-GGUF/blobs");
    fs::create_dir_all(&blobs).unwrap();
    fs::write(blobs.join(hub_server::sha256_of(content)), content).unwrap();
}

#[tokio::test]
async fn what_is_held_stays_wherever_it_lies() {
    let bench = Bench::new().await;
    let entry = bench.pull(1).await.unwrap();
    let contents = Contents::at(&bench.home.path().join("data"));
    let content = contents.adopt(&entry.path, &mut |_, _| {}).unwrap();
    let store = bench.store();
    let held = content.hold().unwrap();
    assert!(store.collect(0).unwrap().removed.is_empty());
    drop(held);
    assert_eq!(store.collect(0).unwrap().freed_bytes, entry.size_bytes);
    assert!(!content.is_there() && contents.find(&content.digest()).unwrap().is_none());
    assert!(matches!(content.hold(), Err(StoreError::ContentGone { .. })));
}

#[tokio::test]
async fn a_disk_that_is_too_small_is_told_with_what_is_missing_and_what_could_go() {
    let bench = Bench::new().await;
    bench.pull(1).await.unwrap();
    bench.hub.set(|behaviour| behaviour.size_bytes = Some(1 << 60));
    let error = bench.pull(2).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    let says = error.to_string();
    assert!(says.contains("are missing") && says.contains("could go: m1 (100.0 KiB)"), "{says}");
}
