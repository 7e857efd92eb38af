//! Models in several files become one, always the same, or it is said what is wrong with the parts.

#![allow(clippy::unwrap_used, reason = "helpers of tests, too, end the test when something is off")]

mod common;

use std::{
    fs,
    path::{Path, PathBuf},
};

use murmur_gguf::{
    Gguf, GgufBuilder, TensorSource, Value,
    join::{JoinError, Parts},
    synth::{self, Spec},
};

/// Writes a model, and its parts, each with so many tensors.
fn split(folder: &Path, tensors: &[usize]) -> (Gguf, Vec<PathBuf>) {
    let whole = folder.join("whole.gguf");
    synth::write(&Spec::tiny("llama").unwrap().with_layers(2), &whole).unwrap();
    let whole = Gguf::open(&whole).unwrap();
    let mut left = whole.tensors().iter();
    let paths = tensors.iter().enumerate().map(|(at, count)| {
        let mut part = GgufBuilder::default();
        if at == 0 {
            for (key, value) in whole.keys() {
                part.set(key, value.clone());
            }
        }
        part.set("split.no", Value::U16(at as u16));
        part.set("split.count", Value::U16(tensors.len() as u16));
        part.set("split.tensors.count", Value::I32(whole.tensors().len() as i32));
        for tensor in left.by_ref().take(*count) {
            let bytes = TensorSource::Bytes(whole.read_tensor(tensor).unwrap().into());
            part.tensor(&*tensor.name, &tensor.dims, tensor.ty, bytes).unwrap();
        }
        let path = folder.join(format!("m-{:05}-of-{:05}.gguf", at + 1, tensors.len()));
        part.write(&path).unwrap();
        path
    });
    let paths = paths.collect();
    assert!(left.next().is_none(), "a tensor is in no part");
    (whole, paths)
}

#[test]
fn a_joined_model_is_the_whole_one_and_the_same_whoever_joins() {
    let folder = tempfile::tempdir().unwrap();
    let count = split(folder.path(), &[usize::MAX]).0.tensors().len();
    // The first part may have no tensors at all.
    for tensors in [vec![count], vec![0, 5, usize::MAX], vec![3, 4, usize::MAX]] {
        let (whole, paths) = split(folder.path(), &tensors);
        let joined = ["one", "two"].map(|name| folder.path().join(name));
        let parts = Parts::open(&paths).unwrap();
        let bytes = joined.each_ref().map(|path| parts.join(path).unwrap());
        assert!(bytes[0] < parts.bytes());
        let [one, two] = joined.each_ref().map(|path| fs::read(path).unwrap());
        assert!(one == two && one.len() as u64 == bytes[0]);
        assert!(
            one == fs::read(whole.path()).unwrap(),
            "what was split by no other order is whole again, byte for byte"
        );
        let joined = Gguf::open(&joined[0]).unwrap();
        assert!(joined.keys().all(|(key, _)| !key.starts_with("split.")));
        for tensor in whole.tensors() {
            let same = joined.tensor(&tensor.name).unwrap();
            assert!(joined.read_tensor(same).unwrap() == whole.read_tensor(tensor).unwrap(), "{}", tensor.name);
        }
    }
}

#[test]
fn parts_that_do_not_belong_together_are_refused_with_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let (_, paths) = split(folder.path(), &[3, 4, usize::MAX]);
    let refused = |paths: &[&Path], says: &str| {
        let error = Parts::open(paths).unwrap_err().to_string();
        assert!(error.contains(says), "no {says:?} in: {error}");
    };
    let [first, second, third] = [&*paths[0], &*paths[1], &*paths[2]];
    refused(&[first, third, second], "split.no is 2, and of part 2 of 3 it should be 1");
    refused(&[first, second], "split.count is 3");
    refused(&[first, second, second], "split.tensors.count is");
    refused(&[second, first, third], "split.no is 1, and of part 1");
    refused(&[], "0 parts");
    assert!(matches!(Parts::open(&[first, second, &folder.path().join("absent")]), Err(JoinError::Part(_))));
    // A whole model is no part.
    refused(&[&folder.path().join("whole.gguf")], "split.count is nothing");

    let cut = folder.path().join("cut.gguf");
    let bytes = fs::read(third).unwrap();
    fs::write(&cut, &bytes[..bytes.len() - 100]).unwrap();
    refused(&[first, second, &cut], "cut short");
}

#[test]
fn a_tensor_that_is_in_two_parts_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let paths = [0u16, 1].map(|at| {
        let mut part = GgufBuilder::new("llama");
        part.set("split.no", Value::U16(at)).set("split.count", Value::U16(2));
        part.set("split.tensors.count", Value::I32(2)).tensor_f32("twice", &[32], &[0.5; 32]).unwrap();
        let path = folder.path().join(at.to_string());
        part.write(&path).unwrap();
        path
    });
    let error = Parts::open(&paths).unwrap_err().to_string();
    assert!(error.contains("the tensor twice is in"), "{error}");
}
