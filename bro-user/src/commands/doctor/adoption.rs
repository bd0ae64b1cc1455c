//! A service whose sockets are adopted: its profile, the runtime, and how it ends.

use bro_relay::read_bounded::{self, Link};

use super::podman::{self, PodmanAnswer};
use super::{Check, listens, oci_runtime::OciRuntime};
use crate::commands::activate::adopt;
use crate::installed::{Adoption, Installed};
use crate::podman::quadlet::Quadlet;
use crate::units;

const PROFILE: &str = "seccomp profile";

/// The longest profile that is read.
const LONGEST: u64 = 1 << 20;

/// Services that let their connections finish at another signal than SIGTERM, by a part of the image's name, with that signal. Their own
/// images say so.
const GRACEFUL: [(&str, &str); 4] =
    [("apache", "SIGWINCH"), ("haproxy", "SIGUSR1"), ("httpd", "SIGWINCH"), ("nginx", "SIGQUIT")];

pub(super) async fn checks(installed: &Installed, quadlet: Option<&Quadlet>) -> Vec<Check> {
    let Some(adoption) = installed.adoption() else { return Vec::new() };
    let mut checks = vec![profile(installed, adoption, quadlet), runtime(installed).await];
    if let Some(quadlet) = quadlet {
        checks.extend(graceful(installed, quadlet).await);
    }
    checks
}

fn again(installed: &Installed) -> String {
    format!("`{} {}` makes it anew", listens::activate(installed), installed.name)
}

/// Is it what its source makes today? A missing one is among the files that are gone.
fn profile(installed: &Installed, adoption: &Adoption, quadlet: Option<&Quadlet>) -> Check {
    let path = adoption.profile.display();
    let there = match read_bounded::read(&adoption.profile, LONGEST, Link::Follow) {
        Ok(text) => text,
        Err(error) => {
            let finding =
                format!("{path} cannot be read, and without it the container does not start: {error}");
            return Check::bad(PROFILE, finding, again(installed));
        }
    };
    let Some(made) = units::MadeProfile::read(&there) else {
        return Check::bad(
            PROFILE,
            format!("{path} is not as bro wrote it, and the service may not be adopted"),
            again(installed),
        );
    };
    if let Some(now) = quadlet.and_then(|quadlet| adopt::said_source(quadlet, installed.run_as.as_ref()))
        && now != adoption.source
    {
        let finding = format!(
            "the container's profile is {} now, and {path} is made of {}",
            now.display(),
            adoption.source.display()
        );
        return Check::bad(PROFILE, finding, again(installed));
    }
    let source = adoption.source.display();
    match adopt::profile(installed, adoption, made.listener_path.as_ref(), made.wait_killable, None) {
        Ok(file) if file.text == there => Check::ok(PROFILE, format!("{path}, of {source}")),
        Ok(_) => Check::less(
            PROFILE,
            format!("{path} is not what {source} makes now: one of the two has changed"),
            again(installed),
        ),
        Err(error) => Check::less(
            PROFILE,
            format!("whether {path} is up to date cannot be told: {error:#}"),
            "mend that",
        ),
    }
}

async fn runtime(installed: &Installed) -> Check {
    const NAME: &str = "OCI runtime";
    match OciRuntime::find(installed.run_as.as_ref()).await {
        None => Check::less(
            NAME,
            "Podman does not say which it is, and adoption needs crun or runc",
            "see `podman info`",
        ),
        Some(runtime) => match runtime.refusal() {
            Some(refusal) => Check::bad(NAME, refusal, "use another, or `--adopt=off`"),
            None => Check::ok(NAME, runtime.to_string()),
        },
    }
}

/// Does a restart let its clients finish?
async fn graceful(installed: &Installed, quadlet: &Quadlet) -> Option<Check> {
    const NAME: &str = "stop signal";
    let names = quadlet.programs();
    let (program, signal) =
        GRACEFUL.into_iter().find(|(part, _)| names.iter().any(|name| name.contains(part)))?;
    if let Some(own) = quadlet.value("StopSignal") {
        return Some(Check::ok(NAME, own));
    }
    // The image may have a better one than SIGTERM itself.
    let image = quadlet.value("Image").unwrap_or_default();
    let format = ["image", "inspect", "--format", "{{.Config.StopSignal}}", image];
    if let PodmanAnswer::Yes(own) = podman::ask(installed.run_as.as_ref(), &format).await
        && !["", "<no value>", "SIGTERM", "15"].contains(&own.as_str())
    {
        return Some(Check::ok(NAME, format!("{own}, of the image")));
    }
    Some(Check::less(
        NAME,
        format!(
            "at SIGTERM {program} cuts the connections that it has accepted; at {signal} it lets them finish"
        ),
        format!("write StopSignal={signal} into {}", quadlet.file_name()),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: &str = r#"{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["bind", "listen"], "action": "SCMP_ACT_ALLOW"}]}"#;

    #[test]
    fn a_profile_that_is_older_than_its_source_is_told() {
        use super::super::Finding;
        use crate::installed::{Mode, example};
        let folder = nix::unistd::mkdtemp(&std::env::temp_dir().join("bro-profile-XXXXXX")).unwrap();
        let source = folder.join("seccomp.json");
        std::fs::write(&source, SOURCE).unwrap();
        let mut web = example::forwarded(Some("systemd-web"), &[]);
        let forwarder = example::forwarder(Some("systemd-web"), &[]);
        let adoption = Adoption::new("web", forwarder, source.clone(), &folder);
        web.mode = Mode::Adopt(adoption.clone());
        let found = || profile(&web, &adoption, None).outcome;
        assert_eq!(found(), Finding::Bad, "there is none");
        let made = adopt::profile(&web, &adoption, "/run/user/7/a".as_ref(), true, None).unwrap();
        std::fs::write(&adoption.profile, &made.text).unwrap();
        assert_eq!(found(), Finding::Ok);
        std::fs::write(&source, SOURCE.replace("\"bind\"", "\"bind\", \"brk\"")).unwrap();
        assert_eq!(found(), Finding::Less, "the source is newer");
        std::fs::write(&adoption.profile, SOURCE).unwrap();
        assert_eq!(found(), Finding::Bad, "it is another's");
        std::fs::remove_dir_all(folder).unwrap();
    }
}
