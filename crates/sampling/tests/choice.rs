//! The choice follows its definition, and the definition follows the softmax.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking, in its helpers too")]

mod common;

use std::sync::Arc;

use murmur_protocol::sampling::{SamplingParams, Token};
use murmur_sampling::noise::{PositionNoise, gumbel};
use murmur_sampling::{Sampler, SamplingError, TokenAttribute, Vocabulary, VocabularyError};
use proptest::prelude::*;

fn sampler(params: SamplingParams, tokens: usize) -> Sampler {
    Sampler::new(params, common::plain(tokens), &[]).unwrap()
}

#[test]
fn the_noise_is_the_documented_function() {
    // From an implementation of the formula with unbounded integers in another language.
    for (seed, position, token, bits, noise) in [
        (0x0, 0, 0, 0xa26a_b114_db1f_32cc_u64, 0.7874319436644045),
        (0x0, 0, 1, 0x505a_12f8_f712_377b, -0.1473524556889002),
        (0x0, 1, 0, 0xdb4f_048c_f028_7143, 1.8662850650275287),
        (0x1, 0, 0, 0x26f2_1c11_4de3_2a44, -0.6328705136961079),
        (0x2a, 7, 151_935, 0xcccd_da86_30b2_56b0, 1.5000300486070013),
        (u64::MAX, u32::MAX, 0x7fff_ffff, 0xf5f4_4582_19fa_bb4e, 3.2180720668485),
        (0x0123_4567_89ab_cdef, 1000, 50_256, 0xf533_86d2_4ae1_1026, 3.144277835804135),
    ] {
        assert_eq!(PositionNoise::new(seed, position).bits(token), bits);
        let ours = gumbel(seed, position, token as Token);
        assert!((ours - noise).abs() <= 4.0 * f64::EPSILON * noise.abs(), "{ours} is not {noise}");
    }
}

/// Pearson's statistic of counts against equal or given probabilities.
fn chi_squared(counts: &[u64], probabilities: &[f64]) -> f64 {
    let total = counts.iter().sum::<u64>() as f64;
    counts.iter().zip(probabilities).map(|(count, p)| (*count as f64 - total * p).powi(2) / (total * p)).sum()
}

/// The statistic is about normal with mean k and variance 2k: six standard deviations never happen by chance.
fn assert_plausible(statistic: f64, degrees: usize, what: &str) {
    let k = degrees as f64;
    assert!((statistic - k).abs() < 6.0 * (2.0 * k).sqrt(), "{what}: chi squared {statistic} with {degrees} degrees");
}

#[test]
fn the_noise_is_uniform_along_tokens_positions_and_seeds() {
    type Walk = fn(u64) -> f64;
    let walks: [(&str, Walk); 4] = [
        ("tokens", |i| PositionNoise::new(5, 9).uniform(i as u32)),
        ("positions", |i| PositionNoise::new(5, i as u32).uniform(77)),
        ("seeds", |i| PositionNoise::new(i, 9).uniform(77)),
        ("seeds and positions", |i| PositionNoise::new(i, i as u32).uniform(i as u32)),
    ];
    for (what, uniform) in walks {
        // Singles, and pairs of neighbours: 16 x 16 cells.
        let mut cells = vec![0u64; 256];
        let mut pairs = vec![0u64; 256];
        for i in 0..200_000 {
            let (a, b) = (uniform(2 * i), uniform(2 * i + 1));
            cells[(a * 256.0) as usize] += 1;
            pairs[(a * 16.0) as usize * 16 + (b * 16.0) as usize] += 1;
        }
        let even = vec![1.0 / 256.0; 256];
        assert_plausible(chi_squared(&cells, &even), 255, what);
        assert_plausible(chi_squared(&pairs, &even), 255, what);
    }
}

#[test]
fn neighbouring_positions_and_seeds_are_independent() {
    // The same token at p and p + 1, and under seed s and s + 1.
    let mut by_position = vec![0u64; 256];
    let mut by_seed = vec![0u64; 256];
    let cell = |a: f64, b: f64| (a * 16.0) as usize * 16 + (b * 16.0) as usize;
    for position in 0..400u32 {
        let here = PositionNoise::new(3, position);
        let next = PositionNoise::new(3, position + 1);
        let other = PositionNoise::new(4, position);
        for token in 0..500 {
            by_position[cell(here.uniform(token), next.uniform(token))] += 1;
            by_seed[cell(here.uniform(token), other.uniform(token))] += 1;
        }
    }
    let even = vec![1.0 / 256.0; 256];
    assert_plausible(chi_squared(&by_position, &even), 255, "positions");
    assert_plausible(chi_squared(&by_seed, &even), 255, "seeds");
}

#[test]
fn tokens_are_drawn_from_the_softmax_at_every_temperature() {
    let logits: Vec<f32> = (0..32).map(|i| ((i * 7) % 13) as f32 * 0.4 - 2.0).collect();
    for temperature in [0.5f32, 1.0, 2.5] {
        let mut counts = vec![0u64; logits.len()];
        let params = SamplingParams { temperature, seed: 99, ..SamplingParams::default() };
        let mut sampler = sampler(params, logits.len());
        for position in 0..200_000 {
            counts[sampler.sample(&mut logits.clone(), position).unwrap().token as usize] += 1;
        }
        let weights: Vec<f64> = logits.iter().map(|logit| (f64::from(*logit) / f64::from(temperature)).exp()).collect();
        let total: f64 = weights.iter().sum();
        let probabilities: Vec<f64> = weights.iter().map(|weight| weight / total).collect();
        assert_plausible(chi_squared(&counts, &probabilities), logits.len() - 1, "softmax");
    }
}

/// The documented order of steps, with full sorts and no shortcut.
fn reference(params: &SamplingParams, logits: &[f32], position: u32) -> Token {
    let mut kept: Vec<(usize, f64)> =
        logits.iter().enumerate().filter(|(_, l)| **l > f32::NEG_INFINITY).map(|(i, l)| (i, f64::from(*l))).collect();
    let by_logit = |a: &(usize, f64), b: &(usize, f64)| b.1.partial_cmp(&a.1).unwrap().then(a.0.cmp(&b.0));
    let weights = |kept: &[(usize, f64)]| -> (Vec<f64>, f64) {
        let max = kept.iter().map(|(_, l)| *l).fold(f64::MIN, f64::max);
        let weights: Vec<f64> = kept.iter().map(|(_, l)| (l - max).exp()).collect();
        let total = weights.iter().sum();
        (weights, total)
    };
    kept.sort_by(by_logit);
    if params.top_k > 0 {
        kept.truncate(params.top_k as usize);
    }
    if params.typical_p < 1.0 {
        let (w, total) = weights(&kept);
        let entropy: f64 = w.iter().map(|w| if *w > 0.0 { -w / total * (w / total).ln() } else { 0.0 }).sum();
        let mut scored: Vec<(f64, (usize, f64), f64)> =
            kept.iter().zip(&w).map(|(t, w)| ((-(w / total).ln() - entropy).abs(), *t, w / total)).collect();
        scored.sort_by(|a, b| a.0.partial_cmp(&b.0).unwrap().then(a.1.0.cmp(&b.1.0)));
        let mut sum = 0.0;
        let mut count = 0;
        for (_, _, p) in &scored {
            sum += p;
            count += 1;
            if sum > f64::from(params.typical_p) {
                break;
            }
        }
        kept = scored[..count].iter().map(|(_, t, _)| *t).collect();
        kept.sort_by(by_logit);
    }
    if params.top_p < 1.0 {
        let (w, total) = weights(&kept);
        let mut sum = 0.0;
        let mut count = 0;
        for w in &w {
            sum += w / total;
            count += 1;
            if sum >= f64::from(params.top_p) {
                break;
            }
        }
        kept.truncate(count);
    }
    if params.min_p > 0.0 {
        let max = kept[0].1;
        kept.retain(|(_, l)| (l - max).exp() >= f64::from(params.min_p));
    }
    kept.sort_by_key(|(i, _)| *i);
    let temperature = f64::from(params.temperature);
    let mut best = (f64::NEG_INFINITY, 0);
    for (token, logit) in kept {
        let noise = if temperature == 0.0 { 0.0 } else { gumbel(params.seed, position, token as Token) };
        let score = logit + temperature * noise;
        if score > best.0 {
            best = (score, token);
        }
    }
    best.1 as Token
}

fn some_logits() -> impl Strategy<Value = Vec<f32>> {
    let logit = prop_oneof![6 => -12.0f32..12.0, 1 => Just(1.25f32), 1 => Just(f32::NEG_INFINITY)];
    prop::collection::vec(logit, 2..700).prop_map(|mut logits| {
        logits[0] = 0.5;
        logits
    })
}

/// Off, or a value that no simple sum of probabilities hits exactly.
fn fraction(off: f32) -> impl Strategy<Value = f32> {
    prop_oneof![1 => Just(off), 2 => 0.0101f32..0.9899]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]
    #[test]
    fn filters_follow_their_definition_in_every_combination(
        logits in some_logits(),
        top_k in prop_oneof![Just(0u32), 1u32..60, 500u32..900],
        typical_p in fraction(1.0),
        top_p in fraction(1.0),
        min_p in fraction(0.0),
        temperature in prop_oneof![Just(0.0f32), 0.1f32..4.0],
        seed: u64,
        position: u32,
    ) {
        let params = SamplingParams { top_k, typical_p, top_p, min_p, temperature, seed, ..SamplingParams::default() };
        let mut sampler = sampler(params.clone(), logits.len());
        let expected = reference(&params, &logits, position);
        prop_assert_eq!(sampler.sample(&mut logits.clone(), position).unwrap().token, expected);
    }

    #[test]
    fn the_choice_does_not_depend_on_where_a_token_stands_among_others(
        logits in prop::collection::vec(-8.0f32..8.0, 4..100),
        seed: u64,
    ) {
        // Banned tokens and tokens that are not there are the same to the others.
        let params = SamplingParams { seed, ..SamplingParams::default() };
        let mut few = logits.clone();
        let mut many = logits.clone();
        many.resize(logits.len() + 50, f32::NEG_INFINITY);
        let chosen = sampler(params.clone(), few.len()).sample(&mut few, 3).unwrap();
        let among_many = sampler(params, many.len()).sample(&mut many, 3).unwrap();
        prop_assert_eq!(chosen, among_many);
    }

    #[test]
    fn resuming_elsewhere_and_undoing_change_nothing(
        prompt in prop::collection::vec(0..20, 0..30),
        length in 1usize..30,
        cut in 0usize..30,
        detour in prop::collection::vec(0..20, 0..6),
        penalty_last_n in 0u32..20,
        seed: u64,
    ) {
        let params = SamplingParams {
            repeat_penalty: 1.3, presence_penalty: 0.4, frequency_penalty: 0.3, penalty_last_n, seed, top_p: 0.9,
            ..SamplingParams::default()
        };
        // A model whose output depends on the position only.
        let logits_at = |position: u32| -> Vec<f32> {
            (0..20).map(|token| (PositionNoise::new(1, position).uniform(token) * 4.0) as f32).collect()
        };
        let vocabulary = common::plain(20);
        let generate = |sampler: &mut Sampler, length: usize| {
            while sampler.generated().len() < length {
                let position = (prompt.len() + sampler.generated().len()) as u32;
                let token = sampler.sample(&mut logits_at(position), position).unwrap().token;
                sampler.accept(token).unwrap();
            }
        };
        let new = || Sampler::new(params.clone(), Arc::clone(&vocabulary), &prompt).unwrap();
        let mut whole = new();
        generate(&mut whole, length);

        let mut resumed = new();
        for &token in &whole.generated()[..cut.min(length)] {
            resumed.accept(token).unwrap();
        }
        // Drafts that turn out wrong.
        for &token in &detour {
            resumed.accept(token).unwrap();
        }
        resumed.rollback(detour.len()).unwrap();
        generate(&mut resumed, length);
        prop_assert_eq!(resumed.generated(), whole.generated());
    }
}

#[test]
fn greedy_takes_the_largest_and_the_lower_id_on_a_tie() {
    let params = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
    let mut logits = vec![0.0; 40];
    logits[33] = 2.0;
    logits[17] = 2.0;
    assert_eq!(sampler(params, 40).sample(&mut logits, 0).unwrap().token, 17);
}

#[test]
fn log_probabilities_are_those_of_the_model_whatever_was_asked_of_the_choice() {
    let params = SamplingParams {
        temperature: 0.0,
        logit_bias: vec![(2, -100.0), (0, 9.0)],
        top_logprobs: Some(2),
        ..SamplingParams::default()
    };
    let logits = [1.0f32, 2.0, 3.0, f32::NEG_INFINITY];
    let sampled = sampler(params, 4).sample(&mut logits.clone(), 0).unwrap();
    assert_eq!(sampled.token, 0);
    let total: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
    let expected = |logit: f64| (logit - total.ln()) as f32;
    assert!((sampled.logprob.unwrap() - expected(1.0)).abs() < 1e-6);
    assert_eq!(sampled.top.iter().map(|(token, _)| *token).collect::<Vec<_>>(), [2, 1]);
    assert!((sampled.top[0].1 - expected(3.0)).abs() < 1e-6);

    // More than there are: the banned token is not listed.
    let params = SamplingParams { top_logprobs: Some(20), ..SamplingParams::default() };
    assert_eq!(sampler(params, 4).sample(&mut logits.clone(), 0).unwrap().top.len(), 3);
    let params = SamplingParams { top_logprobs: Some(0), ..SamplingParams::default() };
    let sampled = sampler(params, 4).sample(&mut logits.clone(), 0).unwrap();
    assert!(sampled.logprob.is_some() && sampled.top.is_empty());
}

#[test]
fn a_bias_bans_or_forces_a_token() {
    let params = SamplingParams { logit_bias: vec![(3, 100.0)], ..SamplingParams::default() };
    for position in 0..200 {
        assert_eq!(sampler(params.clone(), 8).sample(&mut [0.0; 8], position).unwrap().token, 3);
    }
    for ban in [-100.0, -1e9, f32::NEG_INFINITY] {
        let params = SamplingParams { logit_bias: vec![(3, ban)], ..SamplingParams::default() };
        for position in 0..200 {
            assert_ne!(sampler(params.clone(), 8).sample(&mut [0.0; 8], position).unwrap().token, 3);
        }
    }
}

#[test]
fn ignoring_the_end_never_chooses_it() {
    let params = SamplingParams { ignore_eos: true, temperature: 0.0, ..SamplingParams::default() };
    let mut logits = vec![0.0f32; 8];
    logits[7] = 50.0;
    assert_eq!(sampler(params, 8).sample(&mut logits, 0).unwrap().token, 0);
}

#[test]
fn broken_logits_are_an_error_that_names_position_and_token() {
    for bad in [f32::NAN, f32::INFINITY] {
        let mut logits = vec![0.0f32; 50];
        logits[41] = bad;
        let error = sampler(SamplingParams::default(), 50).sample(&mut logits, 17).unwrap_err();
        assert!(matches!(error, SamplingError::LogitNotFinite { position: 17, token: 41, .. }), "{error}");
        assert!(error.to_string().contains("position 17"));
    }
    let error = sampler(SamplingParams::default(), 50).sample(&mut [0.0; 49], 3).unwrap_err();
    assert_eq!(error, SamplingError::LogitsLength { position: 3, logits: 49, tokens: 50 });
    let error = sampler(SamplingParams::default(), 2).sample(&mut [f32::NEG_INFINITY; 2], 5).unwrap_err();
    assert_eq!(error, SamplingError::NothingAllowed { position: 5 });
    let params = SamplingParams { logit_bias: vec![(0, -100.0), (1, -100.0)], ..SamplingParams::default() };
    let error = sampler(params, 2).sample(&mut [0.0; 2], 5).unwrap_err();
    assert_eq!(error, SamplingError::NothingAllowed { position: 5 });
}

#[test]
fn extreme_logits_with_penalties_and_bias_stay_numbers() {
    let params = SamplingParams {
        repeat_penalty: 0.001,
        logit_bias: vec![(1, f32::MAX), (2, f32::MIN)],
        top_k: 3,
        top_p: 0.99,
        min_p: 0.001,
        typical_p: 0.99,
        top_logprobs: Some(3),
        ..SamplingParams::default()
    };
    let mut sampler = Sampler::new(params, common::plain(4), &[0, 1, 2]).unwrap();
    for position in 0..50 {
        let mut logits = [f32::MAX, f32::MAX, f32::MIN, -0.0];
        let token = sampler.sample(&mut logits, position).unwrap().token;
        sampler.accept(token).unwrap();
    }
}

#[test]
fn parameters_out_of_range_are_refused_by_name() {
    let default = SamplingParams::default;
    let nan = f32::NAN;
    let cases = [
        ("temperature", SamplingParams { temperature: nan, ..default() }),
        ("temperature", SamplingParams { temperature: -0.1, ..default() }),
        ("temperature", SamplingParams { temperature: 100.1, ..default() }),
        ("temperature", SamplingParams { temperature: f32::INFINITY, ..default() }),
        ("top_p", SamplingParams { top_p: 1.1, ..default() }),
        ("top_p", SamplingParams { top_p: nan, ..default() }),
        ("min_p", SamplingParams { min_p: -0.1, ..default() }),
        ("typical_p", SamplingParams { typical_p: nan, ..default() }),
        ("repeat_penalty", SamplingParams { repeat_penalty: 0.0, ..default() }),
        ("repeat_penalty", SamplingParams { repeat_penalty: nan, ..default() }),
        ("presence_penalty", SamplingParams { presence_penalty: f32::INFINITY, ..default() }),
        ("frequency_penalty", SamplingParams { frequency_penalty: nan, ..default() }),
        ("logit_bias", SamplingParams { logit_bias: vec![(0, nan)], ..default() }),
        ("logit_bias", SamplingParams { logit_bias: vec![(0, f32::INFINITY)], ..default() }),
        ("logit_bias", SamplingParams { logit_bias: vec![(-1, 0.0)], ..default() }),
        ("logit_bias", SamplingParams { logit_bias: vec![(4, 0.0)], ..default() }),
        ("logit_bias", SamplingParams { logit_bias: vec![(0, 0.0); 100_000], ..default() }),
    ];
    for (name, params) in cases {
        let error = Sampler::new(params, common::plain(4), &[]).unwrap_err().to_string();
        assert!(error.contains(name), "{error} does not name {name}");
    }
    for prompt in [[4], [-1]] {
        let error = Sampler::new(default(), common::plain(4), &prompt).unwrap_err();
        assert!(matches!(error, SamplingError::TokenOutOfRange { place: "the prompt", .. }));
    }
    let mut sampler = sampler(default(), 4);
    assert!(sampler.accept(4).is_err());
    sampler.accept(1).unwrap();
    assert_eq!(sampler.rollback(2).unwrap_err(), SamplingError::RollbackTooFar { asked: 2, generated: 1 });
    assert_eq!(sampler.generated(), [1]);
}

#[test]
fn a_vocabulary_that_contradicts_itself_is_refused() {
    let pieces = || vec![b"a".to_vec(), b"b".to_vec()];
    let attributes = || vec![TokenAttribute::Normal; 2];
    let new = Vocabulary::new;
    assert_eq!(new(vec![], vec![], vec![], None, None).unwrap_err(), VocabularyError::Empty);
    let error = new(pieces(), vec![TokenAttribute::Normal], vec![], None, None).unwrap_err();
    assert_eq!(error, VocabularyError::Attributes { tokens: 2, attributes: 1 });
    assert!(matches!(
        new(pieces(), attributes(), vec![2], None, None).unwrap_err(),
        VocabularyError::OutOfRange { role: "end-of-generation", token: 2, .. }
    ));
    assert!(new(pieces(), attributes(), vec![], Some(-1), None).is_err());
    let vocabulary = new(pieces(), attributes(), vec![1, 1], None, Some(0)).unwrap();
    assert_eq!(vocabulary.end_of_generation(), [0, 1]);
    assert_eq!((vocabulary.bytes(1), vocabulary.bytes(2), vocabulary.bytes(-1)), (&b"b"[..], &b""[..], &b""[..]));
}

#[test]
fn samplers_can_move_between_threads() {
    fn assert_send<T: Send>() {}
    fn assert_shared<T: Send + Sync>() {}
    assert_send::<Sampler>();
    assert_shared::<Vocabulary>();
}
