//! How far the host of a stage lags behind the one that stands by for it. Both are given the same rows, so what keeps the one busy
//! keeps the other busy as well, and neither the length of a prompt nor a long queue explains why only one of them is done. Pure:
//! time is an argument.

use std::{
    collections::{HashMap, VecDeque},
    time::{Duration, Instant},
};

use murmur_protocol::frame::Header;

/// Who lags behind by less than this, or than is usual, is not asked whether it is there.
const DOUBT_MIN: Duration = Duration::from_millis(10);
/// Who lags behind by more is asked however usual that is: with the chunks of a prompt two machines may lie far apart, and a node answers
/// while its engine computes.
const DOUBT_MAX: Duration = Duration::from_millis(20);
/// Nobody who is there is suspected of less.
pub(super) const LAG_MIN: Duration = Duration::from_millis(100);
/// Nor of less than so many times what is usual.
const LAG_FACTOR: u32 = 4;
/// What was usual is forgotten by this part with every step.
const FORGOTTEN: u32 = 16;
/// Steps of a session that may be owed: more than any driver has on their way.
const OWED_MAX: usize = 1024;

/// How far one lags behind the other, by the steps of the sessions that both have.
#[derive(Default)]
pub(super) struct Lag {
    sessions: HashMap<u64, Steps>,
    usual: Duration,
}

/// What is owed and has not come by then.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Deadlines {
    /// Whoever owes it may not be there.
    pub(super) doubtful: Instant,
    /// Whoever owes it is of no more use, there or not.
    pub(super) too_late: Instant,
}

/// Both are given the same rows in the same order, so it is enough to count. Positions may go back.
struct Steps {
    epoch: u32,
    /// Steps of the one who holds the stage.
    done: u64,
    /// Steps of the other.
    done_by_standby: u64,
    /// Those that only the other has done, by number, and since when.
    owed: VecDeque<(u64, Instant)>,
}

impl Lag {
    /// A session begins, or goes on under another epoch.
    pub(super) fn open(&mut self, session: u64, epoch: u32) {
        self.sessions.insert(session, Steps { epoch, done: 0, done_by_standby: 0, owed: VecDeque::new() });
    }

    /// A session is over, or stops.
    pub(super) fn close(&mut self, session: u64) {
        self.sessions.remove(&session);
    }

    /// All stop.
    pub(super) fn close_all(&mut self) {
        self.sessions.clear();
    }

    /// No session runs.
    pub(super) fn is_idle(&self) -> bool {
        self.sessions.is_empty()
    }

    fn steps(&mut self, header: &Header) -> Option<&mut Steps> {
        self.sessions.get_mut(&header.session).filter(|steps| steps.epoch == header.epoch)
    }

    /// Who stands by has computed these rows.
    pub(super) fn standby_has(&mut self, header: &Header, now: Instant) {
        let Some(steps) = self.steps(header) else { return };
        steps.done_by_standby += 1;
        if steps.done_by_standby > steps.done && steps.owed.len() < OWED_MAX {
            steps.owed.push_back((steps.done_by_standby, now));
        }
    }

    /// Who holds the stage has.
    pub(super) fn holder_has(&mut self, header: &Header, now: Instant) {
        let Some(steps) = self.steps(header) else { return };
        steps.done += 1;
        let paid = steps.owed.partition_point(|(owed, _)| *owed <= steps.done);
        let oldest = steps.owed.drain(..paid).next();
        let lag = oldest.map_or(Duration::ZERO, |(_, since)| now.saturating_duration_since(since));
        self.usual = lag.max(self.usual - self.usual / FORGOTTEN);
    }

    /// Until when what is owed can wait; `None`: nothing is owed.
    pub(super) fn deadlines(&self) -> Option<Deadlines> {
        let since = self.sessions.values().filter_map(|steps| steps.owed.front()).map(|(_, since)| *since).min();
        since.map(|since| Deadlines {
            doubtful: since + self.usual.clamp(DOUBT_MIN, DOUBT_MAX),
            too_late: since + LAG_MIN.max(LAG_FACTOR * self.usual),
        })
    }

    /// It is too late. Should that have been a mistake, it is made less often: more is usual from now on.
    pub(super) fn give_up(&mut self) {
        self.usual = self.usual.max(LAG_MIN / 2);
        self.close_all();
    }
}

#[cfg(test)]
mod tests {
    use murmur_protocol::frame::Kind;

    use super::*;

    fn step(session: u64, epoch: u32, position: u32) -> Header {
        Header { epoch, position, rows: 1, ..Header::new(Kind::Done, session) }
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn too_late(lag: &Lag) -> Option<Instant> {
        lag.deadlines().map(|deadlines| deadlines.too_late)
    }

    #[test]
    fn whoever_is_no_later_than_the_one_who_stands_by_owes_nothing() {
        let (mut lag, now) = (Lag::default(), Instant::now());
        lag.open(1, 0);
        for position in 0..10 {
            lag.holder_has(&step(1, 0, position), now);
            lag.standby_has(&step(1, 0, position), now + ms(1000));
        }
        assert_eq!(too_late(&lag), None);
    }

    #[test]
    fn it_is_too_late_when_a_step_is_owed_for_much_longer_than_is_usual() {
        let (mut lag, now) = (Lag::default(), Instant::now());
        lag.open(1, 0);
        lag.standby_has(&step(1, 0, 0), now);
        assert_eq!(too_late(&lag), Some(now + LAG_MIN));
        // Here 60 ms are usual.
        lag.holder_has(&step(1, 0, 0), now + ms(60));
        lag.standby_has(&step(1, 0, 1), now + ms(70));
        lag.standby_has(&step(1, 0, 2), now + ms(80));
        assert_eq!(too_late(&lag), Some(now + ms(70) + LAG_FACTOR * ms(60)));
        lag.holder_has(&step(1, 0, 1), now + ms(90));
        assert!(too_late(&lag).is_some_and(|at| at > now + ms(80 + 200)));
        lag.holder_has(&step(1, 0, 2), now + ms(100));
        assert_eq!(too_late(&lag), None);
    }

    #[test]
    fn who_lags_behind_for_longer_than_is_usual_may_not_be_there_long_before_it_is_too_late() {
        let (mut lag, now) = (Lag::default(), Instant::now());
        let doubtful = |lag: &Lag| lag.deadlines().map(|deadlines| deadlines.doubtful);
        lag.open(1, 0);
        assert_eq!(doubtful(&lag), None);
        lag.standby_has(&step(1, 0, 0), now);
        assert_eq!(doubtful(&lag), Some(now + DOUBT_MIN));
        lag.holder_has(&step(1, 0, 0), now + ms(15));
        lag.standby_has(&step(1, 0, 1), now + ms(70));
        assert_eq!(doubtful(&lag), Some(now + ms(70) + ms(15)));
        // However much is usual, it costs nothing to ask.
        lag.holder_has(&step(1, 0, 1), now + ms(3000));
        lag.standby_has(&step(1, 0, 2), now + ms(3000));
        assert_eq!(
            (doubtful(&lag), too_late(&lag)),
            (Some(now + ms(3000) + DOUBT_MAX), Some(now + ms(3000) + LAG_FACTOR * ms(2930)))
        );
    }

    #[test]
    fn what_was_usual_is_forgotten() {
        let (mut lag, now) = (Lag::default(), Instant::now());
        lag.open(1, 0);
        lag.standby_has(&step(1, 0, 0), now);
        lag.holder_has(&step(1, 0, 0), now + ms(3000));
        for position in 1..200 {
            lag.holder_has(&step(1, 0, position), now);
            lag.standby_has(&step(1, 0, position), now);
        }
        lag.standby_has(&step(1, 0, 200), now);
        assert_eq!(too_late(&lag), Some(now + LAG_MIN));
    }

    #[test]
    fn sessions_that_are_over_or_begin_again_owe_nothing() {
        let (mut lag, now) = (Lag::default(), Instant::now());
        lag.standby_has(&step(1, 0, 0), now);
        assert_eq!(too_late(&lag), None);
        for over in [Lag::close_all, |lag: &mut Lag| lag.close(1), |lag: &mut Lag| lag.open(1, 1), Lag::give_up] {
            lag.open(1, 0);
            lag.standby_has(&step(1, 0, 0), now);
            assert!(too_late(&lag).is_some());
            over(&mut lag);
            assert_eq!(too_late(&lag), None);
            lag.standby_has(&step(1, 0, 1), now);
            assert_eq!(too_late(&lag), None);
        }
    }

    #[test]
    fn a_claim_to_be_done_with_everything_takes_no_memory() {
        let (mut lag, now) = (Lag::default(), Instant::now());
        lag.open(1, 0);
        (0..10 * OWED_MAX as u32).for_each(|position| lag.standby_has(&step(1, 0, position), now));
        assert_eq!(lag.sessions[&1].owed.len(), OWED_MAX);
    }
}
