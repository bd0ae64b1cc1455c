//! The test host itself: boots, runs things as root and as a user, keeps its disk over a reboot and leaves nothing behind.
//!
//! Needs: root, mmdebstrap. Takes: seconds.

use std::io::{Read as _, Write as _};

use anyhow::{Result, ensure};
use bro_tests::host::cases::{Cases, note};
use bro_tests::host::site::PATIENCE;
use bro_tests::host::{Host, Manager, NEEDS};

#[test]
fn the_test_host_works_and_leaves_nothing_behind() {
    if !bro_tests::tier::met("the_test_host_works_and_leaves_nothing_behind", &NEEDS) {
        return;
    }
    let cases = Cases::default();
    let mut host = Host::boot().expect("the host boots");
    note(&format!("the host booted in {:.1} s", host.booted_in().as_secs_f64()));

    cases.case("all units of the host are well", || {
        let state = host.try_run(&["systemctl", "is-system-running"])?;
        let failed = host.run(&["systemctl", "--failed", "--no-legend"])?;
        ensure!(state.stdout.trim() == "running", "{}: {failed}", state.stdout.trim());
        let cgroup = host.run(&["cat", "/proc/self/cgroup"])?;
        ensure!(cgroup.lines().any(|line| line == "0::/init.scope"), "{cgroup}");
        Ok(())
    });
    for manager in [Manager::System, Manager::User("test")] {
        cases.case(&format!("a quadlet without network runs under {manager:?}"), || quadlet(&host, manager));
        cases.case(&format!("an activated socket is relayed under {manager:?}"), || {
            activation(&host, manager)
        });
    }
    cases.case("the disk survives reboot and power cut, /run does not", || {
        host.write("/root/kept", "kept")?;
        host.write("/home/test/kept", "kept")?;
        host.write("/run/lost", "lost")?;
        for crash in [false, true] {
            if crash {
                host.power_cut()?
            } else {
                host.reboot()?
            };
            ensure!(host.run(&["cat", "/root/kept", "/home/test/kept"])? == "keptkept");
            ensure!(!host.try_run(&["cat", "/run/lost"])?.success());
            let images = host.run_as("test", &["podman", "images", "--format", "{{.Repository}}"])?;
            ensure!(images.contains("localhost/busybox"), "images after the reboot: {images}");
        }
        Ok(())
    });
    cases.case("nothing is left of a host that is dropped", || {
        let (pid, name) = (host.pid(), host.name());
        let folder = std::env::temp_dir().join(&name);
        ensure!(folder.is_dir());
        drop(host);
        ensure!(!folder.exists(), "{} is still there", folder.display());
        ensure!(!std::path::Path::new(&format!("/proc/{pid}")).exists(), "its systemd still runs");
        ensure!(!std::fs::read_to_string("/proc/self/mounts")?.contains(&name), "something is still mounted");
        let cgroups = std::process::Command::new("find").args(["/sys/fs/cgroup", "-name", &name]).output()?;
        ensure!(cgroups.stdout.is_empty(), "its cgroup is still there");
        Ok(())
    });
    cases.conclude();
}

fn quadlet(host: &Host, manager: Manager) -> Result<()> {
    manager.import_busybox(host)?;
    let text = "[Container]\nImage=localhost/busybox\nNetwork=none\nStopSignal=SIGKILL\n\
                Exec=/bin/httpd -f -p 127.0.0.1:80\n";
    manager.quadlet(host, "web.container", text)?;
    manager.systemctl(host, &["daemon-reload"])?;
    manager.systemctl(host, &["start", "web.service"])?;
    let inspected = manager.run(host, &["podman", "inspect", "--format", "{{.State.Pid}}", "systemd-web"])?;
    host.wait_until("a listener in the container", PATIENCE, || {
        let listeners = host.run(&["nsenter", "--target", &inspected, "--net", "ss", "-Hltn"])?;
        Ok(listeners.contains("127.0.0.1:80"))
    })?;
    manager.systemctl(host, &["stop", "web.service"])?;
    Ok(())
}

/// systemd-socket-proxyd in the place of bro: shows that the host can activate, and that a client can reach it from here.
fn activation(host: &Host, manager: Manager) -> Result<()> {
    let (port, behind) = (host.free_port()?, host.free_port()?);
    manager.unit(host, "proxy.socket", &format!("[Socket]\nListenStream=0.0.0.0:{port}\n"))?;
    let proxy = format!("/usr/lib/systemd/systemd-socket-proxyd --exit-idle-time=1s 127.0.0.1:{behind}");
    let service = format!(
        "[Unit]\nRequires=echo.service\nAfter=echo.service\n[Service]\nType=notify\nExecStart={proxy}\n"
    );
    manager.unit(host, "proxy.service", &service)?;
    let socat = format!("/usr/bin/socat TCP-LISTEN:{behind},bind=127.0.0.1,fork,reuseaddr EXEC:cat");
    // The service is "started" before socat listens, and proxyd does not wait for that: ExecStartPost does here.
    let wait = format!("/bin/sh -c 'until ss -Hltn | grep -q :{behind}; do sleep 0.02; done'");
    let echo = format!("[Unit]\nStopWhenUnneeded=yes\n[Service]\nExecStart={socat}\nExecStartPost={wait}\n");
    manager.unit(host, "echo.service", &echo)?;
    manager.systemctl(host, &["daemon-reload"])?;
    manager.systemctl(host, &["start", "proxy.socket"])?;
    for _ in 0..2 {
        ensure!(manager.show(host, "proxy.service", "ActiveState")? == "inactive");
        let mut client = host.connect(port)?;
        client.write_all(b"hello")?;
        let mut answer = [0; 5];
        client.read_exact(&mut answer)?;
        ensure!(&answer == b"hello");
        drop(client);
        manager.wait_for(host, "proxy.service", "ActiveState", "inactive", PATIENCE)?;
        // Stopped by SIGTERM, socat exits with 143: whichever way, it is gone.
        host.wait_until("the end of echo.service", PATIENCE, || {
            Ok(manager.show(host, "echo.service", "MainPID")? == "0")
        })?;
    }
    manager.systemctl(host, &["stop", "proxy.socket"])?;
    Ok(())
}
