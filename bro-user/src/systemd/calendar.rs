//! Daily spans of time such as `Mon..Fri 09:00..18:00` (`--keep-awake`). What a calendar expression means is for systemd's own parser
//! to say, `systemd-analyze calendar`; here one is taken apart, and put into words that this parser takes (systemd.time(7)).

use std::fmt;
use std::process::Stdio;
use std::str::FromStr;
use std::time::{Duration, SystemTime};

use tokio::io::AsyncReadExt as _;
use tokio::process::Command;
use tokio::time::timeout;

/// How long systemd-analyze may take.
const LIMIT: Duration = Duration::from_secs(10);

/// How much of its output is read.
const LONGEST_OUTPUT: u64 = 16 << 10;

/// The longest value, and the most spans in one.
const LONGEST: usize = 256;
const MOST: usize = 32;

/// A day, and the hour that the clocks may be put back by.
const DAY: Duration = Duration::from_secs(25 * 3600);

/// A span of time on some days: `[DAYS] START..END [ZONE]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DailySpan {
    /// As it was written, with single spaces.
    text: String,
    /// The calendar expression for its beginnings.
    begins: String,
    /// The one for its ends: the next one after a beginning is that one's.
    ends: String,
}

impl DailySpan {
    /// Its beginnings, as a calendar expression.
    #[must_use]
    pub fn begins(&self) -> &str {
        &self.begins
    }
}

impl fmt::Display for DailySpan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Why a text is no such span.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidTimes {
    /// Not one pair of times.
    #[error("“{0}” is not DAYS START..END, such as Mon..Fri 09:00..18:00 (DAYS may be left out)")]
    Form(String),
    /// No time of day.
    #[error("“{0}” is not a time of day such as 09:00 or 17:30:15")]
    Time(String),
    /// Longer, or more, than is read.
    #[error("at most {MOST} spans of at most {LONGEST} characters can be given")]
    TooMuch,
}

/// Reads HH:MM or HH:MM:SS; 24:00 only where a day may end.
fn time_of_day(text: &str, may_end_a_day: bool) -> Result<&str, InvalidTimes> {
    let invalid = || InvalidTimes::Time(text.to_owned());
    let parts: Vec<&str> = text.split(':').collect();
    if !(2..=3).contains(&parts.len()) {
        return Err(invalid());
    }
    for (part, most) in parts.iter().zip([23, 59, 59]) {
        let number =
            (part.len() <= 2 && part.bytes().all(|byte| byte.is_ascii_digit())).then(|| part.parse::<u32>());
        let ends_a_day = may_end_a_day && ["24:00", "24:00:00"].contains(&text);
        match number {
            Some(Ok(number)) if number <= most || ends_a_day => {}
            _ => return Err(invalid()),
        }
    }
    Ok(if text.starts_with("24:") { "00:00" } else { text })
}

impl FromStr for DailySpan {
    type Err = InvalidTimes;

    fn from_str(text: &str) -> Result<Self, InvalidTimes> {
        let form = || InvalidTimes::Form(text.trim().to_owned());
        if text.len() > LONGEST {
            return Err(InvalidTimes::TooMuch);
        }
        let words: Vec<&str> = text.split_whitespace().collect();
        // Days are a range as well, without colons.
        let mut pairs = words.iter().enumerate().filter_map(|(at, word)| {
            let (start, end) = word.split_once("..")?;
            (start.contains(':') || end.contains(':')).then_some((at, (start, end)))
        });
        let (Some((at, (start, end))), None) = (pairs.next(), pairs.next()) else { return Err(form()) };
        if words
            .iter()
            .any(|word| word.contains([';', '%']) || !word.bytes().all(|byte| byte.is_ascii_graphic()))
        {
            return Err(form());
        }
        let (start, end) = (time_of_day(start, false)?, time_of_day(end, true)?);
        let with = |before: &[&str], time: &str| {
            let words = before.iter().chain([&time]).chain(&words[at + 1..]);
            words.copied().collect::<Vec<_>>().join(" ")
        };
        Ok(Self { begins: with(&words[..at], start), ends: with(&["*-*-*"], end), text: words.join(" ") })
    }
}

/// The value of `--keep-awake`: spans with semicolons between them, or `never`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DailySpans(pub Vec<DailySpan>);

impl DailySpans {
    /// All of several values.
    #[must_use]
    pub fn all(values: &[Self]) -> Self {
        Self(values.iter().flat_map(|value| value.0.iter().cloned()).collect())
    }
}

impl fmt::Display for DailySpans {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.split_first() {
            None => f.write_str("never"),
            Some((first, rest)) => {
                write!(f, "{first}")?;
                rest.iter().try_for_each(|span| write!(f, ";{span}"))
            }
        }
    }
}

impl FromStr for DailySpans {
    type Err = InvalidTimes;

    fn from_str(text: &str) -> Result<Self, InvalidTimes> {
        if text.trim() == "never" {
            return Ok(Self::default());
        }
        let spans = text.split(';').map(str::parse).collect::<Result<Vec<_>, _>>()?;
        if spans.len() > MOST { Err(InvalidTimes::TooMuch) } else { Ok(Self(spans)) }
    }
}

/// Why systemd's parser gives no answer.
#[derive(Debug, thiserror::Error)]
pub enum NoAnswer {
    /// It knows no such expression.
    #[error(
        "systemd reads no calendar expression in “{0}” (systemd.time(7), or `systemd-analyze calendar '{0}'`)"
    )]
    Refused(String),
    /// The expression names the past alone.
    #[error("“{0}” lies in the past: it never begins")]
    Past(String),
    /// It cannot be asked.
    #[error("systemd-analyze, which reads calendar expressions, cannot be asked: {0}")]
    Unavailable(String),
}

/// A moment of the calendar.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moment {
    /// When.
    pub at: SystemTime,
    /// The same in systemd's words: `Mon 2026-11-30 18:00:00 CET`.
    pub said: String,
}

/// What the calendar says of a moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outlook {
    /// The end of the span that it lies in, if it lies in one.
    pub until: Option<Moment>,
    /// When the next span begins.
    pub next: Option<SystemTime>,
}

/// Looks where `now` lies.
///
/// # Errors
/// [`NoAnswer`]
pub async fn outlook(spans: &DailySpans, now: SystemTime) -> Result<Outlook, NoAnswer> {
    let mut outlook = Outlook::default();
    for span in &spans.0 {
        // One a day at most: of three the last one that has begun is the one that may go on, and the next one is the next.
        let begun = elapses(&span.begins, now.checked_sub(DAY).unwrap_or(now), 3).await?;
        if let Some(began) = begun.iter().rev().find(|moment| moment.at <= now)
            && let Some(end) = elapses(&span.ends, began.at, 1).await?.into_iter().next()
            && end.at > now
            && outlook.until.as_ref().is_none_or(|until| until.at < end.at)
        {
            outlook.until = Some(end);
        }
        let next = begun.iter().map(|moment| moment.at).find(|at| *at > now);
        outlook.next = [outlook.next, next].into_iter().flatten().min();
    }
    Ok(outlook)
}

/// Will each of them ever begin?
///
/// # Errors
/// [`NoAnswer`]
pub async fn check(spans: &DailySpans) -> Result<(), NoAnswer> {
    let now = SystemTime::now();
    for span in &spans.0 {
        if elapses(&span.begins, now.checked_sub(DAY).unwrap_or(now), 1).await?.is_empty() {
            return Err(NoAnswer::Past(span.text.clone()));
        }
    }
    Ok(())
}

/// The first moments of an expression after another moment.
async fn elapses(expression: &str, after: SystemTime, count: u32) -> Result<Vec<Moment>, NoAnswer> {
    let unavailable = |error: &dyn fmt::Display| NoAnswer::Unavailable(error.to_string());
    let since = after.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let (base, count) = (format!("--base-time=@{}", since.as_secs()), format!("--iterations={count}"));
    let mut child = Command::new("systemd-analyze")
        .args(["calendar", &base, &count, "--", expression])
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| unavailable(&error))?;
    let (Some(out), Some(err)) = (child.stdout.take(), child.stderr.take()) else {
        return Err(unavailable(&"it has no output"));
    };
    let mut said = (String::new(), String::new());
    let reading = async {
        let (mut out, mut err) = (out.take(LONGEST_OUTPUT), err.take(LONGEST_OUTPUT));
        let (one, other) = tokio::join!(out.read_to_string(&mut said.0), err.read_to_string(&mut said.1));
        one.and(other)?;
        child.wait().await
    };
    match timeout(LIMIT, reading).await {
        Ok(Ok(status)) if status.success() => Ok(read(&said.0)),
        Ok(Ok(_)) if said.1.contains("Failed to parse calendar") => {
            Err(NoAnswer::Refused(expression.to_owned()))
        }
        Ok(Ok(status)) => Err(unavailable(&said.1.lines().next().map_or(status.to_string(), str::to_owned))),
        Ok(Err(error)) => Err(unavailable(&error)),
        Err(_) => Err(unavailable(&format_args!("it takes longer than {LIMIT:?}"))),
    }
}

/// Reads what systemd-analyze prints: `Next elapse:` and `Iteration #2:`, each followed by `(in UTC):` where that is not the same.
fn read(text: &str) -> Vec<Moment> {
    let mut moments: Vec<Moment> = Vec::new();
    for line in text.lines() {
        let Some((key, said)) = line.trim().split_once(": ") else { continue };
        let Some(at) = utc(said) else { continue };
        if key == "Next elapse" || key.starts_with("Iter") {
            moments.push(Moment { at, said: said.to_owned() });
        } else if key == "(in UTC)"
            && let Some(last) = moments.last_mut()
        {
            last.at = at;
        }
    }
    moments
}

/// `Mon 2026-11-30 18:00:00 UTC`, whatever its zone is called.
fn utc(text: &str) -> Option<SystemTime> {
    let mut words = text.split(' ').skip(1);
    let (date, time) = (words.next()?, words.next()?);
    let numbers = |text: &str, by: char| -> Option<[u64; 3]> {
        let numbers: Option<Vec<u64>> = text.split(by).map(|number| number.parse().ok()).collect();
        numbers?.try_into().ok()
    };
    let ([year, month, day], [hour, minute, second]) = (numbers(date, '-')?, numbers(time, ':')?);
    let months = month.checked_sub(1).filter(|month| *month < 12)?;
    let is_leap =
        |year: u64| (year.is_multiple_of(4) && !year.is_multiple_of(100)) || year.is_multiple_of(400);
    let years = (1970..year.min(10_000)).map(|year| if is_leap(year) { 366 } else { 365 }).sum::<u64>();
    let lengths = [31, if is_leap(year) { 29 } else { 28 }, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let days =
        years + lengths.iter().take(usize::try_from(months).ok()?).sum::<u64>() + day.checked_sub(1)?;
    let since = Duration::from_secs(days * 86_400 + hour * 3600 + minute * 60 + second);
    SystemTime::UNIX_EPOCH.checked_add(since)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn days_and_times_are_taken_apart() {
        for (text, begins, ends) in [
            ("Mon..Fri 09:00..18:00", "Mon..Fri 09:00", "*-*-* 18:00"),
            ("  22:30..6:00:30 ", "22:30", "*-*-* 6:00:30"),
            (
                "Sat,Sun *-12-* 00:00..24:00 Europe/Berlin",
                "Sat,Sun *-12-* 00:00 Europe/Berlin",
                "*-*-* 00:00 Europe/Berlin",
            ),
        ] {
            let span: DailySpan = text.parse().unwrap();
            assert_eq!((span.begins(), span.ends.as_str()), (begins, ends));
            assert_eq!(span.to_string(), text.trim());
        }
        for (text, said) in [
            ("", "“” is not DAYS START..END"),
            ("Mon..Fri", "“Mon..Fri” is not DAYS START..END"),
            ("9..18", "“9..18” is not DAYS"),
            ("09:00..10:00 11:00..12:00", "is not DAYS"),
            ("Mon..Fri 09:00..", "“” is not a time of day"),
            ("09:00..24:01", "“24:01” is not a time of day"),
            ("24:00..08:00", "“24:00” is not a time of day"),
            ("09:60..10:00", "“09:60” is not a time of day"),
            ("+9:00..10:00", "“+9:00” is not a time of day"),
            ("Mön 09:00..10:00", "is not DAYS"),
            ("%t 09:00..10:00", "is not DAYS"),
        ] {
            let error = text.parse::<DailySpan>().unwrap_err().to_string();
            assert!(error.contains(said), "{text}: {error}");
        }
        assert_eq!("never".parse(), Ok(DailySpans::default()));
        assert_eq!(DailySpans::default().to_string(), "never");
        assert_eq!(
            "1:00..2:00;".repeat(MOST + 1).trim_end_matches(';').parse::<DailySpans>(),
            Err(InvalidTimes::TooMuch)
        );
    }

    #[test]
    fn reads_what_systemd_analyze_prints() {
        let utc = "  Original form: Mon..Fri 09:00\nNormalized form: Mon..Fri *-*-* 09:00:00\n    Next elapse: Tue 2025-11-25 \
                   09:00:00 UTC\n       From now: 1 year 0 months ago\n       Iter. #2: Wed 2025-11-26 09:00:00 UTC\n";
        let moments = read(utc);
        assert_eq!(
            moments.iter().map(|moment| moment.at).collect::<Vec<_>>(),
            [at(1_764_061_200), at(1_764_147_600)]
        );
        let berlin = "    Next elapse: Tue 2025-11-25 09:00:00 CET\n       (in UTC): Tue 2025-11-25 08:00:00 UTC\n       From \
                      now: 1 year 0 months ago\n   Iteration #2: Wed 2025-11-26 09:00:00 CET\n       (in UTC): Wed 2025-11-26 \
                      08:00:00 UTC\n";
        let moments = read(berlin);
        assert_eq!(
            moments.iter().map(|moment| moment.at).collect::<Vec<_>>(),
            [at(1_764_057_600), at(1_764_144_000)]
        );
        assert_eq!(moments[0].said, "Tue 2025-11-25 09:00:00 CET");
        assert_eq!(read("  Original form: 2020-01-01 09:00\n    Next elapse: never\n"), []);
        assert_eq!(super::utc("Thu 2024-02-29 23:59:59 UTC"), Some(at(1_709_251_199)));
        assert_eq!(super::utc("Thu 1970-01-01 00:00:00 UTC"), Some(at(0)));
    }

    proptest! {
        /// Whatever is written: what is read is written as it was, and read again the same.
        #[test]
        fn what_is_read_is_written_so(text in "\\PC{0,40}|[A-Za-z.,*]{0,8} ?[0-9:]{0,8}\\.\\.[0-9:]{0,8}( [A-Za-z/]{1,9})?") {
            if let Ok(spans) = text.parse::<DailySpans>() {
                prop_assert_eq!(spans.to_string().parse::<DailySpans>(), Ok(spans));
            }
        }

        /// Every proper pair of times is one.
        #[test]
        fn times_of_day_are_taken(start in 0..1440u32, end in 0..1440u32, days in "(Mon|Sat,Sun|Mon\\.\\.Fri|) ?") {
            let (start, end) = (format!("{:02}:{:02}", start / 60, start % 60), format!("{:02}:{:02}", end / 60, end % 60));
            let span: DailySpan = format!("{days} {start}..{end}").parse().unwrap();
            prop_assert!(span.begins.ends_with(&start) && span.ends.ends_with(&end));
        }

        /// No output of another program's makes this one fail.
        #[test]
        fn any_output_is_read(text in "(Next elapse: |Iteration #2: |\\(in UTC\\): |[a-z]{0,3} [0-9-]{0,12} [0-9:]{0,12} |\n|\\PC){0,20}") {
            let _moments = read(&text);
        }
    }
}
