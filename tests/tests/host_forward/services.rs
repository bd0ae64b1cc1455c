//! Real services behind a forwarder: nothing but their own clients' success counts.

use std::time::Instant;

use anyhow::{Result, ensure};
use bro_tests::host::cases::note;
use bro_tests::host::{Host, Manager};

use crate::site::{Plan, Site, folder};

pub fn postgresql(host: &Host, manager: Manager) -> Result<()> {
    let data = match manager {
        Manager::System => "/srv/database".into(),
        Manager::User(user) => format!("/home/{user}/database"),
    };
    host.sh(&format!("cp -a /srv/pgdata {data}"))?;
    if let Manager::User(user) = manager {
        host.run(&["chown", "-R", &format!("{user}:{user}"), &data])?;
    }
    // It listens before it has recovered: a listener would do for a client that tries again, psql does not.
    let container = format!(
        "Rootfs={}:O\nUser=postgres\nVolume={data}:/srv/pgdata:U\nTmpfs=/tmp\nStopSignal=SIGINT\n\
         HealthCmd=pg_isready --quiet --host 127.0.0.1\nHealthInterval=disable\n\
         Exec=sh -c 'exec /usr/lib/postgresql/*/bin/postgres -D /srv/pgdata -c unix_socket_directories=/tmp'",
        manager.image()
    );
    let plan = Plan::new(&container, "--ready healthy --exit-idle-time 1s", "127.0.0.1:5432");
    let site = Site::new(host, manager, "database", &plan)?;
    let port = site.port.to_string();
    let psql = |query: &str| {
        host.run(&[
            "psql",
            "--no-psqlrc",
            "-At",
            "-h",
            "127.0.0.1",
            "-p",
            &port,
            "-U",
            "postgres",
            "-c",
            query,
        ])
    };
    let began = Instant::now();
    ensure!(psql("select 6 * 7")? == "42");
    note(&format!(
        "{manager:?}: the first psql took {} ms, cold start included",
        began.elapsed().as_millis()
    ));
    let pgbench = |args: &str| {
        let bench = "$(ls -d /usr/lib/postgresql/*/bin)/pgbench";
        host.sh(&format!("{bench} -h 127.0.0.1 -p {port} -U postgres {args} postgres 2>&1"))
    };
    pgbench("--initialize --scale 1 --quiet")?;
    let report = pgbench("--client 8 --jobs 2 --transactions 100 --connect")?;
    ensure!(report.contains("number of transactions actually processed: 800/800"), "{report}");
    let report = pgbench("--client 8 --jobs 2 --transactions 500 --protocol prepared")?;
    ensure!(report.contains("number of transactions actually processed: 4000/4000"), "{report}");
    site.await_exit()?;
    site.await_container_gone()?;
    // Asleep and awake again, with what was written before. A unix socket inside the container is as good.
    ensure!(psql("select count(*) from pgbench_accounts")? == "100000");
    site.await_exit()?;
    drop(site);
    let plan = Plan::new(&container, "--ready healthy --exit-idle-time 1s", "/tmp/.s.PGSQL.5432");
    let site = Site::new(host, manager, "database", &plan)?;
    let port = site.port.to_string();
    let through_unix = host.run(&[
        "psql",
        "-At",
        "-h",
        "127.0.0.1",
        "-p",
        &port,
        "-U",
        "postgres",
        "-c",
        "select count(*) from pgbench_accounts",
    ])?;
    ensure!(through_unix == "100000");
    Ok(())
}

pub fn nginx(host: &Host, manager: Manager) -> Result<()> {
    let files = folder(host, manager, "www")?;
    host.sh(&format!("head -c 12000000 /dev/urandom >{files}/big; chmod a+r {files}/big"))?;
    let conf = "daemon off; error_log stderr; pid /tmp/nginx.pid; events {} http { access_log off; \
                server { listen 127.0.0.1:80; listen unix:/tmp/nginx.sock; root /srv/www; } }";
    host.write(&format!("{files}/nginx.conf"), conf)?;
    let container = format!(
        "Rootfs={}:O\nVolume={files}:/srv/www:ro\nTmpfs=/tmp\nExec=/usr/sbin/nginx -c /srv/www/nginx.conf",
        manager.image()
    );
    let wanted = host.sh(&format!("sha256sum <{files}/big"))?;
    for target in ["127.0.0.1:80", "/tmp/nginx.sock"] {
        let site = Site::new(host, manager, "www", &Plan::new(&container, "--exit-idle-time 1s", target))?;
        let url = format!("http://127.0.0.1:{}/big", site.port);
        let fetched = host.sh(&format!("curl --silent --fail {url} | sha256sum"))?;
        ensure!(fetched == wanted, "{target}: the first client got other bytes");
        // Many over one connection and at once, and one who does not want all of it.
        let many = format!(
            "curl --silent --fail --parallel --parallel-max 8 --output '{files}/part#1' '{url}?[1-16]'; \
                            sha256sum {files}/part* | cut -d' ' -f1 | sort -u; rm {files}/part*"
        );
        ensure!(wanted.starts_with(&host.sh(&many)?), "{target}: one of sixteen got other bytes");
        ensure!(host.sh(&format!("curl --silent --range 5-9 {url} | wc -c"))? == "5");
        site.await_exit()?;
        site.await_container_gone()?;
        ensure!(site.errors()?.is_empty(), "{:#?}", site.errors()?);
    }
    Ok(())
}

pub fn redis(host: &Host, manager: Manager) -> Result<()> {
    let container = format!(
        "Rootfs={}:O\nTmpfs=/tmp\nRunInit=yes\nExec=/usr/bin/redis-server --bind 127.0.0.1 --port 6379 --protected-mode no --save '' --dir /tmp",
        manager.image()
    );
    let site =
        Site::new(host, manager, "cache", &Plan::new(&container, "--exit-idle-time 1s", "127.0.0.1:6379"))?;
    let port = site.port.to_string();
    let said = host.run(&["redis-cli", "-p", &port, "ping"])?;
    ensure!(said == "PONG", "{said}\n{}", site.journals());
    let report =
        host.run(&["redis-benchmark", "-p", &port, "-q", "-n", "20000", "-P", "8", "-t", "set,get,mset"])?;
    ensure!(!report.contains("Error"), "{report}");
    site.await_exit()?;
    ensure!(host.run(&["redis-cli", "-p", &port, "ping"])? == "PONG");
    Ok(())
}
