//! What `--adopt` asks of a quadlet, and what the container's seccomp profile is made of.

use std::path::{Path, PathBuf};

use bro_relay::listener::SocketKind;
use bro_relay::read_bounded::{self, Link};
use bro_relay::target::Target;

use super::plan::{FoundQuadlet, Paths};
use super::root_dir;
use crate::adopt::Adopt;
use crate::cli::Activate;
use crate::exit::Failure;
use crate::installed::{Adoption, Forwarder, Installed, InstalledPort};
use crate::paths::below;
use crate::podman::quadlet::{Quadlet, QuadletKind};
use crate::run_as::RunAsUser;
use crate::systemd::scope::RuntimeScope;
use crate::targets::TargetRange;
use crate::units::{self, File};

/// Where Podman looks for the profile of containers that name none, the first before the second (containers-common).
const DEFAULTS: [&str; 2] = ["/etc/containers/seccomp.json", "/usr/share/containers/seccomp.json"];

/// The longest profile that is read; containers-common's has 30 kB.
const LONGEST: u64 = 1 << 20;

/// The longest path of a unix socket (unix(7)).
const LONGEST_SOCKET: usize = 107;

/// Images whose services let clients of 127.0.0.1 in as they let in no others, by a part of the image's name, and how.
const TRUSTING: [(&str, &str); 10] = [
    ("exim", "a mail server relays for 127.0.0.1 (relay_from_hosts)"),
    ("mailserver", "a mail server relays for 127.0.0.1 (mynetworks)"),
    ("mongo", "its first user is made by any client of 127.0.0.1 (localhost exception)"),
    ("postfix", "a mail server relays for 127.0.0.1 (mynetworks)"),
    ("postgis", "its image's pg_hba.conf asks 127.0.0.1 for no password"),
    ("postgres", "its image's pg_hba.conf asks 127.0.0.1 for no password"),
    ("rabbitmq", "its user guest may come from 127.0.0.1 (loopback_users)"),
    ("redis", "its protected mode asks 127.0.0.1 for no password"),
    ("timescaledb", "its image's pg_hba.conf asks 127.0.0.1 for no password"),
    ("valkey", "its protected mode asks 127.0.0.1 for no password"),
];

/// Options that cannot hold for a client that the forwarder does not accept, as `bro forward --adopt` refuses them: the option, the values of it
/// that are refused (with none, all but `false`), and why.
const NOT_WITH_IT: [(&str, &str); 4] = [
    ("connections-per-source", "the service accepts its clients itself"),
    ("proxy-protocol", "the service sees its clients' own addresses"),
    ("accept-proxy", "the service accepts its clients itself"),
    ("local-clients", "no lane leads to an adopted connection"),
];

/// Options that hold only for clients that are forwarded.
const FORWARDED_ONLY: [&str; 2] = ["connections-max", "idle-timeout"];

fn usage(text: impl Into<String>) -> anyhow::Error {
    Failure::Usage(text.into()).into()
}

/// What is to be adopted? What is installed stays so until another is given.
pub(super) fn wanted(options: &Activate, installed: Option<&Installed>) -> Adopt {
    let before = || installed.and_then(Installed::adoption).map_or(Adopt::Off, |adoption| adoption.what);
    options.adopt.unwrap_or_else(before)
}

/// The adoption of this quadlet's service.
pub(super) fn adoption(
    (what, forwarder): (Adopt, Forwarder),
    options: &Activate,
    FoundQuadlet { quadlet, pod }: &FoundQuadlet,
    installed: Option<&Installed>,
    owner: Option<&RunAsUser>,
    places: &Paths,
) -> anyhow::Result<Adoption> {
    let is_root = places.scope == RuntimeScope::System && owner.is_none();
    check(quadlet, pod.as_ref(), is_root)?;
    if places.scope == RuntimeScope::User && places.root.is_some() {
        return Err(usage(
            "--adopt with --user and --root: the container's profile names the user's runtime directory, and whose that will be is not known \
             here; activate it as that user, on the host itself",
        ));
    }
    let name = &quadlet.name;
    let uid = nix::unistd::geteuid().as_raw();
    let listener = units::listener_path(name, places.scope, uid);
    if listener.as_os_str().len() > LONGEST_SOCKET {
        return Err(usage(format!(
            "{} is longer than the {LONGEST_SOCKET} bytes that the path of a socket has: --adopt needs a quadlet with a shorter name",
            listener.display()
        )));
    }
    let source = source(quadlet, owner, places.root.as_deref())?;
    let trusted = installed.and_then(Installed::adoption).is_some_and(|adoption| adoption.trusts_loopback);
    let before = installed.and_then(Installed::adoption).and_then(|adoption| adoption.connects.clone());
    Ok(Adoption {
        what,
        trusts_loopback: options.trust_loopback || trusted,
        connects: options.adopt_connect.clone().or(before),
        ..Adoption::new(name, forwarder, source, &places.units)
    })
}

/// Refuses what adoption would undo, or what would undo it.
fn check(quadlet: &Quadlet, pod: Option<&Quadlet>, is_root: bool) -> anyhow::Result<()> {
    let file = quadlet.file_name();
    if quadlet.kind != QuadletKind::Container {
        return Err(usage(format!(
            "--adopt is for a .container, whose seccomp profile it sets, and not yet for {file}: activate the quadlet of the container that listens"
        )));
    }
    if quadlet.is_shared() {
        let (prefix, instance) = quadlet.name.split_once('@').unwrap_or((&quadlet.name, ""));
        return Err(usage(format!(
            "--adopt needs a drop-in for this instance alone, and {file} is shared by all; give it a file of its own: ln -s {file} \
             {prefix}@{instance}.container"
        )));
    }
    let arguments = quadlet.file.words("Container", "PodmanArgs");
    let holder = pod.unwrap_or(quadlet);
    let networks = argument(&arguments, &["--network", "--net"]);
    if holder.is_on_host() || networks.contains(&"host") {
        return Err(usage(format!(
            "{} uses the host's network (Network=host), where its service listens itself and there is nothing to adopt; give it another network, or \
             leave --adopt out",
            holder.file_name()
        )));
    }
    if arguments.iter().any(|word| ["--privileged", "--privileged=true"].contains(&word.as_str())) {
        return Err(usage(format!(
            "PodmanArgs=--privileged in {file}: Podman confines it by no seccomp profile, so it cannot be adopted; take that out, or leave --adopt out"
        )));
    }
    let options = argument(&arguments, &["--security-opt"]);
    if options.iter().any(|option| option.starts_with("seccomp=")) {
        return Err(usage(format!(
            "PodmanArgs= in {file} names a seccomp profile, besides which there can be no other: write SeccompProfile= instead, of which --adopt makes \
             one that adopts"
        )));
    }
    let added = quadlet.file.words("Container", "AddCapability");
    let added: Vec<&str> =
        added.iter().map(String::as_str).chain(argument(&arguments, &["--cap-add"])).collect();
    let may_lead_elsewhere = added.iter().flat_map(|list| list.split(',')).find(|capability| {
        ["NET_ADMIN", "CAP_NET_ADMIN", "ALL"].contains(&capability.to_ascii_uppercase().as_str())
    });
    if let Some(capability) =
        may_lead_elsewhere.filter(|_| is_root && !has_own_users(quadlet, pod, &arguments))
    {
        return Err(usage(format!(
            "AddCapability={capability} in {file}: with that, root in the container gets from an adopted socket into the host's network namespace; give \
             the container users of its own (UserNS=auto), or leave --adopt out"
        )));
    }
    Ok(())
}

/// Does it have a user namespace that is not the host's?
fn has_own_users(quadlet: &Quadlet, pod: Option<&Quadlet>, arguments: &[String]) -> bool {
    let said = [Some(quadlet), pod]
        .into_iter()
        .flatten()
        .flat_map(|quadlet| ["UserNS", "RemapUsers"].into_iter().filter_map(|key| quadlet.value(key)));
    said.chain(argument(arguments, &["--userns"])).any(|users| users != "host")
        || ["UIDMap", "SubUIDMap"].iter().any(|key| quadlet.value(key).is_some())
}

/// The values that a podman option of these names has: `--net host` and `--net=host`.
fn argument<'a>(arguments: &'a [String], names: &[&str]) -> Vec<&'a str> {
    let mut values = Vec::new();
    for (at, word) in arguments.iter().enumerate() {
        if names.contains(&word.as_str()) {
            values.extend(arguments.get(at + 1).map(String::as_str));
        } else if let Some((name, value)) = word.split_once('=')
            && names.contains(&name)
        {
            values.push(value);
        }
    }
    values
}

/// The profile that the container would have otherwise, as a path without the root above it.
fn source(quadlet: &Quadlet, owner: Option<&RunAsUser>, root: Option<&Path>) -> anyhow::Result<PathBuf> {
    let file = quadlet.file_name();
    let Some(said) = quadlet.value("SeccompProfile") else {
        let is_there = |path: &&&str| below(root, Path::new(path)).is_file();
        return DEFAULTS.iter().find(is_there).map(PathBuf::from).ok_or_else(|| {
            let text = format!(
                "there is neither {} nor {}, of which --adopt makes the container's seccomp profile; install containers-common (Debian: \
                 golang-github-containers-common)",
                DEFAULTS[0], DEFAULTS[1]
            );
            Failure::NotFound(text).into()
        });
    };
    if said == "unconfined" {
        return Err(usage(format!(
            "SeccompProfile=unconfined in {file}: it is by a seccomp profile that bro hears of the container's listen(2); remove that line, or leave \
             --adopt out"
        )));
    }
    let path = quadlet.expand(said, owner).map_err(|bad| {
        usage(format!(
            "SeccompProfile={said} in {file} holds the specifier {bad}, which bro does not know; write the path out"
        ))
    })?;
    if !crate::address::is_straight(Path::new(&path)) {
        return Err(usage(format!(
            "SeccompProfile={said} in {file} is no absolute path, and --adopt makes a profile of that file: write the whole path"
        )));
    }
    Ok(path.into())
}

/// The profile that the quadlet asks for by now, as far as that can be told; `None` where it is the system's choice and there is none.
pub(crate) fn said_source(quadlet: &Quadlet, owner: Option<&RunAsUser>) -> Option<PathBuf> {
    source(quadlet, owner, None).ok()
}

/// The container's seccomp profile, made anew of its source. `listener_path` and `wait_killable` as in [`bro_adopt::profile::WantedProfile`].
pub(crate) fn profile(
    wanted: &Installed,
    adoption: &Adoption,
    listener_path: &Path,
    wait_killable: bool,
    root: Option<&Path>,
) -> anyhow::Result<File> {
    let path = below(root, &adoption.source);
    root_dir::stays_inside(root, &path)?;
    let shown = adoption.source.display();
    let text = {
        // The user may have named any file.
        let _acting = wanted.run_as.as_ref().filter(|_| root.is_none()).map(RunAsUser::act).transpose()?;
        read_bounded::read(&path, LONGEST, Link::Follow)
    };
    let text = text.map_err(|error| {
        usage(format!(
            "{shown}, of which --adopt makes the container's seccomp profile, cannot be read: {error}"
        ))
    })?;
    let text = units::profile_text(wanted, &text, listener_path, wait_killable)
        .map_err(|unfit| usage(format!("no seccomp profile that adopts can be made of {shown}: {unfit}")))?;
    Ok(File { path: adoption.profile.clone(), text })
}

/// What of the rest does not go with it, and what has less effect.
pub(super) fn check_rest(
    wanted: &Installed,
    quadlet: &Quadlet,
    warnings: &mut Vec<String>,
) -> anyhow::Result<()> {
    let Some(adoption) = wanted.adoption() else { return Ok(()) };
    let refuse = |option: &str, why: &str| {
        Err(usage(format!("--{option} does not go with --adopt: {why}; leave one of them out")))
    };
    for (name, why) in NOT_WITH_IT {
        if wanted.option(name).is_some_and(|value| !["false", "off"].contains(&value)) {
            return refuse(name, why);
        }
    }
    if wanted.option("ready").is_some_and(|ready| !["auto", "listen"].contains(&ready)) {
        return refuse(
            "ready other than auto or listen",
            "the service accepts its clients from listen(2) on",
        );
    }
    let what = adoption.what;
    let mut sockets = wanted.listeners.iter().flat_map(|listener| listener.external.sockets());
    if !sockets.any(|socket| what.offers(socket.kind)) {
        return Err(usage(match what {
            Adopt::Udp => "--adopt=udp: no port is one of UDP; give --external-port PORT/udp, or --adopt",
            _ => "--adopt is for sockets of streams, and there is none; for those of UDP give --adopt=udp",
        }));
    }
    for listener in &wanted.listeners {
        if let Some(Target::Tcp { host, port } | Target::Udp { host, port }) =
            listener.internal.as_ref().map(TargetRange::first)
            && host != "localhost"
            && host.parse::<std::net::IpAddr>().is_err()
        {
            return Err(usage(format!(
                "--adopt compares addresses, and “{host}” is a name: give --internal-port ADDR:{port}"
            )));
        }
    }
    if let Some(port) = wanted.listeners.iter().find(|port| port.service == units::AGENT_DESCRIPTOR) {
        return Err(usage(format!(
            "“{}” is what --adopt calls the socket of the container's notifications: give the port, or the quadlet, another name",
            port.service
        )));
    }
    let less: Vec<&str> = FORWARDED_ONLY.into_iter().filter(|name| wanted.option(name).is_some()).collect();
    if !less.is_empty() {
        warnings.push(format!(
            "--{} holds for clients that are forwarded: of an adopted service's own connections bro sees only that they are there",
            less.join(" and --")
        ));
    }
    match trusting(quadlet)
        .filter(|_| what.offers(SocketKind::Stream) && !adoption.trusts_loopback)
        .filter(|_| wanted.listeners.iter().any(shows_this_host))
    {
        None => Ok(()),
        Some((image, how)) => Err(usage(format!(
            "{} runs {image}: {how}, and an adopted service sees the clients of this host as 127.0.0.1; change that in its configuration and give \
             --trust-loopback, or listen at an address of the network, or leave --adopt out",
            quadlet.file_name()
        ))),
    }
}

/// May a client come from 127.0.0.1 or `::1`?
pub(super) fn serves_this_host(listener: &InstalledPort) -> bool {
    listener.is_tcp() && listener.external.ip().is_none_or(|ip| ip.is_unspecified() || ip.is_loopback())
}

/// Does the service see such a client as it is?
pub(super) fn shows_this_host(listener: &InstalledPort) -> bool {
    serves_this_host(listener) && !listener.fence.as_ref().is_some_and(|fence| fence.told.this_host)
}

/// Which service it runs that trusts 127.0.0.1, and how, as far as names tell.
fn trusting(quadlet: &Quadlet) -> Option<(&'static str, &'static str)> {
    let names = quadlet.programs();
    // What looks after such a service is called after it.
    let is_one = |name: &String, part: &str| name.contains(part) && !name.contains("exporter");
    TRUSTING.into_iter().find(|(part, _)| names.iter().any(|name| is_one(name, part)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::systemd::unit_file::UnitFile;

    fn quadlet(text: &str) -> Quadlet {
        Quadlet {
            name: "web".into(),
            kind: QuadletKind::Container,
            path: "web.container".into(),
            file: UnitFile::parse(&format!("[Container]\n{text}")),
            unit: "web.service".into(),
            container: Ok("systemd-web".into()),
        }
    }

    #[test]
    fn what_gets_out_of_an_adopted_socket_is_refused() {
        let refused =
            |text: &str, is_root| check(&quadlet(text), None, is_root).err().map(|error| error.to_string());
        for text in [
            "AddCapability=NET_ADMIN\n",
            "AddCapability=CAP_SYS_TIME cap_net_admin\n",
            "AddCapability=all\n",
            "PodmanArgs=--cap-add NET_ADMIN,SYS_TIME\n",
            "AddCapability=NET_ADMIN\nUserNS=host\n",
        ] {
            assert!(refused(text, true).is_some_and(|said| said.contains("UserNS=auto")), "{text}");
            assert_eq!(refused(text, false), None, "{text}");
            assert_eq!(refused(&format!("{text}UserNS=auto\n"), true), None, "{text}");
        }
        assert_eq!(refused("AddCapability=NET_BIND_SERVICE\nPodmanArgs=--userns host\n", true), None);
        for (text, words) in [
            ("PodmanArgs=--privileged\n", "--privileged"),
            ("PodmanArgs=--security-opt=seccomp=/x.json\n", "SeccompProfile="),
            ("PodmanArgs=--net host\n", "host's network"),
            ("Network=host\n", "host's network"),
        ] {
            assert!(refused(text, false).is_some_and(|said| said.contains(words)), "{text}");
        }
        let pod =
            Quadlet { file: UnitFile::parse("[Pod]\nNetwork=host\n"), kind: QuadletKind::Pod, ..quadlet("") };
        assert!(check(&quadlet("Pod=app.pod\n"), Some(&pod), false).is_err());
    }

    #[test]
    fn services_that_trust_this_host_are_known_by_their_names() {
        let known = |text: &str| trusting(&quadlet(text)).map(|(name, _)| name);
        assert_eq!(known("Image=docker.io/library/postgres:17\n"), Some("postgres"));
        assert_eq!(known("Image=docker.io/bitnami/postgresql@sha256:0\n"), Some("postgres"));
        assert_eq!(known("Rootfs=/:O\nExec=/usr/bin/redis-server --port 1\n"), Some("redis"));
        assert_eq!(known("Image=localhost/x\nEntrypoint=/usr/bin/mongod\n"), Some("mongo"));
        assert_eq!(known("Image=quay.io/prometheuscommunity/postgres-exporter\n"), None);
        assert_eq!(known("Image=docker.io/postgres/web\nExec=serve redis\n"), None);
        assert!(TRUSTING.is_sorted());
    }
}
