//! What the answer's text must match: `response_format`, or the extensions `grammar` and `guided_regex`.

use murmur_protocol::sampling::Grammar;
use serde_json::Value;

use crate::{
    errors::ApiError,
    fields::{Fields, shorten, too_long},
    limits::MAX_GRAMMAR_BYTES,
    openai::messages::check_name,
};

/// A grammar, and the field it came from.
pub(crate) struct Constraint {
    pub(crate) grammar: Grammar,
    pub(crate) param: &'static str,
}

/// Reads the three fields, of which one at most may be given.
///
/// - `response_format`: `text`, `json_object` or `json_schema`. A schema is enforced while tokens are chosen, whether
///   `strict` or not.
/// - `grammar`: a grammar in llguidance's Lark dialect.
/// - `guided_regex` (vLLM's name): a regular expression that the whole text must match.
pub(crate) fn read(fields: &mut Fields) -> Result<Option<Constraint>, ApiError> {
    let format = match fields.fields("response_format")? {
        Some(format) => response_format(format)?.map(|grammar| Constraint { grammar, param: "response_format" }),
        None => None,
    };
    let lark = text(fields, "grammar")?.map(|text| Constraint { grammar: Grammar::Lark(text), param: "grammar" });
    let regex =
        text(fields, "guided_regex")?.map(|text| Constraint { grammar: Grammar::Regex(text), param: "guided_regex" });
    let mut given = [format, lark, regex].into_iter().flatten();
    let first = given.next();
    if let (Some(first), Some(second)) = (&first, given.next()) {
        let message = format!("`{}` and `{}` exclude each other; send one of them.", first.param, second.param);
        return Err(ApiError::param(second.param, message).code("invalid_value"));
    }
    Ok(first)
}

fn text(fields: &mut Fields, key: &str) -> Result<Option<String>, ApiError> {
    match fields.string(key)? {
        Some(text) if text.len() > MAX_GRAMMAR_BYTES => Err(too_long(key, text.len(), MAX_GRAMMAR_BYTES)),
        text => Ok(text),
    }
}

fn response_format(mut format: Fields) -> Result<Option<Grammar>, ApiError> {
    let grammar = match format.required_string("type")?.as_str() {
        "text" => None,
        "json_object" => Some(Grammar::JsonObject),
        "json_schema" => match format.fields("json_schema")? {
            Some(schema) => Some(Grammar::JsonSchema(json_schema(schema)?)),
            None => return Err(format.missing("json_schema")),
        },
        other => {
            let message = format!(
                "`response_format.type` must be \"text\", \"json_object\" or \"json_schema\", not \"{}\".",
                shorten(other)
            );
            return Err(ApiError::param("response_format.type", message).code("invalid_value"));
        }
    };
    format.finish()?;
    Ok(grammar)
}

fn json_schema(mut description: Fields) -> Result<String, ApiError> {
    check_name(&description.path("name"), &description.required_string("name")?)?;
    description.string("description")?;
    description.boolean("strict")?;
    let path = description.path("schema");
    let Some(schema) = description.object("schema")? else {
        return Err(description.missing("schema"));
    };
    description.finish()?;
    let text = Value::Object(schema).to_string();
    if text.len() > MAX_GRAMMAR_BYTES { Err(too_long(&path, text.len(), MAX_GRAMMAR_BYTES)) } else { Ok(text) }
}
