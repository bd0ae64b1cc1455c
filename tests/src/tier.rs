//! What a test needs from the machine it runs on, and what happens when that is missing: a loud skip at home, a failure in
//! CI (`CI=true`), each with the line that mends it.

use std::io::Write as _;
use std::path::Path;

/// One thing a test cannot do without.
#[derive(Debug, Clone, Copy)]
pub enum Need {
    /// User id 0 with the capabilities of a real root.
    Root,
    /// An ordinary user may make user namespaces.
    UserNamespaces,
    /// bpf(2) may load programs (root, CAP_BPF and CAP_NET_ADMIN, kernel BTF).
    Bpf,
    /// The binary under test is the one that packages install.
    Packaged,
    /// A program on the PATH (or in a usual system folder), and the Debian package it comes from.
    Program(&'static str, &'static str),
    /// A file that is no program, by its path, and the Debian package it comes from.
    File(&'static str, &'static str),
}

impl Need {
    fn missing(self) -> Option<String> {
        match self {
            Self::Root => (!nix::unistd::geteuid().is_root())
                .then(|| "needs root: run `sudo --preserve-env=PATH,HOME cargo xtask test`".into()),
            Self::UserNamespaces => {
                let made = std::process::Command::new("unshare").args(["-Urn", "true"]).output();
                (!made.is_ok_and(|out| out.status.success())).then(|| {
                    "needs user namespaces: run `sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0 \
                     user.max_user_namespaces=10000`"
                        .into()
                })
            }
            Self::Bpf => (!nix::unistd::geteuid().is_root()
                || !Path::new("/sys/kernel/btf/vmlinux").exists())
            .then(|| {
                "needs bpf(2) and kernel BTF: run as root on a kernel with CONFIG_DEBUG_INFO_BTF=y".into()
            }),
            Self::Packaged => (!crate::bro::is_packaged()).then(|| {
                "needs the binary that is installed: run `cargo xtask test`, without BRO_BIN".into()
            }),
            Self::Program(program, package) => find_program(program)
                .is_none()
                .then(|| format!("needs {program}: run `sudo apt-get install {package}`")),
            Self::File(path, package) => (!Path::new(path).exists())
                .then(|| format!("needs {path}: run `sudo apt-get install {package}`")),
        }
    }
}

/// Where `program` is, looked for on the PATH and in the system folders that an ordinary user's PATH may lack.
#[must_use]
pub fn find_program(program: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/lib/systemd"].map(Into::into))
        .chain(
            std::fs::read_dir("/usr/lib/postgresql")
                .into_iter()
                .flatten()
                .flatten()
                .map(|e| e.path().join("bin")),
        )
        .map(|dir| dir.join(program))
        .find(|path| path.is_file())
}

/// True when every need is met. Otherwise says on the real stderr (not the captured one) what is missing, notes it in the
/// file named by `BRO_SKIPS` for the summary of `cargo xtask test`, and panics where `CI=true`.
#[must_use]
pub fn met(test: &str, needs: &[Need]) -> bool {
    let missing: Vec<String> = needs.iter().filter_map(|need| need.missing()).collect();
    if !missing.is_empty() {
        skip(test, &missing.join("; "));
    }
    missing.is_empty()
}

/// Says that `test` is left out because of `missing`, in all the ways of [`met`].
pub fn skip(test: &str, missing: &str) {
    let line = format!("SKIPPED {test}: {}\n", missing.replace('\n', " "));
    assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "{line}");
    note(&line);
}

/// The same where the running kernel lacks something that nothing installed would mend, and that another kernel has on which the test runs too (in an
/// emulated machine, where it must not be left out): no failure in CI either.
pub fn lacks(test: &str, feature: &str) {
    note(&format!("SKIPPED {test}: {}\n", feature.replace('\n', " ")));
}

fn note(line: &str) {
    std::io::stderr().write_all(line.as_bytes()).ok();
    if let Some(file) = std::env::var_os("BRO_SKIPS") {
        let opened = std::fs::OpenOptions::new().append(true).create(true).open(file);
        opened.and_then(|mut file| file.write_all(line.as_bytes())).ok();
    }
}

/// Returns from the test, loudly, unless every need is met.
#[macro_export]
macro_rules! require {
    ($($need:expr),+ $(,)?) => {
        if !$crate::tier::met(std::thread::current().name().unwrap_or("?"), &[$($need),+]) {
            return;
        }
    };
}

/// Returns from the test, loudly, unless a network namespace can be made here.
#[macro_export]
macro_rules! require_namespaces {
    () => {
        if !$crate::tier::met(std::thread::current().name().unwrap_or("?"), &$crate::suite::namespace_needs())
        {
            return Ok(());
        }
    };
}

/// Returns `Ok` from the test, loudly, unless every need is met.
#[macro_export]
macro_rules! require_or_ok {
    ($($need:expr),+ $(,)?) => {
        if !$crate::tier::met(std::thread::current().name().unwrap_or("?"), &[$($need),+]) {
            return Ok(());
        }
    };
}

/// Returns `Ok` from the test, loudly, where the kernel relay's programs cannot be loaded.
#[macro_export]
macro_rules! require_bpf {
    () => {
        $crate::require_or_ok!($crate::tier::Need::Root, $crate::tier::Need::Bpf)
    };
}
