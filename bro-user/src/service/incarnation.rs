//! Where the targets are: the namespace that is searched for, entered, and left when its container goes.

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bro_relay::netns::identity::Identity;
use nix::libc;
use tokio::io::unix::AsyncFd;
use tokio::time::sleep;

use super::whereabouts::Whereabouts;
use super::{LOOK, ServiceStarter};
use crate::exit::Failure;
use crate::netns::agent_process::SpareAgent;
use crate::netns::{self, Namespace};
use crate::podman::container::{self, Inspected};
use crate::podman::rootless_netns;

/// Where targets are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetnsSource {
    /// In the forwarder's own namespace.
    Own,
    /// In a Podman container of this user.
    Container(String),
    /// Where this process is.
    Pid(i32),
    /// In the namespace that this file names.
    Netns(PathBuf),
}

/// A namespace that was entered, for as long as it is the right one.
#[derive(Debug)]
pub struct ContainerNetns {
    pub(super) namespace: Arc<Namespace>,
    /// The process through which it was found.
    pub(super) pid: Option<i32>,
    /// Readable when that process has exited.
    process: Option<AsyncFd<OwnedFd>>,
    /// Device and inode of the namespace.
    file: (u64, u64),
    /// The path of its file, if that is not where bro looked for it.
    pub(super) path: Option<PathBuf>,
}

/// Between two looks through all processes for a container that is being started.
const SEARCH: Duration = Duration::from_millis(20);

/// How long bro looks for a running conmon before it asks podman.
const ASK_PODMAN: Duration = Duration::from_secs(1);

impl ServiceStarter {
    /// The agent in the forwarder's own namespace.
    pub(super) async fn own_agent(&self) -> anyhow::Result<Arc<Namespace>> {
        let mut own = self.own.lock().await;
        if let Some(own) = own.as_ref().filter(|own| !own.has_ended()) {
            return Ok(own.clone());
        }
        let here = std::fs::File::open("/proc/self/ns/net")?;
        let process = netns::folder_of(std::process::id())?;
        let entered = Namespace::enter(here.into(), process, None, self.identity, &self.spare).await?;
        Ok(own.insert(Arc::new(entered)).clone())
    }

    /// The entered namespace: the current one if it is still the right one, else a newly found one, however long the search takes.
    pub(super) async fn incarnation(&self) -> anyhow::Result<Arc<ContainerNetns>> {
        let _searching = self.searching.lock().await;
        let known = self.current().take().filter(|incarnation| incarnation.is_current(&self.place));
        if let Some(incarnation) = known {
            *self.current() = Some(incarnation.clone());
            return Ok(incarnation);
        }
        let fresh = Arc::new(match &self.place {
            NetnsSource::Own => unreachable!("the own namespace is not entered"),
            NetnsSource::Pid(pid) => ContainerNetns::of_process(*pid, self.identity, &self.spare).await?,
            NetnsSource::Netns(path) => self.enter_file(path).await?,
            NetnsSource::Container(name) => self.enter_container(name).await?,
        });
        *self.current() = Some(fresh.clone());
        Ok(fresh)
    }

    async fn enter_file(&self, path: &Path) -> anyhow::Result<ContainerNetns> {
        loop {
            match std::fs::File::open(path) {
                Ok(file) if !bro_relay::sys::is_network_namespace(file.as_fd()) => {
                    if let Some(found) = self.enter_rootless(path).await? {
                        return Ok(found);
                    }
                    sleep(LOOK).await;
                }
                Ok(file) => return ContainerNetns::of_file(file.into(), self.identity, &self.spare).await,
                // A unit may be about to make it.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound && self.unit.is_some() => {
                    sleep(LOOK).await
                }
                Err(error) => {
                    return Err(opening(&format!("the namespace {}", path.display()), &error).into());
                }
            }
        }
    }

    /// The namespace of a user's own networks. `None` where it is not there yet and a unit may be about to make it.
    async fn enter_rootless(&self, path: &Path) -> anyhow::Result<Option<ContainerNetns>> {
        let none = || Failure::NotFound(format!("{} is not a network namespace", path.display()));
        let reachable = rootless_netns::reachable(path).ok_or_else(none)?;
        match std::fs::File::open(&reachable) {
            Ok(file) if bro_relay::sys::is_network_namespace(file.as_fd()) => {
                let mut found = ContainerNetns::of_file(file.into(), self.identity, &self.spare).await?;
                found.path = Some(reachable);
                Ok(Some(found))
            }
            Ok(_) if self.unit.is_some() => Ok(None),
            Ok(_) => Err(none().into()),
            Err(error) => Err(opening(&format!("the namespace {}", path.display()), &error).into()),
        }
    }

    async fn enter_container(&self, name: &str) -> anyhow::Result<ContainerNetns> {
        let start = tokio::time::Instant::now();
        let mut asked = start;
        let mut whereabouts = match &self.unit {
            Some(unit) => Some(Whereabouts::of(self.bus().await?, unit, self.runs.is_ordered()).await),
            None => None,
        };
        loop {
            let mut pid = match &mut whereabouts {
                Some(whereabouts) => whereabouts.look(name).await,
                None => container::running(name),
            };
            // Without a unit perhaps nothing is about to start it, so podman is asked at once; with one, only if conmon is hidden.
            let nothing_else_tells = match &whereabouts {
                Some(whereabouts) => whereabouts.is_elsewhere() && asked.elapsed() > ASK_PODMAN,
                None => asked == start || asked.elapsed() > ASK_PODMAN,
            };
            if pid.is_none() && nothing_else_tells {
                match container::inspect(name).await {
                    Ok(Inspected::Running(found)) => pid = Some(found),
                    Ok(_) => {}
                    // In a service with few rights podman can do nothing. If a unit is started, conmon will show up.
                    Err(error) if self.unit.is_some() => tracing::debug!(%error, "podman was asked in vain"),
                    Err(error) => return Err(error),
                }
                asked = tokio::time::Instant::now();
            }
            if let Some(pid) = pid {
                match ContainerNetns::of_process(pid, self.identity, &self.spare).await {
                    // The container was just leaving; the next one will come.
                    Err(error) if matches!(error.downcast_ref(), Some(Failure::NotFound(_))) => {}
                    result => return result,
                }
            }
            match &mut whereabouts {
                Some(whereabouts) => whereabouts.wait().await,
                None => sleep(SEARCH).await,
            }
        }
    }
}

impl ContainerNetns {
    /// A namespace that a file names. There, unix paths and ids are this process's own.
    async fn of_file(netns: OwnedFd, identity: Identity, spare: &SpareAgent) -> anyhow::Result<Self> {
        let stat = nix::sys::stat::fstat(&netns)?;
        let own = netns::folder_of(std::process::id())?;
        let namespace = Arc::new(Namespace::enter(netns, own, None, identity, spare).await?);
        Ok(Self { namespace, pid: None, process: None, file: (stat.st_dev, stat.st_ino), path: None })
    }

    async fn of_process(pid: i32, identity: Identity, spare: &SpareAgent) -> anyhow::Result<Self> {
        let what = format!("process {pid}");
        let open = |path: String, flags: i32| {
            use std::os::unix::fs::OpenOptionsExt as _;
            std::fs::OpenOptions::new().read(true).custom_flags(flags).open(path).map(OwnedFd::from)
        };
        // First the process, then what belongs to it: if it is still there afterwards, both are its own.
        let process = bro_relay::sys::pidfd_open(pid).map_err(|error| opening(&what, &error))?;
        let netns = open(format!("/proc/{pid}/ns/net"), 0).map_err(|error| {
            // The kernel says this of a process that has just been reaped (`proc_ns_get_link`), as of another user's.
            let dying = bro_relay::sys::exited(&process);
            opening(&what, &if dying { std::io::Error::from_raw_os_error(libc::ESRCH) } else { error })
        })?;
        let folder = netns::folder_of(pid.unsigned_abs()).map_err(|error| opening(&what, &error))?;
        let root = open(format!("/proc/{pid}/root"), libc::O_PATH | libc::O_DIRECTORY).ok();
        if bro_relay::sys::exited(&process) {
            return Err(Failure::NotFound(format!("{what} has exited")).into());
        }
        let stat = nix::sys::stat::fstat(&netns)?;
        let namespace = Arc::new(Namespace::enter(netns, folder, root, identity, spare).await?);
        let process = Some(crate::sys::watch(process, tokio::io::Interest::READABLE)?);
        Ok(Self { namespace, pid: Some(pid), process, file: (stat.st_dev, stat.st_ino), path: None })
    }

    /// Is this still the namespace that a client should be connected in?
    fn is_current(&self, place: &NetnsSource) -> bool {
        if self.namespace.has_ended() {
            return false;
        }
        match place {
            NetnsSource::Netns(path) => {
                let path = self.path.as_ref().unwrap_or(path);
                nix::sys::stat::stat(path).is_ok_and(|stat| (stat.st_dev, stat.st_ino) == self.file)
            }
            _ => self.process.as_ref().is_none_or(|process| !bro_relay::sys::exited(process.get_ref())),
        }
    }

    /// Does its process do something at this signal, and may this process send it?
    pub(super) fn heeds(&self, signal: i32) -> bool {
        let Some((process, pid)) = self.process.as_ref().zip(self.pid) else { return false };
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        // The number is still its own if it has not exited by now.
        let heeds = signal == libc::SIGKILL || bro_proc::signals::heeds(&status, signal);
        heeds && crate::sys::signal(process.get_ref().as_fd(), 0).is_ok()
    }

    /// Sends its process a signal.
    ///
    /// # Errors
    /// ESRCH when it has exited; EPERM.
    pub(super) fn signal(&self, signal: i32) -> std::io::Result<()> {
        let process = self.process.as_ref().ok_or(std::io::ErrorKind::NotFound)?;
        crate::sys::signal(process.get_ref().as_fd(), signal)
    }

    /// Waits until its process has exited. (A namespace's file does not tell when it is replaced; the engine looks at it.)
    pub async fn gone(&self) {
        match &self.process {
            // An error would mean that the pidfd is no pidfd.
            Some(process) => {
                process.readable().await.map(|mut guard| guard.retain_ready()).unwrap_or_default()
            }
            None => std::future::pending().await,
        }
    }
}

/// Waits until the process that an incarnation was found through has exited; for ever where there is none.
pub(super) async fn gone(incarnation: Option<&ContainerNetns>) {
    match incarnation {
        Some(incarnation) => incarnation.gone().await,
        None => std::future::pending().await,
    }
}

/// The error about a namespace that cannot be opened.
fn opening(what: &str, error: &std::io::Error) -> Failure {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ESRCH) => Failure::NotFound(format!("{what} does not exist")),
        Some(libc::EACCES | libc::EPERM) => {
            Failure::NotPermitted(format!("{what} belongs to another user: run bro as that user, or as root"))
        }
        _ => Failure::NotFound(format!("{what} cannot be opened: {error}")),
    }
}
