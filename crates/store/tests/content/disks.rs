//! Disks that are full or read-only, as file systems of their own.
#![cfg(target_os = "linux")]

use std::{fs, path::Path, process::Command};

use murmur_store::{Contents, DecodeError, ErrorKind, GROUP_BYTES, StoreError};

use super::{ALL, again, assert_right, encoding, fetch, folder_of_child, noise, source};

const MOUNT_AND_RUN: &str = r#"mount -t tmpfs -o size=2m none "$MURMUR_TEST_FOLDER/disk" || exit 77; exec "$@""#;

/// Runs this test again where `folder/disk` is a small disk that it may mount otherwise; `None` where the system does not allow that.
fn on_a_small_disk(test: &str) -> Option<()> {
    let home = tempfile::tempdir().unwrap();
    fs::create_dir(home.path().join("disk")).unwrap();
    let child = again(test, home.path());
    let output = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "sh", "-c", MOUNT_AND_RUN, "sh"])
        .arg(child.get_program())
        .args(child.get_args())
        .env("MURMUR_TEST_FOLDER", home.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.code() == Some(77) || said.starts_with("unshare: ") {
        eprintln!("skipped: this system allows no file systems of one's own: {said}");
        return None;
    }
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stdout));
    Some(())
}

fn remount(disk: &Path, options: &str) {
    let status = Command::new("mount").args(["-o", &format!("remount,{options}")]).arg(disk).status().unwrap();
    assert!(status.success(), "{options}");
}

fn is_full(error: &StoreError) -> bool {
    error.kind() == ErrorKind::NoSpace
        && error.to_string().contains("no space in")
        && error.to_string().contains("--data-dir")
}

#[test]
fn a_full_disk_is_named_and_with_room_again_the_rest_arrives() {
    let Some(folder) = folder_of_child() else {
        on_a_small_disk("disks::a_full_disk_is_named_and_with_room_again_the_rest_arrives");
        return;
    };
    let (disk, source) = (folder.join("disk"), source(&folder, 300 * GROUP_BYTES));
    let contents = Contents::at(&disk);

    // Full from the beginning.
    fs::write(disk.join("filler"), noise(3 << 20)).unwrap_err();
    let error = contents.create(source.digest(), source.bytes()).unwrap_err();
    assert!(is_full(&error), "{error}");
    fs::remove_file(disk.join("filler")).unwrap();

    // Full in the middle, again and again.
    let content = contents.create(source.digest(), source.bytes()).unwrap();
    for _ in 0..3 {
        match fetch(&source, &content, &content.missing(ALL)) {
            Err(DecodeError::Store(error)) => assert!(is_full(&error), "{error}"),
            other => panic!("{other:?}"),
        }
        assert!(content.held_bytes() > 100 * GROUP_BYTES && !content.is_complete());
        assert_right(&content, &noise(source.bytes()));
    }
    let held = content.held();
    drop(content);
    remount(&disk, "size=16m");
    let content = contents.find(&source.digest()).unwrap().unwrap();
    assert_eq!(content.held(), held);
    fetch(&source, &content, &content.missing(ALL)).unwrap();
    assert!(fs::read(content.path()).unwrap() == noise(source.bytes()));
}

#[test]
fn a_read_only_disk_serves_and_says_why_it_takes_nothing() {
    let Some(folder) = folder_of_child() else {
        on_a_small_disk("disks::a_read_only_disk_serves_and_says_why_it_takes_nothing");
        return;
    };
    let (disk, source) = (folder.join("disk"), source(&folder, 50 * GROUP_BYTES));
    let contents = Contents::at(&disk);
    let content = contents.create(source.digest(), source.bytes()).unwrap();
    fetch(&source, &content, &[super::groups(0..9)]).unwrap();
    drop(content);
    remount(&disk, "ro");
    let content = contents.find(&source.digest()).unwrap().unwrap();
    assert_eq!(contents.list().unwrap().len(), 1);
    encoding(&content, &content.held());
    let refused = |error: StoreError| {
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert!(error.to_string().contains("read-only"), "{error}");
    };
    match fetch(&source, &content, ALL) {
        Err(DecodeError::Store(error)) => refused(error),
        other => panic!("{other:?}"),
    }
    refused(content.forget(ALL).unwrap_err());
    refused(contents.remove(&source.digest()).unwrap_err());
    refused(contents.create(murmur_gguf::Digest([1; 32]), 5).unwrap_err());
    refused(contents.adopt(&folder.join("original.gguf"), &mut |_, _| {}).map(drop).unwrap_err());
    assert_eq!(content.held(), [super::groups(0..9)]);
}
