//! Is a child that says nothing at work, or does it hang? Pure: time comes in as ticks and durations.
//!
//! Every frame but a few is a question that the child owes one answer. Silence while nothing is owed means nothing.
//! Silence of a child that owes is measured against what it took before: time per row, times the rows that it owes, with
//! a wide margin, and never less than a floor. Silence is counted in ticks during which nothing arrived, not read off a
//! clock, so that a machine that was suspended blames nobody.
//!
//! While it is at work a child says so (`Kind::Alive`), from a thread of its own. That is no answer. But one that does not even say that is
//! stopped, and is ended after the floor, whatever it owes and however little is known of it.

use std::{
    collections::{HashMap, VecDeque},
    iter::repeat_n,
    time::{Duration, Instant},
};

use murmur_protocol::frame::{FLAG_HANDED_ON, Header, Kind, NEXT_ROWS_MAX};

use crate::child::ALIVE_EVERY;

/// Signs of life that are missing before a child counts as stopped, at least.
const MISSING_MIN: u32 = 4;
/// Ticks in the shortest silence for which a child is ended.
const TICKS_PER_FLOOR: u32 = 8;
/// How much slower than ever before a step may be: the machine may have become busy.
const SLOWDOWN_MAX: f64 = 10.0;
/// Before anything is known of a child: floors of silence while it loads (between two signs of progress).
const LOAD_FLOORS: f64 = 20.0;
/// Before anything is known of a child: floors for the first rows, whatever their number. Weights come from disk then.
const FIRST_FLOORS: f64 = 10.0;
/// Before anything is known of a child: floors for each row.
const FIRST_FLOORS_PER_ROW: f64 = 0.25;
/// Nothing takes longer than so many floors (an hour, with the usual one).
const FLOORS_MAX: f64 = 120.0;

/// Answers of one session that are waited for. Nobody who waits for them asks for more.
const OWED_MAX: usize = 4096;

/// What a child owes, and how long it has said nothing.
pub(super) struct Watch {
    floor: Duration,
    loaded: bool,
    /// Rows of the questions not yet answered, by session, oldest first; 0 for questions without rows.
    owed: HashMap<u64, Owed>,
    /// Without an answer so far, in whole ticks and signs of life.
    silent: Duration,
    /// Without anything, in whole ticks.
    unheard: Duration,
    /// The last answer, or when the child began to owe.
    since: Option<Instant>,
    /// The slowest row so far, seconds; `None` until one answer about rows has come.
    slowest_row_s: Option<f64>,
    hung: Option<Duration>,
}

struct Owed {
    epoch: u32,
    rows: VecDeque<u32>,
}

impl Watch {
    pub(super) fn new(floor: Duration) -> Watch {
        Watch {
            floor,
            loaded: false,
            owed: HashMap::new(),
            silent: Duration::ZERO,
            unheard: Duration::ZERO,
            since: None,
            slowest_row_s: None,
            hung: None,
        }
    }

    /// How often [`Watch::tick`] wants to be called while nothing arrives.
    pub(super) fn tick_interval(floor: Duration) -> Duration {
        (floor / TICKS_PER_FLOOR).max(Duration::from_millis(1))
    }

    /// The same of this one.
    pub(super) fn tick_every(&self) -> Duration {
        Self::tick_interval(self.floor)
    }

    /// A frame is on its way to the child.
    pub(super) fn sent(&mut self, header: &Header, now: Instant) {
        match header.kind {
            Kind::Load => {}
            // Whatever was asked about the session before is not answered any more.
            Kind::Close | Kind::Rewind => {
                self.owed.remove(&header.session);
            }
            kind => {
                if self.owed.is_empty() {
                    (self.silent, self.unheard, self.since) = (Duration::ZERO, Duration::ZERO, Some(now));
                }
                let owed =
                    self.owed.entry(header.session).or_insert(Owed { epoch: header.epoch, rows: VecDeque::new() });
                if kind == Kind::Open || owed.epoch != header.epoch {
                    // The child forgets what it was asked about this session before.
                    *owed = Owed { epoch: header.epoch, rows: VecDeque::new() };
                }
                // What a word to go on asks for is answered one by one.
                let (rows, answers) =
                    if kind == Kind::Next { (1, header.rows.min(NEXT_ROWS_MAX)) } else { (header.rows, 1) };
                let room = OWED_MAX.saturating_sub(owed.rows.len());
                owed.rows.extend(repeat_n(rows, room.min(answers as usize)));
            }
        }
    }

    /// A frame came from the child.
    pub(super) fn received(&mut self, header: &Header, now: Instant) {
        let unheard = std::mem::take(&mut self.unheard);
        if header.kind == Kind::Alive {
            // Of the time since the one before, ticks have counted a part.
            return self.stays_silent(ALIVE_EVERY.saturating_sub(unheard));
        }
        self.silent = Duration::ZERO;
        let took = self.since.replace(now).map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        match header.kind {
            Kind::Progress => return,
            // The answer itself follows.
            Kind::Done if header.has(FLAG_HANDED_ON) => return,
            Kind::Loaded | Kind::LoadFailed => {
                self.loaded = true;
                return;
            }
            _ => {}
        }
        let Some(owed) = self.owed.get_mut(&header.session).filter(|owed| owed.epoch == header.epoch) else { return };
        let oldest = owed.rows.pop_front();
        if header.kind == Kind::StepFailed && oldest == Some(1) {
            // Of a word to go on, all that did not come.
            let further = header.rows.saturating_sub(1) as usize;
            owed.rows.drain(..further.min(owed.rows.len()));
        }
        if let Some(rows @ 1..) = oldest {
            let row_s = took.as_secs_f64() / f64::from(rows);
            // The first answer took what loading left to do, and says little about the next.
            self.slowest_row_s = Some(self.slowest_row_s.map_or(0.0, |slowest| slowest.max(row_s)));
        }
        if owed.rows.is_empty() {
            self.owed.remove(&header.session);
        }
    }

    /// A tick has passed in which nothing arrived. True: the child hangs.
    pub(super) fn tick(&mut self) -> bool {
        self.unheard += self.tick_every();
        self.stays_silent(self.tick_every());
        self.hung.is_some()
    }

    fn stays_silent(&mut self, longer: Duration) {
        if self.loaded && self.owed.is_empty() {
            (self.silent, self.unheard) = (Duration::ZERO, Duration::ZERO);
            return;
        }
        self.silent += longer;
        if self.silent > self.patience() || self.unheard > self.floor.max(MISSING_MIN * ALIVE_EVERY) {
            self.hung = Some(self.silent);
        }
    }

    /// How long it had been silent, when it was found to hang.
    pub(super) fn hung(&self) -> Option<Duration> {
        self.hung
    }

    fn patience(&self) -> Duration {
        let rows: u32 = self.owed.values().flat_map(|owed| &owed.rows).fold(0, |sum, &rows| sum.saturating_add(rows));
        let floor_s = self.floor.as_secs_f64();
        let floors = match self.slowest_row_s {
            _ if !self.loaded => LOAD_FLOORS,
            None => FIRST_FLOORS.max(FIRST_FLOORS_PER_ROW * f64::from(rows)),
            Some(slowest_s) => SLOWDOWN_MAX * slowest_s * f64::from(rows) / floor_s.max(f64::EPSILON),
        };
        self.floor.mul_f64(floors.clamp(1.0, FLOORS_MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLOOR: Duration = Duration::from_secs(30);

    fn header(kind: Kind, session: u64, rows: u32) -> Header {
        Header { rows, ..Header::new(kind, session) }
    }

    fn loaded(now: Instant) -> Watch {
        let mut watch = Watch::new(FLOOR);
        watch.received(&header(Kind::Loaded, 0, 0), now);
        watch
    }

    /// Ticks until it is found to hang.
    fn silence(watch: &mut Watch) -> Option<Duration> {
        (0..10_000).find(|_| watch.tick()).and_then(|_| watch.hung())
    }

    /// The same of one that says that it is at work.
    fn silence_at_work(watch: &mut Watch) -> Option<Duration> {
        let mut is_found = |_: &u32| {
            watch.received(&header(Kind::Alive, 0, 0), Instant::now());
            watch.hung().is_some()
        };
        (0..10_000).find(&mut is_found).and_then(|_| watch.hung())
    }

    #[test]
    fn a_child_that_does_not_even_say_that_it_is_at_work_is_ended_after_the_floor_whatever_it_owes() {
        let now = Instant::now();
        let (mut loading, mut first) = (Watch::new(FLOOR), loaded(now));
        first.sent(&header(Kind::Tokens, 1, 256), now);
        for watch in [&mut loading, &mut first] {
            assert!(silence(watch).is_some_and(|silence| silence > FLOOR && silence < 2 * FLOOR));
        }
        // Where the floor is next to nothing, some signs of life may be late.
        let mut impatient = Watch::new(Duration::from_millis(10));
        assert!(silence(&mut impatient).is_some_and(|silence| silence > Duration::from_millis(200)));
    }

    #[test]
    fn the_time_between_two_signs_of_life_counts_once() {
        let now = Instant::now();
        let mut watch = Watch::new(Duration::from_secs(4));
        for _ in 0..158 {
            assert!(!watch.tick());
            watch.received(&header(Kind::Alive, 0, 0), now);
        }
        // 79 s of 80.
        assert_eq!(watch.hung(), None);
    }

    #[test]
    fn a_child_that_owes_nothing_may_be_silent_for_ever() {
        let now = Instant::now();
        let mut watch = loaded(now);
        assert_eq!(silence(&mut watch), None);
        watch.sent(&header(Kind::Tokens, 1, 5), now);
        watch.received(&header(Kind::Sampled, 1, 5), now);
        watch.sent(&header(Kind::Open, 2, 0), now);
        watch.sent(&header(Kind::Close, 2, 0), now);
        assert_eq!(silence(&mut watch), None);
    }

    #[test]
    fn a_child_that_owes_is_ended_after_the_floor_once_it_is_known_to_be_fast() {
        let now = Instant::now();
        let mut watch = loaded(now);
        for step in 0..3 {
            watch.sent(&header(Kind::Tokens, 1, 1), now + Duration::from_millis(step));
            watch.received(&header(Kind::Sampled, 1, 1), now + Duration::from_millis(step + 1));
        }
        watch.sent(&header(Kind::Tokens, 1, 1), now);
        let silence = silence(&mut watch).unwrap();
        assert!(silence > FLOOR && silence < 2 * FLOOR, "{silence:?}");
    }

    #[test]
    fn a_slow_child_is_given_time_for_all_the_rows_it_owes() {
        let now = Instant::now();
        let mut watch = loaded(now);
        for second in [0, 10] {
            watch.sent(&header(Kind::Tokens, 1, 10), now + Duration::from_secs(second));
            watch.received(&header(Kind::Done, 1, 10), now + Duration::from_secs(second + 5));
        }
        // Half a second per row, ten times slower at worst.
        watch.sent(&header(Kind::Tokens, 1, 100), now);
        let silence = silence_at_work(&mut watch).unwrap();
        assert!((495..510).contains(&silence.as_secs()), "{silence:?}");
    }

    #[test]
    fn loading_and_the_first_rows_have_more_time_and_not_for_ever() {
        let now = Instant::now();
        let mut loading = Watch::new(FLOOR);
        assert!((600..610).contains(&silence_at_work(&mut loading).unwrap().as_secs()));
        let mut first = loaded(now);
        first.sent(&header(Kind::Tokens, 1, 256), now);
        assert!((1920..1930).contains(&silence_at_work(&mut first).unwrap().as_secs()));
        let mut most = loaded(now);
        most.sent(&header(Kind::Tokens, 1, u32::MAX), now);
        assert!((3600..3610).contains(&silence_at_work(&mut most).unwrap().as_secs()));
    }

    #[test]
    fn rows_that_a_child_is_to_compute_of_its_own_accord_are_owed_one_by_one() {
        let now = Instant::now();
        let mut watch = loaded(now);
        watch.sent(&header(Kind::Next, 1, 3), now);
        for _ in 0..2 {
            watch.received(&header(Kind::Sampled, 1, 1), now);
        }
        assert!(silence(&mut watch).is_some());
        let mut watch = loaded(now);
        watch.sent(&header(Kind::Next, 1, 3), now);
        for _ in 0..3 {
            watch.received(&header(Kind::Sampled, 1, 1), now);
        }
        assert_eq!(silence(&mut watch), None);
    }

    #[test]
    fn a_word_to_go_on_where_nothing_follows_is_paid_with_one_answer() {
        let now = Instant::now();
        let mut watch = loaded(now);
        watch.sent(&header(Kind::Next, 1, 5), now);
        watch.received(&header(Kind::Sampled, 1, 1), now);
        watch.received(&header(Kind::StepFailed, 1, 4), now);
        assert_eq!(silence(&mut watch), None);
        // Other rows that fail pay for themselves alone.
        watch.sent(&header(Kind::Tokens, 1, 4), now);
        watch.sent(&header(Kind::Tokens, 1, 4), now);
        watch.received(&header(Kind::StepFailed, 1, 4), now);
        assert!(silence(&mut watch).is_some());
    }

    #[test]
    fn whoever_asks_for_ever_more_takes_no_memory() {
        let now = Instant::now();
        let mut watch = loaded(now);
        (0..OWED_MAX).for_each(|_| watch.sent(&header(Kind::Next, 1, NEXT_ROWS_MAX), now));
        assert_eq!(watch.owed[&1].rows.len(), OWED_MAX);
    }

    #[test]
    fn answers_of_an_older_epoch_pay_nothing() {
        let now = Instant::now();
        let mut watch = loaded(now);
        watch.sent(&header(Kind::Tokens, 1, 5), now);
        watch.sent(&Header { epoch: 1, ..header(Kind::Open, 1, 0) }, now);
        watch.received(&header(Kind::Done, 1, 5), now);
        assert!(silence(&mut watch).is_some());
    }
}
