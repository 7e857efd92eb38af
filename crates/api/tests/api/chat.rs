//! `/v1/chat/completions`: templates, tools, reasoning, formats.

use std::sync::Arc;

use murmur_api::backend::{Finish, ModelCard, Prompt};
use murmur_protocol::sampling::Grammar;
use serde_json::{Value, json};

use crate::support::{Fake, Server, chat, play, script};

const PATH: &str = "/v1/chat/completions";
const CALL: [&str; 3] =
    ["<tool_call>\n{\"name\": \"weather\", \"argu", "ments\": {\"city\": \"Kiel\"}}", "\n</tool_call>"];

fn tools() -> Value {
    let parameters = json!({"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]});
    let tool = |name: &str| json!({"type": "function", "function": {"name": name, "description": "Tells", "parameters": parameters}});
    json!([tool("weather"), tool("time")])
}

fn prompt_of(server: &Server) -> String {
    match server.fake.last().prompt {
        Prompt::Rendered(text) => text,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_chat_is_rendered_by_the_models_template_and_answered() {
    let server = Server::start(Fake::saying(&["Hel", "lo"])).await;
    let body = json!({
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        ],
        "max_completion_tokens": 9,
        "stop": "END",
    });
    let answer = server.ask(PATH, &body).await;
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(
        answer["choices"],
        json!([{
            "index": 0,
            "message": {"role": "assistant", "content": "Hello", "refusal": null},
            "logprobs": null,
            "finish_reason": "stop",
        }])
    );
    assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 3);
    assert_eq!(
        prompt_of(&server),
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    );
    let request = server.fake.last();
    assert_eq!(request.max_tokens, Some(9));
    assert!(request.stop.contains(&"END".to_owned()));
}

#[tokio::test]
async fn an_answer_of_ours_can_be_sent_back_as_it_is() {
    let server = Server::start(Fake::saying(&CALL)).await;
    let answer = server.ask(PATH, &chat(json!({"tools": tools()}))).await;
    let message = answer["choices"][0]["message"].clone();
    let id = message["tool_calls"][0]["id"].clone();
    let messages = json!([
        {"role": "user", "content": "hi"},
        message,
        {"role": "tool", "tool_call_id": id, "content": "rain"},
        {"role": "assistant", "content": "It rains.", "annotations": [], "audio": null, "function_call": null,
         "tool_calls": null, "refusal": null, "reasoning_content": "hm"},
        {"role": "developer", "content": "Be brief.", "name": "dev"},
    ]);
    server.ask(PATH, &chat(json!({"messages": messages, "tools": tools()}))).await;
    assert!(prompt_of(&server).contains("rain"));
}

#[tokio::test]
async fn a_tool_call_is_taken_out_of_the_text() {
    let server = Server::start(Fake::saying(&CALL)).await;
    let answer = server.ask(PATH, &chat(json!({"tools": tools()}))).await;
    let choice = &answer["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls");
    assert_eq!(choice["message"]["content"], Value::Null);
    let call = &choice["message"]["tool_calls"][0];
    assert!(call["id"].as_str().unwrap().starts_with("call_"));
    assert_eq!((&call["type"], &call["function"]["name"]), (&json!("function"), &json!("weather")));
    let arguments: Value = serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
    assert_eq!(arguments, json!({"city": "Kiel"}));
    assert!(prompt_of(&server).contains("\"weather\""));
}

#[tokio::test]
async fn a_tool_call_streams_in_pieces() {
    let server = Server::start(Fake::saying(&CALL)).await;
    let stream = server.stream(PATH, &chat(json!({"tools": tools(), "stream": true}))).await;
    stream.assert_complete();
    assert_eq!(stream.finish_reasons(), ["tool_calls"]);
    assert_eq!(stream.text(0, "content"), "");
    let pieces: Vec<&Value> =
        stream.chunks.iter().filter_map(|c| c["choices"][0]["delta"]["tool_calls"].get(0)).collect();
    assert_eq!((&pieces[0]["function"]["name"], &pieces[0]["type"]), (&json!("weather"), &json!("function")));
    assert!(pieces[0]["id"].is_string());
    assert!(pieces[1..].iter().all(|piece| piece.get("id").is_none() && piece["index"] == 0));
    let arguments: String = pieces.iter().filter_map(|piece| piece["function"]["arguments"].as_str()).collect();
    assert_eq!(serde_json::from_str::<Value>(&arguments).unwrap(), json!({"city": "Kiel"}));
}

#[tokio::test]
async fn several_calls_come_unless_only_one_is_wanted() {
    const TWO: [&str; 3] = [
        "<tool_call>{\"name\": \"weather\", \"arguments\": {\"city\": \"A\"}}</tool_call>\n",
        "<tool_call>{\"name\": \"time\", \"arguments\": {\"city\": \"B\"}}</tool_call>",
        "and text",
    ];
    let server = Server::start(Fake::saying(&TWO)).await;
    let names = |answer: &Value| -> Vec<String> {
        let calls = answer["choices"][0]["message"]["tool_calls"].as_array().unwrap();
        calls.iter().map(|call| call["function"]["name"].as_str().unwrap().to_owned()).collect()
    };
    let answer = server.ask(PATH, &chat(json!({"tools": tools()}))).await;
    assert_eq!(names(&answer), ["weather", "time"]);
    let one = json!({"tools": tools(), "parallel_tool_calls": false});
    let answer = server.ask(PATH, &chat(one.clone())).await;
    assert_eq!(names(&answer), ["weather"]);
    assert_eq!(answer["choices"][0]["finish_reason"], "tool_calls");
    let mut streamed = one;
    streamed["stream"] = json!(true);
    let stream = server.stream(PATH, &chat(streamed)).await;
    stream.assert_complete();
    assert_eq!(stream.finish_reasons(), ["tool_calls"]);
    assert!(!format!("{stream:?}").contains("\"time\""));
}

#[tokio::test]
async fn without_tools_or_with_none_chosen_nothing_is_taken_for_a_call() {
    let server = Server::start(Fake::saying(&CALL)).await;
    for more in [json!({}), json!({"tools": tools(), "tool_choice": "none"})] {
        let answer = server.ask(PATH, &chat(more)).await;
        assert_eq!(answer["choices"][0]["message"]["content"], CALL.concat());
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    }
}

#[tokio::test]
async fn a_call_that_is_demanded_is_forced_by_a_grammar() {
    let server = Server::start(Fake::saying(&CALL)).await;
    server.ask(PATH, &chat(json!({"tools": tools(), "tool_choice": "required"}))).await;
    let Some(Grammar::Lark(both)) = server.fake.last().sampling.grammar else { panic!("no grammar") };
    assert!(both.contains("weather") && both.contains("time"), "{both}");
    let named = json!({"type": "function", "function": {"name": "time"}});
    server.ask(PATH, &chat(json!({"tools": tools(), "tool_choice": named}))).await;
    let Some(Grammar::Lark(one)) = server.fake.last().sampling.grammar else { panic!("no grammar") };
    assert!(!one.contains("weather") && one.contains("time"), "{one}");
    server.ask(PATH, &chat(json!({"tools": tools()}))).await;
    assert_eq!(server.fake.last().sampling.grammar, None);
}

#[tokio::test]
async fn a_truncated_call_ends_with_length() {
    let fake = Fake::answering(|request| Ok(play(script(request, &CALL[..1], Finish::Length))));
    let answer = Server::start(fake).await.ask(PATH, &chat(json!({"tools": tools()}))).await;
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn reasoning_is_kept_apart_from_the_answer() {
    let server = Server::start(Fake::saying(&["<think>\nWell", "...\n</th", "ink>\n\nHello"])).await;
    let answer = server.ask(PATH, &chat(json!({}))).await;
    let message = &answer["choices"][0]["message"];
    assert_eq!(message["content"].as_str().unwrap().trim(), "Hello");
    assert_eq!(message["reasoning_content"].as_str().unwrap().trim(), "Well...");
    // The third token ends in the answer.
    assert_eq!(answer["usage"]["completion_tokens_details"], json!({"reasoning_tokens": 2}));
    let stream = server.stream(PATH, &chat(json!({"stream": true, "stream_options": {"include_usage": true}}))).await;
    assert_eq!(stream.text(0, "content").trim(), "Hello");
    assert_eq!(stream.text(0, "reasoning_content").trim(), "Well...");
    let usage = &stream.chunks.last().unwrap()["usage"];
    assert_eq!(usage["completion_tokens_details"], json!({"reasoning_tokens": 2}));
}

#[tokio::test]
async fn the_template_is_told_how_much_to_reason() {
    let server = Server::start(Fake::saying(&["x"])).await;
    for quiet in [json!({"chat_template_kwargs": {"enable_thinking": false}}), json!({"reasoning_effort": "none"})] {
        server.ask(PATH, &chat(quiet)).await;
        assert!(prompt_of(&server).ends_with("</think>\n\n"));
    }
    for open in [json!({}), json!({"reasoning_effort": "high"})] {
        server.ask(PATH, &chat(open)).await;
        assert!(prompt_of(&server).ends_with("assistant\n"));
    }
    let mut fake = Fake::saying(&["x"]);
    fake.models[0] = Arc::new(ModelCard { chat_template: None, ..(*fake.models[0]).clone() });
    let plain = Server::start(fake).await;
    let (status, error) = plain.fail(PATH, &chat(json!({"reasoning_effort": "low"}))).await;
    assert_eq!((status, error["param"].as_str()), (400, Some("reasoning_effort")));
}

#[tokio::test]
async fn formats_become_grammars() {
    let server = Server::start(Fake::saying(&["{}"])).await;
    let schema = json!({"type": "object", "properties": {"z": {"type": "string"}, "a": {"type": "null"}}});
    let description = json!({"name": "thing", "schema": schema, "strict": true, "description": "A thing."});
    // The reasoning of a template that has one stays possible, so the format may be a part of a larger grammar.
    let quiet = json!({"enable_thinking": false});
    let mut fake = Fake::saying(&["{}"]);
    fake.models[0] = Arc::new(ModelCard { chat_template: None, ..(*fake.models[0]).clone() });
    let plain = Server::start(fake).await;
    for (format, grammar) in [
        (json!({"type": "text"}), None),
        (json!({"type": "json_object"}), Some(Grammar::JsonObject)),
        (json!({"type": "json_schema", "json_schema": description}), Some(Grammar::JsonSchema(schema.to_string()))),
    ] {
        plain.ask(PATH, &chat(json!({"response_format": format}))).await;
        assert_eq!(plain.fake.last().sampling.grammar, grammar, "{format}");
        server.ask(PATH, &chat(json!({"response_format": format, "chat_template_kwargs": quiet}))).await;
        assert_eq!(server.fake.last().sampling.grammar.is_some(), grammar.is_some());
    }
    plain.ask(PATH, &chat(json!({"grammar": "start: \"a\""}))).await;
    assert_eq!(plain.fake.last().sampling.grammar, Some(Grammar::Lark("start: \"a\"".into())));
}

#[tokio::test]
async fn a_format_leaves_room_for_reasoning_that_the_template_begins() {
    let template = "{% for message in messages %}{{ message.content }}{% endfor %}{% if add_generation_prompt %}<think>\n{% endif %}";
    let mut fake = Fake::saying(&["Well.</think>", "{}"]);
    fake.models[0] = Arc::new(ModelCard { chat_template: Some(template.into()), ..(*fake.models[0]).clone() });
    let server = Server::start(fake).await;
    let answer = server.ask(PATH, &chat(json!({"response_format": {"type": "json_object"}}))).await;
    assert_eq!(answer["choices"][0]["message"]["content"], "{}");
    assert_eq!(answer["choices"][0]["message"]["reasoning_content"], "Well.");
    let Some(Grammar::Lark(grammar)) = server.fake.last().sampling.grammar else { panic!("no room was left") };
    assert!(grammar.contains("think") && grammar.contains("%json"), "{grammar}");
    let (status, error) = server.fail(PATH, &chat(json!({"grammar": "start: \"a\""}))).await;
    assert_eq!((status, error["param"].as_str()), (400, Some("grammar")));
}

#[tokio::test]
async fn a_format_together_with_tools_that_may_not_be_called_is_fine() {
    let server = Server::start(Fake::saying(&["{}"])).await;
    let body = chat(json!({"tools": tools(), "tool_choice": "none", "response_format": {"type": "json_object"}}));
    server.ask(PATH, &body).await;
    assert!(server.fake.last().sampling.grammar.is_some());
}

#[tokio::test]
async fn logprobs_have_the_chat_form() {
    let server = Server::start(Fake::saying(&["é"])).await;
    let answer = server.ask(PATH, &chat(json!({"logprobs": true, "top_logprobs": 2}))).await;
    assert_eq!(server.fake.last().sampling.top_logprobs, Some(2));
    assert_eq!(
        answer["choices"][0]["logprobs"],
        json!({
            "content": [{
                "token": "é", "logprob": -0.5, "bytes": [195, 169],
                "top_logprobs": [
                    {"token": "é", "logprob": -0.5, "bytes": [195, 169]},
                    {"token": "other", "logprob": -1.5, "bytes": [111, 116, 104, 101, 114]},
                ],
            }],
            "refusal": null,
        })
    );
}

#[tokio::test]
async fn a_template_that_fails_or_loops_costs_one_request() {
    for template in [
        "{{ raise_exception('roles must alternate') }}",
        "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}x{% endfor %}{% endfor %}{% endfor %}",
        "{% if %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ] {
        let mut fake = Fake::saying(&["x"]);
        fake.models[0] = Arc::new(ModelCard { chat_template: Some(template.into()), ..(*fake.models[0]).clone() });
        let server = Server::start(fake).await;
        let (status, error) = server.fail(PATH, &chat(json!({}))).await;
        assert_eq!(status, 400, "{error}");
        assert_eq!(server.get("/health").send().await.unwrap().status(), 200);
    }
}

#[tokio::test]
async fn the_rendered_prompt_can_be_looked_at() {
    let server = Server::start(Fake::saying(&["x"])).await;
    let answer = server.ask("/api/apply-template", &chat(json!({"temperature": 0.5}))).await;
    assert_eq!(answer, json!({"prompt": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"}));
    assert!(server.fake.seen.lock().unwrap().is_empty());
}
