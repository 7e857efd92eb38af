//! A request's way through peers that are slow, silent, dead, or wrong.

mod common;

use std::collections::BTreeSet;

use common::node;
use murmur_core::{
    health::Verdict,
    request::{
        Action, AttemptId, DEATHS_MAX, Event, Offer, RequestError, RequestLimits, Session, State, WAIT_MS_MAX,
        attempt::{FIRST_TOKEN_SLACK_MS, PROBE_AGAIN_MS, PROBE_MS, STALL_MS_MIN, SUSPECT_MS_MIN},
    },
    time::Now,
};
use murmur_protocol::{
    mesh::{FailureCode, FinishReason, NodeId, Refused},
    sampling::{Sampled, Token},
};
use proptest::prelude::*;

const T0: Now = Now::from_ms(5_000);
const TOKENS_MAX: u32 = 100;

/// The token that any peer generates in a place: seed and position decide.
fn truth(place: u32) -> Token {
    (place as Token).wrapping_mul(7_919) % 1_000
}

fn sampled(token: Token) -> Sampled {
    Sampled { token, logprob: None, top: Vec::new(), grammar_ended: false }
}

fn tokens(attempt: u32, places: std::ops::Range<u32>) -> Event {
    let first_sequence = places.start;
    Event::Tokens { attempt: AttemptId(attempt), first_sequence, tokens: places.map(truth).map(sampled).collect() }
}

fn offers(numbers: impl IntoIterator<Item = u32>) -> Event {
    let offer = |number| Offer { peer: node(number), first_token_ms: 200.0, step_ms: 20.0 };
    Event::Peers { offers: numbers.into_iter().map(offer).collect(), retry_at: None }
}

fn admitted(attempt: u32) -> Event {
    Event::Admitted { attempt: AttemptId(attempt), cached_tokens: 0 }
}

fn gone(attempt: u32) -> Event {
    Event::Gone { attempt: AttemptId(attempt) }
}

fn refused(attempt: u32, because: Refused) -> Event {
    Event::Refused { attempt: AttemptId(attempt), because }
}

fn finished(attempt: u32, reason: FinishReason) -> Event {
    Event::Finished { attempt: AttemptId(attempt), reason }
}

/// A session with its clock, and what it has said so far.
struct Driven {
    session: Session,
    now: Now,
    timer: Option<Now>,
    said: Vec<Action>,
}

impl Driven {
    fn new() -> Self {
        let (session, said) = Session::new(RequestLimits { tokens_max: TOKENS_MAX, generated: Vec::new() }, T0);
        Driven { session, now: T0, timer: None, said }
    }

    /// Opened at peer 1 as attempt 0.
    fn opened() -> Self {
        let mut driven = Driven::new();
        driven.tell(offers([1, 2, 3]));
        driven
    }

    /// Opened at peer 1 as attempt 0, with ten tokens that came 20 ms after each other.
    fn streaming() -> Self {
        let mut driven = Driven::opened();
        driven.tell(admitted(0));
        for place in 0..10 {
            driven.after(20, tokens(0, place..place + 1));
        }
        driven.said.clear();
        driven
    }

    fn tell(&mut self, event: Event) -> Vec<Action> {
        let actions = self.session.handle(event, self.now);
        for action in &actions {
            if let Action::SetTimer(at) = action {
                self.timer = Some(*at);
            }
        }
        self.said.extend(actions.clone());
        actions
    }

    fn after(&mut self, ms: u64, event: Event) -> Vec<Action> {
        self.now = self.now.plus_ms(ms);
        self.tell(event)
    }

    fn emitted(&self) -> Vec<Token> {
        let emitted = self.said.iter().filter_map(|action| match action {
            Action::Emit(sampled) => Some(sampled.token),
            _ => None,
        });
        emitted.collect()
    }

    /// Lets time pass, timer by timer, until `done` or a minute has gone by.
    fn wait(&mut self, mut done: impl FnMut(&[Action]) -> bool) {
        let end = self.now.plus_ms(60_000);
        while !done(&self.said) && self.now < end {
            self.now = self.timer.unwrap_or(end).max(self.now.plus_ms(1));
            self.tell(Event::Timer);
        }
    }
}

fn says(actions: &[Action], wanted: &Action) -> bool {
    actions.contains(wanted)
}

fn opens(attempt: u32, number: u32) -> Action {
    Action::Open { attempt: AttemptId(attempt), peer: node(number) }
}

fn cancels(attempt: u32, number: u32) -> Action {
    Action::Cancel { attempt: AttemptId(attempt), peer: node(number) }
}

fn reports(number: u32, verdict: Verdict) -> Action {
    Action::Report { peer: node(number), verdict }
}

fn asks_for_peers(actions: &[Action]) -> bool {
    actions.iter().any(|action| matches!(action, Action::FindPeers { .. }))
}

#[test]
fn a_request_without_trouble_goes_to_the_best_peer_and_finishes() {
    let mut driven = Driven::new();
    assert!(asks_for_peers(&driven.said));
    assert!(says(&driven.tell(offers([1, 2])), &opens(0, 1)));
    driven.tell(admitted(0));
    driven.after(150, tokens(0, 0..3));
    assert_eq!(driven.session.state(), State::Streaming);
    let last = driven.after(20, finished(0, FinishReason::EndOfText));
    assert!(says(&last, &reports(1, Verdict::Ok)));
    assert_eq!(last.last(), Some(&Action::Finish(FinishReason::EndOfText)));
    assert_eq!(driven.emitted(), [truth(0), truth(1), truth(2)]);
    assert!(driven.tell(tokens(0, 3..4)).is_empty(), "nothing counts after the end");
}

#[test]
fn a_late_first_token_opens_the_request_a_second_time_and_the_first_token_of_either_wins() {
    for winner in [0, 1] {
        let mut driven = Driven::opened();
        driven.tell(admitted(0));
        driven.wait(asks_for_peers_again);
        assert_eq!(driven.now, T0.plus_ms(2 * 200 + FIRST_TOKEN_SLACK_MS));
        driven.tell(Event::Alive { peer: node(1) });
        assert!(says(&driven.tell(offers([1, 2])), &opens(1, 2)));
        assert_eq!(driven.session.state(), State::Hedged);
        driven.tell(admitted(1));
        let actions = driven.after(10, tokens(winner, 0..1));
        assert!(says(&actions, &cancels(1 - winner, 2 - winner)), "{actions:?}");
        driven.after(10, tokens(1 - winner, 0..5));
        driven.after(10, tokens(winner, 1..2));
        assert_eq!(driven.emitted(), [truth(0), truth(1)]);
        assert_eq!(driven.session.state(), State::Streaming);
    }
}

fn asks_for_peers_again(said: &[Action]) -> bool {
    said.iter().filter(|action| matches!(action, Action::FindPeers { .. })).count() > 1
}

#[test]
fn a_peer_that_dies_in_mid_stream_is_followed_by_another_with_the_tokens_so_far() {
    let mut driven = Driven::streaming();
    let actions = driven.tell(gone(0));
    assert!(says(&actions, &reports(1, Verdict::Gone)));
    let excluded = actions.iter().find_map(|action| match action {
        Action::FindPeers { excluded } => Some(excluded.clone()),
        _ => None,
    });
    assert_eq!(excluded, Some(vec![node(1)]));
    assert_eq!(driven.session.state(), State::Resuming);
    assert!(says(&driven.tell(offers([1, 2])), &opens(1, 2)));
    assert_eq!(driven.session.generated().len(), 10);
    driven.after(100, tokens(1, 10..12));
    assert_eq!(driven.emitted(), [truth(10), truth(11)]);
}

#[test]
fn a_machine_that_is_switched_off_in_mid_stream_costs_less_than_a_second() {
    let mut driven = Driven::streaming();
    let silent_since = driven.now;
    driven.wait(asks_for_peers);
    assert_eq!(driven.now.since_ms(silent_since), SUSPECT_MS_MIN);
    assert!(driven.said.contains(&Action::Probe { peer: node(1) }));
    assert!(says(&driven.tell(offers([2])), &opens(1, 2)));
    driven.wait(|said| says(said, &reports(1, Verdict::Gone)));
    assert_eq!(driven.now.since_ms(silent_since), SUSPECT_MS_MIN + PROBE_MS);
    assert!(driven.said.contains(&cancels(0, 1)));
    driven.after(50, tokens(1, 10..11));
    assert_eq!(driven.emitted(), [truth(10)]);
}

#[test]
fn a_peer_that_is_slow_but_alive_is_not_given_up_while_nobody_else_can_take_the_request() {
    let mut driven = Driven::streaming();
    let end = driven.now.plus_ms(STALL_MS_MIN - PROBE_AGAIN_MS);
    while driven.now < end {
        driven.wait(asks_for_peers);
        assert!(driven.said.iter().all(|action| !matches!(action, Action::Report { .. })));
        driven.said.clear();
        driven.tell(Event::Alive { peer: node(1) });
        driven.tell(offers([]));
    }
    driven.tell(tokens(0, 10..11));
    assert_eq!(driven.emitted(), [truth(10)]);
}

#[test]
fn a_peer_that_shows_signs_of_life_and_no_tokens_is_given_up_in_the_end() {
    let mut driven = Driven::streaming();
    let began = driven.now;
    while !says(&driven.said, &reports(1, Verdict::Gone)) {
        driven.after(100, Event::Alive { peer: node(1) });
        if asks_for_peers(&driven.said) {
            driven.tell(offers([]));
        }
        assert!(driven.now.since_ms(began) < 30_000);
    }
}

#[test]
fn a_client_that_does_not_read_is_no_fault_of_the_peer() {
    let mut driven = Driven::streaming();
    driven.tell(Event::ReaderFull);
    for _ in 0..100 {
        assert!(driven.after(1_000, Event::Timer).is_empty());
    }
    driven.tell(Event::ReaderReady);
    driven.after(20, tokens(0, 10..11));
    assert_eq!((driven.emitted(), driven.session.state()), (vec![truth(10)], State::Streaming));
}

#[test]
fn duplicates_are_dropped_and_gaps_and_contradictions_end_the_attempt() {
    let mut driven = Driven::streaming();
    driven.tell(tokens(0, 5..12));
    assert_eq!(driven.emitted(), [truth(10), truth(11)]);
    for broken in [
        tokens(0, 13..14),
        Event::Tokens { attempt: AttemptId(0), first_sequence: 3, tokens: vec![sampled(truth(3) + 1)] },
        Event::Tokens { attempt: AttemptId(0), first_sequence: u32::MAX, tokens: vec![sampled(0), sampled(0)] },
    ] {
        let mut driven = Driven::streaming();
        let actions = driven.tell(broken);
        assert!(says(&actions, &cancels(0, 1)) && says(&actions, &reports(1, Verdict::Gone)));
        assert!(asks_for_peers(&actions) && driven.emitted().is_empty());
    }
}

#[test]
fn more_tokens_than_asked_for_and_an_early_end_for_length_break_the_protocol() {
    let mut driven = Driven::streaming();
    assert!(says(&driven.tell(finished(0, FinishReason::Length)), &reports(1, Verdict::Gone)));
    let mut driven = Driven::streaming();
    let actions = driven.tell(tokens(0, 10..TOKENS_MAX + 5));
    assert_eq!(driven.emitted().len(), TOKENS_MAX as usize - 10);
    // All that was asked for is there, whatever becomes of the peer.
    assert_eq!(actions.last(), Some(&Action::Finish(FinishReason::Length)));
}

#[test]
fn an_answer_whose_last_token_is_there_is_complete_though_its_peer_dies_before_it_says_so() {
    let mut driven = Driven::streaming();
    driven.tell(tokens(0, 10..TOKENS_MAX));
    assert_eq!(driven.session.state(), State::Streaming);
    assert_eq!(driven.tell(gone(0)).last(), Some(&Action::Finish(FinishReason::Length)));
    let mut driven = Driven::streaming();
    let last = Sampled { grammar_ended: true, ..sampled(truth(10)) };
    driven.tell(Event::Tokens { attempt: AttemptId(0), first_sequence: 10, tokens: vec![last] });
    driven.wait(|said| says(said, &Action::Finish(FinishReason::EndOfText)));
    assert_eq!(driven.session.state(), State::Ended);
}

#[test]
fn busy_everywhere_waits_for_the_earliest_retry_and_not_for_ever() {
    let mut driven = Driven::opened();
    let actions = driven.tell(refused(0, Refused::Busy { retry_ms: 120 }));
    assert!(says(&actions, &reports(1, Verdict::Busy { retry_ms: 120 })) && asks_for_peers(&actions));
    let actions = driven.tell(offers([]));
    assert!(says(&actions, &Action::SetTimer(driven.now.plus_ms(120))), "{actions:?}");
    assert_eq!(driven.session.state(), State::Waiting);
    assert!(says(&driven.after(120, Event::Timer), &Action::FindPeers { excluded: Vec::new() }));
    let began = driven.now;
    for attempt in 1.. {
        let actions = driven.tell(offers([1]));
        if let Some(Action::Fail(why)) = actions.last() {
            assert!(matches!(why, RequestError::Busy { .. }), "{why}");
            break;
        }
        if says(&actions, &opens(attempt, 1)) {
            driven.tell(refused(attempt, Refused::Busy { retry_ms: 1_000 }));
            driven.tell(offers([]));
        }
        driven.after(1_000, Event::Timer);
        if driven.session.state() == State::Ended {
            break;
        }
        assert!(driven.now.since_ms(began) <= WAIT_MS_MAX + 5_000);
    }
    assert!(driven.said.iter().any(|action| matches!(action, Action::Fail(RequestError::Busy { .. }))));
}

#[test]
fn a_request_that_is_wrong_fails_with_the_reason() {
    let wrong = || Refused::BadRequest { reason: "no such token".to_owned() };
    let mut driven = Driven::opened();
    driven.tell(refused(0, wrong()));
    assert!(says(&driven.tell(offers([2])), &opens(1, 2)), "one peer is not believed while another can be asked");
    let last = driven.tell(refused(1, wrong()));
    assert_eq!(last.last(), Some(&Action::Fail(RequestError::BadRequest("no such token".to_owned()))));
    let mut driven = Driven::opened();
    driven.tell(refused(0, wrong()));
    assert!(matches!(driven.tell(offers([])).last(), Some(Action::Fail(RequestError::BadRequest(_)))));
}

#[test]
fn a_model_that_nobody_serves_is_said_at_once() {
    let mut driven = Driven::new();
    assert_eq!(driven.tell(offers([])), [Action::Fail(RequestError::NoPeer)]);
    let mut driven = Driven::opened();
    driven.tell(refused(0, Refused::NotServed { reason: String::new() }));
    assert_eq!(driven.tell(offers([])).last(), Some(&Action::Fail(RequestError::NoPeer)));
}

#[test]
fn a_stream_whose_last_peer_is_gone_waits_and_then_fails_and_never_looks_finished() {
    let mut driven = Driven::streaming();
    driven.tell(gone(0));
    let began = driven.now;
    while driven.session.state() != State::Ended {
        driven.tell(offers([]));
        driven.after(250, Event::Timer);
    }
    assert!((WAIT_MS_MAX..WAIT_MS_MAX + 1_000).contains(&driven.now.since_ms(began)));
    assert!(matches!(driven.said.last(), Some(Action::Fail(RequestError::Lost { .. }))));
}

#[test]
fn a_stream_survives_ten_seconds_without_any_network() {
    let mut driven = Driven::streaming();
    driven.tell(gone(0));
    let mut attempt = 0;
    for _ in 0..20 {
        // The tables still list the peers, and no connection can be opened.
        let opened = driven.tell(offers([1, 2, 3])).iter().any(|action| matches!(action, Action::Open { .. }));
        if opened {
            attempt += 1;
            driven.after(5, gone(attempt));
        }
        driven.after(500, Event::Timer);
    }
    assert!(!asks_for_peers(&driven.said[..1]));
    let actions = driven.tell(offers([1, 2, 3]));
    let opened = actions.iter().any(|action| matches!(action, Action::Open { .. }));
    if !opened {
        driven.after(1_000, Event::Timer);
        driven.tell(offers([1, 2, 3]));
    }
    let last = driven.said.iter().rev().find_map(|action| match action {
        Action::Open { attempt, .. } => Some(attempt.0),
        _ => None,
    });
    driven.tell(tokens(last.unwrap(), 10..11));
    assert_eq!(driven.emitted(), [truth(10)]);
}

#[test]
fn a_request_that_kills_its_peers_is_given_up() {
    let mut driven = Driven::streaming();
    driven.tell(gone(0));
    for attempt in 1..DEATHS_MAX {
        driven.tell(offers([attempt + 1]));
        driven.tell(admitted(attempt));
        driven.after(10, gone(attempt));
    }
    let deaths = DEATHS_MAX;
    assert_eq!(driven.said.last(), Some(&Action::Fail(RequestError::Deadly { deaths })));
}

#[test]
fn a_worker_that_leaves_in_good_order_is_not_blamed() {
    let mut driven = Driven::streaming();
    let actions = driven.tell(Event::Failed { attempt: AttemptId(0), code: FailureCode::Leaving });
    assert!(asks_for_peers(&actions) && !actions.iter().any(|action| matches!(action, Action::Report { .. })));
    let mut driven = Driven::streaming();
    let actions = driven.tell(Event::Failed { attempt: AttemptId(0), code: FailureCode::Engine });
    assert!(says(&actions, &reports(1, Verdict::Gone)));
}

#[test]
fn an_answer_that_was_left_unread_for_too_long_goes_on_at_the_same_peer_and_blames_nobody() {
    let mut driven = Driven::streaming();
    driven.tell(Event::ReaderFull);
    let mut said = driven.after(60_000, Event::ReaderReady);
    said.extend(driven.tell(Event::Failed { attempt: AttemptId(0), code: FailureCode::LeaseExpired }));
    assert!(said.iter().all(|action| !matches!(action, Action::Report { .. })), "{said:?}");
    driven.tell(offers([]));
    driven.wait(asks_for_peers_again);
    assert!(says(&driven.tell(offers([1])), &opens(1, 1)));
    assert_eq!(driven.session.generated().len(), 10);
    driven.after(100, tokens(1, 10..12));
    assert_eq!(driven.emitted(), [truth(10), truth(11)]);
}

#[test]
fn a_client_that_leaves_cancels_everything() {
    let mut driven = Driven::streaming();
    driven.wait(asks_for_peers);
    driven.tell(offers([2]));
    let actions = driven.tell(Event::ClientGone);
    assert_eq!(actions, [cancels(0, 1), cancels(1, 2)]);
    assert!(driven.tell(tokens(0, 10..11)).is_empty());
}

#[test]
fn speeds_are_measured_from_what_came() {
    let mut driven = Driven::streaming();
    let actions = driven.tell(finished(0, FinishReason::EndOfText));
    let measured = actions.iter().find_map(|action| match action {
        Action::Measured { measured, .. } => Some(*measured),
        _ => None,
    });
    let measured = measured.unwrap();
    assert_eq!((measured.prefill_ms, measured.decode_ms_per_token), (Some(20.0), Some(20.0)));
}

/// Anything that may come, from peers that are honest about tokens and about nothing else.
#[derive(Debug, Clone)]
enum Blow {
    Peers(Vec<u32>),
    Admitted(u32),
    Refused(u32, u8),
    Progress(u32),
    Tokens(u32, i64, u32),
    Finished(u32, bool),
    Failed(u32, bool),
    Gone(u32),
    Alive(u32),
    Reader(bool),
    Timer,
}

fn blows() -> impl Strategy<Value = Vec<(u64, Blow)>> {
    let recent = 0..3_u32;
    let blow = prop_oneof![
        4 => prop::collection::vec(0..6_u32, 0..4).prop_map(Blow::Peers),
        2 => recent.clone().prop_map(Blow::Admitted),
        1 => (recent.clone(), 0..4_u8).prop_map(|(attempt, why)| Blow::Refused(attempt, why)),
        1 => recent.clone().prop_map(Blow::Progress),
        8 => (recent.clone(), -6..=2_i64, 1..8_u32).prop_map(|(attempt, back, count)| Blow::Tokens(attempt, back, count)),
        1 => (recent.clone(), any::<bool>()).prop_map(|(attempt, length)| Blow::Finished(attempt, length)),
        1 => (recent.clone(), any::<bool>()).prop_map(|(attempt, leaving)| Blow::Failed(attempt, leaving)),
        1 => recent.clone().prop_map(Blow::Gone),
        1 => (0..6_u32).prop_map(Blow::Alive),
        1 => any::<bool>().prop_map(Blow::Reader),
        3 => Just(Blow::Timer),
    ];
    prop::collection::vec((0..800_u64, blow), 0..150)
}

/// What an observer of all actions knows.
#[derive(Default)]
struct Observer {
    open: Vec<(AttemptId, NodeId)>,
    ever: u32,
    emitted: Vec<Token>,
    ends: Vec<Action>,
}

impl Observer {
    fn see(&mut self, actions: &[Action]) {
        for action in actions {
            assert!(self.ends.is_empty(), "{action:?} after the end");
            match action {
                Action::Open { attempt, peer } => {
                    assert!(self.open.iter().all(|(_, open)| open != peer), "twice at the same peer");
                    self.open.push((*attempt, *peer));
                    self.ever += 1;
                }
                Action::Cancel { attempt, .. } => {
                    let before = self.open.len();
                    self.open.retain(|(open, _)| open != attempt);
                    assert_eq!(self.open.len() + 1, before, "cancels what is not open");
                }
                Action::Emit(sampled) => self.emitted.push(sampled.token),
                Action::Finish(_) | Action::Fail(_) => self.ends.push(action.clone()),
                _ => {}
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_000, ..ProptestConfig::default() })]

    #[test]
    fn whatever_comes_each_token_is_emitted_once_and_in_order_and_only_a_whole_answer_is_finished(script in blows()) {
        let mut driven = Driven::new();
        let mut observer = Observer::default();
        observer.see(&driven.said.clone());
        let mut timers = BTreeSet::new();
        for (pause_ms, blow) in script {
            let recent = |back: u32| observer.ever.saturating_sub(1 + back);
            let next = i64::from(observer.emitted.len() as u32);
            let mut ended_by_peer = None;
            let event = match blow {
                Blow::Peers(numbers) => offers(numbers),
                Blow::Admitted(back) => admitted(recent(back)),
                Blow::Refused(back, why) => {
                    let reason = String::new();
                    let because = match why {
                        0 => Refused::Busy { retry_ms: 100 },
                        1 => Refused::NoMemory { reason },
                        2 => Refused::BadRequest { reason },
                        _ => Refused::NotServed { reason },
                    };
                    refused(recent(back), because)
                }
                Blow::Progress(back) => Event::Progress { attempt: AttemptId(recent(back)) },
                Blow::Tokens(back, offset, count) => {
                    let first = (next + offset).max(0) as u32;
                    tokens(recent(back), first..first + count)
                }
                Blow::Finished(back, length) => {
                    let reason = if length { FinishReason::Length } else { FinishReason::EndOfText };
                    ended_by_peer = Some((AttemptId(recent(back)), reason));
                    finished(recent(back), reason)
                }
                Blow::Failed(back, leaving) => {
                    let code = if leaving { FailureCode::Leaving } else { FailureCode::Engine };
                    Event::Failed { attempt: AttemptId(recent(back)), code }
                }
                Blow::Gone(back) => gone(recent(back)),
                Blow::Alive(number) => Event::Alive { peer: node(number) },
                Blow::Reader(full) => if full { Event::ReaderFull } else { Event::ReaderReady },
                Blow::Timer => Event::Timer,
            };
            // The shell forgets an attempt that has ended by itself, as the session does.
            let open_before = observer.open.clone();
            if let Event::Gone { attempt } | Event::Failed { attempt, .. } | Event::Refused { attempt, .. } = &event {
                observer.open.retain(|(open, _)| open != attempt);
            }
            if let Some((attempt, FinishReason::EndOfText)) = ended_by_peer {
                observer.open.retain(|(open, _)| *open != attempt);
            }
            if let Some((attempt, FinishReason::Length)) = ended_by_peer && next == i64::from(TOKENS_MAX) {
                observer.open.retain(|(open, _)| *open != attempt);
            }
            let actions = driven.after(pause_ms, event);
            observer.see(&actions);
            prop_assert!(observer.open.len() <= 2);
            let expected: Vec<Token> = (0..observer.emitted.len() as u32).map(truth).collect();
            prop_assert_eq!(&observer.emitted, &expected);
            match observer.ends.last() {
                Some(Action::Finish(FinishReason::Length)) => {
                    prop_assert_eq!(observer.emitted.len(), TOKENS_MAX as usize);
                }
                Some(Action::Finish(reason)) => {
                    let (attempt, said) = ended_by_peer.unwrap();
                    prop_assert_eq!(said, *reason);
                    prop_assert!(open_before.iter().any(|(open, _)| *open == attempt));
                }
                _ => {}
            }
            if !observer.ends.is_empty() {
                prop_assert!(observer.open.is_empty(), "left open at the end");
                break;
            }
            timers.extend(actions.iter().filter_map(|action| match action {
                Action::SetTimer(at) => Some(*at),
                _ => None,
            }));
            // It never stands still: it waits for a moment, for an answer about peers, or for the client to read.
            let looking = driven.said.iter().any(|action| matches!(action, Action::FindPeers { .. }));
            prop_assert!(looking || !timers.is_empty());
        }
    }

    #[test]
    fn a_stream_comes_to_its_end_whoever_dies_as_long_as_one_peer_is_left(
        deaths in prop::collection::vec((1..15_u32, any::<bool>()), 0..8),
    ) {
        let mut driven = Driven::new();
        let mut deaths = deaths.into_iter();
        let mut next_peer = 1;
        let mut attempt = 0;
        driven.tell(offers([next_peer]));
        'requests: loop {
            driven.tell(admitted(attempt));
            let death = deaths.next();
            let tokens_left = death.map_or(TOKENS_MAX, |(tokens, _)| tokens);
            for _ in 0..tokens_left {
                let place = driven.session.generated().len() as u32;
                if place == TOKENS_MAX {
                    driven.tell(finished(attempt, FinishReason::Length));
                    break 'requests;
                }
                driven.after(20, tokens(attempt, place..place + 1));
            }
            let mark = driven.said.len();
            if death.is_some_and(|(_, loudly)| loudly) {
                driven.tell(gone(attempt));
            } else {
                let mut silent = Driven { said: std::mem::take(&mut driven.said), ..driven };
                silent.wait(|said| asks_for_peers(&said[mark..]));
                driven = silent;
            }
            next_peer += 1;
            attempt += 1;
            driven.tell(offers([next_peer]));
        }
        prop_assert_eq!(driven.emitted(), (0..TOKENS_MAX).map(truth).collect::<Vec<_>>());
        prop_assert_eq!(driven.said.last(), Some(&Action::Finish(FinishReason::Length)));
    }
}
