//! The encoding of the frames that go between nodes, as what a driver and the hosts of a ring say to each other. It is checked in
//! like that of the mesh's messages: nodes of different builds share rings.

use std::fmt::Debug;

use murmur_protocol::{
    codec::Codec,
    frame::{
        FLAG_FORGET, FLAG_GUESS, FLAG_HANDED_ON, FLAG_HOLD, FLAG_NEVER_TAKEN, FLAG_PREFILL, FLAG_WANT_OUTPUT, Frame,
        Header, Kind,
    },
    mesh::{NodeId, RingId},
    sampling::{Grammar, Sampled, SamplingParams},
    stage::{Loaded, NotOpened, Open, Opened, Route, RouteTo, Sessions, Step},
};
use serde::Serialize;

use crate::golden::{add, entries, is_what_it_was, read_bytes};

const PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/frames.txt");

/// Values of a hidden state here: one block of the coarsest codec.
const WIDTH: usize = 32;

/// Whether nodes send each other such frames. The others stay between a node and its children, which are of one build.
fn goes_between_nodes(kind: Kind) -> bool {
    match kind {
        Kind::Progress | Kind::Loaded | Kind::LoadFailed => true,
        Kind::Open | Kind::Opened | Kind::NotOpened | Kind::Close => true,
        Kind::Route | Kind::RouteLost | Kind::Sessions => true,
        Kind::Tokens | Kind::Hidden | Kind::Next | Kind::Repeat | Kind::Rewind => true,
        Kind::Sampled | Kind::Done | Kind::StepFailed => true,
        Kind::Load | Kind::Alive | Kind::Tokenize | Kind::Tokenized | Kind::Embed | Kind::Embedded => false,
        Kind::SaveState | Kind::State | Kind::Restored => false,
    }
}

fn header(kind: Kind, flags: u16) -> Header {
    Header { flags, epoch: 2, ..Header::new(kind, 0x0102_0304_0506_0708) }
}

/// Of rows in the middle of a prompt.
fn rows(kind: Kind, flags: u16) -> Header {
    Header { position: 512, stages: 3, ..header(kind, flags) }
}

fn bare(header: Header) -> Frame {
    Frame { header, payload: Vec::new() }
}

fn message(kind: Kind, flags: u16, message: &impl Serialize) -> Frame {
    Frame::message(header(kind, flags), message).unwrap()
}

/// Two rows with values that every codec keeps.
fn hidden(codec: Codec) -> Frame {
    let states: Vec<f32> = (0..2 * WIDTH).map(|at| if at % WIDTH == 0 { 127.0 } else { at as f32 - 20.0 }).collect();
    let mut payload = tokens(&[7, -1]);
    codec.encode(&states, WIDTH, &mut payload);
    Frame { header: Header { codec, rows: 2, ..rows(Kind::Hidden, FLAG_PREFILL) }, payload }
}

fn tokens(tokens: &[i32]) -> Vec<u8> {
    tokens.iter().flat_map(|token| token.to_le_bytes()).collect()
}

fn sampling(grammar: Grammar) -> SamplingParams {
    SamplingParams {
        temperature: 0.75,
        top_k: 40,
        top_p: 0.5,
        min_p: 0.25,
        typical_p: 1.0,
        repeat_penalty: 1.5,
        presence_penalty: -0.5,
        frequency_penalty: 0.125,
        penalty_last_n: 64,
        logit_bias: vec![(7, -2.0)],
        seed: u64::MAX,
        ignore_eos: true,
        top_logprobs: Some(2),
        grammar: Some(grammar),
    }
}

/// Each of them, in every form that it has.
fn frames() -> Vec<(&'static str, Frame)> {
    let loaded =
        Loaded { n_embd: 1_024, n_layer: 8, kv_cells: 8_192, load_ms: 2_500, weight_bytes: 3 << 30, vocabulary: None };
    let open = Open {
        prompt: vec![1, 300, -1],
        generated: vec![70_000],
        reserve_cells: 4_096,
        sampling: None,
        codec: Codec::Q8,
    };
    let to_last = |grammar| Open { sampling: Some(sampling(grammar)), codec: Codec::F32, ..open.clone() };
    let to = RouteTo { node: NodeId::from_bytes([0xab; 32]), ring: RingId::from_bytes([0xcd; 16]) };
    let likely = Sampled { token: 300, logprob: Some(-0.5), top: vec![(300, -0.5), (2, -1.5)], grammar_ended: true };
    let plain = Sampled { token: -1, logprob: None, top: Vec::new(), grammar_ended: false };
    let step = Step { sampled: Vec::new(), compute_us: 1_234, batch_rows: 9, threads: 4 };
    vec![
        ("progress", Frame { payload: 0.5f32.to_le_bytes().to_vec(), ..bare(header(Kind::Progress, 0)) }),
        ("loaded", message(Kind::Loaded, 0, &loaded)),
        ("load failed", Frame::text(header(Kind::LoadFailed, 0), "no room")),
        ("open", message(Kind::Open, 0, &open)),
        ("open in f16", message(Kind::Open, 0, &Open { codec: Codec::F16, ..open.clone() })),
        ("open of the last stage", message(Kind::Open, 0, &to_last(Grammar::Regex("a|b".into())))),
        ("open for a JSON object", message(Kind::Open, 0, &to_last(Grammar::JsonObject))),
        ("open for a JSON schema", message(Kind::Open, 0, &to_last(Grammar::JsonSchema("{}".into())))),
        ("open for a grammar", message(Kind::Open, 0, &to_last(Grammar::Lark("start: \"a\"".into())))),
        ("opened", message(Kind::Opened, 0, &Opened { cached_tokens: 300, kept_tokens: 5 })),
        ("not opened, busy", message(Kind::NotOpened, 0, &NotOpened::Busy { retry_ms: 250 })),
        ("not opened, bad", message(Kind::NotOpened, 0, &NotOpened::Bad("too long".into()))),
        ("close", bare(header(Kind::Close, 0))),
        ("close and forget", bare(header(Kind::Close, FLAG_FORGET))),
        ("close and hold", bare(header(Kind::Close, FLAG_HOLD))),
        ("sessions", message(Kind::Sessions, 0, &Sessions { open: vec![1, 300, u64::MAX] })),
        ("route to the driver", message(Kind::Route, 0, &Route::default())),
        ("route", message(Kind::Route, 0, &Route { next: Some(to), ..Route::default() })),
        ("route of a standby", message(Kind::Route, 0, &Route { next: None, standby: Some(to), is_standby: true })),
        ("route lost", message(Kind::RouteLost, FLAG_NEVER_TAKEN, &to)),
        ("tokens", Frame::tokens(rows(Kind::Tokens, FLAG_PREFILL), &[1, -1])),
        ("guesses", Frame::tokens(rows(Kind::Tokens, FLAG_WANT_OUTPUT | FLAG_GUESS), &[7, 8])),
        ("next", Frame { header: Header { rows: 1, ..rows(Kind::Next, FLAG_WANT_OUTPUT) }, payload: Vec::new() }),
        ("hidden states in f32", hidden(Codec::F32)),
        ("hidden states in f16", hidden(Codec::F16)),
        ("hidden states in q8", hidden(Codec::Q8)),
        ("repeat", bare(Header { rows: 64, ..rows(Kind::Repeat, 0) })),
        ("rewind", bare(header(Kind::Rewind, 0))),
        ("sampled", message(Kind::Sampled, 0, &Step { sampled: vec![likely, plain], ..step.clone() })),
        ("done", message(Kind::Done, 0, &step)),
        ("done and handed on", message(Kind::Done, FLAG_HANDED_ON, &step)),
        ("step failed", Frame::text(header(Kind::StepFailed, 0), "no memory")),
    ]
}

/// What is in a frame.
fn meaning(frame: &Frame) -> String {
    fn of<'a, T: serde::Deserialize<'a> + Debug>(frame: &'a Frame) -> String {
        format!("{:?}", frame.decode::<T>().unwrap())
    }
    let payload = match frame.header.kind {
        Kind::Loaded => of::<Loaded>(frame),
        Kind::Open => of::<Open>(frame),
        Kind::Opened => of::<Opened>(frame),
        Kind::NotOpened => of::<NotOpened>(frame),
        Kind::Sessions => of::<Sessions>(frame),
        Kind::Route => of::<Route>(frame),
        Kind::RouteLost => of::<RouteTo>(frame),
        Kind::Sampled | Kind::Done => of::<Step>(frame),
        Kind::LoadFailed | Kind::StepFailed => format!("{:?}", frame.as_text()),
        Kind::Progress => format!("{:?}", f32::from_le_bytes(frame.payload.as_slice().try_into().unwrap())),
        Kind::Tokens => format!("{:?}", frame.token_rows().unwrap()),
        Kind::Hidden => format!("{:?} {:?}", frame.token_rows().unwrap(), frame.hidden_rows(WIDTH).unwrap()),
        _ => format!("{:?}", frame.payload),
    };
    format!("{:?} {payload}", frame.header)
}

#[test]
fn the_encoding_of_every_frame_between_nodes_is_what_it_was() {
    let mut vectors = String::new();
    for (name, frame) in frames() {
        let mut bytes = Vec::new();
        frame.append_to(&mut bytes).unwrap();
        add(&mut vectors, name, &format_args!("{}", meaning(&frame)), &bytes);
    }
    is_what_it_was(PATH, &vectors);
}

#[test]
fn a_frame_that_was_written_down_is_read_as_what_it_meant() {
    let text = std::fs::read_to_string(PATH).unwrap();
    for (name, lines) in entries(&text) {
        let (meant, bytes) = read_bytes(&lines);
        let frame = Frame::read_from(&mut bytes.as_slice()).unwrap().unwrap();
        assert_eq!(meaning(&frame), meant, "{name}");
    }
    assert_eq!(entries(&text).count(), frames().len());
}

#[test]
fn every_kind_of_frame_that_goes_between_nodes_is_written_down() {
    let frames = frames();
    for &kind in Kind::ALL {
        let is_there = frames.iter().any(|(_, frame)| frame.header.kind == kind);
        assert_eq!(is_there, goes_between_nodes(kind), "{kind:?}");
    }
}
