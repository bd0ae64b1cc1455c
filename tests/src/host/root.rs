//! The host's root file system, built once by mmdebstrap and kept in the target directory under a hash of its recipe.

use std::fs::{File, TryLockError};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

/// The Debian release that the host runs.
pub(super) const SUITE: &str = "trixie";

const PACKAGES: &str = include_str!("../../host/packages");
const CUSTOMIZE: &str =
    concat!(include_str!("../../host/customize.sh"), include_str!("../../host/images.sh"));

/// Raise it when a change of this file changes what is built.
const FORMAT: u32 = 1;

/// Longer than any build: whoever waits for this lock waits for another test binary that builds.
const LOCK_DEADLINE: Duration = Duration::from_secs(15 * 60);

/// The root's folder, and a shared lock to hold while it is used. Builds it when there is none for this recipe.
pub(super) fn built() -> Result<(PathBuf, File)> {
    let cache = cache()?;
    std::fs::create_dir_all(&cache)?;
    let recipe = recipe();
    let root = cache.join(&recipe);

    // One builds, the others wait here and find it built.
    let building = lock_file(&cache, "build")?;
    lock(&building, File::try_lock)?;
    if !root.is_dir() {
        let began = Instant::now();
        remove_others(&cache, &recipe);
        let fresh = cache.join("fresh");
        remove(&fresh)?;
        build(&cache, &fresh)?;
        // The rename is what makes it whole: a build that was cut short never carries the recipe's name.
        std::fs::rename(&fresh, &root)?;
        say(&format!(
            "built the test host's root in {:.0} s: {}",
            began.elapsed().as_secs_f64(),
            root.display()
        ));
    }
    let in_use = lock_file(&cache, &recipe)?;
    lock(&in_use, File::try_lock_shared)?;
    Ok((root, in_use))
}

fn recipe() -> String {
    let mut hasher = DefaultHasher::new();
    (FORMAT, SUITE, PACKAGES, CUSTOMIZE).hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

/// `target/host-root`, found from the test binary's own place: target/PROFILE/deps/TEST.
fn cache() -> Result<PathBuf> {
    if let Some(cache) = std::env::var_os("BRO_HOST_CACHE") {
        return Ok(cache.into());
    }
    let test = std::env::current_exe()?;
    let target = test.ancestors().nth(3).context("this test does not run from a target directory")?;
    Ok(target.join("host-root"))
}

pub(crate) fn lock_file(cache: &Path, name: &str) -> Result<File> {
    let path = cache.join(format!("{name}.lock"));
    File::options()
        .create(true)
        .append(true)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))
}

pub(crate) fn lock(file: &File, take: fn(&File) -> Result<(), TryLockError>) -> Result<()> {
    let deadline = Instant::now() + LOCK_DEADLINE;
    loop {
        match take(file) {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) => {
                ensure!(Instant::now() < deadline, "another test has been building the host for too long");
                std::thread::sleep(Duration::from_millis(200));
            }
            Err(TryLockError::Error(error)) => return Err(error).context("cannot lock the host's root"),
        }
    }
}

/// Roots of older recipes go, except those that a running host still uses.
fn remove_others(cache: &Path, recipe: &str) {
    for entry in std::fs::read_dir(cache).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_root = name.len() == recipe.len() && name.bytes().all(|byte| byte.is_ascii_hexdigit());
        if is_root && name != recipe && lock_file(cache, &name).is_ok_and(|lock| lock.try_lock().is_ok()) {
            remove(&entry.path()).ok();
        }
    }
}

/// Removes a built root, never following a mount that lies in it.
fn remove(root: &Path) -> Result<()> {
    let status = Command::new("rm").args(["-rf", "--one-file-system"]).arg(root).status()?;
    ensure!(status.success(), "cannot remove {}", root.display());
    Ok(())
}

fn build(cache: &Path, root: &Path) -> Result<()> {
    let mirror = mirror()?;
    say("building the test host's root (about 80 s, once)");
    let customize = cache.join("customize.sh");
    std::fs::write(&customize, CUSTOMIZE)?;
    let packages: Vec<&str> =
        PACKAGES.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')).collect();
    let output = Command::new("setpriv")
        // The build dies with the test that waits for it, and what it mounts is seen by it alone.
        .args(["--pdeathsig", "KILL", "unshare", "--mount", "--propagation", "private"])
        .args(["mmdebstrap", "--quiet", "--mode=root", "--variant=minbase"])
        .args(["--aptopt=Acquire::Languages \"none\"", "--dpkgopt=force-unsafe-io"])
        .args(["--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/doc/*"])
        .args(["--dpkgopt=path-exclude=/usr/share/locale/*"])
        .args(apt_proxy().map(|proxy| format!("--aptopt=Acquire::http::Proxy \"{proxy}\"")))
        .arg(format!("--include={}", packages.join(",")))
        .arg(format!("--customize-hook=sh {} \"$1\"", quoted(&customize)))
        .arg(SUITE)
        .arg(root)
        .arg(format!("deb {mirror} {SUITE} main"))
        .output()
        .context("cannot run mmdebstrap")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let tail: Vec<&str> = said.lines().rev().take(15).collect();
        let tail: Vec<&str> = tail.into_iter().rev().collect();
        bail!("mmdebstrap could not build the test host from {mirror}:\n{}", tail.join("\n"));
    }
    Ok(())
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

/// On the real stderr: libtest captures the other one, and whoever waits for 80 s wants to know for what.
fn say(line: &str) {
    std::io::stderr().write_all(format!("host: {line}\n").as_bytes()).ok();
}
