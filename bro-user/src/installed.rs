//! What `bro activate` has set up, read back from the unit files it wrote.
//!
//! Each of its files begins with [`MARKER`] and has a section `[X-Bro]`, which systemd leaves alone. In a socket's file it says
//! which activation the socket belongs to and where its clients end up; in the service's (with `--direct`, the socket's), the rest.

mod connects;
pub(crate) mod drift;
#[cfg(test)]
pub(crate) mod example;
pub(crate) mod leftover;
mod mode;
mod options;

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use bro_relay::read_bounded::{self, Link};
use bro_relay::target::Target;

pub use connects::{Connects, InvalidConnects};
pub(crate) use mode::agent_of;
pub use mode::{Adoption, Forwarder, Mode, Takeover, Way};
pub use options::ForwardOptions;

use crate::address::{self, External, is_straight};
use crate::adopt::Adopt;
use crate::exit::Failure;
use crate::paths::unit_directory;
use crate::run_as::RunAsUser;
use crate::systemd::calendar::DailySpans;
use crate::systemd::scope::RuntimeScope;
use crate::systemd::unit_file::{MARKER, UnitFile};
use crate::targets::{self, TargetRange};

/// The section of its own.
pub const SECTION: &str = "X-Bro";

/// How `--restrict-network` is noted.
pub const RESTRICTED: &str = "restrict-network";

/// How `--adopt` is noted: with the profile that the container's own is made of.
pub const ADOPTS: &str = "Adopt";

/// How it is noted which sockets that concerns, unless it is those of streams.
pub const ADOPTS_WHAT: &str = "AdoptWhat";

/// How `--trust-loopback` is noted.
pub const TRUSTS_LOOPBACK: &str = "TrustLoopback";

/// How `--adopt-connect` is noted.
pub const CONNECTS: &str = "AdoptConnect";

/// The longest unit file that is read; those that `bro activate` writes stay far below.
const LONGEST: u64 = 1 << 20;

/// A socket unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SocketUnit {
    /// `web-activator.socket`.
    pub name: String,
    /// Its file.
    pub file: PathBuf,
}

impl SocketUnit {
    /// The unit of that name in a directory of units.
    #[must_use]
    pub fn new(name: impl Into<String>, directory: &Path) -> Self {
        let name = name.into();
        Self { file: directory.join(&name), name }
    }
}

/// The fence of a socket unit of the system's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SocketFence {
    /// The bro that puts it up.
    pub program: PathBuf,
    /// What the service is told of addresses.
    pub told: SocketNames,
}

/// What a service that accepts at systemd's socket itself is told instead of what is there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SocketNames {
    /// Clients of this host's loopback interface are none of the service's own host.
    pub this_host: bool,
    /// External ports, each with the internal one in the place of which the service sees it.
    pub ports: Vec<(u16, u16)>,
}

/// One port of an activated service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstalledPort {
    /// `--service-name`, the socket's FileDescriptorName=; the first port's is the quadlet's name.
    pub service: String,
    /// The socket unit.
    pub socket: SocketUnit,
    /// Where clients connect.
    pub external: External,
    /// Where the service listens, as `bro forward --target` takes it; none where the container takes the socket over.
    pub internal: Option<TargetRange>,
    /// Backlog=, if set.
    pub backlog: Option<u32>,
    /// BindToDevice=, if set.
    pub device: Option<String>,
    /// The fence that is put up before it listens, if one is to stand.
    pub fence: Option<SocketFence>,
}

impl InstalledPort {
    /// Is it one of those that a container can lead elsewhere? What is dissolved of a unix socket leads nowhere.
    #[must_use]
    pub fn is_tcp(&self) -> bool {
        self.external.is_tcp()
    }

    /// Are there sockets for datagrams, of whichever family?
    #[must_use]
    pub fn takes_datagrams(&self) -> bool {
        self.external.sockets().any(|socket| socket.kind.takes_datagrams())
    }

    /// Where the service listens for each of its sockets, as their kinds make it, without repetition.
    #[must_use]
    pub fn targets(&self) -> Vec<Target> {
        let Some(internal) = &self.internal else { return Vec::new() };
        let first = self.external.ports().map_or(0, |ports| ports.first);
        let mut all: Vec<Target> = Vec::new();
        for socket in self.external.sockets() {
            let number = socket.place.port().map_or(0, |port| port - first);
            let target = targets::of_kind(socket.kind, internal.nth(number));
            if !all.contains(&target) {
                all.push(target);
            }
        }
        all
    }
}

/// One activated service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Installed {
    /// The quadlet's name: `web`, or `web@blue` for an instance of a template.
    pub name: String,
    /// The service manager that listens and runs the forwarder.
    pub scope: RuntimeScope,
    /// The container's user, where that is not the owner of the service manager.
    pub run_as: Option<RunAsUser>,
    /// The quadlet it was made for (the file may be gone since).
    pub quadlet: PathBuf,
    /// The unit that the first client starts: `web.service`.
    pub unit: String,
    /// How it gets its clients.
    pub mode: Mode,
    /// Its ports, the first one first.
    pub listeners: Vec<InstalledPort>,
    /// The quadlet's drop-in, if it needs one.
    pub drop_in: Option<PathBuf>,
    /// Directories that were made for its files.
    pub made: Vec<PathBuf>,
}

impl Installed {
    /// A service without ports, and with no more files than its mode has.
    #[must_use]
    pub fn new(
        name: impl Into<String>,
        scope: RuntimeScope,
        quadlet: PathBuf,
        unit: String,
        mode: Mode,
    ) -> Self {
        let name = name.into();
        Self {
            name,
            scope,
            run_as: None,
            quadlet,
            unit,
            mode,
            listeners: Vec::new(),
            drop_in: None,
            made: Vec::new(),
        }
    }

    /// Its forwarder, if it has one.
    #[must_use]
    pub const fn forwarder(&self) -> Option<&Forwarder> {
        match &self.mode {
            Mode::Forward(forwarder) | Mode::Adopt(Adoption { forwarder, .. }) => Some(forwarder),
            Mode::Direct(_) => None,
        }
    }

    /// Has it clients over UDP?
    #[must_use]
    pub fn has_udp(&self) -> bool {
        let mut targets = self.listeners.iter().filter_map(|listener| listener.internal.as_ref());
        targets.any(|range| matches!(range.first(), Target::Udp { .. }))
    }

    /// Its adoption, if its service accepts at systemd's sockets without knowing of it.
    #[must_use]
    pub const fn adoption(&self) -> Option<&Adoption> {
        match &self.mode {
            Mode::Adopt(adoption) => Some(adoption),
            Mode::Forward(_) | Mode::Direct(_) => None,
        }
    }

    /// All its socket units: those of its ports, and the one at which a container's notifications arrive.
    pub fn sockets(&self) -> impl Iterator<Item = &SocketUnit> {
        let ports = self.listeners.iter().map(|listener| &listener.socket);
        ports.chain(self.adoption().map(|adoption| &adoption.agent))
    }

    /// The forwarder's unit, `web-activator.service`, if it has one.
    #[must_use]
    pub fn service(&self) -> Option<String> {
        self.forwarder().map(|forwarder| unit_name(&forwarder.service_file))
    }

    /// The unit that its sockets start: the forwarder's, or the container's own.
    #[must_use]
    pub fn runner(&self) -> String {
        self.service().unwrap_or_else(|| self.unit.clone())
    }

    /// The container into whose network namespace clients are forwarded, if there is one.
    #[must_use]
    pub fn container(&self) -> Option<&str> {
        self.forwarder()?.container.as_deref()
    }

    /// The timer that starts the forwarder at the times of `--keep-awake`, where there are some: `web-activator.timer`; none with
    /// `--direct`.
    #[must_use]
    pub fn timer(&self) -> Option<String> {
        self.timer_file().as_deref().map(unit_name)
    }

    /// Its file, beside the forwarder's unit.
    #[must_use]
    pub fn timer_file(&self) -> Option<PathBuf> {
        self.forwarder().map(|forwarder| forwarder.service_file.with_extension("timer"))
    }

    /// The times of `--keep-awake`; none where there are none.
    #[must_use]
    pub fn kept_awake(&self) -> Option<DailySpans> {
        let spans: DailySpans = self.option("keep-awake")?.parse().ok()?;
        (!spans.0.is_empty()).then_some(spans)
    }

    /// Is it meant by `name`: the quadlet's name, its file's, or that of one of its units?
    #[must_use]
    pub fn goes_by(&self, name: &str) -> bool {
        let file = self.quadlet.file_name().and_then(|file| file.to_str());
        self.name == name
            || self.unit == name
            || file == Some(name)
            || self.service().as_deref() == Some(name)
            || self.sockets().any(|socket| socket.name == name)
    }

    /// The service manager of the container's own unit, as the owner of [`Installed::scope`] or the user `run_as` sees it.
    #[must_use]
    pub fn unit_scope(&self) -> RuntimeScope {
        if self.run_as.is_some() { RuntimeScope::User } else { self.scope }
    }

    /// Its files besides the sockets of its ports and the forwarder's unit.
    pub fn others(&self) -> impl Iterator<Item = &PathBuf> {
        let of_mode = match &self.mode {
            Mode::Forward(_) => [None, None],
            Mode::Adopt(adoption) => [Some(&adoption.agent.file), Some(&adoption.profile)],
            Mode::Direct(takeover) => [takeover.pause_unit.as_ref(), None],
        };
        self.drop_in.iter().chain(of_mode.into_iter().flatten())
    }

    /// Every file of it.
    #[must_use]
    pub fn files(&self) -> Vec<PathBuf> {
        let sockets = self.listeners.iter().map(|listener| listener.socket.file.clone());
        let service = self.forwarder().map(|forwarder| forwarder.service_file.clone());
        // Without its service's file, nothing says whether there is to be a timer.
        let timer =
            self.timer_file().filter(|timer| self.kept_awake().is_some() || read_ours(timer).is_some());
        sockets.chain(service).chain(timer).chain(self.others().cloned()).collect()
    }

    /// The value of one of the forwarder's options as written, if there is a forwarder and that is set.
    #[must_use]
    pub fn option(&self, name: &str) -> Option<&str> {
        self.forwarder()?.options.get(name)
    }
}

/// The units that `bro activate` wrote in one directory, as they are there.
#[derive(Debug)]
pub struct WrittenUnits {
    directory: PathBuf,
    scope: RuntimeScope,
    /// What lies above all paths and is not part of what the units say.
    root: Option<PathBuf>,
    files: Vec<(PathBuf, UnitFile)>,
}

impl WrittenUnits {
    /// Reads them. Files that bro did not write are passed over.
    ///
    /// # Errors
    /// When the directory cannot be read. One that is not there holds no units.
    pub fn read(directory: &Path, scope: RuntimeScope, root: Option<&Path>) -> anyhow::Result<Self> {
        Ok(Self::of(ours_in(directory)?, directory, scope, root))
    }

    pub(crate) fn of(
        files: Vec<(PathBuf, UnitFile)>,
        directory: &Path,
        scope: RuntimeScope,
        root: Option<&Path>,
    ) -> Self {
        Self { directory: directory.to_owned(), scope, root: root.map(Path::to_owned), files }
    }

    /// The services whose units they are, by name.
    #[must_use]
    pub fn services(&self) -> Vec<Installed> {
        let main = self.files.iter().filter(|(_, file)| file.value(SECTION, "Unit").is_some());
        let mut all: Vec<Installed> = main.filter_map(|(path, file)| self.assemble(path, file)).collect();
        all.sort_by(|one, other| one.name.cmp(&other.name));
        all
    }

    fn file(&self, path: &Path) -> Option<&UnitFile> {
        self.files.iter().find(|(other, _)| other == path).map(|(_, file)| file)
    }

    fn assemble(&self, path: &Path, file: &UnitFile) -> Option<Installed> {
        let root = self.root.as_deref();
        let name = activation_name(file)?;
        let mut listeners: Vec<InstalledPort> = self
            .files
            .iter()
            .filter(|(path, file)| is_socket(path) && activation_name(file) == Some(name))
            .filter_map(|(path, file)| listener(path, file))
            .collect();
        // The first port is the one that has the quadlet's own name.
        listeners.sort_by_key(|listener| (listener.service != name, listener.service.clone()));
        let first = listeners.first()?;
        let (drop_in, pause_unit) = others(paths(file, "Also", root));
        let mode = if is_socket(path) {
            let pause_unit = pause_unit.or_else(|| {
                let restricted = option(file, RESTRICTED).is_some();
                restricted.then(|| first.socket.file.with_file_name(pause_unit_of(name)))
            });
            Mode::Direct(Takeover { way: way(file), pause_unit })
        } else {
            let forwarder = Forwarder {
                service_file: path.to_owned(),
                program: program(file),
                container: file.value(SECTION, "Container").map(str::to_owned),
                container_given: file.boolean(SECTION, "ContainerGiven").unwrap_or(false),
                options: options(file).map(|(name, value)| (name.to_owned(), value.to_owned())).collect(),
            };
            match adopted_by(file) {
                Some(source) => Mode::Adopt(Adoption {
                    what: file.value(SECTION, ADOPTS_WHAT).and_then(Adopt::of).unwrap_or(Adopt::On),
                    trusts_loopback: file.boolean(SECTION, TRUSTS_LOOPBACK).unwrap_or(false),
                    connects: file.value(SECTION, CONNECTS).and_then(|text| text.parse().ok()),
                    ..Adoption::new(name, forwarder, source, &self.directory)
                }),
                None => Mode::Forward(forwarder),
            }
        };
        Some(Installed {
            run_as: run_as(file, root),
            listeners,
            drop_in,
            made: paths(file, "Made", root),
            ..Installed::new(name, self.scope, quadlet(file)?, unit(file)?.to_owned(), mode)
        })
    }
}

/// Everything that is activated in this scope, by name; for a user, also what the system listens for on that user's behalf.
///
/// # Errors
/// When the unit directory cannot be read. Files that bro did not write are passed over.
pub fn all(scope: RuntimeScope) -> anyhow::Result<Vec<Installed>> {
    let mut all = all_in(&unit_directory(scope)?, scope, None)?;
    all.extend(of_this_user_by_the_system(scope));
    Ok(all)
}

/// What the system listens for on behalf of the user whose manager `scope` is.
pub(crate) fn of_this_user_by_the_system(scope: RuntimeScope) -> Vec<Installed> {
    if scope == RuntimeScope::System {
        return Vec::new();
    }
    let directory = unit_directory(RuntimeScope::System);
    let all = directory.and_then(|directory| all_in(&directory, RuntimeScope::System, None));
    let mine = |installed: &Installed| installed.run_as.as_ref().is_some_and(RunAsUser::is_me);
    all.unwrap_or_default().into_iter().filter(mine).collect()
}

/// The one activated service of that name (`web`; `web.container`, `web.service` and `web-activator.service` will do).
///
/// # Errors
/// [`Failure::NotFound`] when there is none.
pub fn find(name: &str, scope: RuntimeScope) -> anyhow::Result<Installed> {
    let units = WrittenUnits::read(&unit_directory(scope)?, scope, None)?;
    let mut all = units.services().into_iter().chain(of_this_user_by_the_system(scope));
    if let Some(installed) = all.find(|installed| installed.goes_by(name)) {
        return Ok(installed);
    }
    if let Some(rest) = units.leftover(name) {
        return Err(in_part(&rest).into());
    }
    Err(Failure::NotFound(format!(
        "no service “{name}” is activated {}; `bro activate {name} --external-port PORT` does that",
        match scope {
            RuntimeScope::System => "for the system",
            RuntimeScope::User => "for this user",
        }
    ))
    .into())
}

/// The error about a service that has lost some of its files.
pub(crate) fn in_part(rest: &leftover::Remnant) -> Failure {
    let (name, missing) = (&rest.installed.name, rest.missing.join(" and "));
    Failure::NotFound(format!(
        "“{name}” is activated only in part: {missing} is gone; `bro activate {name} --remove` clears what is left, and then it can \
         be activated anew"
    ))
}

/// As [`all`], in another directory; below `root`, if that is not part of what the units say.
///
/// # Errors
/// As [`all`].
pub fn all_in(directory: &Path, scope: RuntimeScope, root: Option<&Path>) -> anyhow::Result<Vec<Installed>> {
    Ok(WrittenUnits::read(directory, scope, root)?.services())
}

/// The unit that makes namespaces for a container that is cut off from the network.
pub(crate) fn pause_unit_of(name: &str) -> String {
    format!("{name}-pause.service")
}

/// The files of such units, by their paths.
fn ours_in(directory: &Path) -> anyhow::Result<Vec<(PathBuf, UnitFile)>> {
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", directory.display())),
    };
    let mut ours: Vec<(PathBuf, UnitFile)> = Vec::new();
    for entry in entries {
        let path = entry.with_context(|| format!("cannot read {}", directory.display()))?.path();
        if path.extension().is_some_and(|kind| kind == "socket" || kind == "service")
            && let Some(file) = read_ours(&path)
        {
            ours.push((path, file));
        }
    }
    ours.sort_by(|one, other| one.0.cmp(&other.0));
    Ok(ours)
}

/// The file, if `bro activate` wrote it.
#[must_use]
pub fn read_ours(path: &Path) -> Option<UnitFile> {
    let text = read_bounded::read(path, LONGEST, Link::Follow).ok()?;
    text.starts_with(MARKER).then(|| UnitFile::parse(&text))
}

fn unit_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn is_socket(path: &Path) -> bool {
    path.extension().is_some_and(|kind| kind == "socket")
}

/// The notes are text from a file, and below `--root` that file is the tree's author's: no name leads out of a directory, and no
/// path out of the tree. What `bro activate` cannot have written is passed over. The name of the service:
fn activation_name(file: &UnitFile) -> Option<&str> {
    file.value(SECTION, "Name").filter(|name| is_unit_name(&format!("{name}.service")))
}

/// The unit that the first client starts.
fn unit(file: &UnitFile) -> Option<&str> {
    file.value(SECTION, "Unit").filter(|unit| is_unit_name(unit))
}

fn quadlet(file: &UnitFile) -> Option<PathBuf> {
    file.value(SECTION, "Quadlet").map(PathBuf::from).filter(|path| is_straight(path))
}

/// A list of paths, each where it really is.
fn paths(file: &UnitFile, key: &str, root: Option<&Path>) -> Vec<PathBuf> {
    let paths = file.values(SECTION, key).into_iter().map(Path::new).filter(|path| is_straight(path));
    paths.map(|path| crate::paths::below(root, path)).collect()
}

/// A list of units, the sockets among them.
fn sockets(file: &UnitFile, section: &str, key: &str) -> Vec<String> {
    let words = file.words(section, key).into_iter();
    words.filter(|word| word.ends_with(".socket") && is_unit_name(word)).collect()
}

fn is_unit_name(text: &str) -> bool {
    address::unit(text).is_ok()
}

/// Which of them is the drop-in, and which the pause unit.
fn others(paths: Vec<PathBuf>) -> (Option<PathBuf>, Option<PathBuf>) {
    let of_kind = |wanted: &str| {
        let is_one = |path: &&PathBuf| path.extension().is_some_and(|kind| kind == wanted);
        paths.iter().find(is_one).cloned()
    };
    (of_kind("conf"), of_kind("service"))
}

/// What the container's profile is made of, if its sockets are adopted.
fn adopted_by(file: &UnitFile) -> Option<PathBuf> {
    file.value(SECTION, ADOPTS).map(PathBuf::from).filter(|path| is_straight(path))
}

/// The program that the unit runs.
fn program(file: &UnitFile) -> PathBuf {
    let command = file.words("Service", "ExecStart");
    command.first().map(|program| program.replace("%%", "%").into()).unwrap_or_default()
}

/// The socket's fence.
fn fence(file: &UnitFile) -> Option<SocketFence> {
    let command = file.words("Socket", "ExecStartPre");
    let (program, rest) = command.split_first()?;
    let (name, options) = rest.split_first()?;
    if name != "fence" {
        return None;
    }
    let mut told = SocketNames::default();
    for option in options {
        match option.strip_prefix("--port=").and_then(|ports| ports.split_once(':')) {
            Some((external, internal)) => told.ports.extend(external.parse().ok().zip(internal.parse().ok())),
            None => told.this_host = option == "--this-host",
        }
    }
    Some(SocketFence { program: program.replace("%%", "%").into(), told })
}

/// The options that the notes hold.
fn options(file: &UnitFile) -> impl Iterator<Item = (&str, &str)> {
    file.values(SECTION, "Option").into_iter().filter_map(|option| option.split_once('='))
}

fn option<'a>(file: &'a UnitFile, name: &str) -> Option<&'a str> {
    options(file).find(|(option, _)| *option == name).map(|(_, value)| value)
}

/// How the container's program finds its sockets.
fn way(file: &UnitFile) -> Way {
    if option(file, "direct") == Some(Way::Nginx.word()) { Way::Nginx } else { Way::ListenFds }
}

fn run_as(file: &UnitFile, root: Option<&Path>) -> Option<RunAsUser> {
    let name = file.value(SECTION, "RunAs")?;
    // The user may be gone; what was made for that user can still be removed.
    let uid = file.value(SECTION, "RunAsId").and_then(|uid| uid.parse().ok());
    Some(RunAsUser::find(name, root).unwrap_or_else(|_| RunAsUser::gone(name, uid)))
}

fn listener(path: &Path, file: &UnitFile) -> Option<InstalledPort> {
    Some(InstalledPort {
        // The name is part of units' names.
        service: file
            .value("Socket", "FileDescriptorName")
            .filter(|name| is_unit_name(&format!("{name}.socket")))?
            .to_owned(),
        socket: SocketUnit { name: unit_name(path), file: path.to_owned() },
        external: file.value(SECTION, "External")?.parse().ok()?,
        internal: file.value(SECTION, "Internal").map(str::parse).transpose().ok()?,
        backlog: file.value("Socket", "Backlog").and_then(|number| number.parse().ok()),
        device: file.value("Socket", "BindToDevice").map(str::to_owned),
        fence: fence(file),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVICE: &str = "\
# Written by bro activate for web.container
[Service]
ExecStart=/usr/local/bin/bro forward
[X-Bro]
Name=web
Quadlet=/etc/containers/systemd/web.container
Unit=web.service
Container=systemd-web
Option=exit-idle-time=5min
Option=ready=exec:test -e /x=y
Also=/etc/containers/systemd/web.container.d/50-bro-activator.conf
";

    fn socket(service: &str, external: &str, internal: &str) -> String {
        format!(
            "{MARKER} for web.container\n[Socket]\nListenStream={external}\nFileDescriptorName={service}\n\
             [X-Bro]\nName=web\nExternal={external}\nInternal={internal}\n"
        )
    }

    #[test]
    fn reads_back_what_was_written_and_passes_over_the_rest() {
        let directory = tempdir();
        let write = |name: &str, text: &str| std::fs::write(directory.join(name), text).unwrap();
        write("web-activator.service", SERVICE);
        write("web-activator.socket", &socket("web", "8080", "127.0.0.1:80"));
        write("web-admin-activator.socket", &socket("admin", "127.0.0.1:9000", "127.0.0.1:9000"));
        write("other.service", &SERVICE.replace("# Written", "# Copied"));
        write("other.socket", "[Socket]\nListenStream=1\n");
        // No process ever writes into it.
        nix::unistd::mkfifo(&directory.join("web-pipe.socket"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let all = all_in(&directory, RuntimeScope::System, None).unwrap();
        std::fs::remove_dir_all(&directory).unwrap();
        let [web] = &all[..] else { panic!("{all:?}") };
        assert_eq!(web.unit, "web.service");
        assert_eq!(web.container(), Some("systemd-web"));
        assert_eq!(web.service().as_deref(), Some("web-activator.service"));
        assert_eq!(web.option("exit-idle-time"), Some("5min"));
        assert_eq!(web.option("ready"), Some("exec:test -e /x=y"));
        let ports: Vec<_> = web
            .listeners
            .iter()
            .map(|port| (&*port.service, port.external.to_string(), &*port.socket.name))
            .collect();
        assert_eq!(
            ports,
            [
                ("web", "8080".to_owned(), "web-activator.socket"),
                ("admin", "127.0.0.1:9000".to_owned(), "web-admin-activator.socket")
            ]
        );
        assert_eq!(web.listeners[0].internal, Some("127.0.0.1:80".parse().unwrap()));
    }

    #[test]
    fn what_is_missing_of_one_is_said() {
        let directory = tempdir();
        let write = |name: &str, text: &str| std::fs::write(directory.join(name), text).unwrap();
        let find =
            |name: &str| WrittenUnits::read(&directory, RuntimeScope::System, None).unwrap().leftover(name);
        write("web-activator.socket", &socket("web", "8080", "127.0.0.1:80"));
        for name in ["web", "web.service", "web-activator.socket"] {
            let rest = find(name).unwrap();
            assert_eq!(rest.missing, ["web-activator.service"]);
            assert!(rest.installed.forwarder().is_some());
        }
        assert!(find("other").is_none());
        write("web-activator.service", SERVICE);
        assert!(find("web").is_none());
        std::fs::remove_file(directory.join("web-activator.socket")).unwrap();
        let rest = find("web").unwrap();
        assert_eq!(rest.missing, ["web-activator.socket"]);
        assert!(in_part(&rest).to_string().contains("web-activator.socket is gone"));
        std::fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn a_fence_is_known_by_its_command() {
        let fence = |line: &str| fence(&UnitFile::parse(&format!("[Socket]\n{line}\n")));
        let of = |program: &str, this_host, ports| {
            Some(SocketFence { program: program.into(), told: SocketNames { this_host, ports } })
        };
        assert_eq!(fence("ExecStartPre=/usr/bin/bro fence"), of("/usr/bin/bro", false, vec![]));
        assert_eq!(fence("ExecStartPre=\"/opt/b %%x/bro\" fence"), of("/opt/b %x/bro", false, vec![]));
        assert_eq!(fence("ExecStartPre=/bro fence --this-host"), of("/bro", true, vec![]));
        assert_eq!(
            fence("ExecStartPre=/bro fence --this-host --port=8080:80"),
            of("/bro", true, vec![(8080, 80)])
        );
        assert_eq!(fence("ExecStartPre=/bro fence --port=8080:80"), of("/bro", false, vec![(8080, 80)]));
        assert_eq!(fence("ExecStartPre=/bro status"), None);
        assert_eq!(fence("ListenStream=80"), None);
    }

    #[test]
    fn a_user_who_is_gone_is_known_as_such() {
        let file = |name: &str| UnitFile::parse(&format!("[{SECTION}]\nRunAs={name}\nRunAsId=4711\n"));
        let gone = run_as(&file("bro-no-such-user"), None).unwrap();
        assert!(gone.is_gone() && gone.name == "bro-no-such-user" && gone.uid == 4711);
        assert!(!run_as(&file("nobody"), None).unwrap().is_gone());
    }

    #[test]
    fn no_directory_means_nothing_is_activated() {
        assert_eq!(all_in(Path::new("/nonexistent"), RuntimeScope::User, None).unwrap(), []);
    }

    fn tempdir() -> PathBuf {
        nix::unistd::mkdtemp(&std::env::temp_dir().join("bro-activated-XXXXXX")).unwrap()
    }
}
