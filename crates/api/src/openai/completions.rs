//! `/v1/completions`: text in, its continuation out.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

use crate::{
    backend::{Backend, Finish, GenerateRequest, Prompt, TokenInfo},
    body::JsonObject,
    choices::{ChoiceEvent, Choices},
    errors::ApiError,
    fields::Fields,
    limits::{MAX_CHOICES, MAX_TOP_LOGPROBS},
    openai::{
        constraint, embeddings, harmless,
        head::{Head, add_timings},
        logprobs::Legacy,
        request::{Common, check_choices, token_limit},
    },
    sse::{self, Chunks, Render},
    state::AppState,
    timings::Timings,
};

/// OpenAI's default for this endpoint, surprising as it is.
const DEFAULT_MAX_TOKENS: u32 = 16;

/// A completion request, checked.
struct Input {
    common: Common,
    prompts: Vec<Prompt>,
    echo: bool,
    max_tokens: u32,
    constraint: Option<constraint::Constraint>,
}

impl Input {
    async fn read(mut fields: Fields, backend: &dyn Backend) -> Result<Self, ApiError> {
        harmless::accept(&mut fields)?;
        let mut common = Common::read(&mut fields, backend).await?;
        common.sampling.top_logprobs =
            fields.integer("logprobs", 0..=i64::from(MAX_TOP_LOGPROBS))?.map(|top| top as u8);
        let prompts = match fields.take("prompt") {
            Some(prompt) => embeddings::prompts("prompt", prompt, MAX_CHOICES)?,
            None => return Err(fields.missing("prompt")),
        };
        check_choices("prompt", prompts.len(), common.n)?;
        let best_of = fields.integer("best_of", 1..=i64::MAX)?;
        if best_of.is_some_and(|best_of| best_of != common.n as i64) {
            let message =
                "`best_of` other than `n` is not supported: ask for more answers with `n`, and choose yourself.";
            return Err(ApiError::unsupported("best_of", message));
        }
        let input = Input {
            prompts,
            echo: fields.boolean("echo")?.unwrap_or(false),
            max_tokens: token_limit(&mut fields, "max_tokens")?.unwrap_or(DEFAULT_MAX_TOKENS),
            constraint: constraint::read(&mut fields)?,
            common,
        };
        fields.refuse("suffix", "write the model's own fill-in-the-middle tokens into `prompt`.")?;
        fields.finish()?;
        if input.echo && input.common.sampling.top_logprobs.is_some() {
            let message =
                "`echo` together with `logprobs` is not supported: prompt tokens have no log-probabilities here.";
            return Err(ApiError::unsupported("echo", message));
        }
        Ok(input)
    }

    /// The answers to the first prompt, then those to the second ...
    fn generations(&self) -> Vec<GenerateRequest> {
        let generation = |(prompt, i): (&Prompt, usize)| {
            let mut sampling = self.common.sampling_of(i);
            sampling.grammar = self.constraint.as_ref().map(|constraint| constraint.grammar.clone());
            GenerateRequest {
                model: self.common.model.id.clone(),
                prompt: prompt.clone(),
                sampling,
                max_tokens: Some(self.max_tokens),
                stop: self.common.stop.clone(),
                visible_tokens: Vec::new(),
            }
        };
        self.prompts.iter().flat_map(|prompt| (0..self.common.n).map(move |i| (prompt, i))).map(generation).collect()
    }

    /// What each choice's text begins with.
    async fn echoes(&self, backend: &dyn Backend) -> Result<Vec<String>, ApiError> {
        let mut echoes = Vec::with_capacity(self.prompts.len() * self.common.n);
        for prompt in &self.prompts {
            let text = match prompt {
                _ if !self.echo => String::new(),
                Prompt::Text(text) | Prompt::Rendered(text) => text.clone(),
                Prompt::Tokens(tokens) => backend.detokenize(self.common.model.id.clone(), tokens.clone()).await?,
            };
            echoes.extend(std::iter::repeat_n(text, self.common.n));
        }
        Ok(echoes)
    }
}

/// `POST /v1/completions`.
pub(crate) async fn create(
    State(state): State<Arc<AppState>>,
    JsonObject(map): JsonObject,
) -> Result<Response, ApiError> {
    let input = Input::read(Fields::new(map), &*state.backend).await?;
    let echoes = input.echoes(&*state.backend).await?;
    let grammar_param = input.constraint.as_ref().map_or("grammar", |constraint| constraint.param);
    let choices = Choices::start(&*state.backend, state.metrics.clone(), input.generations(), input.common.n)
        .await
        .map_err(|error| error.rename_param("grammar", grammar_param))?;
    let render = CompletionStream::new(&input, echoes);
    if input.common.stream {
        return Ok(sse::respond(choices, render, state.keep_alive));
    }
    let answer = collect(choices, render).await?;
    Ok(Json(answer).into_response())
}

async fn collect(mut choices: Choices, mut render: CompletionStream) -> Result<Value, ApiError> {
    let mut texts = std::mem::take(&mut render.echoes);
    let mut finish_reasons = vec![None; choices.len()];
    while let Some((index, event)) = choices.next().await {
        match event {
            ChoiceEvent::Text { text: new, tokens } => {
                if let Some(text) = texts.get_mut(index) {
                    text.push_str(&new);
                }
                if let Some(logprobs) = render.logprobs.get_mut(index) {
                    logprobs.push(&tokens);
                }
            }
            ChoiceEvent::Done(finish, _) => {
                if let Some(reason) = finish_reasons.get_mut(index) {
                    *reason = Some(finish_reason(&finish));
                }
            }
            ChoiceEvent::Failed(refusal) => return Err(refusal.into()),
        }
    }
    let rendered = texts.into_iter().zip(finish_reasons).enumerate().map(|(index, (text, finish))| {
        let logprobs = render.logprobs.get_mut(index).map(Legacy::take);
        json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish})
    });
    let rendered = rendered.collect();
    Ok(Head::account(render.head.with_choices(rendered), choices.usage(), choices.timings()))
}

fn finish_reason(finish: &Finish) -> &'static str {
    match finish {
        Finish::Length => "length",
        Finish::EndOfText | Finish::StopString(_) => "stop",
    }
}

/// A streamed answer.
struct CompletionStream {
    head: Head,
    echoes: Vec<String>,
    /// One per choice, or none.
    logprobs: Vec<Legacy>,
    include_usage: bool,
}

impl CompletionStream {
    fn new(input: &Input, echoes: Vec<String>) -> Self {
        let wants_logprobs = input.common.sampling.top_logprobs.is_some();
        let logprobs = echoes.iter().filter(|_| wants_logprobs).map(|_| Legacy::default()).collect();
        CompletionStream {
            head: Head::new("text_completion", "cmpl-", &input.common.model, input.common.sampling.seed),
            echoes,
            logprobs,
            include_usage: input.common.include_usage,
        }
    }

    fn push(&self, index: usize, text: &str, logprobs: Option<Value>, out: &mut Chunks) {
        let choice = json!([{"index": index, "text": text, "logprobs": logprobs, "finish_reason": null}]);
        out.push(&self.head.chunk(choice, self.include_usage));
    }
}

impl Render for CompletionStream {
    fn begin(&mut self, out: &mut Chunks) {
        for (index, echo) in std::mem::take(&mut self.echoes).iter().enumerate() {
            if !echo.is_empty() {
                self.push(index, echo, None, out);
            }
        }
    }

    fn text(&mut self, choice: usize, text: String, tokens: &[TokenInfo], out: &mut Chunks) -> bool {
        let logprobs = self.logprobs.get_mut(choice).filter(|_| !tokens.is_empty()).map(|logprobs| {
            logprobs.push(tokens);
            logprobs.take()
        });
        if !text.is_empty() || logprobs.is_some() {
            self.push(choice, &text, logprobs, out);
        }
        false
    }

    fn done(&mut self, choice: usize, finish: &Finish, timings: Option<Timings>, out: &mut Chunks) {
        let choice = json!([{"index": choice, "text": "", "logprobs": null, "finish_reason": finish_reason(finish)}]);
        let mut chunk = self.head.chunk(choice, self.include_usage);
        add_timings(&mut chunk, timings);
        out.push(&chunk);
    }

    fn end(&mut self, usage: Value, timings: Option<Timings>, out: &mut Chunks) {
        if self.include_usage {
            out.push(&Head::account(self.head.with_choices(json!([])), usage, timings));
        }
    }
}
