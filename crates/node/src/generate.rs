//! From a session's tokens to the text of an answer: detokenising, stop strings, the account at the end.

use std::{
    collections::{HashSet, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use murmur_api::backend::{Completion, Event, Finish, Guesses, Refusal, TokenInfo};
use murmur_engine::{Ending, SessionEvent, SessionRequest};
use murmur_protocol::sampling::{Sampled, Token};
use murmur_sampling::{StopMatcher, Vocabulary};
use tokio::sync::mpsc;

use crate::{
    mesh::RemoteStream,
    models::{Awaited, LocalStream, Waking},
    requests::Request,
};

/// Events the HTTP layer may lag behind before the generation waits for it.
pub(crate) const EVENTS_MAX: usize = 16;

/// Where an answer's tokens come from. Dropping it cancels the work.
pub(crate) enum Source {
    /// This node's engine.
    Local(LocalStream),
    /// This node's engine, once the model is loaded for it.
    Waking(Waking, Option<Box<SessionRequest>>),
    /// The mesh.
    Remote(RemoteStream),
}

/// What comes from there.
enum Heard {
    Session(SessionEvent),
    Loading(f32),
}

impl Source {
    async fn next(&mut self) -> Option<Heard> {
        loop {
            match self {
                Source::Local(session) => return session.next().await.map(Heard::Session),
                Source::Remote(stream) => return stream.next().await.map(Heard::Session),
                Source::Waking(waking, request) => {
                    let failed = |reason| Some(Heard::Session(SessionEvent::Failed(reason)));
                    match waking.next().await {
                        Awaited::Loading(fraction) => return Some(Heard::Loading(fraction)),
                        Awaited::Failed(reason) => return failed(reason),
                        Awaited::Loaded(model) => match waking.start(model, *request.take()?) {
                            Ok(session) => *self = Source::Local(session),
                            Err(error) => return failed(error.to_string()),
                        },
                    }
                }
            }
        }
    }
}

/// Turns one session into API events. Ends (and so cancels the session) when the reader is gone.
pub(crate) struct Pump {
    pub(crate) session: Source,
    pub(crate) listed: Request,
    /// When the request was taken up, before a peer was looked for.
    pub(crate) accepted: Instant,
    pub(crate) out: mpsc::Sender<Event>,
    pub(crate) vocabulary: Arc<Vocabulary>,
    /// Control tokens that the reader wants to see as text.
    pub(crate) visible: HashSet<Token>,
    pub(crate) stop: Vec<String>,
    pub(crate) matcher: StopMatcher,
    pub(crate) prompt_tokens: u32,
    pub(crate) seed: u64,
}

struct Account {
    accepted: Instant,
    first_token: Option<Instant>,
    cached_tokens: u32,
    completion_tokens: u32,
    guesses: Guesses,
}

impl Pump {
    pub(crate) async fn run(mut self) {
        let mut account = Account {
            accepted: self.accepted,
            first_token: None,
            cached_tokens: 0,
            completion_tokens: 0,
            guesses: Guesses::default(),
        };
        // Tokens whose text is held back, because a character or a stop string may be incomplete.
        let mut held: VecDeque<TokenInfo> = VecDeque::new();
        loop {
            let event = tokio::select! {
                event = self.session.next() => event,
                () = self.out.closed() => return,
            };
            let session = match event {
                Some(Heard::Session(event)) => Some(event),
                Some(Heard::Loading(fraction)) => match self.send(Event::Loading { fraction }).await {
                    Some(()) => continue,
                    None => return,
                },
                None => None,
            };
            let last = match session {
                Some(SessionEvent::Prefill { done_tokens, cached_tokens }) => {
                    account.cached_tokens = cached_tokens;
                    self.listed.prefilled(done_tokens);
                    self.send(Event::Prefill { done_tokens, cached_tokens }).await
                }
                Some(SessionEvent::Token(sampled)) => self.token(sampled, &mut held, &mut account).await,
                Some(SessionEvent::Guesses { right, wrong }) => {
                    account.guesses = Guesses { right, wrong };
                    Some(())
                }
                Some(SessionEvent::Ended(ending)) => {
                    let rest = self.matcher.finish();
                    self.emit(rest.text, rest.tokens, &mut held).await;
                    let finish = match ending {
                        Ending::EndOfText => Finish::EndOfText,
                        Ending::Length => Finish::Length,
                    };
                    self.done(finish, &account).await
                }
                Some(SessionEvent::Failed(message) | SessionEvent::Lost(message)) => self.fail(message).await,
                None => self.fail("the generation ended without a reason".into()).await,
            };
            if last.is_none() {
                return;
            }
        }
    }

    /// `None` ends the pump.
    async fn send(&self, event: Event) -> Option<()> {
        self.out.send(event).await.ok()
    }

    async fn fail(&self, message: String) -> Option<()> {
        self.send(Event::Failed(Refusal::Failed { message })).await;
        None
    }

    async fn done(&self, finish: Finish, account: &Account) -> Option<()> {
        let first = account.first_token.unwrap_or_else(Instant::now);
        self.send(Event::Done(Completion {
            finish,
            prompt_tokens: self.prompt_tokens,
            cached_tokens: account.cached_tokens,
            completion_tokens: account.completion_tokens,
            seed: self.seed,
            prefill: first - account.accepted,
            decode: account.first_token.map_or(Duration::ZERO, |first| first.elapsed()),
            guesses: account.guesses,
        }))
        .await;
        None
    }

    async fn token(&mut self, sampled: Sampled, held: &mut VecDeque<TokenInfo>, account: &mut Account) -> Option<()> {
        account.completion_tokens += 1;
        self.listed.token();
        account.first_token.get_or_insert_with(Instant::now);
        let token = sampled.token;
        if self.vocabulary.is_end_of_generation(token) {
            return Some(());
        }
        let shown = !self.vocabulary.is_control(token) || self.visible.contains(&token);
        held.push_back(self.info(sampled));
        let bytes = if shown { self.vocabulary.bytes(token) } else { &[] };
        let emission = self.matcher.push(bytes);
        self.emit(emission.text, emission.tokens, held).await?;
        match emission.stop {
            None => Some(()),
            Some(index) => {
                let matched = self.stop.get(index).cloned().unwrap_or_default();
                self.done(Finish::StopString(matched), account).await
            }
        }
    }

    async fn emit(&self, text: String, tokens: usize, held: &mut VecDeque<TokenInfo>) -> Option<()> {
        if text.is_empty() && tokens == 0 {
            return Some(());
        }
        let tokens = held.drain(..tokens.min(held.len())).collect();
        self.send(Event::Text { text, tokens }).await
    }

    fn info(&self, sampled: Sampled) -> TokenInfo {
        let bytes = |token| self.vocabulary.bytes(token).to_vec();
        TokenInfo {
            id: sampled.token,
            bytes: bytes(sampled.token),
            logprob: sampled.logprob,
            top: sampled.top.into_iter().map(|(id, logprob)| (id, bytes(id), logprob)).collect(),
        }
    }
}
