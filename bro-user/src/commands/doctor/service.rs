//! One activated service, end to end: from its files to the port that it listens on.

use super::hints::ManagerOwner;
use super::{
    Check, adoption, confinement, fence, forwarder, health, host, image, listens, ports, seen, selinux,
    versions,
};
use crate::cli::Doctor;
use crate::cli::wake_sleep::Whom;
use crate::commands::wake_sleep;
use crate::installed::{self, Installed, InstalledPort, WrittenUnits, drift};
use crate::paths::unit_directory;
use crate::podman::quadlet::{self, Quadlet};
use crate::port_owner::{self, AddressTrouble};
use crate::service::failed_wake::{self, FailedWake};
use crate::systemd::manager::{SystemdManager, UnitInfo};
use crate::systemd::scope::RuntimeScope;

/// How long `--wake` waits.
const WAKE: std::time::Duration = std::time::Duration::from_secs(90);

/// The check of the service managers.
const MANAGER: &str = "service manager";

/// What makes units of quadlets; it reads those of the user that runs it.
const GENERATOR: &str = "/usr/lib/systemd/system-generators/podman-system-generator";

/// All checks of the service `name`.
///
/// # Errors
/// When nothing of that name is activated.
pub(super) async fn checks(name: &str, options: &Doctor) -> anyhow::Result<Vec<Check>> {
    let scope = RuntimeScope::choose(options.system, options.user);
    let installed = installed::find(name, scope)?;
    let mut checks = vec![files(&installed)];
    if let Some(owner) = installed.run_as.as_ref().filter(|owner| owner.is_gone()) {
        // Any other check would only repeat that.
        checks.push(Check::bad(
            "user",
            format!("there is no user {} any more, whose container it is", owner.name),
            format!("`bro activate {} --remove`", installed.name),
        ));
        return Ok(checks);
    }
    let quadlet = quadlet(&installed, &mut checks);
    let mut bus = None;
    match SystemdManager::connect(installed.scope).await {
        Ok(systemd) => {
            match container_manager(&installed, &systemd).await {
                Ok(container) => {
                    checks.push(unit(&installed, &container).await);
                    bus = Some(container);
                }
                Err(check) => checks.push(check),
            }
            for listener in &installed.listeners {
                checks.push(socket(&installed, listener, &systemd).await);
            }
            checks.extend(agent(&installed, &systemd).await);
            checks.extend(timer(&installed, &systemd).await);
            checks.extend(fence::checks(&installed, &systemd).await);
            if let Some(service) = installed.service() {
                checks.push(forwarder::check(&installed, &service, &systemd).await);
                checks.extend(confinement::check(&installed, &service, &systemd).await);
            }
        }
        Err(error) => checks.push(Check::bad(
            MANAGER,
            format!("it does not answer: {error:#}"),
            "nothing is activated without systemd; see `bro doctor`",
        )),
    }
    if let Some(quadlet) = &quadlet {
        checks.push(image::check(&installed, quadlet, bus.as_ref()).await);
        checks.extend(health::check(&installed, quadlet).await);
        checks.extend(selinux::shared(quadlet, installed.run_as.as_ref()));
    }
    checks.extend(adoption::checks(&installed, quadlet.as_ref()).await);
    checks.extend(ports::check(&installed, quadlet.as_ref()));
    checks.push(versions::check_of(&installed, quadlet.as_ref()).await);
    match &installed.run_as {
        // The first client starts the user's service manager; but it stops when the user logs out.
        Some(owner) => checks.push(host::linger_of(owner)),
        None if scope == RuntimeScope::User => checks.push(host::linger().or_bad()),
        None => {}
    }
    checks.push(host::namespaces());
    if options.wake {
        let whom = Whom { name: installed.name.clone(), user: options.user, system: options.system };
        checks.push(match wake_sleep::wake_up(&whom, WAKE).await {
            Ok(_) => Check::ok("wake", "it can be woken"),
            Err(error) => {
                let manager = ManagerOwner::container(&installed);
                let log = manager.last_words(&installed.unit).await;
                Check::bad(
                    "wake",
                    format!("{error:#}{log}"),
                    format!("see `{}`", manager.journal(&installed.unit)),
                )
            }
        });
    }
    checks.extend(failed_wake::noted(&installed).map(|failed| failed_before(&installed, &failed)));
    for listener in &installed.listeners {
        let container = quadlet.as_ref().and_then(|quadlet| quadlet.container.as_deref().ok());
        checks.push(listens::check(&installed, listener, container, bus.as_ref()).await);
    }
    if let Some(forwarder) = installed.forwarder() {
        checks.push(seen::check(&installed, forwarder).await);
    }
    Ok(checks)
}

/// The container's service manager, or what to say where none answers.
async fn container_manager(installed: &Installed, front: &SystemdManager) -> Result<SystemdManager, Check> {
    let Some(owner) = &installed.run_as else { return Ok(front.clone()) };
    let error = match SystemdManager::connect_as(owner).await {
        Ok(bus) => return Ok(bus),
        Err(error) => error,
    };
    let manager = owner.manager();
    let runs = front.active_state(&manager).await.is_ok_and(|state| state == "active");
    Err(if runs {
        Check::bad(
            MANAGER,
            format!("that of {} does not answer: {error:#}", owner.name),
            format!("`systemctl status {manager}`; see `bro doctor`"),
        )
    } else {
        Check::ok(
            MANAGER,
            format!("that of {}, {manager}, does not run; the first client starts it", owner.name),
        )
    })
}

/// The last wake that failed and was followed by none that succeeded.
fn failed_before(installed: &Installed, failed: &FailedWake) -> Check {
    let log = installed.service().map(|service| ManagerOwner::front(installed).journal(&service));
    Check::bad(
        "last wake",
        format!("{} ago {} could not be woken: {}", failed.since(), failed.target, failed.why),
        format!(
            "if that has been mended, `bro wake {}` tries it and forgets this{}",
            installed.name,
            log.map(|log| format!("; see `{log}`")).unwrap_or_default()
        ),
    )
}

fn again(installed: &Installed) -> String {
    format!("`bro activate {} …` writes it anew", installed.name)
}

/// Are the files that `bro activate` wrote beside the units there?
fn files(installed: &Installed) -> Check {
    const NAME: &str = "files";
    let mut gone: Vec<String> =
        installed.others().filter(|path| !path.exists()).map(|path| path.display().to_string()).collect();
    let timer = installed.timer_file().filter(|timer| installed.kept_awake().is_some() && !timer.exists());
    gone.extend(timer.map(|timer| timer.display().to_string()));
    let units =
        unit_directory(installed.scope).and_then(|units| WrittenUnits::read(&units, installed.scope, None));
    gone.extend(units.iter().flat_map(|units| units.lost(installed)).map(|socket| socket.name));
    if gone.is_empty() {
        let first = installed.listeners.first().map(|listener| listener.socket.file.display().to_string());
        Check::ok(NAME, format!("activated by {}", first.unwrap_or_default()))
    } else {
        Check::bad(NAME, format!("{} is gone", gone.join(", ")), again(installed))
    }
}

fn quadlet(installed: &Installed, checks: &mut Vec<Check>) -> Option<Quadlet> {
    const NAME: &str = "quadlet";
    let found = quadlet::find(&installed.name, installed.scope, installed.run_as.as_ref(), None);
    checks.push(match &found {
        Ok(quadlet) if quadlet.unit != installed.unit => Check::bad(
            NAME,
            format!("{} makes {} now, and not {}", quadlet.path.display(), quadlet.unit, installed.unit),
            again(installed),
        ),
        Ok(quadlet) => match other_container(installed, quadlet) {
            Some(finding) => Check::less(NAME, finding, again(installed)),
            None => Check::ok(NAME, quadlet.path.display().to_string()),
        },
        Err(_) if !installed.quadlet.exists() => Check::bad(
            NAME,
            format!("{} is gone: removed or renamed", installed.quadlet.display()),
            format!(
                "put it back, or `bro activate {} --remove` and activate it under its new name",
                installed.name
            ),
        ),
        Err(error) => Check::bad(NAME, format!("{error:#}"), "mend the quadlet"),
    });
    found.ok()
}

/// Does the quadlet make another container than the forwarder looks for? `--container` may have named one on purpose, and on the
/// host's network the forwarder looks for none.
fn other_container(installed: &Installed, quadlet: &Quadlet) -> Option<String> {
    let forwarder = installed.forwarder()?;
    if forwarder.container_given {
        return None;
    }
    let now = match &quadlet.container {
        _ if quadlet.is_on_host() => None,
        Ok(name) => Some(name.as_str()),
        Err(_) => Some("one whose name is not known"),
    };
    let before = forwarder.container.as_deref();
    (now != before).then(|| {
        format!(
            "its container is {}, and the forwarder looks for {}",
            now.unwrap_or("on the host's network"),
            before.unwrap_or("none")
        )
    })
}

/// The unit that Podman's generator makes of the quadlet.
async fn unit(installed: &Installed, bus: &SystemdManager) -> Check {
    const NAME: &str = "unit";
    let (unit, manager) = (&installed.unit, ManagerOwner::container(installed));
    let systemctl = manager.systemctl();
    let as_whom = match &manager {
        ManagerOwner::Of(owner) => format!(" as {}", owner.name),
        ManagerOwner::System | ManagerOwner::Mine => String::new(),
    };
    match bus.known(unit).await {
        Ok(found) if found.load == "not-found" => Check::bad(
            NAME,
            format!("systemd knows no {unit}: Podman's generator did not make it"),
            match installed.unit_scope() {
                RuntimeScope::System => {
                    format!("`{systemctl} daemon-reload`, then see what `{GENERATOR} --dryrun` says")
                }
                RuntimeScope::User => format!(
                    "`{systemctl} daemon-reload`, then see what `{GENERATOR} --user --dryrun` says{as_whom}"
                ),
            },
        ),
        Ok(found) if found.load != "loaded" => {
            Check::bad(NAME, format!("{unit} is {}", found.load), format!("`{systemctl} status {unit}`"))
        }
        Ok(found) if found.active == "failed" => {
            let log = manager.last_words(unit).await;
            Check::bad(NAME, format!("{unit} has failed{log}"), format!("see `{}`", manager.journal(unit)))
        }
        Ok(found) if found.stops_unneeded => Check::bad(
            NAME,
            format!(
                "{unit} has StopWhenUnneeded=yes: systemd stops it under its clients whenever no other unit needs it"
            ),
            format!(
                "take that out of the quadlet or its drop-in (`{systemctl} cat {unit}` shows it), `{systemctl} daemon-reload`"
            ),
        ),
        Ok(found) if found.needs_reload => {
            Check::less(NAME, format!("{unit} has changed on disk"), format!("`{systemctl} daemon-reload`"))
        }
        Ok(found) => Check::ok(NAME, format!("{unit} is {}", found.active)),
        Err(error) => Check::bad(NAME, format!("{unit}: {error:#}"), format!("see `{systemctl} status`")),
    }
}

async fn socket(installed: &Installed, listener: &InstalledPort, systemd: &SystemdManager) -> Check {
    const NAME: &str = "socket";
    let (unit, address, manager) =
        (&listener.socket.name, &listener.external, ManagerOwner::front(installed));
    let systemctl = manager.systemctl();
    let found = match systemd.known(unit).await {
        Ok(found) => found,
        Err(error) => {
            return Check::bad(NAME, format!("{unit}: {error:#}"), format!("see `{systemctl} status`"));
        }
    };
    match found {
        UnitInfo { load, .. } if load == "not-found" => Check::bad(
            NAME,
            format!("systemd knows no {unit}"),
            format!("`{systemctl} daemon-reload`, then `{systemctl} enable --now {unit}`"),
        ),
        UnitInfo { active, .. } if active != "active" => {
            let owner = match port_owner::look(address) {
                Some(AddressTrouble::Taken(holder)) => {
                    let by = systemd.socket_at(holder.kind, &holder.address).await;
                    return Check::bad(
                        NAME,
                        format!("{unit} is {active}: {address} is taken {}", holder.who(by.as_deref())),
                        format!("stop that, then `{systemctl} restart {unit}`; or activate another port"),
                    );
                }
                Some(AddressTrouble::InTheWay(why)) => {
                    return Check::bad(
                        NAME,
                        format!("{unit} is {active}: {why}"),
                        format!("then `{systemctl} restart {unit}`"),
                    );
                }
                Some(AddressTrouble::Forbidden(why)) => {
                    return Check::bad(
                        NAME,
                        format!("{unit} is {active}, so nothing listens at {address}: {why}"),
                        port_owner::instead(installed, listener),
                    );
                }
                None => String::new(),
            };
            let log = if active == "failed" { manager.last_words(unit).await } else { String::new() };
            Check::bad(
                NAME,
                format!("{unit} is {active}, so nothing listens at {address}{owner}{log}"),
                format!("`{systemctl} reset-failed {unit}`, `{systemctl} enable --now {unit}`"),
            )
        }
        UnitInfo { file, .. } if file != "enabled" => Check::bad(
            NAME,
            format!("{unit} listens at {address}, but not after the next boot: it is {file}"),
            format!("`{systemctl} enable {unit}`"),
        ),
        _ => as_the_file_says(installed, listener, systemd).await,
    }
}

/// Does systemd listen where the OCI runtime hands notifications over?
async fn agent(installed: &Installed, systemd: &SystemdManager) -> Option<Check> {
    const NAME: &str = "socket";
    let unit = &installed.adoption()?.agent.name;
    let systemctl = ManagerOwner::front(installed).systemctl();
    let enable = format!("`{systemctl} enable --now {unit}`");
    Some(match systemd.known(unit).await {
        Err(error) => Check::bad(NAME, format!("{unit}: {error:#}"), format!("see `{systemctl} status`")),
        Ok(found) if found.active != "active" => Check::bad(
            NAME,
            format!(
                "{unit} is {}, so {} cannot be started, and no command can be run in it",
                found.active, installed.unit
            ),
            enable,
        ),
        Ok(found) if found.file != "enabled" => Check::bad(
            NAME,
            format!("{unit} listens, but not after the next boot: it is {}", found.file),
            enable,
        ),
        Ok(_) => Check::ok(NAME, format!("{unit} listens")),
    })
}

/// Is the forwarder started at the times of `--keep-awake`?
async fn timer(installed: &Installed, systemd: &SystemdManager) -> Option<Check> {
    const NAME: &str = "timer";
    let (spans, timer) = (installed.kept_awake()?, installed.timer()?);
    let systemctl = ManagerOwner::front(installed).systemctl();
    Some(match systemd.known(&timer).await {
        Err(error) => Check::bad(NAME, format!("{timer}: {error:#}"), format!("see `{systemctl} status`")),
        Ok(found) if found.active != "active" => Check::bad(
            NAME,
            format!("{timer} is {}, so nothing wakes {} at {spans}", found.active, installed.unit),
            format!("`{systemctl} start {timer}`"),
        ),
        Ok(found) if found.needs_reload => {
            Check::less(NAME, format!("{timer} has changed on disk"), format!("`{systemctl} daemon-reload`"))
        }
        Ok(_) => Check::ok(NAME, format!("{timer} starts the forwarder at {spans}")),
    })
}

/// Does the socket listen where its file says? The file may have changed, or there may be a drop-in.
async fn as_the_file_says(
    installed: &Installed,
    listener: &InstalledPort,
    systemd: &SystemdManager,
) -> Check {
    const NAME: &str = "socket";
    let (unit, address, systemctl) =
        (&listener.socket.name, &listener.external, ManagerOwner::front(installed).systemctl());
    let live = match systemd.live(unit).await {
        Ok(live) => live,
        Err(error) => {
            return Check::bad(NAME, format!("{unit}: {error:#}"), format!("see `{systemctl} status`"));
        }
    };
    let there = live.listen.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    if !drift::listens_there(listener, &live) {
        let finding = format!("{unit} listens at {there}, and not at {address}, as bro activate wrote it");
        let anew = format!("`{}`", listens::anew(installed, listener));
        return if live.has_drop_ins {
            let drop_in =
                format!("`{systemctl} cat {unit}` shows the drop-in that says so; without that, {anew}");
            Check::less(NAME, finding, drop_in)
        } else {
            Check::bad(NAME, finding, format!("{anew} has it listen there again"))
        };
    }
    if systemd.needs_reload(unit).await {
        return Check::less(
            NAME,
            format!("{unit} listens at {address}, and has changed on disk since systemd read it"),
            format!(
                "`{systemctl} daemon-reload` and `{systemctl} restart {unit}` take the change up; `{}` takes it back",
                listens::anew(installed, listener)
            ),
        );
    }
    Check::ok(NAME, format!("{unit} listens at {address}"))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::installed::{Forwarder, Mode, example};
    use crate::podman::quadlet::QuadletKind;
    use crate::systemd::unit_file::UnitFile;

    fn into_container(container: Option<&str>, container_given: bool) -> Installed {
        let forwarder = Forwarder { container_given, ..example::forwarder(container, &[]) };
        Installed { mode: Mode::Forward(forwarder), ..example::forwarded(None, &[]) }
    }

    pub(crate) fn quadlet(kind: QuadletKind, text: &str, container: Result<&str, &str>) -> Quadlet {
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
    fn a_container_is_another_only_where_the_quadlet_has_the_word() {
        let plain = quadlet(QuadletKind::Container, "[Container]\n", Ok("systemd-web"));
        assert_eq!(other_container(&into_container(Some("systemd-web"), false), &plain), None);
        assert!(
            other_container(&into_container(Some("old"), false), &plain).unwrap().contains("looks for old")
        );
        assert_eq!(other_container(&into_container(Some("sidecar"), true), &plain), None);
        let host = quadlet(QuadletKind::Container, "[Container]\nNetwork=host\n", Ok("systemd-web"));
        assert_eq!(other_container(&into_container(None, false), &host), None);
        // It was not on the host's network when it was activated, or is not any more.
        assert!(other_container(&into_container(Some("systemd-web"), false), &host).is_some());
        assert!(other_container(&into_container(None, false), &plain).is_some());
        let kube = quadlet(QuadletKind::Kube, "[Kube]\n", Err("the containers of a .kube"));
        assert_eq!(other_container(&into_container(Some("pod-web"), true), &kube), None);
    }
}
