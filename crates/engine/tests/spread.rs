//! Stages that several drivers share, each found by whoever carries the frames: the text is that of one engine.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

mod common;

use std::{
    sync::{Arc, atomic::Ordering, mpsc},
    thread,
};

use common::{spread::Spread, *};
use futures::future::join_all;
use murmur_engine::{Connection, Engine, EngineError, Guest, Host, HostError, RemoteStage, Stop};
use murmur_gguf::{LayerRange, synth::Weights};
use murmur_protocol::{
    codec::Codec,
    frame::{Frame, Header, Kind},
    stage::{Open, Opened, Sessions},
};

#[tokio::test(flavor = "multi_thread")]
async fn two_drivers_that_share_stages_each_get_the_text_of_an_engine_that_has_all() {
    let lab = Lab::new();
    // One takes hidden states in its batch, the other has them written over its embeddings.
    for preset in ["llama", "gemma3"] {
        let model = lab.tiny(preset, Weights::Q8_0);
        let whole = lab.engine(&model, vec![LayerRange::new(0, layers(&model))], true);
        let stages = if layers(&model) >= 4 { 4 } else { 2 };
        let spread = Spread::new(&lab, &model, stages);
        let drivers = [spread.engine(), spread.engine()];
        let asked = |n: i32| match n % 2 {
            0 => request(prompt(150, n), 24, greedy()),
            _ => request(prompt(70, n), 24, sampled(7)),
        };
        let answers = join_all((0..8).map(|n| run(&drivers[n as usize % 2], asked(n)))).await;
        for (n, answer) in (0..).zip(answers) {
            assert_eq!(answer.logprob_bits, run(&whole, asked(n)).await.logprob_bits, "{preset}, request {n}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn drivers_that_want_more_than_the_stages_hold_wait_for_each_other() {
    let lab = Lab::new();
    let model = lab.tiny("llama", Weights::Q8_0);
    let spread = Spread::new(&lab, &model, 2);
    let drivers = [spread.engine(), spread.engine()];
    // Each driver may run eight at once, and the stages hold eight in all.
    let asked = (0..24).map(|n| run(&drivers[n as usize % 2], request(prompt(20, n), 16, sampled(n as u64))));
    assert!(join_all(asked).await.iter().all(|answer| answer.tokens.len() == 16));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stage_that_dies_is_found_elsewhere_and_no_token_changes() {
    let lab = Lab::new();
    let model = lab.tiny("llama", Weights::Q8_0);
    let whole = lab.engine(&model, vec![LayerRange::new(0, layers(&model))], true);
    let spread = Spread::new(&lab, &model, 2);
    let driver = spread.engine();
    for stage in 0..2 {
        let asked = || request(prompt(100, stage), 200, sampled(5));
        let dies = |tokens| {
            if tokens == 5 {
                kill(spread.holders[stage as usize].host().process_id().unwrap());
            }
        };
        let answer = read_while(driver.start(asked()).unwrap(), dies).await.unwrap();
        assert_eq!(answer.logprob_bits, run(&whole, asked()).await.logprob_bits);
        assert_eq!(driver.status().stages[stage as usize].restarts, 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn hosts_beside_a_dead_one_compute_nothing_twice_for_any_of_their_drivers() {
    const TOKENS: u32 = 40;
    let lab = Lab::new();
    let model = lab.tiny("llama", Weights::Q8_0);
    let whole = lab.engine(&model, vec![LayerRange::new(0, layers(&model))], true);
    // Nothing comes back to these drivers but accounts and tokens.
    for victim in 0..3 {
        let spread = Spread::new(&lab, &model, 3);
        let drivers = [spread.engine_with(true), spread.engine_with(true)];
        let asked = |n: i32| request(prompt(30 + 40 * n as usize, n), TOKENS, sampled(n as u64));
        let mut streams: Vec<_> = (0..6).map(|n| drivers[n as usize % 2].start(asked(n)).unwrap()).collect();
        let watched = streams.pop().unwrap();
        let others = join_all(streams.into_iter().map(read));
        let last = read_while(watched, |tokens| {
            if tokens == 5 {
                kill(spread.holders[victim].host().process_id().unwrap());
            }
        });
        let (others, last) = tokio::join!(others, last);
        let answers: Vec<_> = others.into_iter().chain([last]).map(|answer| answer.unwrap().tokens).collect();
        for (n, answer) in (0..).zip(answers) {
            assert_eq!(answer, run(&whole, asked(n)).await.tokens, "{victim} dies, request {n}");
        }
        for (which, driver) in drivers.iter().enumerate() {
            let sessions = (0..6).filter(|n| n % 2 == which);
            let once: u64 = sessions.map(|n| 30 + 40 * n as u64 + u64::from(TOKENS) - 1).sum();
            for (at, stage) in driver.status().stages.iter().enumerate().filter(|(at, _)| *at != victim) {
                // Tokens that were on their way to the driver are chosen again.
                let again = if at == 2 { 3 } else { 0 };
                let rows = stage.computed_rows;
                assert!((once..=once + again).contains(&rows), "{victim} dies, stage {at}: {rows} of {once}");
            }
        }
    }
}

/// Has a prompt of many chunks read until as many as may be under way have been computed by the first of three stages, and wait for
/// the second: on their way to it, or at it if it `hangs` for a moment. Then the client leaves, and another one comes. Rows that each
/// stage has computed for those that came before it, and for both.
fn rows_when_a_client_leaves(lab: &Lab, hangs: bool) -> ([u64; 3], [u64; 3]) {
    let model = lab.tiny("llama", Weights::Q8_0);
    let spread = Spread::new(lab, &model, 3);
    let driver = spread.engine_with(true);
    let rows = || [0, 1, 2].map(|stage: usize| spread.holders[stage].host().computed_rows());
    let second = &spread.holders[1];
    second.is_cut_off.store(true, Ordering::Relaxed);
    let leaves = driver.start(request(prompt(7 * CHUNK_ROWS as usize, 1), 8, greedy())).unwrap();
    let in_flight = 4 * u64::from(CHUNK_ROWS);
    until("the first stage has computed what may be under way", || (rows()[0] == in_flight).then_some(()));
    if hangs {
        stop_process(second.host().process_id().unwrap());
        second.is_cut_off.store(false, Ordering::Relaxed);
        until("they have arrived", || (second.arrived(Kind::Hidden) == 4).then_some(()));
    }
    let before = rows();
    drop(leaves);
    until("the second stage is told", || (second.arrived(Kind::Close) == 1).then_some(()));
    second.is_cut_off.store(false, Ordering::Relaxed);
    if hangs {
        continue_process(second.host().process_id().unwrap());
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    assert_eq!(runtime.block_on(run(&driver, request(prompt(20, 2), 8, greedy()))).tokens.len(), 8);
    (before, rows())
}

#[test]
fn what_waits_for_a_stage_or_is_on_its_way_there_is_not_computed_when_the_client_has_left() {
    let lab = Lab::new();
    // Those of the other client: the last of its tokens is in no batch.
    let others = 20 + 8 - 1;
    let chunk = u64::from(CHUNK_ROWS);
    // One that has hung may have begun before all that waits for it has come out of the socket.
    for (hangs, begun) in [(false, 0), (true, chunk)] {
        let (before, after) = rows_when_a_client_leaves(&lab, hangs);
        assert_eq!(before, [4 * chunk, 0, 0], "hangs: {hangs}");
        let [first, second, third] = after.map(|rows| rows - others);
        assert!(second <= begun, "hangs: {hangs}, {second} rows");
        assert_eq!([first, third], [4 * chunk, 0], "hangs: {hangs}");
    }
}

/// A driver that is spoken to directly.
fn enter(host: &Host) -> (Guest, mpsc::Receiver<Frame>) {
    let (answers, answered) = mpsc::channel();
    (host.enter(move |frame| drop(answers.send(frame))), answered)
}

fn open(session: u64) -> Frame {
    let open = Open { prompt: prompt(10, 1), generated: vec![], reserve_cells: 512, sampling: None, codec: Codec::F32 };
    Frame::message(Header::new(Kind::Open, session), &open).unwrap()
}

#[test]
fn a_driver_says_what_drivers_say_and_nothing_else() {
    let lab = Lab::new();
    let model = lab.tiny("llama", Weights::F32);
    let host = Spread::new(&lab, &model, 2).holders[0].host();
    let (guest, answered) = enter(&host);
    for &kind in Kind::ALL {
        let refused = guest.send(Frame { header: Header::new(kind, 1), payload: vec![] }).is_err();
        use Kind::{Close, Hidden, Next, Open, Repeat, Rewind, Sessions, Tokens};
        let is_a_drivers = matches!(kind, Open | Close | Tokens | Hidden | Next | Repeat | Rewind | Sessions);
        assert_eq!(refused, !is_a_drivers, "{kind:?}");
    }
    assert_eq!(
        guest.send(Frame { header: Header::new(Kind::Load, 0), payload: vec![] }),
        Err(HostError::Kind(Kind::Load))
    );
    // What it said before was nonsense, and the stage is there all the same.
    guest.send(open(2)).unwrap();
    let opened = answered.iter().find(|frame| frame.header.kind == Kind::Opened).unwrap();
    assert_eq!(opened.header.session, 2);
}

#[test]
fn a_driver_that_leaves_makes_room_and_hears_nothing_of_the_others() {
    let lab = Lab::new();
    let model = lab.tiny("llama", Weights::F32);
    let host = Spread::new(&lab, &model, 2).holders[0].host();
    let (first, heard) = enter(&host);
    let (second, answered) = enter(&host);
    // As many as the stage holds, all with the numbers that the other uses, too.
    (0..8).for_each(|session| first.send(open(session)).unwrap());
    assert!(heard.iter().take(8).all(|frame| frame.header.kind == Kind::Opened));
    second.send(open(3)).unwrap();
    assert_eq!(answered.recv().unwrap().header.kind, Kind::NotOpened);
    drop(first);
    second.send(open(3)).unwrap();
    let frame = answered.recv().unwrap();
    assert_eq!((frame.header.kind, frame.header.session), (Kind::Opened, 3));
    assert!(frame.decode::<Opened>().is_ok() && heard.try_recv().is_err());
    assert_eq!(host.guests(), 1);
}

#[test]
fn hidden_states_that_come_before_their_session_is_opened_wait_for_that() {
    let lab = Lab::new();
    let model = lab.tiny("llama", Weights::F32);
    let host = Spread::new(&lab, &model, 4).holders[1].host();
    let (guest, answered) = enter(&host);
    let rows = |epoch, position| {
        let header = Header { epoch, position, rows: 2, ..Header::new(Kind::Hidden, 1) };
        Frame { header, payload: vec![0; 2 * 4 * (1 + host.loaded().n_embd as usize)] }
    };
    for position in [0, 2] {
        guest.send(rows(1, position)).unwrap();
    }
    // Of an epoch that is over when its word comes.
    guest.send(rows(0, 0)).unwrap();
    guest.send(Frame { header: Header { epoch: 1, ..Header::new(Kind::Open, 1) }, ..open(1) }).unwrap();
    let heard: Vec<_> = answered.iter().take(5).map(|frame| (frame.header.kind, frame.header.position)).collect();
    assert_eq!(heard[0], (Kind::Opened, 0));
    assert_eq!(heard[1..], [(Kind::Done, 0), (Kind::Hidden, 0), (Kind::Done, 2), (Kind::Hidden, 2)]);
}

#[test]
fn sessions_that_a_driver_does_not_have_any_more_make_room() {
    let lab = Lab::new();
    let model = lab.tiny("llama", Weights::F32);
    let host = Spread::new(&lab, &model, 2).holders[0].host();
    let (guest, answered) = enter(&host);
    // As many as the stage holds.
    (0..8).for_each(|session| guest.send(open(session)).unwrap());
    assert!(answered.iter().take(8).all(|frame| frame.header.kind == Kind::Opened));
    let some = Frame::message(Header::new(Kind::Sessions, 0), &Sessions { open: vec![2, 3, 100] }).unwrap();
    guest.send(some).unwrap();
    (10..16).for_each(|session| guest.send(open(session)).unwrap());
    assert!(answered.iter().take(6).all(|frame| frame.header.kind == Kind::Opened));
    guest.send(open(16)).unwrap();
    assert_eq!(answered.recv().unwrap().header.kind, Kind::NotOpened);
}

/// A stage that nobody ever finds.
struct Nowhere(mpsc::Sender<()>);

impl RemoteStage for Nowhere {
    fn connect(&self, stop: &Stop) -> Result<Connection, String> {
        self.0.send(()).unwrap();
        while !stop.is_stopped() {
            thread::yield_now();
        }
        Err("it is not wanted any more".to_owned())
    }

    fn lost_because(&self) -> String {
        String::new()
    }
}

#[test]
fn an_engine_that_still_looks_for_its_stages_can_be_stopped() {
    let lab = Lab::new();
    let model = lab.tiny("llama", Weights::Q8_0);
    let options = lab.options(&model, vec![LayerRange::new(0, layers(&model))], true);
    let (stop, (looks, looking)) = (Stop::new(), mpsc::channel());
    let loading = thread::spawn({
        let stop = stop.clone();
        move || Engine::load_spread(options, &[Some(Arc::new(Nowhere(looks)))], stop, |_, _| {}).err()
    });
    looking.recv().unwrap();
    stop.stop();
    assert!(matches!(loading.join().unwrap(), Some(EngineError::Stopped)));
}
