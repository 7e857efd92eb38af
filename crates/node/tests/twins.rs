//! Files of which a part is here already, in another file: that part is asked of nobody.

#![allow(clippy::unwrap_used, clippy::panic, reason = "these are tests, helpers included")]

mod common;

use std::{fs, path::PathBuf};

use common::{Pull, World};
use murmur_gguf::{Gguf, GgufBuilder, TensorInfo, TensorSource};
use murmur_store::{ImportOptions, Store};

/// So fast does the node with the file send: there is time to find another file.
const BYTES_PER_S: u64 = 500_000;

/// Tensors with their bytes, in the order in which they lie in the file.
type Tensors<'a> = Vec<(&'a TensorInfo, Vec<u8>)>;

/// Puts another file in the taker's store: with another chat template, and with tensors that are changed so.
fn has_another_file(world: &World, change: impl Fn(&mut Tensors<'_>)) -> PathBuf {
    let folder = world.taker_dir.join("other");
    fs::create_dir_all(&folder).unwrap();
    let (source, path) = (folder.join("source.gguf"), folder.join("older.gguf"));
    common::the_file(&source);
    let gguf = Gguf::open(&source).unwrap();
    let mut builder = GgufBuilder::new(gguf.architecture());
    for (key, value) in gguf.keys() {
        builder.set(key, value.clone());
    }
    builder.set("tokenizer.chat_template", "an older one".to_owned());
    let read = |tensor| (tensor, gguf.read_tensor(tensor).unwrap());
    let mut tensors: Tensors<'_> = gguf.tensors().iter().map(read).collect();
    change(&mut tensors);
    for (tensor, bytes) in tensors {
        builder.tensor(&tensor.name, &tensor.dims, tensor.ty, TensorSource::Bytes(bytes.into())).unwrap();
    }
    builder.write(&path).unwrap();
    fs::remove_file(source).unwrap();
    Store::at(&world.taker_dir).import(&path, &ImportOptions::default()).unwrap();
    path
}

/// Pulls the file where another one is here. Returns how many bytes came from that one, and whether it was seen among the sources.
async fn pull_beside(change: impl Fn(&mut Tensors<'_>)) -> (World, u64, bool) {
    let world = World::new().await;
    let other = has_another_file(&world, change);
    let _honest = world.honest(Some(BYTES_PER_S)).await;
    world.knows_holders(1).await;
    let events = Pull::begin(&world).await.until_its_end(|_| world.holds_only_what_is_right()).await;
    world.has_the_file(&events);
    assert_eq!(events.last().unwrap()["liars"], serde_json::json!([]));
    let mut sources = events.iter().filter_map(|event| event["fetch"]["sources"].as_array()).flatten();
    let is_seen = sources.any(|source| source["file"].as_str() == other.to_str());
    let copied_bytes = events.last().unwrap()["copied_bytes"].as_u64().unwrap();
    (world, copied_bytes, is_seen)
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_model_with_another_chat_template_hardly_more_than_the_header_is_fetched() {
    let (world, copied_bytes, _) = pull_beside(|_| ()).await;
    // Before its header is here, anything may be asked for.
    assert!(copied_bytes >= world.bytes() * 2 / 3, "{copied_bytes} of {}", world.bytes());
}

fn spoil((_, bytes): &mut (&TensorInfo, Vec<u8>)) {
    bytes.iter_mut().for_each(|byte| *byte ^= 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn tensors_that_are_not_the_same_are_fetched_and_the_others_are_not_wherever_they_lie() {
    let change = |tensors: &mut Tensors<'_>| {
        tensors.iter_mut().filter(|(tensor, _)| tensor.name.contains("ffn_down")).for_each(spoil);
        tensors.reverse();
    };
    let (world, copied_bytes, is_seen) = pull_beside(change).await;
    assert!(is_seen);
    assert!((world.bytes() / 4..world.bytes() * 9 / 10).contains(&copied_bytes), "{copied_bytes} of {}", world.bytes());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_only_looks_the_same_does_no_harm() {
    let (_world, copied_bytes, _) = pull_beside(|tensors| tensors.iter_mut().for_each(spoil)).await;
    assert_eq!(copied_bytes, 0);
}
