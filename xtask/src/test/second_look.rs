//! A test that failed is run once more, alone. One that passes then met a neighbour's load or a wait that was too short: it is
//! no failure, but named at the end with what it said, and few such are borne in a run.
//!
//! Whatever may be wrong with bytes, bounds or the sandbox is a failure the first time: there is no second look at those suites.

use anyhow::Result;

use super::summary::Count;

/// Suites whose tests hold or do not, whatever else the machine does.
const EXACT: &[&str] = &[
    "bad_input",
    "dist",
    "kernel_assumptions",
    "kernel_relay_programs",
    "limits",
    "loader",
    "relay",
    "sandbox",
    "sockmap_faults",
];

/// How many unsteady tests a run bears, and how many failures of one suite are worth a second look.
pub const MOST: usize = 2;

/// What counts of a suite that ended as `first`; `again` runs the named tests one by one.
pub fn look(suite: &str, first: Count, again: impl FnOnce(&[String]) -> Result<Count>) -> Result<Count> {
    let failed = first.failures.len();
    if failed == 0 || failed != first.failed || failed > MOST || EXACT.contains(&suite) {
        return Ok(first);
    }
    let names: Vec<String> = first.failures.iter().map(|failure| failure.test.clone()).collect();
    println!("-- a second look at {} --", names.join(", "));
    let second = again(&names)?;
    if second.failed > 0 || second.passed != failed {
        return Ok(first);
    }
    Ok(Count {
        passed: first.passed + failed,
        failed: 0,
        unsteady: first.failures,
        failures: Vec::new(),
        ..first
    })
}

#[cfg(test)]
mod tests {
    use super::super::summary::Failure;
    use super::{Count, look};

    fn count(passed: usize, failures: &[&str]) -> Count {
        let failure = |test: &&str| Failure { test: (*test).to_owned(), said: String::new() };
        Count {
            passed,
            failed: failures.len(),
            failures: failures.iter().map(failure).collect(),
            ..Count::default()
        }
    }

    #[test]
    fn a_test_that_passes_alone_is_unsteady() {
        let seen = look("idle", count(3, &["one"]), |names| {
            assert_eq!(names, ["one"]);
            Ok(count(1, &[]))
        })
        .expect("no command fails");
        assert_eq!((seen.passed, seen.failed, seen.unsteady.len()), (4, 0, 1));
    }

    #[test]
    fn one_that_fails_again_has_failed() {
        let seen =
            look("idle", count(3, &["one", "two"]), |_| Ok(count(1, &["two"]))).expect("no command fails");
        assert_eq!((seen.passed, seen.failed, seen.unsteady.len()), (3, 2, 0));
    }

    #[test]
    fn bytes_get_no_second_look_and_neither_do_many_failures() {
        let never = |_: &[String]| -> anyhow::Result<Count> { panic!("looked again") };
        assert_eq!(look("relay", count(3, &["one"]), never).expect("no command ran").failed, 1);
        assert_eq!(
            look("idle", count(3, &["one", "two", "three"]), never).expect("no command ran").failed,
            3
        );
    }
}
