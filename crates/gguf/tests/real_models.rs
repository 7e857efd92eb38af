//! Files that others made. Each test skips, and says so, where they are not there.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may fail by panicking, in its helpers too")]

mod common;

use murmur_gguf::{Gguf, GgufErrorKind, LayerRange, Manifest, allowed_cuts, slice};

#[test]
fn a_version_1_file_is_refused_with_its_own_message() {
    let Some(path) = common::shared_model("reject/gguf-v1.gguf") else {
        return;
    };
    let error = Gguf::open(path).unwrap_err();
    assert!(matches!(error.kind(), GgufErrorKind::VersionTooOld), "{error}");
    assert!(error.to_string().contains("version 1"));
}

#[test]
fn real_models_are_accepted_and_their_slices_too() {
    for relative in ["stories260K/stories260K-f32.gguf", "demo/murmur-demo-q8_0.gguf", "demo/murmur-demo-f16.gguf"] {
        let Some(path) = common::shared_model(relative) else {
            continue;
        };
        let gguf = Gguf::open(&path).unwrap();
        gguf.validate_for_engine().unwrap();
        let layers = gguf.layer_count().unwrap();
        assert_eq!(allowed_cuts(&gguf), (1..layers).collect::<Vec<_>>());
        let folder = tempfile::tempdir().unwrap();
        for range in [LayerRange::new(0, 2), LayerRange::new(2, 4), LayerRange::new(4, layers)] {
            let out = folder.path().join("part.gguf");
            slice(&gguf, range, &out).unwrap();
            Gguf::open(&out).unwrap().validate_for_engine().unwrap();
        }
        let manifest = Manifest::of_gguf(&gguf, |_, _| {}).unwrap();
        assert_eq!(manifest.layers.len(), layers as usize);
        assert_eq!(manifest.not_sliceable, None);
        eprintln!("{relative}: {} parameters, {}, {}", manifest.parameters, manifest.quantization, manifest.digest);
    }
}

#[test]
fn a_model_of_one_layer_is_accepted_but_has_no_cuts() {
    let Some(path) = common::shared_model("random-llama2-vocab32000.gguf") else {
        return;
    };
    let gguf = Gguf::open(path).unwrap();
    gguf.validate_for_engine().unwrap();
    assert_eq!(gguf.tokens().unwrap().len(), 32_000);
    assert!(allowed_cuts(&gguf).is_empty());
}

#[test]
fn vocabulary_files_open_but_are_not_models() {
    for name in ["llama-spm", "bert-bge", "gpt-2", "falcon", "phi-3", "deepseek-coder", "starcoder", "refact"] {
        let Some(path) = common::shared_model(&format!("gguf-vocab/ggml-vocab-{name}.gguf")) else {
            return;
        };
        let gguf = Gguf::open(path).unwrap();
        assert!(gguf.tokens().unwrap().len() > 10_000);
        let error = gguf.validate_for_engine().unwrap_err();
        assert!(error.to_string().contains("only a vocabulary"), "{error}");
    }
}
