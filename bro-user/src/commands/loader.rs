//! `bro loader`: has the kernel relay's programs loaded and attached for one user: that user's forwarders need no rights.

mod subordinate;

use std::io::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail};
use bro_proc::cgroup;
use bro_sockmap::pin::{self, Named, Order};
use bro_sockmap::{LOADER_UNIT, Unavailable};
use nix::unistd::{Uid, User};

use crate::cli::Loader;
use crate::exit::Failure;
use crate::systemd::manager::SystemdManager;
use crate::systemd::scope::RuntimeScope;

/// How long systemd may take to start a user's manager.
const LOAD_LIMIT: Duration = Duration::from_secs(60);

/// Loads, or removes.
///
/// # Errors
/// When the user is unknown, or the kernel refuses.
pub fn run(options: &Loader) -> anyhow::Result<()> {
    let (uid, name) = user(&options.user)?;
    let named = if options.user.parse::<u32>().is_ok() { Named::Number } else { Named::Name };
    if uid == 0 {
        bail!(Failure::Usage(
            "root's forwarders load for themselves; bro loader is for ordinary users".into()
        ));
    }
    if !nix::unistd::geteuid().is_root() {
        bail!(Failure::NotPermitted(format!(
            "only root may load programs for a user: {}",
            advice(&uid.to_string())
        )));
    }
    let mut out = std::io::stdout().lock();
    if options.remove {
        let said = if pin::remove(uid, named).map_err(plain)? {
            "removed; forwarders that use them go on with them until they end"
        } else {
            "there was nothing to remove"
        };
        return Ok(writeln!(out, "{name} ({uid}): {said}")?);
    }
    let cgroup = match &options.cgroup {
        Some(cgroup) => cgroup.clone(),
        None => slice(uid, &name)?,
    };
    let subordinate =
        subordinate::ranges(&std::fs::read_to_string("/etc/subuid").unwrap_or_default(), uid, &name);
    let order = Order { named, user: uid, subordinate, cgroup, connections: options.connections };
    pin::install(&order).map_err(plain)?;
    let (cgroup, connections) = (order.cgroup.display(), order.connections);
    let seats = bro_ebpf::SEATS;
    writeln!(
        out,
        "{name} ({uid}): the kernel relay is loaded for {cgroup}: {seats} forwarders, {connections} connections each"
    )?;
    Ok(())
}

/// A user by name or number; a user without a name has only the number.
fn user(text: &str) -> anyhow::Result<(u32, String)> {
    let unknown = || Failure::NotFound(format!("there is no user “{text}”"));
    if let Ok(uid) = text.parse::<u32>() {
        let name = User::from_uid(Uid::from_raw(uid))?.map(|user| user.name);
        return Ok((uid, name.unwrap_or_else(|| uid.to_string())));
    }
    let user = User::from_name(text)?.ok_or_else(unknown)?;
    Ok((user.uid.as_raw(), user.name))
}

/// The user's own cgroup, which is there while the user is logged in or lingers, or as long as a unit needs it.
fn slice(uid: u32, name: &str) -> anyhow::Result<PathBuf> {
    let slice = cgroup::of_user(uid).context("cgroup v2")?;
    if slice.is_dir() {
        return Ok(slice);
    }
    // A user that lingers is just about to get it: the machine boots.
    if std::path::Path::new("/var/lib/systemd/linger").join(name).exists() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let unit = format!("user@{uid}.service");
        let start = async { SystemdManager::connect(RuntimeScope::System).await?.start(&unit).await };
        let result = runtime.block_on(async { tokio::time::timeout(LOAD_LIMIT, start).await });
        let result = result.with_context(|| format!("{unit} did not start within {LOAD_LIMIT:?}"))??;
        if slice.is_dir() {
            return Ok(slice);
        }
        bail!("{unit} was started ({result}), and there is no cgroup {}", slice.display());
    }
    bail!(
        "{name} is neither logged in nor lingers, so there is no cgroup {}; `systemctl enable --now bro-loader@{uid}`, by number, \
         keeps it there",
        slice.display()
    );
}

/// The command that loads the kernel relay for a user, here.
pub(crate) fn advice(user: &str) -> String {
    if bro_sockmap::loader_unit_is_installed() {
        return format!("`sudo systemctl enable --now bro-loader@{user}`");
    }
    format!(
        "`sudo bro loader {user}`, until the next boot ({LOADER_UNIT}, which does it at each, is not installed: bro's packages bring it)"
    )
}

/// The reason with its mend, and the exit code that goes with it.
fn plain(reason: Unavailable) -> anyhow::Error {
    let mend = match reason {
        // The fixes of these name this command.
        Unavailable::Pin(..) | Unavailable::NotPermitted(..) => String::new(),
        _ => format!(" ({})", reason.mend()),
    };
    let permitted = !matches!(reason, Unavailable::NotPermitted(..));
    let sentence = format!("{:#}{mend}", anyhow::Error::from(reason));
    if permitted { anyhow::Error::msg(sentence) } else { Failure::NotPermitted(sentence).into() }
}
