//! What the forwarder's service may not do (systemd.exec(5)): everything that forwarding does not need.
//!
//! Tried on a real host, and left out for what came of it:
//! - `PrivateUsers=` anywhere, and for a user's own manager everything that it implements by a user namespace (`Private…=`,
//!   `Protect…=`, `CapabilityBoundingSet=` fails outright): a process in a user namespace of its own may enter no container's.
//! - `ProtectProc=`, `ProcSubset=`, `IPAddressDeny=` and `DevicePolicy=` for a user's own manager, which takes them and does
//!   nothing: they would only look good.
//! - `RemoveIPC=`: it concerns all that the *user* has in /dev/shm, Podman's locks included, not what the service has made.
//!
//! What the lines cost each time that systemd starts the service, of thirty that are started at once: with a user's 8.7 ms of processor time, with
//! root's 20, without any 7 (systemd 257, medians of three). With the same system calls as a list of what is *allowed*, and
//! `ProtectHome=yes`, it was 12.6 and 26. `PrivateNetwork=` takes 2.5 of root's, `ProtectKernelTunables=` 2, `PrivateDevices=` 1.2, each line
//! that a filter of its own is made for 0.1 or less. Most of it is the table of mounts, which systemd reads some
//! fifty times; where one line's folders hide another's nothing is saved. So it grows with the containers that run, of which each has two
//! mounts: beside thirty of them root's lines take 41 ms of the 51 that a start takes (`PrivateNetwork=` and `ProtectKernelTunables=`
//! together 14). Tried there, and no better: a `RootDirectory=` with what is needed bound into it (71 ms: each bind is read for, too),
//! `TemporaryFileSystem=/` (92), `MemoryPressureWatch=` (the same), `ReadOnlyPaths=/sys/kernel` (2 less), the host's /sys instead of one of its own
//! (3 less, and it shows the host's network devices). `SystemCallArchitectures=` saves 11, as each filter is then made for one architecture, not
//! for three; `ProcSubset=` saves 6, for most of what would be hidden in /proc is not there.
//!
//! The owner's commands (`--ready exec:`, `--busy-exec`) and Podman's health check could not run here: rootless Podman makes its
//! user namespace by newuidmap, which `NoNewPrivileges=` (and each system call filter, which implies it there) forbids; it joins an
//! existing one by setns(2) without a type, which `RestrictNamespaces=` forbids; rootful Podman wants all of root's rights. The
//! service manager runs them, outside of this (`systemd/run_command.rs`).

use std::path::PathBuf;

use bro_relay::listener::SocketKind;
use bro_relay::netns::identity::Identity;
use bro_relay::target::Target;

use crate::installed::{Forwarder, Installed};
use crate::metrics::endpoint::Endpoint;
use crate::systemd::scope::RuntimeScope;
use crate::systemd::unit_file::quote_word;
use crate::targets::TargetRange;

/// What it does not call: priorities, devices, mounts, other users' ids and the like; and of what is in no group, what is not in @system-service
/// either. Together that is whatever systemd (257) knows and @system-service leaves out, and more. It is a list of what is forbidden because
/// one of what is allowed takes 4 ms more at each start: systemd has libseccomp make a rule for each call that it knows, to
/// answer unknown ones otherwise. Those that are new, which an older systemd may not know, bro refuses by itself (`bro-relay`, `sandbox/new_calls.rs`), so that they
/// are not named here, where that systemd would complain of them.
const NEVER: &str = "@aio @chown @clock @cpu-emulation @debug @keyring @memlock @module @mount @obsolete @pkey @raw-io @reboot @resources \
                     @setuid @swap acct fanotify_init fanotify_mark mincore open_by_handle_at quotactl setdomainname \
                     sethostname syslog vhangup";

/// The user of the forwarder.
enum RunsAs<'a> {
    Root,
    Owner(&'a crate::run_as::RunAsUser),
    User,
}

/// The lines of `[Service]`. In an image's tree it is not known where the program is going to be; there, `is_here` is false.
pub(super) fn lines(installed: &Installed, forwarder: &Forwarder, is_here: bool) -> String {
    let user = match (&installed.run_as, installed.scope) {
        (Some(owner), _) => RunsAs::Owner(owner),
        (None, RuntimeScope::System) => RunsAs::Root,
        (None, RuntimeScope::User) => RunsAs::User,
    };
    let mut text = String::new();
    let mut say = |lines: &str| {
        text.push_str(lines);
        text.push('\n');
    };
    say("# It does without whatever forwarding does not take.");
    match user {
        RunsAs::Root => {
            say(
                "# To enter containers' namespaces, whichever user is root in them; for the kernel relay, those of its programs; to show the \
                 service\n# its clients' addresses, CAP_NET_ADMIN.",
            );
            let relay = match (forwarder.options.may_use_kernel_relay(), forwarder.options.may_show_clients())
            {
                (true, _) => " CAP_BPF CAP_NET_ADMIN CAP_PERFMON",
                (false, true) => " CAP_NET_ADMIN",
                (false, false) => "",
            };
            let becoming = if becomes_another(installed, forwarder) { " CAP_SETGID CAP_SETUID" } else { "" };
            let binding = if binds_a_low_port(installed) {
                say("# To bind the service's own socket for datagrams in its place, CAP_NET_BIND_SERVICE.");
                " CAP_NET_BIND_SERVICE"
            } else {
                ""
            };
            let telling = if tells_undelivered(installed, forwarder) {
                say("# To tell clients over UDP that a datagram was not received, CAP_NET_RAW.");
                " CAP_NET_RAW"
            } else {
                ""
            };
            say(&format!(
                "CapabilityBoundingSet=CAP_SYS_ADMIN CAP_SYS_PTRACE{relay}{becoming}{binding}{telling}\nRestrictNamespaces=net"
            ));
        }
        RunsAs::Owner(_) if tells_undelivered(installed, forwarder) => say(
            "# To tell clients over UDP that a datagram was not received, and given up once the sockets for that are made.\n\
             AmbientCapabilities=CAP_NET_RAW\nCapabilityBoundingSet=CAP_NET_RAW\nRestrictNamespaces=user net",
        ),
        RunsAs::Owner(_) => say("CapabilityBoundingSet=\nRestrictNamespaces=user net"),
        RunsAs::User => {
            say(
                "# No Private…= and no Protect…=: in a user's manager they imply PrivateUsers=, from where no container can be\n\
                 # entered.",
            );
            say("RestrictNamespaces=user net");
        }
    }
    say(
        "NoNewPrivileges=yes\nRestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK\nRestrictRealtime=yes",
    );
    if looks_below_a_root(installed, forwarder) {
        say(
            "# No RestrictSUIDSGID=: it forbids openat2(2), which finds the socket below the container's root.",
        );
    } else {
        say("RestrictSUIDSGID=yes");
    }
    say(
        "LockPersonality=yes\nMemoryDenyWriteExecute=yes\nKeyringMode=private\nUMask=0077\nSystemCallArchitectures=native",
    );
    // By the same system call a user's forwarder opens what bro-loader@ has left for it.
    let bpf = if forwarder.options.may_use_kernel_relay() { "" } else { " bpf" };
    say(&format!("SystemCallFilter=~{NEVER}{bpf}\nSystemCallErrorNumber=EPERM"));
    if installed.adoption().is_some() {
        say("# To get the service's own socket, in whose place the adopted one comes.");
        say("SystemCallFilter=pidfd_getfd");
    }
    if becomes_another(installed, forwarder) {
        say("# To connect to the service's unix socket as a user of the container that it does not trust.");
        say("SystemCallFilter=setgroups setresgid setresuid");
    }
    say("# It may not raise its limits any more.\nLimitNOFILE=524288");
    if !matches!(user, RunsAs::User) {
        files(installed, forwarder, is_here, &user, &mut say);
        network(installed, forwarder, &mut say);
    }
    text
}

/// Does it send to clients by itself?
fn tells_undelivered(installed: &Installed, forwarder: &Forwarder) -> bool {
    forwarder.options.tells_undelivered() && installed.has_udp()
}

/// Does its agent make a service's bind(2) to a port below 1024?
fn binds_a_low_port(installed: &Installed) -> bool {
    installed.adoption().is_some_and(|adoption| adoption.what.offers(SocketKind::Datagram))
        && targets(installed).any(
            |target| matches!(target, Target::Udp { port, .. } | Target::Tcp { port, .. } if *port < 1024),
        )
}

/// Does it connect to a unix socket, and not as its own user?
fn becomes_another(installed: &Installed, forwarder: &Forwarder) -> bool {
    forwarder.options.unix_identity() != Identity::Forwarder
        && targets(installed).any(|target| target.is_unix())
}

/// Is a service's unix socket in the files of a container?
fn looks_below_a_root(installed: &Installed, forwarder: &Forwarder) -> bool {
    forwarder.container.is_some() && targets(installed).any(|target| matches!(target, Target::Unix(_)))
}

fn files(
    installed: &Installed,
    forwarder: &Forwarder,
    is_here: bool,
    user: &RunsAs<'_>,
    say: &mut impl FnMut(&str),
) {
    let mut looked_at: Vec<PathBuf> = is_here.then(|| forwarder.program.clone()).into_iter().collect();
    looked_at.extend(forwarder.options.get("busy-file").map(PathBuf::from));
    let metrics = forwarder.options.metrics();
    if let Some(Endpoint::Unix(path)) = &metrics {
        looked_at.push(path.clone());
    }
    if forwarder.container.is_none() {
        looked_at.extend(targets(installed).filter_map(|target| match target {
            Target::Unix(path) => Some(path.clone()),
            _ => None,
        }));
    }
    let below =
        |places: &[&str]| looked_at.iter().any(|path| places.iter().any(|place| path.starts_with(place)));
    say(
        "# The latter because systemd leaves /run writable where it mounts /proc anew.\nProtectSystem=strict\nReadOnlyPaths=/run",
    );
    match (below(&["/home", "/root", "/run/user"]), user) {
        (false, RunsAs::Owner(owner)) => {
            let runtime = owner.runtime_directory();
            say(&format!(
                "# The user's bus, and what Podman keeps of running containers.\nProtectHome=tmpfs\nBindPaths=-{}",
                runtime.display()
            ));
        }
        (true, RunsAs::Owner(owner)) => {
            say(&format!("ProtectHome=read-only\nReadWritePaths=-{}", owner.runtime_directory().display()));
        }
        (home, _) => {
            // Empty folders, for systemd makes an inaccessible one by reading the table of mounts once more for each: 1.5 ms.
            let home = if home { "read-only" } else { "tmpfs" };
            say(&format!(
                "# Where forwarders note who uses what.\nReadWritePaths=-/run/bro\nProtectHome={home}"
            ));
        }
    }
    if let Some(Endpoint::Unix(path)) = &metrics
        && let Some(folder) =
            path.parent().filter(|folder| !folder.starts_with(crate::control_socket::SYSTEM))
    {
        say(&format!(
            "# For the socket of --metrics.\nReadWritePaths=-{}",
            quote_word(&folder.display().to_string()).replace("$$", "$")
        ));
    }
    if !below(&["/tmp", "/var/tmp"]) {
        say("PrivateTmp=yes");
    }
    say(
        "PrivateMounts=yes\nPrivateDevices=yes\nPrivateIPC=yes\nProtectClock=yes\nProtectHostname=yes\nProtectKernelLogs=yes\n\
         ProtectKernelModules=yes\nProtectKernelTunables=yes\nProtectControlGroups=yes\nProtectProc=invisible\nProcSubset=pid",
    );
}

/// systemd listens, and the forwarder enters the container's namespace: it needs no network of its own.
fn network(installed: &Installed, forwarder: &Forwarder, say: &mut impl FnMut(&str)) {
    let mut addresses: Vec<String> = Vec::new();
    for target in targets(installed) {
        if let Target::Tcp { host, .. } | Target::Udp { host, .. } = target {
            match host.parse::<std::net::IpAddr>() {
                Ok(ip) if ip.is_loopback() => {}
                Ok(ip) if !addresses.contains(&ip.to_string()) => addresses.push(ip.to_string()),
                Ok(_) => {}
                // Only a process with a network can ask for a name's address, and without asking it is unknown.
                Err(_) => return,
            }
        }
    }
    if installed.adoption().is_some() {
        // What a client inside the container writes goes to the host's own socket.
        let outside = installed.listeners.iter().filter_map(|listener| listener.external.ip());
        let outside = outside.filter(|ip| !ip.is_loopback() && !ip.is_unspecified()).map(|ip| ip.to_string());
        addresses.extend(outside);
        addresses.sort();
        addresses.dedup();
    }
    let metrics = match forwarder.options.metrics() {
        Some(Endpoint::Tcp(address)) => Some(address),
        Some(Endpoint::Unix(_)) | None => None,
    };
    if tells_undelivered(installed, forwarder) {
        // Which hosts its clients are is not known here.
        return say(
            "# No PrivateNetwork= and no IPAddressDeny=: clients are told that a datagram was not received.",
        );
    }
    if installed.adoption().is_some() {
        say(
            "# No PrivateNetwork=: the table of the host's sockets shows who is connected to an adopted one.",
        );
    } else if forwarder.container.is_some() && metrics.is_none() {
        say(
            "# systemd listens, and the container's own network is entered: this service needs none itself.\nPrivateNetwork=yes",
        );
    }
    if metrics.is_some_and(|address| !address.ip().is_loopback()) {
        // Which hosts may ask for metrics is not known here.
        return say("# No IPAddressDeny=: metrics are asked for from other hosts.");
    }
    let addresses: String = addresses.iter().map(|address| format!(" {address}")).collect();
    say(&format!(
        "# Where the service is. (Clients come over systemd's sockets, which have an IPAddressDeny= of their own.)\n\
         IPAddressDeny=any\nIPAddressAllow=localhost{addresses}"
    ));
}

fn targets(installed: &Installed) -> impl Iterator<Item = &Target> {
    installed.listeners.iter().filter_map(|listener| listener.internal.as_ref().map(TargetRange::first))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::installed::example;
    use crate::run_as::RunAsUser;

    fn lines_of(scope: RuntimeScope, run_as: bool, bro: &str) -> String {
        lines_with(scope, run_as, bro, None)
    }

    fn lines_with(scope: RuntimeScope, run_as: bool, bro: &str, metrics: Option<&str>) -> String {
        let owner = RunAsUser { name: "test".into(), uid: 7, gid: 7, home: "/home/test".into() };
        let options: Vec<_> = metrics.map(|at| ("metrics", at)).into_iter().collect();
        let web = example::forwarded(Some("systemd-web"), &options);
        let web = Installed { scope, run_as: run_as.then_some(owner), ..web };
        let forwarder = Forwarder { program: bro.into(), ..web.forwarder().unwrap().clone() };
        lines(&web, &forwarder, true)
    }

    #[test]
    fn the_program_itself_is_not_hidden() {
        let system = |bro: &str| lines_of(RuntimeScope::System, false, bro);
        assert!(system("/usr/bin/bro").contains("\nProtectHome=tmpfs\n"));
        assert!(system("/root/bro").contains("\nProtectHome=read-only\n"));
        assert!(
            system("/home/x/bro").contains("\nPrivateTmp=yes\n")
                && !system("/tmp/bro").contains("PrivateTmp")
        );
        let run_as = |bro: &str| lines_of(RuntimeScope::System, true, bro);
        assert!(run_as("/usr/bin/bro").contains("\nProtectHome=tmpfs\nBindPaths=-/run/user/7\n"));
        assert!(run_as("/home/x/bro").contains("\nProtectHome=read-only\nReadWritePaths=-/run/user/7\n"));
    }

    #[test]
    fn who_asks_for_metrics_can_reach_them_and_nothing_more_is_opened() {
        let with = |run_as, metrics| lines_with(RuntimeScope::System, run_as, "/usr/bin/bro", Some(metrics));
        for run_as in [false, true] {
            let without = lines_of(RuntimeScope::System, run_as, "/usr/bin/bro");
            let local = with(run_as, "127.0.0.1:9464");
            let less: Vec<&str> =
                without.lines().filter(|line| !local.lines().any(|other| other == *line)).collect();
            assert_eq!(less.last(), Some(&"PrivateNetwork=yes"), "{less:?}");
            assert!(local.contains("\nIPAddressAllow=localhost\n"), "{local}");
            let open = with(run_as, "0.0.0.0:9464");
            assert!(!open.contains("PrivateNetwork=") && !open.contains("\nIPAddressDeny="), "{open}");
            assert!(with(run_as, "/run/bro/web-activator/metrics.sock").contains("\nPrivateNetwork=yes\n"));
            assert!(!with(run_as, "/run/bro/web-activator/metrics.sock").contains("--metrics"));
            let folder = with(run_as, "/run/metrics/web.sock");
            assert!(
                folder.contains("\nReadWritePaths=-/run/metrics\n")
                    && folder.contains("\nPrivateNetwork=yes\n")
            );
            assert!(!with(run_as, "/tmp/web.sock").contains("PrivateTmp"));
        }
        let user = lines_with(RuntimeScope::User, false, "/usr/bin/bro", Some("127.0.0.1:9464"));
        assert_eq!(user, lines_of(RuntimeScope::User, false, "/usr/bin/bro"), "nothing is closed there");
    }

    #[test]
    fn only_who_tells_clients_over_udp_something_has_the_right_and_the_network() {
        let dns = |run_as: bool, options: &[(&str, &str)], target: &str| {
            let owner = RunAsUser { name: "test".into(), uid: 7, gid: 7, home: "/home/test".into() };
            let mut dns = example::forwarded(Some("systemd-dns"), options);
            dns.listeners = vec![example::port("53", Some(target))];
            let dns = Installed { scope: RuntimeScope::System, run_as: run_as.then_some(owner), ..dns };
            lines(&dns, dns.forwarder().unwrap(), true)
        };
        for run_as in [false, true] {
            let without = [
                dns(run_as, &[], "127.0.0.1:53/udp"),
                dns(run_as, &[("icmp-port-unreachable", "false")], "127.0.0.1:53/udp"),
                dns(run_as, &[("icmp-port-unreachable", "true")], "127.0.0.1:53"),
            ];
            for lines in without {
                assert!(!lines.contains("NET_RAW") && lines.contains("\nPrivateNetwork=yes\n"), "{lines}");
            }
            let with = dns(run_as, &[("icmp-port-unreachable", "true")], "127.0.0.1:53/udp");
            assert!(!with.contains("\nPrivateNetwork=") && !with.contains("\nIPAddressDeny="), "{with}");
            assert_eq!(with.matches("CAP_NET_RAW\n").count(), if run_as { 2 } else { 1 }, "{with}");
        }
    }

    #[test]
    fn a_users_manager_is_asked_for_nothing_that_implies_a_user_namespace() {
        let user = lines_of(RuntimeScope::User, false, "/usr/bin/bro");
        let directives = user.lines().filter(|line| !line.starts_with('#'));
        let bad = ["Private", "Protect", "Capability", "ReadWrite", "Bind"];
        let found: Vec<&str> =
            directives.filter(|line| bad.iter().any(|start| line.starts_with(start))).collect();
        assert!(found.is_empty() && user.contains("NoNewPrivileges=yes"), "{found:?}");
    }
}
