//! Requests made into prompts: what the template takes, what it does not take told in words, and what is refused.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on has failed")]

mod common;

use common::*;
use murmur_chat::{ChatTemplate, PromptError, TemplateError, ToolChoice, ToolFormat};
use serde_json::{Map, Value, json};

#[test]
fn arguments_in_json_text_reach_the_template_as_it_wants_them() {
    let mut messages = vec![user("Ping")];
    messages.extend(called());
    let text = prepare(CHATML, &messages, &[ping()]).unwrap().text;
    assert!(text.contains("<tool_call>\n{\"name\": \"ping\", \"arguments\": {\"n\": 1}}\n</tool_call>"), "{text}");
    let text = prepare(HEADERS, &messages, &[ping()]).unwrap().text;
    assert!(text.contains("{\"name\": \"ping\", \"parameters\": {\"n\": 1}}"), "{text}");
    let text = prepare(INST, &messages, &[ping()]).unwrap().text;
    assert!(text.contains("[TOOL_CALLS]ping[ARGS]{\"n\": 1}</s>[TOOL_RESULTS]pong[/TOOL_RESULTS]"), "{text}");
}

#[test]
fn a_template_that_refuses_system_messages_gets_their_text_in_the_users() {
    let text = prepare(TURNS, &[system("A"), system("B"), user("Hi")], &[]).unwrap().text;
    assert_eq!(text, "<s><start_of_turn>user\nA\n\nB\n\nHi<end_of_turn>\n<start_of_turn>model\n");
    let text = prepare(TURNS, &[system("A")], &[]).unwrap().text;
    assert_eq!(text, "<s><start_of_turn>user\nA<end_of_turn>\n<start_of_turn>model\n");
}

#[test]
fn the_developer_is_the_system_and_leading_system_messages_are_one() {
    let developer = json!({"role": "developer", "content": "B"});
    let text = prepare(CHATML, &[system("A"), developer, user("Hi")], &[]).unwrap().text;
    assert_eq!(text, "<|im_start|>system\nA\n\nB<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
}

#[test]
fn content_in_parts_becomes_text_or_the_other_way_round() {
    let parts = json!({"role": "user", "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]});
    let text = prepare(CHATML, &[parts], &[]).unwrap().text;
    assert!(text.contains("user\nA\nB<|im_end|>"), "{text}");
    let source = "{% for m in messages %}{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endfor %}";
    assert_eq!(prepare(source, &[user("Hi")], &[]).unwrap().text, "<Hi>");
}

#[test]
fn a_template_without_tools_is_told_of_them_in_the_system_message() {
    let mut messages = vec![user("Ping")];
    messages.extend(called());
    let prompt = prepare(TURNS, &messages, &[ping()]).unwrap();
    assert_eq!(prompt.output.tool_format, Some(ToolFormat::Generic));
    assert!(prompt.text.starts_with("<s><start_of_turn>user\nYou can call functions."), "{}", prompt.text);
    assert!(prompt.text.contains("\n{\"name\":\"ping\",\"description\":\"D.\""), "{}", prompt.text);
    assert!(prompt.text.contains("\n\nPing<end_of_turn>"), "{}", prompt.text);
    assert!(
        prompt.text.ends_with(
            "<start_of_turn>model\n{\"name\":\"ping\",\"arguments\":{\"n\":1}}<end_of_turn>\n\
             <start_of_turn>user\nResult:\npong<end_of_turn>\n<start_of_turn>model\n"
        ),
        "{}",
        prompt.text
    );
    // The model's own earlier call, as told, is what the parser reads.
    let mut parser = prompt.parser();
    assert_eq!(parser.push("{\"name\":\"ping\",\"arguments\":{\"n\":1}}").len(), 3);
}

#[test]
fn tools_in_a_format_that_is_not_read_are_told_too() {
    let source = "{% for t in tools or [] %}<function={{ t.function.name }}>{% endfor %}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}";
    let prompt = prepare(source, &[user("Hi")], &[ping()]).unwrap();
    assert_eq!(prompt.output.tool_format, Some(ToolFormat::Generic));
    assert!(prompt.text.starts_with("[system]You can call functions."), "{}", prompt.text);
}

#[test]
fn with_tool_choice_none_no_tools_are_shown_and_none_are_read() {
    let template = template(CHATML);
    let tools = [ping()];
    let prompt = template.prepare(&request(&[user("Hi")], &tools, &ToolChoice::None)).unwrap();
    assert!(!prompt.text.contains("ping"));
    assert_eq!((prompt.output.tool_format, prompt.grammar), (None, None));
}

#[test]
fn the_prompt_tells_whether_it_has_opened_the_reasoning() {
    let source = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}A:<think>\n{% endif %}{{ '</think>' if false }}";
    let prompt = prepare(source, &[user("Hi")], &[]).unwrap();
    assert!(prompt.output.starts_in_reasoning);
    assert_eq!(prompt.visible_tokens, ["<think>", "</think>"]);

    let template = template(CHATML);
    let mut off = Map::new();
    off.insert("enable_thinking".into(), false.into());
    let messages = [user("Hi")];
    let request = murmur_chat::ChatRequest { extra: &off, ..request(&messages, &[], &ToolChoice::Auto) };
    assert!(!template.prepare(&request).unwrap().output.starts_in_reasoning);
}

#[test]
fn the_default_template_stops_at_the_end_of_the_turn() {
    let prompt = ChatTemplate::chatml().unwrap().prepare(&request(&[user("Hi")], &[], &ToolChoice::Auto)).unwrap();
    assert_eq!(prompt.extra_stops, ["<|im_end|>"]);
}

#[test]
fn requests_that_make_no_sense_are_refused_with_the_place() {
    let refused = |message: Value| match prepare(CHATML, &[user("Hi"), message], &[]) {
        Err(PromptError::Message { index: 1, reason }) => reason,
        other => panic!("{other:?}"),
    };
    assert!(refused(json!("hi")).contains("object"));
    assert!(refused(json!({"content": "x"})).contains("role"));
    assert!(refused(json!({"role": "user"})).contains("content"));
    assert!(refused(json!({"role": "user", "content": 5})).contains("content"));
    assert!(
        refused(json!({"role": "user", "content": [{"type": "image_url", "image_url": {}}]})).contains("image_url")
    );
    let call = |arguments: Value| json!({"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}]});
    assert!(refused(call(json!("{broken"))).contains("tool_calls[0]"));
    assert!(refused(call(json!([1]))).contains("tool_calls[0]"));

    let tools = |tools: &[Value]| match prepare(CHATML, &[user("Hi")], tools) {
        Err(PromptError::Tool { index, reason }) => (index, reason),
        other => panic!("{other:?}"),
    };
    assert_eq!(tools(&[json!({"type": "web_search"})]).0, 0);
    assert_eq!(tools(&[ping(), tool("a b", json!({}))]).0, 1);
    assert!(tools(&[ping(), ping()]).1.contains("same name"));
    assert!(tools(&[tool("f", json!([]))]).1.contains("JSON Schema"));
}

#[test]
fn a_tool_choice_that_cannot_be_met_is_refused() {
    let template = template(CHATML);
    let messages = [user("Hi")];
    let error = template.prepare(&request(&messages, &[], &ToolChoice::Required)).unwrap_err();
    assert!(matches!(error, PromptError::ToolChoice(_)), "{error}");
    let error = template.prepare(&request(&messages, &[ping()], &ToolChoice::Function("pong".into()))).unwrap_err();
    assert!(error.to_string().contains("pong"), "{error}");
}

#[test]
fn what_the_template_raises_reaches_the_client() {
    let error = prepare(TURNS, &[user("A"), user("B")], &[]).unwrap_err();
    assert!(matches!(&error, PromptError::Template(TemplateError::Raised(_))));
    assert!(error.to_string().contains("Roles must alternate"), "{error}");
}

/// Every template of the families (see `reference_renderings.rs`) takes an ordinary conversation with tools, whatever
/// it can do itself.
#[test]
fn every_real_template_prepares_a_conversation_with_tools() {
    let Ok(directory) = std::env::var("MURMUR_TEMPLATES_DIR") else {
        eprintln!("skipped: set MURMUR_TEMPLATES_DIR (a directory of *.jinja)");
        return;
    };
    let mut messages = vec![system("xqsystem"), user("xqfirst")];
    messages.extend(called());
    messages.extend([assistant("xqanswer"), user("xqlast")]);
    let mut failures = Vec::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "jinja") {
            continue;
        }
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        if name == "fireworks-ai-llama-3-firefunction-v2" {
            // It needs variables of its own, `functions` and `datetime`, which only `chat_template_kwargs` can give.
            continue;
        }
        let template = ChatTemplate::compile(&std::fs::read_to_string(&path).unwrap()).unwrap();
        let long: Vec<Value> =
            (0..500).flat_map(|i| [user(&format!("Q{i}")), assistant(&format!("A{i}"))]).chain([user("End")]).collect();
        if let Err(error) = template.prepare(&request(&long, &[ping()], &ToolChoice::Auto)) {
            failures.push(format!("{name}, a thousand messages: {error}"));
        }
        match template.prepare(&request(&messages, &[ping()], &ToolChoice::Auto)) {
            Ok(prompt) => {
                eprintln!("{name}: {:?}", template.capabilities());
                for needle in ["xqsystem", "xqfirst", "pong", "xqanswer", "xqlast", "ping"] {
                    if !prompt.text.contains(needle) {
                        failures.push(format!("{name}: {needle} is missing"));
                    }
                }
            }
            Err(error) => failures.push(format!("{name}: {error}")),
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
