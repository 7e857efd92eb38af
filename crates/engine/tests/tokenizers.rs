//! Tokenizers of eight families against llama.cpp's own test vectors, through the process that tokenises for a node; and
//! tokenizers without a model, from cards.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

mod common;

use std::path::{Path, PathBuf};

use common::*;
use murmur_engine::{Engine, EngineError, Patience, Tokenizer};
use murmur_gguf::{Gguf, synth::Weights};
use murmur_protocol::{
    frame::{Frame, Header, Kind},
    sampling::Token,
    stage::{Role, Tokenize},
};

/// Separates the texts of an `.inp` file.
const SEPARATOR: &str = "\n__ggml_vocab_test__\n";

fn vectors_pass(vocabulary: &str) {
    let Some(model) = shared_model(&format!("gguf-vocab/ggml-vocab-{vocabulary}.gguf")) else { return };
    let read = |suffix: &str| std::fs::read_to_string(format!("{}.{suffix}", model.display())).unwrap();
    let load = load(&model, Role::Vocabulary);
    let (link, mut receiver) = start_child(&load);
    let (texts, expected) = (read("inp"), read("out"));
    let mut compared = 0;
    for (text, expected) in texts.split(SEPARATOR).zip(expected.lines()) {
        // The vectors were made without the tokens that a model wants at the start.
        let request = Tokenize { text: text.to_owned(), add_special: false, parse_special: false };
        assert!(link.send(&[Frame::message(Header::new(Kind::Tokenize, 1), &request).unwrap()]).is_empty());
        let (answer, _) = receiver.receive().unwrap();
        let expected: Vec<Token> = expected.split_whitespace().map(|id| id.parse().unwrap()).collect();
        assert_eq!(answer.token_rows().unwrap(), expected, "{vocabulary}: {text:?}");
        compared += 1;
    }
    assert!(compared > 30, "{compared}");
}

macro_rules! vocabularies {
    ($($name:ident: $vocabulary:literal,)*) => {$(
        #[test]
        fn $name() {
            vectors_pass($vocabulary);
        }
    )*};
}

vocabularies! {
    bert_bge_vectors_pass: "bert-bge",
    deepseek_coder_vectors_pass: "deepseek-coder",
    falcon_vectors_pass: "falcon",
    gpt_2_vectors_pass: "gpt-2",
    llama_spm_vectors_pass: "llama-spm",
    phi_3_vectors_pass: "phi-3",
    refact_vectors_pass: "refact",
    starcoder_vectors_pass: "starcoder",
}

const TEXTS: &[&str] = &[
    "",
    "Hello, world! ",
    "  leading and\ttabs\n\n\nand lines",
    "3.14159 и кириллица, 漢字, \u{1f980}\u{200d}\u{1f525}",
    "<|im_start|>user\nhi<|im_end|></s><s><bos>",
    "\u{0}\u{7f}\u{ffff}",
];

fn start(lab: &Lab, card: &Path) -> Result<Tokenizer, EngineError> {
    Tokenizer::start(lab.program.clone(), card, Patience::default().silence_floor)
}

/// Writes a model's card beside the lab's models.
fn card_of(lab: &Lab, model: &Path) -> PathBuf {
    let bytes = murmur_gguf::tokenizer_card(&Gguf::open(model).unwrap()).unwrap();
    let path = lab.dir.path().join("card.gguf");
    std::fs::write(&path, bytes).unwrap();
    path
}

/// Every token and every text is the same through both.
async fn are_alike(card: &Tokenizer, model: &Tokenizer) {
    let (a, b) = (card.vocabulary(), model.vocabulary());
    assert_eq!((a.len(), a.bos(), a.eos()), (b.len(), b.bos(), b.eos()));
    assert_eq!(a.end_of_generation(), b.end_of_generation());
    for token in 0..a.len() as Token {
        assert_eq!((a.bytes(token), a.attribute(token)), (b.bytes(token), b.attribute(token)), "{token}");
    }
    for text in TEXTS {
        for (add_special, parse_special) in [(false, false), (true, false), (false, true), (true, true)] {
            let tokens = card.tokenize(text, add_special, parse_special).await.unwrap();
            assert_eq!(tokens, model.tokenize(text, add_special, parse_special).await.unwrap(), "{text:?}");
        }
    }
}

async fn a_card_does_for(lab: &Lab, model: &Path) {
    let card = card_of(lab, model);
    are_alike(&start(lab, &card).unwrap(), &start(lab, model).unwrap()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_card_of_the_demo_model_tokenizes_as_the_model_does() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/demo/murmur-demo-q8_0.gguf");
    let lab = Lab::new();
    a_card_does_for(&lab, &model).await;
    let bytes = |path: &Path| std::fs::metadata(path).unwrap().len();
    assert!(bytes(&lab.dir.path().join("card.gguf")) < bytes(&model) / 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn cards_of_real_vocabularies_tokenize_as_they_do() {
    let lab = Lab::new();
    for name in ["llama-spm", "bert-bge", "gpt-2", "phi-3"] {
        let Some(model) = shared_model(&format!("gguf-vocab/ggml-vocab-{name}.gguf")) else { return };
        a_card_does_for(&lab, &model).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_card_without_the_model_serves_as_the_engine_of_the_whole_model_does() {
    let lab = Lab::new();
    let model = lab.tiny("llama", Weights::F32);
    let engine: Engine = lab.engine(&model, ranges(&[0, layers(&model)]), false);
    let card = card_of(&lab, &model);
    std::fs::remove_file(&model).unwrap();
    are_alike(&start(&lab, &card).unwrap(), engine.tokenizer()).await;
    let kept = engine.tokenizer().clone();
    drop(engine);
    assert!(matches!(kept.tokenize("a", false, false).await, Err(EngineError::Stopped)));
    assert!(!kept.vocabulary().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_child_of_a_tokenizer_is_replaced_when_it_dies_and_ends_with_it() {
    let lab = Lab::new();
    let tokenizer = start(&lab, &card_of(&lab, &lab.tiny("llama", Weights::F32))).unwrap();
    let expected = tokenizer.tokenize("one two three", true, false).await.unwrap();
    let first = tokenizer.process_id().unwrap();
    kill(first);
    // It may answer once more before it is gone.
    let second = loop {
        assert_eq!(tokenizer.tokenize("one two three", true, false).await.unwrap(), expected);
        if let Some(second) = tokenizer.process_id().filter(|&id| id != first) {
            break second;
        }
    };
    drop(tokenizer);
    assert!(!lab.children().contains(&second));
}

#[test]
fn a_card_that_is_damaged_or_no_vocabulary_is_refused_before_llama_cpp_sees_it() {
    let lab = Lab::new();
    let card = card_of(&lab, &lab.tiny("llama", Weights::F32));
    let bytes = std::fs::read(&card).unwrap();
    let bad = lab.dir.path().join("bad.gguf");
    let mut renamed = bytes.clone();
    let at = renamed.windows(20).position(|window| window == b"tokenizer.ggml.model").unwrap();
    renamed[at] = b'T';
    for bytes in [&bytes[..bytes.len() / 2], b"no GGUF at all", b"", &renamed] {
        std::fs::write(&bad, bytes).unwrap();
        assert!(matches!(start(&lab, &bad), Err(EngineError::Gguf(_))));
    }
    assert!(matches!(start(&lab, &lab.dir.path().join("nothing")), Err(EngineError::Gguf(_))));
}
