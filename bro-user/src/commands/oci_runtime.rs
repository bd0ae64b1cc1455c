//! The program called `crun` or `runc`: that OCI runtime, whose containers connect over TCP to no port but those that the folder of the link
//! names (landlock(7)): `tcp-none/crun`, `tcp-80,443/crun`. It takes no right.
//!
//! Podman starts the runtime within its user namespace, where Landlock needs no `no_new_privs`, so that setuid programs inside work as
//! before; and neither Podman itself nor what maps its ids is restricted. Landlock knows ports and no addresses, so a port that
//! is allowed for the container's own network is allowed for the host's.

use std::convert::Infallible;
use std::ffi::{OsStr, OsString};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;
use landlock::{
    AccessNet, CompatLevel, Compatible as _, NetPort, Ruleset, RulesetAttr as _, RulesetCreatedAttr as _,
    RulesetError,
};

use crate::exit::Failure;

/// The runtimes that this stands for.
const NAMES: [&str; 2] = ["crun", "runc"];
const FOLDERS: [&str; 5] =
    ["/usr/bin", "/usr/sbin", "/usr/local/bin", "/usr/local/sbin", "/usr/libexec/podman"];
/// What makes containers. A command that is executed in one later (`exec`) cannot be restricted likewise: a runtime in another Landlock domain than the container's
/// processes may not look at them (`hook_ptrace_access_check`), and none can enter theirs.
const MAKING: [&str; 3] = ["create", "restore", "run"];

/// Was the program called so?
#[must_use]
pub fn is_called(program: &OsStr) -> bool {
    Path::new(program).file_name().is_some_and(|name| NAMES.iter().any(|runtime| name == *runtime))
}

/// Becomes the runtime.
///
/// # Errors
/// When there is none, or the container could connect as it likes.
pub fn run(words: &[OsString]) -> anyhow::Result<Infallible> {
    let (program, arguments) = words.split_first().context("no program's name")?;
    let program = Path::new(program);
    let runtime = find(program.file_name().unwrap_or_default())?;
    if arguments.iter().any(|word| MAKING.iter().any(|making| word == *making)) {
        restrict(&ports(program)?)?;
    }
    let error = Command::new(&runtime).args(arguments).exec();
    Err(anyhow::Error::from(error).context(format!("starting {}", runtime.display())))
}

fn find(name: &OsStr) -> anyhow::Result<PathBuf> {
    let own = std::fs::metadata("/proc/self/exe").context("this program")?;
    let is_another = |path: &PathBuf| {
        std::fs::metadata(path).is_ok_and(|its| (its.dev(), its.ino()) != (own.dev(), own.ino()))
    };
    let found = FOLDERS.iter().map(|folder| Path::new(folder).join(name)).find(is_another);
    found.ok_or_else(|| Failure::NotFound(format!("there is no {} on this host", name.display())).into())
}

/// As the link's folder has them.
fn ports(program: &Path) -> anyhow::Result<Vec<u16>> {
    let folder = program.parent().and_then(Path::file_name).and_then(OsStr::to_str);
    let list = folder.and_then(|folder| folder.strip_prefix("tcp-")).unwrap_or_default();
    if list == "none" {
        return Ok(Vec::new());
    }
    let ports: Result<Vec<u16>, _> = list.split(',').map(str::parse).collect();
    ports.map_err(|_| {
        let sentence = format!(
            "{} is to lie in a folder tcp-none or tcp-80,443, which names the ports",
            program.display()
        );
        Failure::Usage(sentence).into()
    })
}

/// Whether this kernel restricts connections over TCP. Nothing is restricted by asking.
///
/// # Errors
/// Why it does not.
pub fn check() -> anyhow::Result<()> {
    let made = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessNet::ConnectTcp)
        .and_then(Ruleset::create);
    made.map(drop).map_err(unrestricted)
}

fn unrestricted(error: RulesetError) -> anyhow::Error {
    anyhow::anyhow!("Landlock does not restrict connections here (it takes Linux 6.7): {error}")
}

fn restrict(ports: &[u16]) -> anyhow::Result<()> {
    let rules = ports.iter().map(|port| Ok::<_, RulesetError>(NetPort::new(*port, AccessNet::ConnectTcp)));
    let restricted = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessNet::ConnectTcp)
        .and_then(Ruleset::create)
        .and_then(|made| made.add_rules(rules))
        .and_then(|made| made.no_new_privs(false).restrict_self());
    restricted.map(drop).map_err(unrestricted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_names_the_ports() {
        let of = |path: &str| ports(Path::new(path)).ok();
        assert_eq!(of("/x/tcp-none/crun"), Some(vec![]));
        assert_eq!(of("/x/tcp-80,443/crun"), Some(vec![80, 443]));
        for path in ["/usr/bin/crun", "crun", "/x/tcp-/crun", "/x/tcp-80,/crun", "/x/tcp-70000/crun"] {
            assert_eq!(of(path), None, "{path}");
        }
        assert!(is_called(OsStr::new("/x/crun")) && !is_called(OsStr::new("/usr/bin/bro")));
    }
}
