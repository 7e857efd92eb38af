//! Templates of our own, in the styles of the families, against goldens; capabilities; limits on hostile templates.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on has failed")]

mod common;

use common::*;
use murmur_chat::{ChatTemplate, ReasoningFormat, RenderInput, TemplateError, ToolFormat};
use serde_json::{Map, Value, json};

fn render(source: &str, messages: &[Value], tools: Option<&[Value]>) -> Result<String, TemplateError> {
    template(source).render(&RenderInput {
        messages,
        tools,
        add_generation_prompt: true,
        bos_token: "<s>",
        eos_token: "</s>",
        extra: &NOTHING,
        now: NOW,
    })
}

#[test]
fn chatml_renders_like_its_golden() {
    let messages = [
        system("Be kind."),
        user("Ping <b>\"&\"</b>"),
        json!({"role": "assistant", "content": "<think>\nx\n</think>\n\nSure", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "ping", "arguments": {"n": 1, "é": [true, null, 1.0]}}}
        ]}),
        json!({"role": "tool", "content": "pong"}),
    ];
    let tools = [ping()];
    assert_eq!(
        render(CHATML, &messages, Some(&tools)).unwrap(),
        "<|im_start|>system\nBe kind.\n\nFunctions:\n{\"type\": \"function\", \"function\": {\"name\": \"ping\", \"description\": \
         \"D.\", \"parameters\": {\"type\": \"object\", \"properties\": {\"n\": {\"type\": \"integer\"}}}}}\nCall as \
         <tool_call>{\"name\": ..., \"arguments\": ...}</tool_call>.<|im_end|>\n<|im_start|>user\nPing \
         <b>\"&\"</b><|im_end|>\n<|im_start|>assistant\nSure\n<tool_call>\n{\"name\": \"ping\", \"arguments\": {\"n\": 1, \"é\": \
         [true, null, 1.0]}}\n</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\npong\n</tool_response><|im_end|>\n\
         <|im_start|>assistant\n"
    );
}

#[test]
fn header_style_renders_like_its_golden() {
    let messages = [system("  Be kind.\n"), user("Ping")];
    let tools = [tool("ping", json!({}))];
    assert_eq!(
        render(HEADERS, &messages, Some(&tools)).unwrap(),
        "<s><|start_header_id|>system<|end_header_id|>\n\nDate: 26 Jul 2024\n\nBe kind.<|eot_id|><|start_header_id|>user\
         <|end_header_id|>\n\nAnswer with {\"name\": function name, \"parameters\": dictionary}.\n{\n    \"name\": \"ping\",\n    \
         \"description\": \"D.\",\n    \"parameters\": {}\n}\nPing<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    );
    let call = json!({"function": {"name": "a", "arguments": {}}});
    let two = json!({"role": "assistant", "content": "", "tool_calls": [call, call]});
    assert_eq!(
        render(HEADERS, &[user("x"), two], None),
        Err(TemplateError::Raised("one call at a time, not 2".into()))
    );
}

#[test]
fn inst_style_renders_like_its_golden() {
    let mut messages = vec![system("S"), user("Ping")];
    messages.push(json!({"role": "assistant", "content": "", "tool_calls": [
        {"id": "abc123xyz", "function": {"name": "ping", "arguments": {"n": 1}}}
    ]}));
    messages.push(json!({"role": "tool", "content": "pong"}));
    messages.push(assistant("Done."));
    messages.push(user("Again"));
    assert_eq!(
        render(INST, &messages, Some(&[tool("ping", json!({}))])).unwrap(),
        "<s>[SYSTEM_PROMPT]S[/SYSTEM_PROMPT][INST]Ping[/INST][TOOL_CALLS]ping[ARGS]{\"n\": 1}</s>[TOOL_RESULTS]pong[/TOOL_RESULTS]\
         Done.</s>[AVAILABLE_TOOLS][{\"type\": \"function\", \"function\": {\"name\": \"ping\", \"description\": \"D.\", \
         \"parameters\": {}}}][/AVAILABLE_TOOLS][INST]Again[/INST]"
    );
}

#[test]
fn turn_style_renders_like_its_golden() {
    assert_eq!(
        render(TURNS, &[user(" Hi "), assistant("Ho"), user("Hm")], None).unwrap(),
        "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHo<end_of_turn>\n<start_of_turn>user\nHm<end_of_turn>\n\
         <start_of_turn>model\n"
    );
    assert_eq!(render(TURNS, &[system("S")], None), Err(TemplateError::Raised("System role not supported".into())));
}

#[test]
fn the_default_template_is_chatml() {
    let chatml = ChatTemplate::chatml().unwrap();
    let text = chatml
        .render(&RenderInput {
            messages: &[user("Hi"), assistant("Ho")],
            tools: None,
            add_generation_prompt: true,
            bos_token: "",
            eos_token: "",
            extra: &NOTHING,
            now: NOW,
        })
        .unwrap();
    assert_eq!(text, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n<|im_start|>assistant\n");
    assert!(!chatml.capabilities().tools);
    assert!(chatml.capabilities().system_role);
}

#[test]
fn capabilities_are_found_by_probing() {
    let chatml = template(CHATML).capabilities().clone();
    assert!(chatml.system_role && chatml.tools && chatml.tool_calls && chatml.tool_results && chatml.object_arguments);
    assert!(chatml.thinking_switch);
    assert_eq!(chatml.tool_format, ToolFormat::Tagged { open: "<tool_call>", close: "</tool_call>" });
    assert_eq!(chatml.reasoning, ReasoningFormat::Tags { open: "<think>", close: "</think>" });

    let headers = template(HEADERS).capabilities().clone();
    assert!(headers.system_role && headers.tools && headers.object_arguments && !headers.thinking_switch);
    assert_eq!((headers.tool_format, headers.reasoning), (ToolFormat::Llama3, ReasoningFormat::None));

    let inst = template(INST).capabilities().clone();
    assert!(inst.tools && inst.tool_calls && inst.tool_results);
    assert_eq!(inst.tool_format, ToolFormat::Mistral { named: true });

    let turns = template(TURNS).capabilities().clone();
    assert!(!turns.system_role && !turns.tools && !turns.tool_calls && !turns.tool_results);
    assert_eq!(turns.tool_format, ToolFormat::Generic);
}

#[test]
fn arguments_stay_text_for_a_template_that_prints_them() {
    let source = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments }}{% endfor %}{{ m.content }}{% endfor %}";
    assert!(!template(source).capabilities().object_arguments);
    let source = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}";
    assert!(template(source).capabilities().content_parts_only);
}

#[test]
fn extra_variables_reach_the_template() {
    let mut extra = Map::new();
    extra.insert("enable_thinking".into(), false.into());
    let text = template(CHATML)
        .render(&RenderInput {
            messages: &[user("Hi")],
            tools: None,
            add_generation_prompt: true,
            bos_token: "",
            eos_token: "",
            extra: &extra,
            now: NOW,
        })
        .unwrap();
    assert!(text.ends_with("<|im_start|>assistant\n<think>\n\n</think>\n\n"), "{text}");
}

#[test]
fn values_print_as_python_prints_them() {
    let source = "{{ true }} {{ none }} {{ [1.0, 'a'] }} {{ {'a': false} }} {{ nothing }} {{ 'x' | string }}|{{ [1, none] | join(',') }}";
    assert_eq!(render(source, &[], None).unwrap(), "True None [1.0, 'a'] {'a': False}  x|1,None");
}

#[test]
fn a_template_that_does_not_parse_is_refused_with_its_line() {
    let error = ChatTemplate::compile("a\n{% if %}").unwrap_err();
    assert!(matches!(&error, TemplateError::Syntax(text) if text.contains("line 2")), "{error}");
    assert!(matches!(ChatTemplate::compile(&"x".repeat(1 << 20)), Err(TemplateError::TooLong { .. })));
}

#[test]
fn a_template_that_fails_says_why() {
    for (source, why) in [
        ("{{ nothing.more }}", "undefined"),
        ("{{ 'a' | nosuchfilter }}", "nosuchfilter"),
        ("{{ 1 + 'a' }}", "+"),
        ("{{ nothing | tojson }}", "JSON"),
        ("{% include 'other' %}", "other"),
    ] {
        let error = render(source, &[], None).unwrap_err();
        assert!(matches!(&error, TemplateError::Failed(text) if text.contains(why)), "{source}: {error}");
    }
}

#[test]
fn a_template_without_end_is_stopped() {
    for source in [
        "{% for a in range(100000) %}{% for b in range(100000) %}{% for c in range(100000) %}{% endfor %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(x=0) %}{% for a in range(100000) %}{% for b in range(100000) %}{% set ns.x = ns.x + 1 %}{% endfor %}{% endfor %}",
    ] {
        assert_eq!(render(source, &[], None), Err(TemplateError::OutOfFuel), "{source}");
    }
    let recursive = "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}";
    assert!(matches!(render(recursive, &[], None), Err(TemplateError::Failed(_))));
}

#[test]
fn a_template_that_prints_without_end_is_stopped() {
    let doubling = "{% set ns = namespace(x='0123456789') %}{% for a in range(60) %}{% set x %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = x %}{% endfor %}{{ ns.x }}";
    assert_eq!(render(doubling, &[], None), Err(TemplateError::OutputTooLong));
    let nested = "{% set ns = namespace(x=['0123456789']) %}{% for a in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}";
    assert_eq!(render(nested, &[], None), Err(TemplateError::OutputTooLong));
    let replacing = "{% set ns = namespace(x='aaaaaaaaaa') %}{% for a in range(60) %}{% set ns.x = ns.x.replace('a', 'aa') %}{% endfor %}";
    assert_eq!(render(replacing, &[], None), Err(TemplateError::OutputTooLong));
}

#[test]
fn a_value_nested_as_deep_as_the_fuel_allows_does_no_harm() {
    // Literals nest with one instruction per level, about as many levels as the stack is bought for.
    const LITERAL_DEPTH: usize = 60;
    for (open, close) in [("[", "]"), ("{'a': ", "}")] {
        let literal = format!("{}ns.x{}", open.repeat(LITERAL_DEPTH), close.repeat(LITERAL_DEPTH));
        let nesting = format!(
            "{{% set ns = namespace(x=[]) %}}{{% for a in range(100000) %}}{{% for b in range(100000) %}}{{% set ns.x = {literal} %}}\
             {{% endfor %}}{{% endfor %}}"
        );
        assert_eq!(render(&nesting, &[], None), Err(TemplateError::OutOfFuel));
    }
    let printed =
        "{% set ns = namespace(x=[]) %}{% for a in range(100000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}";
    assert!(matches!(render(printed, &[], None), Err(TemplateError::Failed(_))));
}

#[test]
fn a_panic_of_the_template_engine_is_an_error() {
    // minijinja 2.24 subtracts with overflow here; should it learn better, the rendering may succeed.
    let _ = render("{{ []['a':0:-2] }}{{ 'abc'[0:2:-1] }}", &[], None);
}
