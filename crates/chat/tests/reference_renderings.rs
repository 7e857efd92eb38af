//! Our renderings against those of Jinja on Python, set up as Hugging Face transformers does, byte for byte.
//!
//! Runs when `MURMUR_TEMPLATES_DIR` names a directory of real models' templates (`*.jinja`; llama.cpp's source has some
//! in `models/templates`) and `MURMUR_PYTHON` a Python that has jinja2. `./x test` sets both.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on has failed")]

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    process::Command,
};

use murmur_chat::{ChatTemplate, RenderInput, Timestamp};
use serde_json::{Map, Value};

/// 2024-07-26 12:34:56, as in `render.py`.
const NOW: Timestamp = Timestamp { unix_seconds: 1_721_997_296, utc_offset_seconds: 0 };
const FAMILIES_MIN: usize = 10;

/// Errors of Python where minijinja goes on: it iterates over none as over an empty list, and writes what `map` gives as
/// JSON. A conversation that Python cannot render and we can is no loss.
const LENIENT: [&str; 2] = ["'NoneType' object is not iterable", "generator is not JSON serializable"];

/// Templates that differ, and why. `"text"|safe + x` makes Python escape `x` for HTML, which nobody wants in a prompt;
/// minijinja has no such string type.
const KNOWN_DIFFERENCES: [&str; 1] = ["meetkai-functionary-medium-v3.1"];

fn reference_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference")
}

/// The part of a template's name that tells the family: `Qwen3-Coder` and `Qwen-QwQ-32B` are one.
fn family(template: &str) -> String {
    let name =
        template.split_once("ai-").map_or(template, |(owner, rest)| if owner.len() < 10 { rest } else { template });
    name.chars().take_while(|c| c.is_alphabetic()).collect::<String>().to_lowercase()
}

fn render(template: &ChatTemplate, conversation: &Value) -> Result<String, String> {
    let empty = Map::new();
    template
        .render(&RenderInput {
            messages: conversation["messages"].as_array().unwrap(),
            tools: conversation.get("tools").and_then(Value::as_array).map(Vec::as_slice),
            add_generation_prompt: conversation.get("add_generation_prompt").is_none_or(|v| v == &Value::Bool(true)),
            bos_token: "<s>",
            eos_token: "</s>",
            extra: conversation.get("extra").and_then(Value::as_object).unwrap_or(&empty),
            now: NOW,
        })
        .map_err(|error| error.to_string())
}

/// The first place where two texts differ, with some text around it.
fn difference(ours: &str, reference: &str) -> String {
    let at = ours.chars().zip(reference.chars()).take_while(|(a, b)| a == b).count();
    let around = |text: &str| text.chars().skip(at.saturating_sub(40)).take(120).collect::<String>();
    format!("at character {at}:\n     ours {:?}\n     reference {:?}", around(ours), around(reference))
}

#[test]
fn every_rendering_equals_that_of_transformers() {
    let (Ok(templates), Ok(python)) = (std::env::var("MURMUR_TEMPLATES_DIR"), std::env::var("MURMUR_PYTHON")) else {
        eprintln!("skipped: set MURMUR_TEMPLATES_DIR (a directory of *.jinja) and MURMUR_PYTHON (with jinja2)");
        return;
    };
    let conversations_path = reference_dir().join("conversations.json");
    let output = Command::new(&python)
        .arg(reference_dir().join("render.py"))
        .arg(&templates)
        .arg(&conversations_path)
        .output()
        .expect("MURMUR_PYTHON runs");
    assert!(output.status.success(), "render.py failed: {}", String::from_utf8_lossy(&output.stderr));
    let reference: BTreeMap<String, BTreeMap<String, Value>> = serde_json::from_slice(&output.stdout).unwrap();
    let conversations: BTreeMap<String, Value> =
        serde_json::from_slice(&std::fs::read(&conversations_path).unwrap()).unwrap();

    let mut differences = Vec::new();
    let mut families = BTreeSet::new();
    let (mut compared, mut rendered, mut known, mut lenient, mut refused) = (0, 0, 0, 0, 0);
    for (name, expected) in &reference {
        let source = std::fs::read_to_string(Path::new(&templates).join(format!("{name}.jinja"))).unwrap();
        let template = ChatTemplate::compile(&source).map_err(|error| error.to_string());
        for (conversation, expected) in expected {
            compared += 1;
            let ours = match &template {
                Ok(template) => render(template, &conversations[conversation]),
                Err(error) => Err(error.clone()),
            };
            let place = format!("{name} / {conversation}");
            match (ours, expected["text"].as_str()) {
                (Ok(ours), Some(text)) if ours == text => {
                    rendered += 1;
                    families.insert(family(name));
                }
                (Ok(_), Some(_)) if KNOWN_DIFFERENCES.contains(&name.as_str()) => known += 1,
                (Ok(ours), Some(text)) => differences.push(format!("{place}: {}", difference(&ours, text))),
                (Ok(_), None) if LENIENT.iter().any(|why| expected["error"].as_str().unwrap().contains(why)) => {
                    lenient += 1
                }
                (Ok(_), None) => differences.push(format!("{place}: ours renders, reference: {}", expected["error"])),
                (Err(error), Some(_)) => differences.push(format!("{place}: reference renders, ours: {error}")),
                (Err(_), None) => refused += 1,
            }
        }
    }
    eprintln!(
        "{compared} renderings of {} templates compared, {rendered} texts equal, {refused} refused by both, {lenient} that only Python refuses, {known} \
         known and {} other differences, families: {families:?}",
        reference.len(),
        differences.len()
    );
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    assert!(families.len() >= FAMILIES_MIN, "only {} families: {families:?}", families.len());
}
