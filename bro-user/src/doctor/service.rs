//! One activated service, end to end: from its files to the port that it listens on.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use super::features::{self, FEATURES, Guard, Versions, says};
use super::{Check, host, selinux};
use crate::activate::bus::{Bus, Known, Manager};
use crate::activate::container;
use crate::activated::{self, Activated, Listener, remnant};
use crate::activation::taken::{self, Trouble};
use crate::cli::Doctor;
use crate::cli::control::Whom;
use crate::hand;
use crate::netns::diag::Table;
use crate::netns::{Namespace, Where};
use crate::owner::Owner;
use crate::quadlet::{self, Quadlet};
use crate::target::Target;

/// How long `--wake` waits.
const WAKE: std::time::Duration = std::time::Duration::from_secs(90);

/// All checks of the service `name`.
///
/// # Errors
/// When nothing of that name is activated.
pub(super) async fn checks(name: &str, options: &Doctor) -> anyhow::Result<Vec<Check>> {
    let scope = Manager::choose(options.system, options.user);
    let known = activated::find(name, scope)?;
    let mut checks = vec![files(&known)];
    let quadlet = quadlet(&known, &mut checks);
    let managers = async {
        let front = Bus::connect(known.scope).await?;
        let container = match &known.run_as {
            Some(owner) => Bus::connect_as(owner).await?,
            None => front.clone(),
        };
        anyhow::Ok((front, container))
    };
    match managers.await {
        Ok((bus, container)) => {
            checks.push(unit(&known, &container).await);
            for listener in &known.listeners {
                checks.push(socket(&known, listener, &bus).await);
            }
            if let Some(service) = known.service() {
                checks.push(forwarder(&service, known.scope, &bus).await);
            }
        }
        Err(error) => checks.push(Check::bad(
            "service manager",
            format!("it does not answer: {error:#}"),
            match &known.run_as {
                Some(owner) => format!("`systemctl status {}`; see `bro doctor`", owner.manager()),
                None => "nothing is activated without systemd; see `bro doctor`".to_owned(),
            },
        )),
    }
    if let Some(quadlet) = &quadlet {
        checks.push(image(quadlet, known.run_as.as_ref()).await);
        checks.extend(selinux::shared(quadlet, known.run_as.as_ref()));
    }
    checks.push(versions(&known).await);
    match &known.run_as {
        // Its service manager is started by the first client; but the user's logging out stops it.
        Some(owner) => checks.push(host::linger_of(owner)),
        None if scope == Manager::User => checks.push(host::linger().or_bad()),
        None => {}
    }
    checks.push(host::namespaces());
    if options.wake {
        let whom = Whom { name: known.name.clone(), user: options.user, system: options.system };
        checks.push(match hand::wake_up(&whom, WAKE).await {
            Ok(_) => Check::ok("wake", "it can be woken"),
            Err(error) => {
                let log = last_words(&known.unit, known.unit_scope()).await;
                Check::bad(
                    "wake",
                    format!("{error:#}{log}"),
                    format!("see `{}`", journal(&known.unit, known.unit_scope())),
                )
            }
        });
    }
    for listener in &known.listeners {
        checks.push(listens(&known, listener).await);
    }
    Ok(checks)
}

fn again(known: &Activated) -> String {
    format!("`bro activate {} …` writes it anew", known.name)
}

/// What `bro activate` wrote beside the units is still there.
fn files(known: &Activated) -> Check {
    const NAME: &str = "files";
    let mut gone: Vec<String> =
        known.others().filter(|path| !path.exists()).map(|path| path.display().to_string()).collect();
    let directory = known.socket_file.parent().unwrap_or(Path::new("/"));
    gone.extend(remnant::lost(known, directory).into_iter().map(|listener| listener.socket));
    if gone.is_empty() {
        Check::ok(NAME, format!("activated by {}", known.socket_file.display()))
    } else {
        Check::bad(NAME, format!("{} is gone", gone.join(", ")), again(known))
    }
}

fn quadlet(known: &Activated, checks: &mut Vec<Check>) -> Option<Quadlet> {
    const NAME: &str = "quadlet";
    let found = quadlet::find(&known.name, known.scope, known.run_as.as_ref(), None);
    checks.push(match &found {
        Ok(quadlet) if quadlet.unit != known.unit => Check::bad(
            NAME,
            format!("{} makes {} now, and not {}", quadlet.path.display(), quadlet.unit, known.unit),
            again(known),
        ),
        Ok(quadlet) => match other_container(known, quadlet) {
            Some(finding) => Check::less(NAME, finding, again(known)),
            None => Check::ok(NAME, quadlet.path.display().to_string()),
        },
        Err(_) if !known.quadlet.exists() => Check::bad(
            NAME,
            format!("{} is gone: removed or renamed", known.quadlet.display()),
            format!(
                "put it back, or `bro activate {} --remove` and activate it under its new name",
                known.name
            ),
        ),
        Err(error) => Check::bad(NAME, format!("{error:#}"), "mend the quadlet"),
    });
    found.ok()
}

/// Does the quadlet make another container than the forwarder looks for? It knows better where --container has named one, and
/// on the host's network there is none to look for.
fn other_container(known: &Activated, quadlet: &Quadlet) -> Option<String> {
    if known.direct || known.container_given {
        return None;
    }
    let now = match &quadlet.container {
        _ if quadlet.is_on_host() => None,
        Ok(name) => Some(name.as_str()),
        Err(_) => Some("one whose name is not known"),
    };
    let before = known.container.as_deref();
    (now != before).then(|| {
        format!(
            "its container is {}, and the forwarder looks for {}",
            now.unwrap_or("on the host's network"),
            before.unwrap_or("none")
        )
    })
}

/// The unit that Podman's generator makes of the quadlet.
async fn unit(known: &Activated, bus: &Bus) -> Check {
    const NAME: &str = "unit";
    let (unit, scope) = (&known.unit, known.unit_scope());
    match bus.known(unit).await {
        Ok(found) if found.load == "not-found" => Check::bad(
            NAME,
            format!("systemd knows no {unit}: Podman's generator did not make it"),
            format!(
                "`{} daemon-reload`, then see what `/usr/lib/systemd/system-generators/podman-system-generator{} --dryrun` says",
                systemctl(scope),
                if scope == Manager::User { " --user" } else { "" }
            ),
        ),
        Ok(found) if found.load != "loaded" => Check::bad(
            NAME,
            format!("{unit} is {}", found.load),
            format!("`{} status {unit}`", systemctl(scope)),
        ),
        Ok(found) if found.active == "failed" => {
            let log = last_words(unit, scope).await;
            Check::bad(NAME, format!("{unit} has failed{log}"), format!("see `{}`", journal(unit, scope)))
        }
        Ok(found) if found.needs_reload => Check::less(
            NAME,
            format!("{unit} has changed on disk"),
            format!("`{} daemon-reload`", systemctl(scope)),
        ),
        Ok(found) => Check::ok(NAME, format!("{unit} is {}", found.active)),
        Err(error) => Check::bad(NAME, format!("{unit}: {error:#}"), "see `systemctl status`"),
    }
}

async fn socket(known: &Activated, listener: &Listener, bus: &Bus) -> Check {
    const NAME: &str = "socket";
    let (unit, address, scope) = (&listener.socket, &listener.address, known.scope);
    let found = match bus.known(unit).await {
        Ok(found) => found,
        Err(error) => return Check::bad(NAME, format!("{unit}: {error:#}"), "see `systemctl status`"),
    };
    match found {
        Known { load, .. } if load == "not-found" => Check::bad(
            NAME,
            format!("systemd knows no {unit}"),
            format!("`{0} daemon-reload`, then `{0} enable --now {unit}`", systemctl(scope)),
        ),
        Known { active, .. } if active != "active" => {
            let owner = match address.parse().ok().and_then(|external| taken::look(&external)) {
                Some(Trouble::Taken(owner)) => {
                    let owner = owner.process.unwrap_or_else(|| "a process of another user".to_owned());
                    return Check::bad(
                        NAME,
                        format!("{unit} is {active}: {address} is taken by {owner}"),
                        format!(
                            "stop that, then `{} restart {unit}`; or activate another port",
                            systemctl(scope)
                        ),
                    );
                }
                Some(Trouble::InTheWay(why)) => {
                    return Check::bad(
                        NAME,
                        format!("{unit} is {active}: {why}"),
                        format!("then `{} restart {unit}`", systemctl(scope)),
                    );
                }
                Some(Trouble::Forbidden(why)) => format!(": {why}"),
                None => String::new(),
            };
            let log = if active == "failed" { last_words(unit, scope).await } else { String::new() };
            Check::bad(
                NAME,
                format!("{unit} is {active}, so nobody listens at {address}{owner}{log}"),
                format!("`{0} reset-failed {unit}`, `{0} enable --now {unit}`", systemctl(scope)),
            )
        }
        Known { file, .. } if file != "enabled" => Check::bad(
            NAME,
            format!("{unit} listens at {address}, but not after the next boot: it is {file}"),
            format!("`{} enable {unit}`", systemctl(scope)),
        ),
        _ => Check::ok(NAME, format!("{unit} listens at {address}")),
    }
}

async fn forwarder(service: &str, scope: Manager, bus: &Bus) -> Check {
    const NAME: &str = "forwarder";
    match bus.known(service).await {
        Ok(found) if found.load != "loaded" => Check::bad(
            NAME,
            format!("{service} is {}", found.load),
            format!("`{} daemon-reload`", systemctl(scope)),
        ),
        Ok(found) if found.active == "failed" => {
            let log = last_words(service, scope).await;
            Check::bad(
                NAME,
                format!("{service} has failed{log}"),
                format!("see `{}`", journal(service, scope)),
            )
        }
        Ok(found) => Check::ok(NAME, format!("{service} is {}", found.active)),
        Err(error) => Check::bad(NAME, format!("{service}: {error:#}"), "see `systemctl status`"),
    }
}

/// A first client should not have to wait for a download.
async fn image(quadlet: &Quadlet, owner: Option<&Owner>) -> Check {
    const NAME: &str = "image";
    if let Some(rootfs) = quadlet.value("Rootfs") {
        // Options follow after a colon.
        let path = rootfs.split(':').next().unwrap_or(rootfs);
        return if Path::new(path).is_dir() {
            Check::ok(NAME, format!("its files are in {path}"))
        } else {
            Check::bad(NAME, format!("there is no directory {path}"), "mend Rootfs= of the quadlet")
        };
    }
    match quadlet.value("Image") {
        Some(image) if image.ends_with(".image") || image.ends_with(".build") => {
            Check::ok(NAME, format!("{image} brings it"))
        }
        Some(image) => match podman(owner, &["image", "exists", image]).await {
            Some(_) => Check::ok(NAME, format!("{image} is here")),
            None => Check::bad(
                NAME,
                format!("{image} is not here: the first client waits for its download, or in vain"),
                format!("`podman pull {image}`"),
            ),
        },
        None => Check::ok(NAME, "none of its own"),
    }
}

/// Asks the Podman of whoever owns the container.
async fn podman(owner: Option<&Owner>, args: &[&str]) -> Option<String> {
    let Some(owner) = owner.filter(|owner| !owner.is_me()) else { return says("podman", args).await };
    let (reuid, regid) = (format!("--reuid={}", owner.uid), format!("--regid={}", owner.gid));
    let home = format!("HOME={}", owner.home.display());
    let runtime = format!("XDG_RUNTIME_DIR={}", owner.runtime_directory().display());
    let user = [&*reuid, &*regid, "--init-groups", "env", "--chdir=/", &*home, &*runtime, "podman"];
    says("setpriv", &[&user, args].concat()).await
}

async fn versions(known: &Activated) -> Check {
    const NAME: &str = "versions";
    let versions = Versions::of_this_host().await;
    let needed = FEATURES.iter().filter(|feature| {
        (feature.name.contains("drop-ins") && known.drop_in.is_some())
            || (feature.name.contains("--direct") && known.direct)
            || (matches!(feature.guard, Some(Guard::ContainerSelinux(..))) && known.direct)
            || (matches!(feature.guard, Some(Guard::AppArmor(..))) && known.unit_scope() == Manager::User)
            || (feature.name.contains("NAME@") && known.name.contains('@'))
            || (feature.name.contains(".pod") && known.quadlet.extension().is_some_and(|kind| kind == "pod"))
            || feature.name.contains("activate")
            || (feature.name == "forwarding" && !known.direct)
    });
    let lacking: Vec<String> = needed
        .filter_map(|feature| Some(format!("{} needs {}", feature.name, versions.lacks(feature)?)))
        .collect();
    if lacking.is_empty() {
        Check::ok(NAME, "new enough")
    } else {
        Check::bad(NAME, lacking.join("; "), "use newer versions")
    }
}

/// Does the service listen where clients are connected to?
async fn listens(known: &Activated, listener: &Listener) -> Check {
    const NAME: &str = "listens";
    let Some(target) = &listener.target else {
        return Check::ok(NAME, format!("the container takes {} over itself", listener.address));
    };
    let Some(container) = &known.container else {
        return Check::ok(NAME, format!("{target} is in no container of its own, so nobody looked"));
    };
    let Ok(Target::Tcp { host, port }) = target.parse::<Target>() else {
        return Check::ok(NAME, format!("{target} is a unix socket, so nobody looked"));
    };
    let running = match &known.run_as {
        Some(owner) => container::running_of(owner, container),
        None => container::running(container),
    };
    let Some(pid) = running else {
        return Check::ok(
            NAME,
            format!("{container} is asleep, so nobody knows about {target} (--wake looks)"),
        );
    };
    let table = match table(pid).await {
        Ok(table) => table,
        Err(error) => {
            return Check::bad(NAME, format!("cannot look into {container}: {error:#}"), "see `bro doctor`");
        }
    };
    let ip = if host == "localhost" { Ok(std::net::Ipv4Addr::LOCALHOST.into()) } else { host.parse() };
    let Ok(ip) = ip else {
        return Check::ok(NAME, format!("{target} has a name, so nobody looked"));
    };
    let wanted = SocketAddr::new(ip, port);
    match table.listeners() {
        Ok(found) if found.iter().any(|listening| listening.serves(wanted)) => {
            Check::ok(NAME, format!("{container} listens at {target}"))
        }
        Ok(found) => {
            let mut others: Vec<String> =
                found.iter().map(|listening| listening.address.to_string()).collect();
            others.sort();
            others.dedup();
            let (there, fix) = match found.first() {
                None => ("nothing listens there at all".to_owned(), "see the service's own log".to_owned()),
                Some(first) => (
                    format!("it listens at {}", others.join(", ")),
                    format!("`{}`, or change the service", lead_to(known, listener, first.address.port())),
                ),
            };
            Check::bad(NAME, format!("nobody listens at {target} in {container}; {there}"), fix)
        }
        Err(error) => Check::bad(NAME, format!("cannot look into {container}: {error}"), "see `bro doctor`"),
    }
}

/// The command line that leads this port's clients to another port of the service.
fn lead_to(known: &Activated, listener: &Listener, port: u16) -> String {
    let name = &known.name;
    let service = match &listener.service {
        // The first port is meant where none is named.
        service if service == name => String::new(),
        service => format!(" --service-name {service}"),
    };
    format!("bro activate {name}{service} --external-port {} --internal-port {port}", listener.address)
}

async fn table(pid: i32) -> anyhow::Result<Table> {
    let netns = OwnedFd::from(std::fs::File::open(format!("/proc/{pid}/ns/net"))?);
    let place = Where::Entered(Arc::new(Namespace::enter(netns, None).await?));
    Ok(Table::open(&place).await?)
}

const fn systemctl(scope: Manager) -> &'static str {
    match scope {
        Manager::System => "systemctl",
        Manager::User => "systemctl --user",
    }
}

fn journal(unit: &str, scope: Manager) -> String {
    let user = if scope == Manager::User { "--user " } else { "" };
    format!("journalctl {user}--unit {unit}")
}

/// The last lines of a unit's log, to stand behind a finding.
async fn last_words(unit: &str, scope: Manager) -> String {
    let mut args = vec!["--unit", unit, "--lines=3", "--output=cat", "--no-pager", "--quiet"];
    if scope == Manager::User {
        args.push("--user");
    }
    match features::says("journalctl", &args).await {
        Some(log) if !log.is_empty() => format!(", saying “{}”", log.lines().collect::<Vec<_>>().join(" / ")),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quadlet::Kind;
    use crate::unit_file::UnitFile;

    fn known(container: Option<&str>, container_given: bool) -> Activated {
        Activated {
            name: "web".into(),
            scope: Manager::User,
            run_as: None,
            quadlet: "/quadlets/web.container".into(),
            unit: "web.service".into(),
            container: container.map(str::to_owned),
            direct: false,
            socket_file: "/units/web-activator.socket".into(),
            service_file: Some("/units/web-activator.service".into()),
            listeners: Vec::new(),
            options: Vec::new(),
            container_given,
            drop_in: None,
            pause_unit: None,
            made: Vec::new(),
        }
    }

    fn quadlet(kind: Kind, text: &str, container: Result<&str, &str>) -> Quadlet {
        Quadlet {
            name: "web".into(),
            kind,
            path: "/quadlets/web.container".into(),
            file: UnitFile::parse(text),
            unit: "web.service".into(),
            container: container.map(str::to_owned).map_err(str::to_owned),
        }
    }

    #[test]
    fn the_way_to_mend_a_port_is_that_ports() {
        let mut listener = Listener {
            service: "web".into(),
            socket: "web-activator.socket".into(),
            file: "/units/web-activator.socket".into(),
            address: "8080".into(),
            target: Some("127.0.0.1:80".into()),
            backlog: None,
            device: None,
        };
        let known = known(None, false);
        assert_eq!(
            lead_to(&known, &listener, 81),
            "bro activate web --external-port 8080 --internal-port 81"
        );
        listener.service = "metrics".into();
        assert_eq!(
            lead_to(&known, &listener, 81),
            "bro activate web --service-name metrics --external-port 8080 --internal-port 81"
        );
    }

    #[test]
    fn a_container_is_another_only_where_the_quadlet_has_the_word() {
        let plain = quadlet(Kind::Container, "[Container]\n", Ok("systemd-web"));
        assert_eq!(other_container(&known(Some("systemd-web"), false), &plain), None);
        assert!(other_container(&known(Some("old"), false), &plain).unwrap().contains("looks for old"));
        assert_eq!(other_container(&known(Some("sidecar"), true), &plain), None);
        let host = quadlet(Kind::Container, "[Container]\nNetwork=host\n", Ok("systemd-web"));
        assert_eq!(other_container(&known(None, false), &host), None);
        // It was not on the host's network when it was activated, or is there no more.
        assert!(other_container(&known(Some("systemd-web"), false), &host).is_some());
        assert!(other_container(&known(None, false), &plain).is_some());
        let kube = quadlet(Kind::Kube, "[Kube]\n", Err("the containers of a .kube"));
        assert_eq!(other_container(&known(Some("pod-web"), true), &kube), None);
    }
}
