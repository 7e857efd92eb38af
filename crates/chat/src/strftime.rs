//! `strftime` for the `strftime_now` function that templates call to print the date.
//!
//! The civil-from-days arithmetic is Howard Hinnant's ("chrono-compatible low-level date algorithms").

use std::fmt::Write;

use crate::Timestamp;

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const SECONDS_PER_DAY: i64 = 86_400;

struct Civil {
    year: i64,
    /// 1..=12
    month: usize,
    day: i64,
    /// 1..=366
    day_of_year: i64,
    /// Sunday is 0.
    weekday: usize,
    hour: i64,
    minute: i64,
    second: i64,
}

fn is_leap(year: i64) -> bool {
    year % 4 == 0 && (year % 100 != 0 || year % 400 == 0)
}

fn civil(now: Timestamp) -> Civil {
    let local = now.unix_seconds.saturating_add(i64::from(now.utc_offset_seconds));
    let days = local.div_euclid(SECONDS_PER_DAY);
    let seconds = local.rem_euclid(SECONDS_PER_DAY);
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_from_march = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_from_march + 2) / 153;
    let day = day_from_march - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let before: i64 = [31, 28 + i64::from(is_leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30]
        .iter()
        .take(usize::try_from(month - 1).unwrap_or(0))
        .sum();
    Civil {
        year,
        month: usize::try_from(month).unwrap_or(1),
        day,
        day_of_year: before + day,
        weekday: usize::try_from((days + 4).rem_euclid(7)).unwrap_or(0),
        hour: seconds / 3600,
        minute: seconds / 60 % 60,
        second: seconds % 60,
    }
}

/// Formats local time as C's `strftime` does in the C locale, with glibc's `%-d` (no padding). Directives that are not
/// known stay as they are.
pub(crate) fn strftime(now: Timestamp, format: &str) -> String {
    let t = civil(now);
    let month = MONTHS.get(t.month - 1).copied().unwrap_or_default();
    let weekday = WEEKDAYS.get(t.weekday).copied().unwrap_or_default();
    let mut out = String::new();
    let mut rest = format.chars();
    while let Some(c) = rest.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = rest.next();
        let unpadded = directive == Some('-');
        if unpadded {
            directive = rest.next();
        }
        let padded = |value: i64, width: usize| {
            if unpadded { value.to_string() } else { format!("{value:0width$}") }
        };
        let hour_12 = (t.hour + 11) % 12 + 1;
        match directive {
            Some('Y') => out.push_str(&t.year.to_string()),
            Some('y') => out.push_str(&padded(t.year.rem_euclid(100), 2)),
            Some('m') => out.push_str(&padded(t.month as i64, 2)),
            Some('d') => out.push_str(&padded(t.day, 2)),
            Some('e') if unpadded => out.push_str(&t.day.to_string()),
            Some('e') => {
                let _ = write!(out, "{:2}", t.day);
            }
            Some('j') => out.push_str(&padded(t.day_of_year, 3)),
            Some('H') => out.push_str(&padded(t.hour, 2)),
            Some('I') => out.push_str(&padded(hour_12, 2)),
            Some('M') => out.push_str(&padded(t.minute, 2)),
            Some('S') => out.push_str(&padded(t.second, 2)),
            Some('f') => out.push_str("000000"),
            Some('p') => out.push_str(if t.hour < 12 { "AM" } else { "PM" }),
            Some('B') => out.push_str(month),
            Some('b' | 'h') => out.push_str(&month[..3]),
            Some('A') => out.push_str(weekday),
            Some('a') => out.push_str(&weekday[..3]),
            Some('w') => out.push_str(&t.weekday.to_string()),
            Some('u') => out.push_str(&if t.weekday == 0 { 7 } else { t.weekday }.to_string()),
            Some('F') => out.push_str(&strftime(now, "%Y-%m-%d")),
            Some('T') => out.push_str(&strftime(now, "%H:%M:%S")),
            Some('R') => out.push_str(&strftime(now, "%H:%M")),
            Some('D' | 'x') => out.push_str(&strftime(now, "%m/%d/%y")),
            Some('X') => out.push_str(&strftime(now, "%H:%M:%S")),
            Some('c') => out.push_str(&strftime(now, "%a %b %e %H:%M:%S %Y")),
            // `strftime_now` of transformers formats a naive time, for which Python prints no zone.
            Some('Z' | 'z') => {}
            Some('n') => out.push('\n'),
            Some('t') => out.push('\t'),
            Some('%') => out.push('%'),
            Some(other) => {
                out.push('%');
                if unpadded {
                    out.push('-');
                }
                out.push(other);
            }
            None => out.push('%'),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(unix_seconds: i64) -> Timestamp {
        Timestamp { unix_seconds, utc_offset_seconds: 0 }
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        // `date -u -d @N` of GNU coreutils.
        assert_eq!(strftime(at(0), "%Y-%m-%d %H:%M:%S %a %j"), "1970-01-01 00:00:00 Thu 001");
        assert_eq!(strftime(at(951_782_400), "%d %b %Y, %A %j"), "29 Feb 2000, Tuesday 060");
        assert_eq!(strftime(at(1_735_689_599), "%-d %B %y %I:%M %p %j"), "31 December 24 11:59 PM 366");
        assert_eq!(strftime(at(-1), "%F %T"), "1969-12-31 23:59:59");
    }

    #[test]
    fn the_offset_moves_the_date() {
        let now = Timestamp { unix_seconds: 1_735_689_599, utc_offset_seconds: 3600 };
        assert_eq!(strftime(now, "%F %R"), "2025-01-01 00:59");
    }

    #[test]
    fn odd_formats_do_no_harm() {
        assert_eq!(strftime(at(0), "100%% %Q %-Q %"), "100% %Q %-Q %");
        let _ = strftime(Timestamp { unix_seconds: i64::MAX, utc_offset_seconds: 1 }, "%c %x");
        let _ = strftime(Timestamp { unix_seconds: i64::MIN, utc_offset_seconds: -1 }, "%c %x");
    }
}
