//! A request of this node's user, answered by the mesh.
//!
//! `murmur_core::request` decides; this is its shell: one task per request that performs what the session asks for (open a
//! stream, cancel one, ping a peer, set a timer) and tells it what happens. Tokens go on to the reader through a bounded
//! channel; a reader that lags holds back the streams, and nobody is blamed for it.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use murmur_core::{
    prefix::PrefixChain,
    request::{Action, AttemptId, Event, Measured, Offer, RequestError, RequestLimits, Session},
    router::{Candidate, RequestFacts},
    time::Now,
};
use murmur_engine::{Ending, SessionEvent};
use murmur_net::{
    Mesh, NetError,
    stream::{self, Reader, StreamEnd},
};
use murmur_protocol::{
    mesh::{
        Capabilities, FailureCode, FinishReason, NodeId, Open, Refused, RequestId, ServedModel, Work,
        work::{Finished, Prefill},
    },
    sampling::{SamplingParams, Token},
};
use tokio::{
    sync::{mpsc, oneshot},
    task::{AbortHandle, JoinSet},
};

use super::{MeshNode, RemoteModel, worker::RETRY_MS};
use crate::requests::Progress;

/// Events that the reader may lag behind before it is waited for.
const EVENTS_MAX: usize = 16;
/// Events that wait for the reader here before streams are left unread.
const PENDING_MAX: usize = 64;
/// What streams have to say waits in a channel of this length.
const SEEN_MAX: usize = 64;
/// Tokens that an answer is thought to have when nobody says.
const OUTPUT_TOKENS_TYPICAL: u32 = 256;

/// What is asked.
pub(crate) struct RemoteRequest {
    pub(crate) model: Arc<RemoteModel>,
    pub(crate) prompt: Vec<Token>,
    /// No more than the context leaves beside the prompt.
    pub(crate) max_tokens: u32,
    pub(crate) sampling: SamplingParams,
    /// How long a peer is waited for, at a stretch.
    pub(crate) wait: Duration,
    /// Hears which node computes it.
    pub(crate) progress: Arc<Progress>,
}

/// The answer. Dropping it cancels the request.
pub(crate) struct RemoteStream(mpsc::Receiver<SessionEvent>);

impl RemoteStream {
    /// The next event; `None` after the last.
    pub(crate) async fn next(&mut self) -> Option<SessionEvent> {
        self.0.recv().await
    }
}

/// What a stream or a ping has to say.
enum Seen {
    Event(Event),
    Prefill {
        attempt: AttemptId,
        prefill: Prefill,
    },
    /// What the peer has guessed of its part of the answer.
    Guesses {
        attempt: AttemptId,
        right: u32,
        wrong: u32,
    },
}

struct Driver {
    node: Arc<MeshNode>,
    open: Open,
    facts: RequestFacts,
    progress: Arc<Progress>,
    session: Session,
    tasks: JoinSet<()>,
    attempts: HashMap<AttemptId, (NodeId, AbortHandle)>,
    seen: mpsc::Sender<Seen>,
    timer: Option<Now>,
    /// Hears whether a peer took the request.
    begun: Option<oneshot::Sender<Result<(), RequestError>>>,
    pending: VecDeque<SessionEvent>,
    is_reader_full: bool,
    is_ended: bool,
}

impl MeshNode {
    /// Finds a peer for a request; returns once one has taken it.
    pub(crate) async fn start(self: &Arc<Self>, request: RemoteRequest) -> Result<RemoteStream, RequestError> {
        let prompt_tokens = u32::try_from(request.prompt.len()).unwrap_or(u32::MAX);
        let needs = |what, needed| if needed { what } else { Capabilities::NONE };
        let facts = RequestFacts {
            model: request.model.digest,
            prompt_tokens,
            prefix: PrefixChain::of(&request.model.digest, &request.prompt),
            output_tokens: request.max_tokens.min(OUTPUT_TOKENS_TYPICAL),
            context_tokens: prompt_tokens.saturating_add(request.max_tokens),
            build: None,
            salt: rand::random(),
        };
        let open = Open {
            request: RequestId::from_bytes(rand::random()),
            model: request.model.digest,
            build: None,
            exact: false,
            tokenizer: request.model.tokenizer,
            prompt: request.prompt,
            generated: Vec::new(),
            max_tokens: request.max_tokens,
            requires: needs(Capabilities::GRAMMARS, request.sampling.grammar.is_some())
                .with(needs(Capabilities::LOGPROBS, request.sampling.top_logprobs.is_some())),
            sampling: request.sampling,
        };
        let limits = RequestLimits { tokens_max: request.max_tokens, generated: Vec::new() };
        let (mut session, first) = Session::new(limits, self.now());
        session.wait_at_most(u64::try_from(request.wait.as_millis()).unwrap_or(u64::MAX));
        let (out, events) = mpsc::channel(EVENTS_MAX);
        let (seen, seen_here) = mpsc::channel(SEEN_MAX);
        let (begun, begins) = oneshot::channel();
        let driver = Driver {
            node: Arc::clone(self),
            open,
            facts,
            progress: request.progress,
            session,
            tasks: JoinSet::new(),
            attempts: HashMap::new(),
            seen,
            timer: None,
            begun: Some(begun),
            pending: VecDeque::new(),
            is_reader_full: false,
            is_ended: false,
        };
        tokio::spawn(driver.run(first, seen_here, out));
        match begins.await {
            Ok(outcome) => outcome.map(|()| RemoteStream(events)),
            Err(_) => Err(RequestError::NoPeer),
        }
    }
}

impl Driver {
    async fn run(mut self, first: Vec<Action>, mut seen: mpsc::Receiver<Seen>, out: mpsc::Sender<SessionEvent>) {
        let mut table = self.node.mesh().watch();
        self.perform(first);
        while !self.is_ended || !self.pending.is_empty() {
            let timer = self.timer.map(|at| Duration::from_millis(at.since_ms(self.node.now())));
            let event = tokio::select! {
                biased;
                () = out.closed() => {
                    self.handle(Event::ClientGone);
                    return;
                }
                permit = out.reserve(), if !self.pending.is_empty() => {
                    if let (Ok(permit), Some(event)) = (permit, self.pending.pop_front()) {
                        permit.send(event);
                    }
                    match self.pending.is_empty() && std::mem::take(&mut self.is_reader_full) {
                        true => Event::ReaderReady,
                        false => continue,
                    }
                }
                Some(seen) = seen.recv(), if self.pending.len() < PENDING_MAX => match self.note(seen) {
                    Some(event) => event,
                    None => continue,
                },
                () = tokio::time::sleep(timer.unwrap_or_default()), if timer.is_some() => {
                    self.timer = None;
                    Event::Timer
                }
                Some(_) = self.tasks.join_next(), if !self.tasks.is_empty() => continue,
                Ok(()) = table.changed(), if !self.is_ended => Event::PeersChanged,
            };
            self.handle(event);
        }
    }

    fn handle(&mut self, event: Event) {
        let actions = self.session.handle(event, self.node.now());
        self.perform(actions);
    }

    /// What a stream said, as an event for the session.
    fn note(&mut self, seen: Seen) -> Option<Event> {
        match seen {
            Seen::Prefill { attempt, prefill } => {
                if self.attempts.contains_key(&attempt) && self.session.generated().is_empty() {
                    // It waits there for its turn, or for the model: that is an accepted request.
                    self.has_begun();
                    let Prefill { done_tokens, cached_tokens } = prefill;
                    self.pending.push_back(SessionEvent::Prefill { done_tokens, cached_tokens });
                }
                Some(Event::Progress { attempt })
            }
            Seen::Guesses { attempt, right, wrong } => {
                if self.attempts.contains_key(&attempt) {
                    self.pending.push_back(SessionEvent::Guesses { right, wrong });
                }
                None
            }
            Seen::Event(event) => {
                if let Event::Admitted { attempt, .. } | Event::Tokens { attempt, .. } = &event
                    && let Some((peer, _)) = self.attempts.get(attempt)
                {
                    self.progress.moved_to(*peer);
                }
                match &event {
                    Event::Admitted { attempt, cached_tokens } if self.attempts.contains_key(attempt) => {
                        self.has_begun();
                        // Whoever takes it begins it, and the same build goes on with the very same tokens.
                        let taker = self.attempts.get(attempt).map(|(peer, _)| *peer);
                        if let Some(peer) = taker.filter(|_| self.facts.build.is_none()) {
                            self.facts.build = self.build_at(peer);
                        }
                        if self.session.generated().is_empty() {
                            let cached_tokens = *cached_tokens;
                            self.pending.push_back(SessionEvent::Prefill { done_tokens: cached_tokens, cached_tokens });
                        }
                    }
                    Event::Refused { attempt, .. }
                    | Event::Finished { attempt, .. }
                    | Event::Failed { attempt, .. }
                    | Event::Gone { attempt } => self.forget(*attempt),
                    _ => {}
                }
                Some(event)
            }
        }
    }

    fn perform(&mut self, actions: Vec<Action>) {
        let mut actions = VecDeque::from(actions);
        while let Some(action) = actions.pop_front() {
            let event = match action {
                Action::FindPeers { excluded } => Some(self.find_peers(&excluded)),
                Action::Open { attempt, peer } => {
                    self.open(attempt, peer);
                    None
                }
                Action::Cancel { attempt, .. } => {
                    self.forget(attempt);
                    None
                }
                Action::Probe { peer } => {
                    self.probe(peer);
                    None
                }
                Action::Emit(sampled) => {
                    self.pending.push_back(SessionEvent::Token(sampled));
                    let is_full = self.pending.len() >= PENDING_MAX / 2 && !self.is_reader_full;
                    self.is_reader_full |= is_full;
                    is_full.then_some(Event::ReaderFull)
                }
                Action::SetTimer(at) => {
                    self.timer = Some(at);
                    None
                }
                Action::Report { peer, verdict } => {
                    let now = self.node.now();
                    self.node.dispatch().health.note(peer, self.facts.model, verdict, now);
                    None
                }
                Action::Measured { peer, measured } => {
                    self.measured(peer, measured);
                    None
                }
                Action::Finish(reason) => {
                    self.end(SessionEvent::Ended(match reason {
                        FinishReason::Length => Ending::Length,
                        FinishReason::EndOfText | FinishReason::Unknown => Ending::EndOfText,
                    }));
                    None
                }
                Action::Fail(why) => {
                    match self.begun.take() {
                        Some(begun) => {
                            let _ = begun.send(Err(why));
                            self.is_ended = true;
                        }
                        None => self.end(SessionEvent::Failed(format!("{why}; ask again"))),
                    }
                    None
                }
            };
            if let Some(event) = event {
                actions.extend(self.session.handle(event, self.node.now()));
            }
        }
    }

    /// Tells who waits that a peer has taken it.
    fn has_begun(&mut self) {
        if let Some(begun) = self.begun.take() {
            // Who no longer waits for it is noticed by the closed channel of events.
            let _ = begun.send(Ok(()));
        }
    }

    fn end(&mut self, last: SessionEvent) {
        self.has_begun();
        self.pending.push_back(last);
        self.is_ended = true;
    }

    fn find_peers(&mut self, excluded: &[NodeId]) -> Event {
        let generated = u32::try_from(self.session.generated().len()).unwrap_or(u32::MAX);
        self.facts.prompt_tokens = u32::try_from(self.open.prompt.len()).unwrap_or(u32::MAX).saturating_add(generated);
        let (now, peers) = (self.node.now(), self.node.mesh().peers());
        let mut dispatch = self.node.dispatch();
        for peer in &peers {
            if let Some(rtt_ms) = peer.rtt_ms {
                dispatch.health.note_round_trip(peer.record().node, (rtt_ms * 1_000.0) as u64, now);
            }
        }
        let candidates = peers
            .iter()
            .flat_map(|peer| peer.record().models.iter().map(|served| Candidate { node: peer.record().node, served }));
        let is_ours =
            |served: &ServedModel| served.digest == self.facts.model && served.tokenizer == self.open.tokenizer;
        let ours = candidates.filter(|candidate| is_ours(candidate.served));
        let ranking = dispatch.router.choose(&self.facts, ours, &dispatch.health, excluded, now);
        tracing::debug!(request = %self.open.request, "peers:\n{ranking}");
        let offers = ranking.choices.iter().map(|choice| Offer {
            peer: choice.node,
            first_token_ms: choice.cost.first_token_ms(),
            step_ms: choice.cost.decode_ms_per_token,
        });
        Event::Peers { offers: offers.collect(), retry_at: ranking.next_admission() }
    }

    fn open(&mut self, attempt: AttemptId, peer: NodeId) {
        {
            let now = self.node.now();
            let mut dispatch = self.node.dispatch();
            dispatch.health.begin(peer, now);
            dispatch.router.begin(peer, &self.facts.prefix);
        }
        let open = Open { generated: self.session.generated().to_vec(), ..self.open.clone() };
        let (mesh, seen) = (Arc::clone(self.node.mesh()), self.seen.clone());
        let task = self.tasks.spawn(async move {
            let event = converse(&mesh, peer, open, attempt, &seen).await.unwrap_or_else(|error| {
                tracing::info!("a request at {}: {error}", peer.short());
                match error {
                    NetError::Ended(StreamEnd::Busy) => {
                        Event::Refused { attempt, because: Refused::Busy { retry_ms: RETRY_MS } }
                    }
                    NetError::Ended(StreamEnd::LeaseExpired) => {
                        Event::Failed { attempt, code: FailureCode::LeaseExpired }
                    }
                    _ => Event::Gone { attempt },
                }
            });
            let _ = seen.send(Seen::Event(event)).await;
        });
        self.attempts.insert(attempt, (peer, task));
    }

    /// With which build a peer serves the model.
    fn build_at(&self, peer: NodeId) -> Option<String> {
        let peers = self.node.mesh().peers();
        let record = peers.iter().find(|view| view.record().node == peer)?.record();
        record.models.iter().find(|served| served.digest == self.facts.model).map(|served| served.build.clone())
    }

    fn probe(&mut self, peer: NodeId) {
        let (node, seen) = (Arc::clone(&self.node), self.seen.clone());
        self.tasks.spawn(async move {
            if let Ok(took) = node.mesh().ping(peer).await {
                let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
                let now = node.now();
                node.dispatch().health.note_round_trip(peer, us, now);
                let _ = seen.send(Seen::Event(Event::Alive { peer })).await;
            }
        });
    }

    fn measured(&self, peer: NodeId, measured: Measured) {
        let (now, model) = (self.node.now(), self.facts.model);
        let mut dispatch = self.node.dispatch();
        let computed = self.facts.prompt_tokens.saturating_sub(measured.cached_tokens);
        if let Some(prefill_ms) = measured.prefill_ms.filter(|_| computed > 0) {
            dispatch.health.note_prefill(peer, model, prefill_ms / f64::from(computed), now);
        }
        if let Some(decode_ms) = measured.decode_ms_per_token {
            dispatch.health.note_decode(peer, model, decode_ms, now);
        }
    }

    /// Ends an attempt, if it has not ended itself.
    fn forget(&mut self, attempt: AttemptId) {
        if let Some((peer, task)) = self.attempts.remove(&attempt) {
            // A task that has said its last word is over in any case.
            task.abort();
            let now = self.node.now();
            let mut dispatch = self.node.dispatch();
            dispatch.health.end(peer, now);
            dispatch.router.end(peer);
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        let attempts: Vec<AttemptId> = self.attempts.keys().copied().collect();
        attempts.into_iter().for_each(|attempt| self.forget(attempt));
    }
}

/// One opening of the request at one peer; its last word. Dropping it resets the stream.
async fn converse(
    mesh: &Mesh,
    peer: NodeId,
    open: Open,
    attempt: AttemptId,
    seen: &mpsc::Sender<Seen>,
) -> Result<Event, NetError> {
    let (mut send, recv) = mesh.open_work(peer).await?;
    stream::write(&mut send, &Work::Open(Box::new(open))).await?;
    let mut reader = Reader::<Work>::new(recv);
    loop {
        let said = match reader.expect().await? {
            Work::Admitted(admitted) => Seen::Event(Event::Admitted { attempt, cached_tokens: admitted.cached_tokens }),
            Work::Prefill(prefill) => Seen::Prefill { attempt, prefill },
            Work::Tokens(tokens) => {
                Seen::Event(Event::Tokens { attempt, first_sequence: tokens.first, tokens: tokens.sampled })
            }
            Work::Refused(because) => return Ok(Event::Refused { attempt, because }),
            Work::Finished(Finished { reason, right_guesses: right, wrong_guesses: wrong, .. }) => {
                if right > 0 || wrong > 0 {
                    let _ = seen.send(Seen::Guesses { attempt, right, wrong }).await;
                }
                return Ok(Event::Finished { attempt, reason });
            }
            Work::Failed(failed) => return Ok(Event::Failed { attempt, code: failed.code }),
            Work::Unknown { .. } => continue,
            Work::Open(_)
            | Work::GetCard(_)
            | Work::Card(_)
            | Work::CardPart(_)
            | Work::Stage(_)
            | Work::Hop(_)
            | Work::WatchContent(_)
            | Work::Content(_)
            | Work::Fetch(_)
            | Work::Sending
            | Work::GetAttestations(_)
            | Work::Attestations(_)
            | Work::Draft(_) => {
                return Err(NetError::Protocol("a worker answers with something else".to_owned()));
            }
        };
        if seen.send(said).await.is_err() {
            return Ok(Event::Gone { attempt });
        }
    }
}
