//! Named cases that share one booted host: each is run, reported and judged by itself; one that fails does not stop the others.

use std::fmt::Write as _;
use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context as _, Result};
use serde_json::json;

use super::{Host, Manager, undo};

/// A case with its name, for whichever manager the container is under.
pub type Case = (&'static str, fn(&Host, Manager) -> Result<()>);

const MANAGERS: [(&str, Manager); 2] = [("rootful", Manager::System), ("rootless", Manager::User("test"))];

/// Which cases `BRO_CASE` names: those with `part` in their names, or, one a line, those with just these names.
#[derive(Debug)]
enum Wanted {
    All,
    Part(String),
    Exactly(Vec<String>),
}

impl Wanted {
    fn new(named: Option<String>) -> Self {
        match named {
            None => Self::All,
            Some(lines) if lines.contains('\n') => Self::Exactly(lines.lines().map(str::to_owned).collect()),
            Some(part) => Self::Part(part),
        }
    }

    fn has(&self, name: &str) -> bool {
        match self {
            Self::All => true,
            Self::Part(part) => name.contains(part),
            Self::Exactly(names) => names.iter().any(|wanted| wanted == name),
        }
    }
}

/// A case that did not hold.
#[derive(Debug)]
struct Failed {
    name: String,
    said: String,
    /// Others stand on it, which have not run.
    needed: bool,
}

/// Runs cases, one after the other or from several threads at once. `BRO_CASE=part` runs those whose name contains that part;
/// with a line end in it, those whose name is one of its lines.
#[derive(Debug)]
pub struct Cases {
    wanted: Wanted,
    failed: Mutex<Vec<Failed>>,
    ran: Mutex<Vec<String>>,
}

impl Default for Cases {
    fn default() -> Self {
        Self {
            wanted: Wanted::new(std::env::var("BRO_CASE").ok()),
            failed: Mutex::default(),
            ran: Mutex::default(),
        }
    }
}

impl Cases {
    /// Runs one case, unless `BRO_CASE` is for others.
    pub fn case(&self, name: &str, body: impl FnOnce() -> Result<()>) {
        if self.wanted.has(name) {
            self.run(name, false, body);
        }
    }

    /// Runs one case on a host that it has for itself. One that fails leaves nothing that would have a later case fail, too.
    pub fn on(&self, host: &Host, name: &str, body: impl FnOnce() -> Result<()>) {
        self.case(name, || undoing(body, || undo::all(host)));
    }

    /// The same for a case that reboots the host.
    pub fn rebooting(&self, host: &mut Host, name: &str, body: fn(&mut Host) -> Result<()>) {
        self.case(name, || {
            let ended = catch_unwind(AssertUnwindSafe(|| body(host)));
            undoing(|| ended.unwrap_or_else(|panic| resume_unwind(panic)), || undo::all(host))
        });
    }

    fn run(&self, name: &str, needed: bool, body: impl FnOnce() -> Result<()>) {
        let began = Instant::now();
        locked(&self.ran).push(name.to_owned());
        let ended = catch_unwind(AssertUnwindSafe(body));
        let seconds = began.elapsed().as_secs_f64();
        let why = match ended {
            Ok(Ok(())) => return say(&format!("case {name} ... ok ({seconds:.1} s)")),
            Ok(Err(error)) => format!("{error:#}"),
            Err(panic) => {
                let said = panic.downcast_ref::<String>().map(String::as_str);
                said.or(panic.downcast_ref::<&str>().copied()).unwrap_or("panicked").to_owned()
            }
        };
        say(&format!("case {name} ... FAILED ({seconds:.1} s)\n    {}", why.replace('\n', "\n    ")));
        locked(&self.failed).push(Failed { name: name.to_owned(), said: why, needed });
    }

    /// Runs a case that others stand on, also when `BRO_CASE` is for one of those; whether it has held.
    pub fn needed(&self, name: &str, body: impl FnOnce() -> Result<()>) -> bool {
        let before = locked(&self.failed).len();
        self.run(name, true, body);
        locked(&self.failed).len() == before
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
            for manager in MANAGERS {
                scope.spawn(move || self.under(host, manager, cases));
            }
        });
    }

    /// Runs cases under the system's manager, and then under a user's: no other case computes beside one of them.
    pub fn each(&self, host: &Host, cases: &[Case]) {
        for manager in MANAGERS {
            self.under(host, manager, cases);
        }
    }

    fn under(&self, host: &Host, (kind, manager): (&str, Manager), cases: &[Case]) {
        for (name, case) in cases {
            self.case(&format!("{kind}: {name}"), || {
                // The other manager's case may go on.
                undoing(|| case(host, manager), || undo::of(host, manager))
            });
        }
    }

    /// Fails the test when a case failed. Where `BRO_FAILED_CASES` names a file, those that did are listed there, one JSON object
    /// a line: a second look is then at these alone.
    pub fn conclude(self) {
        let ran = self.ran.into_inner().unwrap_or_else(PoisonError::into_inner);
        let failed = self.failed.into_inner().unwrap_or_else(PoisonError::into_inner);
        assert!(!ran.is_empty(), "no case has BRO_CASE in its name");
        if let Wanted::Exactly(names) = &self.wanted {
            // One that others stand on may have failed before these.
            let missing: Vec<&String> = names.iter().filter(|name| !ran.contains(name)).collect();
            let stopped = failed.iter().any(|case| case.needed);
            assert!(stopped || missing.is_empty(), "BRO_CASE names cases that there are not: {missing:?}");
        }
        list(&failed).expect("the file that BRO_FAILED_CASES names can be written");
        let names: Vec<&str> = failed.iter().map(|case| case.name.as_str()).collect();
        assert!(failed.is_empty(), "{} of {} cases failed: {}", failed.len(), ran.len(), names.join(", "));
    }
}

/// Runs a case, and `undo` when it fails. What could not be undone is said beside what failed.
fn undoing(body: impl FnOnce() -> Result<()>, undo: impl FnOnce() -> Result<Vec<String>>) -> Result<()> {
    let ended = catch_unwind(AssertUnwindSafe(body));
    if !matches!(ended, Ok(Ok(()))) {
        match undo() {
            Ok(gone) if gone.is_empty() => {}
            Ok(gone) => {
                note(&format!("a case that failed has left, and that is removed: {}", gone.join(", ")))
            }
            Err(error) => note(&format!("what a case that failed has left cannot be removed: {error:#}")),
        }
    }
    ended.unwrap_or_else(|panic| resume_unwind(panic))
}

fn list(failed: &[Failed]) -> Result<()> {
    let Some(path) = std::env::var_os("BRO_FAILED_CASES") else { return Ok(()) };
    let mut lines = String::new();
    for Failed { name, said, needed } in failed {
        writeln!(lines, "{}", json!({ "name": name, "said": said, "needed": needed }))?;
    }
    std::fs::write(&path, lines).with_context(|| format!("cannot write {}", path.display()))
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A figure worth knowing that no test should fail on.
pub fn note(text: &str) {
    say(&format!("note {text}"));
}

/// To the real stderr, as it happens: a suite of minutes must not look dead.
fn say(line: &str) {
    std::io::stderr().write_all(format!("{line}\n").as_bytes()).ok();
}

#[cfg(test)]
mod tests {
    use super::Wanted;

    #[test]
    fn a_part_of_a_name_chooses_and_so_do_whole_names() {
        let part = Wanted::new(Some("reboot".into()));
        assert!(part.has("a reboot") && part.has("after a reboot without a login") && !part.has("a boot"));
        let exact = Wanted::new(Some("a reboot\nnetworks: a bridge of its own, the host's\n".into()));
        assert!(exact.has("a reboot") && exact.has("networks: a bridge of its own, the host's"));
        assert!(!exact.has("rootful: a reboot") && !exact.has("a bridge of its own"));
        assert!(Wanted::new(None).has("anything"));
    }
}
