//! An abort that has not been passed on yet. It overtakes no byte: what its side had sent before is delivered first, until the
//! other side has acknowledged it, within limits.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{getsockopt, sockopt};

use super::End;
use crate::relay::{Broken, Side};

/// How long the other side may acknowledge not one byte of what it is owed.
pub const STALLED: Duration = Duration::from_secs(30);

/// How long it may take for all of it.
pub const WHOLE: Duration = Duration::from_secs(600);

/// Between two looks at what is still to be acknowledged: as long as it has taken so far, within these.
const PAUSES: [Duration; 2] = [Duration::from_millis(1), Duration::from_millis(250)];

/// How far the other side has come with what it is owed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AbortProgress {
    /// Bytes put into its socket so far.
    pub delivered: u64,
    /// The memory of the bytes that it has not acknowledged yet.
    pub queued: u64,
}

/// One side's abort.
#[derive(Debug)]
pub struct Abort {
    /// The side that aborted.
    pub side: Side,
    /// What the kernel said, once that is known.
    errno: Option<Errno>,
    since: Instant,
    progressed: Instant,
    progress: AbortProgress,
}

/// What a look at a connection comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AbortVerdict {
    /// Look again then.
    Wait(Instant),
    /// It does not take what it is owed: the abort is passed on now.
    Overdue,
}

impl Abort {
    /// One that has become known `now`.
    #[must_use]
    pub const fn new(side: Side, errno: Option<Errno>, now: Instant) -> Self {
        let progress = AbortProgress { delivered: 0, queued: u64::MAX };
        Self { side, errno, since: now, progressed: now, progress }
    }

    /// What a call on the side's socket failed with.
    pub fn tell(&mut self, errno: Option<Errno>) {
        self.errno = self.errno.or(errno);
    }

    /// How the connection ends; `socket` is the side's.
    #[must_use]
    pub fn end(&self, socket: Option<BorrowedFd<'_>>) -> End {
        let pending = || match getsockopt(&socket?, sockopt::SocketError) {
            Ok(0) | Err(_) => None,
            Ok(code) => Some(Errno::from_raw(code)),
        };
        let errno = self.errno.or_else(pending).unwrap_or(Errno::ECONNRESET);
        Broken { side: self.side, errno }.into()
    }

    /// The other side has come so far, `now`.
    pub fn look(&mut self, now: Instant, progress: AbortProgress) -> AbortVerdict {
        // What is queued may grow without a byte of ours: the kernel cuts it into other pieces.
        if progress.delivered != self.progress.delivered || progress.queued < self.progress.queued {
            self.progressed = now;
        }
        self.progress = progress;
        if now - self.progressed >= STALLED || now - self.since >= WHOLE {
            return AbortVerdict::Overdue;
        }
        let [least, most] = PAUSES;
        AbortVerdict::Wait(now + (now - self.since).clamp(least, most))
    }

    /// When the other side was last seen to take something.
    #[must_use]
    pub const fn progressed(&self) -> Instant {
        self.progressed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn progress(delivered: u64, queued: u64) -> AbortProgress {
        AbortProgress { delivered, queued }
    }

    /// Looks as often as it is asked to; says when it was overdue, and how often that was. `progress` by the time that has passed.
    fn wait_for(mut progress: impl FnMut(Duration) -> AbortProgress) -> (Duration, u32) {
        let (start, mut now, mut looks) = (Instant::now(), Instant::now(), 0);
        let mut abort = Abort::new(Side::Service, None, now);
        loop {
            looks += 1;
            match abort.look(now, progress(now - start)) {
                AbortVerdict::Wait(until) => {
                    assert!(until > now, "no pause between two looks");
                    now = until;
                }
                AbortVerdict::Overdue => return (now - start, looks),
            }
        }
    }

    #[test]
    fn one_that_takes_nothing_is_waited_for_half_a_minute() {
        let (waited, looks) = wait_for(|_| progress(5, 1000));
        assert!(waited >= STALLED && waited < STALLED + PAUSES[1] * 2, "{waited:?}");
        assert!(looks < 150, "{looks} looks");
    }

    #[test]
    fn one_that_takes_a_little_now_and_then_is_waited_for_ten_minutes() {
        let (waited, _) = wait_for(|passed| progress(5, 1_000_000 - passed.as_secs() / 29));
        assert!(waited >= WHOLE && waited < WHOLE + PAUSES[1] * 2, "{waited:?}");
    }

    #[test]
    fn other_pieces_are_no_progress() {
        let (waited, _) = wait_for(|passed| progress(5, 1000 + passed.as_secs()));
        assert!(waited < STALLED + PAUSES[1] * 2, "{waited:?}");
    }

    proptest! {
        #[test]
        fn passing_on_takes_at_most_twice_as_long_as_taking(after in 1u64..20_000) {
            let (start, mut now) = (Instant::now(), Instant::now());
            let mut abort = Abort::new(Side::Client, None, now);
            let taken = start + Duration::from_millis(after);
            while now < taken {
                let AbortVerdict::Wait(until) = abort.look(now, progress(0, 1)) else { panic!("overdue") };
                now = until;
            }
            let late = now - taken;
            prop_assert!(late <= PAUSES[1] && late <= Duration::from_millis(after), "{late:?} late");
        }
    }
}
