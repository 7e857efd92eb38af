//! Models in several files, from a hub and on this machine: joined into one, whatever happens meanwhile, and refused where that cannot be.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests, too, end the test when something is off")]

mod hub_server;

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::http::StatusCode;
use hub_server::{Behaviour, Hub};
use murmur_gguf::{
    Gguf, GgufBuilder, TensorSource, Value,
    synth::{self, Spec},
};
use murmur_store::{
    ErrorKind, HubRef, ImportOptions, ModelEntry, Origin, Store, StoreError,
    hub::{HubConfig, PullEvent},
};
use rand::{Rng, SeedableRng, rngs::StdRng};

const NAMES: [&str; 3] =
    ["Q8_0/m-Q8_0-00001-of-00003.gguf", "Q8_0/m-Q8_0-00002-of-00003.gguf", "Q8_0/m-Q8_0-00003-of-00003.gguf"];

/// Writes a model whole, and in three parts.
fn split(folder: &Path) -> (PathBuf, Vec<PathBuf>) {
    let whole = folder.join("whole.gguf");
    let mut spec = Spec::tiny("llama").unwrap().with_layers(1);
    spec.facts.vocabulary = 300;
    synth::write(&spec, &whole).unwrap();
    let gguf = Gguf::open(&whole).unwrap();
    let mut left = gguf.tensors().iter();
    let parts = NAMES.iter().zip([2, 3, usize::MAX]).enumerate().map(|(at, (name, count))| {
        let mut part = GgufBuilder::default();
        if at == 0 {
            for (key, value) in gguf.keys() {
                part.set(key, value.clone());
            }
        }
        part.set("split.no", Value::U16(at as u16)).set("split.count", Value::U16(3));
        part.set("split.tensors.count", Value::I32(gguf.tensors().len() as i32));
        for tensor in left.by_ref().take(count) {
            let bytes = TensorSource::Bytes(gguf.read_tensor(tensor).unwrap().into());
            part.tensor(&*tensor.name, &tensor.dims, tensor.ty, bytes).unwrap();
        }
        let path = folder.join(name.rsplit('/').next().unwrap());
        part.write(&path).unwrap();
        path
    });
    let parts = parts.collect();
    (whole, parts)
}

/// A hub with a model in three files, and a store.
struct Bench {
    home: tempfile::TempDir,
    hub: Arc<Hub>,
    config: HubConfig,
    whole: Vec<u8>,
    events: Arc<Mutex<Vec<PullEvent>>>,
}

impl Bench {
    async fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        let (whole, parts) = split(home.path());
        let others = NAMES.iter().zip(parts).map(|(name, path)| ((*name).to_owned(), fs::read(path).unwrap()));
        let files = ["README.md"].into_iter().chain(NAMES).collect();
        let hub = Hub::start(Behaviour { files, others: others.collect(), ..Behaviour::default() }).await;
        let endpoint = format!("http://127.0.0.1:{}", hub.address.port());
        let mut config = HubConfig::new(&endpoint, None, home.path().join("hub")).unwrap();
        config.attempts_max = 2;
        config.backoff_base = Duration::from_millis(1);
        config.stall_timeout = Duration::from_millis(300);
        Self { hub, config, whole: fs::read(whole).unwrap(), home, events: Arc::default() }
    }

    fn store(&self) -> Store {
        Store::at(&self.home.path().join("data"))
    }

    async fn pull(&self, wanted: &str) -> Result<ModelEntry, StoreError> {
        let wanted: HubRef = format!("someone/Tiny-GGUF{wanted}").parse().unwrap();
        let events = Arc::clone(&self.events);
        let heard = Arc::new(move |event| events.lock().unwrap().push(event));
        self.store().pull(&self.config, &wanted, None, heard).await
    }

    /// What lies in the cache of the hub.
    fn cached(&self) -> Vec<PathBuf> {
        let blobs = self.home.path().join("hub/models--someone--Tiny-GGUF/blobs");
        fs::read_dir(blobs).into_iter().flatten().map(|entry| entry.unwrap().path()).collect()
    }

    fn transfers(&self) -> usize {
        self.hub.transfers.lock().unwrap().len()
    }
}

#[tokio::test]
async fn a_model_in_several_files_is_pulled_joined_and_found_by_the_name_of_any() {
    let bench = Bench::new().await;
    let entry = bench.pull("").await.unwrap();
    assert_eq!((entry.name.as_str(), entry.licence.as_deref()), ("m-Q8_0", Some("apache-2.0")));
    assert!(fs::read(&entry.path).unwrap() == bench.whole);
    let Origin::Mesh { digest } = entry.origin else { panic!("{entry:?}") };
    assert_eq!(digest, blake3::hash(&bench.whole).into(), "everybody who joins it has this one");
    assert!(bench.cached().is_empty(), "{:?}", bench.cached());
    {
        let events = bench.events.lock().unwrap();
        let total: u64 = NAMES.iter().map(|name| fs::metadata(part(&bench, name)).unwrap().len()).sum();
        assert!(matches!(&events[0], PullEvent::Chosen { total_bytes, .. } if *total_bytes == total), "{events:?}");
        let done = events.iter().filter_map(|event| match event {
            PullEvent::Progress { done_bytes, total_bytes } => Some((*done_bytes, *total_bytes)),
            _ => None,
        });
        let done: Vec<_> = done.collect();
        assert!(done.is_sorted() && done.last() == Some(&(total, total)), "{done:?}");
    }
    let transfers = bench.transfers();
    for wanted in ["", ":Q8_0", &format!(":{}", NAMES[0]), ":m-Q8_0-00002-of-00003.gguf"] {
        assert_eq!(bench.pull(wanted).await.unwrap(), entry, "{wanted}");
        let found = bench.store().resolve(&format!("hf:someone/Tiny-GGUF{wanted}").parse().unwrap()).unwrap();
        assert_eq!(found.path, entry.path);
    }
    assert_eq!(bench.transfers(), transfers, "it was here");
}

fn part(bench: &Bench, name: &str) -> PathBuf {
    bench.home.path().join(name.rsplit('/').next().unwrap())
}

#[tokio::test]
async fn a_pull_that_breaks_off_goes_on_with_the_parts_that_are_here() {
    let bench = Bench::new().await;
    let first_bytes = fs::metadata(part(&bench, NAMES[0])).unwrap().len();
    // As soon as the first is here, nothing comes any more.
    let hub = Arc::clone(&bench.hub);
    let heard = move |event| {
        if matches!(event, PullEvent::Progress { done_bytes, .. } if done_bytes == first_bytes) {
            hub.set(|behaviour| behaviour.stalls = usize::MAX);
        }
    };
    let wanted = "someone/Tiny-GGUF".parse().unwrap();
    let error = bench.store().pull(&bench.config, &wanted, None, Arc::new(heard)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert!(bench.store().list().unwrap().is_empty());

    bench.hub.set(|behaviour| behaviour.stalls = 0);
    let before = bench.transfers();
    let entry = bench.pull("").await.unwrap();
    assert!(fs::read(&entry.path).unwrap() == bench.whole && bench.cached().is_empty());
    assert_eq!(bench.transfers() - before, 2, "the first came again");
    let events = bench.events.lock().unwrap();
    assert!(matches!(events[0], PullEvent::Chosen { resumed_bytes, .. } if resumed_bytes == first_bytes), "{events:?}");
}

#[tokio::test]
async fn what_a_crash_has_left_is_no_model_and_is_cleared_away() {
    let bench = Bench::new().await;
    let contents = bench.home.path().join("data/models/contents");
    // A process that joined was killed, and one after the join, before the parts were gone.
    let left = contents.join(".new-1-1");
    fs::create_dir_all(&left).unwrap();
    fs::write(left.join("model.gguf"), &bench.whole[..1000]).unwrap();
    assert!(bench.store().contents().list().unwrap().is_empty());
    let entry = bench.pull("").await.unwrap();
    assert!(!left.exists());
    let sha256 = hub_server::sha256_of(&fs::read(part(&bench, NAMES[1])).unwrap());
    let blobs = bench.home.path().join("hub/models--someone--Tiny-GGUF/blobs");
    fs::write(blobs.join(format!("{sha256}.part")), "left").unwrap();
    assert_eq!(bench.pull("").await.unwrap(), entry);
    assert!(bench.cached().is_empty());
    // The index was lost before the model had its name: the same file is found again.
    fs::remove_file(bench.home.path().join("data/models/index.json")).unwrap();
    assert_eq!(bench.pull("").await.unwrap().path, entry.path);
    assert_eq!(bench.store().contents().list().unwrap().len(), 1);
}

/// Pulls the model and removes it again, until it is killed.
async fn pull_and_remove(home: &Path, endpoint: &str) -> ! {
    let config = HubConfig::new(endpoint, None, home.join("hub")).unwrap();
    let (store, wanted) = (Store::at(&home.join("data")), "someone/Tiny-GGUF".parse().unwrap());
    std::io::stderr().write_all(b"\nbegun\n").unwrap();
    loop {
        let entry = store.pull(&config, &wanted, None, Arc::new(|_| ())).await.unwrap();
        store.remove(&entry.name).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whenever_a_pull_is_killed_no_half_model_is_left_and_the_next_one_completes() {
    const TEST: &str = "whenever_a_pull_is_killed_no_half_model_is_left_and_the_next_one_completes";
    const KILLS: u64 = 40;
    const MOMENT_MS_MAX: u64 = 120;
    if let (Ok(home), Ok(endpoint)) = (std::env::var("MURMUR_TEST_FOLDER"), std::env::var("MURMUR_TEST_HUB")) {
        pull_and_remove(Path::new(&home), &endpoint).await;
    }
    let bench = Bench::new().await;
    let mut dice = StdRng::seed_from_u64(3);
    for kill in 0..KILLS {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", TEST, "--nocapture"])
            .env("MURMUR_TEST_FOLDER", bench.home.path())
            .env("MURMUR_TEST_HUB", bench.config.endpoint())
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
        assert!(said.any(|line| line == "begun"));
        std::thread::sleep(Duration::from_millis(dice.random_range(0..MOMENT_MS_MAX)));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!said.any(|line| line.contains("panicked")), "before kill {kill}");
        for content in bench.store().contents().list().unwrap() {
            assert!(content.held_bytes == content.bytes && fs::read(content.path).unwrap() == bench.whole);
        }
    }
    let entry = bench.pull("").await.unwrap();
    assert!(fs::read(&entry.path).unwrap() == bench.whole && entry.name.as_str() == "m-Q8_0");
    assert!(!bench.cached().iter().any(|path| path.extension().is_some_and(|ending| ending == "part")));
}

#[tokio::test]
async fn parts_that_are_wrong_are_refused_and_leave_no_model() {
    let bench = Bench::new().await;
    let second = fs::read(part(&bench, NAMES[1])).unwrap();
    bench.hub.set(|behaviour| behaviour.others[2].1 = [&second[..], b"x"].concat());
    let error = bench.pull("").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Damaged);
    assert!(error.to_string().contains("split.tensors.count") || error.to_string().contains("split.no"), "{error}");
    assert!(bench.store().list().unwrap().is_empty() && bench.store().contents().list().unwrap().is_empty());
    // One that is not there at all is seen before anything comes.
    bench.hub.set(|behaviour| behaviour.files.retain(|file| *file != NAMES[1]));
    let transfers = bench.transfers();
    let error = bench.pull("").await.unwrap_err().to_string();
    assert!(error.contains("only some parts are there"), "{error}");
    assert_eq!(bench.transfers(), transfers);
    // A hub that is down is told as such.
    bench.hub.set(|behaviour| behaviour.refusals = vec![(StatusCode::SERVICE_UNAVAILABLE, Vec::new()); 10]);
    assert_eq!(bench.pull("").await.unwrap_err().kind(), ErrorKind::Unavailable);
}

#[tokio::test]
async fn what_another_tool_has_of_the_parts_is_used_and_left_alone() {
    let bench = Bench::new().await;
    let bytes = fs::read(part(&bench, NAMES[1])).unwrap();
    let blob = bench.home.path().join("hub/models--someone--Tiny-GGUF/blobs").join(hub_server::sha256_of(&bytes));
    fs::create_dir_all(blob.parent().unwrap()).unwrap();
    fs::write(&blob, &bytes).unwrap();
    let entry = bench.pull("").await.unwrap();
    assert!(fs::read(&entry.path).unwrap() == bench.whole);
    assert_eq!((bench.transfers(), bench.cached()), (2, vec![blob]));
}

#[test]
fn the_users_own_parts_are_joined_into_a_copy() {
    let home = tempfile::tempdir().unwrap();
    let (whole, parts) = split(home.path());
    let store = Store::at(&home.path().join("data"));
    // By its path alone it is not served, and the error says what makes one file of it.
    let error = store.resolve(&parts[0].to_str().unwrap().parse().unwrap()).unwrap_err().to_string();
    assert!(error.contains("part 1 of a model that was split into 3 files"), "{error}");
    assert!(error.contains(&format!("murmur models import {}", parts[0].display())), "{error}");

    fs::create_dir_all(home.path().join("data/models/files")).unwrap();
    let left = home.path().join("data/models/files/.m-Q8_0.gguf.1.0.partial");
    fs::write(&left, "of a process that was killed").unwrap();
    let entry = store.import(&parts[1], &ImportOptions::default()).unwrap();
    assert_eq!((entry.name.as_str(), &entry.origin), ("m-Q8_0", &Origin::Copy));
    assert!(fs::read(&entry.path).unwrap() == fs::read(whole).unwrap());
    assert!(!left.exists() && parts.iter().all(|part| part.exists()));
    let error = store.import(&parts[0], &ImportOptions::default()).unwrap_err();
    assert!(matches!(error, StoreError::NameTaken { .. }), "{error}");

    fs::remove_file(&parts[2]).unwrap();
    let error =
        store.import(&parts[0], &ImportOptions { name: Some("other".parse().unwrap()), copy: false }).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains("m-Q8_0-00003-of-00003.gguf"), "{error}");
}
