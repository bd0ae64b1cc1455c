//! The kernel relay on other kernels than this machine's: Debian's 5.10, 6.1, 6.12 and its newest, each booted in an emulator
//! with the very `bro` that is under test.
//!
//! On each of them a service adopts the forwarder's socket, with the harness as the OCI runtime, and clients come over vsock.
//!
//! Gated on behaviour, not on versions: where the programs load and pass their self-test, real bytes have to take the lanes and
//! the suites of the relay's programs have to pass; where they do not, bro says why and splices.
//!
//! Needs: root, qemu. Takes: minutes for each kernel.

use std::sync::OnceLock;

use anyhow::{Context as _, Result, ensure};
use bro_tests::emulator::inside::{BYTES, CONNECTIONS, TALKS};
use bro_tests::emulator::{self, Image, Initramfs, NEEDS, Release, Report, SUITES, VSOCK};
use bro_tests::scene::TALK;
use bro_tests::tier::{met, skip};
use serde_json::Value;

/// Boots the kernel of `release`; nothing where that cannot be had (in CI: a failure).
fn boot(release: Release) -> Result<Option<(Image, Report)>> {
    static FILES: OnceLock<Initramfs> = OnceLock::new();
    let test = std::thread::current().name().unwrap_or("?").to_owned();
    if !met(&test, &NEEDS) {
        return Ok(None);
    }
    let image = match Image::of(release) {
        Ok(image) => image,
        Err(error) => {
            skip(&test, &format!("needs {release:?}'s kernel: {error:#}"));
            return Ok(None);
        }
    };
    let files = match FILES.get() {
        Some(files) => files,
        None => {
            let packed = emulator::pack()?;
            FILES.get_or_init(|| packed)
        }
    };
    let report = emulator::run(&image, files)?;
    println!("{} was up and done in {:.1} s", image.package, report.took.as_secs_f64());
    Ok(Some((image, report)))
}

fn number(of: &Value) -> u64 {
    of.as_u64().unwrap_or(0)
}

/// Every connection carried every byte, and none says that another relay than `relay` had its bytes.
fn expect_relayed(facts: &Value, relay: Option<&str>) -> Result<()> {
    let none = Vec::new();
    let connections = facts["connections"].as_array().unwrap_or(&none);
    ensure!(connections.len() == CONNECTIONS, "{CONNECTIONS} connections were made: {facts:#}");
    for connection in connections {
        // Questions and answers are of four bytes.
        let bytes = BYTES + TALKS * TALK as u64 * 4;
        let whole = number(&connection["to_service"]) == bytes && number(&connection["to_client"]) == bytes;
        ensure!(whole && connection["reason"] == "eof", "not every byte came: {facts:#}");
    }
    if let Some(relay) = relay {
        ensure!(connections.last().is_some_and(|last| last["relay"] == relay), "not by {relay}: {facts:#}");
        ensure!(facts["relay"]["name"] == relay, "the status does not say {relay}: {facts:#}");
    }
    Ok(())
}

/// A service that is started under a filter which notifies has the forwarder's socket, and sees its clients: none of these kernels lacks what that
/// takes (before Linux 5.14 a socket does not tell its namespace, which is only needed to refuse one of another).
fn expect_adoption(report: &Report) -> Result<()> {
    let facts = report.step("adopt")?;
    ensure!(facts["adoption"]["state"] == "adopted" && facts["accepted"] == 0, "not adopted: {facts:#}");
    let none = Vec::new();
    let seen = facts["seen"].as_array().unwrap_or(&none);
    ensure!(
        seen.len() == CONNECTIONS && seen.iter().all(|one| one["own"] == one["told"]),
        "whom did it see: {facts:#}"
    );
    println!("adopted: the service saw {CONNECTIONS} clients as they are");
    Ok(())
}

/// Every test of the suite has run, and passed.
fn expect_suite(report: &Report, suite: &str) -> Result<()> {
    let facts = report.step(suite)?;
    let output = facts["output"].as_str().unwrap_or_default();
    ensure!(
        facts["passed"] == true && facts["skips"] == "",
        "{suite}: {}\n{output}\n{}\n{}",
        facts["error"],
        facts["skips"],
        report.console
    );
    let result = output.lines().find(|line| line.starts_with("test result:")).unwrap_or("no result");
    println!("{suite}: {result}, {} s", facts["seconds"]);
    Ok(())
}

/// What holds on a kernel that has all the relay needs.
fn expect_lanes(report: &Report) -> Result<()> {
    let doctor = &report.step("doctor")?["kernel relay"];
    let finding = doctor["finding"].as_str().unwrap_or_default();
    ensure!(finding.starts_with("loaded and tested"), "bro doctor says {doctor:#}");
    expect_adoption(report)?;
    expect_suite(report, VSOCK)?;
    // On a kernel that answers FIONREAD wrongly, only who insists has lanes.
    let careful = finding.contains("FIONREAD");
    for (step, relay) in [("auto", if careful { "splice" } else { "sockmap" }), ("sockmap", "sockmap")] {
        let facts = report.step(step)?;
        expect_relayed(facts, Some(relay)).with_context(|| step.to_owned())?;
        let bytes = number(&facts["total"]["kernel"]);
        println!("{step}: {bytes} bytes took a kernel lane, {} were spliced", facts["total"]["spliced"]);
        ensure!((bytes > 0) == (relay == "sockmap"), "{bytes} bytes took a lane: {facts:#}");
    }
    SUITES.iter().try_for_each(|suite| expect_suite(report, suite))?;
    report.step("end").map(drop)
}

/// What holds on a kernel that lacks something: `auto` says what and splices, `sockmap` is an error.
fn expect_splice(report: &Report) -> Result<()> {
    let doctor = &report.step("doctor")?["kernel relay"];
    let finding = doctor["finding"].as_str().unwrap_or_default();
    ensure!(
        doctor["outcome"] == "less" && finding.contains("bytes are spliced"),
        "bro doctor says {doctor:#}"
    );
    let auto = report.step("auto")?;
    expect_relayed(auto, Some("splice"))?;
    ensure!(number(&auto["total"]["kernel"]) == 0, "{auto:#}");
    let reason = auto["relay"]["reason"].as_str().unwrap_or_default();
    ensure!(!reason.is_empty() && finding.contains(reason), "another reason than {finding:?}: {auto:#}");
    ensure!(!finding.contains("verification time"), "the verifier's statistics: {finding}");
    let asked = report.step("sockmap")?;
    ensure!(asked["exit"] == 1, "--relay=sockmap did not fail: {asked:#}");
    println!("{finding}; {}", doctor["fix"]);
    expect_adoption(report)?;
    expect_suite(report, VSOCK)?;
    report.step("end").map(drop)
}

#[test]
fn linux_5_10_has_no_kernel_relay_and_splices() -> Result<()> {
    let Some((image, report)) = boot(Release::Bullseye)? else { return Ok(()) };
    ensure!(image.version()? == (5, 10), "{image:?}");
    expect_splice(&report)
}

#[test]
fn linux_6_1_has_the_lanes() -> Result<()> {
    let Some((image, report)) = boot(Release::Bookworm)? else { return Ok(()) };
    ensure!(image.version()? == (6, 1), "{image:?}");
    expect_lanes(&report)
}

#[test]
fn linux_6_12_has_the_lanes() -> Result<()> {
    let Some((image, report)) = boot(Release::Trixie)? else { return Ok(()) };
    ensure!(image.version()? == (6, 12), "{image:?}");
    expect_lanes(&report)
}

#[test]
fn the_newest_kernel_has_the_lanes() -> Result<()> {
    let Some((image, report)) = boot(Release::Sid)? else { return Ok(()) };
    ensure!(image.version()? > (6, 18), "{image:?}");
    expect_lanes(&report)
}
