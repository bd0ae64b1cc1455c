//! What is left of an activated service after the deletion of a file without which it cannot be read back: its service unit, or its
//! only socket unit. The rest still listens, is enabled, and can be cleared away.

use std::path::{Path, PathBuf};

use bro_relay::read_bounded::{self, Link};

use super::{
    Installed, InstalledPort, LONGEST, SECTION, activation_name, assemble, is_unit_name, listener, ours_in,
    unit_name,
};
use crate::paths::config_home;
use crate::systemd::scope::RuntimeScope;
use crate::systemd::unit_file::{MARKER, UnitFile};

/// Such a service.
#[derive(Debug)]
pub(crate) struct Remnant {
    /// As far as it can be told, with the units that are gone among the others: systemd may still have them.
    pub activated: Installed,
    /// The units without their files.
    pub missing: Vec<String>,
}

/// The service that goes by `name`, if it is there and not whole.
pub(crate) fn find(
    name: &str,
    directory: &Path,
    scope: RuntimeScope,
    root: Option<&Path>,
) -> Option<Remnant> {
    let ours = ours_in(directory).ok()?;
    let named = |file: &UnitFile| activation_name(file).map(str::to_owned);
    let (_, own) =
        ours.iter().filter_map(|(path, file)| Some((path, named(file)?))).find(|(path, own)| {
            let quadlet = made_for(path).unwrap_or_default();
            own == name
                || quadlet == name
                || unit_name(path) == name
                || name.strip_suffix(".service") == Some(own)
        })?;
    let files = || ours.iter().filter(|(_, file)| named(file).as_deref() == Some(&own));
    let is_socket = |path: &Path| path.extension().is_some_and(|kind| kind == "socket");
    let main = files().find(|(_, file)| file.value(SECTION, "Unit").is_some());
    if main.is_some_and(|(path, file)| assemble(path, file, &ours, scope, root).is_some()) {
        return None;
    }
    let mut listeners: Vec<InstalledPort> =
        files().filter(|(path, _)| is_socket(path)).filter_map(|(path, file)| listener(path, file)).collect();
    let direct = main.is_none() && listeners.iter().any(|listener| listener.target.is_none());
    let unit = main.and_then(|(_, file)| super::unit(file)).map(str::to_owned);
    let unit = unit.unwrap_or_else(|| {
        let wakes = files()
            .find_map(|(_, file)| file.value("Socket", "Service"))
            .filter(|unit| direct && is_unit_name(unit));
        wakes.map_or_else(|| format!("{own}.service"), str::to_owned)
    });
    let mut missing = Vec::new();
    if !listeners.iter().any(|listener| listener.service == own) {
        let first = gone(&first_socket(&own, &unit, direct), directory);
        missing.push(first.socket.clone());
        listeners.insert(0, first);
    }
    let service = format!("{own}-activator.service");
    if !direct && main.is_none() {
        missing.push(service.clone());
    }
    let listed = |key| main.map(|(_, file)| super::paths(file, key, root));
    let (drop_in, pause_unit) = super::others(listed("Also").unwrap_or_else(|| {
        // The pause unit, and drop-ins.
        let units = files().map(|(path, _)| path).filter(|path| !is_socket(path)).cloned();
        units.chain(drop_ins(&own, scope, root)).collect()
    }));
    let quadlet = main.and_then(|(_, file)| super::quadlet(file));
    Some(Remnant {
        activated: Installed {
            scope,
            run_as: main.and_then(|(_, file)| super::run_as(file, root)),
            quadlet: quadlet.unwrap_or_else(|| format!("{own}.container").into()),
            unit,
            container: None,
            direct,
            socket_file: listeners.first()?.file.clone(),
            service_file: (!direct).then(|| directory.join(&service)),
            listeners,
            options: Vec::new(),
            container_given: false,
            drop_in,
            pause_unit,
            made: listed("Made").unwrap_or_default(),
            name: own,
        },
        missing,
    })
}

/// The sockets that the other files of a service still name, without files of their own.
pub(crate) fn lost(known: &Installed, directory: &Path) -> Vec<InstalledPort> {
    let mut named = vec![first_socket(&known.name, &known.unit, known.direct)];
    let service = known.service_file.as_deref().and_then(super::read_ours);
    named.extend(service.map(|file| super::sockets(&file, "Service", "Sockets")).unwrap_or_default());
    let drop_in = known.drop_in.as_deref().and_then(super::read_ours);
    named.extend(drop_in.map(|file| super::sockets(&file, "Unit", "Requires")).unwrap_or_default());
    named.sort();
    named.dedup();
    named.retain(|socket| !known.listeners.iter().any(|listener| listener.socket == *socket));
    named.iter().map(|socket| gone(socket, directory)).collect()
}

/// The first port's socket unit.
fn first_socket(name: &str, unit: &str, direct: bool) -> String {
    let stem = unit.strip_suffix(".service").unwrap_or(unit);
    if direct { format!("{stem}.socket") } else { format!("{name}-activator.socket") }
}

/// A port of which only the unit's name is known.
fn gone(socket: &str, directory: &Path) -> InstalledPort {
    InstalledPort {
        service: String::new(),
        file: directory.join(socket),
        socket: socket.to_owned(),
        address: String::new(),
        target: None,
        backlog: None,
        device: None,
    }
}

/// The quadlet that one of bro's files says it is for.
fn made_for(path: &Path) -> Option<String> {
    let text = read_bounded::read(path, LONGEST, Link::Follow).ok()?;
    let (quadlet, _) = text.strip_prefix(MARKER)?.strip_prefix(" for ")?.split_once(',')?;
    Some(quadlet.to_owned())
}

/// The places of bro's drop-ins for `name`: each drop-in says how to undo it.
fn drop_ins(name: &str, scope: RuntimeScope, root: Option<&Path>) -> Vec<PathBuf> {
    let inside = |directory: &Path| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect()
    };
    let quadlets = match scope {
        RuntimeScope::System => PathBuf::from("/etc/containers/systemd"),
        RuntimeScope::User => config_home().unwrap_or_default().join("containers/systemd"),
    };
    let quadlets = crate::paths::below(root, &quadlets);
    let mut places = vec![quadlets.clone()];
    places.extend(inside(&quadlets.join("users")));
    let undo = format!("# To undo everything: bro activate {name} --remove");
    let is_ours = |path: &PathBuf| {
        let file = unit_name(path);
        file.starts_with("50-bro-activator")
            && read_bounded::read(path, LONGEST, Link::Follow).is_ok_and(|text| {
                text.starts_with(MARKER) && text.lines().nth(1).is_some_and(|line| line == undo)
            })
    };
    let folders = places.iter().flat_map(|place| inside(place));
    let folders = folders.filter(|path| path.extension().is_some_and(|end| end == "d"));
    folders.flat_map(|folder| inside(&folder)).filter(is_ours).collect()
}
