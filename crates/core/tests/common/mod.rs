//! Records for tests: not signed, as the tables take what was checked before.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)] // each test file uses some of it

use std::sync::Arc;

use murmur_core::membership::Verified;
use murmur_protocol::mesh::{
    Addresses, Capabilities, MeshId, ModelDigest, ModelState, NodeId, NodeRecord, Role, ServedModel, SignedRecord,
    TokenizerDigest,
};

/// The validity of every record made here.
pub const TTL_MS: u64 = 60_000;

pub fn mesh() -> MeshId {
    MeshId::public("test")
}

/// A node whose id sorts by `number`.
pub fn node(number: u32) -> NodeId {
    let mut id = [7; 32];
    id[..4].copy_from_slice(&number.to_be_bytes());
    NodeId::from_bytes(id)
}

pub fn model() -> ModelDigest {
    ModelDigest::from_bytes([1; 32])
}

pub fn served() -> ServedModel {
    ServedModel {
        digest: model(),
        name: "model".to_owned(),
        state: ModelState::Ready,
        context_tokens: 8_192,
        parallel: 4,
        running: 0,
        queued: 0,
        decode_us_per_token: 20_000,
        prefill_us_per_token: 1_000,
        load_ms: 0,
        tokenizer: TokenizerDigest::from_bytes([2; 32]),
        exact: true,
        build: "build".to_owned(),
        guesses: None,
    }
}

fn verified(mesh: MeshId, node: NodeId, sequence: u64, tombstone: bool) -> Arc<Verified> {
    let record = NodeRecord {
        node,
        mesh,
        sequence,
        ttl_ms: TTL_MS as u32,
        tombstone,
        role: Role::Worker,
        addresses: Addresses::default(),
        models: Vec::new(),
        software: String::new(),
        capabilities: Capabilities::NONE,
        memory_free_bytes: 0,
        certificate: None,
        stages: Vec::new(),
        links: Vec::new(),
        machine: None,
        contents: Vec::new(),
        region: String::new(),
    };
    Verified::trusted(record, SignedRecord::from_bytes([0; 100]).unwrap())
}

pub fn record(node: NodeId, sequence: u64) -> Arc<Verified> {
    verified(mesh(), node, sequence, false)
}

pub fn tombstone(node: NodeId, sequence: u64) -> Arc<Verified> {
    verified(mesh(), node, sequence, true)
}

pub fn record_of_another_mesh(node: NodeId) -> Arc<Verified> {
    verified(MeshId::public("another"), node, 1, false)
}
