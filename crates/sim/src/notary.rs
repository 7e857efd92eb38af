//! What signatures would say.
//!
//! A thousand nodes make fifty records a second, and each is checked a thousand times: real signatures would be all that the
//! simulation does. So each record is put down here once, with whether it is genuine, and travels as the number of its
//! entry, and counts for as many bytes as a real one. A liar can put down what it likes; it cannot make it genuine.

use std::sync::Arc;

use bytes::Bytes;
use murmur_core::membership::Verified;
use murmur_protocol::mesh::{
    Addresses, Capabilities, MeshId, MessageError, ModelDigest, ModelState, NodeId, NodeRecord, Role, ServedModel,
    SignedRecord, TokenizerDigest,
};

/// Length of a signed record with one model, one relay and two addresses, in bytes.
pub const RECORD_BYTES: usize = 420;

/// How much longer a broadcast with a record is than with its number: the record itself, and its length as a varint.
pub(crate) const UNSENT_BYTES: u64 = (RECORD_BYTES - size_of::<u64>() + 1) as u64;

/// A record as it stands in the book.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) verified: Arc<Verified>,
    /// Its node signed it.
    pub(crate) genuine: bool,
}

/// The book of all records of a run.
#[derive(Debug)]
pub(crate) struct Notary {
    signed: SignedRecord,
    entries: Vec<Entry>,
}

impl Notary {
    pub(crate) fn new() -> Result<Self, MessageError> {
        Ok(Notary { signed: SignedRecord::from_bytes([0; RECORD_BYTES])?, entries: Vec::new() })
    }

    /// Puts a record down; returns the bytes that stand for it.
    pub(crate) fn put_down(&mut self, record: NodeRecord, genuine: bool) -> (Arc<Verified>, Bytes) {
        let verified = Verified::trusted(record, self.signed.clone());
        let bytes = Notary::number(self.entries.len());
        self.entries.push(Entry { verified: Arc::clone(&verified), genuine });
        (verified, bytes)
    }

    /// The bytes that stand for a genuine record of the book: broadcast again, it is the same message.
    pub(crate) fn bytes(&self, verified: &Arc<Verified>) -> Bytes {
        let number = self.entries.iter().rposition(|entry| entry.genuine && Arc::ptr_eq(&entry.verified, verified));
        Notary::number(number.unwrap_or(self.entries.len()))
    }

    fn number(number: usize) -> Bytes {
        Bytes::copy_from_slice(&(number as u64).to_le_bytes())
    }

    /// The record that these bytes stand for.
    pub(crate) fn look_up(&self, bytes: &[u8]) -> Option<&Entry> {
        let number = bytes.try_into().ok().map(u64::from_le_bytes)?;
        self.entries.get(usize::try_from(number).ok()?)
    }
}

/// A record with one model.
pub(crate) fn record(node: NodeId, mesh: MeshId, sequence: u64, ttl_ms: u32, tombstone: bool) -> NodeRecord {
    let model = ServedModel {
        digest: ModelDigest::from_bytes([1; 32]),
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
        exact: false,
        build: String::new(),
        guesses: None,
    };
    NodeRecord {
        node,
        mesh,
        sequence,
        ttl_ms,
        tombstone,
        role: Role::Worker,
        addresses: Addresses::default(),
        models: if tombstone { Vec::new() } else { vec![model] },
        software: String::new(),
        capabilities: Capabilities::default(),
        memory_free_bytes: 0,
        certificate: None,
        stages: Vec::new(),
        links: Vec::new(),
        machine: None,
        contents: Vec::new(),
        region: String::new(),
    }
}
