//! Answers of the families, as their models write them, split into content, reasoning and tool calls.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on has failed")]

use murmur_chat::{Delta, OutputParser, OutputSpec, ReasoningFormat, ToolFormat};
use proptest::prelude::*;

const HERMES: ToolFormat = ToolFormat::Tagged { open: "<tool_call>", close: "</tool_call>" };
const MISTRAL: ToolFormat = ToolFormat::Mistral { named: true };
const THINK: ReasoningFormat = ReasoningFormat::Tags { open: "<think>", close: "</think>" };

fn spec(tool_format: Option<ToolFormat>, reasoning: ReasoningFormat) -> OutputSpec {
    OutputSpec {
        tool_format,
        tool_names: vec!["get_weather".into(), "ping".into()],
        reasoning,
        starts_in_reasoning: false,
        calls_max: usize::MAX,
    }
}

/// Neighbours of a kind joined, as if all had come at once.
fn join(deltas: impl IntoIterator<Item = Delta>) -> Vec<Delta> {
    let mut joined: Vec<Delta> = Vec::new();
    for delta in deltas {
        match (joined.last_mut(), &delta) {
            (Some(Delta::Content(a)), Delta::Content(b)) | (Some(Delta::Reasoning(a)), Delta::Reasoning(b)) => {
                a.push_str(b)
            }
            (Some(Delta::ToolCallArguments { fragment, .. }), Delta::ToolCallArguments { fragment: b, .. }) => {
                fragment.push_str(b);
            }
            _ => joined.push(delta),
        }
    }
    joined
}

/// One line per delta: `content "..."`, `reasoning "..."`, `call name(arguments)`, `cut` for a call without end.
fn summary(deltas: &[Delta]) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for delta in deltas {
        match delta {
            Delta::Content(text) => lines.push(format!("content {text:?}")),
            Delta::Reasoning(text) => lines.push(format!("reasoning {text:?}")),
            Delta::ToolCallStart { index, id, name } => {
                let id = id.as_ref().map(|id| format!("#{id}")).unwrap_or_default();
                lines.push(format!("call {index}{id} {name}("));
            }
            Delta::ToolCallArguments { fragment, .. } => lines.last_mut().unwrap().push_str(fragment),
            Delta::ToolCallEnd { .. } => lines.last_mut().unwrap().push(')'),
        }
    }
    lines
}

fn parse_in_pieces<'a>(spec: &OutputSpec, pieces: impl IntoIterator<Item = &'a str>) -> Vec<Delta> {
    let mut parser = OutputParser::new(spec.clone());
    let mut deltas = Vec::new();
    for piece in pieces {
        deltas.extend(parser.push(piece));
    }
    deltas.extend(parser.finish());
    join(deltas)
}

fn parse(spec: &OutputSpec, text: &str) -> Vec<String> {
    summary(&parse_in_pieces(spec, [text]))
}

fn check(format: ToolFormat, text: &str, expected: &[&str]) {
    assert_eq!(parse(&spec(Some(format), THINK), text), expected, "{format:?}: {text}");
}

#[test]
fn hermes_calls_are_read() {
    let call = r#"<tool_call>
{"name": "get_weather", "arguments": {"city": "Zürich", "n": [1, {"a": null}]}}
</tool_call>"#;
    let read = r#"get_weather({"city": "Zürich", "n": [1, {"a": null}]})"#;
    check(HERMES, call, &[&format!("call 0 {read}")]);
    check(
        HERMES,
        &format!("I look.\n{call}\n{call}\n"),
        &["content \"I look.\"", &format!("call 0 {read}"), &format!("call 1 {read}")],
    );
    check(
        HERMES,
        &format!("<think>\nHm.\n</think>\n\n{call}Done."),
        &["reasoning \"Hm.\"", &format!("call 0 {read}"), "content \"Done.\""],
    );
    // A marker says that a call is meant, whatever its name; the closing tag may be missing; several in one tag.
    check(HERMES, r#"<tool_call>{"name": "other"}"#, &["call 0 other({})"]);
    check(HERMES, "<tool_call>[{\"name\": \"a\"}, {\"name\": \"b\"}]</tool_call>", &["call 0 a({})", "call 1 b({})"]);
    check(HERMES, "<tool_call>{\"name\": \"a\"}\n{\"name\": \"b\"}\n</tool_call>", &["call 0 a({})", "call 1 b({})"]);
}

#[test]
fn keys_may_stand_in_any_order_and_arguments_may_be_text_or_null() {
    check(HERMES, r#"<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>"#, &[r#"call 0 f({"a": 1})"#]);
    check(
        HERMES,
        r#"<tool_call>{"id": "x1", "type": "function", "name": "f", "arguments": {}}</tool_call>"#,
        &["call 0#x1 f({})"],
    );
    check(
        HERMES,
        r#"<tool_call>{"name": "f", "arguments": "{\"a\": \"\\n\"}"}</tool_call>"#,
        &[r#"call 0 f({"a": "\n"})"#],
    );
    check(HERMES, r#"<tool_call>{"name": "f", "arguments": null}</tool_call>"#, &["call 0 f({})"]);
    check(HERMES, r#"<tool_call>{"score": 1, "tool_name": "f", "parameters": {}}</tool_call>"#, &["call 0 f({})"]);
}

#[test]
fn a_raw_newline_in_an_argument_gets_its_escape() {
    check(
        HERMES,
        "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": \"x\ny\"}}</tool_call>",
        &[r#"call 0 f({"a": "x\ny"})"#],
    );
}

#[test]
fn what_is_no_call_stays_content() {
    for text in [
        "<tool_call> hello </tool_call>",
        "<tool_call>{\"name\": 1}</tool_call>",
        "<tool_call>{\"arguments\": {}}</tool_call>",
        "<tool_call>{\"name\": \"f\", \"arguments\": 5}</tool_call>",
        "<tool_call>[]</tool_call>",
        "<tool_call>",
        "<tool_ca",
        "a < b <tool",
        "<<tool_calls>",
        "<tool_call>{\"name\": \"f\", \"arg",
        "{\"name\": \"get_weather\", \"arguments\": {}}",
        " leading and trailing \n",
    ] {
        check(HERMES, text, &[&format!("content {text:?}")]);
    }
    // After a broken call the next is found, also when the fault is the next marker's first character.
    check(
        HERMES,
        "<tool_call>{\"name\": <tool_call>{\"name\": \"f\"}</tool_call>",
        &["content \"<tool_call>{\\\"name\\\": \"", "call 0 f({})"],
    );
}

#[test]
fn a_call_that_breaks_after_it_was_announced_ends_there() {
    check(
        HERMES,
        "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": oops}} more",
        &["call 0 f({\"a\": )", "content \"oops}} more\""],
    );
    check(HERMES, "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": \"cut of", &["call 0 f({\"a\": \"cut of)"]);
}

#[test]
fn llama_calls_are_read() {
    let format = ToolFormat::Llama3;
    check(format, r#"{"name": "ping", "parameters": {}}"#, &["call 0 ping({})"]);
    check(format, r#"{"type": "function", "name": "ping", "parameters": {"a": "b"}}"#, &[r#"call 0 ping({"a": "b"})"#]);
    check(
        format,
        r#"<|python_tag|>{"name": "ping", "parameters": {}}; {"name": "ping", "parameters": {"n": 2}}"#,
        &["call 0 ping({})", r#"call 1 ping({"n": 2})"#],
    );
    for text in [
        r#"{"name": "Ada", "parameters": {}}"#,
        r#"{"answer": 42}"#,
        r#"Call {"name": "ping", "parameters": {}}"#,
        "<|python_tag|>print(1)",
    ] {
        check(format, text, &[&format!("content {text:?}")]);
    }
}

#[test]
fn mistral_calls_are_read() {
    check(MISTRAL, r#"[TOOL_CALLS][{"name": "ping", "arguments": {}, "id": "abc123xyz"}]"#, &["call 0 ping({})"]);
    check(
        MISTRAL,
        r#"[TOOL_CALLS] [{"id": "abc123xyz", "name": "f", "arguments": {"a": 1}}, {"name": "ping", "arguments": {}}]"#,
        &[r#"call 0#abc123xyz f({"a": 1})"#, "call 1 ping({})"],
    );
    check(
        MISTRAL,
        r#"Let me see.[TOOL_CALLS]get_weather[ARGS]{"city": "Bern"}[TOOL_CALLS]ping[CALL_ID]abc123xyz[ARGS] {}"#,
        &["content \"Let me see.\"", r#"call 0 get_weather({"city": "Bern"})"#, "call 1#abc123xyz ping({})"],
    );
    check(MISTRAL, r#"[TOOL_CALLS]ping{"a": [1]}"#, &[r#"call 0 ping({"a": [1]})"#]);
    for text in
        ["[TOOL_CALLS]", "[TOOL_CALLS]a b?", "[TOOL_CALLS]f[ARGS]x", "[TOOL_CALLS][1]", "[TOOL_CALLS][ARGS]{}", "[TOOL"]
    {
        check(MISTRAL, text, &[&format!("content {text:?}")]);
    }
}

#[test]
fn generic_calls_are_read() {
    let format = ToolFormat::Generic;
    check(format, r#" {"name": "ping", "arguments": {}}"#, &["call 0 ping({})"]);
    check(format, "```json\n{\"name\": \"ping\", \"arguments\": {}}\n```", &["call 0 ping({})"]);
    check(
        format,
        r#"[{"name": "ping", "arguments": {}}, {"name": "ping", "arguments": {"n": 1}}]"#,
        &["call 0 ping({})", r#"call 1 ping({"n": 1})"#],
    );
    check(format, "{\"name\": \"ping\"}\nThat was it.", &["call 0 ping({})", "content \"\\nThat was it.\""]);
    for text in ["Hello", "[1, 2]", "{\"a\": 1}", "```python\nx\n```", "``", "{\"name\": \"pong\"}", "", "  "] {
        let expected: Vec<String> = if text.is_empty() { vec![] } else { vec![format!("content {text:?}")] };
        assert_eq!(parse(&spec(Some(format), THINK), text), expected);
    }
}

#[test]
fn reasoning_is_split_off() {
    let think = |text: &str| parse(&spec(None, THINK), text);
    assert_eq!(
        think("<think>\nA </ b\n\nc\n</think>\n\n Yes \n"),
        ["reasoning \"A </ b\\n\\nc\"", "content \"Yes \\n\""]
    );
    assert_eq!(think("\n<think></think>Yes"), ["content \"Yes\""]);
    assert_eq!(think("Yes <think>no</think>"), ["content \"Yes <think>no</think>\""]);
    assert_eq!(think("<thinking>"), ["content \"<thinking>\""]);
    assert_eq!(think("<think>cut </thi"), ["reasoning \"cut </thi\""]);

    let opened = OutputSpec { starts_in_reasoning: true, ..spec(None, THINK) };
    assert_eq!(parse(&opened, "Hm.\n</think>\nYes"), ["reasoning \"Hm.\"", "content \"Yes\""]);
    assert_eq!(parse(&opened, "<think>\nHm.</think>Yes"), ["reasoning \"Hm.\"", "content \"Yes\""]);
}

#[test]
fn harmony_channels_are_read() {
    let harmony = |text: &str| parse(&spec(Some(ToolFormat::Harmony), ReasoningFormat::Harmony), text);
    assert_eq!(
        harmony(
            "<|channel|>analysis<|message|>Hm. a<b<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>"
        ),
        ["reasoning \"Hm. a<b\"", "content \"Yes.\""]
    );
    let call = "<|channel|>commentary to=functions.ping <|constrain|>json<|message|>{\"a\": 1}<|call|>";
    assert_eq!(harmony(call), ["call 0 ping({\"a\": 1})"]);
    let call = " to=functions.ping<|channel|>commentary json<|message|>{}";
    assert_eq!(
        harmony(&format!("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant{call}")),
        ["reasoning \"Hm.\"", "call 0 ping({})"]
    );
    assert_eq!(harmony("Plain text."), ["content \"Plain text.\""]);
    assert_eq!(harmony("<|channel|>final<|message|>cut <|en"), ["content \"cut <|en\""]);
}

#[test]
fn without_tools_nothing_is_a_call() {
    let text = "<tool_call>{\"name\": \"f\"}</tool_call>";
    assert_eq!(parse(&spec(None, ReasoningFormat::None), text), [format!("content {text:?}")]);
}

#[test]
fn arguments_stream_as_they_come() {
    let mut parser = OutputParser::new(spec(Some(HERMES), ReasoningFormat::None));
    assert_eq!(parser.push("<tool_call>{\"name\": \"f\", \"argum"), []);
    assert_eq!(
        parser.push("ents\": {\"a\": \"x"),
        [
            Delta::ToolCallStart { index: 0, id: None, name: "f".into() },
            Delta::ToolCallArguments { index: 0, fragment: "{\"a\": \"x".into() },
        ]
    );
    assert_eq!(parser.push("y"), [Delta::ToolCallArguments { index: 0, fragment: "y".into() }]);
    assert_eq!(
        parser.push("\"}}"),
        [Delta::ToolCallArguments { index: 0, fragment: "\"}".into() }, Delta::ToolCallEnd { index: 0 },]
    );
}

#[test]
fn text_that_can_be_no_marker_streams_at_once() {
    let mut parser = OutputParser::new(spec(Some(HERMES), THINK));
    assert_eq!(parser.push("Hel"), [Delta::Content("Hel".into())]);
    assert_eq!(parser.push("lo <"), [Delta::Content("lo".into())]);
    assert_eq!(parser.push("b>"), [Delta::Content(" <b>".into())]);
    // An answer in JSON is known as such from its first foreign key on.
    let mut parser = OutputParser::new(spec(Some(ToolFormat::Generic), ReasoningFormat::None));
    assert_eq!(parser.push("{\"answer\""), [Delta::Content("{\"answer\"".into())]);
}

#[test]
fn one_call_is_enough_where_parallel_calls_are_not_wanted() {
    let mut parser = OutputParser::new(OutputSpec { calls_max: 1, ..spec(Some(HERMES), ReasoningFormat::None) });
    assert!(!parser.is_complete());
    let deltas = parser.push("<tool_call>{\"name\": \"a\"}</tool_call><tool_call>{\"name\": \"b\"}</tool_call>");
    assert_eq!(summary(&deltas), ["call 0 a({})"]);
    assert!(parser.is_complete());
    assert_eq!(parser.finish(), []);
}

/// Text that comes close to markers: pieces of the formats in random order.
fn near_calls() -> impl Strategy<Value = String> {
    let piece = prop::sample::select(vec![
        "<tool_call>",
        "</tool_call>",
        "<tool_",
        "<",
        "[TOOL_CALLS]",
        "[ARGS]",
        "[CALL_ID]",
        "[",
        "]",
        "ping",
        "<|python_tag|>",
        "{\"name\": \"ping\", \"arguments\": {\"a\": [1, \"é\"]}}",
        "{\"arguments\": {}, \"name\": \"get_weather\"}",
        "{\"name\": \"x\"",
        "{",
        "}",
        ",",
        ";",
        " ",
        "\n",
        "text",
        "<think>",
        "</think>",
        "```json\n",
        "```",
        "<|channel|>",
        "analysis",
        "final",
        "commentary to=functions.ping ",
        "<|message|>",
        "<|end|>",
        "<|start|>",
        "assistant",
        "<|call|>",
        "\"",
        ":",
        "\\",
        "null",
        "\u{1f600}",
    ]);
    prop::collection::vec(piece, 0..14).prop_map(|pieces| pieces.concat())
}

fn any_spec() -> impl Strategy<Value = OutputSpec> {
    let format = prop::sample::select(vec![
        None,
        Some(HERMES),
        Some(ToolFormat::Llama3),
        Some(MISTRAL),
        Some(ToolFormat::Generic),
        Some(ToolFormat::Harmony),
    ]);
    let reasoning = prop::sample::select(vec![ReasoningFormat::None, THINK]);
    (format, reasoning, any::<bool>(), prop::sample::select(vec![1, usize::MAX])).prop_map(
        |(format, reasoning, starts_in_reasoning, calls_max)| OutputSpec {
            starts_in_reasoning,
            calls_max,
            ..spec(format, reasoning)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_deltas_do_not_depend_on_how_the_text_was_cut(
        text in near_calls(),
        spec in any_spec(),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8),
    ) {
        let mut ends: Vec<usize> = text.char_indices().map(|(i, _)| i).collect();
        ends.push(text.len());
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| ends[cut.index(ends.len())]).collect();
        cuts.extend([0, text.len()]);
        cuts.sort_unstable();
        let pieces: Vec<&str> = cuts.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect();
        prop_assert_eq!(parse_in_pieces(&spec, pieces), parse_in_pieces(&spec, [text.as_str()]));
    }

    #[test]
    fn without_markers_every_character_comes_out(text in "[a-z {}\\[\\]\"`:,\n]{0,60}", spec in any_spec()) {
        let mut out = String::new();
        for delta in parse_in_pieces(&spec, [text.as_str()]) {
            match delta {
                Delta::Content(text) | Delta::Reasoning(text) => out.push_str(&text),
                other => prop_assert!(false, "{:?}", other),
            }
        }
        if spec.starts_in_reasoning && spec.reasoning != ReasoningFormat::None {
            prop_assert_eq!(out.trim(), text.trim());
        } else {
            prop_assert_eq!(out, text);
        }
    }

    #[test]
    fn calls_begin_and_end_in_turn(text in near_calls(), spec in any_spec()) {
        let (mut open, mut calls) = (None, 0);
        for delta in parse_in_pieces(&spec, [text.as_str()]) {
            match delta {
                Delta::ToolCallStart { index, .. } => {
                    prop_assert_eq!((open, index), (None, calls));
                    open = Some(index);
                }
                Delta::ToolCallArguments { index, .. } => prop_assert_eq!(open, Some(index)),
                Delta::ToolCallEnd { index } => {
                    prop_assert_eq!(open.take(), Some(index));
                    calls += 1;
                }
                Delta::Content(text) | Delta::Reasoning(text) => prop_assert!(open.is_none() && !text.is_empty()),
            }
        }
        prop_assert_eq!(open, None);
    }
}
