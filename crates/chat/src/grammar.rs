//! Grammars that make a model call a tool (`tool_choice: required` or a named function), in the dialect of its family,
//! with arguments that match the function's JSON Schema; and response formats that leave room for reasoning.
//!
//! Written in llguidance's Lark dialect (its `docs/syntax.md`): `%json {...}` embeds a schema, `<[id]>` is a control
//! token, whose text ordinary tokens cannot produce.

use murmur_protocol::sampling::{Grammar, JSON_WHITESPACE_PATTERN, Token};
use serde_json::{Map, Value, json};

use crate::{
    ReasoningFormat, ToolFormat,
    python::json_string,
    tools::{MISTRAL_ARGS, MISTRAL_CALLS},
};

/// Tells the id of the *control* token with exactly this text, if the vocabulary has one.
pub type ControlToken<'a> = &'a dyn Fn(&str) -> Option<Token>;

/// A function that may be called.
pub(crate) struct Function<'a> {
    pub(crate) name: &'a str,
    /// JSON Schema of its arguments.
    pub(crate) parameters: Option<&'a Value>,
}

/// How the answer may begin, before what the grammar is about.
#[derive(Clone, Copy)]
pub(crate) struct Preamble {
    pub(crate) reasoning: ReasoningFormat,
    pub(crate) starts_in_reasoning: bool,
}

/// Writes rules; markers become control tokens where the vocabulary has them as such.
struct Writer<'a> {
    control_token: ControlToken<'a>,
    rules: String,
}

impl Writer<'_> {
    fn marker(&self, text: &str) -> String {
        match (self.control_token)(text) {
            Some(id) => format!("<[{id}]>"),
            None => literal(text),
        }
    }

    fn rule(&mut self, name: &str, body: &str) {
        self.rules.push_str(&format!("{name}: {body}\n"));
    }

    /// A rule for any text up to and with a marker.
    fn text_up_to(&mut self, name: &str, marker: &str) {
        match (self.control_token)(marker) {
            Some(id) => self.rule(name, &format!("/(?s:.*)/ <[{id}]>")),
            None => self.rule(&format!("{name}[lazy]"), &format!("/(?s:.*){}/", regex_literal(marker))),
        }
    }

    /// A rule `preamble` for reasoning and layout. Returns false where the answer begins at once.
    fn preamble(&mut self, preamble: Preamble) -> bool {
        match preamble.reasoning {
            ReasoningFormat::None => return false,
            ReasoningFormat::Tags { open, close } => {
                self.text_up_to("thought", close);
                self.rule("SPACE", "/[ \\n]{0,3}/");
                if preamble.starts_in_reasoning {
                    self.rule("preamble", "thought SPACE");
                } else {
                    let open = self.marker(open);
                    self.rule("preamble", &format!("({open} thought SPACE)?"));
                }
            }
            ReasoningFormat::Harmony => {
                let [channel, message, start] = ["<|channel|>", "<|message|>", "<|start|>"].map(|t| self.marker(t));
                self.text_up_to("thought", "<|end|>");
                self.rule("preamble", &format!("({channel} \"analysis\" {message} thought {start} \"assistant\")?"));
            }
        }
        true
    }
}

/// A string in Lark's quotes, which are JSON's.
fn literal(text: &str) -> String {
    json_string(text, false)
}

/// Text that a regular expression between slashes takes literally.
fn regex_literal(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_alphanumeric() || c == '_' { c.to_string() } else { format!("\\x{{{:x}}}", c as u32) })
        .collect()
}

/// The schema of the arguments, made to accept objects only, its references moved to where it will stand.
fn arguments_schema(parameters: Option<&Value>, place: &str) -> Value {
    let mut schema = match parameters {
        Some(Value::Object(schema)) => schema.clone(),
        _ => Map::new(),
    };
    if !["type", "$ref", "anyOf", "oneOf", "allOf"].iter().any(|key| schema.contains_key(*key)) {
        schema.insert("type".into(), "object".into());
    }
    let mut schema = Value::Object(schema);
    move_references(&mut schema, place);
    schema
}

/// `#/$defs/x` points from the root of the document; the schema becomes a part of another document.
fn move_references(schema: &mut Value, place: &str) {
    match schema {
        Value::Object(entries) => {
            for (key, value) in entries {
                match value {
                    Value::String(target) if key == "$ref" && target.starts_with('#') => {
                        *target = format!("#{place}{}", &target[1..]);
                    }
                    value => move_references(value, place),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| move_references(item, place)),
        _ => {}
    }
}

/// A schema inside a Lark grammar, with our bound on white space unless it brings its own options for llguidance.
fn embedded(mut schema: Value) -> String {
    if let Some(object) = schema.as_object_mut() {
        let options = json!({ "whitespace_pattern": JSON_WHITESPACE_PATTERN });
        object.entry("x-guidance").or_insert(options);
    }
    format!("%json {schema}")
}

/// The grammar for at least one call (`parallel`: or more) of these functions.
pub(crate) fn forced_call(
    format: ToolFormat,
    functions: &[Function<'_>],
    parallel: bool,
    preamble: Preamble,
    control_token: ControlToken<'_>,
) -> Grammar {
    let mut writer = Writer { control_token, rules: String::new() };
    let start = if writer.preamble(preamble) { "preamble calls" } else { "calls" };
    let arguments_key = if format == ToolFormat::Llama3 { "parameters" } else { "arguments" };
    let named = matches!(format, ToolFormat::Mistral { named: true } | ToolFormat::Harmony);
    let mut alternatives = Vec::new();
    for (i, function) in functions.iter().enumerate() {
        let rule = format!("json_{i}");
        if named {
            let arguments = arguments_schema(function.parameters, "");
            writer.rule(&rule, &embedded(arguments));
            let alternative = match format {
                ToolFormat::Harmony => {
                    let [channel, constrain, message, call] =
                        ["<|channel|>", "<|constrain|>", "<|message|>", "<|call|>"].map(|text| writer.marker(text));
                    let header = literal(&format!("commentary to=functions.{} ", function.name));
                    format!("{channel} {header} {constrain} \"json\" {message} {rule} {call}")
                }
                _ => format!("{} {} {rule}", literal(function.name), writer.marker(MISTRAL_ARGS)),
            };
            alternatives.push(alternative);
        } else {
            let schema = json!({
                "type": "object",
                "properties": {
                    "name": {"const": function.name},
                    arguments_key: arguments_schema(function.parameters, &format!("/properties/{arguments_key}")),
                },
                "required": ["name", arguments_key],
                "additionalProperties": false,
            });
            writer.rule(&rule, &embedded(schema));
            alternatives.push(rule);
        }
    }
    writer.rule("call", &alternatives.join(" | "));
    let more = |separator: &str, item: &str| {
        if parallel { format!("{item} ({separator} {item})*") } else { item.to_owned() }
    };
    let calls = match format {
        ToolFormat::Tagged { open, close } => {
            let (open, close) = (writer.marker(open), writer.marker(close));
            writer.rule("tagged", &format!("{open} \"\\n\" call \"\\n\" {close}"));
            more("\"\\n\"", "tagged")
        }
        ToolFormat::Llama3 => more("\"; \"", "call"),
        ToolFormat::Mistral { named: true } => {
            writer.rule("marked", &format!("{} call", writer.marker(MISTRAL_CALLS)));
            more("", "marked")
        }
        ToolFormat::Mistral { named: false } => {
            format!("{} \"[\" {} \"]\"", writer.marker(MISTRAL_CALLS), more("\", \"", "call"))
        }
        // A message is one call, and `<|call|>` ends the answer.
        ToolFormat::Harmony => "call".to_owned(),
        ToolFormat::Generic if parallel => "call | \"[\" call (\", \" call)* \"]\"".to_owned(),
        ToolFormat::Generic => "call".to_owned(),
    };
    writer.rule("calls", &calls);
    Grammar::Lark(format!("start: {start}\n{}", writer.rules))
}

/// A response format for a model that reasons first: the grammar holds for what follows the reasoning. `Lark` grammars
/// are the caller's own and stay as they are.
pub(crate) fn after_reasoning(grammar: Grammar, preamble: Preamble, control_token: ControlToken<'_>) -> Grammar {
    if preamble.reasoning == ReasoningFormat::None {
        return grammar;
    }
    let body = match &grammar {
        Grammar::JsonObject => embedded(json!({"type": "object"})),
        Grammar::JsonSchema(schema) => {
            serde_json::from_str(schema).map_or_else(|_| format!("%json {schema}"), embedded)
        }
        Grammar::Regex(regex) => format!("/{}/", regex.replace('/', "\\/")),
        Grammar::Lark(_) => return grammar,
    };
    let mut writer = Writer { control_token, rules: String::new() };
    writer.preamble(preamble);
    let channel = match preamble.reasoning {
        ReasoningFormat::Harmony => {
            format!("{} \"final\" {}", writer.marker("<|channel|>"), writer.marker("<|message|>"))
        }
        _ => String::new(),
    };
    writer.rule("body", &body);
    Grammar::Lark(format!("start: preamble {channel} body\n{}", writer.rules))
}
