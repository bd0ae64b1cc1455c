//! Debian's kernels, fetched as packages from the archive that this machine's apt uses, by an apt state of their own: nothing
//! is installed and the machine's package lists stay as they are.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use crate::debian::mirror;
use crate::kept::{lock, lock_file};

/// A Debian release, for the kernel it carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Release {
    /// Linux 5.10.
    Bullseye,
    /// Linux 6.1.
    Bookworm,
    /// Linux 6.12.
    Trixie,
    /// The newest that Debian has built.
    Sid,
}

impl Release {
    const fn suite(self) -> &'static str {
        match self {
            Self::Bullseye => "bullseye",
            Self::Bookworm => "bookworm",
            Self::Trixie => "trixie",
            Self::Sid => "sid",
        }
    }
}

/// A kernel to boot.
#[derive(Debug)]
pub struct Image {
    /// The compressed kernel.
    pub path: PathBuf,
    /// What the package is called.
    pub package: String,
    /// Modules of it, as they are to be loaded.
    pub modules: Vec<PathBuf>,
}

/// Those by which the kernel tells of sockets, and those that vsock's loopback consists of, each after what it needs.
const MODULES: [&str; 7] = [
    "inet_diag",
    "tcp_diag",
    "udp_diag",
    "unix_diag",
    "vsock",
    "vmw_vsock_virtio_transport_common",
    "vsock_loopback",
];

/// Longer than any download: a server that does not answer is given up by apt itself much sooner.
const FETCH_SECONDS: &str = "300";

impl Image {
    /// The kernel of `release`: from the cache, else from the archive. Remove the cache to get a newer one.
    pub fn of(release: Release) -> Result<Self> {
        let cache = cache()?;
        std::fs::create_dir_all(&cache)?;
        // One fetches, the others wait here and find it fetched.
        let fetching = lock_file(&cache, release.suite())?;
        lock(&fetching, File::try_lock)?;
        let kept = cache.join(release.suite());
        let modules: Vec<PathBuf> =
            MODULES.map(|name| kept.join(MODULES_FOLDER).join(format!("{name}.ko"))).into();
        // One that was fetched when fewer modules were kept is fetched anew.
        if !modules.iter().all(|module| module.is_file()) {
            let suite = release.suite();
            let fresh = cache.join(format!("{suite}.fresh"));
            remove(&fresh)?;
            std::fs::create_dir_all(&fresh)?;
            fetch(suite, &fresh).with_context(|| format!("no kernel of Debian's release {suite}"))?;
            remove(&kept)?;
            // The rename is what makes it whole.
            std::fs::rename(&fresh, &kept)?;
        }
        let package = std::fs::read_to_string(kept.join("package"))?;
        Ok(Self { path: kept.join("vmlinuz"), package, modules })
    }

    /// Its version, first two numbers: they are in the package's name.
    pub fn version(&self) -> Result<(u32, u32)> {
        let number = self.package.trim_start_matches(|c: char| !c.is_ascii_digit());
        let mut parts = number.split(['.', '-', '+']).map(str::parse);
        match (parts.next(), parts.next()) {
            (Some(Ok(major)), Some(Ok(minor))) => Ok((major, minor)),
            _ => bail!("{} names no version", self.package),
        }
    }
}

/// `target/kernels`, found from the test binary's own place: target/PROFILE/deps/TEST.
fn cache() -> Result<PathBuf> {
    if let Some(cache) = std::env::var_os("BRO_KERNEL_CACHE") {
        return Ok(cache.into());
    }
    let test = std::env::current_exe()?;
    let target = test.ancestors().nth(3).context("this test does not run from a target directory")?;
    Ok(target.join("kernels"))
}

fn remove(folder: &Path) -> Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", folder.display()))
        }
        _ => Ok(()),
    }
}

/// Where its modules are kept.
const MODULES_FOLDER: &str = "modules";

/// Puts `vmlinuz`, `modules` and the name of its `package` into `folder`.
fn fetch(suite: &str, folder: &Path) -> Result<()> {
    let apt = Apt::new(suite, folder)?;
    apt.run("apt-get", &["update"])?;
    // Made for virtual machines: the same kernel with fewer drivers, so a smaller download.
    let image = apt.dependency("linux-image-cloud-amd64", "linux-image-")?;
    let image = image.with_context(|| format!("{suite} names no kernel image"))?;
    // From Linux 7 on the image's package only names those that hold the kernel and its modules.
    let parts = ["linux-binary-", "linux-modules-"].map(|part| apt.dependency(&image, part));
    let parts: Vec<String> = parts.into_iter().filter_map(Result::transpose).collect::<Result<_>>()?;
    for package in if parts.is_empty() { std::slice::from_ref(&image) } else { &parts } {
        apt.run("apt-get", &["download", package])?;
    }
    let is_package = |path: &PathBuf| path.extension().is_some_and(|ending| ending == "deb");
    let packages: Vec<PathBuf> = entries(folder)?.into_iter().filter(is_package).collect();
    let unpacked = folder.join("unpacked");
    for package in &packages {
        let status = Command::new("dpkg-deb").arg("-x").args([package, &unpacked]).status()?;
        ensure!(status.success(), "dpkg-deb cannot unpack {}", package.display());
    }
    let kernel = find(&unpacked, &|name| name.starts_with("vmlinuz"))?;
    let kernel = kernel.with_context(|| format!("{image} holds no kernel"))?;
    std::fs::rename(kernel, folder.join("vmlinuz"))?;
    std::fs::create_dir(folder.join(MODULES_FOLDER))?;
    for name in MODULES {
        keep_module(&unpacked, name, &folder.join(MODULES_FOLDER))?;
    }
    std::fs::write(folder.join("package"), image)?;
    remove(&unpacked)?;
    remove(&folder.join("apt"))?;
    Ok(packages.iter().try_for_each(std::fs::remove_file)?)
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    std::fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect()
}

/// A module, which is no longer compressed then.
fn keep_module(unpacked: &Path, name: &str, folder: &Path) -> Result<()> {
    let is_module =
        |file: &str| file.strip_prefix(name).is_some_and(|rest| [".ko", ".ko.xz"].contains(&rest));
    let found = find(unpacked, &is_module)?.with_context(|| format!("the package holds no module {name}"))?;
    let kept = folder.join(format!("{name}.ko"));
    if found.extension().is_some_and(|extension| extension == "ko") {
        return Ok(std::fs::rename(found, kept)?);
    }
    let mut command = Command::new("xz");
    let status =
        command.args(["--decompress", "--stdout"]).arg(&found).stdout(File::create(kept)?).status()?;
    ensure!(status.success(), "xz cannot unpack {}", found.display());
    Ok(())
}

fn find(folder: &Path, is_wanted: &dyn Fn(&str) -> bool) -> Result<Option<PathBuf>> {
    for path in entries(folder)? {
        if path.is_dir() && !path.is_symlink() {
            if let Some(found) = find(&path, is_wanted)? {
                return Ok(Some(found));
            }
        } else if path.file_name().is_some_and(|name| is_wanted(&name.to_string_lossy())) {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

/// An apt that knows one release and keeps everything in a folder of its own. How the archive is reached (proxies) and whom it
/// trusts stays as the machine has it.
struct Apt<'a> {
    options: Vec<String>,
    folder: &'a Path,
}

impl<'a> Apt<'a> {
    fn new(suite: &str, folder: &'a Path) -> Result<Self> {
        let state = folder.join("apt");
        std::fs::create_dir_all(state.join("lists/partial"))?;
        std::fs::create_dir_all(state.join("cache/archives/partial"))?;
        std::fs::write(state.join("status"), "")?;
        // The one place where every Debian keeps all releases' keys; elsewhere apt's own trusted keys have to do.
        let keys = Path::new("/usr/share/keyrings/debian-archive-keyring.gpg");
        let signed = if keys.exists() { format!("[signed-by={}] ", keys.display()) } else { String::new() };
        std::fs::write(state.join("sources.list"), format!("deb {signed}{} {suite} main\n", mirror()?))?;
        let set = |name: &str, value: &dyn std::fmt::Display| format!("-o{name}={value}");
        let at = |name: &str| state.join(name).display().to_string();
        let options = vec![
            set("Dir::Etc::sourcelist", &at("sources.list")),
            set("Dir::Etc::sourceparts", &"/nonexistent"),
            set("Dir::State::lists", &at("lists")),
            set("Dir::State::status", &at("status")),
            set("Dir::Cache", &at("cache")),
            set("Acquire::Languages", &"none"),
            set("Acquire::IndexTargets::deb::DEP-11::DefaultEnabled", &"false"),
            set("Acquire::Retries", &"2"),
            set("Acquire::http::Timeout", &"20"),
            set("APT::Architecture", &"amd64"),
            // The folder may lie where apt's own user cannot look.
            set("APT::Sandbox::User", &""),
            set("APT::Update::Error-Mode", &"any"),
        ];
        Ok(Self { options, folder })
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let output = Command::new("timeout")
            .args(["--kill-after=5", FETCH_SECONDS, program, "-qq"])
            .args(&self.options)
            .args(arguments)
            .current_dir(self.folder)
            .output()
            .with_context(|| format!("cannot run {program}"))?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{program} {}: {}", arguments.join(" "), said.trim());
        Ok(String::from_utf8(output.stdout)?)
    }

    /// The package that `package` depends on and whose name begins with `prefix`.
    fn dependency(&self, package: &str, prefix: &str) -> Result<Option<String>> {
        let shown = self.run("apt-cache", &["show", "--no-all-versions", package])?;
        let list = shown.lines().find_map(|line| line.strip_prefix("Depends: ")).unwrap_or_default();
        let mut names = list.split([',', '|']).filter_map(|part| part.split_whitespace().next());
        Ok(names.find(|name| name.starts_with(prefix)).map(Into::into))
    }
}
