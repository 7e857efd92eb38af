//! A stage on its own, spoken to frame by frame: KV state moves between processes, bad frames are refused.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

mod common;

use std::path::Path;

use common::*;
use murmur_engine::link::{Link, Receiver};
use murmur_gguf::synth::Weights;
use murmur_protocol::{
    codec::Codec,
    frame::{FLAG_GUESS, FLAG_PREFILL, FLAG_WANT_OUTPUT, Frame, Header, Kind, NEXT_ROWS_MAX},
    sampling::Token,
    stage::{Load, NotOpened, Open, Role, Step},
};

struct Stage {
    link: Link,
    receiver: Receiver,
}

impl Stage {
    fn new(model: &Path) -> Stage {
        Stage::start(&load(model, Role::Stage { first: true, last: true }))
    }

    fn start(load: &Load) -> Stage {
        let (link, receiver) = start_child(load);
        Stage { link, receiver }
    }

    fn ask(&mut self, frame: Frame) -> Frame {
        assert!(self.link.send(&[frame]).is_empty());
        self.receiver.receive().expect("the stage answers").0
    }

    fn open(&mut self, session: u64, prompt: &[Token], generated: &[Token]) -> Frame {
        let open = Open {
            prompt: prompt.to_vec(),
            generated: generated.to_vec(),
            reserve_cells: 200,
            sampling: Some(greedy()),
            codec: Codec::F32,
        };
        self.ask(Frame::message(Header::new(Kind::Open, session), &open).unwrap())
    }

    fn rows(&mut self, session: u64, position: u32, tokens: &[Token], flags: u16) -> Frame {
        let header = Header { position, flags, ..Header::new(Kind::Tokens, session) };
        self.ask(Frame::tokens(header, tokens))
    }

    /// The tokens that `count` answers to these frames have.
    fn tokens(&mut self, frames: &[Frame], count: usize) -> Vec<Token> {
        assert!(self.link.send(frames).is_empty());
        let answers = (0..count).map(|_| self.receiver.receive().expect("the stage answers").0);
        answers.map(|frame| frame.decode::<Step>().unwrap().sampled[0].token).collect()
    }

    /// The token sampled after `tokens`, and the bits of the best log-probability.
    fn step(&mut self, session: u64, position: u32, tokens: &[Token], flags: u16) -> (Token, u32) {
        let frame = self.rows(session, position, tokens, flags | FLAG_WANT_OUTPUT);
        let mut step: Step = frame.decode().unwrap_or_else(|_| panic!("{}", frame.as_text()));
        let sampled = step.sampled.remove(0);
        (sampled.token, sampled.top[0].1.to_bits())
    }
}

#[test]
fn a_saved_state_goes_on_in_another_process_with_the_same_bits() {
    let lab = Lab::new();
    let model = lab.tiny("llama", Weights::Q8_0);
    let prompt = prompt(50, 1);
    let mut one = Stage::new(&model);
    assert_eq!(one.open(1, &prompt, &[]).header.kind, Kind::Opened);
    let (token, _) = one.step(1, 0, &prompt, FLAG_PREFILL);
    let state = one.ask(Frame { header: Header::new(Kind::SaveState, 1), payload: Vec::new() });
    assert_eq!(state.header.kind, Kind::State);
    let expected = one.step(1, 50, &[token], 0);

    let mut other = Stage::new(&model);
    assert_eq!(other.open(9, &prompt, &[token]).header.kind, Kind::Opened);
    let mut restore = Frame::tokens(Header::new(Kind::State, 9), &prompt);
    restore.payload.extend_from_slice(&state.payload);
    assert_eq!(other.ask(restore).header.kind, Kind::Restored);
    assert_eq!(other.step(9, 50, &[token], 0), expected);
}

#[test]
fn a_lower_position_is_a_rollback_and_a_higher_one_an_error() {
    let lab = Lab::new();
    let mut stage = Stage::new(&lab.tiny("llama", Weights::F32));
    let prompt = prompt(20, 1);
    stage.open(1, &prompt, &[]);
    let first = stage.step(1, 0, &prompt, FLAG_PREFILL);
    stage.step(1, 20, &[first.0], 0);
    let gap = stage.rows(1, 30, &[5], 0);
    assert_eq!(gap.header.kind, Kind::StepFailed);
    let again = stage.step(1, 0, &prompt, FLAG_PREFILL);
    // The sampler has moved on by two tokens, the model has not.
    assert_eq!(again, first);
}

#[test]
fn a_whole_model_goes_on_with_the_token_it_has_sampled_itself() {
    let lab = Lab::new();
    let model = lab.tiny("llama", Weights::Q8_0);
    let prompt = prompt(20, 1);
    let mut told = Stage::new(&model);
    told.open(1, &prompt, &[]);
    let mut tokens = vec![told.step(1, 0, &prompt, FLAG_PREFILL).0];
    for position in 20..26 {
        tokens.push(told.step(1, position, &tokens[tokens.len() - 1..], 0).0);
    }

    let mut alone = Stage::new(&model);
    alone.open(1, &prompt, &[]);
    // Asked before the token is known, for several rows and for more behind them, and afterwards.
    let mut heard = alone.tokens(&[rows(0, &prompt), next(20, 2), next(22, 2)], 5);
    heard.extend(alone.tokens(&[next(24, 1)], 1));
    heard.extend(alone.tokens(&[next(25, 1)], 1));
    assert_eq!(heard, tokens);
}

#[test]
fn a_whole_model_that_is_told_another_token_goes_on_with_that_and_not_with_what_it_has_sampled_for_the_same_place() {
    let lab = Lab::new();
    let model = lab.tiny("llama", Weights::Q8_0);
    let prompt = prompt(20, 1);
    let mut alone = Stage::new(&model);
    alone.open(1, &prompt, &[]);
    let before = alone.tokens(&[rows(0, &prompt), next(20, 1)], 2);
    let other = before[0] ^ 1;
    // It has a token for position 21 already.
    let heard = alone.tokens(&[rows(20, &[other]), next(21, 1)], 2);

    let mut told = Stage::new(&model);
    told.open(1, &prompt, &[]);
    told.step(1, 0, &prompt, FLAG_PREFILL);
    let first = told.step(1, 20, &[other], 0).0;
    assert_eq!(heard, [first, told.step(1, 21, &[first], 0).0]);
    assert_ne!(heard[0], before[1], "the other token has changed nothing, so that this shows nothing");
}

#[test]
fn a_word_to_go_on_where_no_token_was_sampled_is_answered_and_costs_nothing() {
    let lab = Lab::new();
    let prompt = prompt(20, 1);
    let mut alone = Stage::new(&lab.tiny("llama", Weights::Q8_0));
    alone.open(1, &prompt, &[]);
    let answer = alone.ask(next(20, 3));
    assert_eq!((answer.header.kind, answer.header.rows), (Kind::StepFailed, 3), "{}", answer.as_text());
    assert_eq!(alone.tokens(&[rows(0, &prompt), next(20, 2)], 3).len(), 3);
    // Two places further than the newest token.
    let answer = alone.ask(next(24, 1));
    assert_eq!(answer.header.kind, Kind::StepFailed, "{}", answer.as_text());
    assert_eq!(alone.tokens(&[next(22, 1)], 1).len(), 1);
}

/// Rows of session 1, of the last of which the next token is wanted.
fn rows(position: u32, tokens: &[Token]) -> Frame {
    let prefill = if tokens.len() > 1 { FLAG_PREFILL } else { 0 };
    Frame::tokens(Header { position, flags: prefill | FLAG_WANT_OUTPUT, ..Header::new(Kind::Tokens, 1) }, tokens)
}

/// Rows of session 1 that are for the stage to choose.
fn next(position: u32, rows: u32) -> Frame {
    let header = Header { position, rows, flags: FLAG_WANT_OUTPUT, ..Header::new(Kind::Next, 1) };
    Frame { header, payload: Vec::new() }
}

#[test]
fn guesses_that_wait_behind_one_another_are_computed_together_and_give_what_they_give_one_by_one() {
    let lab = Lab::new();
    let model = lab.tiny("llama", Weights::Q8_0);
    let load = Load { exact: true, ..load(&model, Role::Stage { first: true, last: true }) };
    let prompt = prompt(20, 1);
    let mut told = Stage::start(&load);
    told.open(1, &prompt, &[]);
    let mut tokens = vec![told.step(1, 0, &prompt, FLAG_PREFILL)];
    for position in 20..24 {
        tokens.push(told.step(1, position, &[tokens[tokens.len() - 1].0], 0));
    }

    let mut ahead = Stage::start(&load);
    ahead.open(1, &prompt, &[]);
    assert_eq!(ahead.step(1, 0, &prompt, FLAG_PREFILL), tokens[0]);
    let guess = |position, tokens: &[Token]| {
        let flags = FLAG_WANT_OUTPUT | FLAG_GUESS;
        Frame::tokens(Header { position, flags, ..Header::new(Kind::Tokens, 1) }, tokens)
    };
    let known: Vec<Token> = tokens.iter().map(|(token, _)| *token).collect();
    let wrong = known[3] ^ 1;
    let sent = [rows(20, &known[..1]), guess(21, &known[1..3]), guess(23, &[wrong]), guess(24, &[wrong])];
    assert!(ahead.link.send(&sent).is_empty());
    let answers = sent.each_ref().map(|_| ahead.receiver.receive().unwrap().0.decode::<Step>().unwrap());
    assert!(answers.iter().all(|step| step.batch_rows == 5), "{answers:?}");
    let sampled = answers.map(|step| step.sampled);
    let heard: Vec<_> = sampled.iter().flatten().map(|s| (s.token, s.top[0].1.to_bits())).collect();
    // The token for position 23 is known, and what was guessed for that is another.
    assert_eq!((heard, sampled.map(|of_frame| of_frame.len())), (tokens[1..4].to_vec(), [1, 2, 0, 0]));
    // What was in vain is forgotten.
    assert_eq!(ahead.step(1, 23, &known[3..4], 0), tokens[4]);
}

#[test]
fn bad_frames_are_answered_and_the_stage_lives_on() {
    let lab = Lab::new();
    let mut stage = Stage::new(&lab.tiny("llama", Weights::F32));
    stage.open(1, &prompt(20, 1), &[]);
    let cases = [
        Frame { header: Header { rows: 3, ..Header::new(Kind::Tokens, 1) }, payload: vec![1, 2, 3] },
        Frame { header: Header { rows: 1, ..Header::new(Kind::Hidden, 1) }, payload: vec![0; 8] },
        Frame::tokens(Header::new(Kind::Tokens, 1), &[i32::MAX]),
        Frame::tokens(Header::new(Kind::Tokens, 1), &[-5]),
        Frame { header: Header { rows: NEXT_ROWS_MAX + 1, ..Header::new(Kind::Next, 1) }, payload: vec![] },
        Frame { header: Header::new(Kind::Next, 1), payload: vec![] },
        Frame { header: Header::new(Kind::Open, 2), payload: vec![255; 40] },
        Frame { header: Header { rows: 9, ..Header::new(Kind::State, 1) }, payload: vec![7; 500] },
        Frame { header: Header::new(Kind::State, 1), payload: vec![7; 500] },
        Frame { header: Header::new(Kind::SaveState, 77), payload: vec![] },
        Frame { header: Header::new(Kind::Embed, 1), payload: vec![] },
    ];
    for frame in cases {
        let shown = format!("{:?}", frame.header);
        assert_eq!(stage.ask(frame).header.kind, Kind::StepFailed, "{shown}");
    }
    let opened = stage.open(3, &prompt(20, 2), &[]);
    assert_eq!(opened.header.kind, Kind::Opened);
    stage.step(3, 0, &prompt(20, 2), FLAG_PREFILL);
}

#[test]
fn a_session_larger_than_its_share_of_the_cache_is_refused_with_the_numbers() {
    let lab = Lab::new();
    let mut stage = Stage::new(&lab.tiny("llama", Weights::F32));
    let open = Open {
        prompt: prompt(20, 1),
        generated: vec![],
        reserve_cells: 5000,
        sampling: Some(greedy()),
        codec: Codec::F32,
    };
    let answer = stage.ask(Frame::message(Header::new(Kind::Open, 1), &open).unwrap());
    let NotOpened::Bad(reason) = answer.decode().unwrap() else { panic!("{answer:?}") };
    assert!(reason.contains("5000") && reason.contains("256"), "{reason}");
}
