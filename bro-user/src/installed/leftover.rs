//! What is left of an activated service after the deletion of a file without which it cannot be read back: its service unit, or its
//! only socket unit. The rest still listens, is enabled, and can be cleared away.

use std::path::{Path, PathBuf};

use bro_relay::read_bounded::{self, Link};

use super::{
    Adoption, ForwardOptions, Forwarder, Installed, InstalledPort, LONGEST, Mode, SECTION, SocketUnit,
    Takeover, Way, WrittenUnits, activation_name, agent_of, is_socket, is_unit_name, listener, pause_unit_of,
    read_ours, unit_name,
};
use crate::paths::config_home;
use crate::systemd::scope::RuntimeScope;
use crate::systemd::unit_file::{MARKER, UnitFile};

/// Such a service.
#[derive(Debug)]
pub(crate) struct Remnant {
    /// As far as it can be told.
    pub installed: Installed,
    /// Its socket units that have lost their files; systemd may still have them.
    pub lost: Vec<SocketUnit>,
    /// All units without their files.
    pub missing: Vec<String>,
}

impl Remnant {
    /// Is nothing left but the first port's socket, or what is no socket?
    pub(crate) fn is_only_its_first_socket(&self) -> bool {
        let name = &self.installed.name;
        self.lost.is_empty() && self.installed.listeners.iter().all(|listener| listener.service == *name)
    }
}

impl WrittenUnits {
    /// The service that goes by `name`, if some of it is there and it is not whole.
    pub(crate) fn leftover(&self, name: &str) -> Option<Remnant> {
        let named = |file: &UnitFile| activation_name(file).map(str::to_owned);
        let (_, own) =
            self.files.iter().filter_map(|(path, file)| Some((path, named(file)?))).find(|(path, own)| {
                let quadlet = made_for(path).unwrap_or_default();
                own == name
                    || quadlet == name
                    || unit_name(path) == name
                    || name.strip_suffix(".service") == Some(own)
            })?;
        let files = || self.files.iter().filter(|(_, file)| named(file).as_deref() == Some(&own));
        let main = files().find(|(_, file)| file.value(SECTION, "Unit").is_some());
        if main.is_some_and(|(path, file)| self.assemble(path, file).is_some()) {
            return None;
        }
        let root = self.root.as_deref();
        let listeners: Vec<InstalledPort> = files()
            .filter(|(path, _)| is_socket(path))
            .filter_map(|(path, file)| listener(path, file))
            .collect();
        let listed = |key| main.map(|(_, file)| super::paths(file, key, root));
        let (drop_in, pause_unit) = super::others(listed("Also").unwrap_or_else(|| {
            // The pause unit, and drop-ins.
            let units = files().map(|(path, _)| path).filter(|path| !is_socket(path)).cloned();
            units.chain(drop_ins(&own, self.scope, root)).collect()
        }));
        // Only a container that takes its sockets over has a unit that makes its namespaces.
        let has_pause = pause_unit.as_ref().is_some_and(|path| unit_name(path) == pause_unit_of(&own));
        let direct = match main {
            Some((path, _)) => is_socket(path),
            None => has_pause || listeners.iter().any(|listener| listener.internal.is_none()),
        };
        let unit = main.and_then(|(_, file)| super::unit(file)).map(str::to_owned);
        let unit = unit.unwrap_or_else(|| {
            let wakes = files()
                .find_map(|(_, file)| file.value("Socket", "Service"))
                .filter(|unit| direct && is_unit_name(unit));
            wakes.map_or_else(|| format!("{own}.service"), str::to_owned)
        });
        let (mut lost, mut missing) = (Vec::new(), Vec::new());
        if !listeners.iter().any(|listener| listener.service == own) {
            let first = SocketUnit::new(first_socket(&own, &unit, direct), &self.directory);
            missing.push(first.name.clone());
            lost.push(first);
        }
        let service = format!("{own}-activator.service");
        if !direct && main.is_none() {
            missing.push(service.clone());
        }
        let mode = if direct {
            Mode::Direct(Takeover { way: Way::ListenFds, pause_unit })
        } else {
            let forwarder = Forwarder {
                service_file: self.directory.join(&service),
                program: PathBuf::new(),
                container: None,
                container_given: false,
                options: ForwardOptions::default(),
            };
            let source = main.and_then(|(_, file)| super::adopted_by(file)).unwrap_or_default();
            let adoption = Adoption::new(&own, forwarder, source, &self.directory);
            if [&adoption.profile, &adoption.agent.file].into_iter().any(|path| path.exists()) {
                Mode::Adopt(adoption)
            } else {
                Mode::Forward(adoption.forwarder)
            }
        };
        let quadlet = main.and_then(|(_, file)| super::quadlet(file));
        let quadlet = quadlet.unwrap_or_else(|| format!("{own}.container").into());
        let installed = Installed {
            run_as: main.and_then(|(_, file)| super::run_as(file, root)),
            listeners,
            drop_in,
            made: listed("Made").unwrap_or_default(),
            ..Installed::new(own, self.scope, quadlet, unit, mode)
        };
        Some(Remnant { installed, lost, missing })
    }

    /// The sockets that the other files of a service still name, without files of their own.
    pub(crate) fn lost(&self, installed: &Installed) -> Vec<SocketUnit> {
        let direct = installed.forwarder().is_none();
        let mut named = vec![first_socket(&installed.name, &installed.unit, direct)];
        let service = installed.forwarder().and_then(|forwarder| self.file(&forwarder.service_file));
        named.extend(service.map(|file| super::sockets(file, "Service", "Sockets")).unwrap_or_default());
        let drop_in = installed.drop_in.as_deref().and_then(read_ours);
        named.extend(drop_in.map(|file| super::sockets(&file, "Unit", "Requires")).unwrap_or_default());
        named.sort();
        named.dedup();
        let is_there =
            |name: &String| installed.listeners.iter().any(|listener| listener.socket.name == *name);
        // The one of an adoption is among its files, whether it is there or not.
        let agent = agent_of(&installed.name);
        named.retain(|name| !is_there(name) && *name != agent);
        named.into_iter().map(|name| SocketUnit::new(name, &self.directory)).collect()
    }
}

/// The first port's socket unit.
fn first_socket(name: &str, unit: &str, direct: bool) -> String {
    let stem = unit.strip_suffix(".service").unwrap_or(unit);
    if direct { format!("{stem}.socket") } else { format!("{name}-activator.socket") }
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
