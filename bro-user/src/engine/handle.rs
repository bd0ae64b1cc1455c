//! How the control side and the engine talk: commands in through a queue and an eventfd, events out through a tokio channel.

use std::sync::{Arc, mpsc};

use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::Destination;
use crate::connection::End;

/// What the control side tells the engine.
#[derive(Debug)]
pub enum Command {
    /// The target listens: connect its held clients and those to come.
    Ready {
        /// Which target.
        backend: usize,
        /// How to reach it.
        destination: Destination,
    },
    /// It could not be started: reset its held clients.
    Failed {
        /// Which target.
        backend: usize,
        /// Why, for their log lines.
        end: End,
    },
    /// It has gone to sleep: hold the next client.
    Gone {
        /// Which target.
        backend: usize,
    },
    /// Accept no more, for this reason; say when that is so, and when the last connection has ended.
    Drain(&'static str),
    /// End every connection now.
    EndAll(End),
    /// Accept no more if it is time to leave; say whether.
    Leave(super::idle::Leave),
    /// Wake what sleeps; who wants it, for the log.
    Wake(String),
    /// Answer, to show that the engine turns.
    Ping,
    /// The kernel relay is loaded.
    Kernel(Box<crate::kernel::Kernel>),
    /// Have the kernel relay watch a target's service.
    Watch(super::lanes::Watch),
    /// End: the control side is done.
    Stop,
    /// Send the figures there.
    Report(tokio::sync::oneshot::Sender<super::report::Figures>),
}

/// What the engine tells the control side. Bounded without a limit on the queue: per target one wake at a time, and the others
/// are answers.
#[derive(Debug)]
pub enum Event {
    /// A client waits for this target.
    Wake {
        /// Which target.
        backend: usize,
        /// Who the client is.
        peer: String,
        /// The target was ready and refused a connection since.
        refused: bool,
    },
    /// Something began to listen at this port of the namespace with this cookie.
    Listening {
        /// The cookie.
        netns: u64,
        /// The port.
        port: u16,
    },
    /// The answer to [`Command::Leave`].
    Leaving(bool),
    /// The first answer to [`Command::Drain`]: nobody is accepted any more.
    Draining(&'static str),
    /// The second: nobody is connected any more.
    Drained,
    /// The answer to [`Command::Ping`].
    Pong,
}

/// The control side's end.
#[derive(Debug)]
pub struct Handle {
    commands: mpsc::Sender<Command>,
    wakeup: Arc<EventFd>,
}

impl Handle {
    /// Sends a command.
    pub fn send(&self, command: Command) {
        // A closed queue means that the engine has ended, which its thread's result reports.
        self.commands.send(command).ok();
        self.wakeup.write(1).ok();
    }
}

/// The engine's end of the commands.
#[derive(Debug)]
pub struct Mailbox {
    commands: mpsc::Receiver<Command>,
    wakeup: Arc<EventFd>,
}

impl Mailbox {
    /// What epoll watches.
    #[must_use]
    pub fn wakeup(&self) -> &EventFd {
        &self.wakeup
    }

    /// The next command, if there is one.
    #[must_use]
    pub fn next(&self) -> Option<Command> {
        self.commands.try_recv().ok().or_else(|| {
            // Rearm, then look once more: a command may have come between.
            self.wakeup.read().ok();
            self.commands.try_recv().ok()
        })
    }
}

/// The engine's end of the events.
#[derive(Debug)]
pub struct Outbox(UnboundedSender<Event>);

impl Outbox {
    /// Tells the control side.
    pub fn tell(&self, event: Event) {
        self.0.send(event).ok();
    }
}

/// Both ends of both queues.
///
/// # Errors
/// eventfd(2)'s.
pub fn channel() -> nix::Result<(Handle, UnboundedReceiver<Event>, Mailbox, Outbox)> {
    let wakeup = Arc::new(EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
    let (commands, receiver) = mpsc::channel();
    let (sender, events) = unbounded_channel();
    let handle = Handle { commands, wakeup: wakeup.clone() };
    Ok((handle, events, Mailbox { commands: receiver, wakeup }, Outbox(sender)))
}
