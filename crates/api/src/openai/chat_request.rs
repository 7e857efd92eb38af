//! Reading a chat request.

use murmur_chat::{ChatPrompt, ToolChoice};
use serde_json::{Map, Value};

use crate::{
    backend::{Backend, GenerateRequest, ModelCard, Prompt},
    errors::ApiError,
    fields::{Fields, shorten},
    limits::MAX_TOP_LOGPROBS,
    openai::{
        constraint::{self, Constraint},
        harmless, messages,
        request::{Common, token_limit},
    },
};

/// Variables of a template that are ours to set.
const OWN_VARIABLES: [&str; 6] =
    ["messages", "tools", "add_generation_prompt", "continue_final_message", "bos_token", "eos_token"];
const REASONING_EFFORTS: [&str; 6] = ["none", "minimal", "low", "medium", "high", "xhigh"];

/// A chat request, checked.
pub(crate) struct ChatInput {
    pub(crate) common: Common,
    pub(crate) messages: Vec<Value>,
    pub(crate) tools: Vec<Value>,
    pub(crate) tool_choice: ToolChoice,
    pub(crate) parallel_tool_calls: bool,
    /// `chat_template_kwargs`, and what `reasoning_effort` means to the template.
    pub(crate) template_variables: Map<String, Value>,
    /// What the answer must match, besides what `tool_choice` demands.
    pub(crate) constraint: Option<Constraint>,
    max_tokens: Option<u32>,
}

impl ChatInput {
    pub(crate) async fn read(mut fields: Fields, backend: &dyn Backend) -> Result<Self, ApiError> {
        harmless::accept(&mut fields)?;
        let mut common = Common::read(&mut fields, backend).await?;
        common.sampling.top_logprobs = top_logprobs(&mut fields)?;
        let tools = messages::tools(&mut fields)?;
        let input = ChatInput {
            messages: messages::messages(&mut fields)?,
            tool_choice: messages::tool_choice(&mut fields, &tools)?,
            tools,
            parallel_tool_calls: fields.boolean("parallel_tool_calls")?.unwrap_or(true),
            template_variables: template_variables(&mut fields, &common.model)?,
            constraint: constraint::read(&mut fields)?,
            max_tokens: max_tokens(&mut fields)?,
            common,
        };
        refuse_unsupported(&mut fields)?;
        fields.finish()?;
        if let Some(constraint) = &input.constraint
            && input.offers_tools()
        {
            let message = format!(
                "`{}` would forbid the tool calls that `tools` offers; send one of them, or `tool_choice`: \"none\".",
                constraint.param
            );
            return Err(ApiError::unsupported(constraint.param, message));
        }
        Ok(input)
    }

    fn offers_tools(&self) -> bool {
        !self.tools.is_empty() && self.tool_choice != ToolChoice::None
    }

    /// Where a grammar came from.
    pub(crate) fn grammar_param(&self) -> &'static str {
        match &self.constraint {
            Some(constraint) => constraint.param,
            None => "tools",
        }
    }

    /// One generation per answer.
    pub(crate) fn generations(&self, prompt: &ChatPrompt) -> Vec<GenerateRequest> {
        let generation = |i| {
            let mut sampling = self.common.sampling_of(i);
            sampling.grammar.clone_from(&prompt.grammar);
            GenerateRequest {
                model: self.common.model.id.clone(),
                prompt: Prompt::Rendered(prompt.text.clone()),
                sampling,
                max_tokens: self.max_tokens,
                stop: self.common.stop.iter().chain(&prompt.extra_stops).cloned().collect(),
                visible_tokens: prompt.visible_tokens.iter().map(|&token| token.to_owned()).collect(),
            }
        };
        (0..self.common.n).map(generation).collect()
    }
}

fn top_logprobs(fields: &mut Fields) -> Result<Option<u8>, ApiError> {
    let wanted = fields.boolean("logprobs")?.unwrap_or(false);
    let top = fields.integer("top_logprobs", 0..=i64::from(MAX_TOP_LOGPROBS))?;
    match top {
        Some(_) if !wanted => {
            let message = "`top_logprobs` is allowed only with `logprobs`: true.";
            Err(ApiError::param("top_logprobs", message).code("invalid_value"))
        }
        top => Ok(wanted.then(|| top.unwrap_or(0) as u8)),
    }
}

fn max_tokens(fields: &mut Fields) -> Result<Option<u32>, ApiError> {
    let old = token_limit(fields, "max_tokens")?;
    let new = token_limit(fields, "max_completion_tokens")?;
    match (old, new) {
        (Some(old), Some(new)) if old != new => {
            let message = "`max_tokens` and `max_completion_tokens` mean the same and differ; send one of them.";
            Err(ApiError::param("max_tokens", message).code("invalid_value"))
        }
        (old, new) => Ok(new.or(old)),
    }
}

/// What the client tells the template. A template sees only the variables that it mentions, so others are refused.
fn template_variables(fields: &mut Fields, model: &ModelCard) -> Result<Map<String, Value>, ApiError> {
    let template = model.chat_template.as_deref().unwrap_or_default();
    let mut variables = fields.object("chat_template_kwargs")?.unwrap_or_default();
    for name in variables.keys() {
        let path = || format!("chat_template_kwargs.{}", shorten(name));
        if OWN_VARIABLES.contains(&name.as_str()) {
            let message = format!("`{}` is set by the server and cannot be overridden.", path());
            return Err(ApiError::unsupported(path(), message));
        }
        if !template.contains(name.as_str()) {
            let message =
                format!("The chat template of `{}` has no variable `{}`; leave it out.", model.id, shorten(name));
            return Err(ApiError::unsupported(path(), message));
        }
    }
    if let Some(effort) = fields.string("reasoning_effort")? {
        let (name, value) = reasoning_effort(template, effort, model)?;
        variables.entry(name).or_insert(value);
    }
    Ok(variables)
}

/// Some templates grade the effort; others only turn reasoning on and off.
fn reasoning_effort(template: &str, effort: String, model: &ModelCard) -> Result<(&'static str, Value), ApiError> {
    if !REASONING_EFFORTS.contains(&effort.as_str()) {
        let message = format!("`reasoning_effort` must be one of {}.", REASONING_EFFORTS.join(", "));
        return Err(ApiError::param("reasoning_effort", message).code("invalid_value"));
    }
    if template.contains("reasoning_effort") {
        return Ok(("reasoning_effort", Value::String(effort)));
    }
    if template.contains("enable_thinking") {
        return Ok(("enable_thinking", Value::Bool(effort != "none")));
    }
    let message =
        format!("The chat template of `{}` knows no reasoning effort; leave `reasoning_effort` out.", model.id);
    Err(ApiError::unsupported("reasoning_effort", message))
}

/// OpenAI's fields for which there is more to say than that they are unknown.
fn refuse_unsupported(fields: &mut Fields) -> Result<(), ApiError> {
    fields.refuse("functions", "use `tools`, which replaced it.")?;
    fields.refuse("function_call", "use `tool_choice`, which replaced it.")?;
    fields.refuse("audio", "this server generates text only.")?;
    fields.refuse("prediction", "leave it out; it would not change the answer.")?;
    fields.refuse("web_search_options", "this server does not search the web; offer a tool for it in `tools`.")?;
    fields.refuse("verbosity", "say in a message how long the answer should be.")?;
    if let Some(modalities) = fields.array("modalities")?
        && modalities.iter().any(|modality| modality != "text")
    {
        return Err(ApiError::unsupported("modalities", "The only modality of this server is \"text\"."));
    }
    Ok(())
}
