//! The grammars of forced calls, under llguidance itself: what they accept, what they refuse, and that whatever they let
//! a model write is read as a call.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on has failed")]

mod common;

use std::sync::LazyLock;

use common::*;
use llguidance::{
    Matcher, ParserFactory,
    api::TopLevelGrammar,
    toktrie::{ApproximateTokEnv, TokEnv},
};
use murmur_chat::{ChatPrompt, Delta, ToolChoice};
use murmur_protocol::sampling::Grammar;
use proptest::prelude::*;
use serde_json::{Value, json};

static BYTES: LazyLock<TokEnv> = LazyLock::new(ApproximateTokEnv::single_byte_env);

fn matcher(grammar: &Grammar) -> Matcher {
    let grammar = match grammar {
        Grammar::Lark(lark) => TopLevelGrammar::from_lark(lark.clone()),
        Grammar::JsonSchema(schema) => TopLevelGrammar::from_json_schema(serde_json::from_str(schema).unwrap()),
        other => panic!("{other:?}"),
    };
    let mut factory = ParserFactory::new_simple(&BYTES).unwrap();
    factory.quiet();
    let matcher = Matcher::new(factory.create_parser(grammar));
    assert!(!matcher.is_error(), "{:?}", matcher.get_error());
    matcher
}

fn accepts(grammar: &Grammar, text: &str) -> bool {
    let mut matcher = matcher(grammar);
    let tokens: Vec<u32> = text.bytes().map(u32::from).collect();
    matcher.try_consume_tokens(&tokens).unwrap() == tokens.len() && matcher.is_accepting().unwrap()
}

fn weather() -> Value {
    tool(
        "get_weather",
        json!({
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 10}, "unit": {"$ref": "#/$defs/unit"}},
            "required": ["city"],
            "additionalProperties": false,
            "$defs": {"unit": {"enum": ["C", "F"]}}
        }),
    )
}

/// `flag` only, so that random writing ends soon.
fn small() -> Value {
    tool(
        "set",
        json!({"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"], "additionalProperties": false}),
    )
}

fn forced(source: &str, choice: ToolChoice, parallel: bool) -> ChatPrompt {
    let template = template(source);
    let tools = [weather(), small()];
    let messages = [user("Hi")];
    let request = murmur_chat::ChatRequest { parallel_tool_calls: parallel, ..request(&messages, &tools, &choice) };
    template.prepare(&request).unwrap()
}

const WEATHER: &str = r#"{"city": "Bern", "unit": "C"}"#;

#[test]
fn hermes_calls_can_be_forced() {
    let grammar = forced(CHATML, ToolChoice::Required, true).grammar.unwrap();
    let call = |name: &str, arguments: &str| {
        format!("<tool_call>\n{{\"name\": \"{name}\", \"arguments\": {arguments}}}\n</tool_call>")
    };
    let good = call("get_weather", WEATHER);
    assert!(accepts(&grammar, &good));
    assert!(accepts(&grammar, &format!("{good}\n{}", call("set", "{\"on\": true}"))));
    assert!(accepts(&grammar, &format!("<think>\nHm < .\n</think>\n\n{good}")));
    assert!(!accepts(&grammar, "Hello"));
    assert!(!accepts(&grammar, &call("other", "{}")));
    assert!(!accepts(&grammar, &call("get_weather", "{\"unit\": \"K\"}")));
    assert!(!accepts(&grammar, &call("set", WEATHER)));
    assert!(!accepts(&forced(CHATML, ToolChoice::Required, false).grammar.unwrap(), &format!("{good}\n{good}")));
    let named = forced(CHATML, ToolChoice::Function("set".into()), true).grammar.unwrap();
    assert!(accepts(&named, &call("set", "{\"on\": false}")) && !accepts(&named, &good));
}

#[test]
fn other_formats_can_be_forced() {
    let grammar = forced(HEADERS, ToolChoice::Required, true).grammar.unwrap();
    assert!(accepts(&grammar, &format!("{{\"name\": \"get_weather\", \"parameters\": {WEATHER}}}")));
    assert!(accepts(
        &grammar,
        "{\"name\": \"set\", \"parameters\": {\"on\": true}}; {\"name\": \"set\", \"parameters\": {\"on\": true}}"
    ));
    assert!(!accepts(&grammar, "{\"name\": \"set\", \"parameters\": {}}"));

    let grammar = forced(INST, ToolChoice::Required, true).grammar.unwrap();
    assert!(accepts(&grammar, &format!("[TOOL_CALLS]get_weather[ARGS]{WEATHER}[TOOL_CALLS]set[ARGS]{{\"on\": true}}")));
    assert!(!accepts(&grammar, "[TOOL_CALLS]set[ARGS]{}"));

    let older = INST.replace("[ARGS]", " ");
    let grammar = forced(&older, ToolChoice::Required, true).grammar.unwrap();
    assert!(accepts(&grammar, &format!("[TOOL_CALLS][{{\"name\": \"get_weather\", \"arguments\": {WEATHER}}}]")));

    let grammar = forced(TURNS, ToolChoice::Required, true).grammar.unwrap();
    assert!(accepts(&grammar, &format!("{{\"name\": \"get_weather\", \"arguments\": {WEATHER}}}")));
    assert!(accepts(
        &grammar,
        "[{\"name\": \"set\", \"arguments\": {\"on\": true}}, {\"name\": \"set\", \"arguments\": {\"on\": true}}]"
    ));
    assert!(!accepts(&grammar, "[]"));
}

const HARMONY: &str = "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}\
    {% for t in tools or [] %}{{ t | tojson }}{% endfor %}<|start|>assistant{{ '<|channel|>' if false }}";

#[test]
fn harmony_calls_can_be_forced() {
    let prompt = forced(HARMONY, ToolChoice::Required, false);
    let grammar = prompt.grammar.clone().unwrap();
    let call = "<|channel|>commentary to=functions.set <|constrain|>json<|message|>{\"on\": true}<|call|>";
    assert!(accepts(&grammar, call));
    assert!(accepts(&grammar, &format!("<|channel|>analysis<|message|>Hm<|end|><|start|>assistant{call}")));
    assert!(!accepts(&grammar, "<|channel|>final<|message|>no"));
}

#[test]
fn control_tokens_are_named_by_their_ids() {
    let tools = [small()];
    let messages = [user("Hi")];
    let control = |text: &str| (text == "[TOOL_CALLS]").then_some(9);
    let request =
        murmur_chat::ChatRequest { control_token: Some(&control), ..request(&messages, &tools, &ToolChoice::Required) };
    let Some(Grammar::Lark(lark)) = template(INST).prepare(&request).unwrap().grammar else { panic!() };
    assert!(lark.contains("<[9]>") && !lark.contains("\"[TOOL_CALLS]\"") && lark.contains("\"[ARGS]\""), "{lark}");
    let control = |text: &str| (text == "</think>").then_some(300).or((text == "<think>").then_some(301));
    let request = murmur_chat::ChatRequest { control_token: Some(&control), ..request };
    let Some(Grammar::Lark(lark)) = template(CHATML).prepare(&request).unwrap().grammar else { panic!() };
    assert!(lark.contains("<[300]>") && lark.contains("<[301]>"), "{lark}");
}

#[test]
fn a_response_format_leaves_room_for_reasoning() {
    let prompt = prepare(CHATML, &[user("Hi")], &[]).unwrap();
    let schema = Grammar::JsonSchema(r##"{"type": "object", "properties": {"a": {"$ref": "#/$defs/n"}}, "required": ["a"], "$defs": {"n": {"type": "integer"}}}"##.into());
    let grammar = prompt.response_grammar(schema.clone(), None);
    assert!(accepts(&grammar, "{\"a\": 1}"));
    assert!(accepts(&grammar, "<think>\nHm.\n</think>\n\n{\"a\": 1}"));
    assert!(!accepts(&grammar, "<think>\nHm.\n</think>\n\nNo"));
    let regex = prompt.response_grammar(Grammar::Regex("a/b+".into()), None);
    assert!(accepts(&regex, "<think></think>a/bb") && !accepts(&regex, "a/"));
    let harmony = prepare(HARMONY, &[user("Hi")], &[]).unwrap().response_grammar(schema.clone(), None);
    let last = "<|channel|>final<|message|>{\"a\": 1}";
    assert!(accepts(&harmony, last) && !accepts(&harmony, "{\"a\": 1}"));
    assert!(accepts(&harmony, &format!("<|channel|>analysis<|message|>Hm<|end|><|start|>assistant{last}")));
    let plain = prepare(TURNS, &[user("Hi")], &[]).unwrap();
    assert_eq!(plain.response_grammar(schema.clone(), None), schema);
}

/// Writes text as a model without sense would: any byte the grammar allows. Braces and quotes are preferred, so that it
/// ends.
fn babble(grammar: &Grammar, choices: &[u8]) -> Option<String> {
    const STEPS_MAX: usize = 600;
    let mut matcher = matcher(grammar);
    let mut text = Vec::new();
    for step in 0..STEPS_MAX {
        let mask = matcher.compute_mask_or_eos().ok()?;
        let choice = usize::from(choices[step % choices.len()]);
        if matcher.is_accepting().ok()? && (choice % 3 == 0 || matcher.is_stopped()) {
            return String::from_utf8(text).ok();
        }
        let allowed: Vec<u32> = (0x20u32..0x7f).chain([10]).filter(|&byte| mask.is_allowed(byte)).collect();
        let closing: Vec<u32> =
            allowed.iter().copied().filter(|&byte| matches!(byte, 0x22 | 0x5d | 0x7d | 0x3c)).collect();
        let from = if choice % 2 == 0 && !closing.is_empty() { &closing } else { &allowed };
        let byte = *from.get(choice % from.len().max(1))?;
        matcher.consume_token(byte).ok()?;
        text.push(u8::try_from(byte).ok()?);
    }
    None
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_a_forced_grammar_lets_through_is_read_as_calls(
        source in prop::sample::select(vec![CHATML, HEADERS, INST, TURNS, HARMONY]),
        parallel in any::<bool>(),
        choices in prop::collection::vec(any::<u8>(), 50..200),
    ) {
        let prompt = forced(source, ToolChoice::Required, parallel);
        let Some(text) = babble(prompt.grammar.as_ref().unwrap(), &choices) else { return Ok(()) };
        let mut parser = prompt.parser();
        let mut deltas = parser.push(&text);
        deltas.extend(parser.finish());
        let (mut calls, mut arguments) = (0, String::new());
        for delta in deltas {
            match delta {
                Delta::ToolCallStart { name, .. } => {
                    prop_assert!(name == "set" || name == "get_weather");
                    arguments.clear();
                }
                Delta::ToolCallArguments { fragment, .. } => arguments.push_str(&fragment),
                Delta::ToolCallEnd { .. } => {
                    prop_assert!(serde_json::from_str::<Value>(&arguments).is_ok_and(|a| a.is_object()), "{}", text);
                    calls += 1;
                }
                Delta::Reasoning(_) => {}
                Delta::Content(content) => prop_assert!(false, "content {:?} in {:?}", content, text),
            }
        }
        prop_assert!(calls >= 1 && (parallel || calls == 1), "{} calls in {:?}", calls, text);
    }
}
