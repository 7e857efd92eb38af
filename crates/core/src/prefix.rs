//! Which peer may still hold the KV cache of which prompt.
//!
//! A worker keeps what it has computed until it needs the room. The next turn of a conversation is cheapest where the last
//! one ran: its whole past is prefilled there already. So the driver remembers which prompts it sent where. Prompts are
//! compared by a chain of hashes over blocks of [`BLOCK_TOKENS`] tokens, in which each hash covers all tokens before it:
//! the longest common prefix of two prompts is the last hash that they share.

use std::num::NonZeroUsize;

use lru::LruCache;
use murmur_protocol::{
    mesh::{ModelDigest, NodeId},
    sampling::Token,
};

/// Tokens in a block. Less than a block of common prefix is not worth a detour.
pub const BLOCK_TOKENS: u32 = 64;

/// Blocks remembered of one prompt, at most: more tokens than any context has.
pub const BLOCKS_PER_PROMPT_MAX: usize = 16_384;

/// Blocks remembered altogether; those used longest ago are forgotten.
const BLOCKS_MAX: NonZeroUsize = NonZeroUsize::MIN.saturating_add(65_535);

/// Peers remembered for one block, at most: the last ones.
const HOLDERS_MAX: usize = 8;

const BLOCK_CONTEXT: &str = "murmur 2026-11 prefix block";

/// The hash of a block and of everything before it, including the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockHash([u8; 32]);

/// The hashes of a prompt's whole blocks, in order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PrefixChain(Vec<BlockHash>);

impl PrefixChain {
    /// Of these tokens for this model. What does not fill a block is left out.
    pub fn of(model: &ModelDigest, tokens: &[Token]) -> Self {
        let mut before = blake3::derive_key(BLOCK_CONTEXT, model.as_bytes());
        let blocks = tokens.chunks_exact(BLOCK_TOKENS as usize).take(BLOCKS_PER_PROMPT_MAX).map(|block| {
            let mut hasher = blake3::Hasher::new_keyed(&before);
            for token in block {
                hasher.update(&token.to_le_bytes());
            }
            before = *hasher.finalize().as_bytes();
            BlockHash(before)
        });
        PrefixChain(blocks.collect())
    }
}

/// What the driver remembers of prompts that it sent.
#[derive(Debug)]
pub struct Prefixes {
    /// The last peer that got a block stands last.
    holders: LruCache<BlockHash, Vec<NodeId>>,
}

impl Default for Prefixes {
    fn default() -> Self {
        Prefixes { holders: LruCache::new(BLOCKS_MAX) }
    }
}

impl Prefixes {
    /// Remembers nothing.
    pub fn new() -> Self {
        Prefixes::default()
    }

    /// `peer` computes this prompt now.
    pub fn note_sent(&mut self, peer: NodeId, chain: &PrefixChain) {
        // From the last block to the first, so that the ends of old prompts are forgotten before their beginnings.
        for block in chain.0.iter().rev() {
            let holders = self.holders.get_or_insert_mut(*block, Vec::new);
            holders.retain(|holder| *holder != peer);
            if holders.len() >= HOLDERS_MAX {
                holders.remove(0);
            }
            holders.push(peer);
        }
    }

    /// `peer` said, on admission, that it holds only the first `cached_tokens` of the prompt: what was thought beyond is
    /// wrong.
    pub fn note_cached(&mut self, peer: &NodeId, chain: &PrefixChain, cached_tokens: u32) {
        let held = usize::try_from(cached_tokens / BLOCK_TOKENS).unwrap_or(usize::MAX);
        for block in chain.0.iter().skip(held) {
            if let Some(holders) = self.holders.peek_mut(block) {
                holders.retain(|holder| holder != peer);
            }
        }
    }

    /// `peer` has lost everything: its process ended.
    pub fn forget(&mut self, peer: &NodeId) {
        for (_, holders) in self.holders.iter_mut() {
            holders.retain(|holder| holder != peer);
        }
    }

    /// How many tokens of the prompt `peer` may still hold.
    pub fn cached_tokens(&self, peer: &NodeId, chain: &PrefixChain) -> u32 {
        let holds = |block: &&BlockHash| self.holders.peek(block).is_some_and(|holders| holders.contains(peer));
        let blocks = chain.0.iter().take_while(holds).count();
        u32::try_from(blocks).unwrap_or(u32::MAX).saturating_mul(BLOCK_TOKENS)
    }
}
