//! Named cases that share one booted host: each is run, reported and judged by itself; one that fails does not stop the others.

use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::Result;

use super::{Host, Manager};

/// A case with its name, for whichever manager the container is under.
pub type Case = (&'static str, fn(&Host, Manager) -> Result<()>);

/// Runs cases, one after the other or from several threads at once. `BRO_CASE=part` runs those whose name contains that part.
#[derive(Debug, Default)]
pub struct Cases {
    failed: Mutex<Vec<String>>,
    ran: AtomicUsize,
}

impl Cases {
    /// Runs one case, unless `BRO_CASE` is for others.
    pub fn case(&self, name: &str, body: impl FnOnce() -> Result<()>) {
        if std::env::var("BRO_CASE").is_ok_and(|wanted| !name.contains(&wanted)) {
            return;
        }
        self.run(name, body);
    }

    fn run(&self, name: &str, body: impl FnOnce() -> Result<()>) {
        let began = Instant::now();
        self.ran.fetch_add(1, Ordering::Relaxed);
        let ended = catch_unwind(AssertUnwindSafe(body));
        let seconds = began.elapsed().as_secs_f64();
        match ended {
            Ok(Ok(())) => say(&format!("case {name} ... ok ({seconds:.1} s)")),
            Ok(Err(error)) => self.fail(name, &format!("{error:#}"), seconds),
            Err(panic) => {
                let said = panic.downcast_ref::<String>().map(String::as_str);
                let said = said.or(panic.downcast_ref::<&str>().copied()).unwrap_or("panicked");
                self.fail(name, said, seconds);
            }
        }
    }

    /// Runs a case that others stand on, also when `BRO_CASE` is for one of those; whether it has held.
    pub fn needed(&self, name: &str, body: impl FnOnce() -> Result<()>) -> bool {
        let before = self.failures();
        self.run(name, body);
        self.failures() == before
    }

    /// Runs cases that do not mind each other, all at once.
    pub fn at_once(&self, cases: &[(&str, &(dyn Fn() -> Result<()> + Sync))]) {
        std::thread::scope(|scope| {
            for (name, body) in cases {
                scope.spawn(move || self.case(name, body));
            }
        });
    }

    /// Runs cases under the system's manager and under a user's at once, as on a server: most of the time is spent waiting.
    pub fn both(&self, host: &Host, cases: &[Case]) {
        std::thread::scope(|scope| {
            for (kind, manager) in [("rootful", Manager::System), ("rootless", Manager::User("test"))] {
                scope.spawn(move || {
                    for (name, case) in cases {
                        self.case(&format!("{kind}: {name}"), || case(host, manager));
                    }
                });
            }
        });
    }

    /// Fails the test when a case failed.
    pub fn conclude(self) {
        let (ran, failed) =
            (self.ran.into_inner(), self.failed.into_inner().unwrap_or_else(PoisonError::into_inner));
        assert!(ran > 0, "no case has BRO_CASE in its name");
        assert!(failed.is_empty(), "{} of {ran} cases failed: {}", failed.len(), failed.join(", "));
    }

    fn failures(&self) -> usize {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    fn fail(&self, name: &str, why: &str, seconds: f64) {
        say(&format!("case {name} ... FAILED ({seconds:.1} s)\n    {}", why.replace('\n', "\n    ")));
        self.failed.lock().unwrap_or_else(PoisonError::into_inner).push(name.into());
    }
}

/// A figure worth knowing that no test should fail on.
pub fn note(text: &str) {
    say(&format!("note {text}"));
}

/// To the real stderr, as it happens: a suite of minutes must not look dead.
fn say(line: &str) {
    std::io::stderr().write_all(format!("{line}\n").as_bytes()).ok();
}
