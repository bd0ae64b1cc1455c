//! What this host can do for this user, without regard to services.

use std::path::Path;
use std::time::Duration;

use bro_relay::relay::pipes::Pool;
use bro_sockmap::{Kernel, Unavailable, pinned};

use super::{Check, versions};
use crate::netns::NetnsRef;
use crate::netns::sock_diag::Table;
use crate::run_as::RunAsUser;
use crate::systemd::manager::SystemdManager;
use crate::systemd::scope::RuntimeScope;

/// The kernel that brought the system calls bro needs: pidfd_open(2) in 5.3, openat2(2) in 5.6.
pub(super) fn kernel_version() -> Check {
    const NAME: &str = "kernel";
    let Ok(release) = std::fs::read_to_string("/proc/sys/kernel/osrelease") else {
        return Check::bad(NAME, "/proc/sys/kernel/osrelease cannot be read", "mount /proc");
    };
    let release = release.trim();
    let mut numbers = release.split(['.', '-']).map(|number| number.parse::<u32>().unwrap_or(0));
    match (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) {
        version if version < (5, 6) => Check::bad(NAME, format!("Linux {release}"), "use Linux 5.6 or newer"),
        version if version < (5, 19) => Check::less(
            NAME,
            format!("Linux {release}"),
            "the kernel relay needs Linux 5.19 or newer; splice works",
        ),
        _ => Check::ok(NAME, format!("Linux {release}")),
    }
}

pub(super) async fn service_manager() -> Check {
    const NAME: &str = "service manager";
    // sd_booted(3)
    if !Path::new("/run/systemd/system").exists() {
        let fix = "start bro by `systemd-socket-activate` or with --listen, and leave --unit out";
        return Check::less(NAME, "this host does not run systemd", fix);
    }
    let scope = RuntimeScope::choose(false, false);
    let manager = if scope == RuntimeScope::System { "the system's" } else { "this user's" };
    match tokio::time::timeout(Duration::from_secs(5), SystemdManager::connect(scope)).await {
        Ok(Ok(_)) => Check::ok(NAME, format!("{manager} systemd answers on the bus")),
        Ok(Err(error)) => Check::bad(
            NAME,
            format!("{manager} systemd does not answer: {error}"),
            "--unit needs it; without systemd, start the container another way and leave --unit out",
        ),
        Err(_) => Check::bad(
            NAME,
            format!("{manager} systemd does not answer within 5 s"),
            "see `systemctl status`",
        ),
    }
}

pub(super) async fn podman() -> Check {
    const NAME: &str = "podman";
    let mut command = tokio::process::Command::new("podman");
    let output = command.args(["version", "--format", "{{.Client.Version}}"]).kill_on_drop(true).output();
    match tokio::time::timeout(Duration::from_secs(10), output).await {
        Ok(Ok(output)) if output.status.success() => {
            let version = String::from_utf8_lossy(&output.stdout).trim().to_owned();
            Check::ok(NAME, format!("version {version}"))
        }
        _ => Check::less(
            NAME,
            "not there, or it does not run",
            "install podman; --container needs it, --pid and --netns do not",
        ),
    }
}

/// A user's services live only as long as the user is logged in, unless the user lingers.
pub(super) fn linger() -> Check {
    const NAME: &str = "linger";
    let uid = nix::unistd::geteuid();
    if uid.is_root() {
        return Check::ok(NAME, "root's services start at boot");
    }
    match nix::unistd::User::from_uid(uid) {
        Ok(Some(user)) if crate::run_as::lingers(&user.name) => {
            Check::ok(NAME, "this user's services start at boot")
        }
        Ok(Some(user)) => Check::less(
            NAME,
            "this user's services stop when the user logs out",
            format!("sudo loginctl enable-linger {}", user.name),
        ),
        _ => Check::bad(NAME, format!("user {uid} has no name"), "add the user to the user database"),
    }
}

/// The same of a `--run-as` user.
pub(super) fn linger_of(owner: &RunAsUser) -> Check {
    const NAME: &str = "linger";
    if owner.lingers() {
        return Check::ok(NAME, format!("{}'s services start at boot", owner.name));
    }
    Check::less(
        NAME,
        format!("{0}'s services, and this container, are stopped when {0} logs out", owner.name),
        format!("sudo loginctl enable-linger {}", owner.name),
    )
}

/// What lets rootless Podman make user namespaces under AppArmor's limit: a profile for Podman or for its runtime.
const PROFILES: [&str; 3] = ["/etc/apparmor.d/podman", "/etc/apparmor.d/crun", "/etc/apparmor.d/runc"];

pub(super) fn namespaces() -> Check {
    const NAME: &str = "namespaces";
    if nix::unistd::geteuid().is_root() {
        return match caps::has_cap(None, caps::CapSet::Effective, caps::Capability::CAP_SYS_ADMIN) {
            Ok(true) => Check::ok(NAME, "containers' network namespaces can be entered"),
            _ => Check::bad(
                NAME,
                "root without CAP_SYS_ADMIN enters no container",
                "give the unit CAP_SYS_ADMIN",
            ),
        };
    }
    let read = |path: &str| std::fs::read_to_string(path).ok().map(|text| text.trim().to_owned());
    if versions::apparmor_limits() {
        // bro makes no user namespace, but joins the container's; Podman has to make that.
        return match PROFILES.into_iter().find(|profile| Path::new(profile).exists()) {
            Some(profile) => Check::ok(
                NAME,
                format!(
                    "AppArmor restricts user namespaces to programs it knows; it has a profile at {profile}"
                ),
            ),
            None => Check::less(
                NAME,
                "AppArmor restricts user namespaces to programs it knows, and has no profile for rootless Podman",
                "install the profile of your distribution (`sudo apt install apparmor`), or \
                 `sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0`",
            ),
        };
    }
    match read("/proc/sys/user/max_user_namespaces").and_then(|most| most.parse::<u64>().ok()) {
        Some(0) => {
            Check::bad(NAME, "user namespaces are switched off", "sudo sysctl user.max_user_namespaces=10000")
        }
        _ => Check::ok(NAME, "this user's containers can be entered without any capability"),
    }
}

pub(super) async fn listeners() -> Check {
    const NAME: &str = "listeners";
    match Table::open(&NetnsRef::Own).await.and_then(|table| table.listeners()) {
        Ok(found) => Check::ok(NAME, format!("the kernel's table can be read ({} here)", found.len())),
        Err(error) => Check::bad(
            NAME,
            format!("the kernel's table cannot be read: {error}"),
            "use a kernel with CONFIG_INET_DIAG=y or m, or --ready=connect",
        ),
    }
}

pub(super) fn pipes() -> Check {
    const NAME: &str = "pipes";
    if Pool::new(1).borrow().is_some() {
        Check::ok(NAME, "splice has pipes to work with")
    } else {
        Check::less(
            NAME,
            "this user's pipe quota is used up: bytes are copied",
            "sudo sysctl fs.pipe-user-pages-soft=65536",
        )
    }
}

pub(super) fn descriptors() -> Check {
    const NAME: &str = "descriptors";
    use nix::sys::resource::{Resource, getrlimit};
    match getrlimit(Resource::RLIMIT_NOFILE) {
        // Two a connection, and some of bro's own.
        Ok((_, hard)) if hard < 1024 => Check::less(
            NAME,
            format!("at most {hard}, so {} connections", hard.saturating_sub(64) / 2),
            "LimitNOFILE=524288 in the forwarder's unit",
        ),
        Ok((_, hard)) => {
            Check::ok(NAME, format!("up to {hard}, so {} connections", hard.saturating_sub(64) / 2))
        }
        Err(errno) => Check::bad(NAME, format!("the limit cannot be read: {}", errno.desc()), "report this"),
    }
}

pub(super) fn cgroup() -> Check {
    const NAME: &str = "cgroup";
    match bro_proc::cgroup::mount_point() {
        Ok(path) => Check::ok(NAME, format!("version 2 is mounted at {}", path.display())),
        Err(error) => Check::less(NAME, error.to_string(), "boot with systemd.unified_cgroup_hierarchy=1"),
    }
}

/// What the relay process gives up, tried on a thread that ends then.
pub(super) fn sandbox() -> Check {
    const NAME: &str = "sandbox";
    let tried = std::thread::spawn(|| bro_relay::sandbox::enter(None, [], 0..0, false, false, false)).join();
    match tried {
        Ok(Ok(missing)) if missing.is_empty() => {
            Check::ok(NAME, "the relay process gets by without capabilities, files and new sockets")
        }
        Ok(Ok(missing)) => Check::less(
            NAME,
            format!("the relay process keeps more rights than it needs: {}", missing.join("; ")),
            "use Linux 5.13 or newer with lsm=…,landlock on its command line, and allow seccomp(2)",
        ),
        Ok(Err(error)) => Check::bad(
            NAME,
            format!("no relay process can start here: {error:#}"),
            "allow prctl(2) and capset(2)",
        ),
        Err(_) => Check::bad(NAME, "trying it failed", "report this"),
    }
}

pub(super) fn capabilities() -> Check {
    const NAME: &str = "capabilities";
    let missing: Vec<String> = bro_sockmap::capabilities::KERNEL_RELAY
        .into_iter()
        .filter(|capability| !caps::has_cap(None, caps::CapSet::Effective, *capability).unwrap_or(false))
        .map(|capability| capability.to_string())
        .collect();
    if missing.is_empty() {
        Check::ok(NAME, "all that loading the kernel relay takes")
    } else if matches!(loaded_set(), Ok(Some(_))) {
        Check::ok(NAME, "none, and none is needed: bro loader has loaded the kernel relay")
    } else {
        Check::less(
            NAME,
            format!("without {}, so no kernel relay", missing.join(", ")),
            "AmbientCapabilities=CAP_BPF CAP_NET_ADMIN CAP_PERFMON in the forwarder's (system) unit",
        )
    }
}

/// What `bro loader` has left for this user; nothing for root.
fn loaded_set() -> Result<Option<pinned::Summary>, Unavailable> {
    match nix::unistd::geteuid().as_raw() {
        0 => Ok(None),
        user => pinned::look(&pinned::folder(user)),
    }
}

pub(super) fn loader() -> Check {
    const NAME: &str = "loader";
    let user = nix::unistd::geteuid();
    match loaded_set() {
        _ if user.is_root() => {
            Check::ok(NAME, "not for root, whose forwarders load the kernel relay themselves")
        }
        Ok(Some(set)) => Check::ok(
            NAME,
            format!(
                "the kernel relay is loaded for this user: {} of {} forwarders use it, {} connections each; {} sockets were \
                 taken hold of so far, {} of other people's left alone",
                set.taken,
                bro_ebpf::SEATS,
                set.connections,
                set.hooked,
                set.foreign
            ),
        ),
        Ok(None) => Check::less(
            NAME,
            "the kernel relay is not loaded for this user",
            crate::commands::loader::advice(&user.to_string()),
        ),
        Err(reason) => {
            let mend = reason.mend();
            Check::less(NAME, format!("{:#}", anyhow::Error::from(reason)), mend)
        }
    }
}

pub(super) fn kernel_relay() -> Check {
    const NAME: &str = "kernel relay";
    if let Ok(Some(set)) = loaded_set() {
        return relay_works(set.fionread_lies, set.clients, "by bro loader");
    }
    let config =
        bro_sockmap::Config { connections: 16, hook_blocking: false, bear_fionread: true, trace: false };
    let tested = Kernel::load(&config).and_then(|mut kernel| {
        kernel.selftest()?;
        Ok((kernel.fionread_lies(), kernel.programs.hook_clients().is_ok()))
    });
    match tested {
        Ok((fionread_lies, clients)) => {
            relay_works(fionread_lies, clients, bro_sockmap::OBJECT.lines().next().unwrap_or("?"))
        }
        Err(reason) => {
            let mend = reason.mend();
            Check::less(NAME, format!("{:#}; bytes are spliced", anyhow::Error::from(reason)), mend)
        }
    }
}

fn relay_works(fionread_lies: bool, clients: bool, how: &str) -> Check {
    const NAME: &str = "kernel relay";
    if !clients {
        return Check::less(
            NAME,
            format!(
                "loaded and tested ({how}), but no local client could be hooked, so --local-clients has no effect"
            ),
            "`bro forward --local-clients` says why; please report that line with the kernel's version",
        );
    }
    if fionread_lies {
        return Check::less(
            NAME,
            format!(
                "loaded and tested ({how}), but not used by --relay=auto: {}; bytes are spliced",
                Unavailable::FionreadLies
            ),
            Unavailable::FionreadLies.mend(),
        );
    }
    Check::ok(NAME, format!("loaded and tested ({how})"))
}
