//! How often a service is started: `--wakes-per-hour`, and an idle time that grows while the same clients wake it again and again.
//! The history is noted in a small file beside the forwarder's notes of ownership: a forwarder leaves when its service sleeps, and
//! the next one goes on counting. `bro activate --remove` and a reboot forget it.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::control_socket;
use crate::exit::on_one_line;
use crate::installed::Installed;
use bro_relay::read_bounded;
use bro_relay::read_bounded::Link;

/// The period of a limit per hour.
const HOUR: Duration = Duration::from_secs(3600);

/// The highest `--wakes-per-hour`; no more starts than this are remembered.
pub const MOST_PER_HOUR: u32 = 1000;

/// So many clients that woke the service are remembered.
const REMEMBERED: usize = 8;

/// Longer than any client's name.
const LONGEST_NAME: usize = 100;

/// Longer than a note of all that.
const LONGEST_NOTE: u64 = 64 * 1024;

/// What happened, on the clock that begins with the boot and goes on in suspend.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct History {
    /// When the service was started, the oldest first.
    starts: VecDeque<Duration>,
    /// The clients that woke it lately, the latest first.
    by: VecDeque<String>,
    /// When it was put to sleep since it was idle; none once it was woken after that.
    slept: Option<Duration>,
    /// How often in a row one of those clients has woken it before it had slept for an idle time.
    returns: u32,
}

impl History {
    /// How long until one more start is within a limit of so many per hour; `None` when one is now.
    fn too_many(&self, limit: u32, now: Duration) -> Option<Duration> {
        let recent = self.starts.iter().filter(|&&start| start + HOUR > now).count();
        // Of the starts that count, the first one that has to be an hour ago.
        let over = recent.checked_sub(limit as usize)?;
        let first = self.starts.iter().filter(|&&start| start + HOUR > now).nth(over)?;
        Some((*first + HOUR).saturating_sub(now))
    }

    fn started(&mut self, now: Duration) {
        self.starts.retain(|&start| start <= now && start + HOUR > now);
        self.starts.push_back(now);
        if self.starts.len() > MOST_PER_HOUR as usize {
            self.starts.pop_front();
        }
    }

    fn woken(&mut self, by: Option<&str>, idle_time: Duration, now: Duration) {
        if let Some(slept) = self.slept.take() {
            let is_known = by.is_some_and(|by| self.by.iter().any(|known| known == by));
            if now.saturating_sub(slept) >= idle_time {
                self.returns = 0;
                self.by.clear();
            } else if is_known {
                self.returns = self.returns.saturating_add(1);
            }
        }
        if let Some(by) = by {
            self.by.retain(|known| known != by);
            self.by.push_front(by.chars().take(LONGEST_NAME).collect());
            self.by.truncate(REMEMBERED);
        }
    }

    /// Twice as long with each return but the first, up to `most`; never shorter than `asked`.
    fn idle_time(&self, asked: Duration, most: Duration) -> Duration {
        let factor = 1_u32.checked_shl(self.returns.saturating_sub(1)).unwrap_or(u32::MAX);
        asked.saturating_mul(factor).min(most.max(asked))
    }
}

/// What the command line allows.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// `--wakes-per-hour`
    pub per_hour: Option<u32>,
    /// `--exit-idle-time`
    pub idle_time: Duration,
    /// `--exit-idle-time-max`
    pub most_idle_time: Duration,
}

/// What `bro status` says of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rhythm {
    /// How often it was started within the last hour.
    pub starts: u32,
    /// How often it may be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
    /// Clients that would wake it are refused for so many seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused_for_s: Option<u64>,
    /// The idle time that has grown, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_time_ms: Option<u64>,
    /// How often in a row the same clients have woken it right after it had gone to sleep.
    #[serde(default)]
    pub returns: u32,
    /// The clients that woke it lately.
    #[serde(default)]
    pub by: Vec<String>,
}

impl Rhythm {
    /// The same in words, where there is something that the administrator wants to know.
    #[must_use]
    pub fn remark(&self) -> Option<String> {
        self.is_remarkable().then(|| self.to_string())
    }

    /// Is there anything that the administrator wants to know?
    fn is_remarkable(&self) -> bool {
        self.refused_for_s.is_some() || self.idle_time_ms.is_some()
    }
}

impl std::fmt::Display for Rhythm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(ms) = self.idle_time_ms {
            write!(
                f,
                "the idle time has grown to {}, for the same clients have woken it {} times in a row right after it had gone to sleep ({})",
                crate::systemd::time_span::roughly(Duration::from_millis(ms)),
                self.returns,
                self.by.join(", ")
            )?;
        }
        if let (Some(seconds), Some(limit)) = (self.refused_for_s, self.limit) {
            let between = if self.idle_time_ms.is_some() { "; " } else { "" };
            write!(
                f,
                "{between}clients that would wake it are refused for {}: it was started {} times within an hour (--wakes-per-hour={limit})",
                // Not another sentence each second.
                crate::systemd::time_span::roughly(Duration::from_secs(seconds.div_ceil(60) * 60)),
                self.starts
            )?;
        }
        Ok(())
    }
}

/// What a forwarder knows of its service's starts.
#[derive(Debug)]
pub struct Wakes {
    /// The unit that it starts; without one nothing outlives it.
    unit: Option<String>,
    limits: Limits,
    history: Mutex<History>,
}

impl Wakes {
    /// Goes on from what a predecessor has noted.
    #[must_use]
    pub fn of(unit: Option<&str>, limits: Limits) -> Self {
        let noted = unit.and_then(|unit| read(&control_socket::base_directory(), unit)).unwrap_or_default();
        Self { unit: unit.map(str::to_owned), limits, history: Mutex::new(noted) }
    }

    fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long clients may not start it, since it was started too often.
    #[must_use]
    pub fn too_many(&self) -> Option<Duration> {
        self.history().too_many(self.limits.per_hour?, since_boot())
    }

    /// It is being started.
    pub fn started(&self) {
        self.change(|history, now| history.started(now));
    }

    /// The service was found asleep: by a client of that source, or by a caller that is no client.
    pub fn woken(&self, by: Option<&str>) {
        let idle_time = self.limits.idle_time;
        self.change(|history, now| history.woken(by, idle_time, now));
    }

    /// It has been put to sleep since it was idle.
    pub fn slept(&self) {
        self.change(|history, now| history.slept = Some(now));
    }

    /// How long it has to be idle now to be put to sleep.
    #[must_use]
    pub fn idle_time(&self) -> Duration {
        self.history().idle_time(self.limits.idle_time, self.limits.most_idle_time)
    }

    /// What `bro status` says of it.
    #[must_use]
    pub fn rhythm(&self) -> Option<Rhythm> {
        let (now, history) = (since_boot(), self.history());
        let idle_time = history.idle_time(self.limits.idle_time, self.limits.most_idle_time);
        let refused = self.limits.per_hour.and_then(|limit| history.too_many(limit, now));
        let starts = history.starts.iter().filter(|&&start| start + HOUR > now).count();
        let rhythm = Rhythm {
            starts: u32::try_from(starts).unwrap_or(u32::MAX),
            limit: self.limits.per_hour,
            refused_for_s: refused.map(|span| span.as_secs() + 1),
            idle_time_ms: (idle_time > self.limits.idle_time)
                .then(|| u64::try_from(idle_time.as_millis()).unwrap_or(u64::MAX)),
            returns: history.returns,
            by: history.by.iter().cloned().collect(),
        };
        (rhythm.limit.is_some() || rhythm.is_remarkable()).then_some(rhythm)
    }

    /// The same in words, where there is something that the administrator wants to know.
    #[must_use]
    pub fn remark(&self) -> Option<String> {
        self.rhythm()?.remark()
    }

    fn change(&self, how: impl FnOnce(&mut History, Duration)) {
        let now = {
            let mut history = self.history();
            how(&mut history, since_boot());
            history.clone()
        };
        let Some(unit) = &self.unit else { return };
        if let Err(error) = write(&control_socket::base_directory(), unit, &now) {
            tracing::debug!(%error, "how often the service was woken is not known after this process's end");
        }
    }
}

/// It is activated no more.
pub(crate) fn forget(installed: &Installed) {
    if let Some((directory, _acting)) = super::failed_wake::place(installed) {
        std::fs::remove_file(file(&directory, &installed.unit)).ok();
    }
}

fn since_boot() -> Duration {
    // It cannot fail for a clock that exists.
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from)
}

fn file(directory: &Path, unit: &str) -> PathBuf {
    directory.join(format!("wakes-{unit}"))
}

fn read(directory: &Path, unit: &str) -> Option<History> {
    let text = read_bounded::read(&file(directory, unit), LONGEST_NOTE, Link::Refuse).ok()?;
    let mut noted: History = serde_json::from_str(&text).ok()?;
    // The file may hold anything by now.
    noted.starts.truncate(MOST_PER_HOUR as usize);
    noted.by.truncate(REMEMBERED);
    for by in &mut noted.by {
        *by = on_one_line(&by.chars().take(LONGEST_NAME).collect::<String>());
    }
    Some(noted)
}

/// Writes all of it or nothing, since other processes may read it meanwhile.
fn write(directory: &Path, unit: &str, history: &History) -> std::io::Result<()> {
    std::fs::create_dir_all(directory)?;
    let new = directory.join(format!(".wakes-{unit}.{}", std::process::id()));
    std::fs::write(&new, serde_json::to_vec(history)?)?;
    std::fs::rename(&new, file(directory, unit)).inspect_err(|_| drop(std::fs::remove_file(&new)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const S: Duration = Duration::from_secs(1);
    const IDLE: Duration = Duration::from_secs(6);

    /// Sleeps, and is woken so much later.
    fn sleeps(history: &mut History, now: &mut Duration, asleep: Duration, by: Option<&str>) -> Duration {
        *now += history.idle_time(IDLE, HOUR);
        history.slept = Some(*now);
        *now += asleep;
        history.woken(by, IDLE, *now);
        history.idle_time(IDLE, HOUR)
    }

    #[test]
    fn the_same_client_again_and_again_lets_it_stay_longer() {
        let (mut history, mut now) = (History::default(), S * 1000);
        history.woken(Some("10.0.0.1"), IDLE, now);
        let spans: Vec<u64> =
            (0..12).map(|_| sleeps(&mut history, &mut now, S, Some("10.0.0.1")).as_secs()).collect();
        assert_eq!(spans, [6, 12, 24, 48, 96, 192, 384, 768, 1536, 3072, 3600, 3600]);
        // Other clients neither let it grow nor shrink, and neither does a caller that is no client.
        assert_eq!(sleeps(&mut history, &mut now, S, Some("10.0.0.2")), HOUR);
        assert_eq!(sleeps(&mut history, &mut now, S, None), HOUR);
        // It has been quiet.
        assert_eq!(sleeps(&mut history, &mut now, IDLE, Some("10.0.0.1")), IDLE);
        assert_eq!(history.returns, 0);
    }

    #[test]
    fn a_limit_counts_the_starts_of_an_hour() {
        let mut history = History::default();
        let (first, second) = (S * 5000, S * 5100);
        history.started(first);
        assert_eq!(history.too_many(2, first), None);
        history.started(second);
        assert_eq!(history.too_many(2, second), Some(HOUR - S * 100));
        assert_eq!(history.too_many(1, second), Some(HOUR));
        assert_eq!(history.too_many(2, first + HOUR - S), Some(S));
        assert_eq!(history.too_many(2, first + HOUR), None);
    }

    #[test]
    fn what_is_noted_is_read_back_bounded_and_harmless() {
        let folder = nix::unistd::mkdtemp(&std::env::temp_dir().join("bro-wakes-XXXXXX")).unwrap();
        assert_eq!(read(&folder, "web.service"), None);
        let mut history = History::default();
        for number in 0..2000_u32 {
            history.started(S * number);
            history.woken(Some(&format!("\u{1b}[2J{number}{}", "x".repeat(5000))), IDLE, S * number);
        }
        write(&folder, "web.service", &history).unwrap();
        let noted = read(&folder, "web.service").unwrap();
        assert_eq!((noted.starts.len(), noted.by.len()), (1000, REMEMBERED));
        assert!(noted.by.iter().all(|by| !by.contains(char::is_control)), "{noted:?}");
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1, "something is left beside it");
        std::fs::write(file(&folder, "web.service"), "x".repeat(200_000)).unwrap();
        assert_eq!(read(&folder, "web.service"), None);
        std::fs::remove_dir_all(folder).unwrap();
    }

    /// What happens to a service: it sleeps, or is woken by one of some, after a while in milliseconds.
    fn life() -> impl Strategy<Value = Vec<(u64, Option<u8>)>> {
        proptest::collection::vec((0_u64..20_000, proptest::option::of(0_u8..4)), 0..200)
    }

    proptest! {
        #[test]
        fn the_idle_time_stays_between_its_limits(life in life(), asked_ms in 1_u64..10_000_000, most_ms in 0_u64..10_000_000) {
            let (asked, most) = (Duration::from_millis(asked_ms), Duration::from_millis(most_ms));
            let (mut history, mut now) = (History::default(), S);
            for (ms, what) in life {
                now += Duration::from_millis(ms);
                match what {
                    None => history.slept = Some(now),
                    Some(who) => history.woken(Some(&who.to_string()), asked, now),
                }
                let span = history.idle_time(asked, most);
                prop_assert!(span >= asked && span <= most.max(asked));
                prop_assert!(history.by.len() <= REMEMBERED);
            }
        }

        /// However starts are asked for, if each one within the limit is made: no hour has more than the limit, and a refused
        /// client is let in at the announced time, and not before.
        #[test]
        fn no_hour_has_more_starts_than_the_limit(waits in proptest::collection::vec(0_u64..2_000, 1..300), limit in 1_u32..12) {
            let (mut history, mut now, mut made) = (History::default(), S, Vec::new());
            for seconds in waits {
                now += S * u32::try_from(seconds).unwrap();
                match history.too_many(limit, now) {
                    None => {
                        history.started(now);
                        made.push(now);
                    }
                    Some(wait) => {
                        prop_assert!(wait > Duration::ZERO && wait <= HOUR);
                        prop_assert!(history.too_many(limit, now + wait).is_none());
                        prop_assert!(history.too_many(limit, now + wait - Duration::from_nanos(1)).is_some());
                    }
                }
            }
            for (number, start) in made.iter().enumerate() {
                let within = made[number..].iter().filter(|&&other| other < *start + HOUR).count();
                prop_assert!(within <= limit as usize, "{within} from {start:?} on");
            }
        }
    }
}
