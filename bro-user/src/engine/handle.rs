//! How the control side and the engine talk: commands in through a queue and an eventfd, events out through a tokio channel.

use std::sync::{Arc, mpsc};

use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::Destination;
use crate::connection::End;
use crate::stats::Tally;

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
    /// Accept no more, and say when the last connection has ended.
    Drain,
    /// End every connection now.
    EndAll(End),
    /// Accept no more if there is no connection; say whether.
    StopIfIdle,
    /// Answer, to show that the engine turns.
    Ping,
    /// Send each listener's figures there.
    Report(tokio::sync::oneshot::Sender<Vec<Tally>>),
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
    /// The first connection since it was idle.
    Busy,
    /// The last connection has ended.
    Idle,
    /// The answer to [`Command::StopIfIdle`].
    StoppedIfIdle(bool),
    /// The answer to [`Command::Drain`].
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

impl Drop for Handle {
    fn drop(&mut self) {
        // Closes the queue first, so that the engine that this wakes up sees it closed.
        let (closed, _) = mpsc::channel();
        self.commands = closed;
        self.wakeup.write(1).ok();
    }
}

/// The control side has gone.
#[derive(Debug)]
pub struct Gone;

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
    ///
    /// # Errors
    /// When there can never be one again.
    pub fn next(&self) -> Result<Option<Command>, Gone> {
        match self.commands.try_recv() {
            Ok(command) => Ok(Some(command)),
            Err(mpsc::TryRecvError::Empty) => {
                // Rearm, then look once more: a command may have come between.
                self.wakeup.read().ok();
                match self.commands.try_recv() {
                    Ok(command) => Ok(Some(command)),
                    Err(mpsc::TryRecvError::Empty) => Ok(None),
                    Err(mpsc::TryRecvError::Disconnected) => Err(Gone),
                }
            }
            Err(mpsc::TryRecvError::Disconnected) => Err(Gone),
        }
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
