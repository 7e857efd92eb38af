//! Every way a file can be bad has its own clear refusal.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may fail by panicking, in its helpers too")]

mod common;

use std::fs;
use std::path::Path;

use murmur_gguf::{Gguf, GgufErrorKind as Kind};

/// Builds headers by hand, so that they can be wrong.
#[derive(Clone)]
struct Raw(Vec<u8>);

impl Raw {
    fn header(version: u32, tensors: u64, keys: u64) -> Self {
        Self(b"GGUF".to_vec()).u32(version).u64(tensors).u64(keys)
    }
    fn u32(mut self, x: u32) -> Self {
        self.0.extend(x.to_le_bytes());
        self
    }
    fn u64(mut self, x: u64) -> Self {
        self.0.extend(x.to_le_bytes());
        self
    }
    fn text(self, text: &[u8]) -> Self {
        let mut longer = self.u64(text.len() as u64);
        longer.0.extend(text);
        longer
    }
    fn key_u32(self, key: &str, x: u32) -> Self {
        self.text(key.as_bytes()).u32(4).u32(x)
    }
    fn tensor(self, name: &str, dims: &[u64], ty: u32, offset: u64) -> Self {
        let mut raw = self.text(name.as_bytes()).u32(dims.len() as u32);
        for &n in dims {
            raw = raw.u64(n);
        }
        raw.u32(ty).u64(offset)
    }
    fn data(mut self, bytes: usize) -> Self {
        let start = self.0.len().next_multiple_of(32);
        self.0.resize(start + bytes, 0);
        self
    }
    fn open(&self) -> Result<Gguf, Kind> {
        open(&self.0)
    }
}

fn open(bytes: &[u8]) -> Result<Gguf, Kind> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    fs::write(&path, bytes).unwrap();
    Gguf::open(&path).map_err(|error| {
        assert!(error.to_string().contains("model.gguf"), "the message names the file: {error}");
        let from_memory = Gguf::from_reader(bytes, bytes.len() as u64, "model.gguf").unwrap_err();
        assert_eq!(error.kind().to_string(), from_memory.kind().to_string());
        match error.kind() {
            Kind::Malformed(reason) => Kind::Malformed(reason.clone()),
            Kind::Truncated { missing_bytes, while_reading } => {
                Kind::Truncated { missing_bytes: *missing_bytes, while_reading: while_reading.clone() }
            }
            Kind::OverLimit { what, found, limit } => {
                Kind::OverLimit { what: what.clone(), found: *found, limit: *limit }
            }
            Kind::VersionUnknown { version } => Kind::VersionUnknown { version: *version },
            Kind::NotGguf { found } => Kind::NotGguf { found: found.clone() },
            Kind::VersionTooOld => Kind::VersionTooOld,
            Kind::BigEndian => Kind::BigEndian,
            Kind::Empty => Kind::Empty,
            other => panic!("unexpected {other}"),
        }
    })
}

#[track_caller]
fn malformed(raw: Raw, expected: &str) {
    match raw.open() {
        Err(Kind::Malformed(reason)) if reason.contains(expected) => {}
        other => panic!("wanted a refusal that says {expected:?}, got {:?}", other.map(|_| "acceptance")),
    }
}

#[track_caller]
fn over_limit(raw: Raw, expected: &str) {
    match raw.open() {
        Err(Kind::OverLimit { what, .. }) if what.contains(expected) => {}
        other => panic!("wanted a limit on {expected:?}, got {:?}", other.map(|_| "acceptance")),
    }
}

#[test]
fn a_missing_file_a_folder_and_a_pipe_are_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let kind = |path: &Path| Gguf::open(path).unwrap_err().to_string();
    assert!(kind(&folder.path().join("none.gguf")).contains("no such file"));
    assert!(kind(folder.path()).contains("is a directory"));
    assert!(kind(Path::new("/dev/null")).contains("not a regular file"));
}

#[cfg(unix)]
#[test]
fn a_file_without_permission_is_refused_as_such() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    fs::write(&path, common::small_file()).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o000)).unwrap();
    match Gguf::open(&path) {
        Err(error) => assert!(matches!(error.kind(), Kind::PermissionDenied), "{error}"),
        Ok(_) => eprintln!("skipped: this user may read everything"),
    }
}

#[test]
fn an_empty_file_and_a_foreign_file_are_told_apart() {
    assert!(matches!(open(b""), Err(Kind::Empty)));
    assert!(matches!(open(b"<!DOCTYPE html><html>"), Err(Kind::NotGguf { found }) if found.contains("<!DO")));
    assert!(matches!(open(b"PK"), Err(Kind::NotGguf { .. })));
    assert!(matches!(open(b"GG"), Err(Kind::Truncated { missing_bytes: 2, .. })));
}

#[test]
fn versions_other_than_2_and_3_and_the_other_byte_order_are_refused() {
    assert!(Raw::header(3, 0, 0).open().is_ok());
    assert!(Raw::header(2, 0, 0).open().is_ok());
    assert!(matches!(Raw::header(1, 0, 0).open(), Err(Kind::VersionTooOld)));
    assert!(matches!(Raw::header(3u32.swap_bytes(), 0, 0).open(), Err(Kind::BigEndian)));
    assert!(matches!(Raw::header(4, 0, 0).open(), Err(Kind::VersionUnknown { version: 4 })));
    assert!(matches!(Raw::header(0, 0, 0).open(), Err(Kind::VersionUnknown { version: 0 })));
}

#[test]
fn a_file_cut_anywhere_says_how_much_is_missing() {
    let whole = common::small_file();
    let data_end = Gguf::from_reader(whole.as_slice(), whole.len() as u64, "x")
        .unwrap()
        .tensors()
        .iter()
        .map(|t| t.offset + t.bytes)
        .max()
        .unwrap();
    for length in 1..whole.len() {
        let cut = open(&whole[..length]);
        if length as u64 >= data_end {
            assert!(cut.is_ok(), "padding after the last tensor is not needed");
            continue;
        }
        let Err(Kind::Truncated { missing_bytes, .. }) = cut else { panic!("cut at {length}") };
        assert!(missing_bytes > 0 && missing_bytes <= data_end - length as u64);
    }
    // Only data missing: the number is exact.
    let Err(Kind::Truncated { missing_bytes, while_reading }) = open(&whole[..data_end as usize - 7]) else { panic!() };
    assert_eq!((missing_bytes, while_reading.as_str()), (7, "tensor data"));
}

#[test]
fn huge_counts_and_lengths_are_refused_before_anything_is_allocated() {
    over_limit(Raw::header(3, u64::MAX, 0), "number of tensors");
    over_limit(Raw::header(3, 0, u64::MAX), "number of metadata keys");
    over_limit(Raw::header(3, 0, 1).u64(u64::MAX), "length of a metadata key");
    over_limit(Raw::header(3, 0, 1).text(b"k").u32(8).u64(u64::MAX), "value of k");
    over_limit(Raw::header(3, 0, 1).text(b"k").u32(9).u32(4).u64(u64::MAX), "number of elements of k");
    over_limit(Raw::header(3, 1, 0).u64(64), "length of a tensor name");
    // Within limits, but more than the file holds.
    for raw in [
        Raw::header(3, 0, 1).text(b"k").u32(8).u64(1 << 20),
        Raw::header(3, 0, 1).text(b"k").u32(9).u32(10).u64(1 << 20),
        Raw::header(3, 0, 1).text(b"k").u32(9).u32(8).u64(1 << 20),
        Raw::header(3, 5, 0),
        Raw::header(3, 0, 5),
    ] {
        assert!(matches!(raw.open(), Err(Kind::Truncated { .. })));
    }
}

#[test]
fn keys_and_values_that_break_the_format_are_refused() {
    malformed(Raw::header(3, 0, 2).key_u32("k", 1).key_u32("k", 2), "\"k\" appears twice");
    malformed(Raw::header(3, 0, 1).key_u32("", 1), "key is empty");
    malformed(Raw::header(3, 0, 1).key_u32("a\0b", 1), "zero byte");
    malformed(Raw::header(3, 0, 1).text(&[0xff]).u32(4).u32(1), "UTF-8");
    malformed(Raw::header(3, 0, 1).text(b"k").u32(8).text(&[0xff]), "UTF-8");
    malformed(Raw::header(3, 0, 1).text(b"k").u32(13), "unknown value type 13");
    malformed(Raw::header(3, 0, 1).text(b"k").u32(9).u32(13).u64(0), "unknown element type 13");
    malformed(Raw::header(3, 0, 1).text(b"k").u32(9).u32(9).u64(1).u32(4).u64(0), "array of arrays");
    let mut bool_of_two = Raw::header(3, 0, 1).text(b"k").u32(7);
    bool_of_two.0.push(2);
    malformed(bool_of_two, "false (0) or true (1)");
}

#[test]
fn alignments_that_are_no_power_of_two_or_too_large_are_refused() {
    for (alignment, ok) in [
        (1, true),
        (32, true),
        (65_536, true),
        (0, false),
        (3, false),
        (48, false),
        (131_072, false),
        (u32::MAX, false),
    ] {
        let opened = Raw::header(3, 0, 1).key_u32("general.alignment", alignment).open();
        assert_eq!(opened.is_ok(), ok, "{alignment}");
    }
    malformed(Raw::header(3, 0, 1).text(b"general.alignment").u32(8).text(b"32"), "32-bit unsigned");
}

#[test]
fn tensors_that_break_the_format_are_refused() {
    let one = |dims: &[u64], ty, offset| Raw::header(3, 1, 0).tensor("t", dims, ty, offset).data(4096);
    assert!(one(&[4], 0, 0).open().is_ok());
    malformed(one(&[], 0, 0), "0 dimensions");
    malformed(one(&[1, 1, 1, 1, 1], 0, 0), "5 dimensions");
    malformed(one(&[4, 0], 0, 0), "dimension of zero");
    malformed(one(&[1 << 40, 1 << 40], 0, 0), "impossibly large");
    malformed(one(&[u64::MAX], 0, 0), "impossibly large");
    malformed(one(&[1 << 62, 2, 2, 2], 24, 0), "impossibly large");
    malformed(one(&[4], 4, 0), "unknown type 4");
    malformed(one(&[4], 43, 0), "unknown type 43");
    malformed(one(&[33], 8, 0), "not whole Q8_0 blocks");
    malformed(one(&[128], 12, 0), "not whole Q4_K blocks");
    malformed(one(&[4], 0, 7), "not aligned");
    malformed(one(&[4], 0, u64::MAX - 31), "does not fit in 64 bits");
    malformed(Raw::header(3, 1, 0).tensor("", &[4], 0, 0).data(64), "not usable");
    malformed(Raw::header(3, 1, 0).tensor("a\0", &[4], 0, 0).data(64), "not usable");
    malformed(Raw::header(3, 2, 0).tensor("t", &[4], 0, 0).tensor("t", &[4], 0, 32).data(64), "\"t\" appears twice");
    malformed(Raw::header(3, 2, 0).tensor("a", &[16], 0, 0).tensor("b", &[4], 0, 32).data(96), "overlap");
    malformed(Raw::header(3, 2, 0).tensor("a", &[4], 0, 0).tensor("b", &[4], 0, 0).data(96), "overlap");
    assert!(matches!(one(&[4], 0, 1 << 20).open(), Err(Kind::Truncated { .. })));
}
