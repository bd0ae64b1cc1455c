//! The oldest versions that things work with: the only table of them, also shown in docs/reference.md (a test compares).

use super::{Check, selinux};
use crate::installed::{Installed, Mode};
use crate::podman::quadlet::Quadlet;
use crate::systemd::scope::RuntimeScope;

/// Which feature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Id {
    Forwarding,
    SeveralSockets,
    Waking,
    Freezing,
    KeepAwake,
    Units,
    DropIns,
    Pod,
    Template,
    ServiceName,
    NoWait,
    Direct,
    Adopt,
    DirectUnderSelinux,
    UnderAppArmor,
    Pasta,
    HostContainersInternal,
    KernelRelay,
    Loader,
}

/// Something that bro does, and the oldest versions that it needs; none where any will do.
#[derive(Debug)]
pub(super) struct Feature {
    pub id: Id,
    pub name: &'static str,
    pub systemd: Option<u32>,
    pub podman: Option<(u32, u32)>,
    pub kernel: Option<(u32, u32)>,
    /// The security module's version, where one is at work.
    pub guard: Option<Guard>,
}

/// What a security module has to support.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Guard {
    /// SELinux's policy for containers.
    ContainerSelinux(u32, u32),
    /// AppArmor with profiles for programs that make user namespaces.
    AppArmor(u32, u32),
}

impl std::fmt::Display for Guard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::ContainerSelinux(major, minor) => write!(f, "container-selinux {major}.{minor}"),
            Self::AppArmor(major, minor) => write!(f, "AppArmor {major}.{minor}"),
        }
    }
}

const fn feature(
    id: Id,
    name: &'static str,
    systemd: Option<u32>,
    podman: Option<(u32, u32)>,
    kernel: Option<(u32, u32)>,
) -> Feature {
    Feature { id, name, systemd, podman, kernel, guard: None }
}

const fn guarded(id: Id, name: &'static str, guard: Guard) -> Feature {
    Feature { id, name, systemd: None, podman: None, kernel: None, guard: Some(guard) }
}

/// All of them. The numbers are from systemd's NEWS, Podman's RELEASE_NOTES.md, and the manual pages and history of Linux.
pub(super) const FEATURES: &[Feature] = &[
    // openat2(2)
    feature(Id::Forwarding, "forwarding", None, None, Some((5, 6))),
    // FileDescriptorName=
    feature(Id::SeveralSockets, "several sockets with targets of their own", Some(227), None, None),
    // InvocationID
    feature(Id::Waking, "waking a unit and stopping it when idle (`--unit`)", Some(232), None, None),
    // FreezeUnit; cgroup.freeze
    feature(Id::Freezing, "freezing an idle service (`--freeze`)", Some(246), None, Some((5, 2))),
    // systemd-analyze calendar --base-time=
    feature(Id::KeepAwake, "keeping a service awake at times (`--keep-awake`)", Some(244), None, None),
    // ExecReload= without an absolute path (EXTEND_TIMEOUT_USEC=: 236; RuntimeDirectory= with a slash: 235); quadlets, .kube among
    // them
    feature(Id::Units, "units made by `bro activate`", Some(239), Some((4, 4)), None),
    feature(Id::DropIns, "drop-ins for quadlets (`Network=none`, `--direct`)", None, Some((5, 0)), None),
    feature(Id::Pod, "`.pod` quadlets", None, Some((5, 0)), None),
    feature(Id::Template, "templates (`NAME@.container`)", None, Some((5, 0)), None),
    feature(Id::ServiceName, "`ServiceName=` in quadlets", None, Some((5, 3)), None),
    feature(
        Id::NoWait,
        "no wait for the network (`[Quadlet] DefaultDependencies=`)",
        None,
        Some((5, 3)),
        None,
    ),
    // FlushPending=; its drop-in. (Podman hands sockets in since 3.4.)
    feature(Id::Direct, "sockets that the container takes over (`--direct`)", Some(247), Some((5, 0)), None),
    // FileDescriptorStorePreserve=; its drop-in (listenerPath since 4.1); SO_NETNS_COOKIE. The OCI runtime is another matter.
    feature(
        Id::Adopt,
        "sockets that the container's service adopts (`--adopt`)",
        Some(254),
        Some((5, 0)),
        Some((5, 14)),
    ),
    // Before, a container might not accept at systemd's socket.
    guarded(Id::DirectUnderSelinux, "the same under SELinux", Guard::ContainerSelinux(2, 183)),
    // Profiles for podman, crun and runc.
    guarded(
        Id::UnderAppArmor,
        "rootless containers under AppArmor's limit on user namespaces",
        Guard::AppArmor(4, 0),
    ),
    feature(Id::Pasta, "another account's port from a container (pasta)", None, Some((4, 4)), None),
    feature(Id::HostContainersInternal, "the same at `host.containers.internal`", None, Some((5, 3)), None),
    // bpf_get_netns_cookie() for sock_ops programs
    feature(Id::KernelRelay, "the kernel relay", None, None, Some((5, 19))),
    // Maps that are pinned, used by users that may not load programs.
    feature(Id::Loader, "the kernel relay through `bro loader`", None, None, Some((5, 19))),
];

/// The versions of this host.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Versions {
    pub systemd: Option<u32>,
    pub podman: Option<(u32, u32)>,
    pub kernel: Option<(u32, u32)>,
    /// Where SELinux is at work.
    pub container_selinux: Option<(u32, u32)>,
    /// Where AppArmor limits user namespaces.
    pub apparmor: Option<(u32, u32)>,
}

/// The first two numbers of a version: `257.9-1` is 257 and 9, `6.12.0-cloud` is 6 and 12.
pub(super) fn numbers(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.trim().split(|end: char| !end.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next().and_then(|minor| minor.parse().ok()).unwrap_or(0)))
}

/// A program's output, if it ends within ten seconds.
pub(super) async fn says(program: &str, args: &[&str]) -> Option<String> {
    let output = tokio::process::Command::new(program).args(args).kill_on_drop(true).output();
    let output = tokio::time::timeout(std::time::Duration::from_secs(10), output).await.ok()?.ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

impl Versions {
    pub(super) async fn of_this_host() -> Self {
        let (systemd, podman, container_selinux, apparmor) = tokio::join!(
            says("systemctl", &["--version"]),
            says("podman", &["version", "--format", "{{.Client.Version}}"]),
            selinux::policy(),
            apparmor()
        );
        // systemd 257 (257.9-1~deb13u1)
        let systemd =
            systemd.and_then(|text| numbers(text.split_whitespace().nth(1)?)).map(|(major, _)| major);
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").ok();
        Self {
            systemd,
            podman: podman.as_deref().and_then(numbers),
            kernel: kernel.as_deref().and_then(numbers),
            container_selinux,
            apparmor,
        }
    }

    /// What a feature needs that this host lacks; a program that is missing entirely is another check's matter.
    pub(super) fn lacks(self, feature: &Feature) -> Option<String> {
        let older = |has: Option<(u32, u32)>, needs: Option<(u32, u32)>| match (has, needs) {
            (Some(has), Some(needs)) if has < needs => Some(needs),
            _ => None,
        };
        let dotted = |(major, minor): (u32, u32)| format!("{major}.{minor}");
        let whole = |version: Option<u32>| version.map(|major| (major, 0));
        let guard = feature.guard.filter(|guard| match *guard {
            Guard::ContainerSelinux(major, minor) => {
                older(self.container_selinux, Some((major, minor))).is_some()
            }
            Guard::AppArmor(major, minor) => older(self.apparmor, Some((major, minor))).is_some(),
        });
        older(whole(self.systemd), whole(feature.systemd))
            .map(|(major, _)| format!("systemd {major}"))
            .or_else(|| older(self.podman, feature.podman).map(|needs| format!("podman {}", dotted(needs))))
            .or_else(|| older(self.kernel, feature.kernel).map(|needs| format!("Linux {}", dotted(needs))))
            .or_else(|| guard.map(|guard| guard.to_string()))
    }
}

/// The features that an activated service uses; `quadlet` if it is there.
pub(super) fn used(installed: &Installed, quadlet: Option<&Quadlet>) -> Vec<&'static Feature> {
    let of_user = installed.unit_scope() == RuntimeScope::User;
    // With auto it is spliced where there is no kernel relay.
    let forwarder = installed.forwarder();
    let wants_kernel = forwarder.is_some_and(|forwarder| forwarder.options.needs_kernel_relay());
    let uses = |id: Id| match id {
        Id::Units => true,
        Id::Forwarding | Id::Waking => forwarder.is_some(),
        Id::Freezing => forwarder.is_some_and(|forwarder| forwarder.options.freezes()),
        Id::KeepAwake => installed.kept_awake().is_some(),
        Id::SeveralSockets => forwarder.is_some() && installed.listeners.len() > 1,
        Id::DropIns => installed.drop_in.is_some(),
        Id::Pod => {
            installed.quadlet.extension().is_some_and(|kind| kind == "pod")
                || quadlet.is_some_and(|quadlet| quadlet.value("Pod").is_some())
        }
        Id::Template => installed.name.contains('@'),
        Id::ServiceName => quadlet.is_some_and(|quadlet| quadlet.value("ServiceName").is_some()),
        Id::NoWait => {
            quadlet.is_some_and(|quadlet| quadlet.file.value("Quadlet", "DefaultDependencies").is_some())
        }
        Id::Adopt => installed.adoption().is_some(),
        Id::Direct | Id::DirectUnderSelinux => matches!(installed.mode, Mode::Direct(_)),
        Id::UnderAppArmor => of_user,
        // Clients from another account's container are not this service's matter.
        Id::Pasta | Id::HostContainersInternal => false,
        Id::KernelRelay => wants_kernel,
        Id::Loader => wants_kernel && of_user,
    };
    FEATURES.iter().filter(|feature| uses(feature.id)).collect()
}

/// What this host is too old for, of what adoption needs.
pub(crate) async fn too_old_to_adopt() -> Option<String> {
    let versions = Versions::of_this_host().await;
    let feature = FEATURES.iter().find(|feature| feature.id == Id::Adopt)?;
    versions.lacks(feature)
}

/// Which of them are too new for this host.
pub(super) async fn check_of(installed: &Installed, quadlet: Option<&Quadlet>) -> Check {
    const NAME: &str = "versions";
    let versions = Versions::of_this_host().await;
    let lacking: Vec<String> = used(installed, quadlet)
        .into_iter()
        .filter_map(|feature| Some(format!("{} needs {}", feature.name, versions.lacks(feature)?)))
        .collect();
    if lacking.is_empty() {
        Check::ok(NAME, "new enough")
    } else {
        Check::bad(NAME, lacking.join("; "), "use newer versions")
    }
}

/// Does AppArmor forbid unknown programs to make user namespaces?
pub(super) fn apparmor_limits() -> bool {
    let limit = std::fs::read_to_string("/proc/sys/kernel/apparmor_restrict_unprivileged_userns");
    limit.is_ok_and(|limit| limit.trim() == "1")
}

/// AppArmor's version, where it does.
async fn apparmor() -> Option<(u32, u32)> {
    if !apparmor_limits() {
        return None;
    }
    // AppArmor parser version 4.0.1
    let said = says("apparmor_parser", &["--version"]).await?;
    numbers(said.lines().next()?.rsplit(' ').next()?)
}

/// Does everything work with the versions of this host?
pub(super) async fn check() -> Check {
    const NAME: &str = "versions";
    let versions = Versions::of_this_host().await;
    let lacking: Vec<String> = FEATURES
        .iter()
        .filter_map(|feature| Some(format!("{} needs {}", feature.name, versions.lacks(feature)?)))
        .collect();
    if lacking.is_empty() {
        Check::ok(NAME, "new enough for everything")
    } else {
        Check::less(NAME, lacking.join("; "), "use newer versions for that; the rest works")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_versions() {
        assert_eq!(numbers("257.9-1~deb13u1"), Some((257, 9)));
        assert_eq!(numbers("6.12.0-cloud-amd64"), Some((6, 12)));
        assert_eq!(numbers("5.4.2\n"), Some((5, 4)));
        assert_eq!(numbers("255"), Some((255, 0)));
        assert_eq!(numbers("nonsense"), None);
    }

    #[test]
    fn says_what_is_too_old() {
        let host = Versions {
            systemd: Some(257),
            podman: Some((4, 9)),
            kernel: Some((5, 15)),
            container_selinux: Some((2, 182)),
            apparmor: Some((3, 1)),
        };
        let lacking: Vec<String> = FEATURES.iter().filter_map(|feature| host.lacks(feature)).collect();
        assert_eq!(
            lacking.join(", "),
            "podman 5.0, podman 5.0, podman 5.0, podman 5.3, podman 5.3, podman 5.0, podman 5.0, container-selinux 2.183, AppArmor 4.0, \
             podman 5.3, Linux 5.19, Linux 5.19"
        );
        assert!(FEATURES.iter().all(|feature| Versions::default().lacks(feature).is_none()));
    }

    #[test]
    fn a_service_needs_what_it_makes_use_of() {
        use crate::commands::doctor::service::tests::quadlet;
        use crate::installed::{Adoption, Takeover, Way, example};
        use crate::podman::quadlet::QuadletKind;
        let ids = |installed: &Installed, quadlet: Option<&Quadlet>| -> Vec<Id> {
            used(installed, quadlet).iter().map(|feature| feature.id).collect()
        };
        let mut web = example::forwarded(Some("systemd-web"), &[]);
        let always = [Id::Forwarding, Id::Waking, Id::Units, Id::UnderAppArmor];
        assert_eq!(ids(&web, None), always);
        let plain = quadlet(QuadletKind::Container, "[Container]\nImage=x\n", Ok("systemd-web"));
        assert_eq!(ids(&web, Some(&plain)), always);
        for (text, id) in [
            ("[Container]\nServiceName=other\n", Id::ServiceName),
            ("[Container]\nPod=app.pod\n", Id::Pod),
            ("[Container]\n[Quadlet]\nDefaultDependencies=false\n", Id::NoWait),
        ] {
            let quadlet = quadlet(QuadletKind::Container, text, Ok("systemd-web"));
            assert!(ids(&web, Some(&quadlet)).contains(&id), "{text}");
        }
        web.mode = Mode::Forward(example::forwarder(Some("systemd-web"), &[("relay", "sockmap")]));
        assert!(ids(&web, None).ends_with(&[Id::KernelRelay, Id::Loader]));
        web.quadlet = "/quadlets/web.pod".into();
        assert!(ids(&web, None).contains(&Id::Pod));
        let forwarder = example::forwarder(Some("systemd-web"), &[]);
        web.mode = Mode::Adopt(Adoption::new("web", forwarder, "/source".into(), "/units".as_ref()));
        assert!(ids(&web, None).contains(&Id::Adopt));
        web.mode = Mode::Direct(Takeover { way: Way::ListenFds, pause_unit: None });
        web.scope = RuntimeScope::System;
        assert_eq!(ids(&web, None), [Id::Units, Id::Pod, Id::Direct, Id::DirectUnderSelinux]);
        let every: Vec<Id> = FEATURES.iter().map(|feature| feature.id).collect();
        assert!(every.iter().enumerate().all(|(at, id)| !every[..at].contains(id)), "each id once");
    }

    #[test]
    fn the_reference_shows_this_table() {
        let cell = |version: Option<String>| version.unwrap_or_default();
        let dotted = |(major, minor): (u32, u32)| format!("{major}.{minor}");
        let reference = include_str!("../../../../docs/reference.md");
        let row = |Feature { name, systemd, podman, kernel, guard, .. }: &Feature| {
            format!(
                "| {name} | {} | {} | {} | {} |\n",
                cell(systemd.map(|version| version.to_string())),
                cell(podman.map(dotted)),
                cell(kernel.map(dotted)),
                cell(guard.map(|guard| guard.to_string()))
            )
        };
        let table: String = FEATURES.iter().map(row).collect();
        assert!(reference.contains(&table), "the table of docs/reference.md has to be\n{table}");
    }
}
