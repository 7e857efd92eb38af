//! Pulls against a small hub on loopback that can be told to misbehave.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests, too, end the test when something is off")]

mod hub_server;

use std::{
    fs,
    path::PathBuf,
    sync::{Arc, Mutex, atomic::Ordering},
    time::Duration,
};

use axum::http::StatusCode;
use hub_server::{Behaviour, COMMIT, Hub, sha256_of};
use murmur_store::{
    ErrorKind, Health, HubRef, ModelEntry, ModelRef, Origin, Store, StoreError,
    hub::{HubConfig, PullEvent, search},
};

/// A store and a cache of its own, and what a pull told.
struct Bench {
    home: tempfile::TempDir,
    hub: Arc<Hub>,
    config: HubConfig,
    events: Arc<Mutex<Vec<PullEvent>>>,
}

impl Bench {
    async fn new(behaviour: Behaviour) -> Self {
        let hub = Hub::start(behaviour).await;
        let home = tempfile::tempdir().unwrap();
        let endpoint = format!("http://127.0.0.1:{}", hub.address.port());
        let mut config = HubConfig::new(&endpoint, Some("hf_secret".to_owned()), home.path().join("hub")).unwrap();
        config.attempts_max = 3;
        config.backoff_base = Duration::from_millis(1);
        config.stall_timeout = Duration::from_millis(300);
        Self { home, hub, config, events: Arc::default() }
    }

    fn store(&self) -> Store {
        Store::at(&self.home.path().join("data"))
    }

    async fn pull(&self, reference: &str) -> Result<ModelEntry, StoreError> {
        let reference: HubRef = reference.parse().unwrap();
        let events = Arc::clone(&self.events);
        self.store()
            .pull(&self.config, &reference, None, Arc::new(move |event| events.lock().unwrap().push(event)))
            .await
    }

    fn transfers(&self) -> Vec<u64> {
        self.hub.transfers.lock().unwrap().clone()
    }

    fn blobs(&self) -> PathBuf {
        self.home.path().join("hub/models--someone--Tiny-GGUF/blobs")
    }

    fn partials(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.blobs()).into_iter().flatten().map(|e| e.unwrap().path());
        entries.filter(|path| path.extension().is_some_and(|e| e == "part")).collect()
    }
}

#[tokio::test]
async fn a_pull_ends_in_the_hubs_cache_layout_and_in_the_store() {
    let bench = Bench::new(Behaviour::default()).await;
    let entry = bench.pull("hf:someone/Tiny-GGUF").await.unwrap();
    assert_eq!(entry.name.as_str(), "tiny-Q4_K_M");
    let content = Behaviour::default().content;
    assert_eq!(fs::read(&entry.path).unwrap(), content);
    assert_eq!(
        entry.path,
        bench.home.path().join("hub/models--someone--Tiny-GGUF/snapshots").join(COMMIT).join("tiny-Q4_K_M.gguf")
    );
    assert!(bench.blobs().join(sha256_of(&content)).is_file());
    assert_eq!(fs::read_to_string(bench.home.path().join("hub/models--someone--Tiny-GGUF/refs/main")).unwrap(), COMMIT);
    assert!(matches!(entry.origin, Origin::Hub { downloaded: true, sha256: Some(_), .. }));
    assert!(bench.partials().is_empty());

    let store = bench.store();
    for reference in
        ["tiny-Q4_K_M", "hf:someone/Tiny-GGUF", "hf:someone/Tiny-GGUF:Q4_K_M", "hf:someone/Tiny-GGUF:tiny-Q4_K_M.gguf"]
    {
        let reference: ModelRef = reference.parse().unwrap();
        assert_eq!(store.resolve(&reference).unwrap().path, entry.path, "{reference:?}");
    }
    assert_eq!(store.resolve(&"hf:someone/Tiny-GGUF:Q8_0".parse().unwrap()).unwrap_err().kind(), ErrorKind::NotFound);
}

#[tokio::test]
async fn the_token_goes_to_the_hub_and_not_to_where_it_redirects() {
    let bench = Bench::new(Behaviour::default()).await;
    bench.pull("hf:someone/Tiny-GGUF").await.unwrap();
    assert_eq!(*bench.hub.tokens_at_store.lock().unwrap(), [None]);
}

#[tokio::test]
async fn a_second_pull_transfers_nothing_and_removal_deletes_what_the_first_one_brought() {
    let bench = Bench::new(Behaviour::default()).await;
    let first = bench.pull("hf:someone/Tiny-GGUF").await.unwrap();
    let second = bench.pull("hf:someone/Tiny-GGUF").await.unwrap();
    assert_eq!(bench.transfers().len(), 1);
    assert!(matches!(bench.events.lock().unwrap().last(), Some(PullEvent::AlreadyThere { .. })));
    assert!(matches!(second.origin, Origin::Hub { downloaded: true, .. }), "the second pull disowned the file");
    let removed = bench.store().remove(&first.name).unwrap();
    assert_eq!(removed.freed_bytes, first.size_bytes);
    assert!(!first.path.exists() && fs::read_dir(bench.blobs()).unwrap().next().is_none());
}

#[tokio::test]
async fn a_file_that_another_tool_had_cached_is_used_and_left_when_the_entry_goes() {
    let bench = Bench::new(Behaviour::default()).await;
    let content = Behaviour::default().content;
    fs::create_dir_all(bench.blobs()).unwrap();
    fs::write(bench.blobs().join(sha256_of(&content)), &content).unwrap();
    let entry = bench.pull("hf:someone/Tiny-GGUF").await.unwrap();
    assert!(bench.transfers().is_empty());
    assert_eq!(bench.store().remove(&entry.name).unwrap().freed_bytes, 0);
    assert!(entry.path.exists());
}

#[tokio::test]
async fn an_interrupted_transfer_goes_on_where_it_broke_off() {
    let behaviour = Behaviour { breaks_off_after: Some(100_000), ..Behaviour::default() };
    let bench = Bench::new(behaviour).await;
    let entry = bench.pull("hf:someone/Tiny-GGUF").await.unwrap();
    assert_eq!(fs::read(&entry.path).unwrap(), Behaviour::default().content);
    let transfers = bench.transfers();
    assert!(transfers.len() >= 3 && transfers.is_sorted() && transfers[1] > 0, "{transfers:?}");
}

#[tokio::test]
async fn a_pull_that_was_given_up_is_resumed_by_the_next_one() {
    let bench = Bench::new(Behaviour { stalls: usize::MAX, ..Behaviour::default() }).await;
    let content = Behaviour::default().content;
    fs::create_dir_all(bench.blobs()).unwrap();
    fs::write(bench.blobs().join(format!("{}.part", sha256_of(&content))), &content[..123_456]).unwrap();
    let error = bench.pull("hf:someone/Tiny-GGUF").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("is kept"), "{error}");

    bench.hub.set(|behaviour| behaviour.stalls = 0);
    bench.pull("hf:someone/Tiny-GGUF").await.unwrap();
    assert_eq!(bench.transfers().last(), Some(&123_456));
    assert!(bench.events.lock().unwrap().contains(&PullEvent::Chosen {
        file: "tiny-Q4_K_M.gguf".to_owned(),
        licence: Some("apache-2.0".to_owned()),
        total_bytes: content.len() as u64,
        resumed_bytes: 123_456
    }));
}

#[tokio::test]
async fn a_server_that_ignores_ranges_is_downloaded_anew_and_not_appended() {
    let bench = Bench::new(Behaviour { honours_ranges: false, ..Behaviour::default() }).await;
    let content = Behaviour::default().content;
    fs::create_dir_all(bench.blobs()).unwrap();
    fs::write(bench.blobs().join(format!("{}.part", sha256_of(&content))), &content[..1000]).unwrap();
    let entry = bench.pull("hf:someone/Tiny-GGUF").await.unwrap();
    assert_eq!(fs::read(entry.path).unwrap(), content);
}

#[tokio::test]
async fn a_server_that_breaks_off_at_the_same_place_for_ever_is_given_up() {
    let behaviour = Behaviour { honours_ranges: false, breaks_off_after: Some(1000), ..Behaviour::default() };
    let bench = Bench::new(behaviour).await;
    assert_eq!(bench.pull("hf:someone/Tiny-GGUF").await.unwrap_err().kind(), ErrorKind::Unavailable);
}

#[tokio::test]
async fn a_stalled_transfer_is_taken_up_again() {
    let bench = Bench::new(Behaviour { stalls: 1, ..Behaviour::default() }).await;
    bench.pull("hf:someone/Tiny-GGUF").await.unwrap();
    assert!(
        bench
            .events
            .lock()
            .unwrap()
            .iter()
            .any(|e| matches!(e, PullEvent::Retrying { why, .. } if why.contains("nothing came")))
    );
}

#[tokio::test]
async fn a_wrong_checksum_is_refused_and_leaves_nothing() {
    let bench = Bench::new(Behaviour { sha256: Some("ab".repeat(32)), ..Behaviour::default() }).await;
    let error = bench.pull("hf:someone/Tiny-GGUF").await.unwrap_err();
    assert!(matches!(error, StoreError::WrongChecksum { .. }), "{error}");
    assert!(bench.partials().is_empty());
    assert!(bench.store().list().unwrap().is_empty());
}

#[tokio::test]
async fn a_longer_file_than_announced_is_refused() {
    let bench = Bench::new(Behaviour { size_bytes: Some(1000), ..Behaviour::default() }).await;
    let error = bench.pull("hf:someone/Tiny-GGUF").await.unwrap_err();
    assert!(error.to_string().contains("more bytes"), "{error}");
}

#[tokio::test]
async fn a_file_larger_than_the_disk_is_refused_before_the_transfer() {
    let bench = Bench::new(Behaviour { size_bytes: Some(1 << 60), ..Behaviour::default() }).await;
    let error = bench.pull("hf:someone/Tiny-GGUF").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    assert!(error.to_string().contains("HF_HOME"), "{error}");
    assert!(bench.transfers().is_empty());
}

/// `/dev/full` is a disk with no room at all.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_disk_that_fills_up_during_the_transfer_is_told_as_such() {
    let bench = Bench::new(Behaviour::default()).await;
    fs::create_dir_all(bench.blobs()).unwrap();
    let partial = bench.blobs().join(format!("{}.part", sha256_of(&Behaviour::default().content)));
    std::os::unix::fs::symlink("/dev/full", &partial).unwrap();
    let error = bench.pull("hf:someone/Tiny-GGUF").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    assert!(error.to_string().contains("pull again to go on"), "{error}");
    assert!(partial.is_symlink(), "the partial file was not kept");
}

#[tokio::test]
async fn refusals_say_what_to_do() {
    let cases = [
        (StatusCode::UNAUTHORIZED, vec![], ErrorKind::Unavailable, "token"),
        (
            StatusCode::FORBIDDEN,
            vec![("x-error-code", "GatedRepo")],
            ErrorKind::Unavailable,
            "/someone/Tiny-GGUF, then",
        ),
        (StatusCode::NOT_FOUND, vec![("x-error-code", "RevisionNotFound")], ErrorKind::NotFound, "@revision"),
        (StatusCode::NOT_FOUND, vec![], ErrorKind::NotFound, "spelling"),
        (StatusCode::TOO_MANY_REQUESTS, vec![("retry-after", "3600")], ErrorKind::Unavailable, "60 minutes"),
        (StatusCode::IM_A_TEAPOT, vec![], ErrorKind::Other, "HF_ENDPOINT"),
    ];
    for (status, headers, kind, says) in cases {
        let bench = Bench::new(Behaviour { refusals: vec![(status, headers)], ..Behaviour::default() }).await;
        let error = bench.pull("hf:someone/Tiny-GGUF").await.unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(says), "{error}");
        assert!(!error.to_string().contains("hf_secret"));
    }
    let bench = Bench::new(Behaviour::default()).await;
    assert_eq!(bench.pull("hf:someone/Absent-GGUF").await.unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(bench.pull("hf:someone/Tiny-GGUF:Q5_K_M").await.unwrap_err().kind(), ErrorKind::NotFound);
}

#[tokio::test]
async fn a_gated_model_without_a_token_says_where_its_licence_is_accepted_and_that_a_token_is_needed() {
    let refused = || vec![(StatusCode::UNAUTHORIZED, vec![("x-error-code", "GatedRepo")])];
    let mut bench = Bench::new(Behaviour { refusals: refused(), ..Behaviour::default() }).await;
    let with_token = bench.pull("hf:someone/Tiny-GGUF").await.unwrap_err().to_string();
    assert!(with_token.contains("the token in use") && !with_token.contains("set HF_TOKEN"), "{with_token}");

    let endpoint = bench.config.endpoint().to_owned();
    bench.config = HubConfig::new(&endpoint, None, bench.home.path().join("hub")).unwrap();
    bench.hub.set(|behaviour| behaviour.refusals = refused());
    let error = bench.pull("hf:someone/Tiny-GGUF").await.unwrap_err();
    assert!(matches!(error, StoreError::HubRefuses { .. }), "{error}");
    let page = format!("{endpoint}/someone/Tiny-GGUF, then set HF_TOKEN");
    assert!(error.to_string().contains(&page), "{error}");
}

#[tokio::test]
async fn the_licence_is_told_before_the_transfer_and_remembered() {
    let bench = Bench::new(Behaviour::default()).await;
    let entry = bench.pull("hf:someone/Tiny-GGUF").await.unwrap();
    assert_eq!(entry.licence.as_deref(), Some("apache-2.0"));
    let told = |event: &PullEvent| matches!(event, PullEvent::Chosen { licence: Some(licence), .. } if licence == "apache-2.0");
    assert!(bench.events.lock().unwrap().first().is_some_and(told));

    // Where the hub says none, the file may.
    bench.hub.set(|behaviour| behaviour.licence = "null");
    assert_eq!(bench.pull("hf:someone/Tiny-GGUF").await.unwrap().licence.as_deref(), Some("mit"));
    assert_eq!(bench.store().get(&entry.name).unwrap().licence.as_deref(), Some("mit"));
}

#[tokio::test]
async fn a_hub_that_is_to_be_left_alone_is_not_asked() {
    let bench = Bench::new(Behaviour::default()).await;
    let endpoint = bench.config.endpoint().to_owned();
    let offline = HubConfig::from_variables(|name| match name {
        "HF_ENDPOINT" => Some(endpoint.clone().into()),
        "HF_HOME" => Some(bench.home.path().into()),
        "HF_HUB_OFFLINE" => Some("1".into()),
        _ => None,
    });
    let offline = offline.unwrap();
    let error = bench.store().pull(&offline, &"a/b".parse().unwrap(), None, Arc::new(|_| {})).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("HF_HUB_OFFLINE"), "{error}");
    assert!(matches!(search(&offline, "tiny", 10).await, Err(StoreError::HubOffline { .. })));
    assert_eq!(bench.hub.requests.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_web_page_instead_of_data_is_told_as_such() {
    let bench = Bench::new(Behaviour { is_web_page: true, ..Behaviour::default() }).await;
    let error = bench.pull("hf:someone/Tiny-GGUF").await.unwrap_err();
    assert!(error.to_string().contains("a web page instead of data"), "{error}");
    let error = search(&bench.config, "tiny", 10).await.unwrap_err();
    assert!(error.to_string().contains("a web page instead of data"), "{error}");
}

#[tokio::test]
async fn an_overloaded_hub_is_asked_again() {
    let refusals = vec![(StatusCode::TOO_MANY_REQUESTS, vec![("retry-after", "0")]), (StatusCode::BAD_GATEWAY, vec![])];
    let bench = Bench::new(Behaviour { refusals, ..Behaviour::default() }).await;
    bench.pull("hf:someone/Tiny-GGUF").await.unwrap();
}

#[tokio::test]
async fn a_hub_that_serves_the_bytes_itself_works_too() {
    let bench = Bench::new(Behaviour { redirects: false, ..Behaviour::default() }).await;
    bench.pull("hf:someone/Tiny-GGUF").await.unwrap();
}

#[tokio::test]
async fn a_hub_that_cannot_be_reached_is_told_with_its_address() {
    let bench = Bench::new(Behaviour::default()).await;
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let closed = listener.local_addr().unwrap();
    drop(listener);
    let mut config = HubConfig::new(&format!("http://{closed}"), None, bench.home.path().join("hub")).unwrap();
    config.backoff_base = Duration::from_millis(1);
    let error = bench.store().pull(&config, &"a/b".parse().unwrap(), None, Arc::new(|_| {})).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains(&closed.to_string()), "{error}");
}

#[tokio::test]
async fn two_pulls_of_one_file_do_not_write_into_each_other() {
    let bench = Bench::new(Behaviour { stalls: 1, ..Behaviour::default() }).await;
    let (first, second) = tokio::join!(bench.pull("hf:someone/Tiny-GGUF"), bench.pull("hf:someone/Tiny-GGUF"));
    let outcomes = [first, second];
    assert!(outcomes.iter().any(Result::is_ok));
    for refused in outcomes.into_iter().filter_map(Result::err) {
        assert!(matches!(refused, StoreError::PullInProgress { .. }), "{refused}");
    }
}

#[tokio::test]
async fn file_names_that_lead_out_of_the_cache_are_not_offered() {
    let files = vec!["../../evil.gguf", "/etc/evil.gguf", "a/../../evil.gguf"];
    let bench = Bench::new(Behaviour { files, ..Behaviour::default() }).await;
    let error = bench.pull("hf:someone/Tiny-GGUF").await.unwrap_err();
    assert!(error.to_string().contains("no GGUF model"), "{error}");
}

#[tokio::test]
async fn a_download_that_is_no_gguf_file_is_not_added() {
    let bench = Bench::new(Behaviour { content: vec![7; 5000], ..Behaviour::default() }).await;
    assert_eq!(bench.pull("hf:someone/Tiny-GGUF").await.unwrap_err().kind(), ErrorKind::Damaged);
    assert!(bench.store().list().unwrap().is_empty());
}

#[tokio::test]
async fn fsck_reads_what_was_downloaded_and_compares_it_with_what_the_hub_had_announced() {
    let bench = Bench::new(Behaviour::default()).await;
    let (store, entry) = (bench.store(), bench.pull("hf:someone/Tiny-GGUF").await.unwrap());
    let check = || {
        let mut last = (0, 0);
        let mut report = store
            .fsck(&mut |done, total| {
                assert!(last.0 <= done && done <= total, "{last:?} {done} {total}");
                last = (done, total);
            })
            .unwrap();
        assert_eq!((last, report.len()), ((entry.size_bytes, entry.size_bytes), 1));
        report.remove(0)
    };
    let ok = Health::Ok { held_bytes: entry.size_bytes };
    assert_eq!((check().health, check().name), (ok.clone(), Some(entry.name.clone())));

    // One bit, the same length and time.
    let blob = entry.path.canonicalize().unwrap();
    let modified = fs::metadata(&blob).unwrap().modified().unwrap();
    let mut bytes = fs::read(&blob).unwrap();
    bytes[200_000] ^= 1;
    fs::write(&blob, &bytes).unwrap();
    fs::File::options().write(true).open(&blob).unwrap().set_modified(modified).unwrap();
    let Health::Unusable { why } = check().health else { panic!("{:?}", check()) };
    for part in
        [sha256_of(&bytes).as_str(), "murmur models rm tiny-Q4_K_M", "pull hf:someone/Tiny-GGUF:tiny-Q4_K_M.gguf"]
    {
        assert!(why.contains(part), "no {part:?} in: {why}");
    }
    // As it says.
    store.remove(&entry.name).unwrap();
    bench.pull("hf:someone/Tiny-GGUF").await.unwrap();
    assert_eq!(check().health, ok);

    // A file that nodes hand out is checked once, against its digest.
    let digest = store.contents().adopt(&entry.path, &mut |_, _| {}).unwrap().digest();
    assert_eq!(check().digest, Some(digest));
}
