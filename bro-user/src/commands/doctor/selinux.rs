//! Labels, where SELinux enforces its policy: bro's own, and those of what a container shares with the host.

use std::path::{Path, PathBuf};

use super::Check;
use super::versions::{numbers, says};
use crate::podman::quadlet::{Quadlet, QuadletKind};
use crate::run_as::RunAsUser;

const NAME: &str = "selinux";

/// What container_t may read (container_selinux(8)); `:z` and `:Z` make it container_file_t.
const FOR_CONTAINERS: [&str; 4] =
    ["container_file_t", "container_ro_file_t", "container_share_t", "svirt_sandbox_file_t"];

fn is_enforcing() -> bool {
    std::fs::read_to_string("/sys/fs/selinux/enforce").is_ok_and(|enforce| enforce.trim() == "1")
}

/// The version of the policy for containers, where SELinux is at work and an RPM brought it.
pub(super) async fn policy() -> Option<(u32, u32)> {
    if !is_enforcing() {
        return None;
    }
    numbers(&says("rpm", &["--query", "--queryformat", "%{VERSION}", "container-selinux"]).await?)
}

/// May a system unit execute this program?
pub(super) fn program() -> Check {
    if !is_enforcing() {
        return Check::ok(NAME, "not enforcing");
    }
    let program = std::env::current_exe().unwrap_or_default();
    let kind = crate::sys::selinux_type(&program);
    // From the usual policies: system units may not run files of users, of root's home or temporary ones. A user's units may.
    let theirs = |kind: &str| kind.ends_with("_home_t") || kind.ends_with("_tmp_t") || kind == "default_t";
    match kind.as_deref() {
        Some(kind) if theirs(kind) && nix::unistd::geteuid().is_root() => Check::less(
            NAME,
            format!(
                "enforcing, and {} is labelled {kind}, which system units may not run",
                program.display()
            ),
            "install bro as /usr/local/bin/bro and run `sudo restorecon /usr/local/bin/bro`",
        ),
        kind => Check::ok(
            NAME,
            format!(
                "enforcing; this program is labelled {}; what a container shares with the host is looked at by `bro doctor NAME`, \
                 and `sudo ausearch --message avc --start recent` shows what was refused",
                kind.unwrap_or("nothing")
            ),
        ),
    }
}

/// May the container read what it shares with the host? None where SELinux does not check.
pub(super) fn shared(quadlet: &Quadlet, owner: Option<&RunAsUser>) -> Option<Check> {
    if !is_enforcing() || quadlet.kind != QuadletKind::Container || is_unconfined(quadlet) {
        return None;
    }
    let wrong = unlabelled(quadlet, owner, crate::sys::selinux_type);
    let Some(((volume, path, kind), more)) = wrong.split_first() else {
        return Some(Check::ok(
            NAME,
            "enforcing, and the container may read all that it shares with the host",
        ));
    };
    let more = if more.is_empty() { String::new() } else { format!(" (and {} more)", more.len()) };
    Some(Check::less(
        NAME,
        format!(
            "enforcing, and {}, which Volume={volume} shares, is labelled {kind}, which containers may not read{more}",
            path.display()
        ),
        format!(
            "add :z to that line (:Z, if no other container shares it; neither for directories of the system) in {}",
            quadlet.file_name()
        ),
    ))
}

/// `SecurityLabelDisable=`, or the same set by hand.
fn is_unconfined(quadlet: &Quadlet) -> bool {
    quadlet.file.boolean(quadlet.kind.section(), "SecurityLabelDisable") == Some(true)
        || quadlet.values("PodmanArgs").iter().any(|args| {
            args.contains("label=disable") || args.contains("label:disable") || args.contains("--privileged")
        })
}

/// The volumes that containers may not read: what the quadlet says, the place on the host, and its type.
fn unlabelled(
    quadlet: &Quadlet,
    owner: Option<&RunAsUser>,
    type_of: impl Fn(&Path) -> Option<String>,
) -> Vec<(String, PathBuf, String)> {
    let volumes = quadlet.values("Volume").into_iter();
    volumes
        .filter_map(|volume| {
            let path = quadlet.shares(volume, owner)?;
            let kind = type_of(&path)?;
            (!FOR_CONTAINERS.contains(&kind.as_str())).then(|| (volume.to_owned(), path, kind))
        })
        .filter(|(volume, ..)| !is_relabelled(volume))
        .collect()
}

/// Podman gives it the right label (`:z`, `:Z`).
fn is_relabelled(volume: &str) -> bool {
    volume
        .splitn(3, ':')
        .nth(2)
        .is_some_and(|options| options.split(',').any(|option| matches!(option, "z" | "Z")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::systemd::unit_file::UnitFile;

    fn quadlet(text: &str) -> Quadlet {
        Quadlet {
            name: "web".into(),
            kind: QuadletKind::Container,
            path: "/etc/containers/systemd/web.container".into(),
            file: UnitFile::parse(text),
            unit: "web.service".into(),
            container: Ok("systemd-web".into()),
        }
    }

    #[test]
    fn finds_what_containers_may_not_read() {
        let quadlet = quadlet(
            "[Container]\nVolume=/srv/a:/a\nVolume=/srv/b:/b:ro,z\nVolume=named:/c\nVolume=/srv/d:/d:Z\nVolume=./e:/e:ro\n\
             Volume=/srv/ours:/f\nVolume=/srv/none:/g\nVolume=data.volume:/h\n",
        );
        let kinds = |path: &Path| match path.to_str()? {
            "/srv/none" => None,
            "/srv/ours" => Some("container_file_t".to_owned()),
            _ => Some("var_t".to_owned()),
        };
        let found = unlabelled(&quadlet, None, kinds);
        let paths: Vec<_> =
            found.iter().map(|(_, path, kind)| (path.to_str().unwrap(), kind.as_str())).collect();
        assert_eq!(paths, [("/srv/a", "var_t"), ("/etc/containers/systemd/e", "var_t")]);
    }

    #[test]
    fn says_nothing_of_containers_that_are_not_confined() {
        assert!(is_unconfined(&quadlet("[Container]\nSecurityLabelDisable=true\n")));
        assert!(is_unconfined(&quadlet("[Container]\nPodmanArgs=--security-opt label=disable\n")));
        assert!(!is_unconfined(&quadlet("[Container]\nSecurityLabelDisable=false\n")));
    }
}
