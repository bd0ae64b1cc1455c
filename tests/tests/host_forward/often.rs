//! How often a container is started: limits, clients that do not count, and those that come back again and again.

use std::io::Read as _;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bro_tests::host::cases::note;
use bro_tests::host::{Host, Manager};

use crate::site::{PATIENCE, Plan, Site, text};

/// How often systemd has started the container's unit.
fn starts(site: &Site<'_>) -> Result<usize> {
    let journal = site.manager.journal(site.host, &site.unit())?;
    Ok(journal.lines().filter(|line| line.starts_with("Started ")).count())
}

/// A subscriber that says nothing, and connects again as soon as it is cut off.
pub fn the_same_client_again_and_again(host: &Host, manager: Manager) -> Result<()> {
    const SPAN: Duration = Duration::from_secs(16);
    let options = "--idle-by=bytes --exit-idle-time=1s";
    let site = Site::new(host, manager, "flaps", &Plan::service(manager, 0.0, options))?;
    let began = Instant::now();
    let mut said = String::new();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let subscriber = scope.spawn(|| {
            while !over.load(Relaxed) {
                let mut client = site.client()?;
                client.set_read_timeout(Some(Duration::from_millis(200)))?;
                // Until it is cut off.
                while !over.load(Relaxed) {
                    let heard = client.read(&mut [0; 1]);
                    if !heard.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock) {
                        break;
                    }
                }
            }
            anyhow::Ok(())
        });
        let watched = (|| {
            while began.elapsed() < SPAN {
                let status = site.forwarder_show("StatusText")?;
                if status.contains("idle time has grown") {
                    said = status;
                }
                std::thread::sleep(Duration::from_millis(300));
            }
            anyhow::Ok(())
        })();
        over.store(true, Relaxed);
        watched.and(subscriber.join().expect("it does not panic"))
    })
    .with_context(|| site.journals())?;
    let starts = starts(&site)?;
    note(&format!("{manager:?}: {starts} starts in {SPAN:?} with an idle time of 1 s; “{said}”"));
    // Without that it would be one in about 1.3 s; with it, at 0, 1, 2, 4 and 8 s.
    ensure!((3..=7).contains(&starts), "{starts} starts in {SPAN:?}\n{}", site.journal());
    ensure!(said.contains("(127.0.0.1)"), "status does not say so: {said}\n{}", site.journal());
    ensure!(site.journal().contains("the idle time has grown to 2s"), "{}", site.journal());
    site.await_exit()?;
    site.await_container_gone()?;
    // It has been quiet: the next one begins anew.
    std::thread::sleep(Duration::from_millis(1500));
    site.check_echo()?;
    let quiet = Instant::now();
    site.await_exit()?;
    ensure!(quiet.elapsed() < Duration::from_secs(8), "after {:?}", quiet.elapsed());
    Ok(())
}

/// The limit holds from one forwarder to the next.
pub fn started_too_often(host: &Host, manager: Manager) -> Result<()> {
    let options = "--exit-idle-time=300ms --wakes-per-hour=2";
    let site = Site::new(host, manager, "toooften", &Plan::service(manager, 0.0, options))?;
    for _ in 0..2 {
        site.check_echo()?;
        site.await_exit()?;
        site.await_container_gone()?;
    }
    for _ in 0..2 {
        site.expect_reset()?;
        site.await_exit()?;
    }
    let ended = site.ended(4)?;
    ensure!(ended[2..].iter().all(|record| text(record, "BRO_REASON") == "wake-limit"), "{ended:?}");
    ensure!(site.journal().contains("--wakes-per-hour=2"), "{}", site.journal());
    ensure!(starts(&site)? == 2, "{} starts", starts(&site)?);
    // A service that runs is refused to no client.
    manager.systemctl(host, &["start", "toooften.service"])?;
    site.check_echo()
}

/// Monitors neither wake it, nor are they turned away from what was started by others.
pub fn who_wakes_nothing(host: &Host, manager: Manager) -> Result<()> {
    let options = "--exit-idle-time=500ms --wake-ignore=127.0.0.0/8,::1";
    let site = Site::new(host, manager, "scanned", &Plan::service(manager, 0.0, options))?;
    for _ in 0..3 {
        site.expect_reset()?;
    }
    site.await_exit()?;
    ensure!(manager.show(host, "scanned.service", "ActiveState")? == "inactive", "a scan has woken it");
    manager.systemctl(host, &["start", "scanned.service"])?;
    host.wait_until("a monitor's answer", PATIENCE, || Ok(site.check_echo().is_ok()))?;
    let ended: Vec<_> = site.front.journal_records(host, &site.forwarder())?;
    ensure!(ended.iter().any(|record| text(record, "BRO_REASON") == "wake-ignored"), "{}", site.journal());
    Ok(())
}
