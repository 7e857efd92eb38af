//! Is somebody using this machine? Two signs that any Linux machine has, with or without a screen:
//!
//! - **Processors**: programs other than this node and its engines have used more than a tenth of the machine's processors
//!   (and at least half of one), on average over 10 s. From `/proc/stat`, less what `/proc/PID/stat` says of our own
//!   processes; in a container that is what the whole machine does.
//! - **Terminals**: in one of them a program has read what was typed within the last minute. That is the idle time that `w`
//!   shows: when the terminal's device in `/dev` was last read. Mouse and keyboard of a desktop do not show here, the programs
//!   that they make work do.
//!
//! Either sign counts for a minute, so that pauses do not flap.

use std::{
    collections::{HashMap, VecDeque},
    fs,
    time::{Duration, Instant, SystemTime},
};

/// Others' share of the processors above which the machine is in use.
const SHARE: f64 = 0.1;
/// And in processors: a tenth of a small machine is nothing.
const PROCESSORS: f64 = 0.5;
/// Over this time it is averaged.
const WINDOW: Duration = Duration::from_secs(10);
/// For so long a sign counts.
const COUNTS_FOR: Duration = Duration::from_secs(60);
/// Samples are kept no closer than this.
const SAMPLE_EVERY: Duration = Duration::from_secs(1);

/// What the machine has done up to some moment.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sample {
    processors: usize,
    /// Time that processors were at work, in ticks, summed over all.
    busy_ticks: u64,
    /// Time that they could have been.
    all_ticks: u64,
    /// Of that, of our own processes.
    own_ticks: HashMap<u32, u64>,
    /// How long ago somebody typed in a terminal.
    typed_ago: Option<Duration>,
}

/// What was seen lately.
#[derive(Debug, Default)]
pub(crate) struct Activity {
    samples: VecDeque<(Instant, Sample)>,
    sign: Option<(Instant, String)>,
}

impl Activity {
    /// Takes note of the machine, and says how one sees that it is in use, if it is.
    pub(crate) fn note(&mut self, now: Instant, sample: Option<Sample>) -> Option<String> {
        let sample = sample?;
        if let Some(ago) = sample.typed_ago.filter(|ago| *ago < COUNTS_FOR) {
            self.sign = Some((now - ago.min(COUNTS_FOR), "somebody types in a terminal".to_owned()));
        }
        while self.samples.get(1).is_some_and(|(at, _)| now.duration_since(*at) >= WINDOW) {
            self.samples.pop_front();
        }
        if let Some((at, before)) = self.samples.front()
            && now.duration_since(*at) >= WINDOW
        {
            let others = used_by_others(before, &sample);
            if others >= PROCESSORS && others >= SHARE * sample.processors as f64 {
                let what = format!("other programs use {others:.1} of {} processors", sample.processors);
                self.sign = Some((now, what));
            }
        }
        if self.samples.back().is_none_or(|(at, _)| now.duration_since(*at) >= SAMPLE_EVERY) {
            self.samples.push_back((now, sample));
        }
        self.sign.take_if(|(at, _)| now.duration_since(*at) >= COUNTS_FOR);
        self.sign.as_ref().map(|(_, what)| format!("this machine is in use: {what}"))
    }
}

/// Processors, on average between two moments.
fn used_by_others(before: &Sample, after: &Sample) -> f64 {
    let all = after.all_ticks.saturating_sub(before.all_ticks).max(1);
    let busy = after.busy_ticks.saturating_sub(before.busy_ticks);
    let since = |(pid, ticks): (&u32, &u64)| ticks.saturating_sub(before.own_ticks.get(pid).copied().unwrap_or(0));
    let own: u64 = after.own_ticks.iter().map(since).sum();
    busy.saturating_sub(own) as f64 / all as f64 * after.processors as f64
}

/// Whether this system says any of it.
pub(crate) fn can_be_seen() -> bool {
    sample(&[]).is_some()
}

/// What the machine has done up to now; `None`: the system does not say.
pub(crate) fn sample(own_processes: &[u32]) -> Option<Sample> {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    let (busy_ticks, all_ticks) = ticks_of_machine(stat.lines().next()?)?;
    let own_ticks = own_processes.iter().filter_map(|pid| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        Some((*pid, ticks_of_process(&stat)?))
    });
    Some(Sample {
        processors: stat.lines().skip(1).take_while(|line| line.starts_with("cpu")).count(),
        busy_ticks,
        all_ticks,
        own_ticks: own_ticks.collect(),
        typed_ago: typed_ago(),
    })
}

/// At work, and altogether: see proc(5). Time of guests is in `user` already; stolen time is of other machines.
fn ticks_of_machine(line: &str) -> Option<(u64, u64)> {
    let fields: Vec<u64> =
        line.strip_prefix("cpu ")?.split_whitespace().map_while(|field| field.parse().ok()).collect();
    let [user, nice, system, idle, iowait, irq, softirq, ..] = fields[..] else { return None };
    let busy = user + nice + system + irq + softirq;
    Some((busy, busy + idle + iowait))
}

/// `utime` and `stime`. The name before them may have spaces and brackets of its own.
fn ticks_of_process(stat: &str) -> Option<u64> {
    let (_, after_name) = stat.rsplit_once(')')?;
    let mut fields = after_name.split_whitespace().skip(11);
    Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
}

fn typed_ago() -> Option<Duration> {
    let is_number = |name: &str| !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_digit());
    let in_folder = |folder: &str, prefix: &'static str| {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries.filter(move |entry| {
            entry.file_name().to_str().and_then(|name| name.strip_prefix(prefix)).is_some_and(is_number)
        })
    };
    let read = in_folder("/dev/pts", "")
        .chain(in_folder("/dev", "tty"))
        .filter_map(|entry| entry.metadata().ok()?.accessed().ok());
    // A time in the future is a clock that was set back.
    Some(SystemTime::now().duration_since(read.max()?).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICKS_PER_SECOND: u64 = 100;

    /// A machine of four processors after so many seconds, of which others and we have used so many.
    fn after(seconds: u64, others: u64, own: u64) -> Sample {
        Sample {
            processors: 4,
            busy_ticks: (others + own) * TICKS_PER_SECOND,
            all_ticks: 4 * seconds * TICKS_PER_SECOND,
            own_ticks: HashMap::from([(1, own * TICKS_PER_SECOND)]),
            typed_ago: None,
        }
    }

    #[test]
    fn others_work_is_activity_and_our_own_is_not() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let (mut activity, mut others) = (Activity::default(), 0);
        let mut seen = Vec::new();
        for second in 0..120 {
            // Others use one processor from second 20 to 30, we use three all the time.
            others += u64::from((20..30).contains(&second));
            seen.push(activity.note(at(second), Some(after(second, others, 3 * second))));
        }
        assert!(seen[..20].iter().all(Option::is_none), "{seen:?}");
        assert!(seen[31].as_ref().unwrap().contains("of 4 processors"), "{seen:?}");
        let last = seen.iter().rposition(Option::is_some).unwrap();
        assert!((30 + 60..30 + 60 + 10).contains(&last), "{last}");
    }

    #[test]
    fn typing_counts_for_a_minute() {
        let start = Instant::now();
        let mut activity = Activity::default();
        let mut look = |second: u64| {
            let typed_ago = Some(Duration::from_secs(second));
            activity.note(start + Duration::from_secs(second), Some(Sample { typed_ago, ..after(second, 0, 0) }))
        };
        assert!(look(5).unwrap().contains("terminal"));
        assert!(look(59).is_some());
        assert_eq!(look(61), None);
        assert_eq!(activity.note(start, None), None, "a system that says nothing");
    }

    #[test]
    fn the_kernels_figures_are_read() {
        assert_eq!(ticks_of_machine("cpu  10 20 30 400 50 6 7 8 9 10"), Some((73, 523)));
        assert_eq!(ticks_of_machine("cpu0 1"), None);
        assert_eq!(ticks_of_process("1 (a ) b) S 1 1 1 0 -1 4194560 1 0 0 0 17 4 0 0 20 0"), Some(21));
        let sample = sample(&[std::process::id()]).unwrap();
        assert!(sample.processors > 0 && sample.busy_ticks <= sample.all_ticks && sample.own_ticks.len() == 1);
    }
}
