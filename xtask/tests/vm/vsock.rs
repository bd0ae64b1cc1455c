//! Clients over vsock(7), of which this machine's kernel has the loopback: the suite about them, and systemd's own sockets.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use bro_tests::host::cases::note;
use bro_tests::scratch::Scratch;
use bro_tests::vm::Machine;
use bro_tests::{bro, emulator};

use crate::site::Site;

/// Of the suite: what is about who clients are, and a few behaviours over one relay. The others run on other kernels (`emulator`).
const LEFT_OUT: [&str; 3] = ["direct", "copy_to_tcp", "splice_to_a_unix_socket"];

/// What the machine is brought for it.
pub fn files(scratch: &Scratch) -> Result<Vec<PathBuf>> {
    let services = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/services");
    let mut files = vec![services.join("echo.py"), services.join("echo_client.py")];
    let suite = emulator::built([emulator::VSOCK].into_iter())?.remove(0);
    for (program, name) in [(suite, emulator::VSOCK), (bro::helper(), "peer")] {
        let stripped = scratch.join(name);
        let status = Command::new("strip").arg("-o").args([&stripped, &program]).status()?;
        ensure!(status.success(), "cannot strip {}", program.display());
        files.push(stripped);
    }
    Ok(files)
}

/// The suite, with the program that is installed.
pub fn suite(machine: &Machine) -> Result<()> {
    let left_out = LEFT_OUT.map(|test| format!("--skip {test}")).join(" ");
    let ran = machine.root.try_run(&[
        "sh",
        "-euc",
        &format!(
            "modprobe vsock_loopback
             mkdir -p /root/suite/deps; cp /run/brought/peer /root/suite; cp /run/brought/vsock /root/suite/deps
             : >/root/suite/skips
             BRO_FEW=1 BRO_BIN=/usr/bin/bro BRO_SKIPS=/root/suite/skips timeout 110 /root/suite/deps/vsock --exact {left_out}
             cat /root/suite/skips"
        ),
    ])?;
    ensure!(ran.success() && !ran.stdout.contains("SKIPPED"), "{}{}", ran.stdout, ran.stderr);
    note(ran.stdout.lines().find(|line| line.starts_with("test result:")).context("no result")?);
    Ok(())
}

/// systemd listens there, for a forwarder that `bro activate` has written, and for a container's own program.
pub fn activated(machine: &Machine) -> Result<()> {
    let (root, site) = (&machine.root, Site::spliced(machine));
    root.run(&["modprobe", "vsock_loopback"])?;
    site.activate(&["--external-port", "vm=vsock::5000", "--internal-port", "vm=7"])?;
    let client = |addresses: &[&str]| {
        let said = root.run(&[&["python3", "/run/brought/echo_client.py"], addresses].concat());
        let said = said.with_context(|| site.journals())?;
        ensure!(said == format!("whole {}", addresses.len()), "{said}");
        Ok(())
    };
    client(&["vsock:1:5000", &format!("tcp:127.0.0.1:{}", site.port)])?;
    let journal = root.journal(&site.forwarder())?;
    ensure!(journal.contains("peer=vsock:1:"), "{journal}");
    site.await_idle_stop()?;
    let doctor = root.try_run(&["bro", "doctor", site.name])?;
    ensure!(doctor.success(), "{}{}", doctor.stdout, doctor.stderr);
    root.run(&["bro", "activate", site.name, "--service-name", "vm", "--remove"])?;

    let quadlet = "[Container]\\nNetwork=none\\nRootfs=/srv/image:O\\nStopSignal=SIGKILL\\n\
                   Volume=/run/brought/echo.py:/srv/echo.py:ro\\nExec=python3 /srv/echo.py\\n";
    root.sh(&format!("printf '{quadlet}' >/etc/containers/systemd/taken.container"))?;
    root.run(&["bro", "activate", "taken", "--direct", "--external-port", "vsock::5001"])?;
    client(&["vsock:1:5001"]).with_context(|| root.journal("taken.service").unwrap_or_default())?;
    root.run(&["bro", "activate", "taken", "--remove"])?;
    root.run(&["systemctl", "stop", "taken.service"])?;
    // It was killed, and the log of this boot names no unit that failed.
    root.sh("systemctl reset-failed taken.service; rm /etc/containers/systemd/taken.container; systemctl daemon-reload").map(drop)
}
