//! A service on a unix socket behind the confined forwarders that `bro activate` writes: it sees its clients as an id of no user's, and `bro doctor`
//! says so where it does not let such an id in.

use anyhow::{Context as _, Result, ensure};
use bro_tests::host::site::{PATIENCE, Plan, Site};
use bro_tests::host::{Host, Manager};

/// Says which user it sees, to each client.
const SERVICE: &str = r"import os,socket,struct
s=socket.socket(socket.AF_UNIX); s.bind('/tmp/who.sock'); os.chmod('/tmp/who.sock',MODE); s.listen()
while True:
    c,_=s.accept(); p,u,g=struct.unpack('3i',c.getsockopt(1,17,12))
    try: c.sendall(b'%d:%d\n'%(u,g))
    except OSError: pass
    c.close()
";

/// Each manager's own: the cases of both run at once, and change it.
fn script(manager: Manager) -> &'static str {
    match manager {
        Manager::System => "/srv/seen.py",
        Manager::User(_) => "/srv/seen-by-a-user.py",
    }
}

fn plan(manager: Manager) -> Plan {
    let container = format!(
        "Rootfs={}:O\nVolume={}:/srv/seen.py:ro\nTmpfs=/tmp\nStopSignal=SIGKILL\nExec=/usr/bin/python3 /srv/seen.py",
        manager.image(),
        script(manager)
    );
    Plan::new(&container, "", "")
}

const OPTIONS: [&str; 4] = ["--internal-port", "/tmp/who.sock", "--exit-idle-time", "1min"];

fn is_no_user(said: &str) -> bool {
    let ids = said.trim().split_once(':');
    ids.is_some_and(|(uid, gid)| {
        uid == gid && uid.parse().is_ok_and(|uid: u32| (65520..=65531).contains(&uid))
    })
}

pub fn who_connects(host: &Host, manager: Manager) -> Result<()> {
    let write = |mode: &str| host.write(script(manager), SERVICE.replace("MODE", mode));
    write("0o666")?;
    let site = Site::activated(host, manager, "seen", &plan(manager), &OPTIONS)?;
    let ask = || host.sh(&format!("timeout 20 socat -u TCP:127.0.0.1:{} - || :", site.port));
    let doctor = || manager.try_run(host, &["bro", "doctor", "seen"]);
    // It stays awake while it is looked at.
    let asleep = || -> Result<()> {
        manager.run(host, &["bro", "sleep", "--force", "seen"])?;
        manager.wait_for(host, &site.unit(), "ActiveState", "inactive", PATIENCE)?;
        manager.wait_for(host, &site.forwarder(), "ActiveState", "inactive", PATIENCE)
    };
    let said = ask()?;
    ensure!(is_no_user(&said), "the service sees {said:?}\n{}", site.journal());
    let well = doctor()?;
    ensure!(
        well.stdout.contains("listens at /tmp/who.sock, and lets the forwarder's clients in"),
        "{well:?}"
    );
    asleep()?;

    write("0o600")?;
    ensure!(ask()?.is_empty(), "a stranger was let in");
    let ill = doctor()?;
    ensure!(ill.code == 1 && ill.stdout.contains("does not let the user in at /tmp/who.sock"), "{ill:?}");
    // As the line says that mends it.
    manager.run(host, &["bro", "sleep", "--force", "seen"])?;
    manager.run(host, &["bro", "activate", "seen", "--unix-identity", "0:0"])?;
    let said = ask()?;
    ensure!(said.trim() == "0:0", "the service sees {said:?}\n{}", site.journal());
    let well = doctor()?;
    ensure!(well.success(), "{well:?}");
    asleep()?;
    Ok(())
}

/// The system's forwarder for a user's container. Not beside the system's own cases, which look at all of the system's units.
pub fn of_a_user(host: &Host) -> Result<()> {
    let (user, manager) = ("test", Manager::User("test"));
    host.write(script(manager), SERVICE.replace("MODE", "0o666"))?;
    plan(manager).write_quadlet(host, manager, "theirs")?;
    let port = host.free_port()?;
    let external = format!("127.0.0.1:{port}");
    let mut words =
        vec!["bro", "activate", "theirs", "--system", "--run-as", user, "--external-port", &external];
    words.extend(OPTIONS);
    host.run(&words)?;
    let said = host.sh(&format!("timeout 20 socat -u TCP:{external} - || :"));
    let removed = host.run(&["bro", "activate", "theirs", "--system", "--remove"]);
    let said = said?;
    ensure!(is_no_user(&said), "the service sees {said:?}");
    removed?;
    manager.systemctl(host, &["stop", "theirs.service"])?;
    Ok(())
}

/// Containers of an image, whose files Podman maps as `UIDMap=` and `nomap` say. PostgreSQL's `peer` names the user that it sees and that
/// its system does not know.
pub fn mapped(host: &Host, manager: Manager) -> Result<()> {
    const IMAGE: &str = "docker.io/library/postgres";
    manager.import_image(host, "postgres", IMAGE)?;
    let line = match manager {
        Manager::System => "UIDMap=0:300000:65536\nGIDMap=0:300000:65536",
        Manager::User(_) => "UserNS=nomap",
    };
    let container = format!(
        "Image={IMAGE}\n{line}\nEnvironment=POSTGRES_PASSWORD=secret\n\
         Exec=sh -c 'echo local all all peer >/var/lib/postgresql/data/pg_hba.conf; \
         exec postgres -c listen_addresses= -c unix_socket_directories=/tmp'"
    );
    let options = ["--internal-port", "/tmp/.s.PGSQL.5432", "--exit-idle-time", "1min"];
    let site = Site::activated(host, manager, "mapped", &Plan::new(&container, "", ""), &options)?;
    let psql = format!("psql -w -U postgres -h 127.0.0.1 -p {} -Atc 'select 1' 2>&1 || true", site.port);
    let mut said = String::new();
    host.wait_until("PostgreSQL's answer", PATIENCE, || {
        said = host.sh(&psql)?;
        Ok(!said.contains("starting up"))
    })?;
    ensure!(said.contains("Peer authentication failed"), "{said}\n{}", site.journals());
    let log = manager.run(host, &["sh", "-c", "podman logs systemd-mapped 2>&1"])?;
    let seen = log.split_once("local user ID ").and_then(|(_, rest)| rest.split_once(':'));
    let seen: u32 = seen.with_context(|| log.clone())?.0.parse()?;
    ensure!((65520..=65531).contains(&seen), "it sees {seen}");
    Ok(())
}
