//! Models that come from peers in the store: names, checks, pins and the quota.

#![allow(clippy::unwrap_used, reason = "helpers of tests, too, end the test when something is off")]

use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use murmur_gguf::{
    Digest,
    manifest::ByteRange,
    synth::{self, Spec},
};
use murmur_store::{
    Checked, Content, Contents, ErrorKind, GROUP_BYTES, Health, ImportOptions, ModelName, Origin, Store, StoreError,
};

const ALL: &[ByteRange] = &[ByteRange { start: 0, end: u64::MAX }];

fn name(text: &str) -> ModelName {
    text.parse().unwrap()
}

/// A small model; another seed is another.
fn model(file: &Path, seed: u64) {
    let mut spec = Spec::tiny("llama").unwrap().with_layers(1).with_seed(seed);
    spec.facts.vocabulary = 300;
    synth::write(&spec, file).unwrap();
}

/// A whole model that a peer has.
fn peer(folder: &Path, seed: u64) -> Content {
    let file = folder.join(format!("peer-{seed}.gguf"));
    model(&file, seed);
    Contents::at(&folder.join("peer")).adopt(&file, &mut |_, _| {}).unwrap()
}

fn fetch(peer: &Content, store: &Store, ranges: &[ByteRange]) -> Content {
    let content = store.contents().create(peer.digest(), peer.bytes()).unwrap();
    let mut encoded = Vec::new();
    peer.encode(ranges, &mut encoded).unwrap();
    content.decode(ranges, &mut encoded.as_slice(), &mut |_| {}).unwrap();
    content.flush().unwrap();
    content
}

fn check(store: &Store) -> Vec<Checked> {
    let mut last = (0, 0);
    let report = store
        .fsck(&mut |done, total| {
            assert!(last.0 <= done && done <= total, "{last:?} {done} {total}");
            last = (done, total);
        })
        .unwrap();
    assert_eq!(last.0, last.1);
    report
}

fn health(store: &Store, of: &str) -> Health {
    let mut report = check(store);
    report.retain(|checked| checked.name == Some(name(of)));
    assert_eq!(report.len(), 1, "{report:?}");
    report.remove(0).health
}

fn flip(path: &Path, at: u64) {
    let modified = fs::metadata(path).unwrap().modified().unwrap();
    let mut bytes = fs::read(path).unwrap();
    bytes[at as usize] ^= 1;
    fs::write(path, bytes).unwrap();
    fs::File::options().write(true).open(path).unwrap().set_modified(modified).unwrap();
}

#[test]
fn a_model_from_the_mesh_is_usable_when_it_is_whole() {
    let home = tempfile::tempdir().unwrap();
    let (store, peer) = (Store::at(home.path()), peer(home.path(), 1));
    let part = fetch(&peer, &store, &[ByteRange { start: 0, end: 3 * GROUP_BYTES }]);
    let entry = store.add_content(name("m"), &part, None).unwrap();
    assert_eq!(entry.origin, Origin::Mesh { digest: peer.digest() });
    assert_eq!(store.list().unwrap(), std::slice::from_ref(&entry));
    let error = store.resolve(&"m".parse().unwrap()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    let says = error.to_string();
    assert!(says.contains("48.0 KiB of") && says.contains("murmur models pull m"), "{says}");

    let whole = fetch(&peer, &store, ALL);
    store.add_content(name("m"), &whole, None).unwrap();
    let resolved = store.resolve(&"m".parse().unwrap()).unwrap();
    assert_eq!((&resolved.path, resolved.name), (&entry.path, name("m")));
    assert!(fs::read(&resolved.path).unwrap() == fs::read(peer.path()).unwrap());

    // Another name for the same content keeps it.
    store.add_content(name("n"), &whole, None).unwrap();
    assert_eq!(store.remove(&name("m")).unwrap().freed_bytes, 0);
    assert!(store.resolve(&"n".parse().unwrap()).is_ok());
    assert_eq!(store.remove(&name("n")).unwrap().freed_bytes, peer.bytes());
    assert!(store.contents().list().unwrap().is_empty() && !resolved.path.exists());
}

#[test]
fn a_file_that_is_here_is_found_by_its_digest_and_has_the_name_that_it_has_here() {
    let home = tempfile::tempdir().unwrap();
    let (store, peer) = (Store::at(home.path()), peer(home.path(), 1));
    let digest = peer.digest().to_string();
    let by_digest = || store.resolve(&digest.parse().unwrap());
    assert!(matches!(by_digest(), Err(StoreError::NoSuchModel { .. })));
    // A part is told as one, with what it takes to go on with just this file.
    fetch(&peer, &store, &[ByteRange { start: 0, end: GROUP_BYTES }]);
    let says = by_digest().unwrap_err().to_string();
    assert!(says.contains("16.0 KiB of") && says.contains(&format!("murmur models pull {digest}")), "{says}");
    assert_eq!(store.find_whole(&name(&digest)).unwrap(), None);

    let whole = fetch(&peer, &store, ALL);
    let nameless = by_digest().unwrap();
    assert_eq!((nameless.name, nameless.path.as_path()), (name(&digest), whole.path()));
    let entry = store.add_content(name("m"), &whole, None).unwrap();
    assert_eq!(by_digest().unwrap().name, name("m"));
    assert_eq!(store.find_whole(&name(&digest)).unwrap(), Some(entry));
    store.remove(&name("m")).unwrap();
    drop(whole);

    // A file of the user's, once it has been read through.
    store.contents().adopt(peer.path(), &mut |_, _| {}).unwrap();
    assert_eq!(by_digest().unwrap().name, name("peer-1"));
    let imported = ImportOptions { name: Some(name("own")), copy: false };
    let entry = store.import(peer.path(), &imported).unwrap();
    let found = by_digest().unwrap();
    assert_eq!((found.name, found.path.as_path()), (name("own"), peer.path()));
    assert_eq!(store.find_whole(&name(&digest)).unwrap(), Some(entry));
    // Changed, it is another one.
    model(peer.path(), 2);
    assert!(matches!(by_digest(), Err(StoreError::NoSuchModel { .. })));
}

#[test]
fn what_arrives_is_not_removed_under_the_hands_of_who_fetches_it() {
    struct Removing<'a>(&'a Store, &'a [u8]);
    impl Read for Removing<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            let error = self.0.remove(&name("m")).unwrap_err();
            assert!(matches!(error, StoreError::ContentInUse { .. }), "{error}");
            assert!(self.0.collect(0).unwrap().removed.is_empty());
            self.1.read(buffer)
        }
    }
    let home = tempfile::tempdir().unwrap();
    let (store, peer) = (Store::at(home.path()), peer(home.path(), 1));
    let content = fetch(&peer, &store, &[ByteRange { start: 0, end: 1 }]);
    store.add_content(name("m"), &content, None).unwrap();
    let mut encoded = Vec::new();
    peer.encode(ALL, &mut encoded).unwrap();
    content.decode(ALL, &mut Removing(&store, &encoded), &mut |_| {}).unwrap();
    assert!(content.is_complete());
    assert_eq!(store.remove(&name("m")).unwrap().freed_bytes, peer.bytes());
}

#[test]
fn a_whole_content_that_is_no_model_gets_no_name() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("text.gguf");
    fs::write(&file, "hello").unwrap();
    let store = Store::at(home.path());
    let content = store.contents().adopt(&file, &mut |_, _| {}).unwrap();
    assert_eq!(store.add_content(name("m"), &content, None).unwrap_err().kind(), ErrorKind::Damaged);
    assert!(store.list().unwrap().is_empty());
}

#[test]
fn an_index_from_before_contents_is_read_and_a_pin_outlives_the_next_import() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("old.gguf");
    model(&file, 1);
    let store = Store::at(home.path());
    store.import(&file, &ImportOptions::default()).unwrap();
    let index = home.path().join("models/index.json");
    let old = fs::read_to_string(&index).unwrap().replace("\"version\": 2", "\"version\": 1");
    let old = old.lines().filter(|line| !line.contains("pinned")).collect::<Vec<_>>().join("\n");
    fs::write(&index, old.replace("},\n    }", "}\n    }")).unwrap();

    assert!(!store.get(&name("old")).unwrap().pinned);
    assert!(store.pin(&name("old")).unwrap().pinned);
    store.import(&file, &ImportOptions::default()).unwrap();
    assert!(store.get(&name("old")).unwrap().pinned);
    assert!(!store.unpin(&name("old")).unwrap().pinned);
    assert_eq!(store.pin(&name("absent")).unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn fsck_finds_what_is_damaged_and_it_is_fetched_again() {
    let home = tempfile::tempdir().unwrap();
    let (store, peer) = (Store::at(&home.path().join("data")), peer(home.path(), 1));
    let content = fetch(&peer, &store, ALL);
    store.add_content(name("m"), &content, None).unwrap();
    let path = content.path().to_owned();
    let whole = Health::Ok { held_bytes: peer.bytes() };
    assert_eq!(health(&store, "m"), whole);

    // A damaged tree of a whole file is made anew.
    flip(&path.with_file_name("tree"), 70);
    assert_eq!(health(&store, "m"), whole);
    let mut encoded = Vec::new();
    content.encode(ALL, &mut encoded).unwrap();

    flip(&path, 2 * GROUP_BYTES + 5);
    flip(&path, 4 * GROUP_BYTES);
    let group = |n: u64| ByteRange { start: n * GROUP_BYTES, end: (n + 1) * GROUP_BYTES };
    assert_eq!(health(&store, "m"), Health::Damaged { ranges: vec![group(2), group(4)] });
    drop(content);
    assert!(matches!(store.resolve(&"m".parse().unwrap()), Err(StoreError::Incomplete { .. })));
    assert_eq!(health(&store, "m"), Health::Ok { held_bytes: peer.bytes() - 2 * GROUP_BYTES });
    let content = store.contents().find(&peer.digest()).unwrap().unwrap();
    assert_eq!(content.missing(ALL), [group(2), group(4)]);
    fetch(&peer, &store, &content.missing(ALL));
    assert_eq!(health(&store, "m"), whole);
    assert!(fs::read(&path).unwrap() == fs::read(peer.path()).unwrap());

    store.contents().remove(&peer.digest()).unwrap();
    assert_eq!(health(&store, "m"), Health::Missing);
}

#[test]
fn fsck_looks_at_the_users_files_and_changes_none() {
    let home = tempfile::tempdir().unwrap();
    let store = Store::at(&home.path().join("data"));
    let import = |n: u64| -> PathBuf {
        let file = home.path().join(format!("m{n}.gguf"));
        model(&file, n);
        store.import(&file, &ImportOptions::default()).unwrap();
        file
    };
    let (read, unread, gone, cut) = (import(1), import(2), import(3), import(4));
    let digest = store.contents().adopt(&read, &mut |_, _| {}).unwrap().digest();
    assert!(check(&store).iter().all(|checked| matches!(checked.health, Health::Ok { .. })));
    assert_eq!(check(&store).len(), 4);

    flip(&read, 3 * GROUP_BYTES);
    flip(&unread, 3 * GROUP_BYTES);
    fs::remove_file(&gone).unwrap();
    fs::write(&cut, &fs::read(&cut).unwrap()[..1000]).unwrap();
    let was = fs::read(&read).unwrap();
    let report = check(&store);
    let health = |of: &str| &report.iter().find(|checked| checked.name == Some(name(of))).unwrap().health;
    assert!(matches!(health("m1"), Health::Damaged { ranges } if ranges[0].start == 3 * GROUP_BYTES));
    assert!(matches!(health("m2"), Health::Ok { .. }), "nobody knows what its bytes should be");
    assert_eq!(health("m3"), &Health::Missing);
    assert!(matches!(health("m4"), Health::Unusable { .. }));
    assert!(fs::read(&read).unwrap() == was);
    assert!(store.contents().find(&digest).unwrap().is_none(), "what is damaged is not served");
}

#[test]
fn the_quota_takes_parts_first_and_then_what_was_not_used_for_longest() {
    let home = tempfile::tempdir().unwrap();
    let store = Store::at(&home.path().join("data"));
    let peers: Vec<Content> = (0..6).map(|seed| peer(home.path(), seed)).collect();
    let bytes = peers[0].bytes();
    let part = [ByteRange { start: 0, end: 2 * GROUP_BYTES }];
    // By age: 0 is pinned, 1 in use, 2 and 3 are free, 4 is a part, and 5 the user's own file.
    let mut ages = Vec::new();
    for (n, peer) in peers.iter().enumerate().take(5) {
        let content = fetch(peer, &store, if n == 4 { &part } else { ALL });
        store.add_content(name(&format!("m{n}")), &content, None).unwrap();
        ages.push(content.path().with_file_name("state"));
    }
    store.pin(&name("m0")).unwrap();
    store.contents().adopt(peers[5].path(), &mut |_, _| {}).unwrap();
    for (n, state) in ages.iter().enumerate() {
        let used = SystemTime::now() - Duration::from_secs(1000 - n as u64);
        fs::File::options().write(true).open(state).unwrap().set_modified(used).unwrap();
    }
    let used = store.contents().find(&peers[1].digest()).unwrap().unwrap();
    let _held = used.hold().unwrap();
    let collect = |quota_bytes| {
        let collected = store.collect(quota_bytes).unwrap();
        let removed: Vec<Digest> = collected.removed.iter().filter_map(|download| download.digest).collect();
        (removed, collected.freed_bytes, collected.left_bytes)
    };
    let part_bytes = 2 * GROUP_BYTES;
    assert_eq!(collect(4 * bytes + part_bytes), (vec![], 0, 4 * bytes + part_bytes));
    assert_eq!(collect(4 * bytes), (vec![peers[4].digest()], part_bytes, 4 * bytes));
    assert_eq!(collect(4 * bytes - 1), (vec![peers[2].digest()], bytes, 3 * bytes));
    assert_eq!(collect(0), (vec![peers[3].digest()], bytes, 2 * bytes));
    assert_eq!(collect(0), (vec![], 0, 2 * bytes));
    assert_eq!(store.contents().list().unwrap().len(), 3);
    // The names stay, and say how to go on.
    let error = store.resolve(&"m2".parse().unwrap()).unwrap_err();
    assert!(error.to_string().contains("0 bytes of") && error.to_string().contains("pull m2"), "{error}");
}

#[test]
fn a_clock_that_jumps_damages_nothing_and_what_is_pinned_or_in_use_stays() {
    let home = tempfile::tempdir().unwrap();
    let store = Store::at(&home.path().join("data"));
    let peers: Vec<Content> = (0..4).map(|seed| peer(home.path(), seed)).collect();
    let bytes = peers[0].bytes();
    // Used a century from now, in the year 1970, and now; the first is pinned, and the second in use.
    let century = Duration::from_secs(100 * 365 * 24 * 3600);
    let times = [SystemTime::now() + century, SystemTime::UNIX_EPOCH, SystemTime::now() + century, SystemTime::now()];
    for (n, (peer, used)) in peers.iter().zip(times).enumerate() {
        let content = fetch(peer, &store, ALL);
        store.add_content(name(&format!("m{n}")), &content, None).unwrap();
        let state = fs::File::options().write(true).open(content.path().with_file_name("state")).unwrap();
        state.set_modified(used).unwrap();
    }
    store.pin(&name("m0")).unwrap();
    let used = store.contents().find(&peers[1].digest()).unwrap().unwrap();
    let _held = used.hold().unwrap();
    let collected = store.collect(3 * bytes).unwrap();
    assert_eq!(collected.removed.iter().filter_map(|gone| gone.digest).collect::<Vec<_>>(), [peers[3].digest()]);
    let collected = store.collect(0).unwrap();
    assert_eq!((collected.removed.len(), collected.left_bytes), (1, 2 * bytes));
    for of in ["m0", "m1"] {
        assert_eq!(health(&store, of), Health::Ok { held_bytes: bytes });
    }
}
