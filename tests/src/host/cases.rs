//! Named cases that share one booted host: each is run, reported and judged by itself; one that fails does not stop the others.

use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use anyhow::Result;

/// Runs cases one after the other. `BRO_CASE=part` runs those whose name contains that part.
#[derive(Debug, Default)]
pub struct Cases {
    failed: Vec<String>,
    ran: usize,
}

impl Cases {
    /// Runs one case, unless `BRO_CASE` is for others.
    pub fn case(&mut self, name: &str, body: impl FnOnce() -> Result<()>) {
        if std::env::var("BRO_CASE").is_ok_and(|wanted| !name.contains(&wanted)) {
            return;
        }
        let began = Instant::now();
        self.ran += 1;
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

    /// Fails the test when a case failed.
    pub fn conclude(self) {
        assert!(self.ran > 0, "no case has BRO_CASE in its name");
        assert!(
            self.failed.is_empty(),
            "{} of {} cases failed: {}",
            self.failed.len(),
            self.ran,
            self.failed.join(", ")
        );
    }

    fn fail(&mut self, name: &str, why: &str, seconds: f64) {
        say(&format!("case {name} ... FAILED ({seconds:.1} s)\n    {}", why.replace('\n', "\n    ")));
        self.failed.push(name.into());
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
