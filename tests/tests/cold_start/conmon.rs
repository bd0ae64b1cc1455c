//! Which process is a container's conmon, and which only says so.

use super::*;

/// A process that says on its command line that it is a container's conmon, with a child that could be the container's process. The
/// words before it are how it is run.
struct FalseConmon {
    process: std::process::Child,
    child: i32,
}

impl FalseConmon {
    fn start(folder: &std::path::Path, words: &[&str], name: &str, padding: usize) -> Result<Self> {
        let (conmon, pidfile) = (folder.join("conmon"), folder.join(format!("{name}.pid")));
        if !conmon.exists() {
            std::os::unix::fs::symlink("/bin/sh", &conmon)?;
        }
        let script = format!("sleep 1000 & wait # {}", "x".repeat(padding));
        let mut words: Vec<&std::ffi::OsStr> = words.iter().map(|word| std::ffi::OsStr::new(*word)).collect();
        words.extend([conmon.as_os_str(), "-c".as_ref(), script.as_ref(), "-n".as_ref(), name.as_ref()]);
        words.extend(["-p".as_ref(), pidfile.as_os_str()]);
        let process = std::process::Command::new(words[0]).args(&words[1..]).spawn()?;
        let mut this = Self { process, child: 0 };
        let find = || {
            let below = process::children(this.process.id().cast_signed());
            let mut all = below.clone();
            all.extend(below.iter().flat_map(|pid| process::children(*pid)));
            all.into_iter().find(|pid| process::name(*pid).as_deref() == Some("sleep"))
        };
        ensure!(process::eventually(PATIENCE, || find().is_some()), "it has no child");
        this.child = find().context("it had one")?;
        std::fs::write(pidfile, this.child.to_string())?;
        Ok(this)
    }
}

impl Drop for FalseConmon {
    fn drop(&mut self) {
        if self.child > 0 {
            kill(Pid::from_raw(self.child), Signal::SIGKILL).ok();
        }
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

/// Root of a container is the container's owner outside, and calls its processes as it likes. But they are in a process namespace of
/// their own.
#[test]
fn a_conmon_inside_a_container_is_none() -> Result<()> {
    require_namespaces!();
    use bro_user::podman::container::{Sighting, running, sighted_in};
    use bro_user::systemd::manager::Residence;
    let scene = Scene::new()?;
    let own = format!("bro-test-own-{}", std::process::id());
    let outside = FalseConmon::start(scene.folder(), &[], &own, 0)?;
    ensure!(running(&own) == Some(outside.child), "{:?}, not {}", running(&own), outside.child);
    let name = format!("bro-test-inside-{}", std::process::id());
    let words = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"];
    let inside = FalseConmon::start(scene.folder(), &words, &name, 0)?;
    ensure!(running(&name).is_none(), "process {} is taken for a container's", inside.child);

    // Where its unit's processes are known, no other counts; and of those the main one is conmon.
    let elsewhere = Residence { main: std::process::id(), cgroup: None };
    ensure!(sighted_in(&elsewhere, &own) == Sighting::Nothing, "found outside its unit");
    let main = Residence { main: outside.process.id(), cgroup: None };
    let found = Sighting::Running(outside.child);
    ensure!(sighted_in(&main, &own) == found, "not found as its unit's main process");
    // As a cgroup lists it.
    let unit = scene.folder().join("unit");
    let residence = Residence { main: 0, cgroup: Some(unit.clone()) };
    let list = format!("{}\n", outside.process.id());
    std::fs::create_dir_all(unit.join("supervisor"))?;
    std::fs::write(unit.join("supervisor/cgroup.procs"), &list)?;
    ensure!(sighted_in(&residence, &own) == found, "not found in its unit's cgroup");
    // Another container's conmon, beside which there is no container's cgroup yet; then there is.
    let seen = || sighted_in(&residence, "bro-test-another");
    ensure!(seen() == Sighting::Nothing, "{:?} of a unit whose conmon has no container yet", seen());
    std::fs::create_dir(unit.join("libpod-payload-1"))?;
    ensure!(seen() == Sighting::Near, "{:?} of a unit with a container's cgroup", seen());
    std::fs::remove_dir(unit.join("libpod-payload-1"))?;
    std::fs::write(unit.join("cgroup.procs"), &list)?;
    ensure!(seen() == Sighting::Near, "{:?} of a unit with a conmon in its own cgroup", seen());
    Ok(())
}

/// A command line may have megabytes: no more than its start is read, where Podman puts what is looked for.
#[test]
fn a_long_command_line_is_not_read_to_its_end() -> Result<()> {
    require_namespaces!();
    let scene = Scene::new()?;
    let name = format!("bro-test-long-{}", std::process::id());
    let near = FalseConmon::start(scene.folder(), &[], &name, 1000)?;
    ensure!(bro_user::podman::container::running(&name) == Some(near.child), "not found");
    let name = format!("bro-test-longer-{}", std::process::id());
    let far = FalseConmon::start(scene.folder(), &[], &name, 100_000)?;
    ensure!(bro_user::podman::container::running(&name).is_none(), "found {} behind it all", far.child);
    Ok(())
}
