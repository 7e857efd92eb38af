//! Under a grammar the text matches, whatever the model says; and hostile grammars cost an error, nothing more.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking, in its helpers too")]

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{CONTROL, END_OF_TURN, EOS, UNUSED, WORDS};
use murmur_protocol::sampling::{Grammar, SamplingParams, Token};
use murmur_sampling::grammar::{MAX_LARK_BYTES, MAX_REGEX_BYTES, MAX_SCHEMA_BYTES};
use murmur_sampling::noise::PositionNoise;
use murmur_sampling::{Sampler, SamplingError, Vocabulary};
use proptest::prelude::*;
use serde_json::Value;

/// Far more than anything bounded takes on a busy machine; what is not takes minutes, or for ever.
const BOUND: Duration = Duration::from_secs(60);

fn params(grammar: Grammar) -> SamplingParams {
    SamplingParams { grammar: Some(grammar), ..SamplingParams::default() }
}

fn sampler(vocabulary: &Arc<Vocabulary>, grammar: Grammar) -> Result<Sampler, SamplingError> {
    Sampler::new(params(grammar), Arc::clone(vocabulary), &[])
}

fn schema(text: &str) -> Grammar {
    Grammar::JsonSchema(text.to_owned())
}

/// What the grammar allows next: sampling leaves −∞ at what is banned.
fn allowed(sampler: &mut Sampler) -> Result<Vec<Token>, SamplingError> {
    let mut logits = vec![0.0f32; sampler_tokens()];
    sampler.sample(&mut logits, 0)?;
    Ok((0..logits.len() as Token).filter(|token| logits[*token as usize] > f32::NEG_INFINITY).collect())
}

fn sampler_tokens() -> usize {
    common::bytes().len()
}

/// A model that says something else at each seed: noise, with a growing wish to close what is open.
fn logits_at(seed: u64, step: u32, vocabulary: &Vocabulary) -> Vec<f32> {
    let noise = PositionNoise::new(seed, step);
    let mut logits: Vec<f32> = (0..vocabulary.len() as u32).map(|token| (noise.uniform(token) * 8.0) as f32).collect();
    for token in 0..vocabulary.len() as Token {
        if vocabulary.bytes(token).iter().all(|byte| b"\"}])0".contains(byte)) || vocabulary.is_end_of_generation(token)
        {
            logits[token as usize] += step as f32 * 0.1;
        }
    }
    logits
}

/// The text of one generation and how it ended.
fn generate(vocabulary: &Arc<Vocabulary>, grammar: &Grammar, seed: u64) -> String {
    const STEPS_MAX: u32 = 3000;
    let mut sampler =
        Sampler::new(SamplingParams { seed, ..params(grammar.clone()) }, Arc::clone(vocabulary), &[]).unwrap();
    let mut bytes = Vec::new();
    for step in 0..STEPS_MAX {
        let sampled = sampler.sample(&mut logits_at(seed, step, vocabulary), step).unwrap();
        sampler.accept(sampled.token).unwrap();
        let ends = vocabulary.is_end_of_generation(sampled.token);
        if !ends {
            assert!(!vocabulary.is_control(sampled.token), "a control token was chosen");
            bytes.extend_from_slice(vocabulary.bytes(sampled.token));
        }
        if ends || sampled.grammar_ended {
            assert!(sampled.grammar_ended);
            return String::from_utf8(bytes).unwrap();
        }
    }
    panic!("no end after {STEPS_MAX} tokens: {}", String::from_utf8_lossy(&bytes));
}

type Check = fn(&Value) -> bool;

#[test]
fn whatever_the_model_says_the_text_is_json_that_matches_the_schema() {
    let vocabulary = common::bytes();
    let cases: [(Grammar, Check); 7] = [
        (Grammar::JsonObject, |v| v.is_object()),
        (
            schema(
                r#"{"type":"object","properties":{"name":{"type":"string","maxLength":8},"age":{"type":"integer","minimum":0,"maximum":150}},
                    "required":["name","age"],"additionalProperties":false}"#,
            ),
            |v| {
                v.as_object().is_some_and(|o| o.len() == 2)
                    && v["name"].as_str().is_some_and(|s| s.chars().count() <= 8)
                    && v["age"].as_i64().is_some_and(|n| (0..=150).contains(&n))
            },
        ),
        (schema(r#"{"type":"array","items":{"type":"boolean"},"minItems":2,"maxItems":5}"#), |v| {
            v.as_array().is_some_and(|a| (2..=5).contains(&a.len()) && a.iter().all(Value::is_boolean))
        }),
        (schema(r#"{"enum":["red","green",3,null]}"#), |v| {
            v.is_null() || *v == 3 || v.as_str().is_some_and(|s| s == "red" || s == "green")
        }),
        (
            schema(
                r##"{"$defs":{"tree":{"type":"object","properties":{"value":{"type":"number"},
                    "children":{"type":"array","items":{"$ref":"#/$defs/tree"},"maxItems":2}},
                    "required":["value"],"additionalProperties":false}},"$ref":"#/$defs/tree"}"##,
            ),
            |v| {
                fn tree(v: &Value) -> bool {
                    v["value"].is_number()
                        && v.get("children")
                            .is_none_or(|c| c.as_array().is_some_and(|c| c.len() <= 2 && c.iter().all(tree)))
                }
                tree(v)
            },
        ),
        (schema(r#"{"anyOf":[{"type":"string","pattern":"^[a-c]{2,3}$"},{"type":"null"}]}"#), |v| {
            v.is_null()
                || v.as_str().is_some_and(|s| (2..=3).contains(&s.len()) && s.bytes().all(|b| b"abc".contains(&b)))
        }),
        (schema("true"), |_| true),
    ];
    for (grammar, matches) in cases {
        for seed in 0..15 {
            let text = generate(&vocabulary, &grammar, seed);
            match serde_json::from_str::<Value>(&text) {
                Ok(value) => assert!(matches(&value), "{grammar:?} does not allow {text}"),
                // JSON as RFC 8259 has it, though no f64 can hold it.
                Err(error) if error.to_string().contains("number out of range") => {}
                Err(error) => panic!("{error}: {text}"),
            }
        }
    }
}

#[test]
fn regular_expressions_and_lark_grammars_hold_for_the_whole_text() {
    let vocabulary = common::bytes();
    for seed in 0..20 {
        let text = generate(&vocabulary, &Grammar::Regex(r"(ab|c)+/[0-9]{2}\\?".into()), seed);
        let (letters, digits) = text.split_once('/').unwrap();
        assert!(!letters.is_empty() && letters.replace("ab", "").chars().all(|c| c == 'c'), "{text}");
        let digits = digits.strip_suffix('\\').unwrap_or(digits);
        assert!(digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_digit()), "{text}");

        let lark = "start: item (\",\" item)*\nitem: /[x-z]/ | \"(\" start \")\"\n";
        let text = generate(&vocabulary, &Grammar::Lark(lark.into()), seed);
        let depth_ok = text.bytes().try_fold(0i32, |depth, b| match b {
            b'(' => Some(depth + 1),
            b')' => (depth > 0).then_some(depth - 1),
            b',' | b'x'..=b'z' => Some(depth),
            _ => None,
        });
        assert_eq!(depth_ok, Some(0), "{text}");
    }
}

#[test]
fn the_end_is_allowed_exactly_where_the_grammar_accepts() {
    let vocabulary = common::bytes();
    let mut sampler = sampler(&vocabulary, Grammar::Regex("a{2,4}".into())).unwrap();
    let a = Token::from(b'a');
    assert_eq!(allowed(&mut sampler).unwrap(), [a]);
    assert_eq!(sampler.accept(EOS).unwrap_err(), SamplingError::GrammarRefused { token: EOS });
    sampler.accept(a).unwrap();
    assert_eq!(allowed(&mut sampler).unwrap(), [a]);
    sampler.accept(a).unwrap();
    assert_eq!(allowed(&mut sampler).unwrap(), [a, EOS, END_OF_TURN]);
    sampler.accept(a).unwrap();

    // The fourth completes it: said with that token, and then only the end remains.
    let mut logits = vec![0.0; vocabulary.len()];
    logits[a as usize] = 100.0;
    let sampled = sampler.sample(&mut logits, 3).unwrap();
    assert_eq!((sampled.token, sampled.grammar_ended), (a, true));
    sampler.accept(a).unwrap();
    assert_eq!(allowed(&mut sampler).unwrap(), [EOS, END_OF_TURN]);
    sampler.accept(END_OF_TURN).unwrap();
    let error = sampler.sample(&mut vec![0.0; vocabulary.len()], 5).unwrap_err();
    assert!(matches!(error, SamplingError::GrammarStuck { position: 5, .. }));
    assert_eq!(sampler.accept(a).unwrap_err(), SamplingError::GrammarRefused { token: a });

    sampler.rollback(3).unwrap();
    assert_eq!(allowed(&mut sampler).unwrap(), [a, EOS, END_OF_TURN]);
    assert_eq!(sampler.generated(), [a, a]);
}

#[test]
fn a_refused_token_changes_nothing() {
    let vocabulary = common::bytes();
    let mut sampler = sampler(&vocabulary, Grammar::Regex("ab".into())).unwrap();
    for token in [Token::from(b'b'), CONTROL, UNUSED, EOS] {
        assert_eq!(sampler.accept(token).unwrap_err(), SamplingError::GrammarRefused { token });
        // Also after a token was chosen and not accepted.
        assert_eq!(allowed(&mut sampler).unwrap(), [Token::from(b'a')]);
        assert_eq!(sampler.accept(token).unwrap_err(), SamplingError::GrammarRefused { token });
        assert!(sampler.generated().is_empty());
    }
    sampler.accept(Token::from(b'a')).unwrap();
    assert_eq!(allowed(&mut sampler).unwrap(), [Token::from(b'b')]);
}

#[test]
fn a_grammar_over_any_text_allows_no_control_token() {
    let vocabulary = common::bytes();
    let mut sampler = sampler(&vocabulary, Grammar::Regex(r"(?s:.*)".into())).unwrap();
    let allowed = allowed(&mut sampler).unwrap();
    assert!(!allowed.contains(&CONTROL) && !allowed.contains(&UNUSED));
    assert!(allowed.contains(&EOS) && allowed.contains(&Token::from(b'<')) && allowed.contains(&WORDS));
    assert!(!allowed.contains(&0xFF), "a byte that no text contains");
}

#[test]
fn a_lark_grammar_may_name_a_control_token() {
    let vocabulary = common::bytes();
    let lark = Grammar::Lark("start: <|start|> \"ab\"".into());
    let mut sampler = sampler(&vocabulary, lark).unwrap();
    assert_eq!(allowed(&mut sampler).unwrap(), [CONTROL]);
    sampler.accept(CONTROL).unwrap();
    sampler.accept(Token::from(b'a')).unwrap();
    sampler.rollback(1).unwrap();
    assert_eq!(allowed(&mut sampler).unwrap(), [Token::from(b'a')]);
    sampler.rollback(1).unwrap();
    assert_eq!(allowed(&mut sampler).unwrap(), [CONTROL]);
}

#[test]
fn a_vocabulary_without_an_end_token_still_ends_with_its_grammar() {
    let pieces: Vec<Vec<u8>> = (0..=255u8).map(|byte| vec![byte]).collect();
    let attributes = vec![murmur_sampling::TokenAttribute::Byte; 256];
    let vocabulary = Arc::new(Vocabulary::new(pieces, attributes, vec![], None, None).unwrap());
    let mut sampler = sampler(&vocabulary, Grammar::Regex("ab".into())).unwrap();
    sampler.accept(Token::from(b'a')).unwrap();
    let sampled = sampler.sample(&mut vec![0.0; 256], 1).unwrap();
    assert_eq!((sampled.token, sampled.grammar_ended), (Token::from(b'b'), true));
    sampler.accept(sampled.token).unwrap();
    assert!(sampler.sample(&mut vec![0.0; 256], 2).is_err());
}

#[test]
fn a_vocabulary_that_cannot_spell_the_grammar_is_an_error_at_once() {
    let vocabulary = common::plain(8);
    let error = sampler(&vocabulary, Grammar::Regex("[a-c]+".into())).unwrap_err().to_string();
    assert!(error.contains("no token of the model's vocabulary continues"), "{error}");
}

#[test]
fn ignoring_the_end_under_a_finished_grammar_is_an_error_that_says_so() {
    let vocabulary = common::bytes();
    let params = SamplingParams { ignore_eos: true, ..params(Grammar::Regex("a".into())) };
    let mut sampler = Sampler::new(params, vocabulary, &[]).unwrap();
    sampler.accept(Token::from(b'a')).unwrap();
    let error = sampler.sample(&mut vec![0.0; sampler_tokens()], 9).unwrap_err();
    assert_eq!(error, SamplingError::NothingAllowed { position: 9 });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn undoing_and_resuming_allow_the_same_as_never_having_gone_there(
        which in 0usize..3,
        walk in prop::collection::vec((any::<u64>(), 0usize..6, any::<bool>()), 1..40),
    ) {
        let vocabulary = common::bytes();
        let grammar = [
            Grammar::JsonObject,
            schema(r#"{"type":"object","properties":{"name":{"type":"string"},"age":{"type":"integer"}},"required":["age"]}"#),
            Grammar::Lark("start: item (\",\" item)*\nitem: /[x-z]+/ | \"(\" start \")\"\n".into()),
        ][which].clone();
        let mut wandering = sampler(&vocabulary, grammar.clone()).unwrap();
        for (step, (seed, undo, peek)) in walk.into_iter().enumerate() {
            if peek {
                let _ = allowed(&mut wandering);
            }
            match wandering.sample(&mut logits_at(seed, step as u32, &vocabulary), step as u32) {
                Ok(sampled) => wandering.accept(sampled.token).unwrap(),
                Err(error) => prop_assert!(matches!(error, SamplingError::GrammarStuck { .. }), "{}", error),
            }
            // Mostly forward, sometimes back.
            if undo > 2 {
                wandering.rollback((undo - 1).min(wandering.generated().len())).unwrap();
            }
        }
        let mut direct = sampler(&vocabulary, grammar).unwrap();
        for &token in wandering.generated() {
            direct.accept(token).unwrap();
        }
        prop_assert_eq!(allowed(&mut wandering), allowed(&mut direct));
    }
}

fn refused(grammar: Grammar) -> String {
    let shown = format!("{grammar:?}").chars().take(100).collect::<String>();
    let began = Instant::now();
    let error = match sampler(&common::bytes(), grammar) {
        Err(error @ SamplingError::Grammar { .. }) => error.to_string(),
        Err(error) => panic!("{shown}: {error}"),
        Ok(_) => panic!("{shown} was not refused"),
    };
    assert!(began.elapsed() < BOUND, "{shown} took {:?}", began.elapsed());
    assert!(error.len() < 800 && !error.contains("backtrace"), "{error}");
    error
}

#[test]
fn what_cannot_be_used_is_refused_with_a_reason() {
    assert!(refused(schema("{")).contains("not valid JSON"));
    assert!(refused(schema("3")).contains("object or a boolean"));
    assert!(refused(schema("false")).contains("nothing"));
    assert!(refused(schema(r#"{"type":"string","minLength":5,"maxLength":2}"#)).contains("minLength"));
    assert!(refused(schema(r#"{"type":"integer","minimum":5,"maximum":2}"#)).contains("minimum"));
    assert!(refused(schema(r#"{"type":"array","uniqueItems":true,"items":{"type":"null"}}"#)).contains("uniqueItems"));
    assert!(refused(schema(r#"{"not":{"type":"null"}}"#)).contains("not"));
    assert!(refused(schema(r#"{"type":"strange"}"#)).contains("strange"));
    assert!(refused(schema(r#"{"$ref":"https://example.com/schema.json"}"#)).contains("example.com"));
    assert!(refused(schema(r##"{"$ref":"#/nowhere"}"##)).contains("nowhere"));
    assert!(refused(Grammar::Regex("(a".into())).contains("regular expression"));
    assert!(refused(Grammar::Regex("a\\".into())).contains("backslash"));
    refused(Grammar::Regex(r"a\bb".into()));
    assert!(refused(Grammar::Lark("start: missing".into())).contains("missing"));
    refused(Grammar::Lark(String::new()));
    assert!(refused(Grammar::Lark("start: A & B\nA: /a*/\nB: /b*/".into())).contains("\\u0026"));
    assert!(refused(Grammar::Lark("start: A\nA: ~/a*/".into())).contains("complement"));
    let escaped = Grammar::Lark(r#"start: "\u0026" /\x7e/"#.into());
    assert_eq!(generate(&common::bytes(), &escaped, 1), "&~");
    for long in [
        Grammar::Regex("a".repeat(MAX_REGEX_BYTES + 1)),
        Grammar::Lark(" ".repeat(MAX_LARK_BYTES + 1)),
        Grammar::JsonSchema(" ".repeat(MAX_SCHEMA_BYTES + 1)),
        schema(&format!(r#"{{"type":"string","pattern":"{}"}}"#, "a".repeat(MAX_REGEX_BYTES + 1))),
        schema(&format!(r#"{{"items":[{{"patternProperties":{{"{}":{{}}}}}}]}}"#, "a".repeat(MAX_REGEX_BYTES + 1))),
    ] {
        assert!(refused(long).contains("make it smaller"));
    }
}

/// Terminals nested as deep as there are lines, which no bracket counts.
fn terminal_chain(depth: usize) -> String {
    let links: String = (0..depth).map(|i| format!("T{i}: (\"a\" T{})*\n", i + 1)).collect();
    format!("start: T0\n{links}T{depth}: \"b\"\n")
}

#[test]
fn hostile_grammars_end_in_an_error_or_a_sampler_never_in_a_crash() {
    let vocabulary = common::bytes();
    let nested = |open: &str, close: &str, depth: usize| format!("{}{}", open.repeat(depth), close.repeat(depth));
    let cases = [
        schema(&nested(r#"{"type":"array","items":"#, "}", 60).replace(":}", ":{}}")),
        schema(&nested("[", "]", 100_000)),
        schema(&nested(r#"{"allOf":["#, "]}", 60)),
        schema(&nested(r#"{"anyOf":[{"type":"null"},"#, "]}", 60).replace(",]", "]")),
        schema(r##"{"$ref":"#"}"##),
        schema(r##"{"allOf":[{"$ref":"#"}]}"##),
        schema(
            r##"{"$defs":{"a":{"allOf":[{"$ref":"#/$defs/b"}]},"b":{"allOf":[{"$ref":"#/$defs/a"}]}},"$ref":"#/$defs/a"}"##,
        ),
        schema(r#"{"type":"array","items":{},"minItems":1000000000}"#),
        schema(r#"{"type":"string","minLength":1000000000}"#),
        schema(r#"{"type":"string","pattern":"((a{1,1000}){1,1000}){1,1000}"}"#),
        schema(r#"{"type":"number","multipleOf":1e-300}"#),
        schema(r#"{"type":"number","minimum":-1e308,"maximum":1e308}"#),
        schema(&format!(r#"{{"enum":[{}]}}"#, (0..20_000).map(|i| format!("\"v{i}\"")).collect::<Vec<_>>().join(","))),
        Grammar::Regex(nested("(", ")", 100_000)),
        Grammar::Regex(nested("(a", ")*", 200)),
        Grammar::Regex(r"(a?){5000}a{5000}".into()),
        Grammar::Regex(r"(.*a){20}(.|a){20}.{1000}".into()),
        Grammar::Lark(format!("start: {}", nested("(", ")", 100_000))),
        Grammar::Lark(format!("start: {}", "\"a\"?".repeat(4000))),
        Grammar::Lark(terminal_chain(600)),
        Grammar::Regex("ab?".repeat(MAX_REGEX_BYTES / 3)),
        Grammar::Regex("a*".repeat(MAX_REGEX_BYTES / 2)),
        Grammar::Regex(".{0,9}".repeat(MAX_REGEX_BYTES / 6)),
        Grammar::Regex(vec!["a*b"; MAX_REGEX_BYTES / 4].join("|")),
        Grammar::Regex("(?:a|bc){3,9}*".repeat(MAX_REGEX_BYTES / 14)),
        Grammar::Lark(format!("start: T\nT: {}", "/a/* ".repeat(MAX_LARK_BYTES / 6))),
        Grammar::Lark(format!("start: T\nT: /{}/", "a?".repeat(MAX_LARK_BYTES / 2 - 20))),
        schema(&format!(
            r#"{{"type":"string","allOf":[{}]}}"#,
            (1..200).map(|i| format!(r#"{{"pattern":"^(a{{{i}}})*b$"}}"#)).collect::<Vec<_>>().join(",")
        )),
        schema(&format!(
            r#"{{"type":"string","allOf":[{}]}}"#,
            (1..7).map(|i| format!(r#"{{"pattern":"^(.{{{i}00}})*b$"}}"#)).collect::<Vec<_>>().join(",")
        )),
        schema(&format!(
            r#"{{"type":"string","allOf":[{}]}}"#,
            (8..17).map(|i| format!(r#"{{"pattern":"^(.{{{i}}})*b$"}}"#)).collect::<Vec<_>>().join(",")
        )),
        schema(
            r#"{"type":"string","allOf":[{"pattern":"^(.{109})*b$"},{"pattern":"^(.{113})*b$"},{"pattern":"^(.{101})*b$"}]}"#,
        ),
        schema(
            r#"{"type":"string","allOf":[{"pattern":"^(a{109})*b$"},{"pattern":"^(a{113})*b$"},{"pattern":"^(a{101})*b$"}]}"#,
        ),
        // Intersections whose shortest text is as long as the least common multiple.
        Grammar::Lark("start: T\nT: /(a{1009})+/ & /(a{1013})+/ & /(a{1019})+/".into()),
        Grammar::Lark(format!(
            "start: T\nT: {}",
            (1..200).map(|i| format!("/(a{{{i}}})*b/")).collect::<Vec<_>>().join("&")
        )),
        Grammar::Lark("start: start start | ".into()),
        Grammar::Lark("start: a\na: b\nb: a\n".into()),
        Grammar::Lark("start: /a/{1000000000}".into()),
        Grammar::Lark("\u{FF}<[1]>\0".into()),
    ];
    for grammar in cases {
        let shown: String = format!("{grammar:?}").chars().take(90).collect();
        let began = Instant::now();
        let outcome = sampler(&vocabulary, grammar).and_then(|mut sampler| {
            for step in 0..20 {
                let sampled = sampler.sample(&mut logits_at(1, step, &vocabulary), step)?;
                sampler.accept(sampled.token)?;
                if sampled.grammar_ended {
                    break;
                }
            }
            Ok(())
        });
        println!("{shown}: {:?} after {:?}", outcome.map_err(|error| error.to_string()), began.elapsed());
        assert!(began.elapsed() < BOUND, "{shown}");
    }
}
