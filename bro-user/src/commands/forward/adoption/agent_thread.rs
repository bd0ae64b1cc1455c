//! The agent's thread. It waits in one poll(2) of its own, so that a container's calls are answered however busy the rest of this process is.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use anyhow::{Context as _, bail};
use bro_adopt::{Agent, Event, HostListener, Stored, Surroundings};
use tokio::sync::mpsc::UnboundedSender;

use super::claims::Claims;
use crate::systemd::notify;

/// What the thread says.
#[derive(Debug)]
pub(in super::super) enum AgentNews {
    /// Something has happened to a container, or a listener.
    Event(Event),
    /// It answers no more, which it was not told.
    Failed(nix::Error),
}

/// What the agent needs of this process.
#[derive(Debug)]
struct InForwarder {
    claims: Arc<Claims>,
    news: UnboundedSender<AgentNews>,
}

impl Surroundings for InForwarder {
    fn store(&mut self, name: &str, descriptor: BorrowedFd<'_>, polled: bool) {
        notify::store(name, descriptor, polled);
    }

    fn forget(&mut self, name: &str) {
        notify::forget(name);
    }

    fn claim(&mut self, listener: usize) -> bool {
        self.claims.take_for_service(listener)
    }

    fn unclaim(&mut self, listener: usize) {
        self.claims.leave_as_service(listener);
    }

    fn tell(&mut self, event: Event) {
        // A receiver that has left is about to end this thread too.
        self.news.send(AgentNews::Event(event)).ok();
    }
}

/// A running agent. It ends with this value, and answers what it has in hands before.
#[derive(Debug)]
pub(super) struct AgentThread {
    /// Closing it is the word to stop.
    stop: Option<OwnedFd>,
    thread: Option<JoinHandle<Agent<InForwarder>>>,
}

impl AgentThread {
    /// Starts it, with what was stored or bequeathed. What there is to say of that comes before anything else.
    ///
    /// # Errors
    /// When the seccomp socket or a listener cannot be used, or there is no thread to be had.
    pub(super) fn start(
        listeners: Vec<HostListener>,
        seccomp: OwnedFd,
        stored: Vec<Stored>,
        claims: Arc<Claims>,
        news: UnboundedSender<AgentNews>,
    ) -> anyhow::Result<Self> {
        let surroundings = InForwarder { claims, news: news.clone() };
        let mut agent = Agent::new(listeners, seccomp, stored, surroundings).context("--adopt")?;
        let (stopped, stop) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
        let answering = move || {
            if let Err(errno) = agent.run(stopped.as_fd()) {
                news.send(AgentNews::Failed(errno)).ok();
            }
            agent
        };
        let thread = std::thread::Builder::new().name("adopt".into()).spawn(answering)?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }

    /// Stops it, which takes as long as one answer; what a successor needs.
    ///
    /// # Errors
    /// EMFILE.
    pub(super) fn bequeath(mut self) -> anyhow::Result<Vec<Stored>> {
        drop(self.stop.take());
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(agent)) => Ok(agent.bequeath()?),
            _ => bail!("the agent has ended before"),
        }
    }
}

impl Drop for AgentThread {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // One that has panicked has said so.
            drop(thread.join());
        }
    }
}
