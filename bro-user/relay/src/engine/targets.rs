//! Targets as the engine sees them: asleep, being woken with clients held, or ready with an agent in their namespace that connects.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use super::agent_link::AgentLink;
use crate::netns::wire::TargetAddresses;
use crate::source::Sources;

/// How a target that listens is reached.
#[derive(Debug)]
pub struct ReadyTarget {
    /// Its addresses, tried in order, with what is known here of the ones on TCP. Not empty.
    pub addresses: Vec<Option<SocketAddr>>,
    /// Each connection has to ask the agent, for its namespace may be another one by then.
    pub guarded: bool,
    /// From which addresses they are connected to.
    pub sources: Sources,
    /// The agent that connects to them, by their numbers, or makes sockets for that.
    pub channel: OwnedFd,
}

/// Where an address of a target stands in the address book.
#[must_use]
pub const fn slot(target: usize, address: usize) -> usize {
    target * TargetAddresses::MOST + address
}

/// Whether a target listens, as far as the engine has been told.
#[derive(Debug)]
pub(super) enum Readiness {
    Asleep,
    /// The control process has been told that a client waits.
    Waking,
    Ready(Box<AgentLink>),
}

/// A target with its held clients.
#[derive(Debug)]
pub(super) struct HeldTarget {
    /// Its name in the log.
    pub(super) name: String,
    pub(super) readiness: Readiness,
    /// The connections that wait until it is ready.
    held: VecDeque<usize>,
    /// The cookie of the namespace in which the kernel relay's programs watch the service, if they do.
    pub(super) watched: Option<u64>,
    /// It was said that there is no source port towards it.
    ports_announced: bool,
    /// It was asked whether the service runs, for the clients that wake nothing.
    knocking: bool,
}

/// What a client finds that is to be held for a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    /// It sleeps: the control process is to be told.
    Asleep,
    /// It sleeps, and the client is none that wakes it: the control process is to be asked whether it runs.
    Unknown,
    /// It is ready: another reason holds the client.
    Ready,
    /// All that can be done is being done.
    Waking,
}

impl HeldTarget {
    const fn asleep(name: String) -> Self {
        Self {
            name,
            readiness: Readiness::Asleep,
            held: VecDeque::new(),
            watched: None,
            ports_announced: false,
            knocking: false,
        }
    }

    pub(super) const fn is_asleep(&self) -> bool {
        matches!(self.readiness, Readiness::Asleep)
    }

    pub(super) const fn is_ready(&self) -> bool {
        matches!(self.readiness, Readiness::Ready(_))
    }

    const fn is_waking(&self) -> bool {
        matches!(self.readiness, Readiness::Waking)
    }

    /// The way to it, while it is ready.
    pub(super) const fn link(&mut self) -> Option<&mut AgentLink> {
        match &mut self.readiness {
            Readiness::Ready(link) => Some(link),
            Readiness::Asleep | Readiness::Waking => None,
        }
    }

    /// One of its addresses, if it is on TCP.
    pub(super) fn address(&self, number: usize) -> Option<SocketAddr> {
        match &self.readiness {
            Readiness::Ready(link) => *link.ready.addresses.get(number)?,
            Readiness::Asleep | Readiness::Waking => None,
        }
    }

    /// Holds a client for it; says what is to be done for that client, once.
    pub(super) fn hold(&mut self, index: usize, wakes_nothing: bool) -> Found {
        self.held.push_back(index);
        match self.readiness {
            Readiness::Asleep if wakes_nothing => {
                let asked = std::mem::replace(&mut self.knocking, true);
                if asked { Found::Waking } else { Found::Unknown }
            }
            _ => self.stir(),
        }
    }

    /// Something waits for it that is no connection; says what is to be done for that, once.
    pub(super) fn stir(&mut self) -> Found {
        match self.readiness {
            Readiness::Asleep => {
                self.readiness = Readiness::Waking;
                Found::Asleep
            }
            Readiness::Waking => Found::Waking,
            Readiness::Ready(_) => Found::Ready,
        }
    }

    /// Its held clients, which it holds no more.
    pub(super) fn take_held(&mut self) -> VecDeque<usize> {
        std::mem::take(&mut self.held)
    }

    /// Whether the service runs, for the clients that wake nothing. Those are to be turned away if this returns them. Where another
    /// client wakes it by now, they wait with that one.
    pub(super) fn knocked(&mut self, runs: bool) -> VecDeque<usize> {
        self.knocking = false;
        match self.readiness {
            Readiness::Asleep if runs => self.readiness = Readiness::Waking,
            Readiness::Asleep => return self.take_held(),
            Readiness::Waking | Readiness::Ready(_) => {}
        }
        VecDeque::new()
    }

    /// It listens no more, or could not be started; the way to it, if there was one.
    pub(super) fn sleeps(&mut self) -> Option<Box<AgentLink>> {
        match std::mem::replace(&mut self.readiness, Readiness::Asleep) {
            Readiness::Ready(link) => Some(link),
            Readiness::Asleep | Readiness::Waking => None,
        }
    }

    /// It is to be said now that there is no source port towards it.
    pub(super) const fn announces_ports(&mut self) -> bool {
        !std::mem::replace(&mut self.ports_announced, true)
    }

    /// A connection that did not relay yet has ended.
    pub(super) fn forget(&mut self, index: usize) {
        self.held.retain(|&held| held != index);
        if let Some(link) = self.link() {
            link.forget(index);
        }
    }
}

/// `--freeze`: the service is there, and none of its processes runs. Its targets stay as they were found; clients that come are
/// held until the control process has had the service go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Frozen {
    /// It goes on.
    No,
    /// It is frozen, or about to be.
    Yes,
    /// A client waits for it, and the control process has been told.
    Thawing,
}

/// All targets. They are one service's, so that they are frozen together.
#[derive(Debug)]
pub(super) struct Targets {
    all: Vec<HeldTarget>,
    pub(super) frozen: Frozen,
}

impl Targets {
    pub(super) fn asleep(names: Vec<String>) -> Self {
        Self { all: names.into_iter().map(HeldTarget::asleep).collect(), frozen: Frozen::No }
    }

    pub(super) fn get_mut(&mut self, target: usize) -> Option<&mut HeldTarget> {
        self.all.get_mut(target)
    }

    pub(super) const fn len(&self) -> usize {
        self.all.len()
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut HeldTarget> {
        self.all.iter_mut()
    }

    /// Does every one sleep, with none being woken?
    pub(super) fn all_sleep(&self) -> bool {
        self.all.iter().all(HeldTarget::is_asleep)
    }

    /// Is one ready?
    pub(super) fn any_ready(&self) -> bool {
        self.all.iter().any(HeldTarget::is_ready)
    }

    /// May they be frozen, as far as they are concerned?
    pub(super) fn may_freeze(&self) -> bool {
        self.frozen == Frozen::No && self.any_ready() && !self.all.iter().any(HeldTarget::is_waking)
    }

    /// How many clients are held.
    pub(super) fn held(&self) -> u64 {
        self.all.iter().map(|target| target.held.len() as u64).sum()
    }
}

impl std::ops::Index<usize> for Targets {
    type Output = HeldTarget;

    fn index(&self, target: usize) -> &HeldTarget {
        &self.all[target]
    }
}

impl std::ops::IndexMut<usize> for Targets {
    fn index_mut(&mut self, target: usize) -> &mut HeldTarget {
        &mut self.all[target]
    }
}
