//! Values that users write and read: sizes, thread counts, durations.

use std::{fmt, num::NonZeroU32, str::FromStr, time::Duration};

/// A number of bytes, written `8GiB`, `8G`, `512M` or `1073741824`. Letters count in powers of 1024, as memory does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size(pub(crate) u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("'{text}' is not a size; write for instance 8GiB or 512M");
        let text = text.trim();
        let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let shift = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kb" | "kib" => 10,
            "m" | "mb" | "mib" => 20,
            "g" | "gb" | "gib" => 30,
            "t" | "tb" | "tib" => 40,
            _ => return Err(wrong()),
        };
        let bytes = number.parse::<f64>().map_err(|_| wrong())? * (1u64 << shift) as f64;
        if !(1.0..=(1u64 << 60) as f64).contains(&bytes) {
            return Err(format!("'{text}' is out of range; write for instance 8GiB or 512M"));
        }
        Ok(Self(bytes as u64))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
        if self.0 < 1024 {
            return write!(f, "{} B", self.0);
        }
        let mut value = self.0 as f64 / 1024.0;
        let mut unit = 0;
        while value >= 1024.0 && unit + 1 < UNITS.len() {
            value /= 1024.0;
            unit += 1;
        }
        write!(f, "{value:.1} {}", UNITS[unit])
    }
}

/// How many threads compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Threads {
    /// By measurement, again when the machine is busy.
    Auto,
    /// So many.
    Fixed(NonZeroU32),
}

impl FromStr for Threads {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        /// More threads than this is a typing error.
        const THREADS_MAX: u32 = 1024;
        if text.eq_ignore_ascii_case("auto") {
            return Ok(Self::Auto);
        }
        match text.parse::<NonZeroU32>() {
            Ok(count) if count.get() <= THREADS_MAX => Ok(Self::Fixed(count)),
            _ => Err(format!("write 'auto' or a number from 1 to {THREADS_MAX}")),
        }
    }
}

impl fmt::Display for Threads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Fixed(count) => count.fmt(f),
        }
    }
}

/// A time of whole seconds, written `90s`, `30m`, `24h` or `7d`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Period {
    pub(crate) seconds: u64,
}

impl FromStr for Period {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        /// Nothing that is asked for lasts longer than a year.
        const SECONDS_MAX: u64 = 365 * 24 * 3600;
        let wrong = || format!("'{text}' is not a time; write for instance 90s, 30m, 24h or 7d");
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let unit_s = match unit {
            "s" => 1,
            "m" => 60,
            "h" => 3600,
            "d" => 24 * 3600,
            _ => return Err(wrong()),
        };
        let seconds = number.parse::<u64>().map_err(|_| wrong())?.saturating_mul(unit_s);
        match seconds {
            1..=SECONDS_MAX => Ok(Self { seconds }),
            _ => Err(format!("'{text}' is out of range; from 1s to 365d")),
        }
    }
}

impl From<Period> for Duration {
    fn from(period: Period) -> Self {
        Self::from_secs(period.seconds)
    }
}

impl fmt::Display for Period {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(24 * 3600, "d"), (3600, "h"), (60, "m")];
        let whole = units.into_iter().find(|(unit_s, _)| self.seconds.is_multiple_of(*unit_s));
        let (unit_s, unit) = whole.unwrap_or((1, "s"));
        write!(f, "{} {unit}", self.seconds / unit_s)
    }
}

/// A time as people read it.
pub(crate) fn human_duration(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    if seconds < 1.0 {
        format!("{:.0} ms", seconds * 1e3)
    } else if seconds < 120.0 {
        format!("{seconds:.1} s")
    } else {
        format!("{} min {} s", duration.as_secs() / 60, duration.as_secs() % 60)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("1073741824", 1 << 30),
            ("8GiB", 8 << 30),
            ("8g", 8 << 30),
            ("1.5 GB", 3 << 29),
            ("512M", 512 << 20),
            ("64k", 64 << 10),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for text in ["", "GiB", "-1G", "1X", "nan", "1e99", "inf", "0", "99999999T", "1.2.3"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_shown_with_one_decimal() {
        assert_eq!(Size(1536 << 20).to_string(), "1.5 GiB");
        assert_eq!(Size(17).to_string(), "17 B");
    }

    #[test]
    fn periods_are_read_as_people_write_them() {
        for (text, seconds, shown) in
            [("90s", 90, "90 s"), ("30m", 1800, "30 m"), ("24h", 86_400, "1 d"), ("7d", 604_800, "7 d")]
        {
            assert_eq!(text.parse(), Ok(Period { seconds }), "{text}");
            assert_eq!(Period { seconds }.to_string(), shown);
        }
        for text in ["", "0s", "h", "1", "-1h", "1.5h", "366d", "99999999999999999999d", "18446744073709551615d"] {
            assert!(text.parse::<Period>().is_err(), "{text}");
        }
    }

    #[test]
    fn threads_are_auto_or_a_sensible_number() {
        assert_eq!("auto".parse(), Ok(Threads::Auto));
        assert!(matches!("4".parse(), Ok(Threads::Fixed(n)) if n.get() == 4));
        for text in ["0", "-1", "many", "1025", ""] {
            assert!(text.parse::<Threads>().is_err(), "{text}");
        }
    }
}
