//! The relay process: the engine, in a process of its own that holds the connections and no rights. It is forked before the
//! forwarder has a second thread, gives up everything it could do harm with ([`crate::sandbox`]), and ends with its parent.

use std::collections::BTreeSet;
use std::ops::Range;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getppid};

use crate::engine::way_back::WayBack;
use crate::engine::{Engine, Settings, protocol};
use crate::listener::{Listener, SocketKind};
use crate::sandbox;
use crate::stats::Stats;
use crate::sys::{self, AddressBook};
use crate::target::Target;

/// How long the relay process may take to end when it has been told to.
const EXIT_LIMIT: Duration = Duration::from_secs(5);

/// The relay process, as its parent sees it.
#[derive(Debug)]
pub struct Process {
    pid: Pid,
    pidfd: OwnedFd,
}

/// Starts the relay process for `listeners`, each with the index of its target in `targets`. Returns the channel to it as well. To
/// be called while this process has a single thread. What is `private` is open here, and not there.
///
/// # Errors
/// When no other process can be made.
pub fn start(
    settings: &Settings,
    listeners: &[(Listener, usize)],
    targets: &[Target],
    addresses: &mut AddressBook,
    stats: &Arc<Stats>,
    private: &[BorrowedFd<'_>],
) -> anyhow::Result<(Process, OwnedFd)> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
    let parent = nix::unistd::getpid();
    match sys::fork().context("cannot start the relay process")? {
        Some(pid) => {
            addresses.shared();
            let pidfd = sys::pidfd_open(pid).context("cannot watch the relay process")?;
            Ok((Process { pid: Pid::from_raw(pid), pidfd }, ours))
        }
        None => {
            drop(ours);
            for private in private {
                sys::close_in_child(*private);
            }
            let served = serve(parent, settings, listeners, targets, addresses, stats.clone(), theirs);
            let code = served.map_or_else(
                |error| {
                    tracing::error!("the relay process fails: {error:#}");
                    1
                },
                |()| 0,
            );
            // Without the destructors of the parent's values (the files of unix sockets, say).
            sys::exit_now(code)
        }
    }
}

fn serve(
    parent: Pid,
    settings: &Settings,
    listeners: &[(Listener, usize)],
    targets: &[Target],
    addresses: &mut AddressBook,
    stats: Arc<Stats>,
    channel: OwnedFd,
) -> anyhow::Result<()> {
    // However the parent ends: connections that could not be ended in order are reset (SO_LINGER).
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    if getppid() != parent {
        // It has ended already.
        return Ok(());
    }
    // What systemd or a terminal sends to the whole group is the parent's to hear.
    for ignored in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        sys::ignore(ignored)?;
    }
    prctl::set_name(c"bro-relay")?;
    let (listeners, numbers) = in_a_row(listeners)?;
    let answers_unix = listeners.iter().any(|(listener, _)| listener.kind == SocketKind::UnixDatagram);
    let datagrams = listeners.iter().any(|(listener, _)| listener.kind.takes_datagrams());
    let addresses = addresses.for_relay();
    let addresses = addresses.inspect_err(|error| tracing::debug!(%error, "the agents connect")).ok();
    let place = addresses.as_ref().map(AddressBook::place);
    let ends = protocol::engines_ends(channel);
    let names = targets.iter().map(Target::to_string).collect();
    let engine = Engine::new(settings.clone(), listeners, names, addresses, stats, ends)?;
    let ports = targets.iter().filter_map(|target| match target {
        Target::Tcp { port, .. } => Some(*port),
        Target::Udp { .. } | Target::Unix(_) | Target::Abstract(_) | Target::Datagrams(_) => None,
    });
    let (ports, binds): (Vec<u16>, _) = (ports.collect(), settings.binds);
    let confine = move || {
        sandbox::enter(place.clone(), ports.iter().copied(), numbers.clone(), binds, datagrams, answers_unix)
    };
    if let Some(way_back) = engine.way_back() {
        start_way_back(way_back, confine.clone())?;
    }
    for missing in confine()? {
        tracing::info!("the relay process runs without a part of its sandbox: {missing}");
    }
    engine.run()
}

/// Starts the thread that answers clients' datagrams, and returns once it is in the sandbox, which each thread enters for itself. The
/// process ends with it.
fn start_way_back(
    way_back: Arc<WayBack>,
    confine: impl FnOnce() -> anyhow::Result<Vec<String>> + Send + 'static,
) -> anyhow::Result<()> {
    let (tell, told) = std::sync::mpsc::sync_channel(1);
    let run = move || {
        let confined = confine().map(drop);
        let goes_on = confined.is_ok();
        if tell.send(confined).is_err() || !goes_on {
            return;
        }
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| way_back.run()));
        tracing::error!("the relay process fails: its answers to datagrams end with {ended:?}");
        sys::exit_now(1)
    };
    let _thread = std::thread::Builder::new().name("bro-answers".into()).spawn(run)?;
    told.recv().context("the thread for answers has ended")?
}

/// Each listener with the index of its target, and the numbers of their descriptors.
type SocketsInARow = (Vec<(Listener, usize)>, Range<RawFd>);

/// The listeners, for the relay process alone: under descriptors with numbers in a row, which its sandbox tells from all others,
/// and under no other.
fn in_a_row(parents: &[(Listener, usize)]) -> anyhow::Result<SocketsInARow> {
    let open = std::fs::read_dir("/proc/self/fd")?.flatten();
    let open = open.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let open: BTreeSet<RawFd> = open.collect();
    // The first row that is free: a process may have been started with a descriptor that is beyond its limit.
    let count = RawFd::try_from(parents.len())?;
    let free = |first: &RawFd| (*first..*first + count).all(|number| !open.contains(&number));
    let first = (3..RawFd::MAX - count).find(free).context("no descriptors are left")?;
    let mut listeners = Vec::with_capacity(parents.len());
    let mut next = first;
    for (listener, target) in parents {
        let own = listener.for_relay(next)?;
        ensure!(own.socket.as_raw_fd() == next, "a descriptor was opened while the relay process starts");
        sys::close_in_child(listener.socket.as_fd());
        listeners.push((own, *target));
        next += 1;
    }
    Ok((listeners, first..next))
}

impl Process {
    /// Its process id, as this one sees it.
    #[must_use]
    pub const fn pid(&self) -> i32 {
        self.pid.as_raw()
    }

    /// Waits for its end; it has been told to end, or has ended already. What is done `before` it is reaped finds its number still its own.
    ///
    /// # Errors
    /// When it did not end well.
    pub fn wait(self, before: impl FnOnce()) -> anyhow::Result<()> {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let mut polled = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        let patience = PollTimeout::try_from(EXIT_LIMIT).unwrap_or(PollTimeout::MAX);
        if poll(&mut polled, patience) == Ok(0) {
            kill(self.pid, Signal::SIGKILL).ok();
        }
        before();
        match waitpid(self.pid, Some(WaitPidFlag::__WALL))? {
            WaitStatus::Exited(_, 0) => Ok(()),
            WaitStatus::Exited(_, code) => bail!("the relay process exited with status {code}"),
            WaitStatus::Signaled(_, signal, _) => bail!("the relay process was ended by {signal}"),
            other => bail!("the relay process is in an odd state: {other:?}"),
        }
    }
}
