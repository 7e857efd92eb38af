//! Requests of other nodes, answered by this node's engines.
//!
//! One stream per request. The worker checks everything itself (a driver may be anybody), admits before it accepts, sends
//! signs of life until the first token, and stops within a step when the driver resets the stream. A driver that does not
//! read holds its own session back, for as long as its lease.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, Instant},
};

use murmur_api::backend::Guesses;
use murmur_engine::{Ending, SessionEvent, SessionRequest, StartError};
use murmur_net::{
    NetError, SendStream, Work as Request,
    stream::{self, Reader, StreamEnd},
};
use murmur_protocol::frame::FrameError;
use murmur_protocol::mesh::{
    Admitted, Card, FailureCode, FinishReason, ModelDigest, NodeId, Open, Refused, Tokens, Work,
    card::CARD_PART_BYTES_MAX,
    work::{Failed, Finished, Prefill},
};
use murmur_sampling::Sampler;
use tokio::{
    task::JoinSet,
    time::{MissedTickBehavior, timeout},
};

use super::{
    CAPABILITIES, MeshNode, ModelIdentity, both,
    places::{Place, Places},
    ring::{self, FrameReader},
};
use crate::{
    Node, NodeError,
    contents::give,
    model::{LoadedModel, Model, with_causes},
    models::{Awaited, LocalStream},
    requests::{Asker, Request as Listed},
};

/// A stream says what it wants within this.
const OPEN_DEADLINE: Duration = Duration::from_secs(10);
/// How often a driver hears that its prompt is being worked on.
const HEARTBEAT: Duration = Duration::from_millis(250);
/// What a request that found no room should wait before it comes again.
pub(super) const RETRY_MS: u32 = 250;
/// Streams of one node at the same time, those of cards and stages included.
const STREAMS_PER_NODE_MAX: usize = 64;
/// Speeds of so many tokens and more are measurements.
const MEASURED_TOKENS_MIN: u32 = 32;
/// Weight of a new measurement in the moving average.
const SMOOTHING: f64 = 0.25;

/// How fast this node reads prompts, by model.
#[derive(Default)]
pub(super) struct Speeds(Mutex<HashMap<ModelDigest, f64>>);

impl Speeds {
    fn speeds(&self) -> MutexGuard<'_, HashMap<ModelDigest, f64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// 0: not measured.
    pub(super) fn prefill_us_per_token(&self, model: &ModelDigest) -> u32 {
        self.speeds().get(model).map_or(0, |&us| us as u32)
    }

    fn note_prefill(&self, model: ModelDigest, took: Duration, tokens: u32) {
        if tokens >= MEASURED_TOKENS_MIN {
            let us = took.as_secs_f64() * 1e6 / f64::from(tokens);
            let mut speeds = self.speeds();
            let average = speeds.entry(model).or_insert(us);
            *average += SMOOTHING * (us - *average);
        }
    }
}

/// Takes requests until the mesh is left.
pub(super) async fn run(node: Weak<Node>, mesh: Weak<MeshNode>) {
    let Some(accepting) = mesh.upgrade().map(|mesh| Arc::clone(mesh.mesh())) else { return };
    let places = Arc::new(Places::new(STREAMS_PER_NODE_MAX));
    let mut requests = JoinSet::new();
    loop {
        tokio::select! {
            request = accepting.accept_work() => {
                let Some(request) = request else { return };
                let Some((node, mesh)) = both(&node, &mesh) else { return };
                requests.spawn(serve(node, mesh, Arc::clone(&places), request));
            }
            Some(_) = requests.join_next(), if !requests.is_empty() => {}
        }
    }
}

async fn serve(node: Arc<Node>, mesh: Arc<MeshNode>, places: Arc<Places>, request: Request) {
    let Request { node: peer, mut send, mut recv } = request;
    let Some(mut place) = places.take(peer) else {
        // What it is for is not read, so no message would do for all: the other end may read messages, frames or bytes.
        return StreamEnd::Busy.tell(&mut send, Some(&mut recv));
    };
    let mut back = Back { send, lease: mesh.lease };
    let mut reader = Reader::<Work>::new(recv);
    let answered = match timeout(OPEN_DEADLINE, reader.expect()).await {
        Ok(Ok(Work::Open(open))) => generate(&node, &mesh, &mut place, *open, &mut back).await,
        Ok(Ok(Work::GetCard(model))) => hand_out_card(&node, model, &mut back).await,
        Ok(Ok(Work::WatchContent(watch))) => give::tell(&node, watch, &mut back.send).await,
        Ok(Ok(Work::GetAttestations(model))) => give::tell_attestations(&node, model, &mut back.send).await,
        Ok(Ok(Work::Fetch(fetch))) => {
            // Counted there.
            drop(place);
            return give::send(&node, peer, fetch, back.send).await;
        }
        Ok(Ok(Work::Stage(open))) => {
            let reader = frames(reader);
            return ended(peer, ring::host::serve(node, mesh, *open, reader, Box::pin(back.send)).await);
        }
        Ok(Ok(Work::Draft(open))) => {
            let reader = frames(reader);
            return ended(peer, ring::lend::serve(node, mesh, peer, open, reader, Box::pin(back.send)).await);
        }
        Ok(Ok(Work::Hop(id))) => {
            // Those of a ring are counted there.
            drop(place);
            return ended(peer, ring::take_hidden(&mesh, id, frames(reader), Box::pin(back.send)).await);
        }
        Ok(Ok(_)) => back.refuse("a stream begins with a request").await,
        Ok(Err(error)) => back.refuse(&error.to_string()).await,
        Err(_) => back.refuse("no request came").await,
    };
    match &answered {
        Ok(()) => stream::finish(&mut back.send),
        Err(error) => {
            tracing::debug!("a request of {}: {error}", peer.short());
            match error {
                // No message gets through where nothing is read.
                NetError::Late(_) => StreamEnd::LeaseExpired.tell(&mut back.send, None),
                _ => stream::finish(&mut back.send),
            }
        }
    }
}

/// The rest of a stream as frames.
fn frames(reader: Reader<Work>) -> FrameReader {
    let (recv, begun) = reader.into_rest();
    FrameReader::new(Box::pin(recv), &begun)
}

fn ended(peer: NodeId, outcome: Result<(), FrameError>) {
    if let Err(error) = outcome {
        tracing::debug!("a stage for {}: {error}", peer.short());
    }
}

/// The way back to a driver.
struct Back {
    send: SendStream,
    /// How long the driver may leave it unread.
    lease: Duration,
}

impl Back {
    /// Writes a message, if the driver takes it within its lease.
    async fn say(&mut self, message: &Work) -> Result<(), NetError> {
        let written = timeout(self.lease, stream::write(&mut self.send, message)).await;
        written.unwrap_or(Err(NetError::Late("reading of tokens")))
    }

    async fn refuse(&mut self, reason: &str) -> Result<(), NetError> {
        self.say(&Work::Failed(Failed::new(FailureCode::BadMessage, reason))).await
    }
}

/// A model of this node, with its place in the list.
fn find<'a>(node: &'a Node, digest: &ModelDigest) -> Option<(usize, &'a Model, &'a ModelIdentity)> {
    let identified = node.models.iter().enumerate().filter_map(|(at, model)| Some((at, model, model.identity()?)));
    identified.into_iter().find(|(.., identity)| identity.digest == *digest)
}

async fn hand_out_card(node: &Node, model: ModelDigest, back: &mut Back) -> Result<(), NetError> {
    let Some((.., identity)) = find(node, &model) else {
        return back.refuse("this model is not served here").await;
    };
    let total_bytes = u32::try_from(identity.card.len()).unwrap_or(u32::MAX);
    back.say(&Work::Card(Card { tokenizer: identity.tokenizer, total_bytes })).await?;
    for part in identity.card.chunks(CARD_PART_BYTES_MAX) {
        back.say(&Work::CardPart(part.to_vec())).await?;
    }
    Ok(())
}

async fn generate(
    node: &Node,
    mesh: &MeshNode,
    place: &mut Place,
    open: Open,
    back: &mut Back,
) -> Result<(), NetError> {
    place.count_as_request();
    let (model, begun) = (open.model, Instant::now());
    let had = u32::try_from(open.generated.len()).unwrap_or(u32::MAX);
    let prompt_tokens = u32::try_from(open.prompt.len()).unwrap_or(u32::MAX).saturating_add(had);
    let (session, listed) = match admit(node, place, open, prompt_tokens, back).await {
        Ok(admitted) => admitted,
        Err(because) => return back.say(&Work::Refused(because)).await,
    };
    let mut answer = Answer {
        listed,
        next: had,
        first: had,
        prompt_tokens,
        cached_tokens: None,
        begun,
        first_token: None,
        guesses: Guesses::default(),
    };
    let outcome = answer.send(session, back).await;
    if let Some(first_token) = answer.first_token {
        let computed = prompt_tokens.saturating_sub(answer.cached_tokens.unwrap_or(0));
        mesh.speeds.note_prefill(model, first_token - begun, computed);
    }
    outcome
}

/// Checks a request and starts it.
async fn admit(
    node: &Node,
    place: &Place,
    open: Open,
    prompt_tokens: u32,
    back: &mut Back,
) -> Result<(LocalStream, Listed), Refused> {
    let not_served = |reason: &str| Refused::NotServed { reason: reason.to_owned() };
    if let Some(reason) = node.gate.paused() {
        return Err(not_served(&format!("this node pauses: {reason}")));
    }
    let (at, model, identity) = find(node, &open.model).ok_or_else(|| not_served("this model is not served here"))?;
    if open.exact && !node.options().exact {
        return Err(not_served("this model is not served in exact mode here"));
    }
    if open.build.is_some_and(|build| build != murmur_engine::build_id()) {
        return Err(not_served("another build serves this model here"));
    }
    if open.tokenizer != identity.tokenizer {
        return Err(not_served("this model has another vocabulary here"));
    }
    if !CAPABILITIES.contains(open.requires) {
        return Err(not_served("the request needs what this node cannot do"));
    }
    let asker = Asker::Node(place.node);
    let listed = node.requests.begin_within(node.gate.requests_max(), model.id(), asker, prompt_tokens);
    let listed = listed.ok_or(Refused::Busy { retry_ms: RETRY_MS })?;
    let loaded = match model.used() {
        Some(loaded) => loaded,
        None if model.is_on_demand() => load(node, at, back).await?,
        None => return Err(not_served("this model is not loaded")),
    };
    let engine = &loaded.engine;
    let status = engine.status();
    let parallel = engine.options().parallel as usize;
    let is_full = status.running + status.queued >= parallel;
    if is_full && (status.queued >= parallel || place.is_beyond_share(parallel)) {
        return Err(Refused::Busy { retry_ms: RETRY_MS });
    }
    let bad = |reason: String| Refused::BadRequest { reason };
    let vocabulary = engine.tokenizer().vocabulary().clone();
    if let Some(token) = open.generated.iter().find(|token| !vocabulary.contains(**token)) {
        return Err(bad(format!("token {token} of the answer is not in the vocabulary")));
    }
    let (params, prompt) = (open.sampling.clone(), open.prompt.clone());
    let checked = tokio::task::spawn_blocking(move || Sampler::new(params, vocabulary, &prompt).map(drop));
    let checked = checked.await.map_err(|_| not_served("this node is stopping"))?;
    checked.map_err(|error| bad(error.to_string()))?;
    let Open { prompt, generated, max_tokens, sampling, .. } = open;
    let started =
        LocalStream::start(&node.models, at, loaded, SessionRequest { prompt, generated, max_tokens, sampling });
    let session = started.map_err(|error| match error {
        StartError::QueueFull(_) => Refused::Busy { retry_ms: RETRY_MS },
        StartError::Unavailable(reason) => Refused::NotServed { reason },
        StartError::WrongLength { .. } => Refused::NoMemory { reason: error.to_string() },
        StartError::NoStages => bad(error.to_string()),
    })?;
    Ok((session, listed))
}

/// Loads a model for a request. The driver hears meanwhile that it is worked on.
async fn load(node: &Node, at: usize, back: &mut Back) -> Result<Arc<LoadedModel>, Refused> {
    let refused = |error: NodeError| match error {
        NodeError::Fit { .. } => Refused::NoMemory { reason: error.to_string() },
        error => Refused::NotServed { reason: with_causes(&error) },
    };
    let mut waking = node.models.wake(at).await.map_err(refused)?;
    loop {
        match waking.next().await {
            Awaited::Loaded(loaded) => return Ok(loaded),
            Awaited::Failed(reason) => return Err(Refused::NotServed { reason }),
            Awaited::Loading(_) => {
                let working = Work::Prefill(Prefill { done_tokens: 0, cached_tokens: 0 });
                back.say(&working).await.map_err(|error| Refused::NotServed { reason: error.to_string() })?;
            }
        }
    }
}

/// An answer on its way.
struct Answer {
    listed: Listed,
    /// Place of the next token.
    next: u32,
    /// Place of this worker's first token.
    first: u32,
    prompt_tokens: u32,
    /// Known once the engine has room for the request.
    cached_tokens: Option<u32>,
    begun: Instant,
    first_token: Option<Instant>,
    guesses: Guesses,
}

impl Answer {
    async fn send(&mut self, mut session: LocalStream, back: &mut Back) -> Result<(), NetError> {
        let left = back.send.stopped();
        tokio::pin!(left);
        let mut heartbeat = tokio::time::interval(HEARTBEAT);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut done_tokens = 0;
        loop {
            let event = tokio::select! {
                // Reset, or the connection is gone.
                _ = &mut left => return Ok(()),
                event = session.next() => event,
                _ = heartbeat.tick(), if self.first_token.is_none() => {
                    let cached_tokens = self.cached_tokens.unwrap_or(0);
                    back.say(&Work::Prefill(Prefill { done_tokens, cached_tokens })).await?;
                    continue;
                }
            };
            match event {
                Some(SessionEvent::Prefill { done_tokens: done, cached_tokens }) => {
                    done_tokens = done;
                    self.listed.prefilled(done);
                    self.admitted(back, cached_tokens).await?;
                    back.say(&Work::Prefill(Prefill { done_tokens, cached_tokens })).await?;
                }
                Some(SessionEvent::Token(sampled)) => {
                    self.admitted(back, 0).await?;
                    self.first_token.get_or_insert_with(Instant::now);
                    self.listed.token();
                    let tokens = Tokens { first: self.next, sampled: vec![sampled] };
                    self.next = self.next.saturating_add(1);
                    back.say(&Work::Tokens(tokens)).await?;
                }
                Some(SessionEvent::Guesses { right, wrong }) => self.guesses = Guesses { right, wrong },
                Some(SessionEvent::Ended(ending)) => return back.say(&Work::Finished(self.account(ending))).await,
                Some(SessionEvent::Failed(reason) | SessionEvent::Lost(reason)) => {
                    return back.say(&Work::Failed(Failed::new(FailureCode::Engine, &reason))).await;
                }
                None => {
                    return back.say(&Work::Failed(Failed::new(FailureCode::Leaving, "the node is stopping"))).await;
                }
            }
        }
    }

    /// Says once that there is room.
    async fn admitted(&mut self, back: &mut Back, cached_tokens: u32) -> Result<(), NetError> {
        if self.cached_tokens.is_some() {
            return Ok(());
        }
        self.cached_tokens = Some(cached_tokens);
        let lease_ms = u32::try_from(back.lease.as_millis()).unwrap_or(u32::MAX);
        back.say(&Work::Admitted(Admitted { lease_ms, cached_tokens })).await
    }

    fn account(&self, ending: Ending) -> Finished {
        let us = |duration: Duration| u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        let first_token = self.first_token.unwrap_or_else(Instant::now);
        Finished {
            reason: match ending {
                Ending::EndOfText => FinishReason::EndOfText,
                Ending::Length => FinishReason::Length,
            },
            prompt_tokens: self.prompt_tokens,
            cached_tokens: self.cached_tokens.unwrap_or(0),
            generated_tokens: self.next - self.first,
            prefill_us: us(first_token - self.begun),
            decode_us: us(first_token.elapsed()),
            right_guesses: self.guesses.right,
            wrong_guesses: self.guesses.wrong,
        }
    }
}
