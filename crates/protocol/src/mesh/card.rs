//! Tokenizer cards: what a driver needs of a model that it does not hold.
//!
//! A driver tokenises, counts and detokenises, so it needs the vocabulary and the chat template. A card is a GGUF file with
//! the model's metadata and no tensors, a few megabytes; its BLAKE3 stands in the record of every node that serves the
//! model. It comes in parts, and counts only once all of it has the right hash.

use super::error::MessageError;
use super::id::TokenizerDigest;
use super::work::Card;

/// Longest card: the largest vocabularies in use take a quarter of it.
pub const CARD_BYTES_MAX: usize = 64 << 20;
/// Longest part of a card in one message.
pub const CARD_PART_BYTES_MAX: usize = 256 << 10;

/// Puts a card together from its parts.
#[derive(Debug)]
pub struct CardAssembly {
    tokenizer: TokenizerDigest,
    total_bytes: usize,
    bytes: Vec<u8>,
    hasher: blake3::Hasher,
}

/// Why a card is not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CardError {
    /// Its length breaks a limit.
    #[error("tokenizer card: {0}")]
    Message(#[from] MessageError),
    /// The peer offers another card than the one that was asked for.
    #[error("the peer offers tokenizer card {found}, not {expected}")]
    Another {
        /// What was asked for.
        expected: TokenizerDigest,
        /// What is offered.
        found: TokenizerDigest,
    },
    /// More bytes came than were announced.
    #[error("the tokenizer card is longer than announced")]
    TooLong,
    /// The bytes are not those that were asked for.
    #[error("the tokenizer card does not have the hash that was asked for")]
    Damaged,
}

impl CardAssembly {
    /// Begins with what the peer announced. Nothing is allocated on its word.
    pub fn new(card: Card, expected: TokenizerDigest) -> Result<CardAssembly, CardError> {
        if card.tokenizer != expected {
            return Err(CardError::Another { expected, found: card.tokenizer });
        }
        let total_bytes = usize::try_from(card.total_bytes).unwrap_or(usize::MAX);
        if total_bytes > CARD_BYTES_MAX {
            return Err(MessageError::TooLarge { what: "card", bytes: total_bytes, limit: CARD_BYTES_MAX }.into());
        }
        Ok(CardAssembly { tokenizer: expected, total_bytes, bytes: Vec::new(), hasher: blake3::Hasher::new() })
    }

    /// Adds a part. Gives the card back once it is complete and right; `Ok(None)` while more is to come.
    pub fn push(&mut self, part: &[u8]) -> Result<Option<Vec<u8>>, CardError> {
        if part.len() > self.total_bytes - self.bytes.len() {
            return Err(CardError::TooLong);
        }
        self.hasher.update(part);
        self.bytes.extend_from_slice(part);
        if self.bytes.len() < self.total_bytes {
            return Ok(None);
        }
        if TokenizerDigest::from_bytes(self.hasher.finalize().into()) != self.tokenizer {
            return Err(CardError::Damaged);
        }
        Ok(Some(self.bytes.clone()))
    }
}

/// The digest of a card's bytes.
pub fn card_digest(card: &[u8]) -> TokenizerDigest {
    TokenizerDigest::from_bytes(blake3::hash(card).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn announced(bytes: &[u8]) -> Card {
        Card { tokenizer: card_digest(bytes), total_bytes: bytes.len() as u32 }
    }

    #[test]
    fn a_card_comes_together_from_parts_of_any_length() {
        let bytes: Vec<u8> = (0..10_000u32).map(|i| i as u8).collect();
        for part_bytes in [1, 7, 4_096, 10_000] {
            let mut assembly = CardAssembly::new(announced(&bytes), card_digest(&bytes)).unwrap();
            let mut card = None;
            for part in bytes.chunks(part_bytes) {
                assert!(card.is_none());
                card = assembly.push(part).unwrap();
            }
            assert_eq!(card.as_ref(), Some(&bytes));
        }
    }

    #[test]
    fn a_card_that_is_another_longer_or_damaged_is_refused() {
        let other = card_digest(b"other");
        let refused = CardAssembly::new(announced(b"card"), other).unwrap_err();
        assert!(matches!(refused, CardError::Another { expected, .. } if expected == other));

        let mut assembly = CardAssembly::new(announced(b"card"), card_digest(b"card")).unwrap();
        assert_eq!(assembly.push(b"car"), Ok(None));
        assert_eq!(assembly.push(b"ds"), Err(CardError::TooLong));
        assert_eq!(assembly.push(b"t"), Err(CardError::Damaged));

        let endless = Card { tokenizer: other, total_bytes: u32::MAX };
        assert!(matches!(CardAssembly::new(endless, other), Err(CardError::Message(_))));
    }
}
