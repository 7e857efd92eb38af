//! What a node does for other nodes, and when. Its own user is never limited by this.
//!
//! A node that pauses says so in its record: its models are *draining*, so that nobody sends it anything. What runs is
//! finished; what comes all the same is refused with the reason, and goes elsewhere.

use std::{
    fmt,
    str::FromStr,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use chrono::Timelike;
use serde_json::{Value, json};

use crate::activity::{self, Activity};

/// What the owner allows.
#[derive(Debug, Clone, Default)]
pub struct Sharing {
    /// When requests of others are taken; empty: always.
    pub hours: Vec<Window>,
    /// Requests of others at once, at most; `None`: what the engines take.
    pub requests_max: Option<u32>,
    /// Whether to pause while other programs or people use the machine.
    pub pause_when_active: bool,
}

/// A part of the day in local time, written `22-7` or `12:30-13:30`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    from_minute: u16,
    /// Not part of it. Smaller than `from_minute` where it goes past midnight.
    to_minute: u16,
}

const DAY_MINUTES: u16 = 24 * 60;

impl Window {
    fn contains(&self, minute: u16) -> bool {
        match self.from_minute < self.to_minute {
            true => (self.from_minute..self.to_minute).contains(&minute),
            false => minute >= self.from_minute || minute < self.to_minute,
        }
    }
}

impl FromStr for Window {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let minute = |text: &str| {
            let (hours, minutes) = text.trim().split_once(':').unwrap_or((text.trim(), "0"));
            let (hours, minutes) = (hours.parse::<u16>().ok()?, minutes.parse::<u16>().ok()?);
            (minutes < 60 && hours * 60 + minutes <= DAY_MINUTES && hours <= 24).then_some(hours * 60 + minutes)
        };
        let parts = text.split_once('-').and_then(|(from, to)| Some((minute(from)?, minute(to)?)));
        match parts {
            Some((from, to)) if from % DAY_MINUTES != to % DAY_MINUTES => {
                Ok(Window { from_minute: from % DAY_MINUTES, to_minute: to })
            }
            Some((0, DAY_MINUTES)) => Ok(Window { from_minute: 0, to_minute: DAY_MINUTES }),
            _ => Err(format!("'{text}' is no part of a day; write for instance 22-7 or 12:30-13:30")),
        }
    }
}

impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [(from, from_minutes), (to, to_minutes)] =
            [self.from_minute, self.to_minute].map(|minute| (minute / 60, minute % 60));
        write!(f, "{from:02}:{from_minutes:02}-{to:02}:{to_minutes:02}")
    }
}

/// Whether the node works for others now.
pub(crate) struct Gate {
    sharing: Sharing,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    activity: Activity,
    paused: Option<String>,
    is_closed: bool,
}

impl Gate {
    pub(crate) fn new(sharing: Sharing) -> Gate {
        Gate { sharing, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at the clock and at what else runs. `own_processes`: the node's, itself included.
    pub(crate) fn look(&self, own_processes: &[u32]) {
        let time = chrono::Local::now().time();
        let minute = u16::try_from(time.num_seconds_from_midnight() / 60).unwrap_or(0);
        let mut state = self.state();
        let in_use = match self.sharing.pause_when_active {
            true => state.activity.note(Instant::now(), activity::sample(own_processes)),
            false => None,
        };
        if state.is_closed {
            return;
        }
        let closed = (!self.is_open_at(minute)).then(|| format!("outside its hours ({})", self.hours()));
        let paused = closed.or(in_use);
        if paused.is_some() != state.paused.is_some() {
            tracing::info!("requests of other nodes: {}", paused.as_deref().unwrap_or("taken again"));
        }
        state.paused = paused;
    }

    fn is_open_at(&self, minute: u16) -> bool {
        self.sharing.hours.is_empty() || self.sharing.hours.iter().any(|window| window.contains(minute))
    }

    fn hours(&self) -> String {
        self.sharing.hours.iter().map(Window::to_string).collect::<Vec<_>>().join(", ")
    }

    /// Nothing of others is taken any more: the node is about to end.
    pub(crate) fn close(&self) {
        let mut state = self.state();
        (state.is_closed, state.paused) = (true, Some("it is being stopped".to_owned()));
    }

    /// Whether the node is about to end.
    pub(crate) fn is_closed(&self) -> bool {
        self.state().is_closed
    }

    /// Why nothing of others is taken now, if so.
    pub(crate) fn paused(&self) -> Option<String> {
        self.state().paused.clone()
    }

    /// Requests of others at once, at most.
    pub(crate) fn requests_max(&self) -> usize {
        self.sharing.requests_max.map_or(usize::MAX, |most| usize::try_from(most).unwrap_or(usize::MAX))
    }

    /// For `/api/status`.
    pub(crate) fn view(&self, requests: usize) -> Value {
        json!({
            "paused": self.paused(),
            "requests": requests,
            "requests_max": self.sharing.requests_max,
            "hours": self.sharing.hours.iter().map(Window::to_string).collect::<Vec<_>>(),
            "pause_when_active": self.sharing.pause_when_active,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(text: &str) -> Window {
        text.parse().unwrap()
    }

    #[test]
    fn windows_are_read_as_people_write_them_and_may_go_past_midnight() {
        let at = |hours: u16, minutes: u16| hours * 60 + minutes;
        let night = window("22-7");
        assert_eq!(night.to_string(), "22:00-07:00");
        for (minute, inside) in
            [(at(21, 59), false), (at(22, 0), true), (at(0, 0), true), (at(6, 59), true), (at(7, 0), false)]
        {
            assert_eq!(night.contains(minute), inside, "{minute}");
        }
        let noon = window("12:30-13:05");
        assert!(noon.contains(at(12, 30)) && noon.contains(at(13, 4)));
        assert!(!noon.contains(at(12, 29)) && !noon.contains(at(13, 5)));
        assert!(window("0-24").contains(0) && window("0-24").contains(at(23, 59)));
        assert!(window("22-24").contains(at(23, 59)) && !window("22-24").contains(0));
        assert!(window("24-7").contains(0) && !window("24-7").contains(at(7, 0)));
        for text in
            ["", "22", "22-", "-7", "25-7", "7-7", "24-0", "7:60-8", "24:01-3", "a-b", "1-2-3", "-1-5", "70000-1"]
        {
            assert!(text.parse::<Window>().is_err(), "{text}");
        }
    }

    #[test]
    fn several_windows_are_open_each_and_none_is_always() {
        let gate = |hours: &[&str]| {
            Gate::new(Sharing { hours: hours.iter().map(|text| window(text)).collect(), ..Sharing::default() })
        };
        let two = gate(&["22-7", "12-13"]);
        assert!(two.is_open_at(0) && two.is_open_at(12 * 60) && !two.is_open_at(11 * 60));
        assert!(gate(&[]).is_open_at(0));
        assert_eq!(two.hours(), "22:00-07:00, 12:00-13:00");
    }
}
