//! MariaDB: accounts for clients on its own host alone, over TCP and by the user at the other end of its unix socket (`unix_socket`).

use std::fs;

use anyhow::{Context as _, Result, ensure};
use bro_tests::peers::{Listener, PATIENCE};
use bro_tests::process;
use bro_tests::tier::{Need, find_program, met};
use nix::unistd::chown;

use super::{EVERYBODY, INSIDE, NOBODY, Stand, both, host, port, relays, seen};

/// Two accounts for its own host, and one for everybody who knows the password. A statement a line.
const ACCOUNTS: &str = "create user near@'127.0.0.1';
create user near@localhost;
create user app@'%' identified by 'secret';
";

/// The server with its socket in the scratch folder, as its package makes it: root is who is root at the other end of the socket.
fn serve() -> Result<Stand> {
    let mut stand = Stand::new()?;
    let data = stand.scratch.join("data");
    fs::create_dir(&data)?;
    for folder in [data.as_path(), stand.scratch.path()] {
        chown(folder, Some(NOBODY.into()), Some(NOBODY.into()))?;
    }
    let accounts = stand.scratch.join("accounts.sql");
    fs::write(&accounts, ACCOUNTS)?;
    // Two servers with one folder for temporary tables take each other's away.
    let folders =
        [format!("--datadir={}", data.display()), format!("--tmpdir={}", stand.scratch.path().display())];
    let mut make = std::process::Command::new("setpriv");
    make.args(["--clear-groups", &format!("--reuid={NOBODY}"), &format!("--regid={NOBODY}")]);
    make.args([
        "mariadb-install-db",
        "--no-defaults",
        "--skip-test-db",
        "--auth-root-authentication-method=socket",
    ]);
    make.args(["--auth-root-socket-user=root", "--innodb-log-file-size=4M"]).args(&folders);
    let made = make.current_dir(stand.scratch.path()).output()?;
    ensure!(made.status.success(), "{}", both(&made));
    let program = find_program("mariadbd").context("mariadbd has gone")?.display().to_string();
    let file = |option: &str, name: &str| format!("--{option}={}", stand.scratch.join(name).display());
    let [data, temporary] = folders;
    let words = [
        program,
        "--no-defaults".into(),
        data,
        temporary,
        file("socket", "socket"),
        file("pid-file", "pid"),
        file("init-file", "accounts.sql"),
        format!("--port={INSIDE}"),
        "--innodb-flush-log-at-trx-commit=0".into(),
    ];
    stand.serve(Some(NOBODY), &words)?;
    let is_ready = || stand.said().contains("ready for connections");
    ensure!(process::eventually(PATIENCE, is_ready), "{}", stand.said());
    ensure!(!stand.said().contains("ERROR"), "{}", stand.said());
    Ok(stand)
}

/// Whom MariaDB takes a client for (`user()`), or why it does not.
fn log_in(stand: &Stand, front: &Listener, who: Option<usize>, user: &str, password: &str) -> Result<String> {
    let (host, port) = (format!("--host={}", host(who)), format!("--port={}", port(front)));
    let (user, password) = (format!("--user={user}"), format!("--password={password}"));
    let client = ["mariadb", "--no-defaults", "--protocol=tcp", "--batch", "--skip-column-names"];
    let words = [&client[..], &[&host, &port, &user, &password, "--execute=select user()"]].concat();
    Ok(both(&stand.from(who, &words).output()?).trim().to_owned())
}

const NEEDS: [Need; 5] = [
    Need::Root,
    Need::Program("mariadbd", "mariadb-server-core"),
    Need::Program("mariadb-install-db", "mariadb-server-core"),
    Need::Program("mariadb", "mariadb-client-core"),
    Need::Program("ip", "iproute2"),
];

#[test]
fn mariadb_keeps_its_accounts_for_local_clients() -> Result<()> {
    if !met("mariadb_keeps_its_accounts_for_local_clients", &NEEDS) {
        return Ok(());
    }
    let stand = serve()?;
    for relay in relays() {
        let (front, forwarder) = stand.forward(relay)?;
        for who in EVERYBODY {
            for (user, password) in [("near", ""), ("root", ""), ("app", ""), ("app", "wrong")] {
                let said = log_in(&stand, &front, who, user, password)?;
                let wanted = format!("Access denied for user '{user}'@'{}'", seen(who));
                ensure!(said.contains(&wanted), "{relay:?} {who:?} {user} {password}: {said}");
            }
            let said = log_in(&stand, &front, who, "app", "secret")?;
            ensure!(said == format!("app@{}", seen(who)), "{relay:?} {who:?}: {said}");
        }
        forwarder.stop()?;
    }
    // It does trust its own host, and that is what is granted by name.
    let (front, forwarder) = stand.forward(&["--source=loopback"])?;
    let said = log_in(&stand, &front, Some(0), "near", "")?;
    ensure!(said == "near@localhost", "{said}");
    forwarder.stop().map(drop)
}

#[test]
fn no_client_is_mariadbs_root_over_its_unix_socket() -> Result<()> {
    if !met("no_client_is_mariadbs_root_over_its_unix_socket", &NEEDS) {
        return Ok(());
    }
    let stand = serve()?;
    let socket = stand.scratch.join("socket").display().to_string();
    for relay in ["--relay=splice", "--relay=copy", "--relay=auto"] {
        // As it is by itself; the harness's own is the forwarder's.
        let (front, forwarder) = stand.forward_to(&socket, &[relay, "--unix-identity=unused"])?;
        for who in EVERYBODY {
            let said = log_in(&stand, &front, who, "root", "")?;
            ensure!(said.contains("Access denied for user 'root'@'localhost'"), "{relay} {who:?}: {said}");
            let said = log_in(&stand, &front, who, "app", "secret")?;
            ensure!(said == "app@localhost", "{relay} {who:?}: {said}");
        }
        forwarder.stop()?;
    }
    // Root's forwarder is root to it where that is asked for.
    let (front, forwarder) = stand.forward_to(&socket, &["--unix-identity=forwarder"])?;
    let said = log_in(&stand, &front, Some(0), "root", "")?;
    ensure!(said == "root@localhost", "{said}");
    forwarder.stop().map(drop)
}
