//! Two processes and one store: what one uses, the other does not remove to make room.

use std::{
    io::{BufRead, BufReader, Write},
    path::Path,
    process::Stdio,
};

use murmur_store::{ErrorKind, Stays, Store};

use super::{ALL, GROUP_BYTES, again, fetch, folder_of_child, source, target};

const TEST: &str = "held::what_another_process_holds_stays_until_that_ends_however_it_ends";

/// Holds the content and says so, until it is killed.
fn hold_and_tell(folder: &Path) -> ! {
    let content = target(folder, &source(folder, BYTES));
    let _held = content.hold().unwrap();
    std::io::stderr().write_all(b"\nholds it\n").unwrap();
    loop {
        std::thread::park();
    }
}

const BYTES: u64 = 20 * GROUP_BYTES;

#[test]
fn what_another_process_holds_stays_until_that_ends_however_it_ends() {
    if let Some(folder) = folder_of_child() {
        hold_and_tell(&folder);
    }
    let home = tempfile::tempdir().unwrap();
    let source = source(home.path(), BYTES);
    let content = target(home.path(), &source);
    fetch(&source, &content, ALL).unwrap();
    let store = Store::at(&home.path().join("target"));
    store.set_quota(Some(BYTES)).unwrap();
    let stays = || store.downloads().unwrap()[0].stays;
    assert_eq!(stays(), None, "a handle alone holds nothing");

    let mut child = again(TEST, home.path()).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let mut said = BufReader::new(child.stderr.take().unwrap()).lines();
    assert!(said.any(|line| line.unwrap() == "holds it"));
    assert_eq!(stays(), Some(Stays::InUse));
    assert!(store.collect(0).unwrap().removed.is_empty());
    let error = store.make_room(1).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    let says = error.to_string();
    assert!(says.contains("pinned or in use") && says.contains("320.0 KiB"), "{says}");
    assert!(content.is_there());

    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(store.make_room(1).unwrap().freed_bytes, BYTES);
    assert!(!content.is_there());
}
