//! What `bro activate` has set up, read back from the unit files it wrote.
//!
//! Each of its files begins with [`MARKER`] and has a section `[X-Bro]`, which systemd leaves alone. In a socket's file it says
//! which activation the socket belongs to and where its clients end up; in the service's (with `--direct`, the socket's), the rest.

pub(crate) mod drift;

pub(crate) mod leftover;

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use bro_relay::read_bounded::{self, Link};

use crate::address::{self, is_straight};
use crate::exit::Failure;
use crate::paths::unit_directory;
use crate::run_as::RunAsUser;
use crate::systemd::calendar::DailySpans;
use crate::systemd::scope::RuntimeScope;
use crate::systemd::unit_file::{MARKER, UnitFile};

/// The section of its own.
pub const SECTION: &str = "X-Bro";

/// The longest unit file that is read; those that `bro activate` writes stay far below.
const LONGEST: u64 = 1 << 20;

/// One port of an activated service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstalledPort {
    /// `--service-name`, the socket's FileDescriptorName=; the first port's is the quadlet's name.
    pub service: String,
    /// The socket unit: `web-activator.socket`.
    pub socket: String,
    /// Its file.
    pub file: PathBuf,
    /// Where clients connect: a port (of every address), ADDR:PORT, a unix path or an @abstract name.
    pub address: String,
    /// Where the service listens, as `bro forward --target` takes it; none with `--direct`.
    pub target: Option<String>,
    /// Backlog=, if set.
    pub backlog: Option<u32>,
    /// BindToDevice=, if set.
    pub device: Option<String>,
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
    /// The container with the network namespace of the service; none where clients are not forwarded into one.
    pub container: Option<String>,
    /// No forwarder: the container itself takes the sockets over.
    pub direct: bool,
    /// The first port's socket unit.
    pub socket_file: PathBuf,
    /// The forwarder's unit; none with `--direct`.
    pub service_file: Option<PathBuf>,
    /// Its ports, the first one first.
    pub listeners: Vec<InstalledPort>,
    /// What `bro forward` is given beyond that, by its long names without the dashes: `("exit-idle-time", "5min")`. With
    /// `--direct`, how the container finds its sockets.
    pub options: Vec<(String, String)>,
    /// The container was named by `--container`, not taken from the quadlet.
    pub container_given: bool,
    /// The quadlet's drop-in, if it needs one.
    pub drop_in: Option<PathBuf>,
    /// The unit that makes namespaces, with `--restrict-network`.
    pub pause_unit: Option<PathBuf>,
    /// Directories that were made for its files.
    pub made: Vec<PathBuf>,
}

impl Installed {
    /// The forwarder's unit: `web-activator.service`; none with `--direct`.
    #[must_use]
    pub fn service(&self) -> Option<String> {
        self.service_file.as_deref().map(unit_name)
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
        self.service_file.as_deref().map(|service| service.with_extension("timer"))
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
            || self.listeners.iter().any(|listener| listener.socket == name)
    }

    /// The service manager of the container's own unit, as the owner of [`Installed::scope`] or the user `run_as` sees it.
    #[must_use]
    pub fn unit_scope(&self) -> RuntimeScope {
        if self.run_as.is_some() { RuntimeScope::User } else { self.scope }
    }

    /// Its files besides sockets and service.
    pub fn others(&self) -> impl Iterator<Item = &PathBuf> {
        self.drop_in.iter().chain(&self.pause_unit)
    }

    /// The value of one of `bro forward`'s options, if that is set.
    #[must_use]
    pub fn option(&self, name: &str) -> Option<&str> {
        self.options.iter().find(|(option, _)| option == name).map(|(_, value)| value.as_str())
    }
}

/// Everything that is activated in this scope, by name; for a user, also what the system listens for on that user's behalf.
///
/// # Errors
/// When the unit directory cannot be read. Files that bro did not write are passed over.
pub fn all(scope: RuntimeScope) -> anyhow::Result<Vec<Installed>> {
    let mut all = all_in(&unit_directory(scope)?, scope, None)?;
    if scope == RuntimeScope::User {
        let system =
            all_in(&unit_directory(RuntimeScope::System)?, RuntimeScope::System, None).unwrap_or_default();
        let mine = system.into_iter().filter(|known| known.run_as.as_ref().is_some_and(RunAsUser::is_me));
        all.extend(mine);
    }
    Ok(all)
}

/// The one activated service of that name (`web`; `web.container`, `web.service` and `web-activator.service` will do).
///
/// # Errors
/// [`Failure::NotFound`] when there is none.
pub fn find(name: &str, scope: RuntimeScope) -> anyhow::Result<Installed> {
    let mut all = all(scope)?;
    if !all.iter().any(|known| known.goes_by(name))
        && let Some(rest) = leftover::find(name, &unit_directory(scope)?, scope, None)
    {
        return Err(in_part(&rest).into());
    }
    match all.iter().position(|known| known.goes_by(name)) {
        Some(at) => Ok(all.swap_remove(at)),
        None => Err(Failure::NotFound(format!(
            "no service “{name}” is activated {}; `bro activate {name} --external-port PORT` does that",
            match scope {
                RuntimeScope::System => "for the system",
                RuntimeScope::User => "for this user",
            }
        ))
        .into()),
    }
}

/// The error about a service that has lost some of its files.
pub(crate) fn in_part(rest: &leftover::Remnant) -> Failure {
    let (name, missing) = (&rest.activated.name, rest.missing.join(" and "));
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
    let ours = ours_in(directory)?;
    let main = ours.iter().filter(|(_, file)| file.value(SECTION, "Unit").is_some());
    let mut all: Vec<Installed> =
        main.filter_map(|(path, file)| assemble(path, file, &ours, scope, root)).collect();
    all.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(all)
}

/// The units that `bro activate` wrote, by their paths.
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

pub(crate) fn assemble(
    path: &Path,
    file: &UnitFile,
    ours: &[(PathBuf, UnitFile)],
    scope: RuntimeScope,
    root: Option<&Path>,
) -> Option<Installed> {
    let name = activation_name(file)?;
    let direct = path.extension().is_some_and(|kind| kind == "socket");
    let mut listeners: Vec<InstalledPort> = ours
        .iter()
        .filter(|(path, file)| {
            path.extension().is_some_and(|kind| kind == "socket") && activation_name(file) == Some(name)
        })
        .filter_map(|(path, file)| listener(path, file))
        .collect();
    // The first port is the one that has the quadlet's own name.
    listeners.sort_by_key(|listener| (listener.service != name, listener.service.clone()));
    let options = file.values(SECTION, "Option").into_iter();
    let (drop_in, pause_unit) = others(paths(file, "Also", root));
    Some(Installed {
        name: name.to_owned(),
        scope,
        run_as: run_as(file, root),
        quadlet: quadlet(file)?,
        unit: unit(file)?.to_owned(),
        container: file.value(SECTION, "Container").map(str::to_owned),
        direct,
        socket_file: listeners.first()?.file.clone(),
        service_file: (!direct).then(|| path.to_owned()),
        listeners,
        options: options
            .filter_map(|option| option.split_once('='))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect(),
        container_given: file.boolean(SECTION, "ContainerGiven").unwrap_or(false),
        drop_in,
        pause_unit,
        made: paths(file, "Made", root),
    })
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
    let (units, drop_ins): (Vec<PathBuf>, Vec<PathBuf>) =
        paths.into_iter().partition(|path| path.extension().is_some_and(|kind| kind == "service"));
    (drop_ins.into_iter().next(), units.into_iter().next())
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
        socket: unit_name(path),
        file: path.to_owned(),
        address: file.value(SECTION, "External")?.to_owned(),
        target: file.value(SECTION, "Internal").map(str::to_owned),
        backlog: file.value("Socket", "Backlog").and_then(|number| number.parse().ok()),
        device: file.value("Socket", "BindToDevice").map(str::to_owned),
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
        assert_eq!(web.container.as_deref(), Some("systemd-web"));
        assert_eq!(web.service().as_deref(), Some("web-activator.service"));
        assert_eq!(web.option("exit-idle-time"), Some("5min"));
        assert_eq!(web.option("ready"), Some("exec:test -e /x=y"));
        let ports: Vec<_> =
            web.listeners.iter().map(|port| (&*port.service, &*port.address, &*port.socket)).collect();
        assert_eq!(
            ports,
            [
                ("web", "8080", "web-activator.socket"),
                ("admin", "127.0.0.1:9000", "web-admin-activator.socket")
            ]
        );
        assert_eq!(web.listeners[0].target.as_deref(), Some("127.0.0.1:80"));
    }

    #[test]
    fn what_is_missing_of_one_is_said() {
        let directory = tempdir();
        let write = |name: &str, text: &str| std::fs::write(directory.join(name), text).unwrap();
        let find = |name: &str| leftover::find(name, &directory, RuntimeScope::System, None);
        write("web-activator.socket", &socket("web", "8080", "127.0.0.1:80"));
        for name in ["web", "web.service", "web-activator.socket"] {
            let rest = find(name).unwrap();
            assert_eq!(
                (rest.missing.join(" "), rest.activated.direct),
                ("web-activator.service".into(), false)
            );
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
