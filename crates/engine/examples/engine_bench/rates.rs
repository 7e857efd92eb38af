//! Tokens per second of one stream, without server and client: what compares with a bare loop over llama.cpp.

use std::io::BufRead;

use murmur_protocol::sampling::SamplingParams;

use crate::{Place, answer, prompt};

/// For each line on stdin, a prompt of so many tokens and an answer of so many.
pub(crate) async fn measure(place: &Place<'_>, threads: u32, prompt_tokens: usize, tokens: u32) {
    let engine = place.load(1, threads, false);
    let sampling = || SamplingParams { temperature: 0.0, ignore_eos: true, ..SamplingParams::default() };
    for (turn, line) in (1..).zip(std::io::stdin().lock().lines()) {
        line.expect("stdin is text");
        let prefill = answer(&engine, prompt(2 * turn, prompt_tokens), 1, sampling()).await;
        let decode = answer(&engine, prompt(2 * turn + 1, 1), tokens, sampling()).await;
        let prefill = prompt_tokens as f64 / prefill.until_first.as_secs_f64();
        let decode = f64::from(tokens - 1) / decode.since_first.as_secs_f64();
        println!("{{\"prefill\":{prefill:.2},\"decode\":{decode:.2}}}");
    }
}
