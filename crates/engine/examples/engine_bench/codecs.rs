//! What a smaller form of hidden states costs: how far it moves the distribution of the next token, over a text.

use std::collections::HashMap;

use murmur_engine::{Engine, Keep, SessionRequest};
use murmur_protocol::{
    codec::Codec,
    sampling::{SamplingParams, Token},
};

use super::{Place, next_token};

/// The likeliest tokens of a distribution; all others count as one.
type Top = HashMap<Token, f64>;

/// Prints, for each lossy codec between `stages`, the KL divergence from f32 in nats and how often the likeliest token is the same,
/// over the first `positions` of a text, of which each token is predicted from the true ones before it.
pub(crate) async fn measure(place: &Place<'_>, threads: u32, stages: u32, text: &str, positions: usize) {
    let mut exact: Option<Vec<Top>> = None;
    for codec in Codec::ALL {
        let engine = place.load_cut(stages, 1, threads, false, Keep::default(), codec);
        let tokens = engine.tokenize(text, true, false).await.expect("the text can be tokenised");
        let tokens = &tokens[..tokens.len().min(positions + 1)];
        let mut tops = Vec::new();
        for end in 1..tokens.len() {
            tops.push(top(&engine, &tokens[..end]).await);
        }
        let Some(exact) = &exact else {
            exact = Some(tops);
            continue;
        };
        let divergences: Vec<f64> = exact.iter().zip(&tops).map(|(exact, top)| divergence(exact, top)).collect();
        let agreed = exact.iter().zip(&tops).filter(|(exact, top)| likeliest(exact) == likeliest(top)).count();
        println!(
            r#"{{"codec":"{}","positions":{},"kl_mean":{:.3e},"kl_max":{:.3e},"same_top_token":{:.5}}}"#,
            codec.name(),
            tops.len(),
            divergences.iter().sum::<f64>() / tops.len() as f64,
            divergences.iter().fold(0.0, |largest, &divergence| f64::max(largest, divergence)),
            agreed as f64 / tops.len() as f64,
        );
    }
}

async fn top(engine: &Engine, prompt: &[Token]) -> Top {
    let sampling =
        SamplingParams { temperature: 0.0, ignore_eos: true, top_logprobs: Some(u8::MAX), ..SamplingParams::default() };
    let request = SessionRequest { prompt: prompt.to_vec(), generated: Vec::new(), max_tokens: 1, sampling };
    let mut stream = engine.start(request).expect("there is room");
    let sampled = next_token(&mut stream).await.expect("an answer has a token");
    sampled.top.iter().map(|&(token, log)| (token, f64::from(log).exp())).collect()
}

/// KL divergence of `top` from `exact` over the tokens that both name and the rest as one: at most that of all tokens.
fn divergence(exact: &Top, top: &Top) -> f64 {
    let both = exact.iter().filter_map(|(token, &p)| Some((p, *top.get(token)?)));
    let (mut sum, mut rest_p, mut rest_q) = (0.0, 1.0, 1.0);
    for (p, q) in both {
        sum += p * (p / q).ln();
        rest_p -= p;
        rest_q -= q;
    }
    if rest_p > 1e-9 && rest_q > 1e-9 { sum + rest_p * (rest_p / rest_q).ln() } else { sum }.max(0.0)
}

fn likeliest(top: &Top) -> Option<Token> {
    top.iter().max_by(|a, b| a.1.total_cmp(b.1)).map(|(token, _)| *token)
}
