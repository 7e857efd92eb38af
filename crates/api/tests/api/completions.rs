//! `/v1/completions`.

use murmur_api::backend::{Finish, Guesses, Prompt, Refusal};
use murmur_protocol::sampling::Grammar;
use serde_json::{Value, json};

use crate::support::{Fake, Server, chat, completion, guessed, play, script, text};

const PATH: &str = "/v1/completions";

#[tokio::test]
async fn a_completion_has_text_usage_seed_and_fingerprint() {
    let server = Server::start(Fake::saying(&[" upon", " a", " time"])).await;
    let answer = server.ask(PATH, &completion(json!({"seed": 42}))).await;
    assert_eq!(answer["object"], "text_completion");
    assert_eq!(answer["model"], "org/tiny");
    assert_eq!(answer["seed"], 42);
    assert!(answer["system_fingerprint"].as_str().unwrap().ends_with("-0123456789ab"));
    assert_eq!(
        answer["choices"],
        json!([{"index": 0, "text": " upon a time", "logprobs": null, "finish_reason": "stop"}])
    );
    assert_eq!(
        answer["usage"],
        json!({
            "prompt_tokens": 7, "completion_tokens": 4, "total_tokens": 11,
            "prompt_tokens_details": {"cached_tokens": 3},
        })
    );
}

#[tokio::test]
async fn an_answer_and_the_last_chunks_of_a_stream_have_llama_servers_timings() {
    let server = Server::start(Fake::saying(&["a", "b"])).await;
    let expected = json!({
        "cache_n": 3,
        "prompt_n": 4, "prompt_ms": 5.0, "prompt_per_token_ms": 1.25, "prompt_per_second": 800.0,
        "predicted_n": 3, "predicted_ms": 5.0, "predicted_per_token_ms": 5.0 / 3.0, "predicted_per_second": 600.0,
    });
    for path in [PATH, "/v1/chat/completions"] {
        let body = |more| if path == PATH { completion(more) } else { chat(more) };
        assert_eq!(server.ask(path, &body(json!({}))).await["timings"], expected);
        assert_eq!(server.ask(path, &body(json!({"n": 2}))).await["timings"]["predicted_per_second"], 1200.0);
        for usage in [false, true] {
            let body = body(json!({"stream": true, "stream_options": {"include_usage": usage}}));
            let stream = server.stream(path, &body).await;
            assert_eq!(stream.chunks.last().unwrap()["timings"], expected);
            assert!(stream.chunks[0].get("timings").is_none());
        }
    }
}

#[tokio::test]
async fn guessed_tokens_are_in_the_usage_under_openais_names_and_in_the_timings_under_llama_servers() {
    let fake = Fake::answering(|request| {
        let end = guessed(request.sampling.seed, 2, Finish::EndOfText, Guesses { right: 3, wrong: 1 });
        Ok(play(vec![text("<think>a"), text("</think>b"), end]))
    });
    let server = Server::start(fake).await;
    for path in [PATH, "/v1/chat/completions"] {
        let body = |more| if path == PATH { completion(more) } else { chat(more) };
        let mut details = json!({"accepted_prediction_tokens": 6, "rejected_prediction_tokens": 2});
        if path != PATH {
            details["reasoning_tokens"] = json!(2);
        }
        let answer = server.ask(path, &body(json!({"n": 2}))).await;
        assert_eq!(answer["usage"]["completion_tokens_details"], details);
        assert_eq!((&answer["timings"]["draft_n"], &answer["timings"]["draft_n_accepted"]), (&json!(8), &json!(6)));
        let streamed = body(json!({"n": 2, "stream": true, "stream_options": {"include_usage": true}}));
        let stream = server.stream(path, &streamed).await;
        assert_eq!(stream.chunks.last().unwrap()["usage"]["completion_tokens_details"], details);
    }
}

#[tokio::test]
async fn a_stream_tells_its_statistics_in_a_comment_before_its_end() {
    let server = Server::start(Fake::saying(&["a", "b"])).await;
    for usage in [false, true] {
        let body = json!({"stream": true, "stream_options": {"include_usage": usage}});
        let stream = server.stream(PATH, &completion(body)).await;
        stream.assert_complete();
        let [comment] = &stream.comments[..] else { panic!("{stream:?}") };
        let statistics: Value = serde_json::from_str(comment.strip_prefix("murmur ").unwrap()).unwrap();
        assert_eq!(statistics["usage"]["completion_tokens"], 3);
        assert_eq!(statistics["timings"], stream.chunks.last().unwrap()["timings"]);
    }
}

#[tokio::test]
async fn every_sampling_field_reaches_the_node() {
    let server = Server::start(Fake::saying(&["x"])).await;
    let body = completion(json!({
        "temperature": 0.25, "top_p": 0.5, "top_k": 7, "min_p": 0.125, "typical_p": 0.75, "repeat_penalty": 1.5,
        "penalty_last_n": 9, "presence_penalty": -1.5, "frequency_penalty": 1.25, "logit_bias": {"3": -100, "4": 2.5},
        "seed": 18_446_744_073_709_551_615u64, "ignore_eos": true, "logprobs": 2, "stop": ["a", "b"], "max_tokens": 33,
        "guided_regex": "[a-z]+",
    }));
    server.ask(PATH, &body).await;
    let request = server.fake.last();
    let sampling = request.sampling;
    assert_eq!(sampling.temperature, 0.25);
    assert_eq!((sampling.top_p, sampling.top_k, sampling.min_p, sampling.typical_p), (0.5, 7, 0.125, 0.75));
    assert_eq!((sampling.repeat_penalty, sampling.penalty_last_n), (1.5, 9));
    assert_eq!((sampling.presence_penalty, sampling.frequency_penalty), (-1.5, 1.25));
    let mut bias = sampling.logit_bias;
    bias.sort_by_key(|(token, _)| *token);
    assert_eq!(bias, [(3, -100.0), (4, 2.5)]);
    assert_eq!((sampling.seed, sampling.ignore_eos, sampling.top_logprobs), (u64::MAX, true, Some(2)));
    assert_eq!(sampling.grammar, Some(Grammar::Regex("[a-z]+".into())));
    assert_eq!((request.stop, request.max_tokens), (vec!["a".to_owned(), "b".to_owned()], Some(33)));
    assert!(matches!(request.prompt, Prompt::Text(text) if text == "Once"));
}

#[tokio::test]
async fn the_defaults_are_openais_and_null_means_absent() {
    let server = Server::start(Fake::saying(&["x"])).await;
    let body = completion(json!({
        "temperature": null, "stop": null, "seed": null, "logit_bias": null, "stream": null, "stream_options": null,
        "user": "u", "suffix": null, "best_of": 1, "store": false, "metadata": {"a": "b"}, "unheard_of": null,
    }));
    server.ask(PATH, &body).await;
    let request = server.fake.last();
    assert_eq!((request.sampling.temperature, request.sampling.top_p, request.sampling.top_k), (1.0, 1.0, 0));
    assert_eq!((request.sampling.min_p, request.sampling.typical_p, request.sampling.repeat_penalty), (0.0, 1.0, 1.0));
    assert_eq!(request.max_tokens, Some(16));
    assert_eq!((request.sampling.top_logprobs, request.sampling.grammar), (None, None));
}

#[tokio::test]
async fn without_a_seed_each_request_gets_a_fresh_one_and_is_told() {
    let server = Server::start(Fake::saying(&["x"])).await;
    let mut seeds = Vec::new();
    for _ in 0..4 {
        let answer = server.ask(PATH, &completion(json!({}))).await;
        let seed = answer["seed"].as_u64().unwrap();
        assert_eq!(seed, server.fake.last().sampling.seed);
        assert!(seed < 1 << 53, "a JavaScript client must be able to send {seed} back");
        seeds.push(seed);
    }
    seeds.dedup();
    assert_eq!(seeds.len(), 4);
}

#[tokio::test]
async fn several_prompts_with_several_answers_are_numbered_prompt_by_prompt() {
    let fake = Fake::answering(|request| {
        let Prompt::Text(prompt) = &request.prompt else { panic!("{:?}", request.prompt) };
        let piece = format!("{prompt}{}", request.sampling.seed);
        Ok(play(script(request, &[&piece], Finish::EndOfText)))
    });
    let server = Server::start(fake).await;
    let body = completion(json!({"prompt": ["a", "b"], "n": 2, "seed": 10}));
    let answer = server.ask(PATH, &body).await;
    let texts: Vec<_> = answer["choices"].as_array().unwrap().iter().map(|choice| choice["text"].clone()).collect();
    assert_eq!(texts, ["a10", "a11", "b10", "b11"]);
    // Each prompt counts once, each answer counts.
    assert_eq!(answer["usage"]["prompt_tokens"], 14);
    assert_eq!(answer["usage"]["completion_tokens"], 8);
    assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 6);
}

#[tokio::test]
async fn prompts_may_be_token_ids() {
    let server = Server::start(Fake::saying(&["x"])).await;
    server.ask(PATH, &completion(json!({"prompt": [1, 2, 3]}))).await;
    assert!(matches!(server.fake.last().prompt, Prompt::Tokens(tokens) if tokens == [1, 2, 3]));
    server.ask(PATH, &completion(json!({"prompt": [[1, 2], [3]]}))).await;
    assert!(matches!(server.fake.last().prompt, Prompt::Tokens(tokens) if tokens == [3]));
}

#[tokio::test]
async fn echo_puts_the_prompt_before_the_answer() {
    let server = Server::start(Fake::saying(&[" more"])).await;
    let answer = server.ask(PATH, &completion(json!({"echo": true}))).await;
    assert_eq!(answer["choices"][0]["text"], "Once more");
    let answer = server.ask(PATH, &completion(json!({"echo": true, "prompt": [8, 9]}))).await;
    assert_eq!(answer["choices"][0]["text"], "<8><9> more");
    let stream = server.stream(PATH, &completion(json!({"echo": true, "stream": true}))).await;
    assert_eq!(stream.text(0, "text"), "Once more");
}

#[tokio::test]
async fn logprobs_have_the_old_form() {
    let server = Server::start(Fake::saying(&["ab", "c"])).await;
    let answer = server.ask(PATH, &completion(json!({"logprobs": 2}))).await;
    let wanted = json!({
        "tokens": ["ab", "c"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"ab": -0.5, "other": -1.5}, {"c": -0.5, "other": -1.5}],
        "text_offset": [0, 2],
    });
    assert_eq!(answer["choices"][0]["logprobs"], wanted);
    let stream = server.stream(PATH, &completion(json!({"logprobs": 2, "stream": true}))).await;
    let offsets: Vec<_> =
        stream.chunks.iter().filter_map(|c| c["choices"][0]["logprobs"]["text_offset"][0].as_u64()).collect();
    assert_eq!(offsets, [0, 2]);
}

#[tokio::test]
async fn the_finish_reason_tells_length_from_stop() {
    for (finish, reason) in
        [(Finish::Length, "length"), (Finish::StopString("\n".into()), "stop"), (Finish::EndOfText, "stop")]
    {
        let fake = Fake::answering(move |request| Ok(play(script(request, &["x"], finish.clone()))));
        let answer = Server::start(fake).await.ask(PATH, &completion(json!({}))).await;
        assert_eq!(answer["choices"][0]["finish_reason"], reason);
    }
}

#[tokio::test]
async fn a_completion_that_breaks_off_is_an_error_and_not_an_answer() {
    let broken = Server::start(Fake::answering(|_| Ok(play(vec![text("half an ans")])))).await;
    let (status, error) = broken.fail(PATH, &completion(json!({}))).await;
    assert_eq!((status, error["type"].as_str()), (500, Some("server_error")));
}

#[tokio::test]
async fn what_completions_cannot_do_is_refused() {
    let server = Server::start(Fake::saying(&["x"])).await;
    for (field, param) in [
        (json!({"suffix": "end"}), "suffix"),
        (json!({"best_of": 3}), "best_of"),
        (json!({"echo": true, "logprobs": 1}), "echo"),
        (json!({"prompt": []}), "prompt"),
        (json!({"prompt": [[]]}), "prompt[0]"),
        (json!({"prompt": [1, "a"]}), "prompt"),
        (json!({"prompt": ["a", 1]}), "prompt[1]"),
        (json!({"prompt": [-1]}), "prompt"),
        (json!({"prompt": null}), "prompt"),
        (json!({"prompt": vec!["a"; 65]}), "prompt"),
        (json!({"prompt": vec!["a"; 33], "n": 2}), "prompt"),
        (json!({"grammar": "start: \"a\"", "guided_regex": "a"}), "guided_regex"),
        (json!({"messages": []}), "messages"),
    ] {
        let (status, error) = server.fail(PATH, &completion(field.clone())).await;
        assert_eq!((status, error["param"].as_str()), (400, Some(param)), "{field}");
    }
    assert!(server.fake.seen.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_grammar_at_fault_is_reported_under_the_field_it_came_from() {
    let fake = Fake::refusing(Refusal::BadRequest {
        message: "the grammar accepts nothing".into(),
        param: Some("grammar".into()),
        code: Some("invalid_grammar".into()),
    });
    let server = Server::start(fake).await;
    let (status, error) = server.fail(PATH, &completion(json!({"guided_regex": "[^\\s\\S]"}))).await;
    assert_eq!((status, error["param"].as_str()), (400, Some("guided_regex")));
}
