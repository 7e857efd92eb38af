//! On a file system whose files can share blocks, a slice takes hardly any room beside the file that it was cut from.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may fail by panicking, in its helpers too")]

use std::{
    env, fs,
    fs::File,
    path::Path,
    process::{Command, Output},
};

use murmur_gguf::{
    Gguf, LayerRange, slice,
    synth::{self, Spec},
};

/// Where the disk is, in the process that has one.
const DISK: &str = "MURMUR_TEST_DISK";
/// XFS wants 300 MB; hardly any of them are used.
const DISK_BYTES: u64 = 512 << 20;
const MOUNT_AND_RUN: &str = r#"mount -o loop "$MURMUR_TEST_DISK.image" "$MURMUR_TEST_DISK" || exit 77; exec "$@""#;
const TEST: &str = "a_slice_shares_its_blocks_with_the_file_that_it_was_cut_from";

/// Bytes that are in use on a disk.
fn used_bytes(disk: &Path) -> u64 {
    assert!(Command::new("sync").status().unwrap().success());
    let Output { stdout, .. } =
        Command::new("df").args(["--block-size=1", "--output=used"]).arg(disk).output().unwrap();
    String::from_utf8(stdout).unwrap().lines().last().unwrap().trim().parse().unwrap()
}

/// Runs the test again where a disk of its own is mounted; false where the system does not allow that.
fn again_on_a_disk() -> bool {
    let folder = tempfile::tempdir().unwrap();
    let (disk, image) = (folder.path().join("disk"), folder.path().join("disk.image"));
    fs::create_dir(&disk).unwrap();
    File::create(&image).unwrap().set_len(DISK_BYTES).unwrap();
    let made = Command::new("mkfs.xfs").args(["-q", "-m", "reflink=1"]).arg(&image).output();
    if !made.as_ref().is_ok_and(|made| made.status.success()) {
        eprintln!("skipped: mkfs.xfs makes no file system here: {made:?}");
        return false;
    }
    let child = Command::new("unshare")
        .args(["--mount", "sh", "-c", MOUNT_AND_RUN, "sh"])
        .arg(env::current_exe().unwrap())
        .args([TEST, "--exact", "--nocapture"])
        .env(DISK, &disk)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stderr);
    if child.status.code() == Some(77) || said.starts_with("unshare: ") {
        eprintln!("skipped: this system allows no file systems of one's own: {said}");
        return false;
    }
    assert!(child.status.success(), "{said}{}", String::from_utf8_lossy(&child.stdout));
    true
}

#[test]
fn a_slice_shares_its_blocks_with_the_file_that_it_was_cut_from() {
    let Some(disk) = env::var_os(DISK) else {
        again_on_a_disk();
        return;
    };
    let disk = Path::new(&disk);
    let whole = disk.join("whole.gguf");
    synth::write(&Spec::tiny("llama").unwrap(), &whole).unwrap();
    let gguf = Gguf::open(&whole).unwrap();
    let (before, part) = (used_bytes(disk), disk.join("part.gguf"));
    slice(&gguf, LayerRange::new(2, 6), &part).unwrap();
    let (took, bytes) = (used_bytes(disk) - before, fs::metadata(&part).unwrap().len());
    println!("a slice of {bytes} bytes takes {took}");
    assert!(bytes > 4 << 20 && took * 10 < bytes, "a slice of {bytes} bytes takes {took}");
}
