//! The generations behind one request, as one sequence of events.
//!
//! Nothing is buffered here: an event is taken from a generation when the client is ready for it, so a slow client
//! fills the generation's own bounded channel, and that holds up the generation. Dropping [`Choices`], as happens the
//! moment a client disconnects, drops the generations, and that cancels them.

use std::{future::poll_fn, sync::Arc, task::Poll, time::Instant};

use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::{
    backend::{Backend, Completion, Event, Finish, GenerateRequest, Generation, Refusal, TokenInfo},
    errors::ApiError,
    metrics::Metrics,
    timings::Timings,
};

/// What happened to a choice, as far as an answer shows it.
#[derive(Debug)]
pub(crate) enum ChoiceEvent {
    Text { text: String, tokens: Vec<TokenInfo> },
    Done(Finish, Timings),
    Failed(Refusal),
}

/// Running generations; the choices of one prompt follow each other.
pub(crate) struct Choices {
    slots: Vec<Slot>,
    per_prompt: usize,
    /// Whose events are looked at first, so that a fast choice cannot starve the others.
    turn: usize,
    metrics: Arc<Metrics>,
}

struct Slot {
    /// `None` once the generation ended.
    events: Option<mpsc::Receiver<Event>>,
    started: Instant,
    prompt_tokens: u32,
    prefilled_tokens: u32,
    /// How far loading is, while the model is being loaded for it.
    loading: Option<f32>,
    cached_tokens: u32,
    completion_tokens: u32,
    has_text: bool,
    /// Once it is done.
    timings: Option<Timings>,
}

impl Choices {
    /// Starts a generation per request, `per_prompt` for each prompt. One refusal refuses all.
    pub(crate) async fn start(
        backend: &dyn Backend,
        metrics: Arc<Metrics>,
        requests: Vec<GenerateRequest>,
        per_prompt: usize,
    ) -> Result<Self, ApiError> {
        let mut choices = Choices { slots: Vec::with_capacity(requests.len()), per_prompt, turn: 0, metrics };
        for request in requests {
            let generation = backend.generate(request).await?;
            choices.slots.push(Slot::new(generation));
        }
        Ok(choices)
    }

    pub(crate) fn len(&self) -> usize {
        self.slots.len()
    }

    /// The next event of any choice; `None` when all have ended. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Option<(usize, ChoiceEvent)> {
        loop {
            let (index, event) = self.receive().await?;
            if let Some(event) = self.account(index, event) {
                return Some((index, event));
            }
        }
    }

    /// Ends a choice from which nothing more is wanted.
    pub(crate) fn finish(&mut self, index: usize) {
        if let Some(slot) = self.slots.get_mut(index)
            && slot.events.take().is_some()
        {
            self.metrics.ended("stop");
        }
    }

    /// Prompt tokens done and to do, while any prompt is still being read.
    pub(crate) fn prefill_progress(&self) -> Option<(u64, u64)> {
        let waiting = self.slots.iter().filter(|slot| slot.events.is_some() && !slot.has_text);
        waiting
            .map(|slot| (u64::from(slot.prefilled_tokens), u64::from(slot.prompt_tokens)))
            .reduce(|sum, slot| (sum.0 + slot.0, sum.1 + slot.1))
    }

    /// How far the model is that is being loaded for these, while it is.
    pub(crate) fn loading(&self) -> Option<f32> {
        self.slots.iter().filter(|slot| slot.events.is_some()).find_map(|slot| slot.loading)
    }

    /// OpenAI's `usage`: a prompt counts once, however many answers there are to it. Where tokens were guessed, it says how many.
    pub(crate) fn usage(&self) -> Value {
        let prompts = || self.slots.iter().step_by(self.per_prompt.max(1));
        let prompt: u64 = prompts().map(|slot| u64::from(slot.prompt_tokens)).sum();
        let cached: u64 = prompts().map(|slot| u64::from(slot.cached_tokens)).sum();
        let completion: u64 = self.slots.iter().map(|slot| u64::from(slot.completion_tokens)).sum();
        let mut usage = json!({
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        });
        if let Some(guesses) = self.timings().map(|timings| timings.guesses).filter(|guesses| guesses.count() > 0) {
            usage["completion_tokens_details"] = json!({
                "accepted_prediction_tokens": guesses.right,
                "rejected_prediction_tokens": guesses.wrong,
            });
        }
        usage
    }

    /// The timings of all choices that are done, as if they were one; `None` where none is.
    pub(crate) fn timings(&self) -> Option<Timings> {
        self.slots.iter().filter_map(|slot| slot.timings).reduce(Timings::beside)
    }

    async fn receive(&mut self) -> Option<(usize, Option<Event>)> {
        let slots = &mut self.slots;
        let turn = &mut self.turn;
        poll_fn(move |cx| {
            let mut all_ended = true;
            for offset in 0..slots.len() {
                let index = (*turn + offset) % slots.len();
                let Some(events) = &mut slots[index].events else {
                    continue;
                };
                all_ended = false;
                if let Poll::Ready(event) = events.poll_recv(cx) {
                    *turn = index + 1;
                    return Poll::Ready(Some((index, event)));
                }
            }
            if all_ended { Poll::Ready(None) } else { Poll::Pending }
        })
        .await
    }

    fn account(&mut self, index: usize, event: Option<Event>) -> Option<ChoiceEvent> {
        let slot = self.slots.get_mut(index)?;
        slot.loading = match event {
            Some(Event::Loading { fraction }) => Some(fraction),
            _ => None,
        };
        match event {
            Some(Event::Loading { .. }) => None,
            Some(Event::Prefill { done_tokens, cached_tokens }) => {
                slot.prefilled_tokens = done_tokens;
                slot.cached_tokens = cached_tokens;
                None
            }
            Some(Event::Text { text, tokens }) => {
                slot.first_token(&self.metrics);
                slot.completion_tokens += tokens.len() as u32;
                self.metrics.generated(tokens.len() as u64);
                Some(ChoiceEvent::Text { text, tokens })
            }
            Some(Event::Done(completion)) => {
                slot.cached_tokens = completion.cached_tokens;
                slot.first_token(&self.metrics);
                slot.end(&completion, &self.metrics);
                let timings = Timings::of(&completion);
                slot.timings = Some(timings);
                Some(ChoiceEvent::Done(completion.finish, timings))
            }
            Some(Event::Failed(refusal)) => {
                slot.events = None;
                self.metrics.ended("failed");
                Some(ChoiceEvent::Failed(refusal))
            }
            // Whatever dropped the sender, the answer is not complete, and must not look as if it were.
            None => {
                slot.events = None;
                self.metrics.ended("failed");
                let message = "The generation broke off without a result. Send the request again.".to_owned();
                Some(ChoiceEvent::Failed(Refusal::Failed { message }))
            }
        }
    }
}

impl Slot {
    fn new(generation: Generation) -> Self {
        Slot {
            events: Some(generation.events),
            started: Instant::now(),
            prompt_tokens: generation.prompt_tokens,
            prefilled_tokens: 0,
            loading: None,
            cached_tokens: 0,
            completion_tokens: 0,
            has_text: false,
            timings: None,
        }
    }

    fn first_token(&mut self, metrics: &Metrics) {
        if !self.has_text {
            self.has_text = true;
            metrics.prefilled(self.prompt_tokens, self.cached_tokens, self.started.elapsed());
        }
    }

    fn end(&mut self, completion: &Completion, metrics: &Metrics) {
        self.events = None;
        // Tokens that made no text, such as the one that ends the turn, are in the account only.
        metrics.generated(completion.completion_tokens.saturating_sub(self.completion_tokens).into());
        self.prompt_tokens = completion.prompt_tokens;
        self.completion_tokens = completion.completion_tokens;
        metrics.completed(completion, if completion.finish == Finish::Length { "length" } else { "stop" });
    }
}

impl Drop for Choices {
    fn drop(&mut self) {
        for _ in self.slots.iter().filter(|slot| slot.events.is_some()) {
            self.metrics.ended("cancelled");
        }
    }
}
