//! `systemctl reload` of an activated service under load: a database's clients notice nothing.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bro_tests::host::site::{PATIENCE, Plan, Site};
use bro_tests::host::{Host, Manager};
use bro_tests::process::eventually;

use crate::activated::expect_asleep;

/// How often it is reloaded.
const TIMES: usize = 4;

pub fn under_pgbench(host: &Host, manager: Manager) -> Result<()> {
    manager.import_image(host, "postgres", "docker.io/library/postgres")?;
    let container = "Image=docker.io/library/postgres\nEnvironment=POSTGRES_PASSWORD=secret";
    let options = ["--internal-port", "5432", "--exit-idle-time", "1s"];
    let site = Site::activated(host, manager, "reloaded", &Plan::new(container, "", ""), &options)?;
    let port = site.port;
    let client = |line: &str| {
        let found = "PATH=$PATH:$(ls -d /usr/lib/postgresql/*/bin) PGPASSWORD=secret PGCONNECT_TIMEOUT=30";
        host.sh(&format!("{found} PGHOST=127.0.0.1 PGPORT={port} PGUSER=postgres {line} 2>&1"))
    };
    // It listens a moment before initdb is through.
    let answer = || client("psql --no-psqlrc -At -c 'select 6 * 7'").unwrap_or_default();
    ensure!(eventually(PATIENCE, || answer() == "42"), "{}\n{}", answer(), site.journals());
    client("pgbench --initialize --scale 1 --quiet postgres")?;

    // One for each forwarder, so that none of them is idle however long the others take. They say nothing.
    let mut kept = vec![site.client()?];
    let active = || site.forwarder_show("ActiveState").is_ok_and(|state| state == "active");
    ensure!(eventually(PATIENCE, active), "{}", site.journals());
    std::thread::scope(|scope| -> Result<()> {
        // Connections that stay, one for each transaction, and one that says nothing for a long time.
        let stay = scope.spawn(|| client("pgbench --client 4 --jobs 2 --time 10 postgres"));
        let come = scope.spawn(|| client("pgbench --client 2 --connect --select-only --time 10 postgres"));
        let held = scope.spawn(|| client("psql --no-psqlrc -At -c 'select 42 from pg_sleep(11)'"));
        let mut mains = vec![site.forwarder_show("MainPID")?];
        for _ in 0..TIMES {
            std::thread::sleep(Duration::from_secs(1));
            manager.systemctl(host, &["reload", &site.forwarder()])?;
            let main = || site.forwarder_show("MainPID").unwrap_or_default();
            let taken_over = || !mains.contains(&main()) && main() != "0";
            ensure!(eventually(PATIENCE, taken_over), "no successor has taken over: {}", site.journals());
            mains.push(main());
            kept.push(site.client()?);
            ensure!(site.forwarder_show("ActiveState")? == "active", "{}", site.journals());
        }
        for (what, report) in [("stay", stay), ("come", come)] {
            let report = report.join().expect("a client's thread").with_context(|| site.journals())?;
            ensure!(report.contains("number of failed transactions: 0 "), "those who {what}: {report}");
            ensure!(!report.contains("error") && !report.contains("aborted"), "those who {what}: {report}");
        }
        let held = held.join().expect("the held client's thread").with_context(|| site.journals())?;
        ensure!(held == "42", "the held client got {held}");
        Ok(())
    })?;
    drop(kept);
    // None of the older ones is left, and the last one knows when to stop the container.
    expect_asleep(&site).with_context(|| site.journals())?;
    ensure!(site.errors()?.is_empty(), "{:?}", site.errors()?);
    Ok(())
}
