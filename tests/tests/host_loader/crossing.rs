//! Attempts to cross the line, on a host as it is.

use anyhow::{Result, ensure};
use bro_tests::host::site::{PATIENCE, Plan, Site, text};
use bro_tests::host::{Host, Manager};

use crate::users::{expect_lane, relay_of_the_next};
use crate::{load, unload};

pub fn other_user(host: &Host) -> Result<()> {
    let uid = load(host, "test")?;
    for command in [
        format!("ls /run/bro/bpf/{uid}"),
        format!("ls /run/bro/bpf/{uid}/seats/00"),
        format!("cat /run/bro/bpf/{uid}/records"),
        format!("rm /run/bro/bpf/{uid}/link"),
        "ls /run/bro/bpf".to_owned(),
    ] {
        let ran = host.try_run_as("other", &["sh", "-c", &command])?;
        ensure!(!ran.success() && ran.stderr.contains("Permission denied"), "{command}: {ran:?}");
    }
    for command in [vec!["bro", "loader", "test"], vec!["bro", "loader", "--remove", "test"]] {
        let ran = host.try_run_as("other", &command)?;
        ensure!(ran.code == 5 && ran.stderr.starts_with("bro: only root may load"), "{ran:?}");
    }
    // His own forwarder has nothing of it, and says so.
    let other = Manager::User("other");
    let site = Site::new(host, other, "without", &Plan::service(other, 0.0, ""))?;
    for _ in 0..4 {
        let relay = relay_of_the_next(&site)?;
        ensure!(relay == "splice", "relayed by {relay}: {}", site.journal());
    }
    ensure!(site.journal().contains("systemctl enable --now bro-loader@"), "{}", site.journal());
    drop(site);
    unload(host, "test")
}

/// A process of another user's in this one's slice, as `sudo` leaves it: its connections take no lane, and her forwarder says so.
pub fn in_the_same_slice(host: &Host) -> Result<()> {
    let uid = load(host, "test")?;
    let test = Manager::User("test");
    let site =
        Site::new(host, test, "shared", &Plan::service(test, 0.0, "--relay=sockmap --local-clients=on"))?;
    expect_lane(&site)?;
    let client = format!(
        "import socket; s = socket.create_connection(('127.0.0.1', {})); s.sendall(b'ping'); assert s.recv(4) == b'ping'",
        site.port
    );
    let slice = format!("Slice=user-{uid}.slice");
    for user in ["User=other", "User=root"] {
        let run = ["systemd-run", "--quiet", "--wait", "-p", &slice, "-p", user, "python3", "-c", &client];
        host.run(&run)?;
    }
    host.wait_until("the line that tells of them", PATIENCE, || {
        let records = site.front.journal_records(host, &site.forwarder())?;
        Ok(records.iter().any(|record| text(record, "MESSAGE").contains("of other users alone")))
    })?;
    // At most one a minute; the rest comes at the end.
    site.front.systemctl(host, &["stop", &site.forwarder()])?;
    let told = |records: Vec<serde_json::Value>| {
        records.iter().filter_map(|record| text(record, "BRO_FOREIGN").parse::<u32>().ok()).sum::<u32>()
    };
    let told = told(site.front.journal_records(host, &site.forwarder())?);
    ensure!(told == 2, "{told} were told of: {}", site.journal());
    drop(site);
    unload(host, "test")
}

/// bpf(2) by its number, and the pins by their path: neither is there for what runs in a container of the user himself.
const INSIDE: &str = "import ctypes, errno, os\n\
    libc = ctypes.CDLL(None, use_errno=True)\n\
    path = ctypes.create_string_buffer(b'/run/bro/bpf/UID/records')\n\
    attr = (ctypes.c_uint64 * 2)(ctypes.addressof(path), 0)\n\
    r = libc.syscall(321, 7, attr, 16)\n\
    print(os.getuid(), os.path.exists('/run/bro'), r, errno.errorcode[ctypes.get_errno()])";

pub fn inside_a_container(host: &Host) -> Result<()> {
    let uid = load(host, "test")?;
    let test = Manager::User("test");
    let site = Site::new(host, test, "inside", &Plan::service(test, 0.0, "--relay=sockmap"))?;
    expect_lane(&site)?;
    let script = INSIDE.replace("UID", &uid.to_string());
    let said = test.run(host, &["podman", "exec", "systemd-inside", "python3", "-c", &script])?;
    // Podman's filter of system calls says EPERM before the kernel looks at the path; without it, it is not there.
    ensure!(said == "0 False -1 EPERM" || said == "0 False -1 ENOENT", "{said}");
    drop(site);
    unload(host, "test")
}
