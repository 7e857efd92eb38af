//! The driver against modelled stages that die, and ways between them that break: whatever is lost when, whatever is kept, and
//! whoever stands by, answers are the same, and who lives computes nothing twice.

use std::{collections::HashMap, path::PathBuf};

use murmur_protocol::{sampling::Sampled, stage::Open};
use proptest::prelude::*;

use super::*;

/// What the model says after these tokens: never the token that ends. One that repeats itself does so with errors.
fn token_after(tokens: &[Token], repeats: bool) -> Token {
    match repeats {
        false => 1 + tokens.iter().fold(7, |sum, token| (sum * 31 + token) % 900),
        true => 1 + (tokens.last().unwrap_or(&0) * 2 + tokens.len() as i32 / 9) % 5,
    }
}

/// Numbers that follow from a seed.
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % end
    }
}

const CHUNK_ROWS: usize = 4;

#[derive(Default)]
struct Held {
    epoch: u32,
    /// The newest that was begun, by `Open` or `Rewind`.
    begun: u32,
    prompt_tokens: usize,
    tokens: Vec<Token>,
    /// First position that is kept.
    kept_from: usize,
    /// The newest token that was chosen here, and where it belongs.
    newest: Option<(usize, Token)>,
}

/// A stage that remembers what it was given, and chooses tokens by that.
#[derive(Default)]
struct Stage {
    is_last: bool,
    exact: bool,
    keep: usize,
    /// Rows that came before the word that begins their epoch.
    early: VecDeque<Frame>,
    repeats: bool,
    sessions: HashMap<u64, Held>,
    /// From the driver, from the stage before, and to the driver: three ways, each of its own speed.
    ways: [VecDeque<Frame>; 3],
    computed: u64,
}

impl Stage {
    /// Rows of an epoch that begins now are next.
    fn take_early(&mut self, begins: &Header) {
        let is_of = |frame: &Frame| (frame.header.session, frame.header.epoch) == (begins.session, begins.epoch);
        let (now, early): (VecDeque<Frame>, _) = self.early.drain(..).partition(is_of);
        self.early = early;
        now.into_iter().rev().for_each(|frame| self.ways[1].push_front(frame));
    }

    fn take(&mut self, frame: &Frame) -> Vec<Frame> {
        let header = frame.header;
        let id = header.session;
        match header.kind {
            Kind::Open => {
                let open: Open = frame.decode().unwrap();
                let held = self.sessions.entry(id).or_default();
                (held.epoch, held.begun) = (header.epoch, header.epoch);
                (held.prompt_tokens, held.newest) = (open.prompt.len(), None);
                let tokens = [open.prompt, open.generated].concat();
                let common = held.tokens.iter().zip(&tokens).take_while(|(held, token)| held == token).count();
                assert!(self.repeats || common == held.tokens.len(), "only guesses are forgotten");
                held.tokens.truncate(common);
                held.kept_from = held.kept_from.min(common);
                let kept = if self.is_last { 0 } else { held.tokens.len() - held.kept_from };
                let opened = Opened { cached_tokens: held.tokens.len() as u32, kept_tokens: kept as u32 };
                self.take_early(&header);
                return vec![Frame::message(Header { kind: Kind::Opened, ..header }, &opened).unwrap()];
            }
            Kind::Close if header.has(FLAG_HOLD) => {
                self.sessions.entry(id).and_modify(|held| held.epoch = header.epoch);
                return vec![];
            }
            Kind::Rewind => {
                self.sessions.entry(id).and_modify(|held| (held.epoch, held.begun) = (header.epoch, header.epoch));
                self.take_early(&header);
                return vec![];
            }
            Kind::Close => {
                self.sessions.remove(&id);
                return vec![];
            }
            Kind::Sessions => {
                let Sessions { open } = frame.decode().unwrap();
                self.sessions.retain(|session, _| open.contains(session));
                return vec![];
            }
            _ => {}
        }
        let is_early = self.sessions.get(&id).is_none_or(|held| held.begun < header.epoch);
        if header.kind == Kind::Hidden && is_early {
            self.early.push_back(frame.clone());
            return vec![];
        }
        let Some(held) = self.sessions.get_mut(&id).filter(|held| held.epoch == header.epoch) else { return vec![] };
        let (start, end) = (header.position as usize, (header.position + header.rows) as usize);
        if start > held.tokens.len() {
            return vec![Frame::text(Header { kind: Kind::StepFailed, ..header }, "rows are missing before these")];
        }
        assert!(start < end);
        if header.kind == Kind::Repeat {
            assert!(held.kept_from <= start && end <= held.tokens.len(), "these are not kept");
            let again = Frame::tokens(header, &held.tokens[start..end]);
            return vec![Frame { header: Header { kind: Kind::Hidden, ..again.header }, ..again }];
        }
        if self.exact && start < held.prompt_tokens {
            let is_chunk = start % CHUNK_ROWS == 0 && (end % CHUNK_ROWS == 0 || end == held.prompt_tokens);
            assert!(is_chunk && header.has(FLAG_PREFILL), "prompt rows {start}..{end} of {}", held.prompt_tokens);
        }
        held.tokens.truncate(start);
        held.tokens.extend(frame.token_rows().unwrap());
        held.kept_from = held.kept_from.min(start);
        if held.tokens.len() - held.kept_from > self.keep {
            held.kept_from = held.tokens.len();
        }
        self.computed += u64::from(header.rows);
        let step = Step { sampled: Vec::new(), compute_us: 1, batch_rows: header.rows, threads: 1 };
        let answer = |kind, flags, step| Frame::message(Header { kind, flags, ..header }, step).unwrap();
        if !self.is_last && header.stages != 1 {
            let onward = Header { kind: Kind::Hidden, stages: header.stages.saturating_sub(1), ..header };
            let account = answer(Kind::Done, header.flags | FLAG_HANDED_ON, &step);
            return vec![account, Frame { header: onward, payload: frame.payload.clone() }];
        }
        if self.is_last && header.has(FLAG_WANT_OUTPUT) {
            let is_guess = header.has(FLAG_GUESS);
            let mut sampled = Vec::new();
            for row in if is_guess { start } else { end - 1 }..end {
                if is_guess && held.newest.is_some_and(|newest| newest != (row, held.tokens[row])) {
                    break;
                }
                let token = token_after(&held.tokens[..=row], self.repeats);
                held.newest = Some((row + 1, token));
                sampled.push(Sampled { token, logprob: None, top: vec![], grammar_ended: false });
            }
            return vec![answer(Kind::Sampled, header.flags, &Step { sampled, ..step })];
        }
        vec![answer(Kind::Done, header.flags, &step)]
    }
}

struct Ring {
    driver: Driver,
    /// Behind them the model that guesses, if there is one.
    stages: Vec<Stage>,
    is_up: Vec<bool>,
    /// Who stands by for each stage, if anybody does.
    standbys: Vec<Option<Stage>>,
    /// One of so many hidden states does not reach those; 0: all do.
    lost_of: usize,
    steps: u64,
}

impl Ring {
    fn new(stages: usize, exact: bool, keep: usize, standbys: bool, lost_of: usize, draft: Draft) -> Ring {
        let repeats = draft != Draft::Off;
        let places = stages + usize::from(matches!(draft, Draft::Model(_)));
        let options = DriverOptions {
            stages,
            parallel: 3,
            chunk_rows: CHUNK_ROWS as u32,
            exact,
            queue_max: 8,
            end_of_generation: vec![0],
            vocabulary: 1000,
            is_shared: true,
            codecs: Vec::new(),
            draft,
            travel_us: 1000,
        };
        let mut driver = Driver::new(options);
        (0..places).for_each(|place| driver.on_ready(place));
        let stage = |at| {
            let exact = exact && at < stages;
            Stage { is_last: at + 1 >= stages, exact, keep, repeats, ..Stage::default() }
        };
        let standby = |at| (standbys && at < stages).then(|| stage(at));
        Ring {
            driver,
            stages: (0..places).map(stage).collect(),
            is_up: vec![true; places],
            standbys: (0..places).map(standby).collect(),
            lost_of,
            steps: 0,
        }
    }

    /// Something happens somewhere.
    fn step(&mut self, dice: &mut Dice) {
        self.steps += 1;
        self.driver.at(self.steps);
        for (to, frame) in self.driver.take_output() {
            if let Some(standby) = self.standbys[to].as_mut().filter(|_| frame.header.kind != Kind::Repeat) {
                standby.ways[0].push_back(frame.clone());
            }
            self.stages[to].ways[0].push_back(frame);
        }
        self.driver.deliver();
        let (at, way) = (dice.below(self.stages.len()), dice.below(2));
        if let Some(standby) = &mut self.standbys[at]
            && let Some(frame) = standby.ways[way].pop_front()
        {
            standby.take(&frame);
        }
        let (at, way) = (dice.below(self.stages.len()), dice.below(3));
        let Some(frame) = self.stages[at].ways[way].pop_front() else { return };
        if way == 2 {
            return self.driver.on_frame(at, frame);
        }
        for answer in self.stages[at].take(&frame) {
            match answer.header.kind {
                Kind::Hidden => {
                    let is_lost = self.lost_of > 0 && dice.below(self.lost_of) == 0;
                    if let Some(standby) = self.standbys[at + 1].as_mut().filter(|_| !is_lost) {
                        standby.ways[1].push_back(answer.clone());
                    }
                    if self.is_up[at + 1] {
                        self.stages[at + 1].ways[1].push_back(answer);
                    }
                }
                _ => self.stages[at].ways[2].push_back(answer),
            }
        }
    }

    fn kill(&mut self, at: usize) {
        let Stage { is_last, exact, keep, repeats, computed, .. } = self.stages[at];
        let fresh = || Stage { is_last, exact, keep, repeats, computed, ..Stage::default() };
        self.stages[at] = self.standbys[at].take().unwrap_or_else(fresh);
        self.is_up[at] = false;
        self.driver.on_lost(at);
    }

    /// The way to a stage breaks, and is made anew.
    fn loses_rows(&mut self, to: usize) {
        self.stages[to].ways[1].clear();
        self.driver.on_rows_lost();
    }

    fn comes_back(&mut self, at: usize) {
        self.is_up[at] = true;
        self.driver.on_ready(at);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn who_dies_changes_no_token_and_who_lives_computes_nothing_twice(
        seed in any::<u64>(),
        stages in 2usize..6,
        exact in any::<bool>(),
        prompts in proptest::collection::vec(1usize..14, 1..5),
        deaths in 0usize..3,
        breaks in 0usize..3,
        standbys in any::<bool>(),
        lost_of in prop_oneof![Just(0), 2usize..30],
        keep in prop_oneof![3 => Just(usize::MAX), 1 => 0usize..12],
    ) {
        const TOKENS: u32 = 6;
        let (mut dice, mut ring) = (Dice(seed), Ring::new(stages, exact, keep, standbys, lost_of, Draft::Off));
        let sampling = SamplingParams::default();
        let mut readers = Vec::new();
        for (salt, length) in (0..).zip(&prompts) {
            let prompt: Vec<Token> = (0..*length as i32).map(|at| 1 + at + 20 * salt).collect();
            let mut whole = prompt.clone();
            (0..TOKENS).for_each(|_| whole.push(token_after(&whole, false)));
            let request = SessionRequest { prompt, generated: vec![], max_tokens: TOKENS, sampling: sampling.clone() };
            readers.push((whole.split_off(*length), ring.driver.start(request).unwrap().1, Vec::new()));
        }
        let (mut left, mut died, mut breaks_left) = (deaths, vec![0; stages], breaks);
        for round in 0.. {
            prop_assert!(round < 200_000, "it stands still");
            ring.step(&mut dice);
            if left > 0 && dice.below(150) == 0 {
                let at = dice.below(stages);
                if ring.is_up[at] {
                    ring.kill(at);
                    died[at] += 1;
                    left -= 1;
                }
            }
            if breaks_left > 0 && dice.below(150) == 0 {
                ring.loses_rows(1 + dice.below(stages - 1));
                breaks_left -= 1;
            }
            if let Some(at) = (0..stages).find(|&at| !ring.is_up[at] && dice.below(30) == 0) {
                ring.comes_back(at);
            }
            for (_, events, tokens) in &mut readers {
                while let Ok(event) = events.try_recv() {
                    match event {
                        SessionEvent::Token(sampled) => tokens.push(sampled.token),
                        SessionEvent::Failed(reason) | SessionEvent::Lost(reason) => prop_assert!(false, "{reason}"),
                        _ => {}
                    }
                }
            }
            if ring.driver.running() + ring.driver.queued() == 0 {
                break;
            }
        }
        ring.driver.deliver();
        for (expected, mut events, mut tokens) in readers {
            while let Ok(event) = events.try_recv() {
                tokens.extend(if let SessionEvent::Token(sampled) = event { Some(sampled.token) } else { None });
            }
            prop_assert_eq!(tokens, expected);
        }
        // Tokens that were on their way are chosen again, in exact mode with the rest of their chunk.
        let once: u64 = prompts.iter().map(|&length| length as u64 + u64::from(TOKENS) - 1).sum();
        for at in (0..stages).filter(|_| keep == usize::MAX) {
            let chosen_again = if at + 1 == stages { deaths + breaks } else { 0 };
            // Who steps in sends on what was queued there, to hosts that may have it and have not heard yet of the new epoch.
            let sent_again = if standbys { deaths * (stages + 1) } else { 0 };
            let again = ((chosen_again + sent_again) * prompts.len() * CHUNK_ROWS) as u64;
            let computed = ring.stages[at].computed;
            match died[at] {
                0 => prop_assert!((once..=once + again).contains(&computed), "stage {at}: {computed} rows of {once}"),
                // What is repeated after another death, for who held the stage, comes to who stood by as well, who may have it.
                1 if standbys && breaks == 0 && deaths == 1 => {
                    prop_assert!(computed <= once + again, "stage {at}, who stood by: {computed} rows of {once}");
                }
                _ => {}
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]
    #[test]
    fn guesses_right_and_wrong_change_no_token_and_neither_do_deaths_among_them(
        seed in any::<u64>(),
        stages in 2usize..5,
        exact in any::<bool>(),
        length in 1usize..14,
        deaths in 0usize..3,
        standbys in any::<bool>(),
        model in any::<bool>(),
    ) {
        const TOKENS: u32 = 60;
        let model = model.then(|| Draft::Model(DraftModel { path: PathBuf::new(), spoilt: 0.2 }));
        let draft = model.unwrap_or(Draft::Lookup);
        let (mut dice, mut ring) = (Dice(seed), Ring::new(stages, exact, usize::MAX, standbys, 0, draft));
        let places = ring.stages.len();
        let prompt: Vec<Token> = (1..=length as i32).collect();
        let mut whole = prompt.clone();
        (0..TOKENS).for_each(|_| whole.push(token_after(&whole, true)));
        let sampling = SamplingParams::default();
        let request = SessionRequest { prompt, generated: vec![], max_tokens: TOKENS, sampling };
        let (_, mut events) = ring.driver.start(request).unwrap();
        let (mut left, mut tokens, mut is_over) = (deaths, Vec::new(), false);
        for round in 0.. {
            prop_assert!(round < 200_000, "it stands still");
            ring.step(&mut dice);
            if let Some(at) = (0..places).find(|&at| !ring.is_up[at] && dice.below(30) == 0) {
                ring.comes_back(at);
            }
            if left > 0 && dice.below(200) == 0 {
                left -= 1;
                let at = dice.below(places);
                if ring.is_up[at] {
                    ring.kill(at);
                }
            }
            // A reader that is slow now and then.
            while !is_over && dice.below(4) > 0 {
                match events.try_recv() {
                    Ok(SessionEvent::Token(sampled)) => tokens.push(sampled.token),
                    Ok(SessionEvent::Failed(reason) | SessionEvent::Lost(reason)) => prop_assert!(false, "{reason}"),
                    Ok(SessionEvent::Ended(_)) => is_over = true,
                    Ok(_) => {}
                    Err(_) => break,
                }
            }
            if is_over {
                break;
            }
            ring.driver.resume(1);
        }
        prop_assert_eq!(tokens, whole.split_off(length));
        let Counters { guessed_tokens, right_tokens, .. } = *ring.driver.counters();
        prop_assert!(right_tokens > 0 && right_tokens < guessed_tokens, "{right_tokens} of {guessed_tokens}");
    }
}
