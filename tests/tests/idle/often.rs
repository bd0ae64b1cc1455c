//! `--wakes-per-hour`: who comes beyond that is reset, with the reason in log and status.

use anyhow::{Context as _, Result, ensure};
use bro_tests::peers::PATIENCE;
use bro_tests::require_namespaces;
use bro_tests::scene::{Scene, expect_relayed};

use crate::{by_hand, wakes};

#[test]
fn who_would_wake_it_too_often_is_reset_until_another_client_does() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let forwarder = scene.start(&["--wakes-per-hour=2", "--start-timeout=300ms"])?;
    for _ in 0..2 {
        scene.client()?.expect_abort()?;
    }
    ensure!(forwarder.report()?.rhythm.context("there is a limit")?.refused_for_s.is_some(), "not refused");
    for _ in 0..3 {
        scene.client()?.expect_abort()?;
    }
    let reasons: Vec<String> = forwarder.closings(5)?.into_iter().map(|closing| closing.reason).collect();
    let (timeout, limit) = ("start-timeout", "wake-limit");
    ensure!(reasons == [timeout, timeout, limit, limit, limit], "{reasons:?}");
    ensure!(wakes(&forwarder) == 2, "{} wakes", wakes(&forwarder));
    let said = forwarder.log().lines().iter().filter(|line| line.contains("--wakes-per-hour=2")).count();
    ensure!(said == 1, "said {said} times");
    let report = forwarder.report()?;
    let rhythm = report.rhythm.context("there is a limit")?;
    ensure!(
        rhythm.starts == 2 && rhythm.refused_for_s.is_some_and(|s| (3500..=3601).contains(&s)),
        "{rhythm:?}"
    );
    ensure!(report.state.contains("refused for 1h"), "{}", report.state);
    ensure!(report.failed_wake.is_some_and(|failed| failed.why.contains("--wakes-per-hour=2")), "not noted");
    // Its administrator is not refused, and once it is awake no client is.
    let asked = by_hand::request(&forwarder, b"wake\n")?;
    forwarder.log().line(PATIENCE, |line| line.contains("waking") && line.contains("bro wake"))?;
    let service = scene.serve()?;
    let outcome = by_hand::answer(asked)?;
    ensure!(outcome.done, "{outcome:?}");
    let (client, served) = (scene.client()?, service.accept()?);
    expect_relayed(&client, &served)?;
    drop((client, served));
    ensure!(forwarder.closings(6)?[5].reason == "eof", "{:?}", forwarder.closings(6)?[5]);
    forwarder.stop().map(drop)
}
