//! Real services behind `bro activate`: nothing but their own clients' success counts.

use anyhow::{Context as _, Result, ensure};
use bro_tests::host::site::{Plan, Site};
use bro_tests::host::{Host, Manager};

use crate::activated::expect_asleep;

pub fn postgresql(host: &Host, manager: Manager) -> Result<()> {
    manager.import_image(host, "postgres", "docker.io/library/postgres")?;
    let container = "Image=docker.io/library/postgres\nEnvironment=POSTGRES_PASSWORD=secret\n\
                     Volume=pgdata:/var/lib/postgresql/data\nHealthCmd=pg_isready --quiet --host 127.0.0.1\nHealthInterval=disable";
    let options = ["--internal-port", "5432", "--ready", "healthy", "--exit-idle-time", "1s"];
    let site = Site::activated(host, manager, "pg", &Plan::new(container, "", ""), &options)?;
    let port = site.port;
    let psql = |query: &str| {
        host.sh(&format!(
            "PGPASSWORD=secret psql --no-psqlrc -At -h 127.0.0.1 -p {port} -U postgres -c '{query}'"
        ))
    };
    let pgbench = |args: &str| {
        let bench = "$(ls -d /usr/lib/postgresql/*/bin)/pgbench";
        host.sh(&format!("PGPASSWORD=secret {bench} -h 127.0.0.1 -p {port} -U postgres {args} postgres 2>&1"))
    };
    // The very first client waits until initdb is through.
    ensure!(psql("select 6 * 7").with_context(|| site.journals())? == "42");
    pgbench("--initialize --scale 1 --quiet")?;
    let report = pgbench("--client 8 --jobs 2 --transactions 100")?;
    ensure!(report.contains("number of transactions actually processed: 800/800"), "{report}");
    expect_asleep(&site)?;
    ensure!(psql("select count(*) from pgbench_accounts").with_context(|| site.journals())? == "100000");
    expect_asleep(&site)?;
    ensure!(site.errors()?.is_empty(), "{:?}", site.errors()?);
    Ok(())
}

pub fn redis(host: &Host, manager: Manager) -> Result<()> {
    manager.import_image(host, "redis", "docker.io/library/redis")?;
    let plan = Plan::new("Image=docker.io/library/redis", "", "");
    let site = Site::activated(
        host,
        manager,
        "cache",
        &plan,
        &["--internal-port", "6379", "--exit-idle-time", "1s"],
    )?;
    let port = site.port.to_string();
    for _ in 0..2 {
        let pong = host.run(&["redis-cli", "-p", &port, "ping"]).with_context(|| site.journals())?;
        ensure!(pong == "PONG", "{pong}");
        let report =
            host.run(&["redis-benchmark", "-p", &port, "-q", "-n", "5000", "-P", "8", "-t", "set,get"])?;
        ensure!(!report.contains("Error"), "{report}");
        expect_asleep(&site)?;
    }
    Ok(())
}
