//! The driver against modelled stages that die: whatever is lost when, and whatever is kept, answers are the same, and who
//! lives computes nothing twice.

use std::collections::HashMap;

use murmur_protocol::sampling::Sampled;
use proptest::prelude::*;

use super::*;

/// What the model says after these tokens: never the token that ends.
fn token_after(tokens: &[Token]) -> Token {
    1 + tokens.iter().fold(7, |sum, token| (sum * 31 + token) % 900)
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
    prompt_tokens: usize,
    tokens: Vec<Token>,
    /// First position that is kept.
    kept_from: usize,
}

/// A stage that remembers what it was given, and chooses tokens by that.
#[derive(Default)]
struct Stage {
    is_last: bool,
    exact: bool,
    keep: usize,
    sessions: HashMap<u64, Held>,
    /// From the driver, from the stage before, and to the driver: three ways, each of its own speed.
    ways: [VecDeque<Frame>; 3],
    computed: u64,
}

impl Stage {
    fn take(&mut self, frame: &Frame) -> Vec<Frame> {
        let header = frame.header;
        let id = header.session;
        match header.kind {
            Kind::Open => {
                let open: Open = frame.decode().unwrap();
                let held = self.sessions.entry(id).or_default();
                (held.epoch, held.prompt_tokens) = (header.epoch, open.prompt.len());
                assert!([open.prompt, open.generated].concat().starts_with(&held.tokens));
                let kept = if self.is_last { 0 } else { held.tokens.len() - held.kept_from };
                let opened = Opened { cached_tokens: held.tokens.len() as u32, kept_tokens: kept as u32 };
                return vec![Frame::message(Header { kind: Kind::Opened, ..header }, &opened).unwrap()];
            }
            Kind::Close if header.has(FLAG_HOLD) => {
                self.sessions.entry(id).and_modify(|held| held.epoch = header.epoch);
                return vec![];
            }
            Kind::Close => {
                self.sessions.remove(&id);
                return vec![];
            }
            _ => {}
        }
        let Some(held) = self.sessions.get_mut(&id).filter(|held| held.epoch == header.epoch) else { return vec![] };
        let (start, end) = (header.position as usize, (header.position + header.rows) as usize);
        assert!(start < end && start <= held.tokens.len(), "rows are missing before these");
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
        let step = Step { sampled: None, compute_us: 1, batch_rows: header.rows, threads: 1 };
        let answer = |kind, flags, step| Frame::message(Header { kind, flags, ..header }, step).unwrap();
        if !self.is_last && header.stages != 1 {
            let onward = Header { kind: Kind::Hidden, stages: header.stages.saturating_sub(1), ..header };
            let account = answer(Kind::Done, header.flags | FLAG_HANDED_ON, &step);
            return vec![account, Frame { header: onward, payload: frame.payload.clone() }];
        }
        if self.is_last && header.has(FLAG_WANT_OUTPUT) {
            let sampled =
                Sampled { token: token_after(&held.tokens), logprob: None, top: vec![], grammar_ended: false };
            return vec![answer(Kind::Sampled, header.flags, &Step { sampled: Some(sampled), ..step })];
        }
        vec![answer(Kind::Done, header.flags, &step)]
    }
}

struct Ring {
    driver: Driver,
    stages: Vec<Stage>,
    is_up: Vec<bool>,
}

impl Ring {
    fn new(stages: usize, exact: bool, keep: usize) -> Ring {
        let options = DriverOptions {
            stages,
            parallel: 3,
            chunk_rows: CHUNK_ROWS as u32,
            exact,
            queue_max: 8,
            end_of_generation: vec![0],
            vocabulary: 1000,
            is_shared: false,
            codecs: Vec::new(),
        };
        let mut driver = Driver::new(options);
        (0..stages).for_each(|stage| driver.on_ready(stage));
        let stage = |at| Stage { is_last: at + 1 == stages, exact, keep, ..Stage::default() };
        Ring { driver, stages: (0..stages).map(stage).collect(), is_up: vec![true; stages] }
    }

    /// Something happens somewhere.
    fn step(&mut self, dice: &mut Dice) {
        for (to, frame) in self.driver.take_output() {
            self.stages[to].ways[0].push_back(frame);
        }
        self.driver.deliver();
        let (at, way) = (dice.below(self.stages.len()), dice.below(3));
        let Some(frame) = self.stages[at].ways[way].pop_front() else { return };
        if way == 2 {
            return self.driver.on_frame(at, frame);
        }
        for answer in self.stages[at].take(&frame) {
            match answer.header.kind {
                Kind::Hidden if !self.is_up[at + 1] => {}
                Kind::Hidden => self.stages[at + 1].ways[1].push_back(answer),
                _ => self.stages[at].ways[2].push_back(answer),
            }
        }
    }

    fn kill(&mut self, at: usize) {
        let Stage { is_last, exact, keep, computed, .. } = self.stages[at];
        self.stages[at] = Stage { is_last, exact, keep, computed, ..Stage::default() };
        self.is_up[at] = false;
        self.driver.on_lost(at);
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
        keep in prop_oneof![3 => Just(usize::MAX), 1 => 0usize..12],
    ) {
        const TOKENS: u32 = 6;
        let (mut dice, mut ring) = (Dice(seed), Ring::new(stages, exact, keep));
        let sampling = SamplingParams::default();
        let mut readers = Vec::new();
        for (salt, length) in (0..).zip(&prompts) {
            let prompt: Vec<Token> = (0..*length as i32).map(|at| 1 + at + 20 * salt).collect();
            let mut whole = prompt.clone();
            (0..TOKENS).for_each(|_| whole.push(token_after(&whole)));
            let request = SessionRequest { prompt, generated: vec![], max_tokens: TOKENS, sampling: sampling.clone() };
            readers.push((whole.split_off(*length), ring.driver.start(request).unwrap().1, Vec::new()));
        }
        let (mut left, mut died) = (deaths, vec![0; stages]);
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
            if let Some(at) = (0..stages).find(|&at| !ring.is_up[at] && dice.below(30) == 0) {
                ring.comes_back(at);
            }
            for (_, events, tokens) in &mut readers {
                while let Ok(event) = events.try_recv() {
                    match event {
                        SessionEvent::Token(sampled) => tokens.push(sampled.token),
                        SessionEvent::Failed(reason) => prop_assert!(false, "{reason}"),
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
        for at in (0..stages).filter(|&at| died[at] == 0 && keep == usize::MAX) {
            let again = if at + 1 == stages { (deaths * prompts.len() * CHUNK_ROWS) as u64 } else { 0 };
            let computed = ring.stages[at].computed;
            prop_assert!((once..=once + again).contains(&computed), "stage {at}: {computed} rows of {once}");
        }
    }
}
