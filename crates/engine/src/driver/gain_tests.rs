//! Whether guesses that pay are made: a driver whose stage and whose model that guesses share one machine, by a clock of its own.

use murmur_protocol::sampling::{Sampled, SamplingParams};

use super::*;

/// What is no token of any answer.
const WRONG: Token = 1;
const STAGE: usize = 0;
const STEP_US: u64 = 1000;
const FURTHER_ROW_US: u64 = 100;
const GUESS_US: u64 = 100;
const TOKENS: u32 = 2000;

/// The token for a position. Nothing is repeated that could be looked up.
fn right(position: u32) -> Token {
    (10 + position.wrapping_mul(2_654_435_761) % 900) as Token
}

/// A machine that does one thing after the other.
struct Machine {
    driver: Driver,
    now_us: u64,
    /// Of ten guesses the last is wrong.
    guesses: u32,
    answered: u32,
}

impl Machine {
    fn new(draft: Draft) -> Machine {
        let mut driver = Driver::new(DriverOptions {
            stages: 1,
            parallel: 1,
            chunk_rows: 64,
            exact: false,
            queue_max: 8,
            end_of_generation: vec![0],
            vocabulary: 1000,
            is_shared: false,
            codecs: Vec::new(),
            draft,
            travel_us: 0,
        });
        driver.on_ready(STAGE);
        driver.on_ready(driver.drafter());
        Machine { driver, now_us: 0, guesses: 0, answered: 0 }
    }

    /// How long a token takes, us.
    fn us_per_token(&mut self) -> u64 {
        let prompt = (10..20).collect();
        let request =
            SessionRequest { prompt, generated: vec![], max_tokens: TOKENS, sampling: SamplingParams::default() };
        let (_, mut events) = self.driver.start(request).unwrap();
        loop {
            let output = self.driver.take_output();
            self.driver.deliver();
            while events.try_recv().is_ok() {}
            if output.is_empty() {
                assert_eq!(self.answered, TOKENS);
                return self.now_us / u64::from(TOKENS);
            }
            output.into_iter().for_each(|(to, frame)| self.hears(to, &frame));
        }
    }

    fn hears(&mut self, whom: usize, frame: &Frame) {
        let header = frame.header;
        let is_wanted = header.has(FLAG_WANT_OUTPUT);
        let kind = if is_wanted { Kind::Sampled } else { Kind::Done };
        // It has computed for so long, and says what may follow.
        let mut says = |us: u64, tokens: Vec<Token>| {
            self.now_us += us;
            self.driver.at(self.now_us);
            let sampled = |token| Sampled { token, logprob: None, top: vec![], grammar_ended: false };
            let sampled = tokens.into_iter().filter(|_| is_wanted).map(sampled).collect();
            let step = Step { sampled, compute_us: us as u32, batch_rows: header.rows, threads: 1 };
            self.driver.on_frame(whom, Frame::message(Header { kind, ..header }, &step).unwrap());
        };
        match header.kind {
            Kind::Open => {
                let opened = Opened { cached_tokens: 0, kept_tokens: 0 };
                let frame = Frame::message(Header { kind: Kind::Opened, ..header }, &opened).unwrap();
                self.driver.on_frame(whom, frame);
            }
            Kind::Tokens | Kind::Next if whom != STAGE => {
                self.guesses += u32::from(is_wanted);
                let is_wrong = self.guesses.is_multiple_of(10);
                says(GUESS_US, vec![if is_wrong { WRONG } else { right(header.position + header.rows) }]);
            }
            Kind::Tokens | Kind::Next => {
                let rows = if header.has(FLAG_GUESS) { frame.token_rows().unwrap() } else { vec![WRONG] };
                // The first row is that of a token, and the others are right as long as they are what follows.
                let after_guesses = (1..).zip(rows.iter().skip(1));
                let is_right = |&(row, &token): &(u32, &Token)| token == right(header.position + row);
                let answered = 1 + after_guesses.take_while(is_right).count() as u32;
                self.answered += if is_wanted { answered } else { 0 };
                let last = header.position + if header.has(FLAG_GUESS) { 1 } else { header.rows };
                let tokens = (last..last + answered).map(right).collect();
                says(STEP_US + FURTHER_ROW_US * u64::from(header.rows - 1), tokens);
            }
            _ => {}
        }
    }
}

#[test]
fn right_guesses_of_a_model_beside_the_stage_are_not_taken_for_tokens_without() {
    let model = DraftModel { path: "small.gguf".into(), spoilt: 0.0 };
    let (plain_us, guessed_us) =
        (Machine::new(Draft::Off).us_per_token(), Machine::new(Draft::Model(model)).us_per_token());
    assert!((STEP_US..STEP_US + 20).contains(&plain_us), "{plain_us}");
    // What follows the last right guess of a frame comes with it, after no time at all. Taken for a token without guesses, it made these seem
    // to take no time, and guesses were left alone for most of the answer.
    assert!(2 * guessed_us < plain_us, "{guessed_us} of {plain_us} us");
}
