use murmur_protocol::{
    sampling::{Sampled, SamplingParams},
    stage::Open,
};

use super::{
    session::{DEATHS_MAX, SUSPECT_DEATHS},
    *,
};

fn driver(stages: usize) -> Driver {
    driver_of(stages, false)
}

fn driver_of(stages: usize, is_shared: bool) -> Driver {
    let mut driver = Driver::new(DriverOptions {
        stages,
        parallel: 4,
        chunk_rows: 4,
        exact: false,
        queue_max: 8,
        end_of_generation: vec![0],
        vocabulary: 1000,
        is_shared,
        codecs: Vec::new(),
        draft: Draft::Off,
        travel_us: 0,
    });
    (0..stages).for_each(|stage| driver.on_ready(stage));
    driver
}

fn holds(cached_tokens: u32) -> Opened {
    Opened { cached_tokens, kept_tokens: 0 }
}

fn request() -> SessionRequest {
    SessionRequest { prompt: (1..=10).collect(), generated: vec![], max_tokens: 3, sampling: SamplingParams::default() }
}

fn sent(driver: &mut Driver) -> Vec<(usize, Kind, u64, u32, u32)> {
    let frames = driver.take_output().into_iter();
    frames.map(|(to, f)| (to, f.header.kind, f.header.session, f.header.epoch, f.header.position)).collect()
}

/// What a session is told next.
fn heard(driver: &mut Driver, events: &mut mpsc::Receiver<SessionEvent>) -> Option<SessionEvent> {
    driver.deliver();
    events.try_recv().ok()
}

fn answer<T: serde::Serialize>(driver: &mut Driver, stage: usize, kind: Kind, at: (u64, u32), message: &T) {
    let mut header = Header::new(kind, at.0);
    header.epoch = at.1;
    driver.on_frame(stage, Frame::message(header, message).unwrap());
}

#[test]
fn room_made_while_a_busy_answer_was_on_its_way_is_not_forgotten() {
    let mut driver = driver(1);
    let (first, _events) = driver.start(request()).unwrap();
    answer(&mut driver, 0, Kind::Opened, (first, 0), &holds(0));
    let (second, _events) = driver.start(request()).unwrap();
    driver.cancel(first);
    sent(&mut driver);
    // The stage said this before it heard of the cancel.
    answer(&mut driver, 0, Kind::NotOpened, (second, 0), &NotOpened::Busy { retry_ms: 1 });
    assert!(sent(&mut driver).contains(&(0, Kind::Open, second, 1, 0)));
}

#[test]
fn a_stage_that_other_drivers_have_filled_is_asked_again() {
    let mut driver = driver_of(2, true);
    let (id, mut events) = driver.start(request()).unwrap();
    answer(&mut driver, 0, Kind::Opened, (id, 0), &holds(0));
    answer(&mut driver, 1, Kind::NotOpened, (id, 0), &NotOpened::Busy { retry_ms: 1 });
    sent(&mut driver);
    assert_eq!(heard(&mut driver, &mut events), None);
    driver.retry();
    assert_eq!(sent(&mut driver), [(0, Kind::Open, id, 1, 0), (1, Kind::Open, id, 1, 0)]);
}

#[test]
fn sessions_that_wait_are_sent_away_and_those_that_run_stay() {
    let mut driver = driver_of(1, true);
    let (runs, mut hears) = driver.start(request()).unwrap();
    answer(&mut driver, 0, Kind::Opened, (runs, 0), &holds(0));
    let (opening, mut first) = driver.start(request()).unwrap();
    let (full, mut second) = driver.start(request()).unwrap();
    answer(&mut driver, 0, Kind::NotOpened, (full, 0), &NotOpened::Busy { retry_ms: 1 });
    sent(&mut driver);
    driver.send_waiting_away("elsewhere");
    assert!(sent(&mut driver).contains(&(0, Kind::Close, opening, 0, 0)));
    for events in [&mut first, &mut second] {
        assert_eq!(heard(&mut driver, events), Some(SessionEvent::Lost("elsewhere".into())));
    }
    assert_eq!((heard(&mut driver, &mut hears), driver.running(), driver.queued()), (None, 1, 0));
}

#[test]
fn a_token_that_does_not_exist_ends_the_session_and_says_so() {
    let mut driver = driver(1);
    let (id, mut events) = driver.start(request()).unwrap();
    answer(&mut driver, 0, Kind::Opened, (id, 0), &holds(0));
    for token in [1000, -1] {
        let sampled = vec![Sampled { token, logprob: None, top: vec![], grammar_ended: false }];
        let step = Step { sampled, compute_us: 1, batch_rows: 1, threads: 1 };
        answer(&mut driver, 0, Kind::Sampled, (id, 0), &step);
    }
    let Some(SessionEvent::Failed(reason)) = heard(&mut driver, &mut events) else { panic!("it goes on") };
    assert!(reason.contains("token 1000"), "{reason}");
}

#[test]
fn accounts_of_rows_that_go_on_to_the_next_stage_are_noted_and_no_more() {
    let mut driver = driver(2);
    let (id, mut events) = driver.start(request()).unwrap();
    (0..2).for_each(|stage| answer(&mut driver, stage, Kind::Opened, (id, 0), &holds(0)));
    sent(&mut driver);
    let step = Step { sampled: Vec::new(), compute_us: 9, batch_rows: 4, threads: 1 };
    let mut header = Header::new(Kind::Done, id);
    header.rows = 1;
    header.flags = FLAG_HANDED_ON | FLAG_PREFILL | FLAG_WANT_OUTPUT;
    driver.on_frame(0, Frame::message(header, &step).unwrap());
    assert_eq!(driver.counters().token_compute_us, 0);
    // Of a token, all stages count.
    header.flags = FLAG_HANDED_ON | FLAG_WANT_OUTPUT;
    driver.on_frame(0, Frame::message(header, &step).unwrap());
    assert_eq!(driver.counters().token_compute_us, 9);
    assert_eq!(driver.accounts()[0].last_step, Some(step));
    assert_eq!(driver.accounts()[1], Account::default());
    assert_eq!((sent(&mut driver), heard(&mut driver, &mut events)), (vec![], None));
}

#[test]
fn as_many_sessions_are_opened_at_once_as_can_run_and_the_next_when_one_ends() {
    let mut driver = driver(1);
    let sessions: Vec<_> = (0..6).map(|_| driver.start(request()).unwrap()).collect();
    let ids: Vec<u64> = sessions.iter().map(|(id, _)| *id).collect();
    let opened: Vec<_> = sent(&mut driver).into_iter().map(|frame| (frame.1, frame.2)).collect();
    assert_eq!(opened, ids[..4].iter().map(|&id| (Kind::Open, id)).collect::<Vec<_>>());
    driver.cancel(ids[1]);
    assert_eq!(sent(&mut driver)[1..], [(0, Kind::Open, ids[4], 0, 0)]);
}

#[test]
fn the_ring_starts_where_every_stage_has_the_prefix() {
    let mut driver = driver(2);
    let (id, _events) = driver.start(request()).unwrap();
    sent(&mut driver);
    answer(&mut driver, 0, Kind::Opened, (id, 0), &holds(9));
    assert!(sent(&mut driver).is_empty());
    answer(&mut driver, 1, Kind::Opened, (id, 0), &holds(5));
    // Rows 5..8 end at the chunk boundary, 8..10 are the rest.
    assert_eq!(sent(&mut driver), [(0, Kind::Tokens, id, 0, 5), (0, Kind::Tokens, id, 0, 8)]);
}

#[test]
fn a_whole_model_is_asked_for_one_token_more_before_it_has_answered_and_never_for_too_many() {
    let mut driver = driver(1);
    let (id, _events) = driver.start(request()).unwrap();
    sent(&mut driver);
    answer(&mut driver, 0, Kind::Opened, (id, 0), &holds(9));
    assert_eq!(sent(&mut driver), [(0, Kind::Tokens, id, 0, 9), (0, Kind::Next, id, 0, 10)]);
    gets_a_token(&mut driver, id);
    assert_eq!(sent(&mut driver), [(0, Kind::Next, id, 0, 11)]);
    // Three tokens were asked for.
    gets_a_token(&mut driver, id);
    assert!(sent(&mut driver).is_empty());
    gets_a_token(&mut driver, id);
    assert_eq!((sent(&mut driver), driver.running()), (vec![(0, Kind::Close, id, 0, 0)], 0));
}

#[test]
fn an_answer_begun_elsewhere_is_opened_with_what_it_has_and_reports_its_cached_prompt() {
    let mut driver = driver(1);
    let (id, mut events) = driver.start(SessionRequest { generated: vec![11, 12], ..request() }).unwrap();
    let (_, frame) = driver.take_output().remove(0);
    let open: Open = frame.decode().unwrap();
    assert_eq!((open.prompt.len(), open.generated, open.reserve_cells), (10, vec![11, 12], 13));
    answer(&mut driver, 0, Kind::Opened, (id, 0), &holds(8));
    assert_eq!(driver.counters().cached_tokens, 8);
    gets_a_token(&mut driver, id);
    // Two of three were there.
    assert!(matches!(heard(&mut driver, &mut events), Some(SessionEvent::Token(_))));
    assert_eq!(heard(&mut driver, &mut events), Some(SessionEvent::Ended(Ending::Length)));
    assert_eq!((driver.counters().generated_tokens, driver.running()), (1, 0));
}

#[test]
fn an_answer_that_had_ended_elsewhere_ends_without_another_token() {
    let mut driver = driver(1);
    let ended = SessionRequest { generated: vec![11, 0], ..request() };
    let (id, mut events) = driver.start(ended.clone()).unwrap();
    assert_eq!(heard(&mut driver, &mut events), Some(SessionEvent::Ended(Ending::EndOfText)));
    assert!(heard(&mut driver, &mut events).is_none() && sent(&mut driver).is_empty());
    driver.cancel(id);
    let on = SamplingParams { ignore_eos: true, ..SamplingParams::default() };
    let (id, _events) = driver.start(SessionRequest { sampling: on, ..ended }).unwrap();
    assert_eq!(sent(&mut driver), [(0, Kind::Open, id, 0, 0)]);
}

#[test]
fn a_lost_stage_opens_every_session_anew_and_old_answers_are_ignored() {
    let mut driver = driver(2);
    let (id, mut events) = driver.start(request()).unwrap();
    for stage in 0..2 {
        answer(&mut driver, stage, Kind::Opened, (id, 0), &holds(0));
    }
    driver.on_lost(1);
    sent(&mut driver);
    let stale = Step { sampled: Vec::new(), compute_us: 1, batch_rows: 1, threads: 1 };
    answer(&mut driver, 1, Kind::Done, (id, 0), &stale);
    assert!(sent(&mut driver).is_empty() && heard(&mut driver, &mut events).is_none());
    driver.on_ready(1);
    let opened: Vec<_> = sent(&mut driver);
    assert_eq!(opened, [(0, Kind::Open, id, 1, 0), (1, Kind::Open, id, 1, 0)]);
}

/// Opens what the driver wants opened; the ids, in order.
fn open_all(driver: &mut Driver) -> Vec<u64> {
    let mut opened = Vec::new();
    loop {
        let mut frames = driver.take_output();
        frames.retain(|(_, frame)| frame.header.kind == Kind::Open);
        if frames.is_empty() {
            return opened;
        }
        for (_, open) in frames {
            let at = (open.header.session, open.header.epoch);
            opened.push(at.0);
            answer(driver, 0, Kind::Opened, at, &holds(0));
        }
    }
}

fn epoch(driver: &Driver, id: u64) -> u32 {
    driver.sessions[&id].epoch
}

/// Answers what a session has in flight up to the last row that is known; that gives a token.
fn gets_a_token(driver: &mut Driver, id: u64) {
    let at = (id, epoch(driver, id));
    let step = Step { sampled: Vec::new(), compute_us: 1, batch_rows: 1, threads: 1 };
    let session = &driver.sessions[&id];
    let Phase::Running { in_flight, next, .. } = session.phase else { panic!("{id} does not run") };
    let asked_beforehand = usize::from(next as usize > session.tokens.len());
    for _ in 1..in_flight - asked_beforehand {
        answer(driver, 0, Kind::Done, at, &step);
    }
    let sampled = Sampled { token: 5, logprob: None, top: vec![], grammar_ended: false };
    answer(driver, 0, Kind::Sampled, at, &Step { sampled: vec![sampled], ..step });
}

fn dies(driver: &mut Driver) {
    driver.on_lost(0);
    driver.on_ready(0);
}

#[test]
fn no_request_is_charged_with_machines_that_cannot_be_reached() {
    let mut driver = driver(1);
    let (id, mut events) = driver.start(request()).unwrap();
    for _ in 0..=DEATHS_MAX {
        assert_eq!(open_all(&mut driver), [id]);
        assert!(!driver.on_unreachable(0));
        driver.on_ready(0);
    }
    assert!(!driver.sessions[&id].is_suspect() && heard(&mut driver, &mut events).is_none());
}

#[test]
fn a_request_that_kills_its_stage_is_given_up_and_takes_no_other_with_it() {
    let mut driver = driver(1);
    let mut sessions: Vec<_> = (0..4).map(|_| driver.start(request()).unwrap()).collect();
    let ids: Vec<u64> = sessions.iter().map(|(id, _)| *id).collect();
    let poisonous = ids[1];
    let mut deaths = 0;
    // Whenever the poisonous one is computed, the stage dies, and with it the turn of all that run.
    for _ in 0..100 {
        if open_all(&mut driver).is_empty() && driver.queued() == 0 {
            break;
        }
        let running: Vec<u64> = ids
            .iter()
            .copied()
            .filter(|id| matches!(driver.sessions.get(id).map(|s| &s.phase), Some(Phase::Running { .. })))
            .collect();
        if running.contains(&poisonous) {
            deaths += 1;
            assert_eq!(driver.on_lost(0), deaths > SUSPECT_DEATHS, "only the last is explained");
            driver.on_ready(0);
        } else {
            running.into_iter().for_each(|id| gets_a_token(&mut driver, id));
        }
    }
    assert_eq!(deaths, SUSPECT_DEATHS + 1, "two in company and one alone");
    while driver.running() > 0 {
        let next = *driver.sessions.keys().next().unwrap();
        gets_a_token(&mut driver, next);
        open_all(&mut driver);
    }
    for (id, events) in &mut sessions {
        let heard: Vec<_> = std::iter::from_fn(|| heard(&mut driver, events)).collect();
        let tokens = heard.iter().filter(|event| matches!(event, SessionEvent::Token(_))).count();
        match heard.last().unwrap() {
            SessionEvent::Failed(_) => assert_eq!((*id, tokens), (poisonous, 0)),
            last => assert_eq!((tokens, last), (3, &SessionEvent::Ended(Ending::Length))),
        }
    }
}

#[test]
fn a_session_that_is_not_being_computed_is_charged_with_nothing() {
    let mut driver = driver(1);
    let (waiting, mut events) = driver.start(request()).unwrap();
    open_all(&mut driver);
    gets_a_token(&mut driver, waiting);
    // Its reader sleeps, so no row of it is in flight.
    let Some(session) = driver.sessions.get_mut(&waiting) else { panic!() };
    session.phase = Phase::Running { feeding: 0, next: 11, in_flight: 0, prefill: false };
    for _ in 0..DEATHS_MAX {
        dies(&mut driver);
        open_all(&mut driver);
        let Some(session) = driver.sessions.get_mut(&waiting) else { panic!("given up") };
        assert!(!session.is_suspect());
        session.phase = Phase::Running { feeding: 0, next: 11, in_flight: 0, prefill: false };
    }
    assert!(matches!(heard(&mut driver, &mut events), Some(SessionEvent::Token(_))));
    assert!(heard(&mut driver, &mut events).is_none());
}

#[test]
fn a_session_under_which_stages_die_without_end_is_given_up_although_it_gets_tokens() {
    let mut driver = driver(1);
    let (id, mut events) = driver.start(SessionRequest { max_tokens: 1000, ..request() }).unwrap();
    for _ in 0..=DEATHS_MAX {
        open_all(&mut driver);
        gets_a_token(&mut driver, id);
        assert!(matches!(heard(&mut driver, &mut events), Some(SessionEvent::Token(_))));
        dies(&mut driver);
    }
    assert!(matches!(heard(&mut driver, &mut events), Some(SessionEvent::Failed(_))));
}

#[test]
fn a_suspect_whose_reader_sleeps_lets_the_others_go_on() {
    let mut driver = driver(1);
    let (suspect, _events) = driver.start(SessionRequest { max_tokens: 100, ..request() }).unwrap();
    for _ in 0..SUSPECT_DEATHS {
        open_all(&mut driver);
        dies(&mut driver);
    }
    let events = driver.sessions[&suspect].events.clone();
    while events.capacity() >= EVENTS_MARGIN {
        events.try_send(SessionEvent::Prefill { done_tokens: 0, cached_tokens: 0 }).unwrap();
    }
    let (other, _events) = driver.start(request()).unwrap();
    assert_eq!(open_all(&mut driver), [suspect]);
    let step = Step { sampled: Vec::new(), compute_us: 1, batch_rows: 1, threads: 1 };
    let at = (suspect, epoch(&driver, suspect));
    answer(&mut driver, 0, Kind::Done, at, &step);
    answer(&mut driver, 0, Kind::Done, at, &step);
    assert_eq!(open_all(&mut driver), [other]);
}

#[test]
fn while_a_stage_cannot_be_had_sessions_fail_with_the_reason_and_afterwards_begin_again() {
    let mut driver = driver(2);
    let (_, mut events) = driver.start(request()).unwrap();
    driver.on_lost(1);
    driver.on_unavailable(1, "no such file");
    assert_eq!(heard(&mut driver, &mut events), Some(SessionEvent::Lost("no such file".into())));
    assert_eq!(driver.start(request()).err(), Some(NotStarted::Unavailable("no such file".into())));
    driver.on_ready(1);
    assert!(driver.start(request()).is_ok());
    driver.stop("good night");
    driver.on_ready(1);
    assert_eq!(driver.start(request()).err(), Some(NotStarted::Unavailable("good night".into())));
}

#[test]
fn a_frame_that_cannot_be_sent_ends_its_session_with_a_reason() {
    let mut driver = driver(1);
    let (id, mut events) = driver.start(request()).unwrap();
    driver.on_unsendable(id, "too large");
    assert!(
        matches!(heard(&mut driver, &mut events), Some(SessionEvent::Failed(reason)) if reason.contains("too large"))
    );
    assert_eq!(driver.queued() + driver.running(), 0);
}

#[test]
fn rows_lost_between_two_stages_go_once_more_and_nobody_is_charged_for_it() {
    let mut driver = driver(2);
    let (id, mut events) = driver.start(request()).unwrap();
    for epoch in 0..2 * DEATHS_MAX {
        (0..2).for_each(|stage| answer(&mut driver, stage, Kind::Opened, (id, epoch), &holds(0)));
        sent(&mut driver);
        driver.on_frame(0, Frame { header: Header::new(Kind::RouteLost, 0), payload: vec![] });
        let frames = sent(&mut driver);
        assert_eq!(frames[..2], [0, 1].map(|stage| (stage, Kind::Close, id, epoch + 1, 0)));
        assert_eq!(frames[2..], [0, 1].map(|stage| (stage, Kind::Open, id, epoch + 1, 0)));
    }
    assert_eq!(heard(&mut driver, &mut events), None);
}

#[test]
fn who_has_stood_by_for_a_lost_stage_is_told_which_sessions_there_are() {
    let mut driver = driver_of(2, true);
    let sessions: Vec<_> = (0..3).map(|_| driver.start(request()).unwrap()).collect();
    driver.on_lost(1);
    driver.cancel(sessions[1].0);
    sent(&mut driver);
    driver.on_ready(1);
    let (to, frame) = driver.take_output().swap_remove(0);
    assert_eq!((to, frame.header.kind), (1, Kind::Sessions));
    assert_eq!(frame.decode::<Sessions>().unwrap().open, [sessions[0].0, sessions[2].0]);
}

#[test]
fn a_row_that_others_have_held_up_says_nothing_about_the_way_around_the_ring() {
    let mut driver = driver(2);
    let (id, _events) = driver.start(SessionRequest { prompt: vec![1, 2], max_tokens: 20, ..request() }).unwrap();
    (0..2).for_each(|stage| answer(&mut driver, stage, Kind::Opened, (id, 0), &holds(0)));
    let mut now_us = 0;
    let mut travel_after = |computed_together: [u32; 2]| {
        let length = driver.sessions[&id].tokens.len() as u32;
        let header =
            Header { position: length - 1, rows: 1, flags: FLAG_WANT_OUTPUT, ..Header::new(Kind::Sampled, id) };
        let step = |stage: usize| Step {
            sampled: Vec::new(),
            compute_us: 1000,
            batch_rows: computed_together[stage],
            threads: 1,
        };
        now_us += 50_000;
        driver.at(now_us);
        let account = Header { kind: Kind::Done, flags: header.flags | FLAG_HANDED_ON, ..header };
        driver.on_frame(0, Frame::message(account, &step(0)).unwrap());
        let sampled = Sampled { token: 5, logprob: None, top: vec![], grammar_ended: false };
        driver.on_frame(1, Frame::message(header, &Step { sampled: vec![sampled], ..step(1) }).unwrap());
        driver.travel_us()
    };
    // The first row says what computing takes.
    assert_eq!([[1, 1], [4, 1], [1, 4]].map(&mut travel_after), [0, 0, 0]);
    assert_eq!(travel_after([1, 1]), 4_800);
    assert_eq!(travel_after([1, 1]), 9_120);
}

#[test]
fn a_step_that_fails_after_a_wrong_guess_is_tried_once_without_and_guesses_are_blamed_when_its_rows_are_computed() {
    let mut driver = driver(1);
    driver.options.draft = Draft::Lookup;
    let (id, mut events) = driver.start(SessionRequest { max_tokens: 5, ..request() }).unwrap();
    open_all(&mut driver);
    gets_a_token(&mut driver, id);
    let guesses = |driver: &mut Driver, right: bool| {
        let guesses = &mut driver.sessions.get_mut(&id).unwrap().guesses;
        guesses.add(7, draft::Guesser::Lookup);
        let _ = guesses.compare(if right { 7 } else { 8 });
    };
    let fails = |driver: &mut Driver, position: u32, rows: u32| {
        let header = Header { epoch: epoch(driver, id), position, rows, ..Header::new(Kind::StepFailed, id) };
        driver.on_frame(0, Frame::text(header, "no memory"));
    };
    guesses(&mut driver, true);
    guesses(&mut driver, false);
    fails(&mut driver, 10, 2);
    assert_eq!(open_all(&mut driver), [id]);
    gets_a_token(&mut driver, id);
    assert_eq!(driver.options.draft, Draft::Lookup, "of two rows one was computed");
    gets_a_token(&mut driver, id);
    assert_eq!(driver.options.draft, Draft::Off);
    // Nothing is guessed any more, so no guess is why.
    fails(&mut driver, 12, 1);
    let heard: Vec<_> = std::iter::from_fn(|| heard(&mut driver, &mut events)).collect();
    assert!(matches!(heard.last(), Some(SessionEvent::Failed(reason)) if reason == "no memory"), "{heard:?}");

    // What was guessed before is told of an answer that ends.
    driver.options.draft = Draft::Lookup;
    let (id, mut events) = driver.start(request()).unwrap();
    open_all(&mut driver);
    gets_a_token(&mut driver, id);
    let guesses = &mut driver.sessions.get_mut(&id).unwrap().guesses;
    guesses.add(7, draft::Guesser::Lookup);
    let _ = guesses.compare(8);
    driver.on_frame(0, Frame::text(Header { position: 10, rows: 1, ..Header::new(Kind::StepFailed, id) }, "no memory"));
    open_all(&mut driver);
    (0..2).for_each(|_| gets_a_token(&mut driver, id));
    let heard: Vec<_> = std::iter::from_fn(|| self::heard(&mut driver, &mut events)).collect();
    assert!(heard.contains(&SessionEvent::Guesses { right: 0, wrong: 1 }), "{heard:?}");
}
