//! A test that failed is run once more, alone; of one with cases, on a fresh host, those that failed and what they stand on. One that passes then met a neighbour's load or a wait that was too short: it is
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

/// How many failed cases of a test are looked at by themselves. When more have failed, the host may be to blame, and all are.
const MOST_CASES: usize = 5;

/// What counts of a suite that ended as `first`; `again` runs the named tests one by one, and of their cases the named ones, or all
/// when none is named.
pub fn look(
    suite: &str,
    first: Count,
    again: impl FnOnce(&[&str], &[&str]) -> Result<Count>,
) -> Result<Count> {
    let failed = first.failures.len();
    if failed == 0 || failed != first.failed || failed > MOST || EXACT.contains(&suite) {
        return Ok(first);
    }
    let names: Vec<&str> = first.failures.iter().map(|failure| failure.test.as_str()).collect();
    let cases = cases(&first);
    println!("-- a second look at {} --", names.iter().chain(&cases).copied().collect::<Vec<_>>().join(", "));
    let second = again(&names, &cases)?;
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

/// The failed cases of a suite of which everything else has run and held.
fn cases(first: &Count) -> Vec<&str> {
    match &first.failures[..] {
        [failure] if failure.cases.len() <= MOST_CASES && failure.cases.iter().all(|case| !case.needed) => {
            failure.cases.iter().map(|case| case.name.as_str()).collect()
        }
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::summary::{Case, Failure};
    use super::{Count, look};

    fn count(passed: usize, failures: &[&str]) -> Count {
        let failure =
            |test: &&str| Failure { test: (*test).to_owned(), said: String::new(), cases: Vec::new() };
        Count {
            passed,
            failed: failures.len(),
            failures: failures.iter().map(failure).collect(),
            ..Count::default()
        }
    }

    #[test]
    fn a_test_that_passes_alone_is_unsteady() {
        let seen = look("idle", count(3, &["one"]), |names, cases| {
            assert_eq!(names, ["one"]);
            assert!(cases.is_empty());
            Ok(count(1, &[]))
        })
        .expect("no command fails");
        assert_eq!((seen.passed, seen.failed, seen.unsteady.len()), (4, 0, 1));
    }

    #[test]
    fn one_that_fails_again_has_failed() {
        let seen =
            look("idle", count(3, &["one", "two"]), |_, _| Ok(count(1, &["two"]))).expect("no command fails");
        assert_eq!((seen.passed, seen.failed, seen.unsteady.len()), (3, 2, 0));
    }

    /// Which cases are run again after these have failed, of which those with a `!` are needed by others.
    fn looked_at(failed: &[&str]) -> Vec<String> {
        let mut first = count(0, &["on_a_host"]);
        first.failures[0].cases = failed
            .iter()
            .map(|name| Case { name: (*name).to_owned(), said: String::new(), needed: name.ends_with('!') })
            .collect();
        let mut asked = Vec::new();
        let seen = look("host_forward", first, |names, cases| {
            assert_eq!(names, ["on_a_host"]);
            asked = cases.iter().map(|case| (*case).to_owned()).collect();
            Ok(count(1, &[]))
        })
        .expect("no command fails");
        // Loud all the same.
        assert_eq!((seen.unsteady.len(), seen.unsteady[0].cases.len()), (1, failed.len()));
        asked
    }

    #[test]
    fn of_a_suite_with_cases_those_that_failed_are_run_again() {
        assert_eq!(looked_at(&["one", "a, b"]), ["one", "a, b"]);
        // What stands on one that failed has not run, and many mean that it is not about them.
        assert!(looked_at(&["one", "a reboot!"]).is_empty());
        assert!(looked_at(&["1", "2", "3", "4", "5", "6"]).is_empty());
    }

    #[test]
    fn bytes_get_no_second_look_and_neither_do_many_failures() {
        let never = |_: &[&str], _: &[&str]| -> anyhow::Result<Count> { panic!("looked again") };
        assert_eq!(look("relay", count(3, &["one"]), never).expect("no command ran").failed, 1);
        assert_eq!(
            look("idle", count(3, &["one", "two", "three"]), never).expect("no command ran").failed,
            3
        );
    }
}
