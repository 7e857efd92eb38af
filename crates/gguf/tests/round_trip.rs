//! What is written is read back, and what cannot be written leaves nothing behind.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may fail by panicking, in its helpers too")]

mod common;

use std::fs;
use std::io::{self, Write};

use murmur_gguf::{Array, Gguf, GgufBuilder, StringArray, TensorSource, TensorType, Value, WriteError};
use proptest::prelude::*;

fn value() -> impl Strategy<Value = Value> {
    let text = prop::collection::vec(any::<u8>(), 0..20);
    prop_oneof![
        any::<u8>().prop_map(Value::U8),
        any::<i8>().prop_map(Value::I8),
        any::<u16>().prop_map(Value::U16),
        any::<i16>().prop_map(Value::I16),
        any::<u32>().prop_map(Value::U32),
        any::<i32>().prop_map(Value::I32),
        (-1e9f32..1e9).prop_map(Value::F32),
        any::<bool>().prop_map(Value::Bool),
        ".{0,30}".prop_map(Value::Str),
        any::<u64>().prop_map(Value::U64),
        any::<i64>().prop_map(Value::I64),
        (-1e9f64..1e9).prop_map(Value::F64),
        prop::collection::vec(any::<i16>(), 0..9).prop_map(|v| Value::Array(Array::I16(v))),
        prop::collection::vec(any::<u64>(), 0..9).prop_map(|v| Value::Array(Array::U64(v))),
        prop::collection::vec(any::<bool>(), 0..9).prop_map(|v| Value::Array(Array::Bool(v))),
        prop::collection::vec(-1e9f32..1e9, 0..9).prop_map(|v| Value::Array(Array::F32(v))),
        prop::collection::vec(text, 0..9)
            .prop_map(|v| Value::Array(Array::Str(v.into_iter().collect::<StringArray>()))),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn keys_and_tensors_survive_writing_and_reading(
        keys in prop::collection::btree_map("[a-z.]{1,20}", value(), 0..12),
        tensors in prop::collection::btree_map("[a-z]{1,20}", prop::collection::vec(any::<f32>(), 1..50), 0..6),
        alignment in prop::sample::select(vec![1u32, 8, 32, 256]),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.gguf");
        let mut builder = GgufBuilder::new("llama");
        builder.set("general.alignment", alignment);
        for (key, value) in &keys {
            builder.set(key.as_str(), value.clone());
        }
        for (name, data) in &tensors {
            builder.tensor_f32(name.as_str(), &[data.len() as u64], data).unwrap();
        }
        let written = builder.write(&path).unwrap();
        let gguf = Gguf::open(&path).unwrap();
        prop_assert_eq!(written, gguf.file_bytes());
        prop_assert_eq!(gguf.alignment(), alignment);
        prop_assert_eq!(gguf.architecture(), "llama");
        for (key, value) in &keys {
            prop_assert_eq!(gguf.get(key), Some(value));
        }
        prop_assert_eq!(gguf.tensors().len(), tensors.len());
        for (name, data) in &tensors {
            let bytes = gguf.read_tensor(gguf.tensor(name).unwrap()).unwrap();
            prop_assert_eq!(bytes, data.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>());
        }
    }
}

#[test]
fn every_source_of_data_ends_up_in_its_tensor() {
    let folder = tempfile::tempdir().unwrap();
    let other = folder.path().join("other");
    fs::write(&other, [9u8; 100]).unwrap();
    let path = folder.path().join("out.gguf");
    let mut builder = GgufBuilder::new("x");
    let file = std::sync::Arc::new(fs::File::open(&other).unwrap());
    builder.tensor("a", &[3], TensorType::I8, TensorSource::Bytes(vec![1, 2, 3].into())).unwrap();
    builder.tensor("b", &[4], TensorType::I8, TensorSource::Zeros).unwrap();
    builder.tensor("c", &[5], TensorType::I8, TensorSource::FileRange { file, offset: 95 }).unwrap();
    builder
        .tensor("d", &[6], TensorType::I8, TensorSource::Generate(Box::new(|out| out.write_all(b"sixsix"))))
        .unwrap();
    builder.write(&path).unwrap();
    let gguf = Gguf::open(&path).unwrap();
    let read = |name| gguf.read_tensor(gguf.tensor(name).unwrap()).unwrap();
    assert_eq!(
        (read("a"), read("b"), read("c"), read("d")),
        (vec![1, 2, 3], vec![0; 4], vec![9; 5], b"sixsix".to_vec())
    );
}

/// Writes one tensor of 10 bytes with this generator, over an existing file.
fn write_failing(generate: impl FnMut(&mut dyn Write) -> io::Result<()> + 'static) -> WriteError {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.gguf");
    fs::write(&path, b"what was there before").unwrap();
    let mut builder = GgufBuilder::new("x");
    builder.tensor("t", &[10], TensorType::I8, TensorSource::Generate(Box::new(generate))).unwrap();
    let error = builder.write(&path).unwrap_err();
    assert_eq!(fs::read(&path).unwrap(), b"what was there before");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "the temporary file is gone");
    error
}

#[test]
fn a_full_disk_is_said_plainly_and_leaves_no_temporary_file() {
    let error = write_failing(|_| Err(io::ErrorKind::StorageFull.into()));
    assert!(matches!(error, WriteError::DiskFull { .. }), "{error}");
    assert!(error.to_string().contains("disk is full"));
}

/// Runs again in a child process that may write 64 KiB at most, and whose system calls fail instead of killing it.
#[cfg(target_os = "linux")]
#[test]
fn a_write_that_the_system_cuts_off_leaves_no_temporary_file() {
    const NAME: &str = "a_write_that_the_system_cuts_off_leaves_no_temporary_file";
    const FOLDER: &str = "MURMUR_TEST_FOLDER";
    if let Ok(folder) = std::env::var(FOLDER) {
        let mut builder = GgufBuilder::new("x");
        let endless = |out: &mut dyn Write| (0..256).try_for_each(|_| out.write_all(&[1; 4096]));
        builder.tensor("t", &[1 << 20], TensorType::I8, TensorSource::Generate(Box::new(endless))).unwrap();
        let error = builder.write(std::path::Path::new(&folder).join("out.gguf")).unwrap_err();
        assert!(matches!(error, WriteError::FileTooLarge { .. }), "{error}");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let limited = format!("trap '' XFSZ; ulimit -f 64; exec \"$0\" --exact {NAME} --nocapture");
    let child = std::process::Command::new("sh")
        .arg("-c")
        .arg(limited)
        .arg(std::env::current_exe().unwrap())
        .env(FOLDER, folder.path())
        .output();
    let child = child.unwrap();
    assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stderr));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn generators_that_write_too_little_or_too_much_are_caught() {
    assert!(write_failing(|out| out.write_all(&[0; 9])).to_string().contains("too few"));
    assert!(write_failing(|out| out.write_all(&[0; 11])).to_string().contains("too many"));
}

#[test]
fn a_folder_that_does_not_exist_is_an_error_with_the_path() {
    let error = GgufBuilder::new("x").write("/nonexistent/folder/out.gguf").unwrap_err();
    assert!(error.to_string().contains("/nonexistent/folder/out.gguf"), "{error}");
}

#[test]
fn tensors_that_cannot_stand_in_a_file_are_refused() {
    let mut builder = GgufBuilder::new("x");
    let bytes = |n: usize| TensorSource::Bytes(vec![0; n].into());
    assert!(builder.tensor("t", &[33], TensorType::Q8_0, TensorSource::Zeros).is_err());
    assert!(builder.tensor("t", &[0], TensorType::F32, TensorSource::Zeros).is_err());
    assert!(builder.tensor("t", &[], TensorType::F32, TensorSource::Zeros).is_err());
    assert!(builder.tensor("t", &[1; 5], TensorType::F32, TensorSource::Zeros).is_err());
    assert!(builder.tensor("t", &[2], TensorType::F32, bytes(7)).is_err());
    assert!(builder.tensor("t".repeat(64), &[2], TensorType::F32, bytes(8)).is_err());
    assert!(builder.tensor("t", &[2], TensorType::F32, bytes(8)).is_ok());
    assert!(builder.tensor("t", &[2], TensorType::F32, bytes(8)).is_err(), "twice");
}

#[test]
fn the_same_seed_gives_the_same_file_and_another_seed_another() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, seed| {
        let path = folder.path().join(name);
        murmur_gguf::synth::write(&common::tiny("llama").with_seed(seed), &path).unwrap();
        fs::read(path).unwrap()
    };
    let first = write("a", 1);
    assert!(first == write("b", 1));
    assert!(first != write("c", 2));
}
