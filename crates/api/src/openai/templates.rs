//! Chat templates, compiled once.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use axum::http::StatusCode;
use murmur_chat::{ChatPrompt, ChatRequest, ChatTemplate, PromptError, TemplateError, Timestamp};
use murmur_protocol::sampling::{Grammar, Token};

use crate::{
    backend::ModelCard,
    errors::ApiError,
    openai::{chat_request::ChatInput, constraint::Constraint, head::unix_seconds},
    state::AppState,
};

/// Compiled templates by their source: two models of a family often share one, and a reloaded model keeps its own.
#[derive(Default)]
pub(crate) struct Templates(Mutex<HashMap<String, Arc<ChatTemplate>>>);

impl Templates {
    /// Models come and go; the cache starts afresh when it has seen this many templates.
    const MAX: usize = 64;

    fn get(&self, model: &ModelCard) -> Result<Arc<ChatTemplate>, ApiError> {
        let source = model.chat_template.as_deref().unwrap_or_default();
        let lock = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(template) = lock().get(source) {
            return Ok(template.clone());
        }
        let compiled = if source.is_empty() { ChatTemplate::chatml() } else { ChatTemplate::compile(source) };
        let bad = |error: TemplateError| ApiError::param("model", error.to_string()).code("bad_chat_template");
        let template = Arc::new(compiled.map_err(bad)?);
        let mut templates = lock();
        if templates.len() >= Self::MAX {
            templates.clear();
        }
        templates.insert(source.to_owned(), template.clone());
        Ok(template)
    }
}

/// Renders a chat. On a thread for blocking work: a template comes from a downloaded file and may take its time.
pub(crate) async fn prepare(state: &Arc<AppState>, input: ChatInput) -> Result<(ChatInput, ChatPrompt), ApiError> {
    let state = state.clone();
    let work = tokio::task::spawn_blocking(move || {
        let template = state.templates.get(&input.common.model)?;
        let model = input.common.model.id.as_str();
        let prompt = render(&input, &|text| state.backend.control_token(model, text), &template)?;
        Ok((input, prompt))
    });
    work.await.unwrap_or_else(|_| {
        let message = "The server has a defect that this request's chat template brought out.";
        Err(ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, message).code("internal_error"))
    })
}

fn render(
    input: &ChatInput,
    control_token: &dyn Fn(&str) -> Option<Token>,
    template: &ChatTemplate,
) -> Result<ChatPrompt, ApiError> {
    let model = &input.common.model;
    let request = ChatRequest {
        messages: &input.messages,
        tools: &input.tools,
        tool_choice: &input.tool_choice,
        parallel_tool_calls: input.parallel_tool_calls,
        extra: &input.template_variables,
        bos_token: &model.bos_text,
        eos_token: &model.eos_text,
        // The standard library does not know the local time zone; a prompt's date is in UTC.
        now: Timestamp { unix_seconds: unix_seconds() as i64, utc_offset_seconds: 0 },
        control_token: Some(control_token),
    };
    let mut prompt = template.prepare(&request).map_err(refuse)?;
    if let Some(constraint) = &input.constraint {
        prompt.grammar = Some(constrain(&prompt, constraint, control_token)?);
    }
    Ok(prompt)
}

/// The grammar of an answer whose format is given: reasoning stays possible before it.
fn constrain(
    prompt: &ChatPrompt,
    constraint: &Constraint,
    control_token: &dyn Fn(&str) -> Option<Token>,
) -> Result<Grammar, ApiError> {
    if prompt.output.starts_in_reasoning && matches!(constraint.grammar, Grammar::Lark(_)) {
        let message = format!(
            "The chat template begins the answer with reasoning, which `{}` would have to describe, too. Turn reasoning \
             off, where the template can (`chat_template_kwargs`: {{\"enable_thinking\": false}}), or send \
             `guided_regex` or `response_format`.",
            constraint.param
        );
        return Err(ApiError::unsupported(constraint.param, message));
    }
    Ok(prompt.response_grammar(constraint.grammar.clone(), Some(control_token)))
}

fn refuse(error: PromptError) -> ApiError {
    let message = error.to_string();
    match error {
        PromptError::Message { index, .. } => ApiError::param(format!("messages[{index}]"), message),
        PromptError::Tool { index, .. } => ApiError::param(format!("tools[{index}]"), message),
        PromptError::ToolChoice(_) => ApiError::param("tool_choice", message),
        PromptError::Template(_) => ApiError::param("messages", message).code("chat_template_failed"),
    }
}
