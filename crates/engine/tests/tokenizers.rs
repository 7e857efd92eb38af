//! Tokenizers of eight families against llama.cpp's own test vectors, through the process that tokenises for a node.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

mod common;

use common::*;
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
