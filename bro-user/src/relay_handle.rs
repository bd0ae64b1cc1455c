//! The control process's end of the channel to the relay process ([`bro_relay::engine::protocol`]).

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bro_relay::engine::lanes::ServiceWatch;
use bro_relay::engine::protocol::{EngineCommand, EngineEvent, LONGEST, Plain};
use bro_relay::engine::report::Figures;
use bro_relay::stats::Tally;
use bro_relay::sys;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;

/// The callers that wait for an answer of the engine's.
#[derive(Debug, Default)]
struct PendingAnswers {
    /// For the figures, in the order of the questions.
    figures: VecDeque<oneshot::Sender<Figures>>,
    /// The part of the first one's that has come.
    tallies: Vec<Tally>,
    /// For a watch to begin, by target.
    watching: HashMap<usize, oneshot::Sender<bool>>,
}

/// The control process's end.
#[derive(Debug)]
pub struct Handle {
    commands: UnboundedSender<EngineCommand>,
    waiting: Arc<Mutex<PendingAnswers>>,
}

impl Handle {
    /// Talks over `channel` from now on, in the background; the events come out of the other value.
    ///
    /// # Errors
    /// When epoll does not take the channel.
    pub fn new(channel: OwnedFd) -> io::Result<(Self, UnboundedReceiver<EngineEvent>)> {
        let channel = Arc::new(crate::sys::watch(channel, Interest::READABLE | Interest::WRITABLE)?);
        let (commands, queue) = unbounded_channel();
        let (outlet, events) = unbounded_channel();
        let waiting = Arc::<Mutex<PendingAnswers>>::default();
        drop(tokio::spawn(write(channel.clone(), queue)));
        drop(tokio::spawn(read(channel, outlet, waiting.clone())));
        Ok((Self { commands, waiting }, events))
    }

    /// Sends a command.
    pub fn send(&self, command: impl Into<EngineCommand>) {
        // A closed queue means that the engine has ended, which the end of the events tells.
        self.commands.send(command.into()).ok();
    }

    /// Asks for the figures of this moment.
    pub fn report(&self) -> oneshot::Receiver<Figures> {
        let (to, figures) = oneshot::channel();
        self.waiting().figures.push_back(to);
        self.send(Plain::Report);
        figures
    }

    /// Has a target's service watched; the answer says whether the programs will tell when it listens.
    pub fn watch(&self, watch: ServiceWatch) -> oneshot::Receiver<bool> {
        let (to, watching) = oneshot::channel();
        let _older = self.waiting().watching.insert(watch.target, to);
        self.send(Plain::Watch(watch));
        watching
    }

    fn waiting(&self) -> MutexGuard<'_, PendingAnswers> {
        lock(&self.waiting)
    }
}

fn lock(waiting: &Mutex<PendingAnswers>) -> MutexGuard<'_, PendingAnswers> {
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn write(channel: Arc<AsyncFd<OwnedFd>>, mut queue: UnboundedReceiver<EngineCommand>) {
    while let Some(command) = queue.recv().await {
        let (bytes, descriptors) = command.encode();
        let descriptors: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
        let sent = channel
            .async_io(Interest::WRITABLE, |channel| {
                sys::send_with_descriptors(channel.as_fd(), &bytes, &descriptors)
            })
            .await;
        if sent.is_err() {
            return;
        }
    }
}

async fn read(
    channel: Arc<AsyncFd<OwnedFd>>,
    outlet: UnboundedSender<EngineEvent>,
    waiting: Arc<Mutex<PendingAnswers>>,
) {
    let mut buffer = vec![0; LONGEST];
    loop {
        let received = channel
            .async_io(Interest::READABLE, |channel| {
                sys::receive_with_descriptors(channel.as_fd(), &mut buffer).map(|(length, _none)| length)
            })
            .await;
        let Ok(length @ 1..) = received else { return };
        let Ok(event) = serde_json::from_slice(&buffer[..length]) else {
            tracing::error!("the relay process says something that makes no sense; ending it");
            return;
        };
        let mut waiting = lock(&waiting);
        match event {
            EngineEvent::Tallies(tallies) => waiting.tallies.extend(tallies),
            EngineEvent::Peers(peers) => {
                let tallies = std::mem::take(&mut waiting.tallies);
                // The caller may have gone meanwhile.
                drop(waiting.figures.pop_front().map(|to| to.send(Figures { tallies, peers })));
            }
            EngineEvent::Watching { target, watching } => {
                if let Some(to) = waiting.watching.remove(&target) {
                    to.send(watching).ok();
                }
            }
            event => {
                drop(waiting);
                if outlet.send(event).is_err() {
                    return;
                }
            }
        }
    }
}
