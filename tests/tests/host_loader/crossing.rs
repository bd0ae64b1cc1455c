//! Attempts to cross the line, on a host as it is.

use anyhow::{Result, ensure};
use bro_tests::host::site::{Plan, Site};
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
    let site = Site::new(host, test, "inside", &Plan::service(test, 0.0, ""))?;
    expect_lane(&site)?;
    let script = INSIDE.replace("UID", &uid.to_string());
    let said = test.run(host, &["podman", "exec", "systemd-inside", "python3", "-c", &script])?;
    // Podman's filter of system calls says EPERM before the kernel looks at the path; without it, it is not there.
    ensure!(said == "0 False -1 EPERM" || said == "0 False -1 ENOENT", "{said}");
    drop(site);
    unload(host, "test")
}
