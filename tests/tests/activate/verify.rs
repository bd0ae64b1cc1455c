//! `systemd-analyze verify` has nothing to say about what is written.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use bro_tests::tier::Need;

use crate::tree::{Tree, said};

#[test]
fn systemd_has_nothing_to_complain_of() -> Result<()> {
    if !bro_tests::tier::met(
        "systemd_has_nothing_to_complain_of",
        &[Need::Program("systemd-analyze", "systemd")],
    ) {
        return Ok(());
    }
    let tree = Tree::new(&[
        ("etc/containers/systemd/web.container", "[Container]\nImage=localhost/web\nNetwork=none\n"),
        ("etc/containers/systemd/tpl@.container", "[Container]\nImage=localhost/web\n"),
        ("etc/containers/systemd/nginx.container", "[Container]\nImage=docker.io/library/nginx\n"),
    ])?;
    let runs: &[&[&str]] = &[
        &[
            "web",
            "--external-port",
            "8080",
            "--internal-port",
            "80",
            "--ready",
            "exec:test -e \"/x y\" && echo 100% $HOME",
            "--busy-exec",
            "pgrep -f 'a b' | grep -q 1; true",
            "--busy-file",
            "/run/with space",
            "--backlog",
            "77",
            "--bind-to-device",
            "lo",
            "--exit-idle-time",
            "1h 30min",
            "--relay",
            "splice",
            "--keep-awake",
            "Mon..Fri 09:00..18:00 Europe/Berlin",
        ],
        &["web", "--service-name", "metrics", "--external-port", "192.0.2.1:9100"],
        &["web", "--service-name", "six", "--external-port", "[::]:9101", "--internal-port", "[::1]:80"],
        &[
            "web",
            "--service-name",
            "unix",
            "--external-port",
            "/run/web.sock",
            "--internal-port",
            "/run/in.sock",
        ],
        &["web", "--service-name", "abstract", "--external-port", "@web", "--internal-port", "80"],
        &["tpl@one", "--external-port", "127.0.0.1:8081"],
        &["web", "--external-port", "names=53/tcp+udp", "--external-port", "voice=192.0.2.1:30000-30009/udp"],
        &["web", "--external-port", "bus=seqpacket:/run/bus", "--internal-port", "bus=/run/in"],
        &["web", "--external-port", "log=dgram:@log", "--internal-port", "log=/run/log"],
        &["nginx", "--direct", "--external-port", "8082", "--external-port", "vm=vsock:2:5000"],
    ];
    for run in runs {
        let answer = tree.run(run)?;
        ensure!(answer.code == 0, "{run:?}: {answer:?}");
    }
    // What Podman's generator would make.
    let units = tree.path("etc/systemd/system");
    for unit in ["web", "tpl@one", "nginx"] {
        tree.write(&format!("etc/systemd/system/{unit}.service"), "[Service]\nExecStart=/bin/true\n")?;
    }
    let files: Vec<_> = std::fs::read_dir(&units)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    let files = files.into_iter().filter(|path| path.is_file());
    let analyze = bro_tests::tier::find_program("systemd-analyze").context("looked for above")?;
    let mut command = Command::new(analyze);
    command.args(["verify", "--man=no"]).args(files).env("SYSTEMD_LOG_LEVEL", "warning");
    let answer = said(command.env("SYSTEMD_UNIT_PATH", format!("{}:", units.display())))?;
    // Only what it says about these: the machine's own units may be in any state.
    let ours: Vec<&str> = answer
        .stderr
        .lines()
        .filter(|line| {
            line.contains(&*units.to_string_lossy()) || line.contains("-activator") || line.contains("nginx")
        })
        .collect();
    ensure!(ours.is_empty() && answer.code == 0, "{answer:?}");
    Ok(())
}
