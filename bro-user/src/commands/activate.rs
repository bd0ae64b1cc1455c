//! `bro activate`: from a quadlet to a socket that wakes it, and back.
//!
//! In order, under a lock: read what is there (`present`), decide what is wanted of that and the quadlet (`plan`), put it into files
//! (`units`), find what differs (`difference`), change it all at once (`transaction`), and have systemd take it up (`apply`). Any
//! failure undoes everything.

pub(crate) mod adopt;
mod apply;
mod asked_at;
mod backoff;
mod connects;
mod difference;
pub(crate) mod executable;
pub(crate) mod fence;
mod output;
pub(crate) mod plan;
mod ports;
mod preflight;
mod present;
pub(crate) mod publish_port;
mod restart;
mod root_dir;
mod signals;
mod transaction;
mod waits;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use difference::{Removable, Removal};
use plan::{Paths, Wanted};
use present::{Contents, Present};
use signals::Interrupt;
use transaction::{Change, DirectoryLock, Made};

use crate::cli::Activate;
use crate::commands::doctor::{image, oci_runtime::OciRuntime, versions};
use crate::exit::Failure;
use crate::installed::Installed;
use crate::ledger;
use crate::run_as::RunAsUser;
use crate::service::failed_wake;
use crate::systemd::calendar::{self, DailySpans, NoAnswer};
use crate::systemd::scope::RuntimeScope;
use crate::unassigned_address;
use crate::units::{self, File};
use crate::{paths, port_owner};

/// Runs `bro activate`.
///
/// # Errors
/// Each with the exit code of [`crate::exit`]; then nothing has changed.
pub fn run(options: &Activate) -> anyhow::Result<()> {
    let scope = RuntimeScope::choose(options.system, options.user);
    let units = paths::below(options.root.as_deref(), &paths::unit_directory(scope)?);
    if let (RuntimeScope::User, Some(name)) = (scope, &options.run_as) {
        let text = format!(
            "--run-as is for the system's units, which are root's: run it with sudo (as {name} alone, leave --run-as out)"
        );
        return Err(Failure::Usage(text).into());
    }
    let has_steps = backoff::has_steps(options.root.as_deref());
    let places = Paths { scope, units, root: options.root.clone(), has_steps };
    let ordinary = !nix::unistd::geteuid().is_root();
    if scope == RuntimeScope::System && ordinary && places.root.is_none() && !options.dry_run {
        let text = "the system's units are root's: run it with sudo, or with --user; nothing was changed";
        return Err(Failure::NotPermitted(text.to_owned()).into());
    }
    for directory in [places.units.clone(), apply::wants(&places)] {
        root_dir::stays_inside(places.root.as_deref(), &directory)?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut interrupt = Interrupt::watch()?;
        interrupt.or(check_times(options)).await?;
        if options.remove {
            remove(options, &places, &mut interrupt).await
        } else {
            activate(options, &places, &mut interrupt).await
        }
    })
}

/// Does systemd know the times of `--keep-awake`?
async fn check_times(options: &Activate) -> anyhow::Result<()> {
    calendar::check(&DailySpans::all(&options.keep_awake)).await.map_err(|error| match error {
        NoAnswer::Unavailable(_) => anyhow::anyhow!("--keep-awake: {error}; nothing was changed"),
        NoAnswer::Refused(_) | NoAnswer::Past(_) => Failure::Usage(format!("--keep-awake: {error}")).into(),
    })
}

async fn activate(options: &Activate, places: &Paths, interrupt: &mut Interrupt) -> anyhow::Result<()> {
    if options.dry_run {
        return interrupt.or(dry_run(options, places)).await;
    }
    let Prepared { systemd, mut made, _lock, decided, changes, unfinished, warnings } =
        interrupt.or(prepare(options, places)).await?;
    output::warnings(&warnings)?;
    let Decided { wanted, installed, .. } = &decided;
    let (systemd, installed) = (systemd.as_ref(), installed.as_ref());
    let outcome =
        apply::activate(systemd, &wanted.service, installed, &changes, &unfinished, places, interrupt)
            .await?;
    transaction::finished(&unfinished);
    made.keep();
    output::activated(&wanted.service, wanted.drop_in.runtime.as_ref(), &changes, outcome, places)
}

/// What a run is to do, and what it was decided from.
struct Decided {
    wanted: Wanted,
    /// The service as it is, if it is activated.
    installed: Option<Installed>,
    present: Present,
    /// Directories that are missing, in the order in which they are made.
    missing: Vec<PathBuf>,
    files: Vec<File>,
}

impl Decided {
    /// What differs on the disk. A file that bro has not written is an error.
    fn difference(&self, places: &Paths) -> anyhow::Result<Vec<Change>> {
        let left: Vec<PathBuf> = self.installed.iter().flat_map(Installed::files).collect();
        let paths = self.files.iter().map(|file| file.path.clone()).chain(left.clone());
        difference::to(&self.files, &self.wanted.service.name, left, &Contents::read(paths, places)?)
    }
}

/// Reads what is there, and decides. `made` are directories that this run has made already.
async fn decide(options: &Activate, places: &Paths, made: &[PathBuf]) -> anyhow::Result<Decided> {
    let root = places.root.as_deref();
    let present = Present::read(places)?;
    let owner = present.owner(options, places)?;
    let found = present::find_quadlet(&options.name, owner.as_ref(), places)?;
    let installed = present.services.iter().find(|other| other.name == found.quadlet.name).cloned();
    preflight::fits(installed.as_ref(), owner.as_ref(), &found.quadlet, &present)?;
    let mut wanted = plan::wanted(options, &found, installed.as_ref(), owner, places)?;
    let mut directories = directories_of(&wanted.service, places);
    directories.extend(own_wants(places, places.units.exists() && !made.contains(&places.units)));
    let missing: Vec<PathBuf> =
        directories.iter().flat_map(|directory| transaction::missing(directory)).collect();
    note_made(&mut wanted.service, made.iter().chain(&missing), &present, places);
    let adopts = wanted.service.adoption().is_some();
    let wait_killable = if adopts { check_runtime(&mut wanted, places).await? } else { false };
    let mut files = units::files(&wanted.service, Some(&wanted.drop_in), (root, places.has_steps))?;
    if let Some(adoption) = wanted.service.adoption() {
        let uid = nix::unistd::geteuid().as_raw();
        let listener = units::listener_path(&wanted.service.name, places.scope, uid);
        files.push(adopt::profile(&wanted.service, adoption, &listener, wait_killable, root)?);
    }
    for file in &files {
        root_dir::stays_inside(root, &file.path)?;
    }
    Ok(Decided { wanted, installed, present, missing, files })
}

/// Is all of this host new enough for adoption? Then: does a profile's flag for calls that no signal breaks off work? It is left out where that is
/// unknown, as in an image's tree.
async fn check_runtime(wanted: &mut Wanted, places: &Paths) -> anyhow::Result<bool> {
    if places.root.is_some() {
        return Ok(false);
    }
    if let Some(needs) = versions::too_old_to_adopt().await {
        let text = format!("--adopt needs {needs}, and this host has an older version; leave --adopt out");
        return Err(Failure::Usage(text).into());
    }
    let runtime = OciRuntime::find(wanted.service.run_as.as_ref()).await;
    if let Some(refusal) = runtime.as_ref().and_then(OciRuntime::refusal) {
        return Err(Failure::Usage(format!("--adopt: {refusal}")).into());
    }
    if let (Some(link), Some(runtime)) = (&mut wanted.drop_in.runtime, &runtime) {
        runtime.name().clone_into(&mut link.name);
    }
    // A runtime of the container's own is another than the one that Podman has told of.
    let own = ["PodmanArgs", "GlobalArgs"]
        .into_iter()
        .flat_map(|key| wanted.quadlet.file.words("Container", key))
        .any(|word| word.starts_with("--runtime"));
    Ok(!own && runtime.is_some_and(|runtime| runtime.waits_killable()))
}

async fn dry_run(options: &Activate, places: &Paths) -> anyhow::Result<()> {
    let Decided { mut wanted, installed, present, files, .. } = decide(options, places, &[]).await?;
    let mut warnings = std::mem::take(&mut wanted.warnings);
    warnings.extend(executable::warning(places));
    warnings.extend(nowhere(&wanted.service, places));
    let listens = check_listeners(&wanted.service, installed.as_ref(), &present, None, places).await;
    warnings.extend(listens.err().map(|error| error.to_string()));
    output::warnings(&warnings)?;
    output::files(&files)
}

/// All that is decided and checked, under the lock; nothing has changed but directories; dropping this removes them.
struct Prepared {
    systemd: Option<apply::Managers>,
    made: Made,
    _lock: DirectoryLock,
    decided: Decided,
    changes: Vec<Change>,
    /// Files that a run was working on when it was killed.
    unfinished: Vec<PathBuf>,
    warnings: Vec<String>,
}

async fn prepare(options: &Activate, places: &Paths) -> anyhow::Result<Prepared> {
    let mut made = Made::for_all(places.scope == RuntimeScope::System);
    // Nothing is activated where there is no directory; none is made for a quadlet that is not there.
    let make = || {
        let owner = options.run_as.as_ref().map(|name| RunAsUser::find(name, places.root.as_deref()));
        present::find_quadlet(&options.name, owner.transpose()?.as_ref(), places)?;
        made.make(&places.units)
    };
    let lock = DirectoryLock::take(&places.units, make).await?;
    let mut decided = decide(options, places, made.paths()).await?;
    let Decided { wanted, installed, present, .. } = &mut decided;
    // Connected before anything is written: without systemd nothing could be started.
    let systemd = match &places.root {
        None => Some(apply::connect(places.scope, wanted.service.run_as.as_ref()).await?),
        Some(_) => None,
    };
    let mut warnings = std::mem::take(&mut wanted.warnings);
    warnings.extend(executable::warning(places));
    executable::check(&wanted.service, places)?;
    check_listeners(&wanted.service, installed.as_ref(), present, systemd.as_ref(), places).await?;
    if let Some(systemd) = &systemd {
        let container = systemd.container().context("the container's service manager is gone")?;
        warnings.extend(apply::network_warning(container, wanted.waits_for_network).await);
        warnings.extend(image::warning(&wanted.service, &wanted.quadlet).await);
        apply::check_freezing(container, &wanted.service).await?;
    }
    warnings.extend(nowhere(&wanted.service, places));
    let changes = decided.difference(places)?;
    for directory in &decided.missing {
        made.make(directory)?;
    }
    let Decided { wanted, installed, .. } = &decided;
    let all = wanted.service.files().into_iter().chain(installed.iter().flat_map(Installed::files));
    let unfinished = transaction::unfinished(&wanted.service.name, &places.units, all);
    Ok(Prepared { systemd, made, _lock: lock, decided, changes, unfinished, warnings })
}

/// The warnings of external addresses that the host lacks.
fn nowhere(wanted: &Installed, places: &Paths) -> Vec<String> {
    if places.root.is_some() {
        return Vec::new();
    }
    let all = wanted.listeners.iter().filter_map(|listener| unassigned_address::sentence(&listener.external));
    all.map(|sentence| format!("{sentence}; {}", unassigned_address::MEND)).collect()
}

/// Where its files go.
fn directories_of(wanted: &Installed, places: &Paths) -> Vec<PathBuf> {
    let others = wanted.others().filter_map(|path| path.parent());
    std::iter::once(&*places.units).chain(others).map(Path::to_owned).collect()
}

/// Where the links that enable sockets go, if not made by systemd: noted as made, unless the units' directory is new.
fn own_wants(places: &Paths, units_were_there: bool) -> Option<PathBuf> {
    (places.root.is_some() && units_were_there).then(|| apply::wants(places))
}

/// Notes the directories that are made for this service.
fn note_made<'a>(
    wanted: &mut Installed,
    made: impl Iterator<Item = &'a PathBuf>,
    present: &'a Present,
    places: &Paths,
) {
    // An activated service that uses another one's directory shares it: the last one to go removes it.
    let mut mine = wanted.files();
    if places.root.is_some() {
        mine.extend(wanted.sockets().map(|socket| apply::wants(places).join(&socket.name)));
    }
    let shared = present.services.iter().flat_map(|other| &other.made);
    let shared = shared.filter(|directory| mine.iter().any(|file| file.starts_with(directory)));
    wanted.made.extend(made.chain(shared).cloned());
    wanted.made.sort();
    wanted.made.dedup();
}

/// Can systemd listen where it has to?
async fn check_listeners(
    wanted: &Installed,
    installed: Option<&Installed>,
    present: &Present,
    systemd: Option<&apply::Managers>,
    places: &Paths,
) -> anyhow::Result<()> {
    asked_at::check(wanted, installed, present, places)?;
    if places.root.is_some() {
        return Ok(());
    }
    for listener in &wanted.listeners {
        if let Some(device) = &listener.device
            && !Path::new("/sys/class/net").join(device).exists()
        {
            return Err(
                Failure::Usage(format!("there is no network interface “{device}”; see `ip link`")).into()
            );
        }
        let external = &listener.external;
        // What is no socket is in the way, held or not.
        if let Some(port_owner::AddressTrouble::InTheWay(why)) = port_owner::look(external) {
            anyhow::bail!("{why} (nothing was changed)");
        }
        // Held by the socket that is to stay, or to be replaced.
        let before = installed.iter().flat_map(|installed| &installed.listeners);
        let before: Vec<_> = before.flat_map(|before| before.external.sockets()).collect();
        for socket in external.sockets().filter(|socket| !before.contains(socket)) {
            match port_owner::look_at(&socket) {
                None | Some(port_owner::AddressTrouble::InTheWay(_)) => {}
                Some(port_owner::AddressTrouble::Forbidden(why)) => {
                    let text = format!("{why}; {}", port_owner::instead(wanted, listener));
                    return Err(Failure::NotPermitted(text).into());
                }
                Some(port_owner::AddressTrouble::Taken(holder))
                    if ours(&holder, installed, systemd).await => {}
                Some(port_owner::AddressTrouble::Taken(holder)) => {
                    anyhow::bail!("{}", apply::taken(external, &holder, systemd).await)
                }
            }
        }
    }
    Ok(())
}

/// Is it a socket of this same service that will make room?
async fn ours(
    holder: &port_owner::AddressHolder,
    installed: Option<&Installed>,
    systemd: Option<&apply::Managers>,
) -> bool {
    let Some(installed) = installed else { return false };
    match systemd {
        Some(systemd) => {
            let unit = systemd.socket_at(holder.kind, &holder.address).await;
            unit.is_some_and(|unit| installed.listeners.iter().any(|before| before.socket.name == unit))
        }
        // A dry run asks no service manager; the port says enough.
        None => {
            let Ok(taken) = holder.address.parse::<SocketAddr>() else { return false };
            let mut before = installed.listeners.iter().flat_map(|before| before.external.sockets());
            before.any(|socket| socket.is_at(holder.kind, taken.port()))
        }
    }
}

async fn remove(options: &Activate, places: &Paths, interrupt: &mut Interrupt) -> anyhow::Result<()> {
    let name = &options.name;
    let missing = || {
        Failure::NotFound(format!(
            "“{name}” is not activated {}: there is nothing to remove",
            if places.scope == RuntimeScope::System { "for the system" } else { "for this user" }
        ))
    };
    let decide = || {
        let present = Present::read(places)?;
        let removable = present.removable(name).ok_or_else(missing)?;
        let there = Contents::read(removable.installed.files(), places)?;
        let removal = Removal::of(removable, options.service_name.as_deref(), &present, &there, places)?;
        anyhow::Ok((removal, there))
    };
    if options.dry_run {
        return output::would_remove(&decide()?.0.changes);
    }
    let prepare = async {
        let lock = DirectoryLock::take(&places.units, || Err(missing().into())).await?;
        let (removal, there) = decide()?;
        let systemd = match &places.root {
            None => {
                let owner = removal.installed.run_as.as_ref();
                Some(apply::connect_for_removal(places.scope, owner).await?)
            }
            Some(_) => None,
        };
        Ok((lock, removal, there, systemd))
    };
    let (_lock, removal, there, systemd) = interrupt.or(prepare).await?;
    if let Some(path) = removal.not_ours(&there) {
        anyhow::bail!("{} was not written by bro activate any more; nothing was changed", path.display());
    }
    let installed = &removal.installed;
    for directory in &installed.made {
        root_dir::stays_inside(places.root.as_deref(), directory)?;
    }
    let unfinished = transaction::unfinished(&installed.name, &places.units, installed.files());
    let left = apply::remove(systemd.as_ref(), &removal, places, interrupt).await?;
    transaction::finished(&unfinished);
    if removal.rest.is_none() {
        transaction::remove_directories(&installed.made)?;
        if places.root.is_none() {
            failed_wake::forget(installed);
            ledger::forget(installed);
            crate::service::wakes::forget(installed);
        }
    }
    output::removed(installed, &removal.changes, left)
}
