//! `--keep-awake`: a forwarder wakes its service without a client and does not leave before the time is over.

use std::time::{Duration, SystemTime};

use anyhow::{Result, ensure};
use bro_tests::peers::PATIENCE;
use bro_tests::require_namespaces;
use bro_tests::scene::{Scene, expect_relayed};
use bro_tests::tier::{Need, met};

use crate::MOMENT;

const ANALYZE: Need = Need::Program("systemd-analyze", "systemd");

/// A time of day, so long before or after now.
fn time_of_day(from_now: i64) -> Result<String> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs();
    let second = now.saturating_add_signed(from_now) % 86_400;
    Ok(format!("{:02}:{:02}:{:02}", second / 3600, second / 60 % 60, second % 60))
}

#[test]
fn woken_without_a_client_and_kept_until_the_time_is_over() -> Result<()> {
    require_namespaces!();
    if !met("woken_without_a_client_and_kept_until_the_time_is_over", &[ANALYZE]) {
        return Ok(());
    }
    const SECONDS: i64 = 6;
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let ends = SystemTime::now() + Duration::from_secs(SECONDS.unsigned_abs());
    let times = format!("--keep-awake={}..{} UTC", time_of_day(-60)?, time_of_day(SECONDS)?);
    let mut forwarder = scene.start(&["--exit-idle-time=100ms", &times])?;
    forwarder.log().line(PATIENCE, |line| line.contains("at the time of --keep-awake"))?;
    forwarder.log().line(PATIENCE, |line| line.contains("kept awake until"))?;
    let report = forwarder.report()?;
    ensure!(report.state.contains("kept awake until"), "{}", report.state);
    let until = report.activity.kept_awake_until;
    let expected = ends.duration_since(SystemTime::UNIX_EPOCH)?.as_secs();
    ensure!(until.is_some_and(|until| until.abs_diff(expected) <= 1), "{until:?} instead of {expected}");
    ensure!(report.activity.woken_by.as_deref() == Some("--keep-awake"), "{:?}", report.activity);
    // A client makes no difference.
    let (client, served) = (scene.client()?, service.accept()?);
    expect_relayed(&client, &served)?;
    drop((client, served));
    forwarder.expect_no_spin(MOMENT)?;
    forwarder.expect_exit(0)?;
    let early = ends.duration_since(SystemTime::now()).unwrap_or_default();
    ensure!(early <= Duration::from_secs(1), "it left {early:?} before the time was over");
    Ok(())
}

#[test]
fn woken_when_the_time_begins() -> Result<()> {
    require_namespaces!();
    if !met("woken_when_the_time_begins", &[ANALYZE]) {
        return Ok(());
    }
    let mut scene = Scene::new()?;
    let _service = scene.serve()?;
    let times = format!("--keep-awake={}..{} UTC", time_of_day(3)?, time_of_day(-5)?);
    let forwarder = scene.start(&["--exit-idle-time=1min", &times])?;
    forwarder.log().line(PATIENCE, |line| line.contains("listening"))?;
    forwarder.log().line(PATIENCE, |line| line.contains("kept awake until"))?;
    forwarder.log().line(PATIENCE, |line| line.contains("at the time of --keep-awake"))?;
    Ok(())
}
