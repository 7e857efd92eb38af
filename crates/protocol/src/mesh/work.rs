//! The work stream: one request between a driver and a worker, or one stage of a ring.
//!
//! ```text
//! driver                      worker
//!   Open            ->
//!                   <-   Admitted, or Refused and the end
//!                   <-   Prefill ...          while the prompt is computed
//!                   <-   Tokens ...
//!                   <-   Finished, or Failed
//! ```
//!
//! The driver resets the stream to cancel. A stream that ends before [`Work::Finished`] is no answer: the driver opens the
//! same request, with the tokens it has, elsewhere.
//!
//! A driver that lacks the vocabulary of a model asks for it on a stream of its own: [`Work::GetCard`], answered with
//! [`Work::Card`] and [`Work::CardPart`]s, which [`super::card::CardAssembly`] puts together.
//!
//! A driver whose model is spread over several machines opens a stream to the host of each stage:
//!
//! ```text
//! driver                      host of a stage
//!   Stage           ->
//!                   <-   frames: Progress ..., then Loaded, or LoadFailed and the end
//!   frames: Route   ->
//!   frames: Open, Tokens or Hidden, Close ...
//!                   <-   frames: Opened, Hidden or Sampled, Done, RouteLost ...
//!
//! host of stage i             host of stage i + 1, or one that stands by for it
//!   Hop             ->
//!                   <-   frame: Progress
//!   frames: Hidden ...
//! ```
//!
//! A driver whose model is guessed for elsewhere opens a stream to the node that does it:
//!
//! ```text
//! driver                      node with a small model
//!   Draft           ->
//!                   <-   frames: Progress ..., then Loaded, or LoadFailed and the end
//!   frames: Open, Tokens, Rewind, Close ...
//!                   <-   frames: Opened, Sampled, Done ...; Progress as a sign of life
//! ```
//!
//! That model is a stage of a ring of its own, which is all of it. The sampling parameters come with `Open`, so that both models draw the
//! same noise; tokens that were chosen and were not guessed so come with their position and epoch, like all rows.
//!
//! How bytes of model files are asked for stands at [`super::content`], and what was signed of them at [`super::attestation`].
//!
//! After [`Work::Stage`] both directions carry [`crate::frame`]s and nothing else, as between a driver and its child process,
//! only that the request itself stands for the frame that says what to load. The driver's [`Route`](crate::stage::Route) says
//! where hidden states go: back on this stream, or to another host on streams of their own, one for each session that runs. Each
//! of them begins with [`Work::Hop`] and then carries frames of [`Kind::Hidden`](crate::frame::Kind::Hidden) in this one
//! direction.

use super::attestation::{Attestations, GetAttestations, SignedAttestation};
use super::body::Body;
use super::card::{CARD_BYTES_MAX, CARD_PART_BYTES_MAX};
use super::check::{self, open_enum};
use super::content::{Content, Fetch, WatchContent};
use super::error::MessageError;
use super::hello::REASON_BYTES_MAX;
use super::id::{ModelDigest, RingId, TokenizerDigest};
use super::open::{Open, pairs};
use super::proto;
use super::ring::{DraftOpen, Hop, StageOpen};
use super::wire::{Message, UNKNOWN_BODY_BYTES_MAX};
use crate::sampling::Sampled;

/// Tokens in one message.
pub const TOKENS_MAX: usize = 64;
/// Alternatives reported with one token.
pub const ALTERNATIVES_MAX: usize = 255;
/// Longest time a worker may keep a place for a request that does not move.
pub const LEASE_MS_MAX: u32 = 600_000;
/// Longest time after which a busy worker may ask to be tried again.
pub const RETRY_MS_MAX: u32 = 60_000;

const SMALL_BODY_BYTES_MAX: usize = 1_024;

/// A message of the work stream.
#[derive(Debug, Clone, PartialEq)]
pub enum Work {
    /// Driver: the request.
    Open(Box<Open>),
    /// Worker: there is room, and it is kept.
    Admitted(Admitted),
    /// Worker: the request is not taken.
    Refused(Refused),
    /// Worker: how far the prompt is computed.
    Prefill(Prefill),
    /// Worker: the answer's next tokens.
    Tokens(Tokens),
    /// Worker: the answer is complete.
    Finished(Finished),
    /// Worker: the answer cannot be completed here.
    Failed(Failed),
    /// Driver: asks for a model's tokenizer card.
    GetCard(ModelDigest),
    /// Worker: the card follows.
    Card(Card),
    /// Worker: the card's next bytes, 1..=[`CARD_PART_BYTES_MAX`].
    CardPart(Vec<u8>),
    /// Driver: asks the host to be a stage of its ring. Frames follow, in both directions.
    Stage(Box<StageOpen>),
    /// Host of the stage before: the hidden states of the ring that the receiver knows under this id follow, as frames.
    Hop(RingId),
    /// What have you of this file?
    WatchContent(WatchContent),
    /// What a holder has of it.
    Content(Content),
    /// Send me these bytes.
    Fetch(Fetch),
    /// They follow.
    Sending,
    /// What was signed of this file?
    GetAttestations(ModelDigest),
    /// What a holder knows of that, at most [`ATTESTATIONS_MAX`](super::attestation::ATTESTATIONS_MAX).
    Attestations(Vec<SignedAttestation>),
    /// Driver: asks for guesses of what its model will say. Frames follow, in both directions.
    Draft(DraftOpen),
    /// A message that this version does not know: to be ignored. Encodes as an empty one.
    Unknown {
        /// Its kind.
        kind: u16,
    },
}

/// A request was admitted: its memory is set aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Admitted {
    /// How long the worker keeps the place without progress, at most [`LEASE_MS_MAX`]; a longer one arrives as that.
    pub lease_ms: u32,
    /// Leading tokens whose KV the worker already has.
    pub cached_tokens: u32,
}

/// A request was not admitted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refused {
    /// No room now.
    Busy {
        /// When to try again, at most [`RETRY_MS_MAX`]; a longer time arrives as that.
        retry_ms: u32,
    },
    /// Never enough room, as asked.
    NoMemory {
        /// What is too large, for people.
        reason: String,
    },
    /// No worker would take it, as asked.
    BadRequest {
        /// What is wrong, for people.
        reason: String,
    },
    /// This model, build or mode is not served here (any more).
    NotServed {
        /// What is served instead, for people.
        reason: String,
    },
    /// A refusal of a newer version: try elsewhere.
    Unknown {
        /// Why, for people.
        reason: String,
    },
}

/// Progress of the prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefill {
    /// Tokens computed or found in the cache so far, resumed answer included.
    pub done_tokens: u32,
    /// How many of them came from the cache.
    pub cached_tokens: u32,
}

/// Tokens of the answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Tokens {
    /// Place of the first one in the answer, counted from 0 at the answer's very first token: a request that is resumed
    /// with n tokens goes on at n.
    pub first: u32,
    /// The tokens, 1..=[`TOKENS_MAX`], each with at most [`ALTERNATIVES_MAX`] alternatives.
    pub sampled: Vec<Sampled>,
}

/// Why an answer is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// The model or the grammar ended it.
    EndOfText,
    /// `max_tokens` or the context was reached.
    Length,
    /// A reason of a newer version.
    Unknown,
}

open_enum!(FinishReason { EndOfText, Length });

/// The account of a complete answer, of this worker's part of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Finished {
    /// Why it is complete.
    pub reason: FinishReason,
    /// Tokens it was given: prompt and resumed answer.
    pub prompt_tokens: u32,
    /// How many of them came from the cache.
    pub cached_tokens: u32,
    /// Tokens it generated.
    pub generated_tokens: u32,
    /// Time from admission to the first token.
    pub prefill_us: u64,
    /// Time from the first token to the last.
    pub decode_us: u64,
    /// Tokens of the answer that it had guessed.
    pub right_guesses: u32,
    /// Tokens that it had guessed and that were not chosen.
    pub wrong_guesses: u32,
}

/// What kept a worker from completing an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FailureCode {
    /// The engine failed and could not take the request up again.
    Engine,
    /// The worker leaves the mesh or unloads the model.
    Leaving,
    /// The driver took no tokens for as long as the lease.
    LeaseExpired,
    /// A message that cannot be understood, or at the wrong moment.
    BadMessage,
    /// A code of a newer version: read the reason.
    Unknown,
}

open_enum!(FailureCode { Engine, Leaving, LeaseExpired, BadMessage });

/// An answer cannot be completed here. Tokens that came before it are good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failed {
    /// For programs.
    pub code: FailureCode,
    /// For people: at most [`REASON_BYTES_MAX`] bytes without control characters, which is what is left of a longer one.
    pub reason: String,
}

impl Failed {
    /// A failure; the reason is cut and cleaned to what can be sent.
    pub fn new(code: FailureCode, reason: &str) -> Failed {
        Failed { code, reason: check::cleaned(reason, REASON_BYTES_MAX) }
    }
}

/// What a tokenizer card will be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Card {
    /// BLAKE3 of its bytes.
    pub tokenizer: TokenizerDigest,
    /// Its length, 1..=[`CARD_BYTES_MAX`].
    pub total_bytes: u32,
}

const OPEN: u16 = 1;
const ADMITTED: u16 = 2;
const REFUSED: u16 = 3;
const PREFILL: u16 = 4;
const TOKENS: u16 = 5;
const FINISHED: u16 = 6;
const FAILED: u16 = 7;
const GET_CARD: u16 = 8;
const CARD: u16 = 9;
const CARD_PART: u16 = 10;
const STAGE: u16 = 11;
const HOP: u16 = 12;
const WATCH_CONTENT: u16 = 13;
const CONTENT: u16 = 14;
const FETCH: u16 = 15;
const SENDING: u16 = 16;
const GET_ATTESTATIONS: u16 = 17;
const ATTESTATIONS: u16 = 18;
const DRAFT: u16 = 19;

impl Message for Work {
    fn kind(&self) -> u16 {
        match self {
            Work::Open(_) => OPEN,
            Work::Admitted(_) => ADMITTED,
            Work::Refused(_) => REFUSED,
            Work::Prefill(_) => PREFILL,
            Work::Tokens(_) => TOKENS,
            Work::Finished(_) => FINISHED,
            Work::Failed(_) => FAILED,
            Work::GetCard(_) => GET_CARD,
            Work::Card(_) => CARD,
            Work::CardPart(_) => CARD_PART,
            Work::Stage(_) => STAGE,
            Work::Hop(_) => HOP,
            Work::WatchContent(_) => WATCH_CONTENT,
            Work::Content(_) => CONTENT,
            Work::Fetch(_) => FETCH,
            Work::Sending => SENDING,
            Work::GetAttestations(_) => GET_ATTESTATIONS,
            Work::Attestations(_) => ATTESTATIONS,
            Work::Draft(_) => DRAFT,
            Work::Unknown { kind } => *kind,
        }
    }

    fn body_bytes_max(kind: u16) -> usize {
        match kind {
            OPEN => Open::BYTES_MAX,
            ADMITTED => Admitted::BYTES_MAX,
            REFUSED => Refused::BYTES_MAX,
            PREFILL => Prefill::BYTES_MAX,
            TOKENS => Tokens::BYTES_MAX,
            FINISHED => Finished::BYTES_MAX,
            FAILED => Failed::BYTES_MAX,
            GET_CARD => GetCard::BYTES_MAX,
            CARD => Card::BYTES_MAX,
            CARD_PART => CardPart::BYTES_MAX,
            STAGE => StageOpen::BYTES_MAX,
            HOP => Hop::BYTES_MAX,
            WATCH_CONTENT => WatchContent::BYTES_MAX,
            CONTENT => Content::BYTES_MAX,
            FETCH => Fetch::BYTES_MAX,
            SENDING => 0,
            GET_ATTESTATIONS => GetAttestations::BYTES_MAX,
            ATTESTATIONS => Attestations::BYTES_MAX,
            DRAFT => DraftOpen::BYTES_MAX,
            _ => UNKNOWN_BODY_BYTES_MAX,
        }
    }

    fn encode_body(&self) -> Result<Vec<u8>, MessageError> {
        match self {
            Work::Open(open) => open.encode(),
            Work::Admitted(admitted) => admitted.encode(),
            Work::Refused(refused) => refused.encode(),
            Work::Prefill(prefill) => prefill.encode(),
            Work::Tokens(tokens) => tokens.encode(),
            Work::Finished(finished) => finished.encode(),
            Work::Failed(failed) => failed.encode(),
            Work::GetCard(model) => GetCard(*model).encode(),
            Work::Card(card) => card.encode(),
            Work::CardPart(bytes) => CardPart(bytes.clone()).encode(),
            Work::Stage(open) => open.encode(),
            Work::Hop(ring) => Hop(*ring).encode(),
            Work::WatchContent(watch) => watch.encode(),
            Work::Content(content) => content.encode(),
            Work::Fetch(fetch) => fetch.encode(),
            Work::Sending => Ok(Vec::new()),
            Work::GetAttestations(model) => GetAttestations(*model).encode(),
            Work::Attestations(signed) => Attestations(signed.clone()).encode(),
            Work::Draft(open) => open.encode(),
            Work::Unknown { kind } if (OPEN..=DRAFT).contains(kind) => {
                Err(MessageError::Invalid { what: "kind", why: "it is known, and its message is not given" })
            }
            Work::Unknown { .. } => Ok(Vec::new()),
        }
    }

    fn decode_body(kind: u16, body: &[u8]) -> Result<Work, MessageError> {
        Ok(match kind {
            OPEN => Work::Open(Box::new(Body::decode(body)?)),
            ADMITTED => Work::Admitted(Body::decode(body)?),
            REFUSED => Work::Refused(Body::decode(body)?),
            PREFILL => Work::Prefill(Body::decode(body)?),
            TOKENS => Work::Tokens(Body::decode(body)?),
            FINISHED => Work::Finished(Body::decode(body)?),
            FAILED => Work::Failed(Body::decode(body)?),
            GET_CARD => Work::GetCard(GetCard::decode(body)?.0),
            CARD => Work::Card(Body::decode(body)?),
            CARD_PART => Work::CardPart(CardPart::decode(body)?.0),
            STAGE => Work::Stage(Box::new(Body::decode(body)?)),
            HOP => Work::Hop(Hop::decode(body)?.0),
            WATCH_CONTENT => Work::WatchContent(Body::decode(body)?),
            CONTENT => Work::Content(Body::decode(body)?),
            FETCH => Work::Fetch(Body::decode(body)?),
            SENDING => Work::Sending,
            GET_ATTESTATIONS => Work::GetAttestations(GetAttestations::decode(body)?.0),
            ATTESTATIONS => Work::Attestations(Attestations::decode(body)?.0),
            DRAFT => Work::Draft(Body::decode(body)?),
            kind => Work::Unknown { kind },
        })
    }
}

impl Body for Admitted {
    type Proto = proto::Admitted;
    const WHAT: &'static str = "admission";
    const BYTES_MAX: usize = SMALL_BODY_BYTES_MAX;

    fn to_proto(&self) -> Result<proto::Admitted, MessageError> {
        Ok(proto::Admitted { lease_ms: self.lease_ms.min(LEASE_MS_MAX), cached_tokens: self.cached_tokens })
    }

    fn from_proto(proto: proto::Admitted) -> Result<Admitted, MessageError> {
        Ok(Admitted { lease_ms: proto.lease_ms.min(LEASE_MS_MAX), cached_tokens: proto.cached_tokens })
    }
}

impl Body for Refused {
    type Proto = proto::Refused;
    const WHAT: &'static str = "refusal";
    const BYTES_MAX: usize = SMALL_BODY_BYTES_MAX;

    fn to_proto(&self) -> Result<proto::Refused, MessageError> {
        use proto::RefusedCode as Code;
        let (code, retry_ms, reason) = match self {
            Refused::Busy { retry_ms } => (Code::Busy, (*retry_ms).min(RETRY_MS_MAX), ""),
            Refused::NoMemory { reason } => (Code::NoMemory, 0, reason.as_str()),
            Refused::BadRequest { reason } => (Code::BadRequest, 0, reason.as_str()),
            Refused::NotServed { reason } => (Code::NotServed, 0, reason.as_str()),
            Refused::Unknown { reason } => (Code::Unspecified, 0, reason.as_str()),
        };
        Ok(proto::Refused { code: code.into(), retry_ms, reason: check::cleaned(reason, REASON_BYTES_MAX) })
    }

    fn from_proto(proto: proto::Refused) -> Result<Refused, MessageError> {
        use proto::RefusedCode as Code;
        let reason = check::cleaned(&proto.reason, REASON_BYTES_MAX);
        Ok(match Code::try_from(proto.code) {
            Ok(Code::Busy) => Refused::Busy { retry_ms: proto.retry_ms.min(RETRY_MS_MAX) },
            Ok(Code::NoMemory) => Refused::NoMemory { reason },
            Ok(Code::BadRequest) => Refused::BadRequest { reason },
            Ok(Code::NotServed) => Refused::NotServed { reason },
            Ok(Code::Unspecified) | Err(_) => Refused::Unknown { reason },
        })
    }
}

impl Body for Prefill {
    type Proto = proto::Prefill;
    const WHAT: &'static str = "progress";
    const BYTES_MAX: usize = SMALL_BODY_BYTES_MAX;

    fn to_proto(&self) -> Result<proto::Prefill, MessageError> {
        Ok(proto::Prefill { done_tokens: self.done_tokens, cached_tokens: self.cached_tokens })
    }

    fn from_proto(proto: proto::Prefill) -> Result<Prefill, MessageError> {
        Ok(Prefill { done_tokens: proto.done_tokens, cached_tokens: proto.cached_tokens })
    }
}

impl Body for Tokens {
    type Proto = proto::Tokens;
    const WHAT: &'static str = "tokens";
    const BYTES_MAX: usize = TOKENS_MAX * (8 * ALTERNATIVES_MAX + 64) + 16;

    fn to_proto(&self) -> Result<proto::Tokens, MessageError> {
        check_tokens(self.first, self.sampled.len())?;
        let sampled = self.sampled.iter().map(sampled_to_proto).collect::<Result<_, _>>()?;
        Ok(proto::Tokens { first: self.first, sampled })
    }

    fn from_proto(proto: proto::Tokens) -> Result<Tokens, MessageError> {
        check_tokens(proto.first, proto.sampled.len())?;
        let sampled = proto.sampled.into_iter().map(sampled_from_proto).collect::<Result<_, _>>()?;
        Ok(Tokens { first: proto.first, sampled })
    }
}

fn check_tokens(first: u32, count: usize) -> Result<(), MessageError> {
    if count == 0 {
        return Err(MessageError::Missing("tokens"));
    }
    check::count("tokens", count, TOKENS_MAX)?;
    match u32::try_from(count).ok().and_then(|count| first.checked_add(count)) {
        Some(_) => Ok(()),
        None => Err(MessageError::Invalid { what: "first", why: "no answer is that long" }),
    }
}

fn sampled_to_proto(sampled: &Sampled) -> Result<proto::Sampled, MessageError> {
    check_sampled(sampled)?;
    let Sampled { token, logprob, top, grammar_ended } = sampled;
    Ok(proto::Sampled {
        token: *token,
        logprob: *logprob,
        top_tokens: top.iter().map(|&(token, _)| token).collect(),
        top_logprobs: top.iter().map(|&(_, logprob)| logprob).collect(),
        grammar_ended: *grammar_ended,
    })
}

fn sampled_from_proto(proto: proto::Sampled) -> Result<Sampled, MessageError> {
    let sampled = Sampled {
        token: proto.token,
        logprob: proto.logprob,
        top: pairs("alternatives", proto.top_tokens, proto.top_logprobs, ALTERNATIVES_MAX)?,
        grammar_ended: proto.grammar_ended,
    };
    check_sampled(&sampled)?;
    Ok(sampled)
}

fn check_sampled(sampled: &Sampled) -> Result<(), MessageError> {
    check::count("alternatives", sampled.top.len(), ALTERNATIVES_MAX)?;
    if sampled.token < 0 || sampled.top.iter().any(|&(token, _)| token < 0) {
        return Err(MessageError::Invalid { what: "tokens", why: "a token id is negative" });
    }
    Ok(())
}

impl Body for Finished {
    type Proto = proto::Finished;
    const WHAT: &'static str = "account";
    const BYTES_MAX: usize = SMALL_BODY_BYTES_MAX;

    fn to_proto(&self) -> Result<proto::Finished, MessageError> {
        Ok(proto::Finished {
            reason: self.reason.to_wire(),
            prompt_tokens: self.prompt_tokens,
            cached_tokens: self.cached_tokens,
            generated_tokens: self.generated_tokens,
            prefill_us: self.prefill_us,
            decode_us: self.decode_us,
            right_guesses: self.right_guesses,
            wrong_guesses: self.wrong_guesses,
        })
    }

    fn from_proto(proto: proto::Finished) -> Result<Finished, MessageError> {
        Ok(Finished {
            reason: FinishReason::from_wire(proto.reason),
            prompt_tokens: proto.prompt_tokens,
            cached_tokens: proto.cached_tokens,
            generated_tokens: proto.generated_tokens,
            prefill_us: proto.prefill_us,
            decode_us: proto.decode_us,
            right_guesses: proto.right_guesses,
            wrong_guesses: proto.wrong_guesses,
        })
    }
}

impl Body for Failed {
    type Proto = proto::Failed;
    const WHAT: &'static str = "failure";
    const BYTES_MAX: usize = SMALL_BODY_BYTES_MAX;

    fn to_proto(&self) -> Result<proto::Failed, MessageError> {
        check::text("reason", &self.reason, REASON_BYTES_MAX)?;
        Ok(proto::Failed { code: self.code.to_wire(), reason: self.reason.clone() })
    }

    fn from_proto(proto: proto::Failed) -> Result<Failed, MessageError> {
        Ok(Failed::new(FailureCode::from_wire(proto.code), &proto.reason))
    }
}

/// The body of [`Work::GetCard`].
struct GetCard(ModelDigest);

impl Body for GetCard {
    type Proto = proto::GetCard;
    const WHAT: &'static str = "request for a card";
    const BYTES_MAX: usize = 256;

    fn to_proto(&self) -> Result<proto::GetCard, MessageError> {
        Ok(proto::GetCard { model: self.0.as_bytes().to_vec() })
    }

    fn from_proto(proto: proto::GetCard) -> Result<GetCard, MessageError> {
        Ok(GetCard(ModelDigest::from_bytes(check::array("model digest", &proto.model)?)))
    }
}

impl Body for Card {
    type Proto = proto::Card;
    const WHAT: &'static str = "card";
    const BYTES_MAX: usize = 256;

    fn to_proto(&self) -> Result<proto::Card, MessageError> {
        check_card_length(self.total_bytes)?;
        Ok(proto::Card { tokenizer: self.tokenizer.as_bytes().to_vec(), total_bytes: self.total_bytes })
    }

    fn from_proto(proto: proto::Card) -> Result<Card, MessageError> {
        check_card_length(proto.total_bytes)?;
        let tokenizer = TokenizerDigest::from_bytes(check::array("tokenizer digest", &proto.tokenizer)?);
        Ok(Card { tokenizer, total_bytes: proto.total_bytes })
    }
}

fn check_card_length(total_bytes: u32) -> Result<(), MessageError> {
    if total_bytes == 0 {
        return Err(MessageError::Missing("length of the card"));
    }
    check::size("card", usize::try_from(total_bytes).unwrap_or(usize::MAX), CARD_BYTES_MAX)
}

/// The body of [`Work::CardPart`].
struct CardPart(Vec<u8>);

impl Body for CardPart {
    type Proto = proto::CardPart;
    const WHAT: &'static str = "part of a card";
    const BYTES_MAX: usize = CARD_PART_BYTES_MAX + 16;

    fn to_proto(&self) -> Result<proto::CardPart, MessageError> {
        check_card_part(&self.0)?;
        Ok(proto::CardPart { bytes: self.0.clone() })
    }

    fn from_proto(proto: proto::CardPart) -> Result<CardPart, MessageError> {
        check_card_part(&proto.bytes)?;
        Ok(CardPart(proto.bytes))
    }
}

fn check_card_part(bytes: &[u8]) -> Result<(), MessageError> {
    if bytes.is_empty() {
        return Err(MessageError::Missing("bytes of the card"));
    }
    check::size(CardPart::WHAT, bytes.len(), CARD_PART_BYTES_MAX)
}
