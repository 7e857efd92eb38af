//! What a model on another machine that guesses is told.

use std::sync::Arc;

use murmur_protocol::sampling::{Sampled, SamplingParams};

use super::*;
use crate::{Connection, Stop, link::RemoteStage};

/// Whoever guesses, its frames are looked at here.
struct Nowhere;

impl RemoteStage for Nowhere {
    fn connect(&self, _: &Stop) -> Result<Connection, String> {
        Err(self.lost_because())
    }

    fn lost_because(&self) -> String {
        "nobody is there".to_owned()
    }
}

/// A driver of two stages far from each other, and the place of the model that guesses.
const STAGES: usize = 2;
const GUESSER: usize = STAGES;
const ID: u64 = 1;
const PROMPT_TOKENS: u32 = 10;

/// With a session whose first token is chosen and whose model that guesses holds all of the prompt.
fn driver() -> (Driver, mpsc::Receiver<SessionEvent>) {
    let mut driver = Driver::new(DriverOptions {
        stages: STAGES,
        parallel: 1,
        chunk_rows: 4,
        exact: false,
        queue_max: 8,
        end_of_generation: vec![0],
        vocabulary: 1000,
        is_shared: true,
        codecs: Vec::new(),
        draft: Draft::Peer(PeerDraft { stage: Arc::new(Nowhere), spoilt: 0.0 }),
        travel_us: 60_000,
    });
    (0..=GUESSER).for_each(|stage| driver.on_ready(stage));
    let prompt = (1..=PROMPT_TOKENS as i32).collect();
    let request = SessionRequest { prompt, generated: vec![], max_tokens: 100, sampling: SamplingParams::default() };
    let (id, events) = driver.start(request).unwrap();
    assert_eq!(id, ID);
    (0..STAGES).for_each(|stage| opened(&mut driver, stage, PROMPT_TOKENS - 1));
    chosen(&mut driver, 0, PROMPT_TOKENS - 1, 500);
    opened(&mut driver, GUESSER, PROMPT_TOKENS);
    (driver, events)
}

fn opened(driver: &mut Driver, stage: usize, cached_tokens: u32) {
    driver.on_frame(stage, opening_answer(0, cached_tokens));
}

fn opening_answer(epoch: u32, cached_tokens: u32) -> Frame {
    let opened = Opened { cached_tokens, kept_tokens: 0 };
    Frame::message(Header { epoch, ..Header::new(Kind::Opened, ID) }, &opened).unwrap()
}

fn step(token: Option<Token>) -> Step {
    let sampled = token.map(|token| Sampled { token, logprob: None, top: vec![], grammar_ended: false });
    Step { sampled: sampled.into_iter().collect(), compute_us: 1000, batch_rows: 1, threads: 1 }
}

fn header(kind: Kind, epoch: u32, position: u32) -> Header {
    Header { epoch, position, rows: 1, flags: FLAG_WANT_OUTPUT, ..Header::new(kind, ID) }
}

/// The ring has chosen what follows the row at this position.
fn chosen(driver: &mut Driver, epoch: u32, position: u32, token: Token) {
    let account = Header { flags: FLAG_WANT_OUTPUT | FLAG_HANDED_ON, ..header(Kind::Done, epoch, position) };
    driver.on_frame(0, Frame::message(account, &step(None)).unwrap());
    driver.on_frame(1, Frame::message(header(Kind::Sampled, epoch, position), &step(Some(token))).unwrap());
}

/// The model that guesses says what may follow the row at this position.
fn guessed(driver: &mut Driver, epoch: u32, position: u32, token: Token) {
    driver.on_frame(GUESSER, Frame::message(header(Kind::Sampled, epoch, position), &step(Some(token))).unwrap());
}

/// What somebody is told: kinds, epochs and positions. What others are told meanwhile is passed over.
fn told(driver: &mut Driver, whom: usize) -> Vec<(Kind, u32, u32)> {
    let frames = driver.take_output().into_iter().filter(|(to, _)| *to == whom);
    frames.map(|(_, frame)| (frame.header.kind, frame.header.epoch, frame.header.position)).collect()
}

#[test]
fn it_goes_on_by_itself_and_is_called_back_when_it_was_wrong() {
    let (mut driver, _events) = driver();
    assert_eq!(told(&mut driver, GUESSER)[1..], [(Kind::Tokens, 0, 10), (Kind::Next, 0, 11)]);
    guessed(&mut driver, 0, 10, 501);
    guessed(&mut driver, 0, 11, 502);
    guessed(&mut driver, 0, 12, 503);
    let rows = [(Kind::Tokens, 0, 11), (Kind::Tokens, 0, 12), (Kind::Tokens, 0, 13)];
    assert_eq!(told(&mut driver, 0), rows);
    chosen(&mut driver, 0, 10, 501);
    // It may go on, and is not told what it has said itself.
    assert!(told(&mut driver, GUESSER).iter().all(|(kind, ..)| *kind == Kind::Next));
    chosen(&mut driver, 0, 11, 600);
    let again = [(Kind::Rewind, 1, 0), (Kind::Tokens, 1, 12), (Kind::Next, 1, 13)];
    assert_eq!(told(&mut driver, GUESSER), again);
    // What it had guessed behind that is no guess any more.
    guessed(&mut driver, 0, 13, 504);
    assert!(told(&mut driver, 0).is_empty());
    guessed(&mut driver, 1, 12, 601);
    assert_eq!(told(&mut driver, 0), [(Kind::Tokens, 1, 13)]);
}

#[test]
fn where_the_ring_was_faster_it_goes_on_if_it_says_the_same_and_is_told_if_not() {
    let (mut driver, _events) = driver();
    chosen(&mut driver, 0, 10, 501);
    chosen(&mut driver, 0, 11, 502);
    told(&mut driver, GUESSER);
    guessed(&mut driver, 0, 10, 501);
    assert!(told(&mut driver, GUESSER).is_empty());
    guessed(&mut driver, 0, 11, 700);
    let again = [(Kind::Rewind, 1, 0), (Kind::Tokens, 1, 12), (Kind::Next, 1, 13)];
    assert_eq!(told(&mut driver, GUESSER), again);
}

#[test]
fn what_it_was_not_asked_for_ends_its_part_in_the_session() {
    let (mut driver, _events) = driver();
    told(&mut driver, 0);
    guessed(&mut driver, 0, 11, 502);
    guessed(&mut driver, 0, 10, 501);
    assert!(told(&mut driver, 0).is_empty());
    chosen(&mut driver, 0, 10, 501);
    assert_eq!(told(&mut driver, 0), [(Kind::Tokens, 0, 11)]);
    assert_eq!(driver.counters().guessed_tokens, 0);
}

#[test]
fn a_memory_that_takes_no_row_back_costs_the_guesses_and_not_the_request() {
    let (mut driver, mut events) = driver();
    guessed(&mut driver, 0, 10, 501);
    chosen(&mut driver, 0, 10, 600);
    told(&mut driver, 0);
    driver.on_frame(0, Frame::text(header(Kind::StepFailed, 1, 11), "it cannot forget"));
    assert_eq!(told(&mut driver, 0), [(Kind::Close, 2, 0), (Kind::Open, 2, 0)]);
    driver.deliver();
    let heard: Vec<_> = std::iter::from_fn(|| events.try_recv().ok()).collect();
    assert!(heard.iter().all(|event| matches!(event, SessionEvent::Token(_))), "{heard:?}");
    // It begins again, and nobody is asked for a guess.
    (0..STAGES).for_each(|stage| driver.on_frame(stage, opening_answer(2, 0)));
    let output = driver.take_output();
    assert!(output.iter().any(|(to, frame)| *to == 0 && frame.header.kind == Kind::Tokens), "{output:?}");
    assert!(output.iter().all(|(to, _)| *to != GUESSER), "{output:?}");
    // It may have been the request itself: then others are guessed for as before.
    assert!(driver.options.draft != Draft::Off);
    chosen(&mut driver, 2, 11, 601);
    assert!(driver.options.draft == Draft::Off);
    // Without guesses nothing is to blame but the request.
    driver.on_frame(0, Frame::text(header(Kind::StepFailed, 2, 12), "it cannot forget"));
    driver.deliver();
    let heard: Vec<_> = std::iter::from_fn(|| events.try_recv().ok()).collect();
    assert!(matches!(heard[..], [SessionEvent::Token(_), SessionEvent::Failed(_)]), "{heard:?}");
}

#[test]
fn a_machine_that_has_no_room_is_asked_again_later() {
    let (mut driver, _events) = driver();
    let busy = NotOpened::Busy { retry_ms: 500 };
    driver.on_frame(GUESSER, Frame::message(Header::new(Kind::NotOpened, ID), &busy).unwrap());
    told(&mut driver, GUESSER);
    for (at_us, position, token) in [(1_000, PROMPT_TOKENS, 501), (400_000, PROMPT_TOKENS + 1, 502)] {
        driver.at(at_us);
        chosen(&mut driver, 0, position, token);
        assert!(told(&mut driver, GUESSER).is_empty());
    }
    driver.at(500_000);
    chosen(&mut driver, 0, PROMPT_TOKENS + 2, 503);
    assert!(matches!(told(&mut driver, GUESSER)[..], [(Kind::Open, ..)]));
}
