//! HAProxy on either side of bro, by PROXY v1 and v2: the one in front says who its client is, the one behind believes it.

use anyhow::{Context as _, Result, ensure};
use bro_tests::host::site::{Plan, Site, folder, text};
use bro_tests::host::{Host, Manager};

const DEFAULTS: &str = "defaults\n timeout connect 10s\n timeout client 10s\n timeout server 10s\n";

/// Answers with the address and port that it takes for its client's.
const BEHIND: &str = "frontend behind\n mode http\n bind 127.0.0.1:7 accept-proxy\n \
    http-request return status 200 content-type text/plain lf-string \"%[src]:%[src_port]\"\n";

/// A balancer of the host's in front. Dropping it stops it.
struct Front<'h> {
    host: &'h Host,
    manager: Manager,
    port: u16,
}

impl<'h> Front<'h> {
    const UNIT: &'static str = "balancer.service";

    /// Leads to `port`, as HAProxy's `option` has it.
    fn new(host: &'h Host, manager: Manager, files: &str, port: u16, option: &str) -> Result<Self> {
        let front = Self { host, manager, port: host.free_port()? };
        let listen = format!(
            "listen front\n mode tcp\n bind :{}\n server bro 127.0.0.1:{port} {option}\n",
            front.port
        );
        host.write(&format!("{files}/front.cfg"), format!("{DEFAULTS}{listen}"))?;
        let service =
            format!("[Service]\nType=notify\nExecStart=/usr/sbin/haproxy -Ws -f {files}/front.cfg\n");
        manager.unit(host, Self::UNIT, &service)?;
        manager.systemctl(host, &["daemon-reload"])?;
        manager.systemctl(host, &["start", Self::UNIT])?;
        Ok(front)
    }
}

impl Drop for Front<'_> {
    fn drop(&mut self) {
        self.manager.systemctl(self.host, &["stop", Self::UNIT]).ok();
    }
}

pub fn on_either_side(host: &Host, manager: Manager) -> Result<()> {
    let files = folder(host, manager, "balancer")?;
    host.write(&format!("{files}/behind.cfg"), format!("{DEFAULTS}{BEHIND}"))?;
    let container = format!(
        "Rootfs={}:O\nVolume={files}:/srv/balancer:ro\nStopSignal=SIGKILL\n\
         Exec=/usr/sbin/haproxy -db -f /srv/balancer/behind.cfg",
        manager.image()
    );
    for (said, on) in [("send-proxy", "v2"), ("send-proxy-v2", "v1")] {
        let options =
            ["--accept-proxy", "--trusted", "127.0.0.1", "--proxy-protocol", on, "--exit-idle-time", "1s"];
        let site = Site::activated(
            host,
            manager,
            &format!("balanced-{on}"),
            &Plan::new(&container, "", ""),
            &options,
        )?;
        let front = Front::new(host, manager, &files, site.port, said)?;
        let mut clients = Vec::new();
        for (from, to) in [("127.0.0.9", "127.0.0.1"), ("192.0.2.1", "192.0.2.1")] {
            let answer = host.sh(&format!(
                "curl --silent --show-error --fail --max-time 20 --interface {from} \
                 --write-out ' %{{local_ip}}:%{{local_port}}' http://{to}:{}/",
                front.port
            ));
            let answer = answer.with_context(|| format!("{said}, {on}\n{}", site.journals()))?;
            let (seen, own) = answer.split_once(' ').context("an address, and another")?;
            ensure!(seen == own && own.starts_with(from), "{said}, {on}: {own} is seen as {seen}");
            clients.push(own.to_owned());
        }
        let ended = site.ended(clients.len())?;
        let logged: Vec<String> = ended.iter().map(|record| text(record, "BRO_PEER")).collect();
        ensure!(logged == clients, "{said}, {on}: {logged:?} are in the log instead of {clients:?}");
        drop(front);
        site.await_exit()?;
        site.await_container_gone()?;
    }
    Ok(())
}
