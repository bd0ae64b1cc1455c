//! `--keep-awake`: the service is woken without a client when such a time begins, and is not put to sleep for idleness before it ends.

use std::time::{Duration, SystemTime};

use anyhow::bail;
use bro_relay::engine::protocol::Plain;
use tokio::time::Instant;

use super::freeze::Frost;
use super::lifecycle::{LifeChange, Lifecycle, Phase};
use crate::exit::Failure;
use crate::systemd::calendar::{self, DailySpans, Moment, NoAnswer, Outlook};

/// What wakes it without being a client.
pub(super) const BY_CLOCK: &str = "--keep-awake";

/// How far the wall clock may be from where it would have come by itself, before the calendar is asked anew: it was set, or the host
/// was suspended.
const LEAP: Duration = Duration::from_secs(10);

/// When a calendar that did not answer is asked again.
const AGAIN: Duration = Duration::from_secs(60);

/// The calendar's answer.
pub(super) type CalendarAnswer = Result<Outlook, NoAnswer>;

/// The times, and where the present lies.
#[derive(Debug)]
pub(super) struct KeepAwake {
    spans: DailySpans,
    outlook: Outlook,
    /// The calendar was asked then, on both clocks.
    asked_at: (Instant, SystemTime),
    is_asking: bool,
    /// It did not answer; said once.
    has_failed: bool,
    /// The service was woken for the span that the present lies in.
    has_begun: bool,
}

impl KeepAwake {
    /// Looks where the present lies.
    ///
    /// # Errors
    /// [`Failure::Usage`] where systemd knows no such times.
    pub(super) async fn of(values: &[DailySpans]) -> anyhow::Result<Self> {
        let mut this = Self {
            spans: DailySpans::all(values),
            outlook: Outlook::default(),
            asked_at: (Instant::now(), SystemTime::now()),
            is_asking: false,
            has_failed: false,
            has_begun: false,
        };
        if !this.spans.0.is_empty() {
            match calendar::outlook(&this.spans, SystemTime::now()).await {
                Err(error @ (NoAnswer::Refused(_) | NoAnswer::Past(_))) => {
                    bail!(Failure::Usage(format!("--keep-awake: {error}")))
                }
                answer => this.take(answer),
            }
        }
        Ok(this)
    }

    fn take(&mut self, answer: CalendarAnswer) {
        self.is_asking = false;
        match answer {
            Ok(outlook) => {
                self.has_failed = false;
                self.outlook = outlook;
            }
            Err(error) => {
                if !std::mem::replace(&mut self.has_failed, true) {
                    tracing::error!("--keep-awake has no effect for now: {error}");
                }
                self.outlook = Outlook::default();
            }
        }
        self.has_begun &= self.outlook.until.is_some();
    }

    /// The end of the time at which the service is kept awake; it is over only when the calendar has said so, since the next one may
    /// begin at that moment.
    pub(super) const fn until(&self) -> Option<&Moment> {
        self.outlook.until.as_ref()
    }

    /// Is the calendar to be asked anew?
    fn is_due(&self) -> bool {
        if self.spans.0.is_empty() || self.is_asking {
            return false;
        }
        let (then, now) = (self.asked_at, SystemTime::now());
        let elapsed = then.0.elapsed();
        if self.has_failed {
            return elapsed >= AGAIN;
        }
        let expected = then.1 + elapsed;
        let leap = now.duration_since(expected).unwrap_or_else(|behind| behind.duration());
        let until = self.outlook.until.as_ref().map(|moment| moment.at);
        leap > LEAP || until.is_some_and(|at| at <= now) || self.outlook.next.is_some_and(|at| at <= now)
    }
}

/// Did a timer start this process, and no client?
pub(super) fn is_started_by_a_timer() -> bool {
    std::env::var("TRIGGER_UNIT").is_ok_and(|unit| unit.ends_with(".timer"))
}

impl Lifecycle<'_> {
    /// Each second: has such a time begun, or ended?
    pub(super) fn look_at_the_clock(&mut self) {
        if self.keep_awake.is_due() {
            self.keep_awake.is_asking = true;
            self.keep_awake.asked_at = (Instant::now(), SystemTime::now());
            let spans = self.keep_awake.spans.clone();
            self.hear_of(
                async move { LifeChange::Calendar(calendar::outlook(&spans, SystemTime::now()).await) },
            );
        }
        self.begin_to_keep_awake();
    }

    /// What the calendar says.
    pub(super) fn calendar_said(&mut self, answer: CalendarAnswer) {
        let before = self.keep_awake.until().cloned();
        self.keep_awake.take(answer);
        if before.is_some() && self.keep_awake.until().is_none() {
            tracing::info!("the time at which the service is kept awake is over (--keep-awake)");
        }
        self.begin_to_keep_awake();
    }

    fn begin_to_keep_awake(&mut self) {
        let Some(until) = self.keep_awake.outlook.until.as_ref().filter(|_| self.phase == Phase::Serving)
        else {
            return;
        };
        if std::mem::replace(&mut self.keep_awake.has_begun, true) {
            return;
        }
        tracing::info!("the service is kept awake until {} (--keep-awake)", until.said);
        if !self.is_awake() || self.freezing.frost() != Frost::None {
            self.engine.send(Plain::Wake(BY_CLOCK.into()));
        }
    }

    /// A timer has started this process too early, or too late: nothing is there to be done.
    pub(super) fn leave_where_only_a_timer_came(&mut self) {
        if is_started_by_a_timer() && self.keep_awake.until().is_none() {
            self.ask_to_leave();
        }
    }
}
