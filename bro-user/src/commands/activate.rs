//! `bro activate`: from a quadlet to a socket that wakes it, and back.
//!
//! In order: read the quadlet and what is activated already, decide what is wanted (`request`), put it into files (`units`), change
//! them all at once (`write`), and have systemd take it up. Any failure undoes everything.

mod apply;
mod asked_at;
mod backoff;
pub(crate) mod executable;
mod output;
pub(crate) mod plan;
mod preflight;
pub(crate) mod publish_port;
mod restart;
mod root_dir;
mod signals;
mod transaction;
mod waits;

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use plan::{Paths, Wanted};
use signals::Interrupt;
use transaction::{Change, Lock, Made, Provenance};

use crate::address::External;
use crate::cli::Activate;
use crate::commands::doctor::image;
use crate::exit::Failure;
use crate::installed::{self, Installed, leftover};
use crate::ledger;
use crate::podman::quadlet;
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

/// The activated service that goes by this name, if it is there.
fn known(name: &str, places: &Paths) -> anyhow::Result<Option<Installed>> {
    let all = installed::all_in(&places.units, places.scope, places.root.as_deref())?;
    Ok(all.into_iter().find(|known| known.goes_by(name)))
}

/// The same for its removal: also if only a part of it is left, and with the units that have lost their files.
fn known_or_left(name: &str, places: &Paths) -> anyhow::Result<Option<Installed>> {
    let root = places.root.as_deref();
    let Some(mut known) = known(name, places)? else {
        let rest = leftover::find(name, &places.units, places.scope, root);
        return Ok(rest.map(|rest| rest.activated));
    };
    let lost = leftover::lost(&known, &places.units);
    known.listeners.extend(lost);
    Ok(Some(known))
}

/// The container's owner: as the command line says, or an earlier one said.
fn owner(options: &Activate, all: &[Installed], places: &Paths) -> anyhow::Result<Option<RunAsUser>> {
    match &options.run_as {
        Some(name) => Ok(Some(RunAsUser::find(name, places.root.as_deref())?)),
        None => {
            Ok(all.iter().find(|known| known.goes_by(&options.name)).and_then(|known| known.run_as.clone()))
        }
    }
}

/// All files that would be written, for a quadlet that was found.
fn plan(options: &Activate, places: &Paths) -> anyhow::Result<(Wanted, Option<Installed>, Vec<File>)> {
    let all = installed::all_in(&places.units, places.scope, places.root.as_deref())?;
    let owner = owner(options, &all, places)?;
    let quadlet = quadlet::find(&options.name, places.scope, owner.as_ref(), places.root.as_deref())?;
    root_dir::stays_inside(places.root.as_deref(), &quadlet.path)?;
    let known = all.into_iter().find(|known| known.name == quadlet.name);
    // A first run that was killed may have left the first port's socket, which is written again.
    if known.is_none()
        && let Some(rest) = leftover::find(&quadlet.name, &places.units, places.scope, places.root.as_deref())
        && rest.activated.listeners.iter().any(|listener| listener.service != quadlet.name)
    {
        return Err(installed::in_part(&rest).into());
    }
    if let Some(known) = &known
        && known.quadlet.extension() != quadlet.path.extension()
    {
        return Err(Failure::Usage(format!(
            "{} is activated already, for {}; both would need the same units",
            known.name,
            known.quadlet.display()
        ))
        .into());
    }
    if let Some(known) = &known
        && known.run_as != owner
    {
        let whose = known.run_as.as_ref().map_or("the system's own container", |owner| &owner.name);
        return Err(Failure::Usage(format!(
            "{} is activated already, for {whose}; both would need the same units: `bro activate {} --remove` makes room",
            known.name, known.name
        ))
        .into());
    }
    let wanted = plan::wanted(options, &quadlet, known.as_ref(), owner, places)?;
    let files = units::files(
        &wanted.activated,
        &executable::path(places)?,
        Some(&wanted.drop_in),
        (places.root.as_deref(), places.has_steps),
    )?;
    for file in &files {
        root_dir::stays_inside(places.root.as_deref(), &file.path)?;
    }
    Ok((wanted, known, files))
}

async fn activate(options: &Activate, places: &Paths, interrupt: &mut Interrupt) -> anyhow::Result<()> {
    if options.dry_run {
        return interrupt.or(dry_run(options, places)).await;
    }
    let Prepared { systemd, mut made, _lock, activated, known, changes, unfinished, warnings } =
        interrupt.or(prepare(options, places)).await?;
    output::warnings(&warnings)?;
    let (systemd, known) = (systemd.as_ref(), known.as_ref());
    let outcome =
        apply::activate(systemd, &activated, known, &changes, &unfinished, places, interrupt).await?;
    transaction::finished(&unfinished);
    made.keep();
    output::activated(&activated, &changes, outcome, places)
}

async fn dry_run(options: &Activate, places: &Paths) -> anyhow::Result<()> {
    let (wanted, known, _) = plan(options, places)?;
    let mut warnings = wanted.warnings;
    warnings.extend(executable::warning(places));
    warnings.extend(nowhere(&wanted.activated, places));
    warnings.extend(
        check_listeners(&wanted.activated, known.as_ref(), None, places)
            .await
            .err()
            .map(|error| error.to_string()),
    );
    let mut directories = directories_of(&wanted.activated, places);
    directories.extend(own_wants(places, places.units.exists()));
    let missing = directories.iter().flat_map(|directory| transaction::missing(directory));
    let activated = with_made(wanted.activated, missing, places)?;
    output::warnings(&warnings)?;
    output::files(&units::files(
        &activated,
        &executable::path(places)?,
        Some(&wanted.drop_in),
        (places.root.as_deref(), places.has_steps),
    )?)
}

/// All that is decided and checked, under the lock; nothing has changed but directories; dropping this removes them.
struct Prepared {
    systemd: Option<apply::Managers>,
    made: Made,
    _lock: Lock,
    activated: Installed,
    known: Option<Installed>,
    changes: Vec<Change>,
    unfinished: Vec<PathBuf>,
    warnings: Vec<String>,
}

async fn prepare(options: &Activate, places: &Paths) -> anyhow::Result<Prepared> {
    // The quadlet has to be there before directories are made; everything is read again under the lock.
    let owner = plan(options, places)?.0.activated.run_as;
    // Connected before anything is written: without systemd nothing could be started.
    let systemd = match &places.root {
        None => Some(apply::connect(places.scope, owner.as_ref()).await?),
        Some(_) => None,
    };
    let mut made = Made::for_all(places.scope == RuntimeScope::System);
    made.make(&places.units)?;
    let lock = Lock::take(&places.units, || made.make(&places.units)).await?;
    let (mut wanted, known, _) = plan(options, places)?;
    let mut warnings = std::mem::take(&mut wanted.warnings);
    warnings.extend(executable::warning(places));
    executable::check(&wanted.activated, places)?;
    check_listeners(&wanted.activated, known.as_ref(), systemd.as_ref(), places).await?;
    if let Some(systemd) = &systemd {
        let container = systemd.container().context("the container's service manager is gone")?;
        warnings.extend(apply::network_warning(container, wanted.waits_for_network).await);
        warnings.extend(image::warning(&wanted.activated, &wanted.quadlet).await);
        apply::check_freezing(container, &wanted.activated).await?;
    }
    warnings.extend(nowhere(&wanted.activated, places));
    let mut directories = directories_of(&wanted.activated, places);
    directories.extend(own_wants(places, !made.paths().contains(&places.units)));
    for directory in directories {
        made.make(&directory)?;
    }
    let activated = with_made(wanted.activated, made.paths().iter().cloned(), places)?;
    let files = units::files(
        &activated,
        &executable::path(places)?,
        Some(&wanted.drop_in),
        (places.root.as_deref(), places.has_steps),
    )?;
    let mut changes = changes(&activated, &files)?;
    // What an earlier run wrote and this run does not need.
    let left = known.iter().flat_map(files_of).filter(|path| !files.iter().any(|file| file.path == *path));
    for path in left {
        root_dir::stays_inside(places.root.as_deref(), &path)?;
        if transaction::owner(&path)? != Provenance::Theirs {
            changes.push(Change { path, text: None });
        }
    }
    let all = files_of(&activated).into_iter().chain(known.iter().flat_map(files_of));
    let unfinished = transaction::unfinished(&activated.name, &places.units, all);
    Ok(Prepared { systemd, made, _lock: lock, activated, known, changes, unfinished, warnings })
}

/// The warnings of external addresses that the host lacks.
fn nowhere(activated: &Installed, places: &Paths) -> Vec<String> {
    if places.root.is_some() {
        return Vec::new();
    }
    let addresses = activated.listeners.iter().filter_map(|listener| listener.address.parse().ok());
    let all = addresses.filter_map(|external| unassigned_address::sentence(&external));
    all.map(|sentence| format!("{sentence}; {}", unassigned_address::MEND)).collect()
}

/// Where its files go.
fn directories_of(activated: &Installed, places: &Paths) -> Vec<PathBuf> {
    let others = activated.others().filter_map(|path| path.parent());
    std::iter::once(&*places.units).chain(others).map(Path::to_owned).collect()
}

/// Where the links that enable sockets go, if not made by systemd: noted as made, unless the units' directory is new.
fn own_wants(places: &Paths, units_were_there: bool) -> Option<PathBuf> {
    (places.root.is_some() && units_were_there).then(|| apply::wants(places))
}

/// Notes the directories that were made for this service.
fn with_made(
    mut activated: Installed,
    made: impl Iterator<Item = PathBuf>,
    places: &Paths,
) -> anyhow::Result<Installed> {
    // An activated service that uses another one's directory shares it: the last one to go removes it.
    let mut mine = files_of(&activated);
    if places.root.is_some() {
        mine.extend(activated.listeners.iter().map(|listener| apply::wants(places).join(&listener.socket)));
    }
    let all = installed::all_in(&places.units, places.scope, places.root.as_deref())?;
    let shared = all.into_iter().flat_map(|other| other.made);
    let shared = shared.filter(|directory| mine.iter().any(|file| file.starts_with(directory)));
    activated.made.extend(made.chain(shared));
    activated.made.sort();
    activated.made.dedup();
    Ok(activated)
}

/// Every file of an activated service.
fn files_of(activated: &Installed) -> Vec<PathBuf> {
    let sockets = activated.listeners.iter().map(|listener| listener.file.clone());
    // Without its service's file, nothing says whether there is to be a timer.
    let timer = activated
        .timer_file()
        .filter(|timer| activated.kept_awake().is_some() || installed::read_ours(timer).is_some());
    let others = activated.others().cloned();
    sockets.chain(activated.service_file.clone()).chain(timer).chain(others).collect()
}

/// What differs from what is on the disk. A file that is not bro's is never touched.
fn changes(activated: &Installed, files: &[File]) -> anyhow::Result<Vec<Change>> {
    let mut changes = Vec::new();
    for File { path, text } in files {
        match transaction::owner(path)? {
            Provenance::Ours(old) if old == *text => continue,
            Provenance::Ours(_) if belongs_to_another(path, &activated.name) => {
                anyhow::bail!("{} belongs to another activated service; nothing was changed", path.display())
            }
            Provenance::Ours(_) | Provenance::Absent => {}
            Provenance::Theirs => anyhow::bail!(
                "{} is there and was not written by bro activate; move it away (nothing was changed)",
                path.display()
            ),
        }
        changes.push(Change { path: path.clone(), text: Some(text.clone()) });
    }
    Ok(changes)
}

fn belongs_to_another(path: &Path, name: &str) -> bool {
    let file = installed::read_ours(path);
    file.and_then(|file| file.value(installed::SECTION, "Name").map(|other| other != name)).unwrap_or(false)
}

/// Can systemd listen where it has to?
async fn check_listeners(
    activated: &Installed,
    known: Option<&Installed>,
    systemd: Option<&apply::Managers>,
    places: &Paths,
) -> anyhow::Result<()> {
    asked_at::check(activated, known, places)?;
    if places.root.is_some() {
        return Ok(());
    }
    for listener in &activated.listeners {
        if let Some(device) = &listener.device
            && !Path::new("/sys/class/net").join(device).exists()
        {
            return Err(
                Failure::Usage(format!("there is no network interface “{device}”; see `ip link`")).into()
            );
        }
        let external: External = listener.address.parse()?;
        // What is no socket is in the way, held or not.
        if let Some(port_owner::Trouble::InTheWay(why)) = port_owner::look(&external) {
            anyhow::bail!("{why} (nothing was changed)");
        }
        // Held by the socket that is to stay, or to be replaced.
        if known.is_some_and(|known| known.listeners.iter().any(|before| before.address == listener.address))
        {
            continue;
        }
        match port_owner::look(&external) {
            None | Some(port_owner::Trouble::InTheWay(_)) => {}
            Some(port_owner::Trouble::Forbidden(why)) => {
                let text = format!("{why}; {}", port_owner::instead(activated, listener));
                return Err(Failure::NotPermitted(text).into());
            }
            Some(port_owner::Trouble::Taken(owner)) if ours(&owner, known, systemd).await => {}
            Some(port_owner::Trouble::Taken(owner)) => {
                anyhow::bail!("{}", apply::taken(&external, &owner, systemd).await)
            }
        }
    }
    Ok(())
}

/// Is it a socket of this same service that will make room?
async fn ours(
    owner: &port_owner::AddressHolder,
    known: Option<&Installed>,
    systemd: Option<&apply::Managers>,
) -> bool {
    let Some(known) = known else { return false };
    match systemd {
        Some(systemd) => {
            let unit = systemd.socket_at(&owner.address).await;
            unit.is_some_and(|unit| known.listeners.iter().any(|before| before.socket == unit))
        }
        // A dry run asks no service manager; the port says enough.
        None => {
            let port = |address: &str| address.parse::<External>().ok().and_then(|address| address.port());
            let taken = port(&owner.address);
            taken.is_some() && known.listeners.iter().any(|before| port(&before.address) == taken)
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
    if options.dry_run {
        let known = known_or_left(name, places)?.ok_or_else(missing)?;
        return output::would_remove(&doomed(&known, options, places)?.0);
    }
    let prepare = async {
        let systemd = match &places.root {
            None => {
                let owner = known_or_left(name, places)?.and_then(|known| known.run_as);
                Some(apply::connect_for_removal(places.scope, owner.as_ref()).await?)
            }
            Some(_) => None,
        };
        let lock = Lock::take(&places.units, || Err(missing().into())).await?;
        Ok((systemd, lock))
    };
    let (systemd, _lock) = interrupt.or(prepare).await?;
    let known = known_or_left(name, places)?.ok_or_else(missing)?;
    let (changes, rest) = doomed(&known, options, places)?;
    for change in &changes {
        root_dir::stays_inside(places.root.as_deref(), &change.path)?;
        if transaction::owner(&change.path)? == Provenance::Theirs {
            anyhow::bail!(
                "{} was not written by bro activate any more; nothing was changed",
                change.path.display()
            );
        }
    }
    for directory in &known.made {
        root_dir::stays_inside(places.root.as_deref(), directory)?;
    }
    let unfinished = transaction::unfinished(&known.name, &places.units, files_of(&known));
    let left = apply::remove(systemd.as_ref(), &known, rest.as_ref(), &changes, places, interrupt).await?;
    transaction::finished(&unfinished);
    if rest.is_none() {
        transaction::remove_directories(&known.made)?;
        if places.root.is_none() {
            failed_wake::forget(&known);
            ledger::forget(&known);
            crate::service::wakes::forget(&known);
        }
    }
    output::removed(&known, &changes, left)
}

/// What has to change for the removal, and what stays activated.
fn doomed(
    known: &Installed,
    options: &Activate,
    places: &Paths,
) -> anyhow::Result<(Vec<Change>, Option<Installed>)> {
    let gone = |path: PathBuf| Change { path, text: None };
    let Some(service) = &options.service_name else {
        // Some may have been deleted by hand.
        let there = files_of(known).into_iter().filter(|path| std::fs::symlink_metadata(path).is_ok());
        return Ok((there.map(gone).collect(), None));
    };
    if let Some(rest) = leftover::find(&known.name, &places.units, places.scope, places.root.as_deref()) {
        return Err(installed::in_part(&rest).into());
    }
    let name = &known.name;
    if service == name {
        return Err(Failure::Usage(format!(
            "“{service}” is the first port of {name}; remove all of it: `bro activate {name} --remove`"
        ))
        .into());
    }
    let Some(listener) = known.listeners.iter().find(|listener| listener.service == *service) else {
        let others = known.listeners.iter().map(|listener| listener.service.as_str());
        let others: Vec<&str> = others.filter(|service| !service.is_empty()).collect();
        return Err(Failure::NotFound(format!(
            "{name} has no port “{service}”; it has {}",
            others.join(", ")
        ))
        .into());
    };
    let mut rest = known.clone();
    // A port that has lost its file leads to an unknown place.
    rest.listeners.retain(|listener| !listener.service.is_empty());
    rest.listeners.retain(|listener| listener.service != *service);
    let mut changes = vec![gone(listener.file.clone())];
    let drop_in = known.drop_in.as_deref().and_then(installed::read_ours);
    let drop_in = drop_in.map(|file| units::DropIn::read(&file, &rest));
    let bro = executable::written(known);
    for file in units::files(&rest, &bro, drop_in.as_ref(), (places.root.as_deref(), places.has_steps))? {
        if std::fs::read_to_string(&file.path).ok().as_deref() != Some(&file.text) {
            changes.push(Change { path: file.path, text: Some(file.text) });
        }
    }
    Ok((changes, Some(rest)))
}
