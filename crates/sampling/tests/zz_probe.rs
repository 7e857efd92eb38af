mod common;
use std::{sync::Arc, time::{Duration, Instant}};
use murmur_protocol::sampling::{Grammar, SamplingParams};
use murmur_sampling::Sampler;
#[test]
fn probe() {
    let v = common::bytes();
    let size = std::env::var("SIZE").unwrap().parse::<usize>().unwrap();
    let rep = |s: &str| s.repeat(size / s.len());
    let mut cases: Vec<(String, Grammar)> = vec![];
    for p in ["(?:a|bc){3,9}*", "a*", "a?", "a*b*", "[ab]?", ".*a", "(a|b)*", ".{0,9}", "(.{9})*", "a{9}*"] {
        cases.push((p.into(), Grammar::Regex(rep(p))));
    }
    cases.push(("alt".into(), Grammar::Regex(vec!["a*b"; size / 4].join("|"))));
    cases.push(("alt2".into(), Grammar::Regex((0..size / 12).map(|i| format!("(a{{{}}})*b", i + 1)).collect::<Vec<_>>().join("|"))));
    cases.push(("alt3".into(), Grammar::Regex((0..size / 14).map(|i| format!("(.{{{}}})*b", i + 1)).collect::<Vec<_>>().join("|"))));
    cases.push(("and".into(), Grammar::Lark(format!("start: T\nT: {}\n", (0..size / 16).map(|i| format!("/(a{{{}}})*/", i + 1)).collect::<Vec<_>>().join(" & ")))));
    cases.push(("lark opt".into(), Grammar::Lark(format!("start: {}\n", rep("\"a\"? ")))));
    cases.push(("lark star".into(), Grammar::Lark(format!("start: {}\n", rep("/a/* ")))));
    cases.push(("rules".into(), Grammar::Lark(format!("start: r0\n{}", (0..size / 20).map(|i| format!("r{i}: r{} | \"a\"\n", (i + 1) % (size / 20))).collect::<String>()))));
    for (name, g) in cases {
        let p = SamplingParams { grammar: Some(g), ignore_eos: true, ..SamplingParams::default() };
        let t = Instant::now();
        let s = Sampler::new(p, Arc::clone(&v), &[]);
        let new = t.elapsed();
        let mut worst = Duration::ZERO;
        let mut note = String::new();
        match s {
            Err(e) => note = e.to_string().chars().take(60).collect(),
            Ok(mut s) => for i in 0..12 {
                let t = Instant::now();
                match s.sample(&mut vec![0.0; v.len()], i) {
                    Err(e) => { worst = worst.max(t.elapsed()); note = e.to_string().chars().take(60).collect(); break }
                    Ok(r) => { s.accept(r.token).unwrap(); }
                }
                worst = worst.max(t.elapsed());
            }
        }
        println!("CASE {name:>16}: new {new:?} step {worst:?} {note}");
    }
}
