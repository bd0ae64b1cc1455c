//! The agent's thread. It waits in one poll(2) of its own, so that a container's calls are answered however busy the rest of this process is.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use bro_adopt::clients::ClientEnd;
use bro_adopt::{Agent, Event, HostListener, Stored, Surroundings, store};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::mpsc::{Receiver, Sender, channel};

use super::claims::Claims;
use super::relayed_inside::RelayedInside;
use crate::systemd::notify;

/// What the thread says.
#[derive(Debug)]
pub(in super::super) enum AgentNews {
    /// Something has happened to a container, or a listener.
    Event(Event),
    /// A service listens, and waits to have a listener at which the relay only sifts.
    Wanted(usize),
    /// It answers no more, which it was not told.
    Failed(nix::Error),
}

impl AgentNews {
    /// Does it say that there is one container more, or one less?
    pub(super) const fn counts_containers(&self) -> bool {
        matches!(self, Self::Event(Event::Started { .. } | Event::Stopped))
    }
}

/// How much the agent may have said that was not heard yet, beside what it says before it runs: then its calls wait, and with them the container, whose calls it
/// is that there are so many of.
const UNHEARD: usize = 1024;

/// What the agent needs of this process.
#[derive(Debug)]
struct InForwarder {
    claims: Arc<Claims>,
    inside: Arc<RelayedInside>,
    news: Sender<AgentNews>,
}

/// Tells it; waits where too much was not heard yet. A receiver that has left is about to end this thread too.
fn tell(news: &Sender<AgentNews>, one: AgentNews) {
    // In the control process's own thread there is room: nothing of a new agent was heard yet, and that has a bound of its own.
    if let Err(TrySendError::Full(one)) = news.try_send(one) {
        news.blocking_send(one).ok();
    }
}

impl Surroundings for InForwarder {
    fn store(&mut self, name: &str, descriptor: BorrowedFd<'_>, polled: bool) {
        notify::store(name, descriptor, polled);
    }

    fn forget(&mut self, name: &str) {
        notify::forget(name);
    }

    fn claim(&mut self, listener: usize) -> bool {
        if self.claims.is_sieve(listener) {
            tell(&self.news, AgentNews::Wanted(listener));
        }
        self.claims.take_for_service(listener)
    }

    fn unclaim(&mut self, listener: usize) {
        self.claims.leave_as_service(listener);
    }

    fn relays(&mut self, end: ClientEnd) {
        self.inside.begins(end);
    }

    fn relays_no_more(&mut self, end: ClientEnd) {
        self.inside.is_over(end, Instant::now());
    }

    fn tell(&mut self, event: Event) {
        tell(&self.news, AgentNews::Event(event));
    }
}

/// A running agent. It ends with this value, and answers what it has in hands before.
#[derive(Debug)]
pub(super) struct AgentThread {
    /// Closing it is the word to stop.
    stop: Option<OwnedFd>,
    thread: Option<JoinHandle<Agent<InForwarder>>>,
    /// What another one has said before it, from the last on.
    unheard: Vec<AgentNews>,
    news: Receiver<AgentNews>,
}

impl AgentThread {
    /// Starts it, with what was stored or bequeathed. What there is to say of that comes before anything else but what is `unheard` of another agent.
    ///
    /// # Errors
    /// When the seccomp socket or a listener cannot be used, or there is no thread to be had.
    pub(super) fn start(
        listeners: Vec<HostListener>,
        seccomp: OwnedFd,
        stored: Vec<Stored>,
        (claims, inside): (Arc<Claims>, Arc<RelayedInside>),
        mut unheard: Vec<AgentNews>,
    ) -> anyhow::Result<Self> {
        let (news, hears) = channel(UNHEARD + store::MOST + listeners.len());
        unheard.reverse();
        let surroundings = InForwarder { claims, inside, news: news.clone() };
        let mut agent = Agent::new(listeners, seccomp, stored, surroundings).context("--adopt")?;
        let (stopped, stop) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
        let answering = move || {
            if let Err(errno) = agent.run(stopped.as_fd()) {
                tell(&news, AgentNews::Failed(errno));
            }
            agent
        };
        let thread = std::thread::Builder::new().name("adopt".into()).spawn(answering)?;
        Ok(Self { stop: Some(stop), thread: Some(thread), unheard, news: hears })
    }

    /// What it has said already.
    pub(super) fn said_already(&mut self) -> Option<AgentNews> {
        self.unheard.pop().or_else(|| self.news.try_recv().ok())
    }

    /// What it says next. Nothing is lost when this is cancelled.
    pub(super) async fn news(&mut self) -> AgentNews {
        if let Some(one) = self.unheard.pop() {
            return one;
        }
        match self.news.recv().await {
            Some(one) => one,
            // It has said why.
            None => std::future::pending().await,
        }
    }

    /// Stops it, which takes as long as one answer; what a successor needs, and what was not heard yet.
    ///
    /// # Errors
    /// EMFILE.
    pub(super) fn bequeath(mut self) -> anyhow::Result<(Vec<Stored>, Vec<AgentNews>)> {
        drop(self.stop.take());
        let Some(thread) = self.thread.take() else { bail!("the agent has ended before") };
        let mut unheard = Vec::new();
        // It may wait for room.
        while !thread.is_finished() {
            match self.said_already() {
                Some(one) => unheard.push(one),
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        }
        unheard.extend(std::iter::from_fn(|| self.said_already()));
        match thread.join() {
            Ok(agent) => Ok((agent.bequeath()?, unheard)),
            Err(_) => bail!("the agent has ended before"),
        }
    }
}

impl Drop for AgentThread {
    fn drop(&mut self) {
        drop(self.stop.take());
        // Or it might wait for room for ever.
        self.news.close();
        if let Some(thread) = self.thread.take() {
            // One that has panicked has said so.
            drop(thread.join());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// One that is not heard says no more than there is room for, and waits; what it said is in order; and it does not wait for a receiver that has left.
    #[test]
    fn what_is_not_heard_is_bounded() {
        const ROOM: usize = 4;
        let (news, mut hears) = channel(ROOM);
        let said = Arc::new(AtomicUsize::new(0));
        let counted = said.clone();
        let agent = std::thread::spawn(move || {
            let mut surroundings =
                InForwarder { claims: Arc::new(Claims::new(0)), inside: Arc::default(), news };
            for listener in 0..3 * ROOM {
                surroundings.tell(Event::Ended { listener });
                counted.fetch_add(1, Ordering::SeqCst);
            }
        });
        while said.load(Ordering::SeqCst) < ROOM {
            std::thread::yield_now();
        }
        // It cannot have got further, however long it is waited for.
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!((said.load(Ordering::SeqCst), hears.len()), (ROOM, ROOM));
        for wanted in 0..2 * ROOM {
            let heard = hears.blocking_recv();
            assert!(
                matches!(&heard, Some(AgentNews::Event(Event::Ended { listener })) if *listener == wanted),
                "{heard:?}"
            );
        }
        drop(hears);
        agent.join().unwrap();
    }
}
