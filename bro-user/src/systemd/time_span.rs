//! Time spans as systemd.time(7) writes them: `90`, `500ms`, `1min 30s`, `2h`, `infinity`.
//!
//! Our own hundred lines: a span that is too long is an error here, and infinity is no number (ARCHITECTURE.md, "Why each library").

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A span of time, or `infinity`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimeSpan {
    /// So long.
    Finite(Duration),
    /// Never.
    Infinite,
}

impl TimeSpan {
    /// The duration, or `None` for infinity.
    #[must_use]
    pub const fn finite(self) -> Option<Duration> {
        match self {
            Self::Finite(span) => Some(span),
            Self::Infinite => None,
        }
    }

    /// The duration, with infinity as a time that no process reaches (a hundred years).
    #[must_use]
    pub const fn or_forever(self) -> Duration {
        match self {
            Self::Finite(span) => span,
            Self::Infinite => Duration::from_secs(100 * 365 * 86_400),
        }
    }
}

/// Why a text is not a time span.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidTimeSpan {
    /// Nothing there.
    #[error("a time span is missing; write for example 90, 500ms, 1min 30s or infinity")]
    Empty,
    /// No number where there has to be one.
    #[error("“{0}” is not a number; write for example 90, 500ms, 1min 30s or infinity")]
    Number(String),
    /// A unit that systemd.time(7) does not have.
    #[error("“{0}” is not a unit of time; the units are us, ms, s, min, h, d and w")]
    Unit(String),
    /// More than a u64 of nanoseconds.
    #[error("“{0}” is too long a time; write infinity for no limit")]
    TooLong(String),
    /// Nothing could happen within it.
    #[error("a limit of no time at all lets nothing happen; write infinity for no limit")]
    Zero,
    /// More or less than tcp(7) takes.
    #[error("the kernel takes 1s to 32767s (some 9 hours) for it")]
    Keepalive,
    /// Less than a round trip may take.
    #[error("an acknowledgement may take a second; write 1s or more, or infinity for no limit")]
    TooSoon,
}

/// Nanoseconds in one of systemd.time(7)'s units.
fn unit(name: &str) -> Option<u64> {
    const SECOND: u64 = 1_000_000_000;
    Some(match name {
        "ns" | "nsec" => 1,
        "us" | "µs" | "μs" | "usec" => 1_000,
        "ms" | "msec" => 1_000_000,
        "" | "s" | "sec" | "second" | "seconds" => SECOND,
        "m" | "min" | "minute" | "minutes" => 60 * SECOND,
        "h" | "hr" | "hour" | "hours" => 3_600 * SECOND,
        "d" | "day" | "days" => 86_400 * SECOND,
        "w" | "week" | "weeks" => 7 * 86_400 * SECOND,
        "M" | "month" | "months" => 2_629_800 * SECOND,
        "y" | "year" | "years" => 31_557_600 * SECOND,
        _ => return None,
    })
}

impl FromStr for TimeSpan {
    type Err = InvalidTimeSpan;

    fn from_str(text: &str) -> Result<Self, InvalidTimeSpan> {
        let mut rest = text.trim();
        match rest {
            "" => return Err(InvalidTimeSpan::Empty),
            "infinity" => return Ok(Self::Infinite),
            _ => {}
        }
        let too_long = || InvalidTimeSpan::TooLong(text.trim().to_owned());
        let mut total: u64 = 0;
        while !rest.is_empty() {
            let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
            let (number, tail) = rest.split_at(digits);
            let tail = tail.trim_start();
            let letters = tail.find(|c: char| !c.is_alphabetic()).unwrap_or(tail.len());
            let (name, tail) = tail.split_at(letters);
            let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
            if number.is_empty() || (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
                return Err(InvalidTimeSpan::Number(rest.to_owned()));
            }
            let scale = unit(name).ok_or_else(|| InvalidTimeSpan::Unit(name.to_owned()))?;
            let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().map_err(|_| too_long())? };
            total = whole.checked_mul(scale).and_then(|span| total.checked_add(span)).ok_or_else(too_long)?;
            let mut place = scale;
            for digit in fraction.bytes() {
                place /= 10;
                total = total.checked_add(u64::from(digit - b'0') * place).ok_or_else(too_long)?;
            }
            rest = tail.trim_start();
        }
        Ok(Self::Finite(Duration::from_nanos(total)))
    }
}

impl fmt::Display for TimeSpan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Infinite => f.write_str("infinity"),
            Self::Finite(span) => write!(f, "{span:?}"),
        }
    }
}

/// Reads a limit within which something has to happen, so one that is not 0.
///
/// # Errors
/// For 0, and for what is no time span.
pub fn limit(text: &str) -> Result<TimeSpan, InvalidTimeSpan> {
    match text.parse()? {
        TimeSpan::Finite(Duration::ZERO) => Err(InvalidTimeSpan::Zero),
        span => Ok(span),
    }
}

/// The shortest and the longest that tcp(7) accepts for keepalive times.
const KEEPALIVE: std::ops::RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(32_767);

/// Reads one of TCP keepalive's times.
///
/// # Errors
/// For what the kernel does not take, and for what is no time span.
pub fn keepalive(text: &str) -> Result<TimeSpan, InvalidTimeSpan> {
    match text.parse()? {
        TimeSpan::Finite(span) if KEEPALIVE.contains(&span) => Ok(TimeSpan::Finite(span)),
        TimeSpan::Finite(_) | TimeSpan::Infinite => Err(InvalidTimeSpan::Keepalive),
    }
}

/// The two largest units of a span.
pub(crate) fn roughly(span: Duration) -> String {
    let seconds = span.as_secs();
    let units = [
        ("d", seconds / 86_400),
        ("h", seconds / 3600 % 24),
        ("min", seconds / 60 % 60),
        ("s", seconds % 60),
    ];
    let first = units.iter().position(|(_, count)| *count > 0).unwrap_or(3);
    let parts = units[first..].iter().take(2).filter(|(_, count)| *count > 0 || first == 3);
    parts.map(|(unit, count)| format!("{count}{unit}")).collect::<Vec<_>>().join(" ")
}

/// Reads how long a side may leave data unacknowledged.
///
/// # Errors
/// As for every time span, and when it is less than a second.
pub fn user_timeout(text: &str) -> Result<TimeSpan, InvalidTimeSpan> {
    match text.parse()? {
        TimeSpan::Finite(span) if span < Duration::from_secs(1) => Err(InvalidTimeSpan::TooSoon),
        span => Ok(span),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn millis(text: &str) -> u128 {
        text.parse::<TimeSpan>().unwrap().finite().unwrap().as_millis()
    }

    #[test]
    fn reads_what_systemd_reads() {
        assert_eq!(millis("90"), 90_000);
        assert_eq!(millis("1min 30s"), 90_000);
        assert_eq!(millis("1min30s"), 90_000);
        assert_eq!(millis("500 ms"), 500);
        assert_eq!(millis("1.5h"), 5_400_000);
        assert_eq!(millis(".5"), 500);
        assert_eq!(millis("2d"), 172_800_000);
        assert_eq!("infinity".parse(), Ok(TimeSpan::Infinite));
    }

    #[test]
    fn refuses_with_the_reason() {
        assert_eq!("".parse::<TimeSpan>(), Err(InvalidTimeSpan::Empty));
        assert_eq!("soon".parse::<TimeSpan>(), Err(InvalidTimeSpan::Number("soon".into())));
        assert_eq!("-1".parse::<TimeSpan>(), Err(InvalidTimeSpan::Number("-1".into())));
        assert_eq!("1..2".parse::<TimeSpan>(), Err(InvalidTimeSpan::Number("1..2".into())));
        assert_eq!("5parsecs".parse::<TimeSpan>(), Err(InvalidTimeSpan::Unit("parsecs".into())));
        assert_eq!("99999999999y".parse::<TimeSpan>(), Err(InvalidTimeSpan::TooLong("99999999999y".into())));
    }

    #[test]
    fn refuses_spans_that_an_option_cannot_have() {
        for zero in ["0", "0s", "0min 0ms", "0.0"] {
            assert_eq!(limit(zero), Err(InvalidTimeSpan::Zero), "{zero}");
        }
        assert_eq!(limit("1us"), Ok(TimeSpan::Finite(Duration::from_micros(1))));
        assert_eq!(limit("infinity"), Ok(TimeSpan::Infinite));
        for out_of_range in ["0", "10ms", "999ms", "32768", "32767.1s", "99999999", "infinity"] {
            assert_eq!(keepalive(out_of_range), Err(InvalidTimeSpan::Keepalive), "{out_of_range}");
            let user = (user_timeout("999ms"), user_timeout("infinity"));
            assert_eq!(user, (Err(InvalidTimeSpan::TooSoon), Ok(TimeSpan::Infinite)));
        }
        for within in ["1", "1.5s", "2h", "32767"] {
            assert!(keepalive(within).is_ok(), "{within}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(text in "\\PC{0,24}") {
            text.parse::<TimeSpan>().ok();
        }

        #[test]
        fn sums_its_parts(h in 0u64..1000, m in 0u64..1000, ms in 0u64..100_000) {
            prop_assert_eq!(millis(&format!("{h}h {m}min {ms}ms")), u128::from(h * 3_600_000 + m * 60_000 + ms));
        }
    }
}
