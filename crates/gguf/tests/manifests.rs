//! Digests follow content, not place.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may fail by panicking, in its helpers too")]

mod common;

use std::path::{Path, PathBuf};

use murmur_gguf::synth::{self, Spec};
use murmur_gguf::{Gguf, LayerRange, Manifest, slice};

fn write(spec: &Spec, path: PathBuf) -> PathBuf {
    synth::write(spec, &path).unwrap();
    path
}

fn manifest(path: &Path) -> Manifest {
    Manifest::of(path, |_, _| {}).unwrap()
}

#[test]
fn a_layer_has_the_same_digest_in_a_slice_and_so_have_embedding_head_and_tokenizer() {
    for name in ["llama", "llama-tied", "gpt-oss", "gemma3"] {
        let folder = tempfile::tempdir().unwrap();
        let path = write(&common::tiny(name), folder.path().join("whole"));
        let whole = manifest(&path);
        assert_eq!((whole.layers.len(), whole.not_sliceable.as_deref()), (4, None));
        let gguf = Gguf::open(&path).unwrap();
        let cut = |first, end| {
            let out = folder.path().join("part");
            slice(&gguf, LayerRange::new(first, end), &out).unwrap();
            manifest(&out)
        };
        let (first, middle, last) = (cut(0, 2), cut(2, 3), cut(3, 4));
        let digests = |manifest: &Manifest| manifest.layers.iter().map(|layer| layer.digest).collect::<Vec<_>>();
        assert_eq!([digests(&first), digests(&middle), digests(&last)].concat(), digests(&whole), "{name}");
        assert_eq!(first.embedding.unwrap().digest, whole.embedding.as_ref().unwrap().digest);
        assert_eq!(last.head.unwrap().digest, whole.head.as_ref().unwrap().digest, "{name}");
        assert_eq!((first.tokenizer, last.tokenizer), (whole.tokenizer, whole.tokenizer));
        assert_ne!(middle.tokenizer, whole.tokenizer);
        assert_eq!(first.shared.map(|part| part.digest), whole.shared.as_ref().map(|part| part.digest));
        assert_eq!(last.slice, Some(LayerRange::new(3, 4)));
        assert_ne!(digests(&whole)[0], digests(&whole)[1]);
    }
}

#[test]
fn the_file_digest_is_blake3_of_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = write(&common::tiny("llama"), folder.path().join("whole"));
    let mut reports = vec![];
    let manifest = Manifest::of(&path, |done, total| reports.push((done, total))).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    assert_eq!(manifest.digest.0, *blake3::hash(&bytes).as_bytes());
    assert_eq!(reports.last(), Some(&(bytes.len() as u64, bytes.len() as u64)));
    assert!(reports.is_sorted());
}

#[test]
fn one_changed_byte_changes_only_the_part_it_is_in() {
    let folder = tempfile::tempdir().unwrap();
    let path = write(&common::tiny("llama"), folder.path().join("whole"));
    let before = manifest(&path);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[before.layers[2].ranges[0].start as usize] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let after = manifest(&path);
    assert_ne!(before.digest, after.digest);
    for il in 0..4 {
        assert_eq!(before.layers[il].digest == after.layers[il].digest, il != 2, "layer {il}");
    }
    assert_eq!(before.head, after.head);
}

#[test]
fn sizes_and_facts_add_up() {
    let folder = tempfile::tempdir().unwrap();
    let path = write(&common::tiny("llama"), folder.path().join("whole"));
    let m = manifest(&path);
    let (embedding, head) = (m.embedding.as_ref().unwrap(), m.head.as_ref().unwrap());
    assert!(!m.tied);
    assert_eq!(m.layers.iter().map(|l| l.bytes).sum::<u64>() + embedding.bytes + head.bytes, m.tensor_bytes);
    assert_eq!(m.layer_bytes(LayerRange::new(1, 3)), m.layers[1].bytes + m.layers[2].bytes);
    let (d, ff, q, kv, v) = (64, 96, 64, 32, 300);
    assert_eq!(m.parameters, 2 * d * v + d + 4 * (2 * d + 2 * d * q + 2 * d * kv + 3 * d * ff));
    // f16 keys and values of one head of 32.
    assert_eq!(m.kv_bytes_per_token(LayerRange::new(0, 3)), 3 * 2 * 2 * 32);
    assert_eq!((m.quantization.as_str(), m.architecture.as_str()), ("Q8_0", "llama"));
    let json: serde_json::Value = serde_json::to_value(&m).unwrap();
    assert_eq!(json["digest"].as_str().map(str::len), Some(64));
    assert_eq!(json["facts"]["layers"], 4);
}

#[test]
fn a_tied_model_counts_its_head_once() {
    let folder = tempfile::tempdir().unwrap();
    let m = manifest(&write(&common::tiny("llama-tied"), folder.path().join("whole")));
    assert!(m.tied);
    assert_eq!(m.head.unwrap().parameters, 64 * 300 + 64);
    assert_eq!(m.parameters, m.layers.iter().map(|l| l.parameters).sum::<u64>() + 64 * 300 + 64 + 16);
}

#[test]
fn the_digest_of_a_manifest_is_pinned_and_follows_from_all_that_it_covers() {
    let folder = tempfile::tempdir().unwrap();
    let path = write(&common::tiny("llama"), folder.path().join("whole"));
    let known = manifest(&path);
    let pinned = "6afafd08ed085717e9046707f3c1418db94dbc41ad6def27abd37b494e1675cc";
    assert_eq!(known.own_digest().to_string(), pinned, "who has signed it has signed something else now");
    let changes: [fn(&mut Manifest); 9] = [
        |m| m.digest.0[0] ^= 1,
        |m| m.file_bytes += 1,
        |m| m.architecture.push('2'),
        |m| drop(m.layers.pop()),
        |m| m.layers.swap(0, 1),
        |m| m.layers[2].ranges[0].end += 1,
        |m| m.head = m.embedding.clone(),
        |m| m.tokenizer = None,
        |m| m.facts.as_mut().unwrap().kv_heads += 1,
    ];
    for (at, change) in changes.iter().enumerate() {
        let mut changed = known.clone();
        change(&mut changed);
        assert_ne!(changed.own_digest(), known.own_digest(), "{at}");
    }
    // The path and what people call it are nobody's business.
    let renamed = write(&common::tiny("llama"), folder.path().join("elsewhere"));
    assert_eq!(manifest(&renamed).own_digest(), known.own_digest());
}
