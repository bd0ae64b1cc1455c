//! Is the container's image (or rootfs) here? A first client should not have to wait for a download.

use std::path::Path;

use bro_relay::read_bounded::{self, Link};

use super::Check;
use super::hints::ManagerOwner;
use super::podman::{self, PodmanAnswer};
use crate::installed::Installed;
use crate::podman::quadlet::Quadlet;
use crate::systemd::manager::SystemdManager;
use crate::systemd::unit_file::UnitFile;

const NAME: &str = "image";

/// How long a quadlet may be.
const LONGEST: u64 = 1 << 20;

/// `bus` is the container's service manager, if it answers.
pub(super) async fn check(installed: &Installed, quadlet: &Quadlet, bus: Option<&SystemdManager>) -> Check {
    if let Some(rootfs) = quadlet.value("Rootfs") {
        // Options follow after a colon.
        let path = rootfs.split(':').next().unwrap_or(rootfs);
        return if Path::new(path).is_dir() {
            Check::ok(NAME, format!("its files are in {path}"))
        } else {
            Check::bad(NAME, format!("there is no directory {path}"), "mend Rootfs= of the quadlet")
        };
    }
    let Some(image) = quadlet.value("Image") else { return Check::ok(NAME, "none of its own") };
    if let Some(unit) = brought_by(image, quadlet) {
        return by_unit(image, &unit, &ManagerOwner::container(installed), bus).await;
    }
    if image.contains('%') {
        return Check::ok(NAME, format!("{image} is what systemd makes of it, so it was not checked"));
    }
    let as_whom = as_whom(installed);
    let answer = podman::ask(installed.run_as.as_ref(), &["image", "exists", image]).await;
    if let Some(trouble) = answer.trouble() {
        return Check::bad(
            NAME,
            format!("whether {image} is here cannot be told: {trouble}"),
            "install podman, or see why it hangs: `podman info`",
        );
    }
    match answer {
        // podman-image-exists(1)
        PodmanAnswer::No(1, _) => Check::bad(NAME, missing(image), format!("`podman pull {image}`{as_whom}")),
        PodmanAnswer::No(_, words) => Check::bad(
            NAME,
            format!("podman cannot say whether {image} is here: {words}"),
            format!("see `podman image exists {image}`{as_whom}"),
        ),
        _ => Check::ok(NAME, format!("{image} is here")),
    }
}

fn missing(image: &str) -> String {
    format!("{image} is not here: the first client waits for its download, or in vain")
}

fn as_whom(installed: &Installed) -> String {
    match ManagerOwner::container(installed) {
        ManagerOwner::Of(owner) => format!(" as {}", owner.name),
        ManagerOwner::System | ManagerOwner::Mine => String::new(),
    }
}

/// `bro activate`'s warning about an image that is not there: nothing is pulled, and Podman may take ten seconds to answer.
pub(crate) async fn warning(installed: &Installed, quadlet: &Quadlet) -> Option<String> {
    let image = quadlet.value("Image")?;
    if image.contains('%') || quadlet.value("Rootfs").is_some() || brought_by(image, quadlet).is_some() {
        return None;
    }
    match podman::ask(installed.run_as.as_ref(), &["image", "exists", image]).await {
        PodmanAnswer::No(1, _) => {
            Some(format!("{}; `podman pull {image}`{} gets it now", missing(image), as_whom(installed)))
        }
        // Without an answer there is nothing to warn of; `bro doctor` names the trouble.
        _ => None,
    }
}

/// A quadlet that brings the image has a unit; without that, Podman's generator makes no unit of the container.
async fn by_unit(image: &str, unit: &str, manager: &ManagerOwner, bus: Option<&SystemdManager>) -> Check {
    let systemctl = manager.systemctl();
    let found = match bus {
        Some(bus) => bus.known(unit).await.ok(),
        None => None,
    };
    match found {
        Some(found) if found.load == "not-found" => Check::bad(
            NAME,
            format!("{image} is to bring it, and systemd knows no {unit}"),
            format!(
                "put {image} where Podman looks for quadlets, or mend it, then `{systemctl} daemon-reload`"
            ),
        ),
        Some(found) if found.active == "failed" => Check::bad(
            NAME,
            format!("{unit}, which is to bring it, has failed{}", manager.last_words(unit).await),
            format!("see `{}`", manager.journal(unit)),
        ),
        _ => Check::ok(NAME, format!("{image} brings it")),
    }
}

/// The unit that Podman's generator makes of `x.image` or `x.build`.
fn brought_by(image: &str, quadlet: &Quadlet) -> Option<String> {
    let (stem, end, section) = [("image", "Image"), ("build", "Build")]
        .into_iter()
        .find_map(|(end, section)| Some((image.strip_suffix(end)?.strip_suffix('.')?, end, section)))?;
    let beside = quadlet.path.parent()?.join(image);
    let file = read_bounded::read(&beside, LONGEST, Link::Follow).ok().map(|text| UnitFile::parse(&text));
    let own = file.as_ref().and_then(|file| file.value(section, "ServiceName"));
    Some(own.map_or_else(|| format!("{stem}-{end}.service"), |own| format!("{own}.service")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::podman::quadlet::QuadletKind;

    #[test]
    fn knows_the_units_that_bring_images() {
        let folder = nix::unistd::mkdtemp(&std::env::temp_dir().join("bro-image-XXXXXX")).unwrap();
        std::fs::write(folder.join("own.build"), "[Build]\nServiceName=builder\n").unwrap();
        let quadlet = Quadlet {
            name: "web".into(),
            kind: QuadletKind::Container,
            path: folder.join("web.container"),
            file: UnitFile::parse(""),
            unit: "web.service".into(),
            container: Ok("systemd-web".into()),
        };
        let unit = |image: &str| brought_by(image, &quadlet);
        assert_eq!(unit("x.image").as_deref(), Some("x-image.service"));
        assert_eq!(unit("x.build").as_deref(), Some("x-build.service"));
        assert_eq!(unit("own.build").as_deref(), Some("builder.service"));
        assert_eq!(unit("docker.io/library/nginx"), None);
        std::fs::remove_dir_all(folder).unwrap();
    }
}
