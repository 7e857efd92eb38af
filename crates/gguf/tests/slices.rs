//! Slices are complete models of their own, together hold every layer once, and say when they cannot be made.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may fail by panicking, in its helpers too")]

mod common;

use std::collections::BTreeSet;
use std::path::Path;

use murmur_gguf::synth::{self, Spec};
use murmur_gguf::{
    Array, ByteRange, Gguf, GgufBuilder, GroupSet, LayerRange, Manifest, SliceError, TensorSource, TensorType, Value,
    allowed_cuts, even_cuts, slice, slice_ranges, sliceable,
};

const SLICEABLE: &[&str] = &[
    "llama",
    "llama-tied",
    "mixtral",
    "mistral3",
    "qwen2",
    "qwen2moe",
    "qwen3",
    "qwen3moe",
    "gemma2",
    "gemma3",
    "phi3",
    "olmo2",
    "olmo3",
    "gpt-oss",
];

fn write(spec: &Spec, folder: &Path) -> Gguf {
    let path = folder.join("whole.gguf");
    synth::write(spec, &path).unwrap();
    Gguf::open(&path).unwrap()
}

fn cut(whole: &Gguf, range: LayerRange, folder: &Path) -> Gguf {
    let path = folder.join(format!("{}-{}.gguf", range.first, range.end));
    slice(whole, range, &path).unwrap();
    let part = Gguf::open(&path).unwrap();
    part.validate_for_engine().unwrap();
    part
}

fn data(gguf: &Gguf, name: &str) -> Vec<u8> {
    gguf.read_tensor(gguf.tensor(name).unwrap_or_else(|| panic!("{name}"))).unwrap()
}

fn same_tensor(a: &Gguf, name_a: &str, b: &Gguf, name_b: &str) {
    let (ta, tb) = (a.tensor(name_a).unwrap(), b.tensor(name_b).unwrap());
    assert_eq!((ta.ty, &ta.dims), (tb.ty, &tb.dims));
    assert!(data(a, name_a) == data(b, name_b), "{name_a} and {name_b}");
}

/// Bytes that a file really takes up.
#[cfg(unix)]
fn bytes_on_disk(gguf: &Gguf) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(gguf.path()).unwrap().blocks() * 512
}

#[test]
fn every_layer_is_in_one_slice_renumbered_from_zero() {
    for name in SLICEABLE {
        let folder = tempfile::tempdir().unwrap();
        let whole = write(&common::tiny(name), folder.path());
        let ranges = even_cuts(&whole, 3).unwrap();
        assert_eq!((ranges.len(), ranges[0].first, ranges[2].end), (3, 0, 4));
        for range in ranges {
            let part = cut(&whole, range, folder.path());
            assert_eq!(part.layer_count(), Some(range.len()), "{name}");
            let mut layers = BTreeSet::new();
            for tensor in part.tensors() {
                if let Some((il, rest)) = tensor.layer() {
                    layers.insert(il);
                    same_tensor(&part, &tensor.name, &whole, &format!("blk.{}.{rest}", il + range.first));
                }
            }
            assert_eq!(layers, (0..range.len()).collect(), "{name}");
            let per_layer = whole.tensors().iter().filter(|t| t.layer().is_some()).count() / 4;
            assert_eq!(
                part.tensors().iter().filter(|t| t.layer().is_some()).count(),
                per_layer * range.len() as usize,
                "{name}"
            );
            assert_eq!(part.u32("murmur.slice.first"), Some(range.first));
            assert!(matches!(sliceable(&part), Err(SliceError::Unsupported(_))), "a slice is not cut again");
        }
    }
}

#[test]
fn the_first_stage_takes_tokens_and_the_last_gives_logits() {
    for name in SLICEABLE {
        let folder = tempfile::tempdir().unwrap();
        let whole = write(&common::tiny(name), folder.path());
        let [first, middle, last] =
            [(0, 1), (1, 3), (3, 4)].map(|(a, b)| cut(&whole, LayerRange::new(a, b), folder.path()));
        same_tensor(&first, "token_embd.weight", &whole, "token_embd.weight");
        for part in [&first, &middle, &last] {
            same_tensor(part, "output_norm.weight", &whole, "output_norm.weight");
        }
        for part in [&first, &last] {
            assert_eq!(part.tokens(), whole.tokens(), "{name}");
            assert_eq!(part.get("tokenizer.chat_template"), whole.get("tokenizer.chat_template"));
            assert_eq!(part.arch_u32("vocab_size"), Some(300));
        }
        assert_eq!(middle.str("tokenizer.ggml.model"), Some("no_vocab"));
        assert!(middle.tokens().is_none() && middle.get("tokenizer.chat_template").is_none());
        assert_eq!(middle.tensor("token_embd.weight").unwrap().dims, [64, 32]);

        // The head: under its own name where llama.cpp insists, else as the embedding.
        let required = matches!(*name, "qwen2moe" | "olmo2" | "olmo3" | "gpt-oss");
        let tied = whole.tensor("output.weight").is_none();
        let head = if tied { "token_embd.weight" } else { "output.weight" };
        same_tensor(&last, if required { "output.weight" } else { "token_embd.weight" }, &whole, head);
        for part in [&first, &middle] {
            assert_eq!(part.tensor("output.weight").is_some(), required, "{name}");
        }
        if required {
            assert!(data(&first, "output.weight").iter().all(|&b| b == 0));
            assert!(data(&last, "token_embd.weight").iter().all(|&b| b == 0));
        } else {
            assert!(last.tensor("output.weight").is_none());
        }
    }
}

#[test]
fn a_slice_reads_the_bytes_that_it_says_and_no_others() {
    for name in SLICEABLE.iter().chain(&["smollm3"]) {
        let folder = tempfile::tempdir().unwrap();
        let whole = write(&common::tiny(name).with_layers(8), folder.path());
        let original = std::fs::read(whole.path()).unwrap();
        let edges: Vec<u32> = std::iter::once(0).chain(allowed_cuts(&whole)).chain([8]).collect();
        for (i, &first) in edges.iter().enumerate() {
            for &end in edges[i + 1..].iter().filter(|&&end| end - first < 8) {
                let range = LayerRange::new(first, end);
                let from_all = std::fs::read(cut(&whole, range, folder.path()).path()).unwrap();
                let ranges = slice_ranges(&whole, range).unwrap();
                assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start), "{name} {range}: {ranges:?}");

                let mut sparse = vec![0xFF; original.len()];
                for (start, end) in ranges.iter().map(|r| (r.start as usize, r.end as usize)) {
                    sparse[start..end].copy_from_slice(&original[start..end]);
                }
                assert!(sparse != original, "{name} {range}");
                let path = folder.path().join("sparse.gguf");
                std::fs::write(&path, &sparse).unwrap();
                let from_some = cut(&Gguf::open(&path).unwrap(), range, folder.path());
                assert!(std::fs::read(from_some.path()).unwrap() == from_all, "{name} {range}");
            }
        }
    }
}

#[test]
fn what_is_copied_lies_within_blocks_as_in_the_whole_file_so_that_file_systems_can_share_them() {
    const BLOCK_BYTES: u64 = 4096;
    for preset in SLICEABLE {
        let folder = tempfile::tempdir().unwrap();
        let whole = write(&Spec::tiny(preset).unwrap(), folder.path());
        for range in [LayerRange::new(0, 2), LayerRange::new(2, 4)] {
            let part = cut(&whole, range, folder.path());
            let copied = part.tensors().iter().filter_map(|tensor| {
                let (layer, name) = tensor.layer()?;
                let original = whole.tensor(&format!("blk.{}.{name}", layer + range.first)).unwrap();
                Some((tensor.bytes, tensor.offset.abs_diff(original.offset) % BLOCK_BYTES == 0))
            });
            let copied: Vec<(u64, bool)> = copied.collect();
            let all: u64 = copied.iter().map(|(bytes, _)| bytes).sum();
            let alike: u64 = copied.iter().filter(|(_, alike)| *alike).map(|(bytes, _)| bytes).sum();
            assert!(alike * 10 >= all * 9, "{preset} {range}: {alike} of {all} bytes");
        }
    }
}

#[test]
fn for_a_range_of_layers_hardly_more_is_fetched_than_its_tensors_and_the_header_have() {
    let folder = tempfile::tempdir().unwrap();
    let whole = write(&Spec::preset("bench-wide").unwrap(), folder.path());
    let layers = Manifest::outline(&whole).layers;
    let header = GroupSet::covering(&[ByteRange { start: 0, end: whole.data_offset() }]);
    for range in [LayerRange::new(1, 2), LayerRange::new(1, 3)] {
        let tensors: u64 = layers[range.first as usize..range.end as usize].iter().map(|layer| layer.bytes).sum();
        let groups = GroupSet::covering(&slice_ranges(&whole, range).unwrap()).difference(&header);
        let bytes = groups.bytes(whole.file_bytes());
        assert!(bytes as f64 <= 1.02 * tensors as f64, "layers {range}: {bytes} bytes for {tensors}");
    }
}

#[test]
fn factors_of_the_rotary_encoding_go_to_every_stage() {
    for (name, tensors) in [
        ("llama-tied", vec!["rope_freqs.weight"]),
        ("phi3", vec!["rope_factors_long.weight", "rope_factors_short.weight"]),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let whole = write(&common::tiny(name), folder.path());
        for il in 0..4 {
            let part = cut(&whole, LayerRange::new(il, il + 1), folder.path());
            tensors.iter().for_each(|tensor| same_tensor(&part, tensor, &whole, tensor));
        }
    }
}

fn pattern(gguf: &Gguf) -> Option<Vec<bool>> {
    match gguf.arch_get("attention.sliding_window_pattern") {
        Some(Value::Array(Array::Bool(pattern))) => Some(pattern.clone()),
        None => None,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_window_pattern_is_written_out_for_the_layers_of_the_slice() {
    let folder = tempfile::tempdir().unwrap();
    let whole = write(&Spec::tiny("gemma3").unwrap(), folder.path());
    // Every sixth layer sees everything.
    let part = cut(&whole, LayerRange::new(4, 7), folder.path());
    assert_eq!(pattern(&part), Some(vec![true, false, true]));
    assert_eq!(part.arch_u32("attention.sliding_window"), Some(16));
    // No windowed layer, no window.
    let part = cut(&whole, LayerRange::new(5, 6), folder.path());
    assert_eq!(part.arch_u32("attention.sliding_window"), Some(0));
    // An architecture that cannot be without a window gets an endless one.
    for name in ["gemma2", "gpt-oss"] {
        let folder = tempfile::tempdir().unwrap();
        let whole = write(&common::tiny(name), folder.path());
        let part = cut(&whole, LayerRange::new(1, 2), folder.path());
        assert_eq!(pattern(&part), Some(vec![true]));
        assert!(part.arch_u32("attention.sliding_window").unwrap() > 1 << 20);
        assert_eq!(part.arch_f32("rope.freq_base_swa"), part.arch_f32("rope.freq_base"));
    }
}

#[test]
fn values_listed_per_layer_are_cut_with_the_layers() {
    let folder = tempfile::tempdir().unwrap();
    let mut spec = common::tiny("llama");
    spec.keys.push(("attention.head_count_kv", vec![1u32; 4].into()));
    spec.keys.push(("leading_dense_block_count", 2u32.into()));
    let whole = write(&spec, folder.path());
    let part = cut(&whole, LayerRange::new(1, 3), folder.path());
    assert_eq!(part.arch_get("attention.head_count_kv"), Some(&vec![1u32; 2].into()));
    assert_eq!(part.arch_u32("leading_dense_block_count"), Some(1));

    spec.keys.push(("mystery", vec![1u32; 4].into()));
    let whole = write(&spec, folder.path());
    assert!(matches!(sliceable(&whole), Err(SliceError::Unsupported(reason)) if reason.contains("llama.mystery")));
}

#[test]
fn smollm3_is_cut_only_at_every_fourth_layer_and_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let whole = write(&common::tiny("smollm3").with_layers(12), folder.path());
    assert_eq!(allowed_cuts(&whole), [4, 8]);
    cut(&whole, LayerRange::new(4, 8), folder.path());
    let error = slice(&whole, LayerRange::new(0, 6), folder.path().join("x")).unwrap_err();
    assert!(matches!(error, SliceError::CutNotAllowed { .. }));
    assert!(error.to_string().contains("before the layers 4, 8"), "{error}");
    assert_eq!(even_cuts(&whole, 3).unwrap().len(), 3);
    assert!(matches!(even_cuts(&whole, 4), Err(SliceError::StageCount { stages_max: 3, .. })));
}

#[test]
fn ranges_that_make_no_sense_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let whole = write(&common::tiny("llama"), folder.path());
    let refused = |first, end| slice(&whole, LayerRange::new(first, end), folder.path().join("x")).unwrap_err();
    assert!(matches!(refused(2, 2), SliceError::OutOfRange { .. }));
    assert!(matches!(refused(3, 1), SliceError::OutOfRange { .. }));
    assert!(matches!(refused(3, 5), SliceError::OutOfRange { .. }));
    assert!(matches!(refused(0, 4), SliceError::WholeModel(_)));
    assert!(!folder.path().join("x").exists());
}

#[test]
fn unknown_architectures_and_models_with_odd_parts_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let bert = write(&common::tiny("bert"), folder.path());
    let error = sliceable(&bert).unwrap_err();
    assert!(matches!(error, SliceError::UnknownArchitecture { .. }));
    assert!(error.to_string().contains("whole on one machine"), "{error}");
    assert!(allowed_cuts(&bert).is_empty());

    for (key, value) in [("nextn_predict_layers", 1u32), ("adapters.count", 1)] {
        let mut spec = common::tiny("llama");
        spec.keys.push((key, value.into()));
        assert!(matches!(sliceable(&write(&spec, folder.path())), Err(SliceError::Unsupported(_))), "{key}");
    }
}

#[test]
fn a_tensor_that_no_rule_places_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("odd.gguf");
    let whole = write(&common::tiny("llama"), folder.path());
    let mut builder = GgufBuilder::default();
    for (key, value) in whole.keys() {
        builder.set(key, value.clone());
    }
    let file = std::sync::Arc::new(std::fs::File::open(whole.path()).unwrap());
    for t in whole.tensors() {
        builder
            .tensor(t.name.as_str(), &t.dims, t.ty, TensorSource::FileRange { file: file.clone(), offset: t.offset })
            .unwrap();
    }
    builder.tensor("mystery.weight", &[4], TensorType::F32, TensorSource::Zeros).unwrap();
    builder.write(&path).unwrap();
    let odd = Gguf::open(&path).unwrap();
    assert!(matches!(sliceable(&odd), Err(SliceError::Unsupported(reason)) if reason.contains("mystery.weight")));
}

#[test]
fn a_27b_model_is_not_cut_because_llama_cpp_knows_it_by_its_layers() {
    let folder = tempfile::tempdir().unwrap();
    let mut spec = common::tiny("gemma2").with_layers(46);
    // 64 / 4 = 16 by width, but 32 by key length.
    (spec.facts.heads, spec.facts.kv_heads) = (4, 2);
    assert!(matches!(sliceable(&write(&spec, folder.path())), Err(SliceError::Unsupported(_))));
    assert!(sliceable(&write(&spec.with_layers(45), folder.path())).is_ok());
}

#[test]
fn a_file_that_changed_since_it_was_opened_is_not_cut() {
    let folder = tempfile::tempdir().unwrap();
    let whole = write(&common::tiny("llama"), folder.path());
    std::fs::write(whole.path(), b"something else").unwrap();
    let error = slice(&whole, LayerRange::new(0, 1), folder.path().join("x")).unwrap_err();
    assert!(matches!(error, SliceError::Changed { .. }), "{error}");
}

#[test]
fn even_cuts_balance_what_a_token_reads() {
    let folder = tempfile::tempdir().unwrap();
    let mut spec = common::tiny("llama").with_layers(8);
    // A head as heavy as three layers or so.
    spec.facts.vocabulary = 2000;
    let whole = write(&spec, folder.path());
    let ranges = even_cuts(&whole, 2).unwrap();
    assert!(ranges[0].len() > ranges[1].len(), "{ranges:?}");
    assert_eq!(even_cuts(&whole, 1).unwrap(), [LayerRange::new(0, 8)]);
    assert_eq!(even_cuts(&whole, 8).unwrap().len(), 8);
    assert!(matches!(even_cuts(&whole, 0), Err(SliceError::StageCount { .. })));
    assert!(matches!(even_cuts(&whole, 9), Err(SliceError::StageCount { .. })));
}

#[cfg(target_os = "linux")]
#[test]
fn a_head_that_is_never_read_takes_no_room_on_disk() {
    let folder = tempfile::tempdir().unwrap();
    let mut spec = common::tiny("olmo2");
    spec.facts.vocabulary = 20_000;
    let whole = write(&spec, folder.path());
    let last = cut(&whole, LayerRange::new(3, 4), folder.path());
    let dummy = last.tensor("token_embd.weight").unwrap();
    assert!(dummy.bytes > 1 << 18);
    if bytes_on_disk(&last) + dummy.bytes / 2 > last.file_bytes() {
        eprintln!("skipped: this file system has no holes");
    }
}
