//! Measures what only who holds the engine can. The benchmarks of `./x bench` call it; every line it prints is a JSON object.
//!
//! | arguments | what it measures |
//! |---|---|
//! | `boundary CHILD MODEL SCRATCH_DIR` | the cost of the process boundary per step, and how often the default mode chooses another token in company |
//! | `rates CHILD MODEL SCRATCH_DIR THREADS PROMPT TOKENS` | tokens per second of prompt and answer, again for each line on stdin |
//! | `resume CHILD MODEL SCRATCH_DIR THREADS STAGES CONTEXT` | the pause of an answer of which a stage dies, behind so many tokens |
//! | `codecs CHILD MODEL SCRATCH_DIR THREADS STAGES TEXT_FILE POSITIONS` | how far lossy codecs between stages move the next token's distribution |
//! | `requests CHILD MODEL SCRATCH_DIR CONCURRENCY REQUESTS ROUNDS [ADDRESS...]` | requests per second, into the engine and through APIs |
#![allow(clippy::expect_used, clippy::panic, clippy::print_stdout)] // a tool for its developers

mod boundary;
mod codecs;
mod rates;
mod requests;
mod resume;

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use murmur_engine::{Draft, Engine, EngineOptions, Keep, Patience, SessionEvent, SessionRequest, SessionStream, Stop};
use murmur_gguf::{Gguf, even_cuts};
use murmur_protocol::{
    codec::Codec,
    sampling::{Sampled, SamplingParams, Token},
};

const CONTEXT_TOKENS: u32 = 2048;

/// Ids that exist in any vocabulary of at least a thousand tokens and are no special tokens.
const TOKENS: std::ops::Range<Token> = 300..1000;

/// The first three arguments of all: which program computes, which model, and where its slices may lie.
struct Place<'a> {
    child: &'a str,
    model: &'a str,
    scratch: &'a str,
}

impl Place<'_> {
    /// The whole model in one stage.
    fn load(&self, parallel: u32, threads: u32, exact: bool) -> Engine {
        self.load_cut(1, parallel, threads, exact, Keep::default(), Codec::F32)
    }

    fn load_cut(&self, stages: u32, parallel: u32, threads: u32, exact: bool, keep: Keep, codec: Codec) -> Engine {
        let model = PathBuf::from(self.model);
        let gguf = Gguf::open(&model).expect("the model opens");
        let options = EngineOptions {
            program: PathBuf::from(self.child),
            model,
            content_addressed: false,
            slices_dir: PathBuf::from(self.scratch),
            embedding: false,
            ranges: even_cuts(&gguf, stages).expect("the model has so many layers"),
            context_tokens: CONTEXT_TOKENS,
            parallel,
            queue_max: 64,
            chunk_rows: 512,
            threads: Some(threads),
            exact,
            gpu_layers: 0,
            patience: Patience::default(),
            keep,
            codecs: vec![codec; stages as usize],
            draft: Draft::Off,
            travel_us: 0,
        };
        Engine::load(options, Stop::new(), |_, _| {}).expect("the model loads")
    }
}

/// An answer, and how long it took.
struct Answer {
    tokens: Vec<Token>,
    /// From the request to the first token.
    until_first: Duration,
    /// From the first token to the end.
    since_first: Duration,
}

async fn answer(engine: &Engine, prompt: Vec<Token>, max_tokens: u32, sampling: SamplingParams) -> Answer {
    let begin = Instant::now();
    let request = SessionRequest { prompt, generated: Vec::new(), max_tokens, sampling };
    let mut stream = engine.start(request).expect("there is room");
    let (mut tokens, mut first) = (Vec::new(), None);
    while let Some(sampled) = next_token(&mut stream).await {
        first.get_or_insert_with(Instant::now);
        tokens.push(sampled.token);
    }
    let first = first.expect("an answer has a token");
    Answer { tokens, until_first: first - begin, since_first: first.elapsed() }
}

/// The next token of an answer; `None` after the last.
async fn next_token(stream: &mut SessionStream) -> Option<Sampled> {
    loop {
        match stream.next().await? {
            SessionEvent::Token(sampled) => return Some(sampled),
            SessionEvent::Failed(reason) | SessionEvent::Lost(reason) => panic!("{reason}"),
            _ => {}
        }
    }
}

/// So many tokens, other ones for every number.
fn prompt(mut number: usize, tokens: usize) -> Vec<Token> {
    let digit = |_| {
        let digit = number % TOKENS.len();
        number /= TOKENS.len();
        TOKENS.start + digit as Token
    };
    (0..tokens).map(digit).collect()
}

fn number<T: std::str::FromStr>(text: &str) -> T {
    text.parse().ok().unwrap_or_else(|| panic!("{text} is no number"))
}

#[tokio::main]
async fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let [what, child, model, scratch, rest @ ..] = args.as_slice() else {
        panic!("usage: engine_bench boundary|rates|resume|codecs|requests CHILD MODEL SCRATCH_DIR ...");
    };
    let place = Place { child, model, scratch };
    match (*what, rest) {
        ("boundary", []) => boundary::measure(&place).await,
        ("rates", [threads, prompt, tokens]) => {
            rates::measure(&place, number(threads), number(prompt), number(tokens)).await;
        }
        ("resume", [threads, stages, context]) => {
            resume::measure(&place, number(threads), number(stages), number(context)).await;
        }
        ("codecs", [threads, stages, text, positions]) => {
            let text = std::fs::read_to_string(text).expect("the text can be read");
            codecs::measure(&place, number(threads), number(stages), &text, number(positions)).await;
        }
        ("requests", [concurrency, requests, rounds, addresses @ ..]) => {
            requests::measure(&place, number(concurrency), number(requests), number(rounds), addresses).await;
        }
        _ => panic!("see the first lines of {}", file!()),
    }
}
