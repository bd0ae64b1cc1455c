//! A service in a container that asks who connects to its unix socket.

use anyhow::{Context as _, Result, ensure};
use bro_tests::host::{Host, Manager};

use crate::site::{PATIENCE, Plan, Site};

/// Says whom it sees, and with which groups, to each client.
const SERVICE: &str = r"import os,socket,struct
s=socket.socket(socket.AF_UNIX); s.bind('/tmp/who.sock'); os.chmod('/tmp/who.sock',MODE); s.listen()
while True:
    c,_=s.accept(); p,u,g=struct.unpack('3i',c.getsockopt(1,17,12))
    try: n=len(c.getsockopt(1,59,256))
    except OSError: n=-1
    c.sendall(b'%d %d %d\n'%(u,g,n)); c.close()
";

/// What the service says of a client over TCP: user, group, and the length of the list of its groups.
fn seen(site: &Site<'_>) -> Result<(u32, u32, i32)> {
    let said = site.host.sh(&format!("timeout 20 socat -u TCP:127.0.0.1:{} -", site.port))?;
    let mut words = said.split_whitespace();
    let mut next = || words.next().with_context(|| format!("the service says {said:?}"));
    Ok((next()?.parse()?, next()?.parse()?, next()?.parse()?))
}

pub fn who_connects(host: &Host, manager: Manager) -> Result<()> {
    // With other user namespaces (UIDMap=, nomap) Podman does not start a container of a root that it cannot map, as this host's is with
    // `:O`: host_activate has those of an image.
    let namespaces: &[&str] = match manager {
        Manager::System => &[""],
        Manager::User(_) => &["", "UserNS=keep-id"],
    };
    // The other manager's case runs beside this one, and with another mode at times.
    let script = match manager {
        Manager::System => "/srv/who.py",
        Manager::User(_) => "/srv/who-rootless.py",
    };
    let write = |mode: &str| host.write(script, SERVICE.replace("MODE", mode));
    let plan = |line: &str, identity: &str| {
        let container = format!(
            "Rootfs={}:O\nVolume={script}:/srv/who.py:ro\nTmpfs=/tmp\nStopSignal=SIGKILL\n{line}\nExec=/usr/bin/python3 /srv/who.py",
            manager.image()
        );
        Plan::new(&container, &format!("--exit-idle-time 300ms {identity}"), "/tmp/who.sock")
    };
    write("0o666")?;
    for line in namespaces {
        let site = Site::new(host, manager, "who", &plan(line, ""))?;
        let (uid, gid, groups) =
            seen(&site).map_err(|error| error.context(format!("{line}\n{}", site.journal())))?;
        ensure!(uid == gid && (65520..=65531).contains(&uid) && groups == 0, "{line}: {uid} {gid} {groups}");
        site.await_exit()?;
        site.await_container_gone()?;
    }
    let site = Site::new(host, manager, "who", &plan("", "--unix-identity 33:7"))?;
    ensure!(seen(&site)? == (33, 7, 0), "{:?}", seen(&site));
    site.await_exit()?;
    site.await_container_gone()?;
    drop(site);
    let site = Site::new(host, manager, "who", &plan("", "--unix-identity forwarder"))?;
    ensure!(seen(&site)?.0 == 0, "{:?}", seen(&site));
    site.await_exit()?;
    site.await_container_gone()?;
    drop(site);
    // Closed to everybody else.
    write("0o600")?;
    let site = Site::new(host, manager, "who", &plan("", ""))?;
    ensure!(seen(&site).is_err(), "a stranger was let in");
    host.wait_until("the log says why", PATIENCE, || {
        Ok(site.journal().contains("does not let the user in as whom this forwarder connects"))
    })
    .with_context(|| site.journal())?;
    Ok(())
}
