//! Which OCI runtime Podman uses, and what it can do for a container whose sockets are adopted.

use super::podman::{self, PodmanAnswer};
use super::versions::numbers;
use crate::run_as::RunAsUser;

/// A runtime with its version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct OciRuntime {
    name: String,
    /// `None` of one that says otherwise what it is.
    version: Option<(u32, u32)>,
}

/// What a runtime can do, since which version of it; from their NEWS and CHANGELOG.md.
#[derive(Debug, Clone, Copy)]
struct Since {
    name: &'static str,
    /// It hands notifications over (`listenerPath`).
    notifies: (u32, u32),
    /// It takes SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV.
    waits_killable: (u32, u32),
}

const KNOWN: [Since; 2] = [
    Since { name: "crun", notifies: (0, 19), waits_killable: (1, 6) },
    Since { name: "runc", notifies: (1, 1), waits_killable: (1, 2) },
];

/// The kernel of that flag.
const KILLABLE: (u32, u32) = (5, 19);

impl OciRuntime {
    /// That of this user's Podman, or of the owner's; `None` where Podman does not say.
    pub async fn find(owner: Option<&RunAsUser>) -> Option<Self> {
        const FORMAT: &str = "{{.Host.OCIRuntime.Name}}\n{{.Host.OCIRuntime.Version}}";
        match podman::ask(owner, &["info", "--format", FORMAT]).await {
            PodmanAnswer::Yes(text) => Self::parse(&text),
            PodmanAnswer::No(..) | PodmanAnswer::NotThere | PodmanAnswer::Silent => None,
        }
    }

    /// Its name, and then what it says of itself: `crun version 1.21` or `runc version 1.1.15+ds1`, and more lines.
    fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        let name = lines.next()?.trim().rsplit('/').next()?.to_owned();
        let version = lines.next()?.rsplit(' ').next().and_then(numbers);
        Some(Self { name, version })
    }

    fn since(&self) -> Option<Since> {
        KNOWN.into_iter().find(|known| known.name == self.name)
    }

    /// As Podman calls it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Why no socket of its containers can be adopted.
    pub fn refusal(&self) -> Option<String> {
        let Self { name, version } = self;
        match (self.since(), *version) {
            (None, _) => Some(format!(
                "Podman's OCI runtime is {name}, of which it is not known that it hands a container's seccomp notifications over; use crun or runc"
            )),
            (Some(Since { notifies: needs, .. }), Some((major, minor))) if (major, minor) < needs => {
                Some(format!(
                    "{name} {major}.{minor} does not hand a container's seccomp notifications over; use {name} {}.{}",
                    needs.0, needs.1
                ))
            }
            (Some(_), _) => None,
        }
    }

    /// Does it, on this kernel, take a profile with SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV?
    pub fn waits_killable(&self) -> bool {
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").ok();
        let new_kernel = kernel.as_deref().and_then(numbers).is_some_and(|kernel| kernel >= KILLABLE);
        let killable = |since: Since| self.version.is_some_and(|version| version >= since.waits_killable);
        new_kernel && self.since().is_some_and(killable)
    }
}

impl std::fmt::Display for OciRuntime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let version = self.version.map(|(major, minor)| format!(" {major}.{minor}")).unwrap_or_default();
        write!(f, "{}{version} hands notifications over", self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::OciRuntime;

    #[test]
    fn knows_who_hands_notifications_over() {
        let runtime = |text: &str| OciRuntime::parse(text).unwrap();
        let crun = runtime("crun\ncrun version 1.21\ncommit: 10269840\n+SYSTEMD");
        assert_eq!((crun.version, crun.refusal()), (Some((1, 21)), None));
        let runc = runtime("runc\nrunc version 1.1.15+ds1\n");
        assert_eq!(runc.refusal(), None);
        assert!(!runc.waits_killable());
        assert!(runtime("crun\ncrun version 0.18\n").refusal().unwrap().contains("use crun 0.19"));
        assert!(
            runtime("/usr/bin/runsc\nrunsc version release-20250101.0\n")
                .refusal()
                .unwrap()
                .contains("runsc")
        );
        assert_eq!(runtime("crun\nthe newest\n").refusal(), None);
        assert_eq!(OciRuntime::parse("crun\n"), None);
    }
}
