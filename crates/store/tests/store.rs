//! The store on a real disk.

#![allow(clippy::unwrap_used, reason = "helpers of tests, too, end the test when something is off")]

use std::{fs, path::Path, sync::Arc};

use murmur_store::{ErrorKind, ImportOptions, ModelName, ModelRef, Origin, Store};

/// The smallest GGUF file: header, no tensors, one key.
fn tiny_gguf() -> Vec<u8> {
    let mut bytes = Vec::from(*b"GGUF");
    bytes.extend(3u32.to_le_bytes());
    bytes.extend(0u64.to_le_bytes());
    bytes.extend(1u64.to_le_bytes());
    let key = b"general.architecture";
    bytes.extend((key.len() as u64).to_le_bytes());
    bytes.extend(key);
    bytes.extend(8u32.to_le_bytes());
    bytes.extend(5u64.to_le_bytes());
    bytes.extend(b"llama");
    bytes
}

fn model_in(directory: &Path, name: &str) -> std::path::PathBuf {
    let path = directory.join(name);
    fs::write(&path, tiny_gguf()).unwrap();
    path
}

fn name(text: &str) -> ModelName {
    text.parse().unwrap()
}

#[test]
fn an_imported_model_is_listed_resolved_and_removed_without_touching_the_users_file() {
    let home = tempfile::tempdir().unwrap();
    let file = model_in(home.path(), "Tiny Model Q8.gguf");
    let store = Store::at(&home.path().join("data"));
    assert!(store.list().unwrap().is_empty());
    assert!(!home.path().join("data").exists(), "listing wrote something");

    let entry = store.import(&file, &ImportOptions::default()).unwrap();
    assert_eq!(entry.name.as_str(), "Tiny-Model-Q8");
    assert_eq!(entry.origin, Origin::Reference);
    assert_eq!(store.list().unwrap(), std::slice::from_ref(&entry));
    let resolved = store.resolve(&"Tiny-Model-Q8".parse().unwrap()).unwrap();
    assert_eq!(resolved.path, file);

    let removed = store.remove(&entry.name).unwrap();
    assert_eq!(removed.freed_bytes, 0);
    assert!(file.exists());
    assert_eq!(store.resolve(&ModelRef::Name(entry.name)).unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn a_copy_outlives_the_original_and_goes_with_its_entry() {
    let home = tempfile::tempdir().unwrap();
    let file = model_in(home.path(), "m.gguf");
    let store = Store::at(home.path());
    let options = ImportOptions { name: Some(name("copied")), copy: true };
    let entry = store.import(&file, &options).unwrap();
    fs::remove_file(&file).unwrap();
    assert_eq!(fs::read(&entry.path).unwrap(), tiny_gguf());
    let removed = store.remove(&entry.name).unwrap();
    assert_eq!(removed.freed_bytes, tiny_gguf().len() as u64);
    assert!(!entry.path.exists());
}

#[test]
fn importing_the_same_file_again_is_fine_and_another_file_under_its_name_is_not() {
    let home = tempfile::tempdir().unwrap();
    let (a, b) = (model_in(home.path(), "a.gguf"), model_in(home.path(), "b.gguf"));
    let store = Store::at(home.path());
    let options = ImportOptions { name: Some(name("m")), copy: false };
    store.import(&a, &options).unwrap();
    store.import(&a, &options).unwrap();
    let error = store.import(&b, &options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
    assert!(error.to_string().contains("--name"), "{error}");
    assert_eq!(store.list().unwrap().len(), 1);
}

#[test]
fn what_is_no_model_is_refused_with_a_reason() {
    let home = tempfile::tempdir().unwrap();
    let store = Store::at(home.path());
    let import = |path: &Path| store.import(path, &ImportOptions::default()).unwrap_err();

    assert_eq!(import(&home.path().join("absent.gguf")).kind(), ErrorKind::NotFound);
    assert_eq!(import(home.path()).kind(), ErrorKind::Damaged);
    let text = home.path().join("text.gguf");
    fs::write(&text, "hello").unwrap();
    assert_eq!(import(&text).kind(), ErrorKind::Damaged);
    let short = home.path().join("short.gguf");
    fs::write(&short, &tiny_gguf()[..30]).unwrap();
    assert_eq!(import(&short).kind(), ErrorKind::Damaged);
    let split = import(&model_in(home.path(), "m-00001-of-00002.gguf"));
    assert_eq!(split.kind(), ErrorKind::NotFound);
    assert!(split.to_string().contains("m-00002-of-00002.gguf"), "{split}");
    assert!(store.list().unwrap().is_empty());
}

#[test]
fn a_misspelt_name_gets_the_nearest_one_suggested() {
    let home = tempfile::tempdir().unwrap();
    let store = Store::at(home.path());
    for file in ["Llama-3.2-1B.gguf", "Qwen3-0.6B.gguf"] {
        store.import(&model_in(home.path(), file), &ImportOptions::default()).unwrap();
    }
    let error = store.resolve(&"qwen3-06b".parse().unwrap()).unwrap_err().to_string();
    assert!(error.contains("Did you mean 'Qwen3-0.6B'"), "{error}");
}

#[test]
fn a_damaged_or_newer_index_is_not_overwritten() {
    let home = tempfile::tempdir().unwrap();
    let store = Store::at(home.path());
    let file = model_in(home.path(), "m.gguf");
    let index = home.path().join("models/index.json");
    fs::create_dir_all(index.parent().unwrap()).unwrap();
    for (content, says) in [("{", "Move it aside"), (r#"{"version":99,"models":"?"}"#, "newer murmur")] {
        fs::write(&index, content).unwrap();
        let error = store.import(&file, &ImportOptions::default()).unwrap_err();
        assert!(error.to_string().contains(says), "{error}");
        assert_eq!(fs::read_to_string(&index).unwrap(), content);
    }
}

#[test]
fn imports_at_the_same_time_are_all_remembered() {
    const IMPORTS: usize = 16;
    let home = tempfile::tempdir().unwrap();
    let store = Arc::new(Store::at(home.path()));
    std::thread::scope(|scope| {
        for n in 0..IMPORTS {
            let (store, file) = (Arc::clone(&store), model_in(home.path(), &format!("m{n}.gguf")));
            scope.spawn(move || store.import(&file, &ImportOptions::default()).unwrap());
        }
    });
    assert_eq!(store.list().unwrap().len(), IMPORTS);
}

#[test]
fn the_slices_directory_lies_in_the_data_directory() {
    let home = tempfile::tempdir().unwrap();
    let slices = Store::at(home.path()).slices_dir().unwrap();
    assert!(slices.is_dir() && slices.starts_with(home.path()));
}
