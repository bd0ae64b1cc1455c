//! What an agent needs of the process that it runs in, and what it tells it.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use crate::clients::ClientEnd;
use crate::health::Damage;
use crate::notification::Call;

/// The service manager's store, and the control process.
pub trait Surroundings {
    /// Keeps a descriptor beyond this process's end, under a name of its own (sd_notify(3), FDSTORE=1 with FDNAME=; FDPOLL=0 where `polled` is false:
    /// it is not to be dropped because it polls as hung up).
    fn store(&mut self, name: &str, descriptor: BorrowedFd<'_>, polled: bool);
    /// Keeps it no longer (FDSTOREREMOVE=1), and returns when that was heard (BARRIER=1): it is closed then, or soon.
    fn forget(&mut self, name: &str);
    /// May a service have this listener now? From a yes on nothing else accepts at it, until [`Surroundings::unclaim`]; its flags and options are the
    /// service's.
    fn claim(&mut self, _listener: usize) -> bool {
        true
    }
    /// No service has it any more, and it is as it was.
    fn unclaim(&mut self, _listener: usize) {}
    /// A connection from inside a container is relayed to one of the listeners, with this end: it is not the host's client.
    fn relays(&mut self, _end: ClientEnd) {}
    /// It is over, as far as this agent is concerned: its service may still have it.
    fn relays_no_more(&mut self, _end: ClientEnd) {}
    /// Something has happened.
    fn tell(&mut self, event: Event);
    /// A step is done. For tests, which end the agent there.
    fn reached(&mut self, _step: Step) {}
}

/// A descriptor that a predecessor has stored, with its name.
#[derive(Debug)]
pub struct Stored {
    /// The name.
    pub name: String,
    /// The descriptor.
    pub descriptor: OwnedFd,
}

/// What has happened. A listener is meant by its place among those that the agent was given.
#[derive(Debug)]
pub enum Event {
    /// A container's processes are answered from now on.
    Started {
        /// The signal by which its first process is told to stop. None where the runtime does not say it, and of a predecessor's container.
        stop_signal: Option<i32>,
    },
    /// Such a container has ended.
    Stopped,
    /// A service has the listener: it is ready, and accepts its clients, or has their datagrams, itself.
    Adopted {
        /// Which.
        listener: usize,
        /// How many of its socket options could not be set on the listener.
        options_refused: usize,
        /// Why clients inside the container do not find the service any more.
        inside: Option<io::Error>,
    },
    /// A service listens at a socket of its own, or has bound one, and its clients have to be relayed.
    NotAdopted {
        /// Which.
        listener: usize,
        /// Why.
        why: Misfit,
    },
    /// A service has shut the listener down, as it thinks. It has its own socket again.
    GivenBack {
        /// Which.
        listener: usize,
    },
    /// Clients wait at the listener, and no process of a container has it any more: the service has closed it, or shut it down. The listener is as it
    /// was before, and its next listen(2) gets it again.
    Closed {
        /// Which.
        listener: usize,
    },
    /// The container that had the listener has ended. The listener is as it was before.
    Ended {
        /// Which.
        listener: usize,
    },
    /// What came to `listenerPath` is not taken.
    Refused(crate::receiver::Refused),
}

/// Why a service keeps its own socket.
#[derive(Debug, thiserror::Error)]
pub enum Misfit {
    /// [`Surroundings::claim`] says no.
    #[error("the listener's clients are relayed already")]
    Relayed,
    /// Nothing of [`crate::family::Family::choose`].
    #[error("its socket is of another family than the listener")]
    Family,
    /// It would get a broken one.
    #[error("the listener is damaged: {0}")]
    Damaged(#[from] Damage),
    /// O_NONBLOCK, options.
    #[error("its socket options cannot be carried over: {0}")]
    Options(io::Error),
    /// Registrations.
    #[error("what it watches with epoll cannot be moved: {0}")]
    Epoll(io::Error),
    /// SECCOMP_IOCTL_NOTIF_ADDFD.
    #[error("the listener cannot be put in its place: {0}")]
    Replacing(io::Error),
}

/// A step of an answer, or of what leads to them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// A runtime's connection is in the store.
    Connected,
    /// The notification descriptor is in the store, and the connection is still.
    Introduced,
    /// The notification is in the record.
    Received(Call),
    /// Options and flags are on the listener.
    Carried,
    /// Epoll watches the listener.
    Watched,
    /// The service's own socket for datagrams is bound.
    Bound,
    /// The original is in the store.
    Kept,
    /// The listener is in its place.
    Replaced,
    /// The answer is in the record.
    Decided(Call),
    /// The caller has it.
    Answered(Call),
}
