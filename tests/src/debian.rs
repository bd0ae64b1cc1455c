//! Debian's archive, and root file systems that mmdebstrap makes of it.

use std::io::Write as _;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};

/// The Debian release that hosts and machines run.
pub(crate) const SUITE: &str = "trixie";

/// A root file system to make.
pub(crate) struct Root<'a> {
    /// What it is for, for people who wait.
    pub(crate) what: &'a str,
    /// The packages in it besides the smallest system: one a line, `#` begins a line for people.
    pub(crate) packages: &'a str,
    /// A shell script that is run with the root as its argument before the packages are in, or nothing.
    pub(crate) prepare: &'a str,
    /// The same, once they are in.
    pub(crate) customize: &'a str,
}

impl Root<'_> {
    /// Makes it at `root`; `scripts` is a folder for the scripts.
    pub(crate) fn build(&self, scripts: &Path, root: &Path) -> Result<()> {
        let mirror = mirror()?;
        let began = Instant::now();
        say(&format!("building the root of {} (about 80 s, once)", self.what));
        let hook = |kind: &str, script: &str| -> Result<String> {
            let path = scripts.join(format!("{kind}.sh"));
            std::fs::write(&path, script)?;
            Ok(format!("--{kind}-hook=sh {} \"$1\"", quoted(&path)))
        };
        let lines = self.packages.lines().map(str::trim);
        let packages: Vec<&str> = lines.filter(|line| !line.is_empty() && !line.starts_with('#')).collect();
        let output = Command::new("setpriv")
            // The build dies with the test that waits for it, and what it mounts is seen by it alone.
            .args(["--pdeathsig", "KILL", "unshare", "--mount", "--propagation", "private"])
            .args(["mmdebstrap", "--quiet", "--mode=root", "--variant=minbase"])
            .args(["--aptopt=Acquire::Languages \"none\"", "--dpkgopt=force-unsafe-io"])
            .args(["--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/doc/*"])
            .args(["--dpkgopt=path-exclude=/usr/share/locale/*"])
            .args(apt_proxy().map(|proxy| format!("--aptopt=Acquire::http::Proxy \"{proxy}\"")))
            .arg(format!("--include={}", packages.join(",")))
            .arg(hook("essential", self.prepare)?)
            .arg(hook("customize", self.customize)?)
            .arg(SUITE)
            .arg(root)
            .arg(format!("deb {mirror} {SUITE} main"))
            .output()
            .context("cannot run mmdebstrap")?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            let tail: Vec<&str> = said.lines().rev().take(15).collect();
            let tail: Vec<&str> = tail.into_iter().rev().collect();
            bail!("mmdebstrap could not build the root of {} from {mirror}:\n{}", self.what, tail.join("\n"));
        }
        say(&format!("built it in {:.0} s: {}", began.elapsed().as_secs_f64(), root.display()));
        Ok(())
    }
}

/// The Debian archive to build from: the one this machine's apt uses.
pub(crate) fn mirror() -> Result<String> {
    if let Ok(mirror) = std::env::var("BRO_DEBIAN_MIRROR") {
        return Ok(mirror);
    }
    let listed = Command::new("apt-get")
        .args(["indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"])
        .output()
        .context("cannot run apt-get to learn which Debian archive this machine uses")?;
    String::from_utf8_lossy(&listed.stdout)
        .lines()
        .map(|uri| uri.trim_end_matches('/'))
        .find(|uri| uri.ends_with("/debian"))
        .map(Into::into)
        .context(
            "apt on this machine has no Debian archive configured to build the test host from: \
             set BRO_DEBIAN_MIRROR to the URL of one",
        )
}

/// mmdebstrap starts from an apt configuration of its own; the machine's proxy is the one thing it must know.
fn apt_proxy() -> Option<String> {
    let dumped = Command::new("apt-config")
        .args(["dump", "--format", "%v%n", "Acquire::http::Proxy"])
        .output()
        .ok()?;
    let proxy = String::from_utf8(dumped.stdout).ok()?.lines().next()?.trim().to_owned();
    (!proxy.is_empty()).then_some(proxy)
}

fn quoted(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', r"'\''"))
}

/// On the real stderr: libtest captures the other one, and a person who waits for 80 s wants to know for what.
pub(crate) fn say(line: &str) {
    std::io::stderr().write_all(format!("{line}\n").as_bytes()).ok();
}
